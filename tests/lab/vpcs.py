"""VPCs, their subnets, and the addresses that instances have there. The machines know nothing of them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from . import catalogue
from .store import ApiError, Json, Store, check_length, found, now

LABEL = re.compile(r"(?!.*--)[A-Za-z0-9-]{1,64}")
PRIVATE = [ipaddress.IPv4Network(network) for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
RESERVED = ipaddress.IPv4Network("192.168.128.0/17")  # private addresses of a region
PREFIXES = range(1, 30)
INTERFACES_MOST = 3


class Vpcs:
    def __init__(self, store: Store) -> None:
        self.store = store

    # Interfaces of instances

    def interfaces(self) -> Iterator[tuple[Json, Json]]:
        """Every instance with each of its interfaces that is in a subnet."""
        for instance in self.store["instances"].values():
            for interface in self.store.parts(instance["id"])["interfaces"]:
                if interface["purpose"] == "vpc":
                    yield instance, interface

    def planned(self, wanted: Any, generation: str, region: str) -> list[Json]:
        """The interfaces of a new instance, those in a subnet with an address of it. Raises ApiError."""
        if not isinstance(wanted, list) or not all(isinstance(one, dict) for one in wanted):
            raise ApiError(400, "Must be a list of interfaces", "interfaces")
        if len(wanted) > INTERFACES_MOST:
            raise ApiError(400, f"Must be at most {INTERFACES_MOST} interfaces", "interfaces")
        read = self.legacy if generation == "legacy_config" else self.modern
        out = [read(one) for one in wanted]
        for purpose in ("public", "vpc"):
            if sum(one["purpose"] == purpose for one in out) > 1:
                raise ApiError(400, f"Must be at most one {purpose} interface", "interfaces")
        for one in out:
            if one["purpose"] == "vpc":
                vpc, subnet = self.subnet_for(one["subnet_id"], region)
                one |= {"vpc_id": vpc["id"], "address": self.address(subnet, one["address"])}
        return [{"id": self.store.new_id(), **one} for one in out]

    @staticmethod
    def legacy(given: Json) -> Json:
        """An interface of a configuration profile, in the form that the lab keeps."""
        if given.get("purpose") not in ("public", "vlan", "vpc"):
            raise ApiError(400, "purpose must be one of public, vlan, vpc", "interfaces")
        vpc = given["purpose"] == "vpc"
        return {
            "purpose": given["purpose"],
            "primary": bool(given.get("primary")),
            "label": given.get("label"),
            "ipam_address": given.get("ipam_address"),
            "subnet_id": given.get("subnet_id") if vpc else None,
            "vpc_id": None,
            "address": (given.get("ipv4") or {}).get("vpc") if vpc else None,
        }

    def modern(self, given: Json) -> Json:
        """A Linode interface, in the same form."""
        purposes = [purpose for purpose in ("public", "vlan", "vpc") if given.get(purpose) is not None]
        if len(purposes) != 1 or "purpose" in given:
            raise ApiError(400, "A Linode interface must have one of public, vlan, vpc", "interfaces")
        if given.get("firewall_id"):
            raise ApiError(400, "The lab attaches firewalls to Linodes of generation legacy_config alone", "interfaces")
        vpc = given.get("vpc") or {}
        addresses = (vpc.get("ipv4") or {}).get("addresses") or [{}]
        asked = addresses[0].get("address")
        address = None if asked == "auto" else asked
        return self.legacy({"purpose": purposes[0], "subnet_id": vpc.get("subnet_id"), "ipv4": {"vpc": address}})

    def subnet_for(self, number: Any, region: str) -> tuple[Json, Json]:
        for vpc in self.store["vpcs"].values():
            for subnet in vpc["subnets"]:
                if subnet["id"] == number:
                    if vpc["region"] != region:
                        reason = f"Subnet {number} is in region {vpc['region']}, the Linode in {region}"
                        raise ApiError(400, reason, "interfaces")
                    return vpc, subnet
        raise ApiError(400, "subnet_id is not valid", "interfaces")

    def address(self, subnet: Json, wanted: str | None) -> str:
        """The wanted address, or the next free one: never one of the first two or last two of the range."""
        network = ipaddress.IPv4Network(subnet["ipv4"])
        used = {one["address"] for _, one in self.interfaces() if one["subnet_id"] == subnet["id"]}
        usable = range(2, network.num_addresses - 2)
        if wanted is None:
            address = next((str(network[place]) for place in usable if str(network[place]) not in used), None)
        else:
            place = self.place(network, wanted)
            address = wanted if place in usable and wanted not in used else None
        if address is None:
            what = "an address, as none is free" if wanted is None else wanted
            raise ApiError(400, f"Subnet {subnet['label']} cannot give {what}", "interfaces")
        return address

    @staticmethod
    def place(network: ipaddress.IPv4Network, address: str) -> int:
        """Where in a network an address is; below 0 where it is none."""
        try:
            return int(ipaddress.IPv4Address(address)) - int(network[0])
        except ValueError:
            return -1

    def addresses(self, linode: int | None = None, vpc: int | None = None) -> list[Json]:
        """Addresses in VPCs, of all instances or one, of all VPCs or one."""
        out = []
        for instance, interface in self.interfaces():
            if linode in (None, instance["id"]) and vpc in (None, interface["vpc_id"]):
                _, subnet = self.subnet_for(interface["subnet_id"], instance["region"])
                network = ipaddress.IPv4Network(subnet["ipv4"])
                out.append(
                    {
                        "address": interface["address"],
                        "address_range": None,
                        "vpc_id": interface["vpc_id"],
                        "subnet_id": subnet["id"],
                        "region": instance["region"],
                        "linode_id": instance["id"],
                        "config_id": self.config_of(instance),
                        "interface_id": interface["id"],
                        "active": instance["status"] == "running",
                        "nat_1_1": None,
                        "gateway": str(network[1]),
                        "prefix": network.prefixlen,
                        "subnet_mask": str(network.netmask),
                    }
                )
        return out

    def addresses_of(self, number: str) -> list[Json]:
        return self.addresses(vpc=self.store.one("vpcs", number)["id"])

    def config_of(self, instance: Json) -> int | None:
        """The profile that an instance's interfaces belong to: Linode interfaces belong to none."""
        legacy = instance["interface_generation"] == "legacy_config"
        return self.store.parts(instance["id"])["config"] if legacy else None

    # VPCs

    def public(self, vpc: Json) -> Json:
        return vpc | {"subnets": [self.public_subnet(subnet) for subnet in vpc["subnets"]]}

    def public_subnet(self, subnet: Json) -> Json:
        linodes: dict[int, list[Json]] = {}
        for instance, interface in self.interfaces():
            if interface["subnet_id"] == subnet["id"]:
                active = instance["status"] == "running"
                shown = {"id": interface["id"], "active": active, "config_id": self.config_of(instance)}
                linodes.setdefault(instance["id"], []).append(shown)
        return subnet | {"linodes": [{"id": linode, "interfaces": shown} for linode, shown in linodes.items()]}

    def listed(self) -> list[Json]:
        return [self.public(vpc) for vpc in self.store["vpcs"].values()]

    def one(self, number: str) -> Json:
        return self.public(self.store.one("vpcs", number))

    def check_label(self, label: Any, field: str = "label") -> None:
        check_length(label, 1, 64, field)
        if not LABEL.fullmatch(label):
            raise ApiError(400, "Label must hold letters, digits and single hyphens alone", field)

    def create(self, body: Json) -> Json:
        self.check_label(body.get("label"))
        self.store.check_unique("vpcs", body["label"], "VPCs")
        if body.get("region") not in catalogue.REGIONS:
            raise ApiError(400, "region is not valid", "region")
        check_length(body.get("description") or "", 0, 255, "description")
        subnets: list[Json] = []
        for index, given in enumerate(body.get("subnets") or []):
            subnets.append(self.new_subnet(given, subnets, f"subnets[{index}]."))
        vpc = {
            "id": self.store.new_id(),
            "label": body["label"],
            "description": body.get("description") or "",
            "region": body["region"],
            "subnets": subnets,
            "created": now(),
            "updated": now(),
        }
        self.store["vpcs"][str(vpc["id"])] = vpc
        self.store.notify("vpc_create", vpc, "vpc")
        self.store.save()
        return self.public(vpc)

    def update(self, body: Json, number: str) -> Json:
        vpc = self.store.one("vpcs", number)
        if body.get("label", vpc["label"]) != vpc["label"]:
            self.check_label(body["label"])
            self.store.check_unique("vpcs", body["label"], "VPCs")
        check_length(body.get("description") or "", 0, 255, "description")
        vpc.update({key: body[key] for key in ("label", "description") if key in body}, updated=now())
        self.store.notify("vpc_update", vpc, "vpc")
        self.store.save()
        return self.public(vpc)

    def delete(self, body: Json, number: str) -> Json:
        vpc = self.store.one("vpcs", number)
        if any(subnet["linodes"] for subnet in self.public(vpc)["subnets"]):
            raise ApiError(400, "VPC must have no Linodes in its subnets before it is deleted")
        del self.store["vpcs"][number]
        self.store.notify("vpc_delete", vpc, "vpc")
        self.store.save()
        return {}

    # Subnets

    def subnets(self, number: str) -> list[Json]:
        subnets: list[Json] = self.one(number)["subnets"]
        return subnets

    def new_subnet(self, given: Json, others: list[Json], where: str = "") -> Json:
        """A subnet beside the others of its VPC. Raises ApiError."""
        if not isinstance(given, dict):
            raise ApiError(400, "Must be an object with label and ipv4", where.rstrip(".") or None)
        self.check_subnet_label(given.get("label"), others, f"{where}label")
        try:
            network = ipaddress.IPv4Network(given.get("ipv4") or "")
        except ValueError:
            raise ApiError(400, "Must be an IPv4 range in CIDR form", f"{where}ipv4") from None
        if not any(network.subnet_of(private) for private in PRIVATE) or network.prefixlen not in PREFIXES:
            reason = f"Must be a private range (RFC 1918) with a prefix of {PREFIXES[0]} to {PREFIXES[-1]}"
            raise ApiError(400, reason, f"{where}ipv4")
        for taken in (RESERVED, *(ipaddress.IPv4Network(one["ipv4"]) for one in others)):
            if network.overlaps(taken):
                raise ApiError(400, f"Must not overlap with {taken}", f"{where}ipv4")
        return {
            "id": self.store.new_id(),
            "label": given["label"],
            "ipv4": str(network),
            "created": now(),
            "updated": now(),
        }

    def check_subnet_label(self, label: Any, others: list[Json], field: str) -> None:
        self.check_label(label, field)
        if any(one["label"] == label for one in others):
            raise ApiError(400, "Label must be unique among the subnets of the VPC", field)

    def subnet(self, number: str, subnet: str) -> Json:
        return found({str(one["id"]): one for one in self.store.one("vpcs", number)["subnets"]}, subnet)

    def one_subnet(self, number: str, subnet: str) -> Json:
        return self.public_subnet(self.subnet(number, subnet))

    def create_subnet(self, body: Json, number: str) -> Json:
        vpc = self.store.one("vpcs", number)
        subnet = self.new_subnet(body, vpc["subnets"])
        vpc["subnets"].append(subnet)
        self.store.save()
        return self.public_subnet(subnet)

    def update_subnet(self, body: Json, number: str, subnet: str) -> Json:
        kept, others = self.subnet(number, subnet), self.store.one("vpcs", number)["subnets"]
        if body.get("label", kept["label"]) != kept["label"]:
            self.check_subnet_label(body["label"], others, "label")
            kept.update(label=body["label"], updated=now())
        self.store.save()
        return self.public_subnet(kept)

    def delete_subnet(self, body: Json, number: str, subnet: str) -> Json:
        if self.one_subnet(number, subnet)["linodes"]:
            raise ApiError(400, "Subnet must have no Linodes before it is deleted")
        self.store.one("vpcs", number)["subnets"].remove(self.subnet(number, subnet))
        self.store.save()
        return {}
