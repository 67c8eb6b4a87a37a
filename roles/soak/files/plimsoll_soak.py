# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The part of a soak that runs in the application's own Python: the recorder of a worker, the worker, and the sender.

    python plimsoll_soak.py worker DIR     # a worker of the application, with the recorder in it
    python plimsoll_soak.py send DIR       # sends the tasks of DIR/schedule.jsonl at their times
    python plimsoll_soak.py clean DIR      # removes the queue, once both have ended

Standard library and Celery 5.3 or later, Python 3.9 or later, Linux.

The recorder is loaded by CELERY_WORKER_INCLUDE=plimsoll_soak, with no change to the application, and records where
PLIMSOLL_SOAK_DIR is set. At the start of a task, in the process that runs it, it collects the garbage and reads what is
in use: what glibc's malloc has handed out, to the byte, as mallinfo2(3) tells it. Memory in use has neither the slack
of an allocator nor that of pages: RSS that is shared out among tasks blames whoever allocates next. For that, the
worker is started with PYTHONMALLOC=malloc, as Python's own small objects are malloc's then, and
GLIBC_TUNABLES=glibc.malloc.tcache_count=0, as what a thread keeps for itself counts as in use. Without mallinfo2 (musl,
glibc before 2.33, jemalloc) RSS is taken in its place, and the records say so.

Of STRIDE tasks of one name in a row, followed by another one of that name, growth is what is gained from the start of
the first one to the start of that other one: so return values and what is freed just after a task do not count, and
what the message of a task takes, which is in memory as it starts, is there at both. Tasks that overlap in one process,
as in the pools threads, gevent and eventlet, cannot be told apart: then it records why and nothing else. Whatever fails
here, the worker goes on.

