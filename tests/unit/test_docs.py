"""What the documentation names is there: each role's variables in its README and in the example, and every link."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.parent.parent.name for path in (ROOT / "roles").glob("*/defaults/main.yml"))
EXAMPLE = ROOT / "inventory.example" / "group_vars" / "all"
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("roles/*/README.md")])
# A target that is no URL and no place in the page itself, without its anchor.
LINK = re.compile(r"\[[^\]]*\]\((?![a-z]+:|#)([^)#\s]+)")


def defaults(role: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "roles" / role / "defaults" / "main.yml").read_text())


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_has_a_row_in_the_readme_of_its_role(role: str) -> None:
    rows = re.findall(rf"^\| `({role}_\w+)` \|", (ROOT / "roles" / role / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(defaults(role))


@pytest.mark.parametrize("role", ROLES)
def test_the_example_inventory_has_every_variable_with_its_default(role: str) -> None:
    lines = re.findall(rf"^(# )?({role}_\w+): (.*)$", (EXAMPLE / f"{role}.yml").read_text(), re.MULTILINE)
    assert sorted(name for _, name, _ in lines) == sorted(defaults(role))
    shown = {name: yaml.safe_load(value) for commented, name, value in lines if commented}
    assert shown == {name: value for name, value in defaults(role).items() if name in shown}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert broken == []
