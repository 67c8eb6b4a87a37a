"""Which task and line a leaking worker's memory grows in, and what kind of leak it is: pure, over its trace records.

Of the kind, docs/leaks.md has what each is told by, and what to do. Records of older bootstraps lack fields, and a host
may send any: what is not there is no evidence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypedDict

from .formats import Trace, printable

# Sites and tasks below this share of the growth are not named: what is left of it is noise.
LEAST_SHARE = 0.1
MOST_CULPRITS = 3
# A line that keeps less than this in a window keeps what any code does, KiB.
LEAST_SITE_KB = 32.0
# Of what memory gained while it was traced, what an explanation must account for to be called the cause.
EXPLAINED = 0.5
# Of what lines hold, what RSS must have gained for it to have been added, and not put in the place of something.
TURNOVER = 0.25
# Gained by less than this in all windows, an allocator's chunks and a first call to something tell as much, KiB.
LEAST_GAIN_KB = 1024.0
# So much of what is shared a window and the collections in it make private by themselves, KiB: 1 to 2 MiB were seen.
UNSHARED_KB = 2048.0
# The bootstrap writes no more than these of holders, and of steps of a way.
MOST_HOLDS, MOST_STEPS = 5, 16
# Of the growth of the largest hold, what is worth a word.
SLIGHT = 0.25
# Celery's own containers are bounded, and say nothing of an application.
_MACHINERY = re.compile(r"module (?:celery|kombu|billiard|amqp|vine)\b")
# Descriptors that are opened and not closed in a window; a pool of connections that fills takes fewer.
LEAST_DESCRIPTORS = 16
# Where celery_worker unpacks the application, and where any venv keeps its packages.
_PREFIX = re.compile(r"^.*/(?:releases/[^/]+/app|site-packages|dist-packages)/")
_PACKAGE = re.compile(r"/(?:site-packages|dist-packages)/([^/]+?)(?:\.py)?(?:/|$)")
# Python's own modules lie here, and those that are frozen in it nowhere.
_STANDARD = re.compile(r"/lib(?:64)?/python3[^/]*/|^<frozen ")


class Kind(str, Enum):
    """The kind of a leak; docs/leaks.md has a section of each."""

    PYTHON_OBJECTS = "python_objects"
    NATIVE = "native"
    FRAGMENTATION = "fragmentation"
    FILE_DESCRIPTORS = "file_descriptors"
    CACHE_FILLING = "cache_filling"
    COPY_ON_WRITE = "copy_on_write"
    UNKNOWN = "unknown"


class Advice(TypedDict):
    """What to do about a kind of leak; link: the section of docs/leaks.md."""

    text: str
    link: str


_ADVICE = {
    Kind.PYTHON_OBJECTS: (
        "bound or clear what holds the objects; until then max_memory_per_child, or a restart by the guard, gives the"
        " memory back",
        "python-objects",
    ),
    Kind.NATIVE: (
        "a library allocates it outside of Python: `memray attach --native --aggregate --duration 60 -o leak.bin PID`"
        " on the host names the call; until then max_memory_per_child gives the memory back",
        "native",
    ),
    Kind.FRAGMENTATION: (
        "free memory that malloc cannot give back: hold less at once; or jemalloc by LD_PRELOAD with"
        " MALLOC_CONF=background_thread:true in the unit, or in the pool threads MALLOC_ARENA_MAX=2",
        "fragmentation",
    ),
    Kind.FILE_DESCRIPTORS: (
        "close what is opened, by `with` or contextlib.closing; LimitNOFILE= only puts the end off",
        "file-descriptors",
    ),
    Kind.CACHE_FILLING: (
        "it stops at the cache's bound: raise MemoryHigh above that, or lower maxsize",
        "cache-filling",
    ),
    Kind.COPY_ON_WRITE: (
        "children write to what the main process loaded: gc.freeze() before the fork, or load it in the child",
        "copy-on-write",
    ),
}


def advice(kind: Kind) -> Advice | None:
    """What to do; None where the kind is not known."""
    if kind not in _ADVICE:
        return None
    text, anchor = _ADVICE[kind]
    return {"text": text, "link": f"docs/leaks.md#{anchor}"}


class Culprit(TypedDict):
    """One line that grows, and the task that it grew in; either may be missing.

    growth_kb is what the line still held at the end of the tracing windows and not at their start; share is its part of
    all such growth, task_share the task's part of the growth of RSS. tasks that do not grow are not here. package: who
    the line belongs to, as belongs_to says. caller: "file:line" of the application's own line that led to one of a
    package, where frames were kept.
    """

    task: str | None
    task_share: float | None
    file: str | None
    line: int | None
    function: str | None
    growth_kb: float | None
    share: float | None
    windows: int
    package: str | None
    caller: str | None


class Hold(TypedDict):
    """What keeps objects alive: `path` leads from a root to a container that gained entries, or to one of the objects.

    type is that of its end, growth what was gained, entries or objects.
    """

    type: str
    growth: int
    path: list[str]


def short(file: str) -> str:
    """A file as its author knows it: below the application's directory or its venv's packages."""
    return _PREFIX.sub("", file)


def belongs_to(file: str) -> str:
    """Whose a file is: a package's by its name, "Python" for the standard library, else "application"."""
    package = _PACKAGE.search(file)
    if package:
        return package[1]
    return "Python" if _STANDARD.search(file) else "application"


