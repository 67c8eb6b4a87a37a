"""The lab's disk image: a Debian as a Linode has it, built once and cached by a hash of what made it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

GUEST = Path(__file__).resolve().parent / "guest"
SUITE = "bookworm"
INSTALLED = (
    "linux-image-cloud-amd64",
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "openssh-server",
    "python3",
    "python3-apt",
    "iproute2",
    "hostname",
    "procps",
)
# Guests cannot reach Debian's mirrors. What the roles install with apt lies in the image as a local repository, so that
# the roles really install it.
REPOSITORY = (
    "redis-server",
    "rabbitmq-server",
    "python3-psutil",
    "python3-prometheus-client",
    "libjemalloc2",
    "prometheus",
    "prometheus-alertmanager",
)
DISK = "4G"
# Built by hand into the image; a change of this text changes the image's hash too.
SETUP = r"""
set -eu
root=$1
packages=$2
printf 'lab\n' > "$root/etc/hostname"
printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
printf '/dev/vda / ext4 rw,noatime 0 1\n' > "$root/etc/fstab"
rm -f "$root"/etc/ssh/ssh_host_*
printf 'PermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\n' \
    > "$root/etc/ssh/sshd_config.d/lab.conf"
printf '[Match]\nName=eth0\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nLinkLocalAddressing=no\n' \
    > "$root/etc/systemd/network/10-eth0.network"
install -m 0755 "$GUEST/lab-firstboot" "$root/usr/local/sbin/lab-firstboot"
install -m 0755 "$GUEST/cloud-init" "$root/usr/local/bin/cloud-init"
install -m 0644 "$GUEST/lab-firstboot.service" "$root/etc/systemd/system/lab-firstboot.service"
chroot "$root" systemctl --quiet enable systemd-networkd.service lab-firstboot.service
# An emulated guest has no time for housekeeping.
chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer getty.target systemd-networkd-wait-online.service
chroot "$root" apt-get clean
# shellcheck disable=SC2086
chroot "$root" apt-get install --quiet=2 --yes --no-install-recommends --download-only $packages
mkdir "$root/opt/lab-apt"
mv "$root"/var/cache/apt/archives/*.deb "$root/opt/lab-apt/"
(cd "$root/opt/lab-apt" && apt-ftparchive packages . > Packages)
rm -rf "$root"/etc/apt/sources.list.d/* "$root"/var/lib/apt/lists/*
printf 'deb [trusted=yes] file:/opt/lab-apt ./\n' > "$root/etc/apt/sources.list"
chroot "$root" apt-get update --quiet=2
"""


class ImageError(Exception):
    """The image could not be built; the message says at which step and where its log is."""


@dataclass(frozen=True)
class Image:
    """The three files that boot a guest."""

    disk: Path
    kernel: Path
    initrd: Path


def cache_dir() -> Path:
    """Images outlive a checkout: they lie in XDG_CACHE_HOME (default ~/.cache), under plimsoll/lab."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plimsoll" / "lab"


def recipe_hash() -> str:
    """12 hex digits over everything that decides what is in the image, but for the mirror's state."""
    digest = hashlib.sha256()
    for part in (SUITE, DISK, SETUP, *INSTALLED, *REPOSITORY):
        digest.update(part.encode() + b"\0")
    for file in sorted(GUEST.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cached() -> Image | None:
    """The image, when it is there whole."""
    home = cache_dir() / recipe_hash()
    image = Image(home / "disk.raw", home / "vmlinuz", home / "initrd")
    return image if all(file.exists() for file in (image.disk, image.kernel, image.initrd)) else None


def build() -> Image:
    """The image from the cache, or built with mmdebstrap (needs root and a Debian mirror; about a minute).

    Raises ImageError. The cache entry appears by one rename, so a build that is cut off leaves none.
    """
    if (image := cached()) is not None:
        return image
    home = cache_dir()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="build-") as scratch:
        work = Path(scratch)
        root, result, log = work / "root", work / "image", home / "build.log"
        setup = work / "setup"
        setup.write_text(SETUP)
        with log.open("wb") as out:

            def step(what: str, *command: str) -> None:
                ran = subprocess.run(command, stdout=out, stderr=out, env={**os.environ, "GUEST": str(GUEST)})
                if ran.returncode:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                    raise ImageError(f"{what} failed ({command[0]} exited {ran.returncode}); whole log: {log}\n{tail}")

            step(
                "building the guest's root file system",
                "mmdebstrap",
                "--variant=minbase",
                f"--include={','.join(INSTALLED)}",
                # The mirror's lists are still needed by the hook below, which empties them itself.
                "--skip=cleanup/apt/lists",
                f"--customize-hook=sh {setup} \"$1\" '{' '.join(REPOSITORY)}'",
                SUITE,
                str(root),
            )
            result.mkdir()
            kernel = next((root / "boot").glob("vmlinuz-*"))
            initrd = next((root / "boot").glob("initrd.img-*"))
            shutil.copyfile(kernel, result / "vmlinuz")
            shutil.copyfile(initrd, result / "initrd")
            step("making the disk", "truncate", f"--size={DISK}", str(result / "disk.raw"))
            step("making the disk", "mkfs.ext4", "-q", "-F", "-d", str(root), str(result / "disk.raw"))
        final = home / recipe_hash()
        shutil.rmtree(final, ignore_errors=True)  # an incomplete one: cached() said no
        result.rename(final)
    image = cached()
    assert image is not None
    return image
