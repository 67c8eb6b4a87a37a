"""Makes the project's code importable in tests as it is on a controller and inside AnsiballZ."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "module_utils"))

# Modules import `..module_utils.plimsoll`, so both must be siblings inside one package. On a target AnsiballZ lays them
# out as ansible.modules and ansible.module_utils; here it is: from as_shipped.modules import linode_fleet
for _name, _folder in {"as_shipped": ROOT, "as_shipped.modules": ROOT / "library"}.items():
    _package = types.ModuleType(_name)
    _package.__path__ = [str(_folder)]
    sys.modules[_name] = _package


def load_file(path: Path, name: str) -> types.ModuleType:
    """Import one of the single-file programs under roles/*/files by its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
