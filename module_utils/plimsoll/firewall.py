"""A fleet's Cloud Firewall: what its rules are to be, whom they would shut out, and bringing it there.

A fleet owns a firewall that has its tag. Rules are compared as the API means them: order of addresses and ports, blanks
and the case of a protocol are no difference. Rules that others made go back as the API listed them.
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
# Limits of Linode: rules of a firewall, in and out together; addresses and pieces of ports of a rule, where a range is
# two pieces; letters of a label and of a description.
MOST_RULES, MOST_ADDRESSES, MOST_PORTS, MOST_LABEL, MOST_DESCRIPTION = 25, 255, 15, 32, 100
ACTIONS, PROTOCOLS = ("ACCEPT", "DROP"), ("TCP", "UDP", "ICMP", "IPENCAP")
SSH_PORT = 22
# As many networks as a sentence can name.
MOST_NAMED = 8
CREATE_TRIES = 3
# Addresses of documentation (RFC 5737, RFC 3849): a UDP socket that is connected to one sends nothing.
FAR_AWAY = {socket.AF_INET: "203.0.113.1", socket.AF_INET6: "2001:db8::1"}

_LABEL = re.compile(r"[A-Za-z](?:[._-]?[A-Za-z0-9])*")
_FLEET = re.compile(r"[a-z](?:-?[a-z0-9])*")
# The API takes no leading zeroes.
_PORTS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
EVERYBODY: tuple[Network, ...] = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


@dataclass(frozen=True)
class Rule:
    """One rule. addresses are networks; from_fleet adds those of the fleet's instances, once they are known.

    Of a rule that the API lists, more names what is no address of its own (a rule set, a prefix list), and listed is
    all of it, which goes back as it came.
    """

    label: str
    action: str = "ACCEPT"
    protocol: str = "TCP"
    ports: str = ""
    addresses: tuple[Network, ...] = ()
    from_fleet: bool = False
    description: str = ""
    more: tuple[str, ...] = ()
    listed: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def line(self, way: str = "from") -> str:
        """For --diff."""
        what = " ".join(word for word in (self.action, self.protocol, self.ports) if word)
        note = f" ({self.description})" if self.description else ""
        return f"{self.label}: {what} {way} {', '.join(map(str, (*self.addresses, *self.more)))}{note}"

    def body(self) -> dict[str, Any]:
        """As the API takes it. It refuses an empty list of addresses beside one that is not."""
        if self.listed is not None:
            body = {key: value for key, value in self.listed.items() if value is not None}
            if "addresses" in body:
                body["addresses"] = {version: found for version, found in body["addresses"].items() if found}
            return body
        versions = {f"ipv{number}": [str(at) for at in self.addresses if at.version == number] for number in (4, 6)}
        body = {"label": self.label, "action": self.action, "protocol": self.protocol}
        body["addresses"] = {version: found for version, found in versions.items() if found}
        body |= {key: value for key in ("ports", "description") if (value := getattr(self, key))}
        return body


def rule_of(given: Mapping[str, Any], where: str) -> Rule:
    """A declared rule: label, action, protocol, ports, addresses, from_fleet, description. Raises ValueError."""
    label = given["label"]
    where = f"{where}: rule {label!r}"
    if not _LABEL.fullmatch(label) or not 3 <= len(label) <= MOST_LABEL:
        raise ValueError(f"{where}: a label has 3 to 32 letters, digits and single - _ . and begins with a letter")
    action, protocol = (given.get("action") or "ACCEPT").upper(), (given.get("protocol") or "TCP").upper()
    for key, value, allowed in (("action", action, ACTIONS), ("protocol", protocol, PROTOCOLS)):
        if value not in allowed:
            raise ValueError(f"{where}: {key}: {value!r} must be one of {', '.join(allowed)}")
    ports = _ports(given.get("ports"), where)
    if ports and protocol not in ("TCP", "UDP"):
        raise ValueError(f"{where}: ports: {protocol} has no ports, leave them out")
    networks = {_network(at, f"{where}: addresses"): None for at in given.get("addresses") or ()}
    if not networks and not given.get("from_fleet"):
        raise ValueError(f"{where}: addresses must be given, or from_fleet; 0.0.0.0/0 and ::/0 are everybody")
    description = given.get("description") or ""
    if len(description) > MOST_DESCRIPTION:
        raise ValueError(f"{where}: description has {len(description)} letters, Linode takes {MOST_DESCRIPTION}")
    return Rule(label, action, protocol, ports, tuple(networks), bool(given.get("from_fleet")), description)


def _ports(given: Any, where: str) -> str:
    text = "" if given is None else str(given).strip()
    ports: dict[str, None] = {}
    # No ports are all of them, so a slip such as "," must not come to none.
    for piece in [piece.strip() for piece in text.split(",")] if text else ():
        matched = _PORTS.fullmatch(piece)
        low, high = (int(matched[1]), int(matched[2] or matched[1])) if matched else (0, 0)
        # The API has no range of one port.
        if not 1 <= low <= high <= 65535 or piece == f"{low}-{low}":
            raise ValueError(
                f"{where}: ports: {piece!r} must be a port from 1 to 65535 without leading zeroes, or a range such as"
                " 8000-8010"
            )
        ports[piece] = None
    pieces = sum(len(port.split("-")) for port in ports)
    if pieces > MOST_PORTS:
        raise ValueError(
            f"{where}: ports has {pieces} pieces, Linode takes {MOST_PORTS} counting a range as two: make it two rules"
        )
    return ", ".join(ports)


def _network(text: Any, where: str) -> Network:
    try:
        # 203.0.113.5/24 means the network that it is in.
        return ipaddress.ip_network(str(text).strip(), strict=False)
    except ValueError:
        raise ValueError(
            f"{where}: {text!r} is no IP address or network, as 203.0.113.5 and 203.0.113.0/24 are"
        ) from None


def read_rule(raw: Mapping[str, Any]) -> Rule:
    """A rule as the API lists it."""
    networks, more = [], [f"rule set {raw['ruleset']}"] if raw.get("ruleset") else []
    for text in (at for key in ("ipv4", "ipv6") for at in (raw.get("addresses") or {}).get(key) or ()):
        try:
            networks.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            more.append(str(text))
    ports = ", ".join(piece.strip() for piece in (raw.get("ports") or "").split(",") if piece.strip())
    label, action, protocol = (raw.get(key) or "" for key in ("label", "action", "protocol"))
    description = raw.get("description") or ""
    return Rule(
        label, action.upper(), protocol.upper(), ports, tuple(networks), False, description, tuple(more), dict(raw)
    )


def _same(one: Rule, other: Rule) -> bool:
    def meant(rule: Rule) -> tuple[Rule, set[Network], set[str]]:
        return replace(rule, addresses=(), ports=""), set(rule.addresses), set(rule.ports.split(", "))

    return meant(one) == meant(other)


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
        if not _LABEL.fullmatch(self.label) or not 3 <= len(self.label) <= MOST_LABEL:
            raise ValueError(
                f"label: {self.label!r} must have 3 to 32 letters, digits and single - _ . and begin with a letter"
            )
        if not _FLEET.fullmatch(self.fleet) or not 3 <= len(self.fleet) <= 32:
            raise ValueError(
                f"fleet: {self.fleet!r} must be the name of a fleet, as linode_fleet has it: 3 to 32 lower-case"
                " letters, digits and single dashes"
            )
        for tag in self.tags:
            if not 3 <= len(tag) <= 50:
                raise ValueError(f"tags: {tag!r} has {len(tag)} characters, Linode takes 3 to 50")
            if tag.casefold().startswith(tag_of("")):
                raise ValueError(f"tags: {tag!r} is one that plimsoll sets itself; fleet says whose the firewall is")
        for name, rules in (("inbound", self.inbound or ()), ("outbound", self.outbound or ())):
            labels = [rule.label for rule in rules]
            if twice := next((label for label in labels if labels.count(label) > 1), None):
                raise ValueError(f"{name}: two rules are labelled {twice!r}, give one of them another label")
        _check_count(len(self.inbound or ()) + len(self.outbound or ()))

    @property
    def names_fleet(self) -> bool:
        return any(rule.from_fleet for rule in (*(self.inbound or ()), *(self.outbound or ())))


def _check_count(count: int) -> None:
    if count > MOST_RULES:
        raise ValueError(
            f"inbound and outbound: {count} rules, in and out together: Linode takes {MOST_RULES}; put the addresses or"
            " ports of some into one"
        )


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
            "label": self.label,
            "tags": list(self.tags),
            "inbound_policy": self.inbound_policy,
            "inbound": [rule.line() for rule in self.inbound],
            "outbound_policy": self.outbound_policy,
            "outbound": [rule.line("to") for rule in self.outbound],
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
    if found is not None and tag_of(desired.fleet) not in found.tags:
        return _foreign(desired, found)
    now = found or Firewall(0, desired.label, (), (), (), "DROP", "ACCEPT", ())
    # A tag is the same whatever its case.
    tags = list(now.tags)
    for tag in (tag_of(desired.fleet), *desired.tags):
        if tag.casefold() not in map(str.casefold, tags):
            tags.append(tag)
    wanted = replace(
        now,
        tags=tuple(tags),
        inbound=_merged("inbound", desired.inbound, now.inbound, fleet, desired.mode),
        outbound=_merged("outbound", desired.outbound, now.outbound, fleet, desired.mode),
        inbound_policy=desired.inbound_policy or now.inbound_policy,
        outbound_policy=desired.outbound_policy or now.outbound_policy,
    )
    _check_count(len(wanted.inbound) + len(wanted.outbound))
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
        f"is firewall {found.id}, which has this label but not the tag {tag_of(desired.fleet)}, so it is not of this"
        " fleet: set label to another for the fleet's, or give this one the tag if it is to become the fleet's"
    )
    return Step("blocked", found.label, found.id, reason=reason)


def _merged(
    where: str, declared: Sequence[Rule] | None, now: Sequence[Rule], fleet: Collection[Network], mode: str
) -> tuple[Rule, ...]:
    """The rules as they are to be; what is there and means the same stays as it is written."""
    if declared is None:
        return tuple(now)
    parts = {rule.label: _split(rule, fleet, f"{where}: rule {rule.label!r}") for rule in declared}
    wanted: dict[str, Rule] = {}
    for label, rules in parts.items():
        for one in rules:
            if one.label in wanted or (one.label != label and one.label in parts):
                raise ValueError(
                    f"{where}: rule {label!r} needs {len(rules)} rules for its addresses, and another is labelled"
                    f" {one.label!r}: give that one another label"
                )
            wanted[one.label] = next((same for same in now if _same(same, one)), one)
    if mode == "replace":
        return tuple(wanted.values())
    # Parts of a rule that needed more of them, when the fleet was larger; and rules for a fleet without instances.
    over = {
        label
        for rule in declared
        if rule.from_fleet
        for label in (rule.label, *(f"{rule.label}-{number}" for number in range(2, MOST_RULES + 1)))
    } - set(wanted)
    # A label stands for one rule, whatever else has it.
    first = {one.label: at for at, one in reversed(list(enumerate(now)))}
    kept = [
        wanted.get(one.label, one)
        for at, one in enumerate(now)
        if one.label not in over and (one.label not in wanted or at == first[one.label])
    ]
    return (*kept, *(one for label, one in wanted.items() if label not in first))


def _split(rule: Rule, fleet: Collection[Network], where: str) -> list[Rule]:
    """The rule with the fleet's addresses, in as many as they need; none where it has no address at all."""
    whole = dict.fromkeys([*rule.addresses, *(sorted(fleet, key=_order) if rule.from_fleet else ())])
    networks = list(whole)
    chunks = [tuple(networks[at : at + MOST_ADDRESSES]) for at in range(0, len(networks), MOST_ADDRESSES)]
    labels = [rule.label, *(f"{rule.label}-{number}" for number in range(2, len(chunks) + 1))]
    if len(labels[-1]) > MOST_LABEL:
        raise ValueError(
            f"{where} needs {len(chunks)} rules for its {len(networks)} addresses, and {labels[-1]!r} has"
            f" {len(labels[-1])} letters: Linode takes {MOST_LABEL}, give it a shorter label"
        )
    return [replace(rule, label=label, addresses=each, from_fleet=False) for label, each in zip(labels, chunks)]


