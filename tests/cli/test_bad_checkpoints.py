"""`verify` on what is no compiled checkpoint, on a damaged one, and with a reference or a text that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import write
from tests.cli.conftest import Refuse, Run
from tests.compile.tiny import restamp, tiny_model


@pytest.fixture
def damaged(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the compiled checkpoint, to be damaged."""
    return shutil.copytree(compiled, tmp_path / "damaged")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "text.txt", "The king said to his daughter: " * 40)


def edit_quantization(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    write(file, json.dumps(config))
    (folder / "qcompiler.json").unlink()  # it says what was compiled: without it, config and weights speak
    return folder


def test_what_is_no_compiled_checkpoint_is_refused(tmp_path: Path, model: Path, text: Path, refuse: Refuse) -> None:
    refuse("verify", tmp_path / "none", says=[f"{tmp_path / 'none'}: there is no such folder"])
    refuse("verify", text, says=[str(text), "no such folder"])
    refuse("verify", tmp_path, says=[f"{tmp_path} holds no config.json"])
    refuse("verify", model, says=[f"{model / 'config.json'} has no quantization_config", "compile it first"])


def test_a_checkpoint_with_missing_or_truncated_shards_is_refused(damaged: Path, refuse: Refuse) -> None:
    shard = damaged / "model-00002-of-00003.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-8])
    refuse(
        "verify", damaged, says=[f"{damaged}: not what was written: {shard.name} ({size - 8} bytes in place of {size})"]
    )
    refuse("verify", restamp(damaged), says=[f"{shard}: ", "truncated"])
    shard.unlink()
    refuse("verify", damaged, says=[f"{damaged}: not what was written: {shard.name} (missing)", "copy or download"])
    refuse("verify", restamp(damaged), says=[f"{shard}: the shard is missing"])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda q: q.update(quant_method="gptq"), ["config.json: ", "quant_method 'gptq'", "compressed-tensors"]),
        (
            lambda q: q["config_groups"]["group_0"].update(targets=["none"]),
            ["is stored quantized, but no target", "add"],
        ),
        (
            lambda q: q["config_groups"]["group_0"].update(targets=["re:("]),
            ["config.json: ", "'re:('", "not a regular"],
        ),
        (
            lambda q: q["config_groups"]["group_0"].update(targets=[r"re:^(.*?,?){11}\d$"]),
            ["config.json: ", "did not finish", "backtracks"],
        ),
        (
            lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="tensor"),
            ["model.layers.0.", "weight_scale is bfloat16 [64, 1], expected", "config.json and weights"],
        ),
    ],
    ids=["method", "targets", "regex", "endless regex", "strategy"],
)
def test_a_quantization_config_that_does_not_fit_the_weights_is_refused(
    edit: Callable[[dict[str, Any]], object], says: list[str], damaged: Path, refuse: Refuse
) -> None:
    refuse("verify", edit_quantization(damaged, edit), says=[str(damaged), *says])


def test_a_config_of_unknown_class_is_refused(damaged: Path, refuse: Refuse) -> None:
    write(damaged / "config.json", (damaged / "config.json").read_text().replace('"llama"', '"lama"'))
    refuse("verify", restamp(damaged), says=["config.json: model_type 'lama' is not known", "did you mean 'llama'"])


@pytest.mark.parametrize("option", ["--text-column=text", "--split=test", "--sequences=3", "--sequence-length=64"])
def test_options_of_the_text_need_a_text(option: str, compiled: Path, refuse: Refuse) -> None:
    refuse("verify", compiled, option, says=[f"{option.partition('=')[0]}: it needs --text"], usage=True)


def test_a_text_that_cannot_be_used_is_named(compiled: Path, tmp_path: Path, refuse: Refuse) -> None:
    refuse("verify", compiled, "--text", tmp_path / "none.txt", says=["no file or folder", "none.txt", "path"])
    short = write(tmp_path / "short.txt", "To be")
    refuse("verify", compiled, "--text", short, says=["short.txt has 6 tokens", "fewer than one sequence of 128"])
    two = write(tmp_path / "two.jsonl", '{"ask": "who art thou", "answer": "the king"}\n' * 40)
    refuse("verify", compiled, "--text", two, says=["which column of", "--text-column", "columns: ask, answer"])
    refuse("verify", compiled, "--text", two, "--text-column=king", says=["no column 'king'", "columns: ask, answer"])


def test_a_text_without_a_tokenizer_says_where_one_is_looked_for(damaged: Path, text: Path, refuse: Refuse) -> None:
    for file in damaged.glob("token*"):
        file.unlink()
    says = [f"no tokenizer can be loaded from {damaged}", "put tokenizer files there", "input_ids"]
    refuse("verify", restamp(damaged), "--text", text, says=says)


def test_a_reference_that_does_not_fit_is_refused(compiled: Path, text: Path, tmp_path: Path, refuse: Refuse) -> None:
    other = tiny_model("llama", layers=1)
    other.resize_token_embeddings(300)
    other.save_pretrained(tmp_path / "other")
    args = ["verify", compiled, "--text", text, "--reference"]
    refuse(*args, tmp_path / "none", says=[f"{tmp_path / 'none'}: there is no such folder"])
    refuse(*args, compiled, says=["already quantized"])
    refuse(*args, tmp_path / "other", says=["reference ", "a vocabulary of 300 tokens", "one of 320", "compiled from"])


def test_a_damaged_reference_is_refused(compiled: Path, broken: Path, text: Path, refuse: Refuse) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refuse("verify", compiled, "--text", text, "--reference", broken, says=[f"{file}: ", "truncated"])


def test_a_text_window_beyond_the_model_is_capped_and_this_is_said(compiled: Path, text: Path, run: Run) -> None:
    ran = run("verify", compiled, "--text", text, "--sequence-length", "1000", "--sequences", "2")
    assert (ran.code, ran.err) == (0, "")
    assert "note: sequence length capped at the model's window: 128, not 1000" in ran.out
