from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.checkpoints.header import DTYPES
from qcompiler.checkpoints.output import SWEPT, SweepFolder
from qcompiler.checkpoints.reader import CheckpointReader, RawTensor
from qcompiler.checkpoints.writer import CheckpointWriter, write_safetensors
from qcompiler.errors import CheckpointError
from qcompiler.tensors import tensor_bytes
from tests.disks import mounted

FINGERPRINT = {"inputs": {"model.safetensors": [10, "abc"]}, "pipeline": ["int4"], "version": "1"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    safetensors.torch.save_file({"x": torch.arange(1000)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin", ".hidden", "README.md", "LICENSE", "code.py"):
        (folder / name).write_text(name)
    return folder


def begin(output: Path, source: Path, **options: Any) -> CheckpointWriter:
    defaults = {"fingerprint": FINGERPRINT, "shards": 2, "predicted_bytes": 0}
    return CheckpointWriter.open(output, source=source, **{**defaults, **options})


def write_two(writer: CheckpointWriter) -> None:
    writer.add_shard(0, {"a": torch.ones(3)})
    writer.add_shard(1, {"b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(())})
    writer.finish({"config.json": "{}"})


def old_output(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "qcompiler.json").write_text("{}")
    return folder


def traces(folder: Path) -> set[str]:
    """What lies beside the source."""
    return {path.name for path in folder.iterdir()} - {"source"}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from([d for d in DTYPES.values() if d is not torch.bool]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = tensor_bytes(dtype, shape)
    values = bytearray(draw(st.binary(min_size=count, max_size=count)))
    return torch.frombuffer(values, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), tensors(), max_size=6))
def test_files_are_those_of_the_safetensors_library(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, torch.Tensor]
) -> None:
    values.pop("__metadata__", None)
    file = tmp_path_factory.getbasetemp() / "model.safetensors"
    write_safetensors(file, values)
    assert file.read_bytes() == safetensors.torch.save(values, {"format": "pt"})
    with CheckpointReader.open(file.parent) as reader:
        assert set(reader.tensors) == set(values)
        assert sum(m.nbytes for m in reader.tensors.values()) == sum(t.nbytes for t in values.values())
        for key, value in values.items():
            assert torch.equal(reader.read(key).flatten().view(torch.uint8), value.flatten().view(torch.uint8))
        write_safetensors(file.with_name("copy"), {key: RawTensor(reader, key) for key in values})
    assert file.with_name("copy").read_bytes() == file.read_bytes()


def test_strided_and_bool_tensors_are_written_in_order(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4)
    write_safetensors(tmp_path / "x", {"t": value.T, "s": value[:, 1], "e": value[:1].expand(2, 4), "b": value > 3})
    read = safetensors.torch.load_file(tmp_path / "x")
    assert torch.equal(read["t"], value.T)
    assert torch.equal(read["s"], value[:, 1])
    assert torch.equal(read["e"], value[:1].expand(2, 4))
    assert torch.equal(read["b"], value > 3)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.ones(1, device="meta"), "'x' has no values"),
        (torch.eye(2).to_sparse(), "'x' is torch.sparse_coo"),
        (torch.ones(1, dtype=torch.complex128), "'x': safetensors cannot store torch.complex128"),
    ],
)
def test_what_safetensors_cannot_store_is_refused_before_the_file_exists(
    tensor: torch.Tensor, match: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=match):
        write_safetensors(tmp_path / "f", {"x": tensor})
    assert not (tmp_path / "f").exists()


