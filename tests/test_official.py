"""Synthetic files of the released form; the checkpoints themselves are large and not at hand."""

from __future__ import annotations

import itertools
import os
import pickle

import pytest
import torch

from hashattention.config import BaseModel
from hashattention.errors import ArtifactError
from hashattention.maps import HashMaps
from hashattention.official import import_official

MODEL = BaseModel("LlamaForCausalLM", 2, 4, 2, 16, (0, 1), "{}")
WIDTHS = {2: (16, 16, 32), 3: (16, 16, 16, 32)}


def stages(seed: int, widths):
    generator = torch.Generator().manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    return [(torch.randn(4, i, o, generator=generator), torch.randn(4, o, generator=generator)) for i, o in pairs]


def tables(depth: int):
    return {layer: {side: stages(10 * layer + ord(side), WIDTHS[depth]) for side in "qk"} for layer in (0, 1)}


def write_pt(path, table, dtype=torch.float32):
    state = {}
    for layer, sides in table.items():
        for side, parts in sides.items():
            for stage, (weight, bias) in enumerate(parts):
                for head in range(len(weight)):
                    name = f"{layer}.learning_to_hash_transformation_{side}.{head}.{2 * stage}"
                    state[f"{name}.weight"] = weight[head].T.contiguous().to(dtype)
                    state[f"{name}.bias"] = bias[head].to(dtype)
    torch.save(state, path)


def write_pkl(path, table):
    names = {"q": "query", "k": "key"}
    document = {
        layer: {
            f"{names[side]}_{kind}": [part[index] for part in parts]
            for side, parts in sides.items()
            for index, kind in enumerate(("matrix", "bias"))
        }
        for layer, sides in table.items()
    }
    with path.open("wb") as stream:
        pickle.dump(document, stream)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize(("suffix", "write"), [(".pt", write_pt), (".pkl", write_pkl)])
def test_both_forms_give_the_same_maps(tmp_path, depth, suffix, write):
    table = tables(depth)
    write(tmp_path / f"maps{suffix}", table)
    maps = import_official(tmp_path / f"maps{suffix}", MODEL)
    assert (maps.config.bits, maps.config.widths) == (32, (16,) * (depth - 1))
    assert maps.config.score == "symmetric"
    for layer in (0, 1):
        for mlp, side in ((maps.query, "q"), (maps.key, "k")):
            for stage, (weight, bias) in enumerate(table[layer][side]):
                assert torch.equal(mlp.weights[stage][layer], weight)
                assert torch.equal(mlp.biases[stage][layer], bias)
    key = torch.randn(1, 2, 5, 16)
    hidden = key.repeat_interleave(2, 1)
    for stage, (weight, bias) in enumerate(table[1]["k"]):
        hidden = (hidden if stage == 0 else torch.nn.functional.silu(hidden)) @ weight + bias[:, None]
    signature = maps.layer(1).sign_keys(key)[..., 0]
    for bit in (0, 13, 31):
        assert torch.equal((signature >> bit & 1).bool(), hidden[..., bit] > 0)


def test_imported_maps_can_be_saved_as_a_folder(tmp_path):
    write_pt(tmp_path / "maps.pt", tables(3), torch.bfloat16)
    maps = import_official(tmp_path / "maps.pt", MODEL)
    maps.save_pretrained(tmp_path / "maps")
    again = HashMaps.from_pretrained(tmp_path / "maps", MODEL)
    assert all(torch.equal(a, b) for a, b in zip(maps.parameters(), again.parameters(), strict=True))
    assert again.training_info == {"recipe": "official", "file": "maps.pt"}


class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_a_pickle_is_never_executed(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    with open(f"evil{suffix}", "wb") as stream:
        pickle.dump({0: Attack()}, stream)
    with pytest.raises(ArtifactError, match="nothing in it was executed"):
        import_official(f"evil{suffix}", MODEL)
    assert not (tmp_path / "executed").exists()


def test_the_refused_global_is_named(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({0: Attack()}))
    with pytest.raises(ArtifactError, match=r"asks for (posix|nt)\.mkdir"):
        import_official(tmp_path / "evil.pkl", MODEL)


def test_an_attack_inside_a_storage_is_refused(tmp_path, monkeypatch):
    """The bytes of a tensor's storage are a second pickle: they are read with weights_only."""
    monkeypatch.chdir(tmp_path)

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Attack()),)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({0: Storage()}))
    with pytest.raises(ArtifactError, match="nothing in it was executed"):
        import_official("evil.pkl", MODEL)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"maps{suffix}"
    (write_pt if suffix == ".pt" else write_pkl)(path, tables(2))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ArtifactError, match="is not a plain"):
        import_official(path, MODEL)


def test_a_git_lfs_pointer_and_a_missing_file(tmp_path):
    (tmp_path / "maps.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ArtifactError, match="git-LFS pointer"):
        import_official(tmp_path / "maps.pt", MODEL)
    with pytest.raises(ArtifactError, match="no checkpoint at"):
        import_official(tmp_path / "absent.pt", MODEL)


def test_an_unknown_key_is_named(tmp_path):
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match=r"lm_head\.weight"):
        import_official(tmp_path / "model.pt", MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.pop(1), r"layers \[0\], the model has \[0, 1\]"),
        (lambda table: table[1]["q"].pop(), "in 1 layers"),
        (lambda table: table[0].update(q=stages(0, (8, 16, 32))), "checkpoint of another model"),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path, change, message):
    table = tables(2)
    change(table)
    write_pkl(tmp_path / "maps.pkl", table)
    with pytest.raises(ArtifactError, match=message):
        import_official(tmp_path / "maps.pkl", MODEL)
