"""Whether an act has helped, by the figures of before and after it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from plimsoll.proof import Figures, figures, prove, settled
from plimsoll.series import Floats, Generation, Limits, Worker

# When the worker had stopped and when it took tasks again, after an act at noon.
BEGIN, DONE = 1_763_985_600.0, 1_763_985_660.0
WAIT, HOUR, MIB, HIGH = 4 * 3600.0, 3600.0, 1024, 1 << 20
NAME: dict[str, str] = {"host": "w-1", "unit": "celery-worker@gate.service"}
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "findings.schema.json").read_text())


def life(begin: float, end: float, rate: float = 0, pid: int = 7, pace: float = 10, role: str = "child") -> Generation:
    """A process that was sampled each minute. rate in MiB an hour from 60 MiB on, pace in tasks a minute."""
    times = np.arange(begin, end, 60.0)
    minutes = (times - begin) / 60
    noise = np.random.default_rng(pid).exponential(200, len(times))
    sizes = np.floor((60 * MIB + rate * MIB * minutes / 60 + noise) / 4) * 4
    ones = np.ones(len(times), dtype=np.uint32)
    return Generation(pid, begin, role, times, sizes, np.floor(minutes * pace), ones)


def lives(begin: float, end: float, rate: float, each: float) -> list[Generation]:
    """Children of which one follows the other."""
    begins = np.arange(begin, end, each).tolist()
    return [life(at, min(at + each, end), rate, pid=9 + n) for n, at in enumerate(begins)]


def worker(*processes: Generation, level: float = 300, killed: Any = (), restarted: Any = (), **more: Any) -> Worker:
    """level in MiB, of its cgroup, with a MemoryHigh of 1 GiB."""
    ends = [float(one.times[-1]) for one in processes]
    times = np.arange(min(float(one.times[0]) for one in processes), max(ends) + 1, 60.0)
    limits = Limits(
        high_kb=HIGH,
        times=times,
        levels=np.full(len(times), level * MIB),
        killed=np.array(killed, dtype=float),
        restarted=np.array(restarted, dtype=float),
        oom_kills=len(killed),
        restarts=len(restarted),
    )
    return Worker(NAME["host"], NAME["unit"], processes, replace(limits, **more))


BY_MEMORY = 'Environment="CELERY_REMEDY_ARGS=--max-memory-per-child=9"'


def act(name: str = "contain", **more: Any) -> Any:
    head = {**NAME, "time": DONE, "id": "1f0c", "event": "done", "act": name, "settings": [BY_MEMORY]}
    return {**head, "prove_s": WAIT, "away_s": DONE - BEGIN, "reason": "it leaks", "why": "", **more}


def verdict(name: str, one: Worker | None, after: float = WAIT) -> tuple[str, str]:
    """The verdict so long after the act, empty for none yet, and what is said of it."""
    entry, said = settled(act(name), one, DONE + after)
    if entry is None:
        assert "not proven yet: " in said
        return "", said
    for at in ("before", "after"):
        jsonschema.validate(entry[at], {"$ref": "#/$defs/figures", "$defs": SCHEMA["$defs"]})
    json.dumps(entry, allow_nan=False)
    return entry["verdict"], said


LEAK = life(BEGIN - 9 * HOUR, BEGIN, 30, pid=5)
FLAT = life(DONE, DONE + WAIT, 0)


# ---- figures ----


def test_the_schema_has_the_keys_of_figures() -> None:
    assert list(SCHEMA["$defs"]["figures"]["properties"]) == list(Figures.__annotations__)
    assert SCHEMA["$defs"]["figures"]["required"] == list(Figures.__annotations__)


def test_figures_are_of_the_time_that_is_asked_for() -> None:
    one = worker(LEAK, FLAT)
    before, after = figures(one, BEGIN - WAIT, BEGIN), figures(one, DONE, DONE + WAIT)
    assert before is not None and after is not None
    assert (before["pattern"], after["pattern"]) == ("growing", "plateau")
    assert before["growth_kb_per_hour"] == pytest.approx(30 * MIB, rel=0.05)
    assert before["growth_low"] <= before["growth_kb_per_hour"] <= before["growth_high"]
    assert before["hours"] == after["hours"] == pytest.approx(4, abs=0.02)
    assert (before["level_kb"], before["peak_kb"]) == (300 * MIB, 300 * MIB)
    assert figures(one, DONE + 2 * WAIT, DONE + 3 * WAIT) is None


def test_level_and_peak_are_those_of_the_time() -> None:
    one = worker(LEAK, FLAT)
    levels = np.where(one.limits.times < DONE, 900.0, 200.0)
    levels[-5] = 250.0
    one = replace(one, limits=replace(one.limits, levels=levels))
    after = figures(one, DONE, DONE + WAIT)
    assert after is not None and (after["level_kb"], after["peak_kb"]) == (200, 250)
    nothing = figures(replace(one, limits=Limits()), DONE, DONE + WAIT)
    assert nothing is not None and nothing["level_kb"] is nothing["peak_kb"] is None


def test_kills_and_restarts_are_counted_in_the_time_alone() -> None:
    at = [BEGIN - 5 * HOUR, BEGIN - 60, DONE + 60, DONE + 120, DONE + WAIT + 60]
    one = worker(LEAK, life(DONE, DONE + 2 * WAIT), killed=at, restarted=at[2:])
    before, after = figures(one, BEGIN - WAIT, BEGIN), figures(one, DONE, DONE + WAIT)
    assert before is not None and after is not None
    assert (before["oom_kills"], before["restarts"], after["oom_kills"], after["restarts"]) == (1, 0, 2, 2)


def test_a_process_has_ended_that_was_not_seen_to_the_end_of_the_time() -> None:
    main = life(DONE - HOUR, DONE + 3 * WAIT, pid=1, role="main")
    one = worker(main, *lives(DONE, DONE + 2 * WAIT, 30, HOUR))
    counts = []
    for end in (0.5, 1.0, 1.5, 3.5, 8.0):
        after = figures(one, DONE, DONE + end * HOUR)
        assert after is not None
        counts.append(after["ended"])
    # One that ends within the last two samples is not missed yet.
    assert counts == [0, 0, 1, 3, 7]


def test_tasks_a_minute_are_those_of_all_processes_in_the_time() -> None:
    before = [life(BEGIN - 9 * HOUR, BEGIN, 30, pid=5, pace=10), life(BEGIN - 9 * HOUR, BEGIN, 30, pid=6, pace=20)]
    after = [life(DONE, DONE + WAIT, pid=7, pace=50), life(DONE, DONE + WAIT, pid=1, pace=np.nan, role="main")]
    one = worker(*before, *after)
    paces = [figures(one, *at) for at in ((BEGIN - WAIT, BEGIN), (DONE, DONE + WAIT))]
    assert [pace and pace["tasks_per_minute"] for pace in paces] == [30.0, 50.0]
    # One child after the other, of which each counts from naught.
    many = figures(worker(*lives(DONE, DONE + WAIT, 0, HOUR)), DONE, DONE + WAIT)
    assert many is not None and many["tasks_per_minute"] == pytest.approx(10, rel=0.05)
    unknown = figures(worker(life(DONE, DONE + WAIT, pace=np.nan)), DONE, DONE + WAIT)
    single = figures(worker(life(DONE, DONE + 60)), DONE, DONE + WAIT)
    assert unknown is not None and unknown["tasks_per_minute"] is None
    assert single is not None and single["tasks_per_minute"] is None


# ---- verdicts ----


@pytest.mark.parametrize("name", ["recycle", "contain", "allocator"])
def test_a_leak_before_and_none_after_is_remedied(name: str) -> None:
    found, said = verdict(name, worker(LEAK, FLAT))
    assert found == "remedied"
    assert said.startswith(f"w-1 gate: {name}: REMEDIED: it does not grow (plateau); memory was 300 MiB")
    assert "; growth 30" in said and " before, " in said and said.endswith("tasks a minute 10 before, 10 after")


def test_the_line_of_the_log_is_that_of_the_act_and_has_both_figures() -> None:
    entry, _ = settled(act(), worker(LEAK, FLAT), DONE + WAIT)
    assert entry is not None and entry["before"] is not None and entry["after"] is not None
    kept = {name: act()[name] for name in ("id", "host", "unit", "act", "settings", "prove_s")}
    told = {"time": DONE + WAIT, "event": "proven", "verdict": "remedied", "why": entry["why"]}
    assert entry == {**kept, **told, "before": entry["before"], "after": entry["after"]}
    # The stretch before ends where the old worker began to stop, and is as long as the proof.
    assert (entry["before"]["pattern"], entry["before"]["hours"]) == ("growing", pytest.approx(4, abs=0.02))


def test_children_that_leave_in_time_are_contained() -> None:
    found, said = verdict("contain", worker(LEAK, *lives(DONE, DONE + WAIT, 60, HOUR)))
    assert found == "contained" and "CONTAINED: 3 processes left in time; memory was 300 MiB at most of" in said


def test_it_is_not_told_before_three_have_left_or_by_the_clock_one() -> None:
    for each, left in ((1.9, "1 more process is"), (5.0, "3 more processes are")):
        one = worker(LEAK, *lives(DONE, DONE + WAIT, 60, each * HOUR))
        found, said = verdict("contain", one)
        assert found == "" and f"not proven yet: {left} to leave in time" in said
        by_the_clock: Any = {**act("contain"), "settings": ["RuntimeMaxSec=9s"]}
        entry, _ = settled(by_the_clock, one, DONE + WAIT)
        assert (entry["verdict"] if entry else "") == ("contained" if each == 1.9 else "")


@pytest.mark.parametrize("name", ["recycle", "contain", "allocator"])
def test_a_worker_that_meets_memory_high_is_not_remedied(name: str) -> None:
    processes = lives(DONE, DONE + WAIT, 30, HOUR) if name == "contain" else [life(DONE, DONE + WAIT, 30)]
    found, said = verdict(name, worker(LEAK, *processes, level=1024))
    assert found == "not_remedied" and "memory was 1 GiB at most, which is at MemoryHigh (1 GiB)" in said
    # Without one, there is nothing to be met.
    free = worker(LEAK, *processes, level=1024, high_kb=None)
    assert verdict(name, free)[0] == {"recycle": "contained", "contain": "contained"}.get(name, "not_remedied")


def test_an_allocator_that_does_not_end_the_growth_is_of_no_use_and_a_recycle_is_only_for_a_time() -> None:
    one = worker(LEAK, life(DONE, DONE + WAIT, 30))
    found, said = verdict("allocator", one)
    assert found == "not_remedied" and "it still grows by 3" in said
    found, said = verdict("recycle", one)
    assert found == "contained" and "it grows again by 3" in said


def test_kills_after_it_and_none_before_are_worse_at_once() -> None:
    one = worker(LEAK, FLAT, killed=[DONE + 60, DONE + 120])
    for after in (180.0, WAIT):
        found, said = verdict("contain", one, after)
        assert found == "worse" and "WORSE: 2 OOM kills since, and none before" in said
    assert verdict("contain", one, 30.0)[0] == ""


def test_kills_that_go_on_are_no_remedy_whatever_left_in_time() -> None:
    kills = [BEGIN - 60, DONE + 60, DONE + 120]
    for processes in ([FLAT], lives(DONE, DONE + WAIT, 60, HOUR)):
        found, said = verdict("contain", worker(LEAK, *processes, killed=kills))
        assert found == "not_remedied" and "NOT REMEDIED: 2 OOM kills since, and 1 before" in said


def test_kills_that_were_before_and_are_no_more_are_a_remedy() -> None:
    assert verdict("contain", worker(LEAK, FLAT, killed=[BEGIN - 60]))[0] == "remedied"


@pytest.mark.parametrize("name", ["allocator", "recycle"])
def test_growth_that_is_much_faster_is_worse_at_once(name: str) -> None:
    for after in (2 * HOUR, WAIT):
        found, said = verdict(name, worker(LEAK, life(DONE, DONE + after, 90)), after)
        assert found == "worse" and "WORSE: it grows by 89" in said
    # What is little faster may be the load.
    assert verdict(name, worker(LEAK, life(DONE, DONE + WAIT, 36)))[0] != "worse"


def test_a_leak_that_was_none_before_is_worse() -> None:
    healthy = life(BEGIN - 9 * HOUR, BEGIN, 0, pid=5)
    assert verdict("allocator", worker(healthy, life(DONE, DONE + WAIT, 60)))[0] == "worse"


def test_children_may_grow_faster_that_leave_before_memory_high_and_not_at_it() -> None:
    """More work for each of fewer children is no harm as long as they are contained."""
    processes = lives(DONE, DONE + WAIT, 90, HOUR)
    assert verdict("contain", worker(LEAK, *processes))[0] == "contained"
    assert verdict("contain", worker(LEAK, *processes, level=1024))[0] == "worse"


@pytest.mark.parametrize("name", ["recycle", "contain", "allocator"])
def test_before_its_time_nothing_is_settled(name: str) -> None:
    found, said = verdict(name, worker(LEAK, FLAT), WAIT - HOUR)
    assert found == "" and said == f"w-1 gate: {name}: not proven yet: 1.0 h more of logs are needed"
    at_its_limit = worker(LEAK, life(DONE, DONE + WAIT, 30), level=1024)
    assert verdict(name, at_its_limit, WAIT - HOUR)[0] == ""


def test_what_was_not_seen_since_is_not_settled() -> None:
    for one in (None, worker(LEAK)):
        found, said = verdict("contain", one, 9 * WAIT)
        assert found == "" and "not proven yet: nothing has been seen of it since" in said


def test_what_was_seen_for_too_short_is_not_settled() -> None:
    found, said = verdict("contain", worker(LEAK, life(DONE, DONE + 240)), WAIT)
    assert found == "" and "minutes since tell too little; memory was 300 MiB at most of MemoryHigh 1 GiB" in said


def test_a_worker_of_which_nothing_is_known_before_is_judged_by_what_came_after() -> None:
    found, said = verdict("contain", worker(FLAT))
    assert found == "remedied" and " before, " not in said
    assert verdict("contain", worker(FLAT, killed=[DONE + 60]))[0] == "worse"
    assert verdict("allocator", worker(life(DONE, DONE + WAIT, 90)))[0] == "not_remedied"


def test_a_peak_that_was_not_measured_is_said() -> None:
    bare = replace(worker(LEAK, FLAT), limits=Limits(high_kb=HIGH))
    found, said = verdict("contain", bare)
    assert found == "remedied" and "; its peak is not known; growth" in said


def test_names_of_hosts_and_units_are_made_printable() -> None:
    _, said = settled(act(unit="celery-worker@\x1b[2J.service"), None, DONE + WAIT)
    assert "\x1b" not in said


def test_of_no_figures_nothing_is_proven() -> None:
    assert prove(act(), None, None, None).verdict == ""


def test_figures_leave_the_worker_as_it_is() -> None:
    one = worker(LEAK, FLAT)
    sizes: list[Floats] = [each.sizes.copy() for each in one.generations]
    figures(one, BEGIN - WAIT, BEGIN)
    assert all(np.array_equal(was, each.sizes) for was, each in zip(sizes, one.generations))


# ---- who has ended it ----


def test_what_the_guard_or_a_deployment_has_ended_did_not_leave_by_itself() -> None:
    """All of the worker's processes end together, three times."""
    begins = [DONE + n * HOUR for n in range(4)]
    mains = [life(at, at + HOUR, pid=20 + n, role="main") for n, at in enumerate(begins)]
    children = lives(DONE, DONE + WAIT, 60, HOUR)
    together = figures(worker(LEAK, *mains, *children), DONE, DONE + WAIT)
    alone = figures(worker(LEAK, life(DONE, DONE + WAIT, pid=1, role="main"), *children), DONE, DONE + WAIT)
    assert together is not None and alone is not None
    assert (together["ended"], alone["ended"]) == (0, 3)


