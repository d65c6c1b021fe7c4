"""Dense bit packing: element i of a row lies at bit i * bits, least significant first, with no padding between."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

assert sys.byteorder == "little", "words are viewed as bytes, least significant first"

_PART_ELEMENTS = 2**20


def packed_words(count: int, bits: int) -> int:
    """How many 32-bit words `count` values of `bits` bits take."""
    return -(-count * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes (int8 [R, C]) of 2 to 8 bits along C into int32 [R, ceil(C * bits / 32)].

    A code q is stored as q + 2^(bits - 1). Values of 3, 5, 6 and 7 bits straddle words, as in compressed-tensors 0.18
    and later; the rest of a row's last word is zero.
    """
    rows, columns = codes.shape
    packed = codes.new_empty((rows, packed_words(columns, bits)), dtype=torch.int32)
    for part in _row_parts(rows, columns):
        # Modulo 2^8 this makes the codes unsigned, at 8 bits too.
        unsigned = codes[part].add(_offset(bits)).view(torch.uint8)
        if columns % 32:
            unsigned = pad(unsigned, (0, -columns % 32))
        dense = _narrow(_flat(unsigned), bits).view(len(unsigned), -1).view(torch.int32)
        packed[part] = dense[:, : packed.shape[1]]
    return packed


def unpack_words(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: int32 [R, words] to int8 codes [R, columns]."""
    rows, words = packed.shape
    codes = packed.new_empty((rows, columns), dtype=torch.int8)
    for part in _row_parts(rows, columns):
        padded = pad(packed[part], (0, -words % bits))
        unsigned = _widen(_flat(padded).view(torch.uint8), bits).view(len(padded), -1)[:, :columns]
        torch.sub(unsigned.view(torch.int8), _offset(bits), out=codes[part])
    return codes


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes (uint8 [R, C], C even) into uint8 [R, C / 2], the even column in the low nibble."""
    return _narrow(_flat(codes), 4).view(codes.shape[0], -1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return _widen(_flat(packed), 4).view(packed.shape[0], -1)


def _offset(bits: int) -> int:
    """2^(bits - 1), as an int8."""
    return 1 << (bits - 1) if bits < 8 else -128


def _row_parts(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows whose temporaries stay small."""
    step = max(1, _PART_ELEMENTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _flat(values: Tensor) -> Tensor:
    """One dimension of stride 1, so that neighbours can be viewed as wider or narrower integers.

    `contiguous` does not promise that: the stride of a dimension of size 1 may be anything.
    """
    return values.contiguous().view(-1)


def _narrow(values: Tensor, bits: int) -> Tensor:
    """Drop the zero top bits of flat uint8 values, a multiple of 8 of them."""
    if bits == 8:
        return values
    if bits == 4:
        pairs = values.view(torch.int16)
        # The cast to uint8 keeps the low byte.
        return (pairs | (pairs >> 4)).to(torch.uint8)
    if bits == 2:
        pairs = values.view(torch.int16)
        return _narrow((pairs | (pairs >> 6)).to(torch.uint8), 4)
    # Eight values fill `bits` bytes: close the gaps between neighbours, then between pairs, then between fours.
    eights = values.view(torch.int64)
    for lane, mask in _LANES:
        used = lane // 8 * bits
        eights = (eights & mask) | ((eights >> (lane - used)) & (mask << used))
    return eights.view(torch.uint8).view(-1, 8)[:, :bits].contiguous()


def _widen(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_narrow`: flat bytes to one value per byte."""
    if bits == 8:
        return packed
    if bits == 4:
        pairs = packed.to(torch.int16)
        return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)
    if bits == 2:
        pairs = _widen(packed, 4).to(torch.int16)
        return ((pairs | (pairs << 6)) & 0x0303).view(torch.uint8)
    eights = pad(packed.view(-1, bits), (0, 8 - bits)).view(torch.int64)
    for lane, mask in reversed(_LANES):
        used = lane // 8 * bits
        low = ((1 << used) - 1) * (mask // ((1 << lane) - 1))
        eights = (eights & low) | ((eights & (low << used)) << (lane - used))
    return eights.view(torch.uint8)


# Lane widths of the three merges, and the mask of every other lane.
_LANES = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))
