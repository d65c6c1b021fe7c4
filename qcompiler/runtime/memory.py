"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Of mallopt(3).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGE = 8 << 20  # bytes: more than scratch, which is made again and again; less than weights and activations
# As far as glibc's own thresholds grow, and where they stand in a process that has freed a large tensor.
_GROWN = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_TUNABLES = ("glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold")


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt and library.gnu_get_libc_version else None
    except (OSError, AttributeError):  # another C library
        return None


def trim_memory() -> None:
    """Let the allocator return what it keeps of freed blocks, where it is glibc's: each of its threads keeps its own.

    Without it a long run holds more and more fragments of weights that are gone.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


@contextmanager
def returning_memory() -> Iterator[None]:
    """For as long as this lasts, large tensors go back to the system when they are freed, where glibc allocates.

    By itself it comes to take tensors of up to 32 MiB from heaps, one per thread, that keep up to 64 MiB each for later
    and hold weights among small blocks that outlive them: what a run peaks at then depends on chance, and chance has
    as many trials as there are partitions. The thresholds are the process's; afterwards they are as they would
    have become by themselves. Of two compilations at once, the first to end puts them back for both. Those that the
    user chose (in the environment) stand.
    """
    glibc = _glibc()
    if glibc is None or _chosen():
        yield
        return
    for threshold in _GROWN:
        glibc.mallopt(threshold, _LARGE)
    try:
        yield
    finally:
        for threshold, value in _GROWN.items():
            glibc.mallopt(threshold, value)


def _chosen() -> bool:
    """Whether the user has chosen one of the thresholds."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in _CHOICES) or any(name in tunables for name in _TUNABLES)
