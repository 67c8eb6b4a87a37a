"""Samples put together to what is judged: a worker, and the generations of its processes.

A worker is one systemd unit on one host. A generation is the life of one of its processes, told by (pid, start time): a
child that Celery replaced and a main process that systemd restarted begin a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .samples import Floats as Floats
from .samples import HostData, Process, Rows

# A rollup is of so many seconds, aligned, and its time is their middle.
ROLLUP_S = 600.0


@dataclass(frozen=True)
class Generation:
    """One process. times in Unix seconds, ascending, each once; sizes in KiB of rss + swap.

    tasks is how many it had finished by then, NaN where that is not known. counts is of how many samples each size is
    the smallest: of rollups, and of a long series, only floors are here. whole is how many samples a rollup of all its
    ten minutes has; 0 where no rollup is here.
    """

    pid: int
    start_time: float | None
    role: str
    times: Floats
    sizes: Floats
    tasks: Floats
    counts: NDArray[np.uint32]
    whole: int = 0

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def rolled(self) -> NDArray[np.bool_]:
        """Which sizes are of a rollup."""
        return _middles(self.times) if self.whole else np.zeros(len(self.times), dtype=bool)

    @cached_property
    def interval(self) -> float:
        """Seconds from sample to sample; 0 of a single one."""
        if self.whole:
            return ROLLUP_S / self.whole
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0

    @cached_property
    def begin(self) -> float:
        """When it was first seen; a rollup has as many samples as the process was there for."""
        first = float(self.times[0])
        if not self.rolled[0]:
            return first
        if self.start_time is not None and abs(self.start_time - first) <= ROLLUP_S / 2:
            return self.start_time
        return first + ROLLUP_S / 2 - int(self.counts[0]) * self.interval

    @cached_property
    def end(self) -> float:
        """When it was last seen."""
        last = float(self.times[-1])
        if not self.rolled[-1]:
            return last
        since = self.begin if len(self.times) == 1 else last - ROLLUP_S / 2
        return min(since + int(self.counts[-1]) * self.interval, last + ROLLUP_S / 2)

    @property
    def lived(self) -> float:
        """Seconds from when it was first seen to when it was last."""
        return self.end - self.begin


def _middles(times: Floats) -> NDArray[np.bool_]:
    """Which times of a process are the middle of ten minutes, and alone in them, as those of its rollups are."""
    middle = np.asarray(times % ROLLUP_S == ROLLUP_S / 2)
    if middle.any():
        apart = np.diff(times, prepend=-np.inf, append=np.inf) >= ROLLUP_S / 2
        middle &= apart[:-1] & apart[1:]
    return middle


@dataclass(frozen=True)
class Limits:
    """What systemd allows the unit, and where it stands: KiB, None for no limit or not measured. Events are sums.

    level is the median of the cgroup's last figures, times and levels their whole course. restarted and killed are when
    a restart by systemd and an OOM kill were first seen.
    """

    high_kb: int | None = None
    max_kb: int | None = None
    level_kb: float | None = None
    events_high: int = 0
    oom_kills: int = 0
    restarts: int = 0
    times: Floats = field(default_factory=lambda: np.empty(0))
    levels: Floats = field(default_factory=lambda: np.empty(0))
    restarted: Floats = field(default_factory=lambda: np.empty(0))
    killed: Floats = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Worker:
    """unit is the name of the unit; where samples name none, the name of Celery's node, or the command line."""

    host: str
    unit: str
    generations: tuple[Generation, ...]
    limits: Limits

    @property
    def samples(self) -> int:
        return sum(one.samples for one in self.generations)

    @property
    def span_hours(self) -> float:
        """From the first sample to the last one."""
        times = [one.times for one in self.generations]
        return float(max(each[-1] for each in times) - min(each[0] for each in times)) / 3600


# The median of so many last figures is where a cgroup stands: one of them may be a task's spike.
LAST_FIGURES = 5
# Without a start time, a pid that came again shows by its size alone; in a container each start gives the same pids. It
# is another process where its size falls to less than this share
FALL = 0.5
# after it was not seen for so many of its usual intervals,
PAUSE = 5.0
# or after so many samples that were all so high, which is longer than most tasks hold memory, and falls to where it
# began, but for a factor: a process that gives memory back still has what it imported.
HELD, BEGAN = 12, 1.2


def workers_of(data: HostData) -> list[Worker]:
    """The workers of one host, by unit."""
    units: dict[str, list[Generation]] = {}
    processes = list(_joined(data.samples.lives()))
    # One of a slow sampler's samples may be, too; but of rollups some are of more than one sample.
    whole = max((int(rows.counts[_middles(rows.times)].max(initial=0)) for _, rows in processes), default=0)
    for process, rows in processes:
        units.setdefault(process.worker, []).extend(_generations(process, rows, whole if whole > 1 else 0))
    limits = {unit: _limits(figures) for unit, figures in data.cgroups.by_unit(units).items()}
    return [
        Worker(data.host, unit, tuple(sorted(lives, key=_order)), limits.get(unit, Limits()))
        for unit, lives in sorted(units.items())
    ]


