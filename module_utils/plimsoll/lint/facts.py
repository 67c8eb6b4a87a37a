"""What one module says, as plain data: its functions and what they call, its containers and who adds to them.

Of the syntax alone, without inference: names are resolved through imports, assignments and annotations, as far as they
are said once. What cannot be resolved is left out. The facts can be pickled; `rules` puts those of all together.

A dotted name here is where something comes from: `celery.shared_task`, `shop.tasks._seen`; `shop.Gate()` is what the
class or the function returns, `shop.Gate(self)` the instance that a method belongs to, `shop.f.<locals>.g` a function
in one. The names are those of the module; imports of imports are followed by `rules`.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Union

from astroid import nodes
from astroid.exceptions import NoDefault

from . import catalogue
from .resources import (
    BORROWERS,
    CLOSING,
    CLOSING_METHODS,
    OPENERS,
    THREADS,
    WITH_IS_A_TRANSACTION,
    Resource,
)


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SELF = "(self)"
LOCALS = ".<locals>."
# Classes that Django knows by name.
MODELS = "<models>"
# What a manager of Django gives one of, and many of.
_ROW = re.compile(r"(.+?)\.objects(?:\.\w+\(\))*\.(?:get|create|first|last|latest|earliest)")
_ROWS = re.compile(r"(.+?)\.objects(?:\.\w+\(\))+")
ADDERS = frozenset({"append", "appendleft", "extend", "extendleft", "insert", "add", "update", "setdefault"})
REMOVERS = frozenset(
    {
        "pop",
        "popitem",
        "popleft",
        "clear",
        "remove",
        "discard",
        "difference_update",
        "intersection_update",
        "symmetric_difference_update",
    }
)
# Calls that look at a container and keep nothing of it.
_HARMLESS = words(
    """
    len sorted list dict set tuple frozenset sum any all print iter next enumerate repr str bool isinstance min
    max zip map filter reversed copy deepcopy dumps debug info warning error exception format join get extend
    update union issubset issuperset isdisjoint difference intersection hasattr getattr id type range
    """
)
_FACTORIES = {
    "builtins.dict": "dict",
    "builtins.list": "list",
    "builtins.set": "set",
    "collections.defaultdict": "dict",
    "collections.OrderedDict": "dict",
    "collections.Counter": "dict",
    "collections.deque": "deque",
}
_DISPLAYS = {
    nodes.Dict: "dict",
    nodes.DictComp: "dict",
    nodes.List: "list",
    nodes.ListComp: "list",
    nodes.Set: "set",
    nodes.SetComp: "set",
}
# What is read at import and is as large as its file.
_LOADERS = frozenset({"json.load", "json.loads", "pickle.load", "pickle.loads", "yaml.safe_load", "yaml.load"})
# Entries of a literal from which on it is large: some 100 KiB with their values.
LARGE = 1000
_IMPORTERS = frozenset({"import_module", "import_string", "__import__", "import_class", "load_class", "find_spec"})
# Names whose values a program has few of: a dict by these ends.
_CLOSED = words(
    """
    cls klass class type types kind model models lang language locale backend engine driver provider schema
    level status state method module plugin setting settings alias currency country timezone tz format codec
    encoding func function callable fn handler signal sender app_label label environment env db using mode flag
    dtype namespace extension section feature version parser serializer factory worker hostname pid thread loop
    """
)
_CLOSED_ATTRIBUTES = words(
    """
    __class__ __name__ __qualname__ __module__ app_label model_name label_lower db_table _meta dialect
    """
)
_CLOSED_CALLS = words(
    """
    builtins.type builtins.bool os.getpid threading.get_ident threading.current_thread socket.gethostname
    os.getppid asyncio.get_event_loop asyncio.get_running_loop django.utils.translation.get_language
    """
)
_CLOSED_TYPES = frozenset({"bool", "type", "Type", "Enum", "Literal", "Callable", "ModuleType", "LiteralString"})
_CACHES = frozenset({"functools.cache", "functools.lru_cache"})
# Settings by Celery's names of today, and Django's and Celery 3's for them.
SETTINGS = {
    "result_expires": "result_expires",
    "task_result_expires": "result_expires",
    "result_backend": "result_backend",
    "task_ignore_result": "task_ignore_result",
    "ignore_result": "task_ignore_result",
    "worker_prefetch_multiplier": "worker_prefetch_multiplier",
    "celeryd_prefetch_multiplier": "worker_prefetch_multiplier",
    "debug": "DEBUG",
}
_REPLACES = re.compile(r"max[-_.](?:tasks|memory)[-_.]per[-_.]child", re.IGNORECASE)
_READS_RESULTS = words(
    """
    AsyncResult GroupResult ResultSet TaskResult chord chain link allow_join_result EagerResult
    """
)
_SENDS = frozenset({"delay", "apply_async", "send_task"})
# Tests do not run in workers.
_TESTS = re.compile(r"(?:^|\.)(?:tests?|testing|test_\w+|\w+_tests?|conftest)(?:\.|$)")

_Function = Union[nodes.FunctionDef, nodes.AsyncFunctionDef]
_FUNCTIONS = (nodes.FunctionDef, nodes.AsyncFunctionDef)


class Place(NamedTuple):
    """Lines from 1, columns from 0."""

    line: int
    end_line: int | None
    column: int


class Add(NamedTuple):
    """One more for a container: target is its dotted name, where the function's.

    closed: its keys are few; how: key, nested, or the method. value: what kind of thing is added, exception or "".
    """

    target: str
    where: str
    place: Place
    how: str
    closed: bool
    value: str


class Suspect(NamedTuple):
    """What is a finding if a task reaches the function that it is in. runs: what a thread runs, which must not end."""

    symbol: str
    place: Place
    name: str
    how: str = ""
    runs: str = ""


class Container(NamedTuple):
    """kind: dict, list, set or deque. limit: the parameter of __init__ that bounds it. shared: it is the class's."""

    kind: str
    place: Place
    limit: str = ""
    large: bool = False
    shared: bool = False


class Instance(NamedTuple):
    """An object of the module: type is its class's dotted name. given: parameters but None, by name or number."""

    type: str
    given: frozenset[str]


class Setting(NamedTuple):
    """value is its text; constant that it is said outright."""

    name: str
    said: str
    value: str
    constant: bool
    place: Place


class Cached(NamedTuple):
    """A function with a cache of functools that has no bound, or a method with any."""

    function: str
    place: Place
    method: bool
    bound: bool
    closed: bool


@dataclass
class Function:
    """One def. decorators are dotted, "?.task" where what has it is not known; "()" ends those with arguments."""

    name: str
    place: Place
    decorators: list[str] = field(default_factory=list)
    calls: set[str] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)
    suspects: list[Suspect] = field(default_factory=list)
    returns: str = ""
    loops: bool = False
    ignores_result: bool = False


