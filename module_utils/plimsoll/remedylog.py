"""The log of remediation: a line of JSON for each act that was planned, done, gone back on or proven. Only added to.

It is STORE/remediation.jsonl, beside what the workers were judged by. What of it is true of a worker now is known().
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict, cast

import psutil

from .files import write_whole
from .lines import InputError

LOG, LOCK = "remediation.jsonl", ".remediation.lock"
CORDON, REMOVE, TRACE = "cordon", "remove", "trace"
EVENTS = ("planned", "done", "failed", "proven", "removed")
REMEDIED, CONTAINED, NOT_REMEDIED, WORSE = "remedied", "contained", "not_remedied", "worse"
USELESS = (NOT_REMEDIED, WORSE)


class Entry(TypedDict, total=False):
    """A line. time in Unix seconds; of done, when the worker took tasks again, away_s after it had begun to stop.

    event: planned; done; failed, and the host is as it was before, as far as why does not say otherwise; proven, with a
    verdict and proof.Figures of before and after; removed, with its drop-in.
    """

    time: float
    id: str
    event: str
    host: str
    unit: str
    act: str
    settings: list[str]
    reason: str
    prove_s: float
    away_s: float
    why: str
    verdict: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


class Remedy(TypedDict):
    """What findings.json says of a worker's last act: state is done, failed, or the verdict of its proof."""

    act: str
    settings: list[str]
    time: str
    state: str
    why: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


@dataclass(frozen=True)
class Known:
    """What the log has of one worker. act is its last act that was done and not removed, stands the last line of it.

    useless: acts that were proven so, or failed. planned: one that was begun, and of which nothing more is known.
    """

    act: Entry | None = None
    stands: Entry | None = None
    useless: frozenset[str] = frozenset()
    planned: Entry | None = None

    @property
    def open(self) -> bool:
        """Whether its act waits for a proof. A worker that is kept for inspection is to prove nothing."""
        return self.act is not None and self.act["act"] != CORDON and self.stands is self.act


def known(log: Iterable[Entry]) -> dict[tuple[str, str], Known]:
    """By worker (host, unit), out of the lines in their order."""
    found: dict[tuple[str, str], Known] = {}
    for line in log:
        if line["act"] == TRACE:
            # It changes nothing, and is to prove nothing.
            continue
        name = line["host"], line["unit"]
        last, event = found.get(name, Known()), line["event"]
        useless = last.useless
        if event == "failed" or line.get("verdict") in USELESS:
            useless = useless | {line["act"]}
        if event == "failed" and line["act"] == REMOVE:
            # What was to be taken away is in force, as it was.
            found[name] = Known(last.act, last.stands, useless)
        elif event == "planned":
            found[name] = Known(last.act, last.stands, useless, line)
        elif event == "removed":
            # What comes next is judged by itself. That it was worse, is still to be told.
            stands = last.stands if last.stands is not None and last.stands.get("verdict") == WORSE else None
            found[name] = Known(None, stands, useless)
        elif event == "done":
            found[name] = Known(line, line, useless)
        else:
            found[name] = Known(last.act, line, useless)
    return found


def traced(log: Iterable[Entry]) -> dict[tuple[str, str], float]:
    """When each worker was last traced, in Unix seconds."""
    return {
        (line["host"], line["unit"]): line["time"] for line in log if line["act"] == TRACE and line["event"] == "done"
    }


def remedy(one: Known) -> Remedy | None:
    """For findings.json; None where nothing was done, or what was done was removed."""
    last = one.stands
    if last is None:
        return None
    told = one.act if one.act is not None and last["event"] == "proven" else last
    return {
        "act": last["act"],
        "settings": list(told.get("settings", [])),
        "time": datetime.fromtimestamp(last["time"], timezone.utc).isoformat(timespec="seconds"),
        "state": last.get("verdict") or last["event"],
        "why": last.get("why") or last.get("reason", ""),
        "before": last.get("before"),
        "after": last.get("after"),
    }


# ---- the file ----


def read_log(store: Path) -> list[Entry]:
    """All lines; none where there is no log. A last line that was cut off is left out: its run ended in it.

    Raises InputError that names the line where one before it is damaged.
    """
    path = store / LOG
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return []
    whole, _, _ = text.rpartition("\n")
    found = []
    for number, line in enumerate(whole.split("\n") if whole else (), 1):
        try:
            one = json.loads(line)
            if not _sound(one):
                raise ValueError
        except ValueError:
            raise InputError(
                f"{path}:{number}: damaged; what was done is not known without it, so mend or move it"
            ) from None
        found.append(cast(Entry, one))
    return found


def _sound(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and one.get("event") in EVENTS
        and isinstance(one.get("time"), (int, float))
        and all(isinstance(one.get(name), str) for name in ("id", "host", "unit", "act"))
        and isinstance(one.get("settings", []), list)
        and all(isinstance(one.get(name, 0.0), (int, float)) for name in ("prove_s", "away_s"))
        and all(isinstance(one.get(name, ""), str) for name in ("why", "reason", "verdict"))
    )


def append(store: Path, entries: Sequence[Entry]) -> None:
    """Add lines, whole and on disk when it returns. Raises OSError."""
    if not entries:
        return
    store.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(one, sort_keys=True) + "\n" for one in entries)
    with (store / LOG).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                # The rest of a line that was cut off.
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


# ---- one run at a time ----


def take_lock(store: Path) -> None:
    """Keep other runs out for as long as the ansible-playbook above this process lives. Raises InputError with whose it
    is; one whose owner has ended is nobody's."""
    store.mkdir(parents=True, exist_ok=True)
    owner = _owner()
    path = store / LOCK
    with (store / f"{LOCK}.taking").open("w") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        held = _held(path)
        if held is not None and held != owner:
            since = datetime.fromtimestamp(held["created"], timezone.utc)
            raise InputError(
                f"another remediation is under way: process {held['pid']}, since {since:%Y-%m-%d %H:%M:%S} UTC"
                f" ({path}); wait for its end, or end it"
            )
        write_whole(path, json.dumps(owner))


def _owner() -> dict[str, Any]:
    me = psutil.Process()
    above = me.parents()
    first = next((at for at, one in enumerate(above) if _is_playbook(one)), None)
    one = me
    if first is not None:
        # The nearest is the fork of a task, which has the name of the playbook's process and ends with the task.
        one = list(itertools.takewhile(_is_playbook, above[first:]))[-1]
    return {"pid": one.pid, "created": round(one.create_time(), 2)}


def _is_playbook(one: psutil.Process) -> bool:
    try:
        return any("ansible-playbook" in word for word in one.cmdline()[:2])
    except psutil.Error:
        # It has ended, or is another user's and hidden.
        return False


def _held(path: Path) -> Mapping[str, Any] | None:
    """Who has it; None for nobody that lives."""
    try:
        one = json.loads(path.read_text())
        return one if round(psutil.Process(one["pid"]).create_time(), 2) == one["created"] else None
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        return None
