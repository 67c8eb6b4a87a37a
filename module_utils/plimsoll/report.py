"""The findings for people: a table for a terminal, and a page with a chart a worker."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import shutil
import subprocess
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from .detect import Life, Pattern, Verdict
from .diagnose import Culprit, Hold, short
from .findings import Finding, Findings, Name
from .formats import printable
from .series import Floats
from .store import Host

# The package runs from a checkout (pip install --editable): templates have one home there.
TEMPLATES = Path(__file__).resolve().parents[2] / "templates" / "report"

# Hours beyond which a span is only long.
YEARS = 5 * 365 * 24
# Columns of the table; a name is not cut to less than this.
WIDTH, NAME = 100, 8
# Blocks of a sparkline, and the part of the largest value that they have to cover at least.
SPARKS, SPARK_RANGE, BLOCKS = 12, 0.2, "▁▂▃▄▅▆▇█"
CHART_WIDTH, CHART_HEIGHT, CHART_LEFT, CHART_BOTTOM = 720, 220, 64, 26
# Over the whole width; a process that lived shorter has fewer. More points than pixels tell nothing more.
CHART_POINTS = 300
# Floor lines, of the processes that grew last; and marks of restarts and kills, the last ones.
CHART_FLOORS, CHART_MARKS = 8, 60
# Parts of a floor's whole rise between which its line is drawn.
FLOOR_PART = (0.05, 0.95)
# A process whose last sample is older than the worker's last one by so many seconds, and by so much of what was seen,
# is over: of a long series, floors alone are known.
LATE_S, LATE_SHARE = 120, 0.02
# A forecast is drawn so far behind the last sample at most, as a share of what was seen.
CHART_AHEAD = 0.6
# Charts on a page, those that leak first: each is up to 15 kB.
MOST_CHARTS = 400
# celery-worker@ and gate.service; without an @ in it, the name and .service.
_UNIT = re.compile(r"([\w.:-]{1,40}@)([\w.:-]{1,40}\.service)|([\w.:-]{1,40})(\.service)", re.ASCII)
# A picture that takes longer is left out, as it is where graphviz is not installed; seconds.
DRAWN_WITHIN_S = 10


def number(value: float) -> str:
    """Three digits, as a person writes them."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(kib: float) -> str:
    """KiB as a person says it."""
    for unit, scale in (("GiB", 1 << 20), ("MiB", 1 << 10)):
        if abs(kib) >= scale:
            return f"{number(kib / scale)} {unit}"
    return f"{number(kib)} KiB"


def span(hours: float) -> str:
    """Hours as a person says them."""
    if hours < 1:
        return f"{60 * hours:.0f} min"
    if hours < 48:
        return f"{hours:.1f} h"
    return f"{hours / 24:.1f} days" if hours < YEARS else "years"


def growth(one: Finding) -> str:
    """The rate with its interval, all in one unit."""
    values = one["growth_kb_per_hour"], one["growth_low"], one["growth_high"]
    largest = max(map(abs, values))
    unit, scale = ("GiB", 1 << 20) if largest >= 1 << 20 else ("MiB", 1 << 10)
    rate, low, high = (number(value / scale) if abs(value) >= scale / 100 else "0" for value in values)
    return f"{rate} {unit}/h ({low} to {high})"


def left(one: Finding) -> str:
    """The time left to MemoryMax, or to MemoryHigh where that is all that is known."""
    for hours in (one["hours_to_memory_max"], one["hours_to_memory_high"]):
        if hours is not None:
            return span(hours)
    return "recycled" if one["pattern"] == "recycled" else "-"


def _order(one: Finding) -> float:
    """By what the column of the time left is sorted: those without any come last."""
    for hours in (one["hours_to_memory_max"], one["hours_to_memory_high"]):
        if hours is not None:
            return hours
    return YEARS if one["pattern"] == "recycled" else 2 * YEARS


