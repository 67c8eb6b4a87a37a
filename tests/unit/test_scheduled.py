"""A run that nobody watches: what is told, to whom, once; and what becomes of a run that does not go well."""

from __future__ import annotations

import contextlib
import email
import email.policy
import http.server
import ipaddress
import json
import os
import re
import signal
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from plimsoll import scheduled
from plimsoll.cli import main
from plimsoll.scheduled import (
    GOOD,
    HELD,
    Channel,
    Config,
    Mail,
    News,
    NotSent,
    Outcome,
    State,
    Told,
    metrics,
    news,
    post,
    read_config,
    render,
    send_mail,
    tell,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
WEBHOOK, MAIL = ROOT / "templates/schedule/webhook.json.j2", ROOT / "templates/schedule/mail.txt.j2"
PLAYBOOK = scheduled.PLAYBOOK
MIB = 1 << 10
NOTHING = Told()
LINE = {
    **{"task": "shop.scan", "task_share": 1.0, "file": "/opt/celery/releases/x/app/shop/tasks.py", "line": 9},
    **{"function": "scan", "growth_kb": 900.0, "share": 0.98, "windows": 1, "package": "application", "caller": None},
}


def worker(host: str, unit: str = "celery-worker@sales.service", **more: Any) -> dict[str, Any]:
    """A worker that leaks, whose line is not known."""
    return {
        **{"host": host, "unit": unit, "leaking": True, "pattern": "growing", "growth_kb_per_hour": 12.0 * MIB},
        **{"growth_low": 10.0 * MIB, "growth_high": 14.0 * MIB, "level_kb": 200.0 * MIB, "leak_class": "unknown"},
        **{"memory_high_kb": None, "hours_to_memory_high": None, "hours_to_memory_high_earliest": None},
        **{"hours_to_memory_high_latest": None, "memory_max_kb": 500 * MIB, "hours_to_memory_max": 3.0},
        **{"growth_kb_per_1000_tasks": None, "grows_in": None, "begins_kb": None, "span_hours": 30.0},
        "last_sample": "2025-11-24T00:00:00+00:00",
        **{"hours_to_memory_max_earliest": 2.0, "hours_to_memory_max_latest": 5.0, "culprits": [], "advice": None},
        **more,
    }


def well(host: str, pattern: str = "plateau") -> dict[str, Any]:
    return worker(host, leaking=False, pattern=pattern)


def found(*workers: dict[str, Any], down: tuple[str, ...] = (), up: tuple[str, ...] = ()) -> Any:
    """findings.json of hosts that were collected (up, and those of workers) and of those that were not."""
    names = sorted({one["host"] for one in workers} | set(up) - set(down))
    hosts = [{"host": host, "collected": host not in down, "reason": ""} for host in names]
    hosts += [{"host": host, "collected": False, "reason": "unreachable"} for host in down if host not in names]
    leaking = sum(one["leaking"] for one in workers)
    fleet = {"hosts": len(hosts), "collected": len(hosts) - len(down), "workers": len(workers), "leaking": leaking}
    return {
        # Later than any run of these tests begins.
        **{"schema": 1, "generated": "2999-01-01T00:00:00+00:00"},
        **{"fleet": {**fleet, "soonest": None}, "changes": {}, "workers": list(workers), "hosts": hosts},
    }


# ---- what is new ----


def headlines(*documents: Any, told: Told = NOTHING) -> list[str]:
    said = []
    for document in documents:
        new, told = news(document, GOOD, told)
        # As it is kept from one run to the next.
        told = Told.of(json.loads(json.dumps(told.plain())))
        said.append(new.headline)
    return said


def test_what_is_there_at_first_is_told_once() -> None:
    document = found(worker("w-1"), worker("w-2"), well("w-3"), down=("w-4",))
    assert headlines(document, document, document) == ["2 new leaks, 1 host not collected", "", ""]
    assert headlines(found(well("w-1"))) == [""]


def test_a_host_that_one_collection_missed_is_not_told_as_mended_and_then_as_new() -> None:
    leaks = found(worker("w-1"), well("w-2"))
    missed = "1 host not collected"
    # Whether it is judged by what the store has of it, or not at all, and whatever that judgement is.
    for without in (found(well("w-2"), down=("w-1",)), found(worker("w-1"), well("w-2"), down=("w-1",))):
        assert headlines(leaks, without, without, leaks) == ["1 new leak", missed, "", "1 host collected again"]
    otherwise = found(well("w-1"), well("w-2"), down=("w-1",))
    assert headlines(leaks, otherwise, leaks) == ["1 new leak", missed, "1 host collected again"]
    assert headlines(leaks, otherwise, found(well("w-1"), well("w-2")))[2] == "1 leak mended, 1 host collected again"


def test_a_leak_of_a_host_that_is_down_is_told_where_the_store_knows_it() -> None:
    document = found(worker("w-1"), down=("w-1",))
    assert headlines(document, document) == ["1 new leak, 1 host not collected", ""]


def test_a_leak_that_is_mended_is_told_and_so_is_its_return() -> None:
    leaks, mended = found(worker("w-1")), found(well("w-1"))
    assert headlines(leaks, mended, mended, leaks) == ["1 new leak", "1 leak mended", "", "1 new leak"]


def test_what_was_seen_for_too_short_a_time_is_not_mended() -> None:
    leaks, short = found(worker("w-1")), found(well("w-1", "insufficient_data"))
    assert headlines(leaks, short, leaks, found(well("w-1"))) == ["1 new leak", "", "", "1 leak mended"]


def test_a_line_is_told_once_also_where_it_comes_and_goes() -> None:
    bare, named = found(worker("w-1")), found(worker("w-1", culprits=[LINE]))
    assert headlines(bare, named, bare, named) == ["1 new leak", "1 line named", "", ""]
    assert headlines(named, named) == ["1 new leak", ""]


def test_a_worker_and_a_host_that_are_no_more_are_forgotten() -> None:
    leaks = found(worker("w-1"), well("w-2"), down=("w-3",))
    for without in (found(well("w-2"), up=("w-1",)), found(well("w-2"))):
        assert headlines(leaks, without, leaks) == [
            "1 new leak, 1 host not collected",
            "",
            "1 new leak, 1 host not collected",
        ]


def test_a_failure_is_told_once_and_its_end_too_and_takes_nothing_back() -> None:
    told = news(found(worker("w-1"), down=("w-2",)), GOOD, Told())[1]
    said = []
    outcomes = [
        Outcome("failed", "no token"),
        Outcome("failed", "no token"),
        Outcome("deadline", "too slow"),
        GOOD,
        GOOD,
    ]
    for outcome in outcomes:
        new, told = news(None, outcome, told)
        said.append((new.headline, new.failure))
    assert said == [
        ("collecting fails", "no token"),
        ("", ""),
        ("collecting fails", "too slow"),
        ("collecting works again", ""),
        ("", ""),
    ]
    assert headlines(found(worker("w-1"), down=("w-2",)), told=told) == [""]


def test_what_hosts_send_is_made_printable_and_short() -> None:
    evil = "w\r\nBcc: all@example.com\x1b[2J\u202e" + "x" * 9999
    document = found(worker(evil, culprits=[{**LINE, "task": evil}]))
    new, _ = news(document, Outcome("failed", f"why\n{evil}"), Told())
    texts = [new.failure, new.leaking[0]["host"], new.leaking[0]["culprits"][0]["task"]]
    assert all(text.isprintable() and len(text) <= 500 for text in texts)
    # What was told is kept as it came, or it would be new each time.
    assert headlines(document, document) == ["1 new leak", ""]


# ---- configuration ----


def config(folder: Path, **keys: Any) -> Path:
    path = folder / "schedule.json"
    path.write_text(json.dumps({"inventory": "inventory", "state": "state", **keys}))
    return path


@pytest.fixture(autouse=True)
def credentials(tmp_path: Path, monkeypatch: Any) -> Path:
    """A directory as LoadCredential= makes it."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return folder


def test_a_configuration_has_paths_beside_it_and_little_that_must_be_said(tmp_path: Path) -> None:
    assert read_config(config(tmp_path)) == Config(
        tmp_path / "inventory", tmp_path / "state", 3000, {}, {}, webhook=None, mail=None
    )
    full = read_config(
        config(tmp_path, webhook={}, mail={"from": "a@example.com", "to": ["b@example.com"], "template": "own.j2"})
    )
    assert full.webhook == WEBHOOK
    assert full.mail == Mail("localhost", 25, True, "", "a@example.com", ["b@example.com"], tmp_path / "own.j2")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"state": None}, ": needs state"),
        ({"inventori": "x"}, ": there is no inventori; there are inventory, "),
        ({"deadline_s": "9"}, ': deadline_s is "9", which is of the wrong type'),
        ({"deadline_s": True}, ": deadline_s is true, which is of the wrong type"),
        ({"deadline_s": 0}, ": deadline_s is to be above 0"),
        ({"environment": {"A": 1}}, ": environment is to hold texts alone"),
        ({"webhook": []}, ": webhook is [], which is of the wrong type"),
        ({"webhook": {"url": "https://x"}}, ": webhook: there is no url"),
        ({"mail": {"to": ["b@example.com"]}}, ": mail: needs from"),
        ({"mail": {"from": "a@example.com", "to": []}}, ": mail: from and to are to be addresses"),
        ({"mail": {"from": "a@example.com", "to": ["b@x\nBcc: c@x"]}}, ": mail: from and to are to be addresses"),
        (
            {"mail": {"from": "a@example.com", "to": ["b@example.com"], "user": "a", "starttls": False}},
            ": mail: without starttls the password would go in the clear",
        ),
    ],
)
def test_a_wrong_key_is_named_in_a_line(tmp_path: Path, capsys: Any, keys: dict[str, Any], said: str) -> None:
    path = config(tmp_path, **keys)
    assert main(["scheduled", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"plimsoll: {path}{said}") and error.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_a_file_that_is_no_json_and_one_that_is_not_there_are_named(tmp_path: Path, capsys: Any) -> None:
    for path in (tmp_path / "none.json", ROOT / "README.md"):
        assert main(["scheduled", "--config", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"plimsoll: {path}: ")


BAD_URLS = [
    "",
    "http://example.com/s3cret",
    "ftp://x/s3cret",
    "https://x/s3 cret",
    "https://x:y/s3cret",
    "https://[::1/s3",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_webhook_needs_a_url_that_nobody_can_listen_to_and_it_is_not_shown(
    tmp_path: Path, credentials: Path, capsys: Any, url: str
) -> None:
    (credentials / "webhook_url").write_text(url)
    assert main(["scheduled", "--config", str(config(tmp_path, webhook={}))]) == 2
    error = capsys.readouterr().err
    assert error == f"plimsoll: {credentials}/webhook_url: is to hold one URL with https://\n"


def test_a_login_needs_its_password(tmp_path: Path, capsys: Any) -> None:
    mail = {"from": "a@example.com", "to": ["b@example.com"], "user": "ann"}
    assert main(["scheduled", "--config", str(config(tmp_path, mail=mail))]) == 2
    assert "smtp_password: is to hold the password of ann\n" in capsys.readouterr().err


def test_the_example_of_the_documentation_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs/scheduling.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "schedule.json").write_text(block)
        assert read_config(tmp_path / "schedule.json").inventory.is_absolute()


# ---- the webhook ----


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers each POST with the next of server.codes, 200 after those; -1 never answers."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Content-Type"], body))
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code < 0:
            self.server.over.wait(20)
            return
        self.send_response(code)
        if 300 <= code < 400:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *given: Any) -> None:
        pass


@contextlib.contextmanager
def serving(codes: tuple[int, ...] = (), tls: ssl.SSLContext | None = None) -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.got, server.codes, server.over = [], list(codes), threading.Event()
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}/s3cret"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("codes", "tries", "why"),
    [
        ((), 1, None),
        ((500, 503), 3, None),
        ((429,), 2, None),
        ((500, 500, 500), 3, "the answer was 500"),
        ((404,), 1, "the answer was 404"),
        ((302,), 1, "the answer was 302; redirects are not followed"),
        ((307,), 1, "the answer was 307; redirects are not followed"),
        ((-1, -1, -1), 3, "timed out"),
    ],
)
def test_a_webhook_is_tried_again_where_that_may_help_and_followed_nowhere(
    codes: tuple[int, ...], tries: int, why: str | None
) -> None:
    with serving(codes) as server:
        if why is None:
            post(server.url, '{"text": "ü"}', 10, (0, 0))
        else:
            with pytest.raises(NotSent) as caught:
                post(server.url, '{"text": "ü"}', 0.1 if -1 in codes else 10, (0, 0))
            assert str(caught.value) == why
        assert server.got == [("/s3cret", "application/json", '{"text": "ü"}'.encode())] * tries


def test_a_webhook_that_is_not_there_is_said_so_without_its_url() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(NotSent, match=r"^\[Errno 111\] Connection refused$"):
        post(url, "{}", 10, (0, 0))


def test_a_body_that_is_no_json_is_not_sent() -> None:
    with serving() as server, pytest.raises(NotSent, match="the template makes no JSON"):
        post(server.url, "{'text': 1}", 10, (0, 0))
    assert server.got == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: Any) -> Path:
    """Of 127.0.0.1, signed by itself: key and certificate in a file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.now(timezone.utc)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + made.public_bytes(serialization.Encoding.PEM)
    path: Path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(text)
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate)
    return made


