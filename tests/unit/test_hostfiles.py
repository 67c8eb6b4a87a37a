"""Files of a host: what differs is seen once, mended whole, and shown without secrets."""

from __future__ import annotations

import dataclasses
import grp
import json
import os
import pwd
import re
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import host_files
from plimsoll import hostfiles
from plimsoll.hostfiles import Change, Entry, fragment, load, plan, read, save, unit_of, write

SECRET = "hunter2-hunter2"
OWNER = pwd.getpwuid(os.getuid()).pw_name
GROUP = grp.getgrgid(os.getgid()).gr_name


def entry(path: Path, state: str = "file", content: str = "", mode: int = 0o644, secret: bool = False) -> Entry:
    return Entry(str(path), state, content, mode, OWNER, GROUP, secret)


def changes(*desired: Entry) -> list[Change]:
    return plan(desired, [read(want.path) for want in desired])


def run(capsys: Any, check: bool = False, **params: Any) -> dict[str, Any]:
    given = {**params, "_ansible_check_mode": check, "_ansible_diff": True}
    with patch_module_args(given), pytest.raises(SystemExit):
        host_files.main()
    return json.loads(capsys.readouterr().out)


def test_what_is_written_is_what_was_wanted_and_changes_nothing_on_a_second_run(tmp_path: Path) -> None:
    desired = [
        entry(tmp_path / "etc", "directory", mode=0o750),
        entry(tmp_path / "etc/a.conf", content="a = 1\n", mode=0o640),
        entry(tmp_path / "deep/er/b.conf", content="ü\n"),
        entry(tmp_path / "etc/environment", content=SECRET, mode=0o600, secret=True),
        entry(tmp_path / "etc/none", "absent"),
    ]
    planned = changes(*desired)
    assert [change.after for change in planned] == desired[:-1]
    for change in planned:
        write(change.after)
    assert [dataclasses.replace(read(want.path), secret=want.secret) for want in desired[:-1]] == desired[:-1]
    assert changes(*desired) == []


@pytest.mark.parametrize(
    "differs", [{"content": "a = 2\n"}, {"mode": 0o600}, {"owner": "nobody"}, {"group": "nogroup"}]
)
def test_each_property_that_differs_is_a_change(tmp_path: Path, differs: dict[str, Any]) -> None:
    want = entry(tmp_path / "a.conf", content="a = 1\n")
    write(want)
    assert [change.after for change in changes(dataclasses.replace(want, **differs))]


def test_a_file_that_is_to_go_goes(tmp_path: Path) -> None:
    gone = entry(tmp_path / "a.conf", "absent")
    write(entry(tmp_path / "a.conf"))
    (change,) = changes(gone)
    write(change.after)
    assert changes(gone) == []