def _order(network: Network) -> tuple[int, int]:
    return network.version, int(network.network_address)


# ---- whom it would shut out ----


# Addresses as numbers on one line, those of IPv6 behind those of IPv4: a rule may name hundreds of them.
Span = tuple[int, int]
_IPV6_FROM = 1 << 32


def lockout(step: Step, found: Firewall | None, run_from: Sequence[Network], hosts: bool = False) -> str:
    """A sentence where ssh would be shut that is open now; else "".

    run_from: the networks that the run comes from. Where they are not known, whoever reaches a firewall that is in use
    by ssh now must do so afterwards; and a new one in front of hosts that are there (hosts) cannot be judged.
    """
    if step.wanted is None or not step.changes:
        return ""
    before = _spans(EVERYBODY) if found is None else reach(found.inbound, found.inbound_policy)
    lost = _without(before, reach(step.wanted.inbound, step.wanted.inbound_policy))
    ways = "add it to the addresses of the rule for ssh, or allow it (allow_lockout)"
    if run_from:
        shut = next((network for network in run_from if _both(_spans([network]), lost)), None)
        return f"would shut ssh to {shut}, which this run comes from: {ways}, or correct run_from" if shut else ""
    if lost and found is None and hosts:
        return (
            "is new, there are hosts already, and where this run comes from is not known, as NAT hides it: set run_from"
            " to the public address of this controller, or allow it (allow_lockout)"
        )
    if not lost or found is None or found.attached == ():
        return ""
    named = [at for rule in _for_ssh(found.inbound) if rule.action == "ACCEPT" for at in rule.addresses]
    named += EVERYBODY if found.inbound_policy == "ACCEPT" else ()
    shut_out = [str(at) for at in dict.fromkeys(named) if _both(_spans([at]), lost)]
    rest = [f"{len(shut_out) - MOST_NAMED} more"] if len(shut_out) > MOST_NAMED else []
    return (
        f"would shut ssh to {', '.join([*shut_out[:MOST_NAMED], *rest])}, and where this run comes from is not known,"
        f" as NAT hides it: set run_from to the public address of this controller, or {ways}"
    )


