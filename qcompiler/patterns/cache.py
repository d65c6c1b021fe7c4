"""What enters the key/value cache: found at each attention, before grouped queries repeat the heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qcompiler.ir.annotations import Scope, need
from qcompiler.ir.fx import Node, is_op, tensor_arg
from qcompiler.ir.graph import Graph
from qcompiler.patterns.transformer import FUSED_ATTENTION

_REPEATS = ("aten.reshape", "aten.expand", "aten.unsqueeze", "aten.clone", "aten.repeat_interleave")


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys or values [B, H, S, D] of the attention module at `path`, the value of `node`."""

    path: str
    part: Literal["key", "value"]
    node: Node


def cached_tensors(graph: Graph) -> Iterator[Cached]:
    """Keys and values of every attention that is one operation, in the order in which they run."""
    for match in list(FUSED_ATTENTION.matches(graph)):
        path = need(match.anchor, Scope).calls[-1][1]
        yield Cached(path, "key", _before_repeat(match.anchor, 1))
        yield Cached(path, "value", _before_repeat(match.anchor, 2))


def _before_repeat(attention: Node, operand: int) -> Node:
    node = tensor_arg(attention, operand)
    while node is not None and is_op(node, *_REPEATS):
        node = tensor_arg(node, 0)
    assert node is not None, f"%{attention.name} attends to something that is no tensor"
    return node
