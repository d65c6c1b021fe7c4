"""Blocks of experts: the weights that their one node stands for, by the names that loaders and files have for each."""

from __future__ import annotations

from qcompiler.inspection.document import Experts, starred
from qcompiler.ir.annotations import LeafKind
from qcompiler.ir.graph import Graph
from qcompiler.lowering.sites import expert_sites, experts_on_disk
from qcompiler.source import ModelSource


def experts_of(graph: Graph, source: ModelSource) -> dict[str, Experts]:
    """What each block of experts stands for, by its path."""
    found: dict[str, Experts] = {}
    for _, leaf in graph.leaves():
        if leaf.kind is not LeafKind.EXPERTS or leaf.path in found:
            continue
        names = [site.name for site in expert_sites(graph, leaf)]
        names += experts_on_disk(source, leaf) if source.has_weights else ()
        parts = [part for part in map(starred, names) if part is not None]
        if parts:
            patterns = dict.fromkeys(pattern for pattern, _ in parts)
            found[leaf.path] = Experts(count=1 + max(number for _, number in parts), names=tuple(patterns))
    return found
