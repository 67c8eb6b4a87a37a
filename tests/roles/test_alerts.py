"""The alerts by promtool on series: each fires on its fault, and none on a healthy day; the routes by amtool."""

from __future__ import annotations

import bisect
import csv
import io
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from labelled.recordings import Recording, recordings
from test_rendered_units import plugins, rendered

# What renders them needs Ansible's plugins: a fixture of all tests here, too.
__all__ = ["plugins"]

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 1 << 20, 1 << 30
UNIT, HOST = "celery-worker@gate.service", "worker-1"
OF = f'job="plimsoll",instance="{HOST}",unit="{UNIT}"'
INFO = f'plimsoll_worker_info{{{OF},pool="prefork",queues="gate,mail",concurrency="2"}}'


def run(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "plimsoll.yml"
    path.write_text(rendered("prometheus/plimsoll.rules.yml.j2", groups={}))
    run("promtool", "check", "rules", path)
    return path


def worker(
    level: Callable[[int], float],
    minutes: int,
    *,
    high: float = GIB,
    swap: Callable[[int], float] = lambda minute: 0,
    cache: float = 0,
    pressure: float = 0,
    up: int = 1,
    **counters: Callable[[int], float],
) -> dict[str, Iterable[float]]:
    """Series of a worker of one process by the minute: level and swap of it in bytes, pressure in seconds a second."""
    span = range(minutes + 1)
    return {
        f'up{{job="plimsoll",instance="{HOST}"}}': [up for _ in span],
        f'plimsoll_sampler_last_sample_timestamp_seconds{{job="plimsoll",instance="{HOST}"}}': [60 * n for n in span],
        INFO: [1 for _ in span],
        f'plimsoll_worker_resident_memory_bytes{{{OF},role="main"}}': [80 * MIB for _ in span],
        f'plimsoll_worker_resident_memory_bytes{{{OF},role="child"}}': [level(n) for n in span],
        f'plimsoll_worker_swap_bytes{{{OF},role="main"}}': [0 for _ in span],
        f'plimsoll_worker_swap_bytes{{{OF},role="child"}}': [swap(n) for n in span],
        f"plimsoll_worker_memory_bytes{{{OF}}}": [80 * MIB + level(n) + cache for n in span],
        f"plimsoll_worker_memory_level_bytes{{{OF}}}": [80 * MIB + level(n) for n in span],
        f"plimsoll_worker_memory_high_bytes{{{OF}}}": [high for _ in span],
        f'plimsoll_worker_memory_pressure_seconds_total{{{OF},kind="some"}}': [60 * pressure * n for n in span],
        f'plimsoll_worker_memory_events_total{{{OF},event="oom_kill"}}': [
            counters.get("killed", still)(n) for n in span
        ],
        f"plimsoll_worker_failed{{{OF}}}": [counters.get("failed", still)(n) for n in span],
        f"plimsoll_worker_restarts_total{{{OF}}}": [counters.get("restarts", still)(n) for n in span],
        f'plimsoll_guard_acts_total{{{OF},act="restart"}}': [counters.get("guarded", still)(n) for n in span],
        f'plimsoll_guard_acts_total{{{OF},act="budget_spent"}}': [counters.get("spent", still)(n) for n in span],
    }


def still(minute: int) -> float:
    return 0


def write_test(rules: Path, folder: Path, series: Mapping[str, Iterable[float]], minutes: int, **asked: Any) -> Path:
    """A test of promtool: series with a value each so many minutes, a `_` for none."""
    listed = [
        {"series": name, "values": " ".join("_" if value is None else f"{value:g}" for value in values)}
        for name, values in series.items()
    ]
    every = f"{minutes}m"
    test = {"interval": every, "input_series": listed, **asked}
    path = folder / "test.yml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": every, "tests": [test]}, width=1e9)
    )
    return path


