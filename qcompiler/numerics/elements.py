"""The numbers that a code can stand for: ranges, rounding to the nearest, and decoding.

Integers are two's complement. FP8 is E4M3FN. FP4 is E2M1, held as 4-bit codes whose bit 3 is the sign and whose
magnitudes are {0, .5, 1, 1.5, 2, 3, 4, 6} (OCP Microscaling Formats 1.0, section 5.3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.scheme import QuantSpec

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FLOAT32_EXPONENT = 0x7F800000


def code_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype of one code per element: int8, float8_e4m3fn, or uint8 for FP4."""
    if spec.type == "int":
        return torch.int8
    return FP8 if spec.bits == 8 else torch.uint8


def code_range(spec: QuantSpec) -> tuple[float, float]:
    """The smallest and the largest value of a code, before scale and zero point."""
    if spec.type == "int":
        return -(2.0 ** (spec.bits - 1)), 2.0 ** (spec.bits - 1) - 1
    largest = FP8_MAX if spec.bits == 8 else FP4_MAX
    return -largest, largest


def _round_float(x: Tensor, bits: int) -> Tensor:
    """The E2M1 (4 bits) or E4M3 (8) value nearest to each float32, ties to even, saturated. Overwrites `x`.

    A format with m mantissa bits has steps of p / 2^m, p the power of two below the magnitude (at least the smallest
    normal number). Adding and subtracting 1.5 * 2^(23 - m) * p makes float32's own addition round to that step.
    """
    largest, smallest_normal, mantissa = (FP8_MAX, 2.0**-6, 3) if bits == 8 else (FP4_MAX, 1.0, 1)
    x.clamp_(-largest, largest)
    magic = x.abs().clamp_(min=smallest_normal)
    magic.view(torch.int32).bitwise_and_(_FLOAT32_EXPONENT)
    magic.mul_(1.5 * 2 ** (23 - mantissa))
    return x.add_(magic).sub_(magic)


def _fp4_codes(values: Tensor) -> Tensor:
    """4-bit codes (uint8) of exact E2M1 values, which are overwritten: a concave map, the least of three pieces."""
    doubled = values.mul_(2).to(torch.int8)
    magnitude = doubled.abs()
    code = torch.minimum(magnitude, torch.minimum((magnitude >> 1) + 2, (magnitude >> 2) + 4))
    return code.bitwise_or_((doubled >> 4).bitwise_and_(8)).view(torch.uint8)


def round_to_codes(scaled: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of already scaled (and shifted) float32 values, saturated; overwrites `scaled`, which may be returned.

    Integers come back as floats holding integers, so that the caller's copy is the only conversion.
    """
    low, high = code_range(spec)
    if spec.type == "int":
        return scaled.round_().clamp_(low, high)
    if spec.bits == 8:
        return scaled.clamp_(low, high).to(FP8)
    return _fp4_codes(_round_float(scaled, 4))


def round_to_values(scaled: Tensor, spec: QuantSpec) -> Tensor:
    """The values (in the dtype of `scaled`) of the codes that `round_to_codes` would give; overwrites `scaled`."""
    if spec.type == "int":
        return round_to_codes(scaled, spec)
    return _round_float(scaled.to(torch.float32), spec.bits).to(scaled.dtype)


def decode(codes: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """The values of codes, exactly (bfloat16, float16 and float32 hold all of them)."""
    if spec.type == "int":
        return codes.to(dtype)
    # A table: several times faster on CPU than the conversion from float8, which is not vectorized there.
    if spec.bits == 8:
        table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(FP8).to(dtype)
    else:
        table = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], dtype=dtype, device=codes.device)
    return table.index_select(0, codes.view(torch.uint8).flatten().to(torch.int32)).view(codes.shape)
