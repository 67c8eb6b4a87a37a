"""Bundles: what a host's logs become on their way to the controller, one file a host.

A bundle is a tar.gz of regular files: `meta.json`, `samples/NAME.csv[.gz]`, `trace/NAME.jsonl`. The host packs it; the
controller unpacks it with no trust in the host.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import whole

# What may be in a bundle, by whole name. Dots are only inside a name, so no part of it can be `..`.
# Within the 100 characters of a plain tar header: unpack() takes no extended ones.
MEMBER = re.compile(
    r"meta\.json|(samples/[\w@:+-][\w.@:+-]{0,80}\.csv(\.gz)?|trace/[\w@:+-][\w.@:+-]{0,80}\.jsonl)", re.ASCII
)
MAX_MEMBERS = 20_000
MAX_UNPACKED_BYTES = 4 << 30
READ_AT_ONCE = 1 << 20
NOT_REGULAR = "not a regular file"


class BundleError(Exception):
    """A bundle cannot be made or trusted; the message says what is wrong with it, and names no more than the member."""


@dataclass(frozen=True)
class Packed:
    """What pack() made. Sizes in bytes; skipped holds `NAME: reason`."""

    sha256: str
    size: int
    unpacked: int
    files: int
    skipped: tuple[str, ...]


def listing(root: Path, folders: Sequence[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    """(name, file) of what a bundle takes from root's folders, sorted, and what it leaves out with the reason.

    Links and special files are left out: a worker's user can write to the trace folder, and this runs as root.
    """
    found: list[tuple[str, Path]] = []
    skipped = []
    for folder in folders:
        base = root / folder
        if not base.is_dir():
            skipped.append(f"{folder}: no such directory")
            continue
        files = set(base.iterdir())
        for file in sorted(files):
            name = f"{folder}/{file.name}"
            if _zipped(file) in files:
                # The sampler has put its segment's gzip there, and is about to remove the segment.
                continue
            if not MEMBER.fullmatch(name):
                # The writers' own scratch files and locks.
                continue
            try:
                regular = stat.S_ISREG(file.lstat().st_mode)
            except FileNotFoundError:
                # Retention removed it in between.
                continue
            if regular:
                found.append((name, file))
            else:
                skipped.append(f"{name}: {NOT_REGULAR}")
    return found, skipped


def _zipped(file: Path) -> Path:
    return file.with_name(f"{file.name}.gz")


def _as_it_is_now(member: tuple[str, Path]) -> tuple[str, Path]:
    """A segment that was listed may have been gzipped since, as its hour was over."""
    name, file = member
    if not file.exists() and MEMBER.fullmatch(f"{name}.gz"):
        return f"{name}.gz", _zipped(file)
    return member


def _content(file: Path, limit: int) -> bytes:
    """A file's whole lines: one that is being written to may end in the middle of one. Never follows a link."""
    # The file may have become a pipe since it was listed, which would be waited for.
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, NOT_REGULAR)
        if found.st_size > limit:
            raise BundleError(f"{file} alone is over the {limit} bytes that are left; raise log_bundle's max_bytes")
        # As much as it holds and no more: read() takes the memory for all that it is asked for.
        content = stream.read(found.st_size)
    if file.suffix == ".gz":
        return content
    return content[: content.rfind(b"\n") + 1]


