from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import ARCHITECTURES, build
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import hashattention
from hashattention import Budget, HashMaps, MapsConfig, ops
from hashattention.cache import TokenCache
from hashattention.errors import ArtifactError, ConfigError, InputError, UnsupportedModelError
from hashattention.integrations.transformers import SLOT, SelectedLayer
from hashattention.models.describe import attention_modules, describe
from hashattention.selectors.base import Selection, Selector, Step
from hashattention.selectors.hash import HashSelector
from hashattention.selectors.oracle import OracleSelector

ALL = Budget(heavy=10_000)
FEW = Budget(density=0.3, sink=2, local=3)


class EveryToken(Selector):
    """Selects every valid token by index, so that the sparse path itself computes dense attention."""

    def select(self, step: Step) -> Selection:
        extent = step.extent
        tokens = extent.tokens
        scores = torch.zeros(step.key.shape[0], step.key.shape[1], tokens, dtype=torch.int32)
        budgets = torch.tensor([0, 0, tokens], dtype=torch.int32).expand(*scores.shape[:2], 3).contiguous()
        return Selection(*ops.select(scores, extent.start, extent.end, budgets, tokens, mask=extent.mask))

    def auxiliary_bits(self, head_dim: int) -> float:
        return 0.0


def random_maps(model, bits: int = 32) -> HashMaps:
    torch.manual_seed(1)
    return HashMaps(MapsConfig(bits=bits, widths=(16,)), describe(model))


def prompt(batch: int = 2, tokens: int = 40, padding: int = 7):
    torch.manual_seed(2)
    ids = torch.randint(3, 128, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request):
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


@pytest.mark.parametrize("beams", [1, 3])
def test_full_budget_generates_the_dense_tokens(model, beams):
    ids, mask = prompt()
    settings = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": beams}
    dense = model.generate(ids, **settings)
    with hashattention.attach(model, random_maps(model), ALL, min_context=0):
        assert torch.equal(model.generate(ids, **settings), dense)
    assert torch.equal(model.generate(ids, **settings), dense)


@pytest.mark.parametrize("beams", [1, 3])
def test_selecting_every_token_equals_dense(model, beams):
    """The sparse path itself (indices, gather, softmax) with padding and beams, not the dense short cut."""
    ids, mask = prompt()
    settings = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": beams}
    dense = model.generate(ids, **settings)
    with hashattention.attach(model, EveryToken(), FEW, min_context=0):
        assert torch.equal(model.generate(ids, **settings), dense)


def test_a_small_budget_changes_the_logits_and_keeps_to_its_count(model):
    ids, mask = prompt()
    counts = []
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits[:, -1]
        with hashattention.attach(
            model,
            random_maps(model),
            FEW,
            min_context=0,
            observer=lambda step, chosen, out: counts.append(chosen.counts),
        ):
            model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
            assert not counts, "prefill must be dense"
            sparse = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert len(counts) == len(describe(model).layers)
    for count in counts:
        assert count[0].tolist() == [sum(FEW.counts(33))] * 2
        assert count[1].tolist() == [sum(FEW.counts(40))] * 2
    assert not torch.allclose(sparse, dense, atol=1e-4)


def test_prefill_is_bit_identical(llama):
    ids, mask = prompt()
    with torch.no_grad():
        dense = llama(ids, attention_mask=mask).logits
        with hashattention.attach(llama, random_maps(llama), FEW, min_context=0):
            assert torch.equal(llama(ids, attention_mask=mask).logits, dense)


def test_left_padding_changes_nothing_for_a_row(llama):
    """A padded row alone and in a batch gives the same sparse tokens: padding is never scored, selected or attended."""
    ids, mask = prompt(padding=9)
    budget = Budget(heavy=6, sink=2, local=3)
    with hashattention.attach(llama, random_maps(llama), budget, min_context=0):
        together = llama.generate(ids, attention_mask=mask, max_new_tokens=8)
        alone = llama.generate(ids[:1, 9:], attention_mask=mask[:1, 9:], max_new_tokens=8)
    assert torch.equal(together[0, 40:], alone[0, 31:])


