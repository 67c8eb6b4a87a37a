"""A plan carried out against an API in memory: what is asked of it, in which order, and how long it is waited for."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from plimsoll import fleet_api
from plimsoll.fleet import Around, Desired, Group, Host, Instance, Plan, inputs_tag, plan
from plimsoll.fleet_api import Goal, References, Result, Timeouts, apply, around, listing, references
from plimsoll.linode import Deadline, LinodeError, NoAnswer, Refused

TAG = "plimsoll-fleet-workers"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop"
FLEET = {"hosts", "adopt", "remove", "protect", "purge_tags"}
INSTANCES = "/linode/instances"


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


def old(index: int, **more: Any) -> dict[str, Any]:
    """An instance that takes a rebuild, where that is declared."""
    return raw(index, image="linode/debian11", **more)


# What a job shows in one listing each after the request for it; the last stays, but for what is gone.
COURSES: dict[str, list[str]] = {
    "create": ["provisioning", "running"],
    "boot": ["booting", "running"],
    "shutdown": ["shutting_down", "offline"],
    "resize": ["resizing", "running"],
    "rebuild": ["rebuilding", "running"],
    "delete": ["deleting", "gone"],
}


class FakeApi:
    """Instances in memory, and lists of all else by path.

    faults: errors for the requests to come, by method and path, and whether each is done all the same. courses: as
    COURSES.
    """

    def __init__(self, *instances: dict[str, Any], **more: Any) -> None:
        self.instances = {one["id"]: one for one in instances}
        self.faults: dict[str, list[tuple[Exception, bool]]] = more.get("faults", {})
        self.courses = {**COURSES, **more.get("courses", {})}
        self.lists: dict[str, list[dict[str, Any]]] = more.get("lists", {})
        self.jobs: dict[int, tuple[list[str], dict[str, Any]]] = {}
        self.calls: list[str] = []
        self.bodies: list[tuple[str, Any]] = []
        # The most instances that were not running at a time, and what was still there at each creation.
        self.most_down = 0
        self.there_at_creation: list[list[str]] = []

    def post(self, path: str, body: Any = None) -> Any:
        return self._request(f"POST {path}", body, self._made if path == INSTANCES else self._begin)

    def put(self, path: str, body: Any) -> Any:
        return self._request(f"PUT {path}", body, lambda call, given: self._of(call).update(given))

    def delete(self, path: str) -> Any:
        return self._request(f"DELETE {path}", None, self._begin)

    def list(self, path: str, filters: Any = None) -> list[dict[str, Any]]:
        self.calls.append(f"LIST {path}")
        self.bodies.append((f"LIST {path}", filters))
        if path != INSTANCES:
            return [dict(one) for one in self.lists.get(path, [])]
        found = [dict(one) for one in self.instances.values() if fits(one, filters or {})]
        for number, (course, final) in list(self.jobs.items()):
            was = self.instances[number]["status"]
            status = course.pop(0) if course else was
            if status == "gone":
                del self.jobs[number], self.instances[number]
            else:
                # A new type or image is there once the job is through.
                through = was in ("resizing", "rebuilding") and status != was
                self.instances[number].update(final if through else {}, status=status)
        return found

    def _request(self, call: str, body: Any, do: Callable[[str, Any], Any]) -> Any:
        self.calls.append(call)
        self.bodies.append((call, body))
        fault = self.faults[call].pop(0) if self.faults.get(call) else None
        answer = do(call, body) if fault is None or fault[1] else None
        if fault is not None:
            raise fault[0]
        return dict(answer or (self._of(call) if call.startswith("PUT") else {}))

    def _of(self, call: str) -> dict[str, Any]:
        numbers = [part for part in call.split("/") if part.isdigit()]
        if not numbers or int(numbers[0]) not in self.instances:
            raise Refused("404", 404, [("", "Not found")])
        return self.instances[int(numbers[0])]

    def _made(self, call: str, body: dict[str, Any]) -> Any:
        if any(one["label"] == body["label"] for one in self.instances.values()):
            raise Refused("400 label: Label must be unique", 400, [("label", "Label must be unique")])
        self.there_at_creation.append(sorted(one["label"] for one in self.instances.values()))
        index = int(body["label"].rsplit("-", 1)[1])
        course = self.courses["create"] if body["booted"] else [*self.courses["create"][:-1], "offline"]
        fresh = {key: body[key] for key in ("label", "type", "region", "image", "tags")}
        self.instances[500 + index] = raw(index, **fresh, id=500 + index, status=course[0])
        self.jobs[500 + index] = course[1:], {}
        return self.instances[500 + index]

    def _begin(self, call: str, body: Any) -> Any:
        if not call.split(" ")[1].startswith(f"{INSTANCES}/"):
            return None
        one, kind = self._of(call), "delete" if call.startswith("DELETE") else call.rsplit("/", 1)[1]
        if kind in self.courses:
            course = self.courses[kind]
            if kind == "rebuild" and not body["booted"]:
                course = [*course[:-1], "offline"]
            one["status"] = course[0]
            self.jobs[one["id"]] = course[1:], {key: body[key] for key in ("type", "image") if body and key in body}
            down = sum(each["status"] != "running" for each in self.instances.values())
            self.most_down = max(self.most_down, down)
        return None

    def sent(self, call: str) -> list[Any]:
        return [body for made, body in self.bodies if made == call]


def fits(one: dict[str, Any], filters: dict[str, Any]) -> bool:
    """As far as the API's filters are used here."""
    label = filters.get("label", "")
    return (
        ("tags" not in filters or filters["tags"] in one["tags"])
        and (label["+contains"] in one["label"] if isinstance(label, dict) else label in ("", one["label"]))
        and ("+or" not in filters or any(fits(one, each) for each in filters["+or"]))
    )


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


