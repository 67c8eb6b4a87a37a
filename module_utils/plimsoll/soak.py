"""What a soak sends, and what its records say of each task: growth of memory in use, against a budget. Pure.

For hosts too: standard library alone, Python 3.9. docs/soak.md has the files and the statistics; the records are those
of roles/soak/files/plimsoll_soak.py.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

# ---- the plan ----

PATTERNS = ("constant", "ramp", "burst", "replay")
POOLS = ("prefork", "solo")
# Of each kind of limit: what is taken where the file says nothing. A worker on an idle core did 280 of the smallest
# tasks a second with the recorder in it.
RATE, SECONDS, MOST_TASKS = 200.0, 300.0, 50_000
# Tasks of one name come in rows of so many for each process, as the recorder measures four that are followed by one of
# their own name; so it does twice in a row.
ROW = 9
# KiB per 1,000 tasks. Of tasks that keep nothing, what Celery and Python leave was 92 at most at a first look, with 138
# at the upper end of the interval, and 3 after 1,500 tasks (docs/soak.md).
BUDGET_KB = 256.0
# Settings of Celery that are the soak's own.
_OURS = re.compile(
    r"(?i)broker_|task_(routes|queues|default_(queue|exchange|exchange_type|routing_key)|always_eager)$"
    r"|include$|imports$|worker_state_db$"
)
_NUMBER = re.compile(r"\{n(?:%([1-9]\d{0,8}))?\}")
_UUID = "{uuid}"


class PlanError(ValueError):
    """A file of the user's does not say what it has to; the message names the key and the way out."""


class Call(NamedTuple):
    """A task to be sent, at_s seconds after the first one."""

    at_s: float
    task: str
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task of the file. calls: pairs of args and kwargs, of which each run takes one, in turns.

    warm: runs in each process that are not judged.
    """

    name: str
    weight: int = 1
    calls: tuple[tuple[list[Any], dict[str, Any]], ...] = (([], {}),)
    warm: int = 16


class Recorded(NamedTuple):
    """A line of a recorded day: how often a task ran from time (Unix seconds) until the next line's time."""

    time: float
    task: str
    ran: int


@dataclass(frozen=True)
class Plan:
    """What the tasks file says. rate: tasks a second at most; seconds: the time box; most: tasks at most.

    runs: measured runs of a task, after warm ones, at the first look at it.
    """

    tasks: dict[str, Task]
    arrival: dict[str, Any]
    rate: float = RATE
    seconds: float = SECONDS
    most: int = MOST_TASKS
    seed: int = 1
    runs: int = 256
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def pool(self) -> str:
        return str(self.settings.get("worker_pool", "prefork"))

    @property
    def concurrency(self) -> int:
        return int(self.settings.get("worker_concurrency", 1))

    @property
    def row(self) -> int:
        return ROW * self.concurrency


def plan_of(data: object) -> Plan:
    """The plan of a tasks file, as YAML has it. Raises PlanError."""
    given = _mapping(data, "the file", ("tasks", "arrival", "limits", "seed", "runs", "settings"))
    tasks = _mapping(given.get("tasks"), "tasks")
    if not tasks:
        raise PlanError("tasks: names no task: write the name of one, as Celery has it, and its args")
    limits = _mapping(given.get("limits", {}), "limits", ("rate", "seconds", "tasks"))
    rate = _number(limits.get("rate", RATE), "limits.rate", 0.01, 10_000)
    seconds = _number(limits.get("seconds", SECONDS), "limits.seconds", 1, 86_400)
    settings = _mapping(given.get("settings", {}), "settings")
    for name in settings:
        if _OURS.match(name):
            raise PlanError(f"settings.{name}: is the soak's own; leave it out (the broker is that of --broker)")
    plan = Plan(
        tasks={str(name): _task(str(name), one) for name, one in tasks.items()},
        arrival=_arrival(given.get("arrival", {}), rate),
        rate=rate,
        seconds=seconds,
        most=_whole(limits.get("tasks", MOST_TASKS), "limits.tasks", 1, 10_000_000),
        seed=_whole(given.get("seed", 1), "seed", 0, 1 << 63),
        runs=_whole(given.get("runs", LOOK_RUNS), "runs", LEAST_RUNS, 1 << 20),
        settings=settings,
    )
    if plan.pool not in POOLS:
        raise PlanError(
            f"settings.worker_pool: {plan.pool}: tasks that overlap in one process cannot be told apart; take prefork,"
            " which runs the same tasks"
        )
    _whole(plan.settings.get("worker_concurrency", 1), "settings.worker_concurrency", 1, 64)
    return plan


