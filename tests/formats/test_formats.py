from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import CheckpointError, ConfigError, LegalityError
from qcompiler.formats import InputParams, layout, pack, unpack
from qcompiler.numerics import QuantizedTensor, dequantize, quantize_weight
from qcompiler.scheme import PRESETS, Format, QuantSpec, Scheme, Strategy, preset
from qcompiler.tensors import tensor_bytes
from tests.numerics.cases import STRATEGIES, WEIGHT_SPECS, integer
from tests.numerics.library import library_decompress

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKEN = QuantSpec(bits=8, strategy=Strategy.TOKEN, dynamic=True)
STATIC = QuantSpec(bits=8, strategy=Strategy.TENSOR)
STATIC_ASYMMETRIC = QuantSpec(bits=8, strategy=Strategy.TENSOR, symmetric=False)
FP8_TOKEN = QuantSpec(type="float", bits=8, strategy=Strategy.TOKEN, dynamic=True)
SCHEMES = {
    **PRESETS,
    **{f"free {spec.short}": Scheme(weights=spec) for spec in WEIGHT_SPECS.values()},
    **{
        f"free {w.short} with {a.short}": Scheme(weights=w, input_activations=a)
        for w in (integer(8, s, symmetric=sym) for s in STRATEGIES for sym in (True, False))
        for a in (TOKEN, STATIC, STATIC_ASYMMETRIC)
    },
    "fp8 group, token": Scheme(weights=WEIGHT_SPECS["fp8/g32"], input_activations=FP8_TOKEN),
    "mxfp4, fp8 token": Scheme(weights=preset("MXFP4").weights, input_activations=FP8_TOKEN),
    "int4, static": Scheme(weights=integer(4, Strategy.GROUP), input_activations=STATIC_ASYMMETRIC),
}
SHAPE = (40, 256)


@pytest.fixture(params=list(SCHEMES.values()), ids=list(SCHEMES))
def scheme(request: pytest.FixtureRequest) -> Scheme:
    found: Scheme = request.param
    return found


def quantized(scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int] = SHAPE, seed: int = 0) -> QuantizedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.02).add(0.004).to(dtype)
    return quantize_weight(weight, scheme.weights, scale_dtype=dtype)


def inputs(scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    spec = scheme.input_activations
    if spec is None or spec.dynamic is True:
        return {}
    if spec.is_nvfp4:
        return {"input_global_scale": torch.tensor([12.5])}
    scale = {"input_scale": torch.tensor([0.25], dtype=dtype)}
    return scale if spec.symmetric else scale | {"input_zero_point": torch.tensor([-3], dtype=torch.int8)}


def bitwise_equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_packed_is_what_the_layout_predicts(scheme: Scheme, dtype: torch.dtype) -> None:
    packed = pack(quantized(scheme, dtype), scheme, **inputs(scheme, dtype))
    predicted = layout(scheme, *SHAPE, dtype)
    assert list(packed) == list(predicted)
    for name, spec in predicted.items():
        tensor = packed[name]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, name
        assert tensor.nbytes == tensor_bytes(*spec), name
        assert tensor.is_contiguous(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_decompresses_to_our_dequantized_weight_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    q = quantized(scheme, dtype)
    found = library_decompress(pack(q, scheme, **inputs(scheme, dtype)), scheme)
    ours = dequantize(q, dtype)
    assert ours.dtype == dtype
    # The library's FP4 and MX decompressors answer in bfloat16, whatever the model.
    assert found.dtype == (torch.bfloat16 if q.spec.is_nvfp4 or q.spec.is_mx else dtype)
    assert torch.equal(found.to(dtype), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_wider_scales_are_cast_to_the_models_dtype_first_as_loaders_do(name: str, dtype: torch.dtype) -> None:
    scheme = preset(name)
    q = quantized(scheme, torch.float32)
    packed = pack(q, scheme)
    loaded = packed | {"weight_scale": packed["weight_scale"].to(dtype)}
    assert torch.equal(dequantize(q, dtype), library_decompress(loaded, scheme))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 70), st.integers(1, 3), st.integers(0, 999))
def test_unpacking_gives_back_what_was_packed(name: str, rows: int, groups: int, seed: int) -> None:
    scheme = SCHEMES[name]
    q = quantized(scheme, torch.bfloat16, (rows, 128 * groups), seed)
    given_inputs = inputs(scheme, torch.bfloat16)
    found, params = unpack(pack(q, scheme, **given_inputs), scheme)
    assert (found.spec, found.shape) == (q.spec, q.shape)
    assert all(
        bitwise_equal(getattr(found, f), getattr(q, f)) for f in ("codes", "scale", "zero_point", "global_scale")
    )
    assert all(
        bitwise_equal(getattr(params, f), given_inputs.get(f"input_{f}"))
        for f in ("scale", "zero_point", "global_scale")
    )


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(1, 130), st.booleans(), st.integers(0, 99))
def test_channel_weights_of_any_width_come_back(bits: int, rows: int, columns: int, symmetric: bool, seed: int) -> None:
    scheme = Scheme(weights=integer(bits, Strategy.CHANNEL, symmetric=symmetric))
    q = quantized(scheme, torch.float32, (rows, columns), seed)
    found, params = unpack(pack(q, scheme), scheme)
    assert params == InputParams()
    assert torch.equal(found.codes, q.codes)
    assert bitwise_equal(found.zero_point, q.zero_point)