def carry_out(api: FakeApi, desired: Desired, seconds: float = 5000.0, **more: Any) -> list[Result]:
    """Plan as the module does, and carry that out; the api remembers the requests of the latter alone."""
    found = more.pop("listed", None)
    found = listing(api, desired) if found is None else [Instance.of(one) for one in found]
    seen = around(api, desired)
    todo = plan(desired, found, {one.label for one in found} | set(desired.adopt), seen, max_delete=9)
    refs = references(api, todo, seen)
    del api.calls[:], api.bodies[:]
    clock = Clock()
    deadline = Deadline(seconds, clock.now, clock.pause)
    return apply(todo, desired, found, refs, api, more.pop("keys", FakeKeys()), deadline, **more)


def errors(results: list[Result]) -> dict[str, str]:
    return {one.label: one.error for one in results if one.error}


def posts(api: FakeApi) -> list[str]:
    """All but the listings of instances, without the paths' common beginning."""
    return [call.replace(f"{INSTANCES}/", "") for call in api.calls if call != f"LIST {INSTANCES}"]


# ---- reading ----


def test_one_request_lists_who_has_the_tag_a_label_of_the_fleet_or_one_to_adopt() -> None:
    theirs = raw(7, label="celery-old", tags=[])
    api = FakeApi(raw(1), raw(2, tags=[]), raw(3, label="odd"), theirs, raw(8, label="other-1", tags=[]))
    found = listing(api, want(1, adopt={"workers-4": "celery-old"}))
    assert [one.label for one in found] == ["workers-1", "workers-2", "odd", "celery-old"]
    assert api.bodies == [
        (
            "LIST /linode/instances",
            {"+or": [{"tags": TAG}, {"label": {"+contains": "workers-"}}, {"label": "celery-old"}]},
        )
    ]


FIREWALLS = "/networking/firewalls"
BEHIND = {
    FIREWALLS: [
        {"id": 6, "label": "old", "entities": [{"id": 101, "type": "linode"}, {"id": 102, "type": "nodebalancer"}]},
        {"id": 7, "label": "fw", "entities": []},
    ],
    "/vpcs": [
        {
            "id": 1,
            "label": "net",
            "subnets": [
                {"id": 3, "label": "a", "linodes": [{"id": 101}, {"id": 103}]},
                {"id": 4, "label": "b", "linodes": []},
            ],
        },
        {"id": 2, "label": "empty", "subnets": None},
    ],
    "/placement/groups": [{"id": 8, "label": "near"}, {"id": 9, "label": "far"}],
}


def test_firewalls_and_subnets_are_read_with_who_is_in_them() -> None:
    api = FakeApi(lists=BEHIND)
    seen = around(api, want(1, firewall="fw", vpc="net/a"))
    assert api.calls == ["LIST /networking/firewalls", "LIST /vpcs"]
    assert seen.firewalls == {"old": (6, frozenset({101})), "fw": (7, frozenset())}
    assert seen.subnets == {"net/a": (3, frozenset({101, 103})), "net/b": (4, frozenset())}
    assert (seen.firewall_of(101), seen.firewall_of(102), seen.subnet_of(103), seen.subnet_of(1)) == (
        "old",
        "",
        "net/a",
        "",
    )


def test_firewalls_that_do_not_list_their_entities_are_asked_for_them() -> None:
    devices = [{"id": 1, "entity": {"id": 101, "type": "linode"}}, {"id": 2, "entity": {"id": 9, "type": "interface"}}]
    api = FakeApi(lists={FIREWALLS: [{"id": 6, "label": "old"}], f"{FIREWALLS}/6/devices": devices})
    assert around(api, want(1, firewall="old")).firewalls == {"old": (6, frozenset({101}))}
    assert api.calls == ["LIST /networking/firewalls", "LIST /networking/firewalls/6/devices"]


def test_only_what_the_declaration_names_is_asked_for() -> None:
    api = FakeApi(lists=BEHIND)
    assert around(api, want(1, placement_group="near")) == Around()
    assert references(api, plan(want(1), [], set()), Around()) == References()
    assert api.calls == []
    around(api, Desired("box", (Group("a", host(), 1), Group("b", host(vpc="net/a"), 1))))
    assert api.calls == ["LIST /vpcs"]


