from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qcompiler.numerics.tensor as tensor_module
from qcompiler.errors import LegalityError
from qcompiler.numerics import (
    QuantizedTensor,
    ScaleSearch,
    WeightError,
    dequantize,
    nvfp4_global_scale,
    quantize_weight,
    range_factors,
    scale_shape,
    weight_amax,
    weight_error,
)
from qcompiler.numerics.elements import code_dtype, decode
from qcompiler.numerics.tensor import pieces
from qcompiler.scheme import QuantSpec, Strategy, preset
from tests.numerics.cases import WEIGHT_SPECS, integer
from tests.numerics.library import library_args

SEARCHES: tuple[ScaleSearch, ...] = ("minmax", "mse")
SHAPE = (40, 96)  # ragged for blocks of 16 x 24 and 128 x 128, whole for every group size


@pytest.fixture(params=list(WEIGHT_SPECS.values()), ids=list(WEIGHT_SPECS))
def spec(request: pytest.FixtureRequest) -> QuantSpec:
    found: QuantSpec = request.param
    return found


def sample(shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(dtype)


def tiles(weight: Tensor, spec: QuantSpec) -> list[Tensor]:
    """The sets of elements that share a scale, in the order of the scales, computed the slow way."""
    rows, columns = weight.shape
    match spec.strategy:
        case Strategy.TENSOR:
            height, width = rows, columns
        case Strategy.CHANNEL:
            height, width = 1, columns
        case Strategy.BLOCK:
            assert spec.block_structure is not None
            height, width = spec.block_structure
        case _:
            assert spec.group_size is not None
            height, width = 1, spec.group_size
    return [weight[i : i + height, j : j + width] for i in range(0, rows, height) for j in range(0, columns, width)]


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = ((a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point), (a.global_scale, b.global_scale))
    return all(x is y or (x is not None and y is not None and torch.equal(x.float(), y.float())) for x, y in pairs)


def test_codes_and_scales_have_the_dtypes_and_shapes_of_the_disk(spec: QuantSpec) -> None:
    q = quantize_weight(sample(), spec, scale_dtype=torch.bfloat16)
    special = {"uint8": torch.uint8, "float8_e4m3fn": torch.float8_e4m3fn, None: torch.bfloat16}
    assert (q.codes.dtype, q.codes.shape) == (code_dtype(spec), SHAPE)
    assert (q.scale.dtype, q.scale.shape) == (special[spec.scale_dtype], scale_shape(spec, *SHAPE))
    assert (q.zero_point is None) == spec.symmetric
    if q.zero_point is not None:
        assert (q.zero_point.dtype, q.zero_point.shape) == (torch.int8, q.scale.shape)
    assert (q.global_scale is not None) == spec.is_nvfp4


def test_min_max_scales_are_the_librarys(spec: QuantSpec) -> None:
    weight = sample(dtype=torch.float32)
    low = torch.stack([t.min() for t in tiles(weight, spec)])
    high = torch.stack([t.max() for t in tiles(weight, spec)])
    global_scale = generate_gparam(weight.min(), weight.max()) if spec.is_nvfp4 else None
    scale, zero = calculate_qparams(low, high, library_args(spec), global_scale=global_scale)
    q = quantize_weight(weight, spec, scale_dtype=torch.float32)
    ours = 2.0 ** (q.scale.float() - 127) if spec.is_mx else q.scale.float()
    assert torch.equal(ours.flatten(), scale.flatten())
    if q.zero_point is not None:
        assert torch.equal(q.zero_point.flatten(), zero.flatten())
    if global_scale is not None:
        assert q.global_scale is not None
        assert torch.equal(q.global_scale, global_scale)


def test_codes_are_the_librarys_for_the_same_scales(spec: QuantSpec) -> None:
    weight = sample(dtype=torch.float32)
    q = quantize_weight(weight, spec, scale_dtype=torch.float32)
    scale = 2.0 ** (q.scale.float() - 127) if spec.is_mx else q.scale.float()
    expected = quantize(weight, scale, q.zero_point, library_args(spec), global_scale=q.global_scale)
    assert torch.equal(decode(q.codes, spec, torch.float32), expected)


def test_codes_are_nearest_under_the_scale_that_is_written_not_the_one_before_rounding() -> None:
    weight = sample((64, 512))
    q = quantize_weight(weight, integer(8, Strategy.CHANNEL), scale_dtype=torch.bfloat16)
    nearest = (weight.double() / q.scale.double()).round().clamp(-128, 127)
    assert torch.equal(q.codes.double(), nearest)
    unrounded = weight.float().abs().amax(1, keepdim=True) / 127.5
    assert not torch.equal(q.codes.double(), (weight.double() / unrounded.double()).round().clamp(-128, 127))


@pytest.mark.parametrize("scales", SEARCHES)
def test_small_pieces_give_what_one_piece_gives(
    spec: QuantSpec, scales: ScaleSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = sample()
    whole = quantize_weight(weight, spec, scales=scales, scale_dtype=torch.bfloat16)
    error = weight_error(weight, whole)
    monkeypatch.setattr(tensor_module, "_CPU_ELEMENTS", 100)
    cut = quantize_weight(weight, spec, scales=scales, scale_dtype=torch.bfloat16)
    assert same(cut, whole)
    assert torch.equal(dequantize(cut, torch.bfloat16), dequantize(whole, torch.bfloat16))
    assert weight_error(weight, cut).relative == pytest.approx(error.relative, rel=1e-5)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20))
