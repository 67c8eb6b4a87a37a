"""That rollups are made of labelled samples as the sampler makes them."""

from __future__ import annotations

import csv
from array import array
from types import SimpleNamespace

import numpy as np
from conftest import ROOT, load_file
from plimsoll.samples import FIGURES
from plimsoll.series import Generation

from .rollups import last_figures, rollups

NOON = 1_763_985_600.0


def test_they_are_those_of_the_sampler() -> None:
    sampler = load_file(ROOT / "roles/rss_sampler/files/rss_sampler.py", "rss_sampler_of_rollups")
    rng = np.random.default_rng(0)
    times = NOON + 430 + np.sort(rng.choice(40, 30, replace=False)) * 60.0
    sizes, tasks = rng.integers(1000, 9000, 30), np.arange(30) * 3
    one = SimpleNamespace(
        pid=7,
        unit_name="u",
        start_time=NOON,
        role="main",
        statm=1,
        sizes=array("q"),
        tasks="",
        settled=False,
        floors=[],
    )
    rollup, lines = sampler.Rollup(), []
    rollup.follow([one])
    for time, size, done in zip(times, sizes, tasks):
        if rollup.turned(time):
            lines += rollup.lines()
        rollup.begin(time)
        rollup.add(array("q", [size]))
        one.tasks = done
    lines += rollup.lines()
    wanted = [dict(zip(sampler.ROLLUP_COLUMNS.split(","), cells)) for cells in csv.reader(lines)]
    ones = np.ones(30, dtype=np.uint32)
    rows = rollups(Generation(7, NOON, "main", times, sizes.astype(float), tasks.astype(float), ones))
    assert len(wanted) > 3 and [
        (int(row["timestamp"]) + 300, int(row["count"]), int(row["floor_kb"]), int(row["tasks"])) for row in wanted
    ] == [*zip(rows.times, rows.counts, rows.sizes, rows.tasks)]


def test_of_the_figures_of_ten_minutes_the_last_stay() -> None:
    columns = {name: np.full(4, np.nan) for name in FIGURES}
    columns["timestamp"], columns["oom_kill"] = NOON + np.array([0.0, 590, 600, 1900]), np.arange(4.0)
    assert [(row[0] - NOON, row[FIGURES.index("oom_kill")]) for row in last_figures(columns)] == [
        (590, 1),
        (600, 2),
        (1900, 3),
    ]
