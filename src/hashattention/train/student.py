"""Student: the maps of some layers while they are trained, with soft codes first and hard ones later."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn import functional

from hashattention.artifact import round_weight
from hashattention.config import BaseModel, MapsConfig
from hashattention.maps import check_rotation
from hashattention.models.capture import Sample
from hashattention.rotation import unrotate
from hashattention.train.recipe import Recipe
from hashattention.train.shards import Samples, hash_seed


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of one input of the maps, float32 ``[L, H, in]``."""

    mean: Tensor
    std: Tensor

    def normalise(self, x: Tensor) -> Tensor:
        """``[L, H, T, in]`` with mean 0 and deviation 1 per channel, float32."""
        scale = self.std[:, :, None].reciprocal()
        return torch.addcmul(-self.mean[:, :, None] * scale, x, scale)

    def fold(self, name: str, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first stage for inputs as they are: weight / std, rounded as it is stored, and bias - mean @ weight."""
        folded = round_weight(name, weight / self.std[..., None], dtype)
        # With the rounded weight, so that a channel far from zero does not carry its rounding error into the logits.
        return folded, bias - (self.mean[:, :, None] @ folded).squeeze(2)


def query_input(query: Tensor, heads: int) -> Tensor:
    """``[L, Hq, N, D]`` as `heads` maps take it: ``[L, Hc, N, Hq / Hc * D]``, as `ops.group_queries` does."""
    grouped = query.unflatten(1, (heads, -1)).transpose(2, 3)
    return grouped.flatten(3)


def key_input(key: Tensor, heads: int) -> Tensor:
    """``[L, Hkv, T, D]`` as `heads` maps take it: repeated to ``[L, Hs, T, D]``."""
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


def inputs(sample: Sample, config: MapsConfig, base: BaseModel, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """What phi_q and phi_k take of a sample, before RoPE where `config` says so; `frequencies` are those of `base`."""
    query, key = sample.query, sample.key
    if config.rope != "after":
        key = unrotate(key.float(), sample.key_positions(), frequencies)
    if config.rope == "before":
        query = unrotate(query.float(), sample.positions, frequencies)
    return query_input(query, config.code_heads(base)), key_input(key, config.signature_heads(base))


def measure_moments(
    samples: Samples, first: int, last: int, config: MapsConfig, base: BaseModel, device: torch.device
) -> list[Moments]:
    """Moments of the inputs of phi_q and phi_k over all of `samples`, layers ``first <= l < last``."""
    check_rotation(config, base)
    frequencies = torch.tensor(base.frequencies, device=device)
    sums: list[list[Tensor]] = [[], []]
    for index in range(len(samples)):
        sample = samples.read(index, first, last).to(device)
        for total, x in zip(sums, inputs(sample, config, base, frequencies), strict=True):
            wide = x.double()
            part = torch.stack([torch.full_like(wide[:, :, 0], wide.shape[2]), wide.sum(2), wide.square().sum(2)])
            total[:] = [part if not total else total[0] + part]
    return [_moments(*total[0].unbind(0)) for total in sums]


def _moments(count: Tensor, total: Tensor, squares: Tensor) -> Moments:
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return Moments(mean.float(), variance.sqrt().clamp(min=1e-4).float())


def mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """`ops.reference.mlp` for all layers at once, in the dtype of `x` ``[L, H, T, in]``: logits ``[L, H, T, out]``."""
    hidden = x.flatten(0, 1)
    for stage, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if stage:
            hidden = functional.silu(hidden)
        hidden = torch.baddbmm(bias.flatten(0, 1)[:, None].to(x.dtype), hidden, weight.flatten(0, 1).to(x.dtype))
    return hidden.unflatten(0, x.shape[:2])


class Student:
    """phi_q and phi_k of layers ``first <= l < last`` (rows of `BaseModel.layers`) as leaf tensors on `device`."""

    def __init__(self, recipe: Recipe, base: BaseModel, first: int, last: int, moments: list[Moments]) -> None:
        self.recipe, self.config, self.base = recipe, recipe.maps, base
        self.first, self.last, self.moments = first, last, moments
        self.frequencies = torch.tensor(base.frequencies, device=moments[0].mean.device)
        self.selection_heads = self.config.selection_heads(base)
        group = base.group_size if self.config.query_input == "group" else 1
        config = self.config
        shapes = {
            "query": (config.code_heads(base), (group * base.head_dim, *config.hidden_of_queries, config.code_bits)),
            "key": (config.signature_heads(base), (base.head_dim, *config.widths, config.bits)),
        }
        self.stage_counts = {name: len(sizes) - 1 for name, (_, sizes) in shapes.items()}
        self.tensors: dict[str, Tensor] = {}
        for name, (heads, sizes) in shapes.items():
            for stage, (inside, outside) in enumerate(itertools.pairwise(sizes)):
                self._draw(f"{name}.weights.{stage}", (heads, inside, outside), inside**-0.5 * (1.6 if stage else 1.0))
                self._draw(f"{name}.biases.{stage}", (heads, outside), 0.0)
        self._draw("sharpness", (self.selection_heads,), 0.0)
        self.tensors["sharpness"] += recipe.sharpness
        self.tensors = {
            name: tensor.to(moments[0].mean.device).requires_grad_() for name, tensor in self.tensors.items()
        }
        fast = recipe.precision == "bfloat16" and moments[0].mean.is_cuda
        self.dtype = torch.bfloat16 if fast else torch.float32

    def _draw(self, name: str, shape: tuple[int, ...], deviation: float) -> None:
        """First values; every layer has a seed of its own, so that they do not depend on how layers are grouped."""
        rows = []
        for layer in self.base.layers[self.first : self.last]:
            generator = torch.Generator().manual_seed(hash_seed(self.recipe.seed, name, layer))
            rows.append(torch.randn(shape, generator=generator) * deviation)
        self.tensors[name] = torch.stack(rows)

    def stages(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of phi_q ("query") or phi_k ("key"), a stage an entry."""
        stages = range(self.stage_counts[name])
        weights, biases = (
            [self.tensors[f"{name}.{kind}.{stage}"] for stage in stages] for kind in ("weights", "biases")
        )
        return weights, biases

    def scores(self, sample: Sample, hard: bool, slope: float = 1.0) -> Tensor:
        """Scores float32 ``[L, Hsel, n, T]`` of a sample's queries against its keys; `hard` ones are as served."""
        return self.compare(*self.codes(sample, hard, slope), served=hard)

    def compare(self, query: Tensor, key: Tensor, served: bool = False) -> Tensor:
        """Scores of query codes ``[L, Hc, n, code_bits]`` against key codes ``[L, Hs, T, bits]``, times the sharpness.

        Of a mixture the largest counts where it is `served`. While it is taught, the logarithm of the sum of the codes'
        weights does: it ranks all but alike, and its gradient reaches every code.
        """
        layers, signature_heads, tokens, _ = key.shape
        if self.recipe.loss != "bce":
            # On the query, which is small, rather than on the scores; one factor for all codes that are summed.
            factor = self.tensors["sharpness"].exp()
            query = query * factor.repeat_interleave(query.shape[1] // factor.shape[1], dim=1)[:, :, None, None]
        mixture = self.config.mixture
        if mixture > 1:
            query = query.unflatten(-1, (mixture, -1)).transpose(2, 3).flatten(1, 2)
        weights = query.unflatten(1, (signature_heads, -1))
        size, count = weights.shape[2:4]
        scores = weights.flatten(2, 3) @ key.transpose(-1, -2)
        scores = scores.view(layers, signature_heads * size, count, tokens)
        if mixture > 1:
            scores = scores.unflatten(1, (-1, mixture))
            scores = scores.amax(2) if served else scores.logsumexp(2)
        if scores.shape[1] != self.selection_heads:
            scores = scores.unflatten(1, (self.selection_heads, -1)).sum(2)
        return scores

    def codes(self, sample: Sample, hard: bool, slope: float = 1.0) -> tuple[Tensor, Tensor]:
        """Query codes ``[L, Hc, n, code_bits]``, key codes ``[L, Hs, T, bits]``; hard: what the kernels compute.

        `slope` multiplies the logits of bits before their tanh.
        """
        query, key = (
            mlp(moments.normalise(x).to(self.dtype), *self.stages(name)).float()
            for name, moments, x in zip(
                ("query", "key"), self.moments, inputs(sample, self.config, self.base, self.frequencies), strict=True
            )
        )
        key = soft_sign(key, hard, slope)
        if self.config.score == "symmetric":
            return soft_sign(query, hard, slope), key
        # Not squashed: an integer code is scaled by its row's largest weight, which leaves the ranking as it was.
        if query.shape[1] != self.selection_heads:
            # Summed with others, as integers: only codes on one scale give the sum that is served.
            query = query / query.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return soft_round(query, self.config.levels) if hard else query, key

    def folded(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of `HashMaps` (its names) for these layers, normalisation folded in, weights rounded to what
        `HashMaps.save_pretrained` keeps of them with `dtype`; of `tensors` (a running mean, say) in place of the
        student's own, if given.
        """
        named = self.tensors if tensors is None else tensors
        folded = {name: tensor.detach() for name, tensor in named.items() if name != "sharpness"}
        for name, moments in zip(("query", "key"), self.moments, strict=True):
            first = f"{name}.weights.0", f"{name}.biases.0"
            folded[first[0]], folded[first[1]] = moments.fold(first[0], folded[first[0]], folded[first[1]], dtype)
        return {n: (round_weight(n, t, dtype) if ".weights." in n else t).cpu() for n, t in folded.items()}


def soft_sign(logits: Tensor, hard: bool, slope: float = 1.0) -> Tensor:
    """``tanh(slope * logits)``, or +-1 (bit = logit > 0) with the gradient of that."""
    soft = torch.tanh(logits if slope == 1 else logits * slope)
    if not hard:
        return soft
    return soft + (torch.where(logits > 0, 1.0, -1.0) - soft).detach()


def soft_round(logits: Tensor, levels: int) -> Tensor:
    """Logits rounded to the integer code times its scale (`ops.encode_query`), with the gradient of the identity."""
    scale = logits.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / levels
    return logits + (torch.round(logits / scale) * scale - logits).detach()
