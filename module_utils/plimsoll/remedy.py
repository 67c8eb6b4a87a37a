"""What is to be done about each worker that leaks: of the findings, the fleet's state, the log and a policy. Pure.

An act is data: what it writes, why, what it is to bring, what it may harm and how it is undone; `--check --diff` prints
that, and the roll does no more. docs/remediation.md has each act with when it helps and when it harms.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from math import ceil
from typing import Any, TypedDict, cast

from . import canaries
from .canaries import INSTANCES, SLOWER
from .diagnose import short as short_file
from .findings import NEAR, Finding, Findings
from .fleet import monthly
from .formats import printable
from .limits import CHILDREN_SHARE, MAIN, SMALLEST
from .lines import InputError
from .remedylog import CONTAINED, CORDON, REMEDIED, TRACE, Entry, Known
from .report import size, span

# Acts that change a worker, from the mildest on; and cordon, which a person asks for by name.
RECYCLE, CONTAIN, ALLOCATOR, REMOVE = "recycle", "contain", "allocator", "remove"
# Of MemoryHigh, what a worker may reach before its next restart by the clock: the guard acts at 90 %.
CLOCK_SHARE = 0.8
# Of the time that growth takes to there, by which a restart comes before it: the load may be higher than it was.
CLOCK_MARGIN = 0.8
# A worker that leaks is restarted by the clock once a week at least, however slow it is.
LONGEST_CLOCK_H = 7 * 24.0
# A proof takes as long as the leak would to be seen again, or its remedy to act, seconds; at least and at most:
SHORTEST_PROOF_S, LONGEST_PROOF_S = 120.0, 86400.0
# Growth that is seen: so many KiB, or this share of what a process begins with.
SEEN_KB, SEEN_SHARE = 16384.0, 0.25
# Children that must have left by themselves before it is said that they do.
LIVES_OF_PROOF = 3
# With these, systemd starts a worker again that RuntimeMaxSec has ended.
RESTARTS = ("always", "on-failure", "on-abnormal")
# After which a restart is not told any more to be that of a recycle whose run was interrupted, seconds.
RECOVERED_S = 900.0
KEPT = "it is cordoned, and kept for inspection; a restart ends that"
# Of what a host says of a worker, characters.
LONGEST_TEXT, MOST_WORKERS = 16384, 1000
# systemd that has RuntimeRandomizedExtraSec, and how much of it is at random, so that a fleet does not restart at once.
RANDOMIZED, RANDOM_SHARE = 250, 0.1


class State(TypedDict):
    """A worker's unit as its host has it. Times in Unix seconds, None for never; sizes in KiB, None for no limit.

    dropin is the text of 60-remedy.conf, empty for none, and changed when the drop-ins last were. args is what Celery
    is started with, the last of the same option counting. stale: systemd has not read what is on disk. jemalloc is the
    path of the library, empty for none, systemd a version.
    """

    unit: str
    active: bool
    since: float | None
    dropin: str
    changed: float | None
    stale: bool
    args: str
    restart: str
    runtime_max_s: float | None
    memory_high_kb: int | None
    jemalloc: str
    systemd: int


@dataclass(frozen=True)
class Policy:
    """What a run may do; the variables of roles/remediation, which has their meaning."""

    max_age_h: float = 24.0
    acts: tuple[str, ...] = (RECYCLE, CONTAIN, ALLOCATOR, TRACE)
    recycle_within_h: float = 12.0
    least_tasks_per_child: int = 100
    least_uptime_h: float = 1.0
    share_percent: int = 25
    hosts_at_a_time: int = 10
    cordon: tuple[str, ...] = ()
    window_s: int = 60


class Act(TypedDict):
    """One act on one worker. settings are the lines of its drop-in, since is when the worker had begun by its state.

    prove_s: how long after it, in seconds, a proof may be tried.
    """

    id: str
    host: str
    unit: str
    act: str
    settings: list[str]
    dropin: str
    queues: list[str]
    since: float | None
    reason: str
    effect: str
    risk: str
    undo: str
    prove_s: float


class Told(TypedDict):
    """A worker that is left as it is, and why, or what a person is to do; unit is empty for a host as a whole."""

    host: str
    unit: str
    why: str


class Plan(TypedDict):
    """waves: hosts that may be at work at the same time, one worker of each. say is for people.

    traces come before the acts, which end what is to be traced, on all their hosts at the same time.
    """

    generated: str
    traces: list[Act]
    acts: list[Act]
    waves: list[list[str]]
    told: list[Told]
    say: list[str]


# ---- the choice ----


@dataclass(frozen=True)
class _Worker:
    """A finding with all that its act is chosen by."""

    found: Finding
    state: State
    declared: Mapping[str, Any]
    known: Known
    policy: Policy
    sold: Callable[[str, float], str]

    @property
    def pool(self) -> str:
        return str(self.declared.get("pool") or "prefork")

    @property
    def concurrency(self) -> int:
        return max(1, int(self.declared.get("concurrency") or 2))

    @property
    def queues(self) -> list[str]:
        return [str(one) for one in self.declared.get("queues", ["celery"])]

    @property
    def high_kb(self) -> float | None:
        """What memory is to stay below."""
        return self.state["memory_high_kb"] or self.found["memory_high_kb"] or self.found["memory_max_kb"]

    @property
    def child_kb(self) -> int | None:
        """At which children leave, by the options that it has been started with; None for never."""
        return self._option("--max-memory-per-child")

    @property
    def child_tasks(self) -> int | None:
        """After which children leave; None for never."""
        return self._option("--max-tasks-per-child")

    def _option(self, name: str) -> int | None:
        last = None
        for word in self.state["args"].split():
            option, _, value = word.partition("=")
            if option == name and value.isascii() and value.isdigit():
                last = int(value) or None
        return last

    @property
    def child_budget_kb(self) -> float:
        """What each child may have so that all of them are below MemoryHigh: the formula of limits.py."""
        return ((self.high_kb or 0.0) * CHILDREN_SHARE - MAIN * 1024) / self.concurrency

    def may(self, act: str) -> bool:
        return act in self.policy.acts and act not in self.known.useless


def plan(
    document: Findings,
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    states: Mapping[str, Mapping[str, Any]],
    had: Mapping[tuple[str, str], Known],
    policy: Policy,
    *,
    now: float,
    worse: Sequence[tuple[str, str]] = (),
    traced: Mapping[tuple[str, str], float] | None = None,
    sold: Callable[[str, float], str] = lambda host, more_kb: "",
) -> Plan:
    """What is to be done.

    declared: of each host of the run, in the order of the inventory, its celery_worker_instances, None where it has
    none of its own. states: of each host {"workers": [State]}, or {"msg": why there are none}. had is what the log
    knows of workers, and traced when each was last traced; worse are those whose act proved so, and is taken back. sold
    says which Linode type would give a host so many KiB more, as larger() does, or nothing.

    Raises InputError where the findings are older than policy.max_age_h, or newer than now.
    """
    made_at = datetime.fromisoformat(document["generated"]).timestamp()
    if now - made_at > policy.max_age_h * 3600:
        raise InputError(
            f"the findings are {span((now - made_at) / 3600)} old, and the workers that they name may be others by now;"
            f" run playbooks/collect.yml first (remediation_max_age_h allows {policy.max_age_h:g} h)"
        )
    if made_at - now > 300:
        raise InputError("the findings are of a time to come: the clock of this computer, or of the one that made them")
    acts, told = list[Act](), list[Told]()
    back = removal(declared, states, had, policy, only=set(worse), why="it has become worse with it")
    going = {(act["host"], act["unit"]) for act in back["acts"]}
    silent = {one["host"]: one["reason"] for one in document["hosts"] if not one["collected"]}
    cordoned = set(policy.cordon)
    # Told whatever the findings say of them by now: a worker that takes no task grows no more.
    kept = {name for name, one in had.items() if _kept(one, states.get(name[0], {}), name[1])}
    told += [{"host": host, "unit": unit, "why": KEPT} for host, unit in sorted(kept - going)]
    for one in document["workers"]:
        host, unit = one["host"], one["unit"]
        mine = had.get((host, unit), Known())
        if (host, unit) in going | kept:
            continue
        named = f"{host}:{short(unit)}" in cordoned
        tight = _tight(one, sold)
        if not (one["leaking"] or named or tight):
            continue
        found = _place(one, declared, states, silent)
        if isinstance(found, str):
            told.append({"host": host, "unit": unit, "why": found})
            continue
        state, instance = found
        worker = _Worker(one, state, instance, mine, policy, sold)
        chosen = _cordon(worker) if named else _choose(worker, now) if one["leaking"] else tight
        if isinstance(chosen, str):
            told.append({"host": host, "unit": unit, "why": chosen})
        else:
            acts.append(chosen)
    missing = sorted(cordoned - {f"{one['host']}:{short(one['unit'])}" for one in document["workers"]})
    told += [
        {"host": one, "unit": "", "why": "remediation_cordon names it, and the findings do not"} for one in missing
    ]
    told += [
        {"host": host, "unit": "", "why": f"it was not collected, so nothing is done there: {reason}"}
        for host, reason in silent.items()
        if host in declared
    ]
    traces = _traces(document, declared, states, policy, traced or {}, now) if TRACE in policy.acts else []
    every = [*back["acts"], *acts], [*back["told"], *told]
    return _made(document["generated"], *every, declared, states, policy, kept, traces)


def _traces(
    document: Findings,
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    states: Mapping[str, Mapping[str, Any]],
    policy: Policy,
    traced: Mapping[tuple[str, str], float],
    now: float,
) -> list[Act]:
    """A tracing window in one canary of each queue where what leaks is not known; not twice by the same findings."""
    made_at = datetime.fromisoformat(document["generated"]).timestamp()
    chosen = canaries.plan(
        document, declared, window_s=policy.window_s, max_age_h=policy.max_age_h, again=False, now=now
    )["chosen"]
    found = list[Act]()
    for canary in chosen:
        host, unit = canary["host"], canary["unit"]
        state = _state(states.get(host, {}), unit)
        if state is None or not state["active"] or traced.get((host, unit), 0.0) > made_at:
            continue
        found.append(
            {
                "id": _id(host, unit, TRACE, document["generated"]),
                "host": host,
                "unit": unit,
                "act": TRACE,
                "settings": [],
                "dropin": "",
                "queues": _queues(unit, declared[host]),
                "since": state["since"],
                "reason": canary["why"],
                "effect": "once it is collected again, the findings have the line, or the kind of the leak",
                "risk": f"for {policy.window_s} s, code that allocates much takes {SLOWER} in one of its processes",
                "undo": "none is needed, the window ends by itself",
                "prove_s": 0.0,
            }
        )
    return found


def removal(
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    states: Mapping[str, Mapping[str, Any]],
    had: Mapping[tuple[str, str], Known],
    policy: Policy,
    *,
    only: Collection[tuple[str, str]] | None = None,
    why: str = "remediation_state is absent",
) -> Plan:
    """Takes away what remediation has left on the hosts: all of it, or of these workers only. As for plan()."""
    acts, told = list[Act](), list[Told]()
    for host in declared:
        there = states.get(host, {})
        if "workers" not in there and only is None:
            why_not = printable(there.get("msg") or "it does not say why", 300)
            told.append({"host": host, "unit": "", "why": f"its state is not known: {why_not}"})
        for state in there.get("workers") or ():
            unit = state["unit"]
            # Begun by a run that was interrupted: it may be taken away, and still in force. The host knows.
            begun = had.get((host, unit), Known()).planned
            half = begun is not None and begun["act"] == REMOVE
            if not (state["dropin"] or half) or (only is not None and (host, unit) not in only):
                continue
            acts.append(
                {
                    "id": _id(host, unit, REMOVE, state["dropin"], str(state["since"])),
                    "host": host,
                    "unit": unit,
                    "act": REMOVE,
                    "settings": [],
                    "dropin": "",
                    "queues": _queues(unit, declared[host]),
                    "since": state["since"],
                    "reason": why,
                    "effect": "the worker is as deploy.yml left it",
                    "risk": "a warm shutdown: the worker takes no task until it is back, and leaks as it did before",
                    "undo": "remediate.yml, which judges it anew",
                    "prove_s": 0.0,
                }
            )
    return _made("", acts, told, declared, states, policy)


def _queues(unit: str, instances: Sequence[Mapping[str, Any]] | None) -> list[str]:
    named = (
        one for one in (INSTANCES if instances is None else instances) if unit == f"celery-worker@{one['name']}.service"
    )
    return [str(queue) for one in named for queue in one.get("queues", ["celery"])]


def _made(
    generated: str,
    acts: list[Act],
    told: list[Told],
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    states: Mapping[str, Mapping[str, Any]],
    policy: Policy,
    cordoned: Collection[tuple[str, str]] = (),
    traces: Sequence[Act] = (),
) -> Plan:
    order = list(declared)
    acts = sorted(acts, key=lambda act: order.index(act["host"]))
    consumers, gone = _consumers(declared, states, cordoned)
    for act in acts:
        if act["act"] == CORDON:
            for queue in act["queues"]:
                gone[queue] = gone.get(queue, 0) + 1
            left = [queue for queue in act["queues"] if gone[queue] >= consumers.get(queue, 0)]
            if left:
                act["risk"] = f"no consumer is left of {printable(', '.join(left), 200)}"
    in_waves = waves(acts, declared, states, policy, cordoned)
    made: Plan = {
        "generated": generated,
        "traces": list(traces),
        "acts": acts,
        "waves": in_waves,
        "told": told,
        "say": [],
    }
    made["say"] = list(_say(made, policy))
    return made


def taken_back(
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None], worse: Collection[tuple[str, str]], policy: Policy
) -> Plan:
    """Takes the drop-ins of these workers away, whose act was done by this very run."""
    there = {host: {"workers": [_dropped(unit) for at, unit in sorted(worse) if at == host]} for host in declared}
    return removal(declared, there, {}, policy, only=worse, why="it has become worse with it")


def _dropped(unit: str) -> State:
    return {
        "unit": unit,
        "active": True,
        "since": None,
        "dropin": "there",
        "changed": None,
        "stale": False,
        "args": "",
        "restart": "always",
        "runtime_max_s": None,
        "memory_high_kb": None,
        "jemalloc": "",
        "systemd": 0,
    }


def planned(acts: Sequence[Act], now: float) -> list[Entry]:
    """Lines for the log, before anything is done."""
    return [{**_entry(act), "time": now, "event": "planned"} for act in acts]


def _entry(act: Mapping[str, Any]) -> Entry:
    kept = ("id", "host", "unit", "act", "settings", "reason", "prove_s")
    return cast(Entry, {name: act[name] for name in kept})


def outcomes(acts: Sequence[Act], came: Mapping[str, Any], now: float) -> tuple[list[Entry], list[str]]:
    """Lines for the log of what came of the acts on a host, and for people. came: what worker_remedy returned there."""
    found = came.get("outcomes")
    # In the order of the acts. Their ids may come hidden, as Ansible does with all that is in the environment too.
    begun = found if isinstance(found, list) else []
    entries, said = list[Entry](), list[str]()
    for at, act in enumerate(acts):
        name = f"{act['host']} {short(act['unit'])}: {act['act']}"
        one = begun[at] if at < len(begun) and isinstance(begun[at], Mapping) else None
        if one is None:
            why = printable(" ".join(str(came.get("msg") or "its host did not say").split()), 400)
            said.append(f"{name}: not begun: {why}")
            continue
        why = printable(" ".join(str(one.get("why") or "").split()), 1000)
        done = one.get("done") is True
        if not done and one.get("changed") is not True:
            # Nothing was tried that could be of no use.
            said.append(f"{name}: not begun: {why}")
            continue
        event = "failed" if not done else "removed" if act["act"] == REMOVE else "done"
        # A host's clock may be anything.
        ended, away = one.get("ended"), one.get("away_s")
        when = float(ended) if isinstance(ended, (int, float)) and now - 86400 < ended <= now + 60 else now
        away_s = float(away) if isinstance(away, (int, float)) and 0 <= away < 86400 else 0.0
        entries.append({**_entry(act), "time": when, "event": event, "why": why, "away_s": away_s})
        took = f" in {away_s:.0f} s" if done and away_s else ""
        said.append(f"{name}: {event}{took}{': ' + why if why else ''}")
    return entries, said


def windows(traces: Sequence[Act], came: Mapping[str, Any], now: float) -> tuple[list[Entry], list[str]]:
    """Lines for the log of what came of the traces, and for people. came: by host what trace_window returned there."""
    entries, said = list[Entry](), list[str]()
    for act in traces:
        there = came.get(act["host"])
        there = there if isinstance(there, Mapping) else {}
        listed = there.get("windows")
        of_it = (one for one in listed if isinstance(one, Mapping)) if isinstance(listed, list) else iter(())
        window = next((one for one in of_it if one.get("unit") == act["unit"]), {})
        growth = window.get("growth")
        done = isinstance(growth, Mapping)
        if isinstance(growth, Mapping):
            gained = growth.get("rss_growth_kb")
            sound = isinstance(gained, (int, float)) and abs(gained) < 1e15
            why = f"in the window its RSS gained {size(gained or 0.0)}" if sound else "it was traced"
        else:
            told = window.get("reason") or there.get("msg") or "its host did not say"
            why = printable(" ".join(str(told).split()), 400)
        entries.append({**_entry(act), "time": now, "event": "done" if done else "failed", "why": why})
        said.append(f"{act['host']} {short(act['unit'])}: trace: {'done' if done else 'failed'}: {why}")
    return entries, said


def policy_of(given: Mapping[str, Any]) -> Policy:
    """Of the variables of roles/remediation. Raises InputError for what is none."""
    try:
        return Policy(
            max_age_h=float(given["max_age_h"]),
            acts=tuple(given["acts"]),
            recycle_within_h=float(given["recycle_within_h"]),
            least_tasks_per_child=int(given["least_tasks_per_child"]),
            least_uptime_h=float(given["least_uptime_h"]),
            share_percent=int(given["share_percent"]),
            hosts_at_a_time=int(given["hosts_at_a_time"]),
            cordon=tuple(given["cordon"]),
            window_s=int(given["window_s"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"standard input: the policy is not whole: {error!r}") from None


def recovered(had: Mapping[tuple[str, str], Known], states: Mapping[str, Mapping[str, Any]], now: float) -> list[Entry]:
    """Lines for what the hosts have and the log does not.

    Acts that are in force, though the run that had begun them was interrupted before it could say so; and drop-ins that
    somebody has taken away.
    """
    found: list[Entry] = []
    for (host, unit), one in had.items():
        state = _state(states.get(host, {}), unit)
        if state is None:
            continue
        since, lines = min(state["since"] or 0.0, now), set(state["dropin"].splitlines())
        in_force = state["active"] and not state["stale"] and since > (state["changed"] or 0.0)
        begun, last = one.planned, one.act
        if begun is not None and in_force and since > begun["time"]:
            there = set(begun.get("settings", [])) <= lines
            soon = since <= begun["time"] + RECOVERED_S
            if begun["act"] == REMOVE and not state["dropin"]:
                found.append({**begun, "time": since, "event": "removed", "why": "its run was interrupted"})
                continue
            # A worker is restarted for many reasons, and by what it is told that it was this one is the time alone.
            if there and (soon if begun["act"] == RECYCLE else begun["act"] in (CONTAIN, ALLOCATOR)):
                found.append({**begun, "time": since, "event": "done", "why": "its run was interrupted"})
                continue
        # What a run had begun to take away is still in force, until the worker has begun anew.
        if begun is not None and begun["act"] == REMOVE:
            continue
        if last is not None and not set(last.get("settings", [])) <= lines:
            found.append({**last, "act": REMOVE, "time": now, "event": "removed", "why": "its drop-in is gone"})
    return found


def _state(there: Mapping[str, Any], unit: str) -> State | None:
    return next((one for one in there.get("workers") or () if one["unit"] == unit), None)


def _kept(one: Known, there: Mapping[str, Any], unit: str) -> bool:
    """Whether a worker is cordoned, and was not restarted since."""
    state = _state(there, unit)
    since = state["since"] if state else None
    return one.act is not None and one.act["act"] == CORDON and since is not None and since <= one.act["time"]


def sound_states(came: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What hosts say of their workers, as far as it is of the right shape: a host may say anything."""
    found: dict[str, dict[str, Any]] = {}
    for host, said in came.items():
        workers = said.get("workers") if isinstance(said, Mapping) else None
        if isinstance(workers, list) and len(workers) <= MOST_WORKERS and all(map(_sound_state, workers)):
            found[host] = {"workers": list(workers)}
        else:
            msg = said.get("msg") if isinstance(said, Mapping) else None
            found[host] = {"msg": " ".join(str(msg or "what it said of its workers is not readable").split())}
    return found


