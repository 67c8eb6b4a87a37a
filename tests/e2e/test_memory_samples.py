"""What the sampler writes on a real machine: under systemd, of real units, with what a worker may come to."""

from __future__ import annotations

import csv
import json

from .lab_fleet import IN_APP, Fleet, wait_for
from .numbered import PID, UNIT

SAMPLER = "plimsoll-sampler.service"
SAMPLES = "/var/log/plimsoll/samples"
FIRST = 950_000
CGROUP = f"/sys/fs/cgroup/celery.slice/{UNIT}"


def newest(fleet: Fleet, kind: str, lines: int = 60) -> list[dict[str, str]]:
    """The last rows of a kind that demo-2 has written."""
    shown = fleet.on(
        "demo-2", f"cd {SAMPLES} && last=$(ls -t {kind}-*.csv | head -n 1) && head -n 1 $last && tail -n {lines} $last"
    )
    return [row for row in csv.DictReader(shown.splitlines()) if row["timestamp"] != "timestamp"]


def test_it_runs_as_a_user_of_its_own_with_one_right_and_little_memory(fleet: Fleet) -> None:
    main = f"$(systemctl show --value -p MainPID {SAMPLER})"
    status = fleet.on("demo-2", f"cat /proc/{main}/status")
    fields = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if ":\t" in line}
    assert fields["Uid"] == fleet.on("demo-2", "id -u plimsoll-sampler").strip() != "0"
    # CAP_SYS_PTRACE is the 19th.
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 1 << 19
    assert int(fields["VmHWM"]) < 40 << 10
    fleet.on("demo-2", f"systemd-analyze security --threshold=20 {SAMPLER} >&2")


def test_it_measures_what_is_another_users(fleet: Fleet) -> None:
    def whole() -> list[dict[str, str]]:
        rows = [row for row in newest(fleet, "samples") if row["unit"] == UNIT and row["pss_kb"]]
        # What the bootstrap has counted: nothing, before a child's first task.
        return rows if any(row["tasks"] not in ("", "0") for row in rows if row["role"] == "child") else []

    fleet.on("demo-1", f"{IN_APP} -m boxoffice.numbers {FIRST} 8 --rate=8")
    rows = wait_for("row with all cells", whole)
    assert {row["role"] for row in rows} == {"main", "child"}
    for row in rows:
        assert 0 < int(row["uss_kb"]) <= int(row["pss_kb"]) <= int(row["rss_kb"]), row
        assert int(row["fds"]) > 2 and int(row["threads"]) > 0 and row["swap_kb"] == "0", row
    (unit,) = [row for row in newest(fleet, "cgroup")[-4:] if row["unit"] == UNIT][-1:]
    high, most = (fleet.on("demo-2", f"cat {CGROUP}/memory.{name}") for name in ("high", "max"))
    assert (int(unit["memory_high_kb"]), int(unit["memory_max_kb"])) == (int(high) // 1024, int(most) // 1024)
    assert int(unit["memory_current_kb"]) > 0 and int(unit["pressure_some_us"]) >= 0


def test_a_restart_is_counted_and_its_processes_are_new_ones(fleet: Fleet) -> None:
    def restarts() -> int:
        rows = [row for row in newest(fleet, "cgroup") if row["unit"] == UNIT and row["n_restarts"]]
        # The last there is: whoever restarts a unit by hand begins at 0 again.
        return int(rows[-1]["n_restarts"])

    before = restarts()
    began = float(newest(fleet, "samples")[-1]["timestamp"])
    fleet.on("demo-2", f"kill -9 $({PID})")
    wait_for("another restart", lambda: restarts() == before + 1)
    mains = [row for row in newest(fleet, "samples", 400) if row["unit"] == UNIT and row["role"] == "main"]
    mains = [row for row in mains if float(row["timestamp"]) >= began]
    assert len({row["pid"] for row in mains}) == len({(row["pid"], row["start_time"]) for row in mains}) == 2


def test_what_is_swapped_out_is_not_hidden(fleet: Fleet) -> None:
    """The units have MemorySwapMax=0; here the kernel is told otherwise."""
    fleet.on("demo-2", "dd if=/dev/zero of=/swap bs=1M count=96 status=none && chmod 600 /swap && mkswap /swap >&2")
    fleet.on("demo-2", f"swapon /swap && echo max > {CGROUP}/memory.swap.max")
    try:
        fleet.on("demo-2", f"echo 30M > {CGROUP}/memory.reclaim || true")

        def swapped() -> list[dict[str, str]]:
            return [row for row in newest(fleet, "samples") if row["unit"] == UNIT and int(row["swap_kb"]) > 1024]

        row = wait_for("process that is swapped out", swapped)[-1]
        vm_swap = fleet.on("demo-2", f"grep VmSwap /proc/{row['pid']}/status")
        assert abs(int(vm_swap.split()[1]) - int(row["swap_kb"])) < 0.5 * int(row["swap_kb"])
        assert any(int(row["swap_kb"]) > 0 for row in newest(fleet, "cgroup") if row["unit"] == UNIT)
    finally:
        fleet.on("demo-2", f"echo 0 > {CGROUP}/memory.swap.max; swapoff /swap; rm /swap")


def test_prometheus_can_ask_it(fleet: Fleet) -> None:
    ask = "import sys, urllib.request as r; print(r.urlopen(f'http://{sys.argv[1]}:9253/metrics').read().decode())"
    address = fleet.on("demo-2", r"hostname -I | tr ' ' '\n' | grep ^192.168").strip()
    # From the host of Prometheus: no other is answered.
    said = fleet.on("demo-1", f'python3 -c "{ask}" {address}')
    assert f'plimsoll_worker_processes{{role="child",unit="{UNIT}"}}' in said
    assert f'plimsoll_worker_memory_events_total{{event="oom_kill",unit="{UNIT}"}}' in said
    resident = next(line for line in said.splitlines() if line.startswith("plimsoll_worker_resident_memory_bytes"))
    assert float(resident.split()[-1]) > 1 << 20


def test_a_torn_line_is_cut_off_and_said_in_the_journal(fleet: Fleet) -> None:
    fleet.on(
        "demo-2",
        f"systemctl kill --signal=KILL {SAMPLER} && cd {SAMPLES} && last=$(ls -t samples-*.csv | head -n 1)"
        f" && printf 1795885782.681,77 >> $last && systemctl restart {SAMPLER}",
    )
    said = fleet.on("demo-2", f"journalctl --unit={SAMPLER} --output=json PLIMSOLL_EVENT=torn | tail -n 1")
    entry = json.loads(said)
    assert entry["PRIORITY"] == "4" and entry["PLIMSOLL_BYTES"] == "17" and "cut off 17 bytes" in entry["MESSAGE"]
    assert all(row["pid"] != "77" and None not in row.values() for row in newest(fleet, "samples", 400))
