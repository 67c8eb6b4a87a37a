"""The sampler on processes that the test starts, in cgroup directories that it makes up."""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import ROOT, load_file

SCRIPT = ROOT / "roles/rss_sampler/files/rss_sampler.py"
sampler = load_file(SCRIPT, "rss_sampler")
is_worker = sampler.is_worker

MIDNIGHT = 1_763_942_400  # the start of 20251124T000000Z
NOON = MIDNIGHT + 12 * 3600
MiB = 1 << 20
CGROUP_FILES = {
    "memory.current": "104857600\n",
    "memory.high": "209715200\n",
    "memory.max": "max\n",
    "memory.swap.current": "4096\n",
    "memory.events": "low 0\nhigh 7\nmax 2\noom 1\noom_kill 1\noom_group_kill 0\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1234\n"
    "full avg10=0.00 avg60=0.00 avg300=0.00 total=567\n",
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: Any) -> None:
    """Nothing was said yet, no systemd of this machine is asked, and no Celery worker is found that runs on it."""
    monkeypatch.setattr(sampler, "_said", set())
    monkeypatch.setattr(sampler, "is_worker", lambda argv: False)
    monkeypatch.setattr(sampler, "restarts_of", lambda units: dict.fromkeys(units, "3"))
    states = {"NRestarts": "3", "ActiveState": "active"}
    monkeypatch.setattr(sampler, "show", lambda properties, units: {"celery-worker@mail.service": states})


def ended(pid: int, how: int = 0) -> bool:
    """Wait until a process is a zombie, and leave it one; with WNOHANG only look."""
    return bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | how))


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started = []

    def start(*command: Any, **more: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, start_new_session=True, **more)
        started.append(process)
        # In the middle of exec it has no command line yet, and once it ended none any more.
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes() and not ended(process.pid, os.WNOHANG):
            time.sleep(0.001)
        return process

    yield start
    for process in started:
        # Shells have children of their own. A test may have waited for the process itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def sleeper(start: Any) -> int:
    pid: int = start("sleep", "60").pid
    # Until it sleeps it still loads its libraries, and grows.
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S" and time.monotonic() < end:
        time.sleep(0.01)
    return pid


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The top of a cgroup file system."""
    top = tmp_path / "cgroup"
    top.mkdir()
    (top / "cgroup.controllers").write_text("memory pids\n")
    return top


def unit(root: Path, path: str, *pids: int) -> Path:
    here = root / path
    here.mkdir(parents=True, exist_ok=True)
    (here / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    return here


def make(root: Path, *, match: str | None = None, detail_every: int = 10, **more: Any) -> Any:
    """A sampler of what is in root, which writes to root's sibling `out`."""
    watcher = sampler.Watcher(match, root=root, tasks=root.parent / "tasks", **more)
    return sampler.Sampler(watcher, store(root.parent / "out"), detail_every)