def test_bytes_that_are_no_text_are_read_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\x00")
    write(read(str(tmp_path / "a")))
    assert (tmp_path / "a").read_bytes() == b"\xff\x00"
    (change,) = changes(entry(tmp_path / "a", content="text"))
    assert change.diff()["before"].endswith("0644\n\ufffd\x00")


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    write(entry(tmp_path / "real", content="x"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert changes(entry(tmp_path / "link", content="x")) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    write(entry(tmp_path / "a.conf", content="old"))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hostfiles.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(entry(tmp_path / "a.conf", content="new"))
    assert (tmp_path / "a.conf").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.conf"]


def test_a_secret_is_never_readable_by_others_on_its_way(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[int] = []
    chmod = os.fchmod

    def watched(descriptor: int, mode: int) -> None:
        seen.append(os.fstat(descriptor).st_mode & 0o777)
        chmod(descriptor, mode)

    monkeypatch.setattr(hostfiles.os, "fchmod", watched)
    write(entry(tmp_path / "environment", content=SECRET, mode=0o640, secret=True))
    assert seen == [0o600]


@pytest.mark.parametrize(
    ("there", "wanted", "words"),
    [
        ("directory", "file", "is a directory, and is to be a file"),
        ("directory", "absent", "is a directory, and is to be absent"),
        ("file", "directory", "is a file, and is to be a directory"),
        ("pipe", "file", "is neither a file nor a directory, and is to be a file"),
    ],
)
def test_the_wrong_kind_of_path_is_refused_by_name(tmp_path: Path, there: str, wanted: str, words: str) -> None:
    path = tmp_path / "here"
    {"directory": path.mkdir, "file": path.touch, "pipe": lambda: os.mkfifo(path)}[there]()
    with pytest.raises(ValueError, match=re.escape(f"{path} {words}; move it away first")):
        changes(entry(path, wanted))


@pytest.mark.parametrize("who", [{"owner": "nosuchuser"}, {"group": "nosuchgroup"}])
def test_an_unknown_owner_or_group_is_named_and_nothing_is_written(tmp_path: Path, who: dict[str, str]) -> None:
    path = tmp_path / "a.conf"
    with pytest.raises(ValueError, match=f"{path}: no such owner or group on this host: .*{next(iter(who.values()))}"):
        write(dataclasses.replace(entry(path), **who))
    assert not path.exists()


def test_the_diff_shows_content_owner_and_mode(tmp_path: Path) -> None:
    write(entry(tmp_path / "a", content="old\n"))
    (change,) = changes(entry(tmp_path / "a", content="new\n", mode=0o600))
    assert change.diff() == {
        "before_header": f"{tmp_path}/a",
        "after_header": f"{tmp_path}/a",
        "before": f"# file {OWNER}:{GROUP} 0644\nold\n",
        "after": f"# file {OWNER}:{GROUP} 0600\nnew\n",
    }
    (made,) = changes(entry(tmp_path / "b", "directory", mode=0o755))
    assert (made.diff()["before"], made.diff()["after"]) == ("", f"# directory {OWNER}:{GROUP} 0755\n")


def test_the_diff_of_a_secret_says_that_it_changed_and_not_what(tmp_path: Path) -> None:
    write(entry(tmp_path / "a", content=f"old {SECRET}\n"))
    (change,) = changes(entry(tmp_path / "a", content=f"new {SECRET}\n", secret=True))
    assert SECRET not in str(change.diff())
    assert "changed" in change.diff()["after"]
    (mode,) = changes(entry(tmp_path / "a", content=f"old {SECRET}\n", mode=0o600, secret=True))
    assert SECRET not in str(mode.diff())
    assert "changed" not in mode.diff()["after"]


@pytest.mark.parametrize("item", [{"content": f"new {SECRET}\n"}, {"state": "absent"}, {"mode": "0600"}])
def test_the_module_shows_no_secret(tmp_path: Path, capsys: Any, item: dict[str, str]) -> None:
    path = tmp_path / "environment"
    path.write_text(f"old {SECRET}\n")
    mine = {"path": str(path), "owner": OWNER, "group": GROUP}
    result = run(capsys, check=True, secret_files=[{**mine, **item}])
    assert result["changed"] and result["paths"] == [str(path)] and result["diff"]
    assert SECRET not in json.dumps(result["diff"])
    assert path.read_text() == f"old {SECRET}\n"


def test_the_module_writes_once(tmp_path: Path, capsys: Any) -> None:
    files = [{"path": str(tmp_path / "a"), "content": "x\n", "owner": OWNER, "group": GROUP}]
    assert run(capsys, check=True, files=files)["changed"]
    assert not (tmp_path / "a").exists()
    assert run(capsys, files=files)["changed"]
    assert (tmp_path / "a").read_text() == "x\n"
    again = run(capsys, files=files)
    assert (again["changed"], again["paths"], again["diff"]) == (False, [], [])


def test_folders_that_are_made_on_the_way_can_be_passed_on_a_hardened_host(tmp_path: Path, capsys: Any) -> None:
    before = os.umask(0o077)
    try:
        run(capsys, files=[{"path": str(tmp_path / "deep/er/a"), "owner": OWNER, "group": GROUP}])
    finally:
        os.umask(before)
    assert [(tmp_path / made).stat().st_mode & 0o777 for made in ("deep", "deep/er")] == [0o755, 0o755]


def test_the_module_names_the_path_of_a_mode_that_lost_its_quotes(tmp_path: Path, capsys: Any) -> None:
    result = run(capsys, files=[{"path": str(tmp_path / "a"), "mode": 0o644}])
    assert result["failed"]
    assert f"{tmp_path}/a: mode '420'" in result["msg"]


@pytest.mark.parametrize(
    ("path", "unit", "file"),
    [
        ("/etc/systemd/system/celery.slice", "celery.slice", "celery.slice"),
        ("/etc/systemd/system/redis-server.service.d/10-x.conf", "redis-server.service", "redis-server.service"),
        ("/etc/systemd/system/w@.service", "w@verify.service", "w@.service"),
        ("/etc/systemd/system/w@.service.d/50-x.conf", "w@verify.service", "w@.service"),
        ("/usr/lib/systemd/system/w@sales.service.d/10-x.conf", "w@sales.service", "w@.service"),
        ("/etc/systemd/system/w@eu.sales.service.d/10-x.conf", "w@eu.sales.service", "w@.service"),
    ],
)
def test_a_path_belongs_to_a_unit_and_a_unit_to_the_file_that_defines_it(path: str, unit: str, file: str) -> None:
    assert unit_of(path) == unit
    assert fragment(unit) == file


def test_other_paths_belong_to_no_unit() -> None:
    assert unit_of("/etc/celery/environment") is None
    assert unit_of("/etc/systemd/system.conf") is None


# ---- going back ----


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below a folder, with contents and modes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode & 0o7777) for path in files}


def wanted(path: Path, content: str = "", **more: str) -> dict[str, str]:
    return {"path": str(path), "content": content, "owner": OWNER, "group": GROUP, **more}


def test_a_backup_keeps_what_was_there_to_the_byte(tmp_path: Path) -> None:
    contents = [
        b"text\n",
        "ü €\n".encode(),
        b"",
        b"\xff\x00\xfe",
        "\U0001f600".encode() + b"\xff\xed\xa0\x80",
        b"\r\n\\u",
    ]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}").write_bytes(content)
    desired = [entry(tmp_path / f"{number}", content="new", mode=0o600) for number in range(len(contents))]
    desired.append(entry(tmp_path / "made", content="new"))
    planned = changes(*desired)
    assert len(planned) == len(desired)
    save(tmp_path / "keep/backup", planned)
    assert load(tmp_path / "keep/backup") == [change.before for change in planned]


