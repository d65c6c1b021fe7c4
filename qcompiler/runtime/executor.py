"""The streaming executor: one sweep over the partitions, with one partition's weights in memory at a time.

For each partition: load its weights; run the batches through it if it has observers; let every step do its part; run
the batches again through the quantized weights if later partitions observe anything; forget the weights. Memory is one
partition plus the activations that cross its border, whatever the depth of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import Tensor
from torch.nn import functional

from qcompiler.data.batches import TokenBatch
from qcompiler.errors import DataError
from qcompiler.ir.annotations import Leaf, Observer, get, get_quant, need
from qcompiler.ir.fx import Node, ancestors
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.ops import observe
from qcompiler.ir.partition import partitions
from qcompiler.numerics import dequantize, fake_quantize
from qcompiler.pipeline.base import Context, PartitionStep, PartitionWork, Solved
from qcompiler.runtime.evaluate import Handler
from qcompiler.runtime.statistics import Statistic
from qcompiler.runtime.stream import Stream, always, tensor_paths


@dataclass(slots=True)
class Spent:
    """Seconds per step, and per part of the executor's own work."""

    steps: list[float]
    parts: list[tuple[str, float]] = field(default_factory=list)


def sweep(graph: Graph, steps: Sequence[PartitionStep], context: Context) -> Spent:
    """Run `steps` over every partition in order. Calibration data is asked for only where something is observed."""
    parts = partitions(graph)
    last = max((i for i, part in enumerate(parts) if _observers(part)), default=-1)
    stream = Stream(graph, parts[: last + 1], _batches(context), context.device) if last >= 0 else None
    clock: dict[str, float] = defaultdict(float)
    spent = [0.0] * len(steps)
    for index, part in enumerate(parts):
        context.progress(part.name, index, len(parts))
        start = perf_counter()
        weights = load_weights(graph, part, context)
        clock["load"] += perf_counter() - start
        work = PartitionWork(part, weights, statistics={})
        if stream is not None and index <= last:
            start = perf_counter()
            work.statistics = _collect(part, stream, weights, final=index == last)
            clock["forward: collect"] += perf_counter() - start
        for number, step in enumerate(steps):
            start = perf_counter()
            step.partition(work)
            spent[number] += perf_counter() - start
        if stream is not None and index < last:
            start = perf_counter()
            _propagate(part, stream, work)
            clock["forward: propagate"] += perf_counter() - start
    context.progress("done", len(parts), len(parts))
    return Spent(spent, list(clock.items()))


def load_weights(graph: Graph, part: Partition, context: Context) -> dict[str, Tensor]:
    """Every parameter, buffer and constant that a partition uses, by path, on the device."""
    paths = tensor_paths(graph, part)
    own = graph.buffers | graph.constants
    loaded = context.source.load([path for path in paths if path not in own])
    return {path: (own[path] if path in own else loaded[path]).to(context.device) for path in paths}


def _observers(part: Partition) -> list[Node]:
    return [node for node in part.nodes if node.target is observe]


def _batches(context: Context) -> tuple[TokenBatch, ...]:
    if context.data is None:
        raise DataError(
            "a pass observes activations, and no calibration data was loaded",
            hint="insert observers before the first streaming pass, and give calibration data",
        )
    return context.data.batches


def _collect(part: Partition, stream: Stream, weights: dict[str, Tensor], *, final: bool) -> dict[str, Statistic]:
    """Run the batches through the dense partition and return what its observers saw."""
    watched = _observers(part)
    statistics = {(o := need(node, Observer)).id: Statistic(o) for node in watched}

    def handler(mask: Tensor) -> Handler:
        def handle(node: Node, args: tuple[Any, ...]) -> Any:
            statistics[need(node, Observer).id].update(args[0], mask)
            return args[0]

        return handle

    # Nothing after the last observer of the last observed partition matters.
    needed = ancestors(watched) if final else None
    nodes = tuple(node for node in part.nodes if needed is None or node in needed)
    if watched:
        stream.run(part, nodes, weights, lambda batch: {observe: handler(batch.token_mask)}, keep=False)
    return statistics


def _propagate(part: Partition, stream: Stream, work: PartitionWork) -> None:
    """Run the batches through the partition as it will be served, and keep what later partitions read."""
    handlers: dict[Any, Handler] = {observe: lambda node, args: args[0]}
    for node in part.nodes:
        leaf = get(node, Leaf)
        if leaf is not None and leaf.path in work.solved:
            key = f"{leaf.path}.weight"
            work.weights[key] = dequantize(work.solved[leaf.path].weight, work.weights[key].dtype)
            handlers[node.target] = quantized_handler(work)
    stream.run(part, part.nodes, work.weights, always(handlers), keep=True)


def quantized_handler(work: PartitionWork) -> Handler:
    """Evaluates a linear with quantized input activations; its weight is already dequantized in `work.weights`."""

    def handle(node: Node, args: tuple[Any, ...]) -> Tensor:
        leaf, quant = need(node, Leaf), get_quant(node)
        assert quant is not None
        assert quant.scheme is not None
        x = quantize_input(args[0], quant.scheme.input_activations, work.solved[leaf.path])
        return functional.linear(x, work.weights[f"{leaf.path}.weight"], work.weights.get(f"{leaf.path}.bias"))

    return handle


def quantize_input(x: Tensor, spec: Any, solved: Solved) -> Tensor:
    """Input activations as the runtime rounds them; unchanged where the scheme leaves them alone."""
    if spec is None:
        return x
    return fake_quantize(
        x,
        spec,
        scale=solved.input_scale,
        zero_point=solved.input_zero_point,
        global_scale=solved.input_global_scale,
    )