@dataclass
class Class:
    """limits: parameters of __init__ in their order."""

    name: str
    bases: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    containers: dict[str, Container] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    defaults: set[str] = field(default_factory=set)


@dataclass
class Module:
    """small: containers that are emptied, bounded or handed on, by dotted name; emptied: attributes of unknown objects.

    apps: Celery applications that are made here. stars: modules all of whose names are imported. muted: (symbol, line)
    that a comment switches off.
    """

    name: str
    path: str
    test: bool
    imports: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    functions: dict[str, Function] = field(default_factory=dict)
    classes: dict[str, Class] = field(default_factory=dict)
    containers: dict[str, Container] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)
    adds: list[Add] = field(default_factory=list)
    small: set[str] = field(default_factory=set)
    emptied: set[str] = field(default_factory=set)
    cached: list[Cached] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    apps: list[tuple[str, Place]] = field(default_factory=list)
    tasks: set[str] = field(default_factory=set)
    reads_results: bool = False
    replaces_children: bool = False
    stars: set[str] = field(default_factory=set)
    muted: set[tuple[str, int]] = field(default_factory=set)


def place_of(node: nodes.NodeNG) -> Place:
    return Place(node.fromlineno or 1, node.end_lineno, node.col_offset or 0)


def closed_name(name: str) -> bool:
    """Whether a name is that of a thing a program has few of: a constant, a class, a language."""
    words = name.lower().strip("_").split("_")
    if len(words) > 1 and words[-1] in ("name", "code", "label"):
        # model_name, language_code
        words.pop()
    return name.isupper() or words[-1] in _CLOSED or name.lower().strip("_") in _CLOSED


def read(tree: nodes.Module) -> Module:
    """The facts of a module."""
    return _Reader(tree).read()


