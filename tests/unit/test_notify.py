"""What tells systemd how a worker is: what it decides, what it sends, and that it never fails the worker."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, load_file

MODULE = ROOT / "roles/celery_worker/files/plimsoll_notify.py"

# It connects to a signal that no test here sends.
plimsoll_notify = load_file(MODULE, "plimsoll_notify")
Health, Notifier, Settings = plimsoll_notify.Health, plimsoll_notify.Notifier, plimsoll_notify.Settings


@pytest.fixture(autouse=True)
def complaints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test hears its own."""
    monkeypatch.setattr(plimsoll_notify, "_complained", set())


class Systemd:
    """The manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def heard(self) -> list[str]:
        found: list[str] = []
        while select.select([self.socket], [], [], 0)[0]:
            found += self.socket.recv(4096).decode().split("\n")
        return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    monkeypatch.chdir(tmp_path)
    one = Systemd("./notify" if request.param == "path" else f"@plimsoll-{os.getpid()}-{id(request)}")
    if request.param == "path":
        one.address = str(tmp_path / "notify")
    yield one
    one.socket.close()


# ---- the environment ----


def test_what_is_not_set_has_a_default() -> None:
    settings = Settings({})
    assert (settings.address, settings.watchdog_s, settings.connect_grace_s, settings.stop_timeout_s) == (
        "",
        0,
        900,
        120,
    )
    assert Settings({"PLIMSOLL_STOP_TIMEOUT_S": ""}).stop_timeout_s == 120


def test_what_is_set_is_taken() -> None:
    environ = {
        "NOTIFY_SOCKET": "@x",
        "WATCHDOG_USEC": "60000000",
        "WATCHDOG_PID": str(os.getpid()),
        "PLIMSOLL_CONNECT_GRACE_S": "0",
        "PLIMSOLL_STOP_TIMEOUT_S": "90.5",
    }
    settings = Settings(environ)
    assert (settings.address, settings.watchdog_s, settings.every_s, settings.stale_s) == ("@x", 60, 15, 30)
    assert (settings.connect_grace_s, settings.stop_timeout_s) == (0, 90.5)


@pytest.mark.parametrize(
    ("variable", "value", "default"),
    [
        ("NOTIFY_SOCKET", "run/notify", ""),
        ("NOTIFY_SOCKET", "vsock:2:1234", ""),
        ("WATCHDOG_USEC", "30s", 0),
        ("WATCHDOG_USEC", "-1", 0),
        ("PLIMSOLL_CONNECT_GRACE_S", "inf", 900),
        ("PLIMSOLL_CONNECT_GRACE_S", "15min", 900),
        ("PLIMSOLL_STOP_TIMEOUT_S", "120s", 120),
        ("PLIMSOLL_STOP_TIMEOUT_S", "nan", 120),
        ("PLIMSOLL_STOP_TIMEOUT_S", "0", 120),
    ],
)
def test_a_malformed_value_is_named_and_the_default_taken(variable: str, value: str, default: Any, capfd: Any) -> None:
    settings = Settings({variable: value})
    names = {"NOTIFY_SOCKET": "address", "WATCHDOG_USEC": "watchdog_s"}
    assert getattr(settings, names.get(variable, variable.removeprefix("PLIMSOLL_").lower())) == default
    [line] = capfd.readouterr().err.splitlines()
    assert f": {variable}: '{value}'" in line


def test_the_watchdog_of_another_process_is_not_fed() -> None:
    assert Settings({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}).watchdog_s == 0


def test_a_short_watchdog_still_leaves_room_for_ticks() -> None:
    assert Settings({"WATCHDOG_USEC": "1000000"}).stale_s > 2 * plimsoll_notify.TICK_EVERY_S


@pytest.mark.parametrize(("stop_timeout", "margin"), [(1, 0.5), (8, 4), (20, 5), (50, 5), (120, 12), (600, 60)])
def test_the_margin_is_a_tenth_within_bounds(stop_timeout: int, margin: float) -> None:
    assert Settings({"PLIMSOLL_STOP_TIMEOUT_S": str(stop_timeout)}).margin_s == margin


def test_the_environment_is_documented() -> None:
    documented = set(re.findall(r"^([A-Z_]{8,}) ", plimsoll_notify.__doc__, re.MULTILINE))
    assert documented == set(re.findall(r'environ(?:\.get\(|, )"(\w+)"', MODULE.read_text()))


@pytest.mark.parametrize("celery", [True, False])
def test_an_import_outside_of_a_worker_does_nothing(celery: bool, tmp_path: Path) -> None:
    """It is what a pool's child does that is started anew."""
    hidden = "" if celery else "sys.modules['celery'] = None\n"
    program = (
        f"import faulthandler, sys, threading\n{hidden}import plimsoll_notify as it\n"
        "assert it.notifier.pid == 0 and threading.active_count() == 1 and not faulthandler.is_enabled()"
    )
    with_systemd = {"NOTIFY_SOCKET": str(tmp_path / "none"), "PLIMSOLL_STOP_TIMEOUT_S": "x"}
    ran = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=MODULE.parent, env=with_systemd, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "")
    assert ran.stderr.count("\n") == ("switched off" in ran.stderr) == (not celery)


