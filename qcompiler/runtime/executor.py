"""The streaming executor: one sweep over the partitions, with one partition's weights in memory at a time.

For each partition: load its weights; run the batches through it if it has observers; let every step do its part; run
the batches again through the quantized weights if later partitions observe anything; forget the weights. Memory is one
partition plus the activations that cross its border, whatever the depth of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from qcompiler.data.batches import TokenBatch
from qcompiler.errors import DataError
from qcompiler.ir.annotations import (
    AnyObserver,
    ChannelObserver,
    HessianObserver,
    Leaf,
    Observer,
    get,
    need,
    observed,
    scheme_of,
)
from qcompiler.ir.fx import Node, ancestors
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.ops import observe
from qcompiler.ir.partition import partitions
from qcompiler.numerics import dequantize
from qcompiler.pipeline.base import Context, PartitionStep, PartitionWork, Solved, Statistics
from qcompiler.runtime.carry import Carry
from qcompiler.runtime.channels import ChannelStatistic
from qcompiler.runtime.evaluate import Handler
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.memory import trim_memory
from qcompiler.runtime.parallel import Workers
from qcompiler.runtime.quantized import QuantizedOperations, Rounding
from qcompiler.runtime.statistics import Statistic
from qcompiler.runtime.stream import Stream, always
from qcompiler.runtime.weights import LazyWeights, lazy_weights


@dataclass(slots=True)
class Spent:
    """Seconds per step, and per part of the executor's own work; those named `solve: ` are parts of the steps'.

    Reading weights counts as `load`, whoever asked.
    """

    steps: list[float]
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def sweep(graph: Graph, steps: Sequence[PartitionStep], context: Context, carry: Carry | None = None) -> Spent:
    """Run `steps` over every partition in order.

    `carry` is what earlier sweeps did, and keeps what this one does; None where there is one sweep, or no output.
    Raises `DataError` where a step uses what observers collect and there is no data.
    """
    parts = partitions(graph)
    watched = [_watched(part, steps) for part in parts]
    last = max((i for i, nodes in enumerate(watched) if nodes), default=-1)
    stream = Stream(graph, parts[: last + 1], _batches(context), context.device) if last >= 0 else None
    spent = Spent([0.0] * len(steps))
    last_call = {leaf.path: i for i, part in enumerate(parts) for node in part.nodes if (leaf := get(node, Leaf))}
    carried: dict[str, Solved] = {}
    with Workers(context.device) as workers:
        for index, part in enumerate(parts):
            context.progress(part.name, index, len(parts))
            # In a function of its own, so that one partition's weights are gone before the next one's are read.
            solved = _run_partition(
                graph,
                part,
                steps,
                context,
                _Flow(stream, watched[index], index == last) if stream is not None and index <= last else None,
                carried,
                carry,
                spent,
                workers,
            )
            # A module that later partitions call again is solved once, by the first.
            carried = {path: result for path, result in (carried | solved).items() if last_call[path] > index}
            del solved
            trim_memory()
    context.progress("done", len(parts), len(parts))
    return spent


@dataclass(frozen=True, slots=True)
class _Flow:
    """The batches at one partition, the observers to run them for, and whether nothing is observed after it."""

    stream: Stream
    watched: Mapping[Node, AnyObserver]
    final: bool


def _run_partition(
    graph: Graph,
    part: Partition,
    steps: Sequence[PartitionStep],
    context: Context,
    flow: _Flow | None,
    carried: Mapping[str, Solved],
    carry: Carry | None,
    spent: Spent,
    workers: Workers,
) -> dict[str, Solved]:
    """Collect, let every step do its part, propagate; what was solved.

    `flow` is None where nothing is observed from here on. `carried` are modules that earlier partitions solved.
    """
    weights = lazy_weights(graph, part, context.source, context.device)
    called = {leaf.path for node in part.nodes if (leaf := get(node, Leaf))}
    work = PartitionWork(part, weights, workers, solved={path: carried[path] for path in called if path in carried})
    if carry is not None:
        _take_up(carry, work, context.device)
    clock = _Clock(weights)
    propagates = all(step.propagates for step in steps)
    if flow is not None:
        # Without propagation, what later partitions read is what this one computes now: one run does for both.
        work.statistics = _collect(flow, work, keep=not propagates and not flow.final)
        trim_memory()  # the room that activations took
        observing = work.spent.pop("observe", 0.0)
        spent.parts["observe"] += observing
        spent.parts["forward: collect"] += clock.lap() - observing
    for number, step in enumerate(steps):
        step.partition(work)
        spent.steps[number] += clock.lap()
    if flow is not None and propagates and not flow.final:
        flow.stream.run(part, part.nodes, work.weights, always(_served(work, flow.stream.dtype)), keep=True)
        spent.parts["forward: propagate"] += clock.lap()
    if carry is not None:
        carry.keep(part.name, work.solved, {path: work.weights[path] for path in work.altered})
    spent.parts["load"] += weights.seconds
    for name, seconds in work.spent.items():
        spent.parts[f"solve: {name}"] += seconds
    return work.solved


def _take_up(carry: Carry, work: PartitionWork, device: torch.device) -> None:
    """Start from what earlier sweeps left."""
    left = carry.of(work.partition.name, device)
    work.solved |= left.solved
    for path, tensor in left.altered.items():
        work.weights[path] = tensor
        work.altered.add(path)


class _Clock:
    """Laps without the time that was spent on reading weights."""

    def __init__(self, weights: LazyWeights) -> None:
        self._weights = weights
        self._start, self._read = perf_counter(), weights.seconds

    def lap(self) -> float:
        now, read = perf_counter(), self._weights.seconds
        lap = max(0.0, now - self._start - (read - self._read))  # threads read side by side
        self._start, self._read = now, read
        return lap


def _watched(part: Partition, steps: Sequence[PartitionStep]) -> dict[Node, AnyObserver]:
    """The observers of a partition that some step uses, by the node where they stand."""
    found = {node: observer for node in part.nodes if (observer := observed(node)) is not None}
    return {node: observer for node, observer in found.items() if any(step.uses(observer) for step in steps)}


def _batches(context: Context) -> tuple[TokenBatch, ...]:
    data = context.own_data.get(context.sweep, context.data)
    if data is None:
        raise DataError(
            "a pass observes activations, and no calibration data was loaded",
            hint="insert observers before the first streaming pass, and give calibration data",
        )
    return data.batches


def _collect(flow: _Flow, work: PartitionWork, *, keep: bool) -> Statistics:
    """Run the batches through the partition as earlier sweeps left it, and return what its observers saw.

    `keep` what later partitions read.
    """
    watched = flow.watched
    columns = {leaf.path: leaf.in_features for node in work.partition.nodes if (leaf := get(node, Leaf))}
    found = Statistics(
        ranges={o.id: Statistic(o) for o in watched.values() if isinstance(o, Observer)},
        hessians={
            o.id: HessianStatistic(o, columns=columns.get(o.consumers[0], 0), device=flow.stream.device)
            for o in watched.values()
            if isinstance(o, HessianObserver)
        },
        channels={o.id: ChannelStatistic(o) for o in watched.values() if isinstance(o, ChannelObserver)},
    )
    by_id: dict[str, Statistic | HessianStatistic | ChannelStatistic] = {
        **found.ranges,
        **found.hessians,
        **found.channels,
    }
    served = _served(work, flow.stream.dtype)

    def handlers(batch: TokenBatch) -> dict[Any, Handler]:
        def collect(node: Node, args: tuple[Any, ...]) -> Any:
            if node in watched:
                start = perf_counter()
                by_id[watched[node].id].update(args[0], batch.token_mask)
                work.spent["observe"] += perf_counter() - start
            return args[0]

        return {**served, observe: collect}

    # What no observer depends on is not needed in this run: the last linear, for one.
    needed = ancestors(watched)
    part = work.partition
    nodes = part.nodes if keep else tuple(node for node in part.nodes if node in needed)
    if watched or keep:
        flow.stream.run(part, nodes, work.weights, handlers, keep=keep)
    return found


def _served(work: PartitionWork, dtype: torch.dtype) -> dict[Any, Handler]:
    """What evaluates the solved linears of a partition, and its observed keys and values, as they will be served.

    Their dequantized weights take the place of those in `work.weights`.
    """
    inputs: dict[str, Rounding] = {}
    linears: set[Any] = set()
    for node in work.partition.nodes:
        leaf, scheme = get(node, Leaf), scheme_of(node)
        if leaf is None or scheme is None or leaf.path not in work.solved or node.target in linears:
            continue
        linears.add(node.target)
        solved = work.solved[leaf.path]
        work.weights[f"{leaf.path}.weight"] = dequantize(solved.weight, dtype)
        if scheme.input_activations is not None:
            inputs[leaf.path] = Rounding(
                scheme.input_activations, solved.input_scale, solved.input_zero_point, solved.input_global_scale
            )
    caches = {(o.consumers[0], str(o.purpose)): Rounding(o.spec, scale) for o, scale in work.caches.items()}
    served = QuantizedOperations(work.weights, inputs, caches)
    return {observe: partial(_round_cache, served)} | dict.fromkeys(linears, partial(_run_linear, served))


def _round_cache(served: QuantizedOperations, node: Node, args: tuple[Any, ...]) -> Tensor:
    """Observed keys and values as the cache will hold them; observed inputs are rounded by their linears."""
    observer = get(node, Observer)
    x: Tensor = args[0]
    if observer is None or (observer.consumers[0], observer.purpose) not in served.caches:
        return x
    return served.fake_quantize_cache(x, observer.consumers[0], observer.purpose)


def _run_linear(served: QuantizedOperations, node: Node, args: tuple[Any, ...]) -> Tensor:
    layer = need(node, Leaf).path
    x = served.fake_quantize(args[0], layer) if layer in served.inputs else args[0]
    return served.quantized_linear(x, layer)
