"""Features that one channel of the producer feeds must get one scale: statistics by channel, and back to features.

A scale is computed once for each channel and then given to its features. Computed for each feature, equal statistics
need not give equal scales: a power differs in the last bit between the vectorized part of a tensor and its rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_amax(values: Tensor, ties: Tensor | None) -> Tensor:
    """The largest of the `values` [I] that have one entry in `ties` (int64 [I]), for each entry in order: [C]."""
    if ties is None:
        return values
    places, counts = _groups(ties)
    return values.new_empty(len(counts)).scatter_reduce(0, places, values, "amax", include_self=False)


def channel_mean(values: Tensor, ties: Tensor | None) -> Tensor:
    """The mean of the `values` [I] that have one entry in `ties` (int64 [I]), for each entry in order: [C]."""
    if ties is None:
        return values
    places, counts = _groups(ties)
    order = torch.argsort(places, stable=True)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[places[order]]
    # A row for each group: to scatter sums is to add them in whatever order a GPU's threads come.
    table = values.new_zeros(len(counts), int(counts.max()))
    table[places[order], rank] = values[order]
    return table.sum(1) / counts


def to_features(scale: Tensor, ties: Tensor | None) -> Tensor:
    """The scale of each feature, [I], from that of each channel, [C], in the order of the entries of `ties`."""
    return scale if ties is None else scale[_groups(ties)[0]]


def _groups(ties: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each entry's group [I], and how many entries each group has."""
    _, places, counts = torch.unique(ties, return_inverse=True, return_counts=True)
    return places, counts
