"""The Grafana dashboard: Prometheus takes and answers all that it asks, and Grafana's own SDK reads it back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from plimsoll.dashboard import MARKS, dashboard, queries, text

# What there is to be asked of, with the labels that each has: docs/monitoring.md.
CONTROL = {"job", "instance"}
TARGET = CONTROL | {"fleet", "region", "type"}
METRICS = {
    **dict.fromkeys(
        (
            "plimsoll_worker_resident_memory_bytes",
            "plimsoll_worker_proportional_memory_bytes",
            "plimsoll_worker_swap_bytes",
            "plimsoll_worker_processes",
            "plimsoll_worker_growth_bytes_per_hour",
        ),
        TARGET | {"unit", "role"},
    ),
    **dict.fromkeys(
        (
            "plimsoll_worker_memory_bytes",
            "plimsoll_worker_memory_high_bytes",
            "plimsoll_worker_memory_max_bytes",
            "plimsoll_worker_restarts_total",
            "plimsoll_worker_tasks_total",
        ),
        TARGET | {"unit"},
    ),
    "plimsoll_worker_memory_events_total": TARGET | {"unit", "event"},
    "plimsoll_worker_memory_pressure_seconds_total": TARGET | {"unit", "kind"},
    "plimsoll_worker_info": TARGET | {"unit", "pool", "queues", "concurrency"},
    "plimsoll_guard_acts_total": TARGET | {"unit", "act"},
    "plimsoll_sampler_last_sample_timestamp_seconds": TARGET,
    "plimsoll_sampler_beat_seconds": TARGET,
    **dict.fromkeys(
        (
            "plimsoll_collect_last_run_timestamp_seconds",
            "plimsoll_collect_last_success_timestamp_seconds",
            "plimsoll_collect_hosts",
            "plimsoll_collect_hosts_collected",
            "plimsoll_collect_workers",
            "plimsoll_collect_leaking",
        ),
        CONTROL,
    ),
    "plimsoll_collect_result": CONTROL | {"result"},
    "plimsoll_collect_host_missing": CONTROL | {"host"},
    "plimsoll:leak_info": {"instance", "unit", "leak_class", "task", "line"},
    "plimsoll:leak_growth_bytes_per_hour": {"instance", "unit", "leak_class"},
    "plimsoll:leak_memory_high_hours": {"instance", "unit", "leak_class"},
    "celery_queue_length": CONTROL | {"queue_name"},
    "celery_queue_consumers": CONTROL | {"queue_name"},
    "celery_task_runtime_bucket": CONTROL | {"name", "le"},
    "celery_task_succeeded_total": CONTROL | {"name"},
    # Of what the rules leave, no more than this is asked for.
    "plimsoll:worker_rss_bytes": {"instance", "unit"},
    "plimsoll:worker_rss_floor_bytes": {"instance", "unit"},
    "plimsoll:worker_growth_bytes_per_hour": {"instance", "unit"},
    "plimsoll:worker_memory_high_hours": {"instance", "unit"},
}
KEYWORDS = {"and", "or", "unless"}
# Names that begin with a capital also within a title.
NAMES = {"MemoryHigh", "MemoryMax", "OOM"}

MIB = 1 << 20
NONE: Mapping[str, str] = {}


def panels() -> list[dict[str, Any]]:
    """All but the heads of rows."""
    both = [one for top in dashboard()["panels"] for one in (top, *top.get("panels", []))]
    return [one for one in both if one["type"] != "row"]


def query(title: str, number: int = 0, **variables: str) -> str:
    return [expression for found, expression in queries(variables) if found == title][number]


# ---- what it asks ----


def promtool(*arguments: object) -> str:
    """What it says, of something that it is to find right."""
    ran = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_prometheus_takes_every_query(tmp_path: Path) -> None:
    asked = queries(NONE)
    assert len(asked) > 50
    rules = [{"record": f"asked:{at}", "expr": expression} for at, (_, expression) in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")


def selectors(expression: str) -> list[tuple[str, str]]:
    """Metrics that an expression reads, with the matchers of each."""
    # What is quoted may look like anything.
    bare = re.sub(r'"[^"]*"', '""', expression)
    found = re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", bare)
    rest = re.sub(r"[a-zA-Z_:][\w:]*\{[^}]*\}|\[\w+\]|\b(by|on|group_left) \([^)]*\)|@ end\(\)", "", bare)
    words = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\s*[\w:(])", rest)
    return [*found, *((word, "") for word in words if word not in KEYWORDS)]


@pytest.mark.parametrize("at", range(len(queries(NONE))), ids=[title for title, _ in queries(NONE)])
def test_every_query_reads_metrics_and_labels_that_there_are(at: int) -> None:
    read = selectors(queries(NONE)[at][1])
    assert read
    for metric, matchers in read:
        assert metric in METRICS
        assert set(re.findall(r"(\w+)[=!]", matchers)) <= METRICS[metric], metric


def test_given_values_take_the_place_of_the_variables_and_none_is_left() -> None:
    asked = queries({"unit": "celery-worker@mail[.]service", "queue": "gate|mail", "__rate_interval": "17m"})
    assert not [expression for _, expression in asked if "$" in expression]
    for part in ('unit=~"celery-worker@mail[.]service"', 'queues=~"(.*,)?(gate|mail)(,.*)?"', "[17m]", 'fleet=~".*"'):
        assert any(part in expression for _, expression in asked), part
    titles = {title for title, _ in asked}
    assert titles >= {f"Variable: {name}" for name in ("fleet", "instance", "queue", "unit")}
    assert titles >= {f"Annotation: {name}" for name in ("OOM kills", "Restarts", "Acts of the guard")}
    assert titles >= {one["title"] for one in panels()}


# ---- what Prometheus answers ----

# Two hours, a value a minute. gate grows by 60 MiB/h; mail, with two queues, and box, of another fleet, do not.
WORKERS = {
    ("web-1", "gate"): ("one", "gate", 60),
    ("web-1", "mail"): ("one", "mail,zeta", 0),
    ("web-2", "box"): ("two", "box", 0),
}
# What happens to each of them: once 20 minutes before the end, and once 2 minutes before it.
HAPPENED = "0x99 1x17 2x2"


def labelled(metric: str, **labels: str) -> str:
    return metric + "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def recorded() -> dict[str, str]:
    """Series of a fleet, in promtool's notation."""
    series = {}
    for (host, name), (fleet, served, grows) in WORKERS.items():
        worker = {"instance": host, "unit": f"celery-worker@{name}.service"}
        all_labels = {"job": "plimsoll", "fleet": fleet, **worker}
        start, step = 200 * MIB, grows * MIB // 60
        series |= {
            labelled("plimsoll:worker_rss_floor_bytes", **worker): f"{start}+{step}x120",
            labelled("plimsoll:worker_growth_bytes_per_hour", **worker): f"{grows * MIB}x120",
            labelled("plimsoll_worker_memory_bytes", **all_labels): f"{start + 10 * MIB}+{step}x120",
            labelled("plimsoll_worker_memory_high_bytes", **all_labels): f"{500 * MIB}x120",
            labelled("plimsoll_worker_memory_max_bytes", **all_labels): f"{600 * MIB}x120",
            labelled("plimsoll_worker_tasks_total", **all_labels): "0+30x120",
            labelled("plimsoll_worker_restarts_total", **all_labels): HAPPENED,
            labelled("plimsoll_guard_acts_total", act="restart", **all_labels): HAPPENED,
            labelled("plimsoll_worker_info", pool="prefork", queues=served, concurrency="2", **all_labels): "1x120",
        }
        if grows:
            series[labelled("plimsoll:worker_memory_high_hours", **worker)] = "5-0.0166666x120"
        for event in ("high", "max", "oom_kill"):
            series[labelled("plimsoll_worker_memory_events_total", event=event, **all_labels)] = HAPPENED
        for kind in ("some", "full"):
            series[labelled("plimsoll_worker_memory_pressure_seconds_total", kind=kind, **all_labels)] = "0+6x120"
        for role, size, processes in (("main", 60 * MIB, 1), ("child", 140 * MIB, 2)):
            of_role = {"role": role, **all_labels}
            series |= {
                labelled("plimsoll_worker_resident_memory_bytes", **of_role): f"{size}x120",
                labelled("plimsoll_worker_swap_bytes", **of_role): "0x120",
                labelled("plimsoll_worker_processes", **of_role): f"{processes}x120",
                labelled("plimsoll_worker_growth_bytes_per_hour", **of_role): f"{grows * MIB}x120",
            }
    # The sampler of web-2 stopped 40 minutes ago, and the host was not collected.
    for host, fleet, sampled in (("web-1", "one", "0+60x120"), ("web-2", "two", "0+60x80 _x40")):
        of_host = {"job": "plimsoll", "fleet": fleet, "instance": host}
        series[labelled("plimsoll_sampler_last_sample_timestamp_seconds", **of_host)] = sampled
        series[labelled("plimsoll_sampler_beat_seconds", **of_host)] = "0.2x120"
    control = {"job": "plimsoll-collect", "instance": "control"}
    series[labelled("plimsoll_collect_host_missing", host="web-2", **control)] = "1x120"
    leak = {"instance": "web-1", "unit": "celery-worker@gate.service", "leak_class": "python_objects"}
    series[labelled("plimsoll:leak_info", task="scan", line="shop.py:9", **leak)] = "1x120"
    series[labelled("plimsoll:leak_growth_bytes_per_hour", **leak)] = f"{60 * MIB}x120"
    series[labelled("plimsoll:leak_memory_high_hours", **leak)] = "5x120"
    for name, value in (
        ("last_run_timestamp_seconds", "6000x120"),
        ("last_success_timestamp_seconds", "3000x120"),
        ("hosts", "2x120"),
        ("hosts_collected", "1x120"),
        ("leaking", "1x120"),
    ):
        series[labelled(f"plimsoll_collect_{name}", **control)] = value
    for result, value in (("ok", "0x120"), ("failed", "1x120")):
        series[labelled("plimsoll_collect_result", result=result, **control)] = value
    for name in ("gate", "mail"):
        series[labelled("celery_queue_length", job="plimsoll-queues", queue_name=name)] = "7x120"
        series[labelled("celery_queue_consumers", job="plimsoll-queues", queue_name=name)] = "1x120"
    for le in ("1", "10", "+Inf"):
        series[labelled("celery_task_runtime_bucket", name="scan", le=le)] = "0+5x120"
    series[labelled("celery_task_succeeded_total", name="scan")] = "0+5x120"
    return series


