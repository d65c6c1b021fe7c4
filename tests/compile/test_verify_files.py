"""`verify` against qcompiler.json: files are those that were written, and layers those of its table."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.errors import DataError
from qcompiler.table_check import WeightComparison
from tests.compile.damage import DOWN, QUERY, damaged, edit_row, flip_bit, refusal, sound
from tests.compile.tiny import (
    ATTENTION,
    INT4,
    MLP,
    compile_tiny,
    pipeline,
    provenance,
    restamp,
    rule,
    save_tiny,
    tiny_model,
)

__all__ = ["damaged", "sound"]  # fixtures


@pytest.mark.parametrize("key", [f"{QUERY}.weight_packed", f"{DOWN}.weight_scale", "model.norm.weight"])
def test_one_flipped_bit_is_seen_and_its_shard_named(damaged: Path, key: str) -> None:
    file = flip_bit(damaged, key)
    assert refusal(damaged) == f"{damaged}: not what was written: {file.name} (other bytes: its SHA-256 differs)"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_decides_what_is_computed_is_as_it_was_written(damaged: Path, name: str) -> None:
    (damaged / name).write_text((damaged / name).read_text() + " ")
    assert re.search(rf"not what was written: {name} \(\d+ bytes in place of \d+\)", refusal(damaged))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "extra.safetensors",
        "pytorch_model.bin",
        "adapter_config.json",
        "params.json",
        "quantization_config.json",
        "quantize_config.json",
    ],
)
def test_a_file_that_loaders_would_take_besides_is_refused(damaged: Path, name: str) -> None:
    shutil.copyfile(next(damaged.glob("*.safetensors")), damaged / name)
    assert f"{name} was not written by the compilation" in refusal(damaged)


def test_a_shard_that_nothing_is_said_of_is_refused(damaged: Path) -> None:
    data = provenance(damaged)
    data["files"] = {}
    (damaged / "qcompiler.json").write_text(json.dumps(data))
    assert "model-00001-of-00004.safetensors, " in refusal(damaged)


def test_small_files_may_change_and_it_is_said(damaged: Path) -> None:
    (damaged / "generation_config.json").write_text("{}")
    (damaged / "README.md").write_text("A card.")
    verified = qcompiler.verify(damaged)
    assert verified.notes == ("changed since it was written: generation_config.json",)
    assert f"files: {verified.files} are byte for byte" in str(verified)


def test_a_small_file_that_is_gone_is_refused(damaged: Path) -> None:
    (damaged / "generation_config.json").unlink()
    assert refusal(damaged) == f"{damaged}: not what was written: generation_config.json (missing)"


def test_a_checkpoint_that_says_nothing_of_its_files_verifies_and_it_is_said(sound: Path, damaged: Path) -> None:
    data = provenance(damaged)
    del data["files"]
    (damaged / "qcompiler.json").write_text(json.dumps(data))
    verified = qcompiler.verify(damaged)
    assert verified.files is None
    assert "note: qcompiler.json is of an earlier version and has no digests of files" in str(verified)
    assert "byte for byte" not in str(verified)
    (damaged / "qcompiler.json").unlink()
    verified = qcompiler.verify(damaged, reference=sound.parent / "source")
    assert verified.weights is None
    assert "note: there is no qcompiler.json that says what was written" in str(verified)
    assert "note: weights were not compared with the reference" in str(verified)


# What follows has digests that fit: it is seen by what the files hold.


def test_weights_that_are_the_references_are_counted(sound: Path) -> None:
    verified = qcompiler.verify(sound, reference=sound.parent / "source")
    assert verified.weights == WeightComparison(layers=14, tensors=7)
    assert "14 layers with the weight errors of the table (within 1e-06 of each), 7 dense tensors" in str(verified)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_an_altered_code_or_scale_is_seen_by_its_layers_error(damaged: Path, sound: Path, part: str) -> None:
    flip_bit(damaged, f"{QUERY}.{part}")
    found = refusal(restamp(damaged), reference=sound.parent / "source")
    assert re.search(
        rf"1 of 21 weights are not .*: {QUERY} has a weight error of 0.0\d+, and 0.0\d+ in the table$", found
    )


def test_an_altered_dense_value_is_seen(damaged: Path, sound: Path) -> None:
    flip_bit(damaged, "model.embed_tokens.weight")
    found = refusal(restamp(damaged), reference=sound.parent / "source")
    assert found.endswith(": model.embed_tokens.weight is dense, and differs")


def test_an_error_that_was_edited_is_seen(damaged: Path, sound: Path) -> None:
    (row,) = (row for row in provenance(damaged)["report"]["layers"] if row["path"] == QUERY)
    edit_row(damaged, QUERY, error=row["error"] * (1 + 1e-5))
    edit_row(damaged, DOWN, error=None)
    found = refusal(damaged, reference=sound.parent / "source")
    assert re.search(rf"2 of 21 weights .*: {QUERY} has a weight error .*; {DOWN} has no error in the table", found)


def test_weights_that_a_transform_rescaled_are_not_compared_and_it_is_said(tmp_path: Path) -> None:
    """The scales of `down` go into `up`, those of the rest into norms: what was left alone is compared all the same."""
    source = save_tiny(tmp_path / "source", "llama")
    result = compile_tiny(
        source, tmp_path / "output", pipeline(rule({**MLP, "layers": 1}, INT4, transform="awq"), rule(ATTENTION, INT4))
    )
    verified = qcompiler.verify(result.output, reference=source)
    layer = "model.layers.1"
    rescaled = tuple(
        f"{layer}.{name}.weight"
        for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm")
    )
    assert verified.weights == WeightComparison(layers=8, tensors=9, rescaled=rescaled)
    assert f"not compared, as a transform rescaled them: {rescaled[0]}; " in str(verified)


def test_a_reference_that_is_another_model_of_the_same_shapes_is_refused(sound: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="another fingerprint than the model that was compiled") as caught:
        qcompiler.verify(sound, reference=tmp_path)
    assert caught.value.hint == "give the model that the checkpoint was compiled from"


def test_a_reference_of_other_shapes_is_refused(sound: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", intermediate_size=96)
    with pytest.raises(
        DataError, match=r"is another model: it has no model\.layers\.0\.mlp\.gate_proj\.weight of shape"
    ):
        qcompiler.verify(sound, reference=tmp_path)


ROWS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "a row lost": (lambda rows: rows.pop(0), r"model.layers.0.self_attn.q_proj is quantized, and has no row"),
    "another scheme": (lambda rows: rows[0].update(scheme="w:int8/g16"), r"is w:int4/g16 .* row says w:int8/g16"),
    "other bytes": (
        lambda rows: rows[0].update(bytes=1),
        r"q_proj is .* row says w:int4/g16 \(pack-quantized, 1 bytes",
    ),
    "a layer too many": (lambda rows: rows.append({**rows[0], "path": "x"}), r"x has a row, and is not quantized"),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_table_that_is_not_that_of_the_checkpoint_is_refused(damaged: Path, what: str) -> None:
    change, expected = ROWS[what]
    data = provenance(damaged)
    change(data["report"]["layers"])
    (damaged / "qcompiler.json").write_text(json.dumps(data))
    assert re.search(rf"the table in qcompiler.json is not that of this checkpoint: .*{expected}", refusal(damaged))


def test_tensors_that_take_other_bytes_than_were_written_are_refused(damaged: Path) -> None:
    data = provenance(damaged)
    data["report"]["total_bytes"] += 2
    (damaged / "qcompiler.json").write_text(json.dumps(data))
    assert re.search(r"tensors take (\d+) bytes, and the table says \d+", refusal(damaged))


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[:-40], r"qcompiler.json is truncated, or no JSON: JSONDecodeError"),
    "empty": (lambda text: "", r"qcompiler.json is truncated, or no JSON"),
    "a list": (lambda text: "[]", r"qcompiler.json: the file: Input should be"),
    "no table": (lambda text: text.replace('"layers"', '"layer"'), r"qcompiler.json: report.layers: Field required"),
    "no number": (
        lambda text: re.sub(r'"error": 0\.\d+', '"error": NaN', text, count=1),
        r"qcompiler.json: report.layers.0.error: Input should be a finite number",
    ),
    "a row twice": (
        lambda text: text.replace("layers.1.mlp", "layers.0.mlp"),
        r"qcompiler.json: report.layers: model.layers.0.mlp.\w+ has two rows",
    ),
    "half a digest": (
        lambda text: re.sub(r'("sha256": "\w{32})\w{32}', r"\1", text, count=1),
        r"qcompiler.json: files.config.json.sha256: String should match",
    ),
    "files elsewhere": (
        lambda text: text.replace('"config.json": {', '"../config.json": {'),
        r"qcompiler.json: files.*: '../config.json' is no file of this folder",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_qcompiler_json_is_refused_by_its_entry(damaged: Path, what: str) -> None:
    change, expected = BROKEN[what]
    file = damaged / "qcompiler.json"
    file.write_text(change(file.read_text()))
    assert re.search(expected, refusal(damaged))
