"""The store: what hosts sent is in it once, whatever happens; one bad host costs the others nothing, and is named."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from plimsoll import formats, store
from plimsoll.bundle import Cursor, listing, pack, plan, sha256
from plimsoll.formats import InputError, Rollup, Sample, schema
from plimsoll.samples import HostData
from plimsoll.store import TABLES, Host, cursor_file, escaped, ingest, live, read_host, read_hosts

DAY = 86400
# The begin of a day.
T0 = 1_763_942_400
UNIT = "celery-worker@gate.service"
SAMPLES = "timestamp,pid,rss_kb,command,unit,start_time,role,pss_kb,uss_kb,swap_kb,fds,threads,tasks\n"
ROLLUPS = "timestamp,pid,unit,start_time,role,count,floor_kb,median_kb,max_kb,tasks\n"
FIGURES = (
    "timestamp,unit,memory_current_kb,memory_high_kb,memory_max_kb,swap_kb,events_high,events_max,oom_kill,"
    "pressure_some_us,pressure_full_us,n_restarts\n"
)
GATE = {
    **{"Id": UNIT, "ActiveState": "active", "SubState": "running", "Result": "success", "NRestarts": "3"},
    **{"MemoryHigh": "1073741824", "MemoryMax": "infinity", "MemorySwapMax": "0"},
}


def sample(second: float, size: int = 90_000, pid: int = 7, tasks: int | str = "", command: str = "celery") -> str:
    return f"{T0 + second:.2f},{pid},{size},{command},{UNIT},{T0 - 900}.25,child,,,,,,{tasks}\n"


def rollup(second: int, floor: int = 80_000, pid: int = 7, count: int = 10, tasks: int = 5) -> str:
    return f"{T0 + second},{pid},{UNIT},{T0 - 900}.25,child,{count},{floor},{floor + 1},{floor + 2},{tasks}\n"


def figure(second: float, level: int = 500) -> str:
    return f"{T0 + second:.2f},{UNIT},{level},600,700,0,0,0,0,0,0,1\n"


def event(second: float, message: str = "Scheduled restart job", **other: Any) -> dict[str, Any]:
    head = {"time": T0 + second, "unit": UNIT, "source": "systemd", "priority": 4, "pid": 1, "message": message}
    return {**head, **other}


def act(second: float, action: str = "restart", **other: Any) -> str:
    return json.dumps({"time": T0 + second, "unit": UNIT, "action": action, "reason": "full", **other}) + "\n"


def record(second: float, **other: Any) -> str:
    return json.dumps({"time": T0 + second, "unit": UNIT, "pid": 7, "kind": "task_growth", **other}) + "\n"


class Fleet:
    """Hosts with logs, their bundles as they make them, and the store that these come into."""

    def __init__(self, root: Path) -> None:
        self.root, self.inbox, self.store = root, root / "inbox", root / "store"
        self.inbox.mkdir(parents=True)
        self.now = T0 + 3600.0

    def log(self, host: str, name: str, *lines: str) -> None:
        """More lines in one of a host's files; a segment begins with its header."""
        path = self.root / "hosts" / host / name
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = {"samples": SAMPLES, "rollup": ROLLUPS, "cgroup": FIGURES, "units": FIGURES}
        with path.open("a") as file:
            if not path.stat().st_size and name.startswith("samples/"):
                file.write(begins[path.name.split("-")[0]])
            file.writelines(lines)

    def send(
        self,
        host: str,
        events: Sequence[Mapping[str, Any]] = (),
        max_bytes: int = 1 << 20,
        cursor: Cursor | None = None,
        **meta: Any,
    ) -> dict[str, Any]:
        """Packs what is behind the cursor; what ingest() is asked then."""
        path = cursor_file(self.store, host)
        if cursor is None:
            cursor = Cursor.of(json.loads(path.read_text())["cursor"]) if path.exists() else Cursor(logs=host)
        logs, left_out = listing(self.root / "hosts" / host, ("samples", "trace", "guard"))
        parts, more = plan(logs, cursor, max_bytes)
        facts = {"kernel": "6.1.0", "python": "3.11.2", "units": [GATE]}
        head = {"schema": 2, "logs": host, "held": [log.key for log in logs], "journal": 5, "more": more}
        text = "".join(json.dumps(one) + "\n" for one in events).encode()
        target = self.inbox / f"{host}.tar.gz"
        made = pack(parts, {**head, **facts, **meta}, text, target, left_out)
        return {"host": host, "sha256": made.sha256, "reason": "", "same": False}

    def take(self, *asked: Mapping[str, Any], fleet: Sequence[str] | None = None, **bounds: Any) -> list[Host]:
        given = {"keep_days": 30, "keep_rollups_days": 400, "max_bytes": 1 << 20, "now": self.now, **bounds}
        names = [str(one["host"]) for one in asked] if fleet is None else fleet
        hosts, notes = ingest(self.inbox, self.store, names, asked, **given)
        assert notes == []
        return hosts

    def collect(self, host: str, *events: Mapping[str, Any], **meta: Any) -> str:
        """What is said of a host that is collected."""
        (told,) = self.take(self.send(host, events, **meta))
        assert told["collected"], told
        return told["reason"]

    def rows(self, table: str, host: str = "*") -> list[dict[str, Any]]:
        """All that any reader finds, whatever it is told of the files."""
        kind = TABLES[table]
        paths = sorted(self.store.glob(f"{table}/day=*/host={host}/*.parquet"))
        found = [pl.read_parquet(path, hive_partitioning=False) for path in paths]
        return pl.concat([pl.DataFrame(schema=schema(kind)), *found]).sort(list(kind._fields)).to_dicts()

    def seconds(self, table: str = "samples", host: str = "*") -> list[float]:
        return [next(iter(one.values())) - T0 for one in self.rows(table, host)]

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.store)) for path in self.store.rglob("*") if path.is_file())


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


# ---- what comes in ----

COLUMNS = {
    "samples": "timestamp f,pid i,rss_kb i,command,unit,start_time f,role,pss_kb i,uss_kb i,swap_kb i,fds i,threads i,"
    "tasks i",
    "rollups": "timestamp f,pid i,unit,start_time f,role,count i,floor_kb i,median_kb i,max_kb i,tasks i",
    "cgroups": "timestamp f,unit,memory_current_kb i,memory_high_kb i,memory_max_kb i,swap_kb i,events_high i,"
    "events_max i,oom_kill i,pressure_some_us i,pressure_full_us i,n_restarts i",
    "traces": "time f,unit,pid i,kind,record",
    "events": "time f,unit,source,priority i,pid i,message",
    "units": "time f,unit,kernel,python,active_state,sub_state,result,n_restarts i,memory_high_kb i,memory_max_kb i,"
    "memory_swap_max_kb i",
}
TYPES = {"": pl.String, "f": pl.Float64, "i": pl.Int64}


