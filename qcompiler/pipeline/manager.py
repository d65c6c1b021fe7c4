"""Run a pipeline: check the order, time each pass, verify the graph after it, fuse streaming passes into sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.spec import verify
from qcompiler.pipeline.base import Context, GraphPass, PartitionStep, Pass, StreamingPass
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.registry import pass_class, pass_names
from qcompiler.report import Timing
from qcompiler.runtime.carry import Carry
from qcompiler.runtime.executor import sweep

Printer = Callable[[str, Graph], None]


def check_order(pipeline: Pipeline) -> None:
    """Refuse, before anything runs, a pipeline in which a pass would meet a graph of the wrong stage.

    Raises `ConfigError` that names the pass and what it needs.
    """
    stage = Stage.CAPTURED
    for item in pipeline.flat():
        if stage not in item.requires:
            wanted = " or ".join(str(s) for s in sorted(item.requires))
            raise ConfigError(
                f"pipeline {pipeline.name}: pass {item.name} needs a graph that is {wanted}, and here it is {stage}",
                hint=_what_leads_to(item),
            )
        stage = item.ensures if item.ensures is not None else stage


def _what_leads_to(item: Pass) -> str:
    before = [name for name in pass_names() if name != item.name and _ensures(name) in item.requires]
    return f"put {' or '.join(before)} before it" if before else "move it to where the graph is as it needs it"


def _ensures(name: str) -> Stage | None:
    """What a pass ensures; None too where it does not load: who asks is to be told of something else."""
    try:
        return pass_class(name).ensures
    except ConfigError:
        return None


def run_graph_passes(graph: Graph, pipeline: Pipeline, context: Context, *, show: Printer | None = None) -> None:
    """Run the passes up to the first that needs weights."""
    verify(graph, after="capture")
    for who, item in zip(told_apart(pipeline), planned(pipeline), strict=False):
        _run(item, who, graph, context, show)


def prepare_streaming_passes(graph: Graph, pipeline: Pipeline, context: Context) -> None:
    """Prepare the passes that need weights: after `run_graph_passes`, this is all that a plan does."""
    for context.sweep, stretch in enumerate(sweeps(pipeline), 1):
        for streaming in stretch:
            streaming.prepare(graph, context)
            verify(graph, after=streaming.name)


def sweeps(pipeline: Pipeline) -> list[list[StreamingPass]]:
    """The passes that each sweep over the partitions runs, as `run_streaming_passes` will run them."""
    named = [(item.name, item) for item in pipeline.flat()]
    return [stretch for stretch in _stretches(named) if isinstance(stretch, list)]


def _run(item: GraphPass, who: str, graph: Graph, context: Context, show: Printer | None) -> None:
    context.running = who
    start = perf_counter()
    item.run(graph, context)
    _done(item, graph, context, perf_counter() - start, show)


def told_apart(pipeline: Pipeline) -> Iterator[str]:
    """What each pass is called: its name, numbered (`assign 2`) where there are several of that name."""
    names = [item.name for item in pipeline.flat()]
    for index, name in enumerate(names):
        yield f"{name} {names[: index + 1].count(name)}" if names.count(name) > 1 else name


def planned(pipeline: Pipeline) -> Iterator[GraphPass]:
    """The passes up to the first that needs weights: those that a plan runs."""
    for item in pipeline.flat():
        if not isinstance(item, GraphPass):
            return
        yield item


def run_streaming_passes(graph: Graph, pipeline: Pipeline, context: Context, *, show: Printer | None = None) -> None:
    """Run what follows: every stretch of consecutive streaming passes as one sweep over the partitions.

    A pass that comes a second time begins a sweep of its own, which starts from what the one before left. What they
    made is published when the last pass has finished; whatever fails before, nothing is.
    """
    items = list(zip(told_apart(pipeline), pipeline.flat(), strict=True))
    first = next((i for i, (_, item) in enumerate(items) if isinstance(item, StreamingPass)), len(items))
    begun: list[PartitionStep] = []
    context.sweep = 0
    carry = Carry(context.output.folder) if context.output is not None and len(sweeps(pipeline)) > 1 else None
    try:
        for stretch in _stretches(items[first:]):
            if isinstance(stretch, list):
                context.sweep += 1
                _sweep(stretch, begun, graph, context, carry, show)
            else:
                who, item = stretch
                _run(item, who, graph, context, show)
        for step in begun:
            step.publish()
    except BaseException:
        for step in begun:
            step.abort()
        raise
    finally:
        if carry is not None:
            carry.close()


def _sweep(
    items: Sequence[StreamingPass],
    begun: list[PartitionStep],
    graph: Graph,
    context: Context,
    carry: Carry | None,
    show: Printer | None,
) -> None:
    """One sweep of `items`. Each step joins `begun` as it begins, so that it is aborted if the next does not."""
    steps: list[PartitionStep] = []
    for item in items:
        steps.append(item.begin(graph, context))
        begun.append(steps[-1])
        _check_step(item, steps[-1])
    spent = sweep(graph, steps, context, carry)
    for item, step, seconds in zip(items, steps, spent.steps, strict=True):
        start = perf_counter()
        step.finish()
        _done(item, graph, context, seconds + perf_counter() - start, show)
    context.report.timings += [Timing(name, seconds) for name, seconds in spent.parts.items()]


def _check_step(item: StreamingPass, step: PartitionStep) -> None:
    """Raise `ConfigError` for a step that does nothing: a misspelt method would be one silently."""
    hooks = ("segment", "partition", "finish", "publish")
    if all(getattr(type(step), hook) is getattr(PartitionStep, hook) for hook in hooks):
        raise ConfigError(
            f"pass {item.name}: its step, a {type(step).__qualname__}, does nothing: it defines no {', '.join(hooks)}",
            hint="define `partition` for what is done once for each partition, or `segment` to round linears",
        )


def _stretches(items: Sequence[tuple[str, Pass]]) -> Iterator[tuple[str, GraphPass] | list[StreamingPass]]:
    streaming: list[StreamingPass] = []
    for who, item in items:
        if isinstance(item, StreamingPass):
            if any(type(item) is type(other) for other in streaming):
                yield streaming
                streaming = []
            streaming.append(item)
            continue
        if streaming:
            yield streaming
            streaming = []
        assert isinstance(item, GraphPass)
        yield who, item
    if streaming:
        yield streaming


def _done(item: Pass, graph: Graph, context: Context, seconds: float, show: Printer | None) -> None:
    if item.ensures is not None:
        graph.stage = item.ensures
    verify(graph, after=item.name)
    context.report.timings.append(Timing(item.name, seconds))
    if show is not None:
        show(item.name, graph)


def check_print_after(names: Sequence[str], pipeline: Pipeline, *, planning: bool = False) -> None:
    """Raise `ConfigError` for a pass to print after that the pipeline, or a plan of it, does not run."""
    known = [item.name for item in pipeline.flat()]
    run = [item.name for item in planned(pipeline)] if planning else known
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--print-after {name}: pipeline {pipeline.name} has no such pass{did_you_mean(name, known)}",
                hint=f"it runs {', '.join(run)}",
            )
        if name not in run:
            raise ConfigError(
                f"--print-after {name}: a plan ends where the first pass needs weights, and does not run it",
                hint=f"it runs {', '.join(run)}; `qcompiler compile` runs the others",
            )
