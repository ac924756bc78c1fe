"""Cases: the shape of a model's attention layer, a context, a batch and a budget; and tensors that fit them."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from hashattention import ops
from hashattention.config import Budget
from hashattention.ops.buffer import allocate


@dataclasses.dataclass(frozen=True)
class Shape:
    """Attention of one layer: query heads, KV heads and head dimension."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "mistral-7b": Shape(32, 8, 128),
    "qwen2.5-1.5b": Shape(12, 2, 128),
    "llama-2-7b": Shape(32, 32, 128),
}

#: Hidden widths of both maps, as `MapsConfig` has them by default.
WIDTHS = (256,)

#: Distinct random tokens of a cache on a CPU; longer ones repeat them elsewhere in memory, which no kernel can use.
PATTERN = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a benchmark: `shape` by name, `context` cached tokens, `density` of all attended tokens, `bits` of a
    signature, `mixture` of so many codes a query.
    """

    shape: str
    context: int
    batch: int = 1
    density: float = 1 / 16
    bits: int = 64
    levels: int = 7
    dtype: torch.dtype = torch.bfloat16
    mixture: int = 1

    @property
    def sizes(self) -> Shape:
        """Heads and dimension of the named shape."""
        return SHAPES[self.shape]

    @property
    def budget(self) -> Budget:
        """The budget of this density, with the default sink and local."""
        return Budget(density=self.density)

    def fields(self) -> dict[str, object]:
        """Plain JSON values that tell this case from others."""
        sink, local, heavy = self.budget.counts(self.context)
        return dataclasses.asdict(self) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            **dataclasses.asdict(self.sizes),
            "sink": sink,
            "local": local,
            "heavy": heavy,
            "hidden": list(WIDTHS),
        }


def _cases(
    *points: tuple[int, int],
    shape: str = "llama-3.1-8b",
    density: float = 1 / 32,
    bits: int = 64,
    mixture: int = 1,
) -> list[Case]:
    return [Case(shape, context, batch, density, bits, mixture=mixture) for batch, context in points]


#: K tokens of context.
K = 1024
#: Batch 1 and 128K tokens, where latency counts; batch 32, where bandwidth does.
ONE, MANY = (1, 128 * K), (32, 128 * K)
#: Named lists of cases: what the design's targets name, one axis each, and codes as the maps that ship have them.
SUITES: dict[str, list[Case]] = {
    "targets": [
        *_cases((1, 4 * K), (1, 8 * K), (1, 32 * K), ONE, (8, 32 * K), MANY),
        *_cases(ONE, MANY, bits=32),
    ],
    "contexts": [
        *_cases(*((1, length * K) for length in (4, 8, 16, 32, 64, 128, 256, 512, 1024))),
        *_cases(*((8, length * K) for length in (4, 8, 16, 32, 64, 128, 256))),
        *_cases(*((32, length * K) for length in (4, 8, 16, 32, 64, 128))),
    ],
    "batches": _cases(*((batch, 32 * K) for batch in (1, 2, 4, 8, 16, 32, 64))),
    "densities": [case for share in (8, 16, 32, 64) for case in _cases(ONE, (8, 32 * K), density=1 / share)],
    "bits": [case for bits in (32, 64, 128) for case in _cases(ONE, (8, 32 * K), MANY, bits=bits)],
    "shapes": [case for shape in SHAPES for case in _cases(ONE, (8, 32 * K), shape=shape)],
    "shipped": [
        *_cases((1, 4 * K), (1, 32 * K), ONE, (8, 32 * K), MANY, mixture=2),
        *_cases((1, 4 * K), (1, 32 * K), ONE, (8, 32 * K), shape="qwen2.5-1.5b", mixture=2),
    ],
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of one decoding step: the newest key is in K, and its signature beside the others."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    signatures: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    key_weights: list[Tensor]
    key_biases: list[Tensor]
    start: Tensor
    end: Tensor
    budgets: Tensor
    capacity: int

    @property
    def scale(self) -> float:
        """What multiplies the logits."""
        return float(self.q.shape[-1] ** -0.5)

    @property
    def new_key(self) -> ops.NewKey:
        """The newest key and its map."""
        return self.k[:, :, -1:], self.key_weights, self.key_biases


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors of `case`: a group code, one signature and one index set per KV head."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes, on_gpu = case.sizes, torch.device(device).type == "cuda"
    # As `HashSelector` keeps them: weights on a GPU in the dtype of the keys, on a CPU in that of saved maps.
    kind = case.dtype if on_gpu else torch.bfloat16

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def cache(tokens: int) -> Tensor:
        distinct = tokens if on_gpu else min(tokens, PATTERN)
        pattern = draw(case.batch, sizes.kv_heads, distinct, sizes.head_dim, dtype=case.dtype)
        times = -(-tokens // distinct)
        if times == 1:
            return pattern
        # As an attached model's cache is made.
        long = allocate(pattern, (*pattern.shape[:2], times, *pattern.shape[2:]))
        return long.copy_(pattern.unsqueeze(2).expand_as(long)).flatten(2, 3)[:, :, :tokens]

    def draw_map(width: int, columns: int) -> tuple[list[Tensor], list[Tensor]]:
        pairs = list(itertools.pairwise([width, *WIDTHS, columns]))
        weights = [(draw(sizes.kv_heads, i, o) * i**-0.5).to(kind) for i, o in pairs]
        return weights, [draw(sizes.kv_heads, o) * 0.1 for _, o in pairs]

    words = (case.batch, sizes.kv_heads, case.context, case.bits // 32)
    start = torch.zeros(case.batch, dtype=torch.int32, device=device)
    counts = torch.tensor(case.budget.counts(case.context), dtype=torch.int32, device=device)
    weights, biases = draw_map(sizes.group * sizes.head_dim, case.bits * case.mixture)
    key_weights, key_biases = draw_map(sizes.head_dim, case.bits)
    inputs = Inputs(
        case=case,
        q=draw(case.batch, sizes.query_heads, 1, sizes.head_dim, dtype=case.dtype),
        k=cache(case.context),
        v=cache(case.context),
        signatures=allocate(start, words).random_(-(2**31), 2**31 - 1, generator=generator),
        weights=weights,
        biases=biases,
        key_weights=key_weights,
        key_biases=key_biases,
        start=start,
        end=start + case.context,
        budgets=counts.expand(case.batch, sizes.kv_heads, 3).contiguous(),
        capacity=case.budget.capacity(case.context),
    )
    ops.write_signature(*inputs.new_key, inputs.signatures, inputs.end - 1)
    return inputs