def content(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()


def rows(folder: Path, kind: str) -> list[dict[str, str]]:
    """All lines of one kind, in the order of the names."""
    texts = (content(path) for path in sorted(folder.glob(f"{kind}-*")))
    return [row for text in texts for row in csv.DictReader(io.StringIO(text))]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def store(folder: Path, keep: int = MiB, age: float = 1e9) -> Any:
    return sampler.Store(folder, keep, age)


def line(text: str) -> list[str]:
    """One row, recognised by its command."""
    return [f"1,2,3,{text}\n"]


def commands(folder: Path) -> list[str]:
    return [row["command"] for row in rows(folder, "samples")]


# ---- what a sample holds ----


def test_the_columns_are_those_that_are_documented(root: Path, sleeper: int) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    one = make(root)
    one.beat(NOON)
    one.close()
    assert {
        path.name.split("-")[0]: path.read_text().split("\n")[0] for path in (root.parent / "out").glob("*.csv")
    } == {
        "samples": "timestamp,pid,rss_kb,command,unit,start_time,role,pss_kb,uss_kb,swap_kb,fds,threads,tasks",
        "cgroup": "timestamp,unit,memory_current_kb,memory_high_kb,memory_max_kb,swap_kb,events_high,events_max,"
        "oom_kill,pressure_some_us,pressure_full_us,n_restarts",
        "rollup": "timestamp,pid,unit,start_time,role,count,floor_kb,median_kb,max_kb,tasks",
        "units": "timestamp,unit,memory_current_kb,memory_high_kb,memory_max_kb,swap_kb,events_high,events_max,"
        "oom_kill,pressure_some_us,pressure_full_us,n_restarts",
    }


def test_a_sample_tells_main_from_child_and_measures_what_is_dear_every_few_beats(root: Path, start: Any) -> None:
    main = start("sh", "-c", "sleep 60 & echo $!; wait", stdout=subprocess.PIPE)
    child = int(main.stdout.readline())
    (root.parent / "tasks").mkdir()
    (root.parent / "tasks" / str(child)).write_text("41\n")
    unit(root, "celery.slice/celery-worker@mail.service", main.pid, child)
    one = make(root, detail_every=2)
    assert [one.beat(NOON + 0.25), one.beat(NOON + 60), one.beat(NOON + 120)] == [2, 2, 2]
    one.close()
    found = rows(root.parent / "out", "samples")
    assert {(int(row["pid"]), row["role"], row["tasks"]) for row in found} == {
        (main.pid, "main", ""),
        (child, "child", "41"),
    }
    (first, *others) = (row for row in found if int(row["pid"]) == main.pid)
    assert first["timestamp"] == f"{NOON}.250"
    assert first["unit"] == "celery-worker@mail.service"
    assert first["command"] == "sh -c sleep 60 & echo $!; wait"
    assert abs(float(first["start_time"]) - time.time()) < 10
    measured = psutil.Process(main.pid)
    assert int(first["rss_kb"]) == pytest.approx(measured.memory_info().rss / 1024, rel=0.2)
    assert int(first["fds"]) == measured.num_fds()
    assert (first["threads"], first["swap_kb"]) == ("1", "0")
    assert 0 < int(first["uss_kb"]) <= int(first["pss_kb"]) <= int(first["rss_kb"])
    dear = ("pss_kb", "uss_kb", "fds", "threads")
    assert [{name: row[name] != "" for name in dear} for row in others] == [
        dict.fromkeys(dear, False),
        dict.fromkeys(dear, True),
    ]
    assert {row["swap_kb"] for row in others} == {"0"}


def test_without_pss_the_rest_is_there(root: Path, sleeper: int) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    one = make(root, pss=False)
    one.beat(NOON)
    one.close()
    (row,) = rows(root.parent / "out", "samples")
    assert (row["pss_kb"], row["uss_kb"], row["threads"]) == ("", "", "1") and int(row["fds"]) > 0


def test_a_cgroups_own_figures(root: Path, sleeper: int) -> None:
    full = unit(root, "celery.slice/celery-worker@mail.service", sleeper)
    for name, text in CGROUP_FILES.items():
        (full / name).write_text(text)
    unit(root, "celery.slice/celery-worker@old-kernel.service")
    one = make(root)
    one.beat(NOON)
    one.beat(NOON + 60)
    one.close()
    assert [",".join(row.values()) for row in rows(root.parent / "out", "cgroup")] == [
        f"{NOON}.000,celery-worker@mail.service,102400,204800,,4,7,2,1,1234,567,3",
        f"{NOON}.000,celery-worker@old-kernel.service,,,,,,,,,,3",
        f"{NOON + 60}.000,celery-worker@mail.service,102400,204800,,4,7,2,1,1234,567,",
        f"{NOON + 60}.000,celery-worker@old-kernel.service,,,,,,,,,,",
    ]


def test_workers_are_found_in_nested_slices_and_their_processes_in_delegated_cgroups(root: Path, start: Any) -> None:
    a, b, c, other = (start("sleep", "60").pid for _ in range(4))
    unit(root, "celery-worker@top.service", a)
    unit(root, "a.slice/a-b.slice/celery-worker@deep.service", b)
    unit(root, "a.slice/celery-worker@given.service")
    unit(root, "a.slice/celery-worker@given.service/inner/more", c)
    unit(root, "a.slice/ssh.service", other)
    one = make(root)
    one.beat(NOON)
    one.close()
    assert {int(row["pid"]): row["unit"] for row in rows(root.parent / "out", "samples")} == {
        a: "celery-worker@top.service",
        b: "celery-worker@deep.service",
        c: "celery-worker@given.service",
    }


def test_a_unit_that_is_started_again_is_read_anew(root: Path, sleeper: int) -> None:
    """systemd makes its cgroup anew, and what is held of the old one reads as nothing."""
    here = unit(root, "celery.slice/celery-worker@mail.service", sleeper)
    (here / "memory.current").write_text("1024\n")
    one = make(root)
    one.beat(NOON)
    here.rename(root / "was")
    one.beat(NOON + 60)
    here = unit(root, "celery.slice/celery-worker@mail.service", sleeper)
    (here / "memory.current").write_text("2048\n")
    one.watcher.seen.clear()
    one.beat(NOON + 120)
    one.close()
    assert [row["memory_current_kb"] for row in rows(root.parent / "out", "cgroup")] == ["1", "2"]


def test_swap_is_asked_for_where_there_may_be_some(root: Path, sleeper: int, tmp_path: Path, monkeypatch: Any) -> None:
    there = unit(root, "celery.slice/celery-worker@mail.service", sleeper)
    one = make(root)
    monkeypatch.setattr(sampler.Process, "read_swap", lambda process: 7)
    swaps = tmp_path / "swaps"
    header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    one.watcher.swaps = SimpleNamespace(read=swaps.read_text)
    beats = [
        (header, "4096", "0"),
        (header + "/dev/sdb partition\t524284\t\t0\t\t-2\n", "4096", "0"),
        (header + "/dev/sdb partition\t524284\t\t12\t\t-2\n", "4096", "7"),
        (header + "/dev/sdb partition\t524284\t\t12\t\t-2\n", "0", "0"),
        (header + "/a file 1 0 1\n/dev/sdb partition\t524284\t\t12\t\t-2\n", "4096", "7"),
    ]
    for beat, (text, swap, _) in enumerate(beats):
        swaps.write_text(text)
        (there / "memory.swap.current").write_text(swap)
        one.beat(NOON + beat)
    one.close()
    assert [row["swap_kb"] for row in rows(root.parent / "out", "samples")] == [swap for _, _, swap in beats]


def test_n_restarts_come_from_one_call_of_systemctl(tmp_path: Path, monkeypatch: Any) -> None:
    restarts_of = load_file(SCRIPT, "rss_sampler_as_it_is").restarts_of
    program = tmp_path / "systemctl"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert restarts_of(["a.service"]) == {}
    program.write_text("#!/bin/sh\nprintf 'Id=%s\\nNRestarts=5\\n\\n' \"$3\"\nprintf 'NRestarts=0\\nId=%s\\n' \"$4\"\n")
    program.chmod(0o755)
    assert restarts_of(["a.service", "b.service"]) == {"a.service": "5", "b.service": "0"}


@pytest.mark.parametrize(
    ("argument", "written"),
    [
        ("--broker=redis://user:s3cret@db:6379/0", "--broker=redis://***@db:6379/0"),
        ("amqp://user:s3c/r3t@s@db//", "amqp://***@db//"),
        ("amqp://u:s3cret@a;amqp://u:s3cret@b", "amqp://***@b"),
        ("redis://db/0 --hostname=mail@h", "redis://db/0 --hostname=mail@h"),
    ],
)
def test_credentials_on_a_command_line_are_masked(start: Any, argument: str, written: str) -> None:
    pid = start("sh", "-c", "sleep 60; :", argument).pid
    assert sampler.Process(pid, None, Path("/none")).command == f"sh -c sleep 60; : {written}"


def test_a_command_line_without_end_costs_next_to_nothing_and_hides_its_passwords(start: Any) -> None:
    """Its user chooses it, and may mean harm."""
    argument = "://" * 30_000 + "redis://:s3cret" + "x" * 30_000 + "@db"
    for command in (("sh", "-c", "sleep 60; :", argument), ("sh", "-c", "sleep 60; :", *["-"] * 50_000)):
        pid = start(*command).pid
        began = time.process_time()
        process = sampler.Process(pid, None, Path("/none"))
        assert not is_worker(sampler.command_line(pid)) and time.process_time() - began < 0.1
        assert len(process.command) <= sampler.COMMAND_LENGTH
        process.close()
    began = time.process_time()
    assert not is_worker(["python", *["-"] * 1_000_000])
    assert time.process_time() - began < 1
    pid = start("sh", "-c", "sleep 60; :", "b", "a" * 4062 + "redis://:s3cret@db").pid
    assert sampler.command_line(pid) == ["sh", "-c", "sleep 60; :", "b", "..."]


def test_what_would_move_a_terminal_is_replaced(start: Any) -> None:
    assert sampler.command_of(["celery", "\x1b]0;mine\x07", "\u202e"]) == "celery ?]0;mine? ?"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("0::/celery.slice/celery-worker@a.service", "celery-worker@a.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service", "shop.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/celery-worker@a.service", "user@1000.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        (
            "12:memory:/x.service\n1:name=systemd:/system.slice/docker-1.scope/celery-worker@a.service\n0::/",
            "docker-1.scope",
        ),
        ("", ""),
    ],
)
def test_the_unit_of_a_process_that_is_in_none_of_ours(path: str, found: str, monkeypatch: Any) -> None:
    """Nobody can take the name of a worker's unit for what they start themselves."""
    monkeypatch.setattr(sampler, "read_text", lambda name: path)
    assert sampler.unit_by_pid(1) == found


def test_cgroups_that_are_nested_without_end_are_looked_through_so_far(root: Path, sleeper: int) -> None:
    here = unit(root, "celery-worker@mail.service")
    for depth in range(40):
        here = unit(here, "deeper", *([sleeper] if depth in (3, 39) else []))
    assert list(sampler.processes_in(root / "celery-worker@mail.service")) == [sleeper]


def test_all_pids_of_a_cgroup_are_read_a_page_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "procs").write_text("123456\n" * 3000)
    held = sampler.Held(tmp_path / "procs")
    pread = os.pread
    monkeypatch.setattr(sampler.os, "pread", lambda fd, size, at: pread(fd, min(size, 4096), at))
    assert held.read_all() == "123456\n" * 3000
    held.close()


def test_a_unit_that_comes_as_another_goes_is_seen_at_once(root: Path, sleeper: int, start: Any) -> None:
    unit(root, "system.slice/celery-worker@a.service", sleeper)
    other = unit(root, "system.slice/cron.service")
    one = make(root)
    one.beat(NOON)
    other.rename(root / "gone")
    unit(root, "system.slice/celery-worker@b.service", start("sleep", "60").pid)
    assert one.beat(NOON + 60) == 2
    one.close()


