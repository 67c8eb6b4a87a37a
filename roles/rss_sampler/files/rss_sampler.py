#!/usr/bin/env python3
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Writes down what memory the Celery workers of this host hold. One file, Python 3.9 or later, on psutil.

Watched are the processes in the cgroup (v2) of a unit `celery-worker@NAME.service`, and those whose command line
matches --match. All files are CSV with a header, times are Unix seconds in UTC, sizes KiB; an unmeasured cell is empty.

samples-STAMP.csv   a line is one process at one time. rss_kb, swap_kb, fds, threads every interval; pss_kb and uss_kb
                    every --detail-every intervals, as the kernel walks the page tables for them. role is child when
                    the process's parent is watched too. tasks is how many tasks the process has finished, where the
                    bootstrap publishes it in /run/plimsoll/tasks/PID.
cgroup-STAMP.csv    a line is one unit at one time. A limit of `max` is an empty cell; events_* and oom_kill count since
                    the unit started, pressure_* are microseconds since then. n_restarts every --detail-every intervals.
rollup-STAMP.csv    a line is one process and ten minutes, whose start is timestamp: count of samples, floor, median and
                    maximum of rss + swap, and tasks as of its last sample. A restart of the sampler in the ten minutes
                    gives a second line for them.

STAMP is the start of the hour (a rollup's: of the day), 20261124T170000Z; where that name is taken, the time of the
first line. A segment that is over is gzipped. When all of them together exceed --keep-mb, the oldest go, rollups last.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import fcntl
import fnmatch
import gzip
import io
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Union

import psutil

UNIT_PATTERN = "celery-worker@*.service"
CGROUPS = Path("/sys/fs/cgroup")
TASKS = Path("/run/plimsoll/tasks")

SAMPLE_COLUMNS = "timestamp,pid,rss_kb,command,unit,start_time,role,pss_kb,uss_kb,swap_kb,fds,threads,tasks"
CGROUP_COLUMNS = (
    "timestamp,unit,memory_current_kb,memory_high_kb,memory_max_kb,swap_kb,events_high,events_max,oom_kill,"
    "pressure_some_us,pressure_full_us,n_restarts"
)
ROLLUP_COLUMNS = "timestamp,pid,unit,start_time,role,count,floor_kb,median_kb,max_kb,tasks"

HOUR, DAY, ROLLUP_SPAN = 3600, 86400, 600
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
COMMAND_LENGTH = 200
# More than one beat writes: what a power cut left of it, be it zeros, is found in this much of the end.
LONGEST_TAIL = 1 << 20
# A broker's URL on a command line carries its password, at times with a bare / or @ in it; samples leave the host.
CREDENTIALS = re.compile(r"://\S*@")

Cell = Union[int, str]
Row = Sequence[Cell]
_said: set[str] = set()


def say(text: str) -> None:
    """One line for the journal."""
    print(f"rss_sampler: {text}", file=sys.stderr, flush=True)


def say_once(what: str, text: str) -> None:
    if what not in _said:
        _said.add(what)
        say(text)


# ---- what is watched ----


def find_units(root: Path) -> dict[str, Path]:
    """Cgroup directory of each running worker, by unit name. Descends into slices alone: workers are nowhere else."""
    found, pending = {}, [root]
    while pending:
        here = pending.pop()
        try:
            names = os.listdir(here)  # noqa: PTH208 - names are what is wanted, and a Path each is not
        except OSError:  # gone in between
            continue
        pending += [here / name for name in names if name.endswith(".slice")]
        found.update({name: here / name for name in names if fnmatch.fnmatchcase(name, UNIT_PATTERN)})
    return found


def read_text(path: str | Path) -> str:
    """Contents, or an empty string where the file or its process is gone or not for us to read."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - several a beat and process; a Path costs more than the read
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def fields(text: str) -> dict[str, str]:
    """First word of each line to its second: /proc/PID/status (keys without the colon), memory.events."""
    # No splitlines(): a process may name itself with what Unicode calls a line's end, and forge lines of its status.
    return {words[0].rstrip(":"): words[1] for words in map(str.split, text.split("\n")) if len(words) > 1}


def processes_in(cgroup: Path) -> Iterator[int]:
    """Pids in a unit's cgroup and in those below it: where a unit has Delegate=, its processes are further down."""
    for folder, _, names in os.walk(cgroup):
        if "cgroup.procs" in names:
            yield from map(int, read_text(f"{folder}/cgroup.procs").split())


def ticks_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, which no setting of the clock changes. None if it is gone."""
    rest = read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(rest[19]) if rest else None


def kib(text: str) -> Cell:
    """Bytes of a cgroup's file in KiB; `max` and an absent file are an empty cell."""
    return int(text) // 1024 if text.strip().isdigit() else ""


def pressure_totals(text: str) -> tuple[Cell, Cell]:
    """(some, full) in microseconds of a memory.pressure; empty cells on a kernel without it."""
    totals = dict(re.findall(r"^(some|full) .*total=(\d+)", text, re.MULTILINE))
    return int(totals["some"]) if "some" in totals else "", int(totals["full"]) if "full" in totals else ""


def cgroup_row(now: float, unit: str, path: Path, restarts: Cell) -> Row:
    """Columns of CGROUP_COLUMNS."""
    events = fields(read_text(path / "memory.events"))
    sizes = (kib(read_text(path / f"memory.{name}")) for name in ("current", "high", "max", "swap.current"))
    counts = (events.get(name, "") for name in ("high", "max", "oom_kill"))
    return [f"{now:.3f}", unit, *sizes, *counts, *pressure_totals(read_text(path / "memory.pressure")), restarts]


def show(properties: str, units: Iterable[str]) -> dict[str, dict[str, str]]:
    """Properties of units and patterns of units, by name and one call of systemctl; empty with no systemd to ask."""
    command = ["systemctl", "show", f"--property=Id,{properties}", *units]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    blocks = (dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in said.split("\n\n"))
    return {block["Id"]: block for block in blocks if "Id" in block}


def restarts_of(units: Iterable[str]) -> dict[str, str]:
    """NRestarts of each unit; empty where there is no systemd to ask."""
    return {unit: shown.get("NRestarts", "") for unit, shown in show("NRestarts", units).items()}


def tasks_of(folder: Path, pid: int, start_time: float) -> Cell:
    """Tasks that the process finished, as its bootstrap publishes them. Worker's users write that file: no trust."""
    try:
        descriptor = os.open(folder / str(pid), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        text = os.read(descriptor, 16).strip()  # fits into 64 bits, whatever they write
        # Older than the process: left behind by another of the same pid. A second for the clocks to differ.
        return int(text) if text.isdigit() and os.fstat(descriptor).st_mtime > start_time - 1 else ""
    except OSError:
        return ""
    finally:
        os.close(descriptor)


class Watched:
    """One process: (pid, start time). Raises psutil.Error or OSError if it is gone."""

    def __init__(self, pid: int, ticks: int, unit: str) -> None:
        self.process = psutil.Process(pid)
        self.pid, self.ticks, self.unit = pid, ticks, unit
        # Not create_time(): older psutil goes by when the host booted as it was first asked, whatever the clock is now.
        self.start_time = psutil.boot_time() + ticks / CLOCK_TICKS
        self.read_command()

    def read_command(self) -> None:
        """Once is not enough: a process that is seen between fork and exec has none, or its parent's."""
        command = " ".join(" ".join(self.process.cmdline()).split())
        self.command = CREDENTIALS.sub("://***@", command)[:COMMAND_LENGTH]

    def detail(self) -> tuple[Cell, Cell]:
        """(pss_kb, uss_kb); empty without the right to read smaps."""
        try:
            full = self.process.memory_full_info()
        except (psutil.Error, OSError):
            return "", ""
        return full.pss // 1024, full.uss // 1024

    def fds(self) -> Cell:
        try:
            return self.process.num_fds()
        except (psutil.Error, OSError):
            return ""


class Watcher:
    """Finds the processes of the workers, beat after beat, and remembers who is who."""

    def __init__(self, match: str | None, cgroups: Path = CGROUPS, tasks: Path = TASKS) -> None:
        self.match = re.compile(match) if match else None
        self.cgroups = cgroups
        self.tasks = tasks
        self.known: dict[int, Watched] = {}
        self.others: set[int] = set()
        if not (cgroups / "cgroup.controllers").exists():
            say(f"{cgroups} is not cgroup v2: units are not found" + ("" if match else "; use --match"))

    def find(self, units: dict[str, Path], again: bool) -> list[Watched]:
        """The processes that live now. again: read command lines anew, also of those that did not match."""
        wanted: dict[int, str | None] = {pid: unit for unit, path in units.items() for pid in processes_in(path)}
        if self.match:
            wanted.update((pid, None) for pid in self._matching(again) if pid not in wanted)
        known = {}
        for pid, unit in wanted.items():
            seen, ticks = self.known.get(pid), ticks_of(pid)
            if ticks is None:  # it ended in between
                continue
            try:
                if seen is None or seen.ticks != ticks:  # a reused pid is a new process
                    seen = Watched(pid, ticks, unit_by_pid(pid) if unit is None else unit)
                elif again:
                    seen.read_command()
            except (psutil.Error, OSError):
                continue
            known[pid] = seen
        self.known = known
        return sorted(known.values(), key=lambda one: one.pid)

    def _matching(self, again: bool) -> Iterator[int]:
        assert self.match is not None
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208 - as above
        self.others = set() if again else self.others & pids
        # A pattern is on our own command line too, and on that of a sudo or shell above us.
        own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())} if pids - self.others else set()
        for pid in pids - self.others:
            command = read_text(f"/proc/{pid}/cmdline").replace("\0", " ")
            if pid not in own and self.match.search(command):
                yield pid
            else:
                self.others.add(pid)

    def sample(self, now: float, processes: Sequence[Watched], detail: bool) -> Iterator[tuple[Watched, str, int, Row]]:
        """(process, role, rss + swap in KiB, columns of SAMPLE_COLUMNS) of each that still lives."""
        for one in processes:
            status = fields(read_text(f"/proc/{one.pid}/status"))
            if "VmRSS" not in status:  # ended, or a zombie
                continue
            rss, swap = int(status["VmRSS"]), int(status.get("VmSwap", 0))
            role = "child" if int(status["PPid"]) in self.known else "main"
            pss, uss = one.detail() if detail else ("", "")
            row: Row = [
                *(f"{now:.3f}", one.pid, rss, one.command, one.unit, f"{one.start_time:.2f}", role, pss, uss, swap),
                *(one.fds(), status["Threads"], tasks_of(self.tasks, one.pid, one.start_time)),
            ]
            yield one, role, rss + swap, row


