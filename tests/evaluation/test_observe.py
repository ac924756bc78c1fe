from __future__ import annotations

import pytest
import torch

from hashattention import ops
from hashattention.cache import TokenCache
from hashattention.config import Budget
from hashattention.evaluation.observe import Recorder, Tally, dense_weights
from hashattention.rows import Extent
from hashattention.selectors.base import Selection, Step
from hashattention.selectors.oracle import OracleSelector

TOKENS, SCALE = 37, 0.3


def a_step(budget: Budget, extent: Extent | None = None, layer: int = 3) -> Step:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 1, 8, generator=generator) * 3
    # Two slots more than the step may see, filled with poison.
    k, v = (torch.randn(1, 2, TOKENS + 2, 8, generator=generator) for _ in range(2))
    k[:, :, TOKENS:] = v[:, :, TOKENS:] = float("nan")
    return Step(layer, q, k, v, SCALE, extent or Extent.full(1, TOKENS, q.device), budget, TokenCache())


def attended(step: Step, selection: Selection) -> torch.Tensor:
    return ops.attend(step.query, step.key, step.value, selection.indices, selection.counts, scale=SCALE)[0]


def test_all_tokens_lose_nothing() -> None:
    step = a_step(Budget(density=1.0))
    selection = OracleSelector().select(step)
    recorder = Recorder()
    recorder(step, selection, attended(step, selection))
    (found,) = recorder.layers[3]
    assert (found.tokens, found.attended, found.rows) == (TOKENS, TOKENS, TOKENS)
    assert found.error < 1e-6
    assert found.mass == pytest.approx(1, abs=1e-6)


def test_error_and_mass_by_hand() -> None:
    step = a_step(Budget(heavy=4, sink=1, local=2))
    selection = OracleSelector("query_head").select(step)
    out = attended(step, selection)
    recorder = Recorder()
    recorder(step, selection, out)
    (found,) = recorder.layers[3]
    masses, errors, read = [], [], [set(), set()]
    for head in range(6):
        key, value = (tensor[0, head // 3, :TOKENS].double() for tensor in (step.key, step.value))
        weights = (key @ step.query[0, head, 0].double() * SCALE).softmax(0)
        kept = selection.indices[0, head, : selection.counts[0, head]].tolist()
        dense = weights @ value
        masses.append(weights[kept].sum().item())
        errors.append(((out[0, head, 0] - dense).norm() / dense.norm()).item())
        read[head // 3].update(kept)
    assert found.mass == pytest.approx(sum(masses) / 6, abs=1e-5)
    assert found.error == pytest.approx(sum(errors) / 6, abs=1e-5)
    assert found.attended == 7
    assert found.rows == (len(read[0]) + len(read[1])) / 2
    assert 7 < found.rows < 21


def test_unused_slots_are_not_tokens() -> None:
    indices = torch.tensor([[[0, 5, -1, -1], [2, 3, 4, 6]]], dtype=torch.int32)
    counts = torch.tensor([[2, 4]], dtype=torch.int32)
    kept = Selection(indices, counts).held(7)
    assert kept.shape == (1, 2, 7)
    assert [row.nonzero().flatten().tolist() for row in kept[0]] == [[0, 5], [2, 3, 4, 6]]
    poisoned = indices.clone()
    poisoned[0, 0, 2:] = 1
    assert torch.equal(Selection(poisoned, counts).held(7), kept)


def test_padding_and_holes_weigh_nothing() -> None:
    mask = torch.ones(1, TOKENS, dtype=torch.int64)
    mask[0, :4] = mask[0, 9] = 0
    weights = dense_weights(a_step(Budget(heavy=4), Extent.from_mask(mask)))
    assert weights.shape == (1, 6, TOKENS)
    assert torch.all(weights[..., mask[0] == 0] == 0)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 6))


def test_attention_is_the_strongest_head_and_nothing_outside_the_selection() -> None:
    step = a_step(Budget(heavy=2, sink=1, local=1))
    selection = OracleSelector().select(step)
    recorder = Recorder()
    recorder(step, selection, attended(step, selection))
    weights = recorder.attention()
    chosen = selection.held(TOKENS)[0].any(0)
    assert weights.shape == (TOKENS,)
    assert torch.all((weights > 0) == chosen)
    assert 1 / 4 <= weights.max() <= 1
    # Another layer of the same step raises it or leaves it; it is not averaged.
    other = a_step(Budget(heavy=2, sink=1, local=1), layer=4)
    recorder(other, selection, attended(other, selection))
    assert torch.equal(recorder.attention(), weights)


def test_steps_before_since_are_not_recorded() -> None:
    recorder = Recorder(since=TOKENS + 1)
    step = a_step(Budget(heavy=2))
    selection = OracleSelector().select(step)
    recorder(step, selection, attended(step, selection))
    assert not recorder.layers
    assert recorder.attention().numel() == 0
    assert recorder.mean("error") == {}


def test_means_are_by_layer_in_order() -> None:
    recorder = Recorder()
    for layer, heavy in ((4, 2), (1, 2), (4, 8)):
        step = a_step(Budget(heavy=heavy, sink=0, local=0), layer=layer)
        selection = OracleSelector().select(step)
        recorder(step, selection, attended(step, selection))
    assert recorder.mean("attended") == {1: 2, 4: 5}
    assert list(recorder.mean("mass")) == [1, 4]


def test_a_tally_counts_what_was_selected() -> None:
    tally = Tally()
    assert tally.means() == (0, 0)
    for heavy in (2, 8):
        step = a_step(Budget(heavy=heavy, sink=0, local=0))
        selection = OracleSelector().select(step)
        tally(step, selection, attended(step, selection))
    lengths = step.extent.lengths().double()
    assert tally.steps == 2
    assert tally.means() == pytest.approx((5, float((5 / lengths).mean())))
