"""Who leaks: verdicts on simulated processes of every kind that is known, and on workers that are made of them.

Sizes are KiB in whole pages, as the kernel tells them; a case is run with several seeds, and every one must be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from labelled.rollups import routine
from plimsoll.detect import FEWEST_FLOORS, Forecast, Pattern, Verdict, cohorts, judge, judge_generation
from plimsoll.growth import Trend
from plimsoll.series import Floats, Generation, Limits, Worker

T0 = 1_763_942_400.0
MIB = 1024
UNIT = "celery-worker@gate.service"
LEAK = {Pattern.GROWING}
HEALTHY = {Pattern.PLATEAU, Pattern.WARMING_UP, Pattern.STEP, Pattern.CYCLIC, Pattern.NOISY}
UNKNOWN = {Pattern.INSUFFICIENT_DATA}

pytestmark = pytest.mark.filterwarnings("error")


def wander(rng: Any, n: int, kb: float, phi: float) -> Floats:
    """Autocorrelated noise, AR(1), of this standard deviation."""
    steps, value = rng.normal(0, kb * math.sqrt(1 - phi * phi), n), rng.normal(0, kb)
    out = np.empty(n)
    for i in range(n):
        out[i] = value = phi * value + steps[i]
    return out


# ---- simulated processes ----


def clock(hours: float, interval: float = 60) -> Floats:
    """Times of samples in hours."""
    return np.arange(0, hours * 3600, interval) / 3600


def noise(rng: Any, n: int, spike: float = 0, share: float = 0.3) -> Floats:
    """What is above a floor: a little always, and in this share of the samples what a task takes and gives back."""
    return rng.exponential(300, n) + (rng.random(n) < share) * rng.exponential(spike, n)


def process(
    hours: Floats, size: Floats, tasks: Floats | None = None, *, pid: int = 7, role: str = "child", start: float = 0
) -> Generation:
    return Generation(
        pid=pid,
        start_time=T0 + start * 3600,
        role=role,
        times=T0 + (start + hours) * 3600,
        sizes=np.floor(size / 4) * 4,
        tasks=np.full(len(hours), np.nan) if tasks is None else np.asarray(tasks, dtype=float),
        counts=np.ones(len(hours), dtype=np.uint32),
    )


Simulation = Callable[[Any], Generation]
CASES: list[tuple[str, set[Pattern], Simulation]] = []


def case(name: str, wanted: set[Pattern]) -> Callable[[Simulation], Simulation]:
    def keep(simulation: Simulation) -> Simulation:
        CASES.append((name, wanted, simulation))
        return simulation

    return keep


def shaped(name: str, wanted: set[Pattern], size: Callable[[Any, Floats], Floats], hours: Floats | None = None) -> None:
    at = clock(24) if hours is None else hours
    CASES.append((name, wanted, lambda rng: process(at, size(rng, at))))


def bits(rng: Any, h: Floats, spike: float = 0) -> Floats:
    return noise(rng, len(h), spike)


# Leaks.
for _rate in (300, 1000, 5000, 40_000):
    shaped(f"leak of {_rate} KiB an hour", LEAK, lambda rng, h, rate=_rate: 90_000 + rate * h + bits(rng, h))  # type: ignore[misc]
shaped("leak below spikes", LEAK, lambda rng, h: 90_000 + 1000 * h + noise(rng, len(h), 60_000, 0.5))
shaped("leak in a staircase", LEAK, lambda rng, h: 90_000 + np.floor(1200 * h / MIB) * MIB + bits(rng, h) / 3)
shaped(
    "leak in arenas at odd times",
    LEAK,
    lambda rng, h: 90_000 + np.cumsum(rng.random(len(h)) < 0.02) * 1024.0 + bits(rng, h),
)
shaped("leak of 10 MB every hour", LEAK, lambda rng, h: 90_000 + np.floor(h) * 10_000 + bits(rng, h))
shaped("leak after a warm-up", LEAK, lambda rng, h: 60_000 + 40_000 * (1 - np.exp(-2 * h)) + 2000 * h + bits(rng, h))
shaped("leak that begins late", LEAK, lambda rng, h: 90_000 + 5000 * np.clip(h - 12, 0, None) + bits(rng, h))
shaped("leak that becomes faster", LEAK, lambda rng, h: 90_000 + 200 * h**2 + bits(rng, h))
shaped("leak of one hour", LEAK, lambda rng, h: 90_000 + 20_000 * h + bits(rng, h), clock(1))
shaped("leak sampled hourly", LEAK, lambda rng, h: 90_000 + 3000 * h + bits(rng, h), clock(24, 3600))
shaped(
    "leak and the day's load",
    LEAK,
    lambda rng, h: 90_000 + 800 * h + 10_000 * np.sin(2 * np.pi * (h / 24 + rng.random())) + bits(rng, h, 30_000),
    clock(72, 120),
)


@case("leak by tasks", LEAK)
def _(rng: Any) -> Generation:
    h = clock(6)
    tasks = np.cumsum(rng.poisson(20, len(h)))
    return process(h, 90_000 + 3 * tasks + bits(rng, h, 20_000), tasks)


@case("leak in a peak between idle hours", LEAK)
def _(rng: Any) -> Generation:
    h = clock(12)
    peak = (h > 5) & (h < 6)
    tasks = np.cumsum(peak * rng.poisson(200, len(h)))
    return process(h, 60_000 + 5 * tasks + bits(rng, h) * peak, tasks)


@case("leak in a minute's peak sampled every 2 s", LEAK)
def _(rng: Any) -> Generation:
    h = clock(0.1, 2)
    peak = (h > 0.03) & (h < 0.03 + 1 / 60)
    tasks = np.cumsum(peak * rng.poisson(8, len(h)))
    return process(h, 60_000 + 150 * tasks + bits(rng, h), tasks)


@case("leak in an hour of every six", LEAK)
def _(rng: Any) -> Generation:
    h = clock(24)
    peak = h % 6 < 1
    tasks = np.cumsum(peak * rng.poisson(100, len(h)))
    return process(h, 60_000 + 2 * tasks + 20_000 * peak + bits(rng, h) * peak, tasks)


@case("leak by tasks, most of them in the first hours", LEAK)
def _(rng: Any) -> Generation:
    h = clock(24)
    tasks = np.cumsum(rng.poisson(np.where(h < 2, 400, 4)))
    return process(h, 60_000 + 1.5 * tasks + bits(rng, h, 10_000), tasks)


@case("leak by few tasks of half an hour", LEAK)
def _(rng: Any) -> Generation:
    h = clock(24)
    return process(h, 90_000 + 1500 * np.floor(2 * h) + bits(rng, h), np.floor(2 * h))


@case("leak beside tasks too few to tell", LEAK)
def _(rng: Any) -> Generation:
    h = clock(24)
    return process(h, 90_000 + 1500 * h + bits(rng, h), np.floor(h / 20))


@case("leak and a clock that is set back an hour", LEAK)
def _(rng: Any) -> Generation:
    h = clock(24)
    size = 90_000 + 3000 * h + bits(rng, h)
    return merged(h - (h > 10), size)


@case("leak and a clock that is set ahead 20 years", LEAK)
def _(rng: Any) -> Generation:
    h = clock(24)
    return process(h + (h > 2) * 20 * 365 * 24, 90_000 + 3000 * h + bits(rng, h))


@case("leak and a clock that is set ahead 20 years, late", LEAK)
def _(rng: Any) -> Generation:
    h = clock(24)
    return process(h + (h > 18) * 20 * 365 * 24, 90_000 + 3000 * h + bits(rng, h))


@case("leak and nine days without samples", LEAK)
def _(rng: Any) -> Generation:
    h = clock(240)
    seen = (h < 30) | (h > 238)
    return process(h[seen], (90_000 + 3000 * h + bits(rng, h))[seen])


def merged(hours: Floats, size: Floats) -> Generation:
    """As series puts them together: sorted, each time once."""
    hours, at = np.unique(np.round(hours, 6), return_index=True)
    return process(hours, size[at])


# What is healthy.
for _tau in (0.02, 0.05, 0.1, 0.2, 0.3):
    shaped(
        f"warm-up that approaches its level in {_tau} of the time, by e",
        HEALTHY,
        lambda rng, h, tau=_tau: 60_000 + 60_000 * (1 - np.exp(-h / 24 / tau)) + bits(rng, h),  # type: ignore[misc]
    )
for _part in (0.2, 0.5, 0.6):
    shaped(
        f"ramp until {_part} of the time, then flat",
        HEALTHY,
        lambda rng, h, part=_part: 60_000 + 60_000 * np.minimum(h / 24 / part, 1) + bits(rng, h),  # type: ignore[misc]
    )
for _at in (0.05, 0.15, 0.3, 0.5, 0.7, 0.9):
    shaped(
        f"step at {_at} of the time",
        HEALTHY,
        lambda rng, h, at=_at: 60_000 + 40_000 * (h > 24 * at) + bits(rng, h, 40_000),  # type: ignore[misc]
    )
shaped("a step whose sides are clean", HEALTHY, lambda rng, h: 60_000 + 40_000 * (h > 12.0))
shaped(
    "saw-tooth", HEALTHY, lambda rng, h: 80_000 + 50_000 * ((h / rng.uniform(0.3, 3) + rng.random()) % 1) + bits(rng, h)
)
shaped(
    "slow saw-tooth",
    HEALTHY,
    lambda rng, h: 80_000 + 50_000 * ((h / rng.uniform(3, 8) + rng.random()) % 1) + bits(rng, h),
)
shaped("spikes above a flat floor", HEALTHY, lambda rng, h: 80_000 + noise(rng, len(h), 60_000, 0.4))
shaped("a few spikes", HEALTHY, lambda rng, h: 80_000 + noise(rng, len(h), 60_000, 0.3), clock(0.5))
shaped("noise", HEALTHY, lambda rng, h: 80_000 + rng.normal(0, 6000, len(h)))
shaped("much noise", HEALTHY, lambda rng, h: 150_000 + rng.normal(0, 15_000, len(h)))
shaped("noise that wanders", HEALTHY, lambda rng, h: 120_000 + wander(rng, len(h), 5000, 0.9))
shaped("growth too small to matter", HEALTHY, lambda rng, h: 90_000 + 100 * h + bits(rng, h))
shaped("growth too small in a small process", HEALTHY, lambda rng, h: 20_000 + 80 * h + bits(rng, h))
shaped("growth too small beside the level", HEALTHY, lambda rng, h: 2_000_000 + 2000 * h + bits(rng, h))
shaped("constant", HEALTHY, lambda rng, h: np.full(len(h), 80_000.0))
shaped("nothing at all", HEALTHY, lambda rng, h: np.zeros(len(h)))
shaped("shrinking", HEALTHY, lambda rng, h: 300_000 - 5000 * h + bits(rng, h))
shaped("a main process that ramps at its start", HEALTHY, lambda rng, h: 60_000 + 8000 * np.minimum(20 * h, 1))
for _days in (1.5, 2.0, 3.0, 7.0):
    shaped(
        f"the day's load over {_days} days",
        HEALTHY,
        lambda rng, h: 150_000 + 30_000 * np.sin(2 * np.pi * (h / 24 + rng.random())) + bits(rng, h),
        clock(24 * _days, 120),
    )


@case("the day's load, with tasks", HEALTHY)
def _(rng: Any) -> Generation:
    h = clock(72, 120)
    load = np.clip(np.sin(2 * np.pi * (h / 24 + rng.random())), 0, None)
    return process(h, 150_000 + 30_000 * load + bits(rng, h), np.cumsum(rng.poisson(20 * load)))


@case("a clock that is set back, flat", HEALTHY)
def _(rng: Any) -> Generation:
    h = clock(24)
    return merged(h - (h > 10), 90_000 + bits(rng, h))


@case("a step over hours without samples", HEALTHY)
def _(rng: Any) -> Generation:
    h = clock(24)
    seen = (h < 10) | (h > 13)
    return process(h[seen], (60_000 + 40_000 * (h > 12) + bits(rng, h))[seen])


# What nobody can judge.
shaped("one sample", UNKNOWN, lambda rng, h: 90_000 + h, np.zeros(1))
shaped("too few samples", UNKNOWN, lambda rng, h: 90_000 + 9000.0 * np.arange(len(h)), clock(0.2))


@pytest.mark.parametrize(("wanted", "simulate"), [each[1:] for each in CASES], ids=[each[0] for each in CASES])
def test_a_process_is_judged(wanted: set[Pattern], simulate: Simulation) -> None:
    found = [judge_generation(simulate(np.random.default_rng(seed))).pattern for seed in range(3)]
    assert set(found) <= wanted, found


def test_samples_of_all_but_one_time_are_none_either() -> None:
    one = process(np.repeat([0.0, 9], 40), np.repeat([90_000.0, 500_000], 40))
    assert judge_generation(one).pattern is Pattern.INSUFFICIENT_DATA


def test_a_gap_that_leaves_too_few_samples_to_judge_is_no_failure() -> None:
    hours = np.concatenate([np.arange(1200) / 1000, 100 + np.arange(3) / 60])
    assert judge_generation(process(hours, 90_000 + hours)).pattern in {Pattern.INSUFFICIENT_DATA, Pattern.PLATEAU}


@pytest.mark.parametrize("at", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("spike", [0, 40_000])
def test_a_step_with_level_sides_is_called_one(at: float, spike: float) -> None:
    h = clock(24)
    for seed in range(5):
        size = 60_000 + 40_000 * (h > 24 * at) + noise(np.random.default_rng(seed), len(h), spike)
        assert judge_generation(process(h, size)).pattern is Pattern.STEP


def test_a_spike_is_no_step() -> None:
    """Of a leak seen in few samples: taken for a jump, its height would be taken off the leak."""
    h = clock(1)
    size = 60_000 + 18_000 * h
    size[31] += 90_000
    assert judge_generation(process(h, size)).pattern is Pattern.GROWING


def test_a_warm_up_that_still_goes_on_slowly_is_told_from_a_level() -> None:
    h = clock(24)
    rng = np.random.default_rng(0)
    slow = 60_000 + 60_000 * (1 - np.exp(-h / 24 / 0.25)) + noise(rng, len(h))
    assert judge_generation(process(h, slow)).pattern is Pattern.WARMING_UP


# ---- a worker ----


def worker(*lives: Generation, **limits: Any) -> Worker:
    return Worker("h", UNIT, tuple(sorted(lives, key=lambda one: one.times[0])), Limits(**limits))


def main_process(hours: float, start: float = 0, role: str = "main") -> Generation:
    h = clock(hours)
    return process(h, 70_000 + 6000 * np.minimum(50 * h, 1), pid=100, role=role, start=start)


Size = Callable[[Any, Floats, Floats], Floats]


def child(
    rng: Any, size: Size, hours: float, start: float = 0, counted: bool = True, role: str = "child", pid: int = 0
) -> Generation:
    h = clock(hours)
    tasks = np.cumsum(rng.poisson(10, len(h)))
    pid = pid or int(rng.integers(200, 1 << 22))
    return process(h, size(rng, h, tasks), tasks if counted else None, pid=pid, role=role, start=start)


def children(rng: Any, size: Size, slots: int, total: float, each: float, **more: Any) -> list[Generation]:
    """Slots side by side; in each, one child follows the other after about so many hours."""
    found = []
    for _ in range(slots):
        start = 0.0
        while start < total - 0.02:
            hours = min(each * rng.uniform(0.8, 1.2), total - start)
            found.append(child(rng, size, hours, start, **more))
            start += math.ceil(hours * 60) / 60
    return found


def grows(kb: float, spike: float = 0) -> Size:
    return lambda rng, h, tasks: 60_000 + kb * tasks + noise(rng, len(h), spike)


def flat(warm: float = 20_000, hours: float = 0.1, spike: float = 20_000) -> Size:
    return lambda rng, h, tasks: 60_000 + warm * (1 - np.exp(-h / hours)) + noise(rng, len(h), spike)


def wanders(kb: float, phi: float) -> Size:
    return lambda rng, h, tasks: 90_000 + wander(rng, len(h), kb, phi)


def patterns(simulate: Callable[[Any], Worker], seeds: int = 3) -> set[Pattern]:
    return {judge(simulate(np.random.default_rng(seed))).pattern for seed in range(seeds)}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("spike", [0, 30_000])
def test_children_that_grow_and_are_recycled(counted: bool, spike: float) -> None:
    def simulate(rng: Any) -> Worker:
        return worker(main_process(12), *children(rng, grows(30, spike), 4, 12, 1, counted=counted))

    assert patterns(simulate) == {Pattern.RECYCLED}


@pytest.mark.parametrize("hours", [0.05, 0.1, 0.2])
def test_children_that_warm_up_and_are_recycled_are_healthy(hours: float) -> None:
    """Whenever one looks, some of them are young, and all that was seen of those is growth."""

    def simulate(rng: Any) -> Worker:
        total = 12 + rng.random()
        return worker(main_process(total), *children(rng, flat(hours=hours), 4, total, 1))

    assert patterns(simulate, 4) <= HEALTHY


def test_recycling_is_seen_without_roles_and_units_too() -> None:
    """As from a plain script, which tells main and child not apart."""

    def simulate(rng: Any) -> Worker:
        lives = children(rng, grows(30), 1, 12, 1, counted=False, role="")
        return worker(main_process(12, role=""), *lives)

    assert patterns(simulate) == {Pattern.RECYCLED}


@pytest.mark.parametrize("young", [0.1, 1.0, 2.5])
def test_restarts_after_each_growth(young: float) -> None:
    """The whole worker is killed and starts anew, eight times; the last one is young, and may not have grown yet."""

    def simulate(rng: Any) -> Worker:
        lives = []
        for start, hours in [*((3 * n, 2.9) for n in range(8)), (24, young)]:
            lives.append(main_process(hours, start))
            lives += [child(rng, grows(20, 5000), hours, start) for _ in range(2)]
        return worker(*lives, oom_kills=8)

    assert patterns(simulate) == {Pattern.RECYCLED}


def test_a_leak_in_one_child_alone() -> None:
    def simulate(rng: Any) -> Worker:
        return worker(main_process(24), child(rng, grows(5), 24), *(child(rng, flat(), 24) for _ in range(3)))

    assert patterns(simulate) == {Pattern.GROWING}


def test_a_leak_in_one_child_among_many_that_waver() -> None:
    def simulate(rng: Any) -> Worker:
        def size(rng: Any, h: Floats, tasks: Floats) -> Floats:
            return wanders(4000, 0.9)(rng, h, tasks) + 3000 * h

        return worker(main_process(24), child(rng, size, 24), *(child(rng, wanders(4000, 0.9), 24) for _ in range(15)))

    assert patterns(simulate) == {Pattern.GROWING}


def test_of_many_that_waver_none_is_taken_for_a_leak_by_chance() -> None:
    def simulate(rng: Any) -> Worker:
        return worker(main_process(24), *(child(rng, wanders(4000, 0.95), 24) for _ in range(16)))

    assert patterns(simulate) <= HEALTHY


def test_a_deployment_in_between_is_no_recycling() -> None:
    def simulate(rng: Any) -> Worker:
        return worker(
            *(main_process(11.9, start) for start in (0, 12)),
            *(child(rng, grows(3), 11.9, start) for start in (0, 12) for _ in range(4)),
            max_kb=900_000,
            level_kb=500_000.0,
        )

    verdict = judge(simulate(np.random.default_rng(0)))
    assert verdict.pattern is Pattern.GROWING and verdict.hours_to_max is not None
    assert patterns(simulate) == {Pattern.GROWING}


def test_a_release_that_mends_the_leak_is_seen_to() -> None:
    """While what came before still lies in the store."""

    def simulate(rng: Any) -> Worker:
        before = [child(rng, grows(3), 11.9) for _ in range(4)]
        return worker(
            *(main_process(11.9, n) for n in (0, 12)), *before, *(child(rng, flat(), 12, 12) for _ in range(4))
        )

    assert patterns(simulate) <= HEALTHY

    def too_early(rng: Any) -> Worker:
        before = [child(rng, grows(3), 11.9) for _ in range(4)]
        after = [child(rng, flat(0), 0.5, 12) for _ in range(4)]
        return worker(*(main_process(n, s) for n, s in ((11.9, 0), (0.5, 12))), *before, *after)

    assert patterns(too_early) == {Pattern.RECYCLED}


def test_what_was_recycled_long_ago_does_not_outvote_what_is_recycled_now() -> None:
    def simulate(rng: Any) -> Worker:
        before, after = children(rng, grows(30), 2, 24, 1), children(rng, flat(spike=0), 2, 12, 1)
        later = [
            replace(one, times=one.times + 24 * 3600, start_time=(one.start_time or 0) + 24 * 3600) for one in after
        ]
        return worker(main_process(36), *before, *later)

    assert patterns(simulate) <= HEALTHY


def test_a_release_that_brings_a_leak_is_seen_to() -> None:
    def simulate(rng: Any) -> Worker:
        before = children(rng, flat(), 4, 12, 3)
        return worker(main_process(24), *before, *(child(rng, grows(10), 12, 12) for _ in range(4)))

    assert patterns(simulate) == {Pattern.GROWING}


def test_one_that_grows_as_the_healthy_before_it_did_must_outgrow_or_outlive_them() -> None:
    h = clock(4)
    before = process(h, 60_000 + 40_000 * np.minimum(5 * h, 1), pid=1)

    def verdict(hours: float, rate: float, role: str = "child") -> Pattern:
        h = clock(hours)
        return judge(worker(before, process(h, 60_000 + rate * h, pid=2, role=role, start=5))).pattern

    assert verdict(1, 30_000) in HEALTHY  # to 90 MB, which the one before held, too
    assert verdict(1, 80_000) is Pattern.GROWING
    assert verdict(6, 5000) is Pattern.GROWING
    assert verdict(1, 30_000, role="main") is Pattern.GROWING


def test_the_rate_is_that_of_the_processes_that_live() -> None:
    """Days of health before a leak make it no slower."""
    rng = np.random.default_rng(0)
    verdict = judge(
        worker(
            *(child(rng, flat(), 96) for _ in range(2)),
            *(child(rng, lambda rng, h, tasks: 60_000 + 10_000 * h, 12, 96.5, counted=False) for _ in range(2)),
            max_kb=1_000_000,
            level_kb=400_000.0,
        )
    )
    assert verdict.pattern is Pattern.GROWING
    assert verdict.rate.slope == pytest.approx(20_000, rel=0.02)
    assert left(verdict.hours_to_max) == pytest.approx(30, rel=0.03)


def test_rates_of_children_add_up() -> None:
    def size(rate: float) -> Size:
        return lambda rng, h, tasks: 60_000 + rate * h + rng.normal(0, 2000, len(h))

    rng = np.random.default_rng(3)
    pair = [child(rng, size(rate), 24, counted=False) for rate in (2000, 3000)]
    both = judge(worker(*pair)).rate
    assert both.slope == pytest.approx(5000, rel=0.03)
    assert both.slope == pytest.approx(sum(judge(worker(one)).rate.slope for one in pair))
    assert both.low < 5000 < both.high


def test_the_rate_of_recycled_children_is_that_of_those_side_by_side() -> None:
    rng = np.random.default_rng(0)
    verdict = judge(worker(main_process(12), *children(rng, grows(30), 2, 12, 1)))
    assert verdict.pattern is Pattern.RECYCLED
    assert verdict.rate.slope == pytest.approx(2 * 30 * 600, rel=0.1)
    assert verdict.kb_per_1000_tasks == pytest.approx(30_000, rel=0.05)


def left(forecast: Forecast | None) -> float:
    assert forecast is not None
    assert forecast.earliest <= forecast.hours <= (forecast.latest or math.inf)
    return forecast.hours


def test_hours_left_are_from_the_level_to_the_limit() -> None:
    h = clock(10)
    one = process(h, 60_000 + 10_000 * h)
    limits = {"high_kb": 300_000, "max_kb": 400_000, "level_kb": 250_000.0, "levels": np.array([240e3, 250e3, 290e3])}
    verdict = judge(worker(one, **limits))
    assert verdict.rate.slope == pytest.approx(10_000, rel=0.01)
    assert left(verdict.hours_to_high) == pytest.approx(5, rel=0.01)
    assert left(verdict.hours_to_max) == pytest.approx(15, rel=0.01)
    # It has been as high as 290 MB, and as low as 240.
    assert verdict.hours_to_max is not None and verdict.hours_to_max.earliest == pytest.approx(11 / 1.22, rel=0.05)
    assert verdict.hours_to_max.latest == pytest.approx(16 / 0.78, rel=0.05)
    over = judge(worker(one, **{**limits, "level_kb": 350_000.0}))
    assert left(over.hours_to_high) == 0 and left(over.hours_to_max) == pytest.approx(5, rel=0.01)


def test_without_the_units_own_figure_the_level_is_what_its_processes_hold() -> None:
    h = clock(10)
    leaks, beside = process(h, 60_000 + 10_000 * h), process(h, np.full(len(h), 50_000.0), pid=8)
    gone = process(clock(2), np.full(120, 990_000.0), pid=9)
    verdict = judge(worker(leaks, beside, gone, max_kb=400_000))
    assert left(verdict.hours_to_max) == pytest.approx((400_000 - 160_000 - 50_000) / 10_000, rel=0.02)


def test_no_limit_is_no_time_left_and_the_evidence_says_so() -> None:
    h = clock(10)
    verdict = judge(worker(process(h, 60_000 + 10_000 * h)))
    assert (verdict.hours_to_high, verdict.hours_to_max) == (None, None)
    assert any("no MemoryMax" in said for said in verdict.evidence)
    assert any("less than a day" in said for said in verdict.evidence)


def test_what_does_not_grow_or_is_recycled_has_no_time_left_to_tell() -> None:
    rng = np.random.default_rng(0)
    limits = {"high_kb": 300_000, "max_kb": 400_000, "level_kb": 250_000.0}
    for one in (worker(main_process(24), **limits), worker(*children(rng, grows(30), 2, 12, 1), **limits)):
        verdict = judge(one)
        assert verdict.pattern is not Pattern.GROWING
        assert (verdict.hours_to_high, verdict.hours_to_max) == (None, None)


def test_a_worker_of_which_too_little_was_seen_says_so() -> None:
    verdict = judge(worker(process(np.zeros(1), np.full(1, 90_000.0)), oom_kills=2, restarts=1, events_high=5))
    assert verdict.pattern is Pattern.INSUFFICIENT_DATA and not verdict.pattern.leaking
    assert verdict.rate == Trend(0, 0, 0) and verdict.kb_per_1000_tasks is None
    assert f"{FEWEST_FLOORS} samples" in verdict.evidence[0]
    assert verdict.evidence[1:] == (
        "above MemoryHigh 5 times: the kernel slows it down there",
        "2 OOM kills",
        "1 restart by systemd",
    )


# ---- from rollups ----


def rolled_up(*lives: Generation) -> Worker:
    """The worker as the sampler's rollups show it."""
    (one,) = routine([worker(*lives)], {})
    return one


