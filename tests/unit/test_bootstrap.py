"""What runs inside the user's workers: it attributes, traces within bounds, and never makes a task fail."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.trace import build_tracer
from conftest import ROOT, load_file

MODULE = ROOT / "roles/tracemalloc_bootstrap/files/plimsoll_bootstrap.py"
DROPIN = ROOT / "templates/tracemalloc_bootstrap/50-plimsoll-trace.conf.j2"
MB = 1024

plimsoll_bootstrap = load_file(MODULE, "plimsoll_bootstrap")
Bootstrap, Process, Records = plimsoll_bootstrap.Bootstrap, plimsoll_bootstrap.Process, plimsoll_bootstrap.Records
Settings, Shares, TraceLock = plimsoll_bootstrap.Settings, plimsoll_bootstrap.Shares, plimsoll_bootstrap.TraceLock
RUN_S = plimsoll_bootstrap.RUN_S


@pytest.fixture(autouse=True)
def complaints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test hears its own."""
    monkeypatch.setattr(plimsoll_bootstrap, "_complained", set())


# ---- the environment ----


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PLIMSOLL_TRACE_MODE", "on"),
        ("PLIMSOLL_TRACE_DIR", ""),
        ("PLIMSOLL_TRACE_ARM_KB", "50M"),
        ("PLIMSOLL_TRACE_WINDOW_S", "inf"),
        ("PLIMSOLL_TRACE_WINDOW_S", "nan"),
        ("PLIMSOLL_TRACE_COOLDOWN_S", "-1"),
        ("PLIMSOLL_TRACE_FRAMES", "many"),
        ("PLIMSOLL_TRACE_TOP", "ten"),
    ],
)
def test_a_wrong_setting_is_named(variable: str, value: str) -> None:
    environ = {"PLIMSOLL_TRACE_MODE": "armed", "PLIMSOLL_TRACE_DIR": "/x", variable: value}
    with pytest.raises(ValueError, match=variable):
        Settings(environ)


def test_what_is_not_set_has_a_default_and_off_asks_for_nothing() -> None:
    settings = Settings({"PLIMSOLL_TRACE_MODE": "armed", "PLIMSOLL_TRACE_DIR": "/x", "PLIMSOLL_TRACE_TOP": ""})
    assert (settings.arm_kb, settings.window_s, settings.cooldown_s) == (51200, 60, 3600)
    assert (settings.frames, settings.top, settings.unit, settings.tasks_directory) == (1, 10, "celery", None)
    assert Settings({"PLIMSOLL_TRACE_TOP": "ten"}).mode == "off"


def test_the_drop_in_sets_what_is_documented_here() -> None:
    documented = set(re.findall(r"^(PLIMSOLL_\w+) ", plimsoll_bootstrap.__doc__, re.MULTILINE))
    assert documented == set(re.findall(r"^Environment=(PLIMSOLL_\w+)=", DROPIN.read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("environ", "said"),
    [({}, ""), ({"PLIMSOLL_TRACE_MODE": "False"}, "switched off: ValueError: PLIMSOLL_TRACE_MODE is 'False'")],
)
def test_an_import_without_a_valid_environment_does_nothing(environ: dict[str, str], said: str) -> None:
    program = (
        "import sys, threading, tracemalloc, plimsoll_bootstrap as it\n"
        "assert it.bootstrap.settings is None and it.bootstrap.process is None\n"
        "assert 'celery' not in sys.modules and threading.active_count() == 1 and not tracemalloc.is_tracing()"
    )
    ran = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=MODULE.parent, env=environ, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "")
    assert said in ran.stderr and ran.stderr.count("\n") == bool(said)


# ---- who grew ----


def test_growth_is_that_of_the_task_until_the_next_one_starts() -> None:
    shares = Shares(100)
    shares.start("a", 105)  # before any task: nobody's
    shares.end("a", 150)
    shares.start("b", 130)  # freed after a
    shares.end("b", 131)
    assert shares.growth == {"a": 25, "b": 1}
    assert shares.count == {"a": 1, "b": 1}


def test_tasks_that_overlap_share_evenly() -> None:
    shares = Shares(0)
    shares.start("a", 0)
    shares.start("b", 10)  # a alone
    shares.start("a", 30)  # a and b
    shares.end("b", 60)  # a twice and b
    shares.end("a", 70)  # a twice
    shares.end("a", 75)
    assert shares.growth == {"a": 10 + 10 + 20 + 10 + 5, "b": 10 + 10}
    assert shares.count == {"a": 2, "b": 1} and not shares.running


def test_what_is_gained_in_a_rest_is_nobodys_and_its_tasks_are_counted() -> None:
    shares = Shares(0)
    shares.start("a", 0)
    shares.end("a", 10)
    shares.start("a", 12)
    shares.rest(13)
    shares.end("a")
    shares.start("b")
    shares.resume(500)
    shares.end("b", 507)
    assert shares.growth == {"a": 13, "b": 7}
    assert (shares.count, shares.measured) == ({"a": 2, "b": 1}, {"a": 1, "b": 1})


def test_an_end_without_a_start_counts_and_does_not_fail() -> None:
    shares = Shares(0)
    shares.end("a", 10)
    shares.end("a", 30)
    assert shares.count == {"a": 2} and not shares.running


# ---- records ----


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_carries_time_unit_and_pid(tmp_path: Path) -> None:
    records = Records(tmp_path, "u.service")
    records.write([{"kind": "growth", "file": "caf\udce9\n.py"}, {"kind": "window_close"}])
    records.write({"kind": "task_growth", "task": name} for name in "ab")
    found = lines(tmp_path / f"u.service-{os.getpid()}.jsonl")
    assert [record["kind"] for record in found] == ["growth", "window_close", "task_growth", "task_growth"]
    assert {(record["unit"], record["pid"]) for record in found} == {("u.service", os.getpid())}
    assert abs(found[0]["time"] - time.time()) < 60