def test_a_certificate_that_nobody_trusts_is_refused(tls: ssl.SSLContext, certificate: Path, monkeypatch: Any) -> None:
    with serving(tls=tls) as server:
        with pytest.raises(NotSent, match="certificate verify failed"):
            post(server.url, "{}", 10, ())
        assert server.got == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        post(server.url, "{}", 10, ())
        assert len(server.got) == 1


# ---- mail ----


class Postbox(socketserver.StreamRequestHandler):
    """As much of SMTP as smtplib speaks. server.refuses: commands that are answered with 550; server.said: all."""

    server: Any

    def handle(self) -> None:
        encrypted = ""
        self.say("220 postbox")
        while line := self.rfile.readline().decode().strip():
            verb = line.split()[0].upper()
            self.server.said.append(encrypted + line)
            if any(line.upper().startswith(one) for one in self.server.refuses):
                self.say("550 no\x1b[2J")
            elif verb == "EHLO":
                self.say("250-postbox", *(["250-STARTTLS"] * bool(self.server.tls)), "250 AUTH PLAIN")
            elif verb == "STARTTLS":
                self.say("220 go on")
                wrapped = self.server.tls.wrap_socket(self.connection, server_side=True)
                self.rfile, self.wfile, encrypted = wrapped.makefile("rb"), wrapped.makefile("wb", buffering=0), "TLS "
            elif verb == "DATA":
                self.say("354 go on")
                body = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.messages.append(email.message_from_bytes(body, policy=email.policy.default))
                self.say("250 taken")
            else:
                self.say("235 in" if verb == "AUTH" else "221 bye" if verb == "QUIT" else "250 ok")

    def say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())


