"""What units need to run what their files say: read off `systemctl show`, planned without a host."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import systemd_units, worker_drain
from plimsoll.units import PROPERTIES, State, Step, Wanted, parse, plan

SALES, GATE, TARGET = "celery-worker@sales.service", "celery-worker@gate.service", "celery-workers.target"
FRAGMENT = "/etc/systemd/system/celery-worker@.service"
DROPIN = "/etc/systemd/system/celery-worker@sales.service.d/10-worker.conf"
ENVIRONMENT = "/etc/celery/environment"

# As systemd 252 prints it: properties in an order of its own, a line for each environment file, an empty line between.
SHOWN = f"""\
EnvironmentFiles=/etc/celery/environment (ignore_errors=no)
EnvironmentFiles=/etc/celery/of (its) own (ignore_errors=yes)
Id=celery-worker@sales.service
LoadState=loaded
ActiveState=active
SubState=running
FragmentPath={FRAGMENT}
DropInPaths=/run/systemd/system/celery-worker@.service.d/50-a.conf {DROPIN}
UnitFileState=disabled
NeedDaemonReload=no
InactiveExitTimestampMonotonic=12345678901

Id=celery-workers.target
LoadState=loaded
ActiveState=active
SubState=active
FragmentPath=/etc/systemd/system/celery-workers.target
DropInPaths=
UnitFileState=enabled
NeedDaemonReload=yes
InactiveExitTimestampMonotonic=9000000

