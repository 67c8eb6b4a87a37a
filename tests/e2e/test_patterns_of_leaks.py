"""Each kind of leak in real units on the lab's machines, in every pool and under load: what its window tells."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lab.patterns import KEPT_KB, LAB, LEAKS, LIBRARY, MENDED, OTHERS, PYTHON, build_extension
from plimsoll.diagnose import culprits, gains, leak_class

from .lab_fleet import BIN, IN_APP, Fleet

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
DROPIN = """[Service]
Environment="CELERY_ARGS=--queues={worker} --pool={pool} --concurrency=1 --loglevel=INFO"
Environment=CELERY_WORKER_INCLUDE=plimsoll_notify,plimsoll_bootstrap,boxoffice.leaks
Environment=PYTHONPATH=/opt/plimsoll/bootstrap:/srv/leaks:/srv/leaks/site-packages
Environment=BOXOFFICE_PRICED_SEATS={seats}
# The end of a window stops an emulated worker for long.
WatchdogSec=120
"""


def pool_of(worker: str) -> str:
    return worker.split("-")[1]


def archive(folder: Path) -> Path:
    """What the leaks need on the machines, and the workers' drop-ins."""
    root = folder / "root"
    packages = root / "srv" / "leaks" / "site-packages"
    shutil.copytree(LAB / "site-packages", packages)
    build_extension(packages.parent)
    # For the Python and the C library of Debian 12.
    target = ["--target", str(packages), "--python-version=3.11", "--python-platform=x86_64-manylinux_2_28"]
    subprocess.run([BIN / "uv", "pip", "install", "--quiet", *target, "gevent>=25.0", "eventlet>=0.40"], check=True)
    for worker in (worker for plans in PLANS.values() for worker in plans):
        dropin = root / "etc/systemd/system" / f"celery-worker@{worker}.service.d" / "90-leaks.conf"
        dropin.parent.mkdir(parents=True)
        pool = pool_of(worker)
        dropin.write_text(DROPIN.format(worker=worker, pool=pool, seats=400_000 if pool == "prefork" else 0))
    return Path(shutil.make_archive(str(folder / "leaks"), "gztar", root, owner="root", group="root"))


def on_both(fleet: Fleet, commands: dict[str, str]) -> dict[str, str]:
    """What they print, by host; side by side, as the machines are slow."""
    with ThreadPoolExecutor() as both:
        ran = dict(zip(commands, both.map(lambda host: fleet.lab("ssh", host, commands[host]), commands)))
    for one in ran.values():
        assert one.code == 0, one.output
    return {host: one.output for host, one in ran.items()}


@pytest.fixture(scope="module")
def windows(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], dict[str, Any]]]:
    """Growth record by pool and pattern."""
    packed = archive(tmp_path_factory.mktemp("leaks"))
    words = ["celery_workers", "--become", "--module-name=ansible.builtin.unarchive", f"--args=src={packed} dest=/"]
    ran = fleet.run(str(BIN / "ansible"), f"--inventory={fleet.inventory}", *words)
    assert ran.code == 0, ran.output
    units = {host: " ".join(f"celery-worker@{worker}" for worker in plans) for host, plans in PLANS.items()}
    plans = {
        host: " ".join(f"{worker}={','.join(patterns)}" for worker, patterns in plans.items())
        for host, plans in PLANS.items()
    }
    try:
        on_both(fleet, {host: f"systemctl daemon-reload && systemctl start {units[host]}" for host in PLANS})
        said = on_both(fleet, {host: f"{IN_APP} -m boxoffice.traced {WINDOW_S} {plans[host]}" for host in PLANS})
        traces = on_both(fleet, dict.fromkeys(PLANS, "cat /var/log/plimsoll/trace/celery-worker@leaks-*.jsonl"))
        found = {}
        for host in PLANS:
            growth = {one["id"]: one for one in map(json.loads, traces[host].splitlines()) if one["kind"] == "growth"}
            for one in map(json.loads, said[host].splitlines()):
                found[pool_of(one["worker"]), "+".join(one["patterns"])] = growth[one["id"]]
        yield found
    finally:
        gone = "rm -r /srv/leaks /etc/systemd/system/celery-worker@leaks-*.service.d && systemctl daemon-reload"
        on_both(fleet, {host: f"systemctl stop {units[host]}; {gone}" for host in PLANS})


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
