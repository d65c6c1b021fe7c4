"""GPTQ for the linears of a partition: measure, factor each Hessian once for all that use it, and solve by rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
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
    """What came of a job, and the seconds it took."""

    outcome: Outcome
    seconds: float


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

    def measure(job: Job) -> Result:
        start, hessian = perf_counter(), hessians[job.path].value()
        before, size = output_error(job.weight, job.nearest, hessian), output_size(job.weight, hessian)
        return Result(Outcome(0.0, before, size, 0.0, 0), perf_counter() - start)

    measured = in_parallel(measure, jobs, workers=workers, size=lambda job: job.weight.numel())
    found = dict(zip((job.path for job in jobs), measured, strict=True))
    groups = _groups(jobs, hessians)
    largest_first = sorted(groups, key=lambda number: -groups[number].jobs[0].weight.shape[1])
    stacks = in_parallel_parts(lambda number: _prepare(groups.pop(number)), _solve, largest_first, workers=workers)
    for path, solved in chain.from_iterable(stacks):
        known, more = found[path], solved.outcome
        outcome = replace(
            more, error=known.outcome.error + more.error, before=known.outcome.before, size=known.outcome.size
        )
        found[path] = Result(outcome, known.seconds + solved.seconds)
    return found


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


def _solve(stack: _Stack) -> list[tuple[str, Result]]:
    """What came of each part, as far as solving goes."""
    start, factored = perf_counter(), stack.factored
    rows = [Rows(job.weight, job.nearest, part) for job, part in stack.parts]
    errors = gptq(rows, factored, stack.parts[0][0].options)
    seconds = (stack.seconds + perf_counter() - start) / sum(part.count for part in rows)
    return [
        (job.path, Result(Outcome(error, 0.0, 0.0, factored.damping, factored.dead_columns), seconds * part.count))
        for (job, _), part, error in zip(stack.parts, rows, errors, strict=True)
    ]
