"""Solve every linear of a partition: choose scales, round the weight, take input scales from what was observed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from qcompiler.errors import CheckpointError, ConfigError, DataError
from qcompiler.ir.annotations import ChannelObserver, HessianObserver, Leaf, Quant, Role, get, get_quant, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.observers import observers
from qcompiler.numerics import (
    QuantizedTensor,
    WeightError,
    nvfp4_global_scale,
    quantize_weight,
    weight_amax,
    weight_error,
)
from qcompiler.pipeline import Context, PartitionStep, PartitionWork, StreamingPass
from qcompiler.pipeline.base import Solved
from qcompiler.runtime.channels import ChannelStatistic
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.parallel import in_parallel
from qcompiler.runtime.statistics import Statistic
from qcompiler.solvers.gptq import Factored, Outcome, factor, gptq
from qcompiler.solvers.options import GptqOptions


@dataclass(frozen=True, kw_only=True)
class Calibrate(StreamingPass):
    """Choose scales and round every weight, as its rule's solver does.

    `scales`: those of each weight's range (`minmax`), of least squared error (`mse`), or of least squared error
    weighted by how large each input is (`importance`, which insert-observers must measure). Solver `rtn` rounds to
    nearest; `gptq` rounds column by column, and spreads each one's error over those that are left.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})
    ensures: ClassVar[Stage] = Stage.CALIBRATED

    scales: Literal["minmax", "mse", "importance"] = "minmax"

    def begin(self, graph: Graph, context: Context) -> PartitionStep:
        if self.scales == "importance":
            _check_measured(graph)
        return _Solve(self, graph, context)


Item = tuple[Node, Quant]
R = TypeVar("R")
S = TypeVar("S", Statistic, HessianStatistic, ChannelStatistic)


class _Solve(PartitionStep):
    def __init__(self, options: Calibrate, graph: Graph, context: Context) -> None:
        self._options = options
        self._graph = graph
        self._context = context
        self._done: set[str] = set()

    def partition(self, work: PartitionWork) -> None:
        todo = [(node, quant) for node in work.partition.nodes if (quant := self._todo(node)) is not None]
        globals_ = _global_scales(todo, work.weights)
        measured = _by_consumer(s for s in work.statistics.ranges.values() if s.observer.purpose == "input")
        factored = self._factor(todo, work)
        importance = self._importance(todo, work)

        def solve(item: tuple[Node, Quant]) -> tuple[str, Solved, WeightError, Outcome | None]:
            node, quant = item
            path = need(node, Leaf).path
            weight = work.weights[f"{path}.weight"]
            rounded, outcome = self._nearest(path, weight, quant, globals_.get(node), importance.get(path)), None
            if path in factored and quant.options is not None:
                rounded, outcome = gptq(weight, factored[path], rounded, quant.options)
            work.weights.release(f"{path}.weight")  # propagation multiplies by the solved one
            return path, self._with_input(rounded, measured.get(path)), weight_error(weight, rounded), outcome

        for path, solved, error, outcome in self._in_parallel(solve, todo):
            work.solved[path] = solved
            self._tell(path, error, outcome)
        for statistic in work.statistics.ranges.values():
            if statistic.observer.purpose != "input":
                work.caches[statistic.observer], _ = statistic.qparams(self._context.source.dtype)

    def _in_parallel(self, solve: Callable[[Item], R], todo: Sequence[Item]) -> list[R]:
        return in_parallel(solve, todo, device=self._context.device, size=lambda item: need(item[0], Leaf).parameters)

    def _factor(self, todo: Sequence[Item], work: PartitionWork) -> dict[str, Factored]:
        """The factored Hessian of each linear that is solved with one: one for all that read the same tensor."""
        hessians = _by_consumer(work.statistics.hessians.values())
        wanted = {path: quant.options for node, quant in todo if (path := need(node, Leaf).path) in hessians}
        jobs = list(dict.fromkeys((hessians[path], options) for path, options in wanted.items() if options is not None))

        def run(job: tuple[HessianStatistic, GptqOptions]) -> Factored:
            statistic, options = job
            try:
                return factor(statistic.value(), options)
            except ValueError as error:
                raise DataError(
                    f"{', '.join(statistic.observer.consumers)} cannot be solved: {error}",
                    hint="use more calibration data, a larger damping, or solver rtn",
                ) from error

        made = dict(zip(jobs, in_parallel(run, jobs, device=self._context.device), strict=True))
        return {path: made[hessians[path], options] for path, options in wanted.items() if options is not None}

    def _tell(self, path: str, error: WeightError, outcome: Outcome | None) -> None:
        row = self._context.report.row(path)
        row.error = error.relative
        if outcome is None:
            return
        row.output_error, row.nearest_output_error = outcome.relative(outcome.error), outcome.relative(outcome.before)
        row.damping, row.dead_columns = outcome.damping, outcome.dead_columns

    def _todo(self, node: Node) -> Quant | None:
        leaf, quant = get(node, Leaf), get_quant(node)
        if leaf is None or quant is None or quant.scheme is None or leaf.path in self._done:
            return None
        self._done.add(leaf.path)  # a module that runs twice has one weight
        return quant

    def _importance(self, todo: Sequence[Item], work: PartitionWork) -> dict[str, Tensor]:
        """The size of each input of each linear, where the scale search weighs it."""
        if self._options.scales != "importance":
            return {}
        hessians = _by_consumer(work.statistics.hessians.values())
        channels = _by_consumer(work.statistics.channels.values())
        paths = [need(node, Leaf).path for node, _ in todo]
        return {p: hessians[p].diagonal() if p in hessians else channels[p].mean_square() for p in paths}

    def _nearest(
        self, path: str, weight: Tensor, quant: Quant, global_scale: Tensor | None, importance: Tensor | None
    ) -> QuantizedTensor:
        assert quant.scheme is not None
        try:
            return quantize_weight(
                weight,
                quant.scheme.weights,
                scales="minmax" if self._options.scales == "minmax" else "mse",
                scale_dtype=self._context.source.dtype,
                global_scale=global_scale,
                importance=importance,
            )
        except ValueError as error:
            raise CheckpointError(
                f"{path}.weight cannot be quantized: {error}",
                hint="the checkpoint is damaged or overflowed its dtype; ignore this layer to keep it as it is",
            ) from error

    def _with_input(self, rounded: QuantizedTensor, statistic: Statistic | None) -> Solved:
        if statistic is None:
            return Solved(rounded)
        if statistic.observer.spec.is_nvfp4:
            return Solved(rounded, input_global_scale=statistic.global_scale())
        scale, zero = statistic.qparams(self._context.source.dtype)
        return Solved(rounded, input_scale=scale, input_zero_point=zero)


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


def _check_measured(graph: Graph) -> None:
    """Before anything runs: scales by importance need to know the inputs of every linear."""
    for node, leaf in graph.linears():
        quant = get_quant(node)
        if quant is None or quant.scheme is None:
            continue
        if not any(isinstance(observer, HessianObserver | ChannelObserver) for observer in observers(node)):
            raise ConfigError(
                f"calibrate: scales: importance weighs errors by how large inputs are, and nothing measures those of "
                f"{leaf.path}",
                hint="write insert-observers: {importance: true}, or scales: mse",
            )


def _by_consumer(statistics: Iterable[S]) -> dict[str, S]:
    """The statistic of each linear that uses one, by module path."""
    return {path: statistic for statistic in statistics for path in statistic.observer.consumers}
