"""`verify` on checkpoints that are not what was compiled: each is refused, and says what is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompiler
from qcompiler.errors import CheckpointError, DataError, QCompilerError, VerificationError
from qcompiler.table_check import WeightComparison
from tests.compile.tiny import (
    ATTENTION,
    INT4,
    INT8_STATIC,
    MLP,
    SHORT,
    pipeline,
    provenance,
    restamp,
    rule,
    save_tiny,
    tiny_model,
    token_rows,
)

Tensors = dict[str, Tensor]
Config = dict[str, Any]

QUERY = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of packed integers beside static ones, which verifies."""
    folder = tmp_path_factory.mktemp("sound")
    result = qcompiler.compile(
        save_tiny(folder / "source", "llama"),
        pipeline=pipeline(rule(ATTENTION, INT4), rule(MLP, INT8_STATIC)),
        output=folder / "output",
        calibration=token_rows(),
        sampling=SHORT,
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


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors.pop(name, None)

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.startswith(old)]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "codes removed": (without(f"{QUERY}.weight_packed"), rf"missing_keys: \['{QUERY}.weight_packed'\]"),
    "a scale removed": (without(f"{QUERY}.weight_scale"), rf"missing_keys: \['{QUERY}.weight_scale'\]"),
    "a shape removed": (without(f"{QUERY}.weight_shape"), rf"{QUERY}"),
    "unpacked codes removed": (without(f"{DOWN}.weight"), rf"{DOWN} has scales but no weight"),
    "an input scale removed": (without(f"{DOWN}.input_scale"), rf"missing_keys: \['{DOWN}.input_scale'\]"),
    "a dense tensor removed": (without("model.norm.weight"), r"no file holds .* parameters: 'model.norm.weight'"),
    "a scale renamed": (
        renamed(f"{QUERY}.weight_scale", f"{QUERY}.weight_scales"),
        rf"missing_keys: .*{QUERY}.weight_scale'.*unexpected_keys: .*{QUERY}.weight_scales'",
    ),
    "a layer renamed": (
        renamed(QUERY, "model.layers.1.self_attn.qq_proj"),
        r"qq_proj is stored quantized, but no target of quantization_config matches it",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_those_of_the_config_are_refused(damaged: Path, what: str) -> None:
    change, expected = TENSORS[what]
    change_tensors(damaged, change)
    assert re.search(expected, refusal(damaged))


def group(config: Config, number: int) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"][f"group_{number}"]
    return found


def swapped(config: Config) -> None:
    first, second = group(config, 0), group(config, 1)
    first["targets"], second["targets"] = second["targets"], first["targets"]


CONFIGS: dict[str, tuple[Callable[[Config], object], str]] = {
    "more bits": (lambda c: group(c, 0)["weights"].update(num_bits=8), r"q_proj is not a pack-quantized weight of"),
    "fewer bits": (lambda c: group(c, 0)["weights"].update(num_bits=2), r"q_proj is not a pack-quantized weight of"),
    "asymmetric": (
        lambda c: group(c, 0)["weights"].update(symmetric=False),
        r"missing_keys: .*weight_zero_point",
    ),
    "other groups": (lambda c: group(c, 0)["weights"].update(group_size=32), r"q_proj is not a pack-quantized weight"),
    "schemes swapped": (swapped, r"Transformers does not load it"),
    "weights alone": (
        lambda c: group(c, 1).update(input_activations=None),
        r"unexpected_keys: .*down_proj.input_scale",
    ),
    "dynamic inputs": (
        lambda c: group(c, 1)["input_activations"].update(dynamic=True),
        r"unexpected_keys: .*down_proj.input_scale",
    ),
    "a target lost": (
        lambda c: group(c, 1).update(targets=[t for t in group(c, 1)["targets"] if "down" not in t]),
        r"down_proj is stored quantized, but no target of quantization_config matches it",
    ),
    # Transformers raises nothing of its own: it would run on random weights.
    "not said to be compressed": (lambda c: c.pop("quantization_status"), r"unexpected_keys: .*_proj.weight_packed"),
    "an unknown key": (lambda c: group(c, 0).update(wieghts={}), r"unknown key 'wieghts'; did you mean 'weights'"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_not_that_of_the_tensors_is_refused(damaged: Path, what: str) -> None:
    change, expected = CONFIGS[what]
    change_config(damaged, change)
    with pytest.raises(QCompilerError, match=expected):
        qcompiler.verify(damaged)


def test_scales_that_are_no_numbers_are_refused_with_their_layer(damaged: Path) -> None:
    def poison(tensors: Tensors) -> None:
        if f"{QUERY}.weight_scale" in tensors:
            tensors[f"{QUERY}.weight_scale"][3, 1] = float("nan")

    change_tensors(damaged, poison)
    assert re.search(rf"{QUERY}.weight.* has .*NaN", refusal(damaged))


def test_a_model_that_computes_otherwise_than_the_graph_is_refused(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no file can show: a client whose arithmetic is not the one that was compiled for."""
    from qcompiler import verification

    load = verification.load_client

    def hearing_badly(folder: Path, **options: Any) -> Any:
        client = load(folder, **options)
        client.lm_head.register_forward_hook(lambda module, args, logits: logits + torch.randn_like(logits))
        return client

    monkeypatch.setattr(verification, "load_client", hearing_badly)
    assert re.search(r"logits differ from the compiled graph's by [0-9.]+ of their spread, more than", refusal(sound))


@pytest.mark.parametrize(("name", "expected"), [("nowhere", "nowhere"), ("source", "this checkpoint is not quantized")])
def test_what_is_no_compiled_checkpoint_is_refused(sound: Path, name: str, expected: str) -> None:
    assert expected in refusal(sound.parent / name)


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


@pytest.mark.parametrize("key", [f"{QUERY}.weight_packed", f"{DOWN}.weight_scale", "model.norm.weight"])
def test_one_flipped_bit_is_seen_and_its_shard_named(damaged: Path, key: str) -> None:
    file = flip_bit(damaged, key)
    assert refusal(damaged) == f"{damaged}: not what was written: {file.name} (other bytes: its SHA-256 differs)"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_decides_what_is_computed_is_as_it_was_written(damaged: Path, name: str) -> None:
    (damaged / name).write_text((damaged / name).read_text() + " ")
    assert re.search(rf"not what was written: {name} \(\d+ bytes in place of \d+\)", refusal(damaged))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "extra.safetensors", "pytorch_model.bin", "adapter_config.json", "params.json"]
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
    assert verified.notes == ("changed or gone since it was written: generation_config.json",)
    assert f"files: {verified.files} are byte for byte" in str(verified)


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


def test_layers_whose_weights_were_transformed_are_not_compared_and_it_is_said(damaged: Path, sound: Path) -> None:
    edit_row(damaged, QUERY, error=0.5, transform="awq")
    verified = qcompiler.verify(damaged, reference=sound.parent / "source")
    assert verified.weights == WeightComparison(layers=13, tensors=0, transformed=(QUERY,))
    assert f"not compared: {QUERY}, whose weights were transformed before they were rounded" in str(verified)


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
