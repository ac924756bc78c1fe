"""Dense and hash attention from one prefill, taking turns: tokens a second of both, and what each says."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache

    from hashattention.attention import Observer
    from hashattention.config import Budget
    from hashattention.maps import HashMaps

#: Tokens one way decodes before the other's turn: a machine that is busy for a while slows both alike.
TURN = 8


@dataclasses.dataclass
class Continuation:
    """One way of attending: its own cache behind the shared prompt, the tokens so far and the seconds of each."""

    cache: DynamicCache
    tokens: torch.Tensor
    seconds: list[float] = dataclasses.field(default_factory=list)

    def decode(self, model: Any, count: int) -> None:
        """Add `count` tokens, the likeliest each time."""
        for _ in range(count):
            before = time.perf_counter()
            logits = model(self.tokens[:, -1:], past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            self.tokens = torch.cat([self.tokens, logits[:, -1:].argmax(-1)], dim=1)
            self.seconds.append(time.perf_counter() - before)


def compare(
    loaded: Any,
    maps: HashMaps,
    budget: Budget,
    min_context: int,
    ids: torch.Tensor,
    new_tokens: int,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Continue `ids` int64 ``[1, T]`` by `new_tokens` tokens both ways; the first of them is the prefill's.

    Returns
    -------
    dict
        `prefill_seconds`; for ``"dense"`` and ``"hash"`` each `text` and `tokens_per_second` (the median step; a first
        step, in which hash attention signs the prompt's keys, is not counted); and `sign_seconds`, that first step.
    """
    from hashattention import attach

    model, ends = loaded.model, _end_tokens(loaded)
    with torch.inference_mode():
        cache, first, seconds = prefill(model, ids)
        ways = {name: Continuation(share(cache), first) for name in ("dense", "hash")}
        while (done := len(ways["hash"].seconds)) < new_tokens - 1:
            # The first step alone: it is not counted, and it settles what later ones find in place.
            count = min(TURN, new_tokens - 1 - done) if done else 1
            ways["dense"].decode(model, count)
            with attach(model, maps, budget, min_context=min_context, observer=observer):
                ways["hash"].decode(model, count)
    found: dict[str, Any] = {"prefill_seconds": seconds, "sign_seconds": sum(ways["hash"].seconds[:1])}
    for name, way in ways.items():
        said = way.tokens[0].tolist()
        last = next((i for i, token in enumerate(said) if token in ends), len(said))
        rate = 1 / statistics.median(way.seconds[1:]) if new_tokens > 2 else None
        found[name] = {
            "text": loaded.tokenizer.decode(said[:last], skip_special_tokens=True),
            "tokens_per_second": rate,
        }
    return found


def prefill(model: Any, ids: torch.Tensor) -> tuple[DynamicCache, torch.Tensor, float]:
    """The cache of `ids`, the token after them ``[1, 1]`` and the seconds it took, by the model's own attention."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    before = time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[:, -1:].argmax(-1), time.perf_counter() - before


def share(cache: DynamicCache) -> DynamicCache:
    """A cache of its own over the same keys and values: what one appends, the other does not see."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _end_tokens(loaded: Any) -> set[int]:
    with contextlib.suppress(AttributeError):
        ends = loaded.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends]) - {None}
    return set()