# ---- whether it is well ----


def health(**changes: Any) -> Any:
    """A worker that became ready at 1000, with a watchdog of 60 s, as changed."""
    environ = {"WATCHDOG_USEC": "60000000", "PLIMSOLL_CONNECT_GRACE_S": "900", "PLIMSOLL_STOP_TIMEOUT_S": "120"}
    one = Health(Settings(environ | {"NOTIFY_SOCKET": "@x"}), 1000.0)
    one.ready = True
    one.tick(1000.0)
    for name, value in changes.items():
        assert hasattr(one, name)
        setattr(one, name, value)
    return one


@pytest.mark.parametrize(
    ("changes", "well_until", "why"),
    [
        ({}, 1030, "its event loop has not run for 31 s"),
        ({"ready": False}, 1030, "its event loop has not run"),
        ({"tasks": 1}, 1120, "its event loop has not run for 121 s"),
        ({"tasks": 0}, 1030, "its event loop has not run"),
        ({"tasks": -1}, 1030, "its event loop has not run"),
        ({"connecting": 1000.0}, 1900, "it has not been connected to the broker for 901 s"),
        ({"connecting": 1000.0, "ready": False}, 1900, "it has not been connected"),
        ({"connecting": 1000.0, "tasks": 1}, 1900, "it has not been connected"),
        ({"stopping": 1000.0}, 1120, "it has been stopping for 121 s"),
        ({"stopping": 1000.0, "connecting": 500.0, "tasks": 1}, 1120, "it has been stopping"),
        ({"unknown": "x", "ready": False, "connecting": 1000.0}, 1900, "it has not been connected"),
        ({"unknown": "x", "stopping": 1000.0}, 1120, "it has been stopping"),
    ],
)
def test_a_worker_is_well_as_long_as_it_may_be_quiet(changes: dict[str, Any], well_until: int, why: str) -> None:
    one = health(**changes)
    assert one.trouble(1000) == one.trouble(well_until) == ""
    assert one.due(well_until)
    assert why in one.trouble(well_until + 1)
    assert one.due(well_until + 1) == ""


def test_a_tick_makes_it_well_again() -> None:
    one = health()
    assert one.trouble(1500)
    one.tick(1500)
    assert not one.trouble(1530) and one.trouble(1531)


def test_the_grace_counts_from_the_first_failure_until_the_loop_runs() -> None:
    one = health()
    one.connect(2000)
    one.connect(2800)
    assert not one.trouble(2900) and one.trouble(2901)
    one.tick(2902)
    one.connect(3000)
    assert not one.trouble(3900) and one.trouble(3901)


def test_a_worker_that_cannot_be_watched_is_taken_as_well() -> None:
    one = health(unknown="KeyError: 'x'")
    assert (one.trouble(1e6), one.due(1e6)) == ("", "WATCHDOG=1")


def test_until_it_is_ready_it_has_its_start_extended_beyond_the_next_time() -> None:
    one = health(ready=False, connecting=1000.0)
    found = re.fullmatch(r"EXTEND_TIMEOUT_USEC=(\d+)", one.due(1000))
    assert found and int(found[1]) / 1e6 >= one.settings.every_s + 10
    one.ready = True
    assert one.due(1000) == "WATCHDOG=1"
    one.settings.watchdog_s = 0
    assert one.due(1000) == ""


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"connecting": 1.0, "ready": False}, "connecting to the broker"),
        ({"connecting": 1.0}, "connecting to the broker"),
        ({}, "ready"),
        ({"stopping": 1.0, "connecting": 1.0, "unknown": "x"}, "stopping: finishing the tasks that run"),
        ({"unknown": "KeyError: 'x'", "connecting": 1.0}, "ready, but the watchdog is off: KeyError: 'x'"),
    ],
)
def test_the_status_says_what_it_is_at(changes: dict[str, Any], status: str) -> None:
    assert health(**changes).status() == status


# ---- in a process ----


class Ended(BaseException):
    """In place of the process's end."""


