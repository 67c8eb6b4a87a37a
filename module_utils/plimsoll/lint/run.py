"""The checks over an application's source, for plimsoll's own reports: pylint in this process, none of its output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..lines import InputError
from .catalogue import CHECKER

# Folders that hold no source of the application.
_IGNORED = "CVS,node_modules,site-packages,venv,build"


class Found(NamedTuple):
    """One finding. symbol is one of catalogue.CHECKS; object is what grows or stays open, as the code names it.

    function is the dotted name of the one that does it, and task that of the task that comes there; both are empty for
    a setting.
    """

    file: Path
    line: int
    end_line: int | None
    symbol: str
    message: str
    object: str
    function: str
    task: str


def check(paths: Sequence[Path]) -> list[Found]:
    """The findings in files and folders, all of which are taken as one application, by file and line.

    Configuration of pylint is not read, comments that switch a check off are. What does not parse is passed over.
    Raises InputError where pylint is missing, or a path is.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder to check; name the application's source")
    try:
        from pylint.lint import Run
        from pylint.reporters import CollectingReporter

        from .checker import LeaksChecker
    except ImportError as error:
        raise InputError(
            f"pylint is not installed ({error}): pip install 'plimsoll[lint]', or 'pylint>=4,<5'"
        ) from error
    options = [
        f"--rcfile={os.devnull}",
        "--load-plugins=plimsoll.lint",
        "--disable=all",
        f"--enable={CHECKER}",
        "--recursive=y",
        f"--ignore={_IGNORED}",
        r"--ignore-patterns=^\.\w",
        "--persistent=n",
        "--jobs=1",
    ]
    done = Run([*options, *map(str, paths)], reporter=CollectingReporter(), exit=False)
    checker = next(one for one in done.linter.get_checkers() if isinstance(one, LeaksChecker))
    return [
        Found(
            Path(one.path),
            one.place.line,
            one.place.end_line,
            one.symbol,
            one.message,
            one.object,
            one.function,
            one.task,
        )
        for one in checker.found
    ]
