"""What it takes to bring a fleet of Linodes to its declared state: plan() decides, purely; apply() does it.

A fleet NAME owns the instances that carry its tag, plimsoll-fleet-NAME, and are labelled NAME-1, NAME-2, ... Both must
hold before anything touches an instance. Linode takes any 3 to 50 characters in a tag; this one has only letters,
digits and dashes, as it goes into the X-Filter header and, with other tools, into the path /tags/TAG and into
comma-separated lists, where `:`, `=`, blanks and commas need quoting.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from .linode import Deadline, LinodeError, NoAnswer, Refused

INSTANCES = "/linode/instances"
# Linode gives private addresses of a region out of this network.
PRIVATE_NETWORK = ipaddress.ip_network("192.168.128.0/17")
# POST /linode/instances takes 20 in 15 s; a few at a time fill that.
SIDE_BY_SIDE = 10
# A new instance passes through offline between provisioning and booting; one that stays there needs a boot.
OFFLINE_GRACE_S = 30.0
# A boot that fails thrice is not going to work by waiting.
BOOT_TRIES = 3
POLL_FIRST_S, POLL_MOST_S = 1.0, 5.0
# One look-up and one more POST settle a lost answer; what is lost three times in a row is not an accident.
CREATE_TRIES = 3
USER_DATA_MAX_BYTES = 65535

OFF = {"offline", "stopped"}
# No boot and no waiting brings an instance back from these.
UNUSABLE = {"deleting": "is being deleted; run again when it is gone", "billing_suspension": "is suspended for billing"}

_NAME = re.compile(r"[a-z](?:-?[a-z0-9])*")
_PUBLIC_KEY = re.compile(r"(?:ssh-|ecdsa-|sk-)\S+ [A-Za-z0-9+/=]+(?: .*)?")


def tag_of(name: str) -> str:
    """The ownership tag of the fleet."""
    return f"plimsoll-fleet-{name}"


def label_of(name: str, index: int) -> str:
    """Label, and host name, of the fleet's instance number index, from 1."""
    return f"{name}-{index}"


def index_of(name: str, label: str) -> int | None:
    """The number in a label of this fleet, or None for any other label."""
    matched = re.fullmatch(re.escape(name) + r"-([1-9][0-9]*)", label)
    return int(matched[1]) if matched else None


@dataclass(frozen=True)
class Desired:
    """The fleet as declared. count 0 is a fleet that is absent, and then only name matters."""

    name: str
    count: int = 0
    type: str = ""
    region: str = ""
    image: str = ""
    tags: tuple[str, ...] = ()
    authorized_keys: tuple[str, ...] = ()
    private_ip: bool = False
    user_data: str = ""

    @property
    def labels(self) -> list[str]:
        return [label_of(self.name, index) for index in range(1, self.count + 1)]

    @property
    def all_tags(self) -> list[str]:
        return [tag_of(self.name), *(tag for tag in self.tags if tag != tag_of(self.name))]

    def check(self) -> None:
        """Raises ValueError naming the value that Linode, or a host name, could not take."""
        if not _NAME.fullmatch(self.name) or not 2 <= len(self.name) <= 32:
            raise ValueError(
                f"name: {self.name!r} must have 2 to 32 lower-case letters, digits and single dashes, and begin with a"
                " letter: it becomes labels, host names and a tag"
            )
        if self.count < 0:
            raise ValueError(f"count: {self.count} is below 0")
        for tag in self.tags:
            if not 3 <= len(tag) <= 50:
                raise ValueError(f"tags: {tag!r} has {len(tag)} characters, Linode takes 3 to 50")
        if self.count and not self.authorized_keys:
            raise ValueError("authorized_keys: at least one is needed, or nobody could log in")
        cloud_config(self.user_data)


