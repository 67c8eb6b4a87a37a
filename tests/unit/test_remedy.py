"""The plan of a remediation: which act for which worker, in which order, and what the log makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
from plimsoll import remedylog
from plimsoll.lines import InputError
from plimsoll.remedy import (
    Policy,
    larger,
    outcomes,
    plan,
    planned,
    policy_of,
    recovered,
    removal,
    sound_states,
    taken_back,
    waves,
    windows,
)
from plimsoll.remedylog import known

NOW = 1_763_942_400.0
STAMP = datetime.fromtimestamp(NOW, timezone.utc).isoformat()
MIB, GIB = 1 << 10, 1 << 20
POLICY = Policy()


CULPRIT = {
    **{"task": "shop.scan", "file": "/opt/celery/releases/1/app/shop.py", "line": 7, "function": "scan"},
    **{"task_share": 1.0, "growth_kb": 900.0, "share": 1.0, "windows": 1, "package": "application", "caller": None},
}


def unit(name: str) -> str:
    return f"celery-worker@{name}.service"


def leaks(host: str = "w-1", name: str = "gate", **more: Any) -> dict[str, Any]:
    """A prefork worker whose children grow by 10 KiB a task, from 50 MiB on, below a MemoryHigh of 1 GiB."""
    return {
        "host": host,
        "unit": unit(name),
        "leaking": True,
        "pattern": "growing",
        "growth_kb_per_hour": 30.0 * MIB,
        "growth_low": 25.0 * MIB,
        "growth_high": 40.0 * MIB,
        "growth_kb_per_1000_tasks": 10_000.0,
        "grows_in": "child",
        "begins_kb": 50.0 * MIB,
        "span_hours": 30.0,
        "last_sample": STAMP,
        "level_kb": 300.0 * MIB,
        "memory_high_kb": GIB,
        "memory_max_kb": 2 * GIB,
        "hours_to_memory_high": 24.0,
        "hours_to_memory_max": 60.0,
        "hours_to_memory_max_earliest": 50.0,
        "leak_class": "python_objects",
        "culprits": [CULPRIT],
        **more,
    }


def found(*workers: dict[str, Any], age_h: float = 0, down: Mapping[str, str] | None = None) -> Any:
    generated = datetime.fromtimestamp(NOW - 3600 * age_h, timezone.utc).isoformat(timespec="seconds")
    hosts = [{"host": host, "collected": False, "reason": why} for host, why in (down or {}).items()]
    return {"schema": 1, "generated": generated, "workers": list(workers), "hosts": hosts}


def state(name: str = "gate", **more: Any) -> dict[str, Any]:
    """Started ten hours ago, with children that are never replaced."""
    return {
        "unit": unit(name),
        "active": True,
        "since": NOW - 36_000,
        "dropin": "",
        "changed": NOW - 40_000,
        "stale": False,
        "restart": "always",
        "runtime_max_s": None,
        "args": "--queues=gate --pool=prefork --concurrency=2",
        "memory_high_kb": GIB,
        "jemalloc": "",
        "systemd": 252,
        **more,
    }


def declares(**pools: str) -> list[dict[str, Any]]:
    return [{"name": name, "queues": [name], "pool": pool, "concurrency": 2} for name, pool in pools.items()]


def chosen(
    *workers: dict[str, Any],
    declared: Any = None,
    states: Any = None,
    log: Any = (),
    policy: Policy = POLICY,
    **more: Any,
) -> tuple[list[Any], dict[tuple[str, str], str]]:
    """The acts, and why the others are left."""
    declared = declared if declared is not None else {"w-1": declares(gate="prefork")}
    states = states if states is not None else {"w-1": {"workers": [state()]}}
    made = plan(found(*workers, **more), declared, states, known(log), policy, now=NOW)
    return made["acts"], {(one["host"], one["unit"]): one["why"] for one in made["told"]}


def why(*workers: dict[str, Any], **more: Any) -> str:
    """Why the one worker is left."""
    acts, told = chosen(*workers, **more)
    assert acts == []
    (said,) = told.values()
    return said


# ---- which act ----


def test_children_that_nothing_ends_leave_before_memory_high() -> None:
    (act,), told = chosen(leaks())
    # (85 % of 1024 MiB - 64 MiB for the main process) / 2 children.
    assert act["settings"] == ['Environment="CELERY_REMEDY_ARGS=--max-memory-per-child=412876"'] and not told
    assert act["dropin"].splitlines()[2:] == ["[Service]", act["settings"][0]]
    assert (act["act"], act["unit"], act["queues"]) == ("contain", unit("gate"), ["gate"])
    # From 50 to 403 MiB at 10,000 KiB in 1,000 tasks.
    assert "about 36,167 tasks each" in act["effect"] and act["prove_s"] == 86_400
    # Three children of two that grow by 5 GiB an hour each take two times 353 MiB of it.
    (act,), _ = chosen(leaks(growth_kb_per_hour=10.0 * GIB, growth_high=11.0 * GIB))
    assert act["prove_s"] == round(2 * (412_876.8 - 50 * MIB) / (5 * GIB) * 3600)
    assert act["undo"] == "remediate.yml -e remediation_state=absent takes the drop-in away"


def test_descriptors_are_bounded_by_tasks_as_memory_does_not_tell_of_them() -> None:
    (act,), _ = chosen(leaks(leak_class="file_descriptors"))
    assert act["settings"] == ['Environment="CELERY_REMEDY_ARGS=--max-tasks-per-child=36167"']


@pytest.mark.parametrize(
    "args", ["--max-memory-per-child=412000", "--max-memory-per-child=900000 --max-memory-per-child=9"]
)
def test_what_is_contained_as_it_was_deployed_is_left(args: str) -> None:
    assert "contained already: children leave at" in why(leaks(), states={"w-1": {"workers": [state(args=args)]}})


@pytest.mark.parametrize("args", ["--max-memory-per-child=900000", "--max-memory-per-child=0"])
def test_children_that_leave_too_late_or_never_are_contained(args: str) -> None:
    (act,), _ = chosen(leaks(), states={"w-1": {"workers": [state(args=args)]}})
    assert act["act"] == "contain"


def test_a_child_that_would_not_be_worth_its_fork_is_for_a_person() -> None:
    culprit = {**CULPRIT, "file": "shop/tasks.py", "line": 9}
    said = why(leaks(growth_kb_per_1000_tasks=10_000_000.0, culprits=[culprit]))
    assert "a child would be worth 36 tasks" in said and "9.77 MiB a task" in said and said.endswith("shop/tasks.py:9")
    (act,), _ = chosen(leaks(growth_kb_per_1000_tasks=10_000_000.0), policy=replace(POLICY, least_tasks_per_child=36))
    assert "about 36 tasks each" in act["effect"]


def test_a_child_that_begins_above_what_it_may_have_needs_more_memory() -> None:
    assert "leaves no room below MemoryHigh" in why(leaks(begins_kb=500.0 * MIB))


@pytest.mark.parametrize(("pool", "grows_in"), [("threads", "main"), ("gevent", None), ("prefork", "main")])
def test_what_no_child_can_give_back_is_restarted_by_the_clock(pool: str, grows_in: str | None) -> None:
    (act,), _ = chosen(leaks(grows_in=grows_in), declared={"w-1": declares(gate=pool)})
    # 80 % of the time from 50 MiB to 80 % of 1 GiB at the upper end of the growth, 40 MiB/h.
    assert act["settings"] == ["RuntimeMaxSec=55382s", "RuntimeRandomizedExtraSec=5538s"]
    (act,), _ = chosen(
        leaks(), declared={"w-1": declares(gate="solo")}, states={"w-1": {"workers": [state(systemd=249)]}}
    )
    assert len(act["settings"]) == 1


def test_by_the_clock_it_is_the_worker_as_a_whole_that_is_to_stay_below() -> None:
    # Ten hours at 5 MiB/h or more ago it held 250 MiB at most, with 50 of them in the process that grows.
    slow = leaks(grows_in="main", level_kb=300.0 * MIB, growth_low=5.0 * MIB, growth_high=40.0 * MIB)
    (act,), _ = chosen(slow)
    assert act["settings"][0] == f"RuntimeMaxSec={int(0.8 * (0.8 * 1024 - 250) / 40 * 3600)}s"
    full = leaks(grows_in="main", level_kb=900.0 * MIB, growth_low=5.0 * MIB)
    assert "it begins at 850 MiB, which leaves no room" in why(full)


def test_what_is_stricter_already_is_left() -> None:
    by_clock = {"declared": {"w-1": declares(gate="threads")}}
    said = why(leaks(), states={"w-1": {"workers": [state(runtime_max_s=43_200.0)]}}, **by_clock)
    assert "contained already: it is restarted each 12.0 h by RuntimeMaxSec" in said
    assert chosen(leaks(), states={"w-1": {"workers": [state(runtime_max_s=9e5)]}}, **by_clock)[0]
    said = why(leaks(), states={"w-1": {"workers": [state(args="--max-tasks-per-child=500")]}})
    assert "contained already: children leave after 500 tasks" in said
    # Memory tells nothing of descriptors.
    by_memory = {"w-1": {"workers": [state(args="--max-memory-per-child=9000")]}}
    assert chosen(leaks(leak_class="file_descriptors"), states=by_memory)[0]


def test_a_worker_that_systemd_does_not_start_again_is_not_ended_by_the_clock() -> None:
    states = {"w-1": {"workers": [state(restart="no")]}}
    assert "Restart=no (celery_worker_restart)" in why(leaks(), declared={"w-1": declares(gate="solo")}, states=states)


def test_a_worker_that_is_not_seen_any_more_is_left_however_new_the_findings_are() -> None:
    old = datetime.fromtimestamp(NOW - 3 * 86_400, timezone.utc).isoformat()
    assert "its last sample is 3.0 days old: is plimsoll-sampler" in why(leaks(last_sample=old))


def test_a_worker_that_fills_within_the_hour_is_not_restarted_for_ever() -> None:
    fast = leaks(growth_high=900.0 * MIB, hours_to_memory_high=13.0)
    assert "it would have to be restarted each 41 min" in why(fast, declared={"w-1": declares(gate="threads")})
    # But now, where it would not live through the night.
    fast = leaks(growth_high=900.0 * MIB, hours_to_memory_high=2.0)
    (act,), _ = chosen(fast, declared={"w-1": declares(gate="threads")})
    assert (act["act"], act["settings"], act["dropin"]) == ("recycle", [], "")
    assert act["reason"].startswith("MemoryHigh in 2.0 h, and it would have to be restarted")
    assert chosen(fast, declared={"w-1": declares(gate="threads")}, policy=replace(POLICY, acts=("contain",)))[0] == []


def test_fragmentation_is_jemallocs_where_it_is_there_and_of_threads_the_arenas() -> None:
    path = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
    torn = leaks(leak_class="fragmentation")
    (act,), _ = chosen(torn, states={"w-1": {"workers": [state(jemalloc=path)]}})
    assert act["settings"] == [
        f"Environment=LD_PRELOAD={path}",
        "Environment=MALLOC_CONF=background_thread:true,dirty_decay_ms:1000",
    ]
    (act,), _ = chosen(torn, declared={"w-1": declares(gate="threads")})
    assert (act["act"], act["settings"]) == ("allocator", ["Environment=MALLOC_ARENA_MAX=2"])
    # glibc's arenas are nothing to a process with one thread.
    assert chosen(torn)[0][0]["act"] == "contain"


def test_a_cache_that_fills_is_for_a_person() -> None:
    assert "raise MemoryHigh above that, or lower its maxsize" in why(leaks(leak_class="cache_filling"))


def test_a_worker_that_does_not_leak_and_has_too_little_is_told_what_it_needs() -> None:
    full = leaks(leaking=False, pattern="plateau", level_kb=950.0 * MIB)
    assert "it does not leak, and holds 950 MiB of its MemoryHigh of 1 GiB" in why(full)
    assert chosen(leaks(leaking=False, pattern="plateau")) == ([], {})


KINDS = {
    name: {"id": name, "class": kind, "memory": memory, "price": {"monthly": cost}, "region_prices": []}
    for name, kind, memory, cost in (
        ("nanode", "nanode", 1024, 5.0),
        ("standard-1", "standard", 2048, 12.0),
        ("standard-2", "standard", 4096, 24.0),
        ("memory-1", "highmem", 24_576, 60.0),
    )
}
KINDS["standard-1"]["region_prices"] = [{"id": "br-gru", "monthly": 16.8}]


@pytest.mark.parametrize(
    ("current", "region", "more_kb", "said"),
    [
        (
            "nanode",
            "us-mia",
            100 * MIB,
            "(standard-1 has 2048 MB, for 12.00 USD a month in us-mia in the place of 5",
        ),
        ("nanode", "br-gru", GIB, "(standard-1 has 2048 MB, for 16.80 USD a month in br-gru in the place of 5.00"),
        ("standard-1", "us-mia", GIB, "(standard-2 has 4096 MB, for 24.00"),
        ("standard-2", "us-mia", GIB, "(none of its class is larger than standard-2 by so much)"),
        ("gone", "us-mia", GIB, ""),
    ],
)
def test_a_larger_type_is_named_with_what_it_costs(current: str, region: str, more_kb: float, said: str) -> None:
    assert larger(KINDS, current, region, more_kb).strip().startswith(said)
    full = leaks(leaking=False, pattern="plateau", level_kb=950.0 * MIB)
    asked: list[Any] = []

    def sold(host: str, kib: float) -> str:
        asked.append((host, round(kib / MIB)))
        return " (x)"

    made = plan(found(full), {"w-1": declares(gate="prefork")}, {}, {}, POLICY, now=NOW, sold=sold)
    assert asked == [("w-1", 94)] and made["acts"] == []


def test_what_a_person_wants_kept_is_cordoned() -> None:
    (act,), told = chosen(leaks(leaking=False), policy=replace(POLICY, cordon=("w-1:gate", "w-9:gone")))
    assert (act["act"], act["dropin"], act["queues"]) == ("cordon", "", ["gate"])
    assert told == {("w-9:gone", ""): "remediation_cordon names it, and the findings do not"}
    done = {**planned([act], NOW - 60)[0], "event": "done"}
    assert "it is cordoned, and kept for inspection" in why(leaks(), log=[done])
    # One that takes no task does not grow any more, and is kept all the same.
    assert "it is cordoned, and kept for inspection" in why(leaks(leaking=False, pattern="plateau"), log=[done])
    # Once, until it is restarted.
    again = replace(POLICY, cordon=("w-1:gate",))
    assert "it is cordoned" in why(leaks(), log=[done], policy=again)
    restarted = {"w-1": {"workers": [state(since=NOW - 30)]}}
    assert chosen(leaks(), log=[done], policy=again, states=restarted)[0][0]["act"] == "cordon"


# ---- what is refused ----


def test_findings_that_are_old_or_of_a_time_to_come_are_refused() -> None:
    with pytest.raises(InputError, match=r"the findings are 25.0 h old.* \(remediation_max_age_h allows 24 h\)"):
        chosen(leaks(), age_h=25)
    with pytest.raises(InputError, match="of a time to come"):
        chosen(leaks(), age_h=-1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"declared": {}}, "its host is not in this run"),
        ({"declared": {"w-1": declares(other="prefork")}}, "does not declare it"),
        ({"states": {"w-1": {"msg": "sudo: a password is required"}}}, "is not known: sudo: a password is required"),
        ({"states": {"w-1": {"workers": []}}}, "its state is not known: the host has no such unit"),
        ({"states": {"w-1": {"workers": [state(active=False)]}}}, "it does not run"),
        ({"states": {"w-1": {"workers": [state(since=NOW + 1.0)]}}}, "it was restarted after these findings"),
        ({"policy": replace(POLICY, acts=())}, "remediation_acts does not allow contain"),
    ],
)
def test_a_worker_of_which_too_little_is_known_is_left(more: Any, said: str) -> None:
    assert said in why(leaks(), **more)


def test_a_host_that_was_not_collected_is_left_and_said() -> None:
    acts, told = chosen(leaks(), down={"w-1": "unreachable"})
    assert acts == [] and told["w-1", ""] == "it was not collected, so nothing is done there: unreachable"


def test_what_a_host_says_of_its_workers_may_be_anything() -> None:
    good = {"workers": [state()]}
    bad: list[Any] = [None, 5, {}, {"workers": {}}, {"workers": [5]}, {"workers": [{**state(), "unit": 7}]}]
    bad += [
        {"workers": [{**state(), "jemalloc": "/lib/x\nExecStart=/bin/sh"}]},
        {"workers": [{**state(), "since": "x"}]},
    ]
    lies: list[dict[str, Any]] = [{"memory_high_kb": float("nan")}, {"since": float("inf")}, {"changed": True}]
    lies += [
        {"unit": "celery-worker@../../x.service"},
        {"args": "x" * 20_000},
        {"runtime_max_s": -1},
        {"systemd": None},
    ]
    bad += [{"workers": [{**state(), **lie}]} for lie in lies] + [{"workers": [state()] * 1001}]
    states = sound_states({"good": good, **{str(at): one for at, one in enumerate(bad)}})
    assert states["good"] == good and all(set(states[str(at)]) == {"msg"} for at in range(len(bad)))
    assert sound_states({"w-1": {"msg": "no\nroute"}}) == {"w-1": {"msg": "no route"}}


# ---- the order ----


def acts_on(**queues: str) -> Any:
    return [{"host": host, "queues": names.split(), "act": "contain"} for host, names in queues.items()]


def running(declared: Any, *but: str) -> Any:
    """All of them, but on these hosts."""
    return {
        host: {"workers": [state(one["name"], active=host not in but) for one in instances]}
        for host, instances in declared.items()
    }


def test_after_a_trial_of_no_queue_more_than_a_share_of_its_consumers_is_away() -> None:
    declared = {f"w{n}": declares(a="prefork") for n in range(8)}
    acts, states = acts_on(**{f"w{n}": "a" for n in range(8)}), running(declared)
    assert waves(acts, declared, states, POLICY) == [["w0"], ["w1", "w2"], ["w3", "w4"], ["w5", "w6"], ["w7"]]
    assert len(waves(acts, declared, states, replace(POLICY, share_percent=100))) == 2
    assert len(waves(acts, declared, states, replace(POLICY, share_percent=100, hosts_at_a_time=3))) == 4


def test_one_consumer_of_a_queue_may_always_be_away_and_queues_do_not_hinder_each_other() -> None:
    declared = {
        "w0": declares(c="prefork"),
        "w1": declares(a="prefork", b="prefork"),
        "w2": declares(b="prefork"),
        "w3": declares(c="prefork"),
    }
    acts = acts_on(w0="c", w1="a b", w2="b", w3="c")
    assert waves(acts, declared, running(declared), POLICY) == [["w0"], ["w1"], ["w2", "w3"]]


def test_consumers_that_are_away_already_count_as_away() -> None:
    declared = {f"w{n}": declares(a="prefork") for n in range(8)}
    half = replace(POLICY, share_percent=50)
    acts = acts_on(w0="a", w1="a", w2="a", w3="a")

    def sizes(states: Any, cordoned: Any = ()) -> list[int]:
        return list(map(len, waves(acts, declared, states, half, cordoned)))

    assert sizes(running(declared)) == [1, 3]
    assert sizes(running(declared, "w6", "w7")) == [1, 2, 1]
    # One whose state is not known may be anything; one that is cordoned takes nothing.
    assert sizes({host: one for host, one in running(declared).items() if host not in ("w6", "w7")}) == [1, 2, 1]
    assert sizes(running(declared), [("w7", unit("a")), ("w6", unit("a"))]) == [1, 2, 1]
    acts[1]["act"] = "cordon"
    assert sizes(running(declared, "w5", "w6", "w7")) == [1, 1, 1, 1]


def test_a_cordon_that_leaves_a_queue_to_nobody_says_so() -> None:
    declared = {"w-1": declares(gate="prefork"), "w-2": declares(gate="prefork")}
    policy = replace(POLICY, cordon=("w-1:gate",))
    for but, risk in (((), "its queues have one consumer less, or none"), (("w-2",), "no consumer is left of gate")):
        (act,), _ = chosen(leaks(), declared=declared, states=running(declared, *but), policy=policy)
        assert act["risk"] == risk


def test_the_plan_says_all_that_a_reviewer_signs() -> None:
    made = plan(found(leaks()), {"w-1": declares(gate="prefork")}, {"w-1": {"workers": [state()]}}, {}, POLICY, now=NOW)
    first, *more, last = made["say"]
    assert first.startswith("CONTAIN w-1 gate: python_objects, 30 MiB/h") and last.startswith("Order: w-1.")
    assert [line.split(":")[0].strip() for line in more[1:]] == ["expected", "risk", "undo", "proof"]
    nothing = plan(found(), {}, {}, {}, POLICY, now=NOW)
    assert nothing["say"] == ["Nothing is changed: no worker leaks by these findings"]


# ---- what is traced ----


def traces(*workers: dict[str, Any], states: Any = None, policy: Policy = POLICY, **more: Any) -> list[Any]:
    declared = {"w-1": declares(gate="prefork", sales="threads")}
    states = states if states is not None else {"w-1": {"workers": [state(), state("sales")]}}
    return plan(found(*workers), declared, states, {}, policy, now=NOW, **more)["traces"]


def test_a_leak_of_which_nothing_is_known_is_traced_beside_what_is_done_about_it() -> None:
    unknown = leaks(leak_class="unknown", culprits=[])
    (act,) = traces(unknown)
    assert (act["act"], act["unit"], act["queues"], act["dropin"]) == ("trace", unit("gate"), ["gate"], "")
    assert "what leaks is not known yet" in act["reason"] and "for 60 s, code that" in act["risk"]
    made = plan(
        found(unknown), {"w-1": declares(gate="prefork")}, running({"w-1": declares(gate="")}), {}, POLICY, now=NOW
    )
    assert [line.split()[0] for line in made["say"] if line[0].isupper()] == ["TRACE", "CONTAIN", "Order:"]
    assert [act["act"] for act in made["acts"]] == ["contain"]
    # Of native memory a window tells the kind, and no line.
    assert traces(leaks(leak_class="native", culprits=[])) == [] == traces(leaks())
    assert traces(unknown, policy=replace(POLICY, acts=("contain",))) == []


def test_what_is_traced_is_one_worker_of_a_queue_that_runs_and_not_twice_by_the_same_findings() -> None:
    unknown = leaks(leak_class="unknown", culprits=[])
    assert traces(unknown, states={"w-1": {"workers": [state(active=False)]}}) == []
    assert traces(unknown, states={"w-1": {"msg": "unreachable"}}) == []
    assert traces(unknown, traced={("w-1", unit("gate")): NOW + 1}) == []
    assert len(traces(unknown, traced={("w-1", unit("gate")): NOW - 1, ("w-1", unit("sales")): NOW + 1})) == 1
    # A window would bring it to MemoryMax.
    assert traces({**unknown, "memory_max_kb": 310.0 * MIB}) == []


def test_what_came_of_the_traces_is_in_the_log_and_is_no_act_of_the_worker() -> None:
    asked = [
        {**act, "host": host}
        for act in traces(leaks(leak_class="unknown", culprits=[]))
        for host in ("w-1", "w-2", "w-3", "w-4")
    ]
    came = {
        "w-1": {"windows": [{"unit": unit("gate"), "growth": {"rss_growth_kb": 2048.0}}]},
        "w-2": {"windows": [{"unit": unit("gate"), "opened": 1.0, "growth": None, "reason": "its process\nended"}]},
        "w-3": {"windows": "none", "msg": "\x1b[31mno such unit"},
        "w-4": 7,
    }
    entries, said = windows(asked, came, NOW)
    assert [(one["event"], one["why"]) for one in entries] == [
        ("done", "in the window its RSS gained 2 MiB"),
        ("failed", "its process ended"),
        ("failed", "?[31mno such unit"),
        ("failed", "its host did not say"),
    ]
    assert said[1] == "w-2 gate: trace: failed: its process ended"
    assert known(entries) == {} and remedylog.traced(entries) == {("w-1", unit("gate")): NOW}
    for growth in ({"rss_growth_kb": "1"}, {"rss_growth_kb": float("nan")}, {}):
        came = {"w-1": {"windows": [{"unit": unit("gate"), "growth": growth}]}}
        assert windows(asked[:1], came, NOW)[0][0]["why"] == "it was traced"


# ---- the log ----


def line(event: str, act: str = "contain", when: float = NOW - 3600, **more: Any) -> Any:
    return {"time": when, "id": "1", "event": event, "host": "w-1", "unit": unit("gate"), "act": act, **more}


def test_an_act_that_waits_for_its_proof_is_not_done_again() -> None:
    said = why(leaks(), log=[line("done", prove_s=7200.0)])
    assert said == "contain was done 1.0 h ago; it is proven in 1.0 h"


def test_what_was_proven_of_no_use_or_failed_is_not_tried_again() -> None:
    for log in ([line("done"), line("proven", verdict="not_remedied")], [line("failed", why="no answer")]):
        assert why(leaks(), log=log).startswith("contain was of no use to it before (")
    torn = leaks(leak_class="fragmentation")
    states = {"w-1": {"workers": [state(jemalloc="/usr/lib/x/libjemalloc.so.2")]}}
    log = [line("done", "allocator"), line("proven", "allocator", verdict="not_remedied")]
    assert chosen(torn, states=states, log=log)[0][0]["act"] == "contain"


def test_what_is_proven_contained_is_left_and_a_recycle_is_not_for_ever() -> None:
    log = [line("done"), line("proven", verdict="contained")]
    assert "contained by contain, as is proven" in why(leaks(), log=log)
    log = [line("done", "recycle"), line("proven", "recycle", verdict="contained")]
    assert chosen(leaks(), log=log)[0][0]["act"] == "contain"


def test_what_was_removed_is_as_if_it_had_never_been_but_for_what_was_of_no_use() -> None:
    assert chosen(leaks(), log=[line("done"), line("removed", "remove")])[0][0]["act"] == "contain"
    log = [line("done"), line("proven", verdict="worse"), line("removed", "remove")]
    assert "of no use" in why(leaks(), log=log)


def test_what_has_become_worse_is_taken_back() -> None:
    states = {"w-1": {"workers": [state(dropin="[Service]\n")]}}
    declared = {"w-1": declares(gate="prefork")}
    made = plan(found(leaks()), declared, states, {}, POLICY, now=NOW, worse=[("w-1", unit("gate"))])
    assert [(act["act"], act["reason"], act["queues"]) for act in made["acts"]] == [
        ("remove", "it has become worse with it", ["gate"])
    ]
    back = taken_back(declared, {("w-1", unit("gate"))}, POLICY)
    assert [act["act"] for act in back["acts"]] == ["remove"] and back["waves"] == [["w-1"]]
    assert taken_back(declared, set(), POLICY)["acts"] == []


def test_absent_takes_away_what_is_there_and_what_was_half_taken_away() -> None:
    workers = [
        state("a", dropin="[Service]\n"),
        state("b"),
        state("c", changed=NOW),
        state("gone", dropin="[Service]\n"),
    ]
    declared = {"w-1": declares(a="prefork", b="prefork", c="prefork"), "w-2": declares(x="prefork")}
    # Of c it is the log that tells; that somebody else has changed a drop-in of it, is nothing to us.
    begun = known([{**line("planned", "remove"), "unit": unit("c")}])
    states = {"w-1": {"workers": workers}, "w-2": {"msg": "unreachable"}}
    made = removal(declared, states, begun, POLICY)
    assert [act["unit"] for act in made["acts"]] == [unit("a"), unit("c"), unit("gone")]
    assert [act["unit"] for act in removal(declared, states, {}, POLICY)["acts"]] == [unit("a"), unit("gone")]
    assert [(one["host"], one["why"]) for one in made["told"]] == [("w-2", "its state is not known: unreachable")]


def test_a_run_that_was_interrupted_is_told_by_what_it_left() -> None:
    (act,), _ = chosen(leaks())
    (entry,) = planned([act], NOW - 600)
    assert (entry["event"], entry["time"], entry["prove_s"]) == ("planned", NOW - 600, 86_400)

    def left(**more: Any) -> list[Any]:
        return recovered(known([entry]), {"w-1": {"workers": [state(**more)]}}, NOW)

    done = left(dropin=act["dropin"], changed=NOW - 550, since=NOW - 500)
    assert [(one["event"], one["time"]) for one in done] == [("done", NOW - 500)]
    # Not written; written and not restarted; restarted by somebody else without it.
    assert left() == left(dropin=act["dropin"], changed=NOW - 550) == left(since=NOW - 500, changed=NOW - 550) == []
    # Of a daemon-reload that did not come, nothing is in force.
    assert left(dropin=act["dropin"], changed=NOW - 550, since=NOW - 500, stale=True) == []
    assert recovered(known([entry, done[0]]), {"w-1": {"workers": [state(dropin=act["dropin"])]}}, NOW) == []


def test_what_was_half_taken_away_is_taken_away_to_the_end() -> None:
    """By a run that ended between the removal and the restart."""
    log = [line("done", settings=["RuntimeMaxSec=9s"]), line("planned", "remove", NOW - 60)]
    half = {"w-1": {"workers": [state(changed=NOW - 50, since=NOW - 3600)]}}
    assert recovered(known(log), half, NOW) == []
    declared = {"w-1": declares(gate="prefork")}
    assert [act["act"] for act in removal(declared, half, known(log), POLICY)["acts"]] == ["remove"]
    whole = {"w-1": {"workers": [state(changed=NOW - 50, since=NOW - 40)]}}
    (gone,) = recovered(known(log), whole, NOW)
    assert (gone["event"], gone["time"]) == ("removed", NOW - 40)
    assert removal(declared, whole, known([*log, gone]), POLICY)["acts"] == []


def test_a_restart_long_after_it_was_planned_is_no_recycle() -> None:
    begun = line("planned", "recycle", NOW - 36_000, settings=[])
    for since, events in ((NOW - 35_900, ["done"]), (NOW - 600, [])):
        found = recovered(known([begun]), {"w-1": {"workers": [state(since=since)]}}, NOW)
        assert [one["event"] for one in found] == events


def test_a_dropin_that_somebody_has_taken_away_contains_nothing() -> None:
    log = [line("done", settings=["RuntimeMaxSec=9s"]), line("proven", verdict="contained")]
    there = {"w-1": {"workers": [state(dropin="[Service]\nRuntimeMaxSec=9s\n")]}}
    assert recovered(known(log), there, NOW) == []
    (gone,) = recovered(known(log), {"w-1": {"workers": [state()]}}, NOW)
    assert (gone["event"], gone["why"]) == ("removed", "its drop-in is gone")
    assert chosen(leaks(), log=[*log, gone])[0][0]["act"] == "contain"
    # A host that does not answer has taken nothing away.
    assert recovered(known(log), {"w-1": {"msg": "unreachable"}}, NOW) == []


def test_what_helped_and_does_not_any_more_is_for_a_person() -> None:
    log = [line("done"), line("proven", verdict="remedied")]
    assert "contain was proven to help, and does not any more; a person must look" in why(leaks(), log=log)
    log = [line("done"), line("proven", verdict="contained")]
    assert "does not any more" in why(leaks(level_kb=950.0 * MIB), log=log)


def test_what_came_of_acts_is_noted_and_what_a_host_says_of_them_may_be_anything() -> None:
    (act,), _ = chosen(leaks())
    came = {"outcomes": [{"id": act["id"], "done": True, "why": "", "ended": NOW - 5, "away_s": 7.2}]}
    entries, said = outcomes([act], came, NOW)
    assert [(one["event"], one["time"], one["away_s"]) for one in entries] == [("done", NOW - 5, 7.2)]
    assert said == ["w-1 gate: contain: done in 7 s"]
    lies: Any = {
        "outcomes": [
            {"id": act["id"], "done": "yes", "changed": True, "why": ["x\n"], "ended": 1e300, "away_s": "long"},
            5,
        ]
    }
    entries, said = outcomes([act], lies, NOW)
    assert [(one["event"], one["time"], one["away_s"]) for one in entries] == [("failed", NOW, 0.0)]
    came["outcomes"][0].update(done=False, changed=False, why="the broker does not answer")
    assert outcomes([act], came, NOW) == ([], ["w-1 gate: contain: not begun: the broker does not answer"])
    entries, said = outcomes([act], {"msg": "no\nroute"}, NOW)
    assert entries == [] and said == ["w-1 gate: contain: not begun: no route"]
    came["outcomes"][0].update(done=True)
    removed = {**act, "act": "remove"}
    assert outcomes([removed], came, NOW)[0][0]["event"] == "removed"


def test_the_policy_is_that_of_the_role() -> None:
    given = {**vars(POLICY), "acts": ["contain"], "cordon": []}
    assert policy_of(json.loads(json.dumps(given))) == replace(POLICY, acts=("contain",))
    with pytest.raises(InputError, match="the policy is not whole"):
        policy_of({})


def test_a_verdict_is_in_the_findings() -> None:
    log = [line("done", settings=["RuntimeMaxSec=9s"]), line("proven", verdict="contained", why="3 left", before=None)]
    told = remedylog.remedy(known(log)["w-1", unit("gate")])
    assert told is not None and (told["state"], told["settings"]) == ("contained", ["RuntimeMaxSec=9s"])
    assert remedylog.remedy(known([line("done"), line("removed", "remove")])["w-1", unit("gate")]) is None
