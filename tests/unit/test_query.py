"""plimsoll query: what docs/store.md shows is what it answers; and it reads the store, and does nothing else."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import polars as pl
import pytest
from plimsoll import query
from plimsoll.cli import main
from plimsoll.formats import CgroupSample, Event, Record, Rollup, Sample, schema
from plimsoll.store import TABLES, Unit, day_of, escaped

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "store.md"
HOUR, DAY = 3600, 86400
# A week from Monday, 2 March 2026, on, collected on Sunday at noon; on Tuesday at noon a release was deployed.
MONDAY = 1_772_409_600
DEPLOYED, COLLECTED = MONDAY + 36 * HOUR, MONDAY + 156 * HOUR
GATE, SALES, MAIL, PDF = (f"celery-worker@{name}.service" for name in ("gate", "sales", "mail", "pdf"))
# When a process of pdf ended: restarted by the guard, and twice killed by the kernel.
GUARDED, *KILLED = ENDED = (MONDAY + 30 * HOUR, MONDAY + 72 * HOUR + 600, MONDAY + 136 * HOUR + 2400)
LIMITS = {GATE: (340_000, 400_000), SALES: (None, 250_000), MAIL: (200_000, 240_000), PDF: (350_000, 400_000)}
Held = dict[str, dict[str, list[NamedTuple]]]


class Life(NamedTuple):
    """A process: KiB at its start and an hour later; times in Unix seconds."""

    unit: str
    pid: int
    role: str
    start: int
    end: int
    size: int
    rate: int = 0

    def at(self, when: int) -> int:
        return self.size + self.rate * (when - self.start) // HOUR + when // 600 * 37 % 7 * 8


def lives() -> dict[str, list[Life]]:
    """gate leaks from the deployment on; mail is recycled every 8 hours; pdf meets MemoryMax; sales is well."""
    hosts: dict[str, list[Life]] = {"w-1": [], "w-2": [], "w-3": []}
    for host, end in (("w-1", COLLECTED), ("w-2", COLLECTED), ("w-3", COLLECTED - 6 * HOUR)):
        hosts[host] += [
            Life(SALES, 800, "main", MONDAY - DAY, end, 55_000),
            Life(SALES, 801, "child", MONDAY - DAY, end, 70_000),
        ]
    for pid, start, end, rate in ((1000, MONDAY - DAY, DEPLOYED, 0), (2000, DEPLOYED, COLLECTED, 250)):
        hosts["w-1"] += [Life(GATE, pid, "main", start, end, 60_000)]
        hosts["w-1"] += [Life(GATE, pid + child, "child", start, end, 90_000, rate) for child in (1, 2)]
    hosts["w-2"] += [Life(MAIL, 3000, "main", MONDAY - DAY, COLLECTED, 58_000)]
    hosts["w-2"] += [
        Life(MAIL, 3001 + at // (8 * HOUR), "child", MONDAY + at, min(MONDAY + at + 8 * HOUR, COLLECTED), 80_000, 1500)
        for at in range(0, COLLECTED - MONDAY, 8 * HOUR)
    ]
    for pid, (start, end, rate) in enumerate(
        zip((MONDAY, *ENDED), (*ENDED, COLLECTED - 6 * HOUR), (6200, 5450, 3600, 3600))
    ):
        hosts["w-3"] += [Life(PDF, 4000 + 10 * pid, "main", start, end, 60_000)]
        hosts["w-3"] += [Life(PDF, 4001 + 10 * pid, "child", start, end, 90_000, rate)]
    return hosts


def figures(held: Sequence[Life]) -> Iterator[CgroupSample]:
    """Of each unit every ten minutes; its counters begin anew when its main process does."""
    for unit in sorted({one.unit for one in held}):
        waited = over = 0
        high, most = LIMITS[unit]
        for when in range(MONDAY, COLLECTED, 600):
            here = [one for one in held if one.unit == unit and one.start <= when < one.end]
            if not here:
                continue
            if any(one.role == "main" and one.start == when for one in here):
                waited = over = 0
            level = sum(one.at(when) for one in here) + 20_000
            full = high is not None and level > high
            waited, over = waited + (90_000_000 if full else 20_000), over + 50 * full
            restarts = sum(kill <= when for kill in KILLED) if unit == PDF else 0
            swap, ends = 0, (over, 0, 0)
            yield CgroupSample(when, unit, level, high, most, swap, *ends, waited, waited // 2, restarts)


def events() -> Iterator[Event]:
    yield Event(GUARDED, PDF, "guard", 5, None, "restart: 347 MiB of 342 MiB MemoryHigh (101 %) for 30 s")
    for count, kill in enumerate(KILLED, 1):
        for ago, task in ((41, "shop.pdf.invoice"), (8, "shop.pdf.catalogue")):
            line = f"[{clock(kill - ago)},120: INFO/MainProcess] Task {task}[{count}f1c] received"
            yield Event(kill - ago, PDF, "worker", 6, 4000, line)
        yield Event(
            kill - 1, PDF, "kernel", 3, None, f"oom-kill:constraint=CONSTRAINT_MEMCG,task_memcg=/{PDF},task=python"
        )
        yield Event(kill, PDF, "systemd", 4, 1, f"{PDF}: A process of this unit has been killed by the OOM killer.")
        yield Event(kill + 1, PDF, "systemd", 4, 1, f"{PDF}: Failed with result 'oom-kill'.")
        yield Event(kill + 6, PDF, "systemd", 6, 1, f"{PDF}: Scheduled restart job, restart counter is at {count}.")


def clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when))


def grown() -> Iterator[Record]:
    """What the bootstrap says of gate's tasks each hour: how often they finished so far, what RSS gained in them."""
    for hour in range(1, (COLLECTED - DEPLOYED) // HOUR + 1):
        for pid in (2001, 2002):
            for task, count, grew in (
                ("shop.gate.check", 360, 240),
                ("shop.gate.audit", 40, 10),
                ("shop.gate.ping", 900, 0),
            ):
                found = {
                    "time": float(DEPLOYED + hour * HOUR),
                    "unit": GATE,
                    "pid": pid,
                    "kind": "task_growth",
                    "task": task,
                }
                found |= {"count": count * hour, "measured": count * hour, "rss_growth_kb": grew * hour}
                yield Record(found["time"], GATE, pid, "task_growth", json.dumps(found))


def week() -> Held:
    """host to table to rows."""
    held: Held = {}
    for host, processes in lives().items():
        rollups: list[NamedTuple] = [
            Rollup(
                when, one.pid, one.unit, one.start, one.role, 10, size, size + 400, size + 900, (when - one.start) // 4
            )
            for one in processes
            for when in range(max(one.start, MONDAY), one.end, 600)
            for size in [one.at(when)]
        ]
        seen = sorted({one.unit for one in processes})
        limits = (
            (MONDAY, unit, "6.1.0-31-amd64", "3.11.2", "active", "running", "success", 0, *LIMITS[unit], 0)
            for unit in seen
        )
        held[host] = {"rollups": rollups, "cgroups": [*figures(processes)], "units": [Unit(*one) for one in limits]}
    held["w-1"]["traces"] = [*grown()]
    held["w-3"]["events"] = [*events()]
    # Of one worker all was asked for, on the last day.
    held["w-1"]["samples"] = [
        Sample(when, one.pid, one.at(when), f"celery -A shop worker -n {one.unit}", one.unit, one.start, one.role)
        for one in lives()["w-1"]
        if one.unit == GATE
        for when in range(MONDAY + 6 * DAY, one.end, 60)
    ]
    return held


def write(root: Path, held: Held, hosts: Sequence[Mapping[str, Any]]) -> Path:
    """A store as `plimsoll ingest` lays it out."""
    for host, found in held.items():
        for table, rows in found.items():
            kind = TABLES[table]
            frame = pl.DataFrame(rows, schema(kind), orient="row")
            days = frame.with_columns((pl.col(kind._fields[0]) // DAY).cast(pl.Int64).alias("day"))
            for (day,), part in days.partition_by("day", as_dict=True, include_key=False).items():
                path = root / table / day_of(day) / f"host={escaped(host)}" / "part-00000001.parquet"
                path.parent.mkdir(parents=True)
                part.write_parquet(path)
    root.mkdir(exist_ok=True)
    (root / "hosts.json").write_text(json.dumps(hosts))
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lost = "unreachable: ssh: connect to host w-3 port 22: No route to host"
    hosts = [
        {"host": "w-1", "collected": True, "reason": "", "last": COLLECTED},
        {"host": "w-2", "collected": True, "reason": "", "last": COLLECTED},
        {"host": "w-3", "collected": False, "reason": lost, "last": COLLECTED - 6 * HOUR},
        {"host": "w-4", "collected": False, "reason": "unreachable: timed out", "last": None},
    ]
    return write(tmp_path_factory.mktemp("query") / "store", week(), hosts)


@pytest.fixture
def ask(capsys: Any) -> Callable[..., tuple[int, str, str]]:
    def ask(store: Any, *words: str) -> tuple[int, str, str]:
        code = main(["query", str(store), *words])
        return code, *capsys.readouterr()

    return ask


def found(ask: Any, store: Any, sql: str) -> list[dict[str, Any]]:
    """The rows of an answer."""
    code, out, err = ask(store, sql, "--format", "json")
    assert (code, err) == (0, "")
    return json.loads(out)


def small(root: Path, host: str = "w-1", **tables: list[NamedTuple]) -> Path:
    return write(root / "store", {host: tables}, [{"host": host, "collected": True, "reason": "", "last": None}])


def rollup(unit: str = GATE, floor: int = 1) -> Rollup:
    return Rollup(MONDAY, 7, unit, MONDAY, "child", 10, floor, floor, floor, 1)


# ---- the page ----

QUESTIONS = re.findall(
    r"^### ([^\n]+\?)\n.*?```sql\n(.*?)```\n```text\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE
)


def test_every_sql_of_the_page_is_one_of_its_ten_questions() -> None:
    assert len(QUESTIONS) == PAGE.read_text().count("```sql") == 10


@pytest.mark.parametrize(("sql", "shown"), [one[1:] for one in QUESTIONS], ids=[one[0] for one in QUESTIONS])
def test_the_page_shows_what_is_answered(ask: Any, store: Path, sql: str, shown: str) -> None:
    assert ask(store, sql) == (0, shown, "")


# ---- what can be asked ----


def test_sql_may_come_from_standard_input(ask: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT count(*) AS hosts FROM hosts -- of all\n"))
    assert ask(store, "-") == (0, "hosts\n    4\n", "")


def test_a_table_that_has_no_file_yet_is_empty_and_has_its_columns(ask: Any, tmp_path: Path) -> None:
    root = small(tmp_path)
    assert {one["name"] for one in found(ask, root, "SHOW TABLES")} == {*TABLES, "hosts"}
    for table, kind in TABLES.items():
        assert [one["column_name"] for one in found(ask, root, f"DESCRIBE {table}")] == [*kind._fields, "host", "day"]
        assert found(ask, root, f"FROM {table}") == []
    assert ask(root, "SELECT unit FROM events") == (0, "unit\n(no rows)\n", "")


@pytest.mark.parametrize("host", ["007", "w:1", "a/b%20c", "w-[3]"])
def test_hosts_have_their_own_names_and_days_are_dates(ask: Any, tmp_path: Path, host: str) -> None:
    root = small(tmp_path / "it's [here]", host, rollups=[rollup()])
    (row,) = found(
        ask, root, "SELECT host, day, day + 1 AS next FROM rollups JOIN hosts USING (host) WHERE day > '2026-03-01'"
    )
    assert row == {"host": host, "day": "2026-03-02", "next": "2026-03-03"}


def test_what_was_put_together_is_not_counted_twice(ask: Any, tmp_path: Path) -> None:
    """As when a run ended between the one file and the removal of the others."""
    root = small(tmp_path, rollups=[rollup()])
    (part,) = root.rglob("part-*")
    part.with_name("part-00000001-00000002.parquet").write_bytes(part.read_bytes())
    part.with_name("part-00000003.parquet").write_bytes(part.read_bytes())
    assert found(ask, root, "SELECT count(*) AS rows FROM rollups") == [{"rows": 2}]


def test_a_query_by_day_and_host_reads_the_files_of_those_alone(ask: Any, store: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(store, root)
    for path in (*root.glob("rollups/day=2026-03-04/*/*"), *root.glob("rollups/*/host=w-2/*")):
        path.write_bytes(b"no Parquet")
    asked = "SELECT count(*) AS rows FROM rollups WHERE host = 'w-1' AND day BETWEEN '2026-03-02' AND '2026-03-03'"
    assert found(ask, root, asked) == found(ask, store, asked) == [{"rows": 2 * 144 * 5}]
    code, _, err = ask(root, "SELECT count(*) FROM rollups")
    assert code == 2 and ".parquet" in err and err.count("\n") == 1


# ---- how it is shown ----


def test_a_terminal_is_shown_no_control_character_of_a_host_and_data_has_them_all(ask: Any, tmp_path: Path) -> None:
    root = small(tmp_path, rollups=[rollup("\x1b[2J\n,\u202e")])
    assert ask(root, 'SELECT unit, unit AS "\x07" FROM rollups')[1] == "unit     ?\n?[2J?,?  ?[2J?,?\n"
    out = ask(root, "SELECT unit, NULL AS none FROM rollups", "--format", "csv")[1]
    assert list(csv.reader(io.StringIO(out))) == [["unit", "none"], ["\x1b[2J\n,\u202e", ""]]
    assert found(ask, root, "SELECT unit FROM rollups") == [{"unit": "\x1b[2J\n,\u202e"}]


def test_json_is_json_whatever_is_in_it(ask: Any, store: Path) -> None:
    sql = "SELECT 1.5 AS a, 'nan'::DOUBLE AS b, [1, 'inf'::DOUBLE] AS c, {'d': NULL} AS e, 'NaN' AS \"g\\\""
    (row,) = found(ask, store, sql)
    assert row == {"a": 1.5, "b": None, "c": [1, None], "e": {"d": None}, "g\\": "NaN"}


def test_a_table_ends_where_nobody_reads_on_and_csv_does_not(ask: Any, store: Path) -> None:
    out = ask(store, "FROM range(30000)")[1].splitlines()
    assert len(out) == 1002 and out[-1] == "(more than 1000 rows: --format csv has them all)"
    assert ask(store, "FROM range(30000)", "--format", "csv")[1].split() == ["range", *map(str, range(30000))]
    assert len(found(ask, store, "SELECT repeat('x', 1000) AS long")[0]["long"]) == 1000
    assert len(ask(store, "SELECT repeat('x', 1000) AS long")[1].splitlines()[1]) == 200


def test_the_order_that_was_asked_for_is_kept(ask: Any, store: Path) -> None:
    out = ask(store, "FROM range(200000) ORDER BY range DESC", "--format", "csv")[1].split()[1:]
    assert out == [str(number) for number in reversed(range(200_000))]


# ---- what cannot be asked ----


@pytest.mark.parametrize(
    "sql",
    [
        "COPY hosts TO '{store}/out.csv'",
        "WITH x AS (COPY hosts TO '{store}/out.csv') SELECT 1",
        "FROM query('WITH x AS (COPY hosts TO ''{store}/out.csv'') SELECT 1')",
        "EXPLAIN ANALYZE COPY hosts TO '{store}/out.csv'",
        "SELECT 1) TO '{store}/out.csv'; COPY (SELECT 1",
        "ATTACH '{store}/out.db'",
        "CREATE TABLE x AS SELECT 1",
        "DROP VIEW hosts",
        "SELECT 1; SELECT 2",
        "SET threads = 1",
        "FROM enable_logging(storage = 'file', storage_path = '{store}/log')",
        "INSTALL httpfs",
        "FROM read_text('{beside}')",
        "FROM read_text('{store}/../secret')",
        "FROM '{beside}'",
        "FROM glob('/etc/*')",
        "FROM sql",
        "",
    ],
)
def test_a_query_writes_nothing_and_reads_nothing_but_the_store(ask: Any, tmp_path: Path, sql: str) -> None:
    root = small(tmp_path, rollups=[rollup()])
    (tmp_path / "secret").write_text("secret")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = ask(root, sql.format(store=root, beside=tmp_path / "secret"))
    assert (code, out) == (2, "") and err.startswith("plimsoll: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DROP VIEW hosts", "a query is one SELECT, FROM, WITH, DESCRIBE, SUMMARIZE or SHOW TABLES: it can only read"),
        ("FROM sample", "the tables are cgroups, events, hosts, rollups, samples, traces, units"),
        ("SELECT pss FROM samples", '"pss" not found'),
        ("SELECT unit samples,, FROM samples", "syntax error at or near"),
        ("FROM read_text('/etc/passwd')", "a query reads the store and nothing else"),
        ("SELECT error('\x1b' || chr(10) || 'boo')", "? boo"),
    ],
)
def test_what_is_wrong_with_the_sql_is_said_in_one_line(ask: Any, store: Path, sql: str, said: str) -> None:
    code, out, err = ask(store, sql)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1 and "LINE" not in err


def test_a_part_that_went_meanwhile_is_said_with_what_to_do(ask: Any, store: Path, monkeypatch: Any) -> None:
    """As a collection removes it that has put it together with others."""
    monkeypatch.setattr(query, "live", lambda names: [*names, "part-00000009.parquet"])
    code, out, err = ask(store, "SELECT count(*) FROM rollups")
    assert (code, out) == (2, "") and err.endswith("; where a collection was under way, ask again\n")


def test_a_directory_that_is_no_store_is_told_from_one(ask: Any, tmp_path: Path) -> None:
    assert ask(tmp_path, "FROM hosts")[2] == (
        f"plimsoll: {tmp_path}: no store, as there is no hosts.json in it; collect.yml makes one\n"
    )


# ---- bounds ----

FOREVER = "SELECT count(*) FROM range(10000000) a, range(100000) b WHERE hash(a.range + b.range) % 7 = 3"


def test_memory_is_bounded_and_what_it_lacks_waits_on_a_disk_until_the_end(
    ask: Any, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(query, "MEMORY", "64MB")
    sql = "SELECT max(y) AS most FROM (SELECT repeat('x', 100) || range AS y FROM range(1000000) ORDER BY hash(range))"
    assert found(ask, store, sql)[0]["most"].endswith("999999")
    assert found(ask, store, "SELECT current_setting('temp_directory') AS at")[0]["at"].startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(query, "MEMORY", "8MB")
    code, _, err = ask(store, "SELECT list(y) FROM (SELECT repeat('x', 100) || range AS y FROM range(1000000))")
    assert code == 2 and "ask for fewer days or hosts" in err


@pytest.mark.parametrize("sql", [FOREVER, "FROM range(100000000000)"], ids=["at work", "telling"])
def test_ctrl_c_ends_it_and_leaves_nothing(store: Path, tmp_path: Path, sql: str) -> None:
    # As a terminal starts it: a shell's background job, which may be what runs the tests, ignores SIGINT.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from plimsoll.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "query", str(store), sql, "--format", "csv"]
    there = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=there) as ran:
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.iterdir()):
                assert ran.poll() is None and time.monotonic() < deadline, "it did not begin"
                time.sleep(0.02)
            time.sleep(0.5)
            # Again, as whoever waits does: Python drops one that comes in a moment where it must not raise.
            for _ in range(5):
                ran.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ran.wait(10)
                    break
        finally:
            # Of one that has ended this does nothing.
            ran.kill()
        assert ran.stderr and (ran.wait(), ran.stderr.read()) == (130, b"")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough_is_no_error(store: Path) -> None:
    """As `| head -1`, of an answer that has no end."""
    command = [sys.executable, "-m", "plimsoll.cli", "query", str(store), "FROM range(100000000000)", "--format", "csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        assert ran.stdout and ran.stderr
        assert ran.stdout.readline() == b"range\n"
        ran.stdout.close()
        assert (ran.stderr.read(), ran.wait()) == (b"", 0)


# ---- an object store ----


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as reading takes, of a directory whose name is the bucket's."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]
    key = "AKID"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        where = urlsplit(self.path)
        self.asked.append(unquote(self.path))
        bucket, _, name = unquote(where.path).strip("/").partition("/")
        given = parse_qs(where.query)
        if f"Credential={self.key}/" not in self.headers.get("Authorization", ""):
            self.tell(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif bucket != self.root.name or (name and not (self.root / name).is_file()):
            self.tell(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif not name:
            self.tell(200, self.listing(given["prefix"][0], given.get("delimiter", [""])[0]))
        else:
            content = (self.root / name).read_bytes()
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last or len(content) - 1) + 1]
            self.tell(206, part, **{"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"})

    def listing(self, prefix: str, delimiter: str) -> bytes:
        keys, folders = [], set()
        for path in sorted(self.root.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            rest = key.removeprefix(prefix)
            if path.is_file() and key.startswith(prefix):
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    keys.append((key, path.stat().st_size))
        when = "2026-03-08T12:00:00.000Z"
        told = "".join(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>{when}</LastModified></Contents>"
            for key, size in keys
        )
        told += "".join(f"<CommonPrefixes><Prefix>{one}</Prefix></CommonPrefixes>" for one in sorted(folders))
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{told}</ListBucketResult>".encode()

    def tell(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Last-Modified": "Sun, 08 Mar 2026 12:00:00 GMT",
            "ETag": '"1"',
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def bucket(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a copy of the store in an object store; what is asked of that is in Bucket.asked."""
    shutil.copytree(store, tmp_path / "leaks" / "of" / "store")
    shutil.copytree(store, tmp_path / "leaks" / "other")
    (tmp_path / "leaks" / "of" / "store" / "rollups" / "day=2026-03-02" / "host=w-1").rename(
        tmp_path / "leaks" / "of" / "store" / "rollups" / "day=2026-03-02" / "host=w%3A1"
    )
    Bucket.root, Bucket.asked = tmp_path / "leaks", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKID",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield "s3://leaks/of/store"
    server.shutdown()
    server.server_close()


def test_a_store_in_a_bucket_answers_as_the_one_that_it_is_a_copy_of(ask: Any, store: Path, bucket: str) -> None:
    sql = "SELECT day, sum(floor_kb) AS kb FROM rollups JOIN hosts USING (host) WHERE day > '2026-03-02' GROUP BY day"
    sql += " ORDER BY day"
    assert found(ask, bucket + "/", sql) == found(ask, store, sql) != []
    hosts = "SELECT DISTINCT host FROM rollups WHERE day = '2026-03-02' ORDER BY host"
    assert found(ask, bucket, hosts) == [{"host": "w-2"}, {"host": "w-3"}, {"host": "w:1"}]


def test_a_query_of_a_bucket_takes_one_listing_and_the_files_that_it_needs(ask: Any, bucket: str) -> None:
    assert found(ask, bucket, "SELECT count(*) AS rows FROM rollups WHERE day = '2026-03-04'") == [{"rows": 13 * 144}]
    listings = [one for one in Bucket.asked if "list-type" in one]
    assert len(listings) == 1 and listings[0].endswith("prefix=of/store/rollups/")
    # The first file tells the columns.
    files = {one.removeprefix("/leaks/of/store/") for one in Bucket.asked if "list-type" not in one} - {"hosts.json"}
    days = sorted(one.split("/")[1] for one in files)
    assert days == ["day=2026-03-02", *["day=2026-03-04"] * 3]


def test_a_query_of_a_bucket_reads_nothing_beside_the_store(ask: Any, bucket: str) -> None:
    for path in ("s3://leaks/other/hosts.json", "s3://leaks/of/store/../../other/hosts.json", "/etc/passwd"):
        code, out, err = ask(bucket, f"FROM read_text('{path}')")
        assert (code, out) == (2, "") and "a query reads the store and nothing else" in err


def test_what_an_object_store_refuses_is_said_in_one_line(
    ask: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no store, as there is no hosts.json" in ask("s3://leaks/of", "FROM hosts")[2]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    code, out, err = ask(bucket, "FROM hosts")
    assert (code, out, err.count("\n")) == (2, "", 1) and "403" in err and "AWS_*" in err and "Traceback" not in err
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert ask(bucket, "FROM hosts")[2].startswith("plimsoll: s3://leaks/of/store: set AWS_ACCESS_KEY_ID,")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setitem(sys.modules, "plimsoll.bucket", None)
    assert ask(bucket, "FROM hosts")[2].endswith("needs obstore, which plimsoll[s3] brings\n")
