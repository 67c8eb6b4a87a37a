"""What Prometheus on a real machine has seen of the files before: leaks, a kill, a restart; and who is told.

test_main_job_monitored.py has set it up, and test_main_job_remediated.py has had a leak of each kind since.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from plimsoll.dashboard import queries
from plimsoll.scheduled import GOOD, State, leaks_of, metrics

from .lab_fleet import IN_APP, Fleet, wait_for
from .numbered import UNIT

FIRST = 900_000
CGROUP = f"/sys/fs/cgroup/celery.slice/{UNIT}"
# Where the control node's node_exporter would be.
COLLECT = "/run/plimsoll-e2e"
# Not http.server's own main(), which asks name servers for minutes.
SERVE = f"""import functools, http.server as h, socketserver
handler = functools.partial(h.SimpleHTTPRequestHandler, directory="{COLLECT}")
socketserver.TCPServer(("127.0.0.1", 9100), handler).serve_forever()"""
# What celery-exporter alone has, and RabbitMQ; and what does not happen here.
ELSEWHERE = ("celery_task_", "celery_queue_consumers", "plimsoll_guard_acts_total", "[1h])) > 300")
SOON = 'ALERTS{alertname="PlimsollMemoryHighSoon",alertstate="firing"}'
AMTOOL = "amtool --alertmanager.url=http://127.0.0.1:9093 alert query -o json"
# Answers of Prometheus to the queries on standard input, at a time or, with null, now: of each its series and values.
ASK = """
import json, sys, urllib.parse, urllib.request
at, queries = json.load(sys.stdin)
for query in queries:
    asked = {"query": query, **({"time": at} if at else {})}
    url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode(asked)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        found = json.load(error)["error"]
    print(json.dumps(found))
"""


def ask(fleet: Fleet, *asked: str, at: float | None = None) -> list[Any]:
    """Answers of the Prometheus on demo-1, now or at a time."""
    script, given = (base64.b64encode(text.encode()).decode() for text in (ASK, json.dumps([at, asked])))
    said = fleet.on("demo-1", f'echo {given} | base64 -d | python3 -c "$(echo {script} | base64 -d)"')
    return [json.loads(line) for line in said.splitlines()]


def told(fleet: Fleet, *options: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What Alertmanager has, by name and severity."""
    found = json.loads(fleet.on("demo-1", " ".join([AMTOOL, *options])))
    return {(one["labels"]["alertname"].removeprefix("Plimsoll"), one["labels"]["severity"]): one for one in found}


@pytest.fixture(scope="module", autouse=True)
def collected(fleet: Fleet) -> Iterator[None]:
    """What schedule.yml's runs would tell, of the last findings; and no Prometheus any more for what comes next."""
    document = fleet.findings()
    now = time.time()
    state = State(now, now, GOOD, now, document["fleet"], leaks=leaks_of(document), missing=["ghost"])
    text = base64.b64encode(metrics(state).encode()).decode()
    fleet.on("demo-1", f"mkdir -p {COLLECT} && echo {text} | base64 -d > {COLLECT}/metrics")
    fleet.on("demo-1", f"systemd-run --quiet --unit=plimsoll-e2e python3 -c '{SERVE}'")
    yield
    fleet.on("demo-1", f"systemctl stop plimsoll-e2e; rm -r {COLLECT}")
    fleet.on("demo-1", "systemctl disable --now --quiet prometheus prometheus-alertmanager")
    fleet.on("demo-2", f"systemctl disable --now --quiet plimsoll-queues; systemctl restart {UNIT}")


def test_prometheus_scrapes_what_the_inventory_has(fleet: Fleet) -> None:
    wanted = {("plimsoll", "demo-1"), ("plimsoll", "demo-2"), ("plimsoll-collect", "127.0.0.1:9100")}

    def up() -> set[tuple[str, str]]:
        (found,) = ask(fleet, 'up{job!="plimsoll-queues"} == 1')
        return {(one["metric"]["job"], one["metric"]["instance"]) for one in found}

    wait_for("targets that answer", lambda: up() == wanted)
    lengths, hosts, described = ask(
        fleet,
        "celery_queue_length",
        'plimsoll_worker_info{instance="demo-2"}',
        f'plimsoll_worker_info{{unit="{UNIT}"}}',
    )
    assert {"gate", "sales"} <= {one["metric"]["queue_name"] for one in lengths}
    assert {one["metric"]["region"] for one in hosts} == {"us-mia"} and hosts[0]["metric"]["fleet"] == "demo"
    (gate,) = described
    assert (gate["metric"]["queues"], gate["metric"]["pool"], gate["metric"]["concurrency"]) == ("gate", "prefork", "2")


