"""The memory guard on observations and cgroup directories that the test makes up, with a systemctl of its own."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, load_file
from jinja2 import Environment

FILES = ROOT / "roles/rss_sampler/files"
# It imports the sampler by its name, as beside it on a host.
load_file(FILES / "rss_sampler.py", "rss_sampler")
guard = load_file(FILES / "memory_guard.py", "memory_guard")

MiB = 1 << 20
NOON = 1_763_985_600.0
RULES = guard.Rules(threshold=90, sustain=30, pressure=20)
SALES, MAIL = "celery-worker@sales.service", "celery-worker@mail.service"


# ---- what is due ----


def seen(at: float, level: float, *, high: int | None = 280, maximum: int | None = 350, **more: Any) -> Any:
    """Sizes in MiB."""
    sizes = {"level": int(level * MiB), "high": high and high * MiB, "maximum": maximum and maximum * MiB}
    return guard.Observation(**{"at": at, "run": 1, **sizes, "events": 0, "waited": 0, **more})


def reason(*observations: Any, rules: Any = RULES) -> str:
    """After the last one."""
    watch = None
    for one in observations:
        watch = guard.follow(watch, one, rules)
    return guard.reason_of(watch, rules)


def test_a_level_at_the_threshold_is_due_once_it_has_lasted() -> None:
    looks = [seen(at, 254) for at in range(0, 40, 5)]
    assert reason(*looks[:6]) == ""
    assert reason(*looks[:7]) == "254 MiB of 280 MiB MemoryHigh (91 %) for 30 s"
    assert reason(*looks) == "254 MiB of 280 MiB MemoryHigh (91 %) for 35 s"
    assert reason(*looks, rules=guard.Rules(91, 30, 20)) == ""


def test_a_break_and_a_new_run_count_anew() -> None:
    looks = [seen(at, 254) for at in range(0, 40, 5)]
    dip = [*looks[:5], seen(25, 251), *looks[6:]]
    assert reason(*dip) == ""
    assert reason(*dip, *(seen(at, 254) for at in range(40, 65, 5))) != ""
    assert reason(*looks[:5], *(seen(at, 254, run=2) for at in range(25, 50, 5))) == ""
    assert reason(*looks[:5], *(seen(at, 254, run=2) for at in range(25, 60, 5))) != ""


HALF_WAY = "{} MiB of {} MiB {} ({} %), at least half-way from 90 % of it to {} MiB MemoryMax"


@pytest.mark.parametrize(
    ("high", "maximum", "level", "due"),
    [
        (280, 350, 300, ""),
        (280, 350, 301, HALF_WAY.format(301, 280, "MemoryHigh", 108, 350)),
        (280, None, 900, ""),
        (None, 400, 379, ""),
        (None, 400, 380, HALF_WAY.format(380, 400, "MemoryMax", 95, 400)),
    ],
)
def test_half_way_to_memory_max_is_due_at_once(high: int | None, maximum: int | None, level: int, due: str) -> None:
    assert reason(seen(0, level, high=high, maximum=maximum)) == due


@pytest.mark.parametrize(
    ("high", "maximum", "due"),
    [
        (280, None, "270 MiB of 280 MiB MemoryHigh (96 %) for 30 s"),
        (None, 290, "270 MiB of 290 MiB MemoryMax (93 %) for 30 s"),
        (400, 290, "270 MiB of 290 MiB MemoryMax (93 %) for 30 s"),
        (280, 280, ""),
        (None, None, ""),
        (0, 0, ""),
    ],
)
def test_the_limit_is_the_lower_one_of_those_that_are_set(high: int | None, maximum: int | None, due: str) -> None:
    level = 250 if high == maximum else 270
    found = reason(*(seen(at, level, high=high, maximum=maximum) for at in (0, 30)))
    assert found == due


def held(step: int = 5, share: float = 0.4, level: float = 200, rate: int = 1, **more: Any) -> list[Any]:
    """30 s below the threshold, at MemoryHigh: of each second `share` is waited, and `rate` events are counted."""
    times = range(0, 31, step)
    return [seen(at, level, events=at * rate, waited=int(at * share * 1e6), **more) for at in times]


def test_a_worker_that_is_held_at_memory_high_and_waits_is_due() -> None:
    looks = held()
    assert reason(*looks[:-1]) == ""
    assert reason(*looks) == (
        "200 MiB of 280 MiB MemoryHigh (71 %), held at MemoryHigh for 30 s and waiting for memory 40 % of the time"
    )


def test_a_worker_is_not_held_with_a_break_of_events_or_of_pressure() -> None:
    assert reason(*held(share=0.19)) == ""
    assert reason(*held(rate=0)) == ""
    looks = held()
    # The sums of the half minute are the same, but for five seconds nothing is reclaimed, and nobody waits.
    assert reason(*looks[:3], seen(15, 200, events=10, waited=looks[3].waited), *looks[4:]) == ""
    assert reason(*looks[:3], seen(15, 200, events=15, waited=looks[2].waited), *looks[4:]) == ""
    assert reason(*(seen(one.at, 200, events=one.events, waited=one.waited, run=one.at > 12) for one in looks)) == ""


def test_page_cache_that_fills_the_limit_holds_no_worker_for_the_guard() -> None:
    assert reason(*held(level=140)) != ""
    assert reason(*held(level=139)) == ""


@pytest.mark.parametrize(("rules", "waited"), [(RULES, None), (guard.Rules(90, 30, 0), 10**6)])
def test_without_psi_or_with_pressure_off_the_level_alone_counts(rules: Any, waited: int | None) -> None:
    def looks(level: int) -> list[Any]:
        return [seen(at, level, events=at, waited=waited and waited * at) for at in (0, 15, 30)]

    assert reason(*looks(200), rules=rules) == ""
    assert reason(*looks(254), rules=rules) == "254 MiB of 280 MiB MemoryHigh (91 %) for 30 s"


def test_restarts_of_an_hour_are_as_many_as_the_budget() -> None:
    assert guard.next_allowed([], 100.0, 2) == 100.0
    assert guard.next_allowed([50.0], 100.0, 2) == 100.0
    assert guard.next_allowed([90.0, 50.0], 100.0, 2) == 3650.0
    assert guard.next_allowed([10.0, 50.0, 90.0], 100.0, 2) == 3650.0
    assert guard.next_allowed([50.0, 90.0], 3649.0, 2) == 3650.0
    assert guard.next_allowed([50.0, 90.0], 3651.0, 2) == 3651.0


def test_what_is_remembered_goes_by_the_age_of_an_act() -> None:
    acts = [{"time": NOON + seconds, "action": "restart"} for seconds in (-3600, -3599, -60, 0)]
    other = [{"time": NOON - 5, "action": "outcome"}, {"time": NOON - 5}]
    assert guard.remembered([*acts, *other], "restart", NOON, 40.0) == [-3559.0, -20.0, 40.0]
    # The clock was set back by a day since they were written.
    assert guard.remembered(acts, "restart", NOON - 86400, 40.0) == []


def test_nothing_is_restarted_while_any_worker_is_on_its_way() -> None:
    active = {SALES: "active", MAIL: "active"}
    assert guard.hindrance([SALES], active) == ""
    for state in ("activating", "deactivating", "reloading"):
        assert guard.hindrance([SALES], {**active, MAIL: state}) == f"{MAIL} is {state}"
        assert guard.hindrance([SALES], {**active, SALES: state}) == f"{SALES} is {state}"
    assert guard.hindrance([SALES], {MAIL: "active"}) != ""
    assert guard.hindrance([SALES], {}) != ""
    assert guard.hindrance([SALES, MAIL], {MAIL: "active", SALES: "failed"}) == ""
    # One that crashed and waits for its next start, for minutes maybe.
    assert guard.state_of({"ActiveState": "activating", "SubState": "auto-restart"}) == ""
    assert guard.state_of({"ActiveState": "activating", "SubState": "start"}) == "activating"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2min", 120), ("1min 30s", 90), ("90s", 90), ("500ms", 0.5), ("1.5s", 1.5), ("20min", 1200), ("1h 2s", 3600)],
)
def test_a_span_of_time_is_read_as_systemctl_shows_it(text: str, seconds: float) -> None:
    assert guard.span(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["infinity", "", "3d", "5 parsecs", "1min infinity"])
def test_what_is_infinite_or_unknown_has_a_bound_of_its_own(text: str) -> None:
    assert guard.span(text) == 3600


# ---- the cgroup ----


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The top of a cgroup file system."""
    top = tmp_path / "cgroup"
    top.mkdir()
    (top / "cgroup.controllers").write_text("memory pids\n")
    monkeypatch.setattr(guard, "CGROUPS", top)
    return top


