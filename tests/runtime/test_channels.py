"""What channels are like is what the real tokens say, whatever the batches; and it follows a scale that is moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.ir.annotations import ChannelObserver, HessianObserver
from qcompiler.runtime.channels import ChannelStatistic
from qcompiler.runtime.hessian import HessianStatistic

PATH = "model.layers.0.self_attn.q_proj"
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)


def collected(*batches: tuple[Tensor, Tensor]) -> ChannelStatistic:
    statistic = ChannelStatistic(ChannelObserver("l0.qkv.channels", (PATH,), ("test",)))
    for x, mask in batches:
        statistic.update(x, mask)
    return statistic


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.25


def same(statistic: ChannelStatistic, rows: Tensor) -> None:
    rows = rows.double()
    low, high = statistic.range()
    assert torch.equal(low, rows.amin(0).float())
    assert torch.equal(high, rows.amax(0).float())
    assert torch.equal(statistic.amax(), rows.abs().amax(0).float())
    assert torch.allclose(statistic.mean_abs(), rows.abs().mean(0).float(), rtol=1e-5)
    assert torch.allclose(statistic.mean_square(), rows.square().mean(0).float(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_counts_for_nothing_and_batches_add_up(dtype: torch.dtype) -> None:
    x, other = sample(2, 6, 16, dtype=dtype), sample(3, 2, 16, dtype=dtype) * 2
    before = x.clone()
    found = collected((x, MASK), (other.flatten(0, 1), torch.ones(3, 2, dtype=torch.bool)))
    same(found, torch.cat([x[0, :4], x[1, :2], other.flatten(0, 1)]))
    assert found.tokens == 12
    assert torch.equal(x, before)


def test_a_dimension_between_tokens_and_features_is_more_rows() -> None:
    x = sample(2, 6, 3, 8)
    same(collected((x, MASK)), torch.cat([x[0, :4].flatten(0, 1), x[1, :2].flatten(0, 1)]))


def test_channels_of_one_sign_have_a_range_of_one_sign() -> None:
    low, high = collected((torch.tensor([[[-2.0, 1.0], [-1.0, 3.0]]]), torch.ones(1, 2, dtype=torch.bool))).range()
    assert torch.equal(low, torch.tensor([-2.0, 1.0]))
    assert torch.equal(high, torch.tensor([-1.0, 3.0]))


def test_a_scale_that_is_moved_needs_no_other_run() -> None:
    x, scale = sample(2, 6, 16), sample(16).abs() + 0.1
    moved, measured = collected((x, MASK)), collected((x / scale, MASK))
    moved.rescale(scale)
    for name in ("mean_square", "mean_abs", "amax"):
        assert torch.allclose(getattr(moved, name)(), getattr(measured, name)(), rtol=1e-5), name
    assert all(torch.allclose(a, b) for a, b in zip(moved.range(), measured.range(), strict=True))
    hessians = [HessianStatistic(HessianObserver("l0.qkv.hessian", (PATH,), ("test",))) for _ in range(2)]
    for hessian, inputs in zip(hessians, (x, x / scale), strict=True):
        hessian.update(inputs, MASK)
    hessians[0].rescale(scale)
    assert torch.allclose(hessians[0].value(), hessians[1].value(), rtol=1e-4, atol=1e-4)
    assert torch.equal(hessians[0].diagonal(), hessians[0].value().diagonal())


def test_a_layer_that_never_ran_is_named() -> None:
    with pytest.raises(DataError, match=rf"no calibration token reached {PATH}"):
        collected((sample(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool))).mean_square()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(bad: float) -> None:
    x = sample(2, 6, 4)
    x[0, 2, 3] = bad
    with pytest.raises(DataError, match=rf"NaN or infinite activations enter {PATH}"):
        collected((x, MASK))
