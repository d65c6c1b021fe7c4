"""From a model to the graph of its raised leaves, each with its role."""

from __future__ import annotations

from torch import fx
from transformers import PreTrainedModel

from qcompiler.capture.buffers import non_persistent_buffers
from qcompiler.capture.export import export
from qcompiler.capture.raising import raise_leaves
from qcompiler.capture.roles import annotate_roles
from qcompiler.collector import collector_paused
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph


@collector_paused()
def capture_graph(model: PreTrainedModel, *, repeat: bool = True) -> Graph:
    """Capture the forward pass of a model (in eval mode; usually on the meta device).

    `repeat`: trace each kind of layer once and copy it for its likes, where the model allows it. Raises `CaptureError`
    with the reason where the model does not trace. `capture_and_prove` is this, and a comparison with eager execution.
    """
    exported = export(model, repeat=repeat)
    raise_leaves(exported.graph, model)
    graph = Graph(
        _without_erased(exported.graph),
        model,
        constants=exported.constants,
        buffers=non_persistent_buffers(model),
        max_sequence_length=exported.max_sequence_length,
        like=exported.like,
    )
    annotate_roles(graph)
    return graph


def _without_erased(graph: fx.Graph) -> fx.Graph:
    """A copy with the same names. The namespace of a graph keeps every node that ever was: half of them are erased."""
    fresh = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        copies[node] = fresh.node_copy(node, copies.__getitem__)
    return fresh