class Process(Notifier):
    """As in a worker's main process; its threads are kept, and time passes when they sleep."""

    def __init__(self, systemd: Systemd | None = None, **environ: str) -> None:
        super().__init__()
        self.started: list[Callable[[], None]] = []
        self.now = 1000.0
        self.environ = {"WATCHDOG_USEC": "60000000"} | environ
        if systemd:
            self.environ["NOTIFY_SOCKET"] = systemd.address

    def sleeping(self, seconds: float) -> None:
        self.now += seconds

    def begin(self, monkeypatch: pytest.MonkeyPatch, steps: Any) -> None:
        def starting(function: Any, args: tuple[Any, ...]) -> None:
            self.started.append(lambda: function(*args))

        originals = {("time", "sleep"): self.sleeping, ("_thread", "start_new_thread"): starting}
        monkeypatch.setattr(plimsoll_notify, "_original", lambda *name: originals[name])
        monkeypatch.setattr(plimsoll_notify, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleeping))
        monkeypatch.setattr(plimsoll_notify.os, "environ", self.environ)
        self.on_init(sender=SimpleNamespace(app=SimpleNamespace(steps={"consumer": steps})))


class Consumer:
    """What is used of Celery's."""

    def __init__(self, pool: str = "prefork", hub: Any = None, channel: Any = None) -> None:
        self.hub = hub
        kind = type("TaskPool", (), {"__module__": f"celery.concurrency.{pool}", "is_green": pool == "gevent"})
        self.pool: Any = kind()
        self.timed: list[Callable[[], None]] = []
        self.soon: list[Callable[[], None]] = []
        self.timer = SimpleNamespace(call_after=lambda _, function, args: self.timed.append(lambda: function(*args)))
        self.app = SimpleNamespace(conf=SimpleNamespace(worker_soft_shutdown_timeout=30))
        self.did: list[str] = []
        qos = SimpleNamespace(restore_unacked_once=lambda: self.did.append("restored"))
        self.task_consumer = SimpleNamespace(channel=channel or SimpleNamespace(qos=qos))

    def call_soon(self, function: Callable[[], None]) -> None:
        self.soon.append(function)

    def perform_pending_operations(self) -> None:
        self.did.append("performed")

    def second(self) -> None:
        timed, self.timed = self.timed, []
        for function in timed:
            function()


@pytest.fixture
def disconnected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Celery's signals forget what a test connects."""
    from celery import signals

    names = ("worker_ready", "worker_shutting_down", "task_prerun", "task_postrun")
    before = {name: list(getattr(signals, name).receivers) for name in names}
    yield
    for name, receivers in before.items():
        getattr(signals, name).receivers = receivers


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, disconnected: None) -> Callable[..., Any]:
    def beginning(*args: Any, pool: str = "prefork", hub: Any = None, channel: Any = None, **environ: str) -> Any:
        """A worker whose consumer has just started."""
        process = Process(*args, **environ)
        steps: set[Any] = set()
        process.begin(monkeypatch, steps)
        [step] = steps
        process.step = step(Consumer(pool, hub, channel))
        process.step.start(process.consumer)
        return process

    return beginning


def test_it_tells_how_a_worker_starts_lives_and_stops(begin: Callable[..., Any], systemd: Systemd) -> None:
    process = begin(systemd, pool="prefork", hub=SimpleNamespace(_ready=set()))
    process.on_watch()
    assert systemd.heard() == ["STATUS=connecting to the broker", "EXTEND_TIMEOUT_USEC=45000000"]
    process.on_ready()
    process.on_watch()
    assert systemd.heard() == ["READY=1", "STATUS=ready", "WATCHDOG=1"]
    process.now += 20
    process.consumer.second()
    process.now += 20
    process.on_watch()
    assert systemd.heard() == ["WATCHDOG=1"]
    process.now += 20
    process.on_watch()
    assert systemd.heard() == ["STATUS=to be ended by systemd: its event loop has not run for 40 s"]
    process.consumer.second()
    process.on_watch()
    assert systemd.heard() == ["STATUS=ready", "WATCHDOG=1"]


