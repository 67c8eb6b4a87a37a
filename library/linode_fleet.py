#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: linode_fleet
short_description: Brings a fleet of Linodes to its declared state
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Creates, changes, resizes, rebuilds, replaces, boots, shuts down and deletes the instances of one fleet, and waits
    until they are as declared. What it does is planned from one listing, and shown by check and diff mode.
  - An instance of the fleet carries the tag C(plimsoll-fleet-NAME) and is labelled C(NAME-1), C(NAME-2) and so on, or
    C(NAME-HOST), or, in a group, C(NAME-GROUP-1) or C(NAME-GROUP-HOST). An instance that has not both is never touched,
    unless O(adopt) names it.
  - The API does not tell the user_data, the keys and the swap size that an instance was made with. Digests of them are
    kept in a second tag, C(plimsoll-inputs-...), so that a change of them is seen.
  - An instance with the tag C(plimsoll-protect), which anybody may put on it, or with a lock, or in O(protect) is never
    deleted, rebuilt or replaced.
  - Makes the SSH host key of each instance on the controller, pins it in C(known_hosts) under the label, and hands it
    over in the metadata, so that already the first login is checked.
  - Keeps within the API's documented rate limits. Runs on the controller. What is missing after a failure, at whatever
    point it struck, is mended by the next run.
requirements:
  - linode_api4
  - PyYAML
  - ssh-keygen