def test_all_that_a_host_sends_is_in_its_table_by_day_and_host(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-20251124T000000Z.csv", sample(60.25, tasks=17, command='"a,b"'), sample(-60))
    fleet.log("w-1", "samples/rollup-20251124T000000Z.csv", rollup(600))
    fleet.log("w-1", "samples/cgroup-20251124T000000Z.csv", figure(60.25))
    fleet.log("w-1", "samples/units-20251124T000000Z.csv", figure(540.25))
    fleet.log("w-1", f"trace/{UNIT}-7.jsonl", line := record(90, task="shop.scan"))
    fleet.log("w-1", "guard/acts.jsonl", act(100), act(130, "outcome", result="failed"), act(140, "budget_spent"))
    assert fleet.collect("w-1", event(95)) == ""

    today, yesterday = "day=2025-11-24/host=w-1/part-00000001.parquet", "day=2025-11-23/host=w-1/part-00000001.parquet"
    parts = [f"{table}/{today}" for table in TABLES]
    assert fleet.files() == sorted([*parts, f"samples/{yesterday}", "_cursors/w-1.json", "hosts.json", ".lock"])
    for table, columns in COLUMNS.items():
        wanted = {name: TYPES[kind] for name, _, kind in (column.partition(" ") for column in columns.split(","))}
        found = pl.read_parquet_schema(fleet.store / table / today)
        assert found == wanted and list(found) == list(wanted), table
    assert fleet.seconds() == [-60, 60.25]
    one = fleet.rows("samples")[1]
    assert (one["command"], one["unit"], one["start_time"], one["tasks"]) == ("a,b", UNIT, T0 - 899.75, 17)
    assert fleet.rows("rollups")[0] | {"count": 10, "floor_kb": 80_000, "tasks": 5} == fleet.rows("rollups")[0]
    assert fleet.seconds("cgroups") == [60.25, 540.25]
    assert fleet.rows("traces") == [
        {"time": T0 + 90, "unit": UNIT, "pid": 7, "kind": "task_growth", "record": line.rstrip()}
    ]
    assert [(one["source"], one["priority"], one["pid"], one["message"]) for one in fleet.rows("events")] == [
        ("systemd", 4, 1, "Scheduled restart job"),
        ("guard", 5, None, "restart: full"),
        ("guard", 4, None, "outcome: full"),
        ("guard", 4, None, "budget spent: full"),
    ]
    assert fleet.rows("units") == [
        {
            **{"time": fleet.now, "unit": UNIT, "kernel": "6.1.0", "python": "3.11.2", "active_state": "active"},
            **{"sub_state": "running", "result": "success", "n_restarts": 3},
            **{"memory_high_kb": 1 << 20, "memory_max_kb": None, "memory_swap_max_kb": 0},
        }
    ]


def test_rows_are_sorted_by_unit_process_and_time(fleet: Fleet) -> None:
    other = sample(5, pid=3).replace(UNIT, "celery-worker@a.service")
    fleet.log("w-1", "samples/samples-1.csv", sample(9), sample(2, pid=9), sample(3), sample(1, pid=9), other)
    fleet.collect("w-1")
    (path,) = fleet.store.glob("samples/*/*/*")
    assert [time - T0 for time in pl.read_parquet(path)["timestamp"]] == [5, 3, 9, 1, 2]


def test_the_next_bundle_brings_what_is_new_and_one_that_brings_nothing_moves_on(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    fleet.collect("w-1")
    fleet.log("w-1", "samples/samples-1.csv", sample(120))
    fleet.collect("w-1")
    fleet.collect("w-1")
    fleet.log("w-1", "samples/samples-1.csv", sample(180))
    fleet.collect("w-1")
    assert fleet.seconds() == [60, 120, 180]
    assert [path.name for path in sorted(fleet.store.glob("samples/*/*/*"))] == [
        f"part-0000000{number}.parquet" for number in (1, 2, 4)
    ]


def test_properties_of_a_unit_are_a_row_when_they_change(fleet: Fleet) -> None:
    failed = {**GATE, "ActiveState": "failed"}
    for units, kernel in (([GATE], "6.1"), ([GATE], "6.1"), ([failed], "6.1"), ([failed], "6.2"), ([], "6.2")):
        fleet.now += 60
        fleet.collect("w-1", units=units, kernel=kernel)
    assert [(one["time"] - T0 - 3600, one["active_state"], one["kernel"]) for one in fleet.rows("units")] == [
        (60, "active", "6.1"),
        (180, "failed", "6.1"),
        (240, "failed", "6.2"),
    ]


def test_a_large_bundle_is_written_in_several_parts(fleet: Fleet, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "PART_BYTES", 1)
    for number in range(3):
        fleet.log("w-1", f"samples/samples-{number}.csv", sample(60 * number))
    fleet.collect("w-1")
    assert fleet.seconds() == [0, 60, 120]
    names = [path.name for path in sorted(fleet.store.glob("samples/*/*/*"))]
    assert names == ["part-00000001.0001.parquet", "part-00000001.0002.parquet", "part-00000001.parquet"]
    assert len(read_host(fleet.store, "w-1").samples) == 3
    fleet.now += DAY
    fleet.collect("w-1")
    assert [path.name for path in fleet.store.glob("samples/*/*/*")] == ["part-00000001-00000001.parquet"]
    assert fleet.seconds() == [0, 60, 120]


@pytest.mark.parametrize("host", ["w-1.example", "a=b", "50%", "[x]*?", "it's", "a/b", "..", "täglich"])
def test_a_host_may_have_any_name(fleet: Fleet, host: str) -> None:
    fleet.log("logs", "samples/samples-1.csv", sample(60))
    asked = fleet.send("logs")
    path = fleet.inbox / f"{host}.tar.gz"
    path.parent.mkdir(exist_ok=True)
    (fleet.inbox / "logs.tar.gz").rename(path)
    (told,) = fleet.take({**asked, "host": host})
    assert told["collected"]
    assert [path.name for path in fleet.store.glob("samples/*/*")] == [f"host={escaped(host)}"]
    assert len(read_host(fleet.store, host).samples) == 1


def test_views_have_the_host_and_the_day_of_the_path_as_they_are_written(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "it's [a] * ?")
    fleet.log("2025-1-1", "samples/samples-1.csv", sample(60))
    fleet.collect("2025-1-1")
    connection = duckdb.cursor()
    for table in ("samples", "rollups"):
        parts = [part for some in store.files(fleet.store, table, "2025-1-1").values() for part in some]
        store.view(connection, table, parts)
        columns = [f"{name} {kind}" for name, kind, *_ in connection.execute(f"DESCRIBE {table}").fetchall()]
        types = {"": " VARCHAR", "f": " DOUBLE", "i": " BIGINT"}
        wanted = [f"{name}{types[kind]}" for name, _, kind in (one.partition(" ") for one in COLUMNS[table].split(","))]
        assert columns == [*wanted, "host VARCHAR", "day DATE"]
    found = connection.execute("SELECT host, day, timestamp FROM samples").fetchall()
    assert found == [("2025-1-1", date(2025, 11, 24), T0 + 60)]
    assert connection.execute("SELECT * FROM rollups").fetchall() == []


# ---- hosts.json ----


def test_one_bad_host_does_not_stop_the_others_and_keeps_what_it_had(fleet: Fleet) -> None:
    hosts = ["first", "damaged", "swapped", "silent", "lost", "last"]
    for host in hosts:
        fleet.log(host, "samples/samples-1.csv", sample(60))
    assert all(one["collected"] for one in fleet.take(*map(fleet.send, hosts)))

    for host in hosts:
        fleet.log(host, "samples/samples-1.csv", sample(120))
    asked = {host: fleet.send(host) for host in hosts}
    (fleet.inbox / "damaged.tar.gz").write_bytes(b"\x1b[2J no gzip")
    asked["damaged"]["sha256"] = sha256(fleet.inbox / "damaged.tar.gz")
    (fleet.inbox / "swapped.tar.gz").write_bytes((fleet.inbox / "first.tar.gz").read_bytes())
    asked["silent"] = {"host": "silent", "sha256": "", "reason": "unreachable: no route to host"}
    (fleet.inbox / "lost.tar.gz").unlink()
    fleet.now += 60
    told = fleet.take(*asked.values())

    for host in hosts:
        assert fleet.seconds(host=host) == ([60, 120] if host in ("first", "last") else [60])
    assert told == read_hosts(fleet.store) and [one["host"] for one in told] == hosts
    assert [one["host"] for one in told if one["collected"]] == ["first", "last"]
    assert [one["last"] for one in told] == [T0 + (3660 if one["collected"] else 3600) for one in told]
    reasons = {one["host"]: one["reason"] for one in told}
    assert reasons["first"] == reasons["last"] == ""
    assert reasons["damaged"].startswith("bundle refused: it is truncated or damaged")
    assert reasons["swapped"].startswith("bundle refused: its checksum is not the one")
    assert reasons["silent"] == "unreachable: no route to host"
    assert reasons["lost"].startswith("bundle not taken in: ") and "lost.tar.gz: No such file" in reasons["lost"]
    # And it goes on.
    assert all(one["collected"] for one in fleet.take(*map(fleet.send, hosts)))
    assert {host: fleet.seconds(host=host) for host in hosts} == {host: [60, 120] for host in hosts}


def test_a_host_with_nothing_new_was_collected_and_one_that_never_answered_has_no_last(fleet: Fleet) -> None:
    told = fleet.take({"host": "w-1", "same": True}, {"host": "w-2", "reason": "no bundle", "same": False})
    assert told == [
        {"host": "w-1", "collected": True, "reason": "", "last": fleet.now},
        {"host": "w-2", "collected": False, "reason": "no bundle", "last": None},
    ]


def test_hosts_that_were_not_asked_stay_as_they_were_and_those_that_are_gone_are_dropped(fleet: Fleet) -> None:
    fleet.take({"host": "a", "same": True}, {"host": "b", "reason": "down"}, {"host": "c", "same": True})
    fleet.now += 60
    (told,) = fleet.take({"host": "c", "reason": "down"}, fleet=["c", "d", "b"])
    assert told == {"host": "c", "collected": False, "reason": "down", "last": T0 + 3600.0}
    assert read_hosts(fleet.store) == [told, {"host": "b", "collected": False, "reason": "down", "last": None}]


def test_a_reason_is_one_line_that_is_fit_to_print(fleet: Fleet) -> None:
    """The host had its part in it: a banner of ssh, the output of a module."""
    reason = "unreachable:\n  \x1b[31mgo\taway\x07 \x9b \udcff" + "!" * 1000
    (told,) = fleet.take({"host": "w-1", "reason": reason})
    assert told["reason"].startswith("unreachable: [31mgo away !!!")
    assert told["reason"].isprintable() and len(told["reason"]) == 300


@pytest.mark.parametrize("damage", ["", "[{}]", '[{"host": "w-2", "collected": true, "reason": "", "last": 1e300}]'])
def test_a_damaged_list_of_hosts_is_written_anew(fleet: Fleet, damage: str) -> None:
    fleet.take({"host": "w-1", "same": True})
    (fleet.store / "hosts.json").write_text(damage)
    with pytest.raises(InputError, match=r"hosts\.json: damaged; collect again"):
        read_hosts(fleet.store)
    told = fleet.take({"host": "w-1", "same": True})
    assert read_hosts(fleet.store) == told


def test_what_a_host_could_not_bring_is_said(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    fleet.log("w-1", "samples/samples-2.csv", sample(120))
    (fleet.root / "hosts/w-1/trace").mkdir()
    (fleet.root / "hosts/w-1/trace/x.jsonl").symlink_to("/etc/passwd")
    said = fleet.collect("w-1", max_bytes=250)
    assert said.startswith("there is more than max_bytes: the next run brings it; trace/x.jsonl: ")
    assert fleet.collect("w-1").startswith("trace/x.jsonl: ")
    assert fleet.seconds() == [60, 120]


# ---- hosts that lie ----


def test_lines_that_make_no_sense_are_left_out_and_said(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60), "x,7,oops\n", sample(120).replace("90000", "much"))
    fleet.log("w-1", "samples/rollup-1.csv", rollup(0), rollup(0).replace("80000", ""))
    fleet.log("w-1", "guard/acts.jsonl", act(1), "{}\n", act(2).replace('"reason"', '"because"'))
    fleet.log("w-1", "trace/a.jsonl", record(5), "[" * 100_000 + "\n", record(6).replace("kind", "sort"))
    said = fleet.collect("w-1")
    assert "guard/acts.jsonl: 2 lines were left out, first line 2: no act of the guard" in said
    assert "; samples/rollup-1.csv: 1 line was left out, first line 3: floor_kb: '' is not a value" in said
    assert said.count("left out") == 3 or len(said) == 300
    assert (fleet.seconds(), fleet.seconds("rollups"), fleet.seconds("traces")) == ([60], [0], [5])
    assert fleet.seconds("events") == [1]


SOUND = event(5)
UNSOUND: dict[str, Any] = {
    "no object": 5,
    "no time": {**SOUND, "time": "soon"},
    "time NaN": {**SOUND, "time": float("nan")},
    "time true": {**SOUND, "time": True},
    "no unit": {**SOUND, "unit": None},
    "a source that is none": {**SOUND, "source": "guard"},
    "no source": {**SOUND, "source": ["systemd"]},
    "priority 8": {**SOUND, "priority": 8},
    "priority a half": {**SOUND, "priority": 0.5},
    "pid below 0": {**SOUND, "pid": -1},
    "pid without end": {**SOUND, "pid": 1 << 64},
    "pid text": {**SOUND, "pid": "1"},
    "no message": {name: value for name, value in SOUND.items() if name != "message"},
    "message a list": {**SOUND, "message": ["x"]},
}


@pytest.mark.parametrize("what", UNSOUND)
def test_an_event_that_is_none_is_left_out(fleet: Fleet, what: str) -> None:
    said = fleet.collect("w-1", event(1), UNSOUND[what], event(9, pid=None, source="kernel", unit="", priority=0))
    assert said == "journal/events.jsonl: 1 line was left out, first line 2: no event"
    assert fleet.seconds("events") == [1, 9]


def test_text_of_a_host_is_fit_to_print_and_bounded(fleet: Fleet) -> None:
    evil = "\x1b[2J\udcff" + "x" * 5000
    fleet.log("w-1", "guard/acts.jsonl", act(1, "restart_" + evil, unit=evil, reason=evil))
    fleet.log("w-1", "samples/samples-1.csv", sample(60, command="\x1b[2J" + "y" * 300))
    fleet.log("w-1", "trace/a.jsonl", record(1, unit=evil, kind=evil))
    fleet.collect("w-1", event(2, evil, unit=evil), units=[{**GATE, "Id": evil, "Result": evil}], kernel=evil)
    for table in TABLES:
        for row in fleet.rows(table):
            texts = [value for name, value in row.items() if isinstance(value, str) and name != "record"]
            assert all(text.isprintable() and len(text) <= 2000 for text in texts), (table, texts)
    assert {len(one["message"]) for one in fleet.rows("events")} == {2000}


def test_rows_that_a_wrong_clock_dated_are_left_out_and_make_no_directory(fleet: Fleet) -> None:
    fleet.now = T0 + DAY / 2
    wrong = [-T0 + 60, -401 * DAY, 2 * DAY, 7e9, 9e10]
    edges = [-400 * DAY, 2 * DAY - 1]
    fleet.log("w-1", "samples/samples-1.csv", *map(sample, [*wrong, 60, *edges]))
    said = fleet.collect("w-1", event(-T0), event(1e13), event(-1e13), event(61))
    assert "5 lines were left out, as of a clock that was wrong: they are not of 2024-10-20 to 2025-11-25" not in said
    assert "8 lines were left out, as of a clock that was wrong: they are not of 2024-10-20 to 2025-11-25" in said
    # Retention has removed the oldest one.
    assert (fleet.seconds(), fleet.seconds("events")) == ([60, 2 * DAY - 1], [61])
    assert [path.name for path in sorted(fleet.store.glob("*/day=*"))] == [
        *("day=2025-11-24", "day=2025-11-24", "day=2025-11-25", "day=2025-11-24"),
    ]


def test_a_bundle_that_comes_again_is_refused(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    asked = fleet.send("w-1")
    assert fleet.take(asked)[0]["collected"]
    (told,) = fleet.take(asked)
    assert not told["collected"] and told["reason"].startswith("bundle refused: ")
    assert fleet.seconds() == [60]


def test_a_bundle_with_a_gap_before_it_is_refused_and_the_next_one_brings_all(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    fleet.collect("w-1")
    fleet.log("w-1", "samples/samples-1.csv", sample(120), sample(180))
    length = len(SAMPLES + sample(60) + sample(120))
    (told,) = fleet.take(fleet.send("w-1", cursor=Cursor("w-1", {"samples/samples-1.csv": length})))
    assert not told["collected"] and "and the store ends at" in told["reason"] and fleet.seconds() == [60]
    fleet.collect("w-1")
    assert fleet.seconds() == [60, 120, 180]


def test_a_host_writes_to_its_own_directory_alone(fleet: Fleet) -> None:
    """Whatever it calls its files and units."""
    for name in ("samples/samples-host=w-2.csv", "samples/part-00000001.csv", "samples/w-2.jsonl.csv"):
        path = fleet.root / "hosts/w-1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SAMPLES + sample(60).replace(UNIT, "../../host=w-2"))
    fleet.log("w-1", "trace/..jsonl", record(1, unit="day=2000-01-01/host=w-2"))
    fleet.collect("w-1")
    assert {path.parts[-3:-1] for path in fleet.store.rglob("*.parquet")} == {("day=2025-11-24", "host=w-1")}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_bundle_is_refused(fleet: Fleet, share: float) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    asked = fleet.send("w-1")
    path = fleet.inbox / "w-1.tar.gz"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    (told,) = fleet.take({**asked, "sha256": sha256(path)})
    assert not told["collected"] and told["reason"].startswith("bundle refused: it is truncated or damaged")
    assert fleet.files() == [".lock", "hosts.json"]


@pytest.mark.parametrize(
    "garbage", [b"\0" * 5000, b"\xff\xfe\n" * 500, b"," * 5000 + b"\n", b'"\n"\n,\n', b"\x1f\x8b\n"]
)
def test_a_member_of_garbage_costs_no_more_than_itself(fleet: Fleet, garbage: bytes) -> None:
    fleet.log("w-1", "samples/samples-2.csv", sample(60))
    for name in ("samples/samples-1.csv", "guard/acts.jsonl", "trace/a.jsonl"):
        path = fleet.root / "hosts/w-1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(garbage + b"\n")
    said = fleet.collect("w-1")
    assert "guard/acts.jsonl: " in said and said.isprintable()
    assert (fleet.seconds(), fleet.rows("events"), fleet.rows("traces")) == ([60], [], [])


def test_whatever_one_bundle_makes_go_wrong_the_others_come_in(fleet: Fleet, monkeypatch: Any) -> None:
    """What a host sends is its own word, and something of it may be thought of by nobody."""
    for host in ("w-1", "w-2"):
        fleet.log(host, "samples/samples-1.csv", sample(60))
    asked = [fleet.send("w-1"), fleet.send("w-2")]
    sound = store.advance

    def advance(cursor: Cursor, meta: Any, unpacked: Path) -> Cursor:
        if "w-1" in unpacked.name:
            raise TypeError("unhashable type: 'dict'")
        return sound(cursor, meta, unpacked)

    monkeypatch.setattr(store, "advance", advance)
    first, second = fleet.take(*asked)
    assert (first["collected"], first["reason"]) == (False, "bundle refused: TypeError: unhashable type: 'dict'")
    assert second["collected"] and len(fleet.rows("samples")) == 1
    monkeypatch.undo()
    assert all(one["collected"] for one in fleet.take(fleet.send("w-1")))
    assert len(fleet.rows("samples")) == 2


def test_rows_of_so_many_days_that_they_would_be_thousands_of_files_are_refused(fleet: Fleet, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "MOST_PARTS", 3)
    fleet.log("w-1", "samples/samples-1.csv", *(sample(-number * DAY) for number in range(4)))
    (told,) = fleet.take(fleet.send("w-1"))
    assert not told["collected"] and "they make 3 files" in told["reason"]


def test_a_bomb_of_gzip_is_refused(fleet: Fleet) -> None:
    path = fleet.root / "hosts/w-1/samples/samples-1.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(SAMPLES.encode() + sample(60).encode() * 30_000))
    asked = fleet.send("w-1")
    (told,) = fleet.take(asked, max_bytes=40_000)
    assert (told["collected"], told["reason"]) == (False, "bundle refused: more than 2000000 bytes of lines")
    assert fleet.files() == [".lock", "hosts.json"]
    assert fleet.take(asked, max_bytes=100_000)[0]["collected"]


@pytest.mark.parametrize("meta", [b"", b"{", b"[" * 100_000, b"5", b"[]", b"null", b'{"schema": 2}', b"\xff"])
def test_a_bundle_whose_meta_is_none_is_refused(fleet: Fleet, meta: bytes) -> None:
    path = fleet.root / "meta.json"
    path.write_bytes(meta)
    with tarfile.open(fleet.inbox / "w-1.tar.gz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.add(path, "meta.json")
    (told,) = fleet.take({"host": "w-1", "sha256": sha256(fleet.inbox / "w-1.tar.gz")})
    assert not told["collected"] and told["reason"].startswith("bundle refused: its meta.json is ")


def test_a_host_with_more_units_than_any_has_is_held_to_some(fleet: Fleet, monkeypatch: Any) -> None:
    units = [{"Id": f"celery-worker@{number}.service"} for number in range(100_000)]
    said = fleet.collect("w-1", units=units)
    assert said == "of 100000 units the first 1000 are held"
    assert len(fleet.rows("units")) == 1000
    assert cursor_file(fleet.store, "w-1").stat().st_size < 1 << 20
    monkeypatch.setattr(store, "MOST_META_BYTES", 1 << 20)
    (told,) = fleet.take(fleet.send("w-1", units=units))
    assert told["reason"] == "bundle refused: its meta.json is larger than 1048576 bytes"


@pytest.mark.parametrize("units", [5, [5], [{}], [{"Id": 5}], [{"Id": ""}], None, {"Id": "x"}])
def test_units_that_are_none_are_left_out(fleet: Fleet, units: Any) -> None:
    fleet.collect("w-1", units=units)
    assert fleet.rows("units") == []


@pytest.mark.parametrize(
    ("said", "kb"),
    [
        ("1048576", 1024),
        ("0", 0),
        ("infinity", None),
        ("", None),
        ("-5", None),
        ("1e9", None),
        ("9" * 19, None),
        (7, None),
    ],
)
def test_a_limit_that_is_no_number_is_none(fleet: Fleet, said: Any, kb: int | None) -> None:
    fleet.collect("w-1", units=[{**GATE, "MemoryMax": said}])
    assert [one["memory_max_kb"] for one in fleet.rows("units")] == [kb]


# ---- runs that end anywhere ----


class Killed(BaseException):
    """As by SIGKILL: nothing comes after it."""


class Steps:
    """Counts what is done to the store, and fails at one step instead; who is killed, at all that come after it too."""

    NAMES = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync", "open")

    def __init__(self, monkeypatch: Any) -> None:
        self.at, self.count = 0, 0
        self.fault: BaseException = Killed()
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name), name == "open"))

    def _counted(self, real: Callable[..., Any], opens: bool) -> Callable[..., Any]:
        def step(*words: Any, **more: Any) -> Any:
            # A bundle that is unpacked, and what shutil.rmtree does, is no part of the store.
            if "dir_fd" in more or "_unpacked" in str(words[0]) or (opens and not words[1] & os.O_CREAT):
                return real(*words, **more)
            self.count += 1
            over = self.count > self.at if isinstance(self.fault, Killed) else self.count == self.at
            if self.at and over:
                raise self.fault
            return real(*words, **more)

        return step

    def fail(self, fault: BaseException, act: Callable[[int], Callable[[], Any]]) -> Iterator[int]:
        """At one step after the other, from 1 on, of what act() makes of its number, until there are no more."""
        for number in itertools.count(1):
            run = act(number)
            self.at, self.count, self.fault = number, 0, fault
            with contextlib.suppress(type(fault)):
                run()
            self.at, reached = 0, self.count >= number
            yield number
            if not reached:
                assert number > 10
                return


@pytest.fixture
def steps(monkeypatch: Any) -> Steps:
    return Steps(monkeypatch)


def clean(fleet: Fleet) -> bool:
    """Nothing is left of what a run before had not ended."""
    hidden = [path.name for path in fleet.store.rglob(".*")]
    return hidden == [".lock"] and not [*fleet.store.glob("_staging/*"), *fleet.store.glob("_unpacked/*")]


def test_a_run_that_is_killed_anywhere_is_gone_on_with_by_the_next_one(fleet: Fleet, steps: Steps) -> None:
    def collecting(number: int) -> Callable[[], Any]:
        fleet.log("w-1", "samples/samples-1.csv", sample(number), sample(number - DAY))
        fleet.log("w-1", "guard/acts.jsonl", act(number))
        return partial(fleet.take, fleet.send("w-1"))

    for number in steps.fail(Killed(), collecting):
        fleet.collect("w-1")
        seconds = list(range(1, number + 1))
        assert fleet.seconds() == [*(second - DAY for second in seconds), *seconds]
        assert fleet.seconds("events") == seconds and len(fleet.rows("units")) == 1
        assert clean(fleet)


def test_a_disk_that_is_full_for_a_moment_loses_nothing_and_the_other_host_is_collected(
    fleet: Fleet, steps: Steps
) -> None:
    hosts, said = ("w-1", "w-2"), []

    def collecting(number: int) -> Callable[[], Any]:
        for host in hosts:
            fleet.log(host, "samples/samples-1.csv", sample(number))
        return partial(fleet.take, *map(fleet.send, hosts))

    for number in steps.fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/store"), collecting):
        told = read_hosts(fleet.store) if (fleet.store / "hosts.json").exists() else []
        said += [one["reason"] for one in told if one["reason"]]
        assert sum(bool(one["reason"]) for one in told) < 2
        assert all("/store: No space left on device" in one["reason"] or one["collected"] for one in told)
        assert all(one["collected"] for one in fleet.take(*map(fleet.send, hosts)))
        for host in hosts:
            assert fleet.seconds(host=host) == list(range(1, number + 1))
        assert clean(fleet)
    # Of both, before and after it is in the store.
    assert len(said) > 10 and len(set(said)) == 2


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")


def test_a_disk_that_stays_full_keeps_what_there_was(fleet: Fleet, monkeypatch: Any) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    fleet.collect("w-1")
    fleet.log("w-1", "samples/samples-1.csv", sample(120))
    monkeypatch.setattr(store, "_write", no_room)
    (told,) = fleet.take(fleet.send("w-1"))
    assert told["reason"] == "bundle not taken in: part: No space left on device; the next run brings it again"
    assert (told["collected"], fleet.seconds()) == (False, [60]) and clean(fleet)


def test_a_bundle_that_is_in_but_not_in_place_is_put_there_before_another_one_comes(
    fleet: Fleet, monkeypatch: Any
) -> None:
    """It is committed; whatever keeps it from its place, what comes next must not take that of it."""
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    with monkeypatch.context() as patched:
        patched.setattr(store, "_into_place", no_room)
        late = "part: No space left on device: what it sent shows up after the next run"
        assert fleet.collect("w-1") == late
        fleet.log("w-1", "samples/samples-1.csv", sample(120))
        told = fleet.take(fleet.send("w-1"), {"host": "w-2", "same": True})
        assert [one["collected"] for one in told] == [False, True]
        assert told[0]["reason"] == "bundle not taken in: part: No space left on device; the next run brings it again"
    fleet.collect("w-1")
    assert fleet.seconds() == [60, 120] and clean(fleet)


@pytest.mark.parametrize("damage", [b"", b"{", b"5", b"\xff", b'{"schema": 1, "seq": 1, "cursor": 5, "units": []}'])
def test_a_damaged_cursor_brings_all_again_and_each_row_once_when_the_day_is_over(fleet: Fleet, damage: bytes) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60), sample(120))
    fleet.collect("w-1")
    fleet.log("w-1", "samples/samples-1.csv", sample(180))
    late = fleet.send("w-1")
    path = cursor_file(fleet.store, "w-1")
    path.write_bytes(damage)
    # What goes on behind a cursor that is lost cannot come in.
    (told,) = fleet.take(late)
    assert not told["collected"] and "begins at" in told["reason"] and not path.exists()
    assert f"{path} was damaged and is removed: all that the host still has comes again" in told["reason"]
    fleet.collect("w-1")
    data = read_host(fleet.store, "w-1")
    assert ([row.times.tolist() for _, row in data.samples.lives()], data.problems) == (
        [[T0 + 60, T0 + 120, T0 + 180]],
        [],
    )
    assert json.loads(path.read_text())["seq"] == 2
    fleet.now += DAY
    fleet.collect("w-1")
    assert fleet.seconds() == [60, 120, 180]


