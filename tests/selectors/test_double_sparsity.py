from __future__ import annotations

import pytest
import torch
from tests.selectors.steps import CASES, SHAPES, best, chosen, pool, ragged_step, replaced, rows_of, valid_tokens
from tests.selectors.test_quest import rounded

from hashattention.config import BaseModel, Budget
from hashattention.errors import ConfigError
from hashattention.selectors.channels import rank_channels
from hashattention.selectors.double_sparsity import DoubleSparsitySelector


def label_logits(queries, keys, channels, step, valid, bits):
    """The inner product over the chosen channels, each key's rounded on its own grid."""
    out = torch.full((len(queries), step.extent.tokens), -torch.inf, dtype=torch.float64)
    for token in valid:
        out[:, token] = queries[:, channels] @ rounded(keys[token, channels], bits) * step.scale
    return out


@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(("shape", "budget"), CASES)
def test_labels_by_the_papers_product(shape, budget, calibrated, bits):
    step = ragged_step(shape, budget)
    torch.manual_seed(5)
    order = torch.stack([torch.randperm(16) for _ in range(shape[1])])
    selector = DoubleSparsitySelector(5, bits, {0: order} if calibrated else None)
    selection, estimate = selector.select(step), selector.estimate(step)
    for request, row, head, queries, keys in rows_of(step, "group"):
        valid = valid_tokens(step, request)
        ranked = order[head] if calibrated else keys[valid].abs().sum(0).argsort(descending=True)
        naive = label_logits(queries, keys, ranked[:5], step, valid, bits)
        torch.testing.assert_close(estimate[request, head][:, valid].double(), naive[:, valid], rtol=1e-5, atol=1e-5)
        scores = pool(estimate[request, head].double(), step, request, "peak_max")
        assert chosen(selection, request, row) == best(scores, step, request)


def test_all_channels_unrounded_are_the_exact_logits():
    step = ragged_step(SHAPES[0], Budget(heavy=5))
    estimate = DoubleSparsitySelector(16, 16).estimate(step)
    for request, _, head, queries, keys in rows_of(step, "group"):
        valid = valid_tokens(step, request)
        exact = (queries @ keys[valid].T * step.scale).float()
        torch.testing.assert_close(estimate[request, head][:, valid], exact, rtol=1e-5, atol=1e-5)


def test_channels_are_ranked_by_their_part_in_the_logits():
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 30, 8), torch.randn(2, 2, 30, 8)
    query[:, :3, :, 5] *= 9
    key[:, 0, :, 2] *= 7
    # A channel that only queries have is worth nothing.
    query[:, 3:, :, 4] *= 50
    key[:, 1, :, 4] = 0
    order = rank_channels(query, key)
    naive = torch.stack(
        [
            sum((query[:, head * 3 + g].double() * key[:, head].double()).abs().mean((0, 1)) for g in range(3))
            for head in range(2)
        ]
    )
    assert torch.equal(order, naive.argsort(dim=-1, descending=True))
    assert order[0, :2].tolist() == [5, 2]
    assert order[1, -1] == 4


def test_a_layer_without_calibration_is_refused():
    step = replaced(ragged_step(SHAPES[0], Budget(heavy=5)), layer=3)
    with pytest.raises(ConfigError, match=r"layer 3 has no calibrated channels \(layers \[1\] have\)"):
        DoubleSparsitySelector(4, 4, {1: torch.arange(16).expand(2, -1)}).select(step)


def test_more_channels_than_the_model_has_are_refused():
    model = BaseModel("LlamaForCausalLM", 2, 4, 2, 16, (0, 1), "{}")
    assert DoubleSparsitySelector(16).refuse(model) is None
    assert "heads have 16 channels" in DoubleSparsitySelector(17).refuse(model)


@pytest.mark.parametrize(("channels", "bits", "expected"), [(16, 4, 96.0), (16, 2, 64.0), (8, 16, 128.0)])
def test_auxiliary_bits_by_hand(channels, bits, expected):
    # A rounded label carries its minimum and step, 16 bits each.
    assert DoubleSparsitySelector(channels, bits).auxiliary_bits(128) == expected
