"""What a fleet of Linodes is declared to be, and what it takes to get there: plan() decides, purely.

A fleet NAME owns the instances that carry its tag, plimsoll-fleet-NAME, and are labelled NAME-1, NAME-2, ... (by
count), NAME-gate (by name), or NAME-GROUP-1 and NAME-GROUP-gate in a group of the fleet. Both must hold before anything
touches an instance. Linode takes any 3 to 50 characters in a tag; this one has only letters, digits and dashes, as it
goes into the X-Filter header and, with other tools, into the path /tags/TAG and into comma-separated lists, where `:`,
`=`, blanks and commas need quoting.

The API does not tell what user_data, keys and swap size an instance was made with. Digests of them are kept in a second
tag, plimsoll-inputs-IMAGE-KEYS-USERDATA-SWAP, so that nothing has to be remembered here.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .metadata import USER_DATA_MAX_BYTES, cloud_config

# Linode gives private addresses of a region out of this network.
PRIVATE_NETWORK = ipaddress.ip_network("192.168.128.0/17")
# Whoever puts this tag on an instance, by hand too, keeps it from being deleted and wiped.
PROTECT_TAG = "plimsoll-protect"
INPUTS_TAG = "plimsoll-inputs-"
INPUTS = ("image", "authorized_keys", "user_data", "swap_size")
DIGEST_LETTERS = 7
# More than the host key and the name take of an instance's user_data, so that what is too long is known beforehand.
USER_DATA_OURS = 2048

OFF = {"offline", "stopped"}
# No boot and no waiting brings an instance back from these.
UNUSABLE = {"deleting": "is being deleted; run again when it is gone", "billing_suspension": "is suspended for billing"}
# What takes a host down, and is done a few hosts at a time, its workers drained before.
DISRUPTIVE = ("resize", "rebuild", "replace", "shutdown", "delete")
ACTIONS = ("create", "adopt", "update", "boot", *DISRUPTIVE)
PAID = ("create", "adopt", "resize", "replace", "delete")
# What of a declaration no request changes in place: a rebuild does, or nothing but another instance.
BY_REBUILD = ("image", "authorized_keys", "user_data", "disk_encryption")
BY_REPLACE = ("region", "private_ip", "vpc", "swap_size")
# What POST .../rebuild makes of the swap disk; it takes no size.
REBUILT_SWAP_MB = 512

_NAME = re.compile(r"[a-z](?:-?[a-z0-9])*")
_PART = re.compile(r"[a-z][a-z0-9]*")
_LABEL = re.compile(r"(?:([a-z][a-z0-9]*)-)?([1-9][0-9]*|[a-z][a-z0-9]*)")


def tag_of(name: str) -> str:
    """The ownership tag of the fleet."""
    return f"plimsoll-fleet-{name}"


def label_of(name: str, group: str, rest: str | int) -> str:
    """Label, and host name, of one instance: rest is its number, from 1, or its own name."""
    return "-".join(part for part in (name, group, str(rest)) if part)


def place_of(name: str, label: str) -> tuple[str, str] | None:
    """The group ("" for none) and the number or name in a label of this fleet, or None for any other label."""
    matched = _LABEL.fullmatch(label[len(name) + 1 :]) if label.startswith(f"{name}-") else None
    return (matched[1] or "", matched[2]) if matched else None


def index_of(name: str, label: str) -> int | None:
    """The number in a label of this fleet, or None for any other label."""
    place = place_of(name, label)
    return int(place[1]) if place and place[1].isdigit() else None


@dataclass(frozen=True)
class Host:
    """What one instance is to be. What is empty or None is left to Linode, and not looked at afterwards.

    vpc is VPC/SUBNET and firewall and placement_group are labels, of what exists. power is running, offline or any;
    on_change is what to do where no request changes an instance in place: fail, rebuild, replace, or accept what it is.
    """

    type: str = ""
    region: str = ""
    image: str = ""
    tags: tuple[str, ...] = ()
    authorized_keys: tuple[str, ...] = ()
    user_data: str = ""
    private_ip: bool = False
    vpc: str = ""
    placement_group: str = ""
    firewall: str = ""
    disk_encryption: str = ""
    backups: bool = False
    swap_size: int | None = None
    power: str = "running"
    maintenance_policy: str = ""
    on_change: str = "fail"

    def check(self, where: str) -> None:
        """Raises ValueError naming the value that Linode could not take."""
        for needed in ("type", "region", "image"):
            if not getattr(self, needed):
                raise ValueError(f"{where}{needed}: must be given")
        if not self.authorized_keys:
            raise ValueError(f"{where}authorized_keys: at least one is needed, or nobody could log in")
        for tag in self.tags:
            if not 3 <= len(tag) <= 50:
                raise ValueError(f"{where}tags: {tag!r} has {len(tag)} characters, Linode takes 3 to 50")
            if tag.casefold().startswith((INPUTS_TAG, "plimsoll-fleet-")):
                raise ValueError(f"{where}tags: {tag!r} is one that plimsoll sets itself")
        if self.vpc and not re.fullmatch(r"[^/]+/[^/]+", self.vpc):
            raise ValueError(f"{where}vpc: {self.vpc!r} must be VPC/SUBNET, the labels of both")
        if self.swap_size is not None and self.swap_size < 0:
            raise ValueError(f"{where}swap_size: {self.swap_size} MB is below 0")
        cloud_config(self.user_data)
        if len(self.user_data.encode()) > USER_DATA_MAX_BYTES - USER_DATA_OURS:
            most = USER_DATA_MAX_BYTES - USER_DATA_OURS
            raise ValueError(
                f"{where}user_data: {len(self.user_data.encode())} bytes, Linode and the host key leave {most}"
            )


@dataclass(frozen=True)
class Group:
    """Hosts that are declared alike: count of them, numbered, or hosts by name. name is "" without groups."""

    name: str = ""
    host: Host = field(default_factory=Host)
    count: int = 0
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Desired:
    """The fleet as declared; without groups, one that is absent.

    adopt maps labels of the fleet to labels of instances that exist and are to become its own. remove names labels that
    go first where a count falls, and are not given again. purge_tags removes tags that nothing here declares. protect
    names labels that are not to be deleted, rebuilt or replaced.
    """

    name: str
    groups: tuple[Group, ...] = ()
    adopt: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    purge_tags: bool = False
    protect: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError naming the value that Linode, or a host name, could not take."""
        if not _NAME.fullmatch(self.name) or not 3 <= len(self.name) <= 32:
            raise ValueError(
                f"name: {self.name!r} must have 3 to 32 lower-case letters, digits and single dashes, and begin with a"
                " letter: it becomes labels, host names and a tag"
            )
        names = [group.name for group in self.groups]
        for group in self.groups:
            where = f"group {group.name}: " if group.name else ""
            if names.count(group.name) > 1:
                raise ValueError(f"groups: {group.name or 'one without a name'} is there twice")
            for part in (*([group.name] if len(self.groups) > 1 or group.name else []), *group.hosts):
                if not _PART.fullmatch(part):
                    raise ValueError(
                        f"{where}{part!r} must have lower-case letters and digits and begin with a letter: names of"
                        " groups and hosts are parts of a label, which dashes join"
                    )
            if group.count < 0:
                raise ValueError(f"{where}count: {group.count} is below 0")
            if group.hosts and group.count:
                raise ValueError(f"{where}count and hosts: give one of them")
            if len(set(group.hosts)) < len(group.hosts):
                raise ValueError(f"{where}hosts: a name is there twice")
            for label in (label_of(self.name, group.name, rest) for rest in (*group.hosts, str(group.count))):
                if len(label) > 63:
                    raise ValueError(f"{where}{label!r} has {len(label)} characters, a host name takes 63")
            if group.count or group.hosts:
                group.host.check(where)
        if twice := [one for one in self.adopt.values() if list(self.adopt.values()).count(one) > 1]:
            raise ValueError(f"adopt: {twice[0]!r} is to be two instances")
        for option, labels in (("adopt", self.adopt), ("remove", self.remove)):
            for label in labels:
                if not place_of(self.name, label):
                    raise ValueError(f"{option}: {label!r} is no label of this fleet, as {self.name}-1 is")

    def all_tags(self, host: Host) -> list[str]:
        """Every tag of a new instance: the fleet's, the digests of its inputs, and the declared ones."""
        return [tag_of(self.name), inputs_tag(self.name, host), *dict.fromkeys(host.tags)]

    def labels(self, owned: Collection[str]) -> dict[str, Host]:
        """Each label that is to be there, and what its instance is to be; owned are the labels that are there now.

        A count is met by what is there, the lowest numbers first, and then by the lowest numbers that are free.
        """
        wanted: dict[str, Host] = {}
        for group in self.groups:
            rest: list[str | int] = list(group.hosts)
            if group.count:
                places = ((place_of(self.name, label), label) for label in {*owned, *self.adopt})
                there = sorted(
                    int(place[1])
                    for place, label in places
                    if place and place[0] == group.name and place[1].isdigit() and label not in self.remove
                )[: group.count]
                number = 0
                while len(there) < group.count:
                    number += 1
                    if number not in there and label_of(self.name, group.name, number) not in self.remove:
                        there.append(number)
                rest = [*sorted(there)]
            wanted.update((label_of(self.name, group.name, one), group.host) for one in rest)
        return wanted


