"""Releases: a name that says what is in them, archives that can be made again, and going back on a host."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.library import app_archive, app_release
from plimsoll import release
from plimsoll.release import (
    ReleaseError,
    activate,
    build,
    check_import,
    confirm,
    current,
    digest,
    install,
    installed,
    members,
    pack,
    read_requirements,
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

    def noted(what: str, command: list[str]) -> None:
        seen.append(command)
        if "venv" in command:
            assert os.access(command[0], os.X_OK)
            venv(Path(command[-1]))

    monkeypatch.setattr(release, "_run", noted)
    return seen


def test_a_release_is_complete_once_it_imports(home: Path, tmp_path: Path, commands: list[list[str]]) -> None:
    (tmp_path / "a.tar.gz").write_bytes(WHOLE)
    write(home / "releases/r1/left/over", "from a run that was cut off")
    install(home, "r1", tmp_path / "a.tar.gz", "/usr/bin/python3", "shop", "root", {})
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

    def check(path: Path, app: str, user: str, environment: dict[str, str]) -> None:
        if app == "nope":
            raise ReleaseError("does not import")
        imported.append((app, environment))

    monkeypatch.setattr(release, "check_import", check)
    confirm(home, "r1", "shop", "root", {"KEY": "s3cret"})
    assert imported == []
    for _ in range(2):
        with pytest.raises(ReleaseError, match="does not import"):
            confirm(home, "r1", "nope", "root", {"KEY": "s3cret"})
        confirm(home, "r1", "shop", "root", {"KEY": "other"})
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
        given = {"home": str(home), "digest": digest, "archive": str(archive), "app": "shop", "user": "root"}
        with patch_module_args({**given, **more}), pytest.raises(SystemExit):
            app_release.main()
        return json.loads(capsys.readouterr().out)

    assert run("r1", _ansible_check_mode=True)["changed"] and names(home) == set()
    with monkeypatch.context() as patched:
        patched.setattr(app_release, "install", lambda home, digest, *rest: complete(home, digest, at=1))
        first = run("r1")
    assert (first["changed"], first["previous"], current(home)) == (True, None, "r1")
    asked: list[Any] = []
    monkeypatch.setattr(app_release, "confirm", lambda *given: asked.append(given))
    again = run("r1")
    assert (again["changed"], again["previous"]) == (False, "r1")
    assert asked == [(home, "r1", "shop", "root", {})]
    archive.write_bytes(WHOLE[:99])
    failed = run("r2")
    assert failed["failed"] and failed["msg"].startswith(f"release r2: {archive} is damaged")
    assert (failed["previous"], current(home)) == ("r1", "r1")


def test_the_workers_user_can_read_a_release_of_a_hardened_host(
    home: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(app_release, "install", lambda home, digest, *rest: complete(home, digest, at=1))
    given = {"home": str(home), "digest": "r1", "archive": "a.tar.gz", "app": "shop", "user": "root"}
    before = os.umask(0o077)
    try:
        with patch_module_args(given), pytest.raises(SystemExit):
            app_release.main()
    finally:
        os.umask(before)
    assert (home / "releases/r1").stat().st_mode & 0o777 == 0o755


def test_ping_names_the_workers_that_do_not_answer(home: Path, monkeypatch: Any) -> None:
    """A broker would be needed to ask for real."""
    told = subprocess.CompletedProcess([], 0, stdout="", stderr="")
    monkeypatch.setattr(release, "run_in_release", lambda *given: told)
    monkeypatch.setattr(release.socket, "gethostname", lambda: "w-1")
    told.stdout = "noise of the application\nsales@w-1 mail@w-2\n"
    assert release.ping(home, "shop", "root", {}, ["sales", "mail"], 1) == ["mail"]
    told.returncode, told.stderr = 1, "Traceback\nkombu.exceptions.OperationalError: no route\n"
    with pytest.raises(ReleaseError, match=r"^kombu\.exceptions\.OperationalError: no route$"):
        release.ping(home, "shop", "root", {}, ["sales"], 1)


@pytest.mark.parametrize("line", ["-r base.txt", "--requirement=base.txt", "-c limits.txt", "  -e ../shared"])
def test_requirements_that_name_another_file_are_refused_with_their_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text(f"celery==5.7.0\n# -r is only a comment here\n{line}\n")
    with pytest.raises(ReleaseError, match=rf"{re.escape(str(path))}, line 3: .* names another file"):
        read_requirements(path)
    path.write_text("celery==5.7.0\nrc-tools==1\n")
    assert read_requirements(path) == "celery==5.7.0\nrc-tools==1\n"