def task_growth(records: Sequence[Trace]) -> dict[str, tuple[float, int]]:
    """Task to (KiB that RSS grew in it, how often it ran), over all processes of a worker, the largest growth first.

    Of tasks that come fast the bootstrap measures some, at random; the others are taken to have grown as those did.
    """
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
            ran = int(record.get("count", 0))
            measured = min(max(int(record.get("measured", ran)), 0), ran)
            all_kb = record.get("rss_growth_kb", 0) * ran / measured if measured else 0.0
            total[task] = grown + all_kb, count + ran
    return dict(sorted(total.items(), key=lambda one: -one[1][0]))


def culprits(records: Sequence[Trace]) -> list[Culprit]:
    """The lines that grow most, with the task that they grow in; where nothing was traced, the tasks alone."""
    growth = {task: grown for task, (grown, _) in task_growth(records).items() if grown > 0}
    whole = sum(growth.values())
    shares = {task: round(grown / whole, 3) for task, grown in growth.items()}
    windows = [one for one in records if one["kind"] == "growth"]
    sites: dict[tuple[str, int, str], float] = {}
    callers: dict[tuple[str, int, str], str] = {}
    traced = 0.0
    for window in windows:
        for site in window.get("sites", []):
            at = printable(site.get("file", "")), int(site["line"]), printable(site.get("function", ""))
            sites[at] = sites.get(at, 0.0) + site["growth_kb"]
            traced += max(0.0, site["growth_kb"])
            own = (one for one in map(printable, site.get("callers", [])) if belongs_to(one) == "application")
            if belongs_to(at[0]) != "application" and (caller := next(own, None)):
                callers[at] = caller
    found: list[Culprit] = []
    for (file, line, function), grown in sorted(sites.items(), key=lambda one: -one[1])[:MOST_CULPRITS]:
        if traced <= 0 or grown / traced < LEAST_SHARE or grown < LEAST_SITE_KB:
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
                "package": belongs_to(file),
                "caller": callers.get((file, line, function)),
            }
        )
    if found:
        return found
    blank = dict.fromkeys(("file", "line", "function", "growth_kb", "share", "package", "caller"))
    blank["windows"] = len(windows)
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


