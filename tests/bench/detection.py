"""How well leaks are told, beside what people use: `python -m tests.bench.detection [--seeds N] [--years N]`.

1. Precision and recall on each labelled set, of plimsoll from samples and from rollups and, on the same series, of an
   OLS slope over the last day, of Mann and Kendall's test, and of Prometheus's predict_linear over the last hour, four
   hours ahead; what plimsoll misses by name; how often the 95 % interval of the growth holds the truth.
2. Lead time: of steady leaks that grow by 5 % of MemoryMax in so many hours, when they are called.
3. False calls: of healthy workers that run for months and are judged every day by the last fortnight, how many.
4. Leaks in children that are recycled: from rollups of how long lives they are told.

It takes about half an hour on two cores. docs/detection.md has the figures of the last run.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from plimsoll.detect import judge, worth
from plimsoll.series import Floats, Generation, Limits, Worker

from tests.labelled.rollups import routine
from tests.labelled.sets import NAMES, Labelled, labelled
from tests.labelled.simulated import DAY, HOUR, T0, daily, wander

MOST_PAIRS = 500
# What a worker is like: parts of its level, hours, times a day.
Character = dict[str, Any]


def ols(worker: Worker) -> bool:
    """A slope over the last day of a process, beyond doubt by its own standard error, and enough to matter."""

    def grows(one: Generation) -> bool:
        late = one.times >= one.times[-1] - DAY
        x, y = one.times[late] - one.times[-1], one.sizes[late]
        if len(x) < 12:
            return False
        slope, level = np.polyfit(x, y, 1)
        error = np.sqrt(np.sum((y - level - slope * x) ** 2) / (len(x) - 2) / np.sum((x - x.mean()) ** 2))
        return bool(slope > 2 * error and slope * np.ptp(x) >= worth(float(y[0])))

    return any(map(grows, worker.generations))


def mann_kendall(worker: Worker) -> bool:
    """Mann and Kendall's test at 5 %, over the whole life of a process, and enough growth to matter."""

    def grows(one: Generation) -> bool:
        at = np.unique(np.linspace(0, len(one.sizes) - 1, MOST_PAIRS).astype(int))
        y, n = one.sizes[at], len(at)
        if n < 12:
            return False
        s = float(np.sum(np.sign(y[None, :] - y[:, None])[np.triu_indices(n, 1)]))
        gained = float(np.median(y[-n // 10 :]) - np.median(y[: n // 10 + 1]))
        return s > 1.96 * (n * (n - 1) * (2 * n + 5) / 18) ** 0.5 and gained >= worth(float(y[0]))

    return any(map(grows, worker.generations))


def predict_linear(worker: Worker) -> bool:
    """predict_linear(memory[1h], 4 * 3600) above MemoryMax, of all processes that live; half as much again without."""
    last = max(float(one.times[-1]) for one in worker.generations)
    living = [one for one in worker.generations if last - one.times[-1] <= 600 and len(one.times) > 3]
    level = sum(float(one.sizes[-1]) for one in living)
    ahead = 0.0
    for one in living:
        late = one.times >= last - HOUR
        if late.sum() < 3 or np.ptp(one.times[late]) <= 0:
            return False
        slope, now = np.polyfit(one.times[late] - last, one.sizes[late], 1)
        ahead += now + 4 * HOUR * slope
    return ahead > (worker.limits.max_kb or 1.5 * level)


METHODS: dict[str, Callable[[Worker], bool]] = {
    "OLS slope, last 24 h": ols,
    "Mann-Kendall": mann_kendall,
    "predict_linear 1 h, 4 h ahead": predict_linear,
}


PLIMSOLL = ("plimsoll", "plimsoll, from rollups")


def judged(one: Labelled) -> dict[str, Any]:
    found: dict[str, Any] = {"one": (one.kind, one.name, one.leaking), "held": {}, "follows": {}}
    for name, workers in zip(PLIMSOLL, (one.workers, one.routine)):
        leaks = [verdict for verdict in map(judge, workers) if verdict.pattern.leaking]
        found[name] = bool(leaks)
        if leaks and one.kb_per_hour is not None:
            rate = max(leaks, key=lambda each: each.rate.slope).rate
            found["held"][name] = rate.low <= one.kb_per_hour <= rate.high
        if leaks and one.follows:
            found["follows"][name] = one.follows, leaks[0].follows
    return found | {name: any(map(method, one.workers)) for name, method in METHODS.items()}


def compare(pool: ProcessPoolExecutor, seeds: Sequence[int]) -> None:
    for name in NAMES:
        rows = list(pool.map(judged, labelled(name, seeds), chunksize=8))
        print(f"\n{name}: {len(rows)} workers of {len({row['one'][0] for row in rows})} kinds")
        for method in (*PLIMSOLL, *METHODS):
            right = sum(row[method] and row["one"][2] for row in rows)
            called, leaks = sum(row[method] for row in rows), sum(row["one"][2] for row in rows)
            print(f"  {method:30s} precision {right / max(1, called):.3f}  recall {right / leaks:.3f}")
        for method in PLIMSOLL:
            held = [row["held"][method] for row in rows if method in row["held"]]
            told = [row["follows"][method] for row in rows if method in row["follows"]]
            follows = Counter("right" if true == said else "wrong" if said else "not told" for true, said in told)
            print(f"  {method}: the interval holds the true growth of {sum(held)} of {len(held)};")
            print(f"    what it follows: {dict(follows)}")
            wrong = [
                ("missed " if leaking else "called ") + which
                for row in rows
                for _, which, leaking in [row["one"]]
                if row[method] != leaking
            ]
            print(f"    wrong: {', '.join(wrong) or 'none'}")


# ---- a worker that runs ----


def life(
    rng: np.random.Generator, start: float, hours: float, level: float, of: Character, interval: float
) -> tuple[Floats, Floats]:
    """A process that warms up, follows the day, wanders, collects its garbage, meets large tasks and bursts."""
    times = np.arange(start, start + hours * HOUR, interval)
    age = (times - start) / HOUR
    sizes = level * (1 + of["warm"] * (1 - np.exp(-age / of["warm_hours"])) + of["swing"] / 2 * of["load"](times))
    sizes = sizes + wander(rng, times, of["noise"] * level, of["forgets"])
    sizes = sizes + np.abs(rng.normal(0, of["noise"] * level * 0.3, len(times)))
    sizes = sizes + of["saw"] * level * ((age / of["period"] + rng.uniform()) % 1)
    large = int(rng.poisson(of["large_a_day"] * hours / 24))
    at, most = np.sort(rng.uniform(0, hours, large)), np.maximum.accumulate(rng.uniform(0, of["largest"], large))
    sizes = sizes + level * np.concatenate([[0.0], most])[np.searchsorted(at, age)]
    for _ in range(int(rng.poisson(of["bursts_a_day"] * hours / 24))):
        begin = rng.uniform(0, hours)
        sizes = sizes + ((age >= begin) & (age < begin + rng.uniform(0.1, 2))) * rng.exponential(0.3) * level
    return times, np.round(sizes / 4) * 4


def character(rng: np.random.Generator, rough: bool) -> Character:
    """Of a worker. rough: all at once that is healthy and looks like growth for a while."""
    return {
        "warm": rng.uniform(0, 0.5),
        "warm_hours": float(np.exp(rng.uniform(np.log(0.1), np.log(12 if rough else 1)))),
        "swing": rng.uniform(0, 0.4) if rng.random() < 0.6 else 0.0,
        "load": daily(rng, weekend=float(rng.choice([1, 0.5]))),
        "noise": rng.uniform(0.002, 0.02),
        "forgets": float(np.exp(rng.uniform(np.log(0.2), np.log(8 if rough else 1)))),
        "saw": rng.uniform(0.03, 0.3) if rough and rng.random() < 0.4 else 0.0,
        "period": float(np.exp(rng.uniform(np.log(0.5), np.log(12)))),
        "large_a_day": rng.uniform(0, 1.5) if rough else 0.0,
        "largest": rng.uniform(0, 0.3),
        "bursts_a_day": rng.uniform(0, 3) if rough else rng.uniform(0, 0.5),
    }


def process(start: float, times: Floats, sizes: Floats) -> Generation:
    return Generation(7, start, "main", times, sizes, np.full(len(times), np.nan), np.ones(len(times), dtype=np.uint32))


def both_ways(lives: Sequence[Generation]) -> list[Worker]:
    """Of these processes, from samples and from rollups."""
    one = Worker("h", "u", tuple(lives), Limits())
    return [one, *routine([one], {})]


# Odds, as twice their logarithm, from which a leak is called: the first are those of detect.SURE.
ODDS = (12, 14, 16, 18)


def odds(worker: Worker) -> float:
    """Of a call, at least those that it takes; else below all."""
    sure = judge(worker).confidence
    return -1.0 if sure is None else max(12.0, 2 * float(np.log(sure / (1 - sure))))


def months(asked: tuple[int, bool]) -> list[list[int]]:
    """How often it began in half a year that a healthy worker was called, for each of ODDS; by samples, rollups."""
    seed, rough = asked
    rng = np.random.default_rng([seed, rough, 77])
    of, level = character(rng, rough), float(np.exp(rng.uniform(np.log(60), np.log(1500)))) * 1024
    between = float(np.exp(rng.uniform(np.log(2), np.log(60))))
    lives, start, end = [], T0, T0 + 182 * DAY
    while start < end:
        hours = min(rng.exponential(between) * 24 + 3, (end - start) / HOUR)
        lives.append((start, *life(rng, start, hours, level * rng.uniform(0.97, 1.03), of, 60.0)))
        start += hours * HOUR + 30
    told: list[list[float]] = [[], []]
    for now in np.arange(T0 + DAY, end, DAY):
        seen = [(born, (t < now) & (t > now - 14 * DAY), t, y) for born, t, y in lives]
        found = [process(born, t[part], y[part]) for born, part, t, y in seen if part.sum() > 1]
        for each, worker in zip(told, both_ways(found)):
            each.append(odds(worker))
    return [[sum(b >= least > a for a, b in zip([-1.0, *each], each)) for least in ODDS] for each in told]


GROWN_IN = (1, 3, 6, 12, 24, 48, 96)
# Noise of the floors, parts of the level: nine of ten processes of the recorded workers are below the first.
QUIET, LOUD = (0.0005, 0.0075), (0.0075, 0.02)


def lead(asked: tuple[int, float, tuple[float, float]]) -> list[float]:
    """When a leak that grows by 5 % of MemoryMax in so many hours is called, as a part of the time that it may take.

    For each of ODDS, and from rollups for the first of them; infinite where it never was in three times as long.
    """
    seed, hours, noise = asked
    rng = np.random.default_rng([seed, int(hours), 78])
    of, level = character(rng, False), float(np.exp(rng.uniform(np.log(60), np.log(800)))) * 1024
    of["swing"], of["noise"] = 0.0, float(np.interp(of["noise"], (0.002, 0.02), noise))
    most = level * rng.uniform(1.6, 3)
    times, sizes = life(rng, T0, 3 * hours + 30, level, of, 60.0 if hours < 24 else 300.0)
    sizes = sizes + 0.05 * most / hours * (times - T0) / HOUR
    first = [float("inf")] * (len(ODDS) + 1)
    for part in np.concatenate([np.arange(0.3, 1.01, 0.1), np.arange(1.2, 3, 0.2)]):
        seen = times < T0 + part * max(6.0, hours) * HOUR + 1
        told, rolled = map(odds, both_ways([process(T0, times[seen], sizes[seen])]))
        called = [*(told >= least for least in ODDS), rolled >= ODDS[0]]
        first = [min(was, float(part)) if now else was for was, now in zip(first, called)]
        if max(first) < float("inf"):
            break
    return first


LIVES_MINUTES = (10, 15, 20, 25, 30, 45, 60)


def recycled(asked: tuple[int, int]) -> tuple[bool, bool]:
    """Whether children that grow until they are recycled after so many minutes are told, from samples and rollups.

    Two side by side for half a day, each of which grows by a third of what it begins with.
    """
    seed, minutes = asked
    rng = np.random.default_rng([seed, minutes, 79])
    main, lives = np.arange(T0, T0 + DAY / 2, 60.0), list[Generation]()
    for _ in range(2):
        start = T0 + rng.uniform(0, 60)
        while start < T0 + DAY / 2:
            times = np.arange(start, min(start + minutes * 60 * rng.uniform(0.8, 1.2), T0 + DAY / 2), 60.0)
            size = 60_000 * (1 + (times - start) / (minutes * 60) / 3) + rng.exponential(500, len(times))
            spikes = (rng.random(len(times)) < 0.3) * rng.exponential(10_000, len(times))
            lives.append(replace(process(start, times, size + spikes), pid=len(lives) + 10, role="child"))
            start = float(times[-1]) + 60
    told = [judge(one).pattern.leaking for one in both_ways([process(T0, main, np.full(len(main), 7e4)), *lives])]
    return told[0], told[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6, help="of each simulated kind: 6")
    parser.add_argument("--years", type=int, default=8, help="of healthy running of each character: 8")
    parser.add_argument("--no-sets", action="store_true", help="lead time and false calls alone")
    given = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        if not given.no_sets:
            compare(pool, range(200, 200 + given.seeds))
        for name, noise in (("quiet", QUIET), ("loud", LOUD)):
            print(
                f"\nlead time of steady leaks in {name} workers, whose noise is {noise} of the level, as a part of what"
            )
            print(f"it may be, and how many are in time for odds of {ODDS}:")
            for hours in GROWN_IN:
                found = list(pool.map(lead, [(seed, hours, noise) for seed in range(4 * given.seeds)]))
                parts = sorted(each[0] for each in found)
                *in_time, rolled = [sum(each[at] <= 1.0001 for each in found) for at in range(len(ODDS) + 1)]
                middle, slow = parts[len(parts) // 2], parts[-1]
                print(
                    f"  5 % in {hours:2d} h: {in_time} of {len(parts)} in time; median {middle:.1f}, slowest {slow:.1f}"
                    f"; from rollups {rolled} in time"
                )
        print(f"\nfalse calls of healthy workers, a worker and year, judged daily by 14 days, for odds of {ODDS}:")
        for rough in (False, True):
            found = np.sum(list(pool.map(months, [(seed, rough) for seed in range(2 * given.years)])), axis=0)
            for name, begun in zip(PLIMSOLL, found / given.years):
                print(f"  {'rough' if rough else 'plain'}, {name}: {', '.join(f'{each:.2f}' for each in begun)}")
        print(f"\nleaks in children that are recycled after so many minutes, told of {4 * given.seeds}:")
        for minutes in LIVES_MINUTES:
            told = np.sum(list(pool.map(recycled, [(seed, minutes) for seed in range(4 * given.seeds)])), axis=0)
            print(f"  {minutes:2d}: from samples {told[0]}, from rollups {told[1]}")


if __name__ == "__main__":
    main()