def test_figures_that_come_later_are_read(root: Path, sleeper: int) -> None:
    """As when memory accounting is turned on."""
    here = unit(root, "celery-worker@mail.service", sleeper)
    one = make(root)
    one.beat(NOON)
    (here / "memory.current").write_text("2048\n")
    one.beat(NOON + 60)
    one.close()
    assert [row["memory_current_kb"] for row in rows(root.parent / "out", "cgroup")] == ["", "2"]


def test_a_command_line_of_any_bytes_is_one_line_of_utf_8(root: Path, start: Any) -> None:
    unit(root, "celery-worker@mail.service", start("sh", "-c", "sleep 60; :", b'\xff,"\n' + b"x" * 300).pid)
    one = make(root)
    one.beat(NOON)
    one.close()
    (command,) = commands(root.parent / "out")
    assert command.startswith('sh -c sleep 60; : \ufffd," xxx')
    assert len(command) == sampler.COMMAND_LENGTH


WORKERS = [
    "/srv/venv/bin/python3.11 /srv/venv/bin/celery -A shop worker --concurrency=4",
    "/usr/bin/python3 -m celery --app shop worker",
    "python -X dev -u -W ignore -m celery -q --broker=redis://b -A worker worker -P eventlet",
    "celery worker -A shop",
    "pypy3 /opt/bin/celery --workdir /srv --no-color worker",
    "[celeryd: sales@host:MainProcess] -active- (worker --loglevel=INFO)",
    "[celeryd: sales@host:ForkPoolWorker-1]",
]
OTHERS = [
    "",
    "python",
    "celery",
    "python -m celery -A worker beat",
    "celery -A shop inspect ping worker",
    "python -m celeryworker worker",
    "sh -c celery -A shop worker",
    "sudo -u celery celery -A shop worker",
    "vim celery worker",
    "python tasks.py worker",
]


@pytest.mark.parametrize(("command", "found"), [(one, True) for one in WORKERS] + [(one, False) for one in OTHERS])
def test_a_worker_is_known_by_its_command_line(command: str, found: bool) -> None:
    argv = [command] if command.startswith("[") else command.split()
    assert is_worker(argv) is found


def test_a_worker_in_no_unit_is_found_with_what_it_starts(root: Path, start: Any, monkeypatch: Any) -> None:
    name = f"[celeryd: sales@{os.getpid()}:MainProcess]"
    monkeypatch.setattr(sampler, "is_worker", lambda argv: is_worker(argv) and argv[0] == name)
    other = start("sh", "-c", "sleep 60; : celery worker")
    one = make(root)
    assert one.beat(NOON) == 0
    main = start("bash", "-c", f"exec -a '{name}' sh -c 'sleep 60 & echo $!; wait'", stdout=subprocess.PIPE)
    child = int(main.stdout.readline())
    assert one.beat(NOON + 60) == 2
    os.kill(child, signal.SIGKILL)
    main.wait()
    assert one.beat(NOON + 120) == 0
    one.close()
    found = rows(root.parent / "out", "samples")
    assert {(int(row["pid"]), row["role"]) for row in found} == {(main.pid, "main"), (child, "child")}
    assert other.poll() is None and rows(root.parent / "out", "cgroup") == []


# ---- processes come and go ----


def test_the_command_line_is_read_anew_after_an_exec(root: Path, start: Any) -> None:
    process = start("sh", "-c", "read _; exec sleep 60", stdin=subprocess.PIPE)
    unit(root, "celery-worker@mail.service", process.pid)
    one = make(root, detail_every=2)
    one.beat(NOON)
    process.stdin.write(b"\n")
    process.stdin.flush()
    while psutil.Process(process.pid).cmdline() != ["sleep", "60"]:
        time.sleep(0.001)
    one.beat(NOON + 60)
    one.beat(NOON + 120)
    one.close()
    found = rows(root.parent / "out", "samples")
    assert found[-1]["command"] == "sleep 60"
    assert len({row["start_time"] for row in found}) == 1


def test_a_process_that_vanished_is_no_error(root: Path, start: Any, sleeper: int) -> None:
    gone, zombie = start("true"), start("true")
    gone.wait()
    assert ended(zombie.pid)
    unit(root, "celery-worker@mail.service", gone.pid, zombie.pid, sleeper)
    one = make(root)
    assert one.beat(NOON) == 1
    # Between finding and measuring.
    one.watcher.find(again=False)
    os.kill(sleeper, signal.SIGKILL)
    assert ended(sleeper)
    assert one.watcher.sample(NOON, False) == one.watcher.sample(NOON, True) == []
    os.waitpid(sleeper, 0)
    assert one.watcher.sample(NOON, True) == []
    assert one.beat(NOON + 60) == 0
    one.close()
    assert [row["count"] for row in rows(root.parent / "out", "rollup")] == ["1"]


def test_no_name_of_a_process_forges_its_figures(root: Path, start: Any, tmp_path: Path) -> None:
    program = tmp_path / "a\rVmRSS: 9"
    program.write_text("#!/bin/sh\nread _\n")
    program.chmod(0o755)
    process = start(program, stdin=subprocess.PIPE)
    unit(root, "celery-worker@mail.service", process.pid)
    one = make(root)
    assert one.beat(NOON) == 1
    process.stdin.close()
    assert ended(process.pid)  # a zombie has a name, but no memory
    assert one.beat(NOON + 60) == 0
    one.close()


def test_a_reused_pid_is_a_new_generation(root: Path, start: Any) -> None:
    first = start("sleep", "60")
    unit(root, "celery-worker@mail.service", first.pid)
    one = make(root)
    one.beat(NOON)
    (known,) = one.watcher.known.values()
    # What is held of the one that ended says so, though there is another of that pid.
    gone = os.fork()
    if gone == 0:
        time.sleep(60)
        os._exit(0)
    os.dup2(os.open(f"/proc/{gone}/statm", os.O_RDONLY), known.statm)
    os.kill(gone, signal.SIGKILL)
    os.waitpid(gone, 0)
    assert one.beat(NOON + 60) == 0
    assert one.beat(NOON + 120) == 1
    assert one.watcher.known[first.pid] is not known
    one.close()
    assert [row["count"] for row in rows(root.parent / "out", "rollup")] == ["1", "1"]


def test_a_clock_that_is_set_back_makes_no_new_generation_and_later_ones_go_by_it(
    root: Path, start: Any, sleeper: int, monkeypatch: Any
) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    one = make(root)
    one.beat(NOON)
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: booted - 3600)
    later = start("sleep", "60").pid
    unit(root, "celery-worker@mail.service", sleeper, later)
    one.beat(NOON - 3600)
    one.close()
    found = [(int(row["pid"]), float(row["start_time"])) for row in rows(root.parent / "out", "samples")]
    assert len(set(found)) == 2
    old, new = (next(when for pid, when in found if pid == which) for which in (sleeper, later))
    assert abs(old - new - 3600) < 60


# ---- tasks ----


def published(folder: Path, pid: int, start_time: float = 0) -> Any:
    """What a sample would hold; None where nothing is read."""
    process = SimpleNamespace(tasks_file=sampler.tasks_of(folder, pid, start_time))
    return sampler.Process.read_tasks(process) if process.tasks_file >= 0 else None


def test_tasks_are_what_the_process_published(tmp_path: Path) -> None:
    (tmp_path / "7").write_text("12\n")
    assert published(tmp_path, 7, time.time() - 5) == 12
    assert published(tmp_path, 8) is None
    # The process is younger than the file: another of the same pid left it behind.
    assert published(tmp_path, 7, time.time() + 5) is None


