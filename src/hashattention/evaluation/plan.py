"""What is to be evaluated: the plan, and the methods it names, made ready for one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hashattention.config import BaseModel, Budget
from hashattention.errors import ConfigError, InputError
from hashattention.maps import HashMaps
from hashattention.selectors.base import Selector
from hashattention.selectors.registry import METHODS, create

DENSE, HASH = "dense", "hash"
LABELS = {
    "dense": "dense",
    "oracle": "oracle top-k",
    "top_p": "oracle top-p",
    "hash": "HashAttention",
    "streaming": "StreamingLLM",
    "h2o": "H2O",
    "infllm": "InfLLM",
    "quest": "Quest",
    "double_sparsity": "Double Sparsity",
    "lsh": "LSH",
    "hata": "HATA",
    "sampled": "sampled tail",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the rows of an evaluation, but the model.

    Parameters
    ----------
    tasks : tuple of str
        As `tasks.parse` reads them.
    methods : tuple of str
        ``"dense"``, or as `selectors.registry.create` reads them.
    densities : tuple of float
        Attended tokens over all causal tokens; dense runs once, whatever they are.
    lengths : tuple of int
        Tokens of a sample: prompt and answer.
    samples : int
        For each task and length.
    seed : int
        Of the samples.
    protocol : {"question", "generation"}
        The context is read densely; question and answer are sparse, or the answer alone.
    model, maps : str
        What to call them in the rows; the model's own name by default.
    data : Path, optional
        Where the tasks' data lies; default: the usual places.
    sink, local : int
        First and last tokens that are always attended.
    chat : bool
        Use the model's chat format where it has one and the task allows it.
    question_tokens : int
        That many of the last tokens of a prompt are sparse: the question, and what stands before it.
    errors : bool
        Also measure every layer's output error, at some steps.
    logprobs : bool
        Also read the right answers, for their log-probability.
    batch_tokens : int, optional
        Samples are run together up to that many tokens; 0: one by one. Default: what a GPU's free memory allows.
    marked : int
        The first sample of that many tasks is kept with the tokens that were attended.
    shard : (int, int)
        ``(i, n)``: only each n-th sample, from the i-th on; n processes that share a result folder do the whole.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...] = (DENSE,)
    densities: tuple[float, ...] = (1 / 16,)
    lengths: tuple[int, ...] = (8192,)
    samples: int = 25
    seed: int = 0
    protocol: Literal["question", "generation"] = "question"
    model: str = ""
    maps: str = ""
    data: Path | None = None
    sink: int = 16
    local: int = 64
    chat: bool = True
    question_tokens: int = 128
    errors: bool = True
    logprobs: bool = True
    batch_tokens: int | None = None
    marked: int = 3
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.protocol not in ("question", "generation"):
            raise ConfigError(f"protocol must be question or generation; given {self.protocol!r}.")
        for name, least in (("samples", 1), ("question_tokens", 1), ("batch_tokens", 0), ("marked", 0)):
            if (getattr(self, name) or 0) < least:
                raise ConfigError(f"{name} must be at least {least}; given {getattr(self, name)}.")
        for name in ("tasks", "methods", "densities", "lengths"):
            if not getattr(self, name):
                raise ConfigError(f"the plan names no {name}; give at least one.")
        if not 0 <= self.shard[0] < self.shard[1]:
            raise ConfigError(f"shard must be (i, n) with 0 <= i < n; given {self.shard}.")
        for density in self.densities:
            self.budget(density)

    def budget(self, density: float) -> Budget:
        """The budget of one density."""
        return Budget(density=density, sink=self.sink, local=self.local)

    def check_lengths(self, room: int | None) -> None:
        """Raise `InputError` unless a model of `room` tokens takes every length."""
        over = [length for length in self.lengths if room is not None and length > room]
        if over:
            raise InputError(
                f"a length of {', '.join(map(str, over))} tokens was asked for, and this model's context is {room}; "
                "give shorter lengths, or another model."
            )


@dataclasses.dataclass(frozen=True)
class Served:
    """One method at one density; `selector` and `budget` are None for dense."""

    method: str
    density: float
    selector: Selector | None = None
    budget: Budget | None = None
    maps: str = ""
    auxiliary_bits: float = 0.0

    @property
    def name(self) -> str:
        """What a table calls it."""
        first, *wrappers = self.method.split("+")
        plain, _, options = first.partition(":")
        label = LABELS.get(plain, plain) + (f" ({options.replace(',', ', ')})" if options else "")
        return " + ".join([label, *(LABELS.get(text.partition(":")[0], text) for text in wrappers)])


def serve(
    plan: Plan, model: BaseModel, maps: HashMaps | None, device: Any, others: Mapping[str, HashMaps] | None = None
) -> tuple[Served, ...]:
    """Dense, if named, then every other method at the first density, at the second, and so on; `others` are more
    maps for the method ``"hash"``, by the name their rows have.

    Raises
    ------
    ConfigError, UnsupportedModelError, ArtifactError
        As `create`: for an unknown method, or one that cannot run on this model, with the reason.
    """
    sparse = [
        (method, create(method, model=model, maps=maps, device=device), plan.maps)
        for method in dict.fromkeys(plan.methods)
        if method != DENSE
    ]
    for name, other in (others or {}).items():
        sparse.append((HASH, create(HASH, model=model, maps=other, device=device), name))
    served = [Served(DENSE, 1.0)] if DENSE in plan.methods else []
    for density in dict.fromkeys(plan.densities):
        for method, selector, name in sparse:
            needs_maps = METHODS[method.partition("+")[0].partition(":")[0]].needs == "maps"
            bits = selector.auxiliary_bits(model.head_dim)
            served.append(Served(method, density, selector, plan.budget(density), name if needs_maps else "", bits))
    return tuple(served)
