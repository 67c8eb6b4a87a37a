"""A machine of its own out of this one: systemd as PID 1 in namespaces, over an overlay of this machine's files.

It boots in a second, runs at full speed, and what is written in it is gone with it. Network and CPU are this machine's;
there is no memory controller where this machine's is on cgroup v1. Needs root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60
# $1 is a directory for the overlay, $2 one that is this machine's inside too, under the same name, and $3 one that has
# to be there: an overlay has nothing of what is mounted below its files.
BOOT = r"""
set -e
mount --make-rprivate /
mount -t tmpfs -o size=4g upper "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" root "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs cgroups sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=755 dev dev
for node in 'null 1 3' 'zero 1 5' 'full 1 7' 'random 1 8' 'urandom 1 9' 'tty 5 0'; do
    set -- $node "$@"
    mknod -m 666 "dev/$1" c "$2" "$3"
    shift 3
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs shm dev/shm
mkdir -p ".$2" ".$3"
mount --bind "$2" ".$2"
[ -n "$(ls -A ".$3")" ] || mount --bind "$3" ".$3"
# Nothing of this machine's own starts.
rm -rf etc/systemd/system/*.wants usr/lib/systemd/system/*.wants
mkdir -p etc/systemd/system
hostname control-1
mount --make-rshared "$1"
export container=plimsoll
exec chroot . /usr/lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=no
"""


@dataclass
class Machine:
    """pid is that of its PID 1."""

    pid: int

    def run(self, command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """A command of bash in it, as root, with this machine's environment; both its outputs are in stdout."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd"]
        return subprocess.run(
            [*enter, "bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def on(self, command: str, timeout: float = 300) -> str:
        """What a command says, which must end well."""
        ran = self.run(command, timeout)
        assert ran.returncode == 0, ran.stdout
        return ran.stdout


@contextmanager
def machine(overlay: Path, shared: Path) -> Iterator[Machine]:
    """One that runs. shared is this machine's in it, too. Raises AssertionError where it does not boot."""
    with (shared / "boot.log").open("w") as log:
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"]
        process = subprocess.Popen(
            [*unshare, "bash", "-c", BOOT, "boot", str(overlay), str(shared), str(ROOT)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    try:
        yield Machine(_booted(process.pid, shared / "boot.log"))
    finally:
        # With its PID 1, all that is in it ends, and its mounts are gone.
        process.send_signal(signal.SIGKILL)
        process.wait()


def _booted(pid: int, log: Path) -> int:
    """Its PID 1, once systemd says that it is up."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        for child in children.read_text().split() if children.exists() else []:
            one = Machine(int(child))
            ran = one.run("readlink /proc/1/exe; systemctl is-active basic.target")
            if ran.stdout.split()[-1:] == ["active"] and "systemd" in ran.stdout:
                return one.pid
        time.sleep(0.2)
    raise AssertionError(f"no systemd in {PATIENCE_S} s: {log.read_text()}")
