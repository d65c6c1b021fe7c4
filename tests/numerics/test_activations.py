from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as library_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor
from torch.profiler import profile

from qcompiler.errors import ConfigError, LegalityError
from qcompiler.numerics import fake_quantize, nvfp4_global_scale, static_qparams
from qcompiler.scheme import QuantSpec, Strategy, preset
from tests.numerics.library import library_args

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DYNAMIC = {
    spec.short: spec
    for spec in (
        *(
            QuantSpec(bits=b, strategy=s, dynamic=True, symmetric=symmetric)
            for b in (4, 8)
            for s in (Strategy.TOKEN, Strategy.TENSOR)
            for symmetric in (True, False)
        ),
        QuantSpec(bits=8, strategy=Strategy.GROUP, group_size=32, dynamic=True),
        QuantSpec(type="float", bits=8, strategy=Strategy.TOKEN, dynamic=True),
        QuantSpec(type="float", bits=8, strategy=Strategy.TENSOR, dynamic=True),
        QuantSpec(type="float", bits=8, strategy=Strategy.GROUP, group_size=128, dynamic=True),
        *(s for s in (preset(n).input_activations for n in ("NVFP4", "MXFP4", "MXFP8")) if s is not None),
    )
}


def sample(dtype: torch.dtype, shape: tuple[int, ...] = (2, 5, 256)) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, shape[-1])
    x[..., 0, :] = 0  # a token of padding
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_activations_equal_the_librarys_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    spec, x = DYNAMIC[name], sample(dtype)
    args = library_args(spec)
    global_scale = nvfp4_global_scale(x.abs().max()) if spec.is_nvfp4 else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=global_scale)
    expected = library_fake_quantize(x, scale, zero, args, global_scale=global_scale)
    found = fake_quantize(x, spec, global_scale=global_scale)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert not torch.equal(found, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=8, strategy=Strategy.TENSOR),
        QuantSpec(bits=8, strategy=Strategy.TENSOR, symmetric=False),
        QuantSpec(type="float", bits=8, strategy=Strategy.TENSOR),
    ],
    ids=lambda s: s.short,
)
def test_static_activations_equal_the_librarys_bit_for_bit(spec: QuantSpec, dtype: torch.dtype) -> None:
    x, args = sample(dtype), library_args(spec)
    scale, zero = static_qparams(x.min(), x.max(), spec, scale_dtype=dtype)
    library_zero = torch.zeros(1, dtype=torch.int8) if zero is None else zero
    expected = library_fake_quantize(x, scale, library_zero, args)
    assert torch.equal(fake_quantize(x, spec, scale=scale, zero_point=zero), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_scale_and_zero_point_are_the_librarys(symmetric: bool) -> None:
    spec = QuantSpec(bits=8, strategy=Strategy.TENSOR, symmetric=symmetric)
    low, high = torch.tensor(-1.7), torch.tensor(3.1)
    scale, zero = static_qparams(low, high, spec, scale_dtype=torch.float32)
    expected_scale, expected_zero = calculate_qparams(low, high, library_args(spec))
    assert scale.shape == (1,)
    assert torch.equal(scale, expected_scale)
    assert (zero is None) == symmetric
    if zero is not None:
        assert torch.equal(zero, expected_zero)


def test_the_global_scale_is_the_librarys_and_is_one_where_nothing_was_seen() -> None:
    for amax in (torch.tensor(3.7), torch.tensor([12.0]), torch.tensor(0.0)):
        assert torch.equal(nvfp4_global_scale(amax), generate_gparam(-amax.reshape(1), amax.reshape(1)))
    assert nvfp4_global_scale(torch.tensor(0.0)).item() == 1


@pytest.mark.parametrize("strategy", [Strategy.TENSOR, Strategy.ATTN_HEAD])
def test_a_kv_cache_is_quantized_per_tensor_or_per_head(strategy: Strategy) -> None:
    spec = QuantSpec(type="float", bits=8, strategy=strategy)
    cache = sample(torch.bfloat16, (2, 4, 5, 64))
    shape = (4, 1, 1) if strategy is Strategy.ATTN_HEAD else (1,)
    amax = cache.abs().amax((0, 2, 3)).reshape(shape) if shape != (1,) else cache.abs().max()
    scale, _ = static_qparams(-amax, amax, spec, scale_dtype=torch.bfloat16)
    assert scale.shape == shape
    expected = library_fake_quantize(cache, scale, torch.zeros(1), library_args(spec))
    assert torch.equal(fake_quantize(cache, spec, scale=scale), expected)


def test_tokens_without_a_batch_still_have_a_scale_each() -> None:
    spec = QuantSpec(bits=8, strategy=Strategy.TOKEN, dynamic=True)
    x = sample(torch.float32)
    assert torch.equal(fake_quantize(x.flatten(0, 1), spec), fake_quantize(x, spec).flatten(0, 1))


def test_an_expert_that_got_no_token_is_left_alone() -> None:
    spec = QuantSpec(bits=8, strategy=Strategy.TENSOR, dynamic=True)
    assert fake_quantize(torch.empty(0, 64), spec).shape == (0, 64)


def test_the_input_is_not_overwritten() -> None:
    for spec in DYNAMIC.values():
        x = sample(torch.float32)
        before = x.clone()
        fake_quantize(x, spec, global_scale=torch.ones(1) if spec.is_nvfp4 else None)
        assert torch.equal(x, before), spec.short


def test_what_calibration_did_not_provide_is_an_error() -> None:
    x = torch.ones(1, 2, 32)
    with pytest.raises(ConfigError, match="need a scale and its zero point"):
        fake_quantize(x, QuantSpec(bits=8, strategy=Strategy.TENSOR))
    with pytest.raises(ConfigError, match="need a scale and its zero point"):
        fake_quantize(x, QuantSpec(bits=8, strategy=Strategy.TENSOR, symmetric=False), scale=torch.ones(1))
    with pytest.raises(ConfigError, match="global scale"):
        fake_quantize(x, DYNAMIC["nvfp4"])


def test_a_group_size_that_does_not_divide_the_features_is_an_error() -> None:
    with pytest.raises(LegalityError, match="100 features are not divisible by group_size 32"):
        fake_quantize(torch.ones(1, 2, 100), DYNAMIC["int8/g32/dynamic"])


@pytest.mark.parametrize("spec", DYNAMIC.values(), ids=lambda spec: spec.short)
def test_many_tokens_are_rounded_as_each_alone(spec: QuantSpec) -> None:
    x = sample(torch.bfloat16, (2, 1100, 1024))  # more than what is worked on at once
    x[1] *= 3
    global_scale = torch.full((1,), 20.0) if spec.is_nvfp4 else None
    found = fake_quantize(x, spec, global_scale=global_scale)
    if spec.strategy is Strategy.TENSOR:  # one scale for all: the library's
        scale, zero = compute_dynamic_scales_and_zp(x, library_args(spec), torch.nn.Module())
        assert torch.equal(found, library_fake_quantize(x, scale, zero, library_args(spec)))
        return
    for token in (0, 1, 1023, 1024, 1099):
        alone = fake_quantize(x[1:, token : token + 1], spec, global_scale=global_scale)
        assert torch.equal(found[1:, token : token + 1], alone)


def test_memory_beyond_the_result_does_not_grow_with_the_tokens() -> None:
    spec = QuantSpec(type="float", bits=8, strategy=Strategy.TENSOR)
    scale = torch.full((1,), 0.01)

    def largest(tokens: int) -> int:
        x = torch.ones(1, tokens, 1024, dtype=torch.bfloat16)
        with profile(profile_memory=True) as seen:
            fake_quantize(x, spec, scale=scale)
        sizes = sorted(int(event.cpu_memory_usage) for event in seen.events() if event.name == "[memory]")
        return sizes[-2]  # the last is the result

    assert largest(8192) == largest(4096) < 8 << 20
