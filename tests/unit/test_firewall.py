"""A firewall's plan as pure data, whom it would shut out, and its carrying out against an API in memory."""

from __future__ import annotations

import ipaddress
import json
import socket
from dataclasses import replace
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from plimsoll import firewall
from plimsoll.firewall import Desired, Firewall, Step, accepts, lockout, plan, plan_absent, rule_of
from plimsoll.linode import NoAnswer, Refused
from plimsoll_project.library import linode_firewall

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


# ---- the module ----


@pytest.fixture
def module(monkeypatch: Any, capsys: Any) -> Any:
    def run(api: FakeApi, *, check: bool = False, **params: Any) -> dict[str, Any]:
        monkeypatch.setattr(linode_firewall.linode, "Api", lambda *_: api)
        monkeypatch.setattr(linode_firewall.firewall, "own_addresses", list)
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
