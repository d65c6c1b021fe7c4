"""Python's garbage collector while a model is traced."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Hold the garbage collector off, and at the end collect what became garbage meanwhile.

    Tracing makes objects by the hundred thousand. Each full collection that they set off goes through all that was ever
    imported, for a fifth of the time; at the end the young generations hold what was made here, and nothing else.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(1)
        if enabled:
            gc.enable()
