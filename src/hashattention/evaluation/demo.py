"""The demo run: three facts in a novel, asked of one model with dense attention and with hash attention."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch

from hashattention import provenance
from hashattention.attention import Observer
from hashattention.config import BaseModel, Budget
from hashattention.errors import InputError
from hashattention.evaluation.needle import FACTS, Prompt, grade, plant, prompt
from hashattention.evaluation.observe import Recorder
from hashattention.integrations.transformers import attach
from hashattention.maps import HashMaps
from hashattention.models.describe import describe, text_config
from hashattention.ops import dispatch

if TYPE_CHECKING:
    from hashattention.models.source import LoadedModel

Progress = Callable[[str, int, int], None]

#: Where the facts are planted, in 0..1 of the document.
DEPTHS = (0.2, 0.5, 0.8)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What the demo runs.

    Parameters
    ----------
    densities : tuple of float
        All attended tokens over all causal tokens.
    tokens : int
        Context before the question, in tokens, at most.
    question_tokens, answer_tokens : int
        Room for the longest question, and the longest answer.
    timed_steps : int
        New tokens that are timed for each setting, without any measurement beside.
    """

    densities: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16)
    tokens: int = 4096
    question_tokens: int = 64
    answer_tokens: int = 24
    timed_steps: int = 7

    @property
    def choices(self) -> tuple[float | None, ...]:
        """The settings, in order: None is dense."""
        return None, *self.densities

    def __post_init__(self) -> None:
        for density in self.densities:
            Budget(density=density)
        for name in ("tokens", "question_tokens", "answer_tokens", "timed_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; given {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said to one question; `attention` is `Recorder.attention` of the prompt's tokens."""

    text: str
    right: bool
    attention: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table.

    Parameters
    ----------
    name : str
        "dense" or "hash".
    density : float or None
        As asked for; None is dense attention.
    answers : tuple of Answer
        In the order of the facts.
    attended : float
        Tokens attended per new token, mean over layers, KV heads and steps.
    kv_bytes, signature_bytes : float
        Read per new token: all layers, each K and V row of a KV head once; the signatures of all tokens.
    error, mass : dict of int to float
        By layer: mean relative output error against dense; mean share of attention weight kept.
    milliseconds : float
        Per new token, median.
    """

    name: str
    density: float | None
    answers: tuple[Answer, ...]
    attended: float
    kv_bytes: float
    signature_bytes: float
    error: dict[int, float]
    mass: dict[int, float]
    milliseconds: float = 0.0

    @property
    def mean_error(self) -> float:
        """Mean over layers."""
        return statistics.fmean(self.error.values()) if self.error else 0.0

    @property
    def mean_mass(self) -> float:
        """Mean over layers."""
        return statistics.fmean(self.mass.values()) if self.mass else 1.0


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """Everything the demo's table and report show; `as_dict` is its JSON."""

    model: str
    dtype: str
    backends: dict[str, str]
    prompt: Prompt
    settings: tuple[Setting, ...]
    prefill_seconds: float
    weight_bytes: int
    maps_origin: dict[str, Any]
    origin: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the document and the pictures of attended tokens."""
        rows = []
        for setting in self.settings:
            row = dataclasses.asdict(setting) | {"mean_error": setting.mean_error, "mean_mass": setting.mean_mass}
            row["answers"] = [{"text": answer.text, "right": answer.right} for answer in setting.answers]
            rows.append(row)
        return {
            "model": self.model,
            "dtype": self.dtype,
            "backends": self.backends,
            "context_tokens": len(self.prompt.tokens),
            "prefill_seconds": self.prefill_seconds,
            "weight_bytes": self.weight_bytes,
            "facts": [dataclasses.asdict(fact) for fact in FACTS],
            "settings": rows,
            "maps_origin": self.maps_origin,
            "origin": self.origin,
        }


class Reader:
    """A model that has read a prompt once; every question continues from there and is then forgotten."""

    def __init__(self, model: Any, tokenizer: Any, prompt: Prompt) -> None:
        from transformers import DynamicCache

        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt
        self.cache = DynamicCache(config=model.config)
        started = time.perf_counter()
        self._forward(prompt.tokens)
        self.prefill_seconds = time.perf_counter() - started

    def _forward(self, tokens: Sequence[int]) -> int:
        """Append tokens to the cache; the most likely next one."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def question(self, text: str) -> list[int]:
        """The tokens of a question and of what leads to the answer."""
        encoded = self.tokenizer(text + self.prompt.tail, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def _forget(self) -> None:
        """Back to where the prompt ends."""
        extra = self.cache.get_seq_length() - len(self.prompt.tokens)
        self.cache.crop(-extra)

    def answer(self, question: Sequence[int], limit: int) -> str:
        """The greedy answer, to the end of its first line."""
        said: list[int] = []
        stops = set(_as_list(self.tokenizer.eos_token_id)) | set(_as_list(self.model.generation_config.eos_token_id))
        token = self._forward(question)
        while token not in stops:
            said.append(token)
            line = self.tokenizer.decode(said).lstrip()
            if "\n" in line or len(said) == limit:
                break
            token = self._forward([token])
        self._forget()
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip().split("\n")[0]

    def step_seconds(self) -> float:
        """Wall time of one new token right after the prompt."""
        started = time.perf_counter()
        self._forward(self.prompt.tokens[-1:])
        seconds = time.perf_counter() - started
        self._forget()
        return seconds


def run(loaded: LoadedModel, maps: HashMaps, config: DemoConfig, *, progress: Progress | None = None) -> DemoResult:
    """Run the demo.

    Parameters
    ----------
    loaded : LoadedModel
        A decoder and its tokenizer, from `load_model`.
    maps : HashMaps
        Trained for this model.
    config : DemoConfig
    progress : callable, optional
        Called as ``progress(text, done, total)``.

    Raises
    ------
    InputError
        If the context is longer than the model's.
    ArtifactError
        If the maps are another model's.
    """
    base = describe(loaded.model)
    maps.check_model(base)
    room = getattr(text_config(loaded.model), "max_position_embeddings", None)
    needed = config.tokens + config.question_tokens + config.answer_tokens
    if room is not None and needed > room:
        raise InputError(f"the demo needs {needed} tokens of context and this model takes {room}; lower `tokens`.")
    tell = progress or (lambda text, done, total: None)
    steps = 2 + len(config.choices)
    tell(f"reading {config.tokens} tokens", 0, steps)
    reader = read(loaded, config)
    settings = []
    for done, density in enumerate(config.choices, 1):
        tell("dense attention" if density is None else f"hash attention, density {density:g}", done, steps)
        settings.append(_ask(reader, base, maps, density, config))
    tell("timing", steps - 1, steps)
    times = _time(reader, maps, config)
    return DemoResult(
        model=loaded.source.hub_id or base.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        backends=backends(loaded.model.device, loaded.model.dtype),
        prompt=reader.prompt,
        settings=tuple(dataclasses.replace(row, milliseconds=ms) for row, ms in zip(settings, times, strict=True)),
        prefill_seconds=reader.prefill_seconds,
        weight_bytes=sum(parameter.nbytes for parameter in loaded.model.parameters()),
        maps_origin=maps.training_info.get("origin", {}),
        origin=provenance.origin(loaded.model.device),
    )


def backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The backend that serves each op of a hash attention step on `device`."""
    tensor = torch.zeros(1, dtype=dtype, device=device)
    return {
        op: next(name for name in dispatch.MODULES if dispatch.refusal(name, op, tensor, {}) is None)
        for op in ("encode_query", "score_select", "attend")
    }


def read(loaded: LoadedModel, config: DemoConfig) -> Reader:
    """The shipped novel with `needle.FACTS` planted at `DEPTHS`, at most `config.tokens` long, read by the model."""
    text = files("hashattention").joinpath("texts/persuasion.txt").read_text(encoding="utf-8")
    room = config.tokens
    while True:
        haystack = plant(text, FACTS, DEPTHS, room, loaded.tokenizer)
        made = prompt(haystack, loaded.tokenizer)
        over = len(made.tokens) - config.tokens
        if over <= 0:
            return Reader(loaded.model, loaded.tokenizer, made)
        # The chat format, and tokens that joining paragraphs makes, take room too.
        room -= over


def _ask(reader: Reader, base: BaseModel, maps: HashMaps, density: float | None, config: DemoConfig) -> Setting:
    """Ask every question, and measure every step of the answers."""
    answers, recorders, lengths = [], [], []
    for fact in FACTS:
        question = reader.question(fact.question)
        recorder = Recorder(since=len(reader.prompt.tokens) + len(question))
        with _served(reader.model, maps, density, len(question), recorder):
            said = reader.answer(question, config.answer_tokens)
        attention = recorder.attention()[: len(reader.prompt.tokens)]
        answers.append(Answer(said, grade(said, fact), tuple(attention.tolist())))
        recorders.append(recorder)
        lengths.append(len(reader.prompt.tokens) + len(question))
    row = 2 * base.head_dim * base.num_key_value_heads * reader.model.dtype.itemsize
    means = {field: _mean(recorders, field) for field in ("error", "mass", "attended", "rows", "tokens")}
    context = statistics.fmean(lengths)
    # Layers that stay dense read every row and lose nothing.
    dense_rows = (base.num_hidden_layers - len(means["rows"])) * context
    return Setting(
        name="dense" if density is None else "hash",
        density=density,
        answers=tuple(answers),
        attended=statistics.fmean(means["attended"].values() or [context]),
        kv_bytes=(sum(means["rows"].values()) + dense_rows) * row,
        signature_bytes=sum(means["tokens"].values()) * maps.config.bits / 8 * maps.config.signature_heads(base),
        error=means["error"],
        mass=means["mass"],
    )


def _time(reader: Reader, maps: HashMaps, config: DemoConfig) -> list[float]:
    """Median milliseconds of one new token; settings take turns, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in config.choices]
    for _ in range(config.timed_steps):
        for found, density in zip(times, config.choices, strict=True):
            with _served(reader.model, maps, density, 0, None):
                # The first step after a change of setting brings the maps to the keys' dtype.
                reader.step_seconds()
                found.append(1e3 * reader.step_seconds())
    return [statistics.median(found) for found in times]


def _served(
    model: Any, maps: HashMaps, density: float | None, tail: int, observer: Observer | None
) -> contextlib.AbstractContextManager[Any]:
    if density is None:
        return contextlib.nullcontext()
    return attach(model, maps, Budget(density=density), min_context=0, sparse_tail=tail, observer=observer)


def _mean(recorders: Sequence[Recorder], field: str) -> dict[int, float]:
    """By layer, over the steps of all questions alike."""
    means = [recorder.mean(field) for recorder in recorders]
    return {layer: statistics.fmean(found[layer] for found in means) for layer in means[0]}


def _as_list(token: int | list[int] | None) -> list[int]:
    return token if isinstance(token, list) else [] if token is None else [token]
