"""Every kernel test runs on each instruction set this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hashattention.ops.cpu import MISSING

SETS = ["avx512", "avx2", "plain"]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if MISSING is not None:
        pytest.skip(f"needs the native kernels ({MISSING})")
    from hashattention.ops.cpu import _native

    if request.param not in _native.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    before = _native.active()
    _native.use(request.param)
    yield request.param
    _native.use(before)
