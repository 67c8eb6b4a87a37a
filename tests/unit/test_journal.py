"""What is taken of a journal: what ended, what was killed, what failed, and what was said just before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from plimsoll import journal
from plimsoll.journal import event, events, lines

GATE, SALES = "celery-worker@gate.service", "celery-worker@sales.service"
# As journalctl --output=json has them, of a worker that the kernel killed.
OOM = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=celery-worker@gate.service,mems_allowed=0,"
    "oom_memcg=/celery.slice/celery-worker@gate.service,task_memcg=/celery.slice/celery-worker@gate.service,"
    "task=python,pid=812,uid=998"
)


def entry(at: float, message: Any, **more: Any) -> dict[str, Any]:
    return {
        "__CURSOR": f"s={at};{message}",
        "__REALTIME_TIMESTAMP": str(round(at * 1e6)),
        "MESSAGE": message,
        "PRIORITY": "6",
        "_TRANSPORT": "stdout",
        **more,
    }


def systemd(at: float, message: str, unit: str = GATE, **more: Any) -> dict[str, Any]:
    return entry(at, message, UNIT=unit, _PID="1", _SYSTEMD_UNIT="init.scope", _TRANSPORT="journal", **more)


def worker(at: float, message: Any, unit: str = GATE, **more: Any) -> dict[str, Any]:
    return entry(at, message, _SYSTEMD_UNIT=unit, _PID="812", **more)


def kernel(at: float, message: str) -> dict[str, Any]:
    return entry(at, message, _TRANSPORT="kernel", PRIORITY="3")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: Any) -> Any:
    """A journalctl that answers with what it is told to, call after call; and what it was asked."""
    log = tmp_path / "asked"

    def answers(*calls: list[dict[str, Any]]) -> Any:
        for number, found in enumerate(calls):
            (tmp_path / f"answer{number}").write_text("".join(json.dumps(one) + "\n" for one in found))
        program = tmp_path / "journalctl"
        program.write_text(
            f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\n"
            f"log = Path({str(log)!r})\nbefore = log.read_text() if log.exists() else ''\n"
            "log.write_text(before + json.dumps(sys.argv[1:]) + '\\n')\n"
            f'answer = Path({str(tmp_path)!r}) / f"answer{{before.count(chr(10))}}"\n'
            "print(answer.read_text() if answer.exists() else '', end='')\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return answers


def test_an_end_comes_with_what_the_worker_said_just_before(asked: Any) -> None:
    killed = systemd(20, "A process of this unit has been killed by the OOM killer.", PRIORITY="4")
    calls = asked(
        # --grep with --lines turns the order round.
        [systemd(21, "Failed with result 'oom-kill'."), killed, kernel(19.5, OOM), kernel(5, "eth0: link is up")],
        [worker(19, "Task scan_ticket received"), killed],
        [worker(19, "Task scan_ticket received"), worker(20.5, "half a line")],
    )
    found, left_out, until = events([SALES, GATE], 4_000_000, 30_000_000)
    assert until == 30_000_000
    assert [(one["time"], one["source"], one["unit"], one["message"][:12]) for one in found] == [
        (19.0, "worker", GATE, "Task scan_ti"),
        (19.5, "kernel", GATE, "oom-kill:con"),
        (20.0, "systemd", GATE, "A process of"),
        (20.5, "worker", GATE, "half a line"),
        (21.0, "systemd", GATE, "Failed with "),
    ]
    assert left_out == []
    first, second, _ = calls()
    assert "--reverse" in first
    assert first[-8:] == [
        *(f"_SYSTEMD_UNIT={unit}" for unit in (GATE, SALES)),
        "+",
        "_PID=1",
        *(f"UNIT={unit}" for unit in (GATE, SALES)),
        "+",
        "_TRANSPORT=kernel",
    ]
    assert {"--since=@4.000000", "--until=@30.000000"} <= set(first)
    assert {"--since=@4.000000", "--until=@20.000000", f"_SYSTEMD_UNIT={GATE}"} <= set(second)


def test_what_is_outside_of_the_span_is_another_collections(asked: Any) -> None:
    asked([worker(at, f"[t: ERROR/MainProcess] {at}") for at in (1, 2, 3)])
    assert [one["time"] for one in events([GATE], 2_000_000, 3_000_000)[0]] == [2.0]


def test_of_very_many_the_newest_are_taken_and_that_is_said(asked: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(journal, "MOST_EVENTS", 3)
    asked([worker(at, "[t: ERROR/MainProcess]") for at in (9, 8, 7, 6)])
    found, left_out, _ = events([GATE], 0, 10_000_000)
    assert [one["time"] for one in found] == [7.0, 8.0, 9.0]
    assert left_out == ["journal: more than 3 events, of which the newest are here"]


def test_without_a_journal_nothing_is_said(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert events([GATE], 0, 1) == ([], [], 1)


def test_a_journal_that_cannot_be_read_is_said_and_asked_again(asked: Any, tmp_path: Path, monkeypatch: Any) -> None:
    asked([])
    with (tmp_path / "journalctl").open("a") as program:
        program.write("print('Compiled without pattern matching support', file=sys.stderr)\nsys.exit(1)\n")
    assert events([GATE], 5, 9) == ([], ["journal: Compiled without pattern matching support"], 5)
    (tmp_path / "journalctl").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(journal, "SECONDS", 0.2)
    assert events([GATE], 5, 9) == ([], ["journal: journalctl took more than 0.2 s"], 5)


@pytest.mark.parametrize(
    "odd",
    [
        {"PRIORITY": "abc"},
        {"PRIORITY": ["3", "4"]},
        {"MESSAGE": ["one", "two"]},
        {"MESSAGE": [1, 999]},
        {"_PID": ["1", "2"]},
        {"UNIT": "celery-worker@sales.service"},
    ],
)
def test_a_worker_that_writes_to_the_journal_itself_can_neither_stop_it_nor_speak_for_systemd(odd: Any) -> None:
    told = event({**worker(1, "x"), **odd})
    assert told is None or (told["source"], told["unit"]) == ("worker", GATE)


def test_passwords_in_urls_do_not_leave_the_host() -> None:
    said = worker(1, "ConnectionError: redis://:s3cr3t/@x@10.0.0.1:6379/0 and amqp://u:p@q:5672//")
    told = event(said)
    assert told and told["message"] == "ConnectionError: redis://***@10.0.0.1:6379/0 and amqp://***@q:5672//"


def test_bytes_that_are_no_text_and_lines_without_end_are_fit_to_send() -> None:
    told = event(worker(1, list(b"\xffoops")))
    assert told and told["message"] == "\ufffdoops"
    told = event(worker(1, "x" * 9999))
    assert told and len(told["message"]) == 2000
    # journalctl says null of what is too long for it.
    assert event(worker(1, None)) is None
    assert json.loads(lines([told])) == told


@pytest.mark.parametrize(
    ("message", "telling"),
    [
        ("celery-worker@gate.service: Main process exited, code=killed, status=9/KILL", True),
        ("celery-worker@gate.service: Scheduled restart job, restart counter is at 3.", True),
        ("celery-worker@gate.service: Watchdog timeout (limit 20s)!", True),
        ("[2026-11-24 12:00:00,000: ERROR/ForkPoolWorker-1] Task x[1] raised unexpected: ValueError()", True),
        ("Memory cgroup out of memory: Killed process 812 (python) total-vm:1", True),
        ("[2026-11-24 12:00:00,000: INFO/MainProcess] Task x[1] received", False),
        ("[2026-11-24 12:00:00,000: INFO/ForkPoolWorker-1] no ERROR/here", False),
        ("Started celery-worker@gate.service - Celery worker gate.", False),
    ],
)
def test_what_is_telling(message: str, telling: bool) -> None:
    assert bool(journal.re.search(journal.TELLING, message)) is telling
