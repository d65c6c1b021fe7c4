"""A compiled checkpoint, and ways to damage a copy of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompiler
from qcompiler.errors import CheckpointError, VerificationError
from tests.compile.tiny import (
    ATTENTION,
    INT4,
    INT8_STATIC,
    MLP,
    compile_tiny,
    pipeline,
    provenance,
    restamp,
    rule,
    save_tiny,
)

Tensors = dict[str, Tensor]
Config = dict[str, Any]

QUERY = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of packed integers beside static ones, which verifies."""
    folder = tmp_path_factory.mktemp("sound")
    result = compile_tiny(
        save_tiny(folder / "source", "llama"),
        folder / "output",
        pipeline(rule(ATTENTION, INT4), rule(MLP, INT8_STATIC)),
    )
    assert qcompiler.verify(result.output).difference == 0
    return result.output


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "damaged"))


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrite every shard and its index, tensors changed in place of the mapping."""
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
    index_file.write_text(json.dumps(index))
    restamp(folder)


def change_config(folder: Path, change: Callable[[Config], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qcompiler.json").unlink()  # it says what was compiled: without it, config and weights speak


def refusal(folder: Path, **options: Any) -> str:
    """What `verify` says of a checkpoint that it refuses."""
    with pytest.raises((VerificationError, CheckpointError)) as caught:
        qcompiler.verify(folder, **options)
    assert caught.value.hint
    return caught.value.message


def shard_of(folder: Path, key: str) -> Path:
    (file,) = (file for file in folder.glob("*.safetensors") if key in load_file(file))
    return file


def flip_bit(folder: Path, key: str, *, bit: int = 3, at: int = 5) -> Path:
    """Flip one bit of a tensor where it lies on disk, and return its shard."""
    file = shard_of(folder, key)
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[key]["data_offsets"][0]
    data[start + at] ^= 1 << bit
    file.write_bytes(data)
    return file


def edit_row(folder: Path, path: str, **said: Any) -> None:
    """Change what qcompiler.json says of a layer."""
    data = provenance(folder)
    for row in data["report"]["layers"]:
        if row["path"] == path:
            row.update(said)
    (folder / "qcompiler.json").write_text(json.dumps(data))
