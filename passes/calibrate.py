"""Solve every linear of a partition: choose scales, round the weight, take input scales from what was observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.errors import CheckpointError
from qcompiler.ir.annotations import Leaf, Observer, Quant, Role, get, get_quant, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Partition, Stage
from qcompiler.ir.ops import observe
from qcompiler.numerics import nvfp4_global_scale, quantize_weight, weight_amax, weight_error
from qcompiler.pipeline import Context, PartitionStep, PartitionWork, StreamingPass
from qcompiler.pipeline.base import Solved
from qcompiler.runtime.parallel import in_parallel
from qcompiler.runtime.statistics import Statistic


@dataclass(frozen=True, kw_only=True)
class Calibrate(StreamingPass):
    """Round to nearest, with the scales of each weight's range (`minmax`) or those of least squared error (`mse`)."""

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})
    ensures: ClassVar[Stage] = Stage.CALIBRATED

    scales: Literal["minmax", "mse"] = "minmax"

    def begin(self, graph: Graph, context: Context) -> PartitionStep:
        return _Solve(self, graph, context)


class _Solve(PartitionStep):
    def __init__(self, options: Calibrate, graph: Graph, context: Context) -> None:
        self._options = options
        self._graph = graph
        self._context = context
        self._done: set[str] = set()

    def partition(self, work: PartitionWork) -> None:
        todo = [(node, quant) for node in work.partition.nodes if (quant := self._todo(node)) is not None]
        globals_ = _global_scales(todo, work.weights)
        measured = _measured(work.partition, work.statistics)

        def solve(item: tuple[Node, Quant]) -> tuple[str, Solved, float]:
            node, quant = item
            path = need(node, Leaf).path
            weight = work.weights[f"{path}.weight"]
            solved = self._solve(path, weight, quant, globals_.get(node), measured.get(path))
            work.weights.release(f"{path}.weight")  # propagation multiplies by the solved one
            return path, solved, weight_error(weight, solved.weight).relative

        def size(item: tuple[Node, Quant]) -> int:
            return need(item[0], Leaf).parameters

        for path, solved, error in in_parallel(solve, todo, device=self._context.device, size=size):
            work.solved[path] = solved
            self._context.report.row(path).error = error
        for statistic in work.statistics.values():
            if statistic.observer.purpose != "input":
                work.caches[statistic.observer], _ = statistic.qparams(self._context.source.dtype)

    def _todo(self, node: Node) -> Quant | None:
        leaf, quant = get(node, Leaf), get_quant(node)
        if leaf is None or quant is None or quant.scheme is None or leaf.path in self._done:
            return None
        self._done.add(leaf.path)  # a module that runs twice has one weight
        return quant

    def _solve(
        self, path: str, weight: Tensor, quant: Quant, global_scale: Tensor | None, statistic: Statistic | None
    ) -> Solved:
        assert quant.scheme is not None
        dtype = self._context.source.dtype
        try:
            rounded = quantize_weight(
                weight,
                quant.scheme.weights,
                scales=self._options.scales,
                scale_dtype=dtype,
                global_scale=global_scale,
            )
        except ValueError as error:
            raise CheckpointError(
                f"{path}.weight cannot be quantized: {error}",
                hint="the checkpoint is damaged or overflowed its dtype; ignore this layer to keep it as it is",
            ) from error
        if statistic is None:
            return Solved(rounded)
        if statistic.observer.spec.is_nvfp4:
            return Solved(rounded, input_global_scale=statistic.global_scale())
        scale, zero = statistic.qparams(dtype)
        return Solved(rounded, input_scale=scale, input_zero_point=zero)

    def finish(self) -> None:
        return None


def _global_scales(todo: list[tuple[Node, Quant]], weights: Mapping[str, Tensor]) -> dict[Node, Tensor]:
    """NVFP4's global scale of each linear, one for all members of a fusion group: runtimes do not rescale."""
    groups: dict[object, list[Node]] = {}
    for node, quant in todo:
        assert quant.scheme is not None
        if quant.scheme.weights.is_nvfp4:
            groups.setdefault(need(node, Role).fusion_group or node, []).append(node)
    found: dict[Node, Tensor] = {}
    for nodes in groups.values():
        amax = torch.stack([weight_amax(weights[f"{need(n, Leaf).path}.weight"]) for n in nodes]).max()
        found |= dict.fromkeys(nodes, nvfp4_global_scale(amax))
    return found


def _measured(partition: Partition, statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """The statistic of each linear whose input was observed, by module path."""
    observers = [need(node, Observer) for node in partition.nodes if node.target is observe]
    return {path: statistics[o.id] for o in observers if o.purpose == "input" for path in o.consumers}
