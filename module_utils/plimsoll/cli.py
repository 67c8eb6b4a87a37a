"""The plimsoll command. `plimsoll analyse PATH...` judges samples without Ansible; other verbs are the playbooks'."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__, canaries, linode, proof, query, remedy, remedylog, report, scheduled, soakrun, sources
from .files import write_whole
from .findings import Before, Findings, changes, findings, stamp
from .formats import HostData, InputError, files_of, read_host
from .lines import STDIN, name_of
from .mends import Checked
from .remedylog import WORSE
from .series import Worker, workers_of
from .store import CURSORS, DAY, HOSTS, Host, ingest, read_hosts
from .store import read_host as read_stored

REPORT = "report.html"
DONE, BAD_INPUT, LEAKS, INTERRUPTED = 0, 2, 3, 130
# Of what could not be read, on a terminal.
MOST_NOTES = 5
# Between two words of how far it is, on a terminal, seconds.
PROGRESS_S = 3


def read(paths: Sequence[Path], loud: bool = True) -> Iterator[tuple[Host, HostData | None]]:
    """What is at each path: a store of collect.yml, directories of several hosts, one host's directory or file, or `-`.

    What cannot be read is noted with its host and, where loud and but for a store, on standard error. Raises InputError
    before anything is read where a path is not there, and in the end where there was no store and not one sample.
    """
    for path in paths:
        if path != STDIN and not path.exists():
            raise InputError(f"{path}: no such file or directory")
    judged, files = False, 0
    notes: list[str] = []
    for path in paths:
        if (path / HOSTS).exists():
            judged = True
            yield from _stored(path)
            continue
        for root in _roots(path):
            if sys.stderr.isatty():
                print(f"plimsoll: reading and judging {name_of(root)}", file=sys.stderr)
            data = read_host(_name(root), root)
            judged = judged or bool(data.samples)
            files += len(files_of(root))
            notes += data.problems
            yield {"host": data.host, "collected": True, "reason": "", "last": None}, data
    if not judged:
        why = notes[0] if notes else "the sampler writes them to /var/log/plimsoll/samples"
        raise InputError(f"{', '.join(map(name_of, paths))}: no samples in {files} file{'s' * (files != 1)}; {why}")
    if loud:
        _note(notes)


def _note(notes: Sequence[str]) -> None:
    more = [f"and {len(notes) - MOST_NOTES} more"] * (len(notes) > MOST_NOTES)
    for note in [*notes[:MOST_NOTES], *more]:
        print(f"plimsoll: note: {note}", file=sys.stderr)


def _stored(store: Path) -> Iterator[tuple[Host, HostData | None]]:
    """Each host of a store. One that was not collected this time is judged by what there is of it."""
    hosts = read_hosts(store)
    said = time.monotonic()
    for number, host in enumerate(hosts):
        if sys.stderr.isatty() and time.monotonic() > said + PROGRESS_S:
            said = time.monotonic()
            print(f"plimsoll: {number} of {len(hosts)} hosts are judged", file=sys.stderr)
        data = read_stored(store, host["host"])
        yield host, data if host["collected"] or data.samples or data.problems else None


def _roots(path: Path) -> list[Path]:
    """The directories below a path that are each a host's, or the path itself."""
    below = sorted(one for one in path.iterdir() if one.is_dir()) if path.is_dir() else []
    several = [one for one in below if (one / "samples").is_dir()]
    return several if several and not (path / "samples").is_dir() else [path]


def _name(root: Path) -> str:
    """What a host is called by where its samples lie."""
    if root == STDIN:
        return "stdin"
    return root.resolve().name if root.is_dir() else root.name.split(".")[0]


def analyse(given: argparse.Namespace) -> int:
    document = judge(given.paths, given.format, given.out, sources.checked(given.source) if given.source else [])
    return LEAKS if given.fail_on == "leaking" and document["fleet"]["leaking"] else DONE


