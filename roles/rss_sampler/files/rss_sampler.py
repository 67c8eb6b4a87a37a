#!/usr/bin/env python3
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Writes down what memory the Celery workers of this host hold. One file, Python 3.9 or later, on psutil.

Watched are the processes in the cgroup (v1 or v2) of a unit `celery-worker@NAME.service`; and, wherever they run, those
that a command line shows to be a Celery worker (celery worker, python -m celery worker, billiard's process titles) or
that --match finds, with the processes that they start. With --output, all goes to CSV files with a header; without,
samples go to stdout. Times are Unix seconds in UTC, sizes KiB; an unmeasured cell is empty.

samples-STAMP.csv   a line is one process at one time. rss_kb, swap_kb and tasks every interval; pss_kb, uss_kb, fds and
                    threads every --detail-every intervals, as they cost the kernel ten times as much. role is child
                    when the process's parent is watched too. tasks is how many tasks the process has finished, where
                    the bootstrap publishes it in /run/plimsoll/tasks/PID. With --plain only the first four columns.
cgroup-STAMP.csv    a line is one unit at one time. A limit that is not set is an empty cell; events_* and oom_kill are
                    counted since the unit started, pressure_* are microseconds since then. n_restarts every
                    --detail-every intervals. cgroup v1 knows no memory.high and no pressure: those cells are empty.
rollup-STAMP.csv    a line is one process and ten minutes, whose start is timestamp: count of samples, floor, median and
                    maximum of rss + swap, and tasks as of its last sample. A restart of the sampler in the ten minutes
                    gives a second line for them.
units-STAMP.csv     a line is one unit as it was at the last sample of ten minutes, in the columns of cgroup-STAMP.csv,
                    with n_restarts.

STAMP is the start of the hour (of a rollup and of units: of the day), 20261124T170000Z; where that name is taken, the
time of the first line. A segment that is over is gzipped. Those older than --keep-days go, and when all of them
together exceed --keep-mb, the oldest: first those that acknowledged.json beside the directory names, as they were
collected, and of both what is small and tells the most, rollups and units, last.

--metrics serves the last sample to Prometheus, by prometheus_client: on ADDRESS:PORT as OpenMetrics, or in a file for
node_exporter. The names are at the head of class Metrics.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import csv
import errno
import fcntl
import fnmatch
import gzip
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import psutil

UNIT_PATTERN = "celery-worker@*.service"
CGROUPS = Path("/sys/fs/cgroup")
TASKS = Path("/run/plimsoll/tasks")
GUARD_ACTS = Path("/run/plimsoll-guard/acts.json")

PLAIN_COLUMNS = "timestamp,pid,rss_kb,command"
SAMPLE_COLUMNS = "timestamp,pid,rss_kb,command,unit,start_time,role,pss_kb,uss_kb,swap_kb,fds,threads,tasks"
CGROUP_COLUMNS = (
    "timestamp,unit,memory_current_kb,memory_high_kb,memory_max_kb,swap_kb,events_high,events_max,oom_kill,"
    "pressure_some_us,pressure_full_us,n_restarts"
)
ROLLUP_COLUMNS = "timestamp,pid,unit,start_time,role,count,floor_kb,median_kb,max_kb,tasks"

HOUR, DAY, ROLLUP_SPAN = 3600, 86400, 600
# Segments of these tell the most for their size.
SMALL = ("rollup", "units")

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024
COMMAND_LENGTH = 200
# More than one beat writes: what a power cut left of it, be it zeros, is found in this much of the end.
LONGEST_TAIL = 1 << 20
# Of a command line, which is its user's to choose and may be megabytes.
LONGEST_COMMAND = 4096
SMAPS = re.compile(rb"^(Pss|Private_\w+): +(\d+) kB", re.MULTILINE)
# Options of `celery` itself that take a value, so that the value is not taken for the name of a command.
CELERY_VALUES = {"-A", "--app", "-b", "--broker", "--result-backend", "--loader", "--config", "--workdir"}
# Options of `celery worker` that are labels of its metrics.
WORKER_OPTIONS = {
    **{"-P": "pool", "--pool": "pool", "-Q": "queues", "--queues": "queues"},
    **{"-c": "concurrency", "--concurrency": "concurrency"},
}
# Those of python that do.
PYTHON_VALUES = {"-X", "-W", "--check-hash-based-pycs"}
# Whoever may make cgroups could make them as deep as they like.
DEEPEST = 20
# Of cgroup v1: what it shows where no limit is set is the largest that it can count, by page.
NO_LIMIT = 1 << 62
NONE_FOUND = ": no unit celery-worker@*.service and no command line of a Celery worker; --match finds others"
# What Prometheus is told of: more units than any host has, should their names come and go.
MOST_UNITS = 200
# Of a worker's command line and of the guard's counts, which others write.
LONGEST_LABEL, MOST_ACTS_BYTES = 200, 1 << 20
PLAIN = re.compile(r"[^A-Za-z0-9_.:@#/,-]")
# systemd is asked for restarts and failures so often, seconds; and a scrape has so many to ask and be answered.
ASK_EVERY_S, SCRAPE_S = 15.0, 5.0
# Of the files that may be open: for what is held of units, and all that is opened for a moment.
FILES_KEPT_FREE = 512
# A process takes 20 KiB, half of it the kernel's for the files that are held: these fit into 64 MiB.
MOST_PROCESSES = 2500
# Ten minutes each, so that growth is that of the last hour.
GROWTH_SPANS = 7
# Of gzip: 27 ms an hour of 300 processes where its default of 9 takes 45, for 7 % more bytes.
GZIP_LEVEL = 6

Cell = Union[int, str]
_said: set[str] = set()


def say(text: str, event: str = "", priority: int = 6, **fields: object) -> None:
    """One line for the journal, with PLIMSOLL_EVENT and fields of its own to search by; without a journal on stderr.

    priority is syslog's: 3 an error, 4 a warning, 6 a word.
    """
    named = {"PLIMSOLL_EVENT": event, **{f"PLIMSOLL_{name.upper()}": value for name, value in fields.items()}}
    entry = {"MESSAGE": text, "PRIORITY": priority, "SYSLOG_IDENTIFIER": "rss_sampler", **(named if event else {})}
    lines = "".join(f"{name}={' '.join(str(value).split())}\n" for name, value in entry.items())
    if stderr_is_journal():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.sendto(lines.encode(errors="replace"), "/run/systemd/journal/socket")
            return
    print(f"rss_sampler: {text}", file=sys.stderr, flush=True)


def stderr_is_journal() -> bool:
    """As systemd.exec(5) has it under JOURNAL_STREAM: a shell below the service may have redirected stderr."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def say_once(event: str, text: str, priority: int = 4, **fields: object) -> None:
    if event not in _said:
        _said.add(event)
        say(text, event, priority, **fields)


# ---- the kernel's files ----


def read_text(path: str | Path) -> str:
    """Contents, or an empty string where the file or its process is gone or not for us to read."""
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


class Held:
    """A file of the kernel's that is kept open and read anew: a third of the cost of opening it each time.

    It stays that of the process or cgroup that it was opened for, whoever comes after it under the same name.
    """

    __slots__ = ("descriptor",)

    def __init__(self, path: str | Path) -> None:
        """One that does not exist reads as empty."""
        self.descriptor = -1
        with contextlib.suppress(OSError):
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> str:
        """Contents up to a page; empty where it is gone or not for us to read."""
        try:
            return os.pread(self.descriptor, 65536, 0).decode(errors="replace")
        except OSError:
            return ""

    def read_all(self) -> str:
        """Contents of one that the kernel gives a page at a time, as the pids of a cgroup."""
        content = b""
        with contextlib.suppress(OSError):
            while more := os.pread(self.descriptor, 65536, len(content)):
                content += more
        return content.decode(errors="replace")

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def fields(text: str) -> dict[str, str]:
    """First word of each line to its second: /proc/PID/status (keys without the colon), memory.events."""
    # No splitlines(): a process may name itself with what Unicode calls a line's end, and forge lines of its status.
    return {words[0].rstrip(":"): words[1] for words in map(str.split, text.split("\n")) if len(words) > 1}


def csv_line(cells: Iterable[Cell]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


# ---- units and their cgroups ----


def slices_of(root: Path) -> Iterator[tuple[str, list[str]]]:
    """A directory with cgroups of services, and what is in it: root, and the slices below. Workers are nowhere else."""
    pending = [str(root)]
    while pending:
        here = pending.pop()
        names = listing(here)
        pending += [f"{here}/{name}" for name in names if name.endswith(".slice")]
        yield here, names


def find_units(root: Path) -> dict[str, Path]:
    """Cgroup directory of each running worker, by unit name."""
    return {
        name: Path(here, name)
        for here, names in slices_of(root)
        for name in names
        if name.startswith("celery-") and fnmatch.fnmatchcase(name, UNIT_PATTERN)
    }


def listing(path: str) -> list[str]:
    """Names in a directory; none if it is gone."""
    try:
        return os.listdir(path)
    except OSError:
        return []


def processes_in(cgroup: Path) -> list[int]:
    """Pids in a unit's cgroup and in those below it: where a unit has Delegate=, its processes are further down."""
    pids: list[int] = []
    pending = [(str(cgroup), 0)]
    while pending:
        here, depth = pending.pop()
        pids += map(int, read_text(f"{here}/cgroup.procs").split())
        with contextlib.suppress(OSError):  # gone in between
            # Two links where there is nothing below.
            if depth < DEEPEST and os.stat(here).st_nlink != 2:
                with os.scandir(here) as entries:
                    pending += [(one.path, depth + 1) for one in entries if one.is_dir(follow_symlinks=False)]
    return pids


def unit_by_pid(pid: int) -> str:
    """The unit whose cgroup a process is in: the last part of its path that names a service or scope."""
    paths = dict(line.split(":", 2)[1:] for line in read_text(f"/proc/{pid}/cgroup").split("\n") if line.count(":") > 1)
    # The second is cgroup v1, where the first is of no use.
    for path in (paths.get("", ""), paths.get("name=systemd", "")):
        units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
        if units:
            # A user's own manager, or one in a container, may give its units the names of ours.
            return units[0] if fnmatch.fnmatchcase(units[-1], UNIT_PATTERN) else units[-1]
    return ""


def kib(text: str) -> Cell:
    """Bytes of a cgroup's file in KiB; `max`, what v1 has for it, and an absent file are an empty cell."""
    return int(text) // 1024 if text.strip().isdigit() and int(text) < NO_LIMIT else ""


def pressure_totals(text: str) -> tuple[Cell, Cell]:
    """(some, full) in microseconds of a memory.pressure; empty cells on a kernel without it."""
    totals = dict(re.findall(r"^(some|full) .*total=(\d+)", text, re.MULTILINE))
    return int(totals["some"]) if "some" in totals else "", int(totals["full"]) if "full" in totals else ""


def v2_figures(read: Callable[[str], str]) -> list[Cell]:
    """The cells of CGROUP_COLUMNS from memory_current_kb to pressure_full_us, of cgroup v2's files."""
    sizes = [kib(read(name)) for name in ("memory.current", "memory.high", "memory.max", "memory.swap.current")]
    events = fields(read("memory.events"))
    counts = [events.get(name, "") for name in ("high", "max", "oom_kill")]
    return [*sizes, *counts, *pressure_totals(read("memory.pressure"))]


def v1_figures(read: Callable[[str], str]) -> list[Cell]:
    """The same of cgroup v1: events_max is memory.failcnt, and swap is what memsw counts beyond memory."""
    usage, limit, both = (
        kib(read(f"memory.{name}")) for name in ("usage_in_bytes", "limit_in_bytes", "memsw.usage_in_bytes")
    )
    swap: Cell = max(0, both - usage) if isinstance(both, int) and isinstance(usage, int) else ""
    killed = fields(read("memory.oom_control")).get("oom_kill", "")
    return [usage, "", limit, swap, "", read("memory.failcnt").strip(), killed, "", ""]


class Unit:
    """One run of a unit, by its cgroup. Raises OSError if it is gone."""

    def __init__(self, name: str, processes: Path, memory: Path, figures: Callable[[Callable[[str], str]], list[Cell]]):
        self.name, self.processes, self.memory, self.take = name, processes, memory, figures
        self.inode = processes.stat().st_ino
        self.procs = Held(processes / "cgroup.procs")
        self.listed: str | None = None
        self.held: dict[str, Held] = {}
        self.figures: list[Cell] = []
        self.restarts: Cell = ""

    def changed(self) -> bool:
        """Whether other processes may be in it than when this was asked last, or it is not there any more."""
        try:
            status = os.stat(self.processes)
        except OSError:
            return True
        before, self.listed = self.listed, self.procs.read_all()
        # systemd makes a cgroup anew at each start. A third link is a cgroup below, with processes of its own.
        return self.listed != before or status.st_ino != self.inode or status.st_nlink != 2

    def lives(self) -> bool:
        try:
            return os.stat(self.processes).st_ino == self.inode
        except OSError:
            return False

    def measure(self) -> None:
        self.figures = self.take(self.read)

    def read(self, name: str) -> str:
        """One of its memory controller's files; empty where it has none."""
        if name not in self.held or self.held[name].descriptor < 0:
            self.held[name] = Held(self.memory / name)
        return self.held[name].read()

    @property
    def swaps(self) -> bool:
        """Whether any of it may be swapped out; that it is not known does not rule it out."""
        return self.figures[3] != 0

    def close(self) -> None:
        for held in (self.procs, *self.held.values()):
            held.close()


def show(properties: str, units: Iterable[str]) -> dict[str, dict[str, str]]:
    """Properties of units and patterns of units, by name and one call of systemctl; empty with no systemd to ask."""
    command = ["systemctl", "show", f"--property=Id,{properties}", *units]
    # It would tell systemd of its own end, in our name.
    environ = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    blocks = (dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in said.split("\n\n"))
    return {block["Id"]: block for block in blocks if "Id" in block}


def restarts_of(units: Iterable[str]) -> dict[str, str]:
    """NRestarts of each unit; empty where there is no systemd to ask."""
    return {unit: shown.get("NRestarts", "") for unit, shown in show("NRestarts", units).items()}


# ---- processes ----


def is_worker(argv: Sequence[str]) -> bool:
    """Whether a command line is that of a Celery worker, or of a process of its pool."""
    if not argv:
        return False
    # As billiard has it where setproctitle is installed: [celeryd: sales@host:ForkPoolWorker-1].
    if argv[0].startswith("[celeryd"):
        return True
    at, end = 0, len(argv)
    if re.fullmatch(r"(python|pypy)[\d.]*", os.path.basename(argv[0])):
        at = 1
        while at < end and argv[at].startswith("-") and argv[at] != "-m":
            at += 2 if argv[at] in PYTHON_VALUES else 1
        if at < end and argv[at] == "-m":
            at += 1
    if at >= end or os.path.basename(argv[at]) != "celery":
        return False
    at += 1
    while at < end and argv[at].startswith("-"):
        at += 2 if argv[at] in CELERY_VALUES else 1
    return at < end and argv[at] == "worker"


def command_line(pid: int) -> list[str]:
    """The arguments of a process, of the first LONGEST_COMMAND bytes; of an argument that goes on beyond, `...`."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            raw = file.read(LONGEST_COMMAND)
    except OSError:
        return []
    argv = raw.decode(errors="replace").rstrip("\0").split("\0")
    # Half of a URL does not show where its password ends.
    return [*argv[:-1], "..."] if len(raw) == LONGEST_COMMAND else argv


def command_of(argv: Iterable[str]) -> str:
    """A command line as it is written down: one line, without passwords, and fit for a terminal."""
    command = " ".join(masked(word) for word in " ".join(argv).split())[:COMMAND_LENGTH]
    return command if command.isprintable() else "".join(one if one.isprintable() else "?" for one in command)


def masked(word: str) -> str:
    """A broker's URL carries its password, at times with a bare / or @ in it; samples leave the host."""
    head, mark, rest = word.partition("://")
    return f"{head}://***{rest[rest.rindex('@') :]}" if mark and "@" in rest else word


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on, its state; empty if the process is gone."""
    return read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def parent_of(pid: int) -> int:
    """Its parent's pid; 0 if it is gone."""
    stat = stat_of(pid)
    return int(stat[1]) if stat else 0


def ancestry(pid: int) -> set[int]:
    """A process and those above it."""
    found: set[int] = set()
    while pid and pid not in found:
        found.add(pid)
        pid = parent_of(pid)
    return found


def fds_of(pid: int) -> Cell:
    """Open descriptors. Of another user's process they need CAP_SYS_PTRACE until Linux 6.2, and 5.14 or later."""
    try:
        # Since 6.2 that is their number.
        return os.stat(f"/proc/{pid}/fd").st_size or len(os.listdir(f"/proc/{pid}/fdinfo"))
    except OSError:
        return ""


def pss_and_uss(pid: int) -> tuple[Cell, Cell]:
    """Proportional and unique set size, KiB, as proc(5) has them; empty cells where it is not allowed or gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            found = SMAPS.findall(file.read())
    except PermissionError:
        say_once("pss", "PSS and USS of other users' processes need CAP_SYS_PTRACE; those cells are empty")
        return "", ""
    except OSError:  # it ended, or is a zombie
        return "", ""
    sizes = [(name, int(size)) for name, size in found]
    return sum(size for name, size in sizes if name == b"Pss"), sum(size for name, size in sizes if name != b"Pss")


def tasks_of(folder: Path, pid: int, start_time: float) -> int:
    """Descriptor of what the process's bootstrap publishes, or -1. Workers' users write that file: no trust."""
    try:
        descriptor = os.open(folder / str(pid), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1
    # Older than the process: left behind by another of the same pid. A second for the clocks to differ.
    if os.fstat(descriptor).st_mtime > start_time - 1:
        return descriptor
    os.close(descriptor)
    return -1


class Process:
    """One process that is watched. Raises OSError if it is gone."""

    __slots__ = (
        *("command", "described", "floors", "parent", "pid", "pss", "role", "row", "settled", "sizes", "slow"),
        *("start_time", "statm", "swap", "tasks", "tasks_file", "unit", "unit_name"),
    )

    def __init__(self, pid: int, unit: Unit | None, tasks: Path) -> None:
        self.pid, self.unit = pid, unit
        self.statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
        self.tasks_file = -1
        try:
            stat = stat_of(pid)
            self.unit_name = unit.name if unit else unit_by_pid(pid)
            # Not create_time(): older psutil goes by when the host booted as it was first asked, whatever the clock is
            # now. From ticks, which no setting of the clock changes.
            self.start_time = psutil.boot_time() + int(stat[19]) / CLOCK_TICKS
            self.read_command()
            # If it were gone by now, all of this might be another's of the same pid.
            os.pread(self.statm, 1, 0)
        except (OSError, IndexError):
            self.close()
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        self.tasks_file = tasks_of(tasks, pid, self.start_time)
        self.parent, self.role, self.described, self.row = int(stat[1]), "", "", ""
        self.swap = 0
        self.pss: Cell = ""
        self.tasks: Cell = ""
        self.slow: tuple[Cell, ...] = ("", "", "", "")
        self.sizes = array("q")
        self.settled = False
        self.floors: deque[tuple[float, int]] = deque(maxlen=GROWTH_SPANS)

    def read_command(self) -> None:
        """Once is not enough: a process that is seen between fork and exec has none, or its parent's."""
        self.command = command_of(command_line(self.pid))

    def describe(self, role: str) -> None:
        """What is the same on each of its lines: all from command to role."""
        if (role, self.command) != (self.role, self.described):
            self.role, self.described = role, self.command
            cells = [self.command, self.unit_name, f"{self.start_time:.2f}", role]
            self.row = "," + csv_line(cells)[:-1] + ","

    def tail(self, plain: bool) -> str:
        """From command on, where that is the same at all but a few beats; else empty."""
        if plain:
            return "," + csv_line([self.command])
        return "" if self.tasks_file >= 0 else f"{self.row},,0,,,\n"

    def measure(self, pss: bool, tasks: Path) -> None:
        """What costs more: the cells of pss_kb, uss_kb, fds, threads. Raises OSError if it is gone."""
        stat = stat_of(self.pid)
        if not stat:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        self.parent = int(stat[1])
        self.read_command()
        uss: Cell = ""
        if pss:
            self.pss, uss = pss_and_uss(self.pid)
        self.slow = self.pss, uss, fds_of(self.pid), stat[17]
        if self.tasks_file < 0:
            self.tasks_file = tasks_of(tasks, self.pid, self.start_time)

    def cells(self, detail: bool) -> str:
        """The rest of a line from command on, where not all is empty or 0."""
        if self.tasks_file >= 0:
            self.tasks = self.read_tasks()
        pss, uss, fds, threads = self.slow if detail else ("", "", "", "")
        return f"{self.row}{pss},{uss},{self.swap},{fds},{threads},{self.tasks}\n"

    def is_zombie(self) -> bool:
        """Whether it has no memory at all, rather than all of it swapped out."""
        return read_text(f"/proc/{self.pid}/statm").startswith("0 ")

    def read_swap(self) -> int:
        return int(fields(read_text(f"/proc/{self.pid}/status")).get("VmSwap", 0))

    def read_tasks(self) -> Cell:
        try:
            text = os.pread(self.tasks_file, 16, 0).strip()  # fits into 64 bits, whatever they write
        except OSError:  # a directory, or a pipe
            return ""
        return int(text) if text.isdigit() else ""

    def close(self) -> None:
        os.close(self.statm)
        self.statm = -1
        if self.tasks_file >= 0:
            os.close(self.tasks_file)


class Watcher:
    """Finds the processes of the workers, beat after beat, and remembers who is who."""

    def __init__(
        self, match: str | None = None, pss: bool = True, plain: bool = False, root: Path = CGROUPS, tasks: Path = TASKS
    ) -> None:
        self.match = re.compile(match) if match else None
        self.pss, self.plain, self.tasks = pss, plain, tasks
        if (root / "cgroup.controllers").exists():
            self.processes, self.memory, self.figures = root, root, v2_figures
        else:
            # cgroup v1: systemd's own hierarchy has all units, the memory controller's those that it accounts for.
            self.processes, self.memory, self.figures = root / "systemd", root / "memory", v1_figures
        # Two files are held for each.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FILES_KEPT_FREE
        self.most = max(1, min(MOST_PROCESSES, files // 2))
        self.swaps = Held("/proc/swaps")
        self.swapping = False
        self.rollup = Rollup()
        self.units: dict[str, Unit] = {}
        self.known: dict[int, Process] = {}
        # What a sample takes of each: statm, its line up to rss_kb, the rest of a line that has no more cells (empty
        # where it has), and the process.
        self.loop: list[tuple[int, str, str, Process]] = []
        # The loop as it was at the last sample, and the sizes then.
        self.latest: tuple[list[Any], array[int]] = [], array("q")
        # Whether one ended since the last look, whose pid may be another's by now.
        self.stale = False
        # Names in /proc as of the last look, and those of them that are none of ours.
        self.seen: set[str] = set()
        self.loose: set[int] = set()
        # Directories of units, and what was in them.
        self.slices: dict[str, list[str]] = {}
        self.others: set[str] = set()

    def find(self, again: bool) -> None:
        """Look who lives now, if anyone may be new: who is gone is found out in reading.

        A new process of a unit is seen at once. All of /proc is looked through for others where there are such, or no
        unit; and else every time that again is true. Command lines are read anew then, too, as a process may exec.
        """
        changed = [unit for unit in self.units.values() if unit.changed()]
        if again or self.loose or not self.units:
            names = set(os.listdir("/proc"))
            new = not names <= self.seen
            self.seen = names
        else:
            new = False
        if not (again or changed or new or self.stale or self.slices != {here: listing(here) for here in self.slices}):
            return
        self.stale = False
        self._find_units()
        wanted: dict[int, Unit | None] = {
            pid: unit for unit in self.units.values() for pid in processes_in(unit.processes)
        }
        if again or self.loose or not self.units:
            self.loose = self._loose({name for name in self.seen if name.isdigit()}, wanted, again)
        wanted.update(dict.fromkeys(self.loose))
        self._forget([one for pid, one in self.known.items() if pid not in wanted])
        for pid in sorted(wanted.keys() - self.known.keys()):
            if len(self.known) == self.most:
                way_out = "" if self.most == MOST_PROCESSES else "; raise LimitNOFILE= (ulimit -n)"
                say_once("many", f"no more than {self.most} of {len(wanted)} processes are watched{way_out}", 3)
                break
            with contextlib.suppress(OSError):  # gone again
                self.known[pid] = Process(pid, wanted[pid], self.tasks)
        self.known = dict(sorted(self.known.items()))
        self._describe()

    def _describe(self) -> None:
        for one in self.known.values():
            one.describe("child" if one.parent in self.known else "main")
        self.loop = [(one.statm, f"{one.pid},", one.tail(self.plain), one) for one in self.known.values()]
        self.rollup.follow(list(self.known.values()))

    def _find_units(self) -> None:
        # Before: what comes after it is found when it is looked for next.
        self.slices = dict(slices_of(self.processes))
        found = find_units(self.processes)
        for name, unit in list(self.units.items()):
            if name not in found or not unit.lives():
                self.units.pop(name).close()
        for name, path in sorted(found.items()):
            if name not in self.units:
                memory = self.memory / path.relative_to(self.processes)
                with contextlib.suppress(OSError):  # gone again
                    self.units[name] = Unit(name, path, memory, self.figures)

    def _loose(self, pids: set[str], in_units: Mapping[int, object], again: bool) -> set[int]:
        """Processes of workers that are in no unit of ours."""
        self.others = set() if again else self.others & pids
        candidates = sorted({int(pid) for pid in pids - self.others} - in_units.keys())
        # A pattern is on our own command line too, and on that of a sudo or shell above us.
        own = ancestry(os.getpid()) if candidates and self.match else set()
        found: set[int] = set()
        for pid in candidates:
            if again or pid not in self.known:
                argv = command_line(pid)
                ours = is_worker(argv) or (self.match and pid not in own and self.match.search(" ".join(argv)))
                if not ours and not ((found or self.known) and parent_of(pid) in found.union(self.known)):
                    self.others.add(str(pid))
                    continue
            found.add(pid)
        return found

    def sample(self, now: float, detail: bool) -> list[str]:
        """A line of SAMPLE_COLUMNS, or of PLAIN_COLUMNS, of each process that lives."""
        for name, unit in list(self.units.items()):
            unit.measure()
            if not unit.lives():
                self.units.pop(name).close()
        if detail:
            self._measure()
        # Where nothing is, no process need be asked: the line after the header is the first device's.
        swapping = any(line.split()[3] != "0" for line in self.swaps.read().split("\n")[1:] if line)
        if self.swapping and not swapping:
            for one in self.known.values():
                one.swap = 0
        self.swapping = swapping
        # As little as can be is touched for each: with what the host did since the last beat, nothing is in the caches.
        lines, gone, sizes, moment, read = [], [], array("q"), f"{now:.3f},", os.pread
        for statm, head, tail, one in self.loop:
            try:
                rss = int(read(statm, 64, 0).split(b" ", 2)[1]) * PAGE_KB
            except OSError:
                gone.append(one)
                rss = 0
            if not rss and (one in gone or one.is_zombie()):
                sizes.append(-1)
                continue
            if swapping:
                one.swap = one.read_swap() if one.unit is None or one.unit.swaps else 0
            if swapping or detail or not tail:
                sizes.append(rss + one.swap)
                lines.append(f"{moment}{head}{rss}{tail if self.plain else one.cells(detail)}")
            else:
                sizes.append(rss)
                lines.append(f"{moment}{head}{rss}{tail}")
        self.rollup.add(sizes)
        self.latest = self.loop, sizes
        self._forget(gone)
        return lines

    def _measure(self) -> None:
        gone = []
        for one in self.known.values():
            try:
                one.measure(self.pss, self.tasks)
            except OSError:
                gone.append(one)
        self._forget(gone)
        self._describe()
        restarts = restarts_of(self.units) if self.units else {}
        for name, unit in self.units.items():
            unit.restarts = restarts.get(name, "")

    def _forget(self, gone: Sequence[Process]) -> None:
        """They ended. Another that has the pid of one of them by the next beat is a new one."""
        if not gone:
            return
        for one in gone:
            one.close()
            del self.known[one.pid]
            self.seen.discard(str(one.pid))
            self.loose.discard(one.pid)
        self.loop = [entry for entry in self.loop if entry[-1].statm >= 0]
        self.rollup.follow([entry[-1] for entry in self.loop])
        self.stale = True

    def last(self) -> list[tuple[Process, int]]:
        """The processes of the last sample, with their rss + swap in KiB."""
        return [(entry[-1], size) for entry, size in zip(*self.latest) if size >= 0]

    def unit_lines(self, now: float, detail: bool) -> list[str]:
        """A line of CGROUP_COLUMNS of each unit."""
        return [
            f"{now:.3f},{name},{','.join(map(str, unit.figures))},{unit.restarts if detail else ''}\n"
            for name, unit in sorted(self.units.items())
        ]


class Rollup:
    """Ten minutes of each process in one line."""

    def __init__(self) -> None:
        self.start = 0
        # The sizes of a beat are in the order of those that are there; of those that ended they are in them.
        self.there: list[Process] = []
        self.beats: list[array[int]] = []
        self.ended: list[Process] = []

    def follow(self, processes: list[Process]) -> None:
        """Those that the sizes of the next beats are of."""
        self._settle()
        self.ended += [one for one in self.there if one.statm < 0 and one.sizes]
        self.there = processes

    def add(self, sizes: array[int]) -> None:
        """rss + swap in KiB of each that is there; -1 for one that has none."""
        self.beats.append(sizes)

    def _settle(self) -> None:
        for one, sizes in zip(self.there, zip(*self.beats)):
            one.sizes.extend(size for size in sizes if size >= 0)
        self.beats = []

    def turned(self, now: float) -> bool:
        """Whether now is in another ten minutes than what was added."""
        return self.start > 0 and int(now) // ROLLUP_SPAN * ROLLUP_SPAN != self.start

    def begin(self, now: float) -> None:
        self.start = int(now) // ROLLUP_SPAN * ROLLUP_SPAN

    def lines(self) -> list[str]:
        """A line of ROLLUP_COLUMNS of each process; starts anew."""
        self._settle()
        lines, moment = [], time.monotonic()
        for one in self.ended + self.there:
            ordered = sorted(one.sizes)
            if not ordered:
                continue
            middle = len(ordered) // 2
            median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
            who: list[Cell] = [one.pid, one.unit_name, f"{one.start_time:.2f}", one.role]
            lines.append(csv_line([self.start, *who, len(ordered), ordered[0], median, ordered[-1], one.tasks]))
            # Not of the ten minutes in which it began: that is how it warms up.
            if one.settled:
                one.floors.append((moment, ordered[0]))
            one.settled = True
            one.sizes = array("q")
        self.ended = []
        return lines


# ---- where it goes ----


def stamp(when: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(when))


def stamped(path: Path) -> float:
    """The time in a segment's name; of one that no sampler named, the time of its last change."""
    try:
        return calendar.timegm(time.strptime(path.name.split("-", 1)[1][:16], "%Y%m%dT%H%M%SZ"))
    except ValueError:
        return path.stat().st_mtime


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
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self.path = path

    def _continues(self, path: Path) -> bool:
        """Whether our lines fit into the file: it is new, or has the same columns."""
        try:
            with path.open("rb") as file:
                return file.read(len(self.header)) in (b"", self.header)
        except FileNotFoundError:
            return True

    def append(self, lines: Sequence[str]) -> None:
        """Whole lines by one write, and a header before the first. Raises OSError with the file as it was before."""
        size = os.fstat(self.descriptor).st_size
        # A command line may hold bytes that are no UTF-8.
        text = (b"" if size else self.header) + "".join(lines).encode(errors="replace")
        try:
            if os.write(self.descriptor, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            os.ftruncate(self.descriptor, size)
            raise

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.path = -1, None


class Store:
    """All segments in one directory, kept to a size and an age. Raises BlockingIOError for a second writer."""

    def __init__(self, folder: Path, keep_bytes: int, keep_seconds: float, plain: bool = False) -> None:
        self.folder, self.keep_bytes, self.keep_seconds = folder, keep_bytes, keep_seconds
        # By the clock that no one sets: what is old is known as long as the other agrees with it.
        self.began = time.time() - time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise
        kinds = [
            ("samples", SAMPLE_COLUMNS, HOUR),
            ("cgroup", CGROUP_COLUMNS, HOUR),
            ("rollup", ROLLUP_COLUMNS, DAY),
            ("units", CGROUP_COLUMNS, DAY),
        ]
        if plain:
            kinds = [("samples", PLAIN_COLUMNS, HOUR)]
        self.segments = {kind: Segment(folder, kind, columns, span) for kind, columns, span in kinds}
        for scratch in folder.glob("*.csv.gz.tmp"):
            scratch.unlink()
        for path in self._files():
            if path.suffix == ".csv":
                self._cut_torn_line(path)

    def append(self, kind: str, now: float, lines: Sequence[str]) -> None:
        """Write lines of one kind. On a full disk the oldest closed segments make room; with none, lines are lost."""
        segment = self.segments.get(kind)
        if not lines or segment is None:
            return
        while True:
            try:
                if segment.path is None or segment.over(now):
                    segment.open(now)
                    self.tidy()
                    _said.discard("full")
                segment.append(lines)
                _said.discard("lost")
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                closed = self._closed()
                if not closed:
                    text = f"{self.folder}: no room and no closed segment left; samples are lost until there is some"
                    return say_once("lost", text, 3, path=self.folder)
                text = f"{self.folder}: no room; dropping the oldest segments, {closed[0].name} first"
                say_once("full", text, 4, path=self.folder)
                closed[0].unlink()

    def tidy(self) -> None:
        """Gzip the segments that are over, remove those that are too old, and the oldest until all fit."""
        for path in self._closed():
            if path.suffix == ".csv":
                try:
                    compress(path)
                    _said.discard("gzip")
                except OSError as error:
                    say_once("gzip", f"{path.name} stays as it is for now: {error.strerror}", path=path)
                    break
        old = time.time() - self.keep_seconds
        if abs(time.time() - time.monotonic() - self.began) > HOUR:
            say_once("clock", "the clock was set: until the next start nothing is removed for its age")
            old = 0
        sizes = {path: path.stat().st_size for path in self._files()}
        total = sum(sizes.values())
        for path in self._closed():
            if total > self.keep_bytes or stamped(path) < old:
                path.unlink()
                total -= sizes[path]

    def close(self) -> None:
        for segment in self.segments.values():
            segment.close()
        os.close(self.lock)

    def _files(self) -> list[Path]:
        """As they may go: first what was collected, last what tells the most for its size; of each the oldest first."""
        kinds = ("samples", "cgroup", *SMALL)
        paths = [path for kind in kinds for end in ("csv", "csv.gz") for path in self.folder.glob(f"{kind}-*.{end}")]
        collected = acknowledged(self.folder)

        def rank(path: Path) -> tuple[bool, bool, str, str]:
            kind, _, rest = path.name.partition("-")
            return f"{kind}-{rest.split('.')[0]}.csv" not in collected, kind in SMALL, rest, path.name

        return sorted(paths, key=rank)

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
            text = f"{path.name}: cut off {torn} bytes of a line that was never finished"
            say(text, "torn", 4, path=path, bytes=torn)


def acknowledged(folder: Path) -> set[str]:
    """Names of segments, before gzip, that a controller has in its store; collecting writes them down."""
    try:
        names = json.loads((folder.parent / "acknowledged.json").read_text())
        return {str(name).partition("/")[2] for name in names if str(name).startswith(f"{folder.name}/")}
    except (OSError, ValueError, TypeError):
        return set()


def compress(path: Path) -> None:
    """NAME.csv to NAME.csv.gz, which appears whole. Raises OSError with NAME.csv still there."""
    scratch = path.with_name(path.name + ".gz.tmp")
    try:
        with path.open("rb") as source, scratch.open("wb") as raw:
            os.fchmod(raw.fileno(), 0o640)
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=GZIP_LEVEL) as packed:
                shutil.copyfileobj(source, packed)
            raw.flush()
            os.fsync(raw.fileno())
        scratch.rename(path.with_name(path.name + ".gz"))
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    path.unlink()


class Stdout:
    """In place of a store: samples as CSV, and nothing else."""

    def __init__(self, plain: bool) -> None:
        self.header = (PLAIN_COLUMNS if plain else SAMPLE_COLUMNS) + "\n"

    def append(self, kind: str, now: float, lines: Sequence[str]) -> None:
        """Raises BrokenPipeError once nobody reads any more."""
        if kind == "samples":
            sys.stdout.buffer.write((self.header + "".join(lines)).encode(errors="replace"))
            sys.stdout.buffer.flush()
            self.header = ""

    def close(self) -> None:
        pass


class Metrics:
    """The last sample for Prometheus. No series has a pid, and units beyond MOST_UNITS, and those that are no service
    (a session's scope, say), are one: unit="". Sizes in bytes, role is main or child.

    plimsoll_worker_resident_memory_bytes, plimsoll_worker_proportional_memory_bytes, plimsoll_worker_swap_bytes,
    plimsoll_worker_processes       {unit, role}  sums over its processes; PSS is that of the last beat that took it,
                                    and there is none with --no-pss
    plimsoll_worker_growth_bytes_per_hour {unit, role}  of the ten-minute floors of RSS and swap over the last hour, of
                                    processes that were there for longer than that: an indication, not a finding
    plimsoll_worker_memory_bytes, plimsoll_worker_memory_high_bytes, plimsoll_worker_memory_max_bytes
                                    {unit}        of its cgroup; no series for a limit that is not set
    plimsoll_worker_memory_level_bytes            {unit}         memory_bytes without page cache and slab that the
                                    kernel takes back, as the memory guard has it
    plimsoll_worker_memory_events_total           {unit, event}  high, max and oom_kill, since the unit started
    plimsoll_worker_memory_pressure_seconds_total {unit, kind}   some and full (PSI), since then
    plimsoll_worker_restarts_total                {unit}         systemd's NRestarts
    plimsoll_worker_failed                        {unit}         1 where systemd has given it up, of celery-worker@*
    plimsoll_worker_tasks_total                   {unit}         finished by its processes, as they were seen
    plimsoll_worker_info            {unit, pool, queues, concurrency}   1: what its main process was started with
    plimsoll_guard_acts_total       {unit, act}   restart, would_restart and budget_spent of the memory guard
    plimsoll_sampler_last_sample_timestamp_seconds, plimsoll_sampler_beat_seconds   when, and how long it took
    """

    SIZES = (("memory", 0), ("memory_high", 1), ("memory_max", 2))

    def __init__(self, where: str, pss: bool = True) -> None:
        """pss: whether it is measured. Raises ImportError without prometheus_client, OSError where it cannot serve."""
        from prometheus_client import CollectorRegistry, make_wsgi_app, write_to_textfile

        self.pss = pss
        self.families: list[Any] = []
        # Tasks by unit, and of each process how many of its own are among them.
        self.done: dict[str, int] = {}
        self.counted: dict[tuple[int, float], int] = {}
        self.first = True
        # What systemd says of each unit, and when it was asked in monotonic seconds.
        self.shown: dict[str, dict[str, str]] = {}
        self.asked = float("-inf")
        # Of each main process by its command line.
        self.started: dict[tuple[int, float, str], tuple[str, str, str]] = {}
        self.guard = GuardActs(GUARD_ACTS)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self.publish: Callable[[], None] = lambda: None
        if where.startswith("/"):
            self.publish = lambda: publicly(lambda: write_to_textfile(where, registry))
        else:
            serve(where, make_wsgi_app(registry))

    def collect(self) -> list[Any]:
        """What prometheus_client asks for."""
        return self.families

    def update(self, last: Iterable[tuple[Process, int]], units: Mapping[str, Unit], now: float, took: float) -> None:
        """last is processes with their rss + swap in KiB; now in Unix seconds, took in seconds."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        names = dict(itertools.islice(((name, name) for name in sorted(units)), MOST_UNITS))
        sums: dict[tuple[str, str], list[float]] = {}
        info: dict[str, tuple[str, str, str]] = {}
        done = {name: self.done.get(name, 0) for name in names}
        counted: dict[tuple[int, float], int] = {}
        started: dict[tuple[int, float, str], tuple[str, str, str]] = {}
        for one, size in last:
            name = one.unit_name if one.unit_name.endswith(".service") else ""
            if name not in names:
                if len(names) < MOST_UNITS:
                    names[name] = name
                    done[name] = self.done.get(name, 0)
                else:
                    name = ""
            if one.pss == "" and self.pss:
                # It came since the last beat that took it.
                one.pss = pss_and_uss(one.pid)[0]
            total = sums.setdefault((name, one.role), [0, 0, 0, 0, 0])
            values = ((size - one.swap) * 1024, int(one.pss or 0) * 1024, one.swap * 1024, 1, growth(one))
            for at, value in enumerate(values):
                total[at] += value
            if one.role == "main" and name and name not in info:
                # As it was read when its command line was last seen to be another one.
                key_of = one.pid, one.start_time, one.command
                started[key_of] = self.started.get(key_of) or started_with(command_line(one.pid))
                info[name] = started[key_of]
            if one.tasks != "":
                key = one.pid, one.start_time
                counted[key] = int(one.tasks)
                # What was done before this began, is no rise.
                before = self.counted.get(key, counted[key] if self.first else 0)
                done[name] = done.get(name, 0) + max(0, counted[key] - before)
        self.done, self.counted, self.started, self.first = done, counted, started, False
        kinds = ("resident_memory_bytes", "proportional_memory_bytes", "swap_bytes", "processes")
        by_role = [
            GaugeMetricFamily(f"plimsoll_worker_{kind}", "See rss_sampler.py, Metrics", labels=["unit", "role"])
            for kind in (*kinds, "growth_bytes_per_hour")
        ]
        for labels, total in sorted(sums.items()):
            for family, value in zip(by_role, total):
                if self.pss or not family.name.endswith("proportional_memory_bytes"):
                    family.add_metric(labels, value)
        sizes = [
            (GaugeMetricFamily(f"plimsoll_worker_{kind}_bytes", "Of its cgroup", labels=["unit"]), at)
            for kind, at in self.SIZES
        ]
        events = CounterMetricFamily(
            "plimsoll_worker_memory_events", "memory.events since the unit started", labels=["unit", "event"]
        )
        pressure = CounterMetricFamily(
            "plimsoll_worker_memory_pressure_seconds", "PSI since the unit started", labels=["unit", "kind"]
        )
        level = GaugeMetricFamily(
            "plimsoll_worker_memory_level_bytes", "Without what can be taken back", labels=["unit"]
        )
        restarts = CounterMetricFamily("plimsoll_worker_restarts", "NRestarts of systemd", labels=["unit"])
        failed = GaugeMetricFamily("plimsoll_worker_failed", "Whether systemd has given it up", labels=["unit"])
        # Of those that do not run, too: a cgroup is gone with its processes.
        for name, shown in itertools.islice(sorted(self.ask().items()), MOST_UNITS):
            failed.add_metric([name], int(shown.get("ActiveState") == "failed"))
            if shown.get("NRestarts", "").isdecimal():
                restarts.add_metric([name], int(shown["NRestarts"]))
        for name in itertools.islice(sorted(units), MOST_UNITS):
            unit = units[name]
            for family, at in sizes:
                if unit.figures[at] != "":
                    family.add_metric([name], int(unit.figures[at]) * 1024)
            for at, event in enumerate(("high", "max", "oom_kill"), 4):
                if unit.figures[at] != "":
                    events.add_metric([name, event], int(unit.figures[at]))
            for at, kind in enumerate(("some", "full"), 7):
                if unit.figures[at] != "":
                    pressure.add_metric([name, kind], int(unit.figures[at]) / 1e6)
            if unit.figures[0] != "":
                level.add_metric([name], max(0, int(unit.figures[0]) * 1024 - spare(unit)))
        tasks = CounterMetricFamily("plimsoll_worker_tasks", "Tasks finished", labels=["unit"])
        for name, count in sorted(done.items()):
            tasks.add_metric([name], count)
        labels = ["unit", "pool", "queues", "concurrency"]
        described = GaugeMetricFamily("plimsoll_worker_info", "What its main process was started with", labels=labels)
        for name, values in sorted(info.items()):
            described.add_metric([name, *values], 1)
        acts = CounterMetricFamily("plimsoll_guard_acts", "Acts of the memory guard", labels=["unit", "act"])
        for name, act, count in self.guard.read():
            if name in names:
                acts.add_metric([name, act], count)
        last = GaugeMetricFamily("plimsoll_sampler_last_sample_timestamp_seconds", "Unix time", value=now)
        beat = GaugeMetricFamily("plimsoll_sampler_beat_seconds", "How long the last sample took", value=took)
        self.families = [
            *by_role,
            *(family for family, _ in sizes),
            level,
            events,
            pressure,
            restarts,
            failed,
            tasks,
            described,
            acts,
            last,
            beat,
        ]
        self.publish()

    def ask(self) -> dict[str, dict[str, str]]:
        """NRestarts and ActiveState of the workers' units, not more often than every ASK_EVERY_S."""
        if time.monotonic() - self.asked >= ASK_EVERY_S:
            self.asked, self.shown = time.monotonic(), show("NRestarts,ActiveState", [UNIT_PATTERN])
        return self.shown


def spare(unit: Unit) -> int:
    """Bytes of a unit that the kernel takes back before anything fails: memory_guard.py, observe()."""
    stat = fields(unit.read("memory.stat"))
    found = (stat.get(name, "0") for name in ("inactive_file", "active_file", "slab_reclaimable"))
    return sum(int(value) for value in found if value.isdecimal())


def started_with(argv: Sequence[str]) -> tuple[str, str, str]:
    """Pool, queues and concurrency by a worker's command line; of one option the last. No queues where it names none,
    as the application may then name them. A worker's user may write anything there: it becomes plain text, bounded."""
    found = {"pool": "prefork", "queues": "", "concurrency": ""}
    # With setproctitle, billiard has them in brackets.
    words = " ".join(argv).rstrip(")").split()
    for at, word in enumerate(words):
        option, mark, value = word.partition("=")
        if name := WORKER_OPTIONS.get(option):
            found[name] = value if mark else next(iter(words[at + 1 : at + 2]), "")
        elif word[:1] == "-" != word[1:2] and (name := WORKER_OPTIONS.get(word[:2])):
            found[name] = word[2:]
    plain = {name: PLAIN.sub("?", value) for name, value in found.items()}
    queues = ",".join(sorted(filter(None, plain["queues"].split(","))))
    if len(queues) > LONGEST_LABEL:
        queues = queues[:LONGEST_LABEL].rpartition(",")[0]
    return plain["pool"][:LONGEST_LABEL], queues, plain["concurrency"][:LONGEST_LABEL]


class GuardActs:
    """What the memory guard counts in a file: (unit, act, count). Nothing where it has none, or not that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = -1
        self.acts: list[tuple[str, str, int]] = []

    def read(self) -> list[tuple[str, str, int]]:
        try:
            changed = self.path.stat().st_mtime_ns
            if changed != self.changed:
                self.changed, self.acts = changed, []
                with self.path.open() as file:
                    units = json.loads(file.read(MOST_ACTS_BYTES))
                acts = ((unit, act, count) for unit, of_it in units.items() for act, count in of_it.items())
                self.acts = sorted((unit, act, int(count)) for unit, act, count in acts)
        except OSError:
            self.changed, self.acts = -1, []
        except (ValueError, TypeError, AttributeError):
            self.acts = []
        return self.acts


def serve(where: str, application: Any) -> None:
    """Serve at ADDRESS:PORT, one request after the other. Not prometheus_client's own server: it has a thread for each
    connection and no time limit, and so whoever connects and waits takes all threads that a unit may have.
    """
    from socketserver import TCPServer
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    host, _, port = where.rpartition(":")

    class Server(WSGIServer):
        address_family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET

        def server_bind(self) -> None:
            # HTTPServer's own asks name servers for the address, for minutes where there are none.
            TCPServer.server_bind(self)
            self.server_name, self.server_port = host, int(port)
            self.setup_environ()

        def process_request(self, request: Any, client_address: Any) -> None:
            """All of it within SCRAPE_S: whoever sends a byte now and then would hold up all others."""
            limit = threading.Timer(SCRAPE_S, hang_up, (request,))
            limit.daemon = True
            limit.start()
            try:
                super().process_request(request, client_address)
            finally:
                limit.cancel()

        def handle_error(self, *_: object) -> None:
            """Whoever hung up is none of ours."""

    class Handler(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            """Not each scrape is worth a line."""

    server = make_server(host.strip("[]"), int(port), application, Server, Handler)

    def serving() -> None:
        while True:
            server.handle_request()

    threading.Thread(target=serving, daemon=True).start()


def hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def publicly(write: Callable[[], object]) -> None:
    """Write a file that others may read: node_exporter is another user."""
    before = os.umask(0o022)
    try:
        write()
    finally:
        os.umask(before)


def growth(one: Process) -> float:
    """Bytes an hour from the first to the last of its ten-minute floors; 0 before there is an hour of them."""
    if len(one.floors) < GROWTH_SPANS:
        return 0.0
    (began, low), (ended, high) = one.floors[0], one.floors[-1]
    return (high - low) * 1024 * HOUR / max(1.0, ended - began)


# ---- the service ----


def notify(state: str) -> None:
    """Tell systemd, as sd_notify(3) does; without systemd nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


class Sampler:
    """Watcher, rollup and store together; beat() is one round."""

    def __init__(
        self, watcher: Watcher, store: Store | Stdout, detail_every: int, metrics: Metrics | None = None
    ) -> None:
        self.watcher, self.store, self.detail_every, self.metrics = watcher, store, detail_every, metrics
        self.rollup = watcher.rollup
        self.beats = self.taken = 0
        self.last = 0.0

    def beat(self, now: float) -> int:
        """Sample once; how many processes were there. Raises OSError for all but a full disk."""
        began = time.monotonic()
        detail = self.beats % self.detail_every == 0
        self.beats += 1
        if self.rollup.turned(now):
            self._roll_up()
        self.rollup.begin(now)
        self.watcher.find(again=detail)
        lines = self.watcher.sample(now, detail)
        self.last = now
        self.store.append("samples", now, lines)
        self.taken += len(lines)
        self.store.append("cgroup", now, self.watcher.unit_lines(now, detail))
        if self.metrics:
            took = time.monotonic() - began
            try:
                self.metrics.update(self.watcher.last(), self.watcher.units, now, took)
                _said.discard("metrics")
            except OSError as error:
                say_once("metrics", f"{error.filename or '--metrics'}: {error.strerror}; metrics are not written")
        return len(lines)

    def close(self) -> None:
        try:
            self._roll_up()
        finally:
            self.store.close()

    def _roll_up(self) -> None:
        self.store.append("rollup", self.rollup.start, self.rollup.lines())
        self.store.append("units", self.rollup.start, self.watcher.unit_lines(self.last, detail=True))


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


def place(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not text.startswith("/") and not (host and port.isdigit() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"'{text}' is neither ADDRESS:PORT nor the absolute path of a file")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rss_sampler", description="Samples the memory of this host's Celery workers into CSV."
    )
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, help="write segments and rollups there; default: samples to stdout")
    add("--interval", metavar="SECONDS", type=seconds, default=60.0, help="default: 60")
    add("--once", action="store_true", help="take one sample and end")
    add("--match", metavar="REGEX", type=pattern, help="watch processes whose command line matches, too")
    add("--plain", action="store_true", help=f"the columns {PLAIN_COLUMNS} alone")
    add("--detail-every", metavar="N", type=count, default=10, help="PSS, descriptors, ... every N intervals: 10")
    add("--no-pss", action="store_true", help="leave PSS and USS out; they need CAP_SYS_PTRACE, and cost the most")
    add("--keep-mb", metavar="MB", type=count, default=512, help="size of all files together; default: 512")
    add("--keep-days", metavar="DAYS", type=seconds, default=30.0, help="age of the oldest file; default: 30")
    add("--metrics", metavar="WHERE", type=place, help="ADDRESS:PORT, or FILE.prom for node_exporter")
    options = parser.parse_args(arguments)

    # A few files are held for each process and unit.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Blocked and waited for: no signal comes in the middle of a write.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    where = options.output or "stdout"
    try:
        store: Store | Stdout = Stdout(options.plain)
        if options.output:
            store = Store(options.output, options.keep_mb << 20, options.keep_days * DAY, options.plain)
        metrics = Metrics(options.metrics, not options.no_pss) if options.metrics else None
    except BlockingIOError:
        say(f"another sampler writes to {where}; stop it, or name another --output", "refused", 3)
        return 1
    except ImportError:
        say("--metrics needs prometheus_client: apt install python3-prometheus-client, or pip", "refused", 3)
        return 1
    except OSError as error:
        what = f"--metrics={options.metrics}" if options.metrics and not error.filename else where
        say(f"{what}: {error.strerror}; name another place", "refused", 3)
        return 1
    sampler = Sampler(Watcher(options.match, not options.no_pss, options.plain), store, options.detail_every, metrics)
    watched = sys.stderr.isatty() and (options.output is not None or not sys.stdout.isatty())
    beat = progress(sampler) if watched else sampler.beat
    try:
        with contextlib.closing(sampler):
            if options.once:
                beat(time.time())
            else:
                run(beat, options.interval, stop)
    except BrokenPipeError:  # whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        say(f"{error.filename or where}: {error.strerror}", "failed", 3)
        return 1
    if watched:
        print(file=sys.stderr)
    if watched or options.once:
        found = len(sampler.watcher.known)
        say(f"{sampler.taken} lines to {where}; {found} processes in the last sample{'' if found else NONE_FOUND}")
    return 0


def progress(sampler: Sampler) -> Callable[[float], int]:
    """A beat that says on the terminal what there is, on one line that it writes over."""

    def beat(now: float) -> int:
        found = sampler.beat(now)
        size = sum(size for _, size in sampler.watcher.last()) // 1024
        text = f"{time.strftime('%H:%M:%S')}  sample {sampler.beats}: {found} processes, {size} MiB; Ctrl-C ends"
        # Over what was there, and the rest of that line cleared.
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        return found

    return beat


if __name__ == "__main__":
    sys.exit(main())
