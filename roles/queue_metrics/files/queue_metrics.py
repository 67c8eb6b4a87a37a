#!/usr/bin/env python3
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Asks the broker how many messages wait in each queue, and shows it to Prometheus. One file, Python 3.9 or later, with
the kombu of the Celery application, in whose venv it runs.

The broker's URL is in the environment, CELERY_BROKER_URL. --queues names a file of JSON,
{"queues": ["celery"], "transport_options": {}}, the second of which are Celery's broker_transport_options. --metrics
serves the last answer on ADDRESS:PORT, GET /metrics alone, or writes it to a file for node_exporter:

celery_queue_length {queue_name}     messages that wait; of a queue that is not there 0, as it is empty
celery_queue_consumers {queue_name}  what consumes it, where the broker knows: RabbitMQ does, Redis does not
plimsoll_queues_up                   1, or 0 where the broker did not answer; then there is neither of the above
plimsoll_queues_last_success_timestamp_seconds   when it last answered

A queue that the broker refuses to count has no series, and is named once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import ipaddress
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

# Of a connection, and of an answer. redis-py tries a few times by itself, each with this limit.
PATIENCE_S = 5.0
# All queues together; what is slower than this does not answer.
ROUND_S = 30.0
# Between two attempts at a broker that is down, at most; or the interval, where that is longer.
LONGEST_PAUSE_S = 60.0
# A scrape asks within this, or not at all; and in so many bytes.
REQUEST_S, LONGEST_REQUEST = 5.0, 8192
# What kombu's transports call it; others have no such limit, or no such name for it.
LIMITS: dict[str, dict[str, float]] = {
    "redis": {"socket_timeout": PATIENCE_S, "socket_connect_timeout": PATIENCE_S},
    "amqp": {"read_timeout": PATIENCE_S, "write_timeout": PATIENCE_S},
}
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
LOOPBACK = ("127.0.0.0/8", "::1/128")

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def say(text: str, priority: int = 6) -> None:
    """One line on stderr; for the journal with a priority of syslog's: 3 an error, 4 a warning, 6 a word."""
    level = f"<{priority}>" if "JOURNAL_STREAM" in os.environ else ""
    print(f"{level}queue_metrics: {' '.join(text.split())}", file=sys.stderr, flush=True)


def notify(state: str) -> None:
    """Tell systemd, as sd_notify(3) does; without systemd nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


# ---- the broker ----


class Answer(NamedTuple):
    """What the broker said of the queues. refused has the kind of error of those that it would not count."""

    lengths: dict[str, int]
    consumers: dict[str, int]
    refused: dict[str, str]


class Unanswered(Exception):
    """The broker did not answer; the message says why, with no secret in it."""


def reason(error: BaseException) -> str:
    """Kind of an error, and what the kernel said. Never its own text, which may have the URL in it, or a part of it."""
    # kombu's own has the one that it is about as its cause.
    name, seen = type(error.__cause__ or error).__name__, 0
    chain: BaseException | None = error
    while chain is not None and seen < 10:
        if isinstance(chain, OSError) and chain.strerror:
            return f"{name}: {chain.strerror}"
        chain, seen = chain.__cause__ or chain.__context__, seen + 1
    return name


class Broker:
    """One connection, which is kept, and made anew when it fails."""

    def __init__(self, url: str, options: Mapping[str, Any], connect: Callable[..., Any]) -> None:
        """connect is kombu.Connection."""
        self.url, self.options, self.connect = url, options, connect
        self.connection: Any = None
        self.channel: Any = None

    def ask(self, queues: Iterable[str]) -> Answer:
        """Raises Unanswered, and nothing else. Whatever fails, the connection is closed."""
        queues = list(queues)
        # One that was kept may have been cut since, as by a restart of the broker, which is none of our business.
        for again in (self.connection is not None, False):
            try:
                return self._count(queues)
            except Exception as error:  # noqa: BLE001 - a broker that is down must not end the service; told by beat()
                self.close()
                if not again:
                    raise (error if isinstance(error, Unanswered) else Unanswered(reason(error))) from None
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Without a word to the broker where it does not listen any more."""
        connection, self.connection, self.channel = self.connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect(PATIENCE_S)
            with contextlib.suppress(Exception):
                connection.release()
            del connection
            # What never became a connection holds descriptors in cycles, and this program makes too little garbage for
            # them to be found soon.
            gc.collect()

    def _open(self) -> Any:
        # Kept from here on, so that it is closed whatever fails.
        self.connection = connection = self.connect(self.url, connect_timeout=PATIENCE_S, heartbeat=0)
        # transport_options must be there before the transport connects.
        limits = LIMITS.get(connection.transport.driver_type, {})
        connection.transport_options = {**limits, **self.options}
        # Each of several brokers once, without a pause.
        connection.ensure_connection(max_retries=max(1, len(connection.alt)), interval_start=0)
        return connection

    def _count(self, queues: Sequence[str]) -> Answer:
        connection = self.connection or self._open()
        # RabbitMQ alone closes a channel on which a queue was asked for that is not there, and knows of consumers.
        rabbit = connection.transport.driver_type == "amqp"
        # Of Redis a queue is a list, and to declare one makes nothing. A passive declaration asks EXISTS first, without
        # the application's global_keyprefix (kombu 5.7), and so takes each queue for one that is not there.
        passive = connection.transport.driver_type != "redis"
        answer = Answer({}, {}, {})
        deadline = time.monotonic() + ROUND_S
        for queue in queues:
            if time.monotonic() > deadline:
                raise Unanswered(f"not within {ROUND_S:g} s for all queues")
            notify("WATCHDOG=1")
            # Kept too: of Redis each channel has connections of its own.
            if self.channel is None:
                self.channel = connection.channel()
            try:
                found = self.channel.queue_declare(queue=queue, passive=passive)
            except connection.channel_errors as error:
                if rabbit:
                    channel, self.channel = self.channel, None
                    with contextlib.suppress(*connection.channel_errors):
                        channel.close()
                # Others are no sign of an empty queue: a permission that is missing, a key of another type.
                if str(getattr(error, "reply_code", "")) != "404":
                    answer.refused[queue] = reason(error)
                    continue
                length, consumers = 0, 0
            else:
                length, consumers = int(found.message_count), int(found.consumer_count or 0)
            answer.lengths[queue] = length
            if rabbit:
                answer.consumers[queue] = consumers
        if answer.refused and not answer.lengths:
            raise Unanswered(f"it refuses: {next(iter(answer.refused.values()))}")
        return answer


