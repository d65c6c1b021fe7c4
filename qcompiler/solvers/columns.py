"""The column loop of GPTQ: round, feed the error back, and go on to the next column.

What bounds it is the number of calls into torch, several per column: so columns are rows here, all that a column needs
lies in buffers that are made once, and layers can be stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler.numerics import QuantizedTensor
from qcompiler.numerics.elements import code_range, round_to_codes, round_to_values
from qcompiler.numerics.scales import scale_value
from qcompiler.scheme import Strategy

if TYPE_CHECKING:
    from qcompiler.solvers.gptq import Factored

_INNER = 32


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a weight [O, I], and its rounding to nearest: there, their codes become those that are solved."""

    weight: Tensor
    nearest: QuantizedTensor
    rows: slice

    @property
    def count(self) -> int:
        return len(range(*self.rows.indices(self.nearest.shape[0])))


def solve(stack: Sequence[Rows], factored: Factored, block_size: int) -> Tensor:
    """Solve rows as one matrix, into the codes of their `nearest`: each row's tr(e H e^T) (float64), e its error.

    With the rounding errors R, (W - Q)(I + U) = R, so the loss under the damped Hessian is R D R^T: what the damping
    counts is taken off again. That needs no product with the Hessian.
    """
    state = _transposed(stack, factored.order)  # what was solved becomes its error in place
    columns, rows = state.shape
    codes = torch.empty(columns, rows, dtype=stack[0].nearest.codes.dtype, device=state.device)
    losses = torch.zeros(rows, dtype=torch.float64, device=state.device)
    inner = _Inner(stack, rows, state.device)
    places, feedback = factored.order.tolist(), factored.feedback
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        wanted = state[start:stop].clone()
        if start:
            wanted.addmm_(feedback[:start, start:stop].t(), state[:start])
        for first in range(start, stop, _INNER):
            last = min(first + _INNER, stop)
            now = wanted[first - start : last - start]
            if first > start:
                now.addmm_(feedback[start:first, first:last].t(), state[start:first])
            here = slice(first, last)
            rounding = inner.run(now, state[here], feedback[here, here], places[here])
            codes[here].copy_(inner.codes(last - first))
            losses += rounding.square_().t() @ factored.diagonal[here]
            losses -= state[here].square().t() @ factored.added[here]
    _keep(codes, factored.order, stack)
    return losses


def _transposed(stack: Sequence[Rows], order: Tensor) -> Tensor:
    """The stacked weights in float32, by column, in the order of solving: [I, O]."""
    state = torch.empty(len(order), sum(part.count for part in stack), device=order.device)
    first = 0
    for part in stack:
        # Transposed first: rows are several times faster to gather than columns.
        state[:, first : first + part.count] = part.weight[part.rows].t().contiguous().index_select(0, order)
        first += part.count
    return state


def _keep(codes: Tensor, order: Tensor, stack: Sequence[Rows]) -> None:
    """Codes by column, in the order of solving, to where the rows lie. As bytes: not all of torch knows float8."""
    by_column = codes.view(torch.uint8).index_select(0, torch.argsort(order))
    first = 0
    for part in stack:
        part.nearest.codes.view(torch.uint8)[part.rows] = by_column[:, first : first + part.count].t()
        first += part.count


class _Inner:
    """Up to 32 columns, in buffers [32, O] with a view for each column and for those before it."""

    def __init__(self, stack: Sequence[Rows], rows: int, device: torch.device) -> None:
        self._spec = stack[0].nearest.spec
        self._integer = self._spec.type == "int"
        self._low, self._high = code_range(self._spec)
        self._scale, self._zero, self._wide = _grid(stack)
        self._wanted, self._original, self._error, self._values = torch.empty(4, _INNER, rows, device=device).unbind()
        self._steps = torch.empty(rows, device=device)
        self._feedback = torch.empty(_INNER, _INNER, device=device)
        by_column = (b.unbind() for b in (self._wanted, self._original, self._error, self._values, self._feedback))
        before = [self._error[:column].t() for column in range(_INNER)]
        self._columns = [(*views, earlier) for *views, earlier in zip(*by_column, before, strict=True)]
        self._fed = [row[:column] for column, row in enumerate(self._feedback.unbind())]

    def run(self, wanted: Tensor, state: Tensor, feedback: Tensor, places: Sequence[int]) -> Tensor:
        """Solve these columns: `state` [n, O] goes from weights to their errors. The rounding errors, in a buffer."""
        count = len(places)
        self._wanted[:count].copy_(wanted)
        self._original[:count].copy_(state)
        self._feedback[:count, :count].copy_(feedback.t())
        steps = self._steps
        for column, place in enumerate(places):
            want, original, error, value, _, earlier = self._columns[column]
            if column:
                want.addmv_(earlier, self._fed[column])
            scale = self._scale[place // self._wide]
            if self._zero is None:
                torch.div(want, scale, out=value)
                self._round(value)
                torch.addcmul(original, value, scale, value=-1, out=error)
            else:
                zero = self._zero[place // self._wide]
                torch.addcdiv(zero, want, scale, out=value)
                self._round(value)
                torch.sub(value, zero, out=steps)
                torch.addcmul(original, steps, scale, value=-1, out=error)
        state.copy_(self._error[:count])
        # wanted - rounded, where rounded = original - error
        return self._wanted[:count].sub_(self._original[:count]).add_(self._error[:count])

    def _round(self, value: Tensor) -> None:
        if self._integer:
            value.round_().clamp_(self._low, self._high)
        else:
            value.copy_(round_to_values(value, self._spec))

    def codes(self, count: int) -> Tensor:
        """The codes of the columns that were solved last, [n, O]."""
        return round_to_codes(self._values[:count], self._spec)


def _grid(stack: Sequence[Rows]) -> tuple[list[Tensor], list[Tensor] | None, int]:
    """Scales and zero points [O] (float32) of each span of columns, and how wide a span is."""
    spec, columns = stack[0].nearest.spec, stack[0].nearest.shape[1]
    scales, zeros = [], []
    for part in stack:
        nearest = part.nearest
        scales.append(_by_span(nearest, scale_value(nearest.scale, spec, nearest.global_scale))[:, part.rows])
        if nearest.zero_point is not None:
            zeros.append(_by_span(nearest, nearest.zero_point.float())[:, part.rows])
    wide = spec.group_size or (columns if spec.block_structure is None else spec.block_structure[1])
    return list(torch.cat(scales, dim=1).unbind()), list(torch.cat(zeros, dim=1).unbind()) if zeros else None, wide


def _by_span(quantized: QuantizedTensor, grid: Tensor) -> Tensor:
    """[tiles across, rows]: what holds for every row of a column is one contiguous row here."""
    spec, rows = quantized.spec, quantized.shape[0]
    if spec.strategy is Strategy.TENSOR:
        return grid.reshape(1, 1).expand(1, rows)
    if spec.block_structure is not None:
        grid = grid.repeat_interleave(spec.block_structure[0], 0)[:rows]
    return grid.t()
