from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hashattention.ops import reference, triton
from hashattention.ops.triton import tickets


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An arena with room for two streams and eight counters more."""
    monkeypatch.setattr(tickets, "COUNTERS", 2 * tickets.A_STREAM + 8)
    tickets._arena.cache_clear()
    yield
    tickets._arena.cache_clear()


def test_launches_of_a_stream_share_and_others_do_not(few: None) -> None:
    arena = tickets._arena(torch.device("cpu"))
    one, other = arena.shared(1), arena.shared(2)
    assert arena.shared(1) is one
    assert len(one) == len(other) == tickets.A_STREAM
    assert one.data_ptr() + 4 * tickets.A_STREAM == other.data_ptr()


def test_counters_are_handed_out_once_and_aligned(few: None) -> None:
    arena = tickets._arena(torch.device("cpu"))
    first, second = arena.cut(5), arena.cut(3)
    assert (first.data_ptr() - second.data_ptr()) % 16 == 0
    assert second.data_ptr() >= first.data_ptr() + 20


def test_more_than_there_are_is_made_anew(few: None) -> None:
    many = tickets.take(3 * tickets.A_STREAM, torch.device("cpu"))
    assert len(many) == 3 * tickets.A_STREAM
    assert not many.any()
    assert len(tickets.take(9, torch.device("cpu"))) == 9


def step(device: str, rows: int) -> tuple[list, tuple]:
    """Encode and attend of `rows` requests, as kernels that split and merge, and as the reference has them."""
    x, weights = torch.randn(rows, 2, 1, 16), [torch.randn(2, 16, 64), torch.randn(2, 64, 32)]
    biases = [torch.randn(2, 64), torch.randn(2, 32)]
    q, k, v = torch.randn(rows, 4, 1, 16), torch.randn(rows, 2, 200, 16), torch.randn(rows, 2, 200, 16)
    indices = torch.arange(180).int().expand(rows, 2, 180)
    counts = torch.randint(181, (rows, 2)).int()
    maps = [[t.to(device) for t in each] for each in (weights, biases)]
    cache = [t.to(device) for t in (q, k, v, indices, counts)]
    return [x.to(device), *maps], (*cache, 0.25)


def test_every_launch_leaves_its_counters_at_zero(device: str) -> None:
    """Small and large launches after one another, twice each: a counter left behind would spoil the next."""
    for rows in (1, 19, 1, 7, 1):
        encoded, attended = step(device, rows)
        for _ in range(2):
            assert torch.equal(triton.encode_signature(*encoded), reference.encode_signature(*encoded))
            out, _ = triton.attend(*attended)
            assert torch.allclose(out, reference.attend(*attended)[0], atol=1e-5)
            assert not tickets.take(tickets.A_STREAM, out.device).any()


@pytest.mark.gpu
def test_two_graphs_at_once_do_not_meet() -> None:
    """Replays of two graphs side by side, thousands of merges: each has counters of its own."""
    inputs, steps, graphs, outs = [], [], [], []
    for rows in (1, 3):
        encoded, attended = step("cuda", rows)
        inputs.append((encoded, attended))  # a graph reads them where they lie
        triton.encode_signature(*encoded), triton.attend(*attended)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outs.append([(triton.encode_signature(*encoded), triton.attend(*attended)[0]) for _ in range(50)])
        steps.append((reference.encode_signature(*encoded), reference.attend(*attended)[0]))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for made, (signature, expected) in zip(outs, steps, strict=True):
        assert all(torch.equal(each, signature) for each, _ in made)
        assert all(torch.allclose(out, expected, atol=1e-3) for _, out in made)
