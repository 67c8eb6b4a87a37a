"""RabbitMQ in the place of Redis: what happens to tasks, and to a broker that is deployed again.

demo-1 becomes the broker, and demo-2 has the worker. Numbers are still counted in the Redis of demo-1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from .lab_fleet import SETTINGS, Fleet
from .numbered import HANG, PID, UNIT, Row, table, under_load

ROWS: list[Row] = []
# Above the numbers of the tests with Redis.
FIRST = 100_000


def load(fleet: Fleet, *args: Any, **more: Any) -> None:
    under_load(fleet, ROWS, *args, **more, sender="demo-2", first=FIRST)


@pytest.fixture(scope="module")
def changes(fleet: Fleet) -> Iterator[dict[str, Any]]:
    """The inventory's groups as they are to be, and what is set besides."""
    plugin = fleet.inventory / "linode_fleet.yml"
    had = plugin.read_text()
    declared = yaml.safe_load(had)
    groups = {"rabbitmq_broker": "linode_index == 1", "celery_workers": "linode_index == 2"}
    plugin.write_text(yaml.safe_dump({**declared, "groups": {**declared["groups"], **groups}}))
    password = (fleet.home / "lab" / "redis_password").read_text().split()[0]
    address = "{{ hostvars['demo-1']['linode_private_ipv4'] }}"
    yield {
        "rabbitmq_broker_password": "one-password-of-many",
        "rabbitmq_broker_bind": "{{ [linode_private_ipv4] }}",
        # demo-1 has 1 GiB, and an idle worker and Redis on it.
        "rabbitmq_broker_memory_watermark": "160M",
        "rabbitmq_broker_memory_max": "400M",
        "rabbitmq_broker_disk_free_limit": "200M",
        "celery_worker_broker_url": f"amqp://celery:{{{{ rabbitmq_broker_password }}}}@{address}:5672/celery",
        "celery_worker_environment": {
            **SETTINGS["celery_worker_environment"],  # type: ignore[dict-item]
            "BOXOFFICE_LEDGER": f"redis://:{password}@{address}:6379/0",
        },
    }
    # As before for whatever comes next.
    plugin.write_text(had)


def deploy(fleet: Fleet, changes: dict[str, Any], *options: str) -> dict[str, tuple[int, int]]:
    ran = fleet.play("deploy", "--extra-vars", json.dumps(changes), *options)
    assert ran.code == 0, ran.output
    return ran.recap


def test_rabbitmq_is_deployed_and_a_second_run_of_it_changes_nothing(fleet: Fleet, changes: dict[str, Any]) -> None:
    deploy(fleet, changes)
    again = deploy(fleet, changes, "--tags=rabbitmq_broker")
    assert {changed for changed, _ in again.values()} == {0}
    # RabbitMQ and Erlang's port mapper and nodes.
    listening = fleet.on("demo-1", "ss -Hltn 'sport = :5672 or sport = :4369 or sport = :25672'").splitlines()
    local = {line.split()[3] for line in listening}
    assert {"127.0.0.1:4369", "127.0.0.1:5672", "127.0.0.1:25672"} < local and len(local) == 4, local


def test_a_restart(fleet: Fleet) -> None:
    load(fleet, "systemctl restart", True, ("demo-2", f"systemctl restart {UNIT}"))


def test_a_main_process_that_is_killed(fleet: Fleet) -> None:
    load(fleet, "kill -9 of the main process", False, ("demo-2", f"kill -9 $({PID})"))


def test_a_loop_that_hangs(fleet: Fleet) -> None:
    before = fleet.on("demo-2", PID)
    load(fleet, "event loop that hangs", False, ("demo-2", HANG))
    assert fleet.on("demo-2", PID) != before


def test_a_broker_that_is_restarted(fleet: Fleet) -> None:
    load(fleet, "restart of the broker", False, ("demo-1", "systemctl restart rabbitmq-server"))


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(table(ROWS))
    assert len(ROWS) == 4


def test_a_new_password_reaches_broker_and_workers_in_one_run(fleet: Fleet, changes: dict[str, Any]) -> None:
    before = fleet.on("demo-2", PID)
    deploy(fleet, {**changes, "rabbitmq_broker_password": "another-password-of-many"})
    assert fleet.on("demo-2", PID) != before
    old = "rabbitmqctl -q authenticate_user celery one-password-of-many"
    assert fleet.lab("ssh", "demo-1", old).code != 0
