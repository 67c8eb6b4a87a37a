"""SSH keys and tags of the lab's one account."""

from __future__ import annotations

from .store import ApiError, Json, Store, now


class Account:
    def __init__(self, store: Store) -> None:
        self.store = store

    def sshkey(self, number: str) -> Json:
        return self.store.one("sshkeys", number)

    def create_sshkey(self, body: Json) -> Json:
        if not str(body.get("ssh_key") or "").startswith(("ssh-", "ecdsa-")):
            raise ApiError(400, "SSH key is not valid", "ssh_key")
        key = {
            "id": self.store.new_id(),
            "label": body.get("label") or "",
            "ssh_key": body["ssh_key"],
            "created": now(),
        }
        self.store["sshkeys"][str(key["id"])] = key
        self.store.save()
        return key

    def update_sshkey(self, body: Json, number: str) -> Json:
        self.sshkey(number).update({key: body[key] for key in ("label",) if key in body})
        self.store.save()
        return self.sshkey(number)

    def delete_sshkey(self, body: Json, number: str) -> Json:
        self.sshkey(number)
        del self.store["sshkeys"][number]
        self.store.save()
        return {}

    def tags(self) -> list[Json]:
        return [{"label": tag} for tag in self.store.state["tags"]]

    def create_tag(self, body: Json) -> Json:
        label = self.store.check_tags([body.get("label")])[0]
        instances = [self.store.linode(number, "linodes") for number in body.get("linodes") or []]
        self.store.note_tags([label])
        for instance in instances:
            instance["tags"] = sorted({*instance["tags"], label})
        self.store.save()
        return {"label": label}

    def delete_tag(self, body: Json, label: str) -> Json:
        self.tagged(label)
        self.store.state["tags"].remove(label)
        for instance in self.store["instances"].values():
            instance["tags"] = [tag for tag in instance["tags"] if tag != label]
        self.store.save()
        return {}

    def tagged(self, label: str) -> list[Json]:
        if label not in self.store.state["tags"]:
            raise ApiError(404, "Not found")
        return [{"type": "linode", "data": one} for one in self.store["instances"].values() if label in one["tags"]]
