"""The plugin's one checker: facts of each module as pylint visits it, findings once all are known."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from astroid import nodes
from pylint.checkers import BaseChecker
from pylint.utils import FileState

from . import catalogue, facts, rules

if TYPE_CHECKING:
    from pylint.lint import PyLinter


class LeaksChecker(BaseChecker):
    """found: the findings, once pylint has seen all modules."""

    name = catalogue.CHECKER
    # pylint reads it from the class, as of all checkers, and nothing changes it.
    msgs = {  # noqa: RUF012 - pylint's base class has it without ClassVar
        check.id: ("%s", check.symbol, check.about) for check in catalogue.CHECKS
    }

    def open(self) -> None:
        self.modules: list[facts.Module] = []
        self.found: list[rules.Finding] = []

    def visit_module(self, node: nodes.Module) -> None:
        try:
            module = facts.read(node)
        except Exception as error:  # noqa: BLE001 - told below, and the other modules are still checked
            # A defect of ours, for whatever code there is in the world. Of pylint's own way, it would send the user to
            # pylint's bug tracker. It says nothing of the code: no build fails by it, and the log names the file.
            print(f"plimsoll.lint: {node.file} is not checked: {type(error).__name__}: {error}", file=sys.stderr)
            return
        places = {add.place for add in module.adds} | {one.place for one in module.cached + module.settings}
        places |= {place for _, place in module.apps}
        places |= {suspect.place for function in module.functions.values() for suspect in function.suspects}
        # A comment switches a check off by line, and pylint knows of them while it is in the module alone.
        module.muted = {
            (check.symbol, place.line)
            for place in places
            for check in catalogue.CHECKS
            if not self.linter.is_message_enabled(check.symbol, place.line)
        }
        self.modules.append(module)

    def close(self) -> None:
        if self.linter.config.jobs == 1:
            self._report()

    def get_map_data(self) -> list[facts.Module]:
        """Of one process of `pylint --jobs`."""
        return self.modules

    def reduce_map_data(self, linter: PyLinter, data: list[Any]) -> None:
        self.modules = [module for part in data for module in part]
        self._report()

    def _report(self) -> None:
        self.found = rules.judge(self.modules)
        linter = self.linter
        before = linter.current_name, linter.file_state
        # Which lines are switched off was asked before; that of the last module says nothing of the others.
        linter.file_state = FileState("", linter.msgs_store)
        for finding in self.found:
            place = finding.place
            linter.current_name = finding.module
            linter.stats.init_single_module(finding.module)
            linter.add_message(
                finding.symbol,
                line=place.line,
                node=nodes.Module(finding.module, file=finding.path),
                args=(finding.message,),
                col_offset=place.column,
                end_lineno=place.end_line,
            )
        linter.current_name, linter.file_state = before
