from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner, Result


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run ``hashattention`` with some words (and perhaps stdin), as a program would."""
    from hashattention.cli.app import app

    def run(*words: Any, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], input=stdin)

    return run


@pytest.fixture
def refused(invoke: Callable[..., Result]) -> Callable[..., str]:
    """Run what must fail with code 2 and without a traceback; what stderr said, on one line."""

    def run(*words: Any, stdin: str | None = None, code: int = 2) -> str:
        done = invoke(*words, stdin=stdin)
        said = " ".join(done.stderr.split())
        assert done.exit_code == code, (done.stderr, done.exception)
        assert "Traceback" not in said
        assert "error" in said.lower()
        return said

    return run


@pytest.fixture
def last_json() -> Callable[[Result], dict[str, Any]]:
    """The JSON object on the last line of stdout."""
    return lambda done: json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("All that is gold does not glitter. " * 8)
    return path
