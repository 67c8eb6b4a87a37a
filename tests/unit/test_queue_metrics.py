"""The service that counts what waits in queues, with connections that are made up, and real HTTP on the loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from amqp.exceptions import AccessRefused, NotFound
from amqp.exceptions import ChannelError as VirtualError
from kombu import Connection
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "roles" / "queue_metrics" / "files" / "queue_metrics.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("queue_metrics", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


service = load()
EVIL = 'a"b\\c\nd} 9\n# EOF\n\u2028é'
NOON = 1_763_985_600.0


class Made:
    """Connections as kombu makes them, to a broker that is `depths`: the length of a queue, or what asking raises."""

    def __init__(self, driver: str, depths: dict[str, Any]) -> None:
        self.driver, self.depths = driver, depths
        self.down: Exception | None = None
        self.opened: list[Any] = []
        self.channels: list[Any] = []

    def __call__(self, url: str, **given: Any) -> Any:
        made = self
        channel_errors = (NotFound, AccessRefused, VirtualError)

        class One:
            transport = SimpleNamespace(driver_type=made.driver)
            alt: tuple[str, ...] = ()
            closed = False
            cut: Exception | None = None

            def ensure_connection(self, **_: Any) -> None:
                if made.down:
                    raise made.down

            def channel(self) -> Any:
                connection = self

                def declare(queue: str, passive: bool) -> Any:
                    assert passive == (made.driver != "redis")
                    assert not channel.shut, "a channel that RabbitMQ has closed"
                    absent = missing(made.driver) if passive else 0
                    found = connection.cut or made.down or made.depths.get(queue, absent)
                    if isinstance(found, Exception):
                        channel.shut = made.driver == "amqp" and isinstance(found, channel_errors)
                        raise found
                    return SimpleNamespace(message_count=found, consumer_count=2)

                channel = SimpleNamespace(queue_declare=declare, close=lambda: None, shut=False)
                made.channels.append(channel)
                return channel

            def collect(self, _: float) -> None:
                self.closed = True

            def release(self) -> None:
                self.closed = True

        one = One()
        one.channel_errors = channel_errors  # type: ignore[attr-defined]
        one.given = {"url": url, **given}  # type: ignore[attr-defined]
        self.opened.append(one)
        return one


def missing(driver: str) -> Exception:
    """As pyamqp, and as kombu's virtual transports say that there is no such queue."""
    if driver == "amqp":
        return NotFound("NOT_FOUND - no queue", (50, 10), "Channel.queue_declare")
    return VirtualError("NOT_FOUND - no queue", (50, 10), "Channel.queue_declare", "404")


def broker(made: Made, **options: Any) -> Any:
    return service.Broker("redis://:s3cret@h/0", options, made)


def series(text: str) -> dict[tuple[str, str], float]:
    """By name and queue, as a strict parser of OpenMetrics reads it."""
    return {
        (sample.name, sample.labels.get("queue_name", "")): sample.value
        for family in openmetrics.text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---- metrics ----


def test_what_is_published_is_openmetrics_and_the_older_format_whatever_a_queue_is_called() -> None:
    answer = service.Answer({"mail": 3, EVIL: 7}, {"mail": 2, EVIL: 0}, {})
    text = service.metrics(answer, NOON)
    expected = {
        ("celery_queue_length", "mail"): 3,
        ("celery_queue_length", EVIL): 7,
        ("celery_queue_consumers", "mail"): 2,
        ("celery_queue_consumers", EVIL): 0,
        ("plimsoll_queues_up", ""): 1,
        ("plimsoll_queues_last_success_timestamp_seconds", ""): NOON,
    }
    assert series(text) == expected
    old = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}
    assert {name for name, _ in expected} == set(old)
    assert old["celery_queue_length"].labels == {"queue_name": EVIL}


def test_of_a_broker_that_does_not_answer_there_are_no_old_lengths() -> None:
    assert series(service.metrics(None, NOON)) == {
        ("plimsoll_queues_up", ""): 0,
        ("plimsoll_queues_last_success_timestamp_seconds", ""): NOON,
    }
    assert series(service.metrics(None, None)) == {("plimsoll_queues_up", ""): 0}