def inputs_tag(name: str, host: Host) -> str:
    """The tag with a digest of each of INPUTS.

    It can be read by whoever may list the account's instances, and user_data may hold a password that is short: hence a
    digest that is slow to try out (PBKDF2, RFC 8018), and cut.
    """
    return INPUTS_TAG + "-".join(_digests(name, host).values())


def _digests(name: str, host: Host) -> dict[str, str]:
    # Neither the order of keys nor what is said of their owners is a difference.
    keys = sorted(" ".join(key.split()[:2]) for key in host.authorized_keys)
    texts = {"image": host.image, "authorized_keys": "\n".join(keys), "user_data": host.user_data}
    texts["swap_size"] = str(host.swap_size)
    return {key: _digest(f"{name}/{key}", texts[key]) for key in INPUTS}


@functools.lru_cache(maxsize=256)
def _digest(salt: str, text: str) -> str:
    return hashlib.pbkdf2_hmac("sha256", text.encode(), salt.encode(), 50_000).hex()[:DIGEST_LETTERS]


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
    ipv6: str | None = None
    locks: tuple[str, ...] = ()
    placement_group: str = ""
    disk_encryption: str = ""
    backups: bool = False
    maintenance_policy: str = ""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Instance:
        return cls(
            raw["id"],
            raw["label"],
            raw["status"],
            raw["type"],
            raw["region"],
            raw.get("image"),
            tuple(raw.get("tags") or ()),
            tuple(raw.get("ipv4") or ()),
            (raw.get("ipv6") or "").split("/")[0] or None,
            tuple(raw.get("locks") or ()),
            (raw.get("placement_group") or {}).get("label") or "",
            raw.get("disk_encryption") or "",
            bool((raw.get("backups") or {}).get("enabled")),
            raw.get("maintenance_policy") or "",
        )

    @property
    def public_ipv4(self) -> str | None:
        return next((at for at in self.ipv4 if ipaddress.ip_address(at) not in PRIVATE_NETWORK), None)

    @property
    def private_ipv4(self) -> str | None:
        return next((at for at in self.ipv4 if ipaddress.ip_address(at) in PRIVATE_NETWORK), None)

    @property
    def inputs(self) -> dict[str, str]:
        """The recorded digests, by INPUTS; empty where none are recorded."""
        for tag in self.tags:
            parts = tag.removeprefix(INPUTS_TAG).split("-")
            if tag.startswith(INPUTS_TAG) and len(parts) == len(INPUTS):
                return dict(zip(INPUTS, parts))
        return {}

    def kept_by(self, protected: bool) -> str:
        """What forbids deleting and wiping it, for a sentence; empty where nothing does."""
        if self.locks:
            return f"is locked ({', '.join(self.locks)}): delete the lock first"
        if any(tag.casefold() == PROTECT_TAG for tag in self.tags):
            return f"has the tag {PROTECT_TAG}: remove that first"
        return "is protected (protect names it): take it out there first" if protected else ""


