"""Which worker's memory grows without end: pure functions from a worker's processes to a verdict.

What lives is judged by its own series, one process at a time and all together; what has ended by the profile of a life
that all generations share. `growth.py` judges a series; here the series are made, and the judgements put together.
docs/detection.md tells the method, its sources and its limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import exp, hypot, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import growth
from .growth import DAY_HOURS, FEWEST_FLOORS, Judged, Series, Trend
from .series import Floats, Generation, Worker

# Odds of 400 to 1, as twice their logarithm: judged once a day, chance calls a healthy worker less than once a year.
SURE = 2 * log(400)
# The same, as standard errors above 0.
SURE_NORMAL = 2.81
# Less growth than this is not worth a person's time, and a healthy allocator shows it: KiB, and a share of the level.
# A worker near its limit must be called once it grew by 5 % of the limit, so that this is below.
LEAST_GROWTH_KB, LEAST_GROWTH_SHARE = 4096.0, 0.03
# Of the slope that is claimed, what the last third must have, and what memory must never have given back. A slope that
# goes on has all of both; of a rise that bends, of a wave and of a sawtooth one of them is near 0.
STILL_GROWING = 0.5
# Parts of the span, of growth.RATCHET_PARTS, in which what is kept must have risen, whatever the odds.
RATCHETS = 7
# Those rises must be even: their mean over its standard error. A line has a large one; lumps, of n, about the root of
# n / 2; a few steps, a wave's last rise and a sawtooth's last tooth less.
EVEN, EVEN_LUMPS = 2.0, 3.0
# With a rise in all of the parts but one, as even as only a line is, odds that are merely positive are enough
# ("positive" from 2, "strong" from 6: Kass and Raftery).
EVEN_PARTS, EVEN_SURE, POSITIVE = 11, 5.0, 2.0
# Odds at which lumps are no longer better explained by a few steps alone.
LUMPS = -8.0
# What was kept may be more than the slope beside steps claims, but not as much more as by steps alone.
LEAST_KEPT, MOST_KEPT = 0.4, 3.0
# The first part of a life imports, connects and fills caches.
WARM_SHARE = 0.1
# Two processes of one slot: the second begins within this time of the end of the first, seconds.
SUCCESSION_S = 180.0
# Lives of one kind that are needed for what they share, and those that are asked: older ones tell of older releases.
FEWEST_LIVES, MOST_LIVES = 3, 240
MOST_ENDED = 2000
# Parts of a life.
FEWEST_PARTS, MOST_PARTS = 8, 48
# Samples of a life, or its rollups, so that each part of it is met now and then; and samples of one that is judged by
# itself.
FEWEST_OF_LIFE, FEWEST_ROLLUPS, LONG_LIFE = 4, 3, 48
# So many lives have SAMPLES_A_FLOOR for each part of their profile. Of rollups, of which a life has few, more lives.
PROFILED, PROFILED_ROLLUPS = 12, 24
# What ended together began together too, give or take this part of its life.
LATE_BORN = 0.2
# Part of a life that may have gone by before it was seen.
MOST_UNSEEN = 0.5
# So many in each place that have ended are judged by themselves.
RECYCLES = 3
# The day's wave is looked for in ended lives from this many days on, if they begin at all hours: the length of the mean
# of their directions on the clock is below this (1 is one hour, 0 is all).
DAYS_OF_WAVE, SPREAD = 2.5, 0.7
# Hours of the day, those of the least load, by which it is judged where the load makes a wave.
QUIET_HOURS = 8
# Of processes that are judged together, those that must still grow.
MOST_OF_THEM = 0.6
# Of lives that share a profile, those that must have grown by a fourth of their median or more: a few large ones are
# no leak.
AGREE = 0.65
# The newest lives, of this many or more, tell of a leak that was mended where they grow by less than this part.
FEWEST_RECENT, MENDED = 6, 0.4
# A band of this many KiB, or this share of the level, is quiet.
NOISE_KB, NOISE_SHARE = 8192.0, 0.1
# A wave of this many times the noise is what a reader would see.
SEEN_OVER_NOISE = 4.0
# What floors and shapes leave uncertain of a rate however little noise there is, a part of it; and of recycled lives,
# which are seen from sample to sample, their number side by side. Of leaks whose rate is known, intervals held it
# in 94 of 100 with these, and in 90 with 0.12 and 0.3 (tests/bench/detection.py).
MODEL_ERROR, LIVES_ERROR = 0.22, 0.4
# Lives of those that ended, that one must have lived without growth to speak against them.
CURED_LIVES = 2.0
# A process of which a predecessor was healthy is news once it outlives that one by this factor.
OUTLIVES = 1.25
# Difference of BIC between growth by the clock and by tasks that tells them apart ("strong" to Kass and Raftery).
TOLD_APART = 6.0
# Correlation of time and finished tasks above which they tell the same.
ONE_AXIS = 0.999
# One axis explains the growth of lives better where it scatters so much less.
FOLLOWS = 0.75
# The present level is the median of so many last figures, and has been within the bounds of so many.
LAST_FIGURES, LATE_FIGURES = 5, 30
# Nothing that is seen is surer than this.
MOST_CONFIDENT = 0.9999
# Above this share of MemoryMax a life ended by it, and not by recycling in time.
NEAR_LIMIT = 0.9


NONE = Trend(0.0, 0.0, 0.0)


class Pattern(str, Enum):
    """What a worker's or a process's memory does. Only growing and recycled are leaks."""

    GROWING = "growing"
    RECYCLED = "recycled"
    WARMING_UP = "warming_up"
    PLATEAU = "plateau"
    STEP = "step"
    CYCLIC = "cyclic"
    NOISY = "noisy"
    INSUFFICIENT_DATA = "insufficient_data"

    @property
    def leaking(self) -> bool:
        return self in (Pattern.GROWING, Pattern.RECYCLED)


@dataclass(frozen=True)
class Life:
    """One process, judged; judged is None where too little of it was seen. follows is as Verdict's.

    rate in KiB an hour of the clock, per_task in KiB.
    """

    generation: Generation
    pattern: Pattern
    hours: float
    judged: Judged | None = None
    rate: Trend = NONE
    per_task: float | None = None
    follows: str | None = None

    @property
    def odds(self) -> float:
        return self.judged.odds if self.judged else 0.0


@dataclass(frozen=True)
class Forecast:
    """Hours until a limit is met, with a 95 % interval; latest is None where it may never be; all are 0 once it is
    reached."""

    hours: float
    earliest: float
    latest: float | None


@dataclass(frozen=True)
class Verdict:
    """A worker, judged. rate in KiB an hour, summed over the processes that live side by side; hours None: no end.

    confidence: of a leak, how likely growth without end is beside the best explanation that ends, at even odds before;
    None for no leak. follows: "load" where growth goes with finished tasks, "time" where it goes with the clock, None
    where that cannot be told.
    """

    worker: Worker
    pattern: Pattern
    confidence: float | None
    rate: Trend
    kb_per_1000_tasks: float | None
    follows: str | None
    hours_to_high: Forecast | None
    hours_to_max: Forecast | None
    lives: tuple[Life, ...]
    evidence: tuple[str, ...]


def worth(level: float) -> float:
    """The least growth that matters of a process of this level, KiB."""
    return max(LEAST_GROWTH_KB, LEAST_GROWTH_SHARE * level)


# ---- one process ----


def judge_generation(one: Generation) -> Life:
    """The pattern and the rate of one process, on the axis of time or, where tasks are counted, on the better one."""
    start = float(one.times[0]) if one.start_time is None else min(one.start_time, float(one.times[0]))
    warm = one.times >= start + WARM_SHARE * (one.times[-1] - start)
    times, sizes = one.times[warm], one.sizes[warm]
    seen = one.lived / 3600
    hours = (times - times[0]) / 3600
    each = float(np.mean(one.counts))
    at = growth.floors(hours, sizes, each) if len(times) >= FEWEST_FLOORS and hours[-1] > 0 else np.empty(0, int)
    if len(at) < FEWEST_FLOORS:
        return Life(one, Pattern.INSUFFICIENT_DATA, seen)
    tasks = known(one.tasks[warm])
    counted = len(np.unique(tasks)) >= FEWEST_FLOORS
    # The wave goes by the hour of the day.
    clock = times / 3600
    load = np.gradient(tasks[at], hours[at]) if counted else None
    chosen = growth.judge(Series(hours[at], sizes[at], clock[at], load), worth(float(sizes[at[0]])))
    quiet = _quiet(clock, hours, sizes, each, clock[at], chosen)
    if quiet is not None and _grows(quiet) and not _grows(chosen):
        chosen = quiet
    pace, per_task, follows = 1.0, None, None
    if counted and float(np.ptp(sizes[at])) >= worth(chosen.first):
        follows = _follows(hours[at], tasks[at], sizes[at], chosen.correlation)
        busy = slice(*_busy(tasks))
        # Where tasks go with the clock, both axes are one.
        same = float(np.corrcoef(hours[at], tasks[at])[0, 1]) >= ONE_AXIS
        by_task = None if same else _by_task(hours[busy], tasks[busy], sizes[busy], each, clock[busy])
        if by_task is not None and by_task.odds > chosen.odds:
            # By the hour of all that was seen, as the warm-up may have fallen on a quiet time.
            every = known(one.tasks)
            chosen, pace = by_task, float(every[-1] - every[0]) / float(one.times[-1] - one.times[0]) * 3600
            per_task = chosen.trend.slope
        else:
            per_task = chosen.trend.slope * _hours_a_task(hours, tasks, chosen.unbounded.since)
    rate = Trend(chosen.trend.slope * pace, chosen.trend.low * pace, chosen.trend.high * pace)
    return Life(one, _pattern(chosen, seen), seen, chosen, rate, per_task, follows)


def _hours_a_task(hours: Floats, tasks: Floats, since: float) -> float:
    """Hours by the task while it grew, which it does since this part of the span: before, it may have been idle."""
    begin = int(np.searchsorted(hours, since * hours[-1]))
    if tasks[-1] <= tasks[min(begin, len(tasks) - 2)]:
        begin = 0
    begin = min(begin, len(tasks) - 2)
    return float((hours[-1] - hours[begin]) / (tasks[-1] - tasks[begin]))


def _quiet(clock: Floats, hours: Floats, sizes: Floats, each: float, at: Floats, seen: Judged) -> Judged | None:
    """Judged by the quiet hours of the day alone, where the load makes a wave that is high and never quite the same.

    clock and at in hours, of the samples and of the floors that were judged.
    """
    days = float(hours[-1]) / DAY_HOURS
    if days < DAYS_OF_WAVE or float(np.ptp(seen.wave)) < max(worth(seen.first), SEEN_OVER_NOISE * seen.noise):
        return None
    hour = np.arange(DAY_HOURS)
    total = np.bincount((at % DAY_HOURS).astype(int), seen.wave, len(hour))
    number = np.bincount((at % DAY_HOURS).astype(int), minlength=len(hour))
    mean = np.where(number > 0, total / np.maximum(number, 1), np.inf)
    kept = np.isin((clock % DAY_HOURS).astype(int), np.argsort(mean)[:QUIET_HOURS])
    x, y = hours[kept], sizes[kept]
    if len(x) < FEWEST_FLOORS:
        return None
    floor = growth.floors(x, y, each)
    if len(floor) < FEWEST_FLOORS:
        return None
    # A step a night is no accident but how it grows.
    most = int(np.clip(days // 2 - 1, 0, growth.MOST_STEPS))
    judged = growth.judge(Series(x[floor], y[floor], most_steps=most))
    return replace(judged, odds=judged.odds - 2 * log(2))


def _by_task(hours: Floats, tasks: Floats, sizes: Floats, each: float, clock: Floats) -> Judged | None:
    at = growth.floors(tasks, sizes, each)
    if len(at) < FEWEST_FLOORS:
        return None
    return growth.judge(Series(tasks[at], sizes[at], clock[at], np.gradient(tasks[at], hours[at])))


def _busy(tasks: Floats) -> tuple[int, int]:
    """From the sample before the first task that was seen to end to the last one; at least one was."""
    rises = np.flatnonzero(np.diff(tasks) > 0)
    return int(rises[0]), int(rises[-1]) + 2


def _follows(hours: Floats, tasks: Floats, sizes: Floats, correlation: float) -> str | None:
    """Whether growth goes with finished tasks or with the clock, by which of the two lines is so much the likelier."""
    load = np.gradient(tasks, hours)
    bic = {name: growth.line(axis, sizes, load, correlation) for name, axis in (("load", tasks), ("time", hours))}
    better, worse = sorted(bic, key=lambda name: bic[name])
    return better if bic[worse] - bic[better] >= TOLD_APART else None


def _still(one: Judged) -> bool:
    """Whether the growth that the unbounded explanation claims matters, goes on, and is never given back."""
    least = worth(one.first)
    lasts = one.lasting >= STILL_GROWING and LEAST_KEPT <= one.kept <= MOST_KEPT
    even = one.ratchet >= RATCHETS and one.even >= EVEN
    return lasts and even and one.growth >= least and one.record >= least


def _grows(one: Judged, sure: float = SURE) -> bool:
    """Whether growth without end is beyond doubt."""
    lumps = one.ratchet >= growth.RATCHETS and one.even >= EVEN_LUMPS and one.odds >= LUMPS
    even = one.ratchet >= EVEN_PARTS and one.even >= EVEN_SURE and one.odds >= POSITIVE + sure - SURE
    return _still(one) and (one.odds >= sure or even or (lumps and len(one.bounded.steps) > 1))


def _pattern(one: Judged, hours: float) -> Pattern:
    if _grows(one):
        return Pattern.GROWING
    if one.odds > 0 and _still(one) and hours < DAY_HOURS:
        # It may go on or flatten: that takes longer to tell.
        return Pattern.INSUFFICIENT_DATA
    most = worth(one.first)
    if float(np.ptp(one.wave)) >= max(most, SEEN_OVER_NOISE * one.noise):
        return Pattern.CYCLIC
    if abs(one.level - one.first) >= most:
        stepped = float(np.ptp(one.bounded.without_load - one.bounded.without_steps))
        if one.bounded.steps and stepped >= abs(one.level - one.first) / 2:
            return Pattern.STEP
        if one.bounded.shape is not growth.Shape.LEVEL and one.level > one.first:
            return Pattern.WARMING_UP
    return Pattern.PLATEAU if one.noise <= max(NOISE_KB, NOISE_SHARE * one.level) else Pattern.NOISY


# ---- processes together ----


def cohorts(generations: Sequence[Generation], every: Sequence[Generation]) -> list[Generation]:
    """Processes that ended together with their whole worker, as by a restart or a kill, as one: their sizes are summed.

    So a leak in any of them shows in each life of the worker. Where another of `every` process lived on, as the main
    one does when a child is recycled, they are lives of their own. Ordered by their ends.
    """
    starts = np.array([one.begin for one in every])
    ends = np.array([one.end for one in every])
    groups: list[list[Generation]] = []
    for one in sorted(generations, key=lambda one: (one.end, one.begin)):
        near, end = _near(one), one.end
        first = groups[-1][0] if groups else None
        lived_on = bool(np.any((starts < end - near) & (ends > end + near)))
        if first is not None and not lived_on and end - first.end <= near and _as_old(one, first):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [group[0] if len(group) == 1 else _summed(group) for group in groups]


def _near(one: Generation) -> float:
    """Seconds within which ends are seen as one: by its interval, a process is not seen to its very end."""
    return max(SUCCESSION_S, 3 * one.interval)


def _as_old(one: Generation, other: Generation) -> bool:
    return abs(other.begin - one.begin) <= max(_near(one), LATE_BORN * other.lived)


def known(tasks: Floats) -> Floats:
    """Counts of tasks: one that could not be read is as the one before, and the first ones as the first that was."""
    read = np.isfinite(tasks)
    if not read.any():
        return np.zeros(len(tasks))
    return np.asarray(np.maximum.accumulate(np.where(read, tasks, tasks[read][0])))


def _fewest(one: Generation) -> int:
    return FEWEST_ROLLUPS if one.whole else FEWEST_OF_LIFE


def _summed(group: Sequence[Generation]) -> Generation:
    start, end = max(float(one.times[0]) for one in group), min(float(one.times[-1]) for one in group)
    longest = max(group, key=lambda one: len(one.times))
    shared = (longest.times >= start) & (longest.times <= end)
    times = longest.times[shared]
    if len(times) < _fewest(longest):
        return longest
    sizes = sum((np.interp(times, one.times, one.sizes) for one in group), np.zeros(len(times)))
    tasks = sum((np.interp(times, one.times, known(one.tasks)) for one in group), np.zeros(len(times)))
    counted = any(np.any(np.isfinite(one.tasks)) for one in group)
    return replace(
        longest,
        times=times,
        sizes=sizes,
        tasks=tasks if counted else np.full(len(times), np.nan),
        counts=longest.counts[shared],
    )


class Late(NamedTuple):
    """Growth in the second half of a life, KiB by a whole one, its standard errors above 0, and of how many lives."""

    growth: float
    errors: float
    lives: int


@dataclass(frozen=True)
class Lives:
    """What ended generations share. growth: KiB of a life; hours and tasks: of a mean life, over all that were asked.

    agree: the part of them that grew as the median did, and by what matters.
    """

    judged: Judged
    agree: float
    late: Late
    growth: Trend
    hours: float
    tasks: float
    follows: str | None
    lives: int

    @property
    def odds(self) -> float:
        """As of Verdict: the better of what the profile and what the second halves of all lives tell."""
        return max(self.judged.odds, self.late.errors**2 - log(self.late.lives))

    @property
    def grows(self) -> bool:
        one = self.judged
        lasts = one.lasting >= STILL_GROWING and one.kept >= LEAST_KEPT
        if self.agree < AGREE or not lasts or self.growth.slope < worth(one.first):
            return False
        goes_on = self.late.growth >= STILL_GROWING * self.growth.slope
        sure = self.late.errors >= growth.student(self.late.lives - 1, SURE_NORMAL)
        return one.odds >= SURE or (goes_on and sure)


def share(ended: Sequence[Generation], days: float) -> Lives | None:
    """The profile of a life, of generations that have ended, over parts of each one's own life; None for too few.

    By parts of a life and not by age, as one that leaks faster ends sooner: by age only slow ones would be left late.
    """
    seen = [(one, _placed(one)) for one in ended if len(one.times) >= _fewest(one)]
    whole = [(one, place) for one, place in seen if place[0][0] <= MOST_UNSEEN][-MOST_LIVES:]
    if len(whole) < FEWEST_LIVES:
        return None
    lives, placed = [one for one, _ in whole], [place for _, place in whole]
    samples = float(np.median([len(s) for s, _, _ in placed]))
    most = PROFILED_ROLLUPS if lives[0].whole else PROFILED
    parts = int(np.clip(samples * min(len(lives), most) / growth.SAMPLES_A_FLOOR, FEWEST_PARTS, MOST_PARTS))
    # Where all begin at one hour, as by a nightly restart, the day's wave cannot be told from the life.
    turn = 2 * np.pi * np.array([one.begin for one in lives]) / (3600 * DAY_HOURS)
    spread = abs(np.mean(np.exp(1j * turn))) < SPREAD
    clocks = [one.times / 3600 for one in lives] if days >= DAYS_OF_WAVE and spread else None
    at, y = growth.profile([(s, y) for s, y, _ in placed], parts, clocks)
    warm = at >= WARM_SHARE
    if warm.sum() < FEWEST_PARTS:
        return None
    judged = growth.judge(Series(at[warm], y[warm]))
    hours = np.array([long for _, _, long in placed])
    grown = np.array([_slope(s, y) for s, y, _ in placed])
    tasks = np.array([_done(one) if _counts(one) else 0.0 for one in lives])
    # Of a life of few rollups, less than two may be in its second half.
    half = np.array([_slope(s, y, 0.5) for s, y, _ in placed if np.sum(s >= 0.5) > 1])
    if len(half) < min(len(lives), FEWEST_RECENT):
        half = np.zeros(len(lives))
    late = Late(float(np.median(half)), float(np.median(half)) / max(_error(half), 1e-9), len(half))
    middle = float(np.median(grown))
    reach = growth.student(len(lives) - 1) * _error(grown)
    follows = None
    if np.all(tasks > 0):
        scatter = {name: _scatter(grown / axis) for name, axis in (("time", hours), ("load", tasks))}
        best, worst = sorted(scatter, key=lambda name: scatter[name])
        follows = best if scatter[best] < FOLLOWS * scatter[worst] else None
    return Lives(
        judged,
        float(np.mean(grown >= max(middle / 4, worth(judged.first) / 2))),
        late,
        Trend(middle, middle - reach, middle + reach),
        float(np.mean(hours)),
        float(np.mean(tasks)),
        follows,
        len(lives),
    )


def _error(values: Floats) -> float:
    """Standard error of a median, robust: some lives are two of one pid, or met a gap."""
    spread = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    return float(1.2533 * spread / len(values) ** 0.5)


def _recent(lives: Sequence[Generation], days: float) -> Lives | None:
    """What all lives share or, where the newest ones tell otherwise, as a release makes them, what those do."""
    every = share(lives, days)
    newest = share(lives[-max(len(lives) // 3, FEWEST_RECENT) :], days) if len(lives) >= 2 * FEWEST_RECENT else None
    if newest is None or every is None:
        return every
    return newest if newest.grows or newest.late.growth < MENDED * every.late.growth else every


def _scatter(values: Floats) -> float:
    """Relative, robust."""
    middle = float(np.median(values))
    return float(np.median(np.abs(values - middle))) / max(abs(middle), 1e-9)


def _done(one: Generation) -> float:
    """Tasks of a life. A rollup's count is that of its end, and a process begins with none."""
    seen_to_begin = one.rolled[0] and one.start_time is not None and one.begin - one.start_time <= one.interval
    return float(np.nanmax(one.tasks) - (0.0 if seen_to_begin else np.nanmin(one.tasks)))


