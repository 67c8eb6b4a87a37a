"""What routine collection brings of a labelled worker: its samples as the sampler's rollups, a figure of each unit in
ten minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from plimsoll.formats import HostData
from plimsoll.samples import FIGURES, Floats, Rows, Seen
from plimsoll.series import ROLLUP_S, Generation, Worker, workers_of


def rollups(one: Generation) -> Rows:
    """One process, a row of each ten minutes of the clock in which it was seen, as class Rollup of the sampler has it.

    The least size, the tasks as of the last sample, how many samples there were; the time is the middle.
    """
    start = np.floor(one.times / ROLLUP_S) * ROLLUP_S
    begins = np.flatnonzero(np.diff(start, prepend=-1.0))
    ends = np.append(begins[1:], len(start))
    return Rows(
        process=np.zeros(len(begins), dtype=np.uint32),
        times=start[begins] + ROLLUP_S / 2,
        sizes=np.minimum.reduceat(one.sizes, begins),
        tasks=one.tasks[ends - 1],
        counts=(ends - begins).astype(np.uint32),
    )


def last_figures(figures: Mapping[str, Floats]) -> Floats:
    """Those of a unit in columns to rows of FIGURES: the last of each ten minutes."""
    spans = np.floor(figures["timestamp"] / ROLLUP_S)
    return np.column_stack([figures[name] for name in FIGURES])[np.diff(spans, append=np.inf) > 0]


def routine(workers: Sequence[Worker], figures: Mapping[str, Mapping[str, Floats]]) -> tuple[Worker, ...]:
    """The workers of a host as its rollups and a figure of each unit in ten minutes show them; figures by unit.

    The sampler knows when a process began. Of a series without start times processes are those that were told apart.
    """
    host = HostData(workers[0].host if workers else "")
    for worker in workers:
        for one in worker.generations:
            began = float(one.times[0]) if one.start_time is None else one.start_time
            seen, rows = Seen(one.pid, began, worker.unit, "", one.role), rollups(one)
            host.samples.add([seen], np.zeros(len(rows.times), dtype=np.intp), *rows[1:])
    for unit, columns in figures.items():
        last = last_figures(columns)
        host.cgroups.add([unit], np.zeros(len(last), dtype=np.intp), last)
    host.settle()
    return tuple(workers_of(host))
