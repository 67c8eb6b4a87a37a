"""What is to be found of each task of app/boxoffice/leaks.py, wherever its worker runs."""

from __future__ import annotations

import shlex
import subprocess
import sysconfig
from pathlib import Path

LAB = Path(__file__).resolve().parent
LEAKS = LAB / "app" / "boxoffice" / "leaks.py"
LIBRARY = LAB / "site-packages" / "ticketlib" / "__init__.py"
# What is kept of a run at least, KiB.
KEPT_KB = 150

# Where the line is that allocates what is kept.
PYTHON = {
    "module_cache": (LEAKS, "module_cache"),
    "collector": (LEAKS, "collector"),
    "method_cache": (LEAKS, "Venue.__init__"),
    "kept_errors": (LEAKS, "check"),
    "kept_closures": (LEAKS, "kept_closures"),
    "handlers": (LEAKS, "handlers"),
    "third_party": (LIBRARY, "draw"),
    "filling_cache": (LEAKS, "photograph_of"),
}
OTHERS = {
    "unclosed": "file_descriptors",
    "native": "native",
    "fragmentation": "fragmentation",
    "copy_on_write": "copy_on_write",
}
# None of them keeps anything.
MENDED = [f"{name}_mended" for name in [*PYTHON, *OTHERS] if name not in ("filling_cache", "copy_on_write")]


def build_extension(folder: Path) -> Path:
    """leaky.c, for any Python from 3.9 on, as that of the lab's machines may be another one."""
    built = folder / "leaky.abi3.so"
    compiler = shlex.split(sysconfig.get_config_var("CC"))
    flags = ["-shared", "-fPIC", "-O2", "-DPy_LIMITED_API=0x03090000", f"-I{sysconfig.get_path('include')}"]
    subprocess.run([*compiler, *flags, str(LAB / "leaky.c"), "-o", str(built)], check=True)
    return built
