"""The API client against a server that says what it is told to: time and rate limits, repeats, words for the user."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from plimsoll import linode
from plimsoll.linode import Api, Budget, Catalogue, Deadline, LinodeError, NoAnswer, Refused

TOKEN = "s3cret-t0ken"
OK: tuple[int, dict[str, str], Any] = (200, {}, {"ok": True})


def fails(status: int, reason: str = "no", field: str | None = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    error = {"reason": reason, **({"field": field} if field else {})}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, {"errors": [error]}


class Scripted:
    """Answers requests in turn from `answers` (a float is a silence of that many seconds), the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Any] = [OK]
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.seen.append((self.command, self.path, dict(self.headers), body))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if isinstance(answer, float):
                    time.sleep(answer)
                    self.close_connection = True
                    return
                status, headers, content = answer
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def methods(self) -> list[str]:
        return [seen[0] for seen in self.seen]


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.server.shutdown()
    scripted.server.server_close()


class Clock:
    def __init__(self) -> None:
        self.time, self.pauses = 0.0, []

    def now(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds


def client(server: Scripted, clock: Clock | None = None, seconds: float = 60.0, timeout: float = 5.0) -> Api:
    clock = clock or Clock()
    return Api(TOKEN, server.url, "v4", Deadline(seconds, clock.now, clock.pause), timeout)


def test_the_token_goes_into_its_header_and_nowhere_else(server: Scripted, monkeypatch: Any, tmp_path: Any) -> None:
    # requests takes a login for the host out of ~/.netrc, over the header, unless told otherwise.
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    client(server).post("/linode/instances", {"label": "w-1"})
    method, path, headers, body = server.seen[0]
    assert (method, path, json.loads(body)) == ("POST", "/v4/linode/instances", {"label": "w-1"})
    assert headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("status", [408, 429, 503])
def test_an_api_that_says_come_again_is_asked_again_when_it_said(server: Scripted, status: int) -> None:
    clock = Clock()
    server.answers = [fails(status, Retry_After="7"), OK]
    client(server, clock).post("/x", {})
    assert server.methods() == ["POST", "POST"]
    assert 7 <= clock.pauses[0] <= 8


def test_a_busy_linode_is_asked_again(server: Scripted) -> None:
    server.answers = [fails(400, "Linode busy."), OK]
    assert client(server).post("/x") == {"ok": True}


def test_no_wait_goes_beyond_the_deadline(server: Scripted) -> None:
    clock = Clock()
    server.answers = [fails(429, "Too many requests", Retry_After="100")]
    with pytest.raises(LinodeError, match="asks to wait 100 s, longer than is left"):
        client(server, clock).get("/x")
    assert clock.pauses == []


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_gateways_error_repeats_a_get_and_never_a_post(server: Scripted, status: int) -> None:
    server.answers = [(status, {}, "<html>Bad Gateway</html>"), OK]
    assert client(server).get("/x") == {"ok": True}
    server.answers, server.seen = [(status, {}, "<html>Bad Gateway</html>"), OK], []
    with pytest.raises(NoAnswer):
        client(server).post("/x", {})
    assert server.methods() == ["POST"]


def test_a_silent_api_is_named_with_its_url_and_the_time_it_had(server: Scripted) -> None:
    server.answers = [0.3]
    started = time.monotonic()
    with pytest.raises(NoAnswer, match=rf"{server.url} did not answer GET /x within 0\.1 s"):
        client(server, timeout=0.1).get("/x")
    assert server.methods() == ["GET", "GET"]
    assert time.monotonic() - started < 1


def test_a_lost_connection_repeats_a_get_and_never_a_post(server: Scripted) -> None:
    server.answers = [0.0, OK]
    assert client(server).get("/x") == {"ok": True}
    server.answers, server.seen = [0.0, OK], []
    with pytest.raises(NoAnswer, match="cannot be reached"):
        client(server).post("/x", {})
    assert server.methods() == ["POST"]


def test_a_closed_port_is_named() -> None:
    api = Api(TOKEN, "http://127.0.0.1:9", "v4", Deadline(60, pause=lambda seconds: None))
    with pytest.raises(NoAnswer, match=r"http://127\.0\.0\.1:9 cannot be reached for GET /x: .*refused"):
        api.get("/x")


def test_a_refused_token_says_where_to_get_another(server: Scripted) -> None:
    server.answers = [fails(401, "Invalid Token")]
    with pytest.raises(Refused, match=r"401 Invalid Token.*LINODE_API_TOKEN.*cloud\.linode\.com") as caught:
        client(server).get("/x")
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    assert server.methods() == ["GET"]


def test_an_error_carries_the_apis_field_and_reason(server: Scripted) -> None:
    server.answers = [fails(400, "Label must be unique among your linodes", "label")]
    with pytest.raises(Refused, match="400 to POST /x: label: Label must be unique") as caught:
        client(server).post("/x", {})
    assert caught.value.names("label", "unique") and not caught.value.names("region", "unique")


def test_maintenance_is_not_waited_for(server: Scripted) -> None:
    server.answers = [fails(503, "down", X_Maintenance_Mode="true"), OK]
    with pytest.raises(LinodeError, match="maintenance"):
        client(server).get("/x")


@pytest.mark.parametrize("answer", [(200, {}, "<html>hello</html>"), (200, {}, {"hello": 1}), (200, {}, [1])])
def test_what_is_no_linode_api_is_called_that(server: Scripted, answer: Any) -> None:
    server.answers = [answer]
    with pytest.raises(LinodeError, match="is LINODE_API_URL right"):
        client(server).list("/x")


def test_a_list_is_read_in_the_largest_pages_with_its_filter(server: Scripted) -> None:
    server.answers = [(200, {}, {"data": [{"id": page}], "page": page, "pages": 2}) for page in (1, 2)]
    assert client(server).list("/x", {"tags": "t"}) == [{"id": 1}, {"id": 2}]
    assert [path for _, path, _, _ in server.seen] == ["/v4/x?page=1&page_size=500", "/v4/x?page=2&page_size=500"]
    assert all(json.loads(headers["X-Filter"]) == {"tags": "t"} for _, _, headers, _ in server.seen)


@pytest.mark.parametrize("url", ["{}/", "{}/v4", "{}/v4/"])
def test_the_root_may_be_given_as_other_tools_want_it(server: Scripted, url: str) -> None:
    Api(TOKEN, url.format(server.url), "v4", Deadline(9)).get("/x")
    assert server.seen[0][1] == "/v4/x"


@pytest.mark.parametrize(
    ("token", "words"), [("", "set LINODE_API_TOKEN"), ("s3cret\nX: y", "a blank"), ("s3crét", "a blank")]
)
def test_a_token_that_cannot_be_is_refused_without_showing_it(token: str, words: str) -> None:
    with pytest.raises(LinodeError, match=words) as caught:
        Api(token, "http://127.0.0.1:9", "v4", Deadline(9))
    assert "s3cr" not in str(caught.value)


def test_a_missing_library_is_named_with_its_way_out(monkeypatch: Any) -> None:
    monkeypatch.setattr(linode, "MISSING", "linode_api4 is not installed")
    with pytest.raises(LinodeError, match="linode_api4 is not installed"):
        Api(TOKEN, "http://127.0.0.1:9", "v4", Deadline(9))


# ---- rate limits, kept on this side ----


def test_a_window_lets_so_many_through_and_then_one_for_each_that_left_it() -> None:
    clock = Clock()
    budget = Budget(2, 10.0, clock.now)
    assert budget.take() == 0
    clock.time = 4
    assert budget.take() == 0
    assert budget.take() == budget.take() == 6, "asking takes nothing"
    clock.time = 9.9
    assert budget.take() == pytest.approx(0.1)
    clock.time = 10
    assert [budget.take(), budget.take()] == [0, 4], "of the second one's window 4 s are left"
    clock.time = 100
    assert [budget.take(), budget.take(), budget.take()] == [0, 0, 10], "what is not used is not saved up"


@pytest.mark.parametrize(
    ("remaining", "reset", "wait"),
    [
        ("0", "1007", 7),
        (" 0 ", " 1007 ", 7),
        ("0", "1099", 10),  # clocks that differ cost no more than a window
        ("0", "900", 0),
        ("1", "1007", 0),
        (None, "1007", 0),
        ("0", None, 0),
        ("0", "soon", 0),
    ],
)
def test_what_the_api_says_is_left_counts_where_it_is_nothing(
    remaining: str | None, reset: str | None, wait: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(linode.time, "time", lambda: 1000.0)
    clock = Clock()
    budget = Budget(5, 10.0, clock.now)
    budget.told(remaining, reset)
    assert budget.take() == wait
    clock.time += wait
    assert budget.take() == 0


def test_a_longer_wait_than_the_window_asks_for_counts(monkeypatch: Any) -> None:
    monkeypatch.setattr(linode.time, "time", lambda: 1000.0)
    clock = Clock()
    budget = Budget(1, 10.0, clock.now)
    budget.take()
    clock.time = 8
    assert budget.take() == 2
    budget.told("0", "1005")
    assert budget.take() == 5


def test_threads_get_no_more_than_the_window_holds() -> None:
    budget = Budget(50, 60.0, lambda: 0.0)
    taken: list[float] = []

    def ask() -> None:
        taken.extend(budget.take() for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken.count(0) == 50 and len(taken) == 160


def test_as_many_creations_as_the_api_takes_pass_at_once_and_one_more_waits(server: Scripted) -> None:
    clock = Clock()
    api = client(server, clock)
    for _ in range(20):
        api.post("/linode/instances", {})
    assert clock.pauses == []
    api.post("/linode/instances/101/boot")
    api.get("/linode/instances/101")
    assert clock.pauses == [], "other requests have a limit of their own"
    api.post("/linode/instances", {})
    assert len(clock.pauses) == 1 and 15 <= clock.pauses[0] <= 16
    assert server.methods().count("POST") == 22


def test_a_wait_for_the_rate_limit_beyond_the_deadline_is_refused_before_it_is_asked(server: Scripted) -> None:
    clock = Clock()
    api = client(server, clock, seconds=10)
    for _ in range(20):
        api.post("/linode/instances", {})
    with pytest.raises(LinodeError, match=r"takes POST /linode/instances again in 1[56] s, by its rate") as caught:
        api.post("/linode/instances", {})
    assert not isinstance(caught.value, (NoAnswer, Refused)), "nothing was sent, and nothing is to be looked up"
    assert len(server.seen) == 20 and clock.pauses == []


@pytest.mark.parametrize("status", [200, 429])
def test_an_answer_that_nothing_is_left_holds_the_next_of_its_kind_alone(
    server: Scripted, status: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(linode.time, "time", lambda: 1000.0)
    clock = Clock()
    api = client(server, clock)
    told = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1009"}
    server.answers = [(status, told, {"errors": [{"reason": "Too many requests"}]}), OK]
    if status == 200:
        api.post("/linode/instances", {})
        api.get("/x")
        assert clock.pauses == []
    api.post("/linode/instances", {})
    assert 9 <= sum(clock.pauses) <= 11


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/linode/instances", "create"),
        ("POST", "/linode/instances/1/rebuild", "other"),
        ("PUT", "/linode/instances/1", "other"),
        ("GET", "/linode/instances?page=1&page_size=500", "list"),
        ("GET", "/linode/instances/1", "other"),
    ],
)
def test_each_request_counts_as_its_kind(method: str, path: str, kind: str) -> None:
    assert linode._kind(method, path) == kind


# ---- what is sold ----


def page(*objects: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    return 200, {}, {"data": list(objects), "pages": 1}


def test_what_is_not_offered_is_named_with_what_is_near_it(server: Scripted) -> None:
    server.answers = [page({"id": "g6-nanode-1"}), page({"id": "us-ord"}), page({"id": "linode/debian12"})]
    catalogue = Catalogue(client(server))
    problem = catalogue.unknown("type", "g6-nanode-2")
    assert "type: 'g6-nanode-2' is not offered; near it: g6-nanode-1; `linode-cli linodes types` lists them" in problem
    assert f"GET {server.url}/v4/linode/types" in problem
    assert catalogue.unknown("region", "us-ord") == ""
    assert "lacks cloud-init" in catalogue.unknown("image", "linode/debian12")


def test_an_image_with_cloud_init_is_taken(server: Scripted) -> None:
    server.answers = [page({"id": "linode/debian12", "capabilities": ["cloud-init"]}, {"id": "private/1"})]
    catalogue = Catalogue(client(server))
    assert catalogue.unknown("image", "linode/debian12") == ""
    assert "lacks cloud-init" in catalogue.unknown("image", "private/1")


def test_a_catalogue_asks_for_each_list_once_and_only_when_it_is_needed(server: Scripted) -> None:
    catalogue = Catalogue(client(server))
    assert server.seen == []
    server.answers = [page({"id": "g6-nanode-1", "price": {"monthly": 5}})]
    assert [catalogue.unknown("type", "g6-nanode-1") for _ in range(3)] == [""] * 3
    assert catalogue.of("type")["g6-nanode-1"]["price"] == {"monthly": 5}
    assert [path for _, path, _, _ in server.seen] == ["/v4/linode/types?page=1&page_size=500"]


def test_a_list_that_failed_is_asked_for_again(server: Scripted) -> None:
    server.answers = [fails(401, "Invalid Token"), page({"id": "us-ord"})]
    catalogue = Catalogue(client(server))
    with pytest.raises(Refused):
        catalogue.of("region")
    assert list(catalogue.of("region")) == ["us-ord"]
