#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_units
short_description: Makes units run what their files say, or not run
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Enables and starts units, and restarts those services that began to start before one of their files changed. These
    are the unit's own file, its drop-ins and environment files, and those of O(units[].files).
  - It asks the host and not what this run changed, so that a run which was cut off before a restart is mended by the
    next one. One run of it stands for a handler and two tasks a unit.
options:
  units:
    description: What is to run.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the unit, with its suffix.
        type: str
        required: true
      enabled:
        description: Whether it is to start at boot. Not set, that is left as it is.
        type: bool
      running:
        description: Whether it is to run. One that is not, and runs, is stopped, within its TimeoutStopSec.
        type: bool
        default: true
      files:
        description: Further files that it reads when it starts. A link counts by itself; an absent one does not.
        type: list
        elements: path
        default: []
  pending:
    description:
      - Paths that this run wrote. In check mode, where nothing was written, it is by them that a restart is foreseen.
    type: list
    elements: path
    default: []
  timeout:
    description:
      - Seconds that all starts together may take, and all restarts, in which the old processes end first. After that
        the module fails, and systemd goes on.
    type: int
    default: 600
attributes:
  check_mode:
    support: full
    description: Reports what it would do. A unit that is not there yet would be started.
  diff_mode:
    support: full
    description: Names each unit and why it is started or restarted.
"""

EXAMPLES = r"""
- name: Run the workers
  systemd_units:
    units:
      - {name: celery-workers.target, enabled: true}
      - {name: celery-worker@sales.service, files: [/opt/celery/current]}
"""

RETURN = r"""
steps:
  description: What was done with each unit that needed it, or would be in check mode.
  type: list
  elements: dict
  returned: always
  sample: [{unit: celery-worker@sales.service, enable: null, action: restart, reason: runs something older than X}]
"""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.units import PROPERTIES, Wanted, parse, plan

SPEC = {
    "units": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "enabled": {"type": "bool"},
            "running": {"type": "bool", "default": True},
            "files": {"type": "list", "elements": "path", "default": []},
        },
    },
    "pending": {"type": "list", "elements": "path", "default": []},
    "timeout": {"type": "int", "default": 600},
}
UNITS = "/etc/systemd/system"
JOURNAL_LINES = "8"


def systemctl(*words, timeout=None):
    """What it printed. Out of time, systemd goes on with its job, and the exit code is 124, as of timeout(1)."""
    command = ["systemctl", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not done within {timeout} s; systemd goes on with it")


def read(names):
    """States of the units. A host without systemd has none of them."""
    ran = systemctl("show", f"--property={PROPERTIES}", "--", *names)
    if ran.returncode:
        raise OSError(ran.returncode, f"systemctl show: {ran.stderr.strip()}")
    return parse(ran.stdout)


def changed_at(paths):
    """When each path that is there changed, on the clock that systemd's monotonic stamps are of."""
    offset = time.time() - time.monotonic()
    found = {}
    for path in paths:
        try:
            found[path] = os.lstat(path).st_mtime - offset
        except OSError:
            continue
    return found


def unread():
    """Whether a unit file changed since systemd last read them.

    NeedDaemonReload does not tell of a first drop-in, whose directory systemd has yet to see. Before systemd 250 there
    is no such stamp, and they are read again each time.
    """
    shown = systemctl("show", "--value", "--property=UnitsLoadTimestampMonotonic").stdout.strip()
    loaded = int(shown) / 1e6 if shown.isdigit() else 0.0
    paths = [str(Path(folder, name)) for folder, _, names in os.walk(UNITS) for name in ("", *names)]
    return any(when >= loaded for when in changed_at(paths).values())


def act(module, verb, names):
    if not names:
        return
    ran = systemctl(verb, "--", *names, timeout=module.params["timeout"])
    # What systemd has not loaded has no starts to forget, which it calls an error.
    if ran.returncode and verb != "reset-failed":
        # Which one it was, and why, is in the journal.
        said = [f"systemctl {verb} {' '.join(names)}: {ran.stderr.strip()}"]
        for name in names:
            if systemctl("is-active", "--quiet", "--", name).returncode and verb != "stop":
                log = ["journalctl", "--unit", name, "--lines", JOURNAL_LINES, "--no-pager", "--output", "cat"]
                said.append(f"{name}:\n{subprocess.run(log, capture_output=True, text=True).stdout.strip()}")
        module.fail_json(msg="\n".join(said))


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    wanted = [
        Wanted(one["name"], one["enabled"], tuple(one["files"]), one["running"]) for one in module.params["units"]
    ]
    names = [one.name for one in wanted]
    try:
        states = read(names)
        stale = {name for name, one in states.items() if one.stale}
        if (stale or unread()) and not module.check_mode:
            systemctl("daemon-reload")
            # What they run is as old as it was.
            states = {name: replace(one, stale=name in stale) for name, one in read(names).items()}
        paths = {path for state in states.values() for path in state.files} | {
            path for one in wanted for path in one.files
        }
        changed = {**changed_at(paths), **dict.fromkeys(module.params["pending"], float("inf"))}
        steps = plan(wanted, states, changed)
    except OSError as error:
        module.fail_json(msg=f"systemd_units: {error}")
    if not module.check_mode:
        needed = [one.name for one in wanted if one.running]
        if missing := [name for name in needed if not states.get(name) or not states[name].found]:
            module.fail_json(msg=f"systemd knows no {', '.join(missing)}: its unit file is missing or has an error")
        for verb, which in (
            ("enable", [step.name for step in steps if step.enable]),
            ("disable", [step.name for step in steps if step.enable is False]),
            ("stop", [step.name for step in steps if step.action == "stop"]),
            # One that was started too often in too short a time, also by us, would be refused.
            ("reset-failed", [step.name for step in steps if step.action in ("start", "restart")]),
            ("start", [step.name for step in steps if step.action == "start"]),
            ("restart", [step.name for step in steps if step.action == "restart"]),
        ):
            act(module, verb, which)
    lines = "".join(f"{step.line()}\n" for step in steps)
    module.exit_json(changed=bool(steps), steps=[step.as_data() for step in steps], diff={"before": "", "after": lines})


if __name__ == "__main__":
    main()
