"""The token ids that both tools calibrate with."""

from __future__ import annotations

import torch


def random_tokens(text: str, vocabulary: int) -> list[list[int]]:
    """`64x512`: 64 samples of 512 random tokens, the same whoever asks."""
    samples, length = map(int, text.split("x"))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for _ in range(samples)]