def _counts(one: Generation) -> bool:
    return bool(np.any(np.isfinite(one.tasks)))


def _placed(one: Generation) -> tuple[Floats, Floats, float]:
    """A generation's samples by the part of its life that they were taken in, and how long it lived, hours."""
    start = one.begin if one.start_time is None else min(one.start_time, one.begin)
    # It ended some time before the next sample would have been taken.
    end = one.end + one.interval / 2
    # The middle of the ten minutes in which it began may be before that.
    return (np.maximum(one.times, start) - start) / (end - start), one.sizes, (end - start) / 3600


def _slope(s: Floats, y: Floats, since: float = WARM_SHARE) -> float:
    """KiB by a whole life, of the part since its warm-up: least squares, as a life is short."""
    late = s >= since
    s, y = s[late], y[late]
    if len(s) < 2 or np.ptp(s) <= 0:
        return 0.0
    return float(np.polyfit(s, y, 1)[0])


def _all_grow(lives: Sequence[Life]) -> bool:
    """Whether processes that each would not convince do so together: most of them still grow, and their odds add up.

    By the root of their number only, as what is common to them, such as the load, is no new evidence in each.
    """
    asked = [one.judged for one in lives if one.judged is not None]
    if len(asked) < 2:
        return False
    still = [_still(one) for one in asked]
    # Odds for a growth that does not last count for nothing, those against any growth do.
    odds = sum(one.odds if lasts else min(one.odds, 0.0) for one, lasts in zip(asked, still))
    return sum(still) >= MOST_OF_THEM * len(asked) and odds / len(asked) ** 0.5 >= SURE


