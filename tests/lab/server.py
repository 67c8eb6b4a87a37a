"""A stateful Linode API v4 whose instances are whatever the driver makes of them; see docs/lab.md.

It answers as Linode's API does for what plimsoll uses, and 404 for all else. What is under /lab is the lab's own:
status, fault injection, a count of requests, and the last of them as they came.
"""

from __future__ import annotations

import hmac
import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from . import catalogue
from .account import Account
from .driver import Driver
from .faults import Fault, Faults
from .instances import Instances
from .listing import FilterError, page, select
from .locks import Locks
from .store import ApiError, Json, Store, found

Work = Callable[[Json, dict[str, str]], Any]
# By which fields Linode takes an X-Filter.
INSTANCE_FILTERS = (
    "group id image interface_generation ipv4 label placement_group.label placement_group.placement_group_type region"
    " tags"
)
EVENT_FILTERS = "action created entity.id entity.type id"
FIREWALL_FILTERS = "created id label tags updated"
SUBNET_FILTERS = "created id label updated"
VPC_FILTERS = f"region subnets.created subnets.id subnets.label subnets.updated {SUBNET_FILTERS}"
VPC_ADDRESS_FILTERS = "active config_id linode_id region vpc_id"
# Documented budgets: requests in seconds, for each token.
LIMITS = {"list": (200, 60.0), "create": (20, 15.0), "other": (1600, 60.0)}
WIRE_KEEPS = 500


class Budget:
    """A sliding window of requests."""

    def __init__(self, size: int, window: float) -> None:
        self.size, self.window = size, window
        self._times: deque[float] = deque()

    def take(self) -> dict[str, str]:
        """Headers for one more request. Raises ApiError 429."""
        now = time.monotonic()
        while self._times and now - self._times[0] >= self.window:
            self._times.popleft()
        wait = self.window - (now - self._times[0]) if self._times else self.window
        headers = {"X-RateLimit-Limit": str(self.size), "X-RateLimit-Reset": str(int(time.time() + wait) + 1)}
        if len(self._times) >= self.size:
            headers |= {"X-RateLimit-Remaining": "0", "Retry-After": str(int(wait) + 1)}
            raise ApiError(429, "Too many requests", headers=headers)
        self._times.append(now)
        return headers | {"X-RateLimit-Remaining": str(self.size - len(self._times))}