options:
  name:
    description:
      - Name of the fleet; 3 to 32 lower-case letters, digits and single dashes.
    type: str
    required: true
  state:
    description:
      - V(absent) deletes every instance of the fleet; see O(confirm) and O(max_delete).
    type: str
    choices: [present, absent]
    default: present
  count:
    description:
      - Number of instances. A count is met by those that are there, the lowest numbers first. With fewer declared than
        there are, those in O(remove) and then those with the highest numbers are deleted; see O(max_delete).
      - For V(present) one of O(count), O(hosts) and O(groups) is required.
    type: int
  hosts:
    description:
      - Names of the instances, in place of a number; lower-case letters and digits.
    type: list
    elements: str
  groups:
    description:
      - Groups of hosts in the fleet, such as workers, broker and control. Each has a name, which is part of the labels,
        and a O(groups[].count) or O(groups[].hosts). What else it does not give is as for the whole fleet.
    type: list
    elements: dict
    suboptions:
      name:
        description: Name of the group; lower-case letters and digits.
        type: str
        required: true
      count:
        description: Number of instances.
        type: int
      hosts:
        description: Names of the instances, in place of a number.
        type: list
        elements: str
      type:
        description: As O(type).
        type: str
      region:
        description: As O(region).
        type: str
      image:
        description: As O(image).
        type: str
      tags:
        description: Tags beside those in O(tags).
        type: list
        elements: str
      authorized_keys:
        description: As O(authorized_keys).
        type: list
        elements: str
      user_data:
        description: As O(user_data).
        type: str
      private_ip:
        description: As O(private_ip).
        type: bool
      vpc:
        description: As O(vpc).
        type: str
      placement_group:
        description: As O(placement_group).
        type: str
      firewall:
        description: As O(firewall).
        type: str
      disk_encryption:
        description: As O(disk_encryption).
        type: str
        choices: ["", enabled, disabled]
      backups:
        description: As O(backups).
        type: bool
      swap_size:
        description: As O(swap_size).
        type: int
      power:
        description: As O(power).
        type: str
        choices: [running, offline, any]
      maintenance_policy:
        description: As O(maintenance_policy).
        type: str
        choices: ["", linode/migrate, linode/power_off_on]
      on_change:
        description: As O(on_change).
        type: str
        choices: [fail, rebuild, replace, accept]
  type:
    description:
      - Linode type, such as V(g6-standard-1). An instance of another type is resized, for which it is taken down.
      - O(type), O(region), O(image) and O(authorized_keys) are required for V(present), here or in each group.
    type: str
  region:
    description:
      - Region, such as V(us-ord). Another region takes another instance, see O(on_change).
    type: str
  image:
    description:
      - Image with cloud-init, such as V(linode/debian12). Another image takes a rebuild, see O(on_change).
    type: str
  tags:
    description:
      - Tags, beside the two that plimsoll sets.
    type: list
    elements: str
    default: []
  purge_tags:
    description:
      - Whether tags are removed that are not declared. Otherwise tags that others set stay. C(plimsoll-protect) always
        stays.
    type: bool
    default: false
  authorized_keys:
    description:
      - Public SSH keys that may log in as root, or paths of files on the controller that hold them. Others take a
        rebuild, see O(on_change).
    type: list
    elements: str
    default: []
  user_data:
    description:
      - A C(#cloud-config) of your own. It must not set the host name or SSH host keys. Another takes a rebuild, see
        O(on_change).
    type: str
    default: ""
  private_ip:
    description:
      - Whether each instance has a private IPv4 address too. To get one takes another instance, see O(on_change).
    type: bool
    default: false
  vpc:
    description:
      - VPC and subnet in which each instance has an interface beside its public one, V(VPC/SUBNET) by their labels.
        They must exist. Another takes another instance, see O(on_change).
    type: str
    default: ""
  placement_group:
    description:
      - Label of a placement group, which must exist. Instances are assigned to it, and unassigned from another.
    type: str
    default: ""
  firewall:
    description:
      - Label of the Cloud Firewall that each instance is behind from its creation on. It must exist before a run that
        is no check; M(linode_firewall) makes one. Instances behind another one are moved.
    type: str
    default: ""
  disk_encryption:
    description:
      - Disk encryption; empty for Linode's default. Another takes a rebuild, see O(on_change).
    type: str
    choices: ["", enabled, disabled]
    default: ""
  backups:
    description:
      - Whether Linode's backup service is enabled. V(false) leaves it as it is, as cancelling deletes the backups.
    type: bool
    default: false
  swap_size:
    description:
      - Size of the swap disk of a new instance, in MB; Linode's default where this is not set. Another takes another
        instance, see O(on_change).
    type: int
  power:
    description:
      - V(running) boots what is off, V(offline) shuts down what runs, and V(any) leaves it to others.
    type: str
    choices: [running, offline, any]
    default: running
  maintenance_policy:
    description:
      - What Linode does with the instances in maintenance of their hosts; empty for the account's default.
    type: str
    choices: ["", linode/migrate, linode/power_off_on]
    default: ""
  on_change:
    description:
      - What to do about a difference that no request changes in place.
      - V(fail) does nothing at all and names it. V(rebuild) keeps the instance and its addresses, and makes its disks
        anew. V(replace) deletes the instance and creates it again. V(accept) leaves the instance as it is, and records
        the declared keys and user_data as its own.
    type: str
    choices: [fail, rebuild, replace, accept]
    default: fail
  max_unavailable:
    description:
      - How many instances may be down at a time for a resize, a rebuild, a replacement or a shutdown. The run ends with
        the first ones that fail.
    type: int
    default: 1
  adopt:
    description:
      - Instances that exist and are to become the fleet's own, each as label in the fleet and label that it has. They
        get the label and the tag.
    type: dict
    default: {}
  remove:
    description:
      - Labels that are the first to go where O(count) falls, and are not given again.
    type: list
    elements: str
    default: []
  protect:
    description:
      - Labels of instances that are not to be deleted, rebuilt or replaced, such as the broker's.
    type: list
    elements: str
    default: []
  max_delete:
    description:
      - How many instances this run may delete. A plan that needs more is refused, and names them. A replacement does
        not count, O(on_change) asks for it.
    type: int
    default: 0
  confirm:
    description:
      - The name of the fleet once more; then V(absent) may delete all of it, whatever O(max_delete) is.
    type: str
    default: ""
  disruptive:
    description:
      - V(defer) leaves out what takes a host down, and returns it as RV(rolling), for a play that drains hosts first.
    type: str
    choices: [apply, defer]
    default: apply
  only:
    description:
      - Labels; if there are any, nothing is done to other instances.
    type: list
    elements: str
    default: []
  wait:
    description:
      - Whether to wait until every instance is as declared, or is gone.
    type: bool
    default: true
  wait_timeout:
    description:
      - Seconds that the whole run may take.
    type: int
    default: 1800
  timeouts:
    description:
      - Seconds that one instance may take.
    type: dict
    suboptions:
      create:
        description: From its creation or boot until it runs.
        type: int
        default: 600
      change:
        description: For a resize, a rebuild or a shutdown.
        type: int
        default: 1200
      delete:
        description: Until it is gone.
        type: int
        default: 300
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
      - Personal access token with read/write access to Linodes, and to Firewalls and VPCs where O(firewall) and O(vpc)
        are used. The environment variable E(LINODE_API_TOKEN) is used where this is not set.
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
    description: Shows each instance that changes before and after, and the cost of the fleet a month.
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

- name: Workers and a broker, and another image two hosts at a time
  linode_fleet:
    name: box
    groups:
      - name: worker
        count: 8
        type: g6-standard-2
        on_change: rebuild
      - name: broker
        hosts: [main]
        type: g6-dedicated-2
        backups: true
    region: us-ord
    image: linode/debian13
    authorized_keys: [~/.ssh/id_ed25519.pub]
    firewall: box
    private_ip: true
    max_unavailable: 2
    state_dir: "{{ playbook_dir }}/../.plimsoll"

- name: Take over an instance that was made by hand
  linode_fleet:
    name: workers
    count: 4
    adopt:
      workers-4: celery-old
    type: g6-standard-1
    region: us-ord
    image: linode/debian12
    authorized_keys: [~/.ssh/id_ed25519.pub]
    state_dir: "{{ playbook_dir }}/../.plimsoll"

- name: Delete it
  linode_fleet:
    name: workers
    state: absent
    confirm: workers
    state_dir: "{{ playbook_dir }}/../.plimsoll"
"""

RETURN = r"""
plan:
  description:
    - What there was to do, a list of C(action) (V(create), V(adopt), V(update), V(boot), V(shutdown), V(resize),
      V(rebuild), V(replace), V(delete), V(keep) or V(blocked)), C(label), C(id), C(before), C(after) and C(reason).
  type: list
  elements: dict
  returned: once the API has answered
cost:
  description:
    - What the instances of the fleet cost a month before and after the plan, by the price list, without transfer;
      C(currency), C(monthly_before) and C(monthly_after).
  type: dict
  returned: when the plan changes what is paid for
rolling:
  description:
    - The instances that O(disruptive=defer) left as they are, a list of C(label) and C(actions).
  type: list
  elements: dict
  returned: once the API has answered
instances:
  description:
    - What became of each instance, a list of C(label), C(actions), C(id), C(status), C(ipv4), C(private_ipv4), C(ipv6),
      C(tags) and C(error), which is empty where all went well.
  type: list
  elements: dict
  returned: when the plan was carried out
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib

from ..module_utils.plimsoll import linode

try:
    from ..module_utils.plimsoll import fleet, fleet_api
    from ..module_utils.plimsoll.metadata import read_keys

    MISSING = linode.MISSING
except ImportError as error:
    MISSING = missing_required_lib(error.name or "PyYAML")

from ..module_utils.plimsoll.hostkeys import HostKeys

# What a host is to be, for the whole fleet; a group may give each of them too.
HOST = {
    "type": {"type": "str"},
    "region": {"type": "str"},
    "image": {"type": "str"},
    "tags": {"type": "list", "elements": "str", "default": []},
    "authorized_keys": {"type": "list", "elements": "str", "default": []},
    # Who sets hosts up by cloud-config puts secrets there.
    "user_data": {"type": "str", "default": "", "no_log": True},
    "private_ip": {"type": "bool", "default": False},
    "vpc": {"type": "str", "default": ""},
    "placement_group": {"type": "str", "default": ""},
    "firewall": {"type": "str", "default": ""},
    "disk_encryption": {"type": "str", "choices": ["", "enabled", "disabled"], "default": ""},
    "backups": {"type": "bool", "default": False},
    "swap_size": {"type": "int"},
    "power": {"type": "str", "choices": ["running", "offline", "any"], "default": "running"},
    "maintenance_policy": {"type": "str", "choices": ["", "linode/migrate", "linode/power_off_on"], "default": ""},
    "on_change": {"type": "str", "choices": ["fail", "rebuild", "replace", "accept"], "default": "fail"},
}
ONE_OF = {"mutually_exclusive": [("count", "hosts")], "required_one_of": [("count", "hosts")]}
PLACES = {"count": {"type": "int"}, "hosts": {"type": "list", "elements": "str"}}
GROUP = {
    "name": {"type": "str", "required": True},
    **PLACES,
    **{option: {key: value for key, value in spec.items() if key != "default"} for option, spec in HOST.items()},
}
TIMEOUTS = {
    "create": {"type": "int", "default": 600},
    "change": {"type": "int", "default": 1200},
    "delete": {"type": "int", "default": 300},
}
SPEC = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    **PLACES,
    "groups": {"type": "list", "elements": "dict", "options": GROUP, **ONE_OF},
    **HOST,
    "purge_tags": {"type": "bool", "default": False},
    "max_unavailable": {"type": "int", "default": 1},
    "adopt": {"type": "dict", "default": {}},
    "remove": {"type": "list", "elements": "str", "default": []},
    "protect": {"type": "list", "elements": "str", "default": []},
    "max_delete": {"type": "int", "default": 0},
    "confirm": {"type": "str", "default": ""},
    "disruptive": {"type": "str", "choices": ["apply", "defer"], "default": "apply"},
    "only": {"type": "list", "elements": "str", "default": []},
    "wait": {"type": "bool", "default": True},
    "wait_timeout": {"type": "int", "default": 1800},
    "timeouts": {"type": "dict", "options": TIMEOUTS, "apply_defaults": True},
    "state_dir": {"type": "path", "required": True},
    **linode.options(env_fallback),
}
REQUIRED_IF = [("state", "present", ("count", "hosts", "groups"), True)]
EXCLUSIVE = [("count", "hosts", "groups")]


