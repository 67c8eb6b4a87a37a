"""What tracing costs a Celery worker: ratios of throughput and of memory, beside a worker without any.

    .venv/bin/python -m tests.bench.tracing [--tasks 100] [--rounds 5] [--only WORD ...]

Real workers, solo and prefork with one child, each with a queue of its own in one redis-server, run the same tasks of
about 1 ms beside what Celery takes for each:

allocating  parses and writes JSON: thousands of allocations, none of which stays
computing   walks over bytes: next to no allocations
leaking     computes, and keeps 100 strings of 1 kB a task

under: nothing, twice, which says how well this measures; the bootstrap in each of its modes and in an open window;
plain tracemalloc, from the first line of the application, at 1 and 25 frames, and with a snapshot after each task, as
many do; and memray around the whole worker (`memray run`), as it is and with Python's allocators, which is what
tracemalloc traces. memray comes by pip into a temporary directory; where it can't, its rows say so.

Throughput is tasks by CPU time, user and system, all threads, of the process that runs them: other things run on this
computer too, and wall time tells of them; it is given besides. CPU time is taken from the beginning of a task to that
of the next one, so Celery's part is in it. In a round all workers are started anew, warmed up, and take turns of TURN
tasks. What counts of a turn is the mean, as attribution measures some tasks and not others; it is divided by that of
the same turn without tracing, a second away; of a round the median of its turns is taken, and given are the median of
the rounds and their quartiles. "no tracing, again" says how far to trust the rest.

"calls timed" is attribution with a clock around what is called of it at the beginning and at the end of a task, where
the worker's caches are as they are: it can tell microseconds, but not what it costs the rest of a task. The clock's own
are in it, 1 to 2 us.

Memory is the most that process held (VmHWM), over that of the one without tracing after as many tasks; the end of a
window is in it where one was asked for. "always" has one window all the while: how long the beginning and the end of
one take, which is there once in PLIMSOLL_TRACE_WINDOW_S, is told for those asked for. memray maps the file that it
writes, which counts.

--only takes names of pools, tasks and parts of names of what is measured: `--only solo computing window`. A round of
all takes five to ten minutes on two cores; what costs little needs more tasks and rounds than that, and takes one to
three: `--only off attribution armed --tasks 4000`. Needs redis-server on PATH and the packages of the extra `dev`; no
port is listened on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import Celery
from redis import Redis

ROOT = Path(__file__).resolve().parents[2]
BOOTSTRAP = ROOT / "roles" / "tracemalloc_bootstrap" / "files"
UNIT = "celery-worker@bench.service"
POOLS = ("solo", "prefork")
TASKS = ("allocating", "computing", "leaking")
WARM, TURN = 60, 200
PATIENCE_S = 120.0
BOUND = 0.98

APP = """
import json
import os
import time
import tracemalloc

if frames := int(os.environ.get("BENCH_FRAMES", 0)):
    tracemalloc.start(frames)

from celery import Celery, signals

app = Celery("app")
app.config_from_object("celeryconfig")
TABLE = bytes((7 * at + 13) % 256 for at in range(256))
WALK = bytes(at * 31 % 251 for at in range(@WALK@))
TEXT = json.dumps([
    {"id": 1000 + at, "title": f"a ticket of row {at}", "price": at + 0.75, "tags": ["x" * 9, str(at)], "paid": None}
    for at in range(@ENTRIES@)
])
KEPT = []
BEGAN = []
CALLS = []
LAST = None


def walk():
    state = 0
    for byte in WALK:
        state = TABLE[state ^ byte]
    return state


@app.task(name="allocating")
def allocating():
    BEGAN.append(time.process_time_ns())
    json.dumps(json.loads(TEXT))


@app.task(name="computing")
def computing():
    BEGAN.append(time.process_time_ns())
    walk()


@app.task(name="leaking")
def leaking():
    BEGAN.append(time.process_time_ns())
    walk()
    KEPT.extend(b"x" * 967 for _ in range(100))


@app.task(name="mark")
def mark():
    BEGAN.append(time.process_time_ns())
    wall = time.monotonic_ns()
    with open("/proc/self/status") as status:
        [peak] = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    with open("marks", "a") as file:
        file.write(json.dumps([os.getpid(), BEGAN, wall, peak, tracemalloc.is_tracing(), CALLS]) + "\\n")
    BEGAN.clear()
    CALLS.clear()


def timed(send):
    def sending(*args, **kwargs):
        began = time.thread_time_ns()
        sent = send(*args, **kwargs)
        CALLS.append(time.thread_time_ns() - began)
        return sent

    return sending


