"""What a soak sends and what is said of its records: made ones, of growth that is known."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from plimsoll import soakreport, soakrun
from plimsoll.lines import InputError
from plimsoll.soak import (
    BUDGET_KB,
    ERROR,
    LOOK_RUNS,
    MUCH,
    ROW,
    Judge,
    PlanError,
    Recorded,
    budget_of,
    calls_of,
    compare,
    digest,
    interval,
    line,
    plan_of,
    quantile,
    schedule,
    two_sided,
    whole,
)

KB = 1024.0
STRIDE = 4
TASKS: dict[str, Any] = {"shop.pay": {"args": ["{n}"]}, "shop.mail": {"weight": 3}}


def plan(**more: Any) -> Any:
    return plan_of({"tasks": TASKS, **more})


def lines(**more: Any) -> list[str]:
    return [line(call) for call in schedule(plan(**more))]


# ---- the schedule ----


def test_the_same_file_and_seed_give_the_same_tasks_in_the_same_order_and_another_seed_others() -> None:
    few = {"tasks": 2000}
    assert lines(seed=7, limits=few) == lines(seed=7, limits=few)
    assert digest(lines(seed=7, limits=few)) != digest(lines(seed=8, limits=few))


def test_this_schedule_is_what_it_was_when_this_was_written() -> None:
    """A baseline of the last release is compared with what was sent the same: also by the next version of Python."""
    one = plan_of({"tasks": {"a": {"args": ["{n}", "{uuid}"]}, "b": None, "c": None}, "limits": {"tasks": 400}})
    told = list(itertools.islice(schedule(one), 400))
    assert "".join(call.task for call in told[::ROW]) == PINNED_ORDER
    assert next(call.args for call in told if call.task == "a") == PINNED_ARGS


PINNED_ORDER = "cbabaccabacbbcabacbacacbcbabaccbabacbcabcacab"
PINNED_ARGS = [0, "2265d8f1-c386-414c-8ed4-7311a6cec9e9"]


def test_tasks_come_in_rows_as_often_as_they_have_weight() -> None:
    told = [call.task for call in schedule(plan(limits={"tasks": 4000}))]
    assert 2.5 < told.count("shop.mail") / told.count("shop.pay") < 3.5
    rows = [len(list(same)) for _, same in itertools.groupby(told)]
    assert all(row % ROW == 0 for row in rows[:-1])


@pytest.mark.parametrize(
    "arrival",
    [
        {"pattern": "constant"},
        {"pattern": "constant", "rate": 5},
        {"pattern": "ramp", "from": 1, "to": 50},
        {"pattern": "burst", "size": 100, "every": 3},
        {"pattern": "burst", "size": 1000, "every": 3},
    ],
)
def test_no_pattern_is_faster_than_the_limit_or_longer_than_the_time_box(arrival: dict[str, Any]) -> None:
    times = [call.at_s for call in schedule(plan(arrival=arrival, limits={"rate": 50, "seconds": 20}))]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 20
    assert min(later - sooner for sooner, later in itertools.pairwise(times)) >= 1 / 50 - 1e-9


def test_each_pattern_has_its_shape() -> None:
    def per_second(**arrival: Any) -> list[int]:
        counted = Counter(
            int(call.at_s) for call in schedule(plan(arrival=arrival, limits={"rate": 60, "seconds": 12}))
        )
        return [counted[second] for second in range(12)]

    assert per_second(pattern="constant", rate=10) == pytest.approx([10] * 12, abs=1)
    ramp = per_second(pattern="ramp", **{"from": 2, "to": 60})
    assert ramp == sorted(ramp)
    assert ramp[0] < 8 < 50 < ramp[-1]
    assert per_second(pattern="burst", size=20, every=4) == [20, 0, 0, 0] * 3


def test_a_recorded_day_is_replayed_in_the_time_box() -> None:
    day = [
        *(Recorded(1e9 + hour * 3600, "shop.pay", 1000 if hour == 12 else 50) for hour in range(24)),
        *(Recorded(1e9 + hour * 3600, "shop.gone", 9999) for hour in range(24)),
    ]
    given = plan(arrival={"pattern": "replay", "file": "day.csv"}, limits={"rate": 90, "seconds": 48, "tasks": 1900})
    calls = list(schedule(given, day))
    assert {call.task for call in calls} == {"shop.pay"}
    hours = Counter(int(call.at_s / 2) for call in calls)
    # All of it, but for a row that was not whole in the end; at noon the limit of 90 a second is met.
    assert hours[12] == pytest.approx(180, abs=ROW)
    assert len(calls) == pytest.approx((1000 + 23 * 50) * 0.18, abs=ROW)
    times = [call.at_s for call in calls]
    assert times == sorted(times)
    assert times[-1] < 48


def test_what_stands_for_a_value_of_its_own_is_filled_in() -> None:
    task = {"args": ["{n}", "{n%3}", "order-{n}", 7], "kwargs": {"deep": [{"id": "{uuid}"}], "text": "{m}"}}
    given = plan_of({"tasks": {"a": task}})
    first, *_, last = itertools.islice(calls_of(given, "a", 1), 5)
    assert first.args == [0, 0, "order-0", 7]
    assert last.args == [4, 1, "order-4", 7]
    assert first.kwargs["deep"][0]["id"] != last.kwargs["deep"][0]["id"]
    assert len(first.kwargs["deep"][0]["id"]) == 36
    assert first.kwargs["text"] == "{m}"


def test_calls_are_taken_in_turns_a_row_each() -> None:
    given = plan_of({"tasks": {"a": {"calls": [{"args": [1]}, {"args": [2]}]}}})
    told = [call.args[0] for call in itertools.islice(schedule(given), 4 * ROW)]
    assert told == [1] * ROW + [2] * ROW + [1] * ROW + [2] * ROW


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (None, "the file: must be an object"),
        ({}, "tasks: must be an object"),
        ({"tasks": {}}, "tasks: names no task"),
        ({"tasks": {"a": {"argz": []}}}, "tasks.a: knows no key 'argz'"),
        ({"tasks": {"a": {"args": "{n}"}}}, r"tasks.a.args: must be a list, as \["),
        ({"tasks": {"a": {"weight": 0}}}, "tasks.a.weight: is 0"),
        ({"tasks": {"a": {"weight": True}}}, "tasks.a.weight: is True"),
        ({"tasks": {"a": {"args": [{1, 2}]}}}, "tasks.a: what is sent is JSON"),
        ({"tasks": {"a": {"args": [], "calls": [{}]}}}, "tasks.a: has calls, and args"),
        ({"tasks": TASKS, "arrival": {"pattern": "wave"}}, "arrival.pattern: is 'wave'"),
        ({"tasks": TASKS, "arrival": {"pattern": "ramp"}}, "arrival.from: is missing"),
        ({"tasks": TASKS, "arrival": {"rate": 900}}, "arrival.rate: 900 a second is above limits.rate"),
        ({"tasks": TASKS, "limits": {"seconds": float("nan")}}, "limits.seconds: is nan"),
        ({"tasks": TASKS, "settings": {"broker_url": "redis://prod"}}, "settings.broker_url: is the soak's own"),
        ({"tasks": TASKS, "settings": {"worker_pool": "gevent"}}, "settings.worker_pool: gevent"),
        ({"tasks": TASKS, "runs": 10}, "runs: is 10"),
    ],
)
def test_what_is_wrong_in_a_tasks_file_is_named_by_its_key(data: object, named: str) -> None:
    with pytest.raises(PlanError, match=named):
        plan_of(data)


def test_a_budget_is_of_its_task_or_else_the_default() -> None:
    budget = budget_of({"default": 10, "tasks": {"shop.pay": 500}}, TASKS)
    assert (budget["shop.pay"], budget["shop.mail"], budget[""]) == (500, 10, 10)
    assert budget_of({}, TASKS)["shop.mail"] == BUDGET_KB
    with pytest.raises(PlanError, match=r"tasks\.a: is '1 MB'"):
        budget_of({"tasks": {"a": "1 MB"}})


# ---- the verdict ----


def judged(
    growth: Callable[[int], float], runs: int = 4000, name: str = "shop.pay", judge: Judge | None = None, **more: Any
) -> Any:
    """The verdict on a task that gains so many bytes in its run of each number, alone in one process."""
    judge = judge or Judge(plan_of({"tasks": {name: None}, **more}), budget_of({}))
    feed(judge, "1", growth, runs, name)
    return next(one for one in judge.finish(99.0) if one["task"] == name)


def feed(judge: Judge, process: str, growth: Callable[[int], float], runs: int, name: str, **more: Any) -> None:
    judge.take(process, {"kind": "process", "measure": "malloc", "python": "3.11.7"}, 0.0)
    total = since = 0.0
    for run in range(runs):
        if judge.tasks.get(name) and judge.tasks[name].verdict:
            return
        grew = growth(run)
        total, since = total + grew, since + grew
        whole_one = run % STRIDE == STRIDE - 1
        record = {
            **{"kind": "task", "task": name, "seconds": 0.01, "failed": False, "error": "", "grown": STRIDE},
            **{"growth_bytes": since if whole_one else None, "used_bytes": 1e7 + total, "rss_kb": 9000, "fds": 9},
        }
        judge.take(process, record | more, run / 100)
        since = 0.0 if whole_one else since


def noise(size: float, seed: int = 1) -> Iterator[float]:
    rng = random.Random(seed)
    return iter(lambda: rng.gauss(0, size), None)


def test_a_leak_fails_at_the_first_look() -> None:
    one = judged(lambda _: 20 * KB)
    assert (one["verdict"], one["growth_kb"]) == ("fail", 20_000)
    assert one["judged"] == LOOK_RUNS // 2
    assert one["ran"] < 2 * LOOK_RUNS + 20


def test_a_task_that_keeps_nothing_passes() -> None:
    rough = noise(500)
    one = judged(lambda _: next(rough))
    assert one["verdict"] == "pass"
    assert one["growth_low"] < 0 < one["growth_high"] <= BUDGET_KB


def test_a_small_leak_in_much_noise_is_told_once_enough_was_seen() -> None:
    rough = noise(4 * KB)
    one = judged(lambda _: 600 + next(rough), runs=200_000)
    assert one["verdict"] == "fail"
    assert one["judged"] > LOOK_RUNS
    assert one["growth_low"] > BUDGET_KB


def test_what_comes_once_does_not_fail_a_task() -> None:
    """Imports at the first run, and a cache of 128 entries, which is functools' own bound."""
    assert judged(lambda run: 5e6 if run == 0 else 0)["verdict"] == "pass"
    assert judged(lambda run: 50 * KB if run < 128 + 16 else 0)["verdict"] == "pass"
    # In the half that is judged it is no growth of each run, whatever its size.
    assert judged(lambda run: 5e6 if run == 450 else 0)["verdict"] == "pass"


