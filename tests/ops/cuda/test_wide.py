"""The step of long and few rows over plain blocks, at every length by lowering its border: as the reference says."""

from __future__ import annotations

import pytest
import torch
from tests.ops.cuda.test_step import check, expected, make, maps, page

from hashattention import ops
from hashattention.ops import reference
from hashattention.ops.cuda import board, decode_step, layout, step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def only_wide(monkeypatch):
    """Every step of a test is one of wide.cu's."""
    loaded, load = set(), step.load
    monkeypatch.setattr(layout, "WIDE_SLOTS", 0)
    monkeypatch.setattr(step, "load", lambda name, **constants: (loaded.add(name), load(name, **constants))[1])
    yield
    assert loaded == {"wide"}


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 4104},
        {"tokens": 88, "budget": (2, 4, 20)},
        {"tokens": 40000},
        {"tokens": 5000, "bits": 32},
        {"tokens": 5000, "bits": 128},
        {"tokens": 5000, "bits": 128, "levels": 15},
        {"tokens": 5000, "levels": 0},
        {"tokens": 2048, "hidden": (128,)},
        {"tokens": 2048, "dim": 256, "heads": 2, "group": 4},
        {"tokens": 3000, "dim": 64, "heads": 2, "group": 7, "dtype": torch.float16},
        {"tokens": 2048, "batch": 4, "heads": 2},
        {"tokens": 700, "budget": (0, 0, 50)},
        {"tokens": 700, "budget": (16, 64, 0)},
        {"tokens": 700, "budget": (4, 8, 4000)},
        {"tokens": 9000, "budget": (4, 8, 2000)},
        {"tokens": 1 << 19, "heads": 4, "budget": (16, 64, 1000)},
        {"tokens": 1 << 20, "heads": 2, "budget": (16, 64, 1000)},
    ],
)
@pytest.mark.parametrize("pages", [0, 8])
def test_step_is_the_reference(options, pages):
    options = dict(options, tokens=options["tokens"] // 8 * 8)
    made = make(**options)
    check(page(made, pages) if pages else made)


@pytest.mark.parametrize(
    "keys", ["all ties", "all best", "all worst", "best in one block", "half the same", "mostly against"]
)
@pytest.mark.parametrize("bits", [64, 128])
def test_skewed_rows(keys, bits):
    """Scores beyond the counted window, borders inside ties, and blocks that hold all that a row selects."""
    tokens = 8192
    made = make(tokens=tokens, bits=bits, budget=(2, 8, 300), full=True)
    code, _ = reference.encode_query(ops.group_queries(made["q"], 8), made["weights"], made["biases"], 7)
    best, worst = reference.pack_bits(code > 0), reference.pack_bits(code < 0)
    signatures, random = made["signatures"], made["signatures"].clone()
    if keys == "all ties":
        signatures.zero_()
    elif keys == "all best":
        signatures.copy_(best.expand_as(signatures))
        signatures[:, :, 100:200] ^= 0xF0F
    elif keys == "all worst":
        signatures.copy_(worst.expand_as(signatures))
    elif keys == "best in one block":
        signatures.copy_(worst.expand_as(signatures))
        signatures[:, :, 1024:1500] = random[:, :, 1024:1500]
    elif keys == "half the same":
        signatures[:, :, : tokens // 2] = best
    else:
        signatures.copy_(worst ^ (random & random.flip(2) & random.roll(77, 2)))
    check(made)


def test_empty_rows_give_zero_beside_full_ones():
    made = make(batch=2, tokens=1024, heads=4)
    made["start"][0] = made["end"][0]
    out, logsumexp = ops.decode(**made, backend="cuda")
    wanted, _ = expected(made)
    assert torch.all(out[0] == 0)
    assert torch.all(logsumexp[0] == -torch.inf)
    torch.testing.assert_close(out[1].float(), wanted[1], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("local", [0, 64])
@pytest.mark.parametrize(("bits", "tokens"), [(64, 2048), (32, 32768), (128, 4096)])
def test_the_newest_key_is_signed_and_scored(bits, tokens, local):
    """Every bit whose logit is not about 0, no other signature; a step that finds it in the cache gives the same."""
    made = make(tokens=tokens, bits=bits, budget=(4, local, 100), full=True)
    weights, biases = maps(8, (128, 256, bits), torch.bfloat16)
    biases, key = [b.float() for b in biases], made["k"][:, :, -1:]
    before = made["signatures"].clone()
    out, _ = decode_step(**made, new_key=(key, weights, biases))
    logits = reference.mlp(key, weights, biases)
    signed = reference.unpack_bits(made["signatures"][:, :, -1:])
    sure = logits.abs() > 1e-3
    assert torch.equal(signed[sure], (logits > 0)[sure])
    assert torch.equal(made["signatures"][:, :, :-1], before[:, :, :-1])
    assert torch.equal(out, decode_step(**made)[0])


def capture(made):
    """A graph of one step, and its output."""
    decode_step(**made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode_step(**made)
    return graph, out


def test_replays_of_a_graph_follow_their_inputs():
    """Between other steps, over whatever an earlier launch may have left on a board, and past the tag's 40 bits."""
    made = make(tokens=32768, budget=(4, 0, 1020), full=True)
    others = [torch.randn_like(made["q"]) for _ in range(4)]
    random = made["signatures"].clone()
    graph, out = capture(made)
    for turn in range(40):
        made["q"].copy_(others[turn % 4])
        made["end"].fill_(32768 - turn * 311)
        made["signatures"].copy_(random.roll(turn, 2)) if turn % 8 != 5 else made["signatures"].zero_()
        wanted, _ = decode_step(**made)
        if turn % 3 == 2:
            boards = [(place[0][1], held) for (place, *_), held in board._boards.items() if place[0] != "codes"]
            for row_bytes, held in boards:
                rows = held.view(-1, row_bytes)
                launches = rows[:, :8].clone()
                rows.random_(0, 256)
                rows[:, :8] = launches
                if turn == 20:
                    rows[:, :8].view(torch.int64).fill_((1 << 40) - 3)
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted), turn


def test_two_streams_at_once():
    """Each has a board of its own, and so has each graph."""
    pairs = []
    for tokens in (131072, 100000):
        made = make(tokens=tokens, budget=(16, 64, 4000), full=True)
        wanted = decode_step(**made)[0].clone()
        wrong = torch.zeros((), dtype=torch.int32, device="cuda")
        pairs.append((made, wanted, wrong, torch.cuda.Stream(), *capture(made)))
    torch.cuda.synchronize()
    for turn in range(200):
        for made, wanted, wrong, stream, graph, replayed in pairs:
            with torch.cuda.stream(stream):
                if turn % 2:
                    graph.replay()
                    out = replayed
                else:
                    out, _ = decode_step(**made)
                wrong += (out != wanted).any()
    torch.cuda.synchronize()
    assert [wrong.item() for _, _, wrong, *_ in pairs] == [0, 0]


def test_a_step_is_one_launch():
    made = make(tokens=4096)
    decode_step(**made)
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        decode_step(**made)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1, launched
