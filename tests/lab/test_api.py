"""The lab's API answers as Linode's does: read by its description, by linode_api4 and by linode-cli."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from linode_api4 import ApiError, Instance

from .conftest import CREATE, TOKEN, Served, serve
from .pretend import PretendDriver

SHARED = Path(__file__).resolve().parents[3] / "shared"
DESCRIPTION, OPERATIONS = SHARED / "linode-openapi.json", SHARED / "linode-cli-ops.json"
SSH = {"action": "ACCEPT", "protocol": "TCP", "ports": "22", "addresses": {"ipv4": ["192.0.2.0/24"]}}
POLICIES = {"inbound_policy": "DROP", "outbound_policy": "ACCEPT"}
PUBLIC = {"purpose": "public", "primary": True}


def relaxed(schema: Any) -> Any:
    """The description without what rejects even Linode's own replies: its nullability and closed objects are wrong."""
    if isinstance(schema, list):
        return [relaxed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: relaxed(value)
        for key, value in schema.items()
        if key not in ("additionalProperties", "nullable", "required")
    }
    if isinstance(out.get("pattern"), str) and ", " in out["pattern"]:
        del out["pattern"]  # prose
    if isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if isinstance(out.get("enum"), list) and "array" in (out.get("type") or ()):
        del out["enum"]  # said of the list where its items are meant
    if isinstance(out.get("enum"), list):
        out["enum"] = [*out["enum"], None]
    return out


@pytest.fixture(scope="module")
def description() -> Any:
    if not DESCRIPTION.exists():
        pytest.skip("Linode's OpenAPI description is not beside the checkout (shared/linode-openapi.json)")
    return json.loads(DESCRIPTION.read_text())["paths"]


@pytest.fixture(scope="module")
def operations() -> Any:
    """A newer description, as linode-cli has it: request and response of every operation, as dotted names."""
    if not OPERATIONS.exists():
        pytest.skip("linode-cli's operations are not beside the checkout (shared/linode-cli-ops.json)")
    return json.loads(OPERATIONS.read_text())


def check_reply(description: Any, method: str, path: str, answer: httpx.Response) -> None:
    assert answer.status_code == 200, (method, path, answer.text)
    schema = description[path][method.lower()]["responses"]["200"]["content"]["application/json"]["schema"]
    missing = set(schema.get("properties", {})) - {"accelerated_devices"} - set(answer.json())
    assert not missing, f"{method} {path} lacks {missing}"
    jsonschema.validate(answer.json(), relaxed(schema))


def lacks(reply: Any, name: str) -> bool:
    """Whether a dotted name is missing, where all above it is there."""
    if isinstance(reply, list):
        return any(lacks(one, name) for one in reply)
    first, _, rest = name.partition(".")
    if reply is None or not rest:
        return reply is not None and first not in reply
    return first not in reply or lacks(reply[first], rest)


