#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: log_bundle
short_description: Packs the new logs of plimsoll on a host into one file to fetch
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Fetching files one by one costs a module run each. This packs what is behind a cursor into one deterministic tar.gz,
    to be fetched by one M(ansible.builtin.fetch) without become, which streams it by SFTP.
  - The controller holds the cursor, and hands over how far the host's logs are in its store. What is up to there is
    acknowledged by that, and written down in C(acknowledged.json) of O(root) for the sampler, which removes it first
    where room is short.
  - It runs at the lowest priority for CPU and IO, under systemd in a scope of its own with a quota.
options:
  root:
    description: Directory with C(samples), C(trace) and C(guard).
    type: path
    default: /var/log/plimsoll
  dest:
    description: The bundle on this host.
    type: path
    default: /var/lib/plimsoll/outbox/bundle.tar.gz
  owner:
    description:
      - User who fetches the bundle, the one that Ansible logs in as. By default the one who became root by sudo, else
        the one that the module runs as.
    type: str
  scope:
    description:
      - V(routine) packs rollups, the guard's acts, the events of the journal and the units' properties.
      - V(full) packs samples, figures of the units and trace records too.
    type: str
    choices: [routine, full]
    default: full
  cursor:
    description: How far the logs of this host are in the store, as C(plimsoll ingest) keeps it. Empty for not at all.
    type: dict
    default: {}
  max_bytes:
    description: Bound on the sum of what one bundle holds, in bytes. Of more, the oldest is packed first.
    type: int
    default: 536870912
  cpu_quota:
    description: Percent of one CPU that packing may take.
    type: int
    default: 50
attributes:
  check_mode:
    support: full
    description: Says how many parts of files it would pack, and writes nothing.
  diff_mode:
    support: none
    description: A bundle is a copy.
"""

EXAMPLES = r"""
- name: Pack the new logs
  log_bundle:
    scope: routine
    cursor: "{{ (lookup('ansible.builtin.file', 'store/_cursors/web-1.json') | from_json).cursor }}"
  become: true
"""

RETURN = r"""
path:
  description: The bundle on the host.
  type: str
  returned: always
sha256:
  description: Its checksum. Not in check mode, and not where nothing is new.
  type: str
  returned: when packed
size:
  description: Bytes of the bundle.
  type: int
  returned: when packed
files:
  description: Number of parts of files that are packed.
  type: int
  returned: always
events:
  description: Number of events of the journal that are packed.
  type: int
  returned: always
more:
  description: Whether there is more than max_bytes, which the next bundle brings.
  type: bool
  returned: always
skipped:
  description: What was left out, with the reason.
  type: list
  elements: str
  returned: always
"""

import contextlib
import fcntl
import json
import os
import platform
import pwd
import subprocess
import time
import uuid
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll import journal
from ..module_utils.plimsoll.bundle import (
    MAX_MEMBERS,
    ROUTINE,
    SCHEMA,
    BundleError,
    Cursor,
    acknowledged,
    digest,
    listing,
    pack,
    plan,
    said_of,
)
from ..module_utils.plimsoll.files import write_whole

SPEC = {
    "root": {"type": "path", "default": "/var/log/plimsoll"},
    "dest": {"type": "path", "default": "/var/lib/plimsoll/outbox/bundle.tar.gz"},
    "owner": {"type": "str"},
    "scope": {"type": "str", "choices": ["routine", "full"], "default": "full"},
    "cursor": {"type": "dict", "default": {}},
    "max_bytes": {"type": "int", "default": 512 << 20},
    "cpu_quota": {"type": "int", "default": 50},
}
FOLDERS = ("samples", "trace", "guard")
# Of the scope, bytes: Python, and some parts of files.
MEMORY_MAX = 256 << 20
# None that changes by itself: where nothing happened, there is nothing new.
PROPERTIES = "Id,ActiveState,SubState,Result,NRestarts,MemoryHigh,MemoryMax,MemorySwapMax"


def confine(percent):
    """Last in every queue, and no more than a share of a CPU, as workers are here. Where it cannot be, it is not."""
    # The kernel takes the priority of its IO from this too.
    os.nice(19)
    manager = "org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager"
    quota = f"4 PIDs au 1 {os.getpid()} CPUQuotaPerSecUSec t {percent * 10_000} IOWeight t 1 MemoryMax t {MEMORY_MAX}"
    scope = f"StartTransientUnit ssa(sv)a(sa(sv)) plimsoll-collect-{os.getpid()}.scope fail {quota} 0"
    command = ["busctl", "--quiet", "call", *f"{manager} {scope}".split()]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)


def facts():
    """What no log line has: the units as systemd holds them, and what the host runs."""
    try:
        ran = subprocess.run(
            ["systemctl", "show", f"--property={PROPERTIES}", "celery-worker@*.service", "plimsoll-sampler.service"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        ran = None
    blocks = [block for block in ran.stdout.strip().split("\n\n") if block] if ran else []
    units = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks]
    return {"kernel": platform.release(), "python": platform.python_version(), "units": units}


def name_of(root, write):
    """The directory's own name: logs that were begun anew are others, though their files may be called the same."""
    path = root / "id"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        name = str(uuid.uuid4())
        if write:
            write_whole(path, f"{name}\n")
        return name