def judge(worker: Worker) -> Verdict:
    """The verdict on one worker."""
    last = max(one.end for one in worker.generations)
    living = [one for one in worker.generations if last - one.end <= _near(one)]
    ended = [one for one in worker.generations if last - one.end > _near(one)]
    ended.sort(key=lambda one: one.end)
    lives = [judge_generation(one) for one in living]
    past = [judge_generation(one) for one in ended[-RECYCLES * len(living) :] if one.samples >= LONG_LIFE]
    past = [one for one in past if one.judged is not None]
    # Older ones tell of older releases, and a host that lies could name any number.
    gone = cohorts(ended[-MOST_ENDED:], [*ended[-MOST_ENDED:], *living])
    shared = _recent(gone, worker.span_hours / DAY_HOURS)
    recycled = _recycled(lives, past, shared, cohorts(living, living))
    healthy = [one.generation for one in past if one.judged is not None and not _still(one.judged)]
    if shared is not None and shared.agree < AGREE:
        healthy = ended
    growing = _growing(lives, [] if recycled else healthy)
    # What outlived all that was recycled, as a main process does, is not stopped by recycling.
    oldest = max((one.lived / 3600 for one in gone), default=0.0)
    outlived = [one for one in growing if one.hours > CURED_LIVES * oldest]
    if recycled and not outlived and not (growing and len(gone) < FEWEST_LIVES):
        pattern = Pattern.RECYCLED
    else:
        pattern = Pattern.GROWING if growing else _most_of(lives, past)
    if pattern is Pattern.RECYCLED:
        rate, per_task, follows, odds = _of_lives(shared, past, [*ended[-MOST_ENDED:], *living], ended[-MOST_ENDED:])
    else:
        asked = (outlived if recycled and outlived else _with_their_kind(growing, lives)) or [
            one for one in lives if one.judged
        ]
        rate, odds = _sum([one.rate for one in asked]), max((one.odds for one in asked), default=0.0)
        per_task, follows = _mean([one.per_task for one in asked]), _vote([one.follows for one in asked])
    rate = _widened(rate, LIVES_ERROR if pattern is Pattern.RECYCLED else MODEL_ERROR)
    # Recycling gives the memory back, so that no time is left to tell, unless it is the limit that recycles.
    ends = pattern is Pattern.GROWING or (pattern is Pattern.RECYCLED and _meets_limit(worker))
    level = _level(worker, living)
    return Verdict(
        worker=worker,
        pattern=pattern,
        confidence=min(1 / (1 + exp(-max(odds, SURE) / 2)), MOST_CONFIDENT) if pattern.leaking else None,
        rate=rate,
        kb_per_1000_tasks=None if per_task is None else 1000 * per_task,
        follows=follows if pattern.leaking else None,
        hours_to_high=_until(worker.limits.high_kb, level, rate) if ends else None,
        hours_to_max=_until(worker.limits.max_kb, level, rate) if ends else None,
        lives=(*lives, *past),
        evidence=tuple(_evidence(worker, pattern, lives, past, shared, follows)),
    )


