"""Tensors without their values: what is known of one before it is read or made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Spec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes that such a tensor takes on disk, headers left out."""
    return dtype.itemsize * math.prod(shape)
