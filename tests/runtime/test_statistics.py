"""What observers make of the tokens they see: ranges, clipped ranges, and what they refuse."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.ir.annotations import Observer
from qcompiler.numerics import fake_quantize, nvfp4_global_scale
from qcompiler.runtime.statistics import Statistic
from qcompiler.scheme import QuantSpec, Strategy, preset

INT4 = QuantSpec(bits=4, strategy=Strategy.TENSOR)
INT8 = QuantSpec(bits=8, strategy=Strategy.TENSOR)
INT8_ASYM = QuantSpec(bits=8, strategy=Strategy.TENSOR, symmetric=False)
FP8 = QuantSpec(type="float", bits=8, strategy=Strategy.TENSOR)
PER_HEAD = QuantSpec(type="float", bits=8, strategy=Strategy.ATTN_HEAD)
NVFP4 = preset("NVFP4").input_activations
Kind = Literal["minmax", "mse", "percentile"]


def statistic(
    kind: Kind = "minmax",
    spec: QuantSpec = FP8,
    purpose: Literal["input", "key", "value"] = "input",
    percentile: float = 99.9,
) -> Statistic:
    return Statistic(Observer("id", kind, spec, purpose, ("some.linear",), ("test",), percentile))


def everything(x: Tensor) -> Tensor:
    """The mask of a batch without padding."""
    return torch.ones(x.shape[:2], dtype=torch.bool)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(count: int = 40_000) -> Tensor:
    """Activations as language models have them: most are small, and a few channels are outliers."""
    x = normal(1, count // 16, 16)
    x[..., 3] *= 20
    return x


def range_of(found: Statistic) -> tuple[float, float]:
    low, high = found.range()
    return float(low), float(high)


# --- the whole range ------------------------------------------------------------------------------------------------


def test_the_range_is_that_of_real_tokens_over_all_batches() -> None:
    found = statistic()
    first, second = normal(2, 5, 8), normal(3, 4, 8, seed=1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    first[1, 3:] = 1e6  # padding
    found.update(first, mask)
    found.update(second, everything(second))
    real = torch.cat([first[mask], second.flatten(0, 1)])
    assert range_of(found) == (float(real.min()), float(real.max()))
    assert found.tokens == 8 + 12


def test_tokens_may_come_flat() -> None:
    """Shared experts read [batch * tokens, features]."""
    x = normal(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    flat = statistic()
    flat.update(x.flatten(0, 1), mask)
    assert range_of(flat) == (float(x[mask].min()), float(x[mask].max()))


def test_zero_lies_in_every_range() -> None:
    found = statistic(spec=INT8_ASYM)
    found.update(normal(1, 4, 8).abs() + 3, torch.ones(1, 4, dtype=torch.bool))
    low, high = range_of(found)
    assert low == 0 < high
    scale, zero = found.qparams(torch.float32)
    assert zero is not None
    assert float(scale) == pytest.approx(high / 255)
    assert int(zero) == -128


def test_keys_and_values_have_one_range_or_one_per_head() -> None:
    x = normal(2, 3, 5, 4)  # batch, heads, tokens, head size
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    x[1, :, 2:] = -1e6
    whole, heads = statistic(purpose="key"), statistic(spec=PER_HEAD, purpose="value")
    whole.update(x, mask)
    heads.update(x, mask)
    real = x.transpose(1, 2)[mask]
    assert range_of(whole) == (float(real.min()), float(real.max()))
    low, high = heads.range()
    assert torch.equal(low, real.amin((0, 2)))
    assert torch.equal(high, real.amax((0, 2)))
    scale, _ = heads.qparams(torch.float32)
    assert scale.shape == (3, 1, 1)
    assert torch.allclose(scale.flatten(), real.abs().amax((0, 2)) / 448)


def test_the_global_scale_of_nvfp4_is_a_divisor() -> None:
    assert NVFP4 is not None
    found = statistic(spec=NVFP4)
    x = normal(1, 32, 16)
    found.update(x, everything(x))
    assert float(found.global_scale()) == pytest.approx(448 * 6 / float(x.abs().max()))


# --- clipped ranges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_a_percentile_cuts_the_same_share_from_both_ends(percentile: float) -> None:
    x = heavy_tailed()
    found = statistic("percentile", percentile=percentile)
    for part in x.split(500, dim=1):
        found.update(part, everything(part))
    low, high = range_of(found)
    share = percentile / 100
    assert high == pytest.approx(float(x.quantile(share)), rel=0.02)  # a bin is 1.1% wide
    assert low == pytest.approx(float(x.quantile(1 - share)), rel=0.02)
    assert low > float(x.min())
    assert high < float(x.max())


def test_the_hundredth_percentile_is_the_whole_range_within_a_bin() -> None:
    x = heavy_tailed()
    found = statistic("percentile", percentile=100.0)
    found.update(x, everything(x))
    assert range_of(found) == pytest.approx((float(x.min()), float(x.max())), rel=0.012)


def error(x: Tensor, found: Statistic) -> float:
    """The squared error of quantizing `x` with what an observer found."""
    spec = found.observer.spec
    if spec.is_nvfp4:
        rounded = fake_quantize(x, spec, global_scale=found.global_scale())
    else:
        scale, zero = found.qparams(torch.float32)
        rounded = fake_quantize(x, spec, scale=scale, zero_point=zero)
    return float((rounded - x).double().square().sum())


@pytest.mark.parametrize("spec", [INT4, INT8_ASYM, INT8], ids=lambda spec: spec.short)
def test_the_range_of_least_squared_error_beats_the_whole_range_and_fixed_percentiles(spec: QuantSpec) -> None:
    x = torch.cat([normal(1, 2000, 16), torch.full((1, 1, 16), 30.0)], dim=1)  # one token of outliers
    observers = {
        "minmax": statistic(spec=spec),
        "mse": statistic("mse", spec),
        "percentile": statistic("percentile", spec, percentile=99.0),
    }
    for found in observers.values():
        found.update(x, everything(x))
    errors = {kind: error(x, found) for kind, found in observers.items()}
    assert errors["mse"] <= errors["minmax"]
    assert errors["mse"] <= errors["percentile"]
    if spec is INT4:
        assert errors["mse"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("x", [heavy_tailed(), normal(1, 4000, 16)], ids=["outliers", "normal"])
def test_nvfp4_clips_nothing_for_a_smaller_error(x: Tensor) -> None:
    """Each group has a scale of its own: a global scale for a part of the range serves no group better."""
    assert NVFP4 is not None
    whole, found = statistic(spec=NVFP4), statistic("mse", NVFP4)
    for each in (whole, found):
        each.update(x, everything(x))
    assert error(x, found) == error(x, whole)
    for factor in (0.5, 0.75, 0.9):
        rounded = fake_quantize(x, NVFP4, global_scale=nvfp4_global_scale(x.abs().max() * factor))
        assert float((rounded - x).double().square().sum()) > 0.999 * error(x, whole)


def test_clipping_pays_for_the_small_values_where_outliers_are_few() -> None:
    """A percentile gives up the outliers, and rounds everything else more finely."""
    x = torch.cat([normal(1, 2000, 16), torch.full((1, 1, 16), 300.0)], dim=1)
    whole, clipped = statistic(spec=INT8), statistic("percentile", INT8, percentile=99.9)
    for found in (whole, clipped):
        found.update(x, everything(x))
    bulk = x[:, :2000]
    assert error(bulk, clipped) < 0.01 * error(bulk, whole)
    assert error(x, clipped) > error(x, whole)


@pytest.mark.parametrize("spec", [INT8, FP8], ids=lambda spec: spec.short)
def test_the_least_error_of_a_flat_distribution_is_near_the_whole_range(spec: QuantSpec) -> None:
    x = torch.linspace(-3, 5, 16_000).reshape(1, 1000, 16)
    found = statistic("mse", spec)
    found.update(x, everything(x))
    low, high = range_of(found)
    assert max(-low, high) == pytest.approx(5, rel=0.1 if spec is INT8 else 0.6)
    whole = statistic(spec=spec)
    whole.update(x, everything(x))
    assert error(x, found) <= 1.01 * error(x, whole)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([FP8, INT8, INT8_ASYM, INT4]),
    st.sampled_from(["minmax", "mse", "percentile"]),
    st.integers(0, 10_000),
    st.integers(-20, 10),
)
def test_the_order_of_batches_does_not_matter_and_a_range_is_never_widened(
    spec: QuantSpec, kind: Any, seed: int, exponent: int
) -> None:
    parts = [normal(2, 3 + i, 8, seed=seed + i) * 2.0**exponent for i in range(3)]
    forwards, backwards, whole = statistic(kind, spec), statistic(kind, spec), statistic(spec=spec)
    for part in parts:
        forwards.update(part, everything(part))
        whole.update(part, everything(part))
    for part in reversed(parts):
        backwards.update(part, everything(part))
    assert range_of(forwards) == range_of(backwards)
    (low, high), (least, most) = range_of(forwards), range_of(whole)
    assert least <= low <= 0 <= high <= most


def test_the_global_scale_of_clipped_nvfp4_is_larger() -> None:
    assert NVFP4 is not None
    x = heavy_tailed()
    clipped = statistic("percentile", NVFP4, percentile=99.0)
    clipped.update(x, everything(x))
    assert float(clipped.global_scale()) > 1.2 * float(nvfp4_global_scale(x.abs().max()))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_no_numbers_are_refused_with_their_reader(bad: float) -> None:
    x = normal(1, 4, 8)
    x[0, 2, 5] = bad
    with pytest.raises(DataError, match=r"NaN or infinite activations enter some.linear"):
        statistic().update(x, everything(x))


def test_padding_may_be_anything() -> None:
    x = normal(1, 4, 8)
    x[0, 3] = float("nan")
    found = statistic()
    found.update(x, torch.tensor([[True, True, True, False]]))
    assert range_of(found) == (float(x[0, :3].min()), float(x[0, :3].max()))


def test_what_no_token_reached_has_no_range() -> None:
    found = statistic()
    found.update(normal(1, 2, 8), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(DataError, match=r"no calibration token reached some.linear"):
        found.range()
