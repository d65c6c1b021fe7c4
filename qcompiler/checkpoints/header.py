"""The header of a safetensors file: parsed with distrust, written byte for byte as the safetensors library does.

Layout (the safetensors README): 8 bytes of little-endian header length, a JSON object padded with
spaces to a multiple of 8, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from qcompiler.errors import CheckpointError
from qcompiler.tensors import Spec, tensor_bytes

# In the library's order of rank: a file holds its tensors from the last dtype to the first, then by name.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

_MAX_HEADER = 100_000_000  # the library's own limit, in bytes
_MAX_VALUES = 5_000_000  # of a JSON text: half a million tensors; parsed, they take some hundred MB
_MAX_DIMS = 64  # torch's own limit: keeps the product of a hostile shape small
_MAX_DIM = 2**63


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """One tensor of a safetensors file: `nbytes` bytes that start `offset` bytes into `file`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


def write_order(tensors: Mapping[str, Spec]) -> list[str]:
    """Names in the order in which their bytes lie in a file: wide dtypes first, so that every tensor is aligned."""
    return sorted(tensors, key=lambda name: (-_RANK.get(tensors[name][0], 0), name))


def encode_header(tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a file that holds `tensors` in `write_order`.

    Raises `CheckpointError` for a dtype that safetensors has no name for, or a header beyond the format's limit.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in write_order(tensors):
        dtype, shape = tensors[name]
        if dtype not in _NAME_OF:
            raise CheckpointError(
                f"tensor {name!r}: safetensors cannot store {dtype}", hint=f"store one of {', '.join(DTYPES)}"
            )
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": _NAME_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise CheckpointError(
            f"a shard of {len(tensors)} tensors needs a header of {len(text)} bytes; readers accept {_MAX_HEADER}",
            hint="split the partition into more shards",
        )
    return len(text).to_bytes(8, "little") + text


def read_header(fd: int, file: Path) -> dict[str, TensorMeta]:
    """Parse and check the header of the open safetensors file `fd` (`file` is its name in errors).

    Nothing but the header is read. Raises `CheckpointError` unless every tensor's dtype and shape give its length, and
    the tensors fill the rest of the file without gap or overlap.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little") if size >= 8 else 0
    if size < 8 or length > size - 8:
        _bad(file, f"the header claims {length} bytes and the file has {size}: it is truncated, or no safetensors file")
    if length > _MAX_HEADER:
        _bad(file, f"the header claims {length} bytes; the format allows {_MAX_HEADER}")
    entries = parse_object(os.pread(fd, length, 8), file)
    entries.pop("__metadata__", None)
    tensors = {key: _parse_entry(key, entry, file, 8 + length) for key, entry in entries.items()}
    end = 8 + length
    for meta in sorted(tensors.values(), key=lambda m: (m.offset, m.nbytes)):
        if meta.offset != end:
            kind = "overlaps the tensor before it" if meta.offset < end else "leaves a gap before it"
            _bad(file, f"tensor {meta.key!r} starts at byte {meta.offset}, not at {end}: it {kind}")
        end += meta.nbytes
    if end != size:
        kind = "is truncated" if size < end else "has bytes that no tensor owns"
        _bad(file, f"its tensors end at byte {end} and the file at byte {size}: it {kind}")
    return tensors


def parse_object(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys or NaN. Raises `CheckpointError` naming `file`."""
    check_values(text, file)
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _bad(file, f"its JSON cannot be parsed ({type(error).__name__}: {str(error)[:200]})")
    if not isinstance(value, dict):
        _bad(file, f"its JSON is a {type(value).__name__}, not an object")
    return value


def check_values(text: bytes, file: Path) -> None:
    """Raise `CheckpointError` for a JSON text of so many values that parsing it would fill the memory."""
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        _bad(file, f"its JSON holds more than {_MAX_VALUES} values")


def _parse_entry(key: str, entry: object, file: Path, data: int) -> TensorMeta:
    where = f"tensor {key!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _bad(file, f"{where} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _bad(file, f"{where} has the unknown dtype {str(entry['dtype'])[:40]!r} (known: {', '.join(DTYPES)})")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not _are_sizes(shape):
        _bad(file, f"{where} has the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets):
        _bad(file, f"{where} has the impossible data_offsets {str(offsets)[:80]}")
    meta = TensorMeta(key, dtype, tuple(shape), file, data + offsets[0])
    if offsets[1] - offsets[0] != meta.nbytes:
        _bad(
            file, f"{where} owns {offsets[1] - offsets[0]} bytes but {entry['dtype']} {list(shape)} takes {meta.nbytes}"
        )
    return meta


def _are_sizes(values: Iterable[object]) -> bool:
    return all(type(v) is int and 0 <= v < _MAX_DIM for v in values)


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _bad(file, f"{key!r} appears twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _bad(file: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{file}: {what}", hint="download the file again, or save the model again as safetensors")