def labels_of(text: str) -> dict[str, str]:
    return {name: json.loads(f'"{value}"') for name, value in re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', text)}


def alerts(
    rules: Path, folder: Path, series: Mapping[str, Iterable[float]], minute: int
) -> dict[tuple[str, str], dict[str, str]]:
    """Those that fire at a minute, by name (without Plimsoll) and severity: labels and annotations."""
    # promtool says what there is where it is not what was expected, and has no other way to ask.
    nothing = [{"exp_labels": {"not": "so"}}]
    names = sorted(set(re.findall(r"alert: (\w+)", rules.read_text())))
    asked = [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": nothing} for name in names]
    path = write_test(rules, folder, series, 1, alert_rule_test=asked)
    ran = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    assert said.count("got:") == len(names), said
    found = {}
    for part in said.split("got:")[1:]:
        for labels, texts in re.findall(r"Labels:\{(.*)\}\s+Annotations:\{(.*)\}", part.partition("alertname: ")[0]):
            one = {**labels_of(labels), **labels_of(texts)}
            found[one["alertname"].removeprefix("Plimsoll"), one["severity"]] = one
    return found


@pytest.fixture
def ask(rules: Path, tmp_path: Path) -> Callable[..., dict[tuple[str, str], dict[str, str]]]:
    return lambda series, minute: alerts(rules, tmp_path, series, minute)


def test_each_alert_has_its_page_and_its_line_in_the_table(rules: Path) -> None:
    (group,) = (one for one in yaml.safe_load(rules.read_text())["groups"] if one["name"] == "plimsoll_alerts")
    text = (ROOT / "docs" / "alerts.md").read_text()
    pages = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    for one in group["rules"]:
        page = one["annotations"]["runbook_url"].removeprefix("docs/alerts.md#")
        assert page in pages and f"| [{one['alert']}](#{page}) |" in text, one["alert"]
        assert one["labels"]["severity"] in re.findall(rf"^\| \[{one['alert']}\]\S* \| (.*?) \|", text, re.MULTILINE)[0]


# ---- each on its fault ----


def test_a_worker_that_nears_memory_high_says_when_and_what_to_do(ask: Any) -> None:
    # 2 MiB a minute, with a task each now and then that takes 100 MiB.
    leak = worker(lambda n: (650 + 2 * n + 100 * (n % 7 == 3)) * MIB, 120)
    assert set(ask(leak, 60)) == set(), "the floor of an hour is not known yet"
    found = ask(leak, 120)
    assert set(found) == {("MemoryHighSoon", "warning")}
    alert = found["MemoryHighSoon", "warning"]
    assert alert["summary"] == f"{UNIT} on {HOST} meets MemoryHigh in 0.6 h, if it does not only warm up"
    assert "rose by 120MiB an hour, and it is known for less than 24 h (queues gate,mail). " in alert["description"]
    assert f"playbooks/diagnose.yml --limit {HOST}." in alert["description"]
    assert f"playbooks/remediate.yml --limit {HOST} --check --diff" in alert["description"]
    assert (alert["queues"], alert["runbook_url"]) == ("gate,mail", "docs/alerts.md#memory-high-soon")


def test_what_goes_where_it_was_not_in_a_day_wakes_somebody_and_what_comes_back_each_day_nobody(ask: Any) -> None:
    day = 24 * 60
    found = ask(worker(lambda n: (600 + 2 * max(0, n - day)) * MIB, day + 150), day + 150)
    assert set(found) == {("MemoryHighSoon", "critical")}
    said = f"{UNIT} on {HOST} meets MemoryHigh in 0.5 h, and has not been there in 24 h"
    assert found["MemoryHighSoon", "critical"]["summary"] == said
    # What fills the rest with page cache has been everywhere, and is no memory of its own.
    cached = worker(lambda n: (600 + 2 * max(0, n - day)) * MIB, day + 150, cache=200 * MIB)
    assert ask(cached, day + 150)["MemoryHighSoon", "critical"]["summary"] == said
    tide = worker(lambda n: (600 + 2 * max(0, n % day - day + 170)) * MIB, 2 * day - 10)
    assert set(ask(tide, day - 10)) == {("MemoryHighSoon", "warning")}
    assert ask(tide, 2 * day - 10) == {}


@pytest.mark.parametrize(
    ("level", "why"),
    [
        (lambda n: (300 + 2 * n) * MIB, "it has room for hours, and how it goes on is for the collection to say"),
        (lambda n: (700 + 30 * (n > 91)) * MIB, "a step"),
        (lambda n: (700 + n % 60) * MIB, "a sawtooth"),
        (lambda n: (700 + 100 * (n % 5 == 1)) * MIB, "spikes"),
        (lambda n: (850 - 200 * (n >= 70) + 2 * max(0, n - 70)) * MIB, "a restart"),
        (lambda n: 700 * MIB + n * 20_000, "1 MiB an hour"),
        (lambda n: (100 + n / 20) * MIB, "3 MiB an hour in a tenth of its memory"),
    ],
)
def test_what_does_not_near_it_wakes_nobody(ask: Any, level: Callable[[int], float], why: str) -> None:
    assert ask(worker(level, 120), 120) == {}, why
    if max(map(level, range(121))) < 200 * MIB:
        assert ask(worker(level, 120, cache=900 * MIB), 120) == {}, "all of the rest is page cache"


LEAK = f'job="plimsoll-collect",instance="control-1",host="{HOST}",unit="{UNIT}",leak_class="python_objects"'


def found_leak(hours: float | None = None, minutes: int = 30) -> dict[str, Iterable[float]]:
    """As the last collection tells it."""
    span = range(minutes + 1)
    series: dict[str, Iterable[float]] = {
        f"plimsoll_collect_leak_growth_bytes_per_hour{{{LEAK}}}": [12 * MIB for _ in span],
        f'plimsoll_collect_leak_info{{{LEAK},task="shop.scan",line="shop/tasks.py:9"}}': [1 for _ in span],
    }
    if hours is not None:
        series[f"plimsoll_collect_leak_memory_high_hours{{{LEAK}}}"] = [hours for _ in span]
    return {**worker(lambda n: 300 * MIB, minutes), **series}


def test_a_leak_that_was_found_names_its_task_and_line(ask: Any) -> None:
    (alert,) = ask(found_leak(), 30).values()
    assert (alert["alertname"], alert["severity"], alert["instance"]) == ("PlimsollLeak", "warning", HOST)
    assert alert["summary"] == f"{UNIT} on {HOST} leaks 12MiB an hour" and alert["queues"] == "gate,mail"
    said = (
        "By the last collection: python_objects (queues gate,mail). Task shop.scan. Line shop/tasks.py:9. Who and why: "
    )
    assert alert["description"].startswith(said)
    assert ask(found_leak(20.0), 30)["Leak", "warning"]["summary"].endswith("an hour, and meets MemoryHigh in 20.0 h")
    soon = ask(found_leak(3.0), 30)
    assert set(soon) == {("Leak", "warning"), ("Leak", "critical")}
    assert soon["Leak", "critical"]["summary"] == f"{UNIT} on {HOST} leaks, and meets MemoryHigh in 3.0 h"
    assert "It grows by 12MiB an hour by the last collection: python_objects" in soon["Leak", "critical"]["description"]


@pytest.mark.parametrize("of", ["killed", "restarts", "guarded", "spent"])
def test_what_is_counted_fires_once_it_rises_and_ends_by_itself(ask: Any, of: str) -> None:
    names = {
        "killed": ("OOMKill", "critical"),
        "restarts": ("RestartLoop", "critical"),
        "guarded": ("GuardBusy", "warning"),
        "spent": ("GuardBusy", "critical"),
    }
    # Five in five minutes, half an hour after they were first seen.
    series = worker(lambda n: 300 * MIB, 200, **{of: lambda n: min(5, max(0, n - 30))})
    assert ask(series, 29) == {}
    found = ask(series, 38)
    assert set(found) == {names[of]} and found[names[of]]["queues"] == "gate,mail"
    # Acts of the guard count for a day.
    assert set(ask(series, 200)) == ({names[of]} if of == "guarded" else set())


def test_a_restart_or_two_are_no_loop(ask: Any) -> None:
    few = worker(lambda n: 300 * MIB, 60, restarts=lambda n: 3 * (n > 30), guarded=lambda n: 2 * (n > 30))
    assert ask(few, 40) == {}


def test_increase_makes_no_four_restarts_of_three(rules: Path, tmp_path: Path) -> None:
    """Between two samples it is extrapolated."""
    of = f"plimsoll_worker_restarts_total{{{OF}}}"
    expression = next(
        one["expr"]
        for group in yaml.safe_load(rules.read_text())["groups"]
        for one in group["rules"]
        if one.get("alert") == "PlimsollRestartLoop"
    )
    asked = [{"expr": expression, "eval_time": f"30m{second}s", "exp_samples": []} for second in range(0, 60, 7)]
    series = {of: [3 * (n > 20) for n in range(41)]}
    run("promtool", "test", "rules", write_test(rules, tmp_path, series, 1, promql_expr_test=asked))


def test_a_worker_that_systemd_has_given_up_is_told_though_it_has_no_cgroup(ask: Any) -> None:
    failed = worker(lambda n: 300 * MIB, 40, failed=lambda n: n > 30)
    assert ask(failed, 30) == {} and set(ask(failed, 40)) == {("WorkerFailed", "critical")}


def test_a_host_that_says_one_worker_twice_silences_no_other(ask: Any) -> None:
    series = worker(lambda n: 300 * MIB, 40, killed=lambda n: n > 35)
    series |= {name.replace(HOST, "evil"): values for name, values in series.items()}
    again = INFO.replace(HOST, "evil").replace('queues="gate,mail"', 'queues="x"')
    series[again] = [1 for _ in range(41)]
    found = ask(series, 40)
    assert set(found) == {("OOMKill", "critical")}


def test_what_a_host_calls_its_units_is_no_query(ask: Any) -> None:
    evil = "x'} or vector(42) or up{a='"
    series = {name.replace(UNIT, evil): values for name, values in found_leak().items()}
    summary = ask(series, 30)["Leak", "warning"]["summary"]
    assert summary == f"{evil} on {HOST} leaks 12MiB an hour"


def test_a_worker_whose_main_process_is_gone_alarms_without_its_queues(ask: Any) -> None:
    series = worker(lambda n: 300 * MIB, 40, restarts=lambda n: max(0, n - 25))
    series[INFO] = [1 if n < 20 else None for n in range(41)]  # type: ignore[list-item]
    # For ten minutes it may just be restarted.
    assert ask(series, 29)["RestartLoop", "critical"]["queues"] == "gate,mail"
    alert = ask(series, 40)["RestartLoop", "critical"]
    assert "queues" not in alert and "It takes few tasks or none. Why: " in alert["description"]


def test_a_worker_is_held_at_memory_high_only_where_it_waits_for_memory(ask: Any) -> None:
    held = worker(lambda n: 940 * MIB, 30, pressure=0.3)
    assert set(ask(held, 30)) == {("HeldAtMemoryHigh", "critical")}
    assert ask(held, 30)["HeldAtMemoryHigh", "critical"]["summary"].endswith("is held at MemoryHigh, at 1020MiB")
    # Page cache fills a cgroup, and the kernel takes it back.
    assert ask(worker(lambda n: 300 * MIB, 30, cache=640 * MIB), 30) == {}
    assert ask(worker(lambda n: 300 * MIB, 30, pressure=0.3), 30) == {}


def test_a_leak_that_goes_into_swap_is_seen(ask: Any) -> None:
    swapped = worker(lambda n: 300 * MIB, 90, swap=lambda n: 2 * n * MIB)
    assert set(ask(swapped, 90)) == {("SwapGrowing", "warning")}
    # It is held at its limit, and its RSS does not grow any more.
    full = worker(lambda n: 840 * MIB, 120, swap=lambda n: 2 * n * MIB)
    assert set(ask(full, 120)) == {("SwapGrowing", "warning"), ("MemoryHighSoon", "warning")}
    assert ask(worker(lambda n: 300 * MIB, 90, swap=lambda n: 200 * MIB), 90) == {}


def test_a_host_that_says_nothing_and_one_that_cannot_be_asked(ask: Any) -> None:
    silent = worker(lambda n: 300 * MIB, 30)
    stamp = next(name for name in silent if "last_sample" in name)
    silent[stamp] = [60 * min(n, 20) for n in range(31)]
    found = ask(silent, 30)
    assert set(found) == {("SamplerSilent", "warning")}
    assert found["SamplerSilent", "warning"]["summary"] == f"The last sample of {HOST} is 10m 0s old"
    gone = {f'up{{job="plimsoll",instance="{HOST}"}}': [1] * 20 + [0] * 20}
    assert ask(gone, 22) == {} and set(ask(gone, 30)) == {("HostUnreachable", "critical")}


def test_a_broker_that_does_not_answer_for_long_enough(ask: Any) -> None:
    series = {'plimsoll_queues_up{job="plimsoll-queues",instance="w-1:9254"}': [1] * 20 + [0] * 20}
    assert ask(series, 22) == {} and set(ask(series, 30)) == {("BrokerSilent", "critical")}


def test_what_tells_of_queues_and_leaks_is_watched_too(ask: Any) -> None:
    for job in ("queues", "collect"):
        series = {f'up{{job="plimsoll-{job}",instance="w-1:9"}}': [1] * 20 + [0] * 20}
        assert ask(series, 22) == {} and set(ask(series, 30)) == {("TargetDown", "critical")}, job


def test_two_control_nodes_that_found_the_same_are_one(ask: Any) -> None:
    series = found_leak(3.0)
    series |= {name.replace("control-1", "control-2"): values for name, values in series.items()}
    assert set(ask(series, 30)) == {("Leak", "warning"), ("Leak", "critical")}


def test_a_collection_that_missed_a_host_or_failed_or_did_not_come(ask: Any) -> None:
    of = 'job="plimsoll-collect",instance="control-1"'
    span = range(121)
    good: dict[str, Iterable[float]] = {
        f"plimsoll_collect_last_success_timestamp_seconds{{{of}}}": [0 for _ in span],
        f'plimsoll_collect_result{{{of},result="ok"}}': [1 for _ in span],
        f'plimsoll_collect_result{{{of},result="failed"}}': [0 for _ in span],
    }
    assert ask(good, 120) == {}
    missed = ask({**good, f'plimsoll_collect_host_missing{{{of},host="w-9"}}': [1 for _ in span]}, 120)
    alert = missed["HostNotCollected", "warning"]
    # By the host, whose being down holds it back.
    assert (alert["summary"], alert["instance"]) == ("The last collection did not reach w-9", "w-9")
    failed = ask({**good, f'plimsoll_collect_result{{{of},result="failed"}}': [1 for _ in span]}, 120)
    assert failed["CollectFailed", "warning"]["summary"] == "The fleet is not collected: failed"
    old = {name: [one - 94_000 for one in values] if "success" in name else values for name, values in good.items()}
    assert set(ask(old, 120)) == {("CollectFailed", "warning")}


# ---- real workers ----

# The recordings of tests/labelled stand for days, with a sample each six minutes or twelve. Here six are one minute, as
# promtool loses series in what is longer than a day and a half; so the windows stand for three hours and twelve.
EVERY_S = 360
WINDOWS = {
    **{"prometheus_floor_minutes": 5, "prometheus_growth_minutes": 30, "prometheus_high_hours": 2},
    **{"prometheus_high_for": "5m", "prometheus_growth_least_mb": 0.3, "prometheus_history_hours": 4},
}
# Where the peaks are not the leak's, it does not near them.
PEAKS = ("leak_with_peaks", "leak_under_swing")


def level_of(recording: Recording) -> list[float]:
    """RSS of all its processes in bytes, each EVERY_S."""
    total: dict[float, float] = {}
    for row in csv.DictReader(io.StringIO(recording.text)):
        at = float(row["timestamp"])
        total[at] = total.get(at, 0.0) + int(row["rss_kb"]) * 1024.0
    times = list(total)
    grid = [times[0] + EVERY_S * n for n in range(int((times[-1] - times[0]) // EVERY_S) + 1)]
    return [total[times[bisect.bisect(times, at) - 1]] for at in grid]


def firsts(folder: Path, room: float) -> dict[str, dict[str, float]]:
    """By severity the units that alarm, and when first. Healthy workers have a MemoryHigh of room times their peak."""
    rules = folder / "rules.yml"
    rules.write_text(rendered("prometheus/plimsoll.rules.yml.j2", groups={}, **WINDOWS))
    series: dict[str, list[float]] = {}
    for name, (level, leaking) in LEVELS.items():
        unit = f'job="plimsoll",instance="{HOST}",unit="{name}"'
        high = max(level) * (1 if leaking else room)
        series[f'plimsoll_worker_resident_memory_bytes{{{unit},role="main"}}'] = level
        series[f'plimsoll_worker_swap_bytes{{{unit},role="main"}}'] = [0] * len(level)
        series[f"plimsoll_worker_memory_level_bytes{{{unit}}}"] = level
        series[f"plimsoll_worker_memory_high_bytes{{{unit}}}"] = [high] * len(level)
    last = max(map(len, series.values()))
    asked = {
        "expr": f'min_over_time((timestamp(ALERTS{{alertstate="firing"}}))[{last - 1}m:1m])',
        **{"eval_time": f"{last}m", "exp_samples": [{"labels": "none", "value": 0}]},
    }
    path = write_test(rules, folder, series, 1, promql_expr_test=[asked])
    ran = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    found: dict[str, dict[str, float]] = {"critical": {}, "warning": {}}
    for labels, at in re.findall(r"\{(.*?)\} (\S+?)(?:,|\s|$)", (ran.stdout + ran.stderr).partition("got:")[2]):
        one = labels_of(labels)
        found[one["severity"]][one["unit"]] = float(at)
    return found


LEVELS = {one.name: (level_of(one), one.leaking) for one in recordings()}
HEALTHY = {name for name, (_, leaking) in LEVELS.items() if not leaking}


def test_real_workers_that_leak_alarm_before_they_meet_memory_high_and_healthy_ones_never(tmp_path: Path) -> None:
    """One that leaks is at MemoryHigh in the end; a healthy one has a fifth of it free at its peak."""
    found = firsts(tmp_path, room=1.25)
    first = {**found["critical"], **found["warning"]}
    meets = {
        name: 60 * level.index(max(level))
        for name, (level, leaking) in LEVELS.items()
        if leaking and not name.startswith(PEAKS)
    }
    assert len(meets) > 40 and len(HEALTHY) > 50
    assert HEALTHY & first.keys() == set()
    # Of twelve hours' warning, six at least, or what there was: one that is ended at MemoryHigh begins below it anew.
    late = {name: at for name, at in meets.items() if not first.get(name, math.inf) < at - min(3600, at / 2)}
    assert late == {}


def test_of_real_workers_that_are_healthy_and_have_little_room_few_wake_anybody(tmp_path: Path) -> None:
    """Their peak is 87 % of MemoryHigh, so each goes up towards it, once a day or at its start."""
    found = firsts(tmp_path, room=1.15)
    # By the hours alone 32 of the 51 would, and 28 without a day to hold them against.
    assert len(HEALTHY & found["critical"].keys()) <= 4, found["critical"]


# ---- the routes ----
RECEIVERS = [{"name": "nobody"}, {"name": "sales"}, {"name": "on-call"}]
ROUTES = [{"queues": ["sales", "mail.v2"], "receiver": "sales"}]


def routed(folder: Path, *labels: str, **more: Any) -> str:
    """To whom an alert goes."""
    path = folder / "alertmanager.yml"
    path.write_text(rendered("alertmanager/alertmanager.yml.j2", alertmanager_receivers=RECEIVERS, **more))
    run("amtool", "check-config", path)
    return run("amtool", "config", "routes", "test", f"--config.file={path}", *labels).strip()


@pytest.mark.parametrize(
    ("queues", "to"),
    [
        *(("sales", "sales"), ("gate,sales", "sales"), ("sales,zoo", "sales"), ("mail.v2", "sales")),
        *(("presales", "nobody"), ("mailxv2", "nobody"), ("gate", "nobody")),
    ],
)
def test_an_alert_goes_to_whoever_has_one_of_its_queues(tmp_path: Path, queues: str, to: str) -> None:
    assert routed(tmp_path, "severity=warning", f"queues={queues}", alertmanager_queue_routes=ROUTES) == to


def test_what_is_critical_goes_to_whoever_is_woken_too(tmp_path: Path) -> None:
    both = [*ROUTES, {"queues": ["zoo"], "receiver": "nobody"}]
    more = {"alertmanager_queue_routes": both, "alertmanager_critical_receiver": "on-call"}
    assert routed(tmp_path, "severity=critical", "queues=sales", **more) == "on-call,sales"
    # To the first of those that have one of its queues.
    assert routed(tmp_path, "severity=warning", "queues=sales,zoo", **more) == "sales"
    assert routed(tmp_path, "severity=critical", "alertname=PlimsollHostUnreachable", **more) == "on-call"
    assert routed(tmp_path, "severity=warning", "queues=gate", **more) == "nobody"


def test_without_routes_all_go_to_one(tmp_path: Path) -> None:
    assert routed(tmp_path, "severity=critical", "queues=sales") == "nobody"
