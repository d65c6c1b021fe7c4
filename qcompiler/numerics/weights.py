"""Weights to codes and back, piece by piece: memory beyond the result is a few pieces, whatever the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcompiler.numerics.elements import code_dtype, decode, round_to_codes, round_to_values
from qcompiler.numerics.loss import Loss
from qcompiler.numerics.scales import nvfp4_global_scale, qparams, scale_value
from qcompiler.numerics.tensor import Piece, QuantizedTensor, pieces, scale_shape
from qcompiler.scheme import QuantSpec, Strategy

ScaleSearch = Literal["minmax", "mse"]

# A float32 without its sign. Magnitudes order as the integers of their bits, NaN above infinity above all numbers, and
# integers reduce several times faster.
_MAGNITUDE = 0x7FFFFFFF
_SQUARED_SAFELY = 32  # squares of 2**-32, and of errors of 2**-31 of that, are normal numbers
_EXPONENTS = 126  # of normal powers of two, and of their reciprocals
_INTEGER_RANGES = {
    2: (0.4, 1.0),
    3: (0.56, 1.0),
    4: (0.72, 1.0),
    5: (0.88, 1.04),
    6: (0.94, 1.04),
    7: (0.96, 1.02),
    8: (0.97, 1.02),
}


def quantize_weight(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scales: ScaleSearch = "minmax",
    scale_dtype: torch.dtype,
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """Round a weight [O, I] to nearest (ties to even) with scales that are already rounded to their on-disk dtype.

    `scales="minmax"` covers each range; `"mse"` takes of `range_factors` the one with the least squared error. As 1 is
    one of them, that is never worse. `global_scale` is NVFP4's (float32 [1]; by default this tensor's own).

    `importance` (float32) says what `"mse"` takes an error to be. [I], the mean square of each input: squared errors
    are weighted by it. [I, I], the Hessian X^T X of the inputs: the squared error of the output as far as the inputs
    that share a scale make it, that is, their block of the Hessian, as AWQ (Lin et al. 2023) chooses where to clip.

    Raises `ValueError` on NaN or infinite values, `LegalityError` if the group size does not divide I.
    """
    if importance is not None and scales != "mse":
        raise ValueError("importance weighs the errors of scales='mse'")
    shape = (weight.shape[0], weight.shape[1])
    if spec.is_nvfp4 and global_scale is None:
        global_scale = nvfp4_global_scale(weight_amax(weight))
    if spec.is_nvfp4 or spec.is_mx:
        scale_dtype = torch.float8_e4m3fn if spec.is_nvfp4 else torch.uint8
    scale = torch.empty(scale_shape(spec, *shape), dtype=scale_dtype, device=weight.device)
    zero = None if spec.symmetric else torch.empty_like(scale, dtype=torch.int8)
    codes = torch.empty(shape, dtype=code_dtype(spec), device=weight.device)
    window = _Window(weight, spec, global_scale, Loss(importance))
    for band in _bands(weight, spec):
        low, high = window.range(band)
        factors = range_factors(spec) if scales == "mse" else (1.0,)
        choices = (
            qparams(low * f, high * f, spec, scale_dtype=scale_dtype, global_scale=global_scale) for f in factors
        )
        band_scale, band_zero = next(choices) if len(factors) == 1 else window.best(band, choices)
        for piece in band:
            piece.grid(scale).copy_(band_scale)
            if zero is not None and band_zero is not None:
                piece.grid(zero).copy_(band_zero)
            piece.elements(codes).copy_(round_to_codes(window.scaled(piece, band_scale, band_zero), spec))
    return QuantizedTensor(spec, shape, codes, scale, zero, global_scale)


def range_factors(spec: QuantSpec) -> tuple[float, ...]:
    """The grid of `scales="mse"`: factors on the min-max range, 1 first.

    Integers trade clipping for resolution, the more the fewer bits there are (as the mse observers of GPTQ and
    llm-compressor, which stop at 0.8); from 5 bits on a wider range pays too, as min-max clips half a step. For
    floats clipping never pays, but the phase of the range within an octave does: FP8 looks through one octave, NVFP4
    around 1 and around 1.5, where a group's largest value becomes 4 in place of 6 (Cook et al. 2025, "Four Over
    Six"). MX scales move by octaves. On trained and Gaussian weights errors stay within 2% of a grid of 66 points
    (FP8: within 10%).
    """
    if spec.is_mx:
        return (1.0, 0.5)
    if spec.is_nvfp4:
        return (1.0, 0.94, 1.06, 1.42, 1.5, 1.58)
    if spec.type == "float":
        return tuple(1 + i / 8 for i in range(8))
    lowest, highest = _INTEGER_RANGES[spec.bits]
    return (1.0, *(f for i in range(9) if (f := lowest + (highest - lowest) * i / 8) != 1.0))


def weight_amax(weight: Tensor) -> Tensor:
    """The largest magnitude in a weight (float32 [1]), NaN if it holds one."""
    integer, mask = (torch.int32, _MAGNITUDE) if weight.dtype == torch.float32 else (torch.int16, _MAGNITUDE >> 16)
    whole = QuantSpec(bits=8, strategy=Strategy.TENSOR)
    largest = torch.zeros(1, dtype=integer, device=weight.device)
    for piece in pieces(whole, (weight.shape[0], weight.shape[1]), weight.device):
        torch.maximum(largest, (piece.elements(weight).view(integer) & mask).amax(), out=largest)
    return largest.view(weight.dtype).to(torch.float32)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that Transformers computes with when the model's dtype is `dtype`, bit for bit.

    compressed-tensors casts codes and scales to the model's dtype first and multiplies there. Its FP4 and MX
    decompressors always work in bfloat16 (NVFP4's product is float32, then rounded to bfloat16): so does this.
    """
    spec = quantized.spec
    out = torch.empty(quantized.shape, dtype=dtype, device=quantized.codes.device)
    if spec.is_nvfp4 or spec.is_mx:
        scale = scale_value(quantized.scale, spec, quantized.global_scale)
    else:
        scale = quantized.scale.to(dtype)
    for piece in pieces(spec, quantized.shape, out.device):
        values = decode(piece.elements(quantized.codes), spec, scale.dtype)
        if quantized.zero_point is not None:
            values.sub_(piece.grid(quantized.zero_point))
        values.mul_(piece.grid(scale))
        piece.elements(out).copy_(values.to(torch.bfloat16) if spec.is_nvfp4 or spec.is_mx else values)
    return out


