"""NaN and infinity in weights: whatever is compiled from them would be broken, and no statistic would be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcompiler.checkpoints.header import TensorMeta
from qcompiler.checkpoints.reader import RawTensor
from qcompiler.errors import CheckpointError

_EXPONENT = {
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    torch.float32: (np.uint32, 0x7F800000),
    torch.float64: (np.uint64, 0x7FF0000000000000),
}
"""Integers as wide as a float, and the bits that are all set in NaN and infinity alone."""


@dataclass(frozen=True, slots=True)
class FiniteTensor(RawTensor):
    """A tensor to be copied byte for byte, whose values are looked at on their way."""

    def copy_bytes(self, write: Callable[[bytes], object]) -> None:
        """Hand the tensor's bytes to `write`. Raises `CheckpointError` at the first NaN or infinite value."""
        integer, exponent = _EXPONENT.get(self.dtype, (None, 0))

        rest = b""  # a short read may end inside a value

        def checked(chunk: bytes) -> object:
            nonlocal rest
            if integer is not None:
                seen = rest + chunk if rest else chunk
                whole = len(seen) - len(seen) % np.dtype(integer).itemsize
                bits = np.frombuffer(seen[:whole], dtype=integer) & exponent
                if bool((bits == exponent).any()):
                    raise _not_finite(self.key, place(self.reader.meta(self.key)))
                rest = seen[whole:]
            return write(chunk)

        self.reader.copy_bytes(self.key, checked)


def check_finite(path: str, value: Tensor, source: str) -> None:
    """Raise `CheckpointError` where a tensor has NaN or infinite values. `source`: where it is from, in words."""
    if not value.is_floating_point() or not value.numel():
        return
    low, high = value.aminmax()  # one pass, and NaN wins
    if not bool(low.isfinite() & high.isfinite()):
        raise _not_finite(f"{path} in {str(value.dtype).removeprefix('torch.')}", source)


def place(meta: TensorMeta) -> str:
    """Where a tensor lies, in words."""
    return f"tensor {meta.key!r} of {meta.file}"


def _not_finite(what: str, source: str) -> CheckpointError:
    return CheckpointError(
        f"{what} has NaN or infinite values ({source})",
        hint="the checkpoint is damaged, or its dtype is too narrow for it: compile with another --dtype",
    )