@pytest.mark.parametrize("hours", [3, 8, 30])
def test_a_leak_is_told_from_rollups(hours: float) -> None:
    rng = np.random.default_rng(0)
    h = clock(hours)
    verdict = judge(rolled_up(process(h, 90_000 + 20_000 * h + noise(rng, len(h), 30_000))))
    assert verdict.pattern is Pattern.GROWING and verdict.rate.low <= 20_000 <= verdict.rate.high
    assert verdict.lives[0].hours == pytest.approx(hours, abs=0.03)


@pytest.mark.parametrize("hours", [0.5, 2, 4, 30])
@pytest.mark.parametrize("seed", range(3))
def test_a_warm_up_is_none_from_rollups_either(hours: float, seed: int) -> None:
    h = clock(hours)
    sizes = 60_000 + 60_000 * (1 - np.exp(-h / 0.2)) + noise(np.random.default_rng(seed), len(h), 30_000)
    assert not judge(rolled_up(process(h, sizes))).pattern.leaking


def test_rollups_of_too_short_a_time_are_insufficient_however_much_it_grows() -> None:
    h = clock(2)
    verdict = judge(rolled_up(process(h, 60_000 + 500_000 * h)))
    assert verdict.pattern is Pattern.INSUFFICIENT_DATA
    assert verdict.evidence == ("no process has the 12 rollups of ten minutes after its warm-up that a verdict needs",)


