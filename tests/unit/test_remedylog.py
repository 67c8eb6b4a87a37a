"""The log of remediation: what is in it after a crash, what it makes of a worker, and one run at a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import plimsoll
import psutil
import pytest
from plimsoll.lines import InputError
from plimsoll.remedylog import LOCK, LOG, Remedy, append, known, read_log, remedy, take_lock

NOW = 1_763_942_400.0
GATE = ("w-1", "celery-worker@gate.service")
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "findings.schema.json").read_text())


def line(event: str, act: str = "contain", when: float = NOW, unit: str = GATE[1], **more: Any) -> Any:
    return {"time": when, "id": "1f0c", "event": event, "host": GATE[0], "unit": unit, "act": act, **more}


# ---- the file ----


def test_what_is_noted_is_read_in_its_order(tmp_path: Path) -> None:
    lines = [line("planned"), line("done", settings=["RuntimeMaxSec=9s"], why="ü\n", prove_s=120.0, away_s=7.1)]
    assert read_log(tmp_path / "store") == []
    append(tmp_path / "store", lines)
    append(tmp_path / "store", [])
    append(tmp_path / "store", [last := line("proven", verdict="remedied", before=None, after={"hours": 1.0})])
    assert read_log(tmp_path / "store") == [*lines, last]
    assert len((tmp_path / "store" / LOG).read_text().splitlines()) == 3


def test_nothing_to_note_makes_no_log(tmp_path: Path) -> None:
    append(tmp_path / "store", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_line_that_was_cut_off_is_left_out_and_the_next_one_takes_its_place(tmp_path: Path, left: int) -> None:
    """A run that ended as it wrote may have left all of the line but its end, too."""
    first, cut, after = line("planned"), line("done", why="ü" * 9), line("failed")
    append(tmp_path, [first])
    whole = (tmp_path / LOG).read_bytes()
    text = json.dumps(cut, ensure_ascii=False).encode()
    (tmp_path / LOG).write_bytes(whole + (text[:left] if left > 0 else text))
    assert read_log(tmp_path) == [first]
    append(tmp_path, [after])
    assert read_log(tmp_path) == [first, after]
    assert (tmp_path / LOG).read_bytes() == whole + json.dumps(after, sort_keys=True).encode() + b"\n"


def test_a_log_of_nothing_but_a_cut_off_line_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"act": "cont')
    assert read_log(tmp_path) == []
    append(tmp_path, [line("planned")])
    assert read_log(tmp_path) == [line("planned")]


DAMAGED = {
    "no json": '{"act": ',
    "empty": "",
    "zeros": "\0" * 20,
    "no object": "[1]",
    "a number": "5",
    "null": "null",
    "another event": json.dumps(line("undone")),
    "no host": json.dumps({name: value for name, value in line("done").items() if name != "host"}),
    "a unit that is none": json.dumps(line("done", unit=7)),  # type: ignore[arg-type]
    "no time": json.dumps({**line("done"), "time": "noon"}),
    "settings": json.dumps(line("done", settings="RuntimeMaxSec=9s")),
    "prove_s": json.dumps(line("done", prove_s="soon")),
    "away_s": json.dumps(line("done", away_s="long")),
    "verdict": json.dumps(line("proven", verdict=5)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_before_the_last_is_named(tmp_path: Path, damage: str) -> None:
    good = json.dumps(line("done"))
    (tmp_path / LOG).write_text(f"{good}\n{DAMAGED[damage]}\n{good}\n")
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / LOG))}:2: damaged; .*mend or move it$"):
        read_log(tmp_path)


# ---- what is true of a worker ----


def stands(*lines: Any) -> tuple[Any, Any, bool]:
    """The act that is in force, the last line that counts, and whether it waits for a proof."""
    one = known(lines)[GATE]
    last = one.stands
    return one.act and one.act["act"], last and str(last.get("verdict") or last["event"]), one.open


DONE, PROVEN = line("done"), line("proven", verdict="contained")
FAILED = line("failed", "allocator")
COURSES: list[tuple[list[Any], tuple[str | None, str | None, bool]]] = [
    ([line("planned")], (None, None, False)),
    ([line("planned"), DONE], ("contain", "done", True)),
    ([DONE, PROVEN], ("contain", "contained", False)),
    ([FAILED], (None, "failed", False)),
    ([DONE, PROVEN, FAILED], ("contain", "failed", False)),
    ([DONE, line("removed", "remove")], (None, None, False)),
    ([DONE, line("planned", "remove")], ("contain", "done", True)),
    ([DONE, PROVEN, line("planned", "allocator")], ("contain", "contained", False)),
    ([DONE, PROVEN, line("done", "allocator")], ("allocator", "done", True)),
    ([DONE, line("removed", "remove"), DONE], ("contain", "done", True)),
    # Its removal did not go well, so that it is in force, and what was proven of it as true as before.
    ([DONE, line("proven", verdict="worse"), line("failed", "remove")], ("contain", "worse", False)),
    ([line("done", "cordon")], ("cordon", "done", False)),
]


@pytest.mark.parametrize(("course", "wanted"), COURSES)
def test_the_last_act_that_is_in_force_is_known(course: list[Any], wanted: Any) -> None:
    assert stands(*course) == wanted


def test_what_was_begun_is_known_until_something_came_of_it() -> None:
    begun = line("planned", "allocator")
    assert known([DONE, begun])[GATE].planned == begun
    for after in (line("done", "allocator"), FAILED, line("removed", "remove"), PROVEN):
        assert known([begun, after])[GATE].planned is None


def test_what_was_of_no_use_is_remembered_whatever_comes_after() -> None:
    log = [DONE, line("proven", verdict="not_remedied"), line("removed", "remove"), FAILED, line("done", "recycle")]
    assert known(log)[GATE].useless == {"contain", "allocator"}
    assert known([DONE, line("proven", verdict="worse")])[GATE].useless == {"contain"}
    assert known([DONE, PROVEN, line("proven", "recycle", verdict="remedied")])[GATE].useless == frozenset()


def test_workers_are_told_apart_by_host_and_unit() -> None:
    log = [DONE, {**DONE, "host": "w-2"}, line("failed", unit="celery-worker@sales.service")]
    assert {name: one.open for name, one in known(log).items()} == {
        GATE: True,
        ("w-2", GATE[1]): True,
        ("w-1", "celery-worker@sales.service"): False,
    }


# ---- for findings.json ----


def told(*lines: Any) -> Any:
    """As findings.json has it, and as its schema does."""
    one = remedy(known(lines)[GATE])
    jsonschema.validate(one, {"$ref": "#/$defs/remedy", "$defs": SCHEMA["$defs"]})
    return one


def test_the_findings_say_what_was_done_and_what_came_of_it() -> None:
    done = line("done", settings=["RuntimeMaxSec=9s"], reason="it leaks", why="")
    assert told(done) == {
        **{"act": "contain", "settings": ["RuntimeMaxSec=9s"], "time": "2025-11-24T00:00:00+00:00", "state": "done"},
        **{"why": "it leaks", "before": None, "after": None},
    }
    # The lines of the drop-in are those of the act, whatever its proof says.
    proof: Any = {"verdict": "worse", "why": "2 OOM kills since", "before": None, "after": None, "settings": []}
    proven = told(done, line("proven", when=NOW + 60, **proof))
    assert (proven["state"], proven["settings"]) == ("worse", ["RuntimeMaxSec=9s"])
    assert (proven["time"], proven["why"]) == ("2025-11-24T00:01:00+00:00", "2 OOM kills since")
    failed = told(line("failed", "allocator", why="it does not answer"))
    assert (failed["act"], failed["state"], failed["why"]) == ("allocator", "failed", "it does not answer")


@pytest.mark.parametrize("course", [course for course, _ in COURSES])
def test_whatever_the_log_has_the_findings_keep_to_their_schema(course: list[Any]) -> None:
    told(*course)


def test_the_findings_say_nothing_where_nothing_was_done_or_it_was_removed() -> None:
    assert told(line("planned")) is None and told(DONE, line("removed", "remove")) is None


def test_that_it_was_worse_is_still_told_when_it_has_been_taken_away() -> None:
    proof: Any = {"verdict": "worse", "why": "2 OOM kills since", "before": None, "after": None, "settings": []}
    gone = told(DONE, line("proven", when=NOW + 60, **proof), line("removed", "remove", when=NOW + 90))
    assert gone is not None and gone["state"] == "worse"


def test_the_schema_has_the_keys_of_a_remedy() -> None:
    assert list(SCHEMA["$defs"]["remedy"]["properties"]) == list(Remedy.__annotations__)
    assert SCHEMA["$defs"]["remedy"]["required"] == list(Remedy.__annotations__)


# ---- one run at a time ----

WAIT = "print(flush=True); select.select([sys.stdin], [], [], 60)"
TAKE = "from plimsoll.remedylog import take_lock; take_lock(Path(sys.argv[-1]))"
RUNS: dict[str, str] = {
    "by itself": f"import select, sys\nfrom pathlib import Path\n{TAKE}\n{WAIT}",
    # As ansible-playbook does: each task in a fork, which has its name, and ends with the task.
    "in a fork": "import os, select, sys, subprocess\nif not os.fork():\n"
    f"    code = 'import sys; from pathlib import Path; {TAKE}'\n"
    "    os._exit(subprocess.run([sys.executable, '-c', code, sys.argv[-1]]).returncode)\n"
    f"assert os.wait()[1] == 0\n{WAIT}",
}


@contextmanager
def playbook(root: Path, store: Path, code: str) -> Iterator[subprocess.Popen[bytes]]:
    """One that has taken the lock and lives, up to a minute, until it is left or killed."""
    program = root / "ansible-playbook"
    program.write_text(code)
    modules = str(Path(plimsoll.__file__).parents[1])
    command = [sys.executable, str(program), str(store)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={"PYTHONPATH": modules}, **pipes) as run:
        assert run.stdin and run.stdout
        try:
            assert run.stdout.readline() == b"\n"
            yield run
        finally:
            run.kill()


@pytest.mark.parametrize("how", RUNS)
def test_a_second_run_is_refused_for_as_long_as_the_first_playbook_lives(tmp_path: Path, how: str) -> None:
    with playbook(tmp_path, tmp_path / "store", RUNS[how]) as other:
        said = rf"under way: process {other.pid}, since 20\d\d-.* UTC \(.*{re.escape(LOCK)}\); wait for its end"
        for _ in range(2):
            with pytest.raises(InputError, match=said):
                take_lock(tmp_path / "store")
        assert json.loads((tmp_path / "store" / LOCK).read_text())["pid"] == other.pid
    take_lock(tmp_path / "store")
    assert json.loads((tmp_path / "store" / LOCK).read_text())["pid"] != other.pid


def test_a_run_may_take_its_own_lock_again(tmp_path: Path) -> None:
    for _ in range(2):
        take_lock(tmp_path / "store")


def test_a_process_that_has_the_pid_of_an_owner_that_ended_is_not_that_owner(tmp_path: Path) -> None:
    parent = psutil.Process().parent()
    assert parent is not None
    born = round(parent.create_time(), 2)
    (tmp_path / LOCK).write_text(json.dumps({"pid": parent.pid, "created": born}))
    with pytest.raises(InputError, match=f"process {parent.pid}, "):
        take_lock(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({"pid": parent.pid, "created": born - 3600}))
    take_lock(tmp_path)


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "5", "null", "{}", '{"pid": 1}', '{"pid": "x", "created": 1}', "\xff"]
)
def test_a_damaged_lock_is_nobodys(tmp_path: Path, damage: str) -> None:
    (tmp_path / LOCK).write_bytes(damage.encode("latin-1"))
    take_lock(tmp_path)
    assert set(json.loads((tmp_path / LOCK).read_text())) == {"pid", "created"}


def test_a_process_of_another_whose_words_are_hidden_is_no_playbook(tmp_path: Path, monkeypatch: Any) -> None:
    """As /proc that is mounted with hidepid hides those of a user's own sudo."""

    def hidden(self: Any) -> None:
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", hidden)
    take_lock(tmp_path)
