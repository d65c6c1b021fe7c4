"""The jobs of this project, each in a process of its own; see measure.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.export._trace
import transformers.models.llama.modeling_llama  # noqa: F401  else the clock would count imports
from measure import measured
from token_rows import token_rows
from transformers.utils import logging

from qcompiler.compiler import compile, plan
from qcompiler.data import CalibrationSpec


def main(job: str, model: str, pipeline: str, output: str, tokens: str) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(int(__import__("os").environ["OMP_NUM_THREADS"]))
    rows = None if tokens == "-" else [{"input_ids": ids} for ids in token_rows(tokens, vocabulary=1000)]
    with measured() as values:
        if job == "plan":
            planned = plan(model, pipeline)
            values["bytes"] = planned.report.total_bytes
        else:
            sampling = (
                CalibrationSpec(samples=len(rows), sequence_length=len(rows[0]["input_ids"]), shuffle=False)
                if rows
                else None
            )
            result = compile(
                model, pipeline=pipeline, output=Path(output), calibration=rows, sampling=sampling, overwrite=True
            )
            values["bytes"] = result.report.total_bytes
            values |= {timing.name: timing.seconds for timing in result.report.timings}


if __name__ == "__main__":
    main(*sys.argv[1:])
