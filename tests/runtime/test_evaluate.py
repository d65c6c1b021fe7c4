"""Evaluating a stretch of a graph: values, handlers, and memory that is given back."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompiler.runtime.evaluate import evaluate

ATEN = torch.ops.aten


def chain(length: int) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    node = graph.placeholder("x")
    nodes = []
    for _ in range(length):
        node = graph.call_function(ATEN.add.Tensor, (node, 1))
        nodes.append(node)
    return graph, nodes


def run(nodes: list[fx.Node], values: dict[fx.Node, Any], keep: list[fx.Node], **handlers: Any) -> dict[fx.Node, Any]:
    return evaluate(
        nodes,
        values,
        root=nn.Module(),
        tensors={},
        device=torch.device("cpu"),
        keep=keep,
        handlers=handlers.get("handlers", {}),
    )


def test_a_value_is_dropped_after_its_last_reader() -> None:
    graph, nodes = chain(6)
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def add(node: fx.Node, args: tuple[Any, ...]) -> Tensor:
        result = torch.add(*args)
        made.append(weakref.ref(result))
        alive.append(sum(ref() is not None for ref in made))
        return result

    values = {next(iter(graph.nodes)): torch.zeros(2)}
    kept = run(nodes, values, [nodes[-1]], handlers={ATEN.add.Tensor: add})
    assert torch.equal(kept[nodes[-1]], torch.full((2,), 6.0))
    assert max(alive) == 2  # what is read and what is made of it
    assert set(values) == {nodes[-1]}


def test_what_is_kept_survives_its_readers() -> None:
    graph, nodes = chain(3)
    kept = run(nodes, {next(iter(graph.nodes)): torch.zeros(1)}, [nodes[0], nodes[2]])
    assert [float(kept[n]) for n in (nodes[0], nodes[2])] == [1.0, 3.0]


def test_a_value_that_nothing_reads_is_dropped_at_once() -> None:
    graph, nodes = chain(1)
    x = next(iter(graph.nodes))
    unread = graph.call_function(ATEN.mul.Tensor, (nodes[0], 2))
    values: dict[fx.Node, Any] = {x: torch.zeros(1)}
    run([nodes[0], unread], values, [nodes[0]])
    assert set(values) == {nodes[0]}


def test_devices_in_the_graph_mean_the_one_that_runs_it() -> None:
    graph = fx.Graph()
    node = graph.call_function(ATEN.zeros.default, ([2],), {"device": torch.device("meta")})
    assert run([node], {}, [node])[node].device.type == "cpu"
