from __future__ import annotations

import pytest
import torch

from hashattention.errors import BackendError
from hashattention.ops import cuda
from hashattention.ops.cuda import build, layout


def test_a_cpu_tensor_is_refused_with_its_device():
    assert cuda.refuse("decode", torch.zeros(1), {}) == "needs a CUDA tensor, given one on cpu"


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackendError, match=r"needs nvcc: set CUDA_HOME .*backend='triton'"):
        build.load("encode", BITS=1)


@pytest.mark.slow
@pytest.mark.skipif(build.find_compiler() is None, reason="needs nvcc")
def test_all_kernels_compile_for_sm_90(monkeypatch, tmp_path):
    """No GPU is needed to compile and to load the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = {"HIDDEN0": 256, "HIDDEN1": 256, "WORDS": 2, "LEVELS": 7, "PLANES": 3, "MIXED": 1, "HALF": 0, "PAGED": 0}
    sizes = {"THREADS": 256, "BLOCKS": 8, "RESIDENT": 2}
    build.load("encode", QUERY_IN=512, KEY_IN=128, HEAD_DIM=64, ROWS=1, MODE=0, TILE=16, **shape, **sizes)
    step_library = build.load("step", HEAD_DIM=128, ROWS=4, MODE=3, **shape, **sizes)
    build.load("step", HEAD_DIM=128, ROWS=4, MODE=3, HELD=1, **shape, **(sizes | {"RESIDENT": 1}))
    shape |= {"HIDDEN1": 0, "THREADS": layout.WIDE_THREADS, "BLOCKS": layout.WIDE_BLOCKS, "RESIDENT": 1}
    wide_library = build.load("wide", HEAD_DIM=128, ROWS=4, MODE=3, **shape)
    assert len(list(tmp_path.rglob("*.so"))) == 4
    assert step_library.run
    assert wide_library.run


@pytest.mark.slow
@pytest.mark.skipif(build.find_compiler() is None, reason="needs nvcc")
@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (64, 7), (256, 1)])
def test_a_remainder_has_the_memory_it_takes(head_dim, group, monkeypatch, tmp_path):
    """The source refuses less."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = {"HIDDEN0": 0, "HIDDEN1": 0, "WORDS": 2, "LEVELS": 7, "PLANES": 3, "MIXED": 1, "HALF": 0, "PAGED": 0}
    shape |= {"HEAD_DIM": head_dim, "ROWS": group, "MODE": 0, "THREADS": 256, "BLOCKS": 8, "RESIDENT": 1}
    known = layout.remainder_bytes(group, head_dim)
    assert build.load("step", **shape, REMAINDER=known).run
    with pytest.raises(BackendError, match="remainder_bytes"):
        build.load("step", **shape, REMAINDER=known - 16)


def test_a_source_that_does_not_compile_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_compiler", lambda: "/bin/false")
    with pytest.raises(BackendError, match=r"nvcc could not compile encode\.cu"):
        build.load("encode", BITS=2)
    assert not list(tmp_path.rglob("*.so"))
