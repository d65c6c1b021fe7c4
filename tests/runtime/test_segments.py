"""Segments: cut where what is rounded changes what is observed, and nowhere between what belongs together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from qcompiler.ir.annotations import AnyObserver, Leaf, Observer, get, get_quant, observed
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.partition import partitions
from qcompiler.patterns.place import rescales
from qcompiler.runtime.segments import segments
from tests.passes.models import assign, rule, run
from tests.zoo import FAMILIES

INPUTS, OUTPUT = ["attention-input"], ["attention-output"]
MLP_INPUTS, MLP_OUTPUT = ["mlp-input"], ["mlp-output"]
EVERYWHERE = [*INPUTS, *OUTPUT, *MLP_INPUTS, *MLP_OUTPUT]
INT4 = {"weights": {"type": "int", "bits": 4, "strategy": "channel"}}


def gptq(*structures: str, **options: Any) -> dict[str, Any]:
    return {**rule(INT4, structure=list(structures)), "solver": "gptq", **options}


def cut(graph: Graph) -> list[tuple[Partition, ...]]:
    """The segments of each partition, for one run that solves all."""
    rounded = {leaf.path for node, leaf in graph.linears() if (quant := get_quant(node)) and quant.scheme}
    return [segments(part, watched(part), rounded.__contains__) for part in partitions(graph)]


def watched(part: Partition) -> dict[Node, AnyObserver]:
    return {node: found for node in part.nodes if (found := observed(node)) is not None}


def linears(segment: Partition) -> str:
    """The linears of a segment, by the last part of their names."""
    found = [leaf.path.rpartition(".")[2] for n in segment.nodes if (leaf := get(n, Leaf)) and leaf.is_linear]
    return " ".join(found)


def layer(model_type: str, *rules: Mapping[str, Any], **said: Any) -> list[str]:
    """What is solved together in the first layer, in order."""
    return [linears(segment) for segment in cut(run(model_type, assign(*rules, **said), "insert-observers").graph)[1]]


QKV, MLP = "q_proj k_proj v_proj", "gate_proj up_proj"
AWQ = {"transform": "awq"}
CASES: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "every input observed": ("llama", [gptq(*EVERYWHERE)], [QKV, "o_proj", MLP, "down_proj"]),
    "nothing observed": ("llama", [rule(INT4, structure=EVERYWHERE)], [f"{QKV} o_proj {MLP} down_proj"]),
    "nothing rounded before": ("llama", [gptq(*INPUTS)], [f"{QKV} o_proj {MLP} down_proj"]),
    "rounded before, not observed": (
        "llama",
        [rule(INT4, structure=[*INPUTS, *OUTPUT]), gptq(*MLP_INPUTS, *MLP_OUTPUT)],
        [f"{QKV} o_proj", MLP, "down_proj"],
    ),
    "dense between": ("llama", [gptq(*INPUTS, *MLP_OUTPUT)], [f"{QKV} o_proj {MLP}", "down_proj"]),
    "scales move in attention": (
        "llama",
        [gptq(*INPUTS, *OUTPUT, **AWQ), gptq(*MLP_INPUTS, *MLP_OUTPUT)],
        [f"{QKV} o_proj", MLP, "down_proj"],
    ),
    "scales move in the MLP, and into it": (
        "llama",
        [gptq(*INPUTS, *OUTPUT), gptq(*MLP_INPUTS, *MLP_OUTPUT, **AWQ)],
        [QKV, "o_proj", f"{MLP} down_proj"],
    ),
    "scales move everywhere": ("gemma2", [gptq(*EVERYWHERE, **AWQ)], [f"{QKV} o_proj", f"{MLP} down_proj"]),
    "parallel blocks": ("cohere", [gptq(*EVERYWHERE)], [f"{QKV} {MLP}", "o_proj down_proj"]),
    "fused projections": ("phi3", [gptq(*EVERYWHERE)], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_cut_where_observers_see_what_is_rounded(case: str) -> None:
    model_type, rules, expected = CASES[case]
    found = layer(model_type, *rules)
    assert [set(part.split()) for part in found] == [set(part.split()) for part in expected]


def test_nothing_is_cut_where_nothing_is_to_be_seen_rounded() -> None:
    graph = run("llama", assign(gptq(*EVERYWHERE), kv_cache={"strategy": "tensor"}), "insert-observers").graph
    for part in partitions(graph):
        assert segments(part, watched(part), lambda path: False) == (part,)


def test_cached_keys_and_values_are_observed_before_what_reads_them() -> None:
    found = run("llama", assign(gptq(*EVERYWHERE), kv_cache={"strategy": "tensor"}), "insert-observers").graph
    places = {
        (observer.purpose if isinstance(observer, Observer) else observer.consumers[0].rpartition(".")[2]): index
        for index, segment in enumerate(cut(found)[1])
        for observer in watched(segment).values()
    }
    assert places == {"q_proj": 0, "key": 1, "value": 1, "o_proj": 2, "gate_proj": 3, "down_proj": 4}


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"gpt2"}))  # whose Conv1Ds have no form in a checkpoint
@pytest.mark.parametrize("transform", [None, "awq"])
def test_segments_are_a_partition_in_order_of_what_belongs_together(model_type: str, transform: str | None) -> None:
    options = {"transform": transform} if transform else {}
    graph = run(model_type, assign(gptq(*EVERYWHERE, optional=True, **options)), "insert-observers").graph
    for part, found in zip(partitions(graph), cut(graph), strict=True):
        assert sorted(node for segment in found for node in segment.nodes) == sorted(part.nodes)
        done = set(part.reads)
        place: dict[str, int] = {}
        for index, segment in enumerate(found):
            assert set(segment.reads) <= done
            assert index == 0 or any(node in watched(part) for node in segment.nodes)
            for node in segment.nodes:
                assert all(source in done for source in node.all_input_nodes)
                done.add(node)
                if (leaf := get(node, Leaf)) is not None:
                    assert place.setdefault(leaf.path, index) == index
        for rescale in rescales(part.nodes):
            assert len({place[path] for path in (rescale.producer, *rescale.consumers)}) == 1
