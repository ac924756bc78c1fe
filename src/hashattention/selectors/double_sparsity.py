"""Double Sparsity: logits estimated from a few calibrated channels (Yang et al., arXiv 2408.07092)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hashattention.config import BaseModel, SelectionShare
from hashattention.errors import ConfigError
from hashattention.selectors.base import Step, query_logits
from hashattention.selectors.rounding import check_bits, round_to_bits, vector_bits
from hashattention.selectors.scored import Pooling, ScoredSelector, require_count


class DoubleSparsitySelector(ScoredSelector):
    """Select by the sum of ``q_d * k_d`` over chosen channels; the keys' ("labels") are rounded token by token.

    Labels and channels are kept per KV head (the paper's models are MHA); queries are not rounded.

    Parameters
    ----------
    channels : int
        Channels a label.
    bits : int
        Bits a channel: 1 to 8, or 16.
    calibration : mapping of int to Tensor, optional
        A layer's channels in order of importance, int64 ``[Hkv, >= channels]`` (`channels.rank_channels`). Without:
        those with the largest mean ``|k_d|`` in each context when first seen (the authors' calibration by keys).
    share, pooling
        As in `ScoredSelector`.
    """

    def __init__(
        self,
        channels: int = 16,
        bits: int = 4,
        calibration: Mapping[int, Tensor] | None = None,
        share: SelectionShare = "group",
        pooling: Pooling = "peak_max",
    ) -> None:
        super().__init__(share, pooling)
        require_count("channels", channels)
        check_bits(bits)
        self.channels, self.bits, self.calibration = channels, bits, calibration

    def refuse(self, model: BaseModel) -> str | None:
        """More channels than a head has."""
        if self.channels <= model.head_dim:
            return None
        return f"channels is {self.channels}, but its heads have {model.head_dim} channels; ask for fewer"

    def estimate(self, step: Step) -> Tensor:
        """The logits over the chosen channels alone."""
        chosen = step.side.extend((self, "channels"), 1, lambda _: self._choose(step))

        def label(first: int) -> Tensor:
            keys = step.keys(first)
            return round_to_bits(keys.gather(-1, chosen.expand(-1, -1, keys.shape[2], -1)), self.bits)

        labels = step.side.extend((self, "labels"), step.extent.tokens, label)
        query = step.query.unflatten(1, (step.key.shape[1], -1))[:, :, :, 0]
        query = query.gather(-1, chosen.expand(-1, -1, query.shape[2], -1)).flatten(1, 2)
        return query_logits(query[:, :, None], labels, step.scale)

    def _choose(self, step: Step) -> Tensor:
        if self.calibration is None:
            valid = step.rows(self.share).valid(step.extent.tokens)
            size = step.keys().float().abs().masked_fill(~valid[:, None, :, None], 0).sum(2)
            order = size.argsort(dim=-1, descending=True, stable=True)
        elif step.layer in self.calibration:
            order = self.calibration[step.layer].to(step.key.device).expand(step.key.shape[0], -1, -1)
        else:
            known = sorted(self.calibration)
            raise ConfigError(f"layer {step.layer} has no calibrated channels (layers {known} have): keep it dense.")
        return order[:, :, None, : self.channels]

    def auxiliary_bits(self, head_dim: int) -> float:
        """One label a token."""
        return float(vector_bits(self.channels, self.bits))
