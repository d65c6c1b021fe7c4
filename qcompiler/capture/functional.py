"""Rewrite in-place operations as operations on values, so that the dataflow is all there is to know.

Models fill buffers piece by piece (`k[..., :n].copy_(a)`) and add to views (`x.permute(...) += y`), and exported graphs
keep that. A walk over the graph would not see where such a tensor comes from, and a cached value could be written to.
"""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import CaptureError
from qcompiler.ir.annotations import Scope, need
from qcompiler.ir.fx import Node, getitem, is_op, mutates, op_name, tensor_arg, value

_SCATTER = {
    "aten.slice": torch.ops.aten.slice_scatter.default,
    "aten.select": torch.ops.aten.select_scatter.default,
    "aten.diagonal": torch.ops.aten.diagonal_scatter.default,
}
_SAME = frozenset(f"aten.{name}" for name in ("alias", "contiguous", "detach", "dropout", "to", "type_as"))
_SHAPED = frozenset(
    f"aten.{name}"
    for name in ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze")
)
_CUTS = ("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.tensor_split", "aten.unbind")
_UNKNOWN = (torch.ops.aten.as_strided.default, torch.ops.aten.view.dtype)
_OWN_INVERSE = frozenset({"aten.transpose", "aten.t", "aten.swapaxes", "aten.swapdims"})
_MOVED = frozenset({"aten.permute", "aten.movedim", "aten.moveaxis"})


def functionalize(graph: fx.Graph) -> None:
    """Replace in-place operations on tensors that the graph made by their functional forms.

    Which nodes share memory is known from the fake tensors of the trace. A tensor that is written through a view with
    no inverse here keeps all its writes in place; so does a parameter or input. `refuse_writes` tells.
    """
    written = {storage for node in graph.nodes if mutates(node) for storage in _storages(node)}
    for node in list(graph.nodes):
        if not written.isdisjoint(_storages(node)) and (viewed := tensor_arg(node, 0)) is not None:
            _take_apart(graph, node, viewed)
    sharing: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for storage in _storages(node):
            sharing[storage].append(node)
    for members in sharing.values():
        if not isinstance(value(members[0]), Tensor):
            del members[0]  # makes several tensors, each in a memory of its own
        memory = _Memory(graph, members)
        if any(mutates(node) for node in members) and memory.is_understood():
            memory.rewrite()


def refuse_writes(graph: fx.Graph, name: str) -> None:
    """Raise `CaptureError` where a model of this name still writes in place, but to a buffer that nothing reads.

    Batches run through parts of a graph, some of them twice, and values wait between: a write would be left out, or
    done again.
    """
    for node in list(graph.nodes):
        if not mutates(node):
            continue
        written = tensor_arg(node, 0)
        if not node.users and written is not None and written.op == "get_attr" and list(written.users) == [node]:
            graph.erase_node(node)  # a count of calls, say
            graph.erase_node(written)
            continue
        calls = need(node, Scope).calls
        where = f" in {calls[-1][1]}" if calls and calls[-1][1] else ""
        raise CaptureError(
            f"{name} cannot be captured: {op_name(node)}{where} writes in place into what is read elsewhere, and that "
            "cannot be followed: a parameter, a buffer or an input, an `out=`, or a view that has no inverse here",
            hint="compute a new tensor there (`x = x + y` in place of `x += y`), and read that",
        )


def _take_apart(graph: fx.Graph, node: Node, viewed: Node) -> None:
    """Make the parts that `node` cuts `viewed` into views of their own: slices, which have an inverse."""
    if is_op(node, "aten.narrow"):
        parts = {node: 0}
    elif is_op(node, *_CUTS):
        parts = {user: index for user in node.users if (index := getitem(user)) is not None}
    else:
        return
    for reader, index in parts.items():
        with graph.inserting_before(reader):
            view = _part(graph, node, index)
            if view is None:
                return
            target, args = view
            part = graph.call_function(target, (viewed, *args))
        part.meta = dict(reader.meta)
        reader.replace_all_uses_with(part)
        graph.erase_node(reader)
    if node not in parts and not node.users:
        graph.erase_node(node)


