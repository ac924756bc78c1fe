from __future__ import annotations

import pytest
import torch

from hashattention.errors import BackendError
from hashattention.ops import cuda
from hashattention.ops.cuda import build, step


def test_a_cpu_tensor_is_refused_with_its_device():
    assert cuda.refuse("decode", torch.zeros(1), {}) == "needs a CUDA tensor, given one on cpu"


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackendError, match=r"needs nvcc: set CUDA_HOME .*backend='triton'"):
        build.load("encode", BITS=1)


@pytest.mark.parametrize(
    ("batch", "tokens", "early"),
    [(8, 1 << 15, True), (32, 1 << 17, True), (8, 1 << 17, False), (20, 1 << 15, False), (2, 1 << 20, False)],
)
def test_a_step_starts_early_where_that_was_measured_faster(batch, tokens, early):
    """Eight KV heads of 64 bits, 1/32: not where blocks leave the chip partly free, nor where they wait for memory."""
    shape = step.choose(0, 8 * batch, tokens, tokens // 32, 512)
    assert shape is not None
    assert step.starts_early(shape, 8 * batch, tokens, 64) is early


@pytest.mark.slow
@pytest.mark.skipif(build.find_compiler() is None, reason="needs nvcc")
def test_both_kernels_compile_for_sm_90(monkeypatch, tmp_path):
    """No GPU is needed to compile and to load the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = {"HIDDEN0": 256, "HIDDEN1": 256, "WORDS": 2, "LEVELS": 7, "PLANES": 3, "HALF": 0, "PAGED": 0}
    sizes = {"THREADS": 256, "BLOCKS": 8, "RESIDENT": 2}
    build.load("encode", QUERY_IN=512, KEY_IN=128, HEAD_DIM=64, ROWS=1, MODE=0, TILE=16, **shape, **sizes)
    library = build.load("step", HEAD_DIM=128, ROWS=4, MODE=3, **shape, **sizes)
    assert len(list(tmp_path.rglob("*.so"))) == 2
    assert library.run


def test_a_source_that_does_not_compile_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_compiler", lambda: "/bin/false")
    with pytest.raises(BackendError, match=r"nvcc could not compile encode\.cu"):
        build.load("encode", BITS=2)
    assert not list(tmp_path.rglob("*.so"))
