"""Cases: the shape of a model's attention layer, a context, a batch and a budget; and tensors that fit them."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from hashattention.config import Budget


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

#: Hidden widths of the query map, as `MapsConfig` has them by default.
WIDTHS = (256, 256)

#: Distinct random tokens of a cache on a CPU; longer ones repeat them elsewhere in memory, which no kernel can use.
PATTERN = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a benchmark: `shape` by name, `context` cached tokens, `density` of all attended tokens, `bits`."""

    shape: str
    context: int
    batch: int = 1
    density: float = 1 / 16
    bits: int = 64
    levels: int = 7
    dtype: torch.dtype = torch.bfloat16

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
        }


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of one decoding step; `indices`, `counts` and `code` are what its own encode and select give."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    signatures: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    start: Tensor
    end: Tensor
    budgets: Tensor
    capacity: int

    @property
    def scale(self) -> float:
        """What multiplies the logits."""
        return float(self.q.shape[-1] ** -0.5)


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors of `case`: a group code, one signature and one index set per KV head."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes, on_gpu = case.sizes, torch.device(device).type == "cuda"
    # As `HashSelector` keeps them: on a GPU in the dtype of the keys.
    kind = case.dtype if on_gpu else torch.float32

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def cache(tokens: int) -> Tensor:
        distinct = tokens if on_gpu else min(tokens, PATTERN)
        pattern = draw(case.batch, sizes.kv_heads, distinct, sizes.head_dim, dtype=case.dtype)
        times = -(-tokens // distinct)
        return pattern if times == 1 else pattern.repeat(1, 1, times, 1)[:, :, :tokens]

    widths = [sizes.group * sizes.head_dim, *WIDTHS, case.bits]
    pairs = list(itertools.pairwise(widths))
    words = (case.batch, sizes.kv_heads, case.context, case.bits // 32)
    signatures = torch.randint(-(2**31), 2**31, words, generator=generator, device=device, dtype=torch.int64)
    start = torch.zeros(case.batch, dtype=torch.int32, device=device)
    counts = torch.tensor(case.budget.counts(case.context), dtype=torch.int32, device=device)
    return Inputs(
        case=case,
        q=draw(case.batch, sizes.query_heads, 1, sizes.head_dim, dtype=case.dtype),
        k=cache(case.context),
        v=cache(case.context),
        signatures=signatures.to(torch.int32),
        weights=[(draw(sizes.kv_heads, i, o) * i**-0.5).to(kind) for i, o in pairs],
        biases=[(draw(sizes.kv_heads, o) * 0.1).to(kind) for _, o in pairs],
        start=start,
        end=start + case.context,
        budgets=counts.expand(case.batch, sizes.kv_heads, 3).contiguous(),
        capacity=case.budget.capacity(case.context),
    )