@contextlib.contextmanager
def postbox(refuses: tuple[str, ...] = (), tls: ssl.SSLContext | None = None) -> Iterator[Any]:
    server: Any = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Postbox)
    server.daemon_threads = True
    server.said, server.messages, server.refuses, server.tls = [], [], refuses, tls
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def mail_to(server: Any, **more: Any) -> Mail:
    given = {"host": "127.0.0.1", "port": server.server_address[1], "starttls": False, "user": "", "template": MAIL}
    return Mail(**{**given, "sender": "plimsoll@example.com", "to": ["a@example.com", "b@example.com"], **more})


def test_a_mail_has_its_subject_in_its_first_line() -> None:
    with postbox() as server:
        send_mail(mail_to(server), "", "\n2 new leaks\n\nw-1 größer\n" + "x" * 2000 + "\n", 10)
    (message,) = server.messages
    assert (message["Subject"], message["From"]) == ("2 new leaks", "plimsoll@example.com")
    assert message["To"] == "a@example.com, b@example.com" and message["Message-ID"].endswith("@example.com>")
    assert message.get_content().replace("\r", "") == "w-1 größer\n" + "x" * 2000 + "\n"
    assert [line for line in server.said if line.startswith(("mail", "rcpt"))] == [
        "mail FROM:<plimsoll@example.com>",
        "rcpt TO:<a@example.com>",
        "rcpt TO:<b@example.com>",
    ]


