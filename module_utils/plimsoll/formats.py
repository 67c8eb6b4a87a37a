"""What plimsoll's files hold, and how they are read: samples, figures of cgroups, trace records, a directory of them.

CSV is told apart by its header, so a plain script's `timestamp,pid,rss_kb,command` is read as it is; JSON lines are by
their folder. What is in them comes from hosts and is not trusted: a line with a value that is not one of its column is
left out and counted, and the first few of a file are named. A last line without its end was torn, as by a power cut,
and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from .lines import MAX_LINE_BYTES, STDIN, Block, ahead, blocks, name_of
from .lines import InputError as InputError
from .samples import FIGURES, Figures, Floats, Records, Samples, Seen
from .samples import CgroupSample as CgroupSample
from .samples import HostData as HostData
from .samples import Incident as Incident
from .samples import Sample as Sample
from .samples import Trace as Trace
from .samples import incidents as incidents

# Of what is said of a file that cannot be read: its path is a long one.
MAX_PROBLEM = 400
# So many lines that were left out are named of each file.
NAMED = 3
# Later than any clock, and no more KiB than a machine has: what is beyond was never measured.
MAX_TIME, MAX_COUNT = 1e11, 1 << 53
NEWLINE, QUOTE, COMMA = b'\n",'
# Of a block, and of a header. What is below one is taken apart at the cost of thousands of lines.
MOST_HEADERS, MOST_COLUMNS = 20, 1000
# In text that is to be looked at before it is shown, as most is not: quotes around it, or no plain character.
_TO_BE_READ = r"[^ !#-~]|^ | $"
# Stands for a comma inside of a cell while lines are taken apart.
HIDDEN = "\x1f"

# Of an event.
MOST_MESSAGE = 2000

_TEXT = (
    *("command", "unit", "role", "kind", "record", "source", "message"),
    *("kernel", "python", "active_state", "sub_state", "result"),
)
_TIMES = ("timestamp", "start_time", "time")
_NEEDED = ("timestamp", "pid", "rss_kb")
# Of these none may be missing, in whatever they are a column.
_ALWAYS = {*_NEEDED, "floor_kb"}
# What a plain script writes, with or without that header.
_PLAIN = (*_NEEDED, "command")
_NAME = re.compile(r"\.(csv|jsonl)([.-]\d+)*(\.gz)?$")


class Rollup(NamedTuple):
    """Ten minutes of one process, of which timestamp is the start. Sizes are KiB of rss + swap; tasks as of the end."""

    timestamp: float
    pid: int
    unit: str = ""
    start_time: float | None = None
    role: str = ""
    count: int | None = None  # type: ignore[assignment]  # a column is called so; tuple.count() is not wanted
    floor_kb: int = 0
    median_kb: int | None = None
    max_kb: int | None = None
    tasks: int | None = None


class Record(NamedTuple):
    """A trace record: record is its line, the rest what it says of itself. time in Unix seconds."""

    time: float
    unit: str
    pid: int | None
    kind: str
    record: str


class Event(NamedTuple):
    """What happened to a unit. source is systemd, kernel, worker or guard, priority as in syslog(3)."""

    time: float
    unit: str
    source: str
    priority: int
    pid: int | None
    message: str


# What a line of a file is.
Kind: TypeAlias = type[Sample] | type[CgroupSample] | type[Rollup] | type[Record] | type[Event]


def schema(kind: type[NamedTuple]) -> dict[str, type[pl.DataType]]:
    """The columns of a kind, with their types."""
    return {name: _type(name) for name in kind._fields}


def printable(text: Any, most: int = 200) -> str:
    """A string that a host sent, fit for a terminal: no control or direction characters, and no longer than most."""
    try:
        shown = str(text)[: most + 1]
    except (RecursionError, ValueError):
        # Lists in lists, or a number of thousands of digits.
        return "?"
    if not shown.isprintable():
        # Halves of surrogate pairs, which JSON can hold and no file, are among them.
        shown = "".join(char if char.isprintable() else "?" for char in shown)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


# ---- lines of CSV ----


class _Header(NamedTuple):
    """What the lines of a file are, and their columns as the file has them."""

    kind: Kind
    columns: tuple[str, ...]


# By the columns that tell a kind of file.
_KINDS: tuple[tuple[set[str], Kind], ...] = (
    ({"timestamp", "unit", "memory_current_kb"}, CgroupSample),
    ({"timestamp", "pid", "floor_kb"}, Rollup),
    (set(_NEEDED), Sample),
)
_TOO_LONG = f"a line of more than {MAX_LINE_BYTES} bytes"
_NO_HEADER = (
    "the header must name timestamp, pid and rss_kb (samples), or timestamp, unit and memory_current_kb (figures)"
)


class _Table(NamedTuple):
    """Lines taken apart: the sound ones in columns, all that their kind can have; how many others there are, and why.

    Of the first few of those the number of lines before each, and the reason.
    """

    rows: pl.DataFrame
    left_out: int
    named: list[tuple[int, str]]


def _header(line: bytes) -> _Header | None:
    """What a line names as columns, where those are of a kind of file."""
    columns = tuple(cell.strip(' \t\r\n"\ufeff') for cell in line.decode(errors="replace").split(","))
    kinds = (_Header(kind, columns) for needed, kind in _KINDS if needed <= set(columns))
    return next(kinds, None) if len(columns) <= MOST_COLUMNS else None


def _headless(line: bytes) -> _Header | None:
    """What a first line is that names nothing: out of a sampler's file that was cut, or a plain script's."""
    fit = (one for one in (Sample._fields, _PLAIN) if not _table(line, Sample, one).left_out)
    return next((_Header(Sample, one) for one in fit), None)


def _headers(text: bytes) -> Iterator[tuple[int, int, _Header]]:
    """Where each line that is a header begins and ends: several files may have been put together to one."""
    end = 0
    while (at := text.find(b"timestamp", end)) >= 0:
        start, end = text.rfind(b"\n", 0, at) + 1, text.index(b"\n", at) + 1
        line = text[start:end]
        # Every command may hold the one word, few hold the other.
        if b"_kb" in line and (header := _header(line)):
            yield start, end, header


def _table(text: bytes, kind: Kind, columns: tuple[str, ...]) -> _Table:
    """Takes whole lines of UTF-8 apart."""
    characters = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(characters == NEWLINE)
    lengths = np.diff(ends, prepend=-1)
    fields, hidden = _fields(characters, ends, len(columns) if columns[-1] == "command" else None)
    fits = (fields == len(columns)) & (lengths <= MAX_LINE_BYTES)
    if len(hidden):
        characters = characters.copy()
        characters[hidden] = ord(HIDDEN)
    if not fits.all():
        characters = characters[np.repeat(fits, lengths)]
    known = sorted(columns.index(name) for name in kind._fields if name in columns)
    names = [columns[at] for at in known]
    # What is left is cells, commas and newlines, whatever it was: nothing for polars to take in another way.
    try:
        cells = _cells(characters.tobytes(), len(columns), {at: _type(columns[at]) for at in known})
        cells.columns = names
        rows, sound = _values(cells)
    except pl.exceptions.ComputeError:
        sound = np.zeros(1, dtype=bool)
    if not sound.all():
        # Slower, with what may be around a number, and for each cell whether it is one.
        cells = _cells(characters.tobytes(), len(columns), dict.fromkeys(known, pl.String))
        cells.columns = names
        numbers = [name for name in names if name not in _TEXT]
        cells = cells.with_columns(pl.col(numbers).str.strip_chars(' \t\r"').replace("", None))
        rows, sound = _values(cells)
    rest = [_value(name, pl.lit(None, pl.String)) for name in kind._fields if name not in names]
    lines = np.flatnonzero(fits)
    bad = np.sort(np.concatenate([np.flatnonzero(~fits), lines[~sound]]))

    def reason(line: int) -> str:
        if lengths[line] > MAX_LINE_BYTES:
            return _TOO_LONG
        if not fits[line]:
            return f"{fields[line]} fields, the header has {len(columns)}"
        row = int(np.searchsorted(lines, line))
        name = next(name for name in names if not _values(cells[row].select(name))[1])
        return f"{name}: {(cells[name][row] or '')[:40]!a} is not a value of that column"

    rows = rows if sound.all() else rows.filter(sound)
    return _Table(rows.with_columns(rest), len(bad), [(int(line), reason(line)) for line in bad[:NAMED]])


def _fields(
    characters: NDArray[np.uint8], ends: NDArray[np.intp], most: int | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """How many fields each line has, and where the commas are that end none.

    Those are inside of quotes. And where the last field is as it came, beyond the most that a line has: a plain script
    quotes nothing, and --queues=a,b is no rare command. Quotes end with their line at the latest: no sampler writes a
    newline into a cell, and one quote too few must not swallow the rest of a file.
    """
    commas, hidden = np.flatnonzero(characters == COMMA), np.empty(0, dtype=np.intp)
    quotes = np.flatnonzero(characters == QUOTE)
    if len(quotes):
        of_line = np.diff(np.searchsorted(quotes, ends), prepend=0)
        # With one too many, those of a line are characters as others are.
        quotes = quotes[np.repeat(of_line % 2 == 0, of_line)]
        first, behind = np.searchsorted(commas, quotes).reshape(-1, 2).T
        number = behind - first
        inside = np.arange(number.sum()) + np.repeat(behind - np.cumsum(number), number)
        commas, hidden = np.delete(commas, inside), commas[inside]
    before = np.searchsorted(commas, ends)
    fields = np.diff(before, prepend=0) + 1
    if most is not None and (fields > most).any():
        of_line = np.arange(len(commas)) - np.repeat(before - fields + 1, fields - 1)
        hidden = np.concatenate([hidden, commas[of_line >= most - 1]])
        fields = np.minimum(fields, most)
    return fields, hidden


def _cells(text: bytes, columns: int, types: Mapping[int, type[pl.DataType]]) -> pl.DataFrame:
    """Some of so many columns, null for empty cells. Raises ComputeError where one is not of its type."""
    schema = {str(at): types.get(at, pl.String) for at in range(columns)}
    if not text:
        return pl.DataFrame(schema={str(at): one for at, one in types.items()})
    return pl.read_csv(text, has_header=False, schema=schema, columns=list(types), quote_char=None)


def _type(name: str) -> type[pl.DataType]:
    return pl.String if name in _TEXT else pl.Float64 if name in _TIMES else pl.Int64


def _value(name: str, cell: pl.Expr) -> pl.Expr:
    """Cells of a column as its values: null for what is none, of text never."""
    if name in _TEXT:
        value = cell.fill_null("")
    elif name in _TIMES:
        value = cell.cast(_type(name), strict=False)
        # Nobody samples faster than that; times that are all but equal would make slopes without end.
        value = pl.when(value >= 0, value < MAX_TIME).then(value.round(3))
    else:
        value = cell.cast(_type(name), strict=False)
        value = pl.when(value >= 0, value < MAX_COUNT).then(value)
    return value.alias(name)


def _values(cells: pl.DataFrame) -> tuple[pl.DataFrame, NDArray[np.bool_]]:
    """Cells, null for empty ones, as values; and which rows are sound: no value is missing that is needed or there."""
    missing = {name: pl.col(f"value {name}").is_null() for name in cells.columns}
    wrong = [one if name in _ALWAYS else one & pl.col(name).is_not_null() for name, one in missing.items()]
    # At once: what polars costs for each call is as much as for thousands of rows.
    values = (
        cells.lazy()
        .with_columns(_value(name, pl.col(name)).name.prefix("value ") for name in cells.columns)
        .select(pl.any_horizontal(wrong).not_().alias("sound"), pl.col("^value .*$"))
        .collect()
    )
    sound = values.drop_in_place("sound").to_numpy()
    values.columns = cells.columns
    return values, sound


def _text(cell: str) -> str:
    """What a cell says, without its quotes."""
    cell = cell.replace(HIDDEN, ",").strip()
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        cell = cell[1:-1].replace('""', '"')
    return printable(cell)


def _texts(cells: pl.Series) -> list[str]:
    """What cells say, many of which are the same."""
    listed = cells.to_list()
    said = {cell: _text(cell) for cell in set(listed)}
    return [said[cell] for cell in listed]


def readable(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of CSV as tables() gives them, with text as it reads, fit for a terminal."""
    texts = pl.col(pl.String)
    if not rows.select(
        pl.any_horizontal((texts.str.contains(_TO_BE_READ) | (texts.str.len_bytes() > 200)).any())
    ).item():
        return rows
    return rows.with_columns(
        column.replace_strict(said := column.unique(), _texts(said), return_dtype=pl.String)
        for column in rows.select(pl.col(pl.String))
    )


