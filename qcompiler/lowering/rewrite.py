"""Lower a calibrated graph: linears become quantized operations that name their layer, observers go."""

from __future__ import annotations

from qcompiler.ir.annotations import Role, Scope, annotate, get_quant, need, set_quant
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import fake_quantize, observe, quantized_linear
from qcompiler.lowering.sites import scheme_of


def lower_graph(graph: Graph) -> None:
    """Replace `linear` by `quantized_linear`, with `fake_quantize` before it where its input is quantized."""
    for node in graph.nodes:
        if node.target is observe:
            source = tensor_arg(node, 0)
            assert source is not None
            node.replace_all_uses_with(source)
            graph.fx.erase_node(node)
    for node, leaf in list(graph.linears()):
        scheme = scheme_of(node)
        if scheme is None:
            continue
        x = tensor_arg(node, 0)
        assert x is not None
        with graph.fx.inserting_before(node):
            if scheme.input_activations is not None:
                rounded = graph.fx.call_function(fake_quantize, (x, leaf.path))
                _describe(rounded, x, need(node, Scope))
                x = rounded
            lowered = graph.fx.call_function(quantized_linear, (x, leaf.path))
        _describe(lowered, node, need(node, Scope))
        annotate(lowered, leaf)
        annotate(lowered, need(node, Role))
        quant = get_quant(node)
        assert quant is not None
        set_quant(lowered, quant)
        node.replace_all_uses_with(lowered)
        graph.fx.erase_node(node)


def _describe(new: Node, like: Node, scope: Scope) -> None:
    new.meta = {key: value for key, value in like.meta.items() if key in ("val", "tensor_meta")}
    annotate(new, scope)