def answers(tmp_path: Path, *expected: tuple[str, list[dict[str, object]]]) -> None:
    """Check each expression's answer at the end of those two hours; Prometheus itself evaluates them."""
    tests = [{"expr": expression, "eval_time": "2h", "exp_samples": samples} for expression, samples in expected]
    series = [{"series": name, "values": values} for name, values in recorded().items()]
    whole = {"rule_files": [], "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(whole))
    promtool("test", "rules", tmp_path / "test.yml")


def sample(value: float, metric: str = "", **labels: str) -> dict[str, object]:
    return {"labels": labelled(metric, **labels), "value": value}


def test_every_query_is_answered_where_there_is_something_to_say(tmp_path: Path) -> None:
    answers(tmp_path, *((f"clamp_max(count({asked}), 1)", [sample(1)]) for _, asked in queries(NONE)))


def test_a_worker_of_several_queues_is_found_by_each_of_them_and_by_no_part_of_a_name(tmp_path: Path) -> None:
    def count(queue: str) -> str:
        return query("Workers", queue=queue)

    one, two = [sample(1)], [sample(2)]
    expected = [
        (count("mail"), one),
        (count("zeta"), one),
        (count("zeta|gate"), two),
        (count("gat"), []),
        (count(","), []),
    ]
    answers(tmp_path, *expected)


def test_what_has_no_fleet_of_its_own_goes_by_that_of_its_worker(tmp_path: Path) -> None:
    growth = query("Growth of each queue's workers", fleet="one")
    floor = query("Memory against its limits", 1, fleet="two")
    box = sample(200 * MIB, "plimsoll:worker_rss_floor_bytes", instance="web-2", unit="celery-worker@box.service")
    answers(
        tmp_path,
        (growth, [sample(60 * MIB, queues="gate"), sample(0, queues="mail,zeta")]),
        (floor, [box]),
    )


def test_the_figures_at_the_top_count_what_happened_in_the_time_that_is_shown(tmp_path: Path) -> None:
    def near(title: str, count: int) -> tuple[str, list[dict[str, object]]]:
        return f"round({query(title, __range='30m')})", [sample(count)]

    answers(
        tmp_path,
        near("OOM kills", 6),
        near("Restarts", 6),
        near("Restarts by the guard", 6),
        (query("MemoryHigh within a day"), [sample(1)]),
        (query("Silent samplers"), [sample(1)]),
        (query("Silent samplers", fleet="one"), [sample(0)]),
        (query("Hosts not collected"), [sample(1)]),
        (query("How the last collection ended"), [sample(1, result="failed")]),
    )


def test_tasks_are_a_minute_and_growth_for_each_of_them_is_that_of_their_hour(tmp_path: Path) -> None:
    worker = {"instance": "web-1", "unit": "celery-worker@gate.service"}
    one = {"queue": "gate", "__rate_interval": "4m"}
    answers(
        tmp_path,
        (query("Tasks a minute", **one), [sample(30, queues="gate")]),
        (query("Tasks a minute of each worker", **one), [sample(30, **worker)]),
        (query("Growth for each task", **one), [sample(60 * MIB / 1800, queues="gate")]),
        (query("Growth for each task of each worker", **one), [sample(60 * MIB / 1800, **worker)]),
    )


def test_the_forecast_is_the_floor_as_it_will_be_if_it_goes_on(tmp_path: Path) -> None:
    unit = {"instance": "web-1", "unit": "celery-worker@gate.service"}
    ahead = query("Floor now and in 4 hours", 1, queue="gate")
    # 200 MiB at first, two hours of 60 MiB, and four more.
    answers(tmp_path, (f"round({ahead})", [sample(560 * MIB, **unit)]))


def test_a_panel_has_ten_workers_at_most_and_those_are_the_largest(tmp_path: Path) -> None:
    series = {}
    for at in range(15):
        worker = {"instance": "web-1", "unit": f"celery-worker@w{at:02}.service"}
        series[labelled("plimsoll_worker_resident_memory_bytes", role="child", **worker)] = f"{at}x120"
        series[labelled("plimsoll_worker_swap_bytes", role="child", **worker)] = f"{at}x120"
        series[labelled("plimsoll_worker_info", queues="gate", **worker)] = "1x120"
    expected = [sample(at, instance="web-1", unit=f"celery-worker@w{at:02}.service") for at in range(5, 15)]
    tests = [{"expr": query("Swap"), "eval_time": "2h", "exp_samples": expected}]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    whole = {"tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": tests}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(whole))
    promtool("test", "rules", tmp_path / "test.yml")


