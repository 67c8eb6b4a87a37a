"""A worker of an application and what is sent to it, for a soak: started, watched, judged as it goes, and ended.

Both run in the application's own Python, as roles/soak/files/plimsoll_soak.py, and talk to this by files in a folder of
each run. For hosts too: standard library alone, Python 3.9. There the folder is that of the workers' user, who is not
trusted: no link in it is followed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Callable, Protocol

from .files import write_whole
from .soak import FAIL, Judge, Plan, calls_of, line

PROGRAM = "plimsoll_soak"
# In the bootstrap's records, and of its window.
UNIT = "soak"
# Messages that wait for the worker at most, so that a slow one has no more than that behind it.
BACKLOG = 64
# Seconds: between two looks at the records, and two words of how far it is; for an application to be imported; and for
# a worker to end by itself.
LOOK_S, PROGRESS_S, START_S, END_S = 0.1, 5.0, 120.0, 10.0
# A tracing window of a failing task: runs before it, runs in it by what they gain together, frames of each allocation,
# and seconds for all of it. In 120 runs a line that keeps 300 bytes is above what is named. The bootstrap looks for a
# request once a second: at so many runs a second, a cache of some hundred entries is not full before that.
WARM_RUNS, LEAST_RUNS, MOST_RUNS, TRACED_BYTES, FRAMES, TRACE_S = 8, 120, 600, 2 << 20, 10, 120.0
TRACE_RATE = 40.0
# Lines of the worker's log that are shown where it ended, and bytes that are read for them.
TAIL, TAIL_BYTES = 15, 1 << 16
# Of a file that is read again and again, bytes at a time; of one that says a word, in all.
MOST_BYTES, MOST_WORD_BYTES = 8 << 20, 1 << 16

# Folders that the programs write to. What they lie in is not theirs, so that none can become a link.
THEIRS = ("said", "records", "trace", "tasks", "queue", "control")
LEFT = "the soak's queue may still be there"


class Trouble(Exception):
    """The soak cannot go on; the message says what is wrong, and the way out where there is one."""


class Launch(Protocol):
    """How the two programs, worker and send, are started and ended."""

    def start(self, name: str, folder: Path, environ: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]: ...
    def stop(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Ask it to end. It may have ended."""

    def own(self, path: Path) -> None:
        """Have the programs able to write there."""


@dataclass(frozen=True)
class Setting:
    """Where and how a soak runs. environ: variables of both programs; queue: its name with our own broker, or a prefix.

    embedded: our own broker. parent: pid of the process that both are to end with; 0 where they are not our children.
    """

    folder: Path
    app: str
    environ: Mapping[str, str]
    embedded: bool
    queue: str
    parent: int


