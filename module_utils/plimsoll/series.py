"""Samples put together to what is judged: a worker, and the generations of its processes.

A worker is one systemd unit on one host. A generation is the life of one of its processes, told by (pid, start time): a
child that Celery replaced and a main process that systemd restarted begin a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .samples import Floats as Floats
from .samples import HostData, Process, Rows


@dataclass(frozen=True)
class Generation:
    """One process. times in Unix seconds, ascending, each once; sizes in KiB of rss + swap.

    tasks is how many it had finished by then, NaN where that is not known. samples is how many were taken of it: of a
    long series only floors are here.
    """

    pid: int
    start_time: float | None
    role: str
    times: Floats
    sizes: Floats
    tasks: Floats
    samples: int


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
    for process, rows in _joined(data.samples.lives()):
        units.setdefault(process.worker, []).extend(_generations(process, rows))
    limits = {unit: _limits(figures) for unit, figures in data.cgroups.by_unit(units).items()}
    return [
        Worker(data.host, unit, tuple(sorted(lives, key=_order)), limits.get(unit, Limits()))
        for unit, lives in sorted(units.items())
    ]


def _order(one: Generation) -> tuple[float, int, float]:
    return float(one.times[0]), one.pid, one.start_time or 0.0


def _joined(lives: Iterable[tuple[Process, Rows]]) -> Iterator[tuple[Process, Rows]]:
    """The samples of each process, where a clock that was set gave one of them several start times.

    Whoever had the pid later started after the last sample of who had it before; who did not is the same one.
    """
    pids: dict[tuple[str, int], list[tuple[Process, Rows]]] = {}
    for process, rows in lives:
        pids.setdefault((process.who, process.pid), []).append((process, rows))
    for found in pids.values():
        found.sort(key=lambda one: (one[1].times[0], one[1].times[-1], one[0].start_time or 0.0))
        same: list[tuple[Process, Rows]] = []
        for process, rows in found:
            began, end = process.start_time, same[-1][1].times[-1] if same else 0.0
            if same and (began is None or not began <= end < rows.times[0]):
                yield _one(same)
                same = []
            same.append((process, rows))
        yield _one(same)


def _one(same: Sequence[tuple[Process, Rows]]) -> tuple[Process, Rows]:
    """One process of its parts: it began as the first one says, and is what the last one says."""
    if len(same) == 1:
        return same[0]
    columns = zip(*(rows for _, rows in same))
    return same[-1][0]._replace(start_time=same[0][0].start_time), Rows(*map(np.concatenate, columns))


def _generations(process: Process, rows: Rows) -> Iterator[Generation]:
    begins = _begins(rows.times, rows.sizes) if process.start_time is None else []
    for start, end in pairwise([0, *begins, len(rows.times)]):
        _, times, sizes, tasks, counts = rows.at(slice(start, end))
        yield Generation(process.pid, process.start_time, process.role, times, sizes, tasks, int(counts.sum()))


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
