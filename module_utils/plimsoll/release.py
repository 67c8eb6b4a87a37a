"""Releases of the application: what makes one (a digest), its archive, and its venv on a host.

An archive is one tar.gz for one Python and machine: `app/` (the source directory), `wheels/` (every dependency, and uv
itself), `requirements.lock`. On a host a release is `HOME/releases/DIGEST/{app,venv}`, and `HOME/current` is a link to
the one that runs. Once its venv is whole and the application was imported in it, it holds `.complete`: a digest of what
was imported (name of the application, user, environment).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import socket
import stat
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import whole, write_whole

FORMAT = b"plimsoll release 1"
SKIPPED = {"__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
# pip wants each tag spelled out; a wheel for an older glibc runs on a newer one.
GLIBC_MINORS = (36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
_INCLUDES = re.compile(r"\s*(-r|-c|-e|--requirement|--constraint|--editable)\b")

# What an application prints as it is imported is not for us: our own answer comes on a line of its own behind this.
ANSWER = "plimsoll answer: "
FIND_APP = f"""
import json
import sys
sys.path.insert(0, ".")
from celery.app.utils import find_app
app = find_app(sys.argv[1])
def answer(data):
    # Not to what the application may have put in the place of stdout.
    print("\\n{ANSWER}" + json.dumps(data, default=str, skipkeys=True), file=sys.__stdout__, flush=True)
"""
SETTINGS = (
    FIND_APP
    + """
names = ("task_acks_late", "task_reject_on_worker_lost", "broker_transport_options")
url = app.conf.broker_url or ""
first = str(url[0] if isinstance(url, (list, tuple)) else url)
# Without the password that an URL has in it.
answer({**{name: app.conf.get(name) for name in names}, "transport": first.partition(":")[0]})
"""
)
# Of what is no application of Celery: a module that is imported, and has no settings for risks().
IMPORT = f"""
import importlib
import sys
importlib.import_module(sys.argv[1])
print("\\n{ANSWER}{{}}", file=sys.__stdout__, flush=True)
"""
# One process asks again and again: importing Celery anew for each question would cost more than the worker's own start.
# A worker that has had no task since its start gets one that every application has, and which does nothing, through a
# queue that it alone consumes for the time.
CHECK = (
    FIND_APP
    + """
import time
deadline, wanted, seen, took, asked = time.monotonic() + float(sys.argv[2]), set(sys.argv[3:]), set(), set(), set()
try:
    while took != wanted and time.monotonic() < deadline:
        stats = app.control.inspect(timeout=2, destination=sorted(wanted - took)).stats() or {}
        for node, one in stats.items():
            seen.add(node)
            if sum(one["total"].values()):
                took.add(node)
            elif node not in asked:
                asked.add(node)
                queue = "plimsoll.check." + node
                app.control.add_consumer(queue, destination=[node], reply=True, timeout=5)
                # Declared as the worker does, whatever the application says of queues that it does not know.
                app.amqp.queues.add_compat(queue, exchange=queue, exchange_type="direct")
                app.send_task("celery.accumulate", queue=queue, expires=float(sys.argv[2]), ignore_result=True)
        if took != wanted:
            time.sleep(0.5)
finally:
    for node in asked:
        queue = "plimsoll.check." + node
        app.control.cancel_consumer(queue, destination=[node], reply=True, timeout=5)
        if queue in app.amqp.queues:
            with app.connection_for_write() as connection:
                bound = app.amqp.queues[queue](connection.default_channel)
                # Of Redis, kombu deletes what this very connection has declared, and nothing else.
                bound.declare()
                bound.delete()
                bound.exchange.delete()
