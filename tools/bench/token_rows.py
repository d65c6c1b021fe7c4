"""The token ids that both tools calibrate with."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def token_rows(text: str, vocabulary: int) -> list[list[int]]:
    """`64x512`: 64 samples of 512 random tokens, the same whoever asks; or a JSON file of rows of token ids."""
    if text.endswith(".json"):
        rows: list[list[int]] = json.loads(Path(text).read_text(encoding="utf-8"))
        return rows
    samples, length = map(int, text.split("x"))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for _ in range(samples)]
