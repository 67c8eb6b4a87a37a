"""Memory series of simulated Celery workers with labels, out of mechanisms.

It shares no code with the detector nor with the rest of the set. It was written to be held back; what of its seeds 0 to
7 was missed then led to changes of the detector, and heldout.py took its place. The series come out of mechanisms
rather than out of formulas for curves: tasks arrive by a load curve, allocate, hold and free; the heap keeps part of
its high-water mark; caches have bounds; children and workers are replaced. The labels are what the mechanism did, not
what the series looks like, but each kind is dimensioned so that a careful person who sees the whole series can tell: a
leak grows by 5 % of its limit or level at least, for six hours at least, for three days under a daily swing; what fills
up in a healthy worker has been full for the last 40 % of the series.

    python -m tests.labelled.mechanisms DIR [--seeds N]

writes DIR/KIND-SEED/NAME.csv and DIR/labels.json.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MIB = 1024.0  # in KiB, as all sizes here
PAGE = 4
HOUR, DAY = 3600.0, 86400.0
MAX_ROWS = 55_000  # before duplicated rows
NEW_YEAR = 1767225600  # 2026-01-01T00:00:00Z, a Thursday
INTERVALS = (15, 20, 30, 60, 120, 300)
NAMES = ("mail", "reports", "images", "billing", "default", "search", "exports", "webhooks", "thumbs", "etl")
PLAIN = "timestamp,pid,rss_kb,command"
FULL = "timestamp,pid,rss_kb,command,unit,start_time,role,pss_kb,uss_kb,swap_kb,fds,threads,tasks"
CGROUP = (
    "timestamp,unit,memory_current_kb,memory_high_kb,memory_max_kb,swap_kb,events_high,events_max,oom_kill,"
    "pressure_some_us,pressure_full_us,n_restarts"
)
# Beats and processes not read; a clock an hour ahead for a while, or unset at first; a pid used again; a restart of the
# worker; an interval that changes; lines written twice, lines written by half, lines in the wrong file
MESS = ("missing", "gaps", "hour", "behind", "reuse", "restart", "thin", "twice", "torn", "disorder")


@dataclass(frozen=True)
class Case:
    kind: str
    seed: int
    leaking: bool
    kb_per_hour: float | None  # what the whole worker is expected to leak an hour by the end, as sets.py has it
    follows: str | None  # "load" or "time", where the series can tell them apart
    files: dict[str, str]


KINDS: dict[str, Callable[[int], Case]] = {}


def cases(seeds: Iterable[int]) -> Iterator[Case]:
    """Every kind with every seed."""
    for seed in seeds:
        for make in KINDS.values():
            yield make(seed)


# Arrays have a row a process and a column a beat of the sampler. A row is a slot: the processes that follow one another
# in it are its generations, and what is summed up "since" starts anew with each.


def starts(cuts: Array) -> Array:
    """For each cell the column in which its generation began."""
    return np.maximum.accumulate(np.where(cuts, np.arange(cuts.shape[1]), 0), axis=1)


def since(amounts: Array, start: Array) -> Array:
    """Running sums that begin anew with each generation."""
    total = np.cumsum(amounts, axis=1)
    return total - np.take_along_axis(total - amounts, start, axis=1)


def crossings(amounts: Array, rooms: Callable[[], float], cuts: Array) -> Array:
    """Where a running sum that begins anew at each of `cuts`, and whenever it is full, passes its room."""
    found = np.zeros_like(cuts)
    for row in range(len(amounts)):
        total = np.cumsum(amounts[row])
        forced = [*np.flatnonzero(cuts[row]).tolist(), len(total)]
        begin = 0
        for end in forced:
            while begin < end:
                begin = max(begin + 1, int(np.searchsorted(total, total[begin] + rooms(), "right")))
                if begin < end:
                    found[row, begin] = True
            begin = end
    return found


def wander(rng: np.random.Generator, length: int, steps: float) -> Array:
    """An autocorrelated series of unit variance that forgets within `steps`."""
    knots = rng.normal(size=int(length / max(steps, 1)) + 3)
    # Between its knots a line varies less than at them
    return 1.2 * np.interp(np.arange(length) / max(steps, 1), np.arange(len(knots)), knots)


class Worker:
    """One worker on one host: a main process and its children, or one process that does the tasks itself."""

    def __init__(
        self,
        kind: str,
        seed: int,
        *,
        hours: tuple[float, float] = (8, 240),
        pool: str = "any",  # one | prefork | any
        children: tuple[float, float] = (2, 15),
        load: str = "any",  # steady | batches | day | week | daily (one of these two) | idle | any
        lives: tuple[float, float] | None = None,  # hours, of children that are recycled or of workers that die
        restarts: bool = True,  # whether mess may restart it
        old: bool | None = None,  # whether the worker had been running for long when it was first seen
        needs: str = "",  # swap | cgroup: what the label cannot be decided without
    ) -> None:
        self.kind, self.seed = kind, seed
        name = zlib.crc32(kind.encode())
        self.rng = np.random.default_rng([name, seed, 1])
        # Forms and mess come from a stream of their own, so that they say nothing about the kind
        self.dice = np.random.default_rng([name, seed, 2])
        form = self.dice.random()
        if needs and form < 1 / 3:
            form = self.dice.uniform(1 / 3, 1)
        self.form = "plain" if form < 1 / 3 else "full" if form < 2 / 3 else "tasks"
        # A script around ps knows no units, so nothing would tie a cgroup to its samples: three quarters of the rest
        self.cgroup = needs == "cgroup" or (self.form != "plain" and self.dice.random() < 0.75)
        chosen: list[str] = []
        if self.dice.random() < 0.55:  # some are without effect in some kinds
            chosen = self.dice.choice(MESS, size=int(self.dice.integers(1, 5)), replace=False).tolist()
        self.mess = set(chosen)

        one = pool == "one" or (pool == "any" and self.chance(0.3))
        self.count = 1 if one else 1 + round(self.log(*children))
        self.life = self.log(*lives) if lives else 0.0
        span = max(hours[0], min(hours[1], self.life * self.even(10, 40))) if lives else self.log(*hours)
        fits = [i for i in INTERVALS if not lives or i <= self.life * HOUR / 40] or [INTERVALS[0]]
        roomy = [i for i in fits if span * HOUR / i * self.count <= MAX_ROWS]
        self.interval = float(self.rng.choice(roomy)) if roomy else float(fits[-1])
        self.width = int(min(span * HOUR / self.interval, MAX_ROWS / self.count))
        self.hours = (self.width - 1) * self.interval / HOUR
        self.begin = NEW_YEAR + self.even(20, 300) * DAY

        self.rows = np.arange(self.count)[:, None]
        self.doers = self.rows >= (0 if one else 1)
        self.cycle = 0  # columns of a whole day or week of the load, if what leaks follows it
        self.load = self._load(load)
        # The pool gives tasks to its first idle child, so that some children may work more than others
        uneven = self.rng.dirichlet(np.full(self.count, self.log(2, 50))) * self.count
        self.rate = 0.0 if load == "idle" else self.log(40, 3000) * self.interval / HOUR  # a beat and process
        self.due = self.rate * uneven[:, None].clip(0.2) * self.load * self.doers  # tasks, in the mean
        self.tasks = self.rng.poisson(self.due)
        self.level = self.log(40, max(60, 3000 / self.count)) * MIB
        self.old = self.chance(0.5) if old is None else old
        self.noise = self.log(0.003, 0.06)

        shape = (self.count, self.width)
        self.up = np.ones(shape, bool)
        self.cuts = np.zeros(shape, bool)
        self.mem = np.zeros(shape)
        self.held = np.zeros(shape)  # leaked by the process that lives
        self.swap = np.zeros(shape)
        self.unshared = np.full(shape, 0.1)
        self.threads = np.zeros(shape)  # beyond the usual ones
        self.page_cache = np.zeros(self.width)
        self.ooms = np.zeros(self.width)  # kills in the cgroup
        self.crashes: list[int] = []  # restarts by systemd
        self.expected = np.zeros(shape)  # what is to leak in the mean, had it always been as it is by the end
        self.quantum = PAGE  # of readings
        self.tight = False  # whether the limit is where the worker was killed
        self.fresh = 0  # where the last worker begins
        if restarts and self.mess & {"restart", "reuse"}:
            self.fresh = self.at(self.even(0.08, 0.25))
            self.restart(self.fresh)

    # Draws

    def even(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def log(self, low: float, high: float) -> float:
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def chance(self, likely: float) -> bool:
        return bool(self.rng.random() < likely)

    def at(self, part: float) -> int:
        return int(part * (self.width - 1))

    def later(self, low: float, high: float) -> int:
        """A column in the life of the last worker: at 0 it begins, 0.6 is 60 % of the series: all must be full then."""
        return self.fresh + int(self.even(low, high) * (self.width - 1 - self.fresh / 0.6))

    def steps(self, hours: float) -> int:
        return max(1, round(hours * HOUR / self.interval))

    def _load(self, shape: str) -> Array:
        """Tasks a beat, relative to their mean."""
        if shape == "any":
            # A part of a day's cycle could not be told from growth
            shape = str(self.rng.choice(["steady", "daily", "daily"] if self.hours > 72 else ["steady", "batches"]))
        if shape == "daily":
            shape = "week" if self.hours >= 168 and self.chance(0.5) else "day"
        clock = self.begin / HOUR + np.arange(self.width) * self.interval / HOUR + self.even(-8, 8)
        load = np.exp(self.even(0.02, 0.25) * wander(self.rng, self.width, self.even(0.1, 0.7) * HOUR / self.interval))
        if shape == "batches":
            period = self.even(0.5, min(4, self.hours / 10))
            load *= np.where(clock % period < period * self.even(0.15, 0.6), 1.0, self.even(0.0, 0.1))
        elif shape in ("day", "week"):
            self.cycle = self.steps(168 if shape == "week" else 24)
            peak, width = self.even(9, 20), self.even(1, 3)
            hump = np.exp(width * (np.cos((clock - peak) * np.pi / 12) - 1))
            if self.chance(0.3):
                hump -= self.even(0.1, 0.4) * np.exp(-(((clock - peak) % 24 - 1) ** 2))  # lunch
            days = (clock // 24).astype(int)
            gain = self.rng.normal(1, 0.07, days.max() - days.min() + 1).clip(0.7)[days - days.min()]
            if shape == "week":  # day 0 was a Thursday
                gain = np.where((days + 3) % 7 >= 5, self.even(0.1, 0.6) * gain, gain)
            load *= self.even(0.02, 0.15) + hump.clip(0) * gain
        return load / load.mean()

    # Lives

    def restart(self, column: int, crash: bool = False) -> None:
        """The whole worker ends and another begins, a moment later."""
        down = int(self.rng.integers(0, 3))
        self.up[:, column : column + down] = False
        self.cuts[:, min(column + down, self.width - 1)] = True
        if crash:
            self.crashes.append(column)

    def now_and_then(self, many: int) -> list[int]:
        """Columns at random, but for no long time none, so that an end of growth would show."""
        return ((np.arange(many) + self.rng.random(many)) / many * self.width).astype(int).tolist()

    def daily(self, spread: float) -> list[int]:
        """A column a day, at the same hour more or less."""
        hours = np.arange(self.even(2, 24), self.hours - 1, 24)
        hours += self.rng.normal(0, spread, len(hours))
        return [self.steps(hour) for hour in hours.tolist() if 1 < hour < self.hours - 1]

    def autoscale(self) -> None:
        """As many children as the load of the last while asked for."""
        window = self.steps(self.even(0.2, 0.6))
        padded = np.concatenate([np.full(window - 1, self.load[0]), self.load])
        asked = np.lib.stride_tricks.sliding_window_view(padded, window).max(axis=1)
        most = self.count - 1
        needed = np.ceil(most * asked / np.quantile(asked, 0.98)).clip(1, most)
        self.up &= self.rows <= needed
        busy = self.rate * self.even(0.6, 1)
        self.due = busy * self.doers
        self.tasks = self.rng.poisson(busy, self.mem.shape) * self.doers

    def settle(self, keep: float | None = None) -> None:
        """What every worker has: code, imports on first need, tasks that come and go."""
        self.cuts[:, 1:] |= self.up[:, 1:] & ~self.up[:, :-1]
        self.cuts[:, 0] = False
        self.gen = np.cumsum(self.cuts, axis=1)
        self.start = starts(self.cuts)
        self.tasks = self.tasks * self.up
        # What has no tasks warms up by time, and even a child that gets none does in the end
        self.work = np.where(self.doers, self.tasks + 0.02 * self.rate + 1e-6, 1.0) * self.up
        self.mean_work = self.work.mean(axis=1, keepdims=True)
        scale = np.where(self.doers, 1.0, self.even(0.6, 1.1))
        self.mem += self.level * scale * (1 + self.even(0, 0.02) * self.each())
        imports = self.even(0.01, 0.05) * (self.life or self.hours)
        self.first_needs(self.level * self.log(0.01, 0.1 if self.life else 0.25), self.mean_work * self.steps(imports))
        if self.rate:
            keep = self.even(0, 1) if keep is None else keep
            self.run(self.level * self.noise * np.where(self.doers, 1, 0.1), self.log(0.02, 0.8), keep)
            if self.chance(0.5):
                self.linger(self.level * self.noise * self.even(0.1, 0.6), self.even(0.1, 0.8), self.log(10, 100))

    def each(self) -> Array:
        """A normal deviate a process."""
        drawn = self.rng.normal(size=(self.count, int(self.gen.max()) + 1))
        return np.take_along_axis(drawn, self.gen, axis=1)

    def so_far(self, column: int) -> Array:
        """The work that each process has behind it in a column."""
        return since(self.work, self.start)[:, [column]]

    # What memory goes to

    def first_needs(self, size: float | Array, within: Array, parts: int = 60, haste: float = 4.0) -> None:
        """Taken once, by the first task that needs it: a module, a template, a pool of connections.

        All of it has been needed once a process has done the work `within`.
        """
        first = np.sort(np.minimum(self.rng.exponential(1 / haste, parts), 1))
        sizes = np.concatenate([[0], np.cumsum(self.rng.gamma(0.7, size=parts) + 1e-3)])
        done = since(self.work, self.start) / within + (1.0 if self.old else 0.0) * (self.gen == 0)
        self.mem += size * sizes[np.searchsorted(first, done, "right")] / sizes[-1]

    def run(self, size: float | Array, busy: float, keep: float) -> None:
        """Tasks allocate up to `size` and free it; the heap keeps a part of its high-water mark."""
        shape = self.mem.shape
        # Among many tasks of a beat the largest counts: the largest of n draws is the n-th root of one
        many = np.where(self.doers, self.tasks, 1)
        root = self.rng.random(shape) ** (1 / np.maximum(many, 1))
        top = size * (1 - (1 - root) ** (1 / 3)) * (many > 0)
        runs = self.rng.random(shape) < np.minimum(0.95, busy * np.where(self.doers, self.load, 0.3))
        now = size * (1 - (1 - self.rng.random(shape)) ** (1 / 3)) * runs
        if self.old:
            top[:, :1] = 0.97 * np.broadcast_to(size, (self.count, 1))
        self.mem += np.maximum(keep * self.high_water(np.maximum(top, now)), now)

    def high_water(self, sizes: Array) -> Array:
        apart = self.gen * 1e9  # larger than any size, so that no generation sees the one before it
        return np.maximum.accumulate(sizes + apart, axis=1) - apart

    def linger(self, size: float | Array, hours: float, count: float, spread: bool = True) -> None:
        """What tasks leave behind for a while: results, sessions, cache entries; `count` of them under mean load."""
        parts = (0.1, 0.3, 0.5, 0.7, 0.9) if spread else (1 - np.exp(-1),)
        columns = np.arange(1, self.width + 1)[None, :]
        for part in parts:
            life = self.steps(-np.log(1 - part) * hours)
            mean = count / len(parts) / life
            total = np.cumsum(self.rng.poisson(mean * self.load, self.mem.shape), axis=1)
            total = np.concatenate([np.zeros((self.count, 1)), total], axis=1)
            alive = total[:, 1:] - np.take_along_axis(total, np.maximum(columns - life, self.start), axis=1)
            if self.old:
                alive = alive + (self.gen == 0) * mean * self.load[0] * (life - columns).clip(0)
            self.mem += size / count * alive * self.doers

    def lift(self, column: int, part: float, keep: float) -> None:
        """One large task in one process, and what the heap keeps of it."""
        row = int(self.rng.choice(np.flatnonzero(self.doers)))
        later = np.flatnonzero(self.cuts[row, column + 1 :])
        end = column + 1 + int(later[0]) if len(later) else self.width
        size = self.level * part
        self.mem[row, column:end] += keep * size
        self.mem[row, column : min(end, column + self.steps(self.log(0.01, 0.5)))] += (1 - keep) * size

    # Leaks

    def amounts(self, events: Array, size: float, shape: float | None = None) -> Array:
        """What so many events leave behind for good, `size` each in the mean; a small shape makes them unequal."""
        shape = shape or self.log(0.3, 5)
        return self.rng.gamma(np.broadcast_to(events, self.mem.shape) * shape) / shape * size

    def hold(self, amounts: Array, expected: Array) -> None:
        """Keep what has leaked until the process ends; `expected` is what that is in the mean."""
        amounts = amounts * self.up
        held = since(amounts, self.start)
        grains = [size for size in (1, 64, 256, 1024, 2048) if size * 15 <= held.max()]
        held -= held % float(self.rng.choice(grains or [1]))  # arenas of the allocator, huge pages
        self.held += held
        self.mem += held
        self.expected += expected * self.up

    def leak(
        self, events: Array, share: tuple[float, float] = (0.08, 1.2), size: float | None = None, first: int = 0
    ) -> None:
        """Leak with each event, so that the last worker grows by a share of the largest memory there was without.

        And by more than what else moves it up and down, lest nobody can tell. The events before `first` are spared.
        """
        events = np.broadcast_to(events, self.mem.shape) * self.up
        total = self.mem.sum(axis=0)
        low, high = np.quantile(total[self.width // 2 :], (0.25, 0.75))
        size = size or max(self.log(*share) * float(total.max()), 3 * float(high - low))
        each = size / float(events[:, max(first, self.fresh) :].sum())
        self.hold(self.amounts(events * (np.arange(self.width) >= first), each), events * each)

    def growth(self) -> float:
        """KiB an hour that are to be expected by the end, busy and idle hours together."""
        begin = self.width % self.cycle if self.cycle else self.fresh
        return float(self.expected[:, begin:].sum()) / ((self.width - begin) * self.interval / HOUR)

    def ticks(self, rows: Array) -> Array:
        """Events of a timer: heartbeats, reconnects, a scheduler that looks what is due."""
        self.cycle = 0
        return self.rng.poisson(self.log(0.2, 5), self.mem.shape) * rows

    def either(self) -> Array:
        return self.tasks if self.chance(0.5) else self.ticks(self.doers)

    # What the sampler makes of it

    def case(self, leaking: bool, follows: str | None) -> Case:
        jitter = self.rng.normal(0, self.even(0, 8), self.mem.shape).round() * PAGE if self.rate else 0
        self.swap = self.swap // PAGE * PAGE
        self.rss = np.maximum((self.mem + jitter - self.swap) // self.quantum * self.quantum, 8 * MIB)
        common = self.level * (self.even(0.3, 0.8) if self.count > 1 else 0.1)
        self.shared = np.minimum(common * (1 - self.unshared), 0.9 * self.rss)
        private = np.where(self.up, self.rss - self.shared, 0).sum(axis=0)
        self.anon = private + np.where(self.up, self.shared, 0).max(axis=0)
        self._keep_time()
        files: dict[str, str] = {}
        visible = self.up & self.seen
        if "missing" in self.mess:  # processes, beside beats
            visible &= self.dice.random(visible.shape) > self.dice.uniform(0, 0.03)
        when, row = np.nonzero(visible.T)
        self._write(files, "samples", PLAIN if self.form == "plain" else FULL, self._sample_lines(when, row), when)
        limit = self._limit(leaking)
        if self.cgroup:
            beats = np.flatnonzero(self.seen & self.up.any(axis=0))
            self._write(files, "cgroup", CGROUP, self._cgroup_lines(beats, limit), beats)
        rate = self.growth() if leaking else None
        return Case(self.kind, self.seed, leaking, rate, follows, files)

    def _limit(self, leaking: bool) -> float | None:
        """MemoryMax: above all that was needed, and not so far above that a leak would be no matter."""
        peak = float(self.anon.max())
        grown = float(self.held.max(axis=1).sum())
        limit = peak * (self.even(1.005, 1.03) if self.tight else self.log(1.08, 2.5))
        if leaking:
            limit = max(min(limit, grown / 0.055), 1.01 * peak)
            assert grown >= 0.05 * limit, f"{self.kind} {self.seed}: too small a leak to be asked for"
        return limit if self.cgroup and (self.tight or self.chance(0.8)) else None

    def _keep_time(self) -> None:
        """Which beats were made, and what they are stamped with."""
        # Beats drift where they are made by sleeping, and do not where by a timer
        late = np.cumsum(self.dice.exponential(0.02, self.width)) if self.dice.random() < 0.5 else 0
        self.offset, self.behind = 0.0, 0  # the clock is yet unset in the first beats
        stamps = self.begin + np.arange(self.width) * self.interval + late
        seen = np.ones(self.width, bool)
        if "missing" in self.mess:
            seen &= self.dice.random(self.width) > self.dice.uniform(0.01, 0.2)
        if "gaps" in self.mess:
            for _ in range(int(self.dice.integers(1, 5))):
                length = int(self.width * np.exp(self.dice.uniform(np.log(0.003), np.log(0.06))))
                first = int(self.dice.integers(1, self.width - length - 1))
                seen[first : first + length] = False
        if "thin" in self.mess:
            factor = int(self.dice.integers(2, 5))
            if not self.life or self.life * HOUR / self.interval / factor >= 12:
                middle = int(self.width * self.dice.uniform(0.3, 0.7))
                side = slice(None, middle) if self.dice.random() < 0.5 else slice(middle, None)
                seen[side] &= np.arange(self.width)[side] % factor == 0
        if "hour" in self.mess:
            first = int(self.width * self.dice.uniform(0.1, 0.8))
            stamps[first : first + int(self.width * self.dice.uniform(0.02, 0.15))] += HOUR
        if "behind" in self.mess:
            self.behind = int(self.dice.integers(2, 20))
            self.offset = self.begin - 20 if self.dice.random() < 0.5 else DAY * self.dice.uniform(2, 60)
            stamps[: self.behind] -= self.offset
        seen[[0, -1]] = True  # so that the span is what it is for the label
        self.seen = seen
        self.stamps = [f"{stamp:.{0 if self.form == 'plain' else 3}f}" for stamp in stamps.tolist()]

    def _processes(self) -> tuple[Array, list[list[list[str]]]]:
        """Pids, and the cells that never change of a process: as written later, and under a clock yet unset."""
        self.unit = f"celery-worker@{self.dice.choice(NAMES)}{self.dice.integers(1, 5)}.service"
        queues = self.dice.choice(["celery", "high,low", "default", "mail,webhooks"])
        command = f"/srv/app/venv/bin/python -m celery -A shop worker -Q {queues} -n w{self.dice.integers(1, 9)}@%h"
        titled = self.form != "plain" and self.dice.random() < 0.5  # setproctitle is there
        begun = [(0, row, 0) for row in range(self.count)]
        for row, column in np.argwhere(self.cuts).tolist():
            begun.append((column, row, int(self.gen[row, column])))
        pids = np.zeros((self.count, int(self.gen.max()) + 1), int)
        static = [[[""] * pids.shape[1] for _ in range(self.count)] for _ in range(2)]
        most = int(self.dice.choice([32768, 4194304]))
        pid = int(self.dice.integers(300, most))
        free: list[int] = []
        age = self.log(0.1, 700) * HOUR if self.old else self.even(5, 60)
        for column, row, gen in sorted(begun):
            if gen:
                free.append(int(pids[row, gen - 1]))
            if "reuse" in self.mess and free and self.dice.random() < 0.4:
                pids[row, gen] = free.pop(int(self.dice.integers(len(free))))
            else:
                pid = 300 + (pid - 300 + int(self.dice.integers(1, 12))) % (most - 300)
                pids[row, gen] = pid
            # At some time since the beat before; children after the main process
            ago = (0.1 + 0.8 * (column * 0.618 % 1)) * self.interval if column else age
            start = self.begin + column * self.interval - ago + 0.03 * row
            title = f"[celeryd: celery@worker:ForkPoolWorker-{row}]" if titled and row else command
            title = f'"{title}"' if "," in title else title
            for early in (0, 1):
                cells = f",{self.unit},{start - early * self.offset:.2f},{'child' if row else 'main'}"
                static[early][row][gen] = title if self.form == "plain" else title + cells
        return pids, static

    def _sample_lines(self, when: Array, row: Array) -> list[str]:
        pids, static = self._processes()
        gen = self.gen[row, when]
        early = (when < self.behind).astype(int)
        same = [static[e][r][g] for e, r, g in zip(early.tolist(), row.tolist(), gen.tolist())]

        def cells(values: Array) -> list[int]:
            return values[row, when].astype(int).tolist()

        clock = [self.stamps[i] for i in when.tolist()]
        known = zip(clock, pids[row, gen].tolist(), cells(self.rss), same)
        if self.form == "plain":
            return [f"{at},{pid},{size},{rest}\n" for at, pid, size, rest in known]
        uss = (self.rss - self.shared) // PAGE * PAGE
        pss = (uss + self.shared / np.maximum(self.up.sum(axis=0), 1)) // PAGE * PAGE
        usual = np.where(self.rows == 0, self.rng.integers(12, 40), self.rng.integers(8, 16))
        fds = usual + self.rng.poisson(self.even(0.2, 4), self.mem.shape) + self.threads
        threads = np.where(self.rows == 0, self.rng.integers(1, 12), 1) + self.threads
        before = int(self.rate * self.log(10, 10000)) if self.old and not self.life else 0
        done = cells(since(self.tasks, self.start) + before * (self.gen == 0) * self.doers)
        detailed = (when % int(self.dice.choice([1, 5, 10, 20])) == 0).tolist()
        more = zip(detailed, cells(pss), cells(uss), cells(self.swap), cells(fds), cells(threads))
        lines = []
        for (at, pid, size, rest), (detail, p, u, s, f, t), n in zip(known, more, done):
            costly = (f"{p},{u}", f"{f},{t}") if detail else (",", ",")
            lines.append(f"{at},{pid},{size},{rest},{costly[0]},{s},{costly[1]},{n if self.form == 'tasks' else ''}\n")
        return lines

    def _cgroup_lines(self, beats: Array, limit: float | None) -> list[str]:
        high = limit * self.even(0.8, 0.97) if limit and self.chance(0.7) else None
        most, bound = limit or np.inf, high or limit or np.inf
        # Page cache takes what is free and is the first to go
        cache = self.page_cache + self.level * self.log(0.02, 0.4) * (1 + 0.05 * wander(self.rng, self.width, 50))
        needed = self.anon * (1 + self.even(0.01, 0.05))  # with what the kernel keeps for itself
        current = np.minimum(needed + np.minimum(cache, (bound - needed).clip(2 * MIB)), most)
        swap = (self.swap * self.up).sum(axis=0)
        at_high, at_max = current >= 0.985 * bound, current >= 0.985 * most
        stalls = self.rng.exponential(200, self.width) + 40 * np.abs(np.diff(swap, prepend=0)) + 2e4 * at_high
        events = [self.rng.poisson(3, self.width) * at_high * bool(high), self.rng.poisson(1, self.width) * at_max]
        # They count from the start of the unit, which is that of its main process
        counts = since(np.array([*events, self.ooms, stalls, 0.4 * stalls]), self.start[[0] * 5]).astype(int)
        restarts = np.searchsorted(np.sort(self.crashes), np.arange(self.width), "right")
        every = int(self.dice.choice([1, 5, 10]))
        limits = f"{int(high) // PAGE * PAGE if high else ''},{int(limit) // PAGE * PAGE if limit else ''}"
        lines = []
        for i in beats.tolist():
            sizes = f"{int(current[i]) // PAGE * PAGE},{limits},{int(swap[i])}"
            cells = ",".join(map(str, counts[:, i].tolist()))
            lines.append(f"{self.stamps[i]},{self.unit},{sizes},{cells},{'' if i % every else restarts[i]}\n")
        return lines

    def _write(self, files: dict[str, str], prefix: str, header: str, lines: list[str], when: Array) -> None:
        """Into one file or several, with what goes wrong in writing."""
        pieces = 1 if self.dice.random() < 0.4 and "disorder" not in self.mess else int(self.dice.integers(2, 9))
        piece = when * pieces // self.width
        if "disorder" in self.mess:
            # A few lines on each side of a border come to the other side
            place = when * pieces / self.width
            moves = (np.abs(place - np.round(place)) < 0.03) & (self.dice.random(len(when)) < 0.2)
            piece = np.where(moves, (piece + self.dice.choice([-1, 1], len(when))).clip(0, pieces - 1), piece)
        if "twice" in self.mess:
            again = self.dice.random(len(lines)) < self.dice.uniform(0.001, 0.03)
            lines = [line * (1 + twice) for line, twice in zip(lines, again.tolist())]
        texts: list[list[str]] = [[header + "\n"] for _ in range(pieces)]
        for line, number in zip(lines, piece.tolist()):
            texts[number].append(line)
        for number, text in enumerate(texts):
            stamp = time.gmtime((self.begin + number * self.width / pieces * self.interval) // 60 * 60)
            files[f"{prefix}-{time.strftime('%Y%m%dT%H%M%SZ', stamp)}.csv"] = "".join(text)
        if "torn" in self.mess:
            last = list(files)[-1]
            files[last] = files[last][: -int(self.dice.integers(1, len(lines[-1])))]


KEPT: dict[str, Any] = {"restarts": False}  # restarts by mess would be in the way of its own
Behaviour = Callable[[Worker], None]


def kind(name: str, *, leaking: bool, follows: str | None = None, **options: Any) -> Callable[[Behaviour], Behaviour]:
    """Enter a behaviour in KINDS, with what its worker must be like."""

    def enter(behave: Behaviour) -> Behaviour:
        def make(seed: int) -> Case:
            worker = Worker(name, seed, **options)
            behave(worker)
            return worker.case(leaking, follows)

        KINDS[name] = make
        return behave

    return enter


# Leaks


@kind("one_process_grows", leaking=True, pool="one")
@kind("many_children_grow", leaking=True, pool="prefork", children=(7, 15), hours=(12, 240))
def grow(w: Worker) -> None:
    w.settle()
    w.leak(w.either())


@kind("slow_under_daily_swing", leaking=True, hours=(96, 192), load="day", children=(2, 6.4))
def slow_under_daily_swing(w: Worker) -> None:
    w.level = max(30, w.log(150, 400) / w.count) * MIB
    w.noise = min(w.noise, 0.02)
    w.settle(keep=w.even(0, 0.3))
    swing = w.even(22, 40) * MIB / float(w.load.max() - w.load.min()) / int(w.doers.sum())
    w.linger(swing, w.even(0.3, 2), w.log(40, 300), spread=w.chance(0.5))
    seen = w.hours * (1 - w.fresh / w.width)
    w.leak(w.either(), size=w.even(0.7, 1.5) * MIB * seen)


@kind("grows_with_load", leaking=True, follows="load", hours=(74, 220), load="daily")
@kind("grows_with_batches", leaking=True, follows="load", hours=(10, 72), load="batches")
def grow_with_load(w: Worker) -> None:
    w.noise = min(w.noise, 0.02)
    w.settle()
    w.leak(w.tasks, (0.25, 1.5))


@kind("grows_with_time", leaking=True, follows="time", hours=(74, 220), load="daily")
def grows_with_time(w: Worker) -> None:
    w.noise = min(w.noise, 0.02)
    w.settle()
    w.leak(w.ticks(w.doers if w.chance(0.7) else w.rows == 0), (0.25, 1.5))
    if w.chance(0.3):  # threads that were started at each reconnect and never end, with their stacks and arenas
        w.threads += w.held // max(80.0, float(w.held.max()) / w.log(60, 1000))


@kind("recycled_by_memory", leaking=True, pool="prefork", lives=(0.2, 5))
def recycled_by_memory(w: Worker) -> None:
    """--max-memory-per-child: a child that is too large after a task is replaced."""
    room = w.level * w.log(0.07, 1)
    w.noise = min(w.noise, room / w.level / 4)
    each = room / (w.rate * w.steps(w.life))
    amounts = w.amounts(w.tasks, each)
    w.cuts |= crossings(amounts, lambda: room * w.rng.normal(1, 0.02), w.cuts)
    w.settle()
    w.hold(amounts, w.due * each)


@kind("recycled_by_tasks", leaking=True, pool="prefork", lives=(0.2, 5))
def recycled_by_tasks(w: Worker) -> None:
    """--max-tasks-per-child."""
    most = max(10, round(w.rate * w.steps(w.life)))
    w.cuts |= crossings(w.tasks, lambda: most, w.cuts)
    room = w.level * w.log(0.07, 1)
    w.noise = min(w.noise, room / w.level / 4)
    w.settle()
    w.hold(w.amounts(w.tasks, room / most), w.due * room / most)


@kind("killed_and_begun_again", leaking=True, hours=(16, 240), lives=(1.5, 20), **KEPT)
def killed_and_begun_again(w: Worker) -> None:
    """The main process grows to the limit, the kernel kills it, systemd starts it again."""
    room = w.level * w.count * w.log(0.25, 1.5)
    events = w.tasks if w.count == 1 else w.ticks(w.rows == 0)
    each = room / (float(events.sum()) / w.width * w.steps(w.life))
    amounts = w.amounts(events, each)
    total = amounts.sum(axis=0, keepdims=True)
    for column in np.flatnonzero(crossings(total, lambda: room * w.rng.normal(1, 0.02), w.cuts[:1])).tolist():
        w.restart(column, crash=True)
    w.tight = True
    w.settle()
    w.hold(amounts, events * each)


@kind("restarted_every_night", leaking=True, hours=(60, 240), **KEPT)
def restarted_every_night(w: Worker) -> None:
    """Somebody has seen it, and has put a restart into cron."""
    for column in w.daily(0.1):
        w.restart(column)
    w.settle()
    events = w.either()
    each = w.log(0.15, 1.0) * float(w.mem.sum(axis=0).max()) / (events.sum() / w.hours * 24)
    w.hold(w.amounts(events, each), events * each)


@kind("main_process_grows", leaking=True, pool="prefork")
def main_process_grows(w: Worker) -> None:
    """It handles the messages of all children."""
    w.settle()
    w.leak(w.tasks.sum(axis=0) * (w.rows == 0) if w.chance(0.5) else w.ticks(w.rows == 0))


@kind("one_child_grows", leaking=True, pool="prefork")
def one_child_grows(w: Worker) -> None:
    w.settle()
    w.leak(w.tasks * (w.rows == w.rng.integers(1, w.count)))


@kind("grows_in_rare_lumps", leaking=True, children=(1, 2.4))
def grows_in_rare_lumps(w: Worker) -> None:
    """So many a process that none of them is the one large task of a healthy worker."""
    w.settle()
    w.cycle, many = 0, int(w.rng.integers(14, 31))
    lumps = np.zeros(w.mem.shape)
    for row in np.flatnonzero(w.doers):
        lumps[row, w.now_and_then(many)] = 1
    each = w.log(0.25, 1.5) * float(w.mem.sum(axis=0).max()) / lumps[:, w.fresh :].sum()
    w.hold(w.amounts(lumps, each, shape=w.even(2, 20)), lumps * each)


@kind("grows_in_episodes", leaking=True)
def grows_in_episodes(w: Worker) -> None:
    """The broker is away now and then, and each attempt to reconnect leaves something behind."""
    w.settle()
    w.cycle, tries = 0, np.zeros(w.width)
    for column in w.now_and_then(int(w.rng.integers(25, 60))):
        tries[column : column + w.steps(w.even(0.001, 0.006) * w.hours)] = w.log(0.5, 3)
    w.leak(w.rng.poisson(tries, w.mem.shape) * w.doers, (0.2, 1.5))


@kind("grows_into_swap", leaking=True, needs="swap")
def grows_into_swap(w: Worker) -> None:
    """What is leaked is never touched again, so that under memory.high it is what the kernel moves out."""
    w.settle()
    w.leak(w.either(), (0.2, 1.5))
    total = w.held.sum(axis=0)
    moved = (total - w.even(0, 0.12) * total.max()).clip(0)
    batch = w.log(0.002, 0.02) * total.max()
    w.swap = w.held * (moved // batch * batch / total.clip(1))
    w.tight = True


@kind("grows_under_large_peaks", leaking=True)
def grows_under_large_peaks(w: Worker) -> None:
    w.level = min(w.level, 600 * MIB)
    w.settle()
    w.run(w.level * w.log(0.8, 4) * w.doers, w.even(0.03, 0.25), w.even(0, 0.05))
    w.leak(w.either(), (0.2, 1.2))


@kind("grows_since_deployment", leaking=True, hours=(16, 240), **KEPT)
def grows_since_deployment(w: Worker) -> None:
    w.fresh = w.at(w.even(0.3, 0.55))
    w.restart(w.fresh)
    w.settle()
    w.leak(w.either(), (0.15, 1.5), first=w.fresh + 1)


@kind("grows_through_a_trim", leaking=True)
def grows_through_a_trim(w: Worker) -> None:
    """The heap gives back late what it had kept of an early peak, not what is leaked."""
    w.settle()
    w.leak(w.either(), (0.2, 1.5))
    w.mem[:, w.later(0.02, 0.08) : w.later(0.65, 0.85)] += w.even(0.25, 0.6) * w.held.max(axis=1, keepdims=True)


@kind("grows_by_distinct_keys", leaking=True)
def grows_by_distinct_keys(w: Worker) -> None:
    """A dictionary without a bound: new keys become rarer, by a power law as words do in a text, but never few."""
    w.settle()
    done = since(w.tasks, w.start) + w.rate * w.steps(w.log(0.1, 5))
    new = (done / w.rate) ** -w.even(0.08, 0.35)
    w.leak(w.rng.poisson(w.tasks * new / new.max()), (0.2, 1.5))
    w.expected *= new[:, w.at(0.8) :].mean(axis=1, keepdims=True) / new


@kind("autoscaled_children_grow", leaking=True, pool="prefork", children=(3, 15), hours=(74, 200), load="day", **KEPT)
def autoscaled_children_grow(w: Worker) -> None:
    w.autoscale()
    w.settle()
    each = w.level * w.log(0.15, 0.6) / (w.rate * w.steps(12))
    w.hold(w.amounts(w.tasks, each), w.due * each)


# Healthy workers


@kind("flat_with_noise", leaking=False)
def flat_with_noise(w: Worker) -> None:
    w.noise = w.log(0.003, 0.15)
    w.settle()


@kind("quantised", leaking=False)
def quantised(w: Worker) -> None:
    """Readings in large units, as from a script that prints MiB, or huge pages."""
    w.settle()
    sizes = [size for size in (256, 1024, 2048, 10240) if size < w.level / 8]
    w.quantum = int(w.rng.choice(sizes))
    w.linger(w.quantum * w.even(1, 4), w.hours * w.even(0.002, 0.02), w.log(5, 50))


@kind("warms_up", leaking=False, old=False)
def warms_up(w: Worker) -> None:
    w.settle()
    within = w.so_far(w.later(0.04, 0.52)) * w.rng.uniform(0.6, 1, w.rows.shape)
    w.first_needs(w.level * w.log(0.1, 1.2), within, parts=int(w.log(10, 400)), haste=w.even(3, 8))


@kind("recycled_and_healthy", leaking=False, pool="prefork", lives=(0.4, 6), hours=(10, 240), old=False)
def recycled_and_healthy(w: Worker) -> None:
    most = max(10, round(w.rate * w.steps(w.life)))
    w.cuts |= crossings(w.tasks, lambda: most, w.cuts)
    w.settle()
    w.first_needs(w.level * w.log(0.08, 0.8), w.mean_work * w.steps(w.life * w.even(0.05, 0.3)))


@kind("one_large_task", leaking=False)
def one_large_task(w: Worker) -> None:
    w.settle()
    w.lift(w.later(0.05, 0.6), w.log(0.2, 2), w.even(0.3, 1))


@kind("lifts_ever_rarer", leaking=False)
def lifts_ever_rarer(w: Worker) -> None:
    w.settle()
    for early in (0.03, 0.13, 0.45)[: int(w.rng.integers(2, 4))]:
        w.lift(w.later(early, early * 1.3), w.log(0.1, 0.8), w.even(0.4, 1))


@kind("follows_the_day", leaking=False, hours=(62, 220), load="day")
@kind("follows_the_week", leaking=False, hours=(170, 240), load="week")
def follow_the_load(w: Worker) -> None:
    """Tasks that run, or what they leave for a while."""
    w.settle(keep=w.even(0, 0.3))
    if w.count > 1 and w.chance(0.5):
        w.run(w.level * w.log(0.1, 1.5) * w.doers, w.even(0.2, 0.5), w.even(0, 0.1))
    else:
        w.linger(w.level * w.log(0.05, 0.6), w.log(0.05, 2), w.log(20, 500))


@kind("cache_fills_to_its_bound", leaking=False, old=False)
def cache_fills_to_its_bound(w: Worker) -> None:
    w.settle()
    full = w.so_far(w.later(0.12, 0.57)) * w.rng.uniform(0.7, 1, w.rows.shape)
    w.mem += w.level * w.log(0.15, 2) * np.minimum(since(w.work, w.start) / full, 1) * w.doers


@kind("cache_with_time_to_live", leaking=False, hours=(12, 240))
def cache_with_time_to_live(w: Worker) -> None:
    w.settle()
    w.linger(w.level * w.log(0.1, 1), w.hours * w.even(0.003, 0.03), w.log(50, 2000), spread=False)


@kind("pages_unshared_after_fork", leaking=False, pool="prefork", old=False)
def pages_unshared_after_fork(w: Worker) -> None:
    """Counts of references are written to, so pages are copied: RSS hardly knows, USS and the cgroup do."""
    w.settle()
    within = w.so_far(w.later(0.05, 0.4))
    w.unshared = 0.05 + w.even(0.4, 0.9) * (1 - np.exp(-4 * since(w.work, w.start) / within)) * w.doers
    w.first_needs(w.level * w.even(0.02, 0.1), within)  # pages of files come in after the fork


@kind("garbage_is_collected", leaking=False)
def garbage_is_collected(w: Worker) -> None:
    """Cycles pile up until the collector comes to the oldest generation."""
    w.settle()
    room = w.level * w.log(0.03, 0.4)
    period = max(8, w.at(w.even(0.004, 0.025)))
    garbage = w.amounts(w.tasks, room / (w.rate * period))
    w.mem += since(garbage, starts(w.cuts | crossings(garbage, lambda: room * w.rng.normal(1, 0.1), w.cuts)))


@kind("wanders", leaking=False, load="steady", old=True)
def wanders(w: Worker) -> None:
    """Sessions come and go: few of them, and long ones."""
    w.settle()
    w.linger(w.level * w.log(0.1, 0.4), w.hours * w.even(0.004, 0.03), w.log(10, 80))


@kind("bursts", leaking=False)
def bursts(w: Worker) -> None:
    w.settle()
    often = np.zeros(w.width)
    columns = [w.later(0.01, 0.1), *w.rng.integers(0, w.width, int(w.rng.integers(6, 40))).tolist()]
    for column in columns:
        often[column : column + w.steps(w.log(0.001, 0.015) * w.hours)] = w.even(0.4, 0.9)
    runs = (w.rng.random(w.mem.shape) < often) * w.doers * w.up
    now = w.level * w.log(0.2, 2) * w.rng.beta(3, 2, w.mem.shape) * runs
    w.mem += np.maximum(w.even(0, 0.3) * w.high_water(now), now)


@kind("deployed_daily", leaking=False, hours=(60, 240), old=False, **KEPT)
def deployed_daily(w: Worker) -> None:
    for column in w.daily(1):
        if w.chance(0.85):
            w.restart(column)
    w.settle()
    w.mem *= 1 + w.even(0, 0.02) * w.each()[:1]  # no version is as large as another
    w.first_needs(w.level * w.log(0.05, 0.8), w.mean_work * w.steps(w.log(0.3, 4)))


@kind("autoscaled", leaking=False, pool="prefork", children=(3, 15), hours=(62, 220), load="daily", **KEPT)
def autoscaled(w: Worker) -> None:
    w.autoscale()
    w.settle()
    w.first_needs(w.level * w.log(0.02, 0.3), w.mean_work * w.steps(w.even(0.1, 1)))


@kind("trimmed_once", leaking=False)
def trimmed_once(w: Worker) -> None:
    w.settle()
    w.mem[:, w.fresh : w.later(0.2, 0.6)] += w.level * w.log(0.1, 0.6) * w.rng.uniform(0.5, 1, w.rows.shape)


@kind("idle", leaking=False, load="idle", old=True)
def idle(w: Worker) -> None:
    w.settle()
    for _ in range(int(w.rng.integers(0, 3))):  # the kernel takes back pages of files
        w.mem[:, w.later(0, 0.9) :] -= w.level * w.even(0.001, 0.02)


@kind("swapped_out_and_in", leaking=False, needs="swap")
def swapped_out_and_in(w: Worker) -> None:
    """A neighbour needs memory for a while; what was moved out comes back as it is touched."""
    w.settle()
    away = np.zeros(w.width)
    for column in w.rng.integers(1, w.width - 1, int(w.rng.integers(2, 9))).tolist():
        age = np.arange(w.width - column)
        out = 1 - np.exp(-age / w.steps(w.even(0.02, 0.3)))
        back = np.exp(-age / max(1, w.at(w.even(0.005, 0.06))))
        away[column:] = np.maximum(away[column:], w.even(0.1, 0.6) * out * back)
    w.swap = 0.8 * w.level * away * w.rng.uniform(0.7, 1, w.rows.shape) * (since(w.up, w.start) > 1)


@kind("killed_by_giant_tasks", leaking=False, **KEPT)
def killed_by_giant_tasks(w: Worker) -> None:
    """Now and then a task asks for more than there is, and its process is killed: an event, no growth."""
    kills = []
    for part in np.sort(w.rng.uniform(0.05, 0.97, int(w.rng.integers(3, 11)))):
        row = int(w.rng.integers(1, w.count)) if w.count > 1 else 0
        kills.append((row, w.at(part)))
        if w.count == 1:
            w.restart(w.at(part), crash=True)
        else:
            w.cuts[row, w.at(part)] = True
            w.ooms[w.at(part)] += 1
    w.settle()
    giant = w.level * w.count * w.log(0.4, 2)
    for row, column in kills:
        ramp = int(w.rng.integers(1, 2 + w.steps(0.05)))
        first = max(int(w.start[row, column - 1]), column - ramp)
        w.mem[row, first:column] += giant * np.linspace(1 / ramp, 1, column - first)
    w.tight = True


@kind("page_cache_fills", leaking=False, needs="cgroup")
def page_cache_fills(w: Worker) -> None:
    """memory.current grows by files that are written; the kernel drops them as soon as memory is asked for."""
    w.settle()
    full = w.later(0.15, 0.58) - w.fresh
    age = (np.arange(w.width) - w.start[0]) / full
    w.page_cache = w.level * w.count * w.log(0.2, 2) * np.minimum(age, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-back labelled series")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    wanted = parser.parse_args()
    labels = []
    for case in cases(range(wanted.seeds)):
        name = f"{case.kind}-{case.seed}"
        folder = wanted.directory / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in case.files.items():
            (folder / file).write_text(text)
        labels.append({"name": name, **{k: v for k, v in asdict(case).items() if k != "files"}})
    (wanted.directory / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")


if __name__ == "__main__":
    main()
