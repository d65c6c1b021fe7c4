"""The one typed boundary to `torch.fx`: everything else reads and edits graphs through these few functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from math import prod
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg

Node = fx.Node
GraphModule = fx.GraphModule


def op_name(node: Node) -> str:
    """The overload-free name of what a `call_function` node calls: `aten.linear`, `mul` (operator), `observe`."""
    return node.target if isinstance(node.target, str) else _function_name(node.target)


@cache  # asked of every node by every pattern
def _function_name(target: Callable[..., Any]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).replace("::", ".")
    module = getattr(target, "__module__", "")
    name = getattr(target, "__name__", str(target))
    return f"operator.{name}" if module in ("_operator", "operator") else name


def is_operator(node: Node) -> bool:
    """Whether a node calls what a trace records: an operator of torch, or arithmetic on sizes."""
    if isinstance(node.target, torch._ops.OpOverload):
        return True
    module, name = (getattr(node.target, key, None) or "" for key in ("__module__", "__name__"))
    return module in ("_operator", "math") or (module == "torch" and name.startswith("sym_"))


def is_op(node: Node, *names: str) -> bool:
    """Whether a node calls one of these functions, named without their overload."""
    return node.op == "call_function" and op_name(node) in names


def inputs(node: Node) -> tuple[Node, ...]:
    """The nodes that a node reads, in argument order."""
    return tuple(node.all_input_nodes)


def value(node: Node) -> Any:
    """The meta value recorded at capture: a fake tensor, a symbolic integer, or None."""
    return node.meta.get("val")


def is_tensor(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def rank(node: Node) -> int:
    """Number of dimensions of the value, -1 where it is not a tensor."""
    val = value(node)
    return val.dim() if isinstance(val, torch.Tensor) else -1


def last_dim(node: Node) -> int | None:
    """Size of the last dimension where it is a plain number."""
    val = value(node)
    if isinstance(val, torch.Tensor) and val.dim() and isinstance(val.shape[-1], int):
        return int(val.shape[-1])
    return None


def symbols(node: Node) -> tuple[Any, ...]:
    """The symbols that the sizes of a tensor are, all of them symbolic."""
    return tuple(side.node.expr for side in value(node).shape)


def bytes_at(node: Node, sizes: Mapping[Any, int]) -> int:
    """Bytes of the value where symbols have these sizes, 0 where it is not a tensor."""
    val = value(node)
    if not isinstance(val, torch.Tensor):
        return 0
    sides = (side if isinstance(side, int) else int(side.node.expr.subs(sizes)) for side in val.shape)
    return prod(sides) * val.dtype.itemsize


def tensor_arg(node: Node, index: int) -> Node | None:
    """Argument `index` of a node where it is a node."""
    arg = node.args[index] if len(node.args) > index else None
    return arg if isinstance(arg, Node) else None


def map_nodes(arg: Any, fn: Callable[[Node], Any]) -> Any:
    """`arg` with every node in its (nested) structure replaced by `fn(node)`."""
    return map_arg(arg, fn)


def ancestors(starts: Iterable[Node], *, stop: Callable[[Node], bool] = lambda node: False) -> set[Node]:
    """The nodes that `starts` depend on, themselves included; those at which to `stop` too, but not what is behind."""
    seen: set[Node] = set()
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if not stop(node):
                todo.extend(node.all_input_nodes)
    return seen


def mutates(node: Node) -> bool:
    """Whether a node writes into one of its arguments (`aten.add_`): it matters even where nothing reads its value."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def erase_dead(graph: fx.Graph) -> None:
    """Remove nodes that nothing reads and that write nothing."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not mutates(node):
            graph.erase_node(node)


def call_functions(graph: fx.Graph) -> Iterator[Node]:
    for node in graph.nodes:
        if node.op == "call_function":
            yield node


def getitem(node: Node) -> int | None:
    """The index of an `operator.getitem` node, else None."""
    if node.op == "call_function" and node.target is operator.getitem:
        return cast(int, node.args[1])
    return None
