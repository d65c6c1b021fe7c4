"""A folder that appears whole or not at all.

Everything is made in `.NAME.partial` beside the output `NAME`, on the same file system:

    fingerprint.json   what the content is made from
    checkpoint/        becomes the output
    old/               the former output, only while the two are exchanged

`publish` renames the former output aside, renames the new one in and deletes the former. A process killed between the
two renames leaves both folders whole here, and the next `open` puts the former one back.

What runs over the data leave for one another is kept in `.NAME.sweeps`, until the last of them has ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from qcompiler.errors import CheckpointError

PROVENANCE = "qcompiler.json"
"""Says how a checkpoint was compiled. Only a folder that has it may be replaced: we wrote it."""

SWEPT = "swept-"
"""What the names of files begin with that one run over the data leaves to the next."""


class PartialFolder:
    """The partial folder of one output, locked against other runs. Made by `open`; ended by `publish` or `discard`."""

    def __init__(self, output: Path, root: Path, lock: int, overwrite: bool) -> None:
        self.output = output
        self.root = root
        self.content = root / "checkpoint"
        self._old = root / "old"
        self._lock = lock
        self._overwrite = overwrite

    @classmethod
    def open(
        cls,
        output: Path,
        *,
        source: Path,
        fingerprint: Mapping[str, Any],
        overwrite: bool = False,
    ) -> Self:
        """Begin an output; what a killed run left of it is deleted.

        source: the folder that is being compiled. Output and source must lie apart.
        fingerprint: JSON values that decide every byte of the output: input files, pipeline, versions.

        Raises `CheckpointError`, before anything is written, if the output exists and `overwrite` is not set, if it was
        not written by us, or if another run is writing it.
        """
        output = resolved(output)
        check_apart(output, source)
        root = output.parent / f".{output.name}.partial"
        with writing_to(output):
            root.mkdir(parents=True, exist_ok=True)
            folder = cls(output, root, _lock(root, output), overwrite)
            try:
                folder._settle()
                check_output(output, overwrite=overwrite)
                _clear_stale(output)
                folder._begin(fingerprint)
            except BaseException:
                folder.close()
                raise
        return folder

    def publish(self) -> None:
        """Exchange the output for `checkpoint/`, and delete all else. `checkpoint/` must be on stable storage."""
        with writing_to(self.output):
            check_output(self.output, overwrite=self._overwrite)  # it may have appeared since
            try:
                if self.output.exists():
                    self.output.rename(self._old)
                self.content.rename(self.output)
            except BaseException:
                self._settle()
                raise
            sync_folder(self.output.parent)
            self._remove()

    def discard(self) -> None:
        """Delete the partial folder; the output stays as it was."""
        with writing_to(self.output):
            self._settle()
            self._remove()

    def close(self) -> None:
        """Release the lock. A partial folder that holds anything stays."""
        if self._lock >= 0:
            if not any(self.root.iterdir()):
                self.root.rmdir()
            os.close(self._lock)
            self._lock = -1

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        ours = {self.content, self._old, self.root / "fingerprint.json", self.root / "fingerprint.draft"}
        if foreign := sorted(path.name for path in self.root.iterdir() if path not in ours):
            raise CheckpointError(
                f"{self.root} is where this output is made, and holds {foreign[0]}, which no run left there",
                hint="move that folder away, or choose another output",
            )
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.content.mkdir()
        file = self.root / "fingerprint.json"
        draft = file.with_suffix(".draft")  # the file appears whole
        draft.write_text(json.dumps(fingerprint, indent=2), encoding="utf-8")
        sync_file(draft)
        draft.rename(file)

    def _settle(self) -> None:
        """End an exchange that was cut short: the former output goes back if the new one did not arrive."""
        if not self._old.exists():
            return
        if self.output.exists():
            shutil.rmtree(self._old)
        else:
            self._old.rename(self.output)

    def _remove(self) -> None:
        try:
            shutil.rmtree(self.root)
        except OSError as error:
            warnings.warn(f"{self.root} could not be deleted ({error}); delete it by hand", stacklevel=3)
        os.close(self._lock)
        self._lock = -1


class SweepFolder:
    """An empty folder beside an output, locked against other runs; what a killed run left in it is deleted.

    Raises `CheckpointError` if another run holds it, or if it holds anything but weights.
    """

    def __init__(self, output: Path) -> None:
        output = resolved(output)
        self.path = output.parent / f".{output.name}.sweeps"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path, output)
        left = sorted(self.path.iterdir())
        if foreign := [file.name for file in left if not file.name.startswith(SWEPT)]:
            os.close(self._lock)
            raise CheckpointError(
                f"{self.path} is where runs over the data keep weights, and holds {foreign[0]}, which none left there",
                hint="move that folder away, or choose another output",
            )
        for file in left:
            file.unlink()

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _clear_stale(output: Path) -> None:
    """Delete what runs that were killed left for one another."""
    if (output.parent / f".{output.name}.sweeps").is_dir():
        with suppress(CheckpointError):  # this run's own, another's that goes on, or no run's
            SweepFolder(output).close()


@contextmanager
def writing_to(output: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an `OSError` into a `CheckpointError` about `output`. needed: bytes still to write, for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{output}: {error.strerror or error} ({error.filename or 'while writing'})",
                hint="choose an output folder that can be written",
            ) from error
        free = free_bytes(output)
        raise disk_full(output, needed, free) from error


def disk_full(output: Path, needed: int | None, free: int) -> CheckpointError:
    """The error of a disk that cannot hold `needed` more bytes."""
    wanted = "" if needed is None else f"{needed} more bytes are needed and "
    return CheckpointError(
        f"{output}: the disk is full: {wanted}{free} are free", hint="free space, or choose an output on another disk"
    )


def free_bytes(path: Path) -> int:
    """Bytes free on the file system of `path`, or of its nearest ancestor that exists."""
    return shutil.disk_usage(path if path.exists() else nearest_above(path)).free


def nearest_above(path: Path) -> Path:
    """The nearest ancestor of `path` that exists."""
    return next(above for above in path.absolute().parents if above.exists())


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on stable storage."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


sync_folder = sync_file  # a folder's fsync makes the names in it durable


def resolved(path: Path) -> Path:
    """Absolute, links followed but those that lead back to themselves, which `check_output` refuses."""
    return Path(os.path.realpath(path))


def check_apart(output: Path, source: Path) -> None:
    """Raise `CheckpointError` where one of the two folders is, or lies in, the other."""
    output, source = resolved(output), resolved(source)
    if output == source or output.is_relative_to(source) or source.is_relative_to(output):
        where = "is" if output == source else "lies inside" if output.is_relative_to(source) else "contains"
        raise CheckpointError(
            f"{output}: the output {where} the input folder {source}", hint="choose a folder apart from the input"
        )


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` where an output may not be written: what stands there may not be replaced, or the folder
    above lets nothing be made in it. Nothing is written.
    """
    output = resolved(output)  # `.` is always a mount point to Python 3.11
    with writing_to(output):
        above = nearest_above(output)
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))
        if output.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(output))
        if not output.exists():
            return
    if output.is_mount():
        raise CheckpointError(
            f"{output}: this is a mount point, which cannot be exchanged for a new folder",
            hint="choose a folder inside it",
        )
    if not output.is_dir():
        raise CheckpointError(f"{output}: a file of this name exists", hint="choose another output folder")
    if not overwrite:
        raise CheckpointError(
            f"{output}: the output exists",
            hint="choose another folder, or pass --overwrite (Python: overwrite=True) to replace it",
        )
    lacking = [name for name in ("config.json", PROVENANCE) if not (output / name).is_file()]
    if lacking and any(output.iterdir()):
        raise CheckpointError(
            f"{output}: it has no {lacking[0]}, so qcompiler did not write it and does not overwrite it",
            hint="choose another output folder, or delete this one yourself",
        )


def _lock(root: Path, output: Path) -> int:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        held = root.exists() and os.path.samestat(os.fstat(fd), root.stat())
    except BlockingIOError:
        held = False
    if not held:
        os.close(fd)
        raise CheckpointError(f"{output}: another run is writing it", hint="wait for it, or choose another output")
    return fd
