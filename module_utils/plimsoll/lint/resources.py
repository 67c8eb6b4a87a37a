"""What has to be closed, and how: tables of names in the standard library and in what Celery applications use."""

from __future__ import annotations

from typing import NamedTuple


class Resource(NamedTuple):
    """closers: methods that end it. descriptor: a bare number, which no collector ever closes."""

    closers: frozenset[str]
    descriptor: bool = False


_CLOSE = frozenset({"close", "aclose", "detach"})
_FILE = Resource(_CLOSE)
_SESSION = Resource(_CLOSE | {"aclose"})
_CONNECTION = Resource(_CLOSE | {"quit", "disconnect", "logout", "release", "unbind", "unbind_s", "shutdown"})
_PROCESS = Resource(frozenset({"wait", "communicate", "poll"}))
_EXECUTOR = Resource(frozenset({"shutdown"}))
_POOL = Resource(frozenset({"close", "terminate", "join", "dispose", "disconnect"}))
_DESCRIPTOR = Resource(frozenset(), descriptor=True)

# By the name that resolves to them; os.fdopen and open() of a descriptor take it over.
OPENERS: dict[str, Resource] = {
    **dict.fromkeys(
        (
            "builtins.open",
            "io.open",
            "codecs.open",
            "os.fdopen",
            "pathlib.Path().open",
            "gzip.open",
            "gzip.GzipFile",
            "bz2.open",
            "lzma.open",
            "zipfile.ZipFile",
            "tarfile.open",
            "tarfile.TarFile",
            "tempfile.NamedTemporaryFile",
            "tempfile.TemporaryFile",
            "tempfile.SpooledTemporaryFile",
            "shelve.open",
            "dbm.open",
            "urllib.request.urlopen",
        ),
        _FILE,
    ),
    **dict.fromkeys(
        (
            "requests.Session",
            "requests.session",
            "requests.sessions.Session",
            "httpx.Client",
            "httpx.AsyncClient",
            "aiohttp.ClientSession",
            "asyncio.new_event_loop",
        ),
        _SESSION,
    ),
    **dict.fromkeys(
        (
            "socket.socket",
            "socket.create_connection",
            "sqlite3.connect",
            "psycopg2.connect",
            "psycopg.connect",
            "pyodbc.connect",
            "pymysql.connect",
            "MySQLdb.connect",
            "mysql.connector.connect",
            "cx_Oracle.connect",
            "oracledb.connect",
            "smtplib.SMTP",
            "smtplib.SMTP_SSL",
            "imaplib.IMAP4",
            "imaplib.IMAP4_SSL",
            "poplib.POP3",
            "poplib.POP3_SSL",
            "ftplib.FTP",
            "ftplib.FTP_TLS",
            "http.client.HTTPConnection",
            "http.client.HTTPSConnection",
            "ldap.initialize",
            "ldap3.Connection",
            "paramiko.SSHClient",
            "paramiko.Transport",
            "pymongo.MongoClient",
            "pika.BlockingConnection",
            "kombu.Connection",
        ),
        _CONNECTION,
    ),
    "subprocess.Popen": _PROCESS,
    **dict.fromkeys(
        ("concurrent.futures.ThreadPoolExecutor", "concurrent.futures.ProcessPoolExecutor"),
        _EXECUTOR,
    ),
    **dict.fromkeys(
        (
            "multiprocessing.Pool",
            "multiprocessing.pool.Pool",
            "multiprocessing.pool.ThreadPool",
            "sqlalchemy.create_engine",
        ),
        _POOL,
    ),
    **dict.fromkeys(("os.open", "tempfile.mkstemp"), _DESCRIPTOR),
}
# A timer ends by itself.
THREADS = {"threading.Thread": Resource(frozenset({"join"}))}
# Of these `with` is a transaction.
WITH_IS_A_TRANSACTION = frozenset({"sqlite3.connect", "psycopg2.connect", "pyodbc.connect"})
# Take a resource to close it when they are done.
CLOSING = frozenset({"contextlib.closing", "contextlib.aclosing", "os.close", "os.fdopen", "builtins.open", "io.open"})
CLOSING_METHODS = frozenset({"enter_context", "enter_async_context", "push", "push_async_exit", "callback"})
# Use a resource, and neither keep nor close it.
BORROWERS = frozenset(
    {
        "json.load",
        "json.dump",
        "yaml.load",
        "yaml.safe_load",
        "yaml.dump",
        "yaml.safe_dump",
        "pickle.load",
        "pickle.dump",
        "csv.reader",
        "csv.writer",
        "csv.DictReader",
        "csv.DictWriter",
        "tomllib.load",
        "toml.load",
        "plistlib.load",
        "shutil.copyfileobj",
        "select.select",
        "builtins.print",
        "builtins.len",
        "builtins.list",
        "builtins.isinstance",
        "builtins.iter",
        "builtins.next",
        "builtins.enumerate",
        "builtins.bool",
        "builtins.str",
        "builtins.repr",
        "os.fstat",
        "os.fsync",
        "os.write",
        "os.read",
        "os.fchmod",
    }
)