def owned(name: str, instances: Iterable[Instance]) -> dict[str, Instance]:
    """The instances of this fleet by label, in the order of their numbers: those with its tag and such a label."""
    mine = [one for one in instances if tag_of(name) in one.tags and place_of(name, one.label)]

    def order(one: Instance) -> tuple[str, int, str]:
        group, rest = place_of(name, one.label) or ("", "")
        return group, int(rest) if rest.isdigit() else 0, rest

    return {one.label: one for one in sorted(mine, key=order)}


@dataclass(frozen=True)
class Around:
    """What else a plan looks at, as far as the declaration asks for it: who is behind a firewall and in a subnet.

    Both map a label (VPC/SUBNET for a subnet) to its id and the ids of its instances.
    """

    firewalls: Mapping[str, tuple[int, frozenset[int]]] = field(default_factory=dict)
    subnets: Mapping[str, tuple[int, frozenset[int]]] = field(default_factory=dict)

    def firewall_of(self, number: int) -> str:
        return next((label for label, (_, members) in self.firewalls.items() if number in members), "")

    def subnet_of(self, number: int) -> str:
        return next((label for label, (_, members) in self.subnets.items() if number in members), "")


@dataclass(frozen=True)
class Step:
    """One thing to do to one instance: one of ACTIONS, keep, or blocked, which nothing may do.

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
    """Steps in the order of the labels; an instance may have several, in the order in which they are to be done."""

    steps: tuple[Step, ...]

    def of(self, *actions: str) -> list[Step]:
        return [step for step in self.steps if step.action in actions]

    @property
    def changes(self) -> bool:
        return bool(self.of(*ACTIONS))

    @property
    def changes_cost(self) -> bool:
        """Whether what is paid for changes."""
        return bool(self.of(*PAID)) or any("backups" in step.after for step in self.of("update"))

    @property
    def disruptive(self) -> dict[str, list[str]]:
        """The labels whose host is taken down, and the actions that do it."""
        found: dict[str, list[str]] = {}
        for step in self.of(*DISRUPTIVE):
            found.setdefault(step.label, []).append(step.action)
        return found

    def gentle(self) -> Plan:
        """What takes no host down, and does not come after what does."""
        left: list[Step] = []
        rolled = set()
        for step in self.steps:
            if step.action in DISRUPTIVE:
                rolled.add(step.label)
            elif step.label not in rolled:
                left.append(step)
        return Plan(tuple(left))

    def only(self, labels: Collection[str]) -> Plan:
        return Plan(tuple(step for step in self.steps if step.label in labels))

    def diff(self) -> dict[str, str]:
        """Of Ansible's diff mode, before and after: YAML of what each instance that changes is."""
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        for step in self.of(*ACTIONS):
            if step.action != "create":
                before.setdefault(step.label, {}).update(step.before)
            if step.action != "delete":
                after.setdefault(step.label, {}).update(step.after)
        return {"before": _yaml(before), "after": _yaml(after)}


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, width=1000) if data else ""


