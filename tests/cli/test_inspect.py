from __future__ import annotations

import shutil
from pathlib import Path

from hashattention.artifact import WEIGHTS_FILE


def test_what_the_folder_holds(invoke, last_json, tiny_maps_folder: Path) -> None:
    done = invoke("inspect", tiny_maps_folder, "--json")
    assert done.exit_code == 0, done.stderr
    found = last_json(done)
    assert found["maps"]["bits"] == 32
    assert found["base_model"]["num_key_value_heads"] == 2
    assert found["cost"]["share_of_kv_bytes"] == 32 / (2 * 16 * 16)
    assert found["holds"] == []
    assert found["files"][WEIGHTS_FILE] == (tiny_maps_folder / WEIGHTS_FILE).stat().st_size
    assert "32 bits" in done.stderr
    assert "6.25%" in done.stderr


def test_without_json_stdout_stays_empty(invoke, tiny_maps_folder: Path) -> None:
    done = invoke("inspect", tiny_maps_folder)
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "LlamaForCausalLM" in done.stderr


def test_a_missing_folder(refused, tmp_path: Path) -> None:
    assert "no maps folder at" in refused("inspect", tmp_path / "nowhere")


def test_a_folder_without_weights(refused, tiny_maps_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_maps_folder, tmp_path / "maps")
    (folder / WEIGHTS_FILE).unlink()
    assert f"has no {WEIGHTS_FILE}" in refused("inspect", folder)
