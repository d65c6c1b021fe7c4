"""Edits that break the rules of lowered graphs."""

from __future__ import annotations

from torch import fx

from qcompiler.ir.annotations import Quant
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import fake_quantize, fake_quantize_cache, observe
from tests.ir.graphs import changed, erase, insert, leaf, requant
from tests.ir.violations.case import DENSE, DOWN, GATE, HEAD, LAYER, NORM, OUT, K, Q, breaks


@breaks("no-observe", "an observe node is left after lowering", module=f"(in module {Q})")
def an_observer_is_left(graph: Graph) -> fx.Node:
    return insert(graph, observe, leaf(graph, NORM), like=leaf(graph, Q))


@breaks("linears-lowered", "a linear with a scheme was not lowered", module=f"(module {HEAD})")
def a_linear_is_left(graph: Graph) -> fx.Node:
    return changed(leaf(graph, HEAD), Quant, like=leaf(graph, OUT), because=("test",))


@breaks("names-layer", "it does not name the layer whose numbers it uses", module=f"(module {DOWN})")
def a_quantized_linear_names_no_layer(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = node.args[:1]
    return node


@breaks("names-layer", f"it rounds the input of {Q}, but {K} reads it", module=f"(in module {Q})")
def an_input_is_rounded_for_another_layer(graph: Graph) -> fx.Node:
    node = leaf(graph, K)
    node.args = (leaf(graph, Q).args[0], *node.args[1:])
    return node.args[0]


OTHERS_NUMBERS = "but its annotations do not give that layer a scheme"


@breaks("names-layer", f"it uses the numbers of {GATE}, {OTHERS_NUMBERS}", module=f"(module {DOWN})")
def a_quantized_linear_uses_anothers_numbers(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = (node.args[0], GATE)
    return node


@breaks("names-layer", f"it uses the numbers of {DOWN}, {OTHERS_NUMBERS}", module=f"(module {DOWN})")
def a_quantized_linear_has_no_scheme(graph: Graph) -> fx.Node:
    return requant(leaf(graph, DOWN), DENSE)


@breaks("input-rounded", "its input is fp8/tensor, but no fake_quantize stands before it", module=f"(module {OUT})")
def a_quantized_input_is_not_rounded(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    node.args = (node.args[0].args[0], *node.args[1:])
    return node


@breaks("input-rounded", "its input is left alone, but a fake_quantize stands before it", module=f"(module {DOWN})")
def an_input_is_rounded_for_nothing(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = (insert(graph, fake_quantize, node.args[0], DOWN, like=node), *node.args[1:])
    return node


@breaks(
    "names-cache",
    "it does not name the attention and the part (key or value) whose scale it uses",
    module=f"(in module {LAYER}.self_attn)",
)
def a_rounded_key_names_no_attention(graph: Graph) -> fx.Node:
    node = next(node for node in graph.nodes if node.target is fake_quantize_cache)
    node.args = (node.args[0], f"{LAYER}.attention", "key")
    return node


@breaks("names-cache", "it rounds a KV cache that is not quantized", module=f"(in module {LAYER}.self_attn)")
def a_cache_is_rounded_that_is_not_quantized(graph: Graph) -> fx.Node:
    graph.kv_cache = None
    return next(node for node in graph.nodes if node.target is fake_quantize_cache)


@breaks("cache-rounded", "the KV cache is quantized, but nothing rounds keys and values", module="")
def nothing_rounds_a_quantized_cache(graph: Graph) -> fx.Node:
    erase(graph, *(node for node in graph.nodes if node.target is fake_quantize_cache))
    return graph.nodes[-1]