def unit_by_pid(pid: int) -> str:
    """The unit whose cgroup a process is in: the last part of its path that names a service or scope."""
    line = next((line for line in read_text(f"/proc/{pid}/cgroup").splitlines() if line.startswith("0::")), "")
    return next((part for part in reversed(line.split("/")) if part.endswith((".service", ".scope"))), "")


class Rollup:
    """Ten minutes of each process in one line."""

    def __init__(self) -> None:
        self.start = 0
        self.open: dict[tuple[int, float], tuple[array[int], Row, Cell]] = {}

    def add(self, now: float, one: Watched, role: str, size: int, tasks: Cell) -> None:
        """size: rss + swap in KiB. Take rows() first when turned(now)."""
        self.start = int(now) // ROLLUP_SPAN * ROLLUP_SPAN
        key = (one.pid, one.start_time)
        sizes = self.open[key][0] if key in self.open else array("q")
        sizes.append(size)
        self.open[key] = (sizes, [one.pid, one.unit, f"{one.start_time:.2f}", role], tasks)

    def turned(self, now: float) -> bool:
        """Whether now is in another ten minutes than what was added."""
        return bool(self.open) and int(now) // ROLLUP_SPAN * ROLLUP_SPAN != self.start

    def rows(self) -> list[Row]:
        """Columns of ROLLUP_COLUMNS of each process; starts anew."""
        rows: list[Row] = []
        for sizes, who, tasks in self.open.values():
            ordered = sorted(sizes)
            middle = len(ordered) // 2
            median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
            rows.append([self.start, *who, len(ordered), ordered[0], median, ordered[-1], tasks])
        self.open = {}
        return rows


