"""Every unit and drop-in, rendered with the defaults of its role, is one that systemd has no word to say about."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.utils.collection_loader import AnsibleCollectionConfig
from as_shipped.modules import host_files, worker_host
from plimsoll.host import OLDEST_SYSTEMD, Host
from plimsoll.hostfiles import Entry
from plimsoll.limits import plan

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "templates"
SECTION = re.compile(r"^\[(Unit|Service|Slice|Install|Timer|Socket|Path|Mount)\]$", re.MULTILINE)

# The unit that a drop-in is for; all other templates that are units are named as their unit.
DROPINS = {
    "celery_worker/10-worker.conf.j2": "celery-worker@sales.service",
    "rabbitmq_broker/10-loopback.conf.j2": "epmd.socket",
    "rabbitmq_broker/10-plimsoll.conf.j2": "rabbitmq-server.service",
    "alertmanager/10-plimsoll.conf.j2": "prometheus-alertmanager.service",
    "prometheus/10-plimsoll.conf.j2": "prometheus.service",
    "redis_broker/10-plimsoll.conf.j2": "redis-server.service",
    "tracemalloc_bootstrap/50-plimsoll-trace.conf.j2": "celery-worker@.service",
}
# Units of packages, which the machine that runs the tests need not have.
PACKAGED = {
    "prometheus.service": "[Service]\nExecStart=/usr/bin/prometheus $ARGS\n",
    "prometheus-alertmanager.service": "[Service]\nExecStart=/usr/bin/prometheus-alertmanager $ARGS\n",
    "redis-server.service": "[Service]\nType=notify\nExecStart=/usr/bin/redis-server /etc/redis/redis.conf\n",
    "rabbitmq-server.service": "[Service]\nType=notify\nExecStart=/usr/sbin/rabbitmq-server\n",
    "epmd.socket": "[Socket]\nListenStream=4369\n",
    "epmd.service": "[Service]\nType=notify\nExecStart=/usr/bin/epmd -systemd\n",
}
# What has no default and is not the name of a file or of a host.
NEEDED = {"celery_worker_app": "shop", "celery_worker_broker_url": "redis://10.0.0.2"}
WORKER = {"name": "sales", "queues": ["sales", "mail"], "concurrency": 4, "options": ["--max-tasks-per-child=100"]}

# A host of 4 GiB with a broker, as roles/celery_worker/tasks/preflight.yml finds it.
MEMORY = 4_017_652 << 10
BROKER = {"redis-server.service": 256 << 20}
# Keys that came after the oldest systemd that plimsoll takes, with the version that brought them.
NEWER = {
    250: {"RuntimeRandomizedExtraSec", "ExitType", "RestrictFileSystems", "RestrictNetworkInterfaces"},
    252: {"StartupMemoryMax", "StartupMemoryHigh"},
    253: {"MemoryZSwapMax", "OpenFile", "LogFilterPatterns", "ReloadSignal"},
    254: {"RestartSteps", "RestartMaxDelaySec", "RestartMode", "MemoryPressureWatch", "DelegateSubgroup"},
}

UNITS = sorted(str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*.j2") if SECTION.search(path.read_text()))


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    # Another test of the same run may have done it.
    if not AnsibleCollectionConfig.collection_finder:
        init_plugin_loader()


def machine() -> int:
    """The version of the systemd-analyze that verifies here."""
    said = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(said.split()[1])


def preflight(systemd: int, workers: list[dict[str, Any]], variables: dict[str, Any]) -> dict[str, Any]:
    """What preflight.yml registers as __celery_worker_host: the host, and the limits that the module computes."""
    host = Host(MEMORY, 2, True, True, "systemd", systemd, "3.11.2", "x86_64", BROKER, ())
    given = {name: variables[f"celery_worker_{name}"] for name in ("memory_high", "memory_max")}
    made = plan(
        host.memory,
        [worker_host.worker(one, given) for one in workers],
        reserved=variables["celery_worker_memory_reserved"],
        slice_max=variables["celery_worker_slice_memory_max"],
        beat_max=variables["celery_worker_beat_memory_max"] if variables["celery_worker_beat"] else "",
        others=host.others,
    )
    return {"host": host.as_data(), "limits": made.as_data(), "wrong": made.wrong}


def rendered(template: str, systemd: int | None = None, item: dict[str, Any] = WORKER, **more: Any) -> str:
    """As a role renders it: by Ansible's own lookup, with the role's defaults as they are templated lazily.

    systemd is the host's version, this machine's by default; item is the worker that a drop-in is for.
    """
    role = ROOT / "roles" / template.split("/")[0]
    loader = DataLoader()
    defaults = loader.load_from_file(str(role / "defaults/main.yml"), trusted_as_template=True)
    folders = {"role_path": str(role), "playbook_dir": str(ROOT / "playbooks"), "path": str(TEMPLATES / template)}
    internal = role / "vars/main.yml"
    given = loader.load_from_file(str(internal), trusted_as_template=True) if internal.exists() else {}
    variables = {**defaults, **given, **folders, **NEEDED, "item": item, **more}
    if role.name == "celery_worker":
        found = preflight(systemd or machine(), [item], variables)
        assert found["wrong"] == []
        variables |= {"__celery_worker_host": found, "limits": found["limits"]["workers"][item["name"]]}
    templar = Templar(loader=loader, variables=variables)
    return str(templar.template(trust_as_template("{{ lookup('ansible.builtin.template', path) }}")))


def place(template: str) -> str:
    """Path of what a template makes, below systemd's directory of units."""
    name = Path(template).stem
    return f"{DROPINS[template]}.d/{name}" if template in DROPINS else name