class _Reader:
    def __init__(self, tree: nodes.Module) -> None:
        self.tree = tree
        self.name = tree.name
        self.facts = Module(tree.name, tree.file or "", bool(_TESTS.search(tree.name)))
        # Resolving a name that is assigned from itself would not end.
        self._resolving: set[int] = set()
        # Of functions: the globals that they assign, and whether they run once.
        self._flags: dict[int, tuple[set[str], bool]] = {}

    # ---- names ----

    def qualified(self, node: nodes.NodeNG) -> str:
        """A function or class by where it is; the module itself is "" below its name."""
        names: list[str] = []
        while not isinstance(node, nodes.Module):
            if isinstance(node, (*_FUNCTIONS, nodes.ClassDef)):
                names.append(node.name)
                if isinstance(_frame(node.parent), _FUNCTIONS):
                    names.append("<locals>")
            node = node.parent
        return ".".join([self.name, *reversed(names)])

    def where(self, node: nodes.NodeNG) -> str:
        """The function that a node is in; "" in none."""
        frame = _frame(node)
        return self.qualified(frame) if isinstance(frame, _FUNCTIONS) else ""

    def resolve(self, node: nodes.NodeNG | None) -> str | None:
        """The dotted name of an expression, or None."""
        if node is None or id(node) in self._resolving:
            return None
        self._resolving.add(id(node))
        try:
            return self._resolve(node)
        finally:
            self._resolving.discard(id(node))

    def _resolve(self, node: nodes.NodeNG) -> str | None:
        if isinstance(node, nodes.Await):
            return self.resolve(node.value)
        if isinstance(node, (nodes.Attribute, nodes.AssignAttr, nodes.DelAttr)):
            base = self.resolve(node.expr)
            return f"{base}.{node.attrname}" if base else None
        if isinstance(node, nodes.Call):
            called = self.resolve(node.func)
            if called in ("contextlib.closing", "contextlib.aclosing") and node.args:
                return self.resolve(node.args[0])
            if called == "builtins.super":
                owner = _owner(node)
                return f"{self.qualified(owner)}(super)" if owner else None
            if called and called.endswith("get_model"):
                return self._model(node)
            row = _ROW.fullmatch(called or "")
            if row:
                return f"{row[1]}()"
            return f"{called}()" if called and not called.endswith(")") else None
        if isinstance(node, (nodes.Name, nodes.AssignName, nodes.DelName)):
            return self._resolve_name(node)
        return None

    def _model(self, call: nodes.Call) -> str | None:
        """Django's get_model("app", "Name"), a class by its name."""
        given = [*call.args, *(word.value for word in call.keywords if word.arg == "model_name")]
        name = given[-1].value if given and isinstance(given[-1], nodes.Const) else None
        return f"{MODELS}.{name.rpartition('.')[2]}" if isinstance(name, str) and name else None

    def _resolve_name(self, node: nodes.NodeNG) -> str | None:
        name, scope, first = node.name, node.scope(), True
        while not isinstance(scope, nodes.Module):
            if name in scope.locals and (first or not isinstance(scope, nodes.ClassDef)):
                return self._resolve_local(name, scope)
            scope, first = scope.parent.scope(), False
        if name in scope.locals:
            return self._resolve_global(name, scope)
        return f"builtins.{name}" if hasattr(builtins, name) else None

    def _resolve_local(self, name: str, scope: nodes.LocalsDictNodeNG) -> str | None:
        if len(scope.locals[name]) != 1:
            return None
        bound = scope.locals[name][0]
        if isinstance(bound, (nodes.Import, nodes.ImportFrom)):
            return self.origin(bound, name)
        if isinstance(bound, (*_FUNCTIONS, nodes.ClassDef)):
            return self.qualified(bound)
        if isinstance(scope, nodes.ClassDef):
            return f"{self.qualified(scope)}.{name}"
        if isinstance(bound.parent, nodes.Arguments):
            return self._resolve_parameter(name, scope, bound.parent)
        if isinstance(bound.parent, (nodes.Assign, nodes.AnnAssign)):
            return self.resolve(bound.parent.value)
        if isinstance(bound.parent, (nodes.For, nodes.Comprehension)):
            rows = _ROWS.fullmatch(self.resolve(bound.parent.iter) or "")
            return f"{rows[1]}()" if rows else None
        if isinstance(bound.parent, nodes.With):
            return next((self.resolve(item) for item, target in bound.parent.items if target is bound), None)
        return None

    def _resolve_parameter(self, name: str, scope: nodes.LocalsDictNodeNG, arguments: nodes.Arguments) -> str | None:
        names = _parameters(arguments)
        if isinstance(scope, _FUNCTIONS) and isinstance(scope.parent, nodes.ClassDef) and names[:1] == [name]:
            if scope.type == "classmethod":
                return self.qualified(scope.parent)
            if scope.type == "method":
                return self.qualified(scope.parent) + SELF
        annotation = _annotation(arguments, name)
        if isinstance(annotation, nodes.BinOp):
            # X | None
            annotation = annotation.left
        of = self.resolve(annotation)
        return f"{of}()" if of and not of.startswith("builtins.") else None

    def _resolve_global(self, name: str, module: nodes.Module) -> str | None:
        for bound in module.locals[name]:
            if isinstance(bound, (nodes.Import, nodes.ImportFrom)):
                return self.origin(bound, name)
        return f"{self.name}.{name}"

    def origin(self, node: nodes.Import | nodes.ImportFrom, name: str) -> str | None:
        """Where a name that is imported comes from."""
        for imported, alias in node.names:
            if isinstance(node, nodes.Import):
                if (alias or imported.split(".")[0]) == name:
                    return str(imported if alias else name)
            elif (alias or imported) == name:
                return f"{self.package(node)}.{imported}"
        return None

    def package(self, node: nodes.ImportFrom) -> str:
        """The absolute name of what is imported from."""
        if not node.level:
            return str(node.modname)
        parts = self.name.split(".")
        kept = parts[: len(parts) - node.level + (1 if self.tree.package else 0)]
        return ".".join([*kept, *([node.modname] if node.modname else [])])

    # ---- one pass over the module ----

    def read(self) -> Module:
        facts = self.facts
        for name, bound in self.tree.locals.items():
            facts.names.add(name)
            for node in bound:
                if isinstance(node, (nodes.Import, nodes.ImportFrom)):
                    origin = self.origin(node, name)
                    if origin:
                        facts.imports[name] = origin
            self._read_global(name, bound)
        for node in _all(self.tree):
            if isinstance(node, _FUNCTIONS):
                self._read_function(node)
            elif isinstance(node, nodes.ClassDef):
                self._read_class(node)
        for node in _all(self.tree):
            if isinstance(node, nodes.Call):
                self._read_call(node)
            elif isinstance(node, nodes.ImportFrom) and node.names[0][0] == "*":
                facts.stars.add(self.package(node))
            elif isinstance(node, nodes.Keyword):
                self._read_keyword(node)
            elif isinstance(node, nodes.Const):
                self._mentions(node.value if isinstance(node.value, str) and len(node.value) < 200 else "")
            if isinstance(node, (nodes.Name, nodes.AssignName, nodes.DelName)):
                self._mentions(node.name)
                self._read_use(node)
            elif isinstance(node, (nodes.Attribute, nodes.AssignAttr, nodes.DelAttr)):
                self._mentions(node.attrname)
                self._read_use(node)
            if isinstance(node, (nodes.AssignName, nodes.AssignAttr)):
                self._read_setting(node)
        return facts

    def _mentions(self, text: str) -> None:
        if _REPLACES.search(text):
            self.facts.replaces_children = True
        if text in _READS_RESULTS:
            self.facts.reads_results = True

    def _read_global(self, name: str, bound: list[nodes.NodeNG]) -> None:
        made = [node for node in bound if isinstance(node, nodes.AssignName) and isinstance(node.scope(), nodes.Module)]
        if not made:
            return
        if len(made) != len(bound):
            # Assigned again in a function.
            self.facts.small.add(f"{self.name}.{name}")
        value = _value_of(made[-1])
        container = self._container(value)
        dotted = f"{self.name}.{name}"
        if container:
            self.facts.containers[dotted] = container
        elif isinstance(value, nodes.Call):
            of = self.resolve(value.func)
            if of and (of in ("celery.Celery", "celery.app.Celery") or of.endswith(".Celery")):
                self.facts.apps.append((dotted, place_of(made[-1])))
            elif of:
                self.facts.instances[dotted] = Instance(of, _given(value))
        elif isinstance(value, (nodes.Name, nodes.Attribute)) and len(bound) == 1:
            same = self.resolve(value)
            if same and same != dotted and not same.startswith("builtins."):
                self.facts.imports[name] = same

    def _container(self, value: nodes.NodeNG | None) -> Container | None:
        """What a container that nothing bounds is made by; None for anything else."""
        for display, kind in _DISPLAYS.items():
            if isinstance(value, display):
                entries = value.items if isinstance(value, nodes.Dict) else getattr(value, "elts", None)
                return Container(kind, place_of(value), large=entries is None or len(entries) >= LARGE)
        if isinstance(value, nodes.BinOp) and value.op == "*" and isinstance(value.left, nodes.List):
            return Container("list", place_of(value), large=True)
        if not isinstance(value, nodes.Call):
            return None
        of = self.resolve(value.func) or ""
        if of in _LOADERS:
            return Container("dict", place_of(value), large=True)
        kind = _FACTORIES.get(of, "")
        if kind != "deque":
            return Container(kind, place_of(value)) if kind else None
        most = next((word.value for word in value.keywords if word.arg == "maxlen"), None)
        most = value.args[1] if most is None and len(value.args) > 1 else most
        if most is None or (isinstance(most, nodes.Const) and most.value is None):
            return Container(kind, place_of(value))
        return Container(kind, place_of(value), limit=most.name) if isinstance(most, nodes.Name) else None

    def _read_function(self, node: _Function) -> None:
        function = Function(self.qualified(node), place_of(node))
        self.facts.functions[function.name] = function
        for decorator in node.decorators.nodes if node.decorators else ():
            plain = decorator.func if isinstance(decorator, nodes.Call) else decorator
            of = self.resolve(plain) or (f"?.{plain.attrname}" if isinstance(plain, nodes.Attribute) else "")
            if of:
                function.decorators.append(f"{of}()" if isinstance(decorator, nodes.Call) else of)
            if isinstance(decorator, nodes.Call):
                function.ignores_result |= any(
                    word.arg == "ignore_result" and not _is_false(word.value) for word in decorator.keywords
                )
        function.loops = any(isinstance(one, nodes.While) and _endless(one) for one in _all(node))
        ends = [end for end in _all(node) if isinstance(end, nodes.Return) and _frame(end) is node]
        if len(ends) == 1:
            function.returns = self.resolve(ends[0].value) or ""
        self._read_cache(node, function)

    def _read_cache(self, node: _Function, function: Function) -> None:
        for decorator in node.decorators.nodes if node.decorators else ():
            of = self.resolve(decorator.func if isinstance(decorator, nodes.Call) else decorator)
            if of not in _CACHES:
                continue
            method = isinstance(node.parent, nodes.ClassDef) and node.type == "method"
            names = _parameters(node.args)
            closed = all(self._closed_parameter(node.args, name) for name in names[1 if method else 0 :])
            bound = of == "functools.lru_cache" and not _unbounded(decorator)
            self.facts.cached.append(Cached(function.name, place_of(decorator), method, bound, closed))

    def _read_class(self, node: nodes.ClassDef) -> None:
        of = Class(self.qualified(node), [base for base in map(self.resolve, node.bases) if base])
        self.facts.classes[of.name] = of
        for item in node.body:
            if isinstance(item, _FUNCTIONS):
                of.methods.add(item.name)
                if item.name == "__init__":
                    of.parameters = _parameters(item.args)[1:]
                    of.defaults = {name for name in of.parameters if _defaults_to_none(item.args, name)}
                self._read_attributes(item, of)
            elif isinstance(item, (nodes.Assign, nodes.AnnAssign)):
                targets = item.targets if isinstance(item, nodes.Assign) else [item.target]
                container = self._container(item.value)
                for target in targets:
                    if isinstance(target, nodes.AssignName) and container:
                        of.containers.setdefault(target.name, container._replace(shared=True))
                    elif isinstance(target, nodes.AssignName) and target.name == "ignore_result":
                        of.types["ignore_result"] = "builtins.bool"

    def _read_attributes(self, method: _Function, of: Class) -> None:
        me = of.name + SELF
        for node in _all(method):
            if not isinstance(node, nodes.AssignAttr) or self.resolve(node.expr) != me:
                continue
            value = getattr(node.parent, "value", None)
            if not isinstance(node.parent, (nodes.Assign, nodes.AnnAssign)) or value is None:
                continue
            container = self._container(value)
            if container and method.name == "__init__":
                of.containers[node.attrname] = container
            elif isinstance(value, nodes.Call) and method.name == "__init__":
                made = self.resolve(value)
                if made:
                    of.types[node.attrname] = made
                of.containers.pop(node.attrname, None)
            elif method.name == "__init__":
                of.containers.pop(node.attrname, None)

    # ---- calls ----

    def _read_call(self, node: nodes.Call) -> None:
        facts, where, of = self.facts, self.where(node), self.resolve(node.func)
        words = [word.value for word in node.keywords]
        if isinstance(node.func, nodes.Attribute) and node.func.attrname in _SENDS:
            # What is done with the result is not followed.
            facts.reads_results |= not isinstance(node.parent, nodes.Expr)
        if of and of.rpartition(".")[2] in ("task", "shared_task"):
            facts.tasks.update(name for name in map(self.resolve, node.args) if name)
        if not where or self._once(node, ""):
            return
        function = facts.functions[where]
        if of:
            function.calls.add(of)
        elif isinstance(node.func, nodes.Attribute):
            function.methods.add(node.func.attrname)
        for given in (*node.args, *words):
            passed = self.resolve(given) if isinstance(given, (nodes.Name, nodes.Attribute)) else None
            if passed:
                function.calls.add(passed)
        suspect = self._resource(node, of or "") or self._registration(node, of or "")
        if suspect:
            function.suspects.append(suspect)

    def _registration(self, node: nodes.Call, of: str) -> Suspect | None:
        """A handler, an exit function or a logger that stays when the function is done."""
        method = node.func.attrname if isinstance(node.func, nodes.Attribute) else ""
        frame, place = _frame(node), place_of(node)
        said = {word.arg: word.value for word in node.keywords}
        first = node.args[0] if node.args else said.get("receiver")
        if of == "logging.getLogger" and first is not None and self._built(first):
            return Suspect(catalogue.LOGGER, place, _text(first))
        if method == "connect" and first is not None and _is_false(said.get("weak")) and "dispatch_uid" not in said:
            return self._piles_up(node, node.func.expr, first, {"disconnect"})
        if of == "sqlalchemy.event.listen" and len(node.args) > 2:
            return self._piles_up(node, node.args[0], node.args[2], {"remove"})
        if of == "atexit.register" and not _calls(frame, {"unregister"}) and not self._once(node, ""):
            return Suspect(catalogue.HANDLER, place, f"exit function {_text(first)}" if first else "exit function")
        if method == "addHandler" and first is not None:
            around = _owner(node) or frame
            if not _calls(around, {"removeHandler"}) and not self._once(node, "handlers"):
                return Suspect(catalogue.HANDLER, place, f"handler {_text(first)} of {_text(node.func.expr)}")
        longer = of in ("sys.path.append", "sys.path.insert") and node.args
        if longer and not _asked_for(node, node.args[-1]) and not _calls(frame, {"remove", "pop"}):
            return Suspect(catalogue.CONTAINER, place, "sys.path")
        return None

    def _piles_up(self, node: nodes.Call, of: nodes.NodeNG, handler: nodes.NodeNG, undone: set[str]) -> Suspect | None:
        """One that is made in the function is another one each time; one of the module counts once.

        It goes with what it is registered at, where that is made in the function too.
        """
        bound = _frame(node).locals.get(of.name, ()) if isinstance(of, nodes.Name) else ()
        if any(isinstance(getattr(one.parent, "value", None), nodes.Call) for one in bound):
            return None
        made_here = isinstance(handler, (nodes.Lambda, nodes.Call)) or LOCALS in (self.resolve(handler) or "")
        if not made_here or _calls(_frame(node), undone):
            return None
        return Suspect(catalogue.HANDLER, place_of(node), f"handler {_text(handler)} of {_text(node.func)}")

    def _built(self, node: nodes.NodeNG) -> bool:
        """A text that is put together of what is not known to come again."""
        if isinstance(node, nodes.JoinedStr):
            return any(
                isinstance(part, nodes.FormattedValue) and not self.closed(part.value, node) for part in node.values
            )
        if isinstance(node, nodes.BinOp) and node.op in "+%":
            return not self.closed(node, node)
        if isinstance(node, nodes.Call) and isinstance(node.func, nodes.Attribute) and node.func.attrname == "format":
            return not all(self.closed(given, node) for given in (*node.args, *(w.value for w in node.keywords)))
        return False

    # ---- resources ----

    def _resource(self, node: nodes.Call, of: str) -> Suspect | None:
        """What is opened here and not closed."""
        of = of.replace("pathlib.PosixPath", "pathlib.Path")
        thread = of in THREADS
        kind = THREADS.get(of) or OPENERS.get(of)
        if not kind or (of == "os.fdopen" and not node.args):
            return None
        symbol = catalogue.THREAD if thread else catalogue.UNCLOSED
        suspect = Suspect(symbol, place_of(node), _text(node.func) + "()")
        if thread:
            target = next((word.value for word in node.keywords if word.arg == "target"), None)
            suspect = suspect._replace(runs=self.resolve(target) or (_text(target) if target else ""))
        parent = node.parent
        if isinstance(parent, nodes.Await):
            node, parent = parent, parent.parent
        if isinstance(parent, (nodes.With, nodes.AsyncWith)):
            target = next((target for item, target in parent.items if item is node), None)
            if of not in WITH_IS_A_TRANSACTION:
                return None
            if isinstance(target, nodes.AssignName) and self._ended(_frame(node), target.name, kind) == "closed":
                return None
            return Suspect(catalogue.WITH, place_of(node), _text(node))
        started = isinstance(parent, nodes.Attribute) and parent.attrname == "start"
        if thread and not started and not isinstance(parent, nodes.Assign):
            return None
        if isinstance(parent, nodes.Call) and node is not parent.func:
            reader = self.resolve(parent.func) or ""
            return suspect if reader in BORROWERS and not kind.descriptor else None
        if isinstance(parent, nodes.Attribute):
            return None if parent.attrname in kind.closers | {"__enter__"} else suspect
        if isinstance(parent, (nodes.Expr, nodes.For, nodes.AsyncFor, nodes.Comprehension, nodes.Subscript)):
            return suspect
        if not isinstance(parent, nodes.Assign) or len(parent.targets) != 1:
            return None
        target = parent.targets[0]
        if kind.descriptor and isinstance(target, nodes.Tuple) and target.elts:
            target = target.elts[0]
        if not isinstance(target, nodes.AssignName) or target.name not in _frame(node).locals:
            return None
        ended = self._ended(_frame(node), target.name, kind, parent)
        if thread and ("start" not in _called_on(_frame(node), target.name) or _calls(_frame(node), {"set"})):
            # Not started; or told to end by an event.
            return None
        if ended == "open":
            return suspect
        # A process that ended is waited for when the next one is started.
        if ended == "raises" and not thread and of != "subprocess.Popen":
            return suspect._replace(how=" when something raises")
        return suspect._replace(how=" on every path") if ended == "partly" else None

    def _ended(self, frame: nodes.NodeNG, name: str, kind: Resource, made: nodes.NodeNG | None = None) -> str:
        """Of a local variable: "open", "closed", "partly", "raises" where an exception skips it, or "given" on."""
        closes: list[nodes.NodeNG] = []
        uses = [one for one in _all(frame) if isinstance(one, nodes.Name) and one.name == name]
        for use in uses:
            node, parent = use, use.parent
            if isinstance(parent, nodes.Keyword):
                node, parent = parent, parent.parent
            if isinstance(parent, (nodes.With, nodes.AsyncWith)):
                return "closed"
            if isinstance(parent, nodes.Attribute):
                if parent.attrname in kind.closers:
                    if not isinstance(parent.parent, nodes.Call):
                        return "given"
                    closes.append(node)
            elif isinstance(parent, nodes.Call) and node is not parent.func:
                taker = self.resolve(parent.func) or ""
                method = parent.func.attrname if isinstance(parent.func, nodes.Attribute) else ""
                if taker == "os.close":
                    closes.append(node)
                elif taker not in BORROWERS or taker in CLOSING or method in CLOSING_METHODS:
                    return "given"
            elif isinstance(
                parent,
                (
                    nodes.Return,
                    nodes.Yield,
                    nodes.Assign,
                    nodes.AnnAssign,
                    nodes.Tuple,
                    nodes.List,
                    nodes.Dict,
                    nodes.Set,
                    nodes.Starred,
                    nodes.NamedExpr,
                    nodes.IfExp,
                    nodes.BoolOp,
                ),
            ) and not (isinstance(parent, nodes.BoolOp) and isinstance(parent.parent, (nodes.If, nodes.While))):
                return "given"
        if not closes:
            return "open"
        if any(_in_finally(close) or _frame(close) is not frame for close in closes):
            return "closed"
        if made is None:
            return "closed"
        if not _always(made, closes, name):
            return "partly"
        first = min((close.fromlineno for close in closes if close.fromlineno > made.tolineno), default=0)
        between = (node for node in _all(frame) if isinstance(node, (nodes.Call, nodes.Await, nodes.Raise)))
        return "raises" if any(made.tolineno < node.fromlineno < first for node in between) else "closed"

    # ---- containers ----

    def _read_use(self, node: nodes.NodeNG) -> None:
        """What an expression does to the container that it may be."""
        frame = _frame(node)
        local = not isinstance(frame, nodes.Module) and isinstance(node, (nodes.AssignName, nodes.DelName))
        if local and node.name in frame.locals:
            # A variable of the function, and not what it stands for.
            return
        of = self.resolve(node)
        if of is None or "." not in of or of.startswith("builtins."):
            if isinstance(node, nodes.Attribute) and self._use(node, "?")[0] == "small":
                self.facts.emptied.add(node.attrname)
            return
        did, how, key, value = self._use(node, of)
        if did == "small":
            self.facts.small.add(of)
        elif did == "add":
            where = self.where(node)
            if not where or self._once(node, of):
                return
            closed = key is not None and (self.closed(key, node) or _imported(value))
            if how in ("update", "|="):
                closed = self._of_closed(_frame(node))
            if how == "append":
                # A list takes the same one again, unless it is asked first.
                closed = closed and key is not None and _asked_for(node, key)
            kept = "exception" if value is not None and self._exception(value) else ""
            self.facts.adds.append(Add(of, where, place_of(node.statement()), how, closed, kept))

    def _use(self, node: nodes.NodeNG, of: str) -> tuple[str, str, nodes.NodeNG | None, nodes.NodeNG | None]:
        """("add" or "small" or "", how, its key, its value)."""
        nothing, small = ("", "", None, None), ("small", "", None, None)
        parent = node.parent
        if isinstance(node, (nodes.AssignName, nodes.AssignAttr)):
            if isinstance(parent, nodes.AugAssign):
                return ("add", parent.op, None, parent.value) if parent.op in ("+=", "|=") else small
            frame = _frame(node)
            if not isinstance(frame, _FUNCTIONS):
                return nothing
            return nothing if frame.name in ("__init__", "__new__") else small
        if isinstance(node, (nodes.DelName, nodes.DelAttr)):
            return small
        if isinstance(parent, nodes.Subscript) and parent.value is node:
            return self._use_of_item(parent)
        if isinstance(parent, nodes.Attribute):
            called = parent.parent
            if not isinstance(called, nodes.Call) or called.func is not parent:
                return small if parent.attrname in REMOVERS | ADDERS else nothing
            return self._use_of_method(parent, called)
        if isinstance(parent, nodes.Keyword):
            node, parent = parent, parent.parent
        if isinstance(parent, nodes.Call) and node is not parent.func:
            name = getattr(parent.func, "attrname", None) or getattr(parent.func, "name", "")
            if name == "len" and _compared(parent):
                return small
            if name == "shuffle":
                return "add", "changed", None, None
            return nothing if name in _HARMLESS else small
        if isinstance(parent, nodes.Assign) and isinstance(node, (nodes.Name, nodes.Attribute)):
            target = parent.targets[0]
            alone = len(parent.targets) == 1 and isinstance(target, nodes.AssignName)
            return nothing if alone and len(target.scope().locals.get(target.name, ())) == 1 else small
        if isinstance(parent, (nodes.Return, nodes.Yield, nodes.YieldFrom, nodes.NamedExpr, nodes.IfExp)):
            return small
        if isinstance(parent, (nodes.List, nodes.Tuple, nodes.Set, nodes.Dict)):
            return small
        if isinstance(parent, nodes.BoolOp):
            return nothing if isinstance(parent.parent, (nodes.If, nodes.While, nodes.BoolOp)) else small
        return nothing

    def _use_of_item(self, item: nodes.Subscript) -> tuple[str, str, nodes.NodeNG | None, nodes.NodeNG | None]:
        nothing, small = ("", "", None, None), ("small", "", None, None)
        outer = item.parent
        if item.ctx is None or item.ctx.name == "Del":
            return small
        if item.ctx.name == "Store":
            if isinstance(item.slice, nodes.Slice):
                return small
            value = getattr(outer, "value", None) if isinstance(outer, (nodes.Assign, nodes.AnnAssign)) else None
            return "add", "key", item.slice, value
        if isinstance(outer, nodes.Attribute) and isinstance(outer.parent, nodes.Call) and outer.parent.func is outer:
            if outer.attrname in REMOVERS:
                return small
            if outer.attrname in ADDERS - {"update", "setdefault"}:
                given = outer.parent.args
                return "add", "nested", None, given[-1] if given else None
        if isinstance(outer, nodes.Subscript) and outer.value is item and outer.ctx.name != "Load":
            return ("add", "item", outer.slice, None) if outer.ctx.name == "Store" else small
        return nothing

    def _use_of_method(
        self, method: nodes.Attribute, called: nodes.Call
    ) -> tuple[str, str, nodes.NodeNG | None, nodes.NodeNG | None]:
        name, given = method.attrname, called.args
        if name in REMOVERS:
            return "small", "", None, None
        if name in ("sort", "reverse"):
            return "add", "changed", None, None
        if name not in ADDERS or not given:
            return "", "", None, None
        if name == "setdefault":
            then = called.parent
            if isinstance(then, nodes.Attribute) and then.attrname in ADDERS - {"update", "setdefault"}:
                value = then.parent.args[-1] if isinstance(then.parent, nodes.Call) and then.parent.args else None
                return "add", "nested", None, value
            return "add", "key", given[0], given[1] if len(given) > 1 else None
        if name == "add":
            return "add", "add", given[0], given[0]
        if name in ("append", "appendleft", "insert"):
            return "add", "append", given[-1], given[-1]
        return "add", name, None, given[0]

    def _exception(self, value: nodes.NodeNG) -> bool:
        """Whether a value has a traceback, itself or in a tuple, list or dict."""
        if isinstance(value, (nodes.Tuple, nodes.List)):
            return any(self._exception(part) for part in value.elts)
        if isinstance(value, nodes.Dict):
            return any(self._exception(part) for _, part in value.items)
        if isinstance(value, nodes.Attribute):
            return bool(value.attrname == "__traceback__")
        if isinstance(value, nodes.Call):
            return (self.resolve(value.func) or "") == "sys.exc_info"
        if isinstance(value, nodes.Name):
            bound = value.scope().locals.get(value.name, ())
            return bool(bound) and all(isinstance(one.parent, nodes.ExceptHandler) for one in bound)
        return False

    # ---- keys ----

    def closed(self, key: nodes.NodeNG, at: nodes.NodeNG, depth: int = 0) -> bool:
        """Whether a key is one of few: a constant, a member of an Enum, a class, a name for such a thing."""
        if depth > 4:
            return False
        if isinstance(key, nodes.Const):
            return True
        if isinstance(key, (nodes.Tuple, nodes.List)):
            return all(self.closed(part, at, depth + 1) for part in key.elts)
        if isinstance(key, nodes.JoinedStr):
            return all(self.closed(part, at, depth + 1) for part in key.values)
        if isinstance(key, nodes.FormattedValue):
            return self.closed(key.value, at, depth + 1)
        if isinstance(key, nodes.BinOp):
            if key.op in "%&" and isinstance(key.right, nodes.Const) and isinstance(key.right.value, int):
                return True
            return self.closed(key.left, at, depth + 1) and self.closed(key.right, at, depth + 1)
        if isinstance(key, nodes.IfExp):
            return self.closed(key.body, at, depth + 1) and self.closed(key.orelse, at, depth + 1)
        if isinstance(key, (nodes.Compare, nodes.Lambda)) or (isinstance(key, nodes.UnaryOp) and key.op == "not"):
            return True
        if isinstance(key, nodes.Attribute):
            if key.attrname in _CLOSED_ATTRIBUTES or closed_name(key.attrname):
                return True
            of = self.resolve(key) or ""
            return of.startswith("django.conf.settings.") or self._of_class(key, of)
        if isinstance(key, nodes.Subscript):
            return self.closed(key.value, at, depth + 1)
        if isinstance(key, nodes.Call):
            if self.resolve(key.func) in _CLOSED_CALLS:
                return True
            if isinstance(key.func, nodes.Attribute) and not key.args:
                return self.closed(key.func.expr, at, depth + 1) or closed_name(key.func.attrname)
            return False
        return isinstance(key, nodes.Name) and self._closed_variable(key, at, depth)

    def _of_class(self, key: nodes.Attribute, of: str) -> bool:
        """Whether it is an attribute that the class gives a constant; those below it give it others."""
        owner = _owner(key)
        if owner is None or of != f"{self.qualified(owner)}{SELF}.{key.attrname}":
            return False
        values = [getattr(bound.parent, "value", None) for bound in owner.locals.get(key.attrname, ())]
        return bool(values) and all(isinstance(value, nodes.Const) for value in values)

    def _closed_variable(self, key: nodes.Name, at: nodes.NodeNG, depth: int) -> bool:
        if closed_name(key.name):
            return True
        scope = key.scope()
        while key.name not in scope.locals and not isinstance(scope, nodes.Module):
            scope = scope.parent.scope()
        bound = scope.locals.get(key.name, [])
        if isinstance(scope, nodes.Module) or not bound:
            # A global, that many modules have one of.
            return True
        if isinstance(bound[0].parent, nodes.Arguments):
            return self._closed_parameter(bound[0].parent, key.name)
        for one in bound:
            parent = one.parent
            if isinstance(parent, (nodes.Assign, nodes.AnnAssign)) and parent.value is not None:
                if not self.closed(parent.value, at, depth + 1):
                    return False
            elif isinstance(parent, (nodes.For, nodes.AsyncFor, nodes.Comprehension)):
                if not self._closed_series(parent.iter):
                    return False
            elif not isinstance(one, (*_FUNCTIONS, nodes.ClassDef)):
                return False
        return True

    def _closed_series(self, series: nodes.NodeNG) -> bool:
        """Whether what is iterated over is written down in the program."""
        if isinstance(series, (nodes.List, nodes.Tuple, nodes.Set, nodes.Dict)):
            return True
        if isinstance(series, nodes.Attribute) and self._closed_series(series.expr):
            return True
        if isinstance(series, nodes.Name) and closed_name(series.name):
            return True
        if isinstance(series, nodes.Call) and series.args:
            return self._closed_series(series.args[0])
        if isinstance(series, nodes.Call) and isinstance(series.func, nodes.Attribute):
            return self._closed_series(series.func.expr)
        of = self.resolve(series) or ""
        return of.rpartition(".")[2].isupper() or of.startswith(("django.conf.settings", "sys.modules"))

    def _closed_parameter(self, arguments: nodes.Arguments, name: str) -> bool:
        if closed_name(name):
            return True
        annotation = _annotation(arguments, name)
        if annotation is None:
            return False
        words = set(re.findall(r"\w+", annotation.as_string()))
        return bool(words & _CLOSED_TYPES)

    def _of_closed(self, frame: _Function) -> bool:
        """Whether all that a function is given is one of few, as a class is."""
        names = _parameters(frame.args)
        return bool(names) and all(self._closed_parameter(frame.args, name) for name in names)

    def _once(self, node: nodes.NodeNG, of: str) -> bool:
        """Whether what is done here is done once for all: while a container is empty, or until a flag is set."""
        frame = _frame(node)
        if not isinstance(frame, _FUNCTIONS):
            return True
        if id(frame) not in self._flags:
            names = {name for item in _all(frame) if isinstance(item, nodes.Global) for name in item.names}
            self._flags[id(frame)] = names, self._is_called_once(frame)
        flags, once = self._flags[id(frame)]
        if once:
            return True
        child: nodes.NodeNG = node.statement()
        while child is not frame:
            parent = child.parent
            if isinstance(parent, nodes.If) and self._asks_first(parent.test, of, flags):
                return True
            for before in _block_of(child):
                if before is child:
                    break
                ends = isinstance(before, nodes.If) and isinstance(before.body[-1], (nodes.Return, nodes.Raise))
                if ends and self._asks_first(before.test, of, flags):
                    return True
            child = parent
        return False

    def _is_called_once(self, frame: _Function) -> bool:
        """Whether a cache keeps what a function without parameters returned."""
        decorators = frame.decorators.nodes if frame.decorators and not _parameters(frame.args) else ()
        return any(self.resolve(getattr(one, "func", one)) in _CACHES for one in decorators)

    def _asks_first(self, test: nodes.NodeNG, of: str, flags: set[str]) -> bool:
        """`if not CACHE`, `if CACHE`, `if CACHE is None`, `if not loaded`; `if key in CACHE` is none of these."""
        if isinstance(test, nodes.UnaryOp) and test.op == "not":
            return self._asks_first(test.operand, of, flags)
        if isinstance(test, nodes.BoolOp):
            return any(self._asks_first(value, of, flags) for value in test.values)
        if isinstance(test, nodes.Compare):
            return test.ops[0][0] in ("is", "is not", "==") and self._asks_first(test.left, of, flags)
        if isinstance(test, nodes.Call) and _text(test.func) in ("len", "bool") and test.args:
            return self._asks_first(test.args[0], of, flags)
        if isinstance(test, nodes.Call):
            return bool(of == "handlers") and "andlers" in _text(test)
        if isinstance(test, nodes.Name) and test.name in flags:
            return True
        if isinstance(test, nodes.Attribute) and test.attrname == of:
            return True
        return bool(of) and self.resolve(test) == of

    # ---- settings ----

    def _read_keyword(self, node: nodes.Keyword) -> None:
        self._mentions(node.arg or "")
        called = node.parent
        if isinstance(called, nodes.Call) and node.arg in SETTINGS and node.arg != "debug":
            owner = _text(called.func)
            if owner.endswith((".conf.update", "Celery")) or owner == "dict":
                self._add_setting(node.arg, node.arg, node.value, node)

    def _read_setting(self, node: nodes.AssignName | nodes.AssignAttr) -> None:
        parent = node.parent
        if not isinstance(parent, (nodes.Assign, nodes.AnnAssign)) or parent.value is None:
            return
        if isinstance(node, nodes.AssignName):
            if not isinstance(node.scope(), (nodes.Module, nodes.ClassDef)):
                return
            self._read_settings_of_dict(node, parent.value)
            name = node.name
        else:
            if not _text(node.expr).endswith("conf"):
                return
            name = node.attrname
        # Lower-case names say what they are by `worker_` and the like; ignore_result is a task's own option as well.
        plain = name.lower()
        short = plain.replace("celery_", "", 1)
        if short == "debug":
            known = name == "DEBUG"
        else:
            known = short in SETTINGS and (name.isupper() or short != "ignore_result")
        if known:
            self._add_setting(short, name, parent.value, node)

    def _read_settings_of_dict(self, node: nodes.AssignName, value: nodes.NodeNG) -> None:
        if isinstance(value, nodes.Dict) and "celery" in node.name.lower():
            for key, one in value.items:
                if isinstance(key, nodes.Const) and isinstance(key.value, str):
                    short = key.value.lower().replace("celery_", "", 1)
                    if short in SETTINGS and short != "debug":
                        self._add_setting(short, key.value, one, key)

    def _add_setting(self, short: str, said: str, value: nodes.NodeNG, node: nodes.NodeNG) -> None:
        constant = isinstance(value, nodes.Const) and not (short == "debug" and self._read_over(node))
        self.facts.settings.append(Setting(SETTINGS[short], said, _text(value), constant, place_of(node)))

    def _read_over(self, node: nodes.NodeNG) -> bool:
        """Whether the module takes settings from elsewhere after a line."""
        later = (one for one in _all(self.tree) if (one.fromlineno or 0) > node.fromlineno)
        return any(
            (isinstance(one, nodes.ImportFrom) and one.names[0][0] == "*")
            or (isinstance(one, nodes.Call) and _text(one.func) in ("exec", "globals().update", "locals().update"))
            for one in later
        )


