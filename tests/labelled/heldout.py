"""A second, independent simulator of memory series with labels: the part of the set that is held back.

A worker is a set of processes on a regular grid of true time. Each has resident pages made of a floor, a hum
(correlated noise), the slack of an allocator that gives pages back slowly, and what its kind adds. What is kept for
ever is accounted apart, so the true growth is known exactly. Only at the end is the worker written down as a sampler
would have seen it, with the mess that real recordings have.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Body = Callable[["World"], None]
MIB = 1024.0
HOUR, DAY = 3600.0, 86400.0
NEW_YEAR = 1767225600  # 2026-01-01 00:00 UTC
MOST_ROWS = 34_000  # leaves room for duplicates below 40,000
FULL = "timestamp,pid,rss_kb,command,unit,start_time,role,pss_kb,uss_kb,swap_kb,fds,threads,tasks\n"
PLAIN = "timestamp,pid,rss_kb,command\n"
CGROUP = (
    "timestamp,unit,memory_current_kb,memory_high_kb,memory_max_kb,swap_kb,events_high,events_max,oom_kill,"
    "pressure_some_us,pressure_full_us,n_restarts\n"
)


@dataclass(frozen=True)
class Case:
    kind: str
    seed: int
    leaking: bool
    kb_per_hour: float | None  # as expected by the end, all processes, as sets.py has it; None for a healthy worker
    follows: str | None  # "load" or "time" where that is well defined
    files: dict[str, str]


@dataclass
class Process:
    slot: int  # 0 is the main process
    first: int  # index of the first sample on the grid
    rss: Array
    leak: Array
    swap: Array
    shared: Array
    threads: Array
    tasks: Array
    pid: int = 0
    start: float = 0.0

    @property
    def end(self) -> int:
        return self.first + len(self.rss)


@dataclass(frozen=True)
class Setting:
    """What a kind asks of its world; ranges are drawn from by the seed."""

    hours: tuple[float, float] = (8, 240)
    procs: tuple[int, int] = (1, 16)
    load: str = "any"  # even, day, deep (quiet at night), week, any
    level: tuple[float, float] = (40, 3000)  # MiB, whole worker
    lives: tuple[float, float] | None = None  # hours, for kinds that recycle children
    messy_restart: bool = True
    plain: bool = True  # False where four columns could not show the behaviour


def smooth(x: Array, samples: float) -> Array:
    """Exponential moving average, by Fourier transform as there is no loop in numpy for it."""
    if samples < 0.3:
        return x
    reach = int(min(len(x), 7 * samples)) + 1
    kernel = np.exp(-np.arange(reach) / samples)
    padded = np.concatenate([np.full(reach, x[0]), x])
    size = 1 << (len(padded) + reach).bit_length()
    spectrum = np.fft.rfft(padded, size) * np.fft.rfft(kernel / kernel.sum(), size)
    return np.fft.irfft(spectrum, size)[reach : reach + len(x)]


def ratchet(use: Array, given_back: float) -> Array:
    """High-water mark of a heap that returns at most so much per sample."""
    slope = given_back * np.arange(len(use))
    return np.maximum.accumulate(use + slope) - slope


class World:
    def __init__(self, kind: str, seed: int, setting: Setting) -> None:
        number = zlib.crc32(kind.encode())
        self.rng = rng = np.random.default_rng([number, seed, 11])
        self.mess = np.random.default_rng([number, seed, 23])  # apart, so that mess never depends on the behaviour
        forms = ["plain", "columns", "tasks"] if setting.plain else ["columns", "tasks"]
        self.form = forms[(number + seed) % len(forms)]
        self.messy = self.mess.random() < 0.5
        self.level = self.log(*setting.level) * MIB
        least, most = setting.procs
        most = max(least, min(most, int(self.level / (22 * MIB))))
        self.procs = int(rng.integers(least, most + 1))
        self.life = self.log(*setting.lives) * HOUR if setting.lives else 0.0
        low, high = setting.hours
        if self.life:  # every life wants some twenty samples, which bounds the span
            low = max(low, min(high, 4 * self.life / HOUR))
            high = max(low, min(high, MOST_ROWS / 24 * self.life / HOUR / (self.procs + 1)))
        self.span = self.log(low, high) * HOUR
        dt = float(rng.choice([15, 20, 30, 60, 60, 120, 180, 240, 300]))
        if self.life:
            dt = min(dt, self.life / 20)
        self.dt = float(np.ceil(max(15.0, dt, self.span * (self.procs + 1) / MOST_ROWS)))
        while self.dt > 300:  # too much for one recording: fewer processes, not a coarser interval
            self.procs -= 1
            self.dt = float(np.ceil(self.span * (self.procs + 1) / MOST_ROWS))
        self.n = int(self.span / self.dt)
        self.span = self.n * self.dt
        self.t = np.arange(self.n) * self.dt
        self.epoch = NEW_YEAR + float(rng.integers(5, 340)) * DAY + float(rng.integers(0, int(DAY)))
        self.solo = self.procs == 1 and rng.random() < 0.7
        self.busy = [0] if self.solo else list(range(1, self.procs + 1))
        self.usual = 1.0  # mean load of a whole day, relative to that of the span
        shape = setting.load if setting.load != "any" else str(rng.choice(["even", "day", "even"]))
        self.load = self.draw_load(shape)
        # The pool hands work to its first children more often than to its last.
        skew = np.exp(-self.log(0.05, 1.5) * np.arange(len(self.busy)) / len(self.busy)) * rng.uniform(
            0.8, 1.2, len(self.busy)
        )
        self.weight = dict(zip(self.busy, skew / skew.sum()))
        self.rate = self.log(0.002, 2.0)  # tasks a second, whole worker
        self.noise = self.log(0.001, 0.02)
        self.floor = self.level / (len(self.busy) + (0.0 if self.solo else rng.uniform(0.6, 1.2)))
        self.processes: list[Process] = []
        self.follows: str | None = None
        self.growth = 0.0  # KiB an hour, as expected by the end
        self.limit: float | None = None  # MemoryMax, where the kind dies of it
        self.kills: list[int] = []
        self.legs = [(0, self.n)]
        if self.messy and setting.messy_restart and self.mess.random() < 0.3:
            # Early, so that what follows it is still long enough to decide the case.
            cut = int(self.n * self.mess.uniform(0.08, 0.2))
            self.legs = [(0, cut), (cut + int(self.mess.integers(1, 4)), self.n)]

    def log(self, low: float, high: float) -> float:
        return float(np.exp(self.rng.uniform(np.log(low), np.log(max(low, high)))))

    def draw_load(self, shape: str) -> Array:
        rng = self.rng
        hour = (self.epoch + self.t) / HOUR % 24
        days = np.floor((self.epoch + self.t) / DAY).astype(int)
        if shape == "even":
            load = np.ones(self.n)
        else:
            zone, width, second = rng.uniform(0, 24), rng.uniform(1.0, 5.0), rng.uniform(0, 0.8)

            def wave(hour: Array) -> Array:
                morning = np.exp(width * (np.cos((hour - zone - 10) * np.pi / 12) - 1))
                later = np.exp(2 * width * (np.cos((hour - zone - 15.5) * np.pi / 12) - 1))
                return morning + second * later

            load = wave(hour)
            top, least = load.max(), rng.uniform(0, 0.04) if shape == "deep" else rng.uniform(0.05, 0.4)
            load = load / top + least
            self.usual = float((wave(np.arange(0, 24, 0.1)) / top + least).mean() / load.mean())
            load *= np.exp(rng.normal(0, 0.06, days.max() - days.min() + 1))[days - days.min()]
            if shape == "week":  # 1970-01-01 was a Thursday
                load *= np.where((days + 3) % 7 >= 5, rng.uniform(0.1, 0.5), 1.0)
                load = smooth(load, HOUR / self.dt)
        load = load * np.exp(0.15 * self.wobble(self.log(300, 5400)))
        return load / load.mean()

    def wobble(self, tau: float) -> Array:
        """Unit noise with a correlation time of tau seconds."""
        burn = int(min(4 * tau / self.dt, self.n)) + 1
        x = smooth(self.rng.standard_normal(self.n + burn), tau / self.dt)[burn:]
        return x / (np.sqrt(self.dt / (2 * tau + self.dt)) + 1e-12) if tau > 0.3 * self.dt else x

    def hum(self) -> Array:
        """What a healthy process does beside its kind: slow and fast noise, and tasks that leave slack for a while."""
        size = self.noise * self.floor
        slow = self.wobble(self.log(180, min(4 * HOUR, self.span / 30)))
        out = size * (0.6 * slow + 0.3 * self.rng.standard_normal(self.n))
        spikes = np.where(self.rng.random(self.n) < 0.02, self.rng.gamma(1.5, size, self.n), 0.0)
        return out + ratchet(spikes, size * self.dt / self.log(300, 2 * HOUR))

    def aim(self, low: float, high: float) -> float:
        """Total growth of the whole worker over the span, made to stand clear of the noise."""
        total = self.level * self.log(low, high)
        self.noise = min(self.noise, total / self.level / 8)
        self.growth = total / self.span * HOUR
        return total

    def kept(self, by: str, portions: float) -> Array:
        """Cumulated leak, from 0 to 1 over the span, in about so many random portions, by load or by the clock."""
        drive = self.load if by == "load" else np.ones(self.n)
        total = np.cumsum(self.rng.gamma(np.maximum(drive * portions / self.n, 1e-4)))
        return (total - total[0]) / (total[-1] - total[0])

    def bursts(self, n: int, odds: Array | float, size: float, length: float) -> Array:
        """Large transient needs of single tasks, given back within some samples."""
        return ratchet((self.rng.random(n) < odds) * self.rng.gamma(3, size / 3, n), size / length)

    def settle(self, n: int, tau: float, share: float) -> Array:
        """Start of a life: a share of the floor that is reached only with time."""
        return -share * self.floor * np.exp(-np.arange(n) * self.dt / tau)

    def start(self, slot: int, a: int, b: int, more: Array | float = 0.0, leak: Array | float = 0.0, **other: object):
        """Run a process over [a, b); more and leak are over that range or scalars."""
        n, rng = b - a, self.rng
        if n < 1:
            return
        hum = other.get("hum")
        rss = self.floor + (self.hum()[a:b] if hum is None else np.asarray(hum)[a:b]) + more
        kept = np.zeros(n) + leak
        swap = np.zeros(n) + np.asarray(other.get("swap", 0.0))
        common = np.asarray(other.get("shared", rng.uniform(0.2, 0.6))) * self.floor * np.ones(n)
        if a > 0 or rng.random() < 0.4:
            rss = rss + self.settle(n, rng.uniform(60, 600), rng.uniform(0.03, 0.15))
        done = np.zeros(n)
        if slot in self.weight:
            done = np.cumsum(rng.poisson(self.load[a:b] * self.rate * self.dt * self.weight[slot])).astype(float)
        threads = np.asarray(other.get("threads", 0.0)) + np.full(n, float(rng.integers(1, 12)))
        whole = np.maximum(rss + kept - swap, 1.5 * MIB)
        self.processes.append(Process(slot, a, whole, kept, swap, common, threads, done))

    def staff(self, child: Callable[[int, int, int], dict[str, object]], main_too: bool = False) -> None:
        """Every leg with its main process and children; `child` says what the kind adds to one."""
        for a, b in self.legs:
            if not self.solo:
                self.start(0, a, b, **(child(0, a, b) if main_too else {}))
            for slot in self.busy:
                self.start(slot, a, b, **child(slot, a, b))

    def leak_all(
        self,
        total: float,
        by: str = "load",
        portions: float = 400,
        bend: Callable[[Array], Array] = lambda steps: steps,
        more: Callable[[int, int], Array | float] = lambda a, b: 0.0,
        swap: Callable[[Array], Array | float] = lambda kept: 0.0,
    ) -> None:
        def child(slot: int, a: int, b: int) -> dict[str, object]:
            curve = bend(self.kept(by, portions)[a:b]) * total * self.weight[slot]
            curve = curve - curve[0]
            return {"leak": curve, "more": more(a, b), "swap": swap(curve)}

        self.staff(child)

    def recycle(self, progress: Array, limit: float, life: Callable[[int, int, float], dict[str, object]]) -> None:
        """Children that end each time `progress` has gone on by the limit; the first is met in mid-life."""
        for a, b in self.legs:
            self.start(0, a, b)
            for slot in self.busy:
                pace = progress * self.rng.uniform(0.85, 1.15)
                hum, at = self.hum(), a
                age = self.rng.uniform(0, 1) * limit if a == 0 else 0.0
                while at < b:
                    end = min(b, int(np.searchsorted(pace, pace[at] + limit * self.rng.normal(1, 0.02) - age)))
                    end = max(end, at + 1)
                    self.start(slot, at, end, hum=hum, **life(at, end, age))
                    at, age = end, 0.0

    def daily_legs(self, hour: float, jitter: float, skip: float = 0.0) -> None:
        first = np.floor(self.epoch / DAY) * DAY + hour * HOUR - self.epoch
        cuts = [first + DAY * day + self.rng.normal(0, jitter) for day in range(int(self.span / DAY) + 2)]
        edges = [int(cut / self.dt) for cut in cuts if self.rng.random() >= skip]
        edges = [0, *(edge for edge in edges if 5 < edge < self.n - 5), self.n]
        self.legs = [(a + (a > 0), b) for a, b in zip(edges, edges[1:])]


KINDS: dict[str, Callable[[int], Case]] = {}


def kind(leaking: bool, **setting: object) -> Callable[[Body], Body]:
    def register(body: Body) -> Body:
        KINDS[body.__name__] = partial(make, body, leaking, Setting(**setting))  # type: ignore[arg-type]
        return body

    return register


def cases(seeds: Iterable[int]) -> Iterator[Case]:
    for seed in seeds:
        for one in KINDS.values():
            yield one(seed)


def make(body: Body, leaking: bool, setting: Setting, seed: int) -> Case:
    world = World(body.__name__, seed, setting)
    body(world)
    rate = round(world.growth, 1) if leaking else None
    return Case(body.__name__, seed, leaking, rate, world.follows, write(world))


# Leaks


@kind(True, procs=(1, 1), load="even")
def one_pid_steady(w: World) -> None:
    w.leak_all(w.aim(0.09, 1.5), str(w.rng.choice(["load", "time"])), w.log(150, 5000))


@kind(True, hours=(100, 192), load="day", level=(120, 700), procs=(1, 9))
def slow_under_day_swing(w: World) -> None:
    total = w.span / HOUR * w.rng.uniform(0.75, 1.4) * MIB
    w.level = min(w.level, total / 0.1)
    w.floor = w.level / (len(w.busy) + 1)
    w.noise = min(w.noise, total / w.level / 10)
    swing = smooth(w.load, w.log(0.3, 2) * HOUR / w.dt)
    swing = (swing - swing.min()) / np.ptp(swing) * w.rng.uniform(22, 38) * MIB / len(w.busy)
    by = str(w.rng.choice(["load", "time"]))
    w.growth = total / w.span * HOUR * (w.usual if by == "load" else 1.0)
    w.leak_all(total, by, w.log(200, 3000), more=lambda a, b: swing[a:b])


def leak_by_day(w: World, by: str) -> None:
    w.follows = by
    total = w.aim(0.2, 1.5)
    w.growth *= w.usual if by == "load" else 1.0
    swing = w.rng.uniform(0, 0.25) * total * DAY / w.span / w.load.max() / len(w.busy) * smooth(w.load, 600 / w.dt)
    w.leak_all(total, by, w.log(300, 5000), more=lambda a, b: swing[a:b])


@kind(True, hours=(84, 220), load="deep")
def follows_load(w: World) -> None:
    leak_by_day(w, "load")


@kind(True, hours=(84, 220), load="deep")
def follows_time(w: World) -> None:
    leak_by_day(w, "time")


@kind(True, procs=(2, 16), lives=(0.18, 7), hours=(8, 120), load="even")
def recycled_by_memory(w: World) -> None:
    w.noise = min(w.noise, 0.008)
    room = w.floor * w.rng.uniform(0.25, 1.4)
    w.growth = len(w.busy) * room / w.life * HOUR * (0.85 + 1.0) / 2
    pace = np.cumsum(w.load) * w.dt / w.life * room
    w.recycle(pace, room, lambda a, b, age: {"leak": age + (pace[a:b] - pace[a]) * w.rng.uniform(0.85, 1.0)})


@kind(True, procs=(2, 16), lives=(0.18, 9), hours=(8, 120))
def recycled_by_tasks(w: World) -> None:
    w.noise = min(w.noise, 0.006)
    w.rate = max(w.rate, 30 * len(w.busy) / w.life)
    # Every child counts to the same number of tasks; how much one keeps of each differs from life to life.
    size, pace = w.floor * w.log(0.15, 1.0), np.cumsum(w.load) * w.dt / w.life
    portions = w.rng.gamma(w.load * 2, w.dt / w.life / 2)
    w.growth = len(w.busy) * size / w.life * HOUR * w.usual
    w.recycle(pace, 1.0, lambda a, b, age: {"leak": size * w.rng.normal(1, 0.08) * (age + np.cumsum(portions[a:b]))})


@kind(True, hours=(16, 200), messy_restart=False, procs=(1, 5))
def oom_restarts(w: World) -> None:
    w.noise = min(w.noise, 0.01)
    room, life = w.level * w.rng.uniform(0.4, 1.6), w.span / w.rng.uniform(3.2, 9)
    w.growth = room / (life + 2 * w.dt) * HOUR  # it is down for two samples in the mean
    at, age = 0, w.rng.uniform(0, 0.7)
    while at < w.n - 3:
        full = at + max(4, int(life * (1 - age) * w.rng.normal(1, 0.06) / w.dt))
        end = min(full, w.n)
        w.start(0, at, end, leak=room * (age + (1 - age) * np.arange(end - at) / (full - at)))
        for slot in set(w.busy) - {0}:
            w.start(slot, at, end)
        w.kills += [full] if full < w.n else []
        at, age = full + 1 + int(w.rng.integers(0, 3)), 0.0
    w.limit = w.level + room


@kind(True, hours=(80, 220), messy_restart=False, load="even")
def nightly_restart(w: World) -> None:
    w.daily_legs(w.rng.uniform(0, 24), w.rng.uniform(5, 900))
    total = w.aim(0.15, 0.6) * w.span / DAY
    w.growth = total / w.span * HOUR
    w.leak_all(total, str(w.rng.choice(["load", "time"])), w.log(100, 1000) * w.span / DAY)


@kind(True, procs=(2, 14), load="even")
def main_only(w: World) -> None:
    curve = w.aim(0.1, 0.8) * w.kept("time", w.log(60, 2000))
    w.staff(lambda slot, a, b: {} if slot else {"leak": curve[a:b] - curve[a]}, main_too=True)


@kind(True, procs=(3, 16), load="even")
def one_child_of_several(w: World) -> None:
    culprit, curve = int(w.rng.choice(w.busy)), w.aim(0.1, 0.5) * w.kept("load", w.log(60, 2000))
    w.staff(lambda slot, a, b: {"leak": curve[a:b] - curve[a]} if slot == culprit else {})


@kind(True, procs=(1, 6), load="even", hours=(12, 240))
def many_large_lumps(w: World) -> None:
    total, count = w.aim(0.25, 2.0), int(w.rng.integers(14, 40))
    # One lump in each stretch of equal length, somewhere in it, in this or that child.
    at = ((np.arange(count) + w.rng.random(count)) / count * w.n).astype(int)
    whose, size = w.rng.choice(w.busy, count), w.rng.gamma(6, total / count / 6, count)
    curves = {slot: np.cumsum(np.bincount(at, size * (whose == slot), w.n)) for slot in w.busy}
    w.staff(lambda slot, a, b: {"leak": curves[slot][a:b] - curves[slot][a]})


@kind(True, procs=(1, 6), plain=False, load="even")
def swapped_out(w: World) -> None:
    w.noise = min(w.noise, 0.01)
    total, batch = w.aim(0.25, 1.0), w.rng.uniform(0.3, 2) * MIB
    room = (
        total / len(w.busy) * 0.05
    )  # the worker is at its MemoryHigh early on; then the kernel takes pages in batches
    w.leak_all(total, swap=lambda kept: np.floor(np.maximum(kept - room, 0) / batch) * batch)


@kind(True, procs=(1, 8), hours=(12, 240), load="even")
def under_peaks(w: World) -> None:
    total, chance = w.aim(0.15, 0.9), w.rng.uniform(0.01, 0.08)
    size, length = w.floor * w.rng.uniform(0.4, 1.8), w.rng.uniform(0.4, 2.5)
    w.leak_all(total, portions=w.log(60, 2000), more=lambda a, b: w.bursts(b - a, chance, size, length))


@kind(True, hours=(20, 240), load="even")
def starts_midway(w: World) -> None:
    begin, total = w.rng.uniform(0.35, 0.55), w.aim(0.12, 0.9)
    w.growth /= 1 - begin
    w.leak_all(total, "time", w.log(100, 2000), bend=lambda s: np.maximum(s - begin, 0) / (1 - begin))


@kind(True, procs=(1, 8), load="even", hours=(14, 240))
def trimmed_late(w: World) -> None:
    total, when = w.aim(0.5, 1.5), int(w.n * w.rng.uniform(0.62, 0.78))
    w.noise = min(w.noise, 0.008)
    slack = total * w.rng.uniform(0.15, 0.45) / len(w.busy)  # all that a trim can take; the leak stays
    w.leak_all(total, more=lambda a, b: slack * (np.arange(a, b) < when))


@kind(True, procs=(8, 16), level=(400, 3000), load="even", hours=(20, 160))
def many_slow_children(w: World) -> None:
    w.weight = dict.fromkeys(w.busy, 1 / len(w.busy))
    w.leak_all(w.aim(0.1, 0.3), "load", w.log(25, 500))


def leak_by_power(w: World, power: float, total: float) -> None:
    age = 1 - w.legs[-1][0] / w.n
    w.growth *= (age**power - (age - 0.2) ** power) / 0.2  # in the last fifth, of that over the span
    w.leak_all(total, bend=lambda s: (s - s[0]) ** power)


@kind(True, load="even", hours=(16, 240))
def sublinear_unbounded(w: World) -> None:
    leak_by_power(w, w.rng.uniform(0.6, 0.85), w.aim(0.35, 1.5))


@kind(True, load="even", hours=(16, 240))
def quickening(w: World) -> None:
    leak_by_power(w, w.rng.uniform(1.3, 2.2), w.aim(0.3, 1.5))


@kind(True, procs=(1, 4), load="even")
def threads_left_behind(w: World) -> None:
    total = w.aim(0.12, 0.8)
    stack = max(w.rng.uniform(90, 900), total / 900)
    counts = {slot: np.floor(w.kept("load", 300) * total * w.weight[slot] / stack) for slot in w.busy}

    def child(slot: int, a: int, b: int) -> dict[str, object]:
        more = counts[slot][a:b] - counts[slot][a]
        return {"leak": more * stack, "threads": more}

    w.staff(child)


# Healthy


@kind(False)
def flat_with_noise(w: World) -> None:
    w.noise *= w.log(1, 3)
    w.staff(lambda slot, a, b: {})


@kind(False)
def quantised(w: World) -> None:
    grid = w.rng.choice([0.25, 1.0, 2.0, 8.0]) * MIB  # huge pages, or an arena at a time
    w.staff(lambda slot, a, b: {"hum": np.round(w.hum() / grid + w.rng.random()) * grid}, main_too=True)


@kind(False)
def warm_up(w: World) -> None:
    size, tau = w.rng.uniform(0.2, 0.75), w.span * w.rng.uniform(0.01, 0.06)
    w.staff(lambda slot, a, b: {"more": w.settle(b - a, tau * w.rng.uniform(0.7, 1.1), size)})


@kind(False, procs=(2, 16), lives=(0.8, 10), hours=(10, 160))
def warm_up_recycled(w: World) -> None:
    size, tau = w.rng.uniform(0.15, 0.6), w.life * w.rng.uniform(0.02, 0.09)

    def life(a: int, b: int, age: float) -> dict[str, object]:
        left = size * np.exp(-age * w.life / tau)  # what one that is met in mid-life has still to warm up
        return {"more": w.settle(b - a, tau * w.rng.uniform(0.7, 1.2), left)}

    w.recycle(np.cumsum(w.load) * w.dt / w.life, 1.0, life)


def lifts(w: World, places: list[float]) -> None:
    """High-water marks that stay, each by one task in one child, after the last start of the worker."""
    origin, end = w.legs[-1]
    more = {slot: np.zeros(w.n) for slot in w.busy}
    for place in places:
        at, size = int(origin + (end - origin) * place), w.level * w.log(0.06, 0.4)
        mine = more[int(w.rng.choice(w.busy))]
        mine[at:] += size
        mine[at : at + 4] += size * w.rng.uniform(0.1, 0.6)
    w.staff(lambda slot, a, b: {"more": more[slot][a:b]})


@kind(False, procs=(1, 8))
def one_large_task(w: World) -> None:
    lifts(w, [w.rng.uniform(0.05, 0.5)])


@kind(False, procs=(1, 8), hours=(12, 240))
def ever_rarer_lifts(w: World) -> None:
    places = [w.rng.uniform(0.01, 0.06), w.rng.uniform(0.12, 0.22), w.rng.uniform(0.38, 0.5)]
    lifts(w, places[int(w.rng.integers(0, 2)) :])


def breathe(w: World) -> None:
    swing = smooth(w.load, w.log(0.1, 2.5) * HOUR / w.dt)
    swing = swing / swing.max() * w.rng.uniform(0.1, 0.9) * w.floor
    w.staff(lambda slot, a, b: {"more": swing[a:b] * w.rng.uniform(0.7, 1.3)})


@kind(False, hours=(78, 150), load="day")
def load_by_day(w: World) -> None:
    breathe(w)


@kind(False, hours=(200, 240), load="week", procs=(1, 11))
def day_and_weekend(w: World) -> None:
    breathe(w)


@kind(False, load="even")
def cache_fills_to_bound(w: World) -> None:
    bound, done, keys = w.floor * w.log(0.15, 1.2), np.cumsum(w.load) / w.n, w.rng.uniform(0.12, 0.28)

    def child(slot: int, a: int, b: int) -> dict[str, object]:
        # Entries are all distinct, so it fills steadily and stops at once; eviction keeps it just below the bound.
        seen = (done[a:b] - done[a]) / keys / w.rng.uniform(1, 1.3)
        return {"more": bound * np.minimum(seen, 1 - 0.004 * w.rng.random(b - a))}

    w.staff(child)


@kind(False, hours=(78, 240), load="day")
def cache_with_expiry(w: World) -> None:
    window, share = max(1, int(w.rng.uniform(0.5, 8) * HOUR / w.dt)), w.rng.uniform(0.15, 0.8) * w.floor

    def child(slot: int, a: int, b: int) -> dict[str, object]:
        come = np.cumsum(w.rng.poisson(w.load * 20) / 20.0)
        # Nothing is there to expire before a leg began, unless the worker is met in mid-life.
        back = np.arange(a, b) - window
        gone = come[np.maximum(back, a)] if a else np.where(back < 0, back * 1.0, come[np.maximum(back, 0)])
        return {"more": share * (come[a:b] - gone) / window}

    w.staff(child)


@kind(False, procs=(2, 16))
def unsharing_after_fork(w: World) -> None:
    first, last, tau = w.rng.uniform(0.6, 0.9), w.rng.uniform(0.1, 0.3), w.span * w.rng.uniform(0.015, 0.07)

    def child(slot: int, a: int, b: int) -> dict[str, object]:
        # A copied page was resident before: what changes is how much is private, and what the control group counts.
        shared = last + (first - last) * np.exp(-np.arange(b - a) * w.dt / tau / w.rng.uniform(0.8, 1.1))
        return {"shared": shared, "more": -0.04 * w.floor * (shared - last)}

    w.staff(child, main_too=True)


@kind(False, procs=(1, 10))
def gc_sawtooth(w: World) -> None:
    size, teeth = w.floor * w.log(0.1, 0.9), w.rng.uniform(14, 90)

    def child(slot: int, a: int, b: int) -> dict[str, object]:
        made = np.cumsum(w.rng.gamma(w.load[a:b] * 1.5)) / (1.5 * w.n) * teeth + w.rng.random()
        return {"more": size * (made % 1) * w.rng.normal(1, 0.04, int(made[-1]) + 1)[made.astype(int)]}

    w.staff(child)


@kind(False, hours=(16, 240))
def wandering(w: World) -> None:
    size, tau = w.floor * w.log(0.01, 0.12), w.span / w.rng.uniform(25, 120)
    both = w.wobble(tau)  # partly in common, as all children serve the same traffic
    w.staff(lambda slot, a, b: {"more": size * 2.5 * np.tanh(0.2 * both + 0.32 * w.wobble(tau))[a:b]})


@kind(False, procs=(1, 10))
def transient_bursts(w: World) -> None:
    chance, size = w.log(0.004, 0.06), w.floor * w.log(0.4, 2.5)
    odds = chance * np.minimum(w.load, 3)
    w.staff(lambda slot, a, b: {"more": w.bursts(b - a, odds[a:b], size, w.rng.uniform(0.5, 6))})


@kind(False, hours=(80, 240), messy_restart=False)
def daily_deployments(w: World) -> None:
    w.daily_legs(w.rng.uniform(6, 18), w.log(300, 2.5 * HOUR), skip=0.15)
    size, tau = w.rng.uniform(0.15, 0.7), w.log(4 * 60, 80 * 60)
    w.staff(lambda slot, a, b: {"more": w.settle(b - a, tau * w.rng.uniform(0.7, 1.3), size)})


@kind(False, hours=(80, 200), load="day", procs=(4, 14), level=(160, 3000))
def autoscaling(w: World) -> None:
    demand = smooth(w.load, w.rng.uniform(0.5, 1.5) * HOUR / w.dt)
    wanted = np.clip(np.ceil(demand / demand.max() * (len(w.busy) + 0.5)), w.rng.integers(1, 3), len(w.busy))
    held = max(1, int(900 / w.dt))  # the pool is resized at most every quarter of an hour
    wanted = np.repeat(wanted[::held], held)[: w.n]
    for a, b in w.legs:
        w.start(0, a, b)
        for slot in w.busy:
            change, hum = np.diff(np.concatenate([[0], (wanted[a:b] >= slot).astype(int), [0]])), w.hum()
            for up, down in zip(np.flatnonzero(change == 1).tolist(), np.flatnonzero(change == -1).tolist()):
                w.start(slot, a + up, a + down, hum=hum)


@kind(False)
def step_down(w: World) -> None:
    origin, end = w.legs[-1]
    at, size = origin + (end - origin) * w.rng.uniform(0.15, 0.5), w.floor * w.rng.uniform(0.15, 0.8)
    w.staff(lambda slot, a, b: {"more": size * (np.arange(a, b) < at)})


@kind(False)
def idle(w: World) -> None:
    w.rate, w.load = 1e-6, np.ones(w.n)

    def child(slot: int, a: int, b: int) -> dict[str, object]:
        moves = np.where(w.rng.random(w.n) < 0.004, w.rng.integers(-6, 7, w.n), 0)  # a few pages come and go, rarely
        return {"hum": 4.0 * np.clip(np.cumsum(moves), -40, 40)}

    w.staff(child, main_too=True)


@kind(False, plain=False, procs=(1, 10))
def swap_out_and_in(w: World) -> None:
    pressure = np.clip(0.25 + 0.5 * w.wobble(w.span / w.rng.uniform(20, 80)), 0, 0.7)
    w.staff(lambda slot, a, b: {"swap": pressure[a:b] * w.floor * w.rng.uniform(0.5, 0.9)})


# Writing down


def pages(kb: Array) -> NDArray[np.int64]:
    return (np.rint(kb / 4) * 4).astype(np.int64)


def name_processes(w: World, reuse: bool) -> None:
    rng, free = w.mess, []
    following = int(rng.integers(400, 60_000))
    ended: list[tuple[int, int]] = []
    for one in sorted(w.processes, key=lambda p: (p.first, p.slot)):
        free += [pid for end, pid in ended if end < one.first]
        ended = [(end, pid) for end, pid in ended if end >= one.first]
        if reuse and free and rng.random() < 0.3:
            one.pid = free.pop(int(rng.integers(len(free))))
        else:
            following += 1 if not one.first else int(rng.integers(1, 400))
            one.pid = following
        ended.append((one.end, one.pid))
        age = rng.uniform(0.01, 0.9) * w.dt if one.first else rng.uniform(60, 3 * DAY)
        one.start = round(w.epoch + one.first * w.dt - age, 2)


def clock_and_gaps(w: World) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Timestamps as the host's clock gave them, and which beats of the sampler were written at all."""
    rng, n = w.mess, w.n
    shift, seen = np.zeros(n), np.ones(n, dtype=bool)
    if w.messy:
        if rng.random() < 0.5:
            wanted = rng.uniform(0.01, 0.2) * n
            while (~seen).sum() < wanted:
                at = int(rng.uniform(0.03, 0.93) * n)
                seen[at : at + 1 + int(min(rng.exponential(wanted / 3), 0.05 * n, wanted))] = False
        if rng.random() < 0.25:
            at = int(rng.uniform(0.1, 0.8) * n)
            shift[at : at + int(rng.uniform(0.5, 6) * HOUR / w.dt)] += HOUR
        if rng.random() < 0.2:
            shift[: int(rng.integers(2, 25))] -= float(np.rint(rng.uniform(2, 25) * DAY))
        if rng.random() < 0.2 and w.dt <= 100 and not w.life:
            half = np.arange(n) < n // 2 if rng.random() < 0.5 else np.arange(n) >= n // 2
            seen &= ~half | (np.arange(n) % int(rng.integers(2, 4)) == 0)
    return np.rint(w.epoch + w.t + shift + rng.uniform(0, 0.6, n)).astype(np.int64), seen


