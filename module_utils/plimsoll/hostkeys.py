"""SSH host keys that are made on the controller and given to each instance, so that its first login is checked already.

Under one directory (.plimsoll of the checkout): hostkeys/LABEL and hostkeys/LABEL.pub, and known_hosts with a line
`LABEL ssh-ed25519 ...` each. ssh looks the key up under the label (HostKeyAlias), so that the line can be written
before the instance has an address.
"""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from .files import write_whole


def ssh_arguments(label: str, known_hosts: Path) -> str:
    """What ansible_ssh_common_args of a host must hold for ssh to accept its pinned key and no other."""
    # ssh splits the value at blanks and expands %; Ansible splits the whole as a shell does.
    path = str(known_hosts).replace("%", "%%")
    files = f'UserKnownHostsFile="{path}"' if " " in path else f"UserKnownHostsFile={path}"
    options = [f"HostKeyAlias={label}", files, "StrictHostKeyChecking=yes"]
    return " ".join(f"-o {shlex.quote(option)}" for option in options)


class HostKeys:
    """The keys under one directory. Methods raise OSError, and ValueError where ssh-keygen fails."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "hostkeys"
        self.known_hosts = home / "known_hosts"
        self._home = home

    def pinned(self) -> set[str]:
        """Labels whose key is known here: in known_hosts, or as a pair that prepare() would write there again."""
        in_file = {line.split()[0] for line in self._lines() if line.strip() and not line.startswith("#")}
        return in_file | self.labels()

    def labels(self) -> set[str]:
        """Labels with a whole pair of keys."""
        if not self._folder.is_dir():
            return set()
        names = {path.name for path in self._folder.iterdir()}
        return {name for name in names if f"{name}.pub" in names}

    def pair(self, label: str) -> tuple[str, str]:
        """The private and the public key of a label."""
        return (self._folder / label).read_text(), (self._folder / f"{label}.pub").read_text().strip()

    def prepare(self, create: Collection[str], keep: Collection[str]) -> None:
        """Make the pairs that are missing for create; see that known_hosts has their lines, and one for each of keep.

        The line of another key stays until settle(): the host may be one that is to be rebuilt, and in the end is not.
        """
        with self._locked():
            for label in create:
                if label not in self.labels():
                    self._make(label)
            has_line = {line.split(" ", 1)[0] for line in self._lines()}
            wanted = self.labels() & {*create, *(label for label in keep if label not in has_line)}
            self._write({label: self.pair(label)[1] for label in wanted}, wanted)

    def settle(self, labels: Collection[str]) -> None:
        """See that known_hosts has no other key of these labels than that of their pair."""
        with self._locked():
            self._write({label: self.pair(label)[1] for label in self.labels() & set(labels)})

    def forget(self, labels: Collection[str]) -> bool:
        """Remove the keys and lines of labels; whether there were any."""
        if not self.pinned() & set(labels):
            return False
        with self._locked():
            self._write(dict.fromkeys(labels))
            for label in labels:
                (self._folder / label).unlink(missing_ok=True)
                (self._folder / f"{label}.pub").unlink(missing_ok=True)
        return True

    def _lines(self) -> list[str]:
        return self.known_hosts.read_text().splitlines() if self.known_hosts.exists() else []

    def _write(self, pin: Mapping[str, str | None], beside: Collection[str] = ()) -> None:
        """Give each label the one line of its key, or none, in one rename; other lines, and those of beside, stay."""
        before = self._lines()
        wanted = {label: f"{label} {' '.join(key.split()[:2])}" for label, key in pin.items() if key}
        gone = set(pin) - set(beside)
        kept = [line for line in before if line.split(" ", 1)[0] not in gone or line in wanted.values()]
        after = kept + [line for line in wanted.values() if line not in kept]
        if after != before:
            write_whole(self.known_hosts, "".join(f"{line}\n" for line in after), 0o644)

    def _make(self, label: str) -> None:
        with tempfile.TemporaryDirectory(dir=self._home) as scratch:
            at = Path(scratch, "key")
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", label, "-f", str(at)]
            try:
                ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            except FileNotFoundError:
                raise ValueError("ssh-keygen is not on PATH of the controller; install OpenSSH's client") from None
            if ran.returncode:
                raise ValueError(f"ssh-keygen failed for {label}: {ran.stderr.strip()}")
            # The public half last: a pair counts only when it is whole.
            at.replace(self._folder / label)
            at.with_suffix(".pub").replace(self._folder / f"{label}.pub")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two runs may provision two fleets from one checkout at a time."""
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with (self._home / "known_hosts.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