# ---- where it goes ----


def stamp(when: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(when))


class Segment:
    """The file of one kind that is written to now."""

    def __init__(self, folder: Path, kind: str, columns: str, span: int) -> None:
        self.folder, self.kind, self.span = folder, kind, span
        self.header = columns.encode() + b"\n"
        self.start = -1
        self.path: Path | None = None
        self.descriptor = -1

    def over(self, now: float) -> bool:
        """Whether now belongs into another segment than the open one, or someone removed that."""
        return int(now) // self.span * self.span != self.start or os.fstat(self.descriptor).st_nlink == 0

    def open(self, now: float) -> None:
        """Go on with the segment that now belongs to, or begin it."""
        self.close()
        self.start = int(now) // self.span * self.span
        for when in itertools.chain([self.start], itertools.count(int(now))):
            path = self.folder / f"{self.kind}-{stamp(when)}.csv"
            if not path.with_name(path.name + ".gz").exists() and self._continues(path):
                break
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        self.path = path

    def _continues(self, path: Path) -> bool:
        """Whether our lines fit into the file: it is new, or has the same columns."""
        try:
            with path.open("rb") as file:
                return file.read(len(self.header)) in (b"", self.header)
        except FileNotFoundError:
            return True

    def append(self, rows: Sequence[Row]) -> None:
        """Whole lines by one write, and a header before the first. Raises OSError with the file as it was before."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        size = os.fstat(self.descriptor).st_size
        # A command line may hold bytes that are no UTF-8.
        lines = (b"" if size else self.header) + text.getvalue().encode(errors="replace")
        try:
            if os.write(self.descriptor, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            os.ftruncate(self.descriptor, size)
            raise

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.path = -1, None


class Store:
    """All segments in one directory, kept to a total size. Raises BlockingIOError for a second writer."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self.folder, self.keep_bytes = folder, keep_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o640)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.segments = {
            "samples": Segment(folder, "samples", SAMPLE_COLUMNS, HOUR),
            "cgroup": Segment(folder, "cgroup", CGROUP_COLUMNS, HOUR),
            "rollup": Segment(folder, "rollup", ROLLUP_COLUMNS, DAY),
        }
        for scratch in folder.glob("*.csv.gz.tmp"):
            scratch.unlink()
        for path in self._files():
            if path.suffix == ".csv":
                self._cut_torn_line(path)

    def append(self, kind: str, now: float, rows: Sequence[Row]) -> None:
        """Write rows of one kind. On a full disk the oldest closed segments make room; with none, rows are lost."""
        if not rows:
            return
        segment = self.segments[kind]
        while True:
            try:
                if segment.path is None or segment.over(now):
                    segment.open(now)
                    self.tidy()
                return segment.append(rows)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                closed = self._closed()
                if not closed:
                    return say_once("lost", f"{self.folder}: no room and no closed segment left; samples are lost")
                say_once("full", f"{self.folder}: no room; dropping the oldest segments, {closed[0].name} first")
                closed[0].unlink()

    def tidy(self) -> None:
        """Gzip the segments that are over, then remove the oldest until all fit into keep_bytes."""
        for path in self._closed():
            if path.suffix == ".csv":
                try:
                    compress(path)
                except OSError as error:
                    say_once("gzip", f"{path.name} stays as it is for now: {error.strerror}")
                    break
        sizes = {path: path.stat().st_size for path in self._files()}
        total = sum(sizes.values())
        for path in self._closed():
            if total <= self.keep_bytes:
                break
            path.unlink()
            total -= sizes[path]

    def close(self) -> None:
        for segment in self.segments.values():
            segment.close()
        os.close(self.lock)

    def _files(self) -> list[Path]:
        """Oldest first, but rollups after all others: they tell the most for their size."""
        names = (f"{kind}-*.{end}" for kind in self.segments for end in ("csv", "csv.gz"))
        paths = [path for name in names for path in self.folder.glob(name)]
        return sorted(paths, key=lambda path: (path.name.startswith("rollup"), path.name.split("-", 1)[1], path.name))

    def _closed(self) -> list[Path]:
        """Those that nothing is written to. What a start finds may still be gone on with until its time is over."""
        now = time.time()
        current = {f"{kind}-{stamp(int(now) // one.span * one.span)}.csv" for kind, one in self.segments.items()}
        current |= {one.path.name for one in self.segments.values() if one.path}
        return [path for path in self._files() if path.name not in current]

    def _cut_torn_line(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - LONGEST_TAIL))
            torn = len(file.read().rpartition(b"\n")[2])
        if torn:
            os.truncate(path, size - torn)
            say(f"{path.name}: cut off {torn} bytes of a line that was never finished")


