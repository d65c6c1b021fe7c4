"""GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

The paper rounds columns one after the other and spreads each one's error over those that are left, by rows of the
Cholesky factor of the inverse Hessian. This computes the same numbers without an inverse, in the form that Chee et al.
2023 ("QuIP", theorem 6) prove equal: with H = (I + U) D (I + U)^T, U strictly upper triangular, column j is

    Q_j = round(W_j + (W - Q)_{<j} U_{<j, j})

so that feedback is a product with the error so far, and the loss is the sum of D_j times the squared rounding errors.
Scales are fixed before the first column, whatever the order ("static" activation order), so no index tensor is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler.numerics import QuantizedTensor, multiplied_out, quadratic_form
from qcompiler.numerics.elements import round_to_codes, round_to_values
from qcompiler.numerics.scales import scale_value
from qcompiler.scheme import Strategy
from qcompiler.solvers.options import MAX_DAMPING, GptqOptions

_INNER = 32


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
    """A Hessian made ready, for every layer that reads the same inputs: see `factor`."""

    hessian: Tensor
    order: Tensor
    feedback: Tensor
    damping: float
    dead_columns: int


def factor(hessian: Tensor, options: GptqOptions) -> Factored:
    """Order, damp and factor a Hessian X^T X over the inputs X [tokens, I] of a layer: float32 [I, I], not changed.

    Raises `ValueError` where it is not finite, or not positive even with a damping of 1.
    """
    if not bool(hessian.diagonal().isfinite().all()):
        raise ValueError("the Hessian has NaN or infinite values")
    order = _order(hessian, options)
    damped, dead = _prepared(hessian, order)
    feedback, damping = _factor(damped, options.damping)
    return Factored(hessian, order, feedback, damping, dead)


def gptq(
    weight: Tensor, factored: Factored, nearest: QuantizedTensor, options: GptqOptions
) -> tuple[QuantizedTensor, Outcome]:
    """Round a weight [O, I] with the scales and zero points of `nearest`, its rounding to nearest.

    Rows do not depend on one another: layers with one Hessian can be stacked. An input that is always zero (a dead
    column) is rounded to nearest, where the paper sets its weights to zero: both give the same output.
    """
    values = _solve(weight, nearest, factored.order, factored.feedback, options.block_size)
    solved = replace(nearest, codes=_codes(values, nearest, factored.order))
    error, before = (output_error(weight, quantized, factored.hessian) for quantized in (solved, nearest))
    size = output_size(weight, factored.hessian)
    return solved, Outcome(error, before, size, factored.damping, factored.dead_columns)


def _order(hessian: Tensor, options: GptqOptions) -> Tensor:
    if options.order == "natural":
        return torch.arange(len(hessian), device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _prepared(hessian: Tensor, order: Tensor) -> tuple[Tensor, int]:
    """The Hessian in the order of solving, with ones for dead inputs; and how many there are."""
    ordered = hessian[order][:, order]
    diagonal = ordered.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1  # a view: their rows and columns are zero, so they feed nothing
    return ordered, int(dead.sum())


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """U of H + damping * mean(diag H) * I = (I + U) D (I + U)^T, by Cholesky of H with both sides reversed."""
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
    return upper.div_(upper.diagonal().clone()).triu_(1), damping


def _solve(weight: Tensor, nearest: QuantizedTensor, order: Tensor, factor: Tensor, block_size: int) -> Tensor:
    """The values of the codes [I, O], in the order of solving: a column of the weight is one contiguous row here."""
    grid = _Grid(nearest)
    original = weight.float().t()[order].contiguous()
    columns = len(original)
    error, values = torch.empty_like(original), torch.empty_like(original)
    places = order.tolist()
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        target = original[start:stop].clone()
        if start:
            target.addmm_(factor[:start, start:stop].t(), error[:start])
        for first in range(start, stop, _INNER):
            last = min(first + _INNER, stop)
            if first > start:
                target[first - start : last - start].addmm_(factor[start:first, first:last].t(), error[start:first])
            for column in range(first, last):
                wanted = target[column - start]
                if column > first:
                    wanted.addmv_(error[first:column].t(), factor[first:column, column])
                rounded = grid.round(wanted, places[column], out=values[column])
                torch.sub(original[column], rounded, out=error[column])
    return values


class _Grid:
    """The values that each element of a column may take."""

    def __init__(self, nearest: QuantizedTensor) -> None:
        spec = nearest.spec
        self._spec = spec
        rows, columns = nearest.shape
        scale = scale_value(nearest.scale, spec, nearest.global_scale)
        scale = scale.reshape(1, 1) if spec.strategy is Strategy.TENSOR else scale
        zero = nearest.zero_point
        zero = zero.reshape(scale.shape).float() if zero is not None else None
        tall, self._wide = spec.block_structure or (1, spec.group_size or columns)
        self._scale = self._by_column(scale, rows, tall)
        self._zero = self._by_column(zero, rows, tall) if zero is not None else None

    def _by_column(self, grid: Tensor, rows: int, tall: int) -> Tensor:
        """[tiles across, rows]: what holds for every row of a column is one contiguous row here."""
        if grid.shape[0] != rows and grid.shape[0] != 1:
            grid = grid.repeat_interleave(tall, 0)[:rows]
        return grid.t().contiguous()

    def round(self, wanted: Tensor, column: int, *, out: Tensor) -> Tensor:
        """The nearest weights; `out` gets the values of their codes."""
        scale = self._scale[column // self._wide]
        torch.div(wanted, scale, out=out)
        if self._zero is None:
            out.copy_(round_to_values(out, self._spec))
            return out * scale
        zero = self._zero[column // self._wide]
        out.copy_(round_to_values(out.add_(zero), self._spec))
        return (out - zero).mul_(scale)


def _codes(values: Tensor, nearest: QuantizedTensor, order: Tensor) -> Tensor:
    codes = torch.empty_like(nearest.codes)
    restored = torch.empty_like(values)
    restored[order] = values
    codes.copy_(round_to_codes(restored.t().contiguous(), nearest.spec))
    return codes


def output_error(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): the squared error of the layer's output, summed over what the Hessian saw."""
    return quadratic_form(multiplied_out(quantized).sub_(weight), hessian)


def output_size(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T): the squared output of the layer, summed over what the Hessian saw."""
    return quadratic_form(weight.float(), hessian)
