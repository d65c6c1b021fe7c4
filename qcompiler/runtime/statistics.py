"""Statistics that observers collect over calibration data: ranges, and a histogram where the range is to be clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.ir.annotations import Observer
from qcompiler.numerics import fake_quantize, nvfp4_global_scale, static_qparams
from qcompiler.scheme import Strategy

_OCTAVES = 48  # magnitudes from 2^-24 to 2^24; what lies outside goes to the nearest bin
_PER_OCTAVE = 64  # a bin is 1.1% wide
_BINS = _OCTAVES * _PER_OCTAVE
_SHRINKS = 80


class Statistic:
    """The range of one observed tensor over all real tokens, per tensor or per head.

    `percentile` and `mse` also keep counts of magnitudes in logarithmic bins, negative and positive apart, whose edges
    do not depend on the data: updates commute, and two statistics could be added.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.tokens = 0
        # NVFP4's global scale only places the scales of its groups: a narrower one clips groups, and refines none.
        self._kind = "minmax" if observer.kind == "mse" and observer.spec.is_nvfp4 else observer.kind
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._counts: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Take in `x` where `mask` (bool [B, S]) is true.

        `x` is [B, S, ...], [B * S, ...] or, for keys and values, [B, H, S, D].

        Raises `DataError` on NaN or infinity.
        """
        per_head = self.observer.purpose != "input"
        tokens = x.transpose(1, 2).flatten(0, 1) if per_head else x.reshape(mask.numel(), -1)
        if not bool(mask.all()):
            tokens = tokens[mask.flatten().to(tokens.device)]
        if tokens.numel() == 0:
            return
        keep_heads = per_head and self.observer.spec.strategy is Strategy.ATTN_HEAD
        low, high = torch.aminmax(tokens.transpose(0, 1).flatten(1), dim=1) if keep_heads else torch.aminmax(tokens)
        low, high = low.float(), high.float()
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError(
                f"NaN or infinite activations enter {', '.join(self.observer.consumers)} during calibration",
                hint="check the weights and the dtype: float16 overflows where bfloat16 does not",
            )
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self.tokens += tokens.shape[0]
        if self._kind != "minmax":
            self._count(tokens)

    def _count(self, tokens: Tensor) -> None:
        values = tokens.float().flatten()
        bins = ((values.abs().clamp_min(1e-38).log2() + _OCTAVES / 2) * _PER_OCTAVE).floor().clamp_(0, _BINS - 1).long()
        bins += (values > 0) * _BINS
        counts = torch.bincount(bins, minlength=2 * _BINS).double()
        self._counts = counts if self._counts is None else self._counts + counts

    def range(self) -> tuple[Tensor, Tensor]:
        """The range to quantize to, float32, a number or [heads]; zero lies in it.

        Raises `DataError` where no token ever came by.
        """
        if self._low is None or self._high is None:
            raise DataError(
                f"no calibration token reached {', '.join(self.observer.consumers)}: its range is unknown",
                hint="use more calibration data, or a scheme whose activations are quantized dynamically",
            )
        low, high = self._low.clamp_max(0), self._high.clamp_min(0)
        if self._kind == "percentile":
            low, high = self._percentiles(low, high)
        elif self._kind == "mse":
            low, high = self._least_error(low, high)
        return low, high

    def replace(self, low: Tensor, high: Tensor) -> None:
        """Become the statistic of a tensor with another range, of which nothing else is known."""
        assert self._kind == "minmax", "a histogram cannot follow"
        self._low, self._high = low, high

    def qparams(self, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Static scale ([1] or [heads, 1, 1], `scale_dtype`) and zero point (int8, asymmetric only)."""
        low, high = self.range()
        if low.dim():
            low, high = low.reshape(-1, 1, 1), high.reshape(-1, 1, 1)
        return static_qparams(low, high, self.observer.spec, scale_dtype=scale_dtype)

    def global_scale(self) -> Tensor:
        """NVFP4's input global scale, float32 [1]."""
        low, high = self.range()
        return nvfp4_global_scale(torch.maximum(-low, high))

    def _values(self) -> tuple[Tensor, Tensor]:
        """Bin centres from the most negative to the most positive, and their counts."""
        assert self._counts is not None
        centres = torch.exp2((torch.arange(_BINS, device=self._counts.device) + 0.5) / _PER_OCTAVE - _OCTAVES / 2)
        negative, positive = self._counts.reshape(2, _BINS)
        return torch.cat([-centres.flip(0), centres]), torch.cat([negative.flip(0), positive])

    def _percentiles(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        values, counts = self._values()
        share = counts.cumsum(0) / counts.sum()
        upper = self.observer.percentile / 100
        first = values[int((share >= 1 - upper).nonzero()[0])].float()
        last = values[int((share >= upper).nonzero()[0])].float()
        return torch.maximum(low, first.clamp_max(0)), torch.minimum(high, last.clamp_min(0))

    def _least_error(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Of ranges shrunk step by step, the one with the least expected squared error over the histogram."""
        values, counts = self._values()
        used = counts > 0
        values, counts = values[used].float(), counts[used].float()
        best, least = 1.0, torch.tensor(float("inf"))
        for step in range(_SHRINKS):
            factor = 1 - step / _SHRINKS
            scale, zero = static_qparams(low * factor, high * factor, self.observer.spec, scale_dtype=torch.float32)
            rounded = fake_quantize(values[None], self.observer.spec, scale=scale, zero_point=zero)[0]
            error = ((rounded - values).square() * counts).sum()
            if bool(error < least):
                best, least = factor, error
        return low * best, high * best
