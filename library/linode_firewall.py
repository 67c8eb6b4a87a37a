#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: linode_firewall
short_description: Keeps the Cloud Firewall of a fleet
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Creates, changes and deletes one Cloud Firewall, which carries the tag C(plimsoll-fleet-NAME) of its fleet. One that
    has the label and not the tag is never touched.
  - Rules may name the fleet's own instances, and follow them as they come and go. Which instances are behind the
    firewall is for M(linode_fleet) to say.
  - Refuses a change that would shut ssh to the address that the run comes from.
  - Runs on the controller.
requirements:
  - linode_api4
  - PyYAML
options:
  label:
    description: Label of the firewall; 3 to 32 letters, digits and single C(-), C(_) and C(.).
    type: str
    required: true
  fleet:
    description: Name of the fleet that it is of.
    type: str
    required: true
  state:
    description: V(absent) deletes it; refused while anything is behind it.
    type: str
    choices: [present, absent]
    default: present
  mode:
    description:
      - V(append) changes rules whose label is declared, adds the others at the end, and leaves every other rule as it
        is. V(replace) leaves no rule but the declared ones, in their order.
    type: str
    choices: [append, replace]
    default: append
  inbound:
    description: Rules for what comes in, the first that fits decides. Not given, they are left as they are.
    type: list
    elements: dict
    suboptions: &rule
      label:
        description: Name of the rule; 3 to 32 letters, digits and single C(-), C(_) and C(.).
        type: str
        required: true
      action:
        description: What it does.
        type: str
        choices: [ACCEPT, DROP]
        default: ACCEPT
      protocol:
        description: For which protocol.
        type: str
        choices: [TCP, UDP, ICMP, IPENCAP]
        default: TCP
      ports:
        description:
          - Ports and ranges, such as V(22, 8000-8010); all where none are given. Not for ICMP and IPENCAP. At most 15,
            a range being two.
        type: str
        default: ""
      addresses:
        description: IPv4 and IPv6 addresses and networks; V(0.0.0.0/0) and V(::/0) are everybody.
        type: list
        elements: str
        default: []
      from_fleet:
        description:
          - Whether every address of the fleet's instances is among them, public, private and IPv6. While there is no
            instance, a rule without other addresses is left out. More than 255 addresses make further rules, LABEL-2
            and so on.
        type: bool
        default: false
      description:
        description: A note.
        type: str
        default: ""
  outbound:
    description: Rules for what goes out. Not given, they are left as they are.
    type: list
    elements: dict
    suboptions: *rule
  inbound_policy:
    description: What happens to what comes in and fits no rule. Not given, it is left, and is V(DROP) if new.
    type: str
    choices: [ACCEPT, DROP]
  outbound_policy:
    description: What happens to what goes out and fits no rule. Not given, it is left, and is V(ACCEPT) if new.
    type: str
    choices: [ACCEPT, DROP]
  tags:
    description: Tags to add, beside the fleet's. Tags that others set stay.
    type: list
    elements: str
    default: []
  run_from:
    description:
      - Public addresses or networks that this run comes from. Not given, the controller's own address is taken, unless
        NAT hides it; then no network that ssh is open to may lose it while anything is behind the firewall, and a new
        one is not made where the fleet has instances.
    type: list
    elements: str
    default: []
  allow_lockout:
    description: Whether ssh may be shut to the address that the run comes from.
    type: bool
    default: false
  request_timeout:
    description: Seconds that the API has to answer one request.
    type: int
    default: 30
  wait_timeout:
    description: Seconds that the whole run may take.
    type: int
    default: 300
  api_token:
    description:
      - Personal access token with read/write access to Firewalls, and read access to Linodes. The environment variable
        E(LINODE_API_TOKEN) is used where this is not set.
    type: str
  api_url:
    description:
      - Root of the API, without the version. The environment variable E(LINODE_API_URL) is used where this is not set.
    type: str
    default: https://api.linode.com
  api_version:
    description:
      - Version of the API. The environment variable E(LINODE_API_VERSION) is used where this is not set.
    type: str
    default: v4
attributes:
  check_mode:
    support: full
    description: Reads the API, writes nothing, and fails where the run would be refused. For V(absent) it takes the
      fleet's own instances for gone, as M(linode_fleet) before it would have deleted them.
  diff_mode:
    support: full
    description: Shows policies, rules and tags before and after, a line for each rule.
"""

EXAMPLES = r"""
- name: Let in ssh from the office and the broker's port from the fleet
  linode_firewall:
    label: workers
    fleet: workers
    mode: replace
    inbound:
      - label: ssh
        ports: "22"
        addresses: [203.0.113.0/24]
      - label: fleet
        ports: "6379"
        from_fleet: true

- name: Add one rule, and leave all others alone
  linode_firewall:
    label: workers
    fleet: workers
    inbound:
      - label: metrics
        ports: "9100"
        addresses: [198.51.100.7]

