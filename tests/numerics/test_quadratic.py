"""The output error by halves of the Hessian is the one by running the layer."""

from __future__ import annotations

import pytest
import torch

from qcompiler.numerics import quadratic_form


@pytest.mark.parametrize("columns", [1, 511, 512, 513, 1100])
def test_it_is_the_squared_output_over_the_tokens(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(60, columns, generator=generator) + 0.5
    rows = torch.randn(7, columns, generator=generator)
    outputs = rows.double() @ inputs.double().T
    assert quadratic_form(rows, inputs.T @ inputs) == pytest.approx(float(outputs.square().sum()), rel=1e-5)
