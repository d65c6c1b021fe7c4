"""Load checkpoints in vLLM on this CPU, generate, and compare prompt log-probabilities with Transformers.

Runs inside the serving environment. Each checkpoint gets a process of its own: an engine that fails must not take the
others along. Exit status 1 if a checkpoint does not load cleanly, does not generate, or the two runtimes disagree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MINIMUM_COSINE = 0.995
FULL_VOCABULARY = 65_536  # above it only the TOP_K likeliest tokens are compared
TOP_K = 1024
NEW_TOKENS = 12
PROMPTS = (
    "The river rises in the mountains and flows south through the old town before it reaches the sea.",
    "Once upon a time there was a little girl who lived near the forest with her grandmother.",
    "In 1969 the first people walked on the Moon, and the whole world watched them on television.",
)


@dataclass(frozen=True)
class Comparison:
    """How one checkpoint did. `cosine` is over log-probabilities centred per position, all prompts together."""

    checkpoint: str
    cosine: float
    divergence: float  # mean KL divergence of vLLM from Transformers, in nats
    same_top: float  # share of positions with the same likeliest token
    generated: str
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.cosine >= MINIMUM_COSINE


def compare(checkpoint: Path) -> Comparison:
    """Serve one checkpoint in both runtimes. Raises whatever they raise, and `AssertionError` for silent faults."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    vocabulary = AutoConfig.from_pretrained(checkpoint).get_text_config().vocab_size
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    reference = transformers_logprobs(checkpoint, prompts)
    served, generated = vllm_logprobs(checkpoint, prompts, vocabulary)

    rows: list[tuple[Any, Any]] = []  # per position: vLLM's and Transformers' log-probabilities of the same tokens
    for expected, positions in zip(reference, served, strict=True):
        for row, found in zip(expected, positions, strict=True):
            tokens = torch.tensor(sorted(found))
            rows.append((torch.tensor([found[int(t)] for t in tokens], dtype=torch.float64), row.double()[tokens]))
    assert all(a.isfinite().all() and b.isfinite().all() for a, b in rows), "log-probabilities that are not finite"
    centred = [torch.cat([values - values.mean() for values in side]) for side in zip(*rows, strict=True)]
    return Comparison(
        checkpoint=str(checkpoint),
        cosine=float(torch.nn.functional.cosine_similarity(centred[0], centred[1], dim=0)),
        divergence=sum(float((b.exp() * (b - a)).sum()) for a, b in rows) / len(rows),
        same_top=sum(int(a.argmax() == b.argmax()) for a, b in rows) / len(rows),
        generated=generated,
    )


def transformers_logprobs(checkpoint: Path, prompts: list[list[int]]) -> list[Any]:
    """Log-probabilities [positions, vocabulary] that predict each prompt's second to last token."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(kind), f"Transformers loads with {kind}: {sorted(map(str, info[kind]))[:5]}"
    model.eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0, :-1] for prompt in prompts]
    return [values.float().log_softmax(-1) for values in logits]


def vllm_logprobs(
    checkpoint: Path, prompts: list[list[int]], vocabulary: int
) -> tuple[list[list[dict[int, float]]], str]:
    """The same from vLLM, as token -> log-probability (the full vocabulary if it is small), and one generated text."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    engine = LLM(
        model=str(checkpoint),
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + NEW_TOKENS,
        max_num_seqs=4,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    count = -1 if vocabulary <= FULL_VOCABULARY else TOP_K
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, prompt_logprobs=count)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    served = []
    for output in outputs:
        assert output.prompt_logprobs is not None, "vLLM returned no prompt log-probabilities"
        positions = [position for position in output.prompt_logprobs[1:] if position is not None]
        served.append([{token: entry.logprob for token, entry in position.items()} for position in positions])
    text = outputs[0].outputs[0].text
    assert outputs[0].outputs[0].token_ids, "vLLM generated nothing"
    return served, text


def in_own_process(checkpoint: Path) -> Comparison:
    """`compare` in a child; a child that dies becomes a failed comparison with the end of its output."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "comparison.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--answer", str(answer), str(checkpoint)]
        child = subprocess.run(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if answer.exists():
            return Comparison(**json.loads(answer.read_text()))
    lines = [line.strip() for line in child.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception)\b.*:", line)]
    failure = "\n".join(errors[-3:] or lines[-20:]) or f"exit status {child.returncode}"
    return Comparison(str(checkpoint), math.nan, math.nan, math.nan, "", failure)


def report(comparisons: list[Comparison]) -> None:
    width = max(len(Path(c.checkpoint).name) for c in comparisons)
    print(f"{'checkpoint':<{width}}  cosine    KL        same top  generated")
    for c in comparisons:
        numbers = f"{c.cosine:<8.5f}  {c.divergence:<8.5f}  {c.same_top:<8.3f}"
        verdict = "" if c.passed else "  FAILED"
        print(f"{Path(c.checkpoint).name:<{width}}  {numbers}  {c.generated!r}{verdict}")
        if c.failure:
            print("    " + c.failure.replace("\n", "\n    "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        arguments.answer.write_text(json.dumps(asdict(compare(arguments.checkpoints[0]))))
        return 0
    for checkpoint in arguments.checkpoints:
        if not (checkpoint / "config.json").is_file():
            parser.error(f"{checkpoint} is not a checkpoint folder: it has no config.json")
    comparisons = [in_own_process(checkpoint.resolve()) for checkpoint in arguments.checkpoints]
    report(comparisons)
    failed = sum(not comparison.passed for comparison in comparisons)
    if failed:
        print(f"{failed} of {len(comparisons)} checkpoints failed (a cosine below {MINIMUM_COSINE} is a failure)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
