"""The table and the page: aligned, whole, and safe to look at, whatever the hosts sent."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from plimsoll import report
from plimsoll.diagnose import Culprit, Hold
from plimsoll.findings import Finding, Findings, findings
from plimsoll.formats import MAX_COUNT, CgroupSample, HostData, Incident, Sample
from plimsoll.store import Host

T0 = 1_763_942_400
GATE = "celery-worker@gate.service"
EVIL = "\x1b[2J\x07\"><script>alert(1)</script><img src=//x.example>{{ 7*7 }}\u202e\ud800\n& 'end"


def samples(unit: str = GATE, rate: float = 2000, hours: int = 30, pid: int = 7) -> list[Sample]:
    return [
        Sample(T0 + 900 * n, pid, int(60_000 + rate * n / 4), "celery", unit, T0, "child", tasks=10 * n)
        for n in range(4 * hours)
    ]


def figures(
    high: int | None, most: int | None, unit: str = GATE, levels: Sequence[int] = (90_000,)
) -> list[CgroupSample]:
    return [CgroupSample(T0 + 900 * n, unit, level, high, most) for n, level in enumerate(levels)]


def traces(
    task: str = "shop.scan", file: str = "/x/releases/1/app/shop/tasks.py", unit: str = GATE
) -> list[dict[str, Any]]:
    site = {"file": file, "line": 9, "function": task, "growth_kb": 500}
    growth = {"kind": "growth", "time": 2, "sites": [site], "tasks": {task: {"traced_growth_kb": 500}}}
    return [
        {"kind": "task_growth", "time": 1, "task": task, "count": 9, "rss_growth_kb": 700, "unit": unit},
        {**growth, "unit": unit},
    ]


def read(*data: HostData, missing: Sequence[Host] = ()) -> tuple[Findings, list[Any]]:
    up = [({"host": one.host, "collected": True, "reason": "", "last": None}, one) for one in data]
    return findings([*up, *((one, None) for one in missing)], T0)  # type: ignore[list-item]


def fleet() -> tuple[Findings, list[Any]]:
    return read(
        HostData(
            "w-1", samples() + samples("celery-worker@sales.service", 0, pid=8), figures(300_000, 400_000), traces()
        ),
        HostData("worker-with-a-long-name", samples(rate=90_000), problems=["samples/x.csv: damaged"]),
        missing=[{"host": "ghost", "collected": False, "reason": "unreachable: no route", "last": T0}],
    )


# ---- words ----


@pytest.mark.parametrize(
    ("kib", "said"),
    [
        (0, "0 KiB"),
        (3.14, "3.14 KiB"),
        (1024, "1 MiB"),
        (1000 * 1024, "1000 MiB"),
        (-2048, "-2 MiB"),
        (320 * 1024, "320 MiB"),
        (1.5 * 2**20, "1.5 GiB"),
    ],
)
def test_sizes_as_a_person_says_them(kib: float, said: str) -> None:
    assert report.size(kib) == said


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0, "0 min"), (0.5, "30 min"), (1, "1.0 h"), (47.9, "47.9 h"), (48, "2.0 days"), (1e9, "years")],
)
def test_spans_as_a_person_says_them(hours: float, said: str) -> None:
    assert report.span(hours) == said


def finding(**values: Any) -> Finding:
    (one,) = read(HostData("w-1", samples()))[0]["workers"]
    one.update(values)  # type: ignore[typeddict-item]
    return one


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((2048, 1024, 4096), "2 MiB/h (1 to 4)"),
        ((2**21, 2**20, 2**22), "2 GiB/h (1 to 4)"),
        ((-1, -3, 0), "0 MiB/h (0 to 0)"),
        ((-10 * 1024, -2048, -0.0), "-10 MiB/h (-2 to 0)"),
    ],
)
def test_growth_is_told_with_its_interval_in_one_unit(values: tuple[float, float, float], said: str) -> None:
    rate, low, high = values
    assert report.growth(finding(growth_kb_per_hour=rate, growth_low=low, growth_high=high)) == said


def test_the_time_left_is_that_to_memory_max_or_to_memory_high() -> None:
    assert report.left(finding(hours_to_memory_max=0.25, hours_to_memory_high=0.1)) == "15 min"
    assert report.left(finding(hours_to_memory_high=0.1)) == "6 min"
    assert report.left(finding(pattern="recycled")) == "recycled"
    assert report.left(finding()) == "-"


def test_a_forecast_tells_its_interval_and_what_is_reached() -> None:
    to_high = {"hours_to_memory_high": 0.0, "memory_high_kb": 300 * 1024}
    to_max = {
        "hours_to_memory_max": 5.0,
        "hours_to_memory_max_earliest": 4.0,
        "hours_to_memory_max_latest": None,
        "memory_max_kb": 320 * 1024,
    }
    assert report.forecast(finding(**to_high, **to_max)) == [
        "MemoryHigh of 300 MiB is reached",
        "MemoryMax of 320 MiB in 5.0 h (4.0 h to never)",
    ]
    assert report.forecast(finding()) == []


def test_a_sparkline_shows_what_all_processes_held_and_little_as_little() -> None:
    grows = report.sparkline(read(HostData("w-1", samples(rate=90_000)))[1][0])
    assert (grows[0], grows[-1], len(grows)) == ("▁", "█", report.SPARKS)
    assert list(grows) == sorted(grows)
    assert set(report.sparkline(read(HostData("w-1", samples(rate=0)))[1][0])) == {"█"}
    late = [one._replace(pid=9, timestamp=one.timestamp + 60 * 3600) for one in samples(rate=0)]
    paused = report.sparkline(read(HostData("w-1", samples(rate=0) + late))[1][0])
    assert paused == "████    ████"


@pytest.mark.parametrize(
    ("unit", "parts"),
    [
        (GATE, ["celery-worker@", "gate.service"]),
        ("celery-nightly.service", ["celery-nightly", ".service"]),
        ("celery@host1", []),
        ("python -m celery worker", []),
        (f"celery-worker@{'x' * 41}.service", []),
        (f"{GATE}\n", []),
    ],
)
def test_the_name_of_a_unit_has_one_place_to_be_broken(unit: str, parts: list[str]) -> None:
    assert report.parts(unit) == parts
    assert ("<wbr>" in report.html(*read(HostData("w-1", samples(unit))))) is bool(parts)


def culprit(**values: Any) -> Culprit:
    one: Any = {
        "task": "a",
        "task_share": 0.75,
        "file": "/x/site-packages/b.py",
        "line": 3,
        "function": "f",
        "share": 0.5,
    }
    return {**one, "growth_kb": 5.0, "windows": 1, "package": "application", "caller": None, **values}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "task a at b.py:3 in f: 50 % of the traced growth"),
        ({"function": None}, "task a at b.py:3: 50 % of the traced growth"),
        ({"task": None}, "no single task at b.py:3 in f: 50 % of the traced growth"),
        ({"file": None, "windows": 0}, "task a: 75 % of the growth of RSS; no line was traced yet"),
        ({"file": None, "task_share": None}, "task a: ? of the growth of RSS; no line of Python holds it"),
        ({"package": "kombu"}, "task a at b.py:3 in f of kombu: 50 % of the traced growth"),
        (
            {"package": "kombu", "caller": "/v/releases/1/app/shop/tasks.py:7"},
            "task a at b.py:3 in f of kombu, called at shop/tasks.py:7: 50 % of the traced growth",
        ),
    ],
)
def test_a_culprit_in_a_sentence(values: dict[str, Any], said: str) -> None:
    assert report.blame(culprit(**values)) == said


# ---- the table ----


def test_the_table_is_aligned_and_leaks_come_with_their_culprits() -> None:
    lines = report.text(*fleet()).split("\n")
    rows = [line for line in lines[: lines.index("")] if not line.startswith("    ")]
    starts = [lines[0].index(name) for name in ("WORKER", "PATTERN", "GROWTH", "LEFT", "MEMORY")]
    assert len(rows) == 4
    for row in rows[1:]:
        assert all(row[at - 2 : at] == "  " and row[at] != " " for at in starts), row
    assert [row.split()[0] for row in rows[1:]] == ["w-1", "worker-with-a-l…", "w-1"]
    assert "LEAK growing" in rows[1] and "days" in rows[1] and "LEAK" not in rows[3]
    assert any(line.startswith("    - MemoryMax of 391 MiB in ") for line in lines)
    assert "    - task shop.scan at shop/tasks.py:9 in shop.scan: 100 % of the traced growth" in lines
    assert lines[lines.index("") + 1 :] == [
        "2 of 3 workers leak; 2 of 3 hosts were collected",
        "not collected: ghost: unreachable: no route; last collected 2025-11-24 00:00 UTC",
        "note: worker-with-a-long-name: samples/x.csv: damaged",
    ]
    assert not any(line != line.rstrip() for line in lines)
    assert max(map(len, lines[: lines.index("")])) <= 100


def test_the_table_fits_whatever_the_names() -> None:
    unit = "celery-worker@" + "x" * 150 + ".service"
    lines = report.text(*read(HostData("h" * 150, samples(unit, 90_000), figures(1, 9_000_000, unit)))).split("\n")
    assert max(map(len, lines[: lines.index("")])) <= 100


def test_a_fleet_without_workers_is_a_table_too() -> None:
    assert report.text(*read()).split("\n") == [
        "HOST  WORKER  PATTERN  GROWTH (95 % interval)  LEFT  MEMORY",
        "",
        "0 of 0 workers leak; 0 of 0 hosts were collected",
    ]


def hostile() -> tuple[Findings, list[Any]]:
    """Names that a host or a task made up, also where the readers of files would have made them printable before."""
    happened = [Incident(T0, EVIL, EVIL, EVIL, 12)]
    data = HostData(EVIL, samples(EVIL), figures(300_000, 400_000, EVIL), traces(EVIL, EVIL, EVIL), [EVIL], happened)
    return read(data, missing=[{"host": EVIL, "collected": False, "reason": EVIL, "last": None}])


def test_no_name_reaches_the_terminal_as_it_is() -> None:
    shown = report.text(*hostile())
    assert all(line.isprintable() for line in shown.split("\n"))
    shown.encode()
    assert shown.count("<script>") >= 3 and "\x1b" not in shown


def test_what_happened_to_a_worker_is_in_the_table_and_on_the_page_as_it_reads_and_no_more() -> None:
    document, verdicts = hostile()
    (said,) = [one for one in document["workers"][0]["evidence"] if one.startswith("2025-11-24 00:00 UTC, ")]
    assert "alert(1)" in said and said.endswith(" (12 times)")
    shown = " ".join(report.text(document, verdicts).split())
    assert f"- {said}" in shown
    assert f"<li>{html.escape(said).replace('&quot;', '&#34;').replace('&#x27;', '&#39;')}</li>" in report.html(
        document, verdicts
    )


# ---- the page ----


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.code: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "line", "br", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)
        else:
            self.code[self.open[-1]] = data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


TAGS = (
    "html,head,meta,title,style,script,body,header,main,h1,h2,h3,p,div,dl,dt,dd,small,label,input,button,table,caption,"
    "thead,tbody,tr,th,td,a,span,wbr,section,details,summary,ul,li,strong,svg,line,text,polyline,polygon"
)


def page(document: Findings, verdicts: list[Any]) -> Page:
    text = report.html(document, verdicts)
    text.encode()
    made = Page(text)
    assert made.open == []
    assert {tag for tag, _ in made.tags} <= set(TAGS.split(","))
    return made


def test_the_page_needs_nothing_from_elsewhere() -> None:
    document, verdicts = fleet()
    made = page(document, verdicts)
    for tag, attributes in made.tags:
        assert not {"src", "srcset", "data", "action", "xlink:href", "style"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    shown = report.html(document, verdicts).replace(made.code["script"], "")
    assert not re.search(r"https?:|//|@import|url\(|<link|javascript:", shown)


def test_the_policy_lets_its_own_script_and_style_run_and_nothing_else() -> None:
    made = page(*hostile())
    (policy,) = [one["content"] for one in made.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    hashes = {
        name: base64.b64encode(hashlib.sha256(made.code[name].encode()).digest()).decode()
        for name in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}';"
        " base-uri 'none'; form-action 'none'"
    )
    assert len(made.all("script")) == len(made.all("style")) == 1
    assert not any("innerHTML" in code or "eval(" in code for code in made.code.values())


def test_every_worker_has_a_row_a_section_and_a_chart() -> None:
    made = page(*fleet())
    assert [one["href"] for one in made.all("a")] == ["#findings", "#w1", "#w2", "#w3"]
    assert [one["id"] for one in made.all("section")] == ["w1", "w2"]
    assert [one["id"] for one in made.all("details")] == ["w3"]
    assert len(made.all("svg")) == 3
    lines = [one for one in made.all("polyline") if one.get("class") in ("grows", None)]
    assert [one.get("class") for one in lines] == ["grows", "grows", None]
    text = "".join(made.text)
    for said in (
        "2 of 3 workers leak",
        "Not collected:",
        "ghost: unreachable: no route; last collected 2025-11-24",
        "Note:",
        "samples/x.csv: damaged",
    ):
        assert said in text
    assert "task shop.scan at shop/tasks.py:9 in shop.scan" in text and "leak class" in text


def test_no_name_is_markup_on_the_page() -> None:
    document, verdicts = hostile()
    made = page(document, verdicts)
    shown = report.html(document, verdicts)
    assert shown.count("<script") == 1 and "<img" not in shown and "{{ 7*7 }}" in shown
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown) is None
    assert "".join(made.text).count("<script>alert(1)</script>") >= 6
    assert all("<script>" in str(one["aria-label"]) for one in made.all("svg"))


# ---- the chart ----


def chart(lives: list[Sample], cgroups: Sequence[CgroupSample] = ()) -> dict[str, Any]:
    _, verdicts = read(HostData("w-1", lives, list(cgroups)))
    return report.chart(verdicts[0])


def spots(points: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (spot.split(",") for spot in points.split())]


ODD: dict[str, tuple[list[Sample], list[CgroupSample]]] = {
    "one sample": (samples()[:1], figures(1, 2)),
    "no width": ([one._replace(timestamp=5.0, pid=n) for n, one in enumerate(samples())], []),
    "no height": ([one._replace(rss_kb=0) for one in samples()], figures(0, 0, levels=[0, 0])),
    "as much as a file can say": ([one._replace(rss_kb=MAX_COUNT - 1) for one in samples()], figures(1, MAX_COUNT - 1)),
    "the end of time": ([one._replace(timestamp=1e11 - 1 - n) for n, one in enumerate(samples())], []),
    "a leak that starts again and is killed": (
        samples(rate=9000),
        [
            one._replace(oom_kill=n // 3, n_restarts=n // 2)
            for n, one in enumerate(figures(300_000, 400_000, levels=[9] * 120))
        ],
    ),
    "a leak that is near its limit": (samples(rate=9000), figures(120_000, 340_000, levels=[300_000] * 120)),
    "figures of other times": (samples(hours=1), [one._replace(timestamp=5.0) for one in figures(1, 2)]),
    "a figure far above": (samples(hours=1), figures(None, None, levels=[90_000, 9_000_000, 90_000])),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_chart_of_anything_is_within_its_frame(odd: str) -> None:
    drawn = chart(*ODD[odd])
    assert drawn["lines"]
    wedges = [*drawn["floors"], *([drawn["forecast"]] if drawn["forecast"] else [])]
    for points in [
        *[one["points"] for one in drawn["lines"]],
        drawn["cgroup"],
        *[one[part] for one in wedges for part in ("line", "band")],
    ]:
        for x, y in spots(points):
            assert drawn["left"] <= x <= drawn["width"] and 0 <= y <= drawn["ground"]
    assert all(0 <= one["y"] <= drawn["ground"] for one in drawn["limits"] + drawn["sizes"])
    assert all(drawn["left"] <= one["x"] <= drawn["width"] for one in drawn["marks"] + drawn["times"])
    page(*read(HostData("w-1", *ODD[odd])))


def test_a_limit_is_drawn_with_room_for_its_name_and_not_where_it_would_flatten_all() -> None:
    lives = samples()
    most = max(one.rss_kb for one in lives)
    near = chart(lives, figures(most, 2 * most))["limits"]
    assert [one["name"] for one in near] == ["MemoryHigh", "MemoryMax"]
    assert near[1]["y"] > 12
    assert [one["name"] for one in chart(lives, figures(most, 20 * most))["limits"]] == ["MemoryHigh"]
    assert chart(lives, figures(None, None))["limits"] == []


def test_a_leak_has_its_floor_and_its_forecast_and_a_calm_worker_has_neither() -> None:
    lives = samples(rate=9000)
    drawn = chart(lives, figures(None, 400_000, levels=[one.rss_kb for one in lives]))
    line, floor = spots(drawn["lines"][0]["points"]), spots(drawn["floors"][0]["line"])
    for x, y in floor:
        assert y == pytest.approx(np.interp(x, *zip(*line)), abs=1)
    assert floor[1][0] - floor[0][0] > 0.85 * (line[-1][0] - line[0][0])
    ((at, level), (until, met)) = spots(drawn["forecast"]["line"])
    (most,) = [one["y"] for one in drawn["limits"]]
    assert (at, level) == pytest.approx(line[-1], abs=3) and until == drawn["width"] - 8
    assert level > most > met, "it meets MemoryMax within the picture"
    low, high = spots(drawn["forecast"]["band"])[2][1], spots(drawn["forecast"]["band"])[1][1]
    assert high <= met <= low
    calm = chart(samples(rate=0), figures(None, 400_000))
    assert (calm["floors"], calm["forecast"]) == ([], None)


def test_a_floor_is_drawn_where_it_rose() -> None:
    calm = [one._replace(tasks=None) for one in samples(rate=0, hours=20)]
    start, level = calm[-1].timestamp, calm[-1].rss_kb
    rises = [
        one._replace(timestamp=start + 900 * n, rss_kb=level + 4000 * n, tasks=None)
        for n, one in enumerate(samples(hours=10), 1)
    ]
    drawn = chart(calm + rises, figures(None, 400_000))
    ((begin, _), _) = spots(drawn["floors"][0]["line"])
    line = spots(drawn["lines"][0]["points"])
    assert begin > line[0][0] + 0.6 * (line[-1][0] - line[0][0])


def test_restarts_and_kills_are_marked_when_they_were_seen() -> None:
    cgroups = [
        one._replace(oom_kill=[0, 0, 1, 1, 3][n], n_restarts=[5, 5, 5, 6, 0][n])
        for n, one in enumerate(figures(None, None, levels=[90_000] * 5))
    ]
    marks = chart(samples(), cgroups)["marks"]
    assert [(one["name"], one["at"]) for one in marks] == [
        ("restart", "11-24 00:45"),
        ("OOM kill", "11-24 00:30"),
        ("OOM kill", "11-24 01:00"),
    ]


def test_so_many_charts_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_CHARTS", 2)
    made = page(*fleet())
    assert len(made.all("svg")) == 2 and len(made.all("tr")) == 4
    assert "The first 2 have a chart below" in "".join(made.text)


def test_a_long_series_is_thinned_and_keeps_its_ends() -> None:
    lives = [Sample(T0 + n, 7, 60_000 + n, "celery", GATE, T0) for n in range(5000)]
    at = spots(chart(lives)["lines"][0]["points"])
    assert len(at) == report.CHART_POINTS
    assert (at[0][0], at[-1][0]) == (report.CHART_LEFT, report.CHART_WIDTH - 8)


def test_thousands_of_short_lives_make_no_page_of_gigabytes() -> None:
    lives = [
        Sample(T0 + 600 * life + 20 * n, life, 60_000 + n, "celery", GATE, T0 + 600 * life)
        for life in range(500)
        for n in range(30)
    ]
    drawn = chart(lives)
    assert len(drawn["lines"]) == 500
    assert sum(len(spots(one["points"])) for one in drawn["lines"]) <= 1000


HOLDS: list[Hold] = [
    {"type": "dict", "growth": 4100, "path": ["module shop.tasks", "._seen: dict"]},
    {"type": "shop.Ticket", "growth": 40, "path": ["module shop.tasks", "._seen: dict", "shop.Ticket"]},
    {"type": "list", "growth": 9, "path": ["module shop.tasks", '.x"]; \\ <script>: list']},
]


def test_what_keeps_objects_alive_is_a_graph_whose_ways_begin_once() -> None:
    assert report.graph(HOLDS).splitlines()[2:-1] == [
        'n0 [label="module shop.tasks"]',
        'n1 [label="._seen: dict\\n+4,100"]',
        "n0 -> n1",
        'n2 [label="shop.Ticket\\n+40"]',
        "n1 -> n2",
        """n3 [label=".x']; / <script>: list\\n+9"]""",
        "n0 -> n3",
    ]


def test_graphviz_draws_it_into_the_page_and_a_host_cannot_write_into_it() -> None:
    document, verdicts = fleet()
    document["workers"][0]["holds"] = HOLDS
    page = report.html(document, verdicts)
    ElementTree.fromstring(page[page.index('<div class="holds">') :].split("</div>")[0] + "</div>")
    assert "module shop.tasks" in page and "&lt;script&gt;" in page and page.count("<script") == 1


def test_without_graphviz_the_page_has_the_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    document, verdicts = fleet()
    document["workers"][0]["holds"] = HOLDS
    monkeypatch.setenv("PATH", "/nowhere")
    assert 'class="holds"' not in report.html(document, verdicts)
