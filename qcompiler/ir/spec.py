"""What must hold of a graph at each stage. The pass manager checks it after every pass.

A spec is a table of rules: a name, and what finds the nodes that break it, with the words for it. Stages add rules; a
rule of an earlier stage holds on unless the table of a later one leaves it out.
"""

from __future__ import annotations

from qcompiler.errors import VerificationError
from qcompiler.ir.annotations import Leaf, Scope, get
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.printer import Printer
from qcompiler.ir.rules.lowered import LOWERED
from qcompiler.ir.rules.observers import OBSERVERS
from qcompiler.ir.rules.rescales import RESCALES, RESCALES_MEASURED
from qcompiler.ir.rules.rule import Rule
from qcompiler.ir.rules.schemes import SCHEMES
from qcompiler.ir.rules.structure import NO_SCHEME, NOTHING_INSERTED, STRUCTURE

SPECS: dict[Stage, tuple[Rule, ...]] = {
    Stage.CAPTURED: (*STRUCTURE, NO_SCHEME, NOTHING_INSERTED),
    Stage.ANNOTATED: (*STRUCTURE, *SCHEMES, NOTHING_INSERTED),
    Stage.OBSERVED: (*STRUCTURE, *SCHEMES, *OBSERVERS, *RESCALES, RESCALES_MEASURED),
    Stage.CALIBRATED: (*STRUCTURE, *SCHEMES, *OBSERVERS, *RESCALES, RESCALES_MEASURED),
    Stage.LOWERED: (*STRUCTURE, *SCHEMES, *LOWERED, *RESCALES),
}


def verify(graph: Graph, *, after: str) -> None:
    """Check a graph against the spec of its stage.

    Raises `VerificationError` for the first broken rule: it names the pass (`after`), the node, its module path, and
    shows the lines of IR around it.
    """
    for rule in SPECS[graph.stage]:
        for node, wrong in rule.broken(graph):
            raise VerificationError(_explain(graph, rule, node, wrong, after))


def _explain(graph: Graph, rule: Rule, node: Node, wrong: str, after: str) -> str:
    nodes, printer = graph.nodes, Printer(graph)
    index = nodes.index(node)
    lines = (f"  {'>' if n is node else ' '} {printer.line(n)}" for n in nodes[max(index - 3, 0) : index + 4])
    return (
        f"after {after}, the {graph.stage} graph breaks rule {rule.name} at {printer.name(node)}{_module(node)}: "
        f"{wrong}\n" + "\n".join(lines)
    )


def _module(node: Node) -> str:
    """The module that a node is, or that it was traced in."""
    leaf, scope = get(node, Leaf), get(node, Scope)
    if leaf is not None:
        return f" (module {leaf.path})"
    return f" (in module {scope.calls[-1][1] or 'the model itself'})" if scope and scope.calls else ""
