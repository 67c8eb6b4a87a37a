"""The end of the fleet."""

from __future__ import annotations

from .lab_fleet import Fleet


def test_absent_drains_and_deletes_the_fleet_and_nothing_is_left_running(fleet: Fleet) -> None:
    refused = fleet.play("provision", "--extra-vars", "linode_fleet_state=absent")
    assert refused.code != 0 and "demo-1 would be deleted, 2 in all, and max_delete is 0" in refused.said
    ran = fleet.play("provision", "--extra-vars", "linode_fleet_state=absent linode_fleet_confirm=demo")
    assert ran.code == 0, ran.output
    assert fleet.machines() == []
    assert (fleet.home / "lab" / "controller" / "known_hosts").read_text() == ""
    assert list((fleet.home / "lab" / "controller" / "hostkeys").iterdir()) == []
    assert fleet.lab("down").code == 0
    assert not (fleet.home / "lab").exists()
    assert fleet.lab("status").code == 1
