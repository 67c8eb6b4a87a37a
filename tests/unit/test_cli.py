"""The plimsoll command: what it reads, says and exits with."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from plimsoll import __version__, cli
from plimsoll.bundle import Cursor, listing, pack, plan
from plimsoll.cli import main
from plimsoll.store import cursor_file
from plimsoll.store import ingest as take_in

T0 = 1_763_942_400
NOW = T0 + 30 * 3600.0
UNIT = "celery-worker@gate.service"
HEADER = "timestamp,pid,rss_kb,command,unit,start_time,role\n"


def csv(rate: float, unit: str = UNIT, hours: int = 30) -> str:
    rows = (f"{T0 + 900 * n},7,{int(60_000 + rate * n / 4)},celery,{unit},{T0},child\n" for n in range(4 * hours))
    return HEADER + "".join(rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def send(root: Path, host: str) -> dict[str, Any]:
    """A bundle of root/HOST as the host makes it, in root/inbox; what ingest is asked then."""
    logs, _ = listing(root / host, ("samples", "trace"))
    (root / "inbox").mkdir(exist_ok=True)
    path = cursor_file(root / "store", host)
    cursor = Cursor.of(json.loads(path.read_text())["cursor"]) if path.exists() else Cursor(logs="id")
    meta = {"schema": 2, "logs": "id", "units": [], "held": [log.key for log in logs], "journal": 0, "more": False}
    made = pack(plan(logs, cursor, 1 << 20)[0], meta, b"", root / f"inbox/{host}.tar.gz")
    return {"host": host, "sha256": made.sha256, "reason": ""}


@pytest.fixture
def store(write: Any, tmp_path: Path) -> Path:
    """As collect.yml leaves it: one host leaks, one sent damage, one did not answer, one never did."""
    bounds = {"max_bytes": 1 << 20, "keep_days": 30, "keep_rollups_days": 30}
    fleet = ["w-1", "w-2", "w-3", "w-4"]
    write("w-1/samples/samples-1.csv", csv(2000))
    write("w-2/samples/samples-1.csv", csv(0, "celery-worker@sales.service"))
    write("w-3/samples/samples-1.csv", csv(9000))
    asked = [send(tmp_path, host) for host in fleet[:3]]
    take_in(tmp_path / "inbox", tmp_path / "store", fleet, asked, now=NOW - 60, **bounds)
    write("w-2/samples/samples-2.csv", HEADER + f"{T0},7,oops,celery,{UNIT},,\n")
    asked = [
        {"host": "w-1", "same": True},
        send(tmp_path, "w-2"),
        *({"host": one, "reason": "down"} for one in fleet[2:]),
    ]
    take_in(tmp_path / "inbox", tmp_path / "store", fleet, asked, now=NOW, **bounds)
    return tmp_path / "store"


def run(capsys: Any, *words: Any) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


# ---- analyse ----


def test_a_plain_scripts_file_is_judged(write: Any, capsys: Any) -> None:
    lines = "".join(f"{T0 + 60 * n},7,{90_000 + 100 * n},celery -A shop worker\n" for n in range(200))
    path = write("rss.csv", "timestamp,pid,rss_kb,command\n" + lines)
    code, out, err = run(capsys, "analyse", path)
    assert (code, err) == (0, "")
    assert out.startswith("HOST") and "\nrss   celery -A shop worker  LEAK growing" in out
    assert "1 of 1 workers leak; 1 of 1 hosts were collected" in out


def test_fail_on_leaking_exits_with_3_only_where_one_leaks(write: Any, capsys: Any) -> None:
    leaks, healthy = write("a/samples/s.csv", csv(2000)), write("b/samples/s.csv", csv(0))
    assert run(capsys, "analyse", leaks)[0] == 0
    assert run(capsys, "analyse", leaks, "--fail-on", "leaking")[0] == 3
    assert run(capsys, "analyse", healthy, leaks, "--fail-on", "leaking")[0] == 3
    assert run(capsys, "analyse", healthy, "--fail-on", "leaking")[0] == 0


def test_a_store_is_judged_with_what_is_missing_in_it(store: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "analyse", store, "--format", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert {one["host"]: one["leaking"] for one in document["workers"]} == {"w-1": True, "w-2": False, "w-3": True}
    assert document["fleet"]["hosts"] == 4 and document["fleet"]["collected"] == 2
    oops = "samples/samples-2.csv: 1 line was left out, first line 2: rss_kb: 'oops' is not a value of that column"
    assert document["hosts"] == [
        {"host": "w-1", "collected": True, "reason": "", "last": NOW},
        {"host": "w-2", "collected": True, "reason": oops, "last": NOW},
        {"host": "w-3", "collected": False, "reason": "down", "last": NOW - 60},
        {"host": "w-4", "collected": False, "reason": "down", "last": None},
    ]
    text = run(capsys, "analyse", store)[1]
    assert "not collected: w-3: down; last collected 2025-11-25 05:59 UTC\n" in text
    assert "not collected: w-4: down; it never was\n" in text and "note: w-2: samples/samples-2.csv: 1 line" in text
    assert "2 of 3 workers leak; 2 of 4 hosts were collected" in text


def test_a_host_of_the_store_whose_data_is_gone_or_damaged_is_noted(store: Path, capsys: Any) -> None:
    for path in store.glob("samples/*/host=w-1"):
        shutil.rmtree(path)
    (damaged,) = store.glob("samples/day=2025-11-24/host=w-3/*")
    damaged.write_bytes(b"oops")
    code, out, _ = run(capsys, "analyse", store, "--format", "json")
    reasons = {one["host"]: one["reason"] for one in json.loads(out)["hosts"]}
    assert code == 0 and reasons["w-1"] == "no samples: is plimsoll-sampler.service running there?"
    assert reasons["w-3"] == f"down; {damaged}: damaged, so that what it held is missing; remove it"


def test_how_far_it_is_is_told_on_a_terminal_where_it_takes_long(store: Path, capsys: Any, monkeypatch: Any) -> None:
    assert run(capsys, "analyse", store)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(capsys, "analyse", store)[2] == ""
    monkeypatch.setattr(cli, "PROGRESS_S", 0)
    assert run(capsys, "analyse", store)[2] == "".join(
        f"plimsoll: {number} of 4 hosts are judged\n" for number in range(4)
    )


@pytest.mark.parametrize("damaged", ["", "{", "[1]", "[{}]", "5", "null", '{"a": 1}', '[{"host": "w-1"}]', "\udcff"])
def test_a_damaged_list_of_hosts_is_named(store: Path, capsys: Any, damaged: str) -> None:
    (store / "hosts.json").write_bytes(damaged.encode(errors="surrogateescape"))
    code, out, err = run(capsys, "analyse", store)
    assert (code, out, err) == (2, "", f"plimsoll: {store}/hosts.json: damaged; collect again\n")


def test_a_directory_of_several_hosts_is_read_by_their_names(write: Any, tmp_path: Path, capsys: Any) -> None:
    for host in ("w-1", "w-2", "w-3"):
        write(f"logs/{host}/samples/samples-1.csv", csv(0))
    document = json.loads(run(capsys, "analyse", tmp_path / "logs", "--format", "json")[1])
    assert [one["host"] for one in document["hosts"]] == ["w-1", "w-2", "w-3"]
    assert document["hosts"][0] == {"host": "w-1", "collected": True, "reason": "", "last": None}
    one_host = json.loads(run(capsys, "analyse", tmp_path / "logs/w-3", "--format", "json")[1])
    assert [one["host"] for one in one_host["workers"]] == ["w-3"]


def test_out_writes_both_files_and_the_table_says_where(store: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new/report"
    code, said, _ = run(capsys, "analyse", store, "--out", out)
    assert code == 0 and said.endswith(f"\nreport: {out}/report.html\n")
    assert sorted(path.name for path in out.iterdir()) == ["findings.json", "report.html"]
    assert len(json.loads((out / "findings.json").read_text())["workers"]) == 3
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    again = json.loads(run(capsys, "analyse", store, "--out", out, "--format", "json")[1])
    assert again["workers"] == json.loads((out / "findings.json").read_text())["workers"]


def test_html_is_the_page_alone(store: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "analyse", store, "--format", "html")
    assert code == 0 and out.startswith("<!doctype html>") and out.rstrip().endswith("</html>")


# ---- what cannot be read ----


def test_a_line_that_makes_no_sense_is_noted_and_the_rest_is_judged(write: Any, tmp_path: Path, capsys: Any) -> None:
    write("logs/a.csv", csv(2000))
    bad = write("logs/b.csv", "x,7,1,celery,u,,\n" + csv(2000) + "x,7,1,celery,u,,\n")
    for path in (bad, tmp_path / "logs"):
        code, out, err = run(capsys, "analyse", path, "--format", "json")
        assert code == 0 and [one["leaking"] for one in json.loads(out)["workers"]] == [True]
        assert err.startswith(f"plimsoll: note: {bad}: 2 lines were left out, first line 1: the header must name ")
        assert err.endswith("; line 123: timestamp: 'x' is not a value of that column\n") and err.count("\n") == 1


def test_many_notes_are_counted(write: Any, tmp_path: Path, capsys: Any) -> None:
    for name in range(9):
        write(f"logs/{name}.csv", csv(0) + "oops\n")
    code, out, err = run(capsys, "analyse", tmp_path / "logs")
    assert (code, err) == (0, "") and "note: logs: " in out
    code, _, err = run(capsys, "analyse", tmp_path / "logs", "--format", "json")
    assert code == 0 and err.count("1 line was left out") == cli.MOST_NOTES == 5
    assert err.endswith("\nplimsoll: note: and 4 more\n") and err.count("\n") == 6


def test_nothing_to_judge_is_an_error(write: Any, tmp_path: Path, capsys: Any) -> None:
    header = write("logs/empty.csv", HEADER)
    for path in (header, header.parent):
        code, out, err = run(capsys, "analyse", path)
        assert (code, out) == (2, "")
        assert err == f"plimsoll: {path}: no samples in 1 file; the sampler writes them to /var/log/plimsoll/samples\n"
    write("logs/oops.csv", "timestamp,pid,rss_kb\n1,2,x\n")
    code, _, err = run(capsys, "analyse", header.parent)
    said = f"{header.parent}/oops.csv: 1 line was left out, first line 2: rss_kb: 'x' is not a value of that column"
    assert (code, err) == (2, f"plimsoll: {header.parent}: no samples in 2 files; {said}\n")
    (tmp_path / "bare").mkdir()
    assert "no samples in 0 files" in run(capsys, "analyse", tmp_path / "bare")[2]
    # As long as there is something, it is none.
    assert run(capsys, "analyse", tmp_path / "bare", write("good.csv", csv(0)), header)[0] == 0


def test_a_path_that_is_not_there_is_an_error_before_anything_is_read(
    store: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    out, missing = tmp_path / "report", tmp_path / "none"
    monkeypatch.setattr(cli, "read_host", None)
    wanted = (2, "", f"plimsoll: {missing}: no such file or directory\n")
    assert run(capsys, "analyse", store, missing, "--out", out) == wanted
    assert not out.exists()


def test_standard_input_is_judged(write: Any, capsys: Any, monkeypatch: Any) -> None:
    content = gzip.compress((csv(2000) + "oops\n").encode()) + gzip.compress(csv(2000, "other").encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    code, out, err = run(capsys, "analyse", "-", "--format", "json")
    document = json.loads(out)
    assert (code, [(one["host"], one["leaking"]) for one in document["workers"]]) == (0, [("stdin", True)] * 2)
    assert err == "plimsoll: note: standard input: 1 line was left out, first line 122: 1 fields, the header has 7\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert run(capsys, "analyse", "-")[2].startswith("plimsoll: standard input: no samples in 1 file; ")


def test_what_a_shell_puts_in_place_of_a_file_is_read(tmp_path: Path, capsys: Any) -> None:
    """As `plimsoll analyse <(zcat samples-*.csv.gz)`."""
    pipe = tmp_path / "63"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(csv(2000),))
    writer.start()
    code, out, err = run(capsys, "analyse", pipe)
    writer.join()
    assert (code, err) == (0, "") and "\n63 " in out and "LEAK growing" in out


def test_a_second_report_says_what_changed_and_one_that_is_none_is_passed_over(
    store: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "report"
    assert "since " not in run(capsys, "analyse", store, "--out", out)[1]
    said = run(capsys, "analyse", store, "--out", out)
    assert re.search(r"^since \S+: no change$", said[1], re.MULTILINE) and said[2] == ""
    for damage in ("{", "[]", '{"workers": [{"host": 1}]}', '{"workers": 7, "generated": "x"}'):
        (out / "findings.json").write_text(damage)
        code, shown, err = run(capsys, "analyse", store, "--out", out)
        assert (code, "since " in shown) == (0, False)
        assert err.startswith(f"plimsoll: note: {out / 'findings.json'} is no findings.json")
    assert "since " in run(capsys, "analyse", store, "--out", out)[1]


def test_a_report_that_cannot_be_written_is_an_error(store: Path, write: Any, capsys: Any) -> None:
    taken = write("taken", "")
    code, _, err = run(capsys, "analyse", store, "--out", taken)
    assert (code, err) == (2, f"plimsoll: {taken}: File exists\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["analyse"],
        ["analyse", "x", "--format", "xml"],
        ["analyse", "x", "--fail-on", "growth"],
        ["ingest"],
        ["nope"],
    ],
)
def test_bad_usage_exits_with_2(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == cli.BAD_INPUT == 2
    assert "usage: plimsoll" in capsys.readouterr().err


def test_the_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"plimsoll {__version__}\n")


# ---- ingest ----


def ingest(
    capsys: Any, monkeypatch: Any, tmp_path: Path, asked: Any, *more: str, later: float = 0
) -> tuple[int, str, str]:
    text = asked if isinstance(asked, str) else json.dumps(asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(cli.time, "time", lambda: NOW + later)
    where = ["--inbox", tmp_path / "inbox", "--store", tmp_path / "store", "--out", tmp_path / "out"]
    bounds = ["--max-bytes", 1 << 20, "--keep-days", "9", "--keep-rollups-days", "99"]
    return run(capsys, "ingest", *where, *bounds, *more)


def test_ingest_takes_in_and_judges_as_analyse_does(write: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    write("w-1/samples/samples-1.csv", csv(2000) + "oops\n")
    hosts = [
        {**send(tmp_path, "w-1"), "same": False},
        {"host": "w-2", "sha256": "", "reason": "down", "same": False},
        {"host": "w-3", "sha256": "", "reason": "", "same": True},
    ]
    asked = {"fleet": ["w-0", "w-1", "w-2", "w-3"], "hosts": hosts}
    code, out, err = ingest(capsys, monkeypatch, tmp_path, asked)
    assert (code, err) == (0, "") and "LEAK growing" in out and "not collected: w-2: down; it never was" in out
    left_out = "w-1: samples/samples-1.csv: 1 line was left out, first line 122: 1 fields, the header has 7\n"
    assert left_out in out and out.endswith(f"report: {tmp_path}/out/report.html\n")
    (tmp_path / "out/findings.json").unlink()
    assert run(capsys, "analyse", tmp_path / "store", "--out", tmp_path / "out")[:2] == (0, out)


class Again:
    """Of w-1, and of w-2, which is down, both judged: what is said when both are asked once more, minutes later."""

    def __init__(self, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
        self.root, self.given = tmp_path, (capsys, monkeypatch, tmp_path)
        self.code = tmp_path / "code.py"
        self.code.touch()
        monkeypatch.setattr(cli, "__file__", str(self.code))
        self.says(send(tmp_path, "w-1"))
        page, found = self.root / "out/report.html", json.loads((self.root / "out/findings.json").read_text())
        self.page, self.found = page.read_text(), found
        for path, when in ((page, NOW), (self.code, NOW - 9), (self.root / "store/_cursors/w-1.json", NOW - 9)):
            os.utime(path, (when, when))

    def says(self, one: Any, other: Any = None, later: float = 0) -> str:
        hosts = [one, other or {"host": "w-2", "reason": "down"}]
        code, out, err = ingest(*self.given, {"fleet": ["w-1", "w-2"], "hosts": hosts}, later=later)
        assert code == 0 and (err == "" or "so nothing is said of changes" in err)
        return out

    @property
    def judged(self) -> bool:
        """Whether the page was made anew."""
        return (self.root / "out/report.html").stat().st_mtime != NOW


@pytest.fixture
def again(write: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Again:
    write("w-1/samples/samples-1.csv", csv(2000))
    return Again(tmp_path, capsys, monkeypatch)


SAME: dict[str, Any] = {"host": "w-1", "same": True}


def test_where_nothing_new_came_the_findings_stand_and_say_so(again: Again) -> None:
    out = again.says(SAME, {"host": "w-2", "reason": "unreachable: no route"}, later=300)
    assert not again.judged and "LEAK growing" in out and "not collected: w-2: unreachable: no route; it never" in out
    stands = f"nothing new has come; the report of 2025-11-25T06:00:00+00:00 stands: {again.root}/out/report.html\n"
    assert out.endswith(stands)
    found = json.loads((again.root / "out/findings.json").read_text())
    assert found["generated"] == "2025-11-25T06:05:00+00:00" and found["workers"] == again.found["workers"]
    assert found["changes"]["since"] == again.found["generated"]
    assert [one["last"] for one in found["hosts"]] == [NOW + 300, None]


def test_what_was_new_the_last_time_is_told_once(again: Again) -> None:
    path = again.root / "out/findings.json"
    path.write_text(
        json.dumps({**again.found, "changes": {**again.found["changes"], "gone": [{"host": 1, "unit": 2}]}})
    )
    again.says(SAME)
    assert not again.judged and json.loads(path.read_text())["changes"]["gone"] == []


@pytest.mark.parametrize(
    "case",
    ["new", "reached", "code", "page", "findings", "damaged", "older", "lacking", "next day", "crashed before judging"],
)
def test_where_anything_has_changed_it_is_judged_anew(again: Again, write: Any, case: str) -> None:
    out, one, other, later = again.root / "out", SAME, None, 300.0
    if case == "new":
        write("w-1/samples/samples-2.csv", csv(2000))
        one = send(again.root, "w-1")
    elif case == "reached":
        other = {"host": "w-2", "same": True}
    elif case == "code":
        os.utime(again.code, (NOW, NOW))
    elif case == "page":
        (out / "report.html").unlink()
    elif case == "findings":
        (out / "findings.json").unlink()
    elif case == "damaged":
        (out / "findings.json").write_text("{")
    elif case == "older":
        (out / "findings.json").write_text(json.dumps({**again.found, "schema": 0}))
    elif case == "lacking":
        workers = [{name: one[name] for name in one if name != "evidence"} for one in again.found["workers"]]
        (out / "findings.json").write_text(json.dumps({**again.found, "workers": workers}))
    elif case == "next day":
        later = 86400
    else:
        os.utime(again.root / "store/_cursors/w-1.json", (NOW + 1, NOW + 1))
    said = again.says(one, other, later=later)
    assert again.judged and "stands" not in said


def test_ingest_keeps_days_and_rollups_for_as_long_as_it_is_told(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for table, day in (("samples", 15), ("samples", 16), ("rollups", 15)):
        (tmp_path / f"store/{table}/day=2025-11-{day}").mkdir(parents=True)
    assert ingest(capsys, monkeypatch, tmp_path, {"fleet": [], "hosts": []})[::2] == (0, "")
    left = sorted(str(path.relative_to(tmp_path / "store")) for path in (tmp_path / "store").glob("*/day=*"))
    assert left == ["rollups/day=2025-11-15", "samples/day=2025-11-16"]


HOST = {"host": "w-1", "sha256": "x"}


@pytest.mark.parametrize(
    "asked",
    [
        *("", "{", "[", 5, None, [], {}, HOST),
        *({"hosts": []}, {"fleet": []}, {"fleet": {}, "hosts": []}, {"fleet": [5], "hosts": []}),
        *({"fleet": [""], "hosts": []}, {"fleet": ["w-1"], "hosts": HOST}, {"fleet": "w-1", "hosts": [HOST]}),
        *({"fleet": ["w-1"], "hosts": [one]} for one in (5, {}, {"host": "w-1"}, {"sha256": "x"}, {**HOST, "host": 5})),
        *({"fleet": ["w-1"], "hosts": [one]} for one in ({**HOST, "sha256": 5}, {**HOST, "host": ["w-1"]})),
        {"fleet": ["w-2"], "hosts": [HOST]},
        {"fleet": ["w-1"], "hosts": [HOST, HOST]},
    ],
)
def test_ingest_says_what_is_wrong_with_its_input_and_touches_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: Any, asked: Any
) -> None:
    code, out, err = ingest(capsys, monkeypatch, tmp_path, asked)
    assert (code, out) == (2, "") and err.startswith("plimsoll: standard input: ")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("days", ["0", "-1", "1.5", "x", ""])
def test_days_to_keep_are_at_least_one(tmp_path: Path, capsys: Any, monkeypatch: Any, days: str) -> None:
    """Or all would be gone."""
    with pytest.raises(SystemExit) as ended:
        ingest(capsys, monkeypatch, tmp_path, {"fleet": [], "hosts": []}, "--keep-days", days)
    assert ended.value.code == 2 and "is no number of days from 1 on" in capsys.readouterr().err


def test_a_store_that_somebody_else_writes_to_is_an_error(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("plimsoll.store.LOCK_WAIT_S", 0)
    (tmp_path / "store").mkdir()
    with (tmp_path / "store/.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, out, err = ingest(capsys, monkeypatch, tmp_path, {"fleet": [], "hosts": []})
    said = "process ? is writing to the store; collect again when it has ended"
    assert (code, out, err) == (2, "", f"plimsoll: {tmp_path}/store/.lock: {said}\n")


# ---- remediation ----

POLICY = {
    **{"max_age_h": 24, "acts": ["trace", "recycle", "contain", "allocator"], "recycle_within_h": 12, "cordon": []},
    **{"least_tasks_per_child": 100, "least_uptime_h": 1, "share_percent": 25, "hosts_at_a_time": 10},
    "window_s": 60,
}
GATE = {
    **{"unit": UNIT, "active": True, "since": T0 - 60.0, "dropin": "", "changed": T0 - 90.0, "args": ""},
    **{"memory_high_kb": 1 << 20, "jemalloc": "", "systemd": 252, "stale": False, "restart": "always"},
    **{"runtime_max_s": None},
}
DECLARED = {"w-1": [{"name": "gate", "queues": ["gate"], "pool": "prefork", "concurrency": 2}], "w-2": None}
PLANNED: dict[str, Any] = {
    **{"declared": DECLARED, "states": {"w-1": {"workers": [GATE]}}, "policy": POLICY},
    "places": {"w-1": {"type": "g6-nanode-1", "region": "us-mia"}},
}
PROVES = {"declared": DECLARED, "policy": POLICY}


class Remediation:
    """A store whose findings stand, and the verbs of remediate.yml on it."""

    def __init__(self, store: Path, capsys: Any, monkeypatch: Any) -> None:
        self.store, self.out, self.capsys, self.monkeypatch = store, store.parent / "out", capsys, monkeypatch
        self.at(NOW)
        run(capsys, "analyse", store, "--out", self.out)

    def at(self, now: float) -> None:
        self.monkeypatch.setattr(cli.time, "time", lambda: now)

    def ask(self, asked: Any, verb: str, *more: str) -> tuple[int, str, str]:
        text = asked if isinstance(asked, str) else json.dumps(asked)
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        where = [self.store] if verb == "remedied" else [self.store, self.out / "findings.json"]
        return run(self.capsys, verb, *where, *more)

    def told(self, asked: Any, *words: str) -> Any:
        code, out, err = self.ask(asked, *words)
        assert (code, err) == (0, "")
        return json.loads(out)

    def left(self, asked: Any, *words: str) -> str:
        """Why the worker that leaks is left."""
        (why,) = (one["why"] for one in self.told(asked, *words)["told"] if (one["host"], one["unit"]) == ("w-1", UNIT))
        return str(why)

    @property
    def log(self) -> list[dict[str, Any]]:
        path = self.store / "remediation.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def do(self) -> None:
        """Plans at NOW, and a minute later the act is done."""
        (act,) = self.told(PLANNED, "remedies")["acts"]
        assert self.ask({"acts": [act], "came": {}}, "remedied", "--begun") == (0, "", "")
        self.at(NOW + 60)
        self.there = {**PLANNED, "states": {"w-1": {"workers": [{**GATE, "dropin": act["dropin"]}]}}}
        one = {"id": act["id"], "done": True, "changed": True, "why": "", "ended": NOW + 50, "away_s": 7.2}
        code, out, err = self.ask({"acts": [act], "host": "w-1", "came": {"outcomes": [one]}}, "remedied")
        assert (code, out, err) == (0, "w-1 gate: contain: done in 7 s\n", "")


@pytest.fixture
def remediation(store: Path, capsys: Any, monkeypatch: Any) -> Remediation:
    return Remediation(store, capsys, monkeypatch)


def test_what_is_to_be_done_is_planned_and_noted_and_with_check_nothing_is(remediation: Remediation) -> None:
    before = sorted(remediation.store.rglob("*"))
    looked = remediation.told(PLANNED, "remedies", "--check")
    assert [(one["host"], one["act"]) for one in looked["acts"]] == [("w-1", "contain")]
    assert looked["waves"] == [["w-1"]] and "CONTAIN w-1 gate: " in looked["text"]
    assert looked["due"] == pytest.approx(NOW + looked["acts"][0]["prove_s"])
    # No log, and no lock.
    assert sorted(remediation.store.rglob("*")) == before
    assert remediation.told(PLANNED, "remedies") == looked
    # Nothing is noted before it is begun.
    assert remediation.log == [] and (remediation.store / ".remediation.lock").exists()
    assert remediation.ask({"acts": looked["acts"], "came": {}}, "remedied", "--begun") == (0, "", "")
    assert [(one["event"], one["act"], one["time"]) for one in remediation.log] == [("planned", "contain", NOW)]


def test_a_remediation_beside_another_plans_nothing_and_may_look(remediation: Remediation) -> None:
    parent = psutil.Process().parent()
    assert parent is not None
    lock = {"pid": parent.pid, "created": round(parent.create_time(), 2)}
    (remediation.store / ".remediation.lock").write_text(json.dumps(lock))
    code, out, err = remediation.ask(PLANNED, "remedies")
    assert (code, out) == (2, "") and err.startswith("plimsoll: another remediation is under way: process ")
    assert remediation.log == [] and remediation.told(PLANNED, "remedies", "--check")["acts"]


def test_a_remedy_is_noted_and_is_in_the_findings(remediation: Remediation, capsys: Any) -> None:
    remediation.do()
    assert [one["event"] for one in remediation.log] == ["planned", "done"]
    text = " ".join(run(capsys, "analyse", remediation.store)[1].split())
    act = r"contain \(.*--max-memory-per-child=412876.*\)"
    assert "LEAK growing, done" in text and re.search(f"{act}: done, not proven yet, 2025-11-25 06:00 UTC: ", text)
    document = json.loads(run(capsys, "analyse", remediation.store, "--format", "json")[1])
    remedies = {one["host"]: one["remedy"] for one in document["workers"]}
    assert remedies["w-2"] is None and (remedies["w-1"]["act"], remedies["w-1"]["state"]) == ("contain", "done")
    assert remediation.left(remediation.there, "remedies", "--check").startswith("contain was done ")
    # Of one that somebody has taken away nothing is to be proven.
    assert remediation.told(PLANNED, "remedies", "--check")["acts"]


def test_what_is_traced_is_noted_and_is_not_traced_again_by_the_same_findings(remediation: Remediation) -> None:
    traces = remediation.told(PLANNED, "remedies")["traces"]
    assert [(act["act"], act["host"]) for act in traces] == [("trace", "w-1")]
    came = {"w-1": {"windows": [{"unit": UNIT, "opened": 1.0, "growth": {"rss_growth_kb": 900}}]}}
    remediation.at(NOW + 90)
    code, out, _ = remediation.ask({"acts": traces, "came": came}, "remedied", "--traced")
    assert (code, out) == (0, "w-1 gate: trace: done: in the window its RSS gained 900 KiB\n")
    assert [(one["act"], one["event"]) for one in remediation.log] == [("trace", "done")]
    again = remediation.told(PLANNED, "remedies")
    assert again["traces"] == [] and again["acts"]


def test_before_its_time_a_remedy_is_not_proven(remediation: Remediation) -> None:
    remediation.do()
    was = (remediation.out / "findings.json").read_text()
    told = remediation.told(PROVES, "prove")
    assert told["text"].startswith("w-1 gate: contain: not proven yet: ")
    assert told["due"] == NOW + 50 + remediation.log[-1]["prove_s"]
    assert told["back"]["acts"] == [] and len(remediation.log) == 2
    assert (remediation.out / "findings.json").read_text() == was


def sample_on(root: Path, begin: float, hours: int) -> None:
    """Of w-1's next process, which does not grow, taken into the store as collect.yml does."""
    rows = (f"{begin + 900 * n},8,60000,celery,{UNIT},{begin},child\n" for n in range(4 * hours))
    (root / "w-1/samples/samples-2.csv").write_text(HEADER + "".join(rows))
    bounds: Any = {"max_bytes": 1 << 20, "keep_days": 30, "keep_rollups_days": 30, "now": begin + 3600 * hours}
    take_in(root / "inbox", root / "store", ["w-1"], [send(root, "w-1")], **bounds)


