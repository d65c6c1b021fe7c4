"""A quantized weight, and which of its elements share a scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.errors import LegalityError
from qcompiler.scheme import QuantSpec, Strategy

_CPU_ELEMENTS = 2**20  # 4 MiB of float32 and as much scratch: the last-level cache, and launches are amortized
_DEVICE_ELEMENTS = 2**21  # launches cost more than memory traffic


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as codes and scales, in the values and shapes that go to disk (only the codes are not packed yet).

    codes: int8, float8_e4m3fn, or uint8 holding one FP4 code; `shape`, that is [O, I].
    scale: the model's dtype, float8_e4m3fn (NVFP4), or uint8 exponents (MX); `scale_shape`.
    zero_point: int8 in the same signed convention as the codes; shape of `scale`; asymmetric only.
    global_scale: float32 [1], the divisor of NVFP4's scales.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def tile_shape(spec: QuantSpec, out_features: int, in_features: int) -> tuple[int, int]:
    """Rows and columns that share one scale: every weight strategy is a block shape."""
    match spec.strategy:
        case Strategy.TENSOR:
            return out_features, in_features
        case Strategy.CHANNEL:
            return 1, in_features
        case Strategy.GROUP | Strategy.TENSOR_GROUP:
            assert spec.group_size is not None
            if in_features % spec.group_size:
                raise LegalityError(
                    f"{spec.short}: {in_features} input features are not divisible by group_size {spec.group_size}",
                    hint="choose a group_size that divides them, or strategy channel",
                )
            return 1, spec.group_size
        case Strategy.BLOCK:
            assert spec.block_structure is not None
            return spec.block_structure
        case _:
            raise LegalityError(f"strategy {spec.strategy} is for activations, not for weights")


def scale_shape(spec: QuantSpec, out_features: int, in_features: int) -> tuple[int, ...]:
    """The on-disk shape of the scale (and of an unpacked zero point) of a weight."""
    rows, columns = tile_shape(spec, out_features, in_features)
    return (1,) if spec.strategy is Strategy.TENSOR else (-(-out_features // rows), -(-in_features // columns))


@dataclass(frozen=True, slots=True)
class Piece:
    """A cache-sized rectangle of a weight that whole tiles fill exactly (for strategy tensor: part of the one tile)."""

    rows: slice
    columns: slice
    tile: tuple[int, int]
    grid_rows: slice
    grid_columns: slice

    @property
    def numel(self) -> int:
        return int((self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start))

    def elements(self, matrix: Tensor) -> Tensor:
        """This piece of an [O, I] matrix as a view [tiles down, tile rows, tiles across, tile columns]."""
        part, (rows, columns) = matrix[self.rows, self.columns], self.tile
        return part.view(part.shape[0] // rows, rows, part.shape[1] // columns, columns)

    def grid(self, scale: Tensor) -> Tensor:
        """This piece of a scale (or zero point) as a view that broadcasts against `elements`."""
        if scale.ndim == 1:
            scale = scale.unsqueeze(1)
        return scale[self.grid_rows, self.grid_columns].unsqueeze(1).unsqueeze(3)


def pieces(spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> Iterator[Piece]:
    """Cut a weight into pieces, so that what works on them needs scratch memory of one piece.

    Ragged edges of block quantization become pieces of their own, with smaller tiles: nothing is padded.
    """
    tile = tile_shape(spec, *shape)
    budget = _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS
    if spec.strategy is Strategy.TENSOR:
        step = max(1, budget // max(1, shape[1]))
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            yield Piece(rows, slice(0, shape[1]), (rows.stop - start, shape[1]), slice(0, 1), slice(0, 1))
        return
    across = max(1, budget // (tile[0] * tile[1]))
    down = max(1, budget // (tile[0] * min(across * tile[1], shape[1])))
    for rows, tile_rows, grid_rows in _spans(shape[0], tile[0], down):
        for columns, tile_columns, grid_columns in _spans(shape[1], tile[1], across):
            yield Piece(rows, columns, (tile_rows, tile_columns), grid_rows, grid_columns)


def _spans(size: int, tile: int, tiles: int) -> Iterator[tuple[slice, int, slice]]:
    """Spans of up to `tiles` whole tiles along one dimension, then the ragged rest: (elements, tile size, tiles)."""
    whole = size // tile
    for first in range(0, whole, tiles):
        last = min(first + tiles, whole)
        yield slice(first * tile, last * tile), tile, slice(first, last)
    if size % tile:
        yield slice(whole * tile, size), size % tile, slice(whole, whole + 1)
