"""A soak on a staging host: what its units are, that nothing stays, and that the controller believes no host."""

from __future__ import annotations

import copy
import getpass
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from plimsoll import cli, soakhost
from plimsoll.soak import Judge, budget_of, plan_of
from plimsoll.soakbench import LEFT, Reader, Trouble
from plimsoll.soakhost import Asked, Units, properties_of, soak
from plimsoll.soakreport import sound

TASKS: dict[str, Any] = {"tasks": {"shop.pay": {"args": ["{n}"]}}, "limits": {"tasks": 40}}
SHOWN = """LoadState=loaded
MemoryHigh=293601280
MemoryMax=335544320
MemorySwapMax=0
TasksMax=infinity
LimitNOFILE=65536
OOMPolicy=continue
Slice=celery.slice
"""


def asked(**more: Any) -> Asked:
    given = {
        "app": "shop",
        "unit": "celery-worker@gate.service",
        "home": Path("/opt/celery"),
        "user": getpass.getuser(),
        "program": Path("/opt/plimsoll/soak/plimsoll_soak.py"),
        "tasks": TASKS,
        "budget": {},
        "day": [],
    }
    return Asked(**{**given, **more})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(soakhost, "_systemctl", lambda *words: SHOWN if words[0] == "show" else "")
    monkeypatch.setattr(soakhost, "FOLDER", tmp_path / "soak")
    return tmp_path / "soak"


def test_the_worker_has_the_limits_of_the_one_that_it_is_like_and_the_sender_has_none(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: began.append(words))
    units = Units(
        Path("/v/python"), Path("/p/soak.py"), "celery", Path("/app"), properties_of("celery-worker@gate.service")
    )
    for name in ("worker", "send"):
        units.start(name, Path("/run/x"), {"PYTHONMALLOC": "malloc"}, io.BytesIO())
    worker, sender = began
    assert "--property=MemoryHigh=293601280" in worker and "--property=Slice=celery.slice" in worker
    assert not any("TasksMax" in word for word in worker), "infinity is no limit"
    assert "--property=OOMScoreAdjust=1000" in worker, "before those that are deployed"
    assert not any("Memory" in word or "OOMScore" in word for word in sender)
    for words in began:
        assert "--property=User=celery" in words and "--property=EnvironmentFile=/etc/celery/environment" in words
        # After the environment file, which would win over --setenv.
        assert words.index("--") < words.index("/usr/bin/env") < words.index("PYTHONMALLOC=malloc")
    assert worker[-4:] == ["/v/python", "/p/soak.py", "worker", "/run/x"]


def test_a_worker_that_is_not_deployed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soakhost, "_systemctl", lambda *_: "LoadState=not-found\n")
    with pytest.raises(Trouble, match=r"celery-worker@gate.service is not on this host.*deploy"):
        soak(asked(), lambda: "")


