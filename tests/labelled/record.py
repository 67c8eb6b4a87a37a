"""Records real Celery workers, leaking and not, by the sampler itself: the labelled set that detection is judged by.

    .venv/bin/python -m tests.labelled.record [--only KIND] [--seeds N] [--jobs J]

A recording is one worker of one pool, sent the tasks of one kind below from a seed, in time that runs fast: minutes
stand for days. It is written as the sampler wrote it, to recorded/KIND-POOL-SEED.csv.gz, and recordings.py stretches
its times. What is known of it is in recorded/manifest.json:

recordings      by KIND-POOL-SEED:
  kind, pool, seed, concurrency
  leaking       whether memory grows for good, by construction: each kind says below why it does, or not
  follows       what a leak grows by: load (tasks) or time; null of none
  stretch       seconds that a recorded second stands for
  kb_per_task   KiB leaked a task that was sent, as they themselves count them; 0 of no leak, null if not known
  kb_per_second the same a recorded second, of the worker as a whole and all its restarts
  counts        whether the samples have the count of tasks
  interval      seconds between two samples, as recorded; seconds from the first to the last
versions        celery, python, kernel

Needs redis-server on PATH, and the packages of the extra `dev`. Nothing listens on a port, and all that is started
runs in a folder of its own and is ended again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import celery
import psutil

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded"
MANIFEST = RECORDED / "manifest.json"
SAMPLER = ROOT / "roles" / "rss_sampler" / "files"
BOOTSTRAP = ROOT / "roles" / "tracemalloc_bootstrap" / "files"

INTERVAL_S = 0.2
# PSS, threads and the like: every two seconds.
DETAIL_EVERY = 10
DAY_S = 24.0
HOUR_A_SECOND = 3600
HALF_AN_HOUR_A_SECOND = 1800
CONCURRENCY = {"prefork": 2, "threads": 6, "solo": 1, "gevent": 40, "eventlet": 40}
PATIENCE_S = 30.0
UNIT = "celery-worker@shop.service"

# The sampler as a program, but for four things. It watches no other workers of this machine, which may well have some.
# A worker here is in no unit, and is written down as if it were. Counts of tasks are not under /run. And psutil knows
# to the second alone when the host booted, which is an hour once it is stretched.
PROGRAM = f"""
import functools, sys, time
from pathlib import Path
sys.path.insert(0, {str(SAMPLER)!r})
import rss_sampler
booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
rss_sampler.psutil.boot_time = lambda: booted
rss_sampler.is_worker = lambda argv: False
rss_sampler.unit_by_pid = lambda pid: {UNIT!r}
rss_sampler.Watcher = functools.partial(rss_sampler.Watcher, root=Path("cgroups"), tasks=Path("tasks"))
sys.exit(rss_sampler.main())
"""


# ---- kinds ----


@dataclass(frozen=True)
class Call:
    """A task that is sent, at a second of the recording."""

    at: float
    task: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


Plan = Callable[[random.Random, str, float], "list[Call]"]


@dataclass(frozen=True)
class Kind:
    """A behaviour. plan gives its tasks, of a seeded random, the pool and the seconds."""

    plan: Plan
    leaking: bool
    pools: Mapping[str, int]
    """How many seeds of each pool."""
    follows: str | None = None
    counted: bool = True
    """Whether its tasks know what they leak."""
    seconds: float = 60.0
    stretch: int = HALF_AN_HOUR_A_SECOND
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    dies_at_kb: int = 0
    """Growth of all its processes at which it is killed and started anew, as after an OOM kill; 0 for never."""
    deployed_every_s: float = 0.0
    """Seconds after which it is stopped as systemd does and started anew; 0 for never."""
    pss: bool = False


KINDS: dict[str, Kind] = {}


def kind(**properties: Any) -> Callable[[Plan], Plan]:
    def adding(plan: Plan) -> Plan:
        KINDS[plan.__name__] = Kind(plan, **properties)
        return plan

    return adding


def arrivals(
    chance: random.Random, seconds: float, rate: float, share: Callable[[float], float] | None = None
) -> list[float]:
    """Times of a Poisson process of rate a second; where there is a share of the time, so much of them."""
    found: list[float] = []
    at = 0.0
    while True:
        at += chance.expovariate(rate)
        if at >= seconds:
            return found
        if share is None or chance.random() < share(at):
            found.append(at)


def every(chance: random.Random, seconds: float, period: float) -> list[float]:
    """Times about so far apart, over the whole recording."""
    return [(turn + chance.uniform(0.2, 0.8)) * period for turn in range(int(seconds / period))]


def by_day(chance: random.Random, seconds: float, peak: float, night: float = 0.0) -> list[float]:
    """Arrivals that rise and fall with the day, from any hour of it on; the nights are half of it."""
    began = chance.random()
    heights = [chance.uniform(0.93, 1.07) for _ in range(int(seconds / DAY_S) + 2)]

    most = peak * 1.1

    def share(at: float) -> float:
        days = at / DAY_S + began
        height = heights[int(days)] * max(0.0, math.sin(2 * math.pi * days))
        return (night + (peak - night) * height) / most

    return arrivals(chance, seconds, most, share)


def about(chance: random.Random, size: float) -> int:
    """That on average, and half of it at least."""
    return round(size * chance.uniform(0.5, 1.5))


def factor(chance: random.Random) -> float:
    """What seeds differ by."""
    return chance.uniform(0.7, 1.4)


ALL_POOLS = {"prefork": 2, "threads": 2, "solo": 1, "gevent": 1, "eventlet": 1}


@kind(leaking=True, follows="load", pools=ALL_POOLS)
def leak(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """A list grows with every task."""
    size = 26_000 * factor(chance)
    return [Call(at, "keep", {"size": about(chance, size)}) for at in arrivals(chance, seconds, 20)]


@kind(
    leaking=True,
    follows="load",
    pools={"prefork": 2, "threads": 1, "gevent": 1},
    seconds=4 * DAY_S,
    stretch=HOUR_A_SECOND,
)
def leak_idle_nights(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """The same by day; by night there are no tasks, and no growth."""
    size = 36_000 * factor(chance)
    return [Call(at, "keep", {"size": about(chance, size)}) for at in by_day(chance, seconds, 30)]


@kind(
    leaking=True,
    follows="load",
    pools={"prefork": 3},
    seconds=84,
    options=("--max-memory-per-child=76000",),
)
def leak_until_max_memory(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Each child grows until it is replaced for its size, and the next one alike."""
    size = 130_000 * factor(chance)
    return [Call(at, "keep", {"size": about(chance, size)}) for at in arrivals(chance, seconds, 22)]


