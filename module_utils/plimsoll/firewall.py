"""A fleet's Cloud Firewall: what its rules are to be, whom they would shut out, and bringing it there.

A fleet owns a firewall that has its tag. Rules are compared as the API means them: order of addresses, blanks in ports
and the case of a protocol are no difference.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Union

import yaml

from .fleet import Instance, tag_of
from .linode import LinodeError, NoAnswer, Refused

FIREWALLS = "/networking/firewalls"
# Limits of Linode: rules of a firewall, in and out together; addresses and pieces of ports of a rule.
MOST_RULES, MOST_ADDRESSES, MOST_PORTS = 25, 255, 15
SSH_PORT = 22
CREATE_TRIES = 3
# Addresses of documentation (RFC 5737, RFC 3849): a UDP socket that is connected to one sends nothing.
FAR_AWAY = {socket.AF_INET: "203.0.113.1", socket.AF_INET6: "2001:db8::1"}

_LABEL = re.compile(r"[A-Za-z](?:[._-]?[A-Za-z0-9])*")
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


@dataclass(frozen=True)
class Rule:
    """One rule. addresses are networks; from_fleet adds those of the fleet's instances, once they are known."""

    label: str
    action: str = "ACCEPT"
    protocol: str = "TCP"
    ports: str = ""
    addresses: tuple[Network, ...] = ()
    from_fleet: bool = False
    description: str = ""

    def line(self) -> str:
        """For --diff."""
        what = " ".join(word for word in (self.action, self.protocol, self.ports) if word)
        note = f" ({self.description})" if self.description else ""
        return f"{self.label}: {what} from {', '.join(map(str, self.addresses))}{note}"

    def body(self) -> dict[str, Any]:
        """As the API takes it. It refuses an empty list of addresses beside one that is not."""
        versions = {f"ipv{number}": [str(at) for at in self.addresses if at.version == number] for number in (4, 6)}
        body: dict[str, Any] = {"label": self.label, "action": self.action, "protocol": self.protocol}
        body["addresses"] = {version: found for version, found in versions.items() if found}
        body |= {key: value for key in ("ports", "description") if (value := getattr(self, key))}
        return body


def rule_of(given: Mapping[str, Any], where: str) -> Rule:
    """A declared rule: label, action, protocol, ports, addresses, from_fleet, description. Raises ValueError."""
    label = given["label"]
    where = f"{where}: rule {label!r}"
    if not _LABEL.fullmatch(label) or not 3 <= len(label) <= 32:
        raise ValueError(f"{where}: a label has 3 to 32 letters, digits and single - _ . and begins with a letter")
    protocol, ports = (given.get("protocol") or "TCP").upper(), _ports(given.get("ports") or "", where)
    if ports and protocol not in ("TCP", "UDP"):
        raise ValueError(f"{where}: {protocol} has no ports")
    networks = {_network(at, where): None for at in given.get("addresses") or ()}
    if not networks and not given.get("from_fleet"):
        raise ValueError(f"{where}: addresses must be given, or from_fleet; 0.0.0.0/0 and ::/0 are everybody")
    action, description = (given.get("action") or "ACCEPT").upper(), given.get("description") or ""
    return Rule(label, action, protocol, ports, tuple(networks), bool(given.get("from_fleet")), description)


def _ports(text: str, where: str) -> str:
    pieces = [piece.strip() for piece in str(text).split(",") if piece.strip()]
    if len(pieces) > MOST_PORTS:
        raise ValueError(f"{where}: ports has {len(pieces)} pieces, Linode takes {MOST_PORTS}")
    for piece in pieces:
        matched = _PORTS.fullmatch(piece)
        low, high = (int(matched[1]), int(matched[2] or matched[1])) if matched else (0, 0)
        if not 1 <= low <= high <= 65535:
            raise ValueError(f"{where}: ports: {piece!r} must be a port, or a range such as 8000-8010")
    return ", ".join(pieces)


def _network(text: Any, where: str) -> Network:
    try:
        # 203.0.113.5/24 means the network that it is in.
        return ipaddress.ip_network(str(text).strip(), strict=False)
    except ValueError:
        raise ValueError(f"{where}: addresses: {text!r} is no IP address or network") from None


def read_rule(raw: Mapping[str, Any]) -> Rule:
    """A rule as the API lists it."""
    addresses = raw.get("addresses") or {}
    networks = (ipaddress.ip_network(at, strict=False) for key in ("ipv4", "ipv6") for at in addresses.get(key) or ())
    ports = ", ".join(piece.strip() for piece in (raw.get("ports") or "").split(",") if piece.strip())
    label, action, protocol = (raw.get(key) or "" for key in ("label", "action", "protocol"))
    return Rule(label, action.upper(), protocol.upper(), ports, tuple(networks), False, raw.get("description") or "")


