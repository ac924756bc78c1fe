"""Maps that take keys (and queries) before RoPE, served: positions with padding, holes and crops; one step after the
other or a prompt at once.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.tiny import build
from transformers import DynamicCache

import hashattention
from hashattention import Budget, HashMaps, MapsConfig
from hashattention.attention import SparseAttention
from hashattention.cache import TokenCache
from hashattention.config import BaseModel
from hashattention.errors import ConfigError, InputError
from hashattention.models.describe import describe
from hashattention.models.rotary import rotary_frequencies
from hashattention.rotation import unrotate
from hashattention.rows import Extent
from hashattention.selectors.base import Step
from hashattention.selectors.hash import HashSelector

ROPES = ("before", "before_keys")
FEW = Budget(heavy=6, sink=2, local=3)
FREQUENCIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
MODEL = BaseModel("LlamaForCausalLM", 2, 4, 2, 16, (0, 1), "{}", frequencies=FREQUENCIES)


def maps_for(model, rope):
    torch.manual_seed(1)
    base = dataclasses.replace(describe(model), frequencies=rotary_frequencies(model))
    return HashMaps(MapsConfig(bits=32, widths=(16,), rope=rope), base)


def prompt(padding=7):
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_budget_for_every_token_generates_the_dense_tokens(architecture, rope):
    """All but one heavy token at most: the sparse path itself, left padding included."""
    model = build(architecture)
    ids, mask = prompt()
    dense = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    maps = maps_for(model, rope)
    with hashattention.attach(model, maps, Budget(heavy=10_000), min_context=0):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8), dense)
    # A row of 33 to 40 tokens takes all of them; the cache has 7 slots of padding more, so that none is dense.
    steps, cover = [], Budget(heavy=39, sink=0, local=1)
    with hashattention.attach(model, maps, cover, min_context=0, observer=lambda *seen: steps.append(seen)):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(found[0], dense[0])
    assert steps and all(int(chosen.counts[0].min()) == step.extent.lengths()[0] for step, chosen, _ in steps)


@pytest.mark.parametrize("rope", ROPES)
def test_a_padded_row_is_served_as_it_is_alone(rope):
    model = build("llama")
    ids, mask = prompt(padding=9)
    with hashattention.attach(model, maps_for(model, rope), FEW, min_context=0, sparse_tail=12):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=8)
        alone = model.generate(ids[:1, 9:], attention_mask=mask[:1, 9:], max_new_tokens=8)
    assert torch.equal(together[0, 40:], alone[0, 31:])


@pytest.mark.parametrize("told", [True, False])
def test_signatures_are_those_of_the_keys_before_the_models_rotation(told):
    """Positions are the places of real tokens where the model is told so, and slots where it is told nothing."""
    model = build("llama")
    maps, (ids, mask) = maps_for(model, "before_keys"), prompt()
    cache, before = DynamicCache(config=model.config), []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, args, out: before.append(out))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), hashattention.attach(model, maps, FEW, min_context=0):
        for part in (slice(0, 30), slice(30, 39), slice(39, 40)):
            given = {"position_ids": places[:, part]} if told else {}
            model(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, **given)
    hook.remove()
    held = cache.layers[1].side.extend((maps, "signatures"), 40, lambda first: pytest.fail("not signed"))
    layer = maps.layer(1)
    key = torch.cat(before, 1).unflatten(-1, (2, 16)).transpose(1, 2)
    expected = dataclasses.replace(layer, config=MapsConfig(bits=32, widths=(16,))).sign_keys(key)
    real = mask.bool()[:, None, :, None].expand_as(held)
    same = (held == expected)[real].float().mean()
    # A logit at a border may fall on either side; keys as they are after RoPE have other signatures.
    assert same > 0.98
    rotated = dataclasses.replace(layer, config=MapsConfig(bits=32, widths=(16,))).sign_keys(cache.layers[1].keys)
    assert (held == rotated)[real].float().mean() < 0.2


def test_positions_of_another_kind_are_refused():
    model = build("llama")
    ids, mask = prompt()
    shifted = (mask.cumsum(1) - 1).clamp(min=0) + 5
    with torch.no_grad(), hashattention.attach(model, maps_for(model, "before"), FEW, min_context=0):
        with pytest.raises(InputError, match="position_ids are not the places of the real tokens"):
            model(ids, attention_mask=mask, position_ids=shifted)
        with pytest.raises(InputError, match="position_ids are not"):
            model(ids[:1], position_ids=torch.arange(1, 41)[None])
        model(ids[:1], position_ids=torch.arange(40)[None])
    plain = HashMaps(MapsConfig(32, (16,)), describe(model))
    with torch.no_grad(), hashattention.attach(model, plain, FEW, min_context=0):
        model(ids, attention_mask=mask, position_ids=shifted)


def test_frequencies_and_positions_that_lack_are_asked_for():
    with pytest.raises(ConfigError, match="has 0: take them from"):
        HashMaps(MapsConfig(32, (), rope="before"), dataclasses.replace(MODEL, frequencies=()))
    with pytest.raises(ConfigError, match="has 9"):
        HashMaps(MapsConfig(32, (), rope="before"), dataclasses.replace(MODEL, frequencies=(1.0,) * 9))
    layer = HashMaps(MapsConfig(32, (), rope="before_keys"), MODEL).layer(0)
    with pytest.raises(InputError, match="rope='before_keys': give the tokens' `positions`"):
        layer.sign_keys(torch.randn(1, 2, 3, 16))


@pytest.mark.parametrize("rope", ROPES)
def test_an_artifact_serves_the_same(rope, tmp_path):
    model = build("qwen2")
    ids, mask = prompt()
    maps = maps_for(model, rope)
    maps.save_pretrained(tmp_path, torch.float32)
    loaded = HashMaps.from_pretrained(tmp_path, describe(model))
    assert loaded.config == maps.config and loaded.model == maps.model
    found = []
    for each in (maps, tmp_path):
        with hashattention.attach(model, each, FEW, min_context=0):
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=8))
    assert torch.equal(*found)


def selection(selector, key, side, extent):
    query = torch.randn(key.shape[0], 4, 1, 16, generator=torch.Generator().manual_seed(key.shape[2]))
    return selector.select(Step(0, query, key, key, 0.25, extent, FEW, side))


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("rope", ROPES)
def test_a_prompt_at_once_and_token_by_token_give_the_same_signatures(rope, padding, monkeypatch):
    monkeypatch.setattr("hashattention.maps.KEY_CHUNK", 16)
    torch.manual_seed(0)
    maps, key = HashMaps(MapsConfig(64, (8,), rope=rope), MODEL), torch.randn(2, 2, 60, 16)
    mask = torch.ones(2, 60, dtype=torch.bool)
    if padding != "none":
        mask[1, :11] = False
    if padding == "holes":
        mask[0, 20:25] = False
    sides, holes = (TokenCache(), TokenCache()), padding == "holes"
    for tokens in range(1, 61):
        extent = Extent.from_mask(mask[:, :tokens], holes)
        for place, side in enumerate(sides):
            if place or tokens == 60:
                selection(HashSelector(maps), key[:, :, :tokens], side, extent)
    once, stepwise = (side.extend((maps, "signatures"), 60, None) for side in sides)
    real = mask[:, None, :, None].expand_as(once)
    assert torch.equal(once[real], stepwise[real])
    # Against the definition, a token at a time.
    layer = maps.layer(0)
    plain = dataclasses.replace(layer, config=MapsConfig(64, (8,)))
    for row in range(2):
        for place, slot in enumerate(mask[row].nonzero()[:, 0].tolist()):
            one = key[row : row + 1, :, slot : slot + 1]
            expected = plain.sign_keys(unrotate(one, torch.tensor([place]), layer.frequencies))
            assert torch.equal(once[row, :, slot], expected[0, :, 0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_a_step_and_its_parts_are_the_same_bit_for_bit(rope, ended, backend):
    """`ended`: one request's new slots are padding, so its last valid token is not the newest one."""
    torch.manual_seed(0)
    maps, sides = HashMaps(MapsConfig(64, (8,), rope=rope), MODEL), (TokenCache(), TokenCache())
    whole, parts = (
        SparseAttention(HashSelector(maps, backend), FEW, min_context=8, observer=observer)
        for observer in (None, lambda *seen: None)
    )
    keys = torch.randn(2, 2, 30, 16)
    for tokens in range(20, 31):
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[0, :5] = False
        if ended:
            mask[1, 24:] = False
        query, key = torch.randn(2, 4, 1, 16), keys[:, :, :tokens]
        given = {"extent": Extent.from_mask(mask, False), "scale": 0.25, "softcap": 0.0, "dense": None}
        outs = [
            served.attend(0, query, key, key, side=side, **given)
            for served, side in zip((whole, parts), sides, strict=True)
        ]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
    held = [side.extend((maps, "signatures"), 30, None) for side in sides]
    valid = mask[:, None, :, None].expand_as(held[0])
    assert torch.equal(held[0][valid], held[1][valid])


def test_keys_alone_before_rope_leave_the_step_one_op(monkeypatch):
    torch.manual_seed(0)
    key, extent = torch.randn(1, 2, 30, 16), Extent.full(1, 30, torch.device("cpu"))
    one = Step(0, torch.randn(1, 4, 1, 16), key, key, 0.25, extent, FEW, TokenCache())
    monkeypatch.setattr("hashattention.ops.score_select", None)
    HashSelector(HashMaps(MapsConfig(32, (), rope="before_keys"), MODEL)).attend(one)
    with pytest.raises(TypeError, match="NoneType"):
        HashSelector(HashMaps(MapsConfig(32, (), rope="before"), MODEL)).attend(one)