def group(served: Served, label: str = "apart", region: str = "us-mia") -> dict[str, Any]:
    body = {"label": label, "region": region, "placement_group_type": "anti_affinity:local"}
    answer = served.api.post("/placement/groups", json={**body, "placement_group_policy": "strict"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def vpc(served: Served, region: str = "us-mia", ipv4: str = "10.0.0.0/29") -> dict[str, Any]:
    body = {"label": f"net-{region}", "region": region, "subnets": [{"label": "workers", "ipv4": ipv4}]}
    answer = served.api.post("/vpcs", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_replies_match_the_api_description(served: Served, description: Any) -> None:
    instance = served.create("demo-1", private_ip=True, tags=["demo"])
    served.settle(instance["id"])
    rules = {"inbound": [], "outbound": [], "inbound_policy": "DROP", "outbound_policy": "ACCEPT"}
    body = {"label": "walls", "rules": rules, "devices": {"linodes": [instance["id"]]}}
    firewall = served.api.post("/networking/firewalls", json=body).json()
    device = served.api.get(f"/networking/firewalls/{firewall['id']}/devices").json()["data"][0]
    key = served.api.post("/profile/sshkeys", json={"label": "me", "ssh_key": "ssh-ed25519 AAAA"}).json()
    event = served.api.get("/account/events").json()["data"][0]
    concrete = {
        "linodeId": instance["id"],
        "firewallId": firewall["id"],
        "deviceId": device["id"],
        "sshKeyId": key["id"],
        "eventId": event["id"],
        "typeId": "g6-nanode-1",
        "regionId": "us-mia",
        "imageId": "linode/debian12",
        "tagLabel": "demo",
    }
    paths = [
        "/linode/instances",
        "/linode/instances/{linodeId}",
        "/linode/instances/{linodeId}/ips",
        "/linode/types",
        "/linode/types/{typeId}",
        "/regions",
        "/regions/{regionId}",
        "/images",
        "/images/{imageId}",
        "/account/events",
        "/account/events/{eventId}",
        "/account",
        "/account/settings",
        "/profile",
        "/profile/sshkeys",
        "/profile/sshkeys/{sshKeyId}",
        "/tags",
        "/networking/firewalls",
        "/networking/firewalls/{firewallId}",
        "/networking/firewalls/{firewallId}/rules",
        "/networking/firewalls/{firewallId}/devices",
        "/networking/firewalls/{firewallId}/devices/{deviceId}",
    ]
    for path in paths:
        check_reply(description, "GET", path, served.api.get(path.format(**concrete)))


def test_replies_about_networks_and_groups_match_it_too(served: Served, description: Any) -> None:
    apart, network = group(served), vpc(served)
    subnet = network["subnets"][0]
    interfaces = [PUBLIC, {"purpose": "vpc", "subnet_id": subnet["id"]}]
    instance = served.create("demo-1", interfaces=interfaces, placement_group={"id": apart["id"]})
    served.settle(instance["id"])
    concrete = {
        "linodeId": instance["id"],
        "groupId": apart["id"],
        "vpcId": network["id"],
        "vpcSubnetId": subnet["id"],
    }
    paths = [
        "/linode/instances/{linodeId}",
        "/linode/instances/{linodeId}/ips",
        "/linode/instances/{linodeId}/disks",
        "/linode/instances/{linodeId}/configs",
        "/placement/groups",
        "/placement/groups/{groupId}",
        "/vpcs",
        "/vpcs/ips",
        "/vpcs/{vpcId}",
        "/vpcs/{vpcId}/ips",
        "/vpcs/{vpcId}/subnets",
        "/vpcs/{vpcId}/subnets/{vpcSubnetId}",
    ]
    for path in paths:
        check_reply(description, "GET", path, served.api.get(path.format(**concrete)))
    linode = {"linodes": [instance["id"]]}
    keys = {key: CREATE[key] for key in ("image", "authorized_keys")}
    changes: list[tuple[str, str, Any]] = [
        ("POST", "/placement/groups/{groupId}/unassign", linode),
        ("POST", "/placement/groups/{groupId}/assign", linode),
        ("PUT", "/placement/groups/{groupId}", {"label": "wide-apart"}),
        ("PUT", "/vpcs/{vpcId}", {"description": "of the workers"}),
        ("POST", "/vpcs/{vpcId}/subnets", {"label": "more", "ipv4": "10.0.1.0/24"}),
        ("PUT", "/vpcs/{vpcId}/subnets/{vpcSubnetId}", {"label": "most"}),
        ("POST", "/linode/instances/{linodeId}/backups/enable", {}),
        ("POST", "/linode/instances/{linodeId}/backups/cancel", {}),
        ("POST", "/linode/instances/{linodeId}/rebuild", {**keys, "booted": False}),
    ]
    for method, path, body in changes:
        check_reply(description, method, path, served.api.request(method, path.format(**concrete), json=body))
    served.settle(instance["id"], "offline")
    larger = {"type": "g6-standard-1"}
    answer = served.api.post(f"/linode/instances/{instance['id']}/resize", json=larger)
    check_reply(description, "POST", "/linode/instances/{linodeId}/resize", answer)
    assert served.settle(instance["id"], "offline")["placement_group"]["label"] == "wide-apart"


def test_replies_have_what_newer_clients_read(served: Served, operations: Any) -> None:
    instance = served.create("demo-1", placement_group={"id": group(served)["id"]})
    firewall = {"label": "walls", "rules": POLICIES, "devices": {"linodes": [instance["id"]]}}
    served.api.post("/networking/firewalls", json=firewall)
    lock = {"entity_id": instance["id"], "entity_type": "linode", "lock_type": "cannot_delete"}
    assert served.api.post("/locks", json=lock).json()["entity"]["label"] == "demo-1"
    for path in ("/linode/instances", "/networking/firewalls", "/locks", "/maintenance/policies", "/placement/groups"):
        data = served.api.get(path).json()["data"]
        names = [name for name, *_ in operations[f"GET /{{apiVersion}}{path}"]["response"]]
        assert data and names and not [name for name in names if lacks(data, name)]


def test_an_instance_lives_as_on_linode(served: Served) -> None:
    instance = served.create("demo-1", private_ip=True)
    assert instance["status"] in ("provisioning", "booting", "running")
    running = served.settle(instance["id"])
    assert running["ipv4"] == ["127.18.0.1", "192.168.128.1"]
    assert served.api.post(f"/linode/instances/{running['id']}/shutdown").json() == {}
    served.settle(running["id"], "offline")
    assert served.driver.state(running["id"]) == "stopped"
    served.api.post(f"/linode/instances/{running['id']}/boot")
    served.settle(running["id"])
    assert served.api.delete(f"/linode/instances/{running['id']}").json() == {}
    for _ in range(200):
        if served.api.get(f"/linode/instances/{running['id']}").status_code == 404:
            break
    assert served.driver.state(running["id"]) == "absent"
    finished = served.api.get("/account/events", headers={"X-Filter": json.dumps({"entity.id": running["id"]})}).json()
    actions = [(event["action"], event["status"]) for event in finished["data"]]
    assert actions[-1] == ("linode_create", "finished") and ("linode_delete", "finished") in actions


def test_a_resize_stops_changes_and_boots_again_what_ran(served: Served) -> None:
    number = served.create("demo-1", swap_size=256)["id"]
    one = f"/linode/instances/{number}"

    def disks() -> list[tuple[str, int]]:
        return [(disk["filesystem"], disk["size"]) for disk in served.api.get(f"{one}/disks").json()["data"]]

    assert disks() == [("ext4", 25344), ("swap", 256)]
    served.settle(number)
    assert served.refused("POST", f"{one}/resize", type="g99-huge")["field"] == "type"
    same = served.refused("POST", f"{one}/resize", type="g6-nanode-1")
    assert same["reason"] == "Linode is already running this service plan."
    served.driver.boot_seconds = 0.5
    assert served.api.post(f"{one}/resize", json={"type": "g6-standard-2"}).json() == {}
    assert served.api.get(one).json()["status"] in ("resizing", "booting")
    assert served.refused("POST", f"{one}/resize", type="g6-standard-1")["reason"] == "Linode busy."
    resized = served.settle(number)
    assert (resized["type"], resized["specs"]["memory"], disks()[0]) == ("g6-standard-2", 4096, ("ext4", 81664))
    assert (served.driver.specs[number].memory_mb, served.driver.specs[number].vcpus) == (4096, 2)
    assert served.driver.state(number) == "running"
    small = {"type": "g6-nanode-1", "allow_auto_disk_resize": False}
    assert served.refused("POST", f"{one}/resize", **small)["reason"].startswith("Linode has allocated more disk")
    served.api.post(f"{one}/shutdown")
    served.settle(number, "offline")
    served.api.post(f"{one}/resize", json={"type": "g6-nanode-1"})
    assert served.settle(number, "offline")["specs"]["disk"] == 25600 and disks() == [("ext4", 25344), ("swap", 256)]
    assert served.driver.state(number) == "stopped"
    event = served.api.get("/account/events").json()["data"][0]
    assert (event["action"], event["status"]) == ("linode_resize", "finished")


def test_a_rebuild_keeps_what_is_the_linodes_and_wipes_the_rest(served: Served) -> None:
    user_data = base64.b64encode(b"#cloud-config\n").decode()
    first = served.create("demo-1", private_ip=True, tags=["demo"], metadata={"user_data": user_data}, swap_size=0)
    one = f"/linode/instances/{first['id']}"
    served.settle(first["id"])
    before = served.api.get(f"{one}/disks").json()["data"]
    image = {"image": "linode/debian13"}
    assert served.refused("POST", f"{one}/rebuild", root_pass="correct horse")["field"] == "image"
    assert served.refused("POST", f"{one}/rebuild", **image)["field"] == "root_pass"
    body = {**image, "authorized_keys": ["ssh-ed25519 BBBB"], "disk_encryption": "disabled"}
    served.driver.boot_seconds = 0.5
    answer = served.api.post(f"{one}/rebuild", json=body).json()
    assert (answer["status"], answer["image"], answer["has_user_data"]) == ("rebuilding", "linode/debian13", False)
    assert answer["disk_encryption"] == "disabled"
    assert served.refused("POST", f"{one}/rebuild", **body)["reason"] == "Linode busy."
    rebuilt = served.settle(first["id"])
    kept = ("id", "label", "tags", "ipv4", "ipv6", "type", "region")
    assert [rebuilt[key] for key in kept] == [first[key] for key in kept]
    spec = served.driver.specs[first["id"]]
    assert (spec.authorized_keys, spec.user_data, spec.image) == (("ssh-ed25519 BBBB",), "", "linode/debian13")
    assert spec.private_ipv4 == first["ipv4"][1]
    after = served.api.get(f"{one}/disks").json()["data"]
    assert not {disk["id"] for disk in before} & {disk["id"] for disk in after}
    served.lab.post("/lab/faults", json={"kind": "boot_fail"})
    served.api.post(f"{one}/rebuild", json=body)
    served.settle(first["id"], "offline")
    event = served.api.get("/account/events").json()["data"][0]
    assert (event["action"], event["status"]) == ("linode_rebuild", "failed")


def test_a_lock_keeps_an_instance(served: Served) -> None:
    instance = served.create("demo-1")
    served.settle(instance["id"])
    one = f"/linode/instances/{instance['id']}"
    body = {"entity_id": instance["id"], "entity_type": "linode", "lock_type": "cannot_delete"}
    assert served.refused("POST", "/locks", **{**body, "lock_type": "never"})["field"] == "lock_type"
    assert served.refused("POST", "/locks", **{**body, "entity_id": 999})["field"] == "entity_id"
    lock = served.api.post("/locks", json=body).json()
    assert "Only one lock" in served.refused("POST", "/locks", **body)["reason"]
    assert served.api.get(one).json()["locks"] == ["cannot_delete"]
    assert "locked (cannot_delete)" in served.refused("DELETE", one)["reason"]
    rebuild = {key: CREATE[key] for key in ("image", "authorized_keys")}
    assert "locked" in served.refused("POST", f"{one}/rebuild", **rebuild)["reason"]
    assert served.api.delete(f"/locks/{lock['id']}").json() == {}
    assert served.api.get(one).json()["locks"] == []
    assert served.api.delete(one).status_code == 200


def test_a_placement_group_has_room_for_five_of_its_region(served: Served) -> None:
    apart = group(served)
    path = f"/placement/groups/{apart['id']}"
    members = [served.create(f"demo-{n}", placement_group={"id": apart["id"]}) for n in range(1, 5)]
    assert members[0]["placement_group"] == {
        "id": apart["id"],
        "label": "apart",
        "placement_group_type": "anti_affinity:local",
        "placement_group_policy": "strict",
        "migrating_to": None,
    }
    others = [served.create(f"other-{n}")["id"] for n in (1, 2)]
    abroad = served.create("abroad-1", region="us-ord")["id"]
    assert "region" in served.refused("POST", f"{path}/assign", linodes=[abroad])["reason"]
    assert "maximum of 5" in served.refused("POST", f"{path}/assign", linodes=others)["reason"]
    assert len(served.api.post(f"{path}/assign", json={"linodes": others[:1]}).json()["members"]) == 5
    full = served.refused("POST", "/linode/instances", **CREATE, placement_group={"id": apart["id"]})
    assert full["field"] == "placement_group.id"
    assert "already" in served.refused("POST", f"{path}/assign", linodes=others[:1])["reason"]
    assert "assigned" in served.refused("DELETE", path)["reason"]
    served.api.post(f"{path}/unassign", json={"linodes": others[:1]})
    served.settle(members[0]["id"])
    served.api.delete(f"/linode/instances/{members[0]['id']}")
    assert len(served.api.get(path).json()["members"]) == 3
    group(served, "elsewhere", "us-ord")
    only = {"X-Filter": json.dumps({"region": "us-ord"})}
    assert [one["label"] for one in served.api.get("/placement/groups", headers=only).json()["data"]] == ["elsewhere"]


def test_a_subnet_gives_addresses_and_takes_them_back(served: Served) -> None:
    subnet = vpc(served)["subnets"][0]["id"]
    abroad = vpc(served, "us-ord")["subnets"][0]["id"]
    inside = {"purpose": "vpc", "subnet_id": subnet}
    given = [served.create(f"demo-{n}", interfaces=[PUBLIC, inside]) for n in range(1, 5)]
    for instance in given:
        served.settle(instance["id"])
    shown = served.api.get("/vpcs/ips").json()["data"]
    assert [one["address"] for one in shown] == ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"]
    ips = served.api.get(f"/linode/instances/{given[1]['id']}/ips").json()["ipv4"]["vpc"]
    assert ips == [shown[1]] and ips[0]["linode_id"] == given[1]["id"]
    config = served.api.get(f"/linode/instances/{given[1]['id']}/configs").json()["data"][0]
    assert config["id"] == ips[0]["config_id"] and config["interfaces"][1]["id"] == ips[0]["interface_id"]
    full = {**CREATE, "label": "demo-5", "interfaces": [PUBLIC, inside]}
    assert served.refused("POST", "/linode/instances", **full)["field"] == "interfaces"
    foreign = {**full, "interfaces": [{"purpose": "vpc", "subnet_id": abroad}]}
    assert "us-ord" in served.refused("POST", "/linode/instances", **foreign)["reason"]
    mine = f"/vpcs/{shown[0]['vpc_id']}"
    assert "no Linodes" in served.refused("DELETE", mine)["reason"]
    served.api.delete(f"/linode/instances/{given[2]['id']}")
    linodes = served.api.get(mine).json()["subnets"][0]["linodes"]
    assert [one["id"] for one in linodes] == [given[0]["id"], given[1]["id"], given[3]["id"]]
    assert linodes[0]["interfaces"] == [
        {"id": shown[0]["interface_id"], "active": True, "config_id": shown[0]["config_id"]}
    ]
    modern = {"interface_generation": "linode", "interfaces": [{"public": {}}, {"vpc": {"subnet_id": subnet}}]}
    again = served.create("demo-5", **modern)
    ips = served.api.get(f"/linode/instances/{again['id']}/ips").json()["ipv4"]["vpc"]
    assert [(one["address"], one["config_id"]) for one in ips] == [("10.0.0.4", None)]


@pytest.mark.parametrize("ipv4", ["10.0.0.0/30", "10.0.0.1/24", "8.8.8.0/24", "192.168.200.0/24", "10.0.0.0/28"])
def test_a_subnet_that_linode_would_not_have_is_refused(served: Served, ipv4: str) -> None:
    path = f"/vpcs/{vpc(served)['id']}/subnets"
    assert served.refused("POST", path, label="more", ipv4=ipv4)["field"] == "ipv4"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ports": "080"}, "ports"),
        ({"ports": "22,  80"}, "ports"),
        ({"ports": "24-22"}, "ports"),
        ({"ports": "65536"}, "ports"),
        ({"ports": "1-2,3-4,5-6,7-8,9-10,11-12,13-14,15-16"}, "ports"),
        ({"protocol": "ICMP"}, "ports"),
        ({"protocol": "SCTP"}, "protocol"),
        ({"action": "REJECT"}, "action"),
        ({"label": "ab"}, "label"),
        ({"addresses": {}}, "addresses"),
        ({"addresses": {"ipv4": ["192.0.2.0/24"], "ipv6": []}}, "addresses.ipv6"),
        ({"addresses": {"ipv4": ["192.0.2.1/24"]}}, "addresses.ipv4"),
        ({"addresses": {"ipv4": ["192.0.2.1"]}}, "addresses.ipv4"),
        ({"addresses": {"ipv4": ["2001:db8::/32"]}}, "addresses.ipv4"),
        ({"addresses": {"ipv6": ["2001:db8::/32"] * 256}}, "addresses"),
    ],
)
def test_a_rule_that_linode_would_not_have_is_refused(served: Served, change: dict[str, Any], field: str) -> None:
    rules = {**POLICIES, "inbound": [SSH, {**SSH, **change}]}
    refused = served.refused("POST", "/networking/firewalls", label="walls", rules=rules)
    assert refused["field"] == f"rules.inbound[1].{field}"


def test_rules_are_counted_and_versioned(served: Served) -> None:
    rules = {**POLICIES, "inbound": [{**SSH, "ports": "22-24, 80"}, {**SSH, "protocol": "ICMP", "ports": None}]}
    made = served.api.post("/networking/firewalls", json={"label": "walls", "rules": rules}).json()
    path = f"/networking/firewalls/{made['id']}"
    assert served.api.put(f"{path}/rules", json={**rules, "outbound": []}).json()["version"] == 1
    more = {**POLICIES, "inbound": [SSH] * 20, "outbound": [SSH] * 5}
    assert served.api.put(f"{path}/rules", json=more).json()["version"] == 2
    assert served.refused("PUT", f"{path}/rules", **{**more, "outbound": [SSH] * 6})["field"] == "rules"


def test_one_enabled_firewall_holds_an_instance(served: Served) -> None:
    instance = served.create("demo-1")

    def wall(label: str) -> str:
        made = served.api.post("/networking/firewalls", json={"label": label, "rules": POLICIES}).json()
        return f"/networking/firewalls/{made['id']}"

    first, second = wall("first"), wall("second")
    device = {"id": instance["id"], "type": "linode"}
    assert served.api.post(f"{first}/devices", json=device).status_code == 200
    assert "first" in served.refused("POST", f"{second}/devices", **device)["reason"]
    served.api.put(second, json={"status": "disabled"})
    assert served.api.post(f"{second}/devices", json=device).status_code == 200
    assert served.refused("PUT", second, status="enabled")["field"] == "status"
    served.settle(instance["id"])
    served.api.put(f"/linode/instances/{instance['id']}", json={"label": "demo-2"})
    url = f"/v4/linode/instances/{instance['id']}"
    entity = {"id": instance["id"], "type": "linode", "label": "demo-2", "url": url, "parent_entity": None}
    assert served.api.get(second).json()["entities"] == [entity]
    assert served.api.delete(first).json() == {}
    assert served.api.put(second, json={"status": "enabled"}).status_code == 200


def test_maintenance_policy_backups_and_ipv6(served: Served) -> None:
    instance = served.create("demo-1", maintenance_policy="linode/power_off_on", backups_enabled=True)
    one = f"/linode/instances/{instance['id']}"
    assert (instance["maintenance_policy"], instance["backups"]["enabled"]) == ("linode/power_off_on", True)
    assert (instance["ipv6"], instance["disk_encryption"]) == ("2001:db8:0::1/128", "enabled")
    assert served.api.get(f"{one}/ips").json()["ipv6"]["slaac"]["address"] == "2001:db8:0::1"
    assert served.refused("PUT", one, maintenance_policy="linode/none")["field"] == "maintenance_policy"
    slugs = [policy["slug"] for policy in served.api.get("/maintenance/policies").json()["data"]]
    assert slugs == ["linode/migrate", "linode/power_off_on"]
    changed = served.api.put(one, json={"maintenance_policy": slugs[0]}).json()
    assert changed["maintenance_policy"] == slugs[0]
    assert served.api.post(f"{one}/backups/cancel").json() == {}
    assert served.api.get(one).json()["backups"]["enabled"] is False


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"type": "g99-huge"}, "type"),
        ({"region": "xx-nowhere"}, "region"),
        ({"image": "linode/none"}, "image"),
        ({"label": "x"}, "label"),
        ({"label": "two--dashes"}, "label"),
        ({"authorized_keys": []}, "root_pass"),
        ({"metadata": {"user_data": "§"}}, "metadata.user_data"),
        ({"metadata": {"user_data": base64.b64encode(b"x" * 65536).decode()}}, "metadata.user_data"),
        ({"tags": ["ab"]}, "tags"),
        ({"swap_size": -1}, "swap_size"),
        ({"swap_size": 24500}, "swap_size"),
        ({"disk_encryption": "some"}, "disk_encryption"),
        ({"maintenance_policy": "linode/none"}, "maintenance_policy"),
        ({"interface_generation": "new"}, "interface_generation"),
        ({"interface_generation": "linode", "private_ip": True}, "private_ip"),
        ({"authorized_keys": [], "authorized_users": ["nobody"]}, "authorized_users"),
        ({"placement_group": {"id": 999}}, "placement_group.id"),
        ({"interfaces": [{"purpose": "vpc", "subnet_id": 999}]}, "interfaces"),
        ({"interfaces": [PUBLIC, PUBLIC]}, "interfaces"),
    ],
)
def test_bad_input_is_refused_with_its_field(served: Served, change: dict[str, Any], field: str) -> None:
    answer = served.api.post("/linode/instances", json={**CREATE, "label": "demo-1", **change})
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["field"] == field
    assert served.api.get("/linode/instances").json()["results"] == 0


