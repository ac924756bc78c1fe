from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hashattention

REPORT = "import sys; sys.stderr.write(','.join(sorted({name.split('.')[0] for name in sys.modules})))"


def imported(statement: str, folder: Path) -> tuple[set[str], str]:
    """Top-level modules loaded after `statement` in a fresh interpreter, and what it printed; it runs in `folder`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    environment["PYTHONPATH"] = str(Path(hashattention.__file__).parents[1])
    command = [sys.executable, "-c", f"{statement}\n{REPORT}"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return set(run.stderr.split(",")), run.stdout


def test_importing_the_package_loads_nothing(tmp_path: Path) -> None:
    modules, printed = imported("import hashattention; hashattention.__version__; dir(hashattention)", tmp_path)
    assert "hashattention" in modules
    assert not modules & {"torch", "numpy", "transformers", "safetensors", "triton", "datasets", "plotly", "typer"}
    assert printed == ""
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_needs_no_torch(tmp_path: Path) -> None:
    modules, _ = imported("from hashattention import BaseModel, Budget, MapsConfig", tmp_path)
    assert "torch" not in modules


def test_importing_the_ops_loads_torch_alone(tmp_path: Path) -> None:
    modules, printed = imported("import hashattention.ops", tmp_path)
    assert "torch" in modules
    assert not modules & {"transformers", "triton", "datasets", "plotly", "typer", "huggingface_hub"}
    assert printed == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", hashattention.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(hashattention, name).__name__ == name
    assert name in dir(hashattention)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hashattention' has no attribute 'atach'"):
        _ = hashattention.atach
