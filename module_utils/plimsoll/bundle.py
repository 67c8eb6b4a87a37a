"""Bundles: what a host's new logs become on their way to the controller, one file a host.

A bundle is a tar.gz of regular files: `meta.json`, and below samples/, trace/, guard/ and journal/ what is behind the
cursor: how far the host's logs are in the controller's store. The controller holds the cursor and hands it over each
time, so that whatever is interrupted, the next bundle goes on where the store ends. The host packs; the controller
unpacks with no trust in the host.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .files import whole

SCHEMA = 2
# What may be in a bundle, by whole name. Dots are only inside a name, so no part of it can be `..`.
# Within the 100 characters of a plain tar header: unpack() takes no extended ones.
_PART = r"[\w@:+-][\w.@:+-]{0,80}"
MEMBER = re.compile(
    rf"meta\.json|samples/{_PART}\.csv(\.gz)?|(trace|guard)/{_PART}\.jsonl|journal/events\.jsonl", re.ASCII
)
EVENTS = "journal/events.jsonl"
# How a file is known whatever it is called by now: a segment by its name, a file that is rotated by its first line.
KEY = re.compile(rf"samples/{_PART}\.csv|(trace|guard)/[0-9a-f]{{16}}", re.ASCII)
MAX_MEMBERS = 20_000
# Of one folder: the trace folder is the worker's user's, who could make a million.
MAX_FILES = 5_000
MAX_UNPACKED_BYTES = 4 << 30
# The bootstrap rotates its files far below.
MOST_TRACE_BYTES = 64 << 20
READ_AT_ONCE = 1 << 20
# Of a file that is no gzip, so much is one member, in memory whole: who may write to it cannot change it underneath.
PART_BYTES = 8 << 20
NOT_REGULAR = "not a regular file"
# What tells most for its size, and is all that is brought as a routine; the plain script's own files are not.
ROUTINE = re.compile(r"samples/(rollup|units)-|guard/|journal/")
# Segments of one hour or day, by the time in their names: the oldest are packed first.
_STAMP = re.compile(r"-(\d{8}T\d{6}Z)")


class BundleError(Exception):
    """A bundle cannot be made or trusted; the message says what is wrong with it, and names no more than the member."""


# ---- how far the store has them ----


class Cursor(NamedTuple):
    """How far a host's logs are in the store: bytes of each file by its KEY, before gzip; µs of the journal.

    logs is the host's name for its directory: with another one, its files are others. units is the digest of what was
    last said of the units.
    """

    logs: str = ""
    files: Mapping[str, int] = {}
    journal: int = 0
    units: str = ""

    @classmethod
    def of(cls, value: Any) -> Cursor:
        """Out of what plain() made, or of an empty dict. Raises BundleError where it is none."""
        if not isinstance(value, dict):
            raise BundleError("the cursor is no object")
        cursor = cls._make(value.get(name, default) for name, default in cls._field_defaults.items())
        texts = isinstance(cursor.logs, str) and isinstance(cursor.units, str)
        if not texts or not _count(cursor.journal) or not _lengths(cursor.files):
            raise BundleError("the cursor is damaged")
        return cursor

    def plain(self) -> dict[str, Any]:
        return {**self._asdict(), "files": dict(self.files)}


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _lengths(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and _count(length) for key, length in value.items())


def digest(units: Any) -> str:
    """Of what is said of the units, and of the host: it tells whether that has changed."""
    return hashlib.sha256(json.dumps(units, sort_keys=True).encode()).hexdigest()[:16]


def said_of(meta: Mapping[str, Any]) -> Any:
    """What of meta.json is a fact of the host, and no part of the logs."""
    return [meta.get(name) for name in ("kernel", "python", "units")]


def advance(cursor: Cursor, meta: Any, unpacked: Path) -> Cursor:
    """The cursor once a bundle, unpacked there, is in the store.

    Raises BundleError where the bundle does not go on where the cursor is: it would lose lines, or count them twice.
    """
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        raise BundleError("its meta.json is of another version of plimsoll; run playbooks/deploy.yml and collect again")
    logs, parts, held, journal = meta.get("logs"), meta.get("parts"), meta.get("held"), meta.get("journal", -1)
    if not isinstance(logs, str) or not isinstance(parts, dict) or not isinstance(held, list) or not _count(journal):
        raise BundleError("its meta.json is damaged; collect again")
    if len(held) > MAX_MEMBERS or not all(isinstance(key, str) and KEY.fullmatch(key) for key in held):
        raise BundleError("its meta.json names files that no host has")
    files = dict(cursor.files) if logs == cursor.logs else {}
    known, begun = set(held), set[str]()
    for name, part in parts.items():
        sound = (
            isinstance(part, dict)
            and isinstance(part.get("file"), str)
            and part["file"] in known
            and _count(part.get("from"))
            and _count(part.get("to"))
        )
        if not sound or part["from"] > part["to"] or not MEMBER.fullmatch(name) or not (unpacked / name).is_file():
            raise BundleError(f"its meta.json is wrong about {_shown(name)}")
        there = files.get(part["file"], 0)
        # A file that was cut, or begun anew under its name, comes again from its start: once in a bundle.
        anew = part.get("anew") is True and part["from"] == 0 and part["file"] not in begun
        if part["from"] != there and not anew:
            raise BundleError(f"{_shown(name)} begins at {part['from']}, and the store ends at {there}; collect again")
        files[part["file"]] = part["to"]
        begun.add(part["file"])
    found = {
        f"{folder.name}/{file.name}" for folder in unpacked.iterdir() if folder.is_dir() for file in folder.iterdir()
    }
    if extra := sorted(found - parts.keys() - {EVENTS}):
        raise BundleError(f"its meta.json does not say what {_shown(extra[0])} is a part of")
    return Cursor(logs, {key: files[key] for key in held if key in files}, journal, digest(said_of(meta)))


# ---- what a host has ----


class Log(NamedTuple):
    """A file of a host's logs: its name in a bundle, without .gz; size on disk and length before gzip, in bytes."""

    name: str
    path: Path
    key: str
    size: int
    length: int
    zipped: bool


