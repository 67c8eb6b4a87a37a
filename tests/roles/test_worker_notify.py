"""What tells systemd how a worker is, in real Celery workers, loaded by the environment and by nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "roles" / "celery_worker" / "files"
BOOTSTRAP = ROOT / "roles" / "tracemalloc_bootstrap" / "files"
PATIENCE_S = 60.0
# Without a tick for this long, a loop hangs.
STALE_S = 3.0

APP = """
import socket
import time
from pathlib import Path

import kombu.transport
from celery import Celery, signals
from kombu.transport import filesystem


class Polled(filesystem.Transport):
    '''Read by the event loop of Celery's that Redis and AMQP are read by, which a folder is not by itself.'''

    implements = filesystem.Transport.implements.extend(asynchronous=True)

    def register_with_event_loop(self, connection, loop):
        loop.call_repeatedly(0.05, self.poll, connection)

    def poll(self, connection):
        try:
            self.drain_events(connection, timeout=0)
        except socket.timeout:
            pass


kombu.transport.TRANSPORT_ALIASES["polled"] = "app:Polled"
app = Celery("app")
app.config_from_object("celeryconfig")


@app.task(name="shop.quick", acks_late=True)
def quick():
    pass


@app.task(name="shop.long", acks_late=True)
def long():
    Path("long.started").touch()
    while not Path("long.end").exists():
        time.sleep(0.05)
    Path("long.ended").touch()


@signals.worker_ready.connect
def on_ready(sender=None, **_):
    sender.timer.call_repeatedly(0.2, maybe_hang, (sender,))


def maybe_hang(consumer):
    if Path("hang").exists():
        consumer.call_soon(the_loop_hangs)


def the_loop_hangs():
    while True:
        time.sleep(1)
