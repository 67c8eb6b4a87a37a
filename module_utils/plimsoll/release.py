"""Releases of the application: what makes one (a digest), its archive, and its venv on a host.

An archive is one tar.gz for one Python and machine: `app/` (the source directory), `wheels/` (every dependency, and uv
itself), `requirements.lock`. On a host a release is `HOME/releases/DIGEST/{app,venv}`, and `HOME/current` is a link to
the one that runs. Once its venv is whole and the application was imported in it, it holds `.complete`: a digest of what
was imported (name of the application, user, environment).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from .files import whole, write_whole

FORMAT = b"plimsoll release 1"
SKIPPED = {"__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
# pip wants each tag spelled out; a wheel for an older glibc runs on a newer one.
GLIBC_MINORS = (36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
_INCLUDES = re.compile(r"\s*(-r|-c|-e|--requirement|--constraint|--editable)\b")

FIND_APP = """
import sys
sys.path.insert(0, ".")
from celery.app.utils import find_app
app = find_app(sys.argv[1])
"""
# One process asks again and again: importing Celery anew for each question would cost more than the worker's own start.
PING = (
    FIND_APP
    + """
import time
deadline, wanted, seen = time.monotonic() + float(sys.argv[2]), set(sys.argv[3:]), set()
while seen != wanted and time.monotonic() < deadline:
    seen |= set(app.control.inspect(timeout=2, destination=sorted(wanted - seen)).ping() or {})
print(*sorted(seen))
"""
)


class ReleaseError(Exception):
    """A release could not be made or installed; the message names the file or package and the way out."""


def members(source: Path) -> list[tuple[str, Path]]:
    """(name, file) of what goes into a release from a source directory or wheel, sorted. Raises ReleaseError."""
    if source.is_file() and source.suffix == ".whl":
        return [(source.name, source)]
    if not source.is_dir():
        raise ReleaseError(f"{source}: neither a directory nor a .whl; set celery_worker_source")
    found = [
        (str(file.relative_to(source)), file)
        for file in source.rglob("*")
        if file.is_file() and not SKIPPED.intersection(file.relative_to(source).parts)
    ]
    if not found:
        raise ReleaseError(f"{source}: the directory holds no file")
    return sorted(found)


def read_requirements(path: Path) -> str:
    """The text of a requirements file. Raises OSError, and ReleaseError for a line that names another file.

    Such a file would be no part of the digest: a change of it would make no release.
    """
    text = path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        if _INCLUDES.match(line):
            raise ReleaseError(f"{path}, line {number}: {line.strip()!r} names another file; put what is in it here")
    return text


def digest(files: Iterable[tuple[str, Path]], requirements: str, python_version: str, machine: str) -> str:
    """16 hex digits that name a release: the same inputs give the same name on every controller.

    files is what members() gives; of a file count what pack() keeps: name, content and the executable bit.
    """
    total = hashlib.sha256(FORMAT)
    for text in (requirements, python_version, machine):
        total.update(b"\0" + text.encode())
    for name, file in files:
        total.update(b"\0%s\0%o\0" % (os.fsencode(name), _mode(file)) + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def _mode(file: Path) -> int:
    return 0o755 if file.stat().st_mode & 0o100 else 0o644


def pack(path: Path, entries: Sequence[tuple[str, Path]]) -> None:
    """Write a tar.gz that depends on names, contents and the executable bit alone. Appears by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Wheels are compressed already: more effort would buy nothing.
    with (
        whole(path) as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name, file in entries:
            content = file.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), _mode(file)
            archive.addfile(member, io.BytesIO(content))


