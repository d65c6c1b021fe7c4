"""Lower a calibrated graph: linears become quantized operations that name their layer."""

from __future__ import annotations

from qcompiler.ir.annotations import Observer, get, inherit, scheme_of
from qcompiler.ir.edit import insert
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import fake_quantize, fake_quantize_cache, observe, quantized_linear


def lower_graph(graph: Graph) -> None:
    """Replace `linear` by `quantized_linear`, with `fake_quantize` before it where its input is quantized.

    Observers of inputs go; those of a quantized cache become what rounds it.
    """
    for node in graph.nodes:
        if node.target is observe:
            _lower_observer(graph, node)
    for node, leaf in list(graph.linears()):
        scheme = scheme_of(node)
        if scheme is None:
            continue
        x = tensor_arg(node, 0)
        assert x is not None
        if scheme.input_activations is not None:
            x = insert(graph, fake_quantize, (x, leaf.path), before=node, like=x)
        lowered = insert(graph, quantized_linear, (x, leaf.path), before=node, like=node)
        inherit(lowered, node)
        node.replace_all_uses_with(lowered)
        graph.fx.erase_node(node)


def _lower_observer(graph: Graph, node: Node) -> None:
    source, observer = tensor_arg(node, 0), get(node, Observer)
    assert source is not None
    if observer is not None and observer.purpose != "input":
        args = (source, observer.consumers[0], observer.purpose)
        source = insert(graph, fake_quantize_cache, args, before=node, like=node)
    node.replace_all_uses_with(source)
    graph.fx.erase_node(node)
