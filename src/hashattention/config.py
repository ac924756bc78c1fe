"""Configuration: what is attended (`Budget`), how it is hashed (`MapsConfig`), for which model (`BaseModel`)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from hashattention.errors import ConfigError

Share = Literal["kv_head", "query_head"]
SelectionShare = Literal["group", "query_head"]
QueryInput = Literal["head", "group"]
ScoreKind = Literal["symmetric", "asymmetric"]
Rope = Literal["after", "before", "before_keys"]

T = TypeVar("T")


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `kind` from a mapping; lists become tuples.

    Raises
    ------
    ConfigError
        For a key `kind` does not have (the nearest known key is named) or a missing one.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}."
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    required = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(
            f"{where}: missing {', '.join(missing)}; add the key or write the file again with this version."
        )
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many tokens one query may attend to.

    Give either `density` (sink, local and heavy together, as a fraction of the causal tokens) or `heavy` (on top of
    sink and local: a count if it is an int, a fraction of the causal tokens if it is a float).

    Parameters
    ----------
    density : float, optional
        All attended tokens over all causal tokens, in (0, 1]. Where `density` times the context is below
        `sink + local`, local shrinks first (never under one token), then sink; the total never exceeds
        ``max(1, floor(density * n))``.
    heavy : int or float, optional
        Heavy tokens: a count >= 0, or a fraction of the causal tokens in (0, 1].
    sink, local : int
        First and most recent tokens, in tokens, always attended.
    top_p : float, optional
        A share of the heavy candidates' estimated attention, in (0, 1]: a row takes only as many heavy tokens as its
        scores say are needed to hold it. `density` or `heavy` stays the most it takes.
    threshold : float, optional
        Heavy tokens below this estimated share of the candidates' attention, in (0, 1], are not taken.

    Examples
    --------
    >>> Budget(density=1 / 16).counts(4096)
    (16, 64, 176)
    >>> Budget(heavy=0.03125).counts(8192)
    (16, 64, 256)
    >>> Budget(heavy=512, sink=4, local=32).counts(100)
    (4, 32, 64)
    """

    density: float | None = None
    heavy: int | float | None = None
    sink: int = 16
    local: int = 64
    top_p: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        _require(
            (self.density is None) != (self.heavy is None),
            f"Budget takes exactly one of density and heavy; given density={self.density}, heavy={self.heavy}.",
        )
        for name in ("density", "heavy"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, int | float), f"{name} must be a number; given {value!r}.")
        for name in ("sink", "local"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and value >= 0, f"{name} must be a whole number >= 0 (tokens); given {value!r}."
            )
        if self.density is not None:
            _require(
                0 < self.density <= 1,
                f"density must be in (0, 1], the share of causal tokens attended; given {self.density!r}.",
            )
        if isinstance(self.heavy, float):
            _require(0 < self.heavy <= 1, f"heavy as a fraction must be in (0.0, 1.0]; given {self.heavy!r}.")
        elif self.heavy is not None:
            _require(self.heavy >= 0, f"heavy as a count must be >= 0 tokens; given {self.heavy!r}.")
        for name, what in (
            ("top_p", "share of the estimated attention to hold"),
            ("threshold", "least share a token has"),
        ):
            value = getattr(self, name)
            fits = value is None or (isinstance(value, int | float) and 0 < value <= 1)
            _require(fits, f"{name} must be in (0, 1], the {what}; given {value!r}.")

    @property
    def estimated(self) -> bool:
        """Whether a row may take fewer heavy tokens than it may have, by an estimate of their attention."""
        return self.threshold is not None or (self.top_p is not None and self.top_p < 1)

    def counts(self, length: int) -> tuple[int, int, int]:
        """Sink, local and heavy tokens for one query with `length` causal tokens (its own included)."""
        if length <= 0:
            return 0, 0, 0
        if self.density is not None:
            total = min(length, max(1, math.floor(self.density * length)))
            local = min(self.local, max(1, total - self.sink))
            sink = min(self.sink, total - local)
            return sink, local, total - sink - local
        sink = min(self.sink, length)
        local = min(self.local, length - sink)
        heavy = math.floor(self.heavy * length) if isinstance(self.heavy, float) else int(self.heavy or 0)
        return sink, local, min(heavy, length - sink - local)

    def capacity(self, length: int) -> int:
        """The most tokens any query attends to while contexts stay at or under `length`: the width of an index row."""
        return max(1, sum(self.counts(length)))


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The transformer a set of maps belongs to: the fields that must agree before maps are used.

    `layers` are the indices of the attention layers that may be sparse (full attention; sliding-window layers are not).
    `frequencies`, radians per position, undo the rotary embedding (`rotation.unrotate`); only maps that take keys
    before it need them.
    """

    architecture: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[int, ...]
    rope: str
    name: str = ""
    frequencies: tuple[float, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclasses.dataclass(frozen=True)
class MapsConfig:
    """The shape of the hash maps of one model and how their codes are scored and shared.

    The default is the group code: one 64-bit signature per KV head, and one integer query code per KV head made from
    the concatenated queries of its GQA group. `MapsConfig.paper()` is HashAttention as published (arXiv 2412.14468).

    Parameters
    ----------
    bits : int
        Bits per signature: a multiple of 32, at most 256.
    widths : tuple of int
        Hidden widths; a map has ``len(widths) + 1`` stages, one to three. One hidden layer learns better than two of
        the same size in all, and a decoding step has one exchange less.
    score : {"asymmetric", "symmetric"}
        Integer query weights against +-1 key bits, or bits against bits (``bits - 2 * popcount(xor)``).
    query_input : {"group", "head"}
        What phi_q sees: all queries of a GQA group (one code per KV head) or one query (one code per query head).
    signature_share : {"kv_head", "query_head"}
        One signature per KV head, or one per query head (the paper: keys repeated before hashing).
    selection_share : {"group", "query_head"}
        One index set per KV head, or one per query head.
    levels : int
        Largest magnitude of an integer query weight (7: int4 range, up to 127).
    query_widths : tuple of int, optional
        Hidden widths of phi_q where they differ from those of phi_k.
    rope : {"after", "before", "before_keys"}
        Whether the maps see queries and keys as attention does, after the rotary embedding, or rotated back by their
        own positions to what they were before it; "before_keys": phi_k sees keys before it, phi_q queries after it.
    mixture : int
        Query codes of a group code, 1 to 4, of ``bits`` weights each; a token's score is the largest of theirs. Several
        codes follow a group whose heads look at different tokens, where one can only add up what they want.
    """

    bits: int = 64
    widths: tuple[int, ...] = (256,)
    score: ScoreKind = "asymmetric"
    query_input: QueryInput = "group"
    signature_share: Share = "kv_head"
    selection_share: SelectionShare = "group"
    levels: int = 7
    query_widths: tuple[int, ...] | None = None
    rope: Rope = "after"
    mixture: int = 1

    def __post_init__(self) -> None:
        _require(
            isinstance(self.bits, int) and self.bits % 32 == 0 and 32 <= self.bits <= 256,
            f"bits must be a multiple of 32 from 32 to 256; given {self.bits!r}.",
        )
        for name in ("widths", "query_widths"):
            widths = getattr(self, name)
            fits = isinstance(widths, tuple) and len(widths) <= 2 and all(isinstance(w, int) and w > 0 for w in widths)
            _require(
                fits or (name == "query_widths" and widths is None),
                f"{name} must hold zero to two positive hidden widths; given {widths}.",
            )
        _require(
            isinstance(self.levels, int) and 1 <= self.levels <= 127,
            f"levels must be from 1 to 127 (int8 query weights); given {self.levels!r}.",
        )
        _require(
            isinstance(self.mixture, int) and 1 <= self.mixture <= 4,
            f"mixture must be from 1 to 4 query codes; given {self.mixture!r}.",
        )
        _require(
            self.code_bits <= 256,
            f"bits * mixture must be at most 256; given {self.bits} * {self.mixture}.",
        )
        choices = {
            "score": ("asymmetric", "symmetric"),
            "query_input": ("group", "head"),
            "signature_share": ("kv_head", "query_head"),
            "selection_share": ("group", "query_head"),
            "rope": ("after", "before", "before_keys"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {', '.join(allowed)}; given {value!r}.")
        if self.query_input == "group":
            _require(
                self.signature_share == "kv_head" and self.selection_share == "group",
                "a group code (query_input='group') has one signature and one selection per KV head; "
                f"given signature_share={self.signature_share!r}, selection_share={self.selection_share!r}.",
            )
        if self.mixture > 1:
            _require(
                self.query_input == "group" and self.score == "asymmetric",
                "a mixture is of integer group codes (query_input='group', score='asymmetric'); "
                f"given query_input={self.query_input!r}, score={self.score!r}.",
            )

    @classmethod
    def paper(cls) -> MapsConfig:
        """HashAttention as published: 32 bits per query head, three stages of width 128, symmetric, own selection."""
        return cls(32, (128, 128), "symmetric", "head", "query_head", "query_head")

    @property
    def hidden_of_queries(self) -> tuple[int, ...]:
        """Hidden widths of phi_q."""
        return self.widths if self.query_widths is None else self.query_widths

    @property
    def code_bits(self) -> int:
        """Entries of a query's code: those of all its mixture."""
        return self.bits * self.mixture

    @property
    def words(self) -> int:
        """int32 words per signature."""
        return self.bits // 32

    def signature_heads(self, model: BaseModel) -> int:
        """Hs, signatures per token."""
        return model.num_key_value_heads if self.signature_share == "kv_head" else model.num_attention_heads

    def code_heads(self, model: BaseModel) -> int:
        """Hc, query codes per step."""
        return model.num_key_value_heads if self.query_input == "group" else model.num_attention_heads

    def selection_heads(self, model: BaseModel) -> int:
        """Hsel, index sets per step."""
        return model.num_key_value_heads if self.selection_share == "group" else model.num_attention_heads
