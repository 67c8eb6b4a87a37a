"""One fault after the other with Redis as the broker: each number is done, and by graceful faults once.

The worker `gate` of demo-2 runs them, and each notes its run in the broker on demo-1. The table is printed at the end.
"""

from __future__ import annotations

import json
import re

import pytest

from .lab_fleet import Fleet
from .numbered import HANG, PID, UNIT, Row, table, under_load

CGROUP = f"/sys/fs/cgroup/celery.slice/{UNIT}"
ROWS: list[Row] = []


def test_a_restart(fleet: Fleet) -> None:
    before = fleet.on("demo-2", PID)
    under_load(fleet, ROWS, "systemctl restart", True, ("demo-2", f"systemctl restart {UNIT}"))
    assert fleet.on("demo-2", PID) != before


def test_a_restart_by_the_guard(fleet: Fleet) -> None:
    """Each task leaks 6 MiB, and so the worker is near MemoryHigh before all are done."""
    before = fleet.on("demo-2", PID)
    under_load(fleet, ROWS, "restart by the guard", True, options="--keep-kb=6144")
    assert fleet.on("demo-2", PID) != before
    acts = [json.loads(line) for line in fleet.on("demo-2", "cat /var/log/plimsoll/guard/acts.jsonl").splitlines()]
    # The last one: it may have had to act in the files before.
    act = [one for one in acts if one["action"] == "restart"][-1]
    assert act["unit"] == UNIT and "MemoryHigh" in act["reason"], acts
    assert "oom_kill 0" in fleet.on("demo-2", f"cat {CGROUP}/memory.events")


def test_a_child_that_is_killed(fleet: Fleet) -> None:
    child = f"kill -9 $(pgrep -P $({PID}) | tail -n 1)"
    before = fleet.on("demo-2", PID)
    under_load(fleet, ROWS, "kill -9 of a child", False, ("demo-2", child))
    assert fleet.on("demo-2", PID) == before


def test_a_child_that_the_kernel_kills_at_memory_max(fleet: Fleet) -> None:
    """One task takes more than MemoryMax at once, faster than MemoryHigh and the guard can act."""
    fleet.on("demo-2", f"systemctl stop plimsoll-guard; echo max > {CGROUP}/memory.high")
    before = fleet.on("demo-2", PID)
    under_load(fleet, ROWS, "OOM kill at MemoryMax", False, options="--hog-mb=500")
    # What died is the child: OOMPolicy=continue.
    assert "oom_kill 1" in fleet.on("demo-2", f"cat {CGROUP}/memory.events")
    assert fleet.on("demo-2", PID) == before
    fleet.on("demo-2", "systemctl start plimsoll-guard")


def test_a_main_process_that_is_killed(fleet: Fleet) -> None:
    """Three times, as each could lose the message that Redis has just handed out."""
    killed = f"for n in 1 2 3; do kill -9 $({PID}); sleep 1; systemctl start {UNIT}; done"
    under_load(fleet, ROWS, "kill -9 of the main process", False, ("demo-2", killed))


def test_a_loop_that_hangs(fleet: Fleet) -> None:
    """The worker waits for a message as it hangs, and Redis hands it the next one."""
    before = fleet.on("demo-2", PID)
    under_load(fleet, ROWS, "event loop that hangs", False, ("demo-1", HANG))
    assert fleet.on("demo-2", PID) != before
    said = fleet.on("demo-2", f"journalctl --unit={UNIT} --output=cat --lines=400")
    # Whose stack shows where; and systemd did not have to wait for its own deadline.
    assert "its event loop has not run for" in said and re.search(r'faults\.py", line \d+ in hang', said), said
    assert "Watchdog request" in said, said


def test_a_broker_that_is_restarted(fleet: Fleet) -> None:
    under_load(fleet, ROWS, "restart of the broker", False, ("demo-1", "systemctl restart redis-server"))


def test_what_ended_is_collected_with_what_was_said_of_it(fleet: Fleet) -> None:
    """Before the reboot, which takes the journal with it."""
    ran = fleet.play("collect", "--limit=demo-2", "--extra-vars=collect_scope=routine")
    assert ran.code == 0, ran.output
    told = fleet.query(f"SELECT source, message FROM events WHERE host = 'demo-2' AND unit = '{UNIT}' ORDER BY time")

    def said(source: str, words: str) -> bool:
        return any(one["source"] == source and words in one["message"] for one in told)

    assert said("guard", "restart: "), told
    assert said("kernel", "oom-kill:constraint=CONSTRAINT_MEMCG"), told
    assert said("systemd", "Main process exited, code=killed, status=9/KILL"), told
    assert said("systemd", "Watchdog timeout") or said("systemd", "watchdog"), told
    # Of a child that was killed it is Celery who tells.
    assert said("worker", "WorkerLostError"), told
    assert not any("redis://:" in one["message"] for one in told), told


def test_a_host_that_reboots(fleet: Fleet) -> None:
    before = fleet.on("demo-2", "cat /proc/sys/kernel/random/boot_id")
    under_load(fleet, ROWS, "reboot of the host", True, ("demo-2", "systemctl reboot"))
    assert fleet.on("demo-2", "cat /proc/sys/kernel/random/boot_id") != before


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(table(ROWS))
    assert len(ROWS) == 8
