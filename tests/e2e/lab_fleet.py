"""A lab, and a controller that is pointed at it, as a user has them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"
# Read by systemd from the environment file, and to reach the worker as it is.
ODD = 'a "b" \\ $HOME `c` %d \\n'
# Seconds and not minutes until a fault is dealt with.
SETTINGS = {
    # A digit, which Ansible censors in all that a module returns which has the environment.
    "celery_worker_environment": {"ODD": ODD, "DIGIT": "1", "BOXOFFICE_VISIBILITY_TIMEOUT": "30"},
    "celery_worker_stop_timeout": 25,
    "celery_worker_watchdog": 20,
    "rss_sampler_metrics": "{{ linode_private_ipv4 }}:9253",
    "rss_sampler_metrics_from": "{{ groups['prometheus'] | map('extract', hostvars, 'linode_private_ipv4') | list }}",
    "queue_metrics_listen": "{{ linode_private_ipv4 }}:9254",
    "queue_metrics_from": "{{ groups['prometheus'] | map('extract', hostvars, 'linode_private_ipv4') | list }}",
    "rss_sampler_guard_interval": 2,
    "rss_sampler_guard_sustain": 6,
}
# A Python of the application as its workers have it.
IN_APP = (
    "systemd-run --quiet --pipe --wait --collect --uid=celery --working-directory=/opt/celery/current/app"
    " --property=EnvironmentFile=/etc/celery/environment /opt/celery/current/venv/bin/python"
)
# The same, behind one's back.
SENDER = "e2e-sender.service"
IN_BACKGROUND = IN_APP.replace("--pipe --wait", f"--unit={SENDER}")
RECAP = re.compile(r"^(\S+) +: ok=(\d+) +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", re.MULTILINE)


@dataclass
class Ran:
    """One command: exit code, all that it printed, and the recap's (changed, failed) by host."""

    code: int
    output: str
    recap: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """The output as one line, as Ansible wraps it."""
        return re.sub(r"\s+", " ", self.output)


LAST_WORD = f"journalctl --unit={SENDER} --output=cat --identifier=python --lines=1"


class Fleet:
    """A lab, and a controller that is pointed at it."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.inventory = home / "inventory"
        shutil.copytree(ROOT / "tests" / "lab" / "inventory", self.inventory)
        plugin = self.inventory / "linode_fleet.yml"
        declared = yaml.safe_load(plugin.read_text())
        plugin.write_text(yaml.safe_dump({**declared, "known_hosts": str(home / "lab" / "controller" / "known_hosts")}))
        (self.inventory / "group_vars" / "linode_fleet.yml").open("a").write(yaml.safe_dump(SETTINGS))
        # A host that is down comes first, so that whatever runs once runs in spite of it.
        self.ghost = home / "ghost.yml"
        self.ghost.write_text("celery_workers: {hosts: {ghost: {ansible_host: 127.18.255.254, ansible_user: root}}}\n")
        self.environment = {
            **os.environ,
            "PLIMSOLL_LAB_HOME": str(home / "lab"),
            "PLIMSOLL_LAB_PORT": str(port),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(home / "cp"),
        }

    def run(self, *command: str, timeout: float = 600) -> Ran:
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        recap = {host: (int(changed), int(failed)) for host, _, changed, _, failed in RECAP.findall(ran.stdout)}
        return Ran(ran.returncode, ran.stdout, recap)

    def lab(self, *words: str) -> Ran:
        return self.run("scripts/lab", *words)

    def point(self) -> None:
        for name, value in re.findall(r"(LINODE_API_\w+)=(\S+)", self.lab("env").output):
            self.environment[name] = value

    def play(self, playbook: str, *options: str, ghost: bool = False, timeout: float = 600) -> Ran:
        sources = [f"--inventory={path}" for path in ([self.ghost] if ghost else []) + [self.inventory]]
        return self.run(str(BIN / "ansible-playbook"), *sources, f"playbooks/{playbook}.yml", *options, timeout=timeout)

    def on(self, host: str, command: str) -> str:
        ran = self.lab("ssh", host, command)
        assert ran.code == 0, ran.output
        return ran.output

    @contextmanager
    def sending(self, words: str) -> Iterator[Callable[[], int]]:
        """`python -m WORDS` of the application on demo-1, which sends tasks. What ends it says how many were sent.

        It must not have ended before.
        """
        self.on("demo-1", f"{IN_BACKGROUND} -m {words}")
        sent: list[int] = []

        def end() -> int:
            if not sent:
                said = self.on("demo-1", f"systemctl is-active {SENDER} && systemctl stop {SENDER}; {LAST_WORD}")
                assert said.startswith("active"), said
                found = re.search(r"(\d+) sent", said)
                sent.append(int(found[1]) if found else 0)
            return sent[0]

        try:
            yield end
        finally:
            self.lab("ssh", "demo-1", f"systemctl stop {SENDER}")

    def addresses(self) -> dict[str, str]:
        """Public addresses of the fleet by label, out of the inventory."""
        listed = self.run(str(BIN / "ansible-inventory"), f"--inventory={self.inventory}", "--list", "--export")
        hosts = json.loads(listed.output)["_meta"]["hostvars"]
        return {host: str(one["ansible_host"]) for host, one in hosts.items()}

    def findings(self) -> dict[str, Any]:
        return json.loads((self.home / "lab" / "report" / "findings.json").read_text())

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Rows of what was collected."""
        ran = self.run(str(BIN / "plimsoll"), "query", str(self.home / "lab" / "store"), sql, "--format=json")
        assert ran.code == 0, ran.output
        return json.loads(ran.output)

    def machines(self) -> list[str]:
        """Command lines of the QEMU processes of this lab."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if "qemu-system" in command and str(self.home) in command:
                found.append(command)
        return found


def wait_for(what: str, until: Callable[[], Any], patience_s: float = 120) -> Any:
    """What until() finds at last, asked every few seconds. Raises AssertionError."""
    deadline = time.monotonic() + patience_s
    while not (found := until()):
        assert time.monotonic() < deadline, f"no {what} in {patience_s} s"
        time.sleep(2)
    return found


def free_port() -> int:
    """One of the lab's ports that nothing listens on: the first is left to scripts/demo."""
    for port in range(18481, 18500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port for a lab is free")