def _meets_limit(worker: Worker) -> bool:
    """Whether its processes end because they met MemoryMax."""
    most = worker.limits.max_kb
    levels = worker.limits.levels
    return bool(worker.limits.oom_kills) or (most is not None and len(levels) > 0 and levels.max() >= NEAR_LIMIT * most)


def _level(worker: Worker, living: Sequence[Generation]) -> tuple[float, float, float]:
    """KiB that count against the limits now, and the least and the most of late: the cgroup's own figures, or what the
    living processes hold.
    """
    now = worker.limits.level_kb
    if now is not None:
        late = np.append(worker.limits.levels[-LATE_FIGURES:], now)
        return now, float(late.min()), float(late.max())
    sizes = [one.sizes[-LATE_FIGURES:] for one in living]
    return (
        float(sum(np.median(each[-LAST_FIGURES:]) for each in sizes)),
        float(sum(each.min() for each in sizes)),
        float(sum(each.max() for each in sizes)),
    )


def _until(limit: int | None, level: tuple[float, float, float], rate: Trend) -> Forecast | None:
    """When a limit is met, with the uncertainty of the rate and of the present level."""
    if limit is None or rate.slope <= 0:
        return None
    now, least, most = (max(0.0, limit - each) for each in level)
    if now == 0:
        return Forecast(0.0, 0.0, 0.0)
    return Forecast(
        now / rate.slope,
        min(most, now) / max(rate.high, rate.slope),
        None if rate.low <= 0 else max(least, now) / rate.low,
    )


