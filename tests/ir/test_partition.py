"""Partitions: every node in one, in order, and values cross only where reads and writes say so."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from qcompiler.errors import CaptureError
from qcompiler.ir.annotations import Role, Scope, annotate, need
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.partition import layer_of, partitions
from tests.capture.models import captured

MODELS = ["llama", "gemma3_text", "deepseek_v3", "gpt2", "cohere2", "llama4_text"]


def parts_of(model_type: str) -> tuple[Partition, ...]:
    return partitions(captured(model_type))


@pytest.mark.parametrize("model_type", MODELS)
def test_every_node_is_in_exactly_one_partition(model_type: str) -> None:
    nodes = [node for part in parts_of(model_type) for node in part.nodes]
    wanted = [node for node in captured(model_type).nodes if node.op not in ("placeholder", "output")]
    assert len(nodes) == len(wanted)
    assert set(nodes) == set(wanted)


@pytest.mark.parametrize("model_type", MODELS)
def test_run_one_after_the_other_each_reads_what_was_written_before(model_type: str) -> None:
    graph = captured(model_type)
    written = {graph.input}
    for part in parts_of(model_type):
        here = set(part.nodes)
        done = set()
        for node in part.nodes:
            for source in node.all_input_nodes:
                assert source in done if source in here else source in part.reads
            done.add(node)
        assert set(part.reads) <= written
        assert not set(part.reads) & here
        assert set(part.writes) <= here
        written |= set(part.writes)
    assert graph.output in written


@pytest.mark.parametrize("model_type", MODELS)
def test_there_is_one_partition_a_layer_between_inputs_and_outputs(model_type: str) -> None:
    layers = captured(model_type).model.config.num_hidden_layers
    assert [part.layer for part in parts_of(model_type)] == [None, *range(layers), None]
    assert [part.name for part in parts_of(model_type)][:2] == ["inputs", "layer 0"]


def test_leaves_know_the_layer_of_their_partition() -> None:
    graph = captured("deepseek_v3")
    layers = layer_of(graph)
    assert all(need(node, Role).layer == layers.get(node) for node, _ in graph.leaves())


def test_a_layer_that_reads_a_later_one_is_refused() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    graph = fx.Graph()
    node = graph.placeholder("x")
    annotate(node, Scope(()))
    for layer in ("layers.0", "layers.1", "layers.0"):
        node = graph.call_function(torch.relu, (node,))
        annotate(node, Scope((("", ""), (layer, layer))))
    annotate(graph.output(node), Scope(()))
    with pytest.raises(CaptureError, match="of layer 0 reads a value of layer 1"):
        partitions(Graph(graph, cast(PreTrainedModel, model)))
