"""Files of samples, of units' figures and of traces: read as they are written, and refused where they are not that."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_file
from plimsoll import formats
from plimsoll.formats import CgroupSample, InputError, Sample, files_of, printable, read_csv, read_host, read_trace

sampler = load_file(ROOT / "roles/rss_sampler/files/rss_sampler.py", "rss_sampler_of_formats")
bootstrap = load_file(ROOT / "roles/tracemalloc_bootstrap/files/plimsoll_bootstrap.py", "bootstrap_of_formats")

NOON = 1_763_985_600
UNIT = "celery-worker@gate.service"
PLAIN = "timestamp,pid,rss_kb,command\n"
GROWTH = {
    "kind": "growth",
    "time": 1.5,
    "unit": UNIT,
    "pid": 7,
    "sites": [{"file": "a.py", "line": 3, "function": "f", "size_kb": 9, "count": 2, "growth_kb": 8.5}],
    "tasks": {"shop.scan": {"count": 4, "traced_growth_kb": 8.5}},
}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def file(content: str | bytes, name: str = "samples.csv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file


def refused(path: Path, where: str, read: Callable[[Path], Any] = read_csv) -> str:
    """What is said of a file; where is what must stand between its path and the reason."""
    with pytest.raises(InputError) as caught:
        list(read(path))
    said = str(caught.value)
    assert said.startswith(f"{path}{where}: ") and said.isprintable()
    return said.removeprefix(f"{path}{where}: ")


# ---- samples ----


def test_a_plain_scripts_file_is_read_as_it_is(file: Any) -> None:
    path = file(f'{PLAIN}{NOON}.5,41,90000,"celery -A shop worker -Q a,b"\n{NOON + 60},41,90004,celery\n')
    assert list(read_csv(path)) == [
        Sample(NOON + 0.5, 41, 90000, "celery -A shop worker -Q a,b"),
        Sample(NOON + 60, 41, 90004, "celery"),
    ]


def test_columns_go_by_name_and_unknown_ones_are_passed_over(file: Any) -> None:
    path = file(f"rss_kb,cpu,pid,unit,timestamp,tasks\n90000,x,41,{UNIT},{NOON},\n90004,,41,{UNIT},{NOON + 1},3\n")
    assert list(read_csv(path)) == [
        Sample(NOON, 41, 90000, unit=UNIT),
        Sample(NOON + 1, 41, 90004, unit=UNIT, tasks=3),
    ]


def test_times_are_of_milliseconds(file: Any) -> None:
    """Nearer ones, which no sampler takes, would make slopes without end."""
    path = file(f"timestamp,pid,rss_kb,start_time\n1e-320,1,2,\n{NOON}.0004,1,2,{NOON}.1239\n")
    assert list(read_csv(path)) == [Sample(0, 1, 2), Sample(NOON, 1, 2, start_time=NOON + 0.124)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_as_on_any_system(file: Any, end: str) -> None:
    assert list(read_csv(file(f"timestamp,pid,rss_kb{end}{NOON},1,2{end}"))) == [Sample(NOON, 1, 2)]


@pytest.mark.parametrize("torn", ["", "1763985660", "1763985660,41,9000", '1763985660,41,90004,"celery'])
def test_a_torn_last_line_is_left_out(file: Any, torn: str) -> None:
    text = f"{PLAIN}{NOON},41,90000,celery\n{torn}"
    assert list(read_csv(file(text))) == [Sample(NOON, 41, 90000, "celery")]
    assert list(read_csv(file(gzip.compress(text.encode()), "samples.csv.gz"))) == [Sample(NOON, 41, 90000, "celery")]


@pytest.mark.parametrize("nothing", ["", "timestamp,pid", PLAIN.strip(), PLAIN])
def test_an_empty_file_or_a_header_alone_holds_nothing(file: Any, nothing: str) -> None:
    assert list(read_csv(file(nothing))) == []
    assert list(read_csv(file(gzip.compress(nothing.encode()), "samples.csv.gz"))) == []


def test_a_rollup_is_passed_over(file: Any) -> None:
    assert list(read_csv(file(f"{sampler.ROLLUP_COLUMNS}\nwhatever\n"))) == []


def test_a_truncated_gz_is_named_with_the_last_line_that_was_read(file: Any) -> None:
    rows = "".join(f"{NOON + n},41,{90000 + n * n},celery\n" for n in range(2000))
    packed = gzip.compress((PLAIN + rows).encode())
    reader = read_csv(path := file(packed[: len(packed) // 2], "samples.csv.gz"))
    found = []
    with pytest.raises(InputError) as caught:
        found.extend(reader)
    assert str(caught.value) == f"{path}: truncated or damaged after line {len(found) + 1}"
    assert len(found) > 100 and found[-1].rss_kb == 90000 + (len(found) - 1) ** 2


@pytest.mark.parametrize(
    "damaged", [b"\x1f\x8b", b"no gzip at all", gzip.compress(b"x" * 999)[:-4], b"\x1f\x8b\x08\0" * 9]
)
def test_what_is_no_gz_is_named(file: Any, damaged: bytes) -> None:
    assert refused(file(damaged, "samples.csv.gz"), "") == "truncated or damaged after line 0"


def test_damage_in_a_gz_whose_sizes_are_right_is_found(file: Any) -> None:
    packed = bytearray(gzip.compress((PLAIN + f"{NOON},41,90000,celery\n" * 999).encode()))
    packed[-8] ^= 1
    assert "truncated or damaged after line" in refused(file(bytes(packed), "samples.csv.gz"), "")


HEADERS = {
    "words": "hello\n",
    "a column too few": "timestamp,pid,command\n",
    "no header": f"{NOON},41,90000,celery\n",
    "an empty first line": f"\n{PLAIN}",
    "bytes": b"\x89PNG\r\n\x1a\n\x00\xff\xfe\n",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_nothing_known_says_what_it_must_name(file: Any, header: str) -> None:
    assert "timestamp, pid and rss_kb" in refused(file(HEADERS[header]), ", line 1")


BAD = {
    "a field too few": ("5,41,90000", "3 fields, the header has 4"),
    "an empty line": ("", "0 fields, the header has 4"),
    "no time": ("soon,41,90000,x", "timestamp: 'soon' is not a value of that column"),
    "time NaN": ("nan,41,90000,x", "timestamp: 'nan' is not"),
    "time without end": ("1e999,41,90000,x", "timestamp: '1e999' is not"),
    "time below 0": ("-1,41,90000,x", "timestamp: '-1' is not"),
    "time in milliseconds": ("1763985600000,41,90000,x", "timestamp: '1763985600000' is not"),
    "no pid": ("5,,90000,x", "pid: '' is not"),
    "pid below 0": ("5,-41,90000,x", "pid: '-41' is not"),
    "no size": ("5,41,,x", "rss_kb: '' is not"),
    "size NaN": ("5,41,NaN,x", "rss_kb: 'NaN' is not"),
    "size inf": ("5,41,inf,x", "rss_kb: 'inf' is not"),
    "size below 0": ("5,41,-4,x", "rss_kb: '-4' is not"),
    "size of no machine": (f"5,41,{2**53},x", f"rss_kb: '{2**53}' is not"),
    "a number without end": (f"5,41,{'9' * 5000},x", f"rss_kb: '{'9' * 40}' is not"),
    "escapes": ("5,41,\x1b[2J\x07,x", r"rss_kb: '\x1b[2J\x07' is not"),
    "a huge field": (f"5,41,90000,{'x' * 140_000}", "field larger than field limit"),
    "a quote that never ends": (f'5,41,90000,"{"x" * 140_000}', "field larger than field limit"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named_and_what_was_before_it_is_read(file: Any, bad: str) -> None:
    line, said = BAD[bad]
    path = file(f"{PLAIN}4,41,90000,x\n{line}\n6,41,90000,x\n")
    assert said in refused(path, ", line 3")
    assert next(read_csv(path)) == Sample(4, 41, 90000, "x")


def test_a_line_without_end_is_not_read_into_memory(file: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 64)
    path = file(f"{PLAIN}4,41,90000,{'x' * 50}\n5,41,90000,{'x' * 80}\n6,41,90000,x\n")
    assert refused(path, ", line 3") == "a line of more than 64 bytes"
    # A last line that is torn is no line that is too long.
    assert len(list(read_csv(file(f"{PLAIN}4,41,90000,x\n5,41,90000,{'x' * 40}")))) == 1


def test_a_line_counts_as_the_file_has_it_behind_a_field_of_several_lines(file: Any) -> None:
    assert refused(file(f'{PLAIN}4,41,9,"a\nb\nc"\n5,41,x,y\n'), ", line 5").startswith("rss_kb: 'x'")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.csv", "") == "No such file or directory"
    assert refused(tmp_path / "none.jsonl", "", read_trace) == "No such file or directory"
    assert refused(tmp_path, "") == "Is a directory"


# ---- figures of units ----


def test_a_units_figures_have_no_limit_where_the_cell_is_empty(file: Any) -> None:
    path = file(f"{sampler.CGROUP_COLUMNS}\n{NOON}.000,{UNIT},102400,,204800,4,7,2,1,1234,567,\n")
    assert list(read_csv(path)) == [CgroupSample(NOON, UNIT, 102400, None, 204800, 4, 7, 2, 1, 1234, 567, None)]


def test_a_bad_figure_is_named(file: Any) -> None:
    path = file(f"{sampler.CGROUP_COLUMNS}\n{NOON},{UNIT},102400,max,204800,4,7,2,1,1234,567,\n")
    assert refused(path, ", line 2") == "memory_high_kb: 'max' is not a value of that column"


# ---- what comes from a host is fit to print ----

TRICKS = {
    "terminal escapes": "\x1b[31m\x07\x9b2J",
    "another line": "a\nb\r\u2028\u2029\x85",
    "direction": "\u202eexe.gpj\u2066\u2069\u200f\u061c",
    "nothing to see": "\u200b\ufeff\xad\x00\x7f",
    "half a pair": "\ud800",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_printed_is_printable(file: Any, trick: str) -> None:
    shown = printable(TRICKS[trick])
    assert shown.isprintable() and len(shown) == len(TRICKS[trick])
    shown.encode()
    if trick != "half a pair":  # which no file can hold
        path = file(
            f"timestamp,pid,rss_kb,command,unit,role\n1,2,3,{','.join([chr(34) + TRICKS[trick] + chr(34)] * 3)}\n"
        )
        (row,) = read_csv(path)
        assert row.command == row.unit == row.role == shown.replace("\r?", "??")


def test_what_is_printed_has_an_end_and_keeps_what_people_write() -> None:
    assert printable("täglich_报告 <b>") == "täglich_报告 <b>"
    assert (len(printable("x" * 10**6)), printable("x" * 300)[-2:]) == (200, "x…")
    assert printable("x" * 200) == "x" * 200
    assert printable(["\x07"]) == r"['\x07']"


def test_bytes_that_are_no_text_are_replaced(file: Any) -> None:
    (row,) = read_csv(file(PLAIN.encode() + b"1,2,3,\xff\xfe\n"))
    assert row.command == "\ufffd\ufffd"


# ---- traces ----


def lines(*records: Any) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def test_trace_records_are_read_with_fields_that_are_not_known(file: Any) -> None:
    other = {"kind": "gc_types", "time": 2, "types": {"dict": 4}}
    path = file(lines(GROWTH, other) + '{"kind": "torn', "trace.jsonl")
    assert list(read_trace(path)) == [GROWTH, other]


WRONG: dict[str, Any] = {
    "a list": [],
    "a number": 5,
    "null": None,
    "no kind": {"time": 1},
    "a kind that is no text": {**GROWTH, "kind": 5},
    "no time": {"kind": "growth"},
    "time as text": {**GROWTH, "time": "now"},
    "sites that are no list": {**GROWTH, "sites": {}},
    "a site that is no object": {**GROWTH, "sites": ["a.py:3"]},
    "a site without a line": {**GROWTH, "sites": [{"file": "a.py", "growth_kb": 1}]},
    "a site without growth": {**GROWTH, "sites": [{"file": "a.py", "line": 1}]},
    "growth as text": {**GROWTH, "sites": [{"line": 1, "growth_kb": "8"}]},
    "growth NaN": {**GROWTH, "sites": [{"line": 1, "growth_kb": float("nan")}]},
    "growth without end": {**GROWTH, "sites": [{"line": 1, "growth_kb": float("inf")}]},
    "growth whose sum has no end": {**GROWTH, "sites": [{"line": 1, "growth_kb": 1.7e308}]},
    "growth past every float": {**GROWTH, "sites": [{"line": 1, "growth_kb": -(10**400)}]},
    "tasks that are no object": {**GROWTH, "tasks": ["shop.scan"]},
    "a task that is no object": {**GROWTH, "tasks": {"shop.scan": 5}},
    "a task's growth as text": {**GROWTH, "tasks": {"shop.scan": {"traced_growth_kb": "8"}}},
    "a pid that is a list": {**GROWTH, "pid": [7]},
    "a count that is true": {"kind": "task_growth", "time": 1, "count": True},
    "growth of RSS that is null": {"kind": "task_growth", "time": 1, "rss_growth_kb": None},
    "a size as text": {"kind": "window_open", "time": 1, "rss_kb": "9"},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_record_of_another_shape_is_refused(file: Any, wrong: str) -> None:
    path = file(lines(GROWTH, WRONG[wrong], GROWTH), "trace.jsonl")
    assert refused(path, ", line 2", read_trace) == "no trace record"


@pytest.mark.parametrize(
    "text", ["", "{", "\x00", "[" * 100_000, '{"kind":}'], ids=["empty", "half", "nul", "deep", "no"]
)
def test_a_line_that_is_no_json_is_named(file: Any, text: str) -> None:
    assert refused(file(f"{lines(GROWTH)}{text}\n", "trace.jsonl"), ", line 2", read_trace)


# ---- a host ----


def test_the_files_of_a_host_are_sorted_and_others_are_not_looked_at(file: Any, tmp_path: Path) -> None:
    wanted = [file("", f"h/{name}") for name in ("samples/a.csv", "samples/b.csv.gz", "trace/c.jsonl")]
    for other in ("samples/.lock", "samples/a.csv.gz.tmp", "meta.json", "notes.txt"):
        file("", f"h/{other}")
    (tmp_path / "h/samples/dir.csv").mkdir()
    assert files_of(tmp_path / "h") == wanted
    assert files_of(wanted[1]) == [wanted[1]]
    assert files_of(tmp_path / "none") == []


def test_a_damaged_file_is_noted_or_raised_and_the_rest_is_read(file: Any, tmp_path: Path) -> None:
    file(f"{PLAIN}1,41,90000,x\n2,41,oops,x\n3,41,90000,x\n", "h/samples/a.csv")
    file(f"{PLAIN}4,41,90000,x\n", "h/samples/b.csv")
    file(f"{sampler.CGROUP_COLUMNS}\n4,{UNIT},9,,,,,,,,,\n", "h/samples/c.csv")
    file(lines(GROWTH) + "oops\n", "h/trace/a.jsonl")
    data = read_host("h", tmp_path / "h", strict=False)
    assert sorted(row.timestamp for row in data.samples) == [1, 4]
    assert (data.host, len(data.cgroups), data.traces) == ("h", 1, [GROWTH])
    assert [re.sub(r".*/h/", "", said)[:26] for said in data.problems] == [
        "trace/a.jsonl, line 2: no ",
        "samples/a.csv, line 3: rss",
    ]
    with pytest.raises(InputError, match=r"a\.jsonl, line 2"):
        read_host("h", tmp_path / "h", strict=True)


def test_a_host_cannot_send_rows_for_ever(file: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(formats, "MAX_ROWS", 5)
    for name in "abcd":
        file(PLAIN + "1,41,90000,x\n" * 3, f"h/{name}.csv")
    file(lines(GROWTH) * 9, "t/a.jsonl")
    data = read_host("h", tmp_path / "h", strict=False)
    assert len(data.samples) == 5
    (said,) = data.problems
    assert said == f"{tmp_path}/h/c.csv: more than 5 rows of one host; the older ones are left out"
    assert len(read_host("t", tmp_path / "t", strict=False).traces) == 5
    with pytest.raises(InputError, match="more than 5 rows"):
        read_host("h", tmp_path / "h", strict=True)


def test_a_path_in_what_is_noted_does_not_hide_the_reason(file: Any, tmp_path: Path) -> None:
    deep = "/".join(["d" * 60] * 4)
    file("hello\n", f"h/{deep}/a.csv")
    (said,) = read_host("h", tmp_path / "h", strict=False).problems
    assert "a.csv, line 1: the header must name" in said


# ---- what the hosts' own programs write ----


def sampled(root: Path, command: str, monkeypatch: Any) -> Any:
    """A watcher of one unit whose one process is this one, and its segments, with figures that are made up."""
    here = root / "cgroup" / UNIT
    here.mkdir(parents=True)
    (root / "cgroup" / "cgroup.controllers").touch()
    (here / "cgroup.procs").write_text(f"{os.getpid()}\n")
    (here / "memory.current").write_text("104857600\n")
    (root / "tasks").mkdir()
    (root / "tasks" / str(os.getpid())).write_text("17\n")
    monkeypatch.setattr(sampler, "restarts_of", lambda units: dict.fromkeys(units, "3"))
    monkeypatch.setattr(sampler, "is_worker", lambda argv: False)
    monkeypatch.setattr(sampler, "command_of", lambda raw: command)
    watcher = sampler.Watcher(root=root / "cgroup", tasks=root / "tasks")
    one = sampler.Sampler(watcher, sampler.Store(root / "samples", 1 << 20, 1e9), 10)
    one.beat(NOON + 0.25)
    one.close()
    return one


def test_every_column_that_the_sampler_writes_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    """By the sampler's own code; a segment that is open, and one that is gzipped."""
    command = 'celery -A shop worker -Q "a,b"'
    one = sampled(tmp_path, command, monkeypatch)
    sampler.compress(next((tmp_path / "samples").glob("samples-*.csv")))
    data = read_host("h", tmp_path / "samples", strict=True)
    ((process, size),) = ((process, process.slow) for process in one.watcher.known.values())
    (sample,) = data.samples
    assert sample == Sample(
        timestamp=NOON + 0.25,
        pid=os.getpid(),
        rss_kb=sample.rss_kb,
        command=command,
        unit=UNIT,
        start_time=round(process.start_time, 2),
        role="main",
        pss_kb=size[0],
        uss_kb=size[1],
        swap_kb=0,
        fds=size[2],
        threads=int(size[3]),
        tasks=17,
    )
    assert sample.rss_kb >= sample.pss_kb >= sample.uss_kb > 1000
    assert data.cgroups == [CgroupSample(NOON + 0.25, UNIT, memory_current_kb=102400, n_restarts=3)]
    assert len(files_of(tmp_path / "samples")) == 3


