"""The folder format of maps: ``config.json`` (versioned, readable) and ``model.safetensors``. No pickle is ever
executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattention.errors import ArtifactError, MissingDependencyError

FORMAT = "hashattention-maps"
#: Version 2 may hold int8 weights (see `pack`); maps without them are written as version 1, which older releases read.
FORMAT_VERSION = 2
READABLE = (1, 2)
#: What a weight's name ends in, for the peaks of its int8 levels.
PEAK = ".peak"
LEVELS = 127
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"


def write(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a maps folder; each file is complete before it gets its name, and the configuration comes last."""
    from safetensors.torch import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".{WEIGHTS_FILE}.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(target / WEIGHTS_FILE)
    version = FORMAT_VERSION if any(name.endswith(PEAK) for name in tensors) else 1
    write_config(target, {"format": FORMAT, "format_version": version, **config})
    return target


def write_config(folder: Path, document: Mapping[str, Any]) -> None:
    """Write a folder's ``config.json``, whole or not at all."""
    partial = folder / f".{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / CONFIG_FILE)


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a maps folder: its configuration and its tensors, int8 weights unpacked.

    Raises
    ------
    ArtifactError
        For a missing or truncated file, a git-LFS pointer, another format or version, or weights that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(folder)
    config = read_config(source)
    weights = source / WEIGHTS_FILE
    if not weights.is_file():
        raise ArtifactError(f"{source} has no {WEIGHTS_FILE}; a maps folder holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    refuse_lfs_pointer(weights)
    try:
        tensors: dict[str, Tensor] = load_file(weights)
    except SafetensorError as error:
        raise ArtifactError(f"{weights} is damaged or truncated ({error}); download or train it again.") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{weights}: tensor {name!r} holds NaN or infinity; train the maps again.")
    try:
        return config, unpack(tensors)
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(f"{weights}: the peaks of int8 weights do not fit them ({error}); get it again.") from error


def pack(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored of maps (`HashMaps.state_dict`): weights in `dtype`, biases in float32.

    `dtype` int8 keeps a weight ``[L, H, in, out]`` as levels -127..127 and the bfloat16 `peak` of each channel, the
    largest magnitude in it: ``weight = bfloat16(level * peak / 127)``. The first stage has a peak per input channel
    ``[L, H, in, 1]`` (inputs come as the model makes them, of very unlike sizes), the others one per output channel
    ``[L, H, 1, out]``. What `unpack` gives packs into the same levels and peaks again.

    Examples
    --------
    >>> held = pack({"key.weights.1": torch.tensor([[1.0, -0.5], [0.0, 2.0]])}, torch.int8)
    >>> held["key.weights.1"].tolist(), held["key.weights.1.peak"].tolist()
    ([[127, -32], [0, 127]], [[1.0, 2.0]])
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach()
        if ".weights." not in name:
            packed[name] = plain.float()
        elif dtype != torch.int8:
            packed[name] = plain.to(dtype)
        else:
            peak = plain.abs().amax(-1 if name.endswith(".weights.0") else -2, keepdim=True).bfloat16()
            unit = peak.float().clamp(min=torch.finfo(torch.float32).tiny)
            packed[name] = (plain / unit * LEVELS).round().clamp(-LEVELS, LEVELS).to(torch.int8)
            packed[name + PEAK] = peak
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `pack` was given, as rounded by it: int8 levels become bfloat16 weights, others stay."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(PEAK)}
    for name, levels in found.items():
        if levels.dtype == torch.int8:
            found[name] = (levels.float() * tensors[name + PEAK].float() / LEVELS).bfloat16()
    return found


def round_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight called `name` as it will be read again, float32."""
    return unpack(pack({name: weight}, dtype))[name].float()


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked ``config.json`` of a maps folder, without its weights.

    Raises
    ------
    ArtifactError
        If it is missing, not JSON, or of another format or version.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is not a maps folder: it has no {CONFIG_FILE}. Give a folder that `train` wrote."
        )
    refuse_lfs_pointer(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format", "none") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError(f"{path}: format is {found!r}, expected {FORMAT!r}; this is not a maps folder.")
    if config.get("format_version") not in READABLE:
        raise ArtifactError(
            f"{path}: format_version is {config.get('format_version')!r}, this release reads "
            f"{' and '.join(map(str, READABLE))}; "
            "install a matching hashattention or train the maps again."
        )
    return config


def refuse_lfs_pointer(path: Path) -> None:
    """Raise `ArtifactError` if `path` is a git-LFS pointer instead of the file it stands for."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ArtifactError(
                f"{path} is a git-LFS pointer, not the file; run `git lfs pull` or download the file itself."
            )


def locate(name: str | os.PathLike[str]) -> Path:
    """The maps folder that `name` means: a local folder, maps that ship with the package, or a hub id (downloaded).

    Raises
    ------
    ArtifactError
        If none of the three has it; shipped names are listed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    homes = [home for home in _shipped_homes() if home.is_dir()]
    shipped = {path.name: path for home in homes for path in sorted(home.iterdir()) if path.is_dir()}
    if str(name) in shipped:
        return shipped[str(name)]
    if str(name).count("/") != 1 or folder.is_absolute() or str(name).startswith("."):
        known = ", ".join(shipped) or "none"
        raise ArtifactError(
            f"no maps folder at {name!s}; give an existing folder, shipped maps ({known}) or a hub id (owner/name)."
        )
    return _download(str(name))


def _shipped_homes() -> list[Path]:
    package = Path(__file__).parent
    return [package / "_artifacts", package.parent.parent / "artifacts"]


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            f"maps {hub_id!r} are on the hub: pip install 'hashattention[transformers]'"
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"no local folder {hub_id!r}, and the hub did not give it ({reason}).") from error
