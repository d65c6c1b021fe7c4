"""Models deeper than their twins are compared with eager all the same, and weights lie where they are used."""

from __future__ import annotations

import gc

import pytest
from torch import fx

from qcompiler.capture import capture_and_prove, capture_graph
from qcompiler.ir.partition import partitions
from tests.capture.models import on_meta

DEEP = ("llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "llama4_text", "cohere2")


@pytest.mark.parametrize("model_type", DEEP)
def test_a_model_deeper_than_its_twin_is_proved(model_type: str) -> None:
    model = on_meta(model_type, layers=7, vocab_size=400_000)
    assert model.num_parameters() > 16_000_000, "it is compared itself"
    graph, _ = capture_and_prove(model)
    assert graph.layer_count == 7


def test_a_layers_router_is_read_with_its_layer() -> None:
    parts = partitions(capture_graph(on_meta("mixtral", layers=5)))
    for part in parts:
        read = [str(node.target) for node in part.nodes if node.op == "get_attr" and "gate" in str(node.target)]
        assert read == ([] if part.layer is None else [f"model.layers.{part.layer}.mlp.gate.weight"])


def test_nodes_that_capture_erased_are_gone() -> None:
    gc.disable()
    try:
        graph = capture_graph(on_meta("llama", layers=5))
        assert not gc.isenabled(), "whoever disabled the collector enables it"
    finally:
        gc.enable()
    left = [thing for thing in gc.get_objects() if type(thing) is fx.Node and thing.graph is graph.fx]
    assert len(left) == len(graph.nodes) + 1  # and the root of its list
