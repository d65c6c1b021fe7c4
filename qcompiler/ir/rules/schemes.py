"""Schemes that passes assigned: on linears, with a reason and a solver, and alike where they must be."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from qcompiler.ir.annotations import Leaf, Role, get, get_quant, scheme_of
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.ir.printer import Printer
from qcompiler.ir.rules.rule import Broken, Rule, each


def _quant_on_linear(node: Node) -> str | None:
    leaf = get(node, Leaf)
    if get_quant(node) and leaf is not None and not leaf.is_linear:
        return f"only linears are quantized, and this is a {leaf.kind}"
    return None


def _quant_has_because(node: Node) -> str | None:
    quant = get_quant(node)
    return "it does not say which pass and rule decided its scheme" if quant and not quant.because else None


def _quant_has_solver(node: Node) -> str | None:
    quant = get_quant(node)
    if quant and quant.scheme and quant.solver in ("", "none"):
        return "it has a scheme, but no solver that rounds its weight"
    if quant and not quant.scheme and quant.solver != "none":
        return f"it stays dense, but solver {quant.solver!r} is to round its weight"
    return None


def _alike(key: Callable[[Node, Leaf], Hashable], what: str) -> Callable[[Graph], Broken]:
    """Linears with one key (None: no matter) must have one scheme."""

    def broken(graph: Graph) -> Broken:
        first: dict[Hashable, Node] = {}
        for node, leaf in graph.linears():
            group = key(node, leaf)
            if group is None:
                continue
            other = first.setdefault(group, node)
            if scheme_of(other) != scheme_of(node):
                at = Printer(graph).name(other)
                yield node, f"{what} {group}: {_said(node)} here, but {_said(other)} at {at}"

    return broken


def _said(node: Node) -> str:
    scheme = scheme_of(node)
    return scheme.short if scheme else "dense"


def _fusion_group(node: Node, leaf: Leaf) -> str | None:
    role = get(node, Role)
    return role.fusion_group if role else None


SCHEMES = (
    each("quant-on-linear", _quant_on_linear),
    each("quant-has-because", _quant_has_because),
    each("quant-has-solver", _quant_has_solver),
    Rule("one-scheme-per-module", _alike(lambda node, leaf: leaf.path, "module")),
    Rule("one-scheme-per-fusion-group", _alike(_fusion_group, "fusion group")),
)
