"""Workers for the tasks of boxoffice/leaks.py on the lab's machines, beside those that deploy.yml has put there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lab.patterns import LAB, build_extension

from .lab_fleet import BIN, Fleet

# The end of a tracing window stops an emulated worker for long.
DROPIN = """[Service]
Environment="CELERY_ARGS=--queues={worker} --pool={pool} --concurrency=1 --loglevel=INFO"
Environment=CELERY_WORKER_INCLUDE=plimsoll_notify,plimsoll_bootstrap
Environment=PYTHONPATH=/opt/plimsoll/bootstrap:/srv/leaks:/srv/leaks/site-packages
WatchdogSec=120
{settings}"""


def on_both(fleet: Fleet, commands: Mapping[str, str]) -> dict[str, str]:
    """What they print, by host; side by side, as the machines are slow."""
    with ThreadPoolExecutor() as both:
        ran = dict(zip(commands, both.map(lambda host: fleet.lab("ssh", host, commands[host]), commands)))
    for one in ran.values():
        assert one.code == 0, one.output
    return {host: one.output for host, one in ran.items()}


@contextmanager
def leaky_workers(
    fleet: Fleet, folder: Path, pools: Mapping[str, Mapping[str, str]], settings: Mapping[str, str]
) -> Iterator[None]:
    """Up and taking tasks from a queue of their name; gone at the end, with all that they needed.

    pools: by host the pool of each worker; settings: by worker further lines of its drop-in.
    """
    root = folder / "root"
    packages = root / "srv" / "leaks" / "site-packages"
    shutil.copytree(LAB / "site-packages", packages)
    build_extension(packages.parent)
    # For the Python and the C library of Debian 12.
    target = ["--target", str(packages), "--python-version=3.11", "--python-platform=x86_64-manylinux_2_28"]
    subprocess.run([BIN / "uv", "pip", "install", "--quiet", *target, "gevent>=25.0", "eventlet>=0.40"], check=True)
    for worker, pool in (one for host in pools.values() for one in host.items()):
        dropin = root / "etc/systemd/system" / f"celery-worker@{worker}.service.d" / "90-leaks.conf"
        dropin.parent.mkdir(parents=True)
        dropin.write_text(DROPIN.format(worker=worker, pool=pool, settings=settings.get(worker, "")))
    packed = shutil.make_archive(str(folder / "leaks"), "gztar", root, owner="root", group="root")
    words = ["celery_workers", "--become", "--module-name=ansible.builtin.unarchive", f"--args=src={packed} dest=/"]
    ran = fleet.run(str(BIN / "ansible"), f"--inventory={fleet.inventory}", *words)
    assert ran.code == 0, ran.output
    units = {host: " ".join(f"celery-worker@{worker}.service" for worker in there) for host, there in pools.items()}
    dropins = " ".join(
        f"/etc/systemd/system/celery-worker@{worker}.service.d" for host in pools.values() for worker in host
    )
    try:
        on_both(fleet, {host: f"systemctl daemon-reload && systemctl start {units[host]}" for host in pools})
        yield
    finally:
        gone = f"rm -r /srv/leaks {dropins} && systemctl daemon-reload"
        on_both(fleet, {host: f"systemctl stop {units[host]}; {gone}" for host in pools})
