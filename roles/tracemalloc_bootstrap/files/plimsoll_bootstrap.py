# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Says from inside a Celery worker which task its memory grows in, and which line allocates it.

The worker loads this by CELERY_WORKER_INCLUDE=plimsoll_bootstrap, with no change to the application. Standard library
alone, Python 3.9 or later, Celery 5.3 or later. Whatever fails here, the worker goes on; one line on stderr says what.

It works in the processes that run tasks: a prefork worker's children, or the one process of a solo, threads or green
pool. What RSS gains from the start of a task until the next one starts is that task's growth; so what is freed just
after a task, as its return value is, does not count. While tasks overlap, growth is shared among them evenly.

Environment:
PLIMSOLL_TRACE_MODE        off, attribution (growth by task, always on, microseconds a task), or armed: attribution and,
                           when the process has grown too much, tracemalloc for one window
PLIMSOLL_TRACE_DIR         directory of the records, which the worker's user can write to
PLIMSOLL_UNIT              name of the worker in the records and their files' names
PLIMSOLL_TRACE_ARM_KB      growth over the floor that opens a window, KiB of RSS
PLIMSOLL_TRACE_WINDOW_S    length of a window, seconds
PLIMSOLL_TRACE_COOLDOWN_S  seconds from the end of a window to the next one, of this worker as a whole
PLIMSOLL_TRACE_FRAMES      frames that tracemalloc keeps of each allocation; each one costs time
PLIMSOLL_TRACE_TOP         sites in a growth record
PLIMSOLL_TASKS_DIR         where PID holds the count of tasks this process finished, for the sampler; not set: nowhere

Records: PLIMSOLL_TRACE_DIR/UNIT-PID.jsonl, one JSON object a line. Past MAX_FILE_BYTES the file becomes
UNIT-PID.1.jsonl and a new one begins. Every record has time (Unix seconds, UTC), unit, pid and kind. By kind:

task_growth   task (name), count (finished), rss_growth_kb (KiB): both since the process began. One record a task, at
              most every TASK_GROWTH_EVERY_S seconds and at the end of the process, when its count changed.
window_open   rss_kb and floor_kb (KiB), frames, window_s (seconds): tracing began.
growth        window_s (seconds it took), rss_growth_kb (KiB that RSS gained in it, less what tracing takes), traced_kb
              (KiB allocated in it and still held), sites, tasks. sites: those that grew most, [{file, line, function
              ("" if not known), size_kb (KiB held at the end), count (blocks then), growth_kb (KiB more than at the
              start)}], and callers, ["file:line"] from the inside out, when more than one frame is kept. tasks:
              {name: {count, traced_growth_kb}} of the window.
window_close  reason: window over | many blocks | process ends | refused: … (no growth record then); rss_kb (KiB).
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import linecache
import math
import os
import re
import threading
import time
import tracemalloc
from pathlib import Path

DEFAULTS = {"ARM_KB": 51200, "WINDOW_S": 60, "COOLDOWN_S": 3600, "FRAMES": 1, "TOP": 10}

# The first tasks of a process import lazily, connect, and fill caches: growth that comes once and is no leak.
WARM_TASKS = 10
TASK_GROWTH_EVERY_S = 10.0
# A worker's other child may be tracing; asking again costs a file lock.
RETRY_S = 5.0
# A task that makes millions of objects at once must not pay for their traces until it ends.
WATCH_EVERY_S = 1.0
# A snapshot copies every traced block into Python objects, and the worker is short of memory as it is.
ENOUGH_BLOCKS = 200_000
TOO_MANY_BLOCKS = 400_000
# What tracemalloc keeps a traced block, 53 to 60 measured on CPython 3.11: it tells the sum and not the count.
BYTES_A_BLOCK = 55
MAX_FILE_BYTES = 2 << 20
# Children that are recycled leave a file each; so much of them stays for collecting.
MAX_UNIT_BYTES = 16 << 20
MAX_UNIT_FILES = 200
MAX_SOURCE_BYTES = 1 << 19

_PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024
_complained = set()


def _complain(trouble, error):
    """One line a process and kind of trouble. Not through sys.stderr, which Celery redirects into its log."""
    pid = os.getpid()
    if (pid, trouble) not in _complained:
        _complained.add((pid, trouble))
        with contextlib.suppress(OSError):
            os.write(2, f"plimsoll_bootstrap: process {pid}: {trouble}: {error}\n".encode(errors="replace"))