def test_a_cache_that_is_larger_fills_in_warm_runs() -> None:
    def grows(run: int) -> float:
        return 50 * KB if run < 1000 else 0

    assert judged(grows)["verdict"] == "fail"
    assert judged(grows, tasks={"shop.pay": {"warm": 1000}})["verdict"] == "pass"


@pytest.mark.parametrize(("size", "verdict"), [(100, "pass"), (30 * KB, "undecided")])
def test_what_is_taken_and_given_back_every_fifty_runs_is_no_leak(size: float, verdict: str) -> None:
    """Where what comes and goes is far above the budget, no number of runs that a soak has tells that it is within."""
    one = judged(lambda run: -49 * size if run % 50 == 49 else size, runs=9000)
    assert one["verdict"] == verdict


def test_a_list_that_takes_more_room_now_and_then_passes_or_is_not_decided_and_never_fails_within_its_budget() -> None:
    """CPython's list grows by an eighth each time: 8 bytes a run, in ever larger steps."""
    size = 0

    def grows(run: int) -> float:
        nonlocal size
        before = size
        if run >= size:
            size = run + (run >> 3) + 6
        return 8.0 * (size - before)

    assert judged(grows, runs=20_000)["verdict"] == "pass"


def test_a_leak_of_one_run_in_fifty_fails() -> None:
    rng = random.Random(3)
    one = judged(lambda _: 200 * KB if rng.random() < 0.02 else 0, runs=50_000)
    assert one["verdict"] == "fail"


