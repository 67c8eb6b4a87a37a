"""Time and memory of collecting, beside what people do without it, from real sshd servers on this machine.

    .venv/bin/python -m tests.bench.collecting [--only files large again slope] [--rounds 3] [--hosts 10 25 50 100 200]

What is run is the whole of playbooks/collect.yml, from the start of Ansible to the report, and beside it in the same
run, in turns, what it is compared with. None finds a connection open. Given are the medians of the rounds.

files   50 files from each of 10 hosts, beside a loop of ansible.builtin.fetch over them, which is given their names
large   100 MB from one host, beside `ssh HOST cat FILES | sha256sum`: as plain CSV, and as the gzip that the sampler
        leaves. And 1 MB, which shows what a run of Ansible costs whatever it brings, and whether memory goes with size.
        Through a loopback that is as fast as memory, cat has no network to wait for. As root, through one of 1 Gbit/s,
        which is what a Linode sends at:

    unshare --net sh -c 'ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 1mb latency 50ms &&
        exec .venv/bin/python -m tests.bench.collecting --only large'

again   a second run with nothing new since, beside two pings a host by one playbook, one less start of Ansible than
        `ansible -m ping` twice
slope   a routine run of several numbers of hosts, each once, beside two pings: how time and memory go with the number

The processors of this machine are the controller's and all hosts' at a time, and perhaps others' too. So of CPU is
told apart what the controller takes (Ansible, ssh and what it runs), of it the one process that hands out the tasks,
which more processors make no quicker, and what the hosts take (sshd, Python, modules). Memory is the proportional one
(PSS) of all processes of the run together at its height, looked at several times a second; the peak of the largest
process of each kind; and what ssh's masters hold at the end, which stay for ControlPersist. What the hosts lack beside
real ones is told in sshd_fleet.py. Nothing of what is said beyond the numbers of hosts was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from tests.bench.sshd_fleet import ROOT, Fleet, Logs, running

FORKS, ANSIBLE = 50, "ansible-playbook"
ROUTINE = Logs(hours=2, days=2)
PING, PACKING = "ansible.builtin.ping", ("Pack the new logs", "Fetch the bundle")
PLAYBOOKS = {
    "fetch": [
        {
            "hosts": "celery_workers",
            "gather_facts": False,
            "tasks": [
                {
                    "ansible.builtin.fetch": {"src": "{{ collect_logs }}/{{ item }}", "dest": "{{ fetched }}/"},
                    "loop": "{{ files }}",
                }
            ],
        }
    ],
    "pings": [{"hosts": "celery_workers", "gather_facts": False, "tasks": [{"ansible.builtin.ping": {}}] * 2}],
}
# Which task began when, in seconds, and the end.
CALLBACK = """
import os, time
from ansible.plugins.callback import CallbackBase

class CallbackModule(CallbackBase):
    CALLBACK_VERSION, CALLBACK_NAME, CALLBACK_NEEDS_ENABLED = 2.0, "spans", False

    def note(self, name):
        with open(os.environ["BENCH_SPANS"], "a") as file:
            file.write(f"{time.monotonic()} {name}\\n")

    def v2_playbook_on_task_start(self, task, is_conditional):
        self.note(task.get_name())

    def v2_playbook_on_stats(self, stats):
        self.note("end")
"""


@dataclass(frozen=True)
class Ran:
    """A program that ran. s of the clock and of CPU: of it and all below it, of it alone, and of the hosts.

    mib is what all of its processes held at their height, masters_mib what ssh's masters do at the end. largest has the
    peak MiB of the largest process that runs a verb of plimsoll's, by that, and of the largest other one, by the name
    of the program; one that was too quick to be seen is not in it. spans has the s of each task of Ansible by its name.
    """

    wall: float
    cpu: float
    main_cpu: float
    hosts_cpu: float
    mib: float
    masters_mib: float
    largest: Mapping[str, float] = field(default_factory=dict)
    spans: Mapping[str, float] = field(default_factory=dict)


class Heights(threading.Thread):
    """What a program and the processes below it hold, while it runs. In KiB."""

    def __init__(self, program: str, pid: int) -> None:
        super().__init__(daemon=True)
        self.program, self.pid, self.ended = program, pid, threading.Event()
        self.pss = 0
        self.largest: dict[str, int] = defaultdict(int)

    def run(self) -> None:
        while not self.ended.is_set():
            began = time.monotonic()
            self.pss = max(self.pss, sum(map(self.look, below(self.pid))))
            # Looking takes at most a tenth of a processor.
            self.ended.wait(max(0.05, 9 * (time.monotonic() - began)))

    def look(self, pid: int) -> int:
        """PSS of a process; 0 where it is gone."""
        try:
            status, rollup = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "smaps_rollup"))
            verb = re.search(r"\bplimsoll\.cli\0(\w+)", Path(f"/proc/{pid}/cmdline").read_text())
            peak, pss = (
                int(re.findall(rf"^{name}:\s*(\d+)", text, re.MULTILINE)[0])
                for name, text in (("VmHWM", status), ("Pss", rollup))
            )
        except (OSError, IndexError):
            return 0
        kind = verb[1] if verb else self.program
        self.largest[kind] = max(self.largest[kind], peak)
        return pss


def below(pid: int) -> Iterator[int]:
    """A process and those that it has started, and they."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from below(int(child))