@kind(leaking=True, follows="load", pools={"prefork": 3}, seconds=84, options=("--max-tasks-per-child=150",))
def leak_until_max_tasks(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Each child grows from its first to its last task, and the next one alike."""
    size = 90_000 * factor(chance)
    return [Call(at, "keep", {"size": about(chance, size)}) for at in arrivals(chance, seconds, 18)]


@kind(
    leaking=True,
    follows="load",
    pools={"prefork": 1, "threads": 1, "solo": 1, "gevent": 1},
    seconds=90,
    dies_at_kb=36_000,
)
def leak_until_killed(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """The whole worker grows until it is killed, and again when it is there again."""
    size = 80_000 * factor(chance)
    return [Call(at, "keep", {"size": about(chance, size)}) for at in arrivals(chance, seconds, 22)]


@kind(
    leaking=True,
    follows="load",
    pools={"prefork": 2, "threads": 1, "gevent": 1, "eventlet": 1},
    seconds=4 * DAY_S,
    stretch=HOUR_A_SECOND,
)
def leak_under_swing(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """What load holds for a while is several times what leaks in all."""
    size = (32_000 if pool == "prefork" else 20_000) * factor(chance)
    return swing(chance, pool, seconds, size)


def swing(chance: random.Random, pool: str, seconds: float, leak: float) -> list[Call]:
    """Memory of the tasks that run at a time or, where few can, of those that ran lately; each leaks so many bytes."""
    task, kb, held = {
        "threads": ("hold", 9000, 0.15),
        "gevent": ("hold", 1400, 1.0),
        "eventlet": ("hold", 1400, 1.0),
    }.get(pool, ("remember", 900, 2.0))
    return [
        Call(at, task, {"kb": about(chance, kb), "seconds": held, "leak": about(chance, leak)})
        for at in by_day(chance, seconds, 24, 1.5)
    ]


@kind(leaking=True, follows="load", pools={"prefork": 2, "solo": 1, "eventlet": 1}, seconds=72)
def leak_in_lumps(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Most tasks leak nothing; one every three seconds or so what hundreds would."""
    lump = 1_300_000 * factor(chance)
    busy = [Call(at, "serve") for at in arrivals(chance, seconds, 16)]
    return busy + [Call(at, "keep", {"size": about(chance, lump)}) for at in every(chance, seconds, 3)]


@kind(leaking=True, follows="load", pools={"prefork": 2, "threads": 1, "gevent": 1})
def leak_with_peaks(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """A leak below peaks that are larger than all of it."""
    size = 26_000 * factor(chance)
    small = [Call(at, "keep", {"size": about(chance, size)}) for at in arrivals(chance, seconds, 18)]
    return small + peaks(chance, seconds)


def peaks(chance: random.Random, seconds: float) -> list[Call]:
    return [
        Call(at, "hold", {"kb": chance.randint(25, 75) << 10, "seconds": chance.uniform(0.3, 0.9)})
        for at in every(chance, seconds, 3.5)
    ]


@kind(leaking=True, follows="load", pools={"prefork": 1, "threads": 1, "solo": 1})
def leak_native(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Memory of malloc(), which is not Python's."""
    size = 26_000 * factor(chance)
    return [Call(at, "keep_native", {"size": about(chance, size)}) for at in arrivals(chance, seconds, 20)]


@kind(leaking=True, follows="load", pools={"prefork": 2, "solo": 1}, counted=False)
def leak_by_fragments(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Little is kept, but nothing that comes later fits into what is free between."""
    total = round(30_000 * factor(chance))
    times = arrivals(chance, seconds, 16)
    # From one task to the next, as malloc() rounds to 16.
    return [Call(at, "fragment", {"size": 2000 + 16 * turn, "total": total}) for turn, at in enumerate(times)]


@kind(
    leaking=True,
    follows="time",
    pools={"prefork": 2, "threads": 1, "solo": 1, "gevent": 1},
    seconds=3 * DAY_S,
    stretch=HOUR_A_SECOND,
    environment={"LABELLED_TICK_KB": "300"},
)
def leak_by_time(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """A thread of the main process leaks, whether there are tasks or not."""
    return [Call(at, "serve") for at in by_day(chance, seconds, 16)]


@kind(leaking=True, follows="load", pools={"prefork": 1, "solo": 1, "gevent": 1})
def leak_without_gc(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Cycles with the collector switched off."""
    nodes = 80 * factor(chance)
    return [Call(at, "keep_ring", {"nodes": about(chance, nodes)}) for at in arrivals(chance, seconds, 18)]


@kind(leaking=True, follows="load", pools={"prefork": 1, "solo": 1}, counted=False)
def leak_of_threads(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Threads that never end, with their stacks."""
    often = 0.12 / factor(chance)
    busy = [Call(at, "serve") for at in arrivals(chance, seconds, 14)]
    return busy + [Call(at, "keep_thread") for at in every(chance, seconds, often)]


@kind(leaking=False, pools=ALL_POOLS)
def flat(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Ordinary work, now and then with a larger body."""
    busy = [Call(at, "serve") for at in arrivals(chance, seconds, 16)]
    held = [
        Call(at, "hold", {"kb": chance.randint(200, 4000), "seconds": chance.uniform(0.01, 0.1)})
        for at in arrivals(chance, seconds, 3)
    ]
    return busy + held


@kind(leaking=False, pools={"prefork": 2, "threads": 1, "solo": 1, "gevent": 1}, seconds=75)
def warm_up(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Imports and tables come by and by, ever more rarely, and all are there at less than half of the time."""
    entries, imports, over = chance.randint(120, 300), chance.randint(14, 24), 0.3 * seconds
    return [
        Call(at, "warm_up", {"imports": round(imports * done), "entries": round(entries * done)})
        for at in arrivals(chance, seconds, 16)
        for done in [min(1.0, 1 - (1 - at / over) ** 2) if at < over else 1.0]
    ]


@kind(leaking=False, pools={"prefork": 2, "threads": 1, "solo": 1})
def one_large_task(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """The level is another one after it, and stays."""
    busy = [Call(at, "serve") for at in arrivals(chance, seconds, 16)]
    return [*busy, Call(seconds * chance.uniform(0.25, 0.45), "report", {"mb": chance.randint(18, 45)})]


@kind(
    leaking=False,
    pools={"prefork": 2, "threads": 1, "gevent": 1, "eventlet": 1},
    seconds=4 * DAY_S,
    stretch=HOUR_A_SECOND,
)
def follows_the_day(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """As much memory as there is load; after each day it is what it was before."""
    return swing(chance, pool, seconds, 0)


@kind(
    leaking=False,
    pools={"prefork": 2},
    seconds=4 * DAY_S,
    stretch=HOUR_A_SECOND,
    options=("--autoscale=5,1",),
    environment={"AUTOSCALE_KEEPALIVE": "2"},
)
def children_follow_the_day(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Celery starts and ends children with the load."""
    return [Call(at, "hold", {"kb": about(chance, 6000), "seconds": 0.25}) for at in by_day(chance, seconds, 14, 0.5)]


@kind(leaking=False, pools={"prefork": 1, "solo": 1, "threads": 1, "eventlet": 1}, seconds=75)
def bounded_cache(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """A cache that is full before half of the time, and then drops as much as it takes."""
    rate = 30 if pool == "prefork" else 18
    return [Call(at, "look_up", {"key": chance.randrange(4000)}) for at in arrivals(chance, seconds, rate)]


@kind(leaking=False, pools={"prefork": 3}, environment={"LABELLED_TABLE": "250000"}, pss=True)
def unsharing(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Children read what their parent loaded, and so get pages of their own, until they have all of them."""
    over, rows = seconds * chance.uniform(0.25, 0.4), 250_000
    found = []
    for at in arrivals(chance, seconds, 16):
        stop = round(rows * min(1.0, at / over))
        found.append(Call(at, "read_table", {"start": max(0, stop - rows // 20), "stop": stop}))
    return found


@kind(leaking=False, pools={"prefork": 3}, seconds=84, options=("--max-tasks-per-child=150",))
def recycled(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Each child warms up within its first tasks, and is flat until it is replaced."""
    entries, imports = chance.randint(60, 140), chance.randint(6, 20)
    return [Call(at, "warm_up", {"imports": imports, "entries": entries}) for at in arrivals(chance, seconds, 18)]


@kind(leaking=False, pools={"prefork": 2, "solo": 1, "gevent": 1}, seconds=72)
def gc_sawtooth(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Cycles add up until a full collection."""
    nodes, kb = 400 * factor(chance), 110 * factor(chance)
    return [
        Call(at, "pass_ring", {"nodes": about(chance, nodes), "kb": about(chance, kb)})
        for at in arrivals(chance, seconds, 20)
    ]


@kind(leaking=False, pools={"prefork": 2, "threads": 1, "solo": 1, "gevent": 1})
def bursts(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Large transient memory over a level that stays."""
    return [Call(at, "serve") for at in arrivals(chance, seconds, 14)] + peaks(chance, seconds)


@kind(leaking=False, pools={"prefork": 1, "threads": 1, "gevent": 1})
def idle(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Next to no tasks."""
    return [Call(at, "serve") for at in arrivals(chance, seconds, 0.1)]


@kind(leaking=False, pools={"prefork": 2, "threads": 1, "solo": 1}, seconds=110, deployed_every_s=26)
def deployed(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Stopped and started several times; each run warms up and is flat then."""
    entries, imports = chance.randint(20, 100), chance.randint(4, 16)
    return [Call(at, "warm_up", {"imports": imports, "entries": entries}) for at in arrivals(chance, seconds, 16)]


@kind(leaking=False, pools={"prefork": 1, "threads": 1})
def programs(chance: random.Random, pool: str, seconds: float) -> list[Call]:
    """Tasks that start programs, which are watched as well and end."""
    busy = [Call(at, "serve") for at in arrivals(chance, seconds, 12)]
    return busy + [
        Call(at, "run_program", {"mb": chance.randint(4, 24), "seconds": chance.uniform(0.4, 1.5)})
        for at in every(chance, seconds, 2.4)
    ]


# ---- a recording ----


def resident_kb(main: subprocess.Popen[bytes]) -> int:
    """Of a worker and its children."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(main.pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss // 1024
    return total


class Recording:
    """One worker, its broker and the sampler, in a folder of their own. close() ends all of them."""

    def __init__(self, name: str, pool: str, seed: int, stopping: threading.Event) -> None:
        self.kind, self.pool, self.seed, self.stopping = KINDS[name], pool, seed, stopping
        self.name = f"{name}-{pool}-{seed}"
        # Half of them, of each kind: not every host has the bootstrap.
        self.counts = (seed + list(CONCURRENCY).index(pool)) % 2 == 1
        self.folder = Path(tempfile.mkdtemp(prefix="labelled-"))
        self.started: list[subprocess.Popen[bytes]] = []
        self.sent = 0
        for part in ("tasks", "trace", "cgroups", "samples"):
            (self.folder / part).mkdir()
        calls = self.kind.plan(random.Random(self.name), pool, self.kind.seconds)
        self.calls = sorted(calls, key=lambda one: one.at)
        # What the sampler finds the worker by, and tells nothing of what it does.
        self.node = f"w{zlib.crc32(self.name.encode()) % 10_000:04}@host"
        self.broker = f"redis+socket://{self.folder}/redis"
        self.sender = celery.Celery("sender", broker=self.broker, set_as_current=False)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment or None, stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(process)
        return process

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Returns when it takes tasks."""
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        environment = {
            # The command line names no folder.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{HERE}{os.pathsep}{BOOTSTRAP}",
            "LABELLED_BROKER": self.broker,
            "LABELLED_LEDGER": "ledger",
            "LABELLED_READY": str(ready),
            **self.kind.environment,
        }
        if self.counts:
            environment |= {
                "CELERY_WORKER_INCLUDE": "plimsoll_bootstrap",
                "PLIMSOLL_TRACE_MODE": "attribution",
                "PLIMSOLL_TRACE_DIR": "trace",
                "PLIMSOLL_TASKS_DIR": str(self.folder / "tasks"),
            }
        command = ["python", "-m", "celery", "-A", "behaviours", "worker", "-P", self.pool, "-n", self.node]
        options = [*self.kind.options, f"-c{CONCURRENCY[self.pool]}"]
        worker = self.start(*command, *options, **environment)
        self.wait("worker", worker, ready.exists)
        return worker

    def wait(self, what: str, process: subprocess.Popen[bytes], until: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            if process.poll() is not None or time.monotonic() > deadline or self.stopping.is_set():
                raise RuntimeError(f"{self.name}: no {what}\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.02)

    def run(self) -> tuple[bytes, dict[str, Any]]:
        """The sampler's CSV, and the entry of the manifest."""
        broker = self.start("redis-server", "--port", "0", "--unixsocket", str(self.folder / "redis"), "--save", "")
        self.wait("broker", broker, (self.folder / "redis").exists)
        worker = self.start_worker()
        how = [f"--match={self.node}", f"--interval={INTERVAL_S}", f"--detail-every={DETAIL_EVERY}"]
        if not self.kind.pss:
            how.append("--no-pss")
        sampler = self.start(sys.executable, "-c", PROGRAM, "--output=samples", *how)
        samples = self.folder / "samples"
        self.wait("samples", sampler, lambda: list(samples.glob("samples-*")))
        feeder = threading.Thread(target=self.feed, args=(time.monotonic(),), daemon=True)
        feeder.start()
        self.keep_running(worker)
        sampler.terminate()
        failed = sampler.wait(PATIENCE_S)
        feeder.join(PATIENCE_S)
        log = (self.folder / "log").read_text()
        # A task that fails has not done what the label says.
        if failed or self.stopping.is_set() or self.sent < len(self.calls) or "Traceback" in log:
            raise RuntimeError(f"{self.name}: {self.sent} of {len(self.calls)} tasks\n{log[-3000:]}")
        content = joined(samples)
        return content, self.entry(content)

    def feed(self, began: float) -> None:
        for call in self.calls:
            if self.stopping.wait(max(0.0, began + call.at - time.monotonic())):
                return
            self.sender.send_task(f"shop.{call.task}", kwargs=dict(call.arguments))
            self.sent += 1

    def keep_running(self, worker: subprocess.Popen[bytes]) -> None:
        """Until the recording is over, with the restarts of its kind."""
        end = time.monotonic() + self.kind.seconds
        born, at_first = time.monotonic(), resident_kb(worker)
        while time.monotonic() < end and not self.stopping.wait(INTERVAL_S / 2):
            if worker.poll() is not None:
                raise RuntimeError(f"{self.name}: the worker ended\n{(self.folder / 'log').read_text()[-3000:]}")
            # Not so short before the end that the next run would be no more than a start.
            if time.monotonic() > end - 6:
                continue
            if self.kind.dies_at_kb and resident_kb(worker) > at_first + self.kind.dies_at_kb:
                # As the kernel does it with memory.oom.group, or systemd with OOMPolicy=kill.
                os.killpg(worker.pid, signal.SIGKILL)
            elif self.kind.deployed_every_s and time.monotonic() > born + self.kind.deployed_every_s:
                worker.terminate()
            else:
                continue
            worker.wait(PATIENCE_S)
            worker = self.start_worker()
            born = time.monotonic()

    def entry(self, content: bytes) -> dict[str, Any]:
        kind = self.kind
        rows = list(csv.DictReader(io.StringIO(content.decode())))
        seconds = float(rows[-1]["timestamp"]) - float(rows[0]["timestamp"])
        ledger = self.folder / "ledger"
        leaked_kb = sum(map(int, ledger.read_text().split())) / 1024 if ledger.exists() else 0.0
        known = kind.counted or not kind.leaking
        by_task = known and kind.follows != "time"
        return {
            "kind": kind.plan.__name__,
            "pool": self.pool,
            "seed": self.seed,
            # With autoscale, at most.
            "concurrency": 5 if "--autoscale=5,1" in kind.options else CONCURRENCY[self.pool],
            "leaking": kind.leaking,
            "follows": kind.follows,
            "stretch": kind.stretch,
            "kb_per_task": round(leaked_kb / self.sent, 3) if by_task else None,
            "kb_per_second": round(leaked_kb / seconds, 3) if known else None,
            "counts": self.counts,
            "interval": INTERVAL_S,
            "seconds": round(seconds, 1),
        }

    def close(self) -> None:
        """Each is the first of a session of its own, of which nothing stays."""
        self.sender.close()
        for process in reversed(self.started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(PATIENCE_S)
        # What a worker that ended by itself may have left. Nobody else is in this folder.
        for stray in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if stray.cwd() == str(self.folder):
                    stray.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def joined(samples: Path) -> bytes:
    """The segments of a recording as one, as it may have gone over an hour's end."""
    parts = [
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in sorted(samples.glob("samples-*"))
    ]
    header, _, first = parts[0].partition(b"\n")
    return header + b"\n" + first + b"".join(part.partition(b"\n")[2] for part in parts[1:])


def totals(content: bytes) -> list[int]:
    """KiB of all processes, at each beat."""
    found: dict[str, int] = {}
    for row in csv.DictReader(io.StringIO(content.decode())):
        found[row["timestamp"]] = found.get(row["timestamp"], 0) + int(row["rss_kb"])
    return list(found.values())


def sparkline(values: list[int], width: int = 60) -> str:
    chosen = [values[at * len(values) // width] for at in range(width)]
    low, span = min(chosen), max(max(chosen) - min(chosen), 1)
    return "".join("▁▂▃▄▅▆▇█"[(value - low) * 7 // span] for value in chosen)


# ---- all of them ----


def wanted(only: str | None, seeds: int | None) -> Iterator[tuple[str, str, int]]:
    for name, one in KINDS.items():
        if only in (None, name):
            for pool, number in one.pools.items():
                for seed in range(1, min(number, seeds or number) + 1):
                    yield name, pool, seed


def write(name: str, content: bytes, entry: dict[str, Any]) -> None:
    RECORDED.mkdir(exist_ok=True)
    # Without the time, the same content is the same file.
    (RECORDED / f"{name}.csv.gz").write_bytes(gzip.compress(content, 9, mtime=0))
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {"recordings": {}}
    manifest["versions"] = {
        "celery": celery.__version__,
        "python": platform.python_version(),
        "kernel": ".".join(platform.release().split(".")[:2]),
    }
    manifest["recordings"][name] = entry
    manifest["recordings"] = dict(sorted(manifest["recordings"].items()))
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="record", description="Records real Celery workers for the labelled set.")
    parser.add_argument("--only", choices=KINDS, help="this kind alone")
    parser.add_argument("--seeds", type=int, help="at most so many of each kind and pool")
    parser.add_argument("--jobs", type=int, default=2, help="recordings at a time; default: 2")
    options = parser.parse_args()
    os.nice(5)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stopping, writing = threading.Event(), threading.Lock()

    def record(name: str, pool: str, seed: int) -> bool:
        if stopping.is_set():
            return False
        recording = Recording(name, pool, seed, stopping)
        try:
            content, entry = recording.run()
        except Exception as error:  # noqa: BLE001 - it is said, the run fails in the end, and the others go on
            print(f"{recording.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return False
        finally:
            recording.close()
        sizes = totals(content)
        with writing:
            write(recording.name, content, entry)
            print(f"{recording.name:32} {sizes[0]:7} {sizes[-1]:7} KiB  {sparkline(sizes)}", flush=True)
        return True

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            done = list(pool.map(lambda one: record(*one), list(wanted(options.only, options.seeds))))
        finally:
            # Also where it is interrupted: each of them ends what it started.
            stopping.set()
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
