"""Sweep: the variants of a study, read from a TOML file."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hashattention.config import from_mapping
from hashattention.errors import ConfigError
from hashattention.train.recipe import Recipe

#: A variant's `base` that means the best variant so far.
BEST = "best"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One training of a study: what it changes and where it starts.

    Parameters
    ----------
    name : str
    changes : mapping
        Recipe fields; those under "maps" are fields of `MapsConfig`.
    base : str
        The variant whose recipe is changed; "" is the study's own recipe, "best" the best one before this variant.
    layers : tuple of int, optional
        Layers of the model that are trained and measured; by default the study's.
    tests : bool
        Measure on the test texts too.
    save : bool
        Write the maps.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: str = ""
    layers: tuple[int, ...] | None = None
    tests: bool = False
    save: bool = False

    def recipe(self, start: Recipe) -> Recipe:
        """The recipe `start` with this variant's changes."""
        values, changes = start.as_dict(), dict(self.changes)
        maps = values["maps"] | dict(changes.pop("maps", {}))
        return Recipe.from_mapping({**values, **changes, "maps": maps}, f"variant {self.name!r}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A study: one capture of a model's queries and keys, and the variants that are trained on it, in order.

    Parameters
    ----------
    recipe : Recipe
        What every variant starts from; its `context`, `sequences`, `queries` ... say what is captured.
    variants : tuple of Variant
    layers : tuple of int, optional
        By default all of the model's full-attention layers.
    judge : float
        Heavy budget whose ratio to exact shared selection decides which variant is best.
    tests : mapping
        Name to texts that take no part in any choice.
    test_sequences : int
        Sequences of each of them.
    model : str
        What `load_model` takes; a command may give another.
    texts, held_out_texts : str or list
        What is read for training, and for choosing.
    """

    recipe: Recipe
    variants: tuple[Variant, ...]
    layers: tuple[int, ...] | None = None
    judge: float = 1 / 32
    tests: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    test_sequences: int = 4
    model: str = ""
    texts: Any = None
    held_out_texts: Any = None

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"sweep: two variants are called {twice[0]!r}; names are what rows are found by.")
        for place, variant in enumerate(self.variants):
            if variant.base not in ("", BEST, *names[:place]):
                raise ConfigError(
                    f"sweep: variant {variant.name!r} starts from {variant.base!r}, which no variant before it is "
                    f"called; known: {', '.join([BEST, *names[:place]])}."
                )
            if variant.base != BEST:
                variant.recipe(self.recipe)
        if self.judge not in self.recipe.budgets:
            raise ConfigError(f"sweep: judge must be one of the budgets {self.recipe.budgets}; given {self.judge!r}.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Sweep:
        """Build from plain values: ``[recipe]``, ``[[variants]]`` and ``[grid]`` (a list of values a field: all
        combinations).

        Raises
        ------
        ConfigError
            For an unknown key (the nearest known one is named) or a value that is not allowed.
        """
        plain = dict(values)
        recipe = Recipe.from_mapping(plain.pop("recipe", {}), f"{where}: recipe")
        variants = [_variant(each, f"{where}: variants") for each in plain.pop("variants", [])]
        variants += _grid(plain.pop("grid", {}), f"{where}: grid")
        if not variants:
            raise ConfigError(f"{where}: no variants; add [[variants]] tables or a [grid].")
        return from_mapping(cls, {**plain, "recipe": recipe, "variants": variants}, where)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Sweep:
        """Read a sweep file.

        Raises
        ------
        ConfigError
            If the file is missing, not TOML, or holds an unknown key.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"no sweep at {path} ({error.strerror}); give a .toml file.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not a TOML file: {error}.") from error
        return cls.from_mapping(values, str(path))


def _variant(values: Mapping[str, Any], where: str) -> Variant:
    own = {field.name for field in dataclasses.fields(Variant)} - {"changes"}
    kept = {key: value for key, value in values.items() if key in own}
    changes = {key: value for key, value in values.items() if key not in own}
    return from_mapping(Variant, {**kept, "changes": changes}, where)


def _grid(values: Mapping[str, Any], where: str) -> list[Variant]:
    found = []
    for key, choices in values.items():
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}: {key} must be a list of values; given {choices!r}.")
    for picked in itertools.product(*values.values()) if values else ():
        changes: dict[str, Any] = {}
        for key, value in zip(values, picked, strict=True):
            field, _, inner = key.partition(".")
            changes[field] = {**changes.get(field, {}), inner: value} if inner else value
        name = ", ".join(f"{key} {_said(value)}" for key, value in zip(values, picked, strict=True))
        found.append(Variant(name, changes))
    return found


def _said(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
