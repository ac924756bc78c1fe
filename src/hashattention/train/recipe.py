"""Recipe: every choice that training depends on, in one frozen record that is stored with the maps."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from hashattention.config import MapsConfig, from_mapping
from hashattention.errors import ConfigError

Loss = Literal["distill", "topk", "mix", "rank", "bce"]
Pool = Literal["mean", "peak_sum", "peak_max", "rank"]
Weigh = Literal["none", "value", "output"]
Weights = Literal["float32", "bfloat16", "int8"]

_CHOICES = {
    "loss": ("distill", "topk", "mix", "rank", "bce"),
    "pool": ("mean", "peak_sum", "peak_max", "rank"),
    "weigh": ("none", "value", "output"),
    "optimiser": ("adam", "muon"),
    "sampling": ("stratified", "chunk_tail"),
    "schedule": ("cosine", "constant"),
    "precision": ("float32", "bfloat16"),
    "weights": ("float32", "bfloat16", "int8"),
}
_WHOLE = (
    *("context", "sequences", "queries", "steps", "step_sequences", "step_queries", "top", "negatives"),
    *("checkpoint_every", "check_every"),
)
_COUNTS = (
    *("held_out", "held_out_queries", "sink", "local", "warmup", "seed", "step_tokens", "keep_tokens", "patience"),
    "prediction_steps",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How maps are trained. The default distils the group code; `Recipe.paper()` is HashAttention as published.

    Parameters
    ----------
    maps : MapsConfig
        Shape, score and sharing of the maps.
    context : int
        Tokens of every sequence: train at the length that is served.
    lengths : tuple of int
        Training sequences take these lengths in turn (each at most `context`) in place of `context`.
    sequences, held_out : int
        Training sequences, and sequences kept for the metrics (never trained on).
    queries, held_out_queries : int
        Query positions recorded per sequence.
    facts : float
        Share of the training sequences that give facts among rivals of the same form and ask for them at the end
        (`facts.plant`), where half of their queries are recorded; the facts are always among the `keep_tokens`.
    sampling : {"stratified", "chunk_tail"}
        Where queries are taken: one from each of `queries` equal stretches after ``first_position * context``, or the
        last quarter of every 1024 tokens (the paper's).
    loss : {"distill", "topk", "mix", "rank", "bce"}
        Cross-entropy to the pooled attention of the heavy candidates; to a uniform target on the top; distillation
        plus `keep_share` times the target mass lost at `budgets`; pairs of top tokens and `negatives` others, half of
        them those the student scores highest; or the paper's weighted binary cross-entropy.
    pool : {"mean", "peak_sum", "peak_max", "rank"}
        How the attention of a GQA group becomes one target (see `labels.pool_logits`).
    weigh : {"none", "value", "output"}
        Attention weights alone, times |v|, or times ``|v - o| / |o|``: the output error of leaving the token out.
    top, top_mix, temper : int, float, float
        Labels are the `top` heaviest candidates; distillation gives a uniform target over them the weight `top_mix`,
        and raises the attention to the power `temper` first.
    balance, decorrelation : float
        Weight of the terms that keep each key bit set for half of the keys, and bits unlike each other.
    straight_through : float
        Share of the steps after which codes are hard (signs and integers) in the forward pass; 1 is never.
    anneal : float
        Slope of the key's tanh at the end of the soft steps; it grows from 1, geometrically.
    steps, step_sequences, step_queries : int
        Optimiser steps, and what one step sees.
    step_tokens : int
        Tokens of a sequence that one step sees, whatever its length: one from each of as many equal stretches
        (`targets.draw_tokens`). 0: all.
    keep_tokens : int
        Tokens of a training sequence that are kept after it was read, one from each of as many equal stretches, with
        the targets of all queries among them: more sequences and queries then fit in memory. 0: all. Steps draw
        `step_tokens` of those.
    patience, check_every : int
        The loss of hard codes on held-out sequences is measured every `check_every` steps; training ends once it has
        not fallen `patience` times in a row, with the weights that had the least. 0: it runs to the last step.
    optimiser, learning_rate, weight_decay, warmup, schedule
        "adam" (AdamW with a `weight_decay`) or "muon" (orthogonalised momentum for the weight matrices, Adam for the
        rest); `warmup` steps, then a cosine to a hundredth, or constant.
    query_rate : float
        Learning rate of phi_q over that of phi_k.
    average : float
        Decay of the running mean of the weights that is kept instead of the last ones; 0 is off.
    sharpness : float
        Log of the scores' first factor, learned per layer and head.
    alpha, beta : float
        Weight of a label in the BCE: ``alpha + beta * context``.
    sink, local : int
        Tokens that are always attended and so are no candidates.
    precision : {"float32", "bfloat16"}
        Of the maps' matrix products on a GPU (weights, logits and losses stay float32).
    weights : {"bfloat16", "int8", "float32"}
        How the maps' weights are stored (`artifact.pack`); the metrics are of what is stored.
    checkpoint_every : int
        Steps between checkpoints.
    budgets : tuple of float
        Heavy budgets (fractions of the causal tokens) at which the metrics are taken.
    fit_budgets : float
        Mean heavy budget (a fraction) that is shared among layers and index sets by what it gains there, found on the
        first half of the held-out sequences; the metrics are then taken on the second half. 0: all have the same.
    prediction_steps : int
        Steps in which the remainder's coefficients, fitted to the layers' outputs, are moved towards what the model
        predicts with dense attention (`predictions.tune`). 0: they stay.
    seed : int
        Fixes the split, the positions, the initial weights and every step's draw.
    """

    maps: MapsConfig = dataclasses.field(default_factory=MapsConfig)
    context: int = 8192
    lengths: tuple[int, ...] = ()
    sequences: int = 48
    held_out: int = 4
    queries: int = 512
    held_out_queries: int = 64
    facts: float = 0.0
    sampling: Literal["stratified", "chunk_tail"] = "stratified"
    first_position: float = 0.125
    loss: Loss = "distill"
    pool: Pool = "mean"
    weigh: Weigh = "none"
    top: int = 64
    top_mix: float = 0.5
    temper: float = 1.0
    keep_share: float = 1.0
    negatives: int = 64
    balance: float = 0.0
    decorrelation: float = 0.0
    straight_through: float = 0.25
    anneal: float = 1.0
    steps: int = 1500
    step_sequences: int = 1
    step_queries: int = 256
    step_tokens: int = 0
    keep_tokens: int = 0
    patience: int = 0
    check_every: int = 200
    optimiser: Literal["adam", "muon"] = "adam"
    learning_rate: float = 5e-3
    query_rate: float = 1.0
    weight_decay: float = 0.0
    warmup: int = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    average: float = 0.0
    sharpness: float = -1.0
    alpha: float = 20.0
    beta: float = 0.0
    sink: int = 16
    local: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    weights: Weights = "bfloat16"
    checkpoint_every: int = 200
    budgets: tuple[float, ...] = (1 / 8, 1 / 16, 1 / 32)
    fit_budgets: float = 0.0
    prediction_steps: int = 192
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            _require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(self, name))
        for name in (*_WHOLE, *_COUNTS):
            value, least = getattr(self, name), int(name in _WHOLE)
            _require(isinstance(value, int) and value >= least, name, f"a whole number >= {least}", value)
        for name in ("facts", "first_position", "top_mix", "straight_through"):
            _require(0 <= getattr(self, name) <= 1, name, "in 0..1", getattr(self, name))
        _require(0 <= self.average < 1, "average", "at least 0 and below 1", self.average)
        for name in ("learning_rate", "query_rate", "temper", "anneal"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("keep_share", "balance", "decorrelation", "weight_decay"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(all(0 < budget <= 1 for budget in self.budgets), "budgets", "fractions in (0, 1]", self.budgets)
        _require(0 <= self.fit_budgets <= 1, "fit_budgets", "a fraction in 0..1", self.fit_budgets)
        enough = self.held_out > 1 or not self.fit_budgets
        _require(enough, "held_out", "at least 2 with fit_budgets, which takes one half", self.held_out)
        least = self.sink + self.local + 2
        _require(self.context >= least, "context", f"at least sink + local + 2 = {least} tokens", self.context)
        for length in self.lengths:
            fits = isinstance(length, int) and least <= length <= self.context
            _require(fits, "lengths", f"whole numbers from {least} to context = {self.context}", self.lengths)
        most = min(len(self.positions_from(length)) for length in (self.context, *self.lengths))
        _require(self.queries <= most, "queries", f"at most {most}, the positions there are", self.queries)
        judged = not self.patience or self.held_out > 0
        _require(judged, "held_out", "at least 1 with patience, which watches held-out sequences", self.held_out)
        _require(
            self.step_queries <= self.queries, "step_queries", f"at most queries = {self.queries}", self.step_queries
        )

    @property
    def stored(self) -> torch.dtype:
        """The dtype that `weights` names."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[self.weights]

    @classmethod
    def group(cls) -> Recipe:
        """The default: group code, distillation; a step sees a quarter of a context of 8192 tokens, and there are twice
        as many steps as `Recipe` has: better maps in the same time.
        """
        return cls(step_tokens=2048, steps=3000)

    @classmethod
    def paper(cls) -> Recipe:
        """HashAttention as published (arXiv 2412.14468): 32 bits per query head, weighted BCE, Adam 1e-3."""
        return cls(
            maps=MapsConfig.paper(),
            context=32768,
            sequences=48,
            queries=8192,
            sampling="chunk_tail",
            loss="bce",
            straight_through=1.0,
            steps=1536,
            learning_rate=1e-3,
            warmup=0,
            schedule="constant",
            sink=128,
            local=128,
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """Build from plain values; keys not given keep their default, `maps` is a table of `MapsConfig` keys.

        Raises
        ------
        ConfigError
            For an unknown key (the nearest known one is named) or a value that is not allowed.
        """
        plain = dict(values)
        if "maps" in plain:
            _require(isinstance(plain["maps"], Mapping), f"{where}: maps", "a table", plain["maps"])
            plain["maps"] = from_mapping(MapsConfig, plain["maps"], f"{where}: maps")
        return from_mapping(cls, plain, where)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe file.

        Raises
        ------
        ConfigError
            If the file is missing, not TOML, or holds an unknown key.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"no recipe at {path} ({error.strerror}); give a .toml file, 'group' or 'paper'."
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not a TOML file: {error}.") from error
        return cls.from_mapping(values, str(path))

    @classmethod
    def named(cls, name: str | os.PathLike[str]) -> Recipe:
        """``"group"``, ``"paper"``, or the path of a TOML file."""
        return {"group": cls.group, "paper": cls.paper}.get(str(name), lambda: cls.from_toml(name))()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_mapping` gives the same recipe back."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    def length(self, sequence: int) -> int:
        """Tokens of a training sequence."""
        return self.lengths[sequence % len(self.lengths)] if self.lengths else self.context

    def asks(self, sequence: int) -> bool:
        """Whether a training sequence asks for facts: whole turns of `lengths` do, evenly spread."""
        turn = sequence // max(1, len(self.lengths))
        return int((turn + 1) * self.facts) > int(turn * self.facts)

    def positions_from(self, length: int | None = None) -> range | list[int]:
        """Every position (in tokens) a query may be taken from in a sequence of `length` tokens, or of `context`."""
        least, tokens = self.sink + self.local + 1, self.context if length is None else length
        if self.sampling == "chunk_tail":
            return [p for p in range(least, tokens) if p % 1024 >= 768]
        return range(max(least, int(self.first_position * tokens)), tokens)


def _require(condition: bool, name: str, allowed: str, given: Any) -> None:
    if not condition:
        raise ConfigError(f"recipe: {name} must be {allowed}; given {given!r}.")
