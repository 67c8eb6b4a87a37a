#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: host_files
short_description: Writes a list of files and directories in one run
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Against a fleet each Ansible task costs seconds, so a role renders its files on the controller
    (P(ansible.builtin.template#lookup)) and hands all of them over at once.
  - Each file appears whole or not at all. Units are checked by C(systemd-analyze verify) before the first one lands.
options:
  files:
    description: What to write, in this order.
    type: list
    elements: dict
    default: []
    suboptions: &suboptions
      path:
        description: Absolute path.
        type: path
        required: true
      state:
        description: What the path is to be.
        type: str
        choices: [file, directory, absent]
        default: file
      content:
        description: The text of a file.
        type: str
        default: ""
      mode:
        description: Permissions, octal, as a string. By default 0644 for files and 0755 for directories.
        type: str
      owner:
        description: Name of the owner.
        type: str
        default: root
      group:
        description: Name of the group.
        type: str
        default: root
  secret_files:
    description: As O(files), for contents that no log and no diff may show.
    type: list
    elements: dict
    default: []
    suboptions: *suboptions
  verify_units:
    description:
      - Run C(systemd-analyze verify) on the units among O(files), and refuse them on any word that it says. An unknown
        key makes systemd only warn.
    type: bool
    default: true
  backup:
    description:
      - A file, for root alone, that keeps what this run replaces, for O(restore). What it kept before is gone,
        also where nothing is replaced.
    type: path
  restore:
    description: A O(backup), whose files are put back instead of O(files) and O(secret_files) being written.
    type: path
attributes:
  check_mode:
    support: full
    description: Reports what it would write. Units are not verified, as the programs they name may not be there yet.
  diff_mode:
    support: full
    description: Shows each file before and after, but for the contents of O(secret_files).
"""

EXAMPLES = r"""
- name: Install the unit and its configuration
  host_files:
    files:
      - path: /etc/systemd/system/celery.slice
        content: "{{ lookup('ansible.builtin.template', celery_worker_slice_template) }}"
    secret_files:
      - path: /etc/celery/environment
        mode: "0600"
        content: "CELERY_BROKER_URL={{ celery_worker_broker_url }}\n"
"""

RETURN = r"""
paths:
  description: The paths that changed, or would in check mode.
  type: list
  elements: str
  returned: always
"""

import os
import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.hostfiles import Entry, complaints, load, plan, read, save, unit_of, write

ENTRY = {
    "path": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["file", "directory", "absent"], "default": "file"},
    "content": {"type": "str", "default": ""},
    "mode": {"type": "str"},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
}
SECRET_ENTRY = {**ENTRY, "content": {"type": "str", "default": "", "no_log": True}}
SPEC = {
    "files": {"type": "list", "elements": "dict", "default": [], "options": ENTRY},
    "secret_files": {"type": "list", "elements": "dict", "default": [], "options": SECRET_ENTRY, "no_log": False},
    "verify_units": {"type": "bool", "default": True},
    "backup": {"type": "path"},
    "restore": {"type": "path"},
}


def entry(item, secret):
    if item["state"] == "absent":
        return Entry(item["path"], "absent", secret=secret)
    mode = item["mode"] or ("0755" if item["state"] == "directory" else "0644")
    # YAML turns 0644 without quotes into 420.
    if not re.fullmatch("[0-7]{4}", mode):
        raise ValueError(f"{item['path']}: mode '{mode}' is not four octal digits in quotes, as in \"0644\"")
    content = item["content"] if item["state"] == "file" else ""
    return Entry(item["path"], item["state"], content, int(mode, 8), item["owner"], item["group"], secret)


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True, mutually_exclusive=[("restore", "backup")])
    # Of folders above a file: services that are not root read below them, on a hardened host too.
    os.umask(0o022)
    done = []
    try:
        desired = [entry(item, False) for item in module.params["files"]]
        desired += [entry(item, True) for item in module.params["secret_files"]]
        if module.params["restore"]:
            desired = load(Path(module.params["restore"]))
        changes = plan(desired, [read(item.path) for item in desired])
        if module.params["backup"] and not module.check_mode:
            save(Path(module.params["backup"]), changes)
        if changes and not module.check_mode:
            touched = [change.after for change in changes if unit_of(change.after.path)]
            # What ran is put back as it was, whatever is to be said of it.
            verify = module.params["verify_units"] and not module.params["restore"]
            if verify and touched and (said := complaints(desired)):
                module.fail_json(msg=f"systemd-analyze verify refuses these units, nothing was written:\n{said}")
            for change in changes:
                write(change.after)
                done.append(change.after.path)
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"host_files: {error}", changed=bool(done), paths=done)
    module.exit_json(
        changed=bool(changes),
        paths=[change.after.path for change in changes],
        diff=[change.diff() for change in changes],
    )


if __name__ == "__main__":
    main()