if os.environ.get("BENCH_TIMED"):
    from plimsoll_bootstrap import bootstrap

    bootstrap.start_task, bootstrap.end_task = timed(bootstrap.start_task), timed(bootstrap.end_task)

if os.environ.get("BENCH_SNAPSHOTS"):

    @signals.task_postrun.connect(weak=False)
    def snapshot(**_):
        global LAST
        LAST = tracemalloc.take_snapshot()
"""


@dataclass(frozen=True)
class Arm:
    """Something to measure."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    # Options of memray; None: without it.
    memray: tuple[str, ...] | None = None
    # Frames of a window that is asked for.
    window: int = 0
    # Whether it traces while it is measured.
    traces: bool = False
    # So much of the tasks: of what takes fifty times as long, fewer are enough.
    share: float = 1.0


def bootstrap(name: str, mode: str, window: int = 0, traces: bool = False, share: float = 1.0, **variables: Any) -> Arm:
    variables |= {"CELERY_WORKER_INCLUDE": "plimsoll_bootstrap", "PLIMSOLL_TRACE_MODE": mode}
    environment = {key: str(value) for key, value in variables.items()}
    return Arm(name, environment, None, window, traces or bool(window), share)


NOTHING, AGAIN, ATTRIBUTION, TIMED = "no tracing", "no tracing, again", "attribution", "attribution, calls timed"
ARMS = (
    Arm(NOTHING),
    Arm(AGAIN),
    bootstrap("off", "off"),
    bootstrap(ATTRIBUTION, "attribution"),
    bootstrap(TIMED, "attribution", BENCH_TIMED=1),
    # What leaks must not open a window here.
    bootstrap("armed", "armed", PLIMSOLL_TRACE_ARM_KB=1 << 30),
    bootstrap("window, 1 frame", "attribution", window=1),
    bootstrap("window, 10 frames", "attribution", window=10, share=0.2),
    bootstrap("always", "always", traces=True, PLIMSOLL_TRACE_WINDOW_S=3600),
    Arm("tracemalloc, 1 frame", {"BENCH_FRAMES": "1"}, traces=True),
    Arm("tracemalloc, 25 frames", {"BENCH_FRAMES": "25"}, traces=True, share=0.1),
    Arm("and a snapshot a task", {"BENCH_FRAMES": "1", "BENCH_SNAPSHOTS": "1"}, traces=True, share=0.1),
    Arm("memray", memray=()),
    Arm("memray, Python allocators", memray=("--trace-python-allocators",)),
)


class TroubleError(Exception):
    """Why an arm was not measured."""


@dataclass
class Mark:
    pid: int
    # CPU of the process at the beginning of each task since the last one, and of its own.
    began_ns: list[int]
    wall_ns: int
    peak_kb: int
    tracing: bool
    # Of each call of Celery's of what listens to the beginning or the end of a task, where that is timed.
    calls_ns: list[int]


