"""A collection that nobody watches: `plimsoll scheduled` runs collect.yml once, and tells what is new and what failed.

systemd's timer calls it (role schedule), or cron. state.json has what was told, by channel: what could not be sent goes
out with the next run, and nothing is told twice. What comes from hosts, their names included, is not trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import pwd
import re
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jinja2

from .canaries import read_findings
from .detect import Pattern
from .diagnose import short
from .files import write_whole
from .findings import Finding, Findings, Fleet
from .formats import InputError, printable
from .remedylog import CONTAINED, REMEDIED
from .report import blame, forecast, growth
from .store import Host

# The checkout that this file is in, and the ansible-playbook beside the Python that runs it: those of one release, also
# while another one becomes the current one.
PROJECT = Path(__file__).resolve().parents[2]
PLAYBOOK = Path(sys.prefix).resolve() / "bin" / "ansible-playbook"
# Exit status where another run is under way, as of sysexits.h.
HELD = 75
# How a run ended. untold: it was well, and what is new could not be sent.
RESULTS = "ok", "failed", "deadline", "no_findings", "cut_off", "not_started", "untold"
OK, FAILED, DEADLINE, NO_FINDINGS, CUT_OFF, NOT_STARTED, UNTOLD = RESULTS
# Seconds: for ansible-playbook to end by itself at the deadline; for an answer; and between two tries of a webhook.
GRACE_S, TIMEOUT_S, PAUSES_S = 10, 15, (2, 10)
_LOOPBACK = r"http://(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d+)?(/[!-~]*)?"
_URL = re.compile(rf"https://[!-~]+|{_LOOPBACK}")
_ADDRESS = re.compile(r"[^\s@,;<>]+@[^\s@,;<>]+")


# ---- what is new ----


class Outcome(NamedTuple):
    """How a run ended: one of RESULTS, and why, in a line, unless it is ok."""

    result: str
    why: str = ""


GOOD = Outcome(OK)


@dataclass(frozen=True)
class Told:
    """What one channel was told, and was not taken back since.

    leaking: workers (host, unit) that leak, with whether a line was named; silent: hosts that are not collected;
    failing: the result that was told as a failure, empty for none.
    """

    leaking: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    failing: str = ""

    def plain(self) -> dict[str, Any]:
        leaking = sorted([host, unit, named] for (host, unit), named in self.leaking.items())
        return {"leaking": leaking, "silent": sorted(self.silent), "failing": self.failing}

    @classmethod
    def of(cls, plain: Any) -> Told:
        """Raises KeyError, TypeError or ValueError where it is none."""
        leaking = {(str(host), str(unit)): bool(named) for host, unit, named in plain["leaking"]}
        return cls(leaking, frozenset(map(str, plain["silent"])), str(plain["failing"]))


@dataclass(frozen=True)
class News:
    """What a channel is to be told. Every text in it is printable and bounded; fleet is None where nothing was judged.

    failure: why collecting fails; works: it did, and does not any more; leaking, named, mended: workers that leak and
    did not, whose line is known now, that leaked and do not; silent, back: hosts that are not collected, and are again.
    """

    failure: str = ""
    works: bool = False
    leaking: Sequence[Finding] = ()
    named: Sequence[Finding] = ()
    mended: Sequence[Finding] = ()
    silent: Sequence[Host] = ()
    back: Sequence[Host] = ()
    fleet: Fleet | None = None

    @property
    def headline(self) -> str:
        """In a line; empty where there is nothing to tell."""
        counts = (
            (self.leaking, "new leak", "new leaks"),
            (self.named, "line named", "lines named"),
            (self.mended, "leak mended", "leaks mended"),
            (self.silent, "host not collected", "hosts not collected"),
            (self.back, "host collected again", "hosts collected again"),
        )
        said = ["collecting fails"] * bool(self.failure) + ["collecting works again"] * self.works
        said += [f"{len(which)} {one if len(which) == 1 else more}" for which, one, more in counts if which]
        return ", ".join(said)


def news(document: Findings | None, outcome: Outcome, told: Told) -> tuple[News, Told]:
    """What is new to a channel, and what it will have been told then. document is None where nothing was judged.

    Of a host that was not collected, nothing is taken back: what is told of it once, is not told again when it answers.
    """
    failing = "" if outcome.result == OK else outcome.result
    failure = printable(outcome.why, 500) if failing and failing != told.failing else ""
    works = bool(told.failing) and not failing
    if document is None:
        return News(failure, works), Told(told.leaking, told.silent, failing)
    hosts = {one["host"]: one for one in document["hosts"]}
    collected = {name for name, one in hosts.items() if one["collected"]}
    seen = {(one["host"], one["unit"]): one for one in document["workers"]}
    leaking, named, mended = [], [], []
    kept: dict[tuple[str, str], bool] = {}
    for name, one in seen.items():
        line = any(culprit["file"] for culprit in one["culprits"])
        before = told.leaking.get(name)
        if one["leaking"]:
            if before is None:
                leaking.append(one)
            elif line and not before:
                named.append(one)
            kept[name] = line or bool(before)
        elif before is not None:
            # Of what was seen for too short a time, nothing is said.
            if one["pattern"] == Pattern.INSUFFICIENT_DATA.value or one["host"] not in collected:
                kept[name] = before
            else:
                mended.append(one)
    # What is not seen any more is over, but where its host was not seen at all.
    kept |= {name: line for name, line in told.leaking.items() if name not in seen and _away(name[0], hosts)}
    silent = [one for name, one in hosts.items() if name not in collected | told.silent]
    back = [hosts[name] for name in sorted(told.silent & collected)]
    found = {"leaking": leaking, "named": named, "mended": mended, "silent": silent, "back": back}
    new = News(failure, works, **_clean(found), fleet=_clean(document["fleet"]))
    return new, Told(kept, frozenset(hosts) - collected, failing)


def _away(host: str, hosts: Mapping[str, Host]) -> bool:
    return host in hosts and not hosts[host]["collected"]


def _clean(value: Any) -> Any:
    """The same data, each text in it printable and bounded."""
    if isinstance(value, str):
        return printable(value, 300)
    if isinstance(value, list):
        return [_clean(one) for one in value]
    return {key: _clean(one) for key, one in value.items()} if isinstance(value, dict) else value


# ---- configuration and state ----


class Mail(NamedTuple):
    """Where mail goes, and by which template. Without a user there is no login."""

    host: str
    port: int
    starttls: bool
    user: str
    sender: str
    to: Sequence[str]
    template: Path


class Config(NamedTuple):
    """A schedule.json; see read_config(). webhook is its template, None for no webhook."""

    inventory: Path
    state: Path
    deadline_s: float
    variables: dict[str, Any]
    environment: dict[str, str]
    webhook: Path | None
    mail: Mail | None

    @property
    def findings(self) -> Path:
        return self.state / "report" / "findings.json"


# Of each key its type, and the default, None for none.
_KEYS: dict[str, tuple[Any, Any]] = {
    "inventory": (str, None),
    "state": (str, None),
    "deadline_s": ((int, float), 3000),
    "variables": (dict, {}),
    "environment": (dict, {}),
    "webhook": (dict, {}),
    "mail": (dict, {}),
}
_WEBHOOK: dict[str, tuple[Any, Any]] = {"template": (str, str(PROJECT / "templates/schedule/webhook.json.j2"))}
_MAIL: dict[str, tuple[Any, Any]] = {
    "host": (str, "localhost"),
    "port": (int, 25),
    "starttls": (bool, True),
    "user": (str, ""),
    "from": (str, None),
    "to": (list, None),
    "template": (str, str(PROJECT / "templates/schedule/mail.txt.j2")),
}


def read_config(path: Path) -> Config:
    """docs/scheduling.md has its keys; paths in it are relative to it. Raises InputError, which names file and key."""
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    taken = _take(given, str(path), _KEYS)
    webhook = _take(taken["webhook"], f"{path}: webhook", _WEBHOOK) if "webhook" in given else None
    mail = _take(taken["mail"], f"{path}: mail", _MAIL) if "mail" in given else None
    if not taken["deadline_s"] > 0:
        raise InputError(f"{path}: deadline_s is to be above 0: seconds that a run may take")
    if not all(isinstance(value, str) for value in taken["environment"].values()):
        raise InputError(f"{path}: environment is to hold texts alone")
    if mail and not (mail["to"] and all(_ADDRESS.fullmatch(str(one)) for one in (mail["from"], *mail["to"]))):
        raise InputError(f"{path}: mail: from and to are to be addresses, as in ops@example.com")
    if mail and mail["user"] and not mail["starttls"]:
        raise InputError(f"{path}: mail: without starttls the password would go in the clear; leave out user")

    def at(name: str) -> Path:
        return path.absolute().parent / Path(name).expanduser()

    return Config(
        at(taken["inventory"]),
        at(taken["state"]),
        taken["deadline_s"],
        taken["variables"],
        taken["environment"],
        at(webhook["template"]) if webhook else None,
        Mail(sender=mail.pop("from"), template=at(mail.pop("template")), **mail) if mail else None,
    )


def _take(given: Any, where: str, keys: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InputError(f"{where}: is to be an object of JSON")
    if unknown := sorted(set(given) - set(keys)):
        raise InputError(f"{where}: there is no {', '.join(unknown)}; there are {', '.join(keys)}")
    taken = {}
    for key, (kind, default) in keys.items():
        taken[key] = given.get(key, default)
        if taken[key] is None:
            raise InputError(f"{where}: needs {key}")
        if not isinstance(taken[key], kind) or (kind is not bool and isinstance(taken[key], bool)):
            raise InputError(f"{where}: {key} is {json.dumps(taken[key])}, which is of the wrong type")
    return taken


def credential(name: str) -> str:
    """A secret, by systemd's LoadCredential= or in a directory of the user's own. Empty where it is not there."""
    try:
        return _credential_path(name).read_text().strip()
    except FileNotFoundError:
        return ""


def _credential_path(name: str) -> Path:
    # Where it is not set, a path that is not there, and says why in what is told of it.
    return Path(os.environ.get("CREDENTIALS_DIRECTORY", "$CREDENTIALS_DIRECTORY"), name)


@dataclass
class State:
    """What is kept from one run to the next. began, ended: of the last run, Unix seconds; ended None while it runs.

    succeeded: when a run last ended well; fleet: of the last findings, with missing, the hosts that were not collected,
    and leaks, the workers that leak and are not contained; told: by channel; unsent: by channel, how many messages
    could not be sent.
    """

    began: float | None = None
    ended: float | None = None
    outcome: Outcome = GOOD
    succeeded: float | None = None
    fleet: Fleet | None = None
    told: dict[str, Told] = field(default_factory=dict)
    unsent: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    leaks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cut_off(self) -> bool:
        """Whether the last run did not come to its end. For who holds the lock."""
        return self.began is not None and self.ended is None

    @classmethod
    def load(cls, path: Path) -> State:
        try:
            plain = json.loads(path.read_text())
            told = {str(name): Told.of(one) for name, one in plain.pop("told").items()}
            return cls(**{**plain, "outcome": Outcome(*plain["outcome"]), "told": told})
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # It is written whole: somebody has edited it. Better to tell all of it once more than nothing any more.
            print(f"plimsoll: note: {path} is no state of plimsoll, so all is told anew: {error}", file=sys.stderr)
            return cls()

    def save(self, path: Path) -> None:
        plain = {**asdict(self), "outcome": list(self.outcome)}
        plain["told"] = {name: one.plain() for name, one in self.told.items()}
        write_whole(path, json.dumps(plain, indent=1) + "\n", 0o600)


def metrics(state: State) -> str:
    """The state as OpenMetrics; with gauges and counters alone, which node_exporter's textfile collector reads too."""
    fleet: Mapping[str, Any] = state.fleet or {}
    took = None if state.began is None or state.ended is None else state.ended - state.began
    gauges = (
        ("last_run_timestamp_seconds", "When the last run ended.", state.ended),
        ("last_success_timestamp_seconds", "When a run last ended well.", state.succeeded),
        ("duration_seconds", "What the last run took.", took),
        ("hosts", "Hosts of the fleet.", fleet.get("hosts")),
        ("hosts_collected", "Hosts that were collected.", fleet.get("collected")),
        ("workers", "Workers that were judged.", fleet.get("workers")),
        ("leaking", "Workers that leak.", fleet.get("leaking")),
    )
    lines = []
    for name, about, value in gauges:
        if value is not None:
            full = f"plimsoll_collect_{name}"
            lines += [f"# TYPE {full} gauge", f"# HELP {full} {about}", f"{full} {value}"]
    name = "plimsoll_collect_result"
    lines += [f"# TYPE {name} gauge", f"# HELP {name} 1 for how the last run ended."]
    lines += [f'{name}{{result="{one}"}} {int(one == state.outcome.result)}' for one in RESULTS]
    if state.missing:
        name = "plimsoll_collect_host_missing"
        lines += [f"# TYPE {name} gauge", f"# HELP {name} 1 for each host that was not collected."]
        lines += [f'{name}{{host="{_escaped(host)}"}} 1' for host in state.missing]
    lines += _leaks(state.leaks)
    if state.unsent:
        name = "plimsoll_collect_notifications_failed"
        lines += [f"# TYPE {name} counter", f"# HELP {name} Notifications that could not be sent."]
        lines += [f'{name}_total{{channel="{channel}"}} {count}' for channel, count in sorted(state.unsent.items())]
    return "\n".join([*lines, "# EOF", ""])