"""


class Worker:
    """A worker in a folder of its own, which is its broker too; and systemd's end of its notifications."""

    numbers = itertools.count()

    def __init__(
        self, folder: Path, pool: str, broker: str = "polled://", systemd: bool = True, **environ: str
    ) -> None:
        self.folder = folder
        self.heard: list[str] = []
        self.waited = 0
        for name in ("queue", "sending", "control"):
            (folder / name).mkdir(parents=True)
        options = {
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.05,
        }
        config = {
            "broker_url": broker,
            "broker_transport_options": options if broker != NO_BROKER else {},
            "broker_connection_retry_on_startup": True,
            "worker_prefetch_multiplier": 4,
            "task_ignore_result": True,
        }
        (folder / "celeryconfig.py").write_text("".join(f"{name} = {value!r}\n" for name, value in config.items()))
        (folder / "app.py").write_text(APP)
        self.sender = Celery("sender", set_as_current=False)
        sending = {"broker_transport_options": options | {"data_folder_out": str(folder / "sending")}}
        self.sender.conf.update(config | sending | {"broker_url": "filesystem://"})
        address = f"@plimsoll-test-{os.getpid()}-{next(self.numbers)}"
        self.systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.systemd.bind("\0" + address[1:])
        unit = {
            "PYTHONPATH": f"{FILES}:{BOOTSTRAP}",
            "CELERY_WORKER_INCLUDE": "plimsoll_notify,plimsoll_bootstrap",
            "WATCHDOG_USEC": "1200000",
            **({"NOTIFY_SOCKET": address} if systemd else {}),
            **environ,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "PLIMSOLL_"))}
        command = ["celery", "-A", "app", "worker", f"--pool={pool}", "--concurrency=1", "--loglevel=INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, *quiet],
                cwd=folder,
                env=inherited | unit,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def hear(self) -> list[str]:
        """All that systemd was told until now."""
        while select.select([self.systemd], [], [], 0)[0]:
            self.heard += self.systemd.recv(4096).decode().split("\n")
        return self.heard

    def wait(self, what: str, until: Callable[[], Any], ends: bool = False) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := until()):
            told = f"systemd was told {self.hear()[-20:]}; the log ends with:\n{self.log()[-3000:]}"
            assert ends or self.process.poll() is None, f"the worker ended before there was {what}; {told}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s; {told}"
            time.sleep(0.05)
        return found

    def wait_to_hear(self, beginning: str, times: int = 1) -> None:
        """So often after what was waited for last."""

        def found() -> list[int]:
            heard = enumerate(self.hear())
            return [number for number, one in heard if number >= self.waited and one.startswith(beginning)]

        self.waited = self.wait(beginning, lambda: found()[times - 1 : times])[0] + 1

    def wait_for_file(self, name: str) -> None:
        self.wait(name, (self.folder / name).exists)

    def wait_for_log(self, text: str) -> None:
        self.wait(text, lambda: text in self.log())

    def wait_for_end(self) -> int:
        self.wait("end", lambda: self.process.poll() is not None, ends=True)
        self.hear()
        return self.process.returncode

    def send(self, task: str) -> None:
        self.sender.send_task(task)
        # Written elsewhere and moved here whole: the transport reads what it finds, be it half a message.
        for message in sorted((self.folder / "sending").iterdir()):
            message.rename(self.folder / "queue" / message.name)

    def waiting(self) -> list[str]:
        """The tasks whose messages are at the broker."""
        return sorted(json.loads(path.read_text())["headers"]["task"] for path in (self.folder / "queue").iterdir())

    def kill(self) -> None:
        """Whatever came of the test, of the session that was started here nothing stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        self.systemd.close()


# Where nobody listens.
NO_BROKER = "pyamqp://127.0.0.1:1//"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def starting(*args: Any, **environ: Any) -> Worker:
        started.append(Worker(tmp_path / str(len(started)), *args, **environ))
        return started[-1]

    yield starting
    for worker in started:
        worker.kill()


def test_a_worker_says_that_it_is_ready_lives_and_stops_be_it_idle_or_busy(start: Callable[..., Worker]) -> None:
    """The task of a solo worker holds its loop, for longer than one may hang, and so while it stops."""
    idle = [start("prefork"), start("threads", "filesystem://")]
    busy = [start("solo", broker, PLIMSOLL_STOP_TIMEOUT_S="200") for broker in ("polled://", "filesystem://")]
    workers = idle + busy
    for worker in workers:
        worker.wait_to_hear("READY=1")
        first = worker.heard[: worker.waited - 1]
        assert {one.partition("=")[0] for one in first} == {"STATUS", "EXTEND_TIMEOUT_USEC"}
        assert first[0] == "STATUS=connecting to the broker"
    for worker in busy:
        worker.send("shop.long")
        worker.wait_for_file("long.started")
    time.sleep(STALE_S + 1)
    for worker in workers:
        worker.waited = len(worker.hear())
        worker.wait_to_hear("WATCHDOG=1", times=3)
        worker.process.terminate()
    for worker in workers:
        worker.wait("STOPPING=1", lambda worker=worker: "STOPPING=1" in worker.hear(), ends=True)
    for worker in busy:
        worker.wait_to_hear("WATCHDOG=1", times=3)
        (worker.folder / "long.end").touch()
    for worker in workers:
        assert worker.wait_for_end() == 0
        assert worker.heard.count("READY=1") == worker.heard.count("STOPPING=1") == 1
        assert "STATUS=ready" in worker.heard[: worker.heard.index("STOPPING=1")]
        assert "STATUS=stopping: finishing the tasks that run" in worker.heard[worker.heard.index("STOPPING=1") :]
        assert (worker.folder / "long.ended").exists() == (worker in busy) and worker.waiting() == []
        assert "plimsoll_notify:" not in worker.log() and "plimsoll_bootstrap:" not in worker.log()


def test_a_worker_that_hangs_is_found_and_says_where(start: Callable[..., Worker]) -> None:
    workers = [start("prefork"), start("threads", "filesystem://"), start("solo", "filesystem://")]
    for worker in workers:
        worker.wait_to_hear("READY=1")
        worker.wait_to_hear("WATCHDOG=1", times=2)
        (worker.folder / "hang").touch()
    hung = "STATUS=to be ended by systemd: its event loop has not run for "
    for worker in workers:
        worker.wait_to_hear(hung)
    for worker in workers:
        worker.wait_to_hear(hung, times=2)
        since = next(number for number, one in enumerate(worker.heard) if one.startswith(hung))
        assert "WATCHDOG=1" not in worker.heard[since:]
        # Not at SIGABRT alone, upon which faulthandler may crash.
        assert "in the_loop_hangs" in worker.log() and "Fatal Python error" not in worker.log()
        # As systemd does then.
        worker.process.send_signal(signal.SIGABRT)
        assert worker.wait_for_end() == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in worker.log()


def test_a_start_is_extended_while_the_broker_is_down_and_not_for_ever(start: Callable[..., Worker]) -> None:
    worker = start("prefork", NO_BROKER, PLIMSOLL_CONNECT_GRACE_S="2")
    worker.wait_to_hear("EXTEND_TIMEOUT_USEC=", times=3)
    lost = "STATUS=to be ended by systemd: it has not been connected to the broker for "
    worker.wait_to_hear(lost, times=2)
    since = next(number for number, one in enumerate(worker.heard) if one.startswith(lost))
    assert {one.partition("=")[0] for one in worker.heard[since:]} == {"STATUS"}
    assert not {"READY=1", "WATCHDOG=1"} & set(worker.heard)


def test_what_is_not_finished_in_time_is_back_at_the_broker(start: Callable[..., Worker]) -> None:
    """The task that runs, and the one that waits for it in the worker; not the one that has finished."""
    limit = {"PLIMSOLL_STOP_TIMEOUT_S": "6"}
    workers = {
        "prefork": start("prefork", **limit),
        "prefork, blocking": start("prefork", "filesystem://", **limit),
        "threads": start("threads", **limit),
        "solo": start("solo", systemd=False, **limit),
    }
    for worker in workers.values():
        worker.send("shop.quick")
    for worker in workers.values():
        worker.wait_for_log(" succeeded in ")
        worker.send("shop.long")
    for worker in workers.values():
        worker.wait_for_file("long.started")
    workers["prefork"].send("shop.quick")
    queue = workers["prefork"].folder / "queue"
    workers["prefork"].wait("prefetched message", lambda: not any(queue.iterdir()))
    for worker in workers.values():
        worker.process.terminate()
    for pool, worker in workers.items():
        assert worker.wait_for_end() == 0, pool
        assert worker.waiting() == ["shop.long"] + ["shop.quick"] * (pool == "prefork"), pool
        assert not (worker.folder / "long.ended").exists(), pool
    assert "Cold shutdown" not in workers["solo"].log() and workers["solo"].heard == []
    assert "STATUS=stopping: ending the tasks that run" in workers["prefork"].heard


def test_a_task_on_its_way_to_a_child_is_done_once_though_the_worker_stops(start: Callable[..., Worker]) -> None:
    """Celery alone forgets it where the child has not said yet that it has begun, as on a host that is busy."""
    worker = start("prefork", "polled://")
    worker.send("shop.quick")
    worker.wait_for_log(" succeeded in ")
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    worker.send("shop.long")
    worker.wait_for_log("Task shop.long[")
    # Its loop, which has nothing else to do, writes it to the child.
    time.sleep(1)
    (worker.folder / "long.end").touch()
    worker.process.terminate()
    worker.wait_for_log("Warm shutdown")
    # It is past the point at which it would forget.
    worker.wait_to_hear("STOPPING=1")
    time.sleep(1)
    for child in children:
        os.kill(int(child), signal.SIGCONT)
    assert worker.wait_for_end() == 0
    assert (worker.folder / "long.ended").exists() and worker.waiting() == []
    assert "plimsoll_notify:" not in worker.log()
