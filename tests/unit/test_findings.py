"""findings.json: its keys, its order, and that it is JSON whatever was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import plimsoll.findings
import pytest
from plimsoll.findings import Before, findings
from plimsoll.formats import MAX_COUNT, CgroupSample, HostData, Incident, Sample
from plimsoll.lint.catalogue import CACHE
from plimsoll.lint.run import Found
from plimsoll.report import html, text
from plimsoll.store import Host

T0 = 1_763_942_400
GATE, SALES = "celery-worker@gate.service", "celery-worker@sales.service"
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "findings.schema.json").read_text())
WORKER_KEYS = ",".join(SCHEMA["$defs"]["worker"]["properties"])


def up(host: str, reason: str = "") -> Host:
    return {"host": host, "collected": True, "reason": reason, "last": T0}


def down(host: str, last: float | None = None) -> Host:
    return {"host": host, "collected": False, "reason": "unreachable", "last": last}


def samples(unit: str, rate: float, hours: int = 30, pid: int = 7, start: float = T0) -> list[Sample]:
    """One process, sampled every quarter of an hour; rate in KiB an hour."""
    return [
        Sample(start + 900 * n, pid, int(60_000 + rate * n / 4), "celery", unit, start, "child", tasks=10 * n)
        for n in range(4 * hours)
    ]


def figures(unit: str, high: int | None, most: int | None, level: int = 200_000) -> list[CgroupSample]:
    return [CgroupSample(T0 + 900 * n, unit, level, high, most) for n in range(5)]


def records(unit: str) -> list[dict[str, Any]]:
    one = {"file": "/x/tasks.py", "line": 9, "function": "scan", "growth_kb": 500}
    head = {"unit": unit, "pid": 7}
    return [
        {**head, "kind": "task_growth", "time": 1, "task": "shop.scan", "count": 9, "rss_growth_kb": 700},
        {**head, "kind": "window_open", "time": 1, "rss_kb": 90_000},
        {**head, "kind": "growth", "time": 2, "rss_growth_kb": 700, "sites": [one], "tasks": {}},
        {**head, "kind": "window_close", "time": 3, "rss_kb": 90_700},
    ]


def made(*read: tuple[Host, HostData | None]) -> dict[str, Any]:
    """The document as a reader gets it; every one of these tests holds it to the schema that is documented."""
    document = json.loads(json.dumps(findings(read, T0)[0], allow_nan=False))
    jsonschema.validate(document, SCHEMA)
    return document


def test_the_document_has_the_keys_that_are_documented() -> None:
    data = HostData("w-1", samples(GATE, 2000), figures(GATE, 300_000, 400_000), records(GATE))
    document = made((up("w-1"), data), (down("w-2"), None))
    assert list(document) == ["schema", "generated", "fleet", "changes", "workers", "hosts"]
    assert document["fleet"] == {
        **{"hosts": 2, "collected": 1, "workers": 1, "leaking": 1},
        "soonest": {
            "host": "w-1",
            "unit": GATE,
            "limit": "MemoryHigh",
            "hours": document["workers"][0]["hours_to_memory_high"],
        },
    }
    assert document["changes"] == {"since": None, "leaking": [], "mended": [], "named": [], "gone": []}
    assert (document["schema"], document["generated"]) == (1, "2025-11-24T00:00:00+00:00")
    (one,) = document["workers"]
    assert ",".join(one) == WORKER_KEYS
    assert (one["host"], one["unit"], one["leaking"], one["pattern"]) == ("w-1", GATE, True, "growing")
    assert one["growth_kb_per_hour"] == pytest.approx(2000, rel=0.01)
    assert one["growth_low"] <= one["growth_kb_per_hour"] <= one["growth_high"]
    assert one["growth_kb_per_1000_tasks"] == pytest.approx(50_000, rel=0.02)
    assert (one["generations"], one["samples"], one["span_hours"]) == (1, 120, 29.75)
    assert (one["level_kb"], one["memory_high_kb"], one["memory_max_kb"]) == (200_000, 300_000, 400_000)
    assert one["hours_to_memory_high"] == pytest.approx(50, rel=0.02)
    assert one["hours_to_memory_high_earliest"] < one["hours_to_memory_high"] < one["hours_to_memory_high_latest"]
    assert 0.99 < one["confidence"] < 1
    assert one["hours_to_memory_max"] == pytest.approx(100, rel=0.02)
    assert (one["leak_class"], one["remedy"]) == ("python_objects", None)
    (culprit,) = one["culprits"]
    assert ",".join(culprit) == "task,task_share,file,line,function,growth_kb,share,windows,package,caller"
    assert (culprit["task"], culprit["line"]) == ("shop.scan", 9)
    assert one["evidence"] == [
        "1 of 1 processes that were judged grew, and went on to the end",
        "traced for 0 s: RSS gained 0.684 MiB, and Python's lines 0.488 MiB",
    ]
    assert (one["holds"], one["advice"]["link"]) == ([], "docs/leaks.md#python-objects")
    assert document["hosts"] == [
        {"host": "w-1", "collected": True, "reason": "", "last": T0},
        {"host": "w-2", "collected": False, "reason": "unreachable", "last": None},
    ]


def test_a_host_that_was_not_collected_is_judged_by_what_there_is_of_it() -> None:
    data = HostData("w-1", samples(GATE, 2000), problems=["part: damaged"])
    document = made((down("w-1", T0), data), (down("w-2"), HostData("w-2", problems=["part: damaged"])))
    assert [(one["host"], one["leaking"]) for one in document["workers"]] == [("w-1", True)]
    assert (document["fleet"]["hosts"], document["fleet"]["collected"]) == (2, 0)
    said = {"collected": False, "reason": "unreachable; part: damaged"}
    assert document["hosts"] == [{"host": "w-1", **said, "last": T0}, {"host": "w-2", **said, "last": None}]


def test_a_worker_that_does_not_leak_has_no_culprit_and_no_time_left() -> None:
    (one,) = made((up("w-1"), HostData("w-1", samples(GATE, 0), figures(GATE, 1, 2), records(GATE))))["workers"]
    assert (one["leaking"], one["pattern"], one["confidence"]) == (False, "plateau", None)
    assert (one["culprits"], one["leak_class"], one["evidence"]) == ([], "unknown", [])
    assert one["hours_to_memory_high"] is one["hours_to_memory_max"] is None
    assert (one["memory_high_kb"], one["memory_max_kb"]) == (1, 2)


def test_what_was_not_measured_is_null() -> None:
    plain = [sample._replace(tasks=None, unit="", start_time=None, role="") for sample in samples("", 2000)]
    (one,) = made((up("w-1"), HostData("w-1", plain)))["workers"]
    assert (one["unit"], one["pattern"]) == ("celery", "growing")
    for name in ("growth_kb_per_1000_tasks", "level_kb", "memory_high_kb", "memory_max_kb", "hours_to_memory_max"):
        assert one[name] is None
    assert "no tracing window has closed yet, so that no line is named; diagnose.yml opens one" in one["evidence"]


def test_records_are_those_of_the_workers_own_unit() -> None:
    data = HostData(
        "w-1", samples(GATE, 2000) + samples(SALES, 2000, pid=8), traces=[*records(GATE), {"kind": "x", "time": 1}]
    )
    assert {one["unit"]: len(one["culprits"]) for one in made((up("w-1"), data))["workers"]} == {GATE: 1, SALES: 0}


def test_leaks_come_first_and_those_with_the_least_time_left_before_others() -> None:
    def worker(unit: str, rate: float, most: int | None) -> tuple[list[Sample], list[CgroupSample]]:
        return samples(unit, rate), figures(unit, None, most)

    hosts = {
        "b": [worker("flat", 0, 210_000), worker("soon", 2000, 250_000)],
        "a": [worker("later", 9000, 900_000), worker("no limit", 3000, None), worker("no limit, faster", 5000, None)],
        "c": [worker("flat", 0, 210_000)],
    }
    read = [
        (up(name), HostData(name, [s for each, _ in units for s in each], [f for _, each in units for f in each]))
        for name, units in hosts.items()
    ]
    document, verdicts = findings(read, T0)
    assert [(one["host"], one["unit"]) for one in document["workers"]] == [
        ("b", "soon"),
        ("a", "later"),
        ("a", "no limit, faster"),
        ("a", "no limit"),
        ("b", "flat"),
        ("c", "flat"),
    ]
    assert [(one.worker.host, one.worker.unit) for one in verdicts] == [
        (one["host"], one["unit"]) for one in document["workers"]
    ]
    assert document["fleet"]["leaking"] == 4
    assert [one["host"] for one in document["hosts"]] == ["b", "a", "c"]


def test_a_line_that_the_checks_know_carries_its_mend() -> None:
    data = HostData("w-1", samples(GATE, 2000), [], records(GATE))
    known = Found(Path("tasks.py"), 9, None, CACHE, "_seen is a cache without a bound; give it one", "_seen", "", "")
    document, verdicts = findings([(up("w-1"), data)], T0, checked=[known])
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)
    (one,) = document["workers"]
    assert [(mend["symbol"], mend["file"], mend["line"]) for mend in one["mends"]] == [(CACHE, "tasks.py", 9)]
    assert CACHE in one["checks"] and "cached-method" not in one["checks"]
    said = " ".join(text(document, verdicts).split())
    assert f"mend tasks.py:9: _seen is a cache without a bound; give it one ({CACHE})" in said
    assert "mend tasks.py:9: _seen" in html(document, verdicts)


def test_what_changed_since_the_last_findings() -> None:
    def fleet(*units: tuple[str, float, bool], now: float = T0, before: Before | None = None) -> Any:
        data = HostData(
            "w-1",
            [one for unit, rate, _ in units for one in samples(unit, rate)],
            traces=[one for unit, _, line in units for one in records(unit)[: None if line else 1]],
        )
        document = json.loads(json.dumps(findings([(up("w-1"), data)], now, before)[0]))
        jsonschema.validate(document, SCHEMA)
        return document

    first = fleet(
        ("still", 2000, True), ("named", 2000, False), ("mended", 2000, True), ("gone", 2000, True), ("new", 0, False)
    )
    units = (
        ("still", 2000, True),
        ("named", 2000, True),
        ("mended", 0, True),
        ("new", 2000, True),
        ("unknown", 2000, False),
    )
    told = fleet(*units, before=Before.of(first))["changes"]
    assert told.pop("since") == first["generated"]
    assert {what: [one["unit"] for one in which] for what, which in told.items()} == {
        "leaking": ["new", "unknown"],
        "mended": ["mended"],
        "named": ["named"],
        "gone": ["gone"],
    }
    again = fleet(*units, before=Before.of(fleet(*units)))["changes"]
    assert [which for what, which in again.items() if what != "since"] == [[], [], [], []]


def test_the_soonest_limit_is_of_a_leak_and_a_kill_comes_before_a_slowdown() -> None:
    reached = [figures(GATE, 50_000, 50_000)]
    data = HostData("w-1", samples(GATE, 2000), [one for each in reached for one in each])
    assert made((up("w-1"), data))["fleet"]["soonest"] == {
        "host": "w-1",
        "unit": GATE,
        "limit": "MemoryMax",
        "hours": 0,
    }
    calm = HostData("w-1", samples(GATE, 0), figures(GATE, 50_000, 50_000))
    assert made((up("w-1"), calm))["fleet"]["soonest"] is None


def test_a_host_that_sent_nothing_or_damage_says_so() -> None:
    document = made(
        (up("w-1"), HostData("w-1")),
        (up("w-2", "old bundle"), HostData("w-2", samples(GATE, 0, 1), problems=[f"p{n}" for n in range(9)])),
    )
    assert [one["reason"] for one in document["hosts"]] == [
        "no samples: is plimsoll-sampler.service running there?",
        "old bundle; p0; p1; p2",
    ]


def test_many_hosts_are_judged_by_other_processes_and_the_answer_is_the_same(monkeypatch: Any) -> None:
    read = [
        (up(f"w-{n}"), HostData(f"w-{n}", samples(GATE, 500 * n), (), records(GATE)) if n != 5 else None)
        for n in range(12)
    ]
    alone = made(*read)
    begun: list[int] = []
    pool = plimsoll.findings.ProcessPoolExecutor
    monkeypatch.setattr(plimsoll.findings, "ProcessPoolExecutor", lambda: (begun.append(1), pool(2))[1])
    monkeypatch.setattr(plimsoll.findings, "WORTH_A_POOL", 3)
    assert made(*read) == alone
    assert begun == [1]
    assert [one["host"] for one in alone["hosts"]] == [f"w-{n}" for n in range(12)]


def test_nothing_read_is_a_document_too() -> None:
    document = made()
    assert (document["workers"], document["hosts"]) == ([], [])


def test_one_host_is_read_at_a_time() -> None:
    """A fleet's samples do not fit into memory; what is kept of each is its series."""
    order = []

    def reading() -> Any:
        for host in ("w-1", "w-2"):
            order.append(host)
            yield up(host), HostData(host, samples(GATE, 0))

    document, _ = findings(reading(), T0)
    assert order == [one["host"] for one in document["hosts"]] == ["w-1", "w-2"]


