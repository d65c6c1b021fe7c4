"""The compile API: plan a compilation, or run it."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from types import NoneType
from typing import TypeAlias

import torch
from transformers import PreTrainedModel

from qcompiler.arguments import check_callable, check_type
from qcompiler.calibration import CalibrationData, CalibrationLike
from qcompiler.capture import capture_and_prove
from qcompiler.checkpoints.names import NameMap
from qcompiler.checkpoints.output import check_apart, check_output
from qcompiler.collector import collector_paused
from qcompiler.data import CalibrationSpec
from qcompiler.errors import ConfigError
from qcompiler.ir.graph import Graph, Stage
from qcompiler.lowering.predict import predict
from qcompiler.lowering.ties import tell_ties
from qcompiler.patterns.nearest import unplaced
from qcompiler.pipeline import Context, Pass, Pipeline, load_pipeline, print_pipeline
from qcompiler.pipeline.base import Destination
from qcompiler.pipeline.independent import independent_runs, independent_runs_of
from qcompiler.pipeline.manager import (
    Printer,
    check_order,
    prepare_streaming_passes,
    run_graph_passes,
    run_streaming_passes,
)
from qcompiler.pipeline.registry import providers
from qcompiler.report import Report, Timing
from qcompiler.runtime.memory import returning_memory, trim_memory
from qcompiler.source import ModelSource, TokenizerLike, open_model
from qcompiler.targets import load_target

ModelLike: TypeAlias = str | Path | PreTrainedModel
PipelineLike = str | Path | Pipeline | Sequence[Pass | Pipeline]
Progress = Callable[[str, int, int], None]
Visitor = Callable[[str, Graph, Context], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a compilation would do: the legal, annotated graph, and the report with every byte predicted."""

    graph: Graph
    report: Report
    pipeline: Pipeline


@dataclass(frozen=True, slots=True)
class Result:
    """What a compilation did. `graph` is lowered; `report` has an error for every quantized layer."""

    graph: Graph
    plan: Plan
    report: Report
    output: Path


@dataclass(frozen=True, slots=True)
class _Request:
    """What `plan` and `compile` have in common, as it was asked for."""

    model: ModelLike
    pipeline: Pipeline
    tokenizer: TokenizerLike | None
    target: str | None
    dtype: str | torch.dtype
    revision: str | None
    trust_remote_code: bool
    independent: bool
    show: Printer | None
    progress: Progress

    def __post_init__(self) -> None:
        for name in ("target", "revision"):
            check_type(name, getattr(self, name), (str, NoneType), "text, or None")
        for name in ("trust_remote_code", "independent"):
            check_type(name, getattr(self, name), bool, "True or False")
        check_callable("show", self.show)
        check_callable("progress", self.progress)


def plan(
    model: ModelLike,
    pipeline: PipelineLike,
    *,
    target: str | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    independent: bool = False,
    show: Printer | None = None,
) -> Plan:
    """Capture, annotate and legalize, and predict every tensor. Nothing is calibrated and no weight is read.

    model: folder, hub id or loaded model. pipeline: packaged name, YAML file or passes. target: as `legalize` takes
    it. independent: give each algorithm that solves a linear a run of its own over the data. show: called with each
    pass's name and the graph after it. Raises a `QCompilerError` for whatever would fail later.
    """
    chosen = load_pipeline(pipeline)
    request = _Request(model, chosen, None, target, dtype, revision, trust_remote_code, independent, show, _silent)
    with _planned(request, _unseen) as (context, graph, chosen):
        return Plan(graph, context.report, chosen)


@contextmanager
def survey(
    model: ModelLike,
    pipeline: PipelineLike,
    visit: Visitor,
    *,
    target: str | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    independent: bool = False,
) -> Iterator[tuple[Context, Graph, Pipeline]]:
    """Plan, with the model open in the block: the context in which it was planned, its graph, the pipeline that is run.

    visit: called after the capture and after each pass, with its name (numbered where it comes twice), the graph and
    the context. All else is as for `plan`.
    """
    chosen = load_pipeline(pipeline)
    request = _Request(model, chosen, None, target, dtype, revision, trust_remote_code, independent, None, _silent)
    with _planned(request, visit) as planned:
        yield planned