# ---- of the tree ----


def _all(node: nodes.NodeNG) -> Iterator[nodes.NodeNG]:
    """A node and all below it; deep trees are met in generated code."""
    stack = [node]
    while stack:
        one = stack.pop()
        yield one
        stack.extend(reversed(list(one.get_children())))


def _value_of(target: nodes.AssignName) -> nodes.NodeNG | None:
    """What a name is given, also as one of a, b = x, y."""
    parent = target.parent
    if isinstance(parent, nodes.Tuple) and isinstance(parent.parent, nodes.Assign):
        values = parent.parent.value
        if isinstance(values, nodes.Tuple) and len(values.elts) == len(parent.elts):
            return next(value for one, value in zip(parent.elts, values.elts) if one is target)
        return None
    return getattr(parent, "value", None)


def _frame(node: nodes.NodeNG) -> nodes.NodeNG:
    """The def, class or module that a node is run by; a lambda and a comprehension are of what is around them."""
    scope = node if isinstance(node, nodes.Module) else node.scope()
    while not isinstance(scope, (*_FUNCTIONS, nodes.ClassDef, nodes.Module)):
        scope = scope.parent.scope()
    return scope


def _owner(node: nodes.NodeNG) -> nodes.ClassDef | None:
    """The class whose method a node is in."""
    while node is not None and not isinstance(node, nodes.ClassDef):
        node = node.parent
    return node