def test_a_worker_that_is_being_restarted_keeps_its_events(tmp_path: Path) -> None:
    worker = {"instance": "web-1", "unit": "celery-worker@gate.service"}
    inputs = [
        {"series": labelled("plimsoll_worker_info", queues="gate", **worker), "values": "1x110 stale"},
        {"series": labelled("plimsoll_worker_restarts_total", **worker), "values": "0x110 4x9"},
    ]
    asked = f"round({query('Restarts by systemd', queue='gate', __rate_interval='20m')})"
    tests = [{"expr": asked, "eval_time": "2h", "exp_samples": [sample(4, **worker)]}]
    whole = {"tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": tests}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(whole))
    promtool("test", "rules", tmp_path / "test.yml")


# ---- what Grafana is given ----


@pytest.mark.parametrize("at", range(len(panels())), ids=[one["title"] for one in panels()])
def test_every_panel_says_what_it_is_and_in_which_unit(at: int) -> None:
    one = panels()[at]
    words = one["title"].split()
    assert words[0][0].isupper() and all(word in NAMES or word == word.lower() for word in words[1:]), one["title"]
    assert 40 < len(one["description"]) < 320 and one["description"].endswith(".")
    assert one["fieldConfig"]["defaults"]["unit"]
    assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert one["targets"]
    letters = [each["refId"] for each in one["targets"]]
    assert len(set(letters)) == len(letters)
    for each in one["targets"]:
        assert each["legendFormat"] and each["datasource"] == one["datasource"]
        assert each.get("range", False) != each.get("instant", False)


