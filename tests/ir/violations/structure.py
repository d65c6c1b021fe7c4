"""Edits that break the rules of any stage, and those before schemes and observers."""

from __future__ import annotations

from torch import fx

from qcompiler.ir.annotations import Leaf, Role, annotate
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import observe
from tests.ir.graphs import changed, insert, leaf, op, requant, without
from tests.ir.violations.case import ACTIVATION, DENSE, DOWN, HEAD, NORM, Q, breaks


@breaks("known-operation", "a node of kind call_method has no meaning in a captured graph", module=ACTIVATION)
def a_method_is_called(graph: Graph) -> fx.Node:
    node = op(graph, "silu")
    node.op, node.target = "call_method", "relu"
    return node


@breaks(
    "known-operation",
    "it calls double, which is neither an operator of torch nor one of observe, fake_quantize, fake_quantize_cache, "
    "quantized_linear",
    module=ACTIVATION,
)
def a_function_of_no_meaning_is_called(graph: Graph) -> fx.Node:
    def double(x: object) -> object:
        return x

    silu = op(graph, "silu")
    return insert(graph, double, silu.args[0], like=silu)


@breaks("reads-earlier-nodes", "it reads %model.norm, which does not stand before it", module=f"(module {DOWN})")
def a_linear_reads_what_comes_later(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = (leaf(graph, "model.norm"), *node.args[1:])
    return node


@breaks("returns-logits", "the last node is not the output, so the graph returns nothing", module=f"(module {HEAD})")
def nothing_is_returned(graph: Graph) -> fx.Node:
    graph.fx.erase_node(graph.nodes[-1])
    return graph.nodes[-1]


@breaks("returns-logits", "the graph has a second output", module="")
def there_are_two_outputs(graph: Graph) -> fx.Node:
    with graph.fx.inserting_after(op(graph, "silu")):
        return graph.fx.create_node("output", "output", (op(graph, "silu"),))


@breaks("returns-logits", "the graph returns 2 values, and not the logits alone", module="")
def two_values_are_returned(graph: Graph) -> fx.Node:
    output = graph.nodes[-1]
    output.args = ((graph.output, leaf(graph, DOWN)),)
    return output


UNKNOWN = "a called module has no Leaf and Role annotation, so no pass knows what it is"


@breaks("leaf-annotated", UNKNOWN, module=f"(in module {NORM})")
def a_module_is_called_without_annotations(graph: Graph) -> fx.Node:
    node = leaf(graph, NORM)
    without(node, Leaf, Role)
    return node


@breaks("leaf-annotated", UNKNOWN, module=f"(module {NORM})")
def a_leaf_has_no_role(graph: Graph) -> fx.Node:
    node = leaf(graph, NORM)
    without(node, Role)
    return node


@breaks("annotated-leaf", "it has a Role annotation, but is no leaf", module=ACTIVATION)
def an_operation_has_a_role(graph: Graph) -> fx.Node:
    node = op(graph, "silu")
    annotate(node, Role(None, 0, None, None, "test"))
    return node


@breaks("annotated-leaf", "it has a Quant annotation, but is no leaf", module=ACTIVATION, since=Stage.ANNOTATED)
def an_operation_has_a_scheme(graph: Graph) -> fx.Node:
    return requant(op(graph, "silu"), DENSE)


@breaks("module-exists", "the model has no module 'model.gone'", module="(module model.gone)")
def a_module_is_gone(graph: Graph) -> fx.Node:
    node = changed(leaf(graph, NORM), Leaf, path="model.gone")
    node.target = "model.gone"
    return node


@breaks(
    "module-exists", f"it calls 'model.norm', but its Leaf annotation is that of {NORM!r}", module=f"(module {NORM})"
)
def another_module_is_called(graph: Graph) -> fx.Node:
    node = leaf(graph, NORM)
    node.target = "model.norm"
    return node


@breaks("no-quant", "it is annotated with a scheme, but no pass has assigned one", module=f"(module {Q})")
def a_captured_linear_has_a_scheme(graph: Graph) -> fx.Node:
    return requant(leaf(graph, Q), DENSE)


@breaks("no-inserted-operation", "observe is an inserted operation", module=f"(in module {Q})")
def an_observer_stands_too_early(graph: Graph) -> fx.Node:
    return insert(graph, observe, leaf(graph, NORM), like=leaf(graph, Q))
