"""The CUDA decode step against the reference: the same index sets bit for bit, attention within the house rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from hashattention import ops
from hashattention.ops import reference

pytestmark = pytest.mark.gpu


def maps(heads, widths, dtype):
    pairs = list(itertools.pairwise(widths))
    weights = [(torch.randn(heads, a, b, device="cuda") * 2 / a**0.5).to(dtype) for a, b in pairs]
    return weights, [(torch.randn(heads, b, device="cuda") * 0.1).to(dtype) for _, b in pairs]


def case(
    batch, tokens, *, bits=64, dim=128, heads=8, group=4, levels=7, dtype=torch.bfloat16, budget=(16, 64, 100),
    hidden=(256, 256), mixture=1,
):  # fmt: skip
    """Random tensors with ragged rows; what must not be read is NaN."""
    k, v = (torch.randn(batch, heads, tokens, dim, device="cuda", dtype=dtype) for _ in range(2))
    signatures = torch.randint(-(2**31), 2**31, (batch, heads, tokens, bits // 32), device="cuda", dtype=torch.int32)
    end = torch.randint(1, tokens + 1, (batch,), device="cuda").int()
    start = (end * torch.rand(batch, device="cuda") * 0.5).int()
    outside = torch.arange(tokens, device="cuda")
    outside = (outside < start[:, None]) | (outside >= end[:, None])
    for cache in (k, v):
        cache.masked_fill_(outside[:, None, :, None], float("nan"))
    weights, biases = maps(heads, (group * dim, *hidden, bits * mixture), dtype)
    return {
        "q": torch.randn(batch, heads * group, 1, dim, device="cuda", dtype=dtype),
        "k": k,
        "v": v,
        "signatures": signatures,
        "weights": weights,
        "biases": biases,
        "start": start,
        "end": end,
        "budgets": torch.tensor(budget, device="cuda", dtype=torch.int32).repeat(batch, heads, 1),
        "capacity": sum(budget),
        "levels": levels,
        "scale": dim**-0.5,
    }


def page(made, size):
    """The same caches in shuffled pages."""
    batch, _, tokens, _ = made["k"].shape
    count = tokens // size
    table = torch.randperm(batch * count + 3, device="cuda")[: batch * count].view(batch, count)
    paged = dict(made, block_table=table.int())
    for name in ("k", "v", "signatures"):
        cache = made[name]
        poison = float("nan") if cache.is_floating_point() else -1
        pages = cache.new_full((batch * count + 3, cache.shape[1], size, cache.shape[-1]), poison)
        pages[table.flatten()] = cache.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
        paged[name] = pages
    return paged


def expected(made):
    """The reference composed; its integer code is the kernel's own but for roundings at a half."""
    x = ops.group_queries(made["q"], made["budgets"].shape[1])
    if made["levels"]:
        code = reference.encode_query(x, made["weights"], made["biases"], made["levels"])[0]
    else:
        code = reference.encode_signature(x, made["weights"], made["biases"])
    bounds = made["start"], made["end"], made["budgets"], made["capacity"]
    indices, counts = reference.score_select(code, made["signatures"], *bounds, None, made.get("block_table"))
    exact = [t.float() for t in (made["q"], made["k"], made["v"])]
    return reference.attend(*exact, indices, counts, made["scale"], 0.0, made.get("block_table"))


def make(batch=1, tokens=4096, *, hidden=(256,), full=False, seed=None, **options):
    """As `case`, with float32 biases; `full`: no row is ragged."""
    torch.manual_seed(tokens if seed is None else seed)
    made = case(batch, tokens, hidden=hidden, **options)
    made["biases"] = [b.float() for b in made["biases"]]
    if full:
        made["start"].zero_()
        made["end"].fill_(tokens)
        for cache in (made["k"], made["v"]):
            cache.normal_()
    return made


def check(made):
    """Twice the same bits, and the reference's selection and attention."""
    out, logsumexp = ops.decode(**made, backend="cuda")
    again, _ = ops.decode(**made, backend="cuda")
    wanted, wanted_lse = expected(made)
    assert torch.equal(out, again), "two runs differ"
    # Another set of tokens has another sum.
    torch.testing.assert_close(logsumexp, wanted_lse, atol=1e-4, rtol=1e-5)
    plain = (wanted.to(out.dtype).float() - wanted).norm()
    assert (out.float() - wanted).norm() <= 2 * plain


