"""Simulated workers with labels: the part of the labelled set that the detection was tuned on.

A worker is a list of processes, each with a size that is put together of parts: what it is after its imports, what
warms up, what follows the load, what a task takes for its time, noise, and in a leak what grows. What it is judged by
beside this, and was not tuned on, is in heldout.py and recorded/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from plimsoll.series import Floats, Generation, Limits, Worker

T0 = 1_781_481_600.0  # a Monday, 00:00 UTC
HOUR, DAY = 3600.0, 86400.0
MIB = 1024.0
Rng = np.random.Generator


@dataclass(frozen=True)
class Case:
    """kb_per_hour: true growth by the end of all processes together, as sets.py has it; None where it does not leak."""

    kind: str
    seed: int
    leaking: bool
    kb_per_hour: float | None
    follows: str | None
    worker: Worker


@dataclass(frozen=True)
class Setting:
    """What all processes of a worker share: when it is looked at, how busy it is, and how large a process is (KiB)."""

    start: float
    end: float
    interval: float
    load: Callable[[Floats], Floats]
    level: float
    noise: float
    slots: int

    @property
    def hours(self) -> float:
        return (self.end - self.start) / HOUR

    def busy(self) -> float:
        """Mean load of the last whole days, one at least, even if the span is shorter."""
        days = max(1, int(self.hours // 24))
        return float(np.mean(self.load(np.arange(self.end - days * DAY, self.end, 60.0))))

    def tasks(self, start: float, times: Floats) -> Floats:
        """Tasks of one process until then, at one a second in the mean."""
        grid = np.arange(start, times[-1] + 60.0, 60.0)
        done = np.concatenate([[0.0], np.cumsum(self.load(grid))[:-1] * 60.0])
        return np.asarray(np.floor(np.interp(times, grid, done)))


def steady(times: Floats) -> Floats:
    return np.ones_like(times)


def daily(rng: Rng, swing: float = 0.8, weekend: float = 1.0) -> Callable[[Floats], Floats]:
    """Load of a day: not a sine, each day a little different, from 1 - swing to 1 + swing."""
    peak, sharp, days = rng.uniform(0, 24), rng.uniform(1.0, 2.5), rng.uniform(0.9, 1.1, 400)

    def load(times: Floats) -> Floats:
        phase = 2 * np.pi * ((times - T0) / HOUR - peak) / 24
        wave = np.sign(np.cos(phase)) * np.abs(np.cos(phase)) ** (1 / sharp)
        # In the middle of the night a new day begins, so that nothing jumps.
        day = np.floor((times - T0) / DAY - peak / 24 + 0.5).astype(int)
        off = np.where((np.floor((times - T0) / DAY).astype(int) % 7) >= 5, weekend, 1.0)
        return np.asarray(np.clip(1 + swing * wave * days[day % 400], 0.02, None) * off)

    return load


def setting(rng: Rng, hours: tuple[float, float] = (24, 168), load: Any = None, slots: int | None = None) -> Setting:
    """hours: the span, drawn between the two."""
    start = T0 + rng.uniform(0, 7) * DAY
    level = float(np.exp(rng.uniform(np.log(50), np.log(1500)))) * MIB
    return Setting(
        start=start,
        end=start + float(np.exp(rng.uniform(*np.log(hours)))) * HOUR,
        interval=float(rng.choice([30, 60, 60, 60, 120, 300])),
        load=load or steady,
        level=level,
        noise=level * float(rng.uniform(0.002, 0.02)),
        slots=slots or int(rng.choice([1, 1, 2, 4, 8])),
    )


def wander(rng: Rng, times: Floats, kb: float, hours: float) -> Floats:
    """Noise around 0 of this standard deviation that forgets in so many hours (Ornstein and Uhlenbeck)."""
    steps = np.diff(times, prepend=times[0]) / HOUR
    keep = np.exp(-steps / hours)
    draws = rng.normal(size=len(times)) * kb
    out = np.empty(len(times))
    value = draws[0]
    for i in range(len(times)):
        value = keep[i] * value + np.sqrt(1 - keep[i] ** 2) * draws[i]
        out[i] = value
    return out


def process(
    rng: Rng,
    of: Setting,
    extra: Callable[[Floats, Floats], Floats | float],
    start: float | None = None,
    end: float | None = None,
    role: str = "child",
    spikes: float = 0.3,
) -> Generation:
    """One process. extra gives KiB above its level, of times (Unix s) and of tasks that it has done."""
    start = of.start - rng.uniform(0, 300) if start is None else start
    end = of.end if end is None else min(end, of.end)
    first = max(of.start, start)
    times = np.arange(np.ceil(first / of.interval) * of.interval, end, of.interval) + rng.uniform(0, 0.2)
    if len(times) < 2:
        times = np.array([first + 1.0, first + 1.0 + of.interval])
    tasks = of.tasks(start, times)
    sizes = of.level * rng.uniform(0.97, 1.03) + extra(times, tasks)
    # What a task takes while it runs is above the floor, as often as there is load.
    running = rng.random(len(times)) < spikes * np.clip(of.load(times), 0, 2) / 2
    sizes = sizes + np.where(running, rng.exponential(3 * of.noise, len(times)), 0.0)
    sizes = sizes + np.abs(rng.normal(0, of.noise * 0.3, len(times)))
    sizes = sizes + wander(rng, times, of.noise * rng.uniform(0.2, 0.7), rng.uniform(0.05, 1.0))
    sizes = np.maximum(np.round(sizes / 4) * 4, 4096.0)
    counts = np.ones(len(times), dtype=np.uint32)
    return Generation(int(rng.integers(300, 60000)), start, role, times, sizes, tasks, counts)


def main_of(rng: Rng, of: Setting) -> Generation:
    """A main process of a prefork pool: it does no task, and is flat."""
    one = process(rng, replace(of, level=of.level * 0.8), lambda t, c: 0.0, role="main", spikes=0.0)
    return replace(one, tasks=np.full(len(one.times), np.nan))


def warm(of: Setting, times: Floats, start: float, kb: float, hours: float) -> Floats:
    return np.asarray(kb * (1 - np.exp(-(times - start) / HOUR / hours)))


Processes = list[Generation]
Kind = Callable[[Rng], tuple[Processes, Setting, float | None, str | None]]


def _worker(rng: Rng, of: Setting, extra: Callable[[int], Any], **more: Any) -> Processes:
    children = [process(rng, of, extra(slot), **more) for slot in range(of.slots)]
    return children if of.slots == 1 else [main_of(rng, of), *children]


def _recycled(
    rng: Rng, of: Setting, extra: Callable[[float], Callable[[Floats, Floats], Any]], life: Callable[[float], float]
) -> Processes:
    """Slots whose children follow one another; life gives seconds, of the start."""
    found = [main_of(rng, of)]
    for _ in range(of.slots):
        start = of.start - rng.uniform(0, 1) * life(of.start)
        while start < of.end:
            end = start + life(start)
            if end > of.start + 2 * of.interval:
                found.append(process(rng, of, extra(start), start=start, end=end))
            start = end + 1.0
    return found


# ---- leaks ----


def _growth(rng: Rng, of: Setting, share: tuple[float, float] = (0.15, 2.5)) -> float:
    """KiB an hour and process, so that the span adds this share of the level."""
    return float(np.exp(rng.uniform(*np.log(share)))) * of.level / of.hours


def growing(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    rate = _growth(rng, of)
    return _worker(rng, of, lambda _: lambda t, c: rate * (t - of.start) / HOUR), of, rate * of.slots, None


def slow_under_swing(rng: Rng) -> Any:
    of = replace(setting(rng, (80, 200), daily(rng), 1), level=rng.uniform(100, 400) * MIB)
    rate, swing = rng.uniform(0.7, 1.5) * MIB, rng.uniform(20, 35) * MIB
    return (
        _worker(rng, of, lambda _: lambda t, c: rate * (t - of.start) / HOUR + swing / 2 * of.load(t)),
        of,
        rate,
        "time",
    )


def by_load(rng: Rng) -> Any:
    of = setting(rng, (72, 168), daily(rng, swing=0.98))
    rate = _growth(rng, of)
    return _worker(rng, of, lambda _: lambda t, c: rate / HOUR * (c - c[0])), of, of.busy() * rate * of.slots, "load"


def by_time_under_load(rng: Rng) -> Any:
    of = setting(rng, (72, 168), daily(rng, swing=0.98))
    rate = _growth(rng, of, (0.3, 2.5))
    return (
        _worker(rng, of, lambda _: lambda t, c: rate * (t - of.start) / HOUR + 3 * of.noise * of.load(t)),
        of,
        rate * of.slots,
        "time",
    )


def recycled_by_memory(rng: Rng) -> Any:
    of = setting(rng, (8, 96), daily(rng, 0.6) if rng.random() < 0.5 else None, int(rng.choice([1, 2, 4])))
    most = rng.uniform(0.3, 1.5) * of.level
    life = rng.uniform(0.4, 6) * HOUR
    rate = most / life

    def of_life(start: float) -> float:
        # Until the tasks have leaked so much.
        grid = np.arange(start, start + 8 * life, 60.0)
        done = np.cumsum(of.load(grid)) * 60
        at = int(np.searchsorted(done * rate, most * rng.uniform(0.95, 1.05)))
        return float(grid[min(at, len(grid) - 1)] - start + 60)

    return (
        _recycled(rng, of, lambda s: lambda t, c: rate * c, of_life),
        of,
        rate * HOUR * of.slots * of.busy(),
        None,
    )


def recycled_by_tasks(rng: Rng) -> Any:
    of = setting(rng, (8, 48), None, int(rng.choice([1, 2, 4])))
    life = rng.uniform(8, 120) * of.interval
    of = replace(of, end=min(of.end, of.start + 80 * life)) if of.hours * HOUR > 80 * life else of
    rate = rng.uniform(0.15, 1.0) * of.level / life
    warmed, hours = rng.uniform(0, 0.3) * of.level, life / HOUR * rng.uniform(0.02, 0.1)
    return (
        _recycled(
            rng,
            of,
            lambda s: lambda t, c: rate * c + warm(of, t, s, warmed, hours),
            lambda s: life * rng.uniform(0.95, 1.05),
        ),
        of,
        rate * HOUR * of.slots,
        None,
    )


def killed_and_again(rng: Rng) -> Any:
    of = setting(rng, (24, 168), None, 1)
    lives = int(rng.integers(3, 7))
    life = (of.end - of.start) / (lives - 0.4)
    rate = rng.uniform(0.4, 3) * of.level / life * HOUR
    found, start = [], of.start
    while start < of.end:
        end = start + life * rng.uniform(0.9, 1.1)
        found.append(process(rng, of, lambda t, c, s=start: rate * (t - s) / HOUR, start=start, end=end, role="main"))
        start = end + rng.uniform(5, 60)
    return found, of, rate, None


def nightly_restart(rng: Rng) -> Any:
    of = setting(rng, (96, 200), daily(rng), int(rng.choice([1, 2])))
    rate = rng.uniform(0.15, 0.8) * of.level / 24
    hour = rng.uniform(0, 24) * HOUR
    swing = rng.uniform(0, 0.5) * rate * 24
    found = []
    day = np.floor(of.start / DAY) * DAY + hour - DAY
    while day < of.end:
        for _ in range(of.slots):
            one = process(
                rng, of,
                lambda t, c, s=day: (
                    rate * (t - s) / HOUR + warm(of, t, s, 0.1 * of.level, 0.3) + swing / 2 * of.load(t)
                ),
                start=day, end=day + DAY - 20,
            )  # fmt: skip
            if one.times[0] < one.times[-1] - 10 * of.interval:
                found.append(one)
        day += DAY
    return found, of, rate * of.slots, None


def one_of_many(rng: Rng) -> Any:
    of = setting(rng, (12, 120), None, int(rng.choice([4, 8])))
    rate = _growth(rng, of, (0.3, 2.5))
    return (
        _worker(rng, of, lambda slot: lambda t, c: rate * (t - of.start) / HOUR if slot == 1 else 0.0 * t),
        of,
        rate,
        None,
    )


def in_main(rng: Rng) -> Any:
    of = setting(rng, (12, 120), None, 4)
    rate = _growth(rng, of, (0.2, 2.5))
    found = _worker(rng, of, lambda _: lambda t, c: 0.0 * t)
    main = process(rng, of, lambda t, c: rate * (t - of.start) / HOUR, role="main", spikes=0.0)
    return [main, *found[1:]], of, rate, None


def lumps(rng: Rng) -> Any:
    of = setting(rng, (24, 168), None, 1)
    number = int(rng.integers(15, 60))
    at = np.sort(rng.uniform(of.start, of.end, number))
    total = rng.uniform(0.3, 2) * of.level
    each = rng.exponential(1, number)
    each *= total / each.sum()
    return (
        _worker(rng, of, lambda _: lambda t, c: np.concatenate([[0], np.cumsum(each)])[np.searchsorted(at, t)]),
        of,
        total / of.hours,
        None,
    )


def under_spikes(rng: Rng) -> Any:
    of = setting(rng, (12, 96), None, int(rng.choice([1, 2, 4])))
    of = replace(of, noise=of.level * rng.uniform(0.03, 0.08))
    rate = _growth(rng, of, (0.5, 2.5))
    return _worker(rng, of, lambda _: lambda t, c: rate * (t - of.start) / HOUR, spikes=0.9), of, rate * of.slots, None


def after_deployment(rng: Rng) -> Any:
    of = setting(rng, (24, 168))
    begins = of.start + rng.uniform(0.2, 0.6) * (of.end - of.start)
    rate = _growth(rng, of, (0.4, 2.5)) / (1 - (begins - of.start) / (of.end - of.start))
    return (
        _worker(rng, of, lambda _: lambda t, c: rate * np.clip(t - begins, 0, None) / HOUR),
        of,
        rate * of.slots,
        None,
    )


def trimmed_late(rng: Rng) -> Any:
    of = setting(rng, (24, 168))
    rate = _growth(rng, of, (0.4, 2.5))
    at = of.start + rng.uniform(0.5, 0.8) * (of.end - of.start)
    drop = rate * of.hours * rng.uniform(0.1, 0.35)
    return (
        _worker(rng, of, lambda _: lambda t, c: rate * (t - of.start) / HOUR - drop * (t > at)),
        of,
        rate * of.slots,
        None,
    )


def warm_then_growing(rng: Rng) -> Any:
    of = setting(rng, (24, 168))
    rate = _growth(rng, of, (0.3, 2))
    kb, hours = rng.uniform(0.1, 0.8) * of.level, of.hours * rng.uniform(0.01, 0.12)
    return (
        _worker(rng, of, lambda _: lambda t, c: rate * (t - of.start) / HOUR + warm(of, t, of.start, kb, hours)),
        of,
        rate * of.slots,
        None,
    )


def sublinear(rng: Rng) -> Any:
    of = setting(rng, (48, 168))
    total = rng.uniform(0.5, 2.5) * of.level
    power = rng.uniform(0.7, 0.9)
    return (
        _worker(rng, of, lambda _: lambda t, c: total * (np.clip(t - of.start, 0, None) / HOUR / of.hours) ** power),
        of,
        total * (1 - 0.8**power) / 0.2 / of.hours * of.slots,
        None,
    )


def quantised_leak(rng: Rng) -> Any:
    of = setting(rng, (24, 168), None, 1)
    rate = _growth(rng, of, (0.3, 2))
    found = _worker(rng, of, lambda _: lambda t, c: rate * (t - of.start) / HOUR)
    grain = rate * of.hours / rng.integers(10, 40)
    return [replace(one, sizes=np.round(one.sizes / grain) * grain) for one in found], of, rate, None


# ---- healthy ----


def flat(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    return _worker(rng, of, lambda _: lambda t, c: 0.0 * t), of, None, None


def quantised(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    grain = rng.choice([1, 4, 10, 25]) * MIB
    found = _worker(rng, of, lambda _: lambda t, c: 0.0 * t)
    return [replace(one, sizes=np.round(one.sizes / grain) * grain) for one in found], of, None, None


def warming(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    kb = rng.uniform(0.2, 2) * of.level
    hours = of.hours * float(np.exp(rng.uniform(np.log(0.005), np.log(0.18))))
    return _worker(rng, of, lambda _: lambda t, c: warm(of, t, of.start, kb, hours)), of, None, None


def two_warmings(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    kb = rng.uniform(0.1, 1, 2) * of.level
    hours = of.hours * np.array([rng.uniform(0.005, 0.03), rng.uniform(0.05, 0.18)])
    return (
        _worker(
            rng, of,
            lambda _: lambda t, c: warm(of, t, of.start, kb[0], hours[0]) + warm(of, t, of.start, kb[1], hours[1]),
        ),
        of, None, None,
    )  # fmt: skip


def step(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    at = of.start + rng.uniform(0.05, 0.9, 8) * (of.end - of.start)
    kb = rng.uniform(0.1, 2) * of.level
    return _worker(rng, of, lambda slot: lambda t, c: kb * (t > at[slot])), of, None, None


def high_water(rng: Rng) -> Any:
    """Memory that a task took is never given back: the size of the largest one so far."""
    of = setting(rng, (24, 168), None, 1)
    number = int(rng.integers(40, 400))
    at = np.sort(rng.uniform(of.start, of.end, number))
    most = np.maximum.accumulate(rng.lognormal(0, 0.6, number)) * 0.1 * of.level
    return (
        _worker(rng, of, lambda _: lambda t, c: np.concatenate([[0.0], most])[np.searchsorted(at, t)]),
        of,
        None,
        None,
    )


def day(rng: Rng) -> Any:
    of = setting(rng, (60, 240), daily(rng))
    kb = rng.uniform(0.05, 1) * of.level
    return _worker(rng, of, lambda _: lambda t, c: kb / 2 * of.load(t)), of, None, None


def week(rng: Rng) -> Any:
    of = setting(rng, (96, 240), daily(rng, weekend=rng.uniform(0.2, 0.6)))
    kb = rng.uniform(0.05, 1) * of.level
    return _worker(rng, of, lambda _: lambda t, c: kb / 2 * of.load(t)), of, None, None


def cache_to_bound(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    kb, full = rng.uniform(0.2, 2) * of.level, rng.uniform(0.08, 0.6)
    return (
        _worker(rng, of, lambda _: lambda t, c: kb * np.clip((t - of.start) / (of.end - of.start) / full, 0, 1)),
        of,
        None,
        None,
    )


def breathing_cache(rng: Rng) -> Any:
    of = setting(rng, (24, 168))
    kb, hours = rng.uniform(0.05, 0.3) * of.level, of.hours * rng.uniform(0.01, 0.06)
    return _worker(rng, of, lambda _: lambda t, c: wander(rng, t, kb, hours)), of, None, None


def sawtooth(rng: Rng) -> Any:
    of = setting(rng, (24, 168))
    kb, period = rng.uniform(0.1, 0.6) * of.level, of.hours * rng.uniform(0.02, 0.22)

    def saw(_: int) -> Any:
        phase = rng.uniform(0, 1)
        return lambda t, c: kb * (((t - of.start) / HOUR / period + phase) % 1.0)

    return _worker(rng, of, saw), of, None, None


def wandering(rng: Rng) -> Any:
    of = setting(rng, (24, 168))
    kb, hours = rng.uniform(0.02, 0.15) * of.level, of.hours * rng.uniform(0.02, 0.1)
    return _worker(rng, of, lambda _: lambda t, c: wander(rng, t, kb, hours)), of, None, None


def bursts(rng: Rng) -> Any:
    of = setting(rng, (12, 168))
    number = int(rng.integers(3, 20))
    begins = rng.uniform(of.start, of.end, number)
    long = rng.uniform(0.002, 0.03, number) * (of.end - of.start)
    kb = rng.uniform(0.2, 2, number) * of.level

    def burst(t: Floats, c: Floats) -> Floats:
        out = np.zeros_like(t)
        for b, d, k in zip(begins, long, kb):
            out += k * ((t >= b) & (t < b + d))
        return out

    return _worker(rng, of, lambda _: burst), of, None, None


def deployments(rng: Rng) -> Any:
    of = setting(rng, (72, 200), daily(rng, 0.5), int(rng.choice([1, 2, 4])))
    kb, swing = rng.uniform(0.1, 0.6) * of.level, rng.uniform(0, 0.2) * of.level
    return (
        _recycled(
            rng, of,
            lambda s: lambda t, c: warm(of, t, s, kb, rng.uniform(0.3, 2)) + swing / 2 * of.load(t),
            lambda s: rng.uniform(0.8, 1.3) * DAY,
        ),
        of, None, None,
    )  # fmt: skip


def healthy_recycling(rng: Rng) -> Any:
    of = setting(rng, (8, 48), None, int(rng.choice([1, 2, 4])))
    life = rng.uniform(10, 120) * of.interval
    of = replace(of, end=min(of.end, of.start + 80 * life))
    kb, hours = rng.uniform(0.1, 1) * of.level, life / HOUR * rng.uniform(0.02, 0.15)
    return (
        _recycled(rng, of, lambda s: lambda t, c: warm(of, t, s, kb, hours), lambda s: life * rng.uniform(0.9, 1.1)),
        of,
        None,
        None,
    )


def autoscaled(rng: Rng) -> Any:
    of = setting(rng, (60, 168), daily(rng), int(rng.choice([2, 4])))
    kb = rng.uniform(0.1, 0.5) * of.level
    found = [main_of(rng, of)]
    for _ in range(of.slots):
        start = of.start
        while start < of.end:
            end = start + rng.uniform(3, 12) * HOUR
            one = process(
                rng,
                of,
                lambda t, c, s=start: warm(of, t, s, kb, 0.2) + 0.1 * of.level * of.load(t),
                start=start,
                end=end,
            )
            if len(one.times) > 5:
                found.append(one)
            start = end + rng.uniform(1, 10) * HOUR
    return found, of, None, None


def step_down(rng: Rng) -> Any:
    of = setting(rng, (8, 168))
    at = of.start + rng.uniform(0.1, 0.9) * (of.end - of.start)
    kb = rng.uniform(0.1, 0.4) * of.level
    return _worker(rng, of, lambda _: lambda t, c: -kb * (t > at)), of, None, None


def swing_of_amplitude(rng: Rng) -> Any:
    """A day's wave whose height differs from day to day by much: each day has its own traffic."""
    of = setting(rng, (72, 240), daily(rng))
    kb = rng.uniform(0.1, 1) * of.level
    heights = rng.lognormal(0, 0.25, 20)
    return (
        _worker(
            rng, of,
            lambda _: lambda t, c: kb / 2 * of.load(t) * np.interp((t - of.start) / DAY, np.arange(20), heights),
        ),
        of, None, None,
    )  # fmt: skip


