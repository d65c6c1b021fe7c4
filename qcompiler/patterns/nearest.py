"""How near a model comes to the patterns that it does not match, in words for errors and notes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from qcompiler.ir.annotations import Leaf, Role, Scope, Structure, get, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.patterns.language import Match, NearMiss, Pattern
from qcompiler.patterns.transformer import (
    ATTENTION_OUTPUT,
    ATTENTIONS,
    LM_HEAD,
    MLP,
    ROUTED_EXPERTS,
    SCALAR_GATE,
    TOP_K,
)

_PATTERNS: dict[Structure, tuple[Pattern, ...]] = {
    Structure.ATTENTION_INPUT: ATTENTIONS,
    Structure.ATTENTION_OUTPUT: ATTENTIONS,
    Structure.MLP_INPUT: (MLP,),
    Structure.MLP_OUTPUT: (MLP,),
    Structure.ROUTER: (ROUTED_EXPERTS, TOP_K, SCALAR_GATE),
    Structure.LM_HEAD: (LM_HEAD,),
}
"""What finds each structure. Experts and embeddings are found by their kind."""

_SHOWN = 2


def nearest(
    graph: Graph, patterns: Sequence[Pattern], among: Callable[[Node], bool] = lambda _: True, count: int = _SHOWN
) -> str:
    """The nearest near misses of `patterns`, at the anchors that `among` holds for; or that there is no such anchor."""
    misses = [miss for pattern in patterns for miss in pattern.near_misses(graph) if among(miss.anchor)]
    if not misses:
        if any(pattern.anchor.holds(node) for pattern in patterns for node in graph.nodes):
            return "whatever could be one has another place"
        return f"the model has no {' and no '.join(dict.fromkeys(pattern.anchor.says for pattern in patterns))}"
    misses.sort(key=lambda miss: -miss.held)
    told: dict[str, NearMiss] = {}
    for miss in misses:  # layers that are alike miss it alike
        told.setdefault(re.sub(r"\d+", "*", miss.why), miss)
    return "; ".join(f"{miss.why}, in {_place(miss.anchor)}" for miss in list(told.values())[:count])


def why_no_structure(graph: Graph, structures: Iterable[Structure]) -> str:
    """For each of `structures` that no leaf of an annotated graph has, what came nearest to it; empty where none is."""
    there = {need(node, Role).structure for node, _ in graph.leaves()}
    missing = [s for s in structures if s not in there and s in _PATTERNS]
    return "; ".join(f"no {structure}, nearest: {_nearest_to(graph, structure)}" for structure in missing)


def _nearest_to(graph: Graph, structure: Structure) -> str:
    if structure is Structure.ATTENTION_OUTPUT:
        matches = [match for pattern in ATTENTIONS for match in pattern.matches(graph)]
        reasons = [why for match in matches if (why := ATTENTION_OUTPUT.run(match)) is not None]
        if reasons:
            return reasons[0]
    # A linear that has a structure is one for a reason, and in no need of another.
    return nearest(graph, _PATTERNS[structure], lambda node: (role := get(node, Role)) is None or not role.structure)


def unplaced(graph: Graph) -> list[str]:
    """A note for each kind of linear that stands in the decoder layers without a structure, with what came nearest."""
    calls = Counter(leaf.path for _, leaf in graph.linears())
    kinds: dict[str, list[tuple[Node, Leaf]]] = {}
    for node, leaf in graph.linears():
        role = need(node, Role)
        if role.structure is None and role.layer is not None:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", leaf.path), []).append((node, leaf))
    notes = []
    for members in kinds.values():
        node, leaf = members[0]
        because = need(node, Role).because if calls[leaf.path] > 1 else f"nearest: {nearest_at(graph, node)}"
        paths = dict.fromkeys(leaf.path for _, leaf in members)
        more = f" and {len(paths) - 1} more like it" if len(paths) > 1 else ""
        notes.append(f"no structure was found for {leaf.path}{more}: rules can select it by name only; {because}")
    return notes


def nearest_at(graph: Graph, linear: Node) -> str:
    """What a linear nearly is: an MLP's output itself, or part of an attention of its layer that was not found."""
    found = MLP.try_at(linear)
    if isinstance(found, Match):
        placed = [n for n in found["inputs"] if need(n, Role).structure is not None]
        inputs = ", ".join(f"{need(n, Leaf).path} ({need(n, Role).structure})" for n in placed[:_SHOWN])
        near = [f"{MLP.name}: what it reads is made of linears that have another place, {inputs}"]
    else:
        near = [f"{found.why}, in {_place(linear)}"]
    feeds = _after(linear)
    if any(pattern.anchor.holds(node) for pattern in ATTENTIONS for node in feeds):
        near.append(nearest(graph, ATTENTIONS, feeds.__contains__, count=1))
    return "; ".join(near)


def _after(linear: Node) -> set[Node]:
    """What a linear feeds, up to the next leaves."""
    seen: set[Node] = set()
    todo = list(linear.users)
    while todo:
        node = todo.pop()
        if node in seen or get(node, Leaf) is not None:
            continue
        seen.add(node)
        todo.extend(node.users)
    return seen


def _place(node: Node) -> str:
    leaf, scope = get(node, Leaf), get(node, Scope)
    return leaf.path if leaf is not None else scope.calls[-1][1] if scope and scope.calls else "the model"
