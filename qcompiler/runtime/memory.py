"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return None
    return trim


def trim_memory() -> None:
    """Let the allocator return what it keeps of freed blocks, where it is glibc's: each of its threads keeps its own.

    Without it a long run holds more and more fragments of weights that are gone.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
