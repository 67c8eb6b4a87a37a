"""remediate.yml on real machines under load, with a leak of each kind: planned, remedied, proven, and taken away again.

Numbered tasks that leak run on all these workers the while, and each notes its run in the broker once it is done. None
is lost. Of the kinds in docs/leaks.md copy-on-write alone is not here, as it does not grow RSS and is no finding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from .lab_fleet import IN_APP, Fleet, Ran, wait_for
from .leaky_workers import leaky_workers
from .numbered import PATIENCE_S, UNIT, more_than_once, runs

# More numbers than are needed: it is asked to end.
FIRST, COUNT, RATE, KEEP_KB = 500_000, 9_000, 2.5, 220
# Beside gate, which leaks Python's objects in the children of a prefork pool.
POOLS = {"demo-1": {"descriptors": "prefork", "fragments": "solo"}, "demo-2": {"cache": "solo", "native": "threads"}}
# Of each queue the task, and that it comes with every Nth number.
LEAKS = {
    "cache": ("filling_cache", 3),
    "fragments": ("fragmentation", 4),
    "descriptors": ("unclosed", 1),
    "native": ("native", 2),
}
# MiB of MemoryHigh: of two so little that a child or a clock ends them within minutes, and not the guard before that.
HIGH_MB = {"cache": 280, "descriptors": 165, "fragments": 280, "native": 160}
# Half of what arms a window in this lab, as these leak more slowly than gate.
ARMED = "Environment=PLIMSOLL_TRACE_ARM_KB=4096\n"
SETTINGS = {name: f"MemoryHigh={high}M\nMemoryMax={high + 40}M\n{ARMED}" for name, high in HIGH_MB.items()}
LOAD = f"boxoffice.numbers {FIRST} {COUNT} --rate={RATE} --seconds=0.1 --keep-kb={KEEP_KB}" + "".join(
    f" --leak={queue}={task}/{every}" for queue, (task, every) in LEAKS.items()
)
# Until a leak of 0.1 MiB a second is told, which is traced once it has grown by 4 MiB; on slow machines later.
SEEN_S = 85
TOLD = {
    "celery-worker@cache.service": "cache_filling",
    "celery-worker@fragments.service": "fragmentation",
    "celery-worker@descriptors.service": "file_descriptors",
    "celery-worker@native.service": "native",
}
DROPINS = f"/etc/systemd/system/{UNIT}.d"
DROPIN = f"{DROPINS}/60-remedy.conf"
CACHE = "celery-worker@cache.service"
ASK = f"""{IN_APP} -c 'from boxoffice import app
asked = {{"window_s": 15, "frames": 1}}
print(app.control.broadcast("plimsoll_window", asked, destination=["cache@demo-2"], reply=True, timeout=20))'"""
# The unit does not start any more once its remedy is gone.
BROKEN = f"[Service]\\nExecStartPre=/usr/bin/test -e {DROPIN}\\n"
SINCE = "systemctl show --value -p InactiveExitTimestampMonotonic celery-worker@{gate,native}.service"
# A restart of some minutes, which by default is for a person.
POLICY = {"remediation_least_uptime_h": 0.02, "diagnose_window_s": 15}


def play(fleet: Fleet, name: str, *options: str, **extra: Any) -> Ran:
    """With a store of its own, as what the tests before have left there tells of other loads."""
    places = {f"collect_{one}": str(fleet.home / "remediated" / one) for one in ("store", "report")}
    sources = (f"--extra-vars={json.dumps({**places, **POLICY, **extra})}", *options)
    return fleet.play(name, *sources, timeout=1200)


@pytest.fixture(scope="module")
def load(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], int]]:
    """Under way for SEEN_S, on workers that have just begun, and of which nothing was sampled before."""
    for host in POOLS:
        fleet.on(host, "systemctl stop plimsoll-sampler; rm -f /var/log/plimsoll/samples/* /var/log/plimsoll/trace/*")
    # As if they had been traced of themselves within the hour. Of gate, remediate.yml then has to; and a cache is told
    # by a window that is asked for, as that alone looks at what holds objects.
    for unit in (CACHE, UNIT):
        fleet.on("demo-2", f"runuser -u celery -- sh -c 'date +%s > /var/log/plimsoll/trace/.{unit}.lock'")
    fleet.on("demo-1", "apt-get install --yes --quiet=2 libjemalloc2")
    fleet.on("demo-2", f"systemctl restart {UNIT}")
    with declared(fleet), leaky_workers(fleet, tmp_path_factory.mktemp("leaks"), POOLS, SETTINGS):
        for host in POOLS:
            fleet.on(host, "systemctl start plimsoll-sampler")
        with fleet.sending(LOAD) as end:
            time.sleep(SEEN_S / 3)
            assert "window" in fleet.on("demo-1", ASK)
            time.sleep(SEEN_S * 2 / 3)
            wait_for("leak of each kind that is told", lambda: TOLD.items() <= leaks(fleet).items(), 180)
            yield end
    # What comes next finds a worker that has not grown.
    fleet.on("demo-2", f"systemctl restart {UNIT}")