def judge(
    paths: Sequence[Path], form: str, out: Path | None, checked: Sequence[Checked] = (), quiet: bool = False
) -> Findings:
    """The findings of what is at the paths, said as text, json or html, and left in out with the report.

    checked: what the static checks say of the application's source, beside what a store keeps of that.
    """
    before = _before(out / "findings.json") if out else None
    every = [*checked, *(one for path in paths if path != STDIN for one in sources.kept(path))]
    # The table has the notes in it.
    document, verdicts = findings(read(paths, form != "text"), time.time(), before, _remedies(paths), every)
    page = report.html(document, verdicts) if form == "html" or out else ""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "findings.json", _json(document))
        # Last, as it says until when they stand.
        write_whole(out / REPORT, page)
    shown = {
        "text": lambda: report.text(document, verdicts),
        "json": lambda: _json(document).rstrip(),
        "html": lambda: page,
    }
    if quiet:
        return document
    _say(shown[form]())
    if out and form == "text":
        _say(f"report: {(out / REPORT).resolve()}")
    return document


def _remedies(paths: Sequence[Path]) -> dict[tuple[str, str], remedylog.Remedy]:
    """What the logs of remediation in these stores say of each worker."""
    found = {}
    for path in paths:
        if path != STDIN and (path / HOSTS).exists():
            for name, one in remedylog.known(remedylog.read_log(path)).items():
                if told := remedylog.remedy(one):
                    found[name] = told
    return found


def stand(store: Path, out: Path) -> bool:
    """Whether the findings in out stand, as nothing that they were made of has changed; they are said and dated anew.

    By times of modification, as make goes: the page is newer than what the store has of every host and than the code,
    and of this day, as a day that is over may take what is too old with it; and as many hosts were reached as then.
    """
    made = [*(store / CURSORS).glob("*.json"), *store.glob(remedylog.LOG), *store.glob(sources.CHECKS)]
    made += Path(__file__).parent.glob("*.*")
    try:
        judged = (out / REPORT).stat().st_mtime
        if judged // DAY != time.time() // DAY or judged <= max(one.stat().st_mtime for one in made):
            return False
        document = canaries.read_findings(out / "findings.json")
    except (FileNotFoundError, InputError):
        return False
    hosts, known = read_hosts(store), {one["host"]: one for one in document["hosts"]}
    if [(one["host"], one["collected"]) for one in hosts] != [(name, one["collected"]) for name, one in known.items()]:
        return False
    # Of one that was collected, what was noted when it was read.
    document["hosts"] = [{**one, "reason": known[one["host"]]["reason"]} if one["collected"] else one for one in hosts]
    document["changes"] = changes(Before.of(document), document["workers"])
    document["generated"] = stamp(time.time())
    try:
        text = report.text(document, None)
    except (KeyError, TypeError):
        # Somebody has changed it, in what read_findings() does not look at: it is made anew.
        return False
    write_whole(out / "findings.json", _json(document))
    _say(text)
    _say(f"nothing new has come; the report of {stamp(judged)} stands: {(out / REPORT).resolve()}")
    return True


def _before(path: Path) -> Before | None:
    """What the last findings said. Without them, all goes on as if these were the first ones."""
    try:
        return Before.of(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"plimsoll: note: {path} is no findings.json, so nothing is said of changes: {error}", file=sys.stderr)
        return None


def _say(text: str) -> None:
    _say_all([text])


def _say_all(texts: Iterable[str]) -> None:
    """Print them. A reader that has seen enough, as head has, is no error."""
    try:
        for text in texts:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left of it would be tried again, and complained of, at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json(document: Findings) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _asked() -> Any:
    try:
        return json.load(sys.stdin)
    except ValueError as error:
        raise InputError(f"standard input: {error}") from None


def _asked_of(**sound: Callable[[object], bool]) -> dict[str, Any]:
    """An object that has each of these names, with what is sound there. Raises InputError."""
    asked = _asked()
    for name, is_sound in sound.items():
        if not isinstance(asked, dict) or not is_sound(asked.get(name)):
            raise InputError(
                f"standard input: needs an object with {', '.join(sound)}, and {name} is not what it has to be"
            )
    return dict(asked)


def _object(one: object) -> bool:
    return isinstance(one, dict)


def _declared(one: object) -> bool:
    """Of each host its celery_worker_instances, or null."""
    return isinstance(one, dict) and all(
        each is None or (isinstance(each, list) and all(isinstance(it, dict) and "name" in it for it in each))
        for each in one.values()
    )