def create_app(
    driver: Driver,
    *,
    token: str,
    state_path: Path,
    limits: Mapping[str, tuple[int, float]] = LIMITS,
    network: int = 0,
) -> Starlette:
    """The API over a driver. state_path outlives the server; limits are (requests, seconds) for list, create, other;
    instances get addresses of 127.18.NETWORK.0/24.
    """
    store, faults = Store(state_path), Faults()
    linodes, locks, account = Instances(store, driver, faults, network), Locks(store), Account(store)
    walls, groups, vpcs = linodes.firewalls, linodes.groups, linodes.vpcs
    budgets = {name: Budget(*limit) for name, limit in limits.items()}
    requests: Counter[str] = Counter()
    wire: deque[Json] = deque(maxlen=WIRE_KEEPS)
    started = time.monotonic()

    def check_token(request: Request) -> None:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise ApiError(401, "Invalid Token")

    def record(request: Request, body: bytes) -> None:
        wire.append(
            {
                "method": request.method,
                "path": request.url.path,
                "query": request.url.query,
                "headers": {key: value for key, value in request.headers.items() if key != "authorization"},
                "body": body.decode(errors="replace"),
            }
        )

    def answer(work: Work, budget: str) -> Callable[[Request], Any]:
        """An endpoint: count, fault, token, budget, body, work, all errors in the API's shape."""

        def handle(request: Request, raw: bytes) -> Response:
            path = request.url.path.removeprefix("/v4beta").removeprefix("/v4")
            with store.lock:
                requests[f"{request.method} {re.sub(r'/[0-9]+', '/{id}', path)}"] += 1
                fault = faults.request(request.method, path)
            try:
                if fault is not None:
                    misbehave(fault)
                check_token(request)
                with store.lock:
                    headers = budgets[budget].take()
                try:
                    body = json.loads(raw or b"{}")
                except ValueError:
                    raise ApiError(400, "The request body is not valid JSON") from None
                if not isinstance(body, dict):
                    raise ApiError(400, "The request body must be an object")
                with store.lock:
                    result = work(body, {name: str(value) for name, value in request.path_params.items()})
                    if isinstance(result, tuple):
                        items, allowed = result
                        chosen = select(items, request.headers.get("X-Filter"), allowed)
                        result = page(chosen, request.query_params)
                    content = json.dumps(result)
            except FilterError as error:
                return ApiError(400, str(error), "X-Filter").response
            except ApiError as error:
                return error.response
            if fault is not None and fault.kind == "lost_answer":
                return Response("<html>502 Bad Gateway</html>", 502, media_type="text/html")
            return Response(content, 200, headers, "application/json")

        async def endpoint(request: Request) -> Response:
            raw = await request.body()
            record(request, raw)
            response = await run_in_threadpool(handle, request, raw)
            if response.status_code == 429:
                requests["429"] += 1
            return response

        return endpoint

    def misbehave(fault: Fault) -> None:
        if fault.kind == "hang":
            time.sleep(fault.seconds)
        elif fault.kind == "busy":
            raise ApiError(400, "Linode busy.")
        elif fault.kind == "maintenance":
            raise ApiError(503, "The API is under maintenance", headers={"X-Maintenance-Mode": "true"})
        elif fault.kind == "status":
            headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            raise ApiError(fault.status, "Injected fault", headers=headers)

    def get(path: str, work: Callable[..., Any]) -> Route:
        return Route(path, answer(lambda body, at: work(**at), "other"), methods=["GET"])

    def listed(path: str, work: Callable[..., Any], filters: str = "") -> Route:
        allowed = frozenset(filters.split())
        return Route(path, answer(lambda body, at: (list(work(**at)), allowed), "list"), methods=["GET"])

    def change(method: str, path: str, work: Callable[..., Json], budget: str = "other") -> Route:
        """An operation that gets the request's body."""
        return Route(path, answer(lambda body, at: work(body, **at), budget), methods=[method])

    def offered(path: str, items: Mapping[str, Json], filters: str) -> list[Route]:
        """What the catalogue has of a kind, and one of it; an id may hold a slash."""
        return [
            listed(path, items.values, filters),
            get(f"{path}/{{number:path}}", lambda number: found(items, number)),
        ]

    instances, one = "/linode/instances", "/linode/instances/{number:int}"
    firewalls, wall = "/networking/firewalls", "/networking/firewalls/{number:int}"
    device, key = f"{wall}/devices/{{device:int}}", "/profile/sshkeys/{number:int}"
    group, vpc, lock = "/placement/groups/{number:int}", "/vpcs/{number:int}", "/locks/{number:int}"
    subnet = f"{vpc}/subnets/{{subnet:int}}"

    routes = [
        listed(instances, linodes.listed, INSTANCE_FILTERS),
        change("POST", instances, linodes.create, "create"),
        get(one, linodes.one),
        change("PUT", one, linodes.update),
        change("DELETE", one, linodes.delete),
        *(
            change("POST", f"{one}/{action}", lambda body, number, action=action: linodes.power(action, number))
            for action in ("boot", "shutdown", "reboot")
        ),
        change("POST", f"{one}/resize", linodes.resize),
        change("POST", f"{one}/rebuild", linodes.rebuild),
        *(
            change("POST", f"{one}/backups/{verb}", lambda body, number, verb=verb: linodes.backups(verb, number))
            for verb in ("enable", "cancel")
        ),
        get(f"{one}/ips", linodes.addresses),
        listed(f"{one}/disks", linodes.disks, "label size"),
        listed(f"{one}/configs", linodes.configs, "label interfaces.label"),
        *offered("/linode/types", catalogue.TYPES, "class disk gpus id label memory vcpus"),
        *offered("/regions", catalogue.REGIONS, "id country"),
        *offered("/images", catalogue.IMAGES, "id label deprecated is_public vendor status"),
        listed("/maintenance/policies", catalogue.MAINTENANCE_POLICIES.values, "notification_period_sec"),
        listed("/account/events", lambda: store.state["events"], EVENT_FILTERS),
        get("/account/events/{number:int}", store.one_event),
        get("/account", lambda: catalogue.ACCOUNT),
        get("/account/settings", lambda: catalogue.ACCOUNT_SETTINGS),
        get("/profile", lambda: catalogue.PROFILE),
        listed("/profile/sshkeys", store["sshkeys"].values, "id label"),
        change("POST", "/profile/sshkeys", account.create_sshkey),
        get(key, account.sshkey),
        change("PUT", key, account.update_sshkey),
        change("DELETE", key, account.delete_sshkey),
        listed("/tags", account.tags, "label"),
        change("POST", "/tags", account.create_tag),
        listed("/tags/{label}", account.tagged),
        change("DELETE", "/tags/{label}", account.delete_tag),
        listed(firewalls, walls.listed, FIREWALL_FILTERS),
        change("POST", firewalls, walls.create),
        get(wall, walls.one),
        change("PUT", wall, walls.update),
        change("DELETE", wall, walls.delete),
        get(f"{wall}/rules", walls.rules),
        change("PUT", f"{wall}/rules", walls.put_rules),
        listed(f"{wall}/devices", walls.devices, "created id updated"),
        change("POST", f"{wall}/devices", walls.add_device),
        get(device, walls.device),
        change("DELETE", device, walls.remove_device),
        listed("/locks", locks.listed, "entity.id entity.type id lock_type"),
        change("POST", "/locks", locks.create),
        get(lock, locks.one),
        change("DELETE", lock, locks.delete),
        listed("/placement/groups", groups.listed, "label placement_group_type region"),
        change("POST", "/placement/groups", groups.create),
        get(group, groups.one),
        change("PUT", group, groups.update),
        change("DELETE", group, groups.delete),
        change("POST", f"{group}/assign", groups.assign),
        change("POST", f"{group}/unassign", groups.unassign),
        listed("/vpcs", vpcs.listed, VPC_FILTERS),
        change("POST", "/vpcs", vpcs.create),
        listed("/vpcs/ips", vpcs.addresses, VPC_ADDRESS_FILTERS),
        get(vpc, vpcs.one),
        change("PUT", vpc, vpcs.update),
        change("DELETE", vpc, vpcs.delete),
        listed(f"{vpc}/ips", vpcs.addresses_of, VPC_ADDRESS_FILTERS),
        listed(f"{vpc}/subnets", vpcs.subnets, SUBNET_FILTERS),
        change("POST", f"{vpc}/subnets", vpcs.create_subnet),
        get(subnet, vpcs.one_subnet),
        change("PUT", subnet, vpcs.update_subnet),
        change("DELETE", subnet, vpcs.delete_subnet),
    ]

    # The lab's own

    def status(request: Request) -> Response:
        with store.lock:
            rows = [
                {key: one[key] for key in ("id", "label", "status", "ipv4")} | {"driver_state": driver.state(one["id"])}
                for one in linodes.listed()
            ]
        return JSONResponse({"instances": rows, "uptime_s": round(time.monotonic() - started, 1)})

    async def injected(request: Request) -> Response:
        if request.method == "DELETE":
            faults.clear()
        elif request.method == "POST":
            try:
                faults.append(Fault(**await request.json()))
            except (TypeError, ValueError) as error:
                return JSONResponse({"errors": [{"reason": f"not a fault: {error}"}]}, 400)
        return JSONResponse([vars(fault) for fault in faults])

    def counted(request: Request) -> Response:
        with store.lock:
            return JSONResponse(dict(requests))

    async def seen(request: Request) -> Response:
        """Bodies hold user data and passwords: for who has the token alone."""
        try:
            check_token(request)
        except ApiError as error:
            return error.response
        if request.method == "DELETE":
            wire.clear()
        return JSONResponse(list(wire))

    async def not_found(request: Request, error: Exception) -> Response:
        record(request, await request.body())
        code = getattr(error, "status_code", 404)
        return JSONResponse({"errors": [{"reason": "Not found" if code == 404 else "Method Not Allowed"}]}, code)

    own = [
        Route("/lab/status", status),
        Route("/lab/faults", injected, methods=["GET", "POST", "DELETE"]),
        Route("/lab/requests", counted),
        Route("/lab/wire", seen, methods=["GET", "DELETE"]),
    ]
    mounts = [Mount("/v4", routes=routes), Mount("/v4beta", routes=routes)]
    return Starlette(routes=[*own, *mounts], exception_handlers={404: not_found, 405: not_found})
