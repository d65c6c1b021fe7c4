"""Split a pipeline that names several algorithms into independent runs over the data, one for each."""

from __future__ import annotations

from dataclasses import replace

from qcompiler.errors import ConfigError
from qcompiler.pipeline.base import Pass, StreamingPass
from qcompiler.pipeline.pipeline import Pipeline


def independent_runs(pipeline: Pipeline) -> Pipeline:
    """The pipeline with every calibrating pass in one copy per algorithm, in the order in which rules name them.

    Each run solves the linears of one algorithm, and starts from the model as the one before left it. Raises
    `ConfigError` where nothing can be split: one algorithm, or none.
    """
    algorithms = list(dict.fromkeys(name for item in pipeline.flat() for name in item.algorithms_named()))
    if len(algorithms) < 2:
        raise ConfigError(
            f"pipeline {pipeline.name} cannot be split into independent runs: its rules name "
            + (f"one algorithm, {algorithms[0]}" if algorithms else "no algorithm"),
            hint="leave --independent out (Python: independent=)",
        )
    return _split(pipeline, tuple(algorithms))


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
