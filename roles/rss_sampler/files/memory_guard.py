#!/usr/bin/env python3
# Copyright: the plimsoll contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Restarts a Celery worker of this host gracefully before MemoryMax kills it. Python 3.9 or later; uses rss_sampler.py.

Watched is the cgroup (v2) of each unit `celery-worker@NAME.service`. A restart is due when

1. its level has been at --threshold percent of its limit for --sustain seconds without a break; at once where it is
   half-way from there to MemoryMax. The limit is MemoryHigh, or MemoryMax where that is lower or the only one;
2. or it has been held at MemoryHigh for --sustain seconds: from each beat to the next memory.events counted `high`, and
   processes of it waited for memory (PSI, some) for --pressure percent of the time. At least half of the limit must be
   level: a worker that streams files is held there by page cache, and a restart gives it no room.

The level is what the kernel cannot take back, see observe(). With --pressure=0, or on a kernel without PSI, (1) alone
counts: memory.events rise also where nothing but page cache is reclaimed, so they say nothing by themselves.

A restart is `systemctl restart`: SIGTERM is Celery's warm shutdown. It waits while any worker of the host starts, stops
or reloads; the one that has used most of its MemoryMax is first; and there are at most --budget an hour.

acts.jsonl   a line is one act, and acts.1.jsonl holds the older ones. Each act is a line for the journal too.
    time            Unix seconds, UTC
    unit, reason    celery-worker@NAME.service, and a sentence
    action          restart        it is restarted now
                    would_restart  so it would be, by --dry-run; once for each run of the unit
                    outcome        what came of the restart
                    budget_spent   one is due, and none allowed; said once until one is
    level_kb, high_kb, max_kb   KiB, null for none; in an outcome those of the unit as it is then
    pressure        percent of the time since the beat before that processes waited for memory; null where not known
    result          of an outcome: done, failed (it is as it was, or did not start), timeout (systemd goes on with it),
                    left (the guard was stopped, and systemd goes on with it)
    seconds         of an outcome: from the restart to the beat that found it over

With --counts, how often each action but an outcome was taken since the guard began, for the sampler's metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rss_sampler import (
    CGROUPS,
    UNIT_PATTERN,
    count,
    fields,
    find_units,
    pressure_totals,
    publicly,
    read_text,
    run,
    seconds,
    show,
)

HOUR = 3600.0
MIB = 1 << 20
# What fills the limit must be level for the greater part, or a restart of a worker that is held there gives it no room.
HELD_LEVEL = 0.5
# acts.jsonl begins anew at this size in bytes: some thousand acts.
FULL_LOG = 1 << 20
# Beyond the unit's own time limits, for systemd itself; and in place of one that is infinite.
MARGIN, LONGEST = 30.0, 3600.0
ASKED = "ActiveState,SubState,TimeoutStopUSec,TimeoutStartUSec"
IN_BETWEEN = {"activating", "deactivating", "reloading", "refreshing"}
# As systemd writes a span of time: 1min 30s.
SPANS = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": HOUR, "d": 86400, "w": 604800, "month": 2629800, "y": 31557600}

Act = dict[str, Any]


def say(text: str) -> None:
    """One line for the journal."""
    print(f"memory_guard: {text}", file=sys.stderr, flush=True)


# ---- what is due: data in, decisions out ----


@dataclass(frozen=True)
class Rules:
    """threshold and pressure in percent, sustain in seconds; pressure 0 leaves the second trigger out."""

    threshold: float = 90.0
    sustain: float = 30.0
    pressure: float = 20.0


@dataclass(frozen=True)
class Observation:
    """A unit at one time, `at` in monotonic seconds. Sizes in bytes; a limit that is not set, or zero, is None.

    run: inode of its cgroup, which systemd makes anew at each start; events: memory.events `high`; waited: µs of PSI
    some, None on a kernel without it.
    """

    at: float
    run: int
    level: int
    high: int | None
    maximum: int | None
    events: int
    waited: int | None

    @property
    def limit(self) -> tuple[int, str] | None:
        """The lower one of the two, and what systemd calls it."""
        limits = [(size, name) for size, name in ((self.high, "MemoryHigh"), (self.maximum, "MemoryMax")) if size]
        return min(limits, default=None)


@dataclass(frozen=True)
class Watch:
    """What is remembered of one run of a unit: since when each trigger holds without a break, or None."""

    seen: Observation
    full: Observation | None
    held: Observation | None
    pressure: float | None


