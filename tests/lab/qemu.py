"""The VM driver: every instance of the lab is one QEMU process with real Debian, systemd and cgroup v2 inside.

State is on disk alone (one directory an instance: spec, disk overlay, seed, pid file, QMP socket, serial log), so a
server that is started again finds its machines as they are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from . import seed
from .driver import DriverError, VMSpec
from .image import Image

KERNEL_STARTS_WITHIN_S = 8.0  # a stock kernel prints its first line in under 2 s, emulated or not
BOOT_DEADLINE_S = 120.0
# TCG does AVX in software, and glibc and OpenSSL take the newest that there is: with "max", on QEMU 7.2, copying memory
# took 2 times as long, SHA-256 3 times, and to start Python 1.2 times.
CPUS = {"tcg": "Nehalem"}
SHUTDOWN_DEADLINE_S = 90.0
# Guests talk to one another over a virtual Ethernet: frames as multicast datagrams on the loopback interface.
PRIVATE_NETWORK, PRIVATE_NETWORK_PORT = "239.192.18.1", 41018


def accelerator(image: Image, cache: Path) -> str:
    """The fastest accelerator with which the kernel was seen to start: kvm, hvf or tcg.

    /dev/kvm may open, and even make a virtual machine, and yet run no stock kernel (nested virtualisation), so only a
    boot proves it. Remembered in `cache` until this machine boots again.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    here = boot_id.read_text().strip() if boot_id.exists() else "unknown"
    if cache.exists():
        known = json.loads(cache.read_text())
        if known["boot_id"] == here:
            return str(known["accelerator"])
    candidates = [name for name, node in (("kvm", "/dev/kvm"),) if os.access(node, os.W_OK)]
    if os.uname().sysname == "Darwin":
        candidates.append("hvf")
    found = next((name for name in candidates if _kernel_starts(image, name)), "tcg")
    cache.write_text(json.dumps({"boot_id": here, "accelerator": found}))
    return found