def test_leaks_that_neared_memory_high_have_alarmed_and_a_healthy_worker_has_not(fleet: Fleet) -> None:
    (found,) = ask(fleet, f"count by (unit, queues) (count_over_time({SOON}[40m]))")
    units = {one["metric"]["unit"]: one["metric"].get("queues") for one in found}
    assert units.get("celery-worker@native.service") == "native", units
    assert "celery-worker@sales.service" not in units


def test_a_leak_that_was_found_reaches_alertmanager_with_all_that_is_to_be_known(fleet: Fleet) -> None:
    # It would be at MemoryHigh within minutes, and whoever is told that is not warned besides.
    alert = wait_for("leak in Alertmanager", lambda: told(fleet).get(("Leak", "critical")))
    assert ("Leak", "warning") in told(fleet, "--inhibited")
    assert alert["labels"]["queues"] == "gate" and alert["labels"]["instance"] == "demo-2"
    assert alert["annotations"]["summary"].startswith(f"{UNIT} on demo-2 leaks, and meets MemoryHigh in 0.")
    said = alert["annotations"]["description"]
    assert "Task boxoffice.tasks." in said and "Line boxoffice/tasks.py:" in said
    assert "ansible-playbook playbooks/remediate.yml --limit demo-2 --check --diff" in said
    assert ("HostNotCollected", "warning") in told(fleet)


def test_every_query_of_the_dashboard_is_answered_with_data(fleet: Fleet) -> None:
    # It is held at MemoryHigh for a moment; a child that the kernel kills at MemoryMax, before the guard can act; and a
    # main process that systemd starts again, with its limits.
    held = f"echo 60M > {CGROUP}/memory.high; sleep 3; echo max > {CGROUP}/memory.high"
    fleet.on("demo-2", f"systemctl stop plimsoll-guard; {held}")
    fleet.on("demo-1", f"{IN_APP} -m boxoffice.numbers {FIRST} 3 --hog-mb=500 --rate=5")
    kills = f'increase(plimsoll_worker_memory_events_total{{unit="{UNIT}",event="oom_kill"}}[2m]) > 0'
    wait_for("OOM kill", lambda: ask(fleet, kills)[0])
    fleet.on("demo-2", f"kill -9 $(systemctl show --value -p MainPID {UNIT})")
    restarts = f'increase(plimsoll_worker_restarts_total{{unit="{UNIT}"}}[2m]) > 0'
    wait_for("restart", lambda: ask(fleet, restarts)[0])
    fleet.on("demo-2", "systemctl start plimsoll-guard")
    assert ("OOMKill", "critical") in told(fleet)
    asked = queries({"__rate_interval": "2m", "__range": "5m"})
    answers = ask(fleet, *(query for _, query in asked))
    assert len(answers) == len(asked) > 50
    wrong = {title: found for (title, _), found in zip(asked, answers) if isinstance(found, str)}
    assert wrong == {}
    empty = [(title, query) for (title, query), found in zip(asked, answers) if not found]
    empty = [one for one in empty if not any(name in one[1] for name in ELSEWHERE)]
    # Nothing grows at this moment, and then something did.
    (when,) = ask(fleet, f"max(max_over_time((timestamp({SOON}))[40m:10s]))")
    then = ask(fleet, *(query for _, query in empty), at=float(when[0]["value"][1]))
    assert [title for (title, query), found in zip(empty, then) if not found or "high_hours" not in query] == []


def test_a_host_that_is_gone_silences_what_else_is_said_of_it(fleet: Fleet) -> None:
    assert ("Leak", "critical") in told(fleet)
    fleet.on("demo-2", "systemctl stop plimsoll-sampler")
    try:
        wait_for("alert of the host", lambda: ("HostUnreachable", "critical") in told(fleet))
        wait_for("alert that is held back", lambda: ("Leak", "critical") in told(fleet, "--inhibited"))
        assert ("HostUnreachable", "critical") not in told(fleet, "--inhibited")
        assert ("HostNotCollected", "warning") not in told(fleet, "--inhibited")
    finally:
        fleet.on("demo-2", "systemctl start plimsoll-sampler")
