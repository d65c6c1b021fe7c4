"""Solve the linears of a partition: transform, choose scales, round, and take input scales from what was observed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Literal, TypeVar

import torch
from torch import Tensor

from qcompiler.errors import CheckpointError
from qcompiler.ir.annotations import AnyObserver, Leaf, Observer, Quant, Role, get, get_quant, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.numerics import (
    QuantizedTensor,
    WeightError,
    nvfp4_global_scale,
    quantize_weight,
    weight_amax,
    weight_error,
)
from qcompiler.patterns.place import blocked, rescales
from qcompiler.pipeline.base import Context, PartitionStep, PartitionWork, Solved
from qcompiler.runtime import gptq
from qcompiler.runtime.channels import ChannelStatistic
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.parallel import in_parallel
from qcompiler.runtime.statistics import Statistic
from qcompiler.runtime.transform import Measured, Transformed, transform
from qcompiler.transforms.options import AwqOptions

ScaleChoice = Literal["minmax", "mse", "importance"]
Propagation = Literal["layer"] | bool
"""Who sees what is rounded: all that comes after it (True), other partitions than its own, or nobody."""
Item = tuple[Node, Quant]
S = TypeVar("S", Statistic, HessianStatistic, ChannelStatistic)


def solved_by(graph: Graph, run: int) -> frozenset[str]:
    """The paths of the linears that a run solves."""
    return frozenset(leaf.path for n, leaf in graph.linears() if (q := get_quant(n)) and q.run == run)


def uses(observer: AnyObserver, solved: frozenset[str]) -> bool:
    """Whether a run that solves some linears needs what an observer collects; each needs that of keys and values."""
    if isinstance(observer, Observer) and observer.purpose != "input":
        return True
    return not solved.isdisjoint(observer.consumers)


class SolveStep(PartitionStep):
    """Solves the linears of one run: those whose `Quant.run` is `run`."""

    solves = True

    def __init__(
        self, graph: Graph, context: Context, *, run: int, scales: ScaleChoice, propagate: Propagation
    ) -> None:
        self._context = context
        self._run = run
        self._scales = scales
        self._begun: set[str] = set()
        self._damped: dict[tuple[float, float], list[str]] = defaultdict(list)  # by what was asked and what it took
        self._mine = solved_by(graph, run)
        self.propagates = bool(propagate)
        self._within = propagate is True

    def uses(self, observer: AnyObserver) -> bool:
        return uses(observer, self._mine)

    def rounds(self, path: str) -> bool:
        return self._within and path in self._mine

    def segment(self, work: PartitionWork) -> None:
        todo = [(node, quant) for node in work.segment.nodes if (quant := self._todo(node)) is not None]
        ranges = _by_consumer(s for s in work.statistics.ranges.values() if s.observer.purpose == "input")
        hessians = _by_consumer(work.statistics.hessians.values())
        channels = _by_consumer(work.statistics.channels.values())
        self._transform(todo, work, Measured(ranges, hessians, channels))
        globals_ = _global_scales(todo, work.weights)

        def nearest(item: Item) -> tuple[str, QuantizedTensor, float]:
            node, quant = item
            path, start = need(node, Leaf).path, perf_counter()
            importance = self._importance(path, quant, hessians, channels)
            weight = work.weights[f"{path}.weight"]
            return path, self._nearest(path, weight, quant, globals_.get(node), importance), perf_counter() - start

        rounded = in_parallel(nearest, todo, workers=work.workers, size=_size)
        work.statistics.hessians.clear()  # `hessians` has them, and lets go of each that is used up
        codes = {path: solved for path, solved, _ in rounded}
        results = self._gptq(todo, codes, work, hessians)

        def error(item: Item) -> WeightError:
            path = need(item[0], Leaf).path
            found = weight_error(work.weights[f"{path}.weight"], codes[path])
            work.weights.release(f"{path}.weight")  # propagation multiplies by the solved one
            return found

        errors = in_parallel(error, todo, workers=work.workers, size=_size)
        for (_, quant), (path, solved, seconds), found in zip(todo, rounded, errors, strict=True):
            work.spent["round"] += seconds / work.workers.count
            for part, took in results[path].seconds.items() if path in results else ():
                work.spent[part] += took / work.workers.count
            work.solved[path] = self._with_input(solved, ranges.get(path))
            work.altered.discard(f"{path}.weight")
            self._tell(path, quant, found, seconds, results.get(path))
        for statistic in work.statistics.ranges.values():
            if statistic.observer.purpose != "input" and statistic.observer not in work.caches:
                work.caches[statistic.observer], _ = statistic.qparams(self._context.source.dtype)

    def finish(self) -> None:
        """One note for all layers whose damping grew alike."""
        for (asked, used), paths in self._damped.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            self._context.report.fallback(
                f"gptq: damping {used:g} for {paths[0]}{more}, where {asked:g} was asked for: with less, the Hessian "
                "of their inputs is not positive definite"
            )

    def _todo(self, node: Node) -> Quant | None:
        leaf, quant = get(node, Leaf), get_quant(node)
        if leaf is None or quant is None or quant.scheme is None or quant.run != self._run or leaf.path in self._begun:
            return None
        self._begun.add(leaf.path)  # a module that runs twice has one weight
        return quant

    def _transform(self, todo: Sequence[Item], work: PartitionWork, measured: Measured) -> None:
        """Fold what the linears of this run are transformed by, in the order in which the producers run."""
        quants = {need(node, Leaf).path: quant for node, quant in todo}

        fused: dict[str, list[str]] = {}
        for nodes in _sharing(todo):
            paths = [need(node, Leaf).path for node in nodes]
            fused |= dict.fromkeys(paths, paths)

        def nearest(path: str, weight: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
            return self._nearest(path, weight, quants[path], global_scale, None)

        for rescale in rescales(work.segment.nodes):
            asked = tuple(path for path in rescale.asked if path in quants)
            if not asked or blocked(rescale, work.solved):
                continue
            start = perf_counter()
            result = transform(replace(rescale, asked=asked), work, quants, measured, nearest, fused=fused)
            seconds = perf_counter() - start
            work.spent["transform"] += seconds
            self._tell_transformed(result, seconds)
        self._context.report.tell_rescaled(work.altered)

    def _gptq(
        self,
        todo: Sequence[Item],
        rounded: Mapping[str, QuantizedTensor],
        work: PartitionWork,
        hessians: dict[str, HessianStatistic],
    ) -> dict[str, gptq.Result]:
        asked = {need(node, Leaf).path: quant.options for node, quant in todo}
        jobs = [
            gptq.Job(path, work.weights[f"{path}.weight"], rounded[path], options)
            for path, options in asked.items()
            if options is not None
        ]
        return gptq.solve(jobs, hessians, work.workers)

    def _importance(
        self,
        path: str,
        quant: Quant,
        hessians: Mapping[str, HessianStatistic],
        channels: Mapping[str, ChannelStatistic],
    ) -> Tensor | None:
        """What weighs the errors of the scale search: AWQ clips by the Hessian, `importance` by its diagonal."""
        if isinstance(quant.transform, AwqOptions) and quant.transform.clip:
            return hessians[path].value()
        if self._scales != "importance":
            return None
        return hessians[path].diagonal() if path in hessians else channels[path].mean_square()

    def _nearest(
        self, path: str, weight: Tensor, quant: Quant, global_scale: Tensor | None, importance: Tensor | None
    ) -> QuantizedTensor:
        assert quant.scheme is not None
        try:
            return quantize_weight(
                weight,
                quant.scheme.weights,
                scales="minmax" if self._scales == "minmax" and importance is None else "mse",
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

    def _tell(self, path: str, quant: Quant, error: WeightError, seconds: float, result: gptq.Result | None) -> None:
        row = self._context.report.row(path)
        row.error = error.relative
        row.seconds = (row.seconds or 0.0) + seconds
        if result is None or quant.options is None:
            return
        outcome = result.outcome
        row.seconds += sum(result.seconds.values())
        row.output_error, row.nearest_output_error = outcome.relative(outcome.error), outcome.relative(outcome.before)
        row.damping, row.dead_columns = outcome.damping, outcome.dead_columns
        if outcome.damping > quant.options.damping:
            self._damped[quant.options.damping, outcome.damping].append(path)

    def _tell_transformed(self, result: Transformed, seconds: float) -> None:
        for path in result.rescale.asked:
            row = self._context.report.row(path)
            row.ratio, row.transform_gain = result.ratio, result.gain
            row.seconds = (row.seconds or 0.0) + seconds / len(result.rescale.asked)


def _sharing(todo: Sequence[Item]) -> Iterable[list[Node]]:
    """The linears of NVFP4 weights, those together that share a global scale."""
    groups: dict[object, list[Node]] = {}
    for node, quant in todo:
        assert quant.scheme is not None
        if quant.scheme.weights.is_nvfp4:
            groups.setdefault(need(node, Role).fusion_group or node, []).append(node)
    return groups.values()


def _global_scales(todo: list[Item], weights: Mapping[str, Tensor]) -> dict[Node, Tensor]:
    """NVFP4's global scale of each linear, one for all members of a fusion group: runtimes do not rescale."""
    found: dict[Node, Tensor] = {}
    for nodes in _sharing(todo):
        amax = torch.stack([weight_amax(weights[f"{need(n, Leaf).path}.weight"]) for n in nodes]).max()
        found |= dict.fromkeys(nodes, nvfp4_global_scale(amax))
    return found


def _size(item: Item) -> int:
    return need(item[0], Leaf).parameters


def _by_consumer(statistics: Iterable[S]) -> dict[str, S]:
    """The statistic of each linear that uses one, by module path."""
    return {path: statistic for statistic in statistics for path in statistic.observer.consumers}
