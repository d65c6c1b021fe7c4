"""Read a compressed-tensors checkpoint into a document: its graph, what its headers hold, what its report measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qcompiler.emit.schema import QUANT_METHOD
from qcompiler.errors import QCompilerError
from qcompiler.inspection.build import build_groups, build_nodes, model_facts, verdicts_of
from qcompiler.inspection.document import Document, NoteText, PassRun, PipelineFacts, Work
from qcompiler.inspection.ledger import folder_bytes, stored_ledger
from qcompiler.ir.annotations import Leaf, LeafKind, Role, get_quant, need, scheme_of
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.printer import Printer
from qcompiler.lowering.evaluate import Lowered, disk_name, open_lowered
from qcompiler.lowering.sites import LISTED
from qcompiler.patterns.place import place_transforms
from qcompiler.pipeline import Context, GraphPass, Pipeline, parse_pipeline
from qcompiler.pipeline.manager import told_apart
from qcompiler.provenance import Provenance, WrittenRow, read_provenance
from qcompiler.report import LayerRow, Report
from qcompiler.source import ModelSource
from qcompiler.targets import load_target
from qcompiler.tensors import tensor_bytes


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder's config says that it is quantized as compressed-tensors."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads it as a model says what is wrong
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method", QUANT_METHOD) == QUANT_METHOD


def read_checkpoint(folder: Path, *, target: str | None = None, trust_remote_code: bool = False) -> Document:
    """A quantized checkpoint, ours or another tool's. Only headers are read, and no weight.

    Where qcompiler.json says how it was compiled, the rules of its pipeline are weighed again, and layers have the
    errors that were measured. Raises a `QCompilerError` where the folder is damaged, or its graph cannot be captured.
    """
    provenance = read_provenance(folder)
    notes: list[NoteText] = []
    pipeline = _pipeline_of(provenance, folder, notes)
    name = target or (provenance.report.target if provenance else None) or None

    def annotate(graph: Graph, source: ModelSource) -> None:
        if pipeline is not None:
            _decide_again(graph, source, pipeline, notes)

    with open_lowered(folder, trust_remote_code=trust_remote_code, annotate=annotate) as lowered:
        graph, source, reader = lowered.graph, lowered.source, lowered.reader
        written = {row.path: row for row in provenance.report.layers} if provenance else {}
        rows = {row.path: row for row in _rows(lowered, written, provenance)}
        verdicts, elsewhere = verdicts_of(graph, load_target(name), source.head_sizes) if name else ({}, [])
        notes += [NoteText(kind=note.kind, text=note.text) for note in provenance.report.notes] if provenance else []
        notes += [NoteText(kind="warning", text=f"{found.message}; {found.mend}") for found in elsewhere]
        notes += _changed(rows, written)
        printer = Printer(graph)
        dense = provenance.report.dense_total_bytes if provenance else None
        size = sum(p.numel() * source.dtype.itemsize for p in source.model.parameters())
        return Document(
            source="checkpoint",
            model=model_facts(source.model, str(folder), graph.layer_count),
            stage=str(graph.stage),
            pipeline=_facts(pipeline, provenance) if pipeline is not None and provenance is not None else None,
            target=name,
            kv_cache=graph.kv_cache.numbers.short if graph.kv_cache is not None else None,
            nodes=build_nodes(graph, source, printer, rows, verdicts),
            groups=build_groups(graph, printer),
            ledger=stored_ledger(graph, source, reader.stored, reader.schemes),
            total_bytes=reader.total_bytes,
            dense_bytes=dense if dense is not None else size,
            file_bytes=folder_bytes(folder),
            notes=tuple(notes),
        )


def _pipeline_of(provenance: Provenance | None, folder: Path, notes: list[NoteText]) -> Pipeline | None:
    if provenance is None or provenance.pipeline is None:
        return None
    try:
        return parse_pipeline(provenance.pipeline, where=f"{folder}: the pipeline in qcompiler.json")
    except QCompilerError as error:  # a pass that is not installed here
        notes.append(NoteText(kind="fallback", text=f"which rules lost is not known: {error.message}"))
        return None


def _decide_again(graph: Graph, source: ModelSource, pipeline: Pipeline, notes: list[NoteText]) -> None:
    """Run what decides on schemes once more. What the checkpoint holds overrules it."""
    context = Context(ModelSource(Path("no files"), source.config, source.model), Report())
    try:
        for context.running, item in zip(told_apart(pipeline), pipeline.flat(), strict=True):
            if isinstance(item, GraphPass) and item.ensures is Stage.ANNOTATED:
                item.run(graph, context)
        place_transforms(graph, context.report)
    except QCompilerError as error:
        notes.append(NoteText(kind="fallback", text=f"the rules could not be weighed again: {error.message}"))


def _rows(lowered: Lowered, written: dict[str, WrittenRow], provenance: Provenance | None) -> Iterator[LayerRow]:
    """A row for each listed leaf: bytes as they lie on disk, what was measured as the report has it."""
    seen: set[str] = set()
    seconds = provenance.timings.layers if provenance else {}
    for node, leaf in lowered.graph.leaves():
        if leaf.kind in (*LISTED, LeafKind.EXPERTS) and leaf.path not in seen:
            seen.add(leaf.path)
            yield _row(node, leaf, lowered, written.get(leaf.path), seconds.get(leaf.path))


def _row(node: Node, leaf: Leaf, lowered: Lowered, known: WrittenRow | None, seconds: float | None) -> LayerRow:
    source, scheme, quant, role = lowered.source, scheme_of(node), get_quant(node), need(node, Role)
    packed = lowered.reader.packed_bytes(disk_name(source, leaf.path)) if scheme is not None else 0
    module, names = source.model.get_submodule(leaf.path), source.names
    skipped = {*names.absent, *names.aliases, *([f"{leaf.path}.weight"] if scheme is not None else [])}
    own = [f"{leaf.path}.{n}" for n, _ in module.named_parameters(recurse=leaf.kind is not LeafKind.BARE_LINEAR)]
    weights = leaf.out_features * leaf.in_features or leaf.parameters
    if known is not None and known.scheme != (scheme.short if scheme is not None else None):
        known, seconds = None, None  # it tells of another weight
    solver = known.solver if known else quant.solver if quant and scheme is not None else None
    row = LayerRow(
        path=leaf.path,
        kind=str(leaf.kind),
        structure=str(role.structure) if role.structure else None,
        layer=role.layer,
        shape=(leaf.out_features, leaf.in_features),
        scheme=scheme.short if scheme is not None else None,
        format=str(scheme.format) if scheme is not None else None,
        solver=solver,
        because=known.because if known else ", ".join(quant.because) if quant else "it is stored dense",
        bytes=packed + sum(tensor_bytes(*names.spec(path)) for path in own if path not in skipped),
        dense_bytes=leaf.parameters * source.dtype.itemsize,
        bits_per_weight=8 * packed / weights if scheme is not None else 8 * source.dtype.itemsize,
        seconds=seconds,
    )
    if known is not None:
        for field in ("error", "output_error", "nearest_output_error", "damping", "dead_columns", "ratio"):
            setattr(row, field, getattr(known, field))
        row.transform, row.transform_gain = known.transform, known.transform_gain
    return row


def _changed(rows: dict[str, LayerRow], written: dict[str, WrittenRow]) -> Iterator[NoteText]:
    """What the report says otherwise than the checkpoint."""
    differing: dict[tuple[str, str], list[str]] = {}
    for path, row in rows.items():
        if path in written and written[path].scheme != row.scheme:
            differing.setdefault((written[path].scheme or "dense", row.scheme or "dense"), []).append(path)
    for (said, held), paths in differing.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        text = f"{paths[0]}{more}: qcompiler.json says {said}, config.json {held}: measured errors are not of this"
        yield NoteText(
            kind="warning", text=f"{text}; `qcompiler check` says whether the tensors are what config.json says"
        )


def _facts(pipeline: Pipeline, provenance: Provenance) -> PipelineFacts:
    runs, stage = [], Stage.CAPTURED
    for name, item in zip(told_apart(pipeline), pipeline.flat(), strict=True):
        stage = item.ensures if item.ensures is not None else stage
        runs.append(PassRun(name=name, stage=str(stage), seconds=provenance.timings.passes.get(item.name)))
    known = {"capture", *(item.name for item in pipeline.flat())}
    shared = [Work(what=what, seconds=spent) for what, spent in provenance.timings.passes.items() if what not in known]
    return PipelineFacts(
        name=pipeline.name,
        text=provenance.pipeline or "",
        passes=tuple(runs),
        streaming=tuple(shared),
        after=runs[-1].name,
    )