def test_tasks_are_found_when_they_are_published_later(root: Path, sleeper: int) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    one = make(root, detail_every=2)
    one.beat(NOON)
    (root.parent / "tasks").mkdir()
    for beat in range(1, 4):
        (root.parent / "tasks" / str(sleeper)).write_text(f"{beat * 7}\n")
        one.beat(NOON + 60 * beat)
    one.close()
    assert [row["tasks"] for row in rows(root.parent / "out", "samples")] == ["", "", "14", "21"]
    assert [row["tasks"] for row in rows(root.parent / "out", "rollup")] == ["21"]


@pytest.mark.parametrize("text", ["", "-1", "1e3", "1 2", "0x10", "²", "many"])
def test_what_is_no_number_of_tasks_is_an_empty_cell(tmp_path: Path, text: str) -> None:
    (tmp_path / "7").write_text(text)
    assert published(tmp_path, 7) == ""


def test_a_workers_user_can_neither_lead_the_sampler_elsewhere_nor_hold_it_up(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("4711")
    (tmp_path / "1").symlink_to("secret")
    os.mkfifo(tmp_path / "2")
    (tmp_path / "3").mkdir()
    (tmp_path / "4").write_text("9" * 5000)
    writer = os.open(tmp_path / "2", os.O_RDWR)
    assert [published(tmp_path, pid) for pid in (1, 2, 3)] == [None, "", ""]
    os.close(writer)
    assert published(tmp_path, 4) < 1 << 63


# ---- rollups ----


def test_ten_minutes_of_a_process_become_one_line(root: Path, sleeper: int) -> None:
    process = sampler.Process(sleeper, None, root)
    process.describe("main")
    rollup = sampler.Rollup()
    rollup.begin(NOON + 3)
    rollup.follow([process])
    for size in (500, 100, -1, 400, 200):
        rollup.add(array("q", [size]))
    process.tasks = 3
    assert not rollup.turned(NOON + 599)
    assert rollup.turned(NOON + 600)
    assert rollup.turned(NOON - 1)
    row = dict(zip(sampler.ROLLUP_COLUMNS.split(","), rollup.lines()[0].rstrip("\n").split(",")))
    assert (row["timestamp"], row["pid"], row["role"]) == (f"{NOON}", f"{sleeper}", "main")
    assert (row["count"], row["floor_kb"], row["median_kb"], row["max_kb"], row["tasks"]) == (
        "4",
        "100",
        "300",
        "500",
        "3",
    )
    assert rollup.lines() == []
    rollup.add(array("q", [700]))
    process.close()
    rollup.follow([])
    assert [line.split(",")[5:9] for line in rollup.lines()] == [["1", "700", "700", "700"]]
    assert rollup.lines() == rollup.ended == []


def test_a_unit_is_written_down_every_ten_minutes_as_it_was_last(root: Path, sleeper: int) -> None:
    folder = unit(root, "celery-worker@mail.service", sleeper)
    one = make(root)
    for seconds, kb in ((0, 100), (300, 200), (590, 300), (600, 400), (660, 500)):
        (folder / "memory.current").write_text(f"{kb << 10}\n")
        one.beat(NOON + seconds)
    one.close()
    found = [(float(row["timestamp"]) - NOON, row["memory_current_kb"]) for row in rows(root.parent / "out", "units")]
    assert found == [(590, "300"), (660, "500")]


def test_rollups_are_in_the_file_of_their_day_and_the_last_one_is_written_at_the_end(root: Path, sleeper: int) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    one = make(root)
    midnight = MIDNIGHT + 86400
    for now in (midnight - 20, midnight - 10, midnight + 10):
        one.beat(now)
    out = root.parent / "out"
    assert [(row["timestamp"], row["count"]) for row in rows(out, "rollup")] == [(f"{midnight - 600}", "2")]
    one.close()
    yesterday, today = sorted(out.glob("rollup-*"))
    assert yesterday.name == "rollup-20251124T000000Z.csv.gz"
    assert today.name == "rollup-20251125T000000Z.csv"
    assert [(row["timestamp"], row["count"]) for row in rows(out, "rollup")][1:] == [(f"{midnight}", "1")]


# ---- segments ----


def test_an_hour_that_is_over_is_gzipped_whole(tmp_path: Path) -> None:
    one = store(tmp_path)
    one.append("samples", NOON, line("a"))
    one.append("samples", NOON + 3599, line("b"))
    one.append("samples", NOON + 3600, line("c"))
    one.close()
    assert names(tmp_path) == ["samples-20251124T120000Z.csv.gz", "samples-20251124T130000Z.csv"]
    assert content(tmp_path / names(tmp_path)[0]) == f"{sampler.SAMPLE_COLUMNS}\n1,2,3,a\n1,2,3,b\n"
    assert commands(tmp_path) == ["a", "b", "c"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("samples*")} == {0o640}


def test_a_restart_goes_on_with_the_hour_under_one_header(tmp_path: Path) -> None:
    for text in ("a", "b"):
        one = store(tmp_path)
        one.append("samples", NOON, line(text))
        one.close()
    assert content(tmp_path / "samples-20251124T120000Z.csv") == f"{sampler.SAMPLE_COLUMNS}\n1,2,3,a\n1,2,3,b\n"


@pytest.mark.parametrize("torn", [b"1,2", b"\0" * 100_000, b""])
def test_a_line_that_a_crash_tore_is_cut_off_at_the_start(tmp_path: Path, capsys: Any, torn: bytes) -> None:
    path = tmp_path / "samples-20251124T120000Z.csv"
    path.write_bytes(f"{sampler.SAMPLE_COLUMNS}\n1,2,3,a\n".encode() + torn)
    (tmp_path / "samples-20251124T110000Z.csv.gz.tmp").write_text("half")
    one = store(tmp_path)
    one.append("samples", NOON, line("b"))
    one.close()
    assert path.read_text() == f"{sampler.SAMPLE_COLUMNS}\n1,2,3,a\n1,2,3,b\n"
    assert names(tmp_path) == [path.name]
    assert ("cut off" in capsys.readouterr().err) == bool(torn)


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "samples-20251124T120000Z.csv").write_text("timestamp,pi")
    one = store(tmp_path)
    one.append("samples", NOON, line("a"))
    one.close()
    assert commands(tmp_path) == ["a"]


def test_a_clock_set_back_overwrites_nothing(tmp_path: Path) -> None:
    one = store(tmp_path)
    # Thrice through the same second, each time after the hour was over.
    for text in ("a", "b", "c"):
        one.append("samples", NOON + 1, line(text))
        one.append("samples", NOON + 3601, line("-" + text))
    one.close()
    assert sorted(commands(tmp_path)) == ["-a", "-b", "-c", "a", "b", "c"]


def test_a_file_of_an_older_sampler_with_other_columns_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "samples-20251124T120000Z.csv"
    path.write_text("timestamp,pid,rss_kb,command\n1,2,3,old\n")
    one = store(tmp_path)
    one.append("samples", NOON + 7, line("new"))
    one.close()
    assert content(path.with_name(path.name + ".gz")) == "timestamp,pid,rss_kb,command\n1,2,3,old\n"
    assert content(tmp_path / "samples-20251124T120007Z.csv") == f"{sampler.SAMPLE_COLUMNS}\n1,2,3,new\n"