ODD: dict[str, list[Sample]] = {
    "one sample": samples(GATE, 0, 1)[:1],
    "all at one time": [one._replace(timestamp=5.0) for one in samples(GATE, 9000)],
    "at the start of time": [one._replace(timestamp=n / 1000) for n, one in enumerate(samples(GATE, 9000))],
    "at its end": [one._replace(timestamp=1e11 - 1 - n) for n, one in enumerate(samples(GATE, -9))],
    "as much as a file can say": [
        one._replace(rss_kb=MAX_COUNT - 1, swap_kb=MAX_COUNT - 1) for one in samples(GATE, 0)
    ],
    "from nothing to that, in a moment": [
        Sample(n / 1000, 7, n * (MAX_COUNT // 200), "x", GATE, tasks=n) for n in range(120)
    ],
    "tasks without end": [one._replace(tasks=MAX_COUNT - 1 - n) for n, one in enumerate(samples(GATE, 9000))],
    "names that lie": [one._replace(unit="\x1b<b>\ud800", command="x") for one in samples(GATE, 9000)],
    "each a process of its own": [one._replace(pid=n, start_time=n) for n, one in enumerate(samples(GATE, 9000))],
    "each a worker of its own": [one._replace(unit=f"u{n}") for n, one in enumerate(samples(GATE, 9000))],
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("most", [None, 0, 1, MAX_COUNT - 1])
def test_the_document_is_json_whatever_was_read(odd: str, most: int | None) -> None:
    unit = ODD[odd][0].unit
    data = HostData(
        "h", ODD[odd], figures(unit, most, most, MAX_COUNT - 1), [{**one, "unit": unit} for one in records(unit)]
    )
    document = made((up("h"), data))
    assert document["workers"]
    for one in document["workers"]:
        assert ",".join(one) == WORKER_KEYS
        assert one["hours_to_memory_max"] is None or one["hours_to_memory_max"] >= 0


def test_who_asked_for_a_window_is_told_what_it_showed_though_the_worker_does_not_leak_by_now() -> None:
    asked = [{**one, "id": "a1"} if one["kind"] == "growth" else one for one in records(GATE)]
    (one,) = made((up("w-1"), HostData("w-1", samples(GATE, 0), traces=asked)))["workers"]
    assert not one["leaking"] and one["culprits"][0]["line"] == 9 and one["leak_class"] == "python_objects"
    (one,) = made((up("w-1"), HostData("w-1", samples(GATE, 0), traces=records(GATE))))["workers"]
    assert (one["culprits"], one["leak_class"], one["evidence"]) == ([], "unknown", [])


def incident(second: float, message: str, source: str = "systemd", unit: str = GATE, times: int = 1) -> Incident:
    return Incident(T0 + second, unit, source, message, times)


def told(rate: float, *happened: Incident) -> list[str]:
    """The evidence beside that of a worker to which nothing happened."""
    data = [HostData("w-1", samples(GATE, rate), incidents=some) for some in ((), happened)]
    without, evidence = (made((up("w-1"), one))["workers"][0]["evidence"] for one in data)
    assert evidence[: len(without)] == without
    return evidence[len(without) :]


def test_what_happened_to_a_worker_that_leaks_is_evidence_the_newest_first() -> None:
    kill = incident(60, "Memory cgroup out of memory: Killed process 812 (celery)", "kernel")
    loop = incident(180, f"{GATE}: Failed with result 'oom-kill'.", times=12)
    guard = incident(120, "restart: 347 MiB of 342 MiB", "guard")
    oldest, others = incident(0, "oldest"), incident(999, "x", unit=SALES)
    assert told(2000, oldest, kill, others, loop, guard) == [
        "2025-11-24 00:03 UTC, systemd: Failed with result 'oom-kill'. (12 times)",
        "2025-11-24 00:02 UTC, guard: restart: 347 MiB of 342 MiB",
        "2025-11-24 00:01 UTC, kernel: Memory cgroup out of memory: Killed process 812 (celery)",
    ]
    assert told(0, oldest, kill, others, loop, guard) == []


def test_a_line_of_what_happened_is_short_and_fit_to_print_whatever_a_host_said() -> None:
    (said,) = told(2000, incident(0, "\x1b[2J  a\t\n b\u202e " + "x" * 5000, "y" * 5000, times=10**12))
    assert said.startswith("2025-11-24 00:00 UTC, yyyyyyyyyyyyyyyyyyy…: ?[2J a b? xxx")
    assert len(said) == 160 and said.endswith("xxx… (1000000000000 times)") and said.isprintable()