def _text(node: nodes.NodeNG) -> str:
    """Its source, in one short line."""
    text = " ".join(node.as_string().split())
    return text if len(text) <= 60 else text[:57] + "..."


def _parameters(arguments: nodes.Arguments) -> list[str]:
    return [one.name for one in (*arguments.posonlyargs, *(arguments.args or ()), *arguments.kwonlyargs)]


def _annotation(arguments: nodes.Arguments, name: str) -> nodes.NodeNG | None:
    pairs = (
        (arguments.posonlyargs, arguments.posonlyargs_annotations),
        (arguments.args or (), arguments.annotations),
        (arguments.kwonlyargs, arguments.kwonlyargs_annotations),
    )
    for names, hints in pairs:
        for one, annotation in zip(names, hints or ()):
            if one.name == name:
                return annotation
    return None


def _defaults_to_none(arguments: nodes.Arguments, name: str) -> bool:
    try:
        default = arguments.default_value(name)
    except NoDefault:
        return False
    return isinstance(default, nodes.Const) and default.value is None


def _given(call: nodes.Call) -> frozenset[str]:
    given = {str(at): one for at, one in enumerate(call.args)}
    given.update({word.arg or "**": word.value for word in call.keywords})
    return frozenset(name for name, one in given.items() if not (isinstance(one, nodes.Const) and one.value is None))


