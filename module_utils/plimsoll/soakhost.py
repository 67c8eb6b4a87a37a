"""A soak on a staging host: the worker and the sender as transient units, beside the host's own workers.

For hosts, Python 3.9. The units have the user, the environment file and the memory limits of a worker that is deployed
there, and run its release by its broker.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .soak import Judge, Plan, PlanError, Recorded, budget_of, digest, line, plan_of, schedule
from .soakbench import LEFT, Bench, Setting, Trouble

# While it runs, on no disk: a link of before cannot lie here.
FOLDER = Path("/run/plimsoll-soak")
ENVIRONMENT_FILE = "/etc/celery/environment"
# Seconds that either program has to end by itself: a worker gives back what it has taken.
STOP_S = 60
# Of the worker that the soak's own is to be like.
LIMITS = ("MemoryHigh", "MemoryMax", "MemorySwapMax", "TasksMax", "LimitNOFILE", "OOMPolicy", "Slice")
# A unit that was not asked for is none of the deployed ones'.
NO_LIMIT = ("", "infinity", "[not set]", str((1 << 64) - 1))


@dataclass(frozen=True)
class Units:
    """Starts both programs by systemd-run. properties: KEY=VALUE, of the unit that the worker is to be like."""

    python: Path
    program: Path
    user: str
    directory: Path
    properties: tuple[str, ...]

    def start(self, name: str, folder: Path, environ: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        given = [
            f"--property={one}"
            for one in (
                f"User={self.user}",
                f"WorkingDirectory={self.directory}",
                f"EnvironmentFile={ENVIRONMENT_FILE}",
                "KillMode=mixed",
                f"TimeoutStopSec={STOP_S}",
                # The sender is no worker. Where memory is short, this one goes before those that are deployed.
                *((*self.properties, "OOMScoreAdjust=1000") if name == "worker" else ()),
            )
        ]
        words = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={_unit(name)}", *given, "--"]
        # Not by --setenv, which the environment file comes after. No secret is among these: those are in that file.
        words += ["/usr/bin/env", *(f"{key}={value}" for key, value in environ.items())]
        return subprocess.Popen(
            [*words, str(self.python), str(self.program), name, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def stop(self, name: str, process: subprocess.Popen[bytes]) -> None:
        # Also where systemd-run has ended, which may have been killed. Not loaded any more is no trouble.
        _systemctl("stop", "--", _unit(name))

    def own(self, path: Path) -> None:
        os.chown(path, pwd.getpwnam(self.user).pw_uid, -1, follow_symlinks=False)


def _unit(name: str) -> str:
    return f"plimsoll-soak-{name}.service"


def _systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], capture_output=True, text=True).stdout


def properties_of(unit: str) -> tuple[str, ...]:
    """LIMITS of a unit, as systemd-run takes them. Raises Trouble where there is no such unit."""
    shown = _systemctl("show", f"--property=LoadState,{','.join(LIMITS)}", "--", unit)
    found = dict(one.split("=", 1) for one in shown.splitlines() if "=" in one)
    if found.get("LoadState") != "loaded":
        raise Trouble(f"{unit} is not on this host, though the inventory declares it; run playbooks/deploy.yml")
    if found.get("MemoryMax", "") in NO_LIMIT:
        raise Trouble(
            f"{unit} has no MemoryMax here, so nothing would end a leak: where it is new in the inventory, run"
            " playbooks/deploy.yml"
        )
    return tuple(f"{name}={found[name]}" for name in LIMITS if found.get(name, "") not in NO_LIMIT)


@dataclass(frozen=True)
class Asked:
    """What is to be soaked: tasks and budget as their files have them, day as Recorded has its lines."""

    app: str
    unit: str
    home: Path
    user: str
    program: Path
    tasks: Mapping[str, Any]
    budget: Mapping[str, Any]
    day: Sequence[Sequence[Any]]

    def plan(self) -> Plan:
        """Raises Trouble."""
        try:
            return plan_of(self.tasks)
        except PlanError as error:
            raise Trouble(f"soak_tasks: {error}") from error

    def lines(self, plan: Plan) -> list[str]:
        """The schedule. Raises Trouble."""
        try:
            return [line(call) for call in schedule(plan, [Recorded(*one) for one in self.day])]
        except (PlanError, TypeError) as error:
            raise Trouble(f"soak_tasks: {error}") from error

    def allowed(self, plan: Plan) -> dict[str, float]:
        """The budget by task. Raises Trouble."""
        try:
            return budget_of(self.budget, list(plan.tasks))
        except PlanError as error:
            raise Trouble(f"soak_budget: {error}") from error


def check(asked: Asked) -> Units:
    """Whether a soak could begin now. Raises Trouble."""
    current = asked.home / "current"
    try:
        pwd.getpwnam(asked.user)
    except KeyError:
        raise Trouble(f"there is no user {asked.user} on this host; run playbooks/deploy.yml") from None
    limits = properties_of(asked.unit)
    if FOLDER.exists():
        raise Trouble(
            "another soak is under way on this host, or was killed: see `systemctl status 'plimsoll-soak-*'`, and"
            f" remove {FOLDER}"
        )
    return Units(current / "venv" / "bin" / "python", asked.program, asked.user, current / "app", limits)


def soak(asked: Asked, call_off: Callable[[], str]) -> dict[str, Any]:
    """What `plimsoll soaked` takes. Raises Trouble, and OSError. Whatever happens, no unit and no folder stays.

    call_off is asked all along whether to end at once, and gives the reason.
    """
    plan = asked.plan()
    lines, budget = asked.lines(plan), asked.allowed(plan)
    units = check(asked)
    # Of two at the same time, one fails here. Whatever the umask is, the workers' user goes through it.
    FOLDER.mkdir()
    FOLDER.chmod(0o755)

    def look() -> None:
        if why := call_off():
            raise Trouble(why)

    notes: list[str] = []
    try:
        environ = {"PYTHONPATH": str(asked.program.parent)}
        setting = Setting(FOLDER, asked.app, environ, embedded=False, queue="plimsoll-soak", parent=0)
        bench, judge = Bench(setting, plan, units, look, notes.append), Judge(plan, budget)
        sent = bench.run(judge, lines)
        found = judge.finish(sent["seconds"])
        records = bench.traced(found)
    except (Trouble, ValueError, KeyError, TypeError, AttributeError) as error:
        known = isinstance(error, Trouble)
        why = str(error) if known else f"what the worker recorded is not readable: {type(error).__name__}: {error}"
        left = [note for note in notes if note.startswith(LEFT)] or ["no worker and no queue of it is left"]
        raise Trouble("; ".join([why, *left])) from error
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    return {
        "pool": plan.pool,
        "concurrency": plan.concurrency,
        "schedule_sha256": digest(lines),
        "sent": sent,
        "worker": judge.figures(),
        "tasks": found,
        "records": records,
        "notes": [note for note in notes if note.startswith(LEFT)],
    }