def _same(one: Rule, other: Rule) -> bool:
    return replace(one, addresses=()) == replace(other, addresses=()) and set(one.addresses) == set(other.addresses)


@dataclass(frozen=True)
class Desired:
    """A firewall as declared. None leaves what is there alone; a new one then drops what comes in, and lets out."""

    label: str
    fleet: str
    inbound: tuple[Rule, ...] | None = None
    outbound: tuple[Rule, ...] | None = None
    inbound_policy: str | None = None
    outbound_policy: str | None = None
    tags: tuple[str, ...] = ()
    mode: str = "append"

    def check(self) -> None:
        """Raises ValueError naming the value that Linode could not take."""
        if not _LABEL.fullmatch(self.label) or not 3 <= len(self.label) <= 32:
            raise ValueError(
                f"label: {self.label!r} must have 3 to 32 letters, digits and single - _ . and begin with a letter"
            )
        for tag in self.tags:
            if not 3 <= len(tag) <= 50:
                raise ValueError(f"tags: {tag!r} has {len(tag)} characters, Linode takes 3 to 50")
        for name, rules in (("inbound", self.inbound or ()), ("outbound", self.outbound or ())):
            labels = [rule.label for rule in rules]
            if twice := next((label for label in labels if labels.count(label) > 1), None):
                raise ValueError(f"{name}: two rules are labelled {twice!r}")

    @property
    def names_fleet(self) -> bool:
        return any(rule.from_fleet for rule in (*(self.inbound or ()), *(self.outbound or ())))


@dataclass(frozen=True)
class Firewall:
    """A firewall as the API lists it; attached are (kind, label) of what is behind it, None where that is not told."""

    id: int
    label: str
    tags: tuple[str, ...]
    inbound: tuple[Rule, ...]
    outbound: tuple[Rule, ...]
    inbound_policy: str
    outbound_policy: str
    attached: tuple[tuple[str, str], ...] | None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Firewall:
        rules, entities = raw.get("rules") or {}, raw.get("entities")
        return cls(
            raw["id"],
            raw["label"],
            tuple(raw.get("tags") or ()),
            tuple(map(read_rule, rules.get("inbound") or ())),
            tuple(map(read_rule, rules.get("outbound") or ())),
            rules.get("inbound_policy") or "ACCEPT",
            rules.get("outbound_policy") or "ACCEPT",
            None if entities is None else tuple((each["type"], each.get("label") or "") for each in entities),
        )

    def as_data(self) -> dict[str, Any]:
        return {
            "tags": list(self.tags),
            "inbound_policy": self.inbound_policy,
            "inbound": [rule.line() for rule in self.inbound],
            "outbound_policy": self.outbound_policy,
            "outbound": [rule.line() for rule in self.outbound],
        }


@dataclass(frozen=True)
class Step:
    """What to do: create, update, keep, delete, or blocked. wanted is the firewall as it is then."""

    action: str
    label: str
    id: int | None = None
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    wanted: Firewall | None = None

    def as_data(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("action", "label", "id", "before", "after", "reason")}

    @property
    def changes(self) -> bool:
        return self.action in ("create", "update", "delete")

    def diff(self) -> dict[str, str]:
        """In the shape of Ansible's diff mode."""
        whole = {"before_header": f"firewall {self.label}", "after_header": f"firewall {self.label}"}
        for at, one in (("before", self.before), ("after", self.after)):
            shown = self.changes and one
            whole[at] = yaml.safe_dump(dict(one), sort_keys=False, width=1000) if shown else ""
        return whole


def plan(desired: Desired, found: Firewall | None, fleet: Collection[Network]) -> Step:
    """What to do to have it. fleet: the networks of the fleet's instances. Raises ValueError for too many rules."""
    tags = [tag_of(desired.fleet), *desired.tags]
    if found is not None and tag_of(desired.fleet) not in found.tags:
        return _foreign(desired, found)
    now = found or Firewall(0, desired.label, (), (), (), "DROP", "ACCEPT", ())
    has = {tag.casefold() for tag in now.tags}
    wanted = replace(
        now,
        tags=(*now.tags, *(tag for tag in dict.fromkeys(tags) if tag.casefold() not in has)),
        inbound=_merged(desired.inbound, now.inbound, fleet, desired.mode),
        outbound=_merged(desired.outbound, now.outbound, fleet, desired.mode),
        inbound_policy=desired.inbound_policy or now.inbound_policy,
        outbound_policy=desired.outbound_policy or now.outbound_policy,
    )
    count = len(wanted.inbound) + len(wanted.outbound)
    if count > MOST_RULES:
        raise ValueError(f"{count} rules, in and out together: Linode takes {MOST_RULES}")
    rules = (*(desired.inbound or ()), *(desired.outbound or ()))
    later = [rule.label for rule in rules if rule.from_fleet and not fleet and not rule.addresses]
    reason = f"{', '.join(later)} left out until the fleet has an instance" if later else ""
    if found is None:
        return Step("create", desired.label, None, {}, wanted.as_data(), reason, wanted)
    before, after = found.as_data(), wanted.as_data()
    differs = [key for key in before if key != "tags" and before[key] != after[key]]
    if len(now.tags) != len(wanted.tags):
        differs.append("tags")
    if not differs:
        return Step("keep", desired.label, found.id, reason=reason, wanted=found)
    had, has_then = ({key: one[key] for key in before if key in differs} for one in (before, after))
    return Step("update", desired.label, found.id, had, has_then, reason, wanted)


