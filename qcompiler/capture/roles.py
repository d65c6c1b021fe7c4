"""Annotate every leaf with its `Role`: structure, layer, input group and fusion group, by patterns over the graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from qcompiler.ir.annotations import Leaf, LeafKind, Role, Structure, annotate, get
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.ir.partition import layer_of
from qcompiler.patterns.language import Match
from qcompiler.patterns.transformer import (
    ATTENTION_OUTPUT,
    ATTENTIONS,
    GATED_PRODUCT,
    LM_HEAD,
    LOW_RANK,
    MLP,
    OUTPUT_GATE,
    ROUTED_EXPERTS,
    SCALAR_GATE,
    TOP_K,
)
from qcompiler.patterns.vocabulary import source


@dataclass(slots=True)
class _Findings:
    """What the patterns said, first word wins: attention is found before MLPs are looked for."""

    structure: dict[Node, tuple[Structure, str]] = field(default_factory=dict)
    fused: list[tuple[str, tuple[Node, ...]]] = field(default_factory=list)

    def say(self, nodes: Iterable[Node], structure: Structure, because: str) -> None:
        for node in nodes:
            self.structure.setdefault(node, (structure, because))

    def fuse(self, what: str, nodes: Iterable[Node]) -> None:
        """Those of `nodes` that read the same tensor are fused by runtimes; what two layers share, in the first."""
        by_source: dict[Node, dict[Node, None]] = defaultdict(dict)
        fused = {node for _, members in self.fused for node in members}
        for node in nodes:
            if node not in fused:
                by_source[source(node)][node] = None
        self.fused += [(what, tuple(members)) for members in by_source.values() if len(members) > 1]


def annotate_roles(graph: Graph) -> None:
    """Annotate every leaf of a captured graph with a `Role`."""
    findings = _Findings()
    _find_lm_head(graph, findings)
    _find_attention(graph, findings)
    _find_routers(graph, findings)
    _find_mlps(graph, findings)
    layers = layer_of(graph)
    linears = [node for node, leaf in graph.leaves() if leaf.is_linear]
    by_source: dict[Node, list[Node]] = defaultdict(list)
    for node in linears:
        by_source[source(node)].append(node)
    names = _Names(layers)
    input_group = {n: i for m in by_source.values() for i in [names.of(m[0], _word(findings, m[0]))] for n in m}
    fusion_group = {n: i for what, m in findings.fused for i in [names.of(m[0], what)] for n in m}
    torn = _torn(graph, findings)
    for node, leaf in graph.leaves():
        structure, because = findings.structure.get(node, (_BY_KIND.get(leaf.kind), _because(leaf.kind)))
        if leaf.path in torn:
            structure, because = None, "it runs several times, in places of different structure"
        annotate(node, Role(structure, layers.get(node), input_group.get(node), fusion_group.get(node), because))


def _torn(graph: Graph, findings: _Findings) -> set[str]:
    """Modules that run several times, in places that differ: one weight has one structure, or none."""
    places: dict[str, set[Structure | None]] = defaultdict(set)
    for node, leaf in graph.leaves():
        places[leaf.path].add(findings.structure.get(node, (None,))[0])
    return {path for path, structures in places.items() if len(structures) > 1}


def _because(kind: LeafKind) -> str:
    word = "block of experts" if kind is LeafKind.EXPERTS else str(kind)
    return f"it is {'an' if word[0] in 'aeiou' else 'a'} {word}"


_BY_KIND = {LeafKind.EXPERTS: Structure.EXPERTS, LeafKind.EMBEDDING: Structure.EMBEDDING}


@dataclass(slots=True)
class _Names:
    """Names of groups, made of the layer and the structure, numbered where a layer has several."""

    layers: dict[Node, int]
    used: Counter[str] = field(default_factory=Counter)

    def of(self, node: Node, what: str) -> str:
        layer = self.layers.get(node)
        name = what if layer is None else f"l{layer}.{what}"
        self.used[name] += 1
        return name if self.used[name] == 1 else f"{name}.{self.used[name]}"


def _word(findings: _Findings, node: Node) -> str:
    found = findings.structure.get(node)
    return str(found[0]) if found else "linear"


def _find_lm_head(graph: Graph, findings: _Findings) -> None:
    for match in LM_HEAD.matches(graph):
        findings.say(match["head"], Structure.LM_HEAD, "its output is the logits")


def _find_attention(graph: Graph, findings: _Findings) -> None:
    attentions = [(pattern.name, match) for pattern in ATTENTIONS for match in pattern.matches(graph)]
    for name, match in attentions:
        projections = _unique(match.found.get(part, ()) for part in ("query", "key", "value"))
        reduced = [low for node in projections for low in _low_rank(node)]
        everything = _unique([projections, reduced])
        findings.say(everything, Structure.ATTENTION_INPUT, f"it feeds {name} %{match.anchor.name}")
        findings.fuse("qkv", everything)
    for name, match in attentions:
        if ATTENTION_OUTPUT.run(match) is None:
            findings.say(match["output"], Structure.ATTENTION_OUTPUT, f"it reads {name} %{match.anchor.name}")
            if OUTPUT_GATE.run(match) is None:
                findings.say(match["gate"], Structure.ATTENTION_INPUT, f"it gates {name} %{match.anchor.name}")


def _called(node: Node) -> str:
    """A node as a user can ask for it: by its module's path, else by its own name."""
    leaf = get(node, Leaf)
    return leaf.path if leaf is not None else f"%{node.name}"


def _low_rank(node: Node) -> tuple[Node, ...]:
    found = LOW_RANK.try_at(node)
    return found["down"] if isinstance(found, Match) else ()


def _unique(groups: Iterable[Iterable[Node]]) -> list[Node]:
    return list(dict.fromkeys(node for group in groups for node in group))


def _find_routers(graph: Graph, findings: _Findings) -> None:
    for match in ROUTED_EXPERTS.matches(graph):
        findings.say(match["router"], Structure.ROUTER, f"it chooses for {_called(match.anchor)}")
    for match in TOP_K.matches(graph):
        findings.say([match.anchor], Structure.ROUTER, "its scores are ranked")
    for match in SCALAR_GATE.matches(graph):
        findings.say([match.anchor], Structure.ROUTER, "its one output is a gate")


def _find_mlps(graph: Graph, findings: _Findings) -> None:
    for match in MLP.matches(graph, lambda anchor: anchor not in findings.structure):
        free = [node for node in match["inputs"] if node not in findings.structure]
        if free:
            findings.say([match.anchor], Structure.MLP_OUTPUT, "it reads what an activation makes of linears")
            findings.say(free, Structure.MLP_INPUT, f"through an activation it feeds {_called(match.anchor)}")
    for match in GATED_PRODUCT.matches(graph):
        pair = (match.one("left"), match.one("right"))
        if all(findings.structure.get(node, (None,))[0] is Structure.MLP_INPUT for node in pair):
            findings.fuse("gate-up", pair)