def install(folder: Path, below: str, text: str) -> None:
    # What a unit runs comes with the application or a package: /bin/true stands in for it where it is not installed.
    for program in set(re.findall(r"^Exec\w+=(/\S+)", text, re.MULTILINE)):
        if not os.access(program, os.X_OK):
            text = text.replace(program, "/bin/true")
    (folder / below).parent.mkdir(parents=True, exist_ok=True)
    (folder / below).write_text(text)


def verify(folder: Path, unit: str) -> tuple[int, str]:
    """Exit code and words of systemd-analyze for one unit of the folder, with the machine's own units behind them."""
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        cwd=folder,
        capture_output=True,
        text=True,
        # The colon at the end appends systemd's own path.
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_LOG_LEVEL": "warning"},
    )
    return ran.returncode, ran.stderr


def put_all(folder: Path, systemd: int | None = None, **more: Any) -> Path:
    """All units of the project together, as a host has them."""
    for name, text in PACKAGED.items():
        install(folder, name, text)
    for template in UNITS:
        install(folder, place(template), rendered(template, systemd, **more))
    return folder


@pytest.fixture
def units(tmp_path: Path) -> Path:
    return put_all(tmp_path)


def unit(template: str) -> str:
    """What to verify for a template: of a unit that has instances, one."""
    return DROPINS.get(template, place(template)).replace("@.", "@sales.")


@pytest.mark.parametrize("template", UNITS)
def test_systemd_has_nothing_to_say_of_a_unit_with_the_defaults_of_its_role(units: Path, template: str) -> None:
    assert (units / place(template)).is_file()
    assert verify(units, unit(template)) == (0, "")


@pytest.mark.parametrize("template", UNITS)
def test_an_unknown_key_in_any_of_them_is_caught(units: Path, template: str) -> None:
    file = units / place(template)
    file.write_text(SECTION.sub(r"[\1]\nMemoryHihg=1M", file.read_text(), count=1))
    said = verify(units, unit(template))[1]
    assert re.search(rf"/{re.escape(file.name)}:\d+: Unknown key.* 'MemoryHihg'", said)