def test_a_remedy_that_has_helped_is_proven_and_the_report_says_so(remediation: Remediation, tmp_path: Path) -> None:
    remediation.do()
    sample_on(tmp_path, NOW + 60, 25)
    remediation.at(NOW + 25 * 3600)
    told = remediation.told(PROVES, "prove")
    assert told["due"] is None and told["back"]["acts"] == [] and ": contain: REMEDIED: " in told["text"]
    proven = remediation.log[-1]
    assert (proven["event"], proven["verdict"]) == ("proven", "remedied")
    document = json.loads((remediation.out / "findings.json").read_text())
    (one,) = (one["remedy"] for one in document["workers"] if one["host"] == "w-1")
    assert (one["state"], one["before"]["pattern"], one["after"]["pattern"]) == ("remedied", "growing", "plateau")
    assert ", remedied" in (remediation.out / "report.html").read_text()
    again = remediation.told(PROVES, "prove")
    assert (again["due"], again["text"]) == (None, "") and remediation.log[-1] == proven


def test_a_remedy_that_was_worse_is_taken_back_where_the_run_that_proved_it_was_interrupted(
    remediation: Remediation,
) -> None:
    remediation.do()
    last = {**remediation.log[-1], "event": "proven", "verdict": "worse", "why": "2 OOM kills since"}
    with (remediation.store / "remediation.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    for _ in range(2):
        (act,) = remediation.told(remediation.there, "remedies")["acts"]
        assert (act["act"], act["reason"]) == ("remove", "it has become worse with it")
    # Where nothing is there to be taken away, a person is told why no more is done.
    assert "contain was of no use to it before (worse, " in remediation.left(PLANNED, "remedies")


def test_a_log_of_remediation_that_is_damaged_is_named_and_nothing_is_planned(remediation: Remediation) -> None:
    path = remediation.store / "remediation.jsonl"
    path.write_text("oops\n{}\n")
    for asked, verb in ((PLANNED, "remedies"), (PROVES, "prove")):
        code, out, err = remediation.ask(asked, verb)
        assert (code, out) == (2, "") and err.startswith(f"plimsoll: {path}:1: damaged; ") and err.count("\n") == 1


def test_all_remedies_are_taken_away_without_findings(remediation: Remediation) -> None:
    (remediation.out / "findings.json").unlink()
    asked = {**PLANNED, "states": {"w-1": {"workers": [{**GATE, "dropin": "[Service]\n"}]}, "w-2": {"msg": "down"}}}
    made = remediation.told(asked, "remedies", "--absent")
    assert [one["act"] for one in made["acts"]] == ["remove"] and made["due"] is None
    assert [one["why"] for one in made["told"]] == ["its state is not known: down"]


ACT = {"id": "1", "host": "w-1", "unit": UNIT, "act": "contain", "reason": "", "settings": [], "prove_s": 1.0}
NOT_OBJECTS: list[Any] = [None, [], "x"]
WRONG: list[tuple[str, Any]] = [
    *((verb, text) for verb in ("remedies", "remedied", "prove") for text in ("", "{", "5", "null", "[]", "{}")),
    *(("remedies", {**PLANNED, name: wrong}) for name in PLANNED for wrong in NOT_OBJECTS),
    *(("remedies", {name: PLANNED[name] for name in PLANNED if name != gone}) for gone in PLANNED),
    *(("remedies", {**PLANNED, "declared": {"w-1": wrong}}) for wrong in [*NOT_OBJECTS[2:], {}, [5], [{}]]),
    *(("remedies", {**PLANNED, "policy": {**POLICY, "max_age_h": wrong}}) for wrong in NOT_OBJECTS),
    *(("prove", {"declared": DECLARED, "policy": wrong}) for wrong in [*NOT_OBJECTS, {}]),
    ("prove", {"declared": [], "policy": POLICY}),
    *(("remedied", {"acts": wrong, "came": {}}) for wrong in [*NOT_OBJECTS[2:], None, {}, [5], [{}]]),
    *(("remedied", {"acts": [{**ACT, name: None}], "came": {}}) for name in ACT),
    *(("remedied", {"acts": [ACT], "came": wrong}) for wrong in NOT_OBJECTS),
]


def test_wrong_input_of_a_remediation_is_one_line_and_nothing_is_noted(remediation: Remediation) -> None:
    before = sorted(remediation.store.rglob("*"))
    for verb, asked in WRONG:
        code, out, err = remediation.ask(asked, verb)
        assert (code, out, err.count("\n")) == (2, "", 1), (verb, asked)
        assert err.startswith("plimsoll: standard input: "), (verb, asked)
    assert sorted(remediation.store.rglob("*")) == before


# ---- as a program ----


def program(*words: Any, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "plimsoll.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def test_a_reader_that_has_seen_enough_is_no_error_and_the_verdict_stays(store: Path) -> None:
    """As `| head -1`: here it is gone before a word was said."""
    for words in ([], ["--format", "html"]):
        ran = program("analyse", store, "--fail-on", "leaking", *words)
        assert ran.stdout and ran.stderr
        ran.stdout.close()
        assert (ran.stderr.read(), ran.wait()) == (b"", 3)
        ran.stderr.close()


def test_a_terminal_of_few_characters_is_no_error(write: Any, tmp_path: Path) -> None:
    path = write("samples/s.csv", csv(2000, "täglich報告"))
    out, err = program("analyse", path, env={**os.environ, "PYTHONIOENCODING": "ascii"}).communicate()
    assert err == b"" and b"t\\xe4glich\\u5831\\u544a" in out
