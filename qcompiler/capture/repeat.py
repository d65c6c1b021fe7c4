"""Trace each kind of decoder layer once.

Tracing a layer costs milliseconds per operation, and most layers of a model are alike. Here only the first layer of
each kind is traced; a later one becomes a single opaque operation, which is afterwards replaced by a copy of the first
one's nodes with the module paths exchanged. Two layers are alike when their modules agree in class, parameter shapes
and every plain attribute but the own index, and are called alike. Whether anything depends on the index after all
is decided by `qcompiler.capture.compare`, on a twin that was captured in the same way and has two layers of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from qcompiler.capture.calls import intercepted
from qcompiler.capture.operators import define
from qcompiler.ir.annotations import Scope, annotate, need
from qcompiler.ir.fx import Node, getitem, is_op, is_tensor
from qcompiler.limits import check_traced

_FIRST = "qcompiler.first_layer"
_ALIKE = "qcompiler.alike_layer"


class NotRepeatableError(Exception):
    """The layers of this model are more entangled than calls with arguments: trace them all."""


def _first_fake(tensors: list[Tensor], path: str) -> Tensor:
    return torch.empty_like(tensors[0])


def _alike_fake(tensors: list[Tensor], results: list[Tensor], path: str, like: str) -> list[Tensor]:
    return [torch.empty_like(result) for result in results]


first_layer = define("first_layer(Tensor[] tensors, str path) -> Tensor", _first_fake)
alike_layer = define("alike_layer(Tensor[] tensors, Tensor[] results, str path, str like) -> Tensor[]", _alike_fake)
"""The call of a layer on `tensors`, like that of the layer `like`, which returned `results`."""


@dataclass(frozen=True, slots=True)
class _Returned:
    """What a traced layer returned."""

    path: str
    leaves: tuple[Any, ...]
    shape: pytree.TreeSpec

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def with_tensors(self, tensors: Iterable[Tensor]) -> Any:
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if isinstance(v, Tensor) else v for v in self.leaves], self.shape)


@dataclass(slots=True)
class Repeats:
    """Which layer each layer is a copy of, in the order in which they were called; its own path for the traced ones."""

    like: dict[str, str] = field(default_factory=dict)
    _returned: dict[tuple[object, ...], _Returned] = field(default_factory=dict)

    def call(self, path: str, kind: object, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the layer at `path`, or stand in for it with one operation when one like it was called alike."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if path in self.like or not tensors:
            raise NotRepeatableError(f"{path} is called twice, or without a tensor")
        plain = tuple(None if isinstance(leaf, Tensor) else _comparable(leaf) for leaf in leaves)
        key = (kind, spec, plain, tuple((t.dtype, t.dim()) for t in tensors))
        if key in self._returned:
            first = self._returned[key]
            self.like[path] = first.path
            return first.with_tensors(alike_layer(tensors, first.tensors, path, first.path))
        check_traced(len(self._returned) + 1, path)
        self.like[path] = path
        place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[place] = first_layer(tensors, path)
        again, kept = pytree.tree_unflatten(leaves, spec)
        result = forward(*again, **kept)
        out, shape = pytree.tree_flatten(result)
        self._returned[key] = _Returned(path, tuple(out), shape)
        return result


@contextmanager
def trace_once(model: PreTrainedModel) -> Iterator[Repeats]:
    """Within this context, calls of layers that are like an earlier one are traced as one operation each.

    Raises `NotRepeatableError` where a layer is called in a way that cannot be copied.
    """
    repeats = Repeats()
    with intercepted({layer: partial(repeats.call, path, kind_of(layer)) for path, layer in layers_of(model)}):
        yield repeats


def layers_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The members of the list of modules that holds the most parameters."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not lists:
        return []
    path, layers = max(lists, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -len(item[0])))
    return [(f"{path}.{name}", layer) for name, layer in layers.named_children()]


def kind_of(layer: nn.Module) -> tuple[object, ...]:
    """Everything about a layer that its trace can depend on, its index and its weights' values aside."""
    parts: list[object] = []
    for path, module in layer.named_modules():
        tensors = (*module._parameters.items(), *module._buffers.items())
        shapes = tuple((name, None if t is None else (tuple(t.shape), t.dtype)) for name, t in tensors)
        plain = tuple(
            (name, _comparable(value))
            for name, value in sorted(vars(module).items())
            if not name.startswith("_") and name not in ("layer_idx", "layer_id", "block_idx")
        )
        parts.append((path, type(module), shapes, plain))
    return tuple(parts)


