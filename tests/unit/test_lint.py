"""The static checks: what each finds and what it leaves alone; the plugin in pylint, and its reporters' formats."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from conftest import ROOT
from plimsoll.lines import InputError
from plimsoll.lint import catalogue

astroid = pytest.importorskip("astroid")
pytest.importorskip("pylint")

from plimsoll.lint import facts, rules  # noqa: E402
from plimsoll.lint.run import check  # noqa: E402

MARK = re.compile(r"# -> ([\w-]+)")
HEAD = """
from celery import Celery, Task, shared_task, signals
import collections, contextlib, enum, functools, logging, os, sqlite3, subprocess, sys
import tempfile, threading, time, traceback
"""


def judged(modules: dict[str, str]) -> set[tuple[str, int, str]]:
    """(module, line, symbol) of each finding."""
    read = []
    for name, text in modules.items():
        tree = astroid.parse(HEAD + dedent(text), name, f"/app/{name.replace('.', '/')}.py", apply_transforms=False)
        read.append(facts.read(tree))
    return {(one.module, one.place.line, one.symbol) for one in rules.judge(read)}


def marked(modules: dict[str, str]) -> set[tuple[str, int, str]]:
    """The same, of the comments that say so."""
    return {
        (name, number, symbol)
        for name, text in modules.items()
        for number, line in enumerate((HEAD + dedent(text)).splitlines(), 1)
        for symbol in MARK.findall(line)
    }


def holds(text: str, **others: str) -> None:
    modules = {"shop.tasks": text, **{f"shop.{name}": other for name, other in others.items()}}
    assert judged(modules) == marked(modules)


# ---- containers ----


@pytest.mark.parametrize(
    "text",
    [
        """
        _seen = []
        @shared_task
        def scan(order):
            _seen.append(order)  # -> celery-unbounded-container
        """,
        """
        _seen = set()
        @shared_task
        def scan(order):
            if order not in _seen:
                _seen.add(order)  # -> celery-unbounded-container
        """,
        """
        _by_gate = collections.defaultdict(list)
        @shared_task
        def scan(gate, order):
            _by_gate[gate].append(order)  # -> celery-unbounded-container
        """,
        """
        _later = collections.deque()
        def remember(order):
            _later.append(lambda: order)  # -> celery-unbounded-container
        @shared_task
        def scan(order):
            remember(order)
        """,
        """
        class Gate:
            seen = []
            def scan(self, order):
                self.seen.append(order)  # -> celery-unbounded-container
        @shared_task
        def scan(order):
            Gate().scan(order)
        """,
        """
        @shared_task
        def scan(order):
            sys.path.insert(0, f"/srv/{order}")  # -> celery-unbounded-container
        """,
        """
        _plans = {}
        @shared_task
        def plan(order):
            if order not in _plans:
                _plans[order] = [order]  # -> celery-unbounded-cache
            return _plans[order]
        """,
        """
        _plans = {}
        @shared_task
        def plan(order):
            mine = _plans
            try:
                return mine[order]
            except KeyError:
                return mine.setdefault(order, [order])  # -> celery-unbounded-cache
        """,
        """
        @functools.lru_cache(maxsize=None)  # -> celery-unbounded-cache
        def plan(order):
            return [order]
        @shared_task
        def show(order):
            return plan(order)
        """,
        """
        @functools.cache  # -> celery-unbounded-cache
        def plan(order: int, gate: str):
            return [order]
        class Show(Task):
            def run(self, order, gate):
                return plan(order, gate)
        """,
        """
        app = Celery("shop", worker_max_tasks_per_child=100)
        _started = {}
        @signals.task_prerun.connect
        def start(task_id, **kwargs):
            _started[task_id] = time.monotonic()  # -> celery-unbounded-cache
        """,
    ],
)
def test_a_container_that_tasks_only_add_to(text: str) -> None:
    holds(text)


@pytest.mark.parametrize(
    "text",
    [
        # No task comes there.
        """
        _seen = []
        def scan(order):
            _seen.append(order)
        """,
        # A registry that decorators fill at import, of tasks at that.
        """
        _tasks = {}
        def register(name):
            def keep(function):
                _tasks[name] = function
                return function
            return keep
        @register("scan")
        @shared_task
        def scan(order):
            return len(_tasks)
        """,
        # Emptied, bounded, assigned again, or handed to what may do so.
        """
        _seen = []
        @shared_task
        def scan(order):
            _seen.append(order)
        @shared_task
        def flush():
            _seen.clear()
        """,
        """
        _seen = collections.deque(maxlen=20)
        @shared_task
        def scan(order):
            _seen.append(order)
        """,
        """
        _plans = collections.OrderedDict()
        @shared_task
        def plan(order):
            _plans[order] = [order]
            while len(_plans) > 100:
                _plans.popitem(last=False)
        """,
        """
        _seen = []
        @shared_task
        def scan(order):
            global _seen
            _seen.append(order)
            if order == 0:
                _seen = []
        """,
        """
        from shop.prune import prune
        _seen = []
        @shared_task
        def scan(order):
            _seen.append(order)
            prune(_seen)
        """,
        """
        _plans = {}
        def plans():
            return _plans
        @shared_task
        def scan(order):
            _plans[order] = 1
        """,
        """
        import cachetools, weakref
        _plans, _objects = cachetools.TTLCache(100, 60), weakref.WeakValueDictionary()
        @shared_task
        def scan(order):
            _plans[order] = 1
            _objects[order] = object()
        """,
        # Keys of which there are few.
        """
        import enum
        from django.conf import settings
        class Gate(enum.Enum):
            NORTH = 1
        _state = {}
        @shared_task
        def scan(order, language, verbose: bool):
            _state["last"] = order
            _state[Gate.NORTH] = order
            _state[type(order)] = order
            _state[order % 10] = order
            _state[language] = order
            _state[verbose] = order
            _state[settings.SITE_ID] = order
            _state[f"{language}-{verbose}"] = order
            _state[os.getpid(), "client"] = order
            for name in ("a", "b"):
                _state[name] = order
            _state[order.__class__.__name__] = order
            _state[order > 3] = order
            _state[scan.language_code, scan.module_name] = order
        """,
        # Filled once.
        """
        _gates = {}
        def gates():
            if not _gates:
                for line in open_gates():
                    _gates[line] = 1
            return len(_gates)
        def gates_too():
            if _gates:
                return 1
            for line in open_gates():
                _gates[line] = 1
        @shared_task
        def scan(order):
            gates(), gates_too()
        """,
        """
        _gates, _loaded = {}, False
        def load():
            global _loaded
            if _loaded:
                return
            _loaded = True
            for line in open_gates():
                _gates[line] = 1
        @functools.cache
        def once():
            for line in open_gates():
                _gates[line] = 1
        @shared_task
        def scan(order):
            load(), once()
        """,
        # What is called once for all is not called by each task.
        """
        _made, _app = [], None
        def make():
            _made.append(object())
            return _made[0]
        def application():
            global _app
            if _app is None:
                _app = make()
            return _app
        @shared_task
        def scan(order):
            application()
        """,
        # What is of a class.
        """
        _fields = set()
        def install(model):
            _fields.update(field.name for field in model.fields)
            for field in model.fields:
                _fields.add(field)
        @shared_task
        def scan(order):
            install(type(order))
        """,
        # What is imported by name.
        """
        from importlib import import_module
        _backends = {}
        @shared_task
        def scan(name):
            if name not in _backends:
                backend = import_module(name).Backend
                _backends[name] = backend()
        """,
        # Of the function, or of an object of the task.
        """
        class Report:
            def __init__(self):
                self.rows = []
            def add(self, row):
                self.rows.append(row)
        @shared_task
        def scan(order):
            _seen = []
            _seen.append(order)
            report = Report()
            report.add(order)
            return report.rows
        """,
        # No container, or one that takes nothing more.
        """
        _count, _days, _slots = 0, {"mon": 0}, [0] * 10
        @shared_task
        def scan(order):
            global _count
            _count += 1
            _days["mon"] += order
            _slots[order % 10] = order
        """,
        """
        @functools.lru_cache(maxsize=100)
        def bounded(order): ...
        @functools.cache
        def nothing(): ...
        @functools.cache
        def few(model, language: str, full: bool): ...
        @shared_task
        def scan(order):
            bounded(order), nothing(), few(scan, "en", True)
        """,
        # Of other queues than Celery's.
        """
        import huey
        queue = huey.RedisHuey()
        from invoke import task
        _seen = []
        @task
        def scan(order):
            _seen.append(order)
        """,
    ],
)
def test_a_container_that_does_not_grow_with_tasks(text: str) -> None:
    # The last case but one makes a large list, which tasks change; that is another check's.
    found = {one for one in judged({"shop.tasks": text}) if one[2] != catalogue.FORK}
    assert found == set()


def test_what_another_module_does_counts() -> None:
    store = """
        seen, plans, kept = [], {}, []
        def keep(order):
            kept.append(order)  # -> celery-unbounded-container
            seen.append(order)
            plans[order] = 1
        """
    tasks = """
        from . import store
        from .store import keep
        @shared_task
        def scan(order):
            keep(order)
        """
    holds(
        tasks, store=store, flush="from shop import store\ndef flush():\n    store.seen.clear()\n    store.plans = {}\n"
    )


def test_names_are_followed_through_packages_and_through_folders_without_init() -> None:
    modules = {
        "shop.store": "seen = []\ndef keep(order):\n    seen.append(order)  # -> celery-unbounded-container\n",
        "shop": "from shop.store import keep\n",
        "tasks": "from shop import keep\n@shared_task\ndef scan(order):\n    keep(order)\n",
    }
    assert judged(modules) == marked(modules) != set()
    # pylint calls it `store` where the folder has no __init__.py; its path still says shop/store.py.
    tree = astroid.parse(HEAD + modules["shop.store"], "store", "/src/shop/store.py")
    task = astroid.parse(
        HEAD + modules["tasks"].replace("from shop import", "from shop.store import"), "tasks", "/src/tasks.py"
    )
    assert [one.object for one in rules.judge([facts.read(tree), facts.read(task)])] == ["seen"]


@pytest.mark.parametrize(
    "task",
    [
        "@app.task\ndef scan(order):",
        "@app.task(bind=True, acks_late=True)\ndef scan(self, order):",
        "@shared_task(name='scan')\nasync def scan(order):",
        "from celery import shared_task as job\n@job\ndef scan(order):",
        "from lib.queue import celery_app\n@celery_app.task\ndef scan(order):",
        "def our_task(**options):\n    return shared_task(**options)\n@our_task(queue='gate')\ndef scan(order):",
        "def our_task(function):\n    @shared_task\n    def run(*args): return function(*args)\n    return run\n"
        "@our_task\ndef scan(order):",
        "class Scan(Task):\n  def run(self, order):",
        "class Base(app.Task): ...\nclass Scan(Base):\n  def __call__(self, order):",
        "class Scan(Task):\n  def run(self): ...\n  def on_failure(self, exc, order, *args):",
        "def scan(order):",
    ],
)
def test_what_a_task_is(task: str) -> None:
    app = "app = Celery('shop')\napp.conf.worker_max_tasks_per_child = 100\n"
    text = f"{app}_seen = []\n{task}\n    _seen.append(order)  # -> celery-unbounded-container\n"
    if task == "def scan(order):":
        text += "scan_task = app.task(scan)\n"
    holds(text)


# ---- attributes ----


@pytest.mark.parametrize(
    "text",
    [
        """
        class Turnstile:
            def __init__(self, most=None):
                self.sent = collections.deque(maxlen=most)
            def send(self, scan):
                self._keep(scan)
            def _keep(self, scan):
                self.sent.append(scan)  # -> celery-growing-attribute
        turnstile, other = Turnstile(), None
        turnstile = Turnstile()
        @shared_task
        def scan(order):
            turnstile.send(order)
        """,
        """
        class Scan(Task):
            def __init__(self):
                self.seen = {}
            def run(self, order):
                self.seen[order] = 1  # -> celery-growing-attribute
        """,
        """
        class Client:
            def __init__(self):
                self.calls = []
            def call(self, order):
                self.calls.append(order)  # -> celery-growing-attribute
        @functools.cache
        def client():
            return Client()
        _client = client()
        @shared_task
        def scan(order):
            _client.call(order)
        """,
        """
        class Client:
            def __init__(self):
                self.errors = []
        client = Client()
        @shared_task
        def scan(order):
            try:
                order()
            except ValueError as error:
                client.errors.append(error)  # -> celery-kept-exception
        """,
    ],
)
def test_an_object_of_the_process_that_collects(text: str) -> None:
    holds(text)


@pytest.mark.parametrize(
    "text",
    [
        """
        class Turnstile:
            def __init__(self, most=None):
                self.sent = collections.deque(maxlen=most)
            def send(self, scan):
                self.sent.append(scan)
        turnstile = Turnstile(most=50)
        @shared_task
        def scan(order):
            turnstile.send(order)
        """,
        """
        class Batch:
            def __init__(self):
                self.rows = []
            def add(self, row):
                self.rows.append(row)
                if len(self.rows) > 100:
                    self.flush()
            def flush(self): ...
        batch = Batch()
        @shared_task
        def scan(order):
            batch.add(order)
        """,
        """
        class Base:
            def __init__(self):
                self.rows = []
            def add(self, row):
                self.rows.append(row)
        class Batch(Base):
            def flush(self):
                self.rows = []
        batch = Batch()
        @shared_task
        def scan(order):
            batch.add(order)
        """,
        """
        class Batch:
            def __init__(self):
                self.rows = []
            def add(self, row):
                self.rows.append(row)
        batch = Batch()
        @shared_task
        def scan(order):
            batch.add(order)
            batch.rows.clear()
        """,
        """
        class Scan(Task):
            def run(self, order):
                self.seen = []
                self.seen.append(order)
        """,
    ],
)
def test_an_object_that_is_bounded_or_the_tasks_own(text: str) -> None:
    holds(text)


# ---- resources ----


@pytest.mark.parametrize(
    "line",
    [
        "data = open(order).read()",
        "handle = open(order)",
        "for line in open(order): print(line)",
        "import json; json.load(open(order))",
        "_, path = tempfile.mkstemp()",
        "path = tempfile.mkstemp()[1]",
        "child = subprocess.Popen([order]); out = child.stdout.read()",
        "subprocess.Popen([order])",
        "from pathlib import Path; text = Path(order).open().read()",
        "import requests; session = requests.Session(); session.get(order)",
        "import asyncio; loop = asyncio.new_event_loop(); loop.run_until_complete(order)",
        "from multiprocessing import Pool; pool = Pool(4); pool.map(len, order)",
        "from sqlalchemy import create_engine; engine = create_engine(order); engine.begin()",
    ],
)
def test_what_is_opened_and_never_closed(line: str) -> None:
    holds(f"@shared_task\ndef scan(order):\n    {line}  # -> celery-unclosed-resource\n")


@pytest.mark.parametrize(
    "text",
    [
        """
        handle = open(order)  # -> celery-unclosed-resource
        if not handle.read():
            return None
        handle.close()
        """,
        """
        handle = open(order)  # -> celery-unclosed-resource
        if order:
            handle.close()
        """,
        """
        handle = open(order)  # -> celery-unclosed-resource
        handle.write(order())
        handle.close()
        """,
        """
        connection = sqlite3.connect(order)  # -> celery-unclosed-resource
        try:
            connection.execute("select 1")
            connection.close()
        except ValueError:
            pass
        """,
    ],
)
def test_what_is_not_closed_on_every_path(text: str) -> None:
    holds("@shared_task\ndef scan(order):\n" + "".join(f"    {line}\n" for line in dedent(text).splitlines()))


@pytest.mark.parametrize(
    "text",
    [
        "with open(order) as handle: handle.read()",
        "with contextlib.closing(sqlite3.connect(order)) as connection, connection: ...",
        "stack = contextlib.ExitStack(); handle = stack.enter_context(open(order))",
        "handle = open(order)\ntry:\n    handle.read()\nfinally:\n    handle.close()",
        "handle = None\ntry:\n    handle = open(order)\nfinally:\n    if handle: handle.close()",
        "handle = open(order)\nwith handle: handle.read()",
        "handle = open(order)\nhandle.close()",
        "return open(order)",
        "handle = open(order)\nreturn handle",
        "self.handle = open(order)",
        "from django.core.files import File\nreturn save(File(open(order)))",
        "handle = open(order)\nupload(handle)",
        "handles = []\nhandle = open(order)\nhandles.append(handle)",
        "fd, path = tempfile.mkstemp()\nos.close(fd)",
        "fd, path = tempfile.mkstemp()\nwith os.fdopen(fd) as handle: ...",
        "out, _ = subprocess.Popen([order]).communicate()",
        "child = subprocess.Popen([order])\nreturn child.wait()",
        "with subprocess.Popen([order]) as child: ...",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor() as pool: ...",
        "import requests\nwith requests.Session() as session: ...",
        "try:\n    handle = open(order)\nexcept OSError:\n    return\ntry:\n    order()\nfinally:\n    handle.close()",
        "def cleanup(): handle.close()\nhandle = open(order)\nreturn cleanup",
        "match order:\n    case 1:\n        handle = open(order)\n        handle.close()",
    ],
)
def test_what_is_closed_or_handed_on(text: str) -> None:
    holds("@shared_task(bind=True)\ndef scan(self, order):\n" + "".join(f"    {line}\n" for line in text.splitlines()))


@pytest.mark.parametrize(
    "text",
    [
        """
        @shared_task
        def scan(order):
            with sqlite3.connect(order) as connection:  # -> celery-with-does-not-close
                connection.execute("select 1")
        """,
        """
        import psycopg2
        def rows(order):
            with psycopg2.connect(order):  # -> celery-with-does-not-close
                return 1
        @shared_task
        def scan(order):
            return rows(order)
        """,
        """
        import psycopg
        @shared_task
        def scan(order):
            with psycopg.connect(order) as connection: ...
            with sqlite3.connect(order) as other:
                other.execute("select 1")
                other.close()
        """,
    ],
)
def test_with_that_does_not_close(text: str) -> None:
    holds(text)


# ---- methods, exceptions, handlers, threads, loggers ----


@pytest.mark.parametrize(
    "text",
    [
        """
        class Venue:
            @functools.cache  # -> celery-cached-method
            def price(self, row): ...
        @shared_task
        def scan(order):
            Venue().price(order)
        """,
        """
        from functools import lru_cache
        class Venue:
            @lru_cache(maxsize=128)  # -> celery-cached-method
            def price_of(self, row): ...
        @shared_task
        def scan(venue):
            venue.price_of(3)
        """,
        """
        class Venue:
            @functools.cached_property
            def plan(self): ...
            @staticmethod
            @functools.lru_cache(maxsize=8)
            def row(number): ...
            @classmethod
            @functools.lru_cache(maxsize=8)
            def gate(cls, number): ...
            @functools.cache
            def never_asked(self, row): ...
        class One:
            @functools.cache
            def price(self, row): ...
        one = One()
        class Gate(enum.Enum):
            NORTH = 1
            @functools.cache
            def rows(self): ...
        @shared_task
        def scan(order):
            Venue().plan, Venue.row(order), Venue.gate(order), one.price(order), order.rows()
        """,
    ],
)
def test_a_cache_on_a_method(text: str) -> None:
    holds(text)


@pytest.mark.parametrize(
    "text",
    [
        """
        _errors = []
        @shared_task
        def scan(order):
            try:
                order()
            except ValueError as error:
                _errors.append((order, error))  # -> celery-kept-exception
        """,
        """
        _errors = {}
        @shared_task
        def scan(order):
            try:
                order()
            except ValueError:
                _errors[order] = sys.exc_info()  # -> celery-kept-exception
        """,
        """
        _reports, _last = collections.deque(maxlen=20), {}
        @shared_task
        def scan(order):
            try:
                order()
            except ValueError as error:
                _reports.append(traceback.format_exc())
                _last["error"] = str(error)
        """,
    ],
)
def test_exceptions_that_are_kept(text: str) -> None:
    holds(text)


@pytest.mark.parametrize(
    "text",
    [
        """
        @shared_task(bind=True)
        def scan(self, order):
            def on_success(**kwargs): print(order)
            signals.task_success.connect(on_success, sender=self, weak=False)  # -> celery-handler-in-task
        """,
        """
        import atexit
        @shared_task
        def scan(order):
            atexit.register(print, order)  # -> celery-handler-in-task
        """,
        """
        @shared_task
        def scan(order):
            logger = logging.getLogger(__name__)
            logger.addHandler(logging.FileHandler("scan.log"))  # -> celery-handler-in-task
        """,
        """
        from sqlalchemy import event
        @shared_task
        def scan(engine):
            event.listen(engine, "connect", lambda *_: None)  # -> celery-handler-in-task
        """,
        """
        import atexit
        from sqlalchemy import create_engine, event
        from django.db.models.signals import post_save
        def note(**kwargs): ...
        signals.task_success.connect(note, weak=False)
        logging.getLogger(__name__).addHandler(logging.NullHandler())
        @shared_task
        def scan(order):
            def local(**kwargs): ...
            signals.task_success.connect(note, weak=False)
            post_save.connect(local)
            post_save.connect(local, weak=False, dispatch_uid="scan")
            logger = logging.getLogger(__name__)
            if not logger.handlers:
                logger.addHandler(logging.FileHandler("scan.log"))
            engine = create_engine("sqlite://")
            event.listen(engine, "connect", lambda *_: None)
            engine.dispose()
        @shared_task
        def report(order):
            handler = logging.FileHandler("report.log")
            logging.getLogger(__name__).addHandler(handler)
            try:
                order()
            finally:
                logging.getLogger(__name__).removeHandler(handler)
        """,
    ],
)
def test_handlers_that_pile_up(text: str) -> None:
    holds(text)


def test_threads_loggers_and_large_globals() -> None:
    holds(
        """
        _prices = [seat * 0.01 for seat in range(1_000_000)]
        _few = [1, 2, 3]

        def beat():
            while True:
                time.sleep(1)

        def watch(order):
            thread = threading.Thread(target=beat, daemon=True)  # -> celery-thread-in-task
            thread.start()

        @shared_task
        def scan(order):
            watch(order)
            threading.Thread(target=order.serve_forever).start()  # -> celery-thread-in-task
            logging.getLogger(f"scan.{order}").info("read")  # -> celery-logger-per-call
            logging.getLogger("scan-%s" % order.id).info("read")  # -> celery-logger-per-call
            _prices[3] = order  # -> celery-global-changed-after-fork

        @shared_task
        def sort():
            _prices.sort()  # -> celery-global-changed-after-fork

        @shared_task
        def healthy(order, language):
            thread = threading.Thread(target=beat)
            thread.start()
            thread.join()
            threads = [threading.Thread(target=beat) for _ in range(3)]
            for one in threads:
                one.start()
            threading.Thread(target=beat)
            threading.Thread(target=print).start()
            threading.Timer(60, beat).start()
            ended = threading.Event()
            watch = threading.Thread(target=beat, args=(ended,))
            watch.start()
            ended.set()
            logging.getLogger(__name__), logging.getLogger(f"{__name__}.{language}")
            _few.sort()
            return sum(_prices)
        """
    )


# ---- settings ----

BACKEND = "CELERY_RESULT_BACKEND = os.environ['BACKEND']\nresult = AsyncResult\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("settings", "INSTALLED_APPS = []\nDEBUG = True  # -> celery-django-debug\n"),
        ("settings", "INSTALLED_APPS = []\nDEBUG = os.environ.get('DEBUG') == '1'\n"),
        ("settings.local", "INSTALLED_APPS = []\nDEBUG = True\n"),
        ("settings", "INSTALLED_APPS = []\nDEBUG = True\nfrom shop.local import *\n"),
        ("config", "DEBUG = True\n"),
        ("settings", f"{BACKEND}CELERY_RESULT_EXPIRES = None  # -> celery-results-never-expire\n"),
        # Nothing keeps results.
        ("settings", "CELERY_RESULT_EXPIRES = None\n"),
        ("settings", f"{BACKEND}CELERY_TASK_RESULT_EXPIRES = 0  # -> celery-results-never-expire\n"),
        ("settings", BACKEND + "CELERY = {'result_expires': None}  # -> celery-results-never-expire\n"),
        ("settings", f"{BACKEND}class Config:\n    result_expires = None  # -> celery-results-never-expire\n"),
        (
            "settings",
            "CELERY_RESULT_EXPIRES = None\nCELERY_RESULT_BACKEND = 'shop.backends.Rows'\nscan = AsyncResult\n",
        ),
        ("settings", f"{BACKEND}CELERY_RESULT_EXPIRES = 3600\nRESULTS_EXPIRE = None\nexpires = None\n"),
        ("settings", "CELERYD_PREFETCH_MULTIPLIER = 0  # -> celery-prefetch-too-high\n"),
        ("settings", "CELERY_WORKER_PREFETCH_MULTIPLIER = 128  # -> celery-prefetch-too-high\n"),
        ("settings", "CELERY_WORKER_PREFETCH_MULTIPLIER = 1\n"),
        ("settings", "CELERY_RESULT_BACKEND = 'redis://'  # -> celery-results-unread\n"),
        ("settings", "CELERY_RESULT_BACKEND = 'redis://'\nCELERY_TASK_IGNORE_RESULT = True\n"),
        ("settings", "CELERY_RESULT_BACKEND = 'redis://'\nfrom celery.result import AsyncResult\nAsyncResult('1')\n"),
        ("settings", "CELERY_RESULT_BACKEND = 'redis://'\ndef show():\n    return scan.delay(1).get()\n"),
        ("settings", "CELERY_RESULT_BACKEND = None\n"),
        ("app", "app = Celery('shop')  # -> celery-children-never-replaced\n"),
        ("app", "app = Celery('shop')\napp.conf.update(worker_max_tasks_per_child=100)\n"),
        ("app", "app = Celery('shop')\nARGV = ['worker', '--max-memory-per-child=200000']\n"),
        ("test_app", "app = Celery('shop')\nCELERY_RESULT_EXPIRES = None\n"),
    ],
)
def test_settings_that_leak(name: str, text: str) -> None:
    holds("@shared_task\ndef scan(order):\n    print(order)\n", **{name: text})


def test_settings_that_others_are_built_on() -> None:
    """What the last of them says is not known to be the base's."""
    base = "INSTALLED_APPS = []\nDEBUG = True\n"
    local = "from .base import *\nDEBUG = os.environ.get('DEBUG') == '1'\n"
    modules = {"shop.tasks": "@shared_task\ndef scan(): ...\n", "shop.base": base}
    assert {symbol for _, _, symbol in judged(modules)} == {catalogue.DEBUG}
    assert judged({**modules, "shop.production": local}) == set()


