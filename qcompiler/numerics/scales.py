"""Scales and zero points from ranges, in the arithmetic of compressed-tensors' `calculate_qparams`.

A scale is rounded to its on-disk dtype here, before anything is computed from it: what is on disk then means exactly
the codes that were chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.numerics.elements import FP4_MAX, FP8, FP8_MAX, code_range
from qcompiler.scheme import QuantSpec

_FP8_SMALLEST = 2.0**-9  # E4M3's smallest subnormal


def nvfp4_global_scale(amax: Tensor) -> Tensor:
    """The divisor (float32 [1]) under which a tensor of largest magnitude `amax` uses all of the FP8 scales' range.

    448 * 6 / amax. Linears that a runtime fuses must share it: pass the largest amax of them. A zero `amax` gives 1.
    That of activations is the reciprocal of what ModelOpt calls the input scale.
    """
    amax = amax.to(torch.float32).reshape(1)
    scale = FP8_MAX * FP4_MAX / amax.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(scale.isfinite(), scale, 1.0)


def mx_exponent(amax: Tensor, bits: int) -> Tensor:
    """E8M0 exponents (biased by 127, int32) of MX groups with these largest magnitudes (float32).

    The power of two of `amax`, rounded up where its mantissa would round to 2 in the element format (from 1.75), less
    the exponent of the format's largest value (OCP Microscaling Formats 1.0, section 6.3, with that rounding).
    """
    largest = 2 if bits == 4 else 8
    exponent = (amax.contiguous().view(torch.int32) + (1 << 21)) >> 23
    return exponent.sub_(largest).clamp_(0, 254)


def scale_value(scale: Tensor, spec: QuantSpec, global_scale: Tensor | None = None) -> Tensor:
    """What a code is multiplied by (float32), from the scale as it lies on disk."""
    if spec.is_mx:
        exponent = scale.to(torch.int32)
        # An exponent field of 0 means a subnormal in float32, but 2^-127 in E8M0.
        return torch.where(exponent == 0, 2.0**-127, (exponent << 23).view(torch.float32))
    value = scale.to(torch.float32)
    return value / global_scale if global_scale is not None else value


def qparams(
    low: Tensor, high: Tensor, spec: QuantSpec, *, scale_dtype: torch.dtype, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """On-disk scale and int8 zero point (None if symmetric) of ranges [low, high] (float32, any shape).

    Zero is always representable. An integer range of 2^b steps is spread over the full width, so a symmetric scale is
    amax / (2^b - 1) * 2, as runtimes' own checkpoints have it. A scale that rounds to zero becomes a small positive
    number, so an all-zero range gets zero codes. `scale_dtype` is not used for NVFP4 (float8_e4m3fn) and MX (uint8).

    Raises `ValueError` if a range is not finite or its scale overflows `scale_dtype`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    code_low, code_high = code_range(spec)
    if not spec.symmetric:
        scale = _disk_scale((high - low) / (code_high - code_low), scale_dtype)
        zero = (code_low - low / scale.to(torch.float32)).round_().clamp_(code_low, code_high)
        return scale, zero.to(torch.int8)
    amax = torch.maximum(-low, high)
    if spec.is_mx:
        _check_finite(amax)
        return mx_exponent(amax, spec.bits).to(torch.uint8), None
    scale = amax / ((code_high - code_low) / 2)
    if spec.is_nvfp4:
        if global_scale is None:
            raise ValueError("NVFP4 scales need a global scale")
        _check_finite(scale)
        return (scale * global_scale).clamp_(_FP8_SMALLEST, FP8_MAX).to(FP8), None
    return _disk_scale(scale, scale_dtype), None


def static_qparams(
    amin: Tensor, amax: Tensor, spec: QuantSpec, *, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale (`scale_dtype`) and int8 zero point of a statically quantized activation from its observed range.

    Shapes follow `amin` and `amax`; a number becomes [1]. Per-head KV caches pass [heads, 1, 1].
    Raises `ValueError` if the range is not finite.
    """
    low, high = (t.to(torch.float32).reshape(t.shape or (1,)) for t in (amin, amax))
    return qparams(low, high, spec, scale_dtype=scale_dtype)


def _disk_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype)
    _check_finite(rounded)
    return torch.where(rounded == 0, torch.finfo(dtype).eps, rounded)


def _check_finite(scale: Tensor) -> None:
    if not scale.isfinite().all():
        raise ValueError("NaN or infinite values, or values whose scale overflows its dtype, cannot be quantized")