@contextmanager
def survey_each(
    model: ModelLike,
    pipelines: Sequence[PipelineLike],
    *,
    target: str | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    independent: bool = False,
) -> Iterator[Iterator[tuple[Context, Graph, Pipeline]]]:
    """What `survey` gives for each of several pipelines, one after the other, the model captured once."""
    requests = [
        _Request(
            *(model, load_pipeline(pipeline), None, target, dtype, revision, trust_remote_code),
            *(independent, None, _silent),
        )
        for pipeline in pipelines
    ]
    for request in requests:
        _check(request)
    with _open(requests[0], reads_weights=False) as source:
        if source.has_weights:
            source.check_weights()
        captured = _capture(requests[0], source)
        yield (_prepare(request, source, replace(captured, graph=captured.graph.copy())) for request in requests)


@contextmanager
def _planned(request: _Request, visit: Visitor) -> Iterator[tuple[Context, Graph, Pipeline]]:
    with _open(request, reads_weights=False) as source:
        if source.has_weights:
            source.check_weights()
        yield _prepare(request, source, _capture(request, source), visit)


def compile(
    model: ModelLike,
    *,
    pipeline: PipelineLike,
    output: str | Path,
    calibration: CalibrationLike | None = None,
    sampling: CalibrationSpec | None = None,
    tokenizer: TokenizerLike | None = None,
    target: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    independent: bool = False,
    show: Printer | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compile a model to a compressed-tensors checkpoint in `output`.

    model, pipeline, target, independent, show: as for `plan`. calibration: a dataset (path or hub id), a
    `CalibrationSpec` that names one, or rows (strings, chats, token ids); needed only by pipelines that measure
    activations. sampling: how many samples are taken of such rows, how long, in which order (a `CalibrationSpec`
    without a dataset). tokenizer: of a loaded model, which brings none. device: where partitions are run and solved.
    progress: called with what is done, how far, of how much.
    Raises a `QCompilerError`, after which `output` is what it was before.
    """
    check_type("output", output, (str, Path), "a path")
    check_type("overwrite", overwrite, bool, "True or False")
    destination = Destination(Path(output), overwrite)
    if isinstance(model, (str, Path)) and ((given := Path(model).expanduser()) / "config.json").is_file():
        check_apart(destination.folder, given)  # before anything that would advise to delete the output
    check_output(destination.folder, overwrite=overwrite)
    where = _device(device)
    data = CalibrationData(calibration, sampling, where)
    chosen = load_pipeline(pipeline)
    if not any(item.ensures is Stage.LOWERED for item in chosen.flat()):
        raise ConfigError(f"pipeline {chosen.name} writes nothing: it has no `lower`", hint="put `- lower` at its end")
    progress = progress or _silent
    request = _Request(
        model, chosen, tokenizer, target, dtype, revision, trust_remote_code, independent, show, progress
    )
    with returning_memory(), _open(request, reads_weights=True) as source:
        check_apart(destination.folder, source.folder)
        source.check_weights()
        data.read_ahead(chosen, source)
        context, graph, chosen = _prepare(request, source, _capture(request, source))
        planned = Plan(graph, copy.deepcopy(context.report), chosen)
        context.output, context.device, context.progress = destination, where, progress
        context.provenance |= context.source.identity()
        data.hand_out(graph, chosen, context)
        run_streaming_passes(graph, chosen, context, show=show)
    return Result(graph, planned, context.report, destination.folder)


def _silent(what: str, done: int, total: int) -> None:
    return None


def _unseen(name: str, graph: Graph, context: Context) -> None:
    return None


def _open(request: _Request, *, reads_weights: bool) -> ModelSource:
    """The model, once the request is sound in itself: a model may have to be downloaded."""
    _check(request)
    return open_model(
        request.model,
        tokenizer=request.tokenizer,
        revision=request.revision,
        trust_remote_code=request.trust_remote_code,
        dtype=request.dtype,
        reads_weights=reads_weights,
    )


def _check(request: _Request) -> None:
    check_order(independent_runs(request.pipeline) if request.independent else request.pipeline)
    if request.target is not None:
        load_target(request.target)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A captured graph, what is to be said of it, and how long that took."""

    graph: Graph
    notes: Sequence[str]
    seconds: float


def _capture(request: _Request, source: ModelSource) -> _Captured:
    request.progress("capture", 0, 0)
    start = perf_counter()
    graph, notes = capture_and_prove(source.model, trust_remote_code=request.trust_remote_code)
    trim_memory()
    return _Captured(graph, notes, perf_counter() - start)


@collector_paused()
def _prepare(
    request: _Request, source: ModelSource, captured: _Captured, visit: Visitor = _unseen
) -> tuple[Context, Graph, Pipeline]:
    """Everything that needs no weight; with the pipeline as it is to run."""
    graph = captured.graph
    name = str(request.model) if isinstance(request.model, (str, Path)) else f"loaded {type(request.model).__name__}"
    report = Report(model=name, pipeline=request.pipeline.name)
    report.timings.append(Timing("capture", captured.seconds))
    for note in (*captured.notes, *unplaced(graph)):
        report.info(note)
    context = Context(source, report, target=request.target)
    visit("capture", graph, context)

    def show(name: str, graph: Graph) -> None:
        if request.show is not None:
            request.show(name, graph)
        visit(context.running, graph, context)

    pipeline = request.pipeline
    run_graph_passes(graph, pipeline, context, show=show)
    if request.independent:
        pipeline = independent_runs_of(graph, pipeline, report)
    prepare_streaming_passes(graph, pipeline, context)
    if request.target is not None and not report.target:
        lacks = f"pipeline {report.pipeline} has no legalize" if pipeline.passes else "without a pipeline, no schemes"
        report.fallback(f"nothing was checked against target {request.target}: {lacks}")
    predict(graph, source, report)
    if source.has_weights:
        _tell_of_keys(source.names, report)
    tell_ties(graph, source, report)
    context.provenance = {
        "model": name,
        "dtype": str(source.dtype).removeprefix("torch."),
        "pipeline": print_pipeline(pipeline),
        "target": report.target,
        "versions": _versions(pipeline),
    }
    return context, graph, pipeline


def _tell_of_keys(names: NameMap, report: Report) -> None:
    """Warn of what the checkpoint holds and is not compiled."""
    if names.unexpected:
        shown = ", ".join(names.unexpected[:3]) + (", ..." if names.unexpected[3:] else "")
        report.warning(
            f"left out, as the model that config.json describes has no place for them: tensors of the checkpoint "
            f"({len(names.unexpected)}): {shown}"
        )


def _device(name: str | torch.device) -> torch.device:
    check_type("device", name, (str, torch.device), "cpu, cuda, cuda:1, or a torch.device")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on with what it can dispatch to
        raise ConfigError(f"device {str(name)!r} cannot be used: {reason}", hint="cpu, cuda, cuda:1") from error
    if device.type == "meta":
        raise ConfigError("device 'meta' computes nothing", hint="cpu, cuda, cuda:1")
    return device


def _versions(pipeline: Pipeline) -> dict[str, str]:
    """Of what decides about the bytes that are written: the libraries, and the packages that bring passes."""
    found = {"python": platform.python_version()}
    for package in ("qcompiler", "torch", "transformers", "compressed-tensors", "safetensors", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "unknown"
    return found | providers(type(item) for item in pipeline.flat())
