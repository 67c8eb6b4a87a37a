"""Precision and recall on workers whose label is known: real ones, and simulated ones that nothing was tuned on.

`python -m tests.bench.detection` does more of it, and tells by kind what is missed.
"""

from __future__ import annotations

import pytest
from plimsoll.detect import judge

from .sets import labelled

# What is claimed, in docs/detection.md.
PRECISION = RECALL = 0.97


@pytest.mark.parametrize("name", ["recorded", "heldout"])
@pytest.mark.parametrize("how", ["workers", "routine"])
def test_who_leaks_is_called_and_who_does_not_is_not(name: str, how: str) -> None:
    cases = [(one, any(judge(worker).pattern.leaking for worker in getattr(one, how))) for one in labelled(name, [100])]
    wrong = [("missed " if one.leaking else "called ") + one.name for one, called in cases if called != one.leaking]
    right = sum(called and one.leaking for one, called in cases)
    # One of a hundred is what a set of this size can tell.
    assert len(cases) >= 30 and right
    assert right >= PRECISION * sum(called for _, called in cases), wrong
    assert right >= RECALL * sum(one.leaking for one, _ in cases) - 1, wrong
