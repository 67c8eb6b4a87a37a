"""A driver whose machines only pretend, for tests of the API and of provisioning that need no guest."""

from __future__ import annotations

import dataclasses
import time

from .driver import DriverError, VMSpec


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

    def resize(self, instance_id: int, memory_mb: int, vcpus: int) -> None:
        if self.state(instance_id) != "stopped":
            raise DriverError(f"instance {instance_id} is {self.state(instance_id)}, not stopped")
        self.specs[instance_id] = dataclasses.replace(self.specs[instance_id], memory_mb=memory_mb, vcpus=vcpus)

    def delete(self, instance_id: int) -> None:
        self.running.discard(instance_id)
        self.specs.pop(instance_id, None)

    def state(self, instance_id: int) -> str:
        if instance_id in self.running:
            return "running"
        return "stopped" if instance_id in self.specs else "absent"
