"""Methods: what is timed on the inputs of a case: ours, its parts, and the named baselines of each device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hashattention import ops
from hashattention.bench import paged, paper
from hashattention.bench.cases import Inputs
from hashattention.ops import dispatch, reference
from hashattention.ops.shapes import Remainder


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What encode and select give on some inputs: the arguments of the later parts."""

    code: Tensor
    indices: Tensor
    counts: Tensor


Prepare = Callable[[Inputs, Chosen], Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Method:
    """`prepare(inputs, chosen)` gives the call that is timed; `kind` is ``"ours"``, ``"part"``, ``"dense"``,
    ``"sparse"`` (a baseline over the same indices), ``"paper"`` (its own choice of as many tokens) or ``"slow"`` (the
    same result without kernels). `refuse(inputs)` says why it cannot run here.
    """

    kind: str
    prepare: Prepare
    refuse: Callable[[Inputs], str | None] = lambda inputs: None


def choose(inputs: Inputs) -> Chosen:
    """Encode and select once."""
    code, _ = ops.encode_query(_grouped(inputs), inputs.weights, inputs.biases, inputs.case.levels)
    return Chosen(code, *ops.score_select(code, *_selection(inputs), levels=inputs.case.levels))


def _grouped(inputs: Inputs) -> Tensor:
    return ops.group_queries(inputs.q, inputs.case.sizes.kv_heads)


def _selection(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return inputs.signatures, inputs.start, inputs.end, inputs.budgets, inputs.capacity


def _step(inputs: Inputs, chosen: Chosen, remainder: Remainder | None = None) -> Callable[[], object]:
    rest = {"levels": inputs.case.levels, "scale": inputs.scale, "remainder": remainder}
    caches, maps = (inputs.k, inputs.v, inputs.signatures), (inputs.weights, inputs.biases)
    rows = inputs.start, inputs.end, inputs.budgets, inputs.capacity
    return lambda: ops.decode(inputs.q, *caches, *maps, *rows, **rest, new_key=inputs.new_key)  # type: ignore[arg-type]


def _step_filled(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    """The step with the mean value for the tokens left out, as `HashSelector` makes it."""
    return _step(inputs, chosen, remainder_of(inputs))


def remainder_of(inputs: Inputs) -> Remainder:
    """Sums over the whole cache, and the same coefficients for every query head."""
    number = inputs.k.new_full((*inputs.k.shape[:2], 1), inputs.case.context, dtype=torch.float32)
    sums = torch.cat([inputs.k.sum(2, dtype=torch.float32), inputs.v.sum(2, dtype=torch.float32), number], -1)
    coefficients = torch.tensor([-1.0, 0.4, 0.2], device=inputs.q.device).repeat(inputs.q.shape[1], 1)
    return sums, inputs.end - inputs.start, coefficients


def _encode(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    def encode() -> object:
        ops.write_signature(*inputs.new_key, inputs.signatures, inputs.end - 1)
        return ops.encode_query(_grouped(inputs), inputs.weights, inputs.biases, inputs.case.levels)

    return encode


def _select(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    return lambda: ops.score_select(chosen.code, *_selection(inputs), levels=inputs.case.levels)


def _attend(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    arguments = inputs.q, inputs.k, inputs.v, chosen.indices, chosen.counts
    return lambda: ops.attend(*arguments, scale=inputs.scale)


def _cuda(op: str, prepare: Prepare) -> Method:
    """A part by the CUDA kernels, which are the automatic choice of the whole step alone."""

    def refuse(inputs: Inputs) -> str | None:
        entries = inputs.case.bits * inputs.case.mixture
        code = torch.empty(1, inputs.case.sizes.kv_heads, 1, entries, dtype=torch.int8, device="meta")
        features = {"code": code, "levels": inputs.case.levels, "capacity": inputs.capacity}
        heads = {"selection_heads": inputs.case.sizes.kv_heads, "k": inputs.k, "v": inputs.v}
        return dispatch.refusal(
            "cuda", op, inputs.q, {**features, **heads, "signatures": inputs.signatures, "named": 1}
        )

    return Method("part", prepare, refuse)


def _cuda_select(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    return lambda: ops.score_select(chosen.code, *_selection(inputs), levels=inputs.case.levels, backend="cuda")


def _cuda_attend(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    arguments = inputs.q, inputs.k, inputs.v, chosen.indices, chosen.counts
    return lambda: ops.attend(*arguments, scale=inputs.scale, backend="cuda")


def _paper(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    return paper.prepare(inputs, chosen)


def _paged(tensor_cores: bool) -> Method:
    return Method("dense", lambda inputs, chosen: paged.prepare(inputs, tensor_cores), paged.refuse)


def _sdpa_rows(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    # The queries of a group as rows of one attention: K and V are read once for all of them.
    q = inputs.q.squeeze(2).unflatten(1, (inputs.k.shape[1], -1))
    return lambda: functional.scaled_dot_product_attention(q, inputs.k, inputs.v)


def _sdpa_gqa(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    return lambda: functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, enable_gqa=True)


def _forced(prepare: Prepare, backend: str) -> Prepare:
    """The same call with one of SDPA's own backends and no other."""

    def prepare_forced(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        call = prepare(inputs, chosen)

        def forced() -> object:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return call()

        return forced

    return prepare_forced


def gather_sdpa(inputs: Inputs, chosen: Chosen) -> Tensor:
    """SDPA over the selected rows, gathered by torch; every row of `counts` must be full."""
    q = inputs.q.squeeze(2).unflatten(1, (inputs.k.shape[1], -1))
    index = chosen.indices.long().unsqueeze(-1)
    keys, values = (cache.gather(2, index.expand(-1, -1, -1, cache.shape[-1])) for cache in (inputs.k, inputs.v))
    return functional.scaled_dot_product_attention(q, keys, values).flatten(1, 2).unsqueeze(2)


def _gather_sdpa(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    return lambda: gather_sdpa(inputs, chosen)


def _reference_select(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    return lambda: reference.score_select(chosen.code, *_selection(inputs))


def _reference_attend(inputs: Inputs, chosen: Chosen) -> Callable[[], object]:
    arguments = inputs.q, inputs.k, inputs.v, chosen.indices, chosen.counts, inputs.scale
    return lambda: reference.attend(*arguments)


#: Ours whole, then its parts; the parts of `reference` show what the kernels are worth.
OURS = {
    "step": Method("ours", _step),
    "step+remainder": Method("ours", _step_filled),
    "encode": Method("part", _encode),
    "score+select": Method("part", _select),
    "attend": Method("part", _attend),
}
SLOW = {
    "score+select, reference": Method("slow", _reference_select),
    "attend, reference": Method("slow", _reference_attend),
}
#: Device type -> named baselines, and parts that it alone has.
BASELINES = {
    "cpu": {
        "dense SDPA, group as rows": Method("dense", _sdpa_rows),
        "dense SDPA, enable_gqa": Method("dense", _sdpa_gqa),
        "torch gather + SDPA": Method("sparse", _gather_sdpa),
        "paper, torch": Method("paper", _paper),
    },
    "cuda": {
        "score+select, CUDA": _cuda("score_select", _cuda_select),
        "attend, CUDA": _cuda("attend", _cuda_attend),
        "dense cuDNN, group as rows": Method("dense", _forced(_sdpa_rows, "CUDNN_ATTENTION")),
        "dense cuDNN, enable_gqa": Method("dense", _forced(_sdpa_gqa, "CUDNN_ATTENTION")),
        "dense flash, group as rows": Method("dense", _forced(_sdpa_rows, "FLASH_ATTENTION")),
        "dense flash, enable_gqa": Method("dense", _forced(_sdpa_gqa, "FLASH_ATTENTION")),
        "dense FlashInfer, paged": _paged(False),
        "dense FlashInfer, paged, tensor cores": _paged(True),
        "torch gather + SDPA": Method("sparse", _gather_sdpa),
        "paper, torch": Method("paper", _paper),
    },
}