NEEDS = {"create": linode.CATALOGUES, "replace": linode.CATALOGUES, "rebuild": ["image"], "resize": ["type"]}


def desired_fleet(params):
    if params["state"] == "absent":
        wanted = fleet.Desired(params["name"], protect=tuple(params["protect"]))
    else:
        # Without groups the fleet is one, which gives nothing else of its own.
        alone = {"name": "", "count": params["count"], "hosts": params["hosts"]}
        groups = [alone] if params["groups"] is None else params["groups"]
        wanted = fleet.Desired(
            params["name"],
            tuple(group_of(params, one) for one in groups),
            adopt={label: str(source) for label, source in params["adopt"].items()},
            remove=tuple(params["remove"]),
            protect=tuple(params["protect"]),
            purge_tags=params["purge_tags"],
        )
    wanted.check()
    return wanted


def group_of(params, group):
    """A group as declared: what it does not give is the fleet's, and its tags come beside the fleet's."""
    given = {key: params[key] if group.get(key) is None else group[key] for key in HOST}
    given["tags"] = (*params["tags"], *(group.get("tags") or ()))
    given["authorized_keys"] = read_keys(given["authorized_keys"])
    given.update((key, given[key] or "") for key in ("type", "region", "image"))
    return fleet.Group(group["name"], fleet.Host(**given), group["count"] or 0, tuple(group["hosts"] or ()))


