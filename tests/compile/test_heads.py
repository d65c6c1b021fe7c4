"""The head, tied to the embedding or not: dense, it stays as it is; quantized, it is a layer of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qcompiler
from qcompiler import Result
from qcompiler.errors import RuleError
from tests.compile.tiny import (
    ATTENTION,
    INT4_ASYM,
    INT8,
    compile_tiny,
    model_config,
    pipeline,
    quantization,
    rule,
    save_tiny,
    stored,
)

HEAD = {"structure": "lm-head"}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tied` and `untied` checkpoints of the same family; `apart` is untied, and its config says that it is tied."""
    folder = tmp_path_factory.mktemp("heads")
    save_tiny(folder / "tied", "llama", tie_word_embeddings=True)
    save_tiny(folder / "untied", "llama")
    save_tiny(folder / "apart", "llama")
    config = {**model_config(folder / "apart"), "tie_word_embeddings": True}
    (folder / "apart" / "config.json").write_text(json.dumps(config))
    return folder


def compiled(source: Path, output: Path, *rules: dict[str, object]) -> Result:
    return compile_tiny(source, output, pipeline(rule(ATTENTION, INT8), *rules))


def head_keys(output: Path) -> set[str]:
    return {key for key in stored(output) if key.startswith("lm_head.")}


def test_a_dense_tied_head_is_in_no_file_and_stays_tied(folder: Path, tmp_path: Path) -> None:
    assert not head_keys(folder / "tied")
    result = compiled(folder / "tied", tmp_path / "output")
    assert not head_keys(result.output)
    assert model_config(result.output)["tie_word_embeddings"]
    assert not any("tie_word_embeddings" in note.text for note in result.report.notes)
    assert (result.report.row("lm_head").scheme, result.report.row("lm_head").bytes) == (None, 0)
    assert qcompiler.verify(result.output).difference == 0


@pytest.mark.parametrize("select", [HEAD, {"name": "lm_head"}], ids=["structure", "name"])
def test_a_quantized_tied_head_becomes_a_layer_of_its_own(
    folder: Path, tmp_path: Path, select: dict[str, object]
) -> None:
    result = compiled(folder / "tied", tmp_path / "output", rule(select, INT4_ASYM))
    assert head_keys(result.output) == {
        f"lm_head.{name}" for name in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    }
    assert model_config(folder / "tied")["tie_word_embeddings"]
    assert model_config(result.output)["tie_word_embeddings"] is False
    (note,) = (note for note in result.report.notes if "tie_word_embeddings" in note.text)
    assert (note.kind, "lm_head.weight is not tied" in note.text) == ("info", True)
    assert torch.equal(stored(result.output)[EMBEDDING], stored(folder / "tied")[EMBEDDING])
    assert result.report.row("lm_head").bytes == sum(
        stored(result.output)[key].nbytes for key in head_keys(result.output)
    )
    assert result.report.total_bytes == sum(tensor.nbytes for tensor in stored(result.output).values())
    assert qcompiler.verify(result.output).difference == 0


@pytest.mark.parametrize("scheme", [None, INT4_ASYM], ids=["dense", "quantized"])
def test_a_head_of_its_own_beside_a_config_that_ties_it_is_written_as_untied(
    folder: Path, tmp_path: Path, scheme: dict[str, object] | None
) -> None:
    source = folder / "apart"
    loaded = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(loaded.lm_head.weight, stored(source)["lm_head.weight"])
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    result = compiled(source, tmp_path / "output", *([rule(HEAD, scheme)] if scheme else []))
    written = stored(result.output)
    assert model_config(result.output)["tie_word_embeddings"] is False
    assert torch.equal(written[EMBEDDING], stored(source)[EMBEDDING])
    assert ("lm_head.weight_packed" in written, "lm_head.weight" in written) == (scheme is not None, scheme is None)
    if scheme is None:
        assert torch.equal(written["lm_head.weight"], stored(source)["lm_head.weight"])
    (note,) = (note for note in result.report.notes if "tie_word_embeddings" in note.text)
    assert note.kind == "warning"
    assert "lm_head.weight is not tied, though the config says so: the files hold other values" in note.text
    assert result.plan.report.total_bytes == sum(tensor.nbytes for tensor in written.values())
    assert qcompiler.verify(result.output, reference=source).difference == 0


def test_a_loaded_model_whose_head_came_apart_is_written_as_untied(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "apart")
    assert model.config.tie_word_embeddings
    result = compile_tiny(model, tmp_path / "output", pipeline(rule(HEAD, INT4_ASYM)))
    assert model_config(result.output)["tie_word_embeddings"] is False
    assert qcompiler.verify(result.output).difference == 0


@pytest.mark.parametrize("scheme", [None, INT4_ASYM], ids=["dense", "quantized"])
def test_a_plan_says_how_many_bytes_a_head_takes_that_is_not_the_embedding(
    folder: Path, tmp_path: Path, scheme: dict[str, object] | None
) -> None:
    chosen = pipeline(rule(ATTENTION, INT8), *([rule(HEAD, scheme)] if scheme else []))
    planned = qcompiler.plan(folder / "apart", chosen).report
    more = compile_tiny(folder / "apart", tmp_path / "output", chosen).report.total_bytes - planned.total_bytes
    assert more == (0 if scheme else stored(folder / "apart")["lm_head.weight"].nbytes)
    (note,) = (note for note in planned.notes if "stored twice" in note.text)
    assert (f"and writes {more} bytes more where they differ" in note.text) == (scheme is None)


def test_a_head_is_targeted_by_name_alone(folder: Path, tmp_path: Path) -> None:
    """Loaders do not take a class or an expression for the head."""
    result = compiled(folder / "untied", tmp_path / "output", rule(HEAD, INT4_ASYM))
    config = quantization(result.output)
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert "lm_head" in targets
    assert not any("lm_head" in target for target in targets if target.startswith("re:"))
    assert "Linear" not in targets
    assert "lm_head" not in config["ignore"]
    assert qcompiler.verify(result.output).difference == 0
    client = AutoModelForCausalLM.from_pretrained(result.output)
    assert client.lm_head.quantization_scheme.weights.num_bits == 4


def test_a_dense_head_is_ignored_by_name(folder: Path, tmp_path: Path) -> None:
    result = compiled(folder / "untied", tmp_path / "output")
    assert "lm_head" in quantization(result.output)["ignore"]
    assert torch.equal(stored(result.output)["lm_head.weight"], stored(folder / "untied")["lm_head.weight"])


def test_a_head_with_measured_inputs_is_calibrated_after_the_last_layer(folder: Path, tmp_path: Path) -> None:
    result = compiled(folder / "tied", tmp_path / "output", rule(HEAD, "FP8"))
    assert head_keys(result.output) == {f"lm_head.{name}" for name in ("weight", "weight_scale", "input_scale")}
    assert float(stored(result.output)["lm_head.input_scale"]) > 0
    assert qcompiler.verify(result.output).difference == 0


def test_no_linear_takes_the_embeddings_place(folder: Path) -> None:
    with pytest.raises(RuleError, match=r"matches no linear .only embedding: model.embed_tokens"):
        qcompiler.plan(folder / "tied", pipeline(rule({"structure": "embedding"}, INT8)))
