"""Python's garbage collector is held off where objects are made that stay, and is afterwards as it was."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from qcompiler.collector import collector_paused, imports_kept


class Cycle:
    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def _as_in_any_process() -> Iterator[None]:
    """The collector as Python has it: the whole run of tests has set it otherwise."""
    before = gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)
    gc.collect()
    gc.freeze()


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """The generation of every collection that sets in by itself or is asked for."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    yield generations
    gc.callbacks.remove(note)


def living() -> int:
    return sum(type(thing) is Cycle for thing in gc.get_objects())


def test_what_became_garbage_in_a_pause_is_collected_at_its_end(collected: list[int]) -> None:
    with collector_paused():
        for _ in range(5000):
            Cycle()
        assert not gc.isenabled()
        assert living() == 5000
        assert collected == []
    assert gc.isenabled()
    assert living() == 0
    assert collected == [1]


def test_no_full_collection_is_due_after_pauses(collected: list[int]) -> None:
    kept = []
    for _ in range(12):  # more collections than are waited for, and of more than a quarter of what there was
        with collector_paused():
            kept.append([[] for _ in range(len(gc.get_objects()) // 20)])
    kept.append([[] for _ in range(5000)])
    assert 0 in collected, "it runs again"
    assert 2 not in collected


def test_a_pause_within_another_does_not_end_it() -> None:
    with collector_paused():
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_pause_ends_with_an_error() -> None:
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_what_a_caller_froze_stays_frozen() -> None:
    mine = Cycle()
    gc.freeze()
    for _ in range(12):  # until a full collection would be due
        with collector_paused():
            pass
    assert not any(thing is mine for thing in gc.get_objects()), "what is frozen is in no generation"


def test_what_is_imported_for_a_command_is_not_looked_through_again() -> None:
    with imports_kept():
        assert not gc.isenabled()
        module = Cycle()
    assert gc.isenabled()
    assert not any(thing is module for thing in gc.get_objects())


def test_a_command_makes_no_full_collection() -> None:
    code = (
        "import gc, sys\nfrom qcompiler.cli import main\nseen = []\n"
        "gc.callbacks.append(lambda phase, info: seen.append(info['generation']))\n"
        "sys.argv = ['qcompiler', 'plan', 'no/such/model', '--pipeline', 'int4-int8']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "assert 'torch' in sys.modules\nassert 2 not in seen"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
