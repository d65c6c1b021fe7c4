"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph

Broken = Iterator[tuple[Node, str]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on graphs: `broken` finds the nodes at which it does not hold, and says what is wrong with each."""

    name: str
    broken: Callable[[Graph], Broken]


def each(name: str, wrong: Callable[[Node], str | None]) -> Rule:
    """A rule on nodes, one by one: `wrong` says what is wrong with a node, or None."""

    def broken(graph: Graph) -> Broken:
        return ((node, said) for node in graph.nodes if (said := wrong(node)) is not None)

    return Rule(name, broken)
