"""What the tests do to a worker from inside, by remote control."""

from __future__ import annotations

import time
from typing import Any

from celery.worker.control import control_command


@control_command()
def hang(state: Any) -> None:
    """The worker's event loop never turns again."""
    time.sleep(1e6)
