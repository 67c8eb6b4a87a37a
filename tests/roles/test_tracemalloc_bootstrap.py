"""The bootstrap in a real Celery worker, loaded by the environment of its unit and drop-in and by nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from plimsoll.diagnose import task_growth

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles" / "tracemalloc_bootstrap"
WORKERS = ROOT / "roles" / "celery_worker"
SERVICE = ROOT / "templates" / "celery_worker" / "celery-worker@.service.j2"
DROPIN = ROOT / "templates" / "tracemalloc_bootstrap" / "50-plimsoll-trace.conf.j2"
UNIT = "celery-worker@shop.service"
LEAKED_KB = 100_000 / 1024
PATIENCE_S = 30.0

APP = """
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

from celery import Celery, Task

app = Celery("app")
app.config_from_object("celeryconfig")
KEPT = {}


@app.task(name="shop.leak")
def leak():
    KEPT[len(KEPT)] = os.urandom(100_000)  # the leak


@app.task(name="shop.leak_little")
def leak_little():
    KEPT[len(KEPT)] = os.urandom(40_000)


@app.task(name="shop.add")
def add():
    # What a task takes and gives back would be filled by the other's leak, and take that growth upon it.
    return 1 + 1


@app.task(name="shop.clean")
def clean():
    return len(os.urandom(100_000))


@app.task(name="shop.block")
def block():
    # Holds the thread, and does not let the loop run as a patched sleep would.
    until = time.monotonic() + 8
    while time.monotonic() < until:
        pass
    Path("unblocked").touch()


@app.task(name="shop.look")
def look():
    seen = {
        "loaded": {"plimsoll_bootstrap", "plimsoll_notify"} <= set(sys.modules),
        "tracer": repr(vars(Task)["__trace__"]),
        "tracing": tracemalloc.is_tracing(),
    }
    Path("looked.part").write_text(json.dumps(seen))
    Path("looked.part").rename("looked.json")
"""


def unit_environment(tmp_path: Path, **variables: Any) -> dict[str, str]:
    """The environment as unit and drop-in set it, but for the folders and the variables of roles that are given."""
    known = {}
    for role in (WORKERS, ROLE):
        known |= yaml.safe_load((role / "defaults/main.yml").read_text())
    known |= variables
    moved = {
        # The modules of both roles are in it.
        "/opt/plimsoll/bootstrap": f"{WORKERS / 'files'}{os.pathsep}{ROLE / 'files'}",
        "/var/log/plimsoll/trace": str(tmp_path / "trace"),
        "/run/plimsoll/tasks": str(tmp_path / "tasks"),
        "/run/plimsoll/windows": str(tmp_path / "windows"),
        "%n": UNIT,
    }
    found = {}
    # The drop-in comes after the unit, and what it sets again is what counts.
    text = f"{SERVICE.read_text()}\n{DROPIN.read_text()}"
    for name, value in re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE):
        variable = re.fullmatch(r"\{\{ (\w+).* \}\}", value)
        found[name] = str(known[variable[1]]) if variable else moved.get(value, value)
    return found


class Worker:
    """A worker in a folder of its own; its broker is a folder too."""

    def __init__(self, folder: Path, pool: str, concurrency: int, **variables: Any) -> None:
        self.folder = folder
        self.sent = 0
        for name in ("queue", "sending", "control", "trace", "tasks", "windows"):
            (folder / name).mkdir()
        options = {
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.05,
        }
        config = {"broker_url": "filesystem://", "broker_transport_options": options, "task_ignore_result": True}
        (folder / "celeryconfig.py").write_text("".join(f"{name} = {value!r}\n" for name, value in config.items()))
        (folder / "app.py").write_text(APP)
        self.sender = Celery("sender", set_as_current=False)
        options = options | {"data_folder_out": str(folder / "sending")}
        self.sender.conf.update(config | {"broker_transport_options": options})
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "PLIMSOLL_"))}
        command = ["celery", "-A", "app", "worker", f"--pool={pool}", f"--concurrency={concurrency}", "--loglevel=INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, *quiet],
                cwd=folder,
                env=inherited | unit_environment(folder, **variables),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait(self, what: str, until: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := until()):
            assert self.process.poll() is None, f"the worker ended before there was {what}:\n{self.log()[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s:\n{self.log()[-3000:]}"
            time.sleep(0.05)
        return found

    def send(self, task: str, times: int = 1) -> None:
        for _ in range(times):
            self.sender.send_task(task)
        # Written elsewhere and moved here whole: the transport reads what it finds, be it half a message.
        for message in sorted((self.folder / "sending").iterdir()):
            message.rename(self.folder / "queue" / message.name)
        self.sent += times

    def run(self, task: str, times: int) -> None:
        """Returns when all have run, so that no task of another name runs beside them."""
        self.send(task, times)
        self.wait(f"count of {self.sent} tasks", lambda: self.counted() == self.sent)

    def counted(self) -> int:
        # Of fast tasks the published count lags.
        return len(re.findall(r"\] (?:succeeded in|raised) ", self.log()))

    def records(self, *kinds: str) -> list[dict[str, Any]]:
        lines = [line for path in (self.folder / "trace").glob("*.jsonl") for line in path.read_text().splitlines()]
        found = [json.loads(line) for line in lines]
        return [record for record in found if not kinds or record["kind"] in kinds]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """Whatever came of the test, of the session that was started here nothing stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def starting(*args: Any, **variables: Any) -> Worker:
        started.append(Worker(tmp_path, *args, **variables))
        return started[-1]

    yield starting
    for worker in started:
        worker.kill()