def plan(
    desired: Desired,
    listed: Iterable[Instance],
    known: Collection[str],
    around: Around | None = None,
    max_delete: float = 0,
) -> Plan:
    """What to do.

    listed: every instance with the fleet's tag, one of its labels, or a label to adopt; known: labels of pinned keys.
    """
    listed, around = list(listed), around or Around()
    mine = owned(desired.name, listed)
    at_label = {one.label: one for one in listed}
    wanted = desired.labels(mine)
    steps: list[Step] = []
    for label, host in wanted.items():
        source = desired.adopt.get(label, label)
        found = mine.get(label) or at_label.get(label) or at_label.get(source)
        if found is None and label in desired.adopt:
            steps.append(Step("blocked", label, reason=f"is to adopt {source}, and no instance has that label"))
        elif found is None:
            steps.append(Step("create", label, after=_made(desired, host)))
        elif label in mine:
            steps += _bring(desired, host, label, found, label in known, around)
        elif found.label != source or label not in desired.adopt:
            reason = (
                f"instance {found.id} has this label but not the tag {tag_of(desired.name)}: it is not of this fleet;"
                f" adopt it ({label}: {found.label}), rename it, or give the fleet another name"
            )
            steps.append(Step("blocked", label, found.id, reason=reason))
        elif theirs := next((tag for tag in found.tags if tag.startswith(tag_of(""))), None):
            reason = f"is to adopt {source}, which a fleet has already: {theirs}"
            steps.append(Step("blocked", label, found.id, reason=reason))
        else:
            steps += _bring(desired, host, label, found, label in known, around)
    for label in desired.adopt:
        if label not in wanted:
            reason = f"is to adopt {desired.adopt[label]}, but no such host is declared: raise the count, or name it"
            steps.append(Step("blocked", label, reason=reason))
    victims = [one for one in mine.values() if one.label not in wanted and one.status != "deleting"]
    too_many = f"would be deleted, {len(victims)} in all, and max_delete is {max_delete}: set it to {len(victims)}"
    for victim in victims:
        why = victim.kept_by(victim.label in desired.protect) or (too_many if len(victims) > max_delete else "")
        before = {**_attributes(victim), "tags": list(victim.tags)}
        steps.append(Step("blocked" if why else "delete", victim.label, victim.id, before, reason=why))
    return Plan(tuple(steps))


