"""Linodes: creation, changes, power, resize, rebuild, backups, and what is in them. The driver makes them real."""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from dataclasses import dataclass
from typing import Any

from . import catalogue
from .driver import Driver, DriverError, VMSpec
from .faults import Fault, Faults
from .firewalls import Firewalls
from .locks import Locks
from .placement import PlacementGroups
from .store import ApiError, Choices, Json, Store, check_length, chosen, now
from .vpcs import Vpcs

ENCRYPTION: Choices = {"disk_encryption": ("enabled", "disabled")}
POLICY: Choices = {"maintenance_policy": tuple(catalogue.MAINTENANCE_POLICIES)}
GENERATION: Choices = {"interface_generation": ("legacy_config", "linode")}
MIGRATION: Choices = {"migration_type": ("cold", "warm")}
SPECS = ("disk", "memory", "vcpus", "gpus", "transfer", "accelerated_devices")
SWAP_MB = 512
OFF = ("offline", "stopped")
SETTLED = ("running", *OFF)


@dataclass(frozen=True)
class Deployment:
    """What a creation and a rebuild lay down alike."""

    image: str | None
    keys: tuple[str, ...]
    user_data: str
    boot: bool


def plan(kind: Any) -> Json:
    """What a type gives. Raises ApiError."""
    if kind not in catalogue.TYPES:
        raise ApiError(400, "A valid plan type by that ID was not found", "type")
    return catalogue.TYPES[kind]


def check_settled(instance: Json) -> None:
    """Raises ApiError while a job is at the instance."""
    if instance["status"] not in SETTLED:
        raise ApiError(400, "Linode busy.")


def schedule(enabled: bool) -> Json:
    """Linode chooses day and window some time after backups were enabled."""
    return dict.fromkeys(("day", "window"), "Scheduling" if enabled else None)