def test_the_labels_of_a_legend_are_those_of_its_series() -> None:
    for one in panels():
        for each in one["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", each["legendFormat"]))
            grouped = re.match(r"(?:\d+ \* )?\w+(?:\([\d., ]+sum)? by \(([^)]*)\)", each["expr"])
            there = set(grouped[1].split(", ")) if grouped else {"instance", "unit", "role", "name", "result", "queues"}
            assert shown <= there, (one["title"], each["legendFormat"])


def test_no_two_panels_lie_over_each_other_and_none_beside_the_grid() -> None:
    taken: dict[tuple[int, int], str] = {}
    both = [one for top in dashboard()["panels"] for one in (top, *top.get("panels", []))]
    for one in both:
        at = one["gridPos"]
        assert at["w"] >= 3 and at["h"] >= 1 and at["x"] + at["w"] <= 24, one["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), one["title"]) == one["title"]
    # Every line of panels is full.
    assert {x for x, _ in taken} == set(range(24))
    assert len(taken) == 24 * len({y for _, y in taken})


def test_ids_and_titles_are_one_panels_alone() -> None:
    both = [one for top in dashboard()["panels"] for one in (top, *top.get("panels", []))]
    for key in ("id", "title"):
        found = [one[key] for one in both]
        assert len(set(found)) == len(found)
    assert all(one["id"] > 0 for one in both)


def test_a_row_that_is_open_has_its_panels_after_it_and_a_closed_one_in_it() -> None:
    # Grafana throws away the panels of a row that is open, and shows none that come after one that is closed.
    found = dashboard()["panels"]
    for at, one in enumerate(found):
        if one["type"] == "row":
            assert one["collapsed"] == bool(one["panels"])
            after = found[at + 1]["type"] if at + 1 < len(found) else "row"
            assert (after == "row") == one["collapsed"]


def test_the_choices_begin_with_all_and_take_several() -> None:
    made = {one["name"]: one for one in dashboard()["templating"]["list"]}
    assert list(made) == ["datasource", "fleet", "instance", "queue", "unit"]
    assert made.pop("datasource")["query"] == "prometheus"
    for one in made.values():
        assert one["multi"] and one["includeAll"] and one["current"]["value"] == ["$__all"]
        # Not Grafana's own list of all: that would leave out hosts without the label.
        assert one["allValue"] == ".*"
        assert one["refresh"] == 2
    listed = re.compile(made["queue"]["regex"].removeprefix("/").removesuffix("/g"))
    assert listed.findall("gate,mail") == ["gate", "mail"]


def test_every_mark_says_what_and_where() -> None:
    made = dashboard()["annotations"]["list"]
    assert [one["name"] for one in made] == [name for name, *_ in MARKS]
    for one in made:
        assert one["titleFormat"] and one["textFormat"] == "{{instance}} {{unit}}" and one["enable"]


def test_it_is_the_same_text_each_time_and_ends_in_a_newline() -> None:
    said = text()
    assert said.endswith("}\n") and json.loads(said) == dashboard()
    assert said == json.dumps(json.loads(said), indent=2, sort_keys=True) + "\n"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        program = "import sys; from plimsoll.dashboard import text; sys.stdout.write(text())"
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        assert ran.stdout == said


def test_grafanas_own_sdk_reads_it_back_without_a_loss() -> None:
    """What it does not know of, it drops: so every key is one of Grafana 11.6, and in its place."""
    register_default_plugins()
    made = dashboard()
    again = json.loads(json.dumps(Dashboard.from_json(dashboard()), cls=JSONEncoder))
    # Of the Prometheus data source's own, and not in the SDK.
    for one in made["annotations"]["list"]:
        del one["titleFormat"], one["textFormat"], one["tagKeys"]
    assert again == made
