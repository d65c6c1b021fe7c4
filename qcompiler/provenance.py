"""`qcompiler.json`: what a compilation says of its checkpoint, read back with distrust."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from qcompiler.checkpoints.manifest import FileDigest
from qcompiler.checkpoints.output import PROVENANCE
from qcompiler.errors import CheckpointError
from qcompiler.report import UNVERIFIABLE


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is no file of this folder")
    return name


_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
_FileName = Annotated[str, AfterValidator(_inside)]


class _Part(BaseModel):
    # What else is in the file is for people, or from a later version.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class WrittenFile(_Part):
    """A file's size in bytes and SHA-256."""

    size: _Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WrittenRow(_Part):
    """A row of the table of layers; see `LayerRow`."""

    path: str
    scheme: str | None
    format: str | None
    bytes: _Count
    error: _Share
    because: str = ""
    solver: str | None = None
    transform: str | None = None
    output_error: _Share = None
    nearest_output_error: _Share = None
    damping: _Share = None
    dead_columns: _Count | None = None
    ratio: _Share = None
    transform_gain: _Share = None


class WrittenNote(_Part):
    """A note of the compilation; see `Note`."""

    text: str
    kind: Literal["info", "warning", "fallback"] = "info"


class WrittenReport(_Part):
    """What is read of the report; see `Report`."""

    target: str
    notes: Annotated[tuple[WrittenNote, ...], Field(strict=False)]
    layers: Annotated[tuple[WrittenRow, ...], Field(strict=False)]
    total_bytes: _Count
    dense_total_bytes: _Count | None = None
    rescaled: Annotated[frozenset[str], Field(strict=False)] = frozenset()

    @field_validator("layers")
    @classmethod
    def _once(cls, layers: tuple[WrittenRow, ...]) -> tuple[WrittenRow, ...]:
        seen: set[str] = set()
        for row in layers:
            if row.path in seen:
                raise ValueError(f"{row.path} has two rows")
            seen.add(row.path)
        return layers


class WrittenTimings(_Part):
    """Seconds of each pass, by its name, and of layers that were solved alone, by path."""

    passes: dict[str, _Seconds] = {}
    layers: dict[str, _Seconds] = {}


class Provenance(_Part):
    """What is read of `qcompiler.json`. `files` is None where an earlier version wrote it; `pipeline` is YAML."""

    weights: str
    report: WrittenReport
    model: str = ""
    pipeline: str | None = None
    timings: WrittenTimings = WrittenTimings()
    files: dict[_FileName, WrittenFile] | None = None

    @property
    def obstacle(self) -> str | None:
        """Why Transformers does not load what was compiled for another runtime; None where it does."""
        return next((note.text for note in self.report.notes if note.text.startswith(UNVERIFIABLE)), None)

    @property
    def digests(self) -> dict[str, FileDigest] | None:
        """The digest of each file that was written, by its name relative to the folder."""
        if self.files is None:
            return None
        return {name: FileDigest(file.size, file.sha256) for name, file in self.files.items()}


def read_provenance(folder: Path) -> Provenance | None:
    """What is said of the checkpoint in `folder`; None where there is no such file.

    Raises `CheckpointError` that names the entry, where the file is damaged or was edited into something else.
    """
    file = folder / PROVENANCE
    if not file.is_file():
        return None
    hint = "copy or download the file again, or compile again: a compilation writes it whole"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{file} is truncated, or no JSON: {reason}", hint=hint) from error
    try:
        return Provenance.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{file}: {where}: {first['msg'].removeprefix('Value error, ')}", hint=hint) from None
