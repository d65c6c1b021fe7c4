"""Where scales can move: which channel feeds which feature, what lets a scale pass, and what holds it."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from qcompiler.ir.annotations import LeafKind, Role, Structure, need
from qcompiler.ir.graph import Graph
from qcompiler.patterns.rescaling import RescaleSite, rescale_sites
from tests.patterns.drawing import ATEN, BATCH, TOKENS, Drawing


def site_of(graph: Graph, consumer: fx.Node) -> RescaleSite:
    (site,) = [site for site in rescale_sites(graph)[0] if consumer in site.consumers]
    return site


def refusal(graph: Graph, linear: fx.Node) -> tuple[int, str]:
    """How near a linear came to be rescaled, and why it is not."""
    (miss,) = [miss for miss in rescale_sites(graph)[1] if miss.anchor is linear]
    return miss.held, miss.why


def test_a_norm_feeds_every_linear_that_reads_it_feature_by_feature() -> None:
    d = Drawing()
    norm = d.norm("norm", d.x)
    left, right = d.linear("left", norm), d.linear("right", d.op(ATEN.view.default, norm, [BATCH * TOKENS, 8]))
    graph = d.done(left, right)
    (site,), misses = rescale_sites(graph)
    assert (site.producer, site.consumers, site.tensor) == (norm, (left, right), norm)
    assert site.channels.tolist() == list(range(8))
    assert [gain.name for gain in site.gains] == ["layers.0.norm.weight"]
    assert site.weights == ("layers.0.left.weight", "layers.0.right.weight")
    assert site.kind == "norm -> linear"
    assert misses == ()


def heads(d: Drawing, x: fx.Node, count: int) -> fx.Node:
    split = d.op(ATEN.view.default, x, [BATCH, TOKENS, count, -1])
    return d.op(ATEN.transpose.int, split, 1, 2)


def mixed(d: Drawing, q: fx.Node, k: fx.Node, v: fx.Node, **kwargs: object) -> fx.Node:
    """Attention, and its heads joined again."""
    out = d.op(ATEN.scaled_dot_product_attention.default, q, k, v, **kwargs)
    return d.op(ATEN.reshape.default, d.op(ATEN.transpose.int, out, 1, 2), [BATCH, TOKENS, -1])


def moved(d: Drawing, x: fx.Node, way: str) -> fx.Node:
    """Heads [B, 2, T, 4] of features [B, T, 8], by one of many operations that move elements about."""
    split = d.op(ATEN.view.default, x, [BATCH, TOKENS, 2, 4])
    if way in ("movedim", "moveaxis"):
        return d.op(getattr(ATEN, way).int, split, 2, 1)
    if way in ("swapaxes", "swapdims"):
        return d.op(getattr(ATEN, way).default, split, 1, 2)
    if way == "narrow":
        split = d.op(ATEN.narrow.default, split, -1, 0, 4)
    elif way in ("view_as", "reshape_as"):
        split = d.op(getattr(ATEN, way).default, x, split)
    elif way == "tensor_split":
        split = d.op(operator.getitem, d.op(ATEN.tensor_split.sections, split, 1, -1), 0)
    elif way == "concatenate":
        split = d.op(ATEN.concatenate.default, [d.op(ATEN.slice.Tensor, split, 2, i, i + 1) for i in range(2)], 2)
    return d.op(ATEN.transpose.int, split, 1, 2)


WAYS = ("movedim", "moveaxis", "swapaxes", "swapdims", "narrow", "view_as", "reshape_as", "tensor_split", "concatenate")


@pytest.mark.parametrize("way", WAYS)
def test_heads_are_found_by_whatever_operation_they_are_moved(way: str) -> None:
    d = Drawing()
    q, k, v = (d.linear(name, d.x) for name in "qkv")
    out = d.linear("o", mixed(d, *(moved(d, node, way) for node in (q, k, v))))
    site = site_of(d.done(out), out)
    assert (site.producer, site.channels.tolist()) == (v, list(range(8)))
    assert {need(node, Role).structure for node in (q, k, v)} == {Structure.ATTENTION_INPUT}


@pytest.mark.parametrize("way", ["expand", "broadcast_to", "tile", "repeat_interleave", "enable_gqa"])
def test_queries_of_a_group_share_the_channels_of_their_values(way: str) -> None:
    d = Drawing()
    q, k, v = (heads(d, d.linear(n, d.x, 2 * count), count) for n, count in (("q", 4), ("k", 2), ("v", 2)))
    if way in ("expand", "broadcast_to", "tile"):
        wider = {
            "expand": (ATEN.expand.default, [BATCH, 2, 2, TOKENS, 2]),
            "broadcast_to": (ATEN.broadcast_to.default, [BATCH, 2, 2, TOKENS, 2]),
            "tile": (ATEN.tile.default, [1, 1, 2, 1, 1]),
        }
        operation, sizes = wider[way]
        k, v = (
            d.op(
                ATEN.reshape.default,
                d.op(operation, d.op(ATEN.unsqueeze.default, t, 2), sizes),
                [BATCH, 4, TOKENS, 2],
            )
            for t in (k, v)
        )
    elif way == "repeat_interleave":
        k, v = (d.op(ATEN.repeat_interleave.self_int, t, 2, 1) for t in (k, v))
    out = d.linear("o", mixed(d, q, k, v, **({"enable_gqa": True} if way == "enable_gqa" else {})))
    site = site_of(d.done(out), out)
    assert site.producer.target == "layers.0.v"
    assert site.channels.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert site.tied
    assert [gain.name for gain in site.gains] == ["layers.0.v.weight", "layers.0.v.bias"]


def test_only_the_values_of_a_fused_projection_take_a_scale_wherever_its_rows_stand() -> None:
    d = Drawing()
    fused = heads(d, d.linear("qkv", d.x, 24), 2)  # per head: 4 of q, 4 of k, 4 of v
    parts = d.op(ATEN.split.Tensor, fused, 4, -1)
    q, k, v = (d.op(operator.getitem, parts, i) for i in range(3))
    out = d.linear("o", mixed(d, q, k, v))
    site = site_of(d.done(out), out)
    assert site.channels.tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    assert not site.tied


def test_attention_that_is_spelled_out_is_linear_in_its_values() -> None:
    d = Drawing()
    q, k, v = (heads(d, d.linear(n, d.x), 2) for n in "qkv")
    scores = d.op(ATEN.matmul.default, q, d.op(ATEN.transpose.int, k, 2, 3))
    weights = d.op(ATEN.softmax.int, scores, -1)
    joined = d.op(ATEN.transpose.int, d.op(ATEN.matmul.default, weights, v), 1, 2)
    out = d.linear("o", d.op(ATEN.reshape.default, joined, [BATCH, TOKENS, 8]))
    site = site_of(d.done(out), out)
    assert (site.producer.target, site.channels.tolist()) == ("layers.0.v", list(range(8)))


def test_features_that_are_picked_by_constant_positions_are_followed() -> None:
    d = Drawing()
    two = d.op(ATEN.view.default, d.linear("up", d.x, 16), [BATCH, TOKENS, 2, 8])
    second = d.op(ATEN.index.Tensor, two, [None, None, d.constant(torch.tensor([-1]))])
    out = d.linear("down", d.op(ATEN.reshape.default, second, [BATCH, TOKENS, 8]))
    assert site_of(d.done(out), out).channels.tolist() == list(range(8, 16))


def gated(d: Drawing, activation: Callable[..., object]) -> tuple[fx.Node, fx.Node, fx.Node]:
    gate, up = d.linear("gate", d.x), d.linear("up", d.x)
    return gate, up, d.linear("down", d.op(ATEN.mul.Tensor, d.op(activation, gate), up))


@pytest.mark.parametrize("activation", [ATEN.silu.default, ATEN.relu.default])
def test_a_product_is_linear_in_the_factor_without_an_activation(activation: Callable[..., object]) -> None:
    d = Drawing()
    _, up, down = gated(d, activation)
    assert site_of(d.done(down), down).producer is up


def test_relu_lets_positive_scales_pass_and_gelu_does_not() -> None:
    d = Drawing()
    relu = d.linear("relu_out", d.op(ATEN.relu.default, d.linear("relu_in", d.x)))
    gelu = d.linear("gelu_out", d.op(ATEN.gelu.default, d.linear("gelu_in", d.x)))
    graph = d.done(relu, gelu)
    assert site_of(graph, relu).producer.target == "layers.0.relu_in"
    assert refusal(graph, gelu) == (1, "layers.0.gelu_in: %gelu_default (aten.gelu) is not linear in it")


def residual(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    return d.op(ATEN.add.Tensor, norm, out)


def squared(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    return d.op(ATEN.add.Tensor, out, d.op(ATEN.mul.Tensor, norm, norm))


def divides(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    return d.op(ATEN.div.Tensor, out, norm)


def rounded(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    return d.op(ATEN.mul.Tensor, out, d.op(ATEN.to.dtype, norm, torch.int32))


def padded(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    return d.op(ATEN.add.Tensor, out, d.linear("more", d.op(ATEN.constant_pad_nd.default, norm, [0, 1], 1.0)))


def normalized(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    return d.op(ATEN.add.Tensor, out, d.norm("again", norm))


def repeated(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    twice = d.op(ATEN.repeat_interleave.self_Tensor, norm, d.constant(torch.tensor([2])), 1)
    return d.op(ATEN.matmul.default, d.op(ATEN.transpose.int, out, 1, 2), d.op(ATEN.slice.Tensor, twice, 1, 0, TOKENS))


def returned(d: Drawing, norm: fx.Node, out: fx.Node) -> fx.Node:
    return norm


READERS = {
    residual: "%add_tensor (aten.add) adds to it what is not scaled",
    squared: "%mul_tensor (aten.mul) multiplies it with itself",
    divides: "%div_tensor (aten.div) divides by it",
    rounded: "%to_dtype (aten.to) rounds it",
    padded: "%constant_pad_nd_default (aten.constant_pad_nd) fills in what is not zero",
    repeated: "%repeat_interleave_self_tensor (aten.repeat_interleave) moves it as other values say",
    normalized: "%layers_0_again (norm) takes no scale",
    returned: "%output (output) is the model's output",
}


@pytest.mark.parametrize("other", READERS)
def test_another_reader_that_cannot_undo_the_scale_holds_it(other: Callable[..., fx.Node]) -> None:
    d = Drawing()
    norm = d.norm("norm", d.x)
    out = d.linear("out", norm)
    end = other(d, norm, out)
    graph = d.done(end) if end is not norm else d.done(out, norm)
    assert refusal(graph, out) == (1, f"layers.0.norm: {READERS[other]}")


def test_rotary_embedding_holds_what_it_rotates() -> None:
    d = Drawing()
    q = d.linear("q", d.x)
    halves = d.op(ATEN.cat.default, [d.op(ATEN.slice.Tensor, q, 2, 4, 8), d.op(ATEN.slice.Tensor, q, 2, 0, 4)], -1)
    out = d.linear("out", d.op(ATEN.add.Tensor, q, halves))
    assert "adds to it what is not scaled" in refusal(d.done(out), out)[1]


def test_what_two_linears_read_in_different_orders_is_no_site() -> None:
    d = Drawing()
    norm = d.norm("norm", d.x)
    one, other = d.linear("one", norm), d.linear("other", d.op(ATEN.flip.default, norm, [2]))
    third = d.linear("third", d.op(ATEN.cat.default, [d.op(ATEN.slice.Tensor, d.norm("n", d.x), 2, 0, 4), d.x], -1))
    graph = d.done(one, other, third)
    assert "aten.flip" in refusal(graph, one)[1]
    assert "only some features" in refusal(graph, third)[1]
    e = Drawing()
    norm = e.norm("norm", e.x)
    halves = e.op(
        ATEN.cat.default, [e.op(ATEN.slice.Tensor, norm, 2, 4, 8), e.op(ATEN.slice.Tensor, norm, 2, 0, 4)], -1
    )
    one, other = e.linear("one", norm), e.linear("other", halves)
    assert "as different tensors" in refusal(e.done(one, other), one)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_router_that_reads_the_norm_takes_its_share_of_the_scale(dtype: torch.dtype) -> None:
    d = Drawing()
    norm = d.norm("norm", d.x)
    read = norm if dtype is torch.float32 else d.op(ATEN.to.dtype, norm, dtype)  # routers compute wider
    router, up = d.bare_linear("router", read), d.linear("up", norm)
    site = site_of(d.done(up, router), up)
    assert (site.consumers, site.tensor) == ((router, up), norm)
    assert site.weights == ("layers.0.router.kernel", "layers.0.up.weight")


def test_a_router_whose_weight_is_read_elsewhere_holds_the_scale() -> None:
    d = Drawing()
    norm = d.norm("norm", d.x)
    router, up = d.bare_linear("router", norm), d.linear("up", norm)
    again = d.op(ATEN.sum.default, router.args[1])
    assert refusal(d.done(up, router, again), up) == (2, "layers.0.norm: layers.0.router.kernel is read elsewhere too")


def test_experts_that_read_the_norm_hold_the_scale() -> None:
    d = Drawing()
    norm = d.norm("norm", d.x)
    up = d.linear("up", norm)
    experts = d.leaf("experts", nn.Linear(8, 8), norm, LeafKind.EXPERTS)
    graph = d.done(up, experts)
    why = "layers.0.norm: %layers_0_experts (experts) takes no scale"
    assert refusal(graph, up) == refusal(graph, experts) == (1, why)


def test_tied_weights_stay_as_they_are() -> None:
    d = Drawing()
    first, second = d.linear("first", d.x), d.linear("other", d.x)
    out = d.linear("out", first)
    d.model.layers[0].other.weight = d.model.layers[0].first.weight
    graph = d.done(out, second)
    assert refusal(graph, out) == (2, "layers.0.first: layers.0.first.weight is tied to layers.0.other.weight")


def test_a_module_that_runs_twice_stays_as_it_is() -> None:
    d = Drawing()
    once = d.linear("shared", d.norm("norm", d.x))
    twice = d.linear("shared", once)
    graph = d.done(twice)
    sites, misses = rescale_sites(graph)
    assert sites == ()
    assert {miss.why for miss in misses} == {
        "layers.0.norm: layers.0.shared runs 2 times",
        "layers.0.shared: layers.0.shared runs 2 times",
    }


def test_a_scale_does_not_move_between_layers() -> None:
    d = Drawing()
    first = d.linear("first", d.x)
    out = d.linear("out", first, layer=1)
    assert refusal(d.done(out), out) == (2, "layers.0.first: layers.1.out run in another partition")


def test_a_norm_without_a_weight_takes_no_scale() -> None:
    d = Drawing()
    out = d.linear("out", d.norm("norm", d.x, affine=False))
    assert refusal(d.done(out), out) == (2, "layers.0.norm: it has no weight")


def test_what_reads_the_models_input_has_no_producer() -> None:
    d = Drawing()
    out = d.linear("out", d.x)
    assert refusal(d.done(out), out) == (0, "its input comes from no norm and no linear")