def test_references_are_ids_by_label_and_those_that_are_missing_are_named() -> None:
    api = FakeApi(lists=BEHIND)
    good = want(1, firewall="fw", vpc="net/b", placement_group="near")
    seen = around(api, good)
    todo = plan(good, [], set(), seen)
    refs = references(api, todo, seen)
    assert (refs.firewalls["fw"], refs.subnets["net/b"], refs.placement_groups["near"]) == (7, 4, 8)
    assert refs.missing(todo) == []
    bad = plan(want(3, firewall="fv", vpc="net/c", placement_group="mars"), [], set(), seen)
    assert refs.missing(bad) == [
        "firewall: 'fv' does not exist; `linode-cli firewalls list` shows what does",
        "vpc: 'net/c' does not exist; `linode-cli vpcs ls` shows what does",
        "placement_group: 'mars' does not exist; `linode-cli placement groups-list` shows what does",
    ]
    # A check sees no firewall that the run itself is going to make.
    assert [one.split(":")[0] for one in refs.missing(bad, pending=("firewall",))] == ["vpc", "placement_group"]


def test_what_an_update_or_a_replacement_refers_to_must_exist_too() -> None:
    found = Instance.of(raw(1))
    update = plan(want(1, firewall="fv"), [found], {"workers-1"})
    anew = plan(want(1, vpc="net/c", on_change="replace"), [found], {"workers-1"})
    assert [step.action for step in (*update.steps, *anew.steps)] == ["update", "replace"]
    assert len(References().missing(update)) == len(References().missing(anew)) == 1


# ---- creating ----


def test_a_created_instance_carries_its_own_host_key_and_the_tag() -> None:
    api = FakeApi()
    results = carry_out(api, want(2, tags=("prod",)))
    assert [(one.label, one.error, one.instance and one.instance.status) for one in results] == [
        ("workers-1", "", "running"),
        ("workers-2", "", "running"),
    ]
    bodies = api.sent(f"POST {INSTANCES}")
    assert len(bodies) == 2
    for body in bodies:
        sent = yaml.safe_load(base64.b64decode(body["metadata"]["user_data"]))
        assert sent["hostname"] == body["label"]
        assert sent["ssh_keys"]["ed25519_private"] == f"private of {body['label']}"
        assert body["tags"] == [TAG, inputs_tag("workers", host()), "prod"]


def test_a_new_instance_is_asked_for_with_what_is_declared_alone() -> None:
    api = FakeApi()
    carry_out(api, want(1))
    (body,) = api.sent(f"POST {INSTANCES}")
    assert {key: value for key, value in body.items() if key != "metadata"} == {
        "label": "workers-1",
        "type": "g6-nanode-1",
        "region": "us-ord",
        "image": "linode/debian12",
        "tags": [TAG, inputs_tag("workers", host())],
        "authorized_keys": [KEY],
        "private_ip": False,
        "booted": True,
        "interface_generation": "legacy_config",
    }


def test_a_new_instance_is_asked_for_with_all_that_is_declared() -> None:
    api = FakeApi(lists=BEHIND)
    declared = {
        "private_ip": True,
        "user_data": "#cloud-config\nruncmd: [[true]]\n",
        "firewall": "fw",
        "vpc": "net/b",
        "placement_group": "near",
        "disk_encryption": "disabled",
        "backups": True,
        "swap_size": 0,
        "maintenance_policy": "linode/migrate",
        "power": "any",
    }
    assert errors(carry_out(api, want(1, **declared))) == {}
    (body,) = api.sent(f"POST {INSTANCES}")
    assert yaml.safe_load(base64.b64decode(body["metadata"]["user_data"]))["runcmd"] == [[True]]
    told = {
        "private_ip": True,
        "firewall_id": 7,
        "interfaces": [{"purpose": "public", "primary": True}, {"purpose": "vpc", "subnet_id": 4}],
        "placement_group": {"id": 8},
        "disk_encryption": "disabled",
        "backups_enabled": True,
        "swap_size": 0,
        "maintenance_policy": "linode/migrate",
        "booted": True,
    }
    assert {key: body.get(key) for key in told} == told


def test_what_is_to_be_off_is_created_off_and_not_waited_for_to_run() -> None:
    api = FakeApi()
    (result,) = carry_out(api, want(1, power="offline"))
    assert (result.error, result.instance and result.instance.status) == ("", "offline")
    assert api.sent(f"POST {INSTANCES}")[0]["booted"] is False


LOST = NoAnswer("502")
TAKEN = Refused("400 label: Label must be unique among your linodes", 400, [("label", "Label must be unique")])


@pytest.mark.parametrize(
    ("script", "requests"),
    [
        ([(LOST, True)], 1),  # made, answer lost: found by its label and tag
        ([(LOST, False)], 2),  # not made: made by the second POST
        ([(LOST, False), (LOST, False)], 3),
        ([(TAKEN, True)], 1),  # made a moment ago, by a POST whose answer was lost before
    ],
)
def test_a_lost_answer_makes_no_second_instance_and_no_failure(script: Any, requests: int) -> None:
    api = FakeApi(faults={f"POST {INSTANCES}": script})
    (result,) = carry_out(api, want(1))
    assert (result.error, result.instance and result.instance.id) == ("", 501)
    assert api.calls.count(f"POST {INSTANCES}") == requests


