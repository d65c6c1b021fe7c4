"""GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

The paper rounds columns one after the other and spreads each one's error over those that are left, by rows of the
Cholesky factor of the inverse Hessian. This computes the same numbers without an inverse, in the form that Chee et al.
2023 ("QuIP", theorem 6) prove equal: with H = (I + U) D (I + U)^T, U strictly upper triangular, column j is

    Q_j = round(W_j + (W - Q)_{<j} U_{<j, j})

so that feedback is a product with the error so far, and the loss is the sum of D_j times the squared rounding errors.
Scales are fixed before the first column, whatever the order ("static" activation order), so no index tensor is needed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.solvers.cholesky import cholesky_, reorder_, reverse_
from qcompiler.solvers.columns import Rows, solve
from qcompiler.solvers.options import MAX_DAMPING, GptqOptions


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a solve: tr((W - Q) H (W - Q)^T), the same of rounding to nearest (`before`), and tr(W H W^T)."""

    error: float
    before: float
    size: float
    damping: float
    dead_columns: int

    def relative(self, error: float) -> float:
        """An error as a share of the output's size; 0 where the output is always zero, or rounding tells less."""
        return max(error, 0.0) / self.size if self.size > 0 else 0.0


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


def gptq(stack: Sequence[Rows], factored: Factored, options: GptqOptions) -> list[float]:
    """Round rows of weights that read the same inputs, to one spec, as one matrix: the error of each part's output.

    The codes of each part's `nearest` become the solved ones; its scales and zero points stay. Rows do not depend on
    one another, so this gives what it gives for each alone, to the bit, in fewer steps. An input that is always zero (a
    dead column) is rounded to nearest, where the paper sets its weights to zero: both give the same output.
    """
    losses = solve(stack, factored, options.block_size)
    return [float(part.sum()) for part in torch.split(losses, [part.count for part in stack])]


def stacked(keys: Sequence[Hashable], rows: Sequence[int], limit: int) -> list[list[tuple[int, slice]]]:
    """Which rows to solve together: of layers (by index) of one key, in order, `limit` at a time.

    Layers are cut where that needs it: so solving is balanced over threads, and its memory that of so many rows.
    """
    stacks: list[list[tuple[int, slice]]] = []
    open_: dict[Hashable, tuple[list[tuple[int, slice]], int]] = {}
    for index, (key, count) in enumerate(zip(keys, rows, strict=True)):
        first = 0
        while first < count:
            stack, height = open_.get(key, ([], limit))
            if height == limit:
                stack, height = [], 0
                stacks.append(stack)
            last = min(first + limit - height, count)
            stack.append((index, slice(first, last)))
            open_[key] = stack, height + last - first
            first = last
    return stacks


def _order(hessian: Tensor, options: GptqOptions) -> Tensor:
    if options.order == "natural":
        return torch.arange(len(hessian), device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)