class Instances:
    def __init__(self, store: Store, driver: Driver, faults: Faults, network: int) -> None:
        self.store, self.driver, self.faults, self.network = store, driver, faults, network
        self.firewalls, self.groups, self.vpcs = Firewalls(store), PlacementGroups(store), Vpcs(store)
        for instance in store["instances"].values():
            # What was under way when the server ended: the machine itself says how it stands now.
            running = driver.state(instance["id"]) == "running"
            instance["status"] = "running" if running else "offline"

    def listed(self) -> list[Json]:
        return list(self.store["instances"].values())

    def one(self, number: str) -> Json:
        return self.store.one("instances", number)

    # What a request brings

    def deployment(self, body: Json) -> Deployment:
        """Image, keys and user data of the body, checked. Raises ApiError."""
        image = body.get("image")
        if image is not None and image not in catalogue.IMAGES:
            raise ApiError(400, "image is not valid", "image")
        keys = (*(body.get("authorized_keys") or []), *self.keys_of(body.get("authorized_users") or []))
        if image and not (body.get("root_pass") or keys):
            raise ApiError(400, "root_pass or authorized_keys is required", "root_pass")
        if body.get("root_pass"):
            check_length(body["root_pass"], 7, 128, "root_pass")
        return Deployment(image, keys, self.decode_user_data(body), bool(body.get("booted", image is not None)))

    def keys_of(self, users: list[str]) -> list[str]:
        """SSH keys in the profiles of these users, of whom there is one."""
        if any(user != catalogue.PROFILE["username"] for user in users):
            raise ApiError(400, f"The lab's one user is {catalogue.PROFILE['username']}", "authorized_users")
        return [key["ssh_key"] for key in self.store["sshkeys"].values()] if users else []

    @staticmethod
    def decode_user_data(body: Json) -> str:
        encoded = (body.get("metadata") or {}).get("user_data") or ""
        try:
            decoded = base64.b64decode(encoded, validate=True)
            text = decoded.decode()
        except (binascii.Error, ValueError):
            raise ApiError(400, "user_data must be base64 encoded text", "metadata.user_data") from None
        if len(decoded) > 65535:
            raise ApiError(400, "Decoded user_data must not exceed 65535 bytes", "metadata.user_data")
        return text

    @staticmethod
    def swap_size(body: Json, sold: Json, image: str | None) -> int:
        """MB of the swap disk, which takes its room from the other one. Raises ApiError."""
        swap: Any = SWAP_MB if body.get("swap_size") is None else body["swap_size"]
        if not isinstance(swap, int) or isinstance(swap, bool) or swap < 0:
            raise ApiError(400, "Must be a number of MB, 0 or more", "swap_size")
        if image and swap + catalogue.IMAGES[image]["size"] > sold["disk"]:
            raise ApiError(400, f"The plan's disk of {sold['disk']} MB has no room for it and the image", "swap_size")
        return int(swap)

    def free_octet(self) -> int:
        used = {int(instance["ipv4"][0].rsplit(".", 1)[1]) for instance in self.listed()}
        # An address just given back is taken last, so that a stale known_hosts entry or connection is not met at once.
        start = int(self.store.state.get("last_octet", 0))
        for step in range(1, 251):
            octet = (start + step - 1) % 250 + 1
            if octet not in used:
                self.store.state["last_octet"] = octet
                return octet
        raise ApiError(400, "An active Linode limit has been reached: the lab has 250 addresses")

    # Creation, change, deletion

    def create(self, body: Json) -> Json:
        sold, region = plan(body.get("type")), str(body.get("region"))
        if region not in catalogue.REGIONS:
            raise ApiError(400, "region is not valid", "region")
        wanted = self.deployment(body)
        settings = chosen(body, ENCRYPTION | POLICY | GENERATION)
        generation = settings.get("interface_generation", "legacy_config")
        number = self.store.new_id()
        label = body.get("label") or f"linode{number}"
        self.store.check_label("instances", label)
        tags = self.store.check_tags(body.get("tags") or [])
        swap = self.swap_size(body, sold, wanted.image)
        for legacy in ("private_ip", "firewall_id") if generation == "linode" else ():
            if body.get(legacy):
                raise ApiError(400, f"{legacy} is not for Linodes with Linode interfaces", legacy)
        firewall = str(body["firewall_id"]) if body.get("firewall_id") else None
        if firewall and firewall not in self.store["firewalls"]:
            raise ApiError(400, "firewall_id is not valid", "firewall_id")
        group = self.groups.joined(body.get("placement_group"), region)
        interfaces = self.vpcs.planned(body.get("interfaces") or [], generation, region)
        octet = self.free_octet()
        enabled = bool(body.get("backups_enabled"))
        instance = {
            "id": number,
            "label": label,
            "group": body.get("group") or "",
            "status": "provisioning",
            "type": sold["id"],
            "region": region,
            "image": wanted.image,
            "ipv4": [f"127.18.{self.network}.{octet}", *([f"192.168.128.{octet}"] if body.get("private_ip") else [])],
            "ipv6": f"2001:db8:{self.network}::{octet}/128",
            "tags": tags,
            "specs": {key: sold[key] for key in SPECS},
            "alerts": {"cpu": 90, "io": 10000, "network_in": 10, "network_out": 10, "transfer_quota": 80},
            "backups": {
                "enabled": enabled,
                "available": False,
                "last_successful": None,
                "schedule": schedule(enabled),
            },
            "created": now(),
            "updated": now(),
            "host_uuid": uuid.uuid4().hex,
            "hypervisor": "kvm",
            "watchdog_enabled": True,
            "has_user_data": bool(wanted.user_data),
            "placement_group": group,
            "disk_encryption": settings.get("disk_encryption", "enabled"),
            "lke_cluster_id": None,
            "capabilities": [],
            "interface_generation": generation,
            "maintenance_policy": settings.get("maintenance_policy", "linode/migrate"),
            "site_type": "core",
            "locks": [],
        }
        self.store["instances"][str(number)] = instance
        self.store.note_tags(tags)
        if firewall:
            self.firewalls.attach(self.store["firewalls"][firewall], instance)
        self.partition(instance, swap, interfaces)
        self.deploy("linode_create", instance, wanted)
        return instance

    def partition(self, instance: Json, swap: int, interfaces: list[Json]) -> None:
        """Disks that fill the plan, and the profile that boots them; without an image there is neither."""
        parts: Json = {"config": None, "disks": [], "interfaces": interfaces}
        self.store["parts"][str(instance["id"])] = parts
        if instance["image"]:
            name = catalogue.IMAGES[instance["image"]]["label"]
            size_of = {"ext4": instance["specs"]["disk"] - swap, "swap": swap}
            label_of = {"ext4": f"{name} Disk", "swap": f"{swap} MB Swap Image"}
            parts["disks"] = [
                {
                    "id": self.store.new_id(),
                    "label": label_of[filesystem],
                    "status": "ready",
                    "size": size,
                    "filesystem": filesystem,
                    "disk_encryption": instance["disk_encryption"],
                    "created": now(),
                    "updated": now(),
                }
                for filesystem, size in size_of.items()
                if size
            ]
            parts["config"] = self.store.new_id()

    def deploy(self, action: str, instance: Json, wanted: Deployment) -> None:
        """In the background: the machine made anew, whatever there was of it, and booted if that is wanted."""
        spec = VMSpec(
            instance_id=instance["id"],
            label=instance["label"],
            memory_mb=instance["specs"]["memory"],
            vcpus=instance["specs"]["vcpus"],
            image=instance["image"] or "",
            public_ipv4=instance["ipv4"][0],
            private_ipv4=next(iter(instance["ipv4"][1:]), None),
            authorized_keys=wanted.keys,
            user_data=wanted.user_data,
        )
        fault = self.faults.boot() if wanted.boot else None

        def work() -> None:
            self.driver.delete(spec.instance_id)
            self.driver.create(spec)
            if wanted.boot:
                self.start(instance, fault)

        self.store.run(self.store.event(action, instance), work, instance, "running" if wanted.boot else "offline")

    def start(self, instance: Json, fault: Fault | None) -> None:
        """The last step of a job: a boot, and what an injected fault does to it."""
        with self.store.lock:
            instance["status"] = "booting"
        self.boot_machine(instance["id"], fault)

    def boot_machine(self, number: int, fault: Fault | None) -> None:
        if fault is not None:
            time.sleep(fault.seconds)
            if fault.kind == "boot_fail":
                raise DriverError("the host refused to boot this Linode (injected fault)")
        self.driver.boot(number)

    def update(self, body: Json, number: str) -> Json:
        instance = self.one(number)
        changes: Json = {key: body[key] for key in ("group", "alerts", "watchdog_enabled") if key in body}
        changes |= chosen(body, POLICY)
        if body.get("label", instance["label"]) != instance["label"]:
            self.store.check_label("instances", body["label"])
            changes["label"] = body["label"]
        if "tags" in body:
            changes["tags"] = self.store.check_tags(body["tags"])
            self.store.note_tags(changes["tags"])
        instance.update(changes, updated=now())
        self.firewalls.rename(instance)
        self.store.notify("linode_update", instance)
        self.store.save()
        return instance

    def delete(self, body: Json, number: str) -> Json:
        instance = self.one(number)
        Locks.check(instance)
        if instance["status"] in ("provisioning", "resizing", "rebuilding", "deleting"):
            raise ApiError(400, "Linode busy.")
        self.firewalls.detach_all(instance)
        self.store["parts"].pop(number, None)
        instance["placement_group"] = None

        def work() -> None:
            self.driver.delete(instance["id"])
            with self.store.lock:
                self.store["instances"].pop(number, None)

        instance["status"] = "deleting"
        self.store.run(self.store.event("linode_delete", instance), work, instance, "deleting")
        return {}

    # Jobs

    def power(self, action: str, number: str) -> Json:
        instance = self.one(number)
        check_settled(instance)
        if (instance["status"] in OFF) != (action == "boot"):
            raise ApiError(400, f"Linode is {instance['status']}.")
        fault = self.faults.boot() if action != "shutdown" else None

        def work() -> None:
            if action != "boot":
                self.driver.shutdown(instance["id"])
            if action != "shutdown":
                self.boot_machine(instance["id"], fault)

        instance["status"] = {"boot": "booting", "shutdown": "shutting_down", "reboot": "rebooting"}[action]
        after = "offline" if action == "shutdown" else "running"
        self.store.run(self.store.event(f"linode_{action}", instance), work, instance, after)
        return {}

    def resize(self, body: Json, number: str) -> Json:
        """A cold migration: the type is the old one until the machine is down and changed."""
        instance, sold = self.one(number), plan(body.get("type"))
        chosen(body, MIGRATION)
        automatic = body.get("allow_auto_disk_resize", True)
        if not isinstance(automatic, bool):
            raise ApiError(400, "Must be true or false", "allow_auto_disk_resize")
        self.check_other(instance, sold)
        check_settled(instance)
        disks = self.store.parts(instance["id"])["disks"]
        # What a disk that shrinks must hold still: the lab's hosts have no more than their image.
        least = {"ext4": catalogue.IMAGES[instance["image"]]["size"]} if automatic and disks else {}
        if sum(least.get(disk["filesystem"], disk["size"]) for disk in disks) > sold["disk"]:
            reason = "Linode has allocated more disk than the new service plan allows. Delete or resize disks smaller."
            raise ApiError(400, reason)
        boot = instance["status"] == "running"
        fault = self.faults.boot() if boot else None

        def work() -> None:
            self.driver.shutdown(instance["id"])
            self.driver.resize(instance["id"], sold["memory"], sold["vcpus"])
            with self.store.lock:
                self.take(instance, sold)
                for disk in disks:
                    if automatic and disk["filesystem"] == "ext4":
                        others = sum(other["size"] for other in disks if other is not disk)
                        disk.update(size=sold["disk"] - others, updated=now())
            if boot:
                self.start(instance, fault)

        instance["status"] = "resizing"
        after = "running" if boot else "offline"
        self.store.run(self.store.event("linode_resize", instance), work, instance, after)
        return {}

    @staticmethod
    def check_other(instance: Json, sold: Json) -> None:
        if sold["id"] == instance["type"]:
            raise ApiError(400, "Linode is already running this service plan.")

    @staticmethod
    def take(instance: Json, sold: Json) -> None:
        instance.update(type=sold["id"], specs={key: sold[key] for key in SPECS})

    def rebuild(self, body: Json, number: str) -> Json:
        """Disks and profile anew; id, label, tags and addresses, that in a VPC too, stay."""
        instance = self.one(number)
        if body.get("image") is None:
            raise ApiError(400, "image is required", "image")
        wanted, settings = self.deployment(body), chosen(body, ENCRYPTION | POLICY)
        sold = plan(body.get("type") or instance["type"])
        if body.get("type"):
            self.check_other(instance, sold)
        Locks.check(instance)
        check_settled(instance)
        self.take(instance, sold)
        user_data = bool(wanted.user_data)
        instance.update(settings, image=wanted.image, has_user_data=user_data, status="rebuilding", updated=now())
        self.partition(instance, SWAP_MB, self.store.parts(instance["id"])["interfaces"])
        self.deploy("linode_rebuild", instance, wanted)
        return instance

    def backups(self, action: str, number: str) -> Json:
        instance = self.one(number)
        enabled = action == "enable"
        instance["backups"].update(enabled=enabled, schedule=schedule(enabled))
        self.store.notify(f"backups_{action}", instance)
        self.store.save()
        return {}

    # What is in an instance

    def disks(self, number: str) -> list[Json]:
        return list(self.store.parts(self.one(number)["id"])["disks"])

    def configs(self, number: str) -> list[Json]:
        instance = self.one(number)
        parts = self.store.parts(instance["id"])
        if parts["config"] is None:
            return []
        devices: Json = {f"sd{letter}": None for letter in "abcdefgh"}
        for name, disk in zip(devices, parts["disks"]):
            devices[name] = {"disk_id": disk["id"], "volume_id": None}
        legacy = instance["interface_generation"] == "legacy_config"
        return [
            {
                "id": parts["config"],
                "label": f"My {parts['disks'][0]['label']} Profile",
                "comments": "",
                "kernel": "linode/grub2",
                "devices": devices,
                "helpers": {
                    "devtmpfs_automount": True,
                    "distro": True,
                    "modules_dep": True,
                    "network": True,
                    "updatedb_disabled": True,
                },
                "interfaces": [self.interface(instance, one) for one in parts["interfaces"]] if legacy else [],
                "memory_limit": 0,
                "root_device": "/dev/sda",
                "run_level": "default",
                "virt_mode": "paravirt",
            }
        ]

    @staticmethod
    def interface(instance: Json, kept: Json) -> Json:
        shown = {key: kept[key] for key in ("id", "purpose", "primary", "label", "ipam_address", "subnet_id", "vpc_id")}
        ipv4 = {"vpc": kept["address"], "nat_1_1": None} if kept["purpose"] == "vpc" else None
        return shown | {"active": instance["status"] == "running", "ip_ranges": [], "ipv4": ipv4}

    def addresses(self, number: str) -> Json:
        instance = self.one(number)

        def address(value: str, mask: str, prefix: int, **more: Any) -> Json:
            return {
                "address": value,
                "gateway": None,
                "subnet_mask": mask,
                "prefix": prefix,
                "type": "ipv4",
                "public": True,
                "rdns": None,
                "linode_id": instance["id"],
                "region": instance["region"],
                **more,
            }

        def ipv6(value: str, **more: Any) -> Json:
            return address(value, "ffff:ffff:ffff:ffff::", 64, type="ipv6", gateway="fe80::1", **more)

        slaac = (instance["ipv6"] or "").removesuffix("/128")
        return {
            "ipv4": {
                "public": [address(value, "255.255.255.0", 24) for value in instance["ipv4"][:1]],
                "private": [address(value, "255.255.128.0", 17, public=False) for value in instance["ipv4"][1:]],
                "shared": [],
                "reserved": [],
                "vpc": self.vpcs.addresses(linode=instance["id"]),
            },
            "ipv6": {
                "slaac": ipv6(slaac) if slaac else None,
                "link_local": ipv6(f"fe80::{slaac.rsplit(':')[-1]}", public=False) if slaac else None,
                "global": [],
            },
        }
