"""What is known of one host, in bounded memory: samples of its processes, figures of its units, trace records.

Of a host that sends more than is held, samples are put together to floors, and the oldest figures and records are left
out. What is held in the end does not depend on the order in which it came.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Trace = dict[str, Any]

# Samples of one host, 32 bytes each; 300 processes a minute take nine days to make so many.
MOST_ROWS = 4_000_000
# Sorting costs: it waits for so many times as much as is held.
SLACK = 1.25
# The stretches of time that samples are put together in begin here, seconds, and are doubled until all fit.
SHORTEST_S = 60.0
# A host that lies could name a new process in every line. The rows of so many always fit: a first, a last and a floor.
MOST_PROCESSES = 200_000
# Samples that a row may stand for: a tenth of a second apart in the ten minutes of a rollup.
MOST_COUNTED = 6000
# Figures of units, 72 bytes each; 50 units a minute take two weeks to make so many.
MOST_FIGURES = 1_000_000
# Lines of trace records. Of one unit, the bootstrap keeps 16 MiB.
MOST_TRACE_BYTES = 64 << 20
# So much is held of what happened to a unit; so far apart is what the kernel says of one kill, seconds.
MOST_INCIDENTS, KILL_S = 3, 10
# A clock that was not set yet, or wrong for a while, leaves so long a gap between its samples and the others, seconds.
GAP_S = 30 * 86400.0
# What lies on its own side of such a gap is worth being judged from this share of all samples on.
LEAST_SHARE = 0.01
# Before its own start no process was seen; a clock that was set by less than this is no matter, seconds.
BEFORE_START_S = 86400.0
# Celery's processes as setproctitle has them: [celeryd: NODE:MainProcess] -active- (worker ...), or
# [celeryd: NODE:ForkPoolWorker-3]. Without it the command line is the same for all processes of a worker.
_TITLE = re.compile(r"\[celeryd: (.+?):[A-Z]\w*(?:-[\d:]+)?\]")

# A process that the kernel killed, in the line that names its unit and in the one that does not.
_VICTIM, _KILLED = re.compile(r"\bpid=(\d+)"), re.compile(r"Killed process (\d+)")


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


# What a figure is in columns: all but the unit.
FIGURES = tuple(name for name in CgroupSample._fields if name != "unit")


class Seen(NamedTuple):
    """What samples say of their process."""

    pid: int
    start_time: float | None
    unit: str
    command: str
    role: str

    @property
    def worker(self) -> str:
        """The unit; without one the node of Celery that the process names, its command line, or at least its pid."""
        if self.unit:
            return self.unit
        title = _TITLE.match(self.command)
        return title[1] if title else self.command or f"pid {self.pid}"


class Process(NamedTuple):
    """A process; worker and role are as of its newest sample.

    who tells it from others of its pid and start time: its unit or, where neither that nor the start is known, its
    worker.
    """

    who: str
    pid: int
    start_time: float | None
    worker: str
    role: str


class Rows(NamedTuple):
    """Samples in columns: process is a number, times are Unix seconds, sizes KiB of rss + swap, tasks NaN if not known.

    counts is how many samples each row was put together from: the smallest one of them.
    """

    process: NDArray[np.uint32]
    times: Floats
    sizes: Floats
    tasks: Floats
    counts: NDArray[np.uint32]

    def at(self, chosen: Any) -> Rows:
        return Rows(*(column[chosen] for column in self))


class Samples:
    """The samples of one host, of which MOST_ROWS are held.

    Where there are more, those of a process in a stretch of time are put together to their floor: the smallest one, the
    earliest of several. The first and the last sample of a process stay, as they tell how long it lived.

    The order in which samples come changes nothing. A floor of floors is the floor of all, as each stretch is half of
    one that is twice as long. And stretches are made longer only where the floors of what has come so far do not fit;
    more samples never have fewer floors, so that the length is in the end the shortest one at which those of all fit.
    Two things are not held to that: counts, where samples are there twice and were put together in between; and the
    length, where processes were left out, which may have had their part in it.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int, float | None], int] = {}
        self._newest: list[tuple[float, str, str]] = []
        self._hold([])
        self._stretch = 0.0
        self._notes: set[str] = set()

    def __len__(self) -> int:
        """How many rows are held."""
        return self._held

    def _hold(self, parts: list[Rows]) -> None:
        self._parts, self._held = parts, sum(len(part.times) for part in parts)

    def add(
        self,
        seen: Sequence[Seen],
        of: NDArray[np.intp],
        times: Floats,
        sizes: Floats,
        tasks: Floats,
        counts: NDArray[Any] | None = None,
    ) -> None:
        """Takes in samples: of each its place in seen, and as in Rows. counts: without them each is one sample."""
        if not len(times):
            return
        newest = np.zeros(len(seen))
        np.maximum.at(newest, of, times)
        numbers = np.array(list(map(self._number, seen, newest.tolist())), dtype=np.uint32)
        each = np.ones(len(times)) if counts is None else np.clip(counts, 1, MOST_COUNTED)
        rows = Rows(numbers[of], times, sizes, tasks, each.astype(np.uint32))
        if self._stretch:
            rows = _floors(_in_order([rows]), self._stretch)
        self._parts.append(rows)
        self._held += len(rows.times)
        if len(self._numbers) > SLACK * MOST_PROCESSES:
            self._leave_out_processes()
        if self._held > SLACK * MOST_ROWS:
            self._fit()

    def _number(self, one: Seen, when: float) -> int:
        who = one.unit or ("" if one.start_time is not None else one.worker)
        number = self._numbers.setdefault((who, one.pid, one.start_time), len(self._numbers))
        said = (when, one.worker, one.role)
        if number == len(self._newest):
            self._newest.append(said)
        elif said > self._newest[number]:
            self._newest[number] = said
        return number

    def _leave_out_processes(self) -> None:
        """Keeps those that started last. One that was left out and comes again is left out again, for the same ones."""
        self._notes.add(f"more than {MOST_PROCESSES} processes: those that started first are left out")
        kept = sorted(self._numbers, key=lambda one: (one[2] or 0.0, one[1], one[0]))[-MOST_PROCESSES:]
        numbers = [self._numbers[one] for one in kept]
        renumbered = np.full(len(self._numbers), len(kept), dtype=np.uint32)
        renumbered[numbers] = np.arange(len(kept))
        self._newest = [self._newest[number] for number in numbers]
        self._numbers = {one: number for number, one in enumerate(kept)}
        parts = (part._replace(process=renumbered[part.process]) for part in self._parts)
        self._hold([part.at(part.process < len(kept)) for part in parts])

    def _fit(self) -> None:
        """One part, in order, of no more than MOST_ROWS."""
        rows = _in_order(self._parts)
        # What they were made of must not be held beside them.
        self._hold([rows])
        if self._stretch:
            rows = _floors(rows, self._stretch)
        while len(rows.times) > MOST_ROWS:
            self._stretch = 2 * self._stretch or SHORTEST_S
            rows = _floors(rows, self._stretch)
        self._hold([rows])

    def settle(self) -> list[str]:
        """To be called once, when all has come. Returns what was left out, a sentence each."""
        if len(self._numbers) > MOST_PROCESSES:
            self._leave_out_processes()
        if self._parts:
            self._fit()
            began = np.array([np.nan if start is None else start for _, _, start in self._numbers])
            self._hold([self._at_sound_times(self._parts[0], began)])
        notes, self._notes = sorted(self._notes), set()
        return notes

    def _at_sound_times(self, rows: Rows, began: Floats) -> Rows:
        """Without what a clock that was wrong has dated. rows are in order; began is of each process."""
        edges = _edges(rows.process)
        early = rows.times < began[rows.process] - BEFORE_START_S
        # Where all of them are, it is the start that is wrong.
        early &= ~np.repeat(early[edges[1:] - 1], np.diff(edges))
        if early.any():
            self._say(rows.at(early), "a day or more before their process began")
            rows = rows.at(~early)
        ordered = np.sort(rows.times)
        gaps = np.flatnonzero(np.diff(ordered) > GAP_S)
        if len(gaps):
            side = np.searchsorted(ordered[gaps + 1], rows.times, side="right")
            shares = np.bincount(side, rows.counts) / rows.counts.sum()
            # The newest one, but for a clock that went ahead for a while; of none but small ones the largest.
            kept = side == max(range(len(shares)), key=lambda one: (min(shares[one], LEAST_SHARE), one))
            self._say(rows.at(~kept), f"more than {GAP_S / 86400:.0f} days apart from the others")
            rows = rows.at(kept)
        return rows

    def _say(self, rows: Rows, why: str) -> None:
        ends = rows.times.min(), rows.times.max()
        days = " to ".join(f"{datetime.fromtimestamp(when, timezone.utc):%Y-%m-%d}" for when in ends)
        many = "1 sample was" if rows.counts.sum() == 1 else f"{rows.counts.sum()} samples were"
        self._notes.add(f"{many} left out, of {days}: {why}, as of a clock that was wrong")

    def lives(self) -> Iterator[tuple[Process, Rows]]:
        """Each process with its samples, ascending by time, each time once; after settle."""
        known = list(self._numbers)
        for rows in self._parts:
            for start, end in pairwise(_edges(rows.process)):
                number = rows.process[start]
                (who, pid, began), (_, worker, role) = known[number], self._newest[number]
                yield Process(who, pid, began, worker, role), rows.at(slice(start, end))