def plan_absent(desired: Desired, found: Firewall | None, pending: bool = False) -> Step:
    """What to do to be rid of it. pending: what is behind it is going, as in a check of a whole fleet's end."""
    if found is None:
        return Step("keep", desired.label)
    if tag_of(desired.fleet) not in found.tags:
        return _foreign(desired, found)
    if found.attached and not pending:
        who = ", ".join(f"{kind} {label}" for kind, label in found.attached)
        return Step("blocked", found.label, found.id, reason=f"is in front of {who}: delete or move them first")
    return Step("delete", found.label, found.id, found.as_data(), {})


def _foreign(desired: Desired, found: Firewall) -> Step:
    reason = (
        f"firewall {found.id} has this label but not the tag {tag_of(desired.fleet)}: it is not of this fleet; give the"
        " fleet's another label, or this one the tag if it is to become the fleet's"
    )
    return Step("blocked", found.label, found.id, reason=reason)


def _merged(
    declared: Sequence[Rule] | None, now: Sequence[Rule], fleet: Collection[Network], mode: str
) -> tuple[Rule, ...]:
    """The rules as they are to be; what is there and means the same stays as it is written."""
    if declared is None:
        return tuple(now)
    wanted = [part for rule in declared for part in _split(rule, fleet)]
    by_label = {rule.label: rule for rule in now}
    wanted = [same if (same := by_label.get(one.label)) and _same(same, one) else one for one in wanted]
    if mode == "replace":
        return tuple(wanted)
    ours = {rule.label: rule for rule in wanted}
    # Parts of a rule that needed more of them, when the fleet was larger.
    parts = [re.compile(re.escape(rule.label) + r"(-[0-9]+)?") for rule in declared if rule.from_fleet]
    stays = [one for one in now if one.label in ours or not any(part.fullmatch(one.label) for part in parts)]
    kept = [ours.pop(one.label) if one.label in ours else one for one in stays]
    return (*kept, *ours.values())


def _split(rule: Rule, fleet: Collection[Network]) -> list[Rule]:
    """The rule with the fleet's addresses, in as many as they need; none where it has no address at all."""
    whole = dict.fromkeys([*rule.addresses, *(sorted(fleet, key=_order) if rule.from_fleet else ())])
    networks = list(whole)
    chunks = [tuple(networks[at : at + MOST_ADDRESSES]) for at in range(0, len(networks), MOST_ADDRESSES)]
    labels = [rule.label, *(f"{rule.label}-{number}" for number in range(2, len(chunks) + 1))]
    return [replace(rule, label=label, addresses=each, from_fleet=False) for label, each in zip(labels, chunks)]


def _order(network: Network) -> tuple[int, int]:
    return network.version, int(network.network_address)


# ---- whom it would shut out ----


def lockout(step: Step, found: Firewall | None, run_from: Sequence[Network]) -> str:
    """A sentence where ssh would be shut that is open now; else "".

    run_from: the networks that the run comes from. Where they are not known, whoever reaches a firewall that is in use
    by ssh now must do so afterwards.
    """
    if step.wanted is None or not step.changes:
        return ""
    then = step.wanted
    ways = "add it to the addresses of the rule for ssh, or allow it (allow_lockout)"
    if run_from:
        for network in run_from:
            open_now = found is None or accepts(found.inbound, found.inbound_policy, network)
            if open_now and not accepts(then.inbound, then.inbound_policy, network):
                return f"would shut ssh to {network}, which this run comes from: {ways}, or correct run_from"
        return ""
    if found is None or not found.attached:
        return ""
    lost = [at for at in _named(found) if not accepts(then.inbound, then.inbound_policy, at)]
    if not lost:
        return ""
    return (
        f"would shut ssh to {', '.join(map(str, lost))}, and where this run comes from is not known, as NAT hides it:"
        f" set run_from to the public address of this controller, or {ways}"
    )


def _named(found: Firewall) -> list[Network]:
    """Every network that ssh is open to; all of them where the policy lets in."""
    everybody = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
    named = dict.fromkeys(at for rule in found.inbound for at in rule.addresses)
    return [at for at in (*named, *everybody) if accepts(found.inbound, found.inbound_policy, at)]