def test_children_that_live_too_short_for_rollups_are_said() -> None:
    """As the main process is level, and a level is what the worker seems to have."""
    rng = np.random.default_rng(0)
    lives = children(rng, grows(60), 2, 6, 0.12)
    verdict = judge(rolled_up(main_process(6), *lives))
    assert verdict.pattern is Pattern.PLATEAU
    many = f"{len(lives)} of {len(lives) + 1} processes"
    assert verdict.evidence == (f"{many} lived too short for rollups of ten minutes to tell: collect samples",)
    assert judge(worker(main_process(6), *lives)).pattern is Pattern.RECYCLED


@pytest.mark.parametrize("lived", [0.4, 0.55, 1.1])
def test_children_that_are_recycled_before_many_rollups_are_told_together(lived: float) -> None:
    def simulate(size: Size) -> Callable[[Any], Worker]:
        return lambda rng: rolled_up(main_process(12), *children(rng, size, 2, 12, lived))

    assert patterns(simulate(grows(60, 10_000))) == {Pattern.RECYCLED}
    assert not any(pattern.leaking for pattern in patterns(simulate(flat(hours=0.02, spike=10_000))))


def test_the_rate_of_recycled_children_is_told_from_rollups() -> None:
    """60 KiB a task, 600 tasks an hour and child, two side by side."""
    rng = np.random.default_rng(0)
    verdict = judge(rolled_up(main_process(12), *children(rng, grows(60), 2, 12, 0.8)))
    assert verdict.rate.slope == pytest.approx(2 * 600 * 60, rel=0.1)
    assert verdict.kb_per_1000_tasks == pytest.approx(60_000, rel=0.1)