LEAKING: tuple[Kind, ...] = (
    growing, slow_under_swing, by_load, by_time_under_load, recycled_by_memory, recycled_by_tasks, killed_and_again,
    nightly_restart, one_of_many, in_main, lumps, under_spikes, after_deployment, trimmed_late, warm_then_growing,
    sublinear, quantised_leak,
)  # fmt: skip
HEALTHY: tuple[Kind, ...] = (
    flat, quantised, warming, two_warmings, step, high_water, day, week, cache_to_bound, breathing_cache, sawtooth,
    wandering, bursts, deployments, healthy_recycling, autoscaled, step_down, swing_of_amplitude,
)  # fmt: skip


def _seen(rng: Rng, one: Generation, counted: bool) -> Generation:
    """As a sampler that misses some has it."""
    keep = np.ones(len(one.times), bool)
    if rng.random() < 0.5 and len(keep) > 20:
        keep &= rng.random(len(keep)) > rng.uniform(0.01, 0.2)
    keep[0] = keep[-1] = True
    tasks = one.tasks if counted else np.full(len(one.times), np.nan)
    return replace(one, times=one.times[keep], sizes=one.sizes[keep], tasks=tasks[keep], counts=one.counts[keep])


def case(kind: Kind, seed: int) -> Case:
    name = kind.__name__
    rng = np.random.default_rng([seed, *name.encode()])
    found, of, rate, follows = kind(rng)
    counted = rng.random() < 0.5
    found = [_seen(rng, one, counted) for one in found]
    if rng.random() < 0.4:
        # The sampler was down for a while.
        begins = rng.uniform(of.start, of.end)
        ends = begins + rng.uniform(0.01, 0.08) * (of.end - of.start)
        kept = [(one, (one.times < begins) | (one.times > ends)) for one in found]
        found = [
            replace(one, times=one.times[k], sizes=one.sizes[k], tasks=one.tasks[k], counts=one.counts[k])
            for one, k in kept
            if k.sum() > 1
        ]
    found.sort(key=lambda one: one.times[0])
    most = int(sum(one.sizes.max() for one in found if one.times[-1] > of.end - HOUR) * 1.5) + 1
    worker = Worker("host", "celery-worker@gate.service", tuple(found), Limits(max_kb=most))
    return Case(name, seed, kind in LEAKING, rate, follows, worker)


def cases(seeds: Iterable[int]) -> Iterator[Case]:
    """Every kind with every seed."""
    for seed in seeds:
        for kind in (*LEAKING, *HEALTHY):
            yield case(kind, seed)
