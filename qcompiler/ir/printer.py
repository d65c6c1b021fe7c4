"""Print a graph as text: one line a node, with what is known and decided about it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qcompiler.ir.annotations import Leaf, Observer, Role, Scope, get, get_quant
from qcompiler.ir.fx import Node, op_name, value
from qcompiler.ir.graph import Graph


class Printer:
    """Prints nodes of one graph; symbolic sizes read `B` and `S` whatever the tracer called them."""

    def __init__(self, graph: Graph) -> None:
        batch, length = value(graph.input).shape
        self._symbols = {str(batch): "B", str(length): "S"}
        self._names = {node: self._name(node) for node in graph.nodes}

    def lines(self, nodes: Iterable[Node]) -> str:
        return "\n".join(self.line(node) for node in nodes)

    def line(self, node: Node) -> str:
        """`%name = op(arguments) [shape]  decisions  ; because`."""
        if node.op == "output":
            return f"return {self._argument(node.args[0])}"
        if node.op in ("placeholder", "get_attr"):
            return f"%{self._names[node]} = {'input' if node.op == 'placeholder' else 'attribute'}{self._shape(node)}"
        leaf = get(node, Leaf)
        name = str(leaf.kind) if leaf else op_name(node).removeprefix("aten.").removeprefix("operator.")
        arguments = ", ".join(
            [*(self._argument(a) for a in node.args), *(f"{k}={self._argument(v)}" for k, v in node.kwargs.items())]
        )
        notes, because = _notes(node)
        line = f"%{self._names[node]} = {name}({arguments}){self._shape(node)}"
        line += "".join(f"  {note}" for note in notes)
        return line + (f"  ; {because}" if because else "")

    def _name(self, node: Node) -> str:
        leaf, role, scope = get(node, Leaf), get(node, Role), get(node, Scope)
        if node.op == "get_attr":
            return str(node.target)
        if leaf is None or node.op != "call_module":
            return node.name
        if role is None or role.layer is None or scope is None:
            return leaf.path
        # The layer's own module is the nearest enclosing call below the list of layers.
        inner = next((path for _, path in scope.calls if re.search(r"\.\d+$", path)), "")
        return f"l{role.layer}.{leaf.path.removeprefix(inner).removeprefix('.')}"

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, Node):
            return f"%{self._names[argument]}"
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self._argument(a) for a in argument)}]"
        if argument == 9223372036854775807:
            return "end"
        if isinstance(argument, (torch.dtype, torch.device)):
            return str(argument).removeprefix("torch.")
        return repr(argument)

    def _shape(self, node: Node) -> str:
        val = value(node)
        if not isinstance(val, Tensor):
            return ""
        return f" [{','.join(self._size(str(size)) for size in val.shape)}]"

    def _size(self, size: str) -> str:
        return re.sub(r"[su]\d+", lambda m: self._symbols.get(m.group(), m.group()), size)


def _notes(node: Node) -> tuple[list[str], str]:
    role, quant, observer = get(node, Role), get_quant(node), get(node, Observer)
    notes: list[str] = []
    because = ""
    if role is not None and role.structure is not None:
        notes.append(str(role.structure))
    if role is not None and role.fusion_group is not None:
        notes.append(f"group={role.fusion_group}")
    if quant is not None:
        notes.append(f"{quant.scheme.short}  {quant.solver}" if quant.scheme else "dense")
        because = ", ".join(quant.because)
    if observer is not None:
        notes.append(f"{observer.kind} for {observer.purpose} {observer.spec.short} id={observer.id}")
        because = ", ".join(observer.because)
    return notes, because


def print_graph(graph: Graph) -> str:
    """The whole graph as text, headed by its stage."""
    return f"graph {type(graph.model).__name__} ({graph.stage})\n{Printer(graph).lines(graph.nodes)}\n"


def print_leaves(graph: Graph) -> str:
    """One line for each leaf and inserted operation: what a person wants to see of a large graph."""
    from qcompiler.ir.ops import OPS

    inserted = set(OPS.values())
    chosen = [node for node in graph.nodes if get(node, Leaf) or node.target in inserted]
    return f"graph {type(graph.model).__name__} ({graph.stage})\n{Printer(graph).lines(chosen)}\n"
