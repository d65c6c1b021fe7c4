"""The table of layers in `qcompiler.json`, against the checkpoint that it describes and the model it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qcompiler.checkpoints.output import PROVENANCE
from qcompiler.errors import CheckpointError, DataError, VerificationError
from qcompiler.lowering.evaluate import Lowered
from qcompiler.numerics import weight_error
from qcompiler.provenance import Provenance, WrittenRow
from qcompiler.source import ModelSource

ERROR_TOLERANCE = 1e-6
"""How far a relative weight error, computed anew, may be from the table's, as a share of it.

Codes and scales on disk are those that the error was computed from, and its terms are float32 products and differences
that every device rounds alike. Only the order of their sums is free, over one row in float32 (off by less than 1e-7),
over rows in float64.
"""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class WeightComparison:
    """A checkpoint's weights against the dense model's.

    layers: quantized layers whose weight error is the table's. tensors: dense ones that are equal to the last bit.
    rescaled: weights that were not compared, because a transform folded a scale into them.
    """

    layers: int
    tensors: int
    rescaled: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = (
            f"{self.layers} layers with the weight errors of the table (within {ERROR_TOLERANCE:.0e} of each), "
            f"{self.tensors} dense tensors equal to the last bit"
        )
        left = f"; not compared, as a transform rescaled them: {_listed(self.rescaled)}" if self.rescaled else ""
        return said + left


def check_table(lowered: Lowered, provenance: Provenance) -> None:
    """Compare the table's schemes, formats and bytes with what is stored; no tensor is read.

    Raises `VerificationError` that names the layers.
    """
    reader, source, quantized = lowered.reader, lowered.source, lowered.quantized()
    state = source.model.state_dict().keys()
    rows = {row.path: row for row in provenance.report.layers if row.scheme is not None}
    wrong = [f"{path} is quantized, and has no row" for path in quantized.keys() - rows.keys()]
    wrong += [f"{path} has a row, and is not quantized" for path in rows.keys() - quantized.keys()]
    for path in sorted(rows.keys() & quantized.keys()):
        scheme, row = reader.schemes[quantized[path]], rows[path]
        stored = reader.packed_bytes(quantized[path])
        if f"{path}.bias" in state:
            stored += sum(meta.nbytes for meta in source.names.sources(f"{path}.bias"))
        found = (scheme.short, str(scheme.format), stored)
        if found != (row.scheme, row.format, row.bytes):
            wrong.append(
                f"{path} is {found[0]} ({found[1]}, {found[2]} bytes), and its row says {row.scheme} ({row.format}, "
                f"{row.bytes} bytes)"
            )
    if provenance.report.total_bytes != reader.total_bytes:
        wrong.append(f"tensors take {reader.total_bytes} bytes, and the table says {provenance.report.total_bytes}")
    if wrong:
        raise VerificationError(
            f"{source.folder}: the table in {PROVENANCE} is not that of this checkpoint: {_listed(sorted(wrong))}",
            hint=f"{PROVENANCE} and weights are of different compilations: copy both again, or compile again",
        )


def compare_weights(lowered: Lowered, reference: ModelSource, provenance: Provenance) -> WeightComparison:
    """Compute the weight error of every layer anew, and compare it with the table; dense tensors must be equal.

    One layer's two weights are in memory at a time. reference: the dense model, in the checkpoint's dtype.
    Raises `VerificationError` that names what differs, or `DataError` where the reference is another model.
    """
    _check_shapes(lowered, reference)
    report, quantized = provenance.report, lowered.quantized()
    # What is quantized has a row: `check_table` came first.
    rows = [row for row in report.layers if row.path in quantized and f"{row.path}.weight" not in report.rescaled]
    differing = (_error_differs(lowered, quantized[row.path], reference, row) for row in rows)
    wrong = [why for why in differing if why is not None]
    tensors = [path for path in _dense_paths(lowered) if path not in report.rescaled]
    wrong += [f"{path} is dense, and differs" for path in tensors if not _equal(lowered.source, reference, path)]
    if not wrong:
        return WeightComparison(len(rows), len(tensors), tuple(sorted(report.rescaled)))
    message = f"{len(wrong)} of {len(rows) + len(tensors)} weights are not those of {reference.folder}"
    if reference.identity()["weights"] != provenance.weights:
        raise DataError(
            f"{message}, which has another fingerprint than the model that was compiled: {_listed(wrong)}",
            hint="give the model that the checkpoint was compiled from",
        )
    raise VerificationError(
        f"{lowered.source.folder}: {message}, which was compiled: {_listed(wrong)}",
        hint=f"the checkpoint or its {PROVENANCE} was changed after it was compiled: do not deploy it",
    )


def _check_shapes(lowered: Lowered, reference: ModelSource) -> None:
    ours, theirs = (source.model.state_dict() for source in (lowered.source, reference))
    differing = [path for path in ours if path not in theirs or theirs[path].shape != ours[path].shape]
    if differing:
        raise DataError(
            f"reference {reference.folder} is another model: it has no {differing[0]} of shape "
            f"{list(ours[differing[0]].shape)}",
            hint="give the model that the checkpoint was compiled from",
        )


def _error_differs(lowered: Lowered, name: str, reference: ModelSource, row: WrittenRow) -> str | None:
    weight = f"{row.path}.weight"
    dense = reference.load([weight])[weight]
    found = weight_error(dense, lowered.reader.quantized(name)).relative
    if row.error is None:
        return f"{row.path} has no error in the table ({found:.7g} here)"
    if abs(found - row.error) <= ERROR_TOLERANCE * row.error:
        return None
    return f"{row.path} has a weight error of {found:.7g}, and {row.error:.7g} in the table"


def _dense_paths(lowered: Lowered) -> Iterator[str]:
    """Parameters and persistent buffers that are stored as they were, each once."""
    names, quantized = lowered.source.names, {f"{path}.weight" for path in lowered.quantized()}
    for path in lowered.source.model.state_dict():
        if path not in quantized and path not in names.aliases and path not in names.absent:
            yield path


def _equal(ours: ModelSource, theirs: ModelSource, path: str) -> bool:
    try:
        a = ours.load([path])[path]
    except CheckpointError:  # a value that is no number
        return False
    return torch.equal(a, theirs.load([path])[path])


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    return f"{'; '.join(names[:_SHOWN])}{more}"
