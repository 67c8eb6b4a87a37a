"""From samples to workers: who is who, when a life begins and ends, and what its unit allows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from plimsoll import samples, series
from plimsoll.formats import CgroupSample, HostData, Sample
from plimsoll.samples import Seen
from plimsoll.series import Generation, workers_of

T0 = 1_763_942_400.0
UNIT = "celery-worker@gate.service"


def sample(minute: float, pid: int = 7, kb: int = 90_000, **more: Any) -> Sample:
    return Sample(T0 + 60 * minute, pid, kb, **{"command": "celery", "unit": UNIT, "start_time": T0, **more})


def lives(rows: Sequence[Sample]) -> tuple[Generation, ...]:
    """The processes of the only worker."""
    (one,) = workers_of(HostData("h", rows))
    return one.generations


# ---- who is who ----


def test_a_process_is_told_by_pid_and_start_and_a_worker_by_its_unit() -> None:
    rows = [
        sample(1, role="main"),
        sample(0, kb=80_000, role="child", swap_kb=8, tasks=3),
        sample(1, pid=8, role="child"),
        sample(2, start_time=T0 + 100, role="child"),
        sample(2, unit="celery-worker@other.service"),
    ]
    first, other = workers_of(HostData("h", rows))
    assert (first.host, first.unit, first.samples, len(first.generations)) == ("h", UNIT, 4, 3)
    assert first.span_hours == pytest.approx(2 / 60)
    old = first.generations[0]
    assert (old.pid, old.role, list(old.times), list(old.sizes)) == (7, "main", [T0, T0 + 60], [80_008, 90_000])
    assert old.tasks[0] == 3 and math.isnan(old.tasks[1])
    assert (other.unit, other.samples) == ("celery-worker@other.service", 1)


def test_without_a_unit_the_command_is_the_worker() -> None:
    plain = [sample(n, pid, unit="", start_time=None, command=f"celery {pid}") for n in range(3) for pid in (7, 8)]
    assert [(one.unit, one.samples) for one in workers_of(HostData("h", plain))] == [("celery 7", 3), ("celery 8", 3)]


@pytest.mark.parametrize("start", [None, T0])
def test_processes_that_name_their_node_are_one_worker(start: float | None) -> None:
    """As setproctitle has them."""
    titles = {7: "[celeryd: gate@h:MainProcess] -active- (worker -A shop)", 8: "[celeryd: gate@h:ForkPoolWorker-1]"}
    rows = [sample(n, pid, unit="", start_time=start, command=titles[pid]) for n in range(3) for pid in titles]
    (one,) = workers_of(HostData("h", rows))
    assert (one.unit, [life.pid for life in one.generations]) == ("gate@h", [7, 8])
    # Before they have a title they share the command line, and are who they are by their start time.
    before = [sample(-1, pid, unit="", start_time=start, command="celery -A shop worker") for pid in titles]
    found = workers_of(HostData("h", before + rows))
    assert [one.unit for one in found] == (["gate@h"] if start else ["celery -A shop worker", "gate@h"])


def test_a_process_that_changes_its_title_stays_one() -> None:
    rows = [sample(n, unit="", command=f"[celeryd: gate] {'idle' if n % 2 else 'busy'}") for n in range(6)]
    (one,) = workers_of(HostData("h", rows))
    assert (one.unit, one.samples) == ("[celeryd: gate] idle", 6)


def test_a_clock_that_was_set_does_not_make_two_of_one_process() -> None:
    """A sampler that is started again reckons a start time by the clock as it is then."""
    before = [sample(n, role="main") for n in (1, 2, 3)]
    after = [sample(n, start_time=T0 + 1.5, role="child") for n in (4, 5)]
    again = [sample(n, start_time=T0 + 0.5, role="child") for n in (5.2, 5.4)]
    later = [sample(n, start_time=T0 + 330, role="main") for n in (6, 7)]
    found = lives([*after, *later, *again, *before])
    assert [(len(life.times), life.samples, life.start_time, life.role) for life in found] == [
        (7, 7, T0, "child"),
        (2, 2, T0 + 330, "main"),
    ]
    assert list(np.diff(found[0].times) > 0) == [True] * 6
    # Both at once are two, whatever they say.
    assert len(lives([*before, *(sample(n, start_time=T0 + 1.5) for n in (2.5, 3.5))])) == 2
    # One of another unit is another.
    assert len(workers_of(HostData("h", [*before, *(one._replace(unit="x") for one in after)]))) == 2


def test_samples_that_are_there_twice_count_once() -> None:
    (one,) = lives([sample(n) for n in range(5)] * 2)
    assert one.samples == 5 and list(np.diff(one.times)) == [60] * 4


def test_a_long_series_is_told_by_its_floors_and_says_how_many_samples_there_were(monkeypatch: Any) -> None:
    monkeypatch.setattr(samples, "MOST_ROWS", 50)
    rows = [sample(n / 6, kb=90_000 + (n + 3) % 6) for n in range(240)]
    (one,) = lives(rows)
    assert one.samples == 240 and len(one.times) <= 50
    assert (one.times[0], one.times[-1]) == (rows[0].timestamp, rows[-1].timestamp)
    assert set(one.sizes[1:-1]) == {90_000}


# ---- rollups ----


def rolled(*lines: tuple[float, int, float, int], to: HostData | None = None, pid: int = 7) -> HostData:
    """Rollups of a process: the minute at which each begins, samples, start time in minutes, KiB."""
    data = HostData("h") if to is None else to
    for minute, count, start, kb in lines:
        columns = (np.array([value], dtype=float) for value in (T0 + 60 * minute + 300, kb, math.nan, count))
        data.samples.add([Seen(pid, T0 + 60 * start, UNIT, "", "child")], np.array([0]), *columns)
    return data


def of(data: HostData) -> tuple[Generation, ...]:
    data.settle()
    (one,) = workers_of(data)
    return one.generations


def minutes(*times: float) -> list[float]:
    return [(time - T0) / 60 for time in times]


def test_rollups_tell_when_a_process_was_first_and_last_seen_by_their_numbers_of_samples() -> None:
    (one,) = of(rolled((0, 4, 5.5, 50), (10, 10, 5.5, 51), (20, 3, 5.5, 52)))
    assert (one.samples, one.interval, list(one.rolled)) == (17, 60, [True] * 3)
    assert minutes(*one.times, one.begin, one.end) == pytest.approx([5, 15, 25, 5.5, 23])
    # It had begun before the sampler did.
    (old,) = of(rolled((0, 4, -500, 50), (10, 10, -500, 51)))
    assert minutes(old.begin, old.end) == pytest.approx([6, 20])
    # What lived within ten minutes: another one tells how many samples they have.
    short, _ = of(rolled((0, 2, 3.5, 50), to=rolled((0, 10, -500, 50), (10, 10, -500, 50), pid=8)))
    assert minutes(short.begin, short.end) == pytest.approx([3.5, 5.5])


def test_samples_are_no_rollups_when_one_is_of_the_middle_of_ten_minutes() -> None:
    (one,) = lives([sample(n) for n in range(30)])
    assert one.interval == 60 and not one.rolled.any() and minutes(one.begin, one.end) == [0, 29]
    # Nor where others of the host are.
    data = HostData("h", [sample(n) for n in range(30)])
    one, other = sorted(of(rolled((0, 5, -9, 50), (10, 10, -9, 50), pid=8, to=data)), key=lambda each: each.pid)
    assert minutes(one.begin, one.end) == [0, 29] and (one.whole, other.whole) == (0, 10)


def test_a_process_may_have_rollups_and_then_samples() -> None:
    data = HostData("h", [sample(20 + n / 2, start_time=T0 - 60) for n in range(30)])
    for line in ((0, 10, -1, 90_000), (10, 10, -1, 90_000)):
        data = rolled(line, to=data)
    data.settle()
    ((one,),) = [each.generations for each in workers_of(data)]
    assert (one.samples, list(one.rolled), one.interval) == (50, [True] * 2 + [False] * 30, 60)
    assert minutes(one.begin, one.end) == pytest.approx([0, 34.5])


def test_a_sampler_that_is_started_again_in_ten_minutes_does_not_make_two_of_one_process() -> None:
    """It reckons the start anew, by the clock as it is then, and writes another rollup of the same ten minutes."""
    before = rolled((0, 10, -20, 50), (10, 4, -20, 51))
    (one,) = of(rolled((10, 5, -19.9, 49), (20, 10, -19.9, 52), to=before))
    assert minutes(*one.times) == [5, 15, 25] and list(one.sizes) == [50, 49, 52] and list(one.counts) == [10, 9, 10]
    # Its pid was another's in the same ten minutes.
    gone = rolled((0, 10, -20, 50), (10, 4, -20, 51))
    first, second = of(rolled((10, 4, 16, 20), (20, 10, 16, 21), to=gone))
    assert minutes(first.end, second.begin) == pytest.approx([14, 16])


# ---- a pid that came again, without start times ----


def plain(sizes: Sequence[float], minutes: Sequence[float] | None = None) -> list[Sample]:
    times = range(len(sizes)) if minutes is None else minutes
    return [sample(n, kb=int(kb), unit="", start_time=None) for n, kb in zip(times, sizes)]


def parts(rows: Sequence[Sample]) -> list[int]:
    found = lives(rows)
    assert all(one.pid == 7 and one.start_time is None for one in found)
    return [len(one.times) for one in found]


LEAK = [60_000 + 3000 * n for n in range(40)]


def test_a_leak_that_starts_anew_is_a_new_process() -> None:
    """In a container, where each start gives the same pids."""
    assert parts(plain(LEAK * 3)) == [40, 40, 40]
    assert parts(plain(LEAK * 3 + LEAK[:3])) == [40, 40, 40, 3]
    # With a start time that is no question.
    assert len(lives([sample(n, kb=kb) for n, kb in enumerate(LEAK * 3)])) == 1


def test_after_a_pause_half_the_size_is_another_process() -> None:
    minutes = [*range(10), *range(20, 30)]
    assert parts(plain([90_000] * 10 + [44_000] * 10, minutes)) == [10, 10]
    # It need not be where the first one began, but it must be half.
    assert parts(plain([20_000, *[90_000] * 9, *[44_000] * 10], minutes)) == [10, 10]
    assert parts(plain([90_000] * 10 + [46_000] * 10, minutes)) == [20]
    # A pause of five intervals is none.
    assert parts(plain([90_000] * 10 + [44_000] * 10, [*range(10), *range(14, 24)])) == [20]


def test_what_a_task_takes_and_gives_back_begins_no_process() -> None:
    rng = random.Random(0)
    spiky = [60_000 + (rng.random() < 0.4) * rng.randint(0, 400_000) for _ in range(2000)]
    assert parts(plain(spiky)) == [2000]
    # Nor for as long as tasks usually take.
    assert parts(plain(([60_000] * 10 + [200_000] * 11) * 20)) == [420]
    # One that began lower than it falls to has given memory back.
    assert parts(plain([30_000] * 5 + [200_000] * 40 + [60_000] * 40)) == [85]


def test_one_sample_is_a_life() -> None:
    assert parts(plain([5])) == [1] and parts(plain([90_000, 5])) == [2]


def test_the_workers_are_the_same_whatever_the_order_of_samples() -> None:
    rng = random.Random(0)
    rows = [sample(n, pid, kb=60_000 + rng.randint(0, 9)) for n in range(50) for pid in (7, 8)]
    rows += [sample(n, start_time=T0 + 1, role="main") for n in range(60, 80)] + plain(LEAK * 3)
    wanted = repr(workers_of(HostData("h", rows)))
    for _ in range(5):
        rng.shuffle(rows)
        assert repr(workers_of(HostData("h", rows))) == wanted


# ---- the unit's own figures ----


def figure(minute: float, current: int | None = 100, **more: Any) -> CgroupSample:
    return CgroupSample(T0 + 60 * minute, UNIT, current, **more)


def test_limits_are_the_last_and_events_what_was_added_while_watched() -> None:
    figures = [
        figure(0, 100, memory_max_kb=900, events_high=5, oom_kill=1, n_restarts=0),
        figure(1, 200, memory_max_kb=900, events_high=8, oom_kill=1),
        figure(2, None, events_high=2, oom_kill=0, n_restarts=1),
        figure(3, 50_000, memory_high_kb=700, memory_max_kb=800, events_high=2, oom_kill=2, n_restarts=1),
    ]
    for rows in (figures, figures[::-1], figures * 2):
        (one,) = workers_of(HostData("h", [sample(0)], rows))
        limits = one.limits
        assert (limits.high_kb, limits.max_kb, limits.level_kb) == (700, 800, 200)
        assert (limits.events_high, limits.oom_kills, limits.restarts) == (3 + 2, 2, 1)
        assert list(limits.levels) == [100, 200, 50_000] and list(limits.times) == [T0, T0 + 60, T0 + 180]


def test_the_level_is_the_median_of_the_last_figures() -> None:
    (one,) = workers_of(HostData("h", [sample(0)], [figure(n, level) for n, level in enumerate([9, 1, 2, 3, 4, 99])]))
    assert one.limits.level_kb == 3 and series.LAST_FIGURES == 5


def test_a_worker_without_figures_has_no_limits() -> None:
    (one,) = workers_of(HostData("h", [sample(0)], [CgroupSample(T0, "another.service", 5)]))
    assert (one.limits.max_kb, one.limits.level_kb, len(one.limits.levels)) == (None, None, 0)
    (one,) = workers_of(HostData("h", [sample(0)], [figure(0, None)]))
    assert (one.limits.max_kb, one.limits.level_kb, len(one.limits.levels)) == (None, None, 0)
    assert workers_of(HostData("h")) == []