def test_symmetric_schemes_write_no_zero_points(scheme: Scheme) -> None:
    names = layout(scheme, *SHAPE, torch.bfloat16)
    spec = scheme.input_activations
    assert ("weight_zero_point" in names) == (not scheme.weights.symmetric)
    assert ("input_zero_point" in names) == (spec is not None and spec.dynamic is False and not spec.symmetric)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W4A16", {"weight_packed": [40, 32], "weight_shape": [2], "weight_scale": [40, 2]}),
        ("W3A16", {"weight_packed": [40, 24], "weight_shape": [2], "weight_scale": [40, 2]}),
        ("W4A16_ASYM", {"weight_packed": [40, 32], "weight_shape": [2], "weight_scale": [40, 2],
                        "weight_zero_point": [5, 2]}),
        ("W8A8", {"weight": [40, 256], "weight_scale": [40, 1]}),
        ("FP8", {"weight": [40, 256], "weight_scale": [1], "input_scale": [1]}),
        ("FP8_DYNAMIC", {"weight": [40, 256], "weight_scale": [40, 1]}),
        ("FP8_BLOCK", {"weight": [40, 256], "weight_scale": [1, 2]}),
        ("NVFP4", {"weight_packed": [40, 128], "weight_scale": [40, 16], "weight_global_scale": [1],
                   "input_global_scale": [1]}),
        ("NVFP4A16", {"weight_packed": [40, 128], "weight_scale": [40, 16], "weight_global_scale": [1]}),
        ("MXFP4", {"weight_packed": [40, 128], "weight_scale": [40, 8]}),
        ("MXFP8", {"weight": [40, 256], "weight_scale": [40, 8]}),
    ],
)  # fmt: skip
def test_the_layout_of_presets(name: str, expected: dict[str, list[int]]) -> None:
    assert {n: list(shape) for n, (_, shape) in layout(preset(name), *SHAPE, torch.bfloat16).items()} == expected


def test_every_format_is_covered() -> None:
    assert {s.format for s in SCHEMES.values()} == set(Format) - {Format.MIXED_PRECISION, Format.DENSE}


def test_a_group_size_that_does_not_divide_has_no_layout() -> None:
    with pytest.raises(LegalityError, match="100 input features are not divisible by group_size 128"):
        layout(preset("W4A16"), 64, 100, torch.bfloat16)


def test_static_nvfp4_activations_have_no_layout() -> None:
    weights = preset("NVFP4").weights
    with pytest.raises(LegalityError, match="cannot be stored"):
        layout(Scheme(weights=weights, input_activations=weights), 64, 128, torch.bfloat16)


def test_packing_without_the_calibrated_scale_names_it() -> None:
    scheme = preset("FP8")
    with pytest.raises(ConfigError, match=r"input_scale is absent, expected bfloat16 \[1\]"):
        pack(quantized(scheme, torch.bfloat16), scheme)


def test_packing_under_another_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight_scale is bfloat16 \[40, 2\], expected bfloat16 \[40, 1\]"):
        pack(quantized(preset("W8A16"), torch.bfloat16), preset("W8A8"))


def test_a_damaged_checkpoint_names_the_tensor() -> None:
    scheme = preset("W4A16")
    good = pack(quantized(scheme, torch.bfloat16), scheme)
    with pytest.raises(CheckpointError, match=r"weight_packed is int32 \[39, 32\], expected int32 \[40, 32\]"):
        unpack({**good, "weight_packed": good["weight_packed"][:39]}, scheme)
    with pytest.raises(CheckpointError, match="no weight_shape"):
        unpack({k: v for k, v in good.items() if k != "weight_shape"}, scheme)
    with pytest.raises(CheckpointError, match=r"weight_zero_point is int32 \[1\], expected absent"):
        unpack({**good, "weight_zero_point": torch.zeros(1, dtype=torch.int32)}, scheme)