def unit(root: Path, name: str, level: float, *, cache: float = 0, **more: Any) -> Path:
    """A worker's cgroup as the kernel shows it, at an inode of its own. Sizes in MiB; high and max also as text."""
    new, here = root / f"new-{time.monotonic_ns()}", root / "celery.slice" / name
    new.mkdir()
    part = int(cache * MiB) // 3
    high, maximum = (
        one if isinstance(one, str) else one * MiB for one in (more.get("high", 280), more.get("max", 350))
    )
    texts = {
        "current": f"{int(level * MiB) + 3 * part}",
        "stat": f"anon 1\nfile 99\nslab_reclaimable {part}\nslab 77\ninactive_file {part}\nactive_file {part}",
        "events": f"low 0\nhigh {more.get('events', 0)}\nmax 0\noom 0\noom_kill 0",
        "pressure": f"some avg10=0.00 avg60=0.00 avg300=0.00 total={more.get('waited', 0)}\nfull avg10=0.00 total=5",
        "high": f"{high}",
        "max": f"{maximum}",
    }
    for file, text in texts.items():
        (new / f"memory.{file}").write_text(f"{text}\n")
    here.parent.mkdir(exist_ok=True)
    if here.exists():
        here.rename(root / f"old-{time.monotonic_ns()}")  # its inode is not to be used again
    new.rename(here)
    return here


