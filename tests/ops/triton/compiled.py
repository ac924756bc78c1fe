"""Compile every kernel, as its launcher calls it, for each GPU generation; print one JSON line a kernel. Run as a
script: needs no GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

os.environ["TRITON_INTERPRET"] = "0"

import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from hashattention.ops.triton import (
    add_remainder,
    attend,
    decode,
    decode_step,
    encode_signature,
    logits,
    pool,
    score,
    score_select,
    select,
)

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "constexpr" if value is None else ("fp32" if isinstance(value, float) else "i32")


def inspect(cubin: bytes) -> dict[str, int]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def compile_launch(kernel: JITFunction, arch: int, arguments: tuple, options: dict) -> None:
    constants = {p.name for p in kernel.params if p.is_constexpr}
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        k: v for k, v in options.items() if k in kernel.arg_names
    }
    signature = {name: "constexpr" if name in constants else describe(value) for name, value in bound.items()}
    fixed = {name: value for name, value in bound.items() if signature[name] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, v) in enumerate(bound.items())
        if isinstance(v, torch.Tensor) and n != "budgets"
    }
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    rest = {key: value for key, value in options.items() if key in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=rest)
    facts = {
        "kernel": kernel.__name__,
        "arch": arch,
        "shared_bytes": compiled.metadata.shared,
        **inspect(compiled.asm["cubin"]),
    }
    print(json.dumps(facts))


def main(arch: int) -> None:
    JITFunction.run = lambda self, *args, grid, warmup, **options: compile_launch(self, arch, args, options)  # type: ignore[method-assign]
    heads, dim, tokens = 8, 128, 8192
    widths = [4 * dim, 256, 256, 64]
    maps = [torch.zeros(heads, a, b, dtype=torch.bfloat16) for a, b in itertools.pairwise(widths)]
    biases = [torch.zeros(heads, b, dtype=torch.bfloat16) for b in widths[1:]]
    q, k = (
        torch.zeros(1, 4 * heads, 1, dim, dtype=torch.bfloat16),
        torch.zeros(1, heads, tokens, dim, dtype=torch.bfloat16),
    )
    signatures, bounds = torch.zeros(1, heads, tokens, 2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    budgets = torch.zeros(1, heads, 3, dtype=torch.int32)
    step = (q, k, k, signatures, maps, biases, bounds[0], bounds[1], budgets, 336, 7, 0.1)
    decode(*step)
    key_maps = [torch.zeros(heads, dim, 256, dtype=torch.bfloat16), *maps[1:]]
    decode_step(*step, new_key=(k[:, :, :1], key_maps, biases))
    code = torch.zeros(1, heads, 1, 2, dtype=torch.int32)
    score(code, signatures, heads)
    # As many levels as there may be, and those of wide codes: each has bins of its own.
    for width, levels in ((32, 127), (128, 7)):
        wide = torch.zeros(1, heads, 1, width, dtype=torch.int8)
        words = torch.zeros(1, heads, tokens, width // 32, dtype=torch.int32)
        score_select(wide, words, *bounds, budgets, 336, levels=levels)
    for kind in (torch.float32, torch.int32):
        select(torch.zeros(1, heads, tokens, dtype=kind), *bounds, budgets, 336)
    pool(logits(q, k, 0.1).unflatten(1, (heads, 4)), *bounds, "peak_max")
    indices = torch.zeros(1, heads, 336, dtype=torch.int32)
    table = torch.zeros(1, tokens, dtype=torch.int32)
    attend(q, k.view(tokens, heads, 1, dim), k.view(tokens, heads, 1, dim), indices, budgets[..., 0], 0.1, 30.0, table)
    short = k.to(torch.float8_e4m3fn if arch >= 89 else torch.float8_e5m2)
    attend(q, short, short, indices, budgets[..., 0], 0.1, v_scale=2.0)
    encode_signature(torch.zeros(1, heads, 256, 512, dtype=torch.bfloat16), maps, biases)
    sums, logsumexp = torch.zeros(1, heads, 2 * dim + 1), torch.zeros(1, 4 * heads, 1)
    add_remainder(q, logsumexp, q, sums, budgets[..., 0], bounds[1], torch.zeros(4 * heads, 3), 0.1, 30.0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
