"""Resource locks: an instance that has one is neither deleted nor rebuilt."""

from __future__ import annotations

from .store import ApiError, Choices, Json, Store, chosen, reference

CHOICES: Choices = {"entity_type": ("linode",), "lock_type": ("cannot_delete", "cannot_delete_with_subresources")}


class Locks:
    def __init__(self, store: Store) -> None:
        self.store = store

    def public(self, lock: Json) -> Json:
        instance = self.store.one("instances", str(lock["linode_id"]))
        return {"id": lock["id"], "lock_type": lock["lock_type"], "entity": reference(instance, "linode")}

    def listed(self) -> list[Json]:
        return [self.public(lock) for lock in self.store["locks"].values()]

    def one(self, number: str) -> Json:
        return self.public(self.store.one("locks", number))

    def create(self, body: Json) -> Json:
        for needed in CHOICES:
            if body.get(needed) is None:
                raise ApiError(400, f"{needed} is required", needed)
        given = chosen(body, CHOICES)
        instance = self.store.linode(body.get("entity_id"), "entity_id")
        if instance["locks"]:
            raise ApiError(400, "Only one lock can exist per resource at a time", "lock_type")
        lock = {"id": self.store.new_id(), "lock_type": given["lock_type"], "linode_id": instance["id"]}
        self.store["locks"][str(lock["id"])] = lock
        instance["locks"] = [lock["lock_type"]]
        self.store.save()
        return self.public(lock)

    def delete(self, body: Json, number: str) -> Json:
        lock = self.store.one("locks", number)
        self.store.one("instances", str(lock["linode_id"]))["locks"] = []
        del self.store["locks"][number]
        self.store.save()
        return {}

    @staticmethod
    def check(instance: Json) -> None:
        """Raises ApiError where a lock keeps the instance."""
        if instance["locks"]:
            raise ApiError(400, f"Linode is locked ({instance['locks'][0]}); remove the lock first.")