def leaks(fleet: Fleet) -> dict[str, str]:
    """What is said to leak once it is collected, and how; printed for whoever reads a failure."""
    ran = play(fleet, "collect")
    assert ran.code == 0, ran.output
    found = json.loads((fleet.home / "remediated" / "report" / "findings.json").read_text())
    leak = {one["unit"]: one["leak_class"] for one in found["workers"] if one["leaking"]}
    print(leak)
    return leak


@pytest.fixture(scope="module")
def deployed(fleet: Fleet, load: Any) -> dict[str, str]:
    """As it was before any remedy."""
    return units(fleet)


@contextmanager
def declared(fleet: Fleet) -> Iterator[None]:
    """These workers are in the inventory too, as remediate.yml leaves alone what is not."""
    files = {host: fleet.inventory / "host_vars" / f"{host}.yml" for host in POOLS}
    had = {host: path.read_text() for host, path in files.items()}
    for host, there in POOLS.items():
        mine = yaml.safe_load(had[host])
        more = [{"name": name, "queues": [name], "pool": pool, "concurrency": 1} for name, pool in there.items()]
        mine["celery_worker_instances"] += more
        files[host].write_text(yaml.safe_dump(mine))
    try:
        yield
    finally:
        for host, path in files.items():
            path.write_text(had[host])


def units(fleet: Fleet) -> dict[str, str]:
    """All that systemd and Celery are told, by host."""
    files = "find /etc/systemd /etc/celery -type f -exec sha256sum {} + | sort"
    return {host: fleet.on(host, files) for host in POOLS}


def log(fleet: Fleet) -> list[dict[str, Any]]:
    path = fleet.home / "remediated" / "store" / "remediation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_check_mode_prints_the_plan_and_the_drop_ins_and_does_nothing(
    fleet: Fleet, load: Any, deployed: dict[str, str]
) -> None:
    since = fleet.on("demo-2", SINCE)
    ran = play(fleet, "remediate", "--check", "--diff")
    assert ran.code == 0, ran.output
    for line in (
        "TRACE demo-2 gate: growing, ",
        "ALLOCATOR demo-1 fragments: fragmentation, ",
        "CONTAIN demo-1 descriptors: file_descriptors, ",
        "CONTAIN demo-2 gate: ",
        "CONTAIN demo-2 native: native, ",
        "leave demo-2 cache: a cache that fills up to its bound",
        "undo: remediate.yml -e remediation_state=absent",
        "Order: demo-1, then demo-2",
    ):
        assert line in ran.said, ran.output
    # (85 % of 280 MiB - 64 MiB) / 2 children.
    assert '+Environment="CELERY_REMEDY_ARGS=--max-memory-per-child=89088"' in ran.output, ran.output
    assert '+Environment="CELERY_REMEDY_ARGS=--max-tasks-per-child=' in ran.output, ran.output
    assert "+Environment=LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2" in ran.output, ran.output
    assert "+RuntimeMaxSec=" in ran.output, ran.output
    assert log(fleet) == [] and fleet.on("demo-2", SINCE) == since
    assert units(fleet) == deployed


def test_outside_of_the_window_nothing_is_done(fleet: Fleet, load: Any, deployed: dict[str, str]) -> None:
    hour = time.gmtime().tm_hour
    closed = f"{(hour + 12) % 24:02}:00-{(hour + 13) % 24:02}:00"
    ran = play(fleet, "remediate", remediation_window=closed)
    assert ran.code == 0 and f"outside of remediation_window ({closed} UTC)" in ran.said, ran.output
    assert units(fleet) == deployed


