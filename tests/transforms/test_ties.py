"""Channels that share a scale share a statistic, however many each group has and wherever they lie."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from qcompiler.transforms.ties import channel_amax, channel_mean, to_features

TIES = {
    "heads": torch.arange(8).reshape(2, 4).repeat_interleave(3, 0).flatten(),
    "all": torch.zeros(5, dtype=torch.int64),
    "unequal": torch.tensor([7, 2, 7, 7, 0, 2, 7, 9]),
}


@pytest.mark.parametrize("name", TIES)
def test_each_channel_gets_the_statistic_of_those_it_is_tied_to(name: str) -> None:
    ties = TIES[name].tolist()
    values = torch.randn(len(ties), generator=torch.Generator().manual_seed(0))
    groups = [[float(v) for v, other in zip(values, ties, strict=True) if other == tie] for tie in ties]
    largest, mean = (to_features(found(values, TIES[name]), TIES[name]) for found in (channel_amax, channel_mean))
    assert largest.tolist() == [max(group) for group in groups]
    assert mean.tolist() == pytest.approx([fmean(group) for group in groups], rel=1e-5)


def test_what_is_not_tied_stays() -> None:
    values = torch.tensor([3.0, 1.0])
    assert channel_amax(values, None) is channel_mean(values, None) is to_features(values, None) is values
