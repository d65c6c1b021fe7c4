"""Lowering: the graph that a compilation leaves, and what it means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qcompiler
from qcompiler.errors import ConfigError, VerificationError
from qcompiler.ir.annotations import Leaf, Observer, Quant, Role, Scope, get, need
from qcompiler.ir.fx import inputs, value
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import fake_quantize, fake_quantize_cache, observe, quantized_linear
from qcompiler.ir.printer import print_leaves
from qcompiler.ir.spec import verify
from qcompiler.lowering.rewrite import lower_graph
from qcompiler.pipeline import Context, StreamingPass
from qcompiler.report import Report
from qcompiler.source import ModelSource
from tests.conftest import Golden
from tests.ir.graphs import legal
from tests.passes.conftest import Saved
from tests.passes.models import assign, block, copied, pipeline, recurrent, rule, run

PASSES = (
    assign(
        rule("FP8", structure="attention-input"),
        rule("FP8_DYNAMIC", structure="attention-output"),
        rule("W4A16_ASYM", structure=["mlp-input", "mlp-output"]),
        kv_cache={},
        ignore=[{"structure": "lm-head"}],
    ),
    "legalize",
    "insert-observers",
    "calibrate",
    "lower",
)


def test_a_graph_before_and_after_every_stage_of_a_compilation(saved: Saved, tmp_path: Path, golden: Golden) -> None:
    shown: list[tuple[str, Stage, str]] = []

    def show(name: str, graph: Graph) -> None:
        verify(graph, after="test")
        shown.append((name, graph.stage, print_leaves(graph)))

    rows = [list(range(3, 35))] * 2
    result = qcompiler.compile(
        saved(block()),
        pipeline=pipeline(*PASSES),
        output=tmp_path / "out",
        calibration=rows,
        sampling=qcompiler.CalibrationSpec(samples=2, sequence_length=32),
        show=show,
    )
    assert [(name, str(stage)) for name, stage, _ in shown] == [
        ("assign", "annotated"),
        ("legalize", "annotated"),
        ("insert-observers", "observed"),
        ("calibrate", "calibrated"),
        ("lower", "lowered"),
    ]
    # Streaming passes run as one sweep, at whose end each brings the graph to its stage.
    assert shown[3][2] == shown[2][2].replace("(observed)", "(calibrated)")
    assert print_leaves(result.graph) == shown[4][2]
    golden("lower", f"{shown[3][2]}\n{shown[4][2]}")


@pytest.fixture
def graphs() -> tuple[Graph, Graph]:
    """A calibrated graph, and the lowered graph of it."""
    before = copied(legal(Stage.CALIBRATED))
    return before, legal(Stage.LOWERED)


def test_every_linear_with_a_scheme_becomes_one_operation_on_its_own_numbers(graphs: tuple[Graph, Graph]) -> None:
    before, after = graphs
    for (old, old_leaf), (new, new_leaf) in zip(before.linears(), after.linears(), strict=True):
        assert new_leaf == old_leaf
        assert [get(new, kind) for kind in (Quant, Role, Scope)] == [get(old, kind) for kind in (Quant, Role, Scope)]
        assert str(value(new).shape) == str(value(old).shape)
        assert [user.name for user in new.users if user.op == "output"] == [
            u.name for u in old.users if u.op == "output"
        ]
        if old_leaf.path == "lm_head":
            assert new.op == "call_module"
        else:
            assert (new.target, new.args[1]) == (quantized_linear, old_leaf.path)


def test_inputs_are_rounded_where_schemes_say_so_and_nowhere_else(graphs: tuple[Graph, Graph]) -> None:
    _, after = graphs
    for node, leaf in after.linears():
        quant = get(node, Quant)
        rounded = inputs(node)[0].target is fake_quantize
        assert rounded == bool(quant and quant.scheme and quant.scheme.input_activations)
        if rounded:
            assert inputs(node)[0].args[1] == leaf.path


def test_observers_are_gone_and_keys_and_values_are_rounded(graphs: tuple[Graph, Graph]) -> None:
    before, after = graphs
    assert any(node.target is observe for node in before.nodes)
    assert not any(node.target is observe for node in after.nodes)
    (attention,) = (n for n in after.nodes if n.name == "scaled_dot_product_attention")
    (watched,) = (n for n in before.nodes if n.name == "scaled_dot_product_attention")
    for now, then in zip(inputs(attention), inputs(watched), strict=True):
        if then.target is not observe:
            assert now.name == then.name
            continue
        observer = need(then, Observer)
        assert (now.target, now.args[1:]) == (fake_quantize_cache, (observer.consumers[0], observer.purpose))
        assert inputs(now)[0].name == inputs(then)[0].name


def test_a_module_that_runs_twice_is_lowered_at_both_calls() -> None:
    graph = run(recurrent(), assign(rule("W8A8", name="*.L_module.*.down_proj")), "insert-observers").graph
    lower_graph(graph)
    calls = [node for node in graph.nodes if node.target is quantized_linear]
    assert [need(node, Leaf).path for node in calls] == ["model.L_module.layers.0.mlp.down_proj"] * 2
    assert [inputs(node)[0].target for node in calls] == [fake_quantize] * 2


@pytest.mark.parametrize("operation", [fake_quantize, quantized_linear])
def test_a_lowered_operation_computes_nothing_without_the_numbers_of_its_layer(operation: object) -> None:
    assert callable(operation)
    with pytest.raises(VerificationError, match=r"model\.layers\.0 needs its"):
        operation(torch.zeros(1), "model.layers.0")


def test_lowering_without_an_output_is_refused() -> None:
    graph = copied(legal(Stage.CALIBRATED))
    (lower,) = pipeline("lower").flat()
    assert isinstance(lower, StreamingPass)
    context = Context(ModelSource(Path("no files"), graph.model.config, graph.model), Report())
    with pytest.raises(ConfigError, match="lower has nowhere to write") as error:
        lower.begin(graph, context)
    assert error.value.hint == "pass --output (Python: output=)"