class Bench:
    """Runs workers of the application, one after another, each in a folder of its own."""

    def __init__(
        self, setting: Setting, plan: Plan, launch: Launch, look: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        """look: called all along; what it raises ends the soak. say: takes what somebody who waits wants to know."""
        self.setting, self.plan, self.launch, self.look, self.say = setting, plan, launch, look, say
        self.number = itertools.count(1)

    @contextlib.contextmanager
    def started(
        self, lines: Iterable[str], tasks: Sequence[str], seconds: float, include: str, concurrency: int, **more: str
    ) -> Iterator[Pair]:
        """A worker that takes tasks, and a sender of these lines. Raises Trouble where it does not come up."""
        setting, plan = self.setting, self.plan
        folder = setting.folder / str(next(self.number))
        for name in (*THEIRS, "windows"):
            (folder / name).mkdir(parents=True)
            if name in THEIRS:
                self.launch.own(folder / name)
        # Nobody else is to take these, nor is this worker to take anybody else's.
        queue = setting.queue if setting.embedded else f"{setting.queue}-{os.urandom(6).hex()}"
        asked = {
            "app": setting.app,
            "tasks": list(tasks),
            "settings": plan.settings,
            "include": include,
            "pool": plan.pool,
            "concurrency": concurrency,
            "seconds": seconds,
            "queue": queue,
            "backlog": BACKLOG,
            "parent": setting.parent,
        }
        (folder / "plan.json").write_text(json.dumps(asked))
        with (folder / "schedule.jsonl").open("w") as out:
            out.writelines(lines)
        environ = {
            **setting.environ,
            "PYTHONUNBUFFERED": "1",
            "PLIMSOLL_SOAK_DIR": str(folder),
            # Of the bootstrap, which is loaded for a window alone.
            "PLIMSOLL_TRACE_MODE": "attribution",
            "PLIMSOLL_UNIT": UNIT,
            "PLIMSOLL_TRACE_DIR": str(folder / "trace"),
            "PLIMSOLL_WINDOWS_DIR": str(folder / "windows"),
            "PLIMSOLL_TASKS_DIR": str(folder / "tasks"),
            **more,
        }
        pair = Pair(folder, self.launch, environ, self.look)
        try:
            pair.start()
            yield pair
        finally:
            pair.end()
            if not setting.embedded and (folder / "said" / "ready").exists():
                self.say(pair.clean(queue))

    def run(self, judge: Judge, lines: Sequence[str]) -> dict[str, Any]:
        """Until all is decided or sent, or the time is over: what was sent, and why it ended."""
        tunables = self.setting.environ.get("GLIBC_TUNABLES")
        exact = {
            "PYTHONMALLOC": "malloc",
            "GLIBC_TUNABLES": ":".join(filter(None, [tunables, "glibc.malloc.tcache_count=0"])),
        }
        plan = self.plan
        with self.started(lines, list(plan.tasks), plan.seconds, PROGRAM, plan.concurrency, **exact) as pair:
            began, say_at, decided = time.monotonic(), time.monotonic() + PROGRESS_S, list[str]()
            reader = Reader(pair.folder / "records")
            while True:
                going = pair.going()
                seconds = time.monotonic() - began
                for process, record in reader.new():
                    judge.take(process, record, seconds)
                if judge.over():
                    over = "decided"
                    break
                if not going:
                    over = pair.sent()["over"]
                    break
                if judge.decided() != decided:
                    decided = judge.decided()
                    write_whole(pair.folder / "decided.json", json.dumps(decided))
                if time.monotonic() >= say_at:
                    say_at += PROGRESS_S
                    self.say(progress(seconds, judge))
                self.look()
                time.sleep(LOOK_S)
            pair.end()
            for process, record in reader.new():
                judge.take(process, record, seconds)
            told = pair.sent()
        return {
            "seconds": round(seconds, 1),
            "sent": told["sent"],
            "left_out": told["left_out"],
            "ended": over,
        }

    def traced(self, found: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """The records of a tracing window of each task that fails, in a worker that runs it alone."""
        records = {}
        for one in found:
            # What other tasks send is not in the file, so there is nothing to call it with.
            if one["verdict"] == FAIL and one["planned"]:
                self.say(f"tracing {one['task']}")
                records[one["task"]] = self._trace(one["task"], one["growth_kb"] * 1024 / 1000)
        return records

    def _trace(self, task: str, growth: float) -> list[dict[str, Any]]:
        """growth in bytes a run."""
        runs = int(min(MOST_RUNS, max(LEAST_RUNS, TRACED_BYTES / max(growth, 1.0))))
        rate = min(TRACE_RATE, self.plan.rate)
        lines = map(line, itertools.islice(calls_of(self.plan, task, rate), int(TRACE_S * rate)))
        records: list[dict[str, Any]] = []
        with self.started(lines, [task], TRACE_S, "plimsoll_bootstrap", 1) as pair:
            request = pair.folder / "windows" / f"{UNIT}.json"
            asked = {"id": UNIT, "window_s": TRACE_S, "frames": FRAMES, "until": time.time() + TRACE_S}
            reader, until = Reader(pair.folder / "trace"), None
            while pair.going():
                records += [record for _, record in reader.new()]
                kinds = {one["kind"] for one in records}
                ran = _counted(pair.folder / "tasks")
                if "window_close" in kinds:
                    break
                if until is None and ran >= WARM_RUNS and not request.exists():
                    write_whole(request, json.dumps(asked))
                elif until is None and "window_open" in kinds:
                    until = ran + runs
                elif until is not None and ran >= until:
                    request.unlink(missing_ok=True)
                self.look()
                time.sleep(LOOK_S)
        return sorted(records, key=lambda one: float(one["time"]))


class Pair:
    """The processes of a worker and of a sender."""

    def __init__(self, folder: Path, launch: Launch, environ: Mapping[str, str], look: Callable[[], None]) -> None:
        self.folder, self.launch, self.environ, self.look = folder, launch, environ, look
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, IO[bytes]] = {}

    def start(self) -> None:
        self._start("worker")
        deadline = time.monotonic() + START_S
        while not (self.folder / "said" / "ready").exists():
            if self.processes["worker"].poll() is not None:
                raise Trouble(self._ended("worker"))
            if time.monotonic() >= deadline:
                raise Trouble(f"the worker takes no tasks after {START_S:.0f} s{self._log('worker')}")
            self.look()
            time.sleep(LOOK_S)
        self._start("send")

    def _start(self, name: str) -> None:
        # Of no name, so that whoever may write in the folder cannot put another file in its place.
        self.logs[name] = tempfile.TemporaryFile()  # noqa: SIM115 - end() closes it
        self.processes[name] = self.launch.start(name, self.folder, self.environ, self.logs[name])

    def going(self) -> bool:
        """Whether there is more to come. Raises Trouble where one of both ended as it should not."""
        if self.processes["worker"].poll() is not None:
            raise Trouble(self._ended("worker"))
        status = self.processes["send"].poll()
        if status:
            raise Trouble(self._ended("send"))
        return status is None

    def _ended(self, name: str) -> str:
        trouble = _word(self.folder / "said" / "trouble")
        if trouble:
            return trouble
        who = {"worker": "the worker", "send": "the sender of tasks"}[name]
        status = self.processes[name].returncode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{who} {how}{self._log(name)}"

    def _log(self, name: str) -> str:
        log = self.logs[name]
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()[-TAIL:]
        return "; its last lines:\n" + "\n".join(f"    {one}" for one in lines) if lines else ""

    def sent(self) -> dict[str, Any]:
        told = json.loads(_word(self.folder / "said" / "sent.json") or "{}")
        return {"sent": 0, "left_out": 0, "over": "", **told}

    def end(self) -> None:
        """Sender and worker by what they do by themselves, then whatever is left of them. May be repeated."""
        with contextlib.suppress(OSError):
            os.close(os.open(self.folder / "stop", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        try:
            for name, patience in (("send", 2.0), ("worker", END_S)):
                if name in self.processes:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        if name == "worker":
                            self.launch.stop(name, self.processes[name])
                        self.processes[name].wait(patience)
        finally:
            for name, process in self.processes.items():
                self.launch.stop(name, process)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for log in self.logs.values():
                log.close()
            self.processes, self.logs = {}, {}

    def clean(self, queue: str) -> str:
        """Remove the queue from a broker that is not ours, once nobody has anything to put back; what went wrong."""
        try:
            self._start("clean")
            status = self.processes["clean"].wait(START_S)
            return f"{LEFT}: {queue}{self._log('clean')}" if status else ""
        except subprocess.TimeoutExpired:
            return f"{LEFT}: {queue}: the broker did not answer within {START_S:.0f} s"
        finally:
            self.end()


class Reader:
    """New records of a folder, whole lines, each with the name of its file, which is that of a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.offsets: dict[str, int] = {}

    def new(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self.offsets.get(path.name, 0)
            text = _read(path, MOST_BYTES, start)
            end = text.rfind(b"\n") + 1
            self.offsets[path.name] = start + end
            for one in text[:end].splitlines():
                yield path.name, json.loads(one)


def _read(path: Path, most: int, start: int = 0) -> bytes:
    """Up to so many bytes of a file from start on; none of one that is not there, or is no plain file."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, most, start)
        finally:
            os.close(descriptor)
    return b""


def _word(path: Path) -> str:
    return _read(path, MOST_WORD_BYTES).decode(errors="replace")


def _counted(folder: Path) -> int:
    """Tasks that ended in all processes, as the bootstrap counts them."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(ValueError):
            total += int(_word(path) or 0)
    return total


def progress(seconds: float, judge: Judge) -> str:
    ran = sum(one.ran for one in judge.tasks.values())
    decided = [judge.tasks[name].verdict for name in judge.plan.tasks if judge.tasks[name].verdict]
    fails = decided.count(FAIL)
    return (
        f"{seconds:.0f} s of {judge.plan.seconds:.0f} at most: {ran:,} tasks ran,"
        f" {len(decided)} of {len(judge.plan.tasks)} decided{f', {fails} fail' if fails else ''}"
    )
