"""GPTQ against an optimal-brain-surgeon oracle in float64, and its defined results where data is scarce."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.numerics import QuadraticForm, QuantizedTensor, difference, multiplied_out, quantize_weight
from qcompiler.numerics.elements import round_to_codes, round_to_values
from qcompiler.numerics.scales import scale_value
from qcompiler.scheme import PRESETS, QuantSpec, Strategy
from qcompiler.solvers import columns as loop
from qcompiler.solvers import gptq as solver
from qcompiler.solvers.cholesky import cholesky_, reorder_, reverse_
from qcompiler.solvers.columns import Rows
from qcompiler.solvers.factor import factor
from qcompiler.solvers.gptq import Outcome
from qcompiler.solvers.options import GptqOptions

INT4 = PRESETS["W4A16"].weights.model_copy(update={"group_size": 16})
SPECS = {
    **{f"int{bits}/g16": INT4.model_copy(update={"bits": bits}) for bits in range(2, 9)},
    "int4/g16/asym": INT4.model_copy(update={"symmetric": False}),
    "int4/channel": QuantSpec(bits=4, strategy=Strategy.CHANNEL),
    "int4/channel/asym": QuantSpec(bits=4, strategy=Strategy.CHANNEL, symmetric=False),
    "int8/tensor": QuantSpec(bits=8, strategy=Strategy.TENSOR),
    "int4/block": QuantSpec(bits=4, strategy=Strategy.BLOCK, block_structure=(8, 16)),
    "fp8/tensor": PRESETS["FP8"].weights,
    "fp8/channel": PRESETS["FP8_DYNAMIC"].weights,
    "fp8/block": QuantSpec(type="float", bits=8, strategy=Strategy.BLOCK, block_structure=(7, 16)),
    "nvfp4": PRESETS["NVFP4"].weights,
    "mxfp4": PRESETS["MXFP4"].weights,
    "mxfp8": PRESETS["MXFP8"].weights,
}


def layer(*, rows: int = 24, columns: int = 64, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator) ** 3
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def nearest(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    return quantize_weight(weight, spec, scales="mse", scale_dtype=torch.float32)


def gptq(
    weight: Tensor, hessian: Tensor, start: QuantizedTensor, options: GptqOptions
) -> tuple[QuantizedTensor, Outcome]:
    factored = factor(hessian.clone(), options)
    solved = replace(start, codes=start.codes.clone())
    (error,) = solver.gptq([whole(weight, solved)], factored, options)
    form = QuadraticForm(hessian, torch.float32)
    before = form.of(difference(weight, start, torch.float32))
    return solved, Outcome(error, before, form.of(weight), factored.damping, factored.dead_columns)


def whole(weight: Tensor, start: QuantizedTensor) -> Rows:
    return Rows(weight, start, slice(0, len(weight)))


def by_element(quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every element [O, I], in float64."""
    rows, columns = quantized.shape
    scale = scale_value(quantized.scale, quantized.spec, quantized.global_scale).double()
    zero = torch.zeros_like(scale) if quantized.zero_point is None else quantized.zero_point.double()
    if scale.ndim == 1:
        scale, zero = scale[None], zero[None]

    def spread(grid: Tensor) -> Tensor:
        tall, wide = -(-rows // grid.shape[0]), -(-columns // grid.shape[1])
        if quantized.spec.block_structure:
            tall, wide = quantized.spec.block_structure
        return grid.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]

    return spread(scale), spread(zero)


