"""What enters the key/value cache: found at each attention, before grouped queries repeat the heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcompiler.errors import LegalityError
from qcompiler.ir.annotations import Leaf, Role, Scope, need
from qcompiler.ir.fx import Node, getitem, is_op, tensor_arg, value
from qcompiler.ir.graph import Graph
from qcompiler.ir.observers import LEAVE_CACHE
from qcompiler.patterns.language import Match, Walk
from qcompiler.patterns.nearest import nearest
from qcompiler.patterns.transformer import ATTENTIONS, FUSED_ATTENTION, LINEAR, NORM
from qcompiler.patterns.vocabulary import LAYOUT

_LATENT = Walk(
    "latent", "back", start="value", operand=0, through=LAYOUT | {"aten.mul"}, through_leaves=NORM, to=LINEAR, many=True
)
"""From a linear that makes values back to one that makes a latent: what it reads, at most normalized and scaled."""

_REPEATS = ("aten.reshape", "aten.expand", "aten.unsqueeze", "aten.clone", "aten.repeat", "aten.repeat_interleave")
_PARTS = "aten.chunk"


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys or values [B, H, S, D] of the attention module at `path`, the value of `node`."""

    path: str
    part: Literal["key", "value"]
    node: Node


def cached_tensors(graph: Graph) -> list[Cached]:
    """Keys and values of every attention, in the order in which they run; once each, where a module attends twice.

    Of an attention that is written out, the keys are what the scores' product has on its right, transposed: its columns
    are what the softmax runs over. Raises `LegalityError` where there is none, where one is not understood, and where
    its keys or values have no heads of their own, or are made of a latent. That the model caches what is found is for
    `qcompiler.capture.cache` to prove.
    """
    found = list(dict.fromkeys(cached for node in graph.nodes for cached in _cached_at(node)))
    # Eager attention is no operation of its own: many a product is none, and no miss.
    if not found or FUSED_ATTENTION.near_misses(graph):
        raise LegalityError(
            "the KV cache cannot be quantized: the model has "
            f"{'an' if found else 'no'} attention whose keys and values {'are not' if found else 'are'} found; "
            f"{nearest(graph, (FUSED_ATTENTION,) if found else ATTENTIONS)}",
            hint=LEAVE_CACHE,
        )
    for cached in found:
        if value(cached.node).dim() != 4:
            raise LegalityError(
                f"the KV cache cannot be quantized: %{cached.node.name}, the {cached.part} of {cached.path}, is not "
                f"[batch, heads, tokens, features] but {list(value(cached.node).shape)}",
                hint=LEAVE_CACHE,
            )
    return found


def _cached_at(node: Node) -> tuple[Cached, ...]:
    for pattern in ATTENTIONS:
        match = pattern.try_at(node) if pattern.anchor.holds(node) else None
        if isinstance(match, Match):
            path = need(node, Scope).calls[-1][1]
            _refuse_latent(path, match)
            fused = pattern is FUSED_ATTENTION
            keys = tensor_arg(node, 1) if fused else _keys(match.one("scores"))
            values = tensor_arg(node, 2 if fused else 1)
            return Cached(path, "key", _before_repeat(node, keys)), Cached(path, "value", _before_repeat(node, values))
    return ()


def _refuse_latent(path: str, match: Match) -> None:
    """Multi-head latent attention (DeepSeek-V2): runtimes cache the latent, before heads are made of it."""
    if _LATENT.run(match) is not None:
        return
    layers = {need(node, Role).layer for node in match["value"]}
    downs = [need(node, Leaf).path for node in match["latent"] if need(node, Role).layer in layers]
    if downs:
        ups = " and ".join(need(node, Leaf).path for node in match["value"])
        raise LegalityError(
            f"the KV cache cannot be quantized: {ups} makes the values of {path} of a latent, that of {downs[0]}, "
            "and it is the latent that runtimes cache: vLLM rounds it by one scale, Transformers its parts by two",
            hint=LEAVE_CACHE,
        )


def _keys(scores: Node) -> Node | None:
    """The keys of the product that makes scores, before they are transposed."""
    columns = tensor_arg(scores, 2 if is_op(scores, "aten.baddbmm") else 1)
    if columns is None or not is_op(columns, "aten.transpose"):
        raise LegalityError(
            f"the KV cache cannot be quantized: %{scores.name} makes an attention's scores, and its right side is no "
            "transposition of keys",
            hint=LEAVE_CACHE,
        )
    return tensor_arg(columns, 0)


def _before_repeat(attention: Node, node: Node | None) -> Node:
    while node is not None and (is_op(node, *_REPEATS) or _is_repeated_part(node)):
        node = tensor_arg(node, 0)
        if node is not None and is_op(node, _PARTS):
            node = tensor_arg(node, 0)
    assert node is not None, f"%{attention.name} attends to something that is no tensor"
    return node


def _is_repeated_part(node: Node) -> bool:
    """Whether a node is some of a tensor's heads, all of which are only repeated, as differential attention does."""
    parts = tensor_arg(node, 0) if getitem(node) is not None else None
    if parts is None or not is_op(parts, _PARTS) or parts.args[2:] != (1,):
        return False
    return all(is_op(reader, *_REPEATS) for part in parts.users for reader in part.users)
