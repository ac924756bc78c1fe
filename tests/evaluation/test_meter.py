from __future__ import annotations

import pytest
import torch
from tests.tiny import build

from hashattention import Budget, attach
from hashattention.evaluation.meter import Meter, spread
from hashattention.evaluation.observe import Recorder
from hashattention.evaluation.reader import Reader
from hashattention.models.describe import describe
from hashattention.selectors.registry import create

CONTEXTS = [list(range(3, 90)), list(range(40, 103))]
TAIL = torch.tensor([[7, 8, 9], [17, 18, 19]])


@pytest.fixture(scope="module")
def model():
    return build("llama")


def observe(model, contexts, tail, *observers):
    found = []
    for observer in observers:
        reader = Reader(model, contexts)
        selector = create("oracle:share=query_head", model=describe(model))
        budget = Budget(density=0.25, sink=2, local=4)
        with attach(model, selector, budget, min_context=0, sparse_tail=1 << 20, observer=observer):
            reader.forward(tail)
        found.append(observer)
    return found


def test_a_request_alone_is_what_the_recorder_says(model) -> None:
    context, tail = CONTEXTS[:1], TAIL[:1]
    meter, recorder = observe(model, context, tail, Meter(88, 90, attention=(0,)), Recorder(88))
    (reading,) = meter.readings()
    for layer, error in recorder.mean("error").items():
        assert reading.error[layer] == pytest.approx(error, rel=1e-5)
    assert reading.attended == pytest.approx(sum(recorder.mean("attended").values()) / 2)
    assert reading.rows == pytest.approx(sum(recorder.mean("rows").values()) / 2)
    # Index sets of the two query heads of a group differ.
    assert reading.attended < reading.rows <= 2 * reading.attended
    torch.testing.assert_close(torch.tensor(reading.attention), recorder.attention())


def test_requests_are_kept_apart(model) -> None:
    (together,) = observe(model, CONTEXTS, TAIL, Meter(88, 1 << 20, attention=(0, 1)))
    for place, context in enumerate(CONTEXTS):
        since = len(context) + 1
        (alone,) = observe(model, [context], TAIL[place : place + 1], Meter(since, 1 << 20, attention=(0,)))
        one, other = together.readings()[place], alone.readings()[0]
        assert one.rows == pytest.approx(other.rows)
        assert one.error == pytest.approx(other.error, rel=1e-3)
        padding = 87 - len(context)
        assert sum(one.attention[:padding]) == 0
        torch.testing.assert_close(
            torch.tensor(one.attention[padding:]), torch.tensor(other.attention), rtol=1e-3, atol=1e-4
        )


def test_only_asked_for_steps_count(model) -> None:
    meter, last, none = observe(model, CONTEXTS, TAIL, Meter(88, 90, every=2), Meter(90, 90), Meter(91, 99))
    assert meter.readings()[0].error != last.readings()[0].error
    assert none.readings() is None
    (plain,) = observe(model, CONTEXTS, TAIL, Meter(88, 90, errors=False))
    assert plain.readings()[0].error == {}
    assert plain.readings()[0].rows > 0


def test_who_has_ended_does_not_count(model) -> None:
    meter, still = Meter(88, 90), Meter(88, 88)
    steps = []

    def count(step, selection, out) -> None:
        # The second request ends after the first position.
        meter.active = torch.tensor([1.0, float(step.extent.tokens == 88)])
        steps.append(step.extent.tokens)
        meter(step, selection, out)

    observe(model, CONTEXTS, TAIL, count, still)
    assert set(steps) == {88, 89, 90}
    assert meter.readings()[1].error == pytest.approx(still.readings()[1].error)
    assert meter.readings()[0].error != pytest.approx(still.readings()[0].error)


def test_errors_may_be_measured_at_fewer_steps(model) -> None:
    every, few, first = observe(model, CONTEXTS, TAIL, Meter(88, 90), Meter(88, 90, errors_every=3), Meter(88, 88))
    for one, other, alone in zip(every.readings(), few.readings(), first.readings(), strict=True):
        assert other.rows == one.rows
        assert other.error == alone.error != one.error


def test_it_is_wanted_where_it_measures() -> None:
    meter = Meter(10, 12)
    assert [meter.wants(first, first + 2) for first in (5, 7, 8, 12, 13)] == [False, False, True, True, False]
    assert not Meter(0, -1).wants(1, 1)
    some = Meter(10, 50, every=16)
    assert [token for token in range(80) if some.wants(token, token)] == [10, 26, 42]
    assert [some.wants(*span) for span in ((11, 25), (11, 26), (27, 41), (43, 90), (0, 9), (0, 10))] == [
        0,
        1,
        0,
        0,
        0,
        1,
    ]


def test_errors_of_all_layers() -> None:
    assert spread({1: 0.5, 3: 0.25}, 5) == (0.0, 0.5, 0.0, 0.25, 0.0)
    assert spread({}, 5) == ()