def test_a_wrong_value_and_a_missing_program_are_caught(units: Path) -> None:
    dropin = units / "celery-worker@sales.service.d/10-worker.conf"
    right = dropin.read_text()
    assert "\nMemoryMax=" in right
    dropin.write_text(right.replace("MemoryMax=", "MemoryMax=x"))
    assert "Invalid memory limit" in verify(units, "celery-worker@sales.service")[1]
    dropin.write_text(f"{right}ExecStart=\nExecStart=/nonexistent/celery\n")
    assert verify(units, "celery-worker@sales.service")[0] != 0


def test_every_drop_in_is_known_and_no_other_template_is_a_drop_in() -> None:
    """A template that is named NN-NAME.conf and not listed here would be verified as nothing."""
    assert {template for template in UNITS if template.endswith(".conf.j2")} == set(DROPINS)
    assert len(UNITS) > len(DROPINS)


# ---- celery_worker ----

OURS = [template for template in UNITS if template.startswith("celery_worker/")]
CHOICES: dict[str, dict[str, Any]] = {
    "beat": {"celery_worker_beat": True, "celery_worker_beat_options": ["--max-interval=5"]},
    "paths": {"celery_worker_read_write_paths": ["/srv/spool", "/var/lib/shop"]},
    "runtime": {"celery_worker_runtime_max": "1d", "celery_worker_runtime_randomized_extra": "2h"},
    "kill": {"celery_worker_oom_policy": "kill"},
    "off": {"celery_worker_watchdog": 0, "celery_worker_connect_grace": 0, "celery_worker_restart": "no"},
    "by hand": {"celery_worker_memory_high": "infinity", "celery_worker_slice_memory_max": "50%"},
}
CHOICES["all"] = {name: value for choice in CHOICES.values() for name, value in choice.items()}


def keys(text: str) -> set[str]:
    return set(re.findall(r"^(\w+)=", text, re.MULTILINE))


@pytest.mark.parametrize("choice", CHOICES)
def test_systemd_has_nothing_to_say_of_what_can_be_chosen(tmp_path: Path, choice: str) -> None:
    put_all(tmp_path, **CHOICES[choice])
    assert {template: verify(tmp_path, unit(template)) for template in OURS} == dict.fromkeys(OURS, (0, ""))


def test_what_is_chosen_is_in_the_units() -> None:
    worker, beat = "celery_worker/celery-worker@.service.j2", "celery_worker/celery-beat.service.j2"
    for choice, lines in {
        "paths": ["ReadWritePaths=/srv/spool /var/lib/shop"],
        "runtime": ["RuntimeMaxSec=1d"],
        "kill": ["OOMPolicy=kill"],
        "off": ["WatchdogSec=0", "Restart=no", "Environment=PLIMSOLL_CONNECT_GRACE_S=0"],
    }.items():
        text = rendered(worker, **CHOICES[choice])
        assert [line for line in lines if f"\n{line}\n" not in text] == []
    assert "ReadWritePaths" not in keys(rendered(worker))
    assert "\nReadWritePaths=/srv/spool /var/lib/shop\n" in rendered(beat, **CHOICES["paths"])
    assert "--schedule=/var/lib/celery-beat/schedule --max-interval=5\n" in rendered(beat, **CHOICES["beat"])
    assert "\nMemoryMax=256M\n" in rendered(beat, **CHOICES["beat"])


@pytest.mark.parametrize(
    ("systemd", "runtime_max", "there"),
    [
        (247, "infinity", set()),
        (247, "1d", set()),
        (252, "infinity", set()),
        (249, "1d", set()),
        (250, "1d", {"RuntimeRandomizedExtraSec"}),
        (252, "1d", {"RuntimeRandomizedExtraSec"}),
        (253, "1d", {"RuntimeRandomizedExtraSec"}),
        (254, "infinity", {"RestartSteps", "RestartMaxDelaySec"}),
        (257, "1d", {"RestartSteps", "RestartMaxDelaySec", "RuntimeRandomizedExtraSec"}),
    ],
)
def test_a_key_is_there_from_the_systemd_on_that_knows_it(systemd: int, runtime_max: str, there: set[str]) -> None:
    text = rendered("celery_worker/celery-worker@.service.j2", systemd, celery_worker_runtime_max=runtime_max)
    assert keys(text) & {key for names in NEWER.values() for key in names} == there