# ---- columns to what is held of a host ----


def _grouped(
    rows: pl.LazyFrame, by: Sequence[str], columns: Sequence[str]
) -> tuple[pl.DataFrame, NDArray[np.intp], list[Floats]]:
    """Rows by the values of some columns: each combination of those once; of each row which it has; other columns."""
    groups = rows.group_by(by).agg(pl.col(columns).cast(pl.Float64), pl.len().alias("rows")).collect()
    of = np.repeat(np.arange(len(groups)), groups["rows"].to_numpy())
    return groups.select(by), of, [column.to_numpy() for column in groups.select(pl.col(columns).explode())]


def _take_samples(rows: pl.DataFrame, samples: Samples) -> None:
    # A process that is ending, or has, holds nothing.
    size = pl.col("rss_kb") + pl.col("swap_kb").fill_null(0)
    take_floors(rows.lazy().with_columns(size.alias("size_kb"), count=1).filter(pl.col("size_kb") > 0), samples)


def take_floors(rows: pl.LazyFrame, samples: Samples) -> None:
    """Rows with what Seen has, timestamp, size_kb and tasks; count is how many samples each of them stands for."""
    who, of, (times, sizes, tasks, counts) = _grouped(rows, Seen._fields, ["timestamp", "size_kb", "tasks", "count"])
    seen = [_texts(who[name]) if name in _TEXT else who[name].to_list() for name in Seen._fields]
    samples.add(list(map(Seen, *seen)), of, times, sizes, tasks, counts)


