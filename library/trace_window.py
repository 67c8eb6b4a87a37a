#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: trace_window
short_description: Opens a tracing window in Celery workers of a host, and waits until it is over
version_added: "0.2.0"
author: the plimsoll contributors
description:
  - Asks the bootstrap inside each worker, by a file, to trace one of its processes for a while. The windows of several
    workers run at the same time. What they saw is in the trace records, which M(log_bundle) packs.
  - The request is taken back on every way out, also by a signal and when nobody reads the module's output any more,
    which ends a window that is open within about 2 seconds. A module that is killed leaves a request that lapses by
    itself, and a window ends by itself.
  - It waits for at most twice I(window_s) and 45 seconds. Fails, once the others are over, where a worker does not run,
    has no bootstrap, or is being diagnosed by somebody else.
options:
  units:
    description: Units of the workers, C(celery-worker@NAME.service).
    type: list
    elements: str
    required: true
  window_s:
    description: Seconds of a window, 1 to 3600; twice that while a task runs on.
    type: int
    default: 60
  frames:
    description: Frames kept of each allocation, 1 to 50; each one slows the traced process down further.
    type: int
    default: 1
attributes:
  check_mode:
    support: full
    description: Says in which workers a window would be opened, and which would be refused.
  diff_mode:
    support: full
    description: A line for each window.
"""

EXAMPLES = r"""
- name: Trace one process of a worker for a minute
  trace_window:
    units: [celery-worker@sales.service]
  become: true
"""

RETURN = r"""
windows:
  description: >-
    What became of each that could be asked for, as unit, opened, closed, reason (how it ended, or why none was opened),
    pid of the traced process, and growth with window_s, rss_growth_kb and traced_growth_kb of the process in it.
  type: list
  elements: dict
  returned: always
"""

import subprocess
import time

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.calloff import CallOff
from ..module_utils.plimsoll.window import MAX_FRAMES, MAX_WINDOW_S, Outcome, directories, refusal, trace

SPEC = {
    "units": {"type": "list", "elements": "str", "required": True},
    "window_s": {"type": "int", "default": 60},
    "frames": {"type": "int", "default": 1},
}


def show(units):
    """What systemd holds of each unit."""
    ran = subprocess.run(
        ["systemctl", "show", "--property=Id,LoadState,ActiveState,Environment", "--", *units],
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise OSError(ran.returncode, f"systemctl show: {ran.stderr.strip()}")
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in ran.stdout.strip().split("\n\n")]
    return {one["Id"]: one for one in blocks if "Id" in one}


def run(module, call_off):
    given = module.params
    shown, now = show(given["units"]), time.time()
    refused = {unit: why for unit in given["units"] if (why := refusal(unit, shown.get(unit, {}), now))}
    asked = {unit: directories(shown[unit]) for unit in given["units"] if unit not in refused}
    lines = "".join(f"{unit}: a tracing window of {given['window_s']} s, {given['frames']} frames\n" for unit in asked)
    if module.check_mode:
        outcomes = [Outcome(unit, reason="check mode: it would be traced") for unit in asked]
    else:
        outcomes = trace(asked, given["window_s"], given["frames"], call_off)
    opened = bool(asked) if module.check_mode else any(one.opened for one in outcomes)
    windows = [one.as_data() for one in outcomes]
    report = {"changed": opened, "windows": windows, "diff": {"before": "", "after": lines}}
    if call_off.why:
        module.fail_json(msg=f"{', '.join(asked)}: {call_off.why}; no request is left", **report)
    if refused:
        module.fail_json(msg="; ".join(refused.values()), **report)
    module.exit_json(**report)


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    given = module.params
    if not 1 <= given["window_s"] <= MAX_WINDOW_S or not 1 <= given["frames"] <= MAX_FRAMES:
        module.fail_json(msg=f"window_s is 1 to {MAX_WINDOW_S} seconds, and frames 1 to {MAX_FRAMES}", windows=[])
    try:
        run(module, CallOff())
    except OSError as error:
        module.fail_json(msg=f"trace_window: {error.strerror}", windows=[])


if __name__ == "__main__":
    main()
