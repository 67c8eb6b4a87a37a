"""monitor.yml on real machines: what it sets up, and who may ask. What it then sees is in test_main_job_watched.py."""

from __future__ import annotations

import json

from .lab_fleet import Fleet, Ran


def monitor(fleet: Fleet, *options: str, **extra: object) -> Ran:
    extra = {"prometheus_collect_targets": ["127.0.0.1:9100"], **extra}
    return fleet.play("monitor", *options, f"--extra-vars={json.dumps(extra)}")


def test_it_is_set_up_and_a_second_run_changes_nothing(fleet: Fleet) -> None:
    ran = monitor(fleet, "--check", "--diff")
    assert ran.code == 0 and "+  - job_name: plimsoll" in ran.output, ran.output
    ran = monitor(fleet)
    assert ran.code == 0, ran.output
    ran = monitor(fleet)
    assert ran.code == 0 and {changed for changed, _ in ran.recap.values()} == {0}, ran.output


def test_nobody_else_is_answered(fleet: Fleet) -> None:
    """demo-2 is not the host of Prometheus, and asks demo-1."""
    place = fleet.on("demo-1", "hostname -I | tr ' ' '\\n' | grep ^192.168").strip()
    connect = f"import socket; socket.create_connection(('{place}', 9253), timeout=4)"
    assert fleet.lab("ssh", "demo-2", f'python3 -c "{connect}"').code != 0
    assert fleet.lab("ssh", "demo-1", f'python3 -c "{connect}"').code == 0


def test_rules_that_are_none_do_not_land_and_the_old_ones_stay(fleet: Fleet) -> None:
    shown = "cat /etc/prometheus/rules/plimsoll.yml; systemctl show -p MainPID prometheus"
    before = fleet.on("demo-1", shown)
    ran = monitor(fleet, "--limit=demo-1", prometheus_high_for="soon")
    assert ran.code != 0 and "are durations, as 30s or 15d" in ran.said, ran.output
    broken = fleet.home / "broken.yml.j2"
    broken.write_text("groups: [{name: x, rules: [{record: y, expr: 'sum('}]}]\n")
    ran = monitor(fleet, "--limit=demo-1", prometheus_rules_template=str(broken))
    assert ran.code != 0 and "could not parse expression" in ran.said, ran.output
    assert fleet.on("demo-1", shown) == before
