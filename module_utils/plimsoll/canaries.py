"""Which workers are traced to find what leaks, and what came of it: of the findings and of the inventory. Pure.

A canary stands for its queues: at most one worker of a queue is traced at a time, so that the others go on at full
speed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, cast

from .diagnose import Culprit
from .findings import SCHEMA, Finding, Findings
from .formats import printable
from .lines import InputError
from .report import blame, size, span
from .window import takes_s

# What tracing takes beside the leak itself: at its end up to 70 MiB for two snapshots, and 22 MiB for the traces of the
# 400,000 blocks at which the bootstrap ends a window.
TRACING_KB = 92 << 10
# What roles/celery_worker runs on a host whose inventory names no workers.
INSTANCES: Sequence[Mapping[str, Any]] = ({"name": "default", "queues": ["celery"]},)
# A leak in memory that is not Python's has no line that allocates it: another window would tell no more.
LINELESS = ("native", "fragmentation", "file_descriptors", "copy_on_write")
# Of code that allocates much, measured by tests/bench/tracing.py.
SLOWER = "7 to 10 times the CPU at 1 frame, 57 to 72 times at 10"


class Canary(TypedDict):
    """A worker that is traced, or that is passed over, and why; unit is empty where it is about a host as a whole."""

    host: str
    unit: str
    why: str


class Plan(TypedDict):
    """generated is that of the findings; takes_s how long the windows keep one waiting at most; say is for people."""

    generated: str
    takes_s: int
    chosen: list[Canary]
    passed_over: list[Canary]
    say: list[str]


# ---- the findings ----


def read_findings(path: Path) -> Findings:
    """findings.json as collect.yml wrote it. Raises InputError, which says what to do, where it is not that."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is not there; run playbooks/collect.yml first, which writes it") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run playbooks/collect.yml, which writes it anew") from None
    if wrong := _unsound(document):
        raise InputError(
            f"{path} is not findings.json of this plimsoll ({wrong}); run playbooks/collect.yml, which writes it anew"
        )
    return cast(Findings, document)


