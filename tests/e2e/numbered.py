"""Numbered tasks under steady load, one fault in the middle, and how often each was done in the end."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from .lab_fleet import IN_APP, Fleet, Ran

# Back after a fault that needs the visibility timeout (30 s), on a slow machine.
PATIENCE_S = 240
COUNT = 40
# Of the worker that runs them, on demo-2.
UNIT = "celery-worker@gate.service"
PID = f"systemctl show --value -p MainPID {UNIT}"
HANG = f"""{IN_APP} -c 'from boxoffice import app; app.control.broadcast("hang", destination=["gate@demo-2"])'"""


@dataclass(frozen=True)
class Row:
    fault: str
    graceful: bool
    done: int
    twice: int
    seconds: float


def table(rows: list[Row]) -> str:
    lines = [f"\n{'fault':<28} {'to be done':<14} {'sent':>4} {'done':>4} {'twice':>5} {'seconds':>7}"]
    for row in rows:
        wanted = "exactly once" if row.graceful else "at least once"
        lines.append(f"{row.fault:<28} {wanted:<14} {COUNT:>4} {row.done:>4} {row.twice:>5} {row.seconds:>7.0f}")
    return "\n".join(lines)


def runs(fleet: Fleet, first: int, count: int) -> dict[int, list[str]]:
    """Of each number that was done, its runs: host, process, and begin and end in seconds.

    A Redis that is restarted answers later.
    """
    password = (fleet.home / "lab" / "redis_password").read_text().split()[0]
    ran = fleet.lab("ssh", "demo-1", f"REDISCLI_AUTH={password} redis-cli smembers boxoffice.runs")
    found: dict[int, list[str]] = {}
    for line in ran.output.splitlines():
        number, _, run = line.partition(" ")
        if number.isdigit() and first <= int(number) < first + count:
            found.setdefault(int(number), []).append(run)
    return found


def more_than_once(found: dict[int, list[str]]) -> dict[int, list[str]]:
    return {n: sorted(ran) for n, ran in found.items() if len(ran) > 1}


def under_load(
    fleet: Fleet,
    rows: list[Row],
    fault: str,
    graceful: bool,
    act: tuple[str, str] | None = None,
    options: str = "",
    sender: str = "demo-1",
    first: int = 1000,
) -> None:
    """Send from a host, do what act says (host, command) once some are done, and wait until all are."""
    first += 1000 * len(rows)
    sent = f"{IN_APP} -m boxoffice.numbers {first} {COUNT} {options}"
    came: list[Ran] = []
    sending = threading.Thread(target=lambda: came.append(fleet.lab("ssh", sender, sent)))
    sending.start()

    def done() -> dict[int, list[str]]:
        return runs(fleet, first, COUNT)

    deadline = time.monotonic() + PATIENCE_S
    while len(done()) < 6:
        assert time.monotonic() < deadline, f"{fault}: the load did not begin"
        time.sleep(1)
    if act:
        fleet.lab("ssh", *act)
    began = time.monotonic()
    sending.join()
    assert came and f"{COUNT} sent" in came[0].output, f"{fault}: the sender failed: {came}"
    while len(found := done()) < COUNT and time.monotonic() < deadline:
        time.sleep(2)
    seconds = time.monotonic() - began
    # As long as one that is done twice would take to show.
    time.sleep(3)
    found = done()
    row = Row(fault, graceful, len(found), len(more_than_once(found)), seconds)
    rows.append(row)
    assert row.done == COUNT, f"{row}: not done are {sorted(set(range(first, first + COUNT)) - set(found))}"
    if graceful:
        assert row.twice == 0, f"{row}: {more_than_once(found)}"
