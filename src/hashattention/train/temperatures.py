"""Temperatures: what a layer's scores are multiplied with so that their softmax is closest to its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattention.config import BaseModel
from hashattention.maps import HashMaps, LayerMaps, check_temperatures
from hashattention.models.capture import Sample
from hashattention.models.packaged import Progress
from hashattention.selectors.mass import histogram, largest_score, levels, pool_scale
from hashattention.train.labels import attention_logits, heavy_candidates
from hashattention.train.metrics import hash_scores
from hashattention.train.shards import MemoryShards, Samples
from hashattention.train.text import Texts, sequences

if TYPE_CHECKING:
    from hashattention.models.source import LoadedModel

#: Newton's steps; each changes a temperature at most fourfold.
STEPS = 40
#: Training sequences that they are fitted on, and queries of each that `calibrate` reads.
SEQUENCES, QUERIES = 4, 64


def fit(samples: Samples, base: BaseModel, maps: HashMaps, *, sink: int, local: int, device: torch.device) -> Tensor:
    """The temperatures of all layers of `base`, in one pass over captured sequences.

    They minimise the cross-entropy of ``softmax(score * scale * temperature)`` over the heavy candidates against the
    attention these have (its mean over the group where the selection is shared); `scale` is that of the query code
    (`ops.encode_query`). One number has a convex cross-entropy: Newton's method finds it.

    Returns
    -------
    Tensor, float64 ``[L, Hsel]``
    """
    heads, largest = maps.config.selection_heads(maps.model), largest_score(maps.config, maps.model)
    table = []
    for row, index in enumerate(base.layers):
        layer, parts = maps.to(device).layer(index), []
        for number in range(len(samples)):
            sample = samples.read(number, row, row + 1).to(device)
            parts.append(_statistics(layer, sample, heads, largest, sink, local))
        table.append(_minimise(*(torch.cat(each, dim=1) for each in zip(*parts, strict=True))))
    return torch.stack(table).cpu()


def _statistics(
    layer: LayerMaps, sample: Sample, heads: int, largest: int, sink: int, local: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All that the cross-entropy depends on, of each query: the candidates' scores as a histogram, int32
    ``[Hsel, N, levels]``, the code's scale and the mean score under the attention, both ``[Hsel, N]``.
    """
    scores = hash_scores(layer, sample, heads)
    scale = pool_scale(layer.scale_queries(sample.query, sample.positions[None], backend="reference")[1], heads)[0]
    attention = torch.softmax(attention_logits(sample)[0], -1)
    heavy = heavy_candidates(sample.positions, sample.key_positions(), sink, local)
    shared = heads == len(attention)
    target = (attention.mean(1) if shared else attention.flatten(0, 1)).double() * heavy
    mean = (target * scores).sum(-1) / target.sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    return histogram(scores, heavy, largest), scale.double(), mean


def _minimise(counts: Tensor, scale: Tensor, wanted: Tensor) -> Tensor:
    """The best temperature of each head, float64 ``[Hsel]``; queries without candidates have no say."""
    largest = counts.shape[-1] // 2
    score = levels(largest, torch.ones((), device=counts.device)) * scale[..., None]
    some, logs = counts.any(-1), counts.double().log()
    here = some / some.sum(-1, keepdim=True).clamp(min=1)
    temperature = torch.ones(len(counts), dtype=torch.float64, device=counts.device)
    least = torch.full_like(temperature, 1e-6)
    for _ in range(STEPS):
        weight = (logs + score * temperature[:, None, None]).softmax(-1).nan_to_num(0.0)
        mean = (weight * score).sum(-1)
        slope = ((mean - wanted * scale) * here).sum(-1)
        bend = (((weight * score * score).sum(-1) - mean * mean) * here).sum(-1)
        moved = temperature - slope / bend.clamp(min=torch.finfo(torch.float64).tiny)
        temperature = torch.maximum(moved.clamp(min=temperature / 4, max=temperature * 4), least)
    return temperature


def as_temperatures(table: Tensor) -> tuple[tuple[float, ...], ...]:
    """Temperatures ``[L, Hsel]`` as plain numbers."""
    return check_temperatures([[float(f"{one:.6g}") for one in row] for row in table.tolist()], *table.shape)


def calibrate(
    model: LoadedModel,
    maps: HashMaps,
    texts: Texts,
    *,
    context: int = 4096,
    count: int = SEQUENCES,
    sink: int = 16,
    local: int = 64,
    progress: Progress | None = None,
) -> HashMaps:
    """Give maps that have none (of an older release, say) their temperatures; `save_pretrained` keeps them.

    Parameters
    ----------
    model : LoadedModel
        The model the maps are for, from `load_model`.
    maps : HashMaps
        Changed in place, and returned.
    texts : path, `datasets` name or a list
        As for `train.run.train`: `count` sequences of `context` tokens are read.
    sink, local : int
        Tokens that are always attended, and have no part in this.
    """
    from hashattention.models.capture import capture

    text = sequences(model.tokenizer, texts, context=context, count=count, held_out=0, seed=0, progress=progress)
    positions = torch.linspace(max(context // 8, sink + local + 1), context - 1, QUERIES).int()
    samples = MemoryShards()
    for number, tokens in enumerate(text.train):
        samples.samples.append(capture(model.model, maps.model, tokens, positions))
        if progress is not None:
            progress("capturing queries and keys", number + 1, len(text.train))
    device = next(model.model.parameters()).device
    maps.temperatures = as_temperatures(fit(samples, maps.model, maps, sink=sink, local=local, device=device))
    return maps