def _part(graph: fx.Graph, node: Node, index: int) -> tuple[Callable[..., object], tuple[Any, ...]] | None:
    """The view that part `index` of a cut is, with its arguments but the tensor; None where sizes are not known."""
    names = {"aten.unbind": ("dim",), "aten.narrow": ("dim", "start", "length")}.get(op_name(node), ("sizes", "dim"))
    said: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    dim, sizes = said.get("dim", 0), said.get("sizes")
    if is_op(node, "aten.unbind"):
        return torch.ops.aten.select.int, (dim, index)
    if is_op(node, "aten.narrow"):
        start, size = said["start"], said["length"]
    elif is_op(node, "aten.split") and isinstance(sizes, int):
        start, size = index * sizes, sizes  # a slice ends where the tensor does
    elif is_op(node, "aten.split", "aten.split_with_sizes") and isinstance(sizes, list | tuple):
        start, size = _sum(graph, node, sizes[:index]), sizes[index]
    else:
        lengths = [part.shape[dim] for part in value(node)]
        if not all(isinstance(length, int) for length in lengths):
            return None
        start, size = sum(lengths[:index]), lengths[index]
    end = _sum(graph, node, (start, size))
    if end == 0 and start != 0:
        end = sys.maxsize  # the start is counted from there
    return torch.ops.aten.slice.Tensor, (dim, start, end)


def _sum(graph: fx.Graph, near: Node, sizes: Sequence[int | Node]) -> int | Node:
    """The sum of sizes, of which some may be symbolic."""
    total: int | Node = 0
    for size in sizes:
        if isinstance(total, int) and isinstance(size, int):
            total += size
        elif total == 0:
            total = size
        else:
            values = [value(term) if isinstance(term, Node) else term for term in (total, size)]
            total = graph.call_function(operator.add, (total, size))
            total.meta = {**near.meta, "val": values[0] + values[1]}
    return total


def _storages(node: Node) -> set[int]:
    """The memories that a node's value lies in: several for a list of tensors."""
    val = value(node)
    tensors = [val] if isinstance(val, Tensor) else val if isinstance(val, list | tuple) else []
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}


@dataclass(slots=True)
class _Memory:
    """The nodes whose values share one memory: the first made it, the others view it or write to it.

    `now` is the value of each member, and after how many writes it was that; `parent` is what a view was made of.
    """

    graph: fx.Graph
    members: list[Node]
    writes: int = 0
    now: dict[Node, tuple[int, Node]] = field(default_factory=dict)
    parent: dict[Node, Node] = field(default_factory=dict)

    def is_understood(self) -> bool:
        """Whether every member is a view of an earlier one, or writes to one through views that have an inverse."""
        base = self.members[0]
        if base.op != "call_function" or mutates(base):
            return False
        above: dict[Node, Node | None] = {base: None}
        for node in self.members[1:]:
            viewed = tensor_arg(node, 0)
            if node.op != "call_function" or viewed not in above or node.target in _UNKNOWN:
                return False
            above[node] = viewed
            if mutates(node) and not (_functional(node) and self._goes_back(node, above)):
                return False
        readers = {user for node in self.members for user in node.users} - above.keys()
        return not any(mutates(user) and not (_writes_first(user) and user.args[0] not in above) for user in readers)

    def _goes_back(self, write: Node, above: dict[Node, Node | None]) -> bool:
        node: Node | None = above[write]
        while node is not None and (above[node] is None or mutates(node) or _has_inverse(node)):
            node = above[node]
        return node is None

    def rewrite(self) -> None:
        members = dict.fromkeys(self.members)
        readers = [user for node in self.members for user in node.users]
        self.now[self.members[0]] = (0, self.members[0])
        for node in sorted({*readers, *self.members[1:]}):
            if node in members and mutates(node):
                self._write(node)
                continue
            if node in members:
                self.parent[node] = node.all_input_nodes[0]
                self.now[node] = (self.writes, node)
            for source in node.all_input_nodes:
                if source in members:
                    node.replace_input_with(source, self._value(source, node))
                    _reshape(node)

    def _write(self, node: Node) -> None:
        functional = _functional(node)
        written = tensor_arg(node, 0)
        assert functional is not None
        assert written is not None
        for source in node.all_input_nodes:
            if source in self.now:
                node.replace_input_with(source, self._value(source, node))
        before = tensor_arg(node, 0)
        meta = {**node.meta, "val": value(written)}
        with self.graph.inserting_before(node):
            new = self.graph.call_function(functional, node.args, dict(node.kwargs))
            new.meta = dict(meta)
            if _promotes(node):  # the written tensor keeps its dtype
                new = self.graph.call_function(torch.ops.aten.copy.default, (before, new))
                new.meta = dict(meta)
            changed = [(written, new)]
            member = written
            while member in self.parent:
                above = self.parent[member]
                new = _undo(self.graph, member, self._value(above, node), new)
                new.meta = {**meta, "val": value(above)}
                changed.append((above, new))
                member = above
        self.writes += 1
        self.now |= {member: (self.writes, new) for member, new in changed}
        node.replace_all_uses_with(written)
        self.graph.erase_node(node)

    def _value(self, member: Node, reader: Node) -> Node:
        """The value of `member` now: views that were made before the last write are made again, before `reader`."""
        made, found = self.now[member]
        if made != self.writes:
            above = self.parent[member]
            current = self._value(above, reader)
            with self.graph.inserting_before(reader):
                found = self.graph.node_copy(member, lambda node: node)
            found.meta = {**reader.meta, "val": value(member)}
            found.replace_input_with(found.all_input_nodes[0], current)
            _reshape(found)
            self.now[member] = (self.writes, found)
        return found