def compress(path: Path) -> None:
    """NAME.csv to NAME.csv.gz, which appears whole. Raises OSError with NAME.csv still there."""
    scratch = path.with_name(path.name + ".gz.tmp")
    try:
        with path.open("rb") as source, scratch.open("wb") as raw:
            os.fchmod(raw.fileno(), 0o640)
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb") as packed:
                shutil.copyfileobj(source, packed)
            raw.flush()
            os.fsync(raw.fileno())
        scratch.rename(path.with_name(path.name + ".gz"))
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    path.unlink()


# ---- the service ----


def notify(state: str) -> None:
    """Tell systemd, as sd_notify(3) does; without systemd nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


class Sampler:
    """Watcher, rollup and store together; beat() is one round."""

    def __init__(self, watcher: Watcher, store: Store, detail_every: int) -> None:
        self.watcher, self.store, self.detail_every = watcher, store, detail_every
        self.rollup = Rollup()
        self.beats = 0

    def beat(self, now: float) -> int:
        """Sample once; how many processes were there. Raises OSError for all but a full disk."""
        detail = self.beats % self.detail_every == 0
        self.beats += 1
        if self.rollup.turned(now):
            self.store.append("rollup", self.rollup.start, self.rollup.rows())
        units = find_units(self.watcher.cgroups)
        rows = []
        for one, role, size, row in self.watcher.sample(now, self.watcher.find(units, again=detail), detail):
            rows.append(row)
            self.rollup.add(now, one, role, size, row[-1])
        self.store.append("samples", now, rows)
        restarts = restarts_of(units) if detail and units else {}
        cgroups = [cgroup_row(now, unit, path, restarts.get(unit, "")) for unit, path in sorted(units.items())]
        self.store.append("cgroup", now, cgroups)
        return len(rows)

    def close(self) -> None:
        try:
            self.store.append("rollup", self.rollup.start, self.rollup.rows())
        finally:
            self.store.close()


def run(beat: Callable[[float], object], interval: float, stop: set[signal.Signals]) -> None:
    """Beat every interval seconds, with the Unix time, until one of the blocked signals in stop arrives."""
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 2
    due = time.monotonic()
    notify("READY=1")
    while True:
        beat(time.time())
        # Beats that were missed, as over a suspend, are not made up for.
        due = max(due + interval, time.monotonic())
        while True:
            # At least once a beat, also where beats take longer than the interval.
            notify("WATCHDOG=1")
            left = max(0.0, due - time.monotonic())
            if signal.sigtimedwait(stop, min(left, watchdog) if watchdog else left):
                notify("STOPPING=1")
                return
            if time.monotonic() >= due:
                break


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def count(text: str) -> int:
    return int(seconds(str(int(text))))


def pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}") from None
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rss_sampler", description="Samples the memory of this host's Celery workers into CSV files."
    )
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, default=Path("/var/log/plimsoll/samples"), help="default: %(default)s")
    add("--interval", metavar="SECONDS", type=seconds, default=60.0, help="default: 60")
    add("--detail-every", metavar="N", type=count, default=10, help="PSS, USS, restarts every N intervals: 10")
    add("--keep-mb", metavar="MB", type=count, default=512, help="size of all files together; default: 512")
    add("--match", metavar="REGEX", type=pattern, help="watch processes whose command line matches, too")
    add("--once", action="store_true", help="take one sample and end")
    options = parser.parse_args(arguments)

    # Blocked and waited for: no signal comes in the middle of a write.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        store = Store(options.output, options.keep_mb << 20)
    except BlockingIOError:
        say(f"another sampler writes to {options.output}; stop it, or name another --output")
        return 1
    except OSError as error:
        say(f"{options.output}: {error.strerror}; name a directory that can be written to with --output")
        return 1
    sampler = Sampler(Watcher(options.match), store, options.detail_every)
    try:
        with contextlib.closing(sampler):
            if options.once:
                say(f"{sampler.beat(time.time())} processes sampled into {options.output}")
            else:
                run(sampler.beat, options.interval, stop)
    except OSError as error:
        say(f"{error.filename or options.output}: {error.strerror}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
