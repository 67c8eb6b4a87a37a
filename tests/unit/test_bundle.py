"""Bundles: the same logs give the same bytes, and what a host sends is unpacked with no trust in it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pwd
import re
import resource
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import log_bundle
from plimsoll import bundle
from plimsoll.bundle import BundleError, listing, pack, sha256, unpack

META = b'{"schema": 1}\n'
ROOMY = 1 << 20
FORMER = {"meta.json": b"former", "samples/old.csv": b"former\n"}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """What a host has: whole files, one that is being written to, and what no bundle takes."""
    root = tmp_path / "logs"
    (root / "samples").mkdir(parents=True)
    (root / "trace").mkdir()
    (root / "samples/samples-1.csv.gz").write_bytes(gzip.compress(b"timestamp,pid,rss_kb\n1,2,3\n", mtime=0))
    (root / "samples/samples-2.csv").write_bytes(b"timestamp,pid,rss_kb\n4,5,6\n7,8")
    (root / "samples/samples-1.csv.gz.tmp").write_bytes(b"scratch")
    (root / "samples/.lock").touch()
    (root / "trace/celery-worker@sales.service-12.jsonl").write_bytes(b'{"kind": "window_open"}\n{"kin')
    return root


def packed(root: Path, target: Path, max_bytes: int = ROOMY) -> bundle.Packed:
    return pack(listing(root, ("samples", "trace"))[0], META, target, max_bytes)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What the host packs


def test_what_is_packed_is_what_is_unpacked_without_torn_last_lines(logs: Path, tmp_path: Path) -> None:
    made = packed(logs, tmp_path / "a.tar.gz")
    assert unpack(tmp_path / "a.tar.gz", tmp_path / "host", expected_sha256=made.sha256) == 4
    unpacked = {
        "meta.json": META,
        "samples/samples-1.csv.gz": (logs / "samples/samples-1.csv.gz").read_bytes(),
        "samples/samples-2.csv": b"timestamp,pid,rss_kb\n4,5,6\n",
        "trace/celery-worker@sales.service-12.jsonl": b'{"kind": "window_open"}\n',
    }
    assert tree(tmp_path / "host") == unpacked
    assert (made.files, made.skipped) == (3, ())
    assert made.unpacked == sum(map(len, unpacked.values()))
    assert (made.size, made.sha256) == ((tmp_path / "a.tar.gz").stat().st_size, sha256(tmp_path / "a.tar.gz"))


def test_the_same_logs_give_the_same_bytes_whenever_and_wherever(logs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = packed(logs, tmp_path / "a.tar.gz")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    other = tmp_path / "elsewhere"
    for name, content in sorted(tree(logs).items(), reverse=True):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(content)
        (other / name).chmod(0o600)
        os.utime(other / name, (1, 1))
    assert packed(other, tmp_path / "of-another-name.tar.gz") == first
    (other / "samples/samples-2.csv").write_bytes(b"timestamp,pid,rss_kb\n4,5,7\n")
    assert packed(other, tmp_path / "b.tar.gz").sha256 != first.sha256


def test_links_and_special_files_are_left_out_with_the_reason(logs: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("root:secret\n")
    (logs / "trace/link.jsonl").symlink_to(tmp_path / "shadow")
    (logs / "trace/folder.jsonl").mkdir()
    os.mkfifo(logs / "trace/pipe.jsonl")
    found, skipped = listing(logs, ("samples", "trace", "later"))
    assert [name for name, _ in found if name.startswith("trace/")] == ["trace/celery-worker@sales.service-12.jsonl"]
    assert skipped == [
        "trace/folder.jsonl: not a regular file",
        "trace/link.jsonl: not a regular file",
        "trace/pipe.jsonl: not a regular file",
        "later: no such directory",
    ]


def test_a_name_that_no_bundle_holds_is_not_even_repeated(logs: Path) -> None:
    before = listing(logs, ("trace",))
    (logs / "trace/\x1b[2Jevil\n.jsonl").symlink_to("/etc/shadow")
    os.mkfifo(os.fsencode(logs / "trace") + b"/\xff.jsonl")
    assert listing(logs, ("trace",)) == before


def test_a_segment_that_is_gzipped_while_it_is_packed_is_there_once(logs: Path, tmp_path: Path) -> None:
    segment = logs / "samples/samples-2.csv"
    zipped = segment.with_name("samples-2.csv.gz")
    listed, _ = listing(logs, ("samples", "trace"))
    zipped.write_bytes(gzip.compress(segment.read_bytes(), mtime=0))
    # Both are there for a moment.
    assert [name for name, _ in listing(logs, ("samples",))[0]] == [
        "samples/samples-1.csv.gz",
        "samples/samples-2.csv.gz",
    ]
    segment.unlink()
    made = pack(listed, META, tmp_path / "a.tar.gz", ROOMY)
    unpack(tmp_path / "a.tar.gz", tmp_path / "host")
    assert (made.files, made.skipped) == (3, ())
    assert tree(tmp_path / "host")["samples/samples-2.csv.gz"] == zipped.read_bytes()


@pytest.mark.parametrize("becomes", ["link", "pipe", "nothing"])
def test_a_file_that_changes_its_kind_after_it_was_listed_is_left_out(logs: Path, tmp_path: Path, becomes: str) -> None:
    """The worker's user owns the trace folder; a pipe must not make the packing wait."""
    found, _ = listing(logs, ("samples", "trace"))
    name, file = found[-1]
    file.unlink()
    # Of a trace no gzip is taken: the controller would refuse the bundle.
    file.with_name(f"{file.name}.gz").touch()
    {"link": lambda: file.symlink_to("/etc/hostname"), "pipe": lambda: os.mkfifo(file), "nothing": lambda: None}[
        becomes
    ]()
    made = pack(found, META, tmp_path / "a.tar.gz", ROOMY)
    assert made.files == 2
    assert len(made.skipped) == 1 and made.skipped[0].startswith(f"{name}: ")
    unpack(tmp_path / "a.tar.gz", tmp_path / "host")
    assert name not in tree(tmp_path / "host")