def write(w: World) -> dict[str, str]:
    rng = w.mess
    unit = f"celery-worker@{rng.choice(['mail', 'billing', 'reports', 'thumbs', 'sync', 'search'])}.service"
    # Without start times a reused PID could not be told from a process that gave its memory back.
    name_processes(w, reuse=w.messy and w.form != "plain" and rng.random() < 0.5)
    stamp, seen = clock_and_gaps(w)
    alive, total, swapped = np.zeros(w.n), np.zeros(w.n), np.zeros(w.n)
    for one in w.processes:
        alive[one.first : one.end] += 1
    titled, rows, order = bool(rng.random() < 0.5), [], []
    for one in w.processes:
        where = np.arange(one.first, one.end)
        common = np.minimum(one.shared, 0.95 * one.rss)
        private = one.rss - common
        total[where] += private + common / alive[where]
        swapped[where] += one.swap
        keep = seen[where]
        at, rss = where[keep], pages(one.rss[keep])
        title = "MainProcess" if one.slot == 0 else f"ForkPoolWorker-{one.slot}"
        command = f"[celeryd: celery@{unit[14:-8]}:{title}]" if titled else "celery"
        order.append(at)
        times, sizes = stamp[at].tolist(), rss.tolist()
        if w.form == "plain":
            rows += [f"{t},{one.pid},{kb},{command}\n" for t, kb in zip(times, sizes)]
            continue
        fixed = f"{command},{unit},{one.start:.2f},{'child' if one.slot else 'main'}"
        counted = w.form == "tasks" and one.slot in w.weight
        done = one.tasks[keep].astype(np.int64).tolist() if counted else [""] * len(times)
        threads = one.threads[keep].astype(np.int64)
        fds = (threads + rng.integers(8, 40) + (rng.random(len(at)) < 0.1)).tolist()
        uss = pages(private[keep])
        pss = np.minimum(np.maximum(pages((private + common / alive[where])[keep]), uss), rss).tolist()
        swap = pages(one.swap[keep]).tolist()
        columns = zip(times, sizes, pss, uss.tolist(), swap, fds, threads.tolist(), done)
        rows += [f"{t},{one.pid},{kb},{fixed},{p},{u},{s},{f},{th},{d}\n" for t, kb, p, u, s, f, th, d in columns]
    beats = np.concatenate(order)
    by_time = np.argsort(beats, kind="stable")
    files = segments(w, [rows[i] for i in by_time.tolist()], PLAIN if w.form == "plain" else FULL)
    if w.form != "plain" and rng.random() < 0.5:
        files["cgroup-" + unit[14:-8] + ".csv"] = cgroup(w, unit, stamp, seen, total, swapped)
    return files


