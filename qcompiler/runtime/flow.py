"""How the batches of a sweep go through the partitions: in which segments, what is observed there, and what waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Self

from qcompiler.data.batches import TokenBatch
from qcompiler.errors import DataError
from qcompiler.ir.annotations import AnyObserver, observed
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Partition
from qcompiler.pipeline.base import Context, PartitionStep
from qcompiler.runtime.segments import segments
from qcompiler.runtime.shelf import Shelf
from qcompiler.runtime.stream import Stream, bytes_by_shape, widths

_WIDER = 2
"""How much more than at the ends of a partition may wait in memory within it."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The batches on their way (None: nothing is observed), and how they go.

    `segments` are those of each partition, by name; `watched` are the observers of each segment that some step uses.
    Something is observed after those in `feeding`, and after those in `kept` what crosses their end waits: after the
    others it is computed again. `propagates`: what comes after a segment sees it rounded.
    """

    segments: Mapping[str, Sequence[Partition]]
    watched: Mapping[str, Mapping[Node, AnyObserver]]
    feeding: frozenset[str]
    kept: frozenset[str]
    stream: Stream | None
    propagates: bool

    @classmethod
    def plan(
        cls,
        graph: Graph,
        parts: Sequence[Partition],
        steps: Sequence[PartitionStep],
        context: Context,
        shelf: Shelf | None,
    ) -> Self:
        """Cut the partitions for what the steps use and round. Raises `DataError` where data is needed and missing."""
        propagates = all(step.propagates for step in steps)
        found: dict[str, tuple[Partition, ...]] = {}
        watched: dict[str, dict[Node, AnyObserver]] = {}
        for part in parts:
            observers = _watched(part, steps)
            # Where nothing propagates, what is rounded changes nothing for what comes after it.
            cut = bool(observers) and propagates
            found[part.name] = segments(part, observers, partial(_rounded_by, steps)) if cut else (part,)
            for segment in found[part.name]:
                watched[segment.name] = {node: observers[node] for node in segment.nodes if node in observers}
        order = [segment for part in parts for segment in found[part.name]]
        last = max((i for i, segment in enumerate(order) if watched[segment.name]), default=-1)
        stream: Stream | None = None
        if last >= 0:
            run, batches = order[: last + 1], _batches(context)
            stream = Stream(graph, run, batches, context.device, shelf)
            if shelf is not None:
                shapes = [batch.input_ids.shape for batch in batches]
                by_tokens = sum(map(prod, shapes)) * _room(widths(graph, run))
                shelf.check(by_tokens + bytes_by_shape(graph, run, set(shapes)), context.report.total_bytes)
        feeding = [segment.name for segment in order[: max(last, 0)]]
        kept = feeding if shelf is not None else _narrow(graph, found.values())
        return cls(found, watched, frozenset(feeding), frozenset(kept), stream, propagates)


def shelf_for(context: Context) -> AbstractContextManager[Shelf | None]:
    """Where activations wait in a file: beside the output, on a CPU. Others compute faster than files are read."""
    if context.device.type != "cpu" or context.output is None:
        return nullcontext()
    return Shelf(context.output.folder)


def _room(crossing: Iterable[Counter[int]]) -> int:
    """Bytes per token of a shelf: what a value leaves is taken by values of its size."""
    most: Counter[int] = Counter()
    for sizes in crossing:
        most |= sizes
    return most.total()


def _narrow(graph: Graph, parts: Iterable[Sequence[Partition]]) -> Iterator[str]:
    """The segments at whose end not much more waits than at the ends of their partition; and these."""
    order = [segment for part in parts for segment in part]
    by_name = {s.name: sizes.total() for s, sizes in zip(order, widths(graph, order), strict=True)}
    before = 0
    for part in parts:
        most = _WIDER * max(before, by_name[part[-1].name])
        yield from (segment.name for segment in part if by_name[segment.name] <= most)
        before = by_name[part[-1].name]


def _rounded_by(steps: Sequence[PartitionStep], path: str) -> bool:
    return any(step.rounds(path) for step in steps)


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
