"""A captured graph: operations that are known, in order, and leaves that say what they are."""

from __future__ import annotations

from qcompiler.ir.annotations import Leaf, Quant, Role, get, get_quant
from qcompiler.ir.fx import Node, is_operator, op_name
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import OPS
from qcompiler.ir.printer import Printer
from qcompiler.ir.rules.rule import Broken, Rule, each


def _known_operation(node: Node) -> str | None:
    if node.op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
        return f"a node of kind {node.op} has no meaning in a captured graph"
    if node.op == "call_function" and not is_operator(node) and node.target not in OPS.values():
        return f"it calls {op_name(node)}, which is neither an operator of torch nor one of {', '.join(OPS)}"
    return None


def _reads_earlier(graph: Graph) -> Broken:
    before: set[Node] = set()
    for node in graph.nodes:
        late = next((source for source in node.all_input_nodes if source not in before), None)
        if late is not None:
            yield node, f"it reads {Printer(graph).name(late)}, which does not stand before it"
        before.add(node)


def _returns_logits(graph: Graph) -> Broken:
    last = graph.nodes[-1]
    if last.op != "output":
        yield last, "the last node is not the output, so the graph returns nothing"
    for node in graph.nodes:
        if node.op == "output" and node is not last:
            yield node, "the graph has a second output"
    if last.op == "output" and len(last.all_input_nodes) != 1:
        yield last, f"the graph returns {len(last.all_input_nodes)} values, and not the logits alone"


def _leaf_annotated(node: Node) -> str | None:
    if node.op == "call_module" and (get(node, Leaf) is None or get(node, Role) is None):
        return "a called module has no Leaf and Role annotation, so no pass knows what it is"
    return None


def _annotated_leaf(node: Node) -> str | None:
    found = {"Role": get(node, Role), "Quant": get(node, Quant)}
    stray = [name for name, annotation in found.items() if annotation is not None]
    return f"it has a {' and a '.join(stray)} annotation, but is no leaf" if stray and get(node, Leaf) is None else None


def _module_exists(graph: Graph) -> Broken:
    known = {path for path, _ in graph.model.named_modules()}
    for node, leaf in graph.leaves():
        if leaf.path not in known:
            yield node, f"the model has no module {leaf.path!r}"
        elif node.op == "call_module" and node.target != leaf.path:
            yield node, f"it calls {node.target!r}, but its Leaf annotation is that of {leaf.path!r}"


def _no_quant(node: Node) -> str | None:
    return "it is annotated with a scheme, but no pass has assigned one" if get_quant(node) else None


def _no_inserted(node: Node) -> str | None:
    return f"{node.name} is an inserted operation" if node.target in OPS.values() else None


STRUCTURE = (
    each("known-operation", _known_operation),
    Rule("reads-earlier-nodes", _reads_earlier),
    Rule("returns-logits", _returns_logits),
    each("leaf-annotated", _leaf_annotated),
    each("annotated-leaf", _annotated_leaf),
    Rule("module-exists", _module_exists),
)
"""At any stage."""

NO_SCHEME = each("no-quant", _no_quant)
NOTHING_INSERTED = each("no-inserted-operation", _no_inserted)
