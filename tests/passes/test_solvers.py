"""Rules name solvers, and solvers that need Hessians get one for all linears that read the same tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from passes.calibrate import Calibrate
from qcompiler.errors import ConfigError, LegalityError
from qcompiler.ir.annotations import ChannelObserver, HessianObserver, Observer, Quant, get, need, observed
from qcompiler.ir.fx import Node, inputs
from qcompiler.ir.graph import Graph
from qcompiler.ir.observers import observers
from qcompiler.ir.ops import observe
from qcompiler.ir.printer import print_leaves
from qcompiler.lowering.rewrite import lower_graph
from qcompiler.pipeline import Context
from qcompiler.report import Report
from qcompiler.solvers.options import GptqOptions
from qcompiler.source import ModelSource
from tests.passes.models import assign, block, pipeline, recurrent, rule, run

EVERYTHING = ["attention-input", "attention-output", "mlp-input", "mlp-output"]
INT4 = {"weights": {"type": "int", "bits": 4, "group_size": 32}}


def solved(solver: object, scheme: object = INT4, **select: object) -> dict[str, object]:
    return {**rule(scheme, **(select or {"structure": EVERYTHING})), "solver": solver}  # type: ignore[arg-type]


def hessians(graph: Graph) -> dict[str, tuple[str, ...]]:
    found = (get(node, HessianObserver) for node in graph.nodes)
    return {observer.id: observer.consumers for observer in found if observer is not None}


def linear(graph: Graph, name: str) -> Node:
    return next(node for node, leaf in graph.linears() if leaf.path.endswith(name))


def test_linears_that_read_one_tensor_share_one_hessian() -> None:
    graph = run(block(), assign(solved("gptq")), "insert-observers").graph
    short = {id_: [path.rpartition(".")[2] for path in paths] for id_, paths in hessians(graph).items()}
    assert short == {
        "l0.attention-input.hessian": ["q_proj", "k_proj", "v_proj"],
        "l0.attention-output.hessian": ["o_proj"],
        "l0.mlp-input.hessian": ["gate_proj", "up_proj"],
        "l0.mlp-output.hessian": ["down_proj"],
    }
    assert {inputs(linear(graph, f"{name}_proj"))[0] for name in "qkv"} == {inputs(linear(graph, "q_proj"))[0]}


def test_a_parallel_block_has_one_hessian_for_attention_and_mlp() -> None:
    graph = run("phi", assign(solved("gptq", {"weights": {"bits": 8}})), "insert-observers").graph
    first = next(paths for id_, paths in hessians(graph).items() if id_.startswith("l0."))
    assert [path.rpartition(".")[2] for path in first] == ["q_proj", "k_proj", "v_proj", "fc1"]


def test_only_linears_whose_rule_says_so_have_one() -> None:
    rules = (solved("gptq", structure="mlp-output"), rule(INT4, structure=EVERYTHING[:3]))
    graph = run(block(), assign(*rules), "insert-observers").graph
    assert list(hessians(graph)) == ["l0.mlp-output.hessian"]


def test_a_tensor_can_have_its_range_and_its_hessian_observed() -> None:
    graph = run(block(), assign(solved("gptq", "FP8")), "insert-observers").graph
    range_ = inputs(linear(graph, "k_proj"))[0]
    hessian = inputs(range_)[0]
    assert isinstance(observed(range_), Observer)
    assert isinstance(observed(hessian), HessianObserver)
    assert observed(inputs(hessian)[0]) is None


def test_options_reach_the_annotation_and_others_do_not_change() -> None:
    graph = run(block(), assign(solved({"gptq": {"damping": 0.05, "order": "natural"}})), "insert-observers").graph
    quant = need(linear(graph, "o_proj"), Quant)
    assert (quant.solver, quant.options) == ("gptq", GptqOptions(damping=0.05, order="natural"))


def channels(graph: Graph) -> dict[str, tuple[str, ...]]:
    found = (get(node, ChannelObserver) for node in graph.nodes)
    return {observer.id: observer.consumers for observer in found if observer is not None}


def test_importance_is_measured_where_no_hessian_says_it() -> None:
    rules = assign(solved("gptq", structure="mlp-input"), rule("W8A16", structure=["attention-output", "mlp-output"]))
    passes = rules, {"legalize": {"target": "transformers"}}
    graph = run(block(), *passes, {"insert-observers": {"importance": True}}).graph
    assert list(hessians(graph)) == ["l0.mlp-input.hessian"]
    assert list(channels(graph)) == ["l0.attention-output.channels", "l0.mlp-output.channels"]
    assert not channels(run(block(), *passes, "insert-observers").graph)
    assert "importance needs it" in print_leaves(graph)


def test_a_tensor_whose_readers_differ_has_both_measured() -> None:
    rules = assign(solved("gptq", {"weights": {"bits": 8}}, name="*fc1"), rule("W8A8", name="*_proj"))
    graph = run("phi", rules, {"insert-observers": {"importance": True}}).graph
    shared = [paths for id_, paths in channels(graph).items() if id_.startswith("l0.") and len(paths) == 3]
    assert len(shared) == 1
    for node, leaf in graph.linears():
        kinds = [type(observer) for observer in observers(node)]
        quantized = leaf.path.endswith(("fc1", "_proj"))
        wanted = HessianObserver if leaf.path.endswith("fc1") else ChannelObserver
        assert kinds == ([wanted] if quantized else []), leaf.path


def test_importance_that_nothing_measures_is_refused_before_anything_runs() -> None:
    graph = run(block(), assign(solved("gptq", structure="mlp-input"), rule("W8A16", structure="mlp-output"))).graph
    graph = run(graph, "insert-observers").graph
    context = Context(ModelSource(Path("no files"), graph.model.config, graph.model), Report())
    with pytest.raises(
        ConfigError, match=r"nothing measures those of model\.layers\.0\.mlp\.down_proj\n.*importance: true"
    ):
        Calibrate(scales="importance").prepare(graph, context)


def test_lowering_removes_every_observer() -> None:
    graph = run(block(), assign(solved("gptq", "FP8")), "insert-observers").graph
    lower_graph(graph)
    assert not any(node.target is observe for node in graph.nodes)
    assert {need(node, Quant).solver for node, leaf in graph.linears() if leaf.path != "lm_head"} == {"gptq"}


@pytest.mark.parametrize(
    ("solver", "says"),
    [
        ("gtpq", "unknown solver 'gtpq'; did you mean 'gptq'"),
        ({"gptq": {"damp": 0.1}}, "damp"),
        ({"gptq": {"damping": 0}}, "greater than 0"),
        ({"gptq": {"order": "sorted"}}, "'activation' or 'natural'"),
        ({"rtn": {"damping": 0.1}}, "damping"),
        ({"rtn": {}, "gptq": {}}, "a solver is a name"),
        (7, "a solver is a name"),
    ],
)
def test_a_solver_that_means_nothing_is_refused_where_it_is_written(solver: object, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        pipeline(assign(solved(solver)))
    assert "assign.rules[0].solver" in str(error.value)
    assert says in str(error.value)


def test_a_module_of_several_partitions_is_refused_before_anything_runs() -> None:
    with pytest.raises(LegalityError, match=r"no Hessian of its inputs can be measured.*\n.*solver rtn"):
        run(recurrent(), assign(solved("gptq", {"weights": {"bits": 8}}, name="*_proj")), "insert-observers")


def test_printed_lines_say_what_is_collected() -> None:
    lines = print_leaves(run(block(), assign(solved("gptq")), "insert-observers").graph).splitlines()
    (line,) = [line for line in lines if "id=l0.mlp-output.hessian" in line]
    assert line.endswith("hessian  id=l0.mlp-output.hessian  ; insert-observers: gptq needs it")