def test_signatures_follow_the_cache(llama):
    """After beams, crops, repeats and selections the kept signatures equal those of the keys in the cache."""
    ids, mask = prompt()
    maps = random_maps(llama)
    cache = DynamicCache(config=llama.config)
    budget = Budget(heavy=6, sink=2, local=3)

    def verify(tokens):
        for index, layer in enumerate(cache.layers):
            held = layer.side.extend((maps, "signatures"), tokens, lambda first: pytest.fail("signatures were lost"))
            assert torch.equal(held, maps.layer(index).sign_keys(layer.keys[:, :, :tokens]))

    with torch.no_grad(), hashattention.attach(llama, maps, budget, min_context=0):
        llama.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=3, past_key_values=cache)
        assert all(isinstance(layer, SelectedLayer) for layer in cache.layers)
        verify(45)
        cache.crop(-5)
        verify(40)
        cache.batch_select_indices(torch.tensor([4, 0]))
        verify(40)
        cache.batch_repeat_interleave(2)
        verify(40)
        cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
        verify(40)
        tail = torch.ones(4, 41, dtype=torch.long)
        llama(torch.randint(3, 128, (4, 1)), attention_mask=tail, past_key_values=cache)
        verify(41)
        cache.reset()
        assert cache.layers[0].side.nbytes() == 0


def filling_maps(model) -> HashMaps:
    base = describe(model)
    torch.manual_seed(1)
    table = torch.randn(len(base.layers), base.num_attention_heads, 3) * 0.3
    return HashMaps(MapsConfig(bits=32, widths=(16,)), base, remainder=table.tolist())


def test_sums_for_the_remainder_follow_the_cache(llama, monkeypatch):
    """After beams, crops, repeats and selections the kept sums are those of the keys and values in the cache."""
    monkeypatch.setattr("hashattention.selectors.remainder.BLOCK", 8)
    ids, mask = prompt()
    cache = DynamicCache(config=llama.config)

    def verify(blocks, starts):
        for layer in cache.layers:
            held = layer.side.held("sums")
            assert held.shape[:3] == (len(starts), 2, blocks)
            for request, start in enumerate(starts):
                for block in range(blocks):
                    span = slice(start, 8 * block + 8)
                    both = torch.cat([layer.keys, layer.values], -1)[request, :, span].sum(1)
                    torch.testing.assert_close(held[request, :, block, :-1], both, rtol=1e-5, atol=1e-5)
                    assert (held[request, :, block, -1] == 8 * block + 8 - start).all()

    with torch.no_grad(), hashattention.attach(llama, filling_maps(llama), FEW, min_context=0):
        llama.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=3, past_key_values=cache)
        verify(6, [7, 7, 7, 0, 0, 0])
        cache.crop(-9)
        verify(5, [7, 7, 7, 0, 0, 0])
        cache.batch_select_indices(torch.tensor([4, 0]))
        verify(5, [0, 7])
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
        verify(5, [7, 7, 0, 0])
        tail = torch.ones(4, 42, dtype=torch.long)
        tail[:2, :7] = 0
        for _ in range(7):
            tail = torch.cat([tail, tail[:, -1:]], 1)
            llama(torch.randint(3, 128, (4, 1)), attention_mask=tail, past_key_values=cache)
        assert cache.get_seq_length() == 49
        verify(6, [7, 7, 0, 0])