answer({"answered": sorted(seen), "took": sorted(took)})
"""
)
# Celery's default, in seconds, where an application says nothing.
VISIBILITY_TIMEOUT_S = 3600


class ReleaseError(Exception):
    """A release could not be made or installed; the message names the file or package and the way out."""


def members(source: Path) -> list[tuple[str, Path]]:
    """(name, file) of what goes into a release from a source directory or wheel, sorted. Raises ReleaseError."""
    if source.is_file() and source.suffix == ".whl":
        return [(source.name, source)]
    if not source.is_dir():
        raise ReleaseError(f"{source}: no directory, .whl or archive; set celery_worker_source")
    found = [
        (str(file.relative_to(source)), file)
        for file in source.rglob("*")
        if file.is_file() and not SKIPPED.intersection(file.relative_to(source).parts)
    ]
    if not found:
        raise ReleaseError(f"{source}: the directory holds no file")
    return sorted(found)


@contextlib.contextmanager
def opened(source: Path, version: str = "") -> Iterator[Path]:
    """The source as a directory or wheel: an archive, as `git archive` makes it, is unpacked for the time.

    With a version, the source is a checkout of git, and what is unpacked is that commit, branch or tag of it. Raises
    ReleaseError where it is damaged or holds something that would land elsewhere.
    """
    if version:
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "source.tar"
            command = ["git", "-C", str(source), "archive", "--format=tar", f"--output={archive}", version, "--"]
            _run(f"taking the version {version} of {source} out of git", command)
            with opened(archive) as unpacked:
                yield unpacked
        return
    if not source.is_file() or source.suffix == ".whl":
        yield source
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if zipfile.is_zipfile(source):
                _unzip(source, Path(scratch))
            else:
                with tarfile.open(source) as packed:
                    # The archive is the user's own, on the controller. Absolute names, .., links to outside and devices
                    # raise all the same, by tarfile's data filter, and by _refuse_outside() in a Python before 3.11.4
                    # that has none.
                    packed.extraction_filter = getattr(tarfile, "data_filter", None)
                    if packed.extraction_filter is None:
                        _refuse_outside(packed)
                    packed.extractall(scratch)  # noqa: S202 - by that filter
                    # tarfile takes a damaged header for the end; gzip compares its checksum only at its own.
                    assert packed.fileobj is not None
                    packed.fileobj.seek(packed.offset)
                    while rest := packed.fileobj.read(1 << 20):
                        if rest.strip(b"\0"):
                            raise tarfile.ReadError("a damaged header")
        # RuntimeError is zipfile's for a password, and for a method of compression that it does not know.
        except (
            tarfile.TarError,
            zipfile.BadZipFile,
            RuntimeError,
            EOFError,
            zlib.error,
            lzma.LZMAError,
            OSError,
        ) as error:
            said = str(error).partition("\n")[0].rstrip(":")
            raise ReleaseError(
                f"{source}: no wheel, and no tar or zip archive to be unpacked ({said}); set celery_worker_source to"
                " a directory, a .whl, or what git archive makes"
            ) from None
        if not any(path.is_file() for path in Path(scratch).rglob("*")):
            raise ReleaseError(f"{source}: the archive holds no file")
        yield Path(scratch)


def _refuse_outside(packed: tarfile.TarFile) -> None:
    """Raises TarError for what is neither file, directory nor symbolic link, or leads outside of the archive."""
    for member in packed.getmembers():
        leads_to = os.path.normpath(Path(member.name).parent / member.linkname if member.issym() else member.name)
        kept = member.isfile() or member.isdir() or member.issym()
        if not kept or ".." in Path(member.name).parts or Path(leads_to).is_absolute() or leads_to.startswith(".."):
            raise tarfile.ReadError(f"{member.name} would land outside of it, or is no file")


def _unzip(source: Path, target: Path) -> None:
    """With the executable bit, and links that git put in; zipfile itself makes plain files inside of target alone."""
    with zipfile.ZipFile(source) as packed:
        for member in packed.infolist():
            mode, made = member.external_attr >> 16, Path(packed.extract(member, target))
            if stat.S_ISLNK(mode):
                link = made.read_text()
                if not (made.parent / link).resolve().is_relative_to(target.resolve()):
                    raise zipfile.BadZipFile(f"{member.filename} is a link to outside of it")
                made.unlink()
                made.symlink_to(link)
            elif mode & 0o100 and made.is_file():
                made.chmod(0o755)


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
    source: Path,
    requirements: str,
    python_version: str,
    machine: str,
    archive: Path,
    python: str,
    uv_version: str,
    sdists: Sequence[str] = (),
) -> None:
    """Resolve for the target's Python, download its wheels, and write the archive. Needs a package index.

    python is the controller's interpreter with pip and uv; python_version the target's, such as 3.11.2, whose
    environment markers may differ from the controller's own. sdists: packages without a wheel, of which one is made
    here. Raises ReleaseError.
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
        # By the names that uv writes: in lower case, with dashes.
        pinned = lock.read_text().splitlines()
        made = [line for line in pinned if line.partition("==")[0] in sdists]
        if made:
            # It runs code of the package, which is why each is named; what is pure Python is the same for every target.
            command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels)]
            _run("making wheels of source distributions", [*command, *(line.partition(" ")[0] for line in made)])
            if compiled := [file.name for file in wheels.iterdir() if not file.name.endswith("-none-any.whl")]:
                raise ReleaseError(f"{', '.join(compiled)}: was compiled, for this controller and not for the hosts")
        fetched = work / "fetched.txt"
        fetched.write_text("\n".join(line for line in pinned if line not in made))
        for needed in (["--requirement", str(fetched)], [f"uv=={uv_version}"]):
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


def installed_releases(home: Path) -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in (home / "releases").glob("*/.complete")))


def installed(home: Path, name: str) -> bool:
    """Whether the release is there whole."""
    return (home / "releases" / name / ".complete").exists()