def take_figures(rows: pl.DataFrame, figures: Figures) -> None:
    """Rows of CgroupSample."""
    units, of, columns = _grouped(rows.lazy(), ["unit"], FIGURES)
    figures.add(_texts(units["unit"]), of, np.column_stack(columns))


def take_records(rows: pl.DataFrame, records: Records) -> None:
    """Rows of Record."""
    for time, line in rows.select("time", "record").iter_rows():
        records.add(time, line)


# ---- files ----


@dataclass
class _LeftOut:
    """The lines of one file that are left out; of the first of them number and reason."""

    count: int = 0
    named: list[tuple[int, str]] = field(default_factory=list)

    def add(self, count: int, named: Iterable[tuple[int, str]]) -> None:
        self.count += count
        self.named = sorted([*self.named, *named])[:NAMED]

    def __str__(self) -> str:
        named = "; ".join(f"line {number}: {reason}" for number, reason in self.named)
        return f"{self.count} line{'s were' if self.count > 1 else ' was'} left out, first {named}"


def _parts(file: Iterable[Block]) -> Iterator[tuple[_Header | None, list[Block]]]:
    """The lines of a file by the header that they are below, None where none was known: those of a block together.

    A script may write its header each time that it runs. A host that lies may write another one for each line.
    """
    header = None
    for number, content in file:
        text = content if content.isascii() else content.decode(errors="replace").encode()
        if number == 1:
            first = text[: text.index(b"\n") + 1]
            header = None if _header(first) else _headless(first)
        parts: dict[_Header | None, list[Block]] = {}
        begin, line = 0, number
        for start, end, following in _headers(text):
            if begin < start:
                parts.setdefault(header, []).append(Block(line, text[begin:start]))
            line += text.count(b"\n", begin, end)
            header, begin = following if following in parts or len(parts) < MOST_HEADERS else None, end
        if begin < len(text):
            parts.setdefault(header, []).append(Block(line, text[begin:]))
        yield from parts.items()


