"""Activations wait in memory up to a limit and in a file beyond it, and come back as they were."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompiler import CalibrationSpec, compile
from qcompiler.errors import CheckpointError
from qcompiler.runtime import executor, shelf
from qcompiler.runtime.shelf import Shelf, Shelved
from qcompiler.runtime.stream import Stream
from tests.compile.tiny import (
    ATTENTION,
    EVERYWHERE,
    INT4,
    MLP,
    compile_tiny,
    pipeline,
    rule,
    save_tiny,
    stored,
    token_rows,
)

LARGE = (256, 1024)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "IN_MEMORY", 0)


def large(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_is_kept_comes_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = [large(seed, dtype) for seed in range(3)]
    turned = large(3, dtype).t()
    with Shelf(tmp_path / "output") as kept:
        places = [kept.put(value) for value in (*values, turned)]
        assert all(isinstance(place, Shelved) for place in places)
        for place, value in zip(places, (*values, turned), strict=True):
            assert torch.equal(kept.get(place), value)
            assert kept.get(place).dtype is dtype


def test_small_values_and_the_first_of_the_large_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "IN_MEMORY", large(0).nbytes)
    small = torch.ones(3)
    with Shelf(tmp_path / "output") as kept:
        value = large(0)
        first, second = kept.put(value), kept.put(large(1))
        assert kept.get(first) is value
        assert second.tensor is None
        assert kept.put(small) is small
        assert kept.put(7) == kept.get(7) == 7
        for other in (second, large(2), small, 7):  # what is not in memory, or was never put
            kept.drop(other)
            assert kept.in_memory == value.nbytes
        kept.drop(first)
        assert kept.in_memory == 0
        assert kept.put(value).tensor is value


def test_a_part_is_kept_without_what_it_is_a_part_of(tmp_path: Path) -> None:
    whole = large(0)
    with Shelf(tmp_path / "output") as kept:
        for part in (whole[:, :512], whole[0]):
            found = kept.get(kept.put(part))
            assert torch.equal(found, part)
            assert found.untyped_storage().nbytes() == part.nbytes
        assert kept.in_memory == whole[:, :512].nbytes
        spread = torch.ones(1).expand(LARGE)
        assert kept.put(spread) is spread, "which takes no room"


@pytest.mark.usefixtures("no_memory")
def test_the_place_of_what_is_dropped_is_used_again(tmp_path: Path) -> None:
    with Shelf(tmp_path / "output") as kept:
        places = [kept.put(large(seed)) for seed in range(2)]
        kept.drop(places[0])
        again = kept.put(large(2))
        assert again.offset == places[0].offset
        assert kept.put(large(3)).offset == 2 * large(0).nbytes
        assert torch.equal(kept.get(places[1]), large(1))
        assert torch.equal(kept.get(again), large(2))


@pytest.mark.usefixtures("no_memory")
def test_the_file_has_no_name_and_is_gone_in_the_end(tmp_path: Path) -> None:
    with Shelf(tmp_path / "new" / "output") as kept:
        kept.put(large(0))
        assert not list((tmp_path / "new").iterdir())
        assert kept._file is not None
        number = kept._file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.usefixtures("no_memory")
def test_a_full_disk_is_told_with_the_output_and_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Shelf(tmp_path / "output") as kept:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"output: the disk is full: 524288 more bytes are needed") as caught:
            kept.put(large(0))
    assert "another disk" in str(caught.value.hint)


def test_a_disk_that_is_too_small_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    chosen = pipeline(rule(EVERYWHERE, INT4, solver="gptq"))
    monkeypatch.setattr(shelf, "IN_MEMORY", 0)
    monkeypatch.setattr(Stream, "run", None)
    monkeypatch.setattr(shelf, "free_bytes", lambda path: 200_000)
    said = (
        r"activations that wait for the next layer need \d+ bytes on its disk beside the \d+ of the output, and 200000"
    )
    with pytest.raises(CheckpointError, match=said) as caught:
        compile_tiny(source, tmp_path / "output", chosen)
    assert str(caught.value.hint).startswith("use fewer or shorter samples")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.fixture
def planned(no_memory: None, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """What a shelf was planned to need, and how long its file became, write by write."""
    needed: list[int] = []
    ends: list[int] = []
    check, write = Shelf.check, Shelf._write

    def noting(self: Shelf, size: int, others: int) -> None:
        needed.append(size)
        check(self, size, others)

    def writing(self: Shelf, tensor: Tensor) -> Shelved:
        place = write(self, tensor)
        ends.append(self._end)
        return place

    monkeypatch.setattr(shelf, "_SMALL", 1)
    monkeypatch.setattr(Shelf, "check", noting)
    monkeypatch.setattr(Shelf, "_write", writing)
    return needed, ends


GPTQ = pipeline(rule(EVERYWHERE, INT4, solver="gptq"))


def test_what_waits_is_what_is_planned_for(tmp_path: Path, planned: tuple[list[int], list[int]]) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    sampling = CalibrationSpec(sequence_length=32, samples=32, batch_tokens=32)
    compile(source, pipeline=GPTQ, output=tmp_path / "output", calibration=token_rows(32), sampling=sampling)
    (needed,), ends = planned
    assert needed <= max(ends) <= 1.05 * needed  # one batch of 32 has both what it read and what it made


def test_masks_of_many_lengths_are_planned_for(tmp_path: Path, planned: tuple[list[int], list[int]]) -> None:
    """One of Gemma's two masks waits: that of a window. The causal one need not."""
    source = save_tiny(tmp_path / "source", "gemma3_text", max_position_embeddings=512)
    lengths = range(200, 320, 20)
    rows = [row for length in lengths for row in token_rows(1, length)]
    sampling = CalibrationSpec(sequence_length=320, samples=len(rows), batch_tokens=320, packing=False)
    compile(source, pipeline=GPTQ, output=tmp_path / "output", calibration=rows, sampling=sampling)
    (needed,), ends = planned
    squares = sum(length**2 for length in lengths)
    assert needed - squares <= max(ends) <= 1.1 * needed  # places are not shared between lengths
    assert squares > 0.1 * needed


@pytest.mark.parametrize("rules", ["gptq", "static"])
def test_where_activations_wait_decides_about_no_byte(
    rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file everything does; in memory what is wide is computed again."""
    source = save_tiny(tmp_path / "source", "llama")
    chosen = {
        "gptq": pipeline(rule(EVERYWHERE, INT4, solver="gptq")),
        "static": pipeline(rule(ATTENTION, "FP8"), rule(MLP, "FP8"), kv_cache={"strategy": "tensor"}),
    }[rules]
    monkeypatch.setattr(shelf, "_SMALL", 1)
    found = {}
    for way in ("memory", "file"):
        with monkeypatch.context() as patch:
            patch.setattr(shelf, "IN_MEMORY", 0)
            if way == "memory":
                patch.setattr(executor, "shelf_for", lambda context: nullcontext())
            found[way] = stored(compile_tiny(source, tmp_path / way, chosen).output)
    assert found["memory"].keys() == found["file"].keys()
    for key, tensor in found["memory"].items():
        assert torch.equal(tensor.view(torch.uint8), found["file"][key].view(torch.uint8)), key
