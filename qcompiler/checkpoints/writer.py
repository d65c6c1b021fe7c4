"""Streaming safetensors files, and a checkpoint made of them one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from qcompiler.checkpoints.companions import copy_companions
from qcompiler.checkpoints.header import encode_header, write_order
from qcompiler.checkpoints.manifest import Digester, FileDigest, digest_file
from qcompiler.checkpoints.output import (
    PROVENANCE,
    PartialFolder,
    disk_full,
    free_bytes,
    sync_file,
    sync_folder,
    writing_to,
)
from qcompiler.checkpoints.reader import INDEX_FILE, SINGLE_FILE, RawTensor
from qcompiler.errors import CheckpointError
from qcompiler.tensors import Spec, tensor_bytes

DiskTensor = torch.Tensor | RawTensor


def write_safetensors(file: Path, tensors: Mapping[str, DiskTensor]) -> FileDigest:
    """Write a safetensors file, byte for byte as the safetensors library would, and wait until it is on the disk.

    Returns the digest of what was handed to the disk: nothing is read again. Tensors may be of any device and stride;
    at most two are held as contiguous copies on the host. A `RawTensor` is copied from its file. Raises `OSError`, and
    `CheckpointError` for what safetensors cannot store.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and (tensor.is_meta or tensor.layout is not torch.strided):
            kind = "has no values (device meta)" if tensor.is_meta else f"is {tensor.layout}"
            raise CheckpointError(f"tensor {name!r} {kind}: it cannot be written", hint="load it, or make it dense")
    header = encode_header(specs, {"format": "pt"})  # loaders ask for this entry
    with Digester() as digester:
        with file.open("wb") as handle:

            def write(data: bytes | memoryview) -> None:
                digester.update(data)
                handle.write(data)

            write(header)
            for name in write_order(specs):
                tensor = tensors[name]
                if isinstance(tensor, RawTensor):
                    tensor.copy_bytes(write)
                else:
                    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                    write(flat.view(torch.uint8).numpy().data)
        sync_file(file)
        return digester.digest()


class CheckpointWriter:
    """A checkpoint folder in the making: shards in any order, then `finish`. Use it as a context manager.

    A shard is written under a draft name, synced, then renamed: what has a shard's name is whole. If the block ends
    without `finish` the partial folder is deleted; only a killed process leaves it.
    """

    def __init__(self, folder: PartialFolder, shards: int, predicted_bytes: int) -> None:
        self._folder = folder
        self._shards = shards
        self._predicted = predicted_bytes
        self._done = False
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._finished: set[int] = set()
        self._digests: dict[str, FileDigest] = {}
        free = free_bytes(folder.root)
        if predicted_bytes > free:
            raise disk_full(folder.output, predicted_bytes, free)

    @classmethod
    def open(
        cls,
        output: Path,
        *,
        source: Path,
        fingerprint: Mapping[str, Any],
        shards: int,
        predicted_bytes: int,
        overwrite: bool = False,
    ) -> Self:
        """Begin a checkpoint of `shards` files with `predicted_bytes` of tensors; see `PartialFolder.open`.

        Raises `CheckpointError` also if the disk has no room for it.
        """
        if shards < 1:
            raise CheckpointError(f"{output}: a checkpoint of {shards} shards", hint="write at least one shard")
        folder = PartialFolder.open(
            output,
            source=source,
            fingerprint={**fingerprint, "shards": shards},
            overwrite=overwrite,
        )
        try:
            return cls(folder, shards, predicted_bytes)
        except BaseException:
            folder.discard()
            raise

    def shard_file(self, index: int) -> Path:
        """Where shard `index` (from 0) lies until `finish`."""
        name = SINGLE_FILE if self._shards == 1 else f"model-{index + 1:05d}-of-{self._shards:05d}.safetensors"
        return self._folder.content / name

    def add_shard(self, index: int, tensors: Mapping[str, DiskTensor]) -> None:
        """Write shard `index`. Raises `CheckpointError` if a name is taken, or the disk is full."""
        if index in self._finished or not 0 <= index < self._shards:
            raise CheckpointError(f"{self.shard_file(index).name}: it is already written, or beyond the last shard")
        for name in tensors:
            if name in self._weight_map:
                raise CheckpointError(f"tensor {name!r} is already in {self._weight_map[name]}")
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        file = self.shard_file(index)
        draft = file.with_suffix(".draft")
        with writing_to(self._folder.output, max(self._predicted - self._bytes, _total(specs))):
            try:
                digest = write_safetensors(draft, tensors)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            draft.rename(file)
            sync_folder(file.parent)
        self._finished.add(index)
        self._digests[file.name] = digest
        self._weight_map |= dict.fromkeys(specs, file.name)
        self._bytes += _total(specs)

    def finish(
        self, files: Mapping[str, str], *, companions: Path | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write small files and make the folder the output.

        files: texts by file name: config.json and what else the compilation decides.
        companions: the folder whose tokenizer and other small files come along, save those that are written here.
        provenance: what qcompiler.json says beside the digests of all other files.
        """
        if lacking := sorted(set(range(self._shards)) - self._finished):
            raise CheckpointError(f"{self._folder.output}: shards {lacking} are not written")
        content = self._folder.content
        with writing_to(self._folder.output):
            copied = copy_companions(companions, content, without={*files, PROVENANCE}) if companions else []
            for name, text in files.items():
                (content / name).write_text(text, encoding="utf-8")
            small = [*copied, *(content / name for name in files)]
            if self._shards > 1:
                weight_map = dict(sorted(self._weight_map.items()))
                index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
                (content / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
                small.append(content / INDEX_FILE)
            if provenance is not None:
                digests = self._digests | {path.relative_to(content).as_posix(): digest_file(path) for path in small}
                entries = {name: asdict(digest) for name, digest in sorted(digests.items())}
                text = json.dumps({**provenance, "files": entries}, indent=2, default=str) + "\n"
                (content / PROVENANCE).write_text(text, encoding="utf-8")
                small.append(content / PROVENANCE)
            for path in {*small, *(path.parent for path in small), content}:
                sync_file(path)
        self._folder.publish()
        self._done = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self._folder.discard()


def _total(specs: Mapping[str, Spec]) -> int:
    return sum(tensor_bytes(*spec) for spec in specs.values())
