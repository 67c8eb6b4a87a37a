"""The plan of a fleet as pure data: who belongs to it, what differs, what is done about it, and what it costs."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any

import pytest
import yaml
from plimsoll import fleet
from plimsoll.fleet import Around, Desired, Group, Host, Instance, Plan, Step, inputs_tag, monthly_cost, plan

TAG = "plimsoll-fleet-workers"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAnother you@desk"
FLEET = {"hosts", "adopt", "remove", "protect", "purge_tags"}
SECRET = "#cloud-config\nwrite_files: [{path: /etc/pw, content: hunter2}]\n"


def host(**more: Any) -> Host:
    given = {"type": "g6-nanode-1", "region": "us-ord", "image": "linode/debian12", "authorized_keys": (KEY,)}
    return Host(**{**given, **more})


def want(count: int = 2, **more: Any) -> Desired:
    """A fleet without groups; options of the fleet go there, all others to its hosts."""
    whole = {key: more.pop(key) for key in FLEET & set(more)}
    return Desired("workers", (Group("", host(**more), count, whole.pop("hosts", ())),), **whole)


def raw(index: int, **more: Any) -> dict[str, Any]:
    return {
        "id": 100 + index,
        "label": f"workers-{index}",
        "status": "running",
        "type": "g6-nanode-1",
        "region": "us-ord",
        "image": "linode/debian12",
        "tags": [TAG],
        "ipv4": [f"192.168.128.{index}", f"203.0.113.{index}"],
        **more,
    }


def have(index: int, **more: Any) -> Instance:
    """An instance of which nothing is recorded."""
    return Instance.of(raw(index, **more))


def made(index: int, given: Host | None = None, **more: Any) -> Instance:
    """An instance of which is recorded what it was made with."""
    return have(index, **{"tags": [TAG, inputs_tag("workers", given or host())], **more})


def known(*listed: Instance) -> set[str]:
    return {one.label for one in listed}


def planned(desired: Desired, *listed: Instance, pinned: set[str] | None = None, **more: Any) -> tuple[Step, ...]:
    pinned = known(*listed) | set(desired.adopt) if pinned is None else pinned
    return plan(desired, listed, pinned, **more).steps


def steps(desired: Desired, *listed: Instance, **more: Any) -> list[tuple[str, str]]:
    return [(step.action, step.label) for step in planned(desired, *listed, **more)]


def actions(desired: Desired, *listed: Instance, **more: Any) -> list[str]:
    return [step.action for step in planned(desired, *listed, **more)]


# ---- whose an instance is ----


def test_what_is_missing_is_created_and_what_is_there_is_kept() -> None:
    assert steps(want(3), have(2)) == [("create", "workers-1"), ("keep", "workers-2"), ("create", "workers-3")]


@pytest.mark.parametrize(
    ("count", "there", "wanted"),
    [
        (2, (3, 7), [3, 7]),  # met by high numbers, none is made or deleted for a lower one
        (3, (3, 7), [1, 3, 7]),
        (4, (2, 4), [1, 2, 3, 4]),
        (2, (1, 3, 10), [1, 3]),  # the highest go; 10 is above 3
        (0, (1,), []),
    ],
)
def test_a_count_is_met_by_what_is_there_and_then_by_the_lowest_free_numbers(
    count: int, there: tuple[int, ...], wanted: list[int]
) -> None:
    assert list(want(count).labels([f"workers-{index}" for index in there])) == [f"workers-{one}" for one in wanted]


def test_the_highest_numbers_go_and_only_as_many_as_allowed() -> None:
    listed = have(1), have(2), have(10)
    assert steps(want(1), *listed, max_delete=2)[1:] == [("delete", "workers-2"), ("delete", "workers-10")]
    assert steps(want(1), *listed, max_delete=1)[1:] == [("blocked", "workers-2"), ("blocked", "workers-10")]
    assert steps(want(0), *listed, max_delete=float("inf")) == [("delete", f"workers-{one}") for one in (1, 2, 10)]


def test_what_is_to_be_removed_goes_first_and_its_label_is_not_given_again() -> None:
    listed = have(1), have(2), have(3)
    assert steps(want(2, remove=("workers-1",)), *listed, max_delete=1) == [
        ("keep", "workers-2"),
        ("keep", "workers-3"),
        ("delete", "workers-1"),
    ]
    assert steps(want(3, remove=("workers-2", "workers-4")), have(1), have(3)) == [
        ("keep", "workers-1"),
        ("keep", "workers-3"),
        ("create", "workers-5"),
    ]


def test_hosts_by_name_are_those_and_no_others() -> None:
    gate = have(1, label="workers-gate")
    assert steps(want(0, hosts=("gate", "db1")), gate, have(2), max_delete=1) == [
        ("keep", "workers-gate"),
        ("create", "workers-db1"),
        ("delete", "workers-2"),
    ]


GROUPS = (
    Group("worker", host(type="g6-standard-2"), 2),
    Group("broker", host(type="g6-dedicated-2"), hosts=("main",)),
)


def test_each_group_has_its_own_numbers_names_and_kind_of_host() -> None:
    found = planned(
        Desired("box", GROUPS),
        have(1, label="box-worker-4", type="g6-standard-2", tags=["plimsoll-fleet-box"]),
        # Of no group any more, as are its numbers.
        have(2, label="box-1", tags=["plimsoll-fleet-box"]),
        max_delete=1,
    )
    assert [(step.action, step.label) for step in found] == [
        ("create", "box-worker-1"),
        ("keep", "box-worker-4"),
        ("create", "box-broker-main"),
        ("delete", "box-1"),
    ]
    assert [found[0].after["type"], found[2].after["type"]] == ["g6-standard-2", "g6-dedicated-2"]


def test_a_group_that_is_declared_no_more_goes_as_a_whole() -> None:
    listed = have(1, label="box-worker-1", tags=["plimsoll-fleet-box"], type="g6-standard-2")
    assert steps(Desired("box", GROUPS[1:]), listed, max_delete=1) == [
        ("create", "box-broker-main"),
        ("delete", "box-worker-1"),
    ]


@pytest.mark.parametrize(
    "label",
    [
        "workers-01",
        "workers--1",
        "workers-0",
        "workers-1-1",
        "workers-a-b-1",
        "workers-a-01",
        "workers-A",
        "workers-",
        "workers",
        "my-workers-1",
        "workers-1x",
        "workers-1\n",
        "workers-1_2",
        "Workers-1",
        "workers1",
    ],
)
def test_an_instance_with_the_tag_and_another_label_is_not_touched(label: str) -> None:
    assert fleet.place_of("workers", label) is fleet.index_of("workers", label) is None
    assert steps(want(0), have(1, label=label), max_delete=9) == []


def test_an_instance_with_the_label_and_no_tag_is_not_deleted() -> None:
    assert steps(want(0), have(1, tags=[]), max_delete=9) == []


def test_fleets_whose_labels_overlap_are_told_apart_by_their_tags() -> None:
    # box has a group "worker"; box-worker is another fleet without groups. Both have the label box-worker-1.
    box, box_worker = Desired("box", GROUPS[:1]), Desired("box-worker", (Group("", host(), 1),))
    of_box = have(1, label="box-worker-1", tags=["plimsoll-fleet-box"], type="g6-standard-2")
    of_other = have(1, label="box-worker-1", tags=["plimsoll-fleet-box-worker"])
    assert steps(box, of_box)[0] == steps(box_worker, of_other)[0] == ("keep", "box-worker-1")
    for desired, theirs in ((box, of_other), (box_worker, of_box)):
        assert steps(dataclasses.replace(desired, groups=()), theirs, max_delete=9) == []
        (first, *_) = planned(desired, theirs)
        assert first.action == "blocked" and f"not the tag {fleet.tag_of(desired.name)}" in first.reason


@pytest.mark.parametrize(
    ("label", "place", "index"),
    [
        ("box-1", ("", "1"), 1),
        ("box-10", ("", "10"), 10),
        ("box-gate", ("", "gate"), None),
        ("box-worker-12", ("worker", "12"), 12),
        ("box-worker-main", ("worker", "main"), None),
        ("box-worker-1-1", None, None),
        ("box-1-worker", None, None),
    ],
)
def test_a_label_says_its_group_and_its_number(label: str, place: Any, index: int | None) -> None:
    assert (fleet.place_of("box", label), fleet.index_of("box", label)) == (place, index)
    if place:
        assert fleet.label_of("box", *place) == label


def test_a_fleet_is_in_the_order_of_its_numbers_by_group() -> None:
    labels = ["box-worker-10", "box-2", "box-worker-2", "box-10", "box-broker-main", "box-broker-1"]
    listed = [have(1, label=label, tags=["plimsoll-fleet-box"]) for label in labels]
    assert list(fleet.owned("box", listed)) == [
        "box-2",
        "box-10",
        "box-broker-main",
        "box-broker-1",
        "box-worker-2",
        "box-worker-10",
    ]


# ---- what it was made with ----


def test_the_tag_of_the_inputs_fits_any_tag_and_holds_no_secret() -> None:
    longest = inputs_tag("w" * 32, host(user_data=SECRET, swap_size=512))
    assert re.fullmatch(r"plimsoll-inputs(-[0-9a-f]{7}){4}", longest) and len(longest) <= 50
    # Without salt, a table of hashes would find a short password.
    plain = {kind(SECRET.encode()).hexdigest()[:7] for kind in (hashlib.sha256, hashlib.sha1, hashlib.md5)}
    assert not plain & set(longest.split("-"))
    assert inputs_tag("workers", host(user_data=SECRET)) != inputs_tag("boxes", host(user_data=SECRET))


def test_a_digest_is_slow_to_try_out_and_made_once(monkeypatch: Any) -> None:
    rounds: list[int] = []
    really = hashlib.pbkdf2_hmac

    def counted(name: str, password: bytes, salt: bytes, iterations: int) -> bytes:
        rounds.append(iterations)
        return really(name, password, salt, 1)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", counted)
    many = [Desired("slow", (Group("", host(), 50),)) for _ in range(3)]
    for desired in many:
        plan(desired, [], set())
    assert len(rounds) == 4 and min(rounds) >= 50_000


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (0, {"image": "linode/debian13"}),
        (1, {"authorized_keys": (KEY, OTHER_KEY)}),
        (2, {"user_data": SECRET}),
        (3, {"swap_size": 512}),
        (None, {"type": "g6-standard-1", "region": "de-fra-2", "tags": ("prod",), "power": "offline"}),
    ],
)
def test_each_input_has_a_digest_of_its_own(at: int | None, change: dict[str, Any]) -> None:
    before, after = (inputs_tag("workers", one).split("-")[2:] for one in (host(), host(**change)))
    assert [was != now for was, now in zip(before, after)] == [number == at for number in range(4)]


def test_the_order_of_keys_is_no_difference() -> None:
    one, other = host(authorized_keys=(KEY, OTHER_KEY)), host(authorized_keys=(OTHER_KEY, KEY))
    assert inputs_tag("workers", one) == inputs_tag("workers", other)


def test_where_nothing_is_recorded_nothing_is_compared_and_the_plan_says_so() -> None:
    desired = want(1, authorized_keys=(OTHER_KEY,), user_data=SECRET, swap_size=256, on_change="rebuild")
    (step,) = planned(desired, have(1))
    assert step.action == "keep" and "not recorded, so keys and user_data are not compared" in step.reason
    assert planned(want(1), made(1))[0].reason == ""


def test_a_tag_that_looks_like_the_inputs_and_is_none_is_not_compared() -> None:
    found = have(1, tags=[TAG, "plimsoll-inputs-hand-made"])
    assert found.inputs == {} and steps(want(1), found) == [("keep", "workers-1")]


# ---- what differs, and is changed by no request ----

IN_SUBNET = Around(subnets={"net/old": (3, frozenset({101})), "net/new": (4, frozenset({999}))})
# Name of the difference, what is declared, what it was made with, how the API lists it, and whether a rebuild does.
DRIFTS: list[Any] = [
    ("image", {}, {"image": "linode/debian11"}, {"image": "linode/debian11"}, True),
    ("image", {}, {"image": "linode/debian11"}, {"image": None}, True),  # that image is no more
    ("authorized_keys", {}, {"authorized_keys": (OTHER_KEY,)}, {}, True),
    ("user_data", {"user_data": SECRET}, {}, {}, True),
    ("disk_encryption", {"disk_encryption": "enabled"}, {}, {"disk_encryption": "disabled"}, True),
    ("swap_size", {"swap_size": 256}, {}, {}, False),
    ("private_ip", {"private_ip": True}, {}, {"ipv4": ["203.0.113.1"]}, False),
    ("vpc", {"vpc": "net/new"}, {}, {}, False),
    ("region", {}, {}, {"region": "de-fra-2"}, False),
]
drift = pytest.mark.parametrize(
    ("key", "declared", "was", "listed", "rebuilds"),
    DRIFTS,
    ids=[f"{one[0]}{'-gone' if one[3].get('image', 1) is None else ''}" for one in DRIFTS],
)


def after(found: Instance, todo: Step, given: Host) -> Instance:
    """The instance as the step leaves it."""
    anew: dict[str, Any] = {"tags": tuple(todo.after.get("tags", found.tags))}
    if todo.action in ("rebuild", "replace"):
        anew |= {"image": given.image, "disk_encryption": given.disk_encryption or found.disk_encryption}
    if todo.action == "replace":
        anew |= {"region": given.region, "ipv4": ("192.168.128.9", "203.0.113.9")}
    return dataclasses.replace(found, **anew)


@drift
def test_a_difference_that_no_request_changes_blocks_and_names_the_remedy(
    key: str, declared: Any, was: Any, listed: Any, rebuilds: bool
) -> None:
    (step,) = planned(want(1, **declared), made(1, host(**was), **listed), around=IN_SUBNET)
    assert step.action == "blocked"
    says = f"has other {key} than declared" if key in ("authorized_keys", "user_data") else f"has {key} "
    assert says in step.reason and f"set on_change to {'rebuild' if rebuilds else 'replace'}" in step.reason
    assert "hunter2" not in step.reason


@drift
def test_a_rebuild_settles_what_it_can_and_is_refused_for_the_rest(
    key: str, declared: Any, was: Any, listed: Any, rebuilds: bool
) -> None:
    desired, found = want(1, on_change="rebuild", **declared), made(1, host(**was), **listed)
    (step,) = planned(desired, found, around=IN_SUBNET)
    if not rebuilds:
        assert step.action == "blocked" and f"a rebuild keeps {key}" in step.reason
        return
    assert (step.action, step.id, step.reason) == ("rebuild", 101, f"{key} differ")
    assert key in step.before and key in step.after
    assert inputs_tag("workers", desired.groups[0].host) in step.after["tags"]
    assert steps(desired, after(found, step, desired.groups[0].host)) == [("keep", "workers-1")]


@drift
def test_a_replacement_settles_everything(key: str, declared: Any, was: Any, listed: Any, rebuilds: bool) -> None:
    desired, found = want(1, on_change="replace", **declared), made(1, host(**was), **listed)
    (step,) = planned(desired, found, around=IN_SUBNET)
    assert (step.action, step.id, step.reason) == ("replace", 101, f"{key} differ")
    new = after(found, step, desired.groups[0].host)
    assert new.tags == (TAG, inputs_tag("workers", desired.groups[0].host))
    there = Around(subnets={"net/new": (4, frozenset({101}))})
    assert steps(desired, new, around=there) == [("keep", "workers-1")]


@drift
def test_what_is_accepted_is_recorded_once_and_then_left_alone(
    key: str, declared: Any, was: Any, listed: Any, rebuilds: bool
) -> None:
    desired, found = want(1, on_change="accept", **declared), made(1, host(**was), **listed)
    (first,) = planned(desired, found, around=IN_SUBNET)
    if key in fleet.INPUTS:
        assert (first.action, list(first.after)) == ("update", ["tags"])
    (second,) = planned(desired, after(found, first, desired.groups[0].host), around=IN_SUBNET)
    assert second.action == "keep"
    assert second.reason in ("", f"differs in {key}, which on_change accepts")


def test_an_image_that_is_accepted_is_rebuilt_when_that_is_asked_for_later() -> None:
    found = made(1, host(image="linode/debian11"), image="linode/debian11")
    (accepted,) = planned(want(1, on_change="accept"), found)
    left = after(found, accepted, host())
    assert steps(want(1, on_change="accept"), left) == [("keep", "workers-1")]
    assert steps(want(1, on_change="rebuild"), left) == [("rebuild", "workers-1")]


def test_what_was_made_anew_by_hand_from_another_image_is_rebuilt() -> None:
    assert steps(want(1, on_change="rebuild"), made(1, image="linode/alpine3.20")) == [("rebuild", "workers-1")]


def test_differences_together_are_named_together_and_take_the_greater_remedy() -> None:
    found = made(1, image="linode/debian11", region="de-fra-2")
    (step,) = planned(want(1), found)
    assert "region de-fra-2, declared us-ord, image linode/debian11, declared linode/debian12" in step.reason
    assert "set on_change to replace" in step.reason
    (step,) = planned(want(1, on_change="rebuild"), found)
    assert step.action == "blocked" and "a rebuild keeps region:" in step.reason
    (step,) = planned(want(1, on_change="replace"), found)
    assert (step.action, step.reason) == ("replace", "region, image differ")


def test_what_is_not_declared_is_not_compared() -> None:
    found = made(1, host(swap_size=256), disk_encryption="enabled", maintenance_policy="linode/migrate")
    behind = Around(firewalls={"fw": (7, frozenset({101}))}, subnets={"net/old": (3, frozenset({101}))})
    assert steps(want(1), found, around=behind) == [("keep", "workers-1")]


def test_an_image_that_is_gone_blocks_nothing() -> None:
    assert steps(want(1), have(1, image=None)) == steps(want(1), made(1, image=None)) == [("keep", "workers-1")]


@pytest.mark.parametrize(("size", "expected"), [(256, "blocked"), (0, "blocked"), (512, "rebuild"), (None, "rebuild")])
def test_a_rebuild_is_refused_where_it_would_lose_the_declared_swap(size: int | None, expected: str) -> None:
    found = made(1, host(swap_size=size, image="linode/debian11"), image="linode/debian11")
    (step,) = planned(want(1, on_change="rebuild", swap_size=size), found)
    assert step.action == expected
    assert expected == "rebuild" or "a rebuild makes swap 512 MB again: set on_change to replace" in step.reason


def test_a_rebuild_waits_for_no_boot_and_comes_after_update_and_resize() -> None:
    found = made(1, type="g6-standard-1", image="linode/debian11", status="offline", tags=[TAG])
    update, resize, rebuild = planned(want(1, on_change="rebuild", backups=True), found)
    assert [update.action, resize.action, rebuild.action] == ["update", "resize", "rebuild"]
    assert "tags" not in update.after and "tags" in rebuild.after


def test_a_replacement_is_one_step_with_all_that_differs_and_the_tags_of_others() -> None:
    desired = want(1, on_change="replace", user_data=SECRET, type="g6-standard-1", tags=("prod",), firewall="fw")
    found = made(1, region="de-fra-2", tags=["theirs", *made(1).tags])
    (step,) = planned(desired, found)
    assert step.after["tags"] == [TAG, inputs_tag("workers", desired.groups[0].host), "prod", "theirs"]
    assert (step.before["type"], step.after["type"]) == ("g6-nanode-1", "g6-standard-1")
    assert step.before["user_data"].startswith("digest ") and step.after["user_data"].startswith("digest ")
    assert step.after["firewall"] == "fw" and "hunter2" not in str(step.as_data())


def test_a_replacement_gets_no_tag_twice() -> None:
    (step,) = planned(want(1, on_change="replace", tags=("team",)), made(1, tags=[TAG, "Team"], region="de-fra-2"))
    assert len({tag.casefold() for tag in step.after["tags"]}) == len(step.after["tags"])


# ---- what requests change ----


def test_a_settled_fleet_has_no_changes_and_no_diff() -> None:
    settled = plan(want(2), [have(1), made(2)], {"workers-1", "workers-2"})
    assert not settled.changes and not settled.changes_cost and settled.disruptive == {}
    assert settled.diff()["before"] == settled.diff()["after"] == ""


def test_tags_are_added_and_those_of_others_stay() -> None:
    (step,) = planned(want(1, tags=("prod", "Team")), have(1, tags=["theirs", TAG, "team"]))
    assert (step.action, step.before, step.after) == (
        "update",
        {"tags": ["theirs", TAG, "team"]},
        {"tags": ["theirs", TAG, "team", "prod"]},
    )
    left = have(1, tags=step.after["tags"])
    assert steps(want(1, tags=("prod", "Team")), left) == [("keep", "workers-1")]


def test_tags_that_nothing_declares_go_where_that_is_asked_for() -> None:
    inputs = inputs_tag("workers", host())
    found = have(1, tags=["theirs", TAG, "Prod", inputs, "plimsoll-protect"])
    (step,) = planned(want(1, tags=("prod",), purge_tags=True), found)
    assert step.after == {"tags": [TAG, "Prod", inputs, "plimsoll-protect"]}
    assert actions(want(1, tags=("prod",), purge_tags=True), have(1, tags=step.after["tags"])) == ["keep"]


CHANGES: list[Any] = [
    ({"backups": True}, {"backups": {"enabled": False}}, {"backups": (False, True)}),
    ({"maintenance_policy": "linode/migrate"}, {}, {"maintenance_policy": ("", "linode/migrate")}),
    ({"placement_group": "near"}, {"placement_group": None}, {"placement_group": (None, "near")}),
    ({"placement_group": "near"}, {"placement_group": {"id": 1, "label": "far"}}, {"placement_group": ("far", "near")}),
    ({"firewall": "fw"}, {}, {"firewall": ("old", "fw")}),
]


@pytest.mark.parametrize(("declared", "listed", "change"), CHANGES)
def test_what_a_request_changes_in_place_is_an_update(declared: Any, listed: Any, change: Any) -> None:
    behind = Around(firewalls={"old": (6, frozenset({101})), "fw": (7, frozenset())})
    (step,) = planned(want(1, **declared), made(1, **listed), around=behind)
    assert step.action == "update"
    assert {key: (step.before[key], step.after[key]) for key in step.after} == change


def test_what_is_as_declared_is_no_update() -> None:
    declared = {"backups": True, "maintenance_policy": "linode/migrate", "placement_group": "near", "firewall": "fw"}
    settled = made(
        1,
        backups={"enabled": True},
        maintenance_policy="linode/migrate",
        placement_group={"id": 2, "label": "near"},
    )
    behind = Around(firewalls={"fw": (7, frozenset({101}))})
    assert steps(want(1, **declared), settled, around=behind) == [("keep", "workers-1")]


def test_what_is_off_is_booted_and_what_is_busy_is_waited_for() -> None:
    first, second = planned(want(2), have(1, status="offline"), have(2, status="rebooting"))
    assert (first.action, first.before, first.after) == ("boot", {"status": "offline"}, {"status": "running"})
    assert (second.action, second.reason) == ("keep", "is rebooting: waited for")


@pytest.mark.parametrize(
    ("power", "status", "expected"),
    [
        ("running", "running", "keep"),
        ("running", "offline", "boot"),
        ("running", "stopped", "boot"),
        ("running", "shutting_down", "keep"),
        ("offline", "running", "shutdown"),
        ("offline", "offline", "keep"),
        ("offline", "shutting_down", "keep"),
        ("any", "running", "keep"),
        ("any", "offline", "keep"),
    ],
)
def test_power_is_as_declared_and_any_is_left_to_others(power: str, status: str, expected: str) -> None:
    assert actions(want(1, power=power), have(1, status=status)) == [expected]


@pytest.mark.parametrize(
    ("power", "status", "expected"),
    [
        ("running", "running", ["resize"]),
        ("running", "offline", ["resize", "boot"]),
        ("offline", "offline", ["resize"]),
        ("offline", "running", ["resize", "shutdown"]),
        ("any", "offline", ["resize"]),
    ],
)
def test_another_type_is_a_resize_and_power_comes_after_it(power: str, status: str, expected: list[str]) -> None:
    found = planned(want(1, power=power), have(1, type="g6-standard-1", status=status))
    assert [step.action for step in found] == expected
    assert (found[0].before, found[0].after) == ({"type": "g6-standard-1"}, {"type": "g6-nanode-1"})


@pytest.mark.parametrize("policy", ["fail", "rebuild", "replace", "accept"])
def test_a_type_is_resized_whatever_the_policy(policy: str) -> None:
    assert actions(want(1, on_change=policy), made(1, type="g6-standard-1")) == ["resize"]


# ---- what is not to be ----


@pytest.mark.parametrize(
    ("desired", "listed", "pinned", "words"),
    [
        (want(1), have(1, tags=["theirs"]), {"workers-1"}, "101 has this label but not the tag plimsoll-fleet-workers"),
        (want(1, private_ip=True), have(1, ipv4=["203.0.113.1"]), {"workers-1"}, "private_ip False, declared True"),
        (want(1), have(1, status="billing_suspension"), {"workers-1"}, "suspended"),
        (want(1), have(1, status="deleting"), {"workers-1"}, "being deleted"),
        (want(1), have(1), set(), "no SSH host key of it is pinned"),
        (want(0), have(1), set(), "max_delete is 0: set it to 1"),
    ],
)
def test_what_cannot_be_done_is_blocked_with_its_reason(desired, listed, pinned, words) -> None:  # type: ignore[no-untyped-def]
    (step,) = planned(desired, listed, pinned=pinned)
    assert (step.action, step.label) == ("blocked", "workers-1")
    assert words in step.reason


# How it is declared, how it is listed, and what a sentence says of it.
PROTECTED: list[Any] = [
    ({}, {"tags": [TAG, "plimsoll-protect"]}, "has the tag plimsoll-protect: remove that first"),
    ({}, {"locks": ["cannot_delete"]}, "is locked (cannot_delete): delete the lock first"),
    ({"protect": ("workers-1", "elsewhere")}, {}, "is protected (protect names it): take it out there first"),
]
protected = pytest.mark.parametrize(("declared", "listed", "words"), PROTECTED, ids=["tag", "lock", "label"])


@protected
def test_what_is_protected_is_not_deleted_rebuilt_or_replaced(declared: Any, listed: Any, words: str) -> None:
    for desired, found in [
        (want(0, **declared), have(1, **listed)),
        (want(1, on_change="rebuild", **declared), have(1, image="linode/debian11", **listed)),
        (want(1, on_change="replace", **declared), have(1, image="linode/debian11", **listed)),
    ]:
        (step,) = planned(desired, found, max_delete=9)
        assert step.action == "blocked" and words in step.reason


@protected
def test_protection_forbids_nothing_else(declared: Any, listed: Any, words: str) -> None:
    assert actions(want(1, tags=("prod",), **declared), have(1, **listed)) == ["update"]
    assert actions(want(1, **declared), have(1, status="offline", **listed)) == ["boot"]
    assert actions(want(1, power="offline", **declared), have(1, **listed)) == ["shutdown"]
    assert actions(want(1, **declared), have(1, type="g6-standard-1", **listed)) == ["resize"]
    assert actions(want(1, on_change="accept", **declared), have(1, region="de-fra-2", **listed)) == ["update"]
    assert actions(want(1, on_change="replace", **declared), have(1, **listed)) == ["keep"]


def test_a_label_is_protected_while_its_instance_is_adopted() -> None:
    desired = want(1, adopt={"workers-1": "celery-old"}, protect=("workers-1",), on_change="replace")
    assert actions(desired, by_hand(region="de-fra-2")) == ["blocked"]


def test_protection_does_not_depend_on_the_case_of_its_tag() -> None:
    found = have(1, tags=[TAG, "Plimsoll-Protect"])
    assert actions(want(0), found, max_delete=9) == ["blocked"]
    (step,) = planned(want(1, purge_tags=True), found)
    assert step.action == "keep"


def test_one_that_is_protected_does_not_keep_the_others_that_go() -> None:
    listed = have(1), have(2, tags=[TAG, "plimsoll-protect"]), have(3)
    assert actions(want(0), *listed, max_delete=3) == ["delete", "blocked", "delete"]


# ---- adopting ----


def by_hand(**more: Any) -> Instance:
    return have(9, **{"label": "celery-old", "tags": ["theirs"], **more})


def test_an_instance_is_adopted_by_its_new_label_and_tag() -> None:
    desired = want(2, adopt={"workers-2": "celery-old"})
    create, adopted = planned(desired, by_hand())
    assert (create.action, create.label) == ("create", "workers-1")
    assert (adopted.action, adopted.label, adopted.id) == ("adopt", "workers-2", 109)
    assert adopted.before == {"label": "celery-old", "tags": ["theirs"]}
    assert adopted.after == {"label": "workers-2", "tags": ["theirs", TAG]}
    # The next run finds it done, whoever has the old label by then.
    there = have(9, label="workers-2", tags=["theirs", TAG])
    assert steps(desired, have(1), there, have(5, label="celery-old", tags=[])) == [
        ("keep", "workers-1"),
        ("keep", "workers-2"),
    ]


def test_an_instance_that_has_the_label_already_is_adopted_by_the_tag() -> None:
    (step,) = planned(want(1, adopt={"workers-1": "workers-1"}), have(1, tags=[]))
    assert (step.action, step.after) == ("adopt", {"tags": [TAG]})


def test_what_is_adopted_counts_and_keeps_its_number() -> None:
    desired = want(2, adopt={"workers-7": "celery-old"})
    assert steps(desired, have(1), by_hand()) == [("keep", "workers-1"), ("adopt", "workers-7")]


def test_what_is_adopted_becomes_all_that_is_declared() -> None:
    desired = want(1, adopt={"workers-1": "celery-old"}, type="g6-standard-1", on_change="replace")
    assert actions(desired, by_hand(status="offline")) == ["adopt", "resize", "boot"]


@pytest.mark.parametrize("policy", ["rebuild", "replace"])
def test_what_is_adopted_is_not_wiped_in_the_same_run(policy: str) -> None:
    (step,) = planned(want(1, adopt={"workers-1": "celery-old"}, on_change=policy), by_hand(image="linode/debian11"))
    assert step.action == "blocked" and "adopting wipes nothing: set on_change to accept" in step.reason
    accepted = want(1, adopt={"workers-1": "celery-old"}, on_change="accept")
    assert actions(accepted, by_hand(image="linode/debian11")) == ["adopt"]


@pytest.mark.parametrize(
    ("adopt", "listed", "words"),
    [
        ({"workers-1": "celery-old"}, None, "is to adopt celery-old, and no instance has that label"),
        (
            {"workers-1": "celery-old"},
            by_hand(tags=["plimsoll-fleet-other"]),
            "which a fleet has already: plimsoll-fleet-oth",
        ),
        ({"workers-1": "celery-old"}, have(1, tags=[]), r"adopt it (workers-1: workers-1)"),
        ({"workers-1": "celery-old"}, by_hand(status="deleting"), "being deleted"),
        ({}, have(1, tags=[]), "not of this fleet; adopt it"),
    ],
)
def test_what_cannot_be_adopted_is_blocked_with_its_reason(adopt: Any, listed: Instance | None, words: str) -> None:
    (step,) = planned(want(1, adopt=adopt), *([listed] if listed else []))
    assert step.action == "blocked" and words in step.reason


def test_what_is_adopted_needs_its_host_key_pinned_under_the_new_label() -> None:
    (step,) = planned(want(1, adopt={"workers-1": "celery-old"}), by_hand(), pinned={"celery-old"})
    assert step.action == "blocked" and "no SSH host key of it is pinned" in step.reason


def test_what_is_adopted_is_the_fleets_own_before_it_is_taken_down() -> None:
    """A run that ends between two of the steps leaves an instance that the next run knows."""
    first, *rest = planned(want(1, adopt={"workers-1": "celery-old"}), by_hand(type="g6-standard-1"))
    assert rest
    assert (first.action, first.after.get("label")) == ("adopt", "workers-1")
    assert TAG in first.after.get("tags", [])


# ---- what it costs ----

TYPES: list[dict[str, Any]] = [
    {
        "id": "g6-nanode-1",
        "price": {"monthly": 5},
        "region_prices": [{"id": "id-cgk", "monthly": 6}],
        "addons": {"backups": {"price": {"monthly": 2}, "region_prices": [{"id": "id-cgk", "monthly": 2.4}]}},
    },
    {"id": "g6-standard-1", "price": {"monthly": 12}, "addons": {"backups": {"price": {"monthly": 2.5}}}},
]


@pytest.mark.parametrize(
    ("desired", "listed", "before", "after"),
    [
        (want(2), [have(1), have(2)], 10, 10),
        (want(3), [have(1)], 5, 15),
        (want(1), [have(1), have(2)], 10, 5),
        (want(1, region="id-cgk"), [], 0, 6),
        (want(1, region="id-cgk", backups=True), [], 0, 8.4),
        (want(1, backups=True), [have(1)], 5, 7),
        (want(1), [have(1, backups={"enabled": True})], 7, 7),  # left enabled, where it is not declared
        (want(1, type="g6-standard-1"), [have(1)], 5, 12),
        (want(1, type="g6-standard-1"), [have(1, status="offline", backups={"enabled": True})], 7, 14.5),
        (want(1, on_change="replace", type="g6-standard-1"), [have(1, region="id-cgk")], 6, 12),
        (want(1, on_change="rebuild"), [have(1, image="linode/debian11")], 5, 5),
        (want(1, on_change="accept"), [have(1, region="id-cgk")], 6, 6),
        (want(1, type="g7-premium"), [have(1)], 5, 0),  # a type without a price
        (want(1), [have(1, tags=[])], 0, 0),  # not ours, blocked
        (want(1, adopt={"workers-1": "celery-old"}), [by_hand()], 0, 5),
        (want(1, adopt={"workers-1": "celery-old"}, type="g6-standard-1"), [by_hand()], 0, 12),
        (want(1, adopt={"workers-1": "celery-old"}, backups=True), [by_hand()], 0, 7),
        (want(0), [], 0, 0),
    ],
)
def test_the_cost_is_that_of_the_fleet_before_and_after(desired: Any, listed: Any, before: float, after: float) -> None:
    todo = plan(desired, listed, known(*listed) | {"workers-1"}, max_delete=9)
    found = monthly_cost(desired, listed, todo, TYPES)
    assert found == {"currency": "USD", "monthly_before": before, "monthly_after": after}


@pytest.mark.parametrize(
    ("desired", "found"),
    [
        (want(1, adopt={"workers-1": "celery-old"}), by_hand(backups={"enabled": True})),
        (want(1, adopt={"workers-1": "celery-old"}, on_change="accept"), by_hand(region="id-cgk")),
        (want(1, adopt={"workers-1": "workers-1"}, on_change="accept"), have(1, tags=[], image="linode/debian11")),
    ],
)
def test_what_is_adopted_costs_what_it_is_afterwards(desired: Desired, found: Instance) -> None:
    todo = plan(desired, [found], {"workers-1"})
    owned = dataclasses.replace(found, label="workers-1", tags=(TAG,))
    settled = monthly_cost(desired, [owned], Plan(()), TYPES)["monthly_before"]
    assert monthly_cost(desired, [found], todo, TYPES)["monthly_after"] == settled


@pytest.mark.parametrize(
    ("desired", "listed", "changes"),
    [
        (want(1), [], True),
        (want(0), [have(1)], True),
        (want(1, type="g6-standard-1"), [have(1)], True),
        (want(1, on_change="replace"), [have(1, region="id-cgk")], True),
        (want(1, backups=True), [have(1)], True),
        (want(1, adopt={"workers-1": "celery-old"}), [by_hand()], True),
        (want(1, adopt={"workers-1": "workers-1"}), [have(1, tags=[])], True),
        (want(1), [have(1)], False),
        (want(1, tags=("prod",)), [have(1)], False),
        (want(1, on_change="rebuild"), [have(1, image="linode/debian11")], False),
        (want(1), [have(1, status="offline")], False),  # what is off is paid for as well
        (want(1, power="offline"), [have(1)], False),
    ],
)
def test_a_plan_says_whether_it_changes_what_is_paid_for(desired: Any, listed: Any, changes: bool) -> None:
    assert plan(desired, listed, known(*listed) | {"workers-1"}, max_delete=9).changes_cost is changes


# ---- the plan as a whole ----


def test_the_diff_holds_what_differs_alone() -> None:
    listed = [have(1, status="offline"), have(2), have(3), have(4, type="g6-standard-1", status="offline")]
    desired = want(3, tags=("prod",), remove=("workers-3",))
    found = plan(desired, listed, known(*listed), max_delete=1).diff()
    before, after = yaml.safe_load(found["before"]), yaml.safe_load(found["after"])
    assert before["workers-1"] == {"tags": [TAG], "status": "offline"}
    assert after["workers-1"] == {"tags": [TAG, "prod"], "status": "running"}
    assert before["workers-2"] == {"tags": [TAG]}
    assert "workers-3" in before and "workers-3" not in after
    # Several steps of one instance are one entry.
    assert after["workers-4"] == {"tags": [TAG, "prod"], "type": "g6-nanode-1", "status": "running"}


def test_the_diff_of_what_is_created_and_replaced_shows_no_secret() -> None:
    desired = want(2, on_change="replace", user_data=SECRET, swap_size=256)
    found = plan(desired, [made(1)], {"workers-1"}).diff()
    before, after = yaml.safe_load(found["before"]), yaml.safe_load(found["after"])
    assert list(before) == ["workers-1"] and list(after) == ["workers-1", "workers-2"]
    assert after["workers-2"]["swap_size"] == 256 and after["workers-2"]["image"] == "linode/debian12"
    assert "hunter2" not in found["before"] + found["after"] and KEY not in found["after"]


def test_what_takes_hosts_down_is_named_by_host() -> None:
    listed = (
        made(1),
        made(2, type="g6-standard-1", status="offline"),
        made(3, image="linode/debian11"),
        have(4, tags=[TAG, "x-y"]),
    )
    todo = plan(want(3, on_change="rebuild", tags=("prod",)), listed, known(*listed), max_delete=1)
    assert todo.disruptive == {"workers-2": ["resize"], "workers-3": ["rebuild"], "workers-4": ["delete"]}
    # A boot of a host that is taken down goes with that.
    quiet = [(step.action, step.label) for step in todo.gentle().steps]
    assert quiet == [("update", "workers-1"), ("update", "workers-2"), ("update", "workers-3")]
    assert [step.action for step in todo.only(["workers-2"]).steps] == ["update", "resize", "boot"]
    assert not todo.only([]).changes


def test_a_step_is_plain_data() -> None:
    assert fleet.as_data(planned(want(1, tags=("prod",)), have(1))) == [
        {
            "action": "update",
            "label": "workers-1",
            "id": 101,
            "before": {"tags": [TAG]},
            "after": {"tags": [TAG, "prod"]},
            "reason": "",
        }
    ]


# ---- what may be declared ----


@pytest.mark.parametrize(
    ("desired", "words"),
    [
        (Desired("Workers"), "name: 'Workers' must have 3 to 32"),
        (Desired("a--b"), "name: 'a--b'"),
        (Desired("w-"), "name: 'w-'"),
        (Desired("w"), "name: 'w'"),
        (Desired("w" * 33), "name: "),
        (Desired("work\n"), "name: "),
        (want(-1), "count: -1 is below 0"),
        (want(1, hosts=("gate",)), "count and hosts: give one of them"),
        (want(0, hosts=("gate", "gate")), "hosts: a name is there twice"),
        (want(0, hosts=("my-gate",)), "'my-gate' must have lower-case letters and digits"),
        (want(0, hosts=("1gate",)), "'1gate' must have lower-case letters and digits"),
        (want(0, hosts=("g" * 56,)), "has 64 characters, a host name takes 63"),
        (want(1, type=""), "type: must be given"),
        (want(1, region=""), "region: must be given"),
        (want(0, hosts=("gate",), image=""), "image: must be given"),
        (want(1, tags=("ab",)), "tags: 'ab' has 2 characters, Linode takes 3 to 50"),
        (want(1, tags=("t" * 51,)), "has 51 characters"),
        (want(1, tags=("Plimsoll-Inputs-x",)), "one that plimsoll sets itself"),
        (want(1, tags=("plimsoll-fleet-other",)), "one that plimsoll sets itself"),
        (want(1, authorized_keys=()), "authorized_keys: at least one"),
        (want(1, vpc="net"), "vpc: 'net' must be VPC/SUBNET"),
        (want(1, vpc="net/a/b"), "vpc: 'net/a/b' must be VPC/SUBNET"),
        (want(1, swap_size=-1), "swap_size: -1 MB is below 0"),
        (want(1, user_data="packages: [vim]"), "#cloud-config"),
        (want(1, user_data="#cloud-config\nhostname: other\n"), "hostname is plimsoll's to set"),
        (want(1, user_data="#cloud-config\na: [secret\n"), "no valid YAML"),
        (want(1, adopt={"celery-1": "workers-1"}), "adopt: 'celery-1' is no label of this fleet, as workers-1 is"),
        (want(1, remove=("workers-01",)), "remove: 'workers-01' is no label of this fleet"),
        (Desired("box", (*GROUPS, *GROUPS[:1])), "groups: worker is there twice"),
        (Desired("box", (Group("", host()), Group("", host()))), "groups: one without a name is there twice"),
        (Desired("box", (Group("", host(), 1), GROUPS[0])), "'' must have lower-case letters"),
        (Desired("box", (Group("my-group", host(), 1),)), "group my-group: 'my-group' must have"),
        (Desired("box", (Group("worker", host(type=""), 1),)), "group worker: type: must be given"),
        (Desired("box", (Group("worker", host(tags=("ab",)), 1),)), "group worker: tags: 'ab'"),
    ],
)
def test_a_value_that_cannot_be_is_named(desired: Desired, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        desired.check()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "desired",
    [
        Desired("workers"),
        Desired("box", GROUPS),
        want(0, type="", authorized_keys=()),  # of nobody
        want(3, adopt={"workers-2": "celery-old"}, remove=("workers-1",), swap_size=0, vpc="net/a"),
        want(0, hosts=("g" * 55,)),
        want(1, tags=("plimsoll-protect",)),  # to protect it is up to the user
    ],
)
def test_what_can_be_is_taken(desired: Desired) -> None:
    desired.check()


def test_a_longest_name_fits_a_tag_and_a_host_name() -> None:
    Desired("w" * 32).check()
    assert len(fleet.tag_of("w" * 32)) <= 50
    assert len(fleet.label_of("w" * 32, "", 10_000)) <= 63


@pytest.mark.parametrize("group", [Group("g" * 60, host(), 1), Group("g" * 60, host(), hosts=("main",))])
def test_the_labels_of_a_group_fit_a_host_name(group: Group) -> None:
    with pytest.raises(ValueError, match="a host name takes 63"):
        Desired("box", (group,)).check()


def test_one_instance_is_not_adopted_twice() -> None:
    with pytest.raises(ValueError, match="celery-old"):
        want(2, adopt={"workers-1": "celery-old", "workers-2": "celery-old"}).check()


def test_an_instance_that_the_api_lists_sparely_is_read() -> None:
    spare = {key: raw(1)[key] for key in ("id", "label", "status", "type", "region")}
    one = Instance.of({**spare, "tags": None, "ipv4": None, "backups": None, "placement_group": None, "locks": None})
    assert (one.image, one.tags, one.public_ipv4, one.private_ipv4, one.ipv6, one.backups) == (None, (), *[None] * 3, 0)
    full = have(1, ipv6="2001:db8::1/128", backups={"enabled": True}, placement_group={"id": 1, "label": "near"})
    assert (full.public_ipv4, full.private_ipv4, full.ipv6) == ("203.0.113.1", "192.168.128.1", "2001:db8::1")
    assert full.backups and full.placement_group == "near"
