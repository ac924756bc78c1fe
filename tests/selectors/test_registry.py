from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from tests.tiny import build

from hashattention import BaseModel, HashMaps, MapsConfig
from hashattention.errors import ArtifactError, ConfigError, UnsupportedModelError
from hashattention.models.describe import describe
from hashattention.selectors.base import Selector
from hashattention.selectors.registry import METHODS, create

MODEL = BaseModel("LlamaForCausalLM", 4, 4, 2, 16, (0, 2, 3), "{}", "tiny")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_is_a_parameter_of_its_class(name):
    method = METHODS[name]
    parameters = inspect.signature(method.load()).parameters
    assert set(method.options) <= set(parameters)
    assert not method.needs or method.needs in parameters


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"sampled"}))
def test_a_bare_name_is_the_class_with_its_defaults(name):
    selector = create(name, model=MODEL, maps=HashMaps(MapsConfig(32, ()), MODEL) if name == "hash" else None)
    assert isinstance(selector, Selector)
    assert selector.auxiliary_bits(128) >= 0


def test_options_reach_the_selector():
    selector = create(" quest:page=8, bits=2 ,share=query_head,pooling=rank+sampled:fraction=0.25,seed=5")
    assert (selector.fraction, selector.seed, selector.share) == (0.25, 5, "query_head")
    assert (selector.method.page, selector.method.bits, selector.method.pooling) == (8, 2, "rank")
    assert create("h2o:evict=no").evict is False
    assert create("top_p:p=0.9,union=no").union is False
    assert create("lsh:bits=64,seed=3", model=MODEL).maps.config.bits == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qest", "unknown method 'qest'; did you mean 'quest'?"),
        ("magic", "unknown method 'magic'; known: double_sparsity, h2o"),
        ("", "unknown method ''; known:"),
        ("quest:pages=16", "unknown option of quest 'pages'; did you mean 'page'?"),
        ("streaming:window=4", "unknown option of streaming 'window'; known: none"),
        ("quest:page=many", "quest: page must be a whole number; given 'many'"),
        ("quest:page", "quest: page must be a whole number; given ''"),
        ("top_p:p=high", "top_p: p must be a number; given 'high'"),
        ("h2o:evict=1", "h2o: evict must be yes or no; given '1'"),
        ("quest:page=0", "page must be a whole number >= 1; given 0"),
        ("hash", "method 'hash' needs maps"),
        ("lsh", "method 'lsh' needs model"),
        ("sampled", "method 'sampled' needs method; write it after another one"),
        ("quest+oracle", "only 'sampled' may follow"),
        ("quest+sampled+sampled", "wrap it once"),
    ],
)
def test_a_bad_text_says_what_to_write(text, message):
    with pytest.raises(ConfigError) as error:
        create(text)
    assert message in str(error.value)


def test_layers_that_cannot_be_served_say_why():
    assert create("quest", model=MODEL, layers=[0, 3]).layers == (0, 3)
    with pytest.raises(UnsupportedModelError, match=r"quest cannot run on layer 1 of tiny: .*sliding.*served: 0, 2, 3"):
        create("quest", model=MODEL, layers=[0, 1])
    with pytest.raises(UnsupportedModelError, match="heads have 16 channels; ask for fewer"):
        create("double_sparsity:channels=32+sampled", model=MODEL)


def test_a_sliding_layer_of_a_real_model_says_why():
    model = describe(build("gemma3"))
    sliding = next(layer for layer in range(6) if layer not in model.layers)
    with pytest.raises(UnsupportedModelError, match="has a sliding window"):
        create("quest", model=model, layers=[sliding])


def test_maps_of_another_model_are_refused():
    other = BaseModel("LlamaForCausalLM", 4, 8, 2, 16, (0, 2, 3), "{}", "tiny")
    with pytest.raises(ArtifactError, match="num_attention_heads is 8, but the model has 4"):
        create("hash", model=MODEL, maps=HashMaps(MapsConfig(32, ()), other))


def test_methods_are_imported_when_asked_for():
    code = (
        "import sys; from hashattention.selectors.registry import create\n"
        "before = set(sys.modules); create('quest')\n"
        "print(*sorted(m.rpartition('.')[2] for m in set(sys.modules) - before if 'selectors' in m))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["pages", "quest", "rounding", "scored"]


def test_hyperplanes_are_put_where_the_model_runs():
    selector = create("lsh:bits=32", model=MODEL, device=torch.device("meta"))
    assert selector.maps.key.weights[0].device.type == "meta"


def test_top_p_is_an_option_of_the_hash_method():
    maps = HashMaps(MapsConfig(32, (8,)), MODEL, None, None, ((1.0, 1.0),) * len(MODEL.layers))
    assert create("hash:top_p=0.9", maps=maps).top_p == 0.9
    with pytest.raises(ConfigError, match="top_p must be in"):
        create("hash:top_p=1.5", maps=maps)
    maps.temperatures = None
    with pytest.raises(ConfigError, match="these maps have none"):
        create("hash:top_p=0.9", maps=maps)
