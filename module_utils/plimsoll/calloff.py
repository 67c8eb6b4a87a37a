"""Whether a module of Ansible's that takes its time is to end before it is done. For hosts, Python 3.9."""

from __future__ import annotations

import select
import signal
from types import FrameType

STDOUT = 1


class CallOff:
    """Why to end at once: a signal, or that nobody reads what this prints. Empty while there is no reason."""

    def __init__(self) -> None:
        self.why = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Noted and no more: what is under way ends in order.
            signal.signal(number, self.note)

    def note(self, number: int, _: FrameType | None) -> None:
        self.why = f"called off by {signal.Signals(number).name}"

    def __call__(self) -> str:
        # sshd sends no signal where the controller is gone, and closes the pipe that this prints to.
        poll = select.poll()
        poll.register(STDOUT, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            self.why = self.why or "called off, as the controller is gone"
        return self.why
