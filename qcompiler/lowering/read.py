"""Read a compressed-tensors checkpoint as the dense one it stands for, one layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.checkpoints.header import TensorMeta
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.emit.matchers import assignment
from qcompiler.emit.schema import ParsedConfig, parse_quantization_config
from qcompiler.emit.sites import Site
from qcompiler.errors import CheckpointError, ConfigError
from qcompiler.formats import unpack
from qcompiler.numerics import QuantizedTensor, dequantize
from qcompiler.scheme import Scheme

_MARKS = (".weight_packed", ".weight_scale")


class CompressedReader(CheckpointReader):
    """A checkpoint whose quantized layers read as dense weights: `X.weight_packed` and its scales appear as `X.weight`.

    `schemes` says how each quantized module is quantized, by its name on disk.
    """

    def __init__(self, inner: CheckpointReader, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._inner = inner
        self._dtype = dtype
        names = sorted({key.removesuffix(mark) for key in inner.tensors for mark in _MARKS if key.endswith(mark)})
        try:
            self.config: ParsedConfig = parse_quantization_config(config)
            self.schemes = _resolve(config, self.config, names, inner.folder)
        except ConfigError as error:
            hint = error.hint or "config.json was edited, or written by another tool: compile the model again"
            raise CheckpointError(f"{inner.folder / 'config.json'}: {error.message}", hint=hint) from error
        self._parts: dict[str, dict[str, TensorMeta]] = {name: {} for name in names}
        tensors: dict[str, TensorMeta] = {}
        for key, meta in inner.tensors.items():
            name, _, part = key.rpartition(".")
            if name in self._parts and part != "bias":
                self._parts[name][part] = meta
            else:
                tensors[key] = meta
        for name in names:
            tensors[f"{name}.weight"] = self._dense_meta(name)
        super().__init__(inner.folder, tensors, {})

    def read(self, key: str) -> Tensor:
        """A tensor; that of a quantized layer is unpacked and dequantized to the model's dtype."""
        name = key.removesuffix(".weight")
        if name not in self._parts or key == name:
            return self._inner.read(key)
        return dequantize(self.quantized(name), self._dtype)

    def quantized(self, name: str) -> QuantizedTensor:
        """The codes and scales of a quantized module. Raises `CheckpointError` where they are not its scheme's."""
        try:
            weight, _ = unpack(self.parts(name), self.schemes[name])
        except CheckpointError as error:
            raise CheckpointError(
                f"{self._inner.folder}: {name} is {error.message}",
                hint="config.json and weights are of different checkpoints, or damaged: compile the model again",
            ) from error
        return weight

    def packed_bytes(self, name: str) -> int:
        """Bytes on disk of a quantized module, its bias left out."""
        return sum(meta.nbytes for meta in self._parts[name].values())

    @property
    def stored(self) -> Mapping[str, TensorMeta]:
        """All tensors as they lie on disk, by name."""
        return self._inner.tensors

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they lie on disk."""
        return sum(meta.nbytes for meta in self._inner.tensors.values())

    def parts(self, name: str, *, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of a quantized module as they lie on disk, by their last name, which starts with `prefix`."""
        return {part: self._inner.read(meta.key) for part, meta in self._parts[name].items() if part.startswith(prefix)}

    def bytes_at(self, key: str, start: int, count: int) -> bytes:
        """Bytes of a tensor as it lies on disk; of a quantized layer, those of its codes."""
        parts = self._parts.get(key.removesuffix(".weight"), {})
        meta = parts.get("weight_packed") or parts.get("weight")
        return self._inner.bytes_at(meta.key if meta else key, start, count)

    def copy_bytes(self, key: str, write: Callable[[bytes], object]) -> None:
        """Hand the bytes of an unquantized tensor to `write`."""
        self._inner.copy_bytes(key, write)

    def same_bytes(self, key: str, other: str) -> bool:
        """Whether two unquantized tensors are equal in every byte; a quantized one equals nothing else."""
        return key in self._inner.tensors and other in self._inner.tensors and self._inner.same_bytes(key, other)

    def close(self) -> None:
        """Close the files."""
        self._inner.close()

    def _dense_meta(self, name: str) -> TensorMeta:
        parts = self._parts[name]
        if "weight_shape" in parts:
            shape = tuple(int(size) for size in self._inner.read(parts["weight_shape"].key))
        elif "weight_packed" in parts:
            rows, columns = parts["weight_packed"].shape
            shape = (rows, columns * 2)
        elif "weight" in parts:
            shape = parts["weight"].shape
        else:
            raise CheckpointError(
                f"{self._inner.folder}: {name} has scales but no weight", hint="the checkpoint is incomplete"
            )
        some = next(iter(parts.values()))
        return dataclasses.replace(some, key=f"{name}.weight", dtype=self._dtype, shape=shape)


def _resolve(config: Mapping[str, Any], parsed: ParsedConfig, names: list[str], folder: Path) -> dict[str, Scheme]:
    groups = assignment("transformers", config, [Site(name, 0, 0) for name in names], {}).groups
    schemes = {group.name: group.scheme for group in parsed.groups}
    found: dict[str, Scheme] = {}
    for name in names:
        group = groups[name]
        if group is None:
            raise CheckpointError(
                f"{folder}: {name} is stored quantized, but no target of quantization_config matches it",
                hint="loaders would leave it uninitialized: add a target, or write the layer dense",
            )
        found[name] = schemes[group]
    return found