def _sound_state(one: Any) -> bool:
    numbers = ("since", "changed", "memory_high_kb", "runtime_max_s", "systemd")
    return (
        isinstance(one, Mapping)
        and all(isinstance(one.get(name), str) for name in ("unit", "dropin", "args", "jemalloc", "restart"))
        and all(len(one[name]) <= LONGEST_TEXT for name in ("dropin", "args", "jemalloc", "restart"))
        and all(one.get(name) is None or _number(one[name]) for name in numbers)
        and one.get("systemd") is not None
        and isinstance(one.get("active"), bool)
        and isinstance(one.get("stale"), bool)
        and re.fullmatch(r"celery-worker@[A-Za-z0-9_-]{1,40}\.service", one["unit"]) is not None
        # It becomes a line of a drop-in.
        and re.fullmatch(r"(/[\w.+-]+)*", one["jemalloc"]) is not None
    )


def _number(one: Any) -> bool:
    # Of what is none, no comparison is true.
    return isinstance(one, (int, float)) and not isinstance(one, bool) and 0 <= one < 1e15


def _place(
    one: Finding,
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    states: Mapping[str, Mapping[str, Any]],
    silent: Mapping[str, str],
) -> tuple[State, Mapping[str, Any]] | str:
    """The state of a worker and how it was declared; or why it is left alone."""
    host, unit = one["host"], one["unit"]
    if host not in declared:
        return "its host is not in this run: left out by --limit, or no longer in the inventory"
    if host in silent:
        return f"its host was not collected: {silent[host]}"
    instances = INSTANCES if declared[host] is None else declared[host]
    instance = next((each for each in instances or () if unit == f"celery-worker@{each['name']}.service"), None)
    if instance is None:
        return "celery_worker_instances of its host does not declare it, so that its pool and queues are not known"
    there = states.get(host, {})
    state = _state(there, unit)
    if state is None:
        return f"its state is not known: {printable(there.get('msg') or 'the host has no such unit', 300)}"
    if not state["active"]:
        return "it does not run, so that nothing is to be gained; see systemctl status, and why"
    return state, instance


