"""What plimsoll's files hold, and how they are read: samples, figures of cgroups, trace records, a directory of them.

Files are told apart by their header, so a plain script's `timestamp,pid,rss_kb,command` is read as it is. What is in
them comes from hosts and is not trusted: a value that is not one of its column ends the file, and the error names the
line. A last line without its end was torn, as by a power cut, and is left out.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# A host that lies could send rows for ever; a host with 300 processes a minute takes two weeks to write so many.
MAX_ROWS = 6_000_000
MAX_LINE_BYTES = 1 << 20
# Of what is said of a file that cannot be read: its path is a long one.
MAX_PROBLEM = 400
# Later than any clock, and no more KiB than a machine has: what is beyond was never measured.
MAX_TIME, MAX_COUNT = 1e11, 1 << 53


class InputError(Exception):
    """A file cannot be read, or not to its end; the message names the file, and the line where there is one."""


class Sample(NamedTuple):
    """One process at one time. timestamp and start_time are Unix seconds, sizes KiB; None was not measured."""

    timestamp: float
    pid: int
    rss_kb: int
    command: str = ""
    unit: str = ""
    start_time: float | None = None
    role: str = ""
    pss_kb: int | None = None
    uss_kb: int | None = None
    swap_kb: int | None = None
    fds: int | None = None
    threads: int | None = None
    tasks: int | None = None


class CgroupSample(NamedTuple):
    """A unit's own figures at one time: sizes in KiB, a limit of None is no limit, events since the unit started."""

    timestamp: float
    unit: str
    memory_current_kb: int | None = None
    memory_high_kb: int | None = None
    memory_max_kb: int | None = None
    swap_kb: int | None = None
    events_high: int | None = None
    events_max: int | None = None
    oom_kill: int | None = None
    pressure_some_us: int | None = None
    pressure_full_us: int | None = None
    n_restarts: int | None = None


Trace = dict[str, Any]


def printable(text: Any, most: int = 200) -> str:
    """A string that a host sent, fit for a terminal: no control or direction characters, and no longer than most."""
    shown = str(text)[: most + 1]
    if not shown.isprintable():
        # Halves of surrogate pairs, which JSON can hold and no file, are among them.
        shown = "".join(char if char.isprintable() else "?" for char in shown)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _time(cell: str) -> float:
    value = float(cell)
    if not 0 <= value < MAX_TIME:
        raise ValueError("no Unix time")
    # Nobody samples faster; times that are all but equal would make slopes without end.
    return round(value, 3)


def _count(cell: str) -> int:
    value = int(cell)
    if not 0 <= value < MAX_COUNT:
        raise ValueError("out of range")
    return value