def pack(members: Sequence[tuple[str, Path]], meta: bytes, target: Path, max_bytes: int) -> Packed:
    """Write the bundle at target by one rename. The same contents give the same bytes, whenever and wherever.

    max_bytes bounds the sum of the contents; memory holds one file at a time. Raises BundleError past the bound or
    where the disk has no room for it, and OSError.
    """
    free = shutil.disk_usage(target.parent).free
    total = sum(_size(file) for _, file in members) + len(meta)
    if total > max_bytes:
        raise BundleError(f"{total} bytes of logs are over max_bytes ({max_bytes}); raise it or collect more often")
    if total > free:
        raise BundleError(f"{target.parent}: {free} bytes free, up to {total} needed for the bundle; make room there")
    skipped, left, files = [], max_bytes - len(meta), 0
    with (
        whole(target, 0o600) as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        _add(archive, "meta.json", meta)
        for name, file in map(_as_it_is_now, members):
            try:
                content = _content(file, left)
            except OSError as error:
                # Retention removed it in between, or it became a link.
                skipped.append(f"{name}: {error.strerror}")
                continue
            left -= len(content)
            files += 1
            _add(archive, name, content)
    return Packed(sha256(target), target.stat().st_size, max_bytes - left, files, tuple(skipped))


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:
        # Retention removed it; reading it will say so.
        return 0


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o640
    archive.addfile(member, io.BytesIO(content))


def sha256(file: Path) -> str:
    """Hex digest of a file, read in pieces."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(READ_AT_ONCE):
            total.update(piece)
    return total.hexdigest()


class _PlainHeader(tarfile.TarInfo):
    """Refuses extended headers, which tarfile would read whole into memory before it shows the member."""

    _EXTENDED = (
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE),
    )

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in self._EXTENDED:
            raise BundleError("it has extended tar headers, which no bundle needs")
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]


def refusal(member: tarfile.TarInfo) -> str:
    """Why a member of a bundle is not unpacked; empty where it may be."""
    if not member.isreg():
        return f"member {_shown(member.name)} is not a regular file"
    if not MEMBER.fullmatch(member.name):
        return f"member {_shown(member.name)} has a name that no bundle holds"
    return ""


def _shown(name: str) -> str:
    """A host's own string, made fit to print: no control characters, no more than a line holds."""
    return ascii(name[:80])


def unpack(
    bundle: Path,
    target: Path,
    *,
    expected_sha256: str | None = None,
    max_members: int = MAX_MEMBERS,
    max_bytes: int = MAX_UNPACKED_BYTES,
) -> int:
    """Unpack a bundle of one host into target, replacing what was there; the number of files.

    Whatever is wrong with the bundle, target stays as it was. Raises BundleError.
    """
    if expected_sha256 is not None and sha256(bundle) != expected_sha256:
        raise BundleError(
            "its checksum is not the one that the host gave: damaged on the way, or replaced; collect again"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        count, left = 0, max_bytes
        # As a stream ("r|"): a member is looked at before anything behind it is read. Through gzip, since tarfile's own
        # reader of it checks no checksum and takes a cut between two members for the end.
        with gzip.open(bundle) as zipped, tarfile.open(fileobj=zipped, mode="r|", tarinfo=_PlainHeader) as archive:
            for member in archive:
                count += 1
                if count > max_members:
                    raise BundleError(f"it has more than {max_members} members")
                if why := refusal(member):
                    raise BundleError(why)
                left -= member.size
                if left < 0:
                    raise BundleError(f"it unpacks to more than {max_bytes} bytes")
                content = archive.extractfile(member)
                assert content is not None  # a regular file has content
                file = scratch / member.name
                file.parent.mkdir(exist_ok=True)
                with file.open("xb") as out:
                    shutil.copyfileobj(content, out, READ_AT_ONCE)
            # tarfile reads whole records and stops at the first empty block: where that was the last one of a record,
            # another record of nothing but zeros is left.
            rest = zipped.read(tarfile.RECORDSIZE + 1)
            if len(rest) > tarfile.RECORDSIZE or rest.strip(b"\0"):
                raise BundleError("it is damaged: there is more behind its end; collect again")
        if not (scratch / "meta.json").exists():
            raise BundleError("it holds no meta.json; the host's plimsoll may be of another version: deploy again")
        _swap(scratch, target)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BundleError(f"it is truncated or damaged ({error}); collect again") from None
    except FileExistsError as error:
        raise BundleError(f"two members share the name {_shown(Path(error.filename).name)}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return count


def _swap(new: Path, target: Path) -> None:
    """Put new in target's place; a directory cannot replace one that is not empty in a single step."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.chmod(0o755)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
