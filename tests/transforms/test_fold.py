"""Folding: what is computed in which width, and which scales are refused. That it changes no logit: the zoo's test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompiler.ir.graph import Graph
from qcompiler.patterns.rescaling import RescaleSite, rescale_sites
from qcompiler.transforms.fold import fold
from tests.patterns.drawing import ATEN, Drawing


def repeated() -> tuple[Graph, RescaleSite]:
    """A linear of 2 channels, each feeding 2 features of another."""
    d = Drawing()
    out = d.linear("out", d.op(ATEN.repeat.default, d.linear("up", d.x, 2), [1, 1, 2]))
    graph = d.done(out)
    (site,) = rescale_sites(graph)[0]
    return graph, site


def weights(graph: Graph, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: p.detach().to(dtype) for name, p in graph.model.named_parameters()}


SCALE = torch.tensor([0.3, 1.7, 0.3, 1.7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_divided_and_columns_multiplied_with_one_rounding(dtype: torch.dtype) -> None:
    graph, site = repeated()
    before, after = weights(graph, dtype), weights(graph, dtype)
    fold(site, SCALE, after)
    rows = SCALE[:2]
    expected = before | {
        "layers.0.up.weight": (before["layers.0.up.weight"].float() / rows[:, None]).to(dtype),
        "layers.0.up.bias": (before["layers.0.up.bias"].float() / rows).to(dtype),
        "layers.0.out.weight": (before["layers.0.out.weight"].float() * SCALE).to(dtype),
    }
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_weights_are_replaced_and_not_written_to() -> None:
    graph, site = repeated()
    before = weights(graph, torch.float32)
    copies = {name: weight.clone() for name, weight in before.items()}
    fold(site, SCALE, dict(before))
    assert all(torch.equal(before[name], copies[name]) for name in copies)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([0.3, 1.7, 0.3], "a scale of shape \\(3,\\) for 4 features"),
        ([0.0, 1.7, 0.0, 1.7], "positive and finite"),
        ([-1.0, 1.7, -1.0, 1.7], "positive and finite"),
        ([float("inf"), 1.7, float("inf"), 1.7], "positive and finite"),
        ([float("nan"), 1.7, float("nan"), 1.7], "positive and finite"),
        ([0.3, 1.7, 0.4, 1.7], "one channel of layers.0.up.weight have different scales"),
    ],
)
def test_a_scale_that_cannot_be_folded_changes_nothing(scale: list[float], message: str) -> None:
    graph, site = repeated()
    after = weights(graph, torch.float32)
    before = dict(after)
    with pytest.raises(ValueError, match=message):
        fold(site, torch.tensor(scale), after)
    assert all(after[name] is before[name] for name in before)
