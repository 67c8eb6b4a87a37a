"""A tracing window on request in a worker of this host: asked for, waited for, called off. For hosts, Python 3.9.

The bootstrap inside the worker looks for WINDOWS/UNIT.json, {id, window_s, frames, until}, when a task ends, and writes
what it saw to TRACES/UNIT-PID.jsonl under the same id. Both directories are those of the worker's user, who is not
trusted: no link is followed, nothing is waited for, and what is read is bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .files import write_whole

# Of the bootstrap: a window ends after its length, or at twice that while a task runs on.
MAX_WINDOW_S, MAX_FRAMES = 3600, 50
# A request is taken when a task ends. Beside the length of a window, so long a worker has for that.
TAKE_S = 30
# From calling a window off to its record: 2 s until the bootstrap looks, a garbage collection and a snapshot.
CLOSE_S = 15
POLL_S = 0.5
# From the last moment at which a request is taken to the record that says so.
LATE_S = 2
# A request is a line; one that is longer is none.
MAX_REQUEST_BYTES = 4096
# The bootstrap keeps 200 files of a worker. What else a worker's user may put there is not gone through without end.
MOST_FILES, MOST_ENTRIES = 400, 10_000
# A look, and a record: as much as formats takes for a line.
MAX_READ_BYTES, MAX_LINE_BYTES = 8 << 20, 1 << 20
# Later than any clock, and no more KiB than a machine has.
MAX_TIME, MAX_COUNT = 1e11, 1 << 53
MAX_PID = 1 << 22


def takes_s(window_s: int) -> int:
    """The longest that a window keeps whoever asked for it waiting, in seconds."""
    return 2 * window_s + TAKE_S + CLOSE_S


# ---- the request ----


@dataclass(frozen=True)
class Request:
    """A window that is asked for; until in Unix seconds: later none opens for it."""

    id: str
    window_s: int
    frames: int
    until: float

    @classmethod
    def new(cls, window_s: int, frames: int, now: float) -> Request:
        return cls(uuid.uuid4().hex[:16], window_s, frames, round(now + window_s + TAKE_S, 3))

    def text(self) -> str:
        return json.dumps(vars(self)) + "\n"


def request_file(windows: Path, unit: str) -> Path:
    return windows / f"{unit}.json"


def standing(path: Path) -> Request | None:
    """The request that lies there; None where there is none that the bootstrap would take."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            text = stream.read(MAX_REQUEST_BYTES + 1)
        given: Any = json.loads(text) if len(text) <= MAX_REQUEST_BYTES else None
        found = Request(given["id"], given["window_s"], given["frames"], given["until"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    named = isinstance(found.id, str) and re.fullmatch(r"[0-9a-zA-Z-]{1,64}", found.id)
    numbers = _number(found.window_s, 1, MAX_WINDOW_S), _number(found.until, 0, MAX_TIME)
    return found if named and None not in numbers else None


def withdraw(windows: Path, unit: str, asked: str) -> None:
    """Take the request of that id back, which ends its window; another one that is there by now stays."""
    path = request_file(windows, unit)
    found = standing(path)
    if found and found.id == asked:
        path.unlink(missing_ok=True)


def refusal(unit: str, shown: Mapping[str, str], now: float) -> str:
    """Why no window can be asked for in a unit, a sentence with the way out; empty where one can.

    shown holds what `systemctl show` says of it: LoadState, ActiveState, Environment.
    """
    if shown.get("LoadState") != "loaded":
        return f"{unit} is not on this host, though the inventory declares it; run playbooks/deploy.yml"
    if shown.get("ActiveState") != "active":
        state = shown.get("ActiveState") or "in no known state"
        return f"{unit} is {state}, so nothing in it can be traced; look at `journalctl --unit={unit}` and start it"
    environment = shown.get("Environment", "")
    windows, mode = _variable(environment, "PLIMSOLL_WINDOWS_DIR"), _variable(environment, "PLIMSOLL_TRACE_MODE")
    if mode == "off":
        return (
            f"{unit} is not traced, as tracemalloc_bootstrap_mode is off there; set it to attribution or armed, and run"
            " playbooks/deploy.yml"
        )
    if not windows or not mode:
        return f"{unit} runs without a bootstrap that opens a window on request; run playbooks/deploy.yml first"
    if not Path(windows).is_dir():
        return f"{unit}: {windows} is not there, as it did not start with this bootstrap; run playbooks/deploy.yml"
    path = request_file(Path(windows), unit)
    other = standing(path)
    # One that was taken at the last moment is still open for as long as a window may be.
    if other and now < (over := other.until + 2 * other.window_s):
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(over))
        return (
            f"{unit} is being diagnosed by somebody else: {path} asks for a window, which is over by {at}; wait until"
            " then, or remove that file, which ends the window"
        )
    return ""


def directories(shown: Mapping[str, str]) -> tuple[Path, Path]:
    """Where requests for a unit go, and where its records come: of one without a refusal()."""
    environment = shown["Environment"]
    traces = _variable(environment, "PLIMSOLL_TRACE_DIR") or "/var/log/plimsoll/trace"
    return Path(_variable(environment, "PLIMSOLL_WINDOWS_DIR")), Path(traces)


def _variable(environment: str, name: str) -> str:
    """One variable out of the property Environment, NAME=VALUE with blanks between; the last one counts."""
    found = re.findall(rf'(?:^|[ "]){name}=([^ "]*)', environment)
    return found[-1] if found else ""


# ---- the records ----


class Trail:
    """The records of one request in a worker's trace files. What was there before it is not read, and each line once.

    A file is known by its inode: one that is full goes on under another name.
    """

    def __init__(self, traces: Path, unit: str, asked: str) -> None:
        self.traces, self.asked = traces, asked
        self._name = re.compile(re.escape(unit) + r"-\d{1,10}(\.1)?\.jsonl")
        self._read_to = {self._key(found): found.st_size for _, found in self._files()}

    def news(self) -> list[dict[str, Any]]:
        """The records that came since the last time, each a dict with a kind that is text."""
        records, left, read_to = [], MAX_READ_BYTES, {}
        for path, found in self._files():
            start = self._read_to.get(self._key(found), 0)
            if found.st_size < start:
                # Another file, with the inode of one that was removed.
                start = 0
            if found.st_size > start and left > 0:
                text = self._read(path, self._key(found), start, left)
                left -= len(text)
                whole = text[: text.rfind(b"\n") + 1]
                records += [one for line in whole.splitlines() if (one := self._record(line))]
                # A line without an end is waited for, unless no record is as long.
                start += len(whole) if whole or len(text) <= MAX_LINE_BYTES else len(text)
            read_to[self._key(found)] = start
        self._read_to = read_to
        return records

    @staticmethod
    def _key(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """The files of the unit, the one that was written to last first."""
        found = []
        # systemd makes the directory, and the worker prunes its files.
        with contextlib.suppress(OSError), os.scandir(self.traces) as entries:
            for entry in islice(entries, MOST_ENTRIES):
                if self._name.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = Path(entry.path).lstat()
                        if stat.S_ISREG(status.st_mode):
                            found.append((Path(entry.path), status))
        return sorted(found, key=lambda one: -one[1].st_mtime)[:MOST_FILES]

    @staticmethod
    def _read(path: Path, key: tuple[int, int], start: int, most: int) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            found = os.fstat(descriptor)
            # Where it was rotated in between, the next look has it.
            return os.pread(descriptor, most, start) if (found.st_dev, found.st_ino) == key else b""
        finally:
            os.close(descriptor)

    def _record(self, line: bytes) -> dict[str, Any] | None:
        if self.asked.encode() not in line or len(line) > MAX_LINE_BYTES:
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or record.get("id") != self.asked or not isinstance(record.get("kind"), str):
            return None
        return record


@dataclass
class Outcome:
    """What became of a request. reason: how the window ended, or why there was none.

    growth: what the process gained in it, {window_s, rss_growth_kb, traced_growth_kb}; None where that was not told.
    """

    unit: str
    opened: bool = False
    closed: bool = False
    reason: str = ""
    pid: int | None = None
    growth: dict[str, float] | None = None

    def take(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            if record["kind"] == "window_open":
                self.opened = True
                pid = _number(record.get("pid"), 1, MAX_PID)
                self.pid = None if pid is None else int(pid)
            elif record["kind"] == "growth":
                names = "window_s", "rss_growth_kb", "traced_growth_kb"
                told = {name: _number(record.get(name), -MAX_COUNT, MAX_COUNT) for name in names}
                self.growth = {name: value for name, value in told.items() if value is not None}
            elif record["kind"] == "window_close":
                self.closed = True
                self.reason = _fit(record.get("reason"))

    def as_data(self) -> dict[str, Any]:
        return dict(vars(self))


def _number(value: Any, least: float, most: float) -> float | None:
    """What a worker wrote, where it is such a number."""
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
    return float(value) if sound else None


def _fit(text: Any) -> str:
    """What a worker wrote, fit for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text)[:200])


# ---- the window ----


@dataclass
class _Asked:
    """A request on its way."""

    request: Request
    windows: Path
    trail: Trail
    outcome: Outcome
    # Of time.monotonic().
    call_off_at: float
    done: bool = False
    called_off: bool = False
    # What has been looked for a last time, as its process is gone.
    gone: bool = False

    def withdraw(self) -> None:
        withdraw(self.windows, self.outcome.unit, self.request.id)

    def end(self, reason: str) -> None:
        self.outcome.reason = self.outcome.reason or reason
        self.done = True

    def look(self) -> None:
        """Take in what came, and decide whether there is anything left to wait for."""
        outcome, request = self.outcome, self.request
        outcome.take(self.trail.news())
        if outcome.closed:
            self.end("")
        elif self.gone:
            self.end(
                f"process {outcome.pid} ended in its window without a record, as one does that is killed; look at"
                f" `journalctl --unit={outcome.unit}`"
            )
        elif not outcome.opened and time.time() > request.until + LATE_S:
            self.end(
                f"no process opened the window within {request.window_s + TAKE_S} s: no task ended in it in that time,"
                " or another window was open; diagnose it under load, or with a longer window"
            )
        elif time.monotonic() > self.call_off_at + CLOSE_S * self.called_off:
            if self.called_off:
                self.end(f"the window was called off and did not end within {CLOSE_S} s; a task may hold the GIL")
            self.called_off = True
            self.withdraw()
        elif outcome.pid is not None and not Path("/proc", str(outcome.pid)).exists():
            # Its last records may have come since this look.
            self.gone = True


def trace(
    asked: Mapping[str, tuple[Path, Path]], window_s: int, frames: int, call_off: Callable[[], str]
) -> list[Outcome]:
    """Ask for a window in each unit, whose directories are given, and wait until all are over, at most takes_s().

    Whatever happens, no request stays. call_off is asked all along whether to end at once, and gives the reason.
    """
    waiting = []
    with contextlib.ExitStack() as withdrawn:
        for unit, (windows, traces) in asked.items():
            request = Request.new(window_s, frames, time.time())
            limit = time.monotonic() + 2 * window_s + TAKE_S
            one = _Asked(request, windows, Trail(traces, unit, request.id), Outcome(unit), limit)
            waiting.append(one)
            # Ahead of the file.
            withdrawn.callback(one.withdraw)
            try:
                write_whole(request_file(windows, unit), request.text())
            except OSError as error:
                one.end(f"{request_file(windows, unit)} cannot be written: {error.strerror}")
        while any(not one.done for one in waiting):
            why = call_off()
            for one in waiting:
                if not one.done:
                    one.end(why) if why else one.look()
            if not why:
                time.sleep(POLL_S)
    return [one.outcome for one in waiting]