def test_paging_and_filters(served: Served) -> None:
    for number in range(1, 28):
        served.create(f"demo-{number}", tags=["odd" if number % 2 else "even"])
    first = served.api.get("/linode/instances", params={"page_size": 25}).json()
    assert (len(first["data"]), first["pages"], first["results"]) == (25, 2, 27)
    assert served.api.get("/linode/instances", params={"page": 3, "page_size": 25}).status_code == 400
    assert served.api.get("/linode/instances", params={"page_size": 501}).status_code == 400
    wanted = {"+and": [{"tags": "odd"}, {"label": {"+contains": "demo-1"}}], "+order_by": "label", "+order": "desc"}
    found = served.api.get("/linode/instances", headers={"X-Filter": json.dumps(wanted)}).json()["data"]
    assert [one["label"] for one in found] == ["demo-19", "demo-17", "demo-15", "demo-13", "demo-11", "demo-1"]
    refused = served.api.get("/linode/instances", headers={"X-Filter": '{"status": "running"}'})
    assert refused.status_code == 400 and "status" in refused.text


def test_budgets_are_enforced_and_announced(limited: Served) -> None:
    answers = [limited.api.post("/linode/instances", json={**CREATE, "label": f"demo-{n}"}) for n in range(21)]
    assert [answer.status_code for answer in answers] == [200] * 20 + [429]
    assert answers[0].headers["X-RateLimit-Limit"] == "20"
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 16


