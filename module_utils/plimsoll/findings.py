"""The findings: what findings.json holds, made of what was read. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median
from typing import Any, TypedDict

from .detect import WARM_SHARE, Pattern, Verdict, judge
from .diagnose import Advice, Culprit, Hold, Kind, advice, culprits, holds, leak_class
from .diagnose import evidence as traced
from .formats import HostData, Incident, Trace, printable
from .mends import Checked, Mend, mends, of_kind
from .remedylog import CONTAINED, Remedy
from .samples import MOST_INCIDENTS
from .series import Worker, workers_of
from .store import Host

SCHEMA = 1
# Processes, at about 15 ms each, that take longer to judge than others take to start.
WORTH_A_POOL = 200
# What is held of hosts that wait for their verdicts is bounded by their number.
HOSTS_AHEAD = 8
# Of MemoryHigh, what a worker may hold that is contained.
NEAR = 0.9
# Of all that a worker's processes gained, what those of one role must have, to be where it leaks.
MOST_OF_IT = 0.6
# Of a line that tells what happened to a worker.
INCIDENT_LENGTH = 160


class Finding(TypedDict):
    """One worker. growth_* in KiB an hour with its 95 % interval, level and limits in KiB; None where not known.

    checks: symbols of the static checks that find leaks of this kind; mends: what they say of the code that is blamed.
    grows_in: main or child, where most of the growth of a leak is; begins_kb what a process of those holds once it has
    warmed up. last_sample is ISO 8601, UTC.

    docs/findings.schema.json has every field.
    """

    host: str
    unit: str
    leaking: bool
    pattern: str
    confidence: float | None
    growth_kb_per_hour: float
    growth_low: float
    growth_high: float
    growth_kb_per_1000_tasks: float | None
    growth_follows: str | None
    grows_in: str | None
    begins_kb: float | None
    generations: int
    samples: int
    span_hours: float
    last_sample: str
    level_kb: float | None
    memory_high_kb: int | None
    memory_max_kb: int | None
    hours_to_memory_high: float | None
    hours_to_memory_high_earliest: float | None
    hours_to_memory_high_latest: float | None
    hours_to_memory_max: float | None
    hours_to_memory_max_earliest: float | None
    hours_to_memory_max_latest: float | None
    leak_class: str
    culprits: list[Culprit]
    holds: list[Hold]
    evidence: list[str]
    advice: Advice | None
    checks: list[str]
    mends: list[Mend]
    remedy: Remedy | None


class Soonest(TypedDict):
    """The limit that is met first in the whole fleet."""

    host: str
    unit: str
    limit: str
    hours: float


class Fleet(TypedDict):
    """The fleet at a glance: how many of each; collected: hosts that the last collection reached."""

    hosts: int
    collected: int
    workers: int
    leaking: int
    soonest: Soonest | None


class Name(TypedDict):
    host: str
    unit: str


class Changes(TypedDict):
    """What is new since the findings before: since is when those were made, None where there are none.

    leaking: that leak, and did not or were not known; mended: that leaked, and are seen and do not; named: that leaked
    before too, and whose line is known now; gone: that leaked, and are not seen any more.
    """

    since: str | None
    leaking: list[Name]
    mended: list[Name]
    named: list[Name]
    gone: list[Name]


class Findings(TypedDict):
    """The whole document. generated is ISO 8601, UTC. workers: those that leak first, the least time left first."""

    schema: int
    generated: str
    fleet: Fleet
    changes: Changes
    workers: list[Finding]
    hosts: list[Host]


def findings(
    read: Iterable[tuple[Host, HostData | None]],
    now: float,
    before: Before | None = None,
    remedies: Mapping[tuple[str, str], Remedy] | None = None,
    checked: Sequence[Checked] = (),
) -> tuple[Findings, list[Verdict]]:
    """The document and, in the same order, the verdicts that it was made of. now in Unix seconds.

    read may read as it goes: of each host no more than its series is kept. before is what the last findings said,
    remedies what was done to each worker (host, unit), checked what the static checks say of the application's source.
    """
    done = remedies or {}
    found: list[tuple[Finding, Verdict]] = []
    hosts: list[Host] = []
    for host, traces, incidents, verdicts in _judged(read):
        hosts.append(host)
        for verdict in verdicts:
            unit = verdict.worker.unit
            records = [one for one in traces if one.get("unit") == unit]
            finding = _finding(verdict, records, [one for one in incidents if one.unit == unit])
            _remedied(finding, done.get((finding["host"], unit)))
            finding["mends"] = mends(finding["culprits"], finding["holds"], checked)
            found.append((finding, verdict))
    found.sort(key=lambda one: _urgency(one[0]))
    workers = [finding for finding, _ in found]
    document: Findings = {
        "schema": SCHEMA,
        "generated": stamp(now),
        "fleet": {
            "hosts": len(hosts),
            "collected": sum(one["collected"] for one in hosts),
            "workers": len(workers),
            "leaking": sum(one["leaking"] for one in workers),
            "soonest": _soonest(workers),
        },
        "changes": changes(before, workers),
        "workers": workers,
        "hosts": hosts,
    }
    return document, [verdict for _, verdict in found]


def stamp(when: float) -> str:
    """As generated says it, of Unix seconds."""
    return datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="seconds")


def _soonest(workers: Sequence[Finding]) -> Soonest | None:
    left: list[Soonest] = [
        {"host": one["host"], "unit": one["unit"], "limit": limit, "hours": hours}
        for one in workers
        for limit, hours in (
            ("MemoryHigh", one["hours_to_memory_high"]),
            ("MemoryMax", one["hours_to_memory_max"]),
        )
        if one["leaking"] and hours is not None
    ]
    # Of two that are reached, the one that kills.
    return min(left, key=lambda one: (one["hours"], one["limit"] != "MemoryMax"), default=None)


@dataclass(frozen=True)
class Before:
    """What findings of an earlier time said: when, and of each worker (host, unit) whether it leaked and had a line."""

    generated: str
    leaked: Mapping[tuple[str, str], bool]
    named: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, document: Any) -> Before:
        """Of a findings.json. Raises KeyError or TypeError where it is none."""
        workers = {(str(one["host"]), str(one["unit"])): one for one in document["workers"]}
        return cls(
            str(document["generated"]),
            {name: bool(one["leaking"]) for name, one in workers.items()},
            frozenset(name for name, one in workers.items() if _named(one)),
        )


def _named(one: Finding) -> bool:
    return any(culprit["file"] for culprit in one["culprits"])


def changes(before: Before | None, workers: Sequence[Finding]) -> Changes:
    """What is new. Where there was nothing before, nothing is."""
    told: Changes = {"since": None, "leaking": [], "mended": [], "named": [], "gone": []}
    if before is None:
        return told
    told["since"] = before.generated
    for one in workers:
        name = one["host"], one["unit"]
        leaked = before.leaked.get(name, False)
        which: Name = {"host": one["host"], "unit": one["unit"]}
        if one["leaking"] and not leaked:
            told["leaking"].append(which)
        elif one["leaking"] and _named(one) and name not in before.named:
            told["named"].append(which)
        # Of what was seen for too short a time, nothing is said.
        elif leaked and not one["leaking"] and one["pattern"] != Pattern.INSUFFICIENT_DATA.value:
            told["mended"].append(which)
    seen = {(one["host"], one["unit"]) for one in workers}
    told["gone"] = [
        {"host": host, "unit": unit}
        for (host, unit), leaked in sorted(before.leaked.items())
        if leaked and (host, unit) not in seen
    ]
    return told


def _judged(
    read: Iterable[tuple[Host, HostData | None]],
) -> Iterator[tuple[Host, Sequence[Trace], Sequence[Incident], Sequence[Verdict]]]:
    """Each host with its records and what happened on it, and the verdicts on its workers.

    They are judged while the next hosts are read.
    """
    waiting: deque[tuple[Host, Sequence[Trace], Sequence[Incident], list[Callable[[], Verdict]]]] = deque()
    with _judging() as begin:
        for host, data in read:
            if data is None:
                waiting.append((host, [], [], []))
            else:
                noted: Host = {**host, "reason": _reason(host, data)}
                waiting.append((noted, data.traces, data.incidents, [begin(worker) for worker in workers_of(data)]))
            while len(waiting) > HOSTS_AHEAD:
                yield _settled(*waiting.popleft())
        while waiting:
            yield _settled(*waiting.popleft())


def _settled(
    host: Host, traces: Sequence[Trace], incidents: Sequence[Incident], verdicts: Iterable[Callable[[], Verdict]]
) -> tuple[Host, Sequence[Trace], Sequence[Incident], Sequence[Verdict]]:
    return host, traces, incidents, [verdict() for verdict in verdicts]


@contextmanager
def _judging() -> Iterator[Callable[[Worker], Callable[[], Verdict]]]:
    """Begins to judge a worker, and returns what waits for the verdict; in other processes from so many on."""
    processes = 0
    pool: ProcessPoolExecutor | None = None
    with ExitStack() as stack:

        def begin(worker: Worker) -> Callable[[], Verdict]:
            nonlocal processes, pool
            processes += len(worker.generations)
            if pool is None and processes >= WORTH_A_POOL:
                pool = stack.enter_context(ProcessPoolExecutor())
            if pool is None:
                verdict = judge(worker)
                return lambda: verdict
            return pool.submit(judge, worker).result

        yield begin


def _reason(host: Host, data: HostData) -> str:
    """What a reader should know of a host: why it was not collected, and what of its logs could not be read."""
    said = [host["reason"]] if host["reason"] else []
    if host["collected"] and not data.samples:
        said.append("no samples: is plimsoll-sampler.service running there?")
    return "; ".join([*said, *data.problems[:3]])


def _urgency(one: Finding) -> tuple[bool, float, float, str, str]:
    left = one["hours_to_memory_max"]
    return (
        not one["leaking"],
        float("inf") if left is None else left,
        -one["growth_kb_per_hour"],
        one["host"],
        one["unit"],
    )


def happened(one: Incident) -> str:
    """What happened to a worker, in a line that is fit to print."""
    begin = f"{datetime.fromtimestamp(one.time, timezone.utc):%Y-%m-%d %H:%M} UTC, {printable(one.source, 20)}: "
    end = f" ({one.times} times)" if one.times > 1 else ""
    message = " ".join(one.message.split()).removeprefix(f"{one.unit}: ")
    return begin + printable(message, INCIDENT_LENGTH - len(begin) - len(end)) + end


def _finding(verdict: Verdict, traces: Iterable[Trace], incidents: Iterable[Incident]) -> Finding:
    worker, limits, rate = verdict.worker, verdict.worker.limits, verdict.rate
    high, most = verdict.hours_to_high, verdict.hours_to_max
    records = list(traces)
    leaking = verdict.pattern.leaking
    # Who asked for a window is told what it showed, whatever the worker looks like since.
    told = leaking or any(one["kind"] == "growth" and one.get("id") for one in records)
    blamed = culprits(records) if told else []
    kind = leak_class(records) if told else Kind.UNKNOWN
    evidence = [*verdict.evidence, *(traced(records) if told else [])]
    if leaking and not any(one["file"] for one in blamed):
        windows = any(one["kind"] == "growth" for one in records)
        evidence.append(
            "no line holds what grew"
            if windows
            else "no tracing window has closed yet, so that no line is named; diagnose.yml opens one"
        )
    if leaking:
        newest = sorted(incidents, key=lambda one: (-one.time, one.source, one.message))
        evidence += map(happened, newest[:MOST_INCIDENTS])
    return {
        "host": worker.host,
        "unit": worker.unit,
        "leaking": leaking,
        "pattern": verdict.pattern.value,
        "confidence": _rounded(verdict.confidence, 4),
        "growth_kb_per_hour": round(rate.slope, 1) + 0.0,
        "growth_low": round(rate.low, 1) + 0.0,
        "growth_high": round(rate.high, 1) + 0.0,
        "growth_kb_per_1000_tasks": _rounded(verdict.kb_per_1000_tasks, 1),
        "growth_follows": verdict.follows,
        **_grown(verdict),
        "generations": len(worker.generations),
        "samples": worker.samples,
        "span_hours": round(worker.span_hours, 3),
        "last_sample": stamp(max(float(one.times[-1]) for one in worker.generations)),
        "level_kb": _rounded(limits.level_kb, 0),
        "memory_high_kb": limits.high_kb,
        "memory_max_kb": limits.max_kb,
        "hours_to_memory_high": _rounded(high.hours, 3) if high else None,
        "hours_to_memory_high_earliest": _rounded(high.earliest, 3) if high else None,
        "hours_to_memory_high_latest": _rounded(high.latest, 3) if high else None,
        "hours_to_memory_max": _rounded(most.hours, 3) if most else None,
        "hours_to_memory_max_earliest": _rounded(most.earliest, 3) if most else None,
        "hours_to_memory_max_latest": _rounded(most.latest, 3) if most else None,
        "leak_class": kind.value,
        "culprits": blamed,
        "holds": holds(records) if told else [],
        "evidence": evidence,
        "advice": advice(kind),
        "checks": of_kind(kind),
        "mends": [],
        "remedy": None,
    }


def _remedied(one: Finding, remedy: Remedy | None) -> None:
    """Note what was done. One that is contained, and is not near its limit in spite of that, does not meet it."""
    one["remedy"] = remedy
    level, high = one["level_kb"], one["memory_high_kb"]
    # A recycle gives time, and no more.
    lasts = remedy is not None and remedy["state"] == CONTAINED and remedy["act"] != "recycle"
    if lasts and (level is None or high is None or level < NEAR * high):
        one["hours_to_memory_high"] = one["hours_to_memory_max"] = None
        one["hours_to_memory_high_earliest"] = one["hours_to_memory_max_earliest"] = None
        one["hours_to_memory_high_latest"] = one["hours_to_memory_max_latest"] = None


class _Grown(TypedDict):
    grows_in: str | None
    begins_kb: float | None


def _grown(verdict: Verdict) -> _Grown:
    """In the processes of which role a leak grows, by what each gained in its life; and what one begins with."""
    none: _Grown = {"grows_in": None, "begins_kb": None}
    if not verdict.pattern.leaking:
        return none
    gained: dict[str, float] = {}
    begins: dict[str, list[float]] = {}
    for one in verdict.worker.generations:
        warm = one.sizes[int(len(one.sizes) * WARM_SHARE) :]
        gained[one.role] = gained.get(one.role, 0.0) + max(0.0, float(warm[-1] - warm[0]))
        begins.setdefault(one.role, []).append(float(warm[0]))
    role = max(gained, key=lambda name: gained[name], default="")
    if not role or gained[role] < MOST_OF_IT * sum(gained.values()):
        return none
    return {"grows_in": role, "begins_kb": round(median(begins[role]), 0)}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits) + 0.0