# ---- whatever is sent ----


def test_nothing_that_a_host_can_send_makes_a_judgement_fail_or_without_end() -> None:
    rng = np.random.default_rng(0)
    largest = float(1 << 54)
    for _ in range(150):
        lives = []
        for pid in range(int(rng.integers(1, 6))):
            n = int(rng.integers(1, 90))
            span = 10.0 ** rng.uniform(-3, 11)
            times = np.unique(np.round(rng.random(n) * span, 3))
            sizes = np.floor(rng.random(len(times)) * rng.choice([0.0, 8.0, 1e5, largest]))
            if rng.random() < 0.3:
                sizes.sort()
            tasks = np.floor(rng.random(len(times)) * rng.choice([1.0, 50.0, 2.0**53]))
            tasks[rng.random(len(times)) < rng.choice([0.0, 0.5, 1.0])] = np.nan
            counts = rng.integers(1, 7, len(times)).astype(np.uint32)
            whole = int(rng.choice([0, 6]))
            if whole:
                times[rng.random(len(times)) < 0.7] //= 600
                times = np.unique(np.where(times % 1 == 0, times * 600 + 300, times))
                sizes, tasks, counts = sizes[: len(times)], tasks[: len(times)], counts[: len(times)]
            role, start = str(rng.choice(["main", "child", ""])), rng.choice([None, -1e9, 250.0, 1e9])
            lives.append(Generation(pid, start, role, times, sizes, tasks, counts, whole))
        verdict = judge(worker(*lives, high_kb=0, max_kb=int(largest), level_kb=float(rng.choice([0.0, largest]))))
        assert all(math.isfinite(value) for value in numbers(verdict)), verdict
        assert verdict.rate.low <= verdict.rate.slope <= verdict.rate.high