def test_it_shows_where_every_thread_is_each_time_that_trouble_begins(
    begin: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    process = begin()
    process.on_ready()
    process.on_watch()
    assert "most recent call first" not in capfd.readouterr().err
    for _ in range(2):
        process.now += 31
        process.on_watch()
        process.now += 1
        process.on_watch()
        shown = capfd.readouterr().err
        assert shown.count(f"in {test_it_shows_where_every_thread_is_each_time_that_trouble_begins.__name__}\n") == 1
        process.consumer.second()
        process.on_watch()
        process.started.clear()


def hang(process: Any) -> None:
    """Until it is given up, if it is."""
    process.on_ready()
    for _ in range(2):
        process.now += 31
        process.on_watch()
    for thread in process.started[1:]:
        thread()


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_loop_that_hangs_at_two_looks_is_given_up_for_good(
    begin: Callable[..., Any], systemd: Systemd, pool: str
) -> None:
    process = begin(systemd, pool=pool, hub=SimpleNamespace(_ready=set()))
    hang(process)
    assert systemd.heard()[-1] == "WATCHDOG=trigger" and len(process.started) == 2
    # The sockets of a green pool are of use in their own thread alone.
    assert process.consumer.did == (["performed", "restored"] if pool == "prefork" else [])
    process.consumer.second()
    process.on_watch()
    process.on_watch()
    assert systemd.heard() == ["STATUS=ready", "WATCHDOG=trigger", "WATCHDOG=trigger"] and len(process.started) == 2


def test_a_rescue_that_fails_is_said_and_systemd_ends_the_worker_all_the_same(
    begin: Callable[..., Any], systemd: Systemd, capfd: Any
) -> None:
    process = begin(systemd)
    process.consumer.task_consumer = None
    hang(process)
    assert systemd.heard()[-1] == "WATCHDOG=trigger"
    assert "messages are not given back: AttributeError" in capfd.readouterr().err


def test_one_that_is_not_connected_or_stops_holds_nothing_to_give_back(begin: Callable[..., Any]) -> None:
    process = begin(NOTIFY_SOCKET="@nobody")
    process.health.connecting = -1e6
    process.on_watch()
    process.on_shutting_down()
    process.now += 1e6
    process.on_watch()
    process.on_watch()
    assert process.health.trouble(process.now) and len(process.started) == 2, "the watch, and the limit of the shutdown"


@pytest.mark.parametrize("size", [7, 4_000_000, None])
def test_what_redis_has_handed_out_and_nobody_has_read_goes_back(size: int | None) -> None:
    """A message of that size, or none; with a prefix for all keys, as the transport's clients put it in front."""
    import redis
    from kombu.transport.redis import PrefixedStrictRedis

    received: list[bytes] = []

    def until(one: socket.socket, end: bytes) -> None:
        received.append(b"")
        while not received[-1].endswith(end):
            received[-1] += one.recv(65536)

    def serve(listener: socket.socket) -> None:
        """As Redis does: whoever ends their half gets no more of what is on its way."""
        with listener.accept()[0] as worker:
            until(worker, b"pre:gate\r\n")
            if size is None:
                # The worker ends its half, or this waits until the test fails.
                received.append(worker.recv(1))
                return
            reply = b"*2\r\n$8\r\npre:gate\r\n$%d\r\n%s\r\n" % (size, b"m" * size)
            for at in range(0, len(reply), 65536):
                if select.select([worker], [], [], 0)[0]:
                    return
                worker.sendall(reply[at : at + 65536])
            with listener.accept()[0] as other:
                until(other, b"m" * size + b"\r\n")
                other.sendall(b":1\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve, args=(listener,), daemon=True)
        serving.start()
        # With no greeting that would have to be answered.
        plain: Any = {"port": listener.getsockname()[1], "redis_connect_func": lambda one: one._parser.on_connect(one)}
        client = PrefixedStrictRedis(**plain, global_keyprefix="pre:", single_connection_client=True)
        channel = SimpleNamespace(
            _in_poll=client.connection,
            client=client,
            connection_errors=(redis.ConnectionError, OSError),
            conn_or_acquire=lambda: contextlib.nullcontext(PrefixedStrictRedis(**plain, global_keyprefix="pre:")),
        )
        client.connection.send_command("BRPOP", "pre:gate")
        if size:
            assert select.select([client.connection._sock], [], [], 10)[0]
        plimsoll_notify.return_unread(channel)
        client.close()
        serving.join(10)
    assert not serving.is_alive() and channel._in_poll is None
    if size is None:
        assert received[1:] == [b""]
    else:
        assert received[1].startswith(b"*3\r\n$5\r\nRPUSH\r\n$8\r\npre:gate\r\n$%d\r\n" % size)


def reply(message: bytes, key: bytes = b"pre:gate") -> bytes:
    return b"*2\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(key), key, len(message), message)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (reply(b"{}"), (b"pre:gate", b"{}")),
        (reply(b"a\r\n$3\r\nb"), (b"pre:gate", b"a\r\n$3\r\nb")),
        (reply(b"") + b"*-1\r\n", (b"pre:gate", b"")),
        (b"*-1\r\n", None),
        (b"_\r\n", None),
        (b"-UNBLOCKED\r\n", None),
        (b"", None),
    ],
)
def test_a_reply_to_brpop_is_read(data: bytes, found: Any) -> None:
    assert plimsoll_notify.reply_to_brpop(data) == found


@pytest.mark.parametrize("size", range(5, len(reply(b"{}")), 3))
def test_a_reply_that_is_cut_off_is_none(size: int) -> None:
    try:
        assert plimsoll_notify.reply_to_brpop(reply(b"{}")[:size]) is None
    except ValueError as error:
        assert str(error) == f"a reply of {size} bytes that was cut off"


