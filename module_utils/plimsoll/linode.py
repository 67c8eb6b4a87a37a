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
            self._deadline.sleep((wanted or pause) + random.uniform(0, 0.5))  # noqa: S311 - jitter, not a secret
            pause = min(pause * 2, MOST_PAUSE_S)

    def _once(self, method: str, path: str, body: Any, filters: Any) -> Any:
        client = getattr(self._threads, "client", None)
        if client is None:
            client = self._threads.client = self._connect()
        self._threads.limit = max(0.1, min(self._timeout, self._deadline.remaining()))
        if method in ("GET", "DELETE"):
            return getattr(client, method.lower())(path, filters=filters)
        return getattr(client, method.lower())(path, data=body)

    def _connect(self) -> Any:
        client = linode_api4.LinodeClient(
            self._token, base_url=self.base, user_agent=f"plimsoll/{__version__}", retry=False
        )
        transport = _transport(lambda: self._threads.limit)
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
            message += f"; the token in LINODE_API_TOKEN needs read/write access to Linodes ({TOKENS_AT})"
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


def _transport(limit: Callable[[], float]) -> Any:
    class Timed(HTTPAdapter):
        """Gives every request a time limit, and repeats none."""

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = (min(CONNECT_TIMEOUT_S, limit()), limit())
            return super().send(request, *args, **kwargs)

    return Timed(max_retries=0)


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; Linode does not send dates."""
    return float(header) if header and header.strip().isdigit() else None


CATALOGUES = {
    "type": ("/linode/types", "linode-cli linodes types"),
    "region": ("/regions", "linode-cli regions list"),
    "image": ("/images", "linode-cli images list"),
}


def unknown(api: Api, wanted: Mapping[str, str]) -> list[str]:
    """One sentence for each type, region or image of wanted that the API does not offer, or that cannot take our data.

    Asked before anything is created, so that a slip leaves nothing half done, and check mode sees it too.
    """
    problems = []
    for kind, identifier in wanted.items():
        path, command = CATALOGUES[kind]
        offered = {one["id"]: one for one in api.list(path)}
        if identifier not in offered:
            near = get_close_matches(identifier, offered, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            where = f"`{command}` lists them, as does GET {api.base}{path}"
            problems.append(f"{kind}: {identifier!r} is not offered{hint}; {where}")
        elif kind == "image" and "cloud-init" not in (offered[identifier].get("capabilities") or []):
            problems.append(f"image: {identifier!r} lacks cloud-init, which sets the pinned SSH host key; take another")
    return problems