def _edges(values: NDArray[Any]) -> NDArray[np.intp]:
    """Where runs of one value begin, and where the last one ends."""
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]]))


def _in_order(parts: Sequence[Rows]) -> Rows:
    """By process and time; of samples that are there twice, one."""
    order = np.lexsort([np.concatenate(column) for column in zip(*((part.times, part.process) for part in parts))])
    # A column at a time: they are large.
    rows = Rows(*(np.concatenate(column)[order] for column in zip(*parts)))
    twice = (np.diff(rows.times) == 0) & (np.diff(rows.process) == 0)
    if not twice.any():
        return rows
    # Should they differ, it must not matter which was first.
    rows = rows.at(np.lexsort((rows.tasks, rows.sizes, rows.times, rows.process)))
    first = np.flatnonzero(np.concatenate([[True], ~twice]))
    return rows.at(first)._replace(counts=np.maximum.reduceat(rows.counts, first))


def _floors(rows: Rows, stretch: float) -> Rows:
    """The smallest sample of each process in each stretch of so many seconds, and its first and last; rows in order."""
    edges = _edges(rows.process)
    begins = np.zeros(len(rows.times) + 1, dtype=bool)
    begins[np.flatnonzero(np.diff(np.floor(rows.times / stretch))) + 1] = True
    begins[edges] = begins[edges[:-1] + 1] = begins[edges[1:] - 1] = True
    starts, stretches = np.flatnonzero(begins[:-1]), np.cumsum(begins[:-1]) - 1
    smallest = np.flatnonzero(rows.sizes == np.minimum.reduceat(rows.sizes, starts)[stretches])
    earliest = smallest[_edges(stretches[smallest])[:-1]]
    return rows.at(earliest)._replace(counts=np.add.reduceat(rows.counts, starts, dtype=np.uint32))


