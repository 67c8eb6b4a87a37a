"""The lab's API answers as Linode's does: read by its description, by linode_api4 and by linode-cli."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from linode_api4 import ApiError, Instance

from .conftest import CREATE, TOKEN, Served, serve
from .pretend import PretendDriver

DESCRIPTION = Path(__file__).resolve().parents[3] / "shared" / "linode-openapi.json"


def relaxed(schema: Any) -> Any:
    """The description without what rejects even Linode's own replies: its nullability and closed objects are wrong."""
    if isinstance(schema, list):
        return [relaxed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: relaxed(value)
        for key, value in schema.items()
        if key not in ("additionalProperties", "nullable", "required")
    }
    if isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if isinstance(out.get("enum"), list) and "array" in (out.get("type") or ()):
        del out["enum"]  # said of the list where its items are meant
    if isinstance(out.get("enum"), list):
        out["enum"] = [*out["enum"], None]
    return out


@pytest.fixture(scope="module")
def description() -> Any:
    if not DESCRIPTION.exists():
        pytest.skip("Linode's OpenAPI description is not beside the checkout (shared/linode-openapi.json)")
    return json.loads(DESCRIPTION.read_text())["paths"]


def test_replies_match_the_api_description(served: Served, description: Any) -> None:
    instance = served.create("demo-1", private_ip=True, tags=["demo"])
    served.settle(instance["id"])
    rules = {"inbound": [], "outbound": [], "inbound_policy": "DROP", "outbound_policy": "ACCEPT"}
    body = {"label": "walls", "rules": rules, "devices": {"linodes": [instance["id"]]}}
    firewall = served.api.post("/networking/firewalls", json=body).json()
    device = served.api.get(f"/networking/firewalls/{firewall['id']}/devices").json()["data"][0]
    key = served.api.post("/profile/sshkeys", json={"label": "me", "ssh_key": "ssh-ed25519 AAAA"}).json()
    event = served.api.get("/account/events").json()["data"][0]
    concrete = {
        "linodeId": instance["id"],
        "firewallId": firewall["id"],
        "deviceId": device["id"],
        "sshKeyId": key["id"],
        "eventId": event["id"],
        "typeId": "g6-nanode-1",
        "regionId": "us-mia",
        "imageId": "linode/debian12",
        "tagLabel": "demo",
    }
    paths = [
        "/linode/instances",
        "/linode/instances/{linodeId}",
        "/linode/instances/{linodeId}/ips",
        "/linode/types",
        "/linode/types/{typeId}",
        "/regions",
        "/regions/{regionId}",
        "/images",
        "/images/{imageId}",
        "/account/events",
        "/account/events/{eventId}",
        "/account",
        "/account/settings",
        "/profile",
        "/profile/sshkeys",
        "/profile/sshkeys/{sshKeyId}",
        "/tags",
        "/networking/firewalls",
        "/networking/firewalls/{firewallId}",
        "/networking/firewalls/{firewallId}/rules",
        "/networking/firewalls/{firewallId}/devices",
        "/networking/firewalls/{firewallId}/devices/{deviceId}",
    ]
    for path in paths:
        schema = description[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        answer = served.api.get(path.format(**concrete))
        assert answer.status_code == 200, (path, answer.text)
        described = set(schema.get("properties", {})) - {"accelerated_devices"}
        missing = described - set(answer.json())
        assert not missing, f"GET {path} lacks {missing}"
        jsonschema.validate(answer.json(), relaxed(schema))


def test_an_instance_lives_as_on_linode(served: Served) -> None:
    instance = served.create("demo-1", private_ip=True)
    assert instance["status"] in ("provisioning", "booting", "running")
    running = served.settle(instance["id"])
    assert running["ipv4"] == ["127.18.0.1", "192.168.128.1"]
    assert served.api.post(f"/linode/instances/{running['id']}/shutdown").json() == {}
    served.settle(running["id"], "offline")
    assert served.driver.state(running["id"]) == "stopped"
    served.api.post(f"/linode/instances/{running['id']}/boot")
    served.settle(running["id"])
    assert served.api.delete(f"/linode/instances/{running['id']}").json() == {}
    for _ in range(200):
        if served.api.get(f"/linode/instances/{running['id']}").status_code == 404:
            break
    assert served.driver.state(running["id"]) == "absent"
    finished = served.api.get("/account/events", headers={"X-Filter": json.dumps({"entity.id": running["id"]})}).json()
    actions = [(event["action"], event["status"]) for event in finished["data"]]
    assert actions[-1] == ("linode_create", "finished") and ("linode_delete", "finished") in actions


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"type": "g99-huge"}, "type"),
        ({"region": "xx-nowhere"}, "region"),
        ({"image": "linode/none"}, "image"),
        ({"label": "x"}, "label"),
        ({"label": "two--dashes"}, "label"),
        ({"authorized_keys": []}, "root_pass"),
        ({"metadata": {"user_data": "§"}}, "metadata.user_data"),
        ({"metadata": {"user_data": base64.b64encode(b"x" * 65536).decode()}}, "metadata.user_data"),
        ({"tags": ["ab"]}, "tags"),
    ],
)
def test_bad_input_is_refused_with_its_field(served: Served, change: dict[str, Any], field: str) -> None:
    answer = served.api.post("/linode/instances", json={**CREATE, "label": "demo-1", **change})
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["field"] == field
    assert served.api.get("/linode/instances").json()["results"] == 0


