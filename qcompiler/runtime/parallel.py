"""Independent pieces of work side by side: on a CPU each on one core, elsewhere one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self, TypeVar

import torch

from qcompiler.runtime.memory import trim_memory

T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")


class Workers:
    """The threads of a sweep: as many as torch has, on a CPU, and none elsewhere. Use it as a context manager.

    They last, for each new thread may bring the allocator to keep one more heap.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    @property
    def count(self) -> int:
        """How many pieces of work there are side by side."""
        return torch.get_num_threads() if self._device.type == "cpu" else 1

    @property
    def alone(self) -> bool:
        """Whether there is nothing to do side by side with."""
        return self.count == 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """For a stretch of work, after which torch's number of threads is what it was; none goes on where it fails."""
        threads = torch.get_num_threads()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads)
        try:
            yield
        except BaseException:
            self.__exit__()
            raise
        finally:
            torch.set_num_threads(threads)
            trim_memory()  # what the threads' own heaps keep

    def submit(self, work: Callable[[T], R], item: T) -> Future[R]:
        """Begin `work(item)`, within `busy`, as soon as a thread is free."""
        assert self._pool is not None
        return self._pool.submit(_by_itself, work, item)


def _by_itself(work: Callable[[T], R], item: T) -> R:
    torch.set_num_threads(1)  # each time: one of the libraries below torch has one number for all threads
    return work(item)


def in_parallel(
    work: Callable[[T], R], items: Sequence[T], *, workers: Workers, size: Callable[[T], int] = lambda item: 0
) -> list[R]:
    """`[work(item) for item in items]`, as many at a time as torch has threads.

    On a CPU each item is computed by one thread, but for one that is alone. Torch's own parallelism meets at a barrier
    after every small operation, which costs more than it gains, and much more on a machine that does other work
    besides; also, what one thread computes does not depend on how many there are. Large items (by `size`) are begun
    first. Torch's number of threads is restored. Raises what the first item that fails raised, in the order in which
    they are begun.
    """
    if workers.alone or len(items) < 2:
        return [work(item) for item in items]
    with workers.busy():
        largest_first = sorted(range(len(items)), key=lambda index: -size(items[index]))
        begun = {index: workers.submit(work, items[index]) for index in largest_first}
        found = {index: ready.result() for index, ready in begun.items()}
        return [found[index] for index in range(len(items))]