def test_all_names_are_told_at_the_head_of_the_file() -> None:
    names = {name for name, _ in series(service.metrics(service.Answer({"a": 1}, {"a": 1}, {}), NOON))}
    assert names == set(re.findall(r"\b(?:celery_queue|plimsoll_queues)_\w+", service.__doc__))


# ---- the broker ----


def test_one_connection_and_one_channel_are_kept() -> None:
    made = Made("redis", {"mail": 3})
    one = broker(made)
    for _ in range(3):
        assert one.ask(["mail", "gone", "mail2"]).lengths == {"mail": 3, "gone": 0, "mail2": 0}
    assert (len(made.opened), len(made.channels), made.opened[0].closed) == (1, 1, False)
    one.close()
    assert made.opened[0].closed


def test_of_another_transport_the_channel_is_kept_after_a_queue_that_is_not_there() -> None:
    made = Made("filesystem", {"mail": 3})
    answer = broker(made).ask(["gone", "mail", "gone2"])
    assert answer == ({"gone": 0, "mail": 3, "gone2": 0}, {}, {}) and len(made.channels) == 1


def test_rabbitmq_gets_a_new_channel_after_a_queue_that_is_not_there() -> None:
    made = Made("amqp", {"mail": 3, "sales": 1})
    answer = broker(made).ask(["gone", "mail", "gone2", "sales"])
    assert answer.lengths == {"gone": 0, "mail": 3, "gone2": 0, "sales": 1}
    assert answer.consumers == {"gone": 0, "mail": 2, "gone2": 0, "sales": 2}
    assert (len(made.opened), len(made.channels)) == (1, 3)


def test_of_redis_nothing_is_said_of_consumers() -> None:
    assert broker(Made("redis", {"mail": 3})).ask(["mail"]).consumers == {}


@pytest.mark.parametrize("driver", ["amqp", "redis"])
def test_a_queue_that_is_refused_is_not_taken_for_an_empty_one(driver: str) -> None:
    refused = AccessRefused("ACCESS_REFUSED", (50, 10), "Channel.queue_declare")
    made = Made(driver, {"mail": refused, "sales": 1})
    answer = broker(made).ask(["mail", "sales"])
    assert answer.lengths == {"sales": 1} and answer.refused == {"mail": "AccessRefused"}
    with pytest.raises(service.Unanswered, match="it refuses: AccessRefused"):
        broker(made).ask(["mail"])


def test_a_connection_that_was_cut_between_two_rounds_is_made_anew_in_the_same_round() -> None:
    made = Made("redis", {"mail": 3})
    one = broker(made)
    one.ask(["mail"])
    made.opened[0].cut = ConnectionResetError(104, "Connection reset by peer")
    assert one.ask(["mail"]).lengths == {"mail": 3}
    assert [each.closed for each in made.opened] == [True, False]


def test_whatever_fails_is_one_error_and_leaves_no_connection_open() -> None:
    made = Made("redis", {"mail": 3})
    one = broker(made)
    for down in (ConnectionRefusedError(111, "Connection refused"), KeyError("x"), RuntimeError("redis://:s3cret@h")):
        made.down = down
        for _ in range(3):
            with pytest.raises(service.Unanswered) as caught:
                one.ask(["mail"])
            assert "s3cret" not in str(caught.value)
    assert len(made.opened) == 9 and all(each.closed for each in made.opened)
    made.down = None
    assert one.ask(["mail"]).lengths == {"mail": 3}


def test_an_answer_that_takes_longer_than_a_round_is_none(monkeypatch: Any) -> None:
    monkeypatch.setattr(service, "ROUND_S", -1)
    with pytest.raises(service.Unanswered, match="not within -1 s"):
        broker(Made("redis", {"mail": 3})).ask(["mail"])


@pytest.mark.parametrize(
    ("driver", "limits"),
    [
        ("redis", {"socket_timeout": 5, "socket_connect_timeout": 5}),
        ("amqp", {"read_timeout": 5, "write_timeout": 5}),
        ("sqs", {}),
    ],
)
def test_a_broker_that_is_silent_has_a_limit_and_what_the_user_sets_comes_before_it(driver: str, limits: Any) -> None:
    made = Made(driver, {"mail": 3})
    broker(made, global_keyprefix="shop:").ask(["mail"])
    assert made.opened[0].transport_options == {**limits, "global_keyprefix": "shop:"}
    assert made.opened[0].given["connect_timeout"] == 5
    broker(made, **dict.fromkeys(limits, 1)).ask(["mail"])
    assert made.opened[1].transport_options == dict.fromkeys(limits, 1)