def _acts(one: object) -> bool:
    return isinstance(one, list) and all(
        isinstance(act, dict)
        and all(isinstance(act.get(name), str) for name in ("id", "host", "unit", "act", "reason"))
        and isinstance(act.get("settings"), list)
        and isinstance(act.get("prove_s"), (int, float))
        for act in one
    )


def take_in(given: argparse.Namespace) -> int:
    asked = _asked()
    if not isinstance(asked, dict) or not _askable(asked.get("fleet"), asked.get("hosts")):
        raise InputError(
            "standard input: needs an object with fleet, a list of names, and hosts, a list of objects with host, each"
            " one of the fleet, and sha256, reason or same"
        )
    bounds = {"max_bytes": given.max_bytes, "keep_days": given.keep_days, "keep_rollups_days": given.keep_rollups_days}
    _, notes = ingest(given.inbox, given.store, asked["fleet"], asked["hosts"], **bounds, now=time.time())
    _note(notes)
    if given.source:
        _note(sources.keep(given.source, given.store))
    # In the same process: a second one would take as long to start as ten hosts take to judge.
    if not stand(given.store, given.out):
        judge([given.store], "text", given.out)
    return DONE


def _askable(fleet: object, hosts: object) -> bool:
    """Whether these are names, and which of them were asked, each once, and what came of it."""
    if not isinstance(fleet, list) or not isinstance(hosts, list):
        return False
    if not all(isinstance(name, str) and name for name in fleet) or not all(isinstance(one, dict) for one in hosts):
        return False
    asked = [one.get("host") for one in hosts]
    return (
        all(name in fleet and asked.count(name) == 1 for name in asked)
        and all(isinstance(one.get(name, ""), str) for one in hosts for name in ("sha256", "reason"))
        and all(one.get("sha256") or one.get("reason") or one.get("same") for one in hosts)
    )


def choose(given: argparse.Namespace) -> int:
    document = canaries.read_findings(given.findings)
    limits = {"window_s": given.window_s, "max_age_h": given.max_age_h, "again": given.all}
    _say(json.dumps(canaries.plan(document, _asked(), **limits, now=time.time())))
    return DONE


def tell(given: argparse.Namespace) -> int:
    asked = _asked()
    _say(json.dumps(canaries.result(asked["plan"], asked["came"], canaries.read_findings(given.findings))))
    return DONE


def ask(given: argparse.Namespace) -> int:
    sql = sys.stdin.read() if given.sql == "-" else given.sql
    try:
        _say_all(query.answer(given.store, sql, given.format))
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def remedies(given: argparse.Namespace) -> int:
    """Prove what was done before, and plan; with --check nothing is noted."""
    asked, now = _asked_of(declared=_declared, states=_object, policy=_object, places=_object), time.time()
    policy = remedy.policy_of(asked["policy"])
    if not given.check:
        remedylog.take_lock(given.store)
    log = remedylog.read_log(given.store)
    states = remedy.sound_states(asked["states"])
    found = remedy.recovered(remedylog.known(log), states, now)
    proved, said = list[remedylog.Entry](), list[str]()
    had = remedylog.known([*log, *found])
    if given.absent:
        made = remedy.removal(asked["declared"], states, had, policy)
    else:
        document = canaries.read_findings(given.findings)
        proved, said = _proofs(given.store, [*log, *found], now)
        had = remedylog.known([*log, *found, *proved])
        # Those too of a run that was ended before it had taken them back.
        worse = [name for name, one in had.items() if one.act and one.stands and one.stands.get("verdict") == WORSE]
        made = remedy.plan(
            document,
            asked["declared"],
            states,
            had,
            policy,
            now=now,
            worse=worse,
            traced=remedylog.traced(log),
            sold=_sold(asked["places"]),
        )
    if not given.check:
        remedylog.append(given.store, [*found, *proved])
    due = [now + act["prove_s"] for act in made["acts"] if act["act"] not in (remedy.REMOVE, remedylog.CORDON)]
    due += _due(had)
    _say(json.dumps({**made, "text": "\n".join([*said, *made["say"]]), "due": min(due, default=None)}))
    return DONE


def _due(had: Mapping[tuple[str, str], remedylog.Known]) -> list[float]:
    """When each act that waits for its proof may be proven, in Unix seconds."""
    return [one.act["time"] + one.act.get("prove_s", 0.0) for one in had.values() if one.open and one.act]


