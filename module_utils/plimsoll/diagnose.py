"""Which task and which line a leaking worker's memory grows in: pure functions over the bootstrap's trace records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypedDict

from .formats import Trace, printable

# Sites and tasks below this share of the growth are not named: what is left of it is noise.
LEAST_SHARE = 0.1
MOST_CULPRITS = 3
# Of what RSS gained while it was traced, what Python's own allocations must explain to be called the cause.
EXPLAINED = 0.5
# Where celery_worker unpacks the application, and where any venv keeps its packages.
_PREFIX = re.compile(r"^.*/(?:releases/[^/]+/app|site-packages|dist-packages)/")


class Culprit(TypedDict):
    """One line that grows, and the task that it grew in; either may be missing.

    growth_kb is what the line still held at the end of the tracing windows and not at their start; share is its part of
    all such growth, task_share the task's part of the growth of RSS. tasks that do not grow are not here.
    """

    task: str | None
    task_share: float | None
    file: str | None
    line: int | None
    function: str | None
    growth_kb: float | None
    share: float | None
    windows: int


def short(file: str) -> str:
    """A file as its author knows it: below the application's directory or its venv's packages."""
    return _PREFIX.sub("", file)


def task_growth(records: Sequence[Trace]) -> dict[str, tuple[float, int]]:
    """Task to (KiB that RSS grew in it, how often it ran), over all processes of a worker, the largest growth first."""
    # A record holds all since its process began, so its last one counts. Where a count falls, the pid came again.
    newest: dict[tuple[Any, str], list[Trace]] = {}
    for record in sorted((one for one in records if one["kind"] == "task_growth"), key=lambda one: one["time"]):
        kept = newest.setdefault((record.get("pid"), printable(record.get("task", ""))), [record])
        if record.get("count", 0) >= kept[-1].get("count", 0):
            kept[-1] = record
        else:
            kept.append(record)
    total: dict[str, tuple[float, int]] = {}
    for (_, task), kept in newest.items():
        for record in kept:
            grown, count = total.get(task, (0.0, 0))
            total[task] = grown + record.get("rss_growth_kb", 0), count + int(record.get("count", 0))
    return dict(sorted(total.items(), key=lambda one: -one[1][0]))


def culprits(records: Sequence[Trace]) -> list[Culprit]:
    """The lines that grow most, with the task that they grow in; where nothing was traced, the tasks alone."""
    growth = {task: grown for task, (grown, _) in task_growth(records).items() if grown > 0}
    whole = sum(growth.values())
    shares = {task: round(grown / whole, 3) for task, grown in growth.items()}
    windows = [one for one in records if one["kind"] == "growth"]
    sites: dict[tuple[str, int, str], float] = {}
    traced = 0.0
    for window in windows:
        for site in window.get("sites", []):
            at = printable(site.get("file", "")), int(site["line"]), printable(site.get("function", ""))
            sites[at] = sites.get(at, 0.0) + site["growth_kb"]
            traced += max(0.0, site["growth_kb"])
    found: list[Culprit] = []
    for (file, line, function), grown in sorted(sites.items(), key=lambda one: -one[1])[:MOST_CULPRITS]:
        if traced <= 0 or grown / traced < LEAST_SHARE:
            break
        task = _task_of(windows, (file, line), growth)
        found.append(
            {
                "task": task,
                "task_share": shares.get(task) if task else None,
                "file": file,
                "line": line,
                "function": function or None,
                "growth_kb": round(grown, 1),
                "share": round(grown / traced, 3),
                "windows": len(windows),
            }
        )
    if found:
        return found
    blank = {"file": None, "line": None, "function": None, "growth_kb": None, "share": None, "windows": len(windows)}
    big = [task for task in growth if shares[task] >= LEAST_SHARE][:MOST_CULPRITS]
    return [{"task": task, "task_share": shares[task], **blank} for task in big]  # type: ignore[typeddict-item]


def _task_of(windows: Sequence[Trace], at: tuple[str, int], growth: dict[str, float]) -> str | None:
    """The task whose traced growth is the largest in those windows that saw the line; else the one of most RSS."""
    traced: dict[str, float] = {}
    for window in windows:
        if any((printable(site.get("file", "")), int(site["line"])) == at for site in window.get("sites", [])):
            for name, one in window.get("tasks", {}).items():
                task = printable(name)
                traced[task] = traced.get(task, 0.0) + one.get("traced_growth_kb", 0.0)
    if traced and max(traced.values()) > 0:
        return max(traced, key=lambda task: traced[task])
    return next(iter(growth), None)


def leak_class(records: Sequence[Trace]) -> str:
    """python_objects where the traced growth explains what RSS gained in the windows, else unknown."""
    windows = [record for record in records if record["kind"] == "growth" and "rss_growth_kb" in record]
    gained = sum(window["rss_growth_kb"] for window in windows)
    explained = sum(max(0.0, site["growth_kb"]) for window in windows for site in window.get("sites", []))
    return "python_objects" if gained > 0 and explained >= EXPLAINED * gained else "unknown"
