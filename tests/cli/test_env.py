from __future__ import annotations

from pathlib import Path

import pytest

from hashattention.models.recipes import RECIPES


def test_versions_backends_and_cache(invoke, last_json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES["gemma-3-270m"]
    held = tmp_path / "cache" / "models" / recipe.file
    held.parent.mkdir(parents=True)
    held.write_bytes(b"x" * 1000)
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "cache"))
    done = invoke("env", "--json")
    assert done.exit_code == 0, done.stderr
    found = last_json(done)
    assert found["cache"]["bytes"] == 1000
    assert [name for name, there in found["cache"]["models"].items() if there] == ["gemma-3-270m"]
    assert all(reasons["reference"] == "runs" for reasons in found["backends"]["cpu"].values())
    assert "CUDA" in found["backends"]["cpu"]["attend"]["triton"]
    assert found["origin"]["libraries"]["torch"] in done.stderr


def test_an_empty_cache_is_no_error(invoke, last_json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "none"))
    found = last_json(invoke("env", "--json"))
    assert found["cache"]["bytes"] == 0
    assert not (tmp_path / "none").exists()


def test_the_home_folder_is_not_told(invoke, last_json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HASHATTENTION_CACHE", str(tmp_path / "deep" / "cache"))
    assert last_json(invoke("env", "--json"))["cache"]["folder"] == "~/deep/cache"
