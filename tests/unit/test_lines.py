"""Whole lines out of files: in blocks of any size, plain or gzip, and of a damaged file all that is before it."""

from __future__ import annotations

import gzip
import io
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plimsoll import lines
from plimsoll.lines import STDIN, Block, InputError, ahead, blocks

TEXT = b"".join(b"%d,%d\n" % (n, n * n * n % 9973) for n in range(1000))


@pytest.fixture(params=[2, 50, 999, 16 << 20])
def block_bytes(request: Any, monkeypatch: Any) -> int:
    monkeypatch.setattr(lines, "BLOCK_BYTES", request.param)
    for name in ("PACKED_BYTES", "UNPACKED_BYTES"):
        monkeypatch.setattr(lines, name, min(request.param, getattr(lines, name)))
    return int(request.param)


def read(path: Path, content: bytes) -> tuple[bytes, str]:
    """What the blocks of a file hold, and what was said in the end. Each block must be of whole lines, and numbered."""
    path.write_bytes(content)
    found, said = [], ""
    try:
        found.extend(blocks(path))
    except InputError as error:
        said = str(error).replace(str(path), "PATH")
    before = 0
    for block in found:
        assert block.text.endswith(b"\n") and block.number == before + 1
        before += block.text.count(b"\n")
    return b"".join(block.text for block in found), said


@pytest.mark.parametrize("content", [TEXT, b"", b"\n", b"\n\n\n", b"a\r\nb\n", b"\x00\xff\n"])
def test_lines_come_as_they_are(tmp_path: Path, block_bytes: int, content: bytes) -> None:
    assert read(tmp_path / "a", content) == (content, "")
    assert read(tmp_path / "a", gzip.compress(content)) == (content, "")


@pytest.mark.parametrize("torn", [b"5", b'5,41,"cel', b"x" * 5000])
def test_a_last_line_without_its_end_is_left_out(tmp_path: Path, block_bytes: int, torn: bytes) -> None:
    assert read(tmp_path / "a", TEXT + torn) == (TEXT, "")
    assert read(tmp_path / "a", gzip.compress(TEXT + torn)) == (TEXT, "")


@pytest.mark.parametrize("content", [b"5", b"x" * 5000])
def test_a_file_of_not_one_whole_line_is_named(tmp_path: Path, block_bytes: int, content: bytes) -> None:
    assert read(tmp_path / "a", content) == (b"", "PATH: not one whole line")
    assert read(tmp_path / "a", gzip.compress(content)) == (b"", "PATH: not one whole line")
    assert read(tmp_path / "a", b"") == read(tmp_path / "a", gzip.compress(b"")) == (b"", "")


def test_gzip_is_told_by_what_is_in_it_and_not_by_a_name(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", gzip.compress(TEXT)) == (TEXT, "")
    assert read(tmp_path / "a.csv.gz", TEXT) == (TEXT, "")


def test_several_members_of_gzip_are_one_file_and_zeros_may_follow(tmp_path: Path, block_bytes: int) -> None:
    parts = [TEXT[:1000], b"", TEXT[1000:1001], TEXT[1001:]]
    packed = b"".join(map(gzip.compress, parts))
    assert read(tmp_path / "a", packed) == (TEXT, "")
    assert read(tmp_path / "a", packed + bytes(5000)) == (TEXT, "")


def until_damage(packed: bytes) -> bytes:
    """The whole lines that can be had, by zlib's own account, a byte at a time."""
    unpacking, text = zlib.decompressobj(31), b""
    for at in range(len(packed)):
        try:
            text += unpacking.decompress(packed[at : at + 1])
        except zlib.error:
            break
    text += unpacking.flush()
    return text[: text.rfind(b"\n") + 1]


def test_of_a_truncated_gzip_all_whole_lines_are_read(tmp_path: Path, block_bytes: int) -> None:
    packed = gzip.compress(TEXT)
    for end in (len(packed) // 2, len(packed) - 1, len(packed) - 8, 30, 2):
        text, said = read(tmp_path / "a", packed[:end])
        assert text == until_damage(packed[:end]) and TEXT.startswith(text)
        after = f" after line {text.count(b'%c' % 10)}" if text else ""
        assert said == f"PATH: truncated or damaged{after}"
    assert len(read(tmp_path / "a", packed[: len(packed) // 2])[0]) > len(TEXT) // 4
    # Of few bytes come many lines.
    packed = gzip.compress(b"5,41,90000,celery\n" * 300)
    for end in range(20, len(packed)):
        assert read(tmp_path / "a", packed[:end])[0] == until_damage(packed[:end])


def test_of_a_damaged_gzip_all_whole_lines_up_to_the_damage_are_read(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(10):
        packed = bytearray(gzip.compress(TEXT))
        packed[rng.randrange(len(packed) // 3, len(packed))] ^= 1 << rng.randrange(8)
        text, said = read(tmp_path / "a", bytes(packed))
        assert text == until_damage(bytes(packed)) and len(text) > len(TEXT) // 5
        assert said.startswith("PATH: truncated or damaged after line ")


@pytest.mark.parametrize("behind", [b"x", b"\x1f\x8b", b"\x1f\x8b\x08\0" * 9, b"\0\0x"])
def test_what_is_behind_a_gzip_and_is_none_is_damage(tmp_path: Path, block_bytes: int, behind: bytes) -> None:
    assert read(tmp_path / "a", gzip.compress(TEXT) + behind) == (TEXT, "PATH: truncated or damaged after line 1000")


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(lines, "UNPACKED_BYTES", 1000)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 64)
    text, said = read(tmp_path / "a", b"a\n" + b"x" * 1_000_000 + b"\nb\n")
    first, long, last = text.splitlines()
    assert (first, last, said) == (b"a", b"b", "")
    # It still is one that is too long.
    assert set(long) == {ord("x")} and len(long) == 65
    assert read(tmp_path / "a", b"a\n" + b"x" * 1_000_000) == (b"a\n", "")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError) as caught:
            list(blocks(path))
        assert str(caught.value) == f"{path}: {why}"


def test_standard_input_is_a_file_too(monkeypatch: Any) -> None:
    for content, said in ((TEXT, ""), (gzip.compress(TEXT), ""), (gzip.compress(TEXT)[:-9], "standard input: trunc")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        if said:
            with pytest.raises(InputError, match=said):
                list(blocks(STDIN))
        else:
            assert list(blocks(STDIN)) == [Block(1, TEXT)]


def test_what_is_made_ahead_comes_in_order_and_with_its_error() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in range(5):
            made.append(n)
            yield n
        raise ValueError("no more")

    found = []
    with pytest.raises(ValueError, match="no more"):
        for one in ahead(items()):
            found.append(one)
            assert len(made) <= one + 2
    assert found == made == list(range(5))
