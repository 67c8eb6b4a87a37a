"""Who is traced and who is passed over, and why; and what is said of it in the end."""

from __future__ import annotations

import io
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from plimsoll.canaries import INSTANCES, TRACING_KB, plan, read_findings, result
from plimsoll.cli import main
from plimsoll.lines import InputError
from plimsoll.window import takes_s

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_795_000_000.0
MIB, GIB = 1 << 10, 1 << 20
LINE = {
    **{"task": "shop.scan", "task_share": 1.0, "file": "/opt/celery/releases/x/app/shop/tasks.py", "line": 9},
    **{"function": "scan", "growth_kb": 900.0, "share": 0.98, "windows": 1, "package": "application", "caller": None},
}


def unit(name: str) -> str:
    return f"celery-worker@{name}.service"


def leaks(host: str, name: str, **more: Any) -> dict[str, Any]:
    """A worker that leaks, with room for a window, of which nothing is known."""
    return {
        "host": host,
        "unit": unit(name),
        "leaking": True,
        "pattern": "growing",
        "growth_kb_per_hour": 100.0 * MIB,
        "growth_high": 110.0 * MIB,
        "growth_kb_per_1000_tasks": None,
        "grows_in": None,
        "begins_kb": None,
        "span_hours": 30.0,
        "last_sample": "2025-11-24T00:00:00+00:00",
        "level_kb": 200.0 * MIB,
        "memory_high_kb": None,
        "memory_max_kb": GIB,
        "hours_to_memory_high": None,
        "hours_to_memory_max": 8.0,
        "hours_to_memory_max_earliest": 6.0,
        "leak_class": "unknown",
        "culprits": [],
        **more,
    }


def found(*workers: dict[str, Any], age_h: float = 0, down: dict[str, str] | None = None) -> Any:
    generated = datetime.fromtimestamp(NOW - 3600 * age_h, timezone.utc).isoformat(timespec="seconds")
    hosts = [{"host": one, "collected": True, "reason": ""} for one in sorted({one["host"] for one in workers})]
    hosts += [{"host": host, "collected": False, "reason": why} for host, why in (down or {}).items()]
    return {"schema": 1, "generated": generated, "workers": list(workers), "hosts": hosts}


def chosen(document: Any, declared: Any, **more: Any) -> tuple[list[tuple[str, str]], dict[tuple[str, str], str]]:
    """(host, name) of the canaries in their order, and of those passed over the reason."""
    made = plan(document, declared, **{"window_s": 60, "max_age_h": 24, "again": False, "now": NOW, **more})
    names = [[(one["host"], one["unit"][14:-8]) for one in made[key]] for key in ("chosen", "passed_over")]  # type: ignore[literal-required]
    return names[0], dict(zip(names[1], (one["why"] for one in made["passed_over"])))


def runs(**queues: list[str]) -> list[dict[str, Any]]:
    return [{"name": name, "queues": queues[name]} for name in queues]


def test_one_canary_a_queue_the_most_urgent_first() -> None:
    document = found(leaks("w-2", "gate"), leaks("w-1", "gate"), leaks("w-1", "sales"))
    both = {"w-1": runs(gate=["gate"], sales=["sales"]), "w-2": runs(gate=["gate"])}
    canaries, passed = chosen(document, both)
    assert canaries == [("w-2", "gate"), ("w-1", "sales")]
    assert passed == {
        ("w-1", "gate"): "w-2 celery-worker@gate of the queue gate is traced in this run; run again for this one"
    }


def test_workers_that_share_one_of_several_queues_are_never_both_traced() -> None:
    document = found(leaks("w-1", "a"), leaks("w-2", "b"), leaks("w-3", "c"))
    declared = {"w-1": runs(a=["x", "y"]), "w-2": runs(b=["y", "z"]), "w-3": runs(c=["z"])}
    # b shares y with a, and so c may have z.
    canaries, passed = chosen(document, declared)
    assert canaries == [("w-1", "a"), ("w-3", "c")] and "queue y" in passed["w-2", "b"]


