"""What the static checks say of the code that is blamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from plimsoll import sources
from plimsoll.diagnose import Culprit, Hold, Kind
from plimsoll.lines import InputError
from plimsoll.lint.catalogue import BY_SYMBOL, CACHE, CONTAINER, UNCLOSED
from plimsoll.lint.run import Found
from plimsoll.mends import MOST_MENDS, mends, of_kind

APP = Path(__file__).parents[1] / "lab" / "app"
RELEASE = "/opt/celery/releases/20261130/app/"


def culprit(file: str | None, line: int | None, caller: str | None = None) -> Culprit:
    return {
        "task": "shop.tasks.pay",
        "task_share": 1.0,
        "file": file,
        "line": line,
        "function": "pay",
        "growth_kb": 900.0,
        "share": 1.0,
        "windows": 1,
        "package": "application",
        "caller": caller,
    }


def says(file: str = "shop/tasks.py", line: int = 7, end: int | None = None, **more: Any) -> Found:
    given = {"symbol": CACHE, "message": "give it a bound", "object": "_seen", "function": "", "task": "", **more}
    return Found(Path(file), line, end, **given)


def held(*path: str) -> Hold:
    return {"type": "dict", "growth": 40, "path": list(path)}


def test_a_line_that_is_blamed_carries_what_the_check_says_of_it() -> None:
    [mend] = mends([culprit(f"{RELEASE}shop/tasks.py", 7)], [], [says(), says(line=8), says("other/tasks.py")])
    assert mend == {
        "symbol": CACHE,
        "file": "shop/tasks.py",
        "line": 7,
        "message": "give it a bound",
        "link": f"docs/checks.md#{CACHE}",
    }


def test_a_statement_of_several_lines_is_one() -> None:
    assert mends([culprit(f"{RELEASE}shop/tasks.py", 9)], [], [says(line=7, end=9)])
    assert not mends([culprit(f"{RELEASE}shop/tasks.py", 10)], [], [says(line=7, end=9)])


def test_of_a_line_in_a_package_it_is_the_callers() -> None:
    blamed = culprit("/opt/celery/v/lib/python3.11/site-packages/boto3/session.py", 60, f"{RELEASE}shop/tasks.py:7")
    assert [one["line"] for one in mends([blamed], [], [says(symbol=UNCLOSED)])] == [7]


@pytest.mark.parametrize(
    ("path", "found", "told"),
    [
        (("module shop.tasks", "._seen: dict"), says(), True),
        (("module shop.tasks", "._gate: shop.gate.Gate", ".sent: list"), says(object="Gate.sent"), True),
        (("module shop.tasks", "._seen: dict"), says("src/shop/tasks.py"), True),
        (("module shop", "._seen: dict"), says("shop/__init__.py"), True),
        # Another module's of the same name, another name, and what no module has.
        (("module shop.other", "._seen: dict"), says(), False),
        (("module shop.tasks", "._plans: dict"), says(), False),
        (("frame pay of thread 1", "._seen: dict"), says(), False),
        ((), says(), False),
    ],
)
def test_what_holds_the_objects_carries_it_too(path: tuple[str, ...], found: Found, told: bool) -> None:
    # The line that allocates is in another function than the one that keeps.
    blamed = culprit(f"{RELEASE}shop/other.py", 1)
    assert bool(mends([blamed], [held(*path)], [found])) == told


def test_a_package_with_a_file_of_the_same_name_is_not_the_application() -> None:
    other = {**culprit("/opt/celery/v/lib/python3.11/site-packages/other/tasks.py", 7), "package": "other"}
    assert not mends([other], [], [says("tasks.py")])  # type: ignore[list-item]


def test_of_many_a_few_are_told_and_none_is_of_a_check_that_is_not_ours() -> None:
    every = [says(symbol=symbol) for symbol in BY_SYMBOL]
    assert len(mends([culprit("shop/tasks.py", 7)], [], every)) == MOST_MENDS
    assert not mends([culprit("shop/tasks.py", 7)], [], [says(symbol="line-too-long")])
    assert not mends([culprit(None, None)], [], [says()])


def test_a_kind_of_leak_has_its_checks() -> None:
    assert of_kind(Kind.FILE_DESCRIPTORS)[0] == UNCLOSED and CONTAINER in of_kind(Kind.PYTHON_OBJECTS)
    assert of_kind(Kind.UNKNOWN) == []


def test_a_store_keeps_what_was_found_until_the_source_changes(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("pylint")
    source = shutil.copytree(APP, tmp_path / "app")
    assert sources.keep(source, tmp_path) == []
    found = sources.kept(tmp_path)
    assert "_plans" in {one.object for one in found}
    assert {str(one.file) for one in found} >= {"boxoffice/leaks.py", "boxoffice/tasks.py"}

    asked: list[Path] = []
    monkeypatch.setattr(sources, "checked", lambda path: asked.append(path) or [])
    assert sources.keep(source, tmp_path) == [] and asked == []
    (source / "boxoffice" / "more.py").write_text("A = 1\n")
    assert sources.keep(source, tmp_path) == [] and asked == [source]
    assert sources.kept(tmp_path) == []


def test_a_source_that_cannot_be_checked_is_noted_and_what_is_known_stays(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / sources.CHECKS).write_text(json.dumps({"digest": "", "found": []}))
    [note] = sources.keep(tmp_path / "gone", tmp_path)
    assert "the source is not checked" in note and "gone" in note

    def missing(_: Path) -> None:
        raise InputError("pylint is not installed")

    monkeypatch.setattr(sources, "checked", missing)
    [note] = sources.keep(APP, tmp_path)
    assert "pylint is not installed" in note and (tmp_path / sources.CHECKS).exists()
    assert sources.kept(tmp_path / "none") == []
    (tmp_path / sources.CHECKS).write_text("{torn")
    assert sources.kept(tmp_path) == []