Id=celery-worker@gone.service
LoadState=not-found
ActiveState=inactive
SubState=dead
FragmentPath=
DropInPaths=
UnitFileState=
NeedDaemonReload=no
InactiveExitTimestampMonotonic=0
"""

RUNS = State(True, True, False, False, False, (FRAGMENT, DROPIN, ENVIRONMENT), 1000.0)
OLD = dict.fromkeys(RUNS.files, 500.0)


# ---- what systemd says ----


def test_what_systemd_shows_is_read() -> None:
    states = parse(SHOWN)
    assert list(states) == [SALES, TARGET, "celery-worker@gone.service"]
    assert states[SALES] == State(
        found=True,
        active=True,
        failed=False,
        enabled=False,
        stale=False,
        files=(
            FRAGMENT,
            "/run/systemd/system/celery-worker@.service.d/50-a.conf",
            DROPIN,
            ENVIRONMENT,
            "/etc/celery/of (its) own",
        ),
        began=12345.678901,
    )
    assert states[TARGET] == State(True, True, False, True, True, ("/etc/systemd/system/celery-workers.target",), 9.0)
    assert states["celery-worker@gone.service"] == State(False, False, False, False, False, (), None)


@pytest.mark.parametrize(
    ("shown", "paths"),
    [
        # systemd quotes as a shell does.
        (
            r'"/etc/systemd/system/a b.service.d/1.conf" /etc/2.conf',
            ["/etc/systemd/system/a b.service.d/1.conf", "/etc/2.conf"],
        ),
        (r'"/etc/systemd/system/a@x\\x2dy.service.d/1.conf"', [r"/etc/systemd/system/a@x\x2dy.service.d/1.conf"]),
        # Before 246 it did not.
        (r"/etc/systemd/system/a@x\x2dy.service.d/1.conf", [r"/etc/systemd/system/a@x\x2dy.service.d/1.conf"]),
    ],
)
def test_paths_are_read_as_systemd_writes_them(shown: str, paths: list[str]) -> None:
    (state,) = parse(f"Id=a.service\nDropInPaths={shown}\n").values()
    assert list(state.files) == paths


@pytest.mark.parametrize(
    ("active", "sub", "runs", "failed"),
    [
        ("active", "running", True, False),
        ("active", "exited", True, False),
        ("reloading", "reload", True, False),
        ("activating", "start", True, False),
        ("activating", "auto-restart", False, False),
        ("activating", "auto-restart-queued", False, False),
        ("deactivating", "stop-sigterm", False, False),
        ("inactive", "dead", False, False),
        ("failed", "failed", False, True),
    ],
)
def test_what_runs_and_what_failed(active: str, sub: str, runs: bool, failed: bool) -> None:
    (state,) = parse(f"Id=a.service\nActiveState={active}\nSubState={sub}\n").values()
    assert (state.active, state.failed) == (runs, failed)
    assert (state.waiting, state.starting) == (sub.startswith("auto-restart"), sub == "start")


@pytest.mark.parametrize(
    ("shown", "enabled"),
    [
        ("enabled", True),
        ("enabled-runtime", False),
        ("disabled", False),
        ("static", False),
        ("masked", False),
        ("", False),
    ],
)
def test_enabled_is_what_the_next_boot_starts(shown: str, enabled: bool) -> None:
    (state,) = parse(f"Id=a.service\nUnitFileState={shown}\n").values()
    assert state.enabled is enabled


@pytest.mark.parametrize("load", ["not-found", "bad-setting", "error", "masked", ""])
def test_what_is_not_loaded_is_not_found(load: str) -> None:
    (state,) = parse(f"Id=a.service\nLoadState={load}\n").values()
    assert not state.found


def test_all_that_is_read_is_asked_for() -> None:
    for line in SHOWN.splitlines():
        assert not line or line.split("=")[0] in PROPERTIES.split(",")


# ---- the plan ----


def one(
    state: State | None, changed: dict[str, float] | None = None, *, name: str = SALES, **wanted: Any
) -> list[Step]:
    states = {} if state is None else {name: state}
    return plan([Wanted(name, **wanted)], states, OLD if changed is None else changed)


def test_a_unit_that_runs_what_its_files_say_needs_nothing() -> None:
    assert one(RUNS) == []
    assert one(RUNS, dict.fromkeys(RUNS.files, 1000.0)) == []
    assert one(RUNS, {}) == []


@pytest.mark.parametrize("state", [None, replace(RUNS, found=False)])
def test_a_unit_that_is_not_there_would_be_started(state: State | None) -> None:
    assert one(state) == [Step(SALES, None, "start", "not there yet")]
    assert one(state, enabled=True) == [Step(SALES, True, "start", "not there yet")]


@pytest.mark.parametrize(("failed", "reason"), [(False, "not running"), (True, "failed")])
def test_a_unit_that_does_not_run_is_started_and_not_restarted(failed: bool, reason: str) -> None:
    state = replace(RUNS, active=False, failed=failed, stale=True)
    assert one(state, dict.fromkeys(RUNS.files, 2000.0)) == [Step(SALES, None, "start", reason)]


@pytest.mark.parametrize("newer", RUNS.files)
def test_a_service_that_is_older_than_one_of_its_files_is_restarted(newer: str) -> None:
    assert one(RUNS, {**OLD, newer: 1000.5}) == [Step(SALES, None, "restart", f"runs something older than {newer}")]


def test_further_files_count_where_they_are_there() -> None:
    assert one(RUNS, files=("/opt/celery/current",)) == []
    step = Step(SALES, None, "restart", "runs something older than /etc/celery/environment, /opt/celery/current")
    assert one(RUNS, {ENVIRONMENT: 1001.0, "/opt/celery/current": 1001.0}, files=("/opt/celery/current",)) == [step]


def test_a_file_that_this_run_would_write_counts_as_newer() -> None:
    """In check mode: it may not be there at all."""
    (step,) = one(RUNS, {**OLD, "/opt/celery/current": float("inf")}, files=("/opt/celery/current",))
    assert (step.action, step.reason) == ("restart", "runs something older than /opt/celery/current")
    assert one(RUNS, {**OLD, "/of/another": float("inf")}) == []


def test_a_unit_that_is_not_ready_yet_is_waited_for() -> None:
    """One that fails at each start is not ready yet most of the time."""
    state = replace(RUNS, starting=True)
    assert one(state) == [Step(SALES, None, "start", "not ready yet")]
    assert [step.action for step in one(state, {**OLD, RUNS.files[0]: 2000.0})] == ["restart"]
    assert [step.action for step in one(state, running=False)] == ["stop"]


def test_a_unit_that_waits_to_be_started_again_is_started_now() -> None:
    state = replace(RUNS, active=False, waiting=True)
    assert one(state, dict.fromkeys(RUNS.files, 2000.0)) == [Step(SALES, None, "start", "not running")]


@pytest.mark.parametrize(
    ("state", "stops"),
    [
        (RUNS, True),
        (replace(RUNS, stale=True), True),
        # Its unit file is gone already, and its processes are not.
        (replace(RUNS, found=False), True),
        # Not active, and systemd is about to start it once more.
        (replace(RUNS, active=False, waiting=True), True),
        (replace(RUNS, active=False), False),
        (replace(RUNS, active=False, failed=True), False),
        (replace(RUNS, active=False, found=False), False),
        (None, False),
    ],
)
def test_a_unit_that_is_not_to_run_is_stopped_where_it_does_or_would(state: State | None, stops: bool) -> None:
    newer = dict.fromkeys(RUNS.files, 2000.0)
    assert one(state, newer, running=False) == ([Step(SALES, None, "stop", "not declared")] if stops else [])


def test_what_was_loaded_anew_is_restarted() -> None:
    assert one(replace(RUNS, stale=True)) == [Step(SALES, None, "restart", "runs something older than its unit file")]


@pytest.mark.parametrize("name", [TARGET, "plimsoll-collect.timer", "celery.slice"])
def test_only_services_are_restarted(name: str) -> None:
    state = replace(RUNS, stale=True)
    changed = dict.fromkeys(RUNS.files, float("inf"))
    assert one(state, changed, name=name, files=RUNS.files) == []
    assert one(replace(state, active=False), changed, name=name) == [Step(name, None, "start", "not running")]


@pytest.mark.parametrize(
    ("wanted", "is_enabled", "enable"),
    [
        (None, True, None),
        (None, False, None),
        (True, True, None),
        (True, False, True),
        (False, False, None),
        (False, True, False),
    ],
)
def test_enabling_is_asked_for_or_left_alone(wanted: bool | None, is_enabled: bool, enable: bool | None) -> None:
    steps = one(replace(RUNS, enabled=is_enabled), enabled=wanted)
    assert steps == ([] if enable is None else [Step(SALES, enable, "")])


def test_steps_come_in_the_order_of_what_is_wanted() -> None:
    states = {GATE: replace(RUNS, active=False), SALES: replace(RUNS, stale=True), TARGET: RUNS}
    steps = plan([Wanted(SALES), Wanted(TARGET), Wanted(GATE, True)], states, {})
    assert [(step.name, step.enable, step.action) for step in steps] == [
        (SALES, None, "restart"),
        (GATE, True, "start"),
    ]
    assert steps[1].as_data() == {"unit": GATE, "enable": True, "action": "start", "reason": "not running"}


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (Step("a", None, "restart", "why"), "a: restart (why)"),
        (Step("a", True, "start", "why"), "a: enable and start (why)"),
        (Step("a", True, ""), "a: enable"),
        (Step("a", False, ""), "a: disable"),
        (Step("a", None, "stop", "not declared"), "a: stop (not declared)"),
    ],
)
def test_a_step_is_told_in_a_line(step: Step, line: str) -> None:
    assert step.line() == line


# ---- the module, on a systemctl that the test makes up ----

LATER = 10**16  # in microseconds, after any file of today

SYSTEMCTL = r"""#!/bin/sh
echo "$@" >> "{folder}/calls"
case $1 in
    show) case "$*" in *UnitsLoad*) cat "{folder}/loaded" ;; *) cat "{folder}/shown" ;; esac ;;
    start|stop) [ ! -e "{folder}/refuses" ] ;;
    restart) [ ! -e "{folder}/hangs" ] || exec sleep 60 ;;
    is-active) false ;;
