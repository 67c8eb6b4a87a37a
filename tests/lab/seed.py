"""First-boot data of a guest: the part of cloud-init that plimsoll uses, rendered on this side as a tar of files.

Understood from a #cloud-config: hostname, ssh_authorized_keys, ssh_keys (ed25519), write_files (path, content,
permissions), runcmd. Other keys are refused, so that nothing passes in the lab that it did not do.
"""

from __future__ import annotations

import io
import shlex
import tarfile
from typing import Any

import yaml

from .driver import DriverError, VMSpec

# ssh_deletekeys: the image has no host keys to delete. fqdn: /etc/hosts carries the hostname.
IGNORED = {"ssh_deletekeys", "fqdn", "preserve_hostname", "manage_etc_hosts", "disable_root"}


def files(spec: VMSpec) -> dict[str, tuple[int, str]]:
    """Path (relative to /) to (mode, text) of every file that the first boot lays down. Raises DriverError."""
    config = _cloud_config(spec.user_data)
    unknown = set(config) - IGNORED - {"hostname", "ssh_authorized_keys", "ssh_keys", "write_files", "runcmd"}
    if unknown:
        raise DriverError(f"user_data of {spec.label}: the lab's first boot does not know {', '.join(sorted(unknown))}")
    hostname = config.get("hostname", spec.label)
    keys = [*spec.authorized_keys, *config.get("ssh_authorized_keys", [])]
    out = {
        "etc/hostname": (0o644, f"{hostname}\n"),
        "etc/hosts": (0o644, f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n"),
        "root/.ssh/authorized_keys": (0o600, "".join(f"{key.strip()}\n" for key in keys)),
    }
    if spec.private_ipv4:
        out["etc/systemd/network/20-eth1.network"] = (
            0o644,
            f"[Match]\nName=eth1\n[Network]\nAddress={spec.private_ipv4}/17\nLinkLocalAddressing=no\n",
        )
    host_keys = config.get("ssh_keys", {})
    if "ed25519_private" in host_keys:
        out["etc/ssh/ssh_host_ed25519_key"] = (0o600, host_keys["ed25519_private"].rstrip("\n") + "\n")
        out["etc/ssh/ssh_host_ed25519_key.pub"] = (0o644, host_keys["ed25519_public"].rstrip("\n") + "\n")
    for entry in config.get("write_files", []):
        out[entry["path"].lstrip("/")] = (int(str(entry.get("permissions", "0644")), 8), entry["content"])
    if commands := config.get("runcmd"):
        lines = [command if isinstance(command, str) else shlex.join(command) for command in commands]
        out["var/lib/lab/runcmd"] = (0o700, "#!/bin/sh\n" + "".join(f"{line}\n" for line in lines))
    return out


def _cloud_config(user_data: str) -> dict[str, Any]:
    if not user_data:
        return {}
    if not user_data.startswith("#cloud-config"):
        raise DriverError("user_data: the lab's first boot understands a #cloud-config only")
    loaded = yaml.safe_load(user_data) or {}
    if not isinstance(loaded, dict):
        raise DriverError("user_data: a #cloud-config is a mapping")
    return loaded


def tar(spec: VMSpec) -> bytes:
    """The seed disk of a guest: an uncompressed tar, which the guest reads straight from its second disk."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        root_ssh = tarfile.TarInfo("root/.ssh")
        root_ssh.type, root_ssh.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(root_ssh)
        for path, (mode, text) in sorted(files(spec).items()):
            content = text.encode()
            member = tarfile.TarInfo(path)
            member.mode, member.size = mode, len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