class Channel:
    """What is used of kombu's, at the worker's end of a socket to Redis."""

    connection_errors = (ConnectionError,)
    uri = "redis://10.0.0.2:6379/0"

    def __init__(self, sock: socket.socket, die: str = "") -> None:
        self.client = SimpleNamespace(connection=SimpleNamespace(_sock=sock))
        self.die = die
        self.handlers = {"BRPOP": self._brpop_read}
        self.qos = SimpleNamespace(append=lambda *_: self.dies("before it is noted"))
        self.pushed: list[tuple[Any, ...]] = []
        self.refused: Exception | None = None
        self.connection = SimpleNamespace(client=SimpleNamespace(as_uri=lambda: self.uri))

    def dies(self, where: str) -> None:
        if self.die == where:
            raise Ended(where)

    def _brpop_start(self, timeout: int | None = None) -> None:
        pass

    def _brpop_read(self) -> None:
        data = b""
        while not plimsoll_notify.whole(data):
            data += self.client.connection._sock.recv(65536)
        self.qos.append("message", "tag")
        self.dies("once it is noted")

    def conn_or_acquire(self) -> Any:
        return contextlib.nullcontext(self)

    def execute_command(self, *command: Any) -> None:
        if self.refused:
            raise self.refused
        self.pushed.append(command)


class Kept:
    """systemd's store of a unit's descriptors."""

    def __init__(self, systemd: Systemd) -> None:
        self.systemd = systemd
        self.fds: list[tuple[str, int]] = []

    def hear(self) -> list[str]:
        while select.select([self.systemd.socket], [], [], 0)[0]:
            said, fds, *_ = socket.recv_fds(self.systemd.socket, 4096, 8)
            what, name = said.decode().split("\n") if b"FDNAME=" in said else ("", "=")
            if what == "FDSTOREREMOVE=1":
                self.fds = [(one, fd) for one, fd in self.fds if one != name.partition("=")[2]]
            elif what == "FDSTORE=1":
                self.fds.append((name.partition("=")[2], *fds))
        return [name for name, _ in self.fds]

    def environ(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """Of the next process."""
        first = 500
        monkeypatch.setattr(plimsoll_notify, "FIRST_FD", first)
        for to, (_, fd) in enumerate([("an application's own", 0), *self.fds], first):
            os.dup2(fd, to)
        names = ":".join(["app", *(name for name, _ in self.fds)])
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(self.fds) + 1), "LISTEN_FDNAMES": names}


def test_a_message_of_another_broker_is_not_given_to_this_one(
    begin: Callable[..., Any], systemd: Systemd, monkeypatch: Any, capfd: Any
) -> None:
    ours, redis = socket.socketpair()
    kept, channel = Kept(systemd), Channel(ours)
    begin(systemd, channel=channel)
    channel._brpop_start()
    redis.sendall(reply(b"{}"))
    assert kept.hear() == ["plimsoll-reply", "plimsoll-brpop"]
    again = Process(systemd, **kept.environ(monkeypatch))
    again.begin(monkeypatch, set())
    other = Channel(socket.socketpair()[0])
    other.uri = "redis://10.0.0.2:6379/1"
    again.on_channel(other)
    assert other.pushed == [] and kept.hear() == ["plimsoll-reply"]
    assert "it is of redis://10.0.0.2:6379/0, which is not this worker's broker any more" in capfd.readouterr().err


def test_a_socket_of_the_workers_stays_as_it_is(begin: Callable[..., Any], systemd: Systemd) -> None:
    """Whatever the application has as the default: whether reads wait is shared between duplicates."""
    ours, _ = socket.socketpair()
    channel = Channel(ours)
    socket.setdefaulttimeout(30)
    try:
        begin(systemd, channel=channel)
        channel._brpop_start()
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(ours.fileno())


def test_descriptors_that_are_not_there_do_not_fail_the_worker(
    begin: Callable[..., Any], systemd: Systemd, monkeypatch: Any
) -> None:
    monkeypatch.setattr(plimsoll_notify, "FIRST_FD", 900)
    process = begin(systemd, LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="plimsoll-brpop:plimsoll-reply")
    process.on_ready()
    assert "READY=1" in systemd.heard()


