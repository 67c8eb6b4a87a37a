"""Makes the project's code importable in tests as it is on a controller and inside AnsiballZ."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "module_utils"))

# Modules import `..module_utils.plimsoll`, so library/ and module_utils/ must be siblings inside one package,
# as AnsiballZ lays them out on a target: from as_shipped.library import linode_fleet
_package = types.ModuleType("as_shipped")
_package.__path__ = [str(ROOT)]
sys.modules["as_shipped"] = _package


def load_file(path: Path, name: str) -> types.ModuleType:
    """Import one of the single-file programs under roles/*/files by its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
