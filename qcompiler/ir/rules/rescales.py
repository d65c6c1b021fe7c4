"""Scales that move: from what can give one to linears that are there, and chosen by what was measured."""

from __future__ import annotations

from qcompiler.ir.annotations import ChannelObserver, HessianObserver, Leaf, LeafKind, Rescale, get
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.ir.observers import observers
from qcompiler.ir.rules.rule import Broken, Rule, each
from qcompiler.transforms.options import AwqOptions


def _on_producer(node: Node) -> str | None:
    rescale, leaf = get(node, Rescale), get(node, Leaf)
    if rescale is None:
        return None
    if leaf is None or not (leaf.kind is LeafKind.NORM or leaf.is_linear):
        return "it is annotated with a scale to give, but is no norm and no linear"
    if leaf.path != rescale.producer:
        return f"it is annotated with the scale that {rescale.producer} gives"
    return None


def _consumers_exist(graph: Graph) -> Broken:
    known = {leaf.path for _, leaf in graph.leaves() if leaf.is_linear or leaf.kind is LeafKind.BARE_LINEAR}
    for node in graph.nodes:
        rescale = get(node, Rescale)
        if rescale is None:
            continue
        if lost := [path for path in rescale.consumers if path not in known]:
            yield node, f"it gives a scale to {lost[0]}, which is no linear of the graph"
        elif others := [path for path in rescale.asked if path not in rescale.consumers]:
            yield node, f"its scale is chosen by {others[0]}, which does not take it"
        elif len(rescale.weights) != len(rescale.consumers):
            yield (
                node,
                f"it gives a scale to {len(rescale.consumers)} linears, and changes {len(rescale.weights)} weights",
            )


def _measured(graph: Graph) -> Broken:
    found = [rescale for node in graph.nodes if (rescale := get(node, Rescale)) is not None]
    transforms = {path: rescale.transform for rescale in found for path in rescale.asked}
    for node, leaf in graph.linears():
        transform = transforms.get(leaf.path)
        if transform is None:
            continue
        kinds = (ChannelObserver, HessianObserver) if isinstance(transform, AwqOptions) else (ChannelObserver,)
        collected = {type(observer) for observer in observers(node)}
        if missing := [kind.what for kind in kinds if kind not in collected]:
            yield node, f"{transform.name} is chosen by its inputs, and no observer before it collects {missing[0]}"


RESCALES = (each("rescale-on-producer", _on_producer), Rule("rescale-consumers", _consumers_exist))
RESCALES_MEASURED = Rule("rescale-measured", _measured)
