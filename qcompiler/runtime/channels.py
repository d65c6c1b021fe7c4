"""What each input channel of a layer is like: its mean square, its mean magnitude and its range, over calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.ir.annotations import ChannelObserver
from qcompiler.runtime.tokens import not_finite, real_tokens, unreached


class ChannelStatistic:
    """Sums and ranges per channel over all real tokens; sums in float64, so the order of batches does not matter."""

    def __init__(self, observer: ChannelObserver) -> None:
        self.observer = observer
        self.tokens = 0
        self._sums: Tensor | None = None  # [2, I]: squares, magnitudes
        self._range: Tensor | None = None  # [2, I]: minus the lowest, the highest

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Take in `x` ([B, S, ..., I] or [B * S, I], any float dtype) where `mask` (bool [B, S]) is true.

        Raises `DataError` on NaN or infinity.
        """
        values = real_tokens(x, mask).float()
        if not len(values):
            return
        span = torch.stack([-values.amin(0), values.amax(0)])
        if not bool(span.isfinite().all()):
            raise not_finite(self.observer.consumers)
        self._range = span if self._range is None else torch.maximum(self._range, span)
        magnitudes = values.abs()
        total = magnitudes.sum(0)
        sums = torch.stack([magnitudes.square_().sum(0), total]).double()
        self._sums = sums if self._sums is None else self._sums + sums
        self.tokens += len(values)

    def mean_square(self) -> Tensor:
        """The mean of x_j^2, float32 [I]. Like all that follow, raises `DataError` where no token came by."""
        return (self._seen()[0][0] / self.tokens).float()

    def mean_abs(self) -> Tensor:
        """The mean of |x_j|, float32 [I]."""
        return (self._seen()[0][1] / self.tokens).float()

    def range(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest x_j, float32 [I] each."""
        low, high = self._seen()[1]
        return -low, high

    def amax(self) -> Tensor:
        """The largest |x_j|, float32 [I]."""
        return self._seen()[1].amax(0)

    def rescale(self, scale: Tensor) -> None:
        """Become the statistic of x / s, as inputs are once a producer took in the scale s (float32 [I], positive)."""
        sums, span = self._seen()
        self._sums = sums / torch.stack([scale.double().square(), scale.double()])
        self._range = span / scale

    def _seen(self) -> tuple[Tensor, Tensor]:
        if self._sums is None or self._range is None:
            raise unreached(self.observer.consumers, "use more calibration data, or ignore this layer")
        return self._sums, self._range
