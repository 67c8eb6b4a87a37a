"""`plimsoll soak`: a worker of the application on this computer, what is sent to it, and the verdict of the gate.

The worker and the sender run in the application's own Python, as roles/soak/files/plimsoll_soak.py; what they are sent
and how their records are judged is soak.py's, what is written of it soakreport.py's. docs/soak.md tells how it works.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import yaml

from . import __version__, soakreport
from .diagnose import Kind, advice, culprits, evidence, leak_class
from .files import write_whole
from .findings import stamp
from .formats import InputError, printable, read_host
from .soak import (
    FAIL,
    PASS,
    UNDECIDED,
    Judge,
    Plan,
    PlanError,
    Recorded,
    budget_of,
    compare,
    digest,
    line,
    plan_of,
    schedule,
    whole,
)
from .soakbench import PROGRAM, Bench, Setting, Trouble
from .soakreport import junit, page, table

ROOT = Path(__file__).resolve().parents[2]
# The package runs from a checkout, as report.py has it.
PROGRAMS = ROOT / "roles" / "soak" / "files"
BOOTSTRAP = ROOT / "roles" / "tracemalloc_bootstrap" / "files"

SCHEMA_VERSION = 1
PASSED, FAILED, BAD_INPUT, NOT_DECIDED, INTERRUPTED = 0, 1, 2, 3, 130
STATUS = {PASS: PASSED, FAIL: FAILED, UNDECIDED: NOT_DECIDED}
EMBEDDED = "plimsoll://"
PASSWORD = "PLIMSOLL_SOAK_BROKER_PASSWORD"  # noqa: S105 - the name of a variable
_T = TypeVar("_T")


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = verbs.add_parser(
        "soak",
        help="run tasks of an application on this computer, and say which of them leak",
        description="Runs tasks of a Celery application in a worker on this computer, on a broker of its own, and says"
        " which of them leak: growth of memory in use per 1,000 tasks, against a budget. See docs/soak.md.",
        epilog="Exit status: 0 pass, 1 a task leaks, 2 bad usage, unreadable input, or the application does not run,"
        " 3 undecided, 130 interrupted.",
    )
    one.add_argument("-A", "--app", required=True, help="the application, as for `celery -A`; found from this folder")
    _files(one)
    one.add_argument("--out", type=Path, metavar="DIR", help="write soak.json, junit.xml and soak.html there")
    one.add_argument("--python", metavar="PATH", help="that of the application: the active venv's, or python3")
    one.add_argument("--broker", metavar="URL", help=f"in place of the embedded one; a password comes by {PASSWORD}")
    one.add_argument("--broker-again", metavar="HOST[:PORT]", help="the host of --broker once more, if you mean it")
    one.set_defaults(run=soak)
    two = verbs.add_parser("soaking", help="check the files of a soak, and say what is in them (soak.yml does)")
    _files(two)
    two.set_defaults(run=soaking)
    three = verbs.add_parser("soaked", help="say what came of a soak on a host (soak.yml does)")
    three.add_argument("-A", "--app", required=True)
    three.add_argument("--host", required=True, help="where it ran")
    three.add_argument("--broker", required=True, metavar="HOST")
    _files(three)
    three.add_argument("--out", type=Path, required=True, metavar="DIR")
    three.set_defaults(run=soaked)


def _files(one: argparse.ArgumentParser) -> None:
    one.add_argument("--tasks", type=Path, required=True, metavar="TASKS.YML", help="what to send")
    one.add_argument("--budget", type=Path, metavar="BUDGET.YML", help="KiB per 1,000 tasks that each task may grow by")
    one.add_argument("--baseline", type=Path, metavar="SOAK.JSON", help="of another release, to be compared with")


def soak(given: argparse.Namespace) -> int:
    """Raises InputError where the files or the application are not what they have to be."""

    def ended(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    try:
        return _soak(given)
    except KeyboardInterrupt:
        print("plimsoll: interrupted; what was started is ended", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _soak(given: argparse.Namespace) -> int:
    files = _read(given)
    plan, lines = files.plan, files.lines
    url, secret = broker_url(given.broker, given.broker_again, os.environ.get(PASSWORD, ""))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    python = _python(given.python)
    with tempfile.TemporaryDirectory(prefix="plimsoll-soak-") as name:
        setting = _setting(Path(name), given.app, plan, url)
        bench, judge = Bench(setting, plan, Here(python), lambda: None, _say), Judge(plan, files.budget)
        began = time.time()
        try:
            sent = bench.run(judge, lines)
            found = judge.finish(sent["seconds"])
            leaks = {task: leak(records, Path.cwd()) for task, records in bench.traced(found).items()}
        except Trouble as error:
            # What the worker said last may have it in a URL.
            text = str(error).replace(secret, "**") if secret else str(error)
            raise InputError("\n".join(printable(one, 500) for one in text.splitlines())) from error
    ran = {"broker": "embedded" if url == EMBEDDED else str(given.broker_again), **sent, "worker": judge.figures()}
    document = _document(given.app, files, began, ran, found, leaks)
    print(table(document))
    if given.out:
        _write(document, given.out)
        print(f"report: {(given.out / 'soak.html').resolve()}")
    return STATUS[document["verdict"]]


def soaking(given: argparse.Namespace) -> int:
    """The files, for a module that has no YAML. Raises InputError."""
    files = _read(given)
    print(json.dumps({"tasks": files.tasks, "budget": files.given, "day": files.day, "seconds": files.plan.seconds}))
    return PASSED


def soaked(given: argparse.Namespace) -> int:
    """What worker_soak returned, on standard input. Raises InputError where that is none."""
    files = _read(given)
    came = soakreport.sound(json.load(sys.stdin))
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="plimsoll-soaked-") as name:
        leaks = {task: leak(_distrusted(records, Path(name)), Path.cwd()) for task, records in came["records"].items()}
    ran = {"broker": given.broker, "host": given.host, **came["sent"], "worker": came["worker"]}
    began = time.time() - came["sent"]["seconds"]
    document = _document(given.app, files, began, ran, came["tasks"], leaks)
    _write(document, given.out)
    text = "\n".join([*(printable(note, 500) for note in came["notes"]), table(document)])
    said = {"verdict": document["verdict"], "text": text, "page": str((given.out / "soak.html").resolve())}
    print(json.dumps(said))
    return PASSED


def _distrusted(records: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Trace records of a host, by the reader that bounds and checks them."""
    path = folder / "trace" / f"{PROGRAM}-1.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return read_host("soak", folder).traces


