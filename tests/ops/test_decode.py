from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hashattention.config import BaseModel, MapsConfig
from hashattention.errors import BackendError, InputError
from hashattention.ops import decode as decode_by
from hashattention.ops import dispatch, encode_signature, group_queries, reference

MODEL = BaseModel("test", 1, 8, 2, 16, (0,), "none")
GROUP = MapsConfig(widths=(8,))
METHODS = {
    "group code": GROUP,
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
    pairs = list(zip(widths, [*widths[1:], config.bits], strict=True))
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


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bits", range(32, 257, 32))
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_composition(method: str, bits: int) -> None:
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
    tempting = best[:, :: config.code_heads(MODEL) // config.signature_heads(MODEL)]
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


@pytest.mark.parametrize("method", ["group code", "paper"])
def test_opcheck(method: str, to_pages: Callable[..., tuple[Tensor, ...]]) -> None:
    a = step(METHODS[method], batch=2)
    maps = a["weights"], a["biases"], a["start"], a["end"], a["budgets"], a["capacity"], a["levels"], a["scale"]
    op = torch.ops.hashattention.decode.default
    torch.library.opcheck(op, (a["q"], a["k"], a["v"], a["signatures"], *maps, 0.0, None, None, "auto"))
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    torch.library.opcheck(op, (a["q"], a["k"], a["v"], a["signatures"], *maps, 5.0, mask, None, "auto"))
    table, *pages = to_pages(16, a["k"], a["v"], a["signatures"])
    torch.library.opcheck(op, (a["q"], *pages, *maps, 0.0, None, table, "reference"))


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