def test_more_than_max_bytes_is_refused_and_the_last_bundle_stays(logs: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "bundle.tar.gz"
    target.parent.mkdir()
    target.write_bytes(b"last")
    total = sum(file.stat().st_size for _, file in listing(logs, ("samples", "trace"))[0]) + len(META)
    with pytest.raises(BundleError, match=rf"{total} bytes of logs are over max_bytes \({total - 1}\)"):
        packed(logs, target, max_bytes=total - 1)
    assert tree(target.parent) == {"bundle.tar.gz": b"last"}
    assert packed(logs, target, max_bytes=total).files == 3


def test_a_file_that_grows_past_max_bytes_while_it_is_read_is_refused(
    logs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bundle, "_size", lambda file: 0)
    with pytest.raises(BundleError, match=r"samples-1\.csv\.gz alone is over the 6 bytes that are left"):
        packed(logs, tmp_path / "a.tar.gz", max_bytes=len(META) + 6)
    assert not list(tmp_path.glob("*bundle*"))


def test_a_full_disk_is_refused_before_anything_is_written(logs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(BundleError, match=f"{tmp_path}: 10 bytes free"):
        packed(logs, tmp_path / "a.tar.gz")


def test_the_module_packs_into_a_file_for_its_user_and_says_when_nothing_changed(
    logs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """There may be no systemd to ask, and only root may give files away."""
    given: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(log_bundle, "meta", lambda: META)
    monkeypatch.setattr(log_bundle.os, "chown", lambda *args: given.append(args))
    dest = tmp_path / "outbox/bundle.tar.gz"

    def run(**more: Any) -> dict[str, Any]:
        params = {"root": str(logs), "dest": str(dest), "owner": "nobody", **more}
        with patch_module_args(params), pytest.raises(SystemExit):
            log_bundle.main()
        return json.loads(capsys.readouterr().out)

    checked = run(_ansible_check_mode=True)
    assert (checked["changed"], checked["files"], dest.parent.exists()) == (True, 3, False)
    made = run()
    assert (made["changed"], made["files"], made["sha256"]) == (True, 3, sha256(dest))
    assert (dest.stat().st_mode & 0o777, dest.parent.stat().st_mode & 0o777) == (0o640, 0o750)
    assert given == [(path, pwd.getpwnam("nobody").pw_uid, 0) for path in (dest.parent, dest)]
    again = run()
    assert (again["changed"], again["sha256"]) == (False, made["sha256"])
    assert "no user nosuchuser on this host" in run(owner="nosuchuser")["msg"]
    assert f"{tmp_path}/none is not there" in run(root=str(tmp_path / "none"))["msg"]
    assert "over max_bytes (10)" in run(max_bytes=10)["msg"]


# What the controller unpacks


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's directory as the last collect left it."""
    for name, content in FORMER.items():
        file = tmp_path / "store/host" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "store/host"


def member(name: str, content: bytes = b"", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


GOOD = (member("meta.json", META), member("samples/a.csv", b"timestamp,pid,rss_kb\n1,2,3\n"))


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT, **more: Any) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form, **more) as made:
        for info, content in members:
            made.addfile(info, io.BytesIO(content) if content else None)
    return gzip.compress(raw.getvalue(), 1, mtime=0)


def refused(path: Path, host: Path, **options: Any) -> str:
    """What unpack() says; it must have left the host's directory and its neighbours alone."""
    neighbours = sorted(host.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        unpack(path, host, **options)
    assert tree(host) == FORMER
    assert sorted(host.parent.iterdir()) == neighbours
    said = str(caught.value)
    assert said.isprintable() and len(said) < 200
    return said


def test_a_new_bundle_replaces_the_former_whole(tmp_path: Path, host: Path) -> None:
    (tmp_path / "b").write_bytes(archive(*GOOD))
    assert unpack(tmp_path / "b", host) == 2
    assert tree(host) == {info.name: content for info, content in GOOD}
    assert [path.name for path in host.parent.iterdir()] == ["host"]


LONG = "samples/" + "x" * 150 + ".csv"
EVIL = "samples/\x1b]0;owned\x07\n.csv"
SOME = b"1,2,3\n"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "absolute": (lambda: archive(*GOOD, member("/etc/cron.d/x", SOME)), "'/etc/cron.d/x' has a name"),
    "absolute sample": (lambda: archive(*GOOD, member("/samples/b.csv", SOME)), "'/samples/b.csv' has a name"),
    "dots": (lambda: archive(*GOOD, member("samples/../../b.csv", SOME)), "'samples/../../b.csv' has a name"),
    "dots first": (lambda: archive(*GOOD, member("../host2/meta.json", SOME)), "'../host2/meta.json' has a name"),
    "other folder": (lambda: archive(*GOOD, member("bin/b.csv", SOME)), "'bin/b.csv' has a name"),
    "control characters": (lambda: archive(*GOOD, member(EVIL, SOME)), r"'samples/\x1b]0;owned\x07\n.csv' has a name"),
    "newline behind": (lambda: archive(*GOOD, member("meta.json\n", SOME)), r"'meta.json\n' has a name"),
    "no text": (lambda: archive(*GOOD, member("samples/\udcff.csv", SOME)), r"'samples/\udcff.csv' has a name"),
    "link": (
        lambda: archive(*GOOD, member("samples/b.csv", type=tarfile.SYMTYPE, linkname="/etc/shadow")),
        "'samples/b.csv' is not a regular file",
    ),
    "hard link": (
        lambda: archive(*GOOD, member("samples/b.csv", type=tarfile.LNKTYPE, linkname="meta.json")),
        "'samples/b.csv' is not a regular file",
    ),
    "device": (lambda: archive(*GOOD, member("samples/b.csv", type=tarfile.CHRTYPE)), "is not a regular file"),
    "pipe": (lambda: archive(*GOOD, member("samples/b.csv", type=tarfile.FIFOTYPE)), "is not a regular file"),
    "folder": (lambda: archive(*GOOD, member("samples", type=tarfile.DIRTYPE)), "is not a regular file"),
    "evil folder": (lambda: archive(*GOOD, member(EVIL, type=tarfile.DIRTYPE)), r"\x1b]0;owned\x07\n.csv' is not"),
    "twice": (lambda: archive(*GOOD, GOOD[1]), "two members share the name 'a.csv'"),
    "twice meta.json": (lambda: archive(GOOD[0], *GOOD), "two members share the name 'meta.json'"),
    "pax": (lambda: archive(*GOOD, member(LONG, SOME), form=tarfile.PAX_FORMAT), "extended tar headers"),
    "pax for all": (
        lambda: archive(*GOOD, form=tarfile.PAX_FORMAT, pax_headers={"path": "samples/b.csv"}),
        "extended tar headers",
    ),
    "GNU long name": (lambda: archive(*GOOD, member(LONG, SOME)), "extended tar headers"),
    "GNU long link": (
        lambda: archive(*GOOD, member("samples/b.csv", type=tarfile.SYMTYPE, linkname=LONG)),
        "extended tar headers",
    ),
    "sparse": (lambda: archive(*GOOD, member("samples/b.csv", SOME, type=tarfile.GNUTYPE_SPARSE)), "extended tar"),
    "no meta.json": (lambda: archive(GOOD[1]), "it holds no meta.json"),
    "no member": (archive, "it holds no meta.json"),
    "text": (lambda: b"<html>502 Bad Gateway</html>", "truncated or damaged (Not a gzipped file (b'<h'))"),
    "control characters alone": (lambda: b"\x1b[2J" * 99, r"truncated or damaged (Not a gzipped file (b'\x1b["),
    "nothing": (lambda: b"", "truncated or damaged"),
    "no tar": (lambda: gzip.compress(b"\x1b[2J" * 999), "truncated or damaged"),
    "negative size": (lambda: archive(*GOOD, member("samples/b.csv", size=-4096), GOOD[0]), "damaged"),
    "more behind its end": (lambda: archive(*GOOD) + gzip.compress(bytes(9_000_000)), "there is more behind its end"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bundle_that_cannot_be_trusted_is_refused_and_the_former_stays(tmp_path: Path, host: Path, case: str) -> None:
    make, words = REFUSED[case]
    (tmp_path / "b").write_bytes(make())
    assert words in refused(tmp_path / "b", host)


def test_an_extended_header_is_refused_before_its_content_is_read(tmp_path: Path, host: Path) -> None:
    """tarfile would hold it in memory whole; here there are not even the bytes that it announces."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "b").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(512)))
    assert "extended tar headers" in refused(tmp_path / "b", host)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, host: Path, monkeypatch: Any) -> None:
    written: list[int] = []
    copy = shutil.copyfileobj

    def counted(source: Any, out: Any, length: int) -> None:
        copy(source, out, length)
        written.append(out.tell())

    monkeypatch.setattr(bundle.shutil, "copyfileobj", counted)
    (tmp_path / "b").write_bytes(archive(*GOOD, member("samples/b.csv", bytes(9_000_000))))
    assert (tmp_path / "b").stat().st_size < 100_000
    assert refused(tmp_path / "b", host, max_bytes=1000) == "it unpacks to more than 1000 bytes"
    assert sum(written) < 1000


def test_many_small_members_are_bounded_in_sum_and_in_number(tmp_path: Path, host: Path) -> None:
    (tmp_path / "b").write_bytes(archive(*GOOD, *(member(f"samples/{n}.csv", b"12345\n") for n in range(50))))
    assert refused(tmp_path / "b", host, max_bytes=200) == "it unpacks to more than 200 bytes"
    assert refused(tmp_path / "b", host, max_members=51) == "it has more than 51 members"
    assert unpack(tmp_path / "b", host, max_members=52) == 52


def test_another_checksum_than_the_hosts_is_refused(tmp_path: Path, host: Path) -> None:
    (tmp_path / "b").write_bytes(archive(*GOOD))
    assert "its checksum is not the one that the host gave" in refused(tmp_path / "b", host, expected_sha256="0" * 64)


def test_a_bundle_cut_anywhere_is_refused(tmp_path: Path, host: Path) -> None:
    whole = archive(*GOOD)
    for length in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:length])
        assert "truncated or damaged" in refused(tmp_path / "b", host), length


def test_a_flipped_byte_is_refused_or_harmless_even_without_the_hosts_checksum(tmp_path: Path, host: Path) -> None:
    whole = archive(*GOOD)
    for at in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            unpack(tmp_path / "b", host)
        except BundleError as error:
            assert re.search("damaged|meta.json|member|header", str(error)), (at, error)
            continue
        # Some fields of gzip's header mean nothing, and zeros may be copied from elsewhere.
        assert tree(host) == {info.name: content for info, content in GOOD}, at


def test_a_bundle_that_is_not_there_changes_nothing(tmp_path: Path, host: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "none", host)
    assert tree(host) == FORMER


def test_packing_takes_memory_for_what_is_there_and_not_for_what_may_be(tmp_path: Path) -> None:
    log = tmp_path / "samples-1.csv"
    log.write_text("a,b\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, hard))
    try:
        made = pack([("samples/samples-1.csv", log)], b"{}", tmp_path / "b.tar.gz", 1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert made.files == 1


@pytest.mark.parametrize("blocks", range(21))
def test_a_bundle_of_any_length_is_taken(tmp_path: Path, blocks: int) -> None:
    """A tar is padded to records of 20 blocks, and its end may fall on any of them."""
    bundle = tmp_path / "host.tar.gz"
    bundle.write_bytes(archive(GOOD[0], member("samples/a.csv", b"1\n" * 256 * blocks)))
    assert unpack(bundle, tmp_path / "store") == 2