esac
"""


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {
            "systemctl": SYSTEMCTL.replace("{folder}", str(folder)),
            "journalctl": "#!/bin/sh\necho why\n",
        }.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        # Of today, which is within what this machine has been up for.
        self.dropin = folder / "10 worker.conf"
        self.dropin.write_text("")
        (folder / "units").mkdir()
        (folder / "loaded").write_text(f"{LATER}\n")

    def show(self, *blocks: str) -> None:
        (self.folder / "shown").write_text("\n\n".join(blocks))

    def block(self, name: str, active: str = "active", began: int = 1, more: str = "") -> str:
        lines = [f"Id={name}", "LoadState=loaded", f"ActiveState={active}", f'DropInPaths="{self.dropin}"']
        return "\n".join([*lines, f"InactiveExitTimestampMonotonic={began}", more])

    def calls(self) -> list[str]:
        """What was asked for beside what is shown."""
        return [line for line in (self.folder / "calls").read_text().splitlines() if not line.startswith("show")]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: Any) -> Host:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(systemd_units, "UNITS", str(tmp_path / "units"))
    return Host(tmp_path)


def run(capsys: Any, *units: dict[str, Any], check: bool = False, **more: Any) -> dict[str, Any]:
    arguments = {"units": list(units), "_ansible_check_mode": check, **more}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        systemd_units.main()
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_a_unit_of_old_files_is_restarted_one_of_none_newer_is_left(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES), host.block(GATE, began=LATER))
    told = run(capsys, {"name": SALES}, {"name": GATE})
    assert host.calls() == [f"reset-failed -- {SALES}", f"restart -- {SALES}"]
    assert told["changed"] and told["diff"]["after"] == f"{SALES}: restart (runs something older than {host.dropin})\n"


def test_check_mode_foresees_and_does_nothing(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES, began=LATER))
    assert not run(capsys, {"name": SALES}, check=True)["changed"]
    told = run(capsys, {"name": SALES, "files": ["/opt/new"]}, check=True, pending=["/opt/new"])
    assert told["steps"][0]["action"] == "restart"
    assert run(capsys, {"name": "new.service", "enabled": True}, check=True)["steps"][0]["action"] == "start"
    assert host.calls() == []


def test_what_failed_is_reset_enabled_and_started(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES, "failed"))
    run(capsys, {"name": SALES, "enabled": True})
    assert host.calls() == [f"enable -- {SALES}", f"reset-failed -- {SALES}", f"start -- {SALES}"]


def test_systemd_reads_changed_files_first_and_what_runs_is_then_older(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES, began=LATER, more="NeedDaemonReload=yes"))
    run(capsys, {"name": SALES})
    assert host.calls() == ["daemon-reload", f"reset-failed -- {SALES}", f"restart -- {SALES}"]


def test_a_drop_in_that_systemd_has_yet_to_see_makes_it_read_them_all(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES, began=LATER))
    (host.folder / "loaded").write_text("1\n")
    told = run(capsys, {"name": SALES}, check=True)
    assert not told["changed"] and host.calls() == []
    run(capsys, {"name": SALES})
    assert host.calls() == ["daemon-reload"]
    (host.folder / "loaded").write_text("\n")  # systemd before 250 tells no time
    run(capsys, {"name": SALES})
    assert host.calls() == ["daemon-reload"] * 2


def test_a_unit_that_does_not_start_is_named_with_its_journal(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES, "inactive"))
    (host.folder / "refuses").touch()
    told = run(capsys, {"name": SALES})
    assert told["failed"] and f"systemctl start {SALES}" in told["msg"] and f"{SALES}:\nwhy" in told["msg"]


def test_a_unit_that_systemd_does_not_know_is_named(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES))
    told = run(capsys, {"name": SALES}, {"name": GATE})
    assert told["failed"] and f"systemd knows no {GATE}" in told["msg"]
    assert host.calls() == []


def test_what_is_to_go_stops_before_anything_starts_and_starts_are_not_refused(host: Host, capsys: Any) -> None:
    """Its memory is there for the others then; and a start limit that was reached counts no more."""
    old = "celery-worker@old.service"
    host.show(
        host.block(GATE, "inactive"), host.block(SALES), host.block(old, began=LATER), host.block(TARGET, began=LATER)
    )
    told = run(
        capsys, {"name": GATE}, {"name": TARGET, "enabled": True}, {"name": SALES}, {"name": old, "running": False}
    )
    assert host.calls() == [
        f"enable -- {TARGET}",
        f"stop -- {old}",
        f"reset-failed -- {GATE} {SALES}",
        f"start -- {GATE}",
        f"restart -- {SALES}",
    ]
    assert f"{old}: stop (not declared)\n" in told["diff"]["after"]
    assert {"unit": old, "enable": None, "action": "stop", "reason": "not declared"} in told["steps"]


def test_what_is_not_declared_and_not_there_is_no_error(host: Host, capsys: Any) -> None:
    gone = "celery-worker@gone.service"
    shown = [f"Id={gone}\nLoadState=not-found\nActiveState=inactive\nSubState=dead", host.block(SALES, began=LATER)]
    for blocks in (shown, shown[1:]):
        host.show(*blocks)
        told = run(capsys, {"name": gone, "running": False}, {"name": SALES})
        assert not told["changed"] and "failed" not in told
    assert host.calls() == []


def test_what_is_not_declared_and_waits_to_be_started_again_is_stopped(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES, "activating", more="SubState=auto-restart"))
    assert run(capsys, {"name": SALES, "running": False}, check=True)["steps"][0]["action"] == "stop"
    assert host.calls() == []
    run(capsys, {"name": SALES, "running": False})
    assert host.calls() == [f"stop -- {SALES}"]


def test_a_unit_that_does_not_stop_is_named_and_nothing_is_started(host: Host, capsys: Any) -> None:
    host.show(host.block(GATE, "inactive"), host.block(SALES))
    (host.folder / "refuses").touch()
    told = run(capsys, {"name": GATE}, {"name": SALES, "running": False})
    # Its journal would be that of a worker that does as it should.
    assert told["failed"] and told["msg"].strip() == f"systemctl stop {SALES}:"
    assert not [call for call in host.calls() if call.startswith(("start", "reset-failed"))]


def test_a_restart_that_takes_too_long_fails_and_says_that_it_goes_on(host: Host, capsys: Any) -> None:
    host.show(host.block(SALES))
    (host.folder / "hangs").touch()
    began = time.monotonic()
    told = run(capsys, {"name": SALES}, timeout=1)
    assert time.monotonic() - began < 20
    said = f"systemctl restart {SALES}: not done within 1 s; systemd goes on with it\n{SALES}:\nwhy"
    assert told["failed"] and told["msg"] == said


def test_a_unit_that_systemd_has_not_loaded_is_started(host: Host, capsys: Any) -> None:
    """What nothing active refers to is loaded for a moment alone; to reset it is an error: Unit X not loaded."""
    host.show(host.block(SALES, "inactive"))
    program = host.folder / "systemctl"
    program.write_text(program.read_text().replace("is-active) false ;;", "is-active|reset-failed) false ;;"))
    told = run(capsys, {"name": SALES})
    assert host.calls()[-1] == f"start -- {SALES}"
    assert told["changed"] and "failed" not in told


def test_a_host_without_systemd_says_so(host: Host, capsys: Any, monkeypatch: Any) -> None:
    (host.folder / "systemctl").write_text("#!/bin/sh\necho 'not booted with systemd' >&2\nexit 1\n")
    assert "not booted with systemd" in run(capsys, {"name": SALES})["msg"]
    monkeypatch.setenv("PATH", str(host.folder / "none"))
    assert run(capsys, {"name": SALES})["msg"].startswith("systemd_units: ")


def test_the_words_are_those_of_the_real_systemctl() -> None:
    """Options that it does not have would fail on the first host."""
    command = ["systemctl", "show", f"--property={PROPERTIES}", "--", SALES]
    try:
        ran = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("systemctl is not on this machine")
    assert "option" not in ran.stderr


# ---- draining ----

LISTED = f"""\
  {SALES} loaded active   running Celery worker sales
