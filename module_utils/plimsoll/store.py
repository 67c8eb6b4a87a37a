"""The store: all that was collected, as Parquet that DuckDB, Spark and others read: TABLE/day=DAY/host=HOST/part-SEQ.

A host's bundle comes in whole or not at all. Its rows are written to _staging/HOST.SEQ; then _cursors/HOST.json says
how far the host's logs are in the store, which is the moment from which they are; then the parts are renamed into
place. Who writes next puts in place what was left in between, and throws away what had not come so far. So nothing is
there twice and nothing is lost, wherever a run ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import duckdb
import polars as pl

from .bundle import BundleError, Cursor, advance, unpack
from .files import write_whole
from .formats import (
    MAX_COUNT,
    MAX_TIME,
    CgroupSample,
    Event,
    HostData,
    Incident,
    InputError,
    Kind,
    Record,
    Rollup,
    Sample,
    files_of,
    incidents,
    is_record,
    printable,
    readable,
    schema,
    tables,
    take_figures,
    take_floors,
    take_records,
)
from .samples import Records

HOSTS, LOCK, CURSORS, STAGING, UNPACKED = "hosts.json", ".lock", "_cursors", "_staging", "_unpacked"
# In STAGING: of what directory files are being put together, TABLE.DAY.HOST, until those that it was are gone.
COMPACTING = "_compacting"
SCHEMA = 1
DAY = 86400
# What a row says of its time is the host's word, and each day is a directory.
OLDEST_DAYS, NEWEST_DAYS = 400, 1
# Of what a host says of its units.
MOST_UNITS, MOST_META_BYTES = 1000, 16 << 20
# What a bundle has beside the logs that max_bytes is of: what the host says of them, events, headers of segments.
BESIDE_BYTES = 64 << 20
# Lines, of what gzip holds, to bytes of a bundle: samples have less than half of it, and a bomb a thousand.
MOST_GZIP = 50
# A small bundle may be packed better than that.
SMALL_BYTES = 1 << 20
# Of one bundle: each is synced, and other hosts wait.
MOST_PARTS = 5_000
# Rows of one table wait in memory for so many bytes until they become part files.
PART_BYTES = 16 << 20
# On disk, where a row takes a hundredth of what it does in memory. Part files that are larger than this together are
# not put together: that is for the many small ones.
COMPACT_BYTES = 512 << 10
# So much of one host is read at once, by whole days; and of so many days, the newest, a worker is judged: few processes
# live for longer, and what one of them is doing now shows in them.
READ_BYTES, READ_DAYS = 1 << 20, 30
# Of what waits for the disk so much is done side by side: it takes four files in the time that it takes for one.
AT_ONCE = 4
# Samples of a process that are closer than this, seconds, are one to detection: all of them are told apart, but where
# the files of a host's samples are larger together than so many bytes, of which one takes 6 or 7. Memory would go with
# their number there, and ten minutes tell nearly as much (docs/detection.md).
FINE_S, FINE_BYTES, COARSE_S = 1.0, 8 << 20, 600.0
# Another run that writes is waited for, seconds.
LOCK_WAIT_S, LOCK_POLL_S = 60, 0.2
# Of what is said of one host.
NAMED, REASON = 3, 300
# While files are put together or removed, a listing of them may be older than what is there.
TRIES = 3

_PART = re.compile(r"part-(\d{8})(?:-(\d{8})|\.\d+)?\.parquet")
_DAY = re.compile(r"day=\d{4}-\d\d-\d\d")
# A host has no = in its name here.
_COMPACTING = re.compile(rf"{COMPACTING}\.(\w+)\.({_DAY.pattern})\.(.+)")
# What Hive has as %XX in the name of a directory.
_SPECIAL = re.compile(r"""[\x00-\x1f\x7f"#%'*/:=?\\{\[\]^]""")
_SQL_TYPES = {pl.Float64: "DOUBLE", pl.Int64: "BIGINT", pl.String: "VARCHAR"}
# What DuckDB raises of a damaged file, and polars, who has the rows from it, where some of them have come already.
_DAMAGED = (duckdb.Error, pl.exceptions.PolarsError)
_FLOORS = Path(__file__).with_name("floors.sql")


class Host(TypedDict):
    """One host of a collection. reason is empty where it was collected and there is nothing to say of it.

    last is when it was collected last, Unix seconds; None where it never was.
    """

    host: str
    collected: bool
    reason: str
    last: float | None


