# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tells systemd from inside a Celery worker that it is ready, that it lives, and that it stops; and stops it in time.

The worker loads this by CELERY_WORKER_INCLUDE=plimsoll_notify, with no change to the application. Standard library
alone, Python 3.9 or later, Celery 5.3 or later. Whatever fails here, the worker goes on; one line on stderr says what.
It works in the worker's main process, and not in its children.

Environment:
NOTIFY_SOCKET             where systemd listens (Type=notify). Not set: nothing is told
WATCHDOG_USEC             WatchdogSec= in microseconds, from systemd. Not set: no WATCHDOG=1
WATCHDOG_PID              the process that WATCHDOG_USEC is meant for
LISTEN_FDNAMES            what systemd kept as the last process of the unit died; taken out of the environment
LISTEN_PID                the process that it is meant for
PLIMSOLL_CONNECT_GRACE_S  seconds that a worker may go without a broker until it is to be restarted; 900
PLIMSOLL_STOP_TIMEOUT_S   seconds that a worker has to stop, as TimeoutStopSec=, and that a task may hold the event loop
                          of a solo, gevent or eventlet worker; 120

What is sent, and when:
READY=1               once the worker takes tasks
STOPPING=1            at a signal to stop. From then on systemd minds TimeoutStopSec= and no longer the watchdog
STATUS=               what the worker is at, for `systemctl status`
EXTEND_TIMEOUT_USEC=  until READY=1, while the worker is well: a broker that is down is not to run the unit into
                      TimeoutStartSec= and its start limit
WATCHDOG=1            after READY=1, four times in WATCHDOG_USEC, while the worker is well
WATCHDOG=trigger      once its event loop has hung for most of WATCHDOG_USEC; systemd 243 or later need not wait longer
FDSTORE=1             with what Redis hands out, see HandedOut; needs FileDescriptorStoreMax=2

The worker is well while its own event loop has run within half of WATCHDOG_USEC. Where it cannot run, it has longer:
until it is connected to the broker, the grace; while a task holds it, and while the worker stops, the stop timeout. A
worker that is not well prints where every thread is, and gets SIGABRT from systemd, upon which faulthandler prints it
again: for one that holds the GIL, which cannot be printed from here. Before that, what a hung loop had taken from the
broker is given back from here, except with green pools. With a prefork pool and a broker that Celery does not read
asynchronously (neither Redis nor AMQP), and with green pools, it is the timer and not the
consumer that is known to run.

A warm shutdown that takes too long would end in SIGKILL, and what the worker had taken from Redis would come back after
the visibility timeout, an hour. So, a margin before the stop timeout (the larger of 5 s and a tenth, at most half), it
becomes a cold one: Celery ends the tasks that run, and gives all that is not acknowledged back to the broker. That is
so for prefork in Celery 5.5 or later. Elsewhere Celery's cold shutdown loses tasks or does nothing, and then, or when
half of the margin is over, the messages are given back from here, and the process ends on the spot.

With prefork, a warm shutdown of Celery's (5.2, 5.6.3, 5.7) forgets a task that was sent to a child a moment before and
whose start the child has not reported yet. The child does it, nobody acknowledges it, and the broker hands it out
again. Here the shutdown waits for it, as for those that run.

Redis hands a message out by removing it (BRPOP). One that the worker has not noted as taken yet is lost when its main
process is killed, and a worker whose prefetch is full leaves one lying in its socket for as long. So systemd keeps that
socket too, and the unit's next process gives back what it finds there.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import faulthandler
import functools
import importlib
import math
import mmap
import os
import posix
import re
import signal
import struct
import sys
import time

