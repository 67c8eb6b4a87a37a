"""Whether one series of memory grows without end, and how fast: pure functions over a series of floors.

Two explanations compete. In the bounded one all that was seen comes to an end: a level, a warm-up that approaches its
own, a cache that fills to its bound, up to three steps, the day's load. In the unbounded one there is a slope besides,
which went on until the last sample. Both are fitted by least squares that respect autocorrelation, and compared by
Schwarz's criterion (BIC; Annals of Statistics 6, 1978), which makes each pay for what it has to assume.
docs/detection.md tells why, and what this is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Floors of a series. More tell no more and cost their square.
MOST_FLOORS = 120
# Fewer floors than this cannot tell a line from what bends.
FEWEST_FLOORS = 12
# Of so many samples one is no task's spike.
SAMPLES_A_FLOOR = 4
# What a warm-up may need of the span to fall to 1/e, where it is to explain all of the rise. One that needs more has
# not flattened in what was seen; in the first hours of a life it is believed all the same.
WARM_UPS = (0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 1.0)
LONGEST_WARM_UP, LONGEST_WARM_UP_HOURS = 0.4, 3.0
# Beside a slope that goes on, a longer one is the slope.
LONGEST_BESIDE = 0.25
# Parts of the span at which growth may have stopped, or begun; it must have gone on for the last 40 % to be judged.
KNOTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
LATEST_BEGIN = 0.6
# A fourth step is no longer an accident but how it grows.
MOST_STEPS = 3
# Floors on either side of a step: what is shorter is a burst, or has no level yet.
STEP_EDGE = 3
# What the kernel's counters, batched by CPU, and an allocator's chunks leave uncertain, KiB.
RESOLUTION_KB = 64.0
# Floors to either side that tell a burst.
BURST = 3
# Residuals beyond so many robust standard deviations are bursts, and count as so many.
CLIP = 4.0
# Autocorrelation above this cannot be told from a walk without a level in so few floors.
MOST_CORRELATED = 0.97
# What memory never gave back is asked until here: the last floors are followed by too few to be kept for good.
KEPT_UNTIL = 0.8
RATCHET_PARTS = 12
# Of what had grown, what a trim must have left to be none of a sawtooth's teeth.
LEFT_BY_TRIM = 0.15
# Parts of those in which what is kept must have risen to be growth in lumps. Of n tasks of random size the largest so
# far changes log(n) times, and most of it early (Renyi 1962).
RATCHETS = 9
# Of an even rise, what a part must have to count as one in which it rose.
RATCHET_LEAST = 0.1
# Steps that make up this much of the slope beside them are no accidents.
LUMPY = 0.5
# Of a whitened column, below which it is a sum of the others.
LEAST_POWER = 1e-9
# Without correlation first, then with that of what was left.
TURNS = 3
DAY_HOURS = 24.0
# From this many days on the wave of a day is looked for, with so many harmonics.
WAVES = ((1.0, 1), (1.5, 2), (2.5, 4))


class Shape(str, Enum):
    """What the best bounded explanation of a series is."""

    LEVEL = "level"
    WARM_UP = "warm_up"
    FILL = "fill"


SHAPES = (*((Shape.WARM_UP, part) for part in WARM_UPS), *((Shape.FILL, part) for part in KNOTS))


@dataclass(frozen=True)
class Trend:
    """A slope, y a unit of x, with its 95 % interval."""

    slope: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Floors of one process, or of several put together: y in KiB over x, ascending, which is hours or tasks.

    hours is the clock's, for the wave of the day, load the rate of tasks; either may be unknown. most_steps: as many
    may be accidents.
    """

    x: Floats
    y: Floats
    hours: Floats | None = None
    load: Floats | None = None
    most_steps: int = MOST_STEPS


@dataclass(frozen=True)
class Fit:
    """One explanation, fitted. slope and its standard error are by the whole span, and hold since this part of it.

    loaded is what the day and the load are of y; without_load is y less that and less a warm-up, without_steps less the
    steps too.
    """

    bic: float
    shape: Shape
    steps: tuple[int, ...]
    parameters: int
    fitted: Floats
    residuals: Floats
    loaded: Floats
    without_load: Floats
    without_steps: Floats
    slope: float = 0.0
    error: float = 0.0
    since: float = 0.0


