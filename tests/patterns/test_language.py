"""Patterns: what walks reach and pass, what checks say, and how a near miss is explained."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import fx
from transformers import PreTrainedModel

from qcompiler.ir.annotations import Leaf, LeafKind, annotate
from qcompiler.ir.fx import is_op
from qcompiler.ir.graph import Graph
from qcompiler.patterns import Check, Match, NearMiss, Pattern, Walk, leaf, op
from qcompiler.patterns.language import Test as Question
from qcompiler.patterns.transformer import (
    ATTENTIONS,
    GATED_PRODUCT,
    LOW_RANK,
    MLP,
    ROUTED_EXPERTS,
    SCALAR_GATE,
    TOP_K,
)
from qcompiler.patterns.vocabulary import source
from tests.capture.models import captured

ATEN = torch.ops.aten


def gated(*, second: str = "up", through: bool = True) -> tuple[Graph, dict[str, fx.Node]]:
    """silu(gate(x)) * up(x), with a relu6 more where `through` is false."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    gate, up = (_linear(graph, x, name) for name in ("gate", second))
    activated = graph.call_function(ATEN.silu.default, (gate,))
    if not through:
        activated = graph.call_function(ATEN.cumsum.default, (activated, -1))
    product = graph.call_function(ATEN.mul.Tensor, (activated, up))
    graph.output(product)
    nodes = {"x": x, "gate": gate, "up": up, "silu": activated, "product": product}
    return Graph(graph, cast(PreTrainedModel, torch.nn.Module())), nodes


def _linear(graph: fx.Graph, x: fx.Node, path: str) -> fx.Node:
    node = graph.call_module(path, (x,))
    annotate(node, Leaf(LeafKind.LINEAR, path, "Linear", 16, 4, 4))
    return node


LINEAR = leaf(LeafKind.LINEAR)
PRODUCT = Pattern(
    "product",
    anchor=op("aten.mul"),
    parts=(
        Walk("gate", "back", operand=0, through={"aten.silu"}, to=LINEAR),
        Walk("up", "back", operand=1, to=LINEAR),
        Check("both read x", lambda m: source(m.one("gate")) is source(m.one("up"))),
    ),
)


def test_a_match_names_what_each_part_found() -> None:
    graph, nodes = gated()
    (match,) = PRODUCT.matches(graph)
    assert match["anchor"] == (nodes["product"],)
    assert (match.one("gate"), match.one("up")) == (nodes["gate"], nodes["up"])
    assert PRODUCT.near_misses(graph) == []


def test_a_blocked_walk_says_what_was_in_the_way() -> None:
    graph, nodes = gated(through=False)
    assert list(PRODUCT.matches(graph)) == []
    (miss,) = PRODUCT.near_misses(graph)
    assert (miss.anchor, miss.held) == (nodes["product"], 0)
    assert (
        miss.why == "product: walking back from %mul_tensor to gate (a linear) stopped at %cumsum_default (aten.cumsum)"
    )


def test_a_failed_check_says_its_condition() -> None:
    graph, nodes = gated()
    nodes["up"].args = (graph.fx.call_function(ATEN.relu.default, (nodes["x"],)),)
    (miss,) = PRODUCT.near_misses(graph)
    assert (miss.held, miss.why) == (2, "product: it does not hold that both read x")


def test_near_misses_are_sorted_nearest_first() -> None:
    graph, nodes = gated(through=False)
    with graph.fx.inserting_before(nodes["product"]):
        near = graph.fx.call_function(ATEN.mul.Tensor, (nodes["gate"], nodes["x"]))
    assert [miss.anchor for miss in PRODUCT.near_misses(graph)] == [near, nodes["product"]]


def test_a_walk_to_one_node_refuses_several_unless_many() -> None:
    graph, nodes = gated()
    both = Walk("linears", "back", through={"aten.silu"}, to=LINEAR)
    miss = Pattern("any", op("aten.mul"), (both,)).try_at(nodes["product"])
    assert isinstance(miss, NearMiss)
    assert miss.why.endswith("reached 2 nodes: %up, %gate")
    many = Walk("linears", "back", through={"aten.silu"}, to=LINEAR, many=True)
    match = Pattern("any", op("aten.mul"), (many,)).try_at(nodes["product"])
    assert isinstance(match, Match)
    assert set(match["linears"]) == {nodes["gate"], nodes["up"]}
    assert graph.output is nodes["product"]


