"""`plimsoll soak` with real workers: what it says of the demo application and of broken ones, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from lab.patterns import LAB, LEAKS
from redis import Redis

PATIENCE_S = 120.0
SOAK = [sys.executable, "-c", "from plimsoll import cli; raise SystemExit(cli.main())", "soak"]

APP = """
import os
import signal
import time

from celery import Celery

app = Celery("shop", broker="redis://prod.example:6379/0")
app.conf.update(
    task_default_exchange="shop", task_default_exchange_type="topic", task_default_routing_key="task.default"
)
KEPT = []


@app.task(name="shop.add")
def add(number):
    return number + 1


@app.task(name="shop.chain")
def chain(number):
    leak.delay(number)


@app.task(name="shop.leak")
def leak(number):
    KEPT.append(bytes([number % 256]) * 20_000)


@app.task(name="shop.end_the_worker")
def end_the_worker():
    os.kill(os.getppid(), signal.SIGKILL)


@app.task(name="shop.slow")
def slow():
    time.sleep(60)


@app.task(name="shop.fails")
def fails():
    return {}["order"]
"""


class Gate:
    """plimsoll in a folder with an application, with a folder of its own for what is temporary."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder, folder / "scratch"
        self.scratch.mkdir()
        (folder / "shop.py").write_text(APP)

    def start(self, tasks: dict[str, Any], *more: str, app: str = "shop", **environ: str) -> subprocess.Popen[str]:
        (self.folder / "tasks.yml").write_text(json.dumps({"limits": {"rate": 400, "seconds": 60}} | tasks))
        options = ["-A", app, "--tasks", str(self.folder / "tasks.yml"), "--python", sys.executable]
        path = os.pathsep.join(filter(None, [environ.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]))
        return subprocess.Popen(
            [*SOAK, *options, *more],
            cwd=environ.pop("cwd", self.folder),
            env=os.environ | {"TMPDIR": str(self.scratch), "PYTHONPATH": path} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, tasks: dict[str, Any], *more: str, **environ: str) -> tuple[int, str, str]:
        """Exit status, and what it said. Nothing of it is left."""
        process = self.start(tasks, *more, **environ)
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        self.nothing_left()
        return process.returncode, out, err

    def processes(self) -> list[Path]:
        """Those that were told to work in our folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"PLIMSOLL_SOAK_DIR={self.scratch}".encode() in (path / "environ").read_bytes():
                    found.append(path)
        return found

    def nothing_left(self) -> None:
        assert self.processes() == []
        assert [path.name for path in self.scratch.iterdir() if path.name.startswith("plimsoll")] == []


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def named(*tasks: str, **more: Any) -> dict[str, Any]:
    return {"tasks": {task: {"args": ["{n}"]} for task in tasks}, **more}


def test_a_leaking_task_fails_by_its_line_a_mended_one_passes_and_a_cache_that_fills_is_told(gate: Gate) -> None:
    leaking, mended, filling = (
        f"boxoffice.leaks.{name}" for name in ("module_cache", "module_cache_mended", "filling_cache")
    )
    out = gate.folder / "out"
    tasks = named(leaking, mended, filling, runs=128)
    status, table, said = gate.run(tasks, "--out", str(out), app="boxoffice.leaks", cwd=str(LAB / "app"))
    assert status == 1, said
    document = json.loads((out / "soak.json").read_text())
    assert document["verdict"] == "fail"
    assert document["ended"] == "decided"
    found = {one["task"]: one for one in document["tasks"]}
    assert {task: one["verdict"] for task, one in found.items()} == {
        **{leaking: "fail", mended: "pass", filling: "undecided"}
    }
    # 200 kB a run.
    assert found[leaking]["growth_kb"] == pytest.approx(1000 * 200_000 / 1024, rel=0.1)
    [culprit, *_] = found[leaking]["leak"]["culprits"]
    assert (culprit["file"], culprit["task"]) == ("boxoffice/leaks.py", leaking)
    assert LEAKS.read_text().splitlines()[culprit["line"] - 1].endswith("# the leak")
    assert "boxoffice.leaks.photograph_of, of at most 500 entries; set warm" in found[filling]["why"]
    suites = ElementTree.parse(out / "junit.xml").getroot()
    assert [suites.get(name) for name in ("tests", "failures", "errors")] == ["3", "1", "1"]
    [failure] = suites.iter("failure")
    assert f"boxoffice/leaks.py:{culprit['line']}" in failure.get("message", "")
    assert f"boxoffice/leaks.py:{culprit['line']}" in table
    assert (out / "soak.html").read_text().count("<polyline") == 3


def test_an_application_that_keeps_nothing_passes_and_is_what_its_baseline_was(gate: Gate) -> None:
    tasks = named("shop.add", runs=128)
    assert gate.run(tasks, "--out", "before")[0] == 0
    baseline = gate.folder / "before" / "soak.json"
    # Celery's own command would take these.
    foreign = {"APP": "nowhere", "RESULT_BACKEND": "redis://127.0.0.1:1/0", "BROKER_URL": "redis://127.0.0.1:1/0"}
    status, table, _ = gate.run(tasks, "--out", "after", "--baseline", str(baseline), **foreign)
    assert status == 0
    after, before = (json.loads((gate.folder / name / "soak.json").read_text()) for name in ("after", "before"))
    assert after["schedule_sha256"] == before["schedule_sha256"]
    assert after["tasks"][0]["against_baseline"]["verdict"] == "same"
    assert "same" in table


def test_neither_queue_nor_exchange_is_the_applications(gate: Gate) -> None:
    """Which has one of its own, that other queues are bound to."""
    plan = {"app": "shop", "tasks": ["shop.add"], "settings": {}, "queue": "plimsoll-soak-1"}
    asked = f"""import plimsoll_soak
