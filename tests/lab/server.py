"""A stateful Linode API v4 whose instances are whatever the driver makes of them; see docs/lab.md.

It answers as Linode's API does for what plimsoll uses, and 404 for all else. What is under /lab is the lab's own:
status, fault injection and a count of requests.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import re
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from . import catalogue
from .driver import Driver, DriverError, VMSpec
from .listing import FilterError, page, select

Json = dict[str, Any]
INSTANCE_FILTERS = frozenset(
    [
        "group",
        "id",
        "image",
        "interface_generation",
        "ipv4",
        "label",
        "placement_group.id",
        "placement_group.label",
        "region",
        "tags",
    ]
)
EVENT_FILTERS = frozenset(["action", "created", "entity.id", "entity.type", "id"])
LABEL = re.compile(r"(?!.*(--|__|\.\.))[A-Za-z][A-Za-z0-9._-]{1,62}[A-Za-z0-9]")
# Documented budgets: requests in seconds, for each token.
LIMITS = {"list": (200, 60.0), "create": (20, 15.0), "other": (1600, 60.0)}


class ApiError(Exception):
    """An answer in Linode's shape of errors."""

    def __init__(self, status: int, reason: str, field: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        error = {"reason": reason} if field is None else {"reason": reason, "field": field}
        self.response = JSONResponse({"errors": [error]}, status, headers)


@dataclass
class Fault:
    """Misbehaviour for the next `count` requests whose method and path (from /linode on) begin as given.

    kind: status (answer `status`, with Retry-After `retry_after` if set), maintenance (503 with X-Maintenance-Mode),
    lost_answer (carry out, answer 502), hang (wait `seconds`, then go on), busy (400 Linode busy.),
    slow_boot (`seconds` before the machine starts), boot_fail (the machine does not start).
    """

    KINDS: ClassVar = ("status", "maintenance", "lost_answer", "hang", "busy", "slow_boot", "boot_fail")

    kind: str
    path: str = "/"
    method: str = ""
    count: int = 1
    status: int = 500
    retry_after: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(self.KINDS)}")


class Budget:
    """A sliding window of requests."""

    def __init__(self, size: int, window: float) -> None:
        self.size, self.window = size, window
        self._times: deque[float] = deque()

    def take(self) -> dict[str, str]:
        """Headers for one more request. Raises ApiError 429."""
        now = time.monotonic()
        while self._times and now - self._times[0] >= self.window:
            self._times.popleft()
        wait = self.window - (now - self._times[0]) if self._times else self.window
        headers = {"X-RateLimit-Limit": str(self.size), "X-RateLimit-Reset": str(int(time.time() + wait) + 1)}
        if len(self._times) >= self.size:
            headers |= {"X-RateLimit-Remaining": "0", "Retry-After": str(int(wait) + 1)}
            raise ApiError(429, "Too many requests", headers=headers)
        self._times.append(now)
        return headers | {"X-RateLimit-Remaining": str(self.size - len(self._times))}


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


