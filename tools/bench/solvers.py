"""GPTQ, and AWQ with GPTQ, against llm-compressor: the same model, token ids and recipe file, in turn and in one run.

    python tools/bench/solvers.py --models DIR --peer-python PEER/bin/python [--runs 3] [--model FOLDER]

PEER is a virtual environment with llmcompressor==0.14.0.1. The clock runs from the model's folder to the written
checkpoint, imports excluded, capture included. Both checkpoints are then measured by `fidelity.py`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from measure import Sample, run, summary
from models import llama_config, write_random

from qcompiler.demo import model_path

HERE = Path(__file__).parent
RECIPES = ("int4-int8", "awq-w4a16+gptq-w8a8")
MODELS = {
    "llama-1024x4": llama_config(hidden=1024, intermediate=2816, layers=4, heads=16, kv_heads=16, vocabulary=8192),
    "llama-2048x2": llama_config(hidden=2048, intermediate=5632, layers=2, heads=32, kv_heads=32, vocabulary=8192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="where random models and outputs are kept")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--model", type=Path, action="append", help="a model folder in place of the random ones")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--tokens", nargs="+", default=["32x256", "64x512"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    folders = options.model or [random_model(options.models / name) for name in MODELS]
    for folder in folders:
        for recipe in options.recipes:
            for tokens in options.tokens:
                print(f"{folder.name}, {recipe}, {tokens} tokens", flush=True)
                _pair(folder, HERE / "recipes" / f"{recipe}.yaml", tokens, options)


def random_model(folder: Path) -> Path:
    """A random model, with a tokenizer that the peer asks for and does not use."""
    write_random(MODELS[folder.name], folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder)
    return folder


def _pair(folder: Path, recipe: Path, tokens: str, options: argparse.Namespace) -> None:
    ours, theirs = options.models / "out-ours", options.models / "out-theirs"
    jobs = {
        "qcompiler": (Path(sys.executable), HERE / "job_ours.py", "compile", folder, recipe, ours, tokens),
        "llm-compressor": (options.peer_python, HERE / "job_peer.py", "calibrate", folder, recipe, theirs, tokens),
    }
    samples: dict[str, list[Sample]] = {name: [] for name in jobs}
    for _ in range(options.runs):
        for name, (python, script, *arguments) in jobs.items():
            samples[name].append(run(python, script, *map(str, arguments), threads=options.threads))
    for name, found in samples.items():
        print(f"  {name:<16} {summary(found)}")
    pairs = list(zip(samples["qcompiler"], samples["llm-compressor"], strict=True))
    time = median(a.seconds / b.seconds for a, b in pairs)
    memory = median(a.anonymous / b.anonymous for a, b in pairs)
    print(f"  ours/theirs: time {time:.2f}, anonymous memory {memory:.2f}")
    parts = ", ".join(f"{name} {s:.2f}" for name, s in samples["qcompiler"][-1].values.items() if name != "bytes")
    print(f"  our seconds: {parts}", flush=True)
    subprocess.run([sys.executable, HERE / "fidelity.py", folder, ours, theirs, "--tokens", tokens], check=True)


if __name__ == "__main__":
    main()