def test_a_segment_that_someone_removed_is_begun_anew(tmp_path: Path) -> None:
    one = store(tmp_path)
    one.append("samples", NOON, line("a"))
    (tmp_path / "samples-20251124T120000Z.csv").unlink()
    one.append("samples", NOON + 60, line("b"))
    one.close()
    assert commands(tmp_path) == ["b"]


def closed(folder: Path, *names: str, size: int = 1000) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x" * size)


OLD = (
    "cgroup-20251124T080000Z.csv.gz",
    "rollup-20251123T000000Z.csv.gz",
    "samples-20251124T080000Z.csv.gz",
    "samples-20251124T090000Z.csv.gz",
)


@pytest.mark.parametrize(
    ("keep", "left"),
    [(5000, OLD), (3500, (OLD[1], OLD[2], OLD[3])), (1500, (OLD[1],)), (1, ())],
)
def test_beyond_keep_the_oldest_go_and_rollups_last(tmp_path: Path, keep: int, left: tuple[str, ...]) -> None:
    closed(tmp_path, *OLD, "samples-20251124T000000Z.csv.bak")
    one = store(tmp_path, keep)
    one.append("samples", NOON, line("a"))
    one.close()
    assert names(tmp_path) == sorted([*left, "samples-20251124T000000Z.csv.bak", "samples-20251124T120000Z.csv"])


@pytest.mark.parametrize("keep", [4000, 2000])
def test_what_was_collected_goes_before_what_was_not_however_old(tmp_path: Path, keep: int) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    collected = ["samples-20251124T090000Z.csv.gz", "cgroup-20251124T100000Z.csv.gz", "rollup-20251123T000000Z.csv.gz"]
    waiting = ["samples-20251124T080000Z.csv.gz", "samples-20251124T110000Z.csv.gz"]
    closed(folder, *collected, *waiting)
    named = [f"samples/{name[:-3]}" for name in collected]
    (tmp_path / "acknowledged.json").write_text(json.dumps([*named, "trace/samples-20251124T080000Z.csv", 7]))
    one = store(folder, keep)
    one.append("samples", NOON, line("a"))
    one.close()
    left = {4000: [collected[1], collected[2], *waiting], 2000: waiting}[keep]
    assert names(folder) == sorted([*left, "samples-20251124T120000Z.csv"])


@pytest.mark.parametrize("damaged", ["", "[", "7", "{}"])
def test_a_damaged_word_of_what_was_collected_costs_nothing(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "acknowledged.json").write_text(damaged)
    assert sampler.acknowledged(tmp_path / "samples") == set()


def test_what_is_older_than_the_age_goes(tmp_path: Path) -> None:
    """By the time in its name; what has another name by its last change."""
    today = time.time()
    old, new = (f"samples-{sampler.stamp(today - days * 86400)}.csv.gz" for days in (31, 29))
    odd = "cgroup-by-hand.csv.gz"
    closed(tmp_path, old, new, odd)
    one = store(tmp_path, age=30 * 86400)
    one.append("samples", today, line("a"))
    assert names(tmp_path)[:-1] == [odd, new]
    os.utime(tmp_path / odd, (1e9, 1e9))
    one.append("cgroup", today, line("a"))
    one.close()
    assert odd not in names(tmp_path)


