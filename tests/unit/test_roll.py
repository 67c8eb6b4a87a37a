"""One act of a remediation on its host: what it writes, whether the worker works after it, and the way back."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import worker_remedy
from plimsoll import roll
from plimsoll.hostfiles import Entry
from plimsoll.release import ANSWER, ReleaseError
from plimsoll.remedy import outcomes
from plimsoll.roll import DROPIN, How, Outcome, change_of, depths, needed, parse, perform, states

UNIT = "celery-worker@gate.service"
NODE = f"gate@{socket.gethostname()}"
OLD, NEW = "[Service]\nRuntimeMaxSec=9s\n", '[Service]\nEnvironment="CELERY_REMEDY_ARGS=--max-memory-per-child=9"\n'
HOW = How(Path("/opt/celery"), "shop", "celery", 240, 120, 60)
# What the worker was started with, some of it for its main process alone.
GIVEN = {"CELERY_BROKER_URL": "memory://", "CELERY_RESULT_BACKEND": "rpc://", "DIGIT": "1", "ODD": 'a "b"=\\n'}
OWN = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "1", "CELERY_ARGS": "--queues=gate", "CELERY_WORKER_INCLUDE": "x"}


def show(unit: str = UNIT, **more: str) -> str:
    """A block of what `systemctl show` prints."""
    shown = {
        **{"Environment": "", "Id": unit, "LoadState": "loaded", "ActiveState": "active"},
        **{"InactiveExitTimestampMonotonic": "2500000", "MemoryHigh": "1073741824", "NeedDaemonReload": "no"},
        **{"RuntimeMaxUSec": "infinity", "Restart": "always", **more},
    }
    return "".join(f"{name}={value}\n" for name, value in shown.items())


class Host:
    """One with a worker: its drop-ins, and what systemd, the worker and its broker answer. asked is what was asked."""

    def __init__(self, units: Path) -> None:
        self.units, self.asked = units, list[str]()
        self.active, self.stale, self.began = True, False, time.monotonic() - 100
        # Of each restart and each question, in their order; the last stands for all after it.
        self.restarts, self.answers = [""], [([], [])]  # type: tuple[list[str], list[tuple[list[str], list[str]]]]
        self.depths: list[dict[str, Any] | str] = [{"depths": {"gate": 3}, "grown": []}]
        self.left: list[str] | None = []
        self.refused = ""
        self.given: list[tuple[str, ...]] = []

    def next(self, come: list[Any]) -> Any:
        return come.pop(0) if len(come) > 1 else come[0]

    def systemctl(self, *words: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        error = ""
        if words[0] == "restart":
            assert timeout == HOW.restart_s
            if not (error := self.next(self.restarts)):
                self.active, self.began = True, time.monotonic()
        if words[0] not in ("show", "--version"):
            self.asked.append(" ".join(words))
        active = "active" if self.active else "failed"
        more = {"NeedDaemonReload": "yes" if self.stale else "no"}
        shown = show(ActiveState=active, InactiveExitTimestampMonotonic=str(int(self.began * 1e6)), **more)
        if "--property=MainPID" in words:
            shown = "812\n"
        out = "systemd 252 (252.39-1~deb12u1)\n" if words[0] == "--version" else shown
        return subprocess.CompletedProcess(words, 1 if error else 0, out, error)

    def check(self, *given: Any) -> tuple[list[str], list[str]]:
        assert given == (HOW.home / "current", "shop", "celery", GIVEN, ["gate"], HOW.ready_s)
        self.asked.append("check")
        came = self.next(self.answers)
        if isinstance(came, Exception):
            raise came
        return came  # type: ignore[no-any-return]

    def run(
        self, release: Path, user: str, environment: Any, code: str, *args: str
    ) -> subprocess.CompletedProcess[str]:
        assert (release, user, environment) == (HOW.home / "current", "celery", GIVEN)
        self.asked.append("depths" if code == roll.DEPTHS else "cordon")
        self.given.append(args)
        came = self.next(self.depths) if code == roll.DEPTHS else {"left": self.left}
        if isinstance(came, str):
            return subprocess.CompletedProcess([], 1, "", f"Traceback\n{came}\n")
        return subprocess.CompletedProcess([], 0, f"\n{ANSWER}{json.dumps(came)}\n", "")

    @property
    def dropin(self) -> str | None:
        path = self.units / f"{UNIT}.d" / DROPIN
        return path.read_text() if path.exists() else None

    @dropin.setter
    def dropin(self, text: str) -> None:
        """As it has been since before the worker began."""
        folder = self.units / f"{UNIT}.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DROPIN).write_text(text)
        os.utime(folder, (time.time() - 200, time.time() - 200))

    @property
    def since(self) -> float:
        (one,) = states([UNIT])
        return float(one["since"])


@pytest.fixture
def host(tmp_path: Path, monkeypatch: Any) -> Host:
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    host = Host(units)
    monkeypatch.setattr(roll, "UNITS", units)
    monkeypatch.setattr(roll, "PROC", tmp_path / "proc")
    (tmp_path / "proc/812").mkdir(parents=True)
    environ = "".join(f"{name}={value}\0" for name, value in {**OWN, **GIVEN}.items())
    (tmp_path / "proc/812/environ").write_text(environ)
    monkeypatch.setattr(parse, "__defaults__", (units,))
    who: Any = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    monkeypatch.setattr(roll, "Entry", partial(Entry, **who))
    monkeypatch.setattr(roll, "_systemctl", host.systemctl)
    monkeypatch.setattr(roll, "check", host.check)
    monkeypatch.setattr(roll, "run_in_release", host.run)
    monkeypatch.setattr(roll, "complaints", lambda entries: host.refused)
    monkeypatch.setattr(roll, "journal", lambda unit: f"{unit}:\nits last lines")
    return host


def act(name: str = "contain", **more: Any) -> dict[str, Any]:
    dropin = NEW if name in ("contain", "allocator") else ""
    return {"id": "1f0c", "unit": UNIT, "act": name, "dropin": dropin, "queues": ["gate"], "since": None, **more}


# ---- the state ----


def test_a_unit_is_told_as_its_host_has_it(tmp_path: Path) -> None:
    (tmp_path / f"{UNIT}.d").mkdir()
    (tmp_path / f"{UNIT}.d" / DROPIN).write_text(OLD)
    os.utime(tmp_path / f"{UNIT}.d", (1000.5, 1000.5))
    environment = (
        'A=1 "CELERY_ARGS=--queues=gate,mail --concurrency=2" "CELERY_REMEDY_ARGS=--max-tasks-per-child=9" B="x"'
    )
    assert parse(show(Environment=environment), 1000.0, "/usr/lib/x/libjemalloc.so.2", 252, tmp_path) == [
        {
            **{"unit": UNIT, "active": True, "since": 1002.5, "dropin": OLD, "changed": 1000.5},
            **{"args": "--queues=gate,mail --concurrency=2 --max-tasks-per-child=9", "memory_high_kb": 1 << 20},
            **{"jemalloc": "/usr/lib/x/libjemalloc.so.2", "systemd": 252, "stale": False, "restart": "always"},
            **{"runtime_max_s": None},
        }
    ]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"MemoryHigh": "infinity"}, {"memory_high_kb": None}),
        # As of cgroup v1.
        ({"MemoryHigh": str((1 << 64) - 1)}, {"memory_high_kb": None}),
        ({"MemoryHigh": "[not set]"}, {"memory_high_kb": None}),
        ({"InactiveExitTimestampMonotonic": "0", "ActiveState": "inactive"}, {"since": None, "active": False}),
        ({"ActiveState": "activating"}, {"active": False}),
        ({"Environment": 'CELERY_ARGS="a b"'}, {"args": "a b"}),
        ({"NeedDaemonReload": "yes", "Restart": "no"}, {"stale": True, "restart": "no"}),
        ({"RuntimeMaxUSec": "1d 2h 3min 4.5s"}, {"runtime_max_s": 93_784.5}),
        ({"RuntimeMaxUSec": "41min 23s"}, {"runtime_max_s": 2483}),
        ({"RuntimeMaxUSec": "3 fortnights"}, {"runtime_max_s": None}),
        ({}, {"args": "", "dropin": "", "changed": None}),
    ],
)
def test_what_a_unit_does_not_have_is_told_as_none(tmp_path: Path, more: dict[str, str], wanted: Any) -> None:
    (one,) = parse(show(**more), 0, "", 0, tmp_path)
    assert {name: one[name] for name in wanted} == wanted


def test_units_that_systemd_does_not_know_are_left_out(tmp_path: Path) -> None:
    gone = show("celery-worker@gone.service", LoadState="not-found")
    shown = "\n".join([show(), gone, show("celery-worker@bad.service", LoadState="bad-setting"), show("b.service")])
    assert [one["unit"] for one in parse(shown, 0, "", 0, tmp_path)] == [UNIT, "b.service"]
    assert parse("", 0, "", 0, tmp_path) == []


def test_units_that_have_a_dropin_of_ours_are_found_declared_or_not(tmp_path: Path) -> None:
    for path in (f"{UNIT}.d/{DROPIN}", f"celery-worker@a.service.d/{DROPIN}", f"nginx.service.d/{DROPIN}"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    (tmp_path / "celery-worker@b.service.d").mkdir()
    (tmp_path / "celery-worker@b.service.d/10-worker.conf").touch()
    assert roll.installed(tmp_path) == ["celery-worker@a.service", UNIT]


def test_states_are_those_of_this_computers_systemd_and_libraries(host: Host, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(roll, "LIBRARIES", tmp_path / "lib")
    (tmp_path / "lib/aarch64-linux-gnu").mkdir(parents=True)
    library = tmp_path / "lib/aarch64-linux-gnu/libjemalloc.so.2"
    assert states([UNIT])[0]["jemalloc"] == ""
    library.touch()
    (one,) = states([UNIT])
    assert (one["jemalloc"], one["systemd"]) == (str(library), 252)
    assert one["since"] == pytest.approx(time.time() - 100, abs=1)
    assert states([]) == []
    monkeypatch.setattr(roll, "_systemctl", lambda *words: subprocess.CompletedProcess(words, 1, "", "no bus\n"))
    with pytest.raises(OSError, match="systemctl show: no bus"):
        states([UNIT])


def test_a_restart_that_takes_too_long_is_left_to_systemd(tmp_path: Path, monkeypatch: Any) -> None:
    program = tmp_path / "systemctl"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ran = roll._systemctl("restart", UNIT, timeout=0.2)
    assert (ran.returncode, ran.stderr) == (124, "not done within 0.2 s; systemd goes on with it")


# ---- what is to be done ----


def test_an_act_changes_the_dropin_where_it_is_another(host: Host) -> None:
    (change,) = change_of(act())
    assert change.after.content == NEW and change.before.state == "absent"
    assert change_of(act("recycle")) == change_of(act("cordon")) == change_of(act("remove")) == []
    host.dropin = OLD
    assert [one.before.content for one in change_of(act())] == [OLD]
    assert [one.after.state for one in change_of(act("remove"))] == ["absent"]
    host.dropin = NEW
    assert change_of(act()) == []


def test_a_dropin_that_is_written_is_needed_until_the_worker_has_begun_after_it(host: Host) -> None:
    assert needed(act()) and not needed(act("remove"))
    host.dropin = NEW
    assert not needed(act()) and needed(act("remove"))
    host.stale = True
    assert needed(act())
    host.stale, host.began = False, time.monotonic() - 300
    assert needed(act())


def test_one_that_was_taken_away_is_needed_until_the_worker_has_begun_after_it(host: Host) -> None:
    host.dropin = OLD
    (host.units / f"{UNIT}.d" / DROPIN).unlink()
    assert needed(act("remove"))
    host.began = time.monotonic() + 1
    assert not needed(act("remove"))


def test_a_worker_is_recycled_that_is_still_the_one_of_the_plan(host: Host) -> None:
    since = host.since
    # The two clocks of the host are never read at the same time.
    for off in (-0.02, -0.001, 0.0, 0.001, 0.02):
        assert needed(act("recycle", since=since + off))
    assert not needed(act("recycle", since=since - 60))
    assert needed(act("cordon"))


@pytest.mark.parametrize("name", ["recycle", "contain", "allocator", "cordon"])
def test_a_worker_that_was_stopped_is_not_started(host: Host, name: str) -> None:
    host.active = False
    assert not needed(act(name))
    outcome = perform(act(name), HOW)
    assert (outcome.done, outcome.changed, outcome.stop) == (False, False, False)
    assert outcome.why == f"{UNIT} does not run, and is not started by this"
    assert host.dropin is None and host.asked == []


def test_of_a_worker_that_was_stopped_the_dropin_is_taken_away_and_no_more(host: Host) -> None:
    host.active, host.dropin = False, OLD
    assert needed(act("remove"))
    outcome = perform(act("remove"), HOW)
    assert (outcome.done, outcome.changed, outcome.stop) == (True, True, False)
    assert host.dropin is None and host.asked == ["daemon-reload"] and not needed(act("remove"))


# ---- an act ----


def test_a_good_act_writes_restarts_and_sees_that_the_worker_works(host: Host) -> None:
    begin = time.time()
    outcome = perform(act(), HOW)
    assert (outcome.done, outcome.changed, outcome.stop, outcome.why) == (True, True, False, "")
    assert host.dropin == NEW and (host.units / f"{UNIT}.d" / DROPIN).stat().st_mode & 0o777 == 0o644
    reset, again = f"reset-failed -- {UNIT}", f"restart -- {UNIT}"
    assert host.asked == ["depths", "daemon-reload", reset, again, "check", "depths"]
    assert begin <= outcome.ended <= time.time() and 0 < outcome.away_s < 10
    # Before, nothing is waited for; after it, until its queue is as short as it was.
    assert [given[:3] for given in host.given] == [("shop", "0", "{}"), ("shop", "60", '{"gate": 3}')]
    assert all(given[-1] == "gate" for given in host.given)
    assert json.loads(json.dumps(outcome.as_data()))["ended"] == round(outcome.ended, 3)


def test_an_act_that_is_in_force_is_not_done_again(host: Host) -> None:
    assert perform(act(), HOW).changed
    host.began, host.asked = time.monotonic() + 2, []
    outcome = perform(act(), HOW)
    assert (outcome.done, outcome.changed, outcome.stop) == (True, False, False)
    assert outcome.why == "it was in force already" and host.asked == [] and outcome.ended


FAULTS: dict[str, tuple[list[str], list[Any], str]] = {
    "no restart": (["Job failed.\n", ""], [([], [])], "systemctl restart: Job failed."),
    "silent": ([""], [(["gate"], []), ([], [])], "it does not answer within 120 s"),
    "idle": ([""], [([], ["gate"]), ([], [])], "it answers, and takes no task within 120 s"),
    "no broker": ([""], [ReleaseError("Connection refused"), ([], [])], "Connection refused"),
    "no runuser": ([""], [OSError(2, "No such file"), ([], [])], "No such file"),
}


@pytest.mark.parametrize("old", [None, OLD])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_does_not_work_after_it_has_back_what_it_had(host: Host, fault: str, old: str | None) -> None:
    if old is not None:
        host.dropin = old
    host.restarts, host.answers, said = FAULTS[fault]
    # The course of a fault is taken as it goes.
    host.restarts, host.answers = list(host.restarts), list(host.answers)
    outcome = perform(act(), HOW)
    assert (outcome.done, outcome.changed, outcome.stop) == (False, True, True)
    assert host.dropin == old
    assert host.asked.count(f"restart -- {UNIT}") == host.asked.count("daemon-reload") == 2
    assert host.asked[-1] == "check" and host.asked.count("depths") == 1
    assert outcome.why.startswith(f"{UNIT}: ") and said in outcome.why
    assert outcome.why.endswith("; it is back at what it had, and works")
    # Which may be anything, and is not kept.
    assert ("its last lines" in outcome.journal) == (fault in ("no restart", "silent", "idle"))
    assert "journal" not in outcome.as_data() and "its last lines" not in outcome.why


def test_going_back_that_fails_too_is_said(host: Host) -> None:
    host.dropin = OLD
    host.answers = [(["gate"], [])]
    outcome = perform(act(), HOW)
    assert outcome.stop and not outcome.done and host.dropin == OLD
    assert "it does not answer" in outcome.why
    assert "; going back failed too, so look at the host: it does" in outcome.why
    assert "and works" not in outcome.why


def test_a_disk_that_is_full_leaves_the_worker_as_it_was(host: Host, monkeypatch: Any) -> None:
    host.dropin = OLD

    def full(entry: Entry) -> None:
        if entry.content == NEW:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(roll, "write", full)
    outcome = perform(act(), HOW)
    assert outcome.stop and not outcome.done and host.dropin == OLD and "No space left" in outcome.why


def test_a_dropin_that_systemd_refuses_is_not_written(host: Host) -> None:
    host.refused = "60-remedy.conf:2: Unknown key 'RuntimeMaxSek'"
    outcome = perform(act(), HOW)
    assert (outcome.done, outcome.changed, outcome.stop) == (False, False, True) and outcome.ended
    assert "nothing was written" in outcome.why and host.refused in outcome.why
    assert host.dropin is None and host.asked == []


def test_nothing_is_begun_where_the_broker_cannot_be_asked(host: Host) -> None:
    host.depths = ["kombu.exceptions.OperationalError: refused"]
    outcome = perform(act(), HOW)
    assert (outcome.done, outcome.changed, outcome.stop) == (False, False, True)
    assert outcome.why == f"{UNIT}: kombu.exceptions.OperationalError: refused" and host.dropin is None
    assert host.asked == ["depths"]


def test_a_queue_that_grows_stops_the_others_and_the_act_stands(host: Host) -> None:
    host.depths.append({"depths": {"gate": 400}, "grown": ["gate"]})
    outcome = perform(act(), HOW)
    assert (outcome.done, outcome.changed, outcome.stop) == (True, True, True)
    assert "its queue grows (gate from 3 to 400), so no further worker is touched" in outcome.why
    assert host.dropin == NEW and host.asked.count("check") == 1


def test_a_queue_that_is_longer_and_worked_off_stops_nobody(host: Host) -> None:
    host.depths.append({"depths": {"gate": 400}, "grown": []})
    assert not perform(act(), HOW).stop


@pytest.mark.parametrize("error", [None, FileNotFoundError(2, "No such file"), ValueError("no JSON")])
def test_a_broker_that_is_gone_after_it_stops_the_others_and_the_act_stands(
    host: Host, monkeypatch: Any, error: Exception | None
) -> None:
    host.depths.append("refused")
    if error:
        asked = roll.depths

        def gone(queues: Any, how: How, environment: Any, before: Any = None) -> Any:
            if before is None:
                return asked(queues, how, environment)
            raise error

        monkeypatch.setattr(roll, "depths", gone)
    outcome = perform(act(), HOW)
    assert (outcome.done, outcome.stop) == (True, True) and "its queues could not be asked: " in outcome.why
    assert host.dropin == NEW


def test_a_recycle_is_a_restart_alone_and_a_removal_takes_the_dropin_away(host: Host) -> None:
    outcome = perform(act("recycle", since=host.since), HOW)
    assert outcome.done and outcome.changed and host.dropin is None and f"restart -- {UNIT}" in host.asked
    host.dropin, host.asked = OLD, []
    outcome = perform(act("remove"), HOW)
    assert outcome.done and outcome.changed and host.dropin is None and f"restart -- {UNIT}" in host.asked


def test_a_removal_that_the_worker_does_not_live_with_is_taken_back(host: Host) -> None:
    host.dropin, host.answers = OLD, [(["gate"], []), ([], [])]
    outcome = perform(act("remove"), HOW)
    assert outcome.stop and not outcome.done and host.dropin == OLD


def test_a_cordoned_worker_goes_on_and_takes_no_task(host: Host) -> None:
    outcome = perform(act("cordon", queues=["gate", "mail"]), HOW)
    assert (outcome.done, outcome.changed, outcome.stop, outcome.why) == (True, True, False, "") and outcome.ended
    assert host.asked == ["cordon"] and host.given == [("shop", NODE, "gate", "mail")]


@pytest.mark.parametrize(
    ("left", "said"),
    [(None, "it does not answer, so it is not cordoned"), (["gate", "mail"], "it still consumes gate, mail")],
)
def test_a_worker_that_is_not_cordoned_is_said(host: Host, left: Any, said: str) -> None:
    host.left = left
    outcome = perform(act("cordon"), HOW)
    assert (outcome.done, outcome.changed, outcome.stop, outcome.why) == (False, False, True, f"{UNIT}: {said}")


# ---- what is asked, in a real application ----

SHOP = """
import socket, threading, time
from queue import Queue
from celery import Celery
from kombu.transport.memory import Channel
app = Celery("shop", broker="memory://")
gate = Channel.queues["gate"] = Queue()
for _ in range({length}):
    gate.put({{}})
