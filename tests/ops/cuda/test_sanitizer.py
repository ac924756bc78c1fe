"""The CUDA kernels under compute-sanitizer: no access out of bounds, no race in shared memory, on small shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import sys

    import torch
    from hashattention.ops import cuda

    def maps(width, bits):
        widths = (width, 256, 256, bits)
        weights = [torch.randn(2, a, b, device="cuda").bfloat16() / a**0.5 for a, b in zip(widths, widths[1:])]
        return weights, [torch.randn(2, b, device="cuda") * 0.1 for b in widths[1:]]

    torch.manual_seed(0)
    blocks = int(sys.argv[1])
    rows = (1, 520, 0, 1, 0), (7, 520, 0, 1, 0), (20, 512, 16, 1, 0), (1, 520, 0, 2, 0), (7, 520, 0, 2, 0)
    rows += (1, 520, 0, 2, 1), (7, 520, 0, 1, 1), (40, 512, 16, 2, 1)
    for batch, tokens, pages, mixture, filled in rows:
        k, v = (torch.randn(batch, 2, tokens, 64, device="cuda").bfloat16() for _ in range(2))
        signatures = torch.randint(-(2**31), 2**31, (batch, 2, tokens, 2), device="cuda", dtype=torch.int32)
        table, key = None, k[:, :, -1:].clone()
        if pages:
            table = torch.arange(batch * tokens // pages, device="cuda").int().view(batch, -1)
            k, v, signatures = (
                x.unflatten(2, (-1, pages)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v, signatures)
            )
        end = torch.randint(1, tokens + 1, (batch,), device="cuda").int()
        budgets = torch.tensor([4, 8, 40], device="cuda").int().repeat(batch, 2, 1)
        q = torch.randn(batch, 8, 1, 64, device="cuda").bfloat16()
        new_key = (key, *maps(64, 64))
        caches, query = (k, v, signatures), maps(256, 64 * mixture)
        sums, coefficients = torch.rand(batch, 2, 129, device="cuda") + 1, torch.randn(8, 3, device="cuda")
        out, _ = cuda.decode_step(
            q, *caches, *query, torch.zeros_like(end), end, budgets, 52, levels=7, scale=0.125,
            block_table=table, new_key=new_key, remainder=(sums, end, coefficients) if filled else None,
            shape=(256, blocks) if blocks and batch == 7 else None,
        )
        assert out.isfinite().all()
    """
)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_a_step_is_clean(tool):
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    sanitizer = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    # Torch's caching allocator would hide an access beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # synccheck of CUDA 13.0 loses sight of barriers in blocks beyond the eighth of a cluster, and dies of it.
    blocks = "8" if tool == "synccheck" else "0"
    # Only our kernels: torch's own fill the inputs.
    command = [sanitizer, "--tool", tool, "--kernel-name", "kns=step", "--kernel-name", "kns=encode_all"]
    command += ["--error-exitcode", "9", sys.executable, "-c", PROGRAM, blocks]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
