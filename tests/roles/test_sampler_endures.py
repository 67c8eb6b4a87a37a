"""The sampler on real processes, and on what ends others: kill -9, a full disk, thousands of processes, days."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "roles" / "rss_sampler" / "files" / "rss_sampler.py"
ALONE = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import rss_sampler
rss_sampler.is_worker = lambda argv: False
sys.exit(rss_sampler.main())
"""
# As the program, on a machine that may have Celery workers of its own.
PROGRAM = (sys.executable, "-c", ALONE)
PATIENCE_S = 60.0
MOST_KB = 40 << 10


def load() -> ModuleType:
    """One of its own, whose constants a test may change."""
    spec = importlib.util.spec_from_file_location("rss_sampler_that_endures", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # This machine may have Celery workers of its own.
    module.is_worker = lambda argv: False  # type: ignore[attr-defined]
    return module


def lines_of(path: Path) -> list[str]:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines(keepends=True)


def rows_of(folder: Path, kind: str = "samples") -> list[dict[str, str]]:
    found = [row for path in sorted(folder.glob(f"{kind}-*")) for row in csv.DictReader(lines_of(path))]
    assert not [row for row in found if None in row or None in row.values()], "a line that is not whole"
    return found


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[Any]]]:
    """What is in it is ended, with all that it started."""
    processes: list[subprocess.Popen[Any]] = []
    yield processes
    for one in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.communicate()


def start(started: list[subprocess.Popen[Any]], *command: str | Path, **more: Any) -> subprocess.Popen[Any]:
    started.append(subprocess.Popen(command, start_new_session=True, **more))
    return started[-1]


def resident_kb(pid: int, what: str = "VmHWM") -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def wait_for(what: str, until: Any) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := until()):
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s"
        time.sleep(0.01)
    return found


