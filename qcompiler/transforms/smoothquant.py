"""SmoothQuant (Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for LLMs")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.transforms.options import SmoothQuantOptions
from qcompiler.transforms.ties import channel_amax, to_features

_SMALLEST = 1e-5  # of the paper's code, for scales and for the weights' range


def smoothing_scale(
    weights: Sequence[Tensor], amax: Tensor, options: SmoothQuantOptions, *, ties: Tensor | None = None
) -> Tensor:
    """What each input channel is divided by, and its column of every weight multiplied by: float32 [I], positive.

    scale_j = max|X_j|^a / max|W_j|^(1 - a), the paper's equation 4, with a the strength and the largest weight taken
    over all `weights` (each [O_k, I]). `amax` float32 [I] is max|X_j|. Channels of equal `ties` (int64 [I]) get one
    scale, that of their largest activation and weight. A channel that is always zero, or that no weight reads, has
    nothing to balance: its scale is 1, where the paper's code takes 1e-5.

    llm-compressor takes (max X_j - min X_j) / (2 max|W_j|) in place of the two maxima: the same for ranges that are
    symmetric about 0.
    """
    largest = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    amax, largest = channel_amax(amax.float(), ties), channel_amax(largest, ties)
    scale = amax.pow(options.strength) / largest.clamp(min=_SMALLEST).pow(1 - options.strength)
    return to_features(torch.where((amax > 0) & (largest > 0), scale.clamp_(min=_SMALLEST), 1.0), ties)