def _choose(worker: _Worker, now: float) -> Act | str:
    """The act for a worker that leaks, or why there is none."""
    one, mine = worker.found, worker.known
    last = datetime.fromisoformat(one["last_sample"]).timestamp()
    if mine.open and mine.act is not None:
        left = mine.act["time"] + mine.act["prove_s"] - now
        when = f"in {span(left / 3600)}" if left > 0 else "with the next logs that tell"
        return f"{mine.act['act']} was done {span((now - mine.act['time']) / 3600)} ago; it is proven {when}"
    if now - last > worker.policy.max_age_h * 3600:
        return f"its last sample is {span((now - last) / 3600)} old: is plimsoll-sampler.service running there?"
    # What was seen, is of the process before.
    if worker.state["since"] and worker.state["since"] > last:
        return "it was restarted after these findings; run playbooks/collect.yml first"
    if mine.act is not None and mine.act["act"] != RECYCLE:
        proven = (mine.stands or mine.act).get("verdict")
        near = one["level_kb"] is not None and worker.high_kb and one["level_kb"] >= NEAR * worker.high_kb
        if proven == CONTAINED and not near:
            what = f"contained by {mine.act['act']}, as is proven"
            return f"{what}; what leaks is for whoever owns the code: {_blame(one)}"
        if proven in (CONTAINED, REMEDIED):
            return f"{mine.act['act']} was proven to help, and does not any more; a person must look: {_blame(one)}"
    if one["leak_class"] == "cache_filling":
        return "a cache that fills up to its bound: raise MemoryHigh above that, or lower its maxsize"
    if one["leak_class"] == "fragmentation" and worker.may(ALLOCATOR) and (act := _allocator(worker)):
        return act
    contained = _contain(worker)
    if not isinstance(contained, str) and worker.may(CONTAIN):
        return contained
    why_not = contained if isinstance(contained, str) else _may_not(worker, CONTAIN)
    soon = one["hours_to_memory_high"]
    if soon is not None and soon <= worker.policy.recycle_within_h and worker.may(RECYCLE):
        return _act(
            worker,
            RECYCLE,
            [],
            f"MemoryHigh in {span(soon)}, and {why_not}",
            f"memory is back where it was at the start; it grows again by {size(one['growth_kb_per_hour'])}/h",
            "a warm shutdown: the worker takes no task until it is back",
            "none is needed",
        )
    return why_not


