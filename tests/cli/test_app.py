from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hashattention
from hashattention.errors import DownloadError


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom hashattention.cli import main\nsys.argv = ['hashattention', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'plotly', 'datasets', 'jinja2'} & set(sys.modules)\nassert not heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("demo", "train", "generate", "inspect", "env"):
        assert verb in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_packages_it_says_what_to_install(missing: str) -> None:
    code = (
        "import importlib.util\nfind = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)\n"
        "from hashattention.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f'needs {missing}: pip install "hashattention[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_module_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hashattention", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == hashattention.__version__


@pytest.mark.parametrize(("place", "words"), [("before", ["--debug", "inspect"]), ("without", ["inspect"])])
def test_debug_shows_where_an_error_came_from(invoke, place: str, words: list[str]) -> None:
    done = invoke(*words, "no-such-maps")
    assert done.exit_code != 0
    assert (type(done.exception).__name__ == "ArtifactError") == (place == "before")


def test_the_world_fails_with_code_1(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> Path:
        raise DownloadError("the network is [gone]")

    monkeypatch.setattr("hashattention.artifact.locate", no_network)
    assert refused("inspect", "owner/maps", code=1) == "error: the network is [gone]"


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_told_otherwise(given: str | None, used: str) -> None:
    code = (
        "import os, sys\nfrom hashattention.cli import main\nsys.argv = ['hashattention', '--version']\n"
        "try:\n    main()\nfinally:\n    print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == used