@pytest.mark.parametrize("systemd", ["abstract"], indirect=True)
@pytest.mark.parametrize(
    ("die", "size", "back"),
    [
        ("while it waits", 0, 0),
        ("while it is handed out", 7, 1),
        ("while it is handed out", 4_000_000, 1),
        ("before it is noted", 7, 1),
        ("once it is noted", 7, 0),
    ],
)
def test_what_redis_had_handed_out_to_a_worker_that_was_killed_goes_back(
    die: str, size: int, back: int, begin: Callable[..., Any], systemd: Systemd, monkeypatch: Any
) -> None:
    ours, redis = socket.socketpair()
    channel, kept = Channel(ours, die), Kept(systemd)
    process = begin(systemd, channel=channel)
    channel._brpop_start()
    channel._brpop_start()
    assert kept.hear() == ["plimsoll-reply", "plimsoll-brpop"]
    if size:
        threading.Thread(target=redis.sendall, args=(reply(b"m" * size),), daemon=True).start()
        assert select.select([ours], [], [], 10)[0]
    if die.endswith("noted"):
        if back:
            # Dead, it does not come to this.
            monkeypatch.setattr(process.handed_out, "clear", lambda: None)
        with pytest.raises(Ended, match=die):
            channel.handlers["BRPOP"]()
    ours.close()
    process.handed_out.sock.close()

    again = Process(systemd, **kept.environ(monkeypatch))
    again.begin(monkeypatch, set())
    assert "LISTEN_FDNAMES" not in again.environ
    import redis as redis_py

    monkeypatch.setattr(redis_py.Redis, "execute_command", Channel.execute_command)
    second = Channel(socket.socketpair()[0])
    for second.refused in (ConnectionError("down"), RuntimeError("OOM command not allowed")) if back else ():
        with pytest.raises(ConnectionError):
            again.on_channel(second)
        assert kept.hear() == ["plimsoll-reply", "plimsoll-brpop"]
    # Celery connects again, in the same process.
    second.refused = None
    again.on_channel(second)
    assert second.pushed == [("RPUSH", b"pre:gate", b"m" * size)] * back
    assert kept.hear() == ["plimsoll-reply"], "the new one's"
    second._brpop_start()
    assert kept.hear() == ["plimsoll-reply", "plimsoll-brpop"]
    again.on_channel(third := Channel(second.client.connection._sock))
    assert third.pushed == [] and os.fstat(500)


def test_a_worker_without_its_broker_is_fed_for_the_grace(begin: Callable[..., Any], systemd: Systemd) -> None:
    process = begin(systemd, pool="prefork", hub=SimpleNamespace(_ready=set()))
    process.on_ready()
    process.consumer.second()
    systemd.heard()
    process.step.stop(process.consumer)
    process.now += 300
    process.on_watch()
    assert systemd.heard() == ["STATUS=connecting to the broker", "WATCHDOG=1"]
    process.on_shutting_down(sig="SIGTERM", how="Warm")
    process.step.close(process.consumer)
    process.on_shutting_down(sig="SIGQUIT", how="Cold")
    process.on_watch()
    assert systemd.heard() == ["STOPPING=1", "STATUS=stopping: finishing the tasks that run", "WATCHDOG=1"]
    assert len(process.started) == 2, "the watch, and the limit of the shutdown, once"


@pytest.mark.parametrize(("usec", "watched"), [("0", 3), ("60000000", 9)])
def test_the_watch_lasts_until_it_is_ready_or_for_good_where_there_is_a_watchdog(
    begin: Callable[..., Any], usec: str, watched: int
) -> None:
    process = begin(NOTIFY_SOCKET="@nobody", WATCHDOG_USEC=usec)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        process.health.ready = len(slept) >= 3
        if len(slept) == 9:
            raise Ended

    process.sleep = sleep
    with contextlib.suppress(Ended):
        process.watch()
    assert slept == [process.settings.every_s] * watched


def test_without_systemd_nothing_is_watched_and_the_shutdown_is_limited_all_the_same(
    begin: Callable[..., Any], capfd: Any
) -> None:
    process = begin()
    process.on_ready()
    assert not process.started
    process.on_shutting_down(how="Warm")
    assert len(process.started) == 1
    assert capfd.readouterr().err == ""


def test_a_step_that_cannot_be_installed_costs_the_watchdog_and_no_more(
    monkeypatch: pytest.MonkeyPatch, disconnected: None, systemd: Systemd, capfd: Any
) -> None:
    from celery import signals

    process = Process(systemd)
    process.begin(monkeypatch, steps=None)
    signals.worker_ready.send(sender=None)
    process.now += 1e6
    process.on_watch()
    heard = systemd.heard()
    assert heard[0] == "STATUS=connecting to the broker"
    assert heard[1] == "READY=1"
    assert heard[2].startswith("STATUS=ready, but the watchdog is off: AttributeError: ")
    assert heard[3:] == ["WATCHDOG=1"]
    assert capfd.readouterr().err.count("plimsoll_notify: ") == 1


def test_a_step_that_fails_does_not_fail_the_worker(begin: Callable[..., Any], systemd: Systemd, capfd: Any) -> None:
    process = begin(systemd)
    process.on_ready()
    process.consumer.timer = None
    process.step.start(process.consumer)
    process.now += 1e6
    process.on_watch()
    assert systemd.heard()[-2:] == [f"STATUS={process.health.status()}", "WATCHDOG=1"]
    assert "the watchdog is off: AttributeError" in process.health.status()
    assert capfd.readouterr().err.count("the watchdog is off: AttributeError") == 1


def test_nobody_who_listens_is_said_once(begin: Callable[..., Any], tmp_path: Path, capfd: Any) -> None:
    process = begin(NOTIFY_SOCKET=str(tmp_path / "none"))
    process.on_ready()
    assert capfd.readouterr().err.count("\n") == 1