Records: PLIMSOLL_SOAK_DIR/records/PID-NUMBER.jsonl, one JSON object a line, NUMBER the nanosecond in which it began.
The first line is {kind: process, pid, time (Unix seconds), measure: malloc | rss, python}. A task is {kind: task,
time (of its end), pid, task (name), growth_bytes (of this one and those of its name just before it, together; null: not
measured), grown (how many those are), used_bytes, rss_kb, fds (all three at its start), seconds, failed (whether it
raised; a retry is one), error (name of the exception's class, or empty)}. {kind: refused, pid, why} is the last line of
a process that could not be measured.

DIR is made by whoever asks (plimsoll soak does), with the folders said, records and queue in it. plan.json there: {app
(as of celery -A), tasks (names), settings (of Celery), include (module that the worker loads), pool, concurrency,
seconds (time box), queue, backlog (messages that may wait), parent (pid of the process that both end with; 0: none)}.
schedule.jsonl: [at_s, task, args, kwargs] a line, in order. Where CELERY_BROKER_URL is plimsoll://, DIR/queue is the
broker, and whatever anybody sends in these processes waits there, in one queue. The worker writes DIR/said/ready once
it takes tasks, or DIR/said/trouble with what keeps it from that, and exits with 2. The sender stops where DIR/stop is,
leaves out the tasks that DIR/decided.json names (a list), and ends once nothing waits any more. DIR/said/sent.json
{sent, left_out, over: "" | all sent | time box | stopped} is at most a second old.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from array import array
from pathlib import Path

# Tasks whose growth is taken together. A collection takes as long as there are objects that came since gc.freeze(), and
# where some leak that is more than a small task takes.
STRIDE = 4
# Tasks of a process that import, and collect what is there for the first time. Frozen is at the first one, and then
# when so many times as many ran.
WARM_TASKS, FREEZE_TIMES = 8, 4
# A record waits for so long at most while tasks run.
WRITE_EVERY_S = 0.25
MOST_ROWS = 512
_NAMES = ("task", "growth_bytes", "used_bytes", "rss_kb", "fds", "began", "time", "seconds", "failed", "error")
COLUMNS = {name: at for at, name in enumerate(_NAMES)}
# The sender looks so often, seconds: for room in the queue, and for what it is told by files; and says how far it is.
WAIT_S, LOOK_EVERY_S, SAY_EVERY_S = 0.005, 0.25, 1.0
# So much later than due a task may be sent, and the next ones at their times all the same, seconds.
LATE_S = 0.1
# How often an empty folder is looked at, and how long at a time, seconds.
POLLING_S, DRAIN_S = 0.01, 0.1
EMBEDDED = "plimsoll"
# Where worker and sender say how they are. They may write to the folder below DIR, and to DIR itself perhaps not.
SAID = "said"
# prctl(2): the signal that a process is sent when its parent has died.
PR_SET_PDEATHSIG = 1
# The fields of struct mallinfo2, mallinfo2(3).
MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
# Python itself takes more from malloc; less than that, and another allocator has taken its place.
LEAST_MALLOC_BYTES = 1 << 20
DONE, BAD_INPUT = 0, 2
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Trouble(Exception):
    """What keeps a soak from beginning; the message says what and the way out."""


# ---- the recorder ----


def _resident():
    """Bytes that are resident."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES


def _mallinfo2():
    """A function that gives the bytes that malloc has handed out; None where there is none."""
    # Here, and not above: a Python without ctypes is to run the worker all the same.
    with contextlib.suppress(Exception):
        import ctypes

        mallinfo2 = ctypes.CDLL(None).mallinfo2
        fields = {"_fields_": [(name, ctypes.c_size_t) for name in MALLINFO2.split()]}
        mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), fields)

        def used():
            found = mallinfo2()
            return found.uordblks + found.hblkhd

        if used() >= LEAST_MALLOC_BYTES:
            return used
    return None


class Recorder:
    """The tasks of one process.

    What is in use is read right after a collection, which empties the interpreter's free lists too. Between two such
    readings nothing of ours may stay, as that would be the task's growth: so what is noted goes into arrays that are
    there before.

    Where a collection took longer than what ran since the one before it, nothing is measured for as long as it took,
    and now and then what is there is frozen: collections look through it no more. Of what is frozen nothing is freed
    that is in cycles, so a cache of such objects seems to grow until they all have left it; so it is done ever less.
    """

    def __init__(self, folder):
        self.pid = os.getpid()
        used = _mallinfo2()
        self.used = used or _resident
        self.path = folder / "records" / f"{self.pid}-{time.time_ns()}.jsonl"
        self.depth, self.runs, self.thread = 0, 0, threading.get_ident()
        # The task that ran last, how many of its name in a row since a reading (-1: there is none), and that reading.
        self.name, self.since, self.base = "", -1, array("q", [0])
        # Whether there is a row to be ended.
        self.open = False
        self.rows, self.row = array("d", bytes(8 * len(COLUMNS) * MOST_ROWS)), 0
        # By number, names of tasks and of exceptions; the empty one is 0.
        self.names, self.numbers = [""], {"": 0}
        self.read_at = self.rest_until = self.write_at = 0.0
        self.slow, self.freeze_at = False, 0
        head = {"kind": "process", "pid": self.pid, "time": time.time(), "measure": "malloc" if used else "rss"}
        self._append([{**head, "python": sys.version.split()[0]}])

    def start(self, name):
        """A task begins. Raises RuntimeError where another one runs beside it."""
        if self.depth and threading.get_ident() != self.thread:
            raise RuntimeError("tasks run side by side in one process: growth cannot be told by task; pool prefork can")
        self.depth += 1
        if self.depth > 1:
            # A task that a task calls, by apply().
            return
        self.thread = threading.get_ident()
        self.runs += 1
        self.since = self.since + 1 if name == self.name and self.since >= 0 else -1
        self.name = name
        if self.since == STRIDE:
            before = self.base[0]
            self._read()
            self._note("growth_bytes", self.base[0] - before)
            self.since = 0
        self.close()
        if time.monotonic() < self.rest_until:
            self.since = -1
        elif self.since < 0:
            self._read()
            if self.runs == 1 or (self.slow and self.runs >= self.freeze_at):
                gc.freeze()
                self.freeze_at = max(WARM_TASKS, FREEZE_TIMES * self.runs)
            self.since = 0
        self._note("task", self._number(name))
        self._note("growth_bytes", math.nan)
        self._note("used_bytes", self.used())
        self._note("rss_kb", _resident() // 1024)
        self._note("fds", len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - a Path costs more
        self._note("began", time.monotonic())
        self.open = True

    def end(self, failed, error):
        self.depth -= 1
        if self.depth == 0 and self.open:
            self._note("time", time.time())
            self._note("seconds", time.monotonic() - self._noted("began"))
            self._note("failed", failed)
            self._note("error", self._number(error))

    def close(self):
        """The row of the task that has ended is whole."""
        if self.open:
            self.open = False
            self.row += 1
            if self.row == MOST_ROWS or time.monotonic() >= self.write_at:
                self.write()

    def _read(self):
        begin = time.monotonic()
        # Where the application has it off, what is in cycles is a leak.
        if gc.isenabled():
            gc.collect()
        self.base[0] = self.used()
        end = time.monotonic()
        self.slow = end - begin > begin - self.read_at
        if self.slow and self.runs > WARM_TASKS:
            self.rest_until = 2 * end - begin
        self.read_at = end

    def _number(self, name):
        number = self.numbers.get(name)
        if number is None:
            number = self.numbers[name] = len(self.names)
            self.names.append(name)
        return number

    def _note(self, column, value):
        self.rows[self.row * len(COLUMNS) + COLUMNS[column]] = value

    def _noted(self, column, row=None):
        return self.rows[(self.row if row is None else row) * len(COLUMNS) + COLUMNS[column]]

    def write(self):
        rows, self.row = range(self.row), 0
        self._append(self._told(row) for row in rows)
        self.write_at = time.monotonic() + WRITE_EVERY_S

    def _told(self, row):
        def noted(column):
            return self._noted(column, row)

        growth = noted("growth_bytes")
        return {
            "kind": "task",
            "time": round(noted("time"), 4),
            "pid": self.pid,
            "task": self.names[int(noted("task"))],
            "growth_bytes": None if math.isnan(growth) else int(growth),
            "grown": STRIDE,
            **{name: int(noted(name)) for name in ("used_bytes", "rss_kb", "fds")},
            "seconds": round(noted("seconds"), 5),
            "failed": bool(noted("failed")),
            "error": self.names[int(noted("error"))],
        }

    def _append(self, rows):
        lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
        if not lines:
            return
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
        try:
            os.write(descriptor, lines)
        finally:
            os.close(descriptor)

    def refuse(self, why):
        self._append([{"kind": "refused", "pid": self.pid, "why": why}])


class Recording:
    """What Celery's signals tell, in each process that runs tasks. Nothing of it may fail a task."""

    def __init__(self, folder):
        self.folder, self.recorder, self.over = folder, None, False

    def connect(self):
        from celery import signals

        signals.task_prerun.connect(self.on_start, weak=False)
        signals.task_postrun.connect(self.on_end, weak=False)
        for ends in (signals.worker_process_shutdown, signals.worker_shutdown):
            ends.connect(self.on_shutdown, weak=False)
        os.register_at_fork(after_in_child=self.on_fork)

    def on_fork(self):
        # A pool's child begins anew. What a task forks runs no task, and has nothing to write.
        self.recorder, self.over = None, False

    def on_start(self, task=None, **_):
        if self.over:
            return
        try:
            if self.recorder is None:
                self.recorder = Recorder(self.folder)
            self.recorder.start(task.name)
        except Exception as error:  # noqa: BLE001 - the application must go on
            self.refuse(error)

    def on_end(self, state=None, retval=None, **_):
        if self.over or self.recorder is None:
            return
        try:
            failed = state in ("FAILURE", "RETRY")
            self.recorder.end(failed, type(retval).__name__ if failed else "")
        except Exception as error:  # noqa: BLE001 - as above
            self.refuse(error)

    def on_shutdown(self, **_):
        if self.over or self.recorder is None:
            return
        with contextlib.suppress(Exception):
            self.recorder.close()
            self.recorder.write()

    def refuse(self, error):
        self.over = True
        with contextlib.suppress(Exception):
            os.write(2, f"plimsoll_soak: process {os.getpid()}: not recorded: {error}\n".encode(errors="replace"))
        with contextlib.suppress(Exception):
            self.recorder.refuse(str(error))


# ---- the embedded broker ----


def register():
    """Have plimsoll:// be a broker that is the folder PLIMSOLL_SOAK_DIR/queue, a file a message.

    kombu's own filesystem:// reads files that are half written, and looks through all that wait for each message.
    """
    from queue import Empty

    import kombu.transport
    from kombu.transport import filesystem
    from kombu.utils.json import dumps, loads

    folder = Path(os.environ["PLIMSOLL_SOAK_DIR"])
    messages, number = folder / "queue", itertools.count()

    class Channel(filesystem.Channel):
        control_folder = folder / "control"

        def _put(self, queue, payload, **_):
            # Whatever a task sends is for this worker; nobody else takes from here.
            name = f"{time.monotonic_ns():020}-{os.getpid()}-{next(number)}"
            part = messages / f".{name}"
            part.write_text(dumps(payload))
            part.rename(messages / name)

        def _get(self, queue):
            for name in self._waiting():
                path = messages / name
                payload = loads(path.read_text())
                path.unlink()
                return payload
            raise Empty

        def _waiting(self):
            return sorted(path.name for path in messages.iterdir() if not path.name.startswith("."))

        def _size(self, queue):
            return len(self._waiting())

        def _purge(self, queue):
            return 0

    class Transport(filesystem.Transport):
        polling_interval = POLLING_S

        def drain_events(self, connection, timeout=None):
            # The worker looks whether it is to end no sooner than this returns.
            return super().drain_events(connection, DRAIN_S if timeout is None else min(timeout, DRAIN_S))

    Transport.Channel = Channel
    kombu.transport.TRANSPORT_ALIASES[EMBEDDED] = lambda: Transport


# ---- the application ----


def application(plan):
    """The Celery application, made to work for this soak alone. Raises Trouble."""
    try:
        from celery.app.utils import find_app
        from kombu import Exchange, Queue
    except ImportError as error:
        raise Trouble(
            f"{sys.executable} has no Celery ({error}): name the Python of the application by --python, or activate its"
            " venv"
        ) from error
    if os.environ.get("CELERY_BROKER_URL", "").startswith(f"{EMBEDDED}:"):
        register()
    sys.path.insert(0, str(Path.cwd()))
    try:
        app = find_app(plan["app"])
        # As the worker does, which finds the tasks by it.
        app.loader.import_default_modules()
        app.finalize()
    except Exception as error:
        # Whatever its code raises as it is imported.
        raise Trouble(
            f"-A {plan['app']}: cannot be imported by {sys.executable} in {Path.cwd()}: {type(error).__name__}: {error}"
        ) from error
    known = sorted(task for task in app.tasks if not task.startswith("celery."))
    for task in plan["tasks"]:
        if task not in app.tasks:
            near = difflib.get_close_matches(task, known, 3) or known[:10]
            raise Trouble(
                f"tasks: {task}: {plan['app']} has no task of this name; it has"
                f" {', '.join(near) or 'none at all: are the modules of its tasks imported?'}"
            )
    name = plan["queue"]
    app.conf.update(
        # Where the application would have it otherwise, nothing was put to the queue, or what is looked for would be
        # hidden by a new process.
        task_always_eager=False,
        worker_max_tasks_per_child=None,
        worker_max_memory_per_child=None,
        worker_autoscaler=None,
        worker_state_db=None,
        # All that the application sends without naming a queue comes here, by an exchange of our own: the application's
        # default one may be shared with other queues.
        task_queues=[Queue(name, Exchange(name, "direct", auto_delete=True), routing_key=name, auto_delete=True)],
        task_routes={"*": {"queue": name}},
        task_default_queue=name,
        task_default_exchange=name,
        task_default_exchange_type="direct",
        task_default_routing_key=name,
        task_create_missing_queues=True,
        # Nothing of it is anybody else's matter.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        task_send_sent_event=False,
        broker_connection_retry_on_startup=True,
    )
    app.conf.update(plan["settings"])
    return app


def end_with(parent):
    """By SIGTERM, however the parent ends, if it has not yet."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        raise Trouble("whoever started this has ended")


def work(folder, plan):
    app = application(plan)
    from celery import signals

    @signals.worker_ready.connect(weak=False)
    def ready(**_):
        (folder / SAID / "ready").touch()

    # Celery's command takes these too, without a prefix, before what was set here.
    for variable in ("APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE"):
        os.environ.pop(variable, None)
    options = [
        *("--pool", plan["pool"], "--concurrency", str(plan["concurrency"]), "--queues", plan["queue"]),
        *("--include", plan["include"]),
        *("--hostname", "plimsoll-soak@%h", "--loglevel", "WARNING"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]
    return app.worker_main(["worker", *options])


# ---- the sender ----


class Sender:
    """Sends what is scheduled, no sooner than it is due, and no more ahead of the worker than the backlog."""

    def __init__(self, folder, plan):
        self.folder, self.plan = folder, plan
        self.app = application(plan)
        self.connection = self.app.connection_for_write()
        self.sent = self.left_out = self.room = 0
        self.over, self.decided = "", frozenset()
        self.began = time.monotonic()
        self.look_at = self.say_at = 0.0

    def run(self):
        try:
            with (self.folder / "schedule.jsonl").open() as schedule:
                before = spared = 0.0
                for line in schedule:
                    at, task, args, kwargs = json.loads(line)
                    if task in self.decided:
                        # So is the time that it had: those that are left come no closer to each other than before.
                        spared += at - before
                        before = at
                        self.left_out += 1
                        continue
                    before = at
                    due = self.began + at - spared
                    while time.monotonic() < due and not self.ended():
                        time.sleep(min(LOOK_EVERY_S, max(0.0, due - time.monotonic())))
                    if self.ended():
                        break
                    while not self.has_room() and not self.ended():
                        time.sleep(WAIT_S)
                    if self.over:
                        break
                    # What waited for a slow worker is not made up for: the rate is a limit.
                    spared -= max(0.0, time.monotonic() - due - LATE_S)
                    self.app.send_task(task, args, kwargs, queue=self.plan["queue"])
                    self.sent += 1
                    self.room -= 1
            while not self.ended() and self.waiting():
                time.sleep(LOOK_EVERY_S)
            self.over = self.over or "all sent"
        finally:
            self.say()

    def waiting(self):
        try:
            with self.connection.channel() as channel:
                return channel.queue_declare(self.plan["queue"], passive=True).message_count
        except self.connection.channel_errors:
            # In Redis, an empty queue is none at all.
            return 0

    def has_room(self):
        if self.room <= 0:
            self.room = self.plan["backlog"] - self.waiting()
        return self.room > 0

    def ended(self):
        now = time.monotonic()
        if not self.over and now >= self.look_at:
            self.look_at = now + LOOK_EVERY_S
            if (self.folder / "stop").exists():
                self.over = "stopped"
            elif now - self.began >= self.plan["seconds"]:
                self.over = "time box"
            with contextlib.suppress(FileNotFoundError):
                self.decided = frozenset(json.loads((self.folder / "decided.json").read_text()))
            if now >= self.say_at:
                self.say_at = now + SAY_EVERY_S
                self.say()
        return bool(self.over)

    def say(self):
        part = self.folder / SAID / "sent.part"
        part.write_text(json.dumps({"sent": self.sent, "left_out": self.left_out, "over": self.over}))
        part.replace(self.folder / SAID / "sent.json")


def forget(channel, name):
    """With Redis, drop what a worker that was killed had taken from a queue: any other worker would put it back there.

    kombu keeps it in a hash by delivery tag, as [message, exchange, routing key].
    """
    key = getattr(channel, "unacked_key", None)
    if key is None:
        return
    # Which kombu puts before the keys of some commands, and not of this one.
    taken = channel.client.hgetall(f"{channel.global_keyprefix}{key}")
    for tag, message in taken.items():
        if json.loads(message)[1] == name:
            channel.client.hdel(key, tag)
            channel.client.zrem(channel.unacked_index_key, tag)


def clean(plan):
    app = application(plan)
    with app.connection_for_write() as connection, connection.channel() as channel:
        # To be declared, as a transport without a broker's own queues knows those alone that it declared.
        queue = app.amqp.queues[plan["queue"]](channel)
        forget(channel, plan["queue"])
        queue.declare()
        queue.delete()
        # Of the same name, which nobody else's has.
        if queue.exchange.name == plan["queue"]:
            queue.exchange.delete()


def main(arguments):
    if len(arguments) != 2 or arguments[0] not in ("worker", "send", "clean"):
        print("usage: plimsoll_soak.py worker|send|clean DIR", file=sys.stderr)
        return BAD_INPUT
    folder = Path(arguments[1])
    try:
        plan = json.loads((folder / "plan.json").read_text())
        if plan["parent"]:
            end_with(plan["parent"])
        if arguments[0] == "worker":
            return work(folder, plan) or DONE
        if arguments[0] == "send":
            Sender(folder, plan).run()
        else:
            clean(plan)
    except Trouble as trouble:
        traceback.print_exc()
        (folder / SAID / "trouble").write_text(str(trouble))
        return BAD_INPUT
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif os.environ.get("PLIMSOLL_SOAK_DIR"):
    Recording(Path(os.environ["PLIMSOLL_SOAK_DIR"])).connect()
