"""One series against two explanations: cases worked by hand, and what each guard is there for."""

from __future__ import annotations

import numpy as np
import pytest
from plimsoll import growth
from plimsoll.growth import FEWEST_FLOORS, MOST_FLOORS, Series, Shape, floors, judge, profile, student, without_bursts
from plimsoll.series import Floats

pytestmark = pytest.mark.filterwarnings("error")
LEVEL = 200_000.0


def hours(n: int = 120, span: float = 100.0) -> Floats:
    return np.linspace(0, span, n)


def noisy(y: Floats, seed: int = 0, kb: float = 500) -> Floats:
    return y + np.random.default_rng(seed).normal(0, kb, len(y))


# ---- floors ----


def test_floors_are_the_least_of_equal_parts() -> None:
    x, sizes = np.arange(80.0), np.tile([9.0, 3, 7, 8], 20)
    assert list(sizes[floors(x, sizes)]) == [3] * 20
    assert len(floors(np.arange(5000.0), np.zeros(5000))) == MOST_FLOORS
    assert list(floors(np.zeros(4), np.array([4.0, 1, 2, 3]))) == [1]


def test_what_is_a_floor_itself_needs_no_others() -> None:
    """Four samples make one, as one of them may be a task's spike; a rollup is of ten."""
    x = np.arange(60.0)
    assert len(growth.floors(x, x)) == 15
    assert len(growth.floors(x, x, 2.0)) == 30
    assert list(growth.floors(x, x, 10.0)) == list(range(60))
    assert len(growth.floors(np.arange(500.0), np.arange(500.0), 10.0)) == growth.MOST_FLOORS


def test_a_sampler_that_was_faster_for_a_while_does_not_weigh_more() -> None:
    x = np.concatenate([np.arange(0, 10, 0.01), np.arange(10, 100, 0.5)])
    at = floors(x, np.zeros(len(x)))
    assert np.sum(x[at] < 10) == pytest.approx(len(at) / 10, abs=1)


def test_where_a_gap_leaves_too_few_parts_the_samples_are_divided() -> None:
    x = np.concatenate([np.arange(0, 1, 0.01), 1000 + np.arange(0, 1, 0.01)])
    assert len(floors(x, np.zeros(len(x)))) >= FEWEST_FLOORS


# ---- bursts ----


def test_a_burst_is_cut_and_a_line_a_step_and_a_fall_stay() -> None:
    line = LEVEL + 1000 * np.arange(120.0)
    for y in (line, LEVEL + 50_000 * (np.arange(120) > 60), LEVEL - 50_000 * (np.arange(120) > 60.0)):
        assert without_bursts(y) == pytest.approx(y)
    burst = line + 80_000 * np.isin(np.arange(120), [40, 41, 42])
    assert np.max(np.abs(without_bursts(burst) - line)) < 5000


# ---- two explanations ----


def test_a_line_is_told_with_its_slope() -> None:
    one = judge(Series(hours(), noisy(LEVEL + 300 * hours())))
    assert one.odds > 50 and one.trend.low < 300 < one.trend.high
    assert one.trend.slope == pytest.approx(300, rel=0.05)
    assert one.growth == pytest.approx(30_000, rel=0.05)
    assert (one.lasting, one.kept) == pytest.approx((1, 1), abs=0.15)
    assert one.ratchet == growth.RATCHET_PARTS


