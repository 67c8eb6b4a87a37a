#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: worker_host
short_description: Reads what a host offers to Celery workers, and computes their memory limits
version_added: "0.2.0"
author: the plimsoll contributors
description:
  - Reads the host's memory, cgroup version, pressure figures, systemd and Python, and the workers and releases that are
    installed.
  - Shares its memory out among the workers that are declared, and says how it came to each limit.
  - Changes nothing. What cannot be is in C(wrong), and does not fail the module, so that a role can say all at once.
attributes:
  check_mode:
    support: full
    description: Only reads.
  diff_mode:
    support: none
    description: Changes nothing; the sums are comments of the drop-ins that the role writes, and show in their diff.
options:
  workers:
    description: The workers, as in C(celery_worker_instances); keys that say nothing of memory are ignored.
    type: list
    elements: dict
    required: true
  home:
    description: Directory of the releases.
    type: path
    default: /opt/celery
  memory_high:
    description: MemoryHigh of workers that have none of their own. Empty to compute it.
    type: str
    default: ""
  memory_max:
    description: MemoryMax of workers that have none of their own. Empty to compute it.
    type: str
    default: ""
  reserved:
    description: Memory that is left to all else on the host. Empty to compute it.
    type: str
    default: ""
  slice_memory_max:
    description: MemoryMax of all workers together. Empty to compute it.
    type: str
    default: ""
  beat_memory_max:
    description: MemoryMax of celery-beat. Empty where the host runs none.
    type: str
    default: ""
  brokers:
    description: Whether a broker on the host counts, by the MemoryMax that it has now; not where that is to change.
    type: bool
    default: true
  cgroup_v1:
    description: Whether a host on cgroup v1 will do.
    type: bool
    default: false
  guard:
    description: Whether the memory guard is to run on the host.
    type: bool
    default: false
  guard_pressure:
    description: Whether the guard is to go by pressure (PSI) too.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Read the host
  worker_host:
    workers: [{name: sales, concurrency: 4}, {name: mail, pool: gevent}]
  register: host
"""

RETURN = r"""
host:
  description: What was read; memory in bytes.
  type: dict
  returned: always
limits:
  description: C(slice_max), C(slice_how), and by worker memory_high, memory_max, max_memory_per_child (KiB) and how.
  type: dict
  returned: always
wrong:
  description: What cannot be, of host and limits, a sentence each. Empty where all is well.
  type: list
  elements: str
  returned: always
"""

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.host import read, wrong
from ..module_utils.plimsoll.limits import Worker, plan

SPEC = {
    "workers": {"type": "list", "elements": "dict", "required": True},
    "home": {"type": "path", "default": "/opt/celery"},
    "memory_high": {"type": "str", "default": ""},
    "memory_max": {"type": "str", "default": ""},
    "reserved": {"type": "str", "default": ""},
    "slice_memory_max": {"type": "str", "default": ""},
    "beat_memory_max": {"type": "str", "default": ""},
    "brokers": {"type": "bool", "default": True},
    "cgroup_v1": {"type": "bool", "default": False},
    "guard": {"type": "bool", "default": False},
    "guard_pressure": {"type": "bool", "default": False},
}


def number(declared, key, default=None):
    """A whole number, also as text: argument_specs convert nothing. Raises ValueError that names it."""
    value = declared.get(key, default)
    if value is None and default is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"celery_worker_instances: {declared['name']}: {key} {value!r} is no whole number") from None


def autoscale(declared):
    """The most children of --autoscale=MAX,MIN among the options, or None."""
    found = [re.match(r"--autoscale=(\d+)", str(option)) for option in declared.get("options") or []]
    return max((int(one[1]) for one in found if one), default=None)


def worker(declared, given):
    """A worker of its own sizes; those of all workers count where it has none."""
    if not declared.get("name"):
        raise ValueError("celery_worker_instances: a worker has no name")
    sizes = {key: "" if declared.get(key) is None else str(declared[key]) for key in ("memory_high", "memory_max")}
    own = any(sizes.values())
    return Worker(
        name=str(declared["name"]),
        pool=str(declared.get("pool") or "prefork"),
        concurrency=number(declared, "concurrency", 2),
        memory_high=sizes["memory_high"] if own else given["memory_high"],
        memory_max=sizes["memory_max"] if own else given["memory_max"],
        memory_weight=number(declared, "memory_weight"),
        max_memory_per_child=number(declared, "max_memory_per_child"),
        autoscale=autoscale(declared),
    )


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    given = module.params
    try:
        host = read(Path(given["home"]))
        workers = [worker(one, given) for one in given["workers"]]
    except OSError as error:
        module.fail_json(msg=f"worker_host: {error}")
    except ValueError as error:
        module.fail_json(msg=str(error))
    made = plan(
        host.memory,
        workers,
        reserved=given["reserved"],
        slice_max=given["slice_memory_max"],
        beat_max=given["beat_memory_max"],
        others=host.others if given["brokers"] else {},
    )
    module.exit_json(
        changed=False,
        host=host.as_data(),
        limits=made.as_data(),
        wrong=[*wrong(host, given["cgroup_v1"], given["guard"], given["guard_pressure"]), *made.wrong],
    )


if __name__ == "__main__":
    main()