@dataclass(frozen=True)
class Judged:
    """A series, judged.

    odds: how much better the unbounded explanation is, as twice the logarithm of a Bayes factor (Kass and Raftery, JASA
    90, 1995), below 0 where the bounded one is better. growth: KiB that it grew by in what it says is still going on.
    trend: KiB a unit of x. lasting and kept: what the last third has of that slope, and what of it memory never gave
    back, as shares. ratchet: parts of the span, of RATCHET_PARTS, in which the memory that is never given back rose;
    even: the mean of those rises over its standard error. record: KiB by which the last tenth is above all that came
    before growth began.
    correlation: of neighbouring residuals. noise: their robust standard deviation, KiB. wave: what the day and
    the load are of each floor, KiB. first, level: KiB in the first and the last tenth.
    """

    odds: float
    growth: float
    trend: Trend
    lasting: float
    kept: float
    ratchet: int
    even: float
    record: float
    bounded: Fit
    unbounded: Fit
    correlation: float
    noise: float
    wave: Floats
    first: float
    level: float


def floors(x: Floats, sizes: Floats, each: float = 1.0) -> NDArray[np.intp]:
    """Indices of the smallest size in each of up to MOST_FLOORS equal parts of x, which is ascending. Empty parts give
    none. each: of how many samples a size is the smallest itself, in the mean.

    Equal in x, and not in samples, so that a sampler that was faster for a while does not weigh more; but where long
    gaps leave too few parts with samples, in samples.
    """
    number = int(min(MOST_FLOORS, max(len(x) * each // SAMPLES_A_FLOOR, FEWEST_FLOORS), len(x)))
    span = x[-1] - x[0]
    if span <= 0:
        return np.array([int(np.argmin(sizes))])
    part = np.minimum(((x - x[0]) / span * number).astype(int), number - 1)
    if len(np.unique(part)) < FEWEST_FLOORS <= len(np.unique(x)):
        part = np.arange(len(x)) * number // len(x)
    order = np.lexsort((np.arange(len(x)), sizes, part))
    first = np.flatnonzero(np.diff(part[order], prepend=-1))
    return np.sort(order[first])


def without_bursts(y: Floats) -> Floats:
    """Floors of which rises that ended again within 2 BURST floors are cut to what the others' noise reaches.

    What stands is the morphological opening (Serra 1982), least of the neighbours and then the largest of those, which
    leaves a line, a step and a fall as they are.
    """
    reach = min(BURST, len(y) // FEWEST_FLOORS // 2)
    if not reach:
        return y
    windows = np.lib.stride_tricks.sliding_window_view
    # Beyond the ends it goes on as it came, or a line would be cut there.
    padded = np.pad(y, 2 * reach, mode="reflect", reflect_type="odd")
    opened = windows(windows(padded, 2 * reach + 1).min(axis=1), 2 * reach + 1).max(axis=1)
    above = y - opened
    spread = 1.4826 * float(np.median(np.abs(above - np.median(above)))) + RESOLUTION_KB
    return np.asarray(np.minimum(y, opened + float(np.median(above)) + CLIP * spread))


def _waves(hours: Floats) -> Floats:
    days = float(hours[-1] - hours[0]) / DAY_HOURS
    number = max((harmonics for least, harmonics in WAVES if days >= least), default=0)
    turns = [2 * np.pi * (k + 1) * hours / DAY_HOURS for k in range(number)]
    waves = [f(turn) for turn in turns for f in (np.cos, np.sin)]
    return np.array(waves, dtype=float).reshape(len(waves), len(hours)).T


class _Whitener:
    """Takes AR(1) noise out of columns (Prais and Winsten 1954), floors that are missing respected."""

    def __init__(self, at: Floats, correlation: float) -> None:
        apart = np.maximum(np.round(np.diff(at)), 1.0)
        self.keep = correlation**apart
        self.scale = 1 / np.sqrt(1 - self.keep**2)

    def __call__(self, columns: Floats) -> Floats:
        out = np.array(columns, dtype=float)
        if columns.ndim == 1:
            out[1:] = (columns[1:] - self.keep * columns[:-1]) * self.scale
        else:
            out[1:] = (columns[1:] - self.keep[:, None] * columns[:-1]) * self.scale[:, None]
        return out


def _correlation(residuals: Floats, parameters: int) -> float:
    """Autocorrelation of an AR(1) whose mean is as uncertain as that of these residuals.

    From the first lag and, where noise of two kinds is mixed, from the sum over more lags; its bias to the low side, by
    what was fitted and by the few values (Kendall, Biometrika 41, 1954), is put back.
    """
    n = len(residuals)
    power = float(residuals @ residuals)
    if power <= 0 or n < 4:
        return 0.0
    lags = np.arange(1, max(2, n // 6))
    seen = np.array([float(residuals[lag:] @ residuals[:-lag]) / power for lag in lags])
    first = max(0.0, float(seen[0]))
    first += (1 + 3 * first + parameters * (1 + first) / 2) / n
    # Up to the first lag that is not above 0: beyond it there is only noise.
    end = int(np.argmax(seen <= 0)) if np.any(seen <= 0) else len(seen)
    inflation = 1 + 2 * float(np.sum((1 - lags[:end] / n) * seen[:end])) if end else 1.0
    return float(np.clip(max(first, (inflation - 1) / (inflation + 1)), 0.0, MOST_CORRELATED))


@dataclass(frozen=True)
class _Try:
    """One explanation, not yet solved for more than its slope: which of SHAPES, and which of the problem's jumps."""

    bic: float
    unbounded: bool
    shapes: tuple[int, ...]
    steps: tuple[int, ...]
    parameters: int
    slope: float
    error: float


class _Problem:
    """All that is shared by the fits of one series at one correlation."""

    def __init__(self, series: Series, correlation: float) -> None:
        x, n = series.x, len(series.x)
        self.u = (x - x[0]) / (x[-1] - x[0])
        self.y = series.y
        self.most_steps = series.most_steps
        hours = float(series.hours[-1] - series.hours[0]) if series.hours is not None else np.inf
        self.longest = max(LONGEST_WARM_UP, LONGEST_WARM_UP_HOURS / max(hours, 1e-9))
        self.white = _Whitener(self.u * (n - 1), correlation)
        wave = _waves(series.hours) if series.hours is not None else np.empty((n, 0))
        nuisance = [np.ones(n)]
        if series.load is not None and np.std(series.load) > 0:
            nuisance.append((series.load - np.mean(series.load)) / np.std(series.load))
        self.base = np.column_stack([*nuisance, wave])
        self.positions = np.arange(STEP_EDGE, n - STEP_EDGE + 1)
        self.jumps = (np.arange(n)[:, None] >= self.positions[None, :]).astype(float)
        self.shapes = np.column_stack(
            [np.exp(-self.u / part) if one is Shape.WARM_UP else np.minimum(self.u, part) for one, part in SHAPES]
        )
        # All that may be asked, whitened and less what the base explains of it: y, the line, the shapes, the steps.
        self.white_y = self.white(self.y)
        columns = np.column_stack([self.white_y, self.white(np.column_stack([self.u, self.shapes, self.jumps]))])
        q, _ = np.linalg.qr(self.white(self.base))
        self.apart = columns - q @ (q.T @ columns)

    def fits(self, unbounded: bool) -> list[_Try]:
        """Explanations of one kind, the best one first: with no shape and with the two best ones, and with steps.

        What is bounded may have two shapes, as the unbounded has one beside its slope.
        """
        apart = _less(self.apart, 1) if unbounded else self.apart
        gains = _gains(apart[:, 0], apart[:, 2 : 2 + len(SHAPES)])
        most = {
            Shape.WARM_UP: LONGEST_BESIDE if unbounded else self.longest,
            Shape.FILL: LATEST_BEGIN if unbounded else 1,
        }
        gains[[part > most[one] for one, part in SHAPES]] = -1.0
        found = self._with_steps(self.apart, (), unbounded)
        for at in map(int, np.argsort(-gains)[:2]):
            found += self._with_steps(_less(self.apart, 2 + at), (at,), unbounded)
        if not unbounded:
            first = int(np.argmax(gains))
            apart = _less(self.apart, 2 + first)
            second = int(np.argmax(np.where(gains < 0, -1.0, _gains(apart[:, 0], apart[:, 2 : 2 + len(SHAPES)]))))
            found += self._with_steps(_less(apart, 2 + second), (first, second), unbounded)
        return sorted(found, key=lambda one: one.bic)

    def line(self) -> float:
        """BIC of nothing but a line."""
        return self._with_steps(self.apart, (), True)[0].bic

    def _with_steps(self, apart: Floats, shapes: tuple[int, ...], unbounded: bool) -> list[_Try]:
        """With no step, with the one that explains most, and so on. Two may pay where one does not, as of a burst.

        Each step that is taken is taken out of all that is left (Gram and Schmidt), so that none is solved anew.
        """
        n = len(self.y)
        # What the line tells that nothing else does is its slope (Frisch and Waugh, Econometrica 1, 1933).
        y, line = apart[:, 0], apart[:, 1]
        left = np.column_stack([y, apart[:, 2 + len(SHAPES) :]])
        if unbounded:
            left = _less(np.column_stack([left, line]), left.shape[1])[:, :-1]
        found, steps = list[_Try](), list[int]()
        while True:
            power = float(left[:, 0] @ left[:, 0]) + n * RESOLUTION_KB**2
            # A step, and a shape, have a place besides their size.
            parameters = self.base.shape[1] + unbounded + 2 * len(shapes) + 2 * len(steps)
            slope = error = 0.0
            if unbounded:
                own = max(float(line @ line), LEAST_POWER)
                slope, error = float(line @ y) / own, float(np.sqrt(power / max(1, n - parameters) / own))
            bic = n * float(np.log(power / n)) + parameters * float(np.log(n))
            found.append(_Try(bic, unbounded, shapes, tuple(steps), parameters, slope, error))
            if len(steps) == self.most_steps or left.shape[1] < 2:
                return found
            gain = _gains(left[:, 0], left[:, 1:])
            for one in steps:
                gain[max(0, one - STEP_EDGE + 1) : one + STEP_EDGE] = 0.0
            at = int(np.argmax(gain))
            if gain[at] <= 0:
                return found
            steps.append(at)
            if unbounded:
                # The step as it is beside all others but the line.
                whole = apart[:, 2 + len(SHAPES) + at]
                step = left[:, 1 + at] + line * float(line @ whole) / max(float(line @ line), LEAST_POWER)
                step = step / np.linalg.norm(step)
                line, y = line - step * float(step @ line), y - step * float(step @ y)
            left = _less(left, 1 + at)

    def solved(self, one: _Try) -> Fit:
        """An explanation with all that is asked of it later."""
        first = int(one.unbounded)
        parts = [self.u[:, None]] if one.unbounded else []
        parts += [self.base, self.shapes[:, list(one.shapes)]]
        number = sum(part.shape[1] for part in parts)
        design = np.hstack([*parts, self.jumps[:, list(one.steps)]])
        solved = np.linalg.lstsq(self.white(design), self.white_y, rcond=1e-10)[0]
        fitted = design @ solved
        kind, part = SHAPES[one.shapes[0]] if one.shapes else (Shape.LEVEL, 0.0)
        load = slice(first + 1, first + self.base.shape[1] + (kind is Shape.WARM_UP))
        without_load = self.y - design[:, load] @ solved[load]
        waves = slice(first + 1, first + self.base.shape[1])
        return Fit(
            loaded=design[:, waves] @ solved[waves],
            bic=one.bic,
            shape=kind,
            steps=tuple(int(self.positions[at]) for at in one.steps),
            parameters=one.parameters,
            fitted=fitted,
            residuals=self.y - fitted,
            without_load=without_load,
            without_steps=without_load - design[:, number:] @ solved[number:],
            slope=one.slope,
            error=one.error,
            since=part if kind is Shape.FILL else 0.0,
        )


def _less(columns: Floats, at: int) -> Floats:
    """Columns less what one of them explains of each."""
    one = columns[:, at]
    power = float(one @ one)
    return columns if power < LEAST_POWER else columns - np.outer(one, (one @ columns) / power)


def _gains(left: Floats, apart: Floats) -> Floats:
    """What the square sum of what is left loses by each of these columns."""
    power = np.einsum("ij,ij->j", apart, apart)
    return np.where(power > LEAST_POWER, (left @ apart) ** 2 / np.maximum(power, LEAST_POWER), 0.0)


def judge(series: Series, least: float = 0.0) -> Judged:
    """Both explanations of a series of FEWEST_FLOORS or more floors, and which is the better one.

    least: growth that matters, KiB. A series that moves by less is not looked at twice.
    """
    y, correlation = without_bursts(series.y), 0.0
    turns = TURNS if float(np.ptp(y)) >= least else 1
    for turn in range(turns):
        problem = _Problem(replace(series, y=y), correlation)
        going_on = problem.fits(True)
        bounded, unbounded = problem.solved(problem.fits(False)[0]), problem.solved(going_on[0])
        better = min(bounded, unbounded, key=lambda one: one.bic)
        if turn < turns - 1:
            # Bursts that no step explains count as much as they may, and no more.
            most = CLIP * (1.4826 * float(np.median(np.abs(better.residuals))) + RESOLUTION_KB)
            y = better.fitted + np.clip(better.residuals, -most, most)
            correlation = _correlation(y - better.fitted, better.parameters)
    span = float(series.x[-1] - series.x[0])
    kept = _trim_undone(unbounded)
    rises = _rises(problem.u, unbounded.since, kept)
    ratchet = int(np.sum(rises > RATCHET_LEAST * max(float(np.mean(rises)), 0.0)))
    slope, error = _averaged(going_on)
    free = max(3.0, len(y) * (1 - correlation) / (1 + correlation) - unbounded.parameters)
    reach = student(free) * error
    stepped = unbounded.without_load - unbounded.without_steps
    if ratchet >= RATCHETS and stepped[-1] - stepped[0] >= LUMPY * max(unbounded.slope, 0.0):
        # The steps are how it grows: what the parts add, as so many draws.
        slope = float(np.mean(rises)) * RATCHET_PARTS / (1 - unbounded.since)
        reach = student(RATCHET_PARTS - 1) * float(np.std(rises, ddof=1)) * RATCHET_PARTS**0.5 / (1 - unbounded.since)
    odds = bounded.bic - unbounded.bic
    tenth = max(1, len(y) // 10)
    return Judged(
        odds=odds if unbounded.slope > 0 else min(0.0, odds),
        growth=unbounded.slope * (1 - unbounded.since),
        trend=Trend(slope / span, (slope - reach) / span, (slope + reach) / span),
        lasting=_lasting(problem.u, unbounded),
        kept=_kept(problem.u, unbounded, kept),
        ratchet=ratchet,
        even=float(np.mean(rises)) * RATCHET_PARTS**0.5 / max(float(np.std(rises, ddof=1)), 1e-9),
        record=_record(problem.u, unbounded.since, kept),
        bounded=bounded,
        unbounded=unbounded,
        correlation=correlation,
        noise=1.4826 * float(np.median(np.abs(better.residuals))),
        wave=better.loaded,
        first=float(np.median(y[:tenth])),
        level=float(np.median(y[-tenth:])),
    )


def _averaged(fits: Sequence[_Try]) -> tuple[float, float]:
    """Slope and standard error over all explanations that go on, each by its likelihood (Hoeting et al., Statistical
    Science 14, 1999): which of them is right is not known either.
    """
    weights = np.exp([(fits[0].bic - one.bic) / 2 for one in fits])
    weights /= weights.sum()
    slopes, errors = np.array([one.slope for one in fits]), np.array([one.error for one in fits])
    middle = float(weights @ slopes)
    return middle, float(np.sqrt(weights @ (errors**2 + (slopes - middle) ** 2)))


def _lasting(u: Floats, fit: Fit) -> float:
    """The slope of the last third as a share of the whole slope, steps left out."""
    last = u >= 2 / 3
    if fit.slope <= 0 or last.sum() < 3:
        return 0.0
    return float(np.polyfit(u[last], fit.without_steps[last], 1)[0]) / fit.slope


def _trim_undone(fit: Fit) -> Floats:
    """What was held less the load, and less the one fall there is, if any, that did not give back all that had grown.

    Memory that was trimmed once and goes on growing is a leak; what falls time and again, or to where it began, is not.
    """
    y = fit.without_load
    stepped = y - fit.without_steps
    changes = np.diff(stepped)
    at = int(np.argmin(changes)) + 1
    if at < 2 or changes[at - 1] >= 0:
        return y
    fall = -float(changes[max(0, at - STEP_EDGE - 1) : at + STEP_EDGE].sum())
    others = -float(changes[changes < 0].sum()) - fall
    first, before = float(np.median(y[:STEP_EDGE])), float(np.median(y[max(0, at - 2 * STEP_EDGE) : at - 1]))
    if others > fall / 2 or fall > (1 - LEFT_BY_TRIM) * (before - first):
        return y
    # Two steps of a fit may share one fall.
    begin, end = max(0, at - STEP_EDGE), min(len(y), at + STEP_EDGE)
    undone = y + np.where(np.arange(len(y)) >= at, fall, 0.0)
    undone[begin:end] = np.interp(
        np.arange(begin, end), [begin - 1, end], [undone[max(0, begin - 1)], undone[min(end, len(y) - 1)]]
    )
    return undone


def _kept(u: Floats, fit: Fit, y: Floats) -> float:
    """What memory kept for good between where growth began and a fifth before the end, as a share of the growth."""
    if fit.slope <= 0:
        return 0.0
    kept = _never_below(y)
    begin, end = np.searchsorted(u, [fit.since, fit.since + KEPT_UNTIL * (1 - fit.since)])
    if u[end] <= u[begin]:
        return 0.0
    return float(kept[end] - kept[begin]) / (fit.slope * float(u[end] - u[begin]))


def _record(u: Floats, since: float, y: Floats) -> float:
    before = u <= since
    tenth = max(1, len(u) // 10)
    return float(np.median(y[-tenth:]) - np.max(y[before]))


def _never_below(y: Floats) -> Floats:
    """The memory that is never given back: the least of all that comes after."""
    return np.asarray(np.minimum.accumulate(y[::-1])[::-1])


def _rises(u: Floats, since: float, y: Floats) -> Floats:
    """How much each of RATCHET_PARTS equal parts, from where growth began, adds to what memory never gives back."""
    return np.diff(np.interp(np.linspace(since, 1, RATCHET_PARTS + 1), u, _never_below(y)))


def profile(
    lives: Sequence[tuple[Floats, Floats]], parts: int, hours: Sequence[Floats] | None = None
) -> tuple[Floats, Floats]:
    """What generations of one kind do over their life: (part of a life 0..1, KiB beside the mean), where any was seen.

    lives: (part of its life, KiB) of each. Each generation has a level of its own, and what is left is common to all
    (two-way fixed effects, by least squares); hours, of the clock, take out a wave of the day besides. Bursts are cut.
    """
    s = np.concatenate([one for one, _ in lives])
    y = np.concatenate([two for _, two in lives])
    who = np.repeat(np.arange(len(lives)), [len(one) for one, _ in lives])
    part = np.minimum((s * parts).astype(int), parts - 1)
    seen, part = np.unique(part, return_inverse=True)
    columns = (part[:, None] == np.arange(1, len(seen))[None, :]).astype(float)
    if hours is not None:
        turn = 2 * np.pi * np.concatenate(hours) / DAY_HOURS
        columns = np.hstack([columns, *[f(k * turn)[:, None] for k in (1, 2, 3, 4) for f in (np.cos, np.sin)]])
    counts = np.bincount(who).astype(float)

    def centred(values: Floats) -> Floats:
        if values.ndim == 1:
            return np.asarray(values - (np.bincount(who, values) / counts)[who])
        return np.column_stack([centred(values[:, k]) for k in range(values.shape[1])])

    design, kept = centred(columns), y
    square = design.T @ design
    for _ in range(3):
        solved = np.linalg.lstsq(square, design.T @ centred(kept), rcond=1e-10)[0]
        left = centred(kept) - design @ solved
        most = CLIP * (1.4826 * float(np.median(np.abs(left))) + RESOLUTION_KB)
        kept = kept - left + np.clip(left, -most, most)
    at = np.bincount(part, s) / np.bincount(part)
    return at, np.concatenate([[0.0], solved[: len(seen) - 1]]) + float(np.median(y))


def line(x: Floats, y: Floats, load: Floats, correlation: float) -> float:
    """BIC of y as a line over x, besides what follows the present load."""
    series = Series(x, y, None, load)
    problem = _Problem(series, correlation)
    return problem.line()


def student(free: float, z: float = 1.959964) -> float:
    """The quantile of Student's t where the normal one is z, by default 97.5 % (Abramowitz and Stegun 26.7.5)."""
    return float(
        z
        + (z**3 + z) / (4 * free)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    )
