"""Perplexity and KL divergence of every packaged pipeline on real models, beside llm-compressor's by the same script.

    python tools/bench/results.py --shared ../shared --peer-python PEER/bin/python [--write README.md]

PEER is a virtual environment with llmcompressor==0.14.0.1; it compiles the recipes in `recipes/`, which say the same as
the pipelines of their names. Both tools get the same token ids. `--write` puts the table between its markers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from fidelity import load, predictions
from transformers import AutoTokenizer

from qcompiler.compiler import compile
from qcompiler.data import CalibrationSpec
from qcompiler.errors import QCompilerError
from qcompiler.pipeline.registry import packaged_pipelines

HERE = Path(__file__).parent
CALIBRATION = {"llama-7m": "c4.txt", "stories260K": "tinystories.txt", "babyllama361": "tinystories.txt"}
_UNLOADABLE = "transformers cannot load what was assigned, though every scheme is legal: "
_START, _END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True, slots=True)
class Cell:
    """What a checkpoint predicts, or why there is none."""

    perplexity: float = 0.0
    divergence: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        return self.reason or f"{self.perplexity:.3f} / {self.divergence:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--models", nargs="+", default=list(CALIBRATION))
    parser.add_argument("--pipelines", nargs="+", default=list(packaged_pipelines()))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64, help="of evaluation text, each of --length tokens")
    parser.add_argument("--write", type=Path, help="the file whose table is to be replaced")
    options = parser.parse_args()
    lines = list(_table(options))
    print("\n".join(lines))
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        block = "\n".join((_START, "", *lines, "", _END))
        written, count = re.subn(f"{_START}.*{_END}", lambda _: block, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{options.write} has no {_START} ... {_END}")
        options.write.write_text(written, encoding="utf-8")


def _table(options: argparse.Namespace) -> Iterator[str]:
    yield "| model | pipeline | qcompiler | llm-compressor |"
    yield "|---|---|---|---|"
    for name in options.models:
        folder = options.shared / "models" / name
        dense = load(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        calibration, evaluation = (
            _windows(tokenizer, options.shared / "data" / file, options.length, count)
            for file, count in (
                (f"calibration/{CALIBRATION[name]}", options.samples),
                ("evaluation/wikitext2-test-first-half.txt", options.windows),
            )
        )
        wanted = predictions(dense, evaluation)
        yield f"| {name} | dense | {wanted.perplexity:.3f} | |"
        for pipeline in options.pipelines:
            with tempfile.TemporaryDirectory() as temporary:
                ours = _ours(folder, pipeline, calibration, Path(temporary) / "ours")
                theirs = _theirs(folder, pipeline, calibration, Path(temporary), options.peer_python)
                cells = [
                    made if isinstance(made, Cell) else _measured(made, evaluation, wanted.logits)
                    for made in (ours, theirs)
                ]
            yield f"| {name} | `{pipeline}` | {cells[0]} | {cells[1]} |"
            print(f"{name} {pipeline}: {cells[0]} | {cells[1]}", file=sys.stderr, flush=True)


def _windows(tokenizer: object, file: Path, length: int, count: int) -> list[list[int]]:
    ids = tokenizer(file.read_text(encoding="utf-8")[: count * length * 12])["input_ids"]  # type: ignore[operator]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:count]


def _ours(folder: Path, pipeline: str, rows: list[list[int]], output: Path) -> Path | Cell:
    data = [{"input_ids": row} for row in rows]
    try:
        sampling = CalibrationSpec(samples=len(rows), sequence_length=len(rows[0]), shuffle=False)
        # Any target: which hardware serves a scheme has no bearing on what it predicts.
        compile(folder, pipeline=pipeline, output=output, calibration=data, sampling=sampling, target="transformers")
    except QCompilerError as error:
        return Cell(reason=f"n/a: {_first_reason(error)}")
    return output


def _first_reason(error: QCompilerError) -> str:
    """Of an error that lists layers, what is said of the first; else what it says."""
    said = [line.strip() for line in str(error).splitlines() if not line.strip().startswith("hint: ")]
    reason = said[min(1, len(said) - 1)].removeprefix(_UNLOADABLE)
    return reason[:240].replace("|", "/")


def _theirs(folder: Path, pipeline: str, rows: list[list[int]], scratch: Path, python: Path | None) -> Path | Cell:
    recipe = HERE / "recipes" / f"{pipeline}.yaml"
    if python is None or not recipe.exists():
        return Cell(reason="-")
    tokens, output = scratch / "rows.json", scratch / "theirs"
    tokens.write_text(json.dumps(rows), encoding="utf-8")
    job = [python, HERE / "job_peer.py", "calibrate", folder, recipe, output, tokens]
    done = subprocess.run([*map(str, job)], input="\n\n", capture_output=True, text=True)
    if done.returncode:
        return Cell(reason="fails: " + done.stderr.strip().splitlines()[-1][:80].replace("|", "/"))
    return output


def _measured(folder: Path, rows: list[list[int]], wanted: list[torch.Tensor]) -> Cell:
    try:
        found = predictions(load(folder), rows, against=wanted)
    except RuntimeError as error:  # Transformers' own: a checkpoint that it loads and cannot run
        return Cell(reason=f"cannot be run: {str(error).splitlines()[0][:80]}")
    return Cell(found.perplexity, found.divergence)


if __name__ == "__main__":
    main()
