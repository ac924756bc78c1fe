from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from hashattention.config import BaseModel, MapsConfig
from hashattention.errors import ArtifactError, ConfigError
from hashattention.maps import KEY_CHUNK, HashMaps
from hashattention.ops import reference

MODEL = BaseModel("LlamaForCausalLM", 4, 6, 2, 16, (1, 3), '{"rope_theta": 10000.0}', "tiny")
CONFIGS = {
    "group": MapsConfig(bits=64, widths=(24, 8)),
    "paper": MapsConfig.paper(),
    "heads": MapsConfig(bits=96, widths=(8,), query_input="head", selection_share="query_head"),
    "mixture": MapsConfig(bits=32, widths=(8,), mixture=3),
    "linear": MapsConfig(bits=32, widths=(), score="symmetric"),
}


def build(name: str = "group") -> HashMaps:
    torch.manual_seed(0)
    return HashMaps(CONFIGS[name], MODEL, {"steps": 3})


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_signatures_are_one_mlp_a_head(name):
    """Against a plain loop over heads with torch.nn.functional."""
    maps, config = build(name), CONFIGS[name]
    query, key = torch.randn(2, 6, 3, 16), torch.randn(2, 2, 5, 16)
    layer = maps.layer(3)

    def run(stages: int, x, weights, biases, head):
        for stage in range(stages):
            x = x if stage == 0 else torch.nn.functional.silu(x)
            x = torch.nn.functional.linear(x, weights[stage][head].T, biases[stage][head])
        return x

    stages = len(config.widths) + 1
    signatures = layer.sign_keys(key)
    heads = config.signature_heads(MODEL)
    assert signatures.shape == (2, heads, 5, config.words)
    for head in range(heads):
        logits = run(stages, key[:, head * 2 // heads], layer.key_weights, layer.key_biases, head)
        assert torch.equal(reference.unpack_bits(signatures[:, head]), logits > 0)
    codes = layer.code_queries(query)
    for head in range(config.code_heads(MODEL)):
        x = (
            query[:, head]
            if config.query_input == "head"
            else query[:, head * 3 : head * 3 + 3].transpose(1, 2).flatten(2)
        )
        logits = run(stages, x, layer.query_weights, layer.query_biases, head)
        if config.score == "symmetric":
            assert torch.equal(reference.unpack_bits(codes[:, head]), logits > 0)
        else:
            torch.testing.assert_close(
                codes[:, head].float(), logits / logits.abs().amax(-1, keepdim=True) * 7, atol=0.5001, rtol=0
            )


def test_long_keys_are_signed_in_chunks_of_no_consequence():
    layer = build().layer(1)
    key = torch.randn(1, 2, KEY_CHUNK + 3, 16)
    pieces = [layer.sign_keys(part) for part in key.split([KEY_CHUNK - 100, 103], dim=2)]
    assert torch.equal(layer.sign_keys(key), torch.cat(pieces, 2))


def test_paper_and_default_spend_the_bits_they_say():
    assert MapsConfig.paper().bits * MapsConfig.paper().signature_heads(MODEL) == 32 * 6
    assert MapsConfig().bits * MapsConfig().signature_heads(MODEL) == 64 * 2


def test_a_layer_without_a_map_is_named():
    with pytest.raises(ConfigError, match=r"layer 0 has no hash map; layers with one: \[1, 3\]"):
        build().layer(0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_round_trip(tmp_path, name, dtype):
    maps = build(name)
    maps.save_pretrained(tmp_path / "maps", dtype=dtype)
    again = HashMaps.from_pretrained(tmp_path / "maps", MODEL)
    assert again.config == maps.config
    assert again.model == maps.model
    assert again.training_info == {"steps": 3}
    for name, mine in maps.state_dict().items():
        kept = mine.to(dtype).float() if ".weights." in name else mine
        assert torch.equal(kept, again.state_dict()[name])
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "Qwen2ForCausalLM"),
        ("num_hidden_layers", 5),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 1),
        ("head_dim", 32),
        ("rope", "{}"),
        ("layers", (0, 1)),
    ],
)
def test_each_field_of_another_model_is_refused(field, value):
    with pytest.raises(ArtifactError, match=rf"{field} is .*train maps for this model"):
        build().check_model(dataclasses.replace(MODEL, **{field: value}))


def test_the_name_and_more_layers_may_differ():
    build().check_model(dataclasses.replace(MODEL, name="elsewhere", layers=(0, 1, 2, 3)))


def edit(folder, change) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path / "maps")
    return tmp_path / "maps"


def test_unknown_key_names_the_nearest(folder):
    edit(folder, lambda document: document["maps"].update(bit=64))
    with pytest.raises(ConfigError, match="unknown key 'bit'; did you mean 'bits'"):
        HashMaps.from_pretrained(folder)


def test_missing_key_is_named(folder):
    edit(folder, lambda document: document["base_model"].pop("head_dim"))
    with pytest.raises(ConfigError, match="missing head_dim"):
        HashMaps.from_pretrained(folder)


def test_weights_of_another_shape_are_refused(folder):
    edit(folder, lambda document: document["maps"].update(bits=32))
    with pytest.raises(ArtifactError, match="do not belong together"):
        HashMaps.from_pretrained(folder)


REMAINDER = (((0.5, 1.0, -0.25),) * 6, ((-1.5, 0.125, 0.0),) * 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_remainder_makes_the_round_trip(tmp_path, dtype):
    maps = HashMaps(CONFIGS["group"], MODEL, {"steps": 3}, remainder=REMAINDER)
    maps.save_pretrained(tmp_path / "maps", dtype)
    assert HashMaps.from_pretrained(tmp_path / "maps", MODEL).remainder == maps.remainder == REMAINDER


def test_maps_without_a_remainder_write_none(folder):
    assert "remainder" not in json.loads((folder / "config.json").read_text())
    assert HashMaps.from_pretrained(folder).remainder is None


def numbers(layers=2, heads=6, count=3, value=0.5):
    return [[[value] * count for _ in range(heads)] for _ in range(layers)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (numbers(layers=1), "remainder must hold 2 layers of 6 times 3 numbers; given 1"),
        (numbers(layers=3), "given 3"),
        (numbers(heads=2), r"remainder must hold 6 query heads of 3 numbers; given 2 query heads of \[3\]"),
        (numbers(count=2), r"given 6 query heads of \[2\]"),
        ([numbers(1)[0], []], r"given 0 query heads of \[\]"),
        ([[[0.5] * 3] * 5 + [[0.5] * 4], numbers(1)[0]], r"given 6 query heads of \[3, 4\]"),
        (numbers(value=float("nan")), "must be below 1e.06; given nan. Train the maps again"),
        (numbers(value=float("-inf")), "must be below 1e.06; given -inf"),
        (numbers(value="high"), "a list of numbers for each of the query heads"),
        (numbers(value=None), "a list of numbers"),
        (numbers(value=[0.5]), "a list of numbers"),
        ([3.0, 4.0], "a list of numbers"),
        (3.0, "2 layers of 6 times 3 numbers; given 3.0"),
        ("ab", "given 'ab'"),
        ({"0": 1, "1": 2}, "given {'0': 1"),
    ],
)
def test_a_bad_remainder_is_refused(folder, given, message):
    with pytest.raises(ConfigError, match=message):
        HashMaps(CONFIGS["group"], MODEL, remainder=given)
    edit(folder, lambda document: document.update(remainder=given))
    with pytest.raises(ConfigError, match=message):
        HashMaps.from_pretrained(folder)