class Figures:
    """The figures of one host's units, of which the newest MOST_FIGURES are held, whatever the order they came in."""

    def __init__(self) -> None:
        self._units: dict[str, int] = {}
        self._parts: list[tuple[NDArray[np.intp], Floats]] = []
        self._held = 0
        self._from = -np.inf

    def add(self, units: Sequence[str], of: NDArray[np.intp], values: Floats) -> None:
        """Takes in figures: of each its place in units, and a row of FIGURES, NaN for none."""
        if not len(values):
            return
        numbers = np.array([self._units.setdefault(unit, len(self._units)) for unit in units], dtype=np.intp)
        self._parts.append((numbers[of], values))
        self._held += len(values)
        if self._held > SLACK * MOST_FIGURES:
            self._fit()

    def _fit(self) -> None:
        numbers, values = (np.concatenate(columns) for columns in zip(*self._parts))
        self._from = max(self._from, _newest(values[:, 0], np.ones(len(values)), MOST_FIGURES))
        kept = values[:, 0] > self._from
        units = list(self._units)
        used, numbers = np.unique(numbers[kept], return_inverse=True)
        self._units = {units[number]: at for at, number in enumerate(used)}
        self._parts = [(numbers, values[kept])]
        self._held = len(numbers)

    def settle(self) -> list[str]:
        """To be called once, when all has come. Returns what was left out, a sentence each."""
        if self._parts:
            self._fit()
        return [f"more than {MOST_FIGURES} figures of units: the oldest are left out"] if self._from > -np.inf else []

    def by_unit(self, wanted: Container[str]) -> dict[str, dict[str, Floats]]:
        """Those of the wanted units that there are to FIGURES in columns, by time, each time once; after settle."""
        found = {}
        units = list(self._units)
        for numbers, values in self._parts:
            order = np.lexsort((values[:, 0], numbers))
            for start, end in pairwise(_edges(numbers[order])):
                unit = units[numbers[order[start]]]
                if unit in wanted:
                    rows = values[order[start:end]]
                    # Should one be there twice and differ, it must not matter which was first.
                    rows = rows[np.lexsort(rows.T[::-1])]
                    found[unit] = dict(zip(FIGURES, rows[np.diff(rows[:, 0], prepend=-1) > 0].T))
        return found


