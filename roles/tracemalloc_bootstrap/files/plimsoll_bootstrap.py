# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Says from inside a Celery worker in which task its memory grows, at which line, and what else grows with it.

The worker loads this by CELERY_WORKER_INCLUDE=plimsoll_bootstrap, with no change to the application; a plain import
does the same. Standard library alone, Python 3.9 or later, Celery 5.3 or later. Whatever fails here, the worker goes
on; one line on stderr says what.

It works in the processes that run tasks: a prefork worker's children, or the one process of a solo, threads or green
pool. What RSS gains from the start of a task until the next one starts is that task's growth; so what is freed just
after a task, as its return value is, does not count. While tasks overlap, growth is shared among them evenly, and the
records say so. Of tasks that come faster than a measurement can be afforded, RUN_TASKS in a row are measured, then none
in a rest of random length; all are counted.

Single tasks can be watched in a worker whose environment asks for nothing: by @track_memory below @app.task, or by
@app.task(base=MemoryTrackingTask).

Environment:
PLIMSOLL_TRACE_MODE        off, attribution (growth by task, always on, microseconds a task), armed (attribution and,
                           when the process has grown too much, a tracing window), or always (one after another)
PLIMSOLL_TRACE_DIR         directory of the records, which the worker's user can write to
PLIMSOLL_UNIT              name of the worker in the records and their files' names
PLIMSOLL_TRACE_ARM_KB      growth over the floor that opens a window, KiB of RSS
PLIMSOLL_TRACE_WINDOW_S    length of a window, seconds
PLIMSOLL_TRACE_COOLDOWN_S  seconds from the end of a window to the next one, of this worker as a whole
PLIMSOLL_TRACE_FRAMES      frames that tracemalloc keeps of each allocation; each one costs time
PLIMSOLL_TRACE_TOP         sites in a growth record
PLIMSOLL_WINDOWS_DIR       where UNIT.json asks for a window; not set: nobody can ask
PLIMSOLL_TASKS_DIR         where PID holds the count of tasks this process finished, for the sampler, those of a rest
                           once it is over; not set: nowhere

A window on request, in every mode but off: PLIMSOLL_WINDOWS_DIR/UNIT.json holds {id, window_s (seconds), frames, until
(Unix seconds, after which it is too late to open one)}. diagnose.yml writes it, and so does a command of Celery's
remote control, app.control.broadcast("plimsoll_window", arguments={"window_s": 60, "frames": 10}). One process of the
worker takes it, at the end of a task, once; where the file is removed or holds another id, the window is called off.
Only then is malloc_trim() tried, as it changes what it measures.

Records: PLIMSOLL_TRACE_DIR/UNIT-PID.jsonl, one JSON object a line. Past MAX_FILE_BYTES the file becomes
UNIT-PID.1.jsonl and a new one begins. Every record has time (Unix seconds, UTC), unit, pid and kind; of a window on
request, id too. By kind:

task_growth   task (name), count (finished), measured (of those), rss_growth_kb (KiB, of those measured): all since the
              process began. One record a task, at most every TASK_GROWTH_EVERY_S seconds and at the end of the
              process, when its count changed.
window_open   rss_kb and floor_kb (KiB; null where it is not known yet), frames, window_s (seconds), gc_objects (that
              the garbage collector knows, which is what the window costs besides; null in an armed one, which does not
              look at them): tracing began.
growth        window_s (seconds it took), frames, rss_growth_kb (KiB that RSS gained in it, less what tracing takes),
              traced_kb (KiB allocated in it and still held), traced_growth_kb (the same less what the application had
              traced before), sites, tasks, interleaved (whether tasks ran side by side).
              sites: those that grew most, [{file, line, function ("" if not known), size_kb (KiB held at the end),
              count (blocks then), growth_kb (KiB more than at the start)}], and callers, ["file:line"] from the inside
              out, of the way there by which most came, when more than one frame is kept.
              tasks: {name: {count, traced_growth_kb}} of the window.
              objects: types of which most were added, [{type, count, growth}], of those the garbage collector knows. It
              and holders, chains and caches are empty in an armed window.
              holders: containers that gained most entries, [{type, size, growth, path}]; path: text from a module or
              another root down to it. chains: the same for an object of the type that grew most.
              caches: of functools.lru_cache, [{name, size, growth, most (null: without bound)}].
              gc: {enabled, thresholds, uncollectable, collected (by the collection at the end)}.
              fds: {count, growth, kinds: {socket, pipe, file, other: {count, growth}}, paths: [{path, count, growth}]}.
              malloc: {used_kb, used_growth_kb, free_kb, free_growth_kb (KiB as mallinfo2(3) has them), trimmed_kb (what
              malloc_trim(3) gave back at the end; null: not tried)}, or null.
              memory: {private_kb, private_growth_kb, shared_kb, shared_growth_kb}, of dirty pages, or null.
window_close  reason: window over | many blocks | process ends | called off | refused: … (no growth record then); rss_kb
              (KiB).