def test_two_writers_wait_for_each_other(fleet: Fleet, monkeypatch: Any) -> None:
    fleet.take({"host": "w-1", "same": True})
    before = (fleet.store / "hosts.json").read_text()
    monkeypatch.setattr(store, "LOCK_WAIT_S", 0.01)
    monkeypatch.setattr(store, "LOCK_POLL_S", 0.005)
    with (fleet.store / ".lock").open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("4711\n")
        other.flush()
        with pytest.raises(
            InputError, match=r"/\.lock: process 4711 is writing to the store; collect again when it has"
        ):
            fleet.take({"host": "w-2", "same": True})
        assert (fleet.store / "hosts.json").read_text() == before
    fleet.take({"host": "w-2", "same": True})
    assert (fleet.store / ".lock").read_text() == str(os.getpid())


# ---- tidying ----


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([1, 2], [1, 2]),
        ([1, 2, (1, 2)], [(1, 2)]),
        ([1, 2, (1, 2), 3], [(1, 2), 3]),
        ([(1, 2), 3, (1, 3)], [(1, 3)]),
        ([1, (1, 1)], [(1, 1)]),
        ([(1, 2), (2, 3)], [(1, 2), (2, 3)]),
    ],
)
def test_what_was_put_together_stands_for_its_parts(names: list[Any], wanted: list[Any]) -> None:
    def name(one: Any) -> str:
        numbers = one if isinstance(one, tuple) else (one,)
        return "part-" + "-".join(f"{number:08}" for number in numbers) + ".parquet"

    foreign = ["part-1.parquet", ".part-00000001.parquet.x", "other"]
    assert live([*map(name, names), *foreign]) == sorted(map(name, wanted))
    assert live(["part-00000001.0001.parquet", "part-00000001-00000001.parquet"]) == ["part-00000001-00000001.parquet"]


