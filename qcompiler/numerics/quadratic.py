"""The Hessian X^T X of a layer's inputs X [tokens, I], and what a change of its weight does to its output by that."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 256
_ROWS = 512


def add_gram(total: Tensor, values: Tensor, *, alpha: float = 1) -> None:
    """Add alpha X^T X to `total` [I, I], on and above its diagonal, for X = `values` [N, I], both float32.

    What stands above the diagonal is a product, and the two ends of it are halved. Below the diagonal, only what is in
    the blocks of 256 along it changes.
    """
    size = len(total)
    if size <= _COLUMNS:
        total.addmm_(values.t(), values, alpha=alpha)
        return
    middle = -(-size // 2 // _COLUMNS) * _COLUMNS
    left, right = values[:, :middle], values[:, middle:]
    total[:middle, middle:].addmm_(left.t(), right, alpha=alpha)
    add_gram(total[:middle, :middle], left, alpha=alpha)
    add_gram(total[middle:, middle:], right, alpha=alpha)


class QuadraticForm:
    """tr(D H D^T) of rows D [R, I], for a symmetric `hessian` [I, I] in float32: ||D X^T||^2 over the tokens.

    Only what lies on or above the diagonal of H is multiplied, block by block, and what lies above it counts twice. A
    form holds these blocks by itself, in `dtype`: the Hessian may change or go. That is float32; for weights in
    bfloat16, which many matrix units are faster with, it is bfloat16: as errors of rounding have no common direction,
    sums are off by some thousandths at most. One that this brings below zero is zero.
    """

    def __init__(self, hessian: Tensor, weights: torch.dtype) -> None:
        self.dtype = torch.bfloat16 if weights is torch.bfloat16 else torch.float32
        self._blocks: list[Tensor] = []
        for start in range(0, len(hessian), _COLUMNS):
            stop = min(start + _COLUMNS, len(hessian))
            block = hessian[:stop, start:stop].to(self.dtype, copy=True)
            block[:start].mul_(2)
            self._blocks.append(block)

    def of(self, rows: Tensor) -> float:
        """The form of `rows` [R, I], in its dtype."""
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for block in self._blocks:
            stop, width = block.shape
            for some in torch.split(rows, _ROWS):
                product = some[:, :stop] @ block
                # Row by row first: threads would each sum a part of all, and their number decide about the last bit.
                total += product.float().mul_(some[:, stop - width : stop]).sum(1, dtype=total.dtype).sum()
        return max(float(total), 0.0)