def _may_not(worker: _Worker, act: str) -> str:
    if act in worker.known.useless:
        last = worker.known.stands
        of = f" ({last.get('verdict') or last['event']}, {_day(last['time'])})" if last is not None else ""
        return f"{act} was of no use to it before{of}; a person must look: {_blame(worker.found)}"
    return f"remediation_acts does not allow {act}"


def _contain(worker: _Worker) -> Act | str:
    """New processes before MemoryHigh is met: each child after so much memory or so many tasks, or all by the clock."""
    one, high = worker.found, worker.high_kb
    if high is None:
        return "it has neither MemoryHigh nor MemoryMax, so there is nothing to stay below; deploy.yml sets them"
    if worker.pool != "prefork" or one["grows_in"] == "main":
        return _by_clock(worker, high)
    budget = worker.child_budget_kb
    begins = one["begins_kb"] or float(SMALLEST * 1024)
    descriptors = one["leak_class"] == "file_descriptors"
    if worker.child_kb is not None and worker.child_kb <= budget * 1.01 and not descriptors:
        return _already(one, f"children leave at {size(worker.child_kb)}, before MemoryHigh")
    room = budget - begins
    if room <= 0:
        return _too_small(worker, begins)
    per_task = (one["growth_kb_per_1000_tasks"] or 0.0) / 1000
    tasks = int(room / per_task) if per_task > 0 else None
    if tasks is not None and worker.child_tasks is not None and worker.child_tasks <= tasks:
        return _already(one, f"children leave after {worker.child_tasks:,} tasks, before MemoryHigh")
    least = worker.policy.least_tasks_per_child
    if tasks is not None and tasks < least:
        return (
            f"a child would be worth {tasks} tasks, and remediation_least_tasks_per_child asks for {least}: it leaks"
            f" {size(per_task)} a task, which is for a person: {_blame(one)}"
        )
    how_many = f"about {tasks:,} tasks each" if tasks is not None else "as many tasks as that takes"
    if descriptors and tasks is not None:
        option, at = f"--max-tasks-per-child={tasks}", f"after {tasks:,} tasks"
    else:
        option, at = f"--max-memory-per-child={int(budget)}", f"at {size(budget)}"
    return _act(
        worker,
        CONTAIN,
        [f'Environment="CELERY_REMEDY_ARGS={option}"'],
        f"{_growth(one)}, and nothing ends its children before MemoryHigh ({size(high)})",
        f"a child leaves {at}, between two tasks, after {how_many}; they begin at {size(begins)}",
        "a fork more for each child that leaves; a task with a peak above that ends its child too",
        # All children grow at the same time.
        shows_s=_hours(room * worker.concurrency, one) * ceil(LIVES_OF_PROOF / worker.concurrency) * 3600,
    )


