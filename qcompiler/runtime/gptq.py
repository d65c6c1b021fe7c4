"""GPTQ for the linears of a partition: measure, factor each Hessian once for all that use it, and solve by rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.numerics import QuantizedTensor
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.parallel import Workers, in_parallel, in_parallel_parts
from qcompiler.solvers.columns import Rows
from qcompiler.solvers.gptq import Factored, Outcome, factor, gptq, output_error, output_size, stacked
from qcompiler.solvers.options import GptqOptions

_ELEMENTS = 4 * 2**20
"""Of a weight, that are solved at once on a CPU: memory is some times this in float32, for each thread."""
_STACKED_ROWS = 2048
# Stacking saves calls: on a CPU they cost little next to many rows, which are better spread over the cores.
_STACKED_ROWS_DEVICE = 16384


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A linear to solve: its weight [O, I], rounded to nearest."""

    path: str
    weight: Tensor
    nearest: QuantizedTensor
    options: GptqOptions


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a job, and the seconds that each part of it took: `measure`, `factor` and `columns`."""

    outcome: Outcome
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Measured:
    """Of a job, before it is solved: the errors that do not need it to be. See `Outcome`."""

    before: float
    size: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Part:
    """What came of some rows of a job. Its seconds are its share of what it was solved with."""

    path: str
    error: float
    damping: float
    dead_columns: int
    factoring: float
    columns: float


@dataclass(frozen=True, slots=True)
class _Group:
    """Jobs that read the same inputs and are solved by the same options."""

    jobs: Sequence[Job]
    statistic: HessianStatistic


@dataclass(frozen=True, slots=True)
class _Stack:
    """Rows of jobs that are solved as one matrix; `seconds` is their share of the factorization."""

    parts: Sequence[tuple[Job, slice]]
    factored: Factored
    seconds: float


def solve(jobs: Sequence[Job], hessians: MutableMapping[str, HessianStatistic], workers: Workers) -> dict[str, Result]:
    """Turn the codes of each job's `nearest` into GPTQ's. What came of it, by path.

    Takes the statistics of its linears out of `hessians`, so that each is gone as soon as it is factored. Raises
    `DataError` where one cannot be.
    """

    def measure(job: Job) -> _Measured:
        start, hessian = perf_counter(), hessians[job.path].value()
        before, size = output_error(job.weight, job.nearest, hessian), output_size(job.weight, hessian)
        return _Measured(before, size, perf_counter() - start)

    measured = in_parallel(measure, jobs, workers=workers, size=lambda job: job.weight.numel())
    groups = _groups(jobs, hessians)
    largest_first = sorted(groups, key=lambda number: -groups[number].jobs[0].weight.shape[1])
    stacks = in_parallel_parts(lambda number: _prepare(groups.pop(number)), _solve, largest_first, workers=workers)
    parts: dict[str, list[_Part]] = defaultdict(list)
    for part in chain.from_iterable(stacks):
        parts[part.path].append(part)
    return {job.path: _result(known, parts[job.path]) for job, known in zip(jobs, measured, strict=True)}


def _result(known: _Measured, parts: Sequence[_Part]) -> Result:
    error = sum(part.error for part in parts)
    return Result(
        Outcome(error, known.before, known.size, parts[0].damping, parts[0].dead_columns),
        {
            "measure": known.seconds,
            "factor": sum(part.factoring for part in parts),
            "columns": sum(part.columns for part in parts),
        },
    )


def _groups(jobs: Sequence[Job], hessians: MutableMapping[str, HessianStatistic]) -> dict[int, _Group]:
    """By number; a Hessian is kept by nothing else from here on.

    Factoring uses it up: each other group of linears that read the same inputs has a copy.
    """
    by_key: dict[tuple[HessianStatistic, GptqOptions], list[Job]] = defaultdict(list)
    for job in jobs:
        by_key[hessians.pop(job.path), job.options].append(job)
    groups: dict[int, _Group] = {}
    taken: set[HessianStatistic] = set()
    for number, ((statistic, _), found) in enumerate(by_key.items()):
        groups[number] = _Group(found, statistic.copy() if statistic in taken else statistic)
        taken.add(statistic)
    return groups


def _prepare(group: _Group) -> list[_Stack]:
    start, jobs = perf_counter(), group.jobs
    try:
        factored = factor(group.statistic.value(), jobs[0].options)
    except ValueError as error:
        raise DataError(
            f"{', '.join(group.statistic.observer.consumers)} cannot be solved: {error}",
            hint="use more calibration data, a larger damping, or solver rtn",
        ) from error
    limit = _STACKED_ROWS_DEVICE
    if factored.order.device.type == "cpu":
        limit = min(_STACKED_ROWS, max(16, _ELEMENTS // len(factored.order) // 16 * 16))
    stacks = stacked([job.nearest.spec for job in jobs], [len(job.weight) for job in jobs], limit)
    seconds = (perf_counter() - start) / len(stacks)
    return [_Stack([(jobs[index], rows) for index, rows in stack], factored, seconds) for stack in stacks]


def _solve(stack: _Stack) -> list[_Part]:
    start, factored = perf_counter(), stack.factored
    rows = [Rows(job.weight, job.nearest, part) for job, part in stack.parts]
    errors = gptq(rows, factored, stack.parts[0][0].options)
    whole = sum(part.count for part in rows)
    factoring, columns = stack.seconds / whole, (perf_counter() - start) / whole
    return [
        _Part(job.path, error, factored.damping, factored.dead_columns, factoring * part.count, columns * part.count)
        for (job, _), part, error in zip(stack.parts, rows, errors, strict=True)
    ]
