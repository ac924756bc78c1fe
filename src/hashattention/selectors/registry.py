"""Methods by name: ``"quest:page=16,bits=4"`` -> a selector; a method's module is imported when it is asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hashattention.config import BaseModel
from hashattention.errors import ConfigError, UnsupportedModelError
from hashattention.maps import HashMaps
from hashattention.selectors.base import Selector


@dataclasses.dataclass(frozen=True)
class Method:
    """Where a method lives, what its options are (name -> type), and what else it needs."""

    module: str
    name: str
    options: Mapping[str, Callable[[str], Any]] = dataclasses.field(default_factory=dict)
    needs: str = ""

    def load(self) -> Callable[..., Selector]:
        """The selector's class."""
        found: Callable[..., Selector] = getattr(importlib.import_module(f"{__package__}.{self.module}"), self.name)
        return found


def yes_or_no(text: str) -> bool:
    """``"yes"`` or ``"no"``."""
    if text not in ("yes", "no"):
        raise ValueError
    return text == "yes"


SHARED = {"share": str, "pooling": str}
METHODS = {
    "oracle": Method("oracle", "OracleSelector", SHARED),
    "top_p": Method("top_p", "TopPSelector", {"p": float, "share": str, "union": yes_or_no}),
    "hash": Method("hash", "HashSelector", {"backend": str, "top_p": float, "remainder": yes_or_no}, needs="maps"),
    "streaming": Method("streaming", "StreamingSelector"),
    "h2o": Method("h2o", "H2oSelector", {"evict": yes_or_no}),
    "infllm": Method("infllm", "InfLlmSelector", {"block": int, "representatives": int, **SHARED}),
    "quest": Method("quest", "QuestSelector", {"page": int, "bits": int, **SHARED}),
    "double_sparsity": Method("double_sparsity", "DoubleSparsitySelector", {"channels": int, "bits": int, **SHARED}),
    "lsh": Method("lsh", "LshSelector", {"bits": int, "seed": int, "share": str}, needs="model"),
    "hata": Method("hata", "HataSelector", {"bits": int, "seed": int}, needs="model"),
    "sampled": Method("sampled", "SampledTail", {"fraction": float, "seed": int}, needs="method"),
}


def create(
    text: str,
    *,
    model: BaseModel | None = None,
    maps: HashMaps | None = None,
    layers: Iterable[int] | None = None,
    device: str | torch.device = "cpu",
) -> Selector:
    """A selector from its name and options; ``+sampled`` after them gives it a sampled tail.

    Parameters
    ----------
    text : str
        ``"method"`` or ``"method:option=value,..."``, then perhaps ``"+sampled:fraction=0.5"``.
    model : BaseModel, optional
        The transformer it is for: LSH and HATA need its shape, and every method is checked against it.
    maps : HashMaps, optional
        Trained maps, for ``"hash"``.
    layers : iterable of int, optional
        Layers to serve; default: all that can be.
    device : str or torch.device
        Where random hyperplanes are put.

    Raises
    ------
    ConfigError
        For an unknown method or option (the nearest is named), a bad value, or something missing.
    UnsupportedModelError
        If the method, or one of `layers`, cannot run on `model`.
    ArtifactError
        If `maps` were trained for another model.

    Examples
    --------
    >>> create("quest:page=16,bits=4").auxiliary_bits(128)
    68.0
    """
    first, *wrappers = text.split("+")
    selector = _build(first, model=model, maps=maps, device=device)
    for wrapper in wrappers:
        selector = _build(wrapper, method=selector)
    if model is not None:
        if maps is not None:
            maps.check_model(model)
        check(selector, text, model, layers)
    if layers is not None:
        selector.layers = tuple(layers)
    return selector


def check(selector: Selector, name: str, model: BaseModel, layers: Iterable[int] | None = None) -> None:
    """Raise `UnsupportedModelError` unless `selector` can run on those layers of `model`."""
    reason = selector.refuse(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name} cannot run on {model.name or model.architecture}: {reason}.")
    able = model.layers if selector.layers is None else selector.layers
    for layer in () if layers is None else layers:
        if layer not in able:
            raise UnsupportedModelError(
                f"{name} cannot run on layer {layer} of {model.name or model.architecture}: it needs every token of "
                "the context, and that layer has a sliding window, no attention or no trained map. Leave it out (it "
                f"stays dense); layers that can be served: {', '.join(map(str, able))}."
            )


def _build(text: str, **given: Any) -> Selector:
    name, _, tail = text.strip().partition(":")
    method = METHODS[_known(name, METHODS, "method")]
    if method.needs and given.get(method.needs) is None:
        raise ConfigError(f"method {name!r} needs {method.needs}; {ADVICE[method.needs]}")
    if "method" in given and method.needs != "method":
        raise ConfigError(f"only 'sampled' may follow a '+'; given {name!r}.")
    options = dict(_option(name, method, part) for part in tail.split(",") if part)
    if method.needs:
        options[method.needs] = given[method.needs]
    selector = method.load()
    if "device" in inspect.signature(selector).parameters:
        options["device"] = given["device"]
    return selector(**options)


ADVICE = {
    "maps": "pass maps=HashMaps.from_pretrained(...).",
    "model": "pass model=describe(model), from hashattention.models.describe.",
    "method": "write it after another one, as in 'quest:page=16+sampled:fraction=0.5'.",
}


def _option(name: str, method: Method, text: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    _known(key, method.options, f"option of {name}")
    kind = method.options[key]
    try:
        return key, kind(value if equals else "")
    except ValueError as error:
        names = {"int": "a whole number", "float": "a number", "yes_or_no": "yes or no"}
        raise ConfigError(f"{name}: {key} must be {names[kind.__name__]}; given {value!r}.") from error


def _known(name: str, known: Iterable[str], what: str) -> str:
    if name in (names := sorted(known)):
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}."
    raise ConfigError(f"unknown {what} {name!r}; {hint}")
