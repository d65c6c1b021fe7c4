"""A legal graph at every stage, and ways to edit one by hand, past what the passes would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from torch import fx

from qcompiler.ir.annotations import Observer, Quant, Scope, annotate, get, get_quant, need, set_quant
from qcompiler.ir.graph import Graph, Stage
from qcompiler.lowering.rewrite import lower_graph
from tests.passes.models import assign, copied, rule, run

WEIGHTS_ALONE = {"weights": {"type": "int", "bits": 8, "group_size": 16}}
PASSES = (
    assign(
        rule("FP8", structure=["attention-input", "attention-output"]),
        rule(WEIGHTS_ALONE, structure=["mlp-input", "mlp-output"]),
        kv_cache={},
    ),
    "insert-observers",
)


@cache
def legal(stage: Stage) -> Graph:
    """A graph at this stage: attention with static scales, an MLP of codes alone, a quantized cache, a dense head."""
    if stage is Stage.LOWERED:
        graph = copied(legal(Stage.CALIBRATED))
        lower_graph(graph)
        return replace(graph, stage=stage)
    graph = run("llama", *PASSES[: min(stage, Stage.OBSERVED)]).graph
    return replace(graph, stage=stage)  # calibration changes no graph


def leaf(graph: Graph, path: str) -> fx.Node:
    return next(node for node, found in graph.leaves() if found.path == path)


def op(graph: Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == name)


def observers(graph: Graph, purpose: str) -> list[fx.Node]:
    found = ((node, get(node, Observer)) for node in graph.nodes)
    return [node for node, observer in found if observer is not None and observer.purpose == purpose]


def insert(graph: Graph, target: Callable[..., Any], *args: Any, like: fx.Node) -> fx.Node:
    """A new call before `like`, described as `like` is and annotated with its scope alone."""
    with graph.fx.inserting_before(like):
        node = graph.fx.call_function(target, args)
    node.meta["val"] = like.meta["val"]
    annotate(node, need(like, Scope))
    return node


def without(node: fx.Node, *kinds: type) -> None:
    node.meta["qcompiler"] = {kind: fact for kind, fact in node.meta["qcompiler"].items() if kind not in kinds}


def changed(node: fx.Node, kind: type[Any], /, *, like: fx.Node | None = None, **said: Any) -> fx.Node:
    """Annotate a node with what it has of a kind, or `like` has, but for what is `said`."""
    annotate(node, replace(need(like or node, kind), **said), replacing=get(node, kind))
    return node


def requant(node: fx.Node, quant: Quant) -> fx.Node:
    set_quant(node, quant, replacing=get_quant(node))
    return node


def erase(graph: Graph, *nodes: fx.Node) -> None:
    """Take nodes out that pass on what they read."""
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        graph.fx.erase_node(node)


def again(graph: Graph, node: fx.Node) -> fx.Node:
    """A second call of the module that `node` calls."""
    with graph.fx.inserting_after(node):
        return graph.fx.node_copy(node)