def _unbounded(decorator: nodes.NodeNG) -> bool:
    """Whether it is lru_cache(maxsize=None)."""
    if not isinstance(decorator, nodes.Call):
        return False
    most = next((word.value for word in decorator.keywords if word.arg == "maxsize"), None)
    most = decorator.args[0] if most is None and decorator.args else most
    return isinstance(most, nodes.Const) and most.value is None


def _is_false(node: nodes.NodeNG | None) -> bool:
    return isinstance(node, nodes.Const) and node.value is False


def _calls(frame: nodes.NodeNG, methods: set[str]) -> bool:
    return any(isinstance(node, nodes.Attribute) and node.attrname in methods for node in _all(frame))


def _endless(loop: nodes.While) -> bool:
    """Whether it is `while True` with nothing in it that leaves."""
    always = isinstance(loop.test, nodes.Const) and bool(loop.test.value)
    return always and not any(isinstance(one, (nodes.Break, nodes.Return, nodes.Raise)) for one in _all(loop))


def _imported(value: nodes.NodeNG | None, depth: int = 0) -> bool:
    """Whether a value is made of what its function imports by name: there is no more of that than there is program."""
    for node in _all(value) if value is not None and depth < 3 else ():
        if isinstance(node, nodes.Call):
            if getattr(node.func, "attrname", getattr(node.func, "name", "")) in _IMPORTERS:
                return True
        elif isinstance(node, nodes.Name):
            bound = node.scope().locals.get(node.name, ())
            if any(isinstance(one.parent, nodes.Assign) and _imported(one.parent.value, depth + 1) for one in bound):
                return True
    return False


