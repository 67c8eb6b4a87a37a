#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: worker_remedy
short_description: Does the acts of a remediation on the workers of a host, one after the other
version_added: "0.4.0"
author: the plimsoll contributors
description:
  - Without O(acts) it only says how the workers are, which is what C(plimsoll remedies) plans by.
  - An act writes, or removes, C(/etc/systemd/system/celery-worker@NAME.service.d/60-remedy.conf), restarts the worker
    by Celery's warm shutdown, waits until it answers and has taken a task, and then until its queues are no longer than
    before or become shorter.
  - Where the drop-in is refused by C(systemd-analyze verify), or the worker does not work after it, the host is put
    back to what it had, and the module fails; no further act is begun. One whose queue grows stands, and stops the
    others too.
  - The application is asked with the environment that the worker itself was started with.
  - A worker that does not run is not started. Of one a drop-in is taken away, and no other act is done.
  - An act that is in force already, as an interrupted run has left it, is not done again.
options:
  workers:
    description: Units of the host's workers. Those that have a drop-in of this module's are told of too.
    type: list
    elements: str
    default: []
  acts:
    description: Acts of a plan as C(plimsoll remedies) makes them, in this order.
    type: list
    elements: dict
    default: []
    suboptions:
      id:
        description: Name of the act in the log.
        type: str
        required: true
      unit:
        description: The worker's unit.
        type: str
        required: true
      act:
        description: What it is. V(cordon) makes the worker take no new task and run on; V(remove) takes a drop-in away.
        type: str
        choices: [recycle, contain, allocator, cordon, remove]
        required: true
      dropin:
        description: Text of the drop-in. Empty for one that writes none.
        type: str
        default: ""
      queues:
        description: Queues that the worker consumes.
        type: list
        elements: str
        default: []
      since:
        description: When the worker had begun as this was planned, in Unix seconds.
        type: float
  home:
    description: Directory of the releases.
    type: path
    default: /opt/celery
  app:
    description: The application as for C(celery --app).
    type: str
    default: ""
  user:
    description: User of the workers.
    type: str
    default: celery
  restart_timeout:
    description: Seconds that a restart may take, in which the old processes end first.
    type: int
    default: 240
  ready_timeout:
    description: Seconds that a new worker may take to answer, and to take a task.
    type: int
    default: 120
  settle_timeout:
    description: Seconds that its queues may take to be as short as before, or to become shorter.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
    description: Says which acts are needed, and does none. The broker is not asked.
  diff_mode:
    support: full
    description: Shows each drop-in before and after, and names what is restarted without one.
"""

EXAMPLES = r"""
- name: See how the workers are
  worker_remedy:
    workers: [celery-worker@gate.service]
  become: true
"""

RETURN = r"""
workers:
  description: How each worker is, before any act.
  type: list
  elements: dict
  returned: always
outcomes:
  description: What came of each act that was begun.
  type: list
  elements: dict
  returned: always
  sample: [{id: 1f0c, unit: celery-worker@gate.service, done: true, changed: true, stop: false, why: "", away_s: 7.1}]
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.roll import How, change_of, installed, needed, perform, states

SPEC = {
    "workers": {"type": "list", "elements": "str", "default": []},
    "acts": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "id": {"type": "str", "required": True},
            "unit": {"type": "str", "required": True},
            "act": {
                "type": "str",
                "required": True,
                "choices": ["recycle", "contain", "allocator", "cordon", "remove"],
            },
            "dropin": {"type": "str", "default": ""},
            "queues": {"type": "list", "elements": "str", "default": []},
            "since": {"type": "float"},
        },
    },
    "home": {"type": "path", "default": "/opt/celery"},
    "app": {"type": "str", "default": ""},
    "user": {"type": "str", "default": "celery"},
    "restart_timeout": {"type": "int", "default": 240},
    "ready_timeout": {"type": "int", "default": 120},
    "settle_timeout": {"type": "int", "default": 60},
}


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    # Of a drop-in's directory: systemd-analyze and administrators who are not root read below it.
    os.umask(0o022)
    given = module.params
    acts = given["acts"]
    try:
        workers = states(sorted({*given["workers"], *installed()}))
        wanted = [act for act in acts if needed(act)]
        diff = [change.diff() for act in wanted for change in change_of(act)]
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"worker_remedy: {error}", workers=[], outcomes=[])
    plain = "".join(f"{act['act']} {act['unit']}\n" for act in wanted if not act["dropin"] and act["act"] != "remove")
    if plain:
        diff.append({"before": "", "after": plain})
    outcomes = []
    if not module.check_mode:
        how = How(
            Path(given["home"]),
            given["app"],
            given["user"],
            given["restart_timeout"],
            given["ready_timeout"],
            given["settle_timeout"],
        )
        for act in acts:
            outcomes.append(perform(act, how))
            if outcomes[-1].stop:
                break
    came = [one.as_data() for one in outcomes]
    changed = bool(wanted) if module.check_mode else any(one.changed for one in outcomes)
    report = {"changed": changed, "workers": workers, "outcomes": came, "diff": diff}
    if outcomes and outcomes[-1].stop:
        last = outcomes[-1]
        module.fail_json(msg="\n".join(filter(None, (last.why, last.journal))), **report)
    module.exit_json(**report)


if __name__ == "__main__":
    main()
