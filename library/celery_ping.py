#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_ping
short_description: Waits until the workers of a host answer, and take a task
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - A unit that is active has a process; a worker that answers remote control has its broker and its event loop too; and
    one that took a task has a pool that works. A worker that has had no task since its start gets one that every
    application has (C(celery.accumulate), which does nothing), through a queue of its own for the time.
options:
  home:
    description: Directory of the releases; the ping runs in the current one.
    type: path
    required: true
  app:
    description: The application as for C(celery --app).
    type: str
    required: true
  user:
    description: User of the workers.
    type: str
    required: true
  environment:
    description: Environment of the workers.
    type: dict
    default: {}
  workers:
    description: Names of the workers, the NAME of celery-worker@NAME.service.
    type: list
    elements: str
    required: true
  timeout:
    description: Seconds to wait, for all of them together.
    type: int
    default: 120
attributes:
  check_mode:
    support: full
    description: Asks, and sends the task.
  diff_mode:
    support: none
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Wait until the workers answer and take a task
  celery_ping:
    home: /opt/celery
    app: shop
    user: celery
    workers: [sales]
"""

RETURN = r"""#"""

import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.release import ReleaseError, check

SPEC = {
    "home": {"type": "path", "required": True},
    "app": {"type": "str", "required": True},
    "user": {"type": "str", "required": True},
    "environment": {"type": "dict", "default": {}, "no_log": True},
    "workers": {"type": "list", "elements": "str", "required": True},
    "timeout": {"type": "int", "default": 120},
}


def journal(worker):
    """The last lines that a worker that does not answer said: the reason is there."""
    unit = f"celery-worker@{worker}.service"
    ran = subprocess.run(
        ["journalctl", "--unit", unit, "--lines", "8", "--no-pager", "--output", "cat"], capture_output=True, text=True
    )
    return f"{unit}:\n{ran.stdout.strip()}"


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    given = module.params
    environment = {name: str(value) for name, value in given["environment"].items()}
    release = Path(given["home"], "current")
    try:
        silent, idle = check(release, given["app"], given["user"], environment, given["workers"], given["timeout"])
    except (ReleaseError, OSError) as error:
        module.fail_json(msg=f"the workers could not be asked: {error}")
    if silent or idle:
        what = [f"no answer within {given['timeout']} s from {', '.join(silent)}"] if silent else []
        what += [f"no task taken within {given['timeout']} s by {', '.join(idle)}, which answers"] if idle else []
        said = "\n".join(journal(worker) for worker in [*silent, *idle])
        module.fail_json(msg=f"{'; '.join(what)}\n{said}")
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()