@pytest.mark.parametrize("template", UNITS)
def test_a_host_of_the_oldest_systemd_gets_no_key_that_it_does_not_know(template: str) -> None:
    """This machine's systemd knows more keys than that one, and could not tell."""
    text = rendered(template, OLDEST_SYSTEMD, **CHOICES["all"])
    assert keys(text) & {key for version, names in NEWER.items() if version > OLDEST_SYSTEMD for key in names} == set()


@pytest.mark.parametrize("systemd", [247, 252, 254, 257])
def test_the_units_of_every_systemd_are_verified_as_far_as_this_machine_knows_their_keys(
    tmp_path: Path, systemd: int
) -> None:
    """Of a systemd that is newer than this machine's, the keys that came since are all that is complained of."""
    put_all(tmp_path, systemd, **CHOICES["all"])
    unknown = {key for version, names in NEWER.items() if machine() < version <= systemd for key in names}
    for template in OURS:
        said = verify(tmp_path, unit(template))[1]
        expected = unknown & keys(rendered(template, systemd, **CHOICES["all"]))
        # Each unit is loaded with those that it names.
        complained = set(re.findall(r"Unknown key (?:name )?'(\w+)' in section", said))
        assert expected <= complained <= unknown
        assert [line for line in said.splitlines() if "Unknown key" not in line] == []


def test_a_worker_gets_the_limits_of_the_plan_and_is_told_how_they_came_about() -> None:
    text = rendered("celery_worker/10-worker.conf.j2")
    # 4 GiB less what its kernel keeps, the system, and the broker: all of it is for the only worker.
    total = MEMORY // (16 << 20) * 16
    most = total - int(128 + 0.05 * total) - 256
    assert f"\nMemoryHigh={int(most * 0.85)}M\nMemoryMax={most}M\nMemorySwapMax=0\n" in text
    assert f"\n# MemoryMax: all of {most} MiB (celery.slice: {total} MiB of the host - " in text
    assert " - 256 for redis-server.service)\n# MemoryHigh: 85% of MemoryMax\n# max_memory_per_child: (85% of" in text
    child = int(int(most * 0.85) * 0.85 - 64) // 4 * 1024
    arguments = "--queues=sales,mail --pool=prefork --concurrency=4 --loglevel=INFO"
    assert f'Environment="CELERY_ARGS={arguments} --max-memory-per-child={child} --max-tasks-per-child=100"\n' in text
    assert "\nTasksMax=1024\nCPUWeight=100\nIOWeight=100\n" in text


def test_a_workers_own_settings_take_the_place_of_the_roles() -> None:
    template = "celery_worker/10-worker.conf.j2"
    own = {"memory_high": "300M", "memory_max": "400M", "memory_swap_max": "1G", "tasks_max": 9, "cpu_weight": 5}
    text = rendered(template, item={**WORKER, **own, "io_weight": 6, "prefetch_multiplier": 1, "concurrency": 2})
    assert "\nMemoryHigh=300M\nMemoryMax=400M\nMemorySwapMax=1G\nTasksMax=9\nCPUWeight=5\nIOWeight=6\n" in text
    assert "\n# MemoryMax: by hand\n# MemoryHigh: by hand\n" in text
    assert " --prefetch-multiplier=1 --max-memory-per-child=" in text
    gevent = rendered(template, item={"name": "mail", "pool": "gevent", "concurrency": 500})
    assert 'CELERY_ARGS=--queues=celery --pool=gevent --concurrency=500 --loglevel=INFO"' in gevent
    by_hand = rendered(template, item={"name": "mail", "max_memory_per_child": 0})
    assert "max-memory-per-child" not in by_hand
    odd = rendered(template, item={"name": "mail", "options": ['--x="a\\b"', "--logfile=%n.log"]})
    # As systemd unquotes it; a percent sign would be one of its specifiers.
    assert r'--x=\"a\\b\" --logfile=%%n.log"' in odd