@pytest.mark.parametrize("url", ["redis://:s3cret/s3cret@h/0", "nonsense://:s3cret@h", "amqp://a:s3cret@127.0.0.1:1//"])
def test_no_word_of_an_error_has_the_password(url: str, capsys: Any) -> None:
    """Of kombu's own, which quotes what it cannot read."""
    one = service.Exporter(service.Broker(url, {}, Connection), ["mail"], 15, lambda text: None)
    one.beat(NOON)
    said = capsys.readouterr().err
    assert "does not answer (" in said and "s3cret" not in said


def test_what_the_kernel_says_is_told_of_an_error_that_wraps_it() -> None:
    one = service.Broker("redis://:s3cret@127.0.0.1:1/0", {}, Connection)
    with pytest.raises(service.Unanswered) as caught:
        one.ask(["mail"])
    assert str(caught.value) == "ConnectionError: Connection refused"


# ---- rounds ----


def exporter(made: Made, queues: list[str], interval: float = 15) -> tuple[Any, list[str]]:
    published: list[str] = []
    return service.Exporter(broker(made), queues, interval, published.append), published


def test_a_broker_that_is_down_is_asked_less_and_less_and_as_often_as_before_once_it_is_back(capsys: Any) -> None:
    made = Made("redis", {"mail": 3})
    one, published = exporter(made, ["mail"])
    assert one.beat(NOON) == 15
    made.down = ConnectionRefusedError(111, "Connection refused")
    assert [one.beat(NOON + 15) for _ in range(5)] == [15, 30, 60, 60, 60]
    assert series(published[-1]) == {
        ("plimsoll_queues_up", ""): 0,
        ("plimsoll_queues_last_success_timestamp_seconds", ""): NOON,
    }
    made.down = None
    assert one.beat(NOON + 99) == 15
    assert series(published[-1])["plimsoll_queues_last_success_timestamp_seconds", ""] == NOON + 99
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "does not answer" in said[0] and said[1] == "queue_metrics: broker is well again"
    made.down = RuntimeError()
    assert [one.beat(NOON + 99) for _ in range(2)] == [15, 30], "anew"
    slow, _ = exporter(made, ["mail"], interval=300.0)
    assert [slow.beat(NOON) for _ in range(3)] == [300, 300, 300]
    slow.failures = 100_000
    assert slow.beat(NOON) == 300, "no number that is too large"


def test_a_queue_that_is_refused_is_named_once_and_has_no_series(capsys: Any) -> None:
    made = Made("amqp", {"mail": AccessRefused("no", (50, 10)), "sales": 1})
    one, published = exporter(made, ["mail", "sales"])
    one.beat(NOON)
    one.beat(NOON + 15)
    found = series(published[-1])
    assert ("celery_queue_length", "mail") not in found and found["celery_queue_length", "sales"] == 1
    assert found["plimsoll_queues_up", ""] == 1
    made.depths["mail"] = 4
    one.beat(NOON + 30)
    assert series(published[-1])["celery_queue_length", "mail"] == 4
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "queue_metrics: queue 'mail' is not counted (AccessRefused)",
        "queue_metrics: queue mail is well again",
    ]


def test_metrics_that_cannot_be_written_are_said_once_and_it_goes_on(tmp_path: Path, capsys: Any) -> None:
    publish = service.File(str(tmp_path / "none" / "plimsoll_queues.prom"))
    one = service.Exporter(broker(Made("redis", {"mail": 3})), ["mail"], 15, publish)
    assert [one.beat(NOON), one.beat(NOON)] == [15, 15]
    assert capsys.readouterr().err.count("metrics are not written") == 1


