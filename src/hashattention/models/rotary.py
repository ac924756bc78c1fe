"""Rotary: the frequencies that undo a transformers model's rotary embedding, or why it cannot be undone."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from hashattention.errors import UnsupportedModelError
from hashattention.models.describe import attention_modules, describe
from hashattention.rotation import unrotate

#: Kinds of scaling that leave the frequencies alone, however long the context.
FIXED = ("default", "linear", "llama3", "yarn")
#: Positions, and how near to its input a rotated and unrotated tensor must come back.
PROBED, NEAR = (0, 1, 7, 300), 1e-3


def rotary_frequencies(model: Any) -> tuple[float, ...]:
    """Radians per position of each rotated pair of channels, in the model's full-attention layers
    (`BaseModel.frequencies`).

    They are tried on the model's own functions: what these rotate must come back.

    Raises
    ------
    UnsupportedModelError
        For a model without rotary embedding (in some layer), one whose frequencies change with the length, or one that
        rotates other pairs of channels than i and i + F.
    """
    base, modules = describe(model), attention_modules(model)
    decoder, first = model.get_decoder(), modules[base.layers[0]]
    rotary, rotate = (
        getattr(decoder, "rotary_emb", None),
        getattr(sys.modules[type(first).__module__], "apply_rotary_pos_emb", None),
    )
    if rotary is None or rotate is None:
        raise _refusal(base.architecture, "has no rotary embedding that can be undone")
    bare = [layer for layer in base.layers if not getattr(modules[layer], "use_rope", True)]
    if bare:
        raise _refusal(base.architecture, f"has no rotary embedding in layers {bare}")
    kind = json.loads(base.rope).get("rope_type", "default")
    if kind not in FIXED:
        raise _refusal(base.architecture, f"has {kind!r} rotary scaling: its frequencies may change with the length")
    found, scaling = _embedding(rotary)
    if not _comes_back(rotary, rotate, found, scaling):
        raise _refusal(base.architecture, "rotates other pairs of channels than the two halves'")
    return tuple(found.tolist())


def _refusal(architecture: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{architecture} {reason}, so its maps cannot take keys before RoPE; use rope='after' (the default)."
    )


def _embedding(rotary: nn.Module) -> tuple[Tensor, float]:
    """Frequencies float32 ``[F]``, and the constant on the cosine and sine."""
    kind = "full_attention_" if hasattr(rotary, "full_attention_inv_freq") else ""
    return getattr(rotary, f"{kind}inv_freq").float(), getattr(rotary, f"{kind}attention_scaling", 1.0)


@torch.no_grad()
def _comes_back(rotary: nn.Module, rotate: Any, frequencies: Tensor, scaling: float) -> bool:
    x = torch.randn(1, 1, len(PROBED), 2 * len(frequencies), generator=torch.Generator().manual_seed(0))
    x, places = x.to(frequencies.device), torch.tensor([PROBED], device=frequencies.device)
    kind = {"layer_type": "full_attention"} if hasattr(rotary, "full_attention_inv_freq") else {}
    cos, sin = rotary(x, places, **kind)
    if cos.shape[-1] != x.shape[-1]:
        return False
    turned = rotate(x, x, cos, sin)[1]
    return torch.allclose(unrotate(turned, places, frequencies) / scaling, x, atol=NEAR)
