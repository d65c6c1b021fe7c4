"""The output error by halves of the Hessian is the one by running the layer."""

from __future__ import annotations

import pytest
import torch

from qcompiler.numerics import QuadraticForm


@pytest.mark.parametrize("columns", [1, 511, 512, 513, 1100])
def test_it_is_the_squared_output_over_the_tokens(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(60, columns, generator=generator) + 0.5
    rows = torch.randn(7, columns, generator=generator)
    outputs = rows.double() @ inputs.double().T
    assert QuadraticForm(inputs.T @ inputs, torch.float32).of(rows) == pytest.approx(
        float(outputs.square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("seed", range(8))  # the last bit differs by chance
def test_it_is_the_same_number_for_any_number_of_threads(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, rows = (torch.randn(count, 256, generator=generator) for count in (600, 512))
    hessian = inputs.T @ inputs
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.add(QuadraticForm(hessian, torch.float32).of(rows))
        finally:
            torch.set_num_threads(before)
    assert len(found) == 1


def test_no_change_of_the_output_is_none_and_never_less() -> None:
    """Rows that the inputs do not see, in bfloat16: what is found is of rounding alone."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        inputs = torch.randn(1, 64, generator=generator).bfloat16()
        rows = torch.stack([inputs[:, 1::2], -inputs[:, ::2]], dim=2).flatten(1)
        assert float(inputs.double() @ rows.double().T) == 0
        found.append(QuadraticForm(inputs.float().T @ inputs.float(), torch.bfloat16).of(rows))
    assert min(found) == 0
    assert max(found) < 0.02 * 64**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hessian_may_be_used_up_afterwards(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, rows = (torch.randn(count, 300, generator=generator) for count in (40, 5))
    hessian = inputs.T @ inputs
    form = QuadraticForm(hessian, dtype)
    before = form.of(rows.to(dtype))
    hessian.zero_()
    assert form.of(rows.to(dtype)) == before > 0
