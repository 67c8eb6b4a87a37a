"""What the module says of a library, a parameter or a token that is missing, and of a wrong URL."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from plimsoll_project.library import linode_fleet


def run(params: dict[str, Any], capsys: Any) -> dict[str, Any]:
    with patch_module_args(params), pytest.raises(SystemExit):
        linode_fleet.main()
    return json.loads(capsys.readouterr().out)


def test_a_missing_library_is_named(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(linode_fleet, "MISSING", f"linode_api4 is not installed for {sys.executable}")
    result = run({"name": "workers", "state": "absent", "state_dir": str(tmp_path)}, capsys)
    assert result["failed"] and "linode_api4 is not installed" in result["msg"]


def test_a_present_fleet_needs_to_be_declared_whole(capsys: Any, tmp_path: Any) -> None:
    result = run({"name": "workers", "count": 1, "state_dir": str(tmp_path)}, capsys)
    assert "type, region, image" in result["msg"]


def test_a_missing_token_is_named_before_anything_is_asked(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    monkeypatch.delenv("LINODE_API_TOKEN", raising=False)
    result = run({"name": "workers", "state": "absent", "state_dir": str(tmp_path)}, capsys)
    assert "set LINODE_API_TOKEN" in result["msg"]


@pytest.mark.parametrize("url", ["", "ftp://x"])
def test_an_empty_url_is_the_default_and_a_wrong_one_is_named(
    url: str, monkeypatch: Any, capsys: Any, tmp_path: Any
) -> None:
    asked: list[str] = []

    def api(token: str, url: str, *rest: Any) -> Any:
        asked.append(url)
        raise linode_fleet.linode.LinodeError("stop here")

    monkeypatch.setattr(linode_fleet.linode, "Api", api)
    monkeypatch.setenv("LINODE_API_URL", url)
    run({"name": "workers", "state": "absent", "api_token": "t", "state_dir": str(tmp_path)}, capsys)
    assert asked == [url or "https://api.linode.com"]
