"""The store: what collect brought, a directory a host, as `HOST/{meta.json,samples,trace}`, and hosts.json.

Each host's directory is what its newest bundle held. A host that could not be collected keeps what it had, and
hosts.json says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from .bundle import MAX_UNPACKED_BYTES, BundleError, unpack
from .files import write_whole
from .formats import InputError

HOSTS = "hosts.json"


class Host(TypedDict):
    """One host of a collection: reason is empty where it was collected."""

    host: str
    collected: bool
    reason: str


def ingest(
    inbox: Path, store: Path, asked: Sequence[dict[str, Any]], max_bytes: int = MAX_UNPACKED_BYTES
) -> list[Host]:
    """Unpack inbox/HOST.tar.gz for every host asked, and write store/hosts.json. max_bytes bounds one host, unpacked.

    asked holds `host`, and either `sha256` of its bundle or the `reason` why there is none. A bundle that cannot be
    trusted makes its host one that was not collected; the others go on.
    """
    hosts: list[Host] = []
    for one in asked:
        host, reason = str(one["host"]), str(one.get("reason") or "")
        if not reason:
            try:
                unpack(inbox / f"{host}.tar.gz", store / host, expected_sha256=str(one["sha256"]), max_bytes=max_bytes)
            except BundleError as error:
                reason = f"bundle refused: {error}"
            except OSError as error:
                reason = f"bundle not unpacked: {error}"
        hosts.append({"host": host, "collected": not reason, "reason": _line(reason)})
    store.mkdir(parents=True, exist_ok=True)
    write_whole(store / HOSTS, json.dumps(hosts, indent=1) + "\n")
    return hosts


def _line(reason: str) -> str:
    """One line that is fit to print: the host had its part in what Ansible says of it."""
    return " ".join("".join(char if char.isprintable() else " " for char in reason).split())[:300]


def read_hosts(store: Path) -> list[Host]:
    """What the last collection said of each host. Raises InputError where its file is damaged."""
    path = store / HOSTS
    try:
        listed = json.loads(path.read_text())
        return [
            {"host": str(one["host"]), "collected": bool(one["collected"]), "reason": str(one["reason"])}
            for one in listed
        ]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; collect again") from None
