"""The streaming executor: one sweep over the partitions, with one partition's weights in memory at a time.

For each partition, segment by segment: run the batches up to its observers; let every step do its part; run the batches
through what became of it, if anything is observed later. Then its weights are forgotten. Memory is one partition plus
the activations that cross a border, whatever the depth of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from qcompiler.ir.annotations import Leaf, get
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.partition import partitions
from qcompiler.pipeline.base import Context, PartitionStep, PartitionWork, Solved
from qcompiler.runtime.carry import Carry
from qcompiler.runtime.collect import Collector
from qcompiler.runtime.flow import Flow, shelf_for
from qcompiler.runtime.memory import trim_memory
from qcompiler.runtime.parallel import Workers
from qcompiler.runtime.served import served, solved_among
from qcompiler.runtime.stream import always
from qcompiler.runtime.weights import LazyWeights, lazy_weights


@dataclass(slots=True)
class Spent:
    """Seconds per step, and per part of the executor's own work; those named `solve: ` are parts of the steps'.

    Reading weights counts as `load`, whoever asked.
    """

    steps: list[float]
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def forward(self, what: str, seconds: float, work: PartitionWork) -> None:
        """Add a run of the batches, during which observers took what `work.spent` says."""
        observing = work.spent.pop("observe", 0.0)
        self.parts["observe"] += observing
        self.parts[f"forward: {what}"] += seconds - observing


def sweep(graph: Graph, steps: Sequence[PartitionStep], context: Context, carry: Carry | None = None) -> Spent:
    """Run `steps` over every partition in order.

    `carry` is what earlier sweeps did, and keeps what this one does; None where there is one sweep, or no output.
    Raises `DataError` where a step uses what observers collect and there is no data.
    """
    parts = partitions(graph)
    spent = Spent([0.0] * len(steps))
    last_call = {leaf.path: i for i, part in enumerate(parts) for node in part.nodes if (leaf := get(node, Leaf))}
    carried: dict[str, Solved] = {}
    with shelf_for(context) as shelf, Workers(context.device) as workers:
        flow = Flow.plan(graph, parts, steps, context, shelf)
        for index, part in enumerate(parts):
            context.progress(part.name, index, len(parts))
            # In a function of its own, so that one partition's weights are gone before the next one's are read.
            solved = _run_partition(graph, part, steps, context, flow, carried, carry, spent, workers)
            # A module that later partitions call again is solved once, by the first.
            carried = {path: result for path, result in (carried | solved).items() if last_call[path] > index}
            del solved
            trim_memory()
    context.progress("done", len(parts), len(parts))
    return spent


def _run_partition(
    graph: Graph,
    part: Partition,
    steps: Sequence[PartitionStep],
    context: Context,
    flow: Flow,
    carried: Mapping[str, Solved],
    carry: Carry | None,
    spent: Spent,
    workers: Workers,
) -> dict[str, Solved]:
    """Segment by segment: collect, let every step do its part, propagate. What was solved.

    `carried` are modules that earlier partitions solved.
    """
    weights = lazy_weights(graph, part, context.source, context.device)
    called = {leaf.path for node in part.nodes if (leaf := get(node, Leaf))}
    earlier = {path: carried[path] for path in called if path in carried}
    # Where nothing propagates, only what earlier sweeps solved is seen rounded: that is taken up.
    work = PartitionWork(part, part, weights, workers, solved=dict(earlier) if flow.propagates else {})
    if carry is not None:
        _take_up(carry, work, context.device)
    clock = _Clock(weights)
    solving = next((number for number, step in enumerate(steps) if step.solves), 0)
    for number, step in enumerate(steps[:solving]):
        step.partition(work)
        spent.steps[number] += clock.lap()
    nodes: tuple[Node, ...] = ()  # since what waits
    for segment in flow.segments[part.name]:
        work.segment = segment
        nodes += segment.nodes
        if _collect(flow, work, nodes):
            spent.forward("collect", clock.lap(), work)
        for number, step in enumerate(steps):
            step.segment(work)
            spent.steps[number] += clock.lap()
        if segment.name in flow.kept:
            if _propagate(flow, work, nodes):
                spent.forward("propagate", clock.lap(), work)
            _forget(work, nodes)
            nodes = ()
    _forget(work, nodes)
    for number, step in enumerate(steps[solving:], solving):
        step.partition(work)
        spent.steps[number] += clock.lap()
    if carry is not None:
        carry.keep(part.name, earlier | work.solved, {path: work.weights[path] for path in work.altered})
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


def _collect(flow: Flow, work: PartitionWork, nodes: Sequence[Node]) -> bool:
    """Run the batches through `nodes` up to the segment's observers, as they are by now, and note what these see.

    False where there is nothing to run. Where nothing propagates, what later partitions read is what this one computes
    now: one run does for both.
    """
    stream, segment = flow.stream, work.segment
    keep = not flow.propagates and segment.name in flow.feeding
    if stream is None or not (flow.watched[segment.name] or keep):
        return False
    collector = Collector(segment, flow.watched[segment.name], stream.device)
    # What no observer depends on is not needed in this run: the last linear, for one.
    run = nodes if keep else [node for node in nodes if node in collector.needed]
    stream.run(segment, run, work.weights, collector.handlers(served(work, nodes, stream.model)), keep=keep)
    collector.give(work)
    trim_memory()  # the room that activations took
    return True


def _propagate(flow: Flow, work: PartitionWork, nodes: Sequence[Node]) -> bool:
    """Run the batches through `nodes` as they became; False where nothing is observed after the segment.

    The next segment's observers could look on, which would save reading what waits once; but their Hessians would be
    there together with the weights and activations of this run.
    """
    stream = flow.stream
    if stream is None or not flow.propagates or work.segment.name not in flow.feeding:
        return False
    stream.run(work.segment, nodes, work.weights, always(served(work, nodes, stream.model)), keep=True)
    return True


def _forget(work: PartitionWork, nodes: Sequence[Node]) -> None:
    """Let go of the dequantized weights of solved linears."""
    for _, path in solved_among(work, nodes):
        work.weights.release(f"{path}.weight")