def test_growth_on_both_sides_of_the_budget_is_not_decided() -> None:
    rough = noise(100 * KB)
    one = judged(lambda _: 260 + next(rough), runs=2000)
    assert one["verdict"] == "undecided"
    assert "on both sides of the budget" in one["why"]


def test_too_few_runs_are_not_decided_and_the_way_out_is_said() -> None:
    one = judged(lambda _: 20 * KB, runs=300)
    assert one["verdict"] == "undecided"
    assert "the first look takes 256: raise limits.seconds" in one["why"]


def test_a_task_that_gains_much_is_told_before_it_brings_down_the_computer() -> None:
    one = judged(lambda _: MUCH / 64, runs=4000)
    assert one["verdict"] == "fail"
    assert one["ran"] <= 160


def test_a_task_that_takes_much_once_does_not_pass_before_it_is_warm() -> None:
    one = judged(lambda run: MUCH * 2 if run == 0 else 0.0, runs=200)
    assert one["verdict"] == "undecided", one
    assert judged(lambda run: MUCH * 2 if run == 0 else 0.0)["verdict"] == "pass"


def test_tasks_that_others_send_have_a_share_of_the_error_of_their_own() -> None:
    judge = Judge(plan_of({"tasks": {"shop.pay": None, "shop.mail": None}}), budget_of({}))
    judge.take("1", {"kind": "process", "measure": "malloc", "python": "3.11.7"}, 0.0)
    for name in ("shop.pay", "shop.mail", *(f"shop.sent_{n}" for n in range(20))):
        feed(judge, "1", lambda run: 0.0, 4000, name)
    spent = sum(2 * (1 - one["confidence"]) for one in judge.finish(9.0) if one["confidence"])
    # Each was looked at once, with half of its share.
    assert spent == pytest.approx(ERROR, rel=0.01) and spent <= ERROR


