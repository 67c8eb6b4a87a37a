"""A firewall's plan as pure data, whom it would shut out, and its carrying out against an API in memory."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import random
import socket
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import linode_firewall
from plimsoll import firewall
from plimsoll.firewall import Desired, Firewall, Step, accepts, lockout, plan, plan_absent, rule_of
from plimsoll.linode import NoAnswer, Refused

TAG = "plimsoll-fleet-pond"
OFFICE, ME = "203.0.113.0/24", "203.0.113.7/32"


def net(text: str) -> Any:
    return ipaddress.ip_network(text)


def rule(label: str, ports: str = "22", *addresses: str, **more: Any) -> firewall.Rule:
    return rule_of({"label": label, "ports": ports, "addresses": list(addresses), **more}, "inbound")


SSH = rule("ssh", "22", OFFICE)
FLEET = rule("fleet", "6379", from_fleet=True)


def listed(label: str, ports: str, *addresses: str, **more: Any) -> dict[str, Any]:
    """A rule as the API lists it."""
    four, six = ([at for at in addresses if (":" in at) is wide] for wide in (False, True))
    return {"label": label, "action": "ACCEPT", "protocol": "TCP", "ports": ports, **more} | {
        "addresses": {"ipv4": four or None, "ipv6": six or None}
    }


def raw(*inbound: dict[str, Any], **more: Any) -> dict[str, Any]:
    rules = {"inbound_policy": "DROP", "outbound_policy": "ACCEPT", "inbound": list(inbound), "outbound": []}
    return {"id": 7, "label": "pond", "tags": [TAG], "rules": rules, "entities": [], **more}


def have(*inbound: dict[str, Any], **more: Any) -> Firewall:
    return Firewall.of(raw(*inbound, **more))


def want(*inbound: firewall.Rule, **more: Any) -> Desired:
    return Desired("pond", "pond", inbound=inbound, **more)


def fleet(*addresses: str) -> set[Any]:
    return {net(at) for at in addresses}


def lines(step: Step) -> list[str]:
    assert step.wanted
    return [one.line() for one in step.wanted.inbound]


def labels(step: Step) -> list[str]:
    return [line.split(":")[0] for line in lines(step)]


def hosts(count: int) -> set[Any]:
    return {net(f"10.0.{number // 250}.{number % 250}/32") for number in range(count)}


def taken(step: Step) -> Firewall:
    """The firewall as the API lists it once the step is carried out."""
    assert step.wanted
    sent = {way: [one.body() for one in getattr(step.wanted, way)] for way in ("inbound", "outbound")}
    policies = {"inbound_policy": step.wanted.inbound_policy, "outbound_policy": step.wanted.outbound_policy}
    return Firewall.of(raw(tags=list(step.wanted.tags), rules={**sent, **policies}))


# ---- rules ----


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label": "no"}, "3 to 32 letters"),
        ({"label": "two--dashes"}, "3 to 32 letters"),
        ({"ports": "22-"}, "ports: '22-' must be a port"),
        ({"ports": "0"}, "must be a port"),
        ({"ports": "70000"}, "must be a port"),
        ({"ports": "30-20"}, "must be a port"),
        ({"ports": ",".join(map(str, range(1, 17)))}, "16 pieces, Linode takes 15"),
        ({"protocol": "ICMP"}, "ICMP has no ports"),
        ({"addresses": ["office"]}, "'office' is no IP address"),
        ({"addresses": []}, "addresses must be given, or from_fleet"),
    ],
)
def test_a_rule_that_linode_could_not_take_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="inbound: rule '") as caught:
        rule_of({"label": "ssh", "ports": "22", "addresses": [OFFICE], **given}, "inbound")
    assert words in str(caught.value)


def test_addresses_may_be_hosts_and_networks_with_host_bits() -> None:
    found = rule("ssh", "22", "203.0.113.5/24", "198.51.100.7", "2001:db8::7", OFFICE).addresses
    assert [str(at) for at in found] == [OFFICE, "198.51.100.7/32", "2001:db8::7/128"]


def test_two_rules_of_one_label_are_refused() -> None:
    with pytest.raises(ValueError, match="inbound: two rules are labelled 'ssh'"):
        want(SSH, SSH).check()


def test_a_rule_is_sent_without_what_it_does_not_have() -> None:
    sent = rule("ping", "", OFFICE, protocol="icmp").body()
    assert sent == {"label": "ping", "action": "ACCEPT", "protocol": "ICMP", "addresses": {"ipv4": [OFFICE]}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label": "a" * 33}, "3 to 32 letters"),
        ({"label": "1st"}, "begins with a letter"),
        ({"label": "ssh-"}, "3 to 32 letters"),
        ({"label": "two words"}, "3 to 32 letters"),
        ({"label": "ssh\n"}, "3 to 32 letters"),
        ({"label": ""}, "3 to 32 letters"),
        ({"action": "REJECT"}, "action: 'REJECT' must be one of ACCEPT, DROP"),
        ({"protocol": "ALL"}, "protocol: 'ALL' must be one of TCP"),
        ({"ports": "ssh"}, "ports: 'ssh' must be a port"),
        ({"ports": "22 80"}, "ports: '22 80' must be a port"),
        ({"ports": "-22"}, "ports: '-22' must be a port"),
        ({"protocol": "ipencap"}, "IPENCAP has no ports"),
        ({"addresses": ["203.0.113.256"]}, "'203.0.113.256' is no IP address"),
        ({"addresses": ["203.0.113.0/33"]}, "'203.0.113.0/33' is no IP address"),
        ({"addresses": [OFFICE, ""]}, "'' is no IP address"),
        ({"addresses": None, "from_fleet": None}, "addresses must be given, or from_fleet"),
    ],
)
def test_a_slip_in_a_rule_is_named_with_its_place(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="outbound: rule '") as caught:
        rule_of({"label": "ssh", "ports": "22", "addresses": [OFFICE], **given}, "outbound")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "ports",
    [
        pytest.param(", ".join(f"{low}-{low + 5}" for low in range(10, 90, 10)), id="eight-ranges-are-16-pieces"),
        pytest.param("022", id="a-leading-zero"),
        pytest.param("22-22", id="a-range-ends-above-its-start"),
        pytest.param(",", id="blanks-are-not-all-ports"),
        pytest.param("22,,80", id="a-piece-is-missing"),
        pytest.param("٢٢", id="other-digits"),
    ],
)
def test_ports_that_linode_would_not_take_or_that_name_none_are_refused(ports: str) -> None:
    with pytest.raises(ValueError, match="ports"):
        rule("web", ports, OFFICE)


@pytest.mark.parametrize(
    ("given", "ports"),
    [
        (" 22 ,80,  8000-8010", "22, 80, 8000-8010"),
        ("22, 22", "22"),
        (22, "22"),
        ("  ", ""),
        ("1-65535", "1-65535"),
        (", ".join(map(str, range(1, 16))), ", ".join(map(str, range(1, 16)))),
    ],
)
def test_ports_are_sent_as_linode_takes_them(given: Any, ports: str) -> None:
    assert rule_of({"label": "web", "ports": given, "addresses": [OFFICE]}, "inbound").ports == ports


def test_a_description_that_is_too_long_is_refused() -> None:
    """Linode takes 1 to 100 characters."""
    assert rule("web", "80", OFFICE, description="a" * 100).description == "a" * 100
    with pytest.raises(ValueError, match="description"):
        rule("web", "80", OFFICE, description="a" * 101)


def test_what_is_left_out_of_a_rule_is_the_usual() -> None:
    bare = rule_of({"label": "ssh", "addresses": [OFFICE]}, "inbound")
    nothing = {"action": None, "protocol": None, "ports": None, "description": None, "from_fleet": None}
    assert bare == rule_of({"label": "ssh", "addresses": [OFFICE], **nothing}, "inbound")
    assert bare.body() == {
        "label": "ssh",
        "action": "ACCEPT",
        "protocol": "TCP",
        "addresses": {"ipv4": [OFFICE]},
    }


def test_a_rule_for_ipv6_alone_is_sent_without_a_list_for_ipv4() -> None:
    sent = rule("web", "80,443", "2001:DB8:0::/32", description="note", action="drop").body()
    assert sent == {
        "label": "web",
        "action": "DROP",
        "protocol": "TCP",
        "addresses": {"ipv6": ["2001:db8::/32"]},
        "ports": "80, 443",
        "description": "note",
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label": "po"}, "label: 'po' must have 3 to 32 letters"),
        ({"label": "a" * 33}, "label: "),
        ({"label": "pond--1"}, "label: "),
        ({"tags": ("ab",)}, "tags: 'ab' has 2 characters"),
        ({"tags": ("a" * 51,)}, "has 51 characters"),
        ({"outbound": (SSH, SSH)}, "outbound: two rules are labelled 'ssh'"),
        # As linode_fleet has it; the tag of such a fleet is too long, or another than that of its instances.
        ({"fleet": "a" * 40}, "fleet: "),
        ({"fleet": "Pond"}, "fleet: "),
        ({"fleet": ""}, "fleet: "),
        ({"tags": (TAG,)}, "is one that plimsoll sets itself"),
        ({"tags": ("Plimsoll-Fleet-other",)}, "is one that plimsoll sets itself"),
        ({"inbound": tuple(rule(f"rule-{at}", "1", OFFICE) for at in range(26))}, "26 rules"),
    ],
)
def test_a_firewall_that_linode_could_not_take_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Desired(**{"label": "pond", "fleet": "pond", **given}).check()
    assert words in str(caught.value)


def test_one_label_may_be_that_of_a_rule_in_and_of_one_out() -> None:
    want(SSH, outbound=(SSH,)).check()


# ---- what there is to do ----


def test_a_new_firewall_drops_what_comes_in_and_lets_out() -> None:
    step = plan(want(SSH, tags=("prod",)), None, fleet())
    assert step.action == "create" and step.wanted
    assert step.wanted.tags == (TAG, "prod")
    assert (step.wanted.inbound_policy, step.wanted.outbound_policy) == ("DROP", "ACCEPT")
    assert lines(step) == [f"ssh: ACCEPT TCP 22 from {OFFICE}"]


@pytest.mark.parametrize(
    "same",
    [
        listed("ssh", "22", OFFICE),
        listed("ssh", " 22", OFFICE, protocol="tcp", action="accept", description=None),
    ],
)
def test_what_means_the_same_is_left_as_it_is_written(same: dict[str, Any]) -> None:
    step = plan(want(SSH), have(same), fleet())
    assert (step.action, step.changes, step.diff()["before"], step.diff()["after"]) == ("keep", False, "", "")


def test_neither_the_order_of_addresses_nor_blanks_in_ports_are_a_difference() -> None:
    wanted = rule("web", "80, 8000-8010", OFFICE, "2001:db8::/64", "198.51.100.0/24")
    found = listed("web", "80,8000-8010", "198.51.100.0/24", OFFICE, "2001:db8::/64")
    assert plan(want(wanted), have(found), fleet()).action == "keep"


@pytest.mark.parametrize("change", [{"ports": "2222"}, {"action": "DROP"}, {"addresses": ["198.51.100.0/24"]}])
def test_a_rule_that_differs_is_changed_in_its_place(change: dict[str, Any]) -> None:
    wanted = rule_of({"label": "ssh", "ports": "22", "addresses": [OFFICE], **change}, "inbound")
    step = plan(
        want(wanted), have(listed("a-b", "1", OFFICE), listed("ssh", "22", OFFICE), listed("z-z", "9", OFFICE)), fleet()
    )
    assert step.action == "update" and [line.split(":")[0] for line in lines(step)] == ["a-b", "ssh", "z-z"]
    assert set(step.before) == {"inbound"}


def test_rules_that_are_not_declared_are_left_alone() -> None:
    found = have(listed("theirs", "9100", OFFICE))
    assert plan(Desired("pond", "pond"), found, fleet()).action == "keep"
    both = plan(want(SSH), found, fleet())
    assert [line.split(":")[0] for line in lines(both)] == ["theirs", "ssh"]
    assert lines(plan(want(SSH, mode="replace"), found, fleet())) == [SSH.line()]
    assert lines(plan(want(mode="replace"), found, fleet())) == []
    assert plan(want(), found, fleet()).action == "keep"


def test_policies_that_are_not_declared_are_left_alone() -> None:
    opened = have()
    opened = replace(opened, inbound_policy="ACCEPT")
    assert plan(want(), opened, fleet()).action == "keep"
    step = plan(want(inbound_policy="DROP"), opened, fleet())
    assert (step.before, step.after) == ({"inbound_policy": "ACCEPT"}, {"inbound_policy": "DROP"})


def test_tags_are_added_beside_those_of_others() -> None:
    step = plan(Desired("pond", "pond", tags=("prod", "Team")), have(tags=["theirs", TAG, "team"]), fleet())
    assert step.after == {"tags": ["theirs", TAG, "team", "prod"]}


def test_the_fleets_rule_follows_its_hosts() -> None:
    step = plan(want(FLEET), have(), fleet("203.0.113.9/32", "192.168.128.1/32", "2001:db8::1/128"))
    assert lines(step) == ["fleet: ACCEPT TCP 6379 from 192.168.128.1/32, 203.0.113.9/32, 2001:db8::1/128"]
    found = have(listed("fleet", "6379", "192.168.128.1/32", "192.168.128.2/32"))
    assert lines(plan(want(FLEET), found, fleet("192.168.128.2/32"))) == [
        "fleet: ACCEPT TCP 6379 from 192.168.128.2/32"
    ]


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_without_a_host_the_fleets_rule_is_left_out_and_that_is_said(mode: str) -> None:
    step = plan(want(SSH, FLEET, mode=mode), have(listed("fleet", "6379", "192.168.128.1/32")), fleet())
    assert lines(step) == [SSH.line()]
    assert step.reason == "fleet left out until the fleet has an instance"


def test_more_addresses_than_a_rule_takes_are_several_rules_and_go_with_the_hosts() -> None:
    many = {net(f"10.0.{number // 250}.{number % 250}/32") for number in range(600)}
    step = plan(want(FLEET), have(listed("fleet-x", "1", OFFICE)), many)
    assert step.wanted
    assert [(one.label, len(one.addresses)) for one in step.wanted.inbound[1:]] == [
        ("fleet", 255),
        ("fleet-2", 255),
        ("fleet-3", 90),
    ]
    few = plan(want(FLEET), step.wanted, fleet("10.0.0.1/32"))
    assert few.wanted and [one.label for one in few.wanted.inbound] == ["fleet-x", "fleet"]


def test_a_rule_of_others_that_is_named_like_a_part_stays() -> None:
    step = plan(want(SSH), have(listed("ssh", "22", OFFICE), listed("ssh-2", "2222", OFFICE)), fleet())
    assert step.action == "keep"


def test_more_rules_than_linode_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="26 rules, in and out together: Linode takes 25"):
        plan(want(*(rule(f"rule-{number}", "1", OFFICE) for number in range(26))), None, fleet())


def test_a_firewall_of_others_is_not_touched() -> None:
    foreign = have(listed("ssh", "22", "0.0.0.0/0"), tags=["theirs"])
    for step in (plan(want(SSH), foreign, fleet()), plan_absent(want(), foreign)):
        assert step.action == "blocked" and f"has this label but not the tag {TAG}" in step.reason


def test_a_firewall_that_somebody_is_behind_is_not_deleted() -> None:
    used = have(entities=[{"id": 1, "type": "linode", "label": "pond-1"}])
    step = plan_absent(want(), used)
    assert step.action == "blocked" and "is in front of linode pond-1" in step.reason
    assert plan_absent(want(), used, pending=True).action == "delete"
    assert plan_absent(want(), have()).action == "delete" and plan_absent(want(), None).action == "keep"


@pytest.mark.parametrize(
    "change",
    [
        {"addresses": {"ipv4": ["198.51.100.0/24", OFFICE], "ipv6": ["2001:DB8::/64"]}},
        {"addresses": {"ipv4": [OFFICE, "198.51.100.0/24", OFFICE], "ipv6": ["2001:db8:0:0::/64"]}},
        {"ports": "80,8000-8010"},
        {"ports": " 80 ,8000-8010 "},
        {"ports": "8000-8010, 80"},
        {"protocol": "tcp", "action": "accept"},
        {"description": ""},
        {"description": None},
    ],
)
def test_what_is_written_otherwise_is_no_difference(change: dict[str, Any]) -> None:
    web = rule("web", "80, 8000-8010", "2001:db8::/64", OFFICE, "198.51.100.0/24")
    found = have({**listed("web", "80, 8000-8010", OFFICE, "198.51.100.0/24", "2001:db8::/64"), **change})
    for mode in ("append", "replace"):
        step = plan(want(web, mode=mode), found, fleet())
        assert step.action == "keep" and step.wanted == found


@pytest.mark.parametrize(
    "change",
    [
        {"addresses": {"ipv4": [OFFICE]}},
        {"addresses": {"ipv6": ["2001:db8::/64"]}},
        {"addresses": {"ipv4": ["203.0.113.0/25"], "ipv6": ["2001:db8::/64"]}},
        {"ports": "80-81"},
        {"ports": None},
        {"protocol": "UDP"},
        {"action": "DROP"},
        {"description": "old"},
    ],
)
def test_what_means_something_else_is_changed(change: dict[str, Any]) -> None:
    web = rule("web", "80", OFFICE, "2001:db8::/64")
    step = plan(want(web), have({**listed("web", "80", OFFICE, "2001:db8::/64"), **change}), fleet())
    assert (step.action, lines(step), list(step.after)) == ("update", [web.line()], ["inbound"])


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("start", [None, have(listed("ssh", "2222", "0.0.0.0/0"), tags=["theirs", TAG])])
def test_a_second_plan_has_nothing_to_do(mode: str, start: Firewall | None) -> None:
    desired = want(
        rule("ssh", "22", "::/0", "203.0.113.5/24", "0.0.0.0/0", description="all"),
        rule("ping", "", "2001:db8::7", protocol="ICMP"),
        rule("fleet", "6379,8000-8010", OFFICE, from_fleet=True),
        outbound=(rule("none", "25", "0.0.0.0/0", action="DROP"),),
        outbound_policy="ACCEPT",
        tags=("prod",),
        mode=mode,
    )
    first = plan(desired, start, hosts(300))
    assert first.changes
    again = plan(desired, taken(first), hosts(300))
    assert (again.action, again.before, again.after) == ("keep", {}, {})


def test_appended_rules_keep_the_order_of_those_that_are_there_and_come_last_in_their_own() -> None:
    found = have(*(listed(label, "1", OFFICE) for label in ("a-1", "ssh", "b-1", "web", "c-1")))
    declared = [rule(label, "2", OFFICE) for label in ("new-b", "web", "new-a", "ssh")]
    step = plan(want(*declared), found, fleet())
    assert labels(step) == ["a-1", "ssh", "b-1", "web", "c-1", "new-b", "new-a"]
    assert [line.split()[3] for line in lines(step)] == ["1", "2", "1", "2", "1", "2", "2"]
    assert labels(plan(want(*declared, mode="replace"), found, fleet())) == ["new-b", "web", "new-a", "ssh"]


def test_another_order_is_a_change_where_the_declared_rules_are_all_there_is() -> None:
    found = have(listed("ssh", "22", OFFICE), listed("web", "80", OFFICE))
    web = rule("web", "80", OFFICE)
    assert plan(want(web, SSH), found, fleet()).action == "keep"
    step = plan(want(web, SSH, mode="replace"), found, fleet())
    assert (step.action, labels(step)) == ("update", ["web", "ssh"])


@pytest.mark.parametrize(("mode", "left"), [("append", ["theirs"]), ("replace", [])])
def test_rules_that_are_left_out_stay_and_an_empty_list_is_a_declaration(mode: str, left: list[str]) -> None:
    found = replace(have(listed("theirs", "1", OFFICE)), outbound=(SSH,))
    step = plan(Desired("pond", "pond", mode=mode), found, fleet())
    assert step.action == "keep"
    step = plan(want(mode=mode), found, fleet())
    assert step.wanted and (labels(step), step.wanted.outbound) == (left, (SSH,))
    step = plan(Desired("pond", "pond", outbound=(), mode=mode), found, fleet())
    assert step.wanted and (labels(step), len(step.wanted.outbound)) == (["theirs"], len(left))


def test_only_what_can_be_a_part_of_the_fleets_rule_goes_with_it() -> None:
    found = have(*(listed(label, "1", OFFICE) for label in ("fleet-2x", "my-fleet-2", "fleet-2", "fleet.2")))
    assert labels(plan(want(FLEET), found, hosts(1))) == ["fleet-2x", "my-fleet-2", "fleet.2", "fleet"]
    # More parts than a firewall has rules: these are named by their ports.
    found = have(*(listed(label, "1", OFFICE) for label in ("fleet-443", "fleet-8080")))
    assert labels(plan(want(FLEET), found, hosts(1))) == ["fleet-443", "fleet-8080", "fleet"]


def test_a_declared_rule_that_is_named_like_a_part_is_not_lost() -> None:
    own = rule("fleet-2", "9100", OFFICE)
    assert labels(plan(want(FLEET, own), have(listed("fleet-2", "9100", OFFICE)), hosts(1))) == ["fleet-2", "fleet"]
    for mode in ("append", "replace"):
        # To refuse it is as good.
        with contextlib.suppress(ValueError):
            then = lines(plan(want(FLEET, own, mode=mode), None, hosts(300)))
            assert own.line() in then and len({line.split(":")[0] for line in then}) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_rules_of_others_may_have_labels_of_each_other_or_none(count: int) -> None:
    twins = [listed("twin", str(port), OFFICE) for port in range(1, count + 1)]
    bare = [{**one, "label": None} for one in twins]
    assert labels(plan(want(SSH), have(*twins, *bare), fleet())) == ["twin"] * count + [""] * count + ["ssh"]


def test_no_rule_with_a_declared_label_is_left_as_it_was() -> None:
    """A label is for display alone: others may give one to two rules."""
    found = have(listed("ssh", "22", "0.0.0.0/0"), listed("ssh", "22", "198.51.100.0/24"))
    assert lines(plan(want(SSH), found, fleet())) == [SSH.line()]


def test_two_rules_of_one_label_are_settled_after_one_run() -> None:
    found = have(listed("ssh", "22", OFFICE), listed("ssh", "22", "198.51.100.0/24"))
    desired = want(rule("ssh", "22", "::/0", "0.0.0.0/0"))
    assert plan(desired, taken(plan(desired, found, fleet())), fleet()).action == "keep"


@pytest.mark.parametrize(
    ("count", "parts"), [(255, ["fleet"]), (256, ["fleet", "fleet-2"]), (511, ["fleet", "fleet-2", "fleet-3"])]
)
def test_a_part_has_as_many_addresses_as_a_rule_takes(count: int, parts: list[str]) -> None:
    step = plan(want(FLEET), None, hosts(count))
    assert step.wanted and labels(step) == parts
    assert {at for one in step.wanted.inbound for at in one.addresses} == hosts(count)
    assert max(len(one.addresses) for one in step.wanted.inbound) == 255


def test_the_label_of_a_part_is_one_that_linode_takes() -> None:
    # To refuse it is as good.
    with contextlib.suppress(ValueError):
        step = plan(want(rule("f" * 32, "6379", from_fleet=True)), None, hosts(256))
        assert max(map(len, labels(step))) <= 32


def test_the_fleets_addresses_come_after_the_declared_ones_and_each_once() -> None:
    both = rule("fleet", "6379", OFFICE, "10.0.0.1", from_fleet=True)
    assert lines(plan(want(both), None, hosts(3))) == [
        f"fleet: ACCEPT TCP 6379 from {OFFICE}, 10.0.0.1/32, 10.0.0.0/32, 10.0.0.2/32"
    ]
    alone = plan(want(both), None, fleet())
    assert (lines(alone), alone.reason) == ([f"fleet: ACCEPT TCP 6379 from {OFFICE}, 10.0.0.1/32"], "")


def test_every_rule_that_is_left_out_is_said_though_nothing_changes() -> None:
    desired = want(FLEET, SSH, outbound=(rule("peers", "", from_fleet=True),))
    step = plan(desired, have(listed("ssh", "22", OFFICE)), fleet())
    assert (step.action, step.reason) == ("keep", "fleet, peers left out until the fleet has an instance")
    assert desired.names_fleet and not want(SSH).names_fleet and not Desired("pond", "pond").names_fleet


@pytest.mark.parametrize(
    ("inbound", "outbound", "theirs", "fits"),
    [(25, 0, 0, True), (13, 12, 0, True), (13, 13, 0, False), (20, 0, 5, True), (20, 0, 6, False)],
)
def test_rules_in_and_out_count_together_and_those_of_others_too(
    inbound: int, outbound: int, theirs: int, fits: bool
) -> None:
    declared = [rule(f"rule-{number}", "1", OFFICE) for number in range(inbound)]
    out = tuple(rule(f"out-{number}", "1", OFFICE) for number in range(outbound))
    found = have(*(listed(f"their-{number}", "1", OFFICE) for number in range(theirs)))
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="Linode takes 25"):
        assert plan(want(*declared, outbound=out), found, fleet()).changes
    # Those of others go.
    if not outbound:
        assert plan(want(*declared, mode="replace"), found, fleet()).changes


def test_parts_count_as_rules() -> None:
    assert len(lines(plan(want(FLEET), None, hosts(25 * 255)))) == 25
    with pytest.raises(ValueError, match="26 rules"):
        plan(want(FLEET), None, hosts(25 * 255 + 1))


@pytest.mark.parametrize("declared", [("prod",), ("prod", "prod"), ("prod", "PROD")])
def test_a_tag_is_given_once_whatever_its_case(declared: tuple[str, ...]) -> None:
    for found in (None, have()):
        step = plan(Desired("pond", "pond", tags=declared), found, fleet())
        assert step.wanted and step.wanted.tags == (TAG, "prod")


def test_tags_that_differ_in_their_case_alone_are_no_change() -> None:
    found = have(tags=["Prod", TAG, "theirs"])
    assert plan(Desired("pond", "pond", tags=("prod", "PROD")), found, fleet()).action == "keep"


def test_no_tag_of_others_is_taken_away() -> None:
    found = have(tags=["prod", "Prod", TAG])
    assert plan(Desired("pond", "pond", tags=("PROD",)), found, fleet()).action == "keep"
    step = plan(Desired("pond", "pond", tags=("new",)), found, fleet())
    assert step.wanted and step.wanted.tags == ("prod", "Prod", TAG, "new")


def test_the_diff_of_a_change_has_what_differs_alone() -> None:
    step = plan(want(SSH, tags=("prod",)), have(listed("web", "80", OFFICE)), fleet())
    shown = step.diff()
    assert shown["before_header"] == shown["after_header"] == "firewall pond"
    assert "policy" not in shown["before"] + shown["after"]
    assert f"- 'ssh: ACCEPT TCP 22 from {OFFICE}'\n" in shown["after"] and "ssh" not in shown["before"]
    gone = plan_absent(want(), have(listed("web", "80", OFFICE))).diff()
    assert "web: ACCEPT TCP 80" in gone["before"] and gone["after"] == ""
    blocked = plan(want(SSH), have(tags=[]), fleet()).diff()
    assert blocked["before"] == blocked["after"] == ""


@pytest.mark.parametrize("tags", [[], ["plimsoll-fleet-pond2"], ["plimsoll-fleet"], None])
def test_the_tag_of_another_fleet_is_not_ours(tags: Any) -> None:
    foreign = have(tags=tags)
    for pending in (False, True):
        assert plan_absent(want(), foreign, pending).action == "blocked"
    step = plan(want(SSH, tags=(TAG,)), foreign, fleet())
    assert (step.action, step.changes, step.wanted) == ("blocked", False, None)


# ---- whom it would shut out ----


@pytest.mark.parametrize(
    ("rules", "policy", "open_to_me"),
    [
        ([SSH], "DROP", True),
        ([], "DROP", False),
        ([], "ACCEPT", True),
        ([rule("ssh", "22", "198.51.100.0/24")], "DROP", False),
        ([rule("ssh", "2222", OFFICE)], "DROP", False),
        ([rule("ssh", "20-30", OFFICE)], "DROP", True),
        ([rule("ssh", "80, 22", OFFICE)], "DROP", True),
        ([rule("all", "", OFFICE)], "DROP", True),
        ([rule("ssh", "22", OFFICE, protocol="UDP")], "DROP", False),
        ([rule("not", "22", ME, action="DROP"), SSH], "DROP", False),
        ([SSH, rule("not", "22", ME, action="DROP")], "ACCEPT", True),
        ([rule("not", "22", "0.0.0.0/0", action="DROP")], "ACCEPT", False),
        ([rule("ssh", "22", "::/0")], "DROP", False),
    ],
)
def test_the_first_rule_that_fits_decides(rules: list[Any], policy: str, open_to_me: bool) -> None:
    assert accepts(rules, policy, net(ME)) is open_to_me


def test_all_of_a_network_must_be_let_in() -> None:
    halves = [rule("one", "22", "203.0.113.0/25"), rule("two", "22", "203.0.113.128/25")]
    assert accepts(halves, "DROP", net(OFFICE)) and not accepts(halves[:1], "DROP", net(OFFICE))
    hole = [rule("hole", "22", ME, action="DROP"), SSH]
    assert not accepts(hole, "DROP", net(OFFICE))


@pytest.mark.parametrize(
    ("rules", "policy", "network", "open_to_it"),
    [
        ([rule("ssh", "1-22", OFFICE)], "DROP", ME, True),
        ([rule("ssh", "22-23", OFFICE)], "DROP", ME, True),
        ([rule("ssh", "1-21", OFFICE)], "DROP", ME, False),
        ([rule("ssh", "23-65535", OFFICE)], "DROP", ME, False),
        ([rule("ssh", "220, 2222", OFFICE)], "DROP", ME, False),
        # What concerns no TCP neither shuts nor opens.
        ([rule("udp", "22", "0.0.0.0/0", protocol="UDP", action="DROP"), SSH], "DROP", ME, True),
        ([rule("icmp", "", "0.0.0.0/0", protocol="ICMP", action="DROP"), SSH], "DROP", ME, True),
        ([rule("tunnel", "", OFFICE, protocol="IPENCAP")], "DROP", ME, False),
        ([rule("web", "80", "0.0.0.0/0", action="DROP"), SSH], "DROP", ME, True),
        ([rule("not", "", "0.0.0.0/0", action="DROP"), SSH], "ACCEPT", ME, False),
        ([SSH, rule("not", "", "0.0.0.0/0", action="DROP")], "DROP", ME, True),
        ([rule("ipv6", "22", "::/0", action="DROP")], "ACCEPT", ME, True),
        ([rule("ipv4", "22", "0.0.0.0/0", action="DROP")], "ACCEPT", "2001:db8::7/128", True),
        ([rule("ipv6", "22", "2001:db8::/64")], "DROP", "2001:db8::7/128", True),
        ([rule("ipv6", "22", "2001:db8::/64")], "DROP", "2001:db8:0:1::7/128", False),
        ([rule("ipv6", "22", "2001:db8::/64")], "DROP", "2001:db8::/63", False),
        # Addresses of one version are not those of the other that have their number.
        ([rule("ipv6", "22", "::cb00:7107")], "DROP", ME, False),
        ([rule("ipv4", "22", "0.0.0.0/0")], "DROP", "::/96", False),
        ([rule("ipv4", "22", "0.0.0.0/0")], "DROP", "255.255.255.255/32", True),
        ([rule("ipv4", "22", "0.0.0.0/0")], "DROP", "::/128", False),
        ([rule("all", "22", "0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1")], "DROP", "0.0.0.0/0", True),
        ([rule("all", "22", "0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1")], "DROP", "::/0", True),
        # Partly decided by one, partly by another.
        ([rule("one", "22", "203.0.113.0/25")], "ACCEPT", OFFICE, True),
        ([rule("one", "22", "203.0.113.0/25"), rule("not", "22", OFFICE, action="DROP")], "ACCEPT", OFFICE, False),
        ([rule("one", "22", "203.0.113.0/25"), rule("not", "22", OFFICE, action="DROP")], "DROP", ME, True),
        ([SSH, rule("hole", "22", ME, action="DROP")], "DROP", OFFICE, True),
    ],
)
def test_what_reaches_ssh(rules: list[Any], policy: str, network: str, open_to_it: bool) -> None:
    assert accepts(rules, policy, net(network)) is open_to_it


def test_what_reaches_ssh_is_what_trying_each_address_shows() -> None:
    """Against the plain meaning: the first rule that has the address."""
    dice = random.Random(7)
    for _ in range(300):
        rules = []
        for number in range(dice.randrange(6)):
            some = [f"10.0.0.{dice.randrange(16)}/{dice.choice((28, 29, 30, 31, 32))}" for _ in range(3)]
            action = dice.choice(("ACCEPT", "DROP"))
            rules.append(rule(f"rule-{number}", dice.choice(("", "22", "80")), *some, action=action))
        policy = dice.choice(("ACCEPT", "DROP"))
        allowed = []
        for address in net("10.0.0.0/28"):
            fits = (one for one in rules if one.ports != "80" and any(address in at for at in one.addresses))
            allowed.append(next((one.action for one in fits), policy) == "ACCEPT")
            assert accepts(rules, policy, ipaddress.ip_network(address)) is allowed[-1]
        assert accepts(rules, policy, net("10.0.0.0/28")) is all(allowed)


def shut(found: Firewall | None, *rules: firewall.Rule, run_from: tuple[str, ...] = ()) -> str:
    step = plan(want(*rules, mode="replace"), found, fleet())
    return lockout(step, found, [net(at) for at in run_from])


USED = [{"id": 1, "type": "linode", "label": "pond-1"}]
ELSEWHERE = rule("ssh", "22", "198.51.100.0/24")


def test_a_change_that_shuts_out_the_run_is_told() -> None:
    said = shut(have(listed("ssh", "22", OFFICE)), ELSEWHERE, run_from=(ME,))
    assert said.startswith(f"would shut ssh to {ME}, which this run comes from") and "allow_lockout" in said
    assert (
        shut(have(listed("ssh", "22", OFFICE)), SSH, ELSEWHERE.__class__("more", addresses=(net("10.0.0.0/8"),))) == ""
    )
    assert shut(have(listed("ssh", "22", "198.51.100.0/24")), rule("web", "80", OFFICE), run_from=(ME,)) == ""


def test_a_new_firewall_may_not_shut_out_the_run() -> None:
    assert "would shut ssh to" in shut(None, ELSEWHERE, run_from=(ME,))
    assert shut(None, SSH, run_from=(ME,)) == "" == shut(None, ELSEWHERE)


def test_where_the_run_comes_from_unknown_nobody_who_reaches_a_used_firewall_may_lose_that() -> None:
    found = have(listed("ssh", "22", OFFICE), entities=USED)
    said = shut(found, ELSEWHERE)
    assert f"would shut ssh to {OFFICE}, and where this run comes from is not known" in said and "run_from" in said
    assert shut(found, rule("ssh", "22", "0.0.0.0/0")) == ""
    assert "would shut" in shut(found, rule("ssh", "22", "203.0.113.0/25"))
    assert shut(replace(found, attached=()), ELSEWHERE) == ""
    opened = replace(have(entities=USED), inbound_policy="ACCEPT")
    step = plan(want(inbound_policy="DROP"), opened, fleet())
    assert "0.0.0.0/0, ::/0" in lockout(step, opened, [])


def test_a_public_address_of_the_controller_is_its_own_and_a_private_one_is_not_known(monkeypatch: Any) -> None:
    class Probe:
        def __init__(self, family: int, kind: int) -> None:
            self.family = family

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def connect(self, at: Any) -> None:
            if self.family == socket.AF_INET6:
                raise OSError("no route")

        def getsockname(self) -> Any:
            return address, 1234

    monkeypatch.setattr(firewall.socket, "socket", Probe)
    address = "10.0.0.5"
    assert firewall.own_addresses() == []
    address = "8.8.4.4"
    assert firewall.own_addresses() == [net("8.8.4.4/32")]


BAD = "203.0.113.66/32"


@pytest.mark.parametrize("used", [[], USED])
def test_a_known_address_may_not_be_shut_out_whether_or_not_somebody_is_behind_it(used: Any) -> None:
    found = have(listed("ssh", "22", OFFICE), entities=used)
    assert f"would shut ssh to {ME}" in shut(found, ELSEWHERE, run_from=(ME,))
    # Whoever else reaches it may.
    assert shut(found, rule("ssh", "22", ME), run_from=(ME,)) == ""


def test_of_several_addresses_the_one_that_is_shut_out_is_named() -> None:
    found = have(listed("ssh", "22", OFFICE, "2001:db8::/64"))
    run_from = (ME, "2001:db8::7/128", "192.0.2.1/32")
    assert "to 2001:db8::7/128, which" in shut(found, SSH, run_from=run_from)
    assert shut(found, rule("ssh", "22", OFFICE, "2001:db8::/48"), run_from=run_from) == ""


@pytest.mark.parametrize("run_from", [(), (OFFICE,)])
def test_two_halves_are_the_whole(run_from: tuple[str, ...]) -> None:
    found = have(listed("ssh", "22", OFFICE), entities=USED)
    low, high = rule("low", "22", "203.0.113.0/25"), rule("high", "", "203.0.113.128/25")
    assert shut(found, low, high, run_from=run_from) == ""
    assert f"would shut ssh to {OFFICE}" in shut(found, low, run_from=run_from)
    joined = have(listed("low", "22", "203.0.113.0/25"), listed("high", "22", "203.0.113.128/25"), entities=USED)
    assert shut(joined, SSH, run_from=run_from) == ""


@pytest.mark.parametrize("run_from", [(), (OFFICE,)])
@pytest.mark.parametrize("policy", ["DROP", "ACCEPT"])
def test_a_hole_in_what_ssh_is_open_to_does_not_end_the_guard(policy: str, run_from: tuple[str, ...]) -> None:
    rules = [listed("bad", "22", BAD, action="DROP"), *([listed("ssh", "22", OFFICE)] if policy == "DROP" else [])]
    found = replace(have(*rules, entities=USED), inbound_policy=policy)
    step = plan(want(ELSEWHERE, mode="replace", inbound_policy="DROP"), found, fleet())
    assert "would shut ssh to" in lockout(step, found, [net(at) for at in run_from])
    # Another hole shuts somebody out too; none does not.
    more = plan(
        want(rule("worse", "22", ME, action="DROP"), *map(firewall.read_rule, rules), mode="replace"), found, ()
    )
    assert "would shut ssh to" in lockout(more, found, [net(at) for at in run_from])
    none = plan(want(SSH, rule("all", "22", "0.0.0.0/0", "::/0"), mode="replace"), found, ())
    assert lockout(none, found, [net(at) for at in run_from]) == ""


@pytest.mark.parametrize("run_from", [(), (ME,)])
def test_a_drop_shuts_out_where_it_comes_before_what_lets_in(run_from: tuple[str, ...]) -> None:
    found = have(listed("ssh", "22", OFFICE), entities=USED)
    drop = rule("not", "", "0.0.0.0/0", action="DROP")
    addresses = [net(at) for at in run_from]
    # Appended, it comes last.
    assert lockout(plan(want(drop), found, fleet()), found, addresses) == ""
    assert "would shut" in shut(found, drop, SSH, run_from=run_from)
    assert "would shut" in shut(found, rule("ssh", "22", OFFICE, action="DROP"), run_from=run_from)
    assert "would shut" in shut(found, run_from=run_from)
    assert shut(found, rule("not", "", "0.0.0.0/0", action="DROP", protocol="UDP"), SSH, run_from=run_from) == ""


@pytest.mark.parametrize("run_from", [(), (ME,)])
def test_what_has_no_say_in_ssh_from_outside_is_not_guarded(run_from: tuple[str, ...]) -> None:
    addresses = [net(at) for at in run_from]
    shut_already = have(entities=USED)
    for found in (have(listed("ssh", "22", OFFICE), entities=USED), shut_already):
        for desired in (
            Desired("pond", "pond", outbound_policy="DROP", outbound=(rule("not", "", "0.0.0.0/0", action="DROP"),)),
            Desired("pond", "pond", tags=("prod",)),
            want(rule("web", "80", OFFICE)),
        ):
            step = plan(desired, found, fleet())
            assert step.changes and lockout(step, found, addresses) == ""
        assert lockout(plan_absent(want(), found), found, addresses) == ""
        assert lockout(plan_absent(want(), found, pending=True), found, addresses) == ""
    # Nor is what stays shut.
    assert lockout(plan(want(inbound_policy="DROP"), shut_already, fleet()), shut_already, addresses) == ""


def test_a_policy_that_lets_in_no_more_shuts_out_who_has_no_rule() -> None:
    opened = replace(have(listed("ssh", "22", OFFICE)), inbound_policy="ACCEPT")
    step = plan(want(inbound_policy="DROP"), opened, fleet())
    assert lockout(step, opened, [net(ME)]) == ""
    assert "to 192.0.2.1/32, which" in lockout(step, opened, [net(ME), net("192.0.2.1/32")])


def test_a_guard_that_knows_nothing_names_few_of_many() -> None:
    many = [f"10.0.{number}.0/24" for number in range(100)]
    said = shut(have(listed("ssh", "22", *many), entities=USED), SSH)
    assert "10.0.0.0/24, 10.0.1.0/24" in said and len(said) < 500
    few = shut(have(listed("ssh", "22", *many), entities=USED), rule("ssh", "22", *many[:-1]))
    assert "would shut ssh to 10.0.99.0/24, and where" in few


def test_the_guard_is_quick_for_a_large_fleet() -> None:
    found = taken(plan(want(SSH, rule("all", "", from_fleet=True)), None, hosts(1200)))
    found = replace(found, attached=(("linode", "pond-1"),))
    step = plan(want(rule("web", "80", "0.0.0.0/0")), found, hosts(1200))
    began = time.process_time()
    assert lockout(step, found, []) == "" and time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("four", "six", "own"),
    [
        ("8.8.4.4", "2606:4700::7", ["8.8.4.4/32", "2606:4700::7/128"]),
        ("100.64.0.7", "fe80::7%eth0", []),
        ("192.168.1.7", "fd00::7", []),
        ("127.0.0.1", "::1", []),
        ("169.254.1.7", None, []),
        (None, "2606:4700::7%eth0", ["2606:4700::7/128"]),
        (None, None, []),
    ],
)
@pytest.mark.parametrize("fails_at", ["open", "connect"])
def test_only_addresses_that_others_see_are_the_controllers_own(
    four: str | None, six: str | None, own: list[str], fails_at: str, monkeypatch: Any
) -> None:
    class Probe:
        def __init__(self, family: int, kind: int) -> None:
            assert kind == socket.SOCK_DGRAM
            self.address = {socket.AF_INET: four, socket.AF_INET6: six}[socket.AddressFamily(family)]
            if self.address is None and fails_at == "open":
                raise OSError("no such family")

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def connect(self, at: Any) -> None:
            if self.address is None:
                raise OSError("no route")

        def getsockname(self) -> Any:
            return (self.address, 1234)

    monkeypatch.setattr(firewall.socket, "socket", Probe)
    assert [str(at) for at in firewall.own_addresses()] == own


# ---- carrying it out ----


class FakeApi:
    """One firewall in memory. script: errors for the POSTs to come, and whether they are done all the same."""

    def __init__(self, *there: dict[str, Any], script: tuple[tuple[Exception, bool], ...] = ()) -> None:
        self.there, self.script = list(there), list(script)
        self.instances: list[dict[str, Any]] = []
        self.calls: list[tuple[str, Any]] = []

    def post(self, path: str, body: Any = None) -> Any:
        self.calls.append((f"POST {path}", body))
        error, done = self.script.pop(0) if self.script else (None, True)
        if done:
            self.there.append({**body, "id": 7, "entities": []})
        if error:
            raise error
        return self.there[-1]

    def put(self, path: str, body: Any) -> Any:
        self.calls.append((f"PUT {path}", body))

    def delete(self, path: str) -> Any:
        self.calls.append((f"DELETE {path}", None))
        if not self.there:
            raise Refused("404", 404, [])

    def list(self, path: str, filters: Any = None) -> list[dict[str, Any]]:
        self.calls.append((f"LIST {path}", filters))
        if path.endswith("/devices"):
            return [{"entity": USED[0]}]
        return list(self.instances if path == "/linode/instances" else self.there)


class Keeping(FakeApi):
    """One that is as it was told to be, for a second look."""

    def put(self, path: str, body: Any) -> Any:
        super().put(path, body)
        for one in self.there:
            one.update({"rules": body} if path.endswith("/rules") else body)

    def delete(self, path: str) -> Any:
        super().delete(path)
        self.there.clear()


LOST, TAKEN = NoAnswer("502"), Refused("400", 400, [("label", "Label must be unique among your firewalls")])


@pytest.mark.parametrize(
    ("script", "posts"),
    [(((LOST, True),), 1), (((LOST, False),), 2), (((TAKEN, True),), 1)],
    ids=["made", "lost", "taken"],
)
def test_a_lost_answer_makes_no_second_firewall(script: Any, posts: int) -> None:
    api = FakeApi(script=script)
    made = firewall.apply(plan(want(SSH, FLEET), None, fleet()), None, api)
    assert made and made.id == 7
    sent = [body for call, body in api.calls if call.startswith("POST")]
    assert len(sent) == posts and sent[0]["tags"] == [TAG]
    assert sent[0]["rules"]["inbound"] == [SSH.body()] and "fleet" not in json.dumps(sent[0]["rules"])


def test_a_label_that_another_took_is_no_firewall_of_ours() -> None:
    api = FakeApi(raw(tags=["theirs"]), script=((TAKEN, False),))
    with pytest.raises(Refused):
        firewall.apply(plan(want(SSH), None, fleet()), None, api)


def test_only_what_differs_is_written() -> None:
    for desired, calls in (
        (want(SSH), ["PUT /networking/firewalls/7/rules"]),
        (Desired("pond", "pond", tags=("prod",)), ["PUT /networking/firewalls/7"]),
        (want(), []),
    ):
        api = FakeApi()
        firewall.apply(plan(desired, have(), fleet()), have(), api)
        assert [call for call, _ in api.calls] == calls


def test_a_firewall_that_is_gone_already_is_deleted() -> None:
    assert firewall.apply(plan_absent(want(), have()), have(), FakeApi()) is None


def test_where_the_api_does_not_list_who_is_behind_it_that_is_asked() -> None:
    old = raw()
    del old["entities"]
    found = firewall.find(FakeApi(old), "pond")
    assert found and found.attached == (("linode", "pond-1"),)


def test_a_new_firewall_is_asked_for_in_one_request_with_what_is_declared_alone() -> None:
    ping = rule("ping", "", "2001:db8::/64", protocol="ICMP", description="note")
    desired = want(
        SSH, ping, outbound=(rule("out", "", OFFICE, action="DROP"),), tags=("prod",), outbound_policy="DROP"
    )
    api = FakeApi()
    made = firewall.apply(plan(desired, None, fleet()), None, api)
    assert made == Firewall.of(api.there[0])
    one = {"label": "ssh", "action": "ACCEPT", "protocol": "TCP", "ports": "22", "addresses": {"ipv4": [OFFICE]}}
    two = {"label": "ping", "action": "ACCEPT", "protocol": "ICMP", "addresses": {"ipv6": ["2001:db8::/64"]}}
    out = {"label": "out", "action": "DROP", "protocol": "TCP", "addresses": {"ipv4": [OFFICE]}}
    rules = {"inbound": [one, {**two, "description": "note"}], "outbound": [out]}
    policies = {"inbound_policy": "DROP", "outbound_policy": "DROP"}
    body = {"label": "pond", "tags": [TAG, "prod"], "rules": {**rules, **policies}}
    assert api.calls == [("POST /networking/firewalls", body)]


def test_after_each_lost_answer_there_is_a_look_and_in_the_end_an_error() -> None:
    api = FakeApi(script=((LOST, False),) * 9)
    with pytest.raises(NoAnswer):
        firewall.apply(plan(want(SSH), None, fleet()), None, api)
    look = ["POST /networking/firewalls", "LIST /networking/firewalls"]
    assert [call for call, _ in api.calls] == look * firewall.CREATE_TRIES
    assert api.calls[1][1] == {"label": "pond"}


def test_a_firewall_of_others_with_this_label_is_not_what_a_lost_answer_made() -> None:
    api = FakeApi(raw(tags=["theirs"]), script=((LOST, False), (TAKEN, False)))
    with pytest.raises(Refused):
        firewall.apply(plan(want(SSH), None, fleet()), None, api)
    assert [call.split()[0] for call, _ in api.calls] == ["POST", "LIST"] * 2


def test_what_a_lost_answer_made_is_found_though_its_tags_have_another_case() -> None:
    api = FakeApi(raw(tags=["Prod", TAG]), script=((LOST, False), (TAKEN, False)))
    made = firewall.apply(plan(want(SSH, tags=("prod",)), None, fleet()), None, api)
    assert made and made.id == 7


@pytest.mark.parametrize("errors", [[("rules", "no")], [("label", "Length must be 3-32 characters")], []])
def test_another_refusal_is_the_end(errors: list[tuple[str, str]]) -> None:
    api = FakeApi(script=((Refused("400", 400, errors), False),))
    with pytest.raises(Refused):
        firewall.apply(plan(want(SSH), None, fleet()), None, api)
    assert len(api.calls) == 1


def test_a_change_sends_all_rules_and_policies_for_the_request_replaces_them() -> None:
    found = have(listed("theirs", "1", OFFICE))
    api = FakeApi()
    then = firewall.apply(plan(want(SSH, tags=("prod",)), found, fleet()), found, api)
    (rules_at, rules), (tags_at, tags) = api.calls
    assert (rules_at, tags_at) == ("PUT /networking/firewalls/7/rules", "PUT /networking/firewalls/7")
    assert [one["label"] for one in rules.pop("inbound")] == ["theirs", "ssh"]
    assert rules == {"outbound": [], "inbound_policy": "DROP", "outbound_policy": "ACCEPT"}
    assert tags == {"tags": [TAG, "prod"]}
    assert then and (then.id, then.tags) == (7, (TAG, "prod"))


def bare(one: Any) -> Any:
    """Without what is null."""
    return {key: bare(value) for key, value in one.items() if value is not None} if isinstance(one, dict) else one


THEIRS = listed("theirs", "80,443", OFFICE)


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param({key: THEIRS[key] for key in THEIRS if key != "label"}, id="no-label"),
        pytest.param({**THEIRS, "label": None, "description": None}, id="null-label"),
        pytest.param({**THEIRS, "addresses": {"ipv4": [], "ipv6": ["2001:DB8::/64"]}}, id="empty-list"),
        pytest.param({**THEIRS, "addresses": {"ipv4": [OFFICE, "pl::vpcs:1234"]}}, id="prefix-list"),
        pytest.param({"ruleset": 5}, id="rule-set"),
        pytest.param({"ruleset": 5, "label": None, "addresses": None, "ports": None}, id="rule-set-with-nulls"),
        pytest.param({**THEIRS, "kind_of_tomorrow": 1}, id="unknown-key"),
    ],
)
def test_a_rule_of_others_goes_back_as_it_came(theirs: dict[str, Any]) -> None:
    api = Keeping(raw(theirs))
    found = firewall.find(api, "pond")
    assert found
    firewall.apply(plan(want(SSH), found, fleet()), found, api)
    ((_, body),) = [call for call in api.calls if call[0].startswith("PUT")]
    came = bare(theirs)
    if "addresses" in came:
        # The API refuses an empty list beside another.
        came["addresses"] = {version: at for version, at in came["addresses"].items() if at}
    assert body["inbound"] == [came, SSH.body()]
    assert plan_absent(want(), found).action == "delete"
    again = firewall.find(api, "pond")
    assert plan(want(SSH), again, fleet()).action == "keep"


def test_a_rule_with_more_than_is_declared_is_no_declared_rule() -> None:
    found = have({**listed("ssh", "22"), "addresses": {"ipv4": [OFFICE, "pl::vpcs:1234"]}})
    assert lines(plan(want(SSH), found, fleet())) == [SSH.line()]


def test_only_an_answer_that_it_is_gone_counts_as_deleted() -> None:
    class Locked(FakeApi):
        def delete(self, path: str) -> Any:
            raise Refused("403", 403, [])

    with pytest.raises(Refused):
        firewall.apply(plan_absent(want(), have()), have(), Locked(raw()))


def test_what_is_blocked_or_kept_asks_nothing() -> None:
    foreign, api = have(tags=["theirs"]), FakeApi()
    assert firewall.apply(plan(want(SSH), foreign, fleet()), foreign, api) == foreign
    assert firewall.apply(plan(want(), have(), fleet()), have(), api) == have()
    assert firewall.apply(plan_absent(want(), None), None, api) is None
    assert api.calls == []


def test_a_firewall_is_known_by_its_whole_label() -> None:
    api = FakeApi(raw(label="pond-2"), raw(label="Pond"))
    assert firewall.find(api, "pond") is None
    assert api.calls == [("LIST /networking/firewalls", {"label": "pond"})]
    api = FakeApi(raw(label="pond-2"), raw(id=8))
    found = firewall.find(api, "pond")
    # Listed as in front of nobody, it is not asked for its devices.
    assert found and (found.id, found.attached, len(api.calls)) == (8, (), 1)


def test_every_address_of_an_instance_is_the_fleets() -> None:
    shape = {"id": 1, "label": "pond-1", "status": "running", "type": "t", "region": "r"}
    one = {**shape, "ipv4": ["203.0.113.9", "192.168.128.9"], "ipv6": "2001:db8::9/64"}
    two = {**shape, "ipv4": ["203.0.113.10"], "ipv6": None}
    wanted = fleet("203.0.113.9/32", "192.168.128.9/32", "2001:db8::9/128", "203.0.113.10/32")
    assert firewall.fleet_networks([one, two]) == wanted
    assert firewall.fleet_networks([shape]) == set()


# ---- the module ----


@pytest.fixture
def module(monkeypatch: Any, capsys: Any) -> Any:
    def run(api: FakeApi, *, check: bool = False, own: tuple[str, ...] = (), **params: Any) -> dict[str, Any]:
        monkeypatch.setattr(linode_firewall.linode, "Api", lambda *_: api)
        monkeypatch.setattr(linode_firewall.firewall, "own_addresses", lambda: [net(at) for at in own])
        given = {"label": "pond", "fleet": "pond", "api_token": "t0ken-t0ken", "_ansible_check_mode": check, **params}
        with patch_module_args(given), pytest.raises(SystemExit):
            linode_firewall.main()
        said = capsys.readouterr().out
        assert "t0ken-t0ken" not in said
        return json.loads(said)

    return run


GIVEN = {"label": "ssh", "ports": "22", "addresses": [OFFICE]}


def written(api: FakeApi) -> list[str]:
    return [call for call, _ in api.calls if not call.startswith("LIST")]


def test_a_check_writes_nothing_and_has_no_id_yet(module: Any) -> None:
    api = FakeApi()
    found = module(api, check=True, inbound=[GIVEN])
    assert found["changed"] and found["firewall"]["id"] is None and written(api) == []
    assert "ssh: ACCEPT TCP 22" in found["diff"]["after"]
    assert module(api, inbound=[GIVEN])["firewall"]["id"] == 7


def test_the_fleets_addresses_are_asked_for_where_a_rule_has_them_alone(module: Any) -> None:
    api = FakeApi(raw())
    module(api, inbound=[GIVEN])
    assert not [call for call, _ in api.calls if call == "LIST /linode/instances"]
    api.instances = [{"id": 1, "label": "pond-1", "status": "running", "type": "t", "region": "r", "tags": [TAG]}]
    api.instances[0] |= {"ipv4": ["203.0.113.9", "192.168.128.9"], "ipv6": "2001:db8::9/128"}
    found = module(api, inbound=[{"label": "fleet", "ports": "6379", "from_fleet": True}])
    wanted = "fleet: ACCEPT TCP 6379 from 192.168.128.9/32, 203.0.113.9/32, 2001:db8::9/128"
    assert found["firewall"]["inbound"] == [wanted]


def test_a_lockout_is_refused_unless_it_is_allowed(module: Any) -> None:
    api = FakeApi(raw(listed("ssh", "22", "0.0.0.0/0"), entities=USED))
    given = {"inbound": [GIVEN], "run_from": ["198.51.100.7"]}
    refused = module(api, **given)
    assert refused["failed"] and "nothing was changed: it would shut ssh to 198.51.100.7/32" in refused["msg"]
    assert written(api) == []
    assert module(api, **given, allow_lockout=True)["changed"] and written(api)


def test_what_is_wrong_with_a_rule_is_said_before_anything_is_asked(module: Any) -> None:
    api = FakeApi()
    assert "'nowhere' is no IP address" in module(api, inbound=[{**GIVEN, "addresses": ["nowhere"]}])["msg"]
    assert "run_from" in module(api, run_from=["here"])["msg"] and api.calls == []


FLEETS = {"label": "fleet", "ports": "6379", "from_fleet": True}


def instance(number: int, **more: Any) -> dict[str, Any]:
    one = {"id": number, "label": f"pond-{number}", "status": "running", "type": "t", "region": "r", "tags": [TAG]}
    return {**one, "ipv4": [f"203.0.113.{number}"], "ipv6": None, **more}


def test_a_second_run_changes_nothing_and_takes_one_request(module: Any) -> None:
    api = Keeping()
    given = {"inbound": [{**GIVEN, "addresses": ["::/0", "203.0.113.5/24"]}], "tags": ["prod"], "outbound": []}
    first = module(api, **given)
    assert first["changed"] and first["plan"][0]["action"] == "create"
    del api.calls[:]
    for check in (False, True):
        again = module(api, check=check, **given)
        assert (again["changed"], again["plan"][0]["action"], again["firewall"]) == (False, "keep", first["firewall"])
    assert [call for call, _ in api.calls] == ["LIST /networking/firewalls"] * 2


def test_a_second_run_with_a_rule_for_the_fleet_takes_two_requests(module: Any) -> None:
    api = Keeping()
    api.instances = [instance(1)]
    assert module(api, inbound=[FLEETS, GIVEN], run_from=[ME])["changed"]
    del api.calls[:]
    again = module(api, inbound=[FLEETS, GIVEN], run_from=[ME])
    assert again["plan"][0]["action"] == "keep" and not again["changed"]
    assert api.calls == [("LIST /networking/firewalls", {"label": "pond"}), ("LIST /linode/instances", {"tags": TAG})]


def test_a_rule_for_a_fleet_of_nobody_is_said_to_be_left_out(module: Any) -> None:
    api = Keeping()
    found = module(api, inbound=[FLEETS, GIVEN])
    assert found["plan"][0]["reason"] == "fleet left out until the fleet has an instance"
    assert found["firewall"]["inbound"] == [SSH.line()]
    again = module(api, inbound=[FLEETS, GIVEN])
    assert not again["changed"] and again["plan"][0]["reason"] == found["plan"][0]["reason"]


def test_a_check_shows_what_the_run_then_does(module: Any) -> None:
    for there in ([], [raw(listed("theirs", "1", OFFICE))]):
        api = Keeping(*there)
        given = {"inbound": [GIVEN, FLEETS], "tags": ["prod"], "mode": "replace", "inbound_policy": "DROP"}
        checked, ran = module(api, check=True, **given), module(api, **given)
        assert checked["changed"] and all(checked[key] == ran[key] for key in ("plan", "diff", "changed"))
        assert checked["firewall"] == {**ran["firewall"], "id": 7 if there else None}


def test_what_is_left_out_is_left_alone_and_an_empty_list_empties(module: Any) -> None:
    api = Keeping(raw(listed("theirs", "80", OFFICE)))
    assert not module(api, mode="replace")["changed"]
    assert not module(api, mode="append", inbound=[], outbound=[])["changed"]
    emptied = module(api, mode="replace", inbound=[])
    assert emptied["changed"] and emptied["firewall"]["inbound"] == []


def test_ports_may_be_a_number(module: Any) -> None:
    assert module(Keeping(), inbound=[{**GIVEN, "ports": 22}])["firewall"]["inbound"] == [SSH.line()]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inbound": [{**GIVEN, "action": "REJECT"}]}, "value of action must be one of"),
        ({"inbound": [{**GIVEN, "port": "22"}]}, "Unsupported parameters"),
        ({"inbound": [{"ports": "22"}]}, "missing required arguments: label"),
        ({"inbound": [GIVEN, GIVEN]}, "inbound: two rules are labelled 'ssh'"),
        ({"outbound": [{**GIVEN, "ports": "ssh"}]}, "firewall pond: outbound: rule 'ssh': ports: 'ssh'"),
        ({"inbound": [{**GIVEN, "addresses": []}]}, "addresses must be given, or from_fleet"),
        ({"inbound": [{**GIVEN, "protocol": "ICMP"}]}, "ICMP has no ports"),
        ({"label": "po"}, "firewall po: label: 'po' must have"),
        ({"tags": ["ab"]}, "tags: 'ab' has 2 characters"),
        ({"state": "absent", "fleet": ""}, "fleet: ''"),
        ({"run_from": ["203.0.113.0/33"]}, "run_from: '203.0.113.0/33' is no IP address"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_a_slip_is_named_before_anything_is_asked(given: Any, words: str, check: bool, module: Any) -> None:
    api = Keeping(raw())
    found = module(api, check=check, **given)
    assert found["failed"] and words in found["msg"] and api.calls == []


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("state", ["present", "absent"])
def test_a_firewall_of_others_is_refused_in_a_sentence(state: str, check: bool, module: Any) -> None:
    api = Keeping(raw(tags=["theirs"]))
    found = module(api, check=check, state=state, allow_lockout=True)
    assert found["failed"] and not found["changed"] and written(api) == []
    assert found["plan"][0]["action"] == "blocked" and found["firewall"]["id"] == 7
    assert "nothing was changed: it is firewall 7, which has this label but not the tag" in found["msg"]


@pytest.mark.parametrize("check", [False, True])
def test_a_lockout_is_refused_in_a_check_too(check: bool, module: Any) -> None:
    for own, run_from in (((), [ME]), ((ME,), []), ((), [])):
        api = Keeping(raw(listed("ssh", "22", OFFICE), entities=USED))
        given = {"inbound": [{**GIVEN, "addresses": ["198.51.100.0/24"]}], "run_from": run_from}
        refused = module(api, check=check, own=own, **given)
        assert refused["failed"] and "would shut ssh to" in refused["msg"] and written(api) == []
        assert refused["firewall"]["inbound"] == [SSH.line()] and refused["plan"][0]["action"] == "update"
        allowed = module(api, check=check, own=own, allow_lockout=True, **given)
        assert allowed["changed"] and bool(written(api)) is not check


def test_a_declared_origin_goes_before_the_controllers_own_address(module: Any) -> None:
    api = Keeping(raw(listed("ssh", "22", OFFICE, "198.51.100.0/24"), entities=USED))
    given = {"inbound": [{**GIVEN, "addresses": ["198.51.100.0/24"]}], "run_from": ["198.51.100.5/24"]}
    assert module(api, own=(ME,), **given)["changed"]


def test_the_controllers_own_address_is_guarded_where_no_origin_is_declared(module: Any) -> None:
    given = {"inbound": [{**GIVEN, "addresses": ["198.51.100.0/24"]}]}
    refused = module(Keeping(), own=(ME,), **given)
    assert refused["failed"] and f"would shut ssh to {ME}, which this run comes from" in refused["msg"]
    # Unknown, it holds nobody up who is behind no firewall yet.
    assert module(Keeping(), **given)["changed"]


@pytest.mark.parametrize("inbound", [[FLEETS, GIVEN], [GIVEN], None])
def test_a_new_firewall_in_front_of_hosts_needs_to_know_where_the_run_comes_from(inbound: Any, module: Any) -> None:
    """Whether or not a rule has to do with these hosts."""
    api = Keeping()
    api.instances = [instance(1)]
    given = {} if inbound is None else {"inbound": inbound}
    refused = module(api, **given)
    assert refused.get("failed") and "set run_from" in refused["msg"] and written(api) == []
    assert module(api, **given, allow_lockout=True)["changed"]


def test_an_ipv6_address_of_the_controller_does_not_end_the_guard_of_ipv4(module: Any) -> None:
    """Hosts are reached by IPv4, which NAT hides while IPv6 needs none."""
    api = Keeping(raw(listed("ssh", "22", "0.0.0.0/0", "::/0"), entities=USED))
    found = module(api, own=("2606:4700::7/128",), inbound=[{**GIVEN, "addresses": ["::/0"]}])
    assert found.get("failed") and "would shut ssh to 0.0.0.0/0" in found["msg"]


def test_a_firewall_is_deleted_once(module: Any) -> None:
    api = Keeping(raw(listed("ssh", "22", OFFICE)))
    checked = module(api, check=True, state="absent")
    assert checked["changed"] and checked["firewall"] == {} and written(api) == []
    # What is declared otherwise is of no interest then.
    gone = module(api, state="absent", inbound=[{**GIVEN, "ports": "ssh"}], run_from=[ME])
    assert gone["changed"] and gone["firewall"] == {} and written(api) == ["DELETE /networking/firewalls/7"]
    assert "ssh: ACCEPT TCP 22" in gone["diff"]["before"] and gone["diff"]["after"] == ""
    again = module(api, state="absent")
    assert (again["changed"], again["plan"][0]["action"], again["firewall"]) == (False, "keep", {})


@pytest.mark.parametrize(
    ("behind", "check", "deletes"),
    [
        ({"type": "linode", "label": "pond-1"}, False, False),
        ({"type": "linode", "label": "pond-1"}, True, True),
        ({"type": "linode", "label": "other-1"}, True, False),
        ({"type": "nodebalancer", "label": "pond-1"}, True, False),
        ({"type": "interface", "label": None}, True, False),
    ],
)
def test_a_check_of_the_end_takes_the_fleets_own_instances_alone_for_gone(
    behind: Any, check: bool, deletes: bool, module: Any
) -> None:
    api = Keeping(raw(entities=[{"id": 1, **behind}]))
    api.instances = [instance(1)]
    found = module(api, check=check, state="absent")
    assert written(api) == [] and bool(found.get("failed")) is not deletes
    assert found["plan"][0]["action"] == ("delete" if deletes else "blocked")
    if not deletes:
        assert f"is in front of {behind['type']} " in found["msg"]


def test_rules_that_are_too_many_only_with_those_of_others_are_refused(module: Any) -> None:
    api = Keeping(raw(*(listed(f"theirs-{number}", "1", OFFICE) for number in range(25))))
    found = module(api, inbound=[GIVEN])
    assert found["failed"] and "26 rules, in and out together" in found["msg"] and written(api) == []


def test_what_the_api_refuses_is_said_with_the_firewalls_label(module: Any) -> None:
    class Broken(FakeApi):
        def put(self, path: str, body: Any) -> Any:
            raise linode_firewall.linode.LinodeError("400 rules: no, t0ken-t0ken")

    found = module(Broken(raw()), inbound=[GIVEN])
    assert found["failed"] and found["msg"].startswith("firewall pond: 400 rules: no")


def test_what_is_missing_is_named(monkeypatch: Any, capsys: Any) -> None:
    def run(**given: Any) -> dict[str, Any]:
        with patch_module_args({"label": "pond", "fleet": "pond", **given}), pytest.raises(SystemExit):
            linode_firewall.main()
        return json.loads(capsys.readouterr().out)

    monkeypatch.delenv("LINODE_API_TOKEN", raising=False)
    assert "set LINODE_API_TOKEN" in run(run_from=[ME])["msg"]
    monkeypatch.setenv("LINODE_API_URL", "ftp://x")
    assert "'ftp://x' is no http or https URL" in run(api_token="t0ken-t0ken", run_from=[ME])["msg"]
    monkeypatch.setattr(linode_firewall, "MISSING", f"linode_api4 is not installed for {sys.executable}")
    assert "linode_firewall: linode_api4 is not installed" in run()["msg"]


def test_empty_variables_of_the_environment_are_none(monkeypatch: Any, capsys: Any) -> None:
    asked: list[Any] = []

    def api(*given: Any) -> Any:
        asked.append((*given[:3], given[4]))
        raise linode_firewall.linode.LinodeError("stop here")

    monkeypatch.setattr(linode_firewall.linode, "Api", api)
    for name, value in (("TOKEN", "t0ken-t0ken"), ("URL", ""), ("VERSION", "")):
        monkeypatch.setenv(f"LINODE_API_{name}", value)
    given = {"label": "pond", "fleet": "pond", "run_from": [ME], "request_timeout": 3}
    with patch_module_args(given), pytest.raises(SystemExit):
        linode_firewall.main()
    assert "stop here" in capsys.readouterr().out
    assert asked == [("t0ken-t0ken", "https://api.linode.com", "v4", 3)]
