"""CPU of one sample of 300 processes, beside `ps | grep` and beside a bare read of the same files; and its memory.

    .venv/bin/python -m tests.bench.sampler [--processes 300] [--units 10] [--rounds 200]

All are measured in the same run: once each in a row, with warm caches, and once in turns, a round taking one of each,
as on a host that does other things between two samples. Figures are medians of CPU time, user and system, children
included. The baselines:

pipeline    `ps -eo pid,rss,cmd | grep sleep` run from Python once a sample, as the plain script does; nothing is done
            with what it prints
bare read   open, read and close of each file that the sample needs, in the plainest Python; nothing is done with it

The processes are `sleep`, on whatever kernel this runs, and their cgroups are a folder with the same files. Small
processes make the detail (PSS, USS) look cheap: the kernel walks all page tables of a process for it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "roles" / "rss_sampler" / "files"))
import rss_sampler  # noqa: E402 - found by the line above

CGROUP = {
    "memory.current": "104857600\n",
    "memory.high": "209715200\n",
    "memory.max": "314572800\n",
    "memory.swap.current": "0\n",
    "memory.events": "low 0\nhigh 7\nmax 2\noom 1\noom_kill 1\noom_group_kill 0\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1234\n"
    "full avg10=0.00 avg60=0.00 avg300=0.00 total=567\n",
}
DETAIL = ("stat", "cmdline", "smaps_rollup")


def cpu() -> float:
    """Seconds of CPU of this process and its children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def of(run: Callable[[], object]) -> float:
    began = cpu()
    run()
    return cpu() - began


def pipeline() -> None:
    subprocess.run("ps -eo pid,rss,cmd | grep sleep", shell=True, capture_output=True, check=True)


def read(paths: list[str]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            file.read()


def read_bare(pids: list[int], units: list[Path]) -> None:
    os.listdir("/proc")
    read(["/proc/swaps", *(f"/proc/{pid}/statm" for pid in pids)])
    read([f"{unit}/{name}" for unit in units for name in CGROUP])


def read_bare_detail(pids: list[int], units: list[Path]) -> None:
    read_bare(pids, units)
    read([f"/proc/{pid}/{name}" for pid in pids for name in DETAIL])
    for pid in pids:
        os.listdir(f"/proc/{pid}/fdinfo")


def made_up(root: Path, pids: list[int], number: int) -> list[Path]:
    root.mkdir()
    (root / "cgroup.controllers").touch()
    units = [root / "celery.slice" / f"celery-worker@w{at}.service" for at in range(number)]
    for at, unit in enumerate(units):
        unit.mkdir(parents=True)
        for name, text in CGROUP.items():
            (unit / name).write_text(text)
        (unit / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids[at::number]))
    return units


def report(folder: Path, pids: list[int], options: argparse.Namespace) -> None:
    units = made_up(folder / "cgroup", pids, options.units)
    store = rss_sampler.Store(folder / "out", 1 << 30, 1e9)
    plain = rss_sampler.Sampler(rss_sampler.Watcher(root=folder / "cgroup"), store, 1 << 30)
    detail = rss_sampler.Sampler(rss_sampler.Watcher(root=folder / "cgroup"), store, 1)

    def sample() -> int:
        return plain.beat(time.time())

    def sample_with_detail() -> int:
        return detail.beat(time.time())

    # The first beat of each finds the processes.
    assert sample() == sample_with_detail() == len(pids)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "sample": (sample, 1),
        "pipeline": (pipeline, 1),
        "bare read": (lambda: read_bare(pids, units), 1),
        "sample with detail": (sample_with_detail, 10),
        "bare read with detail": (lambda: read_bare_detail(pids, units), 10),
    }
    in_a_row = {name: [of(run) for _ in range(options.rounds // every)] for name, (run, every) in runs.items()}
    in_turns: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds):
        for name, (run, every) in runs.items():
            if turn % every == 0:
                in_turns[name].append(of(run))
    print(f"{len(pids)} processes in {options.units} units, {options.rounds} rounds; CPU in ms, medians")
    for how, took in (("in a row", in_a_row), ("in turns", in_turns)):
        print(f"\n{how}")
        show({name: statistics.median(values) * 1e3 for name, values in took.items()})


def show(ms: dict[str, float]) -> None:
    print(f"{'sample':<24}{ms['sample']:>8.2f}")
    print(f"{'pipeline':<24}{ms['pipeline']:>8.2f}   sample is 1/{ms['pipeline'] / ms['sample']:.1f} of it")
    print(f"{'bare read':<24}{ms['bare read']:>8.2f}   sample is {ms['sample'] / ms['bare read']:.2f} times it")
    with_detail, bare = ms["sample with detail"], ms["bare read with detail"]
    print(f"{'sample with detail':<24}{with_detail:>8.2f}   every tenth by default")
    print(f"{'bare read with detail':<24}{bare:>8.2f}   sample with detail is {with_detail / bare:.2f} times it")
    mean = (9 * ms["sample"] + with_detail) / 10
    print(f"{'mean of ten samples':<24}{mean:>8.2f}   1/{ms['pipeline'] / mean:.1f} of the pipeline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=300)
    parser.add_argument("--units", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    started = [subprocess.Popen(["sleep", "3600"]) for _ in range(options.processes)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), [one.pid for one in started], options)
    finally:
        for one in started:
            one.kill()
            one.wait()


if __name__ == "__main__":
    main()