● {GATE}  loaded failed   failed  Celery worker gate
  celery-worker@old.service not-found inactive dead celery-worker@old.service
"""


class Systemctl:
    """A host whose workers end as told."""

    def __init__(self, listed: str, result: str = "success") -> None:
        self.listed, self.result = listed, result
        self.stopped: list[str] = []

    def __call__(self, command: list[str], **_: Any) -> Any:
        verb, names = command[1], [word for word in command if word.startswith("celery-worker@")]
        out = ""
        if verb == "list-units":
            out = self.listed
        elif verb == "stop":
            self.stopped += names
        elif verb == "show":
            out = "\n\n".join(f"Id={name}\nResult={self.result}" for name in names)
        return subprocess.CompletedProcess(command, 0, out, "")


def drained(host: Systemctl, monkeypatch: Any, capsys: Any, **params: Any) -> dict[str, Any]:
    monkeypatch.setattr(worker_drain.subprocess, "run", host)
    with patch_module_args(params), pytest.raises(SystemExit):
        worker_drain.main()
    return json.loads(capsys.readouterr().out)


def test_workers_that_run_are_stopped_and_all_are_named(monkeypatch: Any, capsys: Any) -> None:
    host = Systemctl(LISTED)
    found = drained(host, monkeypatch, capsys)
    assert (found["changed"], found["workers"], found["stopped"]) == (True, [SALES, GATE], [SALES])
    assert host.stopped == [SALES]
    assert found["diff"]["before"] == f"{SALES}: active\n"


def test_a_worker_that_was_killed_with_its_tasks_fails_the_drain(monkeypatch: Any, capsys: Any) -> None:
    found = drained(Systemctl(LISTED, "timeout"), monkeypatch, capsys)
    assert found["failed"] and f"{SALES}: tasks were not finished within TimeoutStopSec" in found["msg"]


def test_a_host_without_workers_is_drained(monkeypatch: Any, capsys: Any) -> None:
    host = Systemctl("")
    found = drained(host, monkeypatch, capsys)
    assert not found["changed"] and found["workers"] == host.stopped == []


def test_a_check_stops_nothing(monkeypatch: Any, capsys: Any) -> None:
    host = Systemctl(LISTED)
    assert drained(host, monkeypatch, capsys, _ansible_check_mode=True)["stopped"] == [SALES]
    assert host.stopped == []
