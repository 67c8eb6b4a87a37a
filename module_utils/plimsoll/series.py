"""Samples put together to what is judged: a worker, and the generations of its processes.

A worker is one systemd unit on one host. A generation is the life of one of its processes, told by (pid, start time): a
child that Celery replaced and a main process that systemd restarted begin a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .formats import CgroupSample, HostData, Sample

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Generation:
    """One process. times in Unix seconds, ascending, each once; sizes in KiB of rss + swap.

    tasks is how many it had finished by then, NaN where that is not known.
    """

    pid: int
    start_time: float | None
    role: str
    times: Floats
    sizes: Floats
    tasks: Floats


@dataclass(frozen=True)
class Limits:
    """What systemd allows the unit, and where it stands: KiB, None for no limit or not measured. Events are sums.

    level is the median of the cgroup's last figures, times and levels their whole course.
    """

    high_kb: int | None = None
    max_kb: int | None = None
    level_kb: float | None = None
    events_high: int = 0
    oom_kills: int = 0
    restarts: int = 0
    times: Floats = field(default_factory=lambda: np.empty(0))
    levels: Floats = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Worker:
    """unit is the name of the unit, or the command line where samples name no unit."""

    host: str
    unit: str
    generations: tuple[Generation, ...]
    limits: Limits

    @property
    def samples(self) -> int:
        return sum(len(one.times) for one in self.generations)

    @property
    def span_hours(self) -> float:
        """From the first sample to the last one."""
        times = [one.times for one in self.generations]
        return float(max(each[-1] for each in times) - min(each[0] for each in times)) / 3600


# The median of so many last figures is where a cgroup stands: one of them may be a task's spike.
LAST_FIGURES = 5


def workers_of(data: HostData) -> list[Worker]:
    """The workers of one host, by unit."""
    processes: dict[tuple[str, int, float | None], list[Sample]] = {}
    for one in data.samples:
        # Without the start time, another command is all that tells a pid which came again.
        who = one.unit or (one.command if one.start_time is None else "")
        processes.setdefault((who, one.pid, one.start_time), []).append(one)
    units: dict[str, list[Generation]] = {}
    for rows in _joined(processes):
        newest = max(rows, key=lambda row: row.timestamp)
        units.setdefault(newest.unit or newest.command, []).append(_generation(rows))
    cgroups: dict[str, list[CgroupSample]] = {}
    for figure in data.cgroups:
        cgroups.setdefault(figure.unit, []).append(figure)
    return [
        Worker(data.host, unit, tuple(sorted(lives, key=lambda one: one.times[0])), _limits(cgroups.get(unit, [])))
        for unit, lives in sorted(units.items())
    ]


def _joined(processes: Mapping[tuple[str, int, float | None], list[Sample]]) -> list[list[Sample]]:
    """The samples of each process, where a clock that was set gave one of them several start times.

    Whoever had the pid later started after the last sample of who had it before; who did not is the same one.
    """
    joined: dict[tuple[str, int], list[list[Sample]]] = {}
    # Files are read newest first.
    spans = {
        key: (min(row.timestamp for row in rows), max(row.timestamp for row in rows)) for key, rows in processes.items()
    }
    ends: dict[tuple[str, int], float] = {}
    for key, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        who, pid, started = key
        end = ends.get((who, pid), 0.0)
        lives = joined.setdefault((who, pid), [])
        if lives and started is not None and started <= end < first:
            lives[-1] += processes[key]
        else:
            lives.append(list(processes[key]))
        ends[who, pid] = last
    return [rows for lives in joined.values() for rows in lives]


def _generation(rows: Sequence[Sample]) -> Generation:
    # One at a time: a segment may be there twice, gzipped and not yet removed.
    rows = sorted({row.timestamp: row for row in rows}.values(), key=lambda row: row.timestamp)
    return Generation(
        pid=rows[0].pid,
        start_time=rows[0].start_time,
        role=rows[-1].role,
        times=np.array([row.timestamp for row in rows]),
        sizes=np.array([row.rss_kb + (row.swap_kb or 0) for row in rows], dtype=float),
        tasks=np.array([np.nan if row.tasks is None else row.tasks for row in rows], dtype=float),
    )


def _limits(rows: Iterable[CgroupSample]) -> Limits:
    rows = sorted(rows, key=lambda row: row.timestamp)
    if not rows:
        return Limits()
    measured = [row for row in rows if row.memory_current_kb is not None]
    levels = np.array([float(row.memory_current_kb or 0) for row in measured])
    return Limits(
        high_kb=rows[-1].memory_high_kb,
        max_kb=rows[-1].memory_max_kb,
        level_kb=float(np.median(levels[-LAST_FIGURES:])) if measured else None,
        events_high=_total([row.events_high for row in rows]),
        oom_kills=_total([row.oom_kill for row in rows]),
        restarts=_total([row.n_restarts for row in rows]),
        times=np.array([row.timestamp for row in measured]),
        levels=levels,
    )


def _total(counts: Sequence[int | None]) -> int:
    """How often something happened while it was watched: a counter that fell has begun anew."""
    known = [count for count in counts if count is not None]
    return sum(max(0, b - a) if b >= a else b for a, b in zip(known, known[1:]))