def waiting(first: Observation, last: Observation) -> float | None:
    """Percent of the time between two observations in which some process waited for memory."""
    if first.waited is None or last.waited is None or last.at <= first.at:
        return None
    return (last.waited - first.waited) / (last.at - first.at) / 1e4


def follow(before: Watch | None, seen: Observation, rules: Rules) -> Watch:
    """The next observation of a unit. Another run than before, and none before, begin anew."""
    last = before.seen if before and before.seen.run == seen.run else None
    if before is None or last is None:
        return Watch(seen, seen if is_full(seen, rules) else None, None, None)
    return Watch(
        seen,
        (before.full or seen) if is_full(seen, rules) else None,
        (before.held or last) if is_held(last, seen, rules) else None,
        waiting(last, seen),
    )


def is_full(seen: Observation, rules: Rules) -> bool:
    return seen.limit is not None and seen.level >= seen.limit[0] * rules.threshold / 100


def is_held(last: Observation, seen: Observation, rules: Rules) -> bool:
    """Whether it was held at MemoryHigh from one observation to the next; never without PSI."""
    pressure = waiting(last, seen)
    if seen.limit is None or pressure is None or not rules.pressure:
        return False
    pressed = seen.events > last.events and pressure >= rules.pressure
    return pressed and seen.level >= seen.limit[0] * HELD_LEVEL


def reason_of(watch: Watch, rules: Rules) -> str:
    """Why a restart is due, in a sentence; empty if none is."""
    seen = watch.seen
    if seen.limit is None:
        return ""
    size, name = seen.limit
    amount = f"{mib(seen.level)} of {mib(size)} {name} ({100 * seen.level / size:.0f} %)"
    if watch.full:
        threshold = size * rules.threshold / 100
        if seen.maximum and seen.level >= (threshold + seen.maximum) / 2:
            return f"{amount}, at least half-way from {rules.threshold:g} % of it to {mib(seen.maximum)} MemoryMax"
        if seen.at - watch.full.at >= rules.sustain:
            return f"{amount} for {seen.at - watch.full.at:.0f} s"
    if watch.held and seen.at - watch.held.at >= rules.sustain:
        lasted, pressure = seen.at - watch.held.at, waiting(watch.held, seen)
        return f"{amount}, held at MemoryHigh for {lasted:.0f} s and waiting for memory {pressure:.0f} % of the time"
    return ""


def mib(size: float) -> str:
    return f"{round(size / MIB)} MiB"


def nearness(seen: Observation) -> float:
    """Share of MemoryMax that is used; without one nothing kills the unit, and it comes last."""
    return seen.level / seen.maximum if seen.maximum else 0.0


def next_allowed(restarts: Iterable[float], at: float, budget: int) -> float:
    """When the next restart is allowed: `at`, or later. All in monotonic seconds; budget is restarts an hour."""
    last = sorted(restarts)[-budget:]
    return at if len(last) < budget else max(at, last[0] + HOUR)


def remembered(acts: Iterable[Act], action: str, now: float, at: float) -> list[float]:
    """Monotonic seconds of the acts of the last hour. Now is `now` in Unix seconds, and `at` in monotonic ones.

    One from the future was written before the clock was set back, and when that was is not known: it does not count.
    Some restarts too many do less harm than none until the clock is there again.
    """
    ages = (now - act["time"] for act in acts if act.get("action") == action)
    return [at - age for age in ages if 0 <= age < HOUR]


def state_of(shown: Mapping[str, str]) -> str:
    """ActiveState; empty for a unit that failed and waits for its next start, maybe for minutes: nobody is at it."""
    return "" if shown.get("SubState", "").startswith("auto-restart") else shown.get("ActiveState", "")


def hindrance(units: Sequence[str], states: Mapping[str, str]) -> str:
    """Why none of the due units can be restarted now, by the states of all workers; empty if nothing is in the way."""
    busy = [f"{unit} is {state}" for unit, state in sorted(states.items()) if state in IN_BETWEEN]
    if busy:
        return " and ".join(busy)
    return "" if any(states.get(unit) == "active" for unit in units) else "systemd does not say that it is active"


