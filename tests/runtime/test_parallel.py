"""Work side by side: results in order, what is used up is let go of, and failures leave nothing behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, sleep

import pytest
import torch

from qcompiler.runtime.parallel import Workers, in_parallel, in_parallel_parts

CPU = torch.device("cpu")


@dataclass(eq=False)
class Part:
    """Something large; it does not outlive its work."""

    item: int
    number: int


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


def parts(item: int) -> list[Part]:
    return [Part(item, number) for number in range(3)]


def test_results_come_in_the_order_of_the_items(threads: int, workers: Workers) -> None:
    def work(part: Part) -> tuple[int, int]:
        sleep(0.002 * (5 - part.item))
        return part.item, part.number

    found = in_parallel_parts(parts, work, range(5), workers=workers)
    assert found == [(item, number) for item in range(5) for number in range(3)]
    assert in_parallel(lambda item: -item, range(5), workers=workers, size=lambda item: item) == [
        0,
        -1,
        -2,
        -3,
        -4,
    ]
    assert in_parallel_parts(parts, work, (), workers=workers) == []


@pytest.mark.usefixtures("threads")
def test_a_part_is_gone_once_it_is_done(workers: Workers) -> None:
    """The parts of an item are alive together; the first is not when the last is worked on, nor any of item 0 later."""
    seen: list[weakref.ref[Part]] = []

    def work(part: Part) -> bool:
        if (part.item, part.number) != (1, 2):
            seen.append(weakref.ref(part))
            return True
        patience = monotonic() + 5
        while len(seen) < 5 or any(part() is not None for part in seen):
            if monotonic() > patience:
                return False
            sleep(0.001)
        return True

    assert all(in_parallel_parts(parts, work, range(2), workers=workers))


@pytest.mark.parametrize("fails", ["prepare", "work"])
def test_the_first_failure_is_raised_and_what_was_not_begun_never_is(
    fails: str, threads: int, workers: Workers
) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def prepare(item: int) -> list[int]:
        if fails == "prepare" and item == 1:
            raise ValueError("item 1")
        return [1000 * item + number for number in range(400)]

    def work(part: int) -> None:
        with lock:
            begun.append(part)
        if fails == "work" and part == 0:
            raise ValueError("part 0")
        sleep(0.05 if threads > 1 else 0)  # to begin half of them would take seconds, however busy the machine is

    with pytest.raises(ValueError, match="item 1" if fails == "prepare" else "part 0"):
        in_parallel_parts(prepare, work, range(4 if fails == "prepare" else 1), workers=workers)
    assert len(begun) <= (400 if fails == "prepare" else 200)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="item 1" if fails == "prepare" else "part 0"):
        in_parallel(lambda item: prepare(item) if fails == "prepare" else work(item), range(3), workers=workers)
    assert torch.get_num_threads() == threads