def _already(one: Finding, how: str) -> str:
    return f"contained already: {how}; what leaks is for whoever owns the code: {_blame(one)}"


def _by_clock(worker: _Worker, high: float) -> Act | str:
    """Restarts by RuntimeMaxSec, for what no child can give back."""
    one, state = worker.found, worker.state
    begins = one["begins_kb"] or float(MAIN * 1024)
    if one["level_kb"] is not None and state["since"] is not None:
        # Of the worker as a whole: where it stands, less what it has gained since it began, at the least.
        age_s = datetime.fromisoformat(one["last_sample"]).timestamp() - state["since"]
        begins = max(begins, one["level_kb"] - max(0.0, one["growth_low"]) * max(0.0, age_s) / 3600)
    room = CLOCK_SHARE * high - begins
    if room <= 0:
        return _too_small(worker, begins)
    rate = max(one["growth_high"], one["growth_kb_per_hour"])
    hours = CLOCK_MARGIN * room / rate if rate > 0 else LONGEST_CLOCK_H
    if state["runtime_max_s"] is not None and state["runtime_max_s"] <= hours * 3600:
        return _already(one, f"it is restarted each {span(state['runtime_max_s'] / 3600)} by RuntimeMaxSec")
    if state["restart"] not in RESTARTS:
        return (
            f"Restart={state['restart']} (celery_worker_restart), with which a restart by the clock would be its end; a"
            f" person must look: {_blame(one)}"
        )
    if hours < worker.policy.least_uptime_h:
        return (
            f"it would have to be restarted each {span(hours)}, and remediation_least_uptime_h asks for"
            f" {worker.policy.least_uptime_h:g} h; a person must look: {_blame(one)}"
        )
    seconds = int(min(hours, LONGEST_CLOCK_H) * 3600)
    settings = [f"RuntimeMaxSec={seconds}s"]
    if worker.state["systemd"] >= RANDOMIZED:
        settings.append(f"RuntimeRandomizedExtraSec={int(seconds * RANDOM_SHARE)}s")
    where = "in its main process" if worker.pool == "prefork" else f"in the pool {worker.pool}, which has no children"
    return _act(
        worker,
        CONTAIN,
        settings,
        f"{_growth(one)} {where}",
        f"a warm shutdown and a new process each {span(seconds / 3600)}, before {size(CLOCK_SHARE * high)}",
        "the worker takes no task while it restarts; a task longer than TimeoutStopSec is handed back and begun anew",
        shows_s=seconds * (1 + RANDOM_SHARE),
    )


