from __future__ import annotations

import dataclasses

import pytest
import torch

from hashattention import ops
from hashattention.attention import SparseAttention
from hashattention.cache import TokenCache
from hashattention.config import BaseModel, Budget, MapsConfig
from hashattention.errors import BackendError, ConfigError
from hashattention.maps import HashMaps
from hashattention.ops import reference
from hashattention.rows import Extent
from hashattention.selectors.base import Step
from hashattention.selectors.hash import HashSelector
from hashattention.selectors.oracle import OracleSelector

MODEL = BaseModel("LlamaForCausalLM", 2, 4, 2, 16, (0, 1), "{}")


def step(key, side, extent=None, layer=0):
    batch, _, tokens, dim = key.shape
    query = torch.randn(batch, 4, 1, dim, generator=torch.Generator().manual_seed(tokens))
    extent = extent or Extent.full(batch, tokens, key.device)
    return Step(layer, query, key, key, dim**-0.5, extent, Budget(heavy=5, sink=1, local=2), side)


@pytest.mark.parametrize("config", [MapsConfig(64, (8,)), MapsConfig.paper()])
def test_selection_is_the_ops_composed(config):
    torch.manual_seed(0)
    maps = HashMaps(config, MODEL)
    selector, side, key = HashSelector(maps), TokenCache(), torch.randn(2, 2, 30, 16)
    for tokens in (29, 30):
        one = step(key[:, :, :tokens], side)
        chosen = selector.select(one)
        layer, rows = maps.layer(0), one.rows(selector.share)
        scores = ops.score(layer.code_queries(one.query), layer.sign_keys(one.key), config.selection_heads(MODEL))
        indices, counts = ops.select(scores, rows.start, rows.end, rows.budgets, rows.capacity)
        assert torch.equal(chosen.indices, indices)
        assert torch.equal(chosen.counts, counts)
        assert chosen.counts.eq(8).all()


def test_keys_are_signed_once():
    torch.manual_seed(0)
    selector, side, key = HashSelector(HashMaps(MapsConfig(32, ()), MODEL)), TokenCache(), torch.randn(1, 2, 20, 16)
    selector.select(step(key[:, :, :19], side))
    poisoned = key.clone()
    poisoned[:, :, :19] = float("nan")
    after = selector.select(step(poisoned, side))
    assert torch.equal(after.indices, selector.select(step(key, TokenCache())).indices)


def test_two_maps_on_one_cache_do_not_share_signatures():
    torch.manual_seed(0)
    first, second = (HashSelector(HashMaps(MapsConfig(32, ()), MODEL)) for _ in range(2))
    side, key = TokenCache(), torch.randn(1, 2, 60, 16)
    first.select(step(key, side))
    assert torch.equal(second.select(step(key, side)).indices, second.select(step(key, TokenCache())).indices)


def test_auxiliary_bits_are_those_kept():
    assert HashSelector(HashMaps(MapsConfig(), MODEL)).auxiliary_bits(16) == 64
    assert (
        HashSelector(HashMaps(MapsConfig.paper(), MODEL)).auxiliary_bits(16) == 64
    )  # 32 bits, two query heads a KV head


CONFIGS = {
    "group code": MapsConfig(64, (8,)),
    "mixture": MapsConfig(32, (8,), mixture=2),
    "symmetric": MapsConfig(32, (8,), score="symmetric"),
    "per head": MapsConfig(32, (8,), query_input="head", selection_share="query_head"),
    "paper": MapsConfig.paper(),
}


