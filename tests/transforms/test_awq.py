"""AWQ's search against one written out over the inputs themselves, in float64 and with nothing left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.numerics import multiplied_out, quantize_weight
from qcompiler.scheme import QuantSpec, preset
from qcompiler.transforms import awq
from qcompiler.transforms.awq import AwqChoice, normalized_mean, search
from qcompiler.transforms.options import AwqOptions
from tests.numerics.cases import WEIGHT_SPECS
from tests.numerics.test_weights import tiles

INT4 = preset("W4A16_ASYM").weights.model_copy(update={"group_size": 32})


def data(*rows: int, columns: int = 96, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Weights, and inputs of which some channels are far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(160, columns, generator=generator) * torch.randn(columns, generator=generator).mul(1.5).exp()
    return [torch.randn(count, columns, generator=generator).mul(0.02).bfloat16() for count in rows], inputs


def rounded(weight: Tensor, spec: QuantSpec) -> Tensor:
    return multiplied_out(quantize_weight(weight, spec, scale_dtype=torch.bfloat16))


def searched(
    weights: list[Tensor],
    inputs: Tensor,
    options: AwqOptions | None = None,
    *,
    spec: QuantSpec = INT4,
    ties: Tensor | None = None,
    **more: Any,
) -> AwqChoice:
    return search(
        weights,
        inputs.abs().mean(0),
        inputs.T @ inputs,
        lambda _, weight, scale: rounded(weight, spec),
        options or AwqOptions(),
        specs=[spec] * len(weights),
        ties=ties,
        **more,
    )


def error(weights: list[Tensor], inputs: Tensor, scale: Tensor, spec: QuantSpec = INT4) -> float:
    """The squared distance of the outputs, by running them."""
    total = 0.0
    for weight in weights:
        scaled = rounded((weight.float() * scale).bfloat16(), spec).double()
        total += float(((inputs.double() / scale) @ scaled.T - inputs.double() @ weight.double().T).square().sum())
    return total


def grid(weights: list[Tensor], inputs: Tensor, options: AwqOptions) -> list[tuple[float, bool, Tensor]]:
    """llm-compressor's points: 20 of them, one of which is no scale at all."""
    mean = inputs.abs().mean(0)
    shares = torch.cat([w.float().abs().unflatten(1, (-1, 32)) for w in weights])
    weight_mean = (shares / (shares.amax(2, keepdim=True) + 1e-6)).flatten(1).mean(0)
    match options.duo_scaling:
        case "both":
            points = [(i / (options.grid // 2 - 1), duo) for i in range(options.grid // 2) for duo in (False, True)]
        case True:
            points = [(0.0, False)] + [(i / (options.grid - 2), True) for i in range(options.grid - 1)]
        case _:
            points = [(i / (options.grid - 1), False) for i in range(options.grid)]
    found = []
    for ratio, duo in points:
        scale = mean**ratio
        if duo:
            scale = scale / (weight_mean ** (1 - ratio) + 1e-4)
        scale = scale.clamp(min=1e-4)
        found.append((ratio, duo, scale / (scale.max() * scale.min()).sqrt()))
    return found


@pytest.mark.parametrize("duo", [True, False, "both"])
def test_the_best_of_llm_compressors_grid_is_found(duo: bool) -> None:
    weights, inputs = data(700, 40)  # more rows than are multiplied at once, and a second weight
    options = AwqOptions(duo_scaling=duo)
    every = [(error(weights, inputs, scale), ratio, duo, scale) for ratio, duo, scale in grid(weights, inputs, options)]
    least, ratio, with_weights, scale = min(every, key=lambda point: point[0])
    choice = searched(weights, inputs, options)
    assert choice.candidate is not None
    assert (choice.candidate.ratio, choice.candidate.duo) == (pytest.approx(ratio), with_weights)
    assert torch.allclose(choice.scale, scale, rtol=1e-4)
    assert choice.error == pytest.approx(least, rel=3e-3)
    assert choice.before == pytest.approx(error(weights, inputs, torch.ones(96)), rel=3e-3)
    assert choice.error < 0.8 * choice.before


def test_the_largest_quarter_of_the_rows_says_which_points_are_compared_on_all() -> None:
    weights, inputs = data(700, 40)
    seen: list[int] = []

    def counted(_: int, weight: Tensor, scale: Tensor) -> Tensor:
        seen.append(len(weight))
        return rounded(weight, INT4)

    search(weights, inputs.abs().mean(0), inputs.T @ inputs, counted, AwqOptions(grid=11), specs=[INT4] * 2)
    assert seen.count(175) == seen.count(10) == 10
    assert seen.count(700) == 1 + 3


@pytest.mark.parametrize("spec", [INT4, preset("NVFP4").weights], ids=["rows apart", "rows together"])
def test_side_by_side_and_in_pieces_the_choice_is_the_same(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = data(700, 40)
    alone = searched(weights, inputs, spec=spec)
    monkeypatch.setattr(awq, "_ELEMENTS", 96 * 64)
    in_pieces = searched(weights, inputs, spec=spec)
    with ThreadPoolExecutor(3) as pool:
        side_by_side = searched(weights, inputs, spec=spec, each=lambda of, scales: list(pool.map(of, scales)))
    for choice in (in_pieces, side_by_side):
        assert torch.equal(choice.scale, alone.scale)
        assert (choice.error, choice.before) == pytest.approx((alone.error, alone.before), rel=1e-6)
    assert (side_by_side.error, side_by_side.before) == (in_pieces.error, in_pieces.before)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_rows_that_make_the_error_are_among_those_that_say_so(seed: int) -> None:
    """A few rows are far larger than the rest, and not like them."""
    (weight,), inputs = data(520, seed=seed)
    weight[5::40, ::7] *= 300
    least = min(error([weight], inputs, scale) for _, _, scale in grid([weight], inputs, AwqOptions()))
    assert searched([weight], inputs).error == pytest.approx(least, rel=3e-3)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(WEIGHT_SPECS)), st.integers(0, 10**6), st.booleans())
def test_a_scale_is_never_worse_than_none(name: str, seed: int, duo: bool) -> None:
    spec = WEIGHT_SPECS[name]
    weights, inputs = data(20, seed=seed)
    choice = searched(weights, inputs, AwqOptions(grid=6, duo_scaling=duo), spec=spec)
    assert choice.error <= choice.before
    assert bool((choice.scale > 0).all() and choice.scale.isfinite().all())
    measured, none = (error(weights, inputs, scale, spec) for scale in (choice.scale, torch.ones(96)))
    assert measured <= none * (1 + 3e-3)


def test_what_cannot_be_improved_is_left_alone() -> None:
    weights, inputs = data(8)
    choice = search(
        weights, inputs.abs().mean(0), inputs.T @ inputs, lambda _, weight, scale: weight, AwqOptions(), specs=[INT4]
    )
    assert choice.candidate is None
    assert torch.equal(choice.scale, torch.ones(96))
    assert (choice.error, choice.before) == (0, 0)


def test_tied_channels_get_one_scale_and_it_helps() -> None:
    weights, inputs = data(64)
    inputs[:, 48:] = inputs[:, :48] + 0.3 * torch.randn(160, 48, generator=torch.Generator().manual_seed(1))
    ties = torch.arange(48).repeat(2)
    choice = searched(weights, inputs, ties=ties)
    assert torch.equal(choice.scale[:48], choice.scale[48:])
    assert choice.error < 0.9 * choice.before
    assert choice.error == pytest.approx(error(weights, inputs, choice.scale), rel=3e-3)
    assert not torch.equal(searched(weights, inputs).scale[:48], searched(weights, inputs).scale[48:])


@pytest.mark.parametrize("duo_scaling", [False, True])
def test_tied_channels_get_one_scale_wherever_they_stand(duo_scaling: bool) -> None:
    """A power is computed otherwise in the last features than in the vectors before them."""
    weights, inputs = data(24, columns=60)
    tried: list[Tensor] = []

    def each(error: Callable[[Tensor], float], scales: Sequence[Tensor]) -> list[float]:
        tried.extend(scales)
        return [error(scale) for scale in scales]

    options, spec = AwqOptions(duo_scaling=duo_scaling), preset("W8A8").weights
    searched(weights, inputs, options, spec=spec, ties=torch.arange(12).repeat(5), each=each)
    assert len(tried) == 20
    for scale in tried:
        assert all(torch.equal(part, scale[:12]) for part in scale.split(12))


def test_dead_channels_keep_a_scale_of_one_and_change_no_other() -> None:
    weights, inputs = data(32)
    dead = inputs.clone()
    dead[:, [3, 40]] = 0
    choice = searched(weights, dead, AwqOptions(duo_scaling=False))
    assert choice.candidate is not None
    assert torch.equal(choice.scale[[3, 40]], torch.ones(2))
    rest = choice.scale[dead.abs().amax(0) > 0]
    assert float(rest.max() * rest.min()) == pytest.approx(1, rel=1e-5)


def test_inputs_that_are_all_zero_mean_no_scale() -> None:
    weights, inputs = data(8)
    choice = searched(weights, torch.zeros_like(inputs))
    assert choice.candidate is None
    assert choice.error == 0


@pytest.mark.parametrize("duo", [True, False, "both"])
@pytest.mark.parametrize("points", [2, 3, 10, 11])
def test_as_many_points_are_tried_as_the_grid_has(points: int, duo: bool) -> None:
    weights, inputs = data(8)
    tried = 0

    def counted(_: int, weight: Tensor, scale: Tensor) -> Tensor:
        nonlocal tried
        tried += 1
        return torch.full_like(weight, 0.5)

    options = AwqOptions(grid=points, duo_scaling=duo)
    search([weights[0][:1]], inputs.abs().mean(0), inputs.T @ inputs, counted, options, specs=[INT4])
    assert tried == points


@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_weights_are_averaged_as_shares_of_the_largest_that_shares_their_scale(name: str) -> None:
    weights, _ = data(40, 20)
    shares = [weight.float() for weight in weights]
    for share in shares:
        for tile in tiles(share, WEIGHT_SPECS[name]):
            tile.copy_(tile.abs() / (tile.abs().max() + 1e-6))
    assert torch.allclose(normalized_mean(weights, [WEIGHT_SPECS[name]] * 2), torch.cat(shares).mean(0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_weights_stay_as_they_were(name: str, dtype: torch.dtype) -> None:
    weights = [weight.to(dtype) for weight in data(24, 16)[0]]
    before = [weight.clone() for weight in weights]
    normalized_mean(weights, [WEIGHT_SPECS[name]] * 2)
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, before, strict=True))


def test_a_scale_under_which_float16_overflows_is_none_of_the_candidates() -> None:
    (weight,), inputs = data(64)
    mean = inputs.abs().mean(0)
    loudest = int(mean.argmax())
    half = weight.half()
    half[0, loudest] = 30_000  # any scale above 2 in the loudest channel is one too many
    for options in (AwqOptions(duo_scaling=False), AwqOptions()):
        choice = searched([half], inputs, options)
        assert bool((half.float() * choice.scale).half().isfinite().all())
        assert choice.error <= choice.before