class Part(NamedTuple):
    """What of a file is to be packed: so many bytes of it from there, before gzip. The store ends at behind."""

    log: Log
    start: int
    length: int
    behind: int = 0

    @property
    def whole(self) -> bool:
        """Whether a gzip goes as it is."""
        return self.log.zipped and self.start == 0

    @property
    def size(self) -> int:
        """In the bundle, at most."""
        return self.log.size if self.whole else self.length


def listing(root: Path, folders: Sequence[str]) -> tuple[list[Log], list[str]]:
    """The logs in root's folders, the oldest segments first, and what is left out of a bundle with the reason.

    Links and special files are left out: a worker's user can write to the trace folder, and this runs as root.
    """
    found: list[Log] = []
    skipped = []
    for folder in folders:
        base = root / folder
        if not base.is_dir():
            continue
        files = set(islice(base.iterdir(), MAX_FILES))
        if len(files) == MAX_FILES:
            skipped.append(f"{folder}: {MAX_FILES} files or more, of which not all were looked at")
        for path in sorted(files):
            name = f"{folder}/{path.name}"
            if path.with_name(f"{path.name}.gz") in files:
                # The sampler has put its segment's gzip there, and is about to remove the segment.
                continue
            if not MEMBER.fullmatch(name):
                # The writers' own scratch files and locks.
                continue
            try:
                log = _log(name, path)
            except FileNotFoundError:
                # Retention removed it in between.
                continue
            except OSError as error:
                skipped.append(f"{name}: {error.strerror}")
                continue
            if log:
                found.append(log)
    # Of files that are one and the same, as a copy is, the longest: they could not be told apart.
    same: dict[str, Log] = {}
    for log in sorted(found, key=lambda log: (-log.length, log.name)):
        if log.key in same:
            skipped.append(f"{log.name}: begins as {same[log.key].name} does")
        same.setdefault(log.key, log)
    return sorted(same.values(), key=_order), skipped


