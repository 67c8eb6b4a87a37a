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
from as_shipped.library import host_files
from plimsoll.hostfiles import Entry

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "templates"
SECTION = re.compile(r"^\[(Unit|Service|Slice|Install|Timer|Socket|Path|Mount)\]$", re.MULTILINE)

# The unit that a drop-in is for; all other templates that are units are named as their unit.
DROPINS = {
    "celery_worker/10-worker.conf.j2": "celery-worker@sales.service",
    "redis_broker/10-plimsoll.conf.j2": "redis-server.service",
    "tracemalloc_bootstrap/50-plimsoll-trace.conf.j2": "celery-worker@.service",
}
# Units of packages, which the machine that runs the tests need not have.
PACKAGED = {"redis-server.service": "[Service]\nType=notify\nExecStart=/usr/bin/redis-server /etc/redis/redis.conf\n"}
# What has no default and is not the name of a file or of a host.
NEEDED = {"celery_worker_app": "shop", "celery_worker_broker_url": "redis://10.0.0.2"}
WORKER = {"name": "sales", "queues": ["sales", "mail"], "concurrency": 4, "options": ["--max-tasks-per-child=100"]}

UNITS = sorted(str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*.j2") if SECTION.search(path.read_text()))


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    # Another test of the same run may have done it.
    if not AnsibleCollectionConfig.collection_finder:
        init_plugin_loader()


def rendered(template: str, **more: Any) -> str:
    """As a role renders it: by Ansible's own lookup, with the role's defaults as they are templated lazily."""
    role = ROOT / "roles" / template.split("/")[0]
    loader = DataLoader()
    defaults = loader.load_from_file(str(role / "defaults/main.yml"), trusted_as_template=True)
    folders = {"role_path": str(role), "playbook_dir": str(ROOT / "playbooks"), "path": str(TEMPLATES / template)}
    templar = Templar(loader=loader, variables={**defaults, **folders, **NEEDED, "item": WORKER, **more})
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


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """All units of the project together, as a host has them."""
    for name, text in PACKAGED.items():
        install(tmp_path, name, text)
    for template in UNITS:
        install(tmp_path, place(template), rendered(template))
    return tmp_path


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
    dropin.write_text(right.replace("MemoryMax=75%", "MemoryMax=75 %"))
    assert "Invalid memory limit" in verify(units, "celery-worker@sales.service")[1]
    dropin.write_text(f"{right}ExecStart=\nExecStart=/nonexistent/celery\n")
    assert verify(units, "celery-worker@sales.service")[0] != 0


def test_every_drop_in_is_known_and_no_other_template_is_a_drop_in() -> None:
    """A template that is named NN-NAME.conf and not listed here would be verified as nothing."""
    assert {template for template in UNITS if template.endswith(".conf.j2")} == set(DROPINS)
    assert len(UNITS) > len(DROPINS)


def test_a_workers_own_limits_take_the_place_of_the_roles() -> None:
    template = "celery_worker/10-worker.conf.j2"
    assert "MemoryHigh=60%\nMemoryMax=75%\nMemorySwapMax=0\n" in rendered(template)
    own = {"memory_high": "300M", "memory_max": "400M", "memory_swap_max": "1G"}
    assert "MemoryHigh=300M\nMemoryMax=400M\nMemorySwapMax=1G\n" in rendered(template, item={**WORKER, **own})
    arguments = "--queues=sales,mail --pool=prefork --concurrency=4 --loglevel=INFO --max-tasks-per-child=100"
    assert f'Environment="CELERY_ARGS={arguments}"\n' in rendered(template)


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
    assert "celery-worker@sales.service.d/10-worker.conf:" in complaints(service, dropin.replace("75%", "75 %"))
