"""The Celery application whose workers tests/labelled/record.py records: a task for each way to hold memory.

Which tasks a worker is sent, how many and when is in record.py. Each of them does some ordinary work too, whose memory
comes and goes. What a task leaks is written down where it leaks, and so the rates of the manifest are no estimates.

Environment:
LABELLED_BROKER   URL of the broker
LABELLED_LEDGER   file that has a line for each leak: its bytes
LABELLED_READY    file that is made when the worker is ready
LABELLED_TICK_KB  KiB a second that a thread of the main process leaks, whatever the tasks do; not set: no such thread
LABELLED_TABLE    rows of a table that is loaded before the pool forks; not set: none
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, signals

app = Celery("behaviours", broker=os.environ.get("LABELLED_BROKER"))
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True

TICK_KB = int(os.environ.get("LABELLED_TICK_KB", "0"))
TICKS_A_SECOND = 5
TABLE = [f"{row:08}" * 4 for row in range(int(os.environ.get("LABELLED_TABLE", "0")))]
PAGE = mmap.PAGESIZE
# Below it malloc takes from its heap, whose free parts stay with the process.
IN_THE_HEAP = 8 << 10
# Beyond what pymalloc hands out itself.
PIN = 600
# What an application imports where it needs it; the large ones first.
LAZY = (
    *("numpy", "sqlite3", "xml.dom.minidom", "unittest.mock", "http.server", "xmlrpc.client", "ftplib", "mailbox"),
    *("numpy.random", "imaplib", "smtplib", "tarfile", "zipfile", "wave", "pydoc", "doctest", "optparse"),
    *("numpy.polynomial", "fractions", "statistics", "plistlib", "pickletools", "difflib", "cmd", "calendar"),
)

KEPT: list[bytes] = []
PINS: list[bytes] = []
CUT: list[list[bytearray]] = []
THREADS: list[threading.Thread] = []
WARM: dict[int, list[str]] = {}
RINGS: deque[list[Node]] = deque(maxlen=20)
RECENT: deque[tuple[float, mmap.mmap]] = deque()

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
# Open before the pool forks; a line by one write is whole, whichever process it is of.
_ledger = os.open(os.environ.get("LABELLED_LEDGER", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def leaked(size: int) -> None:
    """Bytes that are never to be freed."""
    os.write(_ledger, b"%d\n" % size)


def transient(kb: int) -> mmap.mmap:
    """Memory that goes back to the kernel when it is closed, as that of large arrays does."""
    block = mmap.mmap(-1, max(kb << 10, PAGE))
    for at in range(0, len(block), PAGE):
        block[at] = 1
    return block


def task(run: Callable[..., None]) -> Any:
    """A task that does run, and ordinary work."""

    @functools.wraps(run)
    def whole(*args: Any, **kwargs: Any) -> None:
        rows = [{"row": row, "text": str(row) * 4} for row in range(random.randint(50, 600))]
        json.loads(json.dumps(rows))
        block = transient(random.randint(16, 700))
        time.sleep(random.uniform(0.002, 0.015))
        run(*args, **kwargs)
        block.close()

    return app.task(name=f"shop.{run.__name__}")(whole)


# ---- what stays, and goes on ----


@task
def keep(size: int) -> None:
    """A module-level list that nobody empties; size in bytes."""
    keep_bytes(size)


def keep_bytes(size: int) -> None:
    KEPT.append(b"k" * size)
    leaked(size)


@task
def keep_native(size: int) -> None:
    """malloc() without free(), as an extension module's; Python's own accounts know nothing of it."""
    libc.memset(libc.malloc(size), 1, size)
    leaked(size)


@task
def keep_ring(nodes: int) -> None:
    """Cycles where the collector is off."""
    gc.disable()
    leaked(sum(sys.getsizeof(node) + sys.getsizeof(node.payload) for node in ring(nodes)))


@task
def keep_thread() -> None:
    """A thread that waits for what never comes."""
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    THREADS.append(thread)


@task
def fragment(size: int, total: int) -> None:
    """Buffers that are cut down to a small part, and kept. As sizes rise, no later one fits a gap behind another."""
    buffers = [bytearray(b"f") * size for _ in range(max(3, total // size))]
    # Not one after the other: the next would begin where this one is cut.
    for buffer in buffers:
        del buffer[PIN:]
    CUT.append(buffers)


@signals.worker_init.connect(weak=False)
def before_the_pool(sender: Any, **_: Any) -> None:
    # What the imports left free, which in the days that a minute stands for other things would have filled.
    libc.malloc_trim(0)
    if sender.pool_cls.__module__.endswith("prefork"):
        from celery.concurrency.asynpool import AsynPool

        # Where it misses the end of a child, Celery looks again after 5 s: hours once they are stretched.
        AsynPool.timers = property(lambda pool: {pool.maintain_pool: 0.2})


@signals.worker_ready.connect(weak=False)
def on_ready(**_: Any) -> None:
    libc.malloc_trim(0)
    if TICK_KB:
        threading.Thread(target=tick, daemon=True).start()
    if "LABELLED_READY" in os.environ:
        Path(os.environ["LABELLED_READY"]).touch()


def tick() -> None:
    """A leak by time: a monitor that keeps all that it ever saw."""
    while True:
        keep_bytes((TICK_KB << 10) // TICKS_A_SECOND)
        time.sleep(1 / TICKS_A_SECOND)


# ---- what does not ----


@task
def serve() -> None:
    """Ordinary work alone."""


@task
def hold(kb: int, seconds: float, leak: int = 0) -> None:
    """A request with a large body, which goes when it is done; leak is bytes that do not."""
    block = transient(kb)
    if leak:
        keep_bytes(leak)
    time.sleep(seconds)
    block.close()


@task
def remember(kb: int, seconds: float, leak: int = 0) -> None:
    """What came in the last seconds, of a worker that adds it up: as much as there is load. leak as with hold()."""
    now = time.monotonic()
    RECENT.append((now, transient(kb)))
    while RECENT[0][0] < now - seconds:
        RECENT.popleft()[1].close()
    if leak:
        keep_bytes(leak)


@task
def warm_up(imports: int, entries: int) -> None:
    """Imports and a table, each once for all: as much of either as is asked for, however often."""
    for name in LAZY[: max(0, imports)]:
        importlib.import_module(name)
    for entry in range(entries):
        if entry not in WARM:
            WARM[entry] = [f"{entry}-{number}" for number in range(800)]


@task
def look_up(key: int) -> None:
    """A cache with a limit."""
    page(key)


@functools.lru_cache(maxsize=180)
def page(key: int) -> bytes:
    return bytes([key % 10]) * (8 * IN_THE_HEAP)


@task
def report(mb: int) -> None:
    """One large thing, of blocks in the heap, and the last of them stays: the heap cannot shrink."""
    blocks = [b"r" * IN_THE_HEAP for _ in range((mb << 20) // IN_THE_HEAP)]
    PINS.append(blocks[-1])


@task
def read_table(start: int, stop: int) -> None:
    """Counts references to rows that the parent loaded, and so copies their pages."""
    sum(map(len, TABLE[start:stop]))


class Node:
    """One of a ring, which the collector alone can free."""

    __slots__ = ("following", "payload")

    def __init__(self, payload: str | mmap.mmap) -> None:
        self.following: Node | None = None
        self.payload = payload


def ring(nodes: int) -> list[Node]:
    found = [Node(f"payload of node {number:0200}") for number in range(nodes)]
    for one, following in zip(found, [*found[1:], *found[:1]]):
        one.following = following
    return found


@task
def pass_ring(nodes: int, kb: int) -> None:
    """Cycles that are old when they are let go, with an array: only a full collection finds them."""
    found = ring(nodes)
    found[0].payload = transient(kb)
    RINGS.append(found)


@task
def run_program(mb: int, seconds: float) -> None:
    """A program that is started for the task and ends with it."""
    code = f"import time; kept = b'x' * ({mb} << 20); time.sleep({seconds})"
    subprocess.run(["python", "-Sc", code], check=True)
