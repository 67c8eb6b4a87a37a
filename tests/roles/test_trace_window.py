"""The module as a process of its own: what it asks a worker for, what it returns, and that no request outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GATE, SALES = "celery-worker@gate.service", "celery-worker@sales.service"
PATIENCE_S = 20.0
# As on a host, but for the wrapping: Ansible gives the parameters, and reads what is printed.
RUN = """
import json, sys
import conftest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import trace_window

with patch_module_args(json.loads(sys.argv[1])):
    trace_window.main()
"""


class Host:
    """A host with workers that systemd knows; what it says of them is made up."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.windows, self.traces = home / "windows", home / "trace"
        for folder in (self.windows, self.traces, home / "bin"):
            folder.mkdir()
        (home / "bin" / "systemctl").write_text(f"#!/bin/sh\ncat {home}/shown\n")
        (home / "bin" / "systemctl").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "tests"),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        }
        self.shows(active=[GATE, SALES])
        self.running: list[subprocess.Popen[str]] = []

    def shows(self, active: list[str], failed: tuple[str, ...] = ()) -> None:
        environment = f"PLIMSOLL_TRACE_MODE=armed PLIMSOLL_TRACE_DIR={self.traces} PLIMSOLL_WINDOWS_DIR={self.windows}"
        (self.home / "shown").write_text(
            "\n".join(
                f"Id={unit}\nLoadState=loaded\nActiveState={'failed' if unit in failed else 'active'}\n"
                f"Environment={environment}\n"
                for unit in [*active, *failed]
            )
        )

    def start(self, **given: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, json.dumps({"units": [GATE], **given})]
        pipe = subprocess.PIPE
        self.running.append(
            subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        )
        return self.running[-1]

    def run(self, **given: Any) -> dict[str, Any]:
        return answer(self.start(**given))

    def asked(self) -> list[str]:
        return sorted(path.name for path in self.windows.iterdir())

    def work(self, unit: str = GATE) -> threading.Thread:
        """A worker that takes one request, and holds its window open for a second."""

        def work() -> None:
            path = self.windows / f"{unit}.json"
            wait_for(path.exists)
            asked = json.loads(path.read_text())
            head = {"time": time.time(), "unit": unit, "pid": os.getpid(), "id": asked["id"]}
            grew = {"window_s": 1.0, "rss_growth_kb": 900, "traced_growth_kb": 800}
            with (self.traces / f"{unit}-{os.getpid()}.jsonl").open("a", buffering=1) as file:
                file.write(json.dumps({**head, "kind": "window_open"}) + "\n")
                time.sleep(asked["window_s"])
                file.write(json.dumps({**head, "kind": "growth", **grew}) + "\n")
                file.write(json.dumps({**head, "kind": "window_close", "reason": "window over"}) + "\n")

        thread = threading.Thread(target=work)
        thread.start()
        return thread


def wait_for(until: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert err == "", err
    told: dict[str, Any] = json.loads(out)
    assert bool(told.get("failed")) == bool(process.returncode)
    return told


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    for process in host.running:
        process.kill()
        process.wait()


def test_a_window_in_each_worker_at_the_same_time_and_no_request_left(host: Host) -> None:
    for unit in (GATE, SALES):
        host.work(unit)
    told = host.run(units=[GATE, SALES], window_s=1, frames=3, _ansible_diff=True)
    window = {
        **{"opened": True, "closed": True, "reason": "window over", "pid": os.getpid()},
        "growth": {"window_s": 1.0, "rss_growth_kb": 900.0, "traced_growth_kb": 800.0},
    }
    assert told["changed"] and told["windows"] == [{"unit": GATE, **window}, {"unit": SALES, **window}]
    assert told["diff"]["after"].splitlines()[0] == f"{GATE}: a tracing window of 1 s, 3 frames"
    assert host.asked() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_takes_the_request_back(number: signal.Signals, host: Host) -> None:
    process = host.start(window_s=3600)
    wait_for(host.asked)
    process.send_signal(number)
    told = answer(process)
    assert told["failed"] and told["msg"] == f"{GATE}: called off by {number.name}; no request is left"
    assert host.asked() == []


def test_nobody_who_listens_any_more_takes_the_request_back(host: Host) -> None:
    process = host.start(window_s=3600)
    wait_for(host.asked)
    assert process.stdout and process.stderr
    # As sshd does once the connection is gone.
    process.stdout.close()
    process.stderr.close()
    wait_for(lambda: not host.asked())
    process.wait(PATIENCE_S)


def test_killed_it_leaves_a_request_that_lapses_by_itself(host: Host) -> None:
    process = host.start(window_s=5)
    wait_for(host.asked)
    process.kill()
    (left,) = host.windows.iterdir()
    assert time.time() < json.loads(left.read_text())["until"] < time.time() + 5 + 31
    # Until then it is somebody's.
    told = host.run(window_s=5)
    assert told["failed"] and "is being diagnosed by somebody else" in told["msg"] and host.asked() == [left.name]


def test_check_mode_says_who_would_be_traced_and_changes_nothing(host: Host) -> None:
    told = host.run(_ansible_check_mode=True, _ansible_diff=True)
    assert told["changed"] and told["diff"]["after"] == f"{GATE}: a tracing window of 60 s, 1 frames\n"
    assert told["windows"][0]["reason"] == "check mode: it would be traced" and not told["windows"][0]["opened"]
    assert host.asked() == [] and not list(host.traces.iterdir())
    host.shows([], failed=(GATE,))
    told = host.run(_ansible_check_mode=True)
    assert told["failed"] and not told["changed"] and f"{GATE} is failed" in told["msg"]


def test_a_worker_that_cannot_be_traced_does_not_hold_up_its_neighbour(host: Host) -> None:
    host.shows([GATE], failed=(SALES,))
    host.work()
    told = host.run(units=[SALES, GATE], window_s=1)
    assert told["failed"] and told["msg"].startswith(f"{SALES} is failed, so nothing in it can be traced")
    assert [(one["unit"], one["closed"]) for one in told["windows"]] == [(GATE, True)]


def test_a_unit_that_systemd_does_not_name_and_a_length_that_is_none(host: Host) -> None:
    host.shows([])
    assert "is not on this host, though the inventory declares it" in host.run()["msg"]
    for given in ({"window_s": 0}, {"window_s": 3601}, {"frames": 0}, {"frames": 51}):
        assert "window_s is 1 to 3600 seconds, and frames 1 to 50" in host.run(**given)["msg"]


def test_ansible_ships_all_that_it_needs(host: Host) -> None:
    ansible = str(Path(sys.executable).with_name("ansible"))
    words = ["localhost", "--inventory=localhost,", "--connection=local", "--module-name=trace_window", "--one-line"]
    given = f"--args={json.dumps({'units': [GATE], 'window_s': 1})}"
    python = f"--extra-vars=ansible_python_interpreter={sys.executable}"
    work = host.work()
    ran = subprocess.run([ansible, *words, given, python], env=host.environment, capture_output=True, text=True)
    work.join()
    assert ran.returncode == 0 and '"reason": "window over"' in ran.stdout, ran.stdout + ran.stderr
