"""Hosts to collect from that are real sshd servers on this machine, each with a key, a home and logs of its own.

Each has an address of 127/8, all the same port; a host key that `known_hosts` pins by the host's name, as provisioning
does; and `~` and its logs below the folder given. Log-in is by key as the user who runs this, whose the logs are, so
the inventory sets `ansible_become: false`: what sudo costs a task on a host is not in what is measured.

Nor are systemd and the journal: where systemd is not process 1, `systemctl show` and `journalctl` answer nothing, and
at once. Needs openssh-server; the system's own sshd need not run.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from plimsoll.hostkeys import HostKeys, ssh_arguments

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "roles" / "rss_sampler" / "files"))
import rss_sampler  # noqa: E402 - found by the line above

PATIENCE_S = 30.0
HOUR, DAY = 3600, 86400
PRIVILEGE_SEPARATION = Path("/run/sshd")

CONFIG = """
ListenAddress {address}:{port}
HostKey {key}
AuthorizedKeysFile {authorized}
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
PrintLastLog no
SetEnv HOME={home}
Subsystem sftp /usr/lib/openssh/sftp-server
"""


@dataclass(frozen=True)
class Host:
    """One of them. home has `log`, its /var/log/plimsoll, and `outbox`."""

    name: str
    address: str
    home: Path

    @property
    def logs(self) -> Path:
        return self.home / "log"


@dataclass(frozen=True)
class Masters:
    """What the ssh of open connections has taken: s of CPU, and KiB that it holds (PSS), all together."""

    cpu: float
    pss_kb: int


class Fleet:
    """The hosts and how they are reached; an inventory with all of them in celery_workers."""

    def __init__(self, folder: Path, number: int) -> None:
        """Makes keys and configurations, and starts nothing. folder's name is to be short: sockets are below it."""
        self.folder, self.connections, self.servers = folder, folder / "cp", list[psutil.Popen]()
        self.hosts = [
            Host(f"host{at:03}", f"127.100.{at // 250}.{at % 250 + 1}", folder / f"host{at:03}") for at in range(number)
        ]
        with socket.create_server(("", 0)) as free:
            self.port = free.getsockname()[1]
        keys = HostKeys(folder / "keys")
        keys.prepare([one.name for one in self.hosts], ())
        self.known_hosts, self.key = keys.known_hosts, folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        self.connections.mkdir(mode=0o700)
        for host in self.hosts:
            host.logs.mkdir(parents=True)
            config = CONFIG.format(
                address=host.address,
                port=self.port,
                key=folder / "keys" / "hostkeys" / host.name,
                authorized=self.key.with_suffix(".pub"),
                home=host.home,
            )
            (host.home / "sshd_config").write_text(config)
        self.inventory = folder / "inventory.json"
        self.inventory.write_text(
            json.dumps({"celery_workers": {"hosts": {one.name: self._of(one) for one in self.hosts}}})
        )

    def _of(self, host: Host) -> dict[str, object]:
        return {
            "ansible_host": host.address,
            "ansible_port": self.port,
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": shlex.join(self.options(host)),
            "ansible_become": False,
            "collect_logs": str(host.logs),
            "collect_remote_bundle": str(host.home / "outbox" / "bundle.tar.gz"),
        }

    def options(self, host: Host) -> list[str]:
        """Of ssh: this host by its own key, and nothing of the user's own configuration."""
        return ["-F", "/dev/null", *shlex.split(ssh_arguments(host.name, self.known_hosts))]

    def ssh(self, host: Host, command: str) -> list[str]:
        """The command line that runs a command on the host, over a connection of its own."""
        at = ["-o", "BatchMode=yes", "-i", str(self.key), "-p", str(self.port), host.address]
        return ["ssh", *self.options(host), *at, command]

    def start(self) -> None:
        """Raises SystemExit where an sshd does not answer."""
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
        if not program:
            raise SystemExit("sshd is not on PATH nor in /usr/sbin: apt install openssh-server")
        if os.geteuid() == 0:
            # Debian's unit makes it, where that runs.
            PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
        for host in self.hosts:
            with (host.home / "sshd.log").open("w") as log:
                command = [program, "-D", "-e", "-f", str(host.home / "sshd_config")]
                self.servers.append(psutil.Popen(command, stdin=subprocess.DEVNULL, stderr=log))
        deadline = time.monotonic() + PATIENCE_S
        for host in self.hosts:
            while True:
                with contextlib.suppress(OSError), socket.create_connection((host.address, self.port), 5) as stream:
                    if stream.recv(4) == b"SSH-":
                        break
                if time.monotonic() > deadline:
                    raise SystemExit(f"{host.name}: no sshd: {(host.home / 'sshd.log').read_text().strip()}")
                time.sleep(0.05)

    def cpu(self) -> float:
        """s of CPU of the hosts: of their servers and all that ended below them. hang_up() before, to miss nothing."""
        times = [one.cpu_times() for one in self.servers]
        return sum(one.user + one.system + one.children_user + one.children_system for one in times)

    def hang_up(self) -> Masters:
        """End the connections that Ansible keeps open, so that the next run begins as the first one did."""
        sockets = list(self.connections.iterdir())
        # Of all before the first one ends: what they share would be more of the others then.
        masters = list(map(master, sockets))
        for path in sockets:
            tell(path, "exit")
        deadline = time.monotonic() + PATIENCE_S
        while any(one.children() for one in self.servers):
            if time.monotonic() > deadline:
                raise SystemExit("a connection does not end")
            time.sleep(0.05)
        return Masters(sum(one.cpu for one in masters), sum(one.pss_kb for one in masters))

    def stop(self) -> None:
        """End the servers, and what they have started; their connections end by that."""
        below = [each for one in self.servers for each in one.children(recursive=True)]
        for one in [*self.servers, *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        for one in self.servers:
            one.wait()


def tell(path: Path, what: str) -> str:
    """What the master with this socket says to a command of ssh -O."""
    return subprocess.run(["ssh", "-O", what, "-S", str(path), "host"], capture_output=True, text=True).stderr


def master(path: Path) -> Masters:
    """What the one with this socket has taken; nothing where it has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if pid := re.search(r"pid=(\d+)", tell(path, "check")):
            process = psutil.Process(int(pid[1]))
            times = process.cpu_times()
            return Masters(times.user + times.system, process.memory_full_info().pss // 1024)
    return Masters(0.0, 0)


# ---- what they have written ----


@dataclass(frozen=True)
class Logs:
    """Of a host whose units have the same number of processes each: samples and figures of the last hours, a segment
    each, and rollups and units of the last days, one each; records of a process and acts of the guard besides.

    zipped: the segments that are over, as the sampler leaves them.
    """

    hours: int
    days: int
    units: int = 4
    processes: int = 8
    zipped: bool = True

    def write(self, root: Path, now: float, seed: int = 0) -> list[Path]:
        """The files, which end at now, Unix s. What is there is written over."""
        rng = random.Random(seed)
        names = [f"celery-worker@queue{at}.service" for at in range(self.units)]
        started = now - max(self.days * DAY, self.hours * HOUR) - 60
        workers = [(1000 + 17 * at, names[at % self.units]) for at in range(self.units * self.processes)]

        def sizes(when: float, spread_kb: int) -> list[int]:
            """KiB of each: what comes and goes, and of every tenth seed 2 MiB more an hour in the first unit."""
            grown = int(2048 * (when - started) / HOUR) * (seed % 10 == 0)
            spikes = rng.choices(range(0, spread_kb, 4), k=len(workers))
            return [
                60_000 + 52 * pid + grown * (name == names[0]) + spike for (pid, name), spike in zip(workers, spikes)
            ]

        def tasks(when: float) -> list[int]:
            done = int(when - started)
            return [
                done * (pid % 13) // 13 + more for (pid, _), more in zip(workers, rng.choices(range(9), k=len(workers)))
            ]

        def figures(when: float) -> list[str]:
            levels = rng.choices(range(600_000, 700_000, 4), k=len(names))
            return [
                f"{when:.3f},{name},{level},1048576,1310720,0,3,0,0,{int(when) % 10**6},0,0"
                for name, level in zip(names, levels)
            ]

        def samples(when: float) -> list[str]:
            return [
                f"{when:.3f},{pid},{size},/opt/celery/venv/bin/celery -A shop worker -Q {name[14:-8]},{name},"
                f"{started:.2f},child,,,0,,,{done}"
                for (pid, name), size, done in zip(workers, sizes(when, 20_000), tasks(when))
            ]

        def rollups(when: float) -> list[str]:
            return [
                f"{when:.0f},{pid},{name},{started:.2f},child,10,{size},{size + size % 9001},{size + 19_000},{done}"
                for (pid, name), size, done in zip(workers, sizes(when, 1000), tasks(when))
            ]

        kinds = (
            ("samples", rss_sampler.SAMPLE_COLUMNS, HOUR, 60, self.hours, samples),
            ("cgroup", rss_sampler.CGROUP_COLUMNS, HOUR, 60, self.hours, figures),
            ("rollup", rss_sampler.ROLLUP_COLUMNS, DAY, 600, self.days, rollups),
            ("units", rss_sampler.CGROUP_COLUMNS, DAY, 600, self.days, figures),
        )
        files = []
        for kind, columns, span, every, number, lines in kinds:
            newest = int(now) // span * span
            for begin in range(newest - (number - 1) * span, newest + 1, span):
                text = [
                    columns,
                    *(line for when in range(begin, min(begin + span, int(now)), every) for line in lines(when)),
                ]
                content = "".join(f"{line}\n" for line in text).encode()
                path = root / "samples" / f"{kind}-{rss_sampler.stamp(begin)}.csv"
                if self.zipped and begin < newest:
                    path, content = path.with_name(f"{path.name}.gz"), gzip.compress(content, rss_sampler.GZIP_LEVEL)
                files.append((path, content))
        record = {"unit": names[0], "pid": workers[0][0], "kind": "task_growth", "task": "shop.invoice", "measured": 50}
        acts = {"unit": names[0], "action": "restart", "reason": "it is at 92 % of MemoryHigh", "level_kb": 964_000}
        for path, kept, number in (
            (root / "trace" / f"{names[0]}-{workers[0][0]}.jsonl", record, 1000),
            (root / "guard" / "acts.jsonl", acts, 20),
        ):
            records = [
                json.dumps({"time": round(now - 60 * (number - at), 2), **kept, "count": at, "rss_growth_kb": at * 12})
                for at in range(number)
            ]
            files.append((path, "".join(f"{one}\n" for one in records).encode()))
        for path, content in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return [path for path, _ in files]


@contextlib.contextmanager
def running(folder: Path, number: int) -> Iterator[Fleet]:
    fleet = Fleet(folder, number)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()