def multiplied_out(quantized: QuantizedTensor) -> Tensor:
    """The weight [O, I] that the codes and scales stand for, in float32, where no product is rounded."""
    spec = quantized.spec
    scale = scale_value(quantized.scale, spec, quantized.global_scale)
    out = torch.empty(quantized.shape, device=quantized.codes.device)
    for piece in pieces(spec, quantized.shape, out.device):
        piece.elements(out).copy_(_values(piece, quantized, scale))
    return out


def difference(weight: Tensor, quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Q - W, [O, I]: what `quantized` stands for (in float32) less the weight it came from, rounded to `dtype` once."""
    scale = scale_value(quantized.scale, quantized.spec, quantized.global_scale)
    out = torch.empty(quantized.shape, dtype=dtype, device=weight.device)
    for piece in pieces(quantized.spec, quantized.shape, out.device):
        piece.elements(out).copy_(_values(piece, quantized, scale).sub_(piece.elements(weight)))
    return out


def _values(piece: Piece, quantized: QuantizedTensor, scale: Tensor) -> Tensor:
    values = decode(piece.elements(quantized.codes), quantized.spec, torch.float32)
    if quantized.zero_point is not None:
        values.sub_(piece.grid(quantized.zero_point))
    return values.mul_(piece.grid(scale))


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far a quantized weight is from its original."""

    squared_error: float  # ||W - Q||^2
    squared_norm: float  # ||W||^2

    @property
    def relative(self) -> float:
        """||W - Q||^2 / ||W||^2, and 0 for an all-zero weight."""
        return self.squared_error / self.squared_norm if self.squared_norm else 0.0


def weight_error(weight: Tensor, quantized: QuantizedTensor) -> WeightError:
    """The error of `quantized` (multiplied out in float32) against the weight [O, I] it came from."""
    spec = quantized.spec
    scale = scale_value(quantized.scale, spec, quantized.global_scale)
    factor = _into_reach(weight_amax(weight).item())
    totals = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for piece in pieces(spec, quantized.shape, weight.device):
        original = piece.elements(weight).to(torch.float32)
        values = _values(piece, quantized, scale).sub_(original)
        if factor != 1:
            values, original = values * factor, original * factor
        totals += torch.stack([_sum_of_squares(values), _sum_of_squares(original)])
    error, norm = (total / factor**2 for total in totals.tolist())
    return WeightError(error, norm)


def _into_reach(amax: float) -> float:
    """A power of two that brings magnitudes to where float32 holds their squares, and those of small errors."""
    if not 0 < amax < math.inf:
        return 1.0
    exponent = math.frexp(amax)[1]
    return 1.0 if abs(exponent) <= _SQUARED_SAFELY else 2.0 ** -max(-_EXPONENTS, min(exponent, _EXPONENTS))


def _sum_of_squares(values: Tensor) -> Tensor:
    """Of a piece's elements, in float64. Float32 sums no further than a row: over a whole piece it is off by 2e-5."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(2), dim=2)
    return norms.to(torch.float64).square_().sum()


def _bands(weight: Tensor, spec: QuantSpec) -> Iterator[Sequence[Piece]]:
    """Pieces that share scales and so must be seen together: all for strategy tensor, else each alone."""
    cut = pieces(spec, (weight.shape[0], weight.shape[1]), weight.device)
    if spec.strategy is Strategy.TENSOR:
        yield list(cut)
    else:
        for piece in cut:
            yield [piece]


class _Window:
    """The piece of a weight under work, in float32, with scratch of the same size."""

    def __init__(self, weight: Tensor, spec: QuantSpec, global_scale: Tensor | None, loss: Loss) -> None:
        self._weight = weight
        self._spec = spec
        self._global_scale = global_scale
        self._loss = loss
        self._buffers = torch.empty((2, 0), device=weight.device)
        self._values = self._scratch = self._buffers[0]
        self._loaded: Piece | None = None

    def _load(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """(the piece's values, scratch of their shape): [tiles down, tile rows, tiles across, tile columns]."""
        if piece is not self._loaded:
            source = piece.elements(self._weight)
            if self._buffers.shape[1] < piece.numel:
                self._buffers = self._buffers.new_empty((2, piece.numel))
            self._values = self._buffers[0, : piece.numel].view(source.shape)
            self._scratch = self._buffers[1, : piece.numel].view(source.shape)
            self._values.copy_(source)
            self._loaded = piece
        return self._values, self._scratch

    def range(self, band: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """The lowest and highest value per tile; for symmetric codes, minus and plus the largest magnitude."""
        low, high = self._piece_range(band[0])
        for piece in band[1:]:
            other_low, other_high = self._piece_range(piece)
            low, high = torch.minimum(low, other_low), torch.maximum(high, other_high)
        return low, high

    def _piece_range(self, piece: Piece) -> tuple[Tensor, Tensor]:
        values, scratch = self._load(piece)
        if not self._spec.symmetric:
            return values.amin((1, 3), keepdim=True), values.amax((1, 3), keepdim=True)
        bits = torch.bitwise_and(values.view(torch.int32), _MAGNITUDE, out=scratch.view(torch.int32))
        high = bits.amax((1, 3), keepdim=True).view(torch.float32)
        return -high, high

    def scaled(self, piece: Piece, scale: Tensor, zero: Tensor | None) -> Tensor:
        """w / scale + zero point, in scratch."""
        values, scratch = self._load(piece)
        torch.div(values, scale_value(scale, self._spec, self._global_scale), out=scratch)
        return scratch if zero is None else scratch.add_(zero)

    def best(
        self, band: Sequence[Piece], choices: Iterator[tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """Per tile, the scale and zero point with the least error; the earlier one of equals."""
        scale, zero = next(choices)
        least = self._error(band, scale, zero)
        for other_scale, other_zero in choices:
            error = self._error(band, other_scale, other_zero)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, other_scale, scale)
            if zero is not None and other_zero is not None:
                zero = torch.where(better, other_zero, zero)
        return scale, zero

    def _error(self, band: Sequence[Piece], scale: Tensor, zero: Tensor | None) -> Tensor:
        """The error per tile."""
        value = scale_value(scale, self._spec, self._global_scale)
        total = torch.zeros_like(value)
        for piece in band:
            rounded = round_to_values(self.scaled(piece, scale, zero), self._spec)
            if zero is not None:
                rounded.sub_(zero)
            total += self._loss.per_tile(piece, rounded.mul_(value).sub_(self._load(piece)[0]))
        return total
