from __future__ import annotations

import pytest
import torch
from tests.tiny import build

from hashattention import Budget, attach
from hashattention.evaluation.meter import Meter
from hashattention.evaluation.reader import Reader, can_batch
from hashattention.models.describe import describe
from hashattention.selectors.registry import METHODS, create

ALL = 1 << 20
CONTEXTS = [list(range(3, 90)), list(range(40, 103)), list(range(5, 97))]
TAIL = torch.tensor([[7, 8, 9], [17, 18, 19], [27, 28, 29]])


@pytest.fixture(scope="module")
def model():
    return build("llama")


def served(model, method: str, maps=None):
    selector = create(method, model=describe(model), maps=maps)
    return attach(model, selector, Budget(density=0.25, sink=2, local=4), min_context=0, sparse_tail=ALL)


def tiny_maps(model):
    from hashattention import HashMaps, MapsConfig

    torch.manual_seed(1)
    return HashMaps(MapsConfig(bits=32, widths=(8,)), describe(model)).requires_grad_(False)


@pytest.mark.parametrize("method", ["dense", *(name for name in METHODS if name != "sampled")])
def test_a_batch_is_read_as_its_requests_alone(model, method: str) -> None:
    maps = tiny_maps(model) if method == "hash" else None

    def run(contexts: list[list[int]], tail: torch.Tensor) -> torch.Tensor:
        reader = Reader(model, contexts)
        if method == "dense":
            return torch.cat([reader.forward(tail, keep=3), reader.forward(tail[:, :1])], 1)
        with served(model, method, maps):
            return torch.cat([reader.forward(tail, keep=3), reader.forward(tail[:, :1])], 1)

    together = run(CONTEXTS, TAIL)
    for place, context in enumerate(CONTEXTS):
        alone = run([context], TAIL[place : place + 1])
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_next_token_is_that_of_the_context(model) -> None:
    reader = Reader(model, CONTEXTS)
    for place, context in enumerate(CONTEXTS):
        with torch.inference_mode():
            expected = model(torch.tensor([context])).logits[0, -1]
        torch.testing.assert_close(reader.logits[place], expected)
    assert reader.padding == (5, 29, 0)
    assert reader.slots == reader.width == 92


@pytest.mark.parametrize("method", ["h2o", "quest:page=4", "double_sparsity:channels=4", "hash"])
def test_what_was_said_is_forgotten(model, method: str) -> None:
    """Also what a method kept of it: H2O's weights, above all."""
    reader = Reader(model, CONTEXTS)
    with served(model, method, tiny_maps(model) if method == "hash" else None):
        reader.forward(TAIL)
        expected = reader.forward(TAIL)
        reader.forget()
        reader.forward(TAIL)
        mark = reader.mark()
        for token in range(40, 60):
            reader.forward(torch.full((3, 1), token))
        reader.rewind(mark)
        assert torch.equal(reader.forward(TAIL), expected)
    reader.forget()
    assert reader.slots == reader.width
    assert all(layer.side.nbytes() == 0 for layer in reader.cache.layers)
    fresh = Reader(model, CONTEXTS)
    assert torch.equal(reader.forward(TAIL), fresh.forward(TAIL))


def test_sliding_layers_go_back_too() -> None:
    model = build("gemma3")
    assert not can_batch(model)
    assert can_batch(build("llama"))
    reader = Reader(model, CONTEXTS[:1])
    first = reader.forward(TAIL[:1], keep=3)
    mark = reader.mark()
    second = reader.forward(TAIL[1:2])
    for _ in range(12):
        reader.forward(TAIL[:1])
    reader.rewind(mark)
    assert torch.equal(reader.forward(TAIL[1:2]), second)
    reader.forget()
    assert torch.equal(reader.forward(TAIL[:1], keep=3), first)


@pytest.mark.parametrize("method", ["dense", "oracle", "hash", "quest:page=4"])
def test_a_cache_with_room_is_never_copied(model, method: str) -> None:
    reader = Reader(model, CONTEXTS, room=6)
    places = [layer.keys.data_ptr() for layer in reader.cache.layers]
    selector = None if method == "dense" else create(method, model=describe(model), maps=tiny_maps(model))
    with reader.serve(selector, Budget(density=0.25, sink=2, local=4)):
        reader.forward(TAIL)
        for _ in range(3):
            reader.forward(TAIL[:, :1])
        assert reader.slots == reader.width + 6
        assert [layer.keys.data_ptr() for layer in reader.cache.layers] == places
        beyond = reader.forward(TAIL[:, :1])
    other = Reader(model, CONTEXTS)
    with reader.serve(selector, Budget(density=0.25, sink=2, local=4)):
        reader.forward(TAIL)
    with other.serve(selector, Budget(density=0.25, sink=2, local=4)):
        other.forward(TAIL)
        for _ in range(3):
            other.forward(TAIL[:, :1])
        assert torch.equal(other.forward(TAIL[:, :1]), beyond)


def test_an_observer_sees_only_its_steps(model) -> None:
    reader = Reader(model, CONTEXTS)
    selector = create("streaming", model=describe(model))
    meter = Meter(reader.width + 4, reader.width + 4)
    seen = []
    with reader.serve(selector, Budget(density=0.25, sink=2, local=4), meter):
        for tokens in (TAIL, TAIL[:, :1], TAIL[:, :1]):
            reader.forward(tokens)
            seen.append(reader._first._hash_attention.attention.observer is meter)
    assert seen == [False, True, False]
    assert len(meter.readings()) == 3
    assert not hasattr(reader._first, "_hash_attention")


def test_dense_attention_of_few_rows_at_a_time(model, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashattention.evaluation import reader as module

    whole, parts = Reader(model, CONTEXTS), Reader(model, CONTEXTS)
    own = model.config._attn_implementation
    with whole.serve(None, None):
        expected = whole.forward(TAIL, keep=3)
        assert model.config._attn_implementation == own
    monkeypatch.setattr(module, "REPEATED", 1)
    with parts.serve(None, None):
        assert model.config._attn_implementation == module.BY_ROWS
        torch.testing.assert_close(parts.forward(TAIL, keep=3), expected, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == own
    with parts.serve(create("oracle", model=describe(model)), Budget(density=0.25, sink=2, local=4)):
        sparse = parts.forward(TAIL, keep=3)
    with whole.serve(create("oracle", model=describe(model)), Budget(density=0.25, sink=2, local=4)):
        torch.testing.assert_close(whole.forward(TAIL, keep=3), sparse)
