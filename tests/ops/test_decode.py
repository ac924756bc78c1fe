from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hashattention.config import BaseModel, MapsConfig
from hashattention.errors import BackendError, InputError
from hashattention.ops import add_remainder, dispatch, encode_signature, group_queries, reference
from hashattention.ops import decode as decode_by

MODEL = BaseModel("test", 1, 8, 2, 16, (0,), "none")
GROUP = MapsConfig(widths=(8,))
METHODS = {
    "group code": GROUP,
    "mixture of two": dataclasses.replace(GROUP, mixture=2),
    "group code, symmetric": dataclasses.replace(GROUP, score="symmetric"),
    "per-head asymmetric": dataclasses.replace(GROUP, query_input="head"),
    "per-head, own selection": dataclasses.replace(GROUP, query_input="head", selection_share="query_head"),
    "paper": MapsConfig.paper(),
}
TOKENS = 67
#: The composition is compared bit for bit: kernels round otherwise, and have tests of their own.
decode = functools.partial(decode_by, backend="reference")


def step(config: MapsConfig, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    """Arguments of one `decode` call: left padding in row 1, right padding in row 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    code_heads, heads = config.code_heads(MODEL), MODEL.num_attention_heads
    widths = [MODEL.head_dim * heads // code_heads if config.query_input == "group" else MODEL.head_dim, *config.widths]
    pairs = list(zip(widths, [*widths[1:], config.code_bits], strict=True))
    shape = (batch, config.signature_heads(MODEL), TOKENS, config.words)
    return {
        "q": draw(batch, heads, 1, MODEL.head_dim),
        "k": draw(batch, MODEL.num_key_value_heads, TOKENS, MODEL.head_dim),
        "v": draw(batch, MODEL.num_key_value_heads, TOKENS, 12),
        "signatures": torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32),
        "weights": [draw(code_heads, i, o) for i, o in pairs],
        "biases": [draw(code_heads, o) for _, o in pairs],
        "start": torch.tensor([0, 9, 0], dtype=torch.int32)[:batch],
        "end": torch.tensor([TOKENS, TOKENS, 41], dtype=torch.int32)[:batch],
        "budgets": torch.tensor([2, 3, 7], dtype=torch.int32).repeat(batch, config.selection_heads(MODEL), 1),
        "capacity": 13,
        "levels": config.levels if config.score == "asymmetric" else 0,
        "scale": 0.25,
    }


def composition(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Encode, score, select and attend written out with the reference functions."""
    get = arguments.get
    q, weights, biases = arguments["q"], arguments["weights"], arguments["biases"]
    per_code = q.shape[1] // weights[0].shape[0]
    x = torch.stack(
        [torch.cat([q[:, h * per_code + g] for g in range(per_code)], -1) for h in range(weights[0].shape[0])], 1
    )
    if arguments["levels"]:
        code, _ = reference.encode_query(x, weights, biases, arguments["levels"])
    else:
        code = reference.encode_signature(x, weights, biases)
    scores = reference.score(code, arguments["signatures"], arguments["budgets"].shape[1], get("block_table"))
    rows = arguments["start"], arguments["end"], arguments["budgets"], arguments["capacity"], get("mask")
    selection = reference.select(scores, *rows)
    caches = arguments["k"], arguments["v"]
    return reference.attend(q, *caches, *selection, arguments["scale"], get("softcap", 0.0), get("block_table"))


def valid_of(arguments: dict[str, Any]) -> Tensor:
    """Which tokens each row may select from, bool ``[B, T]``."""
    position = torch.arange(arguments["v"].shape[2])
    inside = (position >= arguments["start"][:, None]) & (position < arguments["end"][:, None])
    return inside & arguments.get("mask", inside)


def remainder_of(arguments: dict[str, Any], seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all that each row may select from, how many these are, and random coefficients."""
    valid, coefficients = valid_of(arguments), torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    sums = [arguments[name].masked_fill(~valid[:, None, :, None], 0).sum(2) for name in ("k", "v")]
    number = valid.sum(1).float()[:, None, None].expand(-1, arguments["k"].shape[1], 1)
    return torch.cat([*sums, number], -1), valid.sum(1, dtype=torch.int32), coefficients


def add_apart(arguments: dict[str, Any], remainder: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """The step, and then the remainder by its own op."""
    out, lse = decode_by(**arguments, **options)
    budgets, (sums, lengths, coefficients) = arguments["budgets"], remainder
    wanted = budgets.sum(-1).clamp(max=arguments["capacity"])
    taken = torch.minimum(wanted, valid_of(arguments).sum(1)[:, None]).int()
    logits = {name: arguments.get(name, 0.0) for name in ("scale", "softcap")}
    backend = {"backend": options.get("backend", "auto")}
    return add_remainder(out, lse, arguments["q"], sums, taken, lengths, coefficients, **logits, **backend), lse


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bits", range(32, 257, 32))
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_composition(method: str, bits: int) -> None:
    if bits * METHODS[method].mixture > 256:
        pytest.skip("a map has at most 256 outputs")
    arguments = step(dataclasses.replace(METHODS[method], bits=bits), seed=bits)
    out, lse = decode(**arguments)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert_same((out, lse), composition(arguments))


@pytest.mark.parametrize("size", [1, 2, 16, 61])
@pytest.mark.parametrize("method", METHODS)
def test_paged_equals_dense(method: str, size: int, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    arguments = step(METHODS[method])
    names = ("k", "v", "signatures")
    table, *pages = to_pages(size, *(arguments[name] for name in names), seed=size)
    paged = {**arguments, **dict(zip(names, pages, strict=True)), "block_table": table}
    assert_same(decode(**paged), decode(**arguments))


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_over_the_length_is_dense_attention(method: str) -> None:
    arguments = step(METHODS[method])
    arguments["budgets"] = torch.full_like(arguments["budgets"], 500)
    arguments["capacity"] = 1500
    out, _ = decode(**arguments)
    position = torch.arange(TOKENS)
    seen = (position >= arguments["start"][:, None]) & (position < arguments["end"][:, None])
    k, v = (arguments[name].double().repeat_interleave(4, 1) for name in ("k", "v"))
    logits = (arguments["q"].double() @ k.transpose(-1, -2) * 0.25).masked_fill(~seen[:, None, None], -torch.inf)
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [True, False])
def test_padding_never_leaks(method: str, masked: bool) -> None:
    """Row 0 reads tokens 9..41 of 67 (with holes): what lies outside may be anything, and cropping changes nothing."""
    config = METHODS[method]
    arguments = step(config, batch=1)
    start, end = 9, 41
    arguments.update(start=torch.tensor([start], dtype=torch.int32), end=torch.tensor([end], dtype=torch.int32))
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    if masked:
        mask[0, 12:30:4] = False
        arguments["mask"] = mask
    seen = mask & (torch.arange(TOKENS) >= start) & (torch.arange(TOKENS) < end)
    clean = decode(**arguments)
    best = encode_signature(
        group_queries(arguments["q"], config.code_heads(MODEL)), arguments["weights"], arguments["biases"]
    )
    tempting = best[:, :: config.code_heads(MODEL) // config.signature_heads(MODEL), :, : config.words]
    hidden = ~seen[:, None, :, None]
    poisoned = {name: arguments[name].masked_fill(hidden, float("nan")) for name in ("k", "v")}
    poisoned["signatures"] = torch.where(hidden, tempting, arguments["signatures"])
    assert_same(decode(**{**arguments, **poisoned}), clean)
    cropped = {name: arguments[name][:, :, start:end] for name in ("k", "v", "signatures")}
    cropped["start"], cropped["end"] = arguments["start"] - start, arguments["end"] - start
    if masked:
        cropped["mask"] = mask[:, start:end]
    assert_same(decode(**{**arguments, **cropped}), clean)


def test_an_empty_row_beside_a_full_one() -> None:
    arguments = step(GROUP)
    arguments["end"] = torch.tensor([TOKENS, 9, 41], dtype=torch.int32)
    out, lse = decode(**arguments)
    assert out[1].count_nonzero() == 0
    assert (lse[1] == -torch.inf).all()
    assert out[0].abs().sum() > 0


@pytest.mark.parametrize("heads", [8, 4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 5])
def test_group_queries_concatenates_the_queries_of_a_group(heads: int, tokens: int) -> None:
    q = torch.randn(3, 8, tokens, 6, generator=torch.Generator().manual_seed(0))
    grouped = group_queries(q, heads)
    assert grouped.shape == (3, heads, tokens, 48 // heads)
    for head in range(heads):
        expected = torch.cat([q[:, head * 8 // heads + g] for g in range(8 // heads)], -1)
        assert torch.equal(grouped[:, head], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 128}, r"levels is 128; expected 0 \(bit code\) to 127"),
        ({"weights": [], "biases": []}, r"weights is empty"),
        (
            {"weights": [torch.zeros(3, 16, 64)], "biases": [torch.zeros(3, 64)]},
            r"query heads over map heads: 8 is not",
        ),
        ({"weights": [torch.zeros(2, 16, 64)], "biases": [torch.zeros(2, 64)]}, r"size in must be 64"),
        ({"q": torch.zeros(3, 8, 16)}, r"q is float32 \[3, 8, 16\]; expected \[B, Hq, T, D\]"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, r"mask is bool \[3, 5\].*size T must be 67"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(**{**step(GROUP), **change})


def with_new_key(arguments: dict[str, Any], seed: int = 7) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same step with its newest signature to be made, and with it made and in the cache."""
    generator = torch.Generator().manual_seed(seed)
    signatures = arguments["signatures"]
    heads, dim = signatures.shape[1], MODEL.head_dim
    widths = [dim, *[w.shape[2] for w in arguments["weights"][:-1]], 32 * signatures.shape[3]]
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(heads, i, o, generator=generator) for i, o in pairs]
    biases = [torch.randn(heads, o, generator=generator) for _, o in pairs]
    key = torch.randn(len(signatures), MODEL.num_key_value_heads, 1, dim, generator=generator)
    made = reference.encode_signature(key.repeat_interleave(heads // key.shape[1], 1), weights, biases)
    written = signatures.clone()
    for request, end in enumerate(arguments["end"].tolist()):
        if 0 < end <= TOKENS:
            written[request, :, end - 1] = made[request, :, 0]
    assert not torch.equal(written, signatures)
    lacking = {**arguments, "signatures": signatures.clone(), "new_key": (key, weights, biases)}
    return lacking, {**arguments, "signatures": written}


@pytest.mark.parametrize("ends", [(TOKENS, TOKENS, 41), (TOKENS, 0, 1), (0, 0, 0), (12, TOKENS + 1, TOKENS)])
@pytest.mark.parametrize("method", METHODS)
def test_a_new_key_is_signed_where_it_belongs_and_nowhere_else(method: str, ends: tuple[int, ...]) -> None:
    arguments = step(METHODS[method])
    arguments["end"], arguments["start"] = torch.tensor(ends, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    if not any(0 < end <= TOKENS for end in ends):
        arguments["end"][0] = 5
    lacking, signed = with_new_key(arguments)
    got, expected = decode(**lacking), decode(**signed)
    assert torch.equal(lacking["signatures"], signed["signatures"])
    assert_same(got, expected)
    again = decode(**lacking)
    assert_same(again, expected)


@pytest.mark.parametrize("size", [1, 16, 61])
@pytest.mark.parametrize("method", ["group code", "paper"])
def test_a_new_key_in_pages(method: str, size: int, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    arguments = step(METHODS[method])
    lacking, signed = with_new_key(arguments)
    names = ("k", "v", "signatures")
    table, *pages = to_pages(size, *(lacking[name] for name in names), seed=size)
    before = pages[2].clone()
    got = decode(**{**lacking, **dict(zip(names, pages, strict=True)), "block_table": table})
    assert_same(got, decode(**signed))
    changed = (pages[2] != before).any(-1).any(1)
    places = {(int(table[b, (end - 1) // size]), (end - 1) % size) for b, end in enumerate(arguments["end"].tolist())}
    assert {tuple(place) for place in changed.nonzero().tolist()} <= places


@pytest.mark.parametrize("method", METHODS)
def test_every_backend_of_this_machine_signs_the_new_key_alike(method: str) -> None:
    lacking, signed = with_new_key(step(METHODS[method]))
    assert_same(decode_by(**lacking), decode_by(**signed))
    assert torch.equal(lacking["signatures"], signed["signatures"])


def test_backends_are_asked_for_a_step_that_signs_the_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mixture too, whose map ends wider than the key's; not where the hidden layers differ."""
    asked: list[str] = []
    monkeypatch.setattr(dispatch, "find_fused", lambda name, *_, **__: asked.append(name))
    for method in ("group code", "mixture of two"):
        decode_by(**with_new_key(step(METHODS[method]))[0])
    assert [name for name in asked if name != "write_signature"] == ["decode_step", "decode"] * 2
    asked.clear()
    lacking, signed = with_new_key(step(METHODS["mixture of two"]))
    key, weights, biases = lacking["new_key"]
    wider = [torch.nn.functional.pad(weights[0], (0, 8)), torch.nn.functional.pad(weights[1], (0, 0, 0, 8))]
    got = decode_by(**{**lacking, "new_key": (key, wider, [torch.nn.functional.pad(biases[0], (0, 8)), biases[1]])})
    assert asked == ["write_signature", "decode"]
    assert torch.equal(lacking["signatures"], signed["signatures"])
    torch.testing.assert_close(got, decode(**signed))


def test_a_new_key_goes_into_the_buffer_behind_a_view() -> None:
    arguments = step(GROUP)
    lacking, signed = with_new_key(arguments)
    buffer = torch.full((3, 2, TOKENS + 9, GROUP.words), 5, dtype=torch.int32)
    buffer[:, :, :TOKENS] = lacking["signatures"]
    lacking["signatures"] = buffer[:, :, :TOKENS]
    assert_same(decode(**lacking), decode(**signed))
    assert torch.equal(buffer[:, :, :TOKENS], signed["signatures"])
    assert buffer[:, :, TOKENS:].eq(5).all()


def test_a_mask_with_holes_and_a_new_key() -> None:
    arguments = step(GROUP)
    arguments["mask"] = torch.ones(3, TOKENS, dtype=torch.bool)
    arguments["mask"][:, 10:30:3] = False
    lacking, signed = with_new_key(arguments)
    assert_same(decode(**lacking), decode(**signed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 2, 2, 16)}, r"new_key is float32 \[3, 2, 2, 16\]"),
        ({0: torch.zeros(3, 3, 1, 16)}, r"size Hkv must be 2"),
        ({1: [], 2: []}, "new key's map is empty"),
        ({1: [torch.zeros(2, 16, 32)], 2: [torch.zeros(2, 32)]}, "2 heads of 1 words; the cache holds 2 of 2"),
        ({1: [torch.zeros(2, 15, 64)], 2: [torch.zeros(2, 64)]}, "size in must be 16"),
    ],
)
def test_a_new_key_that_does_not_fit(change: dict[int, Any], message: str) -> None:
    lacking, _ = with_new_key(step(GROUP))
    new_key = tuple(change.get(place, part) for place, part in enumerate(lacking["new_key"]))
    with pytest.raises(InputError, match=message):
        decode(**{**lacking, "new_key": new_key})


@pytest.mark.parametrize("method", ["group code", "paper"])
def test_opcheck_with_a_new_key(method: str) -> None:
    lacking, _ = with_new_key(step(METHODS[method], batch=2))
    a = lacking
    bounds = a["start"], a["end"], a["budgets"], a["capacity"], a["levels"], a["scale"]
    key, weights, biases = a["new_key"]
    if key.shape[1] != weights[0].shape[0]:
        key = key.repeat_interleave(weights[0].shape[0] // key.shape[1], 1)
    call = (a["q"], a["k"], a["v"], a["signatures"], a["weights"], a["biases"], *bounds, 0.0, None, None, 1.0)
    none = None, None, None
    op = torch.ops.hashattention.decode_step.default
    torch.library.opcheck(op, (*call, *none, "auto", key, weights, biases))
    torch.library.opcheck(op, (*call, *remainder_of(a), "reference", key, weights, biases))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_new_key_compiles_without_a_break(backend: str, inference: bool) -> None:
    torch._dynamo.reset()
    lacking, signed = with_new_key(step(GROUP))
    buffer = torch.zeros(3, 2, TOKENS + 9, GROUP.words, dtype=torch.int32)
    buffer[:, :, :TOKENS] = lacking["signatures"]

    def run(buffer: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return decode(signatures=buffer[:, :, :TOKENS], **rest)

    rest = {name: value for name, value in lacking.items() if name != "signatures"}
    with torch.inference_mode(inference):
        got = torch.compile(run, fullgraph=True, backend=backend)(buffer, **rest)
    assert_same(got, decode(**signed))
    assert torch.equal(buffer[:, :, :TOKENS], signed["signatures"])


@pytest.mark.parametrize("method", ["group code", "paper"])
def test_opcheck(method: str, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    a = step(METHODS[method], batch=2)
    maps = a["weights"], a["biases"], a["start"], a["end"], a["budgets"], a["capacity"], a["levels"], a["scale"]
    op, none = torch.ops.hashattention.decode.default, (None, None, None)
    torch.library.opcheck(op, (a["q"], a["k"], a["v"], a["signatures"], *maps, 0.0, None, None, 1.0, *none, "auto"))
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    torch.library.opcheck(op, (a["q"], a["k"], a["v"], a["signatures"], *maps, 5.0, mask, None, 1.0, *none, "auto"))
    table, *pages = to_pages(16, a["k"], a["v"], a["signatures"])
    torch.library.opcheck(op, (a["q"], *pages, *maps, 0.0, None, table, 1.0, *none, "reference"))
    remainder = remainder_of(a)
    torch.library.opcheck(
        op, (a["q"], a["k"], a["v"], a["signatures"], *maps, 5.0, mask, None, 1.0, *remainder, "auto")
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend: str) -> None:
    compiled = torch.compile(decode, fullgraph=True, backend=backend)
    arguments = step(GROUP)
    assert_same(compiled(**arguments), decode(**arguments))


def test_a_fused_step_that_fails_falls_back_unless_it_was_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = step(METHODS["group code"])
    expected = decode(**arguments)

    def failing(*_: Any) -> None:
        raise BackendError("CUDA error 1 launching step.")

    monkeypatch.setattr(dispatch, "find_fused", lambda *_, **__: failing)
    torch.testing.assert_close(decode_by(**arguments)[0], expected[0], atol=1e-5, rtol=1e-4)
    assert "CUDA error 1" in caplog.text
    with pytest.raises(BackendError, match="CUDA error 1"):
        decode(**arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_float8_cache(backend: str) -> None:
    arguments = step(GROUP)
    kinds = {"k": torch.float8_e4m3fn, "v": torch.float8_e4m3fn}
    short = {name: (arguments[name] / 0.5).to(kind) for name, kind in kinds.items()}
    long = {name: value.float() * 0.5 for name, value in short.items()}
    got = decode_by(**{**arguments, **short}, k_scale=0.5, v_scale=0.5, backend=backend)
    torch.testing.assert_close(got, decode(**{**arguments, **long}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_a_remainder_is_what_its_own_op_adds(method: str, backend: str) -> None:
    """Bit for bit; the logsumexp stays that of the selected tokens."""
    for softcap in (0.0, 2.0):
        arguments = step(METHODS[method]) | {"softcap": softcap}
        remainder = remainder_of(arguments)
        plain = decode_by(**arguments, backend=backend)
        got = decode_by(**arguments, remainder=remainder, backend=backend)
        assert_same(got, add_apart(arguments, remainder, backend=backend))
        assert torch.equal(got[1], plain[1])
        assert (got[0] != plain[0]).any(-1).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("change", ["capacity", "more than there is", "empty", "none summed", "strides"])
def test_a_remainder_where_rows_differ(change: str, backend: str) -> None:
    arguments = step(GROUP)
    if change == "capacity":
        arguments["capacity"] = 5
    elif change == "more than there is":
        arguments["end"][2] = 8
    elif change == "empty":
        arguments["end"][1] = arguments["start"][1]
    remainder = remainder_of(arguments)
    if change == "none summed":
        remainder[0][1] = 0
    elif change == "strides":
        sums, lengths, coefficients = remainder
        apart = (torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0] for tensor in (lengths, coefficients))
        remainder = (torch.stack([sums * torch.nan, sums], 2)[:, :, 1], *apart)
    got, plain = (decode_by(**arguments, remainder=r, backend=backend)[0] for r in (remainder, None))
    assert torch.equal(got, add_apart(arguments, remainder, backend=backend)[0])
    row = {"more than there is": 2, "empty": 1, "none summed": 1}.get(change)
    same = [bool(torch.equal(one, other)) for one, other in zip(got, plain, strict=True)]
    assert same == [place == row for place in range(3)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_remainder_and_a_new_key(method: str, masked: bool, backend: str) -> None:
    arguments = step(METHODS[method])
    if masked:
        arguments["mask"] = torch.ones(3, TOKENS, dtype=torch.bool)
        arguments["mask"][:, 10:30:3] = False
    lacking, signed = with_new_key(arguments)
    remainder = remainder_of(arguments)
    got = decode_by(**lacking, remainder=remainder, backend=backend)
    assert torch.equal(lacking["signatures"], signed["signatures"])
    assert_same(got, add_apart(signed, remainder, backend=backend))


@pytest.mark.parametrize("size", [1, 16])
def test_a_remainder_and_pages(size: int, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    arguments = step(GROUP)
    remainder, names = remainder_of(arguments), ("k", "v", "signatures")
    table, *pages = to_pages(size, *(arguments[name] for name in names), seed=size)
    paged = {**arguments, **dict(zip(names, pages, strict=True)), "block_table": table}
    assert_same(decode(**paged, remainder=remainder), decode(**arguments, remainder=remainder))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_remainder_compiles_without_a_break(backend: str) -> None:
    torch._dynamo.reset()
    lacking, _ = with_new_key(step(GROUP))
    compiled, remainder = torch.compile(decode, fullgraph=True, backend=backend), remainder_of(lacking)
    assert_same(compiled(**lacking, remainder=remainder), decode(**lacking, remainder=remainder))
    del lacking["new_key"]
    assert_same(compiled(**lacking, remainder=remainder), decode(**lacking, remainder=remainder))


def test_a_fused_step_that_fails_leaves_the_remainder_to_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = step(GROUP)
    remainder = remainder_of(arguments)
    expected, given = decode(**arguments, remainder=remainder), []

    def failing(*_: Any, **options: Any) -> None:
        given.append(options["remainder"])
        raise BackendError("CUDA error 1 launching step.")

    monkeypatch.setattr(dispatch, "find_fused", lambda *_, **__: failing)
    torch.testing.assert_close(decode_by(**arguments, remainder=remainder), expected, atol=1e-5, rtol=1e-4)
    assert all(one is other for one, other in zip(given[0], remainder, strict=True))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t.bfloat16(), "sums is bfloat16"),
        (0, lambda t: t[..., 1:], r"sums is .*size D\+Dv\+1 must be 29"),
        (0, lambda t: t[:, :1], "sums is .*size Hkv must be 2"),
        (1, lambda t: t.long(), "lengths is int64"),
        (1, lambda t: t[:2], r"lengths is int32 \[2\].*size B must be 3"),
        (2, lambda t: t[:4], "coefficients is .*size Hq must be 8"),
        (2, lambda t: t.to("meta"), "all tensors must be on one device.*coefficients on meta"),
    ],
)
def test_a_remainder_that_does_not_fit(place: int, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = step(GROUP)
    remainder = list(remainder_of(arguments))
    remainder[place] = change(remainder[place])
    with pytest.raises(InputError, match=message):
        decode(**arguments, remainder=tuple(remainder))


def test_a_remainder_and_scales_exclude_each_other() -> None:
    arguments = step(GROUP)
    short = {name: arguments[name].to(torch.float8_e4m3fn) for name in ("k", "v")}
    remainder = remainder_of(arguments)
    with pytest.raises(InputError, match=r"k_scale is 0\.5 and v_scale 1\.0; a remainder goes with 1 alone"):
        decode(**{**arguments, **short}, k_scale=0.5, remainder=remainder)
    long = {name: value.float() for name, value in short.items()}
    expected = decode(**{**arguments, **long}, remainder=remainder)
    torch.testing.assert_close(decode(**{**arguments, **short}, remainder=remainder), expected, rtol=1e-4, atol=1e-5)


def gpu_step(batch: int = 4, tokens: int = 4104) -> dict[str, Any]:
    """A Llama-3.1-8B layer in bf16 with ragged rows; what must not be read is NaN."""
    heads, dim = 8, 128
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def draw_map(*widths: int) -> tuple[list[Tensor], list[Tensor]]:
        weights = [(draw(heads, i, o) * i**-0.5).bfloat16() for i, o in itertools.pairwise(widths)]
        return weights, [draw(heads, o) * 0.1 for o in widths[1:]]

    end = torch.tensor([tokens, tokens - 1, 700, 8], dtype=torch.int32, device="cuda").repeat(batch)[:batch]
    start = torch.tensor([0, 9, 0, 8], dtype=torch.int32, device="cuda").repeat(batch)[:batch]
    position = torch.arange(tokens, device="cuda")
    outside = ((position < start[:, None]) | (position >= end[:, None]))[:, None, :, None]
    weights, biases = draw_map(4 * dim, 256, 256, 64)
    signatures = torch.randint(-(2**31), 2**31 - 1, (batch, heads, tokens, 2), device="cuda", dtype=torch.int32)
    return {
        "q": draw(batch, 4 * heads, 1, dim).bfloat16(),
        "k": draw(batch, heads, tokens, dim).bfloat16().masked_fill(outside, float("nan")),
        "v": draw(batch, heads, tokens, dim).bfloat16().masked_fill(outside, float("nan")),
        "signatures": signatures,
        "weights": weights,
        "biases": biases,
        "start": start,
        "end": end,
        "budgets": torch.tensor([4, 16, 108], dtype=torch.int32, device="cuda").repeat(batch, heads, 1),
        "capacity": 128,
        "scale": dim**-0.5,
        "new_key": (draw(batch, heads, 1, dim).bfloat16(), *draw_map(dim, 256, 256, 64)),
    }


GPU_BACKENDS = pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("size", [0, 8, 64])
def test_on_a_gpu_the_new_key_is_signed_and_the_step_follows(
    backend: str, size: int, to_pages: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Bits may differ where the exact logit is nearer to zero than bf16 errs; nothing else may change."""
    made = gpu_step(tokens=4096 if size else 4104)
    dense = made["signatures"].clone()
    if size:
        names = ("k", "v", "signatures")
        table, *pages = to_pages(size, *(made[name].cpu() for name in names))
        made |= {"block_table": table.cuda()} | {n: page.cuda() for n, page in zip(names, pages, strict=True)}
    before = made["signatures"].clone()
    out, lse = decode_by(**made, backend=backend)
    key, weights, biases = made["new_key"]
    logits = reference.mlp(key, weights, biases)
    wanted, sure = reference.pack_bits(logits > 0), logits.abs() > 0.02 * logits.abs().amax()
    after = made["signatures"]
    rows = after if not size else after[made["block_table"].long()].transpose(1, 2).flatten(2, 3)
    for request, end in enumerate(made["end"].tolist()):
        got = rows[request, :, end - 1]
        differ = reference.unpack_bits(got) != reference.unpack_bits(wanted[request, :, 0])
        assert not (differ & sure[request, :, 0]).any()
        dense[request, :, end - 1] = got
    if size:
        assert (after != before).any(-1).sum() <= made["end"].numel() * 8
    else:
        assert torch.equal(after, dense)
    again = decode_by(**{**made, "new_key": None}, backend=backend)
    assert_same((out, lse), again)


@pytest.mark.gpu
@GPU_BACKENDS
def test_on_a_gpu_a_step_with_a_new_key_is_captured_and_compiled(backend: str) -> None:
    torch._dynamo.reset()
    made = gpu_step()
    cache, rest = made["signatures"], {name: value for name, value in made.items() if name != "signatures"}
    buffer = torch.zeros(*cache.shape[:2], cache.shape[2] + 56, 2, dtype=torch.int32, device="cuda")
    buffer[:, :, : cache.shape[2]] = cache

    def run(buffer: Tensor) -> tuple[Tensor, Tensor]:
        return decode_by(signatures=buffer[:, :, : cache.shape[2]], **rest, backend=backend)

    expected = run(buffer)
    written = buffer.clone()
    buffer[:, :, : cache.shape[2]] = cache
    assert_same(torch.compile(run, fullgraph=True)(buffer), expected)
    assert torch.equal(buffer, written)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(buffer)
    buffer[:, :, : cache.shape[2]] = cache
    out.fill_(torch.nan)
    graph.replay()
    assert_same((out, lse), expected)
    assert torch.equal(buffer, written)
