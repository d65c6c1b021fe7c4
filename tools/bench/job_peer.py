"""llm-compressor's jobs, each in a process of its own, in its own environment; see measure.py."""

from __future__ import annotations

import os
import shutil
import sys

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  else the clock would count imports
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from measure import measured
from token_rows import token_rows
from transformers import AutoModelForCausalLM


def main(job: str, model: str, scheme: str, output: str, tokens: str = "-") -> None:
    """`scheme` is a scheme, or the recipe to calibrate by."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shutil.rmtree(output, ignore_errors=True)
    with measured():
        if job == "calibrate":
            _calibrate(model, scheme, output, tokens)
        elif job == "oneshot":
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
            recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
            oneshot(model=loaded, recipe=recipe)
            loaded.save_pretrained(output, save_compressed=True)
        elif job == "model-free":
            model_free_ptq(model, output, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens.*"], device="cpu")
        else:
            raise SystemExit(f"unknown job {job}")


def _calibrate(model: str, recipe: str, output: str, tokens: str) -> None:
    # Its AWQ pins what it caches, which needs a GPU.
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    rows = token_rows(tokens, vocabulary=1000)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    oneshot(
        model=loaded, dataset=data, recipe=recipe, max_seq_length=len(rows[0]), num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    loaded.save_pretrained(output, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
