"""Record the cgroup of one unit of this host as JSON, for tests/unit/test_rss_sampler.py: path below ROOT to contents.

    python3 record.py celery-worker@gate.service >cgroup_v2.json

cgroup_v1.json comes from Linux 6.18 with v1 hierarchies: a unit's directory by hand, MemoryMax 64 MiB, 96 MiB with swap
(memsw), in which a process was killed at the limit and another sleeps. cgroup_v2.json comes from Debian 12 (Linux 6.1,
systemd 252): a prefork worker of two children with MemoryHigh 280 MiB, some of it reclaimed and swapped out.
"""

import json
import sys
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def main(unit):
    found = {}
    for path in sorted([*ROOT.glob("*"), *ROOT.rglob(f"{unit}/**/*")]):
        try:
            text = path.read_text()
        except OSError:  # a directory, one to be written only, or not of this kind of cgroup
            continue
        if len(text) < 3000:
            found[str(path.relative_to(ROOT))] = text
    json.dump(found, sys.stdout, indent=0)


main(sys.argv[1])
