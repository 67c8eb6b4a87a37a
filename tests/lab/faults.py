"""Misbehaviour of the lab's API on request; docs/lab.md lists the kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class Fault:
    """Misbehaviour for the next `count` requests whose method and path (from /linode on) begin as given.

    kind: status (answer `status`, with Retry-After `retry_after` if set), maintenance (503 with X-Maintenance-Mode),
    lost_answer (carry out, answer 502), hang (wait `seconds`, then go on), busy (400 Linode busy.),
    slow_boot (`seconds` before the machine starts), boot_fail (the machine does not start).
    after: so many requests that fit pass unharmed before it strikes.
    """

    KINDS: ClassVar = ("status", "maintenance", "lost_answer", "hang", "busy", "slow_boot", "boot_fail")
    BOOTS: ClassVar = ("slow_boot", "boot_fail")

    kind: str
    path: str = "/"
    method: str = ""
    count: int = 1
    status: int = 500
    retry_after: int | None = None
    seconds: float = 0.0
    after: int = 0

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(self.KINDS)}")

    def fits(self, method: str, path: str) -> bool:
        return self.kind not in self.BOOTS and method.startswith(self.method) and path.startswith(self.path)


class Faults(list[Fault]):
    """The faults that are still to strike, the first that fits being the one that does."""

    def request(self, method: str, path: str) -> Fault | None:
        """What this request meets."""
        return self._take([one for one in self if one.fits(method, path)])

    def boot(self) -> Fault | None:
        """What this boot of a machine meets."""
        return self._take([one for one in self if one.kind in Fault.BOOTS])

    def _take(self, fitting: list[Fault]) -> Fault | None:
        for fault in fitting:
            if fault.after > 0:
                fault.after -= 1
                continue
            fault.count -= 1
            if fault.count <= 0:
                self.remove(fault)
            return fault
        return None
