"""Structure comes from the graph: whatever modules are called, the annotations are the same."""

from __future__ import annotations

from qcompiler.ir.partition import partitions
from tests.capture.conftest import Member
from tests.renaming import renamed, structure


def test_roles_are_the_same_under_any_names(member: Member) -> None:
    graph = member.captured
    other = renamed(graph, seed=0)
    assert not {leaf.path for _, leaf in graph.leaves()} & {leaf.path for _, leaf in other.leaves()}
    assert structure(other) == structure(graph)


def test_partitions_are_the_same_under_any_names(member: Member) -> None:
    graph = member.captured
    sizes, others = (
        [(p.layer, len(p.nodes), len(p.reads)) for p in partitions(g)] for g in (graph, renamed(graph, seed=1))
    )
    assert others == sizes
