from __future__ import annotations

import itertools

import pytest
import torch
from tests.ops.test_decode import METHODS, add_apart, assert_same, remainder_of, step, with_new_key

from hashattention import ops
from hashattention.errors import BackendError
from hashattention.ops import dispatch, reference


def make(heads: int, group: int, tokens: int, device: str, maps: int | None = None) -> tuple:
    dim, batch, maps = 16, 2, maps or heads
    widths = [dim * heads * group // maps, 32, 32, 64]
    weights = [torch.randn(maps, a, b, device=device) / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(maps, b, device=device) / 10 for b in widths[1:]]
    q = torch.randn(batch, heads * group, 1, dim, device=device)
    k, v = (torch.randn(batch, heads, tokens, dim, device=device) for _ in range(2))
    signatures = torch.randint(-(2**31), 2**31, (batch, heads, tokens, 2), device=device).int()
    start = torch.tensor([0, 3], dtype=torch.int32, device=device)
    end = torch.tensor([tokens, tokens // 2], dtype=torch.int32, device=device)
    return q, k, v, signatures, weights, biases, start, end


@pytest.mark.parametrize(("levels", "maps", "selection_heads"), [(7, 2, 2), (0, 2, 2), (0, 8, 2), (3, 8, 8)])
def test_decode_matches_the_reference(levels: int, maps: int, selection_heads: int, device: str) -> None:
    arguments = make(2, 4, 501, device, maps)
    budgets = torch.tensor([4, 8, 30], dtype=torch.int32, device=device).expand(2, selection_heads, 3)
    options = {"levels": levels, "scale": 0.25, "softcap": 0.0}
    actual = ops.decode(*arguments, budgets, 48, **options, backend="triton")
    expected = ops.decode(*arguments, budgets, 48, **options, backend="reference")
    assert torch.allclose(actual[0], expected[0], atol=1e-5)
    assert torch.allclose(actual[1], expected[1], atol=1e-5)


def make_key(signatures: torch.Tensor, widths: list[int], device: str) -> tuple:
    """A new key for every row, and its map."""
    heads = signatures.shape[1]
    weights = [torch.randn(heads, a, b, device=device) / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(heads, b, device=device) / 10 for b in widths[1:]]
    return torch.randn(len(signatures), heads, 1, widths[0], device=device), weights, biases


@pytest.mark.parametrize("hidden", [(), (32,), (32, 32), (96, 80), (64, 48)])
@pytest.mark.parametrize(("levels", "page"), [(7, 0), (0, 0), (7, 1), (7, 61)])
def test_the_new_key_is_signed_in_the_launch_of_the_query(
    hidden: tuple[int, ...], levels: int, page: int, device: str, to_pages
) -> None:
    """Bit for bit what is written apart, with and without split columns; the rest of the cache stays as it was."""
    q, k, v, signatures, _, _, start, end = make(2, 4, 183, device)
    weights = [torch.randn(2, a, b, device=device) / a**0.5 for a, b in itertools.pairwise([64, *hidden, 64])]
    biases = [torch.randn(2, b, device=device) / 10 for b in (*hidden, 64)]
    new_key = make_key(signatures, [16, *hidden, 64], device)
    table = None
    if page:
        table, k, v, signatures = (t.to(device) for t in to_pages(page, k.cpu(), v.cpu(), signatures.cpu()))
    budgets = torch.tensor([2, 4, 20], dtype=torch.int32, device=device).expand(2, 2, 3)
    maps, bounds = (weights, biases), (start, end, budgets, 26)
    options = {"levels": levels, "scale": 0.25, "block_table": table, "backend": "triton"}
    apart = signatures.clone()
    ops.write_signature(*new_key, apart, end - 1, block_table=table, backend="triton")
    assert (apart != signatures).any(-1).sum() == 4
    expected = ops.decode(q, k, v, apart, *maps, *bounds, **options)
    actual = ops.decode(q, k, v, signatures, *maps, *bounds, **options, new_key=new_key)
    assert torch.equal(signatures, apart)
    assert torch.equal(actual[0], expected[0])
    exact = ops.decode(q, k, v, apart, *maps, *bounds, **{**options, "backend": "reference"})
    assert torch.allclose(actual[0], exact[0], atol=1e-5)


def moved(arguments: dict, device: str) -> dict:
    """The arguments of a step on a device."""
    lists = {name: [tensor.to(device) for tensor in arguments[name]] for name in ("weights", "biases")}
    tensors = {name: value.to(device) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return arguments | lists | tensors


@pytest.mark.parametrize("method", METHODS)
def test_a_remainder_is_what_its_own_op_adds(method: str, device: str) -> None:
    """By the counts of the selection itself: rows with less than their budget, one with nothing, one with no sums."""
    arguments = step(METHODS[method]) | {"softcap": 2.0}
    arguments["end"][2] = 8
    for change in ("", "empty", "none summed"):
        if change == "empty":
            arguments["end"][1] = arguments["start"][1]
        sums, lengths, coefficients = remainder_of(arguments)
        if change == "none summed":
            sums[0] = 0
        ours, remainder = moved(arguments, device), [t.to(device) for t in (sums, lengths, coefficients)]
        got = ops.decode(**ours, remainder=tuple(remainder), backend="triton")
        expected = [t.to(device) for t in add_apart(arguments, (sums, lengths, coefficients), backend="reference")]
        torch.testing.assert_close(got, tuple(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["group code", "mixture of two", "paper"])
def test_a_remainder_and_a_new_key(method: str, device: str) -> None:
    lacking, signed = with_new_key(step(METHODS[method]))
    remainder = tuple(t.to(device) for t in remainder_of(signed))
    key, *maps = lacking.pop("new_key")
    new_key = key.to(device), *([t.to(device) for t in tensors] for tensors in maps)
    ours = moved(lacking, device)
    got = ops.decode(**ours, new_key=new_key, remainder=remainder, backend="triton")
    assert torch.equal(ours["signatures"].cpu(), signed["signatures"])
    assert_same(got, ops.decode(**moved(signed, device), remainder=remainder, backend="triton"))


def test_a_mixtures_new_key_is_left_to_a_launch_of_its_own(device: str) -> None:
    lacking, _ = with_new_key(step(METHODS["mixture of two"]))
    features = {"weights": lacking["weights"], "signatures": lacking["signatures"], "k": lacking["k"], "levels": 7}
    refused = dispatch.refusal("triton", "decode_step", lacking["q"].to(device), {**features, "named": True})
    assert refused is not None and "a mixture's map ends wider than the new key's" in refused


def test_many_requests_share_their_weights_loads(device: str) -> None:
    """More requests than a block has rows, an empty one among them: position -1 is not written."""
    batch, widths = 19, [16, 64, 64, 32]
    signatures = torch.randint(-(2**31), 2**31, (batch, 1, 40, 1), device=device).int()
    key, weights, biases = make_key(signatures, widths, device)
    end = torch.arange(batch, dtype=torch.int32, device=device) * 2
    q, k = torch.randn(batch, 1, 1, 16, device=device), torch.randn(batch, 1, 40, 16, device=device)
    rest = (
        weights,
        biases,
        torch.zeros_like(end),
        end,
        torch.tensor([[[1, 1, 3]]]).int().to(device).expand(batch, 1, 3),
    )
    outs, caches = [], []
    for backend in ("triton", "reference"):
        caches.append(signatures.clone())
        call = ops.decode(q, k, k, caches[-1], *rest, 5, scale=1.0, new_key=(key, weights, biases), backend=backend)
        outs.append(call[0])
    assert torch.equal(*caches)
    assert torch.equal(caches[0][0], signatures[0])
    assert torch.allclose(*outs, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the automatic choice takes the kernels")
def test_the_interpreter_runs_by_name_alone(device: str, caplog: pytest.LogCaptureFixture) -> None:
    x, weight, bias = torch.randn(1, 1, 1, 16), torch.randn(1, 16, 32), torch.randn(1, 32)
    assert torch.equal(
        ops.encode_signature(x, [weight], [bias]), ops.encode_signature(x, [weight], [bias], backend="triton")
    )
    mask = torch.ones(1, 9, dtype=torch.bool)
    code, signatures = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 9, 1, dtype=torch.int32)
    bounds = torch.zeros(1, dtype=torch.int32), torch.full((1,), 9, dtype=torch.int32)
    with pytest.raises(BackendError, match="mask"):
        ops.score_select(
            code, signatures, *bounds, torch.ones(1, 1, 3, dtype=torch.int32), 3, mask=mask, backend="triton"
        )


@pytest.mark.gpu
def test_a_captured_step_follows_its_inputs() -> None:
    arguments = make(2, 4, 5000, "cuda")
    budgets = torch.tensor([4, 8, 30], dtype=torch.int32, device="cuda").repeat(2, 2, 1)
    step = torch.compile(lambda *a: ops.decode(*a, capacity=48, scale=0.25), fullgraph=True)
    step(*arguments, budgets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.decode(*arguments, budgets, 48, scale=0.25)
    for _ in range(3):
        arguments[0].normal_()
        arguments[7][0] -= 17
        budgets[0, 0, 2] += 3
        out.fill_(torch.nan)
        graph.replay()
        expected = ops.decode(*arguments, budgets, 48, scale=0.25, backend="reference")
        assert torch.allclose(out, expected[0], atol=1e-3)
        assert torch.allclose(lse, expected[1], atol=1e-3)


@pytest.mark.gpu
def test_a_captured_step_signs_its_new_key() -> None:
    """Captured once; replays follow queries, keys and lengths, and write nowhere but at the rows' ends."""
    q, k, v, signatures, _, _, start, end = make(2, 4, 5000, "cuda")
    widths = [64, 96, 96, 64]
    weights = [torch.randn(2, a, b, device="cuda") / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(2, b, device="cuda") / 10 for b in widths[1:]]
    new_key = make_key(signatures, [16, *widths[1:]], "cuda")
    budgets = torch.tensor([4, 8, 30], dtype=torch.int32, device="cuda").repeat(2, 2, 1)
    call = (q, k, v, signatures, weights, biases, start, end, budgets, 48)
    options = {"scale": 0.25, "new_key": new_key}
    ops.decode(*call, **options, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.decode(*call, **options, backend="triton")
    for _ in range(3):
        q.normal_()
        new_key[0].normal_()
        end[0] -= 17
        expected_cache = signatures.clone()
        options["new_key"] = (new_key[0].clone(), *new_key[1:])
        expected = ops.decode(q, k, v, expected_cache, *call[4:], **options, backend="reference")
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(signatures, expected_cache)
        assert torch.allclose(out, expected[0], atol=1e-3)
        assert torch.allclose(lse, expected[1], atol=1e-3)


@pytest.mark.gpu
def test_a_step_over_a_million_tokens_uses_long_offsets() -> None:
    """3.2e9 values of K: offsets of the last request are beyond 32 bits; bf16, 64 bits, an odd length."""
    batch, heads, tokens, dim = 3, 8, 2**20, 128
    shape = (batch, heads, tokens)
    k, v = (torch.randn(*shape, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, 4 * heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    signatures = torch.randint(-(2**31), 2**31 - 1, (*shape, 2), device="cuda", dtype=torch.int32)
    widths = [4 * dim, 256, 256, 64]
    weights = [(torch.randn(heads, a, b, device="cuda") / a**0.5).bfloat16() for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(heads, b, device="cuda") / 10 for b in widths[1:]]
    key_weights = [torch.randn(heads, dim, 256, device="cuda").bfloat16() / 12, *weights[1:]]
    start = torch.tensor([0, 5, 1000], dtype=torch.int32, device="cuda")
    end = torch.tensor([tokens, tokens - 1, tokens - 3], dtype=torch.int32, device="cuda")
    budgets = torch.tensor([16, 64, 2**15 - 80], dtype=torch.int32, device="cuda").expand(batch, heads, 3).contiguous()
    new_key = (torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16), key_weights, biases)
    before = signatures.clone()
    maps, bounds = (weights, biases), (start, end, budgets, 2**15)
    out, _ = ops.decode(q, k, v, signatures, *maps, *bounds, scale=dim**-0.5, new_key=new_key, backend="triton")
    changed = (signatures != before).any(-1).nonzero().tolist()
    assert {(b, t) for b, _, t in changed} == {(b, int(end[b]) - 1) for b in range(batch)}
    code, _ = ops.encode_query(ops.group_queries(q, heads), *maps, backend="triton")
    for one in (slice(0, 1), slice(2, 3)):
        rows = start[one], end[one], budgets[one], 2**15
        indices, counts = reference.score_select(code[one], signatures[one], *rows)
        exact, _ = reference.attend(q[one].float(), k[one], v[one], indices, counts, dim**-0.5)
        error, rounding = (out[one].float() - exact).norm(), (exact.bfloat16().float() - exact).norm()
        assert error <= 2 * rounding


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 61])
def test_a_compiled_step_signs_its_new_key(page: int, to_pages) -> None:
    torch._dynamo.reset()
    q, k, v, signatures, weights, biases, start, end = make(2, 4, 1501, "cuda")
    new_key = make_key(signatures, [16, 32, 32, 64], "cuda")
    table = None
    if page:
        table, k, v, signatures = (t.cuda() for t in to_pages(page, k.cpu(), v.cpu(), signatures.cpu()))
    budgets = torch.tensor([4, 8, 30], dtype=torch.int32, device="cuda").repeat(2, 2, 1)
    caches = [signatures.clone(), signatures.clone()]

    def step(cache: torch.Tensor) -> torch.Tensor:
        rows = (weights, biases, start, end, budgets, 48)
        options = {"scale": 0.25, "block_table": table, "new_key": new_key, "backend": "triton"}
        return ops.decode(q, k, v, cache, *rows, **options)[0] * 2

    expected = step(caches[0])
    assert torch.equal(torch.compile(step, fullgraph=True)(caches[1]), expected)
    assert torch.equal(*caches)
    assert not torch.equal(caches[0], signatures)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 4097), (256, 33)])
def test_batches_and_lengths_at_the_ends_of_the_range(batch: int, tokens: int) -> None:
    heads, dim = 2, 64
    q = torch.randn(batch, 4 * heads, 1, dim, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    signatures = torch.randint(-(2**31), 2**31 - 1, (batch, heads, tokens, 2), device="cuda", dtype=torch.int32)
    widths = [4 * dim, 64, 64, 64]
    weights = [torch.randn(heads, a, b, device="cuda").half() / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(heads, b, device="cuda") / 10 for b in widths[1:]]
    end = torch.randint(0, tokens + 1, (batch,), device="cuda").int()
    end[0] = tokens
    rows = (torch.zeros_like(end), end, torch.tensor([[[1, 2, 9]]], device="cuda").int().expand(batch, heads, 3), 12)
    out, lse = ops.decode(q, k, v, signatures, weights, biases, *rows, scale=0.125, backend="triton")
    code, _ = ops.encode_query(ops.group_queries(q, heads), weights, biases, backend="triton")
    indices, counts = reference.score_select(code, signatures, *rows)
    exact, exact_lse = reference.attend(q.float(), k, v, indices, counts, 0.125)
    assert torch.allclose(out.float(), exact, atol=4e-3)
    assert torch.allclose(lse, exact_lse, atol=4e-3)
    assert not out[end == 0].any()
