"""Releases: a name that says what is in them, archives that can be made again, and going back on a host."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import app_archive, app_release, celery_ping
from plimsoll import release
from plimsoll.release import (
    ReleaseError,
    activate,
    build,
    check,
    check_import,
    confirm,
    current,
    digest,
    install,
    installed,
    members,
    opened,
    pack,
    read_requirements,
    risks,
)

PYTHON, MACHINE = "3.11.2", "x86_64"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    write(root / "shop/__init__.py", "")
    write(root / "shop/tasks.py", "import celery\n")
    write(root / "run.sh", "#!/bin/sh\n").chmod(0o755)
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# What makes a release


def test_members_are_the_files_without_caches_in_order(source: Path) -> None:
    expected = ["run.sh", "shop/__init__.py", "shop/tasks.py"]
    for cache in release.SKIPPED:
        write(source / cache / "x.py", "")
        write(source / "shop" / cache / "deep/x.py", "")
    (source / "empty").mkdir()
    (source / "broken").symlink_to("nowhere")
    assert members(source) == [(name, source / name) for name in expected]


def test_a_wheel_is_its_only_member_and_other_sources_are_named(tmp_path: Path) -> None:
    wheel = write(tmp_path / "shop-1.0-py3-none-any.whl", "")
    assert members(wheel) == [(wheel.name, wheel)]
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "none", write(tmp_path / "shop.zip", ""), tmp_path / "empty"):
        with pytest.raises(ReleaseError, match=re.escape(str(bad))):
            members(bad)


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda root: write(root / "shop/tasks.py", "import celerz\n"),
    "new file": lambda root: write(root / "shop/new.py", ""),
    "file gone": lambda root: (root / "shop/tasks.py").unlink(),
    "name": lambda root: (root / "shop/tasks.py").rename(root / "shop/task.py"),
    "executable": lambda root: (root / "shop/tasks.py").chmod(0o755),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_depends_on_the_source(source: Path, change: str) -> None:
    before = digest(members(source), "celery\n", PYTHON, MACHINE)
    assert re.fullmatch("[0-9a-f]{16}", before)
    CHANGES[change](source)
    assert digest(members(source), "celery\n", PYTHON, MACHINE) != before


def test_the_digest_depends_on_requirements_python_and_machine_each_in_its_place(source: Path) -> None:
    inputs = [
        ("", "3.11.2", "x86_64"),
        ("celery\n", "3.11.2", "x86_64"),
        ("celery\n", "3.11.3", "x86_64"),
        ("celery\n", "3.11.2", "aarch64"),
        ("celery\n", "x86_64", "3.11.2"),
        ("celery\n3.11.2", "", "x86_64"),
    ]
    assert len({digest(members(source), *one) for one in inputs}) == len(inputs)


def test_the_digest_depends_on_nothing_else(source: Path, tmp_path: Path) -> None:
    """Another controller: other path, order of creation, times, rights of others, and caches."""
    other = tmp_path / "other/place"
    for name, file in reversed(members(source)):
        copy = write(other / name, file.read_text())
        copy.chmod(0o700 if name == "run.sh" else 0o600)
        os.utime(copy, (1, 1))
    write(other / "shop/__pycache__/tasks.cpython-311.pyc", "x")
    given = ("celery\n", PYTHON, MACHINE)
    assert digest(members(other), *given) == digest(members(source), *given)


def test_an_archive_depends_on_names_contents_and_the_executable_bit_alone(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pack(tmp_path / "a.tar.gz", members(source))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    (source / "run.sh").chmod(0o700)
    os.utime(source / "run.sh", (1, 1))
    pack(tmp_path / "deep/er/b.tar.gz", members(source))
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "deep/er/b.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as made:
        modes = {member.name: member.mode for member in made}
    assert modes == {"run.sh": 0o755, "shop/__init__.py": 0o644, "shop/tasks.py": 0o644}


def test_an_archive_is_whole_before_it_has_its_name(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    replace = Path.replace

    def looked_at(scratch: Path, target: Path) -> Path:
        with tarfile.open(scratch) as made:
            assert made.getnames() == [name for name, _ in members(source)]
        return replace(scratch, target)

    monkeypatch.setattr(Path, "replace", looked_at)
    pack(tmp_path / "out/a.tar.gz", members(source))
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "out/b.tar.gz", [*members(source), ("gone", source / "gone")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("kind", ["directory", "wheel"])
def test_build_packs_the_source_its_wheels_and_the_lock(
    source: Path, tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    """uv and pip would ask a package index: here files stand in for what they write."""
    wheel = write(tmp_path / "my_shop-1.0-py3-none-any.whl", "the wheel")

    def answered(what: str, command: list[str]) -> None:
        after = dict(zip(command, command[1:]))
        if "compile" in command:
            wanted = Path(command[-1]).read_text()
            own = f"my-shop @ file://{wheel}\n" if str(wheel) in wanted else ""
            Path(after["--output-file"]).write_text(f"celery==5.6.0\n{own}")
        else:
            uv = command[-1].startswith("uv==")
            write(Path(after["--dest"]) / ("uv-1-py3-none-any.whl" if uv else "celery-5.6.0-py3-none-any.whl"), "")

    monkeypatch.setattr(release, "_run", answered)
    given = source if kind == "directory" else wheel
    build(given, "celery\n", PYTHON, MACHINE, tmp_path / "out/a.tar.gz", sys.executable, "1")
    with tarfile.open(tmp_path / "out/a.tar.gz") as made:
        names = made.getnames()
        lock = made.extractfile("requirements.lock").read().decode()
    wheels = ["wheels/celery-5.6.0-py3-none-any.whl", "wheels/uv-1-py3-none-any.whl", "requirements.lock"]
    if kind == "directory":
        assert names == ["app/run.sh", "app/shop/__init__.py", "app/shop/tasks.py", *wheels]
        assert lock == "celery==5.6.0\n"
    else:
        assert names == [wheels[0], f"wheels/{wheel.name}", *wheels[1:]]
        assert lock == "celery==5.6.0\nmy_shop\n"


def test_of_a_package_without_a_wheel_one_is_made_if_that_is_asked_for_and_it_is_pure_python(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    made, asked = "polling-1-py3-none-any.whl", []

    def answered(what: str, command: list[str]) -> None:
        after = dict(zip(command, command[1:]))
        if "compile" in command:
            Path(after["--output-file"]).write_text("celery==5.6.0\npolling==0.3.2 ; python_version > '3'\nuvx==1\n")
        elif "wheel" in command:
            asked.append(command[command.index("--wheel-dir") + 2 :])
            write(Path(after["--wheel-dir"]) / made, "")
        else:
            wanted = Path(after["--requirement"]).read_text().split() if "--requirement" in after else command[-1:]
            asked.append(wanted)
            write(Path(after["--dest"]) / "uv-1-py3-none-any.whl", "")

    monkeypatch.setattr(release, "_run", answered)
    given = (source, "polling\n", PYTHON, MACHINE, tmp_path / "out/a.tar.gz", sys.executable, "1", ["polling", "gone"])
    build(*given)
    assert asked == [["polling==0.3.2"], ["celery==5.6.0", "uvx==1"], ["uv==1"]]
    with tarfile.open(tmp_path / "out/a.tar.gz") as packed:
        assert f"wheels/{made}" in packed.getnames()
        lock = packed.extractfile("requirements.lock")
        assert lock is not None and b"polling==0.3.2" in lock.read()
    made = "polling-1-cp311-cp311-linux_x86_64.whl"
    (tmp_path / "out/a.tar.gz").unlink()
    with pytest.raises(ReleaseError, match=f"^{made}: was compiled, for this controller and not for the hosts$"):
        build(*given)
    assert not (tmp_path / "out/a.tar.gz").exists()


def test_what_a_failed_command_said_is_passed_on_in_short() -> None:
    code = "import sys; print(*range(99), sep='\\n', file=sys.stderr); sys.exit(1)"
    with pytest.raises(ReleaseError) as caught:
        release._run("resolving", [sys.executable, "-c", code])
    assert str(caught.value) == "resolving failed:\n93\n94\n95\n96\n97\n98"


def test_the_archive_module_builds_only_what_is_missing(
    source: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    built: list[Path] = []
    monkeypatch.setattr(app_archive, "build", lambda *given: built.append(given[4]) or write(given[4], ""))
    given = {
        "source": str(source),
        "targets": [{"python_version": python, "machine": MACHINE} for python in ("3.11.2", "3.13.1", "3.11.2")],
        "dest": str(tmp_path / "out"),
    }

    def run(**more: Any) -> dict[str, Any]:
        with patch_module_args({**given, **more}), pytest.raises(SystemExit):
            app_archive.main()
        return json.loads(capsys.readouterr().out)

    assert run(_ansible_check_mode=True)["changed"] and not built
    first = run()
    assert first["changed"] and len(built) == 2
    assert {one["archive"] for one in first["releases"].values()} == {str(path) for path in built}
    again = run()
    assert not again["changed"] and len(built) == 2 and again["releases"] == first["releases"]
    assert str(tmp_path / "none") in run(source=str(tmp_path / "none"))["msg"]


# An archive as the source


@pytest.fixture
def repository(source: Path) -> Path:
    """The source under git, with what git keeps of it: an executable, a link, and a name that is no ASCII."""
    if not shutil.which("git"):
        pytest.skip("git is not on this machine")
    write(source / "requirements.txt", "celery==5.6.0\n")
    write(source / "shop/ü b.txt", "x")
    (source / "link.py").symlink_to("shop/tasks.py")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "--message=x"]):
        subprocess.run(["git", *words], cwd=source, check=True)
    return source


def git_archive(repository: Path, name: str) -> Path:
    path = repository.parent / name
    subprocess.run(["git", "archive", f"--output={path}", "HEAD"], cwd=repository, check=True)
    return path


@pytest.mark.parametrize("name", ["shop.tar", "shop.tar.gz", "shop.tgz"])
@pytest.mark.usefixtures("each_python")
def test_what_git_archives_makes_the_release_that_its_directory_makes(repository: Path, name: str) -> None:
    with opened(git_archive(repository, name)) as unpacked:
        assert [name for name, _ in members(unpacked)] == [name for name, _ in members(repository)]
        given = ("celery\n", PYTHON, MACHINE)
        assert digest(members(unpacked), *given) == digest(members(repository), *given)


def test_a_zip_of_git_has_the_files_of_its_directory(repository: Path) -> None:
    with opened(git_archive(repository, "shop.zip")) as unpacked:
        assert [name for name, _ in members(unpacked)] == [name for name, _ in members(repository)]
        assert (unpacked / "shop/tasks.py").read_text() == "import celery\n"


def test_a_zip_of_git_makes_the_release_that_its_directory_makes(repository: Path) -> None:
    with opened(git_archive(repository, "shop.zip")) as unpacked:
        assert os.access(unpacked / "run.sh", os.X_OK)
        assert (unpacked / "link.py").read_text() == "import celery\n"


def test_a_version_is_what_git_has_of_it_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "tag", "v1"], cwd=repository, check=True)
    write(repository / "secret.txt", "not committed")
    write(repository / "shop/tasks.py", "changed since\n")
    with opened(repository, "v1") as unpacked:
        assert (unpacked / "shop/tasks.py").read_text() == "import celery\n"
        assert not (unpacked / "secret.txt").exists()
    assert not unpacked.exists()
    for source, version in ((repository, "v2"), (tmp_path, "v1")):
        with pytest.raises(ReleaseError, match=rf"taking the version {version} of {source} out of git failed:\nfatal"):
            opened(source, version).__enter__()


def test_the_archive_module_packs_a_version_with_its_own_requirements(
    repository: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(app_archive, "build", lambda source, requirements, *rest: asked.append(requirements))
    write(repository / "requirements.txt", "celery==9\n")
    given = {"source": str(repository), "dest": str(tmp_path / "out"), "version": "HEAD"}
    given["targets"] = [{"python_version": PYTHON, "machine": MACHINE}]
    with patch_module_args(given), pytest.raises(SystemExit):
        app_archive.main()
    assert json.loads(capsys.readouterr().out)["changed"]
    assert asked == ["celery==5.6.0\n"]


def test_an_archive_is_unpacked_for_the_time_alone(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    pack(tmp_path / "shop.tar.gz", members(source))
    with pytest.raises(RuntimeError), opened(tmp_path / "shop.tar.gz") as unpacked:
        assert unpacked.parent == tmp_path / "scratch"
        raise RuntimeError
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_is_no_archive_is_taken_as_it_is(source: Path, tmp_path: Path) -> None:
    wheel = write(tmp_path / "shop-1.0-py3-none-any.whl", "")
    for given in (source, wheel, tmp_path / "none"):
        with opened(given) as unpacked:
            assert unpacked == given


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as made:
        for member, data in entries:
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def file(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def device(name: str) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.devmajor, member.devminor = tarfile.CHRTYPE, 1, 3
    return member, b""


def zip_of(**content: bytes) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as made:
        for name, data in content.items():
            made.writestr(name, data)
    return raw.getvalue()


OUTSIDE: dict[str, Callable[[Path], bytes]] = {
    "dots": lambda out: tar_of(file(f"../{out.name}/x")),
    "dots inside": lambda out: tar_of(file(f"a/../../{out.name}/x")),
    "link": lambda out: tar_of(link("a", str(out)), file("a/x")),
    "link of dots": lambda out: tar_of(link("a", f"../{out.name}"), file("a/x")),
    "link to a file": lambda out: tar_of(link("a", f"{out}/there"), file("a")),
    "hard link": lambda out: tar_of(link("a", f"{out}/there", tarfile.LNKTYPE), file("a")),
    "device": lambda out: tar_of(device("a")),
}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder beside the one that an archive is unpacked to."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    write(tmp_path / "scratch/out/there", "mine")
    return tmp_path / "scratch/out"


def untouched(out: Path) -> bool:
    return [(path.name, path.read_text()) for path in out.iterdir()] == [("there", "mine")]


@pytest.fixture(params=["tarfile's filter", "Python before 3.11.4"])
def each_python(request: Any, monkeypatch: Any) -> None:
    if request.param != "tarfile's filter":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.usefixtures("each_python")
@pytest.mark.parametrize("how", OUTSIDE)
def test_an_archive_that_would_write_elsewhere_is_refused_by_name(tmp_path: Path, out: Path, how: str) -> None:
    archive = tmp_path / "shop.tar"
    archive.write_bytes(OUTSIDE[how](out))
    with pytest.raises(ReleaseError, match=re.escape(f"{archive}: no wheel, and no tar or zip")), opened(archive):
        pytest.fail("it was unpacked")
    assert untouched(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_absolute_name_lands_inside(tmp_path: Path, out: Path) -> None:
    archive = tmp_path / "shop.tar"
    archive.write_bytes(tar_of(file(f"{out}/x"), file("a")))
    with opened(archive) as unpacked:
        assert (unpacked / str(out / "x").lstrip("/")).exists()
    assert untouched(out)


def test_a_zip_writes_nowhere_else(tmp_path: Path, out: Path) -> None:
    archive = tmp_path / "shop.zip"
    archive.write_bytes(zip_of(**{"a": b"x", "../out/x": b"x", "b/../../out/x": b"x", f"{out}/x": b"x"}))
    with opened(archive) as unpacked:
        assert (unpacked / "a").read_text() == "x"
    assert untouched(out)


def test_what_is_no_archive_or_a_damaged_one_is_named_with_what_would_do(source: Path, tmp_path: Path) -> None:
    pack(tmp_path / "good.tar.gz", members(source))
    gz, plain = (tmp_path / "good.tar.gz").read_bytes(), tar_of(file("a", b"x" * 5000), file("b", b"x" * 5000))
    packed = zip_of(a=b"x" * 5000)
    damaged = {
        "empty.tar": b"",
        "text.tar.gz": b"<html>502</html>",
        "no-tar.tar.gz": gzip.compress(b"x" * 9999),
        "cut.tar.gz": gz[: len(gz) // 2],
        "cut.tar": plain[:3000],
        "cut.zip": packed[: len(packed) // 2],
        "content.zip": flipped(packed, packed.index(b"xxxx")),
    }
    for name, content in damaged.items():
        archive = tmp_path / name
        archive.write_bytes(content)
        with pytest.raises(ReleaseError) as caught, opened(archive):
            pytest.fail(f"{name} was unpacked")
        said = str(caught.value)
        assert said.startswith(f"{archive}: no wheel, and no tar or zip archive to be unpacked (")
        assert said.endswith("set celery_worker_source to a directory, a .whl, or what git archive makes")


def test_what_is_no_archive_is_named_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError) as caught, opened(write(tmp_path / "shop.tar.gz", "<html>")):
        pass
    assert "\n" not in str(caught.value)


def locked_zip() -> bytes:
    """With a password: the first bit of its flags, in both of its headers."""
    packed = bytearray(zip_of(a=b"x"))
    for at in (packed.index(b"PK\x03\x04") + 6, packed.index(b"PK\x01\x02") + 8):
        packed[at] |= 1
    return bytes(packed)


TEXT = b" ".join(b"%d" % (number * number) for number in range(9999))


def damaged_inside(kind: str) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=f"w:{kind}") as made:
        member, data = file("a", TEXT)
        member.size = len(data)
        made.addfile(member, io.BytesIO(data))
    return flipped(raw.getvalue(), len(raw.getvalue()) // 2)


# Each would make a release of half an application, or end in a traceback.
SLIPS = {
    "a header ends the archive": lambda: gzip.compress(flipped(tar_of(file("a"), file("b")), 1024), 0),
    "content of gz": lambda: damaged_inside("gz"),
    "lzma.LZMAError": lambda: damaged_inside("xz"),
    "RuntimeError of zipfile": locked_zip,
}


@pytest.mark.parametrize("how", SLIPS)
def test_other_damage_is_named_too(tmp_path: Path, how: str) -> None:
    archive = tmp_path / "shop.archive"
    archive.write_bytes(SLIPS[how]())
    with pytest.raises(ReleaseError, match=re.escape(f"{archive}: ")), opened(archive):
        pass


def test_a_name_with_two_dots_is_unpacked_out_of_a_zip(tmp_path: Path) -> None:
    archive = tmp_path / "shop.zip"
    archive.write_bytes(zip_of(**{"a..b.py": b"x", "c": b"x"}))
    with opened(archive) as unpacked:
        assert [name for name, _ in members(unpacked)] == ["a..b.py", "c"]


@pytest.fixture
def archived(source: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., dict[str, Any]]:
    """Runs app_archive without a package index: what would be built is in the answer."""

    def running(given: Path, **more: Any) -> dict[str, Any]:
        built: dict[str, Any] = {}

        def build(source: Path, requirements: str, python: str, machine: str, archive: Path, *_: Any) -> None:
            built.update(requirements=requirements, names=[name for name, _ in members(source)])

        monkeypatch.setattr(app_archive, "build", build)
        target = {"python_version": PYTHON, "machine": MACHINE}
        arguments = {"source": str(given), "targets": [target], "dest": str(tmp_path / "out"), **more}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            app_archive.main()
        return json.loads(capsys.readouterr().out) | {"built": built}

    return running


def test_an_archive_brings_its_own_requirements_and_is_named_as_its_directory_is(
    repository: Path, tmp_path: Path, archived: Callable[..., dict[str, Any]]
) -> None:
    archive = git_archive(repository, "shop.tar.gz")
    told = archived(archive)
    assert told["built"]["requirements"] == "celery==5.6.0\n"
    assert told["built"]["names"] == [name for name, _ in members(repository)]
    given = str(repository / "requirements.txt")
    assert archived(repository, requirements=given)["releases"] == told["releases"]
    # Of a directory, the role names it, or leaves it out where there is none.
    assert archived(repository)["built"]["requirements"] == ""
    other = str(write(tmp_path / "other.txt", "celery==5.7.0\n"))
    told = archived(archive, requirements=other)
    assert told["built"]["requirements"] == "celery==5.7.0\n"


def test_an_archive_without_requirements_has_none(
    source: Path, tmp_path: Path, archived: Callable[..., dict[str, Any]]
) -> None:
    pack(tmp_path / "shop.tar.gz", members(source))
    assert archived(tmp_path / "shop.tar.gz")["built"]["requirements"] == ""


def test_an_archive_that_is_none_fails_the_module_with_its_name(
    tmp_path: Path, archived: Callable[..., dict[str, Any]]
) -> None:
    bad = write(tmp_path / "shop.tar.gz", "<html>")
    told = archived(bad)
    assert told["failed"] and told["msg"].startswith(f"{bad}: no wheel, and no tar or zip")


def test_an_archive_of_nothing_is_named(tmp_path: Path, archived: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "shop.tar").write_bytes(tar_of())
    assert str(tmp_path / "shop.tar") in archived(tmp_path / "shop.tar")["msg"]


# On a host


@pytest.fixture
def home(tmp_path: Path, monkeypatch: Any) -> Path:
    """A host's directory of releases, with a runuser that stays the same user, as only root may become another."""
    write(tmp_path / "bin/runuser", '#!/bin/sh\nshift 3\nexec "$@"\n').chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    (tmp_path / "home/releases").mkdir(parents=True)
    return tmp_path / "home"


