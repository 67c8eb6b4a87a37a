"""Numbered tasks under steady load, and one fault after the other: each number is done, and by graceful faults once.

The worker `gate` of demo-2 runs them, and each counts itself in the broker on demo-1. The table is printed at the end.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass

import pytest

from .lab_fleet import IN_APP, Fleet

UNIT = "celery-worker@gate.service"
CGROUP = f"/sys/fs/cgroup/celery.slice/{UNIT}"
PID = f"systemctl show --value -p MainPID {UNIT}"
# Back after a fault that needs the visibility timeout (30 s), on a slow machine.
PATIENCE_S = 240


@dataclass(frozen=True)
class Row:
    fault: str
    graceful: bool
    sent: int
    done: int
    twice: int
    seconds: float


ROWS: list[Row] = []


def counts(fleet: Fleet) -> dict[int, int]:
    """How often each number was done. A broker that is restarted answers later."""
    password = (fleet.home / "lab" / "redis_password").read_text().split()[0]
    ran = fleet.lab("ssh", "demo-1", f"REDISCLI_AUTH={password} redis-cli hgetall boxoffice.done")
    numbers = [int(line) for line in ran.output.splitlines() if line.isdigit()]
    return dict(zip(numbers[::2], numbers[1::2]))


def under_load(fleet: Fleet, fault: str, graceful: bool, act: list[tuple[str, str]], options: str = "") -> Row:
    """Send, do what act says (host, command) once some are done, and wait until all are."""
    first, count = 1000 * (len(ROWS) + 1), 40
    sent = f"{IN_APP} -m boxoffice.numbers {first} {count} {options}"
    sender = threading.Thread(target=fleet.lab, args=("ssh", "demo-1", sent))
    sender.start()

    def done() -> dict[int, int]:
        return {n: times for n, times in counts(fleet).items() if first <= n < first + count}

    deadline = time.monotonic() + PATIENCE_S
    while len(done()) < 6:
        assert time.monotonic() < deadline, f"{fault}: the load did not begin"
        time.sleep(1)
    for host, command in act:
        fleet.lab("ssh", host, command)
    began = time.monotonic()
    sender.join()
    while len(found := done()) < count and time.monotonic() < deadline:
        time.sleep(2)
    seconds = time.monotonic() - began
    # As long as one that is done twice would take to show.
    time.sleep(3)
    found = done()
    row = Row(fault, graceful, count, len(found), sum(times > 1 for times in found.values()), seconds)
    ROWS.append(row)
    assert row.done == row.sent, f"{row}: not done are {sorted(set(range(first, first + count)) - set(found))}"
    if graceful:
        assert row.twice == 0, f"{row}: {[n for n, times in found.items() if times > 1]}"
    return row


def test_a_restart(fleet: Fleet) -> None:
    before = fleet.on("demo-2", PID)
    under_load(fleet, "systemctl restart", True, [("demo-2", f"systemctl restart {UNIT}")])
    assert fleet.on("demo-2", PID) != before


def test_a_restart_by_the_guard(fleet: Fleet) -> None:
    """Each task leaks 6 MiB, and so the worker is near MemoryHigh before all are done."""
    before = fleet.on("demo-2", PID)
    under_load(fleet, "restart by the guard", True, [], "--keep-kb=6144")
    assert fleet.on("demo-2", PID) != before
    acts = [json.loads(line) for line in fleet.on("demo-2", "cat /var/log/plimsoll/guard/acts.jsonl").splitlines()]
    assert acts[0]["unit"] == UNIT and "MemoryHigh" in acts[0]["reason"], acts
    assert "oom_kill 0" in fleet.on("demo-2", f"cat {CGROUP}/memory.events")


def test_a_child_that_is_killed(fleet: Fleet) -> None:
    child = f"kill -9 $(pgrep -P $({PID}) | tail -n 1)"
    before = fleet.on("demo-2", PID)
    under_load(fleet, "kill -9 of a child", False, [("demo-2", child)])
    assert fleet.on("demo-2", PID) == before


def test_a_child_that_the_kernel_kills_at_memory_max(fleet: Fleet) -> None:
    """One task takes more than MemoryMax at once, faster than MemoryHigh and the guard can act."""
    fleet.on("demo-2", f"systemctl stop plimsoll-guard; echo max > {CGROUP}/memory.high")
    before = fleet.on("demo-2", PID)
    under_load(fleet, "OOM kill at MemoryMax", False, [], "--hog-mb=500")
    # What died is the child: OOMPolicy=continue.
    assert "oom_kill 1" in fleet.on("demo-2", f"cat {CGROUP}/memory.events")
    assert fleet.on("demo-2", PID) == before
    fleet.on("demo-2", "systemctl start plimsoll-guard")


def test_a_main_process_that_is_killed(fleet: Fleet) -> None:
    under_load(fleet, "kill -9 of the main process", False, [("demo-2", f"kill -9 $({PID})")])


def test_a_broker_that_is_restarted(fleet: Fleet) -> None:
    under_load(fleet, "restart of the broker", False, [("demo-1", "systemctl restart redis-server")])


def test_a_host_that_reboots(fleet: Fleet) -> None:
    before = fleet.on("demo-2", "cat /proc/sys/kernel/random/boot_id")
    under_load(fleet, "reboot of the host", True, [("demo-2", "systemctl reboot")])
    assert fleet.on("demo-2", "cat /proc/sys/kernel/random/boot_id") != before


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{'fault':<28} {'to be done':<14} {'sent':>4} {'done':>4} {'twice':>5} {'seconds':>7}")
        for row in ROWS:
            wanted = "exactly once" if row.graceful else "at least once"
            print(f"{row.fault:<28} {wanted:<14} {row.sent:>4} {row.done:>4} {row.twice:>5} {row.seconds:>7.0f}")
    assert len(ROWS) == 7
