"""remediate.yml on real machines and under load: planned, contained, proven, and taken away again. No task is lost.

Numbered tasks that leak run on the worker gate of demo-2 all the while, and each counts itself in the broker once it is
done.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .lab_fleet import IN_APP, Fleet, Ran
from .numbered import PATIENCE_S, UNIT, counts

FIRST, COUNT, RATE, KEEP_KB = 500_000, 1_900, 2.5, 250
LOAD = f"{FIRST} {COUNT} --rate={RATE} --seconds=0.1 --keep-kb={KEEP_KB}"
# Until a leak of 0.6 MiB a second is told; each child has 42 MiB of room then, for some two minutes.
SEEN_S = 75
DROPINS = f"/etc/systemd/system/{UNIT}.d"
DROPIN = f"{DROPINS}/60-remedy.conf"
# The unit does not start any more once a remedy is there.
BROKEN = f"[Service]\\nExecStartPre=/bin/sh -c '! test -e {DROPIN}'\\n"
SINCE = f"systemctl show --value -p InactiveExitTimestampMonotonic {UNIT}"


def play(fleet: Fleet, name: str, *options: str, **extra: Any) -> Ran:
    """With a store of its own, as what the tests before have left there tells of other loads."""
    places = {f"collect_{one}": str(fleet.home / "remediated" / one) for one in ("store", "report")}
    return fleet.play(name, *options, f"--extra-vars={json.dumps({**places, **extra})}")


@pytest.fixture(scope="module")
def load(fleet: Fleet) -> Iterator[threading.Thread]:
    """Under way for SEEN_S, on a worker that has just begun, and of which nothing was sampled before."""
    for host in ("demo-1", "demo-2"):
        fleet.on(host, "systemctl stop plimsoll-sampler; rm -f /var/log/plimsoll/samples/*")
    fleet.on("demo-2", f"systemctl restart {UNIT}")
    for host in ("demo-1", "demo-2"):
        fleet.on(host, "systemctl start plimsoll-sampler")
    said: list[Ran] = []
    sending = threading.Thread(
        target=lambda: said.append(
            fleet.run("scripts/lab", "ssh", "demo-1", f"{IN_APP} -m boxoffice.numbers {LOAD}", timeout=3 * COUNT / RATE)
        )
    )
    sending.start()
    time.sleep(SEEN_S)
    ran = play(fleet, "collect")
    assert ran.code == 0 and "LEAK" in ran.output, ran.output
    yield sending
    sending.join(2 * COUNT / RATE)
    assert f"{COUNT} sent" in said[0].output, said


def log(fleet: Fleet) -> list[dict[str, Any]]:
    path = fleet.home / "remediated" / "store" / "remediation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_check_mode_prints_the_plan_and_the_drop_in_and_does_nothing(fleet: Fleet, load: Any) -> None:
    since = fleet.on("demo-2", SINCE)
    ran = play(fleet, "remediate", "--check", "--diff")
    assert ran.code == 0, ran.output
    assert "CONTAIN demo-2 gate: " in ran.said, ran.output
    # (85 % of 280 MiB - 64 MiB) / 2 children.
    assert '+Environment="CELERY_REMEDY_ARGS=--max-memory-per-child=89088"' in ran.output, ran.output
    assert "Order: demo-2" in ran.said and "undo: remediate.yml -e remediation_state=absent" in ran.said
    assert log(fleet) == [] and fleet.on("demo-2", SINCE) == since
    assert "60-remedy.conf" not in fleet.on("demo-2", f"ls {DROPINS}")


def test_outside_of_the_window_nothing_is_done(fleet: Fleet, load: Any) -> None:
    hour = time.gmtime().tm_hour
    closed = f"{(hour + 12) % 24:02}:00-{(hour + 13) % 24:02}:00"
    ran = play(fleet, "remediate", remediation_window=closed)
    assert ran.code == 0 and f"outside of remediation_window ({closed} UTC)" in ran.said, ran.output
    assert "60-remedy.conf" not in fleet.on("demo-2", f"ls {DROPINS}")


def test_a_worker_that_does_not_start_with_it_is_put_back_and_it_is_not_tried_again(fleet: Fleet, load: Any) -> None:
    fleet.on("demo-2", f'printf "{BROKEN}" > {DROPINS}/55-broken.conf && systemctl daemon-reload')
    try:
        ran = play(fleet, "remediate")
        assert ran.code != 0 and "it is back at what it had, and works" in ran.said, ran.output
        assert [one["event"] for one in log(fleet)][-1] == "failed"
        assert "60-remedy.conf" not in fleet.on("demo-2", f"ls {DROPINS}")
        assert fleet.on("demo-2", f"systemctl is-active {UNIT}").strip() == "active"
    finally:
        fleet.on("demo-2", f"rm {DROPINS}/55-broken.conf && systemctl daemon-reload")
    # It was restarted, so that what was seen is not of it.
    ran = play(fleet, "remediate", "--check")
    assert "it was restarted after these findings; run playbooks/collect.yml first" in ran.said, ran.output
    time.sleep(SEEN_S)
    assert play(fleet, "collect").code == 0
    ran = play(fleet, "remediate", "--check")
    assert "contain was of no use to it before (failed, " in ran.said, ran.output


def test_under_load_it_is_contained_and_proven(fleet: Fleet, load: Any) -> None:
    # As whoever has mended what was in the way does.
    path = fleet.home / "remediated" / "store" / "remediation.jsonl"
    path.rename(path.with_suffix(".old"))
    ran = play(fleet, "remediate", remediation_wait_s=480)
    assert ran.code == 0, ran.output
    assert "demo-2 gate: contain: done in" in ran.said, ran.output
    assert "demo-2 gate: contain: CONTAINED: " in ran.said, ran.output
    lines = log(fleet)
    assert [one["event"] for one in lines] == ["planned", "done", "proven"], lines
    proven = lines[-1]
    assert proven["after"]["ended"] >= 3 and proven["after"]["peak_kb"] < 280 << 10, proven
    assert proven["after"]["tasks_per_minute"] > 0.7 * proven["before"]["tasks_per_minute"], proven
    report = fleet.home / "remediated" / "report"
    workers = json.loads((report / "findings.json").read_text())["workers"]
    (gate,) = [one for one in workers if one["unit"] == UNIT]
    assert gate["remedy"]["state"] == "contained" and gate["hours_to_memory_max"] is None
    page = (report / "report.html").read_text()
    assert "contained" in page and "--max-memory-per-child=89088" in page


def test_a_second_run_changes_nothing(fleet: Fleet, load: Any) -> None:
    since = fleet.on("demo-2", SINCE)
    ran = play(fleet, "remediate")
    assert ran.code == 0 and {changed for changed, _ in ran.recap.values()} == {0}, ran.output
    assert "contained by contain, as is proven" in ran.said and fleet.on("demo-2", SINCE) == since


def test_what_is_taken_away_leaves_the_host_as_deployed_and_no_task_is_lost(
    fleet: Fleet, load: threading.Thread, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = play(fleet, "remediate", remediation_state="absent")
    assert ran.code == 0 and "demo-2 gate: remove: removed" in ran.said, ran.output
    assert "60-remedy.conf" not in fleet.on("demo-2", f"ls {DROPINS}") and log(fleet)[-1]["event"] == "removed"
    args = fleet.on("demo-2", f"tr '\\0' ' ' < /proc/$(systemctl show --value -p MainPID {UNIT})/cmdline")
    assert "--concurrency=2" in args and "max-memory" not in args
    ran = fleet.play("deploy", "--check", "--limit=demo-2")
    assert {changed for changed, _ in ran.recap.values()} == {0}, ran.output

    load.join(2 * COUNT / RATE)
    deadline = time.monotonic() + PATIENCE_S
    while len(done := sent(fleet)) < COUNT and time.monotonic() < deadline:
        time.sleep(3)
    time.sleep(3)
    done = sent(fleet)
    twice = {n: times for n, times in done.items() if times > 1}
    with capsys.disabled():
        print(f"\n{COUNT} numbered tasks through it all: {len(done)} done, {len(twice)} twice")
    assert len(done) == COUNT, sorted(set(range(FIRST, FIRST + COUNT)) - set(done))
    assert not twice
    # What comes next finds a worker that has not grown.
    fleet.on("demo-2", f"systemctl restart {UNIT}")


def sent(fleet: Fleet) -> dict[int, int]:
    return {n: times for n, times in counts(fleet).items() if FIRST <= n < FIRST + COUNT}
