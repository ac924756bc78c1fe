"""The model a verb works on: what its options name, and loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hashattention.errors import ConfigError
from hashattention.models.packaged import Progress

if TYPE_CHECKING:
    from hashattention.models.source import LoadedModel


def load(name: str, device: str, dtype: Any, report: Progress) -> LoadedModel:
    """Load a model, saying so through `report` instead of through transformers' own bars."""
    from transformers.utils import logging

    from hashattention import load_model

    logging.disable_progress_bar()
    report(f"loading {name}", 0, 0)
    return load_model(name, dtype=dtype, device=device, progress=report)


def parse_dtype(name: str | None, device: str = "") -> Any:
    """The torch dtype of a name; without one float32 on a CPU, elsewhere None (as stored).

    Raises
    ------
    ConfigError
        For a name that is not a dtype models run in.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}; given {name!r}.")
    if name is None and device.startswith("cpu"):
        # Few CPUs multiply fast in the 16-bit types that models are stored in.
        return torch.float32
    return None if name is None else known[name]


def parse_device(name: str | None) -> str:
    """A device name; by default a GPU if there is one.

    Raises
    ------
    ConfigError
        For a device that torch does not know or that is not there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}); give cpu, or cuda where there is a GPU."
        ) from error
    return name