def test_a_file_that_is_large_makes_room_for_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plimsoll_bootstrap, "MAX_FILE_BYTES", 300)
    records = Records(tmp_path, "u")
    for number in range(20):
        records.write([{"kind": "growth", "number": number}])
    assert {path.name for path in tmp_path.iterdir()} <= {f"u-{os.getpid()}.jsonl", f"u-{os.getpid()}.1.jsonl"}
    assert all(path.stat().st_size < 400 for path in tmp_path.iterdir())
    assert lines(tmp_path / f"u-{os.getpid()}.1.jsonl")[-1]["number"] >= 15


def test_old_files_of_this_unit_alone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["u-1.jsonl", "u-2.1.jsonl", "u-3.jsonl", "u-4.jsonl", "u-x-1.jsonl", "u-notes.jsonl", ".u.lock"]
    for age, name in enumerate(names):
        (tmp_path / name).write_text("x" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))

    def left() -> list[str]:
        return sorted({path.name for path in tmp_path.iterdir()} & set(names[:4]))

    monkeypatch.setattr(plimsoll_bootstrap, "MAX_UNIT_FILES", 3)
    Records(tmp_path, "u")
    assert left() == ["u-1.jsonl", "u-2.1.jsonl", "u-3.jsonl"]
    monkeypatch.setattr(plimsoll_bootstrap, "MAX_UNIT_BYTES", 250)
    Records(tmp_path, "u")
    assert left() == ["u-1.jsonl", "u-2.1.jsonl"]
    assert {path.name for path in tmp_path.iterdir()} >= set(names[4:])


