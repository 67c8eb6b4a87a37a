"""The service that counts what waits in queues, as a process of its own, on real brokers: a folder, and Redis."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from prometheus_client.openmetrics.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "roles" / "queue_metrics" / "files" / "queue_metrics.py"
PATIENCE_S = 60.0


def wait_for(what: str, until: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := until()):
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s"
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Service:
    """The program as its unit starts it, -I and all."""

    def __init__(self, folder: Path, url: str, queues: list[str], **options: Any) -> None:
        path = folder / "queues.json"
        path.write_text(json.dumps({"queues": queues, "transport_options": options}))
        self.port = free_port()
        arguments = [f"--queues={path}", f"--metrics=127.0.0.1:{self.port}", "--interval=0.2"]
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / "notify"))
        self.notify.settimeout(PATIENCE_S)
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(SCRIPT), *arguments],
            env={"CELERY_BROKER_URL": url, "NOTIFY_SOCKET": str(folder / "notify"), "PYTHONPATH": "/nonexistent"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.notify.recv(100) == b"READY=1"
        # Nobody reads it any more, and a datagram that finds no room would wait.
        self.notify.close()

    def scrape(self) -> dict[tuple[str, str], float]:
        with urllib.request.urlopen(
            urllib.request.Request(
                f"http://127.0.0.1:{self.port}/metrics", headers={"Accept": "application/openmetrics-text"}
            ),
            timeout=PATIENCE_S,
        ) as answer:
            text = answer.read().decode()
        return {
            (sample.name.removeprefix("celery_queue_").removeprefix("plimsoll_queues_"), *sample.labels.values()): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "timestamp" not in sample.name
        }

    def becomes(self, expected: dict[tuple[str, ...], float]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.scrape()) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def sockets(self) -> int:
        """What is gone in between is none."""
        found = 0
        for one in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += str(one.readlink()).startswith("socket:")
        return found

    def end(self) -> str:
        """What it said. SIGTERM ends it well."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=PATIENCE_S)[1]
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def one(*arguments: Any, **options: Any) -> Service:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        made.append(Service(folder, *arguments, **options))
        return made[-1]

    yield one
    for each in made:
        each.process.kill()
        each.process.communicate()


def publish(url: str, queue: str, count: int, options: dict[str, Any] | None = None, priority: int = 0) -> None:
    with Connection(url, transport_options=options or {}) as connection, connection.SimpleQueue(queue) as simple:
        for _ in range(count):
            simple.put({"x": 1}, priority=priority)


# ---- a folder ----


def test_messages_of_a_celery_application_are_counted_in_a_folder(
    tmp_path: Path, start: Callable[..., Service]
) -> None:
    folder = tmp_path / "queue"
    folder.mkdir()
    names = ("data_folder_in", "data_folder_out", "control_folder")
    options = dict.fromkeys(names, str(folder))
    program = f"""
from celery import Celery
app = Celery("shop", broker="filesystem://")
app.conf.broker_transport_options = {options!r}
for number in range(4):
    app.send_task("shop.buy", queue="mail" if number else "sales")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    service = start("filesystem://", ["mail", "sales", "none"], **options)
    service.becomes({("length", "mail"): 3, ("length", "sales"): 1, ("length", "none"): 0, ("up",): 1})
    publish("filesystem://", "mail", 2, options)
    service.becomes({("length", "mail"): 5, ("length", "sales"): 1, ("length", "none"): 0, ("up",): 1})
    shutil.move(folder, tmp_path / "gone")
    service.becomes({("up",): 0})
    shutil.move(tmp_path / "gone", folder)
    service.becomes({("length", "mail"): 5, ("length", "sales"): 1, ("length", "none"): 0, ("up",): 1})
    said = service.end()
    assert "No such file or directory" in said and "well again" in said and said.count("\n") == 2


# ---- no broker ----


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_is_not_there_costs_neither_the_service_nor_descriptors(
    start: Callable[..., Service], scheme: str
) -> None:
    service = start(f"{scheme}://user:s3cret@127.0.0.1:{free_port()}/0", ["mail"])
    service.becomes({("up",): 0})
    # The first is the thread's own socket and what Python keeps; then it stays.
    time.sleep(2)
    first = service.descriptors()
    time.sleep(4)
    assert service.descriptors() <= first + 2
    assert service.scrape() == {("up",): 0}
    command = Path(f"/proc/{service.process.pid}/cmdline").read_bytes()
    said = service.end()
    assert b"s3cret" not in command and "s3cret" not in said
    assert "Connection refused" in said and said.count("\n") == 1


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_is_silent_is_given_up_in_time(start: Callable[..., Service], scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        began = time.monotonic()
        service = start(f"{scheme}://user:s3cret@127.0.0.1:{hole.getsockname()[1]}/0", ["mail"])
        assert time.monotonic() - began < 30, "it is ready without a broker"
        service.becomes({("up",): 0})
        assert time.monotonic() - began < 60
    service.process.kill()


# ---- Redis ----


class Redis:
    """A server of its own on the loopback, which may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://:s3cret@127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--requirepass", "s3cret"]
        persistence = ["--appendonly", "yes", "--dir", str(self.folder)]
        self.server = subprocess.Popen(["redis-server", *options, *persistence], stdout=subprocess.DEVNULL)
        wait_for("Redis", self.answers)

    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.port, password="s3cret")

    def answers(self) -> bool:
        with contextlib.suppress(Exception):
            return bool(self.client().ping())
        return False

    def stop(self) -> None:
        self.server.terminate()
        self.server.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not on this machine")
    (tmp_path / "redis").mkdir()
    one = Redis(tmp_path / "redis")
    yield one
    one.stop()