class Unit(NamedTuple):
    """A unit as systemd holds it, at the time that this was seen first. Limits in KiB, None for none."""

    time: float
    unit: str
    kernel: str
    python: str
    active_state: str
    sub_state: str
    result: str
    n_restarts: int | None
    memory_high_kb: int | None
    memory_max_kb: int | None
    memory_swap_max_kb: int | None


TABLES: dict[str, type[NamedTuple]] = {
    "samples": Sample,
    "rollups": Rollup,
    "cgroups": CgroupSample,
    "traces": Record,
    "events": Event,
    "units": Unit,
}
# These are small, and tell how a host has been: they are kept for longer.
LONG = ("rollups", "events", "units")
_IN_FILES: tuple[Kind, ...] = (Sample, Rollup, CgroupSample, Record, Event)


class Held(NamedTuple):
    """What of a host is in the store: the number of bundles, up to where its logs, its units as last seen."""

    seq: int = 0
    cursor: Cursor = Cursor()
    units: Mapping[str, Unit] = {}


# ---- names ----


def escaped(host: str) -> str:
    """A host's name as that of a directory, as Hive has it."""
    return _SPECIAL.sub(lambda one: f"%{ord(one[0]):02X}", host)


def day_of(number: int) -> str:
    """The directory of a day, of which this is the number since 1970."""
    return f"day={date(1970, 1, 1) + timedelta(number)}"


def _numbers(name: str) -> tuple[int, int] | None:
    """The first and the last bundle whose rows a part file has; None for a file that is none."""
    part = _PART.fullmatch(name)
    return (int(part[1]), int(part[2] or part[1])) if part else None


def live(names: Iterable[str]) -> list[str]:
    """Of the files of one table, day and host those that hold it: none that was put together to another one of them."""
    parts = {name: numbers for name in names if (numbers := _numbers(name))}
    whole = [(name, parts[name]) for name in parts if "-" in name.removeprefix("part-")]
    return sorted(
        name
        for name, (first, last) in parts.items()
        if not any(start <= first and last <= end and other != name for other, (start, end) in whole)
    )


# ---- files ----


def _write(path: Path, rows: pl.DataFrame) -> None:
    """A part file that is on the disk, and not on its way there. Raises OSError with nothing left of it."""
    content = io.BytesIO()
    rows.write_parquet(content, compression="zstd")
    try:
        with path.open("wb") as out:
            out.write(content.getbuffer())
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _by(kind: type[NamedTuple]) -> list[str]:
    """What rows are sorted by; the time is what each kind begins with."""
    return [name for name in ("unit", "pid", kind._fields[0]) if name in kind._fields]


def _into_place(staging: Path, store: Path) -> set[Path]:
    """Parts of a bundle, TABLE.DAY.NAME of HOST.SEQ, to where they belong; the directories that they are in now."""
    folders = set()
    host = staging.name.rpartition(".")[0]
    for staged in sorted(staging.iterdir()):
        table, day, name = staged.name.split(".", 2)
        folder = store / table / day / f"host={host}"
        folder.mkdir(parents=True, exist_ok=True)
        staged.replace(folder / name)
        folders.add(folder)
    staging.rmdir()
    return folders


def _sync(folder: Path) -> None:
    """What was renamed in it is so after a power cut, too, before anything that comes after this is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Nobody else writes meanwhile. Raises InputError where somebody does, and does not end soon."""
    path = store / LOCK
    with path.open("a+") as file:
        end = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    holder = printable(file.read(20).strip())
                    raise InputError(
                        f"{path}: process {holder or '?'} is writing to the store; collect again when it has ended"
                    ) from None
                time.sleep(LOCK_POLL_S)
        # It is told to others, no more: on a full disk, it is not.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


# ---- what is held ----


def cursor_file(store: Path, host: str) -> Path:
    return store / CURSORS / f"{escaped(host)}.json"


