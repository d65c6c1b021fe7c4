"""The Hessian of a layer's squared output error: X^T X over the inputs X [tokens, I] that calibration shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qcompiler.ir.annotations import HessianObserver
from qcompiler.runtime.tokens import not_finite, real_tokens, unreached

_BLOCK = 512
"""Columns that are multiplied at once: only blocks on and right of the diagonal are computed, and mirrored at last."""


class HessianStatistic:
    """X^T X over all real tokens, accumulated in float32."""

    def __init__(self, observer: HessianObserver) -> None:
        self.observer = observer
        self.tokens = 0
        self._half: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Take in `x` ([B, S, ..., I] or [B * S, I], any float dtype) where `mask` (bool [B, S]) is true.

        Raises `DataError` on NaN or infinity.
        """
        tokens = real_tokens(x, mask)
        if not len(tokens):
            return
        size = tokens.shape[1]
        if self._half is None:
            self._half = torch.zeros(size, size, device=x.device)
        values = tokens.float()
        with _narrow_products(tokens.dtype, tokens.device):
            for start in range(0, size, _BLOCK):
                rows = slice(start, min(start + _BLOCK, size))
                self._half[rows, start:].addmm_(values[:, rows].t(), values[:, start:])
        self.tokens += len(tokens)

    def value(self) -> Tensor:
        """X^T X, float32 [I, I]. Raises `DataError` where no token came by, or where the inputs were not finite."""
        upper = self._checked().triu()
        return upper.add_(upper.triu(1).t())

    def diagonal(self) -> Tensor:
        """The sum of squares of each input, float32 [I]. Raises as `value` does."""
        return self._checked().diagonal().clone()

    def rescale(self, scale: Tensor) -> None:
        """Become the statistic of X / s, as inputs are once a producer took in the scale s (float32 [I])."""
        self._checked().div_(scale.unsqueeze(1)).div_(scale)

    def _checked(self) -> Tensor:
        if self._half is None:
            raise unreached(self.observer.consumers, "use more calibration data, or solver rtn for it")
        if not bool(self._half.diagonal().isfinite().all()):
            raise not_finite(self.observer.consumers)
        return self._half


@contextmanager
def _narrow_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let the CPU's matrix unit take bfloat16 where the values are bfloat16: products are exact, sums are float32's.

    For as long as this lasts; the setting is torch's, and is put back.
    """
    if dtype is not torch.bfloat16 or device.type != "cpu":
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