def build(
    source: Path, requirements: str, python_version: str, machine: str, archive: Path, python: str, uv_version: str
) -> None:
    """Resolve for the target's Python, download its wheels, and write the archive. Needs a package index.

    python is the controller's interpreter with pip and uv; python_version the target's, such as 3.11.2, whose
    environment markers may differ from the controller's own. Raises ReleaseError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        wheels = work / "wheels"
        wheels.mkdir()
        wanted = work / "requirements.txt"
        wheel = source if source.suffix == ".whl" else None
        wanted.write_text(requirements + (f"\n{wheel.resolve()}\n" if wheel else ""))
        lock = work / "requirements.lock"
        _run(
            "resolving the application's requirements",
            [
                *(
                    python,
                    "-m",
                    "uv",
                    "pip",
                    "compile",
                    "--quiet",
                    "--no-header",
                    "--no-annotate",
                    "--no-emit-index-url",
                ),
                *("--python-version", python_version, "--python-platform", f"{machine}-manylinux_2_34"),
                *("--output-file", str(lock), str(wanted)),
            ],
        )
        platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS]
        platforms += [f"--platform=manylinux2014_{machine}", "--platform=any"]
        for needed in (["--requirement", str(lock)], [f"uv=={uv_version}"]):
            _run(
                "downloading the wheels of the application",
                [
                    *(python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
                    *("--python-version", python_version, "--implementation=cp", *platforms),
                    *("--dest", str(wheels), *needed),
                ],
            )
        entries = [(f"app/{name}", file) for name, file in members(source)] if wheel is None else []
        if wheel is not None:
            # By name and not by the controller's path, which the host does not have.
            shutil.copyfile(wheel, wheels / wheel.name)
            pins = [line for line in lock.read_text().splitlines() if "file://" not in line]
            lock.write_text("\n".join([*pins, wheel.name.split("-")[0], ""]))
        entries += [(f"wheels/{file.name}", file) for file in sorted(wheels.iterdir())]
        pack(archive, [*entries, ("requirements.lock", lock)])


def installed(home: Path, name: str) -> bool:
    """Whether the release is there whole."""
    return (home / "releases" / name / ".complete").exists()


def current(home: Path) -> str | None:
    """The release that runs, or None."""
    link = home / "current"
    return link.readlink().name if link.is_symlink() else None


def install(
    home: Path, name: str, archive: Path, python: str, app: str, user: str, environment: dict[str, str]
) -> None:
    """Unpack, make the venv, import the application as its user; the release is complete then, and not yet current.

    Raises ReleaseError, after which the next call starts over.
    """
    release = home / "releases" / name
    shutil.rmtree(release, ignore_errors=True)
    (release / "app").mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        wheels = Path(scratch) / "wheels"
        try:
            _unpack(archive, release, Path(scratch))
            uv = _uv(wheels, Path(scratch))
        except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ReleaseError(
                f"{archive} is damaged ({error}); remove it from .plimsoll/releases on the controller and run again"
            ) from None
        quiet = ["--quiet", "--offline", "--no-config"]
        _run("making the venv", [uv, "venv", *quiet, "--python", python, str(release / "venv")])
        _run(
            "installing the wheels of the application",
            [
                *(uv, "pip", "install", *quiet, "--no-index", "--no-deps", "--compile-bytecode", "--link-mode=copy"),
                *("--find-links", str(wheels), "--python", str(release / "venv" / "bin" / "python")),
                *("--requirement", str(release / "requirements.lock")),
            ],
        )
    venv_python = str(release / "venv" / "bin" / "python")
    # The worker's user cannot write there, so that the application is compiled now or at every start.
    _run("compiling the application", [venv_python, "-m", "compileall", "-q", str(release / "app")])
    check_import(release, app, user, environment)
    _mark(release, _asked(app, user, environment))


def confirm(home: Path, name: str, app: str, user: str, environment: dict[str, str]) -> None:
    """Import the application in a release that is there, unless it was so imported before. Raises ReleaseError.

    A release may be there whole, and yet hold no application of a name that was mistyped since.
    """
    release = home / "releases" / name
    asked = _asked(app, user, environment)
    if (release / ".complete").read_text() != asked:
        check_import(release, app, user, environment)
        _mark(release, asked)


def _asked(app: str, user: str, environment: dict[str, str]) -> str:
    return hashlib.sha256(repr((app, user, sorted(environment.items()))).encode()).hexdigest()


def _mark(release: Path, asked: str) -> None:
    # The environment may hold a secret that is short enough to be guessed by its digest.
    write_whole(release / ".complete", asked, 0o600)


def _unpack(archive: Path, release: Path, scratch: Path) -> None:
    """Wheels go to scratch/wheels, all else to the release."""
    with gzip.open(archive) as zipped:
        with tarfile.open(fileobj=zipped, mode="r|") as packed:
            for member in packed:
                # The controller made this archive; the check is against a damaged one.
                if not member.isfile() or ".." in Path(member.name).parts or member.name.startswith("/"):
                    raise tarfile.ReadError(f"unexpected member {member.name}")
                target = (scratch if member.name.startswith("wheels/") else release) / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = packed.extractfile(member)
                assert content is not None
                with target.open("wb") as out:
                    shutil.copyfileobj(content, out)
                target.chmod(member.mode)
        # tarfile takes a damaged header for the end; gzip compares its checksum only at its own.
        while zipped.read(1 << 20):
            pass


def run_in_release(
    release: Path, user: str, environment: dict[str, str], code: str, *args: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in the release as its workers run: same directory, venv, user and environment."""
    return subprocess.run(
        ["runuser", "--user", user, "--", str(release / "venv" / "bin" / "python"), "-c", code, *args],
        cwd=release / "app",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def check_import(release: Path, app: str, user: str, environment: dict[str, str]) -> None:
    """Find the Celery application as `celery --app` does. Raises ReleaseError with the exception and its place."""
    ran = run_in_release(release, user, environment, FIND_APP, app)
    if ran.returncode:
        raise ReleaseError(f"celery_worker_app '{app}' does not import: {_reason(ran.stderr, release / 'app')}")


def _reason(said: str, ours: Path) -> str:
    """A traceback in one line: the exception, and the last place in our own code or, where there is none, of all."""
    lines = [line for line in said.splitlines() if line.strip()] or ["no output"]
    places = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    if not places:
        return lines[-1]
    # A message may have several lines, of which the last says least.
    start = next((number for number in range(places[-1], len(lines)) if not lines[number].startswith(" ")), -1)
    # What Python's own import machinery does helps nobody.
    readable = [number for number in places if '"<frozen ' not in lines[number]]
    where = [number for number in readable if str(ours) in lines[number]] or readable
    place = f" ({lines[where[-1]].strip()})" if where else ""
    return f"{' '.join(line.strip() for line in lines[start:])[:400]}{place}"


def ping(
    release: Path, app: str, user: str, environment: dict[str, str], names: Sequence[str], timeout: int
) -> list[str]:
    """Wait until the named workers of this host answer Celery's ping; those that did not within timeout seconds.

    Raises ReleaseError when the application cannot reach its broker or does not import.
    """
    wanted = [f"{name}@{socket.gethostname()}" for name in names]
    ran = run_in_release(release, user, environment, PING, app, str(timeout), *wanted)
    if ran.returncode:
        raise ReleaseError((ran.stderr.strip().splitlines() or ["ping failed"])[-1])
    answered = set(ran.stdout.split())
    return [name for name, node in zip(names, wanted) if node not in answered]


def activate(home: Path, name: str, keep: int) -> None:
    """Point current at a complete release by one rename, and remove the others but for the last `keep` that ran."""
    scratch = home / ".current.new"
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(Path("releases") / name)
    scratch.replace(home / "current")
    # The time of a release is when it last became current: one that was gone back to is not old.
    os.utime(home / "releases" / name)
    others = [path for path in (home / "releases").iterdir() if path.name != name]
    # One that failed is nothing to go back to, and must not take the place of one that is.
    whole = sorted((path for path in others if installed(home, path.name)), key=lambda path: path.stat().st_mtime)
    for old in set(others) - set(whole[max(0, len(whole) - keep) :]):
        shutil.rmtree(old)


def _uv(wheels: Path, scratch: Path) -> str:
    """The uv program out of its own wheel: the host needs no installer of its own."""
    wheel = next(wheels.glob("uv-*.whl"), None)
    if wheel is None:
        raise ReleaseError("the release archive holds no wheel of uv; remove it from .plimsoll/releases and run again")
    with zipfile.ZipFile(wheel) as packed:
        inside = next(name for name in packed.namelist() if name.endswith("/scripts/uv"))
        program = scratch / "uv"
        program.write_bytes(packed.read(inside))
    program.chmod(0o755)
    return str(program)


def _run(what: str, command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        said = "\n".join((ran.stderr or ran.stdout).strip().splitlines()[-6:])
        raise ReleaseError(f"{what} failed:\n{said}")
