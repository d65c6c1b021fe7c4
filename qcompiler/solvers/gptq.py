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

from qcompiler.solvers.columns import Rows, solve
from qcompiler.solvers.factor import Factored
from qcompiler.solvers.options import GptqOptions


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
