"""Which worker's memory grows without end: pure functions from series to a verdict.

A process is judged by its own life. Its memory is reduced to floors, as what a task takes and gives back is above them;
the slope of the floors is Theil's and Sen's, with an interval that autocorrelation widens. Where the bootstrap counts
tasks, growth is asked against tasks and not against the clock, so that idle time tells nothing; else the wave of the
day's load is taken out once two days were seen. A worker's verdict and rate are put together from its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .series import Floats, Generation, Worker

# Pairwise slopes cost their square, and tell no more of a thousand samples.
MOST_FLOORS = 60
# Of so many samples one is no task's spike.
SAMPLES_A_FLOOR = 5
# Fewer say nothing: Mann-Kendall's normal approximation holds from about 10.
FEWEST_FLOORS = 12
# Growth that is not worth a person's time, and that a healthy allocator shows.
LEAST_GROWTH_KB, LEAST_GROWTH_SHARE = 4096, 0.05
# The first part of a life imports, connects and fills caches.
WARM_SHARE = 0.1
# Of the whole slope, what the second half must still have for growth to go on. A leak has all of it; what approaches a
# level by e^(-t/T), seen for 3 T, has 0.43.
STILL_GROWING = 0.5
# On either side of a step, what does not count: these are apart by more than the rest of either side.
STEP_OUTLIERS = 0.1
# On either side of a jump, for a slope.
FEWEST_OF_SIDE = 3
# A band of this many KiB, or this share of the level, is quiet.
NOISE_KB, NOISE_SHARE = 8192, 0.1
# Of an interval of 95 %.
ERROR = 0.05
Z = NormalDist().inv_cdf(1 - ERROR / 2)
# Two processes of one slot: the second begins within this time of the end of the first, seconds.
SUCCESSION_S = 180.0
# One that grew and ended may have ended by a deployment; after so many in each place it is recycled as a rule.
RECYCLES = 3
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
    but never below that of independent values; the interval never reaches beyond the slopes themselves. x ascending;
    equal x are left out. Raises ValueError below 3 points.
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
    centred = _ranks(residuals) - (n + 1) / 2
    power = float(centred @ centred)
    if n < 4 or power == 0:
        return 1.0
    lags = np.arange(1, n - 2)
    correlation = np.array([float(centred[lag:] @ centred[:-lag]) / power for lag in lags])
    significant = np.abs(correlation) > Z / np.sqrt(n)
    weights = (n - lags) * (n - lags - 1) * (n - lags - 2)
    return max(1.0, 1 + 2 / (n * (n - 1) * (n - 2)) * float(np.sum((weights * correlation)[significant])))


def _ranks(values: Floats) -> Floats:
    """From 1; equal values share the mean of theirs."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[at])


