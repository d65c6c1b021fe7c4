"""Independent pieces of work side by side: on a CPU each on one core, elsewhere one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from qcompiler.runtime.memory import trim_memory

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    work: Callable[[T], R], items: Sequence[T], *, device: torch.device, size: Callable[[T], int] = lambda item: 0
) -> list[R]:
    """`[work(item) for item in items]`, as many at a time as torch has threads.

    On a CPU each item is computed by one thread. Torch's own parallelism meets at a barrier after every small
    operation, which costs more than it gains, and much more on a machine that does other work besides; also, what one
    thread computes does not depend on how many there are. Large items (by `size`) are begun first. Torch's number of
    threads is restored. Raises what the first failing item raised.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    order = sorted(range(len(items)), key=lambda index: -size(items[index]))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = dict(zip(order, pool.map(lambda index: work(items[index]), order), strict=True))
    finally:
        torch.set_num_threads(threads)
        trim_memory()  # what the threads' own heaps keep
    return [results[index] for index in range(len(items))]