def span(text: str) -> float:
    """Seconds of a span of time as systemctl shows it, `1min 30s`; LONGEST for `infinity` and what is longer."""
    parts = [re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", word) for word in text.split()]
    known = [float(part[1]) * SPANS[part[2]] for part in parts if part and part[2] in SPANS]
    return min(LONGEST, sum(known)) if known and len(known) == len(parts) else LONGEST


# ---- the cgroup of a unit ----


def observe(cgroup: Path, at: float) -> Observation | None:
    """A unit as it is, or None where that cannot be read.

    The level is memory.current without the page cache and the slab that can be reclaimed. The kernel gives these back
    before it lets anything fail, and fills whatever memory is free with them again: a worker that has read large files
    stands at MemoryHigh for good, and a restart would free nothing that is missing. Files in memory (tmpfs) count.
    """
    run = run_of(cgroup)
    waited = pressure_totals(read_text(cgroup / "memory.pressure"))[0]
    # Before memory.current: cache that goes away in between must not look like a jump of the level.
    stat, events = fields(read_text(cgroup / "memory.stat")), fields(read_text(cgroup / "memory.events"))
    current = size_in(cgroup / "memory.current")
    try:
        spare = sum(int(stat[name]) for name in ("inactive_file", "active_file", "slab_reclaimable"))
        counted = int(events["high"])
    except (KeyError, ValueError):
        return None
    if run is None or current is None:
        return None
    return Observation(
        at=at,
        run=run,
        level=max(0, current - spare),
        high=size_in(cgroup / "memory.high") or None,
        maximum=size_in(cgroup / "memory.max") or None,
        events=counted,
        waited=waited if isinstance(waited, int) else None,
    )


def run_of(cgroup: Path) -> int | None:
    try:
        return cgroup.stat().st_ino
    except OSError:
        return None


def size_in(path: Path) -> int | None:
    """Bytes in a cgroup's file; None for `max` and where it cannot be read."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def set_high(cgroup: Path, high: str) -> None:
    """memory.high in bytes, or `max`. One whose unit has just ended needs none."""
    try:
        (cgroup / "memory.high").write_text(high)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            say(f"{cgroup / 'memory.high'}: {error.strerror}; it stays as it is")


# ---- what was done ----


class Acts:
    """The log of acts in a folder. What a crash left of a line is passed over."""

    def __init__(self, folder: Path) -> None:
        self.path, self.older = folder / "acts.jsonl", folder / "acts.1.jsonl"

    def append(self, act: Act) -> None:
        """Raises OSError with the line lost, or a part of it written."""
        line = json.dumps(act).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size + len(line) > FULL_LOG:
                self.path.replace(self.older)
        with self.path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = b"\n" + line
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self) -> list[Act]:
        """All acts, the oldest first."""
        acts = []
        for line in (read_text(self.older) + "\n" + read_text(self.path)).split("\n"):
            with contextlib.suppress(ValueError):
                act = json.loads(line)
                if isinstance(act, dict) and isinstance(act.get("time"), (int, float)):
                    acts.append(act)
        return acts


@dataclass(frozen=True)
class Restart:
    """One that runs: began in monotonic seconds, bound in seconds."""

    unit: str
    cgroup: Path
    seen: Observation
    process: subprocess.Popen[str]
    began: float
    bound: float


# ---- the service ----


class Guard:
    """Watches all workers of the host; beat() is one round. budget: restarts an hour. counts: a file, None for none."""

    def __init__(
        self, rules: Rules, budget: int, acts: Acts, dry_run: bool, cgroups: Path, counts: Path | None = None
    ) -> None:
        self.rules, self.budget, self.acts, self.dry_run, self.cgroups = rules, budget, acts, dry_run, cgroups
        self.action = "would_restart" if dry_run else "restart"
        self.counts, self.counted = counts, dict[str, dict[str, int]]()
        self.restarts = remembered(acts.read(), self.action, time.time(), time.monotonic())
        self.watches: dict[str, Watch] = {}
        self.running: Restart | None = None
        self.reported: dict[str, int] = {}
        self.said: set[str] = set()

    def beat(self, now: float) -> None:
        self.step(now, time.monotonic())

    def step(self, now: float, at: float) -> None:
        """One round at `now` in Unix seconds, which is `at` in monotonic ones."""
        units = find_units(self.cgroups)
        self.look(units, at)
        if self.running:
            self.settle(self.running, now, at)
        if not self.running:
            self.choose(units, now, at)

    def look(self, units: Mapping[str, Path], at: float) -> None:
        watches = {}
        for unit, cgroup in units.items():
            seen = observe(cgroup, at)
            if seen:
                watches[unit] = follow(self.watches.get(unit), seen, self.rules)
            elif run_of(cgroup) is not None:  # else it ended in between
                self.once(unit, f"{unit} is not watched: no figures of its memory in {cgroup}; is MemoryAccounting on?")
        self.watches = watches
        if unknown := watches.keys() - self.counted.keys():
            # A counter that begins at 1 has not risen, to Prometheus.
            self.counted.update((unit, {self.action: 0, "budget_spent": 0}) for unit in sorted(unknown))
            self.publish()
        if self.rules.pressure and any(watch.seen.waited is None for watch in watches.values()):
            self.once("psi", "this kernel has no PSI (boot it with psi=1): the level alone counts")

    def choose(self, units: Mapping[str, Path], now: float, at: float) -> None:
        """Of those that are due, restart the one nearest to its MemoryMax, where systemd and the budget allow it."""
        reasons = {unit: reason_of(watch, self.rules) for unit, watch in self.watches.items()}
        due = [unit for unit, reason in reasons.items() if reason and not self.is_reported(unit)]
        due.sort(key=lambda unit: nearness(self.watches[unit].seen), reverse=True)
        if not due:
            self.said.discard("hindrance")
            return
        allowed = next_allowed(self.restarts, at, self.budget)
        if allowed > at:
            self.budget_spent(due[0], reasons[due[0]], now, now + allowed - at)
            return
        self.said.discard("budget")
        shown = show(ASKED, [UNIT_PATTERN])
        states = {unit: state_of(one) for unit, one in shown.items()}
        hindered = hindrance(due, states)
        if hindered:
            self.once("hindrance", f"{due[0]} is due, and waits: {hindered}; {reasons[due[0]]}")
            return
        self.said.discard("hindrance")
        unit = next(unit for unit in due if states.get(unit) == "active")
        self.restarts.append(at)
        # Before the restart: one that a crash cuts off counts too.
        self.record(now, self.action, unit, reasons[unit])
        if self.dry_run:
            self.reported[unit] = self.watches[unit].seen.run
        else:
            limits = [span(shown[unit].get(name, "")) for name in ("TimeoutStopUSec", "TimeoutStartUSec")]
            self.restart(unit, units[unit], sum(limits) + MARGIN, now, at)

    def is_reported(self, unit: str) -> bool:
        return self.reported.get(unit) == self.watches[unit].seen.run

    def budget_spent(self, unit: str, reason: str, now: float, allowed: float) -> None:
        if "budget" not in self.said:
            self.said.add("budget")
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(allowed))
            spent = f"all {self.budget} restarts of an hour are spent, the next is allowed at {when}"
            self.record(now, "budget_spent", unit, f"{reason}; {spent}; MemoryHigh and MemoryMax hold until then")

    def restart(self, unit: str, cgroup: Path, bound: float, now: float, at: float) -> None:
        """Begin it. bound: seconds after which it is no longer waited for."""
        seen = self.watches.pop(unit).seen
        # systemd counts our starts too: past StartLimitBurst the worker would be stopped, and not started again.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["systemctl", "reset-failed", "--", unit], capture_output=True, timeout=10)
        # A worker that is held at MemoryHigh crawls, and would not end its tasks in time. systemd sets it anew as it
        # starts the unit, and until then MemoryMax bounds it.
        if seen.high:
            set_high(cgroup, "max")
        command = ["systemctl", "restart", "--", unit]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            give_back(cgroup, seen)
            self.record(now, "outcome", unit, f"systemctl: {error.strerror}", result="failed", seconds=0.0)
            return
        self.running = Restart(unit, cgroup, seen, process, at, bound)

    def settle(self, running: Restart, now: float, at: float) -> None:
        """Log what came of the restart once it is over, or takes too long."""
        code, took = running.process.poll(), at - running.began
        if code is None and took < running.bound:
            return
        self.running = None
        if code is None:
            # Not SIGTERM, which is blocked in it as in the guard.
            running.process.kill()
            running.process.wait()
            result, text = "timeout", f"not over after {took:.0f} s; systemd goes on with it"
        elif code:
            assert running.process.stderr
            said = running.process.stderr.read().strip().partition("\n")[0]
            result, text = "failed", f"failed after {took:.0f} s: {said or f'systemctl ended with {code}'}"
        else:
            result, text = "done", f"restarted in {took:.0f} s"
        if running.process.stderr:
            running.process.stderr.close()
        give_back(running.cgroup, running.seen)
        self.record(now, "outcome", running.unit, text, result=result, seconds=round(took, 1))
        # Whatever came of it, the next trigger counts anew.
        self.watches.pop(running.unit, None)

    def close(self) -> None:
        if self.running:
            took = time.monotonic() - self.running.began
            text = f"the guard ends after {took:.0f} s of it; systemd goes on with it"
            self.record(time.time(), "outcome", self.running.unit, text, result="left", seconds=round(took, 1))

    def record(self, now: float, action: str, unit: str, reason: str, **more: Any) -> None:
        """One act, for the journal and the log. Where the disk is full, the line is lost and nothing else."""
        watch = self.watches.get(unit)
        seen = watch.seen if watch else None
        sizes = (seen.level, seen.high, seen.maximum) if seen else (None, None, None)
        act: Act = {"time": round(now, 3), "unit": unit, "action": action, "reason": reason}
        names = ("level_kb", "high_kb", "max_kb")
        act.update((name, None if size is None else size // 1024) for name, size in zip(names, sizes))
        act["pressure"] = round(watch.pressure, 1) if watch and watch.pressure is not None else None
        say(f"{unit}: {action.replace('_', ' ')}: {reason}")
        if action != "outcome":
            of_unit = self.counted.setdefault(unit, {})
            of_unit[action] = of_unit.get(action, 0) + 1
            self.publish()
        try:
            self.acts.append({**act, **more})
            self.said.discard("log")
        except OSError as error:
            self.once("log", f"{self.acts.path}: {error.strerror}; until there is room, acts are in the journal alone")

    def publish(self) -> None:
        """{unit: {action: count}}, whole, and readable for the sampler's user."""
        if self.counts is None:
            return
        new = self.counts.with_suffix(".new")
        try:
            publicly(lambda: new.write_text(json.dumps(self.counted)))
            new.replace(self.counts)
        except OSError as error:
            self.once("counts", f"{self.counts}: {error.strerror}; the metrics lack the guard's acts")

    def once(self, what: str, text: str) -> None:
        """Say it, and not again until `what` is taken out of self.said."""
        if what not in self.said:
            self.said.add(what)
            say(text)


def give_back(cgroup: Path, seen: Observation) -> None:
    """The throttle, to a run that a restart has not ended."""
    if seen.high and run_of(cgroup) == seen.run and read_text(cgroup / "memory.high").strip() == "max":
        set_high(cgroup, str(seen.high))


def percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 100")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="memory_guard", description="Restarts this host's Celery workers gracefully before MemoryMax kills them."
    )
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, default=Path("/var/log/plimsoll/guard"), help="default: %(default)s")
    add("--interval", metavar="SECONDS", type=seconds, default=5.0, help="from one look to the next; default: 5")
    add("--threshold", metavar="PERCENT", type=percent, default=Rules.threshold, help="of the limit; default: 90")
    add("--sustain", metavar="SECONDS", type=seconds, default=Rules.sustain, help="without a break; default: 30")
    add("--pressure", metavar="PERCENT", type=percent, default=Rules.pressure, help="of the time, 0 for off: 20")
    add("--budget", metavar="N", type=count, default=6, help="restarts an hour; default: 6")
    add("--counts", metavar="FILE", type=Path, help="count the acts there, for the sampler's metrics")
    add("--dry-run", action="store_true", help="say what it would restart, and restart nothing")
    options = parser.parse_args(arguments)

    # Blocked and waited for: no signal comes in the middle of a restart that begins.
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    if not (CGROUPS / "cgroup.controllers").exists():
        say(f"{CGROUPS} is not cgroup v2: boot with systemd.unified_cgroup_hierarchy=1, or set rss_sampler_guard: off")
        return 1
    rules = Rules(options.threshold, options.sustain, options.pressure)
    acts = Acts(options.output)
    with contextlib.closing(Guard(rules, options.budget, acts, options.dry_run, CGROUPS, options.counts)) as guard:
        say(
            f"{'reports' if options.dry_run else 'restarts'} workers at {rules.threshold:g} % of their limit for "
            f"{rules.sustain:g} s; {len(guard.restarts)} of {options.budget} restarts of this hour are spent"
        )
        run(guard.beat, options.interval, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
