"""SQL over the store, read only: duckdb in memory, with a view for each of its tables and for its hosts.

The store is a directory or, as s3://BUCKET/PREFIX, a copy of one in an object store. What is asked may come from
somebody else than who asks it: it is one SELECT, which writes nothing and reads nothing but the store.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from .formats import InputError, printable
from .store import HOSTS, TABLES, live, view

# What is beyond it waits in a directory of its own, on the disk.
MEMORY = "2GB"
# Of an answer, in rows.
AT_ONCE = 10_000
# Of a table on a terminal, which must be known whole to be laid out: rows, and characters of a cell.
MOST_ROWS, MOST_CELL = 1000, 200
MOST_ERROR = 500
REMOTE = "s3://"
# For Ctrl-C, seconds.
LOOK_S = 0.2

_NAMES = ", ".join(sorted([*TABLES, "hosts"]))
# What to do about an error, where duckdb does not say.
_WAYS_OUT: tuple[tuple[type[duckdb.Error], str], ...] = (
    (duckdb.CatalogException, f"the tables are {_NAMES}; DESCRIBE one for its columns"),
    (duckdb.PermissionException, "a query reads the store and nothing else"),
    (duckdb.OutOfMemoryException, "ask for fewer days or hosts, as by WHERE day = '2026-03-02'"),
    (duckdb.IOException, "where a collection was under way, ask again"),
)
_AWS = "see that AWS_* in the environment are those of the bucket, with AWS_ALLOW_HTTP=true where it has no TLS"
# Around what an object store answered.
_OBJECT_STORE = re.compile(r"Traceback .*?\n(?=[\w.]+: )|\n\nDebug source.*", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d.]*(e[+-]?\d+)?|")
_T = TypeVar("_T")


def answer(store: str, sql: str, shown_as: str) -> Iterator[str]:
    """What one SELECT finds in the store, in text to be printed piece by piece. shown_as: table, csv or json.

    Raises InputError where there is no store, or the SQL cannot be answered.
    """
    cast = "to_json(COLUMNS(*))::VARCHAR" if shown_as == "json" else "COLUMNS(*)::VARCHAR"
    lay_out = {"table": _table, "csv": _csv, "json": _json}[shown_as]
    with tempfile.TemporaryDirectory(prefix="plimsoll-query-") as scratch, ThreadPoolExecutor(1) as thread:
        try:
            with duckdb.connect() as connection:
                _in(thread, connection, lambda: _open(connection, store, sql, scratch))
                # A SELECT by itself may be WITH x AS (COPY ...); what query() takes, writes nothing. What is put into
                # the text here is one of the two constants above, and the user's SQL is the parameter.
                ask = f"SELECT {cast} FROM query(?)"  # noqa: S608 - of constants
                _in(thread, connection, lambda: connection.execute(ask, [sql]))
                names = [column[0] for column in connection.description or ()]
                rows = iter(lambda: _in(thread, connection, lambda: connection.fetchmany(AT_ONCE)), [])
                yield from lay_out(names, chain.from_iterable(rows))
        except duckdb.Error as error:
            raise InputError(_said(error)) from None


def _in(thread: ThreadPoolExecutor, connection: duckdb.DuckDBPyConnection, step: Callable[[], _T]) -> _T:
    """What a step of duckdb's returns. Ctrl-C ends it: by itself, duckdb may not look for minutes.

    Nor does it end a wait, as polars has a handler of its own that lets the wait go on.
    """
    doing = thread.submit(step)
    try:
        while not wait([doing], LOOK_S).done:
            pass
        return doing.result()
    except KeyboardInterrupt:
        connection.interrupt()
        wait([doing])
        raise


def _said(error: duckdb.Error) -> str:
    """One line of what duckdb says: without the excerpt of a statement that is ours."""
    text = str(error).partition("\n\nLINE")[0]
    if "Expected a single SELECT" in text:
        return "a query is one SELECT, FROM, WITH, DESCRIBE, SUMMARIZE or SHOW TABLES: it can only read"
    ways_out = [way_out for kind, way_out in _WAYS_OUT if isinstance(error, kind)]
    if _OBJECT_STORE.search(text):
        text, ways_out = _OBJECT_STORE.sub("", text), [_AWS]
    return printable("; ".join([" ".join(text.split()), *ways_out]), MOST_ERROR)


# ---- the store as views ----


def _open(connection: duckdb.DuckDBPyConnection, store: str, sql: str, scratch: str) -> None:
    """Gives it the views, and nothing else to read. What memory lacks it may write to scratch. Raises InputError."""
    if store.startswith(REMOTE):
        connection.register_filesystem(_bucket(store))
        root = store.rstrip("/")
    else:
        root = str(Path(store).resolve())
    for name, value in {
        "TimeZone": "UTC",
        "memory_limit": MEMORY,
        "temp_directory": scratch,
        # Both as it is and as the patterns have it.
        "allowed_directories": [f"{root}/", f"{glob.escape(root)}/"],
        "enable_external_access": False,
        "lock_configuration": True,
    }.items():
        connection.execute(f"SET {name} = ?", [value])
    hosts = f"{glob.escape(root)}/{HOSTS}"
    if not _files(connection, hosts):
        raise InputError(f"{store}: no store, as there is no {HOSTS} in it; collect.yml makes one")
    columns = "{'host': 'VARCHAR', 'collected': 'BOOLEAN', 'reason': 'VARCHAR', 'last': 'DOUBLE'}"
    quoted = hosts.replace("'", "''")
    connection.execute(f"CREATE TEMP VIEW hosts AS FROM read_json('{quoted}', columns = {columns})")
    # Listing takes seconds for each table of a large fleet. What names none, as SHOW TABLES, is about all.
    named = set(re.findall(r"\w+", sql.lower()))
    for table in named.intersection(TABLES) if named.intersection([*TABLES, "hosts"]) else TABLES:
        parts = defaultdict(list)
        for path in _files(connection, f"{glob.escape(root)}/{table}/day=*/host=*/*.parquet"):
            folder, _, name = path.rpartition("/")
            parts[folder].append(name)
        view(connection, table, [f"{folder}/{name}" for folder in sorted(parts) for name in live(parts[folder])])


def _files(connection: duckdb.DuckDBPyConnection, pattern: str) -> list[str]:
    return [path for (path,) in connection.execute("SELECT file FROM glob(?)", [pattern]).fetchall()]


def _bucket(store: str) -> Any:
    """Raises InputError."""
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        raise InputError(f"{store}: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL to read it")
    try:
        from .bucket import Bucket
    except ImportError:
        raise InputError(f"{store}: needs obstore, which plimsoll[s3] brings") from None
    return Bucket("/".join(store.split("/")[:3]))


# ---- answers as text ----


def _table(names: Sequence[str], rows: Iterator[Sequence[str | None]]) -> Iterator[str]:
    """For people: aligned, and with nothing in it that a terminal would obey."""
    shown = [[printable(cell or "", MOST_CELL) for cell in row] for row, _ in zip(rows, range(MOST_ROWS))]
    columns = list(zip(*[list(map(printable, names)), *shown]))
    widths = [max(map(len, column)) for column in columns]
    right = [all(map(_NUMBER.fullmatch, column[1:])) for column in columns]
    for row in zip(*columns):
        cells = (cell.rjust(width) if end else cell.ljust(width) for cell, width, end in zip(row, widths, right))
        yield "  ".join(cells).rstrip()
    if not shown:
        yield "(no rows)"
    elif next(rows, None):
        yield f"(more than {MOST_ROWS} rows: --format csv has them all)"


def _csv(names: Sequence[str], rows: Iterator[Sequence[str | None]]) -> Iterator[str]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in chain([names], rows):
        writer.writerow(row)
        yield text.getvalue().removesuffix("\n")
        text.seek(0)
        text.truncate()


def _json(names: Sequence[str], rows: Iterator[Sequence[str | None]]) -> Iterator[str]:
    """One array, an object a row; the cells are JSON already."""
    keys = [json.dumps(name) for name in names]
    before = "["
    for row in rows:
        yield before + "{" + ", ".join(f"{key}: {_finite(cell)}" for key, cell in zip(keys, row)) + "}"
        before = ","
    yield "[]" if before == "[" else "]"


def _finite(cell: str | None) -> str:
    """JSON has no number that is none or without end."""
    if cell is None:
        return "null"
    if "NaN" in cell or "Infinity" in cell:
        return json.dumps(json.loads(cell, parse_constant=lambda _: None))
    return cell