def test_all_priorities_of_a_queue_in_redis_are_counted(redis: Redis, start: Callable[..., Service]) -> None:
    for priority in range(10):
        publish(redis.url, "mail", priority + 1, priority=priority)
    assert len([key for key in redis.client().scan_iter() if key.startswith(b"mail\x06\x16")]) == 3, (
        "lists of priorities"
    )
    publish(redis.url, 'a b"c\\', 2)
    service = start(redis.url, ["mail", 'a b"c\\', "none"])
    service.becomes({("length", "mail"): 55, ("length", 'a b"c\\'): 2, ("length", "none"): 0, ("up",): 1})
    redis.client().flushall()
    service.becomes({("length", "mail"): 0, ("length", 'a b"c\\'): 0, ("length", "none"): 0, ("up",): 1})
    assert list(redis.client().scan_iter()) == [], "to ask makes nothing"
    assert service.end() == ""


def test_the_connection_to_redis_is_kept_and_survives_a_restart(redis: Redis, start: Callable[..., Service]) -> None:
    publish(redis.url, "mail", 3)
    service = start(redis.url, ["mail", "none"])
    well = {("length", "mail"): 3, ("length", "none"): 0, ("up",): 1}
    service.becomes(well)
    accepted = redis.client().info("stats")["total_connections_received"]
    time.sleep(2)
    # Ours ask by a new one each time.
    assert redis.client().info("stats")["total_connections_received"] - accepted <= 2
    held, sockets = service.descriptors(), service.sockets()
    # What it listens on, and those of one channel of kombu's.
    assert sockets <= 3
    for _ in range(4):
        redis.stop()
        service.becomes({("up",): 0})
        redis.start()
        service.becomes(well)
        wait_for("as many sockets as before", lambda: service.sockets() == sockets)
    assert service.descriptors() <= held + 2
    said = service.end()
    assert "s3cret" not in said and said.count("well again") == 4


def test_what_redis_refuses_is_no_empty_queue(redis: Redis, start: Callable[..., Service]) -> None:
    publish(redis.url, "mail", 3)
    redis.client().set("odd", "no list")
    service = start(redis.url, ["mail", "odd"])
    service.becomes({("length", "mail"): 3, ("up",): 1})
    assert "queue 'odd' is not counted (ResponseError)" in service.end()
    wrong = start(redis.url.replace("s3cret", "wr0ng"), ["mail"])
    wrong.becomes({("up",): 0})
    said = wrong.end()
    assert "wr0ng" not in said and re.search(r"does not answer \(\w*(Authentication|Response)Error\)", said), said


def test_transport_options_of_the_application_hold(redis: Redis, start: Callable[..., Service]) -> None:
    options = {"global_keyprefix": "shop:", "priority_steps": list(range(10)), "sep": ":"}
    for priority in range(10):
        publish(redis.url, "mail", 1, options, priority)
    assert redis.client().llen("shop:mail:7") == 1
    start(redis.url, ["mail"], **options).becomes({("length", "mail"): 10, ("up",): 1})
    start(redis.url, ["mail"]).becomes({("length", "mail"): 0, ("up",): 1})