def test_settings_of_a_project_without_celery_are_not_judged() -> None:
    assert judged({"shop.settings": "INSTALLED_APPS = []\nDEBUG = True\nCELERY_RESULT_EXPIRES = None\n"}) == set()


# ---- the demo application, and odd sources ----


def test_the_demo_application_line_by_line() -> None:
    """Each leak of it that source shows, where a developer would look, and none of the mended ones."""
    app = ROOT / "tests" / "lab" / "app" / "boxoffice"
    found = {(one.file.name, one.function.rpartition(".")[2], one.symbol, one.object) for one in check([app])}
    assert found == {
        ("leaks.py", "module_cache", catalogue.CACHE, "_plans"),
        ("leaks.py", "send", catalogue.ATTRIBUTE, "_turnstile.sent"),
        ("leaks.py", "unclosed", catalogue.WITH, "sqlite3.connect(_database())"),
        ("leaks.py", "unclosed", catalogue.CACHE, "_connections"),
        ("leaks.py", "price", catalogue.METHOD, "Venue.price"),
        ("leaks.py", "kept_errors", catalogue.EXCEPTION, "_errors"),
        ("leaks.py", "kept_closures", catalogue.CONTAINER, "_later"),
        ("leaks.py", "handlers", catalogue.HANDLER, "handler on_success of signals.task_success.connect"),
        ("leaks.py", "fragmentation", catalogue.CONTAINER, "_last_rows"),
        ("tasks.py", "number", catalogue.CACHE, "_seen"),
        ("tasks.py", "scan_ticket", catalogue.CACHE, "_seen"),
        ("tasks.py", "", catalogue.CHILDREN, "boxoffice.tasks.app"),
    }
    lines = {one.object: (app / one.file.name).read_text().splitlines()[one.line - 1].strip() for one in check([app])}
    assert lines["_plans"].startswith("_plans[order] = ")
    assert lines["_turnstile.sent"] == "self.sent.append(scan)"
    assert lines["_errors"] == "_errors.append(error)"


