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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler.numerics import QuantizedTensor, multiplied_out, quadratic_form
from qcompiler.solvers.columns import solve
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
        """An error as a share of the output's size; 0 where the output is always zero."""
        return error / self.size if self.size > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Factored:
    """A Hessian made ready, for every layer that reads the same inputs: see `factor`.

    In the order of solving: `feedback` is U [I, I], `diagonal` is D [I], `added` [I] is what was added to the Hessian.
    """

    hessian: Tensor
    order: Tensor
    feedback: Tensor
    diagonal: Tensor
    added: Tensor
    damping: float
    dead_columns: int


def factor(hessian: Tensor, options: GptqOptions) -> Factored:
    """Order, damp and factor a Hessian X^T X over the inputs X [tokens, I] of a layer: float32 [I, I], not changed.

    Raises `ValueError` where it is not finite, or not positive even with a damping of 1.
    """
    if not bool(hessian.diagonal().isfinite().all()):
        raise ValueError("the Hessian has NaN or infinite values")
    order = _order(hessian, options)
    damped = hessian[order][:, order]
    own = damped.diagonal().clone()
    dead = own == 0
    damped.diagonal()[dead] = 1  # their rows and columns are zero, so they feed nothing
    feedback, diagonal, damping = _factor(damped, options.damping)
    added = damped.diagonal() - own
    diagonal[dead], added[dead] = 0, 0  # they cost nothing
    return Factored(hessian, order, feedback, diagonal, added, damping, int(dead.sum()))


def gptq(
    weights: Sequence[Tensor], factored: Factored, nearest: Sequence[QuantizedTensor], options: GptqOptions
) -> list[tuple[QuantizedTensor, Outcome]]:
    """Round weights (each [O_k, I]) that read the same inputs, to one spec, as one matrix.

    Scales and zero points are those of `nearest`, their rounding to nearest. Rows do not depend on one another, so this
    gives what it gives for each alone, in fewer steps; to the bit where the numbers of rows are multiples of 16 (a BLAS
    may sum the rows that fill no vector in another order). An input that is always zero (a dead column) is rounded to
    nearest, where the paper sets its weights to zero: both give the same output.
    """
    codes, losses = solve(weights, nearest, factored, options.block_size)
    found, first = [], 0
    for weight, start in zip(weights, nearest, strict=True):
        rows = slice(first, first + len(weight))
        before, size = output_error(weight, start, factored.hessian), output_size(weight, factored.hessian)
        error = max(float(losses[rows].sum()), 0.0)
        outcome = Outcome(error, before, size, factored.damping, factored.dead_columns)
        found.append((replace(start, codes=codes[rows]), outcome))
        first = rows.stop
    return found


def stacked(keys: Sequence[Hashable], rows: Sequence[int], limit: int) -> list[list[int]]:
    """Which layers (by index) to solve together: those of one key, in order, as many as have `limit` rows in all."""
    stacks: list[list[int]] = []
    open_: dict[Hashable, tuple[list[int], int]] = {}
    for index, (key, count) in enumerate(zip(keys, rows, strict=True)):
        stack, height = open_.get(key, ([], limit))
        if height + count > limit:
            stack, height = [], 0
            stacks.append(stack)
        stack.append(index)
        open_[key] = stack, height + count
    return stacks


def _order(hessian: Tensor, options: GptqOptions) -> Tensor:
    if options.order == "natural":
        return torch.arange(len(hessian), device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """U and D of H + damping * mean(diag H) * I = (I + U) D (I + U)^T, by Cholesky of H with both sides reversed.

    The Hessian becomes the damped one.
    """
    mean = hessian.diagonal().mean()
    added = 0.0
    while True:
        hessian.diagonal().add_((damping - added) * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not bool(failed):
            break
        if damping >= MAX_DAMPING:
            raise ValueError(f"the Hessian is not positive definite even with a damping of {damping:g}")
        added, damping = damping, min(10 * damping, MAX_DAMPING)
    upper = lower.flip(0, 1)
    roots = upper.diagonal().clone()
    return upper.div_(roots).triu_(1), roots.square(), damping


def output_error(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): the squared error of the layer's output, summed over what the Hessian saw."""
    return quadratic_form(multiplied_out(quantized).sub_(weight), hessian)


def output_size(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T): the squared output of the layer, summed over what the Hessian saw."""
    return quadratic_form(weight.float(), hessian)