def numbers(verdict: Verdict) -> list[float]:
    found = [verdict.rate.slope, verdict.rate.low, verdict.rate.high]
    maybe = [verdict.kb_per_1000_tasks, verdict.confidence]
    for forecast in (verdict.hours_to_high, verdict.hours_to_max):
        if forecast is not None:
            maybe += [forecast.hours, forecast.earliest, forecast.latest]
    return found + [value for value in maybe if value is not None]


# ---- what is put together ----


def test_processes_that_began_and_ended_together_are_summed_and_others_are_not() -> None:
    h = clock(3)
    main, busy = process(h, 50_000 + 0 * h, pid=1, role="main"), process(h, 60_000 + 5000 * h, pid=2)
    recycled = process(clock(1.2), np.full(72, 90_000.0), pid=3)
    one, both = cohorts([main, recycled, busy], [main, recycled, busy])
    assert one is recycled
    assert list(both.sizes) == pytest.approx(list(main.sizes + busy.sizes))
    # Where one of the worker lives on, it was no restart of it.
    longer = process(clock(9), np.full(540, 50_000.0), pid=4, role="main")
    assert cohorts([main, busy], [main, busy, longer]) == [main, busy]


def test_a_leak_of_the_main_process_is_not_hidden_by_children_that_are_recycled() -> None:
    rng = np.random.default_rng(0)
    h = clock(24)
    main = process(h, 70_000 + 20_000 * h + noise(rng, len(h)), pid=1, role="main")
    verdict = judge(worker(main, *children(rng, grows(30), 2, 24, 1), max_kb=4_000_000))
    assert verdict.pattern is Pattern.GROWING
    assert verdict.rate.slope == pytest.approx(20_000, rel=0.05) and verdict.hours_to_max is not None


