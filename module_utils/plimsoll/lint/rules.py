"""What of the facts of all modules is a finding. Pure: facts in, findings out.

A task is what Celery runs: a function that is decorated as one, the methods of a task's class, a handler of the signals
that each task sends. Calls are followed from there as far as names say where they lead, MOST_STEPS of them.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import re
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from . import catalogue
from .facts import (
    LOCALS,
    MODELS,
    SELF,
    Add,
    Cached,
    Class,
    Container,
    Function,
    Instance,
    Module,
    Place,
    Setting,
    Suspect,
    words,
)

# Of calls from a task on: beyond, what a name leads to is less and less what runs.
MOST_STEPS = 6
# Imports of imports that are followed: a package's __init__, and one that collects those.
_MOST_IMPORTS = 5
_DECORATORS = frozenset({"task", "shared_task", "periodic_task"})
# Others that call what they have a task.
_OTHERS = words(
    """
    huey locust invoke prefect airflow luigi procrastinate dramatiq rq django_rq nox robocorp taskiq fabric
    crewai
    """
)
_TASK_METHODS = ("run", "__call__", "before_start", "after_return", "on_failure", "on_retry", "on_success")
_PER_TASK = frozenset(
    f"celery.signals.task_{name}"
    for name in ["prerun", "postrun", "success", "failure", "retry", "received", "revoked"]
)
_OF_OBJECTS = frozenset(
    {catalogue.CONTAINER, catalogue.CACHE, catalogue.ATTRIBUTE, catalogue.EXCEPTION, catalogue.FORK}
)
# Messages a process that a worker holds, above which it is no oversight that it is slow: with 64 KiB each and eight
# processes it is 32 MiB.
MOST_PREFETCHED = 64
_NO_BACKEND = ("None", "", "disabled")
_SERVES = frozenset({"serve_forever", "run_forever"})
_ENUMS = frozenset({"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag", "TextChoices", "IntegerChoices", "Choices"})
# Folders whose code no worker runs.
_APART = words(
    """
    test tests testing doc docs example examples benchmark benchmarks
    """
)
# Of a path, for names that a module may have.
_MOST_WORDS = 6
# Settings of these files are of a developer's machine.
_DEVELOPMENT = words(
    """
    dev development local test tests testing debug ci sandbox
    """
)

# Methods that many an object has.
_COMMON = (
    frozenset(
        name
        for of in (str, bytes, list, dict, set, int, float, io.TextIOWrapper, io.BytesIO, deque, re.Pattern, re.Match)
        for name in dir(of)
    )
    | frozenset(
        name
        for of in (
            logging.Logger,
            datetime,
            timedelta,
            threading.Thread,
            threading.Event,
            queue.Queue,
            Path,
            subprocess.Popen,
        )
        for name in dir(of)
    )
    | words(
        """
    filter exclude annotate aggregate order_by values values_list create bulk_create bulk_update get_or_create
    update_or_create save delete refresh_from_db full_clean clean all first last latest earliest exists count
    iterator select_related prefetch_related using distinct only defer as_view is_valid set connect disconnect
    send execute commit rollback fetchone fetchall fetchmany cursor query scalar scalars flush merge expunge
    session request post patch put head options json raise_for_status render register unregister publish
    subscribe acquire release shutdown submit result cancel load dump loads dumps parse process handle validate
    configure setup main export build call invoke lock unlock notify log emit login logout search index fetch
    reload refresh check test get_queryset get_object add_argument get_connection close_connection apply_async
    delay retry
    """
    )
)


class Finding(NamedTuple):
    """One finding. object is what grows or stays open, function what does it, task the one that comes there."""

    path: str
    module: str
    place: Place
    symbol: str
    message: str
    object: str
    function: str
    task: str


class Reached(NamedTuple):
    """How a function is reached: from which task, and as a method of which object of the process, if of one."""

    task: str
    holder: str
    type: str
    steps: int


def judge(modules: Iterable[Module]) -> list[Finding]:
    """All findings, by file and line; of one object that one function adds to, the first line alone."""
    project = _Project(_deployed(list(modules)))
    found: dict[tuple[str | int, ...], Finding] = {}
    for finding in sorted(project.findings(), key=lambda one: (one.path, one.place.line, one.symbol)):
        line = 0 if finding.symbol in _OF_OBJECTS else finding.place.line
        found.setdefault((finding.path, finding.symbol, finding.object, finding.function, line), finding)
    return list(found.values())


def _deployed(modules: list[Module]) -> list[Module]:
    """Without tests, examples and documentation, by module and by folder below what is checked."""
    folders = [Path(module.path).parent for module in modules]
    top = Path(os.path.commonpath(folders)) if folders else Path()
    return [
        module
        for module, folder in zip(modules, folders)
        if not module.test and not _APART.intersection(folder.relative_to(top).parts)
    ]


class _Project:
    def __init__(self, modules: list[Module]) -> None:
        self.all = modules
        self.modules = {module.name: module for module in modules}
        self.elsewhere = self._elsewhere()
        self.functions: dict[str, tuple[Module, Function]] = {}
        self.classes: dict[str, Class] = {}
        self.containers: dict[str, Container] = {}
        self.instances: dict[str, Instance] = {}
        for module in modules:
            self.functions.update({name: (module, function) for name, function in module.functions.items()})
            self.classes.update(module.classes)
            self.containers.update(module.containers)
            self.instances.update(module.instances)
        self.called: dict[str, list[str]] = {}
        for name in self.classes:
            self.called.setdefault(name.rpartition(".")[2].lower(), []).append(name)
        self.families = self._families()
        self.small = {self.canonical(name) for module in modules for name in module.small}
        self.emptied = {name for module in modules for name in module.emptied}
        self.tasks = self._tasks()
        self.only = self._only()
        self.reached = self._reach()

    # ---- names ----

    def canonical(self, dotted: str) -> str:
        """The name of the module where something is defined, imports of imports followed."""
        if dotted.startswith(f"{MODELS}."):
            name = re.split(r"[.(]", dotted)[1]
            of = self.called.get(name.lower(), [])
            return of[0] + dotted[len(MODELS) + 1 + len(name) :] if len(of) == 1 else dotted
        for _ in range(_MOST_IMPORTS):
            module, rest = self._split(dotted)
            if not module:
                # Under the name that it has from another folder of sys.path.
                known = next((name for name in _heads(dotted) if name in self.elsewhere), None)
                if not known:
                    return dotted
                dotted = self.elsewhere[known] + dotted[len(known) :]
                continue
            if not rest:
                return dotted
            first, _, after = rest.partition(".")
            plain = first.split("(")[0]
            origin = module.imports.get(plain)
            if not origin or origin == f"{module.name}.{plain}":
                return dotted
            dotted = origin + first[len(plain) :] + (f".{after}" if after else "")
        return dotted

    def _split(self, dotted: str) -> tuple[Module | None, str]:
        for head in _heads(dotted):
            if head in self.modules:
                return self.modules[head], dotted[len(head) + 1 :]
        return None, dotted

    def _elsewhere(self) -> dict[str, str]:
        """Module by each name of two words and more that its path may give it, and no other's does.

        A folder without __init__.py, and one that is on sys.path itself, are not told from the files.
        """
        names: dict[str, set[str]] = {}
        for module in self.all:
            path = Path(module.path)
            parts = path.parent.parts if path.stem == "__init__" else (*path.parent.parts, path.stem)
            for many in range(2, min(len(parts), _MOST_WORDS) + 1):
                names.setdefault(".".join(parts[-many:]), set()).add(module.name)
        return {
            name: of.pop()
            for name, of in names.items()
            if len(of) == 1 and name not in self.modules and not name.startswith(("celery.", "django."))
        }

    def follow(self, dotted: str, at: Reached | None = None, depth: int = 0) -> tuple[str, str, str]:
        """(function or class or instance or "", its name, the object of the process that it is a method of)."""
        if depth > 8:
            return "", "", ""
        dotted = self.canonical(dotted)
        if dotted in self.functions:
            return "function", dotted, ""
        if dotted in self.classes:
            return "class", dotted, ""
        if dotted in self.instances:
            kind, name, _ = self.follow(self.instances[dotted].type, None, depth + 1)
            return ("instance", name, dotted) if kind == "class" else self._returned(kind, name, dotted, depth)
        if dotted.endswith(SELF) or dotted.endswith("(super)"):
            name = dotted[: dotted.rindex("(")]
            if at and at.type and name in self.families.get(at.type, ()):
                # The object's own class, and not the one that the method is written in.
                return "instance", at.type if dotted.endswith(SELF) else name, at.holder
            return "instance", name, ""
        if dotted.endswith("()"):
            kind, name, _ = self.follow(dotted[:-2], at, depth + 1)
            return ("instance", name, "") if kind == "class" else self._returned(kind, name, "", depth)
        base, _, attribute = dotted.rpartition(".")
        if not base:
            return "", "", ""
        kind, name, holder = self.follow(base, at, depth + 1)
        if kind not in ("instance", "class"):
            return "", "", ""
        ancestors = self.ancestors(name)
        for of in ancestors[1:] if base.endswith("(super)") else ancestors:
            if attribute in self.classes[of].methods:
                return "function", f"{of}.{attribute}", holder
            if attribute in self.classes[of].types:
                kind, made, _ = self.follow(self.classes[of].types[attribute], None, depth + 1)
                return kind, made, f"{holder}.{attribute}" if holder else ""
        return "", "", ""

    def _returned(self, kind: str, name: str, holder: str, depth: int) -> tuple[str, str, str]:
        """What a function returns, where it returns one thing."""
        returns = self.functions[name][1].returns if kind == "function" else ""
        if not returns:
            return "", "", ""
        kind, of, at = self.follow(returns, None, depth + 1)
        return kind, of, at or holder

    def ancestors(self, name: str) -> list[str]:
        """A class and those above it that are known, from the nearest on."""
        found: list[str] = []
        todo = [name]
        while todo:
            one = self.canonical(todo.pop(0))
            if one in self.classes and one not in found:
                found.append(one)
                todo.extend(self.classes[one].bases)
        return found

    def _families(self) -> dict[str, set[str]]:
        """Class to all above and below it."""
        families: dict[str, set[str]] = {name: {name} for name in self.classes}
        for name in self.classes:
            for above in self.ancestors(name):
                families[name].add(above)
                families[above].add(name)
        return families

    def _only(self) -> dict[str, list[str]]:
        """Method to the functions of its name, where one family of classes alone has it and no type of Python's has.

        They are what is called where nothing says of what class an object is.
        """
        having: dict[str, list[str]] = {}
        for of in self.classes.values():
            for method in of.methods:
                having.setdefault(method, []).append(of.name)
        return {
            method: [f"{of}.{method}" for of in classes if f"{of}.{method}" not in self.tasks]
            for method, classes in having.items()
            if method not in _COMMON and not method.startswith("__") and self._are_one_family(classes)
        }

    def _are_one_family(self, classes: list[str]) -> bool:
        return any(self.families[of].issuperset(classes) for of in classes)

    # ---- tasks ----

    def _tasks(self) -> dict[str, str]:
        """Function to the name of the task that it is."""
        tasks: dict[str, str] = {}
        for name, (_, function) in self.functions.items():
            if any(self._decorates(decorator) for decorator in function.decorators):
                tasks[name] = name
            elif any(
                self.canonical(one.removesuffix("()")).rpartition(".")[0] in _PER_TASK for one in function.decorators
            ):
                tasks[name] = f"{name}, of a signal that each task sends,"
        for module in self.all:
            for dotted in module.tasks:
                kind, name, _ = self.follow(dotted)
                if kind == "function":
                    tasks.setdefault(name, name)
        self.task_classes = {name for name in self.classes if self._is_task_class(name)}
        for name in self.task_classes:
            for method in _TASK_METHODS:
                for of in self.ancestors(name):
                    if method in self.classes[of].methods:
                        tasks.setdefault(f"{of}.{method}", name)
                        break
        return tasks

    def _decorates(self, decorator: str, depth: int = 0) -> bool:
        """Whether a decorator makes a task: Celery's, or one of the project that uses it."""
        decorator = self.canonical(decorator.removesuffix("()"))
        kind, name, _ = self.follow(decorator)
        if kind == "function":
            if depth > 2:
                return False
            names = {name, *(f for f in self.functions if f.startswith(name + LOCALS))}
            return any(
                self._decorates(called, depth + 1)
                for one in names
                for called in (*self.functions[one][1].calls, *self.functions[one][1].decorators)
                if called.rpartition(".")[2] in _DECORATORS or (self.follow(called)[0] == "function" and depth < 1)
            )
        head, _, last = decorator.rpartition(".")
        return last in _DECORATORS and decorator.split(".")[0] not in _OTHERS and bool(head)

    def _is_task_class(self, name: str) -> bool:
        for of in self.ancestors(name):
            for base in self.classes[of].bases:
                head, _, last = self.canonical(base).rpartition(".")
                if last == "Task" and (
                    head.startswith("celery") or head.rpartition(".")[2].endswith(("app", "celery"))
                ):
                    return True
        return False

    def _reach(self) -> dict[str, Reached]:
        """Function to how it is reached; a function that is reached as a method of the process's own object says so."""
        reached: dict[str, Reached] = {}
        todo: deque[tuple[str, Reached]] = deque()
        for name, task in self.tasks.items():
            owner = name.rpartition(".")[0]
            holder = task if task in self.task_classes else ""
            todo.append((name, Reached(task, holder, holder if owner in self.classes else "", 0)))
        seen: set[tuple[str, str]] = set()
        while todo:
            name, how = todo.popleft()
            if (name, how.holder) in seen:
                continue
            seen.add((name, how.holder))
            if name not in reached or (how.holder and not reached[name].holder):
                reached[name] = how
            if how.steps >= MOST_STEPS:
                continue
            for called, holder in self._called(name, how):
                owner = called.rpartition(".")[0]
                of = self._type_of(holder) if holder else (owner if owner in self.classes else "")
                todo.append((called, Reached(how.task, holder, of, how.steps + 1)))
        return reached

    def _overrides(self, called: str) -> list[str]:
        """A method in the classes below its own: an object may be of any of them."""
        owner, _, method = called.rpartition(".")
        return [
            f"{below}.{method}"
            for below in sorted(self.families.get(owner, ()))
            if below != owner and method in self.classes[below].methods and owner in self.ancestors(below)
        ]

    def _type_of(self, holder: str) -> str:
        if holder in self.task_classes:
            return holder
        return self.follow(holder)[1]

    def _called(self, name: str, how: Reached) -> Iterator[tuple[str, str]]:
        """Functions that one calls, each with the object of the process that it is called on."""
        function = self.functions[name][1]
        for dotted in sorted(function.calls):
            kind, called, holder = self.follow(dotted, how)
            if not kind and ")." in dotted:
                # What a call returned, such as a query's row.
                yield from ((only, "") for only in self.only.get(dotted.rpartition(".")[2], ()))
            if kind == "class":
                called = next(
                    (f"{of}.__init__" for of in self.ancestors(called) if "__init__" in self.classes[of].methods), ""
                )
                holder = ""
            elif kind != "function":
                continue
            if called and called not in self.tasks:
                yield called, holder
            if kind == "function" and not holder:
                yield from ((below, "") for below in self._overrides(called))
        for method in sorted(function.methods):
            yield from ((only, "") for only in self.only.get(method, ()))
        for decorator in function.decorators:
            # What a decorator wraps around a function runs with it; the decorator itself ran at import, and so did
            # what makes one of its arguments.
            kind, of, _ = self.follow(decorator.removesuffix("()"))
            for inner in self.functions if kind == "function" else ():
                if inner.startswith(of + LOCALS) and inner.count(LOCALS) - of.count(LOCALS) > decorator.endswith("()"):
                    yield inner, ""

    # ---- findings ----

    def findings(self) -> Iterator[Finding]:
        for module in self.all:
            for add in module.adds:
                yield from self._of_add(module, add)
            for function in module.functions.values():
                if function.name in self.reached:
                    for suspect in function.suspects:
                        yield from self._of_suspect(module, function, suspect)
            for cached in module.cached:
                yield from self._of_cached(module, cached)
        if self.tasks or any(module.apps for module in self.all):
            for module in self.all:
                for setting in module.settings:
                    yield from self._of_setting(module, setting)
            yield from self._of_apps()

    def _finding(
        self, module: Module, place: Place, symbol: str, thing: str, function: str, **more: str
    ) -> Iterator[Finding]:
        if (symbol, place.line) in module.muted:
            return
        task = self.reached[function].task if function in self.reached else ""
        where = ""
        if function:
            where = _said(function)
            where = f"task {where}" if function in self.tasks else f"{where}, which task {_said(task)} comes to,"
        said = {"object": thing, "where": where, "value": "", "how": "", **more}
        text = catalogue.BY_SYMBOL[symbol].message % said
        yield Finding(module.path, module.name, place, symbol, text, thing, function, task)

    def _of_suspect(self, module: Module, function: Function, suspect: Suspect) -> Iterator[Finding]:
        if suspect.symbol == catalogue.THREAD and not self._endless(suspect.runs, function):
            return
        yield from self._finding(module, suspect.place, suspect.symbol, suspect.name, function.name, how=suspect.how)

    def _endless(self, runs: str, function: Function) -> bool:
        """Whether what a thread runs is seen not to end: most do, and are gone with what they were started for."""
        kind, name, _ = self.follow(runs, self.reached[function.name])
        return self.functions[name][1].loops if kind == "function" else runs.rpartition(".")[2] in _SERVES

    def _of_add(self, module: Module, add: Add) -> Iterator[Finding]:
        if add.where not in self.reached:
            return
        how = self.reached[add.where]
        target = self.canonical(add.target)
        if target in self.containers and target not in self.small:
            yield from self._of_container(module, add, self.containers[target], target.rpartition(".")[2])
            return
        base, _, attribute = target.rpartition(".")
        kind, name, holder = self.follow(base, how)
        if kind not in ("instance", "class") or attribute in self.emptied:
            return
        of = next((one for one in self.ancestors(name) if attribute in self.classes[one].containers), "")
        if not of or any(self._is_small(member, attribute) for member in self.families[name]):
            return
        container = self.classes[of].containers[attribute]
        if holder and f"{holder}.{attribute}" in self.small:
            return
        if container.shared:
            yield from self._of_container(module, add, container, f"{of.rpartition('.')[2]}.{attribute}")
            return
        grows = not add.closed and self._grows(container, add) and not self._limited(holder, name, container)
        if kind == "instance" and holder and grows:
            symbol = catalogue.EXCEPTION if add.value else catalogue.ATTRIBUTE
            thing = f"{holder.rpartition('.')[2]}.{attribute}"
            yield from self._finding(module, add.place, symbol, thing, add.where)

    def _is_small(self, of: str, attribute: str) -> bool:
        return bool(self.small & {f"{of}{SELF}.{attribute}", f"{of}().{attribute}", f"{of}.{attribute}"})

    def _limited(self, holder: str, of: str, container: Container) -> bool:
        """Whether deque(maxlen=parameter) of an object got one."""
        if not container.limit:
            return False
        instance, known = self.instances.get(holder), self.classes[of]
        if not instance or container.limit not in known.parameters:
            return True
        at = str(known.parameters.index(container.limit))
        return bool(instance.given & {container.limit, at, "**"}) or container.limit not in known.defaults

    @staticmethod
    def _grows(container: Container, add: Add) -> bool:
        if container.kind == "dict":
            return add.how in ("key", "nested")
        if container.kind == "set":
            return add.how in ("add", "update", "|=")
        return add.how in ("append", "extend", "extendleft", "+=", "nested")

    def _of_container(self, module: Module, add: Add, container: Container, thing: str) -> Iterator[Finding]:
        if not add.closed and self._grows(container, add) and not container.limit:
            symbol = catalogue.CACHE if container.kind == "dict" and add.how == "key" else catalogue.CONTAINER
            symbol = catalogue.EXCEPTION if add.value else symbol
            yield from self._finding(module, add.place, symbol, thing, add.where)
        elif container.large and add.how in ("key", "item", "changed"):
            yield from self._finding(module, add.place, catalogue.FORK, thing, add.where)

    def _of_cached(self, module: Module, cached: Cached) -> Iterator[Finding]:
        if cached.method:
            owner, _, method = cached.function.rpartition(".")
            callers = (name for name in self.reached if method in self.functions[name][1].methods)
            caller = cached.function if cached.function in self.reached else ""
            if not caller and method not in _COMMON:
                caller = next((name for name in callers if name != cached.function), "")
            if caller and not self._has_few(owner):
                thing = f"{owner.rpartition('.')[2]}.{method}"
                where = _said(caller)
                where = (
                    f"task {where}"
                    if caller in self.tasks
                    else f"{where}, which task {_said(self.reached[caller].task)} comes to,"
                )
                yield from self._finding(
                    module, cached.place, catalogue.METHOD, thing, cached.function, where=f"{where} calls {method}()"
                )
        elif not cached.bound and not cached.closed and cached.function in self.reached:
            thing = cached.function.rpartition(".")[2] + "()"
            yield from self._finding(module, cached.place, catalogue.CACHE, thing, cached.function)

    def _has_few(self, of: str) -> bool:
        """Whether all objects of a class are in modules, or are members of an Enum."""
        if any(base.rpartition(".")[2] in _ENUMS for one in self.ancestors(of) for base in self.classes[one].bases):
            return True
        made = any(self.canonical(instance.type) == of for instance in self.instances.values())
        return made and not any(self.canonical(name) == of for _, one in self.functions.values() for name in one.calls)

    def _of_setting(self, module: Module, setting: Setting) -> Iterator[Finding]:
        said, value, place = setting.said, setting.value, setting.place
        symbol = ""
        if not setting.constant:
            return
        if setting.name == "result_expires" and value in ("None", "0"):
            symbol = catalogue.EXPIRY if self._keeps_results() else ""
        elif setting.name == "DEBUG" and value == "True" and not _for_development(module):
            symbol = catalogue.DEBUG if "INSTALLED_APPS" in module.names and not self._said_elsewhere(module) else ""
        elif setting.name == "worker_prefetch_multiplier" and value.isdigit():
            symbol = catalogue.PREFETCH if not 0 < int(value) <= MOST_PREFETCHED else ""
        elif setting.name == "result_backend" and value.strip("'\"") not in _NO_BACKEND:
            symbol = catalogue.UNREAD if self._unread() else ""
            value = _said(next(iter(self._storing()), ""))
        if symbol:
            yield from self._finding(module, place, symbol, said, "", value=value)

    def _keeps_results(self) -> bool:
        """Whether there is a result backend, and it is none of the project's own, which may end them in its own way."""
        backends = [
            one.value.strip("'\"") for module in self.all for one in module.settings if one.name == "result_backend"
        ]
        own = any(re.fullmatch(r"\w+(?:\.\w+)+(?::\w+)?", backend) for backend in backends)
        return not own and any(backend not in _NO_BACKEND for backend in backends)

    def _said_elsewhere(self, module: Module) -> bool:
        """Whether settings that are built on these say it anew."""
        above = (one for one in self.all if any(self._split(star)[0] is module for star in one.stars))
        return any(setting.name == "DEBUG" for one in above for setting in one.settings)

    def _storing(self) -> list[str]:
        return [name for name in self.tasks if name in self.functions and not self.functions[name][1].ignores_result]

    def _unread(self) -> bool:
        if any(module.reads_results for module in self.all) or not self._storing():
            return False
        return not any(s.name == "task_ignore_result" and s.value != "False" for m in self.all for s in m.settings)

    def _of_apps(self) -> Iterator[Finding]:
        if any(module.replaces_children for module in self.all):
            return
        for module in self.all:
            for name, place in module.apps:
                yield from self._finding(module, place, catalogue.CHILDREN, name, "")


def _heads(dotted: str) -> Iterator[str]:
    """A name and what it begins with, the longest first; up to what a call returned."""
    head = dotted.split("(")[0]
    while head:
        yield head
        head = head.rpartition(".")[0]


def _said(name: str) -> str:
    return name.replace(LOCALS, ".")


def _for_development(module: Module) -> bool:
    return not _DEVELOPMENT.isdisjoint(module.name.replace("_", ".").split("."))
