"""A driver whose machines only pretend, for tests of the API and of provisioning that need no guest."""

from __future__ import annotations

import time

from .driver import VMSpec


class PretendDriver:
    """Driver of tests/lab/driver.py in memory; every machine boots within boot_seconds."""

    def __init__(self, boot_seconds: float = 0.0) -> None:
        self.boot_seconds = boot_seconds
        self.specs: dict[int, VMSpec] = {}
        self.running: set[int] = set()

    def create(self, spec: VMSpec) -> None:
        self.specs[spec.instance_id] = spec

    def boot(self, instance_id: int) -> None:
        time.sleep(self.boot_seconds)
        self.running.add(instance_id)

    def shutdown(self, instance_id: int) -> None:
        self.running.discard(instance_id)

    def delete(self, instance_id: int) -> None:
        self.running.discard(instance_id)
        self.specs.pop(instance_id, None)

    def state(self, instance_id: int) -> str:
        if instance_id in self.running:
            return "running"
        return "stopped" if instance_id in self.specs else "absent"
