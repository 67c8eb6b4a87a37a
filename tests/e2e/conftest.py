"""One lab, and one fleet of real machines, for all of tests/e2e.

The files share it and run in the order of their names, and so do their tests; each starts from what the one before
left. test_main_job.py makes the fleet, and test_removal.py deletes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lab_fleet import Fleet, free_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those of other folders are in the list too.
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)
            # scripts/test, and with it CI, becomes root or fails: left out by a bare pytest of another user alone.
            item.add_marker(pytest.mark.skipif(os.geteuid() != 0, reason="the machines need root; see scripts/test"))


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("e2e"), free_port())
    try:
        up = fleet.lab("up")
        assert up.code == 0, up.output
        fleet.point()
        yield fleet
    finally:
        fleet.lab("down")