class Gains(NamedTuple):
    """What all windows of a worker gained together, sizes in KiB; 0 where a record does not say.

    objects is what traced lines still held, malloc what the allocator handed out besides, free what it keeps, trimmed
    what it gave back when it was asked to.
    """

    rss: float
    objects: float
    malloc: float
    free: float
    trimmed: float
    private: float
    shared: float
    descriptors: float


def gains(windows: Iterable[Trace]) -> Gains:
    total = dict.fromkeys(Gains._fields, 0.0)
    for window in windows:
        malloc, memory = window.get("malloc") or {}, window.get("memory") or {}
        held = sum(max(0.0, site["growth_kb"]) for site in window.get("sites", []))
        total["rss"] += window.get("rss_growth_kb", 0.0)
        total["objects"] += held
        total["malloc"] += malloc.get("used_growth_kb", 0.0)
        total["free"] += malloc.get("free_growth_kb", 0.0)
        total["trimmed"] += malloc.get("trimmed_kb") or 0.0
        total["private"] += memory.get("private_growth_kb", 0.0)
        total["shared"] += memory.get("shared_growth_kb", 0.0)
        total["descriptors"] += (window.get("fds") or {}).get("growth", 0.0)
    # Large blocks of Python's are malloc's too.
    total["malloc"] -= min(total["objects"], max(0.0, total["malloc"]))
    return Gains(**total)


def leak_class(records: Sequence[Trace]) -> Kind:
    """The kind of a leak, by what gained in the windows beside what RSS gained; unknown where too little did."""
    windows = [one for one in records if one["kind"] == "growth" and "rss_growth_kb" in one]
    gained = gains(windows)
    if gained.descriptors >= LEAST_DESCRIPTORS:
        return Kind.FILE_DESCRIPTORS
    # Memory that was shared becomes a process's own without any growth of RSS.
    unshared = -gained.shared - UNSHARED_KB * len(windows)
    if unshared >= max(LEAST_GAIN_KB, EXPLAINED * gained.private):
        return Kind.COPY_ON_WRITE
    if gained.objects > 0 and gained.objects >= EXPLAINED * gained.rss and _matters(windows):
        if _turns_over(gained):
            return Kind.UNKNOWN
        return Kind.CACHE_FILLING if _filling(windows) else Kind.PYTHON_OBJECTS
    left = gained.rss - gained.objects
    if left < LEAST_GAIN_KB:
        return Kind.UNKNOWN
    if gained.malloc >= EXPLAINED * left:
        return Kind.NATIVE
    if max(gained.free, gained.trimmed) >= EXPLAINED * left:
        return Kind.FRAGMENTATION
    # Neither Python's nor malloc's, where those were asked: a library's own mapping.
    return Kind.NATIVE if any(window.get("malloc") for window in windows) else Kind.UNKNOWN


def _turns_over(gained: Gains) -> bool:
    """Whether lines hold far more than RSS gained: what a full cache replaces was allocated before the window."""
    return gained.rss < TURNOVER * gained.objects


def _matters(windows: Sequence[Trace]) -> bool:
    return any(site["growth_kb"] >= LEAST_SITE_KB for window in windows for site in window.get("sites", []))


def _filling(windows: Sequence[Trace]) -> bool:
    """Whether what gained most entries, of all caches and containers, is a cache with a bound that it is below."""
    caches = [one for window in windows for one in window.get("caches", [])]
    most = max(caches, key=lambda one: one["growth"], default=None)
    if most is None or most["most"] is None or most["growth"] < LEAST_DESCRIPTORS / 2:
        return False
    holders = [one for window in windows for one in window.get("holders", []) if _of_the_application(one["path"])]
    # The cache itself is a container too.
    others = [one for one in holders if not any("_lru_cache_wrapper" in step for step in one["path"])]
    return all(one["growth"] < most["growth"] for one in others)


def _of_the_application(path: Sequence[str]) -> bool:
    """Whether a way leads down from a module that is none of Celery's."""
    return bool(path) and path[0].startswith("module ") and not _MACHINERY.match(path[0])