def test_a_backup_is_for_root_alone_from_its_first_byte_on(tmp_path: Path, monkeypatch: Any) -> None:
    write(entry(tmp_path / "environment", content=SECRET, mode=0o600))
    planned = changes(entry(tmp_path / "environment", content="new", mode=0o600, secret=True))
    backup = tmp_path / "backup"
    backup.write_text("")
    backup.chmod(0o644)
    seen: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(hostfiles.os, "fsync", lambda at: (seen.append(os.fstat(at).st_mode & 0o777), fsync(at)))
    before = os.umask(0)
    try:
        save(backup, planned)
    finally:
        os.umask(before)
    assert (seen, backup.stat().st_mode & 0o777) == ([0o600], 0o600)
    assert [found.secret for found in load(backup)] == [True]


def test_a_run_that_is_undone_leaves_every_file_as_it_was(tmp_path: Path, capsys: Any) -> None:
    etc, backup = tmp_path / "etc", tmp_path / "backup"
    etc.mkdir()
    (etc / "changed").write_bytes(b"old \xff\n")
    (etc / "changed").chmod(0o640)
    for name in ("gone", "same", "mode"):
        (etc / name).write_text(f"{name}\n")
    (etc / "environment").write_text(f"old {SECRET}\n")
    (etc / "environment").chmod(0o600)
    before = state(etc)

    files = [
        wanted(etc / "changed", "new\n"),
        wanted(etc / "gone", state="absent"),
        wanted(etc / "same", "same\n"),
        wanted(etc / "mode", "mode\n", mode="0600"),
        wanted(etc / "made", "new\n"),
        wanted(etc / "deep/er/made", "new\n"),
    ]
    secret = [wanted(etc / "environment", f"new {SECRET}\n", mode="0600")]
    done = run(capsys, files=files, secret_files=secret, backup=str(backup))
    assert len(done["paths"]) == 6
    assert (etc / "made").exists() and not (etc / "gone").exists()

    planned = run(capsys, check=True, restore=str(backup))
    assert planned["changed"] and (etc / "made").exists()
    undone = run(capsys, restore=str(backup))
    assert undone["paths"] == planned["paths"] == done["paths"]
    assert state(etc) == before
    for result in (done, planned, undone):
        assert SECRET not in json.dumps(result)
    # Its contents are told to have changed, and those of the others are shown.
    assert "changed, hidden" in json.dumps(undone["diff"])
    assert "old \ufffd" in undone["diff"][0]["after"]
    again = run(capsys, restore=str(backup))
    assert not again["changed"] and state(etc) == before


def test_a_file_is_put_back_with_its_owner(tmp_path: Path, capsys: Any) -> None:
    if os.getuid():
        pytest.skip("only root can give a file away")
    path, backup = tmp_path / "a", tmp_path / "backup"
    path.write_text("old")
    nobody, nogroup = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("nogroup").gr_gid
    os.chown(path, nobody, nogroup)
    run(capsys, files=[wanted(path, "new")], backup=str(backup))
    assert path.stat().st_uid == 0
    run(capsys, restore=str(backup))
    assert (path.stat().st_uid, path.stat().st_gid, path.read_text()) == (nobody, nogroup, "old")


