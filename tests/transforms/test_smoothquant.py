"""SmoothQuant's scale is the paper's, shared where channels are tied, and one where there is nothing to balance."""

from __future__ import annotations

import pytest
import torch

from qcompiler.transforms.options import SmoothQuantOptions
from qcompiler.transforms.smoothquant import smoothing_scale


def test_ranges_of_activations_and_weights_meet_in_the_middle() -> None:
    amax = torch.tensor([16.0, 1.0, 0.25])
    weights = [torch.tensor([[1.0, -4.0, 0.5]]), torch.tensor([[-0.5, 1.0, 1.0], [0.0, 2.0, 0.1]]).bfloat16()]
    scale = smoothing_scale(weights, amax, SmoothQuantOptions())
    assert torch.allclose(scale, torch.tensor([4.0, 0.5, 0.5]))
    largest = torch.tensor([1.0, 4.0, 1.0])
    assert torch.allclose(amax / scale, largest * scale)


@pytest.mark.parametrize(("strength", "expected"), [(1.0, [8.0, 2.0]), (0.0, [2.0, 0.25]), (0.75, [5.65685, 1.189207])])
def test_strength_is_the_share_that_weights_take(strength: float, expected: list[float]) -> None:
    amax, weight = torch.tensor([8.0, 2.0]), torch.tensor([[0.5, 4.0]])
    scale = smoothing_scale([weight], amax, SmoothQuantOptions(strength=strength))
    assert torch.allclose(scale, torch.tensor(expected))


def test_channels_without_activations_or_weights_keep_a_scale_of_one() -> None:
    scale = smoothing_scale([torch.tensor([[1.0, 0.0, 1.0]])], torch.tensor([0.0, 9.0, 9.0]), SmoothQuantOptions())
    assert torch.equal(scale, torch.tensor([1.0, 1.0, 3.0]))


def test_tied_channels_get_the_scale_of_their_largest() -> None:
    amax, weight = torch.tensor([4.0, 9.0, 16.0, 1.0]), torch.tensor([[1.0, 1.0, 4.0, 1.0]])
    scale = smoothing_scale([weight], amax, SmoothQuantOptions(), ties=torch.tensor([5, 2, 5, 2]))
    assert torch.equal(scale, torch.tensor([2.0, 3.0, 2.0, 3.0]))


def test_scales_stay_away_from_zero() -> None:
    scale = smoothing_scale([torch.full((1, 1), 1e20)], torch.full((1,), 1e-30), SmoothQuantOptions())
    assert scale.item() == pytest.approx(1e-5)


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_tied_channels_get_one_scale_wherever_they_stand(strength: float) -> None:
    """A power is computed otherwise in the last features than in the vectors before them."""
    ties = torch.arange(12).repeat(5)
    amax, weight = torch.rand(2, 60, generator=torch.Generator().manual_seed(0)) * 4 + 0.1
    scale = smoothing_scale([weight[None]], amax, SmoothQuantOptions(strength=strength), ties=ties)
    assert all(torch.equal(part, scale[:12]) for part in scale.split(12))
    largest = [tensor.view(5, 12).amax(0) for tensor in (amax, weight)]
    expected = largest[0].double().pow(strength) / largest[1].double().pow(1 - strength)
    assert torch.allclose(scale[:12].double(), expected)