def _allocator(worker: _Worker) -> Act | None:
    """jemalloc, which gives pages back wherever they are; without it fewer heaps, where threads use several."""
    path = worker.state["jemalloc"]
    if path:
        settings = [
            f"Environment=LD_PRELOAD={path}",
            "Environment=MALLOC_CONF=background_thread:true,dirty_decay_ms:1000",
        ]
        effect = "jemalloc gives back what is free, wherever it lies, a second after its last use"
        risk = "an extension that hands memory from one allocator to another crashes; tracing windows do not see malloc"
    elif worker.pool == "threads":
        settings = ["Environment=MALLOC_ARENA_MAX=2"]
        effect = "two heaps for all threads, and so less that is free and held"
        risk = "threads wait for each other where they allocate much at once"
    else:
        return None
    return _act(worker, ALLOCATOR, settings, f"{_growth(worker.found)}: free memory that malloc keeps", effect, risk)


def _cordon(worker: _Worker) -> Act:
    return _act(
        worker,
        CORDON,
        [],
        "remediation_cordon names it",
        "it takes no new task and keeps running, with all that it holds, to be looked at",
        "its queues have one consumer less, or none",
        "a restart: systemctl restart " + worker.found["unit"],
    )


def _tight(one: Finding, sold: Callable[[str, float], str]) -> str:
    """Whether memory is simply too small for a worker that does not leak; the sentence, empty for no."""
    level, high = one["level_kb"], one["memory_high_kb"]
    if one["leaking"] or level is None or not high or level < NEAR * high:
        return ""
    needs = level / CHILDREN_SHARE
    return (
        f"it does not leak, and holds {size(level)} of its MemoryHigh of {size(high)}: it needs {size(needs)}. Give it"
        f" a higher memory_weight or fewer processes, or its host a larger Linode type{sold(one['host'], needs - high)}"
    )


