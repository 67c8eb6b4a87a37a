"""Bundles: the same logs give the same bytes, each goes on where the store ends, and none is trusted."""

from __future__ import annotations

import gzip
import io
import json
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import log_bundle
from plimsoll import bundle
from plimsoll.bundle import BundleError, Cursor, Packed, acknowledged, advance, listing, pack, plan, sha256, unpack

META = b'{"schema": 1}\n'
ROOMY = 1 << 20
FORMER = {"meta.json": b"former", "samples/old.csv": b"former\n"}
FOLDERS = ("samples", "trace", "guard")
HEADER = b"timestamp,pid,rss_kb\n"
TRACE = "trace/celery-worker@sales.service-12.jsonl"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """What a host has: whole files, one that is being written to, and what no bundle takes."""
    root = tmp_path / "logs"
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    (root / "samples/samples-20251124T110000Z.csv.gz").write_bytes(gzip.compress(HEADER + b"1,2,3\n", mtime=0))
    (root / "samples/samples-20251124T120000Z.csv").write_bytes(HEADER + b"4,5,6\n7,8")
    (root / "samples/rollup-20251124T000000Z.csv").write_bytes(b"timestamp,pid,floor_kb\n1,2,3\n")
    (root / "samples/samples-20251124T110000Z.csv.gz.tmp").write_bytes(b"scratch")
    (root / "samples/.lock").touch()
    (root / TRACE).write_bytes(b'{"kind": "window_open"}\n{"kin')
    (root / "guard/acts.jsonl").write_bytes(b'{"time": 1}\n')
    return root


