"""The compile API: plan a compilation, or run it."""

from __future__ import annotations

import copy
import gc
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from types import NoneType
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from qcompiler.arguments import check_callable, check_rows, check_type
from qcompiler.capture import capture_and_prove
from qcompiler.checkpoints.names import NameMap
from qcompiler.checkpoints.output import check_apart, check_output
from qcompiler.data import CalibrationSpec, TokenData, load_calibration
from qcompiler.errors import ConfigError, DataError
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import observe
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
    sweeps,
)
from qcompiler.pipeline.registry import providers
from qcompiler.report import Report, Timing
from qcompiler.runtime.memory import trim_memory
from qcompiler.source import ModelSource, TokenizerLike, open_model
from qcompiler.targets import load_target

ModelLike: TypeAlias = str | Path | PreTrainedModel
PipelineLike = str | Path | Pipeline | Sequence[Pass | Pipeline]
CalibrationLike = str | Path | CalibrationSpec | Iterable[Any]
Progress = Callable[[str, int, int], None]
Visitor = Callable[[str, Graph, Context], None]
_Sampled: TypeAlias = tuple[CalibrationSpec, Iterable[Any] | None]


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
def _planned(request: _Request, visit: Visitor) -> Iterator[tuple[Context, Graph, Pipeline]]:
    with _open(request, reads_weights=False) as source:
        if source.has_weights:
            source.check_weights()
        yield _prepare(request, source, visit)


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
    sampled = _sampled(calibration, sampling)
    chosen = load_pipeline(pipeline)
    if not any(item.ensures is Stage.LOWERED for item in chosen.flat()):
        raise ConfigError(f"pipeline {chosen.name} writes nothing: it has no `lower`", hint="put `- lower` at its end")
    progress = progress or _silent
    request = _Request(
        model, chosen, tokenizer, target, dtype, revision, trust_remote_code, independent, show, progress
    )
    with _open(request, reads_weights=True) as source:
        check_apart(destination.folder, source.folder)
        source.check_weights()
        context, graph, chosen = _prepare(request, source)
        planned = Plan(graph, copy.deepcopy(context.report), chosen)
        context.output, context.device, context.progress = destination, where, progress
        gc.collect()  # tracing leaves cycles behind
        trim_memory()
        context.provenance |= context.source.identity()
        _load_data(sampled, chosen, graph, context)
        run_streaming_passes(graph, chosen, context, show=show)
    return Result(graph, planned, context.report, destination.folder)


def _silent(what: str, done: int, total: int) -> None:
    return None


def _unseen(name: str, graph: Graph, context: Context) -> None:
    return None


def _open(request: _Request, *, reads_weights: bool) -> ModelSource:
    """The model, once the request is sound in itself: a model may have to be downloaded."""
    check_order(independent_runs(request.pipeline) if request.independent else request.pipeline)
    if request.target is not None:
        load_target(request.target)
    return open_model(
        request.model,
        tokenizer=request.tokenizer,
        revision=request.revision,
        trust_remote_code=request.trust_remote_code,
        dtype=request.dtype,
        reads_weights=reads_weights,
    )


def _prepare(request: _Request, source: ModelSource, visit: Visitor = _unseen) -> tuple[Context, Graph, Pipeline]:
    """Everything that needs no weight; with the pipeline as it is to run."""
    name = str(request.model) if isinstance(request.model, (str, Path)) else f"loaded {type(request.model).__name__}"
    report = Report(model=name, pipeline=request.pipeline.name)
    request.progress("capture", 0, 0)
    start = perf_counter()
    graph, notes = capture_and_prove(source.model, trust_remote_code=request.trust_remote_code)
    report.timings.append(Timing("capture", perf_counter() - start))
    for note in (*notes, *unplaced(graph)):
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
        report.fallback(
            f"nothing was checked against target {request.target}: pipeline {report.pipeline} has no legalize"
        )
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


def _load_data(sampled: _Sampled | None, pipeline: Pipeline, graph: Graph, context: Context) -> None:
    """Load calibration data where something in the graph measures it, before anything is written or computed."""
    runs: dict[int, CalibrationSpec | None] = {}
    for run, items in enumerate(sweeps(pipeline), 1):
        own = next((spec for item in items if (spec := item.calibration_data())), None)
        if any(item.measures(graph, run) for item in items):
            runs[run] = own
        elif own is not None:
            context.report.info(f"the calibration data of run {run} was not read: it measures no activations")
    if not runs or not any(node.target is observe for node in graph.nodes):
        if sampled is not None:
            context.report.info("the calibration data was not read: nothing in this pipeline measures activations")
        return
    used: dict[str, object] = {}
    for run, spec in runs.items():
        if spec is not None:
            context.own_data[run], used[f"run {run}"] = _loaded(spec, None, graph, context, f"calibration of run {run}")
    if all(spec is not None for spec in runs.values()):
        if sampled is not None:
            context.report.info("the calibration data was not read: every run that measures something names its own")
    elif sampled is None:
        raise DataError(
            "this pipeline measures activations, and no calibration data was given",
            hint="pass --dataset (Python: calibration=), or use schemes whose activations are dynamic",
        )
    else:
        context.data, given = _loaded(*sampled, graph, context, "calibration")
        used |= given
    context.provenance["calibration"] = used


def _loaded(
    spec: CalibrationSpec, rows: Iterable[Any] | None, graph: Graph, context: Context, what: str
) -> tuple[TokenData, dict[str, object]]:
    """The tokens of a dataset, and what is to be remembered of them."""
    data = _tokens(spec, rows, graph, context.source)
    for note in data.notes:
        context.report.info(f"{what}: {note}")
    said = {"sequences": data.sequences, "tokens": data.tokens, "fingerprint": data.fingerprint}
    return data, {**spec.model_dump(mode="json"), **said}


def _sampled(calibration: CalibrationLike | None, sampling: CalibrationSpec | None) -> _Sampled | None:
    """What to calibrate with, and the rows to take it from where they were handed over; None where nothing is given."""
    check_type("sampling", sampling, (CalibrationSpec, NoneType), "a CalibrationSpec: CalibrationSpec(samples=128)")
    if isinstance(calibration, CalibrationSpec):
        if sampling is not None:
            raise ConfigError(
                "calibration= is a whole CalibrationSpec, and sampling= is another",
                hint="say in one of them how to sample",
            )
        return calibration, None
    if sampling is not None and sampling.dataset is not None:
        raise ConfigError(
            f"sampling= says how to sample what calibration= gives, but it names a dataset: {sampling.dataset}",
            hint="give the whole CalibrationSpec as calibration=",
        )
    if calibration is None:
        return None
    spec = sampling or CalibrationSpec()
    if isinstance(calibration, (str, Path)):
        return spec.model_copy(update={"dataset": calibration}), None
    check_rows("calibration", calibration, "a path, a hub id, a CalibrationSpec, or rows")
    return spec, calibration


def _tokens(spec: CalibrationSpec, rows: Iterable[Any] | None, graph: Graph, source: ModelSource) -> TokenData:
    data = load_calibration(
        spec,
        source.folder,
        vocab_size=int(source.config.vocab_size),
        max_window=source.window,
        rows=rows,
        trust_remote_code=source.trust_remote_code,
    )
    window = graph.max_sequence_length
    if window is not None and data.longest > window:
        raise DataError(
            f"a calibration sequence of {data.longest} tokens: beyond {window} the captured graph is not the "
            "model, whose rotary embedding or attention depends on the length",
            hint=f"use --sequence-length {window} or less",
        )
    return data


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