def holds(records: Sequence[Trace]) -> list[Hold]:
    """What keeps objects alive, by the last window: containers that gained most, then one of the type that did."""
    windows = [one for one in records if one["kind"] == "growth"]
    if not windows:
        return []
    last = max(windows, key=lambda one: one["time"])
    found: list[Hold] = [
        {
            "type": printable(one["type"]),
            "growth": int(one["growth"]),
            "path": [printable(step) for step in one["path"][:MOST_STEPS]],
        }
        for one in last.get("holders", [])[:MOST_HOLDS]
    ]
    for one, path in zip(last.get("objects", []), last.get("chains", [])[:MOST_HOLDS]):
        steps = [printable(step) for step in path[:MOST_STEPS]]
        found.append({"type": printable(one["type"]), "growth": int(one["growth"]), "path": steps})
    # A way that begins nowhere tells nothing, and a handful beside thousands is by the way.
    found = [one for one in found if len(one["path"]) > 1 and _of_the_application(one["path"])]
    least = SLIGHT * max((one["growth"] for one in found), default=0)
    return [one for one in found if one["growth"] >= least][:MOST_CULPRITS]


def evidence(records: Sequence[Trace]) -> list[str]:
    """What the windows tell beside lines, a sentence each."""
    windows = [one for one in records if one["kind"] == "growth"]
    if not windows:
        return []
    said, gained, last = [], gains(windows), max(windows, key=lambda one: one["time"])
    seconds = sum(window.get("window_s", 0.0) for window in windows)
    said.append(
        f"traced for {seconds:.0f} s: RSS gained {_mib(gained.rss)}, and Python's lines {_mib(gained.objects)}"
        + (f", malloc besides {_mib(gained.malloc)} in use and {_mib(gained.free)} free" if last.get("malloc") else "")
    )
    if gained.objects >= LEAST_GAIN_KB and _turns_over(gained):
        said.append("so it filled memory that was free within the process, or took the place of what was there before")
    if gained.trimmed >= LEAST_GAIN_KB:
        said.append(f"malloc_trim() gave {_mib(gained.trimmed)} back to the kernel")
    if gained.private >= LEAST_GAIN_KB and gained.shared <= -LEAST_GAIN_KB:
        said.append(f"{_mib(gained.private)} became private, and {_mib(-gained.shared)} is shared no more")
    if gained.descriptors >= LEAST_DESCRIPTORS:
        opened = max((one["fds"] for one in windows if one.get("fds")), key=lambda one: one["growth"])
        kinds = [f"{_count(one['growth'])} {kind}" for kind, one in opened["kinds"].items() if one["growth"] > 0]
        paths = [f"{_count(one['growth'])} of {printable(one['path'])}" for one in opened["paths"][:2]]
        said.append(f"file descriptors left open: {printable(', '.join([*kinds, *paths]))}")
    for one in last.get("caches", [])[:1]:
        bound = "without a bound" if one["most"] is None else f"of at most {_count(one['most'])}"
        said.append(
            f"lru_cache {printable(one['name'])} gained {_count(one['growth'])} entries and has {_count(one['size'])},"
            f" {bound}"
        )
    for hold in holds(records):
        said.append(f"{_count(hold['growth'])} more in {printable(' > '.join(hold['path']), 300)}")
    collector = last.get("gc") or {}
    if collector.get("enabled") is False:
        said.append("the garbage collector is disabled: objects in cycles are never freed")
    if collector.get("uncollectable", 0) > 0:
        said.append(f"{_count(collector['uncollectable'])} objects were uncollectable, as gc.get_stats() has it")
    if any(window.get("interleaved") for window in windows):
        said.append("tasks ran side by side while it was traced: what grew is shared among them evenly")
    return said


def _mib(kib: float) -> str:
    return f"{kib / 1024:.3g} MiB"


def _count(number: float) -> str:
    return f"{number:,.0f}"