def test_a_task_that_raises_is_not_judged() -> None:
    judge = Judge(plan_of({"tasks": {"a": None}}), budget_of({}))
    feed(judge, "1", lambda _: 0, 2000, "a", failed=True, error="KeyError")
    [one] = judge.finish(9.0)
    assert one["verdict"] == "undecided"
    assert one["why"].startswith("it raised in 128 of 128 runs (KeyError)")
    assert judge.over()


def test_a_process_that_takes_the_place_of_another_one_is_warmed_up_again() -> None:
    """Each child fills its caches once; of children that are replaced, that is no growth of the task."""
    judge = Judge(plan_of({"tasks": {"a": None}}), budget_of({}))
    for child in range(20):
        feed(judge, str(child), lambda run: 1e5 if run < 200 else 0, 500, "a")
    [one] = judge.finish(9.0)
    assert one["verdict"] == "pass"


def test_a_worker_that_cannot_be_measured_ends_it_with_the_reason() -> None:
    judge = Judge(plan_of({"tasks": {"a": None}}), budget_of({}))
    judge.take("1", {"kind": "process", "measure": "malloc", "python": "3.11.7"}, 0.0)
    judge.take("1", {"kind": "refused", "why": "tasks run side by side"}, 1.0)
    assert judge.over()
    [one] = judge.finish(1.0)
    assert (one["verdict"], one["why"]) == ("undecided", "tasks run side by side")


def test_the_gate_fails_with_any_task_and_is_decided_by_those_of_the_file_alone() -> None:
    judge = Judge(plan_of({"tasks": {"a": None}}), budget_of({}))
    assert whole([judged(lambda _: 0, name="a", judge=judge)], judge.figures()) == "pass"
    judged(lambda _: 0, runs=9, name="sent.by.a", judge=judge)
    assert whole(judge.finish(9.0), judge.figures()) == "pass"
    judged(lambda _: 9000, name="leaks.in.a", judge=judge)
    assert whole(judge.finish(9.0), judge.figures()) == "fail"


def test_a_task_that_is_sent_by_one_of_the_file_and_is_never_judged_does_not_leak_unseen() -> None:
    judge = Judge(plan_of({"tasks": {"a": None}}), budget_of({}))
    judge.take("1", {"kind": "process", "measure": "malloc", "python": "3.11.7"}, 0.0)
    shown = {"kind": "task", "seconds": 0.01, "failed": False, "error": "", "grown": 1, "rss_kb": 9000, "fds": 9}
    for run in range(3000):
        # In turns: `sends` is never several times in a row.
        judge.take("1", {**shown, "task": "a", "growth_bytes": 0, "used_bytes": 1e7 + run * 2000}, run / 100)
        judge.take("1", {**shown, "task": "sent", "growth_bytes": None, "used_bytes": 1e7 + run * 2000}, run / 100)
    found = judge.finish(30.0)
    assert [(one["task"], one["verdict"]) for one in found] == [("a", "pass"), ("sent", "undecided")]
    assert "name it in the tasks file" in found[1]["why"]
    assert whole(found, judge.figures()) == "undecided"
    assert whole(found, {"used_kb_per_1000_tasks": BUDGET_KB - 1}) == "pass"