def accepts(rules: Iterable[Rule], policy: str, network: Network) -> bool:
    """Whether all of a network reaches ssh: the first rule that concerns an address decides, and else the policy.

    A rule that drops a part of the network shuts it out; one that accepts a part alone does not let it in.
    """
    left: list[Network] = [network]
    for rule in rules:
        if rule.protocol != "TCP" or not _concerns_ssh(rule.ports):
            continue
        for at in rule.addresses:
            if rule.action == "DROP" and any(_overlap(at, one) for one in left):
                return False
            if rule.action == "ACCEPT":
                left = [rest for one in left for rest in _without(one, at)]
    return not left or policy == "ACCEPT"


def _concerns_ssh(ports: str) -> bool:
    pieces = [_PORTS.fullmatch(piece.strip()) for piece in ports.split(",") if piece.strip()]
    return not pieces or any(one and int(one[1]) <= SSH_PORT <= int(one[2] or one[1]) for one in pieces)


def _overlap(one: Any, other: Any) -> bool:
    return bool(one.version == other.version and one.overlaps(other))


def _without(one: Any, part: Any) -> list[Network]:
    if not _overlap(one, part):
        return [one]
    return [] if one.subnet_of(part) else list(one.address_exclude(part))


def own_addresses() -> list[Network]:
    """The public addresses of this controller, by its default routes; none where NAT hides them. Sends nothing."""
    found: list[Network] = []
    for family, far in FAR_AWAY.items():
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            address = ipaddress.ip_address(probe.getsockname()[0].split("%")[0])
            if address.is_global:
                found.append(ipaddress.ip_network(address))
    return found


def networks(texts: Iterable[str], where: str) -> list[Network]:
    """Addresses and networks as networks. Raises ValueError."""
    return [_network(text, where) for text in texts]


def fleet_networks(raw: Iterable[Mapping[str, Any]]) -> set[Network]:
    """Every address of these instances, the API's own objects: public and private IPv4, and SLAAC IPv6."""
    found: set[Network] = set()
    for one in map(Instance.of, raw):
        found.update(ipaddress.ip_network(at) for at in (*one.ipv4, *([one.ipv6] if one.ipv6 else ())))
    return found


# ---- the API ----


class Api(Protocol):
    """What is needed of linode.Api."""

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any: ...
    def put(self, path: str, body: Mapping[str, Any]) -> Any: ...
    def delete(self, path: str) -> Any: ...
    def list(self, path: str, filters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]: ...


def find(api: Api, label: str) -> Firewall | None:
    """The firewall with this label, in one request, or two where the API does not list what is behind it."""
    for raw in api.list(FIREWALLS, {"label": label}):
        if raw["label"] == label:
            if raw.get("entities") is None:
                raw["entities"] = [one["entity"] for one in api.list(f"{FIREWALLS}/{raw['id']}/devices")]
            return Firewall.of(raw)
    return None


def apply(step: Step, found: Firewall | None, api: Api) -> Firewall | None:
    """Carry the step out; the firewall as it is then, None where it is gone. Raises LinodeError."""
    if step.action == "delete":
        try:
            api.delete(f"{FIREWALLS}/{step.id}")
        except Refused as error:
            if error.status != 404:  # 404: somebody else was quicker, or our first answer was lost
                raise
        return None
    wanted = step.wanted
    if wanted is None or not step.changes:
        return found
    rules = {
        "inbound": [rule.body() for rule in wanted.inbound],
        "outbound": [rule.body() for rule in wanted.outbound],
        "inbound_policy": wanted.inbound_policy,
        "outbound_policy": wanted.outbound_policy,
    }
    if step.action == "create":
        return _create({"label": wanted.label, "tags": list(wanted.tags), "rules": rules}, api)
    path = f"{FIREWALLS}/{step.id}"
    if set(step.after) - {"tags"}:
        api.put(f"{path}/rules", rules)
    if "tags" in step.after:
        api.put(path, {"tags": list(wanted.tags)})
    return wanted


def _create(body: Mapping[str, Any], api: Api) -> Firewall:
    """POST, and where the answer is lost look for the firewall before another POST: the API may have made it."""
    for attempt in range(1, CREATE_TRIES + 1):
        try:
            return Firewall.of(api.post(FIREWALLS, body))
        except NoAnswer as lost:
            error: LinodeError = lost
        except Refused as refused:
            if not refused.names("label", "unique"):
                raise
            error = refused
        made = find(api, body["label"])
        if made is not None and set(body["tags"]) <= set(made.tags):
            return made
        if isinstance(error, Refused) or attempt == CREATE_TRIES:
            raise error
    raise AssertionError("unreachable")
