"""Whole lines out of files, plain or gzip, sound or damaged: in blocks, so that memory does not go with their size."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

# The PATH that is standard input.
STDIN = Path("-")
# So large that what has to be done for each block does not count.
BLOCK_BYTES = 16 << 20
MAX_LINE_BYTES = 1 << 20
PACKED_BYTES, UNPACKED_BYTES = 1 << 18, 1 << 20
# What gzip's members begin with; their names tell nothing, as of standard input.
GZIP = b"\x1f\x8b"
NEWLINE = ord("\n")

T = TypeVar("T")


class InputError(Exception):
    """A file cannot be read, or not to its end; the message names the file, and the line where there is one."""


class Block(NamedTuple):
    """Whole lines, each with its end; number is that of the first one, from 1."""

    number: int
    text: bytes


def name_of(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)


def blocks(path: Path) -> Iterator[Block]:
    """The lines of a file, but for a last one without its end: that was torn, as by a power cut.

    Of a line of more than MAX_LINE_BYTES so much is kept that it still is one. Raises InputError where the file cannot
    be read to its end, after all lines up to there, and where there is something in it and not one line.
    """
    number = 1
    trouble: list[str] = []
    pieces = filter(None, _pieces(path, trouble))
    first = next(pieces, b"")
    for text in _cut(chain([first], pieces)):
        yield Block(number, text)
        # bytes.count() takes four times as long.
        number += int(np.count_nonzero(np.frombuffer(text, dtype=np.uint8) == NEWLINE))
    if first and number == 1 and not trouble:
        trouble.append("not one whole line")
    if trouble:
        raise InputError(f"{name_of(path)}: {trouble[0]}" + (f" after line {number - 1}" if number > 1 else ""))


def _cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of any size to blocks that end where a line does."""
    kept: list[bytes] = []
    size = 0
    skipping = False
    for piece in pieces:
        start = piece.find(b"\n") if skipping else 0
        if start < 0:
            continue
        skipping = False
        kept.append(piece[start:])
        size += len(kept[-1])
        if size >= BLOCK_BYTES:
            text = b"".join(kept)
            end = text.rfind(b"\n") + 1
            if end:
                yield text[:end]
            kept = [text[end:][: MAX_LINE_BYTES + 1]]
            size = len(kept[0])
            skipping = size > MAX_LINE_BYTES
    text = b"".join(kept)
    if end := text.rfind(b"\n") + 1:
        yield text[:end]


def _pieces(path: Path, trouble: list[str]) -> Iterator[bytes]:
    """What can be read of a file, unpacked; what kept the rest from being read goes into trouble."""
    try:
        with _opened(path) as stream:
            first = stream.read(PACKED_BYTES)
            if first.startswith(GZIP):
                yield from _unpacked(first, stream)
            else:
                yield first
                while piece := stream.read(UNPACKED_BYTES):
                    yield piece
    except (EOFError, zlib.error):
        trouble.append("truncated or damaged")
    except OSError as error:
        trouble.append(str(error.strerror))


def _opened(path: Path) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb")


def _unpacked(packed: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """What gzip members in a row hold; packed is what was read of them already.

    Raises EOFError or zlib.error where they are cut short or damaged, after all that came before.
    """
    while packed:
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        while not member.eof:
            packed = packed or stream.read(PACKED_BYTES)
            if not packed:
                yield member.flush()
                raise EOFError
            before = member.copy()
            try:
                text = member.decompress(packed, UNPACKED_BYTES)
            except zlib.error:
                # Once more, a byte at a time: up to the damage.
                for at in range(len(packed)):
                    yield before.decompress(packed[at : at + 1])
                raise
            yield text
            packed = member.unconsumed_tail
        # Zeros may fill up the end, as on tapes.
        packed = member.unused_data.lstrip(b"\0")
        while not packed and (more := stream.read(PACKED_BYTES)):
            packed = more.lstrip(b"\0")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread of its own while the one before it is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
