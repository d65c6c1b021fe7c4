"""What calibrate claims, when planning: every linear by one run, and no transform that nothing takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from qcompiler.errors import ConfigError, QCompilerError, RuleError
from qcompiler.ir.annotations import get_quant
from tests.passes.models import Run, assign, rule, run

LAYER = "model.layers.0"
ATTENTION, MLP = ["attention-input", "attention-output"], ["mlp-input", "mlp-output"]
INT4 = {"weights": {"type": "int", "bits": 4, "group_size": 16}}
STATIC = {
    "weights": {"type": "int", "bits": 8, "strategy": "channel"},
    "input_activations": {"type": "int", "bits": 8, "strategy": "tensor"},
}
MIXED = assign(
    {**rule(INT4, structure=ATTENTION), "transform": "awq"},
    {**rule(INT4, structure=MLP), "solver": "gptq"},
)


def planned(model_type: str, assigned: Any, *calibrates: Mapping[str, Any]) -> Run:
    return run(model_type, assigned, "insert-observers", *({"calibrate": said} for said in calibrates), "lower")


def claimed(found: Run) -> dict[str, int | None]:
    return {leaf.path: quant.run for node, leaf in found.graph.linears() if (quant := get_quant(node))}


def fallbacks(found: Run) -> list[str]:
    return [text for kind, text in found.notes if kind == "fallback"]


@pytest.mark.parametrize(
    "first", [{"algorithms": ["awq"]}, {"select": [{"structure": ATTENTION}]}], ids=["algorithms", "select"]
)
def test_the_last_run_takes_what_is_left(first: Mapping[str, Any]) -> None:
    runs = claimed(planned("llama", MIXED, first, {}))
    assert {path: 1 if "self_attn" in path else 2 for path in runs} == runs
    assert len(runs) == 14


def test_one_run_takes_everything() -> None:
    assert set(claimed(planned("llama", MIXED, {})).values()) == {1}


NOT_TAKEN = f"{LAYER}.mlp.gate_proj is to become w:int4/g16, and no calibrate before lower solves it"
MISTAKES: dict[str, tuple[list[Mapping[str, Any]], str, str]] = {
    "an algorithm misspelt": (
        [{"algorithms": ["gtpq"]}],
        "calibrate: nothing that is left to calibrate is solved by 'gtpq'; did you mean 'gptq'?",
        "what is left is solved by awq, gptq",
    ),
    "an algorithm taken before": (
        [{"algorithms": ["awq"]}, {"algorithms": ["awq"]}, {}],
        "calibrate: nothing that is left to calibrate is solved by 'awq'",
        "what is left is solved by gptq",
    ),
    "a structure misspelt": (
        [{"select": [{"name": "*.self_atn.*"}]}, {}],
        "calibrate: select 1 {name: *.self_atn.*} matches no linear that is left to calibrate; ",
        "`qcompiler plan` lists what the model has",
    ),
    "linears left over": ([{"algorithms": ["awq"]}], NOT_TAKEN, "add a calibrate without select and algorithms"),
    "a fusion group torn": (
        [{"select": [{"name": ["*.q_proj", "*.k_proj"]}]}, {}],
        f"calibrate: {LAYER}.self_attn.q_proj and {LAYER}.self_attn.v_proj are fused by runtimes, and so belong in "
        "one run",
        "select the whole of attention-input or mlp-input in one calibrate",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_plan_refuses_runs_that_would_not_do(what: str) -> None:
    """Before any weight is read: these models have none."""
    runs, message, hint = MISTAKES[what]
    with pytest.raises(RuleError) as error:
        planned("llama", MIXED, *runs)
    assert error.value.message.startswith(message)
    assert error.value.hint is not None
    assert hint in error.value.hint


def test_linears_of_one_tensor_take_one_transform() -> None:
    assigned = assign(
        {**rule(INT4, structure=ATTENTION), "transform": "awq"},
        {**rule(INT4, structure=MLP), "transform": "smoothquant"},
    )
    with pytest.raises(RuleError) as error:
        planned("phi", assigned, {})
    assert error.value.message.startswith(f"{LAYER}.self_attn.q_proj is to be transformed by awq (")
    assert f"), and {LAYER}.mlp.fc1 by smoothquant (strength=0.5), but they read the same tensor" in error.value.message


def test_a_transform_that_comes_too_late_is_left_out_and_the_report_says_so() -> None:
    """Of a parallel block, whose MLP reads what attention reads; and of values that are rounded already."""
    assigned = assign(rule(INT4, structure=ATTENTION), {**rule(INT4, structure="mlp-input"), "transform": "awq"})
    why = "an earlier calibrate rounds its producer, or another linear that reads the same tensor"
    found = planned("phi", assigned, {"select": [{"structure": ATTENTION}]}, {})
    assert fallbacks(found) == [
        f"no awq (norm -> attention-input, mlp-input) for {LAYER}.mlp.fc1 and 1 more, quantized without it: {why}"
    ]
    output = {**rule(INT4, structure="attention-output"), "transform": "awq"}
    assigned = assign(rule(INT4, structure="attention-input"), output)
    found = planned("llama", assigned, {"select": [{"structure": "attention-input"}]}, {})
    assert fallbacks(found) == [
        f"no awq (attention-input -> attention-output) for {LAYER}.self_attn.o_proj and 1 more, quantized without it: "
        f"{why}"
    ]
    assert fallbacks(planned("llama", assigned, {})) == []


def test_a_linear_whose_inputs_an_earlier_run_rescaled_is_told_of() -> None:
    """Of a parallel block: attention is solved first, and its scale is the MLP's too."""
    assigned = assign({**rule(INT4, structure=["attention-input", "mlp-input"]), "transform": "awq"})
    runs = {"select": [{"structure": "attention-input"}]}, {}
    assert fallbacks(planned("phi", assigned, *runs)) == [
        f"no awq (norm -> attention-input, mlp-input) for {LAYER}.mlp.fc1 and 1 more by themselves: an earlier "
        "calibrate chooses the scale of their inputs, for the linears that it solves of those that read the same tensor"
    ]
    assert fallbacks(planned("phi", assigned, {})) == []