def test_a_worker_of_which_only_the_template_is_there_has_no_limits_and_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = "LoadState=loaded\nMemoryHigh=infinity\nMemoryMax=infinity\n"
    monkeypatch.setattr(soakhost, "_systemctl", lambda *_: shown)
    with pytest.raises(Trouble, match=r"has no MemoryMax here.*deploy"):
        soak(asked(), lambda: "")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tasks": {"tasks": {}}}, "soak_tasks: tasks: names no task"),
        ({"budget": {"defalt": 1}}, "soak_budget: the file: knows no key 'defalt'"),
        ({"user": "nobody-of-this-name"}, "there is no user nobody-of-this-name"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_before_anything_begins(host: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(Trouble, match=said):
        soak(asked(**more), lambda: "")
    assert not host.exists()


def test_two_soaks_at_the_same_time_are_refused(host: Path) -> None:
    host.mkdir()
    with pytest.raises(Trouble, match=r"another soak is under way.*remove "):
        soak(asked(), lambda: "")
    assert host.exists()


def test_what_only_its_own_may_write_to_is_not_the_workers_users(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns a folder can put a link in the place of what lies in it."""
    owned: list[str] = []
    monkeypatch.setattr(Units, "own", lambda _, path: owned.append(str(path.relative_to(host))))
    monkeypatch.setattr(Units, "start", lambda *_: subprocess.Popen(["false"], start_new_session=True))
    before = os.umask(0o077)
    modes: list[int] = []
    try:
        with pytest.raises(Trouble, match="the worker ended with status 1"):
            soak(asked(), lambda: "")
        monkeypatch.setattr(Units, "start", lambda *_: modes.append(host.stat().st_mode & 0o777))
        with pytest.raises(Trouble):
            soak(asked(), lambda: "")
    finally:
        os.umask(before)
    assert set(owned) == {f"1/{name}" for name in ("said", "records", "trace", "tasks", "queue", "control")}
    assert modes == [0o755]


def test_what_is_called_off_leaves_no_folder(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []

    def start(_: Units, name: str, *__: Any) -> subprocess.Popen[bytes]:
        began.append(name)
        return subprocess.Popen(["sleep", "60"], start_new_session=True)

    monkeypatch.setattr(Units, "start", start)
    with pytest.raises(Trouble, match="the controller is gone; no worker and no queue of it is left"):
        soak(asked(), lambda: "called off, as the controller is gone" if began else "")
    assert began == ["worker"] and not host.exists()


def test_no_link_of_the_workers_user_is_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"kind": "task"}\n')
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "7-1.jsonl").symlink_to(secret)
    os.mkfifo(tmp_path / "records" / "8-1.jsonl")
    (tmp_path / "records" / "9-1.jsonl").write_text('{"kind": "process"}\n{"kind": "ta')
    reader = Reader(tmp_path / "records")
    assert list(reader.new()) == [("9-1.jsonl", {"kind": "process"})]
    with (tmp_path / "records" / "9-1.jsonl").open("a") as more:
        more.write('sk"}\n')
    assert list(reader.new()) == [("9-1.jsonl", {"kind": "task"})]


# ---- the controller ----


def came() -> dict[str, Any]:
    """As a host returns it."""
    plan = plan_of(TASKS)
    judge = Judge(plan, budget_of({}, list(plan.tasks)))
    judge.take("7-1", {"kind": "process", "measure": "malloc", "python": "3.11.2"}, 0.0)
    for n in range(2600):
        record = {"task": "shop.pay", "growth_bytes": 4 * 300_000 if n % 4 == 3 else None, "grown": 4, "failed": False}
        figures = {"used_bytes": 9 << 20, "rss_kb": 60_000, "fds": 9, "seconds": 0.01, "error": ""}
        judge.take("7-1", {"kind": "task", **record, **figures}, n / 100)
    window = {"unit": "soak", "pid": 7, "id": "soak", "time": 1796002572.0}
    site = {"file": "/opt/celery/releases/1/app/shop/tasks.py", "line": 9, "function": "pay", "growth_kb": 900}
    grown = {
        "kind": "growth",
        "rss_growth_kb": 1000,
        "traced_growth_kb": 950,
        "sites": [site],
        "tasks": {"shop.pay": {"count": 3}},
    }
    return json.loads(
        json.dumps(
            {
                "sent": {"seconds": 26.0, "sent": 2600, "left_out": 0, "ended": "decided"},
                "worker": judge.figures(),
                "tasks": judge.finish(26.0),
                "records": {"shop.pay": [{**window, **grown}]},
                "notes": [f"{LEFT}: plimsoll-soak-1"],
            }
        )
    )


def told(tmp_path: Path, result: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    (tmp_path / "tasks.yml").write_text(json.dumps(TASKS))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(result)))
    words = ["soaked", "--app=shop", "--host=s-1", "--broker=b-1", f"--tasks={tmp_path / 'tasks.yml'}"]
    return cli.main([*words, f"--out={tmp_path / 'out'}"])


def test_what_a_host_found_becomes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert told(tmp_path, came(), monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    assert "shop.pay  FAIL" in said["text"] and "at shop/tasks.py:9 in pay" in said["text"] and LEFT in said["text"]
    assert (said["verdict"], said["page"]) == ("fail", str(tmp_path / "out" / "soak.html"))
    document = json.loads((tmp_path / "out" / "soak.json").read_text())
    assert (document["verdict"], document["host"], document["broker"]) == ("fail", "s-1", "b-1")
    assert "shop/tasks.py:9" in (tmp_path / "out" / "junit.xml").read_text()
    assert (tmp_path / "out" / "soak.html").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), ["no object"]),
        (("sent", "seconds"), "soon"),
        (("tasks",), [{}] * 1001),
        (("tasks", 0, "verdict"), "great"),
        (("tasks", 0, "growth_kb"), float("nan")),
        (("tasks", 0, "curve"), [[1, 2, 3]]),
        (("records", "shop.pay"), "x" * 9),
        (("worker", "rss_kb"), True),
    ],
)
def test_a_host_that_lies_is_an_error_and_no_report(
    path: tuple[Any, ...], value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    result: Any = copy.deepcopy(came())
    if path:
        place = result
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    else:
        result = value
    assert told(tmp_path, result, monkeypatch) == cli.BAD_INPUT
    assert "the host's result: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "soak.json").exists()


def test_growth_without_its_interval_is_none() -> None:
    result = came()
    result["tasks"][0]["growth_low"] = None
    (one,) = sound(result)["tasks"]
    assert one["growth_kb"] is None and one["error_kb"] is None


def test_records_that_are_none_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    result = came()
    result["records"]["shop.pay"] = [{"kind": "growth", "sites": "<script>"}, {"kind": 7}, {}]
    assert told(tmp_path, result, monkeypatch) == 0
    assert "shop.pay  FAIL" in capsys.readouterr().out
