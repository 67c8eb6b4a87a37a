"""Files of samples, of units' figures and of traces: read as they are written; what makes no sense is left out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import ROOT, load_file
from plimsoll import formats, lines, samples
from plimsoll.formats import CgroupSample, HostData, Sample, files_of, printable, read_host
from plimsoll.series import workers_of

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


class Row(NamedTuple):
    """What is held of a sample."""

    time: float
    pid: int
    size: float
    worker: str = ""
    start_time: float | None = None
    role: str = ""
    tasks: float | None = None


def rows(data: HostData) -> list[Row]:
    return sorted(
        Row(time, one.pid, size, one.worker, one.start_time, one.role, None if np.isnan(tasks) else tasks)
        for one, columns in data.samples.lives()
        for _, time, size, tasks, _ in zip(*columns)
    )


def read(path: Path) -> tuple[list[Row], list[str]]:
    """Samples of a file, and what was said of it, without its path."""
    data = read_host("h", path)
    assert all(said.isprintable() and len(said) <= formats.MAX_PROBLEM for said in data.problems)
    return rows(data), [said.removeprefix(f"{path}: ") for said in data.problems]


def sound(path: Path) -> list[Row]:
    found, problems = read(path)
    assert problems == []
    return found


# ---- samples ----


def test_a_plain_scripts_file_is_read_as_it_is(file: Any) -> None:
    path = file(f'{PLAIN}{NOON}.5,41,90000,"celery -A shop worker -Q a,b"\n{NOON + 60},42,90004,celery\n')
    assert sound(path) == [
        Row(NOON + 0.5, 41, 90000, "celery -A shop worker -Q a,b"),
        Row(NOON + 60, 42, 90004, "celery"),
    ]


def test_columns_go_by_name_and_unknown_ones_are_passed_over(file: Any) -> None:
    path = file(f"rss_kb,cpu,pid,unit,timestamp,tasks\n90000,x,41,{UNIT},{NOON},\n90004,,41,{UNIT},{NOON + 1},3\n")
    assert sound(path) == [Row(NOON, 41, 90000, UNIT), Row(NOON + 1, 41, 90004, UNIT, tasks=3)]
    # Of two columns of one name the first counts.
    assert sound(file(f"timestamp,pid,rss_kb,rss_kb,unit\n{NOON},41,5,x,u\n")) == [Row(NOON, 41, 5, "u")]


def test_times_are_of_milliseconds(file: Any) -> None:
    """Nearer ones, which no sampler takes, would make slopes without end."""
    path = file(f"timestamp,pid,rss_kb,unit,start_time\n{NOON}.0004,1,2,u,\n{NOON}.0014,1,2,u,{NOON}.1239\n")
    assert sound(path) == [Row(NOON, 1, 2, "u"), Row(NOON + 0.001, 1, 2, "u", NOON + 0.124)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_as_on_any_system(file: Any, end: str) -> None:
    assert sound(file(f"timestamp,unit,pid,rss_kb{end}{NOON},u,1,2{end}")) == [Row(NOON, 1, 2, "u")]
    assert sound(file(f'timestamp,pid,rss_kb,command{end}{NOON},1,2,"a,b"{end}')) == [Row(NOON, 1, 2, "a,b")]


def test_what_spreadsheets_and_ps_add_is_taken_off(file: Any) -> None:
    """A mark at the beginning, quotes around each cell, and blanks that align."""
    head = '\ufeff"timestamp", "pid","rss_kb","command"\n'
    text = f'{head}"{NOON}","41","90000","celery"\n {NOON},   42,\t90000 , celery \n'
    assert sound(file(text)) == [Row(NOON, 41, 90000, "celery"), Row(NOON, 42, 90000, "celery")]
    assert sound(file(f"\ufeff{NOON},41,90000,celery\n")) == [Row(NOON, 41, 90000, "celery")]
    assert sound(file(f'timestamp,pid,rss_kb,swap_kb,unit\n{NOON},41,9,"",u\n{NOON},42,9,,u\n')) == [
        Row(NOON, 41, 9, "u"),
        Row(NOON, 42, 9, "u"),
    ]


@pytest.mark.parametrize("torn", ["", "1763985660", "1763985660,41,9000", '1763985660,41,90004,"celery'])
def test_a_torn_last_line_is_left_out(file: Any, torn: str) -> None:
    text = f"{PLAIN}{NOON},41,90000,celery\n{torn}"
    assert sound(file(text)) == [Row(NOON, 41, 90000, "celery")]
    assert sound(file(gzip.compress(text.encode()), "samples.csv.gz")) == [Row(NOON, 41, 90000, "celery")]


@pytest.mark.parametrize("nothing", ["", PLAIN, f"{sampler.ROLLUP_COLUMNS}\nwhatever\n"])
def test_an_empty_file_a_header_alone_and_a_rollup_hold_nothing(file: Any, nothing: str) -> None:
    assert sound(file(nothing)) == []
    assert sound(file(gzip.compress(nothing.encode()), "samples.csv.gz")) == []


def test_a_process_without_memory_is_no_sample(file: Any) -> None:
    """A zombie; one that is swapped out as a whole is one."""
    text = f"timestamp,pid,rss_kb,swap_kb,unit\n{NOON},1,0,,u\n{NOON},2,0,0,u\n{NOON},3,0,7,u\n{NOON},4,5,,u\n"
    assert sound(file(text)) == [Row(NOON, 3, 7, "u"), Row(NOON, 4, 5, "u")]


def test_a_command_that_a_plain_script_did_not_quote_is_read_whole(file: Any) -> None:
    for command in ("celery worker --queues=a,b,c", 'celery -n "a,b" -Q c,d', 'echo 5" of rain, or 6', ",,,"):
        assert sound(file(f"{PLAIN}{NOON},7,60000,{command}\n")) == [Row(NOON, 7, 60000, command)]
    _, problems = read(file(f"timestamp,pid,command,rss_kb\n{NOON},7,celery worker --queues=a,b,c,60000\n"))
    assert problems == ["1 line was left out, first line 2: 6 fields, the header has 4"]


def test_what_the_csv_module_quotes_is_read_as_it_reads_it(file: Any) -> None:
    rng = random.Random(0)
    commands = {"".join(rng.choices("ab ,\"'\\;é", k=rng.randint(1, 9))) for _ in range(400)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["timestamp", "pid", "command", "rss_kb"])
    writer.writerows([NOON, pid, command, 5] for pid, command in enumerate(sorted(commands)))
    found = {one.pid: one.worker for one in sound(file(text.getvalue()))}
    # What is not quoted loses the blanks around it.
    wanted = {pid: one if set(one) & set(',"') else one.strip() for pid, one in enumerate(sorted(commands))}
    assert found == {pid: one or f"pid {pid}" for pid, one in wanted.items()} and len(found) > 300


# ---- headers ----


def test_a_file_without_a_header_is_told_by_its_first_line(file: Any) -> None:
    """As what grep found, or the end of a file."""
    text = f"{NOON},41,90000,celery -Q a,b\n{NOON + 60},41,90004,celery -Q a,b\n"
    assert sound(file(text)) == [Row(NOON, 41, 90000, "celery -Q a,b"), Row(NOON + 60, 41, 90004, "celery -Q a,b")]
    line = f'{NOON}.250,41,90000,"celery -Q a,b",{UNIT},{NOON - 9}.00,child,,,8,,,3\n'
    assert sound(file(line * 2)) == [Row(NOON + 0.25, 41, 90008, UNIT, NOON - 9, "child", 3)]


def test_files_that_were_put_together_to_one_are_told_apart(file: Any) -> None:
    full = f"{sampler.SAMPLE_COLUMNS}\n{NOON}.000,41,90000,celery,{UNIT},{NOON - 9}.00,child,,,0,,,3\n"
    cgroup = f"{sampler.CGROUP_COLUMNS}\n{NOON}.000,{UNIT},102400,,204800,4,7,2,1,1234,567,\n"
    rollup = f"{sampler.ROLLUP_COLUMNS}\nwhatever\n"
    plain = f"{PLAIN}{NOON},7,60000,celery --timestamp,timestamp,x\n"
    wanted = [Row(NOON, 7, 60000, "celery --timestamp,timestamp,x"), Row(NOON, 41, 90000, UNIT, NOON - 9, "child", 3)]
    rng = random.Random(0)
    texts = [full, cgroup, rollup, plain, full.replace(str(NOON), str(NOON + 60)), sampler.SAMPLE_COLUMNS + "\n"]
    for _ in range(10):
        rng.shuffle(texts)
        data = read_host("h", file("".join(texts)))
        assert [one for one in rows(data) if one.time == NOON] == wanted and len(rows(data)) == 3
        assert (len(data.cgroups.by_unit({UNIT})[UNIT]["timestamp"]), data.problems) == (1, [])
    # A script may write its header each time.
    beats = "".join(f"{PLAIN}{NOON + n},7,60000,x\n" for n in range(50))
    assert sound(file(beats)) == [Row(NOON + n, 7, 60000, "x") for n in range(50)]
    # Lines are counted through all of it.
    text = full + cgroup + f"oops\n{plain}5,x,5,\n\ufeff{full}"
    (said,) = read(file(text))[1]
    assert said == (
        "2 lines were left out, first line 5: 1 fields, the header has 12; "
        "line 8: pid: 'x' is not a value of that column"
    )


def test_the_first_lines_are_named_whatever_they_are_below(file: Any) -> None:
    text = f"{PLAIN}a\n{sampler.CGROUP_COLUMNS}\nb\n{PLAIN}c\nd\n"
    (said,) = read(file(text))[1]
    assert re.findall(r"line (\d+): ", said) == ["2", "4", "6"] and said.startswith("4 lines were left out")


def test_a_host_that_writes_another_header_for_each_line_does_not_take_for_ever(file: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(formats, "MOST_HEADERS", 5)
    text = "".join(f"timestamp,pid,rss_kb,x{n}\n{NOON},{n},5,\n" for n in range(100))
    found, problems = read(file(text))
    assert [one.pid for one in found] == [0, 1, 2, 3, 4]
    assert problems == [f"95 lines were left out, first line 12: {formats._NO_HEADER}"]
    assert not sound(file(f"timestamp,pid,rss_kb{',x' * 900}\n"))
    assert read(file(f"timestamp,pid,rss_kb{',x' * 1000}\n"))[1] == [
        f"1 line was left out, first line 1: {formats._NO_HEADER}"
    ]


HEADERS = {
    "words": "hello\n",
    "a column too few": "timestamp,pid,command\n",
    "other names": "time,pid,rss,cmd\n",
    "an empty first line": "\n",
    "bytes": b"\x89PNG\r\n",
    "three numbers alone": f"{NOON},41,90000\n",
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("block", [30, 16 << 20])
def test_a_header_of_nothing_known_says_what_it_must_name(file: Any, header: str, block: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    monkeypatch.setattr(lines, "UNPACKED_BYTES", block)
    monkeypatch.setattr(lines, "PACKED_BYTES", block)
    first = HEADERS[header]
    content = (first.encode() if isinstance(first, str) else first) + f"{NOON},41,90000,celery\n".encode() * 3
    assert read(file(content)) == ([], [f"4 lines were left out, first line 1: {formats._NO_HEADER}"])
    assert "timestamp, pid and rss_kb (samples)" in formats._NO_HEADER
    # Behind a header there is more.
    assert read(file(content + f"{PLAIN}{NOON},41,90000,celery\n".encode()))[0] == [Row(NOON, 41, 90000, "celery")]


# ---- lines that make no sense ----

BAD = {
    "a field too few": ("5,41,90000", "3 fields, the header has 4"),
    "an empty line": ("", "1 fields, the header has 4"),
    "no time": ("soon,41,90000,x", "timestamp: 'soon' is not a value of that column"),
    "time NaN": ("nan,41,90000,x", "timestamp: 'nan' is not"),
    "time inf": ("inf,41,90000,x", "timestamp: 'inf' is not"),
    "time without end": ("1e999,41,90000,x", "timestamp: '1e999' is not"),
    "time below 0": ("-1,41,90000,x", "timestamp: '-1' is not"),
    "time in milliseconds": ("1763985600000,41,90000,x", "timestamp: '1763985600000' is not"),
    "a date": ("2025-11-24T12:00:00Z,41,90000,x", "timestamp: '2025-11-24T12:00:00Z' is not"),
    "no pid": ("5,,90000,x", "pid: '' is not"),
    "pid below 0": ("5,-41,90000,x", "pid: '-41' is not"),
    "no size": ("5,41,,x", "rss_kb: '' is not"),
    "size NaN": ("5,41,NaN,x", "rss_kb: 'NaN' is not"),
    "size with a fraction": ("5,41,9.5,x", "rss_kb: '9.5' is not"),
    "size with a unit": ("5,41,9M,x", "rss_kb: '9M' is not"),
    "size below 0": ("5,41,-4,x", "rss_kb: '-4' is not"),
    "size of no machine": (f"5,41,{2**53},x", f"rss_kb: '{2**53}' is not"),
    "size past 64 bits": (f"5,41,{2**70},x", f"rss_kb: '{2**70}' is not"),
    "a number without end": (f"5,41,{'9' * 5000},x", f"rss_kb: '{'9' * 40}' is not"),
    "escapes": ("5,41,\x1b[2J\x07,x", r"rss_kb: '\x1b[2J\x07' is not"),
    "zeros of a power cut": ("\0" * 500, "1 fields, the header has 4"),
    "a line without end": (f"5,41,90000,{'x' * (1 << 20)}", "a line of more than 1048576 bytes"),
    "a number that is torn": ("5,41", "2 fields, the header has 4"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("block", [30, 16 << 20])
def test_a_bad_line_is_named_and_the_others_are_read(file: Any, bad: str, block: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    line, said = BAD[bad]
    found, problems = read(file(f"{PLAIN}4,41,90000,x\n{line}\n6,41,90000,x\n"))
    assert found == [Row(4, 41, 90000, "x"), Row(6, 41, 90000, "x")]
    assert len(problems) == 1 and problems[0].startswith(f"1 line was left out, first line 3: {said}")


def test_a_cell_that_need_not_be_there_must_be_one_of_its_column_where_it_is(file: Any) -> None:
    for at, name in enumerate(Sample._fields):
        cells = ["5", "41", "90000", "celery", UNIT, *[""] * 8]
        cells[at] = "oops"
        found, problems = read(file(f"{sampler.SAMPLE_COLUMNS}\n{','.join(cells)}\n"))
        if name in ("command", "unit", "role"):
            assert len(found) == 1 and not problems
        else:
            assert not found
            assert problems == [f"1 line was left out, first line 2: {name}: 'oops' is not a value of that column"]


@pytest.mark.parametrize("block", [30, 16 << 20])
def test_what_was_left_out_is_counted_and_the_first_lines_are_named(file: Any, block: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    text = PLAIN + "".join(f"{n},{'x' if n % 7 == 0 else 41},90000,celery\n" for n in range(100)) + "a\nb\n"
    found, problems = read(file(text))
    assert len(found) == 85
    assert problems == [
        "17 lines were left out, first line 2: pid: 'x' is not a value of that column; "
        "line 9: pid: 'x' is not a value of that column; line 16: pid: 'x' is not a value of that column"
    ]


def test_one_quote_too_few_does_not_swallow_the_rest(file: Any) -> None:
    text = f'{PLAIN}4,41,90000,"x\n5,42,90000,y\n6,43,90000,"a""b"\n'
    assert sound(file(text)) == [Row(4, 41, 90000, '"x'), Row(5, 42, 90000, "y"), Row(6, 43, 90000, 'a"b')]
    text = 'timestamp,pid,command,rss_kb\n4,41,"x,90000\n5,42,"y,z",90000\n6,43,"a,b,90000\n'
    assert read(file(text)) == (
        [Row(4, 41, 90000, '"x'), Row(5, 42, 90000, "y,z")],
        ["1 line was left out, first line 4: 5 fields, the header has 4"],
    )


def test_bytes_that_are_no_text_are_replaced(file: Any) -> None:
    assert sound(file(PLAIN.encode() + b"1,2,3,\xff\xfe\n")) == [Row(1, 2, 3, "\ufffd\ufffd")]
    found, problems = read(file(PLAIN.encode() + b"1,2,\xff\xfe,x\n1,2,3,a\0b\n"))
    assert (found, problems) == (
        [Row(1, 2, 3, "a?b")],
        [r"1 line was left out, first line 2: rss_kb: '\ufffd\ufffd' is not a value of that column"],
    )


def test_a_damaged_gz_is_named_and_what_is_before_the_damage_is_read(file: Any) -> None:
    text = PLAIN + "".join(f"{NOON + n},41,{90000 + n * n},celery\n" for n in range(2000))
    packed = gzip.compress(text.encode())
    found, problems = read(file(packed[: len(packed) // 2], "samples.csv.gz"))
    assert len(found) > 100 and found[-1].size == 90000 + (len(found) - 1) ** 2
    assert problems == [f"truncated or damaged after line {len(found) + 1}"]
    assert read(file(b"\x1f\x8b", "samples.csv.gz")) == ([], ["truncated or damaged"])


def test_nothing_that_a_file_can_hold_ends_the_reading(file: Any, monkeypatch: Any) -> None:
    rng = random.Random(0)
    text = f'{sampler.SAMPLE_COLUMNS}\n{NOON},41,90000,"a,b",{UNIT},{NOON - 9}.00,child,1,2,3,4,5,6\n'
    for _ in range(60):
        content = bytearray((text * rng.randint(1, 3)).encode())
        for _ in range(rng.randint(1, 30)):
            at = rng.randrange(len(content))
            content[at : at + rng.randint(0, 3)] = rng.choice(
                [b"\n", b'"', b",", b"\0", b"\r", b"\xff", b"9" * 30, b""]
            )
        monkeypatch.setattr(lines, "BLOCK_BYTES", rng.choice([20, 300, 16 << 20]))
        read(file(gzip.compress(bytes(content)) if rng.random() < 0.2 else bytes(content)))


# ---- figures of units ----


def test_a_units_figures_have_no_limit_where_the_cell_is_empty(file: Any) -> None:
    text = f"{sampler.CGROUP_COLUMNS}\n{NOON}.000,{UNIT},102400,,204800,4,7,2,1,1234,567,\n{NOON},x,,,,,,,,,,\n"
    data = read_host("h", file(text))
    assert figures(data) == {
        UNIT: [[NOON, 102400, None, 204800, 4, 7, 2, 1, 1234, 567, None]],
        "x": [[NOON, *[None] * 10]],
    }
    assert data.problems == []


def figures(data: HostData) -> dict[str, list[list[float | None]]]:
    return {
        unit: [[None if np.isnan(value) else value for value in one] for one in zip(*columns.values())]
        for unit, columns in data.cgroups.by_unit({UNIT, "x"}).items()
    }


def test_a_bad_figure_is_named(file: Any) -> None:
    path = file(f"{sampler.CGROUP_COLUMNS}\n{NOON},{UNIT},102400,max,204800,4,7,2,1,1234,567,\n")
    assert read(path)[1] == ["1 line was left out, first line 2: memory_high_kb: 'max' is not a value of that column"]


# ---- what comes from a host is fit to print ----

TRICKS = {
    "terminal escapes": "\x1b[31m\x07\x9b2J",
    "other ends of lines": "a\r\u2028\u2029\x85b",
    "direction": "\u202eexe.gpj\u2066\u2069\u200f\u061c",
    "nothing to see": "x\u200b\ufeff\xad\x00\x7fx",
    "half a pair": "\ud800",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_printed_is_printable(file: Any, trick: str) -> None:
    shown = printable(TRICKS[trick])
    assert shown.isprintable() and len(shown) == len(TRICKS[trick])
    shown.encode()
    if trick != "half a pair":  # which no file can hold
        cells = ",".join([f'"{TRICKS[trick]}"'] * 3)
        found = sound(file(f"timestamp,pid,rss_kb,command,unit,role\n1,2,3,{cells}\n"))
        assert [(one.worker, one.role) for one in found] == [(shown, shown)]
        assert sound(file(f'{PLAIN}1,2,3,"{TRICKS[trick]}"\n'))[0].worker == shown


def test_what_is_printed_has_an_end_and_keeps_what_people_write(file: Any) -> None:
    assert printable("täglich_报告 <b>") == "täglich_报告 <b>"
    assert (len(printable("x" * 10**6)), printable("x" * 300)[-2:]) == (200, "x…")
    assert printable("x" * 200) == "x" * 200
    assert printable(["\x07"]) == r"['\x07']"
    assert sound(file(f"{PLAIN}1,2,3,{'x' * 300}\n"))[0].worker == "x" * 199 + "…"


# ---- traces ----


def jsonl(*records: Any) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def test_trace_records_are_read_with_fields_that_are_not_known(file: Any) -> None:
    other = {"kind": "gc_types", "time": 2, "types": {"dict": 4}}
    path = file(jsonl(GROWTH, other) + '{"kind": "torn', "trace.jsonl")
    data = read_host("h", path)
    assert (data.traces, data.problems) == ([GROWTH, other], [])
    packed = file(gzip.compress(path.read_bytes()), "trace.jsonl.gz")
    assert read_host("h", packed).traces == [GROWTH, other]


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
    "objects that are none": {**GROWTH, "objects": [{"type": "a", "count": "9", "growth": 1}]},
    "a holder without its way": {**GROWTH, "holders": [{"type": "a", "size": 1, "growth": 1}]},
    "a chain of numbers": {**GROWTH, "chains": [[1]]},
    "a cache whose bound is text": {**GROWTH, "caches": [{"name": "a", "size": 1, "growth": 1, "most": "9"}]},
    "descriptors as a list": {**GROWTH, "fds": []},
    "kinds of descriptors as numbers": {**GROWTH, "fds": {"count": 1, "growth": 1, "kinds": {"file": 1}, "paths": []}},
    "an allocator without end": {
        **GROWTH,
        "malloc": {"used_growth_kb": float("inf"), "free_growth_kb": 1, "trimmed_kb": None},
    },
    "memory as text": {**GROWTH, "memory": "much"},
    "callers as text": {**GROWTH, "sites": [{"line": 1, "growth_kb": 1, "callers": "a.py:1"}]},
    "a task's growth as text": {**GROWTH, "tasks": {"shop.scan": {"traced_growth_kb": "8"}}},
    "a pid that is a list": {**GROWTH, "pid": [7]},
    "a count that is true": {"kind": "task_growth", "time": 1, "count": True},
    "a number measured as text": {"kind": "task_growth", "time": 1, "measured": "8"},
    "growth of RSS that is null": {"kind": "task_growth", "time": 1, "rss_growth_kb": None},
    "a size as text": {"kind": "window_open", "time": 1, "rss_kb": "9"},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_record_of_another_shape_is_left_out(file: Any, wrong: str) -> None:
    later = {**GROWTH, "time": 2.5}
    data = read_host("h", path := file(jsonl(GROWTH, WRONG[wrong], later), "trace.jsonl"))
    assert data.traces == [GROWTH, later]
    assert data.problems == [f"{path}: 1 line was left out, first line 2: no trace record"]


@pytest.mark.parametrize(
    "text", ["", "{", "\x00", "[" * 100_000, '{"kind":}'], ids=["empty", "half", "nul", "deep", "no"]
)
def test_a_line_that_is_no_json_is_left_out_and_named(file: Any, text: str) -> None:
    data = read_host("h", path := file(f"{jsonl(GROWTH)}{text}\n", "trace.jsonl"))
    assert data.traces == [GROWTH]
    assert data.problems[0].startswith(f"{path}: 1 line was left out, first line 2: ")


def test_records_come_by_time_and_each_once(file: Any, tmp_path: Path) -> None:
    early, late = ({**GROWTH, "time": time} for time in (1, 2))
    file(jsonl(late, early), "h/a.jsonl")
    file(jsonl(early), "h/b.jsonl")
    assert read_host("h", tmp_path / "h").traces == [early, late]


# ---- a host ----


def test_the_files_of_a_host_are_sorted_and_others_are_not_looked_at(file: Any, tmp_path: Path) -> None:
    names = ("samples/a.csv", "samples/b.csv.gz", "samples/c.csv-20261124.gz", "samples/c.csv.1", "samples/c.csv.12.gz")
    wanted = [file("", f"h/{name}") for name in (*names, "trace/c.1.jsonl", "trace/c.jsonl")]
    for other in ("samples/.lock", "samples/a.csv.gz.tmp", "samples/a.csv~", "meta.json", "notes.txt"):
        file("", f"h/{other}")
    (tmp_path / "h/samples/dir.csv").mkdir()
    assert files_of(tmp_path / "h") == wanted
    assert files_of(wanted[1]) == [wanted[1]]
    assert files_of(tmp_path / "none") == []


def test_what_is_damaged_is_noted_and_the_rest_is_read(file: Any, tmp_path: Path) -> None:
    file(f"{PLAIN}1,41,90000,x\n2,41,oops,x\n3,41,90000,x\n", "h/samples/a.csv")
    file(f"{PLAIN}4,41,90000,x\n", "h/samples/b.csv")
    file(f"{sampler.CGROUP_COLUMNS}\n4,{UNIT},9,,,,,,,,,\n", "h/samples/c.csv")
    file(gzip.compress(f"{PLAIN}5,41,90000,x\n".encode())[:-3], "h/samples/d.csv.gz")
    file(jsonl(GROWTH) + "oops\n", "h/trace/a.jsonl")
    data = read_host("h", tmp_path / "h")
    assert [row.time for row in rows(data)] == [1, 3, 4, 5]
    assert (data.host, list(data.cgroups.by_unit({UNIT})), data.traces) == ("h", [UNIT], [GROWTH])
    assert [re.sub(r".*/h/", "", said) for said in data.problems] == [
        "samples/a.csv: 1 line was left out, first line 3: rss_kb: 'oops' is not a value of that column",
        "samples/d.csv.gz: truncated or damaged after line 2",
        "trace/a.jsonl: 1 line was left out, first line 2: no JSON: Expecting value",
    ]


def test_a_path_in_what_is_noted_does_not_hide_the_reason(file: Any, tmp_path: Path) -> None:
    deep = "/".join(["d" * 60] * 4)
    file("hello\n", f"h/{deep}/a.csv")
    (said,) = read_host("h", tmp_path / "h").problems
    assert "a.csv: 1 line was left out, first line 1: the header must name" in said and len(said) <= 400


def test_a_host_is_the_same_whatever_its_files_are_called(file: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """And wherever blocks are cut, and whether a segment is there twice; with more samples than are held, too."""
    rng = random.Random(0)
    monkeypatch.setattr(samples, "MOST_ROWS", 250)
    segments = []
    for hour in range(6):
        sampled = [
            f'{NOON + 3600 * hour + 60 * n},{pid},{rng.randint(5000, 6000)},"a,b",u{pid % 2},{NOON},child,,,{n},,,{n}'
            for n in range(60)
            for pid in range(4)
        ]
        cgroup = [f"{NOON + 3600 * hour + 60 * n}.000,u{unit},{n},,,,,,,,," for n in range(60) for unit in range(2)]
        segments.append("\n".join([sampler.SAMPLE_COLUMNS, *sampled, sampler.CGROUP_COLUMNS, *cgroup, ""]))
    found = set()
    for turn in range(4):
        monkeypatch.setattr(lines, "BLOCK_BYTES", rng.choice([1000, 16 << 20]))
        rng.shuffle(segments)
        for name, text in enumerate(segments):
            file(text, f"{turn}/h/{name}.csv")
        data = read_host("h", tmp_path / f"{turn}/h")
        assert data.problems == [] and len(data.samples) <= 250
        found.add(repr(workers_of(data)))
        assert sum(one.samples for one in workers_of(data)) == 6 * 60 * 4
    assert len(found) == 1
    monkeypatch.setattr(samples, "MOST_ROWS", 4_000_000)
    for name, text in enumerate(segments):
        file(text, f"once/h/{name}.csv")
        file(text, f"twice/h/{name}.csv")
        file(gzip.compress(text.encode()), f"twice/h/{name}.csv.gz")
    once, twice = (repr(workers_of(read_host("h", tmp_path / name / "h"))) for name in ("once", "twice"))
    assert once == twice


def test_standard_input_is_read_as_a_file_is(monkeypatch: Any) -> None:
    for content in (f"{PLAIN}1,41,90000,x\noops\n".encode(), gzip.compress(f"{PLAIN}1,41,90000,x\noops\n".encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        data = read_host("stdin", Path("-"))
        assert rows(data) == [Row(1, 41, 90000, "x")]
        assert data.problems == ["standard input: 1 line was left out, first line 3: 1 fields, the header has 4"]


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
    one = sampled(tmp_path, 'celery -A shop worker -Q "a,b"', monkeypatch)
    ((process, size),) = ((process, process.slow) for process in one.watcher.known.values())
    (segment,) = (tmp_path / "samples").glob("samples-*.csv")
    text = segment.read_bytes()
    sampler.compress(segment)
    data = read_host("h", tmp_path / "samples")
    (sample,) = rows(data)
    assert sample == Row(NOON + 0.25, os.getpid(), sample.size, UNIT, round(process.start_time, 2), "main", 17)
    assert sample.size >= size[0] >= size[1] > 1000
    assert figures(data) == {UNIT: [[NOON + 0.25, 102400, *[None] * 8, 3]]}
    assert data.problems == [] and len(files_of(tmp_path / "samples")) == 4
    # All columns, before what is not needed is let go.
    table = formats._table(text[text.index(b"\n") + 1 :], Sample, Sample._fields)
    assert (table.left_out, table.rows.row(0, named=True)) == (
        0,
        {
            "timestamp": NOON + 0.25,
            "pid": os.getpid(),
            "rss_kb": sample.size,
            "command": '"celery -A shop worker -Q ""a\x1fb"""',
            "unit": UNIT,
            "start_time": round(process.start_time, 2),
            "role": "main",
            "pss_kb": size[0],
            "uss_kb": size[1],
            "swap_kb": 0,
            "fds": size[2],
            "threads": int(size[3]),
            "tasks": 17,
        },
    )
    assert formats._text(table.rows["command"][0]) == 'celery -A shop worker -Q "a,b"'