def _order(log: Log) -> tuple[bool, bool, str, str]:
    """What tells most first, and of the others the oldest segments; last what the worker's user writes, however old."""
    stamp = _STAMP.search(log.name)
    return not ROUTINE.match(log.name), log.name.startswith("trace/"), stamp[1] if stamp else "9", log.name


def _log(name: str, path: Path) -> Log | None:
    """None for a file without one whole line. Raises OSError where it is not a regular file."""
    with _opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if name.endswith(".csv.gz"):
            # RFC 1952: gzip ends with the length of what it holds, modulo 2^32.
            stream.seek(-4, os.SEEK_END) if size >= 4 else None
            return Log(name[:-3], path, name[:-3], size, int.from_bytes(stream.read(4), "little"), True)
        if name.startswith("trace/") and size > MOST_TRACE_BYTES:
            raise OSError(errno.EFBIG, f"more than {MOST_TRACE_BYTES} bytes, which the bootstrap does not write")
        first = stream.readline(PART_BYTES)
        stream.seek(max(0, size - PART_BYTES))
        rest = stream.read(PART_BYTES)
        if not first.endswith(b"\n") or b"\n" not in rest:
            return None
        length = stream.tell() - len(rest) + rest.rfind(b"\n") + 1
    return Log(name, path, _key(name, first), size, length, False)


def _key(name: str, first: bytes) -> str:
    """Of a file with this first line, by KEY."""
    return name if name.endswith(".csv") else f"{name.split('/')[0]}/{hashlib.sha256(first).hexdigest()[:16]}"


def _opened(path: Path) -> BinaryIO:
    """Never follows a link, and does not wait for a pipe, which the file may have become since it was listed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return os.fdopen(descriptor, "rb")


def plan(logs: Iterable[Log], cursor: Cursor, max_bytes: int) -> tuple[list[Part], bool]:
    """What of these logs is behind their cursor, and whether there is more of it than max_bytes.

    Raises BundleError where not even the first of it fits.
    """
    parts: list[Part] = []
    left = max_bytes
    for log in logs:
        behind = cursor.files.get(log.key, 0)
        start = behind if behind <= log.length else 0
        part = Part(log, start, log.length - start, behind)
        if part.length and part.size > left:
            if log.zipped and not parts:
                raise BundleError(f"{log.path} alone is over max_bytes ({max_bytes}); raise it")
            # Of a file that is not packed yet, as much as there is room for.
            return parts if log.zipped else [*parts, part._replace(length=left)], True
        if part.length:
            parts.append(part)
            left -= part.size
    return parts, False


def acknowledged(logs: Iterable[Log], cursor: Cursor) -> list[str]:
    """Names, before gzip, of what is in the store whole: a host that is short of room may remove it first."""
    return sorted(log.name for log in logs if cursor.files.get(log.key, -1) >= log.length)


# ---- packing ----


@dataclass(frozen=True)
class Packed:
    """What pack() made. Sizes in bytes; skipped holds `NAME: reason`."""

    sha256: str
    size: int
    files: int
    skipped: tuple[str, ...]


class _Gzip:
    """A stream of gzip members that may differ in level; who reads it takes them for one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._level, self._written = raw, 1, 0
        self._member = self._begun()

    def _begun(self) -> gzip.GzipFile:
        return gzip.GzipFile(filename="", fileobj=self._raw, mode="wb", compresslevel=self._level, mtime=0)

    def at(self, level: int) -> None:
        """What is written from now on is packed at this level."""
        if level != self._level:
            self._member.close()
            self._level = level
            self._member = self._begun()

    def write(self, content: bytes) -> int:
        self._written += len(content)
        return self._member.write(content)

    def tell(self) -> int:
        return self._written

    def close(self) -> None:
        self._member.close()


