"""Read a model of any kind into a document: a model's folder, a captured graph, a checkpoint, or an export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qcompiler.checkpoints.hub import resolve_model
from qcompiler.compiler import PipelineLike, survey, survey_each
from qcompiler.errors import ConfigError, LegalityError, did_you_mean
from qcompiler.inspection.build import build_groups, build_nodes, model_facts, verdicts_of
from qcompiler.inspection.checkpoint import is_checkpoint, read_checkpoint
from qcompiler.inspection.document import Document, NoteText, PassRun, PipelineFacts, read_document
from qcompiler.inspection.ledger import planned_ledger
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.printer import Printer
from qcompiler.lowering.predict import predict
from qcompiler.pipeline import Context, Pipeline, load_pipeline, print_pipeline
from qcompiler.pipeline.manager import planned, told_apart
from qcompiler.report import Report
from qcompiler.source import ModelSource
from qcompiler.targets import load_target

CAPTURE = "capture"
"""What stands in a pass's place for the graph before any pass."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is read; as for `plan`."""

    target: str | None = None
    dtype: str | torch.dtype = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    independent: bool = False


def read(
    model: str | Path, pipeline: PipelineLike | None = None, *, after: str | None = None, options: Options | None = None
) -> Document:
    """A document of whatever `model` is: a folder or hub id, a quantized checkpoint, or a JSON export.

    Raises a `QCompilerError` for what is none of them, and for a pipeline where nothing is left to be decided.
    """
    options, path = options or Options(), Path(model)
    if path.is_file():
        _refuse_pipeline(path, "an exported graph", pipeline, after, options)
        return _judged_already(read_document(path), path, options.target)
    if pipeline is None and not path.is_dir():
        path = resolve_model(str(model), revision=options.revision)  # what it is, its config says
    if is_checkpoint(path):
        _refuse_pipeline(path, "a quantized checkpoint", pipeline, after, options)
        return read_checkpoint(path, target=options.target, trust_remote_code=options.trust_remote_code)
    return read_plan(model, pipeline, after=after, options=options)


def _judged_already(document: Document, path: Path, target: str | None) -> Document:
    """An export, as long as it is judged for the target that is asked for."""
    if target not in (None, document.target):
        raise ConfigError(
            f"{path} is an exported graph, judged for {document.target or 'no target'}: {target} cannot judge it now",
            hint=f"leave --target out, or export the graph again with --target {target}",
        )
    return document


def _refuse_pipeline(path: Path, what: str, pipeline: PipelineLike | None, after: str | None, options: Options) -> None:
    if options.dtype != "auto":
        raise ConfigError(f"{path} is {what}: it has the dtype it was written in", hint="leave --dtype out")
    if pipeline is not None or after is not None:
        raise ConfigError(
            f"{path} is {what}: what became of it is decided, and no pipeline is run on it",
            hint="leave --pipeline and --after out, or give the dense model",
        )


def read_plan(
    model: str | Path, pipeline: PipelineLike | None, *, after: str | None = None, options: Options | None = None
) -> Document:
    """What a pipeline would make of a model, up to the pass `after` (default: the last before weights are needed).

    Without a pipeline, the model as captured. Raises a `QCompilerError` as `plan` does, for an unknown pass too.
    """
    (document,) = read_plans(model, pipeline, [after], options=options)
    return document


def read_plans(
    model: str | Path,
    pipeline: PipelineLike | None,
    afters: Sequence[str | None],
    *,
    options: Options | None = None,
) -> list[Document]:
    """The same at several points of a pipeline, in one run of it."""
    options = options or Options()
    whole = load_pipeline(pipeline) if pipeline is not None else Pipeline("no pipeline", ())
    names = _points(whole)
    points = [names[-1] if after is None else _point(after, names, whole) for after in afters]
    last = max(names.index(point) for point in points)
    found: dict[str, Document] = {}

    def visit(name: str, graph: Graph, context: Context) -> None:
        if name in points and name != names[-1]:
            found[name] = _document(graph, context, whole, name, options)

    to_the_end = last == len(names) - 1
    with survey(
        model,
        whole if to_the_end else _cut(whole, last),
        visit,
        target=options.target,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        independent=options.independent and to_the_end,
    ) as (context, graph, run):
        if to_the_end:  # what follows is prepared by now, and everything was reported
            found[names[-1]] = _document(graph, context, run, names[-1], options)
    return [found[point] for point in points]


