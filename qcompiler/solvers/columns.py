"""The column loop of GPTQ: round, feed the error back, and go on to the next column.

What bounds it is the number of calls into torch, several per column: so columns are rows here, all that a column needs
lies in buffers that are made once, and layers can be stacked. For integers the calls are made by TorchScript, for which
threads do not wait for one another as they do for Python's lock.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.numerics import QuantizedTensor
from qcompiler.numerics.elements import code_range, round_to_codes, round_to_values
from qcompiler.numerics.scales import scale_value
from qcompiler.scheme import Strategy
from qcompiler.solvers.factor import Factored

_INNER = 32
_ALIGNED = 16  # floats of the widest vector: a BLAS sums the rows that fill none in another order


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

    A row gives the same bits whatever rows are solved with it: what fills no vector is filled up with rows of zeros.
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
            losses += rounding.square_().mul_(factored.diagonal[here, None]).sum(0, dtype=losses.dtype)
            losses -= state[here].square().mul_(factored.added[here, None]).sum(0, dtype=losses.dtype)
    _keep(codes, factored.order, stack)
    return losses[: sum(part.count for part in stack)]


def _transposed(stack: Sequence[Rows], order: Tensor) -> Tensor:
    """The stacked weights in float32, by column, in the order of solving: [I, O], O filled up to a multiple of 16."""
    rows = sum(part.count for part in stack)
    state = torch.empty(len(order), -(-rows // _ALIGNED) * _ALIGNED, device=order.device)
    state[:, rows:] = 0
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


def _integers(
    wanted: list[Tensor],
    original: list[Tensor],
    error: list[Tensor],
    values: list[Tensor],
    before: list[Tensor],
    feedback: list[Tensor],
    scale: list[Tensor],
    zero: list[Tensor],
    low: float,
    high: float,
) -> None:
    """Solve columns [O], one after the other; `before` [O, n] are the errors of those before each.

    `wanted` takes in the feedback; `values`, integers from `low` to `high`, and `error` are written. `zero` is empty
    where the grid has no zero points.
    """
    for column in range(len(scale)):
        want, value = wanted[column], values[column]
        if column > 0:
            want.addmv_(before[column], feedback[column])
        if len(zero) > 0:
            torch.addcdiv(zero[column], want, scale[column], out=value)
        else:
            torch.div(want, scale[column], out=value)
        value.round_().clamp_(low, high)
        if len(zero) > 0:
            torch.addcmul(original[column], value - zero[column], scale[column], value=-1, out=error[column])
        else:
            torch.addcmul(original[column], value, scale[column], value=-1, out=error[column])


@cache
def scripted() -> Callable[..., None]:
    """`_integers` by TorchScript; where torch has it no more, by Python: the same numbers, and threads wait.

    Ask for it first where there is one thread: Python's parser is not safe in several.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what is to follow it needs a compiler where it runs
        try:
            found: Callable[..., None] = torch.jit.script(_integers)
        except (AttributeError, OSError, RuntimeError):
            return _integers
    return found


class _Inner:
    """Up to 32 columns, in buffers [32, O] with a view for each column and for those before it."""

    def __init__(self, stack: Sequence[Rows], rows: int, device: torch.device) -> None:
        self._spec = stack[0].nearest.spec
        self._scale, self._zero, self._wide = _grid(stack, rows)
        self._wanted, self._original, self._error, self._values = torch.empty(4, _INNER, rows, device=device).unbind()
        self._feedback = torch.empty(_INNER, _INNER, device=device)
        self._columns = [list(b.unbind()) for b in (self._wanted, self._original, self._error, self._values)]
        self._columns.append([self._error[:column].t() for column in range(_INNER)])
        self._columns.append([row[:column] for column, row in enumerate(self._feedback.unbind())])

    def run(self, wanted: Tensor, state: Tensor, feedback: Tensor, places: Sequence[int]) -> Tensor:
        """Solve these columns: `state` [n, O] goes from weights to their errors. The rounding errors, in a buffer."""
        count = len(places)
        self._wanted[:count].copy_(wanted)
        self._original[:count].copy_(state)
        self._feedback[:count, :count].copy_(feedback.t())
        spans = [place // self._wide for place in places]
        scale = [self._scale[span] for span in spans]
        zero = [self._zero[span] for span in spans] if self._zero is not None else []
        if self._spec.type == "int":
            scripted()(*self._columns, scale, zero, *code_range(self._spec))
        else:
            self._floats(scale)
        state.copy_(self._error[:count])
        # wanted - rounded, where rounded = original - error
        return self._wanted[:count].sub_(self._original[:count]).add_(self._error[:count])

    def _floats(self, scale: Sequence[Tensor]) -> None:
        """As `_integers`, for formats of floats, which have no zero points."""
        for step, want, original, error, value, before, feedback in zip(scale, *self._columns, strict=False):
            if len(feedback):
                want.addmv_(before, feedback)
            torch.div(want, step, out=value)
            value.copy_(round_to_values(value, self._spec))
            torch.addcmul(original, value, step, value=-1, out=error)

    def codes(self, count: int) -> Tensor:
        """The codes of the columns that were solved last, [n, O]."""
        return round_to_codes(self._values[:count], self._spec)


def _grid(stack: Sequence[Rows], rows: int) -> tuple[list[Tensor], list[Tensor] | None, int]:
    """Scales and zero points [`rows`] (float32) of each span of columns, and how wide a span is."""
    spec, columns = stack[0].nearest.spec, stack[0].nearest.shape[1]
    scales, zeros = [], []
    for part in stack:
        nearest = part.nearest
        scales.append(_by_span(nearest, scale_value(nearest.scale, spec, nearest.global_scale))[:, part.rows])
        if nearest.zero_point is not None:
            zeros.append(_by_span(nearest, nearest.zero_point.float())[:, part.rows])
    wide = spec.group_size or (columns if spec.block_structure is None else spec.block_structure[1])
    return _filled(scales, 1, rows), _filled(zeros, 0, rows) if zeros else None, wide


def _filled(parts: Sequence[Tensor], value: float, rows: int) -> list[Tensor]:
    """By span of columns, with `value` for rows that only fill up."""
    whole = torch.cat(list(parts), dim=1)
    return list(functional.pad(whole, (0, rows - whole.shape[1]), value=value).unbind())


def _by_span(quantized: QuantizedTensor, grid: Tensor) -> Tensor:
    """[tiles across, rows]: what holds for every row of a column is one contiguous row here."""
    spec, rows = quantized.spec, quantized.shape[0]
    if spec.strategy is Strategy.TENSOR:
        return grid.reshape(1, 1).expand(1, rows)
    if spec.block_structure is not None:
        grid = grid.repeat_interleave(spec.block_structure[0], 0)[:rows]
    return grid.t()
