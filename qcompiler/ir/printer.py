"""Print a graph as text: one line a node, with what is known and decided about it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qcompiler.ir.annotations import (
    ChannelObserver,
    HessianObserver,
    Leaf,
    Observer,
    Rescale,
    Role,
    Scope,
    get,
    get_quant,
)
from qcompiler.ir.fx import Node, op_name, value
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import OPS, fake_quantize, fake_quantize_cache

_HIDDEN = frozenset({"device", "pin_memory", "layout"})  # where a tensor lies says nothing of what is computed
_WORDS = {"placeholder": "input", "get_attr": "attribute", "output": "output"}


class Printer:
    """Prints nodes of one graph; symbolic sizes read `B` and `S` whatever the tracer called them.

    It prints broken graphs too: the verifier shows them.
    """

    def __init__(self, graph: Graph) -> None:
        val = next((value(node) for node in graph.nodes if node.op == "placeholder"), None)
        sizes = [str(size) for size in val.shape] if isinstance(val, Tensor) else []
        self._symbols = dict(zip(sizes, ("B", "S"), strict=False))
        self._names: dict[Node, str] = {}
        taken: set[str] = set()
        for node in graph.nodes:
            name = self._name(node)
            name = node.name if name in taken else name
            while name in taken:  # another's path can be this one's own name
                name += "_"
            self._names[node] = name
            taken.add(name)

    def lines(self, nodes: Iterable[Node]) -> str:
        return "\n".join(self.line(node) for node in nodes)

    def name(self, node: Node) -> str:
        """What a node is called in printed lines, e.g. `%l0.self_attn.q_proj`."""
        return f"%{self._names.get(node, node.name)}"

    def line(self, node: Node) -> str:
        """`%name = op(arguments) [shape]  decisions  ; because`."""
        if node.op == "output":
            return f"return {self.arguments(node)}"
        sizes = self.sizes(node)
        shape = f" [{','.join(sizes)}]" if sizes is not None else ""
        if node.op in ("placeholder", "get_attr"):
            return f"{self.name(node)} = {self.called(node)}{shape}"
        notes, because = _notes(node)
        line = f"{self.name(node)} = {self.called(node)}({self.arguments(node)}){shape}"
        line += "".join(f"  {note}" for note in notes)
        return line + (f"  ; {because}" if because else "")

    def called(self, node: Node) -> str:
        """What a node does, in a word: `linear`, `mul`, `observe`; `input`, `attribute` or `output`."""
        if (word := _WORDS.get(node.op)) is not None:
            return word
        leaf = get(node, Leaf)
        return _short(str(leaf.kind) if leaf and node.op == "call_module" else op_name(node))

    def arguments(self, node: Node) -> str:
        """What stands in the parentheses of a node's line."""
        shown = {k: v for k, v in node.kwargs.items() if k not in _HIDDEN and v is not None}
        named = node.target in OPS.values() and self._layer(node) in node.args  # its own name says which layer it is
        return ", ".join(
            [
                *map(self._argument, node.args[:1] if named else node.args),
                *(f"{k}={self._argument(v)}" for k, v in shown.items()),
            ]
        )

    def sizes(self, node: Node) -> tuple[str, ...] | None:
        """The sizes of a node's value, e.g. `("B", "S", "256")`; None where it is no tensor."""
        val = value(node)
        return tuple(self._size(str(size)) for size in val.shape) if isinstance(val, Tensor) else None

    def _name(self, node: Node) -> str:
        if node.target is fake_quantize and (reader := next(iter(node.users), None)) is not None:
            return f"{self._name(reader)}.input"
        leaf, role, scope = get(node, Leaf), get(node, Role), get(node, Scope)
        if node.target is fake_quantize_cache and len(node.args) == 3 and scope is not None:
            attention = str(node.args[1])
            index = re.search(r"\.(\d+)\.", f"{attention}.")
            return f"{f'l{index[1]}.' if index else ''}{_below_layer(attention, scope)}.{node.args[2]}"
        if node.op == "get_attr":
            return str(node.target)
        if isinstance(value(node), torch.SymInt):
            size = self._size(str(value(node)))
            return size if size.isidentifier() else node.name
        if leaf is None:
            return node.name
        if role is None or role.layer is None or scope is None:
            return leaf.path
        return f"l{role.layer}.{_below_layer(leaf.path, scope)}"

    def _layer(self, node: Node) -> str | None:
        """The module whose numbers an inserted operation uses: its own, or its reader's."""
        if node.target is fake_quantize_cache:
            return str(node.args[1]) if len(node.args) == 3 else None
        leaf = get(node, Leaf) or next((get(user, Leaf) for user in node.users), None)
        return leaf.path if leaf else None

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, Node):
            return self.name(argument)
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self._argument(a) for a in argument)}]"
        if argument == sys.maxsize:
            return "end"
        if isinstance(argument, float):
            return f"{argument:.6g}"
        if isinstance(argument, (torch.dtype, torch.device)):
            return str(argument).removeprefix("torch.")
        return repr(argument)

    def _size(self, size: str) -> str:
        return re.sub(r"[su]\d+", lambda m: self._symbols.get(m.group(), m.group()), size)


def _below_layer(path: str, scope: Scope) -> str:
    """A path below the layer's own module: the nearest enclosing call below the list of layers."""
    inner = next((outer for _, outer in scope.calls if re.search(r"\.\d+$", outer)), "")
    return path.removeprefix(inner).removeprefix(".")


def _short(called: str) -> str:
    """`aten.mul` -> `mul`, `operator.__and__` -> `and`."""
    plain = called.removeprefix("aten.").removeprefix("operator.")
    return plain[2:-2] if plain.startswith("__") and plain.endswith("__") else plain  # `add_` writes: its line says so


def _notes(node: Node) -> tuple[list[str], str]:
    role, quant, observer = get(node, Role), get_quant(node), get(node, Observer)
    notes: list[str] = []
    because = ""
    if quant is not None:
        notes += [quant.scheme.short, quant.algorithm] if quant.scheme else ["dense"]
        notes += [f"run={quant.run}"] if quant.run not in (None, 1) else []
        because = ", ".join(quant.because)
    if observer is not None:
        kind = f"percentile {observer.percentile:g}" if observer.kind == "percentile" else observer.kind
        notes.append(f"{kind} of {observer.purpose} for {observer.spec.short}  id={observer.id}")
        because = ", ".join(observer.because)
    collected = get(node, HessianObserver) or get(node, ChannelObserver)
    if collected is not None:
        notes.append(f"{collected.what}  id={collected.id}")
        because = ", ".join(collected.because)
    rescale = get(node, Rescale)
    if rescale is not None:
        notes.append(f"{rescale.transform.name}: gives a scale to {', '.join(rescale.consumers)}")
    if role is not None and role.structure is not None:
        notes.append(str(role.structure))
    if role is not None and role.fusion_group is not None:
        notes.append(f"group={role.fusion_group}")
    return notes, because


def print_graph(graph: Graph) -> str:
    """The whole graph as text, headed by its stage."""
    return f"graph {type(graph.model).__name__} ({graph.stage})\n{Printer(graph).lines(graph.nodes)}\n"


def print_leaves(graph: Graph) -> str:
    """One line for each leaf and inserted operation: what a person wants to see of a large graph."""
    inserted = set(OPS.values())
    chosen = [node for node in graph.nodes if get(node, Leaf) or node.target in inserted]
    return f"graph {type(graph.model).__name__} ({graph.stage})\n{Printer(graph).lines(chosen)}\n"
