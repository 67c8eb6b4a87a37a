"""The document of a soak for people and for CI: a table for a terminal, JUnit's XML, and a page with a chart a task."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2

from .diagnose import short
from .formats import InputError, printable
from .report import CHART_BOTTOM, CHART_HEIGHT, CHART_LEFT, CHART_WIDTH, blame, size
from .soak import FAIL, PASS, UNDECIDED

TEMPLATES = Path(__file__).resolve().parents[2] / "templates" / "soak"
# Columns of a task's name in the table; a longer one is cut in the middle, as both of its ends tell.
NAME = 44

Document = Mapping[str, Any]

# Of what a host sends: tasks, points of a chart, and trace records at most.
_MOST_TASKS, _MOST_POINTS, _MOST_RECORDS = 1000, 1000, 1000


def sound(came: object) -> dict[str, Any]:
    """What worker_soak returned, of which a host may have made anything. Raises InputError."""
    whole = _object(came, "soak")
    sent, worker = _object(whole.get("sent"), "sent"), _object(whole.get("worker"), "worker")
    told: dict[str, Any] = {
        "sent": {
            **{name: _number(sent.get(name), name) for name in ("seconds", "sent", "left_out")},
            "ended": str(sent.get("ended")),
        },
        "worker": {
            name: worker[name] if name in ("measure", "python") else _number(worker[name], name)
            for name in (*_FIGURES, "measure", "python")
            if worker.get(name) is not None
        },
        "tasks": [_sound_task(one) for one in _list(whole.get("tasks"), "tasks", _MOST_TASKS)],
        "records": {
            str(task): [_object(one, "records") for one in _list(records, "records", _MOST_RECORDS)]
            for task, records in _object(whole.get("records"), "records").items()
        },
        "notes": [str(one) for one in _list(whole.get("notes"), "notes", _MOST_TASKS)],
    }
    told["worker"] = {"tasks": 0, "measure": "malloc", **told["worker"]}
    return told


_FIGURES = (
    "processes",
    "tasks",
    "used_kb_per_1000_tasks",
    "rss_kb_per_1000_tasks",
    "descriptors_per_1000_tasks",
    "rss_kb",
)
_COUNTS = ("ran", "measured", "judged", "failed", "budget_kb")
_TOGETHER = ("growth_kb", "growth_low", "growth_high", "error_kb", "confidence")
_MEASURED = (*_TOGETHER, "seconds_a_task", "decided_s")


def _sound_task(came: object) -> dict[str, Any]:
    one = _object(came, "tasks")
    if one.get("verdict") not in (PASS, FAIL, UNDECIDED):
        raise InputError("the host's result: verdict is none")
    measured = {name: None if one.get(name) is None else _number(one[name], name) for name in _MEASURED}
    if None in (measured[name] for name in _TOGETHER):
        measured |= dict.fromkeys(_TOGETHER)
    return {
        **{name: str(one.get(name)) for name in ("task", "verdict", "why")},
        "planned": bool(one.get("planned")),
        **{name: _number(one.get(name), name) for name in _COUNTS},
        **measured,
        "errors": {str(kind): _number(count, "errors") for kind, count in _object(one.get("errors"), "errors").items()},
        "curve": [
            [_number(value, "curve") for value in _list(point, "curve", 2)]
            for point in _list(one.get("curve"), "curve", _MOST_POINTS)
        ],
    }


def _object(one: object, name: str) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise InputError(f"the host's result: {name} is no object")
    return one


def _list(one: object, name: str, most: int) -> list[Any]:
    if not isinstance(one, list) or len(one) > most:
        raise InputError(f"the host's result: {name} is no list of {most} at most")
    return one


def _number(one: object, name: str) -> float:
    if isinstance(one, bool) or not isinstance(one, (int, float)) or not math.isfinite(one):
        raise InputError(f"the host's result: {name} is no number")
    return one


def summary(document: Document) -> str:
    """The verdict in a line."""
    verdicts = [one["verdict"] for one in document["tasks"]]
    failed, undecided = verdicts.count(FAIL), verdicts.count(UNDECIDED)
    said = [f"{verdicts.count(PASS)} pass"]
    said += [f"{failed} fail"] if failed else []
    said += [f"{undecided} undecided"] if undecided else []
    number = f"{len(verdicts)} task{'s' if len(verdicts) != 1 else ''}"
    return f"{document['verdict'].upper()}: of {number} of {printable(document['app'])}, {', '.join(said)}"


def growth(one: Document) -> str:
    """KiB per 1,000 tasks with the interval, all in one unit."""
    values = one["growth_kb"], one["growth_low"], one["growth_high"]
    if values[0] is None:
        return "-"
    largest = max(map(abs, values))
    unit, scale = next((unit, scale) for unit, scale in _UNITS if largest >= scale or unit == "KiB")
    mean, low, high = (f"{value / scale:,.1f}" for value in values)
    return f"{mean} {unit} ({low} to {high})"


_UNITS = (("GiB", 1 << 20), ("MiB", 1 << 10), ("KiB", 1))


def named(text: str, most: int = NAME) -> str:
    shown = printable(text)
    return shown if len(shown) <= most else f"{shown[: most // 2 - 1]}…{shown[len(shown) - most // 2 :]}"


def compared(one: Document) -> str:
    """Beside the baseline; empty where there is none of it."""
    beside = one["against_baseline"]
    return f"{beside['verdict']}: was {size(beside['growth_kb'])}, p {beside['p']:.2g}" if beside else ""


def told(one: Document) -> list[str]:
    """What is to be said of a task beside its figures, a sentence each; lines first."""
    said = [] if one["verdict"] == PASS else [one["why"]]
    if one["leak"]:
        said += [blame(culprit) for culprit in one["leak"]["culprits"] if culprit["file"] is not None]
        said += one["leak"]["evidence"]
        if one["leak"]["advice"]:
            advice = one["leak"]["advice"]
            said.append(f"{one['leak']['leak_class'].replace('_', ' ')}: {advice['text']} ({advice['link']})")
    if one["failed"] and one["verdict"] != UNDECIDED:
        kinds = ", ".join(f"{count} {kind}" for kind, count in one["errors"].items())
        said.append(f"{one['failed']} of {one['ran']} runs raised: {kinds}")
    if not one["planned"]:
        said.append("is not in the tasks file: another task sent it")
    return [printable(text, 400) for text in said]


def worker(document: Document) -> list[str]:
    """What is told of the worker as a whole, and not judged."""
    whole = document["worker"]
    if "rss_kb" not in whole:
        return []
    said = [
        f"the worker had {size(whole['rss_kb'])} of RSS in the end, and in its last half gained per 1,000 tasks"
        f" {size(whole['rss_kb_per_1000_tasks'])} of RSS, {size(whole['used_kb_per_1000_tasks'])} in use, and"
        f" {whole['descriptors_per_1000_tasks']:g} file descriptors, all of its tasks together"
    ]
    if whole["measure"] != "malloc":
        said.append("this Python's malloc does not tell what is in use: RSS was judged in its place, which is coarser")
    return said


def table(document: Document) -> str:
    rows = [("TASK", "VERDICT", "GROWTH PER 1,000 TASKS", "BUDGET", "RUNS", "BASELINE" if document["baseline"] else "")]
    for one in document["tasks"]:
        beside = one["against_baseline"]
        rows.append(
            (
                named(one["task"]),
                one["verdict"].upper() if one["verdict"] == FAIL else one["verdict"],
                growth(one),
                size(one["budget_kb"]),
                f"{one['ran']:,}",
                beside["verdict"] if beside else "",
            )
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row, one in zip(rows, [None, *document["tasks"]]):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        lines += [f"    - {said}" for said in told(one)] if one else []
    took = f"{document['seconds']:.0f} s, {document['worker']['tasks']:,} tasks"
    return "\n".join([*lines, *worker(document), f"{summary(document)} ({took}; {document['ended']})"])


def junit(document: Document) -> str:
    """XML as Jenkins, GitLab and others read it: a case a task; one that is undecided is an error, and no failure."""
    tasks = document["tasks"]
    counts = {
        "tests": str(len(tasks)),
        "failures": str(sum(one["verdict"] == FAIL for one in tasks)),
        "errors": str(sum(one["verdict"] == UNDECIDED for one in tasks)),
        "time": str(document["seconds"]),
    }
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "plimsoll soak", **counts})
    for one in tasks:
        took = str(round((one["seconds_a_task"] or 0.0) * one["ran"], 2))
        name = {"classname": "plimsoll.soak", "name": printable(one["task"], 400), "time": took}
        case = ElementTree.SubElement(suite, "testcase", name)
        lines = [f"growth per 1,000 tasks: {growth(one)}, of a budget of {size(one['budget_kb'])}"]
        lines += [compared(one)] if one["against_baseline"] else []
        lines += told(one)
        if one["verdict"] == PASS:
            ElementTree.SubElement(case, "system-out").text = "\n".join(lines)
        else:
            kind = "failure" if one["verdict"] == FAIL else "error"
            at = next((_at(culprit) for culprit in (one["leak"] or {}).get("culprits", ()) if culprit["file"]), "")
            message = f"{printable(one['why'], 300)}{at}"
            ElementTree.SubElement(case, kind, {"type": one["verdict"], "message": message}).text = "\n".join(lines)
    ElementTree.indent(suites)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(suites, encoding="unicode")}\n'


def _at(culprit: Document) -> str:
    return printable(f" at {short(culprit['file'])}:{culprit['line']}", 200)


def page(document: Document) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(size=size, growth=growth, told=told, compared=compared, printable=printable)
    style = (TEMPLATES / "soak.css").read_text()
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("soak.html.j2").render(
        document=document,
        summary=summary(document),
        worker=worker(document),
        tasks=[(one, chart(one["curve"])) for one in document["tasks"]],
        # The hash is of what stands between the tags: no script and no other style runs, whatever a task is called.
        policy=f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'",
        style=style,
    )


def chart(curve: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """What a task gained, KiB, over its measured runs, in pixels; None of less than two points."""
    if len(curve) < 2:
        return None
    last = curve[-1][0]
    top, ground = max(*(kib for _, kib in curve), 1.0) * 1.05, min(0.0, *(kib for _, kib in curve))
    height = CHART_HEIGHT - CHART_BOTTOM
    levels = [ground + part * (top - ground) for part in (0, 0.25, 0.5, 0.75)]

    def x(run: float) -> float:
        return round(CHART_LEFT + run / last * (CHART_WIDTH - CHART_LEFT - 8), 1)

    def y(kib: float) -> float:
        return round(height * (1 - (kib - ground) / (top - ground)), 1)

    return {
        "points": " ".join(f"{x(run)},{y(kib)}" for run, kib in curve),
        "sizes": [{"y": y(at), "label": size(at)} for at in levels],
        "runs": [{"x": x(last * part), "label": f"{last * part:,.0f}"} for part in (0, 0.25, 0.5, 0.75, 1)],
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "left": CHART_LEFT,
    }
