"""The checks, as data: importable without pylint. A symbol stands for one mend, and neither it nor its id ever changes.

docs/checks.md has each with an example and what it does not see.
"""

from __future__ import annotations

from typing import NamedTuple

from ..diagnose import Kind

# pylint's name for all of them together: `--disable=all --enable=celery-leaks` runs these alone. The two digits after
# the letter of an id are a checker's own; pylint keeps 00 to 50, and no plugin that we know of uses 89.
CHECKER = "celery-leaks"
HELP = "docs/checks.md"

CONTAINER = "celery-unbounded-container"
CACHE = "celery-unbounded-cache"
ATTRIBUTE = "celery-growing-attribute"
UNCLOSED = "celery-unclosed-resource"
WITH = "celery-with-does-not-close"
METHOD = "celery-cached-method"
EXCEPTION = "celery-kept-exception"
HANDLER = "celery-handler-in-task"
THREAD = "celery-thread-in-task"
LOGGER = "celery-logger-per-call"
FORK = "celery-global-changed-after-fork"
EXPIRY = "celery-results-never-expire"
UNREAD = "celery-results-unread"
DEBUG = "celery-django-debug"
PREFETCH = "celery-prefetch-too-high"
CHILDREN = "celery-children-never-replaced"


class Check(NamedTuple):
    """message names %(object)s and %(where)s, the task or how a task comes there, or the setting's value.

    section: the anchor of docs/leaks.md with the pattern in full; kind: what a tracing window would call it.
    """

    id: str
    symbol: str
    message: str
    about: str
    section: str
    kind: Kind


CHECKS = (
    Check(
        "W8901",
        CONTAINER,
        "%(object)s only ever grows: %(where)s adds to it, and nothing takes out; keep the last ones in"
        " collections.deque(maxlen=N), or pass on what is needed and keep nothing",
        "A list, set or deque that lives as long as the process is added to by tasks and never emptied.",
        "an-object-that-collects",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8902",
        CACHE,
        "%(object)s is a cache without a bound: %(where)s adds a key for each new value; give it one, by"
        " functools.lru_cache(maxsize=N) or cachetools.TTLCache, or key it by what comes again",
        "A dict of the module, or a cache of functools without maxsize, is keyed by what each task brings.",
        "a-cache-without-a-bound",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8903",
        ATTRIBUTE,
        "%(object)s only ever grows: %(where)s adds to it, and its object lives as long as the process; bound it by"
        " collections.deque(maxlen=N), or empty it when the task is done",
        "An instance of the module, or of a task's class, has an attribute that methods add to and none empties.",
        "an-object-that-collects",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8904",
        UNCLOSED,
        "%(object)s is not closed%(how)s in %(where)s; open it by `with`, or contextlib.closing() where it has none",
        "A file, socket, connection, session, pool or subprocess is opened in a task and not closed on every path.",
        "file-descriptors",
        Kind.FILE_DESCRIPTORS,
    ),
    Check(
        "W8905",
        WITH,
        "`with %(object)s` ends a transaction and does not close in %(where)s; wrap it:"
        " `with contextlib.closing(%(object)s) as connection, connection:`",
        "`with` of a connection of sqlite3, psycopg2 or pyodbc commits or rolls back, and leaves it open.",
        "file-descriptors",
        Kind.FILE_DESCRIPTORS,
    ),
    Check(
        "W8906",
        METHOD,
        "the cache of %(object)s has self in its key and keeps each object that was asked: %(where)s; cache a function"
        " of the module by plain values, or use functools.cached_property",
        "functools.cache or lru_cache on a method.",
        "a-cache-on-a-method",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8907",
        EXCEPTION,
        "%(object)s keeps exceptions, and with their tracebacks all locals of all frames: %(where)s adds to it; keep"
        " traceback.format_exc() in collections.deque(maxlen=N)",
        "An exception or a traceback is put where it stays as long as the process.",
        "exceptions-that-are-kept",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8908",
        HANDLER,
        "each run of %(where)s registers one more %(object)s, which stays; register it once, at import, or take it"
        " back in a finally",
        "A signal handler, a handler of logging, or an exit function is registered inside a task.",
        "handlers-that-pile-up",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8909",
        THREAD,
        "%(object)s is started in %(where)s, loops for ever, and nothing ends it; let it ask a threading.Event, and"
        " join() it before the task ends, or start one for the process",
        "A thread that never ends is started in a task.",
        "python-objects",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8910",
        LOGGER,
        "logging keeps each logger for ever, and %(where)s makes one for each %(object)s; log to"
        " logging.getLogger(__name__) and put the value into the message or into extra=",
        "A logger is named by what a task brings.",
        "a-cache-without-a-bound",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8911",
        FORK,
        "%(object)s is large, made before the fork, and changed by %(where)s: each child gets a copy of its pages;"
        " load it in the child (worker_process_init), or use array, numpy or mmap",
        "A large object of the module is changed in a task, which copies in each child what they shared.",
        "copy-on-write",
        Kind.COPY_ON_WRITE,
    ),
    Check(
        "W8912",
        EXPIRY,
        "%(object)s = %(value)s: results of tasks are kept for ever; set so many seconds, such as 3600",
        "result_expires is None or 0.",
        "python-objects",
        Kind.UNKNOWN,
    ),
    Check(
        "W8913",
        UNREAD,
        "%(object)s is set and nothing here reads a result, of %(value)s and others: set task_ignore_result = True,"
        " or ignore_result=True on each task",
        "There is a result backend, and no code that reads results.",
        "python-objects",
        Kind.UNKNOWN,
    ),
    Check(
        "W8914",
        DEBUG,
        "%(object)s = %(value)s: Django keeps the last 9,000 queries in connection.queries; read it from the"
        " environment, False by default",
        "DEBUG is on in the settings of a Django project with Celery.",
        "an-object-that-collects",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8915",
        PREFETCH,
        "%(object)s = %(value)s: a worker holds so many messages a process in memory, 0 being all there are; set 1 to 4"
        " for tasks of a second and more",
        "worker_prefetch_multiplier is 0, or above 64.",
        "python-objects",
        Kind.PYTHON_OBJECTS,
    ),
    Check(
        "W8916",
        CHILDREN,
        "nothing here ends the worker children of %(object)s: what leaks stays until the worker is restarted; set"
        " worker_max_memory_per_child (KiB), or worker_max_tasks_per_child",
        "Neither worker_max_tasks_per_child nor worker_max_memory_per_child is set.",
        "python-objects",
        Kind.UNKNOWN,
    ),
)
BY_SYMBOL = {check.symbol: check for check in CHECKS}