def test_under_load_each_is_remedied_or_contained_and_proven(
    fleet: Fleet, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    ran = play(fleet, "remediate", remediation_wait_s=600)
    assert ran.code == 0, ran.output
    traced, *lines = log(fleet)
    assert (traced["unit"], traced["act"], traced["event"]) == (UNIT, "trace", "done"), traced
    proven = {(one["unit"], one["act"]): one for one in lines if one["event"] == "proven"}
    with capsys.disabled():
        print(f"\n{'worker':<32} {'act':<10} {'verdict':<12} why, {time.monotonic() - began:.0f} s for all")
        for (unit, act), one in proven.items():
            print(f"{unit:<32} {act:<10} {one['verdict']:<12} {one['why']}")
    assert {(unit, act): one["verdict"] for (unit, act), one in proven.items()} == {
        ("celery-worker@descriptors.service", "contain"): "contained",
        ("celery-worker@fragments.service", "allocator"): "remedied",
        ("celery-worker@gate.service", "contain"): "contained",
        ("celery-worker@native.service", "contain"): "contained",
    }, ran.output
    assert sorted(one["event"] for one in lines) == ["done"] * 4 + ["planned"] * 4 + ["proven"] * 4, lines
    gate = proven[UNIT, "contain"]
    assert gate["after"]["ended"] >= 3 and gate["after"]["peak_kb"] < 280 << 10, gate
    assert gate["after"]["tasks_per_minute"] > 0.7 * gate["before"]["tasks_per_minute"], gate
    report = fleet.home / "remediated" / "report"
    workers = {one["unit"]: one for one in json.loads((report / "findings.json").read_text())["workers"]}
    assert workers[UNIT]["leak_class"] == "python_objects" and workers[UNIT]["culprits"][0]["file"].endswith("tasks.py")
    assert workers[UNIT]["remedy"]["state"] == "contained" and workers[UNIT]["hours_to_memory_max"] is None
    assert workers["celery-worker@fragments.service"]["remedy"]["state"] == "remedied"
    page = (report / "report.html").read_text()
    assert "contained" in page and "remedied" in page and "--max-memory-per-child=89088" in page


def test_a_second_run_changes_nothing(fleet: Fleet, load: Any) -> None:
    # native is restarted by the clock.
    since = fleet.on("demo-2", SINCE.replace("native", "gate"))
    ran = play(fleet, "remediate")
    assert ran.code == 0 and {changed for changed, _ in ran.recap.values()} == {0}, ran.output
    assert "contained by contain, as is proven" in ran.said, ran.output
    assert fleet.on("demo-2", SINCE.replace("native", "gate")) == since


def test_what_is_cordoned_takes_no_task_and_runs_on(fleet: Fleet, load: Any) -> None:
    main = fleet.on("demo-2", f"systemctl show --value -p MainPID {CACHE}")
    ran = play(fleet, "remediate", "--limit=demo-2", remediation_cordon=["demo-2:cache"])
    assert ran.code == 0 and "demo-2 cache: cordon: done" in ran.said, ran.output
    before = done(fleet, at=1)
    time.sleep(10)
    assert before and done(fleet, at=1) == before
    assert fleet.on("demo-2", f"systemctl show --value -p MainPID {CACHE}") == main
    ran = play(fleet, "remediate", "--limit=demo-2", "--check")
    assert "demo-2 cache: it is cordoned, and kept for inspection" in ran.said, ran.output
    # What has waited is done.
    fleet.on("demo-2", f"systemctl restart {CACHE}")


def test_a_worker_that_does_not_start_after_an_act_is_put_back(fleet: Fleet, load: Any) -> None:
    fleet.on("demo-2", f'printf "{BROKEN}" > {DROPINS}/65-broken.conf && systemctl daemon-reload')
    try:
        ran = play(fleet, "remediate", "--limit=demo-2", remediation_state="absent")
        assert ran.code != 0 and "it is back at what it had, and works" in ran.said, ran.output
        assert (log(fleet)[-1]["event"], log(fleet)[-1]["unit"]) == ("failed", UNIT)
        assert "60-remedy.conf" in fleet.on("demo-2", f"ls {DROPINS}")
        assert fleet.on("demo-2", f"systemctl is-active {UNIT}").strip() == "active"
    finally:
        fleet.on("demo-2", f"rm {DROPINS}/65-broken.conf && systemctl daemon-reload")


def test_what_is_taken_away_leaves_the_hosts_as_deployed_and_no_task_is_lost(
    fleet: Fleet, load: Callable[[], int], deployed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = play(fleet, "remediate", remediation_state="absent")
    assert ran.code == 0 and "demo-2 gate: remove: removed" in ran.said, ran.output
    assert units(fleet) == deployed and log(fleet)[-1]["event"] == "removed"
    args = fleet.on("demo-2", f"tr '\\0' ' ' < /proc/$(systemctl show --value -p MainPID {UNIT})/cmdline")
    assert "--concurrency=2" in args and "max-memory" not in args

    sent = load()
    deadline = time.monotonic() + PATIENCE_S
    while sum(len(done(fleet, at)) for at in range(5)) < sent and time.monotonic() < deadline:
        time.sleep(3)
    time.sleep(3)
    found = {n: ran for at in range(5) for n, ran in done(fleet, at).items()}
    twice = more_than_once(found)
    with capsys.disabled():
        print(f"\n{sent} numbered tasks through it all: {len(found)} done, {len(twice)} twice")
    assert sent > 1000 and len(found) == sent and not twice, (twice, {at: len(done(fleet, at)) for at in range(5)})


def done(fleet: Fleet, at: int = 0) -> dict[int, list[str]]:
    """The runs of each number that was done: of gate with 0, and of LEAKS from 1 on."""
    return runs(fleet, FIRST + at * 1_000_000, COUNT)