def _too_small(worker: _Worker, begins: float) -> str:
    """That there is no room to be recycled in: each process is to have as much again as it begins with."""
    high = worker.high_kb or 0.0
    processes = worker.concurrency if worker.pool == "prefork" else 1
    needs = (2 * begins * processes + MAIN * 1024) / CHILDREN_SHARE
    return (
        f"it begins at {size(begins)}, which leaves no room below MemoryHigh ({size(high)}) to be recycled in: lower"
        f" its concurrency, or raise its limits to {size(needs)}, or its host to a larger Linode type"
        f"{worker.sold(worker.found['host'], needs - high)}"
    )


def larger(types: Mapping[str, Mapping[str, Any]], current: str, region: str, more_kb: float) -> str:
    """The cheapest Linode type with so many KiB more, in brackets, with what it costs; "" where none is known.

    types: objects of /linode/types by id. Of the same class as the current one, or after a Nanode of the next one.
    """
    now = types.get(current)
    if now is None:
        return ""
    kinds = {now.get("class"), "standard"} if now.get("class") == "nanode" else {now.get("class")}
    # memory is in MB, as Linode says, which are MiB.
    room = [
        one for one in types.values() if one.get("class") in kinds and one["memory"] >= now["memory"] + more_kb / 1024
    ]
    best = min(room, key=lambda one: (monthly(one, region), one["memory"]), default=None)
    if best is None:
        return f" (none of its class is larger than {current} by so much)"
    cost, before = monthly(best, region), monthly(now, region)
    return (
        f" ({best['id']} has {best['memory']} MB, for {cost:.2f} USD a month in {region} in the place of {before:.2f}"
        f" for {current}; linode_fleet_type, by provision.yml)"
    )


def _growth(one: Finding) -> str:
    of = f"{one['leak_class']}, " if one["leak_class"] != "unknown" else ""
    tasks = one["growth_kb_per_1000_tasks"]
    each = f", {size(tasks)} in 1,000 tasks" if tasks else ""
    return f"{of}{size(one['growth_kb_per_hour'])}/h{each}"


def _blame(one: Finding) -> str:
    for culprit in one["culprits"]:
        if culprit["file"]:
            return printable(f"{short_file(culprit['file'])}:{culprit['line']}", 200)
    return "its line is not known yet, a tracing window names it (playbooks/diagnose.yml)"