NEWER = {
    "match": "match order:\n        case {'id': x, **rest} if x: _seen.append(rest)\n        case [a, *b]: pass",
    "walrus": "if (n := len(order)) > 3: _seen.append(n)",
    "only": "def inner(a, /, b, *, c): _seen.append(a)\n    inner(1, 2, c=3)",
    "star": "print(*order, **{}); [*order]; x, *y = order; _seen.append(y)",
}


@pytest.mark.parametrize("body", NEWER.values(), ids=NEWER)
def test_syntax_of_today(body: str) -> None:
    found = judged({"shop.tasks": f"_seen = []\n@shared_task\ndef scan(order):\n    {body}\n"})
    assert {symbol for _, _, symbol in found} == {catalogue.CONTAINER}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="PEP 695 and 701 need the parser of 3.12")
def test_syntax_of_3_12() -> None:
    holds(
        "type Order = int\n_seen = []\nclass Box[T]:\n    def put(self, item: T) -> None: ...\n"
        '@shared_task\ndef scan[T: int](order: T):\n    f"{order!r:>{"10"}}"\n'
        "    _seen.append(order)  # -> celery-unbounded-container\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "from . import *\nfrom .. import x\nfrom ..... import y\nimport a.b.c as d, e.f\n",
        "x = x\ny = z\nz = y\nclass A(A): ...\nclass B(C): ...\nclass C(B): ...\n",
        "@shared_task\ndef f(a=f):\n    a.b = a; f()\n",
        "def f():\n    def f():\n        return f()\n    return f()\n@f\n@f()\ndef g(): g()\n",
        "(lambda: (yield))()\n[x for x in [y for y in x]]\nx[1:2, ::3] = x[...] = 1\ndel x[0], x.y, x\n",
        "try:\n    pass\nexcept* ValueError as group:\n    raise\n",
        "class M(type):\n    def __new__(cls, *a): return super().__new__(cls, *a)\nclass T(metaclass=M): x = M\n",
        "@shared_task\ndef f():\n" + "".join(f"{' ' * (n + 1)}if f:\n" for n in range(60)) + " " * 62 + "f()\n",
        "x = " + "+".join(["1"] * 150) + "\n",
        "from celery import Task\nclass Run(Task):\n    run = lambda self: open('x')\n    [open(n) for n in ()]\n",
        "@functools.lru_cache\ndef f(): ...\n@functools.lru_cache(None)\ndef g(self, *, a): ...\nfunctools.cache(f)\n",
        "import collections\nd = collections.deque([], *[3])\nd2 = collections.deque(maxlen=f())\n",
        "open\nwith open(1), open(2) as (a, b): ...\nasync def f():\n    async with open(3) as x: await x\n",
        "@shared_task\ndef f():\n    global unknown\n    unknown = open(1)\n    sent = yield open(2)\n    del sent\n",
    ],
)
def test_odd_sources_are_read(text: str) -> None:
    """Nothing is said of most of these; nothing is raised."""
    if "except*" in text and sys.version_info < (3, 11):
        pytest.skip("except* needs the parser of 3.11")
    judged({"shop.tasks": text})


