"""What a host offers for bounding workers, read off a folder that looks like its root, and what it lacks."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from as_shipped.modules import worker_host
from plimsoll import host
from plimsoll.host import Host, read, wrong

MEMTOTAL_KB = 4_017_652
MEMINFO = f"MemTotal:        {MEMTOTAL_KB} kB\nMemFree:          123456 kB\nSwapTotal:        524284 kB\n"
VERSION = "systemd 252 (252.39-1~deb12u2)\n+PAM +AUDIT default-hierarchy=unified\n"
REDIS, RABBITMQ = "redis-server.service", "rabbitmq-server.service"
NO_LIMIT_BEFORE_CGROUP_V2 = (1 << 64) - 1

SYSTEMCTL = r"""#!/bin/sh
echo "$@" >> "{folder}/calls"
case $1 in
    --version) cat "{folder}/version" ;;
    show) cat "{folder}/shown" ;;
esac
"""


class Root:
    """A host as it is found: Debian 12 on cgroup v2, until something is taken off it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        self.systemctl = folder / "systemctl"
        self.systemctl.write_text(SYSTEMCTL.replace("{folder}", str(folder)))
        self.systemctl.chmod(0o755)
        self.version(VERSION)
        self.show()
        self.put("proc/meminfo", MEMINFO)
        self.put("proc/1/comm", "systemd\n")
        self.put("proc/pressure/memory", "some avg10=0.00\n")
        self.put("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma misc\n")

    def put(self, path: str, text: str = "") -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def take(self, path: str) -> None:
        (self.root / path).unlink()

    def version(self, said: str) -> None:
        (self.folder / "version").write_text(said)

    def show(self, *brokers: str) -> None:
        (self.folder / "shown").write_text("\n\n".join(brokers))

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def read(self) -> Host:
        return read(Path("/opt/celery"), self.root, str(self.systemctl))


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def broker(name: str, limit: int | str, enabled: str = "enabled") -> str:
    """As systemd shows a unit, in an order of its own."""
    return f"MemoryMax={limit}\nId={name}\nLoadState=loaded\nUnitFileState={enabled}"


# ---- what is read ----


def test_a_host_is_read(root: Root) -> None:
    assert root.read() == Host(
        memory=MEMTOTAL_KB * 1024,
        cgroup=2,
        memory_controller=True,
        psi=True,
        init="systemd",
        systemd=252,
        python_version=platform.python_version(),
        machine=platform.machine(),
        others={},
        workers=(),
    )
    assert wrong(root.read(), cgroup_v1=False) == []


def test_this_machine_can_be_read() -> None:
    found = read(Path("/opt/celery"))
    assert found.memory > 1 << 26
    assert found.cgroup in (0, 1, 2)
    assert found.python_version == ".".join(map(str, sys.version_info[:3]))


def test_what_was_read_can_be_handed_to_ansible(root: Root) -> None:
    data = root.read().as_data()
    assert json.loads(json.dumps(data)) == data


def cgroup_v1(root: Root) -> None:
    root.take("sys/fs/cgroup/cgroup.controllers")
    root.put("sys/fs/cgroup/memory/memory.limit_in_bytes")


def hybrid(root: Root) -> None:
    cgroup_v1(root)
    root.put("sys/fs/cgroup/unified/cgroup.controllers", "\n")


def no_cgroups(root: Root) -> None:
    root.take("sys/fs/cgroup/cgroup.controllers")
    (root.root / "sys/fs/cgroup").rmdir()


def no_controller(root: Root) -> None:
    # Debian for ARM, or cgroup_disable=memory; a name that has memory in it is another.
    root.put("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io hugememory pids\n")


def v1_without_controller(root: Root) -> None:
    cgroup_v1(root)
    root.take("sys/fs/cgroup/memory/memory.limit_in_bytes")
    (root.root / "sys/fs/cgroup/memory").rmdir()


@pytest.mark.parametrize(
    ("change", "version", "controller"),
    [
        (lambda root: None, 2, True),
        (cgroup_v1, 1, True),
        (hybrid, 1, True),
        (v1_without_controller, 1, False),
        (no_cgroups, 0, False),
        (no_controller, 2, False),
    ],
)
def test_the_version_of_cgroups_and_their_memory_controller(
    root: Root, change: Callable[[Root], None], version: int, controller: bool
) -> None:
    change(root)
    found = root.read()
    assert (found.cgroup, found.memory_controller) == (version, controller)


