"""ansible-playbook and the module linode_firewall against the lab's API over pretended machines.

What is decided is in tests/unit/test_firewall.py; here it is what Ansible and the API have a part in. Each run of
Ansible costs two seconds, so one play has several tasks where it can.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import TOKEN, Served

ROOT = Path(__file__).resolve().parents[2]
TAG = "plimsoll-fleet-pond"
FIREWALLS = "/networking/firewalls"
OFFICE, ME = "198.51.100.0/24", "198.51.100.7"
SSH = {"label": "ssh", "ports": "22", "addresses": [OFFICE]}
BROKER = {"label": "fleet", "ports": "6379", "from_fleet": True}
# As somebody else makes them: with a description, and with nulls where the API lists them.
THEIRS = {
    "label": "theirs",
    "action": "ACCEPT",
    "protocol": "UDP",
    "ports": "60000-60010",
    "addresses": {"ipv4": ["192.0.2.0/24"]},
    "description": "mosh",
}
WAYS_OUT = "add it to the addresses of the rule for ssh, or allow it (allow_lockout), or correct run_from"


class Wall:
    """A controller pointed at a lab, with runs of plays that hold nothing but the module."""

    def __init__(self, home: Path, lab: Served) -> None:
        self.home, self.lab = home, lab

    def play(self, *tasks: dict[str, Any], options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Run the module with these parameters, one after the other; what each returned, failed or not.

        With check among them the task is but a check.
        """
        result = self.home / "result.json"
        result.unlink(missing_ok=True)
        # Where the run comes from is told, so that no test depends on the address of the machine it runs on.
        common = {"label": "pond", "fleet": "pond", "run_from": [ME]}
        steps: list[dict[str, Any]] = []
        for at, task in enumerate(tasks):
            given = {**common, **task}
            step = {"name": f"Task {at}", "register": f"r{at}", "ignore_errors": True}
            only = {"check_mode": True} if given.pop("check", False) else {}
            steps.append({**step, **only, "linode_firewall": given})
        results = "{{ [" + ", ".join(f"r{at}" for at in range(len(tasks))) + "] | to_json }}"
        copy = {"content": results, "dest": str(result), "mode": "0600"}
        steps.append({"name": "Keep", "ansible.builtin.copy": copy, "check_mode": False, "diff": False})
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": steps}
        play["vars"] = {"ansible_python_interpreter": "{{ ansible_playbook_python }}"}
        (self.home / "play.yml").write_text(yaml.safe_dump([play]))
        (self.home / "localhost.ini").write_text("localhost\n")
        environment = {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "LINODE_API_URL": self.lab.url,
            "LINODE_API_TOKEN": TOKEN,
        }
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        ran = subprocess.run(
            [program, "-i", "localhost.ini", "play.yml", *options],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.home,
        )
        self.output = ran.stdout + ran.stderr
        assert ran.returncode == 0, self.output
        assert TOKEN not in self.output
        found: list[dict[str, Any]] = json.loads(result.read_text())
        return found

    def make(self, *inbound: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A firewall, by another way than the module."""
        rules = {"inbound_policy": "DROP", "outbound_policy": "ACCEPT", "inbound": list(inbound), "outbound": []}
        body = {"label": "pond", "tags": [TAG], **more, "rules": {**rules, **more.get("rules", {})}}
        answer = self.lab.api.post(FIREWALLS, json=body)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def there(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.lab.api.get(FIREWALLS).json()["data"]
        return found

    def one(self) -> dict[str, Any]:
        (found,) = self.there()
        return found

    def inbound(self) -> dict[str, set[str]]:
        """Addresses by the label of the rule, in their order."""
        rules = self.one()["rules"]["inbound"]
        return {each["label"]: {at for some in each["addresses"].values() for at in some or ()} for each in rules}

    def requests(self) -> dict[str, int]:
        """How many there were since this was last asked. The token is in none, but for its header."""
        seen = [one for one in self.lab.wire() if one["path"].startswith("/v4")]
        self.lab.lab.delete("/lab/wire")
        assert TOKEN not in json.dumps(seen)
        counted: dict[str, int] = {}
        for one in seen:
            what = f"{one['method']} {re.sub('/[0-9]+', '/ID', one['path'].removeprefix('/v4'))}"
            counted[what] = counted.get(what, 0) + 1
        return counted


@pytest.fixture
def wall(tmp_path: Path, served: Served) -> Wall:
    return Wall(tmp_path, served)


def actions(results: list[dict[str, Any]]) -> list[str]:
    return [step["action"] for result in results for step in result["plan"]]


def addresses(instance: dict[str, Any]) -> set[str]:
    """As a rule has them."""
    return {f"{at}/32" for at in instance["ipv4"]} | {str(ipaddress.ip_network(instance["ipv6"]))}


def test_a_check_says_what_the_run_then_does_and_the_next_one_asks_once(wall: Wall) -> None:
    declared = {"inbound": [{**SSH, "addresses": ["198.51.100.9/24"]}], "tags": ["prod"]}
    (checked,) = wall.play(declared, options=("--check", "--diff"))
    assert wall.there() == [] and all(asked.startswith("GET ") for asked in wall.requests())
    assert checked["changed"] and checked["firewall"]["id"] is None
    assert f"+- 'ssh: ACCEPT TCP 22 from {OFFICE}'" in wall.output and "+label: pond" in wall.output
    (ran,) = wall.play(declared)
    assert [asked for asked in wall.requests() if not asked.startswith("GET ")] == [f"POST {FIREWALLS}"]
    (again,) = wall.play(declared)
    assert wall.requests() == {f"GET {FIREWALLS}": 1}
    assert (checked["plan"], checked["diff"]) == (ran["plan"], ran["diff"])
    assert {**checked["firewall"], "id": ran["firewall"]["id"]} == ran["firewall"] == again["firewall"]
    assert (actions([ran, again]), again["changed"]) == (["create", "keep"], False)
    made = wall.one()
    assert (made["id"], made["tags"]) == (ran["firewall"]["id"], [TAG, "prod"])
    assert (made["rules"]["inbound_policy"], made["rules"]["outbound_policy"]) == ("DROP", "ACCEPT")


def test_what_is_left_out_is_left_alone_and_an_empty_list_is_not(wall: Wall) -> None:
    out = {**THEIRS, "label": "out"}
    made = wall.make(THEIRS, tags=[TAG, "others"], rules={"outbound": [out], "outbound_policy": "DROP"})
    wall.requests()
    (tagged,) = wall.play({"tags": ["prod"], "mode": "replace"})
    assert actions([tagged]) == ["update"] and list(tagged["plan"][0]["after"]) == ["tags"]
    assert wall.requests() == {f"GET {FIREWALLS}": 1, f"PUT {FIREWALLS}/ID": 1}
    now = wall.one()
    assert now["rules"] == made["rules"] and set(now["tags"]) == {TAG, "others", "prod"}
    (emptied,) = wall.play({"outbound": [], "mode": "replace"})
    rules = wall.one()["rules"]
    assert emptied["changed"] and rules["outbound"] == [] and rules["outbound_policy"] == "DROP"
    assert rules["inbound"] == made["rules"]["inbound"]


def test_rules_of_others_stay_in_their_order_unless_they_are_to_be_replaced(wall: Wall) -> None:
    old = {**THEIRS, "label": "ssh", "protocol": "TCP", "ports": "22"}
    made = wall.make(THEIRS, old, {**THEIRS, "label": "last"})
    web = {"label": "web", "ports": "80,443", "addresses": ["0.0.0.0/0", "::/0"]}
    declared = {"inbound": [web, SSH]}
    appended, again = wall.play(declared, declared)
    assert actions([appended, again]) == ["update", "keep"]
    now = wall.one()["rules"]
    rules = now["inbound"]
    assert [one["label"] for one in rules] == ["theirs", "ssh", "last", "web"]
    assert [rules[0], rules[2]] == [made["rules"]["inbound"][0], made["rules"]["inbound"][2]]
    assert wall.inbound()["ssh"] == {OFFICE}
    whole = {**declared, "mode": "replace"}
    assert actions(wall.play(whole, whole)) == ["update", "keep"] and list(wall.inbound()) == ["web", "ssh"]
    assert wall.one()["rules"]["version"] == now["version"] + 1


def test_the_run_is_not_shut_out_unless_that_is_allowed(wall: Wall) -> None:
    elsewhere = {"inbound": [{**SSH, "addresses": ["203.0.113.0/24"]}]}
    back = {"inbound": [SSH], "run_from": ["203.0.113.7"]}
    new, made, checked, refused, allowed, other = wall.play(
        elsewhere,
        {"inbound": [SSH]},
        {**elsewhere, "check": True},
        elsewhere,
        {**elsewhere, "allow_lockout": True},
        back,
    )
    for result in (new, checked, refused):
        assert result["failed"] and not result["changed"]
        assert result["msg"].startswith(f"firewall pond: nothing was changed: it would shut ssh to {ME}/32")
        assert WAYS_OUT in result["msg"]
    assert made["changed"] and refused["firewall"] == made["firewall"]
    assert allowed["changed"] and "would shut ssh to 203.0.113.7/32" in other["msg"]
    assert wall.inbound() == {"ssh": {"203.0.113.0/24"}}


def test_a_firewall_of_others_and_a_bad_rule_are_refused(wall: Wall) -> None:
    made = wall.make(THEIRS, tags=["plimsoll-fleet-pond2"])
    wall.requests()
    bad = {"inbound": [{**SSH, "addresses": ["198.51.100.256"]}]}
    foreign, gone, slip = wall.play({"inbound": [SSH]}, {"state": "absent"}, bad)
    for result in (foreign, gone):
        assert result["failed"] and actions([result]) == ["blocked"]
        assert f"it is firewall {made['id']}, which has this label but not the tag {TAG}" in result["msg"]
        assert "set label to another" in result["msg"]
    assert slip["failed"] and "inbound: rule 'ssh': addresses: '198.51.100.256' is no IP address" in slip["msg"]
    # The slip is seen before anything is asked.
    assert wall.requests() == {f"GET {FIREWALLS}": 2} and wall.one() == made


def test_the_fleets_rule_follows_its_instances(wall: Wall) -> None:
    declared = {"inbound": [SSH, BROKER]}
    (empty,) = wall.play(declared)
    assert empty["plan"][0]["reason"] == "fleet left out until the fleet has an instance"
    assert list(wall.inbound()) == ["ssh"]
    one, two = (wall.lab.create(f"pond-{number}", tags=[TAG], private_ip=True) for number in (1, 2))
    wall.lab.create("lake-1", tags=["plimsoll-fleet-lake"])
    wall.requests()
    both, again = wall.play(declared, declared)
    assert actions([both, again]) == ["update", "keep"] and len(one["ipv4"]) == 2
    asked = {f"GET {FIREWALLS}": 2, "GET /linode/instances": 2, f"PUT {FIREWALLS}/ID/rules": 1}
    assert wall.requests() == asked
    assert wall.inbound() == {"ssh": {OFFICE}, "fleet": addresses(one) | addresses(two)}
    wall.lab.api.delete(f"/linode/instances/{one['id']}")
    assert wall.play(declared)[0]["changed"] and wall.inbound()["fleet"] == addresses(two)


def test_a_lost_answer_makes_one_firewall(wall: Wall) -> None:
    fault = {"kind": "lost_answer", "method": "POST", "path": FIREWALLS}
    assert wall.lab.lab.post("/lab/faults", json=fault).status_code == 200
    (made,) = wall.play({"inbound": [SSH]})
    assert made["changed"] and made["firewall"]["id"] == wall.one()["id"]
    assert wall.requests()[f"POST {FIREWALLS}"] == 1


def test_it_is_deleted_once_nobody_is_behind_it(wall: Wall) -> None:
    made = wall.make(THEIRS)
    mine = wall.lab.create("pond-1", tags=[TAG], firewall_id=made["id"])
    other = wall.lab.create("else-1", firewall_id=made["id"])
    absent = {"state": "absent"}
    refused, checked = wall.play(absent, {**absent, "check": True})
    for result in (refused, checked):
        said = "it is in front of linode pond-1, linode else-1: delete or move them first"
        assert result["failed"] and said in result["msg"]
    wall.lab.api.delete(f"/linode/instances/{other['id']}")
    # A check takes the fleet's own for gone, as what deletes them comes before it; a run does not.
    checked, refused = wall.play({**absent, "check": True}, absent)
    assert checked["changed"] and actions([checked]) == ["delete"] and refused["failed"] and wall.there()
    wall.lab.api.delete(f"/linode/instances/{mine['id']}")
    gone, again = wall.play(absent, absent)
    assert (actions([gone, again]), gone["changed"], again["changed"]) == (["delete", "keep"], True, False)
    assert wall.there() == [] and gone["firewall"] == again["firewall"] == {}
