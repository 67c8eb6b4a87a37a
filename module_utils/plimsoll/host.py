"""What a host offers for bounding workers: memory, cgroup version, pressure figures, systemd. For hosts, Python 3.9."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .release import current, installed_releases

# 247 is Debian 11's: the oldest that knows every key of the units that is written without a condition.
OLDEST_SYSTEMD = 247
WORKERS = Path("/etc/systemd/system")
_DROPIN = re.compile(r"celery-worker@(.+)\.service\.d")


@dataclass(frozen=True)
class Host:
    """memory in bytes; cgroup 0 (none), 1 or 2; systemd's version, 0 where the host's first process is another.

    others: MemoryMax in bytes by unit, of brokers on the host; workers: those that a former run installed.
    beat: whether celery-beat is installed; releases: digests of the application's that are installed whole, of which
    release is the one that runs, empty for none.
    """

    memory: int
    cgroup: int
    memory_controller: bool
    psi: bool
    init: str
    systemd: int
    python_version: str
    machine: str
    others: Mapping[str, int]
    workers: tuple[str, ...]
    beat: bool = False
    releases: tuple[str, ...] = ()
    release: str = ""

    def as_data(self) -> dict[str, Any]:
        listed = {name: list(value) for name, value in vars(self).items() if isinstance(value, tuple)}
        return {**vars(self), **listed, "others": dict(self.others)}


def read(home: Path, root: Path = Path("/"), systemctl: str = "systemctl") -> Host:
    """This host; home is where its releases are. Raises OSError where /proc is not to be read."""
    meminfo = (root / "proc/meminfo").read_text()
    total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    if total is None:
        raise OSError(f"{root / 'proc/meminfo'}: no MemTotal in it")
    under_home = root / home.relative_to("/")
    init = (root / "proc/1/comm").read_text().strip()
    controllers = root / "sys/fs/cgroup/cgroup.controllers"
    unified = controllers.exists()
    named = controllers.read_text().split() if unified else []
    legacy = (root / "sys/fs/cgroup/memory").is_dir()
    found = (_DROPIN.fullmatch(path.parent.name) for path in (root / WORKERS.relative_to("/")).glob("*/10-worker.conf"))
    return Host(
        memory=int(total[1]) << 10,
        cgroup=2 if unified else 1 if (root / "sys/fs/cgroup").is_dir() else 0,
        memory_controller="memory" in named if unified else legacy,
        psi=(root / "proc/pressure/memory").exists(),
        init=init,
        systemd=_version(systemctl) if init == "systemd" else 0,
        python_version=platform.python_version(),
        machine=platform.machine(),
        others=_promised(systemctl) if init == "systemd" else {},
        workers=tuple(sorted(one[1] for one in found if one)),
        beat=(root / WORKERS.relative_to("/") / "celery-beat.service").exists(),
        releases=installed_releases(under_home),
        release=current(under_home) or "",
    )


def _version(systemctl: str) -> int:
    said = subprocess.run([systemctl, "--version"], capture_output=True, text=True).stdout
    number = re.match(r"systemd (\d+)", said)
    return int(number[1]) if number else 0


def _promised(systemctl: str) -> dict[str, int]:
    """MemoryMax of the brokers' units, where they are installed and have one."""
    units = ["redis-server.service", "rabbitmq-server.service"]
    shown = subprocess.run(
        [systemctl, "show", "--property=Id,LoadState,UnitFileState,MemoryMax", "--", *units],
        capture_output=True,
        text=True,
    ).stdout
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in shown.split("\n\n")]
    return {
        one["Id"]: int(one["MemoryMax"])
        for one in blocks
        if one.get("UnitFileState") == "enabled"
        and one.get("MemoryMax", "").isdigit()
        # Before cgroup v2, "no limit" is a number of 64 bits.
        and int(one["MemoryMax"]) < 1 << 60
    }


def wrong(host: Host, cgroup_v1: bool, guard: bool = False, pressure: bool = False) -> list[str]:
    """Why workers cannot be bounded on this host, a sentence each that says what holds and the way out.

    cgroup_v1: whether the user accepts what is left of the limits there. guard: whether the memory guard is to run, and
    pressure: whether it is to go by PSI too.
    """
    if host.init != "systemd":
        return [f"this host runs {host.init}; the limits of the workers are systemd's"]
    found = []
    if host.systemd < OLDEST_SYSTEMD:
        found.append(f"this host has systemd {host.systemd or 'of an unknown version'}; {OLDEST_SYSTEMD} is the oldest")
    if host.cgroup == 1 and not cgroup_v1:
        found.append(
            "this host is on cgroup v1: there MemoryMax, TasksMax, CPUWeight, restarts, the watchdog and the sampler"
            " hold, and MemoryHigh, MemorySwapMax, OOMPolicy=kill as one kill, PSI and the guard do"
            " not; boot it with systemd.unified_cgroup_hierarchy=1, or set celery_worker_cgroup_v1: true and"
            ' rss_sampler_guard: "off" to go without'
        )
    elif host.cgroup == 1 and guard:
        found.append(
            'this host is on cgroup v1, where the memory guard sees nothing: set rss_sampler_guard: "off" for it;'
            " MemoryMax alone holds there, and kills a worker in its tasks"
        )
    elif guard and pressure and not host.psi:
        found.append(
            "this kernel tells no pressure (PSI): boot it with psi=1, or set rss_sampler_guard_pressure: 0, with which"
            " the guard goes by MemoryHigh alone; all limits hold without it"
        )
    if not host.memory_controller:
        found.append(
            "this kernel's memory controller is off, so that no memory limit holds: take cgroup_disable=memory off the"
            " kernel's command line (Debian for ARM: add cgroup_enable=memory)"
        )
    if tuple(int(part) for part in re.findall(r"\d+", host.python_version)[:2]) < (3, 9):
        found.append(f"this host's Python is {host.python_version}; 3.9 or later is needed")
    return found