def test_a_module_that_cannot_be_read_is_named_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leak = "from celery import shared_task\nSEEN = []\n@shared_task\ndef keep(order):\n    SEEN.append(order)\n"
    for name in ("odd", "tasks"):
        (tmp_path / f"{name}.py").write_text(leak)
    read = facts.read

    def fails(node: Any) -> Any:
        if node.name.endswith("odd"):
            raise AttributeError("no such child")
        return read(node)

    monkeypatch.setattr(facts, "read", fails)
    assert {one.file.name for one in check([tmp_path])} == {"tasks.py"}
    assert f"{tmp_path / 'odd.py'} is not checked: AttributeError: no such child" in capsys.readouterr().err


# ---- the catalogue, and the plugin in pylint ----


def test_the_catalogue_is_in_order_and_in_the_docs() -> None:
    ids = [one.id for one in catalogue.CHECKS]
    assert ids == [f"W89{number:02}" for number in range(1, len(ids) + 1)]
    assert len(catalogue.BY_SYMBOL) == len(ids)
    sections = {anchor(line) for line in (ROOT / "docs" / "leaks.md").read_text().splitlines() if line.startswith("#")}
    told = {anchor(line) for line in (ROOT / "docs" / "checks.md").read_text().splitlines() if line.startswith("#")}
    for one in catalogue.CHECKS:
        assert one.section in sections
        assert one.symbol in told
        assert one.message.count("%(object)s")


