"""The pattern language: an anchor, walks from named nodes to other nodes, and checks over what was found.

    GATED = Pattern(
        "gated product",
        anchor=op("aten.mul"),
        parts=(
            Walk("gate", "back", operand=0, through=POINTWISE, to=leaf(LeafKind.LINEAR)),
            Walk("up", "back", operand=1, through=POINTWISE, to=leaf(LeafKind.LINEAR)),
            Check("gate and up read the same tensor", lambda m: source(m.one("gate")) is source(m.one("up"))),
        ),
    )

Parts are tried in order. An anchor on which a part fails is a near miss that says how far it got and what was in the
way. A pattern only finds; what to do with a match (annotate, insert, rewrite) is up to the pass that asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qcompiler.ir.annotations import Leaf as LeafFact
from qcompiler.ir.annotations import LeafKind, get
from qcompiler.ir.fx import Node, inputs, is_op, op_name, tensor_arg
from qcompiler.ir.graph import Graph


@dataclass(frozen=True, slots=True)
class Test:
    """A question about one node, with the words for it."""

    says: str
    holds: Callable[[Node], bool]

    def __or__(self, other: Test) -> Test:
        return Test(f"{self.says} or {other.says}", lambda node: self.holds(node) or other.holds(node))


def op(*names: str) -> Test:
    """Nodes that call one of these operations, named without overload: `op("aten.mul", "operator.mul")`."""
    return Test(" or ".join(names), lambda node: is_op(node, *names))


def leaf(*kinds: LeafKind) -> Test:
    """Raised modules of one of these kinds."""

    def holds(node: Node) -> bool:
        fact = get(node, LeafFact)
        return fact is not None and fact.kind in kinds

    return Test(f"{'an' if kinds[0] is LeafKind.EMBEDDING else 'a'} {' or '.join(map(_word, kinds))}", holds)


def _word(kind: LeafKind) -> str:
    return "block of experts" if kind is LeafKind.EXPERTS else str(kind)


@dataclass(frozen=True, slots=True)
class Walk:
    """Go from a node through some operations until nodes of a kind: against the dataflow (`back`) or along it.

    `start` names a node found before (the anchor by default) and `operand` which of its arguments to follow back (all
    of them when None). `through` are operations, and `through_leaves` kinds of module, that the walk passes. It fails
    where it reaches nothing, or more than one node unless `many`.
    """

    name: str
    direction: Literal["back", "forward"]
    to: Test
    start: str = "anchor"
    operand: int | tuple[int, ...] | None = None
    through: Collection[str] = frozenset()
    through_leaves: Collection[LeafKind] = frozenset()
    many: bool = False

    def run(self, match: Match, barren: set[Node] | None = None) -> str | None:
        """Add what was reached to `match`; returns what went wrong, or None.

        `barren`: nodes from which this walk reaches nothing, to be passed over and added to. Layers share a residual
        stream: without it the walks of all of them take time that grows with the square of their number.
        """
        reached: dict[Node, None] = {}
        blocked: dict[Node, None] = {}
        seen: set[Node] = set()
        todo = deque(node for start in match[self.start] for node in self._first(start))
        while todo:
            node = todo.popleft()
            if node in seen or (barren and node in barren):
                continue
            seen.add(node)
            if self.to.holds(node):
                reached[node] = None
            elif self._passes(node):
                todo.extend(inputs(node) if self.direction == "back" else node.users)
            else:
                blocked[node] = None
        if reached and (self.many or len(reached) == 1):
            match.found[self.name] = tuple(reached)
            return None
        if barren is not None and not reached:
            barren |= seen
        way = f"walking {self.direction} from %{match[self.start][0].name} to {self.name} ({self.to.says})"
        if reached:
            return f"{way} reached {len(reached)} nodes: {', '.join('%' + n.name for n in reached)}"
        stops = ", ".join(f"%{n.name} ({op_name(n)})" for n in list(blocked)[:3]) or "the edge of the graph"
        return f"{way} stopped at {stops}"

    def _first(self, start: Node) -> tuple[Node, ...]:
        if self.direction == "forward":
            return tuple(start.users)
        if self.operand is None:
            return inputs(start)
        wanted = (self.operand,) if isinstance(self.operand, int) else self.operand
        return tuple(n for index in wanted if (n := tensor_arg(start, index)) is not None)

    def _passes(self, node: Node) -> bool:
        fact = get(node, LeafFact)
        if fact is not None:
            return fact.kind in self.through_leaves
        return is_op(node, *self.through)


@dataclass(frozen=True, slots=True)
class Check:
    """A condition over what was found so far."""

    says: str
    holds: Callable[[Match], bool]

    def run(self, match: Match, barren: set[Node] | None = None) -> str | None:
        return None if self.holds(match) else f"it does not hold that {self.says}"


@dataclass(slots=True)
class Match:
    """Where a pattern holds: nodes by the name of the part that found them; `anchor` is always there."""

    anchor: Node
    found: dict[str, tuple[Node, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> tuple[Node, ...]:
        return (self.anchor,) if name == "anchor" else self.found[name]

    def one(self, name: str) -> Node:
        (node,) = self[name]
        return node


@dataclass(frozen=True, slots=True)
class NearMiss:
    """An anchor on which a pattern held for `held` of its parts, and why not for the next."""

    anchor: Node
    held: int
    why: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """An anchor and the parts that must hold around it; see the module's docstring."""

    name: str
    anchor: Test
    parts: tuple[Walk | Check, ...] = ()

    def try_at(self, node: Node) -> Match | NearMiss:
        """Match with `node` as anchor, or say how near it came."""
        return self._try_at(node, [None] * len(self.parts))

    def _try_at(self, node: Node, barren: Sequence[set[Node] | None]) -> Match | NearMiss:
        match = Match(node)
        for held, (part, passed_over) in enumerate(zip(self.parts, barren, strict=True)):
            why = part.run(match, passed_over)
            if why is not None:
                return NearMiss(node, held, f"{self.name}: {why}")
        return match

    def matches(self, graph: Graph, among: Callable[[Node], bool] = lambda _: True) -> Iterator[Match]:
        """Every match whose anchor `among` holds for when its turn comes, in the order of anchors.

        The graph must stay as it is meanwhile.
        """
        barren: list[set[Node]] = [set() for _ in self.parts]
        for node in graph.nodes:
            if self.anchor.holds(node) and among(node) and isinstance(found := self._try_at(node, barren), Match):
                yield found

    def near_misses(self, graph: Graph) -> list[NearMiss]:
        """Anchors that did not match, nearest first."""
        tried = (self.try_at(node) for node in graph.nodes if self.anchor.holds(node))
        return sorted((t for t in tried if isinstance(t, NearMiss)), key=lambda miss: -miss.held)