@pytest.mark.parametrize(("pool", "concurrency"), [("prefork", 1), ("solo", 1), ("threads", 2)])
def test_a_worker_that_leaks_says_in_which_task_and_line(
    start: Callable[..., Worker], pool: str, concurrency: int
) -> None:
    worker = start(
        pool,
        concurrency,
        tracemalloc_bootstrap_mode="armed",
        tracemalloc_bootstrap_arm_kb=3000,
        tracemalloc_bootstrap_window_s=2,
    )
    # Imports and pools of the first tasks are over before it leaks.
    worker.run("shop.clean", 15)
    for _ in range(20):
        worker.run("shop.leak", 10)
        if worker.records("window_open"):
            break
    worker.run("shop.leak", 20)
    worker.run("shop.clean", 10)
    [growth] = worker.wait("growth record", lambda: worker.records("growth"))
    [counter] = (worker.folder / "tasks").iterdir()
    worker.stop()

    source = (worker.folder / "app.py").read_text().splitlines()
    top = growth["sites"][0]
    assert (top["file"], top["function"]) == (str(worker.folder / "app.py"), "leak")
    assert source[top["line"] - 1].endswith("# the leak")
    # Those that ran while the window was open, be it that it closed before the last of them.
    assert top["growth_kb"] >= LEAKED_KB * 10
    assert top["count"] >= 10
    in_window = {"shop.clean": {"traced_growth_kb": 0.0}} | growth["tasks"]
    assert in_window["shop.leak"]["traced_growth_kb"] >= LEAKED_KB * 10
    assert in_window["shop.clean"]["traced_growth_kb"] < LEAKED_KB

    [opened], [closed] = worker.records("window_open"), worker.records("window_close")
    assert opened["rss_kb"] - opened["floor_kb"] >= 3000
    assert opened["time"] < closed["time"] and closed["reason"] == "window over"

    # The last record of a task is its state at the end of the process.
    last = {record["task"]: record for record in worker.records("task_growth")}
    leaks, cleans = last["shop.leak"], last["shop.clean"]
    assert (leaks["count"], cleans["count"]) == (worker.sent - 25, 25)
    # The first leaks fill what the process held free, and cost no RSS.
    assert leaks["measured"] >= 16
    assert leaks["rss_growth_kb"] > LEAKED_KB * leaks["measured"] * 0.4
    # It may give back what the other one had taken.
    assert cleans["rss_growth_kb"] < leaks["rss_growth_kb"] / 4

    for record in worker.records():
        assert set(record) > {"time", "unit", "pid", "kind"}
        assert record["unit"] == UNIT and record["pid"] == int(counter.name)
        assert abs(record["time"] - time.time()) < 300
    assert (int(counter.name) == worker.process.pid) == (pool != "prefork")
    assert not counter.exists(), "a process that ends takes its count away"
    assert worker.process.returncode == 0
    assert "plimsoll_bootstrap:" not in worker.log() and "plimsoll_notify:" not in worker.log()


