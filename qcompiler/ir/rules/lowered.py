"""A lowered graph: it computes with the numbers that the checkpoint holds, and with those of the right layer."""

from __future__ import annotations

from qcompiler.ir.annotations import Leaf, get, scheme_of
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import fake_quantize, fake_quantize_cache, observe, quantized_linear
from qcompiler.ir.rules.rule import Broken, Rule, each


def _no_observe(node: Node) -> str | None:
    return "an observe node is left after lowering" if node.target is observe else None


def _linears_lowered(node: Node) -> str | None:
    return "a linear with a scheme was not lowered" if node.op == "call_module" and scheme_of(node) else None


def _names_cache(graph: Graph) -> Broken:
    known = {path for path, _ in graph.model.named_modules()}
    for node in graph.nodes:
        if node.target is fake_quantize_cache:
            named = len(node.args) == 3 and node.args[1] in known and node.args[2] in ("key", "value")
            if not named:
                yield node, "it does not name the attention and the part (key or value) whose scale it uses"
            elif graph.kv_cache is None:
                yield node, "it rounds a KV cache that is not quantized"


def _cache_rounded(graph: Graph) -> Broken:
    if graph.kv_cache is not None and not any(node.target is fake_quantize_cache for node in graph.nodes):
        yield graph.nodes[-1], "the KV cache is quantized, but nothing rounds keys and values"


def _names_layer(node: Node) -> str | None:
    if node.target not in (fake_quantize, quantized_linear):
        return None
    if not (len(node.args) == 2 and isinstance(node.args[1], str)):
        return "it does not name the layer whose numbers it uses"
    if node.target is fake_quantize:
        strange = next((user for user in node.users if user.args[1:] != node.args[1:]), None)
        return f"it rounds the input of {node.args[1]}, but {_called(strange)} reads it" if strange else None
    leaf = get(node, Leaf)
    if leaf is None or leaf.path != node.args[1] or not scheme_of(node):
        return f"it uses the numbers of {node.args[1]}, but its annotations do not give that layer a scheme"
    return None


def _called(node: Node) -> str:
    leaf = get(node, Leaf)
    return leaf.path if leaf is not None else f"%{node.name}"


def _input_rounded(node: Node) -> str | None:
    scheme, source = scheme_of(node), tensor_arg(node, 0)
    if node.target is not quantized_linear or scheme is None or source is None:
        return None
    rounded = source.target is fake_quantize
    if scheme.input_activations is not None and not rounded:
        return f"its input is {scheme.input_activations.short}, but no fake_quantize stands before it"
    if scheme.input_activations is None and rounded:
        return "its input is left alone, but a fake_quantize stands before it"
    return None


LOWERED = (
    each("no-observe", _no_observe),
    each("linears-lowered", _linears_lowered),
    each("names-layer", _names_layer),
    Rule("names-cache", _names_cache),
    Rule("cache-rounded", _cache_rounded),
    each("input-rounded", _input_rounded),
)