def test_the_parts_of_a_day_that_is_over_become_one(fleet: Fleet) -> None:
    for second in (60, 120, 180):
        fleet.log("w-1", "samples/samples-1.csv", sample(second), sample(second + DAY))
        fleet.collect("w-1")
    fleet.now += DAY
    fleet.take({"host": "w-1", "same": True})
    yesterday, today = (
        sorted(path.name for path in fleet.store.glob(f"samples/day=2025-11-{day}/*/*")) for day in (24, 25)
    )
    assert (yesterday, len(today)) == (["part-00000001-00000003.parquet"], 3)
    assert fleet.seconds() == [60, 120, 180, DAY + 60, DAY + 120, DAY + 180] and clean(fleet)
    # One that is late joins them.
    fleet.log("w-1", "samples/samples-1.csv", sample(90))
    fleet.now += 5 * DAY
    fleet.collect("w-1")
    assert [path.name for path in fleet.store.glob("samples/day=2025-11-24/*/*")] == ["part-00000001-00000004.parquet"]
    assert fleet.seconds()[:4] == [60, 90, 120, 180]


def test_parts_that_are_large_stay_as_they_are(fleet: Fleet, monkeypatch: Any) -> None:
    for second in (60, 120):
        fleet.log("w-1", "samples/samples-1.csv", sample(second))
        fleet.collect("w-1")
    monkeypatch.setattr(store, "COMPACT_BYTES", 5000)
    fleet.now += DAY
    fleet.collect("w-1")
    assert len(list(fleet.store.glob("samples/*/*/*"))) == 2