def test_shards_and_index_become_the_output_at_once(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    with CheckpointReader.open(source) as reader, begin(output, source) as writer:
        writer.add_shard(1, {"x": RawTensor(reader, "x")})
        writer.add_shard(0, {"a": torch.ones(3)})
        assert not output.exists()
        writer.finish({"config.json": "{}"}, companions=source)
    assert traces(tmp_path) == {"out"}
    assert {p.name for p in output.iterdir()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "code.py",
    }
    assert (output / "config.json").read_text() == "{}"
    assert json.loads((output / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 8012},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"},
    }
    with CheckpointReader.open(output) as reader:
        assert torch.equal(reader.read("x"), torch.arange(1000))


def test_one_shard_is_a_single_file(tmp_path: Path, source: Path) -> None:
    with begin(tmp_path / "a" / "out", source, shards=1) as writer:
        writer.add_shard(0, {"a": torch.ones(3)})
        writer.finish({"config.json": "{}"})
    assert {p.name for p in (tmp_path / "a" / "out").iterdir()} == {"model.safetensors", "config.json"}


def test_an_existing_output_is_refused_before_anything_is_done(tmp_path: Path, source: Path) -> None:
    old_output(tmp_path / "out")
    with pytest.raises(CheckpointError, match="the output exists"):
        begin(tmp_path / "out", source)
    assert traces(tmp_path) == {"out"}


def test_overwriting_replaces_the_folder_as_a_whole(tmp_path: Path, source: Path) -> None:
    (old_output(tmp_path / "out") / "stale.txt").write_text("")
    with begin(tmp_path / "out", source, overwrite=True) as writer:
        writer.add_shard(0, {"a": torch.ones(3)})
        assert (tmp_path / "out" / "config.json").read_text() == "old"
        writer.add_shard(1, {"b": torch.ones(3)})
        writer.finish({"config.json": "new"})
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert traces(tmp_path) == {"out"}


@pytest.mark.parametrize("lacking", ["config.json", "qcompiler.json"])
def test_only_a_folder_that_was_written_here_is_overwritten(lacking: str, tmp_path: Path, source: Path) -> None:
    home = old_output(tmp_path / "home")
    (home / lacking).rename(home / "thesis.tex")
    with pytest.raises(CheckpointError, match=f"no {lacking}, so qcompiler did not write it"):
        begin(home, source, overwrite=True)
    assert traces(tmp_path) == {"home"}


def test_an_empty_folder_may_be_overwritten(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    with begin(tmp_path / "out", source, overwrite=True) as writer:
        write_two(writer)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("where", "how"), [(".", "is"), ("sub", "lies inside"), ("..", "contains")])
def test_output_and_input_lie_apart(where: str, how: str, tmp_path: Path, source: Path) -> None:
    before = sorted(source.iterdir())
    with pytest.raises(CheckpointError, match=f"the output {how} the input"):
        begin(source / where, source, overwrite=True)
    assert sorted(source.iterdir()) == before


def test_a_link_to_the_input_is_still_the_input(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="the output is the input"):
        begin(tmp_path / "link", source, overwrite=True)


@pytest.mark.parametrize("existed", [False, True])
def test_an_exception_leaves_the_old_output_or_none(existed: bool, tmp_path: Path, source: Path) -> None:
    if existed:
        old_output(tmp_path / "out")

    def fail() -> None:
        with begin(tmp_path / "out", source, overwrite=True) as writer:
            writer.add_shard(0, {"a": torch.ones(3)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert traces(tmp_path) == ({"out"} if existed else set())
    assert not existed or (tmp_path / "out" / "config.json").read_text() == "old"


def test_no_tensor_and_no_shard_is_written_twice(tmp_path: Path, source: Path) -> None:
    with begin(tmp_path / "out", source) as writer:
        writer.add_shard(0, {"a": torch.ones(3)})
        with pytest.raises(CheckpointError, match="already written"):
            writer.add_shard(0, {})
        with pytest.raises(CheckpointError, match=r"'a' is already in model-00001"):
            writer.add_shard(1, {"a": torch.ones(1)})


def test_a_partial_folder_says_what_it_is_made_from(tmp_path: Path, source: Path) -> None:
    with begin(tmp_path / "out", source):
        said = json.loads((tmp_path / ".out.partial" / "fingerprint.json").read_text())
    assert said == {**FINGERPRINT, "shards": 2}


def test_a_folder_of_the_partial_folders_name_that_no_run_made_is_not_deleted(tmp_path: Path, source: Path) -> None:
    file = tmp_path / ".out.partial" / "thesis.tex"
    file.parent.mkdir()
    file.write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex, which no run left there"):
        begin(tmp_path / "out", source)
    assert file.read_text() == "years of work"


def test_two_runs_do_not_write_one_output(tmp_path: Path, source: Path) -> None:
    with begin(tmp_path / "out", source) as writer:
        with pytest.raises(CheckpointError, match="another run is writing it"):
            begin(tmp_path / "out", source)
        write_two(writer)
    assert traces(tmp_path) == {"out"}


def test_the_next_output_clears_what_killed_runs_left_for_one_another(tmp_path: Path, source: Path) -> None:
    swept = tmp_path / ".out.sweeps" / f"{SWEPT}layer-0.safetensors"
    swept.parent.mkdir()
    swept.write_text("solved")
    with begin(tmp_path / "out", source) as writer:
        write_two(writer)
    assert traces(tmp_path) == {"out"}


def test_what_a_run_leaves_for_the_next_is_not_cleared_while_it_is_held(tmp_path: Path, source: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    (folder.path / f"{SWEPT}layer-0.safetensors").write_text("solved")
    with begin(tmp_path / "out", source) as writer:
        write_two(writer)
    assert len(list(folder.path.iterdir())) == 1
    with pytest.raises(CheckpointError, match="another run is writing it"):
        SweepFolder(tmp_path / "out")
    folder.close()
    assert traces(tmp_path) == {"out"}


def test_a_folder_of_the_sweep_folders_name_that_no_run_made_is_not_deleted(tmp_path: Path, source: Path) -> None:
    file = tmp_path / ".out.sweeps" / "dust.jpg"
    file.parent.mkdir()
    file.write_text("a photograph")
    with pytest.raises(CheckpointError, match=r"holds dust\.jpg, which none left there"):
        SweepFolder(tmp_path / "out")
    with begin(tmp_path / "out", source) as writer:
        write_two(writer)
    assert file.read_text() == "a photograph"


def test_an_unfinished_checkpoint_is_not_published(tmp_path: Path, source: Path) -> None:
    with begin(tmp_path / "out", source) as writer:
        writer.add_shard(1, {"a": torch.ones(3)})
        with pytest.raises(CheckpointError, match=r"shards \[0\] are not written"):
            writer.finish({})
    assert traces(tmp_path) == set()


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, source: Path) -> None:
    with begin(tmp_path / "out", source) as writer:
        old_output(tmp_path / "out")
        with pytest.raises(CheckpointError, match="the output exists"):
            write_two(writer)
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_failing_exchange_puts_the_old_output_back(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_output(tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "checkpoint":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with begin(tmp_path / "out", source, overwrite=True) as writer, pytest.raises(CheckpointError, match="Permission"):
        write_two(writer)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert traces(tmp_path) == {"out"}


class Half(RawTensor):
    """A tensor of 400 kB whose writer is killed half way."""

    dtype, shape = torch.float32, (100_000,)

    def copy_bytes(self, write: Callable[[bytes], object]) -> None:
        write(bytes(200_000))
        die()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(moment: str, out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint in a process that is killed at a moment; a fork spares it the import of torch."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        return
    try:
        rename = Path.rename
        if moment == "exchange":
            monkeypatch.setattr(
                Path, "rename", lambda self, to: die() if self.name == "checkpoint" else rename(self, to)
            )
        if moment == "cleanup":
            monkeypatch.setattr(shutil, "rmtree", die)
        with begin(out, source, overwrite=True) as writer:
            writer.add_shard(0, {"a": torch.ones(3)})
            writer.add_shard(1, {"b": Half(None, "b") if moment == "shard" else torch.zeros(100_000)})
            writer.finish({"config.json": "new", "qcompiler.json": "{}"})
    finally:
        os._exit(1)


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("moment", ["shard", "exchange", "cleanup"])
def test_kill_9_leaves_the_old_output_or_the_new_and_a_later_run_succeeds(
    moment: str, existed: bool, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if existed:
        old_output(out)
    killed(moment, out, source, monkeypatch)
    if moment == "cleanup":
        assert (out / "config.json").read_text() == "new"
    elif moment == "shard":
        assert (out / "config.json").read_text() == "old" if existed else not out.exists()
    with begin(out, source, overwrite=True) as writer:  # puts the old output back if the kill fell between two renames
        if moment != "cleanup":
            assert (out / "config.json").read_text() == "old" if existed else not out.exists()
        write_two(writer)
    assert (out / "config.json").read_text() == "{}"
    assert traces(tmp_path) == {"out"}
    with CheckpointReader.open(out) as reader:
        assert set(reader.tensors) == {"a", "b", "c"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=4m") as folder:
        yield folder


def test_a_disk_too_small_is_refused_before_work_begins(small_disk: Path, source: Path) -> None:
    old_output(small_disk / "out")
    with pytest.raises(CheckpointError, match=r"10000000 more bytes are needed and \d+ are free"):
        begin(small_disk / "out", source, predicted_bytes=10_000_000, overwrite=True)
    assert traces(small_disk) == {"out"}


@pytest.mark.parametrize("predicted", [3_000_000, 4_000_000])
def test_a_disk_that_fills_up_leaves_the_old_output(predicted: int, small_disk: Path, source: Path) -> None:
    old_output(small_disk / "out")
    message = r"disk is full: 3000000 more bytes are needed and [12]\d{6} are free"
    with begin(small_disk / "out", source, predicted_bytes=predicted, overwrite=True) as writer:
        writer.add_shard(0, {"a": torch.zeros(250_000)})
        (small_disk / "neighbour").write_bytes(bytes(1_500_000))
        with pytest.raises(CheckpointError, match=message):
            writer.add_shard(1, {"b": torch.zeros(750_000)})
    assert (small_disk / "out" / "config.json").read_text() == "old"
    assert traces(small_disk) == {"out", "neighbour"}


def test_a_parent_that_is_no_folder_is_a_clean_error(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Not a directory|File exists"):
        begin(tmp_path / "file" / "out", source)