BOUNDED = {
    "level": LEVEL + 0 * hours(),
    "warm-up": LEVEL + 90_000 * (1 - np.exp(-hours() / 15)),
    "cache that fills": LEVEL + 90_000 * np.minimum(hours() / 40, 1),
    "step": LEVEL + 60_000 * (hours() > 55),
    "three steps": LEVEL + 30_000 * ((hours() > 20).astype(float) + (hours() > 45) + (hours() > 80)),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_ends_is_better_explained_by_an_end(name: str) -> None:
    for seed in range(3):
        one = judge(Series(hours(), noisy(BOUNDED[name], seed)))
        assert one.odds < 2 or one.growth < 4096, (seed, one.odds, one.growth)


def test_the_shape_and_the_steps_are_those_that_there_are() -> None:
    assert judge(Series(hours(), noisy(BOUNDED["warm-up"]))).bounded.shape is Shape.WARM_UP
    one = judge(Series(hours(), noisy(BOUNDED["step"]))).bounded
    assert one.steps and hours()[one.steps[0]] == pytest.approx(55, abs=2)


def test_the_wave_of_a_day_is_no_growth_and_hides_none() -> None:
    wave = 15_000 * np.sin(2 * np.pi * hours() / 24)
    flat = judge(Series(hours(), noisy(LEVEL + wave), hours()))
    assert flat.odds < 2 and np.ptp(flat.wave) == pytest.approx(30_000, rel=0.1)
    grows = judge(Series(hours(), noisy(LEVEL + wave + 300 * hours()), hours()))
    assert grows.odds > 50 and grows.trend.slope == pytest.approx(300, rel=0.1)


def test_the_load_of_now_is_no_growth() -> None:
    load = np.random.default_rng(4).uniform(0, 1, 120)
    y = noisy(LEVEL + 40_000 * load + 200 * hours())
    with_load, without = judge(Series(hours(), y, None, load)), judge(Series(hours(), y))
    assert with_load.noise < without.noise / 5
    assert with_load.trend.slope == pytest.approx(200, rel=0.1)


def test_of_a_sawtooth_nothing_is_kept() -> None:
    one = judge(Series(hours(), noisy(LEVEL + 80_000 * ((hours() / 23) % 1))))
    assert one.kept < 0.4 or one.growth < 4096


def test_a_trim_is_undone_unless_it_gives_all_back() -> None:
    grown = LEVEL + 800 * hours()
    trimmed = judge(Series(hours(), noisy(grown - 30_000 * (hours() > 60))))
    assert trimmed.kept > 0.8 and trimmed.trend.slope == pytest.approx(800, rel=0.1)
    back = judge(Series(hours(), noisy(grown - 800 * 60 * (hours() > 60))))
    assert back.kept < 0.8


def test_growth_that_began_late_is_told_from_then_on() -> None:
    one = judge(Series(hours(), noisy(LEVEL + 900 * np.clip(hours() - 40, 0, None))))
    assert one.unbounded.since == pytest.approx(0.4, abs=0.11)
    assert one.trend.slope == pytest.approx(900, rel=0.1) and one.record > 40_000


def test_noise_that_wanders_is_worth_less() -> None:
    rng, wander = np.random.default_rng(3), np.zeros(120)
    for i in range(1, 120):
        wander[i] = 0.9 * wander[i - 1] + rng.normal(0, 2000)
    red, white = (
        judge(Series(hours(), LEVEL + 300 * hours() + wander)),
        judge(Series(hours(), LEVEL + 300 * hours() + rng.permutation(wander))),
    )
    assert red.correlation > white.correlation + 0.2
    assert red.trend.high - red.trend.low > white.trend.high - white.trend.low


def test_a_constant_series_has_no_growth_and_raises_nothing() -> None:
    one = judge(Series(hours(FEWEST_FLOORS), np.full(FEWEST_FLOORS, LEVEL)))
    assert (one.growth, one.noise) == pytest.approx((0, 0), abs=1)


# ---- lives ----


def test_a_profile_is_what_lives_of_their_own_levels_have_in_common() -> None:
    rng = np.random.default_rng(0)
    lives = []
    for _ in range(30):
        s = np.sort(rng.uniform(0, 1, 8))
        lives.append((s, rng.uniform(1e5, 3e5) + 50_000 * s))
    at, y = profile(lives, 16)
    assert len(at) == 16 and np.polyfit(at, y, 1)[0] == pytest.approx(50_000, rel=0.05)


def test_students_quantile_is_that_of_the_tables() -> None:
    assert student(10) == pytest.approx(2.228, abs=0.002)
    assert student(3) == pytest.approx(3.182, rel=0.02)
    assert student(1e6) == pytest.approx(1.95997, abs=1e-4)
