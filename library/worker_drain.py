#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: worker_drain
short_description: Lets the Celery workers of a host finish their tasks, and stops them
version_added: "0.2.0"
author: the plimsoll contributors
description:
  - Stops every C(celery-worker@NAME.service) that runs, all at once, and waits. To Celery that is a warm shutdown, no
    task is taken any more and those that run are finished, for as long as the C(TimeoutStopSec) of each unit allows.
  - Fails where systemd had to kill a worker after that time, as its tasks may be lost. Another run then finds nothing
    that runs, and goes on.
  - They start again with the next boot, or with C(celery-workers.target).
attributes:
  check_mode:
    support: full
    description: Says which workers run, and stops none.
  diff_mode:
    support: full
    description: A line for each worker that is stopped.
options: {}
"""

EXAMPLES = r"""
- name: Drain the host
  worker_drain:
  become: true
"""

RETURN = r"""
workers:
  description: Units of the host's workers, those that do not run among them.
  type: list
  elements: str
  returned: always
stopped:
  description: Those that ran and were stopped.
  type: list
  elements: str
  returned: always
"""

import subprocess

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.units import parse_list, results

SPEC = {}
WORKERS = "celery-worker@*.service"


def systemctl(*words):
    ran = subprocess.run(["systemctl", *words], capture_output=True, text=True)
    if ran.returncode:
        raise OSError(ran.returncode, f"systemctl {' '.join(words)}: {ran.stderr.strip()}")
    return ran.stdout


def run(module):
    shown = systemctl("list-units", "--all", "--full", "--plain", "--no-legend", "--type=service", "--", WORKERS)
    states = parse_list(shown)
    running = [name for name, state in states.items() if state not in ("inactive", "failed")]
    report = {
        "changed": bool(running),
        "workers": list(states),
        "stopped": running,
        "diff": {"before": "".join(f"{name}: {states[name]}\n" for name in running), "after": ""},
    }
    if running and not module.check_mode:
        systemctl("stop", "--", *running)
        ended = results(systemctl("show", "--property=Id,Result", "--", *running))
        if killed := [name for name in running if ended.get(name) == "timeout"]:
            module.fail_json(
                msg=f"{', '.join(killed)}: tasks were not finished within TimeoutStopSec, so systemd killed them, and"
                " they may be lost; celery_worker_stop_timeout gives them longer",
                **report,
            )
    module.exit_json(**report)


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    try:
        run(module)
    except OSError as error:
        module.fail_json(msg=f"worker_drain: {error.strerror}")


if __name__ == "__main__":
    main()
