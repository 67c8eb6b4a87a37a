"""What holds for every module: its documentation, its parameters and its examples say the same."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (ROOT / "library").glob("*.py"))
# Of a task, beside its module.
KEYWORDS = {"name", "register", "become", "delegate_to", "run_once", "when", "vars", "loop", "no_log"}
SECRET = re.compile("token|password|environment|secret")


@pytest.fixture(params=MODULES)
def module(request: Any) -> types.ModuleType:
    return importlib.import_module(f"as_shipped.modules.{request.param}")


def name(module: types.ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def differences(documented: dict[str, Any], spec: dict[str, Any], above: str = "") -> list[str]:
    found = [f"{above}{option}: only in one of them" for option in set(documented) ^ set(spec)]
    for option in set(documented) & set(spec):
        said, done = documented[option], spec[option]
        for key, otherwise in {"type": "str", "elements": None, "default": None, "choices": None}.items():
            if said.get(key, otherwise) != done.get(key, otherwise):
                found.append(f"{above}{option}: {key} is {said.get(key)!r} and {done.get(key)!r}")
        if said.get("required", False) != done.get("required", False):
            found.append(f"{above}{option}: required")
        if not said.get("description"):
            found.append(f"{above}{option}: no description")
        found += differences(said.get("suboptions", {}), done.get("options", {}), f"{above}{option}.")
    return found


def shown(spec: dict[str, Any], above: str = "") -> list[str]:
    """Options that are named as a secret and that Ansible would show: neither they nor one of their own are no_log."""
    found = []
    for option, done in spec.items():
        below = done.get("options", {})
        hidden = done.get("no_log") or any(one.get("no_log") for one in below.values())
        if SECRET.search(option) and not hidden:
            found.append(f"{above}{option}")
        found += shown(below, f"{above}{option}.")
    return found


def test_documentation_and_parameters_are_the_same(module: types.ModuleType) -> None:
    documentation = yaml.safe_load(module.DOCUMENTATION)
    assert documentation["module"] == name(module)
    assert differences(documentation["options"], module.SPEC) == []


def test_what_differs_is_found_at_any_depth() -> None:
    spec = {"a": {"type": "list", "elements": "dict", "options": {"b": {"type": "int", "default": 1}}}}
    said = {"a": {"type": "list", "elements": "dict", "description": "x", "suboptions": {}}}
    assert differences(said, spec) == ["a.b: only in one of them"]
    for wrong in ({"type": "str"}, {"default": 2}, {"choices": [1]}, {"required": True}, {"elements": "int"}):
        said["a"]["suboptions"] = {"b": {"type": "int", "default": 1, "description": "x", **wrong}}
        assert len(differences(said, spec)) == 1
    assert shown({"a": {"options": {"password": {}}}}) == ["a.password"]


def test_examples_and_return_values_are_yaml_and_name_known_parameters(module: types.ModuleType) -> None:
    for value in (yaml.safe_load(module.RETURN) or {}).values():
        assert value["description"] and value["type"] and value["returned"]
    tasks = yaml.safe_load(module.EXAMPLES)
    assert tasks
    for task in tasks:
        assert task["name"] and set(task) <= {name(module), *KEYWORDS}
        check_parameters(task[name(module)] or {}, module.SPEC)


def check_parameters(given: dict[str, Any], spec: dict[str, Any]) -> None:
    assert set(given) <= set(spec)
    assert {option for option, done in spec.items() if done.get("required")} <= set(given)
    for option, value in given.items():
        assert not spec[option].get("choices") or value in spec[option]["choices"]
        for one in value if "options" in spec[option] else []:
            check_parameters(one, spec[option]["options"])


def test_check_mode_is_supported_and_documented(module: types.ModuleType, monkeypatch: Any) -> None:
    class Made(Exception):
        pass

    def made(spec: Any, **settings: Any) -> None:
        assert spec is module.SPEC
        assert settings["supports_check_mode"] is True
        raise Made

    monkeypatch.setattr(module, "AnsibleModule", made)
    with pytest.raises(Made):
        module.main()
    attributes = yaml.safe_load(module.DOCUMENTATION)["attributes"]
    assert attributes["check_mode"]["support"] == "full"
    assert attributes["diff_mode"]["support"] in ("full", "none")


def test_nothing_that_is_named_as_a_secret_is_shown(module: types.ModuleType) -> None:
    assert shown(module.SPEC) == []


def test_ansible_doc_reads_every_module() -> None:
    command = [str(Path(sys.executable).with_name("ansible-doc")), "--type", "module", "--json", *MODULES]
    ran = subprocess.run([*command, "--module-path", str(ROOT / "library")], capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")
    told = json.loads(ran.stdout)
    assert {module: told[module]["doc"]["module"] for module in MODULES} == {module: module for module in MODULES}
