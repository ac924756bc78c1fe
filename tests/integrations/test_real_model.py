"""The shipped maps on the model they belong to, through the public interface, on real text."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from transformers import DynamicCache

import hashattention
from hashattention import Budget, HashMaps
from hashattention.evaluation.observe import Recorder
from hashattention.models.describe import describe
from hashattention.selectors.hash import HashSelector
from hashattention.selectors.oracle import OracleSelector

pytestmark = pytest.mark.model
MAPS = "smollm2-135m-instruct"
FACT = "\n\nThe secret code of the blue door is 7412.\n\n"
QUESTION = "What is the secret code of the blue door? Answer with the number only."


@pytest.fixture(scope="module")
def loaded():
    return hashattention.load_model("smollm2-135m-instruct", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(loaded):
    """About 1,300 tokens of a novel with a fact planted in the middle, and a question."""
    novel = files("hashattention").joinpath("texts/persuasion.txt").read_text(encoding="utf-8")
    text = f"{novel[:2600]}{FACT}{novel[2600:5200]}\n\n{QUESTION}"
    chat = [{"role": "user", "content": text}]
    return loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def answer(loaded, inputs, **settings):
    made = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False, **settings)
    return made[:, inputs["input_ids"].shape[1] :]


def test_dense_full_budget_and_a_quarter_of_the_tokens_answer_alike(loaded, inputs):
    dense = answer(loaded, inputs)
    assert "7412" in loaded.tokenizer.decode(dense[0])
    with hashattention.attach(loaded.model, MAPS, budget=1.0):
        assert torch.equal(answer(loaded, inputs), dense)
    # The end of the question is sparse too: the answer begins there.
    with hashattention.attach(loaded.model, MAPS, budget=1 / 4, min_context=0, sparse_tail=24):
        assert "7412" in loaded.tokenizer.decode(answer(loaded, inputs)[0])
    assert torch.equal(answer(loaded, inputs), dense)


def errors(loaded, inputs, selector, budget):
    """Mean output error against dense attention over layers and the last eight prompt positions."""
    base = describe(loaded.model)
    recorder = Recorder()
    with (
        torch.inference_mode(),
        hashattention.attach(loaded.model, selector, budget, min_context=0, sparse_tail=8, observer=recorder),
    ):
        loaded.model(**inputs, past_key_values=DynamicCache(config=loaded.model.config), logits_to_keep=1)
    by_layer = recorder.mean("error")
    assert len(by_layer) == base.num_hidden_layers
    return sum(by_layer.values()) / len(by_layer)


def test_shipped_maps_select_far_better_than_chance_and_no_better_than_the_best(loaded, inputs):
    base, budget = describe(loaded.model), Budget(density=1 / 8)
    maps = HashMaps.from_pretrained(MAPS, base)
    torch.manual_seed(0)
    untrained = HashSelector(HashMaps(maps.config, base))
    best = errors(loaded, inputs, OracleSelector("query_head"), budget)
    ours = errors(loaded, inputs, HashSelector(maps, remainder=False), budget)
    chance = errors(loaded, inputs, untrained, budget)
    assert best < ours < chance
    # Half-way between the best and chance would be no use to anyone.
    assert ours - best < 0.4 * (chance - best)
    # The mean value for the tokens left out does what no selection can.
    assert errors(loaded, inputs, HashSelector(maps), budget) < best


def test_maps_of_a_llama_of_another_shape_are_refused(loaded):
    other = hashattention.BaseModel("LlamaForCausalLM", 32, 32, 8, 128, tuple(range(32)), "{}")
    with pytest.raises(hashattention.errors.ArtifactError, match="num_hidden_layers is 32, but the model has 30"):
        hashattention.attach(loaded.model, HashMaps(hashattention.MapsConfig(bits=32, widths=()), other))