CASES = [
    (case, {"batch": 2, "tokens": 4104}),
    (case, {"batch": 5, "tokens": 9000}),
    (case, {"batch": 3, "tokens": 5000, "bits": 32}),
    (case, {"batch": 3, "tokens": 5000, "bits": 128, "levels": 7}),
    (case, {"batch": 3, "tokens": 5000, "levels": 0}),
    (case, {"batch": 2, "tokens": 3000, "dim": 64, "heads": 2, "group": 7, "dtype": torch.float16}),
    (case, {"batch": 2, "tokens": 700, "budget": (0, 0, 50)}),
    (case, {"batch": 2, "tokens": 700, "budget": (4, 8, 4000)}),
    (case, {"batch": 40, "tokens": 512}),
    (case, {"batch": 2, "tokens": 2048, "hidden": (256,)}),
    (case, {"batch": 35, "tokens": 640, "hidden": (256,)}),
    (case, {"batch": 4, "tokens": 2048, "hidden": (512,)}),
    (case, {"batch": 3, "tokens": 2048, "bits": 128, "levels": 15}),
    (case, {"batch": 1, "tokens": 1 << 20, "heads": 2}),
    (case, {"batch": 1, "tokens": 40000, "hidden": (256,)}),
    (case, {"batch": 1, "tokens": 20480}),
    (case, {"batch": 1, "tokens": 1 << 17, "hidden": (256,)}),
    (case, {"batch": 1, "tokens": 100000}),
    (case, {"batch": 1, "tokens": 70000, "bits": 32, "hidden": (256,)}),
    (case, {"batch": 1, "tokens": 70000, "bits": 128, "hidden": (256,)}),
    (case, {"batch": 1, "tokens": 70000, "dim": 64, "heads": 2, "group": 7, "hidden": (128,)}),
    (case, {"batch": 2, "tokens": 40000, "heads": 2, "group": 6, "hidden": (256,)}),
    (case, {"batch": 1, "tokens": 1 << 17, "heads": 2, "group": 4, "hidden": (512,)}),
    (case, {"batch": 1, "tokens": 1 << 17, "heads": 4, "bits": 128, "hidden": (256, 256)}),
    (case, {"batch": 12, "tokens": 4096, "heads": 1, "group": 4, "dim": 64, "hidden": (64,)}),
]


@pytest.mark.parametrize(("make", "options"), CASES)
@pytest.mark.parametrize("pages", [0, 8, 64])
def test_step_is_the_reference(make, options, pages):
    torch.manual_seed(options["tokens"])
    options = dict(options, tokens=options["tokens"] // 64 * 64) if pages else options
    made = make(**options)
    made = page(made, pages) if pages else made
    out, logsumexp = ops.decode(**made, backend="cuda")
    again, _ = ops.decode(**made, backend="cuda")
    wanted, wanted_lse = expected(made)
    assert torch.equal(out, again), "two runs differ"
    torch.testing.assert_close(logsumexp, wanted_lse, atol=1e-4, rtol=1e-5)
    error = (out.float() - wanted).norm() / wanted.norm()
    plain = (wanted.to(out.dtype).float() - wanted).norm() / wanted.norm()
    # Storing the output alone costs `plain`; rounding the weights before the second product as much again.
    assert error <= 2 * plain


def test_all_ties_take_the_most_recent():
    made = case(2, 2048, budget=(1, 2, 10))
    made["signatures"].zero_()
    made["start"].zero_()
    made["end"].fill_(2048)
    for cache in (made["k"], made["v"]):
        cache.normal_()
    chosen = torch.tensor([0, *range(2036, 2048)], device="cuda", dtype=torch.int32).expand(2, 8, -1).contiguous()
    counts = torch.full((2, 8), 13, device="cuda", dtype=torch.int32)
    wanted = reference.attend(made["q"], made["k"], made["v"], chosen, counts, made["scale"])[0]
    torch.testing.assert_close(ops.decode(**made, backend="cuda")[0], wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("towards", [True, False])
@pytest.mark.parametrize("batch", [1, 8])
def test_scores_beyond_the_counted_window(batch, towards):
    """128 bits give more scores than there are bins; keys that are the code, or against it, lie outside the first."""
    made = case(batch, 4096, bits=128, budget=(2, 8, 300))
    made["start"].zero_()
    made["end"].fill_(4096)
    for cache in (made["k"], made["v"]):
        cache.normal_()
    x = ops.group_queries(made["q"], 8)
    code, _ = reference.encode_query(x, made["weights"], made["biases"], 7)
    keys = reference.pack_bits(code > 0 if towards else code < 0)
    made["signatures"].copy_(keys.expand_as(made["signatures"]))
    made["signatures"][:, :, 100:200] ^= 0xF0F
    out, _ = ops.decode(**made, backend="cuda")
    wanted, _ = expected(made)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 4096), (1, 32768), (8, 4096)])
