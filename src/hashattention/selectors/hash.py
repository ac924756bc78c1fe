"""HashAttention: query codes against the signatures of all keys (arXiv 2412.14468, and the group code)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hashattention import ops
from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps, LayerMaps
from hashattention.rows import Rows, Shares
from hashattention.selectors.base import Selection, Selector, Step
from hashattention.selectors.mass import count_needed, histogram, largest_score, levels, pool_scale
from hashattention.selectors.remainder import Remainder, running_sums


class HashSelector(Selector):
    """Select by the score of learned signatures; keys are signed once, when they first appear in the cache.

    Parameters
    ----------
    maps : HashMaps
        Trained maps; their configuration says how codes are scored and shared.
    backend : str
        Kernel backend, ``"auto"`` or a name.
    top_p : float, optional
        In place of a budget's `top_p` (a budget that covers the context is dense attention all the same).
    remainder : bool, optional
        The mean value stands for the tokens left out (`ops.add_remainder`); by default where the maps know how.

    Raises
    ------
    ConfigError
        For a `top_p` out of range, or given maps without temperatures; for a `remainder`, given maps without one.
    """

    def __init__(
        self, maps: HashMaps, backend: str = "auto", top_p: float | None = None, remainder: bool | None = None
    ) -> None:
        self.maps, self.backend, self.top_p = maps, backend, top_p
        self.remainder = maps.remainder is not None if remainder is None else remainder
        if self.remainder and maps.remainder is None:
            raise ConfigError(
                "remainder=True needs maps that were trained with one, and these have none: train them again with "
                "this release, or fit it alone (hashattention.train.remainder.calibrate), or leave it out."
            )
        if top_p is not None:
            self.check_budget(Budget(density=1.0, top_p=top_p))
        self.share = maps.config.selection_share
        self.layers = maps.model.layers
        self.reads_positions = maps.config.rope != "after"
        self._ready: dict[int, LayerMaps] = {}
        self._shares: Shares | None = None
        self._temperatures: Tensor | None = None
        self._coefficients: Tensor | None = None

    def select(self, step: Step) -> Selection:
        """Sign the new keys, encode the query, score all signatures, select."""
        signatures = self._sign(step, step.extent.tokens)
        rows, budget = self._rows(step), self._budget(step)
        if budget.estimated:
            return self._select_needed(step, signatures, rows, budget)
        code = self._layer(step).code_queries(step.query, self._last_positions(step), backend=self.backend)
        bounds = rows.start, rows.end, rows.budgets, rows.capacity
        levels = self.maps.config.levels
        chosen = ops.score_select(code, signatures, *bounds, mask=rows.mask, levels=levels, backend=self.backend)
        return Selection(*chosen, remainder=self._remainder(step))

    def _select_needed(self, step: Step, signatures: Tensor, rows: Rows, budget: Budget) -> Selection:
        """`select`, each row's heavy tokens counted by the attention that its scores promise."""
        config, model, tokens = self.maps.config, self.maps.model, step.extent.tokens
        code, scale = self._layer(step).scale_queries(step.query, self._last_positions(step), backend=self.backend)
        heads, largest = rows.budgets.shape[1], largest_score(config, model)
        scores = ops.score(code, signatures, heads, backend=self.backend)[..., :tokens]
        counts = histogram(scores, rows.candidates(tokens), largest)
        logits = levels(largest, pool_scale(scale, heads)[..., 0] * self._temperature(step))
        rows = rows.limit_heavy(count_needed(counts, logits, top_p=budget.top_p, threshold=budget.threshold))
        bounds = rows.start, rows.end, rows.budgets, rows.capacity
        chosen = ops.select(scores, *bounds, mask=rows.mask, backend=self.backend)
        return Selection(*chosen, remainder=self._remainder(step))

    def attend(self, step: Step) -> Tensor:
        """The whole step in one op, which signs the newest key on its way."""
        tokens, side = step.extent.tokens, step.side
        parts = self.maps.config.rope == "before" or self._budget(step).estimated
        if tokens < max(2, step.key.shape[2]) or parts:
            # An earlier position of a prompt: the keys behind it are there already and are signed with it. Or phi_q
            # and attention see different queries, and the op takes one. Or its budgets depend on the scores.
            return super().attend(step)
        self._sign(step, tokens - 1)
        layer = self._layer(step)
        signed = side.length((self.maps, "signatures")) == tokens
        new_key = None if signed else (self._newest_key(step), layer.key_weights, layer.key_biases)
        return side.fill((self.maps, "signatures"), tokens, lambda held: self._decode(step, held, new_key))

    def _decode(self, step: Step, signatures: Tensor, new_key: ops.NewKey | None) -> Tensor:
        layer, rows, config = self._layer(step), self._rows(step), self.maps.config
        out, _ = ops.decode(
            step.query, step.key, step.value, signatures, layer.query_weights, layer.query_biases,
            rows.start, rows.end, rows.budgets, rows.capacity, mask=rows.mask, new_key=new_key,
            levels=config.levels if config.score == "asymmetric" else 0, scale=step.scale, softcap=step.softcap,
            remainder=self._remainder(step), backend=self.backend,
        )  # fmt: skip
        return out

    def _remainder(self, step: Step) -> Remainder | None:
        """What stands for the tokens left out; None without one, or in too short a cache."""
        if not self.remainder:
            return None
        sums = running_sums(step.key, step.value, step.rows("group"), step.extent, step.side)
        if sums is None:
            return None
        if self._coefficients is None or self._coefficients.device != step.key.device:
            self._coefficients = torch.tensor(self.maps.remainder, dtype=torch.float32, device=step.key.device)
        layer = self._coefficients[self.maps.model.layers.index(step.layer)]
        return Remainder(sums, step.extent.lengths(), layer)

    def _rows(self, step: Step) -> Rows:
        """Bounds and budgets; each layer's own where the maps say how to share a mean budget."""
        if self.maps.shares is None:
            return step.rows(self.share)
        if self._shares is None or self._shares.table.device != step.key.device:
            self._shares = Shares.of(self.maps.shares, step.key.device)
        rows = step.extent.rows_of_layer(step.budget, self._shares, self.maps.model.layers.index(step.layer))
        return step.limit(rows)

    def _budget(self, step: Step) -> Budget:
        return step.budget if self.top_p is None else dataclasses.replace(step.budget, top_p=self.top_p)

    def _temperature(self, step: Step) -> Tensor:
        """The layer's temperatures, float64 ``[Hsel]``."""
        if self._temperatures is None or self._temperatures.device != step.key.device:
            self.check_budget(self._budget(step))
            self._temperatures = torch.tensor(self.maps.temperatures, dtype=torch.float64, device=step.key.device)
        return self._temperatures[self.maps.model.layers.index(step.layer)]

    def check_budget(self, budget: Budget) -> None:
        """Raise `ConfigError` for a `top_p` or `threshold` that the maps have no temperatures for."""
        if budget.estimated and self.maps.temperatures is None:
            raise ConfigError(
                f"top_p={budget.top_p}, threshold={budget.threshold} need temperatures, and these maps have none: "
                "train them again with this release, or fit these alone (hashattention.train.temperatures.calibrate), "
                "or leave top_p and threshold out."
            )

    def _sign(self, step: Step, tokens: int) -> Tensor:
        """The signatures of the first `tokens` tokens, the new ones' made now."""
        layer = self._layer(step)
        return step.side.extend(
            (self.maps, "signatures"),
            tokens,
            lambda first: layer.sign_keys(
                step.key[:, :, first:tokens],
                step.extent.positions(first, tokens) if self.reads_positions else None,
                backend=self.backend,
            ),
        )

    def _newest_key(self, step: Step) -> Tensor:
        return self._layer(step).key_inputs(_newest_key(step), self._last_positions(step))

    def _last_positions(self, step: Step) -> Tensor | None:
        return step.extent.last_positions() if self.reads_positions else None

    def _layer(self, step: Step) -> LayerMaps:
        """The layer's map as it is used: on a GPU with weights in the keys' dtype, so that products run on 16 bits; on
        a CPU in bfloat16 where that changes nothing, as it does not for maps that were saved: half as much to read.
        """
        if step.layer not in self._ready:
            maps, kind = self.maps.layer(step.layer).to(step.key.device, torch.float32), step.key.dtype
            if step.key.is_cuda and kind in (torch.bfloat16, torch.float16):
                short = maps.to(step.key.device, kind)
                maps = dataclasses.replace(maps, query_weights=short.query_weights, key_weights=short.key_weights)
            elif step.key.device.type == "cpu":
                maps = _shorten(maps)
            self._ready[step.layer] = maps
        return self._ready[step.layer]

    def auxiliary_bits(self, head_dim: int) -> float:
        """Bits of the signatures of one token and KV head."""
        config, model = self.maps.config, self.maps.model
        return config.bits * config.signature_heads(model) / model.num_key_value_heads


def _shorten(maps: LayerMaps) -> LayerMaps:
    """The same map with its weights in bfloat16, if each of them is one."""
    query, key = ([weight.bfloat16() for weight in side] for side in (maps.query_weights, maps.key_weights))
    pairs = zip([*query, *key], [*maps.query_weights, *maps.key_weights], strict=True)
    same = all(torch.equal(short.float(), weight) for short, weight in pairs)
    return dataclasses.replace(maps, query_weights=query, key_weights=key) if same else maps


def _newest_key(step: Step) -> Tensor:
    """The key of every request's last valid token, ``[B, Hkv, 1, D]``: in the cache's last slot, unless that is
    padding.
    """
    if step.extent.ends_full:
        return step.key[:, :, -1:]
    last = (step.extent.end - 1).clamp(min=0).long()
    return step.key.gather(2, last[:, None, None, None].expand(-1, step.key.shape[1], 1, step.key.shape[3]))
