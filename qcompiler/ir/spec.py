"""What must hold of a graph at each stage. The pass manager checks it after every pass.

A spec is a table of rules: a name, what must hold of every node, and how to say it when it does not. Stages add rules; a
rule of an earlier stage holds on unless the table of a later one leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qcompiler.errors import VerificationError
from qcompiler.ir.annotations import Leaf, LeafKind, Observer, Role, get, get_quant
from qcompiler.ir.fx import Node, is_tensor, tensor_arg
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import OPS, fake_quantize, observe, quantized_linear
from qcompiler.ir.printer import Printer
from qcompiler.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on nodes: `broken(node)` returns what is wrong with it, or None."""

    name: str
    broken: Callable[[Node], str | None]


def needs_statistics(scheme: Scheme | None) -> bool:
    """Whether a scheme's input activations carry a number that must be measured on data."""
    return scheme is not None and scheme.input_activations is not None and scheme.input_activations.dynamic is not True


def _quantized(node: Node) -> Scheme | None:
    quant = get_quant(node)
    return quant.scheme if quant else None


def _known_operation(node: Node) -> str | None:
    if node.op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
        return f"a node of kind {node.op} has no meaning in a captured graph"
    return None


def _leaf_annotated(node: Node) -> str | None:
    if node.op == "call_module" and (get(node, Leaf) is None or get(node, Role) is None):
        return "a called module has no Leaf and Role annotation, so no pass knows what it is"
    return None


def _no_quant(node: Node) -> str | None:
    return "it is annotated with a scheme, but no pass has assigned one" if get_quant(node) else None


def _no_inserted(node: Node) -> str | None:
    return f"{node.name} is an inserted operation" if node.target in OPS.values() else None


def _quant_on_linear(node: Node) -> str | None:
    leaf = get(node, Leaf)
    if _quantized(node) and (leaf is None or leaf.kind is not LeafKind.LINEAR):
        return "only linears are quantized, and this is " + (f"a {leaf.kind}" if leaf else "no module")
    return None


def _quant_has_because(node: Node) -> str | None:
    quant = get_quant(node)
    return "it does not say which pass and rule decided its scheme" if quant and not quant.because else None


def _observe_annotated(node: Node) -> str | None:
    if node.target is observe and get(node, Observer) is None:
        return "an observe node does not say what it collects"
    if get(node, Observer) is not None and node.target is not observe:
        return "an Observer annotation stands on a node that observes nothing"
    return None


def _observe_reads_tensor(node: Node) -> str | None:
    if node.target is observe:
        source = tensor_arg(node, 0)
        if source is None or not is_tensor(source):
            return "it observes something that is no tensor"
    return None


def _statistics_observed(node: Node) -> str | None:
    leaf = get(node, Leaf)
    if leaf is None or not needs_statistics(_quantized(node)):
        return None
    source = tensor_arg(node, 0)
    observer = get(source, Observer) if source is not None else None
    if observer is None or leaf.path not in observer.consumers:
        return "its input scale must be measured on data, and no observer stands before it"
    return None


def _no_observe(node: Node) -> str | None:
    return "an observe node is left after lowering" if node.target is observe else None


def _linears_lowered(node: Node) -> str | None:
    return "a linear with a scheme was not lowered" if node.op == "call_module" and _quantized(node) else None


def _names_layer(node: Node) -> str | None:
    if node.target in (fake_quantize, quantized_linear) and not (len(node.args) == 2 and isinstance(node.args[1], str)):
        return "it does not name the layer whose numbers it uses"
    return None


_ALWAYS = (
    Rule("known-operation", _known_operation),
    Rule("leaf-annotated", _leaf_annotated),
)
_ASSIGNED = (
    *_ALWAYS,
    Rule("quant-on-linear", _quant_on_linear),
    Rule("quant-has-because", _quant_has_because),
)
_WATCHED = (
    *_ASSIGNED,
    Rule("observe-annotated", _observe_annotated),
    Rule("observe-reads-tensor", _observe_reads_tensor),
    Rule("statistics-observed", _statistics_observed),
)

SPECS: dict[Stage, tuple[Rule, ...]] = {
    Stage.CAPTURED: (*_ALWAYS, Rule("no-quant", _no_quant), Rule("no-inserted-operation", _no_inserted)),
    Stage.ANNOTATED: (*_ASSIGNED, Rule("no-inserted-operation", _no_inserted)),
    Stage.OBSERVED: _WATCHED,
    Stage.CALIBRATED: _WATCHED,
    Stage.LOWERED: (
        *_ALWAYS,
        Rule("no-observe", _no_observe),
        Rule("linears-lowered", _linears_lowered),
        Rule("names-layer", _names_layer),
    ),
}


def verify(graph: Graph, *, after: str) -> None:
    """Check a graph against the spec of its stage.

    Raises `VerificationError` for the first broken rule: it names the pass (`after`), the node, its module path, and shows
    the lines of IR around it.
    """
    nodes = graph.nodes
    for rule in SPECS[graph.stage]:
        for index, node in enumerate(nodes):
            wrong = rule.broken(node)
            if wrong is not None:
                raise VerificationError(_explain(graph, rule, nodes, index, wrong, after))


def _explain(graph: Graph, rule: Rule, nodes: list[Node], index: int, wrong: str, after: str) -> str:
    node = nodes[index]
    leaf = get(node, Leaf)
    where = f" (module {leaf.path})" if leaf else ""
    printer = Printer(graph)
    first = max(index - 3, 0)
    context = "\n".join(f"  {'>' if n is node else ' '} {printer.line(n)}" for n in nodes[first : index + 4])
    return f"after {after}, the {graph.stage} graph breaks rule {rule.name} at %{node.name}{where}: {wrong}\n{context}"
