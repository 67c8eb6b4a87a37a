"""Which systemd units must be enabled, started or restarted to run what their files say. Pure; for hosts, Python 3.9.

What a unit needs is read off the host itself, and not off what this run changed: a run that ended between writing a
file and restarting its unit is mended by the next one.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What parse() reads; InactiveExit is when the unit last began to start.
PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,UnitFileState,NeedDaemonReload,FragmentPath,DropInPaths,EnvironmentFiles,"
    "InactiveExitTimestampMonotonic"
)


RUNS = ("active", "activating", "reloading")


@dataclass(frozen=True)
class Wanted:
    """A unit that is to run, or not. enabled None leaves that alone; files are what its start reads beside its own."""

    name: str
    enabled: bool | None = None
    files: tuple[str, ...] = ()
    running: bool = True


@dataclass(frozen=True)
class State:
    """A unit as systemd has it. began in seconds of CLOCK_MONOTONIC, None if it never started; files are its own.

    starting: active, and not yet ready. waiting: it ended, and systemd is about to start it once more.
    """

    found: bool
    active: bool
    failed: bool
    enabled: bool
    stale: bool
    files: tuple[str, ...]
    began: float | None
    starting: bool = False
    waiting: bool = False


def parse(shown: str) -> dict[str, State]:
    """States by name, out of what `systemctl show --property=PROPERTIES` prints: a block of KEY=VALUE lines a unit."""
    states = {}
    for block in shown.strip().split("\n\n"):
        pairs = [line.split("=", 1) for line in block.splitlines() if "=" in line]
        one = dict(pairs)
        # EnvironmentFiles has a line for each: PATH (ignore_errors=no).
        environment = [value.rsplit(" (", 1)[0] for key, value in pairs if key == "EnvironmentFiles"]
        files = [one.get("FragmentPath", ""), *_paths(one.get("DropInPaths", "")), *environment]
        # auto-restart, or auto-restart-queued: it ended, and systemd is about to try once more.
        waiting = one.get("SubState", "").startswith("auto-restart")
        began = int(one.get("InactiveExitTimestampMonotonic") or 0)
        states[one.get("Id", "")] = State(
            found=one.get("LoadState") == "loaded",
            active=one.get("ActiveState") in RUNS and not waiting,
            starting=one.get("ActiveState") == "activating" and not waiting,
            waiting=waiting,
            failed=one.get("ActiveState") == "failed",
            # enabled-runtime ends with the next boot.
            enabled=one.get("UnitFileState") == "enabled",
            stale=one.get("NeedDaemonReload") == "yes",
            files=tuple(path for path in files if path),
            began=began / 1e6 if began else None,
        )
    return states


def parse_list(shown: str) -> dict[str, str]:
    """ActiveState by name, out of what `systemctl list-units --full --plain --no-legend` prints: a line a unit."""
    states = {}
    for words in (line.split() for line in shown.splitlines()):
        # UNIT LOAD ACTIVE SUB DESCRIPTION, with a mark in front of a unit that failed.
        name, load, active = ([word for word in words[:4] if len(word) > 1] + ["", "", ""])[:3]
        if load == "loaded":
            states[name] = active
    return states


def results(shown: str) -> dict[str, str]:
    """How each unit last ended, by name, out of what `systemctl show --property=Id,Result` prints."""
    blocks = (dict(line.split("=", 1) for line in block.splitlines()) for block in shown.strip().split("\n\n"))
    return {one["Id"]: one.get("Result", "") for one in blocks if "Id" in one}


def _paths(shown: str) -> list[str]:
    """Of a property with several values: systemd puts one in double quotes where it holds a space or a backslash."""
    return shlex.split(shown) if '"' in shown else shown.split()


@dataclass(frozen=True)
class Step:
    """What to do with one unit: enable or disable, and start, restart or stop; reason is a sentence for the reader."""

    name: str
    enable: bool | None
    action: str
    reason: str = ""

    def as_data(self) -> dict[str, Any]:
        return {"unit": self.name, "enable": self.enable, "action": self.action, "reason": self.reason}

    def line(self) -> str:
        """For --diff."""
        words = ["" if self.enable is None else "enable" if self.enable else "disable", self.action]
        return f"{self.name}: {' and '.join(filter(None, words))}" + (f" ({self.reason})" if self.reason else "")


def plan(wanted: Sequence[Wanted], states: Mapping[str, State], changed: Mapping[str, float]) -> list[Step]:
    """The steps that are needed, in the order of wanted. changed: path to when it changed, in CLOCK_MONOTONIC seconds.

    A path that is not in changed is not there, and no reason for a restart. Only services are restarted: what hangs on
    a target would go down with it.
    """
    steps = []
    for one in wanted:
        state = states.get(one.name)
        if not one.running:
            # One that waits to be started again is not active, and would be.
            if state is not None and (state.active or state.waiting):
                steps.append(Step(one.name, None, "stop", "not declared"))
            continue
        if state is None or not state.found:
            steps.append(Step(one.name, one.enabled, "start", "not there yet"))
            continue
        enable = one.enabled if one.enabled is not None and one.enabled != state.enabled else None
        action, reason = "", ""
        if not state.active:
            action, reason = "start", "failed" if state.failed else "not running"
        elif one.name.endswith(".service"):
            newer = [path for path in (*state.files, *one.files) if changed.get(path, 0.0) > (state.began or 0.0)]
            if newer or state.stale:
                action, reason = "restart", f"runs something older than {', '.join(newer) or 'its unit file'}"
            elif state.starting:
                # One that fails time and again is so most of the time; this waits for how it goes.
                action, reason = "start", "not ready yet"
        if enable is not None or action:
            steps.append(Step(one.name, enable, action, reason))
    return steps