def test_a_host_gets_no_header_into_a_mail() -> None:
    with postbox() as server:
        send_mail(
            mail_to(server), "", "leak on w-1\rBcc: all@example.com\x0b\u2028X: y\nBcc: b@example.com\n\nbody", 10
        )
    (message,) = server.messages
    assert set(message.keys()) >= {"Subject", "From", "To"} and not {"Bcc", "X"} & set(message.keys())
    assert message["Subject"] == "leak on w-1?Bcc: all@example.com??X: y"
    assert message.get_content().replace("\r", "") == "Bcc: b@example.com\n\nbody\n"


@pytest.mark.parametrize("refuses", [("EHLO", "HELO"), ("MAIL",), ("RCPT",), ("DATA",)])
def test_a_mail_that_is_refused_was_not_sent(refuses: tuple[str, ...]) -> None:
    with postbox(refuses) as server, pytest.raises(NotSent, match="550"):
        send_mail(mail_to(server), "", "subject", 10)
    assert server.messages == []


def test_one_address_that_is_refused_does_not_make_the_others_get_it_again(capsys: Any) -> None:
    with postbox(("RCPT TO:<B@",)) as server:
        send_mail(mail_to(server), "", "subject", 10)
    assert len(server.messages) == 1
    assert capsys.readouterr().err == "plimsoll: note: 127.0.0.1 refuses b@example.com\n"


def test_a_password_goes_through_tls_alone(tls: ssl.SSLContext, certificate: Path, monkeypatch: Any) -> None:
    def sent(server: Any) -> None:
        send_mail(mail_to(server, starttls=True, user="ann"), "s3cret", "subject", 10)

    with postbox() as server, pytest.raises(NotSent, match="STARTTLS extension not supported"):
        sent(server)
    with postbox(tls=tls) as server, pytest.raises(NotSent, match="certificate verify failed"):
        sent(server)
    assert not any("AUTH" in line for line in server.said)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with postbox(tls=tls) as server:
        sent(server)
    assert len(server.messages) == 1
    assert [line.split()[:2] for line in server.said if "AUTH" in line] == [["TLS", "AUTH"]]
    with postbox(("AUTH",), tls) as server, pytest.raises(NotSent) as caught:
        sent(server)
    assert "550" in str(caught.value) and "s3cret" not in str(caught.value)


def test_a_mail_server_that_is_not_there_or_says_nothing_is_said_so() -> None:
    with postbox() as server:
        nowhere = mail_to(server)
    with pytest.raises(NotSent, match="Connection refused"):
        send_mail(nowhere, "", "subject", 10)
    with socketserver.TCPServer(("127.0.0.1", 0), Postbox) as silent, pytest.raises(NotSent, match="timed out"):
        send_mail(mail_to(silent), "", "subject", 0.1)


# ---- templates ----

FULL = News(
    failure="no token",
    leaking=[worker(f"w-{n}", culprits=[LINE], advice={"text": "Bound it.", "link": ""}) for n in range(150)],
    named=[worker("n-1", culprits=[LINE])],
    mended=[well("m-1")],
    silent=[{"host": "s-1", "collected": False, "reason": "unreachable: no route"}],  # type: ignore[typeddict-item]
    back=[{"host": "b-1", "collected": True, "reason": ""}],  # type: ignore[typeddict-item]
    fleet={"hosts": 9, "collected": 8, "workers": 160, "leaking": 151, "soonest": None},
)


def chat(new: News) -> str:
    return str(json.loads(render(WEBHOOK, new, "control-1:/report.html"))["text"])


def test_both_templates_say_all_of_it_and_not_without_end() -> None:
    for said, most in ((chat(FULL), 20), (render(MAIL, FULL, "control-1:/report.html"), 100)):
        first, rest = said.split("\n", 1)
        assert first == (
            "plimsoll: collecting fails, 150 new leaks, 1 line named, 1 leak mended, 1 host not collected,"
            " 1 host collected again"
        )
        assert "Collecting fails:" in rest and "no token" in rest
        assert rest.count("12 MiB/h (10 to 14), MemoryMax of 500 MiB in 3.0 h (2.0 h to 5.0 h)\n") == most + 1
        assert f"and {150 - most} more\n" in rest
        assert rest.count("task shop.scan at shop/tasks.py:9 in scan: 98 % of the traced growth") == most + 1
        assert all(word in rest for word in ("n-1", "m-1", "s-1", "unreachable: no route", "b-1"))
        assert "151 of 160 workers leak; 8 of 9 hosts were collected." in rest and "control-1:/report.html" in rest


def test_a_failure_alone_needs_no_findings() -> None:
    new = News(failure="collect.yml ended with 2")
    assert chat(new) == "plimsoll: collecting fails\nCollecting fails: `collect.yml ended with 2`"
    assert render(MAIL, new, "x:/y").startswith(
        "plimsoll: collecting fails\n\nCollecting fails: collect.yml ended with 2\n"
    )