def test_a_run_that_is_killed_while_it_tidies_is_gone_on_with_by_the_next_one(fleet: Fleet, steps: Steps) -> None:
    seconds: list[float] = []

    def tidying(number: int) -> Callable[[], Any]:
        for second in (number * DAY, number * DAY + 60):
            fleet.now = T0 + second + 120
            fleet.log("w-1", "samples/samples-1.csv", sample(second))
            fleet.collect("w-1")
            seconds.append(second)
        fleet.now += DAY
        return partial(fleet.take, {"host": "w-1", "same": True}, keep_days=5)

    for number in steps.fail(Killed(), tidying):
        # Whoever reads before the next run has each row once, too.
        assert seconds_of(read_host(fleet.store, "w-1")) in (seconds[-12:], seconds[-10:])
        fleet.take({"host": "w-1", "same": True}, keep_days=5)
        assert fleet.seconds() == seconds[-10:] and clean(fleet)
        assert len(list(fleet.store.glob("samples/*/*/*"))) == min(5, number)


def seconds_of(data: HostData) -> list[float]:
    return sorted(time - T0 for _, rows in data.samples.lives() for time in rows.times.tolist())


def test_old_days_are_removed_and_what_is_small_is_kept_for_longer(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60), sample(60 - DAY))
    fleet.log("w-1", "samples/cgroup-1.csv", figure(60 - DAY))
    fleet.log("w-1", "samples/rollup-1.csv", rollup(60 - 2 * DAY), rollup(60 - 3 * DAY))
    fleet.log("w-1", "trace/a.jsonl", record(60 - DAY), record(60 - 2 * DAY))
    fleet.log("w-1", "guard/acts.jsonl", act(60 - 2 * DAY), act(60 - 3 * DAY))
    fleet.collect("w-1")
    (fleet.store / "samples/day=of.mine").mkdir()
    fleet.take({"host": "w-1", "same": True}, keep_days=1, keep_rollups_days=2)
    found = {table: [second // DAY for second in fleet.seconds(table)] for table in TABLES}
    assert found == {
        **{"samples": [-1, 0], "cgroups": [-1], "traces": [-1]},
        **{"rollups": [-2], "events": [-2], "units": [0]},
    }
    assert (fleet.store / "samples/day=of.mine").is_dir()


def test_a_day_that_cannot_be_removed_is_noted(fleet: Fleet, monkeypatch: Any) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60 - 9 * DAY))
    fleet.collect("w-1")

    def kept(path: Path, *_: Any, **__: Any) -> None:
        if path.name.startswith("day="):
            raise OSError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", kept)
    bounds = {"max_bytes": 1, "keep_days": 1, "keep_rollups_days": 1, "now": fleet.now}
    _, notes = ingest(fleet.inbox, fleet.store, [], [], **bounds)
    day = fleet.store / "samples/day=2025-11-15"
    assert notes == [f"{day} is too old and could not be removed: {day}: Operation not permitted"]