def test_the_readers_columns_are_the_samplers() -> None:
    assert ",".join(Sample._fields) == sampler.SAMPLE_COLUMNS
    assert ",".join(CgroupSample._fields) == sampler.CGROUP_COLUMNS


def test_a_command_of_any_bytes_comes_through(tmp_path: Path, monkeypatch: Any) -> None:
    """The sampler's own writing, quotes and all."""
    sampled(tmp_path, "a,\"b\" \\ \u202e \udcff;'c'", monkeypatch)
    (row,) = read_host("h", tmp_path / "samples", strict=True).samples
    assert row.command == "a,\"b\" \\ ? ?;'c'"


def test_what_the_bootstrap_writes_is_read(tmp_path: Path) -> None:
    records = bootstrap.Records(tmp_path, UNIT)
    window = bootstrap.Window()
    window.start(1)
    window.shares.start("shop.scan", 0)
    kept = [bytes(2000) for _ in range(200)]
    growth, refusal = window.close(10)
    assert refusal == "" and kept
    written = [
        {"kind": "task_growth", "task": "shop.scan", "count": 40, "rss_growth_kb": -12},
        {"kind": "window_open", "rss_kb": 90000, "floor_kb": 80000, "frames": 1, "window_s": 60},
        growth,
        {"kind": "window_close", "reason": "window over", "rss_kb": 91000},
    ]
    records.write(written)
    read = read_host("h", tmp_path, strict=True).traces
    assert [{**one, "time": 0} for one in read] == [
        {"time": 0, "unit": UNIT, "pid": records.pid, **one} for one in json.loads(json.dumps(written))
    ]
    assert any(site["line"] and site["growth_kb"] > 300 for site in read[2]["sites"])
    assert csv.field_size_limit() == 131072  # read_csv relies on it for fields without end


def test_a_command_that_a_plain_script_did_not_quote_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rss.csv"
    path.write_text("timestamp,pid,rss_kb,command\n1800000000,7,60000,celery worker --queues=a,b,c\n")
    assert [row.command for row in read_csv(path)] == ["celery worker --queues=a,b,c"]
    path.write_text("timestamp,pid,command,rss_kb\n1800000000,7,celery worker --queues=a,b,c,60000\n")
    assert refused(path, ", line 2") == "6 fields, the header has 4"
