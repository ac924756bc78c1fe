"""Losses: what a step minimises, a file each; `total` is the recipe's sum of them."""

from __future__ import annotations

from torch import Tensor

from hashattention.train.losses.bce import bce
from hashattention.train.losses.bits import balance, decorrelation
from hashattention.train.losses.distill import distill
from hashattention.train.losses.keep import keep
from hashattention.train.losses.rank import rank
from hashattention.train.recipe import Recipe

__all__ = ["balance", "bce", "decorrelation", "distill", "keep", "rank", "selection_loss", "total"]


def selection_loss(scores: Tensor, target: Tensor, heavy: Tensor, recipe: Recipe) -> Tensor:
    """The recipe's loss, one value per layer and selection head ``[L, Hsel]``; `target` is that of `labels.targets`."""
    if recipe.loss == "bce":
        return bce(scores, target, heavy, recipe.alpha + recipe.beta * recipe.context)
    if recipe.loss == "rank":
        return rank(scores, target, heavy, recipe.top, recipe.negatives)
    found = distill(scores, target, heavy)
    if recipe.loss != "mix":
        return found
    return found + recipe.keep_share * keep(scores, target, heavy, recipe.budgets)


def total(scores: Tensor, key: Tensor, target: Tensor, heavy: Tensor, recipe: Recipe) -> Tensor:
    """The sum over all layers and heads: heads are independent, so each has the gradient it would have alone."""
    found = selection_loss(scores, target, heavy, recipe).sum()
    if recipe.balance:
        found = found + recipe.balance * balance(key).sum()
    if recipe.decorrelation:
        found = found + recipe.decorrelation * decorrelation(key).sum()
    return found