class Controller:
    """What the controller does with a host's logs: it holds the cursor, and all lines that came by it."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        self.cursor = Cursor(logs="id")
        self.lines: dict[str, list[str]] = {}
        self.meta: Any = {}

    def pack(self, scope: str = "full", max_bytes: int = ROOMY) -> Packed:
        found, _ = listing(self.root, FOLDERS)
        wanted = [log for log in found if scope == "full" or bundle.ROUTINE.match(log.name)]
        parts, more = plan(wanted, self.cursor, max_bytes)
        meta = {"schema": 2, "logs": "id", "units": [], "held": [log.key for log in found], "journal": 5, "more": more}
        return pack(parts, meta, b"", self.scratch / "bundle.tar.gz")

    def take(self) -> None:
        """As the store does: all of it, or nothing."""
        at = self.scratch / "unpacked"
        unpack(self.scratch / "bundle.tar.gz", at)
        self.meta = json.loads((at / "meta.json").read_text())
        self.cursor = advance(self.cursor, self.meta, at)
        for name, part in self.meta["parts"].items():
            raw = (at / name).read_bytes()
            text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
            self.lines.setdefault(part["file"], []).extend(text.splitlines()[name.endswith((".csv", ".gz")) :])

    def collect(self, scope: str = "full", max_bytes: int = ROOMY) -> int:
        """How many parts came."""
        made = self.pack(scope, max_bytes)
        self.take()
        return made.files


@pytest.fixture
def controller(logs: Path, tmp_path: Path) -> Controller:
    return Controller(logs, tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What the host packs


def test_what_is_packed_is_what_is_unpacked_without_torn_last_lines(
    logs: Path, tmp_path: Path, controller: Controller
) -> None:
    made = controller.pack()
    assert unpack(tmp_path / "bundle.tar.gz", tmp_path / "host", expected_sha256=made.sha256) == 6
    unpacked = tree(tmp_path / "host")
    meta = json.loads(unpacked.pop("meta.json"))
    assert unpacked == {
        name: (logs / name).read_bytes()
        for name in (
            "samples/samples-20251124T110000Z.csv.gz",
            "samples/rollup-20251124T000000Z.csv",
            "guard/acts.jsonl",
        )
    } | {"samples/samples-20251124T120000Z.csv": HEADER + b"4,5,6\n", TRACE: b'{"kind": "window_open"}\n'}
    assert meta["parts"].keys() == unpacked.keys() and meta["left_out"] == []
    assert (made.files, made.skipped) == (5, ())
    bundled = tmp_path / "bundle.tar.gz"
    assert (made.size, made.sha256) == (bundled.stat().st_size, sha256(bundled))


def test_the_same_logs_give_the_same_bytes_whenever_and_wherever(
    logs: Path, tmp_path: Path, controller: Controller, monkeypatch: Any
) -> None:
    first = controller.pack()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    other = tmp_path / "elsewhere"
    for name, content in sorted(tree(logs).items(), reverse=True):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(content)
        (other / name).chmod(0o600)
        os.utime(other / name, (1, 1))
    controller.root = other
    assert controller.pack() == first
    (other / "samples/samples-20251124T120000Z.csv").write_bytes(HEADER + b"4,5,7\n")
    assert controller.pack().sha256 != first.sha256


def test_only_what_is_new_comes_again_and_each_line_once(logs: Path, controller: Controller) -> None:
    assert controller.collect() == 5
    assert controller.collect() == 0
    segment = logs / "samples/samples-20251124T120000Z.csv"
    with segment.open("ab") as out:
        out.write(b",9\n10,11,12\n")
    with (logs / TRACE).open("ab") as out:
        out.write(b'd": "growth"}\n')
    assert controller.collect() == 2
    assert controller.lines["samples/samples-20251124T120000Z.csv"] == ["4,5,6", "7,8,9", "10,11,12"]
    assert ['{"kind": "window_open"}', '{"kind": "growth"}'] in controller.lines.values()


def test_a_segment_that_was_gzipped_in_between_goes_on_where_it_was(logs: Path, controller: Controller) -> None:
    controller.collect()
    segment = logs / "samples/samples-20251124T120000Z.csv"
    content = HEADER + b"4,5,6\n7,8,9\n"
    segment.with_name(f"{segment.name}.gz").write_bytes(gzip.compress(content, mtime=0))
    segment.unlink()
    assert controller.collect() == 1
    assert controller.lines["samples/samples-20251124T120000Z.csv"] == ["4,5,6", "7,8,9"]
    assert controller.collect() == 0


def test_a_trace_that_was_rotated_is_the_same_file_and_the_new_one_another(logs: Path, controller: Controller) -> None:
    controller.collect()
    (logs / TRACE).rename((logs / TRACE).with_suffix(".1.jsonl"))
    (logs / TRACE).write_bytes(b'{"kind": "task_growth"}\n')
    assert controller.collect() == 1
    traces = [lines for key, lines in controller.lines.items() if key.startswith("trace/")]
    assert traces == [['{"kind": "window_open"}'], ['{"kind": "task_growth"}']]


def test_routine_is_what_is_small_and_what_it_left_comes_with_full(controller: Controller) -> None:
    assert controller.collect("routine") == 2
    assert sorted(key.split("-")[0].split("/")[0] for key in controller.lines) == ["guard", "samples"]
    assert controller.collect("routine") == 0
    assert controller.collect("full") == 3
    assert controller.collect("full") == 0


def test_more_than_max_bytes_comes_in_several_bundles_the_oldest_first(logs: Path, controller: Controller) -> None:
    for hour in range(13, 23):
        (logs / f"samples/samples-20251124T{hour}0000Z.csv").write_bytes(HEADER + b"1,2,3\n" * 10)
    runs = 0
    while controller.collect(max_bytes=200):
        runs += 1
    assert runs > 4 and controller.meta["more"] is False
    hours = [key for key in controller.lines if key.startswith("samples/samples-")]
    assert hours == sorted(hours) and len(hours) == 12
    assert all(len(controller.lines[key]) == 10 for key in hours[2:])


def test_a_file_longer_than_a_part_is_several_and_none_holds_half_a_line(
    logs: Path, controller: Controller, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bundle, "PART_BYTES", 64)
    lines = [f"{number},{number},{number}" for number in range(1000, 1030)]
    (logs / "samples/samples-20251124T120000Z.csv").write_bytes(HEADER + "\n".join(lines).encode() + b"\n")
    assert controller.collect() > 8
    assert controller.lines["samples/samples-20251124T120000Z.csv"] == lines
    assert controller.collect() == 0


def test_one_segment_over_max_bytes_is_named_with_the_way_out(logs: Path, controller: Controller) -> None:
    made = controller.pack(max_bytes=10)
    assert made.files == 0
    assert made.skipped == (
        "samples/rollup-20251124T000000Z.csv: no whole line in 10 bytes, which is all that may be packed",
    )
    for path in [*logs.glob("guard/*"), *logs.glob("samples/rollup-*")]:
        path.unlink()
    with pytest.raises(
        BundleError, match=r"samples-20251124T110000Z\.csv\.gz alone is over max_bytes \(10\); raise it"
    ):
        controller.pack(max_bytes=10)


def test_a_bundle_that_was_lost_is_made_again_whole(controller: Controller) -> None:
    first = controller.pack()
    assert controller.pack() == first
    controller.take()
    assert controller.pack().files == 0


@pytest.mark.parametrize(
    "change", ["replayed", "gap", "longer file", "no member", "unknown member", "no name", "other schema"]
)
def test_a_bundle_that_does_not_go_on_where_the_store_ends_is_refused(
    controller: Controller, tmp_path: Path, change: str
) -> None:
    controller.pack("routine")
    unpack(tmp_path / "bundle.tar.gz", tmp_path / "host")
    meta = json.loads((tmp_path / "host/meta.json").read_text())
    name = "samples/rollup-20251124T000000Z.csv"
    ahead = Cursor("id", {name: meta["parts"][name]["to"]})
    assert advance(Cursor("id"), meta, tmp_path / "host").files[name] == 29
    # Under another name of their directory, all files are others.
    assert advance(Cursor("former", {name: 7}), meta, tmp_path / "host").files[name] == 29
    # Such a part says so.
    again = {**meta, "parts": {**meta["parts"], name: {**meta["parts"][name], "anew": True}}}
    assert advance(ahead, again, tmp_path / "host").files[name] == 29
    if change == "gap":
        meta["parts"][name]["from"] = 5
    elif change == "longer file":
        meta["parts"][name]["to"] = -1
    elif change == "no member":
        (tmp_path / "host" / name).unlink()
    elif change == "unknown member":
        (tmp_path / "host/samples/x.csv").touch()
    elif change == "no name":
        meta["parts"][name]["file"] = {}
    elif change == "other schema":
        meta["schema"] = 1
    with pytest.raises(BundleError):
        advance(ahead if change == "replayed" else Cursor("id"), meta, tmp_path / "host")


def test_a_file_that_was_begun_anew_and_is_shorter_comes_whole(logs: Path, controller: Controller) -> None:
    controller.collect()
    (logs / "samples/samples-20251124T120000Z.csv").write_bytes(HEADER)
    assert controller.collect() == 1
    with (logs / "samples/samples-20251124T120000Z.csv").open("ab") as out:
        out.write(b"8,8,8\n")
    assert controller.collect() == 1
    assert controller.lines["samples/samples-20251124T120000Z.csv"] == ["4,5,6", "8,8,8"]


def test_a_file_that_was_cut_and_has_grown_again_comes_whole(logs: Path, controller: Controller) -> None:
    """As after a power cut: what is there is not what was there."""
    controller.collect()
    (logs / "samples/samples-20251124T120000Z.csv").write_bytes(HEADER + b"1,1,1111111\n2,2,2\n")
    assert controller.collect() == 1
    assert controller.lines["samples/samples-20251124T120000Z.csv"] == ["4,5,6", "1,1,1111111", "2,2,2"]
    assert controller.collect() == 0


def test_of_two_files_that_begin_alike_the_longer_comes(logs: Path, controller: Controller) -> None:
    copy = logs / "trace/a-copy.jsonl"
    copy.write_bytes((logs / TRACE).read_bytes() + b'd": "growth"}\n')
    found, skipped = listing(logs, ("trace",))
    assert [log.name for log in found] == ["trace/a-copy.jsonl"]
    assert skipped == [f"{TRACE}: begins as trace/a-copy.jsonl does"]
    controller.collect()
    assert controller.collect() == 0


def test_a_workers_user_cannot_crowd_the_samples_out(logs: Path, controller: Controller, monkeypatch: Any) -> None:
    monkeypatch.setattr(bundle, "MOST_TRACE_BYTES", 1000)
    with (logs / "trace/a-00000000T000000Z.jsonl").open("wb") as out:
        out.write(b"{}\n")
        out.truncate(1001)
    (logs / "trace/b-00000000T000000Z.jsonl").write_bytes(b'{"b": 1}\n' * 100)
    found, skipped = listing(logs, FOLDERS)
    assert skipped == ["trace/a-00000000T000000Z.jsonl: more than 1000 bytes, which the bootstrap does not write"]
    assert [log.name.split("/")[0] for log in found] == ["samples", "guard", "samples", "samples", "trace", "trace"]


def test_a_segment_that_unpacks_to_far_more_than_it_says_takes_little_memory(
    logs: Path, controller: Controller
) -> None:
    """Its last four bytes say how much it holds, and may say anything."""
    controller.collect()
    segment = logs / "samples/samples-20251124T120000Z.csv"
    packed = gzip.compress(HEADER + b"4,5,6\n" + b"7,8,9\n" * 30_000_000)
    segment.with_name(f"{segment.name}.gz").write_bytes(packed[:-4] + (len(HEADER) + 12).to_bytes(4, "little"))
    segment.unlink()
    code = (
        "import re, sys; sys.path.insert(0, 'module_utils')\n"
        "from pathlib import Path\nfrom plimsoll import bundle\n"
        f"logs = bundle.listing(Path({str(logs)!r}), ('samples',))[0]\n"
        f"parts, _ = bundle.plan(logs, bundle.Cursor.of({controller.cursor.plain()!r}), 1 << 20)\n"
        f"made = bundle.pack(parts, {{}}, b'', Path({str(logs / 'b.tar.gz')!r}))\n"
        "print(made.files, re.search('VmHWM:\\\\s+([0-9]+)', open('/proc/self/status').read())[1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    files, peak = ran.stdout.split()
    assert files == "1" and int(peak) < 60 << 10, ran


def test_what_is_in_the_store_whole_is_acknowledged(logs: Path, controller: Controller) -> None:
    controller.collect("routine")
    named = acknowledged(listing(logs, FOLDERS)[0], controller.cursor)
    assert named == ["guard/acts.jsonl", "samples/rollup-20251124T000000Z.csv"]
    controller.collect()
    with (logs / "samples/rollup-20251124T000000Z.csv").open("ab") as out:
        out.write(b"4,5,6\n")
    named = acknowledged(listing(logs, FOLDERS)[0], controller.cursor)
    assert "samples/samples-20251124T110000Z.csv" in named and "samples/rollup-20251124T000000Z.csv" not in named


@pytest.mark.parametrize(
    "cursor", [[], {"logs": 1}, {"files": {"a": -1}}, {"files": {"a": "1"}}, {"journal": True}, {"files": []}]
)
def test_a_damaged_cursor_is_refused(cursor: Any) -> None:
    with pytest.raises(BundleError, match="cursor"):
        Cursor.of(cursor)


def test_links_and_special_files_are_left_out_with_the_reason(logs: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("root:secret\n")
    (logs / "trace/link.jsonl").symlink_to(tmp_path / "shadow")
    (logs / "trace/folder.jsonl").mkdir()
    os.mkfifo(logs / "trace/pipe.jsonl")
    found, skipped = listing(logs, ("trace", "later"))
    assert [log.name for log in found] == [TRACE]
    assert [line.split(":")[0] for line in skipped] == [
        "trace/folder.jsonl",
        "trace/link.jsonl",
        "trace/pipe.jsonl",
    ]


def test_a_name_that_no_bundle_holds_is_not_even_repeated(logs: Path) -> None:
    before = listing(logs, ("trace",))
    (logs / "trace/\x1b[2Jevil\n.jsonl").symlink_to("/etc/shadow")
    os.mkfifo(os.fsencode(logs / "trace") + b"/\xff.jsonl")
    assert listing(logs, ("trace",)) == before


def test_a_folder_of_a_million_files_is_looked_at_in_part_and_that_is_said(logs: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bundle, "MAX_FILES", 6)
    for number in range(9):
        (logs / f"trace/{number}.jsonl").write_bytes(b"%d\n" % number)
    found, skipped = listing(logs, FOLDERS)
    assert len([log for log in found if log.name.startswith("trace/")]) == 6
    assert skipped == ["trace: 6 files or more, of which not all were looked at"]


def test_a_segment_that_is_gzipped_while_it_is_packed_comes_with_the_next_bundle(
    logs: Path, controller: Controller
) -> None:
    segment = logs / "samples/samples-20251124T120000Z.csv"
    zipped = segment.with_name(f"{segment.name}.gz")
    zipped.write_bytes(gzip.compress(HEADER + b"4,5,6\n", mtime=0))
    # Both are there for a moment.
    assert [log.name for log in listing(logs, FOLDERS)[0]].count("samples/samples-20251124T120000Z.csv") == 1
    zipped.rename(zipped.with_suffix(".tmp"))
    parts, _ = plan(listing(logs, FOLDERS)[0], controller.cursor, ROOMY)
    zipped.with_suffix(".tmp").rename(zipped)
    segment.unlink()
    meta = {"schema": 2, "logs": "id", "units": [], "journal": 5, "held": [part.log.key for part in parts]}
    made = pack(parts, meta, b"", controller.scratch / "bundle.tar.gz")
    assert made.files == 4 and made.skipped[0].startswith("samples/samples-20251124T120000Z.csv: ")
    controller.take()
    assert controller.collect() == 1
    assert controller.lines["samples/samples-20251124T120000Z.csv"] == ["4,5,6"]


@pytest.mark.parametrize("becomes", ["link", "pipe", "nothing", "rotated"])
def test_a_file_that_changes_after_it_was_listed_is_left_out(
    logs: Path, tmp_path: Path, controller: Controller, becomes: str
) -> None:
    """The worker's user owns the trace folder; a pipe must not make the packing wait."""
    parts, _ = plan(listing(logs, FOLDERS)[0], controller.cursor, ROOMY)
    file = logs / TRACE
    file.unlink()
    {
        "link": lambda: file.symlink_to("/etc/hostname"),
        "pipe": lambda: os.mkfifo(file),
        "nothing": lambda: None,
        "rotated": lambda: file.write_bytes(b'{"kind": "another"}\n{}\n'),
    }[becomes]()
    made = pack(parts, {"schema": 2}, b"", tmp_path / "a.tar.gz")
    assert made.files == 4
    assert len(made.skipped) == 1 and made.skipped[0].startswith(f"{TRACE}: ")
    unpack(tmp_path / "a.tar.gz", tmp_path / "host")
    assert TRACE not in tree(tmp_path / "host")


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, controller: Controller, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(BundleError, match=f"{tmp_path}: 10 bytes free"):
        controller.pack()
    assert not list(tmp_path.glob("*bundle*"))


