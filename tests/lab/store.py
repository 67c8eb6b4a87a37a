"""What all parts of the lab's API share: its state in one file, ids, events, jobs, and errors in Linode's shape."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from .driver import DriverError

Json = dict[str, Any]
Choices = dict[str, tuple[str, ...]]
LABEL = re.compile(r"(?!.*(--|__|\.\.))[A-Za-z][A-Za-z0-9._-]{1,62}[A-Za-z0-9]")
# Where the API keeps what an event, a lock or a firewall's device refers to.
PATHS = {
    "linode": "linode/instances",
    "firewall": "networking/firewalls",
    "placement_group": "placement/groups",
    "vpc": "vpcs",
}


class ApiError(Exception):
    """An answer in Linode's shape of errors."""

    def __init__(self, status: int, reason: str, field: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        error = {"reason": reason} if field is None else {"reason": reason, "field": field}
        self.response = JSONResponse({"errors": [error]}, status, headers)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def found(items: Mapping[str, Json], number: str) -> Json:
    """The item of that id. Raises ApiError 404."""
    if number not in items:
        raise ApiError(404, "Not found")
    return items[number]


def chosen(body: Json, choices: Choices) -> Json:
    """Those of the fields that are given, each with a value that it may have. Raises ApiError."""
    given = {key: body[key] for key in choices if body.get(key) is not None}
    for key, value in given.items():
        if value not in choices[key]:
            raise ApiError(400, f"Must be one of {', '.join(choices[key])}", key)
    return given


def check_length(value: Any, least: int, most: int, field: str) -> None:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise ApiError(400, f"Length must be {least}-{most} characters", field)


def reference(entity: Json, kind: str) -> Json:
    """How events, locks and devices name an entity."""
    return {
        "id": entity["id"],
        "type": kind,
        "label": entity["label"],
        "url": f"/v4/{PATHS[kind]}/{entity['id']}",
    }


class Store:
    """The state by kind (store["firewalls"] is a mapping of id to object), and what acts on it, under one lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.jobs = ThreadPoolExecutor(max_workers=32, thread_name_prefix="lab")
        mappings = ("instances", "parts", "firewalls", "groups", "vpcs", "locks", "sshkeys")
        self.state: Json = {"next": 1, "events": [], "tags": [], **{kind: {} for kind in mappings}}
        if path.exists():
            self.state |= json.loads(path.read_text())

    def __getitem__(self, kind: str) -> dict[str, Json]:
        items: dict[str, Json] = self.state[kind]
        return items

    def one(self, kind: str, number: str) -> Json:
        return found(self[kind], number)

    def save(self) -> None:
        scratch = self.path.with_suffix(".new")
        scratch.touch(mode=0o600)
        scratch.write_text(json.dumps(self.state))
        scratch.replace(self.path)

    def new_id(self) -> int:
        self.state["next"] += 1
        return int(self.state["next"]) - 1

    # Instances, as every part needs them

    def linode(self, number: Any, field: str) -> Json:
        """An instance that a request's body names. Raises ApiError 400."""
        try:
            return self["instances"][str(number)]
        except KeyError:
            raise ApiError(400, f"{number} is not a Linode of yours", field) from None

    def parts(self, number: int) -> Json:
        """Disks, configuration profile and interfaces of an instance, which its own object does not show."""
        # Not there while the instance is being deleted.
        return self["parts"].get(str(number), {"config": None, "disks": [], "interfaces": []})

    # Labels and tags

    def check_label(self, kind: str, label: Any, most: int = 64, named: str = "linodes") -> None:
        check_length(label, 3, most, "label")
        if not LABEL.fullmatch(label):
            raise ApiError(400, "Label must begin with a letter and hold letters, digits, - _ and . alone", "label")
        self.check_unique(kind, label, named)

    def check_unique(self, kind: str, label: str, named: str) -> None:
        if any(one["label"] == label for one in self[kind].values()):
            raise ApiError(400, f"Label must be unique among your {named}", "label")

    def check_tags(self, tags: Any) -> list[str]:
        if not isinstance(tags, list) or not all(isinstance(tag, str) and 3 <= len(tag) <= 50 for tag in tags):
            raise ApiError(400, "Length must be 3-50 characters", "tags")
        return sorted(set(tags))

    def note_tags(self, tags: list[str]) -> None:
        self.state["tags"] = sorted({*self.state["tags"], *tags})

    # Events and jobs

    def event(self, action: str, entity: Json, kind: str = "linode", secondary: Json | None = None) -> Json:
        event = {
            "id": self.new_id(),
            "action": action,
            "status": "scheduled",
            "percent_complete": 0,
            "created": now(),
            "username": "lab",
            "message": "",
            "duration": 0.0,
            "rate": None,
            "read": False,
            "seen": False,
            "time_remaining": None,
            "secondary_entity": secondary,
            "entity": reference(entity, kind),
        }
        self.state["events"].insert(0, event)
        return event

    def notify(self, action: str, entity: Json, kind: str = "linode", secondary: Json | None = None) -> None:
        """The event of something that is done already."""
        self.event(action, entity, kind, secondary).update(status="notification", percent_complete=100)

    def one_event(self, number: str) -> Json:
        return found({str(event["id"]): event for event in self.state["events"]}, number)

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
                if str(instance["id"]) in self["instances"]:
                    instance["status"], instance["updated"] = status, now()
                self.save()

        self.save()
        self.jobs.submit(job)
