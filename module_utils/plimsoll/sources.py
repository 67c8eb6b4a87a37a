"""What the static checks say of an application's source, which a store keeps for as long as that is the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import write_whole
from .lines import InputError
from .lint.run import Found, check
from .mends import Checked

# In a store: {digest, found: [Found, whose file is as below the source]}.
CHECKS = "checks.json"


def checked(source: Path) -> list[Found]:
    """The findings of plimsoll.lint, each file as it is below the source. Raises InputError where pylint is missing."""
    return [one._replace(file=_below(one.file, source)) for one in check([source])]


def keep(source: Path, store: Path) -> list[str]:
    """Have the store know what is found in the source; a note where it could not be told.

    pylint takes seconds to minutes, and nothing is checked again that is the same.
    """
    try:
        digest = _digest(source)
        if _read(store).get("digest") != digest:
            found = [one._asdict() | {"file": str(one.file)} for one in checked(source)]
            write_whole(store / CHECKS, json.dumps({"digest": digest, "found": found}, indent=1) + "\n")
    except InputError as error:
        # A collection is worth more.
        return [f"the source is not checked: {error}"]
    return []


def kept(store: Path) -> list[Checked]:
    """What a store knows of its application's source; nothing where it is none, or knows nothing."""
    return [Found(**{**one, "file": Path(one["file"])}) for one in _read(store).get("found", [])]


def _read(store: Path) -> dict[str, Any]:
    try:
        read = json.loads((store / CHECKS).read_text())
        return read if isinstance(read, dict) else {}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _below(path: Path, source: Path) -> Path:
    path, source = path.resolve(), source.resolve()
    return path.relative_to(source) if path.is_relative_to(source) else path


def _digest(source: Path) -> str:
    """What tells a source from another one, or from itself before a change; the checks count as part of it."""
    told = hashlib.sha256()
    for path in (*_python(Path(__file__).parent / "lint"), *_python(source)):
        told.update(f"{path}\0".encode(errors="surrogateescape"))
        told.update(path.read_bytes())
    return told.hexdigest()


def _python(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: is no directory with the application's source")
    for here, below, names in os.walk(folder):
        below[:] = sorted(one for one in below if not one.startswith(".") and one != "node_modules")
        yield from (Path(here, name) for name in sorted(names) if name.endswith(".py"))