app = plimsoll_soak.application({plan!r})
queue, route = app.amqp.queues["plimsoll-soak-1"], app.amqp.router.route({{}}, "shop.add")
print(queue.exchange.name, queue.exchange.type, queue.routing_key, route["queue"].name, len(app.amqp.queues))"""
    path = str(LAB.parents[1] / "roles" / "soak" / "files")
    ran = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=gate.folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    own = "plimsoll-soak-1"
    assert ran.stdout.split() == [own, "direct", own, own, "1"], ran.stderr


def test_what_a_task_sends_runs_here_and_does_not_pass_unseen(gate: Gate) -> None:
    """And not at the application's own broker, which it names in its code."""
    out = gate.folder / "out"
    status, table, said = gate.run(named("shop.chain", runs=512), "--out", str(out))
    document = json.loads((out / "soak.json").read_text())
    sent = next(one for one in document["tasks"] if one["task"] == "shop.leak")
    assert sent["ran"] > 500 and not sent["planned"], said
    # By chance it runs several times in a row, and is judged itself; or the worker's growth is what tells.
    assert (status, sent["verdict"]) in ((1, "fail"), (3, "undecided")), table
    assert sent["verdict"] == "fail" or "name it in the tasks file" in table
    # 20 kB in each second task.
    assert document["worker"]["used_kb_per_1000_tasks"] == pytest.approx(1000 * 20_000 / 1024 / 2, rel=0.2)


def test_a_task_that_raises_is_not_judged(gate: Gate) -> None:
    status, table, _ = gate.run({"tasks": {"shop.fails": None}})
    assert status == 3
    assert "it raised in 128 of 128 runs (KeyError)" in table


@pytest.mark.parametrize(
    ("app", "task", "python", "says"),
    [
        ("nowhere", "shop.add", "", "-A nowhere: cannot be imported by"),
        ("shop", "shop.ad", "", "tasks: shop.ad: shop has no task of this name; it has shop.add"),
        ("shop", "shop.add", "/usr/bin/python3", "has no Celery"),
        ("shop", "shop.add", "/nowhere/python", "no such program"),
    ],
)
def test_what_does_not_run_is_said_with_the_way_out(gate: Gate, app: str, task: str, python: str, says: str) -> None:
    if python == "/usr/bin/python3" and not Path(python).exists():
        pytest.skip("no Python without Celery here")
    status, _, said = gate.run(named(task), *(["--python", python] if python else []), app=app)
    assert status == 2
    assert says in said
    assert "Traceback" not in said


