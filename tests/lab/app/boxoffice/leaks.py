"""Each kind of leak that is met in the field, as a task that leaks and beside it the same task mended.

`celery -A boxoffice.leaks worker` runs them; the demo does not load this. docs/leaks.md tells how they are told apart.
`# the leak` stands at the line that allocates what is kept, which is the one that tracing names.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sqlite3
import tempfile
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from celery import signals

from boxoffice.tasks import app

# Bytes that a run leaks, in most of them.
SIZE = 200_000


# ---- a cache of the module, with no bound ----

Plan = list[dict[str, Any]]
_plans: dict[int, Plan] = {}


@app.task
def module_cache(order: int) -> int:
    """No order is asked for twice, and each one stays."""
    if order not in _plans:
        _plans[order] = [{"row": row, "seats": b"." * (SIZE // 50)} for row in range(50)]  # the leak
    return len(_plans[order])


@functools.lru_cache(maxsize=4)
def plan_of(gate: int) -> Plan:
    return [{"row": row, "seats": b"." * (SIZE // 50)} for row in range(50)]


@app.task
def module_cache_mended(order: int) -> int:
    """By what the plan follows from, which comes again; and no more than so many."""
    return len(plan_of(order % 3))


# ---- an object that lives as long as the process, and collects ----


class Turnstile:
    """A client, one of a process. `sent` is for looking into trouble."""

    def __init__(self, most: int | None = None) -> None:
        self.sent: deque[dict[str, Any]] = deque(maxlen=most)

    def send(self, scan: dict[str, Any]) -> int:
        self.sent.append(scan)
        return len(self.sent)


_turnstile = Turnstile()
_bounded_turnstile = Turnstile(most=50)


@app.task
def collector(order: int) -> int:
    return _turnstile.send({"order": order, "photograph": bytes([order % 256]) * SIZE})  # the leak


@app.task
def collector_mended(order: int) -> int:
    """Fifty of them, and of a photograph what trouble is looked into by."""
    photograph = bytes([order % 256]) * SIZE
    return _bounded_turnstile.send({"order": order, "size": len(photograph)})


# ---- handles that are not closed ----

_connections: dict[int, sqlite3.Connection] = {}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="boxoffice-")


@functools.cache
def _database() -> Path:
    """Of one process, gone when it ends."""
    path = Path(_folder().name, "scans.db")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table scan (gate integer)")
    return path


@app.task
def unclosed(order: int) -> int:
    """`with` commits, or rolls back; it does not close. The registry keeps the connection alive."""
    with sqlite3.connect(_database()) as connection:  # the leak
        _connections[order] = connection
        return connection.execute("select count(*) from scan").fetchone()[0]


@app.task
def unclosed_mended(order: int) -> int:
    with contextlib.closing(sqlite3.connect(_database())) as connection, connection:
        return connection.execute("select count(*) from scan").fetchone()[0]


# ---- a cache on a method, which keeps self ----


class Venue:
    def __init__(self, order: int) -> None:
        self.plan = bytes([order % 256]) * SIZE  # the leak

    @functools.cache  # noqa: B019 - its key is self, which is what this shows
    def price(self, row: int) -> int:
        return len(self.plan) // (row + 1)


@app.task
def method_cache(order: int) -> int:
    return Venue(order).price(row=3)


@functools.lru_cache(maxsize=1024)
def price_of(seats: int, row: int) -> int:
    return seats // (row + 1)


@app.task
def method_cache_mended(order: int) -> int:
    """What is remembered hangs on what the answer follows from, and not on the object."""
    plan = bytes([order % 256]) * SIZE
    return price_of(len(plan), row=3)


# ---- exceptions that are kept ----

_errors: list[Exception] = []
_reports: deque[str] = deque(maxlen=20)


def check(order: int) -> None:
    photograph = bytes([order % 256]) * SIZE  # the leak
    raise ValueError(f"no code on the {len(photograph)} bytes of order {order}")


@app.task
def kept_errors(order: int) -> int:
    """Kept for a report later. The traceback has the frames, and the frames have their locals."""
    try:
        check(order)
    except ValueError as error:
        _errors.append(error)
    return len(_errors)


@app.task
def kept_errors_mended(order: int) -> int:
    try:
        check(order)
    except ValueError:
        _reports.append(traceback.format_exc())
    return len(_reports)


# ---- closures that are kept ----

_later: list[Callable[[], int]] = []
_soon: deque[Callable[[], int]] = deque(maxlen=20)


@app.task
def kept_closures(order: int) -> int:
    """What is to be done later needs a length, and keeps the whole photograph."""
    photograph = bytes([order % 256]) * SIZE  # the leak
    _later.append(lambda: len(photograph))
    return len(_later)


@app.task
def kept_closures_mended(order: int) -> int:
    photograph = bytes([order % 256]) * SIZE
    length = len(photograph)
    _soon.append(lambda: length)
    return len(_soon)


# ---- handlers that pile up ----

_lengths: deque[int] = deque(maxlen=20)


@app.task(bind=True)
def handlers(self: Any, order: int) -> int:
    """Connects one more with each run, and each success calls them all."""
    photograph = bytes([order % 256]) * SIZE  # the leak

    def on_success(**_: Any) -> None:
        _lengths.append(len(photograph))

    signals.task_success.connect(on_success, sender=self, weak=False)
    return order


@app.task
def handlers_mended(order: int) -> int:
    photograph = bytes([order % 256]) * SIZE
    return len(photograph)


@signals.task_success.connect(sender=handlers_mended, weak=False)
def note_length(result: int = 0, **_: Any) -> None:
    """Connected once, at import; what it needs comes with the signal."""
    _lengths.append(result)


# ---- memory outside of Python ----


def _leaky() -> Any:
    try:
        import leaky
    except ImportError as error:
        raise RuntimeError("tests/lab/leaky.c is not built, or not on the path") from error
    return leaky


@app.task
def native(order: int) -> int:
    return sum(_leaky().hold(SIZE // 4) for _ in range(4))  # the leak


@app.task
def native_mended(order: int) -> int:
    return sum(_leaky().hold_and_free(SIZE // 4) for _ in range(4))


# ---- short lives and long ones in one heap ----

# Rows that a report has more than the one before it, and the most that it has, about 100 MB. Each is a block of
# malloc's: Python's own allocator takes what is up to 512 bytes, and malloc's cache of a thread what is up to 1032.
MORE_ROWS = 20
MOST_ROWS = 10_000
_reports_made = itertools.count(1)
_last_rows: list[bytes] = []
_reports_made_mended = itertools.count(1)
_last_lengths = array("l", [0]) * 1000


def rows_of_the_night(made: int) -> Iterator[bytes]:
    return (b"-" * (4000 + n * 997 % 12_000) for n in range(min(made * MORE_ROWS, MOST_ROWS)))


@app.task
def fragmentation(order: int) -> int:
    """Each report is of the whole night so far. Its last row stays, on top of the heap, which then cannot shrink."""
    rows = list(rows_of_the_night(next(_reports_made)))  # the leak
    _last_rows.append(rows[-1])
    return len(rows)


@app.task
def fragmentation_mended(order: int) -> int:
    """One row at a time; and what stays is in a place of its own from the start."""
    made = next(_reports_made_mended)
    length = 0
    for row in rows_of_the_night(made):
        length = len(row)
    _last_lengths[made % 1000] = length
    return length


# ---- a library of others ----


def _ticketlib() -> Any:
    try:
        import ticketlib
    except ImportError as error:
        raise RuntimeError("tests/lab/site-packages is not on the path") from error
    return ticketlib


@app.task
def third_party(order: int) -> int:
    return _ticketlib().draw(f"ticket {order} ")


@app.task
def third_party_mended(order: int) -> int:
    """Not ours to mend; it can be told to forget."""
    try:
        return _ticketlib().draw(f"ticket {order} ")
    finally:
        _ticketlib().clear()


# ---- a cache that fills: no leak ----


@functools.lru_cache(maxsize=500)
def photograph_of(order: int) -> bytes:
    return bytes([order % 256]) * SIZE  # the leak


@app.task
def filling_cache(order: int) -> int:
    """Grows until there are 500 of them, about 100 MB."""
    return len(photograph_of(order))


# ---- memory of the main process, which its children share until they write to it ----

# Seats whose prices are made at import. None, unless it is asked for: it takes 32 bytes and 8 more a seat.
PRICED_SEATS = int(os.environ.get("BOXOFFICE_PRICED_SEATS", "0"))
SEATS_A_RUN = 8000
_prices = [seat * 0.01 for seat in range(PRICED_SEATS)]
_flat_prices = array("d", _prices)


def _part(order: int) -> slice:
    if not PRICED_SEATS:
        raise RuntimeError("BOXOFFICE_PRICED_SEATS is not set")
    start = order * SEATS_A_RUN % PRICED_SEATS
    return slice(start, start + SEATS_A_RUN)


@app.task
def copy_on_write(order: int) -> float:
    """Reads only. But whoever holds an object counts that in the object, and the page is copied."""
    return sum(_prices[_part(order)])  # the leak


@app.task
def copy_on_write_mended(order: int) -> float:
    """Values side by side, with no counts among them."""
    return sum(_flat_prices[_part(order)])