def _reshape(node: Node) -> None:
    """What `node` reads may be laid out in another way now: a view of it may have to copy."""
    if node.target is torch.ops.aten.view.default:
        node.target = torch.ops.aten.reshape.default
    if node.target is torch.ops.aten.view_as.default:
        node.target = torch.ops.aten.reshape_as.default


def _functional(node: Node) -> Callable[..., object] | None:
    """The operation that computes what `node` writes, where `node` writes to its first argument only."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if not _writes_first(node):
        return None
    if is_op(node, "aten.copy_"):
        return torch.ops.aten.copy.default
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found: Callable[..., object] | None = getattr(packet, target._overloadname, None) if packet else None
    return found


def _writes_first(node: Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    return [argument.is_write for argument in node.target._schema.arguments].index(True) == 0 and (
        sum(argument.is_write for argument in node.target._schema.arguments) == 1
    )


def _promotes(node: Node) -> bool:
    """Whether the functional form would have another dtype than the tensor that is written."""
    first, *others = node.all_input_nodes
    if is_op(node, "aten.copy_"):
        return False
    dtypes = {val.dtype for n in others if isinstance(val := value(n), Tensor) and val.is_floating_point()}
    return bool(dtypes - {value(first).dtype})


def _has_inverse(view: Node) -> bool:
    return op_name(view) in _SCATTER.keys() | _SAME | _SHAPED | _OWN_INVERSE | _MOVED


def _undo(graph: fx.Graph, view: Node, before: Node, new: Node) -> Node:
    """The tensor that `view` is made of, once the view has become `new`; it was `before`."""
    name = op_name(view)
    if name in _SCATTER:
        return graph.call_function(_SCATTER[name], (before, new, *view.args[1:]), dict(view.kwargs))
    if name in _SAME:
        return graph.call_function(torch.ops.aten.alias.default, (new,))
    if name in _SHAPED:
        return graph.call_function(torch.ops.aten.reshape_as.default, (new, before))
    if name == "aten.permute":
        dims = view.args[1]
        assert isinstance(dims, list | tuple)
        order = [int(str(d)) % len(dims) for d in dims]
        return graph.call_function(torch.ops.aten.permute.default, (new, [order.index(i) for i in range(len(order))]))
    assert callable(view.target)
    if name in _MOVED:
        source, destination = view.args[1:]
        return graph.call_function(view.target, (new, destination, source))
    return graph.call_function(view.target, (new, *view.args[1:]))  # a transposition
