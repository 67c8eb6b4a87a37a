"""What the static checks say of the code that a finding blames: the mend of each culprit. Pure, without pylint.

docs/checks.md has the checks; lint.run.check() runs them over an application's source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Protocol, TypedDict

from .diagnose import Culprit, Hold, Kind, short
from .formats import printable
from .lint.catalogue import BY_SYMBOL, CHECKS, HELP

# Of a finding, how many are told, and characters of one.
MOST_MENDS, LONGEST = 3, 400
_MODULE = re.compile(r"module (?P<name>[\w.]+)")
# A step of a hold names an attribute and its type.
_STEP = re.compile(r"\.(?P<name>\w+)(?::.*)?")


class Checked(Protocol):
    """What lint.run.Found has of one message."""

    @property
    def file(self) -> Path: ...
    @property
    def line(self) -> int: ...
    @property
    def end_line(self) -> int | None: ...
    @property
    def symbol(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def object(self) -> str: ...


class Mend(TypedDict):
    """One message of a check; file as it is below the source, link: the section of docs/checks.md."""

    symbol: str
    file: str
    line: int
    message: str
    link: str


def mends(culprits: Sequence[Culprit], holds: Sequence[Hold], found: Sequence[Checked]) -> list[Mend]:
    """The messages that are of a culprit's line, of the line of the package's caller, or of what holds the objects."""
    told = dict[tuple[str, str, int], Mend]()
    for one in found:
        if one.symbol in BY_SYMBOL and (any(_blamed(each, one) for each in culprits) or _holds(holds, one)):
            link = f"{HELP}#{one.symbol}"
            message = printable(one.message, LONGEST)
            file = str(one.file)
            told[one.symbol, file, one.line] = Mend(
                symbol=one.symbol, file=file, line=one.line, message=message, link=link
            )
    return list(told.values())[:MOST_MENDS]


def of_kind(kind: Kind) -> list[str]:
    """Symbols of the checks that find leaks of a kind."""
    return [] if kind is Kind.UNKNOWN else [check.symbol for check in CHECKS if check.kind is kind]


def _blamed(culprit: Culprit, one: Checked) -> bool:
    # A file of a package may end as one of the application's does.
    ours = culprit["package"] in (None, "application")
    places = [(culprit["file"], culprit["line"])] if ours else []
    if culprit["caller"]:
        file, _, line = culprit["caller"].rpartition(":")
        places.append((file, int(line) if line.isdecimal() else None))
    return any(
        file is not None
        and line is not None
        and one.line <= line <= (one.end_line or one.line)
        and _same(short(file), str(one.file))
        for file, line in places
    )


def _same(one: str, other: str) -> bool:
    """Whether two paths may be of one file: the shorter is the end of the longer."""
    ours, theirs = PurePath(one).parts, PurePath(other).parts
    most = min(len(ours), len(theirs))
    return most > 0 and ours[-most:] == theirs[-most:]


def _holds(holds: Sequence[Hold], one: Checked) -> bool:
    """Whether what a check names is on the way to what gained entries: a module's name, and attributes below it."""
    for hold in holds:
        root = _MODULE.match(hold["path"][0]) if hold["path"] else None
        if root is None or not _same(root["name"].replace(".", "/"), _module(str(one.file))):
            continue
        names = [step["name"] for step in map(_STEP.fullmatch, hold["path"][1:]) if step]
        # `_turnstile.sent`, or of a class `Turnstile.sent`: what is added to is the last of it.
        if one.object.split(".")[-1] in names:
            return True
    return False


def _module(file: str) -> str:
    path = PurePath(file).with_suffix("")
    return str(path.parent if path.name == "__init__" else path)
