"""Which task and which line: from the bootstrap's records, of several processes and windows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import ROOT
from plimsoll.diagnose import Kind, advice, belongs_to, culprits, evidence, holds, leak_class, short, task_growth

APP = "/opt/celery/releases/0123456789abcdef/app"


def grew(time: float, task: Any, kb: float, count: int, pid: int = 7) -> dict[str, Any]:
    return {"kind": "task_growth", "time": time, "pid": pid, "task": task, "count": count, "rss_growth_kb": kb}


def site(line: int, kb: float, file: str = f"{APP}/shop/tasks.py", function: str = "scan") -> dict[str, Any]:
    return {"file": file, "line": line, "function": function, "size_kb": kb, "count": 1, "growth_kb": kb}


def window(*sites: dict[str, Any], time: float = 10, pid: int = 7, **tasks: float) -> dict[str, Any]:
    told = {name: {"count": 1, "traced_growth_kb": kb} for name, kb in tasks.items()}
    return {"kind": "growth", "time": time, "pid": pid, "sites": list(sites), "tasks": told}


def mark(kind: str, time: float, kb: float, pid: int = 7) -> dict[str, Any]:
    return {"kind": f"window_{kind}", "time": time, "pid": pid, "rss_kb": kb}


# ---- tasks ----


def test_the_last_record_of_each_process_counts_and_processes_add_up() -> None:
    records = [
        grew(1, "scan", 100, 10),
        grew(3, "scan", 900, 30),
        grew(2, "scan", 500, 20),
        grew(2, "mail", -40, 5),
        grew(1, "scan", 50, 4, pid=8),
    ]
    assert task_growth(records) == {"scan": (950, 34), "mail": (-40, 5)}
    assert list(task_growth([*records, grew(9, "pack", 5000, 1)])) == ["pack", "scan", "mail"]


def test_a_pid_that_came_again_is_another_process() -> None:
    records = [grew(1, "scan", 100, 10), grew(2, "scan", 900, 30), grew(3, "scan", 70, 2), grew(4, "scan", 200, 6)]
    assert task_growth(records) == {"scan": (1100, 36)}


def test_tasks_that_were_not_measured_grew_as_the_others_did() -> None:
    records = [
        {**grew(1, "scan", 100, 40), "measured": 10},
        {**grew(1, "scan", 60, 30, pid=8), "measured": 30},
        {**grew(1, "mail", 0, 7), "measured": 0},
    ]
    assert task_growth(records) == {"scan": (460, 70), "mail": (0, 7)}


@pytest.mark.parametrize("measured", [-3, 41, 1e300])
def test_more_than_ran_or_less_than_none_was_not_measured(measured: float) -> None:
    [(kb, count)] = task_growth([{**grew(1, "scan", 100, 40), "measured": measured}]).values()
    assert (kb, count) == (0 if measured < 0 else 100, 40)


def test_records_without_a_field_do_no_harm() -> None:
    assert task_growth([{"kind": "task_growth", "time": 1}, {"kind": "other", "time": 2}]) == {"": (0, 0)}
    assert task_growth([]) == {}


# ---- lines ----


def test_a_line_is_named_with_its_task_and_shares() -> None:
    records = [
        grew(5, "shop.scan", 9000, 40),
        grew(5, "shop.mail", 1000, 40),
        grew(5, "shop.free", -500, 40),
        window(site(12, 800.04), site(40, 150), site(41, 50), **{"shop.scan": 900, "shop.mail": 20}),
        window(site(12, 900), site(40, 100), time=20, pid=8, **{"shop.scan": 950}),
    ]
    first, second = culprits(records)
    assert first == {
        "task": "shop.scan",
        "task_share": 0.9,
        "file": f"{APP}/shop/tasks.py",
        "line": 12,
        "function": "scan",
        "growth_kb": 1700.0,
        "share": 0.85,
        "windows": 2,
        "package": "application",
        "caller": None,
    }
    assert (second["line"], second["growth_kb"], second["share"]) == (40, 250, 0.125)


def test_at_most_three_lines_are_named() -> None:
    assert [one["line"] for one in culprits([window(*(site(n, 100 + n) for n in range(8)))])] == [7, 6, 5]


def test_a_line_belongs_to_the_task_that_grew_in_the_windows_that_saw_it() -> None:
    """By RSS alone, all lines would be the largest task's."""
    records = [
        grew(1, "a", 9000, 9),
        grew(1, "b", 3000, 9),
        window(site(1, 500), a=500, b=5),
        window(site(2, 400), a=5, b=400),
    ]
    assert [(one["line"], one["task"], one["task_share"]) for one in culprits(records)] == [
        (1, "a", 0.75),
        (2, "b", 0.25),
    ]


