"""Weights that are missing, damaged, hostile or of another model: one message, and no output."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import Refuse

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def sharded(broken: Path) -> Path:
    """The model in two shards."""
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    keys = sorted(tensors)
    shards = {FIRST: keys[: len(keys) // 2], SECOND: keys[len(keys) // 2 :]}
    for name, members in shards.items():
        save_file({key: tensors[key] for key in members}, broken / name)
    weight_map = {key: name for name, members in shards.items() for key in members}
    (broken / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return broken


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("command", ["compile", "plan"])
def test_a_missing_shard_is_named(command: str, sharded: Path, refuse: Refuse) -> None:
    (sharded / SECOND).unlink()
    refuse(command, sharded, "-p", "w8a8-rtn", says=[f"{sharded / SECOND}: the shard is missing", "download"])


def test_a_truncated_shard_is_named(sharded: Path, refuse: Refuse) -> None:
    (sharded / FIRST).write_bytes((sharded / FIRST).read_bytes()[:-2])
    refuse("compile", sharded, "-p", "w8a8-rtn", says=[f"{sharded / FIRST}: ", "truncated", "download"])


def test_a_header_that_lies_about_sizes_is_refused(broken: Path, refuse: Refuse) -> None:
    edit_header(broken, lambda header: header[UP].update(shape=[999, 64]))
    refuse("compile", broken, "-p", "w8a8-rtn", says=["model.safetensors: ", UP, "[999, 64] takes 127872", "download"])


def test_a_header_with_tensors_on_top_of_each_other_is_refused(broken: Path, refuse: Refuse) -> None:
    edit_header(broken, lambda header: header[UP].update(header["model.layers.0.mlp.gate_proj.weight"]))
    refuse("compile", broken, "-p", "w8a8-rtn", says=["model.safetensors: ", "overlaps"])


@pytest.mark.parametrize("elsewhere", ["../{}", "{}"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(
    elsewhere: str, sharded: Path, tmp_path: Path, refuse: Refuse
) -> None:
    outside = tmp_path / SECOND
    (sharded / SECOND).rename(outside)
    named = elsewhere.format(outside.name if ".." in elsewhere else outside)
    index = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(index.replace(SECOND, named))
    refuse("compile", sharded, "-p", "w8a8-rtn", says=[f"{sharded / INDEX}: ", named, "do not trust this checkpoint"])


@pytest.mark.parametrize(("name", "value"), [(UP, "nan"), (UP, "-inf"), ("model.norm.weight", "inf")])
def test_weights_that_are_no_numbers_are_named(name: str, value: str, broken: Path, refuse: Refuse) -> None:
    edit_tensors(broken, lambda tensors: tensors[name].view(-1)[-1].fill_(float(value)))
    refuse(
        "compile",
        broken,
        "-p",
        "w8a8-rtn",
        says=[name, "NaN or infinite", str(broken / "model.safetensors"), "damaged"],
    )


def test_a_dtype_too_narrow_for_the_weights_is_told_from_a_damaged_checkpoint(broken: Path, refuse: Refuse) -> None:
    edit_tensors(broken, lambda tensors: tensors[UP].view(-1)[0].fill_(1e9))
    refuse("compile", broken, "-p", "w8a8-rtn", "--dtype", "float16", says=[UP, "in float16", "--dtype"])


def test_a_parameter_that_no_file_holds_is_named(broken: Path, refuse: Refuse) -> None:
    edit_tensors(broken, lambda tensors: tensors.pop(UP))
    refuse("compile", broken, "-p", "w8a8-rtn", says=[str(broken), UP, "incomplete"])


def test_a_tensor_of_another_shape_is_named(broken: Path, refuse: Refuse) -> None:
    edit_tensors(broken, lambda tensors: tensors.update({UP: torch.zeros(3, 4)}))
    refuse("compile", broken, "-p", "w8a8-rtn", says=["model.safetensors: ", UP, "[176, 64]", "[3, 4]"])


def test_a_pickle_is_not_opened(broken: Path, refuse: Refuse, tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (opened,)

    (broken / "model.safetensors").unlink()
    torch.save({"weight": Trap()}, broken / "pytorch_model.bin")
    refuse("compile", broken, "-p", "w8a8-rtn", says=[str(broken), "pytorch_model.bin", "pickle", "save_pretrained"])
    assert not opened.exists()


def test_a_model_without_weights_is_not_compiled(broken: Path, refuse: Refuse) -> None:
    (broken / "model.safetensors").unlink()
    refuse(
        "compile", broken, "-p", "w8a8-rtn", says=[f"{broken}: there is neither model.safetensors nor", "safetensors"]
    )
