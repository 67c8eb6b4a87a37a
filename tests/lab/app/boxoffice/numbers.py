"""Numbered tasks at a steady rate; each notes its run in the broker's Redis. `python -m boxoffice.numbers --help`.

SIGTERM ends it between two tasks. It says how many were sent.
"""

from __future__ import annotations

import argparse
import re
import signal
import time

from kombu.exceptions import OperationalError

from boxoffice.tasks import number

PATIENCE_S = 180
# Between the numbers of one queue and those of the next.
APART = 1_000_000


def send(queue: str, *args: float | str) -> None:
    """While the broker is away, again each second."""
    for _ in range(PATIENCE_S):
        try:
            number.apply_async(args, queue=queue, retry=False)
        except OperationalError:
            time.sleep(1)
        else:
            return
    raise SystemExit(f"the broker was away for {PATIENCE_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--rate", type=float, default=2, help="a second")
    parser.add_argument("--seconds", type=float, default=0.5, help="that each takes")
    parser.add_argument("--keep-kb", type=int, default=0, help="that each leaks")
    parser.add_argument("--hog-mb", type=int, default=0, help="that the middle one takes, the first time it runs")
    parser.add_argument(
        "--leak",
        action="append",
        default=[],
        metavar="QUEUE=TASK/N",
        help=f"with every Nth of them one on QUEUE that leaks as boxoffice.leaks.TASK; {APART} further on, and so on",
    )
    given = parser.parse_args()
    leaks = [(queue, task, int(every)) for queue, task, every in (re.split("[=/]", one) for one in given.leak)]
    sent = 0
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    started = time.monotonic()
    for n in range(given.first, given.first + given.count):
        time.sleep(max(0.0, started + (n - given.first) / given.rate - time.monotonic()))
        if ended:
            break
        hog_mb = given.hog_mb if n == given.first + given.count // 2 else 0
        send("gate", n, given.seconds, hog_mb, given.keep_kb)
        sent += 1
        for at, (queue, task, every) in enumerate(leaks, 1):
            if n % every == 0:
                send(queue, n + at * APART, 0, 0, 0, task)
                sent += 1
    print(f"{sent} sent", flush=True)


if __name__ == "__main__":
    main()
