"""Time and memory of reading samples, beside Python's csv module going over the same bytes.

    .venv/bin/python -m tests.bench.reading [--lines 10000000] [--processes 2000] [--rounds 1]

The samples are made up, as the sampler writes them, an hour to a file, plain and gzip; 10,000,000 lines take 1.5 GB in
the temporary directory, and half a minute to make. Each reading is a program of its own, whose figures hold all of it,
start and imports included; of several rounds the least ones are told. The baselines:

csv.reader   goes over the rows, and nothing is done with them
and numbers  makes numbers of time, process and size, and nothing is done with those either

reading is all from the files to the workers that are judged: every column checked, processes told apart, bounded.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "roles" / "rss_sampler" / "files"))
import rss_sampler  # noqa: E402 - found by the line above

BEGAN, BEATS_A_FILE, UNITS = 1_763_942_400, 60, 40

CSV = """
import csv, gzip, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).iterdir()):
    with (gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="")) as file:
        rows = csv.reader(file)
        next(rows)
        for row in rows:
            {}
"""
PROGRAMS = {
    "csv.reader": CSV.format("pass"),
    "and numbers": CSV.format("float(row[0]), int(row[1]), int(row[2])"),
    "reading": """
import sys
from pathlib import Path
from plimsoll.formats import read_host
from plimsoll.series import workers_of
data = read_host("host", Path(sys.argv[1]))
workers = workers_of(data)
samples = sum(one.samples for one in workers)
print(f"{samples} samples of {len(workers)} workers in {len(data.samples)} rows", *data.problems)
""",
}


def segment(folder: Path, number: int, beats: range, processes: int) -> None:
    """A file of the sampler's, plain and gzip."""
    rng = random.Random(number)
    ends = [
        f',"/opt/celery/venv/bin/celery -A shop worker -Q q{at % UNITS},mail",celery-worker@w{at % UNITS}.service,'
        f"{BEGAN - 60}.00,child,,,0,,,"
        for at in range(processes)
    ]
    lines = [rss_sampler.SAMPLE_COLUMNS]
    for beat in beats:
        spikes = rng.choices(range(4000), k=processes)
        lines += [
            f"{BEGAN + 60 * beat}.123,{1000 + at},{60_000 + beat * (at % 7) + spikes[at]}{ends[at]}{3 * beat}"
            for at in range(processes)
        ]
    text = ("\n".join(lines) + "\n").encode()
    (folder / "plain" / f"samples-{number:06}.csv").write_bytes(text)
    (folder / "gzip" / f"samples-{number:06}.csv.gz").write_bytes(gzip.compress(text, rss_sampler.GZIP_LEVEL))


def made_up(folder: Path, lines: int, processes: int) -> None:
    for kind in ("plain", "gzip"):
        (folder / kind).mkdir()
    beats = lines // processes
    parts = [range(start, min(start + BEATS_A_FILE, beats)) for start in range(0, beats, BEATS_A_FILE)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda part: segment(folder, part.start, part, processes), parts))


def run(program: str, folder: Path) -> tuple[float, float, float, str]:
    """Seconds of wall and of CPU, peak MiB, and what it said."""
    began = time.monotonic()
    command = [sys.executable, "-c", PROGRAMS[program], str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ran:
        assert ran.stdout
        said = ran.stdout.read().strip()
        _, status, used = os.wait4(ran.pid, 0)
        ran.returncode = os.waitstatus_to_exitcode(status)
    assert ran.returncode == 0
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up(folder, options.lines, options.processes)
        for kind in ("plain", "gzip"):
            size = sum(path.stat().st_size for path in (folder / kind).iterdir())
            print(f"\n{kind}, {size >> 20} MiB: {'wall s':>9}{'CPU s':>9}{'peak MiB':>10}")
            # In turns, as this computer may do other things besides.
            rounds = [{one: run(one, folder / kind) for one in PROGRAMS} for _ in range(options.rounds)]
            least = {one: [min(turn[one][at] for turn in rounds) for at in range(3)] for one in PROGRAMS}
            for one, (wall, cpu, peak) in least.items():
                print(f"{one:<18}{wall:>9.1f}{cpu:>9.1f}{peak:>10.0f}")
            for one in ("csv.reader", "and numbers"):
                wall, cpu = (least["reading"][at] / least[one][at] for at in (0, 1))
                print(f"reading takes {wall:.2f} of the wall time and {cpu:.2f} of the CPU of {one}")
            print(rounds[0]["reading"][3])


if __name__ == "__main__":
    main()
