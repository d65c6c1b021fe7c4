"""`verify` on checkpoints that are not what was compiled: each is refused, and says what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.errors import CaptureError, QCompilerError, VerificationError
from tests.compile.damage import DOWN, QUERY, Config, Tensors, change_config, change_tensors, damaged, refusal, sound

__all__ = ["damaged", "sound"]  # fixtures


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


def test_a_model_whose_folder_says_too_little_for_a_graph_is_not_called_damaged(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was compiled as a loaded model, whose buffers no file holds."""
    from qcompiler.lowering import evaluate

    def fail(model: object) -> None:
        raise CaptureError("buffer x is in no checkpoint", hint="pass the loaded model itself instead of its folder")

    monkeypatch.setattr(evaluate, "capture_graph", fail)
    with pytest.raises(VerificationError, match=r"cannot be rebuilt from its config.*: buffer x is in") as caught:
        qcompiler.verify(sound)
    assert caught.value.hint == "this is no sign of damage: judge the checkpoint in the runtime that serves it"


@pytest.mark.parametrize(("name", "expected"), [("nowhere", "nowhere"), ("source", "this checkpoint is not quantized")])
def test_what_is_no_compiled_checkpoint_is_refused(sound: Path, name: str, expected: str) -> None:
    assert expected in refusal(sound.parent / name)