def _comparable(value: Any) -> object:
    """A value to compare with `==`; what has no plain value is compared by identity."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((str(k), _comparable(v)) for k, v in value.items()))
    return id(value)


def expand_repeats(graph: fx.Graph) -> None:
    """Replace every operation that stands for a layer by a copy of the layer that it is like.

    Raises `NotRepeatableError` where that layer reads or writes anything beside its arguments.
    """
    firsts = {str(node.args[1]): node for node in graph.nodes if is_op(node, _FIRST)}
    calls = [node for node in graph.nodes if is_op(node, _ALIKE)]
    results = {str(node.args[3]): _nodes(node, 1) for node in calls}
    regions = {like: _region(graph, like, firsts[like], outputs) for like, outputs in results.items()}
    for node in calls:
        _copy(graph, regions[str(node.args[3])], node, str(node.args[2]))
    for node in firsts.values():
        node.replace_all_uses_with(_nodes(node, 0)[0])
        graph.erase_node(node)


def _nodes(call: Node, index: int) -> list[Node]:
    """The tensors of one argument of an operation that marks a layer's call."""
    tensors = call.args[index]
    assert isinstance(tensors, list | tuple)
    return [tensor for tensor in tensors if isinstance(tensor, Node)]


@dataclass(frozen=True, slots=True)
class _Region:
    """The nodes that were traced in one layer, what it was called with, and what it returned."""

    path: str
    first: Node
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]


def _region(graph: fx.Graph, path: str, first: Node, outputs: list[Node]) -> _Region:
    nodes = [n for n in graph.nodes if n is not first and any(p == path for _, p in need(n, Scope).calls)]
    members = {*nodes, first}
    given = set(_nodes(first, 0))
    if not given.union(members).issuperset(outputs):
        raise NotRepeatableError(f"{path} returns what it neither made nor was given")
    for node in nodes:
        for source in node.all_input_nodes:
            free = source.op == "get_attr" or not is_tensor(source)
            if source not in members and source not in given and not free:
                raise NotRepeatableError(f"{path} reads %{source.name}, which is none of its arguments")
        if is_tensor(node) and node not in outputs and any(user not in members for user in node.users):
            raise NotRepeatableError(f"{path} does not return %{node.name}, which is read outside it")
    return _Region(path, first, tuple(nodes), tuple(outputs))


def _copy(graph: fx.Graph, region: _Region, node: Node, path: str) -> None:
    like, tensors = region.path, _nodes(node, 0)
    mapped = dict(zip(_nodes(region.first, 0), tensors, strict=True))
    mapped[region.first] = tensors[0]
    attributes: dict[str, Node] = {}
    with graph.inserting_before(node):
        for old in region.nodes:
            for source in old.all_input_nodes:
                if source.op == "get_attr" and source not in mapped:
                    mapped[source] = _attribute(graph, source, like, path, attributes)
            new = graph.node_copy(old, lambda n: mapped.get(n, n))
            new.meta = {key: value for key, value in old.meta.items() if key == "val"}
            new.args = tuple(_moved(a, like, path) if isinstance(a, str) else a for a in new.args)
            calls = need(old, Scope).calls
            annotate(new, Scope(tuple((_moved(k, like, path), _moved(p, like, path)) for k, p in calls)))
            mapped[old] = new
    for result in list(node.users):
        index = getitem(result)
        assert index is not None
        result.replace_all_uses_with(mapped[region.outputs[index]])
        graph.erase_node(result)
    graph.erase_node(node)


def _attribute(graph: fx.Graph, source: Node, like: str, path: str, made: dict[str, Node]) -> Node:
    target = _moved(str(source.target), like, path)
    if target == source.target:
        return source
    if target not in made:
        made[target] = graph.create_node("get_attr", target)
        made[target].meta = {key: value for key, value in source.meta.items() if key == "val"}
        annotate(made[target], need(source, Scope))
    return made[target]


def _moved(text: str, like: str, path: str) -> str:
    """`text` with the path of one layer exchanged for another's, where it starts with it."""
    if text == like or text.startswith((f"{like}.", f"{like}@")):
        return path + text[len(like) :]
    return text