@pytest.mark.parametrize("beams", [1, 3])
def test_where_all_tokens_are_taken_the_remainder_changes_nothing(llama, beams, monkeypatch):
    """The cache has slots of padding more than any request has tokens, so that none is attended densely."""
    monkeypatch.setattr("hashattention.selectors.remainder.BLOCK", 8)
    ids, mask = prompt()
    mask[1, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams}
    dense, steps = llama.generate(ids, **settings), []
    few, cover = Budget(heavy=3, sink=1, local=2), Budget(heavy=38, sink=0, local=1)
    with hashattention.attach(llama, filling_maps(llama), cover, min_context=0, observer=lambda *s: steps.append(s)):
        assert torch.equal(llama.generate(ids, **settings), dense)
    assert steps and all(chosen.remainder is not None for _, chosen, _ in steps)
    found = []
    for selector in (HashSelector(filling_maps(llama), remainder=filled) for filled in (True, False)):
        cache = DynamicCache(config=llama.config)
        with torch.no_grad(), hashattention.attach(llama, selector, few, min_context=0):
            llama(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
            found.append(llama(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_ragged_second_turn_with_a_remainder(llama, monkeypatch):
    """Padding between real tokens is not in the mean."""
    monkeypatch.setattr("hashattention.selectors.remainder.BLOCK", 8)
    ids, mask = prompt(padding=0)
    mask[1, 30:] = 0
    more = torch.cat([ids, ids[:, :5]], 1)
    more_mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
    positions, cache, seen = (more_mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=llama.config), []
    served = {"min_context": 0, "observer": lambda *row: seen.append(row)}
    with torch.no_grad(), hashattention.attach(llama, filling_maps(llama), FEW, **served):
        for part in (slice(0, 40), slice(40, 43), slice(43, 44), slice(44, 45)):
            given = {"attention_mask": more_mask[:, : part.stop], "position_ids": positions[:, part]}
            llama(more[:, part], past_key_values=cache, **given)
    assert len(seen) == 4
    for step, chosen, out in seen:
        assert chosen.remainder.sums[1, 0, -1] == step.extent.mask[1, : step.extent.tokens // 8 * 8].sum()
        afresh = HashSelector(filling_maps(llama)).attend(dataclasses.replace(step, side=TokenCache()))
        torch.testing.assert_close(out, afresh, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("full", ["budget", "selector"])
def test_a_second_turn_on_the_kept_cache_equals_dense(model, full):
    """Covering everything by the budget, or selecting every token, over two turns of one conversation."""
    ids, _ = prompt(batch=1, padding=0)
    maps, budget = (random_maps(model), ALL) if full == "budget" else (EveryToken(), FEW)

    def converse():
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, max_new_tokens=5, past_key_values=cache)
        second = torch.cat([first, ids[:, :6]], 1)
        return model.generate(second, max_new_tokens=5, past_key_values=cache)

    dense = converse()
    assert torch.equal(dense[:, 51:], model.generate(dense[:, :51], max_new_tokens=5)[:, 51:])
    with hashattention.attach(model, maps, budget, min_context=0):
        assert torch.equal(converse(), dense)


@pytest.mark.parametrize("filled", [False, True])
def test_a_second_turn_reuses_the_signatures_of_the_first(llama, filled, monkeypatch):
    """Few tokens, two turns: the kept cache selects what signatures made afresh from its keys select."""
    monkeypatch.setattr("hashattention.selectors.remainder.BLOCK", 8)
    ids, _ = prompt(batch=1, padding=0)
    maps, budget = filling_maps(llama) if filled else random_maps(llama), Budget(heavy=8, sink=2, local=3)
    cache = DynamicCache(config=llama.config)
    seen = []
    with hashattention.attach(llama, maps, budget, min_context=0, observer=lambda *row: seen.append(row)):
        first = llama.generate(ids, max_new_tokens=5, past_key_values=cache)
        llama.generate(torch.cat([first, ids[:, :6]], 1), max_new_tokens=5, past_key_values=cache)
    assert {step.extent.tokens for step, _, _ in seen} == {41, 42, 43, 44, 52, 53, 54, 55}
    for step, chosen, out in seen:
        afresh = HashSelector(maps).select(dataclasses.replace(step, side=TokenCache()))
        assert torch.equal(chosen.indices, afresh.indices)
        torch.testing.assert_close(out, step.attend(afresh), rtol=1e-5, atol=1e-6)


def test_a_ragged_second_turn_has_holes_in_its_mask(llama):
    """Right padding of turn one lies between real tokens of turn two; it is never attended."""
    ids, mask = prompt(padding=0)
    mask[1, 30:] = 0
    more = torch.cat([ids, ids[:, :5]], 1)
    more_mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
    positions = more_mask.cumsum(1) - 1
    with torch.no_grad():
        dense = llama(more, attention_mask=more_mask, position_ids=positions.clamp(min=0)).logits[:, -1]
        cache = DynamicCache(config=llama.config)
        with hashattention.attach(llama, EveryToken(), FEW, min_context=0):
            for part in (slice(0, 40), slice(40, 44), slice(44, 45)):
                out = llama(
                    more[:, part],
                    attention_mask=more_mask[:, : part.stop],
                    position_ids=positions[:, part].clamp(min=0),
                    past_key_values=cache,
                )
    torch.testing.assert_close(out.logits[:, -1], dense, atol=1e-5, rtol=1e-4)


def test_a_cache_filled_before_attaching_is_adopted(llama):
    ids, _ = prompt(batch=1)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids[:, :-1], past_key_values=cache)
        keys = cache.layers[0].keys
        with hashattention.attach(llama, EveryToken(), FEW, min_context=0):
            sparse = llama(ids[:, -1:], past_key_values=cache).logits
        assert cache.layers[0].keys[:, :, :39].equal(keys)
        torch.testing.assert_close(sparse[:, -1], llama(ids).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_sparse_tail_makes_the_last_prompt_positions_sparse(llama):
    ids, mask = prompt()
    with torch.no_grad():
        dense = llama(ids, attention_mask=mask).logits
        with hashattention.attach(llama, EveryToken(), FEW, min_context=0, sparse_tail=5):
            every = llama(ids, attention_mask=mask).logits
        seen = []
        with hashattention.attach(
            llama, random_maps(llama), FEW, min_context=0, sparse_tail=5, observer=lambda *row: seen.append(row)
        ):
            few = llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(every[1], dense[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(few[:, :35], dense[:, :35])
    assert not torch.allclose(few[1, 35:], dense[1, 35:], atol=1e-4)
    assert [step.extent.tokens for step, _, _ in seen] == [36, 37, 38, 39, 40] * 2


def test_min_context_and_dense_layers_stay_dense(llama):
    ids, _ = prompt(batch=1)
    layers = []
    cache = DynamicCache(config=llama.config)
    with (
        torch.no_grad(),
        hashattention.attach(
            llama,
            random_maps(llama),
            FEW,
            min_context=41,
            dense_layers=(0,),
            observer=lambda step, *rest: layers.append((step.layer, step.extent.tokens)),
        ),
    ):
        llama.generate(ids, max_new_tokens=4, past_key_values=cache)
    assert layers == [(1, 41), (1, 42), (1, 43)]


def test_sliding_layers_stay_dense():
    model = build("gemma3")
    ids, _ = prompt(batch=1)
    layers = set()
    with hashattention.attach(
        model, random_maps(model), FEW, min_context=0, observer=lambda s, *_: layers.add(s.layer)
    ):
        model.generate(ids, max_new_tokens=3)
    assert layers == {5}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detach_restores_the_model(llama, implementation):
    llama.set_attn_implementation(implementation)
    ids, mask = prompt()
    before = copy.deepcopy(llama.state_dict())
    dense = llama(ids, attention_mask=mask).logits
    handle = hashattention.attach(llama, random_maps(llama), FEW, min_context=0)
    assert torch.equal(llama(ids, attention_mask=mask).logits, dense), "prefill uses the model's own implementation"
    assert llama.state_dict().keys() == before.keys()
    handle.detach()
    handle.detach()
    assert llama.config._attn_implementation == implementation
    assert not any(hasattr(module, SLOT) for module in attention_modules(llama).values())
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert torch.equal(llama(ids, attention_mask=mask).logits, dense)


def test_an_error_inside_the_block_detaches(llama):
    with pytest.raises(KeyError), hashattention.attach(llama, OracleSelector(), FEW):
        raise KeyError("user's own")
    assert llama.config._attn_implementation == "sdpa"


def test_attached_from_a_folder_with_a_float_budget(llama, tmp_path):
    maps = random_maps(llama)
    maps.save_pretrained(tmp_path / "maps", dtype=torch.float32)
    ids, mask = prompt()
    with hashattention.attach(llama, maps, Budget(density=0.5), min_context=0):
        expected = llama.generate(ids, attention_mask=mask, max_new_tokens=4)
    with hashattention.attach(llama, tmp_path / "maps", 0.5, min_context=0):
        assert torch.equal(llama.generate(ids, attention_mask=mask, max_new_tokens=4), expected)


def test_attached_twice_is_refused(llama):
    with hashattention.attach(llama, OracleSelector(), FEW), pytest.raises(ConfigError, match="attached already"):
        hashattention.attach(llama, OracleSelector(), FEW)


@pytest.mark.parametrize("density", [0.0, 1.5, -1.0])
def test_bad_density_is_refused_and_nothing_is_attached(llama, density):
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        hashattention.attach(llama, OracleSelector(), density)
    assert llama.config._attn_implementation == "sdpa"


def test_maps_of_another_model_are_refused_with_the_field(llama):
    other = random_maps(build("qwen2"))
    with pytest.raises(ArtifactError, match=r"architecture is 'Qwen2ForCausalLM'.*'LlamaForCausalLM'.*train maps"):
        hashattention.attach(llama, other, FEW)


def test_unknown_dense_layer_is_refused(llama):
    with pytest.raises(ConfigError, match="0 to 1"):
        hashattention.attach(llama, OracleSelector(), FEW, dense_layers=(2,))


def test_static_cache_is_refused_with_advice(llama):
    ids, _ = prompt(batch=1)
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with (
        hashattention.attach(llama, OracleSelector(), FEW, min_context=0),
        pytest.raises(UnsupportedModelError, match="DynamicCache"),
    ):
        llama.generate(ids, max_new_tokens=4, past_key_values=cache)


def test_four_dimensional_mask_is_refused(llama):
    ids, _ = prompt(batch=1)
    cache = DynamicCache(config=llama.config)
    llama(ids, past_key_values=cache)
    with (
        hashattention.attach(llama, OracleSelector(), FEW, min_context=0),
        pytest.raises(InputError, match="padding mask"),
    ):
        llama(ids[:, :1], attention_mask=torch.zeros(1, 1, 1, 41), past_key_values=cache)


def test_without_a_cache_attention_is_dense(llama):
    ids, mask = prompt()
    dense = llama(ids, attention_mask=mask, use_cache=False).logits
    with hashattention.attach(llama, OracleSelector(), FEW, min_context=0, sparse_tail=4):
        assert torch.equal(llama(ids, attention_mask=mask, use_cache=False).logits, dense)


def test_softcap_reaches_the_sparse_path():
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.Gemma2Config(
        **shape,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_logit_softcapping=2.0,
        sliding_window=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids, _ = prompt(batch=1)
    with torch.no_grad():
        dense = model(ids).logits[:, -1]
        cache = DynamicCache(config=model.config)
        with hashattention.attach(model, EveryToken(), FEW, min_context=0):
            model(ids[:, :-1], past_key_values=cache)
            sparse = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-4)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["update", "crop", "select", "repeat", "reorder"]), st.integers(1, 5)),
    min_size=1,
    max_size=14,
)


@given(OPERATIONS)
def test_a_selected_layer_holds_what_a_dynamic_layer_holds(operations):
    ours, theirs = SelectedLayer(), DynamicLayer()
    torch.manual_seed(0)
    for layer in (ours, theirs):
        layer.update(torch.ones(2, 2, 3, 4), torch.zeros(2, 2, 3, 4))
    for kind, amount in operations:
        batch = theirs.keys.shape[0]
        if kind == "update":
            new = torch.randn(2, batch, 2, amount, 4)
            got, wanted = (layer.update(new[0], new[1]) for layer in (ours, theirs))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        elif kind == "crop" and theirs.get_seq_length() > amount:
            ours.crop(-amount), theirs.crop(-amount)
        elif kind == "repeat" and batch < 16:
            ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
        elif kind in ("select", "reorder"):
            rows = torch.tensor([amount % batch] * batch)
            for layer in (ours, theirs):
                layer.batch_select_indices(rows) if kind == "select" else layer.reorder_cache(rows)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_a_new_token_copies_none_of_the_others():
    layer = SelectedLayer()
    layer.update(torch.randn(1, 2, 100, 4), torch.randn(1, 2, 100, 4))
    places = {layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))[0].data_ptr() for _ in range(60)}
    assert len(places) == 1
    layer.crop(-30)
    assert layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))[0].data_ptr() in places
    copied = copy.deepcopy(layer)
    before = layer.keys.clone()
    copied.update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    assert torch.equal(layer.keys, before)
    assert copied.keys.data_ptr() != layer.keys.data_ptr()


def test_gradients_flow_through_a_selected_layer():
    layer, key = SelectedLayer(), torch.randn(1, 1, 2, 4, requires_grad=True)
    layer.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    layer.update(key, torch.randn(1, 1, 2, 4))[0].sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))


def test_a_cache_may_go_in_and_out_of_inference_mode(llama):
    ids, _ = prompt(batch=1, padding=0)
    cache = DynamicCache(config=llama.config)
    seen = []
    with hashattention.attach(llama, random_maps(llama), FEW, min_context=0, observer=lambda *row: seen.append(row)):
        for turn, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad)):
            with mode():
                llama(ids[:, 10 * turn : 10 * turn + 9], past_key_values=cache)
                llama(ids[:, 10 * turn + 9 : 10 * turn + 10], past_key_values=cache)
    assert [step.extent.tokens for step, _, _ in seen] == [10, 10, 20, 20, 30, 30, 40, 40]
    for step, chosen, _ in seen:
        afresh = HashSelector(random_maps(llama)).select(dataclasses.replace(step, side=TokenCache()))
        assert torch.equal(chosen.indices, afresh.indices)