def test_a_forward_walk_ends_at_the_edge_of_the_graph() -> None:
    _, nodes = gated()
    walk = Walk("next", "forward", through={"aten.mul", "aten.silu"}, to=op("aten.relu"))
    miss = Pattern("next", LINEAR, (walk,)).try_at(nodes["gate"])
    assert isinstance(miss, NearMiss)
    assert "stopped at %output" in miss.why


def test_a_walk_passes_leaves_only_of_the_kinds_it_names() -> None:
    graph, nodes = gated()
    annotate(nodes["silu"], Leaf(LeafKind.NORM, "norm", "Norm", 4))
    through_norms = Walk("gate", "back", operand=0, through_leaves={LeafKind.NORM}, to=LINEAR)
    assert list(Pattern("normed", op("aten.mul"), (through_norms,)).matches(graph))
    assert not list(PRODUCT.matches(graph))  # silu is a leaf now, whatever it calls


def _residual_stream(length: int) -> tuple[Graph, list[fx.Node]]:
    """x + linear(x) + linear(x) + ...: whatever is added is read by all that follows."""
    graph = fx.Graph()
    x = stream = graph.placeholder("x")
    linears = [_linear(graph, x, f"linear{i}") for i in range(length)]
    for linear in linears:
        stream = graph.call_function(ATEN.add.Tensor, (stream, linear))
    graph.output(stream)
    return Graph(graph, cast(PreTrainedModel, torch.nn.Module())), linears


@pytest.mark.parametrize("length", [10, 100])
def test_what_reaches_nothing_is_walked_once_however_many_walks_meet_it(length: int) -> None:
    graph, linears = _residual_stream(length)
    asked: list[fx.Node] = []

    def ranked(node: fx.Node) -> bool:
        asked.append(node)
        return is_op(node, "aten.topk")

    walk = Walk("choice", "forward", through={"aten.add"}, to=Question("a ranking", ranked), many=True)
    assert not list(Pattern("ranked", LINEAR, (walk,)).matches(graph))
    assert len(asked) == length + 1  # every sum, and the output
    graph.fx.call_function(ATEN.topk.default, (linears[-1], 1))
    assert [match.anchor for match in Pattern("ranked", LINEAR, (walk,)).matches(graph)] == [linears[-1]]


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gemma3n_text", "gpt_oss"])
def test_all_matches_of_a_pattern_are_those_of_its_anchors_one_by_one(model_type: str) -> None:
    graph = captured(model_type)
    for pattern in (*ATTENTIONS, MLP, GATED_PRODUCT, ROUTED_EXPERTS, TOP_K, SCALAR_GATE, LOW_RANK):
        tried = [pattern.try_at(node) for node in graph.nodes if pattern.anchor.holds(node)]
        assert list(pattern.matches(graph)) == [found for found in tried if isinstance(found, Match)]


def test_only_the_anchors_asked_for_are_matched() -> None:
    graph = captured("llama")
    everything = [match.anchor for match in GATED_PRODUCT.matches(graph)]
    assert [m.anchor for m in GATED_PRODUCT.matches(graph, lambda n: n is not everything[0])] == everything[1:]


def test_either_of_two_tests_holds() -> None:
    _, nodes = gated()
    either = op("aten.mul") | leaf(LeafKind.LINEAR)
    assert [either.holds(nodes[n]) for n in ("product", "gate", "silu")] == [True, True, False]
    assert either.says == "aten.mul or a linear"


def test_in_a_real_model_each_layer_matches_once_and_rotary_products_are_near_misses() -> None:
    graph = captured("llama")
    assert len(list(GATED_PRODUCT.matches(graph))) == graph.model.config.num_hidden_layers
    assert all(miss.why.startswith("gated product: ") for miss in GATED_PRODUCT.near_misses(graph))
    assert GATED_PRODUCT.near_misses(graph)