def test_an_answer_that_is_lost_three_times_is_a_failure() -> None:
    api = FakeApi(faults={f"POST {INSTANCES}": [(LOST, False)] * 9})
    assert errors(carry_out(api, want(1))) == {"workers-1": "502"}
    assert api.calls.count(f"POST {INSTANCES}") == 3


def test_a_label_taken_by_another_fails_that_instance() -> None:
    api = FakeApi(faults={f"POST {INSTANCES}": [(TAKEN, False)]})
    (result,) = carry_out(api, want(1))
    assert "must be unique" in result.error and result.as_data()["status"] == "unknown"


def test_one_failure_leaves_the_others_alone_and_the_next_run_mends_it() -> None:
    api = FakeApi(raw(1), faults={f"POST {INSTANCES}": [(Refused("400 no capacity", 400, []), False)]})
    assert errors(carry_out(api, want(2))) == {"workers-2": "400 no capacity"}
    assert errors(carry_out(api, want(2))) == {}


# ---- updating ----


def test_an_update_asks_for_all_that_differs_in_turn_and_moves_from_one_firewall_to_the_other() -> None:
    devices = [
        {"id": 31, "entity": {"id": 101, "type": "nodebalancer"}},
        {"id": 32, "entity": {"id": 101, "type": "linode"}},
        {"id": 33, "entity": {"id": 102, "type": "linode"}},
    ]
    lists = {**BEHIND, f"{FIREWALLS}/6/devices": devices}
    api = FakeApi(raw(1, placement_group={"id": 9, "label": "far"}), lists=lists)
    desired = want(
        1,
        backups=True,
        placement_group="near",
        firewall="fw",
        maintenance_policy="linode/migrate",
        tags=("prod",),
    )
    (result,) = carry_out(api, desired)
    assert result.error == "" and result.instance and result.instance.tags == (TAG, "prod")
    assert posts(api) == [
        "POST 101/backups/enable",
        "POST /placement/groups/9/unassign",
        "POST /placement/groups/8/assign",
        "LIST /networking/firewalls/6/devices",
        "DELETE /networking/firewalls/6/devices/32",
        "POST /networking/firewalls/7/devices",
        "PUT 101",
    ]
    assert api.sent("POST /placement/groups/8/assign") == api.sent("POST /placement/groups/9/unassign")
    assert api.sent("POST /placement/groups/8/assign") == [{"linodes": [101]}]
    assert api.sent("POST /networking/firewalls/7/devices") == [{"id": 101, "type": "linode"}]
    assert api.sent(f"PUT {INSTANCES}/101") == [{"tags": [TAG, "prod"], "maintenance_policy": "linode/migrate"}]


def test_an_instance_in_no_firewall_and_no_group_is_put_there_without_leaving_another() -> None:
    api = FakeApi(raw(3), lists=BEHIND)
    assert errors(carry_out(api, want(1, placement_group="near", firewall="fw"))) == {}
    # Nothing is left for a PUT, and nothing to be waited for.
    assert api.calls == ["POST /placement/groups/8/assign", "POST /networking/firewalls/7/devices"]


def test_an_update_of_what_runs_is_one_request() -> None:
    api = FakeApi(raw(1))
    (result,) = carry_out(api, want(1, tags=("prod",)))
    assert api.calls == [f"PUT {INSTANCES}/101"] and api.sent(f"PUT {INSTANCES}/101") == [{"tags": [TAG, "prod"]}]
    assert result.as_data() == {
        "label": "workers-1",
        "actions": ["update"],
        "id": 101,
        "status": "running",
        "ipv4": "203.0.113.1",
        "private_ipv4": "192.168.128.1",
        "ipv6": None,
        "tags": [TAG, "prod"],
        "error": "",
    }


def test_what_is_updated_while_it_is_busy_is_waited_for() -> None:
    api = FakeApi(raw(1, status="booting"))
    api.jobs[101] = (["running"], {})
    (result,) = carry_out(api, want(1, tags=("prod",)), listed=[raw(1, status="booting")])
    assert (result.error, result.instance and result.instance.status) == ("", "running")


def test_a_boot_after_an_update_is_not_held_up() -> None:
    api = FakeApi(raw(1, status="offline"))
    (result,) = carry_out(api, want(1, tags=("prod",)))
    assert (result.error, result.instance and result.instance.status) == ("", "running")
    assert api.calls[:3] == [f"PUT {INSTANCES}/101", f"POST {INSTANCES}/101/boot", f"LIST {INSTANCES}"]


def test_an_update_that_fails_is_followed_by_nothing() -> None:
    refused = Refused("400 tags: no", 400, [("tags", "no")])
    api = FakeApi(raw(1, status="offline"), raw(2), faults={f"PUT {INSTANCES}/101": [(refused, False)]})
    assert errors(carry_out(api, want(2, tags=("prod",)))) == {"workers-1": "400 tags: no"}
    assert f"POST {INSTANCES}/101/boot" not in api.calls


