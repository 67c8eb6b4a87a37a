"""What an instance is given at its first boot: keys, and a cloud-config that is ours and theirs."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml
from plimsoll.metadata import USER_DATA_MAX_BYTES, cloud_config, encoded, read_keys, user_data

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop"


def test_user_data_is_ours_and_theirs() -> None:
    text = user_data("workers-1", "PRIVATE\nKEY\n", "ssh-ed25519 AAAA", "#cloud-config\nruncmd: [[true]]\n")
    assert text.startswith("#cloud-config\n")
    assert yaml.safe_load(text) == {
        "hostname": "workers-1",
        "fqdn": "workers-1",
        "preserve_hostname": False,
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": "PRIVATE\nKEY\n", "ed25519_public": "ssh-ed25519 AAAA"},
        "runcmd": [[True]],
    }


def test_user_data_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="65535"):
        user_data("workers-1", "P", "K", "#cloud-config\na: " + "x" * 65535)


def test_user_data_of_the_greatest_length_is_taken_and_counted_in_bytes() -> None:
    ours = len(user_data("workers-1", "P", "K", "#cloud-config\na: x\n").encode())
    longest = "#cloud-config\na: " + "x" * (USER_DATA_MAX_BYTES - ours + 1) + "\n"
    assert len(user_data("workers-1", "P", "K", longest).encode()) == USER_DATA_MAX_BYTES
    with pytest.raises(ValueError, match="65536 bytes with the host key"):
        user_data("workers-1", "P", "K", longest.replace("xx", "xxx", 1))


@pytest.mark.parametrize("text", ["", " \n", "#cloud-config", "#cloud-config\n# nothing yet\n"])
def test_an_empty_cloud_config_adds_nothing(text: str) -> None:
    assert cloud_config(text) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("packages: [vim]", "the first line must be #cloud-config"),
        ("#!/bin/sh\ntrue\n", "the first line must be #cloud-config"),
        ("\n#cloud-config\n", "the first line must be #cloud-config"),
        ("#cloud-config\nhostname: other\n", "hostname is plimsoll's to set"),
        ("#cloud-config\nssh_keys: {}\nfqdn: a\n", "fqdn, ssh_keys is plimsoll's to set"),
        ("#cloud-config\n- a\n", "a cloud-config is a mapping"),
        ("#cloud-config\na: [secret\n", "no valid YAML: .*, line 3"),
    ],
)
def test_a_cloud_config_that_cannot_be_is_named_without_an_excerpt(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"user_data: {words}") as caught:
        cloud_config(text)
    assert "secret" not in str(caught.value)


def test_a_request_carries_it_encoded() -> None:
    assert base64.b64decode(encoded("#cloud-config\n# ä\n")["user_data"]).decode() == "#cloud-config\n# ä\n"


def test_keys_are_strings_or_files(tmp_path: Path) -> None:
    (tmp_path / "me.pub").write_text(f"# mine\n\n{KEY}\nssh-rsa BBBB\n")
    assert read_keys([KEY, str(tmp_path / "me.pub")]) == (KEY, "ssh-rsa BBBB")
    (tmp_path / "me").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(ValueError, match=r"give the \.pub file"):
        read_keys([str(tmp_path / "me")])


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "sk-ssh-ed25519@openssh.com"])
def test_every_kind_of_key_is_a_key(kind: str) -> None:
    assert read_keys([f" {kind} AAAA+/= me \n", f"{kind} BBBB"]) == (f"{kind} AAAA+/= me", f"{kind} BBBB")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.pub"):
        read_keys([str(tmp_path / "none.pub")])