def _sold(places: Mapping[str, Any]) -> Callable[[str, float], str]:
    """remedy.larger() for hosts with a Linode type and region. What is sold is asked for when it is first needed."""

    @functools.cache
    def types() -> dict[str, dict[str, Any]]:
        token, url, version = (os.environ.get(f"LINODE_API_{name}", "") for name in ("TOKEN", "URL", "VERSION"))
        given = {"api_token": token, "api_url": url, "api_version": version, "request_timeout": 10}
        return linode.Catalogue(linode.connect(given, linode.Deadline(30))).of("type")

    def sold(host: str, more_kb: float) -> str:
        place = places.get(host)
        if not isinstance(place, dict) or not place.get("type"):
            return ""
        try:
            return remedy.larger(types(), str(place["type"]), str(place.get("region", "")), more_kb)
        except linode.LinodeError as error:
            return f" (which one, and what it costs, is not known: {error})"

    return sold


def _proofs(store: Path, log: Sequence[remedylog.Entry], now: float) -> tuple[list[remedylog.Entry], list[str]]:
    """What of the acts that wait for a proof can be told by what the store has; and what is to be said of each."""
    waiting = {name: one.act for name, one in remedylog.known(log).items() if one.open and one.act is not None}
    workers: dict[tuple[str, str], Worker] = {}
    guarded: dict[tuple[str, str], float] = {}
    for host in sorted({host for host, _ in waiting}):
        data = read_stored(store, host)
        workers |= {(one.host, one.unit): one for one in workers_of(data)}
        for incident in (one for one in data.incidents if one.source == "guard" and one.message.startswith("restart")):
            name = host, incident.unit
            guarded[name] = max(guarded.get(name, 0.0), incident.time)
    proved, said = [], []
    for name, act in waiting.items():
        entry, line = proof.settled(act, workers.get(name), now, guarded.get(name, 0.0))
        proved += [entry] if entry else []
        said.append(line)
    return proved, said


def note_remedies(given: argparse.Namespace) -> int:
    """What is begun on one host, or what came of it; or what came of the traces on all of them."""
    asked, now = _asked_of(acts=_acts, came=_object), time.time()
    if given.begun:
        entries, said = remedy.planned(asked["acts"], now), list[str]()
    elif given.traced:
        entries, said = remedy.windows(asked["acts"], asked["came"], now)
    else:
        entries, said = remedy.outcomes(asked["acts"], asked["came"], now)
    remedylog.append(given.store, entries)
    _say_all(said)
    return DONE


def prove(given: argparse.Namespace) -> int:
    """Prove what can be, put it into the findings, and plan what is to be taken back."""
    asked, now = _asked_of(declared=_declared, policy=_object), time.time()
    policy = remedy.policy_of(asked["policy"])
    log = remedylog.read_log(given.store)
    proved, said = _proofs(given.store, log, now)
    remedylog.append(given.store, proved)
    worse = {(one["host"], one["unit"]) for one in proved if one["verdict"] == remedylog.WORSE and one.get("settings")}
    back = remedy.taken_back(asked["declared"], worse, policy)
    due = min(_due(remedylog.known([*log, *proved])), default=None)
    if proved:
        # So that the report says it too.
        judge([given.store], "text", given.findings.parent, quiet=True)
        said.append(f"report: {(given.findings.parent / REPORT).resolve()}")
    _say(json.dumps({"text": "\n".join(said), "due": due, "back": back}))
    return DONE


def on_schedule(given: argparse.Namespace) -> int:
    return scheduled.main(given.config, given.failed)


def dashboard(given: argparse.Namespace) -> int:
    # What it is made with takes a while to be imported, and no other verb needs it.
    from .dashboard import text

    _say(text().rstrip("\n"))
    return DONE


