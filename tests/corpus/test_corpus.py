"""The checks over real Celery applications from PyPI, against findings that were read and judged. Opt-in, minutes:

`pytest tests/corpus`, or with `-k turbinia` one of them. It downloads the pinned source distributions by pip, which
runs the build backend of each for its metadata, and keeps them in ~/.cache/plimsoll/corpus.

judged.json has each finding with whether it is true: what the message says grows or stays open does so, or the
setting does what the message says, and who keeps that code would accept the advice. `folder` is what of a distribution
is checked. After a change of the checks, read what is new and judge it there. docs/checks.md has the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from plimsoll.lint.run import check

CORPUS = json.loads((Path(__file__).parent / "judged.json").read_text())
CACHE = Path.home() / ".cache" / "plimsoll" / "corpus"
# Of all findings, those that must be true.
LEAST_PRECISION = 0.8


def source(name: str, package: dict[str, Any]) -> Path:
    """The unpacked distribution, downloaded unless it is there."""
    folder = CACHE / f"{name}-{package['version']}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        pins = CACHE / f"{name}.txt"
        pins.write_text(f"{name}=={package['version']} --hash=sha256:{package['sha256']}\n")
        options = ["--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes", f"--dest={CACHE}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, f"--requirement={pins}"], check=True)
        archive = CACHE / package["archive"]
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()
    return folder


def told(name: str, package: dict[str, Any]) -> list[tuple[str, int, str, str]]:
    top = next(source(name, package).iterdir()) / package.get("folder", "")
    return [(one.file.relative_to(top.resolve()).as_posix(), one.line, one.symbol, one.object) for one in check([top])]


@pytest.mark.parametrize("name", CORPUS)
def test_each_finding_was_judged(name: str) -> None:
    found = Counter(told(name, CORPUS[name]))
    judged = Counter((one["file"], one["line"], one["symbol"], one["object"]) for one in CORPUS[name]["findings"])
    assert not found - judged, "read these and judge them in judged.json"
    assert not judged - found, "these are found no more; take them out of judged.json and of docs/checks.md"


def test_precision_is_what_the_docs_say() -> None:
    counts: dict[str, Counter[str]] = {}
    for package in CORPUS.values():
        for one in package["findings"]:
            counts.setdefault(package["set"], Counter())["true" if one["true"] else "false"] += 1
    everything = sum(counts.values(), Counter())
    assert everything["true"] / everything.total() >= LEAST_PRECISION
    text = (ROOT / "docs" / "checks.md").read_text()
    for name, package in CORPUS.items():
        true = sum(one["true"] for one in package["findings"])
        false = len(package["findings"]) - true
        assert f"| {name} {package['version']} | {package['set']} | {true + false} | {true} | {false} |" in text
