"""Each kind of leak in real Celery workers that are asked for a window: what it names, and what it calls the kind.

boxoffice/leaks.py has the tasks, each beside its mended one; docs/leaks.md says what to do about them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from celery import Celery
from lab.patterns import KEPT_KB, LAB, LEAKS, LIBRARY, MENDED, OTHERS, PYTHON, build_extension
from plimsoll.diagnose import culprits, gains, leak_class
from test_tracemalloc_bootstrap import UNIT, unit_environment

PATIENCE_S = 60.0
# Runs before a window, as first calls take memory once, and in it.
WARM, RUNS = 5, 60
SEATS = 1_000_000


class Window(NamedTuple):
    """What became of one that was asked for."""

    growth: dict[str, Any]
    close: dict[str, Any]
    runs: int


class Worker:
    """A worker in a folder of its own; its broker is a folder too. What it leaks, it leaks for the windows after."""

    def __init__(self, folder: Path, pool: str, extension: Path, **environment: str) -> None:
        self.folder = folder
        self.sent = 0
        for name in ("queue", "processed", "sending", "control", "trace", "tasks", "windows"):
            (folder / name).mkdir(parents=True)
        options = {
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.02,
        }
        update = f"app.conf.update(broker_transport_options={options!r})"
        (folder / "app.py").write_text(f"from boxoffice.leaks import app\n\n{update}\n")
        self.sender = Celery("sender", set_as_current=False, broker="filesystem://")
        self.sender.conf.broker_transport_options = options | {"data_folder_out": str(folder / "sending")}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "PLIMSOLL_"))}
        asked = unit_environment(folder, tracemalloc_bootstrap_mode="attribution")
        path = [asked["PYTHONPATH"], LAB / "app", LIBRARY.parents[1], extension.parent]
        asked |= {
            "CELERY_BROKER_URL": "filesystem://",
            "PLIMSOLL_WINDOWS_DIR": str(folder / "windows"),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
        }
        command = ["celery", "-A", "app", "worker", f"--pool={pool}", "--concurrency=1", "--loglevel=INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, *quiet],
                cwd=folder,
                env=inherited | asked | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, what: str, until: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := until()):
            log = (self.folder / "log").read_text()[-3000:]
            assert self.process.poll() is None, f"the worker ended before there was {what}:\n{log}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s:\n{log}"
            time.sleep(0.02)
        return found

    def run(self, tasks: Sequence[str], times: int) -> None:
        """Each of them so often, in turns; returns when all have run."""
        for _ in range(times):
            for task in tasks:
                self.sender.send_task(f"boxoffice.leaks.{task}", (self.sent,))
                self.sent += 1
        # Written elsewhere and moved here whole: the transport reads what it finds, be it half a message.
        for message in sorted((self.folder / "sending").iterdir()):
            message.rename(self.folder / "queue" / message.name)
        self.wait(f"count of {self.sent} tasks", lambda: self.counted() == self.sent)

    def counted(self) -> int:
        # Of fast tasks the published count lags.
        return len(re.findall(r"\] (?:succeeded in|raised) ", (self.folder / "log").read_text()))

    def records(self, window: str) -> dict[str, dict[str, Any]]:
        """Of one window, by kind."""
        lines = [line for path in (self.folder / "trace").glob("*.jsonl") for line in path.read_text().splitlines()]
        found = [json.loads(line) for line in lines]
        return {one["kind"]: one for one in found if one.get("id") == window}

    def trace(self, tasks: Sequence[str], runs: int = RUNS, frames: int = 1) -> Window:
        """A window in which each of the tasks ran so often and nothing else did."""
        window = tasks[0].replace("_", "-")
        self.run(tasks, WARM)
        request = self.folder / "windows" / f"{UNIT}.json"
        asked = {"id": window, "window_s": 60, "frames": frames, "until": time.time() + 30}
        whole = request.with_name("part")
        whole.write_text(json.dumps(asked))
        whole.rename(request)
        # It is looked for at the end of a task.
        deadline = time.monotonic() + PATIENCE_S
        while "window_open" not in self.records(window):
            assert time.monotonic() < deadline, f"no window for {window}:\n{(self.folder / 'log').read_text()[-3000:]}"
            self.run(tasks[:1], 1)
        self.run(tasks, runs)
        request.unlink()
        self.wait(f"end of window {window}", lambda: "window_close" in self.records(window))
        found = self.records(window)
        return Window(found["growth"], found["window_close"], runs)

    def end(self) -> None:
        """Whatever came of the test, of the session that was started here nothing stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_extension(tmp_path_factory.mktemp("extension"))


