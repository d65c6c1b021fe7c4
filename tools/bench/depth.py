"""Peak memory against the number of layers: width 2048, the same tokens, a pipeline that calibrates.

python tools/bench/depth.py --models DIR [--samples 16 --length 256]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import run, summary
from models import llama_config, write_random

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="where random models are made and kept")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3, help="of which the median is printed")
    parser.add_argument("--pipelines", nargs="+", default=["w4a16", "fp8"])
    options = parser.parse_args()
    for pipeline in options.pipelines:
        for layers in (4, 16, 32):
            config = llama_config(hidden=2048, intermediate=5632, layers=layers, heads=32, kv_heads=8, vocabulary=32000)
            folder = write_random(config, options.models / f"llama-2048x{layers}")
            output = options.models / "out-ours"
            tokens = f"{options.samples}x{options.length}"
            job = (HERE / "job_ours.py", "compile", str(folder), pipeline, str(output), tokens)
            samples = [run(Path(sys.executable), *job, threads=2) for _ in range(options.runs)]
            print(f"{pipeline:<10} {layers:>3} layers  {summary(samples)}", flush=True)


if __name__ == "__main__":
    main()
