"""How the CPU backend is chosen, what it refuses, and what happens without the native kernels."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest
import torch

from hashattention.errors import BackendError
from hashattention.ops import attend, cpu, dispatch, score

needs_native = pytest.mark.skipif(cpu.MISSING is not None, reason="needs the native kernels")
CODE, SIGNATURES = torch.ones(1, 1, 1, 32, dtype=torch.int8), torch.zeros(1, 1, 3, 1, dtype=torch.int32)


@needs_native
@pytest.mark.parametrize("op", ["score", "select", "score_select", "attend", "decode"])
def test_cpu_tensors_go_to_the_native_kernels(op: str) -> None:
    tensor = torch.zeros(1) if op in ("attend", "decode") else SIGNATURES
    assert dispatch.find(op, tensor).__module__ == "hashattention.ops.cpu.native"


@needs_native
def test_what_attend_refuses_is_said() -> None:
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 8, 5).transpose(2, 3)
    rows = torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)
    with pytest.raises(BackendError, match=r"needs K and V in .* with adjacent values, given torch\.float32"):
        attend(q, k, k, *rows, scale=1.0, backend="cpu")
    assert attend(q, k, k, *rows, scale=1.0)[0].shape == (1, 1, 1, 8)
    k = torch.zeros(1, 1, 5, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"given torch\.float64"):
        attend(q, k, k, *rows, scale=1.0, backend="cpu")


def test_without_native_kernels_numpy_stands_in_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("hashattention.ops.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hashattention.ops.cpu._native", None)
    alone = importlib.import_module("hashattention.ops.cpu")
    assert alone.score.__module__ == "hashattention.ops.cpu.fallback"
    for _ in range(2):
        assert score(CODE, SIGNATURES, 1, backend="cpu").tolist() == [[[-32, -32, -32]]]
    said = [record for record in caplog.records if "native CPU kernels are not installed" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]
    with pytest.raises(BackendError, match="cpu: has no attend"):
        dispatch.find("attend", torch.zeros(1), "cpu")


@needs_native
def test_an_instruction_set_this_processor_lacks() -> None:
    from hashattention.ops.cpu import _native

    with pytest.raises(ValueError, match="no avx1024 kernels"):
        _native.use("avx1024")
    assert _native.instruction_sets()[-1] == "plain"
