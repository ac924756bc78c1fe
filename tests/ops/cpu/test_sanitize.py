"""The kernels under the address and undefined-behaviour sanitizers, on buffers of exactly the size they are told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hashattention.ops.cpu import MISSING

NATIVE = Path(__file__).parents[3] / "src" / "native"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
FLAGS = {"plain": [], "avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def runnable() -> list[str]:
    from hashattention.ops.cpu import _native

    return _native.instruction_sets()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(MISSING is not None, reason="needs the native kernels")
@pytest.mark.parametrize("name", FLAGS)
def test_clean_exact_and_without_allocations(name: str, tmp_path: Path) -> None:
    if name not in runnable():
        pytest.skip(f"this processor has no {name}")
    program = tmp_path / "sanitize"
    source = Path(__file__).with_name("sanitize.cpp")
    flags = ["-std=c++17", "-O1", "-g", *SANITIZE, *FLAGS[name], f"-I{NATIVE}", "-Wno-unknown-pragmas"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 failures")
