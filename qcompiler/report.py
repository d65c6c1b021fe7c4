"""What came of a compilation, for people and for `qcompiler.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

UNVERIFIABLE = "Transformers cannot verify this checkpoint"
"""How the note begins that is made where a target loads what Transformers does not."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something a user should know.

    A `warning` is of what was asked for and is likely a mistake; a `fallback` did something else than was asked for.
    """

    kind: Literal["info", "warning", "fallback"]
    text: str


@dataclass(slots=True)
class LayerRow:
    """One linear, bare linear or expert block.

    `bytes` are its tensors on disk, bias included; `dense_bytes` what they were. `bits_per_weight` counts scales and
    zero points. `error` is ||W - Q||^2 / ||W||^2 of the weight (as the transform left it), None where it stays dense or
    was not calibrated.

    Where solved with a Hessian: `output_error` is ||(W - Q) X||^2 / ||W X||^2, `nearest_output_error` the same of
    rounding to nearest, `damping` what was added to the diagonal as a share of its mean, `dead_columns` how many inputs
    are always zero. `transform` is what rescaled its inputs, `ratio` AWQ's exponent (None: no scale was best), and
    `transform_gain` the output error of rounding to nearest with the scale as a share of that without. `seconds`: spent
    on this layer alone.
    """

    path: str
    kind: str
    structure: str | None
    layer: int | None
    shape: tuple[int, int]
    scheme: str | None
    format: str | None
    solver: str | None
    because: str
    bytes: int
    dense_bytes: int
    bits_per_weight: float
    error: float | None = None
    output_error: float | None = None
    nearest_output_error: float | None = None
    damping: float | None = None
    dead_columns: int | None = None
    transform: str | None = None
    ratio: float | None = None
    transform_gain: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one pass, or one part of a sweep over the partitions, took.

    `observe` is what observers took of the batches; parts named `solve: ` are those of the pass that solves (their
    seconds are in the pass's too), and of what threads do side by side, the sum over their number.
    """

    name: str
    seconds: float


@dataclass(slots=True)
class Report:
    """Rows per layer, bytes in total, notes, and time per pass.

    `rescaled` are the parameters, quantized or dense, into which a transform folded a scale: a row's `error` is then
    against the rescaled weight.
    """

    model: str = ""
    pipeline: str = ""
    target: str = ""
    layers: list[LayerRow] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    total_bytes: int = 0
    dense_total_bytes: int = 0
    config_summary: str = ""
    rescaled: list[str] = field(default_factory=list)

    def info(self, text: str) -> None:
        self._note(Note("info", text))

    def warning(self, text: str) -> None:
        self._note(Note("warning", text))

    def fallback(self, text: str) -> None:
        self._note(Note("fallback", text))

    def _note(self, note: Note) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def tell_rescaled(self, paths: Iterable[str]) -> None:
        self.rescaled = sorted({*self.rescaled, *paths})

    def row(self, path: str) -> LayerRow:
        return next(row for row in self.layers if row.path == path)

    def as_dict(self, *, timings: bool = True) -> dict[str, Any]:
        """Plain data for JSON. Without `timings` it is the same for every run on the same inputs."""
        plain = asdict(self)
        if not timings:
            del plain["timings"]
            for row in plain["layers"]:
                del row["seconds"]
        return plain
