"""One act of a remediation on its host: the drop-in, the restart, whether the worker works after it; and the way back.

For hosts, Python 3.9. What is to be done was decided on the controller (remedy.py); nothing is decided here but whether
it went well.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hostfiles import Change, Entry, complaints, plan, read, write
from .release import FIND_APP, ReleaseError, check, run_in_release
from .release import answer as said_by

UNITS = Path("/etc/systemd/system")
# A drop-in of plimsoll's own, behind that of roles/celery_worker and before an administrator's 90-*.conf.
DROPIN = "60-remedy.conf"
PREFIX, SUFFIX = "celery-worker@", ".service"
LIBRARIES, PROC = Path("/usr/lib"), Path("/proc")
# Of the environment of a service, what is for its main process alone.
OF_ONE_PROCESS = re.compile(
    r"NOTIFY_SOCKET|WATCHDOG_|LISTEN_|FDSTORE|INVOCATION_ID|JOURNAL_STREAM|SYSTEMD_|MEMORY_PRESSURE_|MAINPID"
    r"|CELERY_ARGS|CELERY_REMEDY_ARGS|CELERY_WORKER_"
)
PROPERTIES = (
    "Id,LoadState,ActiveState,InactiveExitTimestampMonotonic,Environment,MemoryHigh,NeedDaemonReload,RuntimeMaxUSec,"
    "Restart"
)
# As systemd writes a span of time, in seconds.
SPANS = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800, "month": 2629800, "y": 31557600}
# What of the environment Celery is started with, in this order.
ARGS = ("CELERY_ARGS", "CELERY_REMEDY_ARGS")
# Messages that are no growth of a queue: some are always on their way.
SLACK = 10
# A queue that is longer than before, and shorter than so many seconds ago, is being worked off.
FALLING_S = 10.0

# Asked in one process, as importing the application costs more than all questions. A queue that is not there is empty.
DEPTHS = (
    FIND_APP
    + """
import time
def depth(connection, queue):
    # Of Redis a queue is a list, and to declare one makes nothing; a passive declaration asks without global_keyprefix.
    passive = connection.transport.driver_type != "redis"
    try:
        # A channel of its own: RabbitMQ closes one on which a queue was asked for that is not there.
        with connection.channel() as channel:
            return channel.queue_declare(queue=queue, passive=passive).message_count
    except connection.channel_errors as error:
        # Others are no sign of an empty queue: a permission that is missing, a key of another type.
        if str(getattr(error, "reply_code", "")) != "404":
            raise
        return 0
deadline, before = time.monotonic() + float(sys.argv[2]), json.loads(sys.argv[3])
slack, falling = int(sys.argv[4]), float(sys.argv[5])
seen = []
while True:
    with app.connection_for_read() as connection:
        now = {queue: depth(connection, queue) for queue in sys.argv[6:]}
    seen.append((time.monotonic(), now))
    while len(seen) > 1 and seen[1][0] <= seen[-1][0] - falling:
        seen.pop(0)
    old = seen[0][1] if seen[0][0] <= seen[-1][0] - falling else now
    longer = [queue for queue in now if now[queue] > before.get(queue, now[queue]) + slack]
    grown = [queue for queue in longer if not now[queue] < old[queue]]
    if not grown or time.monotonic() >= deadline:
        break
    time.sleep(1)
answer({"depths": now, "grown": grown})
"""
)


@dataclass(frozen=True)
class How:
    """Where the workers' application is, and how long things may take, in seconds: a restart, an answer, a queue."""

    home: Path
    app: str
    user: str
    restart_s: int
    ready_s: int
    settle_s: int


class Failed(Exception):
    """A step did not go well; the message says which, and why. journal has the last lines of the unit."""

    def __init__(self, message: str, journal: str = "") -> None:
        super().__init__(message)
        self.journal = journal