@pytest.mark.parametrize(("pool", "concurrency"), [("prefork", 1), ("threads", 2)])
def test_growth_by_task_holds_where_tasks_come_too_fast_to_measure_each(
    start: Callable[..., Worker], pool: str, concurrency: int
) -> None:
    worker, times = start(pool, concurrency, tracemalloc_bootstrap_mode="attribution"), 700
    worker.run("shop.add", 20)
    for _ in range(times):
        for task in ("shop.leak_little", "shop.add"):
            worker.sender.send_task(task)
            worker.sent += 1
    worker.run("shop.add", 1)
    worker.stop()
    records = worker.records("task_growth")
    last = {record["task"]: record for record in records}
    assert {task: record["count"] for task, record in last.items()} == {
        "shop.leak_little": times,
        "shop.add": times + 21,
    }
    assert all(16 <= record["measured"] < record["count"] for record in last.values())
    growth = {task: kb for task, (kb, _) in task_growth(records).items()}
    assert growth["shop.leak_little"] == pytest.approx(times * 40_000 / 1024, rel=0.35)
    assert abs(growth["shop.add"]) < growth["shop.leak_little"] / 3


def test_off_is_off(start: Callable[..., Worker]) -> None:
    worker = start("solo", 1, tracemalloc_bootstrap_mode="off")
    worker.send("shop.leak", 12)
    worker.send("shop.look")
    worker.wait("look", (worker.folder / "looked.json").exists)
    looked = json.loads((worker.folder / "looked.json").read_text())
    worker.stop()
    assert looked["loaded"] and not looked["tracing"]
    assert looked["tracer"] == "None"
    assert list((worker.folder / "trace").iterdir()) == list((worker.folder / "tasks").iterdir()) == []
    assert "plimsoll_bootstrap:" not in worker.log() and "plimsoll_notify:" not in worker.log()


@pytest.mark.parametrize(
    ("pool", "concurrency"), [("prefork", 2), ("solo", 1), ("threads", 2), ("gevent", 4), ("eventlet", 4)]
)
def test_a_window_is_opened_by_remote_control_in_every_pool(
    start: Callable[..., Worker], pool: str, concurrency: int
) -> None:
    worker = start(pool, concurrency, tracemalloc_bootstrap_mode="attribution")
    worker.run("shop.clean", 6)
    arguments = {"window_s": 2, "frames": 5}
    ask = f"from app import app; print(app.control.broadcast('plimsoll_window', arguments={arguments}, reply=True))"
    ran = subprocess.run(
        [sys.executable, "-c", ask], cwd=worker.folder, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ran.returncode == 0 and "the next process that ends a task opens it" in ran.stdout, ran
    [request] = (worker.folder / "windows").iterdir()
    asked = json.loads(request.read_text())
    assert (request.name, asked["window_s"], asked["frames"]) == (f"{UNIT}.json", 2, 5)
    deadline = time.monotonic() + PATIENCE_S
    while not worker.records("window_close"):
        assert time.monotonic() < deadline, worker.log()
        worker.run("shop.leak", 4)
    worker.stop()
    [growth], [closed] = worker.records("growth"), worker.records("window_close")
    assert growth["id"] == closed["id"] == asked["id"] and closed["reason"] == "window over"
    source = (worker.folder / "app.py").read_text().splitlines()
    top = growth["sites"][0]
    assert source[top["line"] - 1].endswith("# the leak") and top["growth_kb"] > 0.5 * LEAKED_KB
    # Where memory stays that Python allocated, nothing comes back and no descriptor is left open.
    assert growth["frames"] == 5 and growth["malloc"]["trimmed_kb"] is not None and growth["fds"]["growth"] < 5
    holders = [one["path"] for one in growth["holders"] if one["type"] == "dict"]
    assert top["count"] < 70 or ["module app", ".KEPT: dict"] in holders, growth["holders"]
    assert not growth["interleaved"] or concurrency > 1
    assert worker.process.returncode == 0 and "plimsoll_bootstrap:" not in worker.log()


def test_a_window_ends_while_a_green_task_blocks(start: Callable[..., Worker]) -> None:
    """What watches it is a thread of the system's, and none of gevent's."""
    worker = start("gevent", 2, tracemalloc_bootstrap_mode="attribution")
    worker.run("shop.clean", 2)
    request = {"id": "a1", "window_s": 1, "frames": 1, "until": time.time() + 60}
    (worker.folder / "windows" / "part").write_text(json.dumps(request))
    (worker.folder / "windows" / "part").rename(worker.folder / "windows" / f"{UNIT}.json")
    time.sleep(1.1)
    worker.run("shop.clean", 1)
    worker.wait("window", lambda: worker.records("window_open"))
    worker.send("shop.block")
    [closed] = worker.wait("end of the window", lambda: worker.records("window_close"))
    assert not (worker.folder / "unblocked").exists()
    assert closed["reason"] == "window over"
