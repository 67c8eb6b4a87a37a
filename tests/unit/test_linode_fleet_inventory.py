"""The inventory plugin, read by Ansible's own inventory manager, from an API in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.inventory.data import InventoryData
from ansible.parsing.dataloader import DataLoader
from plimsoll import linode

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "inventory.example" / "linode_fleet.yml"
TAG = "plimsoll-fleet-workers"


def raw(index: int, **more: Any) -> dict[str, Any]:
    return {
        "id": 100 + index,
        "label": f"workers-{index}",
        "status": "running",
        "type": "g6-nanode-1",
        "region": "us-ord",
        "image": "linode/debian12",
        "tags": [TAG, "prod"],
        "ipv4": [f"192.168.128.{index}", f"203.0.113.{index}"],
        "ipv6": f"2001:db8::{index}/128",
        **more,
    }


@pytest.fixture(scope="module")
def plugin_module() -> Any:
    from ansible.plugins.loader import init_plugin_loader, inventory_loader

    init_plugin_loader()
    inventory_loader.add_directory(str(ROOT / "inventory_plugins"))
    return inventory_loader


@pytest.fixture
def listing(monkeypatch: Any) -> dict[str, Any]:
    """What the API answers, and what it was asked."""
    state: dict[str, Any] = {"instances": [], "vpc": [], "asked": []}

    def listed(self: Any, path: str, filters: Any = None) -> Any:
        state["asked"].append((self.base, path, filters))
        return state["vpc" if path == "/vpcs/ips" else "instances"]

    monkeypatch.setattr(linode.Api, "list", listed)
    monkeypatch.setenv("LINODE_API_TOKEN", "t0ken")
    monkeypatch.setenv("LINODE_API_URL", "http://127.0.0.1:9")
    return state


def parse(loader: Any, path: Path, cache: bool = False) -> InventoryData:
    inventory = InventoryData()
    loader.get("linode_fleet").parse(inventory, DataLoader(), str(path), cache=cache)
    inventory.reconcile_inventory()
    return inventory


def config(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "linode_fleet.yml"
    path.write_text(yaml.safe_dump({"plugin": "linode_fleet", "fleet": "workers", **more}))
    return path


def members(inventory: InventoryData, group: str) -> list[str]:
    return [host.name for host in inventory.groups[group].get_hosts()]


def test_the_example_puts_the_broker_on_the_first_host(plugin_module: Any, listing: Any) -> None:
    listing["instances"] = [raw(2), raw(10), raw(1)]
    inventory = parse(plugin_module, EXAMPLE)
    assert members(inventory, "linode_fleet") == ["workers-1", "workers-2", "workers-10"]
    assert members(inventory, "celery_workers") == ["workers-1", "workers-2", "workers-10"]
    assert members(inventory, "redis_broker") == ["workers-1"]
    assert listing["asked"] == [("http://127.0.0.1:9/v4", "/linode/instances", {"tags": TAG})]


def test_a_host_carries_its_address_its_pinned_key_and_its_facts(plugin_module: Any, listing: Any) -> None:
    listing["instances"] = [raw(1)]
    found = parse(plugin_module, EXAMPLE).hosts["workers-1"].vars
    assert found["ansible_host"] == "203.0.113.1"
    assert found["ansible_user"] == "root"
    assert found["ansible_ssh_common_args"] == (
        f"-o HostKeyAlias=workers-1 -o UserKnownHostsFile={ROOT}/.plimsoll/known_hosts -o StrictHostKeyChecking=yes"
    )
    assert {key: value for key, value in found.items() if key.startswith("linode_")} == {
        "linode_id": 101,
        "linode_label": "workers-1",
        "linode_group": "",
        "linode_index": 1,
        "linode_type": "g6-nanode-1",
        "linode_region": "us-ord",
        "linode_image": "linode/debian12",
        "linode_status": "running",
        "linode_tags": [TAG, "prod"],
        "linode_ipv4": ["192.168.128.1", "203.0.113.1"],
        "linode_private_ipv4": "192.168.128.1",
        "linode_ipv6": "2001:db8::1",
        "linode_vpc_ipv4": None,
        "linode_placement_group": "",
    }


def test_a_fleet_that_does_not_exist_yet_is_its_empty_groups(plugin_module: Any, listing: Any) -> None:
    inventory = parse(plugin_module, EXAMPLE)
    assert inventory.hosts == {}
    ours = {"linode_fleet", "linode_fleet_rolling", "linode_fleet_leaving"}
    assert ours | {"redis_broker", "celery_workers"} <= set(inventory.groups)


def test_what_is_not_of_the_fleet_or_leaves_it_is_no_host(plugin_module: Any, listing: Any) -> None:
    listing["instances"] = [raw(1, label="web-1"), raw(2, tags=["prod"]), raw(3, status="deleting"), raw(4)]
    assert list(parse(plugin_module, EXAMPLE).hosts) == ["workers-4"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [("private", "192.168.128.1"), ("ipv6", "2001:db8::1"), ("vpc", "10.0.0.7"), ("public", "203.0.113.1")],
)
def test_a_host_is_reached_by_the_address_that_is_asked_for(
    plugin_module: Any, listing: Any, tmp_path: Path, address: str, expected: str
) -> None:
    listing["instances"] = [raw(1)]
    listing["vpc"] = [
        {"linode_id": 101, "subnet_id": 9, "address": "10.9.0.7"},
        {"linode_id": 101, "subnet_id": 4, "address": "10.0.0.7"},
        {"linode_id": None, "subnet_id": 1, "address": "10.0.0.1"},
    ]
    found = parse(plugin_module, config(tmp_path, address=address)).hosts["workers-1"].vars
    assert found["ansible_host"] == expected
    assert len(listing["asked"]) == (2 if address == "vpc" else 1)


def test_a_host_without_such_an_address_is_said(plugin_module: Any, listing: Any, tmp_path: Path, capsys: Any) -> None:
    listing["instances"] = [raw(1, ipv4=["203.0.113.1"])]
    found = parse(plugin_module, config(tmp_path, address="private")).hosts["workers-1"].vars
    assert "ansible_host" not in found
    assert "workers-1 has no private address" in " ".join(capsys.readouterr().err.split())


def test_groups_of_the_fleet_are_told_apart(plugin_module: Any, listing: Any, tmp_path: Path) -> None:
    listing["instances"] = [raw(1, label="workers-worker-1"), raw(2, label="workers-broker-main"), raw(3)]
    path = config(tmp_path, keyed_groups=[{"key": "linode_group or 'none'", "prefix": "fleet"}])
    inventory = parse(plugin_module, path)
    assert members(inventory, "fleet_worker") == ["workers-worker-1"]
    assert members(inventory, "fleet_broker") == ["workers-broker-main"]
    assert inventory.hosts["workers-broker-main"].vars["linode_index"] is None


def test_statuses_may_be_chosen(plugin_module: Any, listing: Any, tmp_path: Path) -> None:
    listing["instances"] = [raw(1), raw(2, status="offline"), raw(3, status="booting")]
    path = config(tmp_path, statuses=["running", "booting"])
    assert list(parse(plugin_module, path).hosts) == ["workers-1", "workers-3"]


def test_groups_see_what_compose_set(plugin_module: Any, listing: Any, tmp_path: Path) -> None:
    listing["instances"] = [raw(1), raw(2)]
    path = config(
        tmp_path,
        compose={"ansible_host": "linode_private_ipv4", "slot": "linode_index % 2"},
        groups={"even": "slot == 0"},
        keyed_groups=[{"key": "linode_region", "prefix": "region"}],
    )
    inventory = parse(plugin_module, path)
    assert inventory.hosts["workers-1"].vars["ansible_host"] == "192.168.128.1"
    assert members(inventory, "even") == ["workers-2"]
    assert members(inventory, "region_us_ord") == ["workers-1", "workers-2"]


def test_an_api_that_refuses_is_one_line(plugin_module: Any, listing: Any, monkeypatch: Any) -> None:
    def refuse(self: Any, path: str, filters: Any = None) -> Any:
        raise linode.Refused("the Linode API does not accept the token", 401, [])

    monkeypatch.setattr(linode.Api, "list", refuse)
    with pytest.raises(SystemExit, match=r": fleet workers: the Linode API does not accept the token$"):
        parse(plugin_module, EXAMPLE)


def test_the_cache_spares_the_request_until_it_is_refreshed(plugin_module: Any, listing: Any, tmp_path: Path) -> None:
    settings = {"cache": True, "cache_plugin": "jsonfile", "cache_connection": str(tmp_path / "cache")}
    path = config(tmp_path, **settings)
    listing["instances"] = [raw(1)]
    for cache, asked in ((True, 1), (True, 1), (False, 2)):
        inventory = InventoryData()
        plugin = plugin_module.get("linode_fleet")
        plugin.parse(inventory, DataLoader(), str(path), cache=cache)
        plugin.update_cache_if_changed()
        assert list(inventory.hosts) == ["workers-1"]
        assert len(listing["asked"]) == asked


@pytest.mark.parametrize(
    ("name", "ours"),
    [("linode_fleet.yml", True), ("eu.linode_fleet.yaml", True), ("my_linode_fleet.yml", False), ("hosts.yml", False)],
)
def test_files_are_recognised_by_name(plugin_module: Any, tmp_path: Path, name: str, ours: bool) -> None:
    (tmp_path / name).touch()
    assert plugin_module.get("linode_fleet").verify_file(str(tmp_path / name)) is ours