def _attributes(one: Instance) -> dict[str, Any]:
    return {"status": one.status, "type": one.type, "region": one.region, "image": one.image}


def _made(desired: Desired, host: Host) -> dict[str, Any]:
    """What a new instance is, as far as it is declared; without user_data and keys, of which the tag has digests."""
    status = "offline" if host.power == "offline" else "running"
    whole: dict[str, Any] = {"status": status, "type": host.type, "region": host.region, "image": host.image}
    whole |= {"private_ip": host.private_ip, "tags": desired.all_tags(host)}
    more = ("firewall", "vpc", "placement_group", "disk_encryption", "backups", "maintenance_policy")
    whole |= {key: value for key in more if (value := getattr(host, key))}
    return whole if host.swap_size is None else {**whole, "swap_size": host.swap_size}


def _drift(desired: Desired, host: Host, found: Instance, around: Around) -> dict[str, tuple[Any, Any]]:
    """What no PUT changes and differs: name to (what it has, what is declared); ("recorded", "changed") of a secret."""
    recorded, now = found.inputs, _digests(desired.name, host)
    differs: dict[str, tuple[Any, Any]] = {}
    if host.region != found.region:
        differs["region"] = found.region, host.region
    # An instance whose image is no more has none to compare; its digest is left.
    gone = not found.image and recorded.get("image", now["image"]) != now["image"]
    if gone or found.image not in (host.image, None):
        differs["image"] = found.image, host.image
    for key in ("authorized_keys", "user_data"):
        if recorded.get(key, now[key]) != now[key]:
            differs[key] = f"digest {recorded[key]}", f"digest {now[key]}"
    if host.swap_size is not None and recorded.get("swap_size", now["swap_size"]) != now["swap_size"]:
        differs["swap_size"] = "another", host.swap_size
    if host.private_ip and not found.private_ipv4:
        differs["private_ip"] = False, True
    if host.vpc and (has := around.subnet_of(found.id)) != host.vpc:
        differs["vpc"] = has or None, host.vpc
    if host.disk_encryption not in ("", found.disk_encryption):
        differs["disk_encryption"] = found.disk_encryption, host.disk_encryption
    return differs


