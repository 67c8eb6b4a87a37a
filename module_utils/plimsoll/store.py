"""The store: what collect brought, a directory a host, as `HOST/{meta.json,samples,trace}`, and hosts.json.

Each host's directory is what its newest bundle held. A host that could not be collected keeps what it had, and
hosts.json says so.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from .bundle import BundleError, unpack


class Host(TypedDict):
    """One host of a collection: reason is empty where it was collected."""

    host: str
    collected: bool
    reason: str


def ingest(inbox: Path, store: Path, asked: Sequence[dict[str, Any]]) -> list[Host]:
    """Unpack inbox/HOST.tar.gz for every host asked, and write store/hosts.json.

    asked holds `host`, and either `sha256` of its bundle or the `reason` why there is none. A bundle that cannot be
    trusted makes its host one that was not collected; the others go on.
    """
    hosts: list[Host] = []
    for one in asked:
        host, reason = str(one["host"]), str(one.get("reason") or "")
        if not reason:
            try:
                unpack(inbox / f"{host}.tar.gz", store / host, expected_sha256=str(one["sha256"]))
            except BundleError as error:
                reason = f"bundle refused: {error}"
            except OSError as error:
                reason = f"bundle not unpacked: {error}"
        hosts.append({"host": host, "collected": not reason, "reason": " ".join(reason.split())[:300]})
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=store, prefix=".hosts.", delete=False) as scratch:
        json.dump(hosts, scratch, indent=1)
    os.replace(scratch.name, store / "hosts.json")
    return hosts
