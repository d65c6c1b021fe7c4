"""Hessians made ready for GPTQ: ordered, damped and factored, in their own memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.solvers.cholesky import cholesky_, reorder_, reverse_
from qcompiler.solvers.options import MAX_DAMPING, GptqOptions


@dataclass(frozen=True, slots=True)
class Factored:
    """A Hessian made ready, for every layer that reads the same inputs: see `factor`.

    In the order of solving: `feedback` is U [I, I], `diagonal` is D [I], `added` [I] is what was added to the Hessian.
    """

    order: Tensor
    feedback: Tensor
    diagonal: Tensor
    added: Tensor
    damping: float
    dead_columns: int


def factor(hessian: Tensor, options: GptqOptions) -> Factored:
    """Order, damp and factor a Hessian X^T X over the inputs X [tokens, I] of a layer: float32 [I, I], contiguous.

    The Hessian is used up: its memory becomes the factor's. Raises `ValueError` where it is not positive even with a
    damping of 1.
    """
    order = _order(hessian, options)
    # The factor wanted is upper triangular from the last column on: that is Cholesky's of the reversed matrix.
    reorder_(hessian, order.flip(0))
    own = hessian.diagonal().flip(0)
    dead = own == 0
    alive = torch.where(dead, 1.0, own)  # rows and columns of dead ones are zero, so they feed nothing
    damping = options.damping
    while not cholesky_(hessian, (damped := alive + damping * alive.mean()).flip(0)):
        if damping >= MAX_DAMPING:
            raise ValueError(f"the Hessian is not positive definite even with a damping of {damping:g}")
        damping = min(10 * damping, MAX_DAMPING)
    feedback = reverse_(hessian).mT
    roots = feedback.diagonal().clone()
    feedback.div_(roots).fill_diagonal_(0)
    diagonal, added = roots.square(), damped - own
    diagonal[dead], added[dead] = 0, 0  # they cost nothing
    return Factored(order, feedback, diagonal, added, damping, int(dead.sum()))


def _order(hessian: Tensor, options: GptqOptions) -> Tensor:
    if options.order == "natural":
        return torch.arange(len(hessian), device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)
