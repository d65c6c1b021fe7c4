"""Where transforms apply, as recipes say it, against the sites that a graph has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from qcompiler.emit.groups import TargetText, first_target
from qcompiler.emit.patterns import TargetList
from qcompiler.errors import RuleError
from qcompiler.ir.annotations import Leaf, LeafKind, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.options import Options
from qcompiler.patterns.rescaling import RescaleSite, rescale_sites


class ScaleMapping(Options):
    """A scale moves from what `producer` means to what `consumers` mean."""

    producer: TargetText
    consumers: Annotated[tuple[TargetText, ...], Field(min_length=1)]

    def __str__(self) -> str:
        return f"{self.producer} -> {', '.join(self.consumers)}"


class TransformSites(Options):
    """Where transforms apply: as `mappings` say, or wherever the graph allows it; `norms`: behind norms alone.

    A site whose producer and consumers are all in `ignore` is left as it is.
    """

    mappings: tuple[ScaleMapping, ...] | None = None
    ignore: tuple[TargetText, ...] = ()
    norms: bool = False

    def consumers(self, graph: Graph) -> frozenset[Node]:
        """The linears whose inputs may be rescaled.

        Raises `RuleError` for a mapping to a linear whose input does not come from its producer, or cannot be rescaled.
        """
        sites, misses = rescale_sites(graph)
        whys = {miss.anchor: miss.why for miss in misses}
        if self.mappings is not None:
            sites = tuple(site for m in self.mappings for site in _mapped(m, graph, sites, whys))
        ignore = TargetList(self.ignore)
        return frozenset(
            node
            for site in sites
            if not (self.norms and need(site.producer, Leaf).kind is not LeafKind.NORM)
            and not all(first_target(ignore, need(n, Leaf)) for n in (site.producer, *site.consumers))
            for node in site.consumers
        )


def _mapped(
    mapping: ScaleMapping, graph: Graph, sites: tuple[RescaleSite, ...], whys: dict[Node, str]
) -> Iterator[RescaleSite]:
    """The sites that a mapping means: one for each producer that feeds one of its consumers."""
    wanted, of = TargetList(mapping.consumers), {node: site for site in sites for node in site.consumers}
    producers = TargetList([mapping.producer])
    for node, leaf in graph.linears():
        if first_target(wanted, leaf) is None:
            continue
        site = of.get(node)
        if site is None:
            raise RuleError(
                f"mapping {mapping}: the input of {leaf.path} cannot be rescaled; {whys[node]}",
                hint="take it out of the mapping, or leave the mappings out: they are found in the graph",
            )
        if first_target(producers, need(site.producer, Leaf)) is None:
            raise RuleError(
                f"mapping {mapping}: {leaf.path} reads what {need(site.producer, Leaf).path} gives",
                hint="mend the mapping, or leave the mappings out: they are found in the graph",
            )
        yield site