def pack(
    parts: Sequence[Part],
    meta: Mapping[str, Any],
    events: bytes,
    target: Path,
    left_out: Sequence[str] = (),
    owner: int = -1,
) -> Packed:
    """Write the bundle at target by one rename. The same contents give the same bytes, whenever and wherever.

    meta is meta.json but for `parts` and `left_out`, events what EVENTS is to hold, left_out what is known to be
    missing. A file that is gone by now, or has become something else, is left out too. Raises BundleError where the
    disk has no room for it, and OSError.
    """
    free, needed = shutil.disk_usage(target.parent).free, sum(part.size for part in parts) + len(events)
    if needed > free:
        raise BundleError(f"{target.parent}: {free} bytes free, up to {needed} needed for the bundle; make room there")
    skipped = list(left_out)
    packed: dict[str, Any] = {}
    with (
        whole(target, 0o640, owner) as raw,
        contextlib.closing(_Gzip(raw)) as zipped,
        # Of its file, tarfile asks to write and to tell.
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.GNU_FORMAT) as archive,  # type: ignore[call-overload]
    ):
        for part in parts:
            try:
                for content, size, start, end in _pieces(part):
                    name = _member(part, packed)
                    with content:
                        # Once is enough.
                        zipped.at(0 if part.whole else 1)
                        _add(archive, name, content, size)
                    anew = {"anew": True} if start == 0 < part.behind else {}
                    packed[name] = {"file": part.log.key, "from": start, "to": end, **anew}
            except OSError as error:
                # Retention removed it in between, or it became a link.
                skipped.append(f"{part.log.name}: {error.strerror}")
        zipped.at(1)
        if events:
            _add(archive, EVENTS, io.BytesIO(events), len(events))
        text = json.dumps({**meta, "parts": packed, "left_out": skipped}, indent=1).encode()
        _add(archive, "meta.json", io.BytesIO(text), len(text))
    return Packed(sha256(target), target.stat().st_size, len(packed), tuple(skipped))


def _member(part: Part, taken: Container[str]) -> str:
    """The name of a part: that of its file, with a number where the file has several."""
    name = part.log.name
    if part.whole:
        return f"{name}.gz"
    stem, suffix = name.rsplit(".", 1)
    # No longer than a name may be.
    return next(one for one in chain([name], (f"{stem[:70]}+{at}.{suffix}" for at in count(1))) if one not in taken)


def _pieces(part: Part) -> Iterator[tuple[BinaryIO, int, int, int]]:
    """What goes into the bundle, its size, and from where to where in the file it is, bytes; each readable by itself.

    Nothing of it can change while it is packed, but in a segment that is whole. Raises OSError.
    """
    stream = _opened(part.log.path)
    if part.whole:
        if os.fstat(stream.fileno()).st_size != part.log.size:
            stream.close()
            raise OSError(errno.ESTALE, "it changed while it was read")
        yield stream, part.log.size, 0, part.length
        return
    with stream, gzip.open(stream) if part.log.zipped else contextlib.nullcontext(stream) as source:
        try:
            first = source.readline(PART_BYTES)
            if _key(part.log.name, first) != part.log.key:
                raise OSError(errno.ESTALE, "it is another file by now")
            # The tail of a segment has its header in front again.
            header = first if part.log.name.endswith(".csv") else b""
            at, end = part.start, part.start + part.length
            source.seek(max(0, at - 1))
            if at and source.read(1) != b"\n":
                # It was cut and has grown again, or begun anew: what is there is not what was there.
                at = 0
                source.seek(0)
            while at < end:
                content = source.read(min(end - at, PART_BYTES))
                content = content[: content.rfind(b"\n") + 1]
                if not content and at > part.start and end - at < PART_BYTES:
                    # No room for another line.
                    return
                if not content:
                    much = min(end - at, PART_BYTES)
                    raise OSError(errno.EIO, f"no whole line in {much} bytes, which is all that may be packed")
                packed = header + content if at else content
                yield io.BytesIO(packed), len(packed), at, at + len(content)
                at += len(content)
                source.seek(at)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise OSError(errno.EIO, "truncated or damaged") from None


def _add(archive: tarfile.TarFile, name: str, content: BinaryIO, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o640
    archive.addfile(member, content)


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
