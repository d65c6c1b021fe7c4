"""What observes the tensor that a linear reads."""

from __future__ import annotations

from collections.abc import Iterator

from qcompiler.ir.annotations import AnyObserver, Leaf, need, observed
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.ops import observe


def observers(linear: Node) -> Iterator[AnyObserver]:
    """The observers before a linear that collect for it, the nearest first."""
    path = need(linear, Leaf).path
    for node in _chain(linear):
        found = observed(node)
        if found is not None and path in found.consumers:
            yield found


def unobserved(linear: Node) -> Node:
    """The tensor that a linear reads, whoever else looks at it."""
    *_, last = (linear, *_chain(linear))
    source = tensor_arg(last, 0)
    assert source is not None, f"%{linear.name} reads no tensor"
    return source


def _chain(linear: Node) -> Iterator[Node]:
    node = tensor_arg(linear, 0)
    while node is not None and node.target is observe:
        yield node
        node = tensor_arg(node, 0)