def test_a_kernel_without_pressure_figures(root: Root) -> None:
    root.take("proc/pressure/memory")
    assert not root.read().psi
    assert wrong(root.read(), cgroup_v1=False) == []


def test_a_host_of_another_init_is_not_asked_for_units(root: Root) -> None:
    root.put("proc/1/comm", "runit\n")
    root.systemctl.unlink()
    found = root.read()
    assert (found.init, found.systemd, found.others) == ("runit", 0, {})


@pytest.mark.parametrize(
    ("said", "number"),
    [(VERSION, 252), ("systemd 254-rc1\n", 254), ("systemd 255.4 (255.4-1)\n", 255), ("", 0), ("garbage 252\n", 0)],
)
def test_the_version_of_systemd(root: Root, said: str, number: int) -> None:
    root.version(said)
    assert root.read().systemd == number


def test_only_a_broker_that_runs_here_and_has_a_limit_takes_memory(root: Root) -> None:
    root.show(broker(REDIS, 256 << 20), broker(RABBITMQ, 1 << 30))
    assert root.read().others == {REDIS: 256 << 20, RABBITMQ: 1 << 30}
    assert root.calls()[-1].endswith(f"-- {REDIS} {RABBITMQ}")
    for limit in ("infinity", "", NO_LIMIT_BEFORE_CGROUP_V2, "[not set]"):
        root.show(broker(REDIS, limit), broker(RABBITMQ, 1 << 30))
        assert root.read().others == {RABBITMQ: 1 << 30}
    # Debian's package starts what it installs; where it was disabled since, nothing runs.
    root.show(broker(REDIS, 256 << 20, "disabled"))
    assert root.read().others == {}
    root.show(f"Id={REDIS}\nLoadState=not-found\nUnitFileState=\nMemoryMax=infinity")
    assert root.read().others == {}


def test_the_workers_of_a_former_run_are_found_by_their_drop_ins(root: Root) -> None:
    for name in ("celery-worker@sales", "celery-worker@a-b_1", "celery-worker@", "other@sales", "celery-worker@x.y"):
        root.put(f"etc/systemd/system/{name}.service.d/10-worker.conf")
    # Of somebody's own, or left empty behind a worker that was removed.
    root.put("etc/systemd/system/celery-worker@mail.service.d/20-mine.conf")
    (root.root / "etc/systemd/system/celery-worker@gone.service.d").mkdir()
    root.put("etc/systemd/system/multi-user.target.wants/10-worker.conf")
    assert root.read().workers == ("a-b_1", "sales", "x.y")


@pytest.mark.parametrize("said", ["", "MemFree: 12 kB\n", "MemTotal: lots\n"])
def test_a_host_whose_memory_is_not_told_is_an_error_that_names_the_file(root: Root, said: str) -> None:
    root.put("proc/meminfo", said)
    with pytest.raises(OSError, match=r"root/proc/meminfo: no MemTotal in it"):
        root.read()


# ---- what is wrong with it ----

GOOD = Host(4 << 30, 2, True, True, "systemd", 247, "3.9.2", "x86_64", {}, ())


def test_a_host_that_has_it_all_has_nothing_wrong() -> None:
    assert wrong(GOOD, cgroup_v1=False) == wrong(GOOD, cgroup_v1=True) == []


@pytest.mark.parametrize(
    ("lacks", "what", "way_out"),
    [
        ({"init": "runit", "systemd": 0}, "this host runs runit", "the limits of the workers are systemd's"),
        ({"systemd": 246}, "this host has systemd 246", "247 is the oldest"),
        ({"systemd": 0}, "this host has systemd of an unknown version", "247 is the oldest"),
        (
            {"cgroup": 1},
            "this host is on cgroup v1: there MemoryMax, ",
            "boot it with systemd.unified_cgroup_hierarchy=1, or set celery_worker_cgroup_v1: true",
        ),
        ({"psi": False}, "this kernel tells no pressure (PSI)", "set rss_sampler_guard_pressure: 0"),
        ({"memory_controller": False}, "this kernel's memory controller is off", "take cgroup_disable=memory off"),
        # It is not on cgroup v1 either.
        ({"cgroup": 0, "memory_controller": False}, "this kernel's memory controller is off", "kernel's command line"),
        ({"python_version": "3.8.20"}, "this host's Python is 3.8.20", "3.9 or later is needed"),
    ],
)
def test_what_a_host_lacks_is_one_sentence_with_a_way_out(lacks: dict[str, Any], what: str, way_out: str) -> None:
    (said,) = wrong(replace(GOOD, **lacks), cgroup_v1=False, guard=True, pressure=True)
    assert said.startswith(what) and way_out in said and "\n" not in said