def read_each(
    model: str | Path, pipelines: Sequence[PipelineLike], *, options: Options | None = None
) -> list[Document]:
    """What each pipeline would make of a model, as far as no weight is needed; the model is captured once."""
    options, chosen = options or Options(), [load_pipeline(pipeline) for pipeline in pipelines]
    with survey_each(
        model,
        chosen,
        target=options.target,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        independent=options.independent,
    ) as runs:
        return [
            _document(graph, context, run, _points(whole)[-1], options)
            for whole, (context, graph, run) in zip(chosen, runs, strict=True)
        ]


def read_graph(graph: Graph, *, name: str = "graph", target: str | None = None) -> Document:
    """A captured graph, whatever was done to it."""
    source = ModelSource(Path("no files"), graph.model.config, graph.model)
    context = Context(source, Report(model=name), target=target)
    return _document(graph, context, None, CAPTURE, Options(target=target))


def _document(graph: Graph, context: Context, pipeline: Pipeline | None, after: str, options: Options) -> Document:
    source, report = context.source, Report()
    notes = [NoteText(kind=note.kind, text=note.text) for note in context.report.notes]
    try:
        predict(graph, source, report)
        ledger = planned_ledger(graph, source, report.total_bytes)
        total, dense = report.total_bytes, report.dense_total_bytes
    except LegalityError as error:  # before legalize, schemes may be such as have no form
        report, ledger, total, dense = Report(), (), None, None
        notes.append(NoteText(kind="fallback", text=f"no bytes are predicted: {error.message}"))
    name = context.report.target or options.target
    verdicts, elsewhere = verdicts_of(graph, load_target(name), source.head_sizes) if name else ({}, [])
    notes += [NoteText(kind="warning", text=f"{found.message}; {found.mend}") for found in elsewhere]
    printer = Printer(graph)
    rows = {row.path: row for row in report.layers}
    if graph.stage is Stage.CAPTURED:
        for row in report.layers:
            row.because = ""  # no rule has been asked yet
    return Document(
        source="model" if pipeline is not None else "graph",
        model=model_facts(source.model, context.report.model, graph.layer_count),
        stage=str(graph.stage),
        pipeline=_pipeline_facts(pipeline, context.report, after) if pipeline is not None else None,
        target=name,
        kv_cache=graph.kv_cache.numbers.short if graph.kv_cache is not None else None,
        config_summary=context.report.config_summary,
        nodes=build_nodes(graph, source, printer, rows, verdicts),
        groups=build_groups(graph, printer),
        ledger=ledger,
        total_bytes=total,
        dense_bytes=dense,
        notes=tuple(notes),
    )


def _pipeline_facts(pipeline: Pipeline, report: Report, after: str) -> PipelineFacts | None:
    if not pipeline.passes:
        return None
    spent = iter([timing for timing in report.timings if timing.name != CAPTURE])
    runs = []
    stage = Stage.CAPTURED
    for name, item in zip(told_apart(pipeline), pipeline.flat(), strict=True):
        stage = item.ensures if item.ensures is not None else stage
        timing = next(spent, None)
        runs.append(PassRun(name=name, stage=str(stage), seconds=timing.seconds if timing else None))
    return PipelineFacts(name=pipeline.name, text=print_pipeline(pipeline), passes=tuple(runs), after=after)


def _cut(pipeline: Pipeline, count: int) -> Pipeline:
    """The first `count` passes of a pipeline."""
    return replace(pipeline, passes=tuple(item for item, _ in zip(pipeline.flat(), range(count), strict=False)))


def _point(after: str, names: Sequence[str], pipeline: Pipeline) -> str:
    """The pass that is meant, as it is told apart from others of its name. Raises `ConfigError` where none is."""
    if after in names:
        return after
    everything = list(_all_names(pipeline))
    if after in (item.name for item in pipeline.flat()) and after not in everything:
        several = [name for name in everything if name.rpartition(" ")[0] == after]
        raise ConfigError(
            f"pipeline {pipeline.name} runs {after} several times", hint=f"say which: {', '.join(map(repr, several))}"
        )
    if after in everything:
        raise ConfigError(
            f"{after} needs weights: what is inspected without compiling ends before it",
            hint=f"say {', '.join(names)}; or compile, and inspect the output",
        )
    raise ConfigError(
        f"pipeline {pipeline.name} has no pass {after!r}{did_you_mean(after, everything)}",
        hint=f"say one of {', '.join(names)}",
    )


def _points(pipeline: Pipeline) -> list[str]:
    """After what a pipeline can be looked at: the capture, and each pass that needs no weights."""
    return [CAPTURE, *(name for name, _ in zip(told_apart(pipeline), planned(pipeline), strict=False))]


def _all_names(pipeline: Pipeline) -> Iterator[str]:
    yield CAPTURE
    yield from told_apart(pipeline)