def test_a_unit_is_read_as_it_is(root: Path) -> None:
    here = unit(root, SALES, 254, cache=90, events=7, waited=1234)
    found = guard.observe(here, 5.0)
    assert found == seen(5.0, 254, run=here.stat().st_ino, events=7, waited=1234)
    here = unit(root, SALES, 254, high="max", max="max")
    (here / "memory.pressure").unlink()
    assert guard.observe(here, 5.0) == seen(5.0, 254, high=None, maximum=None, run=here.stat().st_ino, waited=None)
    # memory.stat and memory.current are not of the same moment.
    (here / "memory.current").write_text("4096\n")
    (here / "memory.stat").write_text("slab_reclaimable 0\ninactive_file 8192\nactive_file 0\n")
    assert guard.observe(here, 5.0).level == 0


@pytest.mark.parametrize("gone", ["memory.current", "memory.stat", "memory.events"])
def test_half_a_cgroup_is_no_observation(root: Path, gone: str) -> None:
    """As of a unit that ends between two reads: without memory.stat, all of its page cache would be level."""
    here = unit(root, SALES, 254)
    (here / gone).unlink()
    assert guard.observe(here, 5.0) is None
    assert guard.observe(root / "nothing", 5.0) is None


# ---- the service ----


class Host:
    """A guard of made-up cgroups, with a systemctl that notes what it is told; at(): a round at a monotonic time."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder, self.bin = root, folder, folder / "bin"
        self.bin.mkdir()
        self.log = folder / "guard/acts.jsonl"
        self.shown = folder / "shown"
        self.states(**{SALES: "active", MAIL: "active"})
        self.systemctl("exit 0")

    def systemctl(self, restart: str) -> None:
        """What a restart does. `show` answers with the states, and all calls are noted."""
        verbs = f"show) exec /bin/cat {self.shown};; restart) {restart};;"
        (self.bin / "systemctl").write_text(f'#!/bin/sh\necho "$*" >> {self.folder}/calls\ncase $1 in {verbs} esac\n')
        (self.bin / "systemctl").chmod(0o755)

    def states(self, stop: str = "2min", start: str = "1min 30s", **states: str) -> None:
        block = "Id={}\nActiveState={}\nSubState=x\nTimeoutStartUSec={}\nTimeoutStopUSec={}\n"
        self.shown.write_text("\n".join(block.format(unit, state, start, stop) for unit, state in states.items()))

    def start(self, *, budget: int = 6, dry_run: bool = False, rules: Any = RULES) -> None:
        self.counts = self.folder / "acts.json"
        self.guard = guard.Guard(rules, budget, guard.Acts(self.log.parent), dry_run, self.root, self.counts)
        self.zero = time.monotonic()

    def at(self, *seconds: float) -> None:
        for one in seconds:
            self.guard.step(NOON + one, self.zero + one)

    def ended(self) -> None:
        """Wait for the restart that runs."""
        self.guard.running.process.wait()

    def begun(self, unit: str) -> None:
        """Wait until systemctl was told of the restart that runs."""
        while self.calls("restart")[-1:] != [f"restart -- {unit}"]:
            assert self.guard.running.process.poll() is None
            time.sleep(0.001)

    def calls(self, verb: str) -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(verb)] if path.exists() else []

    def acts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def host(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    one = Host(root, tmp_path)
    monkeypatch.setenv("PATH", str(one.bin))
    one.start()
    return one


def test_a_worker_is_restarted_once_and_both_ends_are_logged(host: Host, capsys: Any) -> None:
    unit(host.root, SALES, 254, cache=40)
    host.at(0, 15, 30)
    host.ended()
    # systemd has made its cgroup anew.
    unit(host.root, SALES, 60)
    host.at(42)
    host.at(47, 52, 90)
    # In this order: its limit of starts might leave it stopped.
    assert host.calls("re") == [f"reset-failed -- {SALES}", f"restart -- {SALES}"]
    why, sizes = "254 MiB of 280 MiB MemoryHigh (91 %) for 30 s", {"high_kb": 286720, "max_kb": 358400}
    begun, outcome = host.acts()
    act = {"time": NOON + 30, "unit": SALES, "action": "restart", "reason": why}
    assert begun == {**act, "level_kb": 260096, **sizes, "pressure": 0.0}
    act = {"time": NOON + 42, "unit": SALES, "action": "outcome", "reason": "restarted in 12 s"}
    assert outcome == {**act, "level_kb": 61440, **sizes, "pressure": None, "result": "done", "seconds": 12.0}
    assert capsys.readouterr().err == (
        f"memory_guard: {SALES}: restart: {why}\nmemory_guard: {SALES}: outcome: restarted in 12 s\n"
    )


def test_the_throttle_is_lifted_for_the_drain(host: Host) -> None:
    here = unit(host.root, SALES, 254)
    host.systemctl(f"/bin/cat {here}/memory.high > {host.folder}/high")
    host.at(0, 30)
    host.ended()
    assert (host.folder / "high").read_text() == "max"
    # It is systemd that sets the next run's.
    after = unit(host.root, SALES, 60, high="max")
    host.at(35)
    assert (after / "memory.high").read_text() == "max\n"


def test_page_cache_is_no_reason(host: Host) -> None:
    unit(host.root, SALES, 100, cache=240)
    host.at(*range(0, 100, 5))
    assert host.calls("") == []


def test_a_restart_that_fails_is_logged_gives_the_throttle_back_and_counts_anew(host: Host) -> None:
    here = unit(host.root, SALES, 254)
    host.systemctl("echo Job for it failed. >&2; echo See more. >&2; exit 3")
    host.at(0, 30)
    host.ended()
    host.at(35)
    outcome = host.acts()[-1]
    assert (outcome["result"], outcome["reason"]) == ("failed", "failed after 5 s: Job for it failed.")
    assert (here / "memory.high").read_text() == str(280 * MiB)
    host.at(40, 65)
    assert not host.guard.running
    host.at(70)
    host.ended()
    assert len(host.calls("restart")) == 2


def test_a_throttle_that_another_has_set_in_between_is_theirs(host: Host) -> None:
    here = unit(host.root, SALES, 254)
    host.systemctl(f"echo 4096 > {here}/memory.high; exit 1")
    host.at(0, 30)
    host.ended()
    host.at(35)
    assert (here / "memory.high").read_text() == "4096\n"


def test_a_throttle_that_cannot_be_lifted_is_said_unless_the_unit_is_gone(host: Host, capsys: Any) -> None:
    here = unit(host.root, SALES, 254)
    guard.set_high(host.root / "gone", "max")
    assert capsys.readouterr().err == ""
    (here / "memory.high").unlink()
    (here / "memory.high").mkdir()
    guard.set_high(here, "max")
    assert "memory.high: Is a directory; it stays as it is" in capsys.readouterr().err


def test_a_systemctl_that_cannot_be_run_is_a_failed_restart(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    here = unit(host.root, SALES, 254)
    shown = {SALES: {"ActiveState": "active"}}
    monkeypatch.setattr(guard, "show", lambda properties, units: shown)
    (host.bin / "systemctl").unlink()
    host.at(0, 30)
    assert [(one["action"], one.get("result")) for one in host.acts()] == [("restart", None), ("outcome", "failed")]
    assert (here / "memory.high").read_text() == str(280 * MiB)


def test_a_restart_that_takes_too_long_is_no_longer_waited_for(host: Host) -> None:
    unit(host.root, SALES, 254)
    host.states(**{SALES: "active"}, stop="1min", start="30s")
    host.systemctl("exec /bin/sleep 60")
    began = time.monotonic()
    host.at(0, 30)
    assert time.monotonic() - began < 10
    process = host.guard.running.process
    host.at(149)
    assert host.guard.running
    host.at(150)
    assert process.returncode == -signal.SIGKILL
    outcome = host.acts()[-1]
    assert (outcome["result"], outcome["seconds"]) == ("timeout", 120.0)
    assert outcome["reason"] == "not over after 120 s; systemd goes on with it"


def test_one_without_time_limits_has_one_all_the_same(host: Host) -> None:
    unit(host.root, SALES, 254)
    host.states(**{SALES: "active"}, stop="infinity", start="infinity")
    host.at(0, 30)
    assert host.guard.running.bound == 7230


def test_a_guard_that_is_stopped_leaves_the_restart_to_systemd(host: Host) -> None:
    unit(host.root, SALES, 254)
    host.systemctl("exec /bin/sleep 60")
    host.at(0, 30)
    host.begun(SALES)
    process = host.guard.running.process
    host.guard.close()
    assert process.poll() is None
    process.kill()
    process.wait()
    assert host.acts()[-1]["result"] == "left"
    # The next one finds the restart in its log, and counts it.
    unit(host.root, MAIL, 254)
    now = time.time()
    host.log.write_text(json.dumps({**host.acts()[0], "time": now - 60}) + "\n")
    host.start(budget=1)
    host.guard.step(now, host.zero)
    host.guard.step(now + 30, host.zero + 30)
    assert (host.acts()[-1]["action"], host.calls("restart")) == ("budget_spent", [f"restart -- {SALES}"])


def test_only_one_at_a_time_and_the_one_nearest_to_memory_max_first(host: Host) -> None:
    unit(host.root, SALES, 260)
    unit(host.root, MAIL, 255, max=300)
    unit(host.root, "celery-worker@free.service", 279, max="max")
    host.states(**{SALES: "active", MAIL: "active", "celery-worker@free.service": "active"})
    host.systemctl("exec /bin/sleep 60")
    host.at(0, 30)
    host.begun(MAIL)
    host.at(35, 40)
    host.guard.running.process.kill()
    host.ended()
    unit(host.root, MAIL, 50)
    host.at(45)
    host.begun(SALES)
    assert host.calls("restart") == [f"restart -- {MAIL}", f"restart -- {SALES}"]
    host.guard.running.process.kill()
    host.ended()


@pytest.mark.parametrize("state", ["activating", "deactivating", "reloading"])
def test_a_restart_waits_for_other_workers_and_says_so_once(host: Host, state: str, capsys: Any) -> None:
    unit(host.root, SALES, 254)
    host.states(**{SALES: "active", MAIL: state})
    host.at(0, 30, 35)
    assert host.calls("restart") == []
    assert capsys.readouterr().err.count(f"{SALES} is due, and waits: {MAIL} is {state}") == 1
    assert host.guard.restarts == []
    host.states(**{SALES: "active", MAIL: "active"})
    host.at(40)
    host.ended()
    assert host.calls("restart") == [f"restart -- {SALES}"]


def test_one_that_is_not_active_holds_no_other_up(host: Host) -> None:
    unit(host.root, SALES, 255)
    unit(host.root, MAIL, 254)
    host.states(**{SALES: "failed", MAIL: "active"})
    host.at(0, 30)
    host.ended()
    assert host.calls("restart") == [f"restart -- {MAIL}"]


def test_systemd_is_asked_for_all_workers_by_one_call_and_only_before_an_act(host: Host) -> None:
    unit(host.root, SALES, 254)
    unit(host.root, MAIL, 100)
    host.at(0, 10, 20)
    assert host.calls("") == []
    host.at(30)
    host.ended()
    assert host.calls("show") == [
        "show --property=Id,ActiveState,SubState,TimeoutStopUSec,TimeoutStartUSec celery-worker@*.service"
    ]


def test_a_spent_budget_is_said_once_with_the_time_of_the_next(host: Host, capsys: Any) -> None:
    host.start(budget=2)
    for when in (0, 100):
        unit(host.root, SALES, 254)
        host.at(when, when + 30)
        host.ended()
        host.at(when + 40)
    unit(host.root, SALES, 254)
    host.at(200, 230, 235, 3629)
    assert len(host.calls("restart")) == 2
    (spent,) = (one for one in host.acts() if one["action"] == "budget_spent")
    assert spent["reason"] == (
        "254 MiB of 280 MiB MemoryHigh (91 %) for 30 s; all 2 restarts of an hour are spent, the next is allowed at "
        "2025-11-24T13:00:30Z; MemoryHigh and MemoryMax hold until then"
    )
    assert capsys.readouterr().err.count("budget spent") == 1
    host.at(3630)
    host.ended()
    assert len(host.calls("restart")) == 3
    unit(host.root, SALES, 254)
    host.at(3635, 3640, 3670)
    assert [one["action"] for one in host.acts()].count("budget_spent") == 2


def test_acts_are_counted_for_the_sampler_from_nothing_on_and_another_user_may_read_them(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    host.start(budget=1)
    unit(host.root, SALES, 254)
    unit(host.root, MAIL, 60)
    host.at(0)
    none = {"restart": 0, "budget_spent": 0}
    assert json.loads(host.counts.read_text()) == {MAIL: none, SALES: none}
    host.at(30)
    host.ended()
    unit(host.root, SALES, 254)
    host.at(40, 45, 80)
    os.umask(before)
    assert json.loads(host.counts.read_text()) == {MAIL: none, SALES: {"restart": 1, "budget_spent": 1}}
    assert host.counts.stat().st_mode & 0o777 == 0o644 and list(host.folder.glob("*.new")) == []


def test_counts_that_cannot_be_written_are_said_once_and_the_guard_goes_on(host: Host, capsys: Any) -> None:
    host.guard.counts = host.folder / "none" / "acts.json"
    unit(host.root, SALES, 254)
    host.at(0, 30)
    host.ended()
    assert len(host.calls("restart")) == 1
    assert capsys.readouterr().err.count("the metrics lack the guard's acts") == 1


def test_a_dry_run_says_what_it_would_do_once_for_each_run_and_restarts_nothing(host: Host, capsys: Any) -> None:
    host.start(dry_run=True)
    here = unit(host.root, SALES, 254)
    host.at(0, 30, 35, 70)
    assert [(one["action"], one["reason"]) for one in host.acts()] == [
        ("would_restart", "254 MiB of 280 MiB MemoryHigh (91 %) for 30 s")
    ]
    assert "would restart: 254 MiB" in capsys.readouterr().err
    assert (here / "memory.high").read_text() == f"{280 * MiB}\n"
    unit(host.root, SALES, 254)
    host.at(75, 105)
    assert len(host.acts()) == 2
    assert host.calls("restart") + host.calls("reset-failed") == []
    # What it would have done is nothing that counts for a guard that does it.
    host.start()
    assert host.guard.restarts == []


def test_a_worker_that_vanishes_in_the_middle_is_forgotten(host: Host, capsys: Any) -> None:
    here = unit(host.root, SALES, 254)
    host.at(0, 15)
    (here / "memory.current").unlink()
    here.rename(host.root / "away")
    host.at(20)
    (host.root / "away").rename(here)
    (here / "memory.current").write_text(f"{254 * MiB}\n")
    host.at(25, 50)
    assert host.calls("restart") == []
    assert capsys.readouterr().err == ""
    host.at(55)
    # And one that ends while it is restarted.
    here.rename(host.root / "ended")
    host.ended()
    host.at(60)
    assert host.acts()[-1]["result"] == "done"
    assert host.acts()[-1]["level_kb"] is None


def test_a_worker_that_ends_between_finding_and_reading_is_no_word_worth(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(guard, "find_units", lambda root: {SALES: root / "celery.slice" / SALES})
    host.at(0, 30)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_read_is_said_once(host: Host, capsys: Any) -> None:
    here = unit(host.root, SALES, 254)
    (here / "memory.current").unlink()
    (unit(host.root, MAIL, 100) / "memory.pressure").unlink()
    host.at(0, 30, 60)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{SALES} is not watched: no figures of its memory" in lines[0]
    assert "no PSI" in lines[1]


# ---- the log of acts ----


def test_acts_are_read_back_without_what_a_crash_left(tmp_path: Path) -> None:
    acts = guard.Acts(tmp_path / "guard")
    assert acts.read() == []
    acts.append({"time": 1, "action": "restart"})
    with acts.path.open("ab") as file:
        file.write(b'{"time": 2, "action": "rest')
    acts.append({"time": 3, "action": "restart"})
    with acts.path.open("ab") as file:
        file.write(b'\n5\n[]\n{"action": "restart"}\n{"time": "4"}\n\0\0\0\xff\n{"time": 5')
    assert [one["time"] for one in acts.read()] == [1, 3]
    assert [one["time"] for one in guard.Acts(tmp_path / "guard").read()] == [1, 3]


def test_the_log_begins_anew_when_it_is_full_and_the_older_half_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = guard.Acts(tmp_path)
    monkeypatch.setattr(guard, "FULL_LOG", 200)
    for when in range(20):
        acts.append({"time": when, "action": "restart"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts.1.jsonl", "acts.jsonl"]
    assert all(path.stat().st_size <= 200 for path in tmp_path.iterdir())
    times = [one["time"] for one in acts.read()]
    assert times == list(range(times[0], 20))
    assert 5 < len(times) < 20


def test_a_full_disk_loses_the_line_and_never_the_restart(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(self: Any, act: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    unit(host.root, SALES, 254)
    with monkeypatch.context() as patch:
        patch.setattr(guard.Acts, "append", full)
        host.at(0, 30)
        host.ended()
        host.at(35)
    assert host.calls("restart") == [f"restart -- {SALES}"]
    said = capsys.readouterr().err
    assert said.count("No space left on device; until there is room, acts are in the journal alone") == 1
    assert "restart: 254 MiB" in said
    assert not host.log.exists()


def test_a_line_that_is_written_in_part_is_an_error_and_harms_no_other(tmp_path: Path) -> None:
    acts = guard.Acts(tmp_path)
    acts.append({"time": 1, "action": "restart"})
    room = acts.path.stat().st_size + 9
    line = "import sys, resource; sys.path.insert(0, sys.argv[1]); import memory_guard; from pathlib import Path\n"
    line += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    line += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
    line += "memory_guard.Acts(Path(sys.argv[2])).append({'time': 2, 'action': 'restart'})\n"
    ran = subprocess.run([sys.executable, "-c", line, str(FILES), str(tmp_path)], capture_output=True, text=True)
    assert "No space left" in ran.stderr
    assert acts.path.stat().st_size == room
    acts.append({"time": 3, "action": "restart"})
    assert [one["time"] for one in acts.read()] == [1, 3]


def test_a_log_that_cannot_be_made_is_no_reason_to_end(host: Host, capsys: Any) -> None:
    host.log.parent.write_text("a file where the folder should be")
    host.start()
    unit(host.root, SALES, 254)
    host.at(0, 30)
    host.ended()
    assert host.calls("restart") == [f"restart -- {SALES}"]
    assert "acts are in the journal alone" in capsys.readouterr().err


# ---- the program ----


def test_a_host_without_cgroup_v2_is_told(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # What this process blocks, the processes that later tests start would not hear either.
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, which: None)
    (root / "cgroup.controllers").unlink()
    assert guard.main([]) == 1
    assert f"{root} is not cgroup v2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", ["--interval=0", "--threshold=101", "--threshold=nan", "--sustain=-1", "--pressure=-1", "--budget=0"]
)
def test_a_wrong_option_is_named(root: Path, capsys: Any, wrong: str) -> None:
    with pytest.raises(SystemExit) as refused:
        guard.main([wrong])
    assert refused.value.code == 2
    assert wrong.split("=")[0] in capsys.readouterr().err


def test_the_service_is_ready_feeds_its_watchdog_and_ends_at_sigterm_in_the_middle_of_a_restart(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit(host.root, SALES, 340)
    host.systemctl(f"echo $$ > {host.folder}/pid; exec /bin/sleep 60")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import memory_guard; from pathlib import Path\n"
    code += "memory_guard.CGROUPS = Path(sys.argv[2]); sys.exit(memory_guard.main(sys.argv[3:]))\n"
    command = [sys.executable, "-c", code, str(FILES), str(host.root), f"--output={host.log.parent}", "--interval=0.01"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(host.folder / "notify"))
        systemd.settimeout(10)
        told = {"NOTIFY_SOCKET": str(host.folder / "notify"), "WATCHDOG_USEC": "60000000"}
        service = subprocess.Popen(command, env={**os.environ, **told}, stderr=subprocess.PIPE, text=True)
        assert [systemd.recv(100) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
        while not (host.folder / "pid").exists():
            assert systemd.recv(100) == b"WATCHDOG=1"
        service.terminate()
        assert any(systemd.recv(100) == b"STOPPING=1" for _ in range(1000))
    _, said = service.communicate(timeout=10)
    os.kill(int((host.folder / "pid").read_text()), signal.SIGKILL)
    assert service.returncode == 0
    assert "Traceback" not in said
    assert said.startswith("memory_guard: restarts workers at 90 % of their limit for 30 s; 0 of 6 restarts")
    assert [one["action"] for one in host.acts()] == ["restart", "outcome"]
    assert host.acts()[-1]["result"] == "left"


# ---- the role ----


def rendered(template: str, guard_is: Any) -> str:
    defaults = yaml.safe_load((ROOT / "roles/rss_sampler/defaults/main.yml").read_text())
    environment = Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters["comment"] = str
    text = (ROOT / "templates/rss_sampler" / template).read_text()
    return environment.from_string(text).render({**defaults, "rss_sampler_guard": guard_is, "ansible_managed": ""})


@pytest.mark.parametrize(("guard_is", "dry_run"), [("restart", False), ("report", True)])
def test_the_units_command_line_is_one_that_the_program_takes(
    root: Path, monkeypatch: pytest.MonkeyPatch, guard_is: str, dry_run: bool
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(guard, "run", lambda beat, interval, stop: started.append((beat.__self__, interval)))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, which: None)
    (command,) = re.findall(r"^ExecStart=\S+ \S+ (.*)$", rendered("plimsoll-guard.service.j2", guard_is), re.MULTILINE)
    assert guard.main(command.split()) == 0
    ((one, interval),) = started
    assert (one.rules, one.budget, interval, one.dry_run) == (RULES, 6, 5.0, dry_run)
    assert str(one.acts.path) == "/var/log/plimsoll/guard/acts.jsonl"
    # Where the sampler looks for them.
    assert one.counts == sys.modules["rss_sampler"].GUARD_ACTS


# Without quotes, YAML takes off for false.
@pytest.mark.parametrize(("guard_is", "starts"), [("restart", True), ("report", True), ("off", False), (False, False)])
def test_the_samplers_unit_starts_the_guard_unless_it_is_off(guard_is: Any, starts: bool) -> None:
    assert ("\nWants=plimsoll-guard.service\n" in rendered("plimsoll-sampler.service.j2", guard_is)) == starts