def test_all_that_a_host_lacks_is_told_at_once() -> None:
    lacks = {"cgroup": 1, "memory_controller": False, "systemd": 241, "python_version": "3.7.3"}
    assert len(wrong(replace(GOOD, **lacks), cgroup_v1=False)) == 4


@pytest.mark.parametrize(("guard", "pressure"), [(False, True), (True, False)])
def test_pressure_is_asked_for_by_a_guard_alone_that_goes_by_it(guard: bool, pressure: bool) -> None:
    assert wrong(replace(GOOD, psi=False), cgroup_v1=False, guard=guard, pressure=pressure) == []


def test_cgroup_v1_can_be_accepted_and_nothing_else_with_it() -> None:
    assert wrong(replace(GOOD, cgroup=1, psi=False), cgroup_v1=True) == []
    (said,) = wrong(replace(GOOD, cgroup=1, psi=False), cgroup_v1=True, guard=True, pressure=True)
    assert "the memory guard sees nothing" in said and 'set rss_sampler_guard: "off"' in said
    (said,) = wrong(replace(GOOD, cgroup=1, memory_controller=False), cgroup_v1=True)
    assert "memory controller is off" in said


@pytest.mark.parametrize("version", ["3.9.0", "3.10.1", "3.13.0rc1", "4.0.0"])
def test_later_versions_of_python_will_do(version: str) -> None:
    assert wrong(replace(GOOD, python_version=version), cgroup_v1=False) == []


# ---- the module ----


@pytest.fixture
def run(root: Root, monkeypatch: Any, capsys: Any) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(worker_host, "read", lambda home: read(home, root.root, str(root.systemctl)))

    def running(*workers: dict[str, Any], **more: Any) -> dict[str, Any]:
        with patch_module_args({"workers": list(workers), **more}), pytest.raises(SystemExit):
            worker_host.main()
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return told

    return running


Run = Callable[..., dict[str, Any]]
USABLE = MEMTOTAL_KB // 1024 // 16 * 16
SLICE = USABLE - int(128 + 0.05 * USABLE)


def test_the_module_tells_the_host_and_the_limits_and_changes_nothing(root: Root, run: Run) -> None:
    root.show(broker(REDIS, 256 << 20))
    root.put("etc/systemd/system/celery-worker@old.service.d/10-worker.conf")
    root.put("srv/shop/releases/1f/.complete")
    root.put("srv/shop/releases/2e/app/shop.py")
    (root.root / "srv/shop/current").symlink_to("releases/1f")
    for more in ({}, {"_ansible_check_mode": True}):
        told = run(
            {"name": "sales", "queues": ["a"], "concurrency": 4, "cpu_weight": 5},
            {"name": "mail"},
            home="/srv/shop",
            **more,
        )
        assert (told["changed"], told["wrong"]) == (False, [])
        assert told["host"]["others"] == {REDIS: 256 << 20}
        assert told["host"]["workers"] == ["old"]
        assert (told["host"]["releases"], told["host"]["release"]) == (["1f"], "1f")
        limits = told["limits"]
        assert limits["slice_max"] == f"{SLICE - 256}M"
        assert [limits["workers"][name]["memory_max"] for name in ("sales", "mail")] == [
            f"{(SLICE - 256) * 5 // 8}M",
            f"{(SLICE - 256) * 3 // 8}M",
        ]


def test_a_broker_that_is_about_to_change_does_not_count_by_what_it_has(root: Root, run: Run) -> None:
    root.show(broker(REDIS, 256 << 20))
    assert run({"name": "sales"}, brokers=False)["limits"]["slice_max"] == f"{SLICE}M"


def test_what_is_wrong_is_told_of_host_and_limits_without_a_failure(root: Root, run: Run) -> None:
    """So that a role can tell it with all else that is wrong."""
    cgroup_v1(root)
    told = run({"name": "sales", "memory_max": "lots"})
    assert "failed" not in told
    assert ["cgroup v1" in told["wrong"][0], "'lots' is no size" in told["wrong"][1]] == [True, True]
    assert run({"name": "sales"}, cgroup_v1=True)["wrong"] == []
    guarded = {"guard": True, "guard_pressure": True}
    assert "rss_sampler_guard" in run({"name": "sales"}, cgroup_v1=True, **guarded)["wrong"][0]
    root.put("sys/fs/cgroup/cgroup.controllers", "memory")
    root.take("proc/pressure/memory")
    assert "rss_sampler_guard_pressure: 0" in run({"name": "sales"}, **guarded)["wrong"][0]


