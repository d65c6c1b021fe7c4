"""Follow the output channels of a leaf through the graph, to the linears that can undo a scale on them.

An abstract interpretation: after the leaf, the value of a node is an integer tensor of the node's shape (at the sizes
it was traced at) that says which channel each element grows with. An element of value c + 1 is multiplied by s > 0 when
the leaf's channel c is; an element of value 0 stays as it is. What moves elements about is run on these integers as it
stands. Where an operation keeps no such relation, the channels that come to it are held: they cannot be scaled.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompiler.ir.annotations import Leaf, LeafKind, get
from qcompiler.ir.fx import Node, inputs, is_op, is_tensor, last_dim, map_nodes, op_name, value
from qcompiler.ir.graph import Graph
from qcompiler.patterns.vocabulary import LAYOUT, MATMUL, SDPA

_READERS = (LeafKind.LINEAR, LeafKind.BARE_LINEAR)
CASTS = ("aten.to", "aten._to_copy", "aten.type_as")
_VIEWS = ("aten.view", "aten._unsafe_view", "aten.view_as")
_PADS = ("aten.pad", "aten.constant_pad_nd")
_MOVES = (LAYOUT - {*CASTS, *_VIEWS, *_PADS, "aten.index", "aten.index_select"}) | {"aten.alias", "aten.detach"}
_SHAPE_ONLY = frozenset(
    f"aten.{name}" for like in ("zeros", "ones", "full", "empty") for name in (f"{like}_like", f"new_{like}")
) | {"aten.sym_size", "aten.sym_numel"}
_SUMS = ("aten.add", "aten.sub")
_HOMOGENEOUS = ("aten.relu", "aten.leaky_relu")
"""Activations for which f(s x) = s f(x) with s > 0."""

_SAME = ("aten.neg", "observe", *_HOMOGENEOUS)


@dataclass(frozen=True, slots=True)
class Flow:
    """Where the channels of a leaf go.

    `readers` are the linears that read what grows with them, each with int64 [in_features]: c + 1 where the input
    feature grows with channel c, else 0. `held` says, once each, what holds channels back; `activated` whether a
    homogeneous activation was passed on the way.
    """

    readers: Mapping[Node, Tensor]
    held: tuple[str, ...]
    activated: bool


def follow(graph: Graph, producer: Node) -> Flow:
    """Follow the output channels (last dimension) of a raised leaf to all of their readers."""
    fixed = torch.zeros(1 + (last_dim(producer) or 0), dtype=torch.bool)
    held: dict[str, None] = {}
    while True:
        before = int(fixed.sum())
        walk = _Walk(graph, fixed, held)
        walk.run(producer)
        if int(fixed.sum()) == before:
            return Flow(walk.readers, tuple(held), walk.activated)
        # What passed before it was found to be held elsewhere must not have passed: again, with that known.


_UNKNOWN_SIZE = "has a size that depends on data"


class _UnknownSizeError(Exception):
    """A dimension depends on data: its size at capture is not known."""


@dataclass(slots=True)
class _Walk:
    """One walk. `fixed` [channels + 1] are the channels known to be held, `values` what was found for each node."""

    graph: Graph
    fixed: Tensor
    held: dict[str, None] = field(default_factory=dict)
    values: dict[Node, Any] = field(default_factory=dict)
    readers: dict[Node, Tensor] = field(default_factory=dict)
    activated: bool = False

    def run(self, producer: Node) -> None:
        labels = torch.arange(1, self.fixed.numel())
        try:
            self.values[producer] = self._free(labels.expand(_shape(producer)))
        except _UnknownSizeError:
            self._hold(producer, _UNKNOWN_SIZE, labels)
            return
        todo = sorted(producer.users)
        seen: set[Node] = set()
        while todo and not bool(self.fixed[1:].all()):
            node = heapq.heappop(todo)
            if node in seen:
                continue
            seen.add(node)
            try:
                found = self._step(node)
            except _UnknownSizeError:
                self._hold(node, _UNKNOWN_SIZE)
                continue
            if found is not None and _any(found):
                self.values[node] = found
                for user in node.users:
                    heapq.heappush(todo, user)

    def _step(self, node: Node) -> Any:
        """What the elements of a node grow with; None where with nothing."""
        if node.op == "output":
            return self._hold(node, "is the model's output")
        leaf = get(node, Leaf)
        if leaf is not None:
            return self._read(node, leaf)
        name = op_name(node)
        rule = _RULES.get(name)
        if name in _SHAPE_ONLY:
            return None
        return rule(self, node) if rule else self._hold(node, "is not linear in it")

    def _read(self, node: Node, leaf: Leaf) -> None:
        if leaf.kind not in _READERS:
            return self._hold(node, "takes no scale")
        if any(_any(self._labels(other)) for other in inputs(node) if other is not node.args[0]):
            return self._hold(node, "takes it for a weight")
        rows = self._labels(node.args[0]).flatten(0, -2)
        if not bool((rows == rows[:1]).all()):
            return self._hold(node, "reads it in a different order at every token")
        if bool(rows[0].any()):
            self.readers[node] = rows[0]
        return None

    def _hold(self, node: Node, why: str, *labels: Tensor) -> None:
        """Channels in `labels` (in all that the node reads, where none are given) cannot be scaled."""
        held = labels or [part for arg in inputs(node) if arg in self.values for part in _tensors(self._of(arg))]
        if not any(bool(part.any()) for part in held):
            return
        leaf = get(node, Leaf)
        what = leaf.kind if leaf else op_name(node) if node.op == "call_function" else node.op
        self.held[f"%{node.name} ({what}) {why}"] = None
        for part in held:
            self.fixed[part] = True
        self.fixed[0] = False

    def _labels(self, arg: Any) -> Any:
        """The labels of an argument: of a node, of a structure of nodes, zeros for what does not depend on the leaf."""
        return map_nodes(arg, self._of)

    def _of(self, node: Node) -> Any:
        if node in self.values:
            return self._free(self.values[node])
        val = value(node)
        if isinstance(val, Tensor):
            return torch.zeros(_shape(node), dtype=torch.int64)
        if isinstance(val, list | tuple):
            return [torch.zeros(_sizes(part.shape), dtype=torch.int64) for part in val]
        return _size(val)

    def _free(self, labels: Any) -> Any:
        """Labels without those that are held by now."""
        if not self.held:
            return labels
        if isinstance(labels, Tensor):
            return labels.masked_fill(self.fixed[labels], 0)
        return [self._free(part) for part in labels]

    def _move(self, node: Node) -> Any:
        assert callable(node.target)
        moved = node.target(*self._labels(node.args), **self._labels(node.kwargs))
        if isinstance(moved, Tensor) and moved.shape != _shape(node):
            return self._hold(node, "moves it as other values say")
        return moved

    def _view(self, node: Node) -> Any:
        return self._labels(node.args[0]).reshape(_shape(node))

    def _cast(self, node: Node) -> Any:
        if not value(node).is_floating_point():
            return self._hold(node, "rounds it")
        return self._labels(node.args[0])

    def _pad(self, node: Node) -> Any:
        filled = [arg for arg in (*node.args[2:], *node.kwargs.values()) if arg not in (None, "constant", 0)]
        return self._hold(node, "fills in what is not zero") if filled else self._move(node)

    def _index(self, node: Node) -> Any:
        """By constant positions: what a graph made itself and holds the values of."""
        places = node.args[1]
        assert isinstance(places, list | tuple)
        constants = [self.graph.constants.get(str(p.target)) if isinstance(p, Node) else p for p in places]
        if any(constant is None and place is not None for constant, place in zip(constants, places, strict=True)):
            return self._hold(node, "picks elements by positions that are computed")
        assert callable(node.target)
        return node.target(self._labels(node.args[0]), constants)

    def _same(self, node: Node) -> Any:
        self.activated |= is_op(node, *_HOMOGENEOUS)
        return self._labels(node.args[0])

    def _operands(self, node: Node) -> tuple[Tensor, Tensor]:
        """The labels of a binary operation's operands, of the operation's shape."""
        first, second = (torch.as_tensor(self._labels(a) if isinstance(a, Node) else 0) for a in node.args[:2])
        return first.expand(_shape(node)), second.expand(_shape(node))

    def _multiply(self, node: Node) -> Any:
        first, second = self._operands(node)
        if not _any(second):
            return first
        if not _any(first):
            return second
        both = (first > 0) & (second > 0)
        if bool(both.any()):
            return self._hold(node, "multiplies it with itself", first[both], second[both])
        return first + second

    def _divide(self, node: Node) -> Any:
        first, second = self._operands(node)
        if node.kwargs.get("rounding_mode") is not None:
            return self._hold(node, "rounds it")
        if bool(second.any()):
            return self._hold(node, "divides by it")
        return first

    def _add(self, node: Node) -> Any:
        first, second = self._operands(node)
        if torch.equal(first, second):
            return first
        if not (_any(first) and _any(second)):
            return self._hold(node, "adds to it what is not scaled", first, second)
        apart = first != second
        self._hold(node, "adds to it what is not scaled", first[apart], second[apart])
        return first.masked_fill(apart, 0)

    def _contract(self, node: Node) -> Any:
        """Sums over a dimension along which nothing changes but the values: attention's weights times its values."""
        first, second = (self._labels(arg) for arg in node.args[:2])
        if len(node.args) != 2 or first.dim() < 2 or second.dim() < 2 or (_any(first) and _any(second)):
            return self._hold(node, "is not linear in it")
        kept = first[..., :1] if _any(first) else second[..., :1, :]
        if not bool((kept == (first if _any(first) else second)).all()):
            return self._hold(node, "sums over its channels")
        return kept.expand(_shape(node))

    def _attend(self, node: Node) -> Any:
        """Attention as one operation is linear in its values, [B, H, T, D], and sums over T."""
        others = [self._labels(arg) for arg in (*node.args[:2], *node.args[3:]) if isinstance(arg, Node)]
        if _any(others):
            self._hold(node, "is linear in its values only", *others)
        values = self._labels(node.args[2])
        kept = values[..., :1, :]
        if not bool((kept == values).all()):
            return self._hold(node, "sums over its channels")
        shape = _shape(node)
        if node.kwargs.get("enable_gqa"):
            kept = kept.repeat_interleave(shape[-3] // kept.shape[-3], -3)
        return kept.expand(shape)


_RULES: Mapping[str, Callable[[_Walk, Node], Any]] = {
    **dict.fromkeys(_MOVES, _Walk._move),
    **dict.fromkeys(_VIEWS, _Walk._view),
    **dict.fromkeys(CASTS, _Walk._cast),
    **dict.fromkeys(_PADS, _Walk._pad),
    **dict.fromkeys(_SAME, _Walk._same),
    **dict.fromkeys(_SUMS, _Walk._add),
    **dict.fromkeys(set(MATMUL) - {"aten.baddbmm"}, _Walk._contract),
    "aten.index": _Walk._index,
    "aten.mul": _Walk._multiply,
    "aten.div": _Walk._divide,
    SDPA: _Walk._attend,
}


def _any(labels: Any) -> bool:
    return any(bool(part.any()) for part in _tensors(labels))


def _tensors(labels: Any) -> list[Tensor]:
    """The label tensors in what a node's labels are: itself, those of a list, none of a size."""
    if isinstance(labels, Tensor):
        return [labels]
    return [part for item in labels for part in _tensors(item)] if isinstance(labels, list | tuple) else []


def _shape(node: Node) -> tuple[int, ...]:
    assert is_tensor(node), f"%{node.name} is no tensor"
    return _sizes(value(node).shape)


def _sizes(shape: Any) -> tuple[int, ...]:
    return tuple(_size(size) for size in shape)


def _size(size: Any) -> Any:
    """A size as it was when the graph was traced; anything else as it is."""
    if not isinstance(size, torch.SymInt):
        return size
    if not size.node.has_hint():
        raise _UnknownSizeError
    return int(size.node.hint)
