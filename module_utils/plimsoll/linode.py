"""The Linode API v4 as plimsoll talks to it: linode_api4 below, with time limits and without blind repeats.

linode_api4 sends requests without any time limit, and repeats a POST whose answer was lost, which may make a thing
twice. Both are replaced here, by a transport of our own in its session.
"""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from . import __version__

try:
    import linode_api4  # type: ignore[import-untyped]
    import requests
    from requests.adapters import HTTPAdapter

    MISSING = ""
except ImportError as error:
    MISSING = (
        f"{error.name} is not installed for {sys.executable}; run scripts/setup, or pip install 'linode_api4>=5.48'"
    )

DEFAULT_URL = "https://api.linode.com"
DEFAULT_VERSION = "v4"
TOKENS_AT = "https://cloud.linode.com/profile/tokens"
CONNECT_TIMEOUT_S = 10.0
# The API's largest page: one request lists a whole fleet.
PAGE_SIZE = 500
# Tries of a request that may be repeated: after silence (each costs a whole time limit), and after a gateway's error.
TRIES_AFTER_SILENCE = 2
TRIES_AFTER_FAILURE = 4
FAILURES = {500, 502, 504}
# Answers that say: not done, come again.
COME_AGAIN = {408, 429, 503}
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 15.0
# What the API takes of a token, by its documentation ("Rate limits"): requests in seconds, by the kind of request.
LIMITS = {"create": (20, 15.0), "list": (200, 60.0), "other": (1600, 60.0)}


class LinodeError(Exception):
    """The API cannot do what was asked; the message is one line for the user."""


