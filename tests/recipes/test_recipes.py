"""Recipes of llm-compressor become pipelines that print, parse and plan as the recipe meant."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

from qcompiler.emit.schema import scheme_dict
from qcompiler.ir.annotations import get_quant
from qcompiler.ir.graph import Graph
from qcompiler.pipeline import Pipeline, load_pipeline, parse_pipeline, print_pipeline
from qcompiler.pipeline.pipeline import pass_options
from qcompiler.scheme import PRESETS
from tests.passes.models import Run, block, run
from tests.recipes.recipes import BECOMES, BLOCK, CORPUS


def recipe(name: str = "GPTQModifier", **args: Any) -> str:
    """A recipe of one modifier."""
    return yaml.safe_dump({"quant_stage": {"quant_modifiers": {name: args}}}, sort_keys=False)


def translated(text: str) -> Pipeline:
    return parse_pipeline(text, where="recipe.yaml")


def options(text: str, name: str) -> dict[str, Any]:
    """The options of a pass of the pipeline that a recipe becomes."""
    return pass_options(next(item for item in translated(text).flat() if item.name == name))


def groups(text: str) -> list[dict[str, Any]]:
    return [group for said in options(text, "assign-targets")["assignments"] for group in said["groups"]]


def planned(text: str, target: str = "transformers", model: Graph | str | None = None) -> Run:
    """What planning a model, a Llama of one layer if not said, by a recipe gives."""
    items = [{item.name: pass_options(item)} for item in translated(text).flat()]
    return run(model or block(), *items[:3], target=target)


def chosen(done: Run) -> dict[str, str]:
    """Scheme and algorithm of what is quantized, by the end of its name."""
    found = {leaf.path.rpartition(".")[2]: get_quant(node) for node, leaf in done.graph.linears()}
    return {name: f"{q.scheme.short} {q.algorithm}" for name, q in found.items() if q is not None and q.scheme}


@pytest.mark.parametrize("name", CORPUS)
def test_what_a_recipe_becomes_prints_and_parses_to_the_same(name: str) -> None:
    pipeline = translated(CORPUS[name])
    assert [item.name for item in pipeline.flat()] == [
        *("assign-targets", "legalize", "insert-observers", "calibrate", "lower")
    ]
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


@pytest.mark.parametrize("name", CORPUS)
def test_linears_become_what_the_recipe_says(name: str) -> None:
    assert chosen(planned(CORPUS[name])) == BECOMES[name]


@pytest.mark.parametrize("name", ["w8a8-smoothquant-gptq", "fp8-static-kv-cache", "nvfp4-config-groups"])
def test_a_config_without_overlaps_means_what_compressed_tensors_makes_of_it(name: str) -> None:
    (modifier,) = (
        args
        for group in yaml.safe_load(CORPUS[name])["quant_stage"].values()
        for args in group.values()
        if "config_groups" in args
    )
    config = QuantizationConfig(config_groups=modifier["config_groups"], ignore=modifier["ignore"])
    model = copy.deepcopy(block().model)
    apply_quantization_config(model, config)
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")
    theirs = {
        path.rpartition(".")[2]: [
            getattr(args, key) for args in (scheme.weights, scheme.input_activations) if args for key in keys
        ]
        for path, module in model.named_modules()
        if (scheme := getattr(module, "quantization_scheme", None)) is not None and scheme.weights is not None
    }
    ours = {
        leaf.path.rpartition(".")[2]: [
            args.get(key)
            for args in (
                scheme_dict(quant.scheme)["weights"],
                scheme_dict(quant.scheme)["input_activations"],
            )
            if args
            for key in keys
        ]
        for node, leaf in planned(CORPUS[name]).graph.linears()
        if (quant := get_quant(node)) is not None and quant.scheme is not None
    }
    assert ours == theirs
    assert sorted(ours) == sorted(BLOCK)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_library_s(name: str) -> None:
    (group,) = groups(recipe("QuantizationModifier", scheme=name.lower()))
    assert PRESETS[group["scheme"]] == PRESETS[name]
    library = preset_name_to_scheme(name, ["Linear"])
    spelled = {
        "targets": ["Linear"],
        "weights": library.weights.model_dump(mode="json"),
        "input_activations": library.input_activations and library.input_activations.model_dump(mode="json"),
    }
    (written,) = groups(recipe("QuantizationModifier", config_groups={"group_0": spelled}))
    assert PRESETS[written["scheme"]] == PRESETS[name]


def test_the_preset_that_quantizes_nothing_leaves_its_targets_dense() -> None:
    scheme = {"UNQUANTIZED": ["lm_head", "re:.*down_proj"], "W4A16": ["Linear"]}
    done = planned(recipe("QuantizationModifier", scheme=scheme))
    assert sorted(chosen(done)) == sorted(set(BLOCK) - {"down_proj"})


# --- what is assumed where nothing is said ----------------------------------------------------------------------------


def test_gptq_has_the_tool_s_defaults_which_are_ours() -> None:
    (group,) = groups(recipe(scheme="W4A16"))
    assert group == {"targets": ["Linear"], "scheme": "W4A16", "solver": "gptq"}
    said = recipe(scheme="W4A16", dampening_frac=0.01, block_size=128, actorder="static")
    assert groups(said) == [group]
    (other,) = groups(recipe(scheme="W4A16", dampening_frac=0.1, block_size=32))
    assert other["solver"] == {"gptq": {"damping": 0.1, "block_size": 32}}


def test_no_dampening_is_the_least_that_numbers_tell_apart_and_is_said() -> None:
    text = recipe(scheme="W4A16", dampening_frac=0)
    assert [group["solver"] for group in groups(text)] == [{"gptq": {"damping": 1e-6}}]
    (said,) = options(text, "assign-targets")["differences"]
    assert said.startswith("GPTQModifier: dampening_frac 0 becomes 1e-06, and more where a Hessian needs it; ")


@pytest.mark.parametrize(
    ("of_modifier", "of_weights", "order"),
    [
        ({}, None, "activation"),
        ({}, "weight", "activation"),
        ({"actorder": "static"}, None, "activation"),
        ({"actorder": "weight"}, "static", "activation"),
        ({"actorder": None}, None, "natural"),
        ({"actorder": False}, None, "natural"),
    ],
    ids=str,
)
def test_columns_are_ordered_as_modifier_and_weights_say(of_modifier: Any, of_weights: Any, order: str) -> None:
    weights = {"num_bits": 4, "group_size": 128, "actorder": of_weights}
    said = recipe(config_groups={"g": {"targets": ["Linear"], "weights": weights}}, **of_modifier)
    solver = groups(said)[0]["solver"]
    assert solver == ("gptq" if order == "activation" else {"gptq": {"order": "natural"}})


def test_a_gptq_without_a_scheme_solves_what_stands_before_it_in_the_order_of_its_weights() -> None:
    weights = {"num_bits": 4, "group_size": 128}
    both = {
        "ordered": {"targets": ["re:.*mlp.*"], "weights": weights | {"actorder": "static"}},
        "natural": {"targets": ["Linear"], "weights": weights},
    }
    modifiers = {"QuantizationModifier": {"config_groups": both}, "GPTQModifier": {"dampening_frac": 0.05}}
    found = groups(yaml.safe_dump({"s_stage": {"s_modifiers": modifiers}}, sort_keys=False))
    assert [g["solver"] for g in found] == [
        {"gptq": {"damping": 0.05}},
        {"gptq": {"damping": 0.05, "order": "natural"}},
    ]


def test_group_order_is_solved_statically_and_said() -> None:
    for said in ("group", "dynamic", True):
        text = recipe(scheme="W4A16", actorder=said)
        assert groups(text)[0]["solver"] == "gptq"
        (difference,) = options(text, "assign-targets")["differences"]
        assert "g_idx" in difference
        assert ("fallback", difference) in planned(text).notes


def test_transforms_have_the_tool_s_defaults() -> None:
    (awq,) = groups(recipe("AWQModifier", scheme="W4A16"))
    assert awq["transform"] == "awq"
    (smooth,) = groups(yaml.safe_dump([{"SmoothQuantModifier": None}, {"QuantizationModifier": {"scheme": "W8A8"}}]))
    assert smooth["transform"] == "smoothquant"
    (other,) = groups(recipe("AWQModifier", scheme="W4A16", duo_scaling=False, n_grid=12))
    assert other["transform"] == {"awq": {"grid": 12, "duo_scaling": False}}


def test_smoothing_without_mappings_is_behind_norms_and_awq_wherever_a_scale_can_move() -> None:
    (smooth,) = options(CORPUS["list"], "assign-targets")["assignments"]
    assert smooth["transform_sites"] == {"norms": True}
    (awq,) = options(CORPUS["awq-asym"], "assign-targets")["assignments"]
    assert "transform_sites" not in awq


def test_several_modifiers_are_assignments_of_one_calibrated_run() -> None:
    pipeline = translated(CORPUS["two-modifiers"])
    assert [item.name for item in pipeline.flat()].count("calibrate") == 1
    first, second = groups(CORPUS["two-modifiers"])
    assert first["solver"] == {"gptq": {"order": "natural"}}
    assert second["solver"] == "gptq"


# --- observers --------------------------------------------------------------------------------------------------------


STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize(
    ("args", "calibrate", "observers", "differs"),
    [
        ({"scheme": "W4A16"}, {}, {}, []),
        ({"scheme": "W4A16", "weight_observer": "mse"}, {"scales": "mse"}, {}, ["weights, observer mse"]),
        ({"scheme": "W4A16", "observer": {"weights": "memoryless_mse"}}, {"scales": "mse"}, {}, ["memoryless_mse"]),
        (
            {"scheme": "W4A16", "observer": {"weights": "Memoryless-MSE"}},
            {"scales": "mse"},
            {},
            ["observer Memoryless-"],
        ),
        ({"scheme": "FP8", "input_observer": "STATIC MinMax"}, {}, {}, []),
        ({"scheme": "W4A16", "weight_observer": "static_minmax", "input_observer": "mse"}, {}, {}, []),
        ({"scheme": "FP8"}, {}, {}, []),
        ({"scheme": "FP8", "input_observer": "minmax"}, {}, {}, ["inputs, observer minmax: the range of all data"]),
        (
            {"scheme": "FP8", "input_observer": "mse"},
            {},
            {"inputs": "mse"},
            ["inputs, observer mse: the range of least"],
        ),
        ({"scheme": "NVFP4"}, {}, {}, []),
        ({"scheme": "FP8_DYNAMIC", "input_observer": "mse"}, {}, {}, []),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": STATIC, "input_activations": STATIC}}},
            {},
            {},
            ["inputs, observer minmax: the range of all data, not one averaged over batches"],
        ),
        (
            {"scheme": "W4A16", "kv_cache_scheme": {**STATIC, "observer": "memoryless_minmax"}},
            {},
            {},
            ["keys and values, observer memoryless_minmax: the range of all data, not one of the last batch"],
        ),
        (
            {"scheme": "W4A16", "kv_cache_scheme": {**STATIC, "observer": "mse"}},
            {},
            {"kv_cache": "mse"},
            ["keys and values, observer mse: the range of least squared error of all data, not one averaged"],
        ),
    ],
    ids=str,
)
def test_observers_become_options_and_what_differs_is_said(
    args: Any, calibrate: Any, observers: Any, differs: list[str]
) -> None:
    text = recipe("QuantizationModifier", **args)
    assert options(text, "calibrate") == calibrate
    assert options(text, "insert-observers") == observers
    found = options(text, "assign-targets").get("differences", [])
    assert len(found) == len(differs)
    assert all(said in text for said, text in zip(differs, found, strict=True))


def test_groups_that_disagree_about_scales_all_get_the_better_and_it_is_said() -> None:
    int8 = {"num_bits": 8, "group_size": 128}
    both = {
        "a": {"targets": ["re:.*mlp.*"], "weights": int8 | {"observer": "mse"}},
        "b": {"targets": ["Linear"], "weights": int8},
    }
    text = recipe(config_groups=both)
    assert options(text, "calibrate") == {"scales": "mse"}
    assert (
        options(text, "assign-targets")["differences"][-1]
        == "weights: some ask for mse and some for minmax, and all get mse"
    )


# --- what is said -----------------------------------------------------------------------------------------------------


def test_arguments_that_change_no_result_are_accepted_with_a_note() -> None:
    idle = {"sequential_targets": ["LlamaDecoderLayer"], "offload_hessians": True, "batched_quantization": "auto"}
    text = recipe(scheme="W4A16", bypass_divisibility_checks=True, **idle)
    done = planned(text)
    assert {kind for kind, _ in done.notes} == {"info"}
    assert done.notes[0][1] == (
        "GPTQModifier: sequential_targets, offload_hessians, batched_quantization has no effect on the result"
    )
    assert "bypass_divisibility_checks" in done.notes[1][1]


def test_overlapping_groups_are_decided_in_the_recipe_s_order_with_a_warning() -> None:
    done = planned(CORPUS["overlapping-groups"])
    (text,) = [text for kind, text in done.notes if kind == "warning"]
    assert text == (
        r"assign-targets: re:.*mlp\..* (w:int4/g128/asym gptq) and re:.*down_proj$ (w:int8/g128 gptq) mean "
        "model.layers.0.mlp.down_proj: the first of them decides; compressed-tensors takes re:.*down_proj$ "
        "(w:int8/g128 gptq)"
    )


def test_ignores_that_match_nothing_are_warnings_of_the_plan() -> None:
    done = planned(CORPUS["fp8-dynamic"])
    (text,) = [text for kind, text in done.notes if kind == "warning"]
    assert "ignore re:.*mlp.gate$ matches nothing; did you mean" in text


@pytest.mark.parametrize(
    ("args", "target"),
    [
        ({"scheme": "W4A16"}, None),
        ({"scheme": "FP8_DYNAMIC"}, None),
        ({"scheme": "NVFP4"}, None),
        ({"scheme": "W3A16"}, "transformers"),
        ({"scheme": {"W4A16": ["re:.*mlp.*"], "W6A16": ["re:.*attn.*"], "UNQUANTIZED": ["lm_head"]}}, "transformers"),
        ({"scheme": "W4A16", "kv_cache_scheme": STATIC}, None),
    ],
    ids=str,
)
def test_a_recipe_names_no_runtime_and_is_checked_for_the_first_that_takes_its_numbers(args: Any, target: Any) -> None:
    found = options(recipe("QuantizationModifier", **args), "legalize")
    assert found == ({"target": target} if target else {})
    notes = options(recipe("QuantizationModifier", **args), "assign-targets").get("notes", [])
    assert notes == (["vLLM does not take all of these schemes: they are checked for transformers"] if target else [])


# --- where recipes are read -------------------------------------------------------------------------------------------


def test_a_file_is_read_and_gives_the_pipeline_its_name(tmp_path: Path) -> None:
    for name in ("mine.yaml", "mine.json", "mine.yml"):
        (tmp_path / name).write_text(CORPUS["json"], encoding="utf-8")
        pipeline = load_pipeline(tmp_path / name)
        assert pipeline.name == "mine"
        assert pipeline.description == "Translated from a recipe of llm-compressor."


def test_a_pipeline_may_hold_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(CORPUS["flat"], encoding="utf-8")
    (tmp_path / "outer.yaml").write_text("name: outer\npasses: [{pipeline: recipe.yaml}]", encoding="utf-8")
    assert list(load_pipeline(tmp_path / "outer.yaml").flat()) == list(translated(CORPUS["flat"]).flat())


def test_yaml_of_the_older_kind_means_the_same() -> None:
    text = CORPUS["w8a8-smoothquant-gptq"].replace("symmetric: true", "symmetric: yes")
    assert list(translated(text).flat()) == list(translated(CORPUS["w8a8-smoothquant-gptq"]).flat())