def _bring(desired: Desired, host: Host, label: str, found: Instance, known: bool, around: Around) -> list[Step]:
    """The steps for an instance of ours, or to become ours, that is to stay."""

    def blocked(reason: str) -> list[Step]:
        return [Step("blocked", label, found.id, reason=reason)]

    if found.status in UNUSABLE:
        return blocked(f"instance {found.id} {UNUSABLE[found.status]}")
    if not known:
        return blocked(
            f"instance {found.id} exists, but no SSH host key of it is pinned on this controller: bring its line of"
            f" .plimsoll/known_hosts from the controller that made it, or add one, `{label} ssh-ed25519 ...`, with the"
            " key that its console (Lish) shows in /etc/ssh/ssh_host_ed25519_key.pub"
        )
    steps: list[Step] = []
    differs = _drift(desired, host, found, around)
    accepted = differs if host.on_change == "accept" else {}
    wiped = ""
    if differs and not accepted:
        wiped = host.on_change
        what = ", ".join(
            f"other {key} than declared" if str(has).startswith("digest ") else f"{key} {has}, declared {value}"
            for key, (has, value) in differs.items()
        )
        says = f"instance {found.id} has {what}, which no request changes in place"
        if wiped == "fail":
            remedy = "rebuild" if set(differs) <= set(BY_REBUILD) else "replace"
            return blocked(f"{says}: declare that, set on_change to {remedy}, or to accept to leave it so")
        if wiped == "rebuild" and not set(differs) <= set(BY_REBUILD):
            more = [key for key in differs if key in BY_REPLACE]
            return blocked(f"{says}, and a rebuild keeps {', '.join(more)}: set on_change to replace, or declare that")
        # It has parameters neither for the swap disk nor for interfaces, whose configuration goes with the disks.
        if wiped == "rebuild" and (host.vpc or host.swap_size not in (None, REBUILT_SWAP_MB)):
            loses = "takes it out of its VPC" if host.vpc else f"makes swap {REBUILT_SWAP_MB} MB again"
            return blocked(f"{says}, and a rebuild {loses}: set on_change to replace, or declare that")
        if kept := found.kept_by(label in desired.protect):
            return blocked(f"{says}, and a {wiped} wipes it, but it {kept}")

    adopts = label != found.label or tag_of(desired.name) not in found.tags
    if adopts and wiped:
        return blocked(f"{says}, and adopting wipes nothing: set on_change to accept, or declare that, for this run")
    before, after = _in_place(desired, host, label, found, around, bool(accepted))
    has_tags = after.get("tags", list(found.tags))
    reason = f"{', '.join(differs)} differ"
    was, shall = ({key: pair[at] for key, pair in differs.items()} for at in (0, 1))
    # The fleet's own before it is taken down: what is waited for is found by the tag, and a run may end in between.
    if after and wiped != "replace":
        steps.append(Step("adopt" if adopts else "update", label, found.id, before, after))
    if wiped == "replace":
        made, had = _made(desired, host), {**_attributes(found), "tags": has_tags}
        lower = {tag.casefold() for tag in made["tags"]}
        theirs = [tag for tag in has_tags if tag.casefold() not in lower and not tag.startswith(INPUTS_TAG)]
        made["tags"] = [*made["tags"], *theirs]
        steps.append(Step("replace", label, found.id, {**was, **had}, {**shall, **made}, reason))
        return steps
    if found.type != host.type:
        steps.append(Step("resize", label, found.id, {"type": found.type}, {"type": host.type}))
    if wiped == "rebuild":
        # Only now: a run that is killed before it rebuilds once more.
        tags = _in_place(desired, host, label, found, around, True)[1].get("tags", has_tags)
        steps.append(Step("rebuild", label, found.id, {**was, "tags": has_tags}, {**shall, "tags": tags}, reason))
    elif found.status in OFF and host.power == "running":
        steps.append(Step("boot", label, found.id, {"status": found.status}, {"status": "running"}))
    elif found.status not in {*OFF, "shutting_down"} and host.power == "offline":
        steps.append(Step("shutdown", label, found.id, {"status": found.status}, {"status": "offline"}))
    return steps or [Step("keep", label, found.id, reason=_why_kept(host, found, accepted))]


