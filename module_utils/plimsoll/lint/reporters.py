"""pylint's messages as SARIF 2.1.0, and as the code-quality report of GitLab, which is Code Climate's format.

`pylint --output-format=plimsoll.lint.reporters.SarifReporter`; pylint 4.1 itself has text, JSON, JUnit and GitHub's
annotations (`--output-format=github`), and neither of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pylint.reporters import BaseReporter

from .. import __version__
from .catalogue import BY_SYMBOL, HELP

if TYPE_CHECKING:
    from pylint.message import Message
    from pylint.reporters.ureports.nodes import Section

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
# By the letter of a message's id.
LEVELS = {"F": "error", "E": "error", "W": "warning"}
SEVERITIES = {"F": "blocker", "E": "critical", "W": "major", "I": "info"}


def fingerprints(messages: Iterable[Message]) -> Iterator[tuple[Message, str]]:
    """Each message with what names it across commits: its file, check and words, which have no line in them.

    Of several that are the same in these, the first, second and so on of the file.
    """
    seen: dict[tuple[str, str, str], int] = {}
    for message in messages:
        key = (_path(message), message.symbol, message.msg)
        seen[key] = seen.get(key, 0) + 1
        text = "\0".join((*key, str(seen[key])))
        yield message, hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def sarif(messages: Iterable[Message]) -> dict[str, Any]:
    """One run, with a rule for each check that found something."""
    results: list[dict[str, Any]] = []
    rules: dict[str, dict[str, Any]] = {}
    for message, fingerprint in fingerprints(messages):
        check = BY_SYMBOL.get(message.symbol)
        rules.setdefault(
            message.msg_id,
            {
                "id": message.msg_id,
                "name": message.symbol,
                "shortDescription": {"text": check.about if check else message.symbol},
                **({"help": {"text": f"{HELP}#{check.symbol}, docs/leaks.md#{check.section}"}} if check else {}),
            },
        )
        region = {"startLine": message.line, "startColumn": message.column + 1}
        if message.end_line:
            region["endLine"] = message.end_line
        results.append(
            {
                "ruleId": message.msg_id,
                "ruleIndex": list(rules).index(message.msg_id),
                "level": LEVELS.get(message.C, "note"),
                "message": {"text": message.msg},
                "locations": [
                    {"physicalLocation": {"artifactLocation": {"uri": quote(_path(message))}, "region": region}}
                ],
                "partialFingerprints": {"plimsoll/v1": fingerprint},
            }
        )
    driver = {"name": "plimsoll", "version": __version__, "rules": list(rules.values())}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def code_quality(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """GitLab's fields of Code Climate's issues."""
    return [
        {
            "type": "issue",
            "check_name": message.symbol,
            "description": message.msg,
            "categories": ["Performance"],
            "fingerprint": fingerprint,
            "severity": SEVERITIES.get(message.C, "minor"),
            "location": {
                "path": _path(message),
                "lines": {"begin": message.line, "end": message.end_line or message.line},
            },
        }
        for message, fingerprint in fingerprints(messages)
    ]


def _path(message: Message) -> str:
    """Below the folder that pylint runs in, as both formats ask for."""
    return PurePath(message.path).as_posix()


class SarifReporter(BaseReporter):
    """`--output-format=plimsoll.lint.reporters.SarifReporter`, for GitHub's code scanning and others."""

    name = "plimsoll-sarif"
    extension = "sarif"

    def display_messages(self, layout: Section | None) -> None:
        print(json.dumps(sarif(self.messages), indent=2), file=self.out)

    def display_reports(self, layout: Section) -> None:
        """Scores are no results."""

    def _display(self, layout: Section) -> None:
        """Nothing but the messages."""


class CodeQualityReporter(SarifReporter):
    """`--output-format=plimsoll.lint.reporters.CodeQualityReporter`, for GitLab's `artifacts:reports:codequality`."""

    name = "plimsoll-code-quality"
    extension = "json"

    def display_messages(self, layout: Section | None) -> None:
        print(json.dumps(code_quality(self.messages), indent=2), file=self.out)
