"""Rewrite in-place operations as operations on values, so that the dataflow is all there is to know.

Models fill buffers piece by piece (`k[..., :n].copy_(a)`), and exported graphs keep that. A walk over the graph would not
see where such a tensor comes from, and a cached value could be written to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from qcompiler.ir.fx import Node, is_op, mutates, tensor_arg, value

_SCATTER = {"aten.slice": torch.ops.aten.slice_scatter.default, "aten.select": torch.ops.aten.select_scatter.default}


def functionalize(graph: fx.Graph) -> None:
    """Replace in-place operations on fresh tensors, or on slices of them, by their functional forms.

    What writes through any other kind of view stays in place, which is right but opaque to patterns.
    """
    for node in [n for n in graph.nodes if mutates(n)]:
        written = tensor_arg(node, 0)
        chain = _view_chain(written) if written is not None else None
        functional = _functional(node)
        if written is None or chain is None or functional is None:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(functional, node.args, dict(node.kwargs))
            new.meta = {**node.meta, "val": value(written)}
            for view in chain:
                _replace_later(view, node, new)
                new = _scatter(graph, view, new)
            _replace_later(_base(written, chain), node, new)
        node.replace_all_uses_with(new if not chain else node.args[0])
        graph.erase_node(node)


def _base(written: Node, chain: list[Node]) -> Node:
    base = tensor_arg(chain[-1], 0) if chain else written
    assert base is not None
    return base


def _functional(node: Node) -> Callable[..., object] | None:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if is_op(node, "aten.copy_"):
        return torch.ops.aten.copy.default
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found: Callable[..., object] | None = getattr(packet, target._overloadname, None) if packet else None
    return found


def _view_chain(node: Node) -> list[Node] | None:
    """The slices and selects from `node` down to a tensor that owns its memory; None for any other view."""
    chain: list[Node] = []
    while True:
        if is_op(node, *_SCATTER):
            chain.append(node)
        elif node.op != "call_function" or _is_view(node):
            return None
        else:
            return chain
        below = tensor_arg(node, 0)
        assert below is not None
        node = below


def _is_view(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)


def _scatter(graph: fx.Graph, view: Node, new: Node) -> Node:
    base = tensor_arg(view, 0)
    assert base is not None
    name = "aten.slice" if is_op(view, "aten.slice") else "aten.select"
    node = graph.call_function(_SCATTER[name], (base, new, *view.args[1:]))
    node.meta = {**new.meta, "val": value(base)}
    return node


def _replace_later(old: Node, after: Node, new: Node) -> None:
    """Readers of `old` that come after the write read `new`."""
    for user in list(old.users):
        if user is not new and user > after:
            user.replace_input_with(old, new)
