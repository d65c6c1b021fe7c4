"""llm-compressor's jobs, each in a process of its own, in its own environment; see measure.py."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from measure import measured
from transformers import AutoModelForCausalLM


def main(job: str, model: str, scheme: str, output: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shutil.rmtree(output, ignore_errors=True)
    with measured():
        if job == "oneshot":
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
            recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
            oneshot(model=loaded, recipe=recipe)
            loaded.save_pretrained(output, save_compressed=True)
        elif job == "model-free":
            model_free_ptq(model, output, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens.*"], device="cpu")
        else:
            raise SystemExit(f"unknown job {job}")


if __name__ == "__main__":
    main(*sys.argv[1:])
