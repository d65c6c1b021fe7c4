"""GPTQ for the linears of a segment: measure, factor each Hessian once for all that use it, and solve by rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from qcompiler.errors import DataError
from qcompiler.numerics import QuadraticForm, QuantizedTensor, difference
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.parallel import Workers, in_parallel
from qcompiler.solvers.columns import Rows, scripted
from qcompiler.solvers.factor import Factored, factor
from qcompiler.solvers.gptq import Outcome, gptq, stacked
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
    """A number of `Outcome` that a job needs not be solved for."""

    value: float
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
    threads = workers.count  # in one of its threads it would be 1
    scripted()
    forms = _forms(jobs, hessians)
    groups = _groups(jobs, hessians)
    measured: dict[tuple[str, str], _Measured] = {}
    prepared: dict[int, list[_Stack]] = {}

    def prepare(number: int) -> None:
        prepared[number] = _prepare(groups.pop(number), threads)

    def measure(job: Job, form: QuadraticForm, which: Literal["before", "size"]) -> None:
        start = perf_counter()
        rows = difference(job.weight, job.nearest, form.dtype) if which == "before" else job.weight.to(form.dtype)
        measured[job.path, which] = _Measured(form.of(rows), perf_counter() - start)

    # Most layers have one Hessian or few to factor, which is one thread's work: the others measure meanwhile.
    order = sorted(groups, key=lambda number: -groups[number].jobs[0].weight.shape[1])
    tasks = [partial(prepare, number) for number in order]
    tasks += [partial(measure, job, forms[job.path], which) for job in jobs for which in ("before", "size")]
    del forms
    in_parallel(lambda task: task(), tasks, workers=workers)
    del tasks
    # Forgotten one by one, so that a factor is gone when what it solves is.
    stacks = dict(enumerate(chain.from_iterable(prepared.pop(number) for number in sorted(prepared))))
    solved = in_parallel(lambda number: _solve(stacks.pop(number)), list(stacks), workers=workers)
    parts: dict[str, list[_Part]] = defaultdict(list)
    for part in chain.from_iterable(solved):
        parts[part.path].append(part)
    return {
        job.path: _result(measured[job.path, "before"], measured[job.path, "size"], parts[job.path]) for job in jobs
    }


def _result(before: _Measured, size: _Measured, parts: Sequence[_Part]) -> Result:
    # To float32: how many rows were added up together, which depends on the threads, decides about digits beyond it.
    error = torch.tensor(sum(part.error for part in parts), dtype=torch.float32).item()
    return Result(
        Outcome(error, before.value, size.value, parts[0].damping, parts[0].dead_columns),
        {
            "measure": before.seconds + size.seconds,
            "factor": sum(part.factoring for part in parts),
            "columns": sum(part.columns for part in parts),
        },
    )


def _forms(jobs: Sequence[Job], hessians: Mapping[str, HessianStatistic]) -> dict[str, QuadraticForm]:
    """What measures each job, by path, apart from the Hessian that factoring uses up."""
    made: dict[tuple[HessianStatistic, torch.dtype], QuadraticForm] = {}
    found: dict[str, QuadraticForm] = {}
    for job in jobs:
        key = hessians[job.path], job.weight.dtype
        if key not in made:
            made[key] = QuadraticForm(key[0].value(), key[1])
        found[job.path] = made[key]
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


def _prepare(group: _Group, threads: int) -> list[_Stack]:
    start, jobs = perf_counter(), group.jobs
    try:
        factored = factor(group.statistic.value(), jobs[0].options)
    except ValueError as error:
        raise DataError(
            f"{', '.join(group.statistic.observer.consumers)} cannot be solved: {error}",
            hint="use more calibration data, a larger damping, or solver rtn",
        ) from error
    heights = [len(job.weight) for job in jobs]
    limit = _STACKED_ROWS_DEVICE
    if factored.order.device.type == "cpu":
        limit = _stacked_rows(sum(heights), len(factored.order), threads)
    stacks = stacked([job.nearest.spec for job in jobs], heights, limit)
    seconds = (perf_counter() - start) / len(stacks)
    return [_Stack([(jobs[index], rows) for index, rows in stack], factored, seconds) for stack in stacks]


def _stacked_rows(rows: int, columns: int, threads: int) -> int:
    """How many of `rows` to solve together on a CPU, a multiple of 16: all threads have as many."""
    stacks = -(-rows // min(_STACKED_ROWS, max(16, _ELEMENTS // columns)))
    shared = -(-stacks // threads) * threads
    return -(-rows // (16 * shared)) * 16


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
