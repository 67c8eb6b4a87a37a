"""Which worker's memory grows without end: pure functions from series to a verdict.

A process is judged by its own life. Its memory is reduced to floors, as what a task takes and gives back is above them;
the slope of the floors is Theil's and Sen's, with an interval that autocorrelation widens. Where the bootstrap counts
tasks, idle time at either end is left out, and whether growth goes on is asked against tasks and not against the clock.
A worker's verdict and rate are put together from those of its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from .series import Floats, Generation, Worker

# Floors of so many equal spans: pairwise slopes cost their square, and tell no more of a thousand samples.
MOST_FLOORS = 60
# Fewer say nothing: Mann-Kendall's normal approximation holds from about 10.
FEWEST_SAMPLES = 12
# Growth that is not worth a person's time, and that a healthy allocator shows.
LEAST_GROWTH_KB, LEAST_GROWTH_SHARE = 4096, 0.05
# The first part of a life imports, connects and fills caches.
WARM_SHARE = 0.1
# Of the whole slope, what the second half must still have for growth to go on.
STILL_GROWING = 0.3
# Of all growth, what is too much for one jump of a leak.
STEP_SHARE = 0.5
# A band of this many KiB, or this share of the level, is quiet.
NOISE_KB, NOISE_SHARE = 8192, 0.1
# Two-sided 95 %.
Z = 1.959964
# Two processes of one slot: the second begins within this time of the end of the first, seconds.
SUCCESSION_S = 180.0
# A rise over less than this may be the day's load.
DAY_HOURS = 24.0


class Pattern(str, Enum):
    """What a worker's or a process's memory does. Only growing and recycled are leaks."""

    GROWING = "growing"
    RECYCLED = "recycled"
    WARMING_UP = "warming_up"
    PLATEAU = "plateau"
    STEP = "step"
    NOISY = "noisy"
    INSUFFICIENT_DATA = "insufficient_data"

    @property
    def leaking(self) -> bool:
        return self in (Pattern.GROWING, Pattern.RECYCLED)


@dataclass(frozen=True)
class Trend:
    """A slope, y a unit of x, with its 95 % interval."""

    slope: float
    low: float
    high: float


def theil_sen(x: Floats, y: Floats) -> Trend:
    """The median of all pairwise slopes (Theil 1950), with Sen's interval (1968) by the variance of Kendall's S.

    That variance is corrected for ties (Kendall 1975) and for autocorrelation (Hamed and Rao, J. Hydrology 204, 1998),
    but never below that of independent values. x ascending; equal x are left out. Raises ValueError below 3 points.
    """
    n = len(x)
    if n < 3:
        raise ValueError("a slope needs three points")
    i, j = np.triu_indices(n, 1)
    apart = x[j] - x[i]
    kept = apart > 0
    slopes = np.sort((y[j] - y[i])[kept] / apart[kept])
    if not len(slopes):
        raise ValueError("all points share one x")
    slope = float(np.median(slopes))
    _, ties = np.unique(y, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float(np.sum(ties * (ties - 1) * (2 * ties + 5)))) / 18
    reach = Z * np.sqrt(max(variance, 0.0) * _inflation(y - slope * x))
    ranks = np.arange(len(slopes))
    # The M1-th smallest and the (M2+1)-th, counted from 1; between two slopes the value is interpolated.
    low, high = np.interp([(len(slopes) - reach) / 2 - 1, (len(slopes) + reach) / 2], ranks, slopes)
    return Trend(slope, min(float(low), slope), max(float(high), slope))


def _inflation(residuals: Floats) -> float:
    """Hamed and Rao's n/n*: how much autocorrelation of the residuals' ranks widens the variance of S."""
    n = len(residuals)
    ranks = np.argsort(np.argsort(residuals)).astype(float)
    centred = ranks - ranks.mean()
    power = float(centred @ centred)
    if n < 4 or power == 0:
        return 1.0
    lags = np.arange(1, n - 2)
    correlation = np.array([float(centred[lag:] @ centred[:-lag]) / power for lag in lags])
    significant = np.abs(correlation) > Z / np.sqrt(n)
    weights = (n - lags) * (n - lags - 1) * (n - lags - 2)
    return max(1.0, 1 + 2 / (n * (n - 1) * (n - 2)) * float(np.sum((weights * correlation)[significant])))


def floors(times: Floats, sizes: Floats) -> NDArray[np.intp]:
    """Indices of the smallest value in each of MOST_FLOORS equal spans of time; all of them where there are no more."""
    if len(times) <= MOST_FLOORS:
        return np.arange(len(times))
    edges = np.linspace(times[0], times[-1], MOST_FLOORS + 1)[1:-1]
    starts = np.unique(np.searchsorted(times, edges))
    parts = np.split(np.arange(len(times)), starts)
    return np.array([part[np.argmin(sizes[part])] for part in parts if len(part)])


def busy(one: Generation) -> slice:
    """From the sample before the first task that was seen to end to the last one; all where tasks are not counted."""
    counted = np.nan_to_num(one.tasks, nan=0.0)
    rises = np.flatnonzero(np.diff(counted) > 0)
    if not len(rises):
        return slice(0, len(one.times))
    return slice(int(rises[0]), int(rises[-1]) + 2)


@dataclass(frozen=True)
class Life:
    """One process, judged. rate in KiB an hour over hours of busy time; per_task in KiB, None where not known."""

    generation: Generation
    pattern: Pattern
    rate: Trend
    start: float
    end: float
    per_task: Trend | None = None

    @property
    def hours(self) -> float:
        return (self.end - self.start) / 3600


def judge_generation(one: Generation) -> Life:
    """The pattern and the rate of one process."""
    part = busy(one)
    times, sizes, tasks = one.times[part], one.sizes[part], one.tasks[part]
    warm = times >= times[0] + WARM_SHARE * (times[-1] - times[0])
    times, sizes, tasks = times[warm], sizes[warm], tasks[warm]
    start, end = float(times[0]), float(times[-1])
    if len(times) < FEWEST_SAMPLES or end <= start:
        return Life(one, Pattern.INSUFFICIENT_DATA, Trend(0.0, 0.0, 0.0), start, end)
    at = floors(times, sizes)
    hours, level, done = (times[at] - start) / 3600, sizes[at], tasks[at]
    rate = theil_sen(hours, level)
    counted = bool(np.all(np.isfinite(done))) and done[-1] > done[0]
    per_task = theil_sen(done, level) if counted else None
    return Life(one, _pattern(done if counted else hours, level), rate, start, end, per_task)


def _pattern(x: Floats, level: Floats) -> Pattern:
    """What the floors of one process do along x, which is tasks or hours."""
    whole = theil_sen(x, level)
    if not _grows(whole, x, level):
        band = float(np.median(np.abs(level - np.median(level)))) * 1.4826
        quiet = max(NOISE_KB, NOISE_SHARE * float(np.median(level)))
        return Pattern.PLATEAU if band <= quiet else Pattern.NOISY
    if _is_step(x, level):
        return Pattern.STEP
    late = x >= (x[0] + x[-1]) / 2
    if len(np.unique(x[late])) < 3:
        return Pattern.WARMING_UP
    then = theil_sen(x[late], level[late])
    if then.low > 0 and then.slope >= STILL_GROWING * whole.slope:
        return Pattern.GROWING
    return Pattern.WARMING_UP if then.low > 0 else Pattern.PLATEAU


def _grows(trend: Trend, x: Floats, level: Floats) -> bool:
    """Whether even the least slope of the interval makes growth that matters."""
    least = max(LEAST_GROWTH_KB, LEAST_GROWTH_SHARE * float(np.median(level[: max(1, len(level) // 10)])))
    return trend.slope * float(x[-1] - x[0]) >= least and trend.low > 0


def _is_step(x: Floats, level: Floats) -> bool:
    """Whether one jump is most of the growth, and without it there is none."""
    jumps = np.diff(level)
    at = int(np.argmax(jumps))
    grown = float(level[-1] - level[0])
    if grown <= 0 or jumps[at] < STEP_SHARE * grown:
        return False
    without = level.copy()
    without[at + 1 :] -= jumps[at]
    return not _grows(theil_sen(x, without), x, without)


@dataclass(frozen=True)
class Verdict:
    """A worker, judged. rate in KiB an hour, summed over the processes that live side by side; hours None: no end."""

    worker: Worker
    pattern: Pattern
    rate: Trend
    kb_per_1000_tasks: float | None
    hours_to_high: float | None
    hours_to_max: float | None
    lives: tuple[Life, ...]
    evidence: tuple[str, ...]


def judge(worker: Worker) -> Verdict:
    """The verdict on one worker."""
    lives = tuple(judge_generation(one) for one in worker.generations)
    judged = [life for life in lives if life.pattern is not Pattern.INSUFFICIENT_DATA]
    pattern = _together(judged, _last(worker))
    rate = _rate(judged)
    leaks = pattern is Pattern.GROWING and rate.slope > 0
    # Recycling gives the memory back: such a worker has no time left to tell.
    high = _hours_left(worker.limits.high_kb, worker, rate) if leaks else None
    most = _hours_left(worker.limits.max_kb, worker, rate) if leaks else None
    evidence = tuple(_evidence(worker, judged, pattern, rate))
    return Verdict(worker, pattern, rate, _per_1000_tasks(judged), high, most, lives, evidence)


def _last(worker: Worker) -> float:
    return max(float(one.times[-1]) for one in worker.generations)


def _together(judged: Sequence[Life], last: float) -> Pattern:
    """A worker leaks when a process grows that still lives, or when most of those that ended had grown."""
    if not judged:
        return Pattern.INSUFFICIENT_DATA
    ended = [life for life in judged if last - life.generation.times[-1] > SUCCESSION_S]
    living = [life for life in judged if life not in ended]
    if any(life.pattern is Pattern.GROWING for life in living):
        return Pattern.GROWING
    grew = [life for life in ended if life.pattern is Pattern.GROWING]
    if grew and len(grew) * 2 >= len(ended):
        return Pattern.RECYCLED
    # What most of the observed time was like.
    spent: dict[Pattern, float] = {}
    for life in judged:
        spent[life.pattern] = spent.get(life.pattern, 0.0) + life.hours
    pattern = max(spent, key=lambda one: spent[one])
    return Pattern.PLATEAU if pattern is Pattern.GROWING else pattern


def _rate(judged: Sequence[Life]) -> Trend:
    """Growth of all processes together, KiB an hour of the time in which tasks ran, or of all where none are counted.

    Each process counts for the part of that time that it was judged in, so that neither recycling nor concurrency
    distorts the sum. Their errors are independent: half intervals add as squares.
    """
    if not judged:
        return Trend(0.0, 0.0, 0.0)
    working = [life for life in judged if life.per_task] or judged
    start, end = min(life.start for life in working), max(life.end for life in working)
    shares = [max(0.0, min(life.end, end) - max(life.start, start)) / (end - start) for life in judged]
    slope = sum(share * life.rate.slope for share, life in zip(shares, judged))
    below = sum((share * (life.rate.slope - life.rate.low)) ** 2 for share, life in zip(shares, judged)) ** 0.5
    above = sum((share * (life.rate.high - life.rate.slope)) ** 2 for share, life in zip(shares, judged)) ** 0.5
    return Trend(slope, slope - below, slope + above)


def _per_1000_tasks(judged: Sequence[Life]) -> float | None:
    """Growth of 1,000 tasks, KiB: each process counts for the tasks that it finished."""
    counted = [(life.per_task, float(np.nanmax(life.generation.tasks))) for life in judged if life.per_task]
    total = sum(tasks for _, tasks in counted)
    return 1000 * sum(trend.slope * tasks for trend, tasks in counted) / total if total else None


def _level(worker: Worker) -> float:
    """KiB that count against the limits now: the cgroup's own figure, or what the living processes hold."""
    if worker.limits.level_kb is not None:
        return worker.limits.level_kb
    last = _last(worker)
    return float(sum(one.sizes[-1] for one in worker.generations if last - one.times[-1] <= SUCCESSION_S))