class Worker:
    def __init__(self, folder: Path, redis: Path, pool: str, arm: Arm, memray: Path | None) -> None:
        self.arm, self.folder = arm, folder
        self.tasks = 0
        # Of a task, a value a turn.
        self.cpu_ns: list[int] = []
        self.wall_ns: list[float] = []
        self.calls_ns: list[int] = []
        # By the number of tasks.
        self.peaks: dict[int, int] = {}
        self.opening_ns = self.closing_ns = 0
        self.calls = Calls(redis, folder.name)
        for name in ("trace", "tasks", "windows"):
            (folder / name).mkdir()
        (folder / "celeryconfig.py").write_text(
            f"broker_url = {self.calls.url!r}\ntask_default_queue = {folder.name!r}\ntask_ignore_result = True\n"
        )
        (folder / "app.py").write_text(app_source())
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "PLIMSOLL_"))}
        environment = inherited | {
            "PYTHONPATH": str(BOOTSTRAP),
            "PYTHONHASHSEED": "0",
            "PLIMSOLL_UNIT": UNIT,
            "PLIMSOLL_TRACE_DIR": str(folder / "trace"),
            "PLIMSOLL_TASKS_DIR": str(folder / "tasks"),
            "PLIMSOLL_WINDOWS_DIR": str(folder / "windows"),
        }
        command = ["-m", "celery", "-A", "app", "worker", f"--pool={pool}", "--concurrency=1", "--loglevel=WARNING"]
        if arm.memray is not None:
            environment["PYTHONPATH"] += f"{os.pathsep}{memray}"
            command = ["-m", "memray", "run", "--quiet", "-o", str(folder / "memray.bin"), *arm.memray, *command]
        with (folder / "log").open("wb") as log, on_core(-1 if pool == "solo" else 0):
            self.process = subprocess.Popen(
                [sys.executable, *command, "--without-gossip", "--without-mingle", "--without-heartbeat"],
                cwd=folder,
                env=environment | arm.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.calls.put(["mark"])

    def wait(self, number: int) -> list[Mark]:
        """All marks, once there are so many."""
        path = self.folder / "marks"
        deadline = time.monotonic() + PATIENCE_S
        # A long line is written in parts.
        while not path.exists() or len(lines := re.findall(".*\n", path.read_text())) < number:
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "log").read_text().strip().splitlines() or [""]
                raise TroubleError(f"the worker ended or hangs: {said[-1]}")
            time.sleep(0.002)
        self.said = number
        return [Mark(*json.loads(line)) for line in lines]

    def run(self, tasks: Sequence[str]) -> tuple[Mark, Mark]:
        """Marks before and after them."""
        self.calls.put(["mark", *tasks, "mark"])
        before, after = self.wait(self.said + 2)[-2:]
        self.tasks += len(tasks)
        self.peaks[self.tasks] = after.peak_kb
        return before, after

    def number(self, tasks: int) -> int:
        return max(min(2, tasks), round(tasks * self.arm.share))

    def warm_up(self, task: str) -> None:
        [mark] = self.wait(1)
        # The main process of a prefork worker is elsewhere.
        self.pid = mark.pid
        os.sched_setaffinity(self.pid, {max(CORES)})
        _, mark = self.run([task] * max(5, self.number(WARM)))
        if self.arm.window:
            plain, _ = self.look()
            request = {"id": "bench", "window_s": 3600, "frames": self.arm.window, "until": time.time() + PATIENCE_S}
            part = self.folder / "windows" / "part"
            part.write_text(json.dumps(request))
            part.rename(self.folder / "windows" / f"{UNIT}.json")
            self.opening_ns, traces = self.look()
            if not traces:
                raise TroubleError("its window did not open")
            self.opening_ns -= plain
        elif mark.tracing != self.arm.traces:
            raise TroubleError("it traces" if mark.tracing else "it does not trace")

    def turn(self, task: str, number: int) -> None:
        before, after = self.run([task] * self.number(number))
        if not before.tracing == after.tracing == self.arm.traces:
            raise TroubleError("its window ended early" if self.arm.traces else "it traces")
        took = [end - begin for begin, end in itertools.pairwise(after.began_ns)]
        self.cpu_ns.append(sum(took) // len(took))
        self.wall_ns.append((after.wall_ns - before.wall_ns) / (len(took) + 1))
        # The end of one task and the beginning of the next, from mark to mark.
        self.calls_ns += map(operator.add, after.calls_ns[::2], after.calls_ns[1::2])
        self.settle()

    def end(self) -> None:
        """The end of a window is part of what it costs."""
        if self.arm.window:
            began = self.clock()
            (self.folder / "windows" / f"{UNIT}.json").unlink()
            deadline = time.monotonic() + PATIENCE_S
            while not any("window_close" in path.read_text() for path in (self.folder / "trace").glob("*.jsonl")):
                if time.monotonic() > deadline:
                    raise TroubleError("its window did not end")
                time.sleep(0.05)
            self.settle()
            self.closing_ns = self.clock() - began
            # For the peak.
            self.run([])
        said = [line for line in (self.folder / "log").read_text().splitlines() if "plimsoll_bootstrap:" in line]
        if said:
            raise TroubleError(said[0])

    def look(self) -> tuple[int, bool]:
        """CPU that two marks take which find the worker idle, and whether it traces at the second."""
        # The bootstrap looks for a request once a second.
        time.sleep(1.2)
        began = self.clock()
        _, mark = self.run([])
        self.settle()
        return self.clock() - began, mark.tracing

    def clock(self) -> int:
        """CPU of the process that runs tasks, ns: make_process_cpuclock(pid, CPUCLOCK_SCHED) of Linux."""
        return time.clock_gettime_ns(~self.pid << 3 | 2)

    def settle(self) -> None:
        """What comes after a mark, as a snapshot does, must not run beside another worker's turn."""
        deadline = time.monotonic() + PATIENCE_S
        now = self.clock()
        while time.monotonic() < deadline:
            before = now
            time.sleep(0.005)
            now = self.clock()
            if now - before < 5e5:
                return
        raise TroubleError("it is never idle")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        self.calls.close()


class Calls:
    """A worker's queue."""

    def __init__(self, redis: Path, name: str) -> None:
        self.name, self.url = name, f"redis+socket://{redis}"
        self.app = Celery("bench", broker=self.url, set_as_current=False)
        self.redis = Redis(unix_socket_path=str(redis))

    def put(self, tasks: Sequence[str]) -> None:
        """At once: else how fast they come would be measured too."""
        aside = f"{self.name}-aside"
        with self.app.producer_pool.acquire(block=True) as producer:
            for task in tasks:
                self.app.send_task(task, queue=aside, producer=producer, ignore_result=True)
        if not self.redis.renamenx(aside, self.name):
            raise TroubleError("tasks of the last turn are left")

    def close(self) -> None:
        self.app.close()
        self.redis.close()


_sizes: dict[str, int] = {}


def app_source() -> str:
    source = APP
    for name, size in _sizes.items():
        source = source.replace(f"@{name}@", str(size))
    return source


def calibrate() -> None:
    """Tasks of 1 ms, here and now."""
    _sizes.update(WALK=20_000, ENTRIES=100)
    for size, run in (("WALK", "walk()"), ("ENTRIES", "json.dumps(json.loads(TEXT))")):
        source = app_source().replace('app.config_from_object("celeryconfig")', "")
        least = f"import timeit\nprint(min(timeit.repeat({run!r}, globals=globals(), number=50, repeat=9)) / 50)"
        with on_core(-1):
            said = subprocess.run([sys.executable, "-c", source + least], capture_output=True, text=True, check=True)
        _sizes[size] = round(_sizes[size] * 1e-3 / float(said.stdout))


@contextlib.contextmanager
def on_core(which: int) -> Iterator[None]:
    """What is started here stays on that core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(CORES)[which]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


CORES = os.sched_getaffinity(0)


def install_memray(folder: Path) -> str:
    """Why not, if not."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--target", str(folder), "memray"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "not installed: pip takes too long"
    errors = [line for line in said.stderr.splitlines() if line.startswith("ERROR")] or [""]
    return f"not installed: {errors[-1]}" if said.returncode else ""


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[Path]:
    at = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(at), "--save", "", "--dir", str(folder)]
    with on_core(0):
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not at.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("redis-server does not start")
            time.sleep(0.05)
        yield at
    finally:
        server.kill()
        server.wait()


