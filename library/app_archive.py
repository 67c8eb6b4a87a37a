#!/usr/bin/python
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: app_archive
short_description: Packs an application and its wheels for the Python of the hosts
version_added: "0.1.0"
author: the plimsoll contributors
description:
  - Runs on the controller. Makes one archive a target (Python version and machine), named by a digest of the source,
    its requirements and the target. An archive that is there already is kept, with no request to a package index.
options:
  source:
    description: The application, a directory, a wheel, or an archive as C(git archive) makes it (tar or zip).
    type: path
    required: true
  version:
    description:
      - Of a O(source) that is a checkout of git, the commit, branch or tag to pack; then what is not committed is left
        out.
    type: str
    default: ""
  requirements:
    description:
      - Requirements file of the application; of an archive or a O(version), its own C(requirements.txt) by default.
      - Pinned ones make a release that can be made again.
    type: path
  sdists:
    description:
      - Packages of pure Python that the index has no wheel of, by their names in lower case with dashes. A wheel of
        each is made on the controller, which runs code of the package. Any other package needs a wheel.
    type: list
    elements: str
    default: []
  targets:
    description: Python versions and machines to build for. Doubles are dropped.
    type: list
    elements: dict
    required: true
    suboptions:
      python_version:
        description: As in 3.11.2.
        type: str
        required: true
      machine:
        description: As C(uname -m) says.
        type: str
        required: true
  dest:
    description: Directory of the archives.
    type: path
    required: true
attributes:
  check_mode:
    support: full
    description: Computes the digests, and builds nothing.
  diff_mode:
    support: none
    description: The archive's name says all that changes.
"""

EXAMPLES = r"""
- name: Pack the application
  app_archive:
    source: /home/me/shop
    requirements: /home/me/shop/requirements.txt
    targets: [{python_version: 3.11.2, machine: x86_64}]
    dest: .plimsoll/releases
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
releases:
  description: For each target, keyed as C(PYTHON_VERSION-MACHINE), the digest and the path of its archive.
  type: dict
  returned: always
  sample: {"3.11.2-x86_64": {"digest": "0f0a6a31b8c2d4e5", "archive": ".plimsoll/releases/0f0a6a31b8c2d4e5.tar.gz"}}
"""

import sys
from importlib import metadata
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.plimsoll.release import ReleaseError, build, digest, members, opened, read_requirements

SPEC = {
    "source": {"type": "path", "required": True},
    "version": {"type": "str", "default": ""},
    "requirements": {"type": "path"},
    "sdists": {"type": "list", "elements": "str", "default": []},
    "targets": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "python_version": {"type": "str", "required": True},
            "machine": {"type": "str", "required": True},
        },
    },
    "dest": {"type": "path", "required": True},
}


def main():
    module = AnsibleModule(SPEC, supports_check_mode=True)
    source, dest = Path(module.params["source"]), Path(module.params["dest"])
    releases, changed = {}, False
    try:
        with opened(source, module.params["version"]) as unpacked:
            listed = module.params["requirements"]
            own = unpacked / "requirements.txt"
            if not listed and unpacked != source and own.is_file():
                listed = own
            requirements = read_requirements(Path(listed)) if listed else ""
            files = members(unpacked)
            for target in module.params["targets"]:
                python_version, machine = target["python_version"], target["machine"]
                name = digest(files, requirements, python_version, machine)
                archive = dest / f"{name}.tar.gz"
                releases[f"{python_version}-{machine}"] = {"digest": name, "archive": str(archive)}
                if not archive.exists():
                    changed = True
                    if not module.check_mode:
                        uv = metadata.version("uv")
                        sdists = module.params["sdists"]
                        build(unpacked, requirements, python_version, machine, archive, sys.executable, uv, sdists)
    except metadata.PackageNotFoundError:
        module.fail_json(msg=f"{sys.executable} has no uv; run Ansible from the venv that scripts/setup makes")
    except (ReleaseError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, releases=releases)


if __name__ == "__main__":
    main()
