from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.selectors.test_hash import CONFIGS, MODEL, TEMPERATURES, padded

from hashattention import ops
from hashattention.attention import SparseAttention
from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.errors import ConfigError
from hashattention.maps import HashMaps
from hashattention.rows import Extent
from hashattention.selectors import remainder
from hashattention.selectors.base import Step
from hashattention.selectors.hash import HashSelector
from hashattention.selectors.registry import create
from hashattention.selectors.remainder import SUMS, running_sums
from hashattention.selectors.sampled import SampledTail

BUDGET = Budget(heavy=5, sink=1, local=2)
BLOCK = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(remainder, "BLOCK", BLOCK)
    monkeypatch.setattr(remainder, "CHUNK", 2 * BLOCK)


def whole(batch, tokens, dtype=torch.float32):
    """Keys and values of whole numbers: their sums are exact in any order."""
    shape = batch, 2, tokens
    return (torch.randint(-8, 9, (*shape, dim)).to(dtype) for dim in (16, 12))


def direct(key, value, mask, tokens):
    """The sums over whole blocks of the first `tokens` tokens, from their definition; None without one."""
    blocks = tokens // remainder.BLOCK
    if not blocks:
        return None
    rows = []
    for request, valid in enumerate(mask[:, : blocks * remainder.BLOCK]):
        held = torch.cat([key[request], value[request]], -1)[:, : len(valid)][:, valid].double()
        number = valid.sum().double().expand(held.shape[0], 1)
        rows.append(torch.cat([held.sum(1), number], -1))
    return torch.stack(rows).float()


