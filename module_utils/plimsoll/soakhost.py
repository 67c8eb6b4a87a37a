"""A soak on a staging host: the worker and the sender as transient units, beside the host's own workers.

For hosts, Python 3.9. The units have the user, the environment file and the memory limits of a worker that is deployed
there, and run its release by its broker.
"""

from __future__ import annotations

import pwd
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .soak import Judge, Plan, PlanError, Recorded, budget_of, digest, line, plan_of, schedule
from .soakbench import END_S, LEFT, Bench, Setting, Trouble

# While it runs, on no disk: a link of before cannot lie here.
FOLDER = Path("/run/plimsoll-soak")
ENVIRONMENT_FILE = "/etc/celery/environment"
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
                f"TimeoutStopSec={END_S:.0f}",
                # The limits are those of a worker, and the sender is none.
                *(self.properties if name == "worker" else ()),
            )
        ]
        # No secret is among these: those are in the environment file.
        given += [f"--setenv={key}={value}" for key, value in environ.items()]
        words = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={_unit(name)}", *given, "--"]
        return subprocess.Popen(
            [*words, str(self.python), str(self.program), name, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def stop(self, name: str, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            _systemctl("stop", "--", _unit(name))

    def own(self, path: Path) -> None:
        shutil.chown(path, self.user)


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


def soak(asked: Asked, call_off: Callable[[], str]) -> dict[str, Any]:
    """What `plimsoll soaked` takes. Raises Trouble, and OSError. Whatever happens, no unit and no folder stays.

    call_off is asked all along whether to end at once, and gives the reason.
    """
    plan = asked.plan()
    lines, budget = asked.lines(plan), asked.allowed(plan)
    current = asked.home / "current"
    units = Units(
        current / "venv" / "bin" / "python", asked.program, asked.user, current / "app", properties_of(asked.unit)
    )
    try:
        pwd.getpwnam(asked.user)
    except KeyError:
        raise Trouble(f"there is no user {asked.user} on this host; run playbooks/deploy.yml") from None
    # Also while a run that was killed has left it: two at the same time would share the names of their units.
    try:
        FOLDER.mkdir(mode=0o755)
    except FileExistsError:
        raise Trouble(
            f"another soak is under way on this host, or was killed: see `systemctl status 'plimsoll-soak-*'`, and"
            f" remove {FOLDER}"
        ) from None

    def look() -> None:
        if why := call_off():
            raise Trouble(f"{why}; neither a worker nor a queue is left")

    notes: list[str] = []
    try:
        environ = {"PYTHONPATH": str(asked.program.parent)}
        setting = Setting(FOLDER, asked.app, environ, embedded=False, queue="plimsoll-soak", parent=0)
        bench, judge = Bench(setting, plan, units, look, notes.append), Judge(plan, budget)
        sent = bench.run(judge, lines)
        found = judge.finish(sent["seconds"])
        records = bench.traced(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Trouble(f"what the worker recorded is not readable: {type(error).__name__}: {error}") from error
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
