"""The demo application: a box office on the night that tickets go on sale. One of its tasks leaks; the rest do not."""

from boxoffice import faults
from boxoffice.tasks import app

__all__ = ["app", "faults"]