def test_a_line_without_traced_tasks_is_given_to_the_task_of_most_rss() -> None:
    assert [one["task"] for one in culprits([grew(1, "a", 10, 1), grew(1, "b", 90, 1), window(site(1, 500))])] == ["b"]
    assert [one["task"] for one in culprits([window(site(1, 500))])] == [None]
    assert [one["task"] for one in culprits([window(site(1, 500), a=-30)])] == [None]


def test_where_nothing_was_traced_the_tasks_are_named_alone() -> None:
    records = [grew(1, name, kb, 9) for name, kb in {"a": 600, "b": 250, "c": 100, "d": 30, "e": 20, "f": -99}.items()]
    found = culprits(records)
    assert [(one["task"], one["task_share"]) for one in found] == [("a", 0.6), ("b", 0.25), ("c", 0.1)]
    assert {(one["file"], one["line"], one["growth_kb"], one["windows"]) for one in found} == {(None, None, None, 0)}


@pytest.mark.parametrize(
    "records",
    [
        [],
        [grew(1, "a", 0, 9)],
        [grew(1, "a", -90, 9)],
        [window()],
        [window(site(1, 0))],
        [window(site(1, -500), site(2, -1))],
        [mark("open", 1, 90)],
    ],
)
def test_where_nothing_grew_nobody_is_blamed(records: list[dict[str, Any]]) -> None:
    assert culprits(records) == []


def test_what_shrank_does_not_hide_what_grew() -> None:
    (one,) = culprits([window(site(1, 500), site(2, -4000))])
    assert (one["line"], one["share"]) == (1, 1.0)


def test_names_that_a_worker_made_up_are_fit_to_print() -> None:
    evil = "\x1b[2J<script>\u202e\ud800"
    records = [
        grew(1, evil, 90, 1),
        grew(1, ["no", "name"], 5, 1),
        window(site(1, 500, file=evil, function=evil), **{evil: 500}),
        window({"line": 2.0, "growth_kb": 300, "file": None, "function": 7}),
    ]
    for one in culprits(records):
        assert all(str(value).isprintable() for value in one.values())
        json.dumps(one, allow_nan=False, ensure_ascii=False).encode()
    named = culprits(records)[0]
    assert named["task"] == named["file"] == named["function"] == "?[2J<script>??"
    assert named["task_share"] == round(90 / 95, 3)


def test_a_file_is_named_below_its_application_or_its_packages() -> None:
    assert short(f"{APP}/shop/tasks.py") == "shop/tasks.py"
    assert short("/opt/celery/current/venv/lib/python3.11/site-packages/numpy/core.py") == "numpy/core.py"
    assert short("/usr/lib/python3/dist-packages/yaml/__init__.py") == "yaml/__init__.py"
    assert short("/home/me/tasks.py") == "/home/me/tasks.py"


def test_a_line_that_keeps_what_any_code_does_is_not_named() -> None:
    assert culprits([window(site(1, 31))]) == []


@pytest.mark.parametrize(
    ("file", "whose"),
    [
        (f"{APP}/shop/tasks.py", "application"),
        ("/home/me/tasks.py", "application"),
        ("/opt/celery/current/venv/lib/python3.11/site-packages/kombu/utils/json.py", "kombu"),
        ("/usr/lib/python3/dist-packages/six.py", "six"),
        ("/usr/lib/python3.11/json/decoder.py", "Python"),
        ("/usr/local/lib/python3.14t/functools.py", "Python"),
        ("<frozen os>", "Python"),
    ],
)
def test_whose_a_line_is(file: str, whose: str) -> None:
    assert belongs_to(file) == whose


