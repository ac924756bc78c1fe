"""Ranks: several processes train one model's maps, each the layers of its own; `torchrun` starts them."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from hashattention.config import BaseModel
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.train.recipe import Recipe

Made = TypeVar("Made")

#: How long ranks wait for one of them: the first fits the remainder alone.
PATIENCE = datetime.timedelta(hours=4)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A process among its equals; alone without `torchrun`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """The process group's, if there is one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes the result and talks to people."""
        return self.rank == 0

    def share(self, base: BaseModel) -> BaseModel:
        """`base` with the layers this rank trains: runs of equal length, up to one.

        Raises
        ------
        ConfigError
            If there are more processes than layers.
        """
        count = len(base.layers)
        if self.world > count:
            raise ConfigError(
                f"{self.world} processes share {count} layers; start at most {count} (torchrun --nproc-per-node)."
            )
        first, last = (count * at // self.world for at in (self.rank, self.rank + 1))
        return dataclasses.replace(base, layers=base.layers[first:last])

    def join_maps(self, maps: HashMaps, recipe: Recipe, base: BaseModel) -> HashMaps:
        """The maps of all ranks, on every rank."""
        if self.world == 1:
            return maps
        parts = self._all({name: tensor.cpu() for name, tensor in maps.state_dict().items()})
        whole = HashMaps(recipe.maps, base)
        whole.load_state_dict({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        return whole.requires_grad_(False)

    def join_tables(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measurements ``[budgets, layers, ...]`` of the layers of all ranks, on every rank."""
        if self.world == 1:
            return tables
        parts = self._all(tables)
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in tables}

    def by_first(self, make: Callable[[], Made]) -> Made:
        """What `make` gives in the first process, on every rank."""
        made = make() if self.first else None
        return cast(Made, made if self.world == 1 else self._all(made)[0])

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            distributed.barrier()

    def _all(self, mine: Any) -> list[Any]:
        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, mine)
        return parts


def start(device: str) -> str:
    """Join the process group that `torchrun` set up, if it did; the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    on_gpu = torch.device(device).type == "cuda"
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if not on_gpu:
        return device
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    torch.cuda.set_device(own)
    return own