def _called_on(frame: nodes.NodeNG, name: str) -> set[str]:
    return {
        node.attrname
        for node in _all(frame)
        if isinstance(node, nodes.Attribute) and isinstance(node.expr, nodes.Name) and node.expr.name == name
    }


def _asked_for(node: nodes.NodeNG, key: nodes.NodeNG) -> bool:
    """Whether an `if key not in …` stands around it."""
    text = _text(key)
    while not isinstance(node, (*_FUNCTIONS, nodes.Module)):
        parent = node.parent
        if isinstance(parent, nodes.If):
            for test in _all(parent.test):
                if isinstance(test, nodes.Compare) and test.ops[0][0] == "not in" and _text(test.left) == text:
                    return True
        node = parent
    return False


def _compared(node: nodes.NodeNG) -> bool:
    """Whether a number is compared, or tested, anywhere in the expression around it."""
    while node is not None and not node.is_statement:
        if isinstance(node, nodes.Compare):
            return True
        node = node.parent
    return isinstance(node, (nodes.While, nodes.If))


def _block_of(node: nodes.NodeNG) -> list[nodes.NodeNG]:
    """The list of statements that one is in."""
    parent = node.parent
    for name in ("body", "orelse", "finalbody", "handlers"):
        block = getattr(parent, name, None)
        if isinstance(block, list) and any(one is node for one in block):
            return block
    return [node]


