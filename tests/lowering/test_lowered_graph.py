"""The graph that a compilation returns: what was compiled, evaluated on the checkpoint that was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qcompiler
from qcompiler import Result
from qcompiler.data import TokenBatch
from qcompiler.ir.annotations import Leaf, get_quant, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import fake_quantize, observe, quantized_linear
from qcompiler.ir.spec import verify
from qcompiler.lowering.evaluate import Lowered, logits, open_lowered
from tests.compile.tiny import (
    ATTENTION,
    INT4_ASYM,
    MLP,
    compile_tiny,
    pipeline,
    rule,
    save_tiny,
)

MIXED = pipeline(
    rule({"structure": "attention-input"}, "FP8"),
    rule({"structure": "attention-output"}, "NVFP4"),
    rule(MLP, INT4_ASYM),
)


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp(request.param)
    return compile_tiny(save_tiny(folder / "source", request.param), folder / "output", MIXED)


def batches() -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 320, shape, generator=generator) for shape in ((2, 13), (1, 29))]
    return [TokenBatch(each, torch.ones_like(each, dtype=torch.bool)) for each in ids]


def calls(graph: Graph, target: object) -> list[Node]:
    return [node for node in graph.nodes if node.target is target]


def test_the_graph_is_lowered_and_legal(result: Result) -> None:
    graph = result.graph
    assert graph.stage is Stage.LOWERED
    verify(graph, after="test")
    assert not calls(graph, observe)
    schemes = {row.path: row.scheme for row in result.report.layers}
    quantized = {path for path, scheme in schemes.items() if scheme}
    assert [node.args[1] for node in calls(graph, quantized_linear)] == [p for p in schemes if p in quantized]
    rounded = {node.args[1] for node in calls(graph, fake_quantize)}
    assert rounded == {path for path, scheme in schemes.items() if scheme and " a:" in scheme}
    for node in calls(graph, quantized_linear):
        quant = get_quant(node)
        assert quant is not None
        assert quant.scheme is not None
        assert quant.scheme.short == schemes[need(node, Leaf).path]


def test_it_computes_the_logits_of_the_checkpoint_in_transformers(result: Result) -> None:
    client = AutoModelForCausalLM.from_pretrained(result.output).eval()
    with open_lowered(result.output) as stored:
        returned = Lowered(result.graph, stored.source, stored.reader)
        ours = logits(returned, batches(), torch.device("cpu"))
        rebuilt = logits(stored, batches(), torch.device("cpu"))
    with torch.inference_mode():
        theirs = [client(input_ids=batch.input_ids).logits for batch in batches()]
    for a, b, c in zip(ours, rebuilt, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_it_is_another_function_than_the_dense_model(result: Result) -> None:
    """What the equalities above would not tell: that quantization does anything."""
    dense = AutoModelForCausalLM.from_pretrained(result.output.parent / "source").eval()
    with open_lowered(result.output) as stored, torch.inference_mode():
        for batch, ours in zip(batches(), logits(stored, batches(), torch.device("cpu")), strict=True):
            wanted = dense(input_ids=batch.input_ids).logits.float()
            difference = (ours.float() - wanted).square().mean().sqrt() / wanted.std()
            assert 0.01 < float(difference) < 0.6


def test_the_plan_is_kept_as_it_was_before_calibration(result: Result) -> None:
    assert all(row.error is None for row in result.plan.report.layers)
    assert result.plan.report.total_bytes == result.report.total_bytes
    assert {timing.name for timing in result.plan.report.timings} < {timing.name for timing in result.report.timings}
    assert {"calibrate", "lower", "forward: collect"} <= {timing.name for timing in result.report.timings}


def test_a_plan_shows_the_observed_graph(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    planned = qcompiler.plan(source, pipeline(rule(ATTENTION, "FP8")))
    assert planned.graph.stage is Stage.OBSERVED
    assert len(calls(planned.graph, observe)) == 4  # two tensors in each of two layers
    assert not calls(planned.graph, quantized_linear)
