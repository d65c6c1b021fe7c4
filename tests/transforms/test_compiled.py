"""AWQ and SmoothQuant in compilations: what is folded is what the data asks for, and the model is better for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import qcompiler
from qcompiler import CalibrationSpec, Result
from qcompiler.numerics import quantize_weight
from qcompiler.report import LayerRow
from qcompiler.scheme import Scheme
from qcompiler.table_check import WeightComparison
from tests.compile.tiny import (
    EVERYWHERE,
    INT4_ASYM,
    INT8,
    INT8_STATIC,
    compile_tiny,
    pipeline,
    provenance,
    rule,
    save_tiny,
    stored,
    tiny_model,
    token_rows,
)

ROWS = token_rows(8, 64)
IN_ORDER = CalibrationSpec(sequence_length=64, shuffle=False)
IDS = torch.tensor([row["input_ids"] for row in ROWS])
NORMS = ("input_layernorm", "post_attention_layernorm")
READERS = {NORMS[0]: [f"self_attn.{n}_proj" for n in "qkv"], NORMS[1]: ["mlp.gate_proj", "mlp.up_proj"]}
OUTLIERS = [3, 17, 40]


@dataclass(frozen=True, slots=True)
class Case:
    """A model with outlier channels: SmoothQuant in its first layer and AWQ in its second, and neither in either."""

    source: Path
    transformed: Result
    plain: Result
    inputs: dict[str, Tensor]
    """What enters each linear of the dense model, float32 [tokens, I]."""


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval()


def inputs(folder: Path) -> dict[str, Tensor]:
    model, seen = loaded(folder), {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(_: Any, args: tuple[Tensor, ...], path: str = path) -> None:
                seen[path] = args[0].flatten(0, 1)

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(IDS)
    return seen


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("transformed")
    model: Any = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in NORMS:
                getattr(layer, norm).weight[OUTLIERS] *= 25
    model.save_pretrained(folder / "source")
    schemes = (INT8_STATIC, INT4_ASYM)
    made = []
    for transforms in (("smoothquant", "awq"), ("none", "none")):
        rules = (
            rule({**EVERYWHERE, "layers": layer}, scheme, transform=transform)
            for layer, (scheme, transform) in enumerate(zip(schemes, transforms, strict=True))
        )
        made.append(
            qcompiler.compile(
                folder / "source",
                pipeline=pipeline(*rules, runs=({"propagate": "layer"},)),  # the oracle is the dense layer
                output=folder / transforms[0],
                calibration=ROWS,
                sampling=IN_ORDER,
            )
        )
    return Case(folder / "source", *made, inputs(folder / "source"))


def rows(case: Case, layer: int) -> Iterator[LayerRow]:
    return (row for row in case.transformed.report.layers if row.layer == layer)


def scale_of(case: Case, norm: str) -> Tensor:
    """What a norm was divided by, as its weights on disk say."""
    return stored(case.source)[f"{norm}.weight"] / stored(case.transformed.output)[f"{norm}.weight"]


def test_transformers_computes_what_was_transformed(case: Case) -> None:
    assert qcompiler.verify(case.transformed.output).difference < 1e-4


def test_verify_does_not_compare_what_was_transformed_and_says_so(case: Case) -> None:
    verified = qcompiler.verify(case.transformed.output, reference=case.source)
    assert verified.weights is not None
    assert (verified.weights.layers, verified.weights.tensors) == (0, 3)  # embedding, last norm and head
    assert "not compared, as a transform rescaled them: model.layers.0.input_layernorm.weight; " in str(verified)
    assert qcompiler.verify(case.plain.output, reference=case.source).weights == WeightComparison(14, 7)


def test_layers_that_were_rescaled_for_others_are_not_compared_either(case: Case, tmp_path: Path) -> None:
    """Values, divided for what reads them."""
    chosen = pipeline(
        rule({"structure": "attention-output", "layers": 1}, INT4_ASYM, transform="awq"),
        rule({"structure": "attention-input"}, INT4_ASYM),
    )
    output = tmp_path / "output"
    result = qcompiler.compile(case.source, pipeline=chosen, output=output, calibration=ROWS, sampling=IN_ORDER)
    values, out = (f"model.layers.1.self_attn.{name}_proj" for name in "vo")
    assert result.report.rescaled == [f"{path}.weight" for path in sorted([out, values])]
    assert [row.path for row in result.report.layers if row.transform] == [out]
    verified = qcompiler.verify(output, reference=case.source)
    assert verified.weights is not None
    assert (verified.weights.layers, verified.weights.rescaled) == (5, tuple(result.report.rescaled))


def test_outputs_are_nearer_to_the_dense_models(case: Case) -> None:
    divergences = []
    with torch.no_grad():
        dense = loaded(case.source)(IDS).logits.log_softmax(-1)
        for result in (case.plain, case.transformed):
            found = loaded(result.output)(IDS).logits.log_softmax(-1)
            divergences.append(float((dense.exp() * (dense - found)).sum(-1).mean()))
    assert 0 < divergences[1] < 0.5 * divergences[0]


def test_the_report_says_what_became_of_each_layer(case: Case) -> None:
    for row in rows(case, 0):
        assert (row.transform, row.ratio, row.transform_gain) == ("smoothquant", None, None)
    for row in rows(case, 1):
        assert row.transform == "awq"
        assert row.transform_gain is not None
        assert row.transform_gain <= 1
        assert (row.ratio is None) == (row.transform_gain == 1)
    gains = {row.path.rpartition(".")[2]: row.transform_gain for row in rows(case, 1)}
    assert max(gains[name] for name in ("q_proj", "gate_proj")) < 0.5  # type: ignore[type-var]  # outliers stand here
    assert gains["q_proj"] == gains["v_proj"]
    written = {row["path"]: row for row in provenance(case.transformed.output)["report"]["layers"]}
    for row in case.transformed.report.layers:
        said = written[row.path]
        assert (said["transform"], said["ratio"], said["transform_gain"]) == (
            row.transform,
            row.ratio,
            row.transform_gain,
        )


@pytest.mark.parametrize("norm", NORMS)
def test_smoothquant_balances_activations_and_weights_as_the_paper_does(norm: str, case: Case) -> None:
    """Equation 4, with a strength of 0.5."""
    dense = stored(case.source)
    readers = [f"model.layers.0.{name}" for name in READERS[norm]]
    weights = torch.cat([dense[f"{path}.weight"] for path in readers]).abs().amax(0)
    expected = (case.inputs[readers[0]].abs().amax(0) / weights).sqrt()
    torch.testing.assert_close(scale_of(case, f"model.layers.0.{norm}"), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_static_input_scale_is_that_of_the_rescaled_input(norm: str, case: Case) -> None:
    """The inputs of the dense model's norms, through the norms as they were written."""
    written = stored(case.transformed.output)
    model: Any = loaded(case.source)
    module = getattr(model.model.layers[0], norm)
    with torch.no_grad():
        module.weight.copy_(written[f"model.layers.0.{norm}.weight"])
        seen: list[Tensor] = []
        module.register_forward_hook(lambda *args: seen.append(args[2]))
        # A rescaled norm feeds linears that were not rescaled here: what comes before it is still the dense model's.
        model(IDS)
    expected = seen[0].abs().max() / 127.5
    for name in READERS[norm]:
        scale = written[f"model.layers.0.{name}.input_scale"]
        torch.testing.assert_close(scale, expected.expand_as(scale), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("norm", NORMS)
def test_columns_are_multiplied_by_what_the_norm_is_divided_by(norm: str, layer: int, case: Case) -> None:
    """The first reader of a norm, which feeds no other linear: its scales are those of its scaled weight."""
    path, scheme = f"model.layers.{layer}.{READERS[norm][0]}", (INT8_STATIC, INT4_ASYM)[layer]
    scale = scale_of(case, f"model.layers.{layer}.{norm}")
    assert scale[OUTLIERS].median() > 2 * scale.median()
    weight = stored(case.source)[f"{path}.weight"] * scale
    spec = Scheme.model_validate(scheme).weights
    expected = quantize_weight(weight, spec, scales="minmax", scale_dtype=torch.float32)
    found = stored(case.transformed.output)[f"{path}.weight_scale"]
    torch.testing.assert_close(found, expected.scale.reshape(found.shape), rtol=1e-4, atol=0)


def test_a_scale_is_written_into_part_of_a_tensor_that_lies_on_disk_concatenated(tmp_path: Path) -> None:
    source, mlp = tmp_path / "source", "model.H_module.layers.0.mlp"
    save_tiny(source, "hrm_text", dtype=torch.float32, H_cycles=1, L_cycles=2, num_layers_per_stack=1)
    chosen = pipeline(rule({"name": [f"{mlp}.down_proj"]}, INT8, transform="awq"))
    result = compile_tiny(source, tmp_path / "output", chosen)
    assert result.report.row(f"{mlp}.down_proj").ratio is not None
    before, after = stored(source), stored(result.output)
    gate, up = before[f"{mlp}.gate_up_proj.weight"].chunk(2)
    gate_written, up_written = after[f"{mlp}.gate_up_proj.weight"].chunk(2)
    assert torch.equal(gate, gate_written)
    scale = (up.double() * up_written).sum(1) / up_written.double().square().sum(1)
    assert (scale - 1).abs().max() > 0.01
    torch.testing.assert_close(up.double() / scale.unsqueeze(1), up_written.double(), rtol=1e-5, atol=0)
    down = before[f"{mlp}.down_proj.weight"] * scale
    torch.testing.assert_close(
        after[f"{mlp}.down_proj.weight_scale"].double(),
        down.unflatten(1, (-1, 16)).abs().amax(2) / 127.5,
        rtol=1e-5,
        atol=0,
    )
    verified = qcompiler.verify(result.output, reference=source)
    assert verified.difference == 0
    assert verified.weights is not None
    assert verified.weights.rescaled == (f"{mlp}.down_proj.weight", f"{mlp}.up_proj.weight")