def forecast(one: Finding) -> list[str]:
    """When the limits are met, a sentence each."""
    said = []
    for name, hours, earliest, latest, limit in (
        (
            "MemoryHigh",
            one["hours_to_memory_high"],
            one["hours_to_memory_high_earliest"],
            one["hours_to_memory_high_latest"],
            one["memory_high_kb"],
        ),
        (
            "MemoryMax",
            one["hours_to_memory_max"],
            one["hours_to_memory_max_earliest"],
            one["hours_to_memory_max_latest"],
            one["memory_max_kb"],
        ),
    ):
        if hours == 0:
            said.append(f"{name} of {size(limit or 0)} is reached")
        elif hours is not None and earliest is not None:
            until = "never" if latest is None else span(latest)
            said.append(f"{name} of {size(limit or 0)} in {span(hours)} ({span(earliest)} to {until})")
    return said


def parts(unit: str) -> list[str]:
    """The one or two parts of a unit's name between which a narrow column may break it; none where it is no such name.

    What is longer than a name that a person gives is broken anywhere.
    """
    found = _UNIT.fullmatch(unit)
    return [part for part in found.groups() if part] if found else []


def sparkline(verdict: Verdict, parts: int = SPARKS) -> str:
    """What all processes of a worker held together, from its first sample to its last one."""
    generations = verdict.worker.generations
    start = min(float(one.times[0]) for one in generations)
    end = max(float(one.times[-1]) for one in generations)
    total = np.zeros(parts)
    for one in generations:
        part = np.minimum(((one.times - start) / ((end - start) or 1.0) * parts).astype(int), parts - 1)
        floor = np.full(parts, np.inf)
        np.minimum.at(floor, part, one.sizes)
        total += np.where(np.isfinite(floor), floor, 0.0)
    seen = total[total > 0]
    if not len(seen):
        return ""
    # What varies by little is to look so.
    most = float(seen.max())
    least = min(float(seen.min()), (1 - SPARK_RANGE) * most)
    heights = np.clip((total - least) / ((most - least) or 1.0) * (len(BLOCKS) - 1), 0, len(BLOCKS) - 1)
    return "".join(BLOCKS[round(height)] if size else " " for height, size in zip(heights, total))


def blame(one: Culprit) -> str:
    """A culprit in a sentence."""
    task = f"task {one['task']}" if one["task"] else "no single task"
    if one["file"] is None:
        why = "no line of Python holds it" if one["windows"] else "no line was traced yet"
        return f"{task}: {_percent(one['task_share'])} of the growth of RSS; {why}"
    where = f"{short(one['file'])}:{one['line']}" + (f" in {one['function']}" if one["function"] else "")
    if one["package"] not in (None, "application"):
        where += f" of {one['package']}" + (f", called at {short(one['caller'])}" if one["caller"] else "")
    return f"{task} at {where}: {_percent(one['share'])} of the traced growth"


def advised(one: Finding) -> list[str]:
    """The kind of the leak and what to do, where that is known; and what the static checks say of the very code."""
    advice = one["advice"]
    kind = [f"{one['leak_class'].replace('_', ' ')}: {advice['text']} ({advice['link']})"] if advice else []
    return [
        *(f"mend {mend['file']}:{mend['line']}: {mend['message']} ({mend['symbol']})" for mend in one["mends"]),
        *kind,
    ]


def state(one: Finding) -> str:
    """Behind the pattern: what became of the last act on it; empty for none."""
    return f", {one['remedy']['state'].replace('_', ' ')}" if one["remedy"] else ""


def remedied(one: Finding) -> list[str]:
    """What was done about it and what that has brought."""
    done = one["remedy"]
    if done is None:
        return []
    what = f" ({', '.join(done['settings'])})" if done["settings"] else ""
    state = "done, not proven yet" if done["state"] == "done" else done["state"].replace("_", " ")
    return [f"{done['act']}{what}: {state}, {done['time'][:16].replace('T', ' ')} UTC: {done['why']}"]


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"


