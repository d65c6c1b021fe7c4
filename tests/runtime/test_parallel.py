"""Work side by side: results in order, and failures leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from time import sleep

import pytest
import torch

from qcompiler.runtime.parallel import Workers, in_parallel

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(CPU) as found:
        yield found


def test_results_come_in_the_order_of_the_items(threads: int, workers: Workers) -> None:
    def work(item: int) -> int:
        sleep(0.002 * (5 - item))
        return -item

    expected = [0, -1, -2, -3, -4]
    assert in_parallel(work, range(5), workers=workers) == expected
    assert in_parallel(work, range(5), workers=workers, size=lambda item: item) == expected
    assert in_parallel(work, (), workers=workers) == []


def test_the_first_failure_is_raised_and_what_was_not_begun_never_is(threads: int, workers: Workers) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> None:
        with lock:
            begun.append(item)
        if item == 0:
            raise ValueError("item 0")
        sleep(0.05 if threads > 1 else 0)  # to begin half of them would take seconds, however busy the machine is

    with pytest.raises(ValueError, match="item 0"):
        in_parallel(work, range(400), workers=workers)
    assert len(begun) <= 200
    assert torch.get_num_threads() == threads


def test_of_items_that_fail_the_one_that_was_begun_first_is_told_of(workers: Workers) -> None:
    def work(item: int) -> None:
        raise ValueError(f"item {item}")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="item 4"):
            in_parallel(work, range(5), workers=workers, size=lambda item: item)
    finally:
        torch.set_num_threads(before)