def test_by_the_clock_only_those_count_that_were_as_old_as_that() -> None:
    one = worker(LEAK, *lives(DONE, DONE + WAIT, 60, HOUR))
    for clock_s, ended in ((HOUR, 3), (0.5 * HOUR, 3), (2 * HOUR, 0)):
        after = figures(one, DONE, DONE + WAIT, clock_s)
        assert after is not None and after["ended"] == ended


def test_by_the_clock_nothing_is_told_before_it_has_struck() -> None:
    by_the_clock: Any = {**act("contain"), "settings": ["RuntimeMaxSec=86400s"]}
    entry, said = settled(by_the_clock, worker(LEAK, FLAT), DONE + WAIT)
    assert entry is None and "1 more process is to leave in time" in said


def test_a_worker_that_the_guard_had_to_restart_is_not_contained() -> None:
    one = worker(LEAK, *lives(DONE, DONE + WAIT, 60, HOUR))
    for guarded, verdict_of in ((DONE - 60, "contained"), (DONE + 60, "not_remedied")):
        entry, _ = settled(act("contain"), one, DONE + WAIT, guarded)
        assert entry is not None and entry["verdict"] == verdict_of


def test_what_happens_later_than_was_asked_before_makes_nothing_worse() -> None:
    """Days later there was a kill; in as long a time as before there was none."""
    end = DONE + 4 * WAIT
    one = worker(LEAK, life(DONE, end, 0), killed=[DONE + 3 * WAIT])
    entry, _ = settled(act("contain"), one, end)
    assert entry is not None and (entry["verdict"], entry["after"]["hours"]) == (
        "remedied",
        pytest.approx(WAIT / HOUR, abs=0.02),
    )
    # Where that was too short to tell, all is taken.
    one = worker(LEAK, *lives(DONE, end, 60, 3 * HOUR), killed=[DONE + 3 * WAIT])
    entry, said = settled(act("contain"), one, end)
    assert entry is not None and entry["verdict"] == "not_remedied", said