def _read_csv(
    file: Iterable[Block], kinds: Collection[Kind], left_out: _LeftOut
) -> Iterator[tuple[Kind, pl.DataFrame]]:
    """The sound lines of a file in columns, with their kind; those of other kinds are passed over."""
    for header, part in _parts(file):
        if header is None:
            again = any(reason == _NO_HEADER for _, reason in left_out.named)
            left_out.add(sum(text.count(b"\n") for _, text in part), [] if again else [(part[0].number, _NO_HEADER)])
        elif header.kind in kinds:
            table = _table(b"".join(text for _, text in part), header.kind, header.columns)
            left_out.add(table.left_out, ((_line(part, before), reason) for before, reason in table.named))
            yield header.kind, table.rows


def _line(part: Iterable[Block], before: int) -> int:
    """The number of the line that has so many before it."""
    for number, text in part:
        lines = text.count(b"\n")
        if before < lines:
            return number + before
        before -= lines
    raise IndexError(before)


def _read_json(
    file: Iterable[Block], kind: Kind, row: Callable[[Any, str], tuple[Any, ...]], left_out: _LeftOut
) -> Iterator[tuple[Kind, pl.DataFrame]]:
    """The sound lines of a file of JSON in columns. row makes one of an object and its line, or raises ValueError."""
    for first, text in file:
        rows = []
        for number, line in enumerate(text.decode(errors="replace").split("\n")[:-1], first):
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(_TOO_LONG)
                rows.append(row(json.loads(line), line))
            except json.JSONDecodeError as error:
                # Its own message counts lines, too.
                left_out.add(1, [(number, f"no JSON: {error.msg}")])
            except (ValueError, RecursionError) as error:
                left_out.add(1, [(number, str(error))])
        yield kind, pl.DataFrame(rows, schema(kind), orient="row")


