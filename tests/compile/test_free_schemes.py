"""Schemes beyond the presets, a different one on every fusion group of a model: written, loaded and computed alike."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import qcompiler
from passes.assign import Rule
from qcompiler.scheme import Scheme
from tests.compile.tiny import (
    EVERYWHERE,
    INT8,
    compile_tiny,
    pipeline,
    quantization,
    rule,
    save_tiny,
    stored,
)

STRUCTURES = ("attention-input", "attention-output", "mlp-input", "mlp-output")
TOKEN_INT8 = {"type": "int", "bits": 8, "dynamic": True}
STATIC_INT8 = {"type": "int", "bits": 8, "strategy": "tensor"}
TOKEN_FP8 = {"type": "float", "bits": 8, "dynamic": True}
STATIC_FP8 = {"type": "float", "bits": 8, "strategy": "tensor"}
GROUP_FP8 = {"type": "float", "bits": 8, "strategy": "group", "group_size": 32, "dynamic": True}


def integers(bits: int, symmetric: bool, **strategy: Any) -> dict[str, Any]:
    return {"type": "int", "bits": bits, "symmetric": symmetric, **strategy}


def floats(**strategy: Any) -> dict[str, Any]:
    return {"type": "float", "bits": 8, **strategy}


WEIGHTS_ALONE: list[dict[str, Any]] = [
    {"weights": integers(bits, symmetric, **strategy)}
    for bits in range(2, 9)
    for symmetric in (True, False)
    for strategy in ({"strategy": "channel"}, {"group_size": 16})
] + [
    {"weights": floats(**strategy)}
    for strategy in ({"strategy": "tensor"}, {"strategy": "channel"}, {"block_structure": [16, 32]})
]
WITH_ACTIVATIONS: list[dict[str, Any] | str] = [
    {"weights": integers(4, True, group_size=32), "input_activations": TOKEN_INT8},
    {"weights": integers(5, False, strategy="channel"), "input_activations": STATIC_INT8},
    {"weights": integers(4, True, group_size=16), "input_activations": {**TOKEN_INT8, "bits": 4}},
    {"weights": integers(4, True, group_size=32), "input_activations": TOKEN_FP8},
    {"weights": integers(8, True, strategy="tensor"), "input_activations": STATIC_INT8},
    {"weights": integers(8, True, strategy="channel"), "input_activations": {**TOKEN_INT8, "symmetric": False}},
    {"weights": integers(8, False, strategy="channel"), "input_activations": {**STATIC_INT8, "symmetric": False}},
    {"weights": integers(8, True, group_size=32), "input_activations": TOKEN_INT8},
    {"weights": floats(strategy="tensor"), "input_activations": TOKEN_FP8},
    {"weights": floats(strategy="channel"), "input_activations": STATIC_FP8},
    {"weights": floats(block_structure=[32, 32]), "input_activations": GROUP_FP8},
    *("FP8", "FP8_DYNAMIC", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "W8A8"),
]


def test_the_lists_have_no_scheme_twice() -> None:
    for schemes in (WEIGHTS_ALONE, WITH_ACTIVATIONS):
        shorts = [short(scheme) for scheme in schemes]
        assert len(set(shorts)) == len(shorts)


def short(scheme: Any) -> str:
    found = Rule.model_validate(rule({"name": "*"}, scheme)).scheme
    assert isinstance(found, Scheme)
    return found.short


@pytest.mark.parametrize("schemes", [WEIGHTS_ALONE, WITH_ACTIVATIONS], ids=["weights", "activations"])
@pytest.mark.parametrize("scales", ["minmax", "mse"])
def test_every_group_of_a_model_may_have_another_scheme(schemes: list[Any], scales: str, tmp_path: Path) -> None:
    layers = -(-len(schemes) // len(STRUCTURES))
    source = save_tiny(tmp_path / "source", "llama", layers=layers, intermediate_size=96)  # 3 groups of 32
    places = [{"layers": index, "structure": structure} for index in range(layers) for structure in STRUCTURES]
    rules = [rule(place, scheme) for place, scheme in zip(places, schemes, strict=False)]
    result = compile_tiny(source, tmp_path / "output", pipeline(*rules, scales=scales), rows=4)
    assert len(quantization(result.output)["config_groups"]) == len(schemes)
    assert sum(tensor.nbytes for tensor in stored(result.output).values()) == result.plan.report.total_bytes
    assert qcompiler.verify(result.output).difference == 0
    errors = {row.scheme: row.error for row in result.report.layers if row.scheme}
    assert errors.keys() == {short(scheme) for scheme in schemes}
    if schemes is WEIGHTS_ALONE:
        by_bits = [errors[f"w:int{bits}/g16"] for bits in range(2, 9)]
        assert all(more is not None and more > 3 * (less or 0) for more, less in pairwise(by_bits))


def test_a_group_that_does_not_divide_becomes_a_channel_and_that_is_said(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")  # its MLP is 176 wide
    result = qcompiler.compile(
        source,
        pipeline=pipeline(
            rule(EVERYWHERE, {"weights": {**INT8["weights"], "group_size": 64}}), on_indivisible="channel"
        ),
        output=tmp_path / "output",
    )
    schemes = {row.structure: row.scheme for row in result.report.layers}
    assert schemes["mlp-output"] == "w:int8/channel"
    assert schemes["mlp-input"] == "w:int8/g64"
    fallbacks = [note.text for note in result.report.notes if note.kind == "fallback"]
    assert any("64 does not divide the 176 inputs of model.layers.0.mlp.down_proj" in text for text in fallbacks)
    assert qcompiler.verify(result.output).difference == 0
