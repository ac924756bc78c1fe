"""Mixtures of query codes in the CUDA step: the largest of their scores counts, and rows are the reference's."""

from __future__ import annotations

import pytest
import torch
from tests.ops.cuda.test_step import check, expected, maps, page
from tests.ops.cuda.test_step import make as draw

from hashattention import ops
from hashattention.errors import BackendError
from hashattention.ops import cuda, reference
from hashattention.ops.cuda import layout

SHAPES = [(64, 7, 2), (32, 7, 2), (128, 7, 2), (128, 15, 2), (64, 15, 2), (64, 7, 4), (32, 15, 4)]
CODES = ["random", "equal", "one of zeros", "opposite", "one of many times the other's magnitudes"]
KEYS = ["random", "all ties", "few", "towards", "against", "towards the last code"]


def draw_codes(kind, heads, bits, levels, mixture):
    """Integer codes ``[heads, mixture, bits]`` of which each head's largest entry is `levels`."""
    codes = torch.randint(-levels, levels + 1, (heads, mixture, bits), device="cuda")
    if kind == "equal":
        codes[:] = codes[:, :1]
    elif kind == "one of zeros":
        codes[:, -1] = 0
    elif kind == "opposite":
        codes[:, 1::2] = -codes[:, ::2]
    elif kind != "random":
        codes[:, 1:] = codes[:, 1:].sign()
    codes[:, 0, 0] = levels
    return codes


def draw_keys(kind, codes, signatures):
    """Put signatures of a kind into the cache ``[B, H, T, W]``."""
    towards = reference.pack_bits(codes > 0)
    noise = torch.randint(-(2**31), 2**31, (3, *signatures.shape), device="cuda", dtype=torch.int32)
    if kind == "all ties":
        signatures.zero_()
    elif kind == "few":
        few = torch.randint(-(2**31), 2**31, (5, signatures.shape[-1]), device="cuda", dtype=torch.int32)
        signatures.copy_(few[noise[0, ..., 0] % 5])
    elif kind == "random":
        signatures.copy_(noise[0])
    else:
        own = towards[:, -1 if kind == "towards the last code" else 0, None]
        signatures.copy_((~own if kind == "against" else own) ^ (noise[0] & noise[1] & noise[2]))


def make(batch=1, tokens=4096, *, mixture=2, **options):
    return draw(batch, tokens, mixture=mixture, seed=tokens + batch, **options)


def fix_codes(made, codes):
    """Maps whose last biases are these codes, whatever the query: nothing is left to round."""
    made["weights"][-1].zero_()
    made["biases"][-1].copy_(codes.flatten(1))