def test_a_full_disk_loses_whole_records_and_is_said_once(tmp_path: Path, capfd: Any) -> None:
    records = Records(tmp_path, "u")
    records.write([{"kind": "first"}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The kernel writes as far as the limit and fails after it, as it does on a disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (records.path.stat().st_size + 20, before[1]))
        records.write([{"kind": "second"}])
        records.write([{"kind": "third"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    records.write([{"kind": "fourth"}])
    assert [record["kind"] for record in lines(records.path)] == ["first", "fourth"]
    assert capfd.readouterr().err.count("records are lost: ") == 1


def test_a_folder_that_is_not_there_is_said_once(tmp_path: Path, capfd: Any) -> None:
    records = Records(tmp_path / "none", "u")
    records.write([{"kind": "growth"}])
    records.write([{"kind": "growth"}])
    assert capfd.readouterr().err.count("records are lost: ") == 1


# ---- one window at a time ----


def test_one_has_the_lock_and_then_nobody_until_the_cooldown_is_over(tmp_path: Path) -> None:
    one, other = TraceLock(tmp_path / "lock"), TraceLock(tmp_path / "lock")
    assert one.acquire(60)
    assert not other.acquire(0)
    one.release()
    one.release()
    assert not other.acquire(60)
    assert other.acquire(0)


def test_a_process_that_is_killed_in_its_window_starts_the_cooldown_too(tmp_path: Path) -> None:
    one, other = TraceLock(tmp_path / "lock"), TraceLock(tmp_path / "lock")
    assert one.acquire(60)
    os.close(one.descriptor)  # as the kernel does
    assert not other.acquire(60)
    assert other.acquire(0)


@pytest.mark.parametrize("content", ["", "nonsense", "9999999999"])
def test_a_damaged_lock_or_a_clock_set_back_does_not_shut_tracing_off(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    assert TraceLock(tmp_path / "lock").acquire(60)


def test_a_lock_that_cannot_be_had_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="No space"):
        TraceLock(tmp_path / "lock").acquire(60)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ---- which line ----

SOURCE = """\
import functools


@functools.cache
def outer(
    size,
):
    def inner():
        return [
            bytes(size)
        ]
    return inner


class Shop:
    KEPT = []

    async def sell(self):
        self.KEPT.append(lambda: 1)
"""


@pytest.mark.parametrize(
    ("line", "name"), [(1, ""), (6, "outer"), (10, "outer.inner"), (12, "outer"), (16, ""), (19, "Shop.sell"), (99, "")]
)
def test_a_line_is_in_its_innermost_function(tmp_path: Path, line: int, name: str) -> None:
    (tmp_path / "shop.py").write_text(SOURCE)
    assert plimsoll_bootstrap.function_at(str(tmp_path / "shop.py"), line) == name


@pytest.mark.parametrize("content", [None, b"def f(:\n", b"\0", b"\xff\xfe", b"def f(): 1\n" + b"#" * 600_000])
def test_a_source_that_cannot_be_read_has_no_functions(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "shop.py").write_bytes(content)
    assert plimsoll_bootstrap.function_at(str(tmp_path / "shop.py"), 1) == ""


def keep(kept: list[bytes], size: int) -> None:
    kept.append(os.urandom(size))  # grows


def line_of(mark: str) -> int:
    return next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if mark in text)


@pytest.fixture
def tracing() -> Iterator[Callable[[int], None]]:
    yield tracemalloc.start
    tracemalloc.stop()


@pytest.mark.parametrize("frames", [1, 5])
def test_the_line_that_grew_most_comes_first(tracing: Callable[[int], None], frames: int) -> None:
    kept: list[bytes] = []
    tracing(frames)
    keep(kept, 100_000)
    first = tracemalloc.take_snapshot()
    for _ in range(10):
        keep(kept, 20_000)
    small = [os.urandom(5_000) for _ in range(2)]
    freed = keep.__name__ * 2
    second = tracemalloc.take_snapshot()
    found = plimsoll_bootstrap.sites(first, second, 1)
    assert len(found) == 1 and small and freed
    callers = found[0].pop("callers", [])
    assert found[0] == {
        "file": __file__,
        "line": line_of("# grows"),
        "function": "keep",
        # The list's own block is held by the line too, and with callers those of its ways there.
        "size_kb": pytest.approx(300_000 / 1024, rel=0.01),
        "count": pytest.approx(11, abs=1),
        "growth_kb": pytest.approx(200_000 / 1024, rel=0.01),
    }
    assert callers[:1] == ([f"{__file__}:{line_of('keep(kept, 20_000)')}"] if frames > 1 else [])


def test_what_shrank_or_is_of_the_tracing_is_no_site(tracing: Callable[[int], None]) -> None:
    tracing(1)
    kept: list[bytes] = []
    keep(kept, 100_000)
    first = tracemalloc.take_snapshot()
    kept.clear()
    second = tracemalloc.take_snapshot()
    found = plimsoll_bootstrap.sites(first, second, 100)
    assert line_of("# grows") not in [one["line"] for one in found if one["file"] == __file__]
    assert not {one["file"] for one in found} & {tracemalloc.__file__, str(MODULE)}


# ---- a process ----


class Running:
    """A process whose RSS is what a test says, and whose tasks run when it says."""

    def __init__(self, folder: Path, mode: str = "armed", **more: str) -> None:
        self.folder = folder
        numbers = {"ARM_KB": str(10 * MB), "WINDOW_S": "60", "COOLDOWN_S": "3600"} | more
        environ = {"PLIMSOLL_TRACE_MODE": mode, "PLIMSOLL_TRACE_DIR": str(folder), "PLIMSOLL_UNIT": "u"}
        environ |= {f"PLIMSOLL_TRACE_{name}": value for name, value in numbers.items()}
        if "PLIMSOLL_WINDOWS_DIR" in os.environ:
            environ["PLIMSOLL_WINDOWS_DIR"] = os.environ["PLIMSOLL_WINDOWS_DIR"]
        if (folder / "tasks").exists():
            environ["PLIMSOLL_TASKS_DIR"] = str(folder / "tasks")
        self.bootstrap = Bootstrap()
        self.bootstrap.settings = Settings(environ)
        self.rss = 100 * MB

    @property
    def process(self) -> Any:
        return self.bootstrap.process

    def start(self, name: str = "a") -> None:
        self.bootstrap.start_task(name)

    def end(self, name: str = "a", grows: int = 0) -> None:
        self.rss += grows
        self.bootstrap.end_task(name)

    def run(self, name: str = "a", times: int = 1, grows: int = 0) -> None:
        for _ in range(times):
            self.start(name)
            self.end(name, grows)

    def records(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / f"u-{os.getpid()}.jsonl"
        return [record for record in lines(path) if record["kind"] == kind] if path.exists() else []

    def open(self) -> Any:
        self.run(times=plimsoll_bootstrap.WARM_TASKS)
        self.run(grows=10 * MB)
        assert self.process.window, "no window was opened"
        return self.process.window


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    current: list[Running] = []

    def start(*args: Any, **more: str) -> Running:
        current.append(Running(tmp_path, *args, **more))
        return current[-1]

    monkeypatch.setattr(Process, "rss_kb", lambda process: current[-1].rss)
    # A task here takes no time at all.
    monkeypatch.setattr(plimsoll_bootstrap, "RUN_S", 0.0)
    yield start
    for one in current:
        if one.process:
            one.process.abandon()
    assert not tracemalloc.is_tracing()


def test_a_window_opens_only_after_growth_over_the_floor(running: Callable[..., Running]) -> None:
    one = running()
    one.run(times=9, grows=20 * MB)  # warming up, however much
    one.run(times=5, grows=2 * MB - 1)
    assert one.process.window is None and not tracemalloc.is_tracing()
    one.run(grows=-20 * MB)  # the floor goes down with it
    one.run(times=10, grows=MB - 1)
    assert one.process.window is None
    one.run(grows=10)
    assert one.process.window and tracemalloc.is_tracing()
    [opened] = one.records("window_open")
    assert opened["rss_kb"] - opened["floor_kb"] >= 10 * MB


def test_attribution_never_traces(running: Callable[..., Running]) -> None:
    one = running("attribution")
    one.run(times=20, grows=20 * MB)
    assert one.process.window is None and not one.records("window_open")


def test_a_window_ends_with_the_site_and_the_tasks_and_the_next_one_waits(running: Callable[..., Running]) -> None:
    one, kept = running(), []
    one.start("long")
    window = one.open()
    for name, size in [("a", 50_000), ("b", 10)]:
        one.start(name)
        keep(kept, size)
        one.end(name)
    window.opened -= 60
    one.run(grows=70)
    assert not tracemalloc.is_tracing() and one.process.window is None
    [growth], [closed] = one.records("growth"), one.records("window_close")
    assert growth["sites"][0]["line"] == line_of("# grows")
    assert growth["traced_kb"] >= 48 and growth["rss_growth_kb"] == 70
    assert {name: task["count"] for name, task in growth["tasks"].items()} == {"a": 2, "b": 1, "long": 0}
    assert closed["reason"] == "window over"
    one.process.retry_at = 0.0
    one.run(grows=50 * MB)
    assert one.process.window is None, "the cooldown is not over"


def test_an_idle_window_is_closed_by_the_watch(running: Callable[..., Running]) -> None:
    one = running()
    window = one.open()
    one.process.on_watch(window)
    assert one.process.window
    window.opened -= 60
    one.process.on_watch(window)
    assert one.records("window_close") and not tracemalloc.is_tracing()


def test_a_task_that_runs_has_as_long_again_and_loses_no_growth(running: Callable[..., Running]) -> None:
    one = running()
    window = one.open()
    one.start("long")
    window.opened -= 61
    one.process.on_watch(window)
    assert one.process.window
    one.rss += 7 * MB
    window.opened -= 60
    one.process.on_watch(window)
    assert one.process.window is None
    one.end("long")
    assert one.process.shares.growth["long"] == 7 * MB


def test_a_task_that_makes_too_many_blocks_is_not_waited_for(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = running()
    window = one.open()
    one.start("large")
    monkeypatch.setattr(plimsoll_bootstrap, "TOO_MANY_BLOCKS", 0)
    one.process.on_watch(window)
    assert not tracemalloc.is_tracing()
    assert one.records("window_close")[0]["reason"].startswith("refused: ")
    assert not one.records("growth")


def test_the_watch_itself_ends_a_short_window(running: Callable[..., Running]) -> None:
    one = running(WINDOW_S="0.2")
    threads = Path("/proc/self/task")
    others = set(threads.iterdir())
    one.open()
    [watch] = set(threads.iterdir()) - others
    deadline = time.monotonic() + 10
    while not one.records("window_close"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert one.records("growth")
    while watch in threads.iterdir():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_application_that_traces_itself_goes_on_tracing(
    running: Callable[..., Running], tracing: Callable[[int], None]
) -> None:
    tracing(1)
    one = running()
    window = one.open()
    window.opened -= 60
    one.run()
    assert one.records("growth") and tracemalloc.is_tracing()
    tracemalloc.stop()


class Clock:
    """time.monotonic()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(plimsoll_bootstrap, "RUN_S", RUN_S)

    def run(self, one: Running, name: str, took: float, grows: int = 0) -> None:
        one.start(name)
        self.now += took
        one.end(name, grows)


def test_of_fast_tasks_some_are_measured_and_all_are_counted(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, clock, pick = running("attribution"), Clock(monkeypatch), random.Random(7)
    for _ in range(40_000):
        name = pick.choice("aab")
        clock.run(one, name, 0.001, grows=16 if name == "a" else 0)
    one.bootstrap.on_shutdown()
    last = {record["task"]: record for record in one.records("task_growth")}
    assert sum(record["count"] for record in last.values()) == 40_000
    for name, kb in {"a": 16, "b": 0}.items():
        # A tenth: 100 a second of 1,000.
        assert 0.05 < last[name]["measured"] / last[name]["count"] < 0.2
        assert last[name]["rss_growth_kb"] == kb * last[name]["measured"]


def test_of_slow_tasks_each_is_measured(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    one, clock = running("attribution"), Clock(monkeypatch)
    for _ in range(300):
        clock.run(one, "a", 0.011, grows=4)
    assert one.process.shares.measured == one.process.shares.count == {"a": 300}
    assert one.process.shares.growth == {"a": 299 * 4}, "the last one's growth is told at the next start"


def test_a_rest_ends_with_its_time_and_with_a_window(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, clock = running("attribution"), Clock(monkeypatch)
    for _ in range(plimsoll_bootstrap.RUN_TASKS):
        clock.run(one, "a", 0.0)
    one.rss += 300
    clock.run(one, "a", 0.0, grows=50)
    assert one.process.shares.resting
    clock.now += 2 * RUN_S
    clock.run(one, "b", 0.0, grows=7)
    assert not one.process.shares.resting
    assert one.process.shares.growth == {"a": 300}, "what came before the next start is the last one's"

    while not one.process.shares.resting:
        clock.run(one, "b", 0.0)
    one.rss += 90
    assert one.process.open_window(None)
    clock.run(one, "c", 0.0, grows=5)
    clock.run(one, "d", 0.0)
    assert one.process.shares.growth == {"a": 300, "b": 7, "c": 5, "d": 0}


def test_growth_is_written_for_tasks_that_ran_and_at_the_end(running: Callable[..., Running]) -> None:
    one = running("attribution")
    one.run("a", times=3, grows=MB)
    one.run("b")
    assert not one.records("task_growth")
    one.process.write_at = 0.0
    one.run("a", grows=MB)
    one.run("a", grows=MB)
    one.bootstrap.on_shutdown()
    found = [(record["task"], record["count"], record["rss_growth_kb"]) for record in one.records("task_growth")]
    assert found == [("a", 4, 4 * MB), ("b", 1, 0), ("a", 5, 5 * MB)]


def test_the_end_of_the_process_closes_the_window(running: Callable[..., Running]) -> None:
    one = running()
    one.open()
    one.bootstrap.on_shutdown()
    assert one.records("window_close")[0]["reason"] == "process ends" and one.records("growth")


def test_the_count_is_published_and_only_those_of_the_dead_are_removed(
    running: Callable[..., Running], tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    for name in ("4194305", "1", "notes.txt"):  # above the largest pid there is; alive; somebody's own
        (tmp_path / "tasks" / name).write_text("7\n")
    one = running("attribution")
    one.run(times=11)
    assert (tmp_path / "tasks" / str(os.getpid())).read_text() == "11\n"
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {"1", "notes.txt", str(os.getpid())}
    one.bootstrap.on_shutdown()
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {"1", "notes.txt"}


# ---- what goes wrong ----


def test_a_failure_switches_off_is_said_once_and_fails_no_task(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    one = running()
    one.open()

    def broken(process: Any) -> int:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Process, "rss_kb", broken)
    one.run(times=3)
    one.bootstrap.on_shutdown()
    assert one.bootstrap.settings is None
    assert not tracemalloc.is_tracing(), "it would trace for ever"
    said = capfd.readouterr().err
    assert said == f"plimsoll_bootstrap: process {os.getpid()}: switched off: RuntimeError: no such luck\n"


@pytest.mark.parametrize("broken", ["take_snapshot", "get_traced_memory"])
def test_a_window_that_cannot_start_leaves_neither_tracing_nor_the_lock(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any, broken: str
) -> None:
    def fails() -> None:
        raise MemoryError

    one = running()
    monkeypatch.setattr(tracemalloc, broken, fails)
    one.run(times=plimsoll_bootstrap.WARM_TASKS)
    one.run(grows=10 * MB)
    assert not tracemalloc.is_tracing()
    assert "switched off: MemoryError" in capfd.readouterr().err
    assert not TraceLock(tmp_path / ".u.lock").acquire(60), "the next child would fail the same way at once"
    assert TraceLock(tmp_path / ".u.lock").acquire(0)


def test_a_full_disk_opens_no_window_and_switches_nothing_off(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "tasks").mkdir()
    one = running()
    monkeypatch.setattr(os, "pwrite", full)
    one.run(times=plimsoll_bootstrap.WARM_TASKS)
    one.run(times=2, grows=10 * MB)
    assert one.bootstrap.settings and one.process.window is None
    assert one.process.shares.growth["a"] == 20 * MB
    said = capfd.readouterr().err
    assert said.count("no window is opened") == said.count("is not published") == 1 and said.count("\n") == 2


def test_a_fork_stops_tracing_in_the_child_alone_and_waits_for_no_lock(
    running: Callable[..., Running], tmp_path: Path
) -> None:
    one = running()
    one.open()
    gc.collect()
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with one.process.lock, one.bootstrap.creating:
            held.set()
            go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            one.bootstrap.on_fork()
            quiet = not tracemalloc.is_tracing() and one.process is None
            one.run(times=2)
            os._exit(0 if quiet and one.process.finished == 2 else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    go.set()
    holder.join()
    assert status == 0
    assert tracemalloc.is_tracing()
    assert not TraceLock(tmp_path / ".u.lock").acquire(0), "the child gave the parent's lock away"


# ---- a window on request ----


@pytest.fixture
def asked(tmp_path: Path, running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Running]:
    """A process of which windows may be asked for, and asked(...) asks for one."""
    monkeypatch.setenv("PLIMSOLL_WINDOWS_DIR", str(tmp_path))

    def start(mode: str = "attribution", **more: Any) -> Running:
        one = running(mode)
        ask(tmp_path, **more)
        return one

    return start


def ask(folder: Path, **more: Any) -> None:
    asked = {"id": "a1", "window_s": 60, "frames": 2, "until": time.time() + 60, **more}
    (folder / "u.json").write_text(json.dumps(asked))


def test_a_window_that_is_asked_for_opens_at_once_and_says_for_whom(asked: Callable[..., Running]) -> None:
    one, kept = asked(), []
    one.run()
    assert one.process.window and tracemalloc.get_traceback_limit() == 2
    keep(kept, 50_000)
    one.process.window.opened -= 60
    one.run()
    assert not tracemalloc.is_tracing()
    [opened], [growth], [closed] = (one.records(kind) for kind in ("window_open", "growth", "window_close"))
    assert {opened["id"], growth["id"], closed["id"]} == {"a1"}
    assert (opened["frames"], opened["window_s"], opened["floor_kb"], growth["frames"]) == (2, 60, None, 2)
    assert opened["gc_objects"] > 1000
    one.process.look_at = 0.0
    one.run()
    assert one.process.window is None, "of one request there is one window"


def test_another_process_of_the_worker_does_not_take_the_same_request(
    asked: Callable[..., Running], running: Callable[..., Running], tmp_path: Path
) -> None:
    one = asked()
    one.run()
    assert one.process.window
    other = running("attribution")
    other.run()
    assert other.process.window is None, "while it is open"
    one.process.close_window("window over")
    other.process.look_at = 0.0
    other.run()
    assert other.process.window is None, "nor later"
    ask(tmp_path, id="a2")
    other.process.look_at = 0.0
    other.run()
    assert other.process.window, "the next one is for whoever comes first"


@pytest.mark.parametrize("then", [None, "a2"])
def test_a_window_is_called_off_by_taking_the_request_away(
    asked: Callable[..., Running], tmp_path: Path, then: str | None
) -> None:
    one = asked()
    one.run()
    window = one.process.window
    one.process.on_watch(window)
    assert one.process.window
    if then:
        ask(tmp_path, id=then)
    else:
        (tmp_path / "u.json").unlink()
    one.process.on_watch(window)
    assert one.process.window is None and one.records("window_close")[0]["reason"] == "called off"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"until": 1}, ""),
        ({"id": "../x"}, "has no id"),
        ({"id": None}, "has no id"),
        ({"window_s": 4000}, "asks for 4000 seconds"),
        ({"window_s": True}, "window_s is no number"),
        ({"frames": 0}, "and 0 frames"),
        ({"until": "soon"}, "until is no number"),
    ],
)
def test_a_request_that_is_too_late_or_not_sound_opens_nothing(
    asked: Callable[..., Running], capfd: Any, wrong: dict[str, Any], said: str
) -> None:
    one = asked(**wrong)
    one.run(times=3)
    assert one.process.window is None and one.bootstrap.settings
    assert said in (told := capfd.readouterr().err) and bool(told) == bool(said)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"x" * 9999])
def test_a_request_that_is_no_json_is_passed_over(running: Any, asked: Any, tmp_path: Path, content: bytes) -> None:
    one = asked()
    (tmp_path / "u.json").write_bytes(content)
    one.run()
    assert one.process.window is None and one.bootstrap.settings


def test_a_pipe_in_place_of_a_request_holds_up_no_task(asked: Callable[..., Running], tmp_path: Path) -> None:
    one = asked()
    (tmp_path / "u.json").unlink()
    os.mkfifo(tmp_path / "u.json")
    one.run()
    assert one.process.window is None and one.bootstrap.settings


def test_the_remote_control_asks_for_a_window(asked: Callable[..., Running], tmp_path: Path) -> None:
    one = asked()
    (tmp_path / "u.json").unlink()
    assert "error" in one.bootstrap.ask(0) and not list(tmp_path.glob("*.part"))
    answer = one.bootstrap.ask("30", "3")
    assert "30 s" in answer["ok"]
    one.run()
    assert one.process.window.request.id in answer["ok"]
    assert (one.process.window.window_s, one.process.window.frames) == (30, 3)
    assert "error" in Bootstrap().ask()


def test_in_mode_always_one_window_follows_the_other_in_each_process(running: Callable[..., Running]) -> None:
    one, other = running("always"), running("always")
    for each in (one, other):
        each.run(times=plimsoll_bootstrap.WARM_TASKS)
    assert one.process.window and other.process.window
    # The second found tracing on, and leaves it to the first.
    one.process.close_window("window over")
    one.run()
    assert one.process.window


# ---- what else a window tells ----


class Ticket:
    """Told by its type."""


def record_of(change: Callable[[], Any]) -> dict[str, Any]:
    before = held()
    kept = change()
    found = held().since(before, None)
    assert kept is not None
    return dict(found)


def held() -> Any:
    one = plimsoll_bootstrap.Held(True)
    one.measure()
    return one


SEEN: dict[int, Any] = {}


def test_types_that_gained_objects_and_the_way_to_one_of_them() -> None:
    SEEN.clear()

    def sell() -> Any:
        SEEN.update((number, Ticket()) for number in range(500))
        return SEEN

    found = record_of(sell)
    assert found["objects"][0] == {"type": f"{__name__}.Ticket", "count": 500, "growth": 500}
    assert found["chains"] == [[f"module {__name__}", ".SEEN: dict", f"{__name__}.Ticket"]]
    # How few it had before is not known of one that was small.
    [hold] = [one for one in found["holders"] if one["size"] == 500]
    grown = 500 - plimsoll_bootstrap.HOARD
    assert hold == {"type": "dict", "size": 500, "growth": grown, "path": [f"module {__name__}", ".SEEN: dict"]}
    SEEN.clear()


def test_a_container_in_an_attribute_and_a_closure_is_reached() -> None:
    class Collector:
        def __init__(self) -> None:
            self.events: list[Any] = []

    collector = Collector()
    SEEN["one"] = lambda: collector  # type: ignore[index]

    def collect() -> Any:
        collector.events += [bytes(1)] * 300
        return collector

    [hold] = [one for one in record_of(collect)["holders"] if one["size"] == 300]
    assert hold["path"][:2] == [f"module {__name__}", ".SEEN: dict"]
    assert hold["path"][-1].startswith(".events: list") or hold["path"][-1].endswith("list")
    assert not any("one" in step for step in hold["path"]), "no contents, which may be anybody's"
    SEEN.clear()


def test_what_cannot_be_reached_in_time_is_told_as_far_as_it_was() -> None:
    assert plimsoll_bootstrap.chain(Ticket(), time.monotonic() - 1, set()) == [f"{__name__}.Ticket"]


def test_caches_that_gained_entries_with_their_bound() -> None:
    @functools.lru_cache(maxsize=1000)
    def price(number: int) -> int:
        return number

    found = record_of(lambda: [price(number) for number in range(70)])
    assert found["caches"][0]["most"] == 1000 and found["caches"][0]["name"].endswith("price")
    assert (found["caches"][0]["size"], found["caches"][0]["growth"]) == (70, 70)


def test_descriptors_by_kind_and_path(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.touch()
    opened = [path.open() for _ in range(20)]
    pairs = [socket.socketpair() for _ in range(3)]
    pipe = os.pipe()
    now, paths = plimsoll_bootstrap.descriptors()
    assert paths[str(path)] == 20 and now["file"] >= 20 and now["socket"] >= 6 and now["pipe"] >= 2
    for one in (*opened, *(end for pair in pairs for end in pair)):
        one.close()
    for end in pipe:
        os.close(end)
    again = record_of(lambda: [path.open() for _ in range(20)])["fds"]
    assert again["growth"] == again["kinds"]["file"]["growth"] == 20
    assert again["paths"][0] == {"path": str(path), "count": 20, "growth": 20}


# What malloc keeps free of a process's past would be handed out first, and so this needs a process without one.
MALLOC = """
import ctypes, json, plimsoll_bootstrap
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def held():
    one = plimsoll_bootstrap.Held(False)
    one.measure()
    return one
first = held()
# Below the size from which malloc maps a block of its own.
blocks = [libc.malloc(60_000) for _ in range(300)]
for block in blocks:
    ctypes.memset(block, 1, 60_000)
second = held()
# One at the top keeps what is below from being given back.
for block in blocks[:-1]:
    libc.free(block)
third = held()
print(json.dumps([second.since(first, None), third.since(second, None), plimsoll_bootstrap.trim()]))
"""


def test_the_allocators_figures_are_those_of_the_kernel_and_malloc() -> None:
    ran = subprocess.run([sys.executable, "-B", "-c", MALLOC], cwd=MODULE.parent, capture_output=True, check=True)
    taken, freed, trimmed_kb = json.loads(ran.stdout)
    kb = 300 * 60_000 / 1024
    assert taken["malloc"]["used_growth_kb"] == pytest.approx(kb, rel=0.05)
    assert taken["memory"]["private_growth_kb"] == pytest.approx(kb, rel=0.1)
    assert freed["malloc"]["used_growth_kb"] == pytest.approx(-kb, rel=0.05)
    assert freed["malloc"]["free_growth_kb"] == pytest.approx(kb, rel=0.05)
    assert freed["memory"]["private_growth_kb"] == pytest.approx(0, abs=kb / 10)
    assert trimmed_kb == pytest.approx(kb, rel=0.1)


def test_without_glibc_there_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert plimsoll_bootstrap.malloc_kb() is None and plimsoll_bootstrap.trim() is None
    assert record_of(lambda: [0])["malloc"] is None


def test_of_too_many_objects_none_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plimsoll_bootstrap, "MANY_OBJECTS", 10)
    found = record_of(lambda: [Ticket() for _ in range(100)])
    assert (found["objects"], found["holders"], found["chains"], found["caches"]) == ([], [], [], [])


# ---- what Celery calls ----


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a function as Celery runs a task of a watched worker; what its tracer returns."""
    monkeypatch.setattr(Task, "__trace__", None)
    monkeypatch.setenv("PLIMSOLL_TRACE_MODE", "attribution")
    monkeypatch.setenv("PLIMSOLL_TRACE_DIR", str(tmp_path))
    fresh = Bootstrap()
    fresh.install()
    app = Celery("shop", set_as_current=False, broker="memory://")

    def run(function: Callable[..., Any], *args: Any) -> Any:
        task = app.task(function, name=f"shop.{function.__name__}")
        task.__trace__ = build_tracer(task.name, task, app=app)
        request = {"id": "1", "is_eager": False, "hostname": "here", "delivery_info": {}}
        return task.__trace__("1", args, {}, request)

    run.bootstrap = fresh  # type: ignore[attr-defined]
    yield run
    if fresh.process:
        fresh.process.abandon()


def sell(number: int) -> int:
    if number < 0:
        raise ValueError(number)
    return number + 1


def counts(bootstrap: Any) -> dict[str, int]:
    return dict(bootstrap.process.shares.count)


def test_a_task_is_counted_whether_it_fails_or_not_and_returns_what_it_did(traced: Any) -> None:
    assert traced(sell, 1).retval == 2
    assert isinstance(traced(sell, -1).retval.exception, ValueError)
    assert counts(traced.bootstrap) == {"shop.sell": 2} and not traced.bootstrap.process.shares.running


@pytest.mark.parametrize("method", ["start", "end"])
def test_trouble_of_ours_does_not_fail_a_task(
    traced: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any, method: str
) -> None:
    assert traced(sell, 1).retval == 2 and counts(traced.bootstrap) == {"shop.sell": 1}
    monkeypatch.setattr(Process, method, lambda *_: 1 / 0)
    assert traced(sell, 1).retval == 2
    assert traced.bootstrap.process is None and traced.bootstrap.settings is None
    assert traced(sell, 1).retval == 2
    assert capfd.readouterr().err.count("switched off: ZeroDivisionError") == 1


class SoftTimeLimitExceeded(Exception):
    """Billiard's, by its name."""


def test_a_time_limit_that_comes_before_a_task_fails_it_and_after_it_does_not(
    traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_time(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    assert traced(sell, 1).retval == 2
    with monkeypatch.context() as patch:
        patch.setattr(Process, "end", out_of_time)
        assert traced(sell, 1).retval == 2
    with monkeypatch.context() as patch:
        patch.setattr(Process, "start", out_of_time)
        with pytest.raises(SoftTimeLimitExceeded):
            traced(sell, 1)
    assert traced(sell, 1).retval == 2 and traced.bootstrap.settings, "it goes on"


def test_a_celery_that_runs_tasks_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.delattr(Task, "__trace__")
    monkeypatch.setenv("PLIMSOLL_TRACE_MODE", "attribution")
    monkeypatch.setenv("PLIMSOLL_TRACE_DIR", "/x")
    fresh = Bootstrap()
    fresh.install()
    assert fresh.settings is None
    assert "switched off: RuntimeError: this Celery has no Task.__trace__" in capfd.readouterr().err


# ---- single tasks ----


def single(monkeypatch: pytest.MonkeyPatch, **environ: str) -> Any:
    """A bootstrap of a worker whose environment asks for nothing."""
    for name in [name for name in os.environ if name.startswith("PLIMSOLL_")]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    fresh = Bootstrap()
    fresh.install()
    monkeypatch.setattr(plimsoll_bootstrap, "bootstrap", fresh)
    monkeypatch.setattr(plimsoll_bootstrap, "TASK_GROWTH_EVERY_S", 0.0)
    return fresh


def test_a_decorated_task_is_watched_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single(monkeypatch, PLIMSOLL_TRACE_DIR=str(tmp_path))

    @plimsoll_bootstrap.track_memory
    def sell(number: int) -> int:
        if number < 0:
            raise ValueError(number)
        return number + 1

    assert sell(1) == 2 and sell.__name__ == "sell"
    with pytest.raises(ValueError, match="-1"):
        sell(-1)
    *_, last = lines(tmp_path / f"celery-{os.getpid()}.jsonl")
    assert (last["kind"], last["count"]) == ("task_growth", 2)
    assert last["task"].endswith("sell")


def test_without_a_directory_it_goes_to_the_log(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    single(monkeypatch)

    @plimsoll_bootstrap.track_memory
    def sell() -> None:
        pass

    with caplog.at_level("INFO", "plimsoll"):
        sell()
    assert "sell: " in caplog.text and "in 1 runs" in caplog.text


def test_a_base_class_watches_by_the_tasks_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single(monkeypatch, PLIMSOLL_TRACE_DIR=str(tmp_path))
    app = Celery("shop", set_as_current=False)

    @app.task(base=plimsoll_bootstrap.MemoryTrackingTask, name="shop.sell")
    def sell(number: int) -> int:
        return number + 1

    assert sell(1) == 2
    *_, last = lines(tmp_path / f"celery-{os.getpid()}.jsonl")
    assert (last["task"], last["count"]) == ("shop.sell", 1)


def test_where_all_tasks_are_watched_a_single_one_is_not_counted_twice(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = running("attribution")
    monkeypatch.setattr(plimsoll_bootstrap, "bootstrap", one.bootstrap)
    plimsoll_bootstrap.track_memory(lambda: None)()
    assert one.process is None


def test_trouble_of_ours_does_not_fail_a_single_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    single(monkeypatch, PLIMSOLL_TRACE_DIR=str(tmp_path))
    monkeypatch.setattr(plimsoll_bootstrap, "Process", lambda *_: 1 / 0)
    calls: list[int] = []
    tracked = plimsoll_bootstrap.track_memory(lambda: calls.append(1))
    tracked()
    tracked()
    assert calls == [1, 1]
    assert capfd.readouterr().err.count("switched off: ZeroDivisionError") == 1


# ---- what an application may be made of ----


def test_nothing_is_asked_that_runs_code_of_the_application() -> None:
    asked: list[str] = []

    class Meta(type):
        def __hash__(cls) -> int:
            asked.append("hash")
            raise RuntimeError

        def __eq__(cls, other: object) -> bool:
            asked.append("eq")
            raise RuntimeError

        @property
        def __module__(cls) -> str:  # type: ignore[override]
            asked.append("module")
            raise RuntimeError

    class Odd(metaclass=Meta):
        @property
        def __class__(self) -> type:  # type: ignore[override]
            asked.append("class")
            raise RuntimeError

        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            asked.append("dict")
            raise RuntimeError

        def __len__(self) -> int:
            asked.append("len")
            raise RuntimeError

    class Lazy(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            asked.append(f"module {name}")
            raise RuntimeError

    sys.modules["lazy_of_bootstrap"] = lazy = Lazy("lazy_of_bootstrap")
    asked.clear()
    try:
        odd = [Odd() for _ in range(200)]
        SEEN["odd"] = odd  # type: ignore[index]
        found = record_of(lambda: [Odd() for _ in range(300)])
        path = plimsoll_bootstrap.chain(odd[0], time.monotonic() + 5, set())
    finally:
        del sys.modules["lazy_of_bootstrap"]
        SEEN.clear()
    assert asked == [] and lazy is not None
    assert found["objects"][0]["growth"] == 300 and found["objects"][0]["type"].endswith("Odd")
    assert path[:2] == [f"module {__name__}", ".SEEN: dict"]


def test_a_dict_that_is_its_own_namespace_tells_no_key() -> None:
    class Record(dict[str, Any]):
        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            self.__dict__ = self

    ticket = Ticket()
    SEEN["customers"] = Record(jane_doe=ticket)  # type: ignore[index]
    path = plimsoll_bootstrap.chain(ticket, time.monotonic() + 5, set())
    SEEN.clear()
    assert path[0] == f"module {__name__}" and not any("jane" in step for step in path)


def test_types_of_the_same_name_are_counted_together() -> None:
    def make() -> type:
        class Row:
            pass

        return Row

    found = record_of(lambda: [[make()() for _ in range(50)], [make()() for _ in range(50)]])
    [row] = [one for one in found["objects"] if one["type"].endswith("Row")]
    assert row["growth"] == 100


def test_a_request_that_was_served_and_stays_does_not_keep_an_armed_worker_from_tracing(
    asked: Callable[..., Running],
) -> None:
    one = asked("armed")
    one.run()
    one.process.close_window("window over")
    # As of long ago, so that it has cooled down.
    one.process.trace_lock.path.write_text("0 a1")
    one.process.look_at = 0.0
    one.run(times=plimsoll_bootstrap.WARM_TASKS)
    one.process.look_at = 0.0
    one.run(grows=10 * MB)
    assert one.process.window and one.process.window.request is None


def test_a_class_without_a_module_and_a_cache_of_odd_make_are_counted() -> None:
    space: dict[str, Any] = {}
    exec("Plain = type('Plain', (), {})", space)
    found = record_of(lambda: [space["Plain"]() for _ in range(50)])
    assert {"type": "?.Plain", "count": 50, "growth": 50} in found["objects"]

    def odd(number: int) -> int:
        return number

    odd.cache_info = 7  # type: ignore[attr-defined]
    cached = functools.lru_cache(odd)
    assert record_of(lambda: [cached(number) for number in range(9)])["caches"][0]["growth"] == 9


def test_an_attribute_that_no_program_has_is_not_told() -> None:
    ticket, holder = Ticket(), Ticket()
    setattr(holder, "card 4111 1111", ticket)
    SEEN["one"] = holder  # type: ignore[index]
    path = plimsoll_bootstrap.chain(ticket, time.monotonic() + 5, set())
    SEEN.clear()
    assert path[0] == f"module {__name__}" and not any("4111" in step for step in path)


def test_what_is_counted_at_the_end_is_not_traced(running: Callable[..., Running], monkeypatch: Any) -> None:
    one = running()
    window = one.open()
    seen: list[bool] = []
    held = plimsoll_bootstrap.Held
    monkeypatch.setattr(plimsoll_bootstrap, "Held", lambda whole: seen.append(tracemalloc.is_tracing()) or held(whole))
    window.opened -= 60
    one.run()
    assert one.records("growth") and seen == [False]


def test_an_application_that_stops_tracing_has_a_window_refused(running: Callable[..., Running]) -> None:
    one = running()
    window = one.open()
    tracemalloc.stop()
    window.opened -= 60
    one.run()
    assert one.records("window_close")[0]["reason"].startswith("refused: ") and one.bootstrap.settings


def test_a_soft_time_limit_that_comes_while_we_are_at_it_is_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SoftTimeLimitExceeded(Exception):
        pass

    def late(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    fresh = single(monkeypatch, PLIMSOLL_TRACE_DIR=str(tmp_path))
    tracked = plimsoll_bootstrap.track_memory(lambda: None)
    tracked()
    monkeypatch.setattr(Process, "start", late)
    with pytest.raises(SoftTimeLimitExceeded):
        tracked()
    assert fresh.single and not fresh.gave_up


def test_descriptors_that_ran_out_do_not_call_a_window_off(
    asked: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asked()
    one.run()

    def none_left(path: Path) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(plimsoll_bootstrap, "Request", none_left)
    one.process.on_watch(one.process.window)
    assert one.process.window


def test_a_worker_runs_where_python_has_no_ctypes() -> None:
    program = (
        "import sys; sys.modules['_ctypes'] = None; import plimsoll_bootstrap as it;"
        "assert it.malloc_kb() is None and it.trim() is None"
    )
    subprocess.run([sys.executable, "-B", "-c", program], cwd=MODULE.parent, check=True)


def test_an_armed_window_does_not_look_at_objects(running: Callable[..., Running], monkeypatch: Any) -> None:
    one = running()
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("it looked"))
    window = one.open()
    window.opened -= 60
    one.run()
    [opened], [growth] = one.records("window_open"), one.records("growth")
    assert opened["gc_objects"] is None
    assert growth["objects"] == growth["holders"] == growth["chains"] == growth["caches"] == []
    assert growth["malloc"] and growth["fds"]["count"] > 2
