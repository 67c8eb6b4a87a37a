"""Requests and seconds to create a fleet of 1, 10 and 100 instances, beside a loop that creates one after another.

    .venv/bin/python -m tests.bench.provision [--boot SECONDS] [--sizes 1,10,100]

The API is the lab's, with Linode's documented rate limits, over machines that pretend to boot for so many seconds. The
baseline is what a loop over a module for one instance does at its best: a POST, then polling until the instance
runs, by the same client and at the same intervals. Both run here, one after the other, and their ratio is of interest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plimsoll import fleet, fleet_api, linode

from tests.lab.conftest import TOKEN, Served, serve
from tests.lab.pretend import PretendDriver

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample bench"
HOST = fleet.Host("g6-nanode-1", "us-ord", "linode/debian12", authorized_keys=(KEY,))
DEADLINE_S = 3600.0


class NoKeys:
    """Host keys cost the same in both."""

    def pair(self, label: str) -> tuple[str, str]:
        return "private", "public"

    def forget(self, labels: Any) -> bool:
        return False


def client(lab: Served) -> tuple[linode.Api, linode.Deadline]:
    deadline = linode.Deadline(DEADLINE_S)
    return linode.Api(TOKEN, lab.url, "v4", deadline), deadline


def at_once(lab: Served, size: int) -> None:
    api, deadline = client(lab)
    desired = fleet.Desired("bench", (fleet.Group("", HOST, size),))
    listed = fleet_api.listing(api, desired)
    todo = fleet.plan(desired, listed, {one.label for one in listed})
    refs = fleet_api.References()
    results = fleet_api.apply(todo, desired, listed, refs, api, NoKeys(), deadline)
    assert not [result.error for result in results if result.error]


def one_by_one(lab: Served, size: int) -> None:
    api, deadline = client(lab)
    for number in range(1, size + 1):
        body = {"label": f"bench-{number}", "type": HOST.type, "region": HOST.region, "image": HOST.image}
        made = api.post(fleet_api.INSTANCES, {**body, "authorized_keys": [KEY]})
        interval = fleet_api.POLL_FIRST_S
        while made["status"] != "running":
            deadline.sleep(interval)
            interval = min(interval * 1.5, fleet_api.POLL_MOST_S)
            made = api.get(f"{fleet_api.INSTANCES}/{made['id']}")


def measured(ways: list[Callable[[Served, int], None]], size: int, boot: float) -> list[tuple[int, float, int]]:
    """Requests, seconds and answers of 429 for each way in turn, on one lab of its own."""
    found = []
    with tempfile.TemporaryDirectory() as home:
        server, lab = serve(Path(home) / "api.json", PretendDriver(boot))
        for way in ways:
            before = lab.lab.get("/lab/requests").json()
            started = time.monotonic()
            way(lab, size)
            seconds = time.monotonic() - started
            after = lab.lab.get("/lab/requests").json()
            count = {key: after[key] - before.get(key, 0) for key in after}
            refused = count.pop("429", 0)
            found.append((sum(count.values()), seconds, refused))
        server.should_exit = True
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--boot", type=float, default=3.0, help="seconds that a machine takes to boot")
    parser.add_argument("--sizes", default="1,10,100", help="fleets to create")
    given = parser.parse_args()
    print(f"instances boot in {given.boot:g} s\n")
    print(f"{'':>9} | {'fleet':^19} | {'again, unchanged':^19} | {'one by one':^19} | one by one takes")
    for size in map(int, given.sizes.split(",")):
        fresh, again = measured([at_once, at_once], size, given.boot)
        [loop] = measured([one_by_one], size, given.boot)
        cells = " | ".join(f"{requests:4} req {seconds:7.1f} s" for requests, seconds, _ in (fresh, again, loop))
        refused = f", {fresh[2]} answers of 429" if fresh[2] else ""
        print(f"{size:9} | {cells} | {loop[1] / fresh[1]:.1f} times as long{refused}", flush=True)


if __name__ == "__main__":
    main()
