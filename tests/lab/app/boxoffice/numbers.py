"""Numbered tasks at a steady rate; each counts itself in the broker's Redis. `python -m boxoffice.numbers --help`."""

from __future__ import annotations

import argparse
import time

from kombu.exceptions import OperationalError

from boxoffice.tasks import number

PATIENCE_S = 180


def send(*args: float) -> None:
    """While the broker is away, again each second."""
    for _ in range(PATIENCE_S):
        try:
            number.apply_async(args, retry=False)
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
    given = parser.parse_args()
    started = time.monotonic()
    for n in range(given.first, given.first + given.count):
        time.sleep(max(0.0, started + (n - given.first) / given.rate - time.monotonic()))
        hog_mb = given.hog_mb if n == given.first + given.count // 2 else 0
        send(n, given.seconds, hog_mb, given.keep_kb)
    print(f"{given.count} sent", flush=True)


if __name__ == "__main__":
    main()
