"""The verifier: every rule of every stage, on a graph that is legal but for what breaks that one rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompiler.errors import VerificationError
from qcompiler.ir.annotations import Role, annotate
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.printer import Printer
from qcompiler.ir.spec import SPECS, verify
from qcompiler.lowering.rewrite import lower_graph
from tests.conftest import Golden
from tests.ir.graphs import legal
from tests.ir.violations import CASES, Case
from tests.ir.violations.observers import linears_of_one_input_are_observed_apart
from tests.passes.models import assign, copied, rule, run


def broken_rules(graph: Graph) -> set[str]:
    return {rule.name for rule in SPECS[graph.stage] if next(rule.broken(graph), None)}


@pytest.mark.parametrize("stage", Stage, ids=str)
def test_every_rule_has_a_case_at_every_stage(stage: Stage) -> None:
    assert {case.rule for case in CASES if stage in case.stages} == {rule.name for rule in SPECS[stage]}


@pytest.mark.parametrize("stage", Stage, ids=str)
def test_a_graph_that_passes_made_is_legal(stage: Stage) -> None:
    verify(legal(stage), after="test")


@pytest.mark.parametrize("model_type", ["phi", "mixtral"])
def test_passes_leave_legal_graphs_of_blocks_that_are_parallel_or_sparse(model_type: str) -> None:
    rules = (rule("FP8", structure="attention-input"), rule("NVFP4", structure="mlp-output", optional=True))
    done = run(model_type, assign(*rules, kv_cache={"strategy": "attn_head"}), "insert-observers")
    lower_graph(done.graph)
    verify(replace(done.graph, stage=Stage.LOWERED), after="test")


@pytest.mark.parametrize(("case", "stage"), [pytest.param(c, s, id=f"{s}-{c.name}") for c in CASES for s in c.stages])
def test_a_broken_rule_says_what_where_and_after_which_pass(case: Case, stage: Stage) -> None:
    graph = copied(legal(stage))
    node = case.edit(graph)
    assert broken_rules(graph) == {case.rule}
    with pytest.raises(VerificationError) as error:
        verify(graph, after="vandal")
    nodes, printer = graph.nodes, Printer(graph)
    at = " ".join(filter(None, (printer.name(node), case.module)))
    index = nodes.index(node)
    around = [f"  {'>' if n is node else ' '} {printer.line(n)}" for n in nodes[max(index - 3, 0) : index + 4]]
    assert error.value.message.split("\n") == [
        f"after vandal, the {stage} graph breaks rule {case.rule} at {at}: {case.says}",
        *around,
    ]


def test_an_error_reads_well(golden: Golden) -> None:
    graph = copied(legal(Stage.OBSERVED))
    linears_of_one_input_are_observed_apart(graph)
    with pytest.raises(VerificationError) as error:
        verify(graph, after="vandal")
    golden("verifier-error", str(error.value))


def test_an_error_at_the_first_node_shows_what_there_is() -> None:
    graph = copied(legal(Stage.CAPTURED))
    first = graph.nodes[0]
    annotate(first, Role(None, None, None, None, "test"))
    with pytest.raises(VerificationError) as error:
        verify(graph, after="vandal")
    _, *lines = error.value.message.split("\n")
    assert [line[:4] for line in lines] == ["  > ", "    ", "    ", "    "]
