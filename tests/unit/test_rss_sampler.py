"""The sampler on processes that the test starts, in cgroup directories that it makes up."""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, load_file

SCRIPT = ROOT / "roles/rss_sampler/files/rss_sampler.py"
sampler = load_file(SCRIPT, "rss_sampler")

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
    """Nothing was said yet, and no systemd of this machine is asked."""
    monkeypatch.setattr(sampler, "_said", set())
    monkeypatch.setattr(sampler, "restarts_of", lambda units: dict.fromkeys(units, "3"))


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
    return start("sleep", "60").pid


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


def make(root: Path, *, match: str | None = None, detail_every: int = 10, keep: int = MiB) -> Any:
    """A sampler of what is in root, which writes to root's sibling `out`."""
    watcher = sampler.Watcher(match, root, root.parent / "tasks")
    return sampler.Sampler(watcher, sampler.Store(root.parent / "out", keep), detail_every)


def content(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()


def rows(folder: Path, kind: str) -> list[dict[str, str]]:
    """All lines of one kind, in the order of the names."""
    texts = (content(path) for path in sorted(folder.glob(f"{kind}-*")))
    return [row for text in texts for row in csv.DictReader(io.StringIO(text))]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def store(folder: Path, keep: int = MiB) -> Any:
    return sampler.Store(folder, keep)


def line(text: str) -> list[list[str]]:
    """One row, recognised by its command."""
    return [["1", "2", "3", text]]


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
    assert [(row["pss_kb"] != "", row["uss_kb"] != "") for row in others] == [(False, False), (True, True)]


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
    assert sampler.Watched(pid, 0, "").command == f"sh -c sleep 60; : {written}"


def test_a_command_line_of_any_bytes_is_one_line_of_utf_8(root: Path, start: Any) -> None:
    unit(root, "celery-worker@mail.service", start("sh", "-c", "sleep 60; :", b'\xff,"\n' + b"x" * 300).pid)
    one = make(root)
    one.beat(NOON)
    one.close()
    (command,) = commands(root.parent / "out")
    assert command.startswith('sh -c sleep 60; : ?," xxx')
    assert len(command) == sampler.COMMAND_LENGTH


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
    processes = one.watcher.find(sampler.find_units(root), again=False)
    killed = next(process for process in processes if process.pid == sleeper)
    os.kill(sleeper, signal.SIGKILL)
    assert ended(sleeper)
    assert list(one.watcher.sample(NOON, processes, detail=True)) == []
    os.waitpid(sleeper, 0)
    assert (killed.detail(), killed.fds()) == (("", ""), "")
    assert one.beat(NOON + 60) == 0
    one.close()


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


def test_a_reused_pid_is_a_new_generation(root: Path, sleeper: int, monkeypatch: Any) -> None:
    unit(root, "celery-worker@mail.service", sleeper)
    one = make(root)
    one.beat(NOON)
    one.beat(NOON + 60)
    ticks = sampler.ticks_of(sleeper)
    monkeypatch.setattr(sampler, "ticks_of", lambda pid: ticks + 100 * sampler.CLOCK_TICKS)
    one.beat(NOON + 120)
    one.close()
    first, second, third = (float(row["start_time"]) for row in rows(root.parent / "out", "samples"))
    assert (second - first, round(third - second)) == (0, 100)
    assert [row["count"] for row in rows(root.parent / "out", "rollup")] == ["2", "1"]


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


def test_tasks_are_what_the_process_published(tmp_path: Path) -> None:
    (tmp_path / "7").write_text("12\n")
    assert sampler.tasks_of(tmp_path, 7, time.time() - 5) == 12
    assert sampler.tasks_of(tmp_path, 8, 0) == ""
    # The process is younger than the file: another of the same pid left it behind.
    assert sampler.tasks_of(tmp_path, 7, time.time() + 5) == ""


@pytest.mark.parametrize("text", ["", "-1", "1e3", "1 2", "0x10", "²", "many"])
def test_what_is_no_number_of_tasks_is_an_empty_cell(tmp_path: Path, text: str) -> None:
    (tmp_path / "7").write_text(text)
    assert sampler.tasks_of(tmp_path, 7, 0) == ""


def test_a_workers_user_can_neither_lead_the_sampler_elsewhere_nor_hold_it_up(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("4711")
    (tmp_path / "1").symlink_to("secret")
    os.mkfifo(tmp_path / "2")
    (tmp_path / "3").mkdir()
    (tmp_path / "4").write_text("9" * 5000)
    writer = os.open(tmp_path / "2", os.O_RDWR)
    assert [sampler.tasks_of(tmp_path, pid, 0) for pid in (1, 2, 3)] == ["", "", ""]
    os.close(writer)
    assert sampler.tasks_of(tmp_path, 4, 0) < 1 << 63


# ---- rollups ----


def test_ten_minutes_of_a_process_become_one_line(root: Path, sleeper: int) -> None:
    process = sampler.Watched(sleeper, 0, "celery-worker@mail.service")
    rollup = sampler.Rollup()
    for second, size in enumerate((500, 100, 400, 200)):
        rollup.add(NOON + second, process, "main", size, second)
    assert not rollup.turned(NOON + 599)
    assert rollup.turned(NOON + 600)
    assert rollup.turned(NOON - 1)
    row = dict(zip(sampler.ROLLUP_COLUMNS.split(","), rollup.rows()[0]))
    assert (row["timestamp"], row["pid"], row["unit"], row["role"]) == (NOON, sleeper, process.unit, "main")
    assert (row["count"], row["floor_kb"], row["median_kb"], row["max_kb"], row["tasks"]) == (4, 100, 300, 500, 3)
    assert rollup.rows() == []


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


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), f"--output={folder / 'out'}", *more]


def test_once_samples_what_matches_and_not_itself(tmp_path: Path, start: Any) -> None:
    marker = f"mark-{os.getpid()}"
    pid = start("sh", "-c", "sleep 60; :", marker).pid
    ran = subprocess.run(command(tmp_path, "--once", f"--match={marker}"), capture_output=True, text=True)
    assert ran.returncode == 0
    assert f"1 processes sampled into {tmp_path / 'out'}" in ran.stderr
    (row,) = rows(tmp_path / "out", "samples")
    assert (row["pid"], row["role"], row["command"]) == (str(pid), "main", f"sh -c sleep 60; : {marker}")
    assert [row["count"] for row in rows(tmp_path / "out", "rollup")] == ["1"]


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
    "wrong", ["--interval=0", "--interval=nan", "--interval=inf", "--detail-every=0", "--keep-mb=-1", "--match=("]
)
def test_a_wrong_option_is_named_before_anything_is_written(tmp_path: Path, capsys: Any, wrong: str) -> None:
    with pytest.raises(SystemExit) as refused:
        sampler.main([f"--output={tmp_path / 'out'}", wrong])
    assert refused.value.code == 2
    assert wrong.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
