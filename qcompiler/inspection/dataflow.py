"""What a weight is fed by and feeds, as a person asks for it: the nearest weights, and the residual stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from qcompiler.inspection.document import LISTED_KINDS, Document, Node

_ADDS = re.compile(r"(.*\.)?i?add(\.\w+)?")
_ENDS = LISTED_KINDS | {"embedding"}


@dataclass(frozen=True, slots=True)
class Ends:
    """Where walks from a node end: at `weights`, and at additions to or of the residual stream; in their order."""

    weights: tuple[Node, ...]
    streams: tuple[Node, ...]


class Dataflow:
    """Walks along a document's edges: through operations and norms, no further than the nearest weights.

    A walk ends where a branch joins the residual stream, too: beyond, every later layer reads it.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        self._place = {node.name: place for place, node in enumerate(document.nodes)}

    @cached_property
    def residual(self) -> frozenset[str]:
        """The additions of a branch to what it branched from."""
        return frozenset(node.name for node in self._document.nodes if self._is_residual(node))

    def before(self, node: Node) -> Ends:
        """What a node's value is made of."""
        return self._ends(node.inputs, lambda name: self._document.by_name[name].inputs)

    def after(self, node: Node) -> Ends:
        """What reads a node's value, or what is made of it."""
        return self._ends(self._readers(node.name), self._readers)

    def tensor(self, node: Node) -> Node | None:
        """What a leaf reads first, whatever passes inserted before it."""
        by_name = self._document.by_name
        found = by_name[node.inputs[0]] if node.inputs else None
        while found is not None and found.kind == "inserted" and found.inputs:
            found = by_name[found.inputs[0]]
        return found

    def next_reader(self, stream: Node) -> Node | None:
        """The first module that reads the residual stream after this addition."""
        todo, found = list(self._readers(stream.name)), set[str]()
        while todo:
            name = todo.pop()
            node = self._document.by_name[name]
            if node.path is not None:
                found.add(name)
            elif name not in self.residual:
                todo.extend(self._readers(name))
        return self._document.by_name[min(found, key=self._place.__getitem__)] if found else None

    def _readers(self, name: str) -> tuple[str, ...]:
        return self._document.readers.get(name, ())

    def _ends(self, start: Iterable[str], edges: Callable[[str], Sequence[str]]) -> Ends:
        seen: set[str] = set()
        weights, streams, todo = [], [], list(start)
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self._document.by_name[name]
            if node.path is not None and node.kind in _ENDS:
                weights.append(node)
            elif name in self.residual:
                streams.append(node)
            else:
                todo.extend(edges(name))
        return Ends(self._in_order(weights), self._in_order(streams))

    def _in_order(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        return tuple(sorted(nodes, key=lambda node: self._place[node.name]))

    def _is_residual(self, node: Node) -> bool:
        """Whether this adds two values of one shape, of which the later is made of the earlier by some weight."""
        inputs = sorted(set(node.inputs), key=self._place.__getitem__)
        if node.path is not None or len(inputs) != 2 or not _ADDS.fullmatch(node.op):
            return False
        by_name = self._document.by_name
        trunk, branch = inputs
        if by_name[trunk].shape != by_name[branch].shape:
            return False
        seen, todo, weighted = set[str](), [branch], False
        while todo:
            name = todo.pop()
            if name in seen or self._place[name] < self._place[trunk]:
                continue
            seen.add(name)
            if name != trunk:
                weighted = weighted or by_name[name].kind in LISTED_KINDS
                todo.extend(by_name[name].inputs)
        return weighted and trunk in seen
