"""Put an operation into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompiler.ir.annotations import Scope, annotate, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph


def insert(graph: Graph, operation: Callable[..., Any], args: tuple[Any, ...], *, before: Node, like: Node) -> Node:
    """A new call of `operation` before a node and in its scope, with a value of the shape and dtype of `like`'s."""
    with graph.fx.inserting_before(before):
        node = graph.fx.call_function(operation, args)
    node.meta = {key: value for key, value in like.meta.items() if key in ("val", "tensor_meta")}
    annotate(node, need(before, Scope))
    return node


def stand_between(graph: Graph, source: Node, operation: Callable[..., Any], *args: Any) -> Node:
    """`operation(source, *args)` right after `source`, read by everything that read `source`."""
    readers = list(source.users)
    first = min(readers, key={node: place for place, node in enumerate(graph.nodes)}.__getitem__)
    node = insert(graph, operation, (source, *args), before=first, like=source)
    for reader in readers:
        reader.replace_input_with(source, node)
    return node