@pytest.mark.parametrize(("mean", "wrong"), [(BUDGET_KB * 1.024, "any"), (0.0, "fail")])
def test_of_many_soaks_no_more_are_wrong_than_is_said(mean: float, wrong: str) -> None:
    """At a growth that is the budget itself, either answer is wrong, and each of the looks may give it; bytes a run."""
    verdicts = Counter[str]()
    for seed in range(200):
        rough = noise(20 * KB, seed)
        judge = Judge(plan_of({"tasks": {"a": None}, "runs": 128}), budget_of({}))
        verdicts[judged(lambda _, rough=rough: mean + next(rough), 800, "a", judge)["verdict"]] += 1  # type: ignore[misc]
    answers = verdicts["fail"] + (verdicts["pass"] if wrong == "any" else 0)
    # Of 200 with a chance of ERROR each, more than 9 are less likely than one in ten thousand.
    assert ERROR == 0.01
    assert answers <= 9, verdicts


@pytest.mark.parametrize(("confidence", "degrees", "t"), [(0.95, 15, 2.13145), (0.99, 1, 63.6567), (0.999, 7, 5.40788)])
def test_quantiles_are_those_of_the_tables(confidence: float, degrees: int, t: float) -> None:
    """Abramowitz and Stegun, table 26.10."""
    assert quantile(confidence, degrees) == pytest.approx(t, rel=1e-5)
    assert two_sided(t, degrees) == pytest.approx(confidence, rel=1e-5)


def test_growth_that_is_the_same_each_time_has_no_width() -> None:
    assert interval([1024.0] * 100, 0.99)[:3] == (1000, 1000, 1000)


# ---- beside a baseline ----


def of(growth: float | None, error: float | None) -> dict[str, Any]:
    return {"growth_kb": growth, "error_kb": error}


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        (of(900, 20), of(100, 20), "worse"),
        (of(100, 20), of(900, 20), "better"),
        (of(140, 20), of(100, 20), "same"),
        # Sure, and too small to matter.
        (of(20, 0.1), of(10, 0.1), "same"),
        # Large, and not sure.
        (of(900, 500), of(100, 500), "same"),
        (of(5000, 0), of(0, 0), "worse"),
        (of(0, 0), of(0, 0), "same"),
    ],
)
def test_a_task_is_better_or_worse_where_that_is_sure_and_matters(
    now: dict[str, Any], before: dict[str, Any], verdict: str
) -> None:
    told = compare(now, before)
    assert told
    assert told["verdict"] == verdict
    assert (told["p"] < 0.01) >= (verdict != "same")


def test_what_was_not_judged_is_not_compared() -> None:
    assert compare(of(1, 1), {}) is None
    assert compare(of(None, None), of(1, 1)) is None


# ---- what is written ----

HOSTILE = "shop.<script>alert(1)</script>]]>&\"'\x00\x1b[31m\ud800"


def document(**more: Any) -> dict[str, Any]:
    """Of one task that fails, with a leak in it."""
    one = judged(lambda _: 20 * KB, name=HOSTILE)
    culprit = {"task": HOSTILE, "task_share": 1.0, "file": f"{HOSTILE}.py", "line": 7, "function": HOSTILE}
    culprit |= {"growth_kb": 9.0, "share": 1.0, "windows": 1, "package": "application", "caller": None}
    leak = {"leak_class": "python_objects", "culprits": [culprit], "evidence": [HOSTILE], "advice": None, "cache": None}
    told = {**one, "leak": leak, "against_baseline": {"verdict": "worse", "growth_kb": 1.0, "p": 1e-9}}
    return {
        **{"schema_version": 1, "plimsoll": "0", "generated": "now", "app": HOSTILE, "broker": "embedded"},
        **{"pool": "prefork", "seed": 1, "schedule_sha256": "0" * 64, "seconds": 9.0, "ended": "decided"},
        **{"baseline": {"generated": HOSTILE, "app": HOSTILE}, "verdict": "fail", "tasks": [told]},
        **{"worker": {"processes": 1, "measure": "malloc", "python": HOSTILE, "tasks": 9}},
        **more,
    }


