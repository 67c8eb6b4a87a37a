"""A lab API over pretended machines, served on a free port of the loopback interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from linode_api4 import LinodeClient

from .pretend import PretendDriver
from .server import LIMITS, create_app

TOKEN = "t0ken-of-the-lab"
CREATE = {
    "type": "g6-nanode-1",
    "region": "us-mia",
    "image": "linode/debian12",
    "authorized_keys": ["ssh-ed25519 AAAA"],
}


@dataclass
class Served:
    """A running API: its root, and httpx clients of it, one for /v4 and one for the lab's own paths."""

    url: str
    driver: PretendDriver
    api: httpx.Client
    lab: httpx.Client

    def linode(self) -> LinodeClient:
        return LinodeClient(TOKEN, base_url=f"{self.url}/v4", retry=False)

    def create(self, label: str, **more: Any) -> dict[str, Any]:
        answer = self.api.post("/linode/instances", json={**CREATE, "label": label, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def settle(self, number: int, status: str = "running") -> dict[str, Any]:
        for _ in range(200):
            found = self.api.get(f"/linode/instances/{number}").json()
            if found.get("status") == status:
                return found
            time.sleep(0.02)
        raise AssertionError(f"instance {number} is {found}, not {status}")

    def refused(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The first error of a request that must be answered with 400."""
        answer = self.api.request(method, path, json=body)
        assert answer.status_code == 400, answer.text
        return answer.json()["errors"][0]

    def wire(self) -> list[dict[str, Any]]:
        """The last requests as they came, oldest first."""
        return self.lab.get("/lab/wire").json()


def serve(state: Path, driver: PretendDriver, **options: Any) -> tuple[uvicorn.Server, Served]:
    server = uvicorn.Server(
        uvicorn.Config(create_app(driver, token=TOKEN, state_path=state, **options), port=0, log_level="error")
    )
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    api, lab = (httpx.Client(base_url=base, headers=headers) for base in (f"{url}/v4", url))
    return server, Served(url, driver, api, lab)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    generous = {name: (10_000, window) for name, (_, window) in LIMITS.items()}
    server, lab = serve(tmp_path / "api.json", PretendDriver(), limits=generous)
    yield lab
    server.should_exit = True


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Served]:
    """With Linode's documented budgets."""
    server, lab = serve(tmp_path / "api.json", PretendDriver())
    yield lab
    server.should_exit = True
