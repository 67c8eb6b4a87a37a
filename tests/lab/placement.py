"""Placement groups. The members are those instances that carry the group, and all of them are compliant."""

from __future__ import annotations

import re
from typing import Any

from . import catalogue
from .store import ApiError, Choices, Json, Store, chosen, reference

LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
CHOICES: Choices = {"placement_group_type": ("anti_affinity:local",), "placement_group_policy": ("strict", "flexible")}


class PlacementGroups:
    def __init__(self, store: Store) -> None:
        self.store = store

    def members(self, number: int) -> list[int]:
        instances = self.store["instances"].values()
        return [one["id"] for one in instances if (one["placement_group"] or {}).get("id") == number]

    def public(self, group: Json) -> Json:
        members = [{"linode_id": linode, "is_compliant": True} for linode in self.members(group["id"])]
        return group | {"is_compliant": True, "members": members, "migrations": None}

    def listed(self) -> list[Json]:
        return [self.public(group) for group in self.store["groups"].values()]

    def one(self, number: str) -> Json:
        return self.public(self.store.one("groups", number))

    @staticmethod
    def carried(group: Json) -> Json:
        """What a member's own object says of the group."""
        keys = ("id", "label", "placement_group_type", "placement_group_policy")
        return {key: group[key] for key in keys} | {"migrating_to": None}

    def check_label(self, label: Any) -> None:
        if not isinstance(label, str) or not LABEL.fullmatch(label):
            reason = "Label must begin and end with a letter or digit and hold letters, digits, - _ and . alone"
            raise ApiError(400, reason, "label")
        self.store.check_unique("groups", label, "placement groups")

    def create(self, body: Json) -> Json:
        self.check_label(body.get("label"))
        if body.get("region") not in catalogue.REGIONS:
            raise ApiError(400, "region is not valid", "region")
        for needed in CHOICES:
            if body.get(needed) is None:
                raise ApiError(400, f"{needed} is required", needed)
        group = {"id": self.store.new_id(), "label": body["label"], "region": body["region"], **chosen(body, CHOICES)}
        self.store["groups"][str(group["id"])] = group
        self.store.notify("placement_group_create", group, "placement_group")
        self.store.save()
        return self.public(group)

    def update(self, body: Json, number: str) -> Json:
        group = self.store.one("groups", number)
        if body.get("label", group["label"]) != group["label"]:
            self.check_label(body["label"])
            group["label"] = body["label"]
            for linode in self.members(group["id"]):
                self.store.one("instances", str(linode))["placement_group"] = self.carried(group)
        self.store.notify("placement_group_update", group, "placement_group")
        self.store.save()
        return self.public(group)

    def delete(self, body: Json, number: str) -> Json:
        group = self.store.one("groups", number)
        if self.members(group["id"]):
            raise ApiError(400, "Placement group must have no Linodes assigned before it is deleted")
        del self.store["groups"][number]
        self.store.notify("placement_group_delete", group, "placement_group")
        self.store.save()
        return {}

    def joined(self, given: Json | None, region: str) -> Json | None:
        """What a new instance of the region carries, when it asks for a group. Raises ApiError."""
        if not given:
            return None
        group = self.store["groups"].get(str(given.get("id")))
        if group is None:
            raise ApiError(400, "placement_group.id is not valid", "placement_group.id")
        self.check_room(group, [region], "placement_group.id")
        return self.carried(group)

    def check_room(self, group: Json, regions: list[str], field: str) -> None:
        """Raises ApiError unless instances of these regions, one each, may join."""
        if any(region != group["region"] for region in regions):
            raise ApiError(400, f"Linode and placement group must be in the same region, {group['region']}", field)
        most = catalogue.REGIONS[group["region"]]["placement_group_limits"]["maximum_linodes_per_pg"]
        if len(self.members(group["id"])) + len(regions) > most:
            raise ApiError(400, f"Placement group has its maximum of {most} Linodes", field)

    def linodes(self, body: Json) -> list[Json]:
        numbers = body.get("linodes")
        if not isinstance(numbers, list) or not numbers:
            raise ApiError(400, "Must be a list of Linode ids, and not empty", "linodes")
        return [self.store.linode(number, "linodes") for number in dict.fromkeys(numbers)]

    def assign(self, body: Json, number: str) -> Json:
        group, instances = self.store.one("groups", number), self.linodes(body)
        for instance in instances:
            if instance["placement_group"]:
                reason = f"Linode {instance['id']} is in placement group {instance['placement_group']['label']} already"
                raise ApiError(400, reason, "linodes")
        self.check_room(group, [instance["region"] for instance in instances], "linodes")
        return self.change(group, instances, "assign")

    def unassign(self, body: Json, number: str) -> Json:
        group, instances = self.store.one("groups", number), self.linodes(body)
        for instance in instances:
            if instance["id"] not in self.members(group["id"]):
                raise ApiError(400, f"Linode {instance['id']} is not in this placement group", "linodes")
        return self.change(group, instances, "unassign")

    def change(self, group: Json, instances: list[Json], action: str) -> Json:
        for instance in instances:
            instance["placement_group"] = self.carried(group) if action == "assign" else None
            linode = reference(instance, "linode")
            self.store.notify(f"placement_group_{action}", group, "placement_group", linode)
        self.store.save()
        return self.public(group)
