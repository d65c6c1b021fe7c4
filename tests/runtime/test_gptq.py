"""Linears that read the same inputs share a Hessian, whatever each of them is solved by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompiler.ir.annotations import HessianObserver
from qcompiler.numerics import quantize_weight
from qcompiler.runtime import gptq
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.parallel import Workers
from qcompiler.scheme import QuantSpec, preset
from qcompiler.solvers.options import GptqOptions

OPTIONS = {
    "q_proj": GptqOptions(),
    "k_proj": GptqOptions(damping=0.05),
    "v_proj": GptqOptions(),
    "fc1": GptqOptions(order="natural"),
}
CPU = torch.device("cpu")


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 300, 256, generator=generator) @ torch.randn(256, 256, generator=generator)


def hessian(*consumers: str) -> HessianStatistic:
    statistic = HessianStatistic(HessianObserver("hessian", consumers, ("test",)))
    statistic.update(inputs(), torch.ones(1, 300, dtype=torch.bool))
    return statistic


def job(path: str) -> gptq.Job:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(len(path)))
    start = quantize_weight(weight, preset("W4A16").weights, scale_dtype=torch.float32)
    return gptq.Job(path, weight, start, OPTIONS[path])


@pytest.mark.parametrize("threads", [1, 2])
def test_each_is_solved_by_its_own_options_as_if_it_were_alone(threads: int) -> None:
    before, jobs = torch.get_num_threads(), {path: job(path) for path in OPTIONS}
    torch.set_num_threads(threads)
    try:
        hessians = dict.fromkeys(OPTIONS, hessian(*OPTIONS))
        results = gptq.solve(list(jobs.values()), hessians, Workers(CPU))
    finally:
        torch.set_num_threads(before)
    assert not hessians
    for path in OPTIONS:
        alone = job(path)
        expected = gptq.solve([alone], {path: hessian(path)}, Workers(CPU))[path].outcome
        assert torch.equal(jobs[path].nearest.codes, alone.nearest.codes), path
        assert results[path].outcome == expected, path
        assert 0 < expected.error < expected.before


@pytest.mark.parametrize("rows", [36, 100])
def test_rows_that_fill_no_vector_give_the_same_codes_whatever_the_threads(rows: int) -> None:
    """Threads decide how rows are cut. At 8 bits some lie so near a tie that another order of adding up tells."""
    before, weight = torch.get_num_threads(), torch.randn(rows, 256, generator=torch.Generator().manual_seed(1))
    weight, spec = weight.bfloat16(), QuantSpec(bits=8, group_size=64)
    solved = []
    for threads in (1, 2, 3, 4):
        nearest = quantize_weight(weight, spec, scale_dtype=torch.bfloat16)
        torch.set_num_threads(threads)
        try:
            with Workers(CPU) as workers:
                jobs = [gptq.Job("q_proj", weight, nearest, GptqOptions())]
                outcome = gptq.solve(jobs, {"q_proj": hessian("q_proj")}, workers)["q_proj"].outcome
        finally:
            torch.set_num_threads(before)
        solved.append((nearest.codes, outcome))
    for codes, outcome in solved:
        assert torch.equal(codes, solved[0][0])
        assert outcome == solved[0][1]
