"""ansible-playbook, module, role and inventory against the lab's API over pretended machines.

One fleet lives through the tests that share it, in their order; each run of Ansible costs two seconds.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import TOKEN, Served, serve
from .pretend import PretendDriver
from .server import LIMITS

ROOT = Path(__file__).resolve().parents[2]
PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  vars: {ansible_python_interpreter: "{{ ansible_playbook_python }}"}
  roles: [linode_fleet]
  post_tasks:
    - ansible.builtin.copy: {content: "{{ linode_fleet_result }}", dest: "{{ result_file }}", mode: "0600"}
      check_mode: false
      diff: false
"""


@dataclass
class Ran:
    """One run: its exit code, all that it printed, and what the module returned (empty where it failed)."""

    code: int
    output: str
    result: dict[str, Any]

    @property
    def said(self) -> str:
        """The output as one line, as Ansible wraps and repeats it."""
        return re.sub(r"\s+", " ", self.output)


class Controller:
    """A controller with its own state, inventory and variables, pointed at a lab."""

    def __init__(self, home: Path, lab: Served) -> None:
        self.home, self.lab = home, lab
        self.state = home / "state"
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "me")]
        subprocess.run(key, check=True)
        (home / "play.yml").write_text(PLAY)
        (home / "inventory").mkdir()
        fleet = {"plugin": "linode_fleet", "fleet": "pond", "known_hosts": str(self.state / "known_hosts")}
        groups = {"redis_broker": "linode_index == 1", "celery_workers": True}
        inventory = {**fleet, "request_timeout": 1, "groups": groups}
        (home / "inventory" / "linode_fleet.yml").write_text(yaml.safe_dump(inventory))
        self.variables = {
            "linode_fleet_name": "pond",
            "linode_fleet_count": 2,
            "linode_fleet_type": "g6-nanode-1",
            "linode_fleet_region": "us-ord",
            "linode_fleet_authorized_keys": [str(home / "me.pub")],
            "linode_fleet_state_dir": str(self.state),
            "linode_fleet_firewall": "",
            # These machines cannot be drained.
            "linode_fleet_disruptive": "apply",
            "linode_fleet_wait_timeout": 30,
            "result_file": str(home / "result.json"),
        }

    def command(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "LINODE_API_URL": self.lab.url,
            "LINODE_API_TOKEN": TOKEN,
            **environment,
        }
        program = str(Path(sys.executable).parent / command[0])
        return subprocess.run(
            [program, *command[1:]],
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.home,
        )

    def play(self, *options: str, inventory: str = "localhost.ini", token: str = TOKEN, **variables: Any) -> Ran:
        (self.home / "localhost.ini").write_text("localhost\n")
        result = self.home / "result.json"
        result.unlink(missing_ok=True)
        given = json.dumps({**self.variables, **{f"linode_fleet_{name}": value for name, value in variables.items()}})
        ran = self.command(
            "ansible-playbook", "-i", inventory, "play.yml", "-e", given, *options, LINODE_API_TOKEN=token
        )
        found = json.loads(result.read_text()) if result.exists() else {}
        return Ran(ran.returncode, ran.stdout + ran.stderr, found)

    def inventory(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.command("ansible-inventory", "-i", "inventory", "--list", "--export", **environment)

    def instances(self) -> dict[str, dict[str, Any]]:
        listed = self.lab.api.get("/linode/instances").json()["data"]
        return {one["label"]: one for one in listed}

    def pinned(self) -> dict[str, str]:
        known_hosts = self.state / "known_hosts"
        lines = known_hosts.read_text().splitlines() if known_hosts.exists() else []
        return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def lab_in(home: Path) -> Iterator[Controller]:
    generous = {name: (10_000, window) for name, (_, window) in LIMITS.items()}
    server, lab = serve(home / "api.json", PretendDriver(0.2), limits=generous)
    yield Controller(home, lab)
    server.should_exit = True


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    yield from lab_in(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    yield from lab_in(tmp_path_factory.mktemp("trouble"))


@pytest.fixture(scope="module")
def walled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    for controller in lab_in(tmp_path_factory.mktemp("walled")):
        firewall = {"firewall": "pond", "firewall_ssh_from": ["198.51.100.0/24"], "private_ip": True}
        firewall["firewall_run_from"] = ["198.51.100.7"]
        controller.variables.update({f"linode_fleet_{name}": value for name, value in firewall.items()})
        yield controller


def fault(controller: Controller, **rule: Any) -> None:
    controller.lab.lab.delete("/lab/faults")
    assert controller.lab.lab.post("/lab/faults", json={"path": "/linode/instances", **rule}).status_code == 200


def actions(ran: Ran) -> list[tuple[str, str]]:
    return [(step["action"], step["label"]) for step in ran.result["plan"]]


def test_check_mode_says_what_the_run_then_does(fleet: Controller) -> None:
    checked = fleet.play("--check", "--diff")
    assert checked.code == 0, checked.output
    assert fleet.instances() == {} and not fleet.state.exists()
    ran = fleet.play("--diff")
    assert ran.code == 0, ran.output
    assert checked.result["diff"] == ran.result["diff"]
    assert checked.result["plan"] == ran.result["plan"]
    assert checked.result["changed"] and ran.result["changed"]
    assert "+pond-1:" in checked.output and "+  region: us-ord" in checked.output
    assert {label: one["status"] for label, one in fleet.instances().items()} == {
        "pond-1": "running",
        "pond-2": "running",
    }


def test_every_machine_got_the_key_that_is_pinned_for_it(fleet: Controller) -> None:
    specs = {spec.label: spec for spec in fleet.lab.driver.specs.values()}
    for label, key in fleet.pinned().items():
        given = yaml.safe_load(specs[label].user_data)
        assert given["hostname"] == label
        assert given["ssh_keys"]["ed25519_public"].startswith(key)
        assert given["ssh_keys"]["ed25519_private"] == (fleet.state / "hostkeys" / label).read_text()
        assert specs[label].authorized_keys == ((fleet.home / "me.pub").read_text().strip(),)
    assert set(fleet.pinned()) == set(specs) == {"pond-1", "pond-2"}


def test_a_second_run_changes_nothing_and_asks_once(fleet: Controller) -> None:
    before = sum(fleet.lab.lab.get("/lab/requests").json().values())
    ran = fleet.play()
    assert ran.result["changed"] is False, ran.output
    assert sum(fleet.lab.lab.get("/lab/requests").json().values()) == before + 1


def test_the_inventory_reaches_each_host_by_its_pinned_key(fleet: Controller) -> None:
    # Strings from outside are marked, so that nothing in them is taken for a template.
    listed = json.loads(fleet.inventory().stdout, object_hook=lambda found: found.get("__ansible_unsafe", found))
    assert listed["linode_fleet"]["hosts"] == listed["celery_workers"]["hosts"] == ["pond-1", "pond-2"]
    assert listed["redis_broker"]["hosts"] == ["pond-1"]
    one = listed["_meta"]["hostvars"]["pond-1"]
    assert one["ansible_host"] == fleet.instances()["pond-1"]["ipv4"][0]
    assert f"UserKnownHostsFile={fleet.state}/known_hosts" in one["ansible_ssh_common_args"]


def test_tags_are_added_beside_those_of_others(fleet: Controller) -> None:
    one = fleet.instances()["pond-1"]
    fleet.lab.api.put(f"/linode/instances/{one['id']}", json={"tags": [*one["tags"], "theirs"]})
    ran = fleet.play(tags=["prod"])
    assert actions(ran) == [("update", "pond-1"), ("update", "pond-2")]
    tags = {tag for tag in fleet.instances()["pond-1"]["tags"] if not tag.startswith("plimsoll-inputs-")}
    assert tags == {"plimsoll-fleet-pond", "theirs", "prod"}


def test_a_host_that_was_shut_down_is_booted(fleet: Controller) -> None:
    number = fleet.instances()["pond-2"]["id"]
    fleet.lab.api.post(f"/linode/instances/{number}/shutdown")
    fleet.lab.settle(number, "offline")
    ran = fleet.play()
    assert actions(ran) == [("keep", "pond-1"), ("boot", "pond-2")]
    assert fleet.instances()["pond-2"]["status"] == "running"


def test_an_existing_host_without_a_pinned_key_is_named(fleet: Controller) -> None:
    ran = fleet.play(state_dir=str(fleet.home / "elsewhere"))
    assert ran.code != 0
    assert "pond-1 instance" in ran.said and "no SSH host key of it is pinned on this controller" in ran.said


def test_deleting_needs_leave_and_takes_the_keys_along(fleet: Controller) -> None:
    refused = fleet.play(count=1)
    assert refused.code != 0 and "pond-2 would be deleted, 1 in all, and max_delete is 0: set it to 1" in refused.said
    assert set(fleet.instances()) == {"pond-1", "pond-2"}
    assert fleet.play(count=1, max_delete=1).code == 0
    assert set(fleet.instances()) == set(fleet.pinned()) == {"pond-1"}
    gone = fleet.play(state="absent", max_delete=1)
    assert gone.code == 0, gone.output
    assert fleet.instances() == fleet.pinned() == {}
    assert list((fleet.state / "hostkeys").iterdir()) == []
    assert fleet.play(state="absent").result["changed"] is False


def test_what_is_not_offered_is_said_before_anything_is_made(trouble: Controller) -> None:
    ran = trouble.play("--check", region="us-or", type="g6-nano")
    assert ran.code != 0
    assert "region: 'us-or' is not offered; near it: us-ord" in ran.said
    assert "type: 'g6-nano' is not offered" in ran.said
    assert trouble.instances() == {} and not trouble.state.exists()


def test_a_wrong_token_is_said_once_and_not_shown(trouble: Controller) -> None:
    ran = trouble.play(token="wr0ng-t0ken")
    assert ran.code != 0 and "wr0ng" not in ran.output
    assert "does not accept the token (401 Invalid Token): set LINODE_API_TOKEN" in ran.said
    listed = trouble.inventory(LINODE_API_TOKEN="wr0ng-t0ken")
    assert listed.returncode != 0 and "wr0ng" not in listed.stderr
    first = listed.stderr.splitlines()[0]
    assert "does not accept the token (401 Invalid Token): set LINODE_API_TOKEN" in first


def test_an_api_that_hangs_is_named(trouble: Controller) -> None:
    fault(trouble, kind="hang", seconds=3, count=2)
    ran = trouble.play(request_timeout=1)
    assert ran.code != 0
    assert f"{trouble.lab.url} did not answer GET /linode/instances within 1 s" in ran.said
    fault(trouble, kind="hang", seconds=3, count=2)
    listed = trouble.inventory()
    assert listed.returncode != 0
    assert f"{trouble.lab.url} did not answer GET /linode/instances within 1 s" in listed.stderr.splitlines()[0]


def test_a_foreign_instance_with_a_label_of_the_fleet_stops_the_run(trouble: Controller) -> None:
    trouble.lab.lab.delete("/lab/faults")
    foreign = trouble.lab.create("pond-2")
    ran = trouble.play()
    assert ran.code != 0 and f"pond-2 instance {foreign['id']} has this label but not the tag" in ran.said
    assert set(trouble.instances()) == {"pond-2"}
    trouble.lab.api.delete(f"/linode/instances/{foreign['id']}")


def test_an_instance_that_fails_is_named_and_the_next_run_mends_it(trouble: Controller) -> None:
    fault(trouble, kind="status", method="POST", status=400)
    ran = trouble.play()
    assert ran.code != 0 and "1 of 2 instances failed; run again to mend it" in ran.said
    (made,) = trouble.instances()
    fault(trouble, kind="lost_answer", method="POST")
    mended = trouble.play()
    assert mended.code == 0, mended.output
    assert sorted(actions(mended)) == sorted([("keep", made), ("create", {"pond-1": "pond-2"}.get(made, "pond-1"))])
    assert set(trouble.instances()) == set(trouble.pinned()) == {"pond-1", "pond-2"}


def test_the_token_is_in_no_file_and_no_output_and_on_the_wire_in_its_header_alone(trouble: Controller) -> None:
    ran = trouble.play("-vvv", "--diff", user_data="#cloud-config\nfinal_message: s3cret\n", on_change="rebuild")
    assert ran.code == 0 and TOKEN not in ran.output
    assert "PRIVATE KEY" not in ran.output and "s3cret" not in ran.output
    assert TOKEN not in json.dumps(trouble.lab.wire())
    for path in trouble.home.rglob("*"):
        assert not path.is_file() or TOKEN not in path.read_text(errors="replace"), path


def test_the_modules_documentation_is_shown(fleet: Controller) -> None:
    for kind, name in (("module", "linode_fleet"), ("module", "linode_firewall"), ("inventory", "linode_fleet")):
        shown = fleet.command("ansible-doc", "-t", kind, name)
        assert shown.returncode == 0 and "LINODE_API_TOKEN" in shown.stdout, shown.stderr


# ---- behind the firewall ----


def rules(controller: Controller) -> dict[str, set[str]]:
    """Addresses by the label of the rule, of the one firewall."""
    (wall,) = controller.lab.api.get("/networking/firewalls").json()["data"]
    assert wall["rules"]["inbound_policy"] == "DROP"
    return {
        one["label"]: {at for each in one["addresses"].values() for at in each or ()}
        for one in wall["rules"]["inbound"]
    }


def addresses(controller: Controller) -> set[str]:
    found = set()
    for one in controller.instances().values():
        found |= {f"{at}/32" for at in one["ipv4"]} | {str(ipaddress.ip_network(one["ipv6"]))}
    return found


def test_hosts_are_born_behind_a_firewall_that_lets_in_ssh_and_the_fleet_alone(walled: Controller) -> None:
    unset = walled.play(firewall_ssh_from=[])
    assert (
        unset.code != 0 and "linode_fleet_firewall_ssh_from must be set: the networks that may reach ssh" in unset.said
    )
    checked = walled.play("--check", "--diff")
    assert checked.code == 0, checked.output
    assert "+- 'ssh: ACCEPT TCP 22 from 198.51.100.0/24'" in checked.output and "+  firewall: pond" in checked.output
    assert walled.instances() == {} and walled.lab.api.get("/networking/firewalls").json()["data"] == []
    ran = walled.play()
    assert ran.code == 0, ran.output
    created = [
        json.loads(one["body"])
        for one in walled.lab.wire()
        if one["path"].endswith("/linode/instances") and one["body"]
    ]
    assert len(created) == 2 and all(body["firewall_id"] for body in created)
    assert rules(walled) == {"ssh": {"198.51.100.0/24"}, "fleet": addresses(walled)}


def test_a_second_run_behind_a_firewall_changes_nothing(walled: Controller) -> None:
    before = sum(walled.lab.lab.get("/lab/requests").json().values())
    ran = walled.play()
    # What is changed is the file that takes the result.
    assert ran.code == 0 and "changed=1" in ran.said and not ran.result["changed"], ran.output
    # The firewall and the fleet's addresses for its rules; the fleet, and who is behind which firewall.
    assert sum(walled.lab.lab.get("/lab/requests").json().values()) == before + 4


def test_the_firewall_follows_the_hosts_and_shuts_nobody_out_unasked(walled: Controller) -> None:
    ran = walled.play(count=3)
    assert ran.code == 0, ran.output
    assert rules(walled)["fleet"] == addresses(walled) and len(walled.instances()) == 3
    refused = walled.play(firewall_ssh_from=["203.0.113.0/24"])
    assert refused.code != 0 and "would shut ssh to 198.51.100.7/32, which this run comes from" in refused.said
    assert rules(walled)["ssh"] == {"198.51.100.0/24"}