"""

from __future__ import annotations

import ast
import collections
import contextlib
import fcntl
import functools
import gc
import importlib
import itertools
import json
import linecache
import logging
import math
import os
import random
import re
import sys
import time
import tracemalloc
import types
from pathlib import Path

DEFAULTS = {"ARM_KB": 51200, "WINDOW_S": 60, "COOLDOWN_S": 3600, "FRAMES": 1, "TOP": 10}

MODES = ("off", "attribution", "armed", "always")
# The first tasks of a process import lazily, connect, and fill caches: growth that comes once and is no leak.
WARM_TASKS = 10
TASK_GROWTH_EVERY_S = 10.0
# After so many tasks that took less than RUN_S, none is measured for as long as makes that RUN_S, on the average: 100 a
# second. To measure one takes 30 to 55 us, as /proc and our own code have left the CPU's caches by then.
RUN_TASKS, RUN_S = 16, 0.16
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
# A request is looked for so often, and taken by a worker that is busy again within so long.
LOOK_EVERY_S = 1.0
PATIENCE_S = 600.0
MAX_REQUEST_BYTES = 4096
MAX_WINDOW_S, MAX_FRAMES = 3600.0, 50
# A pass over all that the garbage collector knows holds the GIL for some 100 ms a million.
MANY_OBJECTS = 3_000_000
MANY_DESCRIPTORS = 20_000
# A container of fewer entries is no hoard. Of so many no more are noted.
HOARD, MANY_HOARDS = 64, 100_000
# The fields of struct mallinfo2, mallinfo2(3).
MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
# Python itself takes more from malloc.
LEAST_MALLOC_BYTES = 1 << 20
# No attribute that somebody wrote is longer.
MAX_NAME = 64
# Of types, holders, caches and paths in a record.
MOST_NAMED = 5
# Of a way up to a root: steps, referrers that are followed at each, seconds in all. The collector compares all that is
# referred to with each of those.
CHAIN_STEPS, CHAIN_WIDTH, CHAIN_S = 12, 10, 0.5
# Growth of fewer objects or entries than this is not followed up.
LEAST_GROWTH = 8

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
        except Exception as error:
            # Whatever it is, the application must go on; give_up() says it in the journal.
            if _is_time_limit(error):
                raise
            self.give_up(error)

    return guarded


def _is_time_limit(error):
    """Whether it is the task's, which came while we were at it."""
    return type(error).__name__ == "SoftTimeLimitExceeded"


def _original(module, name):
    """A function as it was before gevent or eventlet put theirs in its place.

    plimsoll_notify has the same: each is one file that works without the other.
    """
    with contextlib.suppress(Exception):
        if "gevent.monkey" in sys.modules:
            return sys.modules["gevent.monkey"].get_original(module, name)
        if "eventlet.patcher" in sys.modules:
            return getattr(sys.modules["eventlet.patcher"].original(module), name)
    return getattr(importlib.import_module(module), name)


class Settings:
    """What the environment asks for, or what is taken for a single task. Raises ValueError naming the variable."""

    def __init__(self, environ, single=False):
        self.mode = "attribution" if single else environ.get("PLIMSOLL_TRACE_MODE", "off")
        if self.mode not in MODES:
            raise ValueError(f"PLIMSOLL_TRACE_MODE is '{self.mode}'; it must be one of {', '.join(MODES)}")
        if self.mode == "off":
            return
        if not single and not environ.get("PLIMSOLL_TRACE_DIR"):
            raise ValueError("PLIMSOLL_TRACE_DIR is not set")
        self.directory, self.tasks_directory, windows = (
            Path(environ[name]) if environ.get(name) else None
            for name in ("PLIMSOLL_TRACE_DIR", "PLIMSOLL_TASKS_DIR", "PLIMSOLL_WINDOWS_DIR")
        )
        self.unit = (environ.get("PLIMSOLL_UNIT") or "celery").replace("/", "_")
        self.request_path = windows / f"{self.unit}.json" if windows and self.directory else None
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
        # Of those counted, the ones that growth is known of; and whether none is now.
        self.measured = {}
        self.resting = False
        # Whether two tasks ever ran at once.
        self.together = False

    def tell(self, now):
        gained, self.last = now - self.last, now
        if self.running:
            total = sum(self.running.values())
            for name, number in self.running.items():
                self.growth[name] = self.growth.get(name, 0) + gained * number / total
        elif self.ended is not None:
            self.growth[self.ended] = self.growth.get(self.ended, 0) + gained

    def start(self, name, now=None):
        """Without the measure while it rests."""
        if now is not None:
            self.tell(now)
        self.together = self.together or bool(self.running)
        self.running[name] = self.running.get(name, 0) + 1

    def end(self, name, now=None):
        """Without the measure while it rests, and where only this one runs: what that gained is its own until then."""
        if now is not None:
            self.tell(now)
        left = self.running.pop(name, 0) - 1
        if left > 0:
            self.running[name] = left
        self.ended = name
        self.count[name] = self.count.get(name, 0) + 1
        if not self.resting:
            self.measured[name] = self.measured.get(name, 0) + 1

    def rest(self, now):
        self.tell(now)
        self.resting = True

    def resume(self, now):
        """What was gained while it rested is nobody's."""
        self.last, self.resting = now, False