def test_a_worker_that_names_no_queue_consumes_what_the_role_gives_it() -> None:
    declared = yaml.safe_load((ROOT / "roles/celery_worker/defaults/main.yml").read_text())["celery_worker_instances"]
    assert list(INSTANCES) == declared
    document = found(leaks("w-1", "default"), leaks("w-2", "plain"), leaks("w-3", "named"))
    queues = {"w-1": None, "w-2": [{"name": "plain"}], "w-3": runs(named=["celery"])}
    canaries, passed = chosen(document, queues)
    assert canaries == [("w-1", "default")] and set(passed) == {("w-2", "plain"), ("w-3", "named")}


def test_only_leaking_workers_are_traced_recycled_ones_too() -> None:
    recycled = {"pattern": "recycled", "hours_to_memory_max": None, "hours_to_memory_max_earliest": None}
    document = found(leaks("w-1", "a", **recycled), leaks("w-1", "b", leaking=False, pattern="plateau"))
    assert chosen(document, {"w-1": runs(a=["a"], b=["b"])}) == ([("w-1", "a")], {})


@pytest.mark.parametrize(
    ("leak_class", "culprits", "traced"),
    [
        ("python_objects", [LINE], False),
        ("cache_filling", [LINE], False),
        # No line allocates it.
        ("native", [], False),
        ("unknown", [LINE], True),
        ("python_objects", [{**LINE, "file": None, "line": None}], True),
        ("unknown", [], True),
    ],
)
def test_what_is_known_is_traced_again_where_all_is_asked_for(leak_class: str, culprits: Any, traced: bool) -> None:
    document = found(leaks("w-1", "a", leak_class=leak_class, culprits=culprits))
    canaries, passed = chosen(document, {"w-1": runs(a=["a"])})
    assert bool(canaries) == traced
    if not traced:
        assert f"known already: {leak_class}" in passed["w-1", "a"]
        assert ("shop/tasks.py:9 in scan" in passed["w-1", "a"]) == bool(culprits)
    assert chosen(document, {"w-1": runs(a=["a"])}, again=True)[0] == [("w-1", "a")]


def test_a_worker_that_would_meet_memory_max_in_the_window_is_passed_over_for_the_next_one() -> None:
    soon = {"hours_to_memory_max": 0.06, "hours_to_memory_max_earliest": takes_s(60) / 3600}
    document = found(leaks("w-1", "gate", **soon), leaks("w-2", "gate"))
    both = {"w-1": runs(gate=["gate"]), "w-2": runs(gate=["gate"])}
    canaries, passed = chosen(document, both, again=True)
    assert canaries == [("w-2", "gate")]
    assert passed["w-1", "gate"] == (
        "it may meet its MemoryMax of 1 GiB before a window is over, which takes up to 2 min 45 s; restart it or raise"
        " its MemoryMax, collect, and diagnose it then"
    )
    # A shorter window is over before that.
    assert chosen(document, both, window_s=10)[0] == [("w-1", "gate")]
    # The time that is left was so much when they were collected.
    late = found(leaks("w-1", "gate", hours_to_memory_max_earliest=6), age_h=6)
    assert "6.0 h old, it may have met its MemoryMax of 1 GiB by now" in chosen(late, both)[1]["w-1", "gate"]


def test_a_worker_with_no_room_for_what_tracing_takes_is_passed_over() -> None:
    def at(level: float, **more: Any) -> bool:
        far = {"hours_to_memory_max": None, "hours_to_memory_max_earliest": None}
        one = leaks("w-1", "a", level_kb=level, growth_kb_per_hour=0.0, **far)
        return bool(chosen(found({**one, **more}, age_h=2), {"w-1": runs(a=["a"])})[0])

    assert at(GIB - TRACING_KB) and not at(GIB - TRACING_KB + 1)
    # What it has grown by since, which a recycled one has lost.
    grows = {"growth_kb_per_hour": 100.0 * MIB}
    assert not at(GIB - TRACING_KB - 190 * MIB, **grows)
    assert at(GIB - TRACING_KB - 10 * MIB, **grows, pattern="recycled")
    assert at(GIB, memory_max_kb=None) and at(GIB, level_kb=None)
    low = leaks("w-1", "a", level_kb=GIB - 50.0 * MIB)
    why = chosen(found(low), {"w-1": runs(a=["a"])})[1]["w-1", "a"]
    assert why.startswith("it holds 974 MiB of its MemoryMax of 1 GiB and may grow by 4.58 MiB until a window is over")