class Bench:
    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.folder, self.fleet, self.spans = folder, fleet, folder / "spans"
        (folder / "callbacks").mkdir(exist_ok=True)
        (folder / "callbacks" / "spans.py").write_text(CALLBACK)
        for name, plays in PLAYBOOKS.items():
            (folder / f"{name}.yml").write_text(yaml.safe_dump(plays))
        # On a controller Python keeps what it has compiled: without, each start of Ansible takes twice as long.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "PYTHON"))}
        self.environ = {
            **kept,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_INVENTORY": str(fleet.inventory),
            "ANSIBLE_HOME": str(folder / "ansible"),
            "ANSIBLE_LOCAL_TEMP": str(folder / "ansible" / "tmp"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(fleet.connections),
            "ANSIBLE_CALLBACK_PLUGINS": str(folder / "callbacks"),
            "ANSIBLE_FORKS": str(FORKS),
            "BENCH_SPANS": str(self.spans),
        }

    def run(self, command: Sequence[str]) -> Ran:
        """Of a program, its output set aside. Raises SystemExit with what it said of it where it fails."""
        self.spans.unlink(missing_ok=True)
        before, began = self.fleet.cpu(), time.monotonic()
        with (self.folder / "said").open("w") as said:
            ran = subprocess.Popen(command, env=self.environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        heights = Heights(Path(command[0]).name, ran.pid)
        heights.start()
        try:
            # It is kept for its times to be read, which are whole only now.
            os.waitid(os.P_PID, ran.pid, os.WEXITED | os.WNOWAIT)
            wall, times = time.monotonic() - began, psutil.Process(ran.pid).cpu_times()
        finally:
            heights.ended.set()
            heights.join()
            ran.terminate()
            ran.wait()
        masters = self.fleet.hang_up()
        if ran.returncode:
            text = (self.folder / "said").read_text()
            at = re.search(r"^(fatal:|\[ERROR\])", text, re.MULTILINE)
            raise SystemExit(f"{command[:2]} ended with {ran.returncode}\n{text[at.start() if at else -3000 :][:3000]}")
        main_cpu = times.user + times.system
        return Ran(
            wall=wall,
            cpu=main_cpu + times.children_user + times.children_system + masters.cpu,
            main_cpu=main_cpu,
            hosts_cpu=self.fleet.cpu() - before,
            mib=heights.pss / 1024,
            masters_mib=masters.pss_kb / 1024,
            largest={kind: kb / 1024 for kind, kb in heights.largest.items()},
            spans=self.tasks(began),
        )

    def tasks(self, began: float) -> dict[str, float]:
        """s of each task by its name, without its role's; two of one name together."""
        lines = [line.split(" ", 1) for line in self.spans.read_text().splitlines()] if self.spans.exists() else []
        spans: dict[str, float] = defaultdict(float)
        for (start, name), (end, _) in itertools.pairwise([[str(began), "start"], *lines]):
            spans[name.rpartition(" : ")[2].partition(" - ")[0]] += float(end) - float(start)
        return spans

    def play(self, name: str, limit: int = 0, **extra: object) -> Ran:
        """One of PLAYBOOKS, or collect, of the first so many hosts, or all."""
        playbook = ROOT / "playbooks" / "collect.yml" if name == "collect" else self.folder / f"{name}.yml"
        hosts = ",".join(host.name for host in self.fleet.hosts[: limit or None])
        variables = yaml.safe_dump(extra, default_flow_style=True, width=1 << 30).strip()
        program = str(Path(sys.executable).with_name(ANSIBLE))
        return self.run([program, str(playbook), "--limit", hosts, "-e", variables])

    def collect(self, limit: int = 0, scope: str = "full", **extra: str) -> Ran:
        places = {f"collect_{one}": str(self.folder / one) for one in ("inbox", "store", "report")}
        return self.play("collect", limit, collect_scope=scope, collect_min_share=1.0, **places, **extra)

    def collect_anew(self, **extra: str) -> Ran:
        self.forget()
        return self.collect(0, "full", **extra)

    def forget(self) -> None:
        """All that came, and the bundles: what comes next is a first run."""
        for one in ("inbox", "store", "report", "fetched"):
            shutil.rmtree(self.folder / one, ignore_errors=True)
        for host in self.fleet.hosts:
            shutil.rmtree(host.home / "outbox", ignore_errors=True)

    def write(self, logs: Logs) -> None:
        for at, host in enumerate(self.fleet.hosts):
            shutil.rmtree(host.logs, ignore_errors=True)
            logs.write(host.logs, time.time(), at)

    def cat(self, files: Sequence[Path]) -> Ran:
        ssh = self.fleet.ssh(self.fleet.hosts[0], f"cat {' '.join(map(str, files))}")
        return self.run(["bash", "-o", "pipefail", "-c", f"{shlex.join(ssh)} | sha256sum"])


def in_turns(arms: Mapping[str, Callable[[], Ran]], rounds: int) -> dict[str, Ran]:
    """Each once a round, as this computer may do other things besides; of several rounds the medians."""
    turns = [{name: arm() for name, arm in arms.items()} for _ in range(rounds)]
    return {name: middle([turn[name] for turn in turns]) for name in arms}


def middle(runs: Sequence[Ran]) -> Ran:
    def of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: statistics.median(one.get(name, 0.0) for one in figures) for name in figures[0]}

    names = ("wall", "cpu", "main_cpu", "hosts_cpu", "mib", "masters_mib")
    figures = of([{name: getattr(ran, name) for name in names} for ran in runs])
    return Ran(**figures, largest=of([ran.largest for ran in runs]), spans=of([ran.spans for ran in runs]))


def show(found: Mapping[str, Ran]) -> None:
    print(f"{'':<26}{'wall s':>8}{'CPU s':>8}{'main':>7}{'hosts':>8}{'MiB':>6}{'masters':>9}  largest process, MiB")
    for name, ran in found.items():
        largest = ", ".join(f"{kind} {mib:.0f}" for kind, mib in ran.largest.items())
        print(
            f"{name:<26}{ran.wall:>8.2f}{ran.cpu:>8.2f}{ran.main_cpu:>7.2f}{ran.hosts_cpu:>8.2f}{ran.mib:>6.0f}"
            f"{ran.masters_mib:>9.0f}  {largest}"
        )
    for name, ran in found.items():
        if ran.spans:
            print(f"{name}: {', '.join(f'{task} {took:.2f}' for task, took in ran.spans.items())}")
    sys.stdout.flush()


def files(folder: Path, options: argparse.Namespace) -> None:
    with running(folder, options.few) as fleet:
        bench = Bench(folder, fleet)
        # 22 hours of samples and of cgroup, 2 days of rollup and of units, trace and acts.
        bench.write(Logs(hours=22, days=2))
        names = sorted(str(path.relative_to(fleet.hosts[0].logs)) for path in fleet.hosts[0].logs.rglob("*.*"))

        def fetch() -> Ran:
            bench.forget()
            return bench.play("fetch", files=names, fetched=str(folder / "fetched"))

        print(f"\n{len(names)} files from each of {len(fleet.hosts)} hosts")
        found = in_turns({"loop of fetch": fetch, "collect": bench.collect_anew}, options.rounds)
    show(found)
    loop, ran = found.values()
    tasks = list(ran.spans)
    there = sum(ran.spans[task] for task in tasks[: tasks.index(PACKING[-1]) + 1])
    print(
        f"collect has the files on the controller in 1/{loop.wall / there:.1f} of the time of the loop, and has judged "
        f"them in 1/{loop.wall / ran.wall:.1f}; all of its CPU is 1/{used(loop) / used(ran):.1f} of that of the loop"
    )


def used(ran: Ran) -> float:
    return ran.cpu + ran.hosts_cpu


def large(folder: Path, options: argparse.Namespace) -> None:
    # A line of samples is 145 bytes, in a gzip 13.
    hours = options.large_mb * 1_000_000 // (100 * 60 * 145)
    kinds = {
        "1 MB": Logs(hours=4, days=2),
        "plain": Logs(hours=hours, days=1, processes=25, zipped=False),
        "gzip": Logs(hours=6 * hours, days=6 * hours // 24, processes=45),
    }
    with running(folder, 1) as fleet:
        bench = Bench(folder, fleet)
        arms: dict[str, Callable[[], Ran]] = {}
        for at, (kind, logs) in enumerate(kinds.items()):
            root = folder / f"logs{at}"
            written = logs.write(root, time.time())
            size = sum(path.stat().st_size for path in written) / 1e6
            print(f"{kind}: {len(written)} files, {size:.1f} MB", flush=True)
            arms[f"{kind}, cat"] = functools.partial(bench.cat, written)
            arms[f"{kind}, collect"] = functools.partial(bench.collect_anew, collect_logs=str(root))
        found = in_turns(arms, options.rounds)
    show(found)
    little, small = found["1 MB, cat"], found["1 MB, collect"]
    for kind in ("plain", "gzip"):
        cat, ran = found[f"{kind}, cat"], found[f"{kind}, collect"]
        beyond = (packing(ran) - packing(small)) / (cat.wall - little.wall)
        memory = {name: mib / small.largest[name] for name, mib in ran.largest.items() if name in small.largest}
        print(
            f"{kind}: packing and fetching takes {packing(ran) / cat.wall:.2f} times as long as cat, less what 1 MB "
            f"takes {beyond:.2f} times; the whole run {ran.wall / cat.wall:.1f} times, {small.wall / cat.wall:.1f} of "
            f"which 1 MB takes; memory of 1 MB is 1: {', '.join(f'{name} {of:.2f}' for name, of in memory.items())}"
        )


def packing(ran: Ran) -> float:
    """s until the bundle is on the controller, from when Ansible has started."""
    return sum(ran.spans[name] for name in PACKING)


def again(folder: Path, options: argparse.Namespace) -> None:
    with running(folder, options.few) as fleet:
        bench = Bench(folder, fleet)
        bench.write(ROUTINE)
        bench.collect(scope="routine")
        nothing_new = functools.partial(bench.collect, scope="routine")
        arms = {"two pings": functools.partial(bench.play, "pings"), "collect, nothing new": nothing_new}
        found = in_turns(arms, options.rounds)
    print(f"{len(fleet.hosts)} hosts")
    show(found)
    pings, ran = found.values()
    print(
        f"with nothing new the run takes {ran.wall / pings.wall:.2f} of the time of two pings a host and "
        f"{used(ran) / used(pings):.2f} of their CPU; packing and fetching {packing(ran) / pings.spans[PING]:.2f} of "
        "the time of their tasks"
    )


def slope(folder: Path, options: argparse.Namespace) -> None:
    with running(folder, max(options.hosts)) as fleet:
        bench = Bench(folder, fleet)
        bench.write(ROUTINE)
        found: dict[str, list[Ran]] = defaultdict(list)
        for number in options.hosts:
            bench.forget()
            once = {
                "two pings": bench.play("pings", number),
                "collect": bench.collect(number, "routine"),
                "collect, nothing new": bench.collect(number, "routine"),
            }
            print(f"\n{number} hosts")
            show(once)
            for arm, ran in once.items():
                found[arm].append(ran)
    print("\nThe line of least squares: a host, and anyway; and where it would be, were it to go on: an extrapolation")
    figures: dict[str, Callable[[Ran], float]] = {
        "wall s": lambda ran: ran.wall,
        "CPU s": lambda ran: ran.cpu,
        "of it main's": lambda ran: ran.main_cpu,
        "hosts' CPU s": lambda ran: ran.hosts_cpu,
        "main's MiB": lambda ran: ran.largest[ANSIBLE],
        "masters' MiB": lambda ran: ran.masters_mib,
        "ingest's MiB": lambda ran: ran.largest.get("ingest", 0.0),
    }
    for arm, runs in found.items():
        for name, figure in figures.items():
            a_host, anyway = statistics.linear_regression(options.hosts, list(map(figure, runs)))
            beyond = "".join(f"{anyway + a_host * number:>10,.0f} at {number:,}" for number in (1_000, 10_000))
            print(f"{arm:<22}{name:<14}{a_host:>7.3f}{anyway:>8.2f}{beyond}")
        print(f"{arm:<22}{'all MiB':<14}{', '.join(f'{ran.mib:.0f}' for ran in runs)}: there are {FORKS} forks at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"files": files, "large": large, "again": again, "slope": slope}
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--few", type=int, default=10, help="hosts of files and again")
    parser.add_argument("--large-mb", type=int, default=100)
    parser.add_argument("--hosts", type=int, nargs="+", default=[10, 25, 50, 100, 200], help="of slope")
    options = parser.parse_args()
    # The hosts are ended then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f"{options.rounds} rounds, forks {FORKS}, {len(os.sched_getaffinity(0))} processors")
    for part in options.only:
        print(f"\n== {part}", flush=True)
        with tempfile.TemporaryDirectory(prefix="plimsoll-") as name:
            parts[part](Path(name), options)


if __name__ == "__main__":
    main()