class Request:
    """A window that somebody asks for. Raises OSError or ValueError where there is none that is sound."""

    def __init__(self, path):
        # Whatever lies there must not hold up a task.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            asked = json.loads(os.read(descriptor, MAX_REQUEST_BYTES))
        finally:
            os.close(descriptor)
        self.id = asked.get("id") if isinstance(asked, dict) else None
        if not isinstance(self.id, str) or not re.fullmatch(r"[0-9A-Za-z-]{1,64}", self.id):
            raise ValueError(f"{path} has no id")
        self.until, self.window_s = (self._number(path, asked, name) for name in ("until", "window_s"))
        self.frames = int(self._number(path, asked, "frames"))
        if not (1 <= self.window_s <= MAX_WINDOW_S and 1 <= self.frames <= MAX_FRAMES):
            raise ValueError(f"{path} asks for {self.window_s} seconds and {self.frames} frames")

    @staticmethod
    def _number(path, asked, name):
        value = asked.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}: {name} is no number")
        return value


class Log:
    """Where growth by task goes without a directory of records."""

    def write(self, records):
        for one in records:
            logging.getLogger("plimsoll").info(
                "memory of task %s: %+d KiB in %d runs", one["task"], one["rss_growth_kb"], one["count"]
            )


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
    And the request that it was opened for, of which there is to be one window.
    """

    def __init__(self, path):
        self.path = path
        self.descriptor = -1
        self.request = ""

    def acquire(self, cooldown_s, request=""):
        """Whether it is ours now. Of a request, the cooldown does not matter. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ended, last, *_ = [*os.pread(descriptor, 128, 0).decode("ascii", "replace").split(), "", ""]
            # A clock that was set back must not shut tracing off.
            cools = ended.isdecimal() and 0 <= time.time() - int(ended) < cooldown_s
            if request == last if request else cools:
                raise BlockingIOError
            self.request = request or last
            self._write(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        return True

    def _write(self, descriptor):
        os.ftruncate(descriptor, os.pwrite(descriptor, f"{int(time.time())} {self.request}\n".encode(), 0))

    def release(self):
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                self._write(self.descriptor)
            # A process that a task forked holds the same lock by its copy of the descriptor: closing is not enough.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self.forget()

    def forget(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


class Window:
    """tracemalloc from start() to close(). request: what asked for it, if anything did.

    whole: whether objects are looked at too, which stops the process for a while; not in one that opens by itself.
    """

    def __init__(self, window_s, frames, request=None, whole=True):
        self.opened = time.monotonic()
        self.window_s, self.frames, self.request, self.whole = window_s, frames, request, whole
        # An application may trace for reasons of its own: then it is not ours to start or stop.
        self.ours = not tracemalloc.is_tracing()

    def prepare(self):
        """What is held before it; number of objects that the garbage collector knows."""
        # What it imports is none of the window's.
        malloc_kb()
        if self.whole and gc.isenabled():
            gc.collect()
        self.before = Held(self.whole)
        return self.before.number

    def start(self):
        if self.ours:
            tracemalloc.start(self.frames)
        self.first = tracemalloc.take_snapshot() if traced_blocks() <= ENOUGH_BLOCKS else None
        self.before.measure()
        self.traced = tracemalloc.get_traced_memory()[0]
        self.shares = Shares(self.traced)

    def age(self):
        return time.monotonic() - self.opened

    def stop(self):
        if self.ours:
            tracemalloc.stop()

    def close(self, top):
        """Stop tracing; (growth record, "") or (None, why not)."""
        try:
            if not tracemalloc.is_tracing():
                return None, "refused: the application stopped tracing"
            blocks = traced_blocks()
            if self.first is None or blocks > TOO_MANY_BLOCKS:
                return None, f"refused: {blocks} traced blocks are too many for a snapshot"
            # Before anything of ours touches memory that a child shares, or takes some.
            memory = measured()
            # Garbage in cycles is no leak where it is going to be collected.
            collected = gc.collect() if gc.isenabled() else 0
            traced = tracemalloc.get_traced_memory()[0]
            self.shares.tell(traced)
            trimmed_kb = trim() if self.request else None
            second = tracemalloc.take_snapshot()
        finally:
            self.stop()
        found = sites(self.first, second, top)
        self.first = second = None
        # No sooner, as each number that it counts would be traced.
        after = Held(self.whole)
        after.malloc, after.memory = memory
        return {
            "kind": "growth",
            "window_s": round(self.age(), 1),
            "frames": self.frames,
            "traced_kb": _kb(traced),
            "traced_growth_kb": _kb(traced - self.traced),
            "sites": found,
            "tasks": {
                # Those that have not ended yet are here too.
                name: {"count": self.shares.count.get(name, 0), "traced_growth_kb": _kb(growth)}
                for name, growth in self.shares.growth.items()
            },
            "interleaved": self.shares.together,
            "gc": {
                "enabled": gc.isenabled(),
                "thresholds": gc.get_threshold(),
                "uncollectable": sum(one["uncollectable"] for one in gc.get_stats()),
                "collected": collected,
            },
            **after.since(self.before, trimmed_kb),
        }, ""


class Held:
    """What a process holds, of all that is no matter of lines: objects, caches, descriptors, the allocator's memory."""

    def __init__(self, whole):
        objects = gc.get_objects() if whole else []
        self.number = len(objects) if whole else None
        self.types, self.hoards, self.caches = collections.Counter(), {}, {}
        self.looked = whole and self.number <= MANY_OBJECTS
        if self.looked:
            # By id, as a metaclass may say how its classes are hashed; then by name, to keep no class alive.
            counts = collections.Counter(map(id, map(type, objects)))
            kinds = dict(zip(map(id, map(type, objects)), map(type, objects)))
            for key, count in counts.items():
                self.types[_type_name(kinds[key])] += count
            del kinds
            hoards = ((id(one), len(one)) for one in _containers(objects) if len(one) >= HOARD)
            self.hoards = dict(itertools.islice(hoards, MANY_HOARDS))
            self.caches = {id(one): _LRU_CACHE.cache_info(one).currsize for one in objects if type(one) is _LRU_CACHE}
        self.descriptors, self.paths = descriptors()
        self.malloc = self.memory = None

    def measure(self):
        self.malloc, self.memory = measured()

    def ours(self):
        """Ids of what is held here, and is none of the application's."""
        return {id(one) for one in (self.types, self.hoards, self.caches, self.descriptors, self.paths)}

    def since(self, before, trimmed_kb):
        """What was gained since then, as the growth record has it."""
        types = [
            (count - before.types[name], name, count)
            for name, count in self.types.items()
            if before.looked and not name.startswith((f"{__name__}.", "tracemalloc."))
        ]
        objects = [
            {"type": name, "count": count, "growth": growth}
            for growth, name, count in sorted(types, key=lambda one: (-one[0], one[1]))[:MOST_NAMED]
            if growth > 0
        ]
        kinds = {
            kind: {"count": self.descriptors[kind], "growth": self.descriptors[kind] - before.descriptors[kind]}
            for kind in sorted({*self.descriptors, *before.descriptors})
        }
        paths = sorted(((count - before.paths[path], path, count) for path, count in self.paths.items()), reverse=True)
        malloc = memory = None
        if self.malloc and before.malloc:
            malloc = {**_grown(self.malloc, before.malloc), "trimmed_kb": trimmed_kb}
        if self.memory and before.memory:
            memory = _grown(self.memory, before.memory)
        return {
            "objects": objects,
            "chains": self._chains(objects),
            "holders": self._holders(before) if before.looked else [],
            "caches": self._caches(before) if before.looked else [],
            "fds": {
                "count": sum(self.descriptors.values()),
                "growth": sum(self.descriptors.values()) - sum(before.descriptors.values()),
                "kinds": kinds,
                "paths": [
                    {"path": path, "count": count, "growth": growth}
                    for growth, path, count in paths[:MOST_NAMED]
                    if growth > 0
                ],
            },
            "malloc": malloc,
            "memory": memory,
        }

    def _holders(self, before):
        ours = self.ours() | before.ours()
        grown = sorted(
            (
                # Of one that was none before it is not known how few it had.
                (size - before.hoards.get(key, HOARD), size, key)
                for key, size in self.hoards.items()
                if key not in ours
            ),
            reverse=True,
        )[:MOST_NAMED]
        wanted = {key: (growth, size) for growth, size, key in grown if growth >= LEAST_GROWTH}
        found = {id(one): one for one in _containers(gc.get_objects()) if id(one) in wanted} if wanted else {}
        end, told = time.monotonic() + CHAIN_S, []
        # By key, so that nothing but `found` refers to what is looked for.
        for key in sorted(found, key=lambda key: -wanted[key][0]):
            growth, size = wanted[key]
            one = found[key]
            path = chain(one, end, {id(found)})
            told.append({"type": type(one).__name__, "size": size, "growth": growth, "path": path})
        return told

    def _chains(self, objects):
        if not objects or objects[0]["growth"] < LEAST_GROWTH:
            return []
        names, newest = {}, []
        for one in gc.get_objects():
            kind = type(one)
            name = names.get(id(kind)) or names.setdefault(id(kind), _type_name(kind))
            if name == objects[0]["type"]:
                newest = [one]
        return [chain(one, time.monotonic() + CHAIN_S, {id(newest)}) for one in newest]

    def _caches(self, before):
        grown = {key: size - before.caches.get(key, 0) for key, size in self.caches.items()}
        grown = {key: growth for key, growth in grown.items() if growth > 0}
        found = []
        for one in gc.get_objects() if grown else []:
            if id(one) in grown and type(one) is _LRU_CACHE:
                named = _names(one) or {}
                name = f"{named.get('__module__', '?')}.{named.get('__qualname__', '?')}"
                found.append({"name": name, "size": self.caches[id(one)], "growth": grown[id(one)]})
                found[-1]["most"] = _LRU_CACHE.cache_info(one).maxsize
        return sorted(found, key=lambda one: (-one["growth"], one["name"]))[:MOST_NAMED]


# By id, as a metaclass may say what its classes are equal to.
_CONTAINERS = frozenset(map(id, (dict, list, set, collections.OrderedDict, collections.defaultdict, collections.deque)))
_LRU_CACHE = type(functools.lru_cache(lambda: None))


def _containers(objects):
    """Those among these, and those that any small one of these refers to; some more than once.

    CPython's collector does not know all: a dict of numbers and bytes is untracked. What large ones refer to is left
    alone: whatever is looked at has its references counted, and a child that shares it with others has a copy then.
    """
    modules, kinds = _modules(), list(map(id, map(type, objects)))
    found = [one for one, kind in zip(objects, kinds) if kind in _CONTAINERS]
    yield from found
    large = {id(one) for one in found if len(one) >= HOARD and id(one) not in modules}
    large.update(id(one) for one, kind in zip(objects, kinds) if kind == id(tuple) and len(one) >= HOARD)
    small = [one for one in objects if id(one) not in large]
    for start in range(0, len(small), 10_000):
        below = gc.get_referents(*small[start : start + 10_000])
        for one, kind in zip(below, map(id, map(type, below))):
            if kind in _CONTAINERS and not gc.is_tracked(one):
                yield one


def _grown(now, before):
    """{name_kb: …} with {name_growth_kb: …} besides."""
    found = {}
    for name, value in now.items():
        found[name] = round(value)
        found[name.replace("_kb", "_growth_kb")] = round(value - before[name])
    return found


# What follows asks objects for nothing, as they may run code to answer: the descriptors of CPython's own types do not.


def _type_name(one):
    name = type.__dict__["__qualname__"].__get__(one)
    try:
        module = type.__dict__["__module__"].__get__(one)
    except AttributeError:
        # Made by type() where there was no module.
        module = None
    return name if module == "builtins" else f"{module if type(module) is str else '?'}.{name}"


def _names(one):
    """An object's own __dict__; None where it has none, or one that is made up."""
    for base in type.__dict__["__mro__"].__get__(type(one)):
        found = type.__dict__["__dict__"].__get__(base).get("__dict__")
        if found is not None:
            made = type(found) in (types.GetSetDescriptorType, types.MemberDescriptorType)
            return found.__get__(one) if made else None
    return None


def _modules():
    """{id of its __dict__: name} of each module; one that loads when it is asked is not asked."""
    found = [(name, one) for name, one in list(sys.modules.items()) if issubclass(type(one), types.ModuleType)]
    return {id(types.ModuleType.__dict__["__dict__"].__get__(one)): name for name, one in found}


def chain(target, end, ours):
    """The way from a root down to an object, a text a step: module, then attributes with types, or types alone.

    The shortest way that is found until `end` (time.monotonic()), by one pass over all objects a step. What is in
    `ours`, ids, is not on it. No contents: keys of dicts may be customers' names, and so may attributes be that no
    program could be written with.
    """
    modules = _modules()
    below, edge, reached = {id(target): None}, [target], target
    ours = {*ours, id(below), id(modules)}
    for _ in range(CHAIN_STEPS):
        if time.monotonic() >= end:
            break
        known = {id(one) for one in edge}
        ours |= {id(edge), id(known)}
        found = []
        for one in gc.get_referrers(*edge):
            if id(one) in below or id(one) in ours or type(one) is types.FrameType:
                continue
            held = next((child for child in gc.get_referents(one) if id(child) in known), None)
            if held is None:
                continue
            if id(one) in modules:
                below[id(one)] = held
                return _steps(one, below, modules)
            if len(found) < CHAIN_WIDTH:
                below[id(one)] = held
                reached = one
                found.append(one)
        if not found:
            break
        edge = found
        held = one = None
    return _steps(reached, below, modules)


def _steps(one, below, modules):
    """What a way is called, from its root on."""
    said = [f"module {modules[id(one)]}" if id(one) in modules else _type_name(type(one))]
    while (held := below[id(one)]) is not None:
        said.append(f"{_attribute(one, held, id(one) in modules)}{_type_name(type(held))}")
        one = held
    return said


def _attribute(one, held, module):
    """By which name an object holds another one, where it has one."""
    names = one if module else _names(one)
    # A dict that is its own __dict__ has contents for names.
    if type(names) is not dict or (names is one and not module):
        return ""
    name = next((name for name, value in list(names.items()) if value is held), None)
    return f".{name}: " if type(name) is str and name.isidentifier() and len(name) <= MAX_NAME else ""


def descriptors():
    """Counts of open file descriptors by kind, and of files by path."""
    kinds, paths = collections.Counter(socket=0, pipe=0, file=0, other=0), collections.Counter()
    with contextlib.suppress(OSError):
        for path in itertools.islice(Path("/proc/self/fd").iterdir(), MANY_DESCRIPTORS):
            try:
                target = str(path.readlink())
            except OSError:
                # That of the directory itself.
                continue
            kind = target.partition(":")[0]
            kinds[kind if kind in ("socket", "pipe") else "file" if target.startswith("/") else "other"] += 1
            if target.startswith("/"):
                paths[target] += 1
    return kinds, paths


def measured():
    """malloc_kb() and smaps_kb(), less what tracing itself takes."""
    malloc, memory = malloc_kb(), smaps_kb()
    own = tracemalloc.get_tracemalloc_memory() / 1024 if tracemalloc.is_tracing() else 0
    if malloc:
        malloc["used_kb"] -= own
    if memory:
        memory["private_kb"] -= own
    return malloc, memory


def smaps_kb():
    """KiB of private and shared memory that was written to, None where the kernel does not tell.

    What is clean is files': a library is shared, or not, as other processes come and go.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {
        "private_kb": sizes.get("Private_Dirty", 0),
        "shared_kb": sizes.get("Shared_Dirty", 0),
    }


def malloc_kb():
    """KiB that malloc has handed out and keeps free, in all its arenas; None without glibc 2.33 or later."""
    # Here, and not above: a Python without ctypes is to run the worker all the same.
    with contextlib.suppress(Exception):
        import ctypes

        fields = {"_fields_": [(name, ctypes.c_size_t) for name in MALLINFO2.split()]}
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), fields)
        found = mallinfo2()
        # Less than that, and another one has taken its place, as jemalloc by LD_PRELOAD.
        if found.uordblks + found.hblkhd >= LEAST_MALLOC_BYTES:
            return {"used_kb": (found.uordblks + found.hblkhd) / 1024, "free_kb": found.fordblks / 1024}
    return None


def trim():
    """KiB of RSS that malloc_trim(3) gives back to the kernel; None without glibc."""
    # As above. None is in the record, where it means that it was not tried.
    with contextlib.suppress(Exception):
        import ctypes

        malloc_trim = ctypes.CDLL(None).malloc_trim
        before = resident_kb()
        malloc_trim(ctypes.c_size_t(0))
        return max(0, before - resident_kb())
    return None


def resident_kb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_KB


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
    # One line may be reached by several ways.
    lines, ways = {}, {}
    for one in second.compare_to(first, by):
        *callers, site = one.traceback
        at = site.filename, site.lineno
        size, count, growth = lines.get(at, (0, 0, 0))
        lines[at] = size + one.size, count + one.count, growth + one.size_diff
        if callers and one.size_diff > ways.get(at, (0, ()))[0]:
            ways[at] = one.size_diff, callers
    found = []
    for (file, line), (size, count, growth) in sorted(lines.items(), key=lambda one: -one[1][2]):
        if len(found) == top or growth <= 0:
            break
        if file in own or file.startswith("<frozen importlib"):
            continue
        one = {"file": file, "line": line, "function": function_at(file, line)}
        found.append({**one, "size_kb": _kb(size), "count": count, "growth_kb": _kb(growth)})
        if (file, line) in ways:
            found[-1]["callers"] = [f"{frame.filename}:{frame.lineno}" for frame in reversed(ways[file, line][1])]
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
        self.lock = _original("_thread", "RLock")()
        self.statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self.records = Records(settings.directory, settings.unit) if settings.directory else Log()
        self.trace_lock = TraceLock(settings.directory / f".{settings.unit}.lock") if settings.directory else None
        self.shares = Shares(self.rss_kb())
        self.finished = 0
        # Of the run of tasks that is measured; and of the rest after it.
        self.run_began, self.run_ends, self.rest_until = 0.0, 0, 0.0
        self.random = random.SystemRandom()
        self.floor_kb = None
        self.window = None
        # The window from before its start until after its stop, for a fork or a failure in between.
        self.tracing = None
        self.retry_at = self.look_at = 0.0
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

    def _measure(self):
        """RSS at the start of a task, KiB; None while it rests."""
        rss, now = self.rss_kb(), time.monotonic()
        if self.shares.resting:
            self.shares.resume(rss)
        elif self.finished < self.run_ends:
            return rss
        elif now < self.run_began + RUN_S and not self.window:
            self.shares.rest(rss)
            # At random, to keep no step with what comes regularly.
            self.rest_until = now + self.random.uniform(0, 2) * (self.run_began + RUN_S - now)
            return None
        self.run_began, self.run_ends = now, self.finished + RUN_TASKS
        return rss

    def start(self, name):
        with self.lock:
            if self.shares.resting and time.monotonic() < self.rest_until:
                self.shares.start(name)
                return
            self.shares.start(name, self._measure())
            if self.window:
                self.window.shares.start(name, tracemalloc.get_traced_memory()[0])

    def end(self, name):
        with self.lock:
            shares = self.shares
            if shares.resting and time.monotonic() < self.rest_until:
                shares.end(name)
                self.finished += 1
                return
            # A read of /proc less, of two, where nothing asks for it before the next task does.
            alone = self.settings.mode == "attribution" and not self.window and shares.running == {name: 1}
            rss = None if shares.resting or alone else self.rss_kb()
            shares.end(name, rss)
            if self.window:
                self.window.shares.end(name, tracemalloc.get_traced_memory()[0])
            self.finished += 1
            self._publish_count()
            now = time.monotonic()
            if now >= self.write_at:
                self.write_growth()
            if self.window:
                if self.window.age() >= self.window.window_s:
                    self.close_window("window over")
                elif traced_blocks() > ENOUGH_BLOCKS:
                    self.close_window("many blocks")
            else:
                self._open_if_due(rss, now)

    def _open_if_due(self, rss, now):
        settings = self.settings
        if settings.request_path and now >= self.look_at:
            self.look_at = now + LOOK_EVERY_S
            request = self.request()
            if request and time.time() < request.until and self.open_window(rss, request):
                return
        if self.finished < WARM_TASKS or settings.mode == "attribution" or rss is None:
            return
        self.floor_kb = rss if self.floor_kb is None else min(self.floor_kb, rss)
        grown = settings.mode == "always" or rss - self.floor_kb >= settings.arm_kb
        if grown and now >= self.retry_at:
            self.open_window(rss)

    def request(self):
        """What is asked for, if anything is."""
        try:
            return Request(self.settings.request_path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            _complain("a request for a window is passed over", error)
            return None

    def write_growth(self):
        """The task_growth records of those tasks that ran since the last time."""
        shares = self.shares
        if not shares.resting:
            shares.tell(self.rss_kb())
        count = shares.count
        ran = [name for name in count if count[name] != self.written.get(name)]
        self.written.update((name, count[name]) for name in ran)
        self.write_at = time.monotonic() + TASK_GROWTH_EVERY_S
        if ran:
            self.records.write(
                {
                    "kind": "task_growth",
                    "task": name,
                    "count": count[name],
                    "measured": shares.measured.get(name, 0),
                    "rss_growth_kb": round(shares.growth.get(name, 0)),
                }
                for name in ran
            )

    def open_window(self, rss, request=None):
        """Whether it is open now."""
        if self.tracing:
            # A finalizer, run as one is closed, may run a task.
            return False
        settings = self.settings
        rss = self.rss_kb() if rss is None else rss
        try:
            # Where all are to be traced, each process is.
            if request:
                mine = self.trace_lock.acquire(0, request.id)
            elif settings.mode == "always":
                mine = True
            else:
                self.retry_at = time.monotonic() + RETRY_S
                mine = self.trace_lock.acquire(settings.cooldown_s)
            if not mine:
                return False
        except OSError as error:
            _complain("no window is opened", error)
            return False
        if self.shares.resting:
            self.shares.resume(rss)
        asked = request or settings
        whole = bool(request) or settings.mode == "always"
        self.tracing = window = Window(asked.window_s, asked.frames, request, whole)
        opened = {"rss_kb": rss, "floor_kb": self.floor_kb, "frames": asked.frames, "window_s": asked.window_s}
        self._write_of(window, [{"kind": "window_open", **opened, "gc_objects": window.prepare()}])
        window.start()
        window.shares.running.update(self.shares.running)
        # After the first snapshot and before the second: what those leave behind is no growth of the application's.
        window.rss_kb = self.rss_kb()
        self.window = window
        # Not one of gevent's or eventlet's, which waits as long as a task blocks.
        _original("_thread", "start_new_thread")(self._watch, (window, _original("time", "sleep")))
        return True

    def _write_of(self, window, records):
        """Write records of a window, with the request that it was opened for."""
        head = {"id": window.request.id} if window.request else {}
        self.records.write({**record, **head} for record in records)

    def _watch(self, window, sleep):
        while self.window is window:
            sleep(min(WATCH_EVERY_S, window.window_s))
            self.on_watch(window)

    @_guarded
    def on_watch(self, window):
        """The window of a child that has nothing to do ends too. A task that runs may end first, for as long again."""
        due = window.age() >= window.window_s * (2 if self.shares.running else 1)
        if due and gc.isenabled():
            # As the window's end does, which then finds little left: finalizers may wait for a lock that a task has.
            gc.collect()
        with self.lock:
            if self.window is not window:
                return
            if window.request and self._called_off(window):
                self.close_window("called off")
            elif due:
                self.close_window("window over")
            elif traced_blocks() > TOO_MANY_BLOCKS:
                self.close_window("many blocks")

    def _called_off(self, window):
        try:
            return Request(self.settings.request_path).id != window.request.id
        except FileNotFoundError:
            return True
        except (OSError, ValueError, OverflowError, RecursionError):
            # As where descriptors ran out, which is what is looked for.
            return False

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
        self._write_of(window, [growth, closed] if growth else [closed])
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
            if self.trace_lock:
                self.trace_lock.release()

    def forget(self):
        """In a process forked from this one, which is not this one's concern. Another thread may have had the lock."""
        if self.trace_lock:
            self.trace_lock.forget()
        self._stop_tracing()

    def _stop_tracing(self):
        if self.tracing:
            self.tracing.stop()
        self.tracing = None


# ---- what Celery calls ----


class Tracer:
    """Task.__trace__, which Celery calls to run a task, with the start and the end of each told to the bootstrap.

    The signals task_prerun and task_postrun tell them too, and Celery takes about 10 us to send one, whatever is done
    about it: half of what this may cost. Measured between tasks, which leave little of Celery in the CPU's caches.
    """

    def __init__(self, bootstrap):
        self.bootstrap = bootstrap

    def __get__(self, task, owner=None):
        return task.__dict__.get("__trace__") if task is not None else None

    def __set__(self, task, run):
        task.__dict__["__trace__"] = run and self._watched(task.name, run)

    def _watched(self, name, run):
        start, end = self.bootstrap.start_task, self.bootstrap.end_task

        def watched(*args, **kwargs):
            try:
                start(name)
                return run(*args, **kwargs)
            finally:
                end(name)

        return watched


class Bootstrap:
    """What Celery tells: the start and the end of tasks and of processes."""

    def __init__(self):
        # Of a worker that is watched as a whole, and of single tasks.
        self.settings = self.single = None
        self.gave_up = False
        self._begin()

    def _begin(self):
        self.process = None
        # Reentrant for the same reason as that of Process.
        self.creating = _original("_thread", "RLock")()

    @_guarded
    def install(self):
        """Read the settings and connect; in mode off, nothing."""
        settings = Settings(os.environ)
        if settings.mode == "off":
            return
        from celery import Task, signals
        from celery.worker.control import control_command

        if "__trace__" not in vars(Task):
            raise RuntimeError("this Celery has no Task.__trace__")
        Task.__trace__ = Tracer(self)
        control_command(args=[("window_s", float), ("frames", int)], signature="[window_s [frames]]")(plimsoll_window)
        self._connect(signals)
        self.settings = settings

    def _connect(self, signals):
        """What single tasks need as well."""
        signals.worker_process_shutdown.connect(self.on_shutdown, weak=False)
        signals.worker_shutdown.connect(self.on_shutdown, weak=False)
        os.register_at_fork(after_in_child=self.on_fork)

    def give_up(self, error):
        self.settings = self.single = None
        self.gave_up = True
        _complain("switched off", f"{type(error).__name__}: {error}")
        process, self.process = self.process, None
        if process:
            with contextlib.suppress(Exception):
                process.abandon()

    # These two are guarded by themselves, as each call costs where it is called for every task.

    def start_task(self, name):
        try:
            if self.process:
                self.process.start(name)
            elif self.settings:
                self._start(self.settings, name)
        except Exception as error:
            if _is_time_limit(error):
                raise
            self.give_up(error)

    def _start(self, settings, name):
        # At the first task: in a prefork worker's main process, where none runs, there is nothing of ours.
        with self.creating:
            if self.process is None:
                self.process = Process(settings, self.give_up)
        self.process.start(name)

    def end_task(self, name):
        try:
            if self.process:
                self.process.end(name)
        except Exception as error:  # noqa: BLE001 - the application must go on; give_up() says it
            # A time limit has nothing left to end.
            if not _is_time_limit(error):
                self.give_up(error)

    @_guarded
    def start_single(self, name):
        """A task of @track_memory or MemoryTrackingTask begins. Where all are watched, this one is already."""
        if self.settings or self.gave_up:
            return
        if self.single is None:
            from celery import signals

            self.single = Settings(os.environ, single=True)
            self._connect(signals)
        self._start(self.single, name)

    @_guarded
    def end_single(self, name):
        if self.single and self.process:
            self.process.end(name)

    @_guarded
    def on_shutdown(self, **_):
        if self.process:
            self.process.shut_down()

    @_guarded
    def on_fork(self):
        """A pool child starts anew, and so does what a task forks."""
        inherited = self.process
        self._begin()
        if inherited:
            inherited.forget()

    def ask(self, window_s=None, frames=None):
        """Ask for a window, as PLIMSOLL_WINDOWS_DIR describes it; what to answer to the remote control."""
        settings = self.settings
        if not settings or not settings.request_path:
            return {"error": "PLIMSOLL_WINDOWS_DIR is not set, or the bootstrap is switched off"}
        asked = {
            "id": os.urandom(8).hex(),
            "window_s": settings.window_s if window_s is None else float(window_s),
            "frames": settings.frames if frames is None else int(frames),
            "until": time.time() + PATIENCE_S,
        }
        part = settings.request_path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps(asked))
            Request(part)
            part.replace(settings.request_path)
        except (OSError, ValueError, OverflowError) as error:
            part.unlink(missing_ok=True)
            return {"error": str(error)}
        return {"ok": f"window {asked['id']}, {asked['window_s']:g} s: the next process that ends a task opens it"}


def plimsoll_window(state, window_s=None, frames=None):
    """Open a tracing window in one process of the worker."""
    return bootstrap.ask(window_s, frames)


def track_memory(function):
    """Watches the growth of one task, below @app.task, in a worker whose environment asks for nothing.

    It goes to PLIMSOLL_TRACE_DIR or, without one, to the logger "plimsoll" as INFO, at most every TASK_GROWTH_EVERY_S.
    """
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def tracked(*args, **kwargs):
        bootstrap.start_single(name)
        try:
            return function(*args, **kwargs)
        finally:
            bootstrap.end_single(name)

    return tracked


def __getattr__(name):
    # Celery is imported by whoever asks for it, and not by the import of this file.
    if name != "MemoryTrackingTask":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from celery import Task

    class MemoryTrackingTask(Task):
        """A base class of tasks whose growth is watched, as @track_memory does."""

        abstract = True

        def __call__(self, *args, **kwargs):
            bootstrap.start_single(self.name)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                bootstrap.end_single(self.name)

    globals()[name] = MemoryTrackingTask
    return MemoryTrackingTask


bootstrap = Bootstrap()
bootstrap.install()
