from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import hashattention

NAMES = sorted(
    module.name
    for module in pkgutil.walk_packages(hashattention.__path__, "hashattention.", onerror=lambda _: None)
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_in_docstrings_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hashattention":
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert failed == 0, capsys.readouterr().out


def test_the_ops_have_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in ("encode", "score", "select", "attend"):
        tests = finder.find(importlib.import_module(f"hashattention.ops.{name}"))
        assert any(test.examples for test in tests), name