def test_faults(served: Served) -> None:
    served.lab.post("/lab/faults", json={"kind": "status", "status": 503, "retry_after": 2, "path": "/regions"})
    assert served.api.get("/linode/types").status_code == 200
    answer = served.api.get("/regions")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert served.api.get("/regions").status_code == 200
    served.lab.post("/lab/faults", json={"kind": "lost_answer", "method": "POST", "path": "/linode/instances"})
    assert served.api.post("/linode/instances", json={**CREATE, "label": "demo-1"}).status_code == 502
    assert served.api.get("/linode/instances").json()["data"][0]["label"] == "demo-1"
    served.lab.post("/lab/faults", json={"kind": "boot_fail"})
    failed = served.create("demo-2")
    served.settle(failed["id"], "offline")
    only = {"X-Filter": json.dumps({"entity.id": failed["id"]})}
    event = served.api.get("/account/events", headers=only).json()["data"][0]
    assert event["status"] == "failed" and "refused to boot" in event["message"]
    assert served.lab.post("/lab/faults", json={"nonsense": 1}).status_code == 400
    refused = served.lab.post("/lab/faults", json={"kind": "hnag"})
    assert refused.status_code == 400 and "hang" in refused.text


def test_a_fault_may_let_some_requests_pass_first(served: Served) -> None:
    served.lab.post("/lab/faults", json={"kind": "status", "status": 429, "path": "/regions", "after": 2, "count": 2})
    answers = [served.api.get("/regions").status_code for _ in range(5)]
    assert answers == [200, 200, 429, 429, 200]
    requests = served.lab.get("/lab/requests").json()
    assert (requests["GET /regions"], requests["429"]) == (5, 2)


