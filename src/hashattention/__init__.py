"""hashattention: long-context decoding that reads only the tokens that matter.

Importing this package imports nothing else: names below load their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashattention.config import BaseModel, Budget, MapsConfig
    from hashattention.integrations.transformers import attach
    from hashattention.maps import HashMaps
    from hashattention.models.source import load_model

__version__ = "0.1.0"

_HOMES = {
    "BaseModel": "hashattention.config",
    "Budget": "hashattention.config",
    "HashMaps": "hashattention.maps",
    "MapsConfig": "hashattention.config",
    "attach": "hashattention.integrations.transformers",
    "load_model": "hashattention.models.source",
}

__all__ = ["BaseModel", "Budget", "HashMaps", "MapsConfig", "attach", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hashattention' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