def segments(w: World, rows: list[str], header: str) -> dict[str, str]:
    rng, torn = w.mess, False
    count = int(rng.choice([1, 1, 1, 2, 3, 6]))
    edges = [0, *sorted(rng.integers(1, len(rows), count - 1).tolist()), len(rows)]
    parts = [rows[a:b] for a, b in zip(edges, edges[1:])]
    if w.messy:
        if rng.random() < 0.35:
            odds = rng.uniform(0.002, 0.03)
            parts = [[r for row in p for r in ([row, row] if rng.random() < odds else [row])] for p in parts]
        if count > 1 and rng.random() < 0.6:  # a buffer was flushed only after the file had been rotated
            late = int(min(len(parts[0]) * 0.4, rng.integers(3, 400)))
            parts[0], parts[1] = parts[0][: len(parts[0]) - late], parts[1] + parts[0][len(parts[0]) - late :]
        torn = rng.random() < 0.3 and bool(parts[-1])
    if torn:
        parts[-1][-1] = parts[-1][-1][: int(rng.integers(3, 24))]
    return {f"samples-{number:03d}.csv": header + "".join(part) for number, part in enumerate(parts, 1)}


def cgroup(w: World, unit: str, stamp: NDArray[np.int64], seen: NDArray[np.bool_], total: Array, swapped: Array) -> str:
    rng = w.mess
    # Files that the worker reads count too; they come and go and never are what grows.
    files = rng.uniform(0, 0.12) * w.level * (1 + 0.25 * np.tanh(w.wobble(HOUR)))
    current = total + files
    most = w.limit
    visible = np.zeros(w.n)
    for one in w.processes:
        visible[one.first : one.end] += one.leak
    if most is None and rng.random() < 0.8:
        most = float(current.max()) * float(np.exp(rng.uniform(np.log(1.08), np.log(3.5))))
        if visible.any():  # growth is to be at least 5 % of the limit, or there is no limit
            most = min(most, float(np.ptp(visible)) * 0.78 / 0.055)
            most = most if most > 1.04 * current.max() else None
    if w.limit is not None:
        # What was killed had met its limit, whatever was shared among the processes.
        most = max(w.limit * 0.5, float(np.median([current[max(at - 1, 0)] for at in w.kills])))
        current = np.minimum(current, most)
    high = most * rng.uniform(0.75, 0.95) if most and rng.random() < 0.4 else None
    if swapped.any():
        high = float(np.quantile(current, 0.6))
    over = current > high if high else np.zeros(w.n, dtype=bool)
    killed = np.bincount(np.array(w.kills, dtype=int), minlength=w.n)[: w.n].cumsum()
    some = np.cumsum(rng.integers(0, 40, w.n) * (rng.random(w.n) < 0.1) + over * rng.integers(0, 9000, w.n))
    whole = np.cumsum(over * rng.integers(0, 2500, w.n)) // 2
    events = np.cumsum(over * rng.integers(1, 30, w.n))
    limits = f"{'' if high is None else pages(np.array(high))},{'' if most is None else pages(np.array(most))}"
    step = int(rng.choice([1, 1, 2, 5])) if w.n > 1000 else 1
    at = np.flatnonzero(seen & (np.arange(w.n) % step == 0) & (current > 0))
    table = zip(*(x[at].tolist() for x in (stamp, pages(current), pages(swapped), events, killed, some, whole)))
    return CGROUP + "".join(
        f"{t},{unit},{m},{limits},{s},{e},{k * 7},{k},{a},{f},{k}\n" for t, m, s, e, k, a, f in table
    )
