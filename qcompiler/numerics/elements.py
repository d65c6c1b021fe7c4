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


def _fp4_magnitude(magnitude: Tensor) -> Tensor:
    """The E2M1 code (0..7, in the input's dtype) nearest to each magnitude in [0, 6], ties to the even code.

    E2M1 has steps of .5, 1 and 2 below 2, 4 and 6. Magnitude to code is thus concave and piecewise linear: the
    least of its three pieces, each rounded to the nearest even integer.
    """
    code = (magnitude * 2).round_()
    torch.minimum(code, magnitude.round().add_(2), out=code)
    return torch.minimum(code, (magnitude * 0.5).round_().add_(4), out=code)


def round_fp4(x: Tensor) -> Tensor:
    """The E2M1 value nearest to each element, ties to the even code; beyond 6 saturates. Keeps the dtype."""
    code = _fp4_magnitude(x.abs().clamp_(max=FP4_MAX))
    # The inverse is convex: the largest of the inverted pieces.
    value = torch.maximum(code * 0.5, code - 2)
    torch.maximum(value, code.mul_(2).sub_(8), out=value)
    return value.copysign_(x)


def fp4_codes(x: Tensor) -> Tensor:
    """4-bit E2M1 codes (uint8) nearest to each element, ties to the even code; beyond 6 saturates."""
    magnitude = _fp4_magnitude(x.abs().clamp_(max=FP4_MAX)).to(torch.uint8)
    return magnitude.bitwise_or_(torch.signbit(x).to(torch.uint8).bitwise_left_shift_(3))


def round_to_codes(scaled: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of already scaled (and shifted) values, saturated; overwrites `scaled`, which may be returned.

    Integers come back as floats holding integers, so that the caller's copy is the only conversion.
    """
    low, high = code_range(spec)
    if spec.type == "int":
        return scaled.round_().clamp_(low, high)
    if spec.bits == 8:
        return scaled.clamp_(low, high).to(FP8)
    return fp4_codes(scaled)


def round_to_values(scaled: Tensor, spec: QuantSpec) -> Tensor:
    """The values (in the dtype of `scaled`) of the codes that `round_to_codes` would give; overwrites `scaled`."""
    if spec.type == "float" and spec.bits == 4:
        return round_fp4(scaled)
    return decode(round_to_codes(scaled, spec), spec, scaled.dtype)


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
