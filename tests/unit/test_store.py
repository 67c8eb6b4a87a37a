"""The store: one bad host costs the others nothing, keeps what it had, and is named with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plimsoll.bundle import listing, pack, sha256
from plimsoll.store import ingest


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def send(inbox: Path, host: str, line: str) -> dict[str, Any]:
    """A bundle as the host makes it; what ingest() is asked for it."""
    samples = inbox.parent / "hosts" / host / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    (samples / "samples-1.csv").write_text(f"{host} {line}\n")
    made = pack(listing(samples.parent, ("samples",))[0], b"{}\n", inbox / f"{host}.tar.gz", 1 << 20)
    return {"host": host, "sha256": made.sha256, "reason": ""}


def held(store: Path, host: str) -> str:
    return (store / host / "samples/samples-1.csv").read_text()


def test_one_bad_host_does_not_stop_the_others_and_keeps_what_it_had(inbox: Path, store: Path) -> None:
    hosts = ["first", "damaged", "swapped", "silent", "lost", "last"]
    assert all(host["collected"] for host in ingest(inbox, store, [send(inbox, host, "old") for host in hosts]))

    asked = {host: send(inbox, host, "new") for host in hosts}
    (inbox / "damaged.tar.gz").write_bytes(b"\x1b[2J no gzip")
    asked["damaged"]["sha256"] = sha256(inbox / "damaged.tar.gz")
    (inbox / "swapped.tar.gz").write_bytes((inbox / "first.tar.gz").read_bytes())
    asked["silent"] = {"host": "silent", "sha256": "", "reason": "unreachable: no route to host"}
    (inbox / "lost.tar.gz").unlink()
    told = ingest(inbox, store, list(asked.values()))

    assert [host for host in hosts if held(store, host) == f"{host} new\n"] == ["first", "last"]
    assert [host for host in hosts if held(store, host) == f"{host} old\n"] == hosts[1:-1]
    assert [host["host"] for host in told] == hosts
    assert [host["host"] for host in told if host["collected"]] == ["first", "last"]
    reasons = {host["host"]: host["reason"] for host in told}
    assert reasons["first"] == reasons["last"] == ""
    assert reasons["damaged"].startswith("bundle refused: it is truncated or damaged")
    assert reasons["swapped"].startswith("bundle refused: its checksum is not the one")
    assert reasons["silent"] == "unreachable: no route to host"
    assert reasons["lost"].startswith("bundle not unpacked: ") and "lost.tar.gz" in reasons["lost"]
    assert json.loads((store / "hosts.json").read_text()) == told
    assert sorted(path.name for path in store.iterdir()) == sorted([*hosts, "hosts.json"])


def test_a_host_that_never_answered_is_named_too(inbox: Path, store: Path) -> None:
    told = ingest(inbox, store, [{"host": "w-1", "reason": "no bundle", "sha256": ""}])
    assert told == [{"host": "w-1", "collected": False, "reason": "no bundle"}]
    assert json.loads((store / "hosts.json").read_text()) == told


def test_a_reason_is_one_line_that_is_fit_to_print(inbox: Path, store: Path) -> None:
    """The host had its part in it: a banner of ssh, the output of a module."""
    reason = "unreachable:\n  \x1b[31mgo\taway\x07 \x9b \udcff" + "!" * 1000
    (told,) = ingest(inbox, store, [{"host": "w-1", "reason": reason}])
    assert told["reason"].startswith("unreachable: [31mgo away !!!")
    assert told["reason"].isprintable() and len(told["reason"]) == 300