def _maybe(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda cell: convert(cell) if cell else None


_TEXT = {"command", "unit", "role"}
_NEEDED: dict[str, Callable[[str], Any]] = {"timestamp": _time, "pid": _count, "rss_kb": _count}


def _converters(row: type[tuple[Any, ...]]) -> dict[str, Callable[[str], Any]]:
    names: tuple[str, ...] = row._fields  # type: ignore[attr-defined]
    return {
        name: printable if name in _TEXT else _NEEDED.get(name) or _maybe(_time if name == "start_time" else _count)
        for name in names
    }


# By the columns that tell a kind of file: needed ones, and the row it holds. A rollup repeats what its samples hold.
_KINDS: tuple[tuple[set[str], Any], ...] = (
    ({"timestamp", "unit", "memory_current_kb"}, CgroupSample),
    ({"timestamp", "pid", "floor_kb"}, None),
    ({"timestamp", "pid", "rss_kb"}, Sample),
)


class _Lines:
    """Whole lines of a stream; the last one only with its end. number is that of the line which is being read."""

    def __init__(self) -> None:
        self.number = 0

    def of(self, stream: BinaryIO) -> Iterator[str]:
        while line := stream.readline(MAX_LINE_BYTES):
            self.number += 1
            if not line.endswith(b"\n"):
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
                return
            yield line.decode(errors="replace")


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return path.open("rb")


def read_csv(path: Path) -> Iterator[Sample | CgroupSample]:
    """The rows of a file of samples or of cgroups, NAME.csv or NAME.csv.gz. Raises InputError at the first bad line."""
    lines = _Lines()
    try:
        with _open(path) as stream:
            reader = csv.reader(lines.of(stream))
            columns = next(reader, None)
            if columns is None:
                return
            kinds = [kind for needed, kind in _KINDS if needed <= set(columns)]
            if not kinds:
                raise ValueError(
                    "the header must name timestamp, pid and rss_kb (samples), or timestamp, unit and memory_current_kb"
                )
            kind = kinds[0]
            if kind is None:
                return
            wanted = [
                (at, name, convert)
                for name, convert in _converters(kind).items()
                for at, column in enumerate(columns)
                if column == name
            ]
            for cells in reader:
                if columns[-1] == "command" and len(cells) > len(columns):
                    # A plain script quotes nothing, and --queues=a,b is no rare command.
                    cells[len(columns) - 1 :] = [",".join(cells[len(columns) - 1 :])]
                if len(cells) != len(columns):
                    raise ValueError(f"{len(cells)} fields, the header has {len(columns)}")
                row = {}
                for at, name, convert in wanted:
                    try:
                        row[name] = convert(cells[at])
                    except ValueError:
                        raise ValueError(f"{name}: {cells[at][:40]!a} is not a value of that column") from None
                yield kind(**row)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: truncated or damaged after line {lines.number}") from None
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}, line {lines.number}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _sound(record: Any) -> bool:
    """Whether a trace record holds what every record holds, and its kind's fields are of their kind."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or not _number(record.get("time")):
        return False
    sites, tasks = record.get("sites", []), record.get("tasks", {})
    return (
        isinstance(sites, list)
        and all(isinstance(one, dict) and _number(one.get("growth_kb")) and _number(one.get("line")) for one in sites)
        and isinstance(tasks, dict)
        and all(isinstance(one, dict) and _number(one.get("traced_growth_kb", 0)) for one in tasks.values())
        and all(
            _number(record.get(name, 0))
            for name in ("pid", "count", "rss_growth_kb", "traced_kb", "window_s", "rss_kb")
        )
    )


def _number(value: Any) -> bool:
    """A number that may be added up: neither NaN nor without end, nor so large that a sum is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_COUNT < value < MAX_COUNT


def read_trace(path: Path) -> Iterator[Trace]:
    """The records of a file of JSON lines. Raises InputError at the first bad line."""
    lines = _Lines()
    try:
        with _open(path) as stream:
            for line in lines.of(stream):
                record = json.loads(line)
                if not _sound(record):
                    raise ValueError("no trace record")
                yield record
    except json.JSONDecodeError as error:
        # Its own message counts lines, too.
        raise InputError(f"{path}, line {lines.number}: no JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {lines.number}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


@dataclass
class HostData:
    """All that is known of one host. problems say which files were left out, or from which line on."""

    host: str
    samples: list[Sample] = field(default_factory=list)
    cgroups: list[CgroupSample] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def files_of(root: Path) -> list[Path]:
    """The files below a directory that may hold samples or records, sorted; root itself where it is a file."""
    if root.is_file():
        return [root]
    return sorted(
        path for path in root.rglob("*") if path.name.endswith((".csv", ".csv.gz", ".jsonl")) and path.is_file()
    )


def read_host(host: str, root: Path, strict: bool) -> HostData:
    """Read a directory or a file as one host's. strict: raise InputError, instead of noting it as a problem."""
    data = HostData(host)
    rows = 0
    # Their names hold their time: where there is too much, the newest count.
    for path in reversed(files_of(root)):
        try:
            for row in read_trace(path) if path.suffix == ".jsonl" else read_csv(path):
                rows += 1
                if rows > MAX_ROWS:
                    raise InputError(f"{path}: more than {MAX_ROWS} rows of one host; the older ones are left out")
                if isinstance(row, Sample):
                    data.samples.append(row)
                elif isinstance(row, CgroupSample):
                    data.cgroups.append(row)
                else:
                    data.traces.append(row)
        except InputError as error:
            if strict:
                raise
            data.problems.append(printable(error, MAX_PROBLEM))
        if rows > MAX_ROWS:
            break
    return data