class Lab:
    """All state, and one method for each operation. Methods run in worker threads, under one lock."""

    def __init__(
        self, driver: Driver, token: str, state_path: Path, limits: Mapping[str, tuple[int, float]], network: int
    ) -> None:
        self.driver, self.token, self.state_path, self.network = driver, token, state_path, network
        self.lock = threading.RLock()
        self.budgets = {name: Budget(*limit) for name, limit in limits.items()}
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.jobs = ThreadPoolExecutor(max_workers=32, thread_name_prefix="lab")
        self.state: Json = {"next": 1, "instances": {}, "firewalls": {}, "sshkeys": {}, "events": [], "tags": []}
        if state_path.exists():
            self.state = json.loads(state_path.read_text())
            for instance in self.instances.values():
                # What was under way when the server ended: the machine itself says how it stands now.
                running = driver.state(instance["id"]) == "running"
                instance["status"] = "running" if running else "offline"

    @property
    def instances(self) -> dict[str, Json]:
        return self.state["instances"]

    def save(self) -> None:
        scratch = self.state_path.with_suffix(".new")
        scratch.touch(mode=0o600)
        scratch.write_text(json.dumps(self.state))
        scratch.replace(self.state_path)

    def new_id(self) -> int:
        self.state["next"] += 1
        return int(self.state["next"]) - 1

    # Events

    def event(self, action: str, entity: Json, kind: str = "linode") -> Json:
        event = {
            "id": self.new_id(),
            "action": action,
            "status": "scheduled",
            "percent_complete": 0,
            "created": _now(),
            "username": "lab",
            "message": "",
            "duration": 0.0,
            "rate": None,
            "read": False,
            "seen": False,
            "time_remaining": None,
            "secondary_entity": None,
            "entity": {
                "id": entity["id"],
                "type": kind,
                "label": entity["label"],
                "url": f"/v4/{'linode/instances' if kind == 'linode' else 'networking/firewalls'}/{entity['id']}",
            },
        }
        self.state["events"].insert(0, event)
        return event

    def one_event(self, number: str) -> Json:
        return _found({str(event["id"]): event for event in self.state["events"]}, number)

    def devices(self, number: str) -> list[Json]:
        return list(self.firewall(number)["devices"])

    def notify(self, action: str, entity: Json, kind: str) -> None:
        self.event(action, entity, kind).update(status="notification", percent_complete=100)

    def run(self, event: Json, work: Callable[[], None], instance: Json, after: str) -> None:
        """Carry out work in the background; the event and the instance's status follow it."""

        def job() -> None:
            started = time.monotonic()
            with self.lock:
                event.update(status="started", percent_complete=10)
            try:
                work()
                outcome: Json = {"status": "finished"}
                status = after
            except DriverError as error:
                outcome, status = {"status": "failed", "message": str(error)}, "offline"
            with self.lock:
                event.update(outcome, percent_complete=100, duration=round(time.monotonic() - started, 2))
                if str(instance["id"]) in self.instances:
                    instance["status"], instance["updated"] = status, _now()
                self.save()

        self.save()
        self.jobs.submit(job)

    # Instances

    def instance(self, number: str) -> Json:
        try:
            return self.instances[number]
        except KeyError:
            raise ApiError(404, "Not found") from None

    def create_instance(self, body: Json, **_: str) -> Json:
        kind, region = body.get("type"), body.get("region")
        if kind not in catalogue.TYPES:
            raise ApiError(400, "A valid plan type by that ID was not found", "type")
        if region not in catalogue.REGIONS:
            raise ApiError(400, "region is not valid", "region")
        image = body.get("image")
        if image is not None and image not in catalogue.IMAGES:
            raise ApiError(400, "image is not valid", "image")
        keys = body.get("authorized_keys") or []
        if image and not (body.get("root_pass") or keys or body.get("authorized_users")):
            raise ApiError(400, "root_pass or authorized_keys is required", "root_pass")
        number = self.new_id()
        label = body.get("label") or f"linode{number}"
        self.check_label(label)
        tags = self.check_tags(body.get("tags") or [])
        user_data = self.decode_user_data(body)
        firewall = str(body["firewall_id"]) if body.get("firewall_id") else None
        if firewall and firewall not in self.state["firewalls"]:
            raise ApiError(400, "firewall_id is not valid", "firewall_id")
        sold = catalogue.TYPES[kind]
        octet = self.free_octet()
        instance = {
            "id": number,
            "label": label,
            "group": body.get("group") or "",
            "status": "provisioning",
            "type": kind,
            "region": region,
            "image": image,
            "ipv4": [f"127.18.{self.network}.{octet}", *([f"192.168.128.{octet}"] if body.get("private_ip") else [])],
            "ipv6": None,
            "tags": tags,
            "specs": {key: sold[key] for key in ("disk", "memory", "vcpus", "gpus", "transfer")},
            "alerts": {"cpu": 90, "io": 10000, "network_in": 10, "network_out": 10, "transfer_quota": 80},
            "backups": {
                "enabled": bool(body.get("backups_enabled")),
                "available": False,
                "last_successful": None,
                "schedule": {"day": None, "window": None},
            },
            "created": _now(),
            "updated": _now(),
            "host_uuid": uuid.uuid4().hex,
            "hypervisor": "kvm",
            "watchdog_enabled": True,
            "has_user_data": bool(user_data),
            "placement_group": None,
            "disk_encryption": body.get("disk_encryption") or "disabled",
            "lke_cluster_id": None,
            "capabilities": [],
            "interface_generation": "legacy_config",
            "maintenance_policy": body.get("maintenance_policy") or "linode/migrate",
            "site_type": "core",
            "locks": [],
        }
        self.instances[str(number)] = instance
        self.note_tags(tags)
        if firewall:
            self.attach(self.state["firewalls"][firewall], instance)
        spec = VMSpec(
            instance_id=number,
            label=label,
            memory_mb=sold["memory"],
            vcpus=sold["vcpus"],
            image=image or "",
            public_ipv4=instance["ipv4"][0],
            private_ipv4=instance["ipv4"][1] if body.get("private_ip") else None,
            authorized_keys=tuple(keys),
            user_data=user_data,
        )
        boot = body.get("booted", image is not None)
        delay = self.boot_fault()

        def work() -> None:
            self.driver.create(spec)
            if boot:
                with self.lock:
                    instance["status"] = "booting"
                self.boot_machine(number, delay)

        self.run(self.event("linode_create", instance), work, instance, "running" if boot else "offline")
        return instance

    def boot_fault(self) -> Fault | None:
        return self.take_fault("", "", {"slow_boot", "boot_fail"})

    def boot_machine(self, number: int, fault: Fault | None) -> None:
        if fault is not None:
            time.sleep(fault.seconds)
            if fault.kind == "boot_fail":
                raise DriverError("the host refused to boot this Linode (injected fault)")
        self.driver.boot(number)

    def free_octet(self) -> int:
        used = {int(instance["ipv4"][0].rsplit(".", 1)[1]) for instance in self.instances.values()}
        # An address just given back is taken last, so that a stale known_hosts entry or connection is not met at once.
        start = self.state.get("last_octet", 0)
        for step in range(1, 251):
            octet = (start + step - 1) % 250 + 1
            if octet not in used:
                self.state["last_octet"] = octet
                return octet
        raise ApiError(400, "An active Linode limit has been reached: the lab has 250 addresses")

    def check_label(self, label: Any) -> None:
        if not isinstance(label, str) or not 3 <= len(label) <= 64:
            raise ApiError(400, "Length must be 3-64 characters", "label")
        if not LABEL.fullmatch(label):
            raise ApiError(400, "Label must begin with a letter and hold letters, digits, - _ and . alone", "label")
        if any(instance["label"] == label for instance in self.instances.values()):
            raise ApiError(400, "Label must be unique among your linodes", "label")

    def check_tags(self, tags: Any) -> list[str]:
        if not isinstance(tags, list) or not all(isinstance(tag, str) and 3 <= len(tag) <= 50 for tag in tags):
            raise ApiError(400, "Length must be 3-50 characters", "tags")
        return sorted(set(tags))

    def decode_user_data(self, body: Json) -> str:
        encoded = (body.get("metadata") or {}).get("user_data") or ""
        try:
            decoded = base64.b64decode(encoded, validate=True)
            text = decoded.decode()
        except (binascii.Error, ValueError):
            raise ApiError(400, "user_data must be base64 encoded text", "metadata.user_data") from None
        if len(decoded) > 65535:
            raise ApiError(400, "Decoded user_data must not exceed 65535 bytes", "metadata.user_data")
        return text

    def update_instance(self, body: Json, number: str) -> Json:
        instance = self.instance(number)
        if "label" in body and body["label"] != instance["label"]:
            self.check_label(body["label"])
        changes = {
            key: body[key]
            for key in ("label", "group", "alerts", "watchdog_enabled", "maintenance_policy")
            if key in body
        }
        if "tags" in body:
            changes["tags"] = self.check_tags(body["tags"])
            self.note_tags(changes["tags"])
        instance.update(changes, updated=_now())
        self.notify("linode_update", instance, "linode")
        self.save()
        return instance

    def delete_instance(self, body: Json, number: str) -> Json:
        instance = self.instance(number)
        if instance["status"] in ("provisioning", "deleting"):
            raise ApiError(400, "Linode busy.")
        for firewall in self.state["firewalls"].values():
            firewall["devices"] = [one for one in firewall["devices"] if one["entity"]["id"] != instance["id"]]

        def work() -> None:
            self.driver.delete(instance["id"])
            with self.lock:
                self.instances.pop(number, None)

        instance["status"] = "deleting"
        self.run(self.event("linode_delete", instance), work, instance, "deleting")
        return {}

    def power(self, action: str, number: str) -> Json:
        instance = self.instance(number)
        expected = {"boot": ("offline", "stopped"), "shutdown": ("running",), "reboot": ("running",)}[action]
        if instance["status"] not in expected:
            busy = instance["status"] not in ("running", "offline", "stopped")
            raise ApiError(400, "Linode busy." if busy else f"Linode is {instance['status']}.")
        delay = self.boot_fault() if action != "shutdown" else None

        def work() -> None:
            if action != "boot":
                self.driver.shutdown(instance["id"])
            if action != "shutdown":
                self.boot_machine(instance["id"], delay)

        instance["status"] = {"boot": "booting", "shutdown": "shutting_down", "reboot": "rebooting"}[action]
        after = "offline" if action == "shutdown" else "running"
        self.run(self.event(f"linode_{action}", instance), work, instance, after)
        return {}

    def addresses(self, number: str) -> Json:
        instance = self.instance(number)

        def address(value: str, public: bool) -> Json:
            return {
                "address": value,
                "gateway": None,
                "subnet_mask": "255.255.128.0" if not public else "255.255.255.0",
                "prefix": 17 if not public else 24,
                "type": "ipv4",
                "public": public,
                "rdns": None,
                "linode_id": instance["id"],
                "region": instance["region"],
            }

        public, private = instance["ipv4"][:1], instance["ipv4"][1:]
        return {
            "ipv4": {
                "public": [address(value, True) for value in public],
                "private": [address(value, False) for value in private],
                "shared": [],
                "reserved": [],
                "vpc": [],
            },
            "ipv6": {"slaac": None, "link_local": None, "global": []},
        }

    # Firewalls

    def firewall(self, number: str) -> Json:
        try:
            return self.state["firewalls"][number]
        except KeyError:
            raise ApiError(404, "Not found") from None

    @staticmethod
    def public_firewall(firewall: Json) -> Json:
        return {key: value for key, value in firewall.items() if key != "devices"}

    def check_rules(self, rules: Any) -> Json:
        if not isinstance(rules, dict):
            raise ApiError(400, "rules is required", "rules")
        for policy in ("inbound_policy", "outbound_policy"):
            if rules.get(policy) not in ("ACCEPT", "DROP"):
                raise ApiError(400, "Must be one of ACCEPT, DROP", f"rules.{policy}")
        for direction in ("inbound", "outbound"):
            for index, rule in enumerate(rules.get(direction) or []):
                if rule.get("protocol") not in ("TCP", "UDP", "ICMP", "IPENCAP"):
                    raise ApiError(
                        400, "Must be one of TCP, UDP, ICMP, IPENCAP", f"rules.{direction}[{index}].protocol"
                    )
                if not any((rule.get("addresses") or {}).values()):
                    raise ApiError(400, "Must contain at least one address", f"rules.{direction}[{index}].addresses")
        kept = {key: rules.get(key) or [] for key in ("inbound", "outbound")}
        kept |= {key: rules[key] for key in ("inbound_policy", "outbound_policy")}
        return kept

    def create_firewall(self, body: Json, **_: str) -> Json:
        label = body.get("label")
        if not isinstance(label, str) or not 3 <= len(label) <= 32:
            raise ApiError(400, "Length must be 3-32 characters", "label")
        if any(firewall["label"] == label for firewall in self.state["firewalls"].values()):
            raise ApiError(400, "Label must be unique among your firewalls", "label")
        firewall = {
            "id": self.new_id(),
            "label": label,
            "status": "enabled",
            "tags": self.check_tags(body.get("tags") or []),
            "created": _now(),
            "updated": _now(),
            "rules": self.versioned(self.check_rules(body.get("rules")), 0),
            "devices": [],
        }
        linodes = (body.get("devices") or {}).get("linodes") or []
        for number in linodes:
            self.attach(firewall, self.instance(str(number)))
        self.state["firewalls"][str(firewall["id"])] = firewall
        self.note_tags(firewall["tags"])
        self.notify("firewall_create", firewall, "firewall")
        self.save()
        return self.public_firewall(firewall)

    @staticmethod
    def versioned(rules: Json, before: int) -> Json:
        fingerprint = f"{binascii.crc32(json.dumps(rules, sort_keys=True).encode()):08x}"
        return rules | {"version": before + 1, "fingerprint": fingerprint}

    def update_firewall(self, body: Json, number: str) -> Json:
        firewall = self.firewall(number)
        if "tags" in body:
            firewall["tags"] = self.check_tags(body["tags"])
            self.note_tags(firewall["tags"])
        firewall.update({key: body[key] for key in ("label", "status") if key in body}, updated=_now())
        self.save()
        return self.public_firewall(firewall)

    def delete_firewall(self, body: Json, number: str) -> Json:
        firewall = self.firewall(number)
        del self.state["firewalls"][number]
        self.notify("firewall_delete", firewall, "firewall")
        self.save()
        return {}

    def put_rules(self, body: Json, number: str) -> Json:
        firewall = self.firewall(number)
        firewall["rules"] = self.versioned(self.check_rules(body), firewall["rules"]["version"])
        self.notify("firewall_rules_update", firewall, "firewall")
        self.save()
        return firewall["rules"]

    def attach(self, firewall: Json, instance: Json) -> Json:
        if any(one["entity"]["id"] == instance["id"] for one in firewall["devices"]):
            raise ApiError(400, "That device is attached already", "id")
        entity = {
            "id": instance["id"],
            "type": "linode",
            "label": instance["label"],
            "url": f"/v4/linode/instances/{instance['id']}",
        }
        device = {"id": self.new_id(), "entity": entity, "created": _now(), "updated": _now()}
        firewall["devices"].append(device)
        self.notify("firewall_device_add", firewall, "firewall")
        return device

    def add_device(self, body: Json, number: str) -> Json:
        firewall = self.firewall(number)
        if body.get("type") != "linode" or str(body.get("id")) not in self.instances:
            raise ApiError(400, "Invalid device", "id")
        device = self.attach(firewall, self.instance(str(body["id"])))
        self.save()
        return device

    def device(self, number: str, device: str) -> Json:
        for one in self.firewall(number)["devices"]:
            if str(one["id"]) == device:
                return one
        raise ApiError(404, "Not found")

    def remove_device(self, body: Json, number: str, device: str) -> Json:
        self.firewall(number)["devices"].remove(self.device(number, device))
        self.save()
        return {}

    # SSH keys and tags

    def sshkey(self, number: str) -> Json:
        try:
            return self.state["sshkeys"][number]
        except KeyError:
            raise ApiError(404, "Not found") from None

    def create_sshkey(self, body: Json, **_: str) -> Json:
        if not str(body.get("ssh_key") or "").startswith(("ssh-", "ecdsa-")):
            raise ApiError(400, "SSH key is not valid", "ssh_key")
        key = {"id": self.new_id(), "label": body.get("label") or "", "ssh_key": body["ssh_key"], "created": _now()}
        self.state["sshkeys"][str(key["id"])] = key
        self.save()
        return key

    def update_sshkey(self, body: Json, number: str) -> Json:
        self.sshkey(number).update({key: body[key] for key in ("label",) if key in body})
        self.save()
        return self.sshkey(number)

    def delete_sshkey(self, body: Json, number: str) -> Json:
        self.sshkey(number)
        del self.state["sshkeys"][number]
        self.save()
        return {}

    def note_tags(self, tags: list[str]) -> None:
        self.state["tags"] = sorted({*self.state["tags"], *tags})

    def create_tag(self, body: Json, **_: str) -> Json:
        label = self.check_tags([body.get("label")])[0]
        self.note_tags([label])
        for number in body.get("linodes") or []:
            instance = self.instance(str(number))
            instance["tags"] = sorted({*instance["tags"], label})
        self.save()
        return {"label": label}

    def delete_tag(self, body: Json, label: str) -> Json:
        if label not in self.state["tags"]:
            raise ApiError(404, "Not found")
        self.state["tags"].remove(label)
        for instance in self.instances.values():
            instance["tags"] = [tag for tag in instance["tags"] if tag != label]
        self.save()
        return {}

    def tagged(self, label: str) -> list[Json]:
        if label not in self.state["tags"]:
            raise ApiError(404, "Not found")
        return [{"type": "linode", "data": one} for one in self.instances.values() if label in one["tags"]]

    # Faults

    def take_fault(self, method: str, path: str, kinds: set[str]) -> Fault | None:
        for fault in self.faults:
            boots = bool(kinds & {"slow_boot", "boot_fail"})
            if fault.kind in kinds and (boots or (method.startswith(fault.method) and path.startswith(fault.path))):
                fault.count -= 1
                if fault.count <= 0:
                    self.faults.remove(fault)
                return fault
        return None