LEAKS = (
    ("growth_bytes_per_hour", "How a worker grows that leaks and is not contained."),
    ("memory_high_hours", "Hours until it meets MemoryHigh."),
    ("info", "1; the task and the line that grow most, as far as they are known."),
)


def _leaks(leaks: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, about in LEAKS if leaks else ():
        full = f"plimsoll_collect_leak_{name}"
        lines += [f"# TYPE {full} gauge", f"# HELP {full} {about}"]
        for one in leaks:
            named = ("host", "unit", "leak_class", *(("task", "line") if name == "info" else ()))
            labels = ",".join(f'{label}="{_escaped(one[label])}"' for label in named)
            if one[name] is not None:
                lines.append(f"{full}{{{labels}}} {one[name]}")
    return lines


def leaks_of(document: Findings) -> list[dict[str, Any]]:
    """For the metrics: the workers that leak, but for those that a remedy was proven to contain."""
    found = []
    for one in document["workers"]:
        # Findings of before there were remedies have none.
        remedy = one.get("remedy")
        if not one["leaking"] or (remedy is not None and remedy["state"] in (CONTAINED, REMEDIED)):
            continue
        culprit = next((culprit for culprit in one["culprits"] if culprit["task"] or culprit["file"]), None)
        file = culprit["file"] if culprit else None
        found.append(
            {
                "host": printable(one["host"], 200),
                "unit": printable(one["unit"], 200),
                "leak_class": printable(one["leak_class"], 40),
                "task": printable(culprit["task"] or "", 200) if culprit else "",
                "line": printable(f"{short(file)}:{culprit['line']}", 300) if culprit and file else "",
                "growth_bytes_per_hour": one["growth_kb_per_hour"] * 1024,
                "memory_high_hours": one["hours_to_memory_high"],
                "info": 1,
            }
        )
    return found


def _escaped(text: str) -> str:
    """As the value of a label."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


# ---- telling ----


class NotSent(Exception):
    """A notification could not be sent; the message is a line with no secret in it."""


class Channel(NamedTuple):
    """A way to tell: what is rendered from template goes through send, which raises NotSent."""

    name: str
    template: Path
    send: Callable[[str], None]


def channels(config: Config) -> list[Channel]:
    """Those that are configured. Raises InputError where a credential of one is missing or cannot be right."""
    found = []
    if config.webhook:
        url = credential("webhook_url")
        if not _sound(url):
            # What it is, is not said: it is a secret.
            raise InputError(f"{_credential_path('webhook_url')}: is to hold one URL with https://")
        found.append(Channel("webhook", config.webhook, lambda text: post(url, text, TIMEOUT_S, PAUSES_S)))
    if config.mail:
        mail, password = config.mail, credential("smtp_password")
        if mail.user and not password:
            raise InputError(f"{_credential_path('smtp_password')}: is to hold the password of {mail.user}")
        found.append(Channel("mail", mail.template, lambda text: send_mail(mail, password, text, TIMEOUT_S)))
    return found


def _sound(url: str) -> bool:
    """Whether it is a URL to which a secret may go: encrypted, or on this machine."""
    try:
        return bool(_URL.fullmatch(url)) and urllib.parse.urlsplit(url).port != 0
    except ValueError:
        # A port that is no number, or half a bracket.
        return False


def tell(channels: Sequence[Channel], state: State, document: Findings | None, report: str) -> list[str]:
    """Tell each channel what is new to it, and note in state what it was told. Why some could not, a line each.

    report is where a reader finds it, as in HOST:PATH.
    """
    failed = []
    for one in channels:
        new, told = news(document, state.outcome, state.told.get(one.name, Told()))
        state.unsent.setdefault(one.name, 0)
        if new.headline:
            try:
                one.send(render(one.template, new, report))
            except NotSent as error:
                state.unsent[one.name] += 1
                failed.append(f"{one.name}: not sent: {printable(error, 300)}")
                continue
            print(f"plimsoll: told by {one.name}: {new.headline}", flush=True)
        state.told[one.name] = told
    return failed


def render(template: Path, new: News, report: str) -> str:
    """A notification. Templates know news, report, and the filters growth, forecast, blame and code. Raises NotSent."""
    # A chat's JSON and a mail's plain text: escaped as HTML they would show entities. What a host said goes through
    # code(), post() sends nothing that is no JSON, and the template is a file of the administrator's.
    made = jinja2.Environment(  # noqa: S701 - no browser reads it
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"growth": growth, "forecast": forecast, "blame": blame, "code": code}
    try:
        return made.get_template(template.name).render(news=new, report=report)
    # A template of the user's own may raise anything. It is a notification that is not sent: the run fails by it, names
    # the template and the error, and the next run tries again.
    except Exception as error:  # noqa: BLE001 - raised again as NotSent
        raise NotSent(f"{template}: {type(error).__name__}: {error}") from None


def code(text: Any) -> str:
    """A text from a host for a chat: as code, in which it mentions nobody and links nowhere."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"`{escaped.replace('`', chr(39))}`"


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the text would go where nobody sent it."""

    def redirect_request(self, *given: Any) -> None:
        return None


def post(url: str, text: str, timeout: float, pauses: Sequence[float]) -> None:
    """POST a body of JSON; once more after each pause where the other side is not up to it. Raises NotSent."""
    try:
        json.loads(text)
    except ValueError as error:
        raise NotSent(f"the template makes no JSON: {error}") from None
    opener = urllib.request.build_opener(_Stay)
    headers = {"Content-Type": "application/json", "User-Agent": "plimsoll"}
    # channels() has refused any URL but https://, and http:// of the loopback, before anything was collected.
    request = urllib.request.Request(url, text.encode(), headers)  # noqa: S310 - no file: and no other scheme
    for pause in (*pauses, None):
        try:
            opener.open(request, timeout=timeout).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            kept = "; redirects are not followed" if 300 <= error.code < 400 else ""
            why, again = f"the answer was {error.code}{kept}", error.code == 429 or error.code >= 500
        except http.client.HTTPException as error:
            # Its words may have the URL in them.
            why, again = f"{type(error).__name__}", False
        except OSError as error:
            why, again = str(getattr(error, "reason", error)), True
        if pause is None or not again:
            raise NotSent(why)
        time.sleep(pause)


def send_mail(mail: Mail, password: str, text: str, timeout: float) -> None:
    """Send a text whose first line is the subject. Raises NotSent."""
    subject, _, body = text.strip().partition("\n")
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = printable(subject), mail.sender, ", ".join(mail.to)
    message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain=mail.sender.rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(body.strip() + "\n")
    try:
        with smtplib.SMTP(mail.host, mail.port, timeout=timeout) as server:
            if mail.starttls:
                server.starttls(context=ssl.create_default_context())
            if mail.user:
                server.login(mail.user, password)
            refused = server.send_message(message)
    except OSError as error:
        raise NotSent(str(error)) from None
    # The others have it: sent once more, they would have it twice.
    for address in refused:
        print(f"plimsoll: note: {mail.host} refuses {printable(address)}", file=sys.stderr)


# ---- running ----


class Held(InputError):
    """Another run is under way."""


@contextlib.contextmanager
def held(config: Config) -> Iterator[TextIO]:
    """The lock of all runs with one state. Raises Held, which says who has it."""
    config.state.mkdir(parents=True, exist_ok=True)
    path = config.state / "run.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Held(f"{path} is held by {lock.read(200).strip() or 'another run'}; nothing was done") from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} of {_user()}, since {_stamp(time.time())}\n")
        lock.flush()
        yield lock


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _stamp(when: float) -> str:
    return datetime.fromtimestamp(when, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def main(path: Path, after_failure: bool) -> int:
    """`plimsoll scheduled`: run(), or failed(). The exit status. Raises InputError for a configuration that is none."""
    config = read_config(path)
    # Also for what is done here: a proxy, or certificates of one's own, of the webhook.
    os.environ.update(config.environment)
    # systemd's way to end it: what it started is ended then, and what was not told is told by the next one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return failed(config, os.environ.get("MONITOR_SERVICE_RESULT", "unknown")) if after_failure else run(config)
    except Held as error:
        print(f"plimsoll: {error}", file=sys.stderr)
        return HELD


def run(config: Config) -> int:
    """Collect and judge once, and tell what is new. The exit status: 0, or 1 where something failed. Raises Held."""
    ways = channels(config)
    with held(config) as lock:
        state = State.load(config.state / "state.json")
        if state.cut_off:
            _finish(config, ways, state, Outcome(CUT_OFF, f"the run of {_stamp(state.began or 0)} did not end"), None)
        state.began, state.ended = time.time(), None
        state.save(config.state / "state.json")
        outcome = collect(config, lock)
        document = _fresh(config, state.began)
        if outcome.result == OK and document is None:
            outcome = Outcome(NO_FINDINGS, f"collect.yml ended well, and left no new {config.findings}")
        _finish(config, ways, state, outcome, document)
        return int(state.outcome.result != OK)


def failed(config: Config, result: str) -> int:
    """Tell that the last run failed, where it could not itself; result as systemd calls it, such as timeout.

    The exit status: 0, or 1 where it could not be told. Raises Held: the run that is under way tells.
    """
    with held(config):
        state = State.load(config.state / "state.json")
        outcome = state.outcome
        if state.cut_off:
            outcome = Outcome(CUT_OFF, f"the run of {_stamp(state.began or 0)} was ended from outside ({result})")
        elif outcome.result == OK:
            outcome = Outcome(NOT_STARTED, f"the run failed before it began ({result}); see its journal")
        return int(bool(_finish(config, channels(config), state, outcome, None)))


def _finish(
    config: Config, ways: Sequence[Channel], state: State, outcome: Outcome, document: Findings | None
) -> list[str]:
    """Note how the run ended, tell it, and write the metrics. What could not be sent, a line each."""
    state.outcome, state.ended = outcome, state.ended or time.time()
    if document:
        state.fleet = document["fleet"]
        state.leaks = leaks_of(document)
        state.missing = sorted(one["host"] for one in document["hosts"] if not one["collected"])
    if outcome.result == OK:
        state.succeeded = state.ended
    # Before it is told, as that may take long: it is over, also if nobody hears of it.
    state.save(config.state / "state.json")
    unsent = tell(ways, state, document, f"{socket.gethostname()}:{config.findings.with_name('report.html')}")
    if unsent and outcome.result == OK:
        state.outcome = Outcome(UNTOLD, "; ".join(unsent))
    for line in filter(None, (outcome.why, *unsent)):
        print(f"plimsoll: {line}", file=sys.stderr)
    state.save(config.state / "state.json")
    write_whole(config.state / "plimsoll_collect.prom", metrics(state))
    return unsent


def collect(config: Config, lock: TextIO) -> Outcome:
    """Run collect.yml, to the deadline. ansible-playbook holds the lock too: it may outlive a runner that is killed."""
    variables = {
        **config.variables,
        "collect_inbox": str(config.state / "inbox"),
        "collect_store": str(config.state / "store"),
        "collect_report": str(config.findings.parent),
    }
    environment = {**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}
    if credential("ssh_private_key"):
        variables["ansible_ssh_private_key_file"] = str(_credential_path("ssh_private_key"))
    if credential("vault_password"):
        environment["ANSIBLE_VAULT_PASSWORD_FILE"] = str(_credential_path("vault_password"))
    if token := credential("linode_token"):
        environment["LINODE_API_TOKEN"] = token
    playbook = str(PROJECT / "playbooks" / "collect.yml")
    command = [str(PLAYBOOK), "--inventory", str(config.inventory), playbook, "--extra-vars", json.dumps(variables)]
    said = [""]
    # Ended between the start and the try, it would leave behind what it has started.
    asked: list[int] = []
    ends = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        reader = threading.Thread(target=_pass_on, args=(process.stdout, said), daemon=True)
        reader.start()
    except OSError as error:
        signal.signal(signal.SIGTERM, ends)
        return Outcome(FAILED, f"{PLAYBOOK}: {error.strerror}")
    try:
        signal.signal(signal.SIGTERM, ends)
        if asked:
            signal.raise_signal(asked[0])
        status = process.wait(config.deadline_s)
    except subprocess.TimeoutExpired:
        return Outcome(DEADLINE, f"collect.yml was not done after {config.deadline_s:g} s, and was ended")
    finally:
        _end(process)
        # One that it left behind may hold the other end open.
        reader.join(GRACE_S)
    why = said[0].removeprefix("[ERROR]: ").removeprefix("Task failed: ").removeprefix("Action failed: ")
    return Outcome(FAILED, f"collect.yml ended with {status}: {why or 'see above'}") if status else GOOD


def _pass_on(stream: TextIO, said: list[str]) -> None:
    """Print it as it comes, and keep the last error in said: what Ansible marks as one, else the last line."""
    for line in stream:
        print(line, end="", flush=True)
        if line.startswith("[ERROR]") or (line.strip() and not said[0].startswith("[ERROR]")):
            said[0] = line.strip()


def _end(process: subprocess.Popen[str]) -> None:
    """End it, if it has not. ansible-playbook hands SIGTERM on to its workers, which have sessions of their own."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _fresh(config: Config, began: float) -> Findings | None:
    """The findings that the run which began then has made, or None."""
    try:
        document = read_findings(config.findings)
    except InputError:
        return None
    # They have whole seconds.
    return document if datetime.fromisoformat(document["generated"]).timestamp() >= int(began) else None
