"""The calibration data of one compilation: what is asked for, read once, and handed to the runs that measure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from qcompiler.arguments import check_rows, check_type
from qcompiler.data import CalibrationSpec, TokenData, load_calibration
from qcompiler.data.spec import CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS
from qcompiler.errors import ConfigError, DataError
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import observe
from qcompiler.pipeline import Context, Pipeline, StreamingPass
from qcompiler.pipeline.manager import sweeps
from qcompiler.source import ModelSource

CalibrationLike = str | Path | CalibrationSpec | Iterable[Any]


class CalibrationData:
    """What a compilation is given to calibrate with, beside what runs bring themselves."""

    def __init__(
        self, calibration: CalibrationLike | None, sampling: CalibrationSpec | None, device: torch.device
    ) -> None:
        spec, self._rows = _sampled(calibration, sampling)
        self._device = device
        self._spec = self._batched(spec)
        self._read: dict[tuple[CalibrationSpec, bool], TokenData] = {}

    def read_ahead(self, pipeline: Pipeline, source: ModelSource) -> None:
        """Read what the pipeline may need, while the model is not captured yet: bad data is told at once.

        Where rules turn out to match nothing that needs data, it was read in vain. Raises `DataError`.
        """
        if not any(item.may_measure() for item in pipeline.flat()):
            return
        for spec in map(self._own, sweeps(pipeline)):
            if spec is not None:
                self._tokens(spec, None, source)
            elif self._spec is not None:
                self._tokens(self._spec, self._rows, source)

    def hand_out(self, graph: Graph, pipeline: Pipeline, context: Context) -> None:
        """Give the context the data of every run that measures something in the graph.

        Raises `DataError` where there is none, or where its sequences are longer than the graph is the model's.
        """
        report = context.report
        runs: dict[int, CalibrationSpec | None] = {}
        for run, items in enumerate(sweeps(pipeline), 1):
            own = self._own(items)
            if any(item.measures(graph, run) for item in items):
                runs[run] = own
            elif own is not None:
                report.info(f"the calibration data of run {run} was not needed: it measures no activations")
        if not runs or not any(node.target is observe for node in graph.nodes):
            if self._spec is not None:
                report.info("the calibration data was not needed: nothing in this pipeline measures activations")
            return
        used: dict[str, object] = {}
        for run, spec in runs.items():
            if spec is not None:
                context.own_data[run] = self._tokens(spec, None, context.source)
                used[f"run {run}"] = _use(spec, context.own_data[run], graph, context, f"calibration of run {run}")
        if all(spec is not None for spec in runs.values()):
            if self._spec is not None:
                report.info("the calibration data was not needed: every run that measures something names its own")
        elif self._spec is None:
            raise DataError(
                "this pipeline measures activations, and no calibration data was given",
                hint="pass --dataset (Python: calibration=), or use schemes whose activations are dynamic",
            )
        else:
            context.data = self._tokens(self._spec, self._rows, context.source)
            used |= _use(self._spec, context.data, graph, context, "calibration")
        context.provenance["calibration"] = used

    def _tokens(self, spec: CalibrationSpec, rows: Iterable[Any] | None, source: ModelSource) -> TokenData:
        key = spec, rows is not None
        if key not in self._read:
            self._read[key] = load_calibration(
                spec,
                source.folder,
                vocab_size=int(source.config.vocab_size),
                max_window=source.window,
                rows=rows,
                trust_remote_code=source.trust_remote_code,
            )
        return self._read[key]

    def _own(self, items: list[StreamingPass]) -> CalibrationSpec | None:
        """The data that a sweep of these passes brings itself."""
        return self._batched(next((spec for item in items if (spec := item.calibration_data())), None))

    def _batched(self, spec: CalibrationSpec | None) -> CalibrationSpec | None:
        if spec is None or spec.batch_tokens is not None:
            return spec
        tokens = CPU_BATCH_TOKENS if self._device.type == "cpu" else DEVICE_BATCH_TOKENS
        return spec.model_copy(update={"batch_tokens": tokens})


def _use(spec: CalibrationSpec, data: TokenData, graph: Graph, context: Context, what: str) -> dict[str, object]:
    """Tell of data that is used; what is to be remembered of it."""
    window = graph.max_sequence_length
    if window is not None and data.longest > window:
        raise DataError(
            f"a calibration sequence of {data.longest} tokens: beyond {window} the captured graph is not the "
            "model, whose rotary embedding or attention depends on the length",
            hint=f"use --sequence-length {window} or less",
        )
    for note in data.notes:
        context.report.info(f"{what}: {note}")
    said = {"sequences": data.sequences, "tokens": data.tokens, "fingerprint": data.fingerprint}
    return {**spec.model_dump(mode="json"), **said}


def _sampled(
    calibration: CalibrationLike | None, sampling: CalibrationSpec | None
) -> tuple[CalibrationSpec | None, Iterable[Any] | None]:
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
        return None, None
    spec = sampling or CalibrationSpec()
    if isinstance(calibration, (str, Path)):
        return spec.model_copy(update={"dataset": calibration}), None
    check_rows("calibration", calibration, "a path, a hub id, a CalibrationSpec, or rows")
    return spec, calibration
