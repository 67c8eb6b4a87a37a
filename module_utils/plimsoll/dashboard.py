"""The Grafana dashboard, made with Grafana's own SDK: the fleet, its queues and its workers over one Prometheus. Pure.

`plimsoll dashboard` prints it, and roles/grafana puts it on a host. What it draws are the metrics of the sampler, of
scheduled collection and of the broker, and the recording rules of roles/prometheus.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

UID = "plimsoll"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
# Of the choices at the top, and of what Grafana fills in: what queries() takes where it is not told otherwise.
DEFAULTS = {
    "fleet": ".*",
    "instance": ".*",
    "queue": ".*",
    "unit": ".*",
    "__rate_interval": "5m",
    "__range": "6h",
}
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
LABEL_VALUES = re.compile(r"label_values\((.*), (\w+)\)")

# ---- what is asked of Prometheus ----

# One series a worker, with its queues. `queues` is a list with commas, of which one is to be chosen.
INFO = 'plimsoll_worker_info{fleet=~"$fleet", instance=~"$instance", unit=~"$unit", queues=~"(.*,)?($queue)(,.*)?"}'
# A worker that is being restarted is not described in that moment, and that is when its events matter.
DESCRIBED = f"last_over_time({INFO}[1h])"
# Lines that can be told apart in a panel. They are those of the end of the time that is shown, with all of their past.
MOST = 10
LATE_S = 300
AHEAD_H = 4

# What plimsoll found at the last collection, and what Prometheus sees by itself.
LEAKS = [f"plimsoll:leak_{kind}" for kind in ("info", "growth_bytes_per_hour", "memory_high_hours")]
HOURS = "plimsoll:worker_memory_high_hours"
GROWTH = "plimsoll:worker_growth_bytes_per_hour"
FLOOR = "plimsoll:worker_rss_floor_bytes"


def of(metric: str, labels: str = "") -> str:
    """The series of a metric on the chosen hosts and units; recording rules have no fleet, so chosen() goes by that."""
    return f'{metric}{{instance=~"$instance", unit=~"$unit"{labels and ", " + labels}}}'


def chosen(expression: str) -> str:
    return f"{expression} and on (instance, unit) {DESCRIBED}"


def with_queues(expression: str) -> str:
    # One series of each, whatever a host says of its workers.
    return f"{expression} * on (instance, unit) group_left (queues) topk by (instance, unit) (1, {INFO})"


def first(ranked: str) -> str:
    """Of the chosen workers those with the highest figure; what ranked selects is to be that of the end: @ end()."""
    return f"topk({MOST}, {ranked} and on (instance, unit) last_over_time({INFO}[1h] @ end()))"


# Also one that is being restarted as the time ends.
LARGEST = first(f"sum by (instance, unit) (last_over_time({of('plimsoll_worker_resident_memory_bytes')}[1h] @ end()))")


def largest(expression: str) -> str:
    return f"{expression} and on (instance, unit) {LARGEST}"


def rate(metric: str, labels: str = "", window: str = "$__rate_interval") -> str:
    return f"rate({of(metric, labels)}[{window}])"


def risen(metric: str, labels: str = "", window: str = "$__rate_interval") -> str:
    return f"increase({of(metric, labels)}[{window}])"


def by_worker(function: str, expression: str, *labels: str) -> str:
    return f"{function} by ({', '.join(('instance', 'unit', *labels))}) ({expression})"


AGE = (
    "time() - max by (instance) (last_over_time("
    'plimsoll_sampler_last_sample_timestamp_seconds{fleet=~"$fleet", instance=~"$instance"}[1h]))'
)
NOT_COLLECTED = 'plimsoll_collect_host_missing{host=~"$instance"}'
# Of a worker over an hour, as its growth is; one without tasks has no growth for each.
TASKS_AN_HOUR = f"(3600 * {rate('plimsoll_worker_tasks_total', window='1h')} > 0)"


def fullness(at: str = "") -> str:
    memory, high = (of(f"plimsoll_worker_memory_{kind}bytes") for kind in ("", "high_"))
    return f"max by (instance, unit) ({memory}{at}) / max by (instance, unit) ({high}{at})"


# ---- how it is drawn ----

Panel = timeseries.Panel | stat.Panel | table.Panel
# A query, the legend of its series, and, of a line, how it is drawn.
Query = tuple[str, str] | tuple[str, str, "Style"]
Style = Mapping[str, object]

LETTERS = "ABCDEFGH"
WORKER = "{{instance}} {{unit}}"
DASHED: Style = {"custom.lineStyle": {"fill": "dash", "dash": [8, 6]}, "custom.fillOpacity": 0}
HIGH: Style = {"color": {"mode": "fixed", "fixedColor": "orange"}, "custom.fillOpacity": 0, "custom.lineWidth": 2}
MAX: Style = {"color": {"mode": "fixed", "fixedColor": "red"}, "custom.fillOpacity": 0, "custom.lineWidth": 2}


def properties(style: Style) -> list[models.DynamicConfigValue]:
    return [models.DynamicConfigValue(id_val=name, value=value) for name, value in sorted(style.items())]


def target(letter: str, expression: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend).datasource(SOURCE)


def lines(title: str, about: str, unit: str, *queries: Query, width: int = 8, bars: bool = False) -> Panel:
    """Series over time; bars for what happens now and then."""
    legend = common_builders.VizLegendOptions().display_mode(common.LegendDisplayMode.LIST)
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    panel = timeseries.Panel().title(title).description(about).unit(unit).span(width).height(8).datasource(SOURCE)
    panel.legend(legend.placement(common.LegendPlacement.BOTTOM).show_legend(True))
    panel.tooltip(tooltip.sort(common.SortOrder.DESCENDING))
    panel.draw_style(common.GraphDrawStyle.BARS if bars else common.GraphDrawStyle.LINE)
    panel.fill_opacity(80 if bars else 8).show_points(common.VisibilityMode.NEVER).axis_soft_min(0)
    # web-1 mail, and not web-1 celery-worker@mail.service.
    short = {"regex": r"celery-worker@(.*?)\.service", "renamePattern": "$1"}
    panel.with_transformation(models.DataTransformerConfig(id_val="renameByRegex", options=short))
    for letter, (expression, series, *style) in zip(LETTERS, queries):
        panel.with_target(target(letter, expression, series).range())
        for one in style:
            panel.override_by_query(letter, properties(one))
    return panel


def number(title: str, about: str, expression: str, alarm: str = "", names: bool = False, width: int = 3) -> Panel:
    """A figure of now. alarm is its colour from 1 on; names for the label that has it in the place of the figure."""
    steps = [models.Threshold(value=0, color="green" if alarm else "text")]
    steps += [models.Threshold(value=1, color=alarm)] if alarm else []
    reduced = common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    panel = stat.Panel().title(title).description(about).unit(units.Short).decimals(0).datasource(SOURCE)
    panel.span(width).height(8 if names else 4)
    panel.thresholds(builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    panel.graph_mode(common.BigValueGraphMode.NONE).color_mode(common.BigValueColorMode.VALUE).reduce_options(reduced)
    panel.text_mode(common.BigValueTextMode.NAME if names else common.BigValueTextMode.VALUE)
    return panel.with_target(target("A", expression, "{{result}}" if names else title).instant())


def rows(
    title: str,
    about: str,
    width: int,
    columns: Mapping[str, str],
    queries: Sequence[str],
    sort: str,
    styles: Mapping[str, Style],
) -> Panel:
    """A table of now. columns: labels and `Value #A`, with the heads that they get, in order; all else is left out."""
    panel = table.Panel().title(title).description(about).unit(units.Short).span(width).height(8).datasource(SOURCE)
    for letter, expression in zip(LETTERS, queries):
        legend = columns.get(f"Value #{letter}", title)
        panel.with_target(target(letter, expression, legend).instant().format(PromQueryFormat.TABLE))
    kept = {"include": {"names": list(columns)}}
    order = {"indexByName": {name: at for at, name in enumerate(columns)}, "renameByName": dict(columns)}
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(models.DataTransformerConfig(id_val="filterFieldsByName", options=kept))
    panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=order))
    panel.align(common.FieldTextAlignment.AUTO).sort_by(
        [common_builders.TableSortByFieldState().display_name(sort).desc(False)]
    )
    for name, style in styles.items():
        panel.override_by_name(name, properties(style))
    return panel


# ---- the panels ----


def fleet() -> list[Panel]:
    soonest = f"bottomk(20, {chosen(of(HOURS))})"
    hours, growth, floor, high = (
        f"max by (instance, unit, queues) ({with_queues(of(metric))}) and on (instance, unit) {soonest}"
        for metric in (HOURS, GROWTH, FLOOR, "plimsoll_worker_memory_high_bytes")
    )
    one_worker = {
        "title": "Show this worker alone",
        "url": f"/d/{UID}?${{datasource:queryparam}}&${{fleet:queryparam}}&var-queue=$__all"
        "&var-instance=${__data.fields.Host}&var-unit=${__data.fields.Worker}&${__url_time_range}",
    }
    kills, restarts, guarded = (
        f"sum({chosen(risen(metric, labels, '$__range'))}) or vector(0)"
        for metric, labels in (
            ("plimsoll_worker_memory_events_total", 'event="oom_kill"'),
            ("plimsoll_worker_restarts_total", ""),
            ("plimsoll_guard_acts_total", 'act="restart"'),
        )
    )
    return [
        number("Workers", "Workers that the samplers describe, of those that are chosen above.", f"count({INFO})"),
        number(
            "MemoryHigh within a day",
            "Workers whose floor grows so fast that it is at MemoryHigh in 24 hours. The table below says which.",
            f"count({chosen(of(HOURS) + ' < 24')}) or vector(0)",
            alarm="orange",
        ),
        number(
            "Leaking",
            "Workers that leak, as the last collection judged by all of their samples. The report of it says why.",
            "sum(plimsoll_collect_leaking)",
            alarm="orange",
        ),
        number(
            "OOM kills",
            "Processes that the kernel killed in the time that is shown. Any is one too many: tasks went with it.",
            kills,
            alarm="red",
        ),
        number(
            "Restarts",
            "Restarts by systemd in the time that is shown. Many of one worker are a loop: see the row of events.",
            restarts,
            alarm="orange",
        ),
        number(
            "Restarts by the guard",
            "Restarts by the memory guard in the time that is shown. They contain a leak, and do not mend it.",
            guarded,
            alarm="orange",
        ),
        number(
            "Silent samplers",
            f"Hosts whose last sample of the last hour is older than {LATE_S // 60} minutes: nothing here is known "
            "of them.",
            f"count({AGE} > {LATE_S}) or vector(0)",
            alarm="red",
        ),
        number(
            "Hosts not collected",
            "Hosts that the last collection did not get. The row of samplers and collection says which.",
            f"count({NOT_COLLECTED}) or vector(0)",
            alarm="orange",
        ),
        rows(
            "Soonest at MemoryHigh",
            "The workers that grow, by the hours that are left if they go on so. Act on the first ones; a click on "
            "a worker shows it alone.",
            14,
            {
                "instance": "Host",
                "unit": "Worker",
                "queues": "Queues",
                "Value #A": "Hours left",
                "Value #B": "Growth an hour",
                "Value #C": "Floor",
                "Value #D": "MemoryHigh",
            },
            (hours, growth, floor, high),
            "Hours left",
            {
                "Worker": {"links": [one_worker]},
                "Hours left": {"unit": units.Hours, "decimals": 1},
                **{name: {"unit": units.BytesIEC} for name in ("Growth an hour", "Floor", "MemoryHigh")},
            },
        ),
        lines(
            "Hours to MemoryHigh",
            f"The {MOST} workers that are there soonest. A line that falls by an hour each hour is a steady leak; "
            "one that falls faster grows faster and faster.",
            units.Hours,
            (
                f"{of(HOURS)} and on (instance, unit) bottomk({MOST}, {of(HOURS)} @ end() and on (instance, unit) "
                f"last_over_time({INFO}[1h] @ end()))",
                WORKER,
            ),
            width=10,
        ),
        rows(
            "Leaks that were found",
            "Workers that leak and are not contained, as the last collection judged them by all of their samples. "
            "Where there is no task or line, `diagnose.yml` traces one.",
            24,
            {
                "instance": "Host",
                "unit": "Worker",
                "leak_class": "Kind",
                "task": "Task",
                "line": "Line",
                "Value #B": "Growth an hour",
                "Value #C": "Hours to MemoryHigh",
            },
            (
                f"max by (instance, unit, leak_class, task, line) ({of(LEAKS[0])})",
                *(f"max by (instance, unit, leak_class) ({of(metric)})" for metric in LEAKS[1:]),
            ),
            "Hours to MemoryHigh",
            {
                "Worker": {"links": [one_worker]},
                "Growth an hour": {"unit": units.BytesIEC},
                "Hours to MemoryHigh": {"unit": units.Hours, "decimals": 1},
            },
        ),
        lines(
            "Fullest workers",
            f"Memory as a part of MemoryHigh, of the {MOST} fullest. At 90 % the guard acts, at 100 % the kernel "
            "slows the worker down.",
            units.PercentUnit,
            (f"{fullness()} and on (instance, unit) {first(fullness(' @ end()'))}", WORKER),
            width=24,
        ),
    ]


def queues() -> list[Panel]:
    def total(expression: str) -> str:
        return f"sum by (queues) ({with_queues(expression)})"

    tasks = rate("plimsoll_worker_tasks_total")
    return [
        lines(
            "Memory of each queue's workers",
            "The floor of all workers that serve the same queues. Read it against the tasks and the queue on its "
            "right: a leak goes on rising when those do not.",
            units.BytesIEC,
            (total(of(FLOOR)), "{{queues}}"),
        ),
        lines(
            "Tasks a minute",
            "Tasks that the workers of a queue finished. Memory that rises and falls with them is load, and no leak.",
            units.Short,
            (f"60 * {total(tasks)}", "{{queues}}"),
        ),
        lines(
            "Messages that wait",
            "Length of each queue, as the broker has it. Where it rises as tasks a minute fall, workers are slowed "
            "down.",
            units.Short,
            ('max by (queue_name) (celery_queue_length{queue_name=~"$queue"})', "{{queue_name}}"),
        ),
        lines(
            "Growth of each queue's workers",
            "Growth of the floor in an hour, added up. The queue that stands out is where the leak is.",
            units.BytesIEC,
            (total(of(GROWTH)), "{{queues}}"),
        ),
        lines(
            "Growth for each task",
            "Growth in an hour over the tasks of that hour. A line that stays level while the load changes says "
            "that tasks leak; one that rises as the load falls says that time does.",
            units.BytesIEC,
            (f"{total(of(GROWTH))} / {total(TASKS_AN_HOUR)}", "{{queues}}"),
        ),
        lines(
            "Consumers",
            "Consumers of each queue. Fewer than there are workers means that some are gone; Redis does not know.",
            units.Short,
            ('max by (queue_name) (celery_queue_consumers{queue_name=~"$queue"})', "{{queue_name}}"),
        ),
    ]


def workers() -> list[Panel]:
    def summed(metric: str, *labels: str) -> str:
        return by_worker("sum", of(metric), *labels)

    limits: list[Query] = [
        (largest(by_worker("max", of("plimsoll_worker_memory_high_bytes"))), f"{WORKER} MemoryHigh", HIGH),
        (largest(by_worker("max", of("plimsoll_worker_memory_max_bytes"))), f"{WORKER} MemoryMax", MAX),
    ]
    floor = largest(of(FLOOR))
    resident, processes = (summed(f"plimsoll_worker_{kind}", "role") for kind in ("resident_memory_bytes", "processes"))
    tasks = by_worker("sum", rate("plimsoll_worker_tasks_total"))
    return [
        lines(
            "Memory against its limits",
            f"Memory of the cgroup, with its page cache, and the floor of its processes, of the {MOST} largest "
            "workers that are chosen. A floor that rises without a break is a leak; peaks above a level floor are "
            "tasks.",
            units.BytesIEC,
            (largest(by_worker("max", of("plimsoll_worker_memory_bytes"))), f"{WORKER} memory"),
            (floor, f"{WORKER} floor", {"custom.lineWidth": 2}),
            *limits,
            width=12,
        ),
        lines(
            f"Floor now and in {AHEAD_H} hours",
            f"Dashed: where the floor will be {AHEAD_H} hours later, by the line through its last hour. Where that "
            f"crosses MemoryHigh, {AHEAD_H} hours are left. It is a line and no finding: look whether the floor "
            "followed it before.",
            units.BytesIEC,
            (floor, f"{WORKER} floor", {"custom.lineWidth": 2}),
            (
                largest(f"clamp_min(predict_linear({of(FLOOR)}[1h], {AHEAD_H} * 3600), 0)"),
                f"{WORKER} in {AHEAD_H} h",
                DASHED,
            ),
            *limits,
            width=12,
        ),
        lines(
            "Resident memory by role",
            "RSS of the main process and of its children. Pages that they share are counted once for each. If main "
            "rises, replacing children does not help.",
            units.BytesIEC,
            (largest(resident), f"{WORKER} {{{{role}}}}"),
        ),
        lines(
            "Memory of one process, by role",
            "RSS over the number of processes. Children that are replaced in time make a saw; teeth that begin "
            "higher each time come from main.",
            units.BytesIEC,
            (largest(f"{resident} / {processes}"), f"{WORKER} {{{{role}}}}"),
        ),
        lines(
            "Processes by role",
            "How many there are. Children that come and go change the memory with them; more than the concurrency "
            "is a replacement that is under way, or an autoscaler.",
            units.Short,
            (largest(processes), f"{WORKER} {{{{role}}}}"),
        ),
        lines(
            "Tasks a minute of each worker",
            "Load. Compare it with the memory above: a leak goes on when this is level, and a worker without tasks "
            "that grows leaks by itself.",
            units.Short,
            (largest(f"60 * {tasks}"), WORKER),
        ),
        lines(
            "Growth in an hour",
            "Of the floor, 0 where it did not rise all the time; and by role, as the sampler measures it in "
            "processes that are older than an hour.",
            units.BytesIEC,
            (largest(of(GROWTH)), f"{WORKER} floor", {"custom.lineWidth": 2}),
            (largest(summed("plimsoll_worker_growth_bytes_per_hour", "role")), f"{WORKER} {{{{role}}}}"),
        ),
        lines(
            "Growth for each task of each worker",
            "Growth in an hour over the tasks of that hour. About the same in all workers of a queue is a leak of "
            "its tasks; one worker alone has had a task of its own kind.",
            units.BytesIEC,
            (largest(f"{of(GROWTH)} / on (instance, unit) {TASKS_AN_HOUR}"), WORKER),
        ),
    ]


def events() -> list[Panel]:
    """What happens to workers. Not those of the largest alone: one that was just restarted is small."""

    def happened(metric: str, *by: str, labels: str = "") -> str:
        return chosen(f"{by_worker('sum', risen(metric, labels), *by)} > 0")

    return [
        lines(
            "OOM kills and hits of MemoryMax",
            "oom_kill: the kernel killed a process, and its task is lost or done again. max: the worker was at "
            "MemoryMax and the kernel had to find room; kills come next.",
            units.Short,
            (
                happened("plimsoll_worker_memory_events_total", "event", labels='event=~"max|oom_kill"'),
                f"{WORKER} {{{{event}}}}",
            ),
            bars=True,
        ),
        lines(
            "Held at MemoryHigh",
            "How often the kernel held the worker up at MemoryHigh. A few are a peak; a wall of them is a worker "
            "that crawls and that the guard did not restart.",
            units.Short,
            (happened("plimsoll_worker_memory_events_total", labels='event="high"'), WORKER),
            bars=True,
        ),
        lines(
            "Memory pressure",
            f"Part of the time that some or all tasks of the worker waited for memory, of the {MOST} largest. Above "
            "10 % tasks take noticeably longer.",
            units.PercentUnit,
            (
                largest(by_worker("sum", rate("plimsoll_worker_memory_pressure_seconds_total"), "kind")),
                f"{WORKER} {{{{kind}}}}",
            ),
        ),
        lines(
            "Restarts by systemd",
            "Restarts after an end that nobody asked for. One is an accident; one every few minutes is a loop, whose "
            "reason is in the journal of the unit.",
            units.Short,
            (happened("plimsoll_worker_restarts_total"), WORKER),
            bars=True,
        ),
        lines(
            "Acts of the guard",
            "restart: the memory guard restarted a worker before the kernel would act. budget_spent: it would have, "
            "and had done so too often; then nothing stands before MemoryMax.",
            units.Short,
            (happened("plimsoll_guard_acts_total", "act"), f"{WORKER} {{{{act}}}}"),
            bars=True,
        ),
        lines(
            "Swap",
            f"Of the {MOST} largest workers. MemorySwapMax is 0 by default, so any is a unit of your own or a worker "
            "without one; a leak that is swapped out goes on.",
            units.BytesIEC,
            (largest(by_worker("sum", of("plimsoll_worker_swap_bytes"))), WORKER),
        ),
    ]


def health() -> list[Panel]:
    beats = 'plimsoll_sampler_beat_seconds{fleet=~"$fleet", instance=~"$instance"}'
    return [
        lines(
            "Age of the last sample",
            f"The oldest of all hosts, and each host above {LATE_S} seconds. A line that rises is a sampler that "
            "stopped or a host that is gone; after an hour its line ends.",
            units.Seconds,
            (f"max({AGE})", "oldest of all", DASHED),
            (f"{AGE} > {LATE_S}", "{{instance}}"),
        ),
        lines(
            "Duration of a beat",
            "What one round of samples took. Near the interval of the sampler, it has more processes than it can "
            "look at.",
            units.Seconds,
            (f"max({beats})", "longest"),
            (f"quantile(0.5, {beats})", "median"),
        ),
        lines(
            "Hosts of the last collection",
            "All hosts and those that were collected. A gap between the two lines is hosts whose logs are missing "
            "in the report.",
            units.Short,
            ("sum(plimsoll_collect_hosts)", "hosts"),
            ("sum(plimsoll_collect_hosts_collected)", "collected"),
        ),
        lines(
            "Age of the last collection",
            "Time since a run ended, and since one ended well. The second rises on alone where runs fail; both rise "
            "where the timer does not run.",
            units.Seconds,
            ("time() - max by (instance) (plimsoll_collect_last_run_timestamp_seconds)", "{{instance}} run"),
            ("time() - max by (instance) (plimsoll_collect_last_success_timestamp_seconds)", "{{instance}} success"),
        ),
        rows(
            "Hosts that were not collected",
            "Empty is good. A host that is here and samples above is up: look at its ssh and its disk.",
            8,
            {"host": "Host"},
            (f"max by (host) ({NOT_COLLECTED})",),
            "Host",
            {},
        ),
        number(
            "How the last collection ended",
            "ok, or what went wrong; the journal of plimsoll-collect.service on the control node has the words.",
            "max by (result) (plimsoll_collect_result == 1)",
            names=True,
            width=8,
        ),
    ]


def exporter() -> list[Panel]:
    return [
        lines(
            "Runtime of tasks, 95th percentile",
            "Of each task, from celery-exporter. Tasks that take longer as memory rises are held up at MemoryHigh.",
            units.Seconds,
            (
                "histogram_quantile(0.95, sum by (le, name) (rate(celery_task_runtime_bucket[$__rate_interval])))",
                "{{name}}",
            ),
            width=12,
        ),
        lines(
            "Tasks done a minute, by name",
            "Of each task, from celery-exporter. The task whose rate follows the growth is the first to look at.",
            units.Short,
            ("60 * sum by (name) (rate(celery_task_succeeded_total[$__rate_interval]))", "{{name}}"),
            width=12,
        ),
    ]


# ---- the dashboard ----


def choices() -> list[builders.QueryVariable]:
    """Each of them goes by those before it. All is whatever there is, also hosts without that label."""
    some = 'plimsoll_worker_info{fleet=~"$fleet", instance=~"$instance"}'
    sampled = "plimsoll_sampler_last_sample_timestamp_seconds"
    of_units = INFO.replace('unit=~"$unit", ', "")
    asked = (
        ("fleet", "Fleet", f"label_values({sampled}, fleet)", ""),
        ("instance", "Host", f'label_values({sampled}{{fleet=~"$fleet"}}, instance)', ""),
        # A worker of several queues is found by each of them.
        ("queue", "Queue", f"label_values({some}, queues)", "/([^,]+)/g"),
        ("unit", "Worker", f"label_values({of_units}, unit)", ""),
    )
    made = []
    for name, label, query, regex in asked:
        one = builders.QueryVariable(name).label(label).query(query).datasource(SOURCE).multi(True).regex(regex)
        one.include_all(True).all_value(DEFAULTS[name]).current(models.VariableOption(True, ["All"], ["$__all"]))
        made.append(one.sort(models.VariableSort.NATURAL_ASC).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED))
    return made


# Marks over all panels: name, colour, query, text. What the text is, the SDK has no field for.
MARKS = (
    (
        "OOM kills",
        "red",
        chosen(by_worker("sum", risen("plimsoll_worker_memory_events_total", 'event="oom_kill"')) + " > 0"),
        "OOM kill",
    ),
    (
        "Restarts",
        "orange",
        chosen(by_worker("sum", risen("plimsoll_worker_restarts_total")) + " > 0"),
        "Restart by systemd",
    ),
    (
        "Acts of the guard",
        "purple",
        chosen(by_worker("sum", risen("plimsoll_guard_acts_total"), "act") + " > 0"),
        "Memory guard: {{act}}",
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana 11.6 and later takes it: by provisioning, by import, and by its API."""
    board = builders.Dashboard("plimsoll: memory of Celery workers").uid(UID).tags(["plimsoll", "celery"])
    board.description("Who runs out of memory next, in which queue, since when, and what happened to it.")
    board.time("now-6h", "now").refresh("1m").timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    board.with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for choice in choices():
        board.with_variable(choice)
    for name, colour, expression, _ in MARKS:
        mark = builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour)
        board.annotation(mark.expr(expression))
    ids = count(1)
    for title, panels in (
        ("Fleet: who is at MemoryHigh next", fleet()),
        ("Queues: memory against load", queues()),
        ("Workers: memory against limits", workers()),
        ("Events", events()),
        ("Samplers and collection", health()),
    ):
        board.with_row(builders.Row(title).id(next(ids)))
        for panel in panels:
            board.with_panel(panel.id(next(ids)))
    # Closed, so that it asks nothing where there is no celery-exporter.
    row = builders.Row("Tasks by name, where celery-exporter runs").id(next(ids))
    for panel in exporter():
        row.with_panel(panel.id(next(ids)))
    board.with_row(row)
    made: dict[str, Any] = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    for mark, (*_, words) in zip(made["annotations"]["list"], MARKS):
        mark |= {"titleFormat": words, "textFormat": WORKER, "tagKeys": "instance,unit"}
    return made


def text() -> str:
    return json.dumps(dashboard(), indent=2, sort_keys=True) + "\n"


def queries(variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each PromQL expression with the title of its panel, annotation or variable, as it is asked with these variables.

    Their names are those of DEFAULTS, without the dollar. Raises KeyError for one that is in a query and is not known.
    """
    board = dashboard()
    panels = [one for top in board["panels"] for one in (top, *top.get("panels", []))]
    found = [(one["title"], each["expr"]) for one in panels for each in one.get("targets", [])]
    found += [(f"Annotation: {one['name']}", one["expr"]) for one in board["annotations"]["list"]]
    for one in board["templating"]["list"]:
        if asked := LABEL_VALUES.fullmatch(one["query"]):
            found.append((f"Variable: {one['name']}", f"count by ({asked[2]}) ({asked[1]})"))
    known = {**DEFAULTS, **variables}
    return [(title, VARIABLE.sub(lambda name: known[name[1] or name[2]], asked)) for title, asked in found]