def test_a_transform_that_nothing_takes_is_left_out_and_the_report_says_why() -> None:
    found = planned("phi", assign({**rule(INT4, structure="mlp-output"), "transform": "awq"}), {})
    (text,) = fallbacks(found)
    assert text.startswith(
        f"no awq for {LAYER}.mlp.fc2 and 1 more, quantized without it: no producer takes the scale ("
    )
    assert text.endswith(f"({LAYER}.mlp.fc1: %pow_1 (aten.pow) is not linear in it)")  # its GELU, written out


def test_others_that_read_a_rescaled_tensor_are_told_of() -> None:
    found = planned("phi", assign({**rule(INT4, structure=ATTENTION), "transform": "awq"}), {})
    assert (
        "info",
        f"awq (norm -> attention-input, mlp-input) also rescales the inputs of {LAYER}.mlp.fc1 and 1 more, which read "
        "the same tensor: no output changes",
    ) in found.notes


@pytest.mark.parametrize("kind", ["mse", "percentile"])
def test_a_static_input_that_is_rescaled_has_its_whole_range(kind: str) -> None:
    assigned = assign({**rule(STATIC, structure="mlp-input"), "transform": "smoothquant"})
    with pytest.raises(ConfigError) as error:
        run("llama", assigned, {"insert-observers": {"inputs": kind}})
    assert error.value.message == (
        f"insert-observers: the input of {LAYER}.mlp.gate_proj is rescaled by smoothquant, after which its {kind} "
        "range would be unknown"
    )
    assert error.value.hint == "say inputs: minmax, or use a scheme whose activations are dynamic"


def test_importance_that_nothing_measures_is_refused() -> None:
    with pytest.raises(QCompilerError, match="nothing measures those of"):
        planned("llama", assign(rule(INT4, structure=MLP)), {"scales": "importance"})