# ---- what detection takes ----

Floor = tuple[float, float, float | None, int]


def floors(data: HostData) -> dict[int, list[Floor]]:
    """By pid: second, size, tasks, count."""
    return {
        process.pid: [
            (time - T0, size, None if tasks != tasks else tasks, count) for _, time, size, tasks, count in zip(*rows)
        ]
        for process, rows in data.samples.lives()
    }


def test_a_host_reads_the_same_out_of_the_store_as_from_its_files(fleet: Fleet) -> None:
    for number in range(4):
        lines = [sample(900 * number + 60 * n, 90_000 + n, tasks=n) for n in range(15)]
        fleet.log("w-1", f"samples/samples-{number}.csv", *lines, sample(900 * number, pid=8, command="celery x"))
        fleet.log("w-1", f"samples/cgroup-{number}.csv", *(figure(900 * number + 60 * n, n) for n in range(15)))
        fleet.log("w-1", "trace/a.jsonl", record(900 * number))
        fleet.collect("w-1")
    stored, read = read_host(fleet.store, "w-1"), formats.read_host("w-1", fleet.root / "hosts/w-1")
    assert floors(stored) == floors(read) and len(floors(stored)[7]) == 60
    assert {process for process, _ in stored.samples.lives()} == {process for process, _ in read.samples.lives()}
    ours, theirs = stored.cgroups.by_unit({UNIT})[UNIT], read.cgroups.by_unit({UNIT})[UNIT]
    assert {name: values.tolist() for name, values in ours.items()} == {
        name: values.tolist() for name, values in theirs.items()
    }
    assert (stored.traces, stored.problems, stored.host) == (read.traces, [], "w-1")


def test_of_a_minute_the_smallest_sample_is_taken_and_of_several_the_earliest(fleet: Fleet, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "FINE_S", 60.0)
    lines = [sample(30, 90, tasks=1), sample(45, 80), sample(20, 80, tasks=9), sample(59.99, 85), sample(60, 70)]
    ending = [sample(10, 0), sample(70, 0), sample(130, 0)]
    swapped = sample(125, 50).replace(",,,,,,", ",,,7,,,")
    fleet.log("w-1", "samples/samples-1.csv", *lines, *ending, swapped)
    fleet.collect("w-1")
    assert floors(read_host(fleet.store, "w-1")) == {7: [(20, 80, 9, 4), (60, 70, None, 1), (125, 57, None, 1)]}


def test_the_more_samples_a_host_has_the_fewer_of_them_are_told_apart(fleet: Fleet, monkeypatch: Any) -> None:
    fleet.log("w-1", "samples/samples-1.csv", *(sample(n, 80 + n) for n in range(0, 1200, 5)))
    fleet.collect("w-1")
    (size,) = [part.stat().st_size for part in fleet.store.glob("samples/*/*/*.parquet")]
    for most, told in ((size, 240), (size - 1, 2)):
        monkeypatch.setattr(store, "FINE_BYTES", most)
        assert [len(one) for one in floors(read_host(fleet.store, "w-1")).values()] == [told]


def test_a_floor_has_its_own_count_of_tasks_though_it_is_not_known(fleet: Fleet, monkeypatch: Any) -> None:
    monkeypatch.setattr(store, "FINE_S", 60.0)
    fleet.log("w-1", "samples/samples-1.csv", sample(20, 80), sample(30, 90, tasks=9))
    fleet.collect("w-1")
    assert floors(read_host(fleet.store, "w-1")) == {7: [(20, 80, None, 2)]}


