"""What is held of a host: bounded, and the same whatever the order in which it came."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from plimsoll import samples
from plimsoll.samples import FIGURES, Figures, HostData, Process, Records, Samples, Seen

T0 = 1_763_942_400.0
UNIT = "celery-worker@gate.service"
DAY = 86400.0

# Of a process: pid, start time; time, size, tasks.
Row = tuple[int, float | None, float, float, float]


def row(second: float, size: float = 90_000, pid: int = 7, start: float | None = T0, tasks: float = np.nan) -> Row:
    return pid, start, T0 + second, size, tasks


def added(rows: Sequence[Row], to: Samples | None = None) -> Samples:
    """The rows taken in at once."""
    held = Samples() if to is None else to
    seen = [Seen(pid, start, UNIT, f"celery {pid}", "child") for pid, start, *_ in rows]
    held.add(seen, np.arange(len(rows)), *(np.array([one[at] for one in rows], dtype=float) for at in (2, 3, 4)))
    return held


def in_batches(rows: Sequence[Row], rng: random.Random) -> Samples:
    held, rest = Samples(), list(rows)
    while rest:
        some = rng.randint(1, 40)
        added(rest[:some], held)
        rest = rest[some:]
    return held


Held = dict[tuple[int, float | None], list[tuple[float, float, float, int]]]


def lives(held: Samples) -> Held:
    """(pid, start time) to (second, size, tasks or -1, count)."""
    held.settle()
    return {
        (process.pid, process.start_time): [
            (time - T0, size, -1 if np.isnan(tasks) else tasks, count) for _, time, size, tasks, count in zip(*rows)
        ]
        for process, rows in held.lives()
    }


# ---- samples ----


def test_samples_come_by_process_and_time() -> None:
    held = added([row(60), row(0, 80_000, tasks=3), row(0, pid=8), row(30, start=None), row(0, start=T0 + 1)])
    assert lives(held) == {
        (7, T0): [(0, 80_000, 3, 1), (60, 90_000, -1, 1)],
        (8, T0): [(0, 90_000, -1, 1)],
        (7, None): [(30, 90_000, -1, 1)],
        (7, T0 + 1): [(0, 90_000, -1, 1)],
    }
    assert len(held) == 5 and not Samples() and lives(Samples()) == {}


def test_a_process_is_as_its_newest_sample_says() -> None:
    rows = [
        (Seen(7, T0, "", "celery", ""), 0.0),
        (Seen(7, T0, "", "[celeryd: gate@h:MainProcess] -active- (worker -A shop)", "main"), 60.0),
        (Seen(7, T0, "", "celery worker", ""), 30.0),
    ]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        held = Samples()
        for at in order:
            held.add([rows[at][0]], np.array([0]), np.array([rows[at][1]]), np.ones(1), np.ones(1))
        held.settle()
        ((process, _),) = held.lives()
        assert process == Process("", 7, T0, "gate@h", "main")


@pytest.mark.parametrize(
    ("unit", "command", "worker"),
    [
        (UNIT, "[celeryd: gate@h:MainProcess]", UNIT),
        ("", "[celeryd: gate@h:MainProcess] -active- (worker -A shop)", "gate@h"),
        ("", "[celeryd: gate@h:ForkPoolWorker-3]", "gate@h"),
        ("", "[celeryd: gate@h:ForkPoolWorker-1:12]", "gate@h"),
        ("", "[celeryd: a:b c@h:PoolWorker-3] x", "a:b c@h"),
        ("", "[celeryd: gate] idle", "[celeryd: gate] idle"),
        ("", "celery -A shop worker -Q a", "celery -A shop worker -Q a"),
        ("", "", "pid 7"),
    ],
)
def test_a_worker_is_called_by_its_unit_or_by_what_its_processes_share(unit: str, command: str, worker: str) -> None:
    assert Seen(7, None, unit, command, "").worker == worker


def test_samples_that_are_there_twice_count_once_and_which_came_first_does_not_matter() -> None:
    rows = [row(n, 90_000 - n, tasks=n) for n in range(5)]
    assert lives(added(rows * 2)) == lives(added(rows))
    differ = [row(0, 5, tasks=1), row(0, 4, tasks=3), row(0, 4, tasks=2), row(0, 4)]
    for at in range(4):
        assert lives(added(differ[at:] + differ[:at])) == {(7, T0): [(0, 4, 2, 1)]}


def test_a_row_may_stand_for_many_samples(monkeypatch: Any) -> None:
    """As a rollup does; what is put together of them counts them all, and no number that a host gives is believed."""
    held = Samples()
    times, sizes = T0 + np.arange(8) * 600, np.arange(8) + 5.0
    counts = np.array([10, 9, 10, 3, 10, 0, 2.0**40, -4])
    held.add([Seen(7, T0, UNIT, "", "child")], np.zeros(8, dtype=int), times, sizes, times * np.nan, counts)
    assert [count for *_, count in lives(held)[7, T0]] == [10, 9, 10, 3, 10, 1, 6000, 1]
    monkeypatch.setattr(samples, "MOST_ROWS", 4)
    rows = lives(held)[7, T0]
    assert len(rows) <= 4 and sum(count for *_, count in rows) == 6044


def floors(rows: Iterable[Row], stretch: float) -> Held:
    """The rule in the plainest way: first and last stay, of the others the smallest of each stretch, the earliest."""
    found: Held = {}
    processes: dict[tuple[int, float | None], list[tuple[float, float, float]]] = {}
    for pid, start, time, size, tasks in rows:
        processes.setdefault((pid, start), []).append((time, size, tasks))
    for key, mine in processes.items():
        mine.sort()
        groups: dict[Any, list[tuple[float, float, float]]] = {"first": [mine[0]], "last": mine[1:][-1:]}
        for one in mine[1:-1]:
            groups.setdefault(one[0] // stretch, []).append(one)
        smallest = [(min(group, key=lambda one: (one[1], one[0])), len(group)) for group in groups.values() if group]
        found[key] = sorted((time - T0, size, tasks, count) for (time, size, tasks), count in smallest)
    return found


def many(rng: random.Random, number: int = 600) -> list[Row]:
    """Times at most once for each process, sizes that are often the same."""
    times = rng.sample(range(40_000), number)
    return [row(time, rng.randint(1, 4), rng.randint(1, 3), rng.choice([None, T0]), tasks=time) for time in times]


@pytest.mark.parametrize("seed", range(5))
def test_more_samples_than_are_held_become_floors_whatever_their_order(seed: int, monkeypatch: Any) -> None:
    rng = random.Random(seed)
    rows = many(rng)
    monkeypatch.setattr(samples, "MOST_ROWS", 200)
    # The shortest stretch of the row 60, 120, 240 at which they fit.
    stretch = 60.0
    while sum(map(len, floors(rows, stretch).values())) > 200:
        stretch *= 2
    wanted = floors(rows, stretch)
    assert sum(count for mine in wanted.values() for *_, count in mine) == 600
    for _ in range(5):
        rng.shuffle(rows)
        held = in_batches(rows, rng)
        # What comes in between is held in no more than that either.
        assert len(held) <= samples.SLACK * 200 + 40
        assert lives(held) == wanted
        assert len(held) <= 200
    rows.sort(key=lambda one: one[2])
    assert lives(in_batches(rows, rng)) == lives(in_batches(rows[::-1], rng)) == wanted


def test_samples_that_fit_stay_as_they_are(monkeypatch: Any) -> None:
    rows = many(random.Random(0), 200)
    monkeypatch.setattr(samples, "MOST_ROWS", 200)
    held = in_batches(rows, random.Random(0))
    assert len(held) == 200
    assert lives(held) == floors(rows, 0.5)
    # Twice the same are as many.
    assert lives(in_batches(rows * 2, random.Random(0))) == floors(rows, 0.5)


def test_of_more_processes_than_are_held_those_that_started_last_stay(monkeypatch: Any) -> None:
    monkeypatch.setattr(samples, "MOST_PROCESSES", 50)
    rows = [row(n + k, 1000 + n, pid=n % 60, start=T0 + n // 60) for n in range(180) for k in (0, 1, 2)]
    rows += [row(5, pid=n, start=None) for n in range(20)]
    wanted = {(pid, T0 + 2) for pid in range(10, 60)}
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(rows)
        held = in_batches(rows, rng)
        assert len(held) <= 3 * (samples.SLACK * 50 + 40)
        assert held.settle() == ["more than 50 processes: those that started first are left out"]
        found = lives(held)
        assert set(found) == wanted and all(len(mine) == 3 for mine in found.values())
        assert [size for _, size, *_ in found[10, T0 + 2]] == [1130] * 3


# ---- a clock that was wrong ----


def said_and_seconds(rows: Sequence[Row]) -> tuple[list[str], list[float]]:
    held = added(rows)
    said = held.settle()
    return said, sorted(second for mine in lives(held).values() for second, *_ in mine)


def test_samples_of_a_clock_that_was_not_set_yet_are_left_out() -> None:
    sound = [row(60 * n) for n in range(50)]
    early = [row(60 * n - T0, start=5.0) for n in range(3)]
    said, seconds = said_and_seconds(early + sound)
    assert seconds == [60.0 * n for n in range(50)]
    assert said == [
        "3 samples were left out, of 1970-01-01 to 1970-01-01: more than 30 days apart from the others, as of a clock "
        "that was wrong"
    ]
    # Of the same process, which cannot have been there before it began.
    said, seconds = said_and_seconds([row(-2 * DAY), row(-0.9 * DAY), *sound])
    assert seconds == [-0.9 * DAY, *(60.0 * n for n in range(50))]
    assert said[0].startswith("1 sample was left out, of 2025-11-22 to 2025-11-22: a day or more before their process")


def test_where_all_samples_are_before_the_start_the_start_is_wrong() -> None:
    assert said_and_seconds([row(n, start=T0 + 5 * DAY) for n in range(3)]) == ([], [0, 1, 2])


def test_a_clock_that_went_ahead_for_a_while_does_not_outweigh_the_rest() -> None:
    sound = [row(60 * n) for n in range(500)]
    said, seconds = said_and_seconds([*sound, row(400 * DAY), row(401 * DAY)])
    assert seconds == [60.0 * n for n in range(500)] and said[0].startswith("2 samples were left out, of 2026-12-29 to")


def test_after_a_month_without_samples_the_new_ones_count() -> None:
    said, seconds = said_and_seconds(
        [row(60 * n - 31 * DAY, pid=6, start=T0 - 40 * DAY) for n in range(500)] + [row(n) for n in range(9)]
    )
    assert seconds == list(range(9)) and said[0].startswith("500 samples were left out")
    # A process that was not seen for less than that is one.
    assert said_and_seconds([row(0), row(29 * DAY)]) == ([], [0, 29 * DAY])


# ---- figures and records ----


def figures_of(held: Figures) -> dict[str, list[list[float]]]:
    return {
        unit: np.stack(list(columns.values()), axis=1).tolist()
        for unit, columns in held.by_unit({"a", "b", "c"}).items()
    }


def figure(second: float, level: float = 5) -> list[float]:
    return [T0 + second, level, *[0.0] * (len(FIGURES) - 2)]


def test_figures_come_by_unit_and_time_each_once_and_the_newest_are_held(monkeypatch: Any) -> None:
    monkeypatch.setattr(samples, "MOST_FIGURES", 10)
    rows = [(unit, figure(n, n)) for n in range(40) for unit in ("a", "b")] + [("a", figure(39, 3))]
    rows += [(f"gone {n}", figure(-n)) for n in range(20)]
    rng = random.Random(0)
    for _ in range(10):
        rng.shuffle(rows)
        held = Figures()
        for at in range(0, len(rows), 3):
            some = rows[at : at + 3]
            held.add([unit for unit, _ in some], np.arange(len(some)), np.array([one for _, one in some]))
        assert held.settle() == ["more than 10 figures of units: the oldest are left out"]
        # Five are of the newest two times; all of one time stay or go.
        newest = [figure(n, n) for n in range(36, 40)]
        assert figures_of(held) == {"a": [*newest[:-1], figure(39, 3)], "b": newest}
    assert list(held.by_unit({"b", "d"})) == ["b"]
    assert (Figures().settle(), Figures().by_unit({"a"})) == ([], {})


def test_records_come_by_time_each_once_and_the_newest_are_held(monkeypatch: Any) -> None:
    records = [(float(n // 2), json.dumps({"time": n // 2, "n": n % 2})) for n in range(60)]
    monkeypatch.setattr(samples, "MOST_TRACE_BYTES", sum(len(line) for _, line in records[-9:]))
    rng = random.Random(0)
    for _ in range(10):
        rng.shuffle(records)
        held = Records()
        for one in records * 2:
            held.add(*one)
        assert held.settle() == ["more than 0 MiB of trace records: the oldest are left out"]
        assert held.by_time() == [{"time": n // 2, "n": n % 2} for n in range(52, 60)]
    assert (Records().settle(), Records().by_time()) == ([], [])


def test_a_host_can_be_made_of_rows() -> None:
    data = HostData(
        "h", [samples.Sample(T0, 7, 5, swap_kb=3, tasks=2)], [samples.CgroupSample(T0, "u", 9)], [{}], ["p"]
    )
    assert lives(data.samples) == {(7, None): [(0, 8, 2, 1)]}
    assert data.cgroups.by_unit({"u"})["u"]["memory_current_kb"].tolist() == [9]
    assert (data.host, data.traces, data.problems) == ("h", [{}], ["p"])
    assert HostData("h").problems == [] and not HostData("h").samples
    early = HostData("h", [samples.Sample(5, 7, 5)] + [samples.Sample(T0 + n, 8, 5) for n in range(9)])
    assert len(early.problems) == 1
