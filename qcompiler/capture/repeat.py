"""Trace each kind of decoder layer once.

Tracing a layer costs milliseconds per operation, and most layers of a model are alike. Here only the first layer of each
kind is traced; a later one becomes a single opaque operation, which is afterwards replaced by a copy of the first one's
nodes with the module paths exchanged. Two layers are alike when their modules agree in class, parameter shapes and every
plain attribute but the layer's own index, and are called alike. Whether anything depends on the index after all is decided
by `qcompiler.capture.compare`, on a twin that was captured in the same way and has two layers of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from qcompiler.capture.operators import define
from qcompiler.ir.annotations import Scope, annotate, need
from qcompiler.ir.fx import Node, is_op

_FIRST = "qcompiler.first_layer"
_ALIKE = "qcompiler.alike_layer"


class NotRepeatable(Exception):
    """The layers of this model are more entangled than calls with arguments: trace them all."""


def _first_fake(tensors: list[Tensor], path: str) -> Tensor:
    return torch.empty_like(tensors[0])


def _alike_fake(tensors: list[Tensor], path: str, like: str) -> Tensor:
    return torch.empty_like(tensors[0])


first_layer = define("first_layer(Tensor[] tensors, str path) -> Tensor", _first_fake)
alike_layer = define("alike_layer(Tensor[] tensors, str path, str like) -> Tensor", _alike_fake)


@dataclass(slots=True)
class Repeats:
    """Which layer each layer is a copy of, in the order in which they were called; its own path for the traced ones."""

    like: dict[str, str] = field(default_factory=dict)


@contextmanager
def trace_once(model: PreTrainedModel) -> Iterator[Repeats]:
    """Within this context, calls of layers that are like an earlier one are traced as one operation each.

    Raises `NotRepeatable` where a layer is called in a way that cannot be copied.
    """
    repeats = Repeats()
    returned: dict[tuple[object, ...], tuple[str, pytree.TreeSpec, list[Any], int]] = {}
    changed: list[nn.Module] = []

    def calling(path: str, layer: nn.Module, kind: object, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            plain = tuple(None if isinstance(leaf, Tensor) else _comparable(leaf) for leaf in leaves)
            if path in repeats.like or not tensors:
                raise NotRepeatable(f"{path} is called twice, or without a tensor")
            key = (kind, spec, plain, tuple((t.dtype, t.dim()) for t in tensors))
            if key in returned:
                like, shape, values, place = returned[key]
                repeats.like[path] = like
                values = list(values)
                values[place] = alike_layer(tensors, path, like)
                return pytree.tree_unflatten(values, shape)
            repeats.like[path] = path
            marked = first_layer(tensors, path)
            first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            again, kept = pytree.tree_unflatten([*leaves[:first], marked, *leaves[first + 1 :]], spec)
            result = forward(*again, **kept)
            out, shape = pytree.tree_flatten(result)
            places = [i for i, value in enumerate(out) if isinstance(value, Tensor)]
            if len(places) != 1 or out[places[0]].shape != tensors[0].shape or out[places[0]].dtype != tensors[0].dtype:
                raise NotRepeatable(f"{path} does not map one tensor to one like it")
            returned[key] = (path, shape, [None if isinstance(v, Tensor) else v for v in out], places[0])
            return result

        return run

    try:
        for path, layer in _layers(model):
            changed.append(layer)
            layer.__dict__["forward"] = calling(path, layer, kind_of(layer), layer.forward)
        yield repeats
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def _layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
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
            if not name.startswith("_") and name not in ("layer_idx", "layer_id", "block_idx", "forward")
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

    Raises `NotRepeatable` where that layer reads or writes anything beside its arguments.
    """
    firsts = {str(node.args[1]): node for node in graph.nodes if is_op(node, _FIRST)}
    regions = {path: _region(graph, path, node) for path, node in firsts.items()}
    for node in [n for n in graph.nodes if is_op(n, _ALIKE)]:
        tensors, path, like = node.args
        _copy(graph, regions[str(like)], node, tensors, str(like), str(path))
    for node in firsts.values():
        node.replace_all_uses_with(node.args[0][0])
        graph.erase_node(node)


@dataclass(frozen=True, slots=True)
class _Region:
    first: Node
    nodes: tuple[Node, ...]
    output: Node


def _region(graph: fx.Graph, path: str, first: Node) -> _Region:
    nodes = [n for n in graph.nodes if n is not first and any(p == path for _, p in need(n, Scope).calls)]
    members = {*nodes, first}
    given = set(first.args[0])
    for node in nodes:
        for source in node.all_input_nodes:
            free = source.op == "get_attr" or not isinstance(source.meta.get("val"), Tensor)
            if source not in members and source not in given and not free:
                raise NotRepeatable(f"{path} reads %{source.name}, which is none of its arguments")
    outputs = [n for n in nodes if isinstance(n.meta.get("val"), Tensor) and any(u not in members for u in n.users)]
    if len(outputs) != 1:
        raise NotRepeatable(f"{path} has {len(outputs)} outputs")
    return _Region(first, tuple(nodes), outputs[0])


def _copy(graph: fx.Graph, region: _Region, node: Node, tensors: Any, like: str, path: str) -> None:
    mapped: dict[Node, Node] = dict(zip(region.first.args[0], tensors, strict=True))
    mapped[region.first] = tensors[0]
    attributes: dict[str, Node] = {}
    with graph.inserting_before(node):
        for old in region.nodes:
            for source in old.all_input_nodes:
                if source.op == "get_attr" and source not in mapped:
                    mapped[source] = _attribute(graph, source, like, path, attributes)
            new = graph.node_copy(old, lambda n: mapped.get(n, n))
            new.meta = {key: value for key, value in old.meta.items() if key == "val"}
            new.args = tuple(path + a[len(like) :] if _is_path(a, like) else a for a in new.args)
            calls = need(old, Scope).calls
            annotate(new, Scope(tuple((_moved(k, like, path), _moved(p, like, path)) for k, p in calls)))
            mapped[old] = new
    node.replace_all_uses_with(mapped[region.output])
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


def _is_path(argument: Any, like: str) -> bool:
    return isinstance(argument, str) and (argument == like or argument.startswith(f"{like}."))


def _moved(text: str, like: str, path: str) -> str:
    """`text` with the path of one layer exchanged for another's, where it starts with it."""
    if text == like or text.startswith((f"{like}.", f"{like}@")):
        return path + text[len(like) :]
    return text