def test_a_rollup_counts_where_its_process_has_no_sample_and_is_of_the_middle(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(599), sample(1205, pid=8))
    rollups = [rollup(0), rollup(600), rollup(1200, count=3), rollup(1800, 0), rollup(0, pid=8), rollup(1200, pid=8)]
    fleet.log("w-1", "samples/rollup-1.csv", *rollups, rollup(0).replace(f"{T0 - 900}.25", f"{T0 - 950}.25"))
    fleet.collect("w-1")
    lives = [(process.pid, rows) for process, rows in read_host(fleet.store, "w-1").samples.lives()]
    assert sorted((pid, [time - T0 for time in rows.times], rows.counts.tolist()) for pid, rows in lives) == [
        # Of another process that had that pid.
        (7, [300], [10]),
        (7, [599, 900, 1500], [1, 10, 3]),
        (8, [300, 1205], [10, 1]),
    ]


def test_figures_that_came_by_two_files_are_each_there_once(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/cgroup-1.csv", figure(60), figure(540))
    fleet.log("w-1", "samples/units-1.csv", figure(540), figure(1140))
    fleet.collect("w-1")
    figures = read_host(fleet.store, "w-1").cgroups.by_unit({UNIT})[UNIT]
    assert [time - T0 for time in figures["timestamp"]] == [60, 540, 1140]


def test_days_are_read_some_at_a_time_and_make_the_same(fleet: Fleet, monkeypatch: Any) -> None:
    for day in range(4):
        fleet.log("w-1", "samples/samples-1.csv", sample(60 + day * DAY))
        fleet.log("w-1", "samples/rollup-1.csv", rollup(day * DAY), rollup(600 + day * DAY))
        fleet.log("w-1", "trace/a.jsonl", record(60 + day * DAY))
    fleet.now += 4 * DAY
    fleet.collect("w-1")
    at_once = read_host(fleet.store, "w-1")
    monkeypatch.setattr(store, "READ_BYTES", 1)
    by_day = read_host(fleet.store, "w-1")
    assert floors(by_day) == floors(at_once) and len(floors(by_day)[7]) == 8
    assert by_day.traces == at_once.traces and len(by_day.traces) == 4


def test_the_newest_days_are_read(fleet: Fleet, monkeypatch: Any) -> None:
    """However long rollups are kept, and however long ago it was."""
    monkeypatch.setattr(store, "READ_DAYS", 3)
    for day in (0, 1, 2, 4, 5):
        fleet.log("w-1", "samples/rollup-1.csv", rollup(day * DAY))
    fleet.now += 300 * DAY
    fleet.collect("w-1")
    assert [second // DAY for second in seconds_of(read_host(fleet.store, "w-1"))] == [2, 4, 5]


def test_the_newest_trace_records_are_held(fleet: Fleet, monkeypatch: Any) -> None:
    fleet.log("w-1", "trace/a.jsonl", *(record(60 * n) for n in range(100)))
    fleet.collect("w-1")
    monkeypatch.setattr("plimsoll.samples.MOST_TRACE_BYTES", 10 * len(record(60)))
    data = read_host(fleet.store, "w-1")
    assert data.traces[-1]["time"] == T0 + 60 * 99 and 5 < len(data.traces) < 12
    assert len(data.problems) == 1 and "the oldest are left out" in data.problems[0]


def test_a_host_of_which_nothing_is_there_has_nothing(fleet: Fleet) -> None:
    data = read_host(fleet.store, "w-1")
    assert (len(data.samples), data.traces, data.problems) == (0, [], [])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "cut": lambda good: good[:-20],
    "other": lambda good: b"PAR1" + b"\0" * 100 + b"PAR1",
    "footer": lambda good: good[: -8 - (length := int.from_bytes(good[-8:-4], "little"))] + bytes(length) + good[-8:],
    "names": lambda good: good.replace(b"unit", b"\xff\xfeit"),
    "pages": lambda good: good[:4] + b"\xff" * (len(good) // 2) + good[4 + len(good) // 2 :],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("table", ["samples", "rollups", "cgroups", "traces", "events"])
def test_a_damaged_part_is_named_and_the_rest_is_read(fleet: Fleet, damage: str, table: str) -> None:
    for day in (0, 1):
        fleet.log("w-1", "samples/samples-1.csv", sample(60 - day * DAY))
        fleet.log("w-1", "samples/rollup-1.csv", rollup(600 - day * DAY))
        fleet.log("w-1", "samples/cgroup-1.csv", figure(60 - day * DAY))
        fleet.log("w-1", "trace/a.jsonl", record(60 - day * DAY))
    fleet.collect("w-1", event(60), event(60 - DAY))
    path = fleet.store / table / "day=2025-11-23/host=w-1/part-00000001.parquet"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    data = read_host(fleet.store, "w-1")
    assert data.problems == [f"{path}: damaged, so that what it held is missing; remove it"]
    lost = {"samples": 60, "rollups": 900}.get(table)
    wanted = [second - day * DAY for day in (1, 0) for second in (60, 900) if not (day and second == lost)]
    assert seconds_of(data) == wanted
    assert len(data.cgroups.by_unit({UNIT})[UNIT]["timestamp"]) == (1 if table == "cgroups" else 2)
    assert len(data.traces) == (1 if table == "traces" else 2)
    assert [one.times for one in data.incidents] == [1 if table == "events" else 2]
    # It is left for who may mend it.
    fleet.log("w-1", "samples/samples-1.csv", sample(120 - DAY))
    fleet.log("w-1", "samples/rollup-1.csv", rollup(1200 - DAY))
    fleet.log("w-1", "samples/cgroup-1.csv", figure(120 - DAY))
    fleet.log("w-1", "trace/a.jsonl", record(120 - DAY))
    fleet.collect("w-1", event(120 - DAY))
    assert path.exists() and not list((fleet.store / "_staging").iterdir())


def test_a_large_part_that_is_damaged_at_its_end_is_named(fleet: Fleet) -> None:
    """Of which some rows were there already."""
    fleet.log("w-1", "trace/a.jsonl", record(60))
    fleet.collect("w-1")
    (path,) = fleet.store.glob("traces/*/*/*")
    lines = [json.dumps({"time": T0, "kind": f"{number**9:x}"}) for number in range(30_000)]
    rows = pl.read_parquet(path, hive_partitioning=False).select(pl.exclude("record"))
    rows.join(pl.DataFrame({"record": lines}), how="cross").write_parquet(path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) * 9 // 10] + b"\xff" * 100 + good[len(good) * 9 // 10 + 100 :])
    data = read_host(fleet.store, "w-1")
    assert data.problems == [f"{path}: damaged, so that what it held is missing; remove it"] and not data.traces


def test_a_part_of_other_columns_is_damaged(fleet: Fleet) -> None:
    for day in (0, 1):
        fleet.log("w-1", "samples/samples-1.csv", sample(60 - day * DAY))
    fleet.collect("w-1")
    for path in sorted(fleet.store.glob("samples/*/*/*")):
        good = pl.read_parquet(path, hive_partitioning=False)
        for bad in (good.drop("pid"), good.with_columns(pid=pl.lit("x"))):
            bad.write_parquet(path)
            assert read_host(fleet.store, "w-1").problems == [
                f"{path}: damaged, so that what it held is missing; remove it"
            ]
        good.write_parquet(path)
    assert len(read_host(fleet.store, "w-1").samples) == 2


def test_a_record_that_a_disk_has_changed_is_left_out(fleet: Fleet) -> None:
    fleet.log("w-1", "trace/a.jsonl", record(60), record(120))
    fleet.collect("w-1")
    (path,) = fleet.store.glob("traces/*/*/*")
    found = pl.read_parquet(path, hive_partitioning=False)
    found.with_columns(record=pl.Series(['{"time": 5, "kind"', found["record"][1]])).write_parquet(path)
    assert [one["time"] for one in read_host(fleet.store, "w-1").traces] == [T0 + 120]


def end(second: float, count: int) -> list[dict[str, Any]]:
    """All that is said of a worker that meets its MemoryMax; pid and counter are others each time."""
    named = (
        f"oom-kill:constraint=CONSTRAINT_MEMCG,oom_memcg=/c/{UNIT},task_memcg=/c/{UNIT},task=celery,pid={count},uid=9"
    )
    killed = f"Memory cgroup out of memory: Killed process {count} (celery) total-vm:{count}kB"
    kernel = {"source": "kernel", "pid": None, "priority": 3}
    return [
        event(second - 9, "[2025-11-24 00:00:00,000: INFO/MainProcess] Task scan[1] received", source="worker"),
        event(second - 1, "celery invoked oom-killer: gfp_mask=0xcc0", unit="", **kernel),
        event(second - 1, named, **kernel),
        event(second - 0.9, killed, unit="", **kernel),
        event(second, f"{UNIT}: A process of this unit has been killed by the OOM killer."),
        event(second + 0.1, f"{UNIT}: Main process exited, code=killed, status=9/KILL"),
        event(second + 0.2, f"{UNIT}: Failed with result 'oom-kill'."),
        event(second + 5, f"{UNIT}: Scheduled restart job, restart counter is at {count}."),
    ]


def failed(second: float, task: str) -> dict[str, Any]:
    return event(second, f"[2025-11-24 00:00:00,000: ERROR/MainProcess] Task {task} raised", source="worker")


def incidents_of(fleet: Fleet) -> list[tuple[float, str, str, int]]:
    """Second, source, the begin of the message, and how often."""
    return [(round(one.time - T0, 1), one.source, one.message[:45], one.times) for one in held(fleet).incidents]


def held(fleet: Fleet) -> HostData:
    return read_host(fleet.store, "w-1")


def test_of_what_ended_a_worker_the_newest_of_each_source_comes_first(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    acts = [act(20), act(30, "budget_spent"), act(41, "outcome", result="done"), act(42, "would_restart")]
    fleet.log("w-1", "guard/acts.jsonl", *acts)
    other = event(70, "celery-worker@b.service: Failed with result 'signal'.", unit="celery-worker@b.service")
    fleet.collect("w-1", *end(100, 812), failed(200, "scan"), other)
    assert incidents_of(fleet) == [
        (105, "systemd", f"{UNIT}: Scheduled restart job"[:45], 1),
        (99, "kernel", "Memory cgroup out of memory: Killed process 8", 1),
        (70, "systemd", "celery-worker@b.service: Failed with result '", 1),
        (30, "guard", "budget spent: full", 1),
    ]


def test_a_crash_loop_is_told_once_with_how_often_though_its_numbers_differ(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    fleet.collect("w-1", *(one for count in range(12) for one in end(60 + 10 * count, 800 + count)))
    # All comes again.
    cursor_file(fleet.store, "w-1").write_bytes(b"")
    fleet.log("w-1", "guard/acts.jsonl", act(1))
    fleet.take(
        fleet.send(
            "w-1", [one for count in range(12) for one in end(60 + 10 * count, 800 + count)], cursor=Cursor("w-1")
        )
    )
    found = held(fleet).incidents
    assert [(one.source, one.times) for one in found] == [("systemd", 12), ("kernel", 12), ("guard", 1)]
    assert found[0].message.endswith("is at 811.") and "Killed process 811 " in found[1].message


def test_a_kill_of_which_the_kernel_said_no_more_is_told_as_it_is(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    others = [one for one in end(100, 813) + end(99, 812) + end(110.4, 812) if "Killed" in one["message"]]
    fleet.collect("w-1", *(one for one in end(100, 812) if "constraint" in one["message"]), *others)
    assert incidents_of(fleet) == [(99, "kernel", "oom-kill:constraint=CONSTRAINT_MEMCG,oom_memc", 1)]


def test_a_workers_own_errors_are_told_where_nothing_else_is(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    said = [failed(10 * n, task) for n, task in enumerate("abcd")]
    fleet.collect("w-1", *said, event(50, "[t: INFO/MainProcess] no ERROR/here", source="worker"))
    assert [(second, source) for second, source, *_ in incidents_of(fleet)] == [
        (30, "worker"),
        (20, "worker"),
        (10, "worker"),
    ]
    fleet.collect("w-1", event(1))
    assert incidents_of(fleet) == [(1, "systemd", "Scheduled restart job", 1)]


def test_what_happened_is_asked_for_once_where_there_is_some_of_the_days_that_are_judged(
    fleet: Fleet, monkeypatch: Any
) -> None:
    asked: list[list[str]] = []
    answers = store._answers

    def counted(connection: Any, queries: Mapping[str, str], parts: Any) -> Any:
        asked.append(list(queries))
        return answers(connection, queries, parts)

    monkeypatch.setattr(store, "_answers", counted)
    monkeypatch.setattr(store, "READ_BYTES", 1)
    for day in range(3):
        fleet.log("w-1", "samples/samples-1.csv", sample(60 + day * DAY))
    fleet.now += 3 * DAY
    fleet.collect("w-1")
    assert held(fleet).incidents == []
    fleet.collect("w-1", event(-5 * DAY))
    assert held(fleet).incidents == []
    assert asked == [["floors", "cgroups", "traces"]] * 6
    asked.clear()
    # Of more than is read at once, the newest days.
    fleet.collect("w-1", event(DAY), event(2 * DAY, "Failed"))
    assert incidents_of(fleet) == [(2 * DAY, "systemd", "Failed", 1)]
    assert asked == [["floors", "cgroups", "traces"]] * 3 + [["incidents"]]
    monkeypatch.undo()
    assert len(incidents_of(fleet)) == 2


def test_an_event_that_a_disk_has_changed_is_left_out(fleet: Fleet) -> None:
    fleet.log("w-1", "samples/samples-1.csv", sample(60))
    fleet.collect("w-1", *(event(n, "x" * (n + 1)) for n in range(6)))
    (path,) = fleet.store.glob("events/*/*/*")
    found = pl.read_parquet(path, hive_partitioning=False)
    times = pl.Series([float("nan"), float("inf"), -1e13, 1e13, T0 + 4.0, T0 + 5.0])
    messages = pl.Series([*found["message"][:5], None])
    found.with_columns(time=times, message=messages).write_parquet(path)
    assert incidents_of(fleet) == [(4, "systemd", "xxxxx", 1)]


def test_parts_that_are_put_together_while_they_are_read_are_read_again(fleet: Fleet, monkeypatch: Any) -> None:
    for second in (60, 120):
        fleet.log("w-1", "samples/samples-1.csv", sample(second))
        fleet.collect("w-1")
    fleet.now += DAY
    real, listed = store.files, []

    def files(root: Path, table: str, host: str) -> dict[str, list[Path]]:
        found = real(root, table, host)
        listed.append(table)
        if len(listed) == 1:
            fleet.collect("w-1")
        return found

    monkeypatch.setattr(store, "files", files)
    data = read_host(fleet.store, "w-1")
    assert (seconds_of(data), data.problems) == ([60, 120], []) and listed.count("samples") == 2


def test_a_row_holds_what_its_kind_has() -> None:
    """The rows of two kinds begin with what they are sorted and dated by."""
    assert all(kind._fields[0] in ("timestamp", "time") for kind in TABLES.values())
    assert set(Rollup._fields) - set(Sample._fields) == {"count", "floor_kb", "median_kb", "max_kb"}
