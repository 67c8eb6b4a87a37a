"""plimsoll: find the Celery worker that leaks, say why, contain it. Importable without Ansible."""

import os

# Matrices as small as ours are slower with threads, which wait for one another; numpy reads it as it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