def test_of_a_package_the_line_of_the_application_that_called_it_is_named() -> None:
    library, standard = "/v/site-packages/kombu/json.py", "/usr/lib/python3.11/json/decoder.py"
    callers = [f"{standard}:9", f"{library}:7", f"{APP}/shop/tasks.py:12", f"{APP}/shop/app.py:3"]
    one = {**site(4, 600, file=library), "callers": callers}
    (named,) = culprits([window(one)])
    assert (named["package"], named["caller"]) == ("kombu", f"{APP}/shop/tasks.py:12")
    assert culprits([window({**site(4, 600), "callers": callers})])[0]["caller"] is None
    assert culprits([window(site(4, 600, file=library))])[0]["caller"] is None


# ---- the class ----


def gained(kb: float, *sites: dict[str, Any], pid: int = 7) -> dict[str, Any]:
    return {**window(*sites, pid=pid), "rss_growth_kb": kb}


def test_objects_that_explain_half_of_the_growth_are_the_cause() -> None:
    assert leak_class([gained(1200, site(1, 600), site(2, -300))]) == "python_objects"
    assert leak_class([gained(1201, site(1, 600), site(2, -300))]) == "unknown"


def test_a_full_cache_that_replaces_its_entries_is_no_leak_of_objects() -> None:
    """Or the objects filled memory that was free: RSS alone cannot tell, and another window may."""
    full = gained(200, site(1, 19_000))
    assert leak_class([full]) == leak_class([gained(-1000, site(1, 600))]) == "unknown"
    assert "took the place of what was there before" in evidence([full])[1]


MB = 1024.0


