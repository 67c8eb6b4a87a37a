"""A window on request, from outside of the worker: the file that asks, the records that come, with no trust in them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from plimsoll import window
from plimsoll.window import Request, Trail, refusal, request_file, standing, takes_s, trace, withdraw

UNIT, OTHER = "celery-worker@gate.service", "celery-worker@sales.service"
ASKED = "0123456789abcdef"
NOW = 1_795_000_000.0


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    (tmp_path / "windows").mkdir()
    return tmp_path / "windows"


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    (tmp_path / "trace").mkdir()
    return tmp_path / "trace"


def record(kind: str, asked: str = ASKED, **more: Any) -> str:
    return json.dumps({"time": NOW, "unit": UNIT, "pid": os.getpid(), "kind": kind, "id": asked, **more}) + "\n"


def write(traces: Path, text: str, name: str = f"{UNIT}-7.jsonl") -> Path:
    with (traces / name).open("a") as file:
        file.write(text)
    return traces / name


# ---- the request ----


def test_what_is_asked_is_what_the_bootstrap_takes(windows: Path) -> None:
    request = Request.new(60, 10, NOW)
    # Taken as late as that it is still over in the time that is waited for.
    assert request.until == NOW + 60 + window.TAKE_S and request.until + 60 < NOW + takes_s(60)
    assert json.loads(request.text()) == {"id": request.id, "window_s": 60, "frames": 10, "until": request.until}
    assert 1 <= len(request.id) <= 64 and request.id.isalnum()
    assert Request.new(60, 10, NOW).id != request.id


def test_one_takes_back_what_one_asked_for_and_nothing_else(windows: Path) -> None:
    path = request_file(windows, UNIT)
    path.write_text(Request(ASKED, 60, 10, NOW).text())
    withdraw(windows, UNIT, "another")
    assert path.exists()
    withdraw(windows, UNIT, ASKED)
    withdraw(windows, UNIT, ASKED)
    assert list(windows.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 4000,
        '{"id": "x"}',
        '{"id": "../x", "window_s": 1, "frames": 1, "until": 1}',
        '{"id": "x", "window_s": 1, "frames": 1, "until": NaN}',
        '{"id": "x", "window_s": 1, "frames": 1, "until": 1e999}',
        '{"id": "x", "window_s": "1", "frames": 1, "until": 1}',
        '{"id": "x", "window_s": 1, "frames": 1, "until": 1}' + " " * window.MAX_REQUEST_BYTES + "x",
    ],
)
def test_what_is_no_request_stands_in_nobodys_way(text: str, windows: Path) -> None:
    path = request_file(windows, UNIT)
    path.write_text(text)
    assert standing(path) is None


def test_no_link_is_followed_and_no_pipe_waited_for(windows: Path, tmp_path: Path) -> None:
    path, secret = request_file(windows, UNIT), tmp_path / "secret"
    secret.write_text(Request(ASKED, 60, 10, NOW).text())
    path.symlink_to(secret)
    assert standing(path) is None
    withdraw(windows, UNIT, ASKED)
    assert secret.exists()
    path.unlink()
    os.mkfifo(path)
    assert standing(path) is None


# ---- whether one can be asked for ----


def shown(windows: Path, **more: str) -> dict[str, str]:
    environment = f'A=1 "B=x PLIMSOLL_TRACE_MODE=off" PLIMSOLL_TRACE_MODE=armed PLIMSOLL_WINDOWS_DIR={windows}'
    return {"LoadState": "loaded", "ActiveState": "active", "Environment": environment, **more}


def test_a_worker_that_runs_with_the_bootstrap_can_be_traced(windows: Path) -> None:
    assert refusal(UNIT, shown(windows), NOW) == ""
    assert window.directories(shown(windows)) == (windows, Path("/var/log/plimsoll/trace"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"LoadState": "not-found"}, "is not on this host, though the inventory declares it; run playbooks/deploy.yml"),
        ({"ActiveState": "failed"}, f"is failed, so nothing in it can be traced; look at `journalctl --unit={UNIT}`"),
        ({"Environment": ""}, "runs without a bootstrap that opens a window on request; run playbooks/deploy.yml"),
        ({"Environment": "PLIMSOLL_TRACE_MODE=armed"}, "runs without a bootstrap that opens a window on request"),
        ({"Environment": "PLIMSOLL_TRACE_MODE=off"}, "tracemalloc_bootstrap_mode is off there; set it to"),
        (
            {"Environment": "PLIMSOLL_TRACE_MODE=armed PLIMSOLL_WINDOWS_DIR=/nowhere"},
            "/nowhere is not there, as it did not start with this bootstrap; run playbooks/deploy.yml",
        ),
    ],
)
def test_why_not_is_said_with_the_way_out(more: dict[str, str], said: str, windows: Path) -> None:
    why = refusal(UNIT, shown(windows, **more), NOW)
    assert why.startswith(UNIT) and said in why


def test_somebody_elses_window_is_left_alone_until_it_is_over(windows: Path) -> None:
    path = request_file(windows, UNIT)
    path.write_text(Request(ASKED, 60, 10, NOW + 10).text())
    why = refusal(UNIT, shown(windows), NOW)
    assert f"is being diagnosed by somebody else: {path} asks for a window" in why
    assert "over by 2026-11-18 11:08:50 UTC; wait until then, or remove that file" in why
    # It may have been taken at the last moment, by a task that runs on.
    assert refusal(UNIT, shown(windows), NOW + 129) and not refusal(UNIT, shown(windows), NOW + 130)
    assert not refusal(OTHER, shown(windows), NOW)


# ---- the records ----


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [one["kind"] for one in found]


def test_records_of_the_request_are_read_once_and_only_new_ones(traces: Path) -> None:
    write(traces, record("window_open"))
    trail = Trail(traces, UNIT, ASKED)
    assert trail.news() == []
    write(
        traces, record("window_open", time=NOW + 1) + record("growth", "another", of=ASKED) + record("task_growth", "")
    )
    assert kinds(trail.news()) == ["window_open"]
    # Another process, and lines that are not whole yet.
    text = record("growth") + record("window_close")
    write(traces, text[:-5], f"{UNIT}-8.jsonl")
    assert kinds(trail.news()) == ["growth"]
    write(traces, text[-5:], f"{UNIT}-8.jsonl")
    assert kinds(trail.news()) == ["window_close"] and trail.news() == []


def test_a_file_that_is_rotated_or_pruned_in_the_middle_is_followed(traces: Path) -> None:
    path = write(traces, record("task_growth", "") * 50)
    trail = Trail(traces, UNIT, ASKED)
    write(traces, record("window_open"))
    path.rename(traces / f"{UNIT}-7.1.jsonl")
    write(traces, record("growth"))
    assert sorted(kinds(trail.news())) == ["growth", "window_open"]
    # As one whose inode the next file has.
    path.write_text("")
    assert trail.news() == []
    write(traces, record("window_close"))
    assert kinds(trail.news()) == ["window_close"]


def test_other_units_and_what_is_no_file_are_not_read(traces: Path, tmp_path: Path) -> None:
    trail = Trail(traces, UNIT, ASKED)
    (tmp_path / "secret").write_text(record("window_close"))
    (traces / f"{UNIT}-1.jsonl").symlink_to(tmp_path / "secret")
    os.mkfifo(traces / f"{UNIT}-2.jsonl")
    (traces / f"{UNIT}-3.jsonl").mkdir()
    write(traces, record("window_close"), f"{OTHER}-4.jsonl")
    write(traces, record("window_close"), "celery-worker@gateXservice-5.jsonl")
    assert trail.news() == []


def test_what_is_no_record_is_passed_over_and_text_is_made_fit_to_print(traces: Path) -> None:
    trail = Trail(traces, UNIT, ASKED)
    deep = f'{{"id": "{ASKED}", "x": ' + "[" * 100_000 + "\n"
    odd = record("window_close", ["x"]) + json.dumps({"id": ASKED, "kind": 7}) + "\n" + f'"{ASKED}"\n' + deep
    close = record("window_close", reason="over\x1b[2J" + "x" * 999, rss_kb="many")
    grew = record("growth", rss_growth_kb=1e300, traced_growth_kb=True, window_s=5)
    opened = record("window_open", pid="7; rm")
    write(traces, odd + "\xff" + "\n" + opened + grew + close)
    outcome = window.Outcome(UNIT)
    outcome.take(trail.news())
    assert (outcome.opened, outcome.closed, outcome.pid, outcome.growth) == (True, True, None, {"window_s": 5.0})
    assert outcome.reason.startswith("over?[2J") and len(outcome.reason) == 200


def test_reading_is_bounded(traces: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(window, "MAX_READ_BYTES", 1 << 16)
    monkeypatch.setattr(window, "MAX_LINE_BYTES", 1 << 14)
    monkeypatch.setattr(window, "MOST_FILES", 5)
    trail = Trail(traces, UNIT, ASKED)
    for number in range(9):
        write(traces, "x" * (1 << 15) + "\n", f"{UNIT}-{number}.jsonl")
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(len(found := pread(*given))) or found)  # type: ignore[func-returns-value]
    trail.news()
    assert sum(read) <= 1 << 16
    # A line without an end is not read over and over.
    write(traces, "x" * (1 << 20), f"{UNIT}-9.jsonl")
    for _ in range(20):
        trail.news()
    write(traces, "\n" + record("window_close"), f"{UNIT}-9.jsonl")
    assert kinds(trail.news()) == ["window_close"]


def test_a_directory_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert Trail(tmp_path / "none", UNIT, ASKED).news() == []


# ---- the window ----


class Bootstrap(threading.Thread):
    """What a worker does with requests: takes each id once, and tells what it saw, once the window is over."""

    def __init__(
        self, windows: Path, traces: Path, unit: str = UNIT, ends: bool = True, pid: int = os.getpid()
    ) -> None:
        super().__init__(daemon=True)
        self.windows, self.traces, self.unit, self.ends, self.worker = windows, traces, unit, ends, pid
        self.asked: list[Request] = []
        self.modes: list[int] = []
        self.start()

    def run(self) -> None:
        path = request_file(self.windows, self.unit)
        while not (request := standing(path)):
            time.sleep(0.01)
        self.asked.append(request)
        self.modes.append(stat.S_IMODE(path.stat().st_mode))
        self.say(record("window_open", request.id, pid=self.worker))
        over = time.monotonic() + request.window_s if self.ends else float("inf")
        while (there := standing(path)) and time.monotonic() < over:
            time.sleep(0.01)
        if self.worker == os.getpid():
            grew = record("growth", request.id, window_s=1.0, rss_growth_kb=700, traced_growth_kb=650.5, sites=[])
            self.say(grew + record("window_close", request.id, reason="window over" if there else "called off"))

    def say(self, text: str) -> None:
        write(self.traces, text, f"{self.unit}-{self.worker}.jsonl")


@pytest.fixture
def quick(monkeypatch: Any) -> None:
    for name, value in {"TAKE_S": 0, "CLOSE_S": 1, "POLL_S": 0.02, "LATE_S": 0.1}.items():
        monkeypatch.setattr(window, name, value)


def never() -> str:
    return ""


@pytest.mark.usefixtures("quick")
def test_it_waits_until_the_window_is_over_and_leaves_no_request(windows: Path, traces: Path) -> None:
    bootstrap = Bootstrap(windows, traces)
    began = time.monotonic()
    (outcome,) = trace({UNIT: (windows, traces)}, 1, 10, never)
    assert outcome.as_data() == {
        "unit": UNIT,
        "opened": True,
        "closed": True,
        "reason": "window over",
        "pid": os.getpid(),
        "growth": {"window_s": 1.0, "rss_growth_kb": 700.0, "traced_growth_kb": 650.5},
    }
    assert time.monotonic() - began < 2 and list(windows.iterdir()) == []
    # Whoever runs the worker reads it.
    assert bootstrap.modes == [0o644] and (bootstrap.asked[0].window_s, bootstrap.asked[0].frames) == (1, 10)


@pytest.mark.usefixtures("quick")
def test_windows_of_two_workers_run_at_the_same_time(windows: Path, traces: Path) -> None:
    for unit in (UNIT, OTHER):
        Bootstrap(windows, traces, unit)
    began = time.monotonic()
    outcomes = trace({UNIT: (windows, traces), OTHER: (windows, traces)}, 1, 1, never)
    assert [(one.unit, one.closed) for one in outcomes] == [(UNIT, True), (OTHER, True)]
    assert time.monotonic() - began < 1.9


@pytest.mark.usefixtures("quick")
def test_a_request_that_nobody_takes_is_given_up_once_it_lapsed(windows: Path, traces: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(window, "TAKE_S", -1)
    (outcome,) = trace({UNIT: (windows, traces)}, 1, 10, never)
    assert not outcome.opened and "no task ended in it in that time, or another window was open" in outcome.reason
    assert list(windows.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_window_that_does_not_end_is_called_off_and_its_records_still_come(windows: Path, traces: Path) -> None:
    Bootstrap(windows, traces, ends=False)
    (outcome,) = trace({UNIT: (windows, traces)}, 1, 10, never)
    assert outcome.reason == "called off" and outcome.growth and list(windows.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_the_wait_is_bounded_whatever_the_worker_does(windows: Path, traces: Path) -> None:
    # It lives, has opened its window, and says no more.
    Bootstrap(windows, traces, pid=os.getppid(), ends=False)
    began = time.monotonic()
    (outcome,) = trace({UNIT: (windows, traces)}, 1, 10, never)
    assert time.monotonic() - began < takes_s(1) + 1 and not outcome.closed
    assert "was called off and did not end within 1 s" in outcome.reason


@pytest.mark.usefixtures("quick")
def test_a_process_that_is_killed_in_its_window_is_not_waited_for(windows: Path, traces: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    Bootstrap(windows, traces, pid=ended.pid, ends=False)
    (outcome,) = trace({UNIT: (windows, traces)}, 3600, 10, never)
    assert f"process {ended.pid} ended in its window without a record, as one does that is killed" in outcome.reason
    assert outcome.opened and not outcome.closed and list(windows.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_called_off_it_leaves_no_request(windows: Path, traces: Path) -> None:
    bootstrap = Bootstrap(windows, traces)
    (outcome,) = trace({UNIT: (windows, traces)}, 3600, 10, lambda: "called off by SIGTERM" if bootstrap.asked else "")
    assert outcome.reason == "called off by SIGTERM" and list(windows.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_whatever_happens_no_request_stays(error: type[BaseException], windows: Path, traces: Path) -> None:
    def fails() -> str:
        assert len(list(windows.iterdir())) == 2
        raise error

    with pytest.raises(error):
        trace({UNIT: (windows, traces), OTHER: (windows, traces)}, 3600, 10, fails)
    assert list(windows.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_request_that_cannot_be_written_holds_up_no_other_worker(windows: Path, traces: Path) -> None:
    request_file(windows, UNIT).mkdir()
    Bootstrap(windows, traces, OTHER)
    first, second = trace({UNIT: (windows, traces), OTHER: (windows, traces)}, 1, 10, never)
    assert first.reason == f"{request_file(windows, UNIT)} cannot be written: Is a directory"
    assert second.closed


@pytest.mark.usefixtures("quick")
def test_a_link_in_place_of_the_request_is_replaced_and_not_written_through(
    windows: Path, traces: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root")
    request_file(windows, UNIT).symlink_to(secret)
    Bootstrap(windows, traces)
    (outcome,) = trace({UNIT: (windows, traces)}, 1, 10, never)
    assert outcome.closed and secret.read_text() == "root"


def test_it_runs_on_the_oldest_python_of_hosts_with_nothing_but_the_standard_library() -> None:
    source = (
        "import sys; import plimsoll.window; print(sorted({'numpy', 'polars', 'ansible', 'jinja2'} & set(sys.modules)))"
    )
    path = {"PYTHONPATH": str(Path(window.__file__).parents[1]), "PATH": os.environ["PATH"]}
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=path)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
