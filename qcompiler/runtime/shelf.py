"""Activations that wait in memory, and in a file what is too much: memory does not grow with the calibration data."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Self

import torch
from torch import Tensor

from qcompiler.checkpoints.output import free_bytes, writing_to
from qcompiler.errors import CheckpointError

_SMALL = 1 << 16  # bytes: less is never worth a place in the file
IN_MEMORY = 32 << 20  # bytes, before the file is used


@dataclass(frozen=True, slots=True, eq=False)
class Shelved:
    """A tensor that is kept: where it lies in the file, or itself."""

    shape: torch.Size
    dtype: torch.dtype
    offset: int = 0
    tensor: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Shelf:
    """Keeps 32 MiB in memory, and the rest in a file without a name beside `output`.

    The file is gone when this is closed or the process ends, however it does. What is read back soon comes from the
    system's cache, which gives way to whoever needs the memory more. Use it as a context manager. Raises
    `CheckpointError` where it cannot write.
    """

    def __init__(self, output: Path) -> None:
        self._output = output.resolve()
        self._closing = ExitStack()
        self._file: IO[bytes] | None = None
        self._end = 0
        self.in_memory = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets of gaps, by size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def check(self, needed: int, others: int) -> None:
        """Raise `CheckpointError` where the disk has no room for what of `needed` bytes at once is not kept in memory.

        `others` are the bytes of the output that are to lie beside.
        """
        free = free_bytes(self._output)
        if needed > IN_MEMORY and needed - IN_MEMORY + others > free:
            raise CheckpointError(
                f"{self._output}: activations that wait for the next layer need {needed} bytes on its disk beside the "
                f"{others} of the output, and {free} are free",
                hint="use fewer or shorter samples, free space, or choose an output on another disk",
            )

    def put(self, value: Any) -> Any:
        """Keep a value (on the CPU): what to give `get` for it. Small ones are themselves, or the copy of a part."""
        if not isinstance(value, Tensor):
            return value
        held = value.untyped_storage().nbytes()
        if held > value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)  # without what it is a part of
        if min(held, value.nbytes) < _SMALL:
            return value
        if self.in_memory + value.nbytes <= IN_MEMORY:
            self.in_memory += value.nbytes
            return Shelved(value.shape, value.dtype, tensor=value)
        return self._write(value.contiguous())

    def get(self, kept: Any) -> Any:
        """What was kept, in memory of its own if it was in the file."""
        if not isinstance(kept, Shelved):
            return kept
        if kept.tensor is not None:
            return kept.tensor
        assert self._file is not None
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        left, offset = _bytes(tensor), kept.offset
        while left:
            read = os.preadv(self._file.fileno(), [left], offset)
            assert read, "the file ends before what was written to it"
            left, offset = left[read:], offset + read
        return tensor

    def drop(self, kept: Any) -> None:
        """Nobody will ask for it again."""
        if not isinstance(kept, Shelved):
            return
        if kept.tensor is not None:
            self.in_memory -= kept.nbytes
        else:
            self._free[kept.nbytes].append(kept.offset)

    def _write(self, tensor: Tensor) -> Shelved:
        gaps = self._free[tensor.nbytes]
        place = Shelved(tensor.shape, tensor.dtype, gaps.pop() if gaps else self._end)
        self._end = max(self._end, place.offset + place.nbytes)
        left, offset = _bytes(tensor), place.offset
        with writing_to(self._output, tensor.nbytes):
            if self._file is None:
                self._output.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._closing.enter_context(_unnamed(self._output.parent))
            while left:
                written = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[written:], offset + written
        return place


def _unnamed(folder: Path) -> IO[bytes]:
    return TemporaryFile(dir=folder, buffering=0)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
