"""Loaded models: compiled as their folder would be, and left as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import qcompiler
from tests.compile.tiny import (
    ATTENTION,
    INT8,
    MLP,
    SHORT,
    pipeline,
    quantization,
    rule,
    same,
    stored,
    tiny_model,
    token_rows,
    weight_files,
)


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_a_loaded_model_gives_the_bytes_of_its_folder_and_is_not_changed(family: str, tmp_path: Path) -> None:
    model = tiny_model(family).train()
    model.save_pretrained(tmp_path / "source")
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    config, attributes = copy.deepcopy(model.config.to_dict()), set(vars(model))
    static = pipeline(rule(ATTENTION, "FP8"))
    options = {"pipeline": static, "calibration": token_rows(), "sampling": SHORT}
    from_folder = qcompiler.compile(tmp_path / "source", output=tmp_path / "from-folder", **options)
    loaded = qcompiler.compile(model, output=tmp_path / "loaded", **options)
    assert weight_files(loaded.output) == weight_files(from_folder.output)
    assert quantization(loaded.output) == quantization(from_folder.output)
    assert qcompiler.verify(loaded.output).difference == 0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(same(before[path], after[path]) for path in before)
    assert (model.config.to_dict(), set(vars(model)), model.training) == (config, attributes, True)
    assert not any(hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))


def test_a_loaded_model_of_changed_weights_is_compiled_as_it_is_now(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source")
    model = type(model).from_pretrained(tmp_path / "source")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    result = qcompiler.compile(model, pipeline=pipeline(rule(MLP, INT8)), output=tmp_path / "output")
    codes = stored(result.output)["model.layers.0.mlp.down_proj.weight_packed"]
    assert bool((codes.view(torch.uint8) == 128).all())  # zeros, as they are packed
    assert result.report.row("model.layers.0.mlp.down_proj").error == 0
    assert qcompiler.verify(result.output).difference == 0
