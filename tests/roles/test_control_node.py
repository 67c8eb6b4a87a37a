"""schedule.yml makes a machine a control node, which collects by its timer and tells what is new, on a real systemd."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from lab.namespaced import Machine, machine

ROOT = Path(__file__).resolve().parents[2]
SERVICE, FAILED, TIMER = (f"plimsoll-collect{end}" for end in (".service", "-failed.service", ".timer"))
STATE = "/var/lib/plimsoll-collect"
UNIT = "celery-worker@gate.service"
PATIENCE_S = 120
# Answers 200, and keeps what it was sent.
WEBHOOK = """
import http.server, json, sys
class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        with open(sys.argv[2], "a") as out:
            out.write(text + "\\n----\\n")
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Hook).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def rollups(path: Path) -> None:
    """Thirty hours of a worker that leaks 3 MiB an hour, as its host's sampler writes them down."""
    start = (int(time.time()) // 600 - 30 * 6) * 600
    lines = ["timestamp,pid,unit,start_time,role,count,floor_kb,median_kb,max_kb,tasks"]
    lines += [
        f"{start + 600 * n},7,{UNIT},{start},child,10,{60_000 + 512 * n},{60_050 + 512 * n},{60_100 + 512 * n},"
        for n in range(30 * 6)
    ]
    path.write_text("\n".join(lines) + "\n")


class Node(Machine):
    """The control node, and what it is set up by."""

    shared: Path
    options: list[str]

    def play(self, *words: str) -> tuple[int, str, dict[str, int]]:
        """Exit status and output of schedule.yml, and how much was changed on each host."""
        command = [str(ROOT / ".venv/bin/ansible-playbook"), *self.options, "playbooks/schedule.yml", *words]
        quoted = " ".join(f"'{word}'" for word in command)
        ran = self.run(f"cd {ROOT} && ANSIBLE_NOCOLOR=1 {quoted}", timeout=600)
        changed = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", ran.stdout, re.MULTILINE)
        return ran.returncode, ran.stdout, {host: int(count) for host, count in changed}

    def collect(self) -> str:
        """Runs the service; its result. What went before it is not in the hook's log any more."""
        (self.shared / "hook.log").write_text("")
        self.run(f"systemctl start {SERVICE}")
        return self.on(f"systemctl show --value --property=Result {SERVICE}").strip()

    def told(self) -> str:
        return (self.shared / "hook.log").read_text()

    def metrics(self) -> dict[str, float]:
        lines = self.on(f"cat {STATE}/plimsoll_collect.prom").splitlines()
        assert lines[-1] == "# EOF"
        return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Also the worker's host, which it reaches by ssh as it does all others."""
    shared = tmp_path_factory.mktemp("control")
    for name in ("key", "hostkey"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(shared / name)], check=True)
    (shared / "known_hosts").write_text(f"w-1 {(shared / 'hostkey.pub').read_text()}")
    (shared / "hook.py").write_text(WEBHOOK)
    ssh, hook = free_port(), free_port()
    # As it is here, whatever of it is committed.
    git = ["git", "-C", str(ROOT)]
    index = {"GIT_INDEX_FILE": str(shared / "index"), "PATH": "/usr/bin:/bin", "HOME": "/root"}
    for words in (["read-tree", "HEAD"], ["add", "--all"]):
        subprocess.run([*git, *words], env=index, check=True)
    tree = subprocess.run([*git, "write-tree"], env=index, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([*git, "archive", f"--output={shared / 'plimsoll.tar.gz'}", tree], check=True)

    inventory = shared / "inventory"
    (inventory / "group_vars" / "all").mkdir(parents=True)
    known = "-o HostKeyAlias=w-1 -o UserKnownHostsFile=/nonexistent -o StrictHostKeyChecking=yes"
    worker = {
        "ansible_host": "127.0.0.1",
        "ansible_port": ssh,
        "ansible_user": "root",
        "ansible_ssh_common_args": known,
    }
    hosts = {"control_node": {"hosts": {"control-1": {"ansible_connection": "local"}}}}
    (inventory / "hosts.yml").write_text(yaml.safe_dump({**hosts, "celery_workers": {"hosts": {"w-1": worker}}}))
    given = {
        "schedule_source": str(shared / "plimsoll.tar.gz"),
        "schedule_archives": str(shared / "releases"),
        "schedule_known_hosts": [str(shared / "known_hosts")],
        "schedule_ssh_private_key": "{{ lookup('ansible.builtin.file', '" + str(shared / "key") + "') }}",
        "schedule_webhook_url": f"http://127.0.0.1:{hook}/s3cret",
    }
    (shared / "vars.json").write_text(json.dumps(given))
    with machine(tmp_path_factory.mktemp("overlay"), shared) as booted:
        booted.__class__ = Node
        node: Node = booted  # type: ignore[assignment]
        node.shared, node.options = shared, ["-i", str(inventory), "-e", f"@{shared / 'vars.json'}"]
        node.on(
            "mkdir -p /run/sshd /root/.ssh /var/log/plimsoll/samples && chmod 700 /root/.ssh"
            f" && cat {shared}/key.pub >> /root/.ssh/authorized_keys && systemctl start systemd-journald"
            f" && systemd-run -q /usr/sbin/sshd -D -f /dev/null -h {shared}/hostkey -p {ssh} -o ListenAddress=127.0.0.1"
            f" && systemd-run -q python3 {shared}/hook.py {hook} {shared}/hook.log"
        )
        rollups(shared / "rollup.csv")
        node.on(f"cp {shared}/rollup.csv /var/log/plimsoll/samples/rollup-{time.strftime('%Y%m%d')}T000000Z.csv")
        yield node


def test_check_mode_on_a_bare_machine_says_what_would_be_done_and_does_nothing(node: Node) -> None:
    status, output, changed = node.play("--check", "--diff")
    assert status == 0 and changed["control-1"] > 3, output
    assert "OnCalendar=hourly" in output and "PRIVATE KEY" not in output and "s3cret" not in output
    assert "No such file" in node.run("ls /opt/plimsoll /etc/plimsoll").stdout


def test_it_is_installed_at_a_version_and_a_second_run_changes_nothing(node: Node) -> None:
    status, output, changed = node.play()
    assert status == 0 and changed["control-1"] > 3, output
    status, output, changed = node.play()
    assert status == 0 and changed["control-1"] == 0, output
    assert "plimsoll 0." in node.on(
        "cd /opt/plimsoll/current/app && PYTHONPATH=module_utils ../venv/bin/python -m plimsoll.cli --version"
    )


def test_secrets_are_roots_and_in_no_unit(node: Node) -> None:
    shown = node.on("stat -c '%a %U %n' /etc/plimsoll/credentials /etc/plimsoll/credentials/*")
    assert sorted(line.rsplit("/", 1)[-1] for line in shown.splitlines()) == [
        "credentials",
        "ssh_private_key",
        "webhook_url",
    ]
    assert all(line.startswith(("600 root", "700 root")) for line in shown.splitlines()), shown
    units = node.on(f"systemctl cat {SERVICE} {FAILED} {TIMER}; cat /etc/plimsoll/schedule.json")
    assert "s3cret" not in units and "PRIVATE KEY" not in units
    assert units.count("LoadCredential=") == 3
    verified = node.run(f"systemd-analyze verify --man=no {SERVICE} {FAILED} {TIMER}")
    assert (verified.returncode, verified.stdout) == (0, "")


def test_a_run_names_the_leak_once(node: Node) -> None:
    assert node.collect() == "success", node.run(f"journalctl -u {SERVICE} -n 80").stdout
    told = node.told()
    assert "1 new leak" in told and UNIT.removesuffix(".service") in told and "w-1" in told, told
    findings = json.loads(node.on(f"cat {STATE}/report/findings.json"))
    assert [one["leaking"] for one in findings["workers"]] == [True]
    assert findings["hosts"][0]["collected"] and "report.html" in node.on(f"ls {STATE}/report")
    metrics = node.metrics()
    assert metrics['plimsoll_collect_result{result="ok"}'] == 1 and metrics["plimsoll_collect_leaking"] == 1
    assert node.collect() == "success" and node.told() == ""


def test_a_host_that_is_down_is_told_and_its_leak_is_not_taken_back(node: Node) -> None:
    node.on("sed -i 's/ansible_port: [0-9]*/ansible_port: 1/' /etc/plimsoll/inventory/hosts.yml")
    assert node.collect() != "success"
    told = node.told()
    assert "collecting fails" in told and "1 host not collected" in told and "mended" not in told, told
    # As the inventory here says it: changed by hand, it is mended by the next run.
    status, output, changed = node.play("--diff")
    assert status == 0 and changed["control-1"] == 1, output
    assert node.collect() == "success"
    told = node.told()
    assert "collecting works again" in told and "new leak" not in told, told


def test_what_ends_a_run_from_outside_is_told_by_the_other_unit(node: Node) -> None:
    node.on("mv /etc/plimsoll/credentials/ssh_private_key /root/")
    assert node.collect() == "exit-code"
    deadline = time.monotonic() + PATIENCE_S
    while "the run failed before it began" not in node.told():
        assert time.monotonic() < deadline, node.run(f"journalctl -u {FAILED} -n 40").stdout
        time.sleep(0.5)
    node.on("mv /root/ssh_private_key /etc/plimsoll/credentials/")
    assert node.collect() == "success" and "collecting works again" in node.told()


def test_the_timer_makes_up_for_what_was_missed(node: Node) -> None:
    assert node.on(f"systemctl is-enabled {TIMER}; systemctl is-active {TIMER}").split() == ["enabled", "active"]
    node.on(
        "mkdir -p /run/systemd/system/plimsoll-collect.timer.d"
        " && printf '[Timer]\\nRandomizedDelaySec=0\\nAccuracySec=1s\\n'"
        " > /run/systemd/system/plimsoll-collect.timer.d/now.conf && systemctl daemon-reload"
        f" && systemctl stop {TIMER} && touch -d '3 hours ago' /var/lib/systemd/timers/stamp-{TIMER}"
        f" && systemctl show --value -p ExecMainStartTimestampMonotonic {SERVICE}"
    )
    before = node.on(f"systemctl show --value --property=ExecMainStartTimestampMonotonic {SERVICE}")
    node.on(f"systemctl start {TIMER}")
    deadline = time.monotonic() + PATIENCE_S
    while node.on(f"systemctl show --value --property=ExecMainStartTimestampMonotonic {SERVICE}") == before:
        assert time.monotonic() < deadline, node.on("systemctl list-timers --no-pager")
        time.sleep(0.5)


def test_a_calendar_that_is_none_is_refused_and_nothing_is_written(node: Node) -> None:
    before = node.on("sha256sum /etc/systemd/system/plimsoll-collect.*")
    status, output, _ = node.play("-e", 'schedule_calendar="every hour"')
    assert status != 0 and "every hour" in output, output
    assert node.on("sha256sum /etc/systemd/system/plimsoll-collect.*") == before