def _document(
    app: str,
    files: Files,
    began: float,
    ran: Mapping[str, Any],
    found: Iterable[Mapping[str, Any]],
    leaks: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """soak.json. ran: what is only known of a soak that ran, and where."""
    plan, baseline = files.plan, files.baseline
    tasks = _told(found, leaks, baseline)
    return {
        "schema_version": SCHEMA_VERSION,
        "plimsoll": __version__,
        "generated": stamp(began),
        "app": app,
        "host": None,
        "pool": plan.pool,
        "concurrency": plan.concurrency,
        "arrival": plan.arrival,
        "limits": {"rate": plan.rate, "seconds": plan.seconds, "tasks": plan.most},
        "seed": plan.seed,
        "schedule_sha256": digest(files.lines),
        **ran,
        "baseline": baseline and {"generated": baseline["generated"], "app": baseline["app"]},
        "tasks": tasks,
        "verdict": whole(tasks, ran["worker"]),
    }


def _write(document: dict[str, Any], out: Path) -> None:
    write_whole(out / "soak.json", json.dumps(document, indent=1) + "\n")
    write_whole(out / "junit.xml", junit(document))
    write_whole(out / "soak.html", page(document))


def _told(
    found: Iterable[Mapping[str, Any]], leaks: Mapping[str, dict[str, Any]], baseline: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Tasks as soak.json has them, those that fail first."""
    before = {one["task"]: one for one in baseline["tasks"]} if baseline else {}
    told = []
    for one in found:
        leak = leaks.get(one["task"])
        task = {**one, "leak": leak, "against_baseline": compare(one, before.get(one["task"], {}))}
        if leak and leak["leak_class"] == Kind.CACHE_FILLING.value:
            task["verdict"], task["why"] = UNDECIDED, filling(leak)
        told.append(task)
    order = [FAIL, UNDECIDED, PASS]
    return sorted(told, key=lambda one: (order.index(one["verdict"]), -(one["growth_kb"] or 0.0), one["task"]))


def filling(leak: Mapping[str, Any]) -> str:
    """Why a task is not decided that fills a cache: what it did so far is growth, and what it will do is not."""
    cache = leak["cache"]
    return (
        f"it fills a cache that has a bound: {cache['name']}, of at most {cache['most']:,} entries; set warm of this"
        f" task to as many runs as fill it ({cache['most']:,} that add one each), or lower maxsize"
    )


# ---- what is given ----


class Files(NamedTuple):
    """What the files say. tasks and given are those of tasks and budget as they are."""

    tasks: Any
    given: Any
    plan: Plan
    day: Sequence[Recorded]
    budget: dict[str, float]
    baseline: dict[str, Any] | None
    lines: list[str]


def _read(given: argparse.Namespace) -> Files:
    """Raises InputError."""
    tasks, plan = _checked(given.tasks, plan_of)
    day = _recorded(given.tasks.parent / plan.arrival["file"]) if plan.arrival["pattern"] == "replay" else []
    names = list(plan.tasks)
    raw, budget = _checked(given.budget, lambda data: budget_of(data, names)) if given.budget else ({}, None)
    try:
        lines = [line(call) for call in schedule(plan, day)]
    except PlanError as error:
        raise InputError(f"{given.tasks}: {error}") from error
    baseline = _baseline(given.baseline) if given.baseline else None
    return Files(tasks, raw, plan, day, budget or budget_of({}, names), baseline, lines)


def _checked(path: Path, of: Callable[[object], _T]) -> tuple[Any, _T]:
    """What is in a file, and what that makes. Raises InputError."""
    try:
        data = yaml.safe_load(path.read_text())
        return data, of(data)
    except PlanError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error


def _recorded(path: Path) -> list[Recorded]:
    """A recorded day: CSV with time, task and count. Raises InputError."""
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        if not {"time", "task", "count"} <= set(rows.fieldnames or ()):
            raise InputError(f"{path}: the first line must name the columns time, task and count")
        try:
            return [Recorded(float(row["time"]), row["task"], int(float(row["count"]))) for row in rows]
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"{path}: line {rows.line_num}: {error}") from error


def _baseline(path: Path) -> dict[str, Any]:
    way_out = "give the soak.json that `plimsoll soak --out` wrote for the other release"
    try:
        document = json.loads(path.read_text())
        if document["schema_version"] != SCHEMA_VERSION:
            raise InputError(f"{path}: is of another version of plimsoll; make it again with this one")
        for one in document["tasks"]:
            for name in ("growth_kb", "error_kb"):
                if one[name] is not None:
                    one[name] = float(one[name])
            one["task"] = str(one["task"])
        return {name: document[name] for name in ("generated", "app", "tasks")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no baseline: {way_out}") from error


def broker_url(url: str | None, again: str | None, password: str) -> tuple[str, str]:
    """The broker's URL, and the password in it. Raises InputError unless a broker that is not ours is named twice."""
    if not url:
        if again:
            raise InputError("--broker-again: names a broker, and --broker does not")
        return EMBEDDED, ""
    parts = urlsplit(url)
    try:
        host = parts.hostname or ""
        place = f"{host}:{parts.port}" if parts.port else host
    except ValueError as error:
        raise InputError(f"--broker: {error}") from error
    if not parts.scheme or not host or ";" in url:
        raise InputError("--broker: must be one URL with a host, as redis://staging-broker:6379/0")
    if parts.password:
        raise InputError(
            f"--broker: everyone on this computer can read a command line: leave the password out, and put it into"
            f" {PASSWORD} in the environment"
        )
    if again != place:
        raise InputError(
            f"--broker: tasks are going to be run for real, with what they write to: if {place} is no broker of"
            f" production, say so by --broker-again {place}"
        )
    if password:
        user = f"{parts.username or ''}:{quote(password, safe='')}@"
        parts = parts._replace(netloc=user + parts.netloc.rpartition("@")[2])
    return urlunsplit(parts), password


def _python(given: str | None) -> str:
    active = os.environ.get("VIRTUAL_ENV")
    found = shutil.which(given or (f"{active}/bin/python" if active else "python3"))
    if found is None:
        raise InputError(
            f"--python: {given or active or 'python3'}: no such program: name the Python that the application runs in"
        )
    # Not resolved: a venv's python is a link, and what it is called is what makes it the venv's.
    return str(Path(found).absolute())


# ---- the worker and the sender ----


def _setting(folder: Path, app: str, plan: Plan, url: str) -> Setting:
    embedded = url == EMBEDDED
    # Options of a worker by the environment are those of another worker.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLIMSOLL_", "CELERY_WORKER_"))}
    path = [str(PROGRAMS), str(BOOTSTRAP), *filter(None, [kept.get("PYTHONPATH")])]
    # Celery takes these before the application's own, so that nothing is sent to its broker as it is imported.
    urls = dict.fromkeys(("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"), url)
    environ = {
        **kept,
        **urls,
        "CELERY_RESULT_BACKEND": str(plan.settings.get("result_backend", "disabled://")),
        "PYTHONPATH": os.pathsep.join(path),
    }
    if embedded:
        # In a container of CI everybody is root, and what is in the queue is ours.
        environ["C_FORCE_ROOT"] = "1"
    return Setting(folder, app, environ, embedded, "plimsoll-soak", os.getpid())


@dataclass(frozen=True)
class Here:
    """Starts both programs on this computer, each with a session of its own, in which all that they start is."""

    python: str

    def start(self, name: str, folder: Path, environ: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self.python, str(PROGRAMS / f"{PROGRAM}.py"), name, str(folder)],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def stop(self, name: str, process: subprocess.Popen[bytes]) -> None:
        process.terminate()

    def own(self, path: Path) -> None:
        """They run as whoever we are."""


def _say(text: str) -> None:
    if text:
        print(f"plimsoll: {printable(text, 500)}", file=sys.stderr, flush=True)


def leak(records: Sequence[dict[str, Any]], here: Path) -> dict[str, Any]:
    """What a tracing window tells of a task that fails; files as somebody in this folder names them."""
    kind = leak_class(records)
    caches = [one for record in records if record["kind"] == "growth" for one in record.get("caches", [])]
    below = f"{here}{os.sep}"
    return {
        "leak_class": kind.value,
        "culprits": [
            {
                **one,
                "file": one["file"] and one["file"].removeprefix(below),
                "caller": one["caller"] and one["caller"].removeprefix(below),
            }
            for one in culprits(records)
        ],
        "evidence": evidence(records),
        "advice": advice(kind),
        "cache": max(caches, key=lambda one: one["growth"], default=None),
    }