@dataclass
class Figures:
    """Of one arm, a value a round."""

    us: list[float] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    more_mib: list[float] = field(default_factory=list)
    calls_us: list[float] = field(default_factory=list)
    opening_ms: list[float] = field(default_factory=list)
    closing_ms: list[float] = field(default_factory=list)
    trouble: str = ""


class Bench:
    def __init__(self, folder: Path, redis: Path, memray: Path, tasks: int) -> None:
        self.folder, self.redis, self.memray, self.tasks = folder, redis, memray, tasks
        self.started = 0

    def round(self, pool: str, task: str, arms: Sequence[Arm], found: dict[str, Figures]) -> None:
        workers: list[Worker] = []
        failed: set[str] = set()

        def each(act: str, order: int, *values: Any) -> None:
            at = order % len(workers)
            for worker in workers[at:] + workers[:at]:
                if worker.arm.name not in failed:
                    try:
                        getattr(worker, act)(*values)
                    except TroubleError as error:
                        failed.add(worker.arm.name)
                        found[worker.arm.name].trouble = str(error)

        try:
            for arm in arms:
                self.started += 1
                folder = self.folder / f"worker{self.started}"
                folder.mkdir()
                workers.append(Worker(folder, self.redis, pool, arm, self.memray))
            each("wait", 0, 1)
            each("warm_up", 0, task)
            for turn in range(math.ceil(self.tasks / TURN)):
                each("turn", turn, task, min(TURN, self.tasks - turn * TURN))
            each("end", 0)
        finally:
            for worker in workers:
                worker.kill()
                shutil.rmtree(worker.folder)
        if NOTHING in failed:
            raise SystemExit(f"{pool}, {task}: {found[NOTHING].trouble}")
        for worker in workers:
            if worker.arm.name not in failed:
                self.divide(worker, workers[0], found[worker.arm.name])

    def divide(self, worker: Worker, beside: Worker, figures: Figures) -> None:
        figures.us.append(statistics.median(worker.cpu_ns) / 1e3)
        figures.throughput.append(statistics.median(map(operator.truediv, beside.cpu_ns, worker.cpu_ns)))
        figures.wall.append(statistics.median(map(operator.truediv, beside.wall_ns, worker.wall_ns)))
        # Of what ran fewer tasks, beside the same number.
        peak = max(worker.peaks.values())
        as_many = max(size for number, size in beside.peaks.items() if number <= max(worker.tasks, min(beside.peaks)))
        figures.memory.append(peak / as_many)
        figures.more_mib.append((peak - as_many) / 1024)
        if worker.calls_ns:
            figures.calls_us.append(statistics.mean(worker.calls_ns) / 1e3)
        if worker.arm.window:
            figures.opening_ms.append(worker.opening_ns / 1e6)
            figures.closing_ms.append(worker.closing_ns / 1e6)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Of the median: values that it lies between, and how surely, which is 95 % or the most there is."""
    ordered, n = sorted(values), len(values)

    def sure(skip: int) -> float:
        return 1 - 2 * sum(math.comb(n, at) for at in range(skip + 1)) / (1 << n)

    skip = max((at for at in range(n // 2) if sure(at) >= 0.95), default=0)
    return ordered[skip], ordered[-1 - skip], sure(skip)


def show(found: dict[str, Figures], tasks: int) -> None:
    nothing = found[NOTHING]
    print(f"{'':<27}{'us a task':>9}{'throughput':>12}{'quartiles':>14}{'by wall':>9}{'memory':>8}{'MiB more':>10}")
    for name, one in found.items():
        trouble = f"  {one.trouble}" if one.trouble else ""
        if not one.us:
            print(f"{name:<27}{trouble or '  not measured'}")
            continue
        low, high = quartiles(one.throughput)
        typical = {
            key: statistics.median(getattr(one, key)) for key in ("us", "throughput", "wall", "memory", "more_mib")
        }
        print(
            f"{name:<27}{typical['us']:>9.0f}{typical['throughput']:>12.4f}{f'{low:.4f}-{high:.4f}':>14}"
            f"{typical['wall']:>9.3f}{typical['memory']:>8.3f}{typical['more_mib']:>10.1f}{trouble}"
        )
    for name, one in found.items():
        if one.opening_ms:
            begin, end = statistics.median(one.opening_ms), statistics.median(one.closing_ms)
            print(f"{name}: its beginning took {begin:.0f} ms of CPU, its end after {tasks} tasks {end:.0f} ms")
    timed = found.get(TIMED)
    if timed and timed.calls_us:
        share = statistics.median(map(operator.truediv, timed.calls_us, nothing.us))
        print(f"attribution: the two calls of it take {statistics.median(timed.calls_us):.1f} us a task, {share:.2%}")
    attribution = found.get(ATTRIBUTION)
    if attribution and attribution.us:
        cost = [1 - ratio for ratio in attribution.throughput]
        low, high, sure = interval(cost)
        holds = "at most" if high <= 1 - BOUND else "more than" if low > 1 - BOUND else "perhaps more than"
        print(
            f"attribution costs {statistics.median(cost):.2%} of the throughput: {holds} {1 - BOUND:.0%} "
            f"({sure:.1%} interval of the median {low:.2%} to {high:.2%}, {len(cost)} rounds)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    options = parser.parse_args()
    if options.tasks < 1 or options.rounds < 1:
        parser.error("--tasks and --rounds are 1 or more")
    # Workers are ended then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pools = [name for name in POOLS if name in options.only] or POOLS
    tasks = [name for name in TASKS if name in options.only] or TASKS
    words = [word for word in options.only if word not in POOLS + TASKS]
    arms = [arm for arm in ARMS if arm.name in (NOTHING, AGAIN) or not words or any(word in arm.name for word in words)]
    # Nothing there is a disk's: the directories of counts and of windows are in memory on a host too.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="plimsoll-bench-") as name:
        folder = Path(name)
        asked = any(arm.memray is not None for arm in arms)
        trouble = install_memray(folder / "memray") if asked else ""
        calibrate()
        measured = [arm for arm in arms if arm.memray is None or not trouble]
        print(
            f"{options.tasks} tasks a round after {WARM} to warm up, in turns of {TURN}; {options.rounds} rounds; "
            f"tasks run on core {max(CORES)} of {len(CORES)}, Python {sys.version.split()[0]}",
            flush=True,
        )
        with redis_server(folder) as redis:
            bench = Bench(folder, redis, folder / "memray", options.tasks)
            found = {(pool, task): {arm.name: Figures() for arm in arms} for pool in pools for task in tasks}
            for _ in range(options.rounds):
                for (pool, task), figures in found.items():
                    of_pool = [arm for arm in measured if arm.memray is None or pool == "solo"]
                    bench.round(pool, task, of_pool, figures)
        for (pool, task), figures in found.items():
            print(f"\n{pool}, {task}")
            for arm in arms:
                if arm.memray is not None:
                    figures[arm.name].trouble = trouble if pool == "solo" else "with the solo pool alone"
            show(figures, options.tasks)


if __name__ == "__main__":
    main()
