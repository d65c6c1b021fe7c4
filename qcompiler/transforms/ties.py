"""Statistics of channels that must get one scale: several inputs that one channel of the producer feeds."""

from __future__ import annotations

import torch
from torch import Tensor


def tied_amax(values: Tensor, ties: Tensor | None) -> Tensor:
    """`values` [I], each replaced by the largest of those with an equal entry in `ties` (int64 [I])."""
    if ties is None:
        return values
    places, counts = _groups(ties)
    largest = values.new_empty(len(counts)).scatter_reduce(0, places, values, "amax", include_self=False)
    return largest[places]


def tied_mean(values: Tensor, ties: Tensor | None) -> Tensor:
    """`values` [I], each replaced by the mean of those with an equal entry in `ties` (int64 [I])."""
    if ties is None:
        return values
    places, counts = _groups(ties)
    order = torch.argsort(places, stable=True)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[places[order]]
    # A row for each group: to scatter sums is to add them in whatever order a GPU's threads come.
    table = values.new_zeros(len(counts), int(counts.max()))
    table[places[order], rank] = values[order]
    return (table.sum(1) / counts)[places]


def _groups(ties: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each entry's group [I], and how many entries each group has."""
    _, places, counts = torch.unique(ties, return_inverse=True, return_counts=True)
    return places, counts
