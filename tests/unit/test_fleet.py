"""The plan of a fleet as pure data, and its carrying out against an API in memory."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import yaml
from plimsoll import fleet
from plimsoll.fleet import Desired, Instance, plan
from plimsoll.linode import Deadline, LinodeError, NoAnswer, Refused

TAG = "plimsoll-fleet-workers"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop"


def want(count: int = 2, **more: Any) -> Desired:
    given = {"type": "g6-nanode-1", "region": "us-ord", "image": "linode/debian12", "authorized_keys": (KEY,), **more}
    return Desired("workers", count, **given)


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
    return Instance.of(raw(index, **more))


def steps(desired: Desired, *listed: Instance, known: set[str] | None = None, **more: Any) -> list[tuple[str, str]]:
    pinned = {one.label for one in listed} if known is None else known
    return [(step.action, step.label) for step in plan(desired, listed, pinned, **more).steps]


def test_what_is_missing_is_created_and_what_is_there_is_kept() -> None:
    assert steps(want(3), have(2)) == [("create", "workers-1"), ("keep", "workers-2"), ("create", "workers-3")]


def test_a_settled_fleet_has_no_changes_and_no_diff() -> None:
    settled = plan(want(2), [have(1), have(2)], {"workers-1", "workers-2"})
    assert not settled.changes
    assert settled.diff()["before"] == settled.diff()["after"] == ""


def test_tags_are_added_and_those_of_others_stay() -> None:
    found = plan(want(1, tags=("prod", "Team")), [have(1, tags=["theirs", TAG, "team"])], {"workers-1"})
    assert [(step.action, step.after) for step in found.steps] == [
        ("update", {"tags": ["theirs", TAG, "team", "prod"]})
    ]


def test_what_is_off_is_booted_and_what_is_busy_is_waited_for() -> None:
    assert steps(want(2), have(1, status="offline"), have(2, status="rebooting")) == [
        ("boot", "workers-1"),
        ("keep", "workers-2"),
    ]


@pytest.mark.parametrize(
    ("desired", "listed", "known", "words"),
    [
        (want(1), have(1, tags=["theirs"]), {"workers-1"}, "101 has this label but not the tag plimsoll-fleet-workers"),
        (want(1), have(1, type="g6-standard-1"), {"workers-1"}, "type g6-standard-1, declared g6-nanode-1"),
        (want(1, private_ip=True), have(1, ipv4=["203.0.113.1"]), {"workers-1"}, "private_ip no, declared yes"),
        (want(1), have(1, status="billing_suspension"), {"workers-1"}, "suspended"),
        (want(1), have(1), set(), "no SSH host key of it is pinned"),
        (want(0), have(1), set(), "max_delete is 0: set it to 1"),
    ],
)
def test_what_cannot_be_done_is_blocked_with_its_reason(desired, listed, known, words) -> None:  # type: ignore[no-untyped-def]
    found = plan(desired, [listed], known)
    assert [(step.action, step.label) for step in found.steps] == [("blocked", "workers-1")]
    assert words in found.steps[0].reason


def test_an_image_that_is_gone_blocks_nothing() -> None:
    assert steps(want(1), have(1, image=None)) == [("keep", "workers-1")]


def test_the_highest_numbers_go_and_only_as_many_as_allowed() -> None:
    listed = have(1), have(2), have(10)
    assert steps(want(1), *listed, max_delete=2)[1:] == [("delete", "workers-2"), ("delete", "workers-10")]
    assert steps(want(1), *listed, max_delete=1)[1:] == [("blocked", "workers-2"), ("blocked", "workers-10")]


@pytest.mark.parametrize("label", ["workers-01", "workers-1-1", "workers-", "workers", "my-workers-1", "workers-1x"])
def test_an_instance_with_the_tag_and_another_label_is_not_touched(label: str) -> None:
    assert steps(want(0), have(1, label=label), max_delete=9) == []


def test_an_instance_with_the_label_and_no_tag_is_not_deleted() -> None:
    assert steps(want(0), have(1, tags=[]), max_delete=9) == []


def test_the_diff_holds_what_differs_alone() -> None:
    listed = [have(1, status="offline"), have(2), have(3)]
    found = plan(want(2, tags=("prod",)), listed, {"workers-1", "workers-2"}, max_delete=1).diff()
    before, after = yaml.safe_load(found["before"]), yaml.safe_load(found["after"])
    assert before["workers-1"] == {"tags": [TAG], "status": "offline"}
    assert after["workers-1"] == {"tags": [TAG, "prod"], "status": "running"}
    assert before["workers-2"] == {"tags": [TAG]}
    assert "workers-3" in before and "workers-3" not in after


@pytest.mark.parametrize(
    ("desired", "words"),
    [
        (Desired("Workers"), "name"),
        (Desired("a--b"), "name"),
        (Desired("w" * 33), "name"),
        (want(-1), "count"),
        (want(1, tags=("ab",)), "3 to 50"),
        (want(1, authorized_keys=()), "authorized_keys"),
        (want(1, user_data="packages: [vim]"), "#cloud-config"),
        (want(1, user_data="#cloud-config\nhostname: other\n"), "hostname is plimsoll's to set"),
        (want(1, user_data="#cloud-config\na: [secret\n"), "no valid YAML"),
    ],
)
def test_a_value_that_cannot_be_is_named(desired: Desired, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        desired.check()
    assert "secret" not in str(caught.value)


def test_a_longest_name_fits_a_tag_and_a_host_name() -> None:
    Desired("w" * 32).check()
    assert len(fleet.tag_of("w" * 32)) <= 50
    assert len(fleet.label_of("w" * 32, 10_000)) <= 63


def test_user_data_is_ours_and_theirs() -> None:
    text = fleet.user_data("workers-1", "PRIVATE\nKEY\n", "ssh-ed25519 AAAA", "#cloud-config\nruncmd: [[true]]\n")
    assert text.startswith("#cloud-config\n")
    assert yaml.safe_load(text) == {
        "hostname": "workers-1",
        "fqdn": "workers-1",
        "preserve_hostname": False,
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": "PRIVATE\nKEY\n", "ed25519_public": "ssh-ed25519 AAAA"},
        "runcmd": [[True]],
    }


def test_user_data_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="65535"):
        fleet.user_data("workers-1", "P", "K", "#cloud-config\na: " + "x" * 65535)


def test_keys_are_strings_or_files(tmp_path: Any) -> None:
    (tmp_path / "me.pub").write_text(f"# mine\n\n{KEY}\nssh-rsa BBBB\n")
    assert fleet.read_keys([KEY, str(tmp_path / "me.pub")]) == (KEY, "ssh-rsa BBBB")
    (tmp_path / "me").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(ValueError, match=r"give the \.pub file"):
        fleet.read_keys([str(tmp_path / "me")])


class FakeApi:
    """Instances in memory. script: for each POST to come, an error to raise and whether it is done all the same."""

    def __init__(self, *instances: dict[str, Any], script: list[tuple[LinodeError, bool] | None] | None = None) -> None:
        self.instances = {one["label"]: one for one in instances}
        self.script = script or []
        self.calls: list[str] = []
        self.bodies: list[Any] = []

    def post(self, path: str, body: Any = None) -> Any:
        self.calls.append(f"POST {path}")
        self.bodies.append(body)
        fault = self.script.pop(0) if self.script else None
        if fault is None or fault[1]:
            if path.endswith("/boot"):
                number = int(path.split("/")[-2])
                next(one for one in self.instances.values() if one["id"] == number)["status"] = "running"
            else:
                index = int(body["label"].rsplit("-", 1)[1])
                self.instances[body["label"]] = raw(index, tags=body["tags"])
        if fault is not None:
            raise fault[0]
        return {} if path.endswith("/boot") else self.instances[body["label"]]

    def put(self, path: str, body: Any) -> Any:
        self.calls.append(f"PUT {path}")
        one = next(one for one in self.instances.values() if path.endswith(f"/{one['id']}"))
        one.update(body)
        return one

    def delete(self, path: str) -> Any:
        self.calls.append(f"DELETE {path}")
        found = [label for label, one in self.instances.items() if path.endswith(f"/{one['id']}")]
        if not found:
            raise Refused("404", 404, [("", "Not found")])
        del self.instances[found[0]]

    def list(self, path: str, filters: Any = None) -> list[dict[str, Any]]:
        self.calls.append(f"LIST {filters}")
        return list(self.instances.values())


class FakeKeys:
    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def pair(self, label: str) -> tuple[str, str]:
        return f"private of {label}", f"public of {label}"

    def forget(self, labels: Any) -> bool:
        self.forgotten += labels
        return True


class Clock:
    """Seconds that pass only in pause()."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds


