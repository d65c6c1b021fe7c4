"""Python's garbage collector while many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Hold the garbage collector off, and at the end collect what became garbage meanwhile.

    Tracing and importing make objects by the hundred thousand. Each full collection that they set off goes through all
    that was ever imported, for a fifth of the time; at the end the young generations hold what was made here, and
    nothing else.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(1)
        if enabled and _is_near_full_collection() and not gc.get_freeze_count():  # what a caller froze stays frozen
            # All that this pair leaves behind is a count that starts anew: a full collection would be due at once.
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def _is_near_full_collection() -> bool:
    """Whether more than half of the collections have been made that one of everything waits for."""
    return gc.get_count()[2] > gc.get_threshold()[2] // 2


@contextmanager
def imports_kept() -> Iterator[None]:
    """Hold the garbage collector off while modules are imported, and have it pass over them ever after.

    For a command: in a process of its own nothing that is alive by then is ever given up. To collect while torch and
    transformers are imported takes half a second, in seven full collections.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