def test_what_the_run_does_not_know_is_passed_over() -> None:
    document = found(leaks("w-1", "old"), leaks("w-2", "gate"), down={"w-3": "unreachable", "w-4": "unreachable"})
    canaries, passed = chosen(document, {"w-1": runs(gate=["gate"]), "w-3": None})
    assert canaries == []
    assert "celery_worker_instances of its host does not declare it" in passed["w-1", "old"]
    assert "--limit" in passed["w-2", "gate"]
    # Of those that the run is about alone.
    assert passed["w-3", ""] == "not collected, so that nothing new is known of its workers: unreachable"
    assert ("w-4", "") not in passed


def test_old_findings_are_refused() -> None:
    document = found(leaks("w-1", "a", memory_max_kb=None, hours_to_memory_max_earliest=None), age_h=30)
    said = r"30\.0 h old, .* run playbooks/collect\.yml first \(diagnose_max_age_h allows 24 h\)"
    with pytest.raises(InputError, match=said):
        chosen(document, {"w-1": None})
    assert chosen(document, {"w-1": runs(a=["a"])}, max_age_h=48)[0]
    # Made by a clock that is ahead.
    assert chosen(found(leaks("w-1", "a"), age_h=-1), {"w-1": runs(a=["a"])})[0]


def test_the_plan_is_said_with_its_time_and_cost() -> None:
    document = found(leaks("w-1", "a"), leaks("w-1", "b", leak_class="native"), down={"w-2": "no\x1broute"})
    declared = {"w-1": runs(a=["a"], b=["b"]), "w-2": None}
    said = plan(document, declared, window_s=60, max_age_h=24, again=False, now=NOW)["say"]
    assert said[0] == "TRACE w-1 celery-worker@a: growing, 100 MiB/h, MemoryMax in 8.0 h; what leaks is not known yet"
    assert said[1].startswith("pass over w-1 celery-worker@b: known already: native")
    assert said[2].startswith("pass over w-2: not collected")
    assert "for 60 s" in said[3] and "2 min 45 s at most" in said[3] and "57 to 72 times at 10" in said[3]
    none = plan(found(leaks("w-1", "a", leaking=False)), declared, window_s=60, max_age_h=24, again=False, now=NOW)
    assert none["say"] == ["No worker is traced: none leaks by these findings"] and none["takes_s"] == 0


