from __future__ import annotations

import socket

import pytest
import torch
from tests.train.bytes_model import tiny_model, tiny_recipe, write_texts
from torch import distributed, multiprocessing

from hashattention.config import BaseModel
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.train.ranks import Ranks, start
from hashattention.train.run import train

BASE = BaseModel("LlamaForCausalLM", 7, 4, 2, 16, (0, 2, 3, 5, 6), "theta")


def work(rank, world, port, texts, out):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world, rank=rank)
    told = []
    report = train(tiny_model(), texts, out, tiny_recipe(), progress=lambda *what: told.append(what))
    assert bool(told) == (rank == 0)
    assert len(report["metrics"]["budgets"][0]["hash"]["error_by_layer"]) == 3
    distributed.destroy_process_group()


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_two_processes_give_what_one_gives(tmp_path):
    texts = write_texts(tmp_path / "texts")
    alone = train(tiny_model(), texts, tmp_path / "one", tiny_recipe())
    multiprocessing.spawn(work, (2, free_port(), texts, tmp_path / "two"), nprocs=2)
    one, two = (HashMaps.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert two.remainder == one.remainder is not None
    assert two.model == one.model and two.training_info["metrics"] == alone["metrics"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_layer_has_one_rank(world):
    shares = [Ranks(rank, world).share(BASE).layers for rank in range(world)]
    assert sum(shares, ()) == BASE.layers
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_layers_are_refused():
    with pytest.raises(ConfigError, match="at most 5"):
        Ranks(0, 6).share(BASE)


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start("cpu") == "cpu" and not distributed.is_initialized() and Ranks.here() == Ranks(0, 1)