def sums_of(key, value, extent, side):
    return running_sums(key, value, extent.rows(BUDGET, 2), extent, side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("tokens", [BLOCK, 2 * BLOCK, 43, 60])
def test_sums_over_whole_blocks(tokens, kind, dtype):
    """Whatever padding holds, and whatever lies behind the tokens."""
    (key, value), mask = whole(3, 64, dtype), padded(kind)[:, :tokens]
    expected = direct(key, value, mask, tokens)
    hidden = torch.nn.functional.pad(~mask, (0, 64 - tokens), value=True)[:, None, :, None]
    key, value = (tensor.masked_fill(hidden, torch.nan) for tensor in (key, value))
    found = sums_of(key, value, Extent.from_mask(mask, holes=kind == "holes"), TokenCache())
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_there_are_none_before_a_block_is_whole():
    side, (key, value) = TokenCache(), whole(1, BLOCK - 1)
    assert sums_of(key, value, Extent.full(1, BLOCK - 1, key.device), side) is None
    assert side.nbytes() == 0


def test_the_mean_of_a_long_prompt_is_close_though_the_keys_are_short(monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    key = (torch.randn(1, 2, 40 * 256, 16) + 3).bfloat16()
    extent = Extent.full(1, key.shape[2], key.device)
    found = sums_of(key, key, extent, TokenCache())
    assert found[0, 0, -1] == key.shape[2]
    torch.testing.assert_close(found[..., :16].double(), key.double().sum(2), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("first", [1, 11, 30])
def test_a_block_is_summed_once(first):
    side, mask = TokenCache(), padded("left")
    key, value = whole(3, 60)
    held = [key.clone(), value.clone()]
    for tokens in range(first, 61):
        found = sums_of(*held, Extent.from_mask(mask[:, :tokens], holes=False), side)
        expected = direct(key, value, mask, tokens)
        assert found is expected is None or torch.equal(found, expected)
        for tensor in held:
            tensor[:, :, : tokens // BLOCK * BLOCK] = torch.nan
    assert side.length(SUMS) == 60 // BLOCK


def test_sums_follow_crops_beams_and_repeats():
    side, mask = TokenCache(), padded("left")
    key, value = whole(3, 60)

    def check(tokens):
        seen = Extent.from_mask(mask[:, :tokens], holes=False)
        assert torch.equal(sums_of(key, value, seen, side), direct(key, value, mask, tokens))

    check(60)
    side.crop(30)
    assert side.length(SUMS) == 3
    # What was cropped is other tokens now.
    key[:, :, 30:], value[:, :, 30:] = (tensor[:, :, 30:] for tensor in whole(3, 60))
    check(31)
    check(50)
    beams = torch.tensor([2, 0, 0])
    side.select(beams)
    key, value, mask = key[beams], value[beams], mask[beams]
    check(50)
    check(58)
    side.repeat(2)
    key, value, mask = (tensor.repeat_interleave(2, 0) for tensor in (key, value, mask))
    check(58)
    other = side.narrow(torch.tensor([3, 1]))
    assert torch.equal(other.held(SUMS), side.held(SUMS)[[3, 1]])
    side.reset()
    check(58)


def test_sums_go_in_and_out_of_inference_mode():
    side, (key, value) = TokenCache(), whole(2, 60)
    mask = torch.ones(2, 60, dtype=torch.bool)
    for place, tokens in enumerate((20, 30, 40, 60)):
        with torch.inference_mode(place % 2 == 0):
            found = sums_of(key, value, Extent.full(2, tokens, key.device), side)
            assert torch.equal(found, direct(key, value, mask, tokens))


def filling(config=CONFIGS["group code"], shares=None, temperatures=None):
    """Maps whose remainder differs by layer and head, and matters."""
    torch.manual_seed(0)
    table = torch.randn(2, 4, 3) * 0.3 + torch.tensor([-0.5, 0.4, 0.1])
    return HashMaps(config, MODEL, None, shares, temperatures, table.tolist())


def step(tokens, mask=None, layer=0, side=None, batch=3, **changes):
    random = torch.Generator().manual_seed(7)
    key, value = (torch.randn(batch, 2, 64, 16, generator=random) for _ in range(2))
    query = torch.randn(batch, 4, 64, 16, generator=random)[:, :, tokens - 1 : tokens]
    extent = Extent.full(batch, tokens, key.device)
    if mask is not None:
        extent = Extent.from_mask(mask[:, :tokens], holes=mask.diff(dim=1).count_nonzero(1).gt(1).any().item())
    made = Step(layer, query, key[:, :, :tokens], value[:, :, :tokens], 0.25, extent, BUDGET, side or TokenCache())
    return dataclasses.replace(made, **changes)


def by_hand(maps, one, chosen):
    """Attention over `chosen`, and the ops fed with sums and numbers from their definitions."""
    out, lse = ops.attend(
        one.query, one.key, one.value, chosen.indices, chosen.counts, scale=one.scale, softcap=one.softcap
    )
    mask = one.extent.rows(one.budget, 2).valid(one.extent.tokens)
    sums, lengths = direct(one.key, one.value, mask, one.extent.tokens), mask.sum(1, dtype=torch.int32)
    coefficients = torch.tensor(maps.remainder[MODEL.layers.index(one.layer)])
    known = sums, chosen.counts, lengths, coefficients
    return ops.add_remainder(out, lse, one.query, *known, scale=one.scale, softcap=one.softcap)


def assert_served(maps, one):
    """The whole step, its parts, and the ops by hand are the same."""
    selector, chosen = HashSelector(maps), HashSelector(maps).select(one)
    parts = one.attend(chosen)
    torch.testing.assert_close(parts, by_hand(maps, one, chosen), rtol=1e-5, atol=1e-6)
    for _ in range(2):
        found = selector.attend(dataclasses.replace(one, side=TokenCache()))
        torch.testing.assert_close(found, parts, rtol=1e-5, atol=1e-6)
    plain = HashSelector(maps, remainder=False)
    assert (plain.attend(one) - parts).abs().max() > 1e-3
    return parts


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_step_its_parts_and_the_ops_by_hand(config, kind):
    maps = filling(config)
    for layer, softcap in ((0, 0.0), (1, 3.0)):
        for tokens in (43, 60):
            assert_served(maps, step(tokens, padded(kind), layer, softcap=softcap))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_history_served_twice(config):
    """Token by token on one cache, by the step and by its parts: the same bits as with caches made afresh."""
    maps, sides = filling(config), (TokenCache(), TokenCache())
    selectors = HashSelector(maps), HashSelector(maps)
    mask = padded("left")
    for tokens in range(2 * BLOCK - 2, 45):
        one, other = (step(tokens, mask, side=side) for side in sides)
        found, parts = selectors[0].attend(one), other.attend(selectors[1].select(other))
        assert torch.equal(found, parts)
        afresh = HashSelector(maps).attend(step(tokens, mask))
        torch.testing.assert_close(found, afresh, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_without_it_the_maps_are_those_without_one(config):
    maps, mask = filling(config), padded("left")
    bare = HashMaps(config, MODEL)
    bare.load_state_dict(maps.state_dict())
    assert HashSelector(maps).remainder and not HashSelector(bare).remainder
    off = HashSelector(maps, remainder=False)
    one = step(40, mask)
    assert torch.equal(off.attend(one), HashSelector(bare).attend(step(40, mask)))
    assert off.select(one).remainder is None and one.side.length(SUMS) == 0
    chosen, wanted = HashSelector(maps).select(one), off.select(one)
    assert torch.equal(chosen.indices, wanted.indices) and torch.equal(chosen.counts, wanted.counts)


def test_a_cache_too_short_for_a_block_is_served_without():
    maps, tokens = filling(), 2 * BLOCK - 1
    for known, blocks in ((tokens, 1), (BLOCK + 1, 1), (BLOCK - 1, 0)):
        one = step(known, budget=Budget(heavy=1, sink=0, local=1))
        found, plain = HashSelector(maps).attend(one), HashSelector(maps, remainder=False).attend(one)
        assert (found == plain).all() == (not blocks)


def test_a_budget_for_every_token_leaves_nothing_to_fill():
    maps, mask = filling(), padded("left")
    one = step(60, mask, budget=Budget(heavy=1000, sink=1, local=2))
    assert torch.equal(HashSelector(maps).attend(one), HashSelector(maps, remainder=False).attend(one))


def test_an_empty_request_gives_zero():
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[1] = False
    one = step(60, mask)
    outs = HashSelector(filling()).attend(one), one.attend(HashSelector(filling()).select(one))
    for out in outs:
        assert out[1].eq(0).all() and out.isfinite().all() and out[0].ne(0).any()


def test_coefficients_it_lacks_are_asked_for():
    maps = HashMaps(CONFIGS["group code"], MODEL)
    with pytest.raises(ConfigError, match=r"these have none: train them again .*train\.remainder\.calibrate"):
        HashSelector(maps, remainder=True)


def test_the_option():
    maps = filling()
    bare = HashMaps(CONFIGS["group code"], MODEL)
    assert create("hash", maps=maps).remainder and create("hash:remainder=yes", maps=maps).remainder
    assert not create("hash:remainder=no", maps=maps).remainder
    assert not create("hash", maps=bare).remainder and not create("hash:remainder=no", maps=bare).remainder
    with pytest.raises(ConfigError, match="these have none"):
        create("hash:remainder=yes", maps=bare)
    with pytest.raises(ConfigError, match="remainder must be yes or no; given '1'"):
        create("hash:remainder=1", maps=maps)


@pytest.mark.parametrize("padding", [0, BLOCK, 3 * BLOCK, 6 * BLOCK])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_padded_request_is_served_as_it_is_alone(config, padding):
    """Padding of whole blocks, so that blocks end at the same tokens; with 6 of them none is whole alone."""
    maps, mask = filling(config), torch.ones(3, 60, dtype=torch.bool)
    mask[0, :padding], mask[2, :11] = False, False
    for tokens in (52, 60) if padding < 6 * BLOCK else (55,):
        one = step(tokens, mask)
        together = HashSelector(maps).attend(one)
        alone = dataclasses.replace(
            one, query=one.query[:1], key=one.key[:1, :, padding:], value=one.value[:1, :, padding:],
            extent=Extent.full(1, tokens - padding, one.key.device), side=TokenCache(),
        )  # fmt: skip
        torch.testing.assert_close(together[:1], HashSelector(maps).attend(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["group code", "per head"])
def test_layers_with_shares_of_their_own(name):
    config = CONFIGS[name]
    heads = config.selection_heads(MODEL)
    shares = tuple(tuple(0.4 + 0.5 * head + row for head in range(heads)) for row in range(2))
    maps = filling(config, shares)
    for layer in (0, 1):
        one = step(60, padded("left"), layer)
        assert_served(maps, one)
        assert len(HashSelector(maps).select(one).counts[1].unique()) > 1


@pytest.mark.parametrize("kind", ["none", "left", "holes"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_with_top_p_it_stands_for_more(config, kind):
    heads = config.selection_heads(MODEL)
    maps = filling(config, None, tuple(row * (heads // 2) for row in TEMPERATURES))
    one = step(60, padded(kind), budget=Budget(heavy=20, sink=1, local=2, top_p=0.6))
    assert_served(maps, one)
    assert (HashSelector(maps).select(one).counts < 23).any()


def test_earlier_positions_of_a_prompt_know_only_their_past():
    """A prompt whose end is served sparsely, against the same positions one by one."""
    maps, mask = filling(), padded("left")[:, :50]
    full = step(50, mask)
    query = torch.randn(3, 4, 50, 16, generator=torch.Generator().manual_seed(1))
    served = SparseAttention(HashSelector(maps), BUDGET, min_context=0, sparse_tail=20)
    given = {"scale": 0.25, "softcap": 0.0, "dense": lambda: torch.zeros_like(query)}
    together = served.attend(0, query, full.key, full.value, extent=full.extent, side=TokenCache(), **given)
    for tokens in range(31, 51):
        one = step(tokens, mask)
        one = dataclasses.replace(one, query=query[:, :, tokens - 1 : tokens])
        alone = HashSelector(maps).attend(one)
        torch.testing.assert_close(together[:, :, tokens - 1 : tokens], alone, rtol=1e-5, atol=1e-6)


def test_a_sampled_tail_stands_for_all_that_was_left_out():
    maps, one = filling(), step(60, padded("left"), budget=Budget(heavy=20, sink=1, local=2))
    for fraction in (0.2, 0.7):
        with_one, without = (SampledTail(HashSelector(maps, remainder=r), fraction) for r in (True, False))
        chosen = with_one.select(one)
        assert chosen.remainder is None and torch.equal(chosen.indices, without.select(one).indices)
        assert torch.equal(with_one.attend(one), without.attend(one))