def carry_out(api: FakeApi, desired: Desired, seconds: float = 100.0, listed: Any = None) -> list[fleet.Result]:
    clock = Clock()
    found = [Instance.of(dict(one)) for one in (api.instances.values() if listed is None else listed)]
    todo = plan(desired, found, {one.label for one in found}, max_delete=9)
    return fleet.apply(todo, desired, found, api, FakeKeys(), Deadline(seconds, clock.now, clock.pause), wait=True)


def test_a_created_instance_carries_its_own_host_key_and_the_tag() -> None:
    api = FakeApi()
    results = carry_out(api, want(2, tags=("prod",)))
    assert [(one.label, one.error, one.instance and one.instance.status) for one in results] == [
        ("workers-1", "", "running"),
        ("workers-2", "", "running"),
    ]
    for body in api.bodies:
        sent = yaml.safe_load(base64.b64decode(body["metadata"]["user_data"]))
        assert sent["ssh_keys"]["ed25519_private"] == f"private of {body['label']}"
        assert body["tags"] == [TAG, "prod"]


LOST = NoAnswer("502")
TAKEN = Refused("400 label: Label must be unique among your linodes", 400, [("label", "Label must be unique")])


@pytest.mark.parametrize(
    ("script", "posts"),
    [
        ([(LOST, True)], 1),  # made, answer lost: found by its label and tag
        ([(LOST, False)], 2),  # not made: made by the second POST
        ([(TAKEN, True)], 1),  # made a moment ago, by a POST whose answer was lost before
    ],
)
def test_a_lost_answer_makes_no_second_instance_and_no_failure(script: Any, posts: int) -> None:
    api = FakeApi(script=script)
    (result,) = carry_out(api, want(1))
    assert (result.error, result.instance and result.instance.id) == ("", 101)
    assert api.calls.count("POST /linode/instances") == posts


