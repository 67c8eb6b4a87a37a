"""diagnose.yml on real machines, with the fleet that the main job leaves: the canary, its line, no window left open."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .lab_fleet import BIN, ROOT, Fleet
from .numbered import UNIT

TASKS = Path(__file__).resolve().parents[1] / "lab" / "app" / "boxoffice" / "tasks.py"
LINE = next(at for at, text in enumerate(TASKS.read_text().splitlines(), 1) if '_seen[f"ticket' in text)
CULPRIT = f"python_objects, task boxoffice.tasks.scan_ticket at boxoffice/tasks.py:{LINE} in scan_ticket"
# The bootstrap is armed there, and so the line is known before anybody asks.
AGAIN = f"--extra-vars={json.dumps({'diagnose_all': True, 'diagnose_window_s': 12, 'diagnose_frames': 2})}"
# One load all the while, as two bursts in some minutes may be anything. The leak of 0.3 MB a second is to have room for
# a window in 320 MiB, and not to wake the guard.
LOAD, SEEN_S, LATER_S = "--seconds 900 --rate 1", 90, 60
PATIENCE_S = 60


@pytest.fixture(scope="module")
def load(fleet: Fleet) -> Iterator[None]:
    """Under way for SEEN_S already."""
    with fleet.sending(f"boxoffice.peak {LOAD}") as end:
        time.sleep(SEEN_S)
        yield
        end()


def requests(fleet: Fleet, host: str) -> list[str]:
    return fleet.on(host, "ls -A /run/plimsoll/windows").split()


def asked_for(fleet: Fleet, host: str) -> list[dict[str, Any]]:
    """The trace records of windows on request that a host holds, by time."""
    lines = fleet.on(host, "cat /var/log/plimsoll/trace/*.jsonl || true").splitlines()
    found = [json.loads(line) for line in lines if '"id"' in line]
    return sorted((one for one in found if one.get("id")), key=lambda one: one["time"])


def test_check_mode_says_who_would_be_traced_and_traces_nobody(fleet: Fleet, load: None) -> None:
    ran = fleet.play("collect")
    assert ran.code == 0 and "LEAK growing" in ran.output, ran.output
    ran = fleet.play("diagnose", "--check", "--diff", AGAIN)
    assert ran.code == 0, ran.output
    assert "TRACE demo-2 celery-worker@gate: growing" in ran.said, ran.output
    assert f"+{UNIT}: a tracing window of 12 s, 2 frames" in ran.output
    for host in ("demo-1", "demo-2"):
        assert requests(fleet, host) == [] and asked_for(fleet, host) == []


def test_a_canary_under_load_names_its_line_and_the_findings_have_it(fleet: Fleet, load: None) -> None:
    before = fleet.findings()["generated"]
    ran = fleet.play("diagnose", AGAIN)
    assert ran.code == 0, ran.output
    assert f"demo-2 celery-worker@gate: {CULPRIT}" in ran.said, ran.output
    found = fleet.findings()
    assert found["generated"] > before
    (gate,) = [one for one in found["workers"] if one["unit"] == UNIT]
    assert gate["leak_class"] == "python_objects"
    assert (gate["culprits"][0]["task"], gate["culprits"][0]["line"]) == ("boxoffice.tasks.scan_ticket", LINE)
    # One window in one process of one worker, which was over by itself; the worker that does not leak had none.
    records = asked_for(fleet, "demo-2")
    assert [one["kind"] for one in records] == ["window_open", "growth", "window_close"], records
    assert len({(one["id"], one["pid"]) for one in records}) == 1 and records[-1]["reason"] == "window over"
    assert asked_for(fleet, "demo-1") == []
    for host in ("demo-1", "demo-2"):
        assert requests(fleet, host) == []


def test_a_second_run_passes_over_what_is_known(fleet: Fleet, load: None) -> None:
    # The child that was traced took fewer tasks for that long, which is much of the minutes that were seen so far.
    time.sleep(LATER_S)
    ran = fleet.play("collect")
    assert ran.code == 0 and "LEAK growing" in ran.output, ran.output
    ran = fleet.play("diagnose")
    assert ran.code == 0 and {changed for changed, _ in ran.recap.values()} == {0}, ran.output
    assert f"pass over demo-2 celery-worker@gate: known already: {CULPRIT}" in ran.said, ran.output
    assert "No worker is traced" in ran.said
    assert len(asked_for(fleet, "demo-2")) == 3


def test_a_controller_that_goes_away_leaves_no_request(fleet: Fleet) -> None:
    given = f"--args={json.dumps({'units': [UNIT], 'window_s': 600})}"
    words = [f"--inventory={fleet.inventory}", "demo-2", "--become", "--module-name=trace_window", given]
    controller = subprocess.Popen(
        [str(BIN / "ansible"), *words],
        cwd=ROOT,
        env=fleet.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while requests(fleet, "demo-2") != [f"{UNIT}.json"]:
            assert controller.poll() is None and time.monotonic() < deadline, "it did not ask"
            time.sleep(0.5)
        # As Ctrl-C does.
        os.killpg(controller.pid, signal.SIGINT)
        deadline = time.monotonic() + PATIENCE_S
        while requests(fleet, "demo-2"):
            assert time.monotonic() < deadline, "the request stays"
            time.sleep(0.5)
    finally:
        controller.kill()
        controller.communicate()
    # What comes next finds a worker that has not grown, as the main job left it.
    fleet.on("demo-2", f"systemctl restart {UNIT}")