# ---- metrics ----


def escaped(text: str) -> str:
    """As the value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def metrics(answer: Answer | None, succeeded: float | None) -> str:
    """OpenMetrics; of gauges alone, which the older text format and node_exporter's textfile collector read too."""
    lines: list[str] = []

    def family(name: str, about: str, values: Mapping[str, float]) -> None:
        if values:
            lines.extend([f"# TYPE {name} gauge", f"# HELP {name} {about}"])
            lines.extend(f"{name}{labels} {value}" for labels, value in values.items())

    def by_queue(values: Mapping[str, int]) -> dict[str, float]:
        return {f'{{queue_name="{escaped(queue)}"}}': value for queue, value in values.items()}

    family("celery_queue_length", "Messages that wait.", by_queue(answer.lengths if answer else {}))
    family("celery_queue_consumers", "What consumes it.", by_queue(answer.consumers if answer else {}))
    family("plimsoll_queues_up", "1 where the broker answered.", {"": int(answer is not None)})
    if succeeded is not None:
        name = "plimsoll_queues_last_success_timestamp_seconds"
        family(name, "When the broker last answered.", {"": succeeded})
    return "\n".join([*lines, "# EOF", ""])


class Page:
    """Serves a text at ADDRESS:PORT: GET /metrics, one request after the other, in a thread of its own.

    No library's server, as those wait for a slow request for as long as each of its bytes takes. Here REQUEST_S is all.
    """

    def __init__(self, where: str, allowed: Sequence[Network]) -> None:
        """Raises OSError where it cannot listen. allowed may ask, and this host itself."""
        host, _, port = where.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        self.listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=16)
        self.allowed = [*allowed, *map(ipaddress.ip_network, LOOPBACK)]
        # Nothing is known before the first answer, and so nothing is said.
        self.body = b"# EOF\n"
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, text: str) -> None:
        self.body = text.encode(errors="replace")

    def _serve(self) -> None:
        while True:
            try:
                connection, peer = self.listener.accept()
            except OSError:
                # Too many open files, say: of another's making, and over some time.
                time.sleep(1)
                continue
            # Whoever hung up is none of ours.
            with connection, contextlib.suppress(OSError):
                if self._may(peer[0]):
                    self._answer(connection)

    def _may(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return any(address in network for network in self.allowed)

    def _answer(self, connection: socket.socket) -> None:
        deadline, request = time.monotonic() + REQUEST_S, b""
        while b"\r\n\r\n" not in request:
            left = deadline - time.monotonic()
            if left <= 0 or len(request) > LONGEST_REQUEST:
                return
            connection.settimeout(left)
            more = connection.recv(4096)
            if not more:
                return
            request += more
        first, _, headers = request.partition(b"\r\n")
        asked = re.fullmatch(rb"(\S+) (\S+) HTTP/1\.[01]", first)
        status, body, kind = "200 OK", self.body, PLAIN
        if not asked or asked[1] != b"GET":
            status, body = ("405 Method Not Allowed" if asked else "400 Bad Request"), b""
        elif asked[2].partition(b"?")[0] != b"/metrics":
            status, body = "404 Not Found", b""
        elif re.search(rb"(?im)^accept:.*application/openmetrics-text", headers):
            kind = OPENMETRICS
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        # Within that limit as a whole.
        connection.sendall(head.encode() + body)


class File:
    """Writes a text to a file, whole, which node_exporter, another user, may read."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __call__(self, text: str) -> None:
        """Raises OSError."""
        scratch = self.path.with_name(f".{self.path.name}.tmp")
        before = os.umask(0o022)
        try:
            scratch.write_bytes(text.encode(errors="replace"))
        finally:
            os.umask(before)
        scratch.replace(self.path)


# ---- the service ----


class Exporter:
    """beat() is one round: ask, publish, and how long to wait for the next."""

    def __init__(self, broker: Broker, queues: Sequence[str], interval: float, publish: Callable[[str], None]) -> None:
        self.broker, self.queues, self.interval, self.publish = broker, queues, interval, publish
        self.succeeded: float | None = None
        self.failures = 0
        self._said: dict[str, str] = {}

    def beat(self, now: float) -> float:
        pause = self.interval
        answer: Answer | None = None
        try:
            answer = self.broker.ask(self.queues)
            self.succeeded, self.failures = now, 0
            self._tell("broker", "")
        except Unanswered as error:
            longest = max(self.interval, LONGEST_PAUSE_S)
            pause = min(self.interval * 2 ** min(self.failures, 10), longest)
            self.failures += 1
            self._tell(
                "broker", f"the broker does not answer ({error}); it is asked again, every {longest:g} s at least"
            )
        if answer:
            for queue in self.queues:
                kind = answer.refused.get(queue, "")
                self._tell(f"queue {queue}", f"queue {queue!r} is not counted ({kind})" if kind else "")
        try:
            self.publish(metrics(answer, self.succeeded))
            self._tell("metrics", "")
        except OSError as error:
            self._tell("metrics", f"{error.filename or '--metrics'}: {error.strerror}; metrics are not written")
        return pause

    def _tell(self, what: str, trouble: str) -> None:
        """Once as it begins, or becomes another, and once as it is over."""
        before = self._said.pop(what, "")
        if trouble:
            self._said[what] = trouble
            if trouble != before:
                say(trouble, 4)
        elif before:
            say(f"{what} is well again")


def run(beat: Callable[[float], float], stop: set[signal.Signals]) -> None:
    """Beat, with the Unix time, and wait for as long as it says, until one of the blocked signals in stop arrives."""
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 2
    # Before the first answer: whether the broker is there is not what a deploy waits for.
    notify("READY=1")
    while True:
        due = time.monotonic() + beat(time.time())
        while True:
            notify("WATCHDOG=1")
            left = max(0.0, due - time.monotonic())
            if signal.sigtimedwait(stop, min(left, watchdog) if watchdog else left):
                notify("STOPPING=1")
                return
            if time.monotonic() >= due:
                break


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def network(text: str) -> Network:
    """Of an address within it, too."""
    return ipaddress.ip_network(text, strict=False)


def place(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not text.startswith("/") and not (host and port.isdigit() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"'{text}' is neither ADDRESS:PORT nor the absolute path of a file")
    return text


def load(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Queues and transport options. Raises OSError, and ValueError with what is wrong."""
    given = json.loads(path.read_text(encoding="utf-8"))
    queues = given.get("queues") if isinstance(given, dict) else None
    if not isinstance(queues, list) or not queues or not all(isinstance(one, str) and one for one in queues):
        raise ValueError("it must have queues, a list of names")
    options = given.get("transport_options", {})
    if not isinstance(options, dict):
        raise ValueError("transport_options must be an object")
    return list(dict.fromkeys(queues)), options


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="queue_metrics", description="Shows Prometheus how long Celery's queues are.")
    add = parser.add_argument
    add("--queues", metavar="FILE", type=Path, required=True, help="JSON with the names of the queues")
    add("--metrics", metavar="WHERE", type=place, required=True, help="ADDRESS:PORT, or FILE.prom for node_exporter")
    who = "who may ask ADDRESS:PORT beside this host itself: an address or a network"
    add("--from", metavar="NET", dest="allowed", type=network, action="append", default=[], help=who)
    add("--interval", metavar="SECONDS", type=seconds, default=15.0, help="default: 15")
    options = parser.parse_args(arguments)
    url = os.environ.get("CELERY_BROKER_URL", "")

    # Blocked and waited for: no signal comes in the middle of a write. The page's thread has them blocked, too.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        from kombu import Connection

        queues, transport = load(options.queues)
        publish = File(options.metrics) if options.metrics.startswith("/") else Page(options.metrics, options.allowed)
    except ImportError:
        say("there is no kombu for this Python; run it with that of the application's venv", 3)
        return 1
    except ValueError as error:
        say(f"{options.queues}: {error}", 3)
        return 1
    except OSError as error:
        say(f"{error.filename or options.metrics}: {error.strerror}", 3)
        return 1
    if not url:
        say("CELERY_BROKER_URL is not set", 3)
        return 1
    broker = Broker(url, transport, Connection)
    with contextlib.closing(broker):
        run(Exporter(broker, queues, options.interval, publish).beat, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