def _why_kept(host: Host, found: Instance, accepted: Collection[str]) -> str:
    if found.status != "running" and host.power == "running":
        return f"is {found.status}: waited for"
    if accepted:
        return f"differs in {', '.join(accepted)}, which on_change accepts"
    return "" if found.inputs else "what it was made with is not recorded, so keys and user_data are not compared"


def _in_place(
    desired: Desired, host: Host, label: str, found: Instance, around: Around, record: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Before and after of what requests change without a restart. record: whether it gets the declared inputs."""
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}

    def change(key: str, has: Any, shall: Any) -> None:
        if has != shall:
            before[key], after[key] = has, shall

    change("label", found.label, label)
    inputs = [inputs_tag(desired.name, host)] if record else [tag for tag in found.tags if tag.startswith(INPUTS_TAG)]
    declared = [tag_of(desired.name), *inputs, *dict.fromkeys(host.tags)]
    theirs = [tag for tag in found.tags if not tag.startswith(INPUTS_TAG) or tag in inputs]
    if desired.purge_tags:
        lower = {tag.casefold() for tag in declared}
        theirs = [tag for tag in theirs if tag.casefold() in {*lower, PROTECT_TAG}]
    has = {tag.casefold() for tag in theirs}
    change("tags", list(found.tags), [*theirs, *(tag for tag in declared if tag.casefold() not in has)])
    if host.maintenance_policy:
        change("maintenance_policy", found.maintenance_policy, host.maintenance_policy)
    if host.backups:
        change("backups", found.backups, True)
    if host.placement_group:
        change("placement_group", found.placement_group or None, host.placement_group)
    if host.firewall:
        change("firewall", around.firewall_of(found.id) or None, host.firewall)
    return before, after


def monthly_cost(
    desired: Desired, listed: Iterable[Instance], todo: Plan, types: Iterable[Mapping[str, Any]]
) -> dict[str, float | str]:
    """What the fleet's instances cost a month before and after the plan, by the price list (objects of /linode/types).

    In USD, without transfer. A type that is not sold any more has no price there, and counts as 0.
    """
    listed = list(listed)
    prices, by_id = {one["id"]: one for one in types}, {one.id: one for one in listed}

    def price(kind: str, region: str, backups: bool) -> float:
        one = prices.get(kind) or {}
        charged = [one, (one.get("addons") or {}).get("backups") or {}] if backups else [one]
        return sum(monthly(each, region) for each in charged)

    mine = owned(desired.name, listed)
    now = {label: (one.type, one.region, one.backups) for label, one in mine.items()}
    then = dict(now)
    wanted = desired.labels(mine)
    for step in todo.of(*ACTIONS):
        if step.action == "delete":
            del then[step.label]
        elif step.action in ("create", "replace"):
            host = wanted[step.label]
            then[step.label] = host.type, host.region, host.backups
        elif step.id in by_id:
            one = by_id[step.id]
            # What is adopted was paid for before, but not by this fleet.
            kind, region, backups = then.get(step.label, (one.type, one.region, one.backups))
            then[step.label] = step.after.get("type", kind), region, step.after.get("backups", backups)
    sums = (round(sum(price(*one) for one in each.values()), 2) for each in (now, then))
    return {"currency": "USD", **dict(zip(("monthly_before", "monthly_after"), sums))}


def monthly(one: Mapping[str, Any], region: str) -> float:
    """What an object of /linode/types, or an addon of it, costs a month in a region, USD."""
    here = next((each for each in one.get("region_prices") or [] if each.get("id") == region), one.get("price") or {})
    return float(here.get("monthly") or 0)


def as_data(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Steps for a module's return value."""
    return [step.as_data() for step in steps]