def _evidence(
    worker: Worker,
    pattern: Pattern,
    lives: Sequence[Life],
    past: Sequence[Life],
    shared: Lives | None,
    follows: str | None,
) -> list[str]:
    """What a reader should know beside the numbers, a sentence each."""
    said = []
    judged = [one for one in (*lives, *past) if one.judged is not None]
    limits = worker.limits
    if pattern is Pattern.INSUFFICIENT_DATA:
        unsure = [one for one in judged if one.pattern is Pattern.INSUFFICIENT_DATA]
        if unsure:
            said.append("it grows, and may yet flatten: too little was seen to tell; look again after a day")
        else:
            what = "rollups of ten minutes" if any(one.whole for one in worker.generations) else "samples"
            said.append(f"no process has the {FEWEST_FLOORS} {what} after its warm-up that a verdict needs")
    brief = [one for one in worker.generations if one.whole and len(one.times) < FEWEST_ROLLUPS]
    told = pattern.leaking or pattern is Pattern.INSUFFICIENT_DATA
    if not told and 2 * len(brief) > len(worker.generations):
        many = f"{len(brief)} of {len(worker.generations)} processes"
        said.append(f"{many} lived too short for rollups of ten minutes to tell: collect samples")
    if pattern.leaking:
        if pattern is Pattern.RECYCLED and shared is not None and shared.grows:
            said.append(
                f"{shared.lives} processes that have ended grew in the mean by {_mib(shared.growth.slope)} each"
            )
        grew = [one for one in judged if one.judged is not None and _still(one.judged)]
        if grew:
            said.append(f"{len(grew)} of {len(judged)} processes that were judged grew, and went on to the end")
        if follows:
            said.append(
                "growth follows the tasks that are finished"
                if follows == "load"
                else "growth follows the clock, not the tasks"
            )
        if worker.span_hours < DAY_HOURS:
            said.append("seen for less than a day, which cannot tell a leak from the day's load")
    if limits.events_high:
        said.append(f"above MemoryHigh {limits.events_high} times: the kernel slows it down there")
    if limits.oom_kills:
        said.append(f"{limits.oom_kills} OOM kill{'s' * (limits.oom_kills > 1)}")
    if limits.restarts:
        said.append(f"{limits.restarts} restart{'s' * (limits.restarts > 1)} by systemd")
    if pattern.leaking and limits.max_kb is None:
        said.append("no MemoryMax was seen, so that no time is left to tell")
    return said