def test_an_adopted_instance_is_found_under_its_new_label() -> None:
    api = FakeApi(raw(9, label="celery-old", tags=["theirs"], status="offline"))
    (result,) = carry_out(api, want(1, adopt={"workers-1": "celery-old"}, type="g6-standard-1"))
    assert (result.error, result.label, result.instance and result.instance.label) == ("", "workers-1", "workers-1")
    assert api.sent(f"PUT {INSTANCES}/109") == [{"label": "workers-1", "tags": ["theirs", TAG]}]
    assert posts(api) == ["PUT 109", "POST 109/resize", "POST 109/boot"]


# ---- taking hosts down ----


def test_a_rebuild_gives_all_anew_and_then_records_it() -> None:
    api = FakeApi(old(1))
    desired = want(1, on_change="rebuild", disk_encryption="enabled")
    (result,) = carry_out(api, desired)
    assert (result.error, result.instance and result.instance.status) == ("", "running")
    assert posts(api) == ["POST 101/rebuild", "PUT 101"]
    (body,) = api.sent(f"POST {INSTANCES}/101/rebuild")
    sent = yaml.safe_load(base64.b64decode(body.pop("metadata")["user_data"]))
    assert sent["ssh_keys"]["ed25519_private"] == "private of workers-1"
    assert body == {
        "image": "linode/debian12",
        "authorized_keys": [KEY],
        "booted": True,
        "disk_encryption": "enabled",
    }
    assert api.sent(f"PUT {INSTANCES}/101") == [{"tags": [TAG, inputs_tag("workers", host())]}]


def test_what_is_off_and_is_to_be_so_is_rebuilt_off() -> None:
    api = FakeApi(old(1, status="offline"))
    (result,) = carry_out(api, want(1, on_change="rebuild", power="offline"))
    assert (result.error, result.instance and result.instance.status) == ("", "offline")
    assert api.sent(f"POST {INSTANCES}/101/rebuild")[0]["booted"] is False


def test_a_resize_ends_before_the_boot_after_it() -> None:
    api = FakeApi(raw(1, status="offline"), courses={"resize": ["resizing", "resizing", "offline"]})
    (result,) = carry_out(api, want(1, type="g6-standard-1"))
    assert (result.error, result.instance and result.instance.type) == ("", "g6-standard-1")
    asked = [call for call in api.calls if call.endswith(("/resize", "/boot", "instances"))]
    first, boot = f"POST {INSTANCES}/101/resize", asked.index(f"POST {INSTANCES}/101/boot")
    assert asked[0] == first and asked[1:boot] == [f"LIST {INSTANCES}"] * (boot - 1) and boot >= 3
    assert api.sent(first) == [{"type": "g6-standard-1", "allow_auto_disk_resize": True}]


def test_a_resize_that_begins_late_is_waited_for_by_its_type() -> None:
    api = FakeApi(raw(1), courses={"resize": ["running", "running", "resizing", "running"]})
    (result,) = carry_out(api, want(1, type="g6-standard-1"))
    assert (result.error, result.instance and result.instance.type) == ("", "g6-standard-1")


def test_a_host_that_ran_is_waited_for_until_it_runs_again_after_a_resize() -> None:
    # Linode boots it, but some seconds after the resize is done.
    api = FakeApi(raw(1), raw(2), courses={"resize": ["resizing", "offline", "booting", "running"]})
    results = carry_out(api, want(2, type="g6-standard-1"))
    assert [(one.error, one.instance and one.instance.status) for one in results] == [("", "running")] * 2
    assert api.most_down == 1


def test_a_shutdown_is_waited_for() -> None:
    api = FakeApi(raw(1))
    (result,) = carry_out(api, want(1, power="offline"))
    assert (result.error, result.instance and result.instance.status) == ("", "offline")
    assert posts(api) == ["POST 101/shutdown"]


def test_what_boots_and_is_to_be_off_is_shut_down_or_left_but_not_waited_for_in_vain() -> None:
    api = FakeApi(raw(1, status="booting"))
    api.jobs[101] = (["running"], {})
    assert errors(carry_out(api, want(1, power="offline"), listed=[raw(1, status="booting")])) == {}


@pytest.mark.parametrize("wait", [True, False])
def test_a_replacement_is_created_once_the_last_one_is_gone(wait: bool) -> None:
    api = FakeApi(raw(1, region="de-fra-2"), raw(2), courses={"delete": ["deleting", "deleting", "deleting", "gone"]})
    keys = FakeKeys()
    first, second = carry_out(api, want(2, on_change="replace"), wait=wait, keys=keys)
    assert (first.actions, first.error, first.gone, first.instance and first.instance.id) == (
        ("replace",),
        "",
        False,
        501,
    )
    assert second.instance and second.instance.id == 102
    assert posts(api) == ["DELETE 101", f"POST {INSTANCES}"]
    # The label was free, and nobody else's.
    assert api.there_at_creation == [["workers-2"]] and keys.forgotten == []
    # Whoever is taken down is waited for in either case.
    assert first.instance and first.instance.status == "running"