def test_only_the_last_start_of_the_consumer_ticks(begin: Callable[..., Any]) -> None:
    process = begin(hub=SimpleNamespace(_ready=set()))
    process.step.stop(process.consumer)
    process.step.start(process.consumer)
    for _ in range(3):
        process.consumer.second()
        assert len(process.consumer.timed) == 1
    process.step.stop(process.consumer)
    process.now += 5
    process.consumer.second()
    assert not process.consumer.timed and process.health.connecting == 1005 - 5 and process.health.ticked == 1000


@pytest.mark.parametrize(
    ("pool", "hub", "by_the_loop"),
    [
        ("prefork", True, False),
        ("solo", True, False),
        ("solo", False, True),
        ("thread", False, True),
        ("prefork", False, False),
        ("gevent", False, False),
    ],
)
def test_without_a_hub_it_is_the_loop_that_is_asked(
    begin: Callable[..., Any], pool: str, hub: bool, by_the_loop: bool
) -> None:
    process = begin(pool=pool, hub=SimpleNamespace(_ready=set()) if hub else None)
    process.now += 7
    process.consumer.second()
    process.consumer.second()
    assert len(process.consumer.soon) == by_the_loop, "one question at a time"
    assert process.health.ticked == (1000 if by_the_loop else 1007)
    for function in process.consumer.soon:
        function()
    assert process.health.ticked == 1007
    process.consumer.second()
    assert len(process.consumer.soon) == 2 * by_the_loop


@pytest.mark.parametrize(("pool", "hold"), [("solo", 1), ("gevent", 1), ("prefork", 0), ("thread", 0)])
def test_tasks_count_where_they_hold_the_loop(begin: Callable[..., Any], pool: str, hold: int) -> None:
    from celery import signals

    process = begin(pool=pool)
    signals.task_prerun.send(sender=None)
    assert process.health.tasks == hold
    signals.task_postrun.send(sender=None)
    assert process.health.tasks == 0