def test_check_mode_writes_no_backup(tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, check=True, files=[wanted(tmp_path / "a", "new")], backup=str(tmp_path / "keep/b"))["changed"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_replaces_nothing_has_nothing_to_go_back_to(tmp_path: Path, capsys: Any) -> None:
    """What an earlier run replaced must not come back over what is there since."""
    backup, files = str(tmp_path / "backup"), [wanted(tmp_path / "a", "new")]
    assert run(capsys, files=files, backup=backup)["changed"]
    assert not run(capsys, files=files, backup=backup)["changed"]
    restored = run(capsys, restore=backup)
    assert not restored["changed"] and (tmp_path / "a").read_text() == "new"


def test_a_backup_that_cannot_be_written_stops_the_run_before_it_changes_anything(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    told = run(capsys, files=[wanted(tmp_path / "a", "new")], backup=str(tmp_path / "file/backup"))
    assert told["failed"] and not (tmp_path / "a").exists()


ENTRIES = [dataclasses.asdict(Entry("/nonexistent/plimsoll/a", "file", "x")), {"path": "/nonexistent/plimsoll/b"}]
DAMAGED = {
    "empty": b"",
    "cut": json.dumps(ENTRIES).encode()[:-30],
    "no text": b"\xff\xfe[]",
    "no json": b"celery.slice",
    "no list": b"7",
    "null": b"null",
    "an entry": json.dumps(ENTRIES[0]).encode(),
    "no entries": b"[1, 2]",
    "an entry with less": json.dumps(ENTRIES).encode(),
    "an entry with more": json.dumps([{**ENTRIES[0], "acl": "x"}]).encode(),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_backup_is_refused_by_name_and_nothing_is_changed(tmp_path: Path, capsys: Any, damage: str) -> None:
    backup = tmp_path / "backup"
    backup.write_bytes(DAMAGED[damage])
    told = run(capsys, restore=str(backup))
    assert told["failed"]
    assert told["msg"] == f"host_files: {backup} is no backup that can be read; put its files right by hand"
    assert backup.read_bytes() == DAMAGED[damage]


def test_a_backup_that_is_not_there_is_named(tmp_path: Path, capsys: Any) -> None:
    told = run(capsys, restore=str(tmp_path / "none"))
    assert told["failed"] and f"{tmp_path}/none" in told["msg"]


def test_going_back_keeps_no_backup_of_its_own(tmp_path: Path, capsys: Any) -> None:
    told = run(capsys, restore=str(tmp_path / "a"), backup=str(tmp_path / "b"))
    assert told["failed"] and "mutually exclusive" in told["msg"]


def test_a_unit_that_systemd_complains_of_is_put_back_as_it_was(tmp_path: Path, capsys: Any) -> None:
    """It ran, and what it was replaced by does not: going back is no time to be particular."""
    unit, backup = tmp_path / "etc/systemd/system/plimsoll-test.service", str(tmp_path / "backup")
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\nMemoryHihg=1G\n")
    before = state(unit.parent)
    assert run(capsys, files=[wanted(unit, "[Service]\nExecStart=/bin/true\n")], backup=backup)["changed"]
    run(capsys, restore=backup)
    assert state(unit.parent) == before


def test_a_directory_that_the_run_made_is_in_nobodys_way(tmp_path: Path, capsys: Any) -> None:
    backup = str(tmp_path / "backup")
    (tmp_path / "a").write_text("old")
    made = wanted(tmp_path / "made", state="directory")
    run(capsys, files=[made, wanted(tmp_path / "a", "new")], backup=backup)
    run(capsys, restore=backup)
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_of_an_owner_without_a_name_is_put_back(tmp_path: Path, capsys: Any) -> None:
    if os.getuid():
        pytest.skip("only root can give a file away")
    path, backup = tmp_path / "a", str(tmp_path / "backup")
    path.write_text("old")
    os.chown(path, 54321, 54321)
    run(capsys, files=[wanted(path, "new")], backup=backup)
    run(capsys, restore=backup)
    assert (path.read_text(), path.stat().st_uid) == ("old", 54321)


ODD = [
    {"path": 5, "state": "file"},
    {"path": "/nonexistent/plimsoll/a", "state": "weird"},
    {"path": "/nonexistent/plimsoll/a", "state": "file", "mode": "0644"},
    {"path": "/nonexistent/plimsoll/a", "state": "file", "content": 7},
]


@pytest.mark.parametrize("one", ODD)
def test_entries_that_make_no_sense_are_a_damaged_backup(tmp_path: Path, capsys: Any, one: dict[str, Any]) -> None:
    (tmp_path / "backup").write_text(json.dumps([one]).replace("/nonexistent", str(tmp_path)))
    told = run(capsys, restore=str(tmp_path / "backup"))
    assert "is no backup that can be read" in told["msg"]
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]