def run(module):
    params = module.params
    wanted = desired_fleet(params)
    deadline = linode.Deadline(params["wait_timeout"])
    api = linode.connect(params, deadline)
    catalogue = linode.Catalogue(api)
    keys = HostKeys(Path(params["state_dir"]))
    listed = fleet_api.listing(api, wanted)
    seen = fleet_api.around(api, wanted)
    confirmed = params["state"] == "absent" and params["confirm"] == params["name"]
    allowed = float("inf") if confirmed else params["max_delete"]
    plan = fleet.plan(wanted, listed, keys.pinned(), seen, allowed)
    hosts = wanted.labels(fleet.owned(wanted.name, listed))
    if params["only"]:
        plan = plan.only(params["only"])
    rolling = plan.disruptive if params["disruptive"] == "defer" else {}
    report = {
        "changed": False,
        "plan": fleet.as_data(plan.steps),
        "rolling": [{"label": label, "actions": actions} for label, actions in rolling.items()],
        "diff": {"before_header": f"fleet {wanted.name}", "after_header": f"fleet {wanted.name}", **plan.diff()},
    }

    def refuse(problems):
        why = "\n".join(problems)
        module.fail_json(msg=f"fleet {wanted.name}: nothing was changed:\n{why}", **report)

    if blocked := plan.of("blocked"):
        refuse([f"{step.label} {step.reason}" for step in blocked])
    if problems := not_offered(catalogue, plan, hosts):
        refuse(problems)
    refs = fleet_api.references(api, plan, seen)
    if problems := refs.missing(plan, pending=("firewall",) if module.check_mode else ()):
        refuse(problems)
    if plan.changes_cost:
        cost = report["cost"] = fleet.monthly_cost(wanted, listed, plan, catalogue.of("type").values())
        for at in ("before", "after"):
            report["diff"][f"{at}_header"] = f"fleet {wanted.name}, {cost[f'monthly_{at}']:.2f} USD a month"
    if module.check_mode:
        module.exit_json(**{**report, "changed": plan.changes})

    if rolling:
        plan = plan.gentle()
    report.update(changed=plan.changes, diff={**report["diff"], **plan.diff()})
    anew = [step.label for step in plan.of("create", "rebuild", "replace")]
    keys.prepare(anew, hosts)
    results = fleet_api.apply(
        plan,
        wanted,
        listed,
        refs,
        api,
        keys,
        deadline,
        wait=params["wait"],
        max_unavailable=max(1, params["max_unavailable"]),
        timeouts=fleet_api.Timeouts(**params["timeouts"]),
    )
    report["instances"] = [result.as_data() for result in results]
    keys.settle([result.label for result in results if result.label in anew and not result.error])
    if failed := [result for result in results if result.error]:
        why = "\n".join(f"{result.label}: {result.error}" for result in failed)
        module.fail_json(
            msg=f"fleet {wanted.name}: {len(failed)} of {len(results)} instances failed; run again to mend it:\n{why}",
            **report,
        )
    module.exit_json(**report)


def not_offered(catalogue, plan, hosts):
    """A sentence for each type, region and image that the plan needs and the API does not sell."""
    needed = {}
    for action, kinds in NEEDS.items():
        for step in plan.of(action):
            needed.update(((kind, getattr(hosts[step.label], kind)), None) for kind in kinds)
    return [problem for kind, identifier in needed if (problem := catalogue.unknown(kind, identifier))]


def main():
    module = AnsibleModule(SPEC, required_if=REQUIRED_IF, mutually_exclusive=EXCLUSIVE, supports_check_mode=True)
    if MISSING:
        module.fail_json(msg=f"linode_fleet: {MISSING}")
    try:
        run(module)
    except (linode.LinodeError, OSError, ValueError) as error:
        module.fail_json(msg=f"fleet {module.params['name']}: {error}")


if __name__ == "__main__":
    main()
