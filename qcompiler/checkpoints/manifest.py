"""What the files of a checkpoint were when they were written: size and SHA-256, and whether they still are that."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qcompiler.checkpoints.quantized import DESCRIPTIONS
from qcompiler.errors import VerificationError

# What decides which numbers are computed: weights, their index, the config, and code that the model brings.
_DECISIVE = re.compile(r".*\.(safetensors|py)|.*\.index\.json|config\.json", re.IGNORECASE)
# What a loader takes besides, or in place of, what was written: some load every weight file that they find.
_INTRUDERS = re.compile(
    r".*\.(safetensors|bin|pt)|.*\.index\.json|(adapter_config|params)\.json|" + "|".join(map(re.escape, DESCRIPTIONS)),
    re.IGNORECASE,
)
_SHOWN = 5
_MISSING = "missing"


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file's size in bytes, and the SHA-256 of them in hexadecimal."""

    size: int
    sha256: str


class Digester:
    """The digest of bytes as they come, in a thread of its own: the disk need not wait. Use it as a context manager.

    At most one `update` is under way, so nothing piles up; its bytes must stay as they are until the next one.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._size = 0
        self._worker = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def update(self, data: bytes | memoryview) -> None:
        self._wait()
        self._size += len(data)
        self._under_way = self._worker.submit(self._hash.update, data)

    def digest(self) -> FileDigest:
        self._wait()
        return FileDigest(self._size, self._hash.hexdigest())

    def _wait(self) -> None:
        if self._under_way is not None:
            self._under_way.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown()


def digest_file(file: Path) -> FileDigest:
    """The digest of a file, read in small parts. Raises `OSError`."""
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256")
        return FileDigest(handle.tell(), found.hexdigest())


def check_files(folder: Path, written: Mapping[str, FileDigest]) -> tuple[str, ...]:
    """Compare a folder's files with what was written, by name relative to the folder; memory is constant.

    Returns the names of those that differ, but decide nothing of what is computed: templates may be edited. Raises
    `VerificationError` that names the others, files that are gone, and weight files that nobody wrote.
    """
    wrong = {name: why for name, digest in written.items() if (why := _difference(folder / name, digest)) is not None}
    decisive = [f"{n} ({why})" for n, why in wrong.items() if why == _MISSING or _DECISIVE.fullmatch(n)]
    if decisive:
        more = f" and {len(decisive) - _SHOWN} more" if decisive[_SHOWN:] else ""
        raise VerificationError(
            f"{folder}: not what was written: {', '.join(decisive[:_SHOWN])}{more}",
            hint="copy or download these files again; what was changed on purpose has to be compiled again",
        )
    strange = [path.name for path in folder.iterdir() if _INTRUDERS.fullmatch(path.name) and path.name not in written]
    if strange:
        raise VerificationError(
            f"{folder}: {', '.join(sorted(strange)[:_SHOWN])} was not written by the compilation, and loaders may take "
            "it for a part of the model",
            hint="move it out of this folder",
        )
    return tuple(sorted(wrong))


def _difference(file: Path, written: FileDigest) -> str | None:
    """How a file differs from what was written. The size is looked at first: a cut file is told without a read."""
    if not file.is_file():
        return _MISSING
    size = file.stat().st_size
    if size != written.size:
        return f"{size} bytes in place of {written.size}"
    return None if digest_file(file) == written else "other bytes: its SHA-256 differs"