def budget_of(data: object, tasks: Iterable[str] = ()) -> dict[str, float]:
    """KiB per 1,000 tasks by name, of these tasks and those of the budget file; "" is any other. Raises PlanError."""
    given = _mapping(data, "the file", ("default", "tasks"))
    default = _number(given.get("default", BUDGET_KB), "default", 0, 1e9)
    own = {
        str(name): _number(one, f"tasks.{name}", 0, 1e9)
        for name, one in _mapping(given.get("tasks", {}), "tasks").items()
    }
    return {"": default, **dict.fromkeys(tasks, default), **own}


def _task(name: str, data: object) -> Task:
    at = f"tasks.{name}"
    given = _mapping({} if data is None else data, at, ("weight", "args", "kwargs", "calls", "warm"))
    if "calls" in given and ("args" in given or "kwargs" in given):
        raise PlanError(f"{at}: has calls, and args or kwargs beside it: put those into calls as one of them")
    calls = given.get("calls", [{name: given[name] for name in ("args", "kwargs") if name in given}])
    if not isinstance(calls, list) or not calls:
        raise PlanError(f"{at}.calls: must be a list of objects with args and kwargs")
    each = []
    for number, call in enumerate(calls):
        where = f"{at}.calls[{number}]" if "calls" in given else at
        one = _mapping(call, where, ("args", "kwargs"))
        args = one.get("args", [])
        if not isinstance(args, list):
            raise PlanError(f"{where}.args: must be a list, as [{json.dumps(args, default=str)}]")
        kwargs = {str(key): value for key, value in _mapping(one.get("kwargs", {}), f"{where}.kwargs").items()}
        try:
            json.dumps([args, kwargs], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"{where}: what is sent is JSON, and this is not ({error}); a date is text in quotes"
            ) from error
        each.append((args, kwargs))
    return Task(
        name,
        weight=_whole(given.get("weight", 1), f"{at}.weight", 1, 1000),
        calls=tuple(each),
        warm=_whole(given.get("warm", Task.warm), f"{at}.warm", 0, 1 << 20),
    )


def _arrival(data: object, rate: float) -> dict[str, Any]:
    keys = {"constant": ("rate",), "ramp": ("from", "to"), "burst": ("size", "every"), "replay": ("file",)}
    pattern = data.get("pattern", "constant") if isinstance(data, Mapping) else "constant"
    if pattern not in PATTERNS:
        raise PlanError(f"arrival.pattern: is {pattern!r}; it must be one of {', '.join(PATTERNS)}")
    given = _mapping(data, "arrival", ("pattern", *keys[pattern]))
    if pattern == "replay":
        if not isinstance(given.get("file"), str):
            raise PlanError("arrival.file: must name a CSV file with time,task,count (docs/soak.md has the query)")
        return {"pattern": pattern, "file": given["file"]}
    taken: dict[str, Any] = {"pattern": pattern}
    for key, default in {"rate": rate, "from": None, "to": rate, "size": None, "every": None}.items():
        if key not in keys[pattern]:
            continue
        if key not in given and default is None:
            raise PlanError(f"arrival.{key}: is missing, and the pattern {pattern} needs it")
        if key == "size":
            taken[key] = _whole(given[key], "arrival.size", 1, 1_000_000)
            continue
        taken[key] = _number(given.get(key, default), f"arrival.{key}", 0.01, 1e5)
        if key != "every" and taken[key] > rate:
            raise PlanError(f"arrival.{key}: {taken[key]:g} a second is above limits.rate ({rate:g}); raise that")
    return taken