def taken():
    while True:
        time.sleep({each})
        gate.get()
if {each}:
    threading.Thread(target=taken, daemon=True).start()
def serve():
    quiet = dict.fromkeys(["without_gossip", "without_mingle", "without_heartbeat"], True)
    node = "gate@" + socket.gethostname()
    worker = app.WorkController(hostname=node, pool_cls="solo", queues="gate,mail", **quiet)
    threading.Thread(target=worker.start, daemon=True).start()
    while not app.control.ping(timeout=0.2):
        pass
"""
SERVED = "import sys; sys.path.insert(0, '.'); import shop; shop.serve()\n"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: Any) -> Any:
    """An application whose broker is in its own process: so many messages, one taken each so many seconds."""

    def made(length: int = 0, each: float = 0, serves: bool = False) -> None:
        (tmp_path / "shop.py").write_text(SHOP.format(length=length, each=each))

        def run(release: Path, user: str, environment: Any, code: str, *args: str) -> Any:
            words = [sys.executable, "-c", SERVED + code if serves else code, *args]
            return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)

        monkeypatch.setattr(roll, "run_in_release", run)

    return made


def asked(length: int, each: float, settle_s: int, monkeypatch: Any, shop: Any) -> tuple[int, bool]:
    """How long the queue is, which had 5 messages before, and whether it grows. Out of a minute, it is an error."""
    monkeypatch.setattr(roll, "FALLING_S", 1.0)
    shop(length, each)
    found = depths(["gate"], How(Path("/"), "shop", "celery", 1, 1, settle_s), {}, {"gate": 5})
    return found["gate"], "" in found


def test_queues_are_counted_and_one_that_is_not_there_is_empty(shop: Any) -> None:
    shop(length=7)
    assert depths(["mail", "gate", "none"], HOW, {}) == {"mail": 0, "gate": 7, "none": 0}


def test_a_queue_that_is_as_long_as_before_but_for_a_few_is_not_waited_for(monkeypatch: Any, shop: Any) -> None:
    assert asked(15, 0, 600, monkeypatch, shop) == (15, False)


def test_a_queue_that_is_longer_and_stays_so_has_grown_when_its_time_is_over(monkeypatch: Any, shop: Any) -> None:
    began = time.monotonic()
    assert asked(16, 0, 3, monkeypatch, shop) == (16, True) and time.monotonic() > began + 3


def test_a_queue_that_is_longer_and_becomes_shorter_is_not_waited_for(monkeypatch: Any, shop: Any) -> None:
    length, grown = asked(5000, 0.1, 600, monkeypatch, shop)
    assert 4000 < length < 5000 and not grown


def test_an_application_that_cannot_be_asked_says_why(shop: Any, tmp_path: Path) -> None:
    shop()
    (tmp_path / "shop.py").write_text("raise RuntimeError('no settings')")
    with pytest.raises(ReleaseError, match="RuntimeError: no settings"):
        depths(["gate"], HOW, {})


@pytest.mark.parametrize(("queues", "done"), [(["gate", "mail"], True), (["gate"], False)])
def test_a_real_worker_is_cordoned_when_it_consumes_nothing_more(
    host: Host, shop: Any, queues: list[str], done: bool
) -> None:
    shop(serves=True)
    outcome = perform(act("cordon", queues=queues), HOW)
    assert (outcome.done, outcome.why) == (done, "" if done else f"{UNIT}: it still consumes mail")


# ---- the module ----


def module(capsys: Any, monkeypatch: Any, *came: Outcome, check: bool = False, **params: Any) -> tuple[Any, list[str]]:
    """What it returns, and the acts that it began."""
    begun: list[str] = []

    def performed(one: dict[str, Any], how: Any) -> Outcome:
        assert (how.restart_s, how.app) == (240, "shop")
        begun.append(one["unit"])
        return came[len(begun) - 1]

    for name, fake in {"perform": performed, "installed": list, "states": lambda units: [{"unit": units}]}.items():
        monkeypatch.setattr(worker_remedy, name, fake)
    monkeypatch.setattr(worker_remedy, "needed", lambda one: one["id"] != "done")
    monkeypatch.setattr(worker_remedy, "change_of", lambda one: [])
    given = {"app": "shop", **params, "_ansible_check_mode": check, "_ansible_diff": True}
    with patch_module_args(given), pytest.raises(SystemExit):
        worker_remedy.main()
    return json.loads(capsys.readouterr().out), begun


ACTS: list[Any] = [{"id": str(n), "unit": f"celery-worker@{n}.service", "act": "recycle"} for n in range(3)]


def test_the_module_does_the_acts_in_their_order_until_one_says_stop(capsys: Any, monkeypatch: Any) -> None:
    came = [
        Outcome("0", "a", True, True),
        Outcome("1", "b", changed=True, stop=True, why="b: silent", journal="its last lines"),
        Outcome("2", "c"),
    ]
    told, begun = module(capsys, monkeypatch, *came, acts=ACTS)
    assert told["failed"] and told["msg"] == "b: silent\nits last lines" and told["changed"]
    assert len(told["outcomes"]) == len(begun) == 2
    head: Any = {"host": "w-1", "settings": [], "reason": "", "prove_s": 0.0}
    acts: list[Any] = [{**head, **one} for one in ACTS]
    entries, said = outcomes(acts, told, time.time())
    assert [(one["id"], one["event"]) for one in entries] == [("0", "done"), ("1", "failed")]
    assert said[2].startswith("w-1 2: recycle: not begun: ")


def test_the_module_says_what_is_needed_and_does_nothing_in_check_mode(capsys: Any, monkeypatch: Any) -> None:
    acts = [ACTS[0], {**ACTS[1], "id": "done"}]
    told, begun = module(capsys, monkeypatch, check=True, acts=acts, workers=[UNIT])
    assert told["changed"] and begun == [] and told["outcomes"] == [] and told["workers"] == [{"unit": [UNIT]}]
    assert told["diff"] == [{"before": "", "after": "recycle celery-worker@0.service\n"}]
    assert not module(capsys, monkeypatch, check=True, acts=acts[1:])[0]["changed"]
