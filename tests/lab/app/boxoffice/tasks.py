"""Four tasks on two queues. `scan_ticket` keeps what it should let go; the worker of `sales` never runs it."""

from __future__ import annotations

import hashlib
import json
import time

from celery import Celery

# The broker's address comes from CELERY_BROKER_URL, as the worker's unit sets it.
app = Celery("boxoffice")
app.conf.update(task_ignore_result=True, task_acks_late=True, worker_prefetch_multiplier=4)
app.conf.task_routes = {
    "boxoffice.tasks.reserve_seat": {"queue": "sales"},
    "boxoffice.tasks.*": {"queue": "gate"},
}

CLOSED = "boxoffice.closed"
_seen: dict[str, bytes] = {}


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
def scan_ticket(order: int) -> int:
    """Leaks: the photograph of every ticket stays in a module-level cache with no bound."""
    photograph = bytes([order % 256]) * 300_000
    _seen[f"ticket-{order}"] = photograph + order.to_bytes(8, "big")
    return len(_seen)