def _mib(kib: float) -> str:
    return f"{kib / 1024:.3g} MiB"


def _growing(lives: Sequence[Life], healthy: Sequence[Generation]) -> list[Life]:
    """The living processes that grow beyond doubt, and beyond what healthy ones before them did."""
    asked = [one for one in lives if one.judged is not None]
    # Of many that only waver one always seems to grow (Bonferroni).
    sure = SURE + 2 * log(max(1, len(asked)))
    found = [one for one in asked if one.judged is not None and _grows(one.judged, sure)]
    if not found:
        for role in sorted({one.generation.role for one in asked}):
            kind = [one for one in asked if one.generation.role == role]
            if _all_grow(kind):
                found += [one for one in kind if one.judged is not None and _still(one.judged)]
    return [one for one in found if _is_news(one.generation, healthy)]


def _with_their_kind(growing: Sequence[Life], lives: Sequence[Life]) -> list[Life]:
    """Those that grow beyond doubt and, where most of a role do, all of it: the sum would be too small without them."""
    found = []
    for role in sorted({one.generation.role for one in growing}):
        kind = [one for one in lives if one.generation.role == role and one.judged is not None]
        grow = [one for one in kind if one in growing or (one.judged and one.odds > 0 and _still(one.judged))]
        found += kind if len(grow) >= MOST_OF_THEM * len(kind) else grow
    return found