def test_a_clock_that_jumps_ahead_removes_nothing_for_its_age(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    today = time.time()
    old = f"samples-{sampler.stamp(today - 86400)}.csv.gz"
    closed(tmp_path, old)
    one = store(tmp_path, age=30 * 86400)
    monkeypatch.setattr(sampler.time, "time", lambda: today + 365 * 86400)
    one.append("samples", today + 365 * 86400, line("a"))
    one.close()
    assert old in names(tmp_path)
    assert "until the next start nothing is removed for its age" in capsys.readouterr().err


class Disk:
    """Lets os.write fill the folder up to `room` bytes: as on a disk, first a short write, then ENOSPC."""

    def __init__(self, folder: Path, room: int, monkeypatch: Any) -> None:
        self.folder, self.room, self.write = folder, room, os.write
        monkeypatch.setattr(sampler.os, "write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        left = self.room - sum(path.stat().st_size for path in self.folder.iterdir())
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(descriptor, data[:left])


@pytest.mark.parametrize("room", [4000, 4050])
def test_on_a_full_disk_the_oldest_segments_make_room(tmp_path: Path, monkeypatch: Any, capsys: Any, room: int) -> None:
    closed(tmp_path, *OLD)
    one = store(tmp_path)
    Disk(tmp_path, room, monkeypatch)
    one.append("samples", NOON, line("a"))
    one.append("samples", NOON + 60, line("b"))
    one.close()
    assert names(tmp_path) == [*OLD[1:], "samples-20251124T120000Z.csv"]
    assert (tmp_path / "samples-20251124T120000Z.csv").read_text() == f"{sampler.SAMPLE_COLUMNS}\n1,2,3,a\n1,2,3,b\n"
    assert f"no room; dropping the oldest segments, {OLD[0]} first" in capsys.readouterr().err


def test_with_nothing_to_drop_samples_are_lost_until_there_is_room(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    one = store(tmp_path)
    one.append("samples", NOON, line("a"))
    disk = Disk(tmp_path, (tmp_path / "samples-20251124T120000Z.csv").stat().st_size + 3, monkeypatch)
    one.append("samples", NOON + 60, line("lost"))
    one.append("samples", NOON + 120, line("lost"))
    disk.room += 1000
    one.append("samples", NOON + 180, line("b"))
    one.close()
    assert commands(tmp_path) == ["a", "b"]
    assert capsys.readouterr().err.count("samples are lost") == 1


def test_a_segment_that_cannot_be_gzipped_stays(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*anything: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one = store(tmp_path)
    one.append("samples", NOON, line("a"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        one.append("samples", NOON + 3600, line("b"))
    assert names(tmp_path) == ["samples-20251124T120000Z.csv", "samples-20251124T130000Z.csv"]
    one.append("samples", NOON + 7200, line("c"))
    one.close()
    assert [name[-7:] for name in names(tmp_path)] == [".csv.gz", ".csv.gz", "00Z.csv"]
    assert commands(tmp_path) == ["a", "b", "c"]


# ---- the program ----


ALONE = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import rss_sampler
rss_sampler.is_worker = lambda argv: False
sys.exit(rss_sampler.main())
"""
# As the program, on a machine that may have Celery workers of its own.
PROGRAM = [sys.executable, "-c", ALONE]


def command(folder: Path, *more: str) -> list[str]:
    return [*PROGRAM, f"--output={folder / 'out'}", *more]


def test_once_samples_what_matches_and_not_itself(tmp_path: Path, start: Any) -> None:
    marker = f"mark-{os.getpid()}"
    pid = start("sh", "-c", "sleep 60; :", marker).pid
    ran = subprocess.run(command(tmp_path, "--once", f"--match={marker}"), capture_output=True, text=True)
    assert ran.returncode == 0
    assert f"2 lines to {tmp_path / 'out'}; 2 processes in the last sample\n" in ran.stderr
    main, child = rows(tmp_path / "out", "samples")
    assert (main["pid"], main["role"], main["command"]) == (str(pid), "main", f"sh -c sleep 60; : {marker}")
    assert (child["role"], child["command"]) == ("child", "sleep 60")
    assert [row["count"] for row in rows(tmp_path / "out", "rollup")] == ["1", "1"]


def test_a_second_writer_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    first = store(tmp_path / "out")
    with pytest.raises(BlockingIOError):
        store(tmp_path / "out")
    ran = subprocess.run(command(tmp_path, "--once", "--match=mark"), capture_output=True, text=True)
    assert ran.returncode == 1
    assert "another sampler writes to" in ran.stderr
    assert names(tmp_path / "out") == []
    first.close()
    store(tmp_path / "out").close()


def test_sigterm_ends_the_service_between_two_beats_however_long_they_take(tmp_path: Path, start: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        marker = f"mark-{os.getpid()}"
        start("sh", "-c", "sleep 60; :", marker)
        # No beat is as short as this interval.
        service = start(
            *command(tmp_path, "--interval=0.000001", f"--match={marker}"),
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"},
            stderr=subprocess.PIPE,
        )
        assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        service.terminate()
        assert any(systemd.recv(100) == b"STOPPING=1" for _ in range(100))
    assert service.wait(10) == 0
    assert b"Traceback" not in service.stderr.read()
    (samples,) = (tmp_path / "out").glob("samples-*.csv")
    assert samples.read_text().endswith("\n")
    assert int(rows(tmp_path / "out", "rollup")[0]["count"]) >= 2


@pytest.mark.parametrize(
    "wrong",
    [
        *("--interval=0", "--interval=nan", "--interval=inf", "--detail-every=0", "--keep-mb=-1", "--keep-days=0"),
        *("--match=(", "--metrics=9253", "--metrics=host:", "--metrics=::1:99999", "--metrics=plimsoll.prom"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_written(tmp_path: Path, capsys: Any, wrong: str) -> None:
    with pytest.raises(SystemExit) as refused:
        sampler.main([f"--output={tmp_path / 'out'}", wrong])
    assert refused.value.code == 2
    assert wrong.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_output_samples_go_to_stdout_as_the_plain_script_had_them(start: Any) -> None:
    marker = f"mark-{os.getpid()}"
    pid = start("sh", "-c", "sleep 60; :", marker).pid
    ran = subprocess.run([*PROGRAM, "--once", "--plain", f"--match={marker}"], capture_output=True, text=True)
    assert ran.returncode == 0 and "2 lines to stdout; 2 processes" in ran.stderr
    (row, _) = csv.DictReader(io.StringIO(ran.stdout))
    assert list(row) == ["timestamp", "pid", "rss_kb", "command"]
    assert (row["pid"], row["command"]) == (str(pid), f"sh -c sleep 60; : {marker}") and int(row["rss_kb"]) > 0


def test_a_plain_file_is_beside_a_full_one_of_the_same_hour(root: Path, sleeper: int) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    for plain in (False, True):
        watcher = sampler.Watcher(plain=plain, root=root)
        one = sampler.Sampler(watcher, sampler.Store(root.parent / "out", MiB, 1e9, plain), 10)
        one.beat(NOON)
        one.beat(NOON + 60)
        one.close()
    full, plain_file = (content(path).splitlines() for path in sorted((root.parent / "out").glob("samples-*")))
    assert len(full) == len(plain_file) == 3
    assert plain_file[:2] == [sampler.PLAIN_COLUMNS, ",".join(full[1].split(",")[:4])]
    assert len(rows(root.parent / "out", "cgroup")) == 2


def test_whoever_reads_stdout_may_have_enough(start: Any) -> None:
    marker = f"mark-{os.getpid()}"
    start("sh", "-c", "sleep 60; :", marker)
    service = start(
        *(*PROGRAM, "--interval=0.01", f"--match={marker}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert service.stdout.readline().startswith(b"timestamp,")
    service.stdout.close()
    assert service.wait(10) == 0
    assert service.stderr.read() == b""


def test_on_a_terminal_it_says_how_it_goes_and_ctrl_c_ends_it(tmp_path: Path, start: Any) -> None:
    marker = f"mark-{os.getpid()}"
    start("sh", "-c", "sleep 60; :", marker)
    ours, theirs = os.openpty()
    service = start(*command(tmp_path, "--interval=0.2", f"--match={marker}"), stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while b"sample 2: 2 processes, " not in said:
        said += os.read(ours, 1000)
    service.send_signal(signal.SIGINT)
    assert service.wait(10) == 0
    # A terminal whose other end is closed reads as an error.
    with contextlib.suppress(OSError):
        while more := os.read(ours, 1000):
            said += more
    os.close(ours)
    found = rows(tmp_path / "out", "samples")
    assert f"\nrss_sampler: {len(found)} lines to {tmp_path / 'out'}; 2 processes".encode() in said.replace(b"\r", b"")
    assert len(rows(tmp_path / "out", "rollup")) == 2


def test_none_found_is_said_with_the_way_out(tmp_path: Path) -> None:
    ran = subprocess.run(command(tmp_path, "--once", "--match=^$none"), capture_output=True, text=True)
    assert ran.returncode == 0
    assert "0 processes in the last sample: no unit celery-worker@*.service and no command line" in ran.stderr


def test_too_few_files_are_said_and_the_rest_is_watched(root: Path, start: Any, capsys: Any) -> None:
    unit(root, "celery-worker@mail.service", *(start("sleep", "60").pid for _ in range(8)))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (sampler.FILES_KEPT_FREE + 10, before[1]))
    try:
        one = make(root)
        assert [one.beat(NOON), one.beat(NOON + 60)] == [5, 5]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    one.close()
    assert capsys.readouterr().err.count("no more than 5 of 8 processes are watched; raise LimitNOFILE=") == 1


def test_no_more_are_watched_than_fit_into_its_memory(root: Path, start: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sampler, "MOST_PROCESSES", 3)
    unit(root, "celery-worker@mail.service", *(start("sleep", "60").pid for _ in range(5)))
    one = make(root)
    assert one.beat(NOON) == 3
    one.close()
    assert "no more than 3 of 5 processes are watched\n" in capsys.readouterr().err


# ---- the journal ----


def test_the_journal_gets_fields_and_all_else_a_line(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    sent: list[bytes] = []

    class Journal(socket.socket):
        def sendto(self, data: bytes, address: str) -> int:  # type: ignore[override]
            assert address == "/run/systemd/journal/socket"
            sent.append(data)
            return len(data)

    monkeypatch.setattr(sampler.socket, "socket", Journal)
    sampler.say("a\nword", "full", 4, path=tmp_path)
    assert sent == [] and capsys.readouterr().err == "rss_sampler: a\nword\n"
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    sampler.say("a\nword", "full", 4, path=tmp_path)
    assert sent[0].decode().splitlines() == [
        "MESSAGE=a word",
        "PRIORITY=4",
        "SYSLOG_IDENTIFIER=rss_sampler",
        "PLIMSOLL_EVENT=full",
        f"PLIMSOLL_PATH={tmp_path}",
    ]
    assert capsys.readouterr().err == ""


# ---- metrics ----


def scrape(text: str) -> dict[str, float]:
    return {one.rpartition(" ")[0]: float(one.rpartition(" ")[2]) for one in text.splitlines() if one[:1] not in "#"}


def test_the_last_sample_is_in_a_file_for_node_exporter(root: Path, start: Any, tmp_path: Path) -> None:
    here = unit(root, "celery.slice/celery-worker@mail.service", *(start("sleep", "60").pid for _ in range(2)))
    for name, text in CGROUP_FILES.items():
        (here / name).write_text(text)
    marker = f"mark-{os.getpid()}"
    shell = psutil.Process(start("sh", "-c", "sleep 60; :", marker).pid)
    # Which is counted with what it starts.
    while not shell.children():
        time.sleep(0.001)
    metrics = tmp_path / "plimsoll.prom"
    one = make(root, match=marker)
    one.metrics = sampler.Metrics(str(metrics))
    one.beat(NOON)
    for process in one.watcher.known.values():
        process.floors.extend([(600.0 * n, 1000 + 64 * n) for n in range(7)] if process.unit else [])
    one.beat(NOON + 60)
    one.close()
    found = scrape(metrics.read_text())
    mail = 'unit="celery-worker@mail.service"'
    taken = [
        row for row in rows(root.parent / "out", "samples") if row["timestamp"] == f"{NOON + 60}.000" and row["unit"]
    ]
    resident = f'plimsoll_worker_resident_memory_bytes{{role="main",{mail}}}'
    assert found[resident] == sum(int(row["rss_kb"]) for row in taken if "mail" in row["unit"]) * 1024
    # 64 KiB in ten minutes, each of two.
    assert found[f'plimsoll_worker_growth_bytes_per_hour{{role="main",{mail}}}'] == 2 * 6 * 64 * 1024
    assert found[f'plimsoll_worker_processes{{role="main",{mail}}}'] == 2
    assert found[f'plimsoll_worker_swap_bytes{{role="main",{mail}}}'] == 0
    assert found[f'plimsoll_worker_proportional_memory_bytes{{role="main",{mail}}}'] > 0
    assert found[f"plimsoll_worker_memory_high_bytes{{{mail}}}"] == 209715200
    assert f"plimsoll_worker_memory_max_bytes{{{mail}}}" not in found
    assert found[f'plimsoll_worker_memory_events_total{{event="oom_kill",{mail}}}'] == 1
    assert found[f'plimsoll_worker_memory_pressure_seconds_total{{kind="some",{mail}}}'] == 0.001234
    assert found[f"plimsoll_worker_restarts_total{{{mail}}}"] == 3
    assert found["plimsoll_sampler_last_sample_timestamp_seconds"] == NOON + 60
    # A shell of this test is in no service, or in one of this machine's that is no worker.
    assert sum(value for name, value in found.items() if name.startswith("plimsoll_worker_processes")) == 4
    assert not any("pid" in name for name in found)


def test_metrics_are_there_though_a_process_ended_and_growth_waits_for_an_hour(
    root: Path, start: Any, sleeper: int, tmp_path: Path
) -> None:
    other = start("sleep", "60")
    unit(root, "celery-worker@mail.service", sleeper, other.pid)
    metrics = tmp_path / "plimsoll.prom"
    one = make(root)
    one.metrics = sampler.Metrics(str(metrics))
    one.beat(NOON)
    other.kill()
    other.wait()
    one.beat(NOON + 60)
    processes = 'plimsoll_worker_processes{role="main",unit="celery-worker@mail.service"}'
    assert scrape(metrics.read_text())[processes] == 1
    (process,) = one.watcher.known.values()
    for span in range(1, 9):
        # Growth from 1 MiB as it starts to 100, and then none.
        process.sizes.append(1024 if span == 1 else 102400)
        one.rollup.lines()
        assert sampler.growth(process) == 0
    assert len(process.floors) == 7
    one.close()


def test_without_pss_there_is_no_series_of_it(root: Path, sleeper: int, tmp_path: Path) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    metrics = tmp_path / "plimsoll.prom"
    one = make(root, pss=False)
    one.metrics = sampler.Metrics(str(metrics), pss=False)
    one.beat(NOON)
    one.close()
    found = scrape(metrics.read_text())
    assert not any("proportional" in name for name in found) and any("resident" in name for name in found)


def test_a_process_that_came_after_the_detail_has_its_pss_in_the_metrics(
    root: Path, start: Any, sleeper: int, tmp_path: Path
) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    metrics = tmp_path / "plimsoll.prom"
    one = make(root)
    one.metrics = sampler.Metrics(str(metrics))
    one.beat(NOON)
    name = 'plimsoll_worker_proportional_memory_bytes{role="main",unit="celery-worker@mail.service"}'
    first = scrape(metrics.read_text())[name]
    unit(root, "celery-worker@mail.service", sleeper, start("sleep", "60").pid)
    one.beat(NOON + 60)
    one.close()
    assert scrape(metrics.read_text())[name] > first > 0


@pytest.mark.parametrize(
    ("argv", "info"),
    [
        (["python", "celery", "--app=shop", "worker"], ("prefork", "", "")),
        (["celery", "worker", "-Qgate", "-c4", "-Pgevent"], ("gevent", "gate", "4")),
        (
            ["celery", "worker", "-Q", "a'}\x1b[31m<!channel>\u202e,b", "--quiet"],
            ("prefork", "a????31m??channel??,b", ""),
        ),
        (["celery", "worker", "-Q", "mail,gate", "-P", "threads", "-c", "8"], ("threads", "gate,mail", "8")),
        # Of one option the last, as remediate.yml counts on.
        (["celery", "worker", "--queues=a", "--concurrency=2", "--queues=b"], ("prefork", "b", "2")),
        (["[celeryd: sales@w-1:MainProcess] -active- (worker --pool=solo --queues=sales)"], ("solo", "sales", "")),
        (["celery", "worker", "--queues"], ("prefork", "", "")),
        (
            ["celery", "worker", "--queues=" + "q" * 90 + "," + "r" * 90 + "," + "s" * 90],
            ("prefork", f"{'q' * 90},{'r' * 90}", ""),
        ),
        ([], ("prefork", "", "")),
    ],
)
def test_a_worker_is_described_by_what_it_was_started_with(argv: list[str], info: tuple[str, ...]) -> None:
    assert sampler.started_with(argv) == info


def test_the_metrics_say_what_a_worker_consumes_and_how_much_it_did(root: Path, start: Any, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    words = ("celery", "worker", "--queues=mail,gate", "--concurrency=2")
    main = start(sys.executable, "-c", "import time; time.sleep(60)", *words).pid
    other = start("sleep", "60")
    unit(root, "celery-worker@mail.service", main, other.pid)
    (tmp_path / "tasks" / str(main)).write_text("5\n")
    (tmp_path / "tasks" / str(other.pid)).write_text("7\n")
    metrics = tmp_path / "plimsoll.prom"
    one = make(root, detail_every=1)
    one.metrics = sampler.Metrics(str(metrics))
    done = 'plimsoll_worker_tasks_total{unit="celery-worker@mail.service"}'
    one.beat(NOON)
    found = scrape(metrics.read_text())
    labels = 'concurrency="2",pool="prefork",queues="gate,mail",unit="celery-worker@mail.service"'
    # What was done before it was watched, is none of what it counts.
    assert found[f"plimsoll_worker_info{{{labels}}}"] == 1 and found[done] == 0
    (tmp_path / "tasks" / str(main)).write_text("9\n")
    one.beat(NOON + 60)
    assert scrape(metrics.read_text())[done] == 4
    # What one that ended has done, stays done.
    other.kill()
    other.wait()
    one.beat(NOON + 120)
    (tmp_path / "tasks" / str(main)).write_text("10\n")
    one.beat(NOON + 180)
    assert scrape(metrics.read_text())[done] == 5
    # Another that begins has done all of it since.
    new = start("sleep", "60").pid
    (tmp_path / "tasks" / str(new)).write_text("3\n")
    unit(root, "celery-worker@mail.service", main, new)
    one.watcher.find(again=True)
    one.beat(NOON + 240)
    assert scrape(metrics.read_text())[done] == 8
    one.close()


def test_a_unit_that_systemd_has_given_up_is_seen_though_it_has_no_cgroup(
    root: Path, sleeper: int, tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[list[str]] = []
    gone = {"celery-worker@gone.service": {"NRestarts": "9", "ActiveState": "failed"}}
    monkeypatch.setattr(sampler, "show", lambda properties, units: asked.append([*units]) or gone)
    unit(root, "celery-worker@mail.service", sleeper)
    metrics = tmp_path / "plimsoll.prom"
    one = make(root)
    one.metrics = sampler.Metrics(str(metrics))
    one.beat(NOON)
    one.beat(NOON + 2)
    one.close()
    found = scrape(metrics.read_text())
    assert found['plimsoll_worker_failed{unit="celery-worker@gone.service"}'] == 1
    assert found['plimsoll_worker_restarts_total{unit="celery-worker@gone.service"}'] == 9
    # systemctl costs more than a sample.
    assert asked == [["celery-worker@*.service"]]


def test_page_cache_is_no_part_of_the_level(root: Path, sleeper: int, tmp_path: Path) -> None:
    here = unit(root, "celery-worker@mail.service", sleeper)
    for name, text in CGROUP_FILES.items():
        (here / name).write_text(text)
    (here / "memory.current").write_text(f"{100 << 20}\n")
    (here / "memory.stat").write_text(
        f"anon 1\ninactive_file {30 << 20}\nactive_file {9 << 20}\nslab_reclaimable {1 << 20}\n"
    )
    metrics = tmp_path / "plimsoll.prom"
    one = make(root)
    one.metrics = sampler.Metrics(str(metrics))
    one.beat(NOON)
    one.close()
    found = scrape(metrics.read_text())
    assert found['plimsoll_worker_memory_level_bytes{unit="celery-worker@mail.service"}'] == 60 << 20


def test_the_acts_of_the_guard_are_in_the_metrics_whatever_its_file_holds(
    root: Path, sleeper: int, tmp_path: Path, monkeypatch: Any
) -> None:
    counts = tmp_path / "acts.json"
    monkeypatch.setattr(sampler, "GUARD_ACTS", counts)
    mail = "celery-worker@mail.service"
    unit(root, mail, sleeper)
    metrics = tmp_path / "plimsoll.prom"
    one = make(root)
    one.metrics = sampler.Metrics(str(metrics))

    def acts(beat: int) -> dict[str, float]:
        one.beat(NOON + 60 * beat)
        return {name: value for name, value in scrape(metrics.read_text()).items() if "guard" in name}

    assert acts(0) == {}
    counts.write_text(
        json.dumps({mail: {"restart": 2, "budget_spent": 0}, "celery-worker@gone.service": {"restart": 1}})
    )
    of_mail = 'plimsoll_guard_acts_total{{act="{}",unit="celery-worker@mail.service"}}'
    assert acts(1) == {of_mail.format("restart"): 2, of_mail.format("budget_spent"): 0}
    for beat, text in enumerate(('{"' + mail + '": 3}', "[1]", "", '{"a": {"b": "c"}}', "\0"), 2):
        counts.write_text(text)
        assert acts(beat) == {}
    counts.unlink()
    assert acts(9) == {}
    one.close()


def test_the_number_of_series_is_bounded(root: Path, sleeper: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sampler, "MOST_UNITS", 3)
    states = {f"celery-worker@w{number}.service": {"NRestarts": "0"} for number in range(5)}
    monkeypatch.setattr(sampler, "show", lambda properties, units: states)
    for number in range(5):
        unit(root, f"celery-worker@w{number}.service", *([sleeper] if number == 4 else []))
    metrics = tmp_path / "plimsoll.prom"
    one = make(root)
    one.metrics = sampler.Metrics(str(metrics))
    one.beat(NOON)
    one.close()
    found = scrape(metrics.read_text())
    assert found['plimsoll_worker_processes{role="main",unit=""}'] == 1
    assert {name for name in found if "restarts" in name} == {
        f'plimsoll_worker_restarts_total{{unit="celery-worker@w{number}.service"}}' for number in range(3)
    }


def test_openmetrics_are_served_on_an_address(root: Path, sleeper: int) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one = make(root)
    one.metrics = sampler.Metrics(f"127.0.0.1:{port}")
    one.beat(NOON)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    one.close()
    assert text.endswith("# EOF\n")
    assert scrape(text)['plimsoll_worker_processes{role="main",unit="celery-worker@mail.service"}'] == 1
    with pytest.raises(OSError, match="in use"):
        sampler.Metrics(f"127.0.0.1:{port}")


def test_no_name_server_is_asked_for_the_address(monkeypatch: Any) -> None:
    """There may be none, and the unit may not reach it: seconds or minutes of a start."""

    def asked(*_: Any) -> Any:
        raise AssertionError("a name server is asked")

    for name in ("getfqdn", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, asked)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sampler.Metrics(f"127.0.0.1:{port}")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.status == 200


def test_whoever_sends_a_byte_now_and_then_holds_up_one_scrape_for_seconds(monkeypatch: Any) -> None:
    monkeypatch.setattr(sampler, "SCRAPE_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sampler.Metrics(f"127.0.0.1:{port}")
    slow, over = socket.create_connection(("127.0.0.1", port)), threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.5):
                slow.send(b"G")

    dripping = threading.Thread(target=drip)
    dripping.start()
    began = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.status == 200 and time.monotonic() - began < 6
    over.set()
    dripping.join()
    slow.close()


def test_whoever_connects_and_waits_holds_up_one_scrape_for_seconds(root: Path, monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = threading.active_count()
    sampler.Metrics(f"127.0.0.1:{port}")
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    began = time.monotonic()
    idle[1].close()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.status == 200
    assert 4 < time.monotonic() - began < 12
    # Of none that waits is one left, nor of what bounds a request.
    while threading.active_count() > threads + 1:
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    idle[0].close()


def test_metrics_that_cannot_be_written_are_said_once_and_samples_go_on(
    root: Path, sleeper: int, tmp_path: Path, capsys: Any
) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    one = make(root)
    one.metrics = sampler.Metrics(str(tmp_path / "none" / "plimsoll.prom"))
    assert [one.beat(NOON), one.beat(NOON + 60)] == [1, 1]
    one.close()
    assert capsys.readouterr().err.count("metrics are not written") == 1


# ---- cgroups as they were recorded ----

RECORDED = {
    "cgroup_v1": ["23764", "", "65536", "0", "", "37", "1", "", ""],
    "cgroup_v2": ["75604", "286720", "327680", "22076", "0", "0", "0", "0", "0"],
}


@pytest.mark.parametrize("version", RECORDED)
def test_the_figures_of_a_recorded_cgroup(root: Path, sleeper: int, version: str) -> None:
    """See tests/unit/cgroups/record.py for what they are of. Its processes are long gone; one of ours is there."""
    (root / "cgroup.controllers").unlink()
    for name, text in json.loads((ROOT / f"tests/unit/cgroups/{version}.json").read_text()).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{sleeper}\n" if name.endswith("cgroup.procs") else text)
    one = make(root)
    assert one.beat(NOON) == 1
    one.close()
    (row,) = rows(root.parent / "out", "cgroup")
    assert (row["unit"], row["n_restarts"]) == ("celery-worker@gate.service", "3")
    assert [row[name] for name in sampler.CGROUP_COLUMNS.split(",")[2:-1]] == RECORDED[version]
    assert rows(root.parent / "out", "samples")[0]["unit"] == "celery-worker@gate.service"