def test_the_slice_has_what_the_host_leaves_and_says_how() -> None:
    text = rendered("celery_worker/celery.slice.j2")
    total = MEMORY // (16 << 20) * 16
    assert f"\n# All workers together: {total} MiB of the host - " in text
    assert f"\nMemoryMax={total - int(128 + 0.05 * total) - 256}M\n" in text
    by_hand = rendered("celery_worker/celery.slice.j2", celery_worker_slice_memory_max="1G")
    assert "\n# All workers together: by hand.\n" in by_hand and "\nMemoryMax=1024M\n" in by_hand


def test_the_target_starts_every_worker_and_beat_where_it_is_wanted() -> None:
    template, workers = "celery_worker/celery-workers.target.j2", [WORKER, {"name": "mail"}]
    wants = ["Wants=celery-worker@sales.service", "Wants=celery-worker@mail.service"]
    assert re.findall("^Wants=.*", rendered(template, celery_worker_instances=workers), re.MULTILINE) == wants
    both = rendered(template, celery_worker_instances=workers, celery_worker_beat=True)
    assert re.findall("^Wants=.*", both, re.MULTILINE) == [*wants, "Wants=celery-beat.service"]


def test_the_sandbox_is_a_part_of_both_services_and_no_unit() -> None:
    assert (TEMPLATES / "celery_worker/sandbox.j2").is_file()
    assert "celery_worker/sandbox.j2" not in UNITS
    sandbox = rendered("celery_worker/sandbox.j2").strip()
    assert "ProtectSystem=strict" in sandbox
    # Nothing opens another section before it, and it opens none.
    for name in ("celery-worker@", "celery-beat"):
        service = rendered(f"celery_worker/{name}.service.j2").partition("\n[Service]\n")[2]
        assert sandbox in service
        assert not SECTION.search(service.partition(sandbox)[0] + sandbox)


def test_the_modules_own_check_sees_every_file_of_a_unit() -> None:
    """host_files refuses before it writes: a drop-in of an instance is checked with the template of the unit."""
    at = "/etc/systemd/system/celery-worker@"
    service = rendered("celery_worker/celery-worker@.service.j2")
    service = service.replace("/opt/celery/current/venv/bin/celery", "/bin/true")
    dropin = rendered("celery_worker/10-worker.conf.j2")

    def complaints(service: str, dropin: str) -> str:
        files = {f"{at}.service": service, f"{at}sales.service.d/10-worker.conf": dropin}
        return host_files.complaints([Entry(path, "file", content) for path, content in files.items()])

    assert complaints(service, dropin) == ""
    assert "celery-worker@.service:" in complaints(service.replace("KillMode", "KilMode"), dropin)
    wrong = dropin.replace("MemoryMax=", "MemoryMax=x")
    assert "celery-worker@sales.service.d/10-worker.conf:" in complaints(service, wrong)


# ---- rss_sampler ----

SAMPLER = "rss_sampler/plimsoll-sampler.service.j2"


