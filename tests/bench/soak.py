"""The soak gate on the demo application, again and again: wrong answers, and the time to a decision.

    .venv/bin/python -m tests.bench.soak [--times 20] [--only WORD ...]

Each time is `plimsoll soak` of tests/lab/app/soak.yml with another seed: each leaking task beside the same one mended,
in one worker of one process, on the embedded broker. A task that leaks is to fail, with the line of its leak as what
grew most (native, whose memory no line of Python holds, with its kind), and a mended one is to pass. Anything else is a
wrong answer, and is printed.

Given are, of each task, the seconds from the first task sent until it was decided, and its growth; of all mended ones
the largest growth and the largest upper end of an interval, which is what a budget has to be above; and how long a soak
took, until all was decided and with the windows that name the lines. --only takes words of names of tasks. A time takes
two to three minutes on two cores, most of it for windows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from plimsoll import soakrun

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.patterns import LAB, LIBRARY, OTHERS, PYTHON, build_extension


def expected(task: str) -> str:
    name = task.rpartition(".")[2]
    return "fail" if name in {**PYTHON, **OTHERS} and name != "filling_cache" else "pass"


def wrong(one: dict[str, Any]) -> str:
    """What is wrong about the answer; empty for nothing."""
    if one["verdict"] != expected(one["task"]):
        return f"{one['verdict']} ({one['why']})"
    if one["verdict"] == "pass":
        return ""
    leak, name = one["leak"], one["task"].rpartition(".")[2]
    if name == "native":
        return "" if leak["leak_class"] == "native" else f"kind {leak['leak_class']}"
    if not leak["culprits"] or leak["culprits"][0]["file"] is None:
        return "names no line"
    top = leak["culprits"][0]
    file = next(path for path in (LIBRARY, LAB / "app" / top["file"]) if str(path).endswith(top["file"]))
    line = file.read_text().splitlines()[top["line"] - 1]
    # What is kept is allocated where the rows are made, and not where they are put into a list.
    named = line.endswith("# the leak") or (name, top["function"]) == ("fragmentation", "rows_of_the_night")
    return "" if named and top["task"] == one["task"] else f"names {top['file']}:{top['line']}"


def run(tasks: Path, out: Path) -> tuple[dict[str, Any], int]:
    parser = argparse.ArgumentParser()
    soakrun.add_parser(parser.add_subparsers())
    arguments = ["soak", "-A", "boxoffice.leaks", "--tasks", str(tasks), "--out", str(out), "--python", sys.executable]
    given = parser.parse_args(arguments)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = int(given.run(given))
    return json.loads((out / "soak.json").read_text()), status


def spread(values: list[float]) -> str:
    return f"{min(values):7.1f} {statistics.median(values):7.1f} {max(values):7.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    options = parser.parse_args()
    data = yaml.safe_load((LAB / "app" / "soak.yml").read_text())
    words = options.only
    data["tasks"] = {name: one for name, one in data["tasks"].items() if not words or any(one in name for one in words)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in data["tasks"]}
    soaked, took, ran = [], [], []
    mistakes = 0
    with tempfile.TemporaryDirectory(prefix="plimsoll-bench-") as name:
        folder = Path(name)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(LIBRARY.parents[1]), str(build_extension(folder).parent)])
        os.chdir(LAB / "app")
        for seed in range(1, options.times + 1):
            (folder / "soak.yml").write_text(yaml.safe_dump({**data, "seed": seed}))
            began = time.monotonic()
            document, status = run(folder / "soak.yml", folder / "out")
            took.append(time.monotonic() - began)
            soaked.append(document["seconds"])
            ran.append(document["worker"]["tasks"])
            failed = any(expected(one) == "fail" for one in found)
            if status != failed:
                mistakes += 1
                print(f"seed {seed}: exit status {status}")
            for one in document["tasks"]:
                found[one["task"]].append(one)
                if trouble := wrong(one):
                    mistakes += 1
                    print(f"seed {seed}: {one['task']}: {trouble}", flush=True)
            print(f"seed {seed}: {document['seconds']:.0f} s, with windows {took[-1]:.0f} s", flush=True)
    print(f"\n{'seconds to a decision':<44}{'least':>7} {'median':>7} {'most':>7}   KiB per 1,000 tasks, median")
    for name, each in found.items():
        decided = [one["decided_s"] for one in each if one["decided_s"] is not None]
        growth = statistics.median(one["growth_kb"] or 0.0 for one in each)
        print(f"{name:<44}{spread(decided) if decided else '      -':<23}   {growth:,.1f}")
    print(f"{'all of them':<44}{spread(soaked)}")
    print(f"{'with the windows':<44}{spread(took)}")
    mended = [one for name, each in found.items() for one in each if expected(name) == "pass"]
    if mended:
        most, high = (max(one[key] or 0.0 for one in mended) for key in ("growth_kb", "growth_high"))
        print(f"mended tasks: growth {most:.1f} at most, upper end of its interval {high:.1f} at most")
    answers = sum(map(len, found.values()))
    print(f"{statistics.median(ran):,.0f} tasks a soak in the median; {mistakes} wrong of {answers} answers")
    sys.exit(bool(mistakes))


if __name__ == "__main__":
    main()
