"""What a change of a weight does to a layer's output, given the Hessian X^T X of its inputs X [tokens, I]."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 256


def quadratic_form(rows: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D = `rows` [R, I] and a symmetric `hessian` [I, I], both float32: ||D X^T||^2 over the tokens.

    Only what lies on or above the diagonal of H is multiplied, block by block, and the rest counted by symmetry.
    """
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(hessian), _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, len(hessian)))
        product = rows[:, columns] @ hessian[columns, columns]
        if start:
            product.addmm_(rows[:, :start], hessian[:start, columns], alpha=2)
        # Row by row first: threads would each sum a part of the whole, and their number decide about the last bit.
        total += product.mul_(rows[:, columns]).sum(1, dtype=total.dtype).sum()
    return float(total)