def _kernel_starts(image: Image, accelerator: str) -> bool:
    command = [
        "qemu-system-x86_64",
        "-accel",
        accelerator,
        "-cpu",
        "max",
        "-m",
        "256",
        "-display",
        "none",
        "-net",
        "none",
    ]
    command += ["-no-reboot", "-serial", "stdio", "-kernel", str(image.kernel), "-append", "console=ttyS0 panic=-1"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        seen, deadline = b"", time.monotonic() + KERNEL_STARTS_WITHIN_S
        while time.monotonic() < deadline and process.poll() is None and b"Linux version" not in seen:
            time.sleep(0.1)
            seen += process.stdout.read() or b""
        process.kill()
    return b"Linux version" in seen


class Machines:
    """The machines under a directory, one directory each, whatever image they were made of."""

    def __init__(self, home: Path) -> None:
        self._home = home
        home.mkdir(parents=True, exist_ok=True)

    def shutdown(self, instance_id: int) -> None:
        """Press the power button; a guest that ignores it for SHUTDOWN_DEADLINE_S loses its power."""
        if (pid := self._pid(instance_id)) is None:
            return
        self._qmp(instance_id, "system_powerdown")
        if not _ended(pid, SHUTDOWN_DEADLINE_S):
            self._power_off(instance_id)

    def delete(self, instance_id: int) -> None:
        """Stop the machine at once and remove its disk."""
        self._power_off(instance_id)
        shutil.rmtree(self._dir(instance_id), ignore_errors=True)

    def state(self, instance_id: int) -> str:
        """running, stopped or absent, as the machine is now."""
        if self._pid(instance_id) is not None:
            return "running"
        return "stopped" if (self._dir(instance_id) / "spec.json").exists() else "absent"

    def instances(self) -> list[int]:
        """Ids of every machine that has a directory, running or not."""
        return sorted(int(path.name) for path in self._home.iterdir() if path.name.isdigit())

    def _dir(self, instance_id: int) -> Path:
        return self._home / str(instance_id)

    def _pid(self, instance_id: int) -> int | None:
        """The pid of this machine's QEMU while it lives: a pid used again by another program is not taken for it."""
        try:
            pid = int((self._dir(instance_id) / "pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if f"plimsoll-lab-{instance_id}".encode() in command else None

    def _power_off(self, instance_id: int) -> None:
        if (pid := self._pid(instance_id)) is not None:
            os.kill(pid, signal.SIGTERM)
            if not _ended(pid, 10):
                os.kill(pid, signal.SIGKILL)
                _ended(pid, 10)

    def _qmp(self, instance_id: int, command: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self._dir(instance_id) / "qmp"))
            stream = connection.makefile("rw")
            stream.readline()
            for name in ("qmp_capabilities", command):
                stream.write(json.dumps({"execute": name}) + "\n")
                stream.flush()
                stream.readline()


class QemuDriver(Machines):
    """Driver of tests/lab/driver.py on QEMU. `home` holds a directory an instance.

    network tells labs on one machine apart, 0 to 249.
    """

    def __init__(self, home: Path, image: Image, network: int = 0) -> None:
        super().__init__(home)
        self._image = image
        self._private = f"{PRIVATE_NETWORK}:{PRIVATE_NETWORK_PORT + network}"
        self.accelerator = accelerator(image, home / "accelerator.json")

    def create(self, spec: VMSpec) -> None:
        """Lay down the disk overlay and the seed. Raises DriverError when the metadata asks for what is not there."""
        files = seed.tar(spec)
        home = self._dir(spec.instance_id)
        home.mkdir(parents=True, exist_ok=True)
        # virtio-blk wants whole sectors; tar pads its own end, and zeros after it are its end mark.
        (home / "seed.tar").write_bytes(files + b"\0" * (-len(files) % 512))
        (home / "seed.tar").chmod(0o600)
        _run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            str(self._image.disk),
            str(home / "disk.qcow2"),
        )
        (home / "spec.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(spec, user_data=""))))

    def resize(self, instance_id: int, memory_mb: int, vcpus: int) -> None:
        """Other memory and CPUs from the next boot on; the disk is as large as every disk here, whatever the type."""
        if self.state(instance_id) == "running":
            raise DriverError(f"instance {instance_id} is running: its memory and CPUs are set at boot")
        spec = self._spec(instance_id) | {"memory_mb": memory_mb, "vcpus": vcpus}
        (self._dir(instance_id) / "spec.json").write_text(json.dumps(spec))

    def boot(self, instance_id: int) -> None:
        """Start the machine and return when its kernel runs; sshd answers some seconds later, as on a Linode."""
        home = self._dir(instance_id)
        if self.state(instance_id) == "running":
            return
        spec = self._spec(instance_id)
        serial = home / "serial.log"
        serial.unlink(missing_ok=True)
        network = ["-netdev", f"user,id=public,restrict=off,ipv6=off,hostfwd=tcp:{spec['public_ipv4']}:22-:22"]
        network += ["-device", f"virtio-net-pci,netdev=public,mac={_mac(0, instance_id)},romfile="]
        if spec["private_ipv4"]:
            network += ["-netdev", f"socket,id=private,mcast={self._private},localaddr=127.0.0.1"]
            network += ["-device", f"virtio-net-pci,netdev=private,mac={_mac(1, instance_id)},romfile="]
        _run(
            "qemu-system-x86_64",
            *("-name", f"plimsoll-lab-{instance_id}", "-accel", self.accelerator),
            *("-cpu", CPUS.get(self.accelerator, "max")),
            *("-m", str(spec["memory_mb"]), "-smp", str(spec["vcpus"]), "-display", "none", "-no-user-config"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
            *("-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off quiet loglevel=5"),
            *("-drive", f"file={home / 'disk.qcow2'},if=virtio,format=qcow2,cache=unsafe"),
            *("-drive", f"file={home / 'seed.tar'},if=virtio,format=raw,readonly=on"),
            *network,
            *("-device", "virtio-rng-pci", "-serial", f"file:{serial}", "-monitor", "none"),
            *("-qmp", f"unix:{home / 'qmp'},server=on,wait=off"),
            *("-daemonize", "-pidfile", str(home / "pid")),
        )
        deadline = time.monotonic() + BOOT_DEADLINE_S
        while not (serial.exists() and serial.stat().st_size):
            if self.state(instance_id) != "running":
                raise DriverError(f"{spec['label']}: QEMU ended while booting; see {serial}")
            if time.monotonic() > deadline:
                raise DriverError(
                    f"{spec['label']}: nothing on the serial console in {BOOT_DEADLINE_S:.0f} s; see {serial}"
                )
            time.sleep(0.2)

    def _spec(self, instance_id: int) -> dict[str, Any]:
        path = self._dir(instance_id) / "spec.json"
        if not path.exists():
            raise DriverError(f"instance {instance_id} has no disk in {path.parent}")
        return dict(json.loads(path.read_text()))


def _mac(network: int, instance_id: int) -> str:
    return f"52:54:00:{network:02x}:{instance_id >> 8 & 255:02x}:{instance_id & 255:02x}"


def _ended(pid: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def _run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise DriverError(f"{command[0]}: {ran.stderr.strip() or f'exited {ran.returncode}'}")
