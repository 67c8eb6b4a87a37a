"""Tasks on two queues. `scan_ticket` keeps what it should let go; the worker of `sales` never runs it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import socket
import time

import redis
from celery import Celery
from redis.backoff import ConstantBackoff
from redis.retry import Retry

# The broker's address comes from CELERY_BROKER_URL, as the worker's unit sets it.
BROKER = os.environ.get("CELERY_BROKER_URL", "")
app = Celery("boxoffice")
app.conf.update(
    task_ignore_result=True,
    # A task that was not finished is done again: each of these may be.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=4,
)
if BROKER.startswith("redis"):
    # How long a task stays away that was taken by a worker which then vanished: above what the longest one takes. And
    # how often workers look for such: by default every tenth time that they could, once in 100 s.
    visible = int(os.environ.get("BOXOFFICE_VISIBILITY_TIMEOUT", "3600"))
    app.conf.broker_transport_options = {"visibility_timeout": visible, "unacked_restore_throttle": 1}
app.conf.task_routes = {
    "boxoffice.tasks.reserve_seat": {"queue": "sales"},
    "boxoffice.tasks.*": {"queue": "gate"},
}

CLOSED = "boxoffice.closed"
# Where each run of a numbered task notes itself, in the Redis of BOXOFFICE_LEDGER or else of the broker: a set of
# "number host process begun ended", the last two in seconds of that host.
DONE = "boxoffice.runs"
HOGS = "boxoffice.hogs"
_seen: dict[str, bytes] = {}


@functools.cache
def ledger() -> redis.Redis:
    """Of one process. It waits for a Redis that is restarted."""
    patient = {"retry": Retry(ConstantBackoff(1), 120), "retry_on_error": [redis.ConnectionError]}
    return redis.Redis.from_url(os.environ.get("BOXOFFICE_LEDGER") or BROKER, **patient)


@app.task
def reserve_seat(order: int) -> int:
    """Healthy: works in memory that it gives back."""
    plan = [{"row": n // 40, "seat": n % 40, "order": order} for n in range(400)]
    return len(json.dumps(plan))


@app.task
def render_ticket(order: int) -> str:
    """Healthy, on the same worker as the leak."""
    page = "".join(f"<li>order {order} item {n}</li>" for n in range(500))
    return hashlib.sha256(page.encode()).hexdigest()


@app.task
def close_gate(seconds: float) -> None:
    """Slow, and counted in the broker once it is done: shows whether a task was lost, or done twice."""
    time.sleep(seconds)
    with app.connection_for_write() as broker:
        broker.default_channel.client.incr(CLOSED)


@app.task
def number(n: int, seconds: float = 0, hog_mb: int = 0, keep_kb: int = 0, leak: str = "") -> None:
    """Notes its run once it is done. hog_mb: takes so much memory as it runs, at the first time that n does alone.

    keep_kb: a leak, as that of scan_ticket; leak: a task of boxoffice.leaks, which runs within it.
    """
    begun = time.time()
    if hog_mb and ledger().hsetnx(HOGS, str(n), 1):
        hog = bytearray(hog_mb << 20)
        hog[::4096] = b"x" * len(hog[::4096])
    if keep_kb:
        _seen[f"number-{n}-{time.monotonic()}"] = os.urandom(keep_kb << 10)
    if leak:
        getattr(importlib.import_module("boxoffice.leaks"), leak).run(n)
    time.sleep(seconds)
    # Not a counter: Redis may have done what the client, which had no answer in time, then asks for again.
    ledger().sadd(DONE, f"{n} {socket.gethostname()} {os.getpid()} {begun:.3f} {time.time():.3f}")


@app.task
def scan_ticket(order: int) -> int:
    """Leaks: the photograph of every ticket stays in a module-level cache with no bound."""
    photograph = bytes([order % 256]) * 300_000
    _seen[f"ticket-{order}"] = photograph + order.to_bytes(8, "big")
    return len(_seen)


# Where celery-beat runs, which is in one test alone.
app.conf.beat_schedule = {"count": {"task": "boxoffice.tasks.number", "schedule": 5, "args": (0,)}}