def _order(one: Generation) -> tuple[float, int, float]:
    return float(one.times[0]), one.pid, one.start_time or 0.0


def _joined(lives: Iterable[tuple[Process, Rows]]) -> Iterator[tuple[Process, Rows]]:
    """The samples of each process, where a clock that was set gave one of them several start times.

    Whoever had the pid later started after the last sample of who had it before; who did not is the same one. A sampler
    that is started again in the middle of ten minutes has two rollups of them.
    """
    pids: dict[tuple[str, int], list[tuple[Process, Rows]]] = {}
    for process, rows in lives:
        pids.setdefault((process.who, process.pid), []).append((process, rows))
    for found in pids.values():
        found.sort(key=lambda one: (one[1].times[0], one[1].times[-1], one[0].start_time or 0.0))
        same: list[tuple[Process, Rows]] = []
        for process, rows in found:
            began, first, end = process.start_time, rows.times[0], same[-1][1].times[-1] if same else 0.0
            if end == first and first % ROLLUP_S == ROLLUP_S / 2:
                end -= ROLLUP_S / 2
            if same and (began is None or not began <= end < first):
                yield _one(same)
                same = []
            same.append((process, rows))
        yield _one(same)


def _one(same: Sequence[tuple[Process, Rows]]) -> tuple[Process, Rows]:
    """One process of its parts: it began as the first one says, and is what the last one says."""
    if len(same) == 1:
        return same[0]
    rows = Rows(*map(np.concatenate, zip(*(rows for _, rows in same))))
    first = np.flatnonzero(np.diff(rows.times, prepend=-np.inf))
    if len(first) < len(rows.times):
        last = np.append(first[1:], len(rows.times)) - 1
        smallest, counts = np.minimum.reduceat(rows.sizes, first), np.add.reduceat(rows.counts, first, dtype=np.uint32)
        rows = rows.at(last)._replace(sizes=smallest, counts=counts)
    return same[-1][0]._replace(start_time=same[0][0].start_time), rows


def _generations(process: Process, rows: Rows, whole: int) -> Iterator[Generation]:
    begins = _begins(rows.times, rows.sizes) if process.start_time is None else []
    for start, end in pairwise([0, *begins, len(rows.times)]):
        _, times, sizes, tasks, counts = rows.at(slice(start, end))
        most = whole if _middles(times).any() else 0
        yield Generation(process.pid, process.start_time, process.role, times, sizes, tasks, counts, most)


def _begins(times: Floats, sizes: Floats) -> list[int]:
    """Where, behind its first sample, a pid became another process's."""
    falls = np.flatnonzero(sizes[1:] < FALL * sizes[:-1]) + 1
    if not len(falls):
        return []
    begins, start = [], 0
    longest = PAUSE * float(np.median(np.diff(times)))
    for at in falls.tolist():
        paused = times[at] - times[at - 1] > longest
        held = at - start >= HELD and sizes[at] < FALL * sizes[at - HELD : at].min()
        if paused or (held and sizes[at] <= BEGAN * sizes[start : start + HELD].min()):
            begins.append(at)
            start = at
    return begins


def _limits(figures: Mapping[str, Floats]) -> Limits:
    measured = ~np.isnan(figures["memory_current_kb"])
    levels = figures["memory_current_kb"][measured]
    return Limits(
        high_kb=_last(figures["memory_high_kb"]),
        max_kb=_last(figures["memory_max_kb"]),
        level_kb=float(np.median(levels[-LAST_FIGURES:])) if len(levels) else None,
        events_high=_total(figures["events_high"]),
        oom_kills=_total(figures["oom_kill"]),
        restarts=_total(figures["n_restarts"]),
        times=figures["timestamp"][measured],
        levels=levels,
        restarted=_when(figures["timestamp"], figures["n_restarts"]),
        killed=_when(figures["timestamp"], figures["oom_kill"]),
    )


def _last(values: Floats) -> int | None:
    return None if np.isnan(values[-1]) else int(values[-1])


def _total(counts: Floats) -> int:
    """How often something happened while it was watched."""
    return int(_added(counts[~np.isnan(counts)]).sum())


def _when(times: Floats, counts: Floats) -> Floats:
    """When it was first seen that something had happened once more."""
    known = ~np.isnan(counts)
    return times[known][1:][_added(counts[known]) > 0]


def _added(known: Floats) -> Floats:
    """From each count to the next: a counter that fell has begun anew."""
    added = np.diff(known)
    return np.where(added >= 0, added, known[1:])
