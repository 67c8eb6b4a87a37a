"""plimsoll: find the Celery worker that leaks, say why, contain it. Importable without Ansible."""

__version__ = "0.1.0"
