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


def quadratic_form(rows: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D = `rows` [R, I] and a symmetric `hessian` [I, I] in float32: ||D X^T||^2 over the tokens.

    Only what lies on or above the diagonal of H is multiplied, block by block, and the rest counted by symmetry. Rows
    in float32, or in bfloat16: then H is rounded to it as well, which many matrix units are faster with, and as errors
    of rounding have no common direction, the sum is off by some thousandths at most. A sum that this brings below zero
    is zero.
    """
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(hessian), _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, len(hessian)))
        block = hessian[: columns.stop, columns].to(rows.dtype)
        for some in torch.split(rows, _ROWS):
            product = some[:, columns] @ block[start:]
            if start:
                product.addmm_(some[:, :start], block[:start], alpha=2)
            # Row by row first: threads would each sum a part of all, and their number decide about the last bit.
            total += product.float().mul_(some[:, columns]).sum(1, dtype=total.dtype).sum()
    return max(float(total), 0.0)