@pytest.mark.parametrize(
    ("chosen", "there", "not_there"),
    [
        ({}, ["AmbientCapabilities=CAP_SYS_PTRACE", "PrivateNetwork=true"], ["--no-pss", "--metrics", "IPAddress"]),
        ({"rss_sampler_pss": False}, ["--no-pss", "CapabilityBoundingSet=\n"], ["CAP_SYS_PTRACE"]),
        (
            {"rss_sampler_metrics": "127.0.0.1:9253"},
            ["--metrics=127.0.0.1:9253\n", "IPAddressDeny=any\nIPAddressAllow=localhost\n"],
            ["PrivateNetwork"],
        ),
        (
            {"rss_sampler_metrics": "10.0.0.4:9253", "rss_sampler_metrics_from": ["10.0.0.9", "10.1.0.0/16"]},
            ["--metrics=10.0.0.4:9253\n", "IPAddressDeny=any\nIPAddressAllow=localhost 10.0.0.9 10.1.0.0/16\n"],
            ["PrivateNetwork"],
        ),
        (
            {"rss_sampler_metrics": "/var/lib/prometheus/node-exporter/plimsoll.prom"},
            [
                "--metrics=/run/plimsoll-sampler/plimsoll.prom\n",
                "RuntimeDirectory=plimsoll-sampler\n",
                "PrivateNetwork",
            ],
            ["/var/lib"],
        ),
    ],
)
def test_the_sampler_has_the_rights_that_it_needs_and_scores_below_two(
    units: Path, chosen: dict[str, Any], there: list[str], not_there: list[str]
) -> None:
    text = rendered(SAMPLER, **chosen)
    assert [one for one in there if one not in text] == [] and [one for one in not_there if one in text] == []
    assert "\nUser=plimsoll-sampler\n" in text
    install(units, place(SAMPLER), text)
    assert verify(units, unit(SAMPLER)) == (0, "")
    ran = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", units / place(SAMPLER)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


# ---- schedule ----

SCHEDULED = [template for template in UNITS if template.startswith("schedule/")]
COLLECT, FAILED = "schedule/plimsoll-collect.service.j2", "schedule/plimsoll-collect-failed.service.j2"
SECRETS = {
    **{"schedule_ssh_private_key": "s3cret PRIVATE KEY", "schedule_vault_password": "s3cret"},
    **{
        "schedule_linode_token": "s3cret",
        "schedule_webhook_url": "https://x/s3cret",
        "schedule_mail_password": "s3cret",
    },
}


def test_a_run_gets_the_credentials_that_are_set_and_the_units_hold_none(units: Path) -> None:
    def loaded(template: str, **more: Any) -> list[str]:
        return re.findall(
            r"^LoadCredential=(\w+):/etc/plimsoll/credentials/\1$", rendered(template, **more), re.MULTILINE
        )

    assert loaded(COLLECT) == loaded(FAILED) == []
    assert loaded(COLLECT, schedule_linode_token="t", schedule_webhook_url="https://x") == [
        "linode_token",
        "webhook_url",
    ]
    every = ["ssh_private_key", "vault_password", "linode_token", "webhook_url", "smtp_password"]
    assert loaded(COLLECT, **SECRETS) == every
    # What it tells by, and no more.
    assert loaded(FAILED, **SECRETS) == every[3:]
    assert len(SCHEDULED) == 3
    for template in SCHEDULED:
        text = rendered(template, **SECRETS)
        assert "s3cret" not in text
        install(units, place(template), text)
        assert verify(units, unit(template)) == (0, "")


@pytest.mark.parametrize("template", [COLLECT, FAILED])
def test_a_run_may_do_little_and_ends_in_time(units: Path, template: str) -> None:
    text = rendered(template)
    assert "\nUser=plimsoll\n" in text and "\nStateDirectory=plimsoll-collect\n" in text
    assert ("\nTimeoutStartSec=400\n" in rendered(COLLECT, schedule_deadline=100)) and "\nType=oneshot\n" in text
    ran = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", units / place(template)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


def test_a_calendar_that_is_none_is_caught(units: Path) -> None:
    timer = "schedule/plimsoll-collect.timer.j2"
    install(units, place(timer), rendered(timer, schedule_calendar="Mon..Fri *-*-* 06:30:00"))
    assert verify(units, unit(timer)) == (0, "")
    install(units, place(timer), rendered(timer, schedule_calendar="every hour"))
    assert "Failed to parse calendar specification" in verify(units, unit(timer))[1]