# ---- findings.json as it is read ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is not there; run playbooks/collect.yml first"),
        ('{"schema": 1, "gener', "is damaged"),
        ("[]", "schema is not 1"),
        ('{"schema": 2}', "schema is not 1"),
        ('{"schema": 1, "generated": "yesterday"}', "generated is no time"),
        ('{"schema": 1, "generated": "2026-11-24T00:00:00"}', "generated is no time"),
        (json.dumps({**found(), "workers": {}}), "workers is no list"),
        (json.dumps(found({**leaks("w", "a"), "level_kb": "200"})), "workers[0].level_kb"),
        (json.dumps(found({**leaks("w", "a"), "growth_kb_per_hour": True})), "workers[0].growth_kb_per_hour"),
        (json.dumps(found(leaks("w", "a", culprits=[{**LINE, "line": "9"}]))), "workers[0].culprits[0].line"),
    ],
)
def test_a_file_that_is_no_findings_is_named_with_the_way_out(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_findings(path)
    assert str(raised.value).startswith(str(path)) and said in str(raised.value)
    assert "run playbooks/collect.yml" in str(raised.value)


def test_what_analyse_wrote_is_read(tmp_path: Path, capsys: Any) -> None:
    rows = "".join(f"{NOW + 900 * n},7,{60_000 + 500 * n},celery,{unit('gate')},{NOW},child\n" for n in range(120))
    (tmp_path / "w-1.csv").write_text("timestamp,pid,rss_kb,command,unit,start_time,role\n" + rows)
    assert main(["analyse", str(tmp_path / "w-1.csv"), "--out", str(tmp_path)]) == 0
    document = read_findings(tmp_path / "findings.json")
    assert [one["unit"] for one in document["workers"]] == [unit("gate")]


# ---- what came of it ----


def window(name: str, **more: Any) -> dict[str, Any]:
    return {"unit": unit(name), "opened": True, "closed": True, "reason": "window over", "pid": 7, **more}


GREW = {"window_s": 60.0, "rss_growth_kb": 12.0 * MIB, "traced_growth_kb": 100.0}


def told(after: Any, came: Any, *names: str) -> tuple[list[str], int]:
    before = found(*(leaks("w-1", name) for name in names), age_h=1)
    declared = {"w-1": runs(**{name: [name] for name in names})}
    made = plan(before, declared, window_s=60, max_age_h=24, again=False, now=NOW)
    came = json.loads(json.dumps(came))
    said = result(made, came, after)
    return said["say"], said["traced"]


def test_of_each_canary_it_says_the_kind_the_task_and_the_line_or_why_not() -> None:
    after = found(
        leaks("w-1", "a", leak_class="python_objects", culprits=[LINE]),
        leaks("w-1", "b", leak_class="native", culprits=[{**LINE, "file": None, "line": None}]),
        leaks("w-1", "c", leaking=False, pattern="plateau"),
        leaks("w-1", "h"),
    )
    windows = [
        window("h", growth=GREW),
        window("a", growth=GREW),
        window("b", growth=GREW),
        window("c", growth=GREW),
        window("d", growth=GREW),
        window("e", opened=False, closed=False, reason="no process opened the window", growth=None),
        window("f", reason="refused: 9 traced blocks are too many\x1b", growth=None),
    ]
    said, traced = told(after, {"w-1": {"windows": windows, "msg": "celery-worker@g.service\nis failed"}}, *"abcdefgh")
    gained = "in the window its RSS gained 12 MiB, and Python's allocations 100 KiB"
    assert said == [
        "w-1 celery-worker@a: python_objects, task shop.scan at shop/tasks.py:9 in scan: 98 % of the traced growth",
        f"w-1 celery-worker@b: native, task shop.scan, and no line of Python explains the growth: {gained}",
        f"w-1 celery-worker@c: traced, and by what was collected since it does not leak any more (plateau); {gained}",
        "w-1 celery-worker@d: traced, and the report does not have it: its logs were not collected since, see above;"
        f" {gained}",
        "w-1 celery-worker@e: not traced: no process opened the window",
        "w-1 celery-worker@f: no result: refused: 9 traced blocks are too many?",
        "w-1 celery-worker@g: not traced: celery-worker@g.service is failed",
        f"w-1 celery-worker@h: traced, and what leaks is still not known: {gained}; a longer window, or more load, may"
        " tell",
    ]
    assert traced == 5


def test_a_report_that_was_not_made_anew_is_not_taken_for_the_result() -> None:
    as_before = found(leaks("w-1", "a", leak_class="python_objects", culprits=[LINE]), age_h=1)
    said, traced = told(as_before, {"w-1": {"windows": [window("a", growth=GREW)]}}, "a")
    assert "its logs were not collected since" in said[0] and traced == 1


def test_a_host_that_cannot_be_reached_is_told() -> None:
    said, traced = told(found(), {"w-1": {"unreachable": True, "msg": "Connection refused"}}, "a")
    assert said == ["w-1 celery-worker@a: not traced: Connection refused"] and traced == 0
    assert told(found(), {}, "a")[0] == ["w-1 celery-worker@a: not traced: its host was not asked"]


# ---- as the role calls it ----


def test_the_command_plans_and_tells(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    path = tmp_path / "findings.json"
    path.write_text(json.dumps(found(leaks("w-1", "a", leak_class="native"))))
    monkeypatch.setattr("time.time", lambda: NOW + 60)

    def run(stdin: Any, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(stdin)))
        code = main(list(words))
        return code, *capsys.readouterr()

    words = ["canaries", str(path), "--window-s", "5", "--max-age-h", "24"]
    declared = {"w-1": runs(a=["a"])}
    assert json.loads(run(declared, *words)[1])["chosen"] == []
    code, out, err = run(declared, *words, "--all")
    made = json.loads(out)
    assert (code, err) == (0, "") and made["chosen"][0]["unit"] == unit("a") and made["takes_s"] == takes_s(5)
    came = {"w-1": {"windows": [window("a", growth=GREW)]}}
    assert json.loads(run({"plan": made, "came": came}, "diagnosed", str(path))[1])["traced"] == 1
    code, out, err = run(declared, *words[:-1], "0.01")
    assert (code, out) == (2, "") and err.startswith("plimsoll: the findings are 1 min old")
