"""The recordings of real workers that record.py made, in the time that they stand for."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RECORDED = Path(__file__).resolve().parent / "recorded"


@dataclass(frozen=True)
class Recording:
    """One worker. What leaking, stretch and follows mean is at the head of record.py."""

    name: str
    kind: str
    pool: str
    seed: int
    leaking: bool
    stretch: int
    kb_per_hour: float | None
    """KiB that the whole worker leaks an hour of stretched time; 0 of no leak, None if it is not known."""
    follows: str | None
    text: str
    """CSV as the sampler writes it, with its header, times stretched from the first sample on."""


def recordings() -> Iterator[Recording]:
    """All of them, by name."""
    manifest = json.loads((RECORDED / "manifest.json").read_text())
    for name, entry in sorted(manifest["recordings"].items()):
        text = gzip.decompress((RECORDED / f"{name}.csv.gz").read_bytes()).decode()
        rate = entry["kb_per_second"]
        yield Recording(
            name=name,
            **{key: entry[key] for key in ("kind", "pool", "seed", "leaking", "stretch", "follows")},
            kb_per_hour=None if rate is None else rate / entry["stretch"] * 3600,
            text=stretched(text, entry["stretch"]),
        )


def stretched(text: str, stretch: int) -> str:
    """Samples with a second of the recording made as many; when processes started is stretched along."""
    header, *rows = csv.reader(io.StringIO(text))
    at, started = header.index("timestamp"), header.index("start_time")
    first = float(rows[0][at])
    for row in rows:
        row[at] = f"{first + (float(row[at]) - first) * stretch:.3f}"
        row[started] = f"{first + (float(row[started]) - first) * stretch:.2f}"
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([header, *rows])
    return written.getvalue()