def test_a_host_mentions_nobody_in_a_chat_and_makes_no_link() -> None:
    evil = 'x` @channel <!here> <https://example.com|click> "}'
    said = chat(News(leaking=[worker(evil)], silent=[{"host": "s-1", "collected": False, "reason": evil}]))  # type: ignore[typeddict-item]
    shown = "`x' @channel &lt;!here&gt; &lt;https://example.com|click&gt; \"}`"
    assert said.count(shown) == 2 and said.replace(shown, "").count("channel") == 0


@pytest.mark.parametrize("wrong", ["{{ news.nothing }}", "{% if %}", "{{ 1 / 0 }}", "{{ news.leaking[0] | growth }}"])
def test_a_template_of_ones_own_that_is_wrong_is_named(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "own.j2").write_text(wrong)
    with pytest.raises(NotSent, match=rf"^{tmp_path}/own\.j2: \w+Error"):
        render(tmp_path / "own.j2", News(), "")
    with pytest.raises(NotSent, match=rf"^{tmp_path}/none\.j2: TemplateNotFound"):
        render(tmp_path / "none.j2", News(), "")


# ---- what was told ----


class Recorder:
    """A channel that keeps what it is told, or fails."""

    def __init__(self, name: str) -> None:
        self.got: list[str] = []
        self.broken = False
        self.channel = Channel(name, WEBHOOK, self.send)

    def send(self, text: str) -> None:
        if self.broken:
            raise NotSent("down\x1b")
        self.got.append(json.loads(text)["text"].split("\n")[0].removeprefix("plimsoll: "))


def test_what_could_not_be_sent_goes_out_with_the_next_run_and_to_nobody_twice() -> None:
    chat, mail, state = Recorder("chat"), Recorder("mail"), State()
    ways = [chat.channel, mail.channel]
    chat.broken = True
    assert tell(ways, state, found(worker("w-1")), "") == ["chat: not sent: down?"]
    assert tell(ways, state, found(worker("w-1"), worker("w-2")), "") == ["chat: not sent: down?"]
    chat.broken = False
    assert tell(ways, state, found(worker("w-1"), worker("w-2"), down=("w-3",)), "") == []
    assert tell(ways, state, found(worker("w-1"), worker("w-2"), down=("w-3",)), "") == []
    assert chat.got == ["2 new leaks, 1 host not collected"]
    assert mail.got == ["1 new leak", "1 new leak", "1 host not collected"]
    assert state.unsent == {"chat": 2, "mail": 0}


def test_the_state_is_kept_for_its_user_alone_and_one_that_is_damaged_is_begun_anew(
    tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "state.json"
    assert State.load(path) == State()
    chat, state = Recorder("chat"), State(began=1.0, outcome=Outcome("failed", "why"), succeeded=2.0)
    tell([chat.channel], state, found(worker("w-1", culprits=[LINE]), down=("w-2",)), "")
    state.save(path)
    assert State.load(path) == state and path.stat().st_mode & 0o777 == 0o600
    for damage in ("", "[]", "{}", '{"told": 1}', '{"told": {}, "outcome": [], "nosuch": 1}'):
        path.write_text(damage)
        assert State.load(path) == State()
        assert "is no state of plimsoll, so all is told anew" in capsys.readouterr().err


# ---- metrics ----


def read_metrics(text: str) -> dict[str, float]:
    families = list(text_string_to_metric_families(text))
    assert {one.type for one in families} <= {"gauge", "counter"} and all(one.documentation for one in families)
    return {
        " ".join([sample.name.removeprefix("plimsoll_collect_"), *sample.labels.values()]): sample.value
        for one in families
        for sample in one.samples
    }


def test_the_metrics_are_openmetrics_and_say_how_it_goes() -> None:
    results = {f"result {one}": 0.0 for one in scheduled.RESULTS}
    assert read_metrics(metrics(State())) == {**results, "result ok": 1}
    fleet: Any = {"hosts": 9, "collected": 8, "workers": 30, "leaking": 2, "soonest": None}
    state = State(1000.5, 1060.75, Outcome("deadline", "x"), 940.0, fleet, {}, {"webhook": 3, "mail": 0})
    assert read_metrics(metrics(state)) == {
        **results,
        "result deadline": 1,
        "last_run_timestamp_seconds": 1060.75,
        "last_success_timestamp_seconds": 940,
        "duration_seconds": 60.25,
        **{"hosts": 9, "hosts_collected": 8, "workers": 30, "leaking": 2},
        **{"notifications_failed_total webhook": 3, "notifications_failed_total mail": 0},
    }
    odd = replace(state, missing=["w-1", 'a "b" \\ c'])
    missing = {name: value for name, value in read_metrics(metrics(odd)).items() if "missing" in name}
    assert missing == {"host_missing w-1": 1, 'host_missing a "b" \\ c': 1}
    kept = worker("w-3", remedy={"state": "contained"})
    tried = worker("w-4", remedy={"state": "not_remedied"}, hours_to_memory_high=7.5, leak_class="native")
    document = found(worker("w-1", culprits=[LINE]), well("w-2"), kept, tried)
    leaks = read_metrics(metrics(replace(state, leaks=scheduled.leaks_of(document))))
    unit = "celery-worker@sales.service"
    assert {name: value for name, value in leaks.items() if name.startswith("leak_")} == {
        f"leak_growth_bytes_per_hour w-1 {unit} unknown": 12 << 20,
        f"leak_growth_bytes_per_hour w-4 {unit} native": 12 << 20,
        f"leak_memory_high_hours w-4 {unit} native": 7.5,
        f"leak_info w-1 {unit} unknown shop.scan shop/tasks.py:9": 1,
        f"leak_info w-4 {unit} native  ": 1,
    }
    # It has begun anew: of how long it takes, nothing is known.
    assert "duration_seconds" not in read_metrics(metrics(replace(state, ended=None)))


# ---- runs ----


class Runs:
    """plimsoll scheduled with a script in the place of ansible-playbook, and a chat that keeps what it is told."""

    def __init__(self, folder: Path, server: Any) -> None:
        self.folder, self.server = folder, server
        self.state = folder / "state"
        self.playbook = folder / "ansible-playbook"
        self.config = config(folder, webhook={}, deadline_s=30)
        self.ends(0, found())

    def ends(self, status: int, document: Any = None, before: str = "") -> None:
        """What collect.yml does from now on; document is left as its findings."""
        (self.folder / "findings.json").write_text(json.dumps(document))
        leave = f'mkdir -p "{self.state}/report" && cp "{self.folder}/findings.json" "{self.state}/report/"'
        script = f"#!/bin/sh\n{before}\n{leave if document else ''}\nexit {status}\n"
        self.playbook.write_text(script)
        self.playbook.chmod(0o755)

    def run(self, *more: str) -> int:
        return main(["scheduled", "--config", str(self.config), *more])

    @property
    def told(self) -> list[str]:
        """What was told since it was asked last, of each message the first two lines."""
        texts = [json.loads(body)["text"].removeprefix("plimsoll: ") for _, _, body in self.server.got]
        self.server.got.clear()
        return ["; ".join(text.split("\n")[:2]) for text in texts]

    @property
    def result(self) -> str:
        values = read_metrics((self.state / "plimsoll_collect.prom").read_text())
        (name,) = (name for name, value in values.items() if name.startswith("result ") and value)
        return name.removeprefix("result ")

    def started(self) -> subprocess.Popen[str]:
        """The same in a process of its own, when it has the lock."""
        code = (
            "import pathlib, sys; from plimsoll import cli, scheduled;"
            " scheduled.PLAYBOOK = pathlib.Path(sys.argv[1]); sys.exit(cli.main(sys.argv[2:]))"
        )
        words = ["scheduled", "--config", str(self.config)]
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.playbook), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT / "module_utils")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        return process


