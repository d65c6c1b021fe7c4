"""Scales under importance: of all ranges that are tried, each tile takes the one with the least weighted error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qcompiler.numerics.tensor as tensor_module
import qcompiler.numerics.weights as weights_module
from qcompiler.numerics import QuantizedTensor, quantize_weight, range_factors
from qcompiler.scheme import QuantSpec, preset
from tests.numerics.cases import WEIGHT_SPECS
from tests.numerics.test_weights import dequantize_exactly, same, sample, tiles


@pytest.fixture(params=list(WEIGHT_SPECS.values()), ids=list(WEIGHT_SPECS))
def spec(request: pytest.FixtureRequest) -> QuantSpec:
    found: QuantSpec = request.param
    return found


def inputs(seed: int = 0, columns: int = 96) -> Tensor:
    """Correlated inputs of very different size, one of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.randn(columns, generator=generator).mul(1.5).exp()
    x = torch.randn(50, columns, generator=generator) @ mix
    x[:, 7] = 0
    return x


def importance(x: Tensor, kind: str) -> Tensor:
    return x.square().mean(0) if kind == "diagonal" else x.T @ x


def loss(weight: Tensor, q: QuantizedTensor, x: Tensor, kind: str) -> Tensor:
    """The error of every tile, by weighing it or by running the inputs that belong to it; float64."""
    difference = dequantize_exactly(q) - weight.double()
    columns = tiles(torch.arange(weight.shape[1]).expand(weight.shape), q.spec)
    found = []
    for tile, index in zip(tiles(difference, q.spec), columns, strict=True):
        seen = x[:, index[0]].double()
        found.append(tile.square() @ seen.square().mean(0) if kind == "diagonal" else tile @ seen.T)
    return torch.stack([f.sum() if kind == "diagonal" else f.square().sum() for f in found])


@pytest.mark.parametrize("kind", ["diagonal", "hessian"])
def test_each_tile_takes_the_best_of_all_ranges(spec: QuantSpec, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = sample(dtype=torch.float32), inputs()
    q = quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16, importance=importance(x, kind))
    factors, every = range_factors(spec), []
    for factor in factors:
        monkeypatch.setattr(weights_module, "range_factors", lambda _, only=factor: (only,))
        tried = quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16)
        every.append(loss(weight, tried, x, kind))
    assert len(every) == len(factors) > 1
    assert torch.allclose(loss(weight, q, x, kind), torch.stack(every).amin(0), rtol=1e-4, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(WEIGHT_SPECS)), st.integers(0, 10**6), st.sampled_from(["diagonal", "hessian"]))
def test_the_weighted_error_is_never_above_that_of_min_max(name: str, seed: int, kind: str) -> None:
    spec, weight, x = WEIGHT_SPECS[name], sample(dtype=torch.float32, seed=seed), inputs(seed)
    found, minmax = (
        loss(weight, q, x, kind)
        for q in (
            quantize_weight(weight, spec, scales="mse", scale_dtype=torch.float32, importance=importance(x, kind)),
            quantize_weight(weight, spec, scale_dtype=torch.float32),
        )
    )
    assert (found <= minmax * (1 + 1e-4)).all()


@pytest.mark.parametrize("kind", ["diagonal", "hessian"])
@pytest.mark.parametrize("name", ["W3A16", "W4A16", "W4A16_ASYM", "NVFP4", "W8A8"])
def test_what_counts_is_rounded_better_than_where_all_counts_the_same(name: str, kind: str) -> None:
    spec, weight, x = preset(name).weights, sample((48, 256)).float(), inputs(columns=256)
    weighted, plain = (
        loss(weight, quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16, importance=by), x, kind)
        for by in (importance(x, kind), None)
    )
    assert weighted.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("kind", ["diagonal", "hessian"])
def test_equal_importance_is_the_plain_search(spec: QuantSpec, kind: str) -> None:
    weight = sample()
    by = torch.full((96,), 4.0) if kind == "diagonal" else torch.eye(96) * 4
    first, second = (
        quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16, importance=i) for i in (by, None)
    )
    assert same(first, second)


@pytest.mark.parametrize("kind", ["diagonal", "hessian"])
def test_small_pieces_give_what_one_piece_gives(spec: QuantSpec, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, by = sample(), importance(inputs(), kind)
    whole = quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16, importance=by)
    monkeypatch.setattr(tensor_module, "_CPU_ELEMENTS", 500)
    cut = quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16, importance=by)
    assert same(cut, whole)


def test_importance_belongs_to_a_search() -> None:
    with pytest.raises(ValueError, match="importance"):
        quantize_weight(sample(), preset("W8A8").weights, scale_dtype=torch.bfloat16, importance=torch.ones(96))