def accepts(rules: Iterable[Rule], policy: str, network: Network) -> bool:
    """Whether all of a network reaches ssh."""
    return not _without(_spans([network]), reach(rules, policy))


def reach(rules: Iterable[Rule], policy: str) -> list[Span]:
    """Every address that reaches ssh: the first rule that concerns it decides, and else the policy.

    What a rule set or a prefix list holds is not known here, so it counts for nothing.
    """
    undecided, reaching = _spans(EVERYBODY), list[Span]()
    for rule in _for_ssh(rules):
        here = _spans(rule.addresses)
        reaching += _both(undecided, here) if rule.action == "ACCEPT" else []
        undecided = _without(undecided, here)
    return _joined([*reaching, *(undecided if policy == "ACCEPT" else ())])


def _spans(networks: Iterable[Network]) -> list[Span]:
    shifts = ((at, _IPV6_FROM if at.version == 6 else 0) for at in networks)
    return _joined((int(at.network_address) + shift, int(at.broadcast_address) + shift) for at, shift in shifts)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """In order, and none touching another."""
    joined: list[Span] = []
    for low, high in sorted(spans):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return joined


def _without(spans: Sequence[Span], parts: Sequence[Span]) -> list[Span]:
    """What of spans is in none of parts, both joined."""
    left, at = list[Span](), 0
    for low, high in spans:
        while at < len(parts) and parts[at][1] < low:
            at += 1
        begin, ahead = low, at
        while ahead < len(parts) and parts[ahead][0] <= high:
            if begin < parts[ahead][0]:
                left.append((begin, parts[ahead][0] - 1))
            begin = parts[ahead][1] + 1
            ahead += 1
        if begin <= high:
            left.append((begin, high))
    return left


def _both(spans: Sequence[Span], parts: Sequence[Span]) -> list[Span]:
    return _without(spans, _without(spans, parts))


def _for_ssh(rules: Iterable[Rule]) -> list[Rule]:
    return [rule for rule in rules if rule.protocol == "TCP" and _concerns_ssh(rule.ports)]


def _concerns_ssh(ports: str) -> bool:
    pieces = [_PORTS.fullmatch(piece.strip()) for piece in ports.split(",") if piece.strip()]
    return not pieces or any(one and int(one[1]) <= SSH_PORT <= int(one[2] or one[1]) for one in pieces)


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
        # The first tag is the one that says whose it is.
        if made is not None and body["tags"][0] in made.tags:
            return made
        if isinstance(error, Refused) or attempt == CREATE_TRIES:
            raise error
    raise AssertionError("unreachable")