def _record(found: Any, line: str) -> Record:
    if not _sound(found):
        raise ValueError("no trace record")
    unit, pid = found.get("unit"), found.get("pid")
    unit = printable(unit) if isinstance(unit, str) else ""
    return Record(float(found["time"]), unit, pid if _count(pid) else None, printable(found["kind"]), line)


def is_record(line: str) -> bool:
    """Whether a line is a sound trace record."""
    try:
        return _sound(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _event(found: Any, line: str) -> Event:
    """Of a line of the journal's events."""
    if not _told(found, "source", "message") or found["source"] not in ("systemd", "kernel", "worker"):
        raise ValueError("no event")
    pid, priority = found.get("pid"), found.get("priority")
    if not (pid is None or _count(pid)) or not (_count(priority) and priority < 8):
        raise ValueError("no event")
    message = printable(found["message"], MOST_MESSAGE)
    return Event(float(found["time"]), printable(found["unit"]), found["source"], priority, pid, message)


def _act(found: Any, line: str) -> Event:
    """Of a line of the guard's acts."""
    if not _told(found, "action", "reason"):
        raise ValueError("no act of the guard")
    message = printable(f"{found['action'].replace('_', ' ')}: {found['reason']}", MOST_MESSAGE)
    # As syslog has them: a warning where a worker stays as full as it is, else a notice.
    left = found["action"] == "budget_spent" or found.get("result") in ("failed", "timeout")
    return Event(float(found["time"]), printable(found["unit"]), "guard", 4 if left else 5, None, message)


def _told(found: Any, *texts: str) -> bool:
    """Whether it is an object with a time, a unit and these texts."""
    return (
        isinstance(found, dict)
        and _number(found.get("time"))
        and all(isinstance(found.get(name), str) for name in ("unit", *texts))
    )


# What is below a folder of this name; in any other, trace records.
_FOLDERS: dict[str, tuple[Kind, Callable[[Any, str], tuple[Any, ...]]]] = {
    "guard": (Event, _act),
    "journal": (Event, _event),
}


_GREW = {"count": float, "growth": float}
# What a growth record may have besides: a type, a list of one, a dict of such names or (...) of any, or None as well.
_SHAPES: dict[str, Any] = {
    "sites": [{"growth_kb": float, "line": float}],
    "tasks": {...: {}},
    "objects": [{"type": str, **_GREW}],
    "holders": [{"type": str, "size": float, "growth": float, "path": [str]}],
    "chains": [[str]],
    "caches": [{"name": str, "size": float, "growth": float, "most": (float, None)}],
    "gc": {},
    "fds": {**_GREW, "kinds": {...: _GREW}, "paths": [{"path": str, **_GREW}]},
    "malloc": ({"used_growth_kb": float, "free_growth_kb": float, "trimmed_kb": (float, None)}, None),
    "memory": ({"private_growth_kb": float, "shared_growth_kb": float}, None),
}


def _sound(record: Any) -> bool:
    """Whether a trace record holds what every record holds, and its kind's fields are of their kind."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or not _number(record.get("time")):
        return False
    return (
        all(_fits(record[name], shape) for name, shape in _SHAPES.items() if name in record)
        and all(_number(one.get("traced_growth_kb", 0)) for one in record.get("tasks", {}).values())
        and all(isinstance(one.get("callers", []), list) for one in record.get("sites", []))
        and _number(record.get("gc", {}).get("uncollectable", 0))
        and all(
            _number(record.get(name, 0))
            for name in ("pid", "count", "measured", "rss_growth_kb", "traced_kb", "window_s", "rss_kb")
        )
    )


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value is of a shape, as _SHAPES has them; what a shape of a dict does not name may be anything."""
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(one, shape[0]) for one in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if ... in shape:
            return all(_fits(one, shape[...]) for one in value.values())
        return all(name in value and _fits(value[name], one) for name, one in shape.items())
    if shape is float:
        return _number(value)
    return value is None if shape is None else isinstance(value, shape)


def _number(value: Any) -> bool:
    """A number that may be added up: neither NaN nor without end, nor so large that a sum is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_COUNT < value < MAX_COUNT


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def files_of(root: Path) -> list[Path]:
    """The files below a directory that may hold samples or records, sorted; root itself where it is none.

    Among them are those that logrotate has numbered or dated.
    """
    if root == STDIN or root.is_file() or root.is_fifo():
        return [root]
    return sorted(path for path in root.rglob("*") if _NAME.search(path.name) and path.is_file())


def _blocks(paths: Iterable[Path]) -> Iterator[tuple[Path, Block | InputError]]:
    """What the files hold, and what kept one from being read to its end."""
    for path in paths:
        try:
            for block in blocks(path):
                yield path, block
        except InputError as error:
            yield path, error


def tables(
    paths: Iterable[Path], kinds: Collection[Kind], problems: list[str], most_bytes: float = float("inf")
) -> Iterator[tuple[Kind, pl.DataFrame]]:
    """What files hold of these kinds, in columns, which lack none of a kind's but may be in another order.

    What could not be read goes into problems, a sentence each that begins with the file's name. Raises InputError where
    there are more than so many bytes of lines.
    """
    left = most_bytes

    def sound(found: Iterable[tuple[Path, Block | InputError]]) -> Iterator[Block]:
        nonlocal left
        for _, one in found:
            if isinstance(one, Block):
                left -= len(one.text)
                if left < 0:
                    raise InputError(f"more than {most_bytes} bytes of lines")
                yield one
            else:
                problems.append(printable(one, MAX_PROBLEM))

    for path, found in groupby(ahead(_blocks(paths)), key=lambda one: one[0]):
        file, left_out = sound(found), _LeftOut()
        if ".jsonl" in path.suffixes:
            kind, row = _FOLDERS.get(path.parent.name, (Record, _record))
            if kind in kinds:
                yield from _read_json(file, kind, row, left_out)
        else:
            yield from _read_csv(file, kinds, left_out)
        if left_out.count:
            problems.append(printable(f"{name_of(path)}: {left_out}", MAX_PROBLEM))


def read_host(host: str, root: Path) -> HostData:
    """Reads a directory, a file or standard input as one host's. What could not be read of it is in its problems.

    Rollups are passed over, as they repeat what the samples hold.
    """
    data, records = HostData(host), Records()
    for kind, rows in ahead(tables(files_of(root), (Sample, CgroupSample, Record), data.problems)):
        if kind is Sample:
            _take_samples(rows, data.samples)
        elif kind is CgroupSample:
            take_figures(rows, data.cgroups)
        else:
            take_records(rows, records)
    data.settle()
    data.problems += records.settle()
    data.traces = records.by_time()
    return data