def current(home: Path) -> str | None:
    """The release that runs, or None."""
    link = home / "current"
    return link.readlink().name if link.is_symlink() else None


def install(
    home: Path,
    name: str,
    archive: Path,
    python: str,
    app: str,
    user: str,
    environment: dict[str, str],
    code: str = SETTINGS,
) -> dict[str, Any]:
    """Unpack, make the venv, import the application as its user; the release is complete then, and not yet current.

    The application's settings, as check_import() gives them. Raises ReleaseError; the next call starts over then.
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
            # Seconds a file; uv's own minute is too short for a large one on a host that is slow and busy.
            {"UV_COMPILE_BYTECODE_TIMEOUT": "600"},
        )
    venv_python = str(release / "venv" / "bin" / "python")
    # The worker's user cannot write there, so that the application is compiled now or at every start.
    _run("compiling the application", [venv_python, "-m", "compileall", "-q", str(release / "app")])
    settings = check_import(release, app, user, environment, code)
    _mark(release, _asked(app, user, environment))
    return settings


def confirm(
    home: Path, name: str, app: str, user: str, environment: dict[str, str], code: str = SETTINGS
) -> dict[str, Any] | None:
    """Import the application in a release that is there, unless it was so imported before: None then.

    A release may be there whole, and yet hold no application of a name that was mistyped since. Raises ReleaseError.
    """
    release = home / "releases" / name
    asked = _asked(app, user, environment)
    if (release / ".complete").read_text() == asked:
        return None
    settings = check_import(release, app, user, environment, code)
    _mark(release, asked)
    return settings


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


def check_import(
    release: Path, app: str, user: str, environment: dict[str, str], code: str = SETTINGS
) -> dict[str, Any]:
    """Find the Celery application as `celery --app` does; its settings for risks(). With IMPORT, import a module.

    Raises ReleaseError with the exception and its place.
    """
    ran = run_in_release(release, user, environment, code, app)
    if ran.returncode:
        what = "celery_worker_app" if code == SETTINGS else "module"
        raise ReleaseError(f"{what} '{app}' does not import: {_reason(ran.stderr, release / 'app')}")
    return answer(ran.stdout)


def answer(said: str) -> dict[str, Any]:
    if ANSWER not in said:
        raise ReleaseError("the application ended the process as it was imported, or closed its output")
    found: dict[str, Any] = json.loads(said.rpartition(ANSWER)[2].partition("\n")[0])
    return found


def risks(settings: Mapping[str, Any], stop_timeout: int) -> list[str]:
    """What of an application's settings can lose a task or do it twice, a sentence each. stop_timeout in seconds.

    Celery's defaults fit none of the faults that a unit with limits is made for; whether a task may run twice is for
    the application to say, so nothing is set in its place.
    """
    found = []
    if not settings.get("task_acks_late"):
        found.append(
            "task_acks_late is off: a task is lost whose worker is killed as it runs. Set it where tasks may run twice"
        )
    elif not settings.get("task_reject_on_worker_lost"):
        found.append(
            "task_reject_on_worker_lost is off: a task whose child is killed at MemoryMax is lost in spite of acks_late"
        )
    options = settings.get("broker_transport_options") or {}
    visible = options.get("visibility_timeout", VISIBILITY_TIMEOUT_S)
    redis = str(settings.get("transport", "")).startswith(("redis", "sentinel"))
    if redis and settings.get("task_acks_late") and isinstance(visible, (int, float)) and visible <= stop_timeout:
        found.append(
            f"visibility_timeout ({visible} s) is not above celery_worker_stop_timeout ({stop_timeout} s): Redis gives"
            " a task that takes that long to a second worker"
        )
    return found


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


def check(
    release: Path, app: str, user: str, environment: dict[str, str], names: Sequence[str], timeout: int
) -> tuple[list[str], list[str]]:
    """Wait until the named workers of this host answer remote control and have taken a task since they started.

    (those that did not answer, those that answered and took none) within timeout seconds. Raises ReleaseError when the
    application cannot reach its broker or does not import.
    """
    wanted = [f"{name}@{socket.gethostname()}" for name in names]
    ran = run_in_release(release, user, environment, CHECK, app, str(timeout), *wanted)
    if ran.returncode:
        raise ReleaseError((ran.stderr.strip().splitlines() or ["asking them failed"])[-1])
    said = answer(ran.stdout)
    by_node = dict(zip(wanted, names))
    silent = [by_node[node] for node in wanted if node not in said["answered"]]
    return silent, [by_node[node] for node in wanted if node in said["answered"] and node not in said["took"]]


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


def _run(what: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if ran.returncode:
        said = "\n".join((ran.stderr or ran.stdout).strip().splitlines()[-6:])
        raise ReleaseError(f"{what} failed:\n{said}")