def test_a_label_taken_by_another_fails_that_instance() -> None:
    (result,) = carry_out(FakeApi(script=[(TAKEN, False)]), want(1))
    assert "must be unique" in result.error


def test_one_failure_leaves_the_others_alone_and_the_next_run_mends_it() -> None:
    api = FakeApi(raw(1), script=[(Refused("400 no capacity", 400, []), False)])
    assert [bool(one.error) for one in carry_out(api, want(2))] == [False, True]
    assert [bool(one.error) for one in carry_out(api, want(2))] == [False, False]


def test_nothing_is_asked_of_a_settled_fleet() -> None:
    api = FakeApi(raw(1), raw(2))
    carry_out(api, want(2))
    assert api.calls == []


def test_all_are_waited_for_with_one_listing_a_tick() -> None:
    api = FakeApi(*(raw(index, status="booting") for index in range(1, 9)))
    ticks = 0

    def listed(path: str, filters: Any = None) -> list[dict[str, Any]]:
        nonlocal ticks
        ticks += 1
        return [{**one, "status": "running" if ticks == 3 else "booting"} for one in api.instances.values()]

    api.list = listed  # type: ignore[method-assign]
    assert {one.error for one in carry_out(api, want(8))} == {""}
    assert ticks == 3


def test_an_instance_that_stays_off_is_booted() -> None:
    api = FakeApi(raw(1, status="offline"))
    (result,) = carry_out(api, want(1), listed=[raw(1, status="shutting_down")])
    assert (result.error, api.calls.count("POST /linode/instances/101/boot")) == ("", 1)


def test_an_api_that_fails_while_waiting_is_asked_again() -> None:
    api = FakeApi(raw(1, status="booting"))
    answers: list[Any] = [NoAnswer("502"), [raw(1)]]

    def listed(path: str, filters: Any = None) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    api.list = listed  # type: ignore[method-assign]
    assert carry_out(api, want(1))[0].error == ""


def test_the_deadline_ends_the_waiting_and_says_how_it_stands() -> None:
    api = FakeApi(raw(1, status="booting"), raw(2))
    late, fine = carry_out(api, want(2), seconds=20)
    assert late.error == "is still booting after 20 s (wait_timeout); run again to go on waiting"
    assert fine.error == ""


def test_without_wait_nothing_is_polled() -> None:
    api, clock = FakeApi(), Clock()
    todo = plan(want(1), [], set())
    fleet.apply(todo, want(1), [], api, FakeKeys(), Deadline(9, clock.now, clock.pause), wait=False)
    assert api.calls == ["POST /linode/instances"]


def test_what_is_deleted_takes_its_host_key_along() -> None:
    api, keys, clock = FakeApi(raw(1), raw(2)), FakeKeys(), Clock()
    found = [have(1), have(2)]
    todo = plan(want(0), found, set(), max_delete=2)
    results = fleet.apply(todo, want(0), found, api, keys, Deadline(9, clock.now, clock.pause), wait=True)
    assert [one.as_data()["status"] for one in results] == ["absent", "absent"]
    assert keys.forgotten == ["workers-1", "workers-2"]
    assert api.instances == {}


def test_an_instance_that_is_gone_already_is_deleted() -> None:
    (result,) = carry_out(FakeApi(), want(0), listed=[raw(1)])
    assert (result.error, result.gone) == ("", True)


def test_a_blocked_plan_is_not_carried_out() -> None:
    api = FakeApi(raw(1, tags=[]))
    with pytest.raises(ValueError, match="blocked"):
        carry_out(api, want(2))
    assert api.calls == []
