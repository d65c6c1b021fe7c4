"""From a model to the graph of its raised leaves, each with its role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy

from torch import fx
from transformers import PreTrainedModel

from qcompiler.capture.buffers import non_persistent_buffers
from qcompiler.capture.export import export
from qcompiler.capture.functional import refuse_writes
from qcompiler.capture.raising import raise_leaves
from qcompiler.capture.roles import annotate_roles
from qcompiler.collector import collector_paused
from qcompiler.ir.fx import Node, inputs, map_nodes
from qcompiler.ir.graph import Graph
from qcompiler.ir.partition import layer_of

_NUMBER = re.compile(r"_\d+$")  # what fx gives to nodes that call the same function


@collector_paused()
def capture_graph(model: PreTrainedModel, *, repeat: bool = True) -> Graph:
    """Capture the forward pass of a model (in eval mode; usually on the meta device).

    `repeat`: trace each kind of layer once and copy it for its likes, where the model allows it. Raises `CaptureError`
    with the reason where the model does not trace. `capture_and_prove` is this, and a comparison with eager execution.
    """
    exported = export(model, repeat=repeat)
    raise_leaves(exported.graph, model)
    refuse_writes(exported.graph, type(model).__name__)
    graph = Graph(
        exported.graph,
        model,
        constants=exported.constants,
        buffers=non_persistent_buffers(model),
        max_sequence_length=exported.max_sequence_length,
        like=exported.like,
    )
    graph.fx = _renumbered(graph)
    annotate_roles(graph)
    return graph


def _renumbered(graph: Graph) -> fx.Graph:
    """A copy with functions numbered anew: a graph counts all nodes that ever were, and half of them are erased.

    What comes before the layers is put in the order in which the layers ask for it. Traced, it has the order in which
    the model computes it; where that loops over a set (Gemma 3, over its kinds of layer), each process has another.
    """
    nodes = graph.nodes
    layers = layer_of(graph)
    start = next((index for index, node in enumerate(nodes) if node in layers), 0)
    early, late = nodes[:start], nodes[start:]
    fresh = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in [*_as_asked_for(early, late), *late]:
        args, kwargs = map_nodes((node.args, node.kwargs), copies.__getitem__)
        name = _NUMBER.sub("", node.name) if node.op == "call_function" else node.name
        copies[node] = fresh.create_node(node.op, node.target, args, kwargs, name, node.type)
        copies[node].meta = copy(node.meta)
    return fresh


def _as_asked_for(early: Sequence[Node], late: Iterable[Node]) -> list[Node]:
    """`early`, each node before the first that needs it and behind what it needs itself; placeholders first."""
    asked = dict.fromkeys(node for node in early if node.op == "placeholder")
    known = set(early)
    for reader in late:
        todo = [reader]
        while todo:
            missing = [source for source in inputs(todo[-1]) if source in known and source not in asked]
            if missing:
                todo.append(missing[0])
                continue
            node = todo.pop()
            if node in known:
                asked[node] = None
    return list(asked)
