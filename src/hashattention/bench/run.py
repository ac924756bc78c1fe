"""Run cases: the correctness gate, then the clock, then rows with their origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hashattention import ops, provenance
from hashattention.bench import paged
from hashattention.bench.cases import Case, Inputs, make_inputs
from hashattention.bench.methods import BASELINES, OURS, SLOW, Chosen, Method, choose, gather_sdpa, remainder_of
from hashattention.bench.roofline import bytes_of, copy_bandwidth
from hashattention.bench.timing import Timing, time_functions
from hashattention.errors import BackendError
from hashattention.ops import cpu, reference
from hashattention.ops.buffer import has_large_pages

#: A row of the whole step is off when it errs more than this times what plain torch errs.
ROW_TOLERANCE = 3.0
#: What sums in float32 may differ by.
ROUNDING = 1e-5


def check(inputs: Inputs, chosen: Chosen) -> dict[str, float]:
    """The gate: indices equal to the reference bit for bit, outputs within twice the error of plain torch.

    The whole step is compared a query head at a time. Its own encode may round a weight of the code the other way, and
    that head then attends to other tokens; half of the heads must agree with codes of up to 64 weights, a quarter with
    128, those of a mixture all counted: a weight more is one more that may round the other way. The step with the
    remainder is compared with what is added to this step's output, which was rounded once more.

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
    exact = torch.cat([_exact(inputs, chosen, b) for b in range(inputs.case.batch)])
    out, _ = ops.attend(inputs.q, *arguments, scale=inputs.scale)
    ours, theirs = _error(out, exact), _error(gather_sdpa(inputs, chosen), exact)
    # Rounding the output to its dtype alone costs half a unit in the last place.
    allowed = max(2 * theirs, torch.finfo(out.dtype).eps * exact.abs().max().item())
    if ours > allowed:
        raise BackendError(f"attend errs {ours:.2e} on {inputs.case}, plain torch {theirs:.2e}; report it.")
    step: Any = OURS["step"].prepare(inputs, chosen)()
    off = (step[0].float() - exact).abs().amax((2, 3)) > ROW_TOLERANCE * allowed
    share = off.float().mean().item()
    if share > 1 - 0.5 ** max(1, inputs.case.bits * inputs.case.mixture / 64):
        raise BackendError(f"the step differs from its parts in {share:.0%} of the heads on {inputs.case}; report it.")
    filled: Any = OURS["step+remainder"].prepare(inputs, chosen)()
    wanted = _fill(inputs, *step)
    off_by, largest = _error(filled[0], wanted), torch.maximum(step[0].abs().max(), wanted.abs().max()).item()
    if off_by > torch.finfo(out.dtype).eps * largest + ROUNDING:
        raise BackendError(f"the step with a remainder errs {off_by:.2e} on {inputs.case}; report it.")
    return {"attend_error": ours, "torch_error": theirs, "step_heads_off": share, "remainder_error": off_by}


def _fill(inputs: Inputs, out: Tensor, logsumexp: Tensor) -> Tensor:
    """The step's output with the remainder, in float32."""
    sums, lengths, coefficients = remainder_of(inputs)
    known = inputs.q.float(), sums, inputs.budgets.sum(-1, dtype=torch.int32), lengths, coefficients
    return reference.add_remainder(out.float(), logsumexp, *known, inputs.scale)


def _exact(inputs: Inputs, chosen: Chosen, request: int) -> Tensor:
    """One request's float32 attention over the chosen tokens; all at once would need gigabytes."""
    one = slice(request, request + 1)
    caches, rows = (inputs.k[one], inputs.v[one]), (chosen.indices[one], chosen.counts[one])
    return reference.attend(inputs.q[one].float(), *caches, *rows, inputs.scale)[0]


def prepare(inputs: Inputs, chosen: Chosen, methods: dict[str, Method]) -> tuple[dict[str, Any], dict[str, str]]:
    """The calls that can be timed, and why the other methods cannot: refused, failed, or another result than ours.

    Ours must run: an error of theirs is raised. A dense baseline must agree with the others.
    """
    calls: dict[str, Any] = {}
    refusals: dict[str, str] = {}
    dense: Tensor | None = None
    for name, method in methods.items():
        reason = method.refuse(inputs)
        if reason is None and method.kind == "dense":
            try:
                calls[name] = method.prepare(inputs, chosen)
                out: Any = calls[name]()
            except (RuntimeError, ValueError, ImportError) as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                out = out.flatten(1, -2).float()
                dense = out if dense is None else dense
                if (out - dense).abs().max() > 0.05 * dense.abs().max():
                    reason = "differs from the first dense method"
        elif reason is None:
            calls[name] = method.prepare(inputs, chosen)
        if reason is not None:
            calls.pop(name, None)
            refusals[name] = reason
    return calls, refusals


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
        speed-up over the fastest dense method of the same run, and the origin; a method that could not run gives one
        with the reason as its ``"refusal"``.
    """
    kind = torch.device(device).type
    methods = {**OURS, **(BASELINES.get(kind, {}) if bench == "attention" else SLOW)}
    bandwidth = copy_bandwidth(device)
    for case in cases:
        inputs = make_inputs(case, device)
        chosen = choose(inputs)
        gate = check(inputs, chosen)
        calls, refusals = prepare(inputs, chosen, methods)
        timings = time_functions(device, calls, rounds, seconds)
        timed = {name: method for name, method in methods.items() if name in calls}
        shared = {"bench": bench, **case.fields()}
        yield from (shared | row for row in _rows(inputs, timed, timings, gate, bandwidth))
        origin = provenance.origin(inputs.q.device)
        for name, reason in refusals.items():
            yield shared | {"method": name, "kind": methods[name].kind, "refusal": reason, "origin": origin}


def _rows(
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
            "huge_pages": has_large_pages(),
            "backend": _backend(inputs, name),
            "flashinfer": paged.version(),
            "gate": gate,
            "origin": origin,
        }


def _backend(inputs: Inputs, method: str) -> str:
    """Which kernels ran; on a CPU with their instruction set."""
    if method.endswith(", CUDA"):
        return "cuda"
    run = ops.dispatch.find("attend", inputs.q, k=inputs.k, v=inputs.v)
    if method in ("step", "step+remainder"):
        features: dict[str, Any] = {
            "k": inputs.k,
            "v": inputs.v,
            "signatures": inputs.signatures,
            "weights": inputs.weights,
        }
        features |= {"levels": inputs.case.levels, "capacity": inputs.capacity, "key_weights": inputs.key_weights}
        features |= {"selection_heads": inputs.case.sizes.kv_heads, "weights": inputs.weights}
        for name in ("decode_step", "decode"):
            fused = ops.dispatch.find_fused(name, inputs.q, **features)
            if fused is not None:
                run = fused
                break
    backend = run.__module__.removeprefix("hashattention.ops.").split(".")[0]
    return f"cpu ({cpu.describe()})" if backend == "cpu" else backend
