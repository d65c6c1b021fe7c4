"""Data-free W4A16 of a 1-billion-parameter model, against llm-compressor, in turn and in one run.

    python tools/bench/data_free.py --models DIR --peer-python PEER/bin/python [--runs 3]

PEER is a virtual environment with llmcompressor==0.14.0.1. The clock runs from the model's folder to the written
checkpoint, imports excluded, capture included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

from measure import Sample, run, summary
from models import LLAMA_1B, write_random

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="where random models are made and kept")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pipeline", default="w4a16-minmax.yaml", help="the peer rounds with min-max scales")
    options = parser.parse_args()
    folder = str(write_random(LLAMA_1B, options.models / "llama-1b"))
    output, theirs = str(options.models / "out-ours"), str(options.models / "out-theirs")
    pipeline = HERE / options.pipeline
    jobs: dict[str, tuple[Path, Path, str, str, str, str, str] | tuple[Path, Path, str, str, str, str]] = {
        "qcompiler": (Path(sys.executable), HERE / "job_ours.py", "compile", folder, str(pipeline), output, "-"),
        "llm-compressor oneshot": (options.peer_python, HERE / "job_peer.py", "oneshot", folder, "W4A16", theirs),
        "llm-compressor model_free_ptq": (
            options.peer_python, HERE / "job_peer.py", "model-free", folder, "W4A16", theirs,
        ),
    }  # fmt: skip
    samples: dict[str, list[Sample]] = {name: [] for name in jobs}
    for _ in range(options.runs):
        for name, job in jobs.items():
            samples[name].append(run(*job, threads=options.threads))
            print(f"  {name:<30} {summary(samples[name][-1:])}", flush=True)
    ours = samples["qcompiler"]
    for name, found in samples.items():
        ratio = median(a.seconds / b.seconds for a, b in zip(ours, found, strict=True))
        memory = median(a.anonymous / b.anonymous for a, b in zip(ours, found, strict=True))
        print(f"{name:<30} {summary(found)}   ours/theirs: time {ratio:.2f}, anonymous {memory:.2f}")


if __name__ == "__main__":
    main()
