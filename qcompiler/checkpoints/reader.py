"""Lazy, validated reading of a safetensors checkpoint folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

import torch

from qcompiler.checkpoints.header import TensorMeta, parse_object, read_header
from qcompiler.errors import CheckpointError, did_you_mean

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_INDEX = 100_000_000  # bytes; the index of a 700B mixture of experts takes 9 MB
_CHUNK = 16 << 20  # bytes in flight while copying
_SAMPLES = 8  # places in each tensor that its fingerprint sees, from the first byte to the last
_SAMPLE = 512  # bytes at each
_PLAIN_NAME = re.compile(r"[^/\\\0]{1,243}\.safetensors")  # 255 bytes are the longest that file systems take
_PICKLED = re.compile(r"(pytorch_model|model|consolidated)\b.*\.(bin|pt|pth|ckpt)(\.index\.json)?")
"""Weights as they are pickled: `pytorch_model-00001-of-00002.bin`. Not `training_args.bin`, not `optimizer.pt`."""


class TensorSource(Protocol):
    """Named tensors that are read one by one: a checkpoint's files, or the weights of a loaded model."""

    tensors: Mapping[str, TensorMeta]

    @property
    def origin(self) -> str:
        """Where the tensors come from, for errors."""

    def meta(self, key: str) -> TensorMeta:
        """Dtype, shape, size and place of a tensor. Raises `CheckpointError` for an unknown key."""

    def read(self, key: str) -> torch.Tensor:
        """The tensor, in memory of its own."""

    def bytes_at(self, key: str, start: int, count: int) -> bytes:
        """`count` bytes of a tensor from its byte `start` on, or as many as it has from there."""

    def copy_bytes(self, key: str, write: Callable[[bytes], object]) -> None:
        """Hand the tensor's bytes to `write`, a few MiB at a time."""

    def same_bytes(self, key: str, other: str) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte."""

    def close(self) -> None:
        """Let go of the tensors."""


def fingerprint(source: TensorSource) -> str:
    """SHA-256 over names, dtypes and shapes of all tensors, and of each 512 bytes at eight places: all of 4 KiB.

    Tells checkpoints apart without reading them whole. It does not see an edit of single values or rows that lies
    between those places; training changes a tensor everywhere. It depends neither on where the files are, nor on when
    they were written, nor on how tensors are spread over them.
    """
    digest = hashlib.sha256()
    for key, meta in sorted(source.tensors.items()):
        digest.update(f"{key}\0{meta.dtype}\0{list(meta.shape)}\0".encode())
        last = max(0, meta.nbytes - _SAMPLE)
        for start in sorted({last * place // (_SAMPLES - 1) for place in range(_SAMPLES)}):
            digest.update(source.bytes_at(key, start, _SAMPLE))
    return digest.hexdigest()


class CheckpointReader:
    """The tensors of a local checkpoint, by their names on disk.

    Every header is checked when the reader is opened; a tensor's bytes are read when they are asked for, straight into
    the tensor's own memory: files are not mapped, so resident memory is what the caller keeps and nothing else.
    Close it, or use it as a context manager.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorMeta], files: Mapping[Path, int]) -> None:
        self.folder = folder
        self.tensors: Mapping[str, TensorMeta] = MappingProxyType(dict(tensors))
        self._files = dict(files)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder with `model.safetensors`, or with an index and its shards.

        Raises `CheckpointError` when files are missing, damaged or contradict each other.
        """
        files: dict[Path, int] = {}
        try:
            return cls(folder, _read_headers(folder, files), files)
        except BaseException:
            _close(files)
            raise

    @property
    def origin(self) -> str:
        """The folder."""
        return str(self.folder)

    def meta(self, key: str) -> TensorMeta:
        """Dtype, shape, size and place of a tensor. Raises `CheckpointError` with near names."""
        try:
            return self.tensors[key]
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: there is no tensor {key!r}{did_you_mean(key, self.tensors)}",
                hint="use the names in the checkpoint's files",
            ) from None

    def read(self, key: str) -> torch.Tensor:
        """The tensor, in its dtype on disk, in memory of its own."""
        meta = self.meta(key)
        data = torch.empty(meta.nbytes, dtype=torch.uint8)
        if meta.nbytes:
            view = data.numpy().data
            self._each_chunk(meta, lambda fd, start, stop: os.preadv(fd, [view[start:stop]], meta.offset + start))
        return data.view(meta.dtype).reshape(meta.shape)

    def bytes_at(self, key: str, start: int, count: int) -> bytes:
        """`count` bytes of a tensor from its byte `start` on, or as many as it has from there."""
        meta = self.meta(key)
        return os.pread(self._fd(meta), max(0, min(count, meta.nbytes - start)), meta.offset + start)

    def copy_bytes(self, key: str, write: Callable[[bytes], object]) -> None:
        """Hand the tensor's bytes to `write`, a few MiB at a time."""
        meta = self.meta(key)

        def pump(fd: int, start: int, stop: int) -> int:
            chunk = os.pread(fd, stop - start, meta.offset + start)
            write(chunk)
            return len(chunk)

        self._each_chunk(meta, pump)

    def same_bytes(self, key: str, other: str) -> bool:
        """Whether two tensors are equal in dtype, shape and every byte."""
        a, b = self.meta(key), self.meta(other)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        for start in range(0, a.nbytes, _CHUNK):
            size = min(_CHUNK, a.nbytes - start)
            if os.pread(self._fd(a), size, a.offset + start) != os.pread(self._fd(b), size, b.offset + start):
                return False
        return True

    def close(self) -> None:
        """Close the files; reading afterwards raises `CheckpointError`."""
        _close(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _each_chunk(self, meta: TensorMeta, read: Callable[[int, int, int], int]) -> None:
        fd, start = self._fd(meta), 0
        while start < meta.nbytes:
            count = read(fd, start, min(start + _CHUNK, meta.nbytes))
            if count == 0:
                raise CheckpointError(
                    f"{meta.file}: the file ended while tensor {meta.key!r} was read: it changed since it was opened",
                    hint="do not write into a checkpoint while it is being compiled",
                )
            start += count

    def _fd(self, meta: TensorMeta) -> int:
        if meta.file not in self._files:
            raise CheckpointError(f"{meta.file}: the reader is closed", hint="read inside the `with` block")
        return self._files[meta.file]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor of an open source, to be copied byte for byte without becoming a `torch.Tensor` of its own."""

    reader: TensorSource
    key: str

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.meta(self.key).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.meta(self.key).shape

    def copy_bytes(self, write: Callable[[bytes], object]) -> None:
        """Hand the tensor's bytes to `write`, a few MiB at a time."""
        self.reader.copy_bytes(self.key, write)


def _read_headers(folder: Path, files: dict[Path, int]) -> dict[str, TensorMeta]:
    """Open the folder's shards into `files` and return what they hold, checked against the index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder", hint="give a local model folder or a hub id")
    if (folder / SINGLE_FILE).exists():
        return _open_shard(folder / SINGLE_FILE, files)
    if not (folder / INDEX_FILE).exists():
        raise _no_weights(folder)
    weight_map = read_index(folder / INDEX_FILE)
    tensors: dict[str, TensorMeta] = {}
    for name in sorted(set(weight_map.values())):
        for key, meta in _open_shard(folder / name, files).items():
            if key in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {key!r} is both in {tensors[key].file.name} and in {name}",
                    hint="save the model again: each tensor belongs in one shard",
                )
            tensors[key] = meta
    for key, name in weight_map.items():
        if key not in tensors or tensors[key].file.name != name:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: tensor {key!r} should be in {name}, and {name} does not have it",
                hint="index and shards are of different checkpoints: download both again",
            )
    return tensors


def read_index(file: Path) -> dict[str, str]:
    """What an index says: tensor -> file. Raises `CheckpointError` for one that is none, or that leaves the folder."""
    size = file.stat().st_size if file.is_file() else 0
    if not size:  # also what has no size, such as a pipe, of which nobody knows when reading ends
        raise CheckpointError(f"{file}: it is empty, or no file", hint="download the file again")
    if size > _MAX_INDEX:
        raise CheckpointError(
            f"{file}: an index of {size} bytes; at most {_MAX_INDEX} are read", hint="download the file again"
        )
    weight_map = parse_object(file.read_bytes(), file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: it has no weight_map", hint="download the file again")
    for key, name in weight_map.items():
        # Only the name is judged: the file itself may be a link, as all files are in the hub's cache.
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(
                f"{file}: tensor {key!r} is said to be in {str(name)[:200]!r}, which is not the plain name of a "
                "safetensors file in the same folder",
                hint="an index may only name files beside it: do not trust this checkpoint",
            )
    return weight_map


def _open_shard(file: Path, files: dict[Path, int]) -> dict[str, TensorMeta]:
    if not file.is_file():  # also keeps a named pipe from blocking `open`
        raise CheckpointError(f"{file}: the shard is missing", hint="download the file again")
    try:
        files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}", hint="make the file readable") from error
    return read_header(files[file], file)


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights, in files that are read or in pickles that are not."""
    return any(path.match("*.safetensors*") or _PICKLED.fullmatch(path.name) for path in folder.glob("*"))


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    stray = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if _PICKLED.fullmatch(name)]
    wanted = f"{folder}: there is neither {SINGLE_FILE} nor {INDEX_FILE}"
    if {"adapter_model.safetensors", "adapter_model.bin"} & set(names):
        return CheckpointError(f"{wanted}: this is an adapter", hint="merge the adapter into its base model first")
    if stray:
        hint = "download the index too, or rename a single file"
        return CheckpointError(f"{wanted}, though there is {stray[0]}", hint=hint)
    if pickles:
        return CheckpointError(
            f"{wanted}, only the pickle {pickles[0]}: a pickle can run code, so only safetensors are read",
            hint="if you trust it, load it with Transformers and save_pretrained() it: that writes safetensors",
        )
    return CheckpointError(wanted, hint="give a model folder, or a hub model that has safetensors")


def _close(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])