def test_a_worker_that_dies_is_told_by_how(gate: Gate) -> None:
    status, _, said = gate.run({"tasks": {"shop.end_the_worker": None}})
    assert status == 2
    assert "the worker was ended by SIGKILL" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_it_leaves_nothing(gate: Gate, number: signal.Signals) -> None:
    process = gate.start({"tasks": {"shop.slow": None}})
    deadline = time.monotonic() + PATIENCE_S
    # The worker, its child, and the sender.
    while len(gate.processes()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "interrupted" in said
    gate.nothing_left()


def test_where_plimsoll_is_killed_the_worker_ends_too(gate: Gate) -> None:
    process = gate.start(named("shop.add", runs=1 << 20))
    deadline = time.monotonic() + PATIENCE_S
    while len(gate.processes()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()
    while gate.processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[Redis, int]]:
    """A redis-server with a password, and its port."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", "gr8-secret"]
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as server:
        redis = Redis(port=port, password="gr8-secret")
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                try:
                    redis.ping()
                    break
                except ConnectionError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield redis, port
        finally:
            server.terminate()


def test_a_broker_that_is_named_twice_keeps_what_others_have_there(gate: Gate, broker: tuple[Redis, int]) -> None:
    redis, port = broker
    redis.lpush("celery", "a task of somebody else's")
    place = f"127.0.0.1:{port}"
    named_once = ["--broker", f"redis://{place}/0"]
    status, _, said = gate.run(named("shop.add"), *named_once)
    assert status == 2
    assert f"--broker-again {place}" in said
    secret = {"PLIMSOLL_SOAK_BROKER_PASSWORD": "gr8-secret"}
    process = gate.start(named("shop.add", runs=128), *named_once, "--broker-again", place, **secret)
    seen = b""
    while process.poll() is None:
        for path in gate.processes():
            with contextlib.suppress(OSError):
                seen += (path / "cmdline").read_bytes()
        time.sleep(0.2)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert b"plimsoll_soak.py" in seen
    assert b"gr8-secret" not in seen
    assert "gr8-secret" not in out + said
    gate.nothing_left()
    assert redis.lrange("celery", 0, -1) == [b"a task of somebody else's"]
    assert [key for key in redis.scan_iter() if b"plimsoll" in key] == []


def test_what_a_worker_that_was_killed_had_taken_does_not_come_back(gate: Gate, broker: tuple[Redis, int]) -> None:
    redis, port = broker
    for tag, queue in {"1": "plimsoll-soak-1", "2": "celery"}.items():
        redis.hset("unacked", tag, json.dumps([{"body": ""}, queue, queue]))
        redis.zadd("unacked_index", {tag: 1.0})
    redis.lpush("plimsoll-soak-1", "a message that nobody took")
    plan = {"app": "shop", "tasks": ["shop.add"], "settings": {}, "queue": "plimsoll-soak-1", "parent": 0}
    (gate.folder / "plan.json").write_text(json.dumps(plan))
    program = LAB.parents[1] / "roles" / "soak" / "files" / "plimsoll_soak.py"
    ran = subprocess.run(
        [sys.executable, str(program), "clean", str(gate.folder)],
        cwd=gate.folder,
        env=os.environ | {"CELERY_BROKER_URL": f"redis://:gr8-secret@127.0.0.1:{port}/0"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert redis.hkeys("unacked") == [b"2"] and redis.zrange("unacked_index", 0, -1) == [b"2"]
    assert not redis.exists("plimsoll-soak-1") and redis.keys("*plimsoll-soak*") == []
