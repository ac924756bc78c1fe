from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hashattention.errors import BackendError
from hashattention.ops import dispatch, reference, score

CODE, SIGNATURES = torch.ones(1, 1, 1, 32, dtype=torch.int8), torch.zeros(1, 1, 3, 1, dtype=torch.int32)


class Fake(ModuleType):
    """A backend with a `score` that answers 7 everywhere, and a reason to refuse while `reason` is set."""

    reason: str | None = None

    def refuse(self, op: str, tensor: Tensor, arguments: Mapping[str, Any]) -> str | None:
        self.asked = op, tensor.dtype, set(arguments)
        return self.reason

    def score(self, code: Tensor, signatures: Tensor, selection_heads: int, block_table: Tensor | None) -> Tensor:
        return torch.full((code.shape[0], selection_heads, signatures.shape[2]), 7, dtype=torch.int32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    module = Fake("fake_backend")
    monkeypatch.setitem(sys.modules, "fake_backend", module)
    modules = {"fake": "fake_backend", "absent": "no_such_backend_module", "reference": reference.__name__}
    monkeypatch.setattr(dispatch, "MODULES", modules)
    dispatch._log_once.cache_clear()
    return module


def test_a_named_backend_runs(fake: Fake) -> None:
    assert score(CODE, SIGNATURES, 1, backend="fake").tolist() == [[[7, 7, 7]]]
    assert score(CODE, SIGNATURES, 1, backend="reference").tolist() == [[[-32, -32, -32]]]


def test_auto_takes_the_first_that_can(fake: Fake) -> None:
    assert score(CODE, SIGNATURES, 1).tolist() == [[[7, 7, 7]]]
    op, dtype, features = fake.asked
    assert (op, dtype) == ("score", torch.int32)
    assert features >= {"code", "block_table"}
    fake.reason = "tired"
    assert score(CODE, SIGNATURES, 1).tolist() == [[[-32, -32, -32]]]


def test_a_named_backend_that_refuses_raises_with_its_reason(fake: Fake) -> None:
    fake.reason = "needs compute capability 9.0"
    message = r"backend 'fake' cannot run score on cpu: fake: needs compute capability 9\.0\. Use backend='auto'\."
    with pytest.raises(BackendError, match=message):
        score(CODE, SIGNATURES, 1, backend="fake")


def test_a_named_backend_without_the_op_or_the_module_raises(fake: Fake) -> None:
    with pytest.raises(BackendError, match="fake: has no select"):
        dispatch.find("select", CODE, "fake")
    with pytest.raises(BackendError, match=r"absent: not importable \(No module named 'no_such_backend_module'\)"):
        score(CODE, SIGNATURES, 1, backend="absent")


def test_an_unknown_backend_names_the_known_ones(fake: Fake) -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'cuda'; known: auto, fake, absent, reference\."):
        score(CODE, SIGNATURES, 1, backend="cuda")


def test_auto_is_logged_once_with_every_reason(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, dispatch.__name__)
    fake.reason = "tired"
    for _ in range(3):
        score(CODE, SIGNATURES, 1)
    reasons = "fake: tired; absent: not importable (No module named 'no_such_backend_module')"
    assert [record.getMessage() for record in caplog.records] == [f"score on cpu: backend reference ({reasons})"]
    score(CODE, SIGNATURES, 1, backend="reference")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("op", ["encode_signature", "encode_query", "score", "select", "score_select", "attend"])
def test_the_reference_runs_every_op(op: str) -> None:
    assert list(dispatch.MODULES)[-1] == "reference"
    assert dispatch.find(op, CODE, "reference") is getattr(reference, op)
