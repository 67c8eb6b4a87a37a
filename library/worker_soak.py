#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: worker_soak
short_description: Runs tasks of the release of a host in a worker of their own, and judges how its memory grows
version_added: "0.5.0"
author: the plimsoll contributors
description:
  - Starts a worker and a sender as transient units of systemd, with the user, the environment file and the memory
    limits of a worker that is deployed, on a queue of their own, which is removed in the end.
  - Ends as soon as each task is decided, at the time box of O(tasks) at the latest; then each task that fails runs
    alone for a tracing window. It waits for all of it.
  - Both units end with the module, also by a signal, and when nobody reads its output any more.
  - Tasks are run for real. Whether the broker is one of staging is for the caller to know.
options:
  app:
    description: The application as for C(celery --app).
    type: str
    required: true
  unit:
    description: Unit of the worker that the soak's own is to be like.
    type: str
    required: true
  tasks:
    description: What is sent, as the tasks file has it.
    type: dict
    required: true
  budget:
    description: How much each task may grow by, as the budget file has it.
    type: dict
    default: {}
  day:
    description: Lines of a recorded day, time, task and count, where the arrival is a replay.
    type: list
    elements: list
    default: []
  program:
    description: Path of C(plimsoll_soak.py) on the host, beside the bootstrap.
    type: path
    default: /opt/plimsoll/soak/plimsoll_soak.py
  home:
    description: Directory of the releases.
    type: path
    default: /opt/celery
  user:
    description: User of the workers.
    type: str
    default: celery
attributes:
  check_mode:
    support: full
    description: Says what would be sent, and for how long at most; sends nothing.
  diff_mode:
    support: full
    description: A line for each task, how often it would be sent at most.
"""

EXAMPLES = r"""
- name: Soak the tasks of a file
  worker_soak:
    app: shop
    unit: celery-worker@gate.service
    tasks: "{{ lookup('ansible.builtin.file', 'tasks.yml') | from_yaml }}"
  become: true
"""

RETURN = r"""
soak:
  description: What C(plimsoll soaked) makes the report of. Not in check mode.
  type: dict
  returned: success
"""

import collections
import json
import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.calloff import CallOff
from ..module_utils.plimsoll.soakbench import Trouble
from ..module_utils.plimsoll.soakhost import Asked, check, soak

SPEC = {
    "app": {"type": "str", "required": True},
    "unit": {"type": "str", "required": True},
    "tasks": {"type": "dict", "required": True},
    "budget": {"type": "dict", "default": {}},
    "day": {"type": "list", "elements": "list", "default": []},
    "program": {"type": "path", "default": "/opt/plimsoll/soak/plimsoll_soak.py"},
    "home": {"type": "path", "default": "/opt/celery"},
    "user": {"type": "str", "default": "celery"},
}


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    # The workers' user reads what is written here.
    os.umask(0o022)
    given = module.params
    asked = Asked(
        given["app"],
        given["unit"],
        Path(given["home"]),
        given["user"],
        Path(given["program"]),
        given["tasks"],
        given["budget"],
        given["day"],
    )
    try:
        plan = asked.plan()
        asked.allowed(plan)
        sent = collections.Counter(json.loads(one)[1] for one in asked.lines(plan))
        times = "".join(f"{name}: {count} times at most\n" for name, count in sent.items())
        diff = {"before": "", "after": f"{times}for {plan.seconds:g} s at most, in a worker of its own\n"}
        if module.check_mode:
            check(asked)
            module.exit_json(changed=True, diff=diff)
        module.exit_json(changed=True, diff=diff, soak=soak(asked, CallOff()))
    except (Trouble, OSError) as error:
        module.fail_json(msg=f"worker_soak: {error}")


if __name__ == "__main__":
    main()