def venv(folder: Path) -> None:
    """Stands for a venv: the interpreter of the tests, which has Celery."""
    write(folder / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n').chmod(0o755)


def complete(home: Path, name: str, at: int) -> Path:
    """A release that was installed at a time."""
    path = home / "releases" / name
    write(path / ".complete", "")
    os.utime(path, (at, at))
    return path


def names(home: Path) -> set[str]:
    return {path.name for path in (home / "releases").iterdir()}


def test_current_is_none_before_the_first_and_then_the_one_that_was_activated(home: Path) -> None:
    assert current(home) is None
    for name in ("a", "b"):
        complete(home, name, at=1)
        activate(home, name, keep=2)
        assert current(home) == name
        assert (home / "current").resolve() == home / "releases" / name
    # A link left by a run that was cut off is in nobody's way.
    (home / ".current.new").symlink_to("nowhere")
    activate(home, "a", keep=2)
    assert current(home) == "a"
    assert sorted(path.name for path in home.iterdir()) == ["current", "releases"]


def test_a_link_takes_the_place_of_the_former_in_one_step(home: Path, monkeypatch: Any) -> None:
    activate(home, complete(home, "a", at=1).name, keep=2)
    seen: list[str | None] = []
    for step in ("unlink", "symlink_to", "replace"):
        real = getattr(Path, step)

        def watched(path: Path, *given: Any, real: Any = real, **more: Any) -> Any:
            seen.append(current(home))
            done = real(path, *given, **more)
            seen.append(current(home))
            return done

        monkeypatch.setattr(Path, step, watched)
    activate(home, complete(home, "b", at=2).name, keep=2)
    assert seen == ["a"] * 5 + ["b"]


@pytest.mark.parametrize(("keep", "kept"), [(0, set()), (1, {"c"}), (2, {"b", "c"}), (9, {"a", "b", "c"})])
def test_the_newest_of_the_others_are_kept(home: Path, keep: int, kept: set[str]) -> None:
    for name, at in (("c", 3), ("a", 1), ("b", 2), ("d", 0)):
        complete(home, name, at)
    activate(home, "d", keep)
    assert names(home) == {"d", *kept}


def test_a_release_that_failed_takes_no_place_of_one_to_go_back_to(home: Path) -> None:
    complete(home, "good", at=1)
    for name in ("failed-1", "failed-2"):
        (home / "releases" / name / "app").mkdir(parents=True)
    activate(home, complete(home, "new", at=2).name, keep=2)
    assert names(home) == {"good", "new"}


def test_a_release_that_was_gone_back_to_is_not_the_oldest(home: Path) -> None:
    for at, name in enumerate(["a", "b"]):
        activate(home, complete(home, name, at=at).name, keep=2)
    activate(home, "a", keep=2)
    activate(home, complete(home, "c", at=2).name, keep=1)
    assert names(home) == {"a", "c"}


def wheel_of_uv() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as wheel:
        wheel.writestr("uv-1.data/scripts/uv", "#!/bin/sh\n")
    return raw.getvalue()


APP = b"from celery import Celery\napp = Celery('shop')\n"
CONTENT = {"app/shop.py": APP, "wheels/uv-1-py3-none-any.whl": wheel_of_uv(), "requirements.lock": b"celery\n"}


def tar(content: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as made:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]


WHOLE = gzip.compress(tar(CONTENT), 0)
HEADER_OF_SECOND = WHOLE.index(b"wheels/")
DAMAGED = {
    "empty": b"",
    "text": b"<html>502</html>",
    "no tar": gzip.compress(b"x" * 9999),
    "cut": WHOLE[: len(WHOLE) // 2],
    "cut between members": WHOLE[:HEADER_OF_SECOND],
    "second header": flipped(WHOLE, HEADER_OF_SECOND),
    "content": flipped(WHOLE, WHOLE.index(b"import Celery")),
    "uv": gzip.compress(tar({**CONTENT, "wheels/uv-1-py3-none-any.whl": b"PK"})),
    "dots": gzip.compress(tar({**CONTENT, "app/../../x.py": b""})),
    "absolute": gzip.compress(tar({**CONTENT, "/tmp/x.py": b""})),
}


@pytest.fixture
def commands(home: Path, monkeypatch: Any) -> list[list[str]]:
    """uv would need wheels from a package index: the commands are noted, and a stand-in for the venv is made."""
    seen: list[list[str]] = []

    def noted(what: str, command: list[str], environment: Any = None) -> None:
        seen.append(command)
        if "venv" in command:
            assert os.access(command[0], os.X_OK)
            venv(Path(command[-1]))

    monkeypatch.setattr(release, "_run", noted)
    return seen


def test_a_release_is_complete_once_it_imports(home: Path, tmp_path: Path, commands: list[list[str]]) -> None:
    (tmp_path / "a.tar.gz").write_bytes(WHOLE)
    write(home / "releases/r1/left/over", "from a run that was cut off")
    settings = install(home, "r1", tmp_path / "a.tar.gz", "/usr/bin/python3", "shop", "root", {})
    assert settings["task_acks_late"] is False
    assert installed(home, "r1") and current(home) is None
    assert {path.name for path in (home / "releases/r1").iterdir()} == {"app", "venv", "requirements.lock", ".complete"}
    assert (home / "releases/r1/app/shop.py").read_bytes() == APP
    assert ["venv" in command or "install" in command or "compileall" in command for command in commands] == [True] * 3
    assert [path.name for path in home.iterdir()] == ["releases"]


def test_a_release_that_is_there_is_imported_again_when_what_is_asked_of_it_changed(
    home: Path, tmp_path: Path, commands: list[list[str]], monkeypatch: Any
) -> None:
    (tmp_path / "a.tar.gz").write_bytes(WHOLE)
    install(home, "r1", tmp_path / "a.tar.gz", "/usr/bin/python3", "shop", "root", {"KEY": "s3cret"})
    assert "s3cret" not in (home / "releases/r1/.complete").read_text()
    imported: list[Any] = []
    told: list[Any] = []

    def imports(path: Path, app: str, user: str, environment: dict[str, str], code: str) -> dict[str, Any]:
        if app == "nope":
            raise ReleaseError("does not import")
        imported.append((app, environment))
        return {"task_acks_late": True}

    monkeypatch.setattr(release, "check_import", imports)
    assert confirm(home, "r1", "shop", "root", {"KEY": "s3cret"}) is None
    assert imported == []
    for _ in range(2):
        with pytest.raises(ReleaseError, match="does not import"):
            confirm(home, "r1", "nope", "root", {"KEY": "s3cret"})
        found = confirm(home, "r1", "shop", "root", {"KEY": "other"})
        assert found == ({"task_acks_late": True} if len(told) == 0 else None)
        told.append(found)
    assert imported == [("shop", {"KEY": "other"})]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_archive_is_named_and_the_next_run_starts_over(
    home: Path, tmp_path: Path, commands: list[list[str]], monkeypatch: Any, damage: str
) -> None:
    monkeypatch.setattr(release, "check_import", lambda *given: None)
    archive = tmp_path / "a.tar.gz"
    given = (home, "r1", archive, "/usr/bin/python3", "shop", "root", {})
    archive.write_bytes(DAMAGED[damage])
    with pytest.raises(ReleaseError, match=re.escape(f"{archive} is damaged (")) as caught:
        install(*given)
    assert "\n" not in str(caught.value)
    assert not commands and not installed(home, "r1")
    assert [path.name for path in home.iterdir()] == ["releases"]
    archive.write_bytes(WHOLE)
    install(*given)
    assert installed(home, "r1")


BROKEN = {
    "missing library": ("import nosuchlib\n", "ModuleNotFoundError: No module named 'nosuchlib'", 1),
    "syntax": ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax", 2),
    "in a call": ("import json\njson.loads('{')\n", "json.decoder.JSONDecodeError: Expecting property name", 2),
    "lines": (
        "def check():\n    raise ValueError('1 error for Settings\\nbroker\\n  missing\\nsee https://x')\ncheck()\n",
        "ValueError: 1 error for Settings broker missing see https://x",
        2,
    ),
    "chained": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('late') from e\n",
        "KeyError: 'late'",
        4,
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_application_that_does_not_import_is_named_with_the_exception_and_its_place(home: Path, fault: str) -> None:
    code, exception, line = BROKEN[fault]
    write(home / "releases/r1/app/shop/__init__.py", "")
    file = write(home / "releases/r1/app/shop/tasks.py", code)
    venv(home / "releases/r1/venv")
    with pytest.raises(ReleaseError) as caught:
        check_import(home / "releases/r1", "shop.tasks", "root", {})
    said = str(caught.value)
    assert said.startswith(f"celery_worker_app 'shop.tasks' does not import: {exception}")
    assert f'(File "{file}", line {line}' in said
    assert "\n" not in said


def test_an_application_that_is_not_there_is_named(home: Path) -> None:
    (home / "releases/r1/app").mkdir(parents=True)
    venv(home / "releases/r1/venv")
    with pytest.raises(ReleaseError, match=r"celery_worker_app 'shop' does not import: .*No module named 'shop'"):
        check_import(home / "releases/r1", "shop", "root", {})


def test_of_what_is_no_celery_application_a_module_is_imported(home: Path) -> None:
    write(home / "releases/r1/app/lib/tool.py", "print('noise')\nimport json\n")
    write(home / "releases/r1/app/lib/broken.py", "import nosuchlib\n")
    venv(home / "releases/r1/venv")
    given = ("root", {"PYTHONPATH": "lib"}, release.IMPORT)
    assert check_import(home / "releases/r1", "tool", *given) == {}
    with pytest.raises(ReleaseError, match=r"^module 'broken' does not import: ModuleNotFoundError: .*broken\.py"):
        check_import(home / "releases/r1", "broken", *given)


def test_a_user_who_is_not_there_is_said_so(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "bin/runuser", '#!/bin/sh\necho "runuser: user $2 does not exist" >&2\nexit 1\n')
    (home / "releases/r1/app").mkdir(parents=True)
    with pytest.raises(ReleaseError, match="does not import: runuser: user celery does not exist"):
        check_import(home / "releases/r1", "shop", "celery", {})


def test_the_application_gets_the_environment_of_its_workers(home: Path) -> None:
    write(home / "releases/r1/app/shop.py", "import os\nfrom celery import Celery\napp = Celery(os.environ['SHOP'])\n")
    venv(home / "releases/r1/venv")
    check_import(home / "releases/r1", "shop", "root", {"SHOP": "x"})
    with pytest.raises(ReleaseError, match="KeyError: 'SHOP'"):
        check_import(home / "releases/r1", "shop", "root", {})


def test_the_release_module_installs_once_and_leaves_the_current_one_when_it_fails(
    home: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    archive = tmp_path / "a.tar.gz"

    def run(digest: str, **more: Any) -> dict[str, Any]:
        given = {"home": str(home), "digest": digest, "archive": str(archive), "app": "shop", "user": "root", **more}
        with patch_module_args({key: value for key, value in given.items() if value}), pytest.raises(SystemExit):
            app_release.main()
        return json.loads(capsys.readouterr().out)

    assert run("r1", _ansible_check_mode=True)["changed"] and names(home) == set()
    assert "any of the following are missing: app, module" in run("r1", app=None)["msg"]
    assert "mutually exclusive" in run("r1", module="tool")["msg"]
    with monkeypatch.context() as patched:
        patched.setattr(app_release, "install", lambda home, digest, *rest: bool(complete(home, digest, at=1)) and {})
        first = run("r1")
    assert (first["changed"], current(home)) == (True, "r1")
    asked: list[Any] = []
    monkeypatch.setattr(app_release, "confirm", lambda *given: asked.append(given))
    again = run("r1")
    assert not again["changed"]
    assert asked == [(home, "r1", "shop", "root", {}, release.SETTINGS)]
    run("r1", app=None, module="tool")
    assert asked[1] == (home, "r1", "tool", "root", {}, release.IMPORT)
    archive.write_bytes(WHOLE[:99])
    failed = run("r2")
    assert failed["failed"] and failed["msg"].startswith(f"release r2: {archive} is damaged")
    assert current(home) == "r1"


def test_the_workers_user_can_read_a_release_of_a_hardened_host(
    home: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(app_release, "install", lambda home, digest, *rest: bool(complete(home, digest, at=1)) and {})
    given = {"home": str(home), "digest": "r1", "archive": "a.tar.gz", "app": "shop", "user": "root"}
    before = os.umask(0o077)
    try:
        with patch_module_args(given), pytest.raises(SystemExit):
            app_release.main()
    finally:
        os.umask(before)
    assert (home / "releases/r1").stat().st_mode & 0o777 == 0o755


# Going back


def release_module(capsys: Any, home: Path, digest: str, **more: Any) -> dict[str, Any]:
    with patch_module_args({"home": str(home), "digest": digest, **more}), pytest.raises(SystemExit):
        app_release.main()
    return json.loads(capsys.readouterr().out)


def test_a_release_is_gone_back_to_with_nothing_but_its_name(home: Path, monkeypatch: Any, capsys: Any) -> None:
    """The application is not imported: it ran, and what it needs may be what failed."""
    for at, name in enumerate(["r1", "r2"]):
        activate(home, complete(home, name, at=at).name, keep=2)
    monkeypatch.setattr(app_release, "confirm", lambda *given: pytest.fail("it was imported"))
    assert release_module(capsys, home, "r1", back=True, _ansible_check_mode=True)["changed"]
    assert current(home) == "r2"
    told = release_module(capsys, home, "r1", back=True)
    assert (told["changed"], current(home)) == (True, "r1")
    assert names(home) == {"r1", "r2"}
    assert not release_module(capsys, home, "r1", back=True)["changed"]


def test_going_back_to_a_release_that_is_not_there_leaves_the_current_one(home: Path, capsys: Any) -> None:
    activate(home, complete(home, "r2", at=2).name, keep=2)
    (home / "releases/half/app").mkdir(parents=True)
    for name in ("gone", "half"):
        told = release_module(capsys, home, name, back=True)
        assert told["failed"] and current(home) == "r2"
        assert told["msg"] == f"release {name}: it is not on this host, whose current release is r2"


def test_only_going_back_needs_no_archive_application_and_user(home: Path, capsys: Any) -> None:
    told = release_module(capsys, home, "r1", app="shop")
    assert told["failed"] and "back is False but all of the following are missing: archive, user" in told["msg"]


# What an application's settings put at risk

SAFE = {"task_acks_late": True, "task_reject_on_worker_lost": True, "transport": "redis"}
LATE = "task_acks_late is off: a task is lost whose worker is killed as it runs"
LOST = "task_reject_on_worker_lost is off: a task whose child is killed at MemoryMax is lost in spite of acks_late"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (SAFE, []),
        ({}, [LATE]),
        # Without acks_late the other has no effect, and would be one thing more to read.
        ({**SAFE, "task_acks_late": False, "task_reject_on_worker_lost": None}, [LATE]),
        ({**SAFE, "task_reject_on_worker_lost": None}, [LOST]),
        (
            {**SAFE, "broker_transport_options": {"visibility_timeout": 120}},
            ["visibility_timeout (120 s) is not above"],
        ),
        ({**SAFE, "broker_transport_options": {"visibility_timeout": 60.5}}, ["visibility_timeout (60.5 s) is not"]),
        ({**SAFE, "broker_transport_options": {"visibility_timeout": 121}}, []),
        ({**SAFE, "broker_transport_options": {"visibility_timeout": "0:01:00"}}, []),
        ({**SAFE, "broker_transport_options": None}, []),
        ({**SAFE, "transport": "sentinel", "broker_transport_options": {"visibility_timeout": 9}}, ["visibility"]),
        ({**SAFE, "transport": "rediss", "broker_transport_options": {"visibility_timeout": 9}}, ["visibility"]),
        # A broker that knows that a worker is gone, and a task that was acknowledged before it ran.
        ({**SAFE, "transport": "amqp", "broker_transport_options": {"visibility_timeout": 9}}, []),
        ({**SAFE, "task_acks_late": False, "broker_transport_options": {"visibility_timeout": 9}}, [LATE]),
    ],
)
def test_settings_that_can_lose_a_task_or_do_it_twice_are_told(settings: dict[str, Any], said: list[str]) -> None:
    found = risks(settings, stop_timeout=120)
    assert [sentence.startswith(start) for sentence, start in zip(found, said, strict=True)] == [True] * len(said)


def test_the_visibility_timeout_that_an_application_leaves_alone_is_an_hour() -> None:
    assert risks(SAFE, stop_timeout=3599) == []
    (said,) = risks(SAFE, stop_timeout=3600)
    assert "(3600 s) is not above celery_worker_stop_timeout (3600 s): Redis gives" in said


def shop(home: Path, code: str) -> Path:
    """A release whose application is this code."""
    write(home / "releases/r1/app/shop.py", f"from celery import Celery\napp = Celery('shop')\n{code}")
    venv(home / "releases/r1/venv")
    return home / "releases/r1"


def test_the_settings_are_those_that_celery_itself_finds(home: Path) -> None:
    settings = check_import(shop(home, ""), "shop", "root", {"CELERY_BROKER_URL": "rediss://:s3cret@10.0.0.2:6379/0"})
    assert settings == {
        "task_acks_late": False,
        "task_reject_on_worker_lost": None,
        "broker_transport_options": {},
        "transport": "rediss",
    }
    code = "app.conf.update(task_acks_late=True, task_reject_on_worker_lost=1, broker_url='amqp://u:s3cret@h//',\n"
    code += "    broker_transport_options={'visibility_timeout': 7, 'odd': len})\n"
    settings = check_import(shop(home, code), "shop:app", "root", {})
    assert (settings["task_acks_late"], settings["task_reject_on_worker_lost"]) == (True, 1)
    assert (settings["transport"], settings["broker_transport_options"]["visibility_timeout"]) == ("amqp", 7)
    assert "s3cret" not in str(settings)


NOISE = """
import atexit, sys
print("loading\\nplimsoll answer: nonsense", end="")
print("{}", file=sys.stderr)
atexit.register(print, "bye")
app.conf.task_acks_late = True
"""


def test_what_an_application_prints_is_not_taken_for_the_answer(home: Path) -> None:
    assert check_import(shop(home, NOISE), "shop", "root", {})["task_acks_late"] is True


def test_an_application_that_takes_stdout_for_its_log_can_be_asked(home: Path) -> None:
    code = "import logging, sys\nclass Log:\n    def write(self, text): logging.info(text)\n    def flush(self): pass\n"
    assert "task_acks_late" in check_import(shop(home, f"{code}sys.stdout = Log()\n"), "shop", "root", {})


def test_the_transport_of_a_list_of_brokers_is_that_of_the_first(home: Path) -> None:
    code = "app.conf.broker_url = ['redis://10.0.0.2', 'redis://10.0.0.3']\n"
    assert check_import(shop(home, code), "shop", "root", {})["transport"] == "redis"


def test_the_module_warns_of_risks_whenever_it_imports_the_application(
    home: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    settings = {**SAFE, "broker_transport_options": {"visibility_timeout": 60}, "task_reject_on_worker_lost": False}

    def install(home: Path, digest: str, *rest: Any) -> dict[str, Any]:
        complete(home, digest, at=1)
        return settings

    warned: list[str] = []
    # Ansible gathers them for the whole process, which here has other tests.
    monkeypatch.setattr(app_release.AnsibleModule, "warn", lambda module, said: warned.append(said))
    monkeypatch.setattr(app_release, "install", install)
    given = {"archive": "a.tar.gz", "app": "shop", "user": "root"}
    release_module(capsys, home, "r1", stop_timeout=30, _ansible_check_mode=True, **given)
    assert warned == []
    assert release_module(capsys, home, "r1", stop_timeout=30, **given)["changed"]
    assert [said.startswith(f"shop: {LOST}") for said in warned] == [True]
    warned.clear()
    monkeypatch.setattr(app_release, "confirm", lambda *given: settings)
    assert not release_module(capsys, home, "r1", stop_timeout=90, **given)["changed"]
    assert len(warned) == 2
    monkeypatch.setattr(app_release, "confirm", lambda *given: None)
    release_module(capsys, home, "r1", **given)
    assert len(warned) == 2


# Whether the workers work


@pytest.fixture
def answer(monkeypatch: Any) -> subprocess.CompletedProcess[str]:
    """What the code in the release says, where nobody is asked."""
    told = subprocess.CompletedProcess([], 0, stdout="", stderr="")
    monkeypatch.setattr(release, "run_in_release", lambda *given: told)
    monkeypatch.setattr(release.socket, "gethostname", lambda: "w-1")
    return told


def test_workers_that_do_not_answer_and_those_that_take_no_task_are_told_apart(answer: Any, home: Path) -> None:
    said = {"answered": ["sales@w-1", "slow@w-1", "mail@w-2"], "took": ["sales@w-1", "mail@w-2"]}
    answer.stdout = f"noise\n{release.ANSWER}{json.dumps(said)}\nbye\n"
    workers = ["slow", "mail", "sales"]
    assert check(home, "shop", "root", {}, workers, 1) == (["mail"], ["slow"])


def test_an_application_that_cannot_reach_its_broker_is_told_in_its_own_words(answer: Any, home: Path) -> None:
    answer.returncode, answer.stderr = 1, "Traceback\nkombu.exceptions.OperationalError: no route\n"
    with pytest.raises(ReleaseError, match=r"^kombu\.exceptions\.OperationalError: no route$"):
        check(home, "shop", "root", {}, ["sales"], 1)
    answer.stderr = ""
    with pytest.raises(ReleaseError, match="asking them failed"):
        check(home, "shop", "root", {}, ["sales"], 1)


def test_no_answer_at_all_is_an_error_in_words(answer: Any, home: Path) -> None:
    """Of an application that ends the process itself, or that took stdout."""
    with pytest.raises(ReleaseError):
        check(home, "shop", "root", {}, ["sales"], 1)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (([], []), None),
        ((["mail"], []), "no answer within 5 s from mail\ncelery-worker@mail.service:\nwhy"),
        (([], ["sales"]), "no task taken within 5 s by sales, which answers\ncelery-worker@sales.service:\nwhy"),
        (
            (["mail"], ["sales"]),
            "no answer within 5 s from mail; no task taken within 5 s by sales, which answers\n"
            "celery-worker@mail.service:\nwhy\ncelery-worker@sales.service:\nwhy",
        ),
    ],
)
def test_the_module_fails_with_the_journal_of_those_that_do_not_work(
    tmp_path: Path, monkeypatch: Any, capsys: Any, found: tuple[list[str], list[str]], words: str | None
) -> None:
    write(tmp_path / "bin/journalctl", "#!/bin/sh\necho why\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    monkeypatch.setattr(celery_ping, "check", lambda *given: found)
    given = {"home": "/opt/celery", "app": "shop", "user": "root", "workers": ["sales", "mail"], "timeout": 5}
    with patch_module_args(given), pytest.raises(SystemExit):
        celery_ping.main()
    told = json.loads(capsys.readouterr().out)
    assert (told.get("failed", False), told.get("msg")) == (words is not None, words)


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    """A broker of its own, as the transport of the workers' fleet; its URL."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not on this machine")
    # The path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="plimsoll-") as folder:
        at = Path(folder, "socket")
        command = ["redis-server", "--port", "0", "--unixsocket", str(at), "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            try:
                within(10, at.exists)
                yield f"redis+socket://{at}"
            finally:
                server.kill()


def within(seconds: float, until: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def keys(redis: str) -> set[str]:
    at = redis.partition("://")[2]
    ran = subprocess.run(["redis-cli", "-s", at, "keys", "*"], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


WORKER = """
import os
print("noise of the application", end="")
app.conf.update(eval(os.environ.get("SHOP", "{}")))

@app.task(name="shop.buy")
def buy():
    pass
"""
HOST = socket.gethostname()


class Worker:
    """A real worker of a release, as its unit would start it."""

    def __init__(self, release: Path, name: str, environment: dict[str, str]) -> None:
        self.log_path = release / f"{name}.log"
        command = [
            "-m",
            "celery",
            "--app=shop",
            "worker",
            f"--hostname={name}@{HOST}",
            "--pool=solo",
            "--loglevel=INFO",
        ]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", f"--queues={name}"]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, *quiet],
                cwd=release / "app",
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )
        # Who asks before that waits for what does not answer yet.
        within(30, lambda: " ready." in self.log_path.read_text())

    def tasks(self) -> list[str]:
        """Names of what it was given, in order."""
        return re.findall(r"Task (\S+)\[[-0-9a-f]+\] received", self.log_path.read_text())


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def starting(*given: Any) -> Worker:
        started.append(Worker(*given))
        return started[-1]

    yield starting
    for worker in started:
        worker.process.kill()
        worker.process.wait()


def test_a_worker_that_had_no_task_gets_one_that_does_nothing_and_another_is_left_alone(
    home: Path, redis: str, start: Callable[..., Worker]
) -> None:
    environment = {"CELERY_BROKER_URL": redis}
    path = shop(home, WORKER)
    worker = start(path, "sales", environment)
    assert check(path, "shop", "root", environment, ["sales"], 60) == ([], [])
    assert worker.tasks() == ["celery.accumulate"]
    # It has taken one now. Another that is not there is told, and does not hold up for longer than it may.
    began = time.monotonic()
    assert check(path, "shop", "root", environment, ["sales", "ghost"], 1) == (["ghost"], [])
    assert time.monotonic() - began < 30
    assert worker.tasks() == ["celery.accumulate"]
    log = worker.log_path.read_text()
    assert f"Started consuming from plimsoll.check.sales@{HOST}" in log
    assert f"Canceling queue plimsoll.check.sales@{HOST}" in log
    # No message is left, for no one.
    assert not [key for key in keys(redis) if key.startswith("plimsoll.check.")]


def test_a_worker_of_an_application_that_makes_no_queues_by_itself_takes_it_too(
    home: Path, redis: str, start: Callable[..., Worker]
) -> None:
    queues = {"task_create_missing_queues": False, "task_queues": {"celery": {}, "strict": {}}}
    environment = {"CELERY_BROKER_URL": redis, "SHOP": repr(queues)}
    path = shop(home, WORKER)
    start(path, "strict", environment)
    assert check(path, "shop", "root", environment, ["strict"], 60) == ([], [])
    # Nor what routes to the queue.
    assert not [key for key in keys(redis) if "plimsoll.check.strict" in key]


@pytest.mark.parametrize("line", ["-r base.txt", "--requirement=base.txt", "-c limits.txt", "  -e ../shared"])
def test_requirements_that_name_another_file_are_refused_with_their_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text(f"celery==5.7.0\n# -r is only a comment here\n{line}\n")
    with pytest.raises(ReleaseError, match=rf"{re.escape(str(path))}, line 3: .* names another file"):
        read_requirements(path)
    path.write_text("celery==5.7.0\nrc-tools==1\n")
    assert read_requirements(path) == "celery==5.7.0\nrc-tools==1\n"
