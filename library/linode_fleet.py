#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: linode_fleet
short_description: Brings a fleet of Linodes to a declared number
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Creates, tags, boots and deletes the instances of one fleet, all of them side by side, and waits until they run.
    They are labelled C(NAME-1), C(NAME-2) and so on and carry the tag C(plimsoll-fleet-NAME). An instance that has not
    both is never touched.
  - Makes the SSH host key of each instance on the controller, pins it in C(known_hosts) under the label, and hands it
    over in the metadata, so that already the first login is checked.
  - Runs on the controller. What is missing after a failure is mended by the next run.
requirements:
  - linode_api4
  - PyYAML
  - ssh-keygen
options:
  name:
    description:
      - Name of the fleet; 2 to 32 lower-case letters, digits and single dashes.
    type: str
    required: true
  state:
    description:
      - V(present) for O(count) instances, V(absent) for none.
    type: str
    choices: [present, absent]
    default: present
  count:
    description:
      - Number of instances. With fewer than there are, those with the highest numbers are deleted; see O(max_delete).
      - Required for V(present), as are O(type), O(region), O(image) and O(authorized_keys).
    type: int
  type:
    description:
      - Linode type, such as V(g6-standard-1).
    type: str
  region:
    description:
      - Region, such as V(us-ord).
    type: str
  image:
    description:
      - Image with cloud-init, such as V(linode/debian12).
    type: str
  tags:
    description:
      - Tags to add, beside the one that marks the fleet. Tags that others set stay.
    type: list
    elements: str
    default: []
  authorized_keys:
    description:
      - Public SSH keys that may log in as root, or paths of files on the controller that hold them.
      - Used when an instance is created; a later change does not reach instances that exist.
    type: list
    elements: str
    default: []
  user_data:
    description:
      - A C(#cloud-config) of your own for every new instance. It must not set the host name or SSH host keys.
    type: str
    default: ""
  private_ip:
    description:
      - Whether new instances get a private IPv4 address too.
    type: bool
    default: false
  max_delete:
    description:
      - How many instances this run may delete. A plan that needs more is refused, and names them.
    type: int
    default: 0
  wait:
    description:
      - Whether to wait until every instance runs, or is gone.
    type: bool
    default: true
  wait_timeout:
    description:
      - Seconds that the whole run may take.
    type: int
    default: 900
  request_timeout:
    description:
      - Seconds that the API has to answer one request.
    type: int
    default: 30
  state_dir:
    description:
      - Directory on the controller with C(known_hosts) and C(hostkeys/).
    type: path
    required: true
  api_token:
    description:
      - Personal access token with read/write access to Linodes. The environment variable E(LINODE_API_TOKEN) is used
        where this is not set.
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
    description: Reads the API, writes neither there nor on the controller, and fails where the run would be refused.
  diff_mode:
    support: full
    description: Shows each instance that changes before and after.
"""

EXAMPLES = r"""
- name: Bring the fleet to its declared size
  linode_fleet:
    name: workers
    count: 4
    type: g6-standard-1
    region: us-ord
    image: linode/debian12
    authorized_keys: [~/.ssh/id_ed25519.pub]
    state_dir: "{{ playbook_dir }}/../.plimsoll"

- name: Delete it
  linode_fleet:
    name: workers
    state: absent
    max_delete: 4
    state_dir: "{{ playbook_dir }}/../.plimsoll"
"""

RETURN = r"""
plan:
  description:
    - What there was to do, a list of C(action) (V(create), V(update), V(boot), V(keep), V(delete) or V(blocked)),
      C(label), C(id), C(before), C(after) and C(reason).
  type: list
  elements: dict
  returned: once the API has answered
instances:
  description:
    - What became of each instance, a list of C(label), C(actions), C(id), C(status), C(ipv4), C(private_ipv4), C(tags)
      and C(error), which is empty where all went well.
  type: list
  elements: dict
  returned: when the plan was carried out
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib

from ..module_utils.plimsoll import linode

try:
    from ..module_utils.plimsoll import fleet

    MISSING = linode.MISSING
except ImportError as error:
    MISSING = missing_required_lib(error.name or "PyYAML")

from ..module_utils.plimsoll.hostkeys import HostKeys

SPEC = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "count": {"type": "int"},
    "type": {"type": "str"},
    "region": {"type": "str"},
    "image": {"type": "str"},
    "tags": {"type": "list", "elements": "str", "default": []},
    "authorized_keys": {"type": "list", "elements": "str", "default": []},
    # Who sets hosts up by cloud-config puts secrets there.
    "user_data": {"type": "str", "default": "", "no_log": True},
    "private_ip": {"type": "bool", "default": False},
    "max_delete": {"type": "int", "default": 0},
    "wait": {"type": "bool", "default": True},
    "wait_timeout": {"type": "int", "default": 900},
    "request_timeout": {"type": "int", "default": 30},
    "state_dir": {"type": "path", "required": True},
    "api_token": {"type": "str", "no_log": True, "fallback": (env_fallback, ["LINODE_API_TOKEN"])},
    "api_url": {"type": "str", "default": linode.DEFAULT_URL, "fallback": (env_fallback, ["LINODE_API_URL"])},
    "api_version": {
        "type": "str",
        "default": linode.DEFAULT_VERSION,
        "fallback": (env_fallback, ["LINODE_API_VERSION"]),
    },
}
REQUIRED_IF = [("state", "present", ("count", "type", "region", "image", "authorized_keys"))]