class Two:
    """One history of a cache, served twice: by the fused step, and by its parts, which an observer asks for."""

    def __init__(self, config, backend, batch=3, tail=0):
        torch.manual_seed(0)
        maps, self.batch, self.chosen = HashMaps(config, MODEL), batch, []
        # `Selection.attend` has no backend of its own: the parts end in the automatic one.
        self.exact = backend == "auto"
        budget = Budget(heavy=5, sink=1, local=2)
        settings = {"min_context": 8, "sparse_tail": tail}
        self.fused = SparseAttention(HashSelector(maps, backend), budget, **settings)
        self.parts = SparseAttention(
            HashSelector(maps, backend), budget, **settings, observer=lambda *seen: self.chosen.append(seen[1])
        )
        self.name = maps, "signatures"
        self.sides = TokenCache(), TokenCache()
        self.keys = torch.zeros(batch, 2, 0, 16)

    def run(self, new, extent=None, softcap=0.0):
        """Append `new` tokens and attend; both ways give the same and hold the same signatures."""
        self.keys = torch.cat([self.keys, torch.randn(self.batch, 2, new, 16)], 2)
        tokens, query = self.keys.shape[2], torch.randn(self.batch, 4, new, 16)
        extent = extent(tokens) if extent else Extent.full(self.batch, tokens, query.device)
        given = {"extent": extent, "scale": 0.25, "softcap": softcap, "dense": lambda: torch.zeros_like(query)}
        outs = [
            served.attend(0, query, self.keys, self.keys, side=side, **given)
            for served, side in zip((self.fused, self.parts), self.sides, strict=True)
        ]
        if self.exact:
            assert torch.equal(*outs)
        # A selected token more or less changes far more than the order of a sum.
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
        held = [side.length(self.name) for side in self.sides]
        assert held[0] == held[1]
        if held[0]:
            valid = extent.rows(self.fused.budget, 1).valid(tokens)[:, None, : held[0], None]
            kept = [side.extend(self.name, held[0], None) for side in self.sides]
            assert torch.equal(*(signatures.masked_fill(~valid, 0) for signatures in kept))
        return outs[0]

    def each(self, act):
        for side in self.sides:
            act(side)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_fused_step_is_the_same_bit_for_bit(config, backend):
    two = Two(config, backend)
    two.run(20)
    assert two.sides[0].length(two.name) == 0
    for _ in range(70):
        assert two.run(1).abs().sum() > 0
    assert len(two.chosen) == 70
    two.run(9)
    two.run(1, softcap=5.0)
    assert two.sides[0].length(two.name) == 100


def test_the_fused_step_follows_crops_beams_and_batches():
    two = Two(CONFIGS["group code"], "auto")
    two.run(30)
    two.run(1)
    two.each(lambda side: side.crop(25))
    two.keys = two.keys[:, :, :25]
    two.run(1)
    beams = torch.tensor([2, 0, 0])
    two.each(lambda side: side.select(beams))
    two.keys = two.keys[beams]
    two.run(1)
    two.each(lambda side: side.repeat(2))
    two.keys, two.batch = two.keys.repeat_interleave(2, 0), 6
    for _ in range(3):
        two.run(1)
    two.each(lambda side: side.reset())
    two.run(1)
    assert two.sides[0].length(two.name) == 31


@pytest.mark.parametrize("padding", ["left", "right", "both", "holes", "empty", "ended"])
def test_the_fused_step_leaves_padding_alone(padding):
    """`ended`: one request's new slots are padding, so its last valid token is not the newest one."""

    def extent(tokens):
        mask = torch.ones(3, tokens, dtype=torch.bool)
        if padding in ("left", "both"):
            mask[0, :7] = mask[2, :19] = False
        if padding in ("right", "both"):
            mask[1, 12:20] = False
        if padding == "holes":
            mask[1, 5:18:3] = False
        if padding == "empty":
            mask[1] = False
        if padding == "ended":
            mask[1, 22:] = mask[2, 17:] = False
        return Extent.from_mask(mask, holes=padding in ("right", "both", "holes"))

    two = Two(CONFIGS["group code"], "auto")
    two.run(20, extent)
    for _ in range(6):
        two.run(1, extent)


@pytest.mark.parametrize("tail", [1, 3, 40])
def test_a_sparse_tail_signs_every_position_once(tail):
    """Earlier positions of a prompt are served with the later keys already there."""
    two = Two(CONFIGS["group code"], "auto", tail=tail)
    for new in (30, 1, 12, 1, 1, 2):
        two.run(new)
    assert two.sides[0].length(two.name) == 47


def test_the_fused_step_signs_one_key_a_token(monkeypatch):
    two, signed = Two(CONFIGS["group code"], "auto"), []
    two.run(30)
    real = ops.encode_signature
    monkeypatch.setattr(
        ops, "encode_signature", lambda x, *rest, **named: signed.append(x.shape[2]) or real(x, *rest, **named)
    )
    side, query = two.sides[0], torch.randn(3, 4, 1, 16)
    for tokens in (30, 30):
        one = Step(0, query, two.keys, two.keys, 0.25, Extent.full(3, tokens, query.device), two.fused.budget, side)
        two.fused.selector.attend(one)
    assert signed == [29]
    two.fused.selector.select(one)
    assert signed == [29]