@dataclass(frozen=True)
class Instance:
    """One instance as the API lists it."""

    id: int
    label: str
    status: str
    type: str
    region: str
    image: str | None
    tags: tuple[str, ...]
    ipv4: tuple[str, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Instance:
        tags, ipv4 = tuple(raw.get("tags") or ()), tuple(raw.get("ipv4") or ())
        return cls(raw["id"], raw["label"], raw["status"], raw["type"], raw["region"], raw.get("image"), tags, ipv4)

    @property
    def public_ipv4(self) -> str | None:
        return next((at for at in self.ipv4 if ipaddress.ip_address(at) not in PRIVATE_NETWORK), None)

    @property
    def private_ipv4(self) -> str | None:
        return next((at for at in self.ipv4 if ipaddress.ip_address(at) in PRIVATE_NETWORK), None)


def owned(name: str, instances: Iterable[Instance]) -> dict[str, Instance]:
    """The instances of this fleet by label, in the order of their numbers: those with its tag and such a label."""
    mine = [one for one in instances if tag_of(name) in one.tags and index_of(name, one.label)]
    return {one.label: one for one in sorted(mine, key=lambda one: index_of(name, one.label) or 0)}


@dataclass(frozen=True)
class Step:
    """One thing to do to one instance: create, update (tags), boot, keep, delete, or blocked, which nothing may do.

    before and after hold the attributes that differ; reason is a sentence for the reader.
    """

    action: str
    label: str
    id: int | None = None
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def as_data(self) -> dict[str, Any]:
        return {
            "action": self.action,
            "label": self.label,
            "id": self.id,
            "before": dict(self.before),
            "after": dict(self.after),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Plan:
    """Steps in the order of the labels; an instance may have an update and a boot."""

    steps: tuple[Step, ...]

    def of(self, *actions: str) -> list[Step]:
        return [step for step in self.steps if step.action in actions]

    @property
    def changes(self) -> bool:
        return bool(self.of("create", "update", "boot", "delete"))

    def diff(self) -> dict[str, str]:
        """In the shape of Ansible's diff mode: YAML of what each instance that changes is before and after."""
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        for step in self.of("create", "update", "boot", "delete"):
            if step.action != "create":
                before.setdefault(step.label, {}).update(step.before)
            if step.action != "delete":
                after.setdefault(step.label, {}).update(step.after)
        return {"before_header": "fleet", "after_header": "fleet", "before": _yaml(before), "after": _yaml(after)}


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, width=1000) if data else ""


def plan(desired: Desired, listed: Iterable[Instance], known: Collection[str], max_delete: int = 0) -> Plan:
    """What to do. listed: every instance with the fleet's tag or one of its labels; known: labels with a pinned key."""
    listed = list(listed)
    mine = owned(desired.name, listed)
    # An instance of ours comes first: Linode keeps labels unique, this does not rely on it.
    at_label = {**{one.label: one for one in listed}, **mine}
    steps: list[Step] = []
    for label in desired.labels:
        found = at_label.get(label)
        if found is None:
            after = {"status": "running", **_declared(desired), "private_ip": desired.private_ip}
            steps.append(Step("create", label, after={**after, "tags": desired.all_tags}))
        elif label not in mine:
            reason = (
                f"instance {found.id} has this label but not the tag {tag_of(desired.name)}: it is not of this fleet;"
                " rename it, or give the fleet another name"
            )
            steps.append(Step("blocked", label, found.id, reason=reason))
        else:
            steps += _bring(desired, found, label in known)
    victims = [one for one in mine.values() if one.label not in set(desired.labels)]
    action, reason = "delete", ""
    if len(victims) > max_delete:
        action = "blocked"
        reason = f"would be deleted, {len(victims)} in all, and max_delete is {max_delete}: set it to {len(victims)}"
    for victim in victims:
        before = {**_attributes(victim), "tags": list(victim.tags)}
        steps.append(Step(action, victim.label, victim.id, before, reason=reason))
    return Plan(tuple(steps))


def _declared(desired: Desired) -> dict[str, Any]:
    return {"type": desired.type, "region": desired.region, "image": desired.image}


def _attributes(one: Instance) -> dict[str, Any]:
    return {"status": one.status, "type": one.type, "region": one.region, "image": one.image}


def _bring(desired: Desired, found: Instance, known: bool) -> list[Step]:
    """The steps for an instance of ours that is to stay."""

    def blocked(reason: str) -> list[Step]:
        return [Step("blocked", found.label, found.id, reason=reason)]

    if found.status in UNUSABLE:
        return blocked(f"instance {found.id} {UNUSABLE[found.status]}")
    has = _attributes(found)
    # An instance whose image is gone has none to compare.
    differs = {key: value for key, value in _declared(desired).items() if has[key] not in (value, None)}
    if desired.private_ip and not found.private_ipv4:
        has["private_ip"], differs["private_ip"] = "no", "yes"
    if differs:
        what = ", ".join(f"{key} {has[key]}, declared {value}" for key, value in differs.items())
        return blocked(f"instance {found.id} has {what}, which is not changed in place: declare that, or delete it")
    if not known:
        return blocked(
            f"instance {found.id} runs, but no SSH host key of it is pinned on this controller: bring its line of"
            " .plimsoll/known_hosts from the controller that made it, or delete it"
        )
    steps = []
    has_tags = {tag.casefold() for tag in found.tags}
    if missing := [tag for tag in desired.all_tags if tag.casefold() not in has_tags]:
        tags = {"tags": list(found.tags)}, {"tags": [*found.tags, *missing]}
        steps.append(Step("update", found.label, found.id, *tags))
    if found.status in OFF:
        steps.append(Step("boot", found.label, found.id, {"status": found.status}, {"status": "running"}))
    waits = "" if found.status == "running" else f"is {found.status}: waited for"
    return steps or [Step("keep", found.label, found.id, reason=waits)]


def read_keys(entries: Iterable[str]) -> tuple[str, ...]:
    """Public keys out of a list of keys and of paths of files with one key a line. Raises ValueError, OSError."""
    keys: list[str] = []
    for entry in entries:
        text = entry.strip()
        lines = [text] if _PUBLIC_KEY.fullmatch(text) else Path(text).expanduser().read_text().splitlines()
        for line in (line.strip() for line in lines):
            if line and not line.startswith("#"):
                if not _PUBLIC_KEY.fullmatch(line):
                    raise ValueError(f"authorized_keys: {text} holds a line that is no public key (give the .pub file)")
                keys.append(line)
    return tuple(dict.fromkeys(keys))


OURS = ("hostname", "fqdn", "preserve_hostname", "ssh_deletekeys", "ssh_keys")


def cloud_config(text: str) -> dict[str, Any]:
    """The user's own cloud-config as a mapping; empty text gives an empty one. Raises ValueError."""
    if not text.strip():
        return {}
    if text.split("\n", 1)[0].strip() != "#cloud-config":
        raise ValueError("user_data: the first line must be #cloud-config; it is merged with what pins the host key")
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # The problem and its place, and no excerpt: user_data may hold secrets.
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"user_data: no valid YAML: {getattr(error, 'problem', 'unreadable')}{at}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError("user_data: a cloud-config is a mapping")
    if taken := [key for key in OURS if key in loaded]:
        raise ValueError(f"user_data: {', '.join(taken)} is plimsoll's to set: it names each host and pins its SSH key")
    return loaded


def user_data(label: str, private_key: str, public_key: str, extra: str = "") -> str:
    """The cloud-config of one instance: its name, its only SSH host key, and the user's own. Raises ValueError."""
    ours = {
        "hostname": label,
        "fqdn": label,
        "preserve_hostname": False,
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": private_key, "ed25519_public": public_key},
    }
    text = "#cloud-config\n" + yaml.safe_dump({**ours, **cloud_config(extra)}, sort_keys=False)
    if len(text.encode()) > USER_DATA_MAX_BYTES:
        raise ValueError(f"user_data: {len(text.encode())} bytes with the host key, Linode takes {USER_DATA_MAX_BYTES}")
    return text


class Api(Protocol):
    """What apply() needs of linode.Api."""

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any: ...
    def put(self, path: str, body: Mapping[str, Any]) -> Any: ...
    def delete(self, path: str) -> Any: ...
    def list(self, path: str, filters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]: ...


class Keys(Protocol):
    """What apply() needs of hostkeys.HostKeys."""

    def pair(self, label: str) -> tuple[str, str]: ...
    def forget(self, labels: Collection[str]) -> bool: ...


@dataclass(frozen=True)
class Result:
    """What became of one instance of the plan. error is empty where all went well; instance may be None."""

    label: str
    actions: tuple[str, ...]
    instance: Instance | None = None
    error: str = ""
    gone: bool = False

    def as_data(self) -> dict[str, Any]:
        one = self.instance
        return {
            "label": self.label,
            "actions": list(self.actions),
            "id": one.id if one else None,
            "status": "absent" if self.gone else one.status if one else "unknown",
            "ipv4": one.public_ipv4 if one else None,
            "private_ipv4": one.private_ipv4 if one else None,
            "tags": list(one.tags) if one else [],
            "error": self.error,
        }


def listing(api: Api, name: str) -> list[Instance]:
    """Every instance with the fleet's tag, or with a label like its own, in one request."""
    either = [{"tags": tag_of(name)}, {"label": {"+contains": f"{name}-"}}]
    return [Instance.of(raw) for raw in api.list(INSTANCES, {"+or": either})]


def tagged(api: Api, name: str) -> list[dict[str, Any]]:
    """The API's own objects of every instance with the fleet's tag, in one request."""
    return api.list(INSTANCES, {"tags": tag_of(name)})


def _mine(api: Api, name: str) -> dict[str, Instance]:
    return owned(name, (Instance.of(raw) for raw in tagged(api, name)))


def apply(
    plan: Plan, desired: Desired, listed: Iterable[Instance], api: Api, keys: Keys, deadline: Deadline, wait: bool
) -> list[Result]:
    """Carry the plan out, all instances side by side, and with wait see each one running, or gone.

    One instance that fails does not stop another; its Result says why. The host keys of what is to be created must be
    made and pinned before. Raises ValueError for a plan with anything blocked.
    """
    if plan.of("blocked"):
        raise ValueError("a plan with blocked steps is not to be carried out")
    found = owned(desired.name, listed)
    steps: dict[str, list[Step]] = {}
    for step in plan.steps:
        steps.setdefault(step.label, []).append(step)

    def one(label: str) -> Result:
        result = Result(label, tuple(step.action for step in steps[label]), found.get(label))
        try:
            for step in steps[label]:
                result = replace(result, instance=_do(step, desired, api, keys)) if step.action != "keep" else result
        except (LinodeError, ValueError, OSError) as error:
            return replace(result, error=str(error))
        return result

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        results = {result.label: result for result in pool.map(one, steps)}
    if wait:
        _settle(results, desired.name, api, deadline)
    for label, result in results.items():
        if "delete" in result.actions and not result.error:
            results[label] = replace(result, gone=True)
    keys.forget([label for label, result in results.items() if result.gone])
    return list(results.values())


def _do(step: Step, desired: Desired, api: Api, keys: Keys) -> Instance | None:
    path = f"{INSTANCES}/{step.id}"
    if step.action == "create":
        return _create(step.label, desired, api, keys)
    if step.action == "update":
        return Instance.of(api.put(path, dict(step.after)))
    if step.action == "boot":
        api.post(f"{path}/boot")
    elif step.action == "delete":
        try:
            api.delete(path)
        except Refused as error:
            if error.status != 404:  # 404: somebody else was quicker, or our first answer was lost
                raise
    return None


def _create(label: str, desired: Desired, api: Api, keys: Keys) -> Instance:
    """POST, and where the answer is lost look for the instance before another POST: the API may have made it."""
    text = user_data(label, *keys.pair(label), desired.user_data)
    body = {
        "label": label,
        "type": desired.type,
        "region": desired.region,
        "image": desired.image,
        "tags": desired.all_tags,
        "authorized_keys": list(desired.authorized_keys),
        "private_ip": desired.private_ip,
        "booted": True,
        "metadata": {"user_data": base64.b64encode(text.encode()).decode()},
    }
    for attempt in range(1, CREATE_TRIES + 1):
        try:
            return Instance.of(api.post(INSTANCES, body))
        except NoAnswer as lost:
            error: LinodeError = lost
        except Refused as refused:
            if not refused.names("label", "unique"):
                raise
            error = refused
        if (made := _mine(api, desired.name).get(label)) is not None:
            return made
        if isinstance(error, Refused) or attempt == CREATE_TRIES:
            raise error
    raise AssertionError("unreachable")


def _settle(results: dict[str, Result], name: str, api: Api, deadline: Deadline) -> None:
    """Poll one listing for all until each instance runs, or is gone; results is updated in place."""
    pending = {label for label, result in results.items() if not result.error and not _settled(result)}
    offline_since: dict[str, float] = {}
    boots: dict[str, int] = {}
    interval, trouble = POLL_FIRST_S, ""
    while pending:
        try:
            now = _mine(api, name)
            trouble = ""
        except NoAnswer as error:
            # What is being made goes on without us; only the deadline ends the waiting.
            now, trouble = None, str(error)
        except LinodeError as error:
            for label in pending:
                results[label] = replace(results[label], error=str(error))
            return
        for label in sorted(pending) if now is not None else ():
            seen = now.get(label) if now else None
            leaving = "delete" in results[label].actions
            if seen is not None:
                results[label] = replace(results[label], instance=seen)
            if (seen is None) if leaving else (seen is not None and seen.status == "running"):
                pending.discard(label)
            elif seen is not None and not leaving and seen.status in OFF:
                since = offline_since.setdefault(label, deadline.now())
                if deadline.now() - since >= OFFLINE_GRACE_S:
                    offline_since.pop(label)
                    if boots.get(label, 0) == BOOT_TRIES:
                        why = f"is still {seen.status} after {BOOT_TRIES} boots{_failure(api, seen)}"
                        results[label] = replace(results[label], error=why)
                        pending.discard(label)
                    else:
                        boots[label] = boots.get(label, 0) + 1
                        _nudge(api, seen)
            else:
                offline_since.pop(label, None)
        if not pending:
            return
        if deadline.remaining() <= interval:
            for label in sorted(pending):
                one = results[label].instance
                state = trouble or f"is still {one.status if one else 'unknown to the API'}"
                late = f"{state} after {deadline.seconds:g} s (wait_timeout); run again to go on waiting"
                results[label] = replace(results[label], error=late)
            return
        deadline.sleep(interval)
        interval = min(interval * 1.5, POLL_MOST_S)


def _settled(result: Result) -> bool:
    """Whether nothing is left to wait for: it ran when it was listed, and only its tags were touched."""
    running = result.instance is not None and result.instance.status == "running"
    return running and set(result.actions) <= {"keep", "update"}


def _nudge(api: Api, one: Instance) -> None:
    """Boot an instance that stays off; a refusal is settled by a later poll or by the deadline."""
    try:
        api.post(f"{INSTANCES}/{one.id}/boot")
    except (Refused, NoAnswer):
        return


def _failure(api: Api, one: Instance) -> str:
    """What the API's own events say of the last failure of an instance, as the end of a sentence."""
    filters = {"entity.id": one.id, "entity.type": "linode", "+order_by": "id", "+order": "desc"}
    try:
        events = api.list("/account/events", filters)
    except LinodeError:
        return ""
    failed = next((event for event in events if event.get("status") == "failed"), {})
    said = " ".join(str(failed.get("message") or "").split())[:300]
    return f"; its last failed event, {failed.get('action')}, says: {said or 'nothing'}" if failed else ""


def as_data(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Steps for a module's return value."""
    return [step.as_data() for step in steps]
