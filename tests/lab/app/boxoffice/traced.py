"""Drives each kind of leak under load while a tracing window of its worker is open.

`python -m boxoffice.traced SECONDS WORKER=PATTERN[,PATTERN...] ...`, on the workers' host. WORKER is the name of a
worker and of its queue, PATTERN a task of boxoffice/leaks.py, or several with + between. Says a JSON line a window: its
worker, patterns and id.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from boxoffice import app

TRACES = Path("/var/log/plimsoll/trace")
# First calls take memory once.
WARM = 5
# Of tasks that wait, and seconds between two.
BACKLOG, EVERY_S = 2, 0.2
PATIENCE_S = 180.0


class Drive:
    def __init__(self, worker: str, window_s: float) -> None:
        self.worker, self.window_s = worker, window_s
        self.sent = itertools.count(1)

    def waiting(self) -> int:
        with app.pool.acquire(block=True) as connection:
            try:
                return connection.default_channel.queue_declare(self.worker, passive=True).message_count
            except connection.channel_errors:
                # Redis has no empty list.
                return 0

    def send(self, tasks: list[str]) -> None:
        """One of each, once few wait."""
        for task in tasks:
            deadline = time.monotonic() + PATIENCE_S
            while self.waiting() > BACKLOG:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{self.worker}: {task} does not end")
                time.sleep(EVERY_S)
            app.send_task(f"boxoffice.leaks.{task}", (next(self.sent),), queue=self.worker)

    def ask(self) -> str:
        """Celery's remote control, as a user may; id of the window."""
        to = [f"{self.worker}@{socket.gethostname()}"]
        arguments = {"window_s": self.window_s, "frames": 1}
        for _ in range(5):
            said = app.control.broadcast("plimsoll_window", arguments, destination=to, reply=True, timeout=20)
            if found := re.search(r"window (\w+),", json.dumps(said)):
                return found[1]
        raise SystemExit(f"{self.worker} does not answer: {said}")

    def over(self, window: str) -> bool:
        for path in TRACES.glob(f"celery-worker@{self.worker}.service-*.jsonl"):
            if any("window_close" in line and window in line for line in path.read_text().splitlines()):
                return True
        return False

    def trace(self, tasks: list[str]) -> None:
        for _ in range(WARM):
            self.send(tasks)
        while self.waiting():
            time.sleep(EVERY_S)
        window = self.ask()
        deadline = time.monotonic() + PATIENCE_S
        while not self.over(window):
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.worker}: the window for {tasks} does not end")
            self.send(tasks)
            time.sleep(EVERY_S)
        print(json.dumps({"worker": self.worker, "patterns": tasks, "id": window}), flush=True)


def main() -> None:
    window_s = float(sys.argv[1])
    plans = dict(plan.split("=") for plan in sys.argv[2:])

    def follow(worker: str) -> None:
        drive = Drive(worker, window_s)
        for patterns in plans[worker].split(","):
            drive.trace(patterns.split("+"))

    with ThreadPoolExecutor(len(plans)) as side_by_side:
        ends = [side_by_side.submit(follow, worker) for worker in plans]
        for end in ends:
            end.result()


if __name__ == "__main__":
    main()