class Refused(LinodeError):
    """The API answered with an error. errors are its own pairs of field (may be empty) and reason."""

    def __init__(self, message: str, status: int, errors: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.status = status
        self.errors = errors

    def names(self, field: str, word: str) -> bool:
        """Whether an error concerns this field and says this word."""
        return any(at == field and word in reason.lower() for at, reason in self.errors)


class NoAnswer(LinodeError):
    """No usable answer: whether the request took effect is not known."""


class Deadline:
    """An end that all waiting shares. now and pause are seconds, on any monotonic clock."""

    def __init__(
        self, seconds: float, now: Callable[[], float] = time.monotonic, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self.seconds = seconds
        self.now = now
        self._pause = pause
        self._end = now() + seconds

    def remaining(self) -> float:
        return self._end - self.now()

    def sleep(self, seconds: float) -> None:
        self._pause(max(0.0, min(seconds, self.remaining())))


class Budget:
    """A rate limit, kept on this side, so that a run of ours is not turned away: so many requests in a sliding window.

    It begins full. Others may use the same token: where the API says that nothing is left, that counts. Safe to use
    from several threads.
    """

    def __init__(self, size: int, window: float, now: Callable[[], float]) -> None:
        self._size, self._window, self._now = size, window, now
        self._taken: deque[float] = deque()
        self._not_before = 0.0
        self._lock = threading.Lock()

    def take(self) -> float:
        """0 with one request taken, or else the seconds until there may be one."""
        with self._lock:
            now = self._now()
            while self._taken and now - self._taken[0] >= self._window:
                self._taken.popleft()
            wait = self._not_before - now
            if len(self._taken) >= self._size:
                wait = max(wait, self._taken[0] + self._window - now)
            if wait > 0:
                return wait
            self._taken.append(now)
            return 0.0

    def told(self, remaining: str | None, reset: str | None) -> None:
        """Heed X-RateLimit-Remaining and X-RateLimit-Reset (Unix seconds) of an answer."""
        if (remaining or "").strip() == "0" and (reset or "").strip().isdigit():
            wait = min(max(0.0, float(reset or 0) - time.time()), self._window)
            with self._lock:
                self._not_before = self._now() + wait


class Api:
    """The API at url/version. Safe to use from several threads. Every call raises LinodeError or a kind of it."""

    def __init__(self, token: str, url: str, version: str, deadline: Deadline, request_timeout: float = 30.0) -> None:
        if MISSING:
            raise LinodeError(MISSING)
        token = token.strip()
        if not token:
            raise LinodeError(
                f"no API token: set LINODE_API_TOKEN; make one with read/write access to Linodes at {TOKENS_AT}"
            )
        # requests would quote a malformed header, token and all, in its error.
        if not re.fullmatch(r"[!-~]+", token):
            raise LinodeError("LINODE_API_TOKEN holds a blank, a line break or another character that no token has")
        if not re.match(r"https?://[^/]", url):
            raise LinodeError(f"LINODE_API_URL: {url!r} is no http or https URL")
        # Other tools want the version in it.
        self.url = url.rstrip("/").removesuffix(f"/{version}")
        self.base = f"{self.url}/{version}"
        self._token = token
        self._deadline = deadline
        self._timeout = request_timeout
        # A little longer than the API counts: a request arrives later than it is sent, and not always by as much.
        self._budgets = {kind: Budget(size, window + 0.5, deadline.now) for kind, (size, window) in LIMITS.items()}
        self._threads = threading.local()

    def get(self, path: str, filters: Mapping[str, Any] | None = None) -> Any:
        return self._request("GET", path, filters=filters)

    def list(self, path: str, filters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Every object of a paged list, in one request for each 500."""
        objects: list[dict[str, Any]] = []
        page = pages = 1
        while page <= pages:
            answer = self._request("GET", f"{path}?page={page}&page_size={PAGE_SIZE}", filters=filters)
            if not isinstance(answer, dict) or not {"data", "pages"} <= set(answer):
                raise LinodeError(f"what answers at {self.base}{path} is no Linode API; is LINODE_API_URL right?")
            objects += answer["data"]
            page, pages = page + 1, answer["pages"]
        return objects

    def put(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("PUT", path, body)

    def delete(self, path: str) -> Any:
        return self._request("DELETE", path)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Sent once; again only where the API says that it did nothing. A lost answer raises NoAnswer at once."""
        return self._request("POST", path, body)

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> Any:
        repeatable = method != "POST"
        silences = failures = 0
        pause = FIRST_PAUSE_S
        while True:
            wanted = None
            try:
                return self._once(method, path, body, filters)
            except linode_api4.ApiError as error:
                refused = self._refused(method, path, error)
                if error.status in FAILURES:
                    failures += 1
                    if not repeatable or failures == TRIES_AFTER_FAILURE:
                        raise NoAnswer(str(refused)) from None
                elif error.status in COME_AGAIN or refused.names("", "linode busy"):
                    headers = error.response.headers if error.response is not None else {}
                    if "X-Maintenance-Mode" in headers:
                        raise LinodeError(f"the Linode API at {self.url} is in maintenance; try again later") from None
                    wanted = _seconds(headers.get("Retry-After"))
                else:
                    raise refused from None
                if (wanted or pause) >= self._deadline.remaining():
                    asks = f"; it asks to wait {wanted:g} s, longer than is left" if wanted else ""
                    raise Refused(f"{refused}{asks}", error.status, refused.errors) from None
            except requests.exceptions.JSONDecodeError:
                raise NoAnswer(f"what answers at {self.base}{path} sends no JSON; is LINODE_API_URL right?") from None
            except requests.RequestException as error:
                silences += 1
                if not repeatable or silences == TRIES_AFTER_SILENCE or self._deadline.remaining() <= pause:
                    raise NoAnswer(self._silence(method, path, error)) from None
            # Threads that were turned away together are not to come back together.
            self._deadline.sleep((wanted or pause) + _jitter(0.5))
            pause = min(pause * 2, MOST_PAUSE_S)

    def _once(self, method: str, path: str, body: Any, filters: Any) -> Any:
        client = getattr(self._threads, "client", None)
        if client is None:
            client = self._threads.client = self._connect()
        budget = self._budgets[_kind(method, path)]
        while wait := budget.take():
            if wait >= self._deadline.remaining():
                raise LinodeError(
                    f"the Linode API at {self.url} takes {method} {path.split('?')[0]} again in {wait:.0f} s, by its"
                    " rate limit: longer than is left"
                )
            self._deadline.sleep(wait + _jitter(0.2))
        self._threads.budget = budget
        self._threads.limit = max(0.1, min(self._timeout, self._deadline.remaining()))
        if method in ("GET", "DELETE"):
            return getattr(client, method.lower())(path, filters=filters)
        return getattr(client, method.lower())(path, data=body)

    def _connect(self) -> Any:
        client = linode_api4.LinodeClient(
            self._token, base_url=self.base, user_agent=f"plimsoll/{__version__}", retry=False
        )
        transport = _transport(self._threads)
        client.session.mount("https://", transport)
        client.session.mount("http://", transport)
        # An authentication of its own that adds nothing, or requests would take one out of ~/.netrc over our token.
        client.session.auth = lambda request: request
        return client

    def _refused(self, method: str, path: str, error: Any) -> Refused:
        listed = error.json.get("errors") or [] if isinstance(error.json, dict) else []
        errors = [(one.get("field") or "", one.get("reason") or "") for one in listed if isinstance(one, dict)]
        said = "; ".join(f"{field}: {reason}" if field else reason for field, reason in errors)
        where = f"{method} {path.split('?')[0]}"
        message = f"the Linode API at {self.url} answers {error.status} to {where}: {said or 'no reason given'}"
        if error.status == 401:
            message = (
                f"the Linode API at {self.url} does not accept the token (401 {said}): set LINODE_API_TOKEN to one that"
                f" is valid; make one with read/write access to Linodes at {TOKENS_AT}"
            )
        elif error.status == 403:
            message += f"; the token in LINODE_API_TOKEN needs access to that: Linodes, Firewalls or VPCs ({TOKENS_AT})"
        return Refused(message, error.status, errors)

    def _silence(self, method: str, path: str, error: Exception) -> str:
        path = path.split("?")[0]
        if isinstance(error, requests.Timeout):
            return (
                f"the Linode API at {self.url} did not answer {method} {path} within {self._threads.limit:.3g} s"
                " (request_timeout); is LINODE_API_URL right, and the network up?"
            )
        # The innermost cause; what is around it names pools and retries.
        why = str(error).rsplit(": ", 1)[-1].strip("')\"")
        return f"the Linode API at {self.url} cannot be reached for {method} {path}: {why}"


def _transport(current: Any) -> Any:
    class Timed(HTTPAdapter):
        """Gives every request the time limit in current, repeats none, and tells the budget in current what is left."""

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = (min(CONNECT_TIMEOUT_S, current.limit), current.limit)
            answer = super().send(request, *args, **kwargs)
            current.budget.told(answer.headers.get("X-RateLimit-Remaining"), answer.headers.get("X-RateLimit-Reset"))
            return answer

    return Timed(max_retries=0)


def _jitter(most: float) -> float:
    """Seconds from 0 to most, by the system's generator: threads and processes share no seed."""
    return random.SystemRandom().uniform(0, most)


def _kind(method: str, path: str) -> str:
    """The rate limit that counts a request; see LIMITS."""
    if method == "POST" and path == "/linode/instances":
        return "create"
    return "list" if "page_size=" in path else "other"


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; Linode does not send dates."""
    return float(header) if header and header.strip().isdigit() else None


def options(env_fallback: Any) -> dict[str, dict[str, Any]]:
    """The options of every module that asks the API; env_fallback is Ansible's, which is not imported here."""
    return {
        "request_timeout": {"type": "int", "default": 30},
        "api_token": {"type": "str", "no_log": True, "fallback": (env_fallback, ["LINODE_API_TOKEN"])},
        "api_url": {"type": "str", "default": DEFAULT_URL, "fallback": (env_fallback, ["LINODE_API_URL"])},
        "api_version": {"type": "str", "default": DEFAULT_VERSION, "fallback": (env_fallback, ["LINODE_API_VERSION"])},
    }


def connect(given: Mapping[str, Any], deadline: Deadline) -> Api:
    """The API by those options. An empty variable of the environment is one that is not set. Raises LinodeError."""
    url, version = given["api_url"] or DEFAULT_URL, given["api_version"] or DEFAULT_VERSION
    return Api(given["api_token"] or "", url, version, deadline, given["request_timeout"])


CATALOGUES = {
    "type": ("/linode/types", "linode-cli linodes types"),
    "region": ("/regions", "linode-cli regions list"),
    "image": ("/images", "linode-cli images list"),
}


class Catalogue:
    """What is sold: lists that are asked for when they are first needed, once."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._lists: dict[str, dict[str, dict[str, Any]]] = {}

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """Id to object of one of CATALOGUES. Raises LinodeError."""
        if kind not in self._lists:
            self._lists[kind] = {one["id"]: one for one in self._api.list(CATALOGUES[kind][0])}
        return self._lists[kind]

    def unknown(self, kind: str, identifier: str) -> str:
        """A sentence where the API does not offer it, or it cannot take our data; else "".

        Asked before anything is created, so that a slip leaves nothing half done, and check mode sees it too.
        """
        path, command = CATALOGUES[kind]
        offered = self.of(kind)
        if identifier not in offered:
            near = get_close_matches(identifier, offered, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            where = f"`{command}` lists them, as does GET {self._api.base}{path}"
            return f"{kind}: {identifier!r} is not offered{hint}; {where}"
        if kind == "image" and "cloud-init" not in (offered[identifier].get("capabilities") or []):
            return f"image: {identifier!r} lacks cloud-init, which sets the pinned SSH host key; take another"
        return ""