def test_a_replacement_whose_last_one_does_not_go_is_not_created() -> None:
    api = FakeApi(raw(1, region="de-fra-2"), courses={"delete": ["deleting"] * 999})
    (error,) = errors(carry_out(api, want(1, on_change="replace"))).values()
    assert error == "is still deleting after 300 s (timeouts.delete); run again to go on waiting"
    assert posts(api) == ["DELETE 101"]


def test_a_replacement_that_cannot_be_created_leaves_nothing_that_is_said_to_be_there() -> None:
    refused = Refused("400 no capacity", 400, [])
    api = FakeApi(raw(1, region="de-fra-2"), faults={f"POST {INSTANCES}": [(refused, False)]})
    (result,) = carry_out(api, want(1, on_change="replace"))
    assert result.error == "400 no capacity" and api.instances == {}
    assert (result.as_data()["id"], result.as_data()["status"]) == (None, "unknown")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_more_hosts_are_down_than_may_be(size: int) -> None:
    api = FakeApi(*(old(index) for index in range(1, 6)))
    results = carry_out(api, want(5, on_change="rebuild"), max_unavailable=size)
    assert errors(results) == {} and api.most_down == size
    assert sorted(posts(api))[:5] == [f"POST 10{index}/rebuild" for index in range(1, 6)]


def test_a_batch_that_fails_is_the_last_one() -> None:
    refused = Refused("400 image: no", 400, [("image", "no")])
    api = FakeApi(*(old(index) for index in range(1, 6)), faults={f"POST {INSTANCES}/103/rebuild": [(refused, False)]})
    results = carry_out(api, want(5, on_change="rebuild"), max_unavailable=2)
    assert errors(results) == {
        "workers-3": "400 image: no",
        "workers-5": "not begun, as workers-3 failed",
    }
    assert sorted(call for call in posts(api) if "rebuild" in call) == [f"POST 10{one}/rebuild" for one in range(1, 5)]
    # The rest of its batch is seen through.
    assert {one.label: one.instance and one.instance.status for one in results}["workers-4"] == "running"
    assert len(results) == 5


def test_a_host_that_does_not_come_back_holds_up_the_others() -> None:
    api = FakeApi(old(1), old(2), courses={"rebuild": ["rebuilding"] * 999})
    results = carry_out(api, want(2, on_change="rebuild"), timeouts=Timeouts(change=60))
    assert errors(results) == {
        "workers-1": "is still rebuilding after 60 s (timeouts.change); run again to go on waiting",
        "workers-2": "not begun, as workers-1 failed",
    }


def test_what_takes_no_host_down_comes_first_and_deletions_come_last() -> None:
    api = FakeApi(old(2), old(5, type="g6-standard-1"), raw(7), raw(8, status="offline"))
    desired = want(4, on_change="rebuild", remove=("workers-7",))
    assert errors(carry_out(api, desired)) == {}
    order = posts(api)
    # The booting of 8 and the creation of 1 are side by side.
    assert set(order[:2]) == {"POST 108/boot", f"POST {INSTANCES}"}
    assert order[2:] == ["POST 102/rebuild", "PUT 102", "POST 105/resize", "POST 105/rebuild", "PUT 105", "DELETE 107"]
    down = api.calls.index(f"POST {INSTANCES}/102/rebuild")
    assert api.calls[down - 1] == f"LIST {INSTANCES}", "they are seen to run before a host is taken down"


@pytest.mark.parametrize(
    ("request_", "desired", "found"),
    [
        ("rebuild", want(1, on_change="rebuild"), old(1)),
        ("resize", want(1, type="g6-standard-1"), raw(1)),
    ],
)
def test_a_lost_answer_of_a_job_is_settled_by_a_look(request_: str, desired: Desired, found: Any) -> None:
    call = f"POST {INSTANCES}/101/{request_}"
    api = FakeApi(dict(found), faults={call: [(LOST, True)]})
    assert errors(carry_out(api, desired)) == {} and api.calls.count(call) == 1
    assert (f"PUT {INSTANCES}/101" in api.calls) is (request_ == "rebuild")
    # Not begun: nothing is recorded, and nothing is sent twice.
    api = FakeApi(dict(found), faults={call: [(LOST, False)]})
    assert errors(carry_out(api, desired)) == {"workers-1": "502"}
    assert posts(api) == [call.replace(f"{INSTANCES}/", "")]


# ---- deleting ----


def test_what_is_deleted_takes_its_host_key_along() -> None:
    api, keys = FakeApi(raw(1), raw(2)), FakeKeys()
    results = carry_out(api, want(0), keys=keys)
    assert [one.as_data()["status"] for one in results] == ["absent", "absent"]
    assert keys.forgotten == ["workers-1", "workers-2"]
    assert api.instances == {}


