from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qcompiler.runtime import memory
from qcompiler.runtime.memory import returning_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is glibc's allocator that is asked")


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def _kept_by_a_thread() -> float:
    """MiB that stay with the process after a thread made and freed five tensors of 10 MiB."""

    def work() -> None:
        tensors = [torch.ones(10 << 20, dtype=torch.uint8) for _ in range(5)]
        del tensors

    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.ones, 1).result()
        before = _anonymous()
        pool.submit(work).result()
        return _anonymous() - before


def test_large_tensors_of_other_threads_go_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ones(31 << 20, dtype=torch.uint8)  # from here on glibc would keep tensors up to this size in its heaps
    with returning_memory():
        assert _kept_by_a_thread() < 10
    assert _kept_by_a_thread() > 30, "nothing had to be done, so nothing was tested"


@pytest.mark.parametrize(
    ("name", "said", "stands"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1000000", True),
        ("MALLOC_TRIM_THRESHOLD_", "1000000", True),
        ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_threshold=1000000", True),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2", False),
        ("MALLOC_ARENA_MAX", "2", False),
    ],
)
def test_thresholds_that_the_user_chose_stand(
    name: str, said: str, stands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Watched:
        def mallopt(self, threshold: int, value: int) -> None:
            asked.append(threshold)

    for other in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, said)
    monkeypatch.setattr(memory, "_glibc", Watched)
    with returning_memory():
        pass
    assert len(asked) == (0 if stands else 4)


def test_thresholds_are_put_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, list[int]] = {}

    class Watched:
        def mallopt(self, threshold: int, value: int) -> None:
            asked.setdefault(threshold, []).append(value)

    monkeypatch.setattr(memory, "_glibc", Watched)
    with pytest.raises(KeyboardInterrupt), returning_memory():
        raise KeyboardInterrupt
    assert asked == {-3: [8 << 20, 32 << 20], -1: [8 << 20, 64 << 20]}