def anchor(heading: str) -> str:
    return re.sub(r"[^\w-]", "", heading.lstrip("# ").lower().replace(" ", "-"))


def test_the_catalogue_needs_no_pylint() -> None:
    code = (
        "import sys; sys.modules['pylint'] = sys.modules['astroid'] = None\n"
        "from plimsoll.lint import catalogue, run\nfrom pathlib import Path\nfrom plimsoll.lines import InputError\n"
        "assert catalogue.CHECKS\n"
        "try: run.check([Path('.')])\nexcept InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "module_utils")
    assert "pip install 'plimsoll[lint]'" in done.stdout, done.stderr


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no such file"):
        check([Path("/nowhere/app")])


TASKS = """import celery
_seen = []
_plans = {}


@celery.shared_task
def scan(order):
    _seen.append(order)
    _plans[order] = order
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "tasks.py").write_text(TASKS)
    (tmp_path / "shop" / ".hidden").mkdir()
    (tmp_path / "shop" / ".hidden" / "tasks.py").write_text(TASKS)
    return tmp_path


def pylint(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pylint", "--load-plugins=plimsoll.lint", "--disable=all", "--enable=celery-leaks"]
    environment = {"PYTHONPATH": str(ROOT / "module_utils"), "PATH": "/usr/bin:/bin", "HOME": str(project)}
    return subprocess.run([*command, *options, "shop"], capture_output=True, text=True, cwd=project, env=environment)


@pytest.mark.parametrize("jobs", [1, 2])
def test_pylint_runs_these_alone(project: Path, jobs: int) -> None:
    done = pylint(project, f"--jobs={jobs}", "--score=n")
    assert re.findall(r"^(\S+?):(\d+):.*\((\S+)\)$", done.stdout, re.MULTILINE) == [
        ("shop/tasks.py", "8", "celery-unbounded-container"),
        ("shop/tasks.py", "9", "celery-unbounded-cache"),
    ]
    # 4: a warning was issued.
    assert done.returncode == 4


def test_a_file_that_does_not_parse_is_told_and_the_others_are_checked(project: Path) -> None:
    (project / "shop" / "broken.py").write_text("def (:\n")
    assert "broken.py:1:5: E0001" in pylint(project).stdout
    assert len(check([project / "shop"])) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(
            "_seen.append(order)", "_seen.append(order)  # pylint: disable=celery-unbounded-container"
        ),
        lambda text: text.replace("    _seen.app", "    # pylint: disable-next=W8901\n    _seen.app"),
        lambda text: text.replace("    _seen.app", "    # pylint: disable=celery-unbounded-container\n    _seen.app"),
        lambda text: "# pylint: disable=celery-unbounded-container\n" + text,
    ],
)
def test_a_comment_switches_one_off(project: Path, change: Callable[[str], str]) -> None:
    (project / "shop" / "tasks.py").write_text(change(TASKS))
    # Another module last, whose comments are not those of the first.
    (project / "shop" / "zoo.py").write_text("\n" * 20)
    assert [one.symbol for one in check([project / "shop"])] == [catalogue.CACHE]


def test_check_tells_what_a_report_needs(project: Path) -> None:
    found = check([project / "shop"])
    assert [(one.file, one.line, one.end_line, one.symbol, one.object) for one in found] == [
        (project / "shop" / "tasks.py", 8, 8, catalogue.CONTAINER, "_seen"),
        (project / "shop" / "tasks.py", 9, 9, catalogue.CACHE, "_plans"),
    ]
    assert {(one.function, one.task) for one in found} == {("shop.tasks.scan", "shop.tasks.scan")}
    assert all("task shop.tasks.scan" in one.message for one in found)


# ---- reporters ----


def output(project: Path, reporter: str) -> Any:
    done = pylint(project, f"--output-format=plimsoll.lint.reporters.{reporter}")
    return json.loads(done.stdout)


def test_sarif_has_what_the_standard_requires(project: Path) -> None:
    log = output(project, "SarifReporter")
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "plimsoll"
    rules_ = driver["rules"]
    assert len({rule["id"] for rule in rules_}) == len(rules_) == 2
    for result in run["results"]:
        assert rules_[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"] == "shop/tasks.py"
        assert place["region"] == {
            "startLine": place["region"]["startLine"],
            "startColumn": 5,
            "endLine": place["region"]["endLine"],
        }
        assert re.fullmatch("[0-9a-f]{64}", result["partialFingerprints"]["plimsoll/v1"])
    assert [one["locations"][0]["physicalLocation"]["region"]["startLine"] for one in run["results"]] == [8, 9]


def test_code_quality_has_what_gitlab_requires(project: Path) -> None:
    issues = output(project, "CodeQualityReporter")
    assert [(one["check_name"], one["location"]["path"], one["location"]["lines"]["begin"]) for one in issues] == [
        ("celery-unbounded-container", "shop/tasks.py", 8),
        ("celery-unbounded-cache", "shop/tasks.py", 9),
    ]
    for one in issues:
        assert one["description"]
        assert one["severity"] in ("info", "minor", "major", "critical", "blocker")


@pytest.mark.parametrize("reporter", ["SarifReporter", "CodeQualityReporter"])
def test_fingerprints_stay_as_lines_are_added_above(project: Path, reporter: str) -> None:
    def prints() -> list[str]:
        log = output(project, reporter)
        if reporter == "CodeQualityReporter":
            return [one["fingerprint"] for one in log]
        return [one["partialFingerprints"]["plimsoll/v1"] for one in log["runs"][0]["results"]]

    before = prints()
    assert len(set(before)) == 2
    (project / "shop" / "tasks.py").write_text("# more\n\n" + TASKS)
    assert prints() == before
    (project / "shop" / "tasks.py").write_text(TASKS.replace("_seen", "_orders"))
    assert prints()[0] != before[0]


def test_nothing_found_is_a_report_too(project: Path) -> None:
    (project / "shop" / "tasks.py").write_text("")
    assert output(project, "CodeQualityReporter") == []
    assert output(project, "SarifReporter")["runs"][0]["results"] == []


def test_the_hook_of_pre_commit_runs_what_the_docs_say() -> None:
    import yaml

    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["id"] == "plimsoll-lint"
    assert "--enable=celery-leaks" in hook["entry"]
    assert hook["require_serial"]
    module = re.search(r"--load-plugins=(\S+)", hook["entry"])
    assert module
    assert importlib.import_module(module[1]).register