def test_pieces_of_blocks_cover_every_element_once(rows: int, columns: int, height: int, width: int) -> None:
    spec = QuantSpec(bits=8, strategy=Strategy.BLOCK, block_structure=(height, width))
    seen = torch.zeros(rows, columns)
    scale = torch.arange(-(-rows // height) * -(-columns // width)).view(-(-rows // height), -1)
    owner = torch.empty(rows, columns, dtype=torch.long)
    for piece in pieces(spec, (rows, columns), torch.device("cpu")):
        piece.elements(seen).add_(1)
        piece.elements(owner).copy_(piece.grid(scale))
    assert (seen == 1).all()
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    assert torch.equal(owner, scale[i // height, j // width])


def test_mse_is_never_worse_than_min_max_in_any_tile(spec: QuantSpec) -> None:
    weight = sample(dtype=torch.float32, seed=3)
    errors = {}
    for scales in SEARCHES:
        q = quantize_weight(weight, spec, scales=scales, scale_dtype=torch.float32)
        difference = dequantize_exactly(q) - weight.double()
        errors[scales] = torch.stack([t.square().sum() for t in tiles(difference, spec)])
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    if spec.type == "int":
        assert errors["mse"].sum() < errors["minmax"].sum()


def dequantize_exactly(q: QuantizedTensor) -> Tensor:
    """An independent dequantizer in float64, tile by tile."""
    scale = 2.0 ** (q.scale.double() - 127) if q.spec.is_mx else q.scale.double()
    if q.global_scale is not None:
        scale = scale / q.global_scale.double()
    values = decode(q.codes, q.spec, torch.float32).double()
    zeros = torch.zeros_like(scale) if q.zero_point is None else q.zero_point.double()
    for tile, s, z in zip(tiles(values, q.spec), scale.flatten(), zeros.flatten(), strict=True):
        tile.sub_(z).mul_(s)
    return values


def test_mse_tries_min_max_first(spec: QuantSpec) -> None:
    factors = range_factors(spec)
    assert factors[0] == 1
    assert len(set(factors)) == len(factors)


def test_mse_of_four_bits_beats_min_max_by_a_tenth_on_gaussian_weights() -> None:
    weight = sample((64, 1024))
    for name in ("W4A16", "NVFP4"):
        spec = preset(name).weights
        minmax, mse = (
            weight_error(weight, quantize_weight(weight, spec, scales=s, scale_dtype=torch.bfloat16)).relative
            for s in SEARCHES
        )
        assert mse < 0.9 * minmax


@pytest.mark.parametrize("scales", SEARCHES)
def test_zero_rows_have_finite_scales_and_decode_to_zero(spec: QuantSpec, scales: ScaleSearch) -> None:
    weight = sample()
    weight[:32] = 0
    for w in (weight, torch.zeros(SHAPE)):
        q = quantize_weight(w, spec, scales=scales, scale_dtype=torch.bfloat16)
        restored = dequantize(q, torch.bfloat16)
        assert restored.isfinite().all()
        assert q.scale.float().isfinite().all()
        assert (restored[w == 0] == 0).all()
        if q.zero_point is None:
            assert (decode(q.codes, spec, torch.float32)[w == 0] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_that_is_not_finite_is_refused(spec: QuantSpec, bad: float, dtype: torch.dtype) -> None:
    weight = sample(dtype=dtype)
    weight[33, 70] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(weight, spec, scale_dtype=torch.bfloat16)


def test_a_scale_that_overflows_its_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="overflows"):
        quantize_weight(sample(dtype=torch.float32) * 1e9, integer(4, Strategy.CHANNEL), scale_dtype=torch.float16)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(LegalityError, match="100 input features are not divisible by group_size 32"):
        quantize_weight(torch.ones(4, 100), integer(4, Strategy.GROUP), scale_dtype=torch.bfloat16)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(WEIGHT_SPECS)),
    st.integers(1, 20),
    st.integers(1, 4),
    st.floats(1e-6, 1e3),
    st.integers(0, 10**6),
)
def test_quantizing_again_what_was_dequantized_changes_little(
    name: str, rows: int, groups: int, magnitude: float, seed: int
) -> None:
    spec = WEIGHT_SPECS[name]
    weight = sample((rows, 96 * groups), torch.float32, seed) * magnitude
    q = quantize_weight(weight, spec, scale_dtype=torch.float32)
    restored = dequantize_exactly(q).float()
    steps = {2: 1.0, 3: 0.3, 4: 0.16, 5: 0.07, 8: 0.07}[spec.bits]
    for original, found in zip(tiles(weight, spec), tiles(restored, spec), strict=True):
        reach = (
            original.max().clamp(min=0) - original.min().clamp(max=0)
            if not spec.symmetric
            else 2 * original.abs().max()
        )
        assert (original - found).abs().max() <= steps * reach + 1e-12


def test_fused_weights_share_the_global_scale_of_the_largest() -> None:
    small, large = sample(), sample(seed=1) * 8
    shared = nvfp4_global_scale(torch.maximum(weight_amax(small), weight_amax(large)))
    spec = preset("NVFP4").weights
    first, second = (quantize_weight(w, spec, scale_dtype=torch.bfloat16, global_scale=shared) for w in (small, large))
    assert first.global_scale is second.global_scale
    assert weight_error(small, first).relative < 0.02
    assert torch.equal(shared, 448 * 6 / large.abs().max().float().reshape(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_amax_is_the_largest_magnitude_and_shows_nan(dtype: torch.dtype) -> None:
    weight = sample(dtype=dtype)
    assert weight_amax(weight) == weight.abs().max()
    weight[5, 5] = float("nan")
    assert weight_amax(weight).isnan().all()


def test_error_is_the_squared_distance_over_the_squared_norm(spec: QuantSpec) -> None:
    weight = sample()
    q = quantize_weight(weight, spec, scale_dtype=torch.bfloat16)
    distance = (dequantize_exactly(q) - weight.double()).square().sum() / weight.double().square().sum()
    assert weight_error(weight, q).relative == pytest.approx(distance.item(), rel=1e-4)


@pytest.mark.parametrize("magnitude", [2.0**-100, 1e-21, 2.0**-33, 2.0**-31, 1e15, 2.0**100])
def test_errors_of_weights_whose_squares_float32_does_not_hold_are_those_of_float64(magnitude: float) -> None:
    weight = sample(dtype=torch.float32) * magnitude
    q = quantize_weight(weight, preset("W8A8").weights, scale_dtype=torch.float32)
    size = weight.double().square().sum()
    distance = (dequantize_exactly(q) - weight.double()).square().sum()
    found = weight_error(weight, q)
    assert found.squared_norm == pytest.approx(size.item(), rel=1e-6)
    assert found.relative == pytest.approx((distance / size).item(), rel=1e-4)


def test_a_weight_that_no_scale_can_hold_is_lost_and_said_to_be() -> None:
    weight = torch.full((8, 128), 1e-43)
    q = quantize_weight(weight, preset("W8A8").weights, scale_dtype=torch.bfloat16)
    assert dequantize_exactly(q).count_nonzero() == 0
    assert weight_error(weight, q).relative == 1


def test_a_factor_that_brings_weights_into_reach_changes_no_bit_of_their_error() -> None:
    """Nor does it change the weight, which may be float32 and so not a copy."""
    weight, factor = sample(dtype=torch.float32), 2.0**-50
    tiny = weight * factor
    before = tiny.clone()
    one, other = (
        weight_error(w, quantize_weight(w, preset("W8A8").weights, scale_dtype=torch.float32)) for w in (weight, tiny)
    )
    assert torch.equal(tiny, before)
    assert (other.squared_error / factor**2, other.squared_norm / factor**2) == (one.squared_error, one.squared_norm)


def test_sums_over_a_large_weight_do_not_drift() -> None:
    """Float32 alone is off by 2e-5 here; `verify` compares errors to 1e-6."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    q = quantize_weight(weight, preset("W4A16").weights, scale_dtype=torch.bfloat16)
    assert weight_error(weight, q).squared_norm == pytest.approx(weight.double().square().sum().item(), rel=1e-7)


def test_an_all_zero_weight_has_no_relative_error() -> None:
    assert WeightError(0.0, 0.0).relative == 0


def test_scratch_memory_does_not_grow_with_the_weight() -> None:
    sizes = [
        sum(p.numel for p in list(pieces(preset(n).weights, (8192, 53248), torch.device("cpu")))[:1])
        for n in ("W4A16", "FP8_BLOCK", "FP8", "W8A8")
    ]
    assert max(sizes) * 4 * 2 <= 32 * 2**20