def _found(items: Mapping[str, Json], number: str) -> Json:
    if number not in items:
        raise ApiError(404, "Not found")
    return items[number]


def create_app(
    driver: Driver,
    *,
    token: str,
    state_path: Path,
    limits: Mapping[str, tuple[int, float]] = LIMITS,
    network: int = 0,
) -> Starlette:
    """The API over a driver. state_path outlives the server; limits are (requests, seconds) for list, create, other;
    instances get addresses of 127.18.NETWORK.0/24.
    """
    lab = Lab(driver, token, state_path, limits, network)
    started = time.monotonic()

    def guard(request: Request, budget: str) -> dict[str, str]:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given, f"Bearer {lab.token}"):
            raise ApiError(401, "Invalid Token")
        with lab.lock:
            return lab.budgets[budget].take()

    def answer(work: Callable[[Json, dict[str, str]], Any], budget: str) -> Callable[[Request], Any]:
        """An endpoint: count, fault, token, budget, body, work, all errors in the API's shape."""

        def handle(request: Request, raw: bytes) -> Response:
            path = request.url.path.removeprefix("/v4beta").removeprefix("/v4")
            with lab.lock:
                lab.requests[f"{request.method} {re.sub(r'/[0-9]+', '/{id}', path)}"] += 1
                kinds = {"status", "maintenance", "lost_answer", "hang", "busy"}
                fault = lab.take_fault(request.method, path, kinds)
            try:
                if fault is not None:
                    misbehave(fault)
                headers = guard(request, budget)
                try:
                    body = json.loads(raw or b"{}")
                except ValueError:
                    raise ApiError(400, "The request body is not valid JSON") from None
                if not isinstance(body, dict):
                    raise ApiError(400, "The request body must be an object")
                with lab.lock:
                    result = work(body, dict(request.path_params))
                    if isinstance(result, tuple):
                        items, allowed = result
                        found = select(items, request.headers.get("X-Filter"), allowed)
                        result = page(found, request.query_params)
                    content = json.dumps(result)
            except FilterError as error:
                return ApiError(400, str(error), "X-Filter").response
            except ApiError as error:
                return error.response
            if fault is not None and fault.kind == "lost_answer":
                return Response("<html>502 Bad Gateway</html>", 502, media_type="text/html")
            return Response(content, 200, headers, "application/json")

        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(handle, request, await request.body())

        return endpoint

    def misbehave(fault: Fault) -> None:
        if fault.kind == "hang":
            time.sleep(fault.seconds)
        elif fault.kind == "busy":
            raise ApiError(400, "Linode busy.")
        elif fault.kind == "maintenance":
            raise ApiError(503, "The API is under maintenance", headers={"X-Maintenance-Mode": "true"})
        elif fault.kind == "status":
            headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            raise ApiError(fault.status, "Injected fault", headers=headers)

    def route(method: str, path: str, work: Callable[[Json, dict[str, str]], Any], budget: str = "other") -> Route:
        return Route(path, answer(work, budget), methods=[method])

    def listed(path: str, items: Callable[[], Any], allowed: str = "") -> Route:
        fields = frozenset(allowed.split())
        return route("GET", path, lambda body, at: (list(items()), fields), "list")

    def firewalls() -> list[Json]:
        return [lab.public_firewall(one) for one in lab.state["firewalls"].values()]

    instances, one = "/linode/instances", "/linode/instances/{number:int}"
    firewall, wall = "/networking/firewalls", "/networking/firewalls/{number:int}"
    key = "/profile/sshkeys/{number:int}"

    def at(work: Callable[..., Any], *, body: bool = False) -> Callable[[Json, dict[str, str]], Any]:
        def call(given: Json, params: dict[str, str]) -> Any:
            named = {name: str(value) for name, value in params.items()}
            return work(given, **named) if body else work(**named)

        return call

    routes = [
        route("GET", instances, lambda body, at: (list(lab.instances.values()), INSTANCE_FILTERS), "list"),
        route("POST", instances, at(lab.create_instance, body=True), "create"),
        route("GET", one, at(lab.instance)),
        route("PUT", one, at(lab.update_instance, body=True)),
        route("DELETE", one, at(lab.delete_instance, body=True)),
        route("POST", f"{one}/boot", at(lambda number: lab.power("boot", number))),
        route("POST", f"{one}/shutdown", at(lambda number: lab.power("shutdown", number))),
        route("POST", f"{one}/reboot", at(lambda number: lab.power("reboot", number))),
        route("GET", f"{one}/ips", at(lab.addresses)),
        route("GET", f"{one}/disks", lambda body, at: (lab.instance(str(at["number"])) and [], frozenset()), "list"),
        route("GET", f"{one}/configs", lambda body, at: (lab.instance(str(at["number"])) and [], frozenset()), "list"),
        listed("/linode/types", catalogue.TYPES.values, "class disk gpus id label memory vcpus"),
        route("GET", "/linode/types/{number}", at(lambda number: _found(catalogue.TYPES, number))),
        listed("/regions", catalogue.REGIONS.values, "id country"),
        route("GET", "/regions/{number}", at(lambda number: _found(catalogue.REGIONS, number))),
        listed("/images", catalogue.IMAGES.values, "id label deprecated is_public vendor status"),
        route("GET", "/images/{number:path}", at(lambda number: _found(catalogue.IMAGES, number))),
        route("GET", "/account/events", lambda body, at: (list(lab.state["events"]), EVENT_FILTERS), "list"),
        route("GET", "/account/events/{number:int}", at(lab.one_event)),
        route("GET", "/account", lambda body, at: catalogue.ACCOUNT),
        route("GET", "/account/settings", lambda body, at: catalogue.ACCOUNT_SETTINGS),
        route("GET", "/profile", lambda body, at: catalogue.PROFILE),
        listed("/profile/sshkeys", lab.state["sshkeys"].values, "id label"),
        route("POST", "/profile/sshkeys", at(lab.create_sshkey, body=True)),
        route("GET", key, at(lab.sshkey)),
        route("PUT", key, at(lab.update_sshkey, body=True)),
        route("DELETE", key, at(lab.delete_sshkey, body=True)),
        listed("/tags", lambda: [{"label": tag} for tag in lab.state["tags"]], "label"),
        route("POST", "/tags", at(lab.create_tag, body=True)),
        route("GET", "/tags/{label}", lambda body, at: (lab.tagged(at["label"]), frozenset()), "list"),
        route("DELETE", "/tags/{label}", at(lab.delete_tag, body=True)),
        listed(firewall, firewalls, "id label tags"),
        route("POST", firewall, at(lab.create_firewall, body=True)),
        route("GET", wall, at(lambda number: lab.public_firewall(lab.firewall(number)))),
        route("PUT", wall, at(lab.update_firewall, body=True)),
        route("DELETE", wall, at(lab.delete_firewall, body=True)),
        route("GET", f"{wall}/rules", at(lambda number: lab.firewall(number)["rules"])),
        route("PUT", f"{wall}/rules", at(lab.put_rules, body=True)),
        route("GET", f"{wall}/devices", at(lambda number: (lab.devices(number), frozenset())), "list"),
        route("POST", f"{wall}/devices", at(lab.add_device, body=True)),
        route("GET", f"{wall}/devices/{{device:int}}", at(lab.device)),
        route("DELETE", f"{wall}/devices/{{device:int}}", at(lab.remove_device, body=True)),
    ]  # fmt: skip

    def status(request: Request) -> Response:
        with lab.lock:
            rows = [
                {key: one[key] for key in ("id", "label", "status", "ipv4")} | {"driver_state": driver.state(one["id"])}
                for one in lab.instances.values()
            ]
        return JSONResponse({"instances": rows, "uptime_s": round(time.monotonic() - started, 1)})

    async def faults(request: Request) -> Response:
        if request.method == "DELETE":
            lab.faults.clear()
        elif request.method == "POST":
            try:
                lab.faults.append(Fault(**await request.json()))
            except (TypeError, ValueError) as error:
                return JSONResponse({"errors": [{"reason": f"not a fault: {error}"}]}, 400)
        return JSONResponse([vars(fault) for fault in lab.faults])

    def counted(request: Request) -> Response:
        with lab.lock:
            return JSONResponse(dict(lab.requests))

    async def not_found(request: Request, error: Exception) -> Response:
        code = getattr(error, "status_code", 404)
        return JSONResponse({"errors": [{"reason": "Not found" if code == 404 else "Method Not Allowed"}]}, code)

    own = [
        Route("/lab/status", status),
        Route("/lab/faults", faults, methods=["GET", "POST", "DELETE"]),
        Route("/lab/requests", counted),
    ]
    mounts = [Mount("/v4", routes=routes), Mount("/v4beta", routes=routes)]
    return Starlette(routes=[*own, *mounts], exception_handlers={404: not_found, 405: not_found})
