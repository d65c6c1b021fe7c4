"""Printed graphs: one line a node, under names that read like the model and say one thing each."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx
from torch.fx.node import map_aggregate

from qcompiler.ir.annotations import Leaf, Observer, get
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import OPS
from qcompiler.ir.printer import Printer, print_graph, print_leaves
from tests.capture.models import captured
from tests.conftest import Golden
from tests.ir.graphs import changed, leaf, legal, op
from tests.passes.models import block, copied

ATEN = torch.ops.aten


def line(graph: Graph, node: fx.Node) -> str:
    return Printer(graph).line(node)


def extended(target: object, args: tuple[object, ...], kwargs: dict[str, object] | None = None) -> str:
    """How a call reads that is added to a graph."""
    graph = copied(captured("llama"))
    silu = op(graph, "silu")
    arguments = map_aggregate(args, lambda arg: silu if arg == "silu" else arg)
    with graph.fx.inserting_after(silu):
        node = graph.fx.call_function(target, arguments, kwargs or {})
    return line(graph, node).partition(" = ")[2]


def test_a_linear_reads_as_where_it_stands_what_becomes_of_it_and_who_said_so() -> None:
    graph = legal(Stage.ANNOTATED)
    assert line(graph, leaf(graph, "model.layers.1.self_attn.k_proj")) == (
        "%l1.self_attn.k_proj = linear(%l1.input_layernorm) [B,S,64]  w:fp8/tensor a:fp8/tensor  rtn  attention-input  "
        "group=l1.qkv  ; assign: rule 1"
    )


def test_an_observer_reads_as_what_it_measures_for_whom() -> None:
    graph = legal(Stage.OBSERVED)
    observe = next(node for node in graph.nodes if node.target is OPS["observe"])
    assert line(graph, observe) == (
        "%observe = observe(%l0.input_layernorm) [B,S,64]  minmax of input for fp8/tensor  "
        "id=l0.attention-input.fp8/tensor  ; insert-observers: the input scale of fp8/tensor is measured"
    )
    clipped = copied(graph)
    node = next(node for node in clipped.nodes if node.target is OPS["observe"])
    changed(node, Observer, kind="percentile", percentile=99.5)
    assert "  percentile 99.5 of input for fp8/tensor  " in line(clipped, node)


def test_a_lowered_linear_keeps_its_name_and_its_rounded_input_is_named_after_it() -> None:
    graph = legal(Stage.LOWERED)
    out = next(node for node, found in graph.leaves() if found.path == "model.layers.0.self_attn.o_proj")
    assert line(graph, out.args[0]) == "%l0.self_attn.o_proj.input = fake_quantize(%reshape) [B,S,64]"
    assert line(graph, out).startswith("%l0.self_attn.o_proj = quantized_linear(%l0.self_attn.o_proj.input) [B,S,64]  ")


def test_inputs_attributes_sizes_and_the_result_have_forms_of_their_own() -> None:
    text = print_graph(captured("llama")).split("\n")
    assert text[:2] == ["graph LlamaForCausalLM (captured)", "%input_ids = input [B,S]"]
    for form in (
        "%model.rotary_emb.inv_freq = attribute [8]",
        "%B = sym_size(%input_ids, 0)",
        "%S = sym_size(%input_ids, 1)",
    ):
        assert form in text
    assert text[-2:] == ["return %lm_head", ""]


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "text"),
    [
        (ATEN.slice.Tensor, ("silu", 1, 2, 9223372036854775807), None, "slice(%silu, 1, 2, end)"),
        (ATEN.mul.Tensor, ("silu", 1 / 3), None, "mul(%silu, 0.333333)"),
        (ATEN.add_.Tensor, ("silu", 1), None, "add_(%silu, 1)"),
        (ATEN.cat.default, (["silu", "silu"], -1), None, "cat([%silu, %silu], -1)"),
        (ATEN.to.dtype, ("silu", torch.bfloat16), None, "to(%silu, bfloat16)"),
        (ATEN.sum.dim_IntList, ("silu", [-1]), {"dtype": torch.float32}, "sum(%silu, [-1], dtype=float32)"),
        (ATEN.zeros.default, ([2],), {"device": torch.device("meta"), "dtype": None}, "zeros([2])"),
        (torch.relu, ("silu",), None, "relu(%silu)"),
    ],
    ids=["end", "float", "in-place", "list", "dtype", "keyword", "hidden", "plain function"],
)
def test_arguments(target: object, args: tuple[object, ...], kwargs: dict[str, object] | None, text: str) -> None:
    assert extended(target, args, kwargs) == text


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma3n_text"])
def test_every_name_is_used_once_and_read_only_after_it(model_type: str) -> None:
    seen: set[str] = set()
    for text in print_graph(captured(model_type)).strip().split("\n")[1:]:
        left, _, right = text.partition(" = ") if not text.startswith("return") else ("", "", text)
        assert set(re.findall(r"%[\w.]+", right)) <= seen, text
        assert left not in seen
        seen.add(left)


def test_a_module_that_runs_twice_has_two_names() -> None:
    graph = captured("gemma3n_text")
    calls = [node for node, found in graph.leaves() if found.path == "model.layers.0.altup.modality_router"]
    assert [Printer(graph).name(node) for node in calls] == [
        "%l0.altup.modality_router",
        "%model_layers_0_altup_modality_router_1",
    ]


def test_sizes_print_alike_whatever_the_tracer_called_them() -> None:
    graph = copied(captured("mixtral"))
    text = print_graph(graph)
    assert "[S*B,64]" in text or "[B*S,64]" in text
    assert not re.search(r"\b[su]\d+\b", text)


def test_the_short_form_has_leaves_and_inserted_operations_alone() -> None:
    graph = legal(Stage.OBSERVED)
    wanted = [node for node in graph.nodes if get(node, Leaf) or node.target in OPS.values()]
    assert print_leaves(graph) == f"graph LlamaForCausalLM (observed)\n{Printer(graph).lines(wanted)}\n"
    assert len(wanted) < len(graph.nodes) / 2


def test_a_node_of_another_graph_and_a_broken_one_are_printed_too() -> None:
    graph = copied(captured("llama"))
    printer = Printer(graph)
    silu = op(graph, "silu")
    silu.op, silu.target, silu.meta = "call_method", "relu", {}
    stranger = fx.Graph().placeholder("stranger")
    assert printer.line(silu) == "%silu = relu(%l0.mlp.gate_proj)"
    assert printer.line(stranger) == "%stranger = input"


def test_a_whole_graph_reads_as_it_always_did(golden: Golden) -> None:
    golden("captured", print_graph(block()))
