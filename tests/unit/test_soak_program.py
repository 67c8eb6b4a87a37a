"""What of a soak runs in the application's Python, without an application: the recorder, and the sender's pace."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, load_file

program = load_file(ROOT / "roles" / "soak" / "files" / "plimsoll_soak.py", "plimsoll_soak")
KEPT = 200_000


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "records").mkdir()
    yield program.Recorder(tmp_path)
    gc.unfreeze()


def records(recorder: Any) -> list[dict[str, Any]]:
    recorder.close()
    recorder.write()
    return [json.loads(line) for line in recorder.path.read_text().splitlines()]


def test_four_tasks_of_a_name_that_another_one_follows_have_their_growth_and_it_is_theirs(recorder: Any) -> None:
    kept = []
    for name in ["leak"] * 9 + ["quiet"] * 9 + ["leak", "quiet"] * 3:
        recorder.start(name)
        if name == "leak":
            kept.append(bytes([len(kept)]) * KEPT)
        recorder.end(False, "")
    head, *tasks = records(recorder)
    assert (head["kind"], head["measure"]) == ("process", "malloc")
    grown = [(one["task"], one["growth_bytes"]) for one in tasks if one["growth_bytes"] is not None]
    assert [name for name, _ in grown] == ["leak", "leak", "quiet", "quiet"]
    assert all(one["grown"] == 4 for one in tasks)
    # The first ones of a process import and connect; malloc adds a few bytes to each.
    assert grown[1][1] == pytest.approx(4 * KEPT, abs=2000)
    assert abs(grown[3][1]) < 2000


def test_what_a_task_leaves_in_cycles_is_no_growth(recorder: Any) -> None:
    for _ in range(9):
        recorder.start("cycles")
        loop: list[Any] = [bytes([1]) * KEPT]
        loop.append(loop)
        del loop
        recorder.end(False, "")
    grown = [one["growth_bytes"] for one in records(recorder)[1:] if one["growth_bytes"] is not None]
    assert abs(grown[-1]) < 2000


def test_a_task_that_a_task_calls_is_a_part_of_it_and_one_that_raises_is_told(recorder: Any) -> None:
    recorder.start("outer")
    recorder.start("inner")
    recorder.end(True, "KeyError")
    recorder.end(True, "ValueError")
    [one] = records(recorder)[1:]
    assert (one["task"], one["failed"], one["error"]) == ("outer", True, "ValueError")


def test_tasks_side_by_side_are_refused(recorder: Any) -> None:
    recorder.start("one")
    caught: list[Exception] = []

    def other() -> None:
        try:
            recorder.start("other")
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "pool prefork can" in str(caught[0])


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.001)


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a sender of tasks at 10 a second for a minute, of which two that are `decided` come first."""

    def run(decided: tuple[str, ...] = (), stalls: tuple[float, float] = (0, 0), seconds: float = 300) -> Any:
        clock = Clock()
        monkeypatch.setattr(program, "time", clock)
        lines = [[number / 10, "abc"[number // 10 % 3], [], {}] for number in range(600)]
        (tmp_path / "schedule.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "decided.json").write_text(json.dumps(decided))
        (tmp_path / "said").mkdir(exist_ok=True)
        sender = program.Sender.__new__(program.Sender)
        sender.folder, sender.plan = tmp_path, {"seconds": seconds, "queue": "q", "backlog": 64}
        sender.sent = sender.left_out = sender.room = 0
        sender.over, sender.decided = "", frozenset(decided)
        sender.began, sender.look_at, sender.say_at = clock.now, 0.0, 0.0
        times: list[tuple[float, str]] = []
        sender.app = SimpleNamespace(send_task=lambda task, *_, **__: times.append((clock.now - sender.began, task)))
        # A worker that is fast, and takes nothing for a while.
        sender.waiting = lambda: 64 if stalls[0] <= clock.now - sender.began < stalls[1] else 0
        sender.run()
        return times, json.loads((tmp_path / "said" / "sent.json").read_text())

    return run


def most_in_a_second(times: list[tuple[float, str]]) -> int:
    at = [when for when, _ in times]
    return max(sum(one <= other < one + 1 for other in at) for one in at)


def test_tasks_are_sent_when_they_are_due(sent: Any) -> None:
    times, told = sent()
    assert told == {"sent": 600, "left_out": 0, "over": "all sent"}
    assert [when for when, _ in times] == pytest.approx([number / 10 for number in range(600)], abs=0.01)


def test_what_waited_for_a_slow_worker_is_not_made_up_for(sent: Any) -> None:
    times, _ = sent(stalls=(5, 25))
    assert most_in_a_second(times) <= 10 + 2
    assert times[-1][0] == pytest.approx(60 + 13, abs=8)


def test_what_is_decided_is_left_out_and_its_time_too(sent: Any) -> None:
    times, told = sent(decided=("a", "b"))
    assert {task for _, task in times} == {"c"}
    assert told == {"sent": 200, "left_out": 400, "over": "all sent"}
    assert most_in_a_second(times) <= 10 + 1
    assert times[-1][0] == pytest.approx(20, abs=0.5)


def test_the_time_box_ends_it(sent: Any) -> None:
    times, told = sent(seconds=30)
    assert told["over"] == "time box"
    assert times[-1][0] <= 30
    assert len(list(itertools.takewhile(lambda one: one[0] <= 29.5, times))) == pytest.approx(295, abs=2)
