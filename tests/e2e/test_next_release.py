"""Changes of a fleet that works: a release that does not, workers that come and go, and what cannot be."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import yaml

from .lab_fleet import ROOT, Fleet
from .numbered import runs

# It imports, and so only its workers show that it is none.
BROKEN = """

from celery import signals


@signals.worker_init.connect
def refuse(**_):
    raise SystemExit("this release runs nowhere")
"""
RUNS = "readlink /opt/celery/current; systemctl is-active celery-worker@{}"
PIDS = "for one in gate extra; do systemctl show --value -p MainPID celery-worker@$one; done"


def declare(fleet: Fleet, **changes: Any) -> None:
    """What demo-2 is to run, in its host_vars."""
    kept = yaml.safe_load((ROOT / "tests/lab/inventory/host_vars/demo-2.yml").read_text())
    instances = kept["celery_worker_instances"] + changes.pop("more", [])
    declared = {**kept, **changes, "celery_worker_instances": instances}
    (fleet.inventory / "host_vars" / "demo-2.yml").write_text(yaml.safe_dump(declared))


def deploy(fleet: Fleet) -> None:
    ran = fleet.play("deploy", "--limit=demo-2", "--tags=celery_worker")
    assert ran.code == 0 and ran.recap["demo-2"][0] > 0, ran.output


def test_a_release_that_does_not_work_is_taken_back_and_goes_no_further(fleet: Fleet) -> None:
    shutil.copytree(ROOT / "tests/lab/app", fleet.home / "broken")
    with (fleet.home / "broken/boxoffice/__init__.py").open("a") as app:
        app.write(BROKEN)
    before, pids = fleet.on("demo-1", RUNS.format("sales")), fleet.on("demo-2", PIDS)
    release = before.split()[0].rpartition("/")[2]
    broken = {"celery_worker_source": str(fleet.home / "broken"), "celery_worker_serial": 1}
    ran = fleet.play("deploy", "--tags=celery_worker", "--extra-vars", json.dumps(broken))
    assert ran.code != 0 and "this release runs nowhere" in ran.said, ran.output
    assert f"The host is back at release {release} and its former settings, and runs sales again" in ran.said
    assert fleet.on("demo-1", RUNS.format("sales")) == before and before.split()[1] == "active"
    # The host after it was checked, and no more.
    assert ran.recap["demo-2"] == (0, 0) and fleet.on("demo-2", PIDS) == pids
    again = fleet.play("deploy", "--limit=demo-1", "--tags=celery_worker")
    assert again.code == 0 and again.recap["demo-1"] == (0, 0), again.output


def test_what_cannot_be_is_told_at_once_before_anything_changes(fleet: Fleet) -> None:
    declare(
        fleet,
        celery_worker_memory_max="",
        celery_worker_memory_high="",
        more=[
            {"name": "fork", "pool": "forked", "queues": ["the queue"]},
            {"name": "big", "memory_max": "900M", "memory_high": "950M", "max_memory_per_child": 0},
        ],
    )
    ran = fleet.play("deploy")
    assert ran.code != 0
    for said in (
        "no pool is called forked; there are prefork, threads, solo, gevent, eventlet",
        "the name of a queue holds no blank and no comma",
        "big: memory_high 950M is above memory_max 900M: it would never hold",
        "big: memory_max 900M is more than the 784 MiB of celery.slice",
    ):
        assert said in ran.said, ran.output
    assert [changed for changed, _ in ran.recap.values()] == [0, 0, 0], ran.output


def test_a_worker_comes_changes_and_goes_by_itself(fleet: Fleet) -> None:
    """Beside one that is not to notice; and celery-beat with it, whose schedule counts the number 0."""
    gate = fleet.on("demo-2", PIDS).split()[0]
    done = len(runs(fleet, 0, 1).get(0, []))
    beat = {"celery_worker_beat": True, "celery_worker_beat_memory_max": "128M"}
    declare(fleet, **beat, more=[{"name": "extra", "queues": ["extra"], "pool": "solo"}])
    deploy(fleet)
    first = fleet.on("demo-2", PIDS).split()
    assert first[0] == gate and first[1] != "0"
    declare(fleet, **beat, more=[{"name": "extra", "queues": ["extra"], "pool": "threads"}])
    deploy(fleet)
    second = fleet.on("demo-2", PIDS).split()
    assert second[0] == gate and second[1] not in ("0", first[1])
    deadline = time.monotonic() + 60
    while len(runs(fleet, 0, 1).get(0, [])) < done + 2:
        assert time.monotonic() < deadline, fleet.on("demo-2", "journalctl --unit=celery-beat --output=cat")
        time.sleep(2)
    declare(fleet)
    deploy(fleet)
    assert fleet.on("demo-2", PIDS).split() == [gate, "0"]
    units = fleet.on("demo-2", "systemctl list-units --all --no-legend 'celery-*'; ls /etc/systemd/system/*")
    assert "@extra.service " not in units and "celery-beat" not in units, units
