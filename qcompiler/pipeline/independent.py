"""Split a pipeline that names several algorithms into independent runs over the data, one for each."""

from __future__ import annotations

from dataclasses import replace

from qcompiler.errors import ConfigError
from qcompiler.ir.annotations import get_quant
from qcompiler.ir.graph import Graph
from qcompiler.pipeline.base import Pass, StreamingPass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.report import Report


def independent_runs(pipeline: Pipeline) -> Pipeline:
    """The pipeline with every calibrating pass in one copy per algorithm, in the order in which rules name them.

    Each run solves the linears of one algorithm, and starts from the model as the one before left it. Raises
    `ConfigError` where nothing can be split: one algorithm, or none.
    """
    algorithms = _named(pipeline)
    if len(algorithms) < 2:
        raise ConfigError(
            f"pipeline {pipeline.name} cannot be split into independent runs: its rules name "
            + (f"one algorithm, {algorithms[0]}" if algorithms else "no algorithm"),
            hint="leave --independent out (Python: independent=)",
        )
    return _split(pipeline, algorithms)


def independent_runs_of(graph: Graph, pipeline: Pipeline, report: Report) -> Pipeline:
    """The pipeline split as `independent_runs` does, once rules have spoken: what solves no linear has no run.

    Rules that match nothing may name algorithms, and so may rules that later ones override.
    """
    quants = [get_quant(node) for node, _ in graph.linears()]
    present = {quant.algorithm for quant in quants if quant is not None and quant.scheme is not None}
    named = _named(pipeline)
    if idle := [name for name in named if name not in present]:
        report.info(f"no linear is solved by {' or '.join(idle)}, which rules name: no run is made for it")
    algorithms = tuple(name for name in named if name in present)
    return _split(pipeline, algorithms) if algorithms else pipeline


def _named(pipeline: Pipeline) -> tuple[str, ...]:
    return tuple(dict.fromkeys(quant.algorithm for item in pipeline.flat() for quant in item.quants_named()))


def _split(pipeline: Pipeline, algorithms: tuple[str, ...]) -> Pipeline:
    passes: list[Pass | Pipeline] = []
    for item in pipeline.passes:
        if isinstance(item, Pipeline):
            passes.append(_split(item, algorithms))
        elif isinstance(item, StreamingPass):
            passes += item.apart(algorithms)
        else:
            passes.append(item)
    return replace(pipeline, passes=tuple(passes))
