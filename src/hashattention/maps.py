"""HashMaps: the learned functions of all layers of one model, one tensor per stage."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any

import torch
from torch import Tensor, nn

from hashattention import artifact, ops
from hashattention.config import BaseModel, MapsConfig, from_mapping
from hashattention.errors import ArtifactError, ConfigError, InputError
from hashattention.rotation import unrotate

#: Keys encoded at once: bounds the hidden activations of a long prefill.
KEY_CHUNK = 8192
#: Coefficients of the remainder are smaller than this: what they make of a logit is finite in float32.
LARGEST = 1e6


class Mlp(nn.Module):
    """One MLP per layer and head: weights ``[L, H, in, out]`` and biases ``[L, H, out]`` a stage, SiLU between
    stages.
    """

    def __init__(self, layers: int, heads: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.weights = nn.ParameterList([torch.randn(layers, heads, i, o) * i**-0.5 for i, o in pairs])
        self.biases = nn.ParameterList([torch.zeros(layers, heads, o) for _, o in pairs])

    def layer(self, position: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights ``[H, in, out]`` and biases ``[H, out]`` of one layer, as views."""
        return [weight[position] for weight in self.weights], [bias[position] for bias in self.biases]


@dataclasses.dataclass(frozen=True)
class LayerMaps:
    """The hash map of one layer: phi_q and phi_k as lists of stages, and the `frequencies` float32 ``[F]`` of the
    model's rotary embedding, for maps that take their input before it.
    """

    config: MapsConfig
    query_weights: list[Tensor]
    query_biases: list[Tensor]
    key_weights: list[Tensor]
    key_biases: list[Tensor]
    frequencies: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerMaps:
        """The same map elsewhere or in another dtype; itself where nothing changes."""
        names = "query_weights", "query_biases", "key_weights", "key_biases"
        moved: dict[str, Any] = {name: [tensor.to(device, dtype) for tensor in getattr(self, name)] for name in names}
        moved["frequencies"] = None if self.frequencies is None else self.frequencies.to(device)
        return dataclasses.replace(self, **moved)

    def key_inputs(self, key: Tensor, positions: Tensor | None) -> Tensor:
        """Keys as phi_k takes them: rotated back from their `positions` int ``[B, T]`` if it sees them before RoPE."""
        return key if self.config.rope == "after" else self._unrotate(key, positions)

    def sign_keys(self, key: Tensor, positions: Tensor | None = None, *, backend: str = "auto") -> Tensor:
        """Signatures int32 ``[B, Hs, T, W]`` of keys ``[B, Hkv, T, D]``; `positions` as in `key_inputs`."""
        heads, stages = self.key_weights[0].shape[0], (self.key_weights, self.key_biases)
        if key.shape[1] != heads:
            key = key.repeat_interleave(heads // key.shape[1], dim=1)
        chunks = []
        for first in range(0, max(1, key.shape[2]), KEY_CHUNK):
            part = slice(first, first + KEY_CHUNK)
            inputs = self.key_inputs(key[:, :, part], None if positions is None else positions[:, part])
            chunks.append(ops.encode_signature(inputs, *stages, backend=backend))
        return torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]

    def code_queries(self, query: Tensor, positions: Tensor | None = None, *, backend: str = "auto") -> Tensor:
        """Query codes of queries ``[B, Hq, T, D]``: int8 ``[B, Hc, T, code_bits]`` (asymmetric) or int32
        ``[B, Hc, T, W]``; `positions` int ``[B, T]`` are theirs, if the maps see queries before RoPE.
        """
        return self.scale_queries(query, positions, backend=backend)[0]

    def scale_queries(
        self, query: Tensor, positions: Tensor | None = None, *, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """`code_queries`, and what a unit of each code is worth in logits: float32 ``[B, Hc, T]``, 1 for bits."""
        if self.config.rope == "before":
            query = self._unrotate(query, positions)
        x = ops.group_queries(query, self.query_weights[0].shape[0])
        stages = self.query_weights, self.query_biases
        if self.config.score == "symmetric":
            return ops.encode_signature(x, *stages, backend=backend), x.new_ones(x.shape[:3], dtype=torch.float32)
        return ops.encode_query(x, *stages, self.config.levels, backend=backend)

    def _unrotate(self, x: Tensor, positions: Tensor | None) -> Tensor:
        assert self.frequencies is not None
        if positions is None:
            raise InputError(f"these maps were trained with rope={self.config.rope!r}: give the tokens' `positions`.")
        return unrotate(x, positions[:, None], self.frequencies)


class HashMaps(nn.Module):
    """The hash maps of every sparse layer of one model.

    Parameters
    ----------
    config : MapsConfig
        Shape, score and sharing.
    model : BaseModel
        The transformer they belong to; `model.layers` are the layers with a map.
    training : dict, optional
        How they were trained and what was measured; stored with the artifact.
    shares : tuple of tuple of float, optional
        For each layer and index set, the multiple of the heavy budget that it is served with, so that a mean budget
        goes where it is needed (`train.budgets`); by default all have the same.
    temperatures : tuple of tuple of float, optional
        For each layer and index set, what a score is multiplied with so that its softmax is closest to the attention
        (`train.temperatures`); budgets with a `top_p` or `threshold` need them.
    remainder : tuple of tuple of tuple of float, optional
        For each layer and query head the three coefficients by which the mean value stands for the tokens left out
        (`ops.add_remainder`, `train.remainder`).

    Examples
    --------
    >>> model = BaseModel("LlamaForCausalLM", 2, 4, 2, 64, (0, 1), "theta=10000")
    >>> maps = HashMaps(MapsConfig(bits=32, widths=(16,)), model)
    >>> maps.layer(1).sign_keys(torch.randn(1, 2, 5, 64)).shape
    torch.Size([1, 2, 5, 1])
    """

    def __init__(
        self,
        config: MapsConfig,
        model: BaseModel,
        training: dict[str, Any] | None = None,
        shares: tuple[tuple[float, ...], ...] | None = None,
        temperatures: tuple[tuple[float, ...], ...] | None = None,
        remainder: tuple[tuple[tuple[float, ...], ...], ...] | None = None,
    ) -> None:
        super().__init__()
        check_rotation(config, model)
        self.config, self.model, self.training_info = config, model, dict(training or {})
        size = len(model.layers), config.selection_heads(model)
        self.shares = None if shares is None else check_shares(shares, *size)
        self.temperatures = None if temperatures is None else check_temperatures(temperatures, *size)
        heads = size[0], model.num_attention_heads
        self.remainder = None if remainder is None else check_remainder(remainder, *heads)
        group = model.group_size if config.query_input == "group" else 1
        query = group * model.head_dim, *config.hidden_of_queries, config.code_bits
        self.query = Mlp(len(model.layers), config.code_heads(model), query)
        self.key = Mlp(len(model.layers), config.signature_heads(model), (model.head_dim, *config.widths, config.bits))

    def layer(self, index: int) -> LayerMaps:
        """The map of model layer `index`.

        Raises
        ------
        ConfigError
            If that layer has no map.
        """
        if index not in self.model.layers:
            raise ConfigError(f"layer {index} has no hash map; layers with one: {list(self.model.layers)}.")
        position = self.model.layers.index(index)
        layer = LayerMaps(self.config, *self.query.layer(position), *self.key.layer(position))
        if self.config.rope == "after":
            return layer
        frequencies = torch.tensor(self.model.frequencies, device=layer.key_weights[0].device)
        return dataclasses.replace(layer, frequencies=frequencies)

    def check_model(self, model: BaseModel) -> None:
        """Raise `ArtifactError` unless these maps were trained for `model`; the message names the field that
        differs.
        """
        for field in dataclasses.fields(BaseModel):
            mine, theirs = getattr(self.model, field.name), getattr(model, field.name)
            fits = set(mine) <= set(theirs) if field.name == "layers" else mine == theirs
            # Frequencies follow from the other fields.
            if field.name not in ("name", "frequencies") and not fits:
                raise ArtifactError(
                    f"these maps are for {self.model.name or self.model.architecture}: {field.name} is {mine!r}, but "
                    f"the model has {theirs!r}; train maps for this model with `hashattention train` or load the model "
                    "they belong to."
                )

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the maps folder (``config.json``, ``model.safetensors``): weights in `dtype`, biases in float32.

        The first stage's bias holds the inputs' mean, which may be far from zero; it is small and stays exact.
        `torch.int8` halves the folder (`artifact.pack`); such weights are read as bfloat16.
        """
        model, maps = dataclasses.asdict(self.model), dataclasses.asdict(self.config)
        if self.config.rope == "after":  # so that older releases read it
            del model["frequencies"], maps["rope"]
        if self.config.mixture == 1:
            del maps["mixture"]
        config: dict[str, Any] = {"base_model": model, "maps": maps, "training": self.training_info}
        if self.shares is not None:
            config["shares"] = self.shares
        if self.temperatures is not None:
            config["temperatures"] = self.temperatures
        if self.remainder is not None:
            config["remainder"] = self.remainder
        artifact.write(folder, config, artifact.pack(self.state_dict(), dtype))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], model: BaseModel | None = None) -> HashMaps:
        """Load maps from a folder, from those that ship with the package, or from a hub id.

        Raises
        ------
        ArtifactError
            If the folder is missing, damaged, of another version, or (given `model`) another model's.
        ConfigError
            For an unknown configuration key; the nearest known one is named.
        """
        folder = artifact.locate(name)
        config, tensors = artifact.read(folder)
        where = str(folder / artifact.CONFIG_FILE)
        base = from_mapping(BaseModel, config.get("base_model", {}), f"{where}: base_model")
        kind = from_mapping(MapsConfig, config.get("maps", {}), f"{where}: maps")
        maps = cls(kind, base, *(config.get(name) for name in ("training", "shares", "temperatures", "remainder")))
        maps._load_tensors(tensors, str(folder / artifact.WEIGHTS_FILE))
        if model is not None:
            maps.check_model(model)
        return maps.requires_grad_(False)

    def _load_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != given:
            name = next(key for key in (*expected, *given) if expected.get(key) != given.get(key))
            raise ArtifactError(
                f"{where}: tensor {name!r} is {given.get(name, 'missing')}, its config.json asks for "
                f"{expected.get(name, 'no such tensor')}; the two files do not belong together."
            )
        self.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def check_rotation(config: MapsConfig, model: BaseModel) -> None:
    """Raise `ConfigError` if maps of this kind need the model's rotary frequencies and it has none that fit."""
    if config.rope == "after" or 0 < 2 * len(model.frequencies) <= model.head_dim:
        return
    raise ConfigError(
        f"maps with rope={config.rope!r} need 1 to {model.head_dim // 2} rotary frequencies of the model; its "
        f"description has {len(model.frequencies)}: take them from `models.rotary.rotary_frequencies`, or use "
        "rope='after'."
    )


def check_shares(shares: Any, layers: int, selection_heads: int) -> tuple[tuple[float, ...], ...]:
    """Shares of the heavy budget as floats, one a layer and index set.

    Raises
    ------
    ConfigError
        For another number of them, or one that is not a finite number of at least 0.
    """
    found = _table("shares", shares, layers, selection_heads)
    bad = [share for row in found for share in row if not 0 <= share < float("inf")]
    if bad:
        raise ConfigError(f"shares must be finite and at least 0 (1: the mean budget); given {bad[0]!r}.")
    return found


def check_temperatures(temperatures: Any, layers: int, selection_heads: int) -> tuple[tuple[float, ...], ...]:
    """Temperatures of the scores as floats, one a layer and index set.

    Raises
    ------
    ConfigError
        For another number of them, or one that is not a finite number above 0.
    """
    found = _table("temperatures", temperatures, layers, selection_heads)
    bad = [one for row in found for one in row if not 0 < one < float("inf")]
    if bad:
        raise ConfigError(f"temperatures must be finite and above 0; given {bad[0]!r}. Train the maps again.")
    return found


def check_remainder(remainder: Any, layers: int, query_heads: int) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Coefficients of the remainder as floats, three a layer and query head.

    Raises
    ------
    ConfigError
        For another number of them, or one that is not finite or too large.
    """
    if not isinstance(remainder, (list, tuple)) or len(remainder) != layers:
        given = len(remainder) if isinstance(remainder, (list, tuple)) else repr(remainder)
        raise ConfigError(f"remainder must hold {layers} layers of {query_heads} times 3 numbers; given {given}.")
    found = tuple(_table("remainder", layer, query_heads, 3, "query heads") for layer in remainder)
    bad = [one for layer in found for row in layer for one in row if not abs(one) < LARGEST]
    if bad:
        raise ConfigError(
            f"the remainder's coefficients must be below {LARGEST:g}; given {bad[0]!r}. Train the maps again."
        )
    return found


def _table(name: str, given: Any, rows: int, columns: int, unit: str = "layers") -> tuple[tuple[float, ...], ...]:
    try:
        found = tuple(tuple(float(one) for one in row) for row in given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a list of numbers for each of the {unit}; {error}.") from error
    if len(found) != rows or any(len(row) != columns for row in found):
        sizes = sorted({len(row) for row in found})
        raise ConfigError(f"{name} must hold {rows} {unit} of {columns} numbers; given {len(found)} {unit} of {sizes}.")
    return found
