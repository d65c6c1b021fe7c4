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
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    torch.ones(31 << 20, dtype=torch.uint8)  # from here on glibc would keep tensors up to this size in its heaps
    with returning_memory():
        assert _kept_by_a_thread() < 10
    assert _kept_by_a_thread() > 30, "nothing had to be done, so nothing was tested"


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_chose_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Untouchable:
        def mallopt(self, *_: int) -> None:
            pytest.fail("a threshold was set")

    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(memory, "_glibc", Untouchable)
    with returning_memory():
        pass