def test_junit_is_xml_whatever_a_task_is_called_and_its_failure_names_the_line() -> None:
    suites = ElementTree.fromstring(soakreport.junit(document()))
    assert (suites.get("tests"), suites.get("failures"), suites.get("errors")) == ("1", "1", "0")
    [case] = suites.iter("testcase")
    assert case.get("name") == "shop.<script>alert(1)</script>]]>&\"'??[31m?"
    [failure] = case.iter("failure")
    assert "above 256 KiB per 1,000 tasks at shop." in (failure.get("message") or "")
    assert ".py:7" in (failure.get("message") or "")


def test_an_undecided_task_is_an_error_of_junits() -> None:
    one = {**document()["tasks"][0], "verdict": "undecided", "why": "too few"}
    suites = ElementTree.fromstring(soakreport.junit(document(tasks=[one], verdict="undecided")))
    assert [error.get("message", "")[:7] for error in suites.iter("error")] == ["too few"]
    assert suites.get("failures") == "0"


def test_nothing_that_a_task_is_called_is_markup_in_the_page() -> None:
    page = soakreport.page(document())
    assert "<script" not in page
    assert "script-src" not in page
    assert "default-src 'none'; style-src 'sha256-" in page.replace("&#39;", "'")
    assert "\x1b" not in page
    assert '<polyline class="fail"' in page


def test_the_table_says_verdict_line_and_baseline() -> None:
    table = soakreport.table(document())
    assert "FAIL: of 1 task of" in table
    assert "19.5 MiB (19.5 to 19.5)" in table
    assert ".py:7 in shop." in table
    assert "\x1b" not in table


# ---- what is given ----


@pytest.mark.parametrize(
    ("url", "again", "password", "found"),
    [
        (None, None, "", ("plimsoll://", "")),
        ("redis://staging:6379/0", "staging:6379", "", ("redis://staging:6379/0", "")),
        ("amqp://me@staging//", "staging", "p@ss", ("amqp://me:p%40ss@staging//", "p@ss")),
    ],
)
def test_a_broker_is_taken_that_is_named_twice(
    url: str | None, again: str | None, password: str, found: tuple[str, str]
) -> None:
    assert soakrun.broker_url(url, again, password) == found


@pytest.mark.parametrize(
    ("url", "again", "named"),
    [
        ("redis://prod:6379", None, "say so by --broker-again prod:6379"),
        ("redis://prod:6379", "staging:6379", "say so by --broker-again prod:6379"),
        ("redis://prod:6379", "prod", "say so by --broker-again prod:6379"),
        ("redis://staging;redis://prod", "staging", "must be one URL with a host"),
        ("sqs://", "", "must be one URL with a host"),
        ("amqp://me:secret@staging//", "staging", "leave the password out"),
        (None, "staging", "names a broker, and --broker does not"),
    ],
)
def test_no_other_broker_is(url: str | None, again: str | None, named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        soakrun.broker_url(url, again, "")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema_version": 2, "tasks": []}', '{"schema_version": 1, "tasks": [1]}']
)
def test_what_is_no_baseline_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "soak.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"soak\.json: is "):
        soakrun._baseline(path)


def test_a_recorded_day_is_read_and_what_is_wrong_in_it_named(tmp_path: Path) -> None:
    path = tmp_path / "day.csv"
    path.write_text("time,task,count\n1000.0,shop.pay,7\n")
    assert soakrun._recorded(path) == [Recorded(1000.0, "shop.pay", 7)]
    path.write_text("time,task,count\n1000.0,shop.pay,7\n1060,shop.pay,many\n")
    with pytest.raises(InputError, match=r"day\.csv: line 3"):
        soakrun._recorded(path)
    path.write_text("1000.0,shop.pay,7\n")
    with pytest.raises(InputError, match="must name the columns"):
        soakrun._recorded(path)


def test_the_demo_applications_file_is_one() -> None:
    import yaml

    path = Path(__file__).parents[1] / "lab" / "app" / "soak.yml"
    found = plan_of(yaml.safe_load(path.read_text()))
    assert len(found.tasks) == 21
    assert json.loads(next(iter(map(line, schedule(found)))))[2] == [0]
