"""What the lab's API server asks of whatever makes its instances real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class DriverError(Exception):
    """A machine could not be made, booted, resized or stopped; the message is shown in the instance's event."""


@dataclass(frozen=True)
class VMSpec:
    """One instance as the API was asked for it. user_data is the decoded text."""

    instance_id: int
    label: str
    memory_mb: int
    vcpus: int
    image: str
    public_ipv4: str
    private_ipv4: str | None
    authorized_keys: tuple[str, ...]
    user_data: str


class Driver(Protocol):
    """Blocking calls; the server runs them in threads. All raise DriverError."""

    def create(self, spec: VMSpec) -> None:
        """Build the disk; idempotent."""

    def boot(self, instance_id: int) -> None:
        """Start the machine and return when it runs."""

    def shutdown(self, instance_id: int) -> None:
        """Stop it gracefully."""

    def resize(self, instance_id: int, memory_mb: int, vcpus: int) -> None:
        """Give a stopped machine other memory and CPUs, from its next boot on; its disk keeps what it holds."""

    def delete(self, instance_id: int) -> None:
        """Stop it and remove all of it; idempotent."""

    def state(self, instance_id: int) -> str:
        """running, stopped or absent."""