CONNECT_GRACE_S = 900.0
STOP_TIMEOUT_S = 120.0
TICK_EVERY_S = 1.0
# Without a watchdog the start alone is watched.
WATCH_EVERY_S = 10.0
# Of what a start is extended by, beyond the next extension: a host that is short of memory is slow.
EXTEND_SPARE_S = 30.0
# The manager may be busy, as when it is reloaded; the worker is not to wait for it for long.
SEND_TIMEOUT_S = 5.0
# For a broker that is to end a connection that it was asked to end.
REPLY_TIMEOUT_S = 1.0
# SD_LISTEN_FDS_START of sd-daemon.h, and FDNAME= of what systemd keeps.
FIRST_FD = 3
KEPT_SOCKET = "plimsoll-brpop"
KEPT_REPLY = "plimsoll-reply"
# Larger replies are safe in the socket, and not while they are read.
REPLY_BYTES = 1 << 20
# A second each.
PUT_BACK_TRIES = 60

_complained = set()


def _complain(trouble, reason):
    """One line a process and kind of trouble. Not through sys.stderr, which Celery redirects into its log."""
    pid = os.getpid()
    if (pid, trouble) not in _complained:
        _complained.add((pid, trouble))
        # Not os.write, which eventlet replaces by one that fails inside its hub.
        with contextlib.suppress(OSError):
            posix.write(2, f"plimsoll_notify: process {pid}: {trouble}: {reason}\n".encode(errors="replace"))