def _guarded(method):
    """Nothing of ours may fail a task: at the first trouble this process is watched no more."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the application must go on
            self.give_up(error)

    return guarded


class Settings:
    """What the environment asks for. Raises ValueError naming the variable."""

    def __init__(self, environ):
        self.mode = environ.get("PLIMSOLL_TRACE_MODE", "off")
        if self.mode not in ("off", "attribution", "armed"):
            raise ValueError(f"PLIMSOLL_TRACE_MODE is '{self.mode}'; it must be off, attribution or armed")
        if self.mode == "off":
            return
        if not environ.get("PLIMSOLL_TRACE_DIR"):
            raise ValueError("PLIMSOLL_TRACE_DIR is not set")
        self.directory = Path(environ["PLIMSOLL_TRACE_DIR"])
        self.unit = (environ.get("PLIMSOLL_UNIT") or "celery").replace("/", "_")
        tasks = environ.get("PLIMSOLL_TASKS_DIR")
        self.tasks_directory = Path(tasks) if tasks else None
        numbers = {name: self._number(environ, name, default) for name, default in DEFAULTS.items()}
        self.arm_kb, self.window_s, self.cooldown_s = (numbers[name] for name in ("ARM_KB", "WINDOW_S", "COOLDOWN_S"))
        self.frames, self.top = max(1, int(numbers["FRAMES"])), max(1, int(numbers["TOP"]))

    @staticmethod
    def _number(environ, name, default):
        text = environ.get(f"PLIMSOLL_TRACE_{name}", "") or str(default)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # Not a number and without end are floats too, and would make a window that never closes.
        if not 0 <= value < math.inf:
            raise ValueError(f"PLIMSOLL_TRACE_{name} is '{text}'; it must be a number, 0 or more")
        return value


class Shares:
    """Growth of one measure, shared out among the tasks by name.

    Told the measure at every start and end of a task, it gives what was gained since it was last told to the tasks that
    ran, evenly, or to the one that ended last where none did.
    """

    def __init__(self, now):
        self.last = now
        self.running = {}
        self.ended = None
        self.growth = {}
        self.count = {}

    def tell(self, now):
        gained, self.last = now - self.last, now
        if self.running:
            total = sum(self.running.values())
            for name, number in self.running.items():
                self.growth[name] = self.growth.get(name, 0) + gained * number / total
        elif self.ended is not None:
            self.growth[self.ended] = self.growth.get(self.ended, 0) + gained

    def start(self, name, now):
        self.tell(now)
        self.running[name] = self.running.get(name, 0) + 1

    def end(self, name, now):
        self.tell(now)
        left = self.running.pop(name, 0) - 1
        if left > 0:
            self.running[name] = left
        self.ended = name
        self.count[name] = self.count.get(name, 0) + 1


class Records:
    """The JSON lines of one process. Trouble with the disk is said once and loses records, nothing else."""

    def __init__(self, directory, unit):
        self.directory, self.unit, self.pid = directory, unit, os.getpid()
        self.path = directory / f"{unit}-{self.pid}.jsonl"
        self._prune()

    def write(self, records):
        """Append {kind, …} dicts by one write, completed by time, unit and pid."""
        head = {"time": round(time.time(), 3), "unit": self.unit, "pid": self.pid}
        lines = "".join(json.dumps({**head, **record}, separators=(",", ":")) + "\n" for record in records).encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
            try:
                size = os.fstat(descriptor).st_size
                if os.write(descriptor, lines) != len(lines):
                    os.ftruncate(descriptor, size)
                    raise OSError("no room on the disk")
            finally:
                os.close(descriptor)
            if size + len(lines) > MAX_FILE_BYTES:
                self.path.replace(self.path.with_suffix(".1.jsonl"))
        except OSError as error:
            _complain("records are lost", error)

    def _prune(self):
        """Remove the oldest files of this unit, left by processes that ended."""
        of_this_unit = re.compile(re.escape(self.unit) + r"-\d+(\.1)?\.jsonl")
        found = []
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                if of_this_unit.fullmatch(path.name):
                    with contextlib.suppress(OSError):
                        status = path.lstat()
                        found.append((status.st_mtime, status.st_size, path))
        total = 0
        for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
            total += size
            if number >= MAX_UNIT_FILES or total > MAX_UNIT_BYTES:
                with contextlib.suppress(OSError):
                    path.unlink()


class TraceLock:
    """The right to trace, which one process of a worker has at a time; its file holds when the last window ended.

    Or when it began, where the process was killed in it: a worker short of memory is not to trace from kill to kill.
    """

    def __init__(self, path):
        self.path = path
        self.descriptor = -1

    def acquire(self, cooldown_s):
        """Whether it is ours now. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ended = os.pread(descriptor, 32, 0).strip()
            # A clock that was set back must not shut tracing off.
            if ended.isdigit() and 0 <= time.time() - int(ended) < cooldown_s:
                raise BlockingIOError
            self._write_time(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        return True

    @staticmethod
    def _write_time(descriptor):
        os.pwrite(descriptor, b"%d\n" % time.time(), 0)

    def release(self):
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                self._write_time(self.descriptor)
            # A process that a task forked holds the same lock by its copy of the descriptor: closing is not enough.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self.forget()

    def forget(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


class Window:
    """tracemalloc from start() to close()."""

    def __init__(self):
        self.opened = time.monotonic()
        # An application may trace for reasons of its own: then it is not ours to start or stop.
        self.ours = not tracemalloc.is_tracing()

    def start(self, frames):
        if self.ours:
            tracemalloc.start(frames)
        self.first = tracemalloc.take_snapshot() if traced_blocks() <= ENOUGH_BLOCKS else None
        self.shares = Shares(tracemalloc.get_traced_memory()[0])

    def age(self):
        return time.monotonic() - self.opened

    def stop(self):
        if self.ours:
            tracemalloc.stop()

    def close(self, top):
        """Stop tracing; (growth record, "") or (None, why not)."""
        try:
            blocks = traced_blocks()
            if self.first is None or blocks > TOO_MANY_BLOCKS:
                return None, f"refused: {blocks} traced blocks are too many for a snapshot"
            # Garbage in cycles is no leak where it is going to be collected.
            if gc.isenabled():
                gc.collect()
            traced = tracemalloc.get_traced_memory()[0]
            self.shares.tell(traced)
            second = tracemalloc.take_snapshot()
        finally:
            self.stop()
        return {
            "kind": "growth",
            "window_s": round(self.age(), 1),
            "traced_kb": _kb(traced),
            "sites": sites(self.first, second, top),
            "tasks": {
                # Those that have not ended yet are here too.
                name: {"count": self.shares.count.get(name, 0), "traced_growth_kb": _kb(growth)}
                for name, growth in self.shares.growth.items()
            },
        }, ""


def _kb(size):
    return round(size / 1024, 1)


def traced_blocks():
    """How many blocks tracemalloc holds a trace of, roughly."""
    return tracemalloc.get_tracemalloc_memory() // BYTES_A_BLOCK


def sites(first, second, top):
    """The lines whose allocations grew most between two snapshots, as the growth record has them."""
    # What is ours and imports' is left out below and not by filter_traces(), which looks at every block.
    own = {tracemalloc.__file__, linecache.__file__, __file__, importlib.__file__, "<unknown>"}
    by = "lineno" if second.traceback_limit == 1 else "traceback"
    found = []
    for one in sorted(second.compare_to(first, by), key=lambda one: -one.size_diff):
        *callers, site = one.traceback
        if len(found) == top or one.size_diff <= 0:
            break
        if site.filename in own or site.filename.startswith("<frozen importlib"):
            continue
        found.append(
            {
                "file": site.filename,
                "line": site.lineno,
                "function": function_at(site.filename, site.lineno),
                "size_kb": _kb(one.size),
                "count": one.count,
                "growth_kb": _kb(one.size_diff),
            }
        )
        if callers:
            found[-1]["callers"] = [f"{frame.filename}:{frame.lineno}" for frame in reversed(callers)]
    _functions.cache_clear()
    return found


@functools.lru_cache(maxsize=32)
def _functions(path):
    """[(first line, last line, qualified name)] of a source file, outer ones first."""
    found = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            inside = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inside = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    found.append((child.lineno, child.end_lineno, inside[:-1]))
            visit(child, inside)

    with Path(path).open("rb") as file:
        source = file.read(MAX_SOURCE_BYTES + 1)
    if len(source) <= MAX_SOURCE_BYTES:
        visit(ast.parse(source), "")
    return found


def function_at(path, line):
    """Qualified name of the innermost function around a line; empty where there is none or no source to read."""
    try:
        around = [name for start, end, name in _functions(path) if start <= line <= end]
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ""
    return around[-1] if around else ""


class Process:
    """What is known of the process that runs tasks. Methods that Celery and the watch call hold its lock."""

    def __init__(self, settings, give_up):
        self.settings, self.give_up = settings, give_up
        # Reentrant: a collection may run a finalizer of the application's that runs a task.
        self.lock = threading.RLock()
        self.statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self.records = Records(settings.directory, settings.unit)
        self.trace_lock = TraceLock(settings.directory / f".{settings.unit}.lock")
        self.shares = Shares(self.rss_kb())
        self.finished = 0
        self.floor_kb = None
        self.window = None
        # The window from before its start until after its stop, for a fork or a failure in between.
        self.tracing = None
        self.retry_at = 0.0
        self.written = {}
        self.write_at = time.monotonic() + TASK_GROWTH_EVERY_S
        self.counter = self._open_counter()

    def rss_kb(self):
        """KiB, less what tracing itself takes."""
        rss = int(os.pread(self.statm, 64, 0).split()[1]) * _PAGE_KB
        return rss - tracemalloc.get_tracemalloc_memory() // 1024 if tracemalloc.is_tracing() else rss

    def _open_counter(self):
        """The published count of tasks, as a descriptor; -1 where nobody asks for it."""
        directory = self.settings.tasks_directory
        if directory is None:
            return -1
        try:
            for left in directory.iterdir():
                # What is no number is not ours to remove.
                if left.name.isdigit() and not Path("/proc", left.name).exists():
                    left.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            counter = os.open(directory / str(os.getpid()), flags, 0o644)
            # Whatever the umask: the sampler is another user.
            os.fchmod(counter, 0o644)
            return counter
        except OSError as error:
            _complain("the count of tasks is not published", error)
            return -1

    def _publish_count(self):
        if self.counter >= 0:
            try:
                os.pwrite(self.counter, b"%d\n" % self.finished, 0)
            except OSError as error:
                _complain("the count of tasks is not published", error)

    def start(self, name):
        with self.lock:
            self.shares.start(name, self.rss_kb())
            if self.window:
                self.window.shares.start(name, tracemalloc.get_traced_memory()[0])

    def end(self, name):
        with self.lock:
            rss = self.rss_kb()
            self.shares.end(name, rss)
            if self.window:
                self.window.shares.end(name, tracemalloc.get_traced_memory()[0])
            self.finished += 1
            self._publish_count()
            if time.monotonic() >= self.write_at:
                self.write_growth()
            if self.window:
                if self.window.age() >= self.settings.window_s:
                    self.close_window("window over")
                elif traced_blocks() > ENOUGH_BLOCKS:
                    self.close_window("many blocks")
            elif self.settings.mode == "armed" and self.finished >= WARM_TASKS:
                self.floor_kb = rss if self.floor_kb is None else min(self.floor_kb, rss)
                if rss - self.floor_kb >= self.settings.arm_kb and time.monotonic() >= self.retry_at:
                    self.open_window(rss)

    def write_growth(self):
        """The task_growth records of those tasks that ran since the last time."""
        count = self.shares.count
        ran = [name for name in count if count[name] != self.written.get(name)]
        self.written.update((name, count[name]) for name in ran)
        self.write_at = time.monotonic() + TASK_GROWTH_EVERY_S
        growth = {name: round(self.shares.growth.get(name, 0)) for name in ran}
        if ran:
            self.records.write(
                {"kind": "task_growth", "task": name, "count": count[name], "rss_growth_kb": growth[name]}
                for name in ran
            )

    def open_window(self, rss):
        self.retry_at = time.monotonic() + RETRY_S
        try:
            if not self.trace_lock.acquire(self.settings.cooldown_s):
                return
        except OSError as error:
            _complain("no window is opened", error)
            return
        settings = self.settings
        opened = {"rss_kb": rss, "floor_kb": self.floor_kb, "frames": settings.frames, "window_s": settings.window_s}
        self.records.write([{"kind": "window_open", **opened}])
        self.tracing = Window()
        self.tracing.start(settings.frames)
        self.tracing.shares.running.update(self.shares.running)
        # After the first snapshot and before the second: what those leave behind is no growth of the application's.
        self.tracing.rss_kb = self.rss_kb()
        self.window = self.tracing
        threading.Thread(target=self._watch, args=(self.window,), name="plimsoll_bootstrap", daemon=True).start()

    def _watch(self, window):
        while self.window is window:
            time.sleep(min(WATCH_EVERY_S, self.settings.window_s))
            self.on_watch(window)

    @_guarded
    def on_watch(self, window):
        """The window of a child that has nothing to do ends too. A task that runs may end first, for as long again."""
        with self.lock:
            if self.window is not window:
                return
            if window.age() >= self.settings.window_s * (2 if self.shares.running else 1):
                self.close_window("window over")
            elif traced_blocks() > TOO_MANY_BLOCKS:
                self.close_window("many blocks")

    def close_window(self, reason):
        window, self.window = self.window, None
        rss = self.rss_kb()
        self.shares.tell(rss)
        growth, refused = window.close(self.settings.top)
        self.tracing = None
        if growth:
            growth["rss_growth_kb"] = rss - window.rss_kb
        rss = self.rss_kb()
        closed = {"kind": "window_close", "reason": refused or reason, "rss_kb": rss}
        self.records.write([growth, closed] if growth else [closed])
        self.trace_lock.release()
        # What the window itself left behind is no task's growth; and the next window needs growth of its own.
        self.shares.last = self.floor_kb = rss

    def shut_down(self):
        with self.lock:
            if self.window:
                self.close_window("process ends")
            self.write_growth()
            if self.counter >= 0:
                os.close(self.counter)
                self.counter = -1
                (self.settings.tasks_directory / str(os.getpid())).unlink(missing_ok=True)

    def abandon(self):
        """After a failure: trace no more, and leave it to another process once the cooldown is over."""
        with self.lock:
            self.window = None
            self._stop_tracing()
            self.trace_lock.release()

    def forget(self):
        """In a process forked from this one, which is not this one's concern. Another thread may have had the lock."""
        self.trace_lock.forget()
        self._stop_tracing()

    def _stop_tracing(self):
        if self.tracing:
            self.tracing.stop()
        self.tracing = None


# ---- what Celery calls ----


class Bootstrap:
    """The receivers of Celery's signals."""

    def __init__(self):
        self.settings = None
        self._begin()

    def _begin(self):
        self.process = None
        # Reentrant for the same reason as that of Process.
        self.creating = threading.RLock()

    @_guarded
    def install(self):
        """Read the settings and connect; in mode off, nothing."""
        settings = Settings(os.environ)
        if settings.mode == "off":
            return
        from celery import signals

        signals.task_prerun.connect(self.on_task_prerun, weak=False)
        signals.task_postrun.connect(self.on_task_postrun, weak=False)
        signals.worker_process_shutdown.connect(self.on_shutdown, weak=False)
        signals.worker_shutdown.connect(self.on_shutdown, weak=False)
        os.register_at_fork(after_in_child=self.on_fork)
        self.settings = settings

    def give_up(self, error):
        self.settings = None
        _complain("switched off", f"{type(error).__name__}: {error}")
        if self.process:
            with contextlib.suppress(Exception):
                self.process.abandon()

    @_guarded
    def on_task_prerun(self, task=None, **_):
        if not self.settings:
            return
        # At the first task: in a prefork worker's main process, where none runs, there is nothing of ours.
        with self.creating:
            if self.process is None:
                self.process = Process(self.settings, self.give_up)
        self.process.start(task.name)

    @_guarded
    def on_task_postrun(self, task=None, **_):
        if self.settings and self.process:
            self.process.end(task.name)

    @_guarded
    def on_shutdown(self, **_):
        if self.settings and self.process:
            self.process.shut_down()

    @_guarded
    def on_fork(self):
        """A pool child starts anew, and so does what a task forks."""
        inherited = self.process
        self._begin()
        if inherited:
            inherited.forget()


bootstrap = Bootstrap()
bootstrap.install()
