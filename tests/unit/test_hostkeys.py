"""Host keys: made once, pinned before use, gone with their host, and taken by ssh as they were meant."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from plimsoll.hostkeys import HostKeys, ssh_arguments


def test_a_key_is_made_once_and_pinned_under_its_label(tmp_path: Path) -> None:
    keys = HostKeys(tmp_path / "state")
    keys.prepare(["w-1"], [])
    private, public = keys.pair("w-1")
    keys.prepare(["w-1"], ["w-1"])
    assert keys.pair("w-1") == (private, public)
    assert (tmp_path / "state/known_hosts").read_text() == f"w-1 {' '.join(public.split()[:2])}\n"
    assert (tmp_path / "state/hostkeys/w-1").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state/hostkeys").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "hostkeys",
        "known_hosts",
        "known_hosts.lock",
    ]


def test_reading_makes_nothing(tmp_path: Path) -> None:
    keys = HostKeys(tmp_path / "state")
    assert keys.pinned() == set()
    assert not keys.forget(["w-1"])
    assert not (tmp_path / "state").exists()


def test_the_key_of_a_host_that_is_yet_to_be_rebuilt_stays_until_it_is(tmp_path: Path) -> None:
    """As on a controller that did not make it: the rebuild may be refused, or given up."""
    keys = HostKeys(tmp_path)
    old = "w-1 ssh-ed25519 OLD"
    keys.known_hosts.write_text(f"{old}\n")
    for create, keep in ((["w-1"], ["w-1"]), (["w-1"], []), ([], ["w-1"])):
        keys.prepare(create, keep)
        assert old in keys.known_hosts.read_text()
    keys.settle(["w-1"])
    assert keys.known_hosts.read_text().split() == ["w-1", *keys.pair("w-1")[1].split()[:2]]


def test_a_lost_line_is_written_again_and_lines_of_others_stay(tmp_path: Path) -> None:
    keys = HostKeys(tmp_path)
    keys.prepare(["w-1"], [])
    right = keys.known_hosts.read_text()
    keys.known_hosts.write_text("other ssh-rsa THEIRS\n")
    assert keys.pinned() == {"w-1", "other"}
    keys.prepare([], ["w-1"])
    assert keys.known_hosts.read_text() == "other ssh-rsa THEIRS\n" + right


def test_half_a_pair_counts_as_none(tmp_path: Path) -> None:
    keys = HostKeys(tmp_path)
    keys.prepare(["w-1"], [])
    (tmp_path / "hostkeys/w-1.pub").unlink()
    assert keys.labels() == set()
    keys.prepare(["w-1"], [])
    assert keys.labels() == {"w-1"}


def test_a_host_that_goes_takes_its_own_key_and_line_alone(tmp_path: Path) -> None:
    keys = HostKeys(tmp_path)
    keys.prepare(["w-1", "w-10"], [])
    assert keys.forget(["w-1"])
    assert keys.pinned() == {"w-10"}
    assert sorted(path.name for path in (tmp_path / "hostkeys").iterdir()) == ["w-10", "w-10.pub"]


@pytest.mark.parametrize("folder", ["plain", "with blank", "100%h"])
def test_ssh_takes_the_arguments_as_they_are_meant(tmp_path: Path, folder: str) -> None:
    known_hosts = tmp_path / folder / "known_hosts"
    command = ["ssh", "-G", "-F", "/dev/null", *shlex.split(ssh_arguments("w-1", known_hosts)), "192.0.2.1"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "hostkeyalias w-1" in told
    assert "stricthostkeychecking true" in told
    shown = next(line for line in told if line.startswith("userknownhostsfile "))
    assert shown.split(" ", 1)[1].strip('"').replace("%%", "%") == str(known_hosts)