class Records:
    """The trace records of one host: the newest MOST_TRACE_BYTES of lines, each once, whatever order they came in."""

    def __init__(self) -> None:
        self._lines: dict[str, float] = {}
        self._held = 0
        self._from = -np.inf

    def add(self, time: float, line: str) -> None:
        """Takes in a record of this time, as it was written."""
        if line in self._lines:
            return
        self._lines[line] = time
        self._held += len(line)
        if self._held > 2 * MOST_TRACE_BYTES:
            self._fit()

    def _fit(self) -> None:
        times, sizes = np.array(list(self._lines.values())), np.array([len(line) for line in self._lines])
        self._from = max(self._from, _newest(times, sizes, MOST_TRACE_BYTES))
        self._lines = {line: time for line, time in self._lines.items() if time > self._from}
        self._held = sum(map(len, self._lines))

    def settle(self) -> list[str]:
        """To be called once, when all has come. Returns what was left out, a sentence each."""
        if self._lines:
            self._fit()
        much = f"more than {MOST_TRACE_BYTES >> 20} MiB of trace records"
        return [f"{much}: the oldest are left out"] if self._from > -np.inf else []

    def by_time(self) -> list[Trace]:
        """All that are held; after settle."""
        return [json.loads(line) for line, _ in sorted(self._lines.items(), key=lambda one: (one[1], one[0]))]


def _newest(times: Floats, weights: NDArray[Any], most: int) -> float:
    """The time up to which things are left out, so that those after it weigh no more than most: all of one time go.

    What was left out by it once would be again with more of them, so that their order changes nothing.
    """
    order = np.argsort(times)[::-1]
    over = np.flatnonzero(np.cumsum(weights[order]) > most)
    return float(times[order[over[0]]]) if len(over) else -np.inf


class Incident(NamedTuple):
    """What happened to a unit, so many times; time, in Unix seconds, and message are of the last one.

    source is systemd, kernel, worker or guard.
    """

    time: float
    unit: str
    source: str
    message: str
    times: int = 1


def incidents(told: Iterable[Incident]) -> list[Incident]:
    """Of each unit the newest few, the newest first; its own errors only where there is nothing else.

    The newest of each source goes before a second one of any: systemd says several things of each end, and would leave
    no room for the kernel and the guard. The kernel names the unit in one line, and whom it killed in the next one,
    which stands for both.
    """
    units: dict[str, list[Incident]] = defaultdict(list)
    kills: dict[tuple[str, int], Incident] = {}
    for one in sorted(told, key=_newest_first):
        if one.unit:
            units[one.unit].append(one)
        elif killed := _KILLED.search(one.message):
            kills[killed[1], int(one.time // KILL_S)] = one
    found = []
    for of_unit in units.values():
        said = [one for one in of_unit if one.source != "worker"] or of_unit
        turns: dict[str, Iterator[int]] = defaultdict(count)
        in_turn = sorted(said, key=lambda one: next(turns[one.source]))
        found += [_whole(one, kills) for one in in_turn[:MOST_INCIDENTS]]
    return sorted(found, key=_newest_first)


def _whole(one: Incident, kills: Mapping[tuple[str, int], Incident]) -> Incident:
    """With what the kernel said next of the process that it names; kills by pid and tens of seconds."""
    victim = _VICTIM.search(one.message) if one.source == "kernel" else None
    if victim is None:
        return one
    for ahead in (0, 1):
        kill = kills.get((victim[1], int(one.time // KILL_S) + ahead))
        if kill and 0 <= kill.time - one.time < KILL_S:
            return one._replace(message=kill.message)
    return one


def _newest_first(one: Incident) -> tuple[float, str, str]:
    return -one.time, one.source, one.message


class HostData:
    """All that is known of one host. problems say what of its files was left out, and why, a line each.

    It is made of rows, or empty and filled by formats.read_host.
    """

    def __init__(
        self,
        host: str,
        samples: Sequence[Sample] = (),
        cgroups: Sequence[CgroupSample] = (),
        traces: Iterable[Trace] = (),
        problems: Iterable[str] = (),
        incidents: Iterable[Incident] = (),
    ) -> None:
        self.host = host
        self.samples, self.cgroups, self.traces, self.problems = Samples(), Figures(), list(traces), list(problems)
        self.incidents = list(incidents)
        self.samples.add(
            [Seen(one.pid, one.start_time, one.unit, one.command, one.role) for one in samples],
            np.arange(len(samples)),
            _floats(one.timestamp for one in samples),
            _floats(one.rss_kb + (one.swap_kb or 0) for one in samples),
            _floats(one.tasks for one in samples),
        )
        self.cgroups.add(
            [one.unit for one in cgroups],
            np.arange(len(cgroups)),
            _floats(getattr(one, name) for one in cgroups for name in FIGURES).reshape(-1, len(FIGURES)),
        )
        self.settle()

    def settle(self) -> None:
        """To be called when all has come."""
        self.problems += [*self.samples.settle(), *self.cgroups.settle()]


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
