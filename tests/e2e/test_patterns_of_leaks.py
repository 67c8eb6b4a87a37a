"""Each kind of leak in real units on the lab's machines, in every pool and under load: what its window tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.patterns import KEPT_KB, LEAKS, LIBRARY, MENDED, OTHERS, PYTHON
from plimsoll.diagnose import culprits, gains, leak_class

from .lab_fleet import IN_APP, Fleet
from .leaky_workers import leaky_workers, on_both

# Its beginning, where all objects are gone through, takes an emulated worker half of that.
WINDOW_S = 20
# As the tests of the role: what is judged by RSS comes first in its worker.
PLANS = {
    "demo-1": {
        "leaks-solo-1": ["native", "unclosed", "module_cache", "collector", "method_cache", "kept_errors"],
        "leaks-threads": ["handlers"],
        "leaks-eventlet": ["kept_closures"],
    },
    "demo-2": {
        "leaks-solo-2": [
            "fragmentation",
            "filling_cache",
            "kept_closures",
            "handlers",
            "third_party",
            "+".join(MENDED),
        ],
        "leaks-prefork": ["copy_on_write", "copy_on_write_mended", "collector"],
        "leaks-gevent": ["module_cache"],
    },
}
SETTINGS = """Environment=CELERY_WORKER_INCLUDE=plimsoll_notify,plimsoll_bootstrap,boxoffice.leaks
Environment=BOXOFFICE_PRICED_SEATS={seats}
"""


def pool_of(worker: str) -> str:
    return worker.split("-")[1]


@pytest.fixture(scope="module")
def windows(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], dict[str, Any]]]:
    """Growth record by pool and pattern."""
    pools = {host: {worker: pool_of(worker) for worker in plans} for host, plans in PLANS.items()}
    settings = {
        worker: SETTINGS.format(seats=400_000 if pool == "prefork" else 0)
        for there in pools.values()
        for worker, pool in there.items()
    }
    plans = {
        host: " ".join(f"{worker}={','.join(patterns)}" for worker, patterns in plans.items())
        for host, plans in PLANS.items()
    }
    with leaky_workers(fleet, tmp_path_factory.mktemp("leaks"), pools, settings):
        said = on_both(fleet, {host: f"{IN_APP} -m boxoffice.traced {WINDOW_S} {plans[host]}" for host in PLANS})
        traces = on_both(fleet, dict.fromkeys(PLANS, "cat /var/log/plimsoll/trace/celery-worker@leaks-*.jsonl"))
        found = {}
        for host in PLANS:
            growth = {one["id"]: one for one in map(json.loads, traces[host].splitlines()) if one["kind"] == "growth"}
            for one in map(json.loads, said[host].splitlines()):
                found[pool_of(one["worker"]), "+".join(one["patterns"])] = growth[one["id"]]
        yield found


ASKED = [
    (pool_of(worker), pattern) for plans in PLANS.values() for worker, patterns in plans.items() for pattern in patterns
]


@pytest.mark.parametrize(("pool", "pattern"), [one for one in ASKED if one[1] in PYTHON])
def test_the_line_comes_first(windows: dict[tuple[str, str], dict[str, Any]], pool: str, pattern: str) -> None:
    growth = windows[pool, pattern]
    file, function = PYTHON[pattern]
    top = growth["sites"][0]
    assert (Path(top["file"]).name, top["function"]) == (file.name, function), growth["sites"]
    assert file.read_text().splitlines()[top["line"] - 1].endswith("# the leak")
    ran = growth["tasks"][f"boxoffice.leaks.{pattern}"]["count"]
    assert ran >= 4 and top["growth_kb"] >= KEPT_KB * (ran - 1)
    assert culprits([growth])[0]["task"] == f"boxoffice.leaks.{pattern}"
    assert leak_class([growth]) == ("cache_filling" if pattern == "filling_cache" else "python_objects"), gains(
        [growth]
    )


@pytest.mark.parametrize(("pool", "pattern"), [one for one in ASKED if one[1] in OTHERS])
def test_the_kind_is_told(windows: dict[tuple[str, str], dict[str, Any]], pool: str, pattern: str) -> None:
    growth = windows[pool, pattern]
    assert leak_class([growth]) == OTHERS[pattern], (gains([growth]), growth)


@pytest.mark.parametrize(("pool", "pattern"), [one for one in ASKED if "_mended" in one[1]])
def test_what_is_mended_is_no_leak(windows: dict[tuple[str, str], dict[str, Any]], pool: str, pattern: str) -> None:
    growth = windows[pool, pattern]
    assert leak_class([growth]) == "unknown", (gains([growth]), growth)
    of_the_tasks = [one for one in growth["sites"] if Path(one["file"]).name in (LEAKS.name, LIBRARY.name)]
    assert sum(one["growth_kb"] for one in of_the_tasks) < KEPT_KB, of_the_tasks
    assert growth["fds"]["growth"] == 0, growth["fds"]