def test_the_readers_columns_are_the_samplers() -> None:
    assert ",".join(Sample._fields) == sampler.SAMPLE_COLUMNS
    assert ",".join(CgroupSample._fields) == sampler.CGROUP_COLUMNS
    assert ",".join(formats._PLAIN) == sampler.PLAIN_COLUMNS


def test_a_command_of_any_bytes_comes_through(tmp_path: Path, monkeypatch: Any) -> None:
    """The sampler's own writing, quotes and all."""
    sampled(tmp_path, "a,\"b\" \\ \u202e \udcff;'c'", monkeypatch)
    (segment,) = (tmp_path / "samples").glob("samples-*.csv")
    text = segment.read_bytes()
    table = formats._table(text[text.index(b"\n") + 1 :].decode(errors="replace").encode(), Sample, Sample._fields)
    assert formats._text(table.rows["command"][0]) == "a,\"b\" \\ ? ?;'c'"
    assert read_host("h", tmp_path / "samples").problems == []


def test_what_the_bootstrap_writes_is_read(tmp_path: Path) -> None:
    records = bootstrap.Records(tmp_path, UNIT)
    window = bootstrap.Window(60, 2, SimpleNamespace(id="a1"))
    opened = window.prepare()
    window.start()
    window.shares.start("shop.scan", 0)
    kept = [bytes(2000) for _ in range(200)]
    growth, refusal = window.close(10)
    assert refusal == "" and kept
    written = [
        {"kind": "task_growth", "task": "shop.scan", "count": 40, "measured": 38, "rss_growth_kb": -12},
        {"kind": "window_open", "rss_kb": 90000, "floor_kb": 80000, "frames": 2, "window_s": 60, "gc_objects": opened},
        growth,
        {"kind": "window_close", "reason": "window over", "rss_kb": 91000},
    ]
    records.write(written)
    data = read_host("h", tmp_path)
    by_kind = {one["kind"]: one for one in data.traces}
    assert [{**by_kind[one["kind"]], "time": 0} for one in written] == [
        {"time": 0, "unit": UNIT, "pid": records.pid, **one} for one in json.loads(json.dumps(written))
    ]
    assert data.problems == []
    assert any(site["line"] and site["growth_kb"] > 300 for site in by_kind["growth"]["sites"])


def test_what_is_shipped_to_hosts_needs_nothing_of_the_reading() -> None:
    """Hosts have the standard library alone."""

    def imported(text: str) -> set[str]:
        named = re.findall(r"^ *from (?:\.|\.\.module_utils\.plimsoll)\.?(\w*) import (.*)", text, re.MULTILINE)
        return {word for module, names in named for word in ([module] if module else re.findall(r"\w+", names))}

    ours = {path.stem: imported(path.read_text()) for path in (ROOT / "module_utils" / "plimsoll").glob("*.py")}
    shipped: set[str] = set()
    pending = {name for path in (ROOT / "library").glob("*.py") for name in imported(path.read_text())}
    while pending:
        shipped |= pending
        pending = {one for name in pending for one in ours.get(name, ())} - shipped
    assert {"bundle", "hostfiles", "units"} <= shipped and "lines" in ours["formats"]
    assert not shipped & {"formats", "lines", "samples", "series", "store"}
