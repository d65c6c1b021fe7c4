"""Cut a graph at its decoder layers, found by how modules nest and not by what they are called."""

from __future__ import annotations

from collections import Counter

from torch import nn

from qcompiler.errors import CaptureError
from qcompiler.ir.annotations import Scope, get
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Partition


def layer_of(graph: Graph) -> dict[Node, int]:
    """The decoder layer of each node that was traced inside one.

    Layers are the calls of the members of one `nn.ModuleList`: the one in which most of the graph was traced. They are
    numbered in the order in which they run.
    """
    lists: Counter[str] = Counter()
    inside: dict[Node, list[tuple[str, str]]] = {}
    for node in graph.nodes:
        scope = get(node, Scope)
        for key, path in scope.calls if scope else ():
            parent = path.rpartition(".")[0]
            if path and isinstance(graph.model.get_submodule(parent), nn.ModuleList):
                inside.setdefault(node, []).append((key, parent))
                lists[parent] += 1
                break  # only the outermost list: experts and branches nest in a layer
    if not lists:
        return {}
    layers = lists.most_common(1)[0][0]
    order: dict[str, int] = {}
    return {
        node: order.setdefault(key, len(order))
        for node, calls in inside.items()
        for key, parent in calls
        if parent == layers
    }


def partitions(graph: Graph) -> tuple[Partition, ...]:
    """The graph in consecutive stretches: before the layers, each layer, after them.

    A node outside the layers belongs to the stretch of its latest input; what no layer reads, and reads one itself,
    comes last. Raises `CaptureError` when a layer reads a value of a later one.
    """
    layers = layer_of(graph)
    last = 1 + max(layers.values(), default=-1)
    feeds: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in layers or node in feeds:
            feeds.update(node.all_input_nodes)
    place: dict[Node, int] = {}
    for node in graph.nodes:
        earliest = max((place[source] for source in node.all_input_nodes), default=0)
        if node in layers:
            place[node] = layers[node] + 1
            if earliest > place[node]:
                raise CaptureError(f"%{node.name} of layer {layers[node]} reads a value of layer {earliest - 1}")
        elif node in feeds or earliest == 0:
            place[node] = earliest
        else:
            place[node] = last + 1
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:  # a weight is read where it is first used, not before
            place[node] = min(place[user] for user in node.users)
    return tuple(part for index in range(last + 2) if (part := _partition(graph, place, index, last)) is not None)


def _partition(graph: Graph, place: dict[Node, int], index: int, last: int) -> Partition | None:
    nodes = tuple(n for n in graph.nodes if place[n] == index and n.op not in ("placeholder", "output"))
    if not nodes:
        return None
    members = set(nodes)
    reads = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in members)
    writes = tuple(n for n in nodes if any(u not in members for u in n.users))
    layer = index - 1 if 1 <= index <= last else None
    name = f"layer {layer}" if layer is not None else ("inputs" if index == 0 else "outputs")
    return Partition(name, layer, nodes, tuple(reads), writes)