def told(rss: float, *sites: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A window as the bootstrap writes it today. malloc: what it has in use, keeps free, and gave back."""
    used, free, trimmed = more.pop("malloc", (0, 0, 0))
    descriptors = more.pop("fds", {})
    kinds = {kind: {"count": 9, "growth": growth} for kind, growth in descriptors.items()}
    return {
        **gained(rss, *sites),
        "window_s": 60,
        "fds": {"count": 9, "growth": sum(descriptors.values()), "kinds": kinds, "paths": []},
        "malloc": {"used_growth_kb": used, "free_growth_kb": free, "trimmed_kb": trimmed},
        "memory": {"private_growth_kb": rss, "shared_growth_kb": 0},
        **more,
    }


def cache(growth: int, most: int | None) -> dict[str, Any]:
    return {"name": "shop.tasks.price", "size": 40, "growth": growth, "most": most}


def holder(growth: int) -> dict[str, Any]:
    return {"type": "dict", "size": 900, "growth": growth, "path": ["module shop.tasks", "._seen: dict"]}


@pytest.mark.parametrize(
    ("window", "kind"),
    [
        (told(20 * MB, site(1, 19 * MB), malloc=(19 * MB, 0, 0)), "python_objects"),
        (told(20 * MB, site(1, 50), malloc=(19 * MB, 0, 0)), "native"),
        (told(20 * MB, site(1, 9 * MB), malloc=(19 * MB, 0, 0)), "native"),
        # Neither Python's nor malloc's: mapped by a library.
        (told(20 * MB), "native"),
        (told(20 * MB, site(1, 2 * MB), malloc=(3 * MB, 16 * MB, 0)), "fragmentation"),
        (told(20 * MB, malloc=(2 * MB, 4 * MB, 15 * MB)), "fragmentation"),
        (told(MB, site(1, 900), fds={"file": 20, "socket": -2}), "file_descriptors"),
        (told(MB, site(1, 900), fds={"socket": 15}), "python_objects"),
        (told(20 * MB, site(1, 19 * MB), caches=[cache(40, 1000)]), "cache_filling"),
        (told(20 * MB, site(1, 19 * MB), caches=[cache(40, None)]), "python_objects"),
        (told(20 * MB, site(1, 19 * MB), caches=[cache(2, 1000)]), "python_objects"),
        (told(20 * MB, site(1, 19 * MB), caches=[cache(40, 1000)], holders=[holder(400)]), "python_objects"),
        (told(0, memory={"private_growth_kb": 30 * MB, "shared_growth_kb": -29 * MB}), "copy_on_write"),
        (told(30 * MB, memory={"private_growth_kb": 30 * MB, "shared_growth_kb": -MB}), "native"),
        # As a window of few tasks looked in the lab: what it unshared is its own.
        (told(500, site(1, 880), memory={"private_growth_kb": 2600, "shared_growth_kb": -2000}), "python_objects"),
        ({**told(20 * MB), "malloc": None, "memory": None}, "unknown"),
        (told(900), "unknown"),
    ],
)
def test_the_kind_of_a_leak(window: dict[str, Any], kind: str) -> None:
    assert leak_class([window]) == kind


def test_each_kind_has_its_advice_and_its_section() -> None:
    text = (ROOT / "docs/leaks.md").read_text()
    headings = {line.strip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    for kind in Kind:
        found = advice(kind)
        assert bool(found) == (kind is not Kind.UNKNOWN)
        if found:
            page, _, anchor = found["link"].partition("#")
            assert page == "docs/leaks.md" and anchor in headings and len(found["text"]) > 20


# ---- what else is told ----


def test_what_holds_the_objects_is_told_from_the_last_window() -> None:
    objects = [{"type": "shop.Ticket", "count": 90, "growth": 40}]
    chains = [["module shop.tasks", "._seen: dict", "shop.Ticket"]]
    old, new = (
        told(0, holders=[holder(9)]),
        {**told(0, holders=[holder(41)], objects=objects, chains=chains), "time": 20},
    )
    assert holds([new, old]) == [
        {"type": "dict", "growth": 41, "path": ["module shop.tasks", "._seen: dict"]},
        {"type": "shop.Ticket", "growth": 40, "path": chains[0]},
    ]
    assert holds([]) == holds([told(0)]) == []


def test_the_evidence_of_a_window_in_sentences() -> None:
    one = told(
        20 * MB,
        site(1, 2 * MB),
        malloc=(3 * MB, 16 * MB, 15 * MB),
        fds={"file": 20, "pipe": 0},
        caches=[cache(40, None)],
        holders=[holder(41)],
        gc={"enabled": False, "uncollectable": 3},
        interleaved=True,
    )
    one["fds"]["paths"] = [{"path": "/tmp/\x1b[2Jx.db", "count": 30, "growth": 20}]
    assert evidence([one]) == [
        "traced for 60 s: RSS gained 20 MiB, and Python's lines 2 MiB, malloc besides 1 MiB in use and 16 MiB free",
        "malloc_trim() gave 15 MiB back to the kernel",
        "file descriptors left open: 20 file, 20 of /tmp/?[2Jx.db",
        "lru_cache shop.tasks.price gained 40 entries and has 40, without a bound",
        "41 more in module shop.tasks > ._seen: dict",
        "the garbage collector is disabled: objects in cycles are never freed",
        "3 objects were uncollectable, as gc.get_stats() has it",
        "tasks ran side by side while it was traced: what grew is shared among them evenly",
    ]
    assert evidence([]) == []
    # Of a bootstrap that knew none of it.
    assert evidence([window(site(1, 500))]) == ["traced for 0 s: RSS gained 0 MiB, and Python's lines 0.488 MiB"]


def test_windows_of_several_processes_are_summed() -> None:
    assert leak_class([gained(2000, site(1, 100)), gained(2000, site(1, 1900), pid=8)]) == "python_objects"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [window(site(1, 600))],
        [gained(0)],
        [gained(900), gained(100, site(1, 10))],
        [mark("open", 1, 90_000), mark("close", 3, 91_000)],
    ],
)
def test_without_a_window_in_which_rss_grew_the_class_is_not_known(records: list[dict[str, Any]]) -> None:
    assert leak_class(records) == "unknown"


def test_what_a_host_sends_without_end_is_cut() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    steps = ["module shop"] + ["x" * 500] * 10_000
    hold = {"type": deep, "size": 9, "growth": 9, "path": steps}
    (found, *_) = holds([told(0, holders=[hold] * 10_000)])
    assert len(found["path"]) == 16 and found["type"] == "?"
    # One window saw descriptors, and the last one not.
    first, last = told(MB, fds={"file": 20}), {**told(MB), "time": 99}
    del last["fds"]
    assert "file descriptors left open: 20 file" in evidence([first, last])
