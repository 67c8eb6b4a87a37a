"""What holds for every role: its defaults, its argument_specs and its templates belong together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if (path / "tasks").is_dir())
TEMPLATE = re.compile(r"\{\{ role_path \}\}/\.\./\.\./(templates/\S+\.j2)")


def load(role: str, part: str) -> dict[str, Any]:
    path = ROOT / "roles" / role / part
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def options(role: str) -> dict[str, Any]:
    return load(role, "meta/argument_specs.yml")["argument_specs"]["main"].get("options", {})


@pytest.mark.parametrize("role", ROLES)
def test_every_default_is_described_with_its_value_and_every_option_has_one(role: str) -> None:
    described = {name: option.get("default") for name, option in options(role).items() if not option.get("required")}
    assert described == load(role, "defaults/main.yml")


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_carries_the_roles_name_and_a_description(role: str) -> None:
    for name, option in options(role).items():
        assert name.startswith(f"{role}_"), name
        assert option.get("description"), name


@pytest.mark.parametrize("role", ROLES)
def test_every_template_that_a_role_names_exists(role: str) -> None:
    for path in (ROOT / "roles" / role).rglob("*.yml"):
        for template in TEMPLATE.findall(path.read_text()):
            assert (ROOT / template).is_file(), f"{path}: {template}"