def _guarded(method):
    """Nothing of ours may fail the worker: at the first trouble the loop is watched no more."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        try:
            method(self, *args, **kwargs)
        # It runs in the user's worker, whose tasks a defect of ours must not stop. give_up() says it in the journal and
        # in the unit's status, and the unit counts as one without a watchdog.
        except Exception as error:  # noqa: BLE001 - told by give_up()
            self.give_up(error)

    return guarded


def _original(module, name):
    """A function as it was before gevent or eventlet put theirs in its place."""
    # Insides of theirs, which may change. With what stands in its place the worker is watched all the same, in a
    # greenlet and not in a thread.
    with contextlib.suppress(Exception):
        if "gevent.monkey" in sys.modules:
            return sys.modules["gevent.monkey"].get_original(module, name)
        if "eventlet.patcher" in sys.modules:
            return getattr(sys.modules["eventlet.patcher"].original(module), name)
    return getattr(importlib.import_module(module), name)


def _number(environ, name, default, least=0.0):
    text = environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # Not a number and without end are floats too, and no time to wait for.
    if least <= value < math.inf:
        return value
    _complain(name, f"'{text}' is not a number, {least:g} or more; it is taken as {default:g}")
    return default


class Settings:
    """What the environment asks for. What is malformed is named, and taken as not set."""

    def __init__(self, environ):
        self.address = environ.get("NOTIFY_SOCKET", "")
        if self.address and self.address[0] not in "/@":
            _complain("NOTIFY_SOCKET", f"'{self.address}' is neither a path nor an abstract address; nothing is told")
            self.address = ""
        self.watchdog_s = _number(environ, "WATCHDOG_USEC", 0.0) / 1e6
        # Meant for another process, such as a shell that started this one.
        if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            self.watchdog_s = 0.0
        self.connect_grace_s = _number(environ, "PLIMSOLL_CONNECT_GRACE_S", CONNECT_GRACE_S)
        self.stop_timeout_s = _number(environ, "PLIMSOLL_STOP_TIMEOUT_S", STOP_TIMEOUT_S, 1.0)

    @property
    def every_s(self):
        return self.watchdog_s / 4 or WATCH_EVERY_S

    @property
    def stale_s(self):
        """How old a tick of the event loop may be."""
        return max(self.every_s * 2, TICK_EVERY_S * 3)

    @property
    def margin_s(self):
        """How long before the end of the stop timeout a warm shutdown becomes a cold one."""
        return min(max(5.0, self.stop_timeout_s / 10), self.stop_timeout_s / 2)


class Health:
    """What is known of the worker, and whether it is well. Times are seconds of one monotonic clock."""

    def __init__(self, settings, now):
        self.settings = settings
        self.ready = False
        self.ticked = now
        # Since when, or None.
        self.connecting = now
        self.stopping = None
        # Those that run and hold the event loop meanwhile.
        self.tasks = 0
        # Why nothing can be said about the loop.
        self.unknown = ""

    def tick(self, now):
        """The loop runs, so the worker is connected."""
        self.ticked, self.connecting = now, None

    def connect(self, now):
        """It connects, again or still: one that fails to, time and again, does so since the first time."""
        if self.connecting is None:
            self.connecting = now

    def trouble(self, now):
        """Why the worker is to be restarted; empty while it is well."""
        # The loop's thread may change them meanwhile.
        settings, stopping, connecting = self.settings, self.stopping, self.connecting
        if stopping is not None:
            what, since, limit = "it has been stopping", stopping, settings.stop_timeout_s
        elif self.unknown and self.ready:
            return ""
        elif connecting is not None:
            what, since, limit = "it has not been connected to the broker", connecting, settings.connect_grace_s
        else:
            what, since, limit = "its event loop has not run", self.ticked, settings.stale_s
            if self.tasks > 0:
                limit = max(limit, settings.stop_timeout_s)
        return f"{what} for {now - since:.0f} s" if now - since > limit else ""

    def hangs(self):
        """Whether it is the event loop that is at fault, where there is trouble."""
        return self.ready and self.stopping is None and self.connecting is None

    def due(self, now):
        """What is to be sent now, if anything."""
        if self.trouble(now):
            return ""
        if self.ready:
            return "WATCHDOG=1" if self.settings.watchdog_s else ""
        return f"EXTEND_TIMEOUT_USEC={(self.settings.every_s + EXTEND_SPARE_S) * 1e6:.0f}"

    def status(self):
        if self.stopping is not None:
            return "stopping: finishing the tasks that run"
        if self.connecting is not None and not (self.unknown and self.ready):
            return "connecting to the broker"
        return f"ready, but the watchdog is off: {self.unknown}" if self.unknown else "ready"


def send(address, *lines, fd=None):
    """One datagram to systemd, by a socket that no green library has replaced; with a descriptor for FDSTORE=1."""
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(SEND_TIMEOUT_S)
            rights = [] if fd is None else [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [fd]))]
            sock.sendmsg(["\n".join(lines).encode(errors="replace")], rights, 0, address)
        finally:
            sock.close()
    except OSError as error:
        _complain("systemd is not told", error)


def give_back(consumer):
    """Give all messages that are not acknowledged back to a broker that would not do so by itself, as AMQP does."""
    # Acknowledgements of finished tasks wait for a loop that no longer runs. Other callbacks must not run here: they
    # could take messages.
    consumer.perform_pending_operations()
    waiting = consumer.hub._ready if consumer.hub else set()
    with contextlib.suppress(KeyError):  # A thread of Celery's may take the last one.
        while waiting:
            callback = waiting.pop()
            if getattr(getattr(callback, "fun", None), "__name__", "") in ("ack_log_error", "reject_log_error"):
                callback()
    channel = consumer.task_consumer.channel
    try:
        return_unread(channel)
    # The broker's client may raise anything here, and all else that was taken is still to go back, below. That this one
    # message may be lost is a line of the journal.
    except Exception as error:  # noqa: BLE001 - told by _complain()
        _complain("a message that Redis had handed out may be lost", f"{type(error).__name__}: {error}")
    restore = getattr(getattr(channel, "qos", None), "restore_unacked_once", None)
    if restore:
        restore()


def return_unread(channel):
    """Give back what Redis has handed out in reply to BRPOP and this process has not read."""
    connection = getattr(channel, "_in_poll", None)
    if not connection:
        return
    try:
        waits = not connection.can_read(timeout=0)
        if waits:
            # A BRPOP that waits is to end without a message. Only then: Redis would send no more of one that is on its
            # way. By a descriptor of its own, as TLS would end both directions.
            with contextlib.closing(socket_of(connection._sock.fileno())) as sock:
                sock.shutdown(_socket.SHUT_WR)
            waits = not connection.can_read(timeout=REPLY_TIMEOUT_S)
    except channel.connection_errors:
        waits = True
    reply = None if waits else channel.client.parse_response(connection, "BRPOP")
    channel._in_poll = None
    if reply:
        put_back(channel, *reply)


def keep_sent(pool):
    """Have a prefork pool that ends remember the tasks that it has sent to a child, be they reported as begun or not.

    To be called once it has started, and again whenever. What is marked is what AsynPool.flush() goes by (Celery 5.2,
    5.6.3, 5.7): it drops from the pool's cache all that is not accepted, and so the result of a task that was on its
    way to a child, and with the result its acknowledgement.
    """
    flush = getattr(pool, "flush", None)
    # None where Celery does not read the broker asynchronously: that pool forgets nothing.
    if flush is None or getattr(flush, "keeps_sent", False):
        return

    def flush_others():
        try:
            for job in tuple(pool._pool._cache.values()):
                if job._write_to is not None:
                    job._accepted = True
        # Insides of Celery's, which may change. The flush must come either way; what is lost is this precaution, as the
        # journal says.
        except Exception as error:  # noqa: BLE001 - told by _complain()
            _complain("a task may be done twice as this worker stops", f"{type(error).__name__}: {error}")
        return flush()

    flush_others.keeps_sent = True
    pool.flush = flush_others


def socket_of(fd):
    """A socket of our own on a duplicate of a descriptor, as theirs may be green.

    That is left as it is: whether reads wait, which socket.setdefaulttimeout() would change, is shared with theirs.
    """
    fd = os.dup(fd)
    try:
        return _socket.socket(-1, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK, -1, fd)
    except OSError:
        os.close(fd)
        raise


def reply_to_brpop(data):
    """Key and message of a reply as Redis sends it, both bytes; None where there is none. ValueError: cut off."""
    found = re.match(rb"\*2\r\n\$(\d+)\r\n", data)
    if not found:
        return None  # A time-out, or an error.
    key_end = found.end() + int(found[1])
    size = re.compile(rb"\r\n\$(\d+)\r\n").match(data, key_end)
    end = size.end() + int(size[1]) if size else 0
    if not size or len(data) < end + 2:
        raise ValueError(f"a reply of {len(data)} bytes that was cut off")
    return data[found.end() : key_end], data[size.end() : end]


class HandedOut:
    """What Redis has handed out and the worker has not noted as taken, known beyond the death of its main process.

    systemd keeps two descriptors for the unit's next process: of the connection that waits in BRPOP, whose socket so
    stays open with what Redis has sent; and of memory to which a reply is copied before kombu reads it from the socket,
    until kombu has noted it in Redis (unacked). There is at most one reply at a time. Not with TLS, whose keys die with
    the process.
    """

    # Size of the reply that follows, and which broker it is of.
    HEAD = struct.Struct("=Q200s")

    def __init__(self, environ, tell):
        self.left = self.taken_over(environ)
        self.unread = b""
        self.tries = 0
        self.tell = tell
        self.reply = None
        self.sock = None
        self.watched = None
        self.broker = b""

    @staticmethod
    def taken_over(environ):
        """The descriptors that systemd kept for us, by name: as sd_listen_fds_with_names(3)."""
        names = environ.get("LISTEN_FDNAMES", "").split(":")
        if environ.get("LISTEN_PID") != str(os.getpid()) or not {KEPT_SOCKET, KEPT_REPLY} & set(names):
            return {}
        # At SIGHUP Celery executes itself anew in this process, and these numbers are others' by then.
        del environ["LISTEN_FDNAMES"]
        left = {}
        for fd, name in enumerate(names, FIRST_FD):
            if name in (KEPT_SOCKET, KEPT_REPLY) and name not in left:
                with contextlib.suppress(OSError):
                    os.set_inheritable(fd, False)
                    left[name] = fd
        return left

    def give_back_left(self, channel):
        """Give back what the last process of this unit left. Until that is done systemd keeps it.

        Raises one of the channel's connection_errors, upon which Celery connects again and comes here again.
        """
        if not self.left:
            return
        reply = None
        try:
            reply = self.read_left(channel)
        # What a killed process left in a socket may be anything. The worker is no worse off than without us; that a
        # message may be lost is a line of the journal.
        except Exception as error:  # noqa: BLE001 - told by _complain()
            _complain("a message of the last process may be lost", f"{type(error).__name__}: {error}")
        if reply and hasattr(channel, "conn_or_acquire"):
            try:
                put_back_raw(channel, *reply)
            except channel.connection_errors:
                raise
            except Exception as error:
                # A Redis that is full, or a replica for now: it would refuse what this worker does, too.
                self.tries += 1
                if self.tries < PUT_BACK_TRIES:
                    time.sleep(1)
                    raise ConnectionError(f"a message of the last process is not put back: {error}") from error
                _complain("a message of the last process is lost", f"{type(error).__name__}: {error}")
        for name, fd in self.left.items():
            self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")
            if name == KEPT_SOCKET:
                # Children of the pool may have it, too.
                with contextlib.suppress(OSError), contextlib.closing(socket_of(fd)) as sock:
                    sock.shutdown(_socket.SHUT_RDWR)
            os.close(fd)
        self.left = {}

    def read_left(self, channel):
        """Key and message that the last process left, or None. ValueError: what there is cannot be used."""
        kept = self.left.get(KEPT_REPLY)
        broker, noted = self.noted(kept) if kept is not None else (b"", b"")
        if KEPT_SOCKET in self.left:
            self.unread += read_left(self.left[KEPT_SOCKET])
        # While a reply is noted, nothing but what is left of it can be in the socket.
        reply = reply_to_brpop(self.unread) if whole(self.unread) or not noted else reply_to_brpop(noted)
        if reply and broker and broker != broker_of(channel):
            raise ValueError(f"it is of {broker.decode(errors='replace')}, which is not this worker's broker any more")
        if self.unread and kept is not None and len(self.unread) <= REPLY_BYTES:
            # It is in no socket any more, should this process die, too.
            os.pwrite(kept, self.HEAD.pack(len(self.unread), broker) + self.unread, 0)
        return reply

    def noted(self, fd):
        data = os.pread(fd, self.HEAD.size + REPLY_BYTES, 0)
        size, broker = self.HEAD.unpack_from(data)
        return broker.rstrip(b"\0"), data[self.HEAD.size :][:size]

    def watch(self, channel):
        """Keep what this channel is handed, from now on. Nothing to keep where the transport is not Redis."""
        if not hasattr(channel, "_brpop_start") or "BRPOP" not in getattr(channel, "handlers", ()):
            return
        if self.reply is None:
            fd = os.memfd_create(KEPT_REPLY)
            try:
                os.ftruncate(fd, self.HEAD.size + REPLY_BYTES)
                self.reply = mmap.mmap(fd, self.HEAD.size + REPLY_BYTES)
                # At SIGHUP there is one of this process already.
                self.tell("FDSTOREREMOVE=1", f"FDNAME={KEPT_REPLY}")
                self.tell("FDSTORE=1", f"FDNAME={KEPT_REPLY}", fd=fd)
            finally:
                os.close(fd)
        self.broker = broker_of(channel)
        self.clear()
        start, read, append = channel._brpop_start, channel.handlers["BRPOP"], channel.qos.append

        def brpop_start(*args, **kwargs):
            start(*args, **kwargs)
            self.keep(channel.client.connection._sock)

        def brpop_read(*args, **kwargs):
            self.note()
            try:
                return read(*args, **kwargs)
            finally:
                self.clear()

        def qos_append(*args, **kwargs):
            append(*args, **kwargs)
            self.clear()

        channel._brpop_start, channel.qos.append = brpop_start, qos_append
        channel._brpop_read = channel.handlers["BRPOP"] = brpop_read

    def keep(self, sock):
        if sock is self.watched:
            return
        self.watched = sock
        try:
            if self.sock:
                self.sock.close()
                self.sock = None
            if not hasattr(sock, "getpeercert"):
                self.sock = socket_of(sock.fileno())
                self.tell("FDSTOREREMOVE=1", f"FDNAME={KEPT_SOCKET}")
                self.tell("FDSTORE=1", f"FDNAME={KEPT_SOCKET}", fd=self.sock.fileno())
        # kombu's insides differ by version and transport. The worker is no worse off than without us; that a kill may
        # lose a message then is a line of the journal.
        except Exception as error:  # noqa: BLE001 - told by _complain()
            _complain("a message may be lost if this process is killed", f"{type(error).__name__}: {error}")

    def note(self):
        if self.sock:
            with contextlib.suppress(OSError), memoryview(self.reply)[self.HEAD.size :] as room:
                size = self.sock.recv_into(room, 0, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
                self.HEAD.pack_into(self.reply, 0, size, self.broker)

    def clear(self):
        if self.reply:
            self.HEAD.pack_into(self.reply, 0, 0, self.broker)


def read_left(fd):
    """What Redis has sent and nobody has read; after that there is nothing more to come."""
    data = bytearray()
    with contextlib.closing(socket_of(fd)) as sock, contextlib.suppress(OSError):
        sock.settimeout(REPLY_TIMEOUT_S)
        try:
            data += sock.recv(1 << 16, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            # It waits. Only then: Redis would send no more of a reply that is on its way.
            sock.shutdown(_socket.SHUT_WR)
        while not whole(data) and (more := sock.recv(1 << 16)):
            data += more
    return bytes(data)


def whole(data):
    """Whether a reply is complete, be it that there is none."""
    try:
        return reply_to_brpop(data) is not None or bytes(data[:5]) in (b"*-1\r\n", b"_\r\n")
    except ValueError:
        return False


def broker_of(channel):
    """Which Redis, and which of its databases: a URL without its password."""
    return channel.connection.client.as_uri().encode()[:200]


def put_back_raw(channel, key, message):
    """As put_back(), by the very key that Redis said, whatever prefix for all keys this worker has."""
    import redis

    with channel.conn_or_acquire() as client:
        redis.Redis.execute_command(client, "RPUSH", key, message)


def put_back(channel, key, message):
    """To that end of the list that is next."""
    with channel.conn_or_acquire() as client:
        # Text, which a prefix for all keys can be put in front of.
        client.rpush(key.decode() if isinstance(key, bytes) else key, message)


# ---- what Celery calls ----


class Notifier:
    """The receivers of Celery's signals and of the bootstep, and the threads."""

    def __init__(self):
        self.pid = 0
        self.consumer = None
        self.pool = ""
        self.said = ""
        # How often in a row the loop was found to hang. The second time it is given up, whatever it does then.
        self.hung = 0
        self.troubled = False
        # Which start of the consumer it is that ticks.
        self.run = None
        self.asked = False
        self.closing = False

    def install(self):
        """In the main process, worker_init comes after this was imported and before anything is set up."""
        try:
            from celery import signals
        except ImportError as error:
            _complain("switched off", error)
        else:
            signals.worker_init.connect(self.on_init, weak=False)

    def give_up(self, error):
        """A worker that cannot be watched is taken as one that lives."""
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        _complain("the watchdog is off", reason)
        if self.pid:
            self.health.unknown = reason
            self.tell_status()

    def tell(self, *lines, fd=None):
        if self.settings.address and os.getpid() == self.pid:
            send(self.settings.address, *lines, fd=fd)

    def tell_status(self, status=""):
        status = status or self.health.status()
        if status != self.said:
            self.said = status
            self.tell(f"STATUS={status}")

    def on_init(self, sender=None, **_):
        if self.pid:
            return
        self.settings = Settings(os.environ)
        self.health = Health(self.settings, time.monotonic())
        self.pid = os.getpid()
        self.start(sender)

    @_guarded
    def start(self, worker):
        from celery import signals

        self.handed_out = None
        # What must be told comes first, should any of the rest fail.
        signals.worker_ready.connect(self.on_ready, weak=False)
        signals.worker_shutting_down.connect(self.on_shutting_down, weak=False)
        self.tell_status()
        self.sleep, self.start_thread = _original("time", "sleep"), _original("_thread", "start_new_thread")
        if self.settings.address:
            self.start_thread(self.watch, ())
        worker.app.steps["consumer"].add(consumer_step(self))
        if self.settings.address:
            self.handed_out = HandedOut(os.environ, self.tell)
        if not faulthandler.is_enabled():
            faulthandler.enable(2)
            os.register_at_fork(after_in_child=faulthandler.disable)

    @_guarded
    def on_ready(self, **_):
        self.health.ready = True
        # The loop is about to run.
        self.health.tick(time.monotonic())
        self.tell("READY=1")
        self.tell_status()

    @_guarded
    def on_shutting_down(self, how="Warm", **_):
        if self.health.stopping is None:
            self.tell("STOPPING=1")
        self.stop(cold=how == "Cold")

    def stop(self, cold=False):
        if self.health.stopping is not None or os.getpid() != self.pid:
            return
        self.health.stopping = time.monotonic()
        self.tell_status()
        if cold or self.consumer is None:
            return
        if getattr(self.consumer.pool, "is_green", False):
            # Their sockets are of use in their own thread alone.
            self.consumer.pool.spawn_n(self.limit_shutdown, time.sleep)
        else:
            self.start_thread(self.limit_shutdown, (self.sleep,))

    # ---- the bootstep ----

    @_guarded
    def on_consumer(self, consumer):
        self.consumer = consumer
        self.pool = type(consumer.pool).__module__.rpartition(".")[2]
        if self.pool == "solo" or consumer.pool.is_green:
            from celery import signals

            signals.task_prerun.connect(self.on_task_prerun, weak=False)
            signals.task_postrun.connect(self.on_task_postrun, weak=False)

    def on_task_prerun(self, **_):
        self.health.tasks += 1

    def on_task_postrun(self, **_):
        self.health.tasks -= 1

    def on_channel(self, channel):
        if self.handed_out is None:
            return
        self.handed_out.give_back_left(channel)
        try:
            self.handed_out.watch(channel)
        # As there: the worker consumes as without us, and the journal says that a kill may lose a message.
        except Exception as error:  # noqa: BLE001 - told by _complain()
            _complain("a message may be lost if this process is killed", f"{type(error).__name__}: {error}")

    @_guarded
    def on_consumer_start(self):
        if self.pool == "prefork":
            keep_sent(self.consumer.pool)
        self.run, self.asked = object(), False
        self.consumer.timer.call_after(TICK_EVERY_S, self.on_timer, (self.run,))

    @_guarded
    def on_timer(self, run):
        # The timer outlives a connection, and each start of the consumer has its own chain of ticks.
        if run is not self.run:
            return
        self.consumer.timer.call_after(TICK_EVERY_S, self.on_timer, (run,))
        if self.consumer.hub or self.pool not in ("solo", "thread"):
            self.on_tick()
        elif not self.asked:
            # Here the timer is a thread beside the loop. Other pools may make this loop wait for a free process.
            self.asked = True
            self.consumer.call_soon(self.on_tick)

    @_guarded
    def on_tick(self):
        self.asked = False
        self.health.tick(time.monotonic())
        self.tell_status()

    @_guarded
    def on_consumer_stop(self):
        self.run = None
        self.health.connect(time.monotonic())
        self.tell_status()

    @_guarded
    def on_consumer_close(self):
        """It stops for good, be it without a signal: by remote control, or for an error."""
        self.stop()

    def on_consumer_shutdown(self):
        """Its tasks have ended, and Celery itself gives back what is left; two at once would hinder each other."""
        self.closing = True

    # ---- the threads ----

    def watch(self):
        while self.settings.watchdog_s or not self.health.ready:
            self.on_watch()
            self.sleep(self.settings.every_s)

    @_guarded
    def on_watch(self):
        now = time.monotonic()
        due, trouble = self.health.due(now), self.health.trouble(now)
        if due and self.hung < 2:
            self.tell(due)
        if trouble:
            _complain("systemd is to end this worker", trouble)
            if not self.troubled:
                # Here the GIL holds the other threads still. At SIGABRT faulthandler does without it, and crashes where
                # it reads a frame that changes (Python 3.11, 43 of 300 with one thread that ran): no stack at all.
                faulthandler.dump_traceback(2)
            self.tell_status(f"to be ended by systemd: {trouble}")
        self.troubled = bool(trouble)
        if self.hung == 2:
            # The rescue hangs too, or this systemd does not know the word.
            self.tell("WATCHDOG=trigger")
        else:
            self.hung = self.hung + 1 if trouble and self.health.hangs() else 0
            if self.hung == 2:
                # What hangs may hold a lock that this needs; systemd is to be told of the trouble all the same.
                self.start_thread(self.rescue, ())

    def rescue(self):
        """Give back what a hung loop holds, and have the worker ended before the loop could take more."""
        try:
            if not self.consumer.pool.is_green:
                give_back(self.consumer)
        # Its loop hangs, and ending it is the one way out: that must happen below, whatever the broker's client raises.
        # That nothing was given back is a line of the journal.
        except Exception as error:  # noqa: BLE001 - told by _complain()
            _complain("messages are not given back", f"{type(error).__name__}: {error}")
        self.tell("WATCHDOG=trigger")

    def limit_shutdown(self, sleep):
        settings, consumer = self.settings, self.consumer
        sleep(settings.stop_timeout_s - settings.margin_s)
        if self.pool == "prefork" and cold_shutdown_works() and not self.closing:
            self.tell_status("stopping: ending the tasks that run")
            # This was its soft shutdown.
            consumer.app.conf.worker_soft_shutdown_timeout = 0
            os.kill(self.pid, signal.SIGQUIT)
            sleep(settings.margin_s / 2)
        if self.closing:
            return
        try:
            give_back(consumer)
            _complain("not stopped in time", "it ends now, and unfinished messages are back at the broker")
        # systemd kills it in a moment, so that there is nobody to raise it to. That nothing was given back is a line of
        # the journal; where the connection was closed by an orderly end in between, all went back by that.
        except Exception as error:  # noqa: BLE001 - told by _complain()
            if self.closing:
                return
            _complain("not stopped in time", f"messages are not given back: {type(error).__name__}: {error}")
        # systemd is about to kill it. Children are killed by the kernel when their parent ends.
        os._exit(0)


def cold_shutdown_works():
    """Whether SIGQUIT in the middle of a warm shutdown gives messages back: since Celery 5.5 it does."""
    worker = sys.modules.get("celery.apps.worker")
    return hasattr(worker, "on_cold_shutdown") and callable(signal.getsignal(signal.SIGQUIT))


def consumer_step(notifier):
    """The bootstep of the consumer; what it is derived from must not be imported before Celery has patched."""
    from celery import bootsteps
    from celery.worker.consumer.tasks import Tasks

    class Notify(bootsteps.StartStopStep):
        # By the class: a name that is none would fail the worker, and not this import.
        requires = (Tasks,)

        def __init__(self, consumer, **kwargs):
            super().__init__(consumer, **kwargs)
            notifier.on_consumer(consumer)

        def start(self, consumer):
            notifier.on_channel(consumer.task_consumer.channel)
            notifier.on_consumer_start()

        def stop(self, consumer):
            notifier.on_consumer_stop()

        terminate = stop

        def close(self, consumer):
            notifier.on_consumer_close()

        def shutdown(self, consumer):
            notifier.on_consumer_shutdown()

    return Notify


notifier = Notifier()
notifier.install()