def test_a_workers_own_sizes_take_the_place_of_all_workers_sizes_and_not_one_of_them_alone(run: Run) -> None:
    told = run({"name": "sales"}, {"name": "mail", "memory_max": "1000M"}, memory_high="500M", memory_max="600M")
    sizes = {name: (one["memory_high"], one["memory_max"]) for name, one in told["limits"]["workers"].items()}
    # 500 of 1000 would be a mixture that nobody wrote.
    assert sizes == {"sales": ("500M", "600M"), "mail": ("850M", "1000M")}


def test_each_option_reaches_the_sums(run: Run) -> None:
    assert run({"name": "a"}, reserved="1G")["limits"]["slice_max"] == f"{USABLE - 1024}M"
    assert run({"name": "a"}, slice_memory_max="1G")["limits"]["slice_max"] == "1024M"
    beat = run({"name": "a"}, beat_memory_max="256M")["limits"]
    assert beat["workers"]["a"]["memory_max"] == f"{SLICE - 256}M"
    by_hand = {"pool": "prefork", "concurrency": 3, "memory_weight": 2, "max_memory_per_child": 100_000}
    limits = run({"name": "a", **by_hand}, {"name": "b", "memory_weight": 6, "pool": "solo"})["limits"]["workers"]
    assert limits["a"]["max_memory_per_child"] == 100_000
    assert limits["a"]["memory_max"] == f"{SLICE * 2 // 8}M"
    assert limits["b"]["max_memory_per_child"] == 0


def test_sizes_that_yaml_took_for_numbers_are_bytes(run: Run) -> None:
    limits = run({"name": "a", "memory_max": 1 << 30, "concurrency": "2"})["limits"]["workers"]
    assert limits["a"]["memory_max"] == "1024M"


def test_autoscale_is_read_off_the_options(run: Run) -> None:
    options = ["--max-tasks-per-child=100", "--autoscale=8,2"]
    assert run({"name": "a", "concurrency": 8, "options": options})["wrong"] == []
    assert "set concurrency to 8" in run({"name": "a", "options": options})["wrong"][0]


def test_a_size_of_nothing_is_refused_and_not_passed_over(run: Run) -> None:
    assert "memory_max 0" in " ".join(run({"name": "a", "memory_max": 0})["wrong"])


def test_a_host_that_cannot_be_read_fails_with_the_file(root: Root, run: Run) -> None:
    root.take("proc/meminfo")
    told = run({"name": "a"})
    assert told["failed"] and told["msg"].startswith("worker_host: ") and "proc/meminfo" in told["msg"]


# What preflight.yml hands over, which runs ahead of the role's argument_specs: nothing has looked at it yet.
UNTYPED: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"concurrency": 4}, "name"),
    "word": ({"name": "sales", "concurrency": "four"}, "four"),
    "no word": ({"name": "sales", "concurrency": None}, "concurrency"),
    "list": ({"name": "sales", "memory_weight": [3]}, "memory_weight"),
}


@pytest.mark.parametrize("case", UNTYPED)
def test_a_worker_that_makes_no_sense_is_told_and_is_no_traceback(run: Run, case: str) -> None:
    worker, said = UNTYPED[case]
    told = run(worker)
    assert said in told.get("msg", "") + " ".join(told.get("wrong", []))


def test_numbers_that_are_text_count_as_numbers(run: Run) -> None:
    """As argument_specs take them, which convert nothing."""
    text = {"concurrency": "2", "memory_weight": "3", "max_memory_per_child": "100000"}
    limits = run({"name": "sales", **text}, {"name": "mail", "memory_weight": 1})["limits"]["workers"]
    assert limits["sales"]["max_memory_per_child"] == 100_000
    assert limits["sales"]["memory_max"] == f"{SLICE * 3 // 4}M"


def test_the_words_are_those_of_the_real_systemctl(root: Root) -> None:
    """Options that it does not have would fail on the first host."""
    root.read()
    assert len(root.calls()) == 2
    for words in root.calls():
        try:
            ran = subprocess.run(["systemctl", *words.split()], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("systemctl is not on this machine")
        assert "option" not in ran.stderr
    assert host._version("systemctl") > 0