def floors(x: Floats, sizes: Floats) -> NDArray[np.intp]:
    """Indices of the smallest size in each of up to MOST_FLOORS parts of x, which is ascending.

    Each part has as many values of x, so that time without samples and idle time, of one x, make no parts.
    """
    starts = np.flatnonzero(np.diff(x, prepend=x[0] - 1))
    number = min(max(len(starts) // SAMPLES_A_FLOOR, FEWEST_FLOORS), MOST_FLOORS, len(starts))
    first = [part[0] for part in np.array_split(starts, number)]
    return np.array([part[np.argmin(sizes[part])] for part in np.split(np.arange(len(x)), first[1:])])


def busy(tasks: Floats) -> slice:
    """From the sample before the first task that was seen to end to the last one; at least one was."""
    rises = np.flatnonzero(np.diff(tasks) > 0)
    return slice(int(rises[0]), int(rises[-1]) + 2)


@dataclass(frozen=True)
class Life:
    """One process, judged, from start to end in Unix seconds, of busy time where tasks are counted.

    rate in KiB an hour of that time, per_task in KiB, level what it held throughout the last quarter, in KiB.
    """

    generation: Generation
    pattern: Pattern
    start: float
    end: float
    rate: Trend = Trend(0.0, 0.0, 0.0)
    level: float = 0.0
    per_task: Trend | None = None

    @property
    def hours(self) -> float:
        return (self.end - self.start) / 3600


def judge_generation(one: Generation) -> Life:
    """The pattern and the rate of one process."""
    times, sizes = one.times, one.sizes
    # A count that could not be read is as the one before.
    tasks = np.maximum.accumulate(np.nan_to_num(one.tasks))
    # Few tasks, as those that last for hours, are no scale to see growth on.
    counted = len(np.unique(tasks)) >= FEWEST_FLOORS
    if counted:
        part = busy(tasks)
        times, sizes, tasks = times[part], sizes[part], tasks[part]
    start, end = float(times[0]), float(times[-1])
    hours = (times - start) / 3600
    x = tasks if counted else hours
    warm = x >= x[0] + WARM_SHARE * (x[-1] - x[0])
    x, hours, sizes = x[warm], hours[warm], sizes[warm]
    at = floors(x, sizes)
    if len(at) < FEWEST_FLOORS:
        return Life(one, Pattern.INSUFFICIENT_DATA, start, end)
    level = without_day(hours[at], sizes[at])
    trend = theil_sen(x[at], level)
    pattern = _pattern(x[at], level, trend)
    pace = float(x[-1] - x[0]) / float(hours[-1] - hours[0])
    rate = Trend(trend.slope * pace, trend.low * pace, trend.high * pace)
    reached = float(np.min(level[-(len(level) // 4) :]))
    return Life(one, pattern, start, end, rate, reached, trend if counted else None)


def without_day(hours: Floats, level: Floats) -> Floats:
    """The levels less a wave of one day, as the load makes it; as they are where it cannot be told from growth."""
    if hours[-1] - hours[0] < 2 * DAY_HOURS:
        return level
    turn = 2 * np.pi * hours / DAY_HOURS
    terms = np.column_stack([np.cos(turn), np.sin(turn), np.ones_like(turn), hours])
    wave = np.linalg.lstsq(terms, level, rcond=None)[0][:2]
    return np.asarray(level - terms[:, :2] @ wave)


def _pattern(x: Floats, level: Floats, whole: Trend) -> Pattern:
    """What the floors of one process do along x, which is tasks or hours."""
    if _is_step(x, level):
        return Pattern.STEP
    if not _grows(whole, x, level):
        band = float(np.median(np.abs(level - np.median(level)))) * 1.4826
        quiet = max(NOISE_KB, NOISE_SHARE * float(np.median(level)))
        return Pattern.PLATEAU if band <= quiet else Pattern.NOISY
    half = len(x) // 2
    then = theil_sen(x[half:], level[half:])
    if then.low > 0 and then.slope >= STILL_GROWING * whole.slope:
        return Pattern.GROWING
    return Pattern.WARMING_UP if then.low > 0 else Pattern.PLATEAU


def _grows(trend: Trend, x: Floats, level: Floats) -> bool:
    """Whether growth is beyond doubt, and enough to matter."""
    at_first = float(np.median(level[: max(1, len(level) // 10)]))
    return trend.low > 0 and trend.slope * float(x[-1] - x[0]) >= _worth(at_first)


def _worth(level: float) -> float:
    """The least growth that matters of a process of this level, KiB."""
    return max(LEAST_GROWTH_KB, LEAST_GROWTH_SHARE * level)


def _is_step(x: Floats, level: Floats) -> bool:
    """Whether there is one jump that lasts and matters, and neither side of it grows."""
    # Where the ranks change most (Pettitt, Applied Statistics 28, 1979).
    centred = _ranks(level) - (len(level) + 1) / 2
    at = int(np.argmin(np.cumsum(centred)[FEWEST_OF_SIDE - 1 : -FEWEST_OF_SIDE])) + FEWEST_OF_SIDE
    before, after = level[:at], level[at:]
    apart = np.quantile(after, STEP_OUTLIERS) - np.quantile(before, 1 - STEP_OUTLIERS)
    if apart < _worth(float(np.median(before))):
        return False
    return not any(_grows(theil_sen(t, y), t, y) for t, y in ((x[:at], before), (x[at:], after)))


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
    last = _last(worker)
    living = [life for life in judged if _lives(life.generation, last)]
    ended = [life for life in judged if not _lives(life.generation, last)]
    side_by_side = sum(_lives(one, last) for one in worker.generations)
    pattern = _together(living, ended, side_by_side)
    if pattern is Pattern.GROWING:
        # What others did before tells nothing of the time that is left.
        asked, rate = living, _sum([(1.0, life.rate) for life in living])
    else:
        asked, rate = judged, _rate(judged)
    leaks = pattern is Pattern.GROWING and rate.slope > 0
    # Recycling gives the memory back: such a worker has no time left to tell.
    high = _hours_left(worker.limits.high_kb, worker, rate) if leaks else None
    most = _hours_left(worker.limits.max_kb, worker, rate) if leaks else None
    evidence = tuple(_evidence(worker, judged, pattern))
    return Verdict(worker, pattern, rate, _per_1000_tasks(asked), high, most, lives, evidence)


def _last(worker: Worker) -> float:
    return max(float(one.times[-1]) for one in worker.generations)


def _lives(one: Generation, last: float) -> bool:
    return last - float(one.times[-1]) <= SUCCESSION_S


def _together(living: Sequence[Life], ended: Sequence[Life], side_by_side: int) -> Pattern:
    """A worker leaks when a process grows that still lives, or when most of the last ones that ended had grown."""
    grows = any(
        life.pattern is Pattern.GROWING and _surely(life.rate, len(living)) and _outgrows(life, ended)
        for life in living
    )
    grew = [life for life in ended if life.pattern is Pattern.GROWING]
    if grew:
        pace = float(np.median([life.rate.slope for life in grew]))
        # One that lives and has not grown speaks too, once it would have.
        cured = [life for life in living if life.pattern is not Pattern.GROWING and _would_show(life, pace)]
        asked = sorted([*ended, *cured], key=lambda life: life.end)[-RECYCLES * side_by_side :]
        most = 2 * sum(life.pattern is Pattern.GROWING for life in asked) >= len(asked)
        if most and not (grows and len(grew) < RECYCLES * side_by_side):
            return Pattern.RECYCLED
    if grows:
        return Pattern.GROWING
    # What most of the observed time was like.
    spent: dict[Pattern, float] = {}
    for life in (*living, *ended):
        spent[life.pattern] = spent.get(life.pattern, 0.0) + life.hours
    pattern = max(spent, key=lambda one: spent[one], default=Pattern.INSUFFICIENT_DATA)
    return Pattern.PLATEAU if pattern is Pattern.GROWING else pattern


def _surely(rate: Trend, of: int) -> bool:
    """Whether it grows, judged as one of so many (Bonferroni): of many that only waver, one always seems to."""
    return rate.slope > NormalDist().inv_cdf(1 - ERROR / 2 / of) / Z * (rate.slope - rate.low)


def _outgrows(life: Life, ended: Sequence[Life]) -> bool:
    """Whether it holds more or lives longer than any of its kind that ended without growing, which warmed up, too."""
    kind = [one for one in ended if one.generation.role == life.generation.role]
    healthy = [one for one in kind if one.pattern is not Pattern.GROWING]
    if not healthy:
        return True
    level = max(one.level for one in healthy)
    return life.level - level >= _worth(level) or life.hours > max(one.hours for one in healthy)


def _would_show(life: Life, pace: float) -> bool:
    """Whether growth of so many KiB an hour would have shown in it, beyond doubt."""
    return pace * life.hours >= 2 * _worth(life.level)


def _rate(judged: Sequence[Life]) -> Trend:
    """Growth of all processes together, KiB an hour of the time in which tasks ran, or of all where none are counted.

    Each process counts for its part of that time, so that neither recycling nor concurrency distorts the sum.
    """
    if not judged:
        return Trend(0.0, 0.0, 0.0)
    working = [life for life in judged if life.per_task] or judged
    start, end = min(life.start for life in working), max(life.end for life in working)
    shares = [max(0.0, min(life.end, end) - max(life.start, start)) / (end - start) for life in judged]
    return _sum([(share, life.rate) for share, life in zip(shares, judged)])


def _sum(parts: Sequence[tuple[float, Trend]]) -> Trend:
    """Trends of independent errors, each by its factor: half intervals add as squares."""
    slope = sum(share * one.slope for share, one in parts)
    below = sum((share * (one.slope - one.low)) ** 2 for share, one in parts) ** 0.5
    above = sum((share * (one.high - one.slope)) ** 2 for share, one in parts) ** 0.5
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
    return float(sum(one.sizes[-1] for one in worker.generations if _lives(one, last)))


def _hours_left(limit_kb: int | None, worker: Worker, rate: Trend) -> float | None:
    return None if limit_kb is None else max(0.0, limit_kb - _level(worker)) / rate.slope


def _evidence(worker: Worker, judged: Sequence[Life], pattern: Pattern) -> list[str]:
    """What a reader should know beside the numbers, a sentence each."""
    said = []
    if not judged:
        said.append(f"no process has the {FEWEST_FLOORS} samples after its warm-up that a verdict needs")
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