@dataclass
class Outcome:
    """What came of an act. done: it is in force; stop: no further act is to begin, why says so.

    journal is what the unit said last, which may be anything: it is for whoever looks on, and is not kept.
    """

    id: str
    unit: str
    done: bool = False
    changed: bool = False
    stop: bool = False
    why: str = ""
    ended: float = 0.0
    away_s: float = 0.0
    journal: str = ""

    def as_data(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "journal"}
        return {**kept, "ended": round(self.ended, 3), "away_s": round(self.away_s, 1)}


def path_of(unit: str) -> Path:
    return UNITS / f"{unit}.d" / DROPIN


# ---- the state ----


def installed(units: Path = UNITS) -> list[str]:
    """Units that have a drop-in of ours, declared or not."""
    return sorted(path.parent.name.removesuffix(".d") for path in units.glob(f"{PREFIX}*{SUFFIX}.d/{DROPIN}"))


def states(units: Sequence[str]) -> list[dict[str, Any]]:
    """remedy.State of each unit that systemd knows. Raises OSError."""
    if not units:
        return []
    ran = _systemctl("show", f"--property={PROPERTIES}", "--", *units)
    if ran.returncode:
        raise OSError(ran.returncode, f"systemctl show: {ran.stderr.strip()}")
    version = _systemctl("--version").stdout.split()
    offset = time.time() - time.monotonic()
    jemalloc = next((str(path) for path in sorted(LIBRARIES.glob("*/libjemalloc.so.2"))), "")
    return parse(ran.stdout, offset, jemalloc, int(version[1]) if version[1:2] and version[1].isdigit() else 0)


def parse(shown: str, offset: float, jemalloc: str, systemd: int, units: Path = UNITS) -> list[dict[str, Any]]:
    """Out of what `systemctl show --property=PROPERTIES` prints; offset leads from CLOCK_MONOTONIC to Unix seconds."""
    found = []
    for block in shown.strip().split("\n\n"):
        one = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if one.get("LoadState") != "loaded":
            continue
        environment = dict(word.partition("=")[::2] for word in shlex.split(one.get("Environment", "")))
        began, high = one.get("InactiveExitTimestampMonotonic", ""), one.get("MemoryHigh", "")
        folder = units / f"{one['Id']}.d"
        there = read(str(folder / DROPIN))
        found.append(
            {
                "unit": one["Id"],
                "active": one.get("ActiveState") == "active",
                "since": round(int(began) / 1e6 + offset, 3) if began.isdigit() and int(began) else None,
                "dropin": there.content,
                "restart": one.get("Restart", ""),
                "runtime_max_s": seconds(one.get("RuntimeMaxUSec", "")),
                # On disk is what systemd has not read.
                "stale": one.get("NeedDaemonReload") == "yes",
                # Of the directory, which changes with a removal too.
                "changed": round(folder.stat().st_mtime, 3) if folder.is_dir() else None,
                "args": " ".join(filter(None, (environment.get(name, "") for name in ARGS))),
                # Without a limit it is infinity, before cgroup v2 a number of 64 bits.
                "memory_high_kb": int(high) >> 10 if high.isdigit() and int(high) < 1 << 60 else None,
                "jemalloc": jemalloc,
                "systemd": systemd,
            }
        )
    return found


def _state(unit: str) -> dict[str, Any] | None:
    return next(iter(states([unit])), None)


