"""What of the lab's machines can be tested without booting one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from . import image, qemu
from .driver import DriverError, VMSpec

SPEC = VMSpec(1, "demo-1", 1024, 1, "linode/debian12", "127.18.0.1", None, ("ssh-ed25519 AAAA",), "")


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> qemu.QemuDriver:
    """The driver, whose commands are left out but for the disk that qemu-img would make."""
    monkeypatch.setattr(qemu, "accelerator", lambda *_: "tcg")
    monkeypatch.setattr(qemu, "_run", lambda *command: Path(command[-1]).write_text("a new disk"))
    return qemu.QemuDriver(tmp_path, image.Image(tmp_path / "disk.raw", tmp_path / "vmlinuz", tmp_path / "initrd"))


def test_a_resized_machine_keeps_its_disk_and_a_rebuilt_one_does_not(machines: qemu.QemuDriver, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="no disk"):
        machines.resize(1, 4096, 2)
    machines.create(SPEC)
    disk, spec = tmp_path / "1" / "disk.qcow2", tmp_path / "1" / "spec.json"
    disk.write_text("used")
    machines.resize(1, 4096, 2)
    kept = json.loads(spec.read_text())
    assert (kept["memory_mb"], kept["vcpus"], kept["label"]) == (4096, 2, "demo-1")
    assert disk.read_text() == "used"
    machines.delete(1)
    machines.create(SPEC)
    assert disk.read_text() == "a new disk"


@pytest.mark.parametrize("words", [["status", "--wait"], ["status"], ["status", "--wait", "--format", "json"]])
def test_a_guest_says_that_its_first_boot_is_done(tmp_path: Path, words: list[str]) -> None:
    script = (image.GUEST / "cloud-init").read_text().replace("/var/lib/lab", str(tmp_path))
    (tmp_path / "firstboot-done").touch()
    ran = subprocess.run(["sh", "-c", script, "cloud-init", *words], capture_output=True, text=True, timeout=10)
    said = json.loads(ran.stdout)["status"] if "json" in words else ran.stdout.removeprefix("status: ").strip()
    assert (ran.returncode, said) == (0, "done")


def test_a_guest_says_that_it_waits_and_that_it_waited_in_vain(tmp_path: Path) -> None:
    script = (image.GUEST / "cloud-init").read_text().replace("/var/lib/lab", str(tmp_path))
    in_vain = script.replace("left=300", "left=1")
    running = subprocess.run(["sh", "-c", script, "cloud-init", "status"], capture_output=True, text=True)
    assert (running.returncode, running.stdout) == (0, "status: running\n")
    failed = subprocess.run(["sh", "-c", in_vain, "cloud-init", "status", "--wait"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "status: error\n")
    assert subprocess.run(["sh", "-c", script, "cloud-init", "clean"], capture_output=True).returncode == 2
