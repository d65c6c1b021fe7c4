"""The compile API: plan a compilation, or run it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qcompiler.capture import capture_graph
from qcompiler.capture.compare import compare_with_eager
from qcompiler.data import CalibrationSpec, TokenData, load_calibration
from qcompiler.errors import CheckpointError, ConfigError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.predict import predict
from qcompiler.pipeline import Context, Pass, Pipeline, load_pipeline, print_pipeline
from qcompiler.pipeline.base import Destination
from qcompiler.pipeline.manager import Printer, check_order, run_graph_passes, run_streaming_passes
from qcompiler.report import Report, Timing
from qcompiler.source import ModelSource, open_model


@dataclass(frozen=True, slots=True)
class Plan:
    """What a compilation would do: the legal, annotated graph and the report with every byte predicted."""

    graph: Graph
    report: Report
    pipeline: Pipeline
    source: ModelSource


@dataclass(frozen=True, slots=True)
class Result:
    """What a compilation did. `graph` is lowered; `report` has an error for every quantized layer."""

    graph: Graph
    plan: Plan
    report: Report
    output: Path


Progress = Callable[[str, int, int], None]
PipelineLike = str | Path | Pipeline | list[Pass]


def plan(
    model: str | Path,
    pipeline: PipelineLike,
    *,
    target: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    show: Printer | None = None,
) -> Plan:
    """Capture, annotate and legalize, and predict every tensor. Nothing is calibrated and no weight is read.

    model: folder or hub id. pipeline: packaged name, YAML file or passes. target: as `legalize` takes it.
    Raises a `QCompilerError` for whatever would fail later.
    """
    context, graph, chosen = _prepare(model, pipeline, target, dtype, revision, trust_remote_code, show)
    return Plan(graph, context.report, chosen, context.source)


def compile(
    model: str | Path,
    *,
    pipeline: PipelineLike,
    output: str | Path,
    calibration: CalibrationSpec | str | Path | Iterable[Any] | None = None,
    target: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    show: Printer | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compile a model to a compressed-tensors checkpoint in `output`.

    model, pipeline, target: as for `plan`. calibration: a dataset (path or hub id), a `CalibrationSpec`, or rows (strings,
    chats, token ids); needed only by pipelines that measure activations. device: where partitions are run and solved.
    Raises a `QCompilerError`, after which `output` is what it was before.
    """
    destination = Destination(Path(output), overwrite)
    if destination.folder.exists() and not overwrite:
        raise CheckpointError(f"{output} exists", hint="choose another folder, or pass --overwrite (overwrite=True)")
    where = _device(device)
    context, graph, chosen = _prepare(model, pipeline, target, dtype, revision, trust_remote_code, show)
    planned = Plan(graph, context.report, chosen, context.source)
    context.output = destination
    context.device = where
    context.data = _data(calibration, context)
    if progress is not None:
        context.progress = progress
    if not any(item.name == "lower" for item in chosen.flat()):
        raise ConfigError(f"pipeline {chosen.name} writes nothing: it has no `lower`")
    try:
        run_streaming_passes(graph, chosen, context, show=show)
    finally:
        context.source.close()
    return Result(graph, planned, context.report, destination.folder)


def _prepare(
    model: str | Path,
    pipeline: PipelineLike,
    target: str | None,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    show: Printer | None,
) -> tuple[Context, Graph, Pipeline]:
    from time import perf_counter

    chosen = load_pipeline(pipeline)
    check_order(chosen)
    source = open_model(model, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype)
    report = Report(model=str(model), pipeline=chosen.name)
    start = perf_counter()
    graph = capture_graph(source.model)
    report.timings.append(Timing("capture", perf_counter() - start))
    start = perf_counter()
    compare_with_eager(graph, trust_remote_code=trust_remote_code)
    report.timings.append(Timing("compare with eager", perf_counter() - start))
    context = Context(source, report, target=target)
    context.provenance = {
        "model": str(model),
        "pipeline": print_pipeline(chosen),
        "versions": _versions(),
    }
    run_graph_passes(graph, chosen, context, show=show)
    predict(graph, source, report)
    return context, graph, chosen


def _data(calibration: CalibrationSpec | str | Path | Iterable[Any] | None, context: Context) -> Any:
    """Load calibration data once, when the first sweep asks for it."""
    if calibration is None:
        return None
    if isinstance(calibration, (str, Path)):
        calibration = CalibrationSpec(dataset=calibration)
    spec = calibration if isinstance(calibration, CalibrationSpec) else CalibrationSpec()
    rows = None if isinstance(calibration, CalibrationSpec) else calibration
    source = context.source

    @cache
    def load() -> TokenData:
        data = load_calibration(
            spec, source.folder, vocab_size=source.config.vocab_size, max_window=source.window, rows=rows
        )
        for note in data.notes:
            context.report.info(f"calibration: {note}")
        context.provenance["calibration"] = {
            **spec.model_dump(mode="json"),
            "sequences": data.sequences,
            "tokens": data.tokens,
            "fingerprint": data.fingerprint,
        }
        return data

    return load


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}", hint="cpu, cuda, cuda:1") from error
    return device


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("qcompiler", "torch", "transformers", "compressed-tensors", "safetensors", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "unknown"
    return found