@pytest.fixture(scope="module")
def traced(extension: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Window]]:
    """The window of a pool and task. All workers are started when the first is asked for, and work side by side."""
    # What is judged by RSS comes first in its worker: the windows leave free memory behind, which hides growth.
    first = ["native", "unclosed", "module_cache", "collector", "method_cache", "kept_errors"]
    second = ["fragmentation", "filling_cache", "kept_closures", "handlers", "third_party", "mended"]
    plans: list[tuple[str, list[str], dict[str, str]]] = [
        ("solo", first, {}),
        ("solo", second, {}),
        ("prefork", ["copy_on_write", "copy_on_write_mended"], {"BOXOFFICE_PRICED_SEATS": str(SEATS)}),
        *((pool, ["module_cache"], {}) for pool in ("prefork", "threads", "gevent", "eventlet")),
    ]
    workers: list[Worker] = []

    def follow(pool: str, tasks: list[str], environment: dict[str, str]) -> dict[tuple[str, str], Window]:
        workers.append(worker := Worker(tmp_path_factory.mktemp(pool), pool, extension, **environment))
        try:
            return {
                (pool, task): worker.trace(MENDED, runs=20) if task == "mended" else worker.trace([task])
                for task in tasks
            }
        finally:
            worker.end()

    with ThreadPoolExecutor(3) as side_by_side:
        futures: dict[tuple[str, str], Future[dict[tuple[str, str], Window]]] = {}
        for plan in plans:
            future = side_by_side.submit(follow, *plan)
            futures |= {(plan[0], task): future for task in plan[1]}
        yield lambda pool, task: futures[pool, task].result()[pool, task]
    for worker in workers:
        worker.end()


def named(window: Window, file: Path, function: str) -> None:
    """What kept most is the marked line."""
    top = window.growth["sites"][0]
    assert (top["file"], top["function"]) == (str(file), function)
    assert file.read_text().splitlines()[top["line"] - 1].endswith("# the leak")
    assert top["growth_kb"] >= KEPT_KB * window.runs


@pytest.mark.parametrize("task", PYTHON)
def test_a_leak_of_python_objects_is_named_by_line_and_task(traced: Callable[..., Window], task: str) -> None:
    window = traced("solo", task)
    named(window, *PYTHON[task])
    [culprit, *_] = culprits([window.growth])
    assert (culprit["task"], culprit["share"] > 0.9) == (f"boxoffice.leaks.{task}", True)
    assert leak_class([window.growth]) == ("cache_filling" if task == "filling_cache" else "python_objects")
    assert window.close["reason"] == "called off"


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet"])
def test_so_it_is_in_every_pool(traced: Callable[..., Window], pool: str) -> None:
    window = traced(pool, "module_cache")
    named(window, LEAKS, "module_cache")
    assert leak_class([window.growth]) == "python_objects"


@pytest.mark.parametrize("task", OTHERS)
def test_other_leaks_are_told_by_their_kind(traced: Callable[..., Window], task: str) -> None:
    window = traced("prefork" if task == "copy_on_write" else "solo", task)
    assert leak_class([window.growth]) == OTHERS[task], gains([window.growth])


def test_the_mended_ones_are_no_leak(traced: Callable[..., Window]) -> None:
    for window in (traced("solo", "mended"), traced("prefork", "copy_on_write_mended")):
        ours = [one for one in window.growth["sites"] if one["file"] in (str(LEAKS), str(LIBRARY))]
        assert sum(one["growth_kb"] for one in ours) < KEPT_KB
        assert [one for one in culprits([window.growth]) if one["file"]] == []
        assert leak_class([window.growth]) == "unknown", gains([window.growth])
        assert window.growth["fds"]["growth"] == 0
