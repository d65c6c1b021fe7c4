"""The Hessian of a layer's squared output error: X^T X over the inputs X [tokens, I] that calibration shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qcompiler.ir.annotations import HessianObserver
from qcompiler.numerics import add_gram
from qcompiler.runtime.tokens import not_finite, real_tokens, unreached

_BLOCK = 512
"""Columns that are mirrored at once."""
_TOKENS = 2048
"""Tokens that are brought to float32 at once."""


class HessianStatistic:
    """X^T X over all real tokens, accumulated in float32."""

    def __init__(self, observer: HessianObserver, *, columns: int = 0, device: torch.device | None = None) -> None:
        """With `columns`, memory is taken at once: it lasts, and is best not found between what comes and goes."""
        self.observer = observer
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, device=device) if columns else None
        self._mirrored = False

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Take in `x` ([B, S, ..., I] or [B * S, I], any float dtype) where `mask` (bool [B, S]) is true.

        Raises `DataError` on NaN or infinity.
        """
        tokens = real_tokens(x, mask)
        if not len(tokens):
            return
        if self._sum is None:
            self._sum = torch.zeros(tokens.shape[1], tokens.shape[1], device=x.device)
        self._mirrored = False
        with _narrow_products(tokens.dtype, tokens.device):
            for part in torch.split(tokens, _TOKENS):
                add_gram(self._sum, part.float())
        self.tokens += len(tokens)

    def value(self) -> Tensor:
        """X^T X, float32 [I, I]: what this holds, not a copy.

        Raises `DataError` where no token came by, or where the inputs were not finite.
        """
        found = self._checked()
        if not self._mirrored:
            for start in range(0, len(found), _BLOCK):
                stop = min(start + _BLOCK, len(found))
                own = found[start:stop, start:stop]
                own.copy_(own.triu() + own.triu(1).t())
                found[stop:, start:stop] = found[start:stop, stop:].t()
            self._mirrored = True
        return found

    def diagonal(self) -> Tensor:
        """The sum of squares of each input, float32 [I]. Raises as `value` does."""
        return self._checked().diagonal().clone()

    def rescale(self, scale: Tensor) -> None:
        """Become the statistic of X / s, as inputs are once a producer took in the scale s (float32 [I])."""
        self._checked().div_(scale.unsqueeze(1)).div_(scale)

    def copy(self) -> HessianStatistic:
        """The same numbers in memory of their own."""
        copied = HessianStatistic(self.observer)
        copied.tokens, copied._mirrored = self.tokens, self._mirrored
        copied._sum = self._sum.clone() if self._sum is not None else None
        return copied

    def _checked(self) -> Tensor:
        if self._sum is None or not self.tokens:
            raise unreached(self.observer.consumers, "use more calibration data, or solver rtn for it")
        if not bool(self._sum.diagonal().isfinite().all()):
            raise not_finite(self.observer.consumers)
        return self._sum


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
