"""The plimsoll command: what it reads, says and exits with."""

from __future__ import annotations

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

import pytest
from plimsoll import __version__, cli
from plimsoll.bundle import listing, pack, sha256
from plimsoll.cli import main

T0 = 1_763_942_400
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


@pytest.fixture
def store(write: Any, tmp_path: Path) -> Path:
    """As collect.yml leaves it: one host leaks, one sent damage, one did not answer and keeps what it had."""
    write("store/w-1/samples/samples-1.csv", csv(2000))
    write("store/w-2/samples/samples-1.csv", csv(0, "celery-worker@sales.service"))
    write("store/w-2/samples/samples-2.csv", HEADER + f"{T0},7,oops,celery,{UNIT},,\n")
    write("store/w-3/samples/samples-1.csv", csv(9000))
    hosts = [
        {"host": "w-1", "collected": True, "reason": ""},
        {"host": "w-2", "collected": True, "reason": ""},
        {"host": "w-3", "collected": False, "reason": "unreachable"},
    ]
    return write("store/hosts.json", json.dumps(hosts)).parent


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
    assert "1 of 1 workers leak, on 1 of 1 hosts that were read" in out


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
    assert [(one["host"], one["leaking"]) for one in document["workers"]] == [("w-1", True), ("w-2", False)]
    hosts = {one["host"]: one for one in document["hosts"]}
    assert hosts["w-1"] == {"host": "w-1", "collected": True, "reason": ""}
    assert hosts["w-2"]["collected"]
    assert "samples-2.csv: 1 line was left out, first line 2: rss_kb: 'oops'" in hosts["w-2"]["reason"]
    assert hosts["w-3"] == {"host": "w-3", "collected": False, "reason": "unreachable"}
    text = run(capsys, "analyse", store)[1]
    assert "not collected: w-3: unreachable" in text and "note: w-2:" in text
    assert "1 of 2 workers leak, on 2 of 3 hosts" in text


def test_a_host_of_the_store_whose_directory_is_gone_is_noted(store: Path, capsys: Any) -> None:
    shutil.rmtree(store / "w-1")
    code, out, _ = run(capsys, "analyse", store)
    assert code == 0 and "note: w-1: no samples: is plimsoll-sampler.service running there?" in out


@pytest.mark.parametrize("damaged", ["", "{", "[1]", "[{}]", "5", "null", '{"a": 1}', '[{"host": "w-1"}]', "\udcff"])
def test_a_damaged_list_of_hosts_is_named(store: Path, capsys: Any, damaged: str) -> None:
    (store / "hosts.json").write_bytes(damaged.encode(errors="surrogateescape"))
    code, out, err = run(capsys, "analyse", store)
    assert (code, out, err) == (2, "", f"plimsoll: {store}/hosts.json: damaged; collect again\n")


def test_a_directory_of_several_hosts_is_read_by_their_names(store: Path, capsys: Any) -> None:
    (store / "hosts.json").unlink()
    (store / "w-2/samples/samples-2.csv").unlink()
    document = json.loads(run(capsys, "analyse", store, "--format", "json")[1])
    assert [one["host"] for one in document["hosts"]] == ["w-1", "w-2", "w-3"]
    one_host = json.loads(run(capsys, "analyse", store / "w-3", "--format", "json")[1])
    assert [one["host"] for one in one_host["workers"]] == ["w-3"]


def test_out_writes_both_files_and_the_table_says_where(store: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new/report"
    code, said, _ = run(capsys, "analyse", store, "--out", out)
    assert code == 0 and said.endswith(f"\nreport: {out}/report.html\n")
    assert sorted(path.name for path in out.iterdir()) == ["findings.json", "report.html"]
    assert len(json.loads((out / "findings.json").read_text())["workers"]) == 2
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


def ingest(capsys: Any, monkeypatch: Any, tmp_path: Path, asked: Any) -> tuple[int, str, str]:
    text = asked if isinstance(asked, str) else json.dumps(asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    (tmp_path / "inbox").mkdir(exist_ok=True)
    where = ["--inbox", tmp_path / "inbox", "--store", tmp_path / "store", "--max-bytes", 1 << 20]
    return run(capsys, "ingest", *where)


def test_ingest_unpacks_and_analyse_reads_it(write: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    write("logs/samples/samples-1.csv", csv(2000))
    bundle = write("inbox/w-1.tar.gz", "")
    pack(listing(tmp_path / "logs", ("samples",))[0], b"{}\n", bundle, 1 << 20)
    asked = [{"host": "w-1", "sha256": sha256(bundle), "reason": ""}, {"host": "w-2", "sha256": "", "reason": "down"}]
    assert ingest(capsys, monkeypatch, tmp_path, asked) == (0, "w-1: collected\nw-2: down\n", "")
    out = run(capsys, "analyse", tmp_path / "store")[1]
    assert "LEAK growing" in out and "not collected: w-2: down" in out


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "{",
        "[",
        5,
        None,
        {},
        {"host": "w-1"},
        [5],
        [{}],
        [{"host": "w-1"}],
        [{"sha256": "x"}],
        [{"host": "", "reason": "x"}],
    ],
)
def test_ingest_says_what_is_wrong_with_its_input_and_touches_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: Any, asked: Any
) -> None:
    code, out, err = ingest(capsys, monkeypatch, tmp_path, asked)
    assert (code, out) == (2, "") and err.startswith("plimsoll: standard input: ")
    assert not (tmp_path / "store").exists()


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