def _held(path: Path) -> Held:
    """Raises FileNotFoundError, and ValueError where it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        seq, units = found["seq"], [Unit(**one) for one in found["units"]]
        if found["schema"] != SCHEMA or not isinstance(seq, int) or not 0 < seq < 10**8:
            raise ValueError
        return Held(seq, Cursor.of(found["cursor"]), {one.unit: one for one in units})
    except (KeyError, TypeError, RecursionError, BundleError):
        raise ValueError from None


def _commit(path: Path, held: Held) -> None:
    path.parent.mkdir(exist_ok=True)
    units = [one._asdict() for one in held.units.values()]
    found = {"schema": SCHEMA, "seq": held.seq, "cursor": held.cursor.plain(), "units": units}
    write_whole(path, json.dumps(found) + "\n")


def _known(store: Path, host: str, problems: list[str]) -> Held:
    """What is held of a host. Without a sound file that says so, all that it still has comes again.

    The number goes on behind that of any part, so that none takes another one's place.
    """
    path = cursor_file(store, host)
    try:
        return _held(path)
    except FileNotFoundError:
        pass
    except ValueError:
        problems.append(f"{path} was damaged and is removed: all that the host still has comes again")
        path.unlink()
    parts = (_numbers(part.name) for part in store.glob(f"*/day=*/host={escaped(host)}/part-*"))
    return Held(max((numbers[1] for numbers in parts if numbers), default=0))


def _recover(store: Path) -> tuple[set[Path], dict[str, OSError]]:
    """Ends what a run before left half done.

    Returns the directories that got parts, and the hosts, escaped, whose parts could not be put in place: until they
    are, nothing more of these may come in.
    """
    shutil.rmtree(store / UNPACKED, ignore_errors=True)
    for scratch in (*store.glob(f".{HOSTS}.*"), *(store / CURSORS).glob(".*.json.*")):
        scratch.unlink()
    folders: set[Path] = set()
    stuck: dict[str, OSError] = {}
    for staging in sorted((store / STAGING).glob("*")):
        if compacting := _COMPACTING.fullmatch(staging.name):
            table, day, host = compacting.groups()
            _remove_covered(store / table / day / f"host={host}")
        host, _, seq = staging.name.rpartition(".")
        if not _committed(store / CURSORS / f"{host}.json", seq):
            shutil.rmtree(staging)
            continue
        try:
            folders |= _into_place(staging, store)
        except OSError as error:
            stuck[host] = error
    return folders, stuck


def _committed(path: Path, seq: str) -> bool:
    try:
        return f"{_held(path).seq:08}" == seq
    except (FileNotFoundError, ValueError):
        return False


# ---- taking in ----


class _Parts:
    """Rows of one bundle on their way to part files in a staging directory."""

    def __init__(self, staging: Path, seq: int, today: int) -> None:
        self._staging, self._seq = staging, seq
        self._first, self._last = today - OLDEST_DAYS, today + NEWEST_DAYS
        self._waiting: dict[str, list[pl.DataFrame]] = defaultdict(list)
        self._written: dict[str, int] = defaultdict(int)
        self._misdated = self._files = 0

    def add(self, kind: type[NamedTuple], rows: pl.DataFrame) -> None:
        when = pl.col(kind._fields[0])
        # A clock that is wrong is no reason for a million directories.
        within = when.is_between(self._first * DAY, (self._last + 1) * DAY, closed="left")
        sound = rows.lazy().select(kind._fields).filter(within).collect()
        self._misdated += len(rows) - len(sound)
        if not len(sound):
            return
        (table,) = (name for name, one in TABLES.items() if one is kind)
        waiting = self._waiting[table]
        waiting.append(sound)
        if sum(one.estimated_size() for one in waiting) > PART_BYTES:
            self._write(table)

    def _write(self, table: str) -> None:
        kind, before = TABLES[table], self._written[table]
        name = f"part-{self._seq:08}" + (f".{before:04}" if before else "")
        rows = pl.concat(self._waiting.pop(table)).sort(_by(kind))
        days = (rows[kind._fields[0]] // DAY).cast(pl.Int64)
        for number in days.unique().sort():
            self._files += 1
            if self._files > MOST_PARTS:
                raise BundleError(f"its rows are of so many days, out of order, that they make {MOST_PARTS} files")
            _write(self._staging / f"{table}.{day_of(number)}.{name}.parquet", rows.filter(days == number))
        self._written[table] += 1

    def settle(self) -> list[str]:
        """To be called once, when all has come. Returns what was left out, a sentence each."""
        for table in list(self._waiting):
            self._write(table)
        if not self._misdated:
            return []
        span = f"{day_of(self._first)[4:]} to {day_of(self._last)[4:]}"
        return [f"{self._misdated} lines were left out, as of a clock that was wrong: they are not of {span}"]


def _meta(path: Path) -> Any:
    """meta.json as the host wrote it. Raises BundleError."""
    if path.stat().st_size > MOST_META_BYTES:
        raise BundleError(f"its meta.json is larger than {MOST_META_BYTES} bytes")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise BundleError("its meta.json is damaged; collect again") from None


def units_of(meta: Mapping[str, Any], now: float) -> tuple[list[Unit], list[str]]:
    """What meta.json says of the units, each once; and what of it is left out, a sentence each."""
    given = meta.get("units")
    listed = given if isinstance(given, list) else []

    def text(one: Mapping[str, Any], name: str) -> str:
        value = one.get(name)
        return printable(value) if isinstance(value, str) else ""

    def number(one: Mapping[str, Any], name: str, scale: int) -> int | None:
        """systemd says infinity where there is no limit."""
        digits = re.fullmatch(r"\d{1,19}", text(one, name), re.ASCII)
        value = int(digits[0]) // scale if digits else MAX_COUNT
        return value if value < MAX_COUNT else None

    found = {
        text(one, "Id"): Unit(
            round(now, 3),
            text(one, "Id"),
            text(meta, "kernel"),
            text(meta, "python"),
            text(one, "ActiveState"),
            text(one, "SubState"),
            text(one, "Result"),
            number(one, "NRestarts", 1),
            *(number(one, name, 1024) for name in ("MemoryHigh", "MemoryMax", "MemorySwapMax")),
        )
        for one in listed[:MOST_UNITS]
        if isinstance(one, dict) and text(one, "Id")
    }
    more = len(listed) > MOST_UNITS
    return list(found.values()), [f"of {len(listed)} units the first {MOST_UNITS} are held"] if more else []


def _take_in(
    store: Path, bundle: Path, host: str, sha256: str, max_bytes: int, now: float, problems: list[str]
) -> set[Path]:
    """One bundle; the directories that got parts. What could not be read of it goes into problems.

    Raises BundleError, InputError and OSError with the store as it was.
    """
    held = _known(store, host, problems)
    unpacked = store / UNPACKED / f"{escaped(host)}.{held.seq + 1:08}"
    staging = store / STAGING / unpacked.name
    said: list[str] = []
    try:
        unpack(bundle, unpacked, expected_sha256=sha256, max_bytes=max_bytes + BESIDE_BYTES)
        meta = _meta(unpacked / "meta.json")
        cursor = advance(held.cursor, meta, unpacked)
        staging.mkdir(parents=True)
        parts = _Parts(staging, held.seq + 1, int(now // DAY))
        most = MOST_GZIP * min(max_bytes, _length(unpacked) + SMALL_BYTES)
        for kind, rows in tables(files_of(unpacked), _IN_FILES, said, most):
            parts.add(kind, rows if kind in (Record, Event) else readable(rows))
        units, left_out = units_of(meta, now)
        new = [one for one in units if one.unit not in held.units or held.units[one.unit][1:] != one[1:]]
        parts.add(Unit, pl.DataFrame(new, schema(Unit), orient="row"))
        left_out += parts.settle()
        _commit(cursor_file(store, host), Held(held.seq + 1, cursor, {one.unit: one for one in units}))
    except Exception:
        # Its room is wanted, as by the next host.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    if meta.get("more"):
        problems.append("there is more than max_bytes: the next run brings it")
    skipped = meta.get("left_out")
    problems += [printable(one) for one in skipped[:NAMED]] if isinstance(skipped, list) else []
    problems += [one.removeprefix(f"{unpacked}/") for one in said] + left_out
    try:
        _sync(store / CURSORS)
        return _into_place(staging, store)
    except OSError as error:
        problems.append(f"{_trouble(error)}: what it sent shows up after the next run")
        return set()


def _taken(
    store: Path,
    inbox: Path,
    one: Mapping[str, Any],
    before: Host | None,
    stuck: OSError | None,
    max_bytes: int,
    now: float,
) -> tuple[Host, set[Path]]:
    """What is to be said of a host that was asked, and the directories that got parts.

    before is what was said of it last; stuck is why nothing of it may come in.
    """
    host, reason = str(one["host"]), str(one.get("reason") or "")
    problems: list[str] = []
    folders: set[Path] = set()
    try:
        if stuck:
            raise stuck
        if reason or one.get("same"):
            _known(store, host, problems)
        else:
            bundle = inbox / f"{host}.tar.gz"
            folders = _take_in(store, bundle, host, str(one["sha256"]), max_bytes, now, problems)
    except (BundleError, InputError) as error:
        reason = f"bundle refused: {error}"
    except OSError as error:
        reason = f"bundle not taken in: {_trouble(error)}; the next run brings it again"
    # Whatever we have missed in what a host sends: it must not keep the other hosts out. The host is reported as not
    # collected, with the exception's name and words, in hosts.json, findings.json and the page; nothing of it comes in.
    except Exception as error:  # noqa: BLE001 - told as the host's reason
        reason = f"bundle refused: {type(error).__name__}: {error}"
    said = [reason] * bool(reason) + problems[:NAMED]
    said += [f"and {len(problems) - NAMED} more"] * (len(problems) > NAMED)
    last = round(now, 3) if not reason else before["last"] if before else None
    return {"host": host, "collected": not reason, "reason": _line("; ".join(said)), "last": last}, folders


def _length(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _trouble(error: OSError) -> str:
    return f"{error.filename or 'the store'}: {error.strerror or error}"


def ingest(
    inbox: Path,
    store: Path,
    fleet: Sequence[str],
    asked: Sequence[Mapping[str, Any]],
    *,
    max_bytes: int,
    keep_days: int,
    keep_rollups_days: int,
    now: float,
) -> tuple[list[Host], list[str]]:
    """Take inbox/HOST.tar.gz of every host asked into the store, and write store/hosts.json.

    fleet is all hosts that there are: one that was not asked stays as it was in hosts.json, and one that is not of the
    fleet is dropped there. asked holds `host`, and one of: `sha256` of its bundle; the `reason` why there is none;
    `same`, where it has nothing new. max_bytes bounds the logs in one bundle; now in Unix seconds.

    A bundle that cannot be trusted, or taken in, makes its host one that was not collected; the others go on. In the
    end the files of days that are over are put together, and days are removed that are older than keep_days, or for the
    tables of LONG keep_rollups_days.

    Returns the hosts asked, and what of this tidying was not possible, a sentence each. Raises InputError where
    somebody else writes to the store, and OSError.
    """
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store):
        touched, stuck = _recover(store)
        try:
            known = {one["host"]: one for one in read_hosts(store)}
        except (FileNotFoundError, InputError):
            known = {}

        def taken(one: Mapping[str, Any]) -> tuple[Host, set[Path]]:
            host = str(one["host"])
            return _taken(store, inbox, one, known.get(host), stuck.get(escaped(host)), max_bytes, now)

        with ThreadPoolExecutor(AT_ONCE) as threads:
            for told, folders in threads.map(taken, asked):
                known[told["host"]] = told
                touched |= folders
        write_whole(store / HOSTS, json.dumps([known[host] for host in fleet if host in known], indent=1) + "\n")
        today = int(now // DAY)
        notes = _retain(store, today, keep_days, keep_rollups_days)
        touched |= set(store.glob(f"*/{day_of(today - 1)}/host=*"))
        notes += _compact(store, (one for one in sorted(touched) if one.parent.name < day_of(today)))
    return [known[str(one["host"])] for one in asked], notes


def _line(reason: str) -> str:
    """One line that is fit to print: the host had its part in what Ansible says of it."""
    return " ".join("".join(char if char.isprintable() else " " for char in reason).split())[:REASON]


# ---- tidying ----


def _retain(store: Path, today: int, keep_days: int, keep_rollups_days: int) -> list[str]:
    """Removes days that are too old; what could not be removed."""
    notes = []
    for table in TABLES:
        oldest = day_of(today - (keep_rollups_days if table in LONG else keep_days))
        for folder in sorted((store / table).glob("day=*")):
            if _DAY.fullmatch(folder.name) and folder.name < oldest:
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    notes.append(f"{folder} is too old and could not be removed: {_trouble(error)}")
    return notes


def _compact(store: Path, folders: Iterable[Path]) -> list[str]:
    """Puts the part files of each directory together to one; what could not be."""

    def compact(folder: Path) -> list[str]:
        try:
            _together(store, folder)
        except OSError as error:
            return [f"{folder}: not put together: {_trouble(error)}"]
        return []

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(chain.from_iterable(threads.map(compact, folders)))


def _together(store: Path, folder: Path) -> None:
    """One file of several: it waits in STAGING until all is in it, and a directory there tells until they are gone."""
    names = live(_listed(folder))
    if len(names) < 2 or sum((folder / name).stat().st_size for name in names) > COMPACT_BYTES:
        return
    table, day, host = folder.relative_to(store).parts
    rows = _rows(duckdb.cursor(), table, [folder / name for name in names])
    if rows is None:
        # Who analyses it is told which file is damaged.
        return
    numbers = [numbers for name in names if (numbers := _numbers(name))]
    name = f"part-{min(numbers)[0]:08}-{max(last for _, last in numbers):08}.parquet"
    staging = store / STAGING / f"{COMPACTING}.{table}.{day}.{host.removeprefix('host=')}"
    staging.mkdir(parents=True, exist_ok=True)
    _write(staging / name, rows)
    (staging / name).replace(folder / name)
    _remove_covered(folder)
    staging.rmdir()


def _remove_covered(folder: Path) -> None:
    """Removes the part files that were put together to another one."""
    names = _listed(folder)
    for name in set(filter(_PART.fullmatch, names)) - set(live(names)):
        (folder / name).unlink()


# ---- reading ----


def read_hosts(store: Path) -> list[Host]:
    """What the last collection said of each host. Raises InputError where its file is damaged."""
    path = store / HOSTS
    try:
        hosts: list[Host] = [
            {
                "host": str(one["host"]),
                "collected": bool(one["collected"]),
                "reason": str(one["reason"]),
                "last": None if one["last"] is None else float(one["last"]),
            }
            for one in json.loads(path.read_text())
        ]
        if not all(0 <= (one["last"] or 0) < MAX_TIME for one in hosts):
            raise ValueError
        return hosts
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; collect again") from None


def files(store: Path, table: str, host: str) -> dict[str, list[Path]]:
    """The part files of one host by day, oldest day first."""
    found = {}
    for day in sorted(_listed(store / table)):
        folder = store / table / day / f"host={escaped(host)}"
        if _DAY.fullmatch(day) and (names := live(_listed(folder))):
            found[day] = [folder / name for name in names]
    return found


def _listed(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def view(connection: duckdb.DuckDBPyConnection, table: str, parts: Sequence[Path | str]) -> None:
    """A view of a table over these part files, with the columns host and day, which their path has; empty of none."""
    types = {name: _SQL_TYPES[one] for name, one in schema(TABLES[table]).items()} | {"host": "VARCHAR", "day": "DATE"}
    columns = ", ".join(f"CAST({name if parts else 'NULL'} AS {one}) AS {name}" for name, one in types.items())
    # A view takes no parameters.
    listed = ", ".join("'{}'".format(str(part).replace("'", "''")) for part in parts)
    hive = "hive_partitioning = true, hive_types_autocast = false"
    source = f"FROM read_parquet([{listed}], {hive})" if parts else "WHERE false"
    connection.execute(f"CREATE OR REPLACE TEMP VIEW {table} AS SELECT {columns} {source}")


_QUERIES = {
    "floors": _FLOORS.read_text(),
    "cgroups": "SELECT * EXCLUDE (host, day) FROM cgroups",
    "traces": "SELECT time, record FROM traces",
}
_READ = ("samples", "rollups", "cgroups", "traces")
# What may tell that a worker ended: all that is taken of systemd and the kernel, of the guard no more than what it did
# and what went wrong. What differs in numbers alone, as in a counter, happened several times; but a kill without a unit
# is told by its pid. Rows that are there twice came again, as the host's cursor was lost.
_INCIDENTS = {
    "incidents": r"""
        SELECT max(time) AS time, unit, source, max_by(message, (time, message)) AS message,
               count(DISTINCT time) AS times
        FROM events
        WHERE time >= 0 AND time < 1e11 AND message <> '' AND (
            source IN ('systemd', 'kernel')
            OR (source = 'guard' AND (message LIKE 'restart:%' OR priority <= 4))
            OR (source = 'worker' AND regexp_matches(message, '\[[^]]*: (ERROR|CRITICAL)/|^(ERROR|CRITICAL)\b'))
        )
        GROUP BY unit, source, CASE WHEN unit = '' THEN message ELSE regexp_replace(message, '\d+', '#', 'g') END
        ORDER BY source = 'worker', time DESC, unit, source, message
        LIMIT 10000
    """
}


def read_host(store: Path, host: str) -> HostData:
    """What detection takes of one host. What could not be read of it is in its problems, a sentence each."""
    for _ in range(TRIES):
        listed = {table: files(store, table, host) for table in (*_READ, "events")}
        try:
            data = _read(host, listed)
        except _DAMAGED as error:
            data = HostData(host, problems=[f"the store: {printable(str(error).partition(chr(10))[0])}"])
        parts = [part for days in listed.values() for some in days.values() for part in some]
        if not data.problems or all(part.exists() for part in parts):
            break
    return data


def _read(host: str, listed: Mapping[str, Mapping[str, Sequence[Path]]]) -> HostData:
    data, records = HostData(host), Records()
    # One that is open already takes a tenth of the time of another one.
    connection = duckdb.cursor()
    batches = list(_batches({table: listed[table] for table in _READ}))
    size = sum(_size(part) for days in batches for day in days for part in listed["samples"].get(day, ()))
    seconds = FINE_S if size <= FINE_BYTES else COARSE_S
    connection.execute(f"CREATE OR REPLACE TEMP VIEW resolution AS SELECT {seconds} AS seconds")
    for days in batches:
        parts = {table: [part for day in days for part in listed[table].get(day, ())] for table in _READ}
        found = _asked(connection, _QUERIES, parts, data.problems)
        take_floors(found["floors"].lazy(), data.samples)
        take_figures(found["cgroups"], data.cgroups)
        # What has changed on a disk since may be anything.
        take_records(found["traces"].filter([is_record(line) for line in found["traces"]["record"]]), records)
    data.settle()
    data.problems += records.settle()
    data.traces = records.by_time()
    # Nothing that is older than what is judged.
    told = {day: parts for day, parts in listed["events"].items() if batches and day >= batches[0][0]}
    if told:
        *_, days = _batches({"events": told})
        parts = {"events": [part for day in days for part in told[day]]}
        found = _asked(connection, _INCIDENTS, parts, data.problems)
        data.incidents = incidents(map(Incident._make, found["incidents"].iter_rows()))
    return data


def _batches(listed: Mapping[str, Mapping[str, Sequence[Path]]]) -> Iterator[list[str]]:
    """Days that are read at once. What detection takes is put together within a day at most."""
    batch: list[str] = []
    size = 0
    for day in sorted(set().union(*listed.values()))[-READ_DAYS:]:
        more = sum(_size(part) for days in listed.values() for part in days.get(day, ()))
        if batch and size + more > READ_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(day)
        size += more
    if batch:
        yield batch


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _asked(
    connection: duckdb.DuckDBPyConnection,
    queries: Mapping[str, str],
    parts: Mapping[str, Sequence[Path]],
    problems: list[str],
) -> dict[str, pl.DataFrame]:
    """What queries find in part files. Those that are damaged are left out, and named in problems."""
    try:
        return _answers(connection, queries, parts)
    except _DAMAGED:
        # It does not tell how many there are.
        sound = {
            table: [one for one in some if _sound(connection, table, one, problems)] for table, some in parts.items()
        }
        return _answers(connection, queries, sound)


def _answers(
    connection: duckdb.DuckDBPyConnection, queries: Mapping[str, str], parts: Mapping[str, Sequence[Path]]
) -> dict[str, pl.DataFrame]:
    for table, some in parts.items():
        view(connection, table, some)
    return {name: pl.DataFrame(connection.sql(query)) for name, query in queries.items()}


def _sound(connection: duckdb.DuckDBPyConnection, table: str, part: Path, problems: list[str]) -> bool:
    """Whether all of a part file can be read; one that cannot is named."""
    sound = _rows(connection, table, [part]) is not None
    if not sound:
        problems.append(f"{part}: damaged, so that what it held is missing; remove it")
    return sound


def _rows(connection: duckdb.DuckDBPyConnection, table: str, parts: Sequence[Path]) -> pl.DataFrame | None:
    """The rows of part files, each once, sorted; None where a file is damaged.

    Read by DuckDB: polars may end the whole process then.
    """
    try:
        view(connection, table, parts)
        columns = dict.fromkeys([*_by(TABLES[table]), *schema(TABLES[table])])
        rows = pl.DataFrame(connection.view(table).select(*TABLES[table]._fields).order(", ".join(columns)))
    except _DAMAGED:
        return None
    # A row that is there twice came again, as a host's cursor was lost.
    return rows.filter(pl.any_horizontal(pl.all().ne_missing(pl.all().shift())))
