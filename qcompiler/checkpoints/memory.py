"""The weights of a model that is already loaded, offered as a checkpoint's tensors are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from qcompiler.checkpoints.header import TensorMeta
from qcompiler.errors import CheckpointError, did_you_mean

_CHUNK = 16 << 20  # bytes in flight while copying


class LoadedTensors:
    """The state dict of a model on any device, by its paths.

    The model is only read: a tensor is copied when it is asked for, so that nobody who changes it changes the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises `CheckpointError` where the model has no values (on the meta device, or offloaded)."""
        self._state: dict[str, torch.Tensor] = dict(model.state_dict())
        self.origin = f"the loaded {type(model).__name__}"
        hollow = next((path for path, tensor in self._state.items() if tensor.is_meta), None)
        if hollow is not None:
            raise CheckpointError(
                f"{self.origin}: {hollow} has no values: it lies on the meta device, or is offloaded",
                hint="load the model without offloading, or compile its folder, which is read piece by piece",
            )
        metas = {k: TensorMeta(k, t.dtype, tuple(t.shape), Path(self.origin), 0) for k, t in self._state.items()}
        self.tensors: Mapping[str, TensorMeta] = MappingProxyType(metas)

    def meta(self, key: str) -> TensorMeta:
        """Dtype, shape and size of a tensor. Raises `CheckpointError` with near names."""
        try:
            return self.tensors[key]
        except KeyError:
            raise CheckpointError(
                f"{self.origin}: there is no tensor {key!r}{did_you_mean(key, self.tensors)}",
                hint="use the names of its state dict",
            ) from None

    def read(self, key: str) -> torch.Tensor:
        """A contiguous copy of the tensor, on the device where the model has it."""
        return self._values(key).clone(memory_format=torch.contiguous_format)

    def bytes_at(self, key: str, start: int, count: int) -> bytes:
        """`count` bytes of a tensor from its byte `start` on, or as many as it has from there."""
        return self._bytes(key)[start : start + count].cpu().numpy().tobytes()

    def copy_bytes(self, key: str, write: Callable[[bytes], object]) -> None:
        """Hand the tensor's bytes to `write`, a few MiB at a time."""
        data = self._bytes(key)
        for start in range(0, data.numel(), _CHUNK):
            write(data[start : start + _CHUNK].cpu().numpy().tobytes())

    def same_bytes(self, key: str, other: str) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte."""
        a, b = self.meta(key), self.meta(other)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = self._bytes(key), self._bytes(other)
        return left.data_ptr() == right.data_ptr() or torch.equal(left, right.to(left.device))

    def close(self) -> None:
        """Let go of the model's tensors."""
        self._state.clear()

    def _values(self, key: str) -> torch.Tensor:
        self.meta(key)
        if key not in self._state:
            raise CheckpointError(f"{self.origin}: the reader is closed", hint="read before closing it")
        return self._state[key].detach()

    def _bytes(self, key: str) -> torch.Tensor:
        return self._values(key).contiguous().reshape(-1).view(torch.uint8)