def test_a_count_of_tasks_that_is_known_late_is_no_burst_of_tasks() -> None:
    h = clock(12)
    tasks = 5e6 + 600 * h
    tasks[:300] = np.nan
    verdict = judge(worker(process(h, 60_000 + 10 * 600 * h, tasks)))
    assert verdict.kb_per_1000_tasks is not None and verdict.kb_per_1000_tasks > 5000


def test_a_leak_in_one_process_shows_in_each_life_of_a_worker_that_is_killed() -> None:
    """Nine of ten processes are level, and a plain script tells no roles."""

    def simulate(rng: Any) -> Worker:
        lives = []
        for start in range(0, 30, 5):
            lives += [child(rng, wanders(300, 0.5), 4.9, start, counted=False, role="") for _ in range(9)]
            lives.append(child(rng, lambda rng, h, tasks: 60_000 + 30_000 * h, 4.9, start, counted=False, role=""))
        return worker(*lives)

    assert patterns(simulate) == {Pattern.RECYCLED}


def test_a_mornings_load_after_a_deployment_is_no_news() -> None:
    """What came before rose as high as the load did, every day."""
    rng = np.random.default_rng(0)
    days = clock(96, 300)
    before = process(days, 150_000 + 40_000 * np.sin(2 * np.pi * days / 24) + noise(rng, len(days)), pid=1)
    h = clock(7, 300)
    rising = process(h, 112_000 + 10_000 * h + noise(rng, len(h)), pid=2, start=97)
    assert judge(worker(rising)).pattern is Pattern.GROWING
    assert not judge(worker(before, rising)).pattern.leaking
    beyond = process(h, 112_000 + 25_000 * h + noise(rng, len(h)), pid=2, start=97)
    assert judge(worker(before, beyond)).pattern is Pattern.GROWING


@pytest.mark.parametrize("idle", [60, 120, 180])
def test_growth_a_task_is_that_of_the_time_in_which_it_worked(idle: int) -> None:
    seconds = np.arange(0, idle + 60, 2.0)
    tasks = np.where(seconds < idle, 0, np.floor((seconds - idle) * 4))
    verdict = judge(worker(process(seconds / 3600, 100_000 + 150 * tasks, tasks=tasks)))
    assert verdict.pattern is Pattern.GROWING
    assert verdict.kb_per_1000_tasks == pytest.approx(150_000, rel=0.45)