def _act(
    worker: _Worker,
    act: str,
    settings: Sequence[str],
    reason: str,
    effect: str,
    risk: str,
    undo: str = "",
    shows_s: float | None = None,
) -> Act:
    """shows_s: seconds until what it does can be seen; None for those in which the leak would be seen again."""
    one = worker.found
    if shows_s is None:
        shows_s = _hours(max(SEEN_KB, SEEN_SHARE * (one["begins_kb"] or 0.0)), one) * 3600
    # The same finding makes the same act, and so a run that was interrupted is told by it.
    name = _id(one["host"], one["unit"], act, *settings, str(worker.state["since"]))
    lines = [
        f"# Written by plimsoll's remediate.yml: {act} {name}",
        f"# {printable(reason, 300)}",
        "[Service]",
        *settings,
    ]
    return {
        "id": name,
        "host": one["host"],
        "unit": one["unit"],
        "act": act,
        "settings": list(settings),
        "dropin": "".join(f"{line}\n" for line in lines) if settings else "",
        "queues": worker.queues,
        "since": worker.state["since"],
        "reason": reason,
        "effect": effect,
        "risk": risk,
        "undo": undo or "remediate.yml -e remediation_state=absent takes the drop-in away",
        "prove_s": round(min(LONGEST_PROOF_S, max(SHORTEST_PROOF_S, shows_s))),
    }


def _hours(kib: float, one: Finding) -> float:
    """In which a leak grows by so much."""
    rate = one["growth_kb_per_hour"]
    return kib / rate if rate > 0 else LONGEST_PROOF_S


def _id(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# ---- the roll ----


def waves(
    acts: Sequence[Act],
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    states: Mapping[str, Mapping[str, Any]],
    policy: Policy,
    cordoned: Collection[tuple[str, str]] = (),
) -> list[list[str]]:
    """Hosts of acts, in their order, put together so that of each queue at most a share of its consumers is away.

    Those count as away that do not run, are on a host that does not answer, or are cordoned, in this plan too. On a
    host one worker is at work at a time. One consumer of a queue may always be away, or nothing could ever be done. The
    first wave is one host, as a trial.
    """
    consumers, gone = _consumers(declared, states, cordoned)
    share = {queue: number * policy.share_percent // 100 for queue, number in consumers.items()}
    mine: dict[str, list[Act]] = {}
    for act in acts:
        mine.setdefault(act["host"], []).append(act)
    made: list[list[str]] = []
    away: dict[str, int] = {}
    for host, here in mine.items():
        queues = {queue for act in here for queue in act["queues"]}
        full = any(away.get(queue, 0) >= max(1, share.get(queue, 0) - gone.get(queue, 0)) for queue in queues)
        if len(made) < 2 or full or len(made[-1]) >= policy.hosts_at_a_time:
            made.append([])
            away = {}
        made[-1].append(host)
        for queue in queues:
            away[queue] = away.get(queue, 0) + 1
        # For good.
        for queue in (queue for act in here if act["act"] == CORDON for queue in act["queues"]):
            gone[queue] = gone.get(queue, 0) + 1
    return made


def _consumers(
    declared: Mapping[str, Sequence[Mapping[str, Any]] | None],
    states: Mapping[str, Mapping[str, Any]],
    cordoned: Collection[tuple[str, str]],
) -> tuple[dict[str, int], dict[str, int]]:
    """Of each queue, how many consumers are declared, and how many of those take no task."""
    consumers: dict[str, int] = {}
    gone: dict[str, int] = {}
    for host, instances in declared.items():
        for one in INSTANCES if instances is None else instances:
            unit = f"celery-worker@{one['name']}.service"
            state = _state(states.get(host, {}), unit)
            works = state is not None and state["active"] and (host, unit) not in cordoned
            for queue in one.get("queues", ["celery"]):
                consumers[queue] = consumers.get(queue, 0) + 1
                gone[queue] = gone.get(queue, 0) + (not works)
    return consumers, gone


def _say(made: Plan, policy: Policy) -> Iterator[str]:
    for act in [*made["traces"], *made["acts"]]:
        yield f"{act['act'].upper()} {act['host']} {short(act['unit'])}: {act['reason']}"
        for line in act["settings"]:
            yield f"    {line}"
        yield f"    expected: {act['effect']}"
        yield f"    risk: {act['risk']}"
        yield f"    undo: {act['undo']}"
        if act["act"] not in (CORDON, REMOVE, TRACE):
            yield f"    proof: after {span(act['prove_s'] / 3600)} of logs"
    for one in made["told"]:
        yield f"leave {printable(one['host'])}{' ' + short(one['unit']) if one['unit'] else ''}: {one['why']}"
    if not made["acts"]:
        yield "Nothing is changed" + ("" if made["told"] or made["traces"] else ": no worker leaks by these findings")
        return
    hosts = ", then ".join(", ".join(map(printable, wave)) for wave in made["waves"][:8])
    more = f", and {len(made['waves']) - 8} more" if len(made["waves"]) > 8 else ""
    yield (
        f"Order: {hosts}{more}. Of a queue's consumers at most {policy.share_percent} %, or one, are away at a time;"
        " the next host begins when the last one takes tasks and its queues are no longer than before"
    )


def short(unit: str) -> str:
    """NAME of celery-worker@NAME.service."""
    return printable(unit.removeprefix("celery-worker@").removesuffix(".service"))


def _day(when: float) -> str:
    return datetime.fromtimestamp(when, timezone.utc).strftime("%Y-%m-%d")
