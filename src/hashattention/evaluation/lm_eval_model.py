"""Hash attention (or another selector) as a model of lm-evaluation-harness."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from lm_eval.models.huggingface import HFLM

from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.integrations.transformers import attach
from hashattention.maps import HashMaps
from hashattention.models.describe import describe
from hashattention.selectors.registry import create


class HashAttentionLM(HFLM):
    """lm-eval's own Hugging Face model, with attention to selected tokens.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for ``--model hf``, like every keyword that is not named here.
    maps : str, optional
        A maps folder, shipped name or hub id.
    method : str
        Of `selectors.registry`, with its options behind a colon and joined by ``;`` (a comma ends a model argument).
    density : float or str
        Attended tokens over all; a fraction such as ``1/16`` will do.
    sink, local : int
        First and last tokens that are always attended.
    min_context : int
        Shorter contexts stay dense: most tasks of lm-eval are short.
    sparse_tail : int
        Last positions of a prompt that are sparse too; for log-likelihoods, these are all that is.
    """

    batch_size_per_gpu: int

    def __init__(
        self,
        pretrained: Any,
        maps: str | None = None,
        method: str = "hash",
        density: float | str = 1 / 16,
        sink: int = 16,
        local: int = 64,
        min_context: int = 1024,
        sparse_tail: int = 128,
        **keywords: Any,
    ) -> None:
        budget = Budget(density=_fraction(density), sink=sink, local=local)
        super().__init__(pretrained=pretrained, **keywords)
        device, base = self.model.device, describe(self.model)
        loaded = None if maps is None else HashMaps.from_pretrained(maps).to(device).requires_grad_(False)
        selector = create(method.replace(";", ","), model=base, maps=loaded, device=device)
        self.attachment = attach(self.model, selector, budget, min_context=min_context, sparse_tail=sparse_tail)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """One at a time: lm-eval pads on the right, where the sparse positions must be."""
        held, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs=1)
        finally:
            self.batch_size_per_gpu = held


def _fraction(text: float | str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"density must be a number or a fraction, as 1/16; given {text!r}.") from error