def _unsound(document: Any) -> str:
    """What is wrong with a document, as far as it is used here; empty for nothing."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return f"schema is not {SCHEMA}"
    try:
        # Without a zone it would be this machine's.
        if datetime.fromisoformat(document["generated"]).tzinfo is None:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        return "generated is no time"
    for name, kind in (("workers", _WORKER), ("hosts", _HOST)):
        if wrong := _unlike(name, document.get(name), kind):
            return wrong
    for at, one in enumerate(document["workers"]):
        if wrong := _unlike(f"workers[{at}].culprits", one["culprits"], _CULPRIT):
            return wrong
    return ""


def _unlike(name: str, listed: Any, kind: Mapping[str, tuple[type, ...]]) -> str:
    """Which of the objects in a list lacks a field, or has one of another type."""
    if not isinstance(listed, list):
        return f"{name} is no list"
    for at, one in enumerate(listed):
        if not isinstance(one, dict):
            return f"{name}[{at}] is no object"
        for field, types in kind.items():
            value = one.get(field)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                return f"{name}[{at}].{field}"
    return ""


_NUMBER = (int, float)
_NONE = type(None)
_WORKER: Mapping[str, tuple[type, ...]] = {
    "host": (str,),
    "unit": (str,),
    "leaking": (bool,),
    "pattern": (str,),
    "growth_kb_per_hour": _NUMBER,
    "growth_high": _NUMBER,
    "growth_kb_per_1000_tasks": (*_NUMBER, _NONE),
    "grows_in": (str, _NONE),
    "begins_kb": (*_NUMBER, _NONE),
    "span_hours": _NUMBER,
    "last_sample": (str,),
    "memory_high_kb": (*_NUMBER, _NONE),
    "hours_to_memory_high": (*_NUMBER, _NONE),
    "level_kb": (*_NUMBER, _NONE),
    "memory_max_kb": (*_NUMBER, _NONE),
    "hours_to_memory_max": (*_NUMBER, _NONE),
    "hours_to_memory_max_earliest": (*_NUMBER, _NONE),
    "leak_class": (str,),
    "culprits": (list,),
}
_CULPRIT: Mapping[str, tuple[type, ...]] = {
    "task": (str, _NONE),
    "file": (str, _NONE),
    "line": (int, _NONE),
    "function": (str, _NONE),
    "share": (*_NUMBER, _NONE),
    "package": (str, _NONE),
    "caller": (str, _NONE),
}
_HOST: Mapping[str, tuple[type, ...]] = {"host": (str,), "collected": (bool,), "reason": (str,)}


# ---- the choice ----


def plan(
    document: Findings,
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    *,
    window_s: int,
    max_age_h: float,
    again: bool,
    now: float,
) -> Plan:
    """Who is traced. declared: of each host of the run its celery_worker_instances, None where it has none of its own.

    again takes those too whose line is known. Raises InputError where the findings are older than max_age_h.
    """
    age_h = max(0.0, (now - datetime.fromisoformat(document["generated"]).timestamp()) / 3600)
    if age_h > max_age_h:
        raise InputError(
            f"the findings are {span(age_h)} old, and the workers that they name may be gone; run playbooks/collect.yml"
            f" first (diagnose_max_age_h allows {max_age_h:g} h)"
        )
    queues = {host: _queues(INSTANCES if given is None else given) for host, given in declared.items()}
    silent = {one["host"] for one in document["hosts"] if not one["collected"]}
    chosen: list[Canary] = []
    passed_over: list[Canary] = []
    taken: dict[str, Canary] = {}
    for one in document["workers"]:
        if not one["leaking"]:
            continue
        own = queues.get(one["host"], {}).get(one["unit"], [])
        why_not = (
            _unknown(one, queues)
            or ("its host was not collected" if one["host"] in silent else "")
            or ("" if again else _known(one))
            or _danger(one, age_h, takes_s(window_s) / 3600)
            or next((_shared(queue, taken[queue]) for queue in own if queue in taken), "")
        )
        canary: Canary = {"host": one["host"], "unit": one["unit"], "why": why_not or _why(one)}
        (passed_over if why_not else chosen).append(canary)
        if not why_not:
            taken.update(dict.fromkeys(own, canary))
    for host in document["hosts"]:
        if not host["collected"] and host["host"] in queues:
            why = f"not collected, so that nothing new is known of its workers: {host['reason']}"
            passed_over.append({"host": host["host"], "unit": "", "why": why})
    made: Plan = {
        "generated": document["generated"],
        "takes_s": takes_s(window_s) if chosen else 0,
        "chosen": chosen,
        "passed_over": passed_over,
        "say": [],
    }
    made["say"] = _say(made, window_s)
    return made


def _queues(instances: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Of each unit, the queues that it consumes; without any named, what roles/celery_worker names then."""
    return {f"celery-worker@{one['name']}.service": list(one.get("queues", ["celery"])) for one in instances}