def brain_surgeon(weight: Tensor, hessian: Tensor, start: QuantizedTensor, order: list[int], damping: float) -> Tensor:
    """Hassibi and Stork's update, column by column, with the inverse Hessian written out; weights in float64."""
    left = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    inverse = torch.linalg.inv(left)
    scale, zero = by_element(start)
    w, out = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for j in order:
        values = round_to_values((w[:, j] / scale[:, j] + zero[:, j]).float(), start.spec).double()
        out[:, j] = (values - zero[:, j]) * scale[:, j]
        w -= torch.outer((w[:, j] - out[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # gone: its row and column are zero
    return out


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("name", SPECS)
def test_codes_are_those_of_the_optimal_brain_surgeon(name: str, order: str) -> None:
    weight, hessian = layer()
    start = nearest(weight, SPECS[name])
    solved, outcome = gptq(weight, hessian, start, GptqOptions.model_validate({"order": order}))
    columns = list(range(64)) if order == "natural" else torch.argsort(-hessian.diagonal(), stable=True).tolist()
    oracle = brain_surgeon(weight, hessian, start, columns, outcome.damping)
    scale, zero = by_element(solved)
    expected = round_to_codes((oracle / scale + zero).float(), start.spec).to(solved.codes.dtype)
    same = solved.codes.view(torch.uint8) == expected.view(torch.uint8)
    assert same.float().mean() > 0.998  # float32 against float64: what is nearly halfway may go either way
    assert outcome.error == pytest.approx(
        float(((weight - oracle) @ hessian.double() * (weight - oracle)).sum()), rel=1e-3
    )


@pytest.mark.parametrize("name", SPECS)
def test_the_output_changes_less_than_by_rounding_to_nearest(name: str) -> None:
    weight, hessian = layer(rows=64, seed=1)
    start = nearest(weight, SPECS[name])
    solved, outcome = gptq(weight, hessian, start, GptqOptions())
    assert outcome.error < outcome.before
    off = (weight - multiplied_out(solved)).double()
    assert outcome.error == pytest.approx(float((off @ hessian.double() * off).sum()), rel=1e-4)
    assert torch.equal(solved.scale.float(), start.scale.float())


@pytest.mark.parametrize("name", SPECS)
def test_rows_of_one_input_are_solved_together_or_cut_as_each_layer_alone(name: str) -> None:
    weight, hessian = layer(rows=112, columns=96)
    weights = [weight[:30].bfloat16(), weight[30:47].bfloat16(), weight[47:].bfloat16()]  # no multiples of a vector
    options = GptqOptions(block_size=40)
    factored = factor(hessian.clone(), options)
    alone, together = [[nearest(part, SPECS[name]) for part in weights] for _ in range(2)]
    expected = [
        solver.gptq([whole(part, start)], factored, options)[0] for part, start in zip(weights, alone, strict=True)
    ]
    first, second, third = (whole(part, start) for part, start in zip(weights, together, strict=True))
    top, bottom = replace(third, rows=slice(0, 21)), replace(third, rows=slice(21, 65))
    *errors, above = solver.gptq([first, second, top], factored, options)
    errors.append(above + solver.gptq([bottom], factored, options)[0])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert one.codes.is_contiguous()
    assert errors == pytest.approx(expected, rel=1e-12)


def rows_of(*parts: tuple[int, int, int]) -> list[tuple[int, slice]]:
    return [(index, slice(first, stop)) for index, first, stop in parts]


@pytest.mark.parametrize(
    ("keys", "rows", "stacks"),
    [
        ("qqq", [64, 16, 16], [rows_of((0, 0, 64), (1, 0, 16), (2, 0, 16))]),
        ("qxqyx", [8] * 5, [rows_of((0, 0, 8), (2, 0, 8)), rows_of((1, 0, 8), (4, 0, 8)), rows_of((3, 0, 8))]),
        ("qqqq", [60, 40, 70, 30], [rows_of((0, 0, 60), (1, 0, 40)), rows_of((2, 0, 70), (3, 0, 30))]),
        ("qq", [250, 50], [rows_of((0, 0, 100)), rows_of((0, 100, 200)), rows_of((0, 200, 250), (1, 0, 50))]),
        ("qq", [60, 60], [rows_of((0, 0, 60), (1, 0, 40)), rows_of((1, 40, 60))]),
        ("", [], []),
    ],
)
def test_rows_of_one_key_are_stacked_up_to_a_limit(
    keys: str, rows: list[int], stacks: list[list[tuple[int, slice]]]
) -> None:
    assert solver.stacked(keys, rows, 100) == stacks


def test_errors_of_bfloat16_weights_are_told_to_some_thousandths() -> None:
    weight, hessian = layer(rows=512, columns=300)
    weight = weight.bfloat16()
    start = nearest(weight, SPECS["int4/channel"])
    form = QuadraticForm(hessian, torch.bfloat16)
    for rows, exactly in (
        (difference(weight, start, torch.bfloat16), (weight - multiplied_out(start)).double()),
        (weight, weight.double()),
    ):
        assert form.of(rows) == pytest.approx(float((exactly @ hessian.double() * exactly).sum()), rel=3e-3)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.type == "int"])
def test_without_torchscript_python_runs_the_same_loop_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(columns=96)
    start = nearest(weight, SPECS[name])
    scripted, outcome = gptq(weight, hessian, start, GptqOptions(block_size=40))
    assert isinstance(loop.scripted(), torch.jit.ScriptFunction)
    monkeypatch.setattr(loop, "scripted", lambda: loop._integers)
    by_python, again = gptq(weight, hessian, start, GptqOptions(block_size=40))
    assert torch.equal(scripted.codes.view(torch.uint8), by_python.codes.view(torch.uint8))
    assert outcome == again


@pytest.mark.parametrize("damping", [0.0001, 0.01, 1.0])
def test_the_error_is_that_of_the_output_where_damping_is_most_of_the_loss(damping: float) -> None:
    weight, _ = layer(columns=96)
    inputs = torch.randn(12, 96, generator=torch.Generator().manual_seed(5)) + 3
    solved, outcome = gptq(weight, inputs.T @ inputs, nearest(weight, INT4), GptqOptions(damping=damping))
    outputs = (weight - multiplied_out(solved)).double() @ inputs.double().T
    assert outcome.error == pytest.approx(float(outputs.square().sum()), rel=1e-3)


def test_the_block_size_changes_nothing_but_rounding() -> None:
    weight, hessian = layer(rows=40, columns=200)
    start = nearest(weight, SPECS["int4/channel"])
    codes = [gptq(weight, hessian, start, GptqOptions(block_size=size))[0].codes for size in (1, 7, 128, 4096)]
    assert all((other != codes[0]).float().mean() < 1e-3 for other in codes)


def test_inputs_and_weights_stay_as_they_were() -> None:
    weight, hessian = layer()
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, nearest(weight, INT4), GptqOptions())
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_dead_inputs_are_rounded_to_nearest() -> None:
    weight, hessian = layer()
    dead = [3, 17, 18]
    hessian[dead], hessian[:, dead] = 0, 0
    start = nearest(weight, INT4)
    solved, outcome = gptq(weight, hessian, start, GptqOptions())
    assert outcome.dead_columns == 3
    assert torch.equal(solved.codes[:, dead], start.codes[:, dead])