def sleepers(root: Path, started: list[subprocess.Popen[Any]], number: int) -> list[int]:
    """So many processes of one unit, in a cgroup file system that is made up."""
    pids = [start(started, "sleep", "600").pid for _ in range(number)]
    here = root / "celery.slice" / "celery-worker@mail.service"
    here.mkdir(parents=True)
    (root / "cgroup.controllers").touch()
    (here / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    return pids


def test_of_kill_9_at_any_moment_no_line_is_lost_but_the_last(
    tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    """300 times, an hour being a second, and with a segment to compress at each start."""
    sampler, out = load(), tmp_path / "out"
    sampler.HOUR, sampler.DAY, sampler.ROLLUP_SPAN = 1, 3, 1
    # A systemctl between fork and exec would hold the lock beyond the kill.
    sampler.restarts_of = lambda units: {}
    number = len(sleepers(tmp_path / "cgroup", started, 3))
    out.mkdir()
    chance = random.Random(20261128)
    seen: set[str] = set()
    ends, over = [], sampler.SAMPLE_COLUMNS + "\n" + "1.000,2,3,x,,1.00,main,,,0,,,\n" * 3000

    def sample() -> None:
        watcher = sampler.Watcher(root=tmp_path / "cgroup")
        sampler.run(sampler.Sampler(watcher, sampler.Store(out, 1 << 30, 1e9), 50).beat, 1e-4, set())

    for kill in range(300):
        if kill % 3 == 0:
            (out / f"samples-20200101T{kill // 60:02}{kill % 60:02}00Z.csv").write_text(over)
        pid = os.fork()
        if pid == 0:
            try:
                sample()
            finally:
                (tmp_path / "ended").write_text(traceback.format_exc())
                os._exit(1)
        time.sleep(chance.uniform(0, 0.04))
        # What is whole now must still be there in the end.
        for path in out.glob("samples-202[6-9]*.csv"):
            with contextlib.suppress(FileNotFoundError):  # compressed in between
                seen.update(line for line in lines_of(path) if line.endswith("\n"))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, (tmp_path / "ended").read_text()
        ends.append(time.time())
    sampler.Store(out, 1 << 30, 1e9).tidy()

    kept = {line for path in out.glob("samples-202[6-9]*") for line in lines_of(path)}
    assert len(seen) > 300 and seen <= kept
    beats: dict[float, int] = defaultdict(int)
    for row in rows_of(out):
        beats[float(row["timestamp"])] += 1
    beats.pop(1.0)
    # The last beat before a kill may be torn, and no other. There may be two in a millisecond.
    last = {max((when for when in beats if when <= end), default=0.0) for end in ends}
    assert {when for when, lines in beats.items() if lines % number} <= last
    old = [path for path in out.iterdir() if path.name.startswith("samples-2020")]
    assert len(old) == 100 and {path.suffix for path in old} == {".gz"}
    assert all("".join(lines_of(path)) == over for path in old)
    assert not list(out.glob("*.tmp"))


FULL = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import rss_sampler
out = Path(sys.argv[2]) / "out"
filler = Path(sys.argv[2]) / "filler"
filler.write_bytes(b"x" * 60_000)
store = rss_sampler.Store(out, 1 << 30, 1e9)
began = 1_763_985_600

def beats(first, last):
    for beat in range(first, last):
        line = f"{began + beat * 60}.000,{beat},3,{'%032x' % hash(str(beat))},,1.00,main,,,0,,,\\n"
        store.append("samples", began + beat * 60, [line] * 20)

def fill():
    try:
        with filler.open("ab", buffering=0) as file:
            while True:
                file.write(b"y" * 4096)
    except OSError:
        pass

beats(0, 890)
# Nothing is left, neither of the disk nor of what could be dropped.
for path in out.glob("*.gz"):
    path.unlink()
fill()
beats(890, 900)
filler.unlink()
beats(900, 930)
store.close()
print(json.dumps({path.name: path.read_bytes().hex() for path in out.iterdir()}))
"""


def test_on_a_full_disk_it_drops_the_oldest_goes_on_and_says_so_once(tmp_path: Path) -> None:
    """A tmpfs of 200 KiB, in a mount namespace of its own."""
    (tmp_path / "disk").mkdir()
    mounted = 'mount -t tmpfs -o size=200k none "$1" && shift && exec "$@"'
    private = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    inside = [sys.executable, "-c", FULL, str(SCRIPT.parent), str(tmp_path / "disk")]
    ran = subprocess.run(
        [*private, "sh", "-c", mounted, "sh", str(tmp_path / "disk"), *inside], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    files = {name: bytes.fromhex(content) for name, content in json.loads(ran.stdout).items()}
    texts = [gzip.decompress(text) if name.endswith(".gz") else text for name, text in sorted(files.items())]
    found = [row for text in texts for row in csv.DictReader(io.StringIO(text.decode()))]
    assert not [row for row in found if None in row.values() or len(row) != 13]
    beats = [int(row["pid"]) for row in found]
    # Whole beats, the newest of them, and those without room are missing.
    assert all(beats.count(beat) == 20 for beat in set(beats))
    assert {*range(840, 890), *range(900, 930)} <= set(beats) and min(beats) > 0 and 899 not in beats
    assert ran.stderr.count("no room; dropping the oldest segments") == 1, ran.stderr
    assert ran.stderr.count("samples are lost until there is some") == 1, ran.stderr


def test_two_thousand_processes_are_all_sampled_in_little_memory(
    tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    many = "for n in $(seq 1999); do sleep 600.25 & done; wait"
    start(started, "sh", "-c", many, "mark-of-two-thousand")
    command = (*(*PROGRAM, f"--output={tmp_path}", "--interval=0.5"), "--match=mark-of-two-thousand")
    service = start(started, *command, "--detail-every=4", stderr=subprocess.PIPE)

    def beats() -> list[int]:
        found: dict[str, int] = defaultdict(int)
        with contextlib.suppress(FileNotFoundError):
            for row in rows_of(tmp_path):
                found[row["timestamp"]] += 1
        return list(found.values())

    wait_for("six beats of all of them", lambda: beats()[-6:] == [2000] * 6)
    assert resident_kb(service.pid) < MOST_KB
    service.terminate()
    assert service.wait(PATIENCE_S) == 0 and service.stderr.read() == b""
    last = rows_of(tmp_path)[-2000:]
    assert len({(row["pid"], row["start_time"]) for row in last}) == 2000
    assert [row["role"] for row in last].count("main") == 1


def test_a_storm_of_forks_is_no_error_and_no_false_series(tmp_path: Path, started: list[subprocess.Popen[Any]]) -> None:
    storm = "while :; do /bin/true & /bin/true & wait; done"
    mains = {start(started, "sh", "-c", storm, "mark-of-a-storm").pid for _ in range(3)}
    command = (*(*PROGRAM, f"--output={tmp_path}", "--interval=0.01"), "--match=mark-of-a-storm")
    service = start(started, *command, "--detail-every=3", stderr=subprocess.PIPE)
    wait_for("hundred beats", lambda: len({row["timestamp"] for row in rows_of(tmp_path)}) > 100)
    service.terminate()
    assert service.wait(PATIENCE_S) == 0 and service.stderr.read() == b""
    found = rows_of(tmp_path)
    beats = {row["timestamp"] for row in found}
    generations: dict[str, set[str]] = defaultdict(set)
    for row in found:
        generations[row["pid"]].add(row["start_time"])
        assert int(row["pid"]) in mains or row["role"] == "child"
    for pid in mains:
        assert len(generations[str(pid)]) == 1
        assert sum(row["pid"] == str(pid) for row in found) == len(beats), "the workers themselves in each beat"
    assert len(found) > 3 * len(beats), "some of what they fork was seen"


def test_a_pid_that_is_used_again_is_another_process(tmp_path: Path, started: list[subprocess.Popen[Any]]) -> None:
    """By the kernel itself, which takes the next pid from ns_last_pid."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("the kernel lets root alone choose the next pid")
    sampler = load()
    watcher = sampler.Watcher("sleep 600.5", root=tmp_path)
    one = sampler.Sampler(watcher, sampler.Store(tmp_path / "out", 1 << 30, 1e9), 10)
    first = start(started, "sleep", "600.5")
    wait_for("exec", lambda: b"600.5" in Path(f"/proc/{first.pid}/cmdline").read_bytes())
    now = time.time()
    assert one.beat(now) == 1
    first.kill()
    first.wait()
    # Starts are told apart by the clock's ticks.
    time.sleep(0.05)
    for _ in range(100):
        last.write_text(str(first.pid - 1))
        second = start(started, "sleep", "600.5")
        if second.pid == first.pid:
            break
        second.kill()
    assert second.pid == first.pid, "another process took the pid each time"
    wait_for("exec", lambda: b"600.5" in Path(f"/proc/{second.pid}/cmdline").read_bytes())
    beats = [one.beat(now + 1), one.beat(now + 2)]
    one.close()
    # At the first beat the old one is found to be gone, and at the second the new one to be there.
    assert beats == [0, 1]
    before, after = rows_of(tmp_path / "out")
    assert before["pid"] == after["pid"] and before["start_time"] != after["start_time"]
    assert [row["count"] for row in rows_of(tmp_path / "out", "rollup")] == ["1", "1"]


def test_days_of_samples_add_nothing_to_its_memory(tmp_path: Path, started: list[subprocess.Popen[Any]]) -> None:
    """A beat a minute in a process of its own, with a process that is replaced every five minutes: day 4 and day 8.

    Until the fourth day the heap takes steps of up to 400 KiB, and then 60 at most, with as many objects.
    """
    sleepers(tmp_path / "cgroup", started, 40)
    program = f"""
import gc, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import rss_sampler
rss_sampler.is_worker = lambda argv: False
root = Path({str(tmp_path / "cgroup")!r})
procs = root / "celery.slice/celery-worker@mail.service/cgroup.procs"
pids = procs.read_text()
one = rss_sampler.Sampler(rss_sampler.Watcher(root=root), rss_sampler.Store(root.parent / "out", 1 << 20, 1e9), 10)
statm = open("/proc/self/statm")
for beat in range(11520):
    if beat % 5 == 0:
        if beat:
            child.kill(); child.wait()
        child = subprocess.Popen(["sleep", "600"])
        procs.write_text(pids + f"{{child.pid}}\\n")
    if beat in (5760, 11519):
        statm.seek(0)
        gc.collect()
        print(int(statm.read().split()[1]) * rss_sampler.PAGE_KB, sys.getallocatedblocks())
    one.beat(1_763_942_400 + beat * 60)
child.kill()
one.close()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    early, early_blocks, late, late_blocks = map(int, ran.stdout.split())
    assert late - early < 128 and late < MOST_KB, "KiB"
    assert late_blocks - early_blocks < 300, "objects"
    kept = list((tmp_path / "out").glob("*.gz"))
    assert len([path for path in kept if path.name.startswith("rollup")]) >= 1
    assert sum(path.stat().st_size for path in kept) <= 1 << 20


POOLS = {"prefork": 3, "threads": 1, "solo": 1, "gevent": 1, "eventlet": 1}


def test_workers_of_all_pools_are_found_by_their_command_line(
    tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    """Started by hand, in no unit; real Celery with a folder as the broker."""
    (tmp_path / "queue").mkdir()
    options = {"data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "queue"}
    (tmp_path / "shop.py").write_text(
        "import os\nfrom celery import Celery, signals\n"
        "app = Celery('shop', broker='filesystem://')\n"
        f"app.conf.broker_transport_options = {options!r}\n"
        "signals.worker_ready.connect(lambda **_: open(os.environ['READY'], 'w').close(), weak=False)\n"
    )
    mains = {}
    for pool in POOLS:
        command = ("celery", "-A", "shop", "worker", f"--pool={pool}", "--concurrency=2", f"--hostname={pool}@h")
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        environ = {**os.environ, "READY": pool}
        log = (tmp_path / f"{pool}.log").open("wb")
        one = start(started, sys.executable, "-m", *command, *quiet, cwd=tmp_path, env=environ, stdout=log, stderr=log)
        mains[pool] = one.pid
    for pool in POOLS:
        wait_for(f"{pool} worker", (tmp_path / pool).exists)
    ran = subprocess.run([sys.executable, SCRIPT, "--once"], capture_output=True, text=True)
    found = [row for row in csv.DictReader(io.StringIO(ran.stdout)) if "-A shop worker" in row["command"]]
    by_pool = {pool: sorted(row["role"] for row in found if f"--hostname={pool}@h" in row["command"]) for pool in POOLS}
    assert by_pool == {pool: ["child"] * (number - 1) + ["main"] for pool, number in POOLS.items()}
    assert {int(row["pid"]) for row in found if row["role"] == "main"} == set(mains.values())
    assert all(int(row["pss_kb"]) > 0 and int(row["fds"]) > 0 and int(row["threads"]) > 0 for row in found)