def _in_finally(node: nodes.NodeNG) -> bool:
    child = node
    while not isinstance(child, (*_FUNCTIONS, nodes.Module)):
        parent = child.parent
        if isinstance(parent, (nodes.Try, nodes.TryStar)) and any(one is child for one in parent.finalbody):
            return True
        child = parent
    return False


# ---- paths ----

# Where a path through a block leads to: the resource is closed, still open, or the function is left with it open.
_CLOSED_END, _OPEN_END, _LEFT_END = "closed", "open", "left"


def _always(made: nodes.NodeNG, closes: list[nodes.NodeNG], name: str) -> bool:
    """Whether each path from where a resource is made leads to a close, exceptions aside."""
    closing = {id(close.statement()) for close in closes}
    node = made
    while not isinstance(node, (*_FUNCTIONS, nodes.Module)):
        block = _block_of(node)
        after = block[next(at for at, one in enumerate(block) if one is node) + 1 :]
        ends = _ends(after, closing, name)
        if _LEFT_END in ends:
            return False
        if ends == {_CLOSED_END}:
            return True
        node = node.parent
    return False


def _ends(block: list[nodes.NodeNG], closing: set[int], name: str) -> set[str]:
    ends: set[str] = set()
    for statement in block:
        if id(statement) in closing:
            return ends | {_CLOSED_END}
        if isinstance(statement, (nodes.Return, nodes.Raise)):
            return ends | {_LEFT_END}
        if isinstance(statement, (nodes.Break, nodes.Continue)):
            break
        here = _ends_of(statement, closing, name)
        ends |= here - {_OPEN_END}
        if _OPEN_END not in here:
            return ends
    return ends | {_OPEN_END}


def _ends_of(statement: nodes.NodeNG, closing: set[int], name: str) -> set[str]:
    if isinstance(statement, nodes.If):
        asked = any(isinstance(one, nodes.Name) and one.name == name for one in _all(statement.test))
        body = _ends(statement.body, closing, name)
        return body if asked and _CLOSED_END in body else body | _ends(statement.orelse, closing, name)
    if isinstance(statement, (nodes.Try, nodes.TryStar)):
        last = _ends(statement.finalbody, closing, name)
        if last == {_CLOSED_END}:
            return last
        body = _ends([*statement.body, *statement.orelse], closing, name)
        for handler in statement.handlers:
            body |= _ends(handler.body, closing, name)
        return body
    if isinstance(statement, (nodes.With, nodes.AsyncWith)):
        return _ends(statement.body, closing, name)
    if isinstance(statement, (nodes.For, nodes.AsyncFor, nodes.While)):
        body = _ends([*statement.body, *statement.orelse], closing, name)
        return body if _CLOSED_END in body else body | {_OPEN_END}
    if isinstance(statement, nodes.Match):
        cases = [_ends(case.body, closing, name) for case in statement.cases]
        return set().union({_OPEN_END}, *cases)
    return {_OPEN_END}