def test_a_border_far_below_half_the_weights(batch, tokens):
    """Keys that lie against the code: hardly a candidate scores what a random one does."""
    made = case(batch, tokens, budget=(2, 8, 90))
    made["start"].zero_()
    made["end"].fill_(tokens)
    for cache in (made["k"], made["v"]):
        cache.normal_()
    code, _ = reference.encode_query(ops.group_queries(made["q"], 8), made["weights"], made["biases"], 7)
    noise = torch.randint(-(2**31), 2**31, (3, *made["signatures"].shape), device="cuda", dtype=torch.int32)
    made["signatures"].copy_(reference.pack_bits(code < 0) ^ (noise[0] & noise[1] & noise[2]))
    out, _ = ops.decode(**made, backend="cuda")
    wanted, _ = expected(made)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("hidden", [(256,), (256, 256)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 2048), (1, 32768), (1, 1 << 17), (6, 2048)])
def test_the_newest_key_is_signed(batch, tokens, hidden):
    """By blocks of its own or by the launch before: every bit whose logit is not about 0, and no other signature."""
    made = case(batch, tokens, hidden=hidden)
    made["biases"] = [b.float() for b in made["biases"]]
    made["end"].fill_(tokens)
    weights, biases = maps(8, (128, *hidden, 64), torch.bfloat16)
    key, biases = torch.randn(batch, 8, 1, 128, device="cuda").bfloat16(), [b.float() for b in biases]
    before = made["signatures"].clone()
    ops.decode(**made, new_key=(key, weights, biases), backend="cuda")
    logits = reference.mlp(key, weights, biases)
    signed = reference.unpack_bits(made["signatures"][:, :, -1:])
    sure = logits.abs() > 1e-3
    assert torch.equal(signed[sure], (logits > 0)[sure])
    assert torch.equal(made["signatures"][:, :, :-1], before[:, :, :-1])


@pytest.mark.parametrize(("batch", "most"), [(1, 1), (4, 2), (40, 2)])
def test_a_step_is_one_launch_or_two(batch, most):
    """The newest key is a slice of the cache: copying it first would be a launch more."""
    made = case(batch, 2048)
    key_maps = maps(8, (128, 256, 256, 64), torch.bfloat16)
    made["biases"], key_biases = ([b.float() for b in biases] for biases in (made["biases"], key_maps[1]))
    new_key = made["k"][:, :, -1:], key_maps[0], key_biases
    ops.decode(**made, new_key=new_key, backend="cuda")
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        ops.decode(**made, new_key=new_key, backend="cuda")
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(launched) <= most, launched


def test_empty_rows_give_zero():
    made = case(3, 1024)
    made["start"].copy_(made["end"])
    out, logsumexp = ops.decode(**made, backend="cuda")
    assert torch.all(out == 0)
    assert torch.all(logsumexp == -torch.inf)


