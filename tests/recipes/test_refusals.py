"""What a recipe asks for that cannot be honoured: an error that says what, where and why."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from qcompiler.errors import ConfigError, RuleError
from qcompiler.pipeline import parse_pipeline
from tests.recipes.test_recipes import chosen, planned, recipe

INT4 = {"num_bits": 4, "group_size": 128}


def refusal(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        parse_pipeline(text, where="recipe.yaml")
    assert raised.value.hint
    return raised.value


def group(**said: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], **said}}}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SparseGPTModifier", "weights are not pruned here"),
        ("WandaPruningModifier", "weights are not pruned here"),
        ("SpinQuantModifier", "weights are not rotated here"),
        ("AutoRoundModifier", "use GPTQModifier"),
        ("GPTQModifer", "unknown key; did you mean 'GPTQModifier'"),
        ("GPQTModifier", "unknown modifier; did you mean 'GPTQModifier'"),
    ],
)
def test_a_modifier_without_a_counterpart_is_refused_with_the_reason(name: str, why: str) -> None:
    error = refusal(recipe(name, sparsity=0.5))
    assert error.message.startswith(f"recipe.yaml:3: quant_stage.quant_modifiers.{name}: ")
    assert why in error.message


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        (
            "GPTQModifier",
            {"scheme": "W4A16", "dampening": 0.1},
            "dampening: unknown option; did you mean 'dampening_frac'",
        ),
        (
            "GPTQModifier",
            {"scheme": "W4A16", "dampening_frac": 2},
            "dampening_frac: Input should be less than or equal to 1",
        ),
        ("GPTQModifier", {"scheme": "W4A16", "actorder": "columns"}, "actorder: Input should be 'static' or 'group'"),
        ("GPTQModifier", {"scheme": "W4A17"}, "scheme: unknown scheme 'W4A17'; did you mean 'W4A16'"),
        ("GPTQModifier", {"scheme": {"W4A61": ["Linear"]}}, "scheme: unknown scheme 'W4A61'; did you mean 'W4A16'"),
        ("GPTQModifier", {"scheme": "W4A16", **group(weights=INT4)}, "it says both `scheme` and `config_groups`"),
        ("GPTQModifier", {"targets": "Linear", "ignore": ["lm_head"]}, "nothing to quantize"),
        ("GPTQModifier", {}, "nothing to quantize"),
        ("QuantizationModifier", {}, "nothing to quantize"),
        (
            "GPTQModifier",
            {"scheme": "W4A16", "targets": ["re:("]},
            "targets[0]: target 're:(' is not a regular expression",
        ),
        (
            "GPTQModifier",
            {"scheme": "W4A16", "ignore": ["re:["]},
            "ignore[0]: target 're:[' is not a regular expression",
        ),
        ("GPTQModifier", {"scheme": "W4A16", "start": 1.0}, "start: there are no steps of training here: leave it out"),
        ("GPTQModifier", group(weights={"num_bit": 4}), "weights.num_bit: unknown option; did you mean 'num_bits'"),
        *(
            (
                "GPTQModifier",
                group(weights={"num_bits": 8, **said}),
                f"weights: group_size {said['group_size']}: a group",
            )
            for said in (
                {"group_size": 0},
                {"group_size": -2},
                {"group_size": 0, "strategy": "group"},
                {"group_size": -1, "strategy": "group"},
            )
        ),
        (
            "GPTQModifier",
            {"scheme": {"weights": {"num_bits": 8}}},
            "scheme: expected the name of a preset, or {preset: ",
        ),
        (
            "GPTQModifier",
            {"scheme": {}},
            "scheme: expected the name of a preset, or {preset: targets}; bits and groups",
        ),
        ("GPTQModifier", {"scheme": "W4A16", "dampening_frac": -1}, "dampening_frac: Input should be greater than or"),
        ("GPTQModifier", group(weights={"num_bits": 16}), "weights: integers have 2 to 8 bits, not 16"),
        (
            "GPTQModifier",
            group(weights={**INT4, "symmetric": False, "type": "float"}),
            "float quantization is symmetric",
        ),
        ("GPTQModifier", group(weights={**INT4, "dynamic": True}), "weights are static: dynamic must be false"),
        (
            "GPTQModifier",
            group(weights=INT4, format="int-quantized"),
            "is written as pack-quantized, not int-quantized",
        ),
        ("GPTQModifier", group(weights=INT4, output_activations=INT4), "output_activations: outputs are not quantized"),
        ("GPTQModifier", group(input_activations=INT4), "activations of modules whose weights stay as they are"),
        (
            "GPTQModifier",
            {**group(weights={**INT4, "actorder": "group"}), "actorder": "static"},
            "actorder group of the weights, and static of the modifier",
        ),
        (
            "QuantizationModifier",
            {"scheme": "W4A16", "weight_observer": "imatrix_mse"},
            "there is no observer like 'imatrix_mse' here",
        ),
        (
            "QuantizationModifier",
            {"scheme": "FP8", "weight_observer": "mse", "observer": {"input": "mse"}},
            "it says observers a second time",
        ),
        (
            "QuantizationModifier",
            {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
            "kv_cache_scheme is int8/tensor",
        ),
        (
            "QuantizationModifier",
            {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}},
            "kv_cache_scheme is fp8/tensor/dynamic",
        ),
        ("AWQModifier", {"duo_scaling": True}, "nothing in it quantizes"),
        ("AWQModifier", {"scheme": "W4A16", "n_grid": 1}, "n_grid: Input should be greater than or equal to 2"),
        ("SmoothQuantModifier", {}, "nothing in it quantizes"),
        ("SmoothQuantModifier", {"algorithm": "log_equalization"}, "algorithm: log_equalization is not known here"),
        (
            "SmoothQuantModifier",
            {"smoothing_strength": 1.5},
            "smoothing_strength: Input should be less than or equal to 1",
        ),
        ("SmoothQuantModifier", {"mappings": [["re:.*q_proj"]]}, "mappings[0]"),
        ("SmoothQuantModifier", {"mappings": [[["a"], ["b", "c"]]]}, "mappings: one layer is smoothed, not b, c"),
        ("AWQModifier", {"mappings": [{"smooth_layer": "re:("}]}, "smooth_layer: target 're:(' is not a regular"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_honoured_is_refused_where_it_stands(name: str, args: Any, says: str) -> None:
    message = refusal(recipe(name, **args)).message
    assert message.startswith("recipe.yaml:")
    assert says in message


def test_a_scheme_that_is_none_of_two_forms_is_one_line() -> None:
    assert "\n" not in refusal(recipe("GPTQModifier", scheme={"weights": {"num_bits": 8}})).message


def test_words_that_a_modifier_does_not_take_are_answered_with_those_that_it_takes() -> None:
    assert (refusal(recipe("SmoothQuantModifier", strength=0.5)).hint or "").startswith(
        "SmoothQuantModifier takes smoothing_strength, mappings, ignore, "
    )


@pytest.mark.parametrize(
    ("modifiers", "says"),
    [
        (
            [{"SmoothQuantModifier": {}}, {"AWQModifier": {}}, {"QuantizationModifier": {"scheme": "W8A8"}}],
            "rescaled once",
        ),
        ([{"SmoothQuantModifier": {}}, {"AWQModifier": {"scheme": "W8A8"}}], "SmoothQuantModifier does it"),
        ([{"QuantizationModifier": {"scheme": "W8A8"}}, {"SmoothQuantModifier": {}}], "weights that are rounded"),
        ([{"QuantizationModifier": {"scheme": "W8A8"}}, {"AWQModifier": {}}], "nothing after it quantizes"),
    ],
    ids=str,
)
def test_modifiers_that_do_not_go_together_are_refused(modifiers: Any, says: str) -> None:
    assert says in refusal(yaml.safe_dump(modifiers)).message


def mapped(smooth: str, balance: str) -> str:
    return recipe("AWQModifier", scheme="W4A16", mappings=[{"smooth_layer": smooth, "balance_layers": [balance]}])


def test_a_mapping_from_another_producer_than_the_graph_s_is_refused() -> None:
    with pytest.raises(RuleError) as raised:
        planned(mapped("re:.*input_layernorm", "re:.*gate_proj"))
    assert raised.value.message == (
        "mapping re:.*input_layernorm -> re:.*gate_proj: model.layers.0.mlp.gate_proj reads what "
        "model.layers.0.post_attention_layernorm gives"
    )
    assert raised.value.hint


def test_a_mapping_into_which_no_scale_can_move_is_refused_with_what_is_nearest() -> None:
    with pytest.raises(RuleError) as raised:
        planned(mapped("re:.*fc1", "re:.*fc2"), model="phi")
    said = (
        "mapping re:.*fc1 -> re:.*fc2: the input of model.layers.0.mlp.fc2 cannot be rescaled; model.layers.0.mlp.fc1: "
    )
    assert raised.value.message.startswith(said)


def test_a_mapping_that_matches_nothing_is_a_warning() -> None:
    done = planned(mapped("re:.*input_layernrom", "re:.*qkv_proj"))
    found = [text for kind, text in done.notes if kind == "warning"]
    assert [text.partition(";")[0] for text in found] == [
        "assign-targets: mapping re:.*input_layernrom matches nothing",
        "assign-targets: mapping re:.*qkv_proj matches nothing",
    ]
    assert set(chosen(done).values()) == {"w:int4/g128 rtn"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quant_stage: {quant_modifiers: {}}", "nothing in it quantizes"),
        ("quant_stage:", "nothing in it quantizes"),
        ("quant_stage: {quant_modifiers: {GPTQModifier: W4A16}}", "arguments of a modifier are a mapping, not 'W4A16'"),
        ("quant_stage: {quant_modifiers: GPTQModifier}", "expected modifiers by name, not 'GPTQModifier'"),
        ("quant_stage: {}\nversion: 1.0", "recipe.yaml:2: version: unknown key"),
        ("args: {bits: 4}\nquant_stage: {}", "recipe.yaml:1: args: unknown key"),
        ("quant_stage: {run_type: train}", "run_type: unknown key"),
        ("quant_stage: {quant_modifiers: {GPTQModifier: {}, GPTQModifier: {}}}", "key 'GPTQModifier' is given twice"),
        ("GPTQModifier: {scheme: !!python/name:os.system }", "has no place here"),
        ("GPTQModifier: &a {scheme: W4A16, ignore: [*a]}", "once aliases are written out"),
        ("[]", "a pipeline is a mapping"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, says: str) -> None:
    assert says in refusal(text).message
