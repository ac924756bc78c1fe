from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_local_memory(arch: int, record_property) -> None:  # type: ignore[no-untyped-def]
    script = Path(__file__).with_name("compiled.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), str(arch)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"_encode", "_encode_pair", "_score_count", "_write_indices", "_attend", "_score"}
    assert {f["kernel"] for f in facts} == kernels | {"_select", "_logits", "_find_peaks", "_pool", "_add_remainder"}
    for fact in facts:
        record_property(f"{fact['kernel']} sm_{arch}", json.dumps(fact))
        assert fact["LOCAL"] == 0
        assert fact["STACK"] <= 64, fact
        assert fact["shared_bytes"] <= 100 * 1024, fact
