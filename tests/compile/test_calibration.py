"""Calibration data as people hand it over, and that it is asked for only where something measures it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcompiler
from passes.assign_targets import Assignment, AssignTargets, TargetGroup
from passes.calibrate import Calibrate
from passes.insert_observers import InsertObservers
from qcompiler import CalibrationSpec, Pipeline, Result, load_pipeline
from qcompiler.calibration import CalibrationData
from qcompiler.errors import ConfigError, DataError
from qcompiler.scheme import KVCacheSpec, preset
from qcompiler.source import open_model
from tests.compile.tiny import ATTENTION, MLP, SHORT, pipeline, provenance, rule, save_tiny, stored, token_rows
from tests.data.conftest import CHAT_TEMPLATE, save_tokenizer

STATIC = pipeline(rule(MLP, "FP8"))
TARGETED = Assignment(groups=(TargetGroup(targets=("Linear",), scheme=preset("FP8")),))
DYNAMIC = pipeline(rule(MLP, "FP8_DYNAMIC"))
IN_ORDER = SHORT.model_copy(update={"shuffle": False})  # streams are shuffled in another order than lists
ROWS = token_rows()
TEXTS = [f"The {thing} of the king lay in the house by the sea, {n} years." for n, thing in enumerate(["crown"] * 8)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Verily."}] for text in TEXTS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes and a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("calibration") / "source", "llama")
    return save_tokenizer(folder, CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def from_rows(source: Path) -> Result:
    """What the token rows give, to compare with."""
    return compiled(source, source.parent / "from-rows", calibration=ROWS, sampling=IN_ORDER)


def compiled(source: Path, output: Path, **data: Any) -> Result:
    return qcompiler.compile(source, pipeline=STATIC, output=output, **data)


def input_scales(folder: Path) -> dict[str, float]:
    return {key: float(tensor) for key, tensor in stored(folder).items() if key.endswith("input_scale")}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def never() -> Iterator[str]:
    raise AssertionError("the data was read")
    yield


def ids_alone(folder: Path) -> dict[str, Any]:
    return {"calibration": [row["input_ids"] for row in ROWS], "sampling": IN_ORDER}


def tensors(folder: Path) -> dict[str, Any]:
    return {"calibration": [torch.tensor(row["input_ids"]) for row in ROWS], "sampling": IN_ORDER}


def a_generator(folder: Path) -> dict[str, Any]:
    return {"calibration": iter(ROWS), "sampling": IN_ORDER}


def a_dataset(folder: Path) -> dict[str, Any]:
    return {"calibration": Dataset.from_list(ROWS), "sampling": IN_ORDER}


def a_path(folder: Path) -> dict[str, Any]:
    return {"calibration": jsonl(folder / "rows.jsonl", ROWS), "sampling": IN_ORDER}


def a_spec(folder: Path) -> dict[str, Any]:
    return {"calibration": IN_ORDER.model_copy(update={"dataset": jsonl(folder / "rows.jsonl", ROWS)})}


@pytest.mark.parametrize("form", [ids_alone, tensors, a_generator, a_dataset, a_path, a_spec], ids=lambda f: f.__name__)
def test_the_same_tokens_give_the_same_scales_in_any_form(
    form: Any, source: Path, from_rows: Result, tmp_path: Path
) -> None:
    result = compiled(source, tmp_path / "output", **form(tmp_path))
    assert input_scales(result.output) == input_scales(from_rows.output)
    wanted = provenance(from_rows.output)["calibration"]
    found = provenance(result.output)["calibration"]
    assert (found["fingerprint"], found["sequences"], found["tokens"]) == (wanted["fingerprint"], 8, 256)


def test_texts_and_chats_go_through_the_models_tokenizer(source: Path, from_rows: Result, tmp_path: Path) -> None:
    scales = []
    for name, rows in (("texts", TEXTS), ("chats", CHATS)):
        result = compiled(source, tmp_path / name, calibration=rows, sampling=SHORT)
        data = provenance(result.output)["calibration"]
        assert (data["sequences"], data["tokens"]) == (8, 256)
        assert any("cut 8 of 8 samples to 32 tokens" in note.text for note in result.report.notes)
        scales.append(input_scales(result.output))
    assert scales[0] != scales[1]
    assert input_scales(from_rows.output) not in scales


def test_a_loaded_model_takes_its_tokenizer_beside_it(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(DataError, match="tokenizer"):
        compiled(model, tmp_path / "none", calibration=TEXTS, sampling=SHORT)
    expected = input_scales(compiled(source, tmp_path / "folder", calibration=TEXTS, sampling=SHORT).output)
    for name, tokenizer in (("object", AutoTokenizer.from_pretrained(source)), ("path", source)):
        result = compiled(model, tmp_path / name, calibration=TEXTS, sampling=SHORT, tokenizer=tokenizer)
        assert input_scales(result.output) == expected
        written = AutoTokenizer.from_pretrained(result.output)
        assert written(TEXTS[0])["input_ids"] == AutoTokenizer.from_pretrained(source)(TEXTS[0])["input_ids"]
        assert written.chat_template == CHAT_TEMPLATE


def test_sampling_takes_fewer_and_shorter_rows(source: Path, tmp_path: Path) -> None:
    sampling = CalibrationSpec(samples=3, sequence_length=16, seed=5)
    result = compiled(source, tmp_path / "output", calibration=ROWS, sampling=sampling)
    data = provenance(result.output)["calibration"]
    assert (data["sequences"], data["tokens"], data["seed"]) == (3, 48, 5)


def test_no_data_is_asked_for_where_nothing_measures_it(source: Path, tmp_path: Path) -> None:
    result = qcompiler.compile(source, pipeline=DYNAMIC, output=tmp_path / "output")
    assert "calibration" not in provenance(result.output)
    assert not any("calibration" in note.text for note in result.report.notes)


def test_data_that_nothing_measures_is_not_read_and_that_is_said(source: Path, tmp_path: Path) -> None:
    result = qcompiler.compile(source, pipeline=DYNAMIC, output=tmp_path / "output", calibration=never())
    assert any("the calibration data was not needed" in note.text for note in result.report.notes)
    assert "calibration" not in provenance(result.output)


@pytest.mark.parametrize(
    ("chosen", "needed"),
    [
        (DYNAMIC, False),
        (STATIC, True),
        (pipeline(rule(MLP, "W4A16", solver="gptq")), True),
        (pipeline(rule(MLP, "W4A16", transform="awq")), True),
        (pipeline(rule(MLP, None, transform="awq")), False),
        (pipeline(rule(MLP, "W4A16"), observers={"importance": True}, scales="importance"), True),
        (pipeline(rule(MLP, "W4A16"), kv_cache={}), True),
        (load_pipeline([AssignTargets(assignments=(TARGETED,)), InsertObservers(), Calibrate()]), True),
        (load_pipeline([AssignTargets(kv_cache=KVCacheSpec()), InsertObservers(), Calibrate()]), True),
    ],
)
def test_data_is_read_before_the_model_is_captured_where_rules_may_need_it(
    chosen: Pipeline, needed: bool, source: Path
) -> None:
    read: list[str] = []

    def rows() -> Iterator[dict[str, list[int]]]:
        read.append("rows")
        yield from ROWS

    with open_model(source) as opened:
        CalibrationData(rows(), SHORT, torch.device("cpu")).read_ahead(chosen, opened)
    assert read == ["rows"] * needed


def test_runs_that_bring_the_same_data_read_it_once(source: Path, tmp_path: Path) -> None:
    own = IN_ORDER.model_copy(update={"dataset": jsonl(tmp_path / "rows.jsonl", ROWS)})
    runs = ({"algorithms": ("gptq",), "calibration": own}, {"calibration": own})
    chosen = pipeline(rule(MLP, "W4A16", solver="gptq"), rule(ATTENTION, "FP8"), runs=runs)
    data = CalibrationData(never(), None, torch.device("cpu"))
    with open_model(source) as opened:
        data.read_ahead(chosen, opened)
        (tmp_path / "rows.jsonl").unlink()
        data.read_ahead(chosen, opened)


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({}, DataError, "measures activations, and no calibration data was given"),
    "sampling alone": ({"sampling": SHORT}, DataError, "no calibration data was given"),
    "two specs": (
        {"calibration": CalibrationSpec(dataset="rows.jsonl"), "sampling": SHORT},
        ConfigError,
        "calibration= is a whole CalibrationSpec, and sampling= is another",
    ),
    "two datasets": (
        {"calibration": ROWS, "sampling": CalibrationSpec(dataset="rows.jsonl")},
        ConfigError,
        r"names a dataset: rows.jsonl(.|\n)*give the whole CalibrationSpec as calibration=",
    ),
    "a dataset as sampling": ({"sampling": CalibrationSpec(dataset="rows.jsonl")}, ConfigError, "names a dataset"),
    "a spec of nothing": ({"calibration": CalibrationSpec()}, DataError, "dataset"),
    "no rows": ({"calibration": [], "sampling": SHORT}, DataError, "has no rows"),
    "too few tokens": ({"calibration": [[3, 4, 5]], "sampling": SHORT}, DataError, "3 tokens"),
    "tokens of another model": ({"calibration": [[3, 999] * 16], "sampling": SHORT}, DataError, "vocabulary has 320"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_data_that_cannot_be_used_is_refused_before_anything_is_written(
    what: str, source: Path, tmp_path: Path
) -> None:
    data, kind, expected = MISTAKES[what]
    seen: list[str] = []
    with pytest.raises(kind, match=expected):
        compiled(source, tmp_path / "output", progress=lambda what, done, total: seen.append(what), **data)
    assert not list(tmp_path.iterdir())
    # Whether data is needed is known when rules have met the model; whether it can be used, before.
    assert seen == (["capture"] if expected.endswith("no calibration data was given") else [])


def test_the_longest_sequence_counts_where_a_rope_is_frozen_at_a_length(tmp_path: Path) -> None:
    """Not how long sequences might have been."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    source = save_tiny(tmp_path / "source", "llama", layers=1, rope_parameters=rope, max_position_embeddings=256)
    compiled(source, tmp_path / "output", calibration=token_rows(length=64), sampling=CalibrationSpec())
    with pytest.raises(DataError, match="a calibration sequence of 65 tokens: beyond 64") as raised:
        compiled(source, tmp_path / "other", calibration=token_rows(length=65), sampling=CalibrationSpec())
    assert "--sequence-length 64" in str(raised.value.hint)
    assert not (tmp_path / "other").exists()
