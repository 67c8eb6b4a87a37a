"""The module linode_fleet, run in this process, against the lab's API over pretended machines.

What Ansible itself has a part in is in test_provision.py; here a run costs milliseconds, so there are many of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import linode_fleet

from .conftest import TOKEN, Served, serve
from .pretend import PretendDriver
from .server import LIMITS

# The module's own copies, as Ansible lays them out.
fleet_api, linode = linode_fleet.fleet_api, linode_fleet.linode
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me"
SECRET = "s3cret-of-cloud-config"
HOST = {"type": "g6-nanode-1", "region": "us-ord", "image": "linode/debian12", "authorized_keys": [KEY]}
TAG = "plimsoll-fleet-pond"


class Controller:
    """Runs of the module with one directory of keys."""

    def __init__(self, home: Path, lab: Served, capsys: Any) -> None:
        self.home, self.lab, self.capsys = home, lab, capsys

    def run(self, *, check: bool = False, **params: Any) -> dict[str, Any]:
        """What the module returns, whether it failed or not."""
        given = {"name": "pond", "state_dir": str(self.home), "wait_timeout": 60, **HOST, **params}
        given |= {"api_token": TOKEN, "api_url": self.lab.url, "_ansible_check_mode": check, "_ansible_diff": True}
        with patch_module_args(given), pytest.raises(SystemExit):
            linode_fleet.main()
        self.output = self.capsys.readouterr().out
        return json.loads(self.output)

    def ok(self, **params: Any) -> dict[str, Any]:
        result = self.run(**params)
        assert not result.get("failed"), result["msg"]
        return result

    def refused(self, **params: Any) -> str:
        result = self.run(**params)
        assert result.get("failed"), result
        return str(result["msg"])

    def instances(self) -> dict[str, dict[str, Any]]:
        listed = self.lab.api.get("/linode/instances?page_size=500").json()["data"]
        return {one["label"]: one for one in listed}

    def requests(self) -> dict[str, int]:
        return self.lab.lab.get("/lab/requests").json()

    def fault(self, **rule: Any) -> None:
        self.lab.lab.delete("/lab/faults")
        assert self.lab.lab.post("/lab/faults", json={"path": "/linode/instances", **rule}).status_code == 200


def actions(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step["action"], step["label"]) for step in result["plan"]]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: Any) -> None:
    """Pretended machines are quick."""
    monkeypatch.setattr(fleet_api, "POLL_FIRST_S", 0.05)
    monkeypatch.setattr(fleet_api, "POLL_MOST_S", 0.05)
    monkeypatch.setattr(linode, "FIRST_PAUSE_S", 0.05)


@pytest.fixture
def pond(tmp_path: Path, served: Served, capsys: Any) -> Controller:
    return Controller(tmp_path / "state", served, capsys)


@pytest.fixture
def slow(tmp_path: Path, capsys: Any) -> Iterator[Controller]:
    """Machines that take a moment to boot."""
    generous = {name: (10_000, window) for name, (_, window) in LIMITS.items()}
    server, lab = serve(tmp_path / "api.json", PretendDriver(0.15), limits=generous)
    yield Controller(tmp_path / "state", lab, capsys)
    server.should_exit = True


# ---- what is declared is what is there ----


def test_groups_of_hosts_are_made_as_declared(pond: Controller) -> None:
    made = {
        "firewall": pond.lab.api.post("/networking/firewalls", json={"label": "pond", "rules": RULES}).json(),
        "vpc": pond.lab.api.post("/vpcs", json=VPC).json(),
        "group": pond.lab.api.post("/placement/groups", json=PLACEMENT).json(),
    }
    groups: list[dict[str, Any]] = [
        {"name": "worker", "count": 2, "tags": ["prod"], "vpc": "net/inner", "placement_group": "apart"},
        {"name": "broker", "hosts": ["main"], "type": "g6-standard-1", "backups": True, "private_ip": True},
        {"name": "spare", "count": 1, "power": "offline", "disk_encryption": "disabled", "swap_size": 256},
    ]
    common = {"tags": ["team"], "firewall": "pond", "maintenance_policy": "linode/power_off_on"}
    checked = pond.ok(check=True, groups=groups, **common)
    assert pond.instances() == {}
    result = pond.ok(groups=groups, **common)
    assert (checked["plan"], checked["cost"]) == (result["plan"], result["cost"])
    assert result["cost"] == {"currency": "USD", "monthly_before": 0, "monthly_after": 5 + 5 + 12 + 3 + 5}
    found = pond.instances()
    assert set(found) == {"pond-worker-1", "pond-worker-2", "pond-broker-main", "pond-spare-1"}
    assert {label: one["status"] for label, one in found.items() if one["status"] != "running"} == {
        "pond-spare-1": "offline"
    }
    worker, broker, spare = found["pond-worker-1"], found["pond-broker-main"], found["pond-spare-1"]
    assert {"team", "prod", TAG} < set(worker["tags"]) and "prod" not in broker["tags"]
    assert worker["placement_group"]["label"] == "apart" and broker["placement_group"] is None
    assert (broker["type"], broker["backups"]["enabled"], len(broker["ipv4"])) == ("g6-standard-1", True, 2)
    assert spare["disk_encryption"] == "disabled" and spare["maintenance_policy"] == "linode/power_off_on"
    behind = pond.lab.api.get(f"/networking/firewalls/{made['firewall']['id']}").json()["entities"]
    assert {one["label"] for one in behind} == set(found)
    inside = pond.lab.api.get("/vpcs").json()["data"][0]["subnets"][0]["linodes"]
    assert {one["id"] for one in inside} == {one["id"] for label, one in found.items() if "worker" in label}
    assert not pond.ok(groups=groups, **common)["changed"]


RULES = {"inbound_policy": "DROP", "outbound_policy": "ACCEPT", "inbound": [], "outbound": []}
VPC = {"label": "net", "region": "us-ord", "subnets": [{"label": "inner", "ipv4": "10.0.0.0/24"}]}
PLACEMENT = {
    "label": "apart",
    "region": "us-ord",
    "placement_group_type": "anti_affinity:local",
    "placement_group_policy": "flexible",
}


def test_linode_cli_reads_back_what_was_made(pond: Controller, tmp_path: Path) -> None:
    pond.ok(count=2, tags=["prod"], private_ip=True)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "LINODE_CLI_TOKEN": TOKEN,
        "LINODE_CLI_API_HOST": pond.lab.url.removeprefix("http://"),
        "LINODE_CLI_API_SCHEME": "http",
    }
    command = [str(Path(sys.executable).with_name("linode-cli")), "linodes", "list", "--json", "--suppress-warnings"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    read = {one["label"]: one for one in json.loads(ran.stdout)}
    assert {label: (one["status"], one["type"], one["region"]) for label, one in read.items()} == {
        "pond-1": ("running", "g6-nanode-1", "us-ord"),
        "pond-2": ("running", "g6-nanode-1", "us-ord"),
    }
    assert all({TAG, "prod"} < set(one["tags"]) for one in read.values())


def test_what_differs_in_place_is_brought_back(pond: Controller) -> None:
    for label in ("old", "pond"):
        pond.lab.api.post("/networking/firewalls", json={"label": label, "rules": RULES})
    pond.lab.api.post("/placement/groups", json=PLACEMENT)
    pond.ok(count=1, firewall="old")
    wanted = {
        "firewall": "pond",
        "placement_group": "apart",
        "backups": True,
        "maintenance_policy": "linode/power_off_on",
        "tags": ["prod"],
    }
    result = pond.ok(count=1, **wanted)
    assert actions(result) == [("update", "pond-1")]
    firewalls = {one["label"]: one["entities"] for one in pond.lab.api.get("/networking/firewalls").json()["data"]}
    assert firewalls["old"] == [] and [one["label"] for one in firewalls["pond"]] == ["pond-1"]
    one = pond.instances()["pond-1"]
    assert one["placement_group"]["label"] == "apart" and one["backups"]["enabled"] and "prod" in one["tags"]
    assert not pond.ok(count=1, **wanted)["changed"]


@pytest.mark.parametrize("missing", [{"firewall": "wall"}, {"vpc": "net/inner"}, {"placement_group": "apart"}])
def test_what_is_referred_to_and_does_not_exist_is_named_before_anything_is_made(
    pond: Controller, missing: dict[str, str]
) -> None:
    [(kind, label)] = missing.items()
    assert f"{kind}: '{label}' does not exist" in pond.refused(count=2, **missing)
    assert pond.instances() == {}


# ---- what no request changes in place ----


def test_other_keys_and_user_data_are_seen_and_made_true_by_a_rebuild(pond: Controller) -> None:
    pond.ok(count=2)
    before = pond.instances()
    changed: dict[str, Any] = {"count": 2, "user_data": f"#cloud-config\nwrite_files: [{SECRET}]\n"}
    assert "pond-1 instance" in (said := pond.refused(**changed)) and "other user_data than declared" in said
    assert SECRET not in said and SECRET not in pond.output
    result = pond.ok(**changed, on_change="rebuild")
    assert actions(result) == [("rebuild", "pond-1"), ("rebuild", "pond-2")]
    after = pond.instances()
    assert [(one["id"], one["ipv4"]) for one in after.values()] == [(one["id"], one["ipv4"]) for one in before.values()]
    assert all(SECRET in spec.user_data for spec in pond.lab.driver.specs.values())
    assert SECRET not in pond.output and SECRET not in json.dumps(after)
    assert not pond.ok(**changed)["changed"], "the record of what it was made with did not follow"


def test_another_region_is_made_true_by_a_replacement_under_the_same_label_and_key(pond: Controller) -> None:
    pond.ok(count=1)
    before, pinned = pond.instances()["pond-1"], (pond.home / "known_hosts").read_text()
    assert "set on_change to replace" in pond.refused(count=1, region="de-fra-2", on_change="rebuild")
    result = pond.ok(count=1, region="de-fra-2", on_change="replace")
    assert actions(result) == [("replace", "pond-1")]
    after = pond.instances()["pond-1"]
    assert after["id"] != before["id"] and after["region"] == "de-fra-2" and after["status"] == "running"
    assert (pond.home / "known_hosts").read_text() == pinned


def test_another_type_is_a_resize_and_what_it_costs_is_told(pond: Controller) -> None:
    pond.ok(count=2)
    result = pond.ok(count=2, type="g6-standard-1")
    assert actions(result) == [("resize", "pond-1"), ("resize", "pond-2")]
    assert result["cost"] == {"currency": "USD", "monthly_before": 10, "monthly_after": 24}
    assert {(one["type"], one["status"]) for one in pond.instances().values()} == {("g6-standard-1", "running")}


def test_no_more_hosts_are_down_at_a_time_than_allowed(slow: Controller) -> None:
    slow.ok(count=6)
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, 6 - len(slow.lab.driver.running))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        slow.ok(count=6, type="g6-standard-1", max_unavailable=2)
    finally:
        over.set()
        watcher.join()
    assert most == 2


def test_a_roll_ends_with_the_first_host_that_does_not_come_back(pond: Controller, monkeypatch: Any) -> None:
    monkeypatch.setattr(fleet_api, "OFFLINE_GRACE_S", 0.0)
    pond.ok(count=3)
    pond.fault(kind="boot_fail", count=20)
    said = pond.refused(count=3, type="g6-standard-1")
    assert "pond-1: is still offline after 3 boots; its last failed event" in said
    assert "pond-2: not begun, as pond-1 failed" in said and "pond-3: not begun" in said
    # By label: they were made side by side, in any order.
    statuses = {label: one["status"] for label, one in pond.instances().items()}
    assert statuses == {"pond-1": "offline", "pond-2": "running", "pond-3": "running"}
    pond.lab.lab.delete("/lab/faults")
    pond.ok(count=3, type="g6-standard-1")
    assert {(one["type"], one["status"]) for one in pond.instances().values()} == {("g6-standard-1", "running")}


# ---- whose it is ----


def test_an_instance_that_exists_is_adopted_and_others_stay_untouched(pond: Controller) -> None:
    old, other = pond.lab.create("celery-old", region="us-ord", tags=["theirs"]), pond.lab.create("pond-web-1")
    pond.lab.settle(old["id"]), pond.lab.settle(other["id"])
    adopt = {"count": 2, "adopt": {"pond-2": "celery-old"}}
    assert "no SSH host key of it is pinned" in pond.refused(**adopt)
    pond.home.mkdir()
    (pond.home / "known_hosts").write_text("pond-2 ssh-ed25519 AAAA\n")
    result = pond.ok(**adopt)
    assert actions(result) == [("create", "pond-1"), ("adopt", "pond-2")]
    found = pond.instances()
    assert found["pond-2"]["id"] == old["id"] and {TAG, "theirs"} == set(found["pond-2"]["tags"])
    assert found["pond-web-1"] == pond.lab.api.get(f"/linode/instances/{other['id']}").json()
    assert not pond.ok(**adopt)["changed"] and not pond.ok(count=2)["changed"]


@pytest.mark.parametrize("kept", ["tag", "lock", "option"])
def test_what_is_protected_is_neither_deleted_nor_wiped(pond: Controller, kept: str) -> None:
    pond.ok(count=2)
    one = pond.instances()["pond-2"]
    more: dict[str, Any] = {}
    if kept == "tag":
        pond.lab.api.put(f"/linode/instances/{one['id']}", json={"tags": [*one["tags"], "plimsoll-protect"]})
    elif kept == "lock":
        lock = {"entity_id": one["id"], "entity_type": "linode", "lock_type": "cannot_delete"}
        assert pond.lab.api.post("/locks", json=lock).status_code == 200
    else:
        more["protect"] = ["pond-2"]
    for way in ({"count": 1, "max_delete": 9}, {"count": 2, "image": "linode/debian13", "on_change": "rebuild"}):
        said = pond.refused(**more, **way)
        assert "nothing was changed" in said and "pond-2 " in said
    assert "pond-2 " in pond.refused(**more, state="absent", confirm="pond")
    assert len(pond.instances()) == 2 and pond.instances()["pond-1"]["image"] == "linode/debian12"


def test_the_whole_fleet_goes_by_its_name_alone(pond: Controller) -> None:
    pond.ok(count=3)
    other = pond.lab.create("lake-1")
    assert "max_delete is 2: set it to 3" in pond.refused(state="absent", max_delete=2)
    assert "max_delete is 0" in pond.refused(state="absent", confirm="lake")
    pond.ok(state="absent", confirm="pond")
    assert list(pond.instances()) == ["lake-1"] == [other["label"]]


# ---- requests ----


def test_a_hundred_hosts_as_declared_cost_three_requests(pond: Controller) -> None:
    pond.lab.api.post("/networking/firewalls", json={"label": "pond", "rules": RULES})
    pond.lab.api.post("/vpcs", json=VPC)
    wanted = {"count": 100, "firewall": "pond", "vpc": "net/inner"}
    # As many creations in time are another test's; here the limits are not Linode's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linode, "LIMITS", {"create": (1000, 1.0), "list": (1000, 1.0), "other": (1000, 1.0)})
        pond.ok(**wanted)
    before = pond.requests()
    assert not pond.ok(**wanted)["changed"]
    after = pond.requests()
    asked = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    assert asked == {"GET /linode/instances": 1, "GET /networking/firewalls": 1, "GET /vpcs": 1}


def test_twenty_creations_at_once_are_within_linodes_limits_and_share_one_poll(
    tmp_path: Path, limited: Served, capsys: Any, monkeypatch: Any
) -> None:
    pond = Controller(tmp_path / "state", limited, capsys)
    # Nobody runs before all of them are being booted: one after the other, none ever would.
    together = threading.Barrier(20)
    monkeypatch.setattr(limited.driver, "boot", lambda number: [together.wait(30), limited.driver.running.add(number)])
    pond.ok(count=20)
    asked = pond.requests()
    assert asked["POST /linode/instances"] == 20 and "429" not in asked
    assert "GET /linode/instances/{id}" not in asked and "GET /account/events" not in asked


# ---- trouble ----


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "status", "status": 429, "retry_after": 1},
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 408},
        {"kind": "busy"},
        {"kind": "lost_answer"},
        {"kind": "status", "status": 502, "method": "GET"},
    ],
    ids=lambda rule: f"{rule['kind']} {rule.get('status', '')}".strip(),
)
def test_an_api_in_trouble_makes_each_instance_once(pond: Controller, rule: dict[str, Any]) -> None:
    pond.fault(**{"method": "POST", "count": 3, **rule})
    pond.ok(count=4)
    assert sorted(pond.instances()) == [f"pond-{number}" for number in range(1, 5)]
    assert pond.ok(count=4)["changed"] is False


def test_maintenance_is_not_waited_for(pond: Controller) -> None:
    pond.fault(kind="maintenance", method="GET", count=9)
    started = time.monotonic()
    assert "is in maintenance; try again later" in pond.refused(count=1)
    assert time.monotonic() - started < 5


def test_one_host_that_does_not_boot_leaves_the_others_alone_and_is_mended(pond: Controller, monkeypatch: Any) -> None:
    monkeypatch.setattr(fleet_api, "OFFLINE_GRACE_S", 0.0)
    pond.fault(kind="boot_fail", count=4)
    result = pond.run(count=1)
    assert result["failed"] and "refused to boot this Linode" in result["msg"]
    (one,) = result["instances"]
    assert (one["label"], one["status"]) == ("pond-1", "offline") and "boots" in one["error"]
    pond.lab.lab.delete("/lab/faults")
    pond.ok(count=2)
    assert {one["status"] for one in pond.instances().values()} == {"running"}


def test_one_host_that_is_slow_is_named_with_the_limit_that_it_broke(pond: Controller) -> None:
    pond.fault(kind="slow_boot", seconds=3)
    said = pond.refused(count=3, timeouts={"create": 1})
    assert "1 of 3 instances failed" in said and "after 1 s (timeouts.create); run again to go on waiting" in said
    pond.ok(count=3)


class Killed(BaseException):
    """The end of a run at a point of its own."""


@pytest.mark.parametrize("arrives", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("point", range(1, 9))
def test_a_run_that_is_killed_at_any_request_is_mended_by_the_next(
    pond: Controller, monkeypatch: Any, point: int, arrives: bool
) -> None:
    """Of a plan with everything in it: create, update, resize, rebuild, replace, delete."""
    groups: list[dict[str, Any]] = [
        {"name": "a", "count": 1},
        {"name": "b", "count": 1},
        {"name": "c", "count": 1},
        {"name": "d", "count": 2},
    ]
    pond.ok(groups=groups)
    changed = [
        {"name": "a", "count": 2, "tags": ["prod"]},
        {"name": "b", "count": 1, "type": "g6-standard-1"},
        {"name": "c", "count": 1, "image": "linode/debian13", "on_change": "rebuild"},
        {"name": "d", "count": 1, "region": "de-fra-2", "on_change": "replace"},
    ]
    sent, once = 0, linode.Api._once

    def cut(self: Any, method: str, *rest: Any) -> Any:
        nonlocal sent
        if method == "GET":
            return once(self, method, *rest)
        sent += 1
        if sent != point:
            return once(self, method, *rest)
        if arrives:
            once(self, method, *rest)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(linode.Api, "_once", cut)
        with pytest.raises(Killed):
            pond.ok(groups=changed, max_delete=1)
    pond.capsys.readouterr()
    # What was under way when it ended goes on without it.
    for one in pond.instances().values():
        if one["status"] != "deleting":
            pond.lab.settle(one["id"])
    pond.ok(groups=changed, max_delete=1)
    found = pond.instances()
    # A count is met by who is there: where the replaced one was gone, that is the one that was to be deleted.
    (last,) = set(found) - {"pond-a-1", "pond-a-2", "pond-b-1", "pond-c-1"}
    assert len(found) == 5 and last in ("pond-d-1", "pond-d-2")
    assert {one["status"] for one in found.values()} == {"running"}
    assert (found["pond-b-1"]["type"], found["pond-c-1"]["image"]) == ("g6-standard-1", "linode/debian13")
    assert found[last]["region"] == "de-fra-2" and "prod" in found["pond-a-1"]["tags"]
    assert not pond.ok(groups=changed)["changed"]


# ---- secrets ----


def test_the_token_is_in_its_header_and_nowhere_else_on_the_wire(pond: Controller) -> None:
    wanted: dict[str, Any] = {"count": 2, "tags": ["prod"], "user_data": f"#cloud-config\nfinal_message: {SECRET}\n"}
    pond.ok(**wanted)
    output = pond.output
    pond.ok(**{**wanted, "type": "g6-standard-1"})
    pond.ok(state="absent", confirm="pond")
    wire = pond.lab.wire()
    assert len([one for one in wire if one["method"] == "POST"]) >= 4
    assert TOKEN not in json.dumps(wire)
    # Cloud-config is in the metadata of the two creations, encoded; and in nothing that is shown.
    assert SECRET not in json.dumps(wire) and SECRET not in output and TOKEN not in output
    for one in wire:
        sent = json.loads(one["body"] or "{}")
        assert not {"api_token", "state", "wait", "api_url", "state_dir"} & set(sent), sent
