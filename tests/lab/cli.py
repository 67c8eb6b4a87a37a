"""The lab: a fleet on one machine. `scripts/lab up|down|status|env|ssh|faults`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from . import image
from .driver import DriverError
from .qemu import Machines, QemuDriver

ROOT = Path(__file__).resolve().parent.parent.parent
HOME = Path(os.environ.get("PLIMSOLL_LAB_HOME") or ROOT / ".plimsoll" / "lab")
FIRST_PORT = 18480
PORT = int(os.environ.get("PLIMSOLL_LAB_PORT") or FIRST_PORT)
# Labs side by side, each with a home and a port of its own, share neither addresses nor the guests' private network.
NETWORK = (PORT - FIRST_PORT) % 250
URL = f"http://127.0.0.1:{PORT}"
KEY, TOKEN, PID, LOG = HOME / "id_ed25519", HOME / "token", HOME / "server.pid", HOME / "server.log"
SERVER_ANSWERS_WITHIN_S = 60.0


class LabError(Exception):
    """The lab cannot do what was asked; the message says why and what to do."""


def _driver() -> QemuDriver:
    built = image.cached()
    if built is None:
        raise LabError("the lab's image is not built; run: scripts/lab up")
    return QemuDriver(HOME / "vms", built, NETWORK)


def _server_pid() -> int | None:
    try:
        pid = int(PID.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"tests.lab.cli" in command else None


def _call(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise LabError(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}") from None
    except OSError:
        raise LabError(f"the lab's API does not answer at {URL}; start it with: scripts/lab up (log: {LOG})") from None


def up() -> None:
    """Build what is not built, start the API server, return when it answers. Run again, it finds what runs."""
    missing = [
        name for name in ("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "ssh-keygen") if shutil.which(name) is None
    ]
    if missing:
        raise LabError(f"{', '.join(missing)} not found; scripts/setup lab installs what the lab needs")
    if os.geteuid() != 0:
        raise LabError("the lab needs root: port 22 of its loopback addresses, and files of root in the image")
    if image.cached() is None:
        print("lab: building the guest's image, once (about a minute)", flush=True)
        image.build()
    HOME.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not TOKEN.exists():
        TOKEN.touch(mode=0o600)
        TOKEN.write_text(secrets.token_hex(32))
    if not KEY.exists():
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "plimsoll-lab", "-f", str(KEY)], check=True
        )
    driver = _driver()
    if _server_pid() is None:
        with LOG.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.lab.cli", "serve"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        PID.write_text(str(process.pid))
        deadline = time.monotonic() + SERVER_ANSWERS_WITHIN_S
        while True:
            with contextlib.suppress(LabError):
                _call("GET", "/lab/status")
                break
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-5:])
                raise LabError(f"the lab's API did not start at {URL}; {LOG} ends:\n{tail}")
            time.sleep(0.2)
    print(f"lab: Linode API at {URL}, machines on QEMU with {driver.accelerator}")


def serve() -> None:
    """The API server in the foreground; `up` starts it in the background."""
    import uvicorn

    from .server import create_app

    app = create_app(_driver(), token=TOKEN.read_text(), state_path=HOME / "api.json", network=NETWORK)
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")


def down() -> None:
    """Stop the server and every machine that it started, and remove all of it but the cached image."""
    if (pid := _server_pid()) is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while _server_pid() is not None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
    if not HOME.exists():
        print("lab: nothing to remove")
        return
    machines = Machines(HOME / "vms")
    for instance in machines.instances():
        machines.delete(instance)
        print(f"lab: machine {instance} removed")
    shutil.rmtree(HOME)
    print("lab: down; its image stays in the cache for the next time")


def status() -> None:
    """One line a machine: what the API says, and what the machine is."""
    for machine in _call("GET", "/lab/status")["instances"]:
        print("  ".join(str(machine[key]) for key in ("id", "label", "status", "driver_state", "ipv4")))


def env() -> None:
    """Shell lines that point plimsoll, linode-cli and your shell at the lab: eval "$(scripts/lab env)"."""
    if not TOKEN.exists():
        raise LabError("the lab is not up; run: scripts/lab up")
    print(f"export LINODE_API_URL={URL} LINODE_API_TOKEN={TOKEN.read_text()}")
    print(f"export LINODE_CLI_API_HOST=127.0.0.1:{PORT} LINODE_CLI_API_SCHEME=http LINODE_CLI_TOKEN=$LINODE_API_TOKEN")


def ssh(name: str, command: list[str]) -> None:
    """Log in to a machine by its label, its host key checked against those that provisioning pinned."""
    found = [machine for machine in _call("GET", "/lab/status")["instances"] if machine["label"] == name]
    if not found:
        raise LabError(f"no instance is labelled {name}; scripts/lab status lists them")
    known_hosts = HOME / "controller" / "known_hosts"
    options = [
        f"HostKeyAlias={name}",
        f"UserKnownHostsFile={known_hosts}",
        "StrictHostKeyChecking=yes",
        "LogLevel=ERROR",
    ]
    flat = [word for option in options for word in ("-o", option)]
    os.execvp("ssh", ["ssh", "-i", str(KEY), *flat, f"root@{found[0]['ipv4'][0]}", *command])


def faults(action: str, rule: str | None) -> None:
    """Tell the API to misbehave: `faults add '{"path": "/linode/instances", "kind": "status", "status": 503}'`."""
    if action == "add":
        if rule is None:
            raise LabError("faults add needs the rule as JSON; docs/lab.md lists the kinds")
        try:
            answer = _call("POST", "/lab/faults", json.loads(rule))
        except json.JSONDecodeError as error:
            raise LabError(f"the rule is no JSON: {error}") from None
    else:
        answer = _call("DELETE" if action == "clear" else "GET", "/lab/faults")
    print(json.dumps(answer, indent=2))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in (up, down, status, env, serve):
        verbs.add_parser(verb.__name__, help=(verb.__doc__ or "").split("\n")[0])
    login = verbs.add_parser("ssh", help="log in to a machine by its label")
    login.add_argument("name")
    login.add_argument("command", nargs=argparse.REMAINDER)
    misbehave = verbs.add_parser("faults", help="tell the API to misbehave")
    misbehave.add_argument("action", choices=["add", "list", "clear"])
    misbehave.add_argument("rule", nargs="?", help="JSON, for add")
    given = vars(parser.parse_args())
    verb = given.pop("verb")
    try:
        globals()[verb](**given)
    except (LabError, image.ImageError, DriverError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
