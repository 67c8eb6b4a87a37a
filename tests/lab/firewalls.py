"""Cloud Firewalls: kept and listed, with their rules checked as Linode checks them, and not enforced."""

from __future__ import annotations

import binascii
import ipaddress
import json
import re
from typing import Any

from .store import ApiError, Json, Store, check_length, chosen, now, reference

PROTOCOLS = ("TCP", "UDP", "ICMP", "IPENCAP")
ACTIONS = ("ACCEPT", "DROP")
RULES_MOST, PORT_PIECES_MOST, ADDRESSES_MOST = 25, 15, 255
PORTS = re.compile(r"[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?(, ?[1-9][0-9]{0,4}(-[1-9][0-9]{0,4})?)*")


def check_rules(rules: Any) -> Json:
    """The rules, without what only the API sets. Raises ApiError naming the field."""
    if not isinstance(rules, dict):
        raise ApiError(400, "rules is required", "rules")
    for policy in ("inbound_policy", "outbound_policy"):
        _among(ACTIONS, rules.get(policy), f"rules.{policy}")
    kept: Json = {direction: rules.get(direction) or [] for direction in ("inbound", "outbound")}
    for direction, listed in kept.items():
        if not isinstance(listed, list) or not all(isinstance(rule, dict) for rule in listed):
            raise ApiError(400, "Must be a list of rules", f"rules.{direction}")
    if len(kept["inbound"]) + len(kept["outbound"]) > RULES_MOST:
        raise ApiError(400, f"Must be at most {RULES_MOST} rules, inbound and outbound together", "rules")
    for direction, listed in kept.items():
        for index, rule in enumerate(listed):
            _check_rule(rule, f"rules.{direction}[{index}]")
    return kept | {key: rules[key] for key in ("inbound_policy", "outbound_policy")}


def _among(allowed: tuple[str, ...], value: Any, field: str) -> None:
    if value not in allowed:
        raise ApiError(400, f"Must be one of {', '.join(allowed)}", field)


def _check_rule(rule: Json, field: str) -> None:
    _among(ACTIONS, rule.get("action"), f"{field}.action")
    _among(PROTOCOLS, rule.get("protocol"), f"{field}.protocol")
    for key, least, most in (("label", 3, 32), ("description", 1, 100)):
        if rule.get(key) is not None:
            check_length(rule[key], least, most, f"{field}.{key}")
    if rule.get("ports") is not None:
        if rule["protocol"] not in ("TCP", "UDP"):
            raise ApiError(400, f"Ports are not allowed for the {rule['protocol']} protocol", f"{field}.ports")
        _check_ports(rule["ports"], f"{field}.ports")
    addresses = rule.get("addresses")
    _check_addresses(addresses if isinstance(addresses, dict) else {}, f"{field}.addresses")


def _check_ports(ports: Any, field: str) -> None:
    if not isinstance(ports, str) or not PORTS.fullmatch(ports):
        raise ApiError(400, "Must be ports and ranges of ports, such as 22-24, 80, without leading zeroes", field)
    pieces = [[int(port) for port in part.split("-")] for part in ports.split(",")]
    if any(max(piece) > 65535 for piece in pieces):
        raise ApiError(400, "Ports must be within 1 and 65535", field)
    if any(piece[0] >= piece[-1] for piece in pieces if len(piece) > 1):
        raise ApiError(400, "The end of a range of ports must be greater than its start", field)
    if sum(map(len, pieces)) > PORT_PIECES_MOST:
        raise ApiError(400, f"Must be at most {PORT_PIECES_MOST} pieces; a range counts as two", field)


def _check_addresses(addresses: Json, field: str) -> None:
    given = {key: listed for key, listed in addresses.items() if listed is not None}
    if not given or not set(given) <= {"ipv4", "ipv6"}:
        raise ApiError(400, "Must contain ipv4, ipv6, or both, and nothing else", field)
    for key, listed in given.items():
        if not isinstance(listed, list) or not listed:
            raise ApiError(400, "Must not be an empty list", f"{field}.{key}")
        for address in listed:
            _check_network(address, f"IPv{key[-1]}", f"{field}.{key}")
    if sum(map(len, given.values())) > ADDRESSES_MOST:
        raise ApiError(400, f"Must be at most {ADDRESSES_MOST} addresses", field)


def _check_network(address: Any, version: str, field: str) -> None:
    try:
        if not re.fullmatch(r"[0-9A-Fa-f.:]+/[0-9]+", str(address)):
            raise ValueError
        (ipaddress.IPv4Network if version == "IPv4" else ipaddress.IPv6Network)(address)
    except ValueError:
        reason = f"Must contain only valid {version} networks in address/mask form, without host bits: {address}"
        raise ApiError(400, reason, field) from None


def versioned(rules: Json, before: int) -> Json:
    fingerprint = f"{binascii.crc32(json.dumps(rules, sort_keys=True).encode()):08x}"
    return rules | {"version": before + 1, "fingerprint": fingerprint}


