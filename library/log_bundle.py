#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: log_bundle
short_description: Packs the logs of plimsoll on a host into one file to fetch
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Fetching files one by one costs a module run each. This packs them into one deterministic tar.gz, to be fetched by
    one M(ansible.builtin.fetch) without become, which streams it by SFTP.
options:
  root:
    description: Directory with C(samples) and C(trace).
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
  max_bytes:
    description: Bound on the sum of the files, in bytes.
    type: int
    default: 536870912
attributes:
  check_mode:
    support: full
    description: Says how many files it would pack, and writes nothing.
  diff_mode:
    support: none
    description: A bundle is a copy.
"""

EXAMPLES = r"""
- name: Pack the logs
  log_bundle:
    max_bytes: 1073741824
  become: true
"""

RETURN = r"""
path:
  description: The bundle on the host.
  type: str
  returned: always
sha256:
  description: Its checksum. Not in check mode.
  type: str
  returned: when packed
size:
  description: Bytes of the bundle. Not in check mode.
  type: int
  returned: when packed
files:
  description: Number of files packed.
  type: int
  returned: always
skipped:
  description: What was left out, with the reason.
  type: list
  elements: str
  returned: always
"""

import json
import os
import platform
import pwd
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.bundle import BundleError, listing, pack, sha256

SPEC = {
    "root": {"type": "path", "default": "/var/log/plimsoll"},
    "dest": {"type": "path", "default": "/var/lib/plimsoll/outbox/bundle.tar.gz"},
    "owner": {"type": "str"},
    "max_bytes": {"type": "int", "default": 512 << 20},
}
# None that changes by itself: the same logs are to give the same bundle.
PROPERTIES = "Id,ActiveState,SubState,Result,NRestarts,MemoryHigh,MemoryMax,MemorySwapMax"


def meta():
    """Facts that no log line has: the units as systemd holds them, and what the host runs."""
    ran = subprocess.run(
        ["systemctl", "show", f"--property={PROPERTIES}", "celery-worker@*.service", "plimsoll-sampler.service"],
        capture_output=True,
        text=True,
    )
    blocks = [block for block in ran.stdout.strip().split("\n\n") if block]
    units = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks]
    facts = {"schema": 1, "kernel": platform.release(), "python": platform.python_version(), "units": units}
    return json.dumps(facts, sort_keys=True, indent=1).encode() + b"\n"


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    given = module.params
    name = given["owner"] or os.environ.get("SUDO_USER") or pwd.getpwuid(os.geteuid()).pw_name
    root, dest = Path(given["root"]), Path(given["dest"])
    if not root.is_dir():
        module.fail_json(msg=f"{root} is not there: the sampler has not run on this host; run playbooks/deploy.yml")
    try:
        owner = pwd.getpwnam(name)
        members, skipped = listing(root, ("samples", "trace"))
        if module.check_mode:
            module.exit_json(changed=True, path=str(dest), files=len(members), skipped=skipped)
        dest.parent.mkdir(parents=True, exist_ok=True)
        # The user who fetches may pass through and read the bundle, and no one else.
        os.chown(dest.parent, owner.pw_uid, 0)
        dest.parent.chmod(0o750)
        before = sha256(dest) if dest.is_file() else None
        made = pack(members, meta(), dest, given["max_bytes"])
        os.chown(dest, owner.pw_uid, 0)
        dest.chmod(0o640)
    except KeyError:
        module.fail_json(msg=f"owner: no user {name} on this host")
    except (BundleError, OSError) as error:
        module.fail_json(msg=f"log_bundle: {error}")
    module.exit_json(
        changed=made.sha256 != before,
        path=str(dest),
        sha256=made.sha256,
        size=made.size,
        files=made.files,
        skipped=[*skipped, *made.skipped],
    )


if __name__ == "__main__":
    main()