def _is_news(one: Generation, healthy: Sequence[Generation]) -> bool:
    """Whether a process grew by more than any healthy one before it ever did within as long a time, and holds more."""
    age = one.lived
    kind = [other for other in healthy if other.role == one.role]
    before = [other for other in kind if OUTLIVES * other.lived >= age]
    if not before:
        return True
    least = worth(float(one.sizes[0]))
    tenth = max(1, len(one.sizes) // 10)
    held = max(float(growth.without_bursts(other.sizes[_floors(other)]).max()) for other in kind)
    outgrown = _gained(one, age) > max(_gained(other, age) for other in before) + least
    return outgrown and float(np.median(one.sizes[-tenth:])) > held + least


def _floors(one: Generation) -> NDArray[np.intp]:
    return growth.floors(one.times, one.sizes, float(np.mean(one.counts)))


def _gained(one: Generation, age: float) -> float:
    """The most that floors of a process rose within this time, seconds."""
    at = _floors(one)
    times, sizes = one.times[at], growth.without_bursts(one.sizes[at])
    rise = sizes[None, :] - sizes[:, None]
    apart = times[None, :] - times[:, None]
    return float(np.max(np.where((apart >= 0) & (apart <= age), rise, 0.0)))


def _recycled(
    lives: Sequence[Life], past: Sequence[Life], shared: Lives | None, together: Sequence[Generation]
) -> bool:
    """Whether those that have ended grew, and those that live do not speak against it. together: what lives, summed."""
    asked = [one for one in past if one.judged is not None]
    grew = [one for one in asked if one.pattern is Pattern.GROWING]
    if shared is not None and shared.grows:
        # One that has lived twice as long as those before it; the main process may be among them, of another kind.
        kind = [one for one in together if one.lived >= 3600 * CURED_LIVES * shared.hours]
        alive = [judge_generation(one) for one in kind]
        pace, votes = shared.growth.slope / shared.hours, len(together) / 2
    elif shared is not None and shared.agree < AGREE:
        return False
    elif (grew and 2 * len(grew) >= len(asked)) or _all_grow(asked):
        roles = {one.generation.role for one in asked}
        alive = [one for one in lives if one.generation.role in roles]
        pace, votes = float(np.median([one.rate.slope for one in grew or asked])), len(grew) - 1.0
    else:
        return False
    # One that lives and has not grown speaks once it would have.
    cured = [
        one
        for one in alive
        if one.judged is not None and not _still(one.judged) and pace * one.hours >= 2 * worth(one.judged.level)
    ]
    return len(cured) <= votes


def _most_of(lives: Sequence[Life], past: Sequence[Life]) -> Pattern:
    """What most of the observed time was like."""
    spent: dict[Pattern, float] = {}
    for life in (*lives, *past):
        # One that seems to grow was no news, or is not sure.
        pattern = Pattern.PLATEAU if life.pattern is Pattern.GROWING else life.pattern
        spent[pattern] = spent.get(pattern, 0.0) + life.hours
    return max(spent, key=lambda one: spent[one], default=Pattern.INSUFFICIENT_DATA)


def _of_lives(
    shared: Lives | None, past: Sequence[Life], every: Sequence[Generation], ended: Sequence[Generation]
) -> tuple[Trend, float | None, str | None, float]:
    """Rate of all that live side by side, growth a task, what it follows, and odds."""
    if shared is not None and shared.grows:
        factor = _side_by_side(cohorts(every, every), cohorts(ended, every)) / shared.hours
        rate = Trend(*(factor * each for each in (shared.growth.slope, shared.growth.low, shared.growth.high)))
        return rate, shared.growth.slope / shared.tasks if shared.tasks else None, shared.follows, shared.odds
    asked = [one for one in past if one.pattern is Pattern.GROWING] or [one for one in past if one.judged]
    total = sum(one.hours for one in asked)
    factor = _side_by_side(every, [one.generation for one in asked])
    parts = [
        Trend(*(factor * one.hours / total * v for v in (one.rate.slope, one.rate.low, one.rate.high))) for one in asked
    ]
    odds = max(one.odds for one in asked)
    return _sum(parts), _mean([one.per_task for one in asked]), _vote([one.follows for one in asked]), odds


def _widened(rate: Trend, share: float) -> Trend:
    """With an error in all of it besides, a part of the slope."""
    more = share * rate.slope
    return Trend(
        rate.slope, rate.slope - hypot(rate.slope - rate.low, more), rate.slope + hypot(rate.high - rate.slope, more)
    )


def _side_by_side(every: Sequence[Generation], ended: Sequence[Generation]) -> float:
    """How many lives such as those that have ended were lived at a time, in the mean."""
    roles = {one.role for one in ended}
    longest = OUTLIVES * max(one.lived for one in ended)
    kind = [one for one in every if one.role in roles and one.lived <= longest]
    start, end = min(one.begin for one in kind), max(one.end for one in kind)
    # A process is seen from its first sample to its last one, and lives an interval longer.
    lived = sum(one.lived + one.interval for one in kind)
    return max(1.0, lived / max(end - start, 1.0))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _vote(values: Sequence[str | None]) -> str | None:
    known = [value for value in values if value is not None]
    return max(sorted(set(known)), key=known.count) if known else None


def _sum(parts: Sequence[Trend]) -> Trend:
    """Trends of independent errors: half intervals add as squares."""
    slope = sum(one.slope for one in parts)
    below = sum((one.slope - one.low) ** 2 for one in parts) ** 0.5
    above = sum((one.high - one.slope) ** 2 for one in parts) ** 0.5
    return Trend(slope, slope - below, slope + above)