def test_the_journal_gets_a_priority(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    service.say("a\nb", 4)
    assert capsys.readouterr().err == "<4>queue_metrics: a b\n"


# ---- where ----


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def get(port: int, request: str, timeout: float = 20) -> tuple[str, str, str]:
    """Status line, headers and body, all that comes until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(request.encode())
        answer = b""
        while more := connection.recv(65536):
            answer += more
    head, _, body = answer.decode().partition("\r\n\r\n")
    status, _, headers = head.partition("\r\n")
    return status, headers, body


SCRAPE = "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text;version=1.0.0,*/*;q=0.1\r\n\r\n"


def test_the_last_answer_is_served_in_the_format_that_is_asked_for() -> None:
    port = free_port()
    page = service.Page(f"127.0.0.1:{port}", [])
    assert get(port, SCRAPE)[2] == "# EOF\n", "nothing is known yet"
    text = service.metrics(service.Answer({EVIL: 7}, {}, {}), NOON)
    page(text)
    status, headers, body = get(port, SCRAPE)
    assert status == "HTTP/1.1 200 OK" and body == text
    assert "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n" in headers + "\r\n"
    assert f"Content-Length: {len(text.encode())}\r\n" in headers + "\r\n"
    for request in ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", "GET /metrics HTTP/1.1\r\nAccept: text/plain\r\n\r\n"):
        status, headers, body = get(port, request)
        assert status == "HTTP/1.1 200 OK" and body == text and "Content-Type: text/plain; version=0.0.4" in headers
    with pytest.raises(OSError, match="in use"):
        service.Page(f"127.0.0.1:{port}", [])


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET / HTTP/1.1", "404 Not Found"),
        ("GET /metrics/../etc/passwd HTTP/1.1", "404 Not Found"),
        ("POST /metrics HTTP/1.1", "405 Method Not Allowed"),
        ("HEAD /metrics HTTP/1.1", "405 Method Not Allowed"),
        ("GET /metrics", "400 Bad Request"),
        ("\0\1\2", "400 Bad Request"),
    ],
)
def test_nothing_else_is_served(request_line: str, status: str) -> None:
    port = free_port()
    service.Page(f"127.0.0.1:{port}", [])("secret\n# EOF\n")
    answer = get(port, f"{request_line}\r\n\r\n")
    assert (answer[0], answer[2]) == (f"HTTP/1.1 {status}", "")
    assert get(port, SCRAPE)[0] == "HTTP/1.1 200 OK"


def test_a_request_that_drips_or_is_long_holds_up_no_scrape_beyond_its_limit(monkeypatch: Any) -> None:
    """Each byte comes well within the limit of one; the limit is of the whole."""
    monkeypatch.setattr(service, "REQUEST_S", 1.0)
    port = free_port()
    threads = threading.active_count()
    service.Page(f"127.0.0.1:{port}", [])
    drip = socket.create_connection(("127.0.0.1", port))
    stop = threading.Event()

    def dripping() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.2):
                drip.sendall(b"G")

    threading.Thread(target=dripping, daemon=True).start()
    long = socket.create_connection(("127.0.0.1", port))
    with contextlib.suppress(OSError):
        long.sendall(b"GET /" + b"x" * 100_000)
    began = time.monotonic()
    assert get(port, SCRAPE)[0] == "HTTP/1.1 200 OK"
    took = time.monotonic() - began
    stop.set()
    assert 0.5 < took < 5
    assert threading.active_count() <= threads + 2
    drip.close()
    long.close()


def test_whoever_may_not_ask_gets_no_byte(monkeypatch: Any) -> None:
    allowed = [service.network("10.0.0.0/24"), service.network("10.1.0.9"), service.network("fd00::/64")]
    port = free_port()
    page = service.Page(f"127.0.0.1:{port}", allowed)
    may = ["10.0.0.9", "10.1.0.9", "fd00::7", "fd00::7%eth0", "127.0.0.1", "127.8.0.1", "::1"]
    may_not = ["10.0.1.9", "10.1.0.8", "192.168.0.1", "fd00:0:0:1::7", "fe80::1%eth0", "nonsense"]
    assert [peer for peer in may if not page._may(peer)] == [] and [peer for peer in may_not if page._may(peer)] == []
    # Each on its own line: a network of an address within it.
    assert str(service.network("10.0.0.5/24")) == "10.0.0.0/24"
    monkeypatch.setattr(page, "allowed", allowed)
    with contextlib.suppress(ConnectionResetError):
        assert get(port, SCRAPE) == ("", "", "")


def test_it_listens_on_ipv6() -> None:
    port = free_port()
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    service.Page(f"[::1]:{port}", [])
    with socket.create_connection(("::1", port), timeout=10) as connection:
        connection.sendall(SCRAPE.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_a_file_is_whole_and_for_others_to_read(tmp_path: Path) -> None:
    path = tmp_path / "plimsoll_queues.prom"
    before = os.umask(0o077)
    try:
        publish = service.File(str(path))
        publish("old\n# EOF\n")
        publish("new\n# EOF\n")
        now = os.umask(0o077)
    finally:
        os.umask(before)
    assert now == 0o077
    assert path.read_text() == "new\n# EOF\n" and path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


# ---- the service ----


def test_systemd_is_told_and_a_signal_ends_it(tmp_path: Path, monkeypatch: Any) -> None:
    """READY comes before the first answer, and WATCHDOG for as long as it waits."""
    at = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(at))
        channel.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(at))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        told: list[str] = []
        stop = {signal.SIGUSR1}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stop)

        def beat(now: float) -> float:
            told.append(channel.recv(100).decode())
            assert abs(now - time.time()) < 5
            threading.Timer(0.35, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            return 60

        try:
            began = time.monotonic()
            service.run(beat, stop)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert time.monotonic() - began < 10
        channel.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(channel.recv(100).decode())
    assert told[0] == "READY=1" and told[-1] == "STOPPING=1" and told.count("WATCHDOG=1") >= 4
    assert set(told) == {"READY=1", "WATCHDOG=1", "STOPPING=1"}


def test_the_watchdog_is_fed_between_two_queues(tmp_path: Path, monkeypatch: Any) -> None:
    at = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(at))
        channel.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(at))
        broker(Made("redis", {})).ask(["a", "b", "c"])
        assert [channel.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3


def queues_file(tmp_path: Path, **given: Any) -> str:
    path = tmp_path / "queues.json"
    path.write_text(json.dumps(given))
    return str(path)


def test_the_file_of_queues(tmp_path: Path) -> None:
    path = Path(queues_file(tmp_path, queues=["a", EVIL, "a"], transport_options={"sep": ":"}))
    assert service.load(path) == (["a", EVIL], {"sep": ":"})
    assert service.load(Path(queues_file(tmp_path, queues=["a"]))) == (["a"], {})
    for wrong in ({}, {"queues": []}, {"queues": "a"}, {"queues": [1]}, {"queues": [""]}):
        with pytest.raises(ValueError, match="queues, a list of names"):
            service.load(Path(queues_file(tmp_path, **wrong)))
    with pytest.raises(ValueError, match="transport_options"):
        service.load(Path(queues_file(tmp_path, queues=["a"], transport_options=[])))


@pytest.mark.parametrize(
    "argument",
    ["--metrics=9254", "--metrics=host:", "--metrics=127.0.0.1:99999", "--metrics=queues.prom", "--interval=0"],
)
def test_arguments_that_are_none_are_refused(argument: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        service.main([f"--queues={queues_file(tmp_path, queues=['a'])}", "--metrics=127.0.0.1:1", argument])
    assert "error: argument" in capsys.readouterr().err


def test_why_it_does_not_start_is_said_in_a_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    good = queues_file(tmp_path, queues=["a"])
    (tmp_path / "wrong.json").write_text("{")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    try:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for arguments, words in [
                ([f"--queues={good}", f"--metrics={tmp_path}/x.prom"], "CELERY_BROKER_URL is not set"),
                ([f"--queues={tmp_path}/none", f"--metrics={tmp_path}/x.prom"], "No such file"),
                ([f"--queues={tmp_path}/wrong.json", f"--metrics={tmp_path}/x.prom"], "wrong.json: Expecting"),
                ([f"--queues={good}", f"--metrics=127.0.0.1:{port}"], f"127.0.0.1:{port}: Address already in use"),
            ]:
                assert service.main(arguments) == 1
                said = capsys.readouterr().err
                assert words in said and said.count("\n") == 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