- name: Delete it
  linode_firewall:
    label: workers
    fleet: workers
    state: absent
"""

RETURN = r"""
plan:
  description:
    - What there was to do, a list of one step of C(action) (V(create), V(update), V(keep), V(delete) or V(blocked)),
      C(label), C(id), C(before), C(after) and C(reason).
  type: list
  elements: dict
  returned: once the API has answered
firewall:
  description:
    - The firewall as it is then, C(id) (none in check mode where it does not exist yet), C(label), C(tags),
      C(inbound_policy), C(inbound) (a line for each rule), C(outbound_policy) and C(outbound). Empty if there is none.
  type: dict
  returned: once the API has answered
"""

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib

from ..module_utils.plimsoll import linode

try:
    from ..module_utils.plimsoll import firewall
    from ..module_utils.plimsoll.fleet_api import tagged

    MISSING = linode.MISSING
except ImportError as error:
    MISSING = missing_required_lib(error.name or "PyYAML")

RULE = {
    "label": {"type": "str", "required": True},
    "action": {"type": "str", "choices": ["ACCEPT", "DROP"], "default": "ACCEPT"},
    "protocol": {"type": "str", "choices": ["TCP", "UDP", "ICMP", "IPENCAP"], "default": "TCP"},
    "ports": {"type": "str", "default": ""},
    "addresses": {"type": "list", "elements": "str", "default": []},
    "from_fleet": {"type": "bool", "default": False},
    "description": {"type": "str", "default": ""},
}
SPEC = {
    "label": {"type": "str", "required": True},
    "fleet": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "mode": {"type": "str", "choices": ["append", "replace"], "default": "append"},
    "inbound": {"type": "list", "elements": "dict", "options": RULE},
    "outbound": {"type": "list", "elements": "dict", "options": RULE},
    "inbound_policy": {"type": "str", "choices": ["ACCEPT", "DROP"]},
    "outbound_policy": {"type": "str", "choices": ["ACCEPT", "DROP"]},
    "tags": {"type": "list", "elements": "str", "default": []},
    "run_from": {"type": "list", "elements": "str", "default": []},
    "allow_lockout": {"type": "bool", "default": False},
    "wait_timeout": {"type": "int", "default": 300},
    **linode.options(env_fallback),
}


def desired_firewall(params):
    given = {key: params[key] for key in ("label", "fleet", "inbound_policy", "outbound_policy", "mode")}
    if params["state"] == "present":
        for way in ("inbound", "outbound"):
            if params[way] is not None:
                given[way] = tuple(firewall.rule_of(rule, way) for rule in params[way])
    wanted = firewall.Desired(**given, tags=tuple(params["tags"]))
    wanted.check()
    return wanted


def run(module):
    params = module.params
    wanted = desired_firewall(params)
    # Hosts are reached by IPv4, which NAT may hide where IPv6 needs none.
    own = [at for at in firewall.own_addresses() if at.version == 4]
    run_from = firewall.networks(params["run_from"], "run_from") or own
    api = linode.connect(params, linode.Deadline(params["wait_timeout"]))
    found, fleet = firewall.find(api, wanted.label), set()
    if params["state"] == "absent":
        step = firewall.plan_absent(wanted, found, pending=module.check_mode and all_going(api, wanted.fleet, found))
    else:
        # Of a new one it matters whether there are hosts that it would be in front of.
        if wanted.names_fleet or found is None:
            fleet = firewall.fleet_networks(tagged(api, wanted.fleet))
        step = firewall.plan(wanted, found, fleet)
    report = {"changed": False, "plan": [step.as_data()], "firewall": shown(found), "diff": step.diff()}
    why = step.reason if step.action == "blocked" else ""
    if not why and not params["allow_lockout"]:
        why = firewall.lockout(step, found, run_from, bool(fleet))
    if why:
        module.fail_json(msg=f"firewall {wanted.label}: nothing was changed: it {why}", **report)
    after = step.wanted if module.check_mode else firewall.apply(step, found, api)
    module.exit_json(**{**report, "changed": step.changes, "firewall": shown(after)})


def all_going(api, fleet, found):
    """Whether the fleet's own instances alone are behind it: in a check, what deletes them before has not done it."""
    if found is None or not found.attached:
        return True
    own = {one["label"] for one in tagged(api, fleet)}
    return all(kind == "linode" and label in own for kind, label in found.attached)


def shown(one):
    return {} if one is None else {"id": one.id or None, **one.as_data()}


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    if MISSING:
        module.fail_json(msg=f"linode_firewall: {MISSING}")
    try:
        run(module)
    except (linode.LinodeError, OSError, ValueError) as error:
        module.fail_json(msg=f"firewall {module.params['label']}: {error}")


if __name__ == "__main__":
    main()