def test_the_wire_shows_what_came_but_for_the_token(served: Served) -> None:
    served.api.get("/linode/types", params={"page_size": 25}, headers={"X-Filter": '{"vcpus": 1}'})
    served.api.post("/linode/nothing", json={"secret": TOKEN})
    first, second = served.wire()
    assert (first["method"], first["path"], first["query"]) == ("GET", "/v4/linode/types", "page_size=25")
    assert first["headers"]["x-filter"] == '{"vcpus": 1}' and first["body"] == ""
    assert TOKEN not in json.dumps(first) and TOKEN in second["body"]
    assert httpx.get(f"{served.url}/lab/wire").status_code == 401
    served.lab.delete("/lab/wire")
    assert served.wire() == []


def test_a_server_started_again_knows_its_machines(tmp_path: Path) -> None:
    driver = PretendDriver()
    first, lab = serve(tmp_path / "api.json", driver)
    instance = lab.create("demo-1")
    lab.settle(instance["id"])
    first.should_exit = True
    driver.shutdown(instance["id"])
    second, again = serve(tmp_path / "api.json", driver)
    assert again.api.get(f"/linode/instances/{instance['id']}").json()["status"] == "offline"
    second.should_exit = True


def test_secrets_are_neither_answered_nor_kept(served: Served, tmp_path: Path) -> None:
    user_data = base64.b64encode(b"#cloud-config\nssh_keys: {ed25519_private: PRIVATE}\n").decode()
    instance = served.create("demo-1", root_pass="correct horse battery", metadata={"user_data": user_data})
    assert instance["has_user_data"] is True
    served.settle(instance["id"])
    seen = served.api.get("/linode/instances").text + (tmp_path / "api.json").read_text()
    assert "correct horse" not in seen and user_data not in seen and "PRIVATE" not in seen


