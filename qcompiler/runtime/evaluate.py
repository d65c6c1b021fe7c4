"""Evaluate a stretch of a graph on tensors looked up by name; modules stay on the meta device and are not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from qcompiler.ir.annotations import Leaf, need
from qcompiler.ir.fx import Node, map_nodes

Handler = Callable[[Node, tuple[Any, ...]], Any]
"""Evaluates a node in place of its target, given the node and the values of its arguments."""


def evaluate(
    nodes: Iterable[Node],
    values: dict[Node, Any],
    *,
    root: nn.Module,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    keep: Iterable[Node],
    handlers: Mapping[Any, Handler],
) -> dict[Node, Any]:
    """Run `nodes` in order and return the values of `keep`.

    `values` holds what the nodes read from outside and is used up: a value is dropped after its last reader, so that
    peak memory is that of the widest point. `tensors` holds every parameter and buffer that the nodes use, by path.
    `handlers` maps targets, or single nodes, to what evaluates them instead.
    """
    order = list(nodes)
    kept = set(keep)
    last_reader = {source: node for node in order for source in node.all_input_nodes}
    for node in order:
        values[node] = _run(node, values, root, tensors, device, handlers)
        for source in node.all_input_nodes:
            if last_reader[source] is node and source not in kept:
                values.pop(source, None)
        if node not in last_reader and node not in kept:
            del values[node]
    return {node: values[node] for node in kept}


def _run(
    node: Node,
    values: Mapping[Node, Any],
    root: nn.Module,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    handlers: Mapping[Any, Handler],
) -> Any:
    if node.op == "get_attr":
        return tensors[str(node.target)]
    args = map_nodes(node.args, values.__getitem__)
    handler = handlers.get(node) or handlers.get(node.target)
    if handler is not None:
        return handler(node, args)
    if node.op == "call_module":
        return run_leaf(root, need(node, Leaf).path, args, tensors)
    assert node.op == "call_function", node.op
    kwargs = map_nodes(node.kwargs, values.__getitem__)
    assert callable(node.target)
    return node.target(*(_here(a, device) for a in args), **{k: _here(a, device) for k, a in kwargs.items()})


def _here(argument: Any, device: torch.device) -> Any:
    """Graphs are captured on the meta device; what they say about devices means the one that runs them."""
    return device if isinstance(argument, torch.device) else argument


def run_leaf(root: nn.Module, path: str, args: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> Any:
    """Call the module at `path` with its parameters and buffers taken from `tensors`."""
    module = root.get_submodule(path)
    if type(module).forward is nn.Linear.forward:
        return functional.linear(args[0], tensors[f"{path}.weight"], tensors.get(f"{path}.bias"))
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return functional_call(module, {name: tensors[f"{path}.{name}"] for name in names}, args)