def _hours_left(limit_kb: int | None, worker: Worker, rate: Trend) -> float | None:
    return None if limit_kb is None else max(0.0, limit_kb - _level(worker)) / rate.slope


def _evidence(worker: Worker, judged: Sequence[Life], pattern: Pattern, rate: Trend) -> list[str]:
    """What a reader should know beside the numbers, a sentence each."""
    said = []
    if pattern is Pattern.INSUFFICIENT_DATA:
        said.append(f"no process has the {FEWEST_SAMPLES} samples that a verdict needs")
    grew = [life for life in judged if life.pattern is Pattern.GROWING]
    if pattern.leaking:
        least = f"{LEAST_GROWTH_KB // 1024} MiB"
        said.append(f"{len(grew)} of {len(judged)} processes grew by more than {least}, and went on to the end")
        if worker.span_hours < DAY_HOURS:
            said.append("seen for less than a day, which cannot tell a leak from the day's load")
    limits = worker.limits
    if limits.events_high:
        said.append(f"above MemoryHigh {limits.events_high} times: the kernel slows it down there")
    if limits.oom_kills:
        said.append(f"{limits.oom_kills} OOM kills")
    if limits.restarts:
        said.append(f"{limits.restarts} restarts by systemd")
    if pattern.leaking and limits.max_kb is None:
        said.append("no MemoryMax was seen, so that no time is left to tell")
    return said