def _days(text: str) -> int:
    """Of 0 days, nothing would be left."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of days from 1 on")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="plimsoll", description="Says which Celery worker leaks, how fast, and where.")
    top.add_argument("--version", action="version", version=f"plimsoll {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser(
        "analyse",
        help="judge the workers in samples and trace records",
        epilog="Exit status: 0 done, 2 bad usage or unreadable input, 3 with --fail-on when a worker leaks.",
    )
    what = "store of collect.yml, directory, file of samples, or - for standard input"
    one.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=what)
    one.add_argument("--format", choices=["text", "json", "html"], default="text", help="of standard output: text")
    one.add_argument("--out", type=Path, metavar="DIR", help="write findings.json and report.html there")
    source = "the application's: what plimsoll.lint says there of a line that leaks is told with it"
    one.add_argument("--source", type=Path, metavar="DIR", help=source)
    one.add_argument("--fail-on", choices=["leaking"], help="exit with 3 when a worker leaks")
    one.set_defaults(run=analyse)
    two = verbs.add_parser("ingest", help="take collected bundles into the store, and judge (collect.yml does)")
    two.add_argument("--inbox", type=Path, required=True)
    two.add_argument("--store", type=Path, required=True)
    two.add_argument("--max-bytes", type=int, required=True, help="of the logs in one bundle")
    two.add_argument("--keep-days", type=_days, required=True, help="of samples, figures and trace records")
    two.add_argument("--keep-rollups-days", type=_days, required=True, help="of rollups, events and units")
    two.add_argument("--out", type=Path, required=True, metavar="DIR", help="write findings.json and report.html there")
    two.add_argument("--source", type=Path, metavar="DIR", help=source)
    two.set_defaults(run=take_in)
    three = verbs.add_parser("canaries", help="say which workers to trace (diagnose.yml does)")
    three.add_argument("findings", type=Path, metavar="FINDINGS.JSON")
    three.add_argument("--window-s", type=int, required=True)
    three.add_argument("--max-age-h", type=float, required=True, help="of the findings")
    three.add_argument("--all", action="store_true", help="those too whose line is known")
    three.set_defaults(run=choose)
    four = verbs.add_parser("diagnosed", help="say what their windows showed (diagnose.yml does)")
    four.add_argument("findings", type=Path, metavar="FINDINGS.JSON")
    four.set_defaults(run=tell)
    five = verbs.add_parser(
        "scheduled",
        help="collect with nobody watching, and tell what is new (the timer of schedule.yml does)",
        epilog="Exit status: 0 done, 1 something failed, 2 bad configuration, 75 another run is under way.",
    )
    five.add_argument("--config", type=Path, required=True, metavar="SCHEDULE.JSON")
    five.add_argument("--failed", action="store_true", help="collect nothing; tell that the last run failed")
    five.set_defaults(run=on_schedule)
    six = verbs.add_parser(
        "query",
        help="answer SQL from the store of collect.yml",
        epilog="Tables: samples, rollups, cgroups, traces, events, units, hosts. See docs/store.md.",
    )
    six.add_argument("store", metavar="STORE", help="the directory, or s3://BUCKET/PREFIX by AWS_* of the environment")
    six.add_argument("sql", metavar="SQL", help="one SELECT, or - for standard input")
    six.add_argument("--format", choices=["table", "csv", "json"], default="table", help="of standard output: table")
    six.set_defaults(run=ask)
    seven = verbs.add_parser("remedies", help="prove what was done before, and plan (remediate.yml does)")
    seven.add_argument("store", type=Path, metavar="STORE")
    seven.add_argument("findings", type=Path, metavar="FINDINGS.JSON")
    seven.add_argument("--check", action="store_true", help="note nothing, and let other runs be")
    seven.add_argument("--absent", action="store_true", help="plan to take all of it away")
    seven.set_defaults(run=remedies)
    eight = verbs.add_parser("remedied", help="note what was done on a host (remediate.yml does)")
    eight.add_argument("store", type=Path, metavar="STORE")
    which = eight.add_mutually_exclusive_group()
    which.add_argument("--begun", action="store_true", help="note that it is begun")
    which.add_argument("--traced", action="store_true", help="note what came of the traces on all hosts")
    eight.set_defaults(run=note_remedies)
    nine = verbs.add_parser("prove", help="say which acts have helped (remediate.yml does)")
    nine.add_argument("store", type=Path, metavar="STORE")
    nine.add_argument("findings", type=Path, metavar="FINDINGS.JSON")
    nine.set_defaults(run=prove)
    ten = verbs.add_parser("dashboard", help="print the dashboard for Grafana, as JSON")
    ten.set_defaults(run=dashboard)
    soakrun.add_parser(verbs)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A task's name may hold what a terminal's character set does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(given.run(given))
    except InputError as error:
        print(f"plimsoll: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"plimsoll: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
