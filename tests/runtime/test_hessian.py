"""Hessians are X^T X over the real tokens, whatever the batches, and leave torch as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.ir.annotations import HessianObserver
from qcompiler.runtime.hessian import HessianStatistic


def collected(*batches: tuple[Tensor, Tensor]) -> HessianStatistic:
    statistic = HessianStatistic(HessianObserver("l0.qkv.hessian", ("model.layers.0.self_attn.q_proj",), ("test",)))
    for x, mask in batches:
        statistic.update(x, mask)
    return statistic


def everything(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("size", [1, 8, 511, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_of_it_is_computed_and_all_of_it_is_right(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = collected((x, everything(3, 50))).value()
    rows = x.double().flatten(0, 1)
    exact = rows.T @ rows
    assert (value.double() - exact).norm() <= 1e-5 * exact.norm()
    assert torch.equal(value, value.T)


def test_padding_counts_for_nothing() -> None:
    x = torch.randn(2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    statistic = collected((x, mask))
    rows = torch.cat([x[0, :4], x[1, :2]])
    assert statistic.tokens == 6
    assert torch.allclose(statistic.value(), rows.T @ rows, atol=1e-5)


def test_batches_add_up_whatever_their_shape() -> None:
    x = torch.randn(4, 6, 16)
    whole = collected((x, everything(4, 6))).value()
    parts = collected((x[:1], everything(1, 6)), (x[1:].flatten(0, 1), everything(3, 6))).value()
    assert torch.allclose(whole, parts, atol=1e-4)


def test_a_dimension_between_tokens_and_features_is_more_rows() -> None:
    x = torch.randn(2, 3, 5, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    rows = torch.cat([x[0, :2].flatten(0, 1), x[1, :1].flatten(0, 1)])
    assert torch.allclose(collected((x, mask)).value(), rows.T @ rows, atol=1e-5)


def test_torchs_precision_is_put_back() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    collected((torch.randn(1, 4, 8).bfloat16(), everything(1, 4)))
    assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        collected(
            (torch.randn(1, 4, 8).bfloat16(), everything(1, 4)), (torch.randn(1, 4, 9).bfloat16(), everything(1, 4))
        )
    assert matmul.fp32_precision == before


def test_a_layer_that_never_ran_is_named() -> None:
    for statistic in (collected(), collected((torch.randn(1, 2, 4), ~everything(1, 2)))):
        with pytest.raises(DataError, match=r"no calibration token reached model\.layers\.0\.self_attn\.q_proj"):
            statistic.value()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(bad: float) -> None:
    x = torch.randn(1, 4, 8)
    x[0, 2, 3] = bad
    with pytest.raises(DataError, match="NaN or infinite activations enter model"):
        collected((x, everything(1, 4))).value()
