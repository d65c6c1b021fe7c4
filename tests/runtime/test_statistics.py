"""What observers make of the tokens they see: ranges, clipped ranges, and what they refuse."""

from __future__ import annotations

from math import ceil
from typing import Any, Literal

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as library_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.ir.annotations import Observer
from qcompiler.numerics import fake_quantize, nvfp4_global_scale
from qcompiler.runtime.statistics import Statistic
from qcompiler.scheme import QuantSpec, Strategy, preset
from tests.numerics.library import library_args

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


def error(x: Tensor, found: Statistic, scale_dtype: torch.dtype = torch.float32) -> float:
    """The squared error of quantizing `x` with what an observer found."""
    spec = found.observer.spec
    if spec.is_nvfp4:
        rounded = fake_quantize(x, spec, global_scale=found.global_scale())
    else:
        scale, zero = found.qparams(scale_dtype)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", [INT8_ASYM, INT8, FP8], ids=lambda spec: spec.short)
def test_the_range_of_least_error_is_never_worse_than_the_whole_one_on_what_it_saw(
    spec: QuantSpec, dtype: torch.dtype
) -> None:
    """Few values, that steps of 8 bits are hardly wider than the bins of: chance decides, unless they are known."""
    for seed in range(20):
        x = (normal(1, 50, 16, seed=seed) * 3 + 5 * (seed % 3 - 1)).to(dtype)
        whole, least = statistic(spec=spec), statistic("mse", spec)
        for found in (whole, least):
            found.update(x, everything(x))
        assert error(x.float(), least, dtype) <= error(x.float(), whole, dtype) * (1 + 1e-6)


@pytest.mark.parametrize("x", [heavy_tailed(), normal(1, 4000, 16)], ids=["outliers", "normal"])
def test_no_narrower_global_scale_of_nvfp4_makes_the_error_smaller(x: Tensor) -> None:
    """Each group has a scale of its own: a global scale for a part of the range serves no group better."""
    assert NVFP4 is not None
    whole = statistic(spec=NVFP4)
    whole.update(x, everything(x))
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


# --- against the data themselves, per tensor and per head -----------------------------------------------------------

CACHED = normal(2, 3, 60, 16, seed=7)  # batch, heads, tokens, head size
CACHED *= torch.tensor([1.0, 30.0, 0.01])[:, None, None] * torch.where(normal(2, 1, 60, 1, seed=8) > 2, 9.0, 1.0)
PADDED = torch.ones(2, 60, dtype=torch.bool)
PADDED[1, 40:] = False


def rows_of(x: Tensor, spec: QuantSpec) -> list[Tensor]:
    """The real values that share a range."""
    real = x.transpose(1, 2)[PADDED]  # [tokens, heads, head size]
    return [real[:, head].flatten() for head in range(3)] if spec.strategy is Strategy.ATTN_HEAD else [real.flatten()]


def of_cache(kind: Kind, spec: QuantSpec, x: Tensor, percentile: float = 99.9) -> tuple[Tensor, Tensor]:
    """The range of keys, taken in batch by batch, with one end for each that shares one."""
    found = statistic(kind, spec, "key", percentile)
    for states, mask in zip(x.split(1), PADDED.split(1), strict=True):
        found.update(states, mask)
    low, high = found.range()
    assert low.shape == high.shape == ((3,) if spec.strategy is Strategy.ATTN_HEAD else ())
    return low.reshape(-1), high.reshape(-1)


def squared_error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> float:
    """Of quantizing `x` to a range as compressed-tensors does."""
    args = library_args(QuantSpec(type=spec.type, bits=spec.bits, symmetric=spec.symmetric, strategy=Strategy.TENSOR))
    scale, zero = calculate_qparams(low, high, args)
    return float((library_fake_quantize(x, scale, zero, args) - x).double().square().sum())


@pytest.mark.parametrize("spec", [FP8, PER_HEAD, INT8, INT4, INT8_ASYM], ids=lambda spec: spec.short)
def test_the_least_error_is_that_of_trying_every_range_on_the_data(spec: QuantSpec) -> None:
    x = CACHED.to(torch.bfloat16)  # whose values are counted as they are
    for row, low, high in zip(rows_of(x.float(), spec), *of_cache("mse", spec, x), strict=True):
        ends = [end.reshape(1) for end in torch.aminmax(row)]
        shrunk = [[end * (1 - step / 80) for end in ends] for step in range(80)]
        best = min(shrunk, key=lambda tried: squared_error(row, tried[0], tried[1], spec))
        assert [low, high] == best
        if spec is INT4:
            assert high < 0.8 * ends[1]


@pytest.mark.parametrize("spec", [FP8, PER_HEAD], ids=lambda spec: spec.short)
@pytest.mark.parametrize("percentile", [95.0, 99.9, 100.0])
def test_a_percentile_is_a_value_that_sorting_finds(spec: QuantSpec, percentile: float) -> None:
    x = CACHED.to(torch.bfloat16)
    for row, low, high in zip(rows_of(x.float(), spec), *of_cache("percentile", spec, x, percentile), strict=True):
        ordered = row.sort().values
        outside = int(len(ordered) * (1 - percentile / 100) + 1e-6)  # how many values are cut from the upper end
        assert high == ordered[-1 - outside]
        assert low == ordered[max(ceil(len(ordered) * (1 - percentile / 100) - 1e-6) - 1, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["minmax", "mse", "percentile"])
def test_each_head_has_the_range_that_it_has_alone(kind: Kind, dtype: torch.dtype) -> None:
    x = CACHED.to(dtype)
    ranges = of_cache(kind, PER_HEAD, x, 95.0)
    for head in range(3):
        alone = statistic(kind, FP8, "key", 95.0)
        alone.update(x[:, head : head + 1], PADDED)
        assert range_of(alone) == (float(ranges[0][head]), float(ranges[1][head]))


@pytest.mark.parametrize("kind", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("spec", [FP8, PER_HEAD], ids=lambda spec: spec.short)
def test_how_keys_lie_in_memory_does_not_matter(spec: QuantSpec, kind: Kind) -> None:
    heads_last = CACHED.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(of_cache(kind, spec, CACHED), of_cache(kind, spec, heads_last), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["mse", "percentile"])
def test_the_largest_magnitudes_and_zeros_have_ranges_too(kind: Kind) -> None:
    """Float32's largest number rounds to infinity in bfloat16."""
    x = torch.tensor([0.0, 1e-45, -2.0, torch.finfo(torch.float32).max]).reshape(1, 2, 2)
    found, zeros = statistic(kind, percentile=100.0), statistic(kind)
    found.update(x, everything(x))
    zeros.update(0 * x, everything(x))
    low, high = range_of(found)
    assert -2 <= low <= 0
    assert 0.9 * float(x.max()) < high <= float(x.max())
    assert range_of(zeros) == (0, 0)


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
