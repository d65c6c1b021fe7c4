"""Independent pieces of work side by side: on a CPU each on one core, elsewhere one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from qcompiler.runtime.memory import trim_memory

T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")


def in_parallel(
    work: Callable[[T], R], items: Sequence[T], *, device: torch.device, size: Callable[[T], int] = lambda item: 0
) -> list[R]:
    """`[work(item) for item in items]`, as many at a time as torch has threads.

    On a CPU each item is computed by one thread, but for one that is alone. Torch's own parallelism meets at a barrier
    after every small operation, which costs more than it gains, and much more on a machine that does other work
    besides; also, what one thread computes does not depend on how many there are. Large items (by `size`) are begun
    first. Torch's number of threads is restored. Raises what the first failing item raised.
    """
    if _alone(device) or len(items) < 2:
        return [work(item) for item in items]
    order = sorted(range(len(items)), key=lambda index: -size(items[index]))
    with _one_thread_each() as pool:
        results = dict(zip(order, pool.map(lambda index: work(items[index]), order), strict=True))
    return [results[index] for index in range(len(items))]


def in_parallel_parts(
    prepare: Callable[[T], Sequence[P]], work: Callable[[P], R], items: Sequence[T], *, device: torch.device
) -> list[R]:
    """`[work(part) for item in items for part in prepare(item)]`, side by side as in `in_parallel`.

    All items are prepared first, in order; the parts of each are begun as soon as it is, and threads are free. Nothing
    here keeps a part that is done.
    """
    if _alone(device):
        return [result for item in items for result in _used_up(work, deque(prepare(item)))]
    found: dict[int, list[Future[R]]] = {}
    with _one_thread_each() as pool:
        prepared = {pool.submit(prepare, item): index for index, item in enumerate(items)}
        try:
            while prepared:
                done = wait(prepared, return_when=FIRST_COMPLETED).done
                while done:
                    ready = done.pop()
                    found[prepared.pop(ready)] = [pool.submit(work, part) for part in ready.result()]
                    del ready  # it holds what was prepared
            return [part.result() for index in range(len(items)) for part in found[index]]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _used_up(work: Callable[[P], R], parts: deque[P]) -> Iterator[R]:
    while parts:
        yield work(parts.popleft())


def _alone(device: torch.device) -> bool:
    return device.type != "cpu" or torch.get_num_threads() == 1


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, and torch with one in each of them."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
        trim_memory()  # what the threads' own heaps keep