def test_paging_and_filters(served: Served) -> None:
    for number in range(1, 28):
        served.create(f"demo-{number}", tags=["odd" if number % 2 else "even"])
    first = served.api.get("/linode/instances", params={"page_size": 25}).json()
    assert (len(first["data"]), first["pages"], first["results"]) == (25, 2, 27)
    assert served.api.get("/linode/instances", params={"page": 3, "page_size": 25}).status_code == 400
    assert served.api.get("/linode/instances", params={"page_size": 501}).status_code == 400
    wanted = {"+and": [{"tags": "odd"}, {"label": {"+contains": "demo-1"}}], "+order_by": "label", "+order": "desc"}
    found = served.api.get("/linode/instances", headers={"X-Filter": json.dumps(wanted)}).json()["data"]
    assert [one["label"] for one in found] == ["demo-19", "demo-17", "demo-15", "demo-13", "demo-11", "demo-1"]
    refused = served.api.get("/linode/instances", headers={"X-Filter": '{"status": "running"}'})
    assert refused.status_code == 400 and "status" in refused.text


def test_budgets_are_enforced_and_announced(limited: Served) -> None:
    answers = [limited.api.post("/linode/instances", json={**CREATE, "label": f"demo-{n}"}) for n in range(21)]
    assert [answer.status_code for answer in answers] == [200] * 20 + [429]
    assert answers[0].headers["X-RateLimit-Limit"] == "20"
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 16


def test_faults(served: Served) -> None:
    served.lab.post("/lab/faults", json={"kind": "status", "status": 503, "retry_after": 2, "path": "/regions"})
    assert served.api.get("/linode/types").status_code == 200
    answer = served.api.get("/regions")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert served.api.get("/regions").status_code == 200
    served.lab.post("/lab/faults", json={"kind": "lost_answer", "method": "POST", "path": "/linode/instances"})
    assert served.api.post("/linode/instances", json={**CREATE, "label": "demo-1"}).status_code == 502
    assert served.api.get("/linode/instances").json()["data"][0]["label"] == "demo-1"
    served.lab.post("/lab/faults", json={"kind": "boot_fail"})
    failed = served.create("demo-2")
    served.settle(failed["id"], "offline")
    only = {"X-Filter": json.dumps({"entity.id": failed["id"]})}
    event = served.api.get("/account/events", headers=only).json()["data"][0]
    assert event["status"] == "failed" and "refused to boot" in event["message"]
    assert served.lab.post("/lab/faults", json={"nonsense": 1}).status_code == 400
    refused = served.lab.post("/lab/faults", json={"kind": "hnag"})
    assert refused.status_code == 400 and "hang" in refused.text


def test_a_server_started_again_knows_its_machines(tmp_path: Path) -> None:
    driver = PretendDriver()
    first, lab = serve(tmp_path / "api.json", driver)
    instance = lab.create("demo-1")
    lab.settle(instance["id"])
    first.should_exit = True
    driver.shutdown(instance["id"])
    second, again = serve(tmp_path / "api.json", driver)
    assert again.api.get(f"/linode/instances/{instance['id']}").json()["status"] == "offline"
    second.should_exit = True


def test_secrets_are_neither_answered_nor_kept(served: Served, tmp_path: Path) -> None:
    user_data = base64.b64encode(b"#cloud-config\nssh_keys: {ed25519_private: PRIVATE}\n").decode()
    instance = served.create("demo-1", root_pass="correct horse battery", metadata={"user_data": user_data})
    assert instance["has_user_data"] is True
    served.settle(instance["id"])
    seen = served.api.get("/linode/instances").text + (tmp_path / "api.json").read_text()
    assert "correct horse" not in seen and user_data not in seen and "PRIVATE" not in seen


def test_a_wrong_token_is_401(served: Served) -> None:
    assert served.api.get("/profile", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_linode_api4_creates_waits_lists_and_deletes(served: Served) -> None:
    client = served.linode()
    instance = client.linode.instance_create(
        "g6-nanode-1",
        "us-mia",
        image="linode/debian12",
        authorized_keys=["ssh-ed25519 AAAA"],
        label="demo-1",
        tags=["demo"],
    )
    poller = client.polling.event_poller_create("linode", "linode_reboot", entity_id=instance.id)
    served.settle(instance.id)
    instance.reboot()
    poller.wait_for_next_event_finished(timeout=10, interval=1)
    assert [found.label for found in client.linode.instances(Instance.tags == "demo")] == ["demo-1"]
    assert client.linode.instances(Instance.tags == "other").lists[0] == []
    instance.delete()
    with pytest.raises(ApiError):
        client.linode.instance_create(
            "g99-huge", "us-mia", image="linode/debian12", authorized_keys=["ssh-ed25519 AAAA"]
        )


def test_linode_cli_creates_and_reads_back(served: Served, tmp_path: Path) -> None:
    address = served.url.removeprefix("http://")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LINODE_CLI_API_HOST": address,
        "LINODE_CLI_API_SCHEME": "http",
        "LINODE_CLI_TOKEN": TOKEN,
    }

    def cli(*words: str) -> Any:
        command = [str(Path(sys.executable).parent / "linode-cli"), *words, "--json", "--suppress-warnings"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr + ran.stdout
        return json.loads(ran.stdout)

    create = [
        "--no-defaults",
        "--label",
        "cli-1",
        "--type",
        "g6-nanode-1",
        "--region",
        "us-mia",
        "--image",
        "linode/debian12",
    ]
    made = cli("linodes", "create", *create, "--authorized_keys", "ssh-ed25519 AAAA", "--tags", "demo")
    assert [one["label"] for one in cli("linodes", "list", "--tags", "demo")] == ["cli-1"]
    assert cli("linodes", "view", str(made[0]["id"]))[0]["region"] == "us-mia"