def redraw_queries(made):
    """Queries none of whose logits lies where two right sums may be rounded apart."""
    for _ in range(200):
        logits = reference.mlp(ops.group_queries(made["q"], made["budgets"].shape[1]), made["weights"], made["biases"])
        entries = logits / logits.abs().amax(-1, keepdim=True) * made["levels"]
        near = ((entries - entries.floor() - 0.5).abs() < 5e-4).flatten(1).any(1)
        if not near.any():
            return
        made["q"][near] = torch.randn_like(made["q"][near])
    raise AssertionError("no such queries")


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [0, 16])
@pytest.mark.parametrize(("bits", "levels", "mixture"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_selection_is_the_reference_bit_for_bit(batch, bits, levels, mixture, pages):
    made = make(batch, 3072, bits=bits, levels=levels, mixture=mixture)
    rows = made["start"], made["end"], made["budgets"], made["capacity"]
    for kind in CODES:
        codes = draw_codes(kind, 8, bits, levels, mixture)
        code = codes.flatten(1)[None, :, None].expand(batch, -1, -1, -1).to(torch.int8).clone()
        # Every request has a code of its own.
        code[1:] = code[1:].roll(1, 1)
        for keys in KEYS:
            draw_keys(keys, codes, made["signatures"])
            held = page(made, pages) if pages else made
            table = held.get("block_table")
            options = {"block_table": table, "levels": levels, "backend": "cuda"}
            indices, counts = ops.score_select(code, held["signatures"], *rows, **options)
            wanted, wanted_counts = reference.score_select(code, held["signatures"], *rows, None, table)
            assert torch.equal(counts, wanted_counts), (kind, keys)
            assert torch.equal(indices, wanted), (kind, keys)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize(("bits", "levels", "mixture"), SHAPES)
@pytest.mark.parametrize("local", [0, 8])
def test_a_step_of_known_codes_selects_the_reference_rows(batch, bits, levels, mixture, local):
    """The codes are the biases of the maps, so that ties and borders are where they are wanted."""
    made = make(batch, 2048, bits=bits, levels=levels, mixture=mixture, full=True, budget=(2, local, 90))
    for kind in CODES:
        codes = draw_codes(kind, 8, bits, levels, mixture)
        fix_codes(made, codes)
        for keys in KEYS:
            draw_keys(keys, codes, made["signatures"])
            check(made)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 1, "tokens": 4096},
        {"batch": 1, "tokens": 5000, "hidden": (256, 256)},
        {"batch": 3, "tokens": 4104},
        {"batch": 3, "tokens": 9000, "hidden": (256, 256)},
        {"batch": 40, "tokens": 512},
        {"batch": 3, "tokens": 5000, "bits": 32, "levels": 15},
        {"batch": 3, "tokens": 5000, "bits": 128},
        {"batch": 1, "tokens": 5000, "bits": 128, "levels": 15},
        {"batch": 1, "tokens": 2048, "hidden": (512,)},
        {"batch": 1, "tokens": 70000, "bits": 32},
        {"batch": 1, "tokens": 70000, "bits": 128},
        {"batch": 1, "tokens": 1 << 17},
        {"batch": 3, "tokens": 700, "budget": (0, 0, 50)},
        {"batch": 3, "tokens": 700, "budget": (4, 8, 4000)},
        {"batch": 1, "tokens": 3000, "dim": 64, "group": 4, "dtype": torch.float16},
        {"batch": 1, "tokens": 1 << 20, "heads": 2},
        {"batch": 1, "tokens": 4096, "mixture": 4},
        {"batch": 3, "tokens": 4096, "mixture": 4},
        {"batch": 3, "tokens": 4096, "mixture": 4, "bits": 32},
    ],
)
@pytest.mark.parametrize("pages", [0, 8])
def test_step_is_the_reference(options, pages):
    made = make(**dict(options, tokens=options["tokens"] // 8 * 8))
    redraw_queries(made)
    check(page(made, pages) if pages else made)


@pytest.mark.gpu
@pytest.mark.parametrize("local", [0, 64])
@pytest.mark.parametrize(
    ("batch", "tokens", "bits", "mixture"),
    [(1, 2048, 64, 2), (1, 1 << 17, 64, 2), (6, 2048, 64, 2), (1, 4096, 32, 2), (1, 4096, 128, 2), (1, 4096, 64, 4)],
)
def test_the_newest_key_is_signed_and_scored(batch, tokens, bits, mixture, local):
    """Every bit whose logit is not about 0, no other signature; a step that finds it in the cache gives the same."""
    made = make(batch, tokens, bits=bits, mixture=mixture, full=True, budget=(4, local, 100))
    weights, biases = maps(8, (128, 256, bits), torch.bfloat16)
    biases, key = [b.float() for b in biases], made["k"][:, :, -1:]
    before = made["signatures"].clone()
    out, _ = cuda.decode_step(**made, new_key=(key, weights, biases))
    logits = reference.mlp(key, weights, biases)
    signed = reference.unpack_bits(made["signatures"][:, :, -1:])
    sure = logits.abs() > 1e-3
    assert torch.equal(signed[sure], (logits > 0)[sure])
    assert torch.equal(made["signatures"][:, :, :-1], before[:, :, :-1])
    assert torch.equal(out, cuda.decode_step(**made)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("towards", [False, True])
def test_the_newest_key_competes_by_its_best_code(towards, last):
    """Its signature is that of one of the codes, or against both, beside random ones: taken first, or not at all."""
    made = make(1, 2048, full=True, budget=(4, 0, 100))
    codes = draw_codes("random", 8, 64, 7, 2)
    codes[:, 1] = codes[:, 0] if not towards else codes[:, 1]
    fix_codes(made, codes)
    weights, biases = maps(8, (128, 256, 64), torch.bfloat16)
    weights[-1].zero_()
    sign = codes[:, int(last)].sign().float() * (1 if towards else -1)
    key_biases = [biases[0].float(), torch.where(sign == 0, -torch.ones_like(sign), sign)]
    out, logsumexp = cuda.decode_step(**made, new_key=(made["k"][:, :, -1:], weights, key_biases))
    assert torch.equal(made["signatures"][:, :, -1], reference.pack_bits(key_biases[-1] > 0)[None])
    wanted, wanted_lse = expected(made)
    torch.testing.assert_close(logsumexp, wanted_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "most"), [(1, 1), (4, 2), (40, 2)])
def test_a_step_is_one_launch_or_two(batch, most):
    made = make(batch, 2048, full=True)
    key_weights, key_biases = maps(8, (128, 256, 64), torch.bfloat16)
    new_key = made["k"][:, :, -1:], key_weights, [b.float() for b in key_biases]
    cuda.decode_step(**made, new_key=new_key)
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        cuda.decode_step(**made, new_key=new_key)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(launched) <= most, launched


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_a_captured_graph_follows_its_inputs(batch):
    made, other = make(batch, 4096), make(batch, 4096 + 8)
    ops.decode(**made, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.decode(**made, backend="cuda")
    for name in ("q", "k", "v", "signatures", "start", "end", "budgets"):
        source = other[name][:, :, :4096] if name in ("k", "v", "signatures") else other[name]
        made[name].copy_(source)
    made["end"].clamp_(max=4096)
    graph.replay()
    torch.testing.assert_close(out, ops.decode(**made, backend="cuda")[0], atol=0, rtol=0)


@pytest.mark.gpu
def test_all_ties_take_the_most_recent():
    made = make(2, 2048, full=True, budget=(1, 2, 10))
    made["signatures"].zero_()
    chosen = torch.tensor([0, *range(2036, 2048)], device="cuda", dtype=torch.int32).expand(2, 8, -1).contiguous()
    counts = torch.full((2, 8), 13, device="cuda", dtype=torch.int32)
    wanted = reference.attend(made["q"], made["k"], made["v"], chosen, counts, made["scale"])[0]
    torch.testing.assert_close(ops.decode(**made, backend="cuda")[0], wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_a_mixture_of_three_is_refused_by_name():
    made = make(2, 1024, mixture=3)
    with pytest.raises(BackendError, match="a mixture of 2 or 4, given 3"):
        ops.decode(**made, backend="cuda")


@pytest.mark.parametrize(
    ("bits", "mixture", "reason"),
    [
        (64, 1, None),
        (64, 2, None),
        (64, 4, None),
        (128, 2, None),
        (32, 3, "a mixture of 2 or 4, given 3"),
        (128, 4, "at most 256 entries a query, given 512"),
    ],
)
def test_refusals_say_how_many_codes_are_served(bits, mixture, reason):
    signatures = torch.zeros(1, 2, 64, bits // 32, dtype=torch.int32)
    code = torch.zeros(1, 2, 1, bits * mixture, dtype=torch.int8)
    said = cuda._refuse_mixture(signatures, {"code": code})
    assert said is None if reason is None else reason in said


def test_a_mixture_takes_as_much_more_shared_memory_as_its_codes():
    """32 words a code beside the rest, and where the step encodes, logits of every block."""
    sizes = 0, 256, 4, 24, 4096, 512, 512
    one, two = layout.fit(*sizes), layout.fit(*sizes, mixture=2)
    assert one is not None
    assert two == one._replace(shared=one.shared + 128)
    fused = [layout.choose_fused(8, 1, 4096, 180, 512, (256, 0), 64, 128, mixture=m) for m in (1, 2, 4)]
    assert all(shape is not None for shape in fused)
    assert [shape.shared - fused[0].shared for shape in fused if shape] == [0, 2176, 6528]


def test_long_rows_of_a_mixture_lie_in_clusters():
    sizes = 8, 1, 1 << 19, 1 << 14, 512, (256, 0), 64, 128
    one, two = layout.choose_fused(*sizes), layout.choose_fused(*sizes, mixture=2)
    assert one is not None
    assert one.wide
    assert two is not None
    assert (two.wide, two.blocks) == (False, 8)


@pytest.mark.parametrize(("bits", "mixture", "blocks"), [(64, 1, 4), (64, 2, 4), (64, 4, 4), (128, 2, 4), (32, 4, 4)])
def test_encoding_finds_room_for_all_codes(bits, mixture, blocks):
    assert layout.encode_blocks(512, 128, [256, 256], bits, mixture) == blocks
