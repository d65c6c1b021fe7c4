"""What Python callers may hand over, and how the rest is refused: in one message, before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qcompiler
from qcompiler.errors import ConfigError, QCompilerError
from tests.compile.tiny import MLP, model_config, pipeline, rule, save_tiny, stored

DYNAMIC = pipeline(rule(MLP, "FP8_DYNAMIC"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("arguments") / "source", "llama", layers=1)


def test_a_dtype_may_be_that_of_torch(source: Path, tmp_path: Path) -> None:
    result = qcompiler.compile(source, pipeline=DYNAMIC, output=tmp_path / "output", dtype=torch.float16)
    assert model_config(result.output)["dtype"] == "float16"
    assert stored(result.output)["model.norm.weight"].dtype is torch.float16


@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float64, "bf16", ["auto"], 16])
def test_another_dtype_is_refused(dtype: Any, source: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dtype ") as raised:
        qcompiler.plan(source, DYNAMIC, dtype=dtype)
    assert str(raised.value.hint).startswith("auto, bfloat16, float16, float32")


WRONG: dict[str, tuple[Any, str]] = {
    "sampling": ({"samples": 4}, "CalibrationSpec(samples="),
    "calibration": (5, "a path, a hub id, a CalibrationSpec, or rows"),
    "output": (None, "a path"),
    "overwrite": ("no", "True or False"),
    "trust_remote_code": ("no", "True or False"),
    "target": (["vllm-sm90"], "text"),
    "revision": (1, "text"),
    "device": (0, "cuda:1"),
    "show": ("lower", "a function"),
    "progress": (True, "a function"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_the_wrong_type_is_named_with_what_it_may_be(name: str, source: Path, tmp_path: Path) -> None:
    value, wanted = WRONG[name]
    given: dict[str, Any] = {"pipeline": DYNAMIC, "output": tmp_path / "output", name: value}
    with pytest.raises(ConfigError, match=f"^{name}=") as raised:
        qcompiler.compile(source, **given)
    assert type(value).__name__ in raised.value.message
    assert wanted in str(raised.value.hint)
    assert not list(tmp_path.iterdir())


UNVERIFIABLE: dict[str, tuple[Any, str]] = {
    "checkpoint": (3, "the path of a compiled folder"),
    "reference": (3, "a path or hub id"),
    "text": (["a text"], "a path or hub id"),
    "config_name": (1, "text"),
    "split": (1, "text"),
    "text_column": (1, "text"),
    "sequence_length": (1, "a whole number, at least 2"),
    "sequences": (0, "a whole number, at least 1"),
    "trust_remote_code": ("no", "True or False"),
}


@pytest.mark.parametrize("name", UNVERIFIABLE)
def test_verify_names_an_argument_that_cannot_be_meant(name: str, tmp_path: Path) -> None:
    value, wanted = UNVERIFIABLE[name]
    with pytest.raises(ConfigError, match=f"^{name}=") as raised:
        qcompiler.verify(**{"checkpoint": tmp_path, name: value})
    assert wanted in str(raised.value.hint)


@pytest.mark.parametrize("value", [True, 2.0, "2"])
def test_verify_counts_in_whole_numbers(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^sequences={value!r} is of type {type(value).__name__}\n"):
        qcompiler.verify(tmp_path, sequences=value)


@pytest.mark.parametrize("model", [None, 3, {"model": "a"}, torch.nn.Linear(1, 1)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(QCompilerError, match="cannot be compiled") as raised:
        qcompiler.plan(model, DYNAMIC)
    assert "a folder, a hub id or a loaded" in str(raised.value.hint)


def test_what_is_no_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ConfigError, match=r"^tokenizer=3 is of type int"):
        qcompiler.compile(model, pipeline=DYNAMIC, output=tmp_path / "output", tokenizer=3)  # type: ignore[arg-type]
