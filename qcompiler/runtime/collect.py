"""What the observers of one segment see while batches run by."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch

from qcompiler.data.batches import TokenBatch
from qcompiler.ir.annotations import AnyObserver, ChannelObserver, HessianObserver, Leaf, Observer, get
from qcompiler.ir.fx import Node, ancestors
from qcompiler.ir.graph import Partition
from qcompiler.ir.ops import observe
from qcompiler.pipeline.base import PartitionWork, Statistics
from qcompiler.runtime.channels import ChannelStatistic
from qcompiler.runtime.evaluate import Handler
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.statistics import Statistic
from qcompiler.runtime.stream import Handlers


class Collector:
    """The statistics of the observers in `watched`, which stand in `segment`. `needed` is what they depend on."""

    def __init__(self, segment: Partition, watched: Mapping[Node, AnyObserver], device: torch.device) -> None:
        leaves = [leaf for node in segment.nodes if (leaf := get(node, Leaf))]
        columns = {leaf.path: leaf.in_features for leaf in leaves}
        self.needed = ancestors(watched)
        self._watched = watched
        self._seconds = 0.0
        self._found = Statistics(
            ranges={o.id: Statistic(o) for o in watched.values() if isinstance(o, Observer)},
            hessians={
                o.id: HessianStatistic(o, columns=columns.get(o.consumers[0], 0), device=device)
                for o in watched.values()
                if isinstance(o, HessianObserver)
            },
            channels={o.id: ChannelStatistic(o) for o in watched.values() if isinstance(o, ChannelObserver)},
        )
        self._by_id: dict[str, Statistic | HessianStatistic | ChannelStatistic] = {
            **self._found.ranges,
            **self._found.hessians,
            **self._found.channels,
        }

    def handlers(self, others: Mapping[Any, Handler]) -> Handlers:
        """`others`, but for the observers that are watched."""
        passing = others[observe]

        def for_batch(batch: TokenBatch) -> Mapping[Any, Handler]:
            def see(node: Node, args: tuple[Any, ...]) -> Any:
                if node not in self._watched:
                    return passing(node, args)
                start = perf_counter()
                self._by_id[self._watched[node].id].update(args[0], batch.token_mask)
                self._seconds += perf_counter() - start
                return args[0]

            return {**others, observe: see}

        return for_batch

    def give(self, work: PartitionWork) -> None:
        """Hand over what was seen, and the seconds that it took."""
        work.statistics.ranges.update(self._found.ranges)
        work.statistics.hessians.update(self._found.hessians)
        work.statistics.channels.update(self._found.channels)
        work.spent["observe"] += self._seconds