# ---- stopping in time ----


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The signals sent and how it ended."""
    found: list[Any] = []

    def ending(status: int) -> None:
        found.append(status)
        raise Ended

    monkeypatch.setattr(plimsoll_notify.os, "kill", lambda pid, number: found.append((pid, number)))
    monkeypatch.setattr(plimsoll_notify.os, "_exit", ending)
    monkeypatch.setitem(sys.modules, "celery.apps.worker", SimpleNamespace(on_cold_shutdown=None))
    before = signal.signal(signal.SIGQUIT, lambda *_: None)
    try:
        yield found
    finally:
        signal.signal(signal.SIGQUIT, before)


def limit(process: Any) -> None:
    process.on_shutting_down(how="Warm")
    with pytest.raises(Ended):
        process.started[-1]()


def test_prefork_is_shut_down_cold_and_ended_if_that_takes_too_long(
    begin: Callable[..., Any], ended: list[Any]
) -> None:
    process = begin(PLIMSOLL_STOP_TIMEOUT_S="100")
    times: list[float] = []
    process.sleep = times.append
    limit(process)
    assert ended == [(os.getpid(), signal.SIGQUIT), 0]
    assert times == [90, 5]
    assert process.consumer.app.conf.worker_soft_shutdown_timeout == 0
    assert process.consumer.did == ["performed", "restored"]


@pytest.mark.parametrize("why", ["solo", "thread", "old Celery", "no handler"])
def test_where_a_cold_shutdown_would_lose_tasks_there_is_none(
    begin: Callable[..., Any], ended: list[Any], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "old Celery":
        monkeypatch.setitem(sys.modules, "celery.apps.worker", SimpleNamespace())
    if why == "no handler":
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    process = begin(pool=why if why in ("solo", "thread") else "prefork", PLIMSOLL_STOP_TIMEOUT_S="100")
    limit(process)
    assert ended == [0] and process.now == 1090
    assert process.consumer.did == ["performed", "restored"]


def test_a_green_pool_gives_back_in_its_own_thread(begin: Callable[..., Any], ended: list[Any]) -> None:
    process = begin(pool="gevent", PLIMSOLL_STOP_TIMEOUT_S="100")
    spawned: list[Any] = []
    type(process.consumer.pool).spawn_n = staticmethod(lambda *args: spawned.append(args))
    process.on_shutting_down(how="Warm")
    [(function, sleep)] = spawned
    with pytest.raises(Ended):
        function(sleep)
    assert not process.started and ended == [0] and process.now == 1090


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_what_celery_gives_back_by_itself_is_left_to_it(begin: Callable[..., Any], ended: list[Any], pool: str) -> None:
    process = begin(pool=pool)
    process.on_shutting_down(how="Warm")
    process.step.shutdown(process.consumer)
    process.started[-1]()
    assert ended == [] and process.consumer.did == []


def test_a_cold_shutdown_is_celerys_own(begin: Callable[..., Any]) -> None:
    process = begin()
    process.on_shutting_down(how="Cold")
    assert not process.started and process.health.stopping


def test_it_ends_even_where_nothing_can_be_given_back(begin: Callable[..., Any], ended: list[Any], capfd: Any) -> None:
    process = begin(pool="solo")
    process.consumer.task_consumer = None
    limit(process)
    assert ended == [0]
    assert "messages are not given back: AttributeError" in capfd.readouterr().err


def test_finished_tasks_are_acknowledged_before_the_others_are_given_back() -> None:
    consumer = Consumer()

    def ack_log_error() -> None:
        consumer.did.append("acknowledged")

    def on_readable() -> None:
        consumer.did.append("took a message")

    def promise(function: Callable[[], None]) -> Any:
        return type("promise", (), {"fun": staticmethod(function), "__call__": lambda self: function()})()

    consumer.hub = SimpleNamespace(_ready={promise(ack_log_error), promise(on_readable), on_readable, None})
    plimsoll_notify.give_back(consumer)
    assert consumer.did == ["performed", "acknowledged", "restored"]


def test_a_broker_that_gives_back_by_itself_is_left_alone() -> None:
    consumer = Consumer()
    consumer.task_consumer = SimpleNamespace(channel=object())
    plimsoll_notify.give_back(consumer)
    assert consumer.did == ["performed"]


# ---- forks and green libraries ----


def test_what_was_sent_to_a_child_is_not_forgotten_and_the_rest_is() -> None:
    jobs = {number: SimpleNamespace(_write_to=to, _accepted=False) for number, to in enumerate([object(), None])}
    flushed: list[list[bool]] = []
    pool = SimpleNamespace(
        _pool=SimpleNamespace(_cache=jobs), flush=lambda: flushed.append([job._accepted for job in jobs.values()])
    )
    plimsoll_notify.keep_sent(pool)
    mine = pool.flush
    # As its consumer starts again.
    plimsoll_notify.keep_sent(pool)
    assert pool.flush is mine
    pool.flush()
    assert flushed == [[True, False]]


def test_a_pool_whose_insides_are_others_is_flushed_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    flushed: list[int] = []
    pool = SimpleNamespace(_pool=SimpleNamespace(), flush=lambda: flushed.append(1))
    plimsoll_notify.keep_sent(pool)
    pool.flush()
    assert flushed and "a task may be done twice as this worker stops: AttributeError" in capfd.readouterr().err
    # Celery does not flush this one.
    plimsoll_notify.keep_sent(SimpleNamespace(flush=None))


def test_a_forked_child_goes_on_with_nothing(systemd: Systemd) -> None:
    program = (
        "import faulthandler, os, sys, threading, types, plimsoll_notify as it\n"
        "from celery import signals\n"
        "class Worker:\n"
        "    app = types.SimpleNamespace(steps={'consumer': set()})\n"
        "signals.worker_init.send(sender=Worker)\n"
        "assert it.notifier.pid and faulthandler.is_enabled()\n"
        "if os.fork() == 0:\n"
        "    signals.worker_ready.send(sender=None)\n"
        "    signals.worker_shutting_down.send(sender=None, sig='SIGTERM', how='Warm', exitcode=0)\n"
        "    assert not faulthandler.is_enabled() and it.notifier.health.stopping is None\n"
        "    assert len(os.listdir('/proc/self/task')) == 1\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 7\n"
        "it.notifier.tell('PARENT=1')\n"
    )
    environ = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "3600000000"}
    ran = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=MODULE.parent, env=environ, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    heard = systemd.heard()
    assert heard.pop() == "PARENT=1"
    assert "STATUS=connecting to the broker" in heard and not {"READY=1", "STOPPING=1"} & set(heard)


def test_a_faulthandler_of_the_applications_is_left_to_it(begin: Callable[..., Any], monkeypatch: Any) -> None:
    enabled: list[int] = []
    monkeypatch.setattr(plimsoll_notify.faulthandler, "is_enabled", lambda: True)
    monkeypatch.setattr(plimsoll_notify.faulthandler, "enable", enabled.append)
    begin()
    assert not enabled


@pytest.mark.parametrize("library", ["gevent.monkey", "eventlet.patcher"])
def test_the_original_is_used_and_not_what_a_green_library_put_there(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = SimpleNamespace(sleep=lambda _: None)
    patched = types.ModuleType(library)
    patched.get_original = lambda module, name: getattr(kept, name) if module == "time" else None  # type: ignore[attr-defined]
    patched.original = {"time": kept}.__getitem__  # type: ignore[attr-defined]
    import time

    assert plimsoll_notify._original("time", "sleep") is time.sleep
    monkeypatch.setitem(sys.modules, library, patched)
    assert plimsoll_notify._original("time", "sleep") is kept.sleep