def test_a_hessian_of_zeros_means_rounding_to_nearest() -> None:
    weight, hessian = layer()
    start = nearest(weight, INT4)
    solved, outcome = gptq(weight, torch.zeros_like(hessian), start, GptqOptions())
    assert torch.equal(solved.codes, start.codes)
    assert (outcome.error, outcome.before, outcome.dead_columns) == (0.0, 0.0, 64)


def test_fewer_tokens_than_columns_are_enough() -> None:
    weight, hessian = layer(tokens=10)
    solved, outcome = gptq(weight, hessian, nearest(weight, INT4), GptqOptions())
    assert outcome.error < 0.5 * outcome.before  # ten directions matter, and there are 64 columns to serve them
    assert outcome.damping == 0.01
    assert solved.codes.abs().max() <= 8


def test_rows_of_zeros_get_codes_of_zero() -> None:
    weight, hessian = layer()
    weight[5] = 0
    solved, _ = gptq(weight, hessian, nearest(weight, INT4), GptqOptions())
    assert not solved.codes[5].any()


def test_damping_grows_until_the_hessian_is_positive_and_says_so() -> None:
    weight, hessian = layer()
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(64)  # rounding can do this to a singular one
    _, outcome = gptq(weight, hessian, nearest(weight, INT4), GptqOptions(damping=0.001))
    assert outcome.damping == pytest.approx(0.1)


def test_a_hessian_that_cannot_be_one_is_refused() -> None:
    weight, hessian = layer()
    start = nearest(weight, INT4)
    with pytest.raises(ValueError, match="not positive definite even with a damping of 1"):
        gptq(weight, -hessian + 3 * torch.diag(hessian.diagonal()).sqrt(), start, GptqOptions())


def test_one_triangle_is_kept_until_the_other_is_factored() -> None:
    _, hessian = layer(columns=700, tokens=2000)
    matrix = hessian.clone()
    assert not cholesky_(matrix, -hessian.diagonal())
    assert torch.equal(matrix, hessian - 2 * hessian.diagonal().diag())
    assert cholesky_(matrix, hessian.diagonal())
    wanted = hessian.double()
    assert (matrix.double().T @ matrix.double() - wanted).norm() < 1e-6 * wanted.norm()
    assert not matrix.tril(-1).any()


def test_a_failure_after_some_blocks_leaves_the_matrix_as_it_was() -> None:
    _, hessian = layer(columns=700, tokens=2000)
    diagonal = hessian.diagonal().clone()
    diagonal[600] = -1
    matrix = hessian.clone()
    assert not cholesky_(matrix, diagonal)
    assert torch.equal(matrix, hessian - hessian.diagonal().diag() + diagonal.diag())


@given(st.integers(1, 80), st.randoms(use_true_random=False))
def test_matrices_are_brought_into_an_order_in_place(size: int, random: Random) -> None:
    order = torch.tensor(random.sample(range(size), size))
    matrix = torch.arange(size * size).view(size, size)
    wanted = matrix[order][:, order]
    reorder_(matrix, order)
    assert torch.equal(matrix, wanted)
    assert torch.equal(reverse_(matrix), wanted.flip(0, 1))


def test_an_error_that_rounding_brings_below_zero_is_none() -> None:
    outcome = Outcome(error=-1e-9, before=2.0, size=4.0, damping=1.0, dead_columns=0)
    assert [outcome.relative(outcome.error), outcome.relative(outcome.before)] == [0.0, 0.5]
