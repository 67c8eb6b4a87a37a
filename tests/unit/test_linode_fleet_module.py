"""The module on an API in memory: what it takes its parameters for, what it refuses, returns, and leaves alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import linode_fleet

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop"
TAG = "plimsoll-fleet-workers"


def run(given: dict[str, Any], capsys: Any) -> dict[str, Any]:
    with patch_module_args(given), pytest.raises(SystemExit):
        linode_fleet.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def params(home: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "workers",
        "type": "g6-nanode-1",
        "region": "us-ord",
        "image": "linode/debian12",
        "authorized_keys": [KEY],
        "api_token": "s3cret-t0ken",
        # Nothing here takes time; what is waited for in vain is to end soon.
        "wait_timeout": 2,
        "state_dir": str(home / "state"),
        **more,
    }


def raw(index: int, **more: Any) -> dict[str, Any]:
    return {
        "id": 100 + index,
        "label": f"workers-{index}",
        "status": "running",
        "type": "g6-nanode-1",
        "region": "us-ord",
        "image": "linode/debian12",
        "tags": [TAG],
        "ipv4": [f"203.0.113.{index}"],
        **more,
    }


SOLD: dict[str, list[dict[str, Any]]] = {
    "/linode/types": [
        {"id": "g6-nanode-1", "price": {"monthly": 5}},
        {"id": "g6-standard-1", "price": {"monthly": 12}},
    ],
    "/regions": [{"id": "us-ord"}, {"id": "de-fra-2"}],
    "/images": [{"id": f"linode/debian{number}", "capabilities": ["cloud-init"]} for number in (11, 12)],
}


class FakeApi:
    """Instances in memory, which are as asked for at once, and lists of all else by path."""

    base = "https://api.example/v4"

    def __init__(self, *instances: dict[str, Any], **lists: Any) -> None:
        self.instances = {one["id"]: one for one in instances}
        self.lists = {**SOLD, **{f"/{path.replace('_', '/')}": found for path, found in lists.items()}}
        self.written: list[str] = []
        self.read: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    def post(self, path: str, body: Any = None) -> Any:
        self.written.append(f"POST {path}")
        self.bodies.append(body)
        if path == "/linode/instances":
            given = {key: body[key] for key in ("label", "type", "region", "image", "tags")}
            return self.instances.setdefault(500 + len(self.instances), raw(5, **given, id=500 + len(self.instances)))
        if path.endswith(("/resize", "/rebuild")):
            one = self.instances[int(path.split("/")[3])]
            one.update({key: body[key] for key in ("type", "image") if key in body})
        return {}

    def put(self, path: str, body: Any) -> Any:
        self.written.append(f"PUT {path}")
        one = self.instances[int(path.rsplit("/", 1)[1])]
        one.update(body)
        return one

    def delete(self, path: str) -> Any:
        self.written.append(f"DELETE {path}")
        return self.instances.pop(int(path.rsplit("/", 1)[1]))

    def list(self, path: str, filters: Any = None) -> list[dict[str, Any]]:
        self.read.append(path)
        return [dict(one) for one in (self.instances.values() if path == "/linode/instances" else self.lists[path])]


@pytest.fixture
def api(monkeypatch: Any, tmp_path: Path) -> Any:
    """Give it instances: the module then meets them, with a host key pinned for each."""
    fake = FakeApi()

    def of(*instances: dict[str, Any], **lists: Any) -> FakeApi:
        fake.__init__(*instances, **lists)  # type: ignore[misc]
        (tmp_path / "state").mkdir(exist_ok=True)
        lines = [f"{one['label']} ssh-ed25519 AAAA\n" for one in instances]
        (tmp_path / "state/known_hosts").write_text("".join(lines))
        return fake

    monkeypatch.setattr(linode_fleet.linode, "Api", lambda *args: fake)
    return of


def done(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step["action"], step["label"]) for step in result["plan"]]


def test_a_missing_library_is_named(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(linode_fleet, "MISSING", f"linode_api4 is not installed for {sys.executable}")
    result = run({"name": "workers", "state": "absent", "state_dir": str(tmp_path)}, capsys)
    assert result["failed"] and "linode_api4 is not installed" in result["msg"]


@pytest.mark.parametrize("missing", ["type", "region", "image", "authorized_keys"])
def test_a_present_fleet_needs_to_be_declared_whole(missing: str, capsys: Any, tmp_path: Any) -> None:
    result = run({**params(tmp_path, count=1), missing: [] if missing == "authorized_keys" else ""}, capsys)
    assert result["failed"] and f"fleet workers: {missing}: " in result["msg"]


def test_a_missing_token_is_named_before_anything_is_asked(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    monkeypatch.delenv("LINODE_API_TOKEN", raising=False)
    result = run({"name": "workers", "state": "absent", "state_dir": str(tmp_path)}, capsys)
    assert "set LINODE_API_TOKEN" in result["msg"]


@pytest.mark.parametrize("url", ["", "ftp://x"])
def test_an_empty_url_is_the_default_and_a_wrong_one_is_named(
    url: str, monkeypatch: Any, capsys: Any, tmp_path: Any
) -> None:
    asked: list[str] = []

    def api(token: str, url: str, *rest: Any) -> Any:
        asked.append(url)
        raise linode_fleet.linode.LinodeError("stop here")

    monkeypatch.setattr(linode_fleet.linode, "Api", api)
    monkeypatch.setenv("LINODE_API_URL", url)
    run({"name": "workers", "state": "absent", "api_token": "s3cret-t0ken", "state_dir": str(tmp_path)}, capsys)
    assert asked == [url or "https://api.linode.com"]


# ---- what is declared ----


def test_a_settled_fleet_takes_one_request_and_changes_nothing(api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api(raw(1), raw(2))
    result = run(params(tmp_path, count=2), capsys)
    assert (result["changed"], done(result)) == (False, [("keep", "workers-1"), ("keep", "workers-2")])
    assert (fake.read, fake.written, "cost" in result, result["rolling"]) == (["/linode/instances"], [], False, [])
    assert [one["id"] for one in result["instances"]] == [101, 102]


def test_what_is_missing_is_created_with_a_host_key_of_its_own(api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api(raw(1))
    result = run(params(tmp_path, count=2, tags=["prod"]), capsys)
    assert not result.get("failed") and result["changed"]
    assert sorted(fake.written) == ["POST /linode/instances", "PUT /linode/instances/101"]
    assert (tmp_path / "state/hostkeys/workers-2").exists()
    assert "workers-2 ssh-ed25519 " in (tmp_path / "state/known_hosts").read_text()
    assert result["cost"] == {"currency": "USD", "monthly_before": 5, "monthly_after": 10}
    assert result["diff"]["before_header"] == "fleet workers, 5.00 USD a month"
    assert [one["error"] for one in result["instances"]] == ["", ""]


def test_groups_inherit_from_the_fleet_and_add_their_tags(api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api()
    groups = [
        {"name": "worker", "count": 2, "tags": ["fast"], "type": "g6-standard-1"},
        {"name": "broker", "hosts": ["main"], "private_ip": False, "swap_size": 0, "image": "linode/debian11"},
    ]
    declared = {"tags": ["prod"], "private_ip": True, "swap_size": 256, "groups": groups}
    result = run(params(tmp_path, **declared), capsys)
    assert not result.get("failed")
    bodies = {body["label"]: body for body in fake.bodies}
    assert set(bodies) == {"workers-worker-1", "workers-worker-2", "workers-broker-main"}
    worker, broker = bodies["workers-worker-1"], bodies["workers-broker-main"]
    assert [(one["type"], one["image"], one["private_ip"], one["swap_size"]) for one in (worker, broker)] == [
        ("g6-standard-1", "linode/debian12", True, 256),
        ("g6-nanode-1", "linode/debian11", False, 0),
    ]
    # Beside the two that plimsoll sets.
    assert [one["tags"][2:] for one in (worker, broker)] == [["prod", "fast"], ["prod"]]


def test_a_group_may_empty_what_the_fleet_gives(tmp_path: Path) -> None:
    given = {option: spec.get("default") for option, spec in linode_fleet.SPEC.items()}
    given |= params(tmp_path, firewall="fw", user_data="#cloud-config\na: 1\n", backups=True)
    given["groups"] = [{"name": "a", "count": 1, "hosts": None, "firewall": "", "user_data": "", "backups": False}]
    (group,) = linode_fleet.desired_fleet(given).groups
    assert (group.host.firewall, group.host.user_data, group.host.backups) == ("", "", False)
    assert group.host.authorized_keys == (KEY,)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "any of the following are missing: count, hosts, groups"),
        ({"count": 1, "hosts": ["a"]}, "mutually exclusive: count|hosts|groups"),
        ({"count": 1, "groups": []}, "mutually exclusive: count|hosts|groups"),
        ({"groups": [{"name": "a", "count": 1, "hosts": ["b"]}]}, "mutually exclusive: count|hosts"),
        ({"groups": [{"count": 1}]}, "missing required arguments: name"),
        ({"groups": [{"name": "a", "count": 1}, {"name": "a", "count": 1}]}, "groups: a is there twice"),
        ({"groups": [{"name": "a", "count": 1, "type": ""}], "type": ""}, "group a: type: must be given"),
        ({"count": 1, "on_change": "never"}, "value of on_change must be one of"),
        ({"count": 1, "authorized_keys": ["no such file"]}, "no such file"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_before_anything_is_asked(
    given: Any, words: str, api: Any, capsys: Any, tmp_path: Path
) -> None:
    fake = api(raw(1))
    result = run(params(tmp_path, **given), capsys)
    assert result["failed"] and words in result["msg"]
    assert fake.read == fake.written == []


@pytest.mark.parametrize("given", [{"count": 0}, {"hosts": []}, {"groups": []}])
def test_a_fleet_of_nobody_is_a_declaration(given: Any, api: Any, capsys: Any, tmp_path: Path) -> None:
    api()
    result = run(params(tmp_path, **given), capsys)
    assert not result.get("failed") and result["plan"] == []


def test_a_group_that_says_nothing_of_its_hosts_is_refused(api: Any, capsys: Any, tmp_path: Path) -> None:
    api()
    result = run(params(tmp_path, groups=[{"name": "worker"}]), capsys)
    assert result.get("failed") and "count" in result["msg"]


def test_the_count_of_a_group_with_an_empty_name_is_not_lost(api: Any, capsys: Any, tmp_path: Path) -> None:
    api()
    result = run(params(tmp_path, groups=[{"name": "", "count": 1}]), capsys)
    assert result.get("failed") or done(result) == [("create", "workers-1")]


def test_the_end_of_waiting_for_a_change_is_that_of_the_documentation(
    api: Any, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[Any] = []

    def apply(*args: Any, **more: Any) -> list[Any]:
        seen.append(more)
        return []

    monkeypatch.setattr(linode_fleet.fleet_api, "apply", apply)
    api()
    run(params(tmp_path, count=0), capsys)
    run(params(tmp_path, count=0, timeouts={"create": 7}, wait=False, max_unavailable=0), capsys)
    timeouts = [(one["timeouts"].create, one["timeouts"].change, one["timeouts"].delete) for one in seen]
    assert timeouts == [(600, 1200, 300), (7, 1200, 300)]
    assert [(one["wait"], one["max_unavailable"]) for one in seen] == [(True, 1), (False, 1)]


# ---- what is refused ----


def test_a_blocked_plan_changes_nothing_and_names_every_reason(api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api(raw(1, region="de-fra-2"), raw(2, tags=[]), raw(3, status="offline"))
    result = run(params(tmp_path, count=3), capsys)
    assert result["failed"] and not result["changed"] and fake.written == []
    assert result["msg"].startswith("fleet workers: nothing was changed:\n")
    assert "workers-1 instance 101 has region de-fra-2" in result["msg"] and "workers-2 instance 102" in result["msg"]
    assert done(result)[2] == ("boot", "workers-3")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "g6-nanode-2"}, "type: 'g6-nanode-2' is not offered; near it: g6-nanode-1"),
        ({"region": "us-orb"}, "region: 'us-orb' is not offered"),
        ({"image": "linode/debian13"}, "image: 'linode/debian13' is not offered"),
        ({"placement_group": "mars"}, "placement_group: 'mars' does not exist"),
        ({"firewall": "fw"}, "firewall: 'fw' does not exist"),
    ],
)
def test_what_does_not_exist_is_named_before_anything_is_made(
    given: Any, words: str, api: Any, capsys: Any, tmp_path: Path
) -> None:
    fake = api(placement_groups=[], networking_firewalls=[])
    for check in (False, True):
        result = run(params(tmp_path, count=1, _ansible_check_mode=check, **given), capsys)
        if check and "firewall" in given:
            # The module before this one is going to make it.
            assert not result.get("failed") and done(result) == [("create", "workers-1")]
        else:
            assert result["failed"] and words in result["msg"]
    assert fake.written == [] and not (tmp_path / "state/hostkeys").exists()


def test_an_image_that_is_sold_no_more_is_named_before_a_rebuild_from_it(api: Any, capsys: Any, tmp_path: Path) -> None:
    """A rebuild for other keys takes the declared image too."""
    inputs = linode_fleet.fleet.inputs_tag(
        "workers", linode_fleet.fleet.Host("g6-nanode-1", "us-ord", "linode/debian10", authorized_keys=("ssh-rsa A",))
    )
    fake = api(raw(1, image=None, tags=[TAG, inputs]))
    result = run(params(tmp_path, count=1, image="linode/debian10", on_change="rebuild"), capsys)
    assert result.get("failed") and "image: 'linode/debian10' is not offered" in result["msg"]
    assert fake.written == []


@pytest.mark.parametrize(
    ("given", "deletes"),
    [
        ({}, False),
        ({"confirm": "worker"}, False),
        ({"confirm": "workers"}, True),
        ({"max_delete": 1}, False),
        ({"max_delete": 2}, True),
    ],
)
def test_a_fleet_is_deleted_where_its_name_or_its_number_is_confirmed(
    given: Any, deletes: bool, api: Any, capsys: Any, tmp_path: Path
) -> None:
    fake = api(raw(1), raw(2), raw(3, tags=[]))
    result = run(params(tmp_path, state="absent", **given), capsys)
    assert bool(result.get("failed")) is not deletes
    assert sorted(fake.instances) == ([103] if deletes else [101, 102, 103])
    if deletes:
        assert [one["status"] for one in result["instances"]] == ["absent", "absent"]
        assert (tmp_path / "state/known_hosts").read_text() == "workers-3 ssh-ed25519 AAAA\n"
    else:
        assert f"max_delete is {given.get('max_delete', 0)}: set it to 2" in result["msg"]


def test_a_confirmation_lets_no_count_fall(api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api(raw(1), raw(2))
    result = run(params(tmp_path, count=1, confirm="workers"), capsys)
    assert result["failed"] and fake.written == []


def test_a_confirmation_deletes_nothing_that_is_protected(api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api(raw(1), raw(2))
    result = run(params(tmp_path, state="absent", confirm="workers", protect=["workers-2"]), capsys)
    assert result["failed"] and "workers-2 is protected" in result["msg"] and fake.written == []


# ---- a part of it, and later ----


def test_what_takes_hosts_down_may_be_left_to_a_play_that_drains_them(api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api(raw(1, type="g6-standard-1"), raw(2), raw(3), raw(4))
    declared = params(tmp_path, count=3, max_delete=1, tags=["prod"], protect=["workers-3"], disruptive="defer")
    result = run(declared, capsys)
    updates = [f"PUT /linode/instances/{number}" for number in (101, 102, 103)]
    assert result["changed"] and sorted(fake.written) == updates
    assert result["rolling"] == [
        {"label": "workers-1", "actions": ["resize"]},
        {"label": "workers-4", "actions": ["delete"]},
    ]
    assert [one["label"] for one in result["instances"]] == ["workers-1", "workers-2", "workers-3"]
    # The plan and the cost are of the whole; the diff is of what was done.
    assert len(result["plan"]) == 5 and result["cost"]["monthly_after"] == 15
    assert "g6-standard-1" not in result["diff"]["after"] and "workers-2" in result["diff"]["after"]
    again = run(declared, capsys)
    assert not again["changed"] and again["rolling"] == result["rolling"] and len(fake.written) == 3
    last = run({**declared, "disruptive": "apply"}, capsys)
    assert last["rolling"] == [] and "POST /linode/instances/101/resize" in fake.written and 104 not in fake.instances


def test_what_is_adopted_is_the_fleets_own_before_a_play_drains_it(api: Any, capsys: Any, tmp_path: Path) -> None:
    """By its tag and its label the inventory knows it, and by that the play reaches it."""
    fake = api(raw(1, tags=[], type="g6-standard-1"))
    result = run(params(tmp_path, count=1, adopt={"workers-1": "workers-1"}, disruptive="defer"), capsys)
    assert result["rolling"] == [{"label": "workers-1", "actions": ["resize"]}]
    assert fake.instances[101]["tags"] == [TAG]


def test_only_the_named_hosts_are_touched(api: Any, capsys: Any, tmp_path: Path) -> None:
    # What is blocked elsewhere does not hold them up.
    fake = api(raw(1, type="g6-standard-1"), raw(2, type="g6-standard-1"), raw(3, region="de-fra-2"))
    result = run(params(tmp_path, count=4, only=["workers-2"]), capsys)
    assert not result.get("failed") and fake.written == ["POST /linode/instances/102/resize"]
    assert (
        done(result) == [("resize", "workers-2")] == [(one["actions"][0], one["label"]) for one in result["instances"]]
    )


@pytest.mark.parametrize("disruptive", ["apply", "defer"])
def test_a_check_writes_nothing_anywhere(disruptive: str, api: Any, capsys: Any, tmp_path: Path) -> None:
    fake = api(raw(1, image="linode/debian11"), raw(3))
    before = sorted(tmp_path.rglob("*"))
    declared = {"count": 2, "on_change": "rebuild", "remove": ["workers-3"], "max_delete": 1, "disruptive": disruptive}
    result = run(params(tmp_path, _ansible_check_mode=True, _ansible_diff=True, **declared), capsys)
    assert result["changed"] and fake.written == []
    assert done(result) == [("rebuild", "workers-1"), ("create", "workers-2"), ("delete", "workers-3")]
    assert sorted(tmp_path.rglob("*")) == before and "instances" not in result
    assert "workers-2" in result["diff"]["after"] and "workers-3" in result["diff"]["before"]


def test_a_failure_names_the_host_and_returns_what_became_of_all(
    api: Any, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    fake = api(raw(1), raw(2))

    def put(path: str, body: Any) -> Any:
        if path.endswith("/101"):
            raise linode_fleet.linode.Refused("400 tags: no", 400, [("tags", "no")])
        return fake.instances[102]

    monkeypatch.setattr(fake, "put", put)
    result = run(params(tmp_path, count=2, tags=["prod"]), capsys)
    assert result["failed"] and result["changed"]
    assert result["msg"] == "fleet workers: 1 of 2 instances failed; run again to mend it:\nworkers-1: 400 tags: no"
    assert [one["error"] for one in result["instances"]] == ["400 tags: no", ""]


def test_user_data_is_shown_nowhere(api: Any, capsys: Any, tmp_path: Path) -> None:
    api(raw(1))
    text = "#cloud-config\nwrite_files: [{path: /etc/pw, content: hunter2}]\n"
    groups = [{"name": "a", "count": 1, "user_data": text.replace("hunter2", "hunter3")}]
    for given in ({"count": 2}, {"groups": groups, "max_delete": 9}):
        result = run(params(tmp_path, user_data=text, _ansible_diff=True, **given), capsys)
        assert not result.get("failed") and "hunter" not in json.dumps(result)