def test_a_step_that_fails_leaves_its_signature_to_be_made():
    two = Two(CONFIGS["group code"], "auto")
    two.run(30)
    two.run(1)
    two.keys = torch.cat([two.keys, torch.randn(3, 2, 1, 16)], 2)
    side, query = two.sides[0], torch.randn(3, 4, 1, 16)
    one = Step(0, query, two.keys, two.keys, 0.25, Extent.full(3, 32, query.device), two.fused.budget, side)
    selector = two.fused.selector
    selector.backend = "none"
    with pytest.raises(BackendError, match="unknown backend 'none'"):
        selector.attend(one)
    assert side.length(two.name) == 31
    selector.backend = "auto"
    out = selector.attend(one)
    assert torch.equal(out, one.attend(two.parts.selector.select(dataclasses.replace(one, side=TokenCache()))))


def test_the_cache_may_go_in_and_out_of_inference_mode():
    two = Two(CONFIGS["group code"], "auto")
    for inference in (True, False, True, False):
        with torch.inference_mode(inference):
            two.keys = two.keys.clone()
            two.run(20)
            two.run(1)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 37])
def test_on_a_gpu_every_step_is_one_op(monkeypatch, padding):
    """A code's weight may be rounded the other way: most heads must agree with the reference."""
    torch.manual_seed(0)
    model = BaseModel("LlamaForCausalLM", 1, 32, 8, 128, (0,), "{}")
    maps = HashMaps(MapsConfig(64, (256, 256)), model).cuda().requires_grad_(False)
    fused, side = HashSelector(maps), TokenCache()
    parts = HashSelector(maps, "reference")
    keys = torch.randn(2, 8, 4200, 128, device="cuda", dtype=torch.bfloat16)
    agreed = []
    for tokens in range(4096, 4166):
        query = torch.randn(2, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(2, tokens, dtype=torch.bool, device="cuda")
        mask[0, :padding] = False
        extent = Extent.from_mask(mask, holes=False) if padding else Extent.full(2, tokens, query.device)
        key = keys[:, :, :tokens]
        step = Step(0, query, key, key, 128**-0.5, extent, Budget(density=1 / 16), side)
        with monkeypatch.context() as patched:
            patched.setattr(ops, "score_select", None)
            out = fused.attend(step).float()
        assert side.length((maps, "signatures")) == tokens
        wanted = step.attend(parts.select(step)).float()
        error = (out - wanted).norm(dim=(2, 3)) / wanted.norm(dim=(2, 3))
        agreed.append((error < 0.02).float().mean())
    assert torch.stack(agreed).mean() > 0.8
    signatures = side.extend((maps, "signatures"), 4165, lambda first: pytest.fail("signed already"))
    wanted = reference.encode_signature(
        keys[:, :, 4096:4165], fused._layer(step).key_weights, fused._layer(step).key_biases
    )
    same = reference.unpack_bits(signatures[:, :, 4096:4165]) == reference.unpack_bits(wanted)
    assert same.float().mean() > 0.999


TEMPERATURES = ((0.4, 1.5), (0.02, 3.0))


def heated(config=CONFIGS["group code"]):
    torch.manual_seed(0)
    heads = config.selection_heads(MODEL)
    return HashMaps(config, MODEL, None, None, tuple(row * (heads // 2) for row in TEMPERATURES))


def padded(kind, batch=3, tokens=60):
    """A mask of ragged requests, one of them with few candidates."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    if kind == "left":
        mask[0, :50] = mask[1, :7] = False
    if kind == "right":
        mask[0, 3:] = mask[2, 40:] = False
    if kind == "holes":
        mask[0, 4:55:2] = mask[1] = False
    return mask


@pytest.mark.parametrize("p", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_top_p_takes_the_fewest_that_hold_the_share_and_never_more_than_the_budget(config, kind, p):
    maps, key, mask = heated(config), torch.randn(3, 2, 60, 16) * 2, padded(kind)
    extent = Extent.from_mask(mask)
    for layer in (0, 1):
        # What lies in the padding is never looked at.
        one = step(torch.where(mask[:, None, :, None], key, torch.nan), TokenCache(), extent, layer)
        one = dataclasses.replace(one, budget=Budget(heavy=20, sink=1, local=2, top_p=p))
        chosen = HashSelector(maps).select(one)
        own, heads = maps.layer(layer), config.selection_heads(MODEL)
        code, scale = own.scale_queries(one.query)
        scores = ops.score(code, own.sign_keys(key), heads)
        for request, head in [(b, h) for b in range(3) for h in range(heads)]:
            tokens = mask[request].nonzero().flatten().tolist()
            sink, local, most = one.budget.counts(len(tokens))
            free = tokens[sink : len(tokens) - local]
            ranked = sorted(free, key=lambda token: (int(scores[request, head, token]), token), reverse=True)
            unit = scale[request].view(heads, -1).mean(1)[head].double() * maps.temperatures[layer][head]
            held = (scores[request, head, ranked] * unit).softmax(0).cumsum(0)
            needed = min(most, int((held < p - 1e-9).sum()) + 1 if free else 0)
            wanted = sorted(tokens[:sink] + ranked[:needed] + tokens[len(tokens) - local :])
            assert chosen.indices[request, head, : int(chosen.counts[request, head])].tolist() == wanted
    assert chosen.indices.shape[2] == 23


def test_top_p_saves_tokens_and_rows_differ():
    maps, key = heated(), torch.randn(4, 2, 300, 16) * 3
    one = dataclasses.replace(step(key, TokenCache()), budget=Budget(heavy=200, sink=1, local=2, top_p=0.6))
    counts = HashSelector(maps).select(one).counts
    assert (counts < 203).all() and len(counts.unique()) > 2
    fewer = dataclasses.replace(one, budget=Budget(heavy=200, sink=1, local=2, threshold=0.02))
    assert (HashSelector(maps).select(fewer).counts < 53).all()


def test_top_p_of_one_is_the_budget_alone():
    selector, key = HashSelector(HashMaps(CONFIGS["group code"], MODEL)), torch.randn(2, 2, 40, 16)
    one = step(key, TokenCache())
    full = dataclasses.replace(one, budget=dataclasses.replace(one.budget, top_p=1.0))
    assert torch.equal(selector.select(one).indices, selector.select(full).indices)
    assert torch.equal(selector.attend(one), selector.attend(full))


def test_the_option_is_the_budgets_top_p():
    maps, key = heated(), torch.randn(2, 2, 90, 16)
    one = dataclasses.replace(step(key, TokenCache()), budget=Budget(heavy=50, sink=1, local=2))
    asked = dataclasses.replace(one, budget=Budget(heavy=50, sink=1, local=2, top_p=0.7))
    chosen, wanted = HashSelector(maps, top_p=0.7).select(one), HashSelector(maps).select(asked)
    assert torch.equal(chosen.indices, wanted.indices) and (wanted.counts < 53).any()


def test_top_p_through_a_whole_history_is_the_parts():
    """The step that would be fused goes by its parts, and signs every key once."""
    maps, batch = heated(), 2
    budget = Budget(density=0.5, sink=1, local=2, top_p=0.7)
    seen = []
    fused = SparseAttention(HashSelector(maps), budget, min_context=8)
    parts = dataclasses.replace(fused, observer=lambda *given: seen.append(given[1].counts))
    sides, keys = (TokenCache(), TokenCache()), torch.randn(batch, 2, 20, 16)
    for _ in range(5):
        keys = torch.cat([keys, torch.randn(batch, 2, 1, 16)], 2)
        query = torch.randn(batch, 4, 1, 16)
        given = {"extent": Extent.full(batch, keys.shape[2], query.device), "scale": 0.25, "softcap": 0.0}
        outs = [
            served.attend(0, query, keys, keys, side=side, dense=lambda: pytest.fail("dense"), **given)
            for served, side in zip((fused, parts), sides, strict=True)
        ]
        assert torch.equal(*outs)
    assert torch.stack(seen).max() <= 12 and torch.stack(seen).min() < 11


def test_a_covering_budget_is_dense_unless_top_p_may_take_less():
    selector = HashSelector(heated())
    covering = [Budget(density=1.0), Budget(density=1.0, top_p=1.0), Budget(density=1.0, top_p=0.9)]
    served = [SparseAttention(selector, budget).sparse_positions(0, 1, 5000) for budget in covering]
    assert served == [0, 0, 1]


@pytest.mark.parametrize("given", [{"top_p": 0.9}, {"threshold": 0.01}])
def test_without_temperatures_the_option_says_what_to_do(given):
    maps, budget = HashMaps(CONFIGS["group code"], MODEL), Budget(density=0.1, **given)
    with pytest.raises(ConfigError, match=r"these maps have none: train .*temperatures\.calibrate"):
        SparseAttention(HashSelector(maps), budget)
    with pytest.raises(ConfigError, match="these maps have none"):
        HashSelector(maps).select(dataclasses.replace(step(torch.randn(1, 2, 20, 16), TokenCache()), budget=budget))
    with pytest.raises(ConfigError, match="these maps have none"):
        HashSelector(maps, top_p=0.5)
    with pytest.raises(ConfigError, match="takes no top_p or threshold"):
        SparseAttention(OracleSelector(), budget)