def test_what_is_not_gone_keeps_its_host_key() -> None:
    refused = Refused("403 no", 403, [])
    api, keys = FakeApi(raw(1), raw(2), faults={f"DELETE {INSTANCES}/101": [(refused, False)]}), FakeKeys()
    first, second = carry_out(api, want(0), keys=keys)
    assert (first.error, first.gone, first.as_data()["status"]) == ("403 no", False, "running")
    assert (second.error, second.gone, keys.forgotten) == ("", True, ["workers-2"])


def test_an_instance_that_is_gone_already_is_deleted() -> None:
    (result,) = carry_out(FakeApi(), want(0), listed=[raw(1)])
    assert (result.error, result.gone) == ("", True)


# ---- waiting ----


def test_nothing_is_asked_of_a_settled_fleet() -> None:
    api = FakeApi(raw(1), raw(2))
    results = carry_out(api, want(2))
    assert api.calls == []
    assert [(one.actions, one.instance and one.instance.id) for one in results] == [(("keep",), 101), (("keep",), 102)]


def test_all_are_waited_for_with_one_listing_a_tick() -> None:
    api = FakeApi(*(raw(index, status="booting") for index in range(1, 9)))
    found = [dict(one) for one in api.instances.values()]
    api.jobs = {100 + index: (["booting", "running"], {}) for index in range(1, 9)}
    assert errors(carry_out(api, want(8), listed=found)) == {}
    assert api.calls == [f"LIST {INSTANCES}"] * 3
    assert api.bodies[0][1] == {"tags": TAG}


def test_without_wait_nothing_is_polled() -> None:
    api = FakeApi(raw(2, status="booting"))
    first, _ = carry_out(api, want(2), wait=False)
    assert api.calls == [f"POST {INSTANCES}"]
    assert first.as_data()["status"] == "provisioning"


def test_an_instance_that_stays_off_is_booted() -> None:
    api = FakeApi(raw(1, status="offline"))
    (result,) = carry_out(api, want(1), listed=[raw(1, status="shutting_down")])
    assert (result.error, api.calls.count(f"POST {INSTANCES}/101/boot")) == ("", 1)


def test_a_new_instance_that_is_off_for_a_moment_is_not_booted() -> None:
    api = FakeApi(courses={"create": ["provisioning", "offline", "offline", "booting", "running"]})
    assert errors(carry_out(api, want(1))) == {} and posts(api) == [f"POST {INSTANCES}"]


def test_moments_of_being_off_do_not_add_up() -> None:
    course = ["provisioning", *["offline"] * 5, "booting", *["offline"] * 4, "running"]
    api = FakeApi(courses={"create": course})
    assert errors(carry_out(api, want(1))) == {} and posts(api) == [f"POST {INSTANCES}"]


def test_an_instance_that_does_not_boot_is_given_up_with_what_the_api_says_of_it() -> None:
    events = [
        {"action": "linode_create", "status": "finished", "message": ""},
        {"action": "linode_boot", "status": "failed", "message": "No\n bootable  disk."},
        {"action": "linode_boot", "status": "failed", "message": "older"},
    ]
    api = FakeApi(raw(1, status="offline"), courses={"boot": ["booting", "offline"]}, lists={"/account/events": events})
    (error,) = errors(carry_out(api, want(1))).values()
    assert error == ("is still offline after 3 boots; its last failed event, linode_boot, says: No bootable disk.")
    assert api.calls.count(f"POST {INSTANCES}/101/boot") == 1 + fleet_api.BOOT_TRIES
    assert api.sent("LIST /account/events")[0] | {"entity.id": 101} == api.sent("LIST /account/events")[0]


@pytest.mark.parametrize("fault", [Refused("400 busy", 400, []), NoAnswer("502")])
def test_a_boot_that_is_refused_while_waiting_ends_nothing(fault: Exception) -> None:
    api = FakeApi(raw(1, status="offline"), faults={f"POST {INSTANCES}/101/boot": [(fault, False)]})
    (result,) = carry_out(api, want(1), listed=[raw(1, status="shutting_down")])
    assert (result.error, api.calls.count(f"POST {INSTANCES}/101/boot")) == ("", 2)


def test_a_boot_that_the_rate_limit_forbids_loses_no_result() -> None:
    fault = LinodeError("takes POST again in 99 s, by its rate limit: longer than is left")
    api = FakeApi(raw(1, status="offline"), raw(2), faults={f"POST {INSTANCES}/101/boot": [(fault, False)]})
    results = carry_out(api, want(2), listed=[raw(1, status="shutting_down"), raw(2)])
    assert [one.label for one in results] == ["workers-1", "workers-2"]


def answers(api: FakeApi, *given: Any) -> None:
    """The next listings of instances, each an error or the instances; then as ever."""
    left, really = list(given), api.list

    def listed(path: str, filters: Any = None) -> Any:
        if path != INSTANCES or not left:
            return really(path, filters)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    api.list = listed  # type: ignore[method-assign]