def environment_of(unit: str) -> dict[str, str]:
    """What a worker that runs was started with, but for what systemd says to that one process. Raises OSError.

    From the host itself, so that no secret has to come with the act.
    """
    pid = _systemctl("show", "--value", "--property=MainPID", "--", unit).stdout.strip()
    words = (PROC / pid / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
    pairs = (word.partition("=")[::2] for word in words if "=" in word)
    return {name: value for name, value in pairs if not OF_ONE_PROCESS.match(name)}


def seconds(span: str) -> float | None:
    """Of a span as systemd prints it, as in `1d 2h 3min 4.5s`; None for infinity, and for what is none."""
    parts = re.findall(r"([0-9.]+)([a-z]+)", span)
    if not parts or any(unit not in SPANS for _, unit in parts):
        return None
    return sum(float(number) * SPANS[unit] for number, unit in parts)


def _systemctl(*words: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """What it printed. Out of time, systemd goes on with its job, and the exit code is 124, as of timeout(1)."""
    try:
        return subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"not done within {timeout} s; systemd goes on with it")


# ---- an act ----


def change_of(act: Mapping[str, Any]) -> list[Change]:
    """What an act writes or removes, where that is not so already. Raises OSError, and ValueError."""
    if act["act"] != "remove" and not act["dropin"]:
        return []
    path = str(path_of(act["unit"]))
    wanted = Entry(path, "absent") if act["act"] == "remove" else Entry(path, "file", act["dropin"])
    return plan([wanted], [read(path)])


def needed(act: Mapping[str, Any]) -> bool:
    """Whether it is still to be done: a run that was interrupted may have done it. Raises OSError, and ValueError."""
    changes = change_of(act)
    state = _state(act["unit"])
    if state is None or not state["active"]:
        return act["act"] == "remove" and bool(changes)
    if act["act"] == "cordon" or changes:
        return True
    if act["act"] == "recycle":
        # Told in Unix seconds by two clocks that are read one after the other, it is never quite the same.
        return bool((state["since"] or 0.0) < (act["since"] or 0.0) + 1)
    return bool(state["stale"] or (state["since"] or 0.0) <= (state["changed"] or 0.0))


def perform(act: Mapping[str, Any], how: How) -> Outcome:
    """Do one act, see that the worker works after it, and go back where it does not. Raises nothing."""
    outcome = Outcome(act["id"], act["unit"])
    changes: list[Change] = []
    try:
        changes = change_of(act)
        state = _state(act["unit"])
        if state is None or not state["active"]:
            # Whoever has stopped it, or taken it off the list, does not want it started.
            if act["act"] == "remove":
                outcome.done, outcome.changed = True, bool(changes)
                _put(changes)
            else:
                outcome.why = f"{act['unit']} does not run, and is not started by this"
            return outcome
        if not needed(act):
            outcome.done, outcome.why = True, "it was in force already"
            return outcome
        if act["act"] == "cordon":
            _cordon(act, how)
            outcome.done = outcome.changed = True
            return outcome
        if said := complaints([change.after for change in changes]):
            raise Failed(f"systemd-analyze verify refuses the drop-in, nothing was written:\n{said}")
        environment = environment_of(act["unit"])
        before = depths(act["queues"], how, environment)
    except (Failed, ReleaseError, OSError, ValueError) as error:
        outcome.stop, outcome.why = True, f"{act['unit']}: {error}"
        return outcome
    finally:
        outcome.ended = time.time()
    outcome.changed = True
    try:
        _put(changes)
        outcome.away_s = restart(act["unit"], how, environment)
        outcome.done, outcome.ended = True, time.time()
    except (Failed, ReleaseError, OSError, ValueError) as error:
        outcome.stop, outcome.why = True, f"{act['unit']}: {error}"
        outcome.journal = error.journal if isinstance(error, Failed) else ""
        back(act["unit"], changes, how, environment, outcome)
        outcome.ended = time.time()
    else:
        _settled(act, before, how, environment, outcome)
    return outcome


def _put(changes: Sequence[Change]) -> None:
    """Raises OSError, and ValueError."""
    for change in changes:
        write(change.after)
    _systemctl("daemon-reload")


def _settled(
    act: Mapping[str, Any], before: Mapping[str, int], how: How, environment: Mapping[str, str], outcome: Outcome
) -> None:
    """Whether its queues are as short as before, or are being worked off; the act stands either way."""
    try:
        after = depths(act["queues"], how, environment, before)
    except (ReleaseError, OSError, ValueError) as error:
        outcome.stop, outcome.why = True, f"{act['unit']}: its queues could not be asked: {error}"
        return
    if grown := after.pop("", 0) and [queue for queue in after if after[queue] > before.get(queue, 0) + SLACK]:
        said = ", ".join(f"{queue} from {before.get(queue, 0)} to {after[queue]}" for queue in grown)
        outcome.stop = True
        outcome.why = (
            f"{act['unit']} is back and takes tasks, but its queue grows ({said}), so no further worker is touched"
        )


def restart(unit: str, how: How, environment: Mapping[str, str]) -> float:
    """Seconds from the warm shutdown until the new worker answers and takes a task. Raises Failed and ReleaseError."""
    began = time.monotonic()
    _systemctl("reset-failed", "--", unit)
    ran = _systemctl("restart", "--", unit, timeout=how.restart_s)
    if ran.returncode:
        raise Failed(f"systemctl restart: {ran.stderr.strip()}", journal(unit))
    name = unit[len(PREFIX) : -len(SUFFIX)]
    silent, idle = check(how.home / "current", how.app, how.user, dict(environment), [name], how.ready_s)
    if silent or idle:
        what = "does not answer" if silent else "answers, and takes no task"
        raise Failed(f"it {what} within {how.ready_s} s", journal(unit))
    return time.monotonic() - began


def back(unit: str, changes: Sequence[Change], how: How, environment: Mapping[str, str], outcome: Outcome) -> None:
    """Put back what the host had. Said in the outcome, and so is where that did not work."""
    try:
        for change in changes:
            if change.before.state == "absent":
                Path(change.after.path).unlink(missing_ok=True)
            else:
                write(change.before)
        _systemctl("daemon-reload")
        restart(unit, how, environment)
        outcome.why += "; it is back at what it had, and works"
    except (Failed, ReleaseError, OSError, ValueError) as error:
        outcome.why += f"; going back failed too, so look at the host: {error}"


def depths(
    queues: Sequence[str], how: How, environment: Mapping[str, str], before: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Messages that wait in each queue; with before, once none is longer than that, or in how.settle_s.

    Where one then still is, and does not become shorter, the key "" is 1. Raises ReleaseError.
    """
    words = [how.app, str(how.settle_s if before else 0), json.dumps(before or {}), str(SLACK), str(FALLING_S), *queues]
    ran = run_in_release(how.home / "current", how.user, dict(environment), DEPTHS, *words)
    if ran.returncode:
        raise ReleaseError((ran.stderr.strip().splitlines() or ["asking the broker failed"])[-1])
    found = said_by(ran.stdout)
    return {**found["depths"], **({"": 1} if found["grown"] else {})}


CORDONS = (
    FIND_APP
    + """
import time
node, queues = sys.argv[2], sys.argv[3:]
for queue in queues:
    app.control.cancel_consumer(queue, destination=[node], reply=True, timeout=15)
left = app.control.inspect(timeout=15, destination=[node]).active_queues()
answer({"left": sorted(one["name"] for one in left[node]) if left else None})
"""
)


def _cordon(act: Mapping[str, Any], how: How) -> None:
    """Raises Failed where the worker goes on to take tasks, and ReleaseError."""
    node = f"{act['unit'][len(PREFIX) : -len(SUFFIX)]}@{socket.gethostname()}"
    environment = environment_of(act["unit"])
    ran = run_in_release(how.home / "current", how.user, environment, CORDONS, how.app, node, *act["queues"])
    if ran.returncode:
        raise ReleaseError((ran.stderr.strip().splitlines() or ["asking the worker failed"])[-1])
    left = said_by(ran.stdout)["left"]
    if left is None:
        raise Failed("it does not answer, so it is not cordoned")
    if left:
        raise Failed(f"it still consumes {', '.join(left)}")


def journal(unit: str) -> str:
    """The last lines that it said: the reason is there."""
    log = ["journalctl", "--unit", unit, "--lines", "8", "--no-pager", "--output", "cat"]
    return f"{unit}:\n{subprocess.run(log, capture_output=True, text=True).stdout.strip()}"
