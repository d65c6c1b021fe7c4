"""What linears that runtimes fuse must have in common, checked where schemes are assigned."""

from __future__ import annotations

from qcompiler.errors import RuleError
from qcompiler.ir.annotations import Leaf, Role, get_quant, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph


def check_fusion(graph: Graph, *, mend: str) -> None:
    """Raise `RuleError` where linears that runtimes fuse do not agree on one scheme; it says who decided on each.

    mend: how the caller's own words give them one.
    """
    members: dict[str, list[Node]] = {}
    for node, _ in graph.linears():
        group = need(node, Role).fusion_group
        if group is not None:
            members.setdefault(group, []).append(node)
    for group, nodes in members.items():
        schemes = {quant.scheme if (quant := get_quant(node)) else None for node in nodes}
        if len(schemes) > 1:
            raise RuleError(
                f"fusion group {group}: its linears are fused by runtimes and must share one scheme, but\n"
                + "\n".join(f"  {need(node, Leaf).path}: {_decision(node)}" for node in nodes),
                hint=f"give them one scheme: {mend}",
            )


def _decision(node: Node) -> str:
    quant = get_quant(node)
    if quant is None:
        return "dense, no rule selects it"
    return f"{quant.scheme.short if quant.scheme else 'dense'}, by {', '.join(quant.because)}"
