#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: app_release
short_description: Installs a release of the application beside the one that runs, and switches to it
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Unpacks an archive of M(app_archive) on a host, makes its venv with no package index, imports the application as the
    user of the workers, and only then points C(current) at it, by one rename.
  - A release that fails leaves the one that runs as it was. The next run starts it over.
  - One that is there is imported again where the name of the application, its user or environment changed.
options:
  home:
    description: Directory of the releases.
    type: path
    required: true
  digest:
    description: Name of the release.
    type: str
    required: true
  archive:
    description: The archive on this host. Needed unless O(back).
    type: path
  app:
    description: The application as for C(celery --app). It, or O(module), is needed unless O(back).
    type: str
  module:
    description: Of what is no application of Celery, the Python module that is imported in its place.
    type: str
  user:
    description: User who it runs as. Needed unless O(back).
    type: str
  environment:
    description: Environment of the workers, for the import. It may hold secrets.
    type: dict
    default: {}
  stop_timeout:
    description:
      - Seconds that tasks have to end at a stop. The module warns of settings of the application that can lose tasks,
        or do them twice, whenever it imports it.
    type: int
    default: 120
  back:
    description: Point C(current) at a release that ran before, and import nothing.
    type: bool
    default: false
  python:
    description: Interpreter for the venv.
    type: path
    default: /usr/bin/python3
  keep:
    description: Older releases to keep, for going back.
    type: int
    default: 2
attributes:
  check_mode:
    support: full
    description: Says whether it would install or switch.
  diff_mode:
    support: full
    description: Shows the release before and after.
"""

EXAMPLES = r"""
- name: Install the release
  app_release:
    home: /opt/celery
    digest: 0f0a6a31b8c2d4e5
    archive: /opt/celery/0f0a6a31b8c2d4e5.tar.gz
    app: shop
    user: celery
"""

RETURN = r"""#"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.release import (
    IMPORT,
    SETTINGS,
    ReleaseError,
    activate,
    confirm,
    current,
    install,
    installed,
    risks,
)

SPEC = {
    "home": {"type": "path", "required": True},
    "digest": {"type": "str", "required": True},
    "archive": {"type": "path"},
    "app": {"type": "str"},
    "module": {"type": "str"},
    "user": {"type": "str"},
    "environment": {"type": "dict", "default": {}, "no_log": True},
    "stop_timeout": {"type": "int", "default": 120},
    "back": {"type": "bool", "default": False},
    "python": {"type": "path", "default": "/usr/bin/python3"},
    "keep": {"type": "int", "default": 2},
}


def main():
    module = AnsibleModule(
        SPEC,
        supports_check_mode=True,
        mutually_exclusive=[("app", "module")],
        required_if=[("back", False, ("archive", "user"), False), ("back", False, ("app", "module"), True)],
    )
    # The workers' user is to read what root makes, on a hardened host too.
    os.umask(0o022)
    given = module.params
    home, digest = Path(given["home"]), given["digest"]
    before = current(home)
    present = installed(home, digest)
    try:
        if not module.check_mode:
            environment = {name: str(value) for name, value in given["environment"].items()}
            settings = None
            app, code = given["app"] or given["module"], SETTINGS if given["app"] else IMPORT
            if given["back"] and not present:
                raise ReleaseError(f"it is not on this host, whose current release is {before}")
            if given["back"]:
                pass
            elif present:
                settings = confirm(home, digest, app, given["user"], environment, code)
            else:
                archive = Path(given["archive"])
                settings = install(home, digest, archive, given["python"], app, given["user"], environment, code)
            for risk in risks(settings, given["stop_timeout"]) if settings else []:
                module.warn(f"{app}: {risk}")
            if before != digest or not present:
                activate(home, digest, given["keep"])
    except (ReleaseError, OSError) as error:
        module.fail_json(msg=f"release {digest}: {error}")
    module.exit_json(
        changed=before != digest or not present,
        diff={"before": f"{home}/current -> {before}\n", "after": f"{home}/current -> {digest}\n"},
    )


if __name__ == "__main__":
    main()