# The module, where there may be no systemd to ask, and only root may give files away.


@pytest.fixture
def module(logs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(log_bundle, "facts", lambda: {"kernel": "6.1", "python": "3.11.2", "units": []})
    monkeypatch.setattr(log_bundle.journal, "events", lambda units, since, until: ([], [], until))
    monkeypatch.setattr(log_bundle, "confine", lambda percent: None)
    monkeypatch.setattr(log_bundle.os, "chown", lambda *args: None)

    def run(**more: Any) -> dict[str, Any]:
        params = {"root": str(logs), "dest": str(tmp_path / "outbox/bundle.tar.gz"), "owner": "nobody", **more}
        with patch_module_args(params), pytest.raises(SystemExit):
            log_bundle.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_the_module_packs_what_is_behind_the_cursor_into_a_file_for_its_user(
    module: Any, logs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    given: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(log_bundle.os, "chown", lambda *args: given.append(args))
    monkeypatch.setattr("os.fchown", lambda descriptor, user, group: given.append((dest, user, group)))
    dest = tmp_path / "outbox/bundle.tar.gz"
    checked = module(_ansible_check_mode=True)
    assert (checked["changed"], checked["files"], dest.parent.exists()) == (True, 5, False)
    assert not (logs / "id").exists() and not (logs / "acknowledged.json").exists()
    made = module()
    assert (made["changed"], made["files"], made["sha256"]) == (True, 5, sha256(dest))
    assert (dest.stat().st_mode & 0o777, dest.parent.stat().st_mode & 0o777) == (0o640, 0o750)
    assert given == [(path, pwd.getpwnam("nobody").pw_uid, 0) for path in (dest.parent, dest)]
    assert json.loads((logs / "acknowledged.json").read_text()) == []

    unpack(dest, tmp_path / "host")
    cursor = advance(Cursor(), json.loads((tmp_path / "host/meta.json").read_text()), tmp_path / "host")
    again = module(cursor=cursor.plain())
    assert (again["changed"], again["files"], "sha256" in again, dest.exists()) == (False, 0, False, False)
    assert len(json.loads((logs / "acknowledged.json").read_text())) == 5
    # Logs that were begun anew are others.
    (logs / "id").unlink()
    assert module(cursor=cursor.plain())["files"] == 5


@pytest.mark.parametrize("most", [20_000, 7])
def test_where_not_all_could_be_looked_at_nothing_is_forgotten_but_what_is_too_much(
    module: Any, logs: Path, tmp_path: Path, monkeypatch: Any, most: int
) -> None:
    """A link in the trace folder is there for good, and so are the names of files that came and went."""
    monkeypatch.setattr(log_bundle, "MAX_MEMBERS", most)
    (logs / "trace/link.jsonl").symlink_to("/etc/hostname")
    (logs / "id").write_text("id\n")
    gone = {f"trace/{number:016x}": 9 for number in range(20)}
    module(cursor={"logs": "id", "files": gone})
    unpack(tmp_path / "outbox/bundle.tar.gz", tmp_path / "host")
    held = json.loads((tmp_path / "host/meta.json").read_text())["held"]
    assert len(held) == min(most, 25) and held[5:] == list(gone)[: len(held) - 5]
    # What is there now comes first.
    assert not set(held[:5]) & gone.keys()


def test_what_systemd_says_of_the_units_is_new_when_it_has_changed(
    module: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    module()
    unpack(tmp_path / "outbox/bundle.tar.gz", tmp_path / "host")
    cursor = advance(Cursor(), json.loads((tmp_path / "host/meta.json").read_text()), tmp_path / "host").plain()
    monkeypatch.setattr(
        log_bundle, "facts", lambda: {"kernel": "6.1", "python": "3.11.2", "units": [{"NRestarts": "1"}]}
    )
    made = module(cursor=cursor)
    assert made["changed"] and made["files"] == 0 and "sha256" in made


def test_the_journal_is_read_from_where_it_was_read_to(module: Any, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[tuple[int, int]] = []
    event = {"time": 1.0, "unit": "", "source": "kernel", "priority": 3, "pid": None, "message": "Out of memory"}
    monkeypatch.setattr(
        log_bundle.journal,
        "events",
        lambda units, since, until: (asked.append((since, until)), ([event], [], until))[1],
    )
    module()
    unpack(tmp_path / "outbox/bundle.tar.gz", tmp_path / "host")
    assert json.loads((tmp_path / "host/journal/events.jsonl").read_text()) == event
    cursor = advance(Cursor(), json.loads((tmp_path / "host/meta.json").read_text()), tmp_path / "host")
    module(cursor=cursor.plain())
    assert asked[1][0] == asked[0][1] == cursor.journal


def test_the_module_says_what_is_wrong_in_one_line(module: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 94, 6))
    assert "no user nosuchuser on this host" in module(owner="nosuchuser")["msg"]
    assert f"{tmp_path}/none is not there" in module(root=str(tmp_path / "none"))["msg"]
    assert "6 bytes free" in module()["msg"]
    assert "the cursor is damaged" in module(cursor={"logs": 7})["msg"]


def test_two_collections_do_not_pack_at_the_same_time(module: Any, tmp_path: Path) -> None:
    module()
    with subprocess.Popen(["flock", tmp_path / "outbox", "cat"], stdin=subprocess.PIPE) as other:
        for _ in range(100):
            if "another collection is packing" in module().get("msg", ""):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("it packed all the same")
        assert other.stdin
        other.stdin.close()
    assert "sha256" in module()


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
        parts = [bundle.Part(bundle.Log("samples/samples-1.csv", log, "samples/samples-1.csv", 4, 4, False), 0, 4)]
        made = pack(parts, {}, b"", tmp_path / "b.tar.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert made.files == 1


@pytest.mark.parametrize("blocks", range(21))
def test_a_bundle_of_any_length_is_taken(tmp_path: Path, blocks: int) -> None:
    """A tar is padded to records of 20 blocks, and its end may fall on any of them."""
    bundle = tmp_path / "host.tar.gz"
    bundle.write_bytes(archive(GOOD[0], member("samples/a.csv", b"1\n" * 256 * blocks)))
    assert unpack(bundle, tmp_path / "store") == 2
