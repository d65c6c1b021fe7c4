"""The `qcompiler` command as a process of its own, and the files that it is given and leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).with_name("qcompiler")

PIPELINE = """\
name: test
passes:
  - assign:
      rules:
        - select: {structure: [attention-input, attention-output, mlp-input, mlp-output]}
          scheme: {weights: {type: int, bits: 4, group_size: 16}}
  - legalize: {target: transformers}
  - insert-observers
  - calibrate
  - lower
"""
"""Fits a tiny model, and needs no data."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run of the command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def arguments(*args: object) -> list[str]:
    return [str(COMMAND), *map(str, args)]


def environment(packages: Path | None = None) -> dict[str, str]:
    """The environment of a process that goes to no network. packages: a folder of further installed packages."""
    said = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, [packages and str(packages), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **said, "PYTHONPATH": path}


def start(*args: object, packages: Path | None = None, **options: Any) -> subprocess.Popen[str]:
    """The command, started, with its output in pipes."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments(*args), env=environment(packages), **{**streams, **options})


def finish(process: subprocess.Popen[str]) -> Ran:
    """Wait for a process that was started."""
    out, err = process.communicate(timeout=300)
    return Ran(process.returncode, out, err)


def pipeline_file(folder: Path, *changes: tuple[str, str]) -> Path:
    """`PIPELINE` with words replaced, in a file."""
    text = PIPELINE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return write(folder / "pipeline.yaml", text)


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
