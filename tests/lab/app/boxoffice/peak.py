"""A bounded peak of events: a set rate for a set time, then it stops by itself. `python -m boxoffice.peak --help`."""

from __future__ import annotations

import argparse
import time

from boxoffice.tasks import render_ticket, reserve_seat, scan_ticket

TASKS = (reserve_seat, render_ticket, scan_ticket)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=4, help="of each task, a second")
    given = parser.parse_args()
    started, sent = time.monotonic(), 0
    told = started
    total = round(given.seconds * given.rate)
    # On a slow machine the last ones are late; it ends in any case.
    while sent < total and (now := time.monotonic()) - started < 2 * given.seconds:
        while sent < min(total, (now - started) * given.rate):
            # Turned round each time: of two that come at once, a child that is traced would always get the same one.
            for task in TASKS if sent % 2 else reversed(TASKS):
                task.delay(sent)
            sent += 1
        if now - told >= 10:
            told = now
            print(f"{now - started:4.0f} s of {given.seconds:.0f}: {3 * sent} events sent", flush=True)
        time.sleep(0.1)
    print(f"done: {3 * sent} events sent in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