def test_a_wrong_token_is_401(served: Served) -> None:
    assert served.api.get("/profile", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_linode_api4_creates_waits_lists_and_deletes(served: Served) -> None:
    client = served.linode()
    instance = client.linode.instance_create(
        "g6-nanode-1",
        "us-mia",
        image="linode/debian12",
        authorized_keys=["ssh-ed25519 AAAA"],
        label="demo-1",
        tags=["demo"],
    )
    poller = client.polling.event_poller_create("linode", "linode_reboot", entity_id=instance.id)
    served.settle(instance.id)
    instance.reboot()
    poller.wait_for_next_event_finished(timeout=10, interval=1)
    assert [found.label for found in client.linode.instances(Instance.tags == "demo")] == ["demo-1"]
    assert client.linode.instances(Instance.tags == "other").lists[0] == []
    instance.delete()
    with pytest.raises(ApiError):
        client.linode.instance_create(
            "g99-huge", "us-mia", image="linode/debian12", authorized_keys=["ssh-ed25519 AAAA"]
        )


def test_linode_api4_resizes_rebuilds_locks_and_groups(served: Served) -> None:
    client = served.linode()
    network = client.vpcs.create("net", "us-mia", subnets=[{"label": "workers", "ipv4": "10.0.0.0/24"}])
    apart = client.placement.group_create("apart", "us-mia", "anti_affinity:local", "flexible")
    instance = client.linode.instance_create(
        "g6-nanode-1",
        "us-mia",
        image="linode/debian12",
        authorized_keys=["ssh-ed25519 AAAA"],
        interfaces=[PUBLIC, {"purpose": "vpc", "subnet_id": network.subnets[0].id}],
    )
    served.settle(instance.id)
    apart.assign([instance])
    assert [member.linode_id for member in apart.members] == [instance.id]
    assert [one.address for one in client.vpcs.ips()] == ["10.0.0.2"]
    instance.resize("g6-standard-1")
    served.settle(instance.id)
    instance.rebuild("linode/debian13", authorized_keys=["ssh-ed25519 AAAA"])
    served.settle(instance.id)
    instance.invalidate()
    assert (instance.type.id, instance.image.id) == ("g6-standard-1", "linode/debian13")
    assert [disk.filesystem for disk in instance.disks] == ["ext4", "swap"]
    instance.enable_backups()
    assert instance.backups.enabled
    lock = client.locks.create("linode", instance.id, "cannot_delete")
    with pytest.raises(ApiError, match="locked"):
        instance.delete()
    lock.delete()
    instance.delete()


def test_linode_cli_creates_and_reads_back(served: Served, tmp_path: Path) -> None:
    address = served.url.removeprefix("http://")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LINODE_CLI_API_HOST": address,
        "LINODE_CLI_API_SCHEME": "http",
        "LINODE_CLI_TOKEN": TOKEN,
    }

    def cli(*words: str) -> Any:
        command = [str(Path(sys.executable).parent / "linode-cli"), *words, "--json", "--suppress-warnings"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr + ran.stdout
        return json.loads(ran.stdout)

    create = [
        "--no-defaults",
        "--label",
        "cli-1",
        "--type",
        "g6-nanode-1",
        "--region",
        "us-mia",
        "--image",
        "linode/debian12",
    ]
    made = cli("linodes", "create", *create, "--authorized_keys", "ssh-ed25519 AAAA", "--tags", "demo")
    assert [one["label"] for one in cli("linodes", "list", "--tags", "demo")] == ["cli-1"]
    assert cli("linodes", "view", str(made[0]["id"]))[0]["region"] == "us-mia"
    lock = ["--entity_type", "linode", "--entity_id", str(made[0]["id"]), "--lock_type", "cannot_delete"]
    assert cli("resource-locks", "create", *lock)[0]["lock_type"] == "cannot_delete"
    subnets = json.dumps([{"label": "workers", "ipv4": "10.0.0.0/24"}])
    assert cli("vpcs", "create", "--label", "net", "--region", "us-mia", "--subnets", subnets)[0]["region"] == "us-mia"
