"""Static checks for what docs/leaks.md describes, as a pylint plugin: `pylint --load-plugins=plimsoll.lint`.

`catalogue` has the checks as data and needs no pylint; `run.check` runs them over an application's source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pylint.lint import PyLinter


def register(linter: PyLinter) -> None:
    """What pylint calls as it loads the plugin. pylint is imported here, so that the catalogue can do without it."""
    from .checker import LeaksChecker

    linter.register_checker(LeaksChecker(linter))