class Firewalls:
    def __init__(self, store: Store) -> None:
        self.store = store

    def public(self, firewall: Json) -> Json:
        kept = {key: value for key, value in firewall.items() if key != "devices"}
        return kept | {"entities": [device["entity"] for device in firewall["devices"]]}

    def listed(self) -> list[Json]:
        return [self.public(firewall) for firewall in self.store["firewalls"].values()]

    def one(self, number: str) -> Json:
        return self.public(self.store.one("firewalls", number))

    def create(self, body: Json) -> Json:
        self.store.check_label("firewalls", body.get("label"), 32, "firewalls")
        firewall = {
            "id": self.store.new_id(),
            "label": body["label"],
            "status": "enabled",
            "tags": self.store.check_tags(body.get("tags") or []),
            "created": now(),
            "updated": now(),
            "rules": versioned(check_rules(body.get("rules")), 0),
            "devices": [],
        }
        numbers = dict.fromkeys((body.get("devices") or {}).get("linodes") or [])
        linodes = [self.store.linode(number, "devices.linodes") for number in numbers]
        for linode in linodes:
            self.check_attachable(firewall, linode, "devices.linodes")
        self.store["firewalls"][str(firewall["id"])] = firewall
        self.store.note_tags(firewall["tags"])
        self.store.notify("firewall_create", firewall, "firewall")
        for linode in linodes:
            self.attach(firewall, linode)
        self.store.save()
        return self.public(firewall)

    def update(self, body: Json, number: str) -> Json:
        firewall = self.store.one("firewalls", number)
        changes = chosen(body, {"status": ("enabled", "disabled")})
        if body.get("label", firewall["label"]) != firewall["label"]:
            self.store.check_label("firewalls", body["label"], 32, "firewalls")
            changes["label"] = body["label"]
        if "tags" in body:
            changes["tags"] = self.store.check_tags(body["tags"])
            self.store.note_tags(changes["tags"])
        action = "update"
        if changes.get("status", firewall["status"]) != firewall["status"]:
            action = changes["status"].removesuffix("d")
            for device in firewall["devices"] if action == "enable" else []:
                self.check_alone(firewall, device["entity"]["id"], "status")
        firewall.update(changes, updated=now())
        self.store.notify(f"firewall_{action}", firewall, "firewall")
        self.store.save()
        return self.public(firewall)

    def delete(self, body: Json, number: str) -> Json:
        firewall = self.store.one("firewalls", number)
        del self.store["firewalls"][number]
        self.store.notify("firewall_delete", firewall, "firewall")
        self.store.save()
        return {}

    def rules(self, number: str) -> Json:
        rules: Json = self.store.one("firewalls", number)["rules"]
        return rules

    def put_rules(self, body: Json, number: str) -> Json:
        firewall = self.store.one("firewalls", number)
        rules, before = check_rules(body), firewall["rules"]
        # The version counts changes, not requests.
        if rules != {key: before[key] for key in rules}:
            firewall["rules"] = versioned(rules, before["version"])
            self.store.notify("firewall_rules_update", firewall, "firewall")
            self.store.save()
        return self.rules(number)

    # Devices

    def check_alone(self, firewall: Json, linode: int, field: str) -> None:
        """Raises ApiError where another enabled firewall holds the instance."""
        for other in self.store["firewalls"].values():
            holds = any(device["entity"]["id"] == linode for device in other["devices"])
            if holds and other is not firewall and other["status"] == "enabled":
                reason = f"Linode {linode} has an enabled firewall already, {other['label']}: only one is allowed"
                raise ApiError(400, reason, field)

    def check_attachable(self, firewall: Json, linode: Json, field: str) -> None:
        if linode["interface_generation"] == "linode":
            raise ApiError(400, "A Linode with Linode interfaces takes firewalls on these", field)
        if any(device["entity"]["id"] == linode["id"] for device in firewall["devices"]):
            raise ApiError(400, "That device is attached already", field)
        if firewall["status"] == "enabled":
            self.check_alone(firewall, linode["id"], field)

    def attach(self, firewall: Json, linode: Json) -> Json:
        entity = reference(linode, "linode") | {"parent_entity": None}
        device = {"id": self.store.new_id(), "entity": entity, "created": now(), "updated": now()}
        firewall["devices"].append(device)
        self.store.notify("firewall_device_add", firewall, "firewall")
        return device

    def detach_all(self, linode: Json) -> None:
        """What becomes of an instance's devices when it is deleted."""
        for firewall in self.store["firewalls"].values():
            firewall["devices"] = [one for one in firewall["devices"] if one["entity"]["id"] != linode["id"]]

    def rename(self, linode: Json) -> None:
        """What becomes of them when its label changes."""
        for firewall in self.store["firewalls"].values():
            for device in firewall["devices"]:
                if device["entity"]["id"] == linode["id"]:
                    device["entity"]["label"] = linode["label"]

    def devices(self, number: str) -> list[Json]:
        return list(self.store.one("firewalls", number)["devices"])

    def device(self, number: str, device: str) -> Json:
        for one in self.devices(number):
            if str(one["id"]) == device:
                return one
        raise ApiError(404, "Not found")

    def add_device(self, body: Json, number: str) -> Json:
        firewall = self.store.one("firewalls", number)
        if body.get("type") != "linode":
            raise ApiError(400, "The lab attaches firewalls to devices of type linode alone", "type")
        linode = self.store.linode(body.get("id"), "id")
        self.check_attachable(firewall, linode, "id")
        device = self.attach(firewall, linode)
        self.store.save()
        return device

    def remove_device(self, body: Json, number: str, device: str) -> Json:
        firewall = self.store.one("firewalls", number)
        firewall["devices"].remove(self.device(number, device))
        self.store.notify("firewall_device_remove", firewall, "firewall")
        self.store.save()
        return {}
