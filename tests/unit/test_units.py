"""Which units are enabled, started and restarted: from what systemctl shows, and from when files changed."""

from __future__ import annotations

from typing import Any

import pytest
from plimsoll.units import State, Step, Wanted, parse, plan

SHOWN = """\
Id=celery-worker@sales.service
LoadState=loaded
ActiveState=active
SubState=running
UnitFileState=static
NeedDaemonReload=no
FragmentPath=/etc/systemd/system/celery-worker@.service
DropInPaths=/etc/systemd/system/celery-worker@sales.service.d/10-worker.conf "/etc/systemd/system/odd name.conf"
EnvironmentFiles=/etc/celery/environment (ignore_errors=no)
EnvironmentFiles=/etc/celery/more (ignore_errors=yes)
InactiveExitTimestampMonotonic=68703391

Id=gone.service
LoadState=not-found
ActiveState=inactive
"""


def state(**more: Any) -> State:
    usual = {
        "found": True,
        "active": True,
        "failed": False,
        "enabled": True,
        "stale": False,
        "files": (),
        "began": 100.0,
    }
    return State(**{**usual, **more})


def steps(wanted: Wanted, found: State | None, **changed: float) -> list[Step]:
    paths = {f"/{name}": when for name, when in changed.items()}
    return plan([wanted], {wanted.name: found} if found else {}, paths)


def test_what_systemctl_shows_is_read_with_every_file_of_a_unit() -> None:
    states = parse(SHOWN)
    assert states["celery-worker@sales.service"] == State(
        found=True,
        active=True,
        failed=False,
        enabled=False,
        stale=False,
        files=(
            "/etc/systemd/system/celery-worker@.service",
            "/etc/systemd/system/celery-worker@sales.service.d/10-worker.conf",
            "/etc/systemd/system/odd name.conf",
            "/etc/celery/environment",
            "/etc/celery/more",
        ),
        began=68.703391,
    )
    assert not states["gone.service"].found and states["gone.service"].began is None


def test_a_worker_that_systemd_starts_again_and_again_is_not_running() -> None:
    shown = SHOWN.replace("ActiveState=active", "ActiveState=activating").replace("=running", "=auto-restart")
    assert not parse(shown)["celery-worker@sales.service"].active


def test_a_unit_that_runs_what_its_files_say_needs_nothing() -> None:
    assert steps(Wanted("a.service", True, ("/f",)), state(files=("/g",)), f=99.0, g=99.9) == []


@pytest.mark.parametrize("changed", ["f", "g"])
def test_a_service_older_than_one_of_its_files_is_restarted_and_the_file_named(changed: str) -> None:
    (step,) = steps(Wanted("a.service", None, ("/f",)), state(files=("/g",)), **{changed: 100.5})
    assert (step.action, step.enable) == ("restart", None) and f"/{changed}" in step.reason


def test_a_path_that_this_run_is_about_to_write_counts_as_changed() -> None:
    assert steps(Wanted("a.service", None, ("/f",)), state(), f=float("inf"))[0].action == "restart"


def test_a_unit_file_that_systemd_has_not_read_again_is_a_reason() -> None:
    assert steps(Wanted("a.service"), state(stale=True))[0].action == "restart"


def test_a_target_is_never_restarted_as_its_services_would_go_down_with_it() -> None:
    assert steps(Wanted("all.target", True, ("/f",)), state(stale=True), f=999.0) == []


@pytest.mark.parametrize(
    ("found", "action", "reason"),
    [
        (None, "start", "not there yet"),
        (state(found=False), "start", "not there yet"),
        (state(active=False), "start", "not running"),
        (state(active=False, failed=True), "start", "failed"),
    ],
)
def test_what_does_not_run_is_started(found: State | None, action: str, reason: str) -> None:
    (step,) = steps(Wanted("a.service"), found)
    assert (step.action, step.reason) == (action, reason)


@pytest.mark.parametrize(("wanted", "has", "does"), [(True, False, True), (False, True, False), (None, False, None)])
def test_enabled_is_changed_only_where_it_is_declared_and_differs(
    wanted: bool | None, has: bool, does: bool | None
) -> None:
    found = steps(Wanted("a.service", wanted), state(enabled=has))
    assert [step.enable for step in found] == ([] if does is None else [does])
    assert steps(Wanted("a.service", wanted), state(enabled=bool(wanted))) == []