def text(document: Findings, verdicts: Sequence[Verdict] | None) -> str:
    """The table for a terminal of WIDTH columns, the most urgent worker first, those that leak with what is known.

    Without the verdicts it has all but how memory went.
    """
    rows = [("HOST", "WORKER", "PATTERN", "GROWTH (95 % interval)", "LEFT", "MEMORY" if verdicts is not None else "")]
    notes: list[list[str]] = [[]]
    sparks = map(sparkline, verdicts) if verdicts is not None else itertools.repeat("")
    for one, spark in zip(document["workers"], sparks):
        pattern = ("LEAK " if one["leaking"] else "") + one["pattern"] + state(one)
        unit = one["unit"].removesuffix(".service")
        rows.append((one["host"], unit, pattern, growth(one), left(one), spark))
        said = [*forecast(one), *map(blame, one["culprits"]), *one["evidence"], *advised(one)]
        said = said if one["leaking"] or one["culprits"] else []
        said = said if one["pattern"] != "insufficient_data" else one["evidence"]
        notes.append([*remedied(one), *said])
    widths = [max(len(printable(row[column])) for row in rows) for column in range(len(rows[0]))]
    # What does not fit is cut from the longer of the two names.
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH and max(widths[:2]) > NAME:
        widths[widths.index(max(widths[:2]))] -= 1
    lines = []
    for row, said in zip(rows, notes):
        cells = (printable(cell, width).ljust(width) for cell, width in zip(row, widths))
        lines.append("  ".join(cells).rstrip())
        for note in said:
            lines += textwrap.wrap(
                printable(note, 1000),
                WIDTH,
                initial_indent="    - ",
                subsequent_indent="      ",
                break_on_hyphens=False,
            )
    lines += ["", summary(document)]
    for note in _since(document):
        lines += textwrap.wrap(printable(note, 4000), WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    said = [
        f"{'note' if one['collected'] else 'not collected'}: {one['host']}: {missing(one)}"
        for one in sorted(document["hosts"], key=lambda each: each["collected"])
        if one["reason"] or not one["collected"]
    ]
    for note in said:
        lines += textwrap.wrap(printable(note, 1000), WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(printable(line, 1000) for line in lines)


def summary(document: Findings) -> str:
    """One line for all."""
    fleet = document["fleet"]
    return (
        f"{fleet['leaking']} of {fleet['workers']} workers leak; {fleet['collected']} of {fleet['hosts']} hosts were"
        " collected"
    )


def missing(one: Host) -> str:
    """What is to be said of a host: what could not be read; why it was not collected, and when it was."""
    reason = printable(one["reason"], 300)
    if one["collected"]:
        return reason
    if one["last"] is None:
        return f"{reason}; it never was"
    last = datetime.fromtimestamp(one["last"], timezone.utc)
    return f"{reason}; last collected {last:%Y-%m-%d %H:%M} UTC"


def changed(document: Findings) -> list[tuple[str, list[Name]]]:
    """What is new since the findings before: what it is called, and the workers."""
    changes = document["changes"]
    called = {
        "new leak": changes["leaking"],
        "leaks no more": changes["mended"],
        "line known now": changes["named"],
        "leaked and is not seen any more": changes["gone"],
    }
    return [(name, workers) for name, workers in called.items() if workers]


def _since(document: Findings) -> list[str]:
    """What is new, in lines."""
    since = document["changes"]["since"]
    if since is None:
        return []
    said = [
        f"{name}: " + ", ".join(f"{one['host']} {one['unit'].removesuffix('.service')}" for one in workers)
        for name, workers in changed(document)
    ]
    return [f"since {since}: {one}" for one in said or ["no change"]]


def html(document: Findings, verdicts: Sequence[Verdict]) -> str:
    """The page: one file with all in it, nothing loaded from elsewhere, and no script or style but its own two."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        size=size,
        span=span,
        growth=growth,
        left=left,
        order=_order,
        forecast=forecast,
        blame=blame,
        advised=advised,
        remedied=remedied,
        state=state,
        short=short,
        missing=missing,
        parts=parts,
        printable=printable,
    )
    sparks = map(sparkline, verdicts)
    charts = [
        {**chart(verdict), "holds": drawn(one)} for one, verdict in zip(document["workers"][:MOST_CHARTS], verdicts)
    ]
    # The hashes are of what stands between the tags: no other script or style runs, whatever a host sent.
    style, script = ((TEMPLATES / name).read_text() for name in ("report.css", "report.js"))
    return environment.get_template("report.html.j2").render(
        document=document,
        summary=summary(document),
        workers=list(itertools.zip_longest(document["workers"], sparks, charts)),
        changed=changed(document),
        most_charts=MOST_CHARTS,
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none';"
        " form-action 'none'",
        style=style,
        script=script,
    )


def _hash(source: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def graph(holds: Sequence[Hold]) -> str:
    """What keeps objects alive as a graph in graphviz's DOT, roots on the left; ways that begin alike are one."""
    nodes: dict[tuple[str, ...], str] = {}
    lines = []
    for hold in holds:
        for end in range(1, len(hold["path"]) + 1):
            way = tuple(hold["path"][:end])
            if way in nodes:
                continue
            nodes[way] = f"n{len(nodes)}"
            last = f"\\n+{hold['growth']:,}" if end == len(hold["path"]) else ""
            # Of what a host sent, nothing may end the quotes.
            said = printable(way[-1], 80).replace("\\", "/").replace('"', "'")
            lines.append(f'{nodes[way]} [label="{said}{last}"]')
            if end > 1:
                lines.append(f"{nodes[way[:-1]]} -> {nodes[way]}")
    style = 'rankdir=LR; bgcolor="transparent"; node [shape=box, style=rounded, fontname="sans-serif", fontsize=11]'
    return "\n".join(["digraph {", style, *lines, "}"])


def drawn(one: Finding) -> str | None:
    """What keeps objects alive as an SVG by graphviz; None where there is nothing, or no graphviz, to draw it."""
    dot = shutil.which("dot")
    if not one["holds"] or dot is None:
        return None
    try:
        ran = subprocess.run(
            [dot, "-Tsvg"],
            input=graph(one["holds"]).encode(),
            capture_output=True,
            timeout=DRAWN_WITHIN_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    svg = ran.stdout.decode(errors="replace")
    return svg[svg.index("<svg") :] if "<svg" in svg else None


def chart(verdict: Verdict) -> dict[str, Any]:
    """One worker in pixels: processes, the unit's own figure, floors with their interval, limits, restarts and kills,
    the forecast, and the ticks of both axes."""
    worker, limits = verdict.worker, verdict.worker.limits
    start = min(float(one.times[0]) for one in worker.generations)
    end = max(float(one.times[-1]) for one in worker.generations)
    inside = (limits.times >= start) & (limits.times <= end)
    most = max([float(one.sizes.max()) for one in worker.generations] + list(limits.levels[inside]))
    # A limit far above would press all lines to the ground.
    shown = [limit for limit in (limits.high_kb, limits.max_kb) if limit and limit <= 8 * most]
    # The name of a limit has its place above the line.
    top = 1.1 * max([most, *map(float, shown)]) or 1.0
    until = _until(verdict, start, end) if shown else end

    def x(when: float) -> float:
        return round(CHART_LEFT + (when - start) / ((until - start) or 1.0) * (CHART_WIDTH - CHART_LEFT - 8), 1)

    def y(kib: float) -> float:
        return round((CHART_HEIGHT - CHART_BOTTOM) * (1 - min(max(kib, 0.0), top) / top), 1)

    def points(times: Floats, sizes: Floats) -> str:
        most = CHART_POINTS * float(times[-1] - times[0]) / ((end - start) or 1.0)
        at = np.unique(np.linspace(0, len(times) - 1, min(len(times), max(2, int(most)))).astype(int))
        return " ".join(f"{x(float(times[i]))},{y(float(sizes[i]))}" for i in at)

    def wedge(
        times: tuple[float, float], at: tuple[float, float], low: float, slope: float, high: float
    ) -> dict[str, str]:
        """A line through a point, and its interval, from one time to another. Slopes in KiB an hour."""

        def along(rate: float, when: float) -> str:
            return f"{x(when)},{y(at[1] + rate * (when - at[0]) / 3600)}"

        begin, finish = times
        middle = [at[0]] if begin < at[0] < finish else []
        way = [begin, *middle, finish]
        upper = [along(high if when >= at[0] else low, when) for when in way]
        lower = [along(low if when >= at[0] else high, when) for when in way]
        return {
            "line": f"{along(slope, begin)} {along(slope, finish)}",
            "band": " ".join([*upper, *reversed(lower)]),
        }

    grown = {id(life.generation) for life in verdict.lives if life.pattern.leaking}
    alone = {id(life.generation) for life in verdict.lives}
    lines = [
        {
            "name": f"{one.role or 'process'} {one.pid}",
            # Of those that were recycled too fast to be judged alone, all grew.
            "grows": id(one) in grown or (verdict.pattern is Pattern.RECYCLED and id(one) not in alone),
            "points": points(one.times, one.sizes),
        }
        for one in worker.generations
    ]
    floors = [
        wedge(*_floor(one), one.rate.low, one.rate.slope, one.rate.high)
        for one in sorted(verdict.lives, key=lambda one: float(one.generation.times[-1]))
        if one.pattern.leaking
    ][-CHART_FLOORS:]
    late = end - max(LATE_S, LATE_SHARE * (end - start))
    level = limits.level_kb or sum(float(one.sizes[-1]) for one in worker.generations if one.times[-1] >= late)
    marks = [("MemoryHigh", limits.high_kb), ("MemoryMax", limits.max_kb)]
    happened = [("restart", limits.restarted), ("OOM kill", limits.killed)]
    rate = verdict.rate
    return {
        "lines": lines,
        "cgroup": points(limits.times[inside], limits.levels[inside]) if inside.any() else "",
        "floors": floors,
        "forecast": wedge((end, until), (end, level), rate.low, rate.slope, rate.high) if until > end else None,
        "marks": [
            {"x": x(float(when)), "name": name, "at": _clock(float(when), until - start)}
            for name, times in happened
            for when in times[(times >= start) & (times <= end)][-CHART_MARKS:]
        ],
        "limits": [{"name": name, "y": y(float(at)), "kb": at} for name, at in marks if at in shown and at],
        "sizes": [{"y": y(part * top), "label": size(part * top)} for part in (0.0, 0.25, 0.5, 0.75)],
        "times": [{"x": x(when), "label": _clock(when, until - start)} for when in np.linspace(start, until, 5)],
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "left": CHART_LEFT,
        "ground": CHART_HEIGHT - CHART_BOTTOM,
    }  # fmt: skip


def _until(verdict: Verdict, start: float, end: float) -> float:
    """Unix seconds until which the forecast of a leak is drawn: a little behind the last limit, if that is near."""
    met = [one.hours for one in (verdict.hours_to_high, verdict.hours_to_max) if one is not None and one.hours > 0]
    if not verdict.pattern.leaking or not met:
        return end
    return end + min(max(met) * 3600 * 1.1, CHART_AHEAD * (end - start))


def _floor(life: Life) -> tuple[tuple[float, float], tuple[float, float]]:
    """From when to when a process's floor rose, and a point in the middle that its line goes through.

    The floor is what it never fell below again. Its rate is of the time in which it grew, so the line is of that too.
    """
    times, sizes = life.generation.times, life.generation.sizes
    floor = np.minimum.accumulate(sizes[::-1])[::-1]
    begin, finish = np.searchsorted(floor, floor[0] + np.multiply(FLOOR_PART, floor[-1] - floor[0]))
    if finish <= begin:
        begin, finish = 0, len(times) - 1
    middle = float(times[begin] + times[finish]) / 2
    along = slice(begin, finish + 1)
    level = float(np.median(floor[along] - life.rate.slope / 3600 * (times[along] - middle)))
    return (float(times[begin]), float(times[finish])), (middle, level)


def _clock(when: float, long: float) -> str:
    shape = "%H:%M:%S" if long < 3600 else "%H:%M" if long < 86400 else "%m-%d %H:%M"
    return datetime.fromtimestamp(when, timezone.utc).strftime(shape)