def desired_fleet(params):
    if params["state"] == "absent":
        wanted = fleet.Desired(params["name"])
    else:
        wanted = fleet.Desired(
            **{key: params[key] for key in ("name", "count", "type", "region", "image", "private_ip", "user_data")},
            tags=tuple(params["tags"]),
            authorized_keys=fleet.read_keys(params["authorized_keys"]),
        )
    wanted.check()
    return wanted


def run(module):
    params = module.params
    wanted = desired_fleet(params)
    deadline = linode.Deadline(params["wait_timeout"])
    api = linode.Api(
        params["api_token"] or "",
        # An empty variable of the environment is one that is not set.
        params["api_url"] or linode.DEFAULT_URL,
        params["api_version"] or linode.DEFAULT_VERSION,
        deadline,
        params["request_timeout"],
    )
    keys = HostKeys(Path(params["state_dir"]))
    listed = fleet.listing(api, wanted.name)
    plan = fleet.plan(wanted, listed, keys.pinned(), params["max_delete"])
    report = {"changed": plan.changes, "plan": fleet.as_data(plan.steps), "diff": plan.diff()}

    if blocked := plan.of("blocked"):
        why = "\n".join(f"{step.label} {step.reason}" for step in blocked)
        module.fail_json(msg=f"fleet {wanted.name}: nothing was changed:\n{why}", **{**report, "changed": False})
    create = [step.label for step in plan.of("create")]
    if create:
        offers = {"type": wanted.type, "region": wanted.region, "image": wanted.image}
        if problems := linode.unknown(api, offers):
            why = "\n".join(problems)
            module.fail_json(msg=f"fleet {wanted.name}: nothing was changed:\n{why}", **{**report, "changed": False})
    if module.check_mode:
        module.exit_json(**report)

    keys.prepare(create, wanted.labels)
    results = fleet.apply(plan, wanted, listed, api, keys, deadline, params["wait"])
    report["instances"] = [result.as_data() for result in results]
    if failed := [result for result in results if result.error]:
        why = "\n".join(f"{result.label}: {result.error}" for result in failed)
        module.fail_json(
            msg=f"fleet {wanted.name}: {len(failed)} of {len(results)} instances failed; run again to mend it:\n{why}",
            **report,
        )
    module.exit_json(**report)


def main():
    module = AnsibleModule(SPEC, required_if=REQUIRED_IF, supports_check_mode=True)
    if MISSING:
        module.fail_json(msg=f"linode_fleet: {MISSING}")
    try:
        run(module)
    except (linode.LinodeError, OSError, ValueError) as error:
        module.fail_json(msg=f"fleet {module.params['name']}: {error}")


if __name__ == "__main__":
    main()
