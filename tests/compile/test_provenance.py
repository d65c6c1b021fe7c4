"""`qcompiler.json`: how the checkpoint came to be; and that the same inputs give the same folder."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import qcompiler
from passes.calibrate import Calibrate
from qcompiler import CalibrationSpec, Result
from qcompiler.pipeline import parse_pipeline
from tests.compile.tiny import (
    ATTENTION,
    INT4_ASYM,
    MLP,
    pipeline,
    provenance,
    rule,
    save_tiny,
    stored,
    timeless,
    token_rows,
)
from tests.data.conftest import CHAT_TEMPLATE, save_tokenizer

MIXED = pipeline(rule(ATTENTION, "FP8"), rule(MLP, INT4_ASYM), ignore=[{"structure": "lm-head"}], scales="mse")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with everything that lies beside weights."""
    folder = save_tiny(tmp_path_factory.mktemp("provenance") / "source", "qwen2")
    save_tokenizer(folder, CHAT_TEMPLATE)
    GenerationConfig(temperature=0.7, top_k=11, do_sample=True).save_pretrained(folder)
    (folder / "LICENSE").write_text("Take it.")
    (folder / "README.md").write_text("A card of the dense model.")
    return folder


@pytest.fixture(scope="module")
def result(source: Path) -> Result:
    return compiled(source, source.parent / "output")


def compiled(source: Path, output: Path, **changed: Any) -> Result:
    options = {
        "pipeline": MIXED,
        "calibration": token_rows(12),
        "sampling": CalibrationSpec(samples=8, sequence_length=32, seed=3),
        **changed,
    }
    return qcompiler.compile(source, output=output, **options)


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, without how long it took to make them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(timeless(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_pipeline_is_said_as_text_that_gives_it_back(result: Result) -> None:
    written = parse_pipeline(provenance(result.output)["pipeline"])
    assert written == MIXED == result.plan.pipeline
    assert Calibrate(scales="mse") in written.passes


def test_versions_and_inputs_are_said(result: Result, source: Path) -> None:
    data = provenance(result.output)
    assert data["versions"] == {
        "python": platform.python_version(),
        **{
            name: version(name)
            for name in ("qcompiler", "torch", "transformers", "compressed-tensors", "safetensors", "datasets")
        },
    }
    assert data["model"] == str(source)
    assert (data["target"], data["dtype"]) == ("transformers", "bfloat16")
    assert data["config"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()


def test_another_model_or_dataset_has_another_fingerprint(result: Result, source: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "wider", "qwen2", intermediate_size=128)
    other = compiled(tmp_path / "wider", tmp_path / "output", calibration=token_rows(12, seed=1))
    found, before = provenance(other.output), provenance(result.output)
    for key in ("config", "weights"):
        assert found[key] != before[key]
    assert found["calibration"]["fingerprint"] != before["calibration"]["fingerprint"]


def test_how_the_data_was_sampled_is_said(result: Result) -> None:
    data = provenance(result.output)["calibration"]
    assert (data["samples"], data["sequence_length"], data["seed"], data["shuffle"]) == (8, 32, 3, True)
    assert (data["sequences"], data["tokens"], data["dataset"]) == (8, 256, None)
    assert len(data["fingerprint"]) == 64


def test_the_table_of_layers_sums_up_to_the_files(result: Result) -> None:
    report = provenance(result.output)["report"]
    tensors = stored(result.output)
    paths = {row["path"]: row["bytes"] for row in report["layers"]}
    listed = sum(tensor.nbytes for key, tensor in tensors.items() if key.rpartition(".")[0] in paths)
    others = sum(tensor.nbytes for key, tensor in tensors.items() if key.rpartition(".")[0] not in paths)
    assert sum(paths.values()) == listed
    assert report["total_bytes"] == listed + others
    assert len(paths) == 15
    for row in report["layers"]:
        assert row["because"]
        assert (row["scheme"] is None) == (row["error"] is None) == (row["format"] is None) == (row["solver"] is None)
        assert row["bits_per_weight"] == 16 if row["scheme"] is None else 4 < row["bits_per_weight"] < 9


def test_every_other_file_is_said_with_its_size_and_digest(result: Result) -> None:
    files = provenance(result.output)["files"]
    found = contents(result.output)
    del found["qcompiler.json"]
    assert {name: file["sha256"] for name, file in files.items()} == found
    assert {name: file["size"] for name, file in files.items()} == {
        name: (result.output / name).stat().st_size for name in found
    }


def test_the_table_is_that_of_the_report(result: Result) -> None:
    written = provenance(result.output)["report"]
    reported = result.report.as_dict()
    assert [{**row, "shape": tuple(row["shape"])} for row in written["layers"]] == [
        {name: value for name, value in row.items() if name != "seconds"} for row in reported["layers"]
    ]
    assert written["notes"] == reported["notes"]
    assert "timings" not in written


def test_what_took_how_long_stands_apart(result: Result) -> None:
    timings = provenance(result.output)["timings"]
    assert {"capture", "assign", "calibrate"} <= set(timings["passes"])
    assert timings["layers"] == {row.path: row.seconds for row in result.report.layers if row.scheme}


def test_what_solving_took_is_told_in_parts(source: Path, tmp_path: Path) -> None:
    chosen = pipeline(rule(MLP, INT4_ASYM, solver="gptq"), ignore=[{"structure": "lm-head"}])
    passes = provenance(compiled(source, tmp_path / "gptq", pipeline=chosen).output)["timings"]["passes"]
    parts = {name: seconds for name, seconds in passes.items() if name.startswith("solve: ")}
    assert set(parts) == {"solve: round", "solve: measure", "solve: factor", "solve: columns"}
    assert 0 < sum(parts.values()) < passes["calibrate"]
    assert passes["observe"] > 0


def test_two_runs_give_the_same_folder_byte_for_byte(result: Result, source: Path, tmp_path: Path) -> None:
    again = compiled(source, tmp_path / "again")
    assert contents(again.output) == contents(result.output)
    assert not [path for path in tmp_path.iterdir() if path != again.output]


def test_another_seed_gives_other_scales_and_the_same_codes(result: Result, source: Path, tmp_path: Path) -> None:
    sampling = CalibrationSpec(samples=8, sequence_length=32, seed=4)
    other = stored(compiled(source, tmp_path / "other", sampling=sampling).output)
    differing = {key for key, tensor in stored(result.output).items() if not tensor.equal(other[key])}
    assert differing
    assert all(key.endswith("input_scale") for key in differing)


def test_tokenizer_templates_and_generation_config_come_along(result: Result, source: Path) -> None:
    before, after = contents(source), contents(result.output)
    shared = before.keys() & after.keys()
    assert {name for name in shared if before[name] == after[name]} == {
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert after.keys() - before.keys() == {
        "qcompiler.json",
        "model.safetensors.index.json",
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
    }
    assert "README.md" not in after  # it describes other weights
