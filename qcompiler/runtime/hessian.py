"""The Hessian of a layer's squared output error: X^T X over the inputs X [tokens, I] that calibration shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.ir.annotations import HessianObserver

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
        tokens = x.reshape(-1, x.shape[-1])
        if not bool(mask.all()):
            per_token = len(tokens) // mask.numel()  # more than one where a dimension stands between
            tokens = tokens.reshape(mask.numel(), per_token, -1)[mask.flatten().to(x.device)].flatten(0, 1)
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
        who = ", ".join(self.observer.consumers)
        if self._half is None:
            raise DataError(
                f"no calibration token reached {who}: its inputs are unknown",
                hint="use more calibration data, or solver rtn for it",
            )
        if not bool(self._half.diagonal().isfinite().all()):
            raise DataError(
                f"NaN or infinite activations enter {who} during calibration",
                hint="check the weights and the dtype: float16 overflows where bfloat16 does not",
            )
        upper = self._half.triu()
        return upper.add_(upper.triu(1).t())


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
