"""What one scrape of a host costs: 64 workers of a main process and four children, as Prometheus asks for them.

    .venv/bin/python -m tests.bench.scrape [--workers 64] [--scrapes 50]

The sampler's own Metrics and server, with figures that are made up, on a loopback. It says how long an answer takes,
median and slowest, its size as it is sent (gzip, which Prometheus asks for) and as it is, series for each worker, and
what a beat of the sampler takes longer with metrics than without. The baseline is the same text from prometheus_client
alone, in one run: the ratio is what the server and the socket add.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import socket
import statistics
import sys
import time
import urllib.request
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "roles" / "rss_sampler" / "files"
CHILDREN = 4
NOW = 1_763_942_400.0
ACCEPTS = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}


def sampler(workers: int) -> Any:
    spec = importlib.util.spec_from_file_location("rss_sampler", FILES / "rss_sampler.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["rss_sampler"] = module
    spec.loader.exec_module(module)
    # Which is not asked for each sample.
    states = {"NRestarts": "2", "ActiveState": "active"}
    module.show = lambda properties, units: {f"celery-worker@worker-{at}.service": states for at in range(workers)}
    # There is no such process to read it of.
    module.command_line = lambda pid: ["celery", "worker", f"--queues=queue-{pid // 100}", "--concurrency=4"]
    return module


def made_up(workers: int) -> tuple[list[tuple[Any, int]], dict[str, Any]]:
    """Processes with their size in KiB, and units, as the sampler's Watcher has them."""
    processes, units = [], {}
    floors = deque((600.0 * n, 100_000 + 64 * n) for n in range(7))
    for worker in range(workers):
        name = f"celery-worker@worker-{worker}.service"
        figures = [500_000 + worker, 900_000, 1_000_000, 0, 17, 3, 0, 123_456, 6_543]
        stat = "inactive_file 1000\nactive_file 1000\nslab_reclaimable 1000\n"
        units[name] = SimpleNamespace(figures=figures, read=lambda file, stat=stat: stat)
        for at in range(CHILDREN + 1):
            role = "child" if at else "main"
            one = {"pid": 100 * worker + at, "start_time": 1.0, "command": "celery", "tasks": 1000 * at, "pss": 80_000}
            processes.append((SimpleNamespace(unit_name=name, role=role, swap=0, floors=floors, **one), 100_000 + at))
    return processes, units


def ask(port: int) -> tuple[float, bytes]:
    """Seconds, and the body as it was sent."""
    began = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=ACCEPTS)) as answer:
        body = answer.read()
    return time.perf_counter() - began, body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--scrapes", type=int, default=50)
    given = parser.parse_args()
    module = sampler(given.workers)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    metrics = module.Metrics(f"127.0.0.1:{port}")
    processes, units = made_up(given.workers)
    beats = []
    for beat in range(given.scrapes):
        began = time.perf_counter()
        metrics.update(processes, units, NOW + beat, 0.1)
        beats.append(time.perf_counter() - began)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    alone, answered, sent = [], [], b""
    for _ in range(given.scrapes):
        began = time.perf_counter()
        text = generate_latest(registry)
        alone.append(time.perf_counter() - began)
        took, sent = ask(port)
        answered.append(took)
    assert gzip.decompress(sent) == text
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    middle, base = statistics.median(answered), statistics.median(alone)
    print(
        f"{given.workers} workers, {len(processes)} processes: {series} series, {series / given.workers:.1f} a worker"
    )
    print(f"scrape: {1000 * middle:.1f} ms, slowest of {given.scrapes} {1000 * max(answered):.1f} ms", end="; ")
    print(f"the text alone {1000 * base:.1f} ms, ratio {middle / base:.2f}")
    print(f"size: {len(sent) / 1024:.1f} KiB as sent, {len(text) / 1024:.0f} KiB of text")
    print(f"beat: {1000 * statistics.median(beats):.2f} ms more")


if __name__ == "__main__":
    main()