def test_an_api_that_fails_while_waiting_is_asked_again() -> None:
    api = FakeApi(raw(1, status="booting"))
    answers(api, [raw(1, status="booting")], NoAnswer("502"), [raw(1)])
    assert errors(carry_out(api, want(1))) == {}


def test_an_api_that_stays_away_while_waiting_is_what_the_error_says() -> None:
    api = FakeApi(raw(1, status="booting"))
    answers(api, [raw(1, status="booting")], *[NoAnswer("no answer")] * 99)
    (error,) = errors(carry_out(api, want(1), seconds=30)).values()
    assert error == "no answer after 30 s (wait_timeout); run again to go on waiting"


def test_a_refusal_while_waiting_fails_all_that_are_waited_for_and_no_others() -> None:
    api = FakeApi(raw(1, status="booting"), raw(2, status="booting"), raw(3))
    answers(api, list(api.instances.values()), Refused("401 token", 401, []))
    assert errors(carry_out(api, want(3))) == {"workers-1": "401 token", "workers-2": "401 token"}


def test_the_deadline_ends_the_waiting_and_says_how_it_stands() -> None:
    api = FakeApi(raw(1, status="booting"), raw(2))
    late, fine = carry_out(api, want(2), seconds=20)
    assert late.error == "is still booting after 20 s (wait_timeout); run again to go on waiting"
    assert fine.error == ""


STUCK = {kind: [course[0]] * 999 for kind, course in COURSES.items()}


@pytest.mark.parametrize(
    ("desired", "found", "words"),
    [
        (want(1), None, "is still provisioning after 11 s (timeouts.create)"),
        (want(1), raw(1, status="offline"), "is still booting after 11 s (timeouts.create)"),
        (want(1), raw(1, status="rebooting"), "is still rebooting after 11 s (timeouts.create)"),
        (want(1, type="g6-standard-1"), raw(1), "is still resizing after 22 s (timeouts.change)"),
        (want(1, on_change="rebuild"), old(1), "is still rebuilding after 22 s (timeouts.change)"),
        (want(1, power="offline"), raw(1), "is still shutting_down after 22 s (timeouts.change)"),
        (want(1, on_change="replace"), old(1), "is still deleting after 33 s (timeouts.delete)"),
        (want(0), raw(1), "is still deleting after 33 s (timeouts.delete)"),
    ],
)
def test_each_kind_of_waiting_has_its_own_end_and_names_it(desired: Desired, found: Any, words: str) -> None:
    api = FakeApi(*([found] if found else []), courses=STUCK)
    limits = Timeouts(create=11, change=22, delete=33)
    (error,) = errors(carry_out(api, desired, timeouts=limits)).values()
    assert error == f"{words}; run again to go on waiting"


@pytest.mark.parametrize(
    ("power", "status", "waits"),
    [
        ("running", "running", False),
        ("running", "booting", True),
        ("any", "running", False),
        ("any", "offline", False),
        ("any", "rebooting", True),
        ("offline", "stopped", False),
        ("offline", "shutting_down", True),
    ],
)
def test_what_is_kept_is_waited_for_where_a_job_is_under_way(power: str, status: str, waits: bool) -> None:
    api = FakeApi(raw(1, status=status))
    if waits:
        api.jobs[101] = (["offline" if power == "offline" else "running"], {})
    (result,) = carry_out(api, want(1, power=power), listed=[raw(1, status=status)])
    assert (result.actions, result.error, bool(api.calls)) == (("keep",), "", waits)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("running"), {"running"}),
        (Goal("offline"), {"offline", "stopped"}),
        (Goal(""), {"running", "offline", "stopped"}),
        (Goal("", "g6-standard-1"), set()),
        (Goal("gone"), {None}),
    ],
)
def test_a_goal_is_met_by_its_statuses_alone(goal: Goal, met: set[str | None]) -> None:
    statuses = [None, "running", "offline", "stopped", "booting", "resizing", "deleting", "rebuilding", "provisioning"]
    assert {each for each in statuses if goal.met(Instance.of(raw(1, status=each)) if each else None)} == met


# ---- the plan as a whole ----


def test_a_blocked_plan_is_not_carried_out() -> None:
    api = FakeApi(raw(1, tags=[]))
    with pytest.raises(ValueError, match="blocked"):
        carry_out(api, want(2))
    assert api.calls == []


def test_an_empty_plan_asks_nothing() -> None:
    api = FakeApi()
    assert carry_out(api, want(0)) == [] and api.calls == []


def test_a_part_of_a_plan_is_carried_out_alone() -> None:
    api, clock = FakeApi(old(1), old(2)), Clock()
    desired = want(2, on_change="rebuild")
    found = listing(api, desired)
    todo: Plan = plan(desired, found, {"workers-1", "workers-2"}).only(["workers-2"])
    deadline = Deadline(900, clock.now, clock.pause)
    (result,) = apply(todo, desired, found, References(), api, FakeKeys(), deadline)
    assert (result.label, result.error) == ("workers-2", "")
    assert posts(api) == ["POST 102/rebuild", "PUT 102"]
