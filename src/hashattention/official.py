"""Import of the paper's released checkpoints (arXiv 2412.14468): flat ``.pt`` state dicts and ``.pkl`` "hat_weights".

Neither is executed: ``.pt`` goes through `torch.load(weights_only=True)`, ``.pkl`` through an unpickler that knows
tensors only.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattention.artifact import refuse_lfs_pointer
from hashattention.config import BaseModel, MapsConfig
from hashattention.errors import ArtifactError
from hashattention.maps import HashMaps, Mlp

KEY = re.compile(r"(\d+)\.learning_to_hash_transformation_([kq])\.(\d+)\.(\d+)\.(weight|bias)")

#: Per layer and side: the stages of all heads, weights ``[H, in, out]`` and biases ``[H, out]``.
Stages = list[tuple[Tensor, Tensor]]
Layers = dict[int, dict[str, Stages]]


def import_official(path: str | os.PathLike[str], model: BaseModel) -> HashMaps:
    """Maps from a released checkpoint of the paper's authors, for the model it was trained on.

    Parameters
    ----------
    path : path
        A ``.pt`` state dict (``{layer}.learning_to_hash_transformation_{k|q}.{query head}.{i}.{weight|bias}``) or a
        ``.pkl`` of ``{layer: {"query_matrix", "query_bias", "key_matrix", "key_bias": a list per stage}}``.
    model : BaseModel
        As `hashattention.models.describe.describe` gives it.

    Raises
    ------
    ArtifactError
        For a missing file, a git-LFS pointer, anything in a pickle beyond tensors (refused by name), or shapes that are
        not this model's.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"no checkpoint at {file}; download it first (a .pt or .pkl file).")
    refuse_lfs_pointer(file)
    layers = _read_pickle(file) if file.suffix == ".pkl" else _read_state_dict(file)
    return _build(layers, model, file.name)


def _read_state_dict(file: Path) -> Layers:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"{file} is not a plain state dict of tensors ({reason}); nothing in it was executed."
        ) from error
    found: dict[tuple[int, str, int], dict[str, dict[int, Tensor]]] = {}
    for name, tensor in state.items():
        match = KEY.fullmatch(str(name))
        if match is None:
            raise ArtifactError(f"{file}: key {name!r} is not of a released HashAttention checkpoint.")
        layer, side, head, stage, kind = match.groups()
        heads = found.setdefault((int(layer), side, int(stage)), {"weight": {}, "bias": {}})
        heads[kind][int(head)] = tensor
    layers: Layers = {}
    for layer_index, side, stage in sorted(found):
        heads = found[layer_index, side, stage]
        # torch.nn.Linear keeps (out, in); a map keeps (in, out).
        weight = torch.stack([heads["weight"][head].T for head in sorted(heads["weight"])])
        bias = torch.stack([heads["bias"][head] for head in sorted(heads["bias"])])
        layers.setdefault(layer_index, {}).setdefault(side, []).append((weight, bias))
    return layers


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles nested lists, dicts and tensors; every other global is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): _load_storage,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a tensor")
        return allowed[module, name]


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _read_pickle(file: Path) -> Layers:
    try:
        with file.open("rb") as stream:
            table = _TensorUnpickler(stream).load()
        return {
            int(layer): {
                side: list(zip(entry[f"{name}_matrix"], entry[f"{name}_bias"], strict=True))
                for side, name in (("q", "query"), ("k", "key"))
            }
            for layer, entry in table.items()
        }
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file} is not a plain pickle of hat_weights ({error}); nothing in it was executed."
        ) from error


def _build(layers: Layers, model: BaseModel, name: str) -> HashMaps:
    if sorted(layers) != list(model.layers):
        raise ArtifactError(f"{name} has maps for layers {sorted(layers)}, the model has {list(model.layers)}.")
    first = layers[model.layers[0]].get("k", [])
    widths = tuple(int(weight.shape[-1]) for weight, _ in first)
    config = MapsConfig(widths[-1] if widths else 0, widths[:-1], "symmetric", "head", "query_head", "query_head")
    maps = HashMaps(config, model, {"recipe": "official", "file": name})
    for side, mlp in (("q", maps.query), ("k", maps.key)):
        _fill(mlp, [layers[index].get(side, []) for index in model.layers], f"{name} ({side})")
    return maps.requires_grad_(False)


def _fill(mlp: Mlp, layers: list[Stages], where: str) -> None:
    for stage, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        for target, part in ((weight, 0), (bias, 1)):
            given = [stages[stage][part] for stages in layers if stage < len(stages)]
            shapes = {tuple(tensor.shape) for tensor in given}
            if len(given) != len(layers) or shapes != {tuple(target.shape[1:])}:
                raise ArtifactError(
                    f"{where}: stage {stage} is {sorted(shapes)} in {len(given)} layers; this model needs "
                    f"{tuple(target.shape[1:])} in {len(layers)}. Is it the checkpoint of another model?"
                )
            target.data.copy_(torch.stack([tensor.float() for tensor in given]))
