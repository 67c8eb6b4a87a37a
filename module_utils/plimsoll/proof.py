"""Whether an act has helped: the same worker, judged by the same detection before the act and after it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

import numpy as np

from .detect import Pattern, judge
from .remedy import CONTAIN, LIVES_OF_PROOF, RECYCLE, SHORTEST_PROOF_S, short
from .remedylog import CONTAINED, NOT_REMEDIED, REMEDIED, WORSE, Entry
from .report import size, span
from .series import Floats, Generation, Limits, Worker

# Growth of so many times what it was is worse, where its interval is beside the one before too.
WORSE_GROWTH = 1.5
# Of the time after which systemd restarts a worker, what one has to have lived that it did restart.
CLOCK_SLACK = 0.9


class Figures(TypedDict):
    """A worker in a stretch of time. Growth in KiB an hour with its 95 % interval, level and peak in KiB of its cgroup.

    ended is how many processes ended in it, restarts and oom_kills how often systemd and the kernel acted. None: not
    known.
    """

    pattern: str
    growth_kb_per_hour: float
    growth_low: float
    growth_high: float
    level_kb: float | None
    peak_kb: float | None
    tasks_per_minute: float | None
    ended: int
    restarts: int
    oom_kills: int
    hours: float


class Proof(NamedTuple):
    """verdict is empty where it cannot be told yet; why says what it rests on, or what is missing."""

    verdict: str
    why: str


def settled(act: Entry, worker: Worker | None, now: float, guarded: float = 0.0) -> tuple[Entry | None, str]:
    """The line of the log for an act that was done, None where it cannot be told yet; and the line for people.

    guarded is when the guard last restarted the worker, in Unix seconds.
    """
    done, wait = act["time"], max(act.get("prove_s", 0.0), SHORTEST_PROOF_S)
    before = after = None
    high = worker.limits.high_kb if worker is not None else None
    told = Proof("", "nothing has been seen of it since")
    if worker is not None:
        begin, clock = done - act.get("away_s", 0.0), clock_of(act)
        before = figures(worker, begin - wait, begin)
        # Over as long a time as before; and where that is not enough, over all that there is.
        for end in dict.fromkeys((min(now, done + wait), now)):
            after = figures(worker, done, end, clock)
            told = prove(act, before, after, high, equal=end <= done + wait)
            if told.verdict:
                break
        if guarded > done and told.verdict in (CONTAINED, REMEDIED):
            told = Proof(NOT_REMEDIED, "the guard had to restart it since")
    name = f"{act['host']} {short(act['unit'])}: {act['act']}"
    left = done + wait - now
    if told.verdict != WORSE and left > 0:
        return None, f"{name}: not proven yet: {span(left / 3600)} more of logs are needed"
    if not told.verdict:
        return None, f"{name}: not proven yet: {told.why}"
    kept: Any = {key: act[key] for key in ("id", "host", "unit", "act", "settings", "prove_s") if key in act}
    entry: Entry = {
        **kept,
        **{"time": now, "event": "proven", "verdict": told.verdict, "why": told.why, "before": before, "after": after},
    }
    return entry, f"{name}: {told.verdict.upper().replace('_', ' ')}: {told.why}{_beside(told.verdict, before, after)}"


def clock_of(act: Entry) -> float | None:
    """After how many seconds an act has systemd restart the worker; None for one that does not."""
    found = (re.fullmatch(r"RuntimeMaxSec=(\d+)s", line) for line in act.get("settings", []))
    return next((float(one[1]) for one in found if one), None)


def _beside(verdict: str, before: Figures | None, after: Figures | None) -> str:
    """Memory, growth and tasks a minute, before and after."""
    if before is None or after is None:
        return ""
    said = ""
    if before["peak_kb"] is not None and after["peak_kb"] is not None:
        said += f", and {size(before['peak_kb'])} before"
    # What is contained grows as it did, in processes that are too many to be told from each other in minutes.
    if verdict != CONTAINED:
        said += f"; growth {_rate(before)} before, {_rate(after)} after"
    if before["tasks_per_minute"] is not None and after["tasks_per_minute"] is not None:
        said += f"; tasks a minute {before['tasks_per_minute']:g} before, {after['tasks_per_minute']:g} after"
    return said


def figures(worker: Worker, begin: float, end: float, clock_s: float | None = None) -> Figures | None:
    """What a worker was like between two times, in Unix seconds; None where nothing was seen of it.

    Of what ended, those count that left as they were to: children, while the main process lived on; and where clock_s
    is given, any that were as old as that. What a deployment or the guard has ended, does not.
    """
    cut = _cut(worker, begin, end)
    if not cut.generations:
        return None
    verdict = judge(cut)
    last = max(float(one.times[-1]) for one in cut.generations)
    first = min(float(one.times[0]) for one in cut.generations)
    ended = [one for one in cut.generations if one.times[-1] < last - _near(one)]
    mains = [one for one in cut.generations if one.role == "main"]

    def left(one: Generation) -> bool:
        gone = float(one.times[-1])
        if clock_s is not None:
            return one.start_time is not None and gone - one.start_time >= CLOCK_SLACK * clock_s
        near = _near(one)
        lived_on = (main.times[0] < gone - near and main.times[-1] > gone + near for main in mains if main is not one)
        return not mains or any(lived_on)

    levels = cut.limits.levels
    return {
        "pattern": verdict.pattern.value,
        "growth_kb_per_hour": round(verdict.rate.slope, 1),
        "growth_low": round(verdict.rate.low, 1),
        "growth_high": round(verdict.rate.high, 1),
        "level_kb": round(float(np.median(levels)), 0) if len(levels) else None,
        "peak_kb": round(float(levels.max()), 0) if len(levels) else None,
        "tasks_per_minute": _pace(cut.generations, last - first),
        "ended": sum(map(left, ended)),
        "restarts": len(cut.limits.restarted),
        "oom_kills": len(cut.limits.killed),
        "hours": round((last - first) / 3600, 3),
    }


def _near(one: Generation) -> float:
    """Seconds after its last sample in which a process may have lived on unseen."""
    return 2.5 * max(one.interval, 1.0)


def _cut(worker: Worker, begin: float, end: float) -> Worker:
    lives = []
    for one in worker.generations:
        seen = (one.times >= begin) & (one.times <= end)
        if seen.any():
            series = {name: getattr(one, name)[seen] for name in ("times", "sizes", "tasks", "counts")}
            lives.append(replace(one, **series))
    limits = worker.limits

    def within(times: Floats) -> Floats:
        return times[(times >= begin) & (times <= end)]

    seen = (limits.times >= begin) & (limits.times <= end)
    kept: Limits = replace(
        limits,
        times=limits.times[seen],
        levels=limits.levels[seen],
        restarted=within(limits.restarted),
        killed=within(limits.killed),
        restarts=len(within(limits.restarted)),
        oom_kills=len(within(limits.killed)),
    )
    return replace(worker, generations=tuple(lives), limits=kept)


def _pace(lives: tuple[Generation, ...], seconds: float) -> float | None:
    """Tasks a minute of all processes together; None where none is counted."""
    counted = [one.tasks[~np.isnan(one.tasks)] for one in lives]
    done = [float(tasks[-1] - tasks[0]) for tasks in counted if len(tasks)]
    return round(sum(done) / seconds * 60, 1) if done and seconds > 0 else None


def prove(
    act: Entry, before: Figures | None, after: Figures | None, high_kb: float | None, equal: bool = True
) -> Proof:
    """Of an act that was done, by the figures of before and after it. high_kb is MemoryHigh, None for none.

    equal: whether they are of stretches of the same length, or after of a longer one, in which more may happen.
    """
    if after is None:
        return Proof("", "nothing has been seen of it since")
    kept = high_kb is None or after["peak_kb"] is None or after["peak_kb"] < high_kb
    if equal and after["oom_kills"] and (before is None or not before["oom_kills"]):
        return Proof(WORSE, f"{after['oom_kills']} OOM kills since, and none before")
    leaks = Pattern(after["pattern"]).leaking
    if leaks and before is not None and (act["act"] != CONTAIN or not kept) and _faster(before, after):
        return Proof(WORSE, f"it grows by {_rate(after)}, and did by {_rate(before)}")
    peak = f"memory was {size(after['peak_kb'])} at most" if after["peak_kb"] is not None else "its peak is not known"
    limit = f" of MemoryHigh {size(high_kb)}" if high_kb is not None and after["peak_kb"] is not None else ""
    if after["oom_kills"]:
        had = before["oom_kills"] if before is not None else 0
        return Proof(NOT_REMEDIED, f"{after['oom_kills']} OOM kills since, and {had} before; {peak}")
    if not kept:
        return Proof(NOT_REMEDIED, f"{peak}, which is at MemoryHigh ({size(high_kb or 0.0)})")
    if after["pattern"] == Pattern.INSUFFICIENT_DATA.value:
        return Proof("", f"{after['hours'] * 60:.0f} minutes since tell too little; {peak}{limit}")
    if act["act"] == CONTAIN:
        # By the clock, all of a worker's processes leave at a time, and not often.
        by_clock = clock_of(act) is not None
        enough = 1 if by_clock else LIVES_OF_PROOF
        if after["ended"] >= enough:
            return Proof(CONTAINED, f"{after['ended']} processes left in time; {peak}{limit}")
        if not leaks and not by_clock:
            return Proof(REMEDIED, f"it does not grow ({after['pattern']}); {peak}{limit}")
        left = enough - after["ended"]
        return Proof("", f"{left} more process{'es are' if left > 1 else ' is'} to leave in time; {peak}{limit}")
    if not leaks:
        return Proof(REMEDIED, f"it does not grow ({after['pattern']}); {peak}{limit}")
    if act["act"] == RECYCLE:
        return Proof(CONTAINED, f"{peak}{limit}; it grows again by {_rate(after)}")
    return Proof(NOT_REMEDIED, f"it still grows by {_rate(after)}; {peak}{limit}")


def _faster(before: Figures, after: Figures) -> bool:
    """Whether it grows so much faster that the intervals are apart, too."""
    grew = before["growth_kb_per_hour"] if Pattern(before["pattern"]).leaking else 0.0
    return after["growth_low"] > before["growth_high"] and after["growth_kb_per_hour"] > WORSE_GROWTH * grew


def _rate(one: Mapping[str, Any]) -> str:
    return f"{size(one['growth_kb_per_hour'])}/h"