@pytest.fixture
def runs(tmp_path: Path, credentials: Path, monkeypatch: Any) -> Iterator[Runs]:
    with serving() as server:
        (credentials / "webhook_url").write_text(server.url + "\n")
        made = Runs(tmp_path, server)
        monkeypatch.setattr(scheduled, "PLAYBOOK", made.playbook)
        monkeypatch.setattr(scheduled, "PAUSES_S", (0, 0))
        ends = signal.getsignal(signal.SIGTERM)
        try:
            yield made
        finally:
            signal.signal(signal.SIGTERM, ends)


def test_a_run_collects_and_tells_what_is_new_once(runs: Runs, capsys: Any) -> None:
    runs.ends(0, found(worker("w-1"), down=("w-2",)))
    assert runs.run() == 0
    assert "plimsoll: told by webhook: 1 new leak, 1 host not collected\n" in capsys.readouterr().out
    assert len(runs.told) == 1 and runs.result == "ok"
    values = read_metrics((runs.state / "plimsoll_collect.prom").read_text())
    assert (values["hosts"], values["hosts_collected"], values["leaking"]) == (2, 1, 1)
    assert values["last_run_timestamp_seconds"] == values["last_success_timestamp_seconds"]
    assert values["host_missing w-2"] == 1
    assert values["leak_growth_bytes_per_hour w-1 celery-worker@sales.service unknown"] == 12 << 20
    runs.ends(0, found(worker("w-1"), down=("w-2",)))
    assert runs.run() == 0 and runs.told == []


def test_the_playbook_gets_its_own_secrets_and_no_other_and_shows_none(
    runs: Runs, credentials: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    for name in ("ssh_private_key", "vault_password", "linode_token"):
        (credentials / name).write_text(f"{name} s3cret\n")
    config(tmp_path, webhook={}, variables={"collect_scope": "flagged"}, environment={"HTTPS_PROXY": "http://proxy"})
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    runs.ends(0, found(), f'printf "%s\\n" "$@" > {tmp_path}/arguments; env > {tmp_path}/environment')
    assert runs.run() == 0
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:4] == [
        "--inventory",
        str(tmp_path / "inventory"),
        str(ROOT / "playbooks/collect.yml"),
        "--extra-vars",
    ]
    assert json.loads(arguments[4]) == {
        "collect_scope": "flagged",
        "collect_inbox": str(runs.state / "inbox"),
        "collect_store": str(runs.state / "store"),
        "collect_report": str(runs.state / "report"),
        "ansible_ssh_private_key_file": str(credentials / "ssh_private_key"),
    }
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert environment["ANSIBLE_CONFIG"] == str(ROOT / "ansible.cfg")
    assert environment["ANSIBLE_VAULT_PASSWORD_FILE"] == str(credentials / "vault_password")
    assert environment["LINODE_API_TOKEN"] == "linode_token s3cret"
    assert environment.pop("HTTPS_PROXY") == os.environ.pop("HTTPS_PROXY") == "http://proxy"
    assert [name for name, value in environment.items() if "s3cret" in value] == ["LINODE_API_TOKEN"]
    assert "s3cret" not in "".join(arguments) + "".join(capsys.readouterr())