def _unknown(one: Finding, queues: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    if one["host"] not in queues:
        return "its host is not in this run: left out by --limit, or no longer in the inventory"
    if one["unit"] not in queues[one["host"]]:
        return "celery_worker_instances of its host does not declare it, so that its queues are not known"
    return ""


def _known(one: Finding) -> str:
    """Why another window would tell nothing new; empty where it may."""
    line = _line(one)
    if one["leak_class"] == "unknown" or not (line or one["leak_class"] in LINELESS):
        return ""
    found = f", {line}" if line else ""
    return f"known already: {one['leak_class']}{found} (diagnose_all: true traces it again)"


def _danger(one: Finding, age_h: float, takes_h: float) -> str:
    """Why tracing could bring the worker to MemoryMax, which kills it in its tasks; empty where there is room."""
    level, most = one["level_kb"], one["memory_max_kb"]
    if level is None or most is None:
        return ""
    way_out = "restart it or raise its MemoryMax, collect, and diagnose it then"
    earliest = one["hours_to_memory_max_earliest"]
    if earliest is not None and earliest <= age_h:
        return (
            f"by these findings, which are {span(age_h)} old, it may have met its MemoryMax of {size(most)} by now; run"
            " playbooks/collect.yml, and diagnose it then"
        )
    if earliest is not None and earliest <= age_h + takes_h:
        return (
            f"it may meet its MemoryMax of {size(most)} before a window is over, which takes up to"
            f" {_time(takes_h)}; {way_out}"
        )
    # One that is recycled has lost since what it had gained.
    ahead_h = takes_h + (0 if one["pattern"] == "recycled" else age_h)
    grown = max(0.0, one["growth_kb_per_hour"]) * ahead_h
    if level + grown + TRACING_KB > most:
        more = f" and may grow by {size(grown)} until a window is over" if grown >= 1024 else ""
        return (
            f"it holds {size(level)} of its MemoryMax of {size(most)}{more}, and tracing takes up to {size(TRACING_KB)}"
            f" beside; {way_out}"
        )
    return ""


def _shared(queue: str, canary: Canary) -> str:
    name = f"{canary['host']} {_short(canary['unit'])}"
    return f"{name} of the queue {printable(queue, 60)} is traced in this run; run again for this one"


def _why(one: Finding) -> str:
    left = one["hours_to_memory_max"]
    until = f", MemoryMax in {span(left)}" if left is not None else ""
    lacks = "to be looked at again" if _known(one) else "what leaks is not known yet"
    return f"{one['pattern']}, {size(one['growth_kb_per_hour'])}/h{until}; {lacks}"


def _say(made: Plan, window_s: int) -> list[str]:
    said = []
    for canary in made["chosen"]:
        said.append(f"TRACE {canary['host']} {_short(canary['unit'])}: {canary['why']}")
    for canary in made["passed_over"]:
        unit = f" {_short(canary['unit'])}" if canary["unit"] else ""
        said.append(f"pass over {printable(canary['host'])}{unit}: {canary['why']}")
    if not made["chosen"]:
        return [*said, "No worker is traced" + ("" if said else ": none leaks by these findings")]
    return [
        *said,
        f"Each is traced for {window_s} s, once a task ends in it; all at the same time, in"
        f" {_time(made['takes_s'] / 3600)} at most. In one process of each, code that allocates much takes {SLOWER}.",
    ]


def _time(hours: float) -> str:
    """Some minutes and seconds."""
    seconds = round(3600 * hours)
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min {seconds % 60} s"


def _short(unit: str) -> str:
    return printable(unit.removesuffix(".service"))


def _line(one: Finding) -> str:
    """The line that grows most, with its task; empty where none is known."""
    # One of an older plimsoll lacks what was added since.
    lacking = {"package": None, "caller": None}
    found = ({**lacking, **culprit} for culprit in one["culprits"] if culprit.get("file"))
    return next((printable(blame(cast(Culprit, culprit)), 400) for culprit in found), "")


# ---- what came of it ----


class Result(TypedDict):
    """say: a line a canary. traced: how many were."""

    say: list[str]
    traced: int


def result(made: Plan, came: Mapping[str, Mapping[str, Any]], document: Findings) -> Result:
    """What each canary showed, by the findings of after. came: of each host what trace_window returned there."""
    workers = {(one["host"], one["unit"]): one for one in document["workers"]}
    said, traced = [], 0
    for canary in made["chosen"]:
        host, unit = canary["host"], canary["unit"]
        there = came.get(host, {})
        window = next((one for one in there.get("windows") or [] if one.get("unit") == unit), None)
        if window is None:
            why = printable(" ".join(str(there.get("msg") or "its host was not asked").split()), 400)
            said.append(f"{host} {_short(unit)}: not traced: {why}")
        elif not window.get("growth"):
            why = printable(window.get("reason") or "no record came of it", 400)
            said.append(f"{host} {_short(unit)}: {'no result' if window.get('opened') else 'not traced'}: {why}")
        else:
            traced += 1
            later = document["generated"] != made["generated"]
            said.append(f"{host} {_short(unit)}: {_shown(workers.get((host, unit)), window, later)}")
    return {"say": said, "traced": traced}


def _shown(one: Finding | None, window: Mapping[str, Any], later: bool) -> str:
    growth = window["growth"]
    gained = f"in the window its RSS gained {size(growth.get('rss_growth_kb', 0))}"
    if "traced_growth_kb" in growth:
        gained += f", and Python's allocations {size(growth['traced_growth_kb'])}"
    if not later or one is None:
        return f"traced, and the report does not have it: its logs were not collected since, see above; {gained}"
    since = "" if one["leaking"] else f"by what was collected since it does not leak any more ({one['pattern']})"
    if line := _line(one):
        return f"{one['leak_class']}, {line}" + (f"; {since}" if since else "")
    if since:
        return f"traced, and {since}; {gained}"
    task = next((f", task {printable(culprit['task'])}" for culprit in one["culprits"] if culprit.get("task")), "")
    if one["leak_class"] == "unknown":
        return f"traced, and what leaks is still not known{task}: {gained}; a longer window, or more load, may tell"
    return f"{one['leak_class']}{task}, and no line of Python explains the growth: {gained}"