def test_a_captured_graph_follows_its_inputs():
    """Captured once, replayed over new queries, lengths and budgets; nothing waits for the host."""
    made, other = case(2, 4096), case(2, 4096)
    other["weights"], other["biases"] = made["weights"], made["biases"]
    ops.decode(**made, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.decode(**made, backend="cuda")
    for name in ("q", "k", "v", "signatures", "start", "end", "budgets"):
        made[name].copy_(other[name])
    graph.replay()
    torch.testing.assert_close(out, ops.decode(**made, backend="cuda")[0], atol=0, rtol=0)


@pytest.mark.parametrize(("batch", "tokens", "options"), [(8, 8192, {}), (40, 4096, {}), (20, 2048, {"mixture": 2})])
def test_codes_of_an_earlier_launch_are_never_taken(batch, tokens, options):
    """The step starts under the launch that makes its codes, where those of the replay before still lie."""
    made = make(batch, tokens, **options)
    queries = [torch.randn_like(made["q"]) for _ in range(8)]
    wanted = []
    for q in queries:
        wanted.append(ops.decode(**made | {"q": q}, backend="cuda")[0])
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = []
        for q in queries:
            made["q"].copy_(q)
            outs.append(ops.decode(**made, backend="cuda")[0])
    for _ in range(20):
        graph.replay()
        for out, one in zip(outs, wanted, strict=True):
            assert torch.equal(out, one)


def test_a_step_that_fails_leaves_no_codes_to_the_next(monkeypatch):
    """Codes are words with marks in memory that every step finds zero and leaves so."""
    from hashattention.ops import cuda

    made = make(8, 8192)
    wanted = ops.decode(**made, backend="cuda")[0]

    def fail(*given, **named):
        raise RuntimeError("no launch")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "launch", fail)
        with pytest.raises(RuntimeError, match="no launch"):
            ops.decode(**made | {"q": torch.randn_like(made["q"])}, backend="cuda")
    torch.cuda.synchronize()
    held = [words for (place, *_), words in cuda.board._boards.items() if place[0] == "codes"]
    assert held and not any(words.any() for words in held)
    assert torch.equal(ops.decode(**made, backend="cuda")[0], wanted)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 4096), (2, 40960), (8, 8192), (40, 4096)])
def test_a_newest_key_that_is_no_local_token_competes_by_its_own_signature(batch, tokens):
    """Made by the same launch or the one that the step starts under; at its place lies what a replay before left. Half
    of all tokens are taken, and the newest has a value that shows whether it is.
    """
    made = make(batch, tokens, budget=(4, 0, tokens // 2), full=True)
    made["v"][:, :, -1] = 1000
    key_maps = maps(8, (128, 256, 64), torch.bfloat16)
    new_key = made["k"][:, :, -1:], key_maps[0], [b.float() for b in key_maps[1]]
    keys, queries = (torch.randn(6, *made[n].shape[:2], 1, 128, device="cuda").bfloat16() for n in ("k", "q"))
    wanted = []
    for key, q in zip(keys, queries, strict=True):
        made["k"][:, :, -1:], made["q"][:] = key, q
        # The signature that the step itself makes: another kernel may round a bit of it the other way.
        ops.decode(**made, new_key=new_key, backend="cuda")
        wanted.append(ops.decode(**made, backend="cuda")[0])
    made["signatures"][:, :, -1] = 0
    outs = []
    graph = torch.cuda.CUDAGraph()
    ops.decode(**made, new_key=new_key, backend="cuda")
    with torch.cuda.graph(graph):
        for key, q in zip(keys, queries, strict=True):
            made["k"][:, :, -1:], made["q"][:] = key, q
            outs.append(ops.decode(**made, new_key=new_key, backend="cuda")[0])
    for _ in range(5):
        graph.replay()
        for out, one in zip(outs, wanted, strict=True):
            assert torch.equal(out, one)


def test_an_odd_length_is_refused_by_name_and_served_by_choice():
    """Rows of 16 bytes are what the kernel loads; the automatic choice takes another backend."""
    from hashattention.errors import BackendError

    made = case(2, 1001, budget=(4, 8, 989))
    with pytest.raises(BackendError, match="aligned to 16 bytes"):
        ops.decode(**made, backend="cuda")
    out, _ = ops.decode(**made)
    wanted, _ = expected(made)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)


def test_what_the_kernels_refuse_has_a_reason():
    from hashattention.errors import BackendError

    made = case(2, 512)
    with pytest.raises(BackendError, match="holes"):
        ops.decode(**made, mask=torch.ones(2, 512, dtype=torch.bool, device="cuda"), backend="cuda")
