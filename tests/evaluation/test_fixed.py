"""Steps of one shape are those of every shape, for each method, whatever lies in the slots behind the rows' ends."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tests.tiny import build

from hashattention import Budget, HashMaps, MapsConfig
from hashattention.evaluation.meter import Meter
from hashattention.evaluation.reader import Reader
from hashattention.models.describe import describe
from hashattention.selectors.registry import METHODS, create

CONTEXTS = [list(range(3, 90)), list(range(40, 103)), list(range(5, 97))]
TAIL = torch.tensor([[7, 8, 9], [17, 18, 19], [27, 28, 29]])
BUDGET = Budget(density=0.25, sink=2, local=4)
OPTIONS = {"quest": "quest:page=4", "infllm": "infllm:block=8", "double_sparsity": "double_sparsity:channels=4"}


@pytest.fixture(scope="module")
def model():
    return build("llama")


def select(model, method: str):
    torch.manual_seed(1)
    maps = HashMaps(MapsConfig(bits=32, widths=(8,)), describe(model)).requires_grad_(False)
    return None if method == "dense" else create(OPTIONS.get(method, method), model=describe(model), maps=maps)


def read(model, fixed: bool, room: int = 60) -> Reader:
    reader = Reader(model, CONTEXTS, room)
    reader.fixed = fixed
    with torch.inference_mode():
        for layer in reader.cache.layers if fixed else ():
            for name, held in (("keys", layer.keys), ("values", layer.values)):
                # What no token has filled may hold anything finite.
                layer._buffers[name][:, :, held.shape[2] :] = 1e4
    return reader


def course(reader: Reader, selector, meter: Meter | None = None) -> torch.Tensor:
    """A question, an answer, back, another answer."""
    said = []
    with reader.serve(selector, BUDGET, meter):
        said.append(reader.forward(TAIL))
        mark = reader.mark()
        for tokens in (range(40, 58), range(60, 75)):
            for token in tokens:
                said.append(reader.forward(torch.tensor([[token], [token + 9], [token + 20]])))
            reader.rewind(mark)
    return torch.cat(said, 1)


@pytest.mark.parametrize("method", ["dense", *(name for name in METHODS if name != "sampled")])
def test_steps_of_one_shape(model, method: str) -> None:
    selector = select(model, method)
    fixed = read(model, True)
    expected, found = course(read(model, False), selector), course(fixed, selector)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # And once more, as the next method's.
    torch.testing.assert_close(course(fixed, selector), expected, rtol=1e-4, atol=1e-4)


def filling(model) -> HashMaps:
    """Maps with a remainder that matters."""
    base = describe(model)
    torch.manual_seed(1)
    table = torch.randn(len(base.layers), base.num_attention_heads, 3) * 0.3
    return HashMaps(MapsConfig(bits=32, widths=(8,)), base, remainder=table.tolist()).requires_grad_(False)


@pytest.mark.parametrize("block", [8, 16, 64, 100])
def test_steps_of_one_shape_with_a_remainder(model, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is of the same tokens, whether the cache's slots are filled or not; blocks end before and behind the
    first step, and in the steps.
    """
    monkeypatch.setattr("hashattention.selectors.remainder.BLOCK", block)
    selector, plain = (create(f"hash:remainder={given}", maps=filling(model)) for given in ("yes", "no"))
    fixed = read(model, True)
    expected, found = course(read(model, False), selector), course(fixed, selector)
    assert (expected - course(read(model, False), plain)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(course(fixed, selector), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["oracle", "h2o", "quest", "hash"])
def test_measured_steps_between_them(model, method: str) -> None:
    selector = select(model, method)
    meters = [Meter(97, 103, errors=True) for _ in range(2)]
    expected = course(read(model, False), selector, meters[0])
    fixed = read(model, True)
    torch.testing.assert_close(course(fixed, selector, meters[1]), expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(meters[1].readings(), meters[0].readings(), strict=True):
        assert one.attended == pytest.approx(other.attended)
        assert one.error == pytest.approx(other.error, rel=1e-3)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("method", ["dense", "h2o", "quest", "double_sparsity", "hash"])
def test_some_go_on_alone(model, method: str, fixed: bool) -> None:
    """And then all of them, as if nothing had been."""
    selector = select(model, method)

    def run(alone: bool) -> list[torch.Tensor]:
        reader, said = read(model, fixed), []
        with reader.serve(selector, BUDGET):
            reader.forward(TAIL)
            for token in range(40, 45):
                reader.forward(torch.tensor([[token], [token + 9], [token + 20]]))
            mark = reader.mark()
            rows = [2, 0] if alone else [0, 1, 2]
            with reader.narrowed(rows) if alone else contextlib.nullcontext():
                for token in range(60, 70):
                    tokens = torch.tensor([[token], [token + 9], [token + 20]])[rows]
                    said.append(reader.forward(tokens)[[1, 0] if alone else [0, 2]])
            reader.rewind(mark)
            said.append(reader.forward(TAIL))
        return said

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_they_are_used_where_they_can_be(model) -> None:
    reader = read(model, True, room=10)
    with reader.serve(select(model, "quest"), BUDGET):
        reader.forward(TAIL[:, :1])
        assert reader._fixed is None
        reader.forward(TAIL[:, 1:2])
        steps = reader._fixed
        assert steps is not None
        assert steps.room == reader.width + 10
        for _ in range(12):
            reader.forward(TAIL[:, :1])
        # Beyond the room the cache grows as ever.
        assert reader._fixed is steps
        assert reader.slots == reader.width + 14
    assert reader._fixed is None
    # Without room there is no such step.
    plain = Reader(model, CONTEXTS)
    plain.fixed = True
    with plain.serve(None, None):
        plain.forward(TAIL[:, :1])
        assert plain.slots == plain.width + 1


def test_there_must_be_room_for_a_copy(model, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashattention.evaluation import reader as module

    reader = read(model, True)
    assert reader.can_narrow(3)
    held = sum(layer.keys.shape[0] * 2 * layer._buffers["keys"][0].nbytes for layer in reader.cache.layers)
    assert sum(layer.nbytes() for layer in reader.cache.layers) == held
    reader._front = type("OnGpu", (), {"is_cuda": True, "device": None})()
    monkeypatch.setattr(module, "free_bytes", lambda device: held / 2)
    assert [reader.can_narrow(requests) for requests in (1, 2, 3)] == [True, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dense", *(name for name in METHODS if name != "sampled")])
def test_as_a_graph(method: str) -> None:
    model = build("llama").to("cuda")
    torch.manual_seed(1)
    maps = HashMaps(MapsConfig(bits=32, widths=(8,)), describe(model)).to("cuda").requires_grad_(False)
    name = OPTIONS.get(method, method)
    selector = None if method == "dense" else create(name, model=describe(model), maps=maps, device="cuda")

    def run(fixed: bool) -> torch.Tensor:
        reader = Reader(model, CONTEXTS, 60)
        reader.fixed = fixed
        said = []
        with reader.serve(selector, BUDGET):
            said.append(reader.forward(TAIL.cuda()))
            mark = reader.mark()
            for tokens in (range(40, 58), range(60, 75)):
                for token in tokens:
                    said.append(reader.forward(torch.tensor([[token], [token + 9], [token + 20]], device="cuda")))
                reader.rewind(mark)
        return torch.cat(said, 1)

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-4)