def _mapping(data: object, at: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise PlanError(f"{at}: must be an object with names and values, and is {_kind(data)}")
    for key in data:
        if keys is not None and key not in keys:
            raise PlanError(f"{at}: knows no key {key!r}; it has {', '.join(keys)}")
    return {str(key): value for key, value in data.items()}


def _kind(data: object) -> str:
    return "empty" if data is None else f"a {type(data).__name__}"


def _number(value: object, at: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise PlanError(f"{at}: is {value!r}; it must be a number from {least:g} to {most:g}")
    return float(value)


def _whole(value: object, at: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PlanError(f"{at}: is {value!r}; it must be a whole number from {least} to {most}")
    return value


# ---- the schedule ----


def schedule(plan: Plan, day: Sequence[Recorded] = ()) -> Iterator[Call]:
    """What is sent when, the same for the same plan and day. day: of the pattern replay. Raises PlanError."""
    calls = _Calls(plan)
    pairs = _replayed(plan, day) if plan.arrival["pattern"] == "replay" else zip(_times(plan), _names(plan))
    for at, name in itertools.islice(pairs, plan.most):
        yield calls.next(at, name)


def calls_of(plan: Plan, name: str, rate: float) -> Iterator[Call]:
    """One task without end, so many a second."""
    calls = _Calls(plan)
    for number in itertools.count():
        yield calls.next(number / rate, name)


def line(call: Call) -> str:
    """A line of schedule.jsonl."""
    return json.dumps([round(call.at_s, 4), call.task, call.args, call.kwargs], sort_keys=True) + "\n"


def digest(lines: Iterable[str]) -> str:
    """What tells one schedule from another."""
    told = hashlib.sha256()
    for one in lines:
        told.update(one.encode())
    return told.hexdigest()


class _Calls:
    """Arguments, with what stands in them for a value of its own filled in."""

    def __init__(self, plan: Plan) -> None:
        self.tasks, self.row = plan.tasks, plan.row
        self.number = dict.fromkeys(plan.tasks, 0)
        # A release and its baseline have to be sent the same.
        self.random = random.Random(plan.seed)  # noqa: S311 - no secret: it is to be the same each time

    def next(self, at: float, name: str) -> Call:
        number = self.number[name]
        self.number[name] += 1
        calls = self.tasks[name].calls
        args, kwargs = calls[number // self.row % len(calls)]
        return Call(at, name, [self._filled(one, number) for one in args], self._filled(kwargs, number))

    def _filled(self, value: Any, number: int) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(one, number) for key, one in value.items()}
        if isinstance(value, list):
            return [self._filled(one, number) for one in value]
        if not isinstance(value, str):
            return value
        whole = _NUMBER.fullmatch(value)
        if whole:
            return number % int(whole[1]) if whole[1] else number
        text = _NUMBER.sub(lambda one: str(number % int(one[1]) if one[1] else number), value)
        while _UUID in text:
            text = text.replace(_UUID, self._uuid(), 1)
        return text

    def _uuid(self) -> str:
        # random() is what Python promises to be the same in each of its versions.
        digits = "".join(f"{int(self.random.random() * 65536):04x}" for _ in range(8))
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"


def _shuffled(items: Sequence[str], rng: random.Random) -> list[str]:
    """As Fisher and Yates have it; by random() alone, for the reason above."""
    mixed = list(items)
    for last in range(len(mixed) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        mixed[last], mixed[other] = mixed[other], mixed[last]
    return mixed


def _names(plan: Plan) -> Iterator[str]:
    """Rows of tasks; in each round, as many rows of a task as it has weight, in an order of chance."""
    rng = random.Random(plan.seed)  # noqa: S311 - as that of _Calls
    every = [name for name, task in plan.tasks.items() for _ in range(task.weight)]
    while True:
        for name in _shuffled(every, rng):
            yield from itertools.repeat(name, plan.row)


def _times(plan: Plan) -> Iterator[float]:
    """Seconds after the start, of each task to be sent in the time box."""
    arrival, box = plan.arrival, plan.seconds
    if arrival["pattern"] == "burst":
        for burst in itertools.count():
            begin = burst * arrival["every"]
            for one in range(arrival["size"]):
                at = begin + one / plan.rate
                if at >= box:
                    return
                # A burst that the limit stretches over the next one's time takes its place.
                if at >= begin + arrival["every"]:
                    break
                yield at
    first, last = (arrival["rate"],) * 2 if arrival["pattern"] == "constant" else (arrival["from"], arrival["to"])
    at = 0.0
    while at < box:
        yield at
        at += 1 / (first + (last - first) * at / box)


def _replayed(plan: Plan, day: Sequence[Recorded]) -> Iterator[tuple[float, str]]:
    """A day in the time box: each of its parts as long as it was beside the others, and as busy, up to the limits."""
    ours = sorted((one for one in day if one.task in plan.tasks and one.ran > 0), key=lambda one: one.time)
    if not ours:
        raise PlanError("arrival.file: has none of the tasks of this file in it")
    times = sorted({one.time for one in day})
    # The last line has no next one: it is as long as the others are, in the middle.
    gaps = sorted(later - sooner for sooner, later in zip(times, times[1:]))
    end = times[-1] + (gaps[len(gaps) // 2] if gaps else 1.0)
    scale = plan.seconds / (end - times[0])
    busiest, whole = 0.0, 0
    parts = []
    for begin, finish in zip(times, [*times[1:], end]):
        ran = [one for one in ours if one.time == begin]
        count = sum(one.ran for one in ran)
        whole += count
        busiest = max(busiest, count / ((finish - begin) * scale))
        parts.append(((begin - times[0]) * scale, (finish - begin) * scale, ran))
    share = min(1.0, plan.rate / busiest, plan.most / whole)
    rng = random.Random(plan.seed)  # noqa: S311 - as that of _Calls
    owed = dict.fromkeys(plan.tasks, 0.0)
    for begin, long, ran in parts:
        rows = []
        for one in ran:
            owed[one.task] += one.ran * share
            # Whole rows; what is left of one is sent with the next part.
            rows += [one.task] * int(owed[one.task] / plan.row)
            owed[one.task] %= plan.row
        count = len(rows) * plan.row
        for number, name in enumerate(name for name in _shuffled(rows, rng) for _ in range(plan.row)):
            yield begin + max(number * long / count, number / plan.rate), name


# ---- the verdict ----

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
BETTER, SAME, WORSE = "better", "same", "worse"
# Of a gate, that any of its tasks is judged wrongly by chance.
ERROR = 0.01
# The first look, and the least that a user may set it to. A cache of functools has 128 entries unless told otherwise:
# what is judged begins when it is full. And what was not seen in 256 runs happens less than once in 85, as the rule of
# three has it (3/n, 95 %).
LOOK_RUNS, LEAST_RUNS = 256, 128
# Runs are judged in so many parts of the same length, which hold whatever comes and goes. One less is odd, as the
# closed form of the t-distribution needs it.
PARTS = 16
# A task that gained so much in one process is looked at right away, from the first LEAST_RUNS on and warm or not, and
# then each time that it has doubled: a gate is not to bring down what it runs on. Bytes.
MUCH = 128 << 20
# Tasks of a process, of any name, that are not judged: imports and first calls, and what Celery and Python keep of the
# first ones. In the pool solo the main process has Celery's set of the last 1,000 successful tasks to fill.
WARM = {"prefork": 256, "solo": 1100}
# Of runs, those that raise, above which what is left tells nothing of the task.
MOST_FAILED = 0.1
# A difference of means is told as one where it is not chance in 99 of 100, and matters.
DIFFERS, LEAST_DIFFERENCE_KB = 0.01, 64.0
# Points of a chart.
MOST_POINTS = 240


class Interval(NamedTuple):
    """KiB per 1,000 tasks: the mean, its interval, and its standard error."""

    growth: float
    low: float
    high: float
    error: float


class Verdict(TypedDict):
    """What is said of a task; docs/soak.md has each field. Growth is KiB per 1,000 tasks."""

    task: str
    verdict: str
    why: str
    planned: bool
    ran: int
    measured: int
    judged: int
    failed: int
    errors: dict[str, int]
    growth_kb: float | None
    growth_low: float | None
    growth_high: float | None
    error_kb: float | None
    confidence: float | None
    budget_kb: float
    seconds_a_task: float | None
    decided_s: float | None
    curve: list[list[float]]


def two_sided(t: float, degrees: int) -> float:
    """The chance that Student's t with an odd number of degrees lies within -t and t.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3.
    """
    angle = math.atan(t / math.sqrt(degrees))
    total, term = 0.0, math.cos(angle)
    for step in range(1, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (step + 1) / (step + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total)


@functools.lru_cache(maxsize=64)
def quantile(confidence: float, degrees: int) -> float:
    """The t within which Student's t lies with this chance, of an odd number of degrees; by bisection."""
    low, high = 0.0, 1.0
    while two_sided(high, degrees) < confidence and high < 1e12:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) < confidence else (low, middle)
    return high


def interval(growths: Sequence[float], confidence: float) -> Interval:
    """The mean growth of a task with its interval, by batch means. growths: bytes a run of so many stretches of runs.

    There are at least PARTS of them. The means of as many parts are taken: what is done every few runs is in each of
    them, so they depend far less on each other than runs do (Law, Simulation Modeling and Analysis, 9.5.3). The oldest
    ones are left out where the number is no multiple.
    """
    each = len(growths) // PARTS
    kept = growths[len(growths) - each * PARTS :]
    means = [sum(kept[start : start + each]) / each * 1000 / 1024 for start in range(0, each * PARTS, each)]
    mean = sum(means) / PARTS
    error = math.sqrt(sum((one - mean) ** 2 for one in means) / (PARTS - 1) / PARTS)
    reach = quantile(confidence, PARTS - 1) * error
    return Interval(mean, mean - reach, mean + reach, error)


@dataclass
class _Seen:
    """Of one task."""

    ran: int = 0
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    # Bytes a run of each stretch of runs that was measured, oldest first, and of those of them that are no warm ones;
    # and how many runs those are.
    every: list[float] = field(default_factory=list)
    growths: list[float] = field(default_factory=list)
    measured: int = 0
    cold: int = 0
    total: float = 0.0
    much: float = MUCH
    # Measured runs and what all up to there gained, for a chart; each of so many runs has a point.
    curve: list[tuple[int, float]] = field(default_factory=list)
    step: int = 1
    # Looks that were taken, runs at the last one of them, what it told, and of how many runs.
    looks: int = 0
    looked: int = 0
    found: Interval | None = None
    judged: int = 0
    confidence: float = 0.0
    verdict: str = ""
    why: str = ""
    decided_s: float | None = None


class Judge:
    """Takes the records as they come, and says of each task as soon as it can be said.

    A task is looked at when plan.runs of its runs were measured, and then each time that they are twice as many; of
    those, the last half is judged, which the look before has not seen. Of the chance to be wrong, ERROR, the tasks of
    the file have one half, each the same, and the others that come the other half; and each look at a task half of what
    is left of its share: so all looks at all of them together have no more (Boole's inequality; to spend it so is what
    Lan and DeMets, Biometrika 70 (1983), call a spending function).
    """

    def __init__(self, plan: Plan, budget: Mapping[str, float]) -> None:
        self.plan, self.budget = plan, budget
        self.tasks: dict[str, _Seen] = {name: _Seen() for name in plan.tasks}
        self.processes: dict[str, dict[str, Any]] = {}
        self.refused = ""

    def take(self, process: str, record: Mapping[str, Any], seconds: float) -> None:
        """A record of a process, seconds after the soak began."""
        if record["kind"] == "refused":
            self.refused = str(record["why"])
        if record["kind"] == "process":
            self.processes[process] = {"measure": record["measure"], "python": record["python"], "tasks": 0}
            self.processes[process] |= {"by_task": Counter(), "gained": Counter(), "series": []}
        if record["kind"] != "task" or process not in self.processes:
            return
        life = self.processes[process]
        life["tasks"] += 1
        name = str(record["task"])
        life["by_task"][name] += 1
        life["series"].append((record["used_bytes"], record["rss_kb"], record["fds"]))
        one = self.tasks.setdefault(name, _Seen())
        one.ran += 1
        one.seconds += record["seconds"]
        if record["failed"]:
            one.failed += 1
            one.errors[str(record["error"])] += 1
        growth = record["growth_bytes"]
        if growth is not None:
            runs = record["grown"]
            one.measured += runs
            one.every.append(growth / runs)
            life["gained"][name] += growth
            _draw(one, growth)
            planned = self.plan.tasks.get(name, Task(name))
            if life["tasks"] - runs >= WARM[self.plan.pool] and life["by_task"][name] - runs >= planned.warm:
                one.cold += runs
                one.growths.append(growth / runs)
        if not one.verdict:
            self._look(name, one, seconds, life["gained"][name])

    def _look(self, name: str, one: _Seen, seconds: float, gained: float) -> None:
        """gained: bytes, in the process that it just ran in."""
        if one.ran >= LEAST_RUNS and one.failed > MOST_FAILED * one.ran:
            kinds = " and ".join(kind for kind, _ in one.errors.most_common(2))
            one.verdict, one.decided_s = UNDECIDED, seconds
            one.why = f"it raised in {one.failed} of {one.ran} runs ({kinds}): see to its args, or to what it needs"
        elif one.cold >= max(self.plan.runs, 2 * one.looked) and len(one.growths) >= 2 * PARTS:
            one.looked = one.cold
            self._judge(name, one, one.growths, seconds)
        elif gained >= one.much and len(one.every) >= 2 * PARTS:
            one.much = 2 * gained
            self._judge(name, one, one.every, seconds, early=True)

    def _judge(self, name: str, one: _Seen, growths: Sequence[float], seconds: float, early: bool = False) -> None:
        """early: of runs that are not warm, which tell of a leak and not that there is none."""
        one.looks += 1
        last = growths[len(growths) // 2 :]
        one.judged = round(len(last) * one.measured / len(one.every))
        one.confidence = 1 - self._share(name) / 2**one.looks
        one.found = found = interval(last, one.confidence)
        budget = self.budget.get(name, self.budget[""])
        if found.high <= budget and not early:
            one.verdict, one.why = PASS, f"within {budget:g} KiB per 1,000 tasks"
        elif found.low > budget:
            one.verdict, one.why = FAIL, f"above {budget:g} KiB per 1,000 tasks"
        if one.verdict:
            one.decided_s = seconds

    def _share(self, name: str) -> float:
        """Of ERROR: half for the tasks of the file, alike; the kth of others half of what those before it left."""
        if name in self.plan.tasks:
            return ERROR / 2 / len(self.plan.tasks)
        return ERROR / 2 * 0.5 ** (list(self.tasks).index(name) - len(self.plan.tasks) + 1)

    def decided(self) -> list[str]:
        """Those that need not run any more."""
        return [name for name, one in self.tasks.items() if one.verdict]

    def over(self) -> bool:
        return bool(self.refused) or all(self.tasks[name].verdict for name in self.plan.tasks)

    def finish(self, seconds: float) -> list[Verdict]:
        """What is said in the end. A task that is not decided is looked at once more, if there is more to see."""
        told = []
        for name, one in self.tasks.items():
            planned = name in self.plan.tasks
            if not one.verdict and one.looked and one.cold > 1.25 * one.looked:
                self._judge(name, one, one.growths, seconds)
            if not one.verdict:
                one.verdict, one.why = UNDECIDED, self._missing(one, planned)
            found = one.found
            told.append(
                Verdict(
                    task=name,
                    verdict=one.verdict,
                    why=one.why,
                    planned=planned,
                    ran=one.ran,
                    measured=one.measured,
                    judged=one.judged,
                    failed=one.failed,
                    errors=dict(one.errors.most_common(5)),
                    growth_kb=_rounded(found and found.growth),
                    growth_low=_rounded(found and found.low),
                    growth_high=_rounded(found and found.high),
                    error_kb=_rounded(found and found.error),
                    confidence=round(one.confidence, 8) if found else None,
                    budget_kb=self.budget.get(name, self.budget[""]),
                    seconds_a_task=round(one.seconds / one.ran, 5) if one.ran else None,
                    decided_s=_rounded(one.decided_s),
                    curve=[[run, round(size / 1024, 1)] for run, size in one.curve],
                )
            )
        return told

    def _missing(self, one: _Seen, planned: bool) -> str:
        if self.refused:
            return self.refused
        if not planned:
            return (
                f"it ran {one.ran} times, and too seldom several times in a row to be judged: name it in the tasks"
                " file, so that it is sent by itself"
            )
        if one.found is None:
            return (
                f"{one.cold} runs were measured after the warm ones, and the first look takes {self.plan.runs}: raise"
                " limits.seconds, limits.tasks or its weight"
            )
        return (
            "its interval is on both sides of the budget: raise limits.seconds, or the budget, or see what in it comes"
            " and goes"
        )

    def figures(self) -> dict[str, Any]:
        """The worker as a whole, over the last half of the process that ran most: told, and not judged."""
        most = max(self.processes.values(), key=lambda life: life["tasks"], default=None)
        series = most["series"] if most else []
        told: dict[str, Any] = {
            "processes": len(self.processes),
            "measure": most["measure"] if most else None,
            "python": most["python"] if most else None,
            "tasks": sum(life["tasks"] for life in self.processes.values()),
        }
        half = series[len(series) // 2 :]
        if len(half) > PARTS:
            thousands = (len(half) - 1) / 1000
            told["used_kb_per_1000_tasks"] = round((half[-1][0] - half[0][0]) / 1024 / thousands, 1)
            told["rss_kb_per_1000_tasks"] = round((half[-1][1] - half[0][1]) / thousands, 1)
            told["descriptors_per_1000_tasks"] = round((half[-1][2] - half[0][2]) / thousands, 1)
            told["rss_kb"] = half[-1][1]
        return told


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _draw(one: _Seen, growth: float) -> None:
    """A point of a chart; of ever more runs, every second one is left out."""
    one.total += growth
    if len(one.every) % one.step == 0:
        one.curve.append((one.measured, one.total))
        if len(one.curve) > MOST_POINTS:
            one.curve, one.step = one.curve[1::2], 2 * one.step


def whole(verdicts: Iterable[Mapping[str, Any]], worker: Mapping[str, Any]) -> str:
    """Of the gate: it fails with any task, and is decided where each task of the file is.

    Nor is it decided where the worker as a whole, by figures(), gained more than a task may that others have sent, and
    that could not be judged: it may have been that one.
    """
    every = list(verdicts)
    if any(one["verdict"] == FAIL for one in every):
        return FAIL
    grew = worker.get("used_kb_per_1000_tasks", 0.0)
    open_ = [one for one in every if one["verdict"] == UNDECIDED and (one["planned"] or grew > one["budget_kb"])]
    return UNDECIDED if open_ else PASS


class Compared(TypedDict):
    """A task beside the same one of a baseline. growth_kb is the baseline's; p the chance that the two are alike."""

    verdict: str
    growth_kb: float
    p: float


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> Compared | None:
    """Whether a task is better or worse than it was, None where one of both was not judged.

    Welch, Biometrika 34 (1947), over the PARTS means of each; of his degrees of freedom the odd number below.
    """
    mean, error, was, error_was = (one.get(name) for one in (now, before) for name in ("growth_kb", "error_kb"))
    if mean is None or error is None or was is None or error_was is None:
        return None
    variance = error**2 + error_was**2
    if variance > 0:
        degrees = int(variance**2 / ((error**4 + error_was**4) / (PARTS - 1)))
        p = 1 - two_sided(abs(mean - was) / math.sqrt(variance), max(1, degrees - (degrees % 2 == 0)))
    else:
        p = 1.0 if mean == was else 0.0
    verdict = SAME
    if p < DIFFERS and abs(mean - was) >= LEAST_DIFFERENCE_KB:
        verdict = WORSE if mean > was else BETTER
    return {"verdict": verdict, "growth_kb": was, "p": float(f"{max(p, 0.0):.2g}")}
