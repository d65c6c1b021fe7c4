from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qcompiler.checkpoints.header import DTYPES
from qcompiler.checkpoints.hub import resolve_model
from qcompiler.checkpoints.reader import CheckpointReader, fingerprint, holds_weights
from qcompiler.errors import CheckpointError

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5)},
    "model-00002-of-00002.safetensors": {"c": torch.ones(3, dtype=torch.bfloat16), "d": torch.zeros(0, 4)},
}


def sharded(folder: Path, **weight_map: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in SHARDS.items():
        save_file(tensors, folder / name)
    right = {key: name for name, tensors in SHARDS.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": right | weight_map}))
    return folder


def raw_file(folder: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    (folder / "model.safetensors").write_bytes(content)
    return folder


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointReader.open(folder)
    assert caught.value.hint
    assert str(folder) in caught.value.message


def test_shards_are_read_as_they_were_saved(tmp_path: Path) -> None:
    with CheckpointReader.open(sharded(tmp_path)) as reader:
        assert set(reader.tensors) == {"a", "b", "c", "d"}
        for tensors in SHARDS.values():
            for key, value in tensors.items():
                read = reader.read(key)
                assert read.dtype == value.dtype
                assert torch.equal(read, value)
        meta = reader.meta("c")
        assert (meta.dtype, meta.shape, meta.nbytes) == (torch.bfloat16, (3,), 6)
        assert meta.file.name == "model-00002-of-00002.safetensors"


def test_every_dtype_is_read(tmp_path: Path) -> None:
    tensors = {
        name: torch.arange(16, dtype=torch.uint8).view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader.open(tmp_path) as reader:
        for name, value in tensors.items():
            assert reader.read(name).dtype == value.dtype
            assert torch.equal(reader.read(name).view(torch.uint8), value.view(torch.uint8))


def test_bytes_are_copied_as_they_lie(tmp_path: Path) -> None:
    value = torch.randn(3_000_000)  # more than one chunk
    save_file({"x": value, "y": value.clone(), "z": -value}, tmp_path / "model.safetensors")
    with CheckpointReader.open(tmp_path) as reader:
        chunks: list[bytes] = []
        reader.copy_bytes("x", chunks.append)
        assert b"".join(chunks) == value.numpy().tobytes()
        assert reader.same_bytes("x", "y")
        assert not reader.same_bytes("x", "z")
        assert torch.equal(reader.read("z"), -value)


def test_memory_does_not_grow_with_the_number_of_tensors_read(tmp_path: Path) -> None:
    """Resident memory, file pages included. The first tensors settle the allocator; 256 MiB later it is the same."""
    save_file({f"l{i}": torch.ones(1 << 20) for i in range(96)}, tmp_path / "model.safetensors")
    code = """
import sys
from pathlib import Path
from qcompiler.checkpoints.reader import CheckpointReader
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) >> 10
with CheckpointReader.open(Path(sys.argv[1])) as reader:
    for count, key in enumerate(reader.tensors):
        tensor = reader.read(key)
        tensor.sum()
        if count == 32:
            before = resident()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 16


def test_files_are_closed_and_then_refuse_to_read(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with CheckpointReader.open(sharded(tmp_path)) as reader:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(CheckpointError, match="closed"):
        reader.read("a")


def test_a_refused_checkpoint_leaves_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    refused(sharded(tmp_path, a="model-00002-of-00002.safetensors"), "does not have it")
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_of_a_hub_cache_are_links_and_are_followed(tmp_path: Path) -> None:
    sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    with CheckpointReader.open(snapshot) as reader:
        assert torch.equal(reader.read("b"), torch.arange(5))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors"])
def test_an_index_may_not_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    refused(sharded(tmp_path / "m", a=name), "tensor 'a' is said to be in .* not the plain name")


@pytest.mark.parametrize("name", [3, None, "x.bin", ["x.safetensors"]])
def test_an_index_names_safetensors_only(name: Any, tmp_path: Path) -> None:
    refused(sharded(tmp_path, a=name), "tensor 'a' is said to be in")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, r"model-00002-of-00002.safetensors: the shard is missing")


def test_a_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    file.unlink()
    file.symlink_to("../blobs/gone")
    refused(tmp_path, "the shard is missing")


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    file.unlink()
    os.mkfifo(file)
    refused(tmp_path, "the shard is missing")


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_a_truncated_shard_is_refused(keep: int, tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, r"00001-of-00002.safetensors: .*truncated")


def test_a_shard_without_an_indexed_tensor_is_refused(tmp_path: Path) -> None:
    refused(
        sharded(tmp_path, new="model-00001-of-00002.safetensors"),
        "'new' should be in model-00001-of-00002.safetensors, and",
    )


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, sharded(tmp_path) / "model-00002-of-00002.safetensors")
    refused(tmp_path, "'a' is both in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"x": entry(shape=[3])}, bytes(8), r"'x' owns 8 bytes but F32 \[3\] takes 12"),
        ({"x": entry(shape=[2**40, 2**40])}, bytes(8), "'x' owns 8 bytes"),
        ({"x": entry(), "y": entry()}, bytes(8), "'y' starts at byte .* overlaps"),
        ({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12), "'y' .* overlaps"),
        ({"x": entry(), "y": entry(offsets=[16, 24])}, bytes(24), "'y' .* leaves a gap"),
        ({"x": entry(offsets=[8, 16])}, bytes(16), "'x' .* leaves a gap"),
        ({"x": entry()}, bytes(7), "it is truncated"),
        ({"x": entry()}, bytes(9), "bytes that no tensor owns"),
        ({"x": entry(offsets=[8, 0])}, bytes(8), "'x' owns -8 bytes"),
        ({"x": entry(offsets=[-8, 0])}, bytes(8), "'x' has the impossible data_offsets"),
        ({"x": entry(offsets=[0, 8.0])}, bytes(8), "'x' has the impossible data_offsets"),
        ({"x": entry(shape=[True, 2])}, bytes(8), "'x' has the impossible shape"),
        ({"x": entry(shape=[-2, -1])}, bytes(8), "'x' has the impossible shape"),
        ({"x": entry(shape=[1] * 65)}, bytes(8), "'x' has the impossible shape"),
        ({"x": entry(shape=[10**300] * 3)}, bytes(8), "'x' has the impossible shape"),
        ({"x": entry(dtype="F31")}, bytes(8), "'x' has the unknown dtype 'F31'"),
        ({"x": entry(dtype=["F32"])}, bytes(8), "'x' has the unknown dtype"),
        ({"x": {"dtype": "F32"}}, bytes(8), "'x' is not described by"),
        ({"x": 3}, b"", "'x' is not described by"),
        ([1], b"", "is a list, not an object"),
        (b'{"x": ', b"", "cannot be parsed"),
        (b'{"x": NaN}', b"", "cannot be parsed"),
        (b"\xff\xfe{}", b"", "cannot be parsed"),
        (b'{"x": 1, "x": 2}', b"", "'x' appears twice"),
        (b'{"x": ' + b"9" * 5000 + b"}", b"", "cannot be parsed"),
        (b"[" * 200_000, b"", "cannot be parsed"),
        (b'{"x":' * 200_000, b"", "cannot be parsed"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, data: bytes, match: str, tmp_path: Path) -> None:
    refused(raw_file(tmp_path, header, data), match)


@pytest.mark.parametrize("length", [2**63, 2**40, 101_000_000])
def test_a_giant_header_is_refused_unread(length: int, tmp_path: Path) -> None:
    raw_file(tmp_path, b"{}", length=length)
    os.truncate(tmp_path / "model.safetensors", 200_000_000)  # sparse
    refused(tmp_path, f"the header claims {length} bytes")


def test_a_giant_index_is_refused_unread(tmp_path: Path) -> None:
    os.truncate(sharded(tmp_path) / "model.safetensors.index.json", 200_000_000)
    refused(tmp_path, "an index of 200000000 bytes")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "index.json: ")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "there is neither"),
        (["pytorch_model.bin"], r"pickle can run code, so only safetensors(.|\n)*save_pretrained"),
        (["consolidated.00.pth", "config.json"], "only the pickle consolidated.00.pth"),
        (["model-00001-of-00002.safetensors"], "download the index"),
        (["adapter_model.safetensors"], "merge the adapter"),
        (["adapter_model.bin"], "merge the adapter"),
        (["training_args.bin", "optimizer.pt", "rng_state.pth"], "model.safetensors.index.json\n  hint: give a model"),
    ],
)
def test_a_folder_without_weights_says_what_to_do(files: list[str], match: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "there is neither model.safetensors nor")
    with pytest.raises(CheckpointError, match=match):
        CheckpointReader.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("pytorch_model-00002-of-00002.bin", True),
        ("pytorch_model.bin.index.json", True),
        ("consolidated.00.pth", True),
        ("training_args.bin", False),
        ("optimizer.bin", False),
        ("scheduler.pt", False),
        ("config.json", False),
    ],
)
def test_only_what_holds_weights_counts_as_weights(name: str, holds: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert holds_weights(tmp_path) is holds


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no such folder")


@pytest.mark.parametrize("place", [0, 1024 * 300, 1024 * 512, 1024 * 1024 - 1])
def test_a_fingerprint_samples_a_tensor_from_end_to_end(place: int, tmp_path: Path) -> None:
    """A region of a tenth of a tensor that changes is seen, wherever it lies; where the file is, is not."""
    values = torch.zeros(1024 * 1024, dtype=torch.uint8)
    found = []
    for name, changed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        copy = values.clone()
        copy[max(0, place - 100_000) : place + 100_000] = changed
        save_file({"x": copy, "empty": torch.zeros(0)}, tmp_path / name / "model.safetensors")
        with CheckpointReader.open(tmp_path / name) as reader:
            found.append(fingerprint(reader))
    assert found[0] == found[1] != found[2]


def test_an_unknown_key_is_an_error_with_near_names(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with CheckpointReader.open(tmp_path) as reader, pytest.raises(CheckpointError, match=r"'model.norm.weight'"):
        reader.read("model.nrm.weight")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1 << 20)}, tmp_path / "model.safetensors")
    with CheckpointReader.open(tmp_path) as reader:
        os.truncate(tmp_path / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match="ended while tensor 'x' was read"):
            reader.read("x")


def test_a_local_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["./none", "/no/such/folder", "a/b/c", "../x"])
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and it is not a hub id"):
        resolve_model(model)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="this is a file"):
        resolve_model(str(tmp_path / "x"))


def test_a_hub_model_offline_comes_from_the_cache_or_is_a_clean_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"owner/name@main: .* cannot be reached") as caught:
        resolve_model("owner/name", revision="main", cache_dir=tmp_path)
    assert "local folder" in (caught.value.hint or "")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    sharded(snapshot.parent.parent.parent / "x")
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "x").iterdir():
        file.rename(snapshot / file.name)
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    with CheckpointReader.open(resolve_model("owner/name", cache_dir=tmp_path)) as reader:
        assert len(reader.tensors) == 4
