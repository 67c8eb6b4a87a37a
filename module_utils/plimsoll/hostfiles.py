"""What it takes to bring a list of files on a host to their declared state: pure, apart from read() and write()."""

from __future__ import annotations

import dataclasses
import grp
import json
import os
import pwd
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import whole, write_whole

HIDDEN = "(content hidden: secret)\n"
KINDS = {
    "file": "a file",
    "directory": "a directory",
    "absent": "absent",
    "other": "neither a file nor a directory",
}


@dataclass(frozen=True)
class Entry:
    """One path as it is wanted or as it is. state is file, directory, absent or other (neither; only as found)."""

    path: str
    state: str
    content: str = ""
    mode: int = 0o644
    owner: str = "root"
    group: str = "root"
    secret: bool = False


@dataclass(frozen=True)
class Change:
    """One path that differs: before is what was found."""

    before: Entry
    after: Entry

    def diff(self) -> dict[str, str]:
        """In the shape of Ansible's diff mode."""
        return {
            "before_header": self.after.path,
            "after_header": self.after.path,
            "before": _describe(self.before, hide=self.after.secret),
            "after": _describe(self.after, hide=self.after.secret, changed=self.before.content != self.after.content),
        }


def _describe(entry: Entry, hide: bool, changed: bool = False) -> str:
    if entry.state == "absent":
        return ""
    head = f"# {entry.state} {entry.owner}:{entry.group} {entry.mode:04o}\n"
    if entry.state != "file":
        return head
    if hide:
        return head + (HIDDEN.replace("hidden", "changed, hidden") if changed else HIDDEN)
    # Ansible fails a task, after its work is done, whose result holds bytes that are no text.
    return head + entry.content.encode(errors="surrogateescape").decode(errors="replace")


def plan(desired: Sequence[Entry], current: Sequence[Entry]) -> list[Change]:
    """Changes that bring current to desired (same paths, same order), in the order declared.

    Raises ValueError where a path holds something that no change of content can mend, such as a directory where a file
    or nothing is wanted: removing that is not ours to decide.
    """
    changes = []
    for want, have in zip(desired, current):
        if want.state == "absent":
            same, mendable = have.state == "absent", have.state != "directory"
        else:
            same = dataclasses.replace(have, secret=want.secret) == want
            mendable = have.state in ("absent", want.state)
        if not mendable:
            kind, wanted = KINDS[have.state], KINDS[want.state]
            raise ValueError(f"{want.path} is {kind}, and is to be {wanted}; move it away first")
        if not same:
            changes.append(Change(before=have, after=want))
    return changes


def read(path: str) -> Entry:
    """The entry as it is on this host; a link is followed, as a service that reads the file would. Raises OSError."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return Entry(path, "absent")
    state = "file" if stat.S_ISREG(found.st_mode) else "directory" if stat.S_ISDIR(found.st_mode) else "other"
    content = Path(path).read_bytes().decode(errors="surrogateescape") if state == "file" else ""
    return Entry(path, state, content, stat.S_IMODE(found.st_mode), _user(found.st_uid), _group(found.st_gid))


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _ids(entry: Entry) -> tuple[int, int]:
    try:
        # Where an id has no name, read() gives the number.
        uid = int(entry.owner) if entry.owner.isdigit() else pwd.getpwnam(entry.owner).pw_uid
        return uid, int(entry.group) if entry.group.isdigit() else grp.getgrnam(entry.group).gr_gid
    except KeyError as error:
        raise ValueError(f"{entry.path}: no such owner or group on this host: {error.args[0]}") from None


def write(entry: Entry) -> None:
    """Make one entry so. A file appears whole or not at all. Raises OSError, and ValueError for an unknown owner."""
    path = Path(entry.path)
    if entry.state == "absent":
        path.unlink()
        return
    uid, gid = _ids(entry)
    if entry.state == "directory":
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, uid, gid)
        path.chmod(entry.mode)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, entry.mode) as file:
        file.write(entry.content.encode(errors="surrogateescape"))
        os.fchown(file.fileno(), uid, gid)


def save(backup: Path, changes: Sequence[Change]) -> None:
    """Keep what changes is about to replace, for load(). Secrets are in it: root alone reads it. Raises OSError.

    A directory that is made stays: others may have put something in it.
    """
    backup.parent.mkdir(parents=True, exist_ok=True)
    kept = [one for one in changes if (one.before.state, one.after.state) != ("absent", "directory")]
    entries = [dataclasses.asdict(dataclasses.replace(one.before, secret=one.after.secret)) for one in kept]
    write_whole(backup, json.dumps(entries), 0o600)


def load(backup: Path) -> list[Entry]:
    """The entries that save() kept. Raises OSError, and ValueError where the file is no such backup."""
    try:
        entries = [Entry(**one) for one in json.loads(backup.read_text())]
        if not all(
            one.state in KINDS
            and isinstance(one.mode, int)
            and all(isinstance(text, str) for text in (one.path, one.content, one.owner, one.group))
            for one in entries
        ):
            raise ValueError
        return entries
    except (ValueError, TypeError):
        raise ValueError(f"{backup} is no backup that can be read; put its files right by hand") from None


def unit_of(path: str) -> str | None:
    """The unit that a path under a systemd unit directory belongs to; None for other paths.

    A template is named with an instance, since systemd-analyze verifies only what could run.
    """
    _, found, below = path.partition("/systemd/system/")
    if not found:
        return None
    unit = below.split("/")[0]
    return (unit[: -len(".d")] if unit.endswith(".d") else unit).replace("@.", "@verify.")


def fragment(unit: str) -> str:
    """Name of the file that defines a unit named by unit_of(): an instance is defined by its template."""
    name, at, instance = unit.partition("@")
    return f"{name}@.{instance.rpartition('.')[2]}" if at else unit


def complaints(entries: Sequence[Entry]) -> str:
    """What systemd-analyze says of the units as they are to be, laid over those that the host has; empty for nothing.

    An unknown key makes systemd only warn, so any word counts.
    """
    units = {name: item for item in entries if item.state == "file" and (name := unit_of(item.path))}
    if not units:
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        for item in entries:
            if item.state == "file" and unit_of(item.path):
                below = item.path.split("/systemd/system/", 1)[1]
                target = Path(scratch, below)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(item.content)
        # A drop-in may land before the unit that it is for; it is verified with that unit then.
        folders = (scratch, "/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
        known = [name for name in sorted(units) if any(Path(at, fragment(name)).exists() for at in folders)]
        if not known:
            return ""
        # The trailing colon appends systemd's own unit path.
        ran = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *known],
            capture_output=True,
            text=True,
            env={**os.environ, "SYSTEMD_UNIT_PATH": f"{scratch}:", "SYSTEMD_LOG_LEVEL": "warning"},
        )
        # A unit of the host's own that systemd complains of is not ours to refuse.
        ours = [line for line in ran.stderr.splitlines() if scratch in line or any(name in line for name in known)]
        return "\n".join(line.replace(scratch, "") for line in ours)
