"""Decoder layers that are alike, together: what is left to look at is how the others differ."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qcompiler.inspection.document import Document, Node

Facts = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Layers that are alike. `nodes`: those of the first of them, `members` by layer; names are `below` the layer.

    `base` is the fold that most layers are in, None for that one itself; `odd` are the nodes in which this one differs
    from it, each with its counterpart there, and `missing` the names of those that only the base has.
    """

    layers: tuple[int, ...]
    members: tuple[tuple[Node, ...], ...]
    base: Fold | None = None
    odd: tuple[tuple[Node, Node | None], ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.members[0]

    def alike(self, index: int) -> tuple[Node, ...]:
        """The nodes of all layers that stand where node `index` of the first stands."""
        return tuple(nodes[index] for nodes in self.members)


def below(node: Node) -> str:
    """The name of a leaf under its layer: `self_attn.q_proj` of `l0.self_attn.q_proj`; else its path."""
    prefix = f"l{node.layer}."
    return node.name.removeprefix(prefix) if node.layer is not None and node.name.startswith(prefix) else str(node.path)


def facts(node: Node) -> Facts:
    """What two nodes must share to be alike: all that was decided, nothing that was measured, no layer's number."""
    return (
        *(below(node), node.kind, node.structure, node.weight_shape, node.scheme_name, node.format, node.algorithm),
        *(node.transform, node.run, node.decided, node.bits_per_weight, node.verdict and node.verdict.legal),
        tuple(re.sub(r"\bl?\d+\.", "*.", words) for words in node.because),
    )


def fold(document: Document) -> tuple[Fold, ...]:
    """The decoder layers of a document, those that are alike together, in the order of their first layers."""
    layers: dict[int, list[Node]] = {}
    for node in document.leaves:
        if node.layer is not None:
            layers.setdefault(node.layer, []).append(node)
    alike: dict[tuple[Facts, ...], list[int]] = {}
    for layer in sorted(layers):
        alike.setdefault(tuple(facts(node) for node in layers[layer]), []).append(layer)
    plain = [Fold(tuple(found), tuple(tuple(layers[layer]) for layer in found)) for found in alike.values()]
    if not plain:
        return ()
    base = max(plain, key=lambda found: len(found.layers))
    return tuple(found if found is base else _compared(found, base) for found in plain)


def _compared(found: Fold, base: Fold) -> Fold:
    there = {below(node): node for node in base.nodes}
    odd = []
    for node in found.nodes:
        other = there.pop(below(node), None)
        if other is None or facts(node) != facts(other):
            odd.append((node, other))
    return Fold(found.layers, found.members, base, tuple(odd), tuple(there))


def outside(document: Document) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The leaves before the decoder layers, and those after them."""
    first = next((index for index, node in enumerate(document.leaves) if node.layer is not None), 0)
    before = tuple(node for node in document.leaves[:first] if node.layer is None)
    return before, tuple(node for node in document.leaves[first:] if node.layer is None)
