"""What a host's journal says of its workers: restarts, OOM kills and errors, with the lines before them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

# Messages of systemd about a unit that ended or was restarted, of the kernel that it killed, and of Celery, whose lines
# begin with [TIME: LEVEL/PROCESS], that something failed. journalctl goes by them, so that a worker which logs a line a
# task costs no Python.
TELLING = (
    r"OOM killer|oom[-_]kill|[Oo]ut of memory|Killed process|process exited|Failed with result|Scheduled restart"
    r"|start operation timed out|[Ww]atchdog timeout|\[[^]]*: (ERROR|CRITICAL)/|^(ERROR|CRITICAL)\b"
)
# After these, what the worker said just before is worth as much.
ENDED = re.compile(r"OOM killer|process exited|Failed with result|[Ww]atchdog timeout")
KERNEL = re.compile(r"oom[-_]kill|[Oo]ut of memory|Killed process")
# The unit that the kernel names the cgroup of.
CGROUP = re.compile(r"(?:task|oom)_memcg=\S*/(celery-worker@[^/,\s]+\.service)")
# Of one collection; of more, the newest.
MOST_EVENTS = 2_000
# Ends that are shown with what came before, and so many lines of it.
MOST_CONTEXTS, CONTEXT_LINES = 20, 20
MESSAGE_LENGTH = 2_000
# The first time, and after a long pause: as far back as this, seconds.
MOST_BACK_S = 7 * 86400
# journald writes a line some time after it was said, microseconds.
LAG_US = 2_000_000
# As in the URL of a broker, at times with a bare / or @ in it.
PASSWORD = re.compile(r"(?<=://)\S*@")
FIELDS = "MESSAGE,PRIORITY,_PID,UNIT,_SYSTEMD_UNIT,_TRANSPORT"
SECONDS = 60


class JournalError(Exception):
    """journalctl could not tell; the message says why."""


class Event(TypedDict):
    """time in Unix seconds; source is systemd, kernel or worker; priority as in syslog(3)."""

    time: float
    unit: str
    source: str
    priority: int
    pid: int | None
    message: str


def event(entry: Mapping[str, Any]) -> Event | None:
    """What an entry of `journalctl --output=json` says of a worker; None for one that is about something else.

    A worker may write to the journal what it likes, any field of it more than once.
    """
    message, priority, pid = entry.get("MESSAGE"), entry.get("PRIORITY"), entry.get("_PID")
    if isinstance(message, list) and all(isinstance(one, int) and 0 <= one < 256 for one in message):
        # Bytes that are no text are a list of numbers.
        message = bytes(message).decode(errors="replace")
    if not isinstance(message, str):
        return None
    kernel = entry.get("_TRANSPORT") == "kernel"
    # Anyone may say UNIT=; that it is systemd who does, says the kernel.
    systemd = pid == "1"
    named = CGROUP.search(message)
    if kernel and not KERNEL.search(message):
        return None
    unit = (named[1] if named else "") if kernel else str(entry.get("UNIT" if systemd else "_SYSTEMD_UNIT") or "")
    return {
        "time": _when(entry) / 1e6,
        "unit": unit,
        "source": "kernel" if kernel else "systemd" if systemd else "worker",
        "priority": int(priority) if priority in tuple("01234567") else 6,
        "pid": int(pid) if isinstance(pid, str) and pid.isdigit() else None,
        "message": PASSWORD.sub("***@", message)[:MESSAGE_LENGTH],
    }


def events(units: Sequence[str], since_us: int, until_us: int) -> tuple[list[Event], list[str], int]:
    """What happened to these units from since up to, and without, until, by time; what was left out; up to when.

    Times in microseconds. Without journalctl there is nothing. What it could not tell is to be asked again.
    """
    try:
        return _events(units, since_us, until_us)
    except JournalError as error:
        return [], [f"journal: {error}"], since_us


def _events(units: Sequence[str], since_us: int, until_us: int) -> tuple[list[Event], list[str], int]:
    units = sorted(units)
    names = [f"{field}={unit}" for field in ("_SYSTEMD_UNIT", "UNIT") for unit in units]
    # Of one field any, of several all; "+" is "or".
    about = [*names[: len(units)], "+", "_PID=1", *names[len(units) :], "+"] if units else []
    about.append("_TRANSPORT=kernel")
    # One more, to know that there are more. Without --reverse, systemd up to 252 takes the oldest.
    matching = _journal(f"--grep={TELLING}", f"--lines={MOST_EVENTS + 1}", *_span(since_us, until_us), *about)
    entries = sorted(matching, key=_when)
    left_out = [f"journal: more than {MOST_EVENTS} events, of which the newest are here"] * (len(entries) > MOST_EVENTS)
    found = {entry["__CURSOR"]: entry for entry in entries[-MOST_EVENTS:]}
    by_systemd = [entry for entry in found.values() if entry.get("_PID") == "1" and entry.get("UNIT") in units]
    ends = [entry for entry in by_systemd if ENDED.search(str(entry["MESSAGE"]))]
    for end in ends[-MOST_CONTEXTS:]:
        span = _span(since_us, _when(end))
        for entry in _journal(f"--lines={CONTEXT_LINES}", *span, f"_SYSTEMD_UNIT={end['UNIT']}"):
            found.setdefault(entry["__CURSOR"], entry)
    within = (one for one in found.values() if since_us <= _when(one) < until_us)
    told = filter(None, map(event, within))
    return sorted(told, key=lambda one: one["time"]), left_out, until_us


def _when(entry: Mapping[str, Any]) -> int:
    return int(entry["__REALTIME_TIMESTAMP"])


def _span(since_us: int, until_us: int) -> list[str]:
    """journalctl takes both ends in."""
    return [
        f"--since=@{since_us // 10**6}.{since_us % 10**6:06}",
        f"--until=@{until_us // 10**6}.{until_us % 10**6:06}",
    ]


def _journal(*words: str) -> Iterator[dict[str, Any]]:
    """The entries that journalctl finds, the newest first; one that cannot be read is left out. Raises JournalError."""
    how = ["--quiet", "--no-pager", "--reverse", "--all", "--output=json", f"--output-fields={FIELDS}"]
    try:
        ran = subprocess.run(["journalctl", *how, *words], capture_output=True, timeout=SECONDS)
    except FileNotFoundError:
        return
    except subprocess.TimeoutExpired:
        raise JournalError(f"journalctl took more than {SECONDS} s") from None
    # Where nothing matches, its status is 1 too.
    if ran.returncode and ran.stderr.strip():
        raise JournalError(ran.stderr.decode(errors="replace").strip().splitlines()[-1][:200])
    for line in ran.stdout.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {"MESSAGE", "__CURSOR", "__REALTIME_TIMESTAMP"}:
            yield entry


def lines(told: Iterable[Event]) -> bytes:
    """As in a bundle: JSON, one object a line."""
    return "".join(json.dumps(one) + "\n" for one in told).encode()