def test_a_playbook_that_fails_is_told_with_its_error_and_with_what_it_found(runs: Runs, capsys: Any) -> None:
    errors = "echo '[ERROR]: Task failed: first'; echo '[ERROR]: Only 0 of 1 hosts' >&2; echo 'Origin: /x'; echo"
    runs.ends(2, found(down=("w-1",)), errors)
    assert runs.run() == 1
    why = "collect.yml ended with 2: Only 0 of 1 hosts"
    assert f"plimsoll: {why}\n" in capsys.readouterr().err
    assert runs.told == [f"collecting fails, 1 host not collected; Collecting fails: `{why}`"]
    assert runs.result == "failed" and read_metrics((runs.state / "plimsoll_collect.prom").read_text())["hosts"] == 1
    # What the inventory plugin says, which ends the program with a line.
    runs.ends(1, None, "echo; echo 'linode_fleet: 401' >&2; echo")
    assert runs.run() == 1 and runs.told == []
    runs.ends(0, found(up=("w-1",)))
    assert runs.run() == 0 and runs.told[0].startswith("collecting works again, 1 host collected again;")


def test_a_host_that_is_down_is_told_by_the_real_playbook(runs: Runs, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scheduled, "PLAYBOOK", PLAYBOOK)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "inventory").mkdir()
    down = {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_user": "nobody"}
    (tmp_path / "inventory/hosts.yml").write_text(json.dumps({"celery_workers": {"hosts": {"w-1": down}}}))
    assert runs.run() == 1 and runs.result == "failed"
    (told,) = runs.told
    assert told.startswith(
        "collecting fails, 1 host not collected; Collecting fails: `collect.yml ended with 2: Only 0 of 1"
    )
    values = read_metrics((runs.state / "plimsoll_collect.prom").read_text())
    assert (values["hosts"], values["hosts_collected"]) == (1, 0)
    assert [name for name in values if name.startswith("host_missing")], values


def test_findings_of_an_earlier_run_are_not_told_as_new(runs: Runs) -> None:
    old = {**found(worker("w-1")), "generated": "2026-01-01T00:00:00+00:00"}
    runs.ends(0, old)
    assert runs.run() == 1 and runs.result == "no_findings"
    assert runs.told[0].startswith("collecting fails; Collecting fails: `collect.yml ended well, and left no new ")
    runs.ends(0)
    assert runs.run() == 1 and runs.told == []


def test_a_playbook_that_is_not_there_is_a_failure_as_any(runs: Runs) -> None:
    runs.playbook.unlink()
    assert runs.run() == 1 and runs.result == "failed"
    assert runs.told == [f"collecting fails; Collecting fails: `{runs.playbook}: No such file or directory`"]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def waited(that: Callable[[], bool]) -> bool:
    return any(that() or time.sleep(0.01) for _ in range(2000))


def test_at_its_deadline_a_run_is_ended_and_told(runs: Runs, tmp_path: Path) -> None:
    config(tmp_path, webhook={}, deadline_s=0.2)
    # Asked first, as Ansible has to tell its workers.
    bye = f"trap 'kill $!; echo bye > {tmp_path}/bye; exit 1' TERM"
    runs.ends(0, found(), f"{bye}; echo $$ > {tmp_path}/pid; sleep 60 & wait")
    assert runs.run() == 1
    assert gone(int((tmp_path / "pid").read_text())) and (tmp_path / "bye").exists()
    assert runs.told == ["collecting fails; Collecting fails: `collect.yml was not done after 0.2 s, and was ended`"]
    assert runs.result == "deadline"


def test_a_playbook_that_does_not_end_by_itself_is_killed(runs: Runs, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scheduled, "GRACE_S", 0.2)
    config(tmp_path, webhook={}, deadline_s=0.2)
    runs.ends(0, found(), f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep 60 & echo $! >> {tmp_path}/pid; wait; wait")
    assert runs.run() == 1 and runs.result == "deadline"
    assert waited(lambda: all(map(gone, map(int, (tmp_path / "pid").read_text().split()))))


def test_a_notification_that_cannot_be_sent_fails_the_run_and_goes_out_with_the_next(runs: Runs) -> None:
    runs.server.codes = [500] * 3
    runs.ends(0, found(worker("w-1")))
    assert runs.run() == 1 and runs.result == "untold"
    values = read_metrics((runs.state / "plimsoll_collect.prom").read_text())
    assert values["notifications_failed_total webhook"] == 1 and values["last_success_timestamp_seconds"]
    runs.server.got.clear()
    runs.ends(0, found(worker("w-1")))
    assert runs.run() == 0 and runs.result == "ok"
    assert runs.told[0].startswith("1 new leak;")


# ---- two at a time, and runs that are cut off ----

WAITS = "echo begun; while [ ! -e {0}/over ]; do sleep 0.02; done"


def test_two_runs_do_not_overlap_and_the_second_says_who_is_there(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    runs.ends(0, found(worker("w-1")), WAITS.format(tmp_path))
    first = runs.started()
    try:
        for more in ((), ("--failed",)):
            assert runs.run(*more) == HELD
            said = capsys.readouterr().err
            assert re.fullmatch(
                rf"plimsoll: {runs.state}/run\.lock is held by process {first.pid} of \S+, since [-0-9: ]+ UTC;"
                r" nothing was done\n",
                said,
            )
    finally:
        (tmp_path / "over").touch()
        assert first.wait(20) == 0
    assert len(runs.told) == 1
    runs.ends(0, found(worker("w-1")))
    assert runs.run() == 0


def test_what_a_killed_run_started_keeps_the_lock_and_then_it_is_told_that_it_was_cut_off(
    runs: Runs, tmp_path: Path, capsys: Any
) -> None:
    runs.ends(0, found(worker("w-1")), f"echo $$ > {tmp_path}/pid; {WAITS.format(tmp_path)}")
    first = runs.started()
    first.kill()
    first.wait(20)
    try:
        assert runs.run() == HELD
    finally:
        (tmp_path / "over").touch()
    assert waited(lambda: gone(int((tmp_path / "pid").read_text())))
    runs.ends(0, found(worker("w-1")))
    assert runs.run() == 0
    cut, told = runs.told
    assert re.match(r"collecting fails; Collecting fails: `the run of [-0-9: ]+ UTC did not end`$", cut)
    assert told.startswith("collecting works again, 1 new leak;")


def test_a_run_that_systemd_ends_takes_the_playbook_with_it_and_is_told_by_the_other_unit(
    runs: Runs, tmp_path: Path, monkeypatch: Any
) -> None:
    runs.ends(0, found(worker("w-1")), f"echo $$ > {tmp_path}/pid; {WAITS.format(tmp_path)}")
    first = runs.started()
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 143
    assert waited(lambda: gone(int((tmp_path / "pid").read_text())))
    monkeypatch.setenv("MONITOR_SERVICE_RESULT", "timeout")
    assert runs.run("--failed") == 0 and runs.result == "cut_off"
    (told,) = runs.told
    assert re.match(
        r"collecting fails; Collecting fails: `the run of [-0-9: ]+ UTC was ended from outside \(timeout\)`", told
    )
    # It is asked once more, as after each failure: nothing is told twice.
    assert runs.run("--failed") == 0 and runs.told == []


def test_a_run_that_is_ended_while_it_starts_the_playbook_leaves_none_behind(runs: Runs, monkeypatch: Any) -> None:
    started: list[subprocess.Popen[str]] = []

    def ended_at_once(*given: Any, **more: Any) -> subprocess.Popen[str]:
        started.append(popen(*given, **more))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    popen = subprocess.Popen
    runs.ends(0, found(), "exec sleep 60")
    monkeypatch.setattr(scheduled.subprocess, "Popen", ended_at_once)
    try:
        with pytest.raises(SystemExit, match="143"):
            runs.run()
        assert started[0].returncode == -signal.SIGTERM
    finally:
        started[0].kill()


def test_a_run_that_never_began_is_told_by_the_other_unit(runs: Runs, monkeypatch: Any) -> None:
    monkeypatch.setenv("MONITOR_SERVICE_RESULT", "resources")
    for _ in range(2):
        assert runs.run("--failed") == 0
    assert runs.told == [
        "collecting fails; Collecting fails: `the run failed before it began (resources); see its journal`"
    ]
    assert runs.result == "not_started"
    assert runs.run() == 0 and runs.told[0].startswith("collecting works again")
    assert runs.run("--failed") == 0 and len(runs.told) == 1


def test_a_failure_that_could_not_be_told_is_tried_once_more_by_the_other_unit(runs: Runs) -> None:
    runs.server.codes = [500] * 6
    runs.ends(3, None, "echo no")
    assert runs.run() == 1
    assert runs.run("--failed") == 1
    runs.server.got.clear()
    assert runs.run("--failed") == 0 and runs.told == [
        "collecting fails; Collecting fails: `collect.yml ended with 3: no`"
    ]


def test_where_one_channel_does_not_work_the_other_one_says_so(runs: Runs, tmp_path: Path) -> None:
    with postbox() as server:
        port = server.server_address[1]
    mail = {"from": "a@example.com", "to": ["b@example.com"], "host": "127.0.0.1", "port": port, "starttls": False}
    config(tmp_path, webhook={}, mail=mail)
    runs.ends(0, found(worker("w-1")))
    assert runs.run() == 1 and len(runs.told) == 1
    # The mail is still not sent.
    assert runs.run("--failed") == 1
    assert runs.told == ["collecting fails; Collecting fails: `mail: not sent: [Errno 111] Connection refused`"]


# ---- what a control node installs ----


def test_what_a_control_node_installs_is_pinned_as_for_everybody() -> None:
    """scripts/lock makes both files."""

    def pins(name: str) -> dict[str, str]:
        text = re.sub(r"^ *#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)
        found = re.findall(r"^(\S+)==(\S+).*\n((?: +--hash.*\n)+)", text, re.MULTILINE)
        return {package: f"{version} {hashes}" for package, version, hashes in found}

    run, every = pins("requirements.txt"), pins("requirements.lock")
    assert {name: every.get(name) for name in run} == run
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", one)[0].replace("_", "-").lower() for one in declared}  # type: ignore[index]
    assert names <= set(run) and "pytest" not in run
    image = yaml.safe_load((ROOT / "execution-environment.yml").read_text())["dependencies"]
    assert image["ansible_core"]["package_pip"] == "ansible-core==" + run["ansible-core"].split()[0]
