"""Run cases: the correctness gate, then the clock, then rows with their origin."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hashattention import ops, provenance
from hashattention.bench.cases import Case, Inputs, make_inputs
from hashattention.bench.methods import BASELINES, OURS, SLOW, Chosen, Method, choose, gather_sdpa
from hashattention.bench.roofline import bytes_of, copy_bandwidth
from hashattention.bench.timing import Timing, time_functions
from hashattention.errors import BackendError
from hashattention.ops import cpu, reference


def check(inputs: Inputs, chosen: Chosen) -> dict[str, float]:
    """The gate: indices equal to the reference bit for bit, outputs within twice the error of plain torch.

    Raises
    ------
    BackendError
        If the kernels are wrong here; nothing is timed then.
    """
    rows = inputs.start, inputs.end, inputs.budgets, inputs.capacity
    expected = reference.score_select(chosen.code, inputs.signatures, *rows)
    if not (torch.equal(expected[0], chosen.indices) and torch.equal(expected[1], chosen.counts)):
        raise BackendError(f"score_select differs from the reference on {inputs.case}; report it, and name a backend.")
    arguments = inputs.k, inputs.v, chosen.indices, chosen.counts
    exact, _ = reference.attend(inputs.q.float(), *arguments, inputs.scale)
    out, _ = ops.attend(inputs.q, *arguments, scale=inputs.scale)
    ours, theirs = _error(out, exact), _error(gather_sdpa(inputs, chosen), exact)
    # Rounding the output to its dtype alone costs half a unit in the last place.
    if ours > max(2 * theirs, torch.finfo(out.dtype).eps * exact.abs().max().item()):
        raise BackendError(f"attend errs {ours:.2e} on {inputs.case}, plain torch {theirs:.2e}; report it.")
    return {"attend_error": ours, "torch_error": theirs}


def _error(out: Tensor, exact: Tensor) -> float:
    return (out.float() - exact).abs().max().item()


def run(
    bench: str, cases: Iterable[Case], device: str, rounds: int = 30, seconds: float = 20.0
) -> Iterator[dict[str, Any]]:
    """Rows of the benchmark ``"attention"`` (ours against baselines) or ``"ops"`` (each part against the reference).

    Yields
    ------
    dict
        One JSON object a method and case, with the case, the timing, the bytes, the share of the copy bandwidth, the
        speed-up over the fastest dense method of the same run, and the origin.
    """
    kind = torch.device(device).type
    methods = {**OURS, **(BASELINES.get(kind, {}) if bench == "attention" else SLOW)}
    bandwidth = copy_bandwidth(device)
    for case in cases:
        inputs = make_inputs(case, device)
        chosen = choose(inputs)
        gate = check(inputs, chosen)
        calls = {name: method.prepare(inputs, chosen) for name, method in methods.items()}
        timings = time_functions(device, calls, rounds, seconds)
        yield from _rows(bench, inputs, methods, timings, gate, bandwidth)


def _rows(
    bench: str,
    inputs: Inputs,
    methods: dict[str, Method],
    timings: dict[str, Timing],
    gate: dict[str, float],
    bandwidth: float,
) -> Iterator[dict[str, Any]]:
    dense = {name: timings[name].p50_ms for name, method in methods.items() if method.kind == "dense"}
    fastest = min(dense, key=lambda name: dense[name]) if dense else None
    origin = provenance.origin(inputs.q.device)
    for name, method in methods.items():
        timing, moved = timings[name], bytes_of(name, method.kind, inputs)
        rate = moved / timing.p50_ms * 1e3
        yield {
            "bench": bench,
            **inputs.case.fields(),
            "method": name,
            "kind": method.kind,
            **dataclasses.asdict(timing),
            "bytes": moved,
            "bytes_per_second": rate,
            "copy_bytes_per_second": bandwidth,
            "roofline": rate / bandwidth,
            "baseline": fastest,
            "speedup": dense[fastest] / timing.p50_ms if fastest else None,
            "threads": torch.get_num_threads(),
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            "backend": _backend(inputs, name),
            "gate": gate,
            "origin": origin,
        }


def _backend(inputs: Inputs, method: str) -> str:
    """Which kernels ran; on a CPU with their instruction set."""
    run = ops.dispatch.find("attend", inputs.q, k=inputs.k, v=inputs.v)
    if method == "step":
        fused = ops.dispatch.find_fused(
            "decode",
            inputs.q,
            k=inputs.k,
            v=inputs.v,
            signatures=inputs.signatures,
            weights=inputs.weights,
            levels=inputs.case.levels,
            selection_heads=inputs.case.sizes.kv_heads,
            capacity=inputs.capacity,
        )
        run = fused or run
    backend = run.__module__.removeprefix("hashattention.ops.").split(".")[0]
    return f"cpu ({cpu.describe()})" if backend == "cpu" else backend
