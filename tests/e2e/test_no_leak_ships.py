"""soak.yml on a real machine: a task that leaks fails the gate and is named, a healthy one passes; nothing stays."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import yaml

from .lab_fleet import Fleet, Ran

# Fast enough for a minute on an emulated host.
TASKS = {
    "tasks": {
        "boxoffice.tasks.scan_ticket": {"args": ["{n}"]},
        "boxoffice.tasks.render_ticket": {"args": ["{n}"]},
    },
    "limits": {"seconds": 240, "rate": 100},
    "runs": 128,
}
LEFT = "systemctl list-units --all --plain --no-legend 'plimsoll-soak*'; ls -d /run/plimsoll-soak 2>/dev/null"
KEYS = "redis-cli --scan --pattern '*plimsoll-soak*'"


def soak(fleet: Fleet, *options: str, **extra: Any) -> Ran:
    (fleet.home / "tasks.yml").write_text(yaml.safe_dump(TASKS))
    given = {"soak_tasks": str(fleet.home / "tasks.yml"), "soak_out": str(fleet.home / "soaked"), **extra}
    return fleet.play("soak", "--limit=demo-2", f"--extra-vars={json.dumps(given)}", *options)


def test_a_broker_of_production_has_to_be_named_twice(fleet: Fleet) -> None:
    for extra in ({}, {"soak_broker": "192.168.128.1"}):
        ran = soak(fleet, **extra)
        assert ran.code != 0 and "name it twice, by -e soak_broker=192.168." in ran.said, ran.output
        assert ran.recap["demo-2"] == (0, 1)


def test_check_mode_says_what_would_be_sent_and_sends_nothing(fleet: Fleet) -> None:
    ran = soak(fleet, "--check", "--diff", soak_staging=True)
    assert ran.code == 0 and "+boxoffice.tasks.scan_ticket: " in ran.output, ran.output
    assert fleet.on("demo-2", f"{LEFT} || true").strip() == ""


def test_a_task_that_leaks_fails_the_gate_with_its_line_and_nothing_stays(fleet: Fleet) -> None:
    running = fleet.on("demo-2", "systemctl show --value -p MainPID 'celery-worker@*'")
    ran = soak(fleet, soak_staging=True)
    assert ran.code != 0 and "The soak fails: a task leaks" in ran.said, ran.output
    document = json.loads((fleet.home / "soaked" / "soak.json").read_text())
    leaks, healthy = document["tasks"]
    assert (leaks["task"], leaks["verdict"]) == ("boxoffice.tasks.scan_ticket", "fail"), ran.output
    assert leaks["growth_low"] > 250_000 and leaks["leak"]["leak_class"] == "python_objects", leaks
    assert leaks["leak"]["culprits"][0]["file"].endswith("boxoffice/tasks.py"), leaks["leak"]
    assert (healthy["task"], healthy["verdict"]) == ("boxoffice.tasks.render_ticket", "pass"), healthy
    cases = ElementTree.parse(fleet.home / "soaked" / "junit.xml").getroot().iter("testcase")
    assert [case.find("failure") is not None for case in cases] == [True, False]

    assert fleet.on("demo-2", f"{LEFT} || true").strip() == ""
    password = (fleet.home / "lab" / "redis_password").read_text().split()[0]
    assert fleet.on("demo-1", f"REDISCLI_AUTH={password} {KEYS}").strip() == ""
    # Of the host's own workers none was touched.
    assert fleet.on("demo-2", "systemctl show --value -p MainPID 'celery-worker@*'") == running