def collect(module, root, dest, owner):
    """What is exited with."""
    given, write = module.params, not module.check_mode
    cursor, name = Cursor.of(given["cursor"]), name_of(root, write)
    if cursor.logs != name:
        cursor = Cursor(logs=name, journal=cursor.journal)
    logs, skipped = listing(root, FOLDERS)
    told = facts()
    now = time.time_ns() // 1000 - journal.LAG_US
    # Where the clock was set back, what was said since then is behind that too.
    since = max(cursor.journal if cursor.journal <= now else 0, now - journal.MOST_BACK_S * 10**6)
    workers = [one["Id"] for one in told["units"] if one.get("Id", "").startswith("celery-worker@")]
    events, left_out, until = journal.events(workers, since, now)
    parts, more = plan(
        [log for log in logs if given["scope"] == "full" or ROUTINE.match(log.name)], cursor, given["max_bytes"]
    )
    result = {
        "path": str(dest),
        "files": len(parts),
        "events": len(events),
        "more": more,
        "skipped": [*skipped, *left_out],
    }
    new = bool(parts or events or cursor.units != digest(said_of(told)))
    if module.check_mode:
        return {**result, "changed": new}
    write_if_other(root / "acknowledged.json", json.dumps(acknowledged(logs, cursor)) + "\n")
    if not new:
        # What it held is in the store.
        dest.unlink(missing_ok=True)
        return {**result, "changed": False}
    # A file may have been gzipped or rotated just as it was looked for. Where not all could be looked at, nothing is
    # forgotten of what the controller has.
    after, missed = listing(root, FOLDERS)
    kept = cursor.files if skipped or missed else ()
    # As many as the controller takes: a worker's user who makes files without end is not to keep the host out for good.
    held = list(dict.fromkeys([*(log.key for log in [*logs, *after]), *kept]))[:MAX_MEMBERS]
    meta = {"schema": SCHEMA, "logs": name, **told, "held": held, "journal": until, "more": more}
    made = pack(parts, meta, journal.lines(events), dest, result["skipped"], owner.pw_uid)
    return {
        **result,
        "changed": True,
        "sha256": made.sha256,
        "size": made.size,
        "files": made.files,
        "skipped": list(made.skipped),
    }


def write_if_other(path, text):
    if not path.is_file() or path.read_text() != text:
        write_whole(path, text)


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    given = module.params
    name = given["owner"] or os.environ.get("SUDO_USER") or pwd.getpwuid(os.geteuid()).pw_name
    root, dest = Path(given["root"]), Path(given["dest"])
    if not root.is_dir():
        module.fail_json(msg=f"{root} is not there: the sampler has not run on this host; run playbooks/deploy.yml")
    try:
        owner = pwd.getpwnam(name)
    except KeyError:
        module.fail_json(msg=f"owner: no user {name} on this host")
    confine(given["cpu_quota"])
    try:
        if module.check_mode:
            module.exit_json(**collect(module, root, dest, owner))
        dest.parent.mkdir(parents=True, exist_ok=True)
        # The user who fetches may pass through and read the bundle, and no one else.
        os.chown(dest.parent, owner.pw_uid, 0)
        dest.parent.chmod(0o750)
        lock = os.open(dest.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Of one that was killed.
            for scratch in dest.parent.glob(f".{dest.name}.*"):
                with contextlib.suppress(OSError):
                    scratch.unlink()
            result = collect(module, root, dest, owner)
        except BlockingIOError:
            module.fail_json(msg=f"{dest.parent}: another collection is packing this host's logs; try again later")
        finally:
            os.close(lock)
        module.exit_json(**result)
    except (BundleError, OSError) as error:
        module.fail_json(msg=f"log_bundle: {error}")


if __name__ == "__main__":
    main()
