"""What an instance is given at its first boot: whose SSH keys may log in, and its cloud-config."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

USER_DATA_MAX_BYTES = 65535
_PUBLIC_KEY = re.compile(r"(?:ssh-|ecdsa-|sk-)\S+ [A-Za-z0-9+/=]+(?: .*)?")
_OURS = ("hostname", "fqdn", "preserve_hostname", "ssh_deletekeys", "ssh_keys")


def read_keys(entries: Iterable[str]) -> tuple[str, ...]:
    """Public keys out of a list of keys and of paths of files with one key a line. Raises ValueError, OSError."""
    keys: list[str] = []
    for entry in entries:
        text = entry.strip()
        lines = [text] if _PUBLIC_KEY.fullmatch(text) else Path(text).expanduser().read_text().splitlines()
        for line in (line.strip() for line in lines):
            if line and not line.startswith("#"):
                if not _PUBLIC_KEY.fullmatch(line):
                    raise ValueError(f"authorized_keys: {text} holds a line that is no public key (give the .pub file)")
                keys.append(line)
    return tuple(dict.fromkeys(keys))


def cloud_config(text: str) -> dict[str, Any]:
    """The user's own cloud-config as a mapping; empty text gives an empty one. Raises ValueError."""
    if not text.strip():
        return {}
    if text.split("\n", 1)[0].strip() != "#cloud-config":
        raise ValueError("user_data: the first line must be #cloud-config; it is merged with what pins the host key")
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # The problem and its place, and no excerpt: user_data may hold secrets.
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"user_data: no valid YAML: {getattr(error, 'problem', 'unreadable')}{at}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError("user_data: a cloud-config is a mapping")
    if taken := [key for key in _OURS if key in loaded]:
        raise ValueError(f"user_data: {', '.join(taken)} is plimsoll's to set: it names each host and pins its SSH key")
    return loaded


def user_data(label: str, private_key: str, public_key: str, extra: str = "") -> str:
    """The cloud-config of one instance: its name, its only SSH host key, and the user's own. Raises ValueError."""
    ours = {
        "hostname": label,
        "fqdn": label,
        "preserve_hostname": False,
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": private_key, "ed25519_public": public_key},
    }
    text = "#cloud-config\n" + yaml.safe_dump({**ours, **cloud_config(extra)}, sort_keys=False)
    if len(text.encode()) > USER_DATA_MAX_BYTES:
        raise ValueError(f"user_data: {len(text.encode())} bytes with the host key, Linode takes {USER_DATA_MAX_BYTES}")
    return text


def encoded(text: str) -> dict[str, str]:
    """The `metadata` of a request, as the API wants it."""
    return {"user_data": base64.b64encode(text.encode()).decode()}
