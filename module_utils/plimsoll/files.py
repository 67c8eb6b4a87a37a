"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: Path, mode: int = 0o644, owner: int = -1) -> Iterator[BinaryIO]:
    """A file to write to, which takes path's place by one rename when the block ends well. Raises OSError.

    owner is the number of a user whose it becomes, before it has its name: others may write to the directory.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fchmod(out.fileno(), mode)
            if owner >= 0:
                os.fchown(out.fileno(), owner, 0)
            os.fsync(out.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Text as UTF-8, by whole()."""
    with whole(path, mode) as out:
        out.write(text.encode())
