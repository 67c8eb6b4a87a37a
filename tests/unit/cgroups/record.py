"""Record the cgroup of one unit of this host as JSON, for tests/unit/test_rss_sampler.py: path below ROOT to contents.

    python3 record.py celery-worker@gate.service >cgroup_v2.json

cgroup_v1.json comes from Linux 6.18 with v1 hierarchies: a unit's directory by hand, MemoryMax 64 MiB, 96 MiB with swap
(memsw), in which a process was killed at the limit and another sleeps. cgroup_v2.json comes from Debian 12 (Linux 6.1,
systemd 252): a prefork worker of two children, restarted once, with some of it reclaimed and swapped out.
"""

import json
import os
import sys

ROOT = "/sys/fs/cgroup"


def main(unit):
    found = {}
    for folder, _, names in os.walk(ROOT):
        if f"/{unit}" in folder or folder == ROOT:
            for name in names:
                path = os.path.join(folder, name)
                try:
                    with open(path) as file:
                        found[os.path.relpath(path, ROOT)] = file.read()
                except OSError:  # to be written only, or not of this kind of cgroup
                    continue
    json.dump({name: found[name] for name in sorted(found) if len(found[name]) < 3000}, sys.stdout, indent=0)


main(sys.argv[1])
