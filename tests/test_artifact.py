from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hashattention import artifact
from hashattention.config import BaseModel, MapsConfig
from hashattention.errors import ArtifactError
from hashattention.maps import HashMaps
from hashattention.models.describe import describe

MODEL = BaseModel("LlamaForCausalLM", 4, 6, 2, 16, (1, 3), '{"rope_theta": 10000.0}', "tiny")
CONFIG = MapsConfig(bits=64, widths=(24, 8))
ARTIFACTS = Path(__file__).parent.parent / "artifacts"
QWEN2 = {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
#: What the publishers' `config.json` say of the models that maps ship for.
SHAPES = {
    "smollm2-135m-instruct": (
        "Llama",
        {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "qwen2.5-coder-0.5b-instruct": (
        "Qwen2",
        {**QWEN2, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14},
    ),
    "qwen2.5-coder-1.5b-instruct": (
        "Qwen2",
        {**QWEN2, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12},
    ),
    "gemma-3-270m": (
        "Gemma3",
        {"hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1}
        | {"head_dim": 256, "sliding_window": 512},
    ),
}
SHIPPED = sorted(path.parent.name for path in ARTIFACTS.glob("*/config.json"))


def build(config: MapsConfig = CONFIG) -> HashMaps:
    torch.manual_seed(0)
    return HashMaps(config, MODEL, {"steps": 3})


def edit(folder, change) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path / "maps")
    return tmp_path / "maps"


def test_unknown_version_is_refused(folder):
    edit(folder, lambda document: document.update(format_version=99))
    with pytest.raises(ArtifactError, match=r"format_version is 99, this release reads 1"):
        HashMaps.from_pretrained(folder)


def test_another_format_is_refused(folder):
    edit(folder, lambda document: document.pop("format"))
    with pytest.raises(ArtifactError, match="not a maps folder"):
        HashMaps.from_pretrained(folder)


def test_broken_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        HashMaps.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        HashMaps.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_recognised(folder, name):
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ArtifactError, match="git-LFS pointer"):
        HashMaps.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["key.biases.0"][0, 0, 0] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"key\.biases\.0.* NaN or infinity"):
        HashMaps.from_pretrained(folder)


def test_a_missing_weights_file_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
        HashMaps.from_pretrained(folder)


def test_no_folder_lists_what_exists(tmp_path):
    with pytest.raises(ArtifactError, match=r"no maps folder at .*hub id"):
        HashMaps.from_pretrained(tmp_path / "absent")


def test_a_failed_write_leaves_the_old_folder_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        build(MapsConfig.paper()).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert HashMaps.from_pretrained(folder).config == CONFIG


def test_hub_ids_go_to_the_hub(monkeypatch, folder):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert artifact.locate("someone/some-maps") == folder
    assert asked == [("someone/some-maps", ["config.json", "model.safetensors"])]


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ArtifactError, match=r"'someone/some-maps', and the hub did not give it \(no route"):
        artifact.locate("someone/some-maps")


@pytest.fixture
def small(tmp_path):
    build().save_pretrained(tmp_path / "small", torch.int8)
    return tmp_path / "small"


def test_int8_weights_are_half_as_large_and_of_a_version_of_their_own(folder, small):
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, small)]
    assert sizes[1] < 0.7 * sizes[0], "biases and peaks weigh much in maps as small as these"
    versions = [json.loads((path / "config.json").read_text())["format_version"] for path in (folder, small)]
    assert versions == [1, 2]


def test_what_was_read_from_int8_is_written_alike(small, tmp_path):
    maps = HashMaps.from_pretrained(small)
    maps.save_pretrained(tmp_path / "again", torch.int8)
    assert (small / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    for name, tensor in maps.state_dict().items():
        assert torch.equal(tensor, tensor.bfloat16().float()) or ".biases." in name


@given(st.integers(0, 2**31), st.sampled_from(["key.weights.0", "query.weights.1"]), st.floats(-30, 30))
def test_int8_is_within_half_a_level_and_settles_at_once(seed, name, octave):
    torch.manual_seed(seed)
    weight = torch.randn(2, 3, 7, 5) * 2**octave * torch.randn(2, 3, 7, 1).exp()
    weight[0, 0, 0] = 0
    packed = artifact.pack({name: weight}, torch.int8)
    found = artifact.unpack(packed)[name].float()
    peak = packed[name + artifact.PEAK].float()
    # Half a level, and what bfloat16 rounds away of peak and weight.
    assert ((found - weight).abs() <= peak * (0.5 / 127 + 2**-8)).all()
    again = artifact.pack({name: found}, torch.int8)
    assert all(torch.equal(again[key], packed[key]) for key in packed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("key.weights.1.peak"), "peaks of int8 weights do not fit"),
        (lambda tensors: tensors.update({"key.weights.1.peak": torch.ones(2, 2, 1, 3)}), "do not fit"),
        (lambda tensors: tensors["query.weights.0.peak"].fill_(float("nan")), "NaN or infinity"),
    ],
)
def test_damaged_peaks_are_refused(small, damage, message):
    tensors = load_file(small / "model.safetensors")
    damage(tensors)
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        HashMaps.from_pretrained(small)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_maps_load_by_name_and_say_where_they_come_from(name):
    assert artifact.locate(name) == ARTIFACTS / name
    maps = HashMaps.from_pretrained(name)
    assert maps.config.bits == 64 and len(maps.temperatures) == len(maps.model.layers)
    origin = maps.training_info["origin"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", origin["commit"]) and origin["device"] and origin["libraries"]["torch"]
    assert not re.search(r"(^|[\s=])[/~]", origin["command"]), "a command names no folder of whoever ran it"
    card = (ARTIFACTS / name / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {maps.model.name}\n") and "\nlicense: " in card
    assert (ARTIFACTS / name / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_maps_fit_their_model_by_its_shape_alone(name):
    prefix, shape = SHAPES[name]
    config = getattr(transformers, f"{prefix}{'TextConfig' if prefix == 'Gemma3' else 'Config'}")
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config(vocab_size=8, pad_token_id=0, **shape))
    maps = HashMaps.from_pretrained(name)
    maps.check_model(describe(model))
    heads, width = maps.model.num_key_value_heads, maps.model.head_dim
    signatures = maps.layer(maps.model.layers[-1]).sign_keys(torch.randn(1, heads, 5, width))
    assert signatures.shape == (1, heads, 5, 2) and signatures.dtype == torch.int32


def test_every_folder_of_shipped_maps_is_listed():
    listed = (ARTIFACTS / "README.md").read_text()
    assert SHIPPED == sorted(SHAPES) == sorted(re.findall(r"^\| \[([^]]+)\]\(\1/README\.md\)", listed, re.MULTILINE))


def test_a_file_beside_the_shipped_maps_is_not_one_of_them():
    with pytest.raises(ArtifactError, match=r"shipped maps \((?!.*README)"):
        artifact.locate("README.md")
