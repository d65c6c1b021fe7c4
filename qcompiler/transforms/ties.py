"""Statistics of channels that must get one scale: several inputs that one channel of the producer feeds."""

from __future__ import annotations

import torch
from torch import Tensor


def tied_amax(values: Tensor, ties: Tensor | None) -> Tensor:
    """`values` [I], each replaced by the largest of those with an equal entry in `ties` (int64 [I])."""
    return _reduced(values, ties, "amax")


def tied_mean(values: Tensor, ties: Tensor | None) -> Tensor:
    """`values` [I], each replaced by the mean of those with an equal entry in `ties` (int64 [I])."""
    return _reduced(values, ties, "mean")


def _reduced(values: Tensor, ties: Tensor | None, how: str) -> Tensor:
    if ties is None:
        return values
    places = torch.unique(ties, return_inverse=True)[1]
    reduced = values.new_empty(int(places.max()) + 1)
    return reduced.scatter_reduce(0, places, values, how, include_self=False)[places]
