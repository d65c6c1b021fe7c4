"""What a mistyped pipeline is told: the file, the line, the way to the value, and the word that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompiler.errors import ConfigError
from qcompiler.pipeline import load_pipeline, parse_pipeline


def error(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        parse_pipeline(text, where="my.yaml")
    assert raised.value.hint
    return raised.value


def of_rule(rule: str) -> str:
    """What is said of one rule, on line 4 of a pipeline."""
    return error(f"passes:\n  - assign:\n      rules:\n        - {{{rule}}}\n").message


RULE = "my.yaml:4: passes[0].assign.rules[0]"


def test_an_unknown_pass_gets_its_near_name_and_all_others() -> None:
    wrong = error("name: p\npasses:\n  - legalise\n")
    assert wrong.message == "my.yaml:3: passes[0]: unknown pass 'legalise'; did you mean 'legalize'?"
    assert str(wrong.hint).startswith("passes: assign, assign-targets, calibrate, ")


def test_an_unknown_key_of_the_pipeline_gets_its_near_name() -> None:
    assert error("passess: []").message == "my.yaml:1: passess: unknown key; did you mean 'passes'?"
    assert error("passes: []\n\ndescripton: x").message.startswith("my.yaml:3: descripton: unknown key; did you mean")


def test_an_unknown_option_gets_its_near_name() -> None:
    assert error("passes:\n  - assign:\n      rule: []\n").message == (
        "my.yaml:3: passes[0].assign.rule: unknown option; did you mean 'rules'?"
    )
    assert error("passes:\n- assign:\n    kv_cache:\n      stratgy: tensor\n").message == (
        "my.yaml:4: passes[0].assign.kv_cache.stratgy: unknown option; did you mean 'strategy'?"
    )


def test_a_calibration_spec_within_a_pipeline_gets_its_place() -> None:
    """In Python it raises an error of its own."""
    wrong = error("passes:\n- calibrate:\n    calibration:\n      sampels: 3\n      seed: -1\n")
    place = "passes[0].calibrate.calibration"
    assert set(wrong.message.splitlines()) == {
        f"my.yaml:4: {place}.sampels: unknown option; did you mean 'samples' or 'split'?",
        f"my.yaml:5: {place}.seed: Input should be greater than or equal to 0",
    }


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("select: {nam: a}, scheme: FP8", ".select.nam: unknown option; did you mean 'name'?"),
        ("select: {clas: a}, scheme: FP8", ".select.clas: unknown option; did you mean 'class' or 'layers'?"),
        ("select: {strategy: a}, scheme: FP8", ".select.strategy: unknown option; did you mean 'structure'?"),
        ("select: {name: a}, scheme: FP8, optinal: true", ".optinal: unknown option; did you mean 'optional'?"),
        ("select: {name: a}, scheme: {weight: {bits: 4}}", ".scheme.weight: unknown option; did you mean 'weights'?"),
        ("select: {name: a}, scheme: {weights: {bit: 4}}", ".scheme.weights.bit: unknown option; did you mean 'bits'?"),
    ],
)
def test_near_names_are_those_of_the_table_that_the_option_stands_in(rule: str, said: str) -> None:
    assert RULE + said in of_rule(rule).splitlines()


def test_an_unknown_scheme_gets_near_presets_and_all_others() -> None:
    message = of_rule("select: {name: a}, scheme: W4A61")
    assert message.startswith(f"{RULE}.scheme: unknown scheme 'W4A61'; did you mean 'W4A16'")
    assert "NVFP4A16" in message
    assert "or spell out weights and input_activations" in message


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("scheme: FP8", ".select: this option is missing"),
        ("select: {}, scheme: FP8", ".select: a select without any key: use {name: '*'} to mean every linear"),
        ("select: lm_head, scheme: FP8", ".select: expected a mapping"),
        ("select: {name: 3}, scheme: FP8", ".select.name: expected text"),
        ("select: {name: 're:(a'}, scheme: FP8", ".select.name: target 're:(a' is not a regular expression: "),
        ("select: {layers: 2-10}, scheme: FP8", ".select.layers: '2-10' is neither a layer's index nor a slice like"),
        ("select: {layers: [1.5]}, scheme: FP8", ".select.layers: 1.5 is neither a layer's index"),
        ("select: {layers: true}, scheme: FP8", ".select.layers: True is neither a layer's index"),
        ("select: {structure: mlp-out}, scheme: FP8", ".select.structure: unknown structure 'mlp-out'; did you mean"),
        ("select: {min_parameters: -1}, scheme: FP8", ".select.min_parameters: Input should be greater than or equal"),
        ("select: {name: a}, scheme: {weights: {bits: 9}}", ".scheme.weights: integers have 2 to 8 bits, not 9"),
        ("select: {name: a}, scheme: {weights: W4A16}", ".scheme.weights: expected a mapping"),
        (
            "select: {name: a}, scheme: FP8, solver: {gptq: {damping: 0}}",
            ".solver.gptq.damping: Input should be greater",
        ),
        ("select: {name: a}, scheme: FP8, solver: {gptq: {dampin: 1}}", ".solver.gptq.dampin: unknown option; did you"),
        ("select: {name: a}, scheme: FP8, solver: {gptq: 3}", ".solver.gptq: expected a mapping"),
        ("select: {name: a}, scheme: FP8, transform: {awq: {grid: 1}}", ".transform.awq.grid: Input should be greater"),
        ("select: {name: a}, scheme: FP8, solver: gtpq", ".solver: unknown solver 'gtpq'; did you mean 'gptq'?"),
    ],
)
def test_a_value_that_means_nothing_is_said_where_it_stands(rule: str, said: str) -> None:
    assert of_rule(rule).startswith(RULE + said)


def test_a_list_that_was_forgotten_is_said_in_words_of_yaml() -> None:
    assert error("passes:\n- assign:\n    rules: {select: {name: a}, scheme: FP8}\n").message == (
        "my.yaml:3: passes[0].assign.rules: expected a list"
    )


@pytest.mark.parametrize("percentile", ["50", "100.5", "-1", ".nan", ".inf", "high"])
def test_a_percentile_lies_above_the_median(percentile: str) -> None:
    message = error(f"passes:\n- insert-observers: {{percentile: {percentile}}}\n").message
    assert message.startswith("my.yaml:2: passes[0].insert-observers.percentile: ")


def test_every_mistake_of_a_pass_is_told_at_once() -> None:
    text = "passes:\n- assign:\n    on_indivisible: chanel\n    kv_cache: fp8\n    ignored: []\n"
    assert error(text).message.splitlines() == [
        "my.yaml:3: passes[0].assign.on_indivisible: Input should be 'error', 'channel' or 'dense'",
        "my.yaml:4: passes[0].assign.kv_cache: expected a mapping",
        "my.yaml:5: passes[0].assign.ignored: unknown option; did you mean 'ignore'?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "my.yaml: a pipeline is a mapping with `name` and a list of `passes`"),
        ("[legalize]", "my.yaml:1: a pipeline is a mapping with `name` and a list of `passes`"),
        ("name: p", "my.yaml:1: a pipeline is a mapping with `name` and a list of `passes`"),
        ("passes: legalize", "my.yaml:1: a pipeline is a mapping with `name` and a list of `passes`"),
        ("name: 3\npasses: []", "my.yaml:1: name: expected text, not 3"),
        ("passes: []\ndescription: [a]", "my.yaml:2: description: expected text, not ['a']"),
        (
            "passes:\n- {lower: , legalize: }",
            "my.yaml:2: passes[0]: expected the name of a pass, or one name with its ",
        ),
        ("passes:\n- 3", "my.yaml:2: passes[0]: expected the name of a pass, or one name with its options, not 3"),
        ("passes:\n- legalize: vllm-sm90", "my.yaml:2: passes[0].legalize: options of a pass are a mapping, not 'vllm"),
    ],
)
def test_what_is_no_pipeline_is_told_what_one_is(text: str, said: str) -> None:
    assert error(text).message.startswith(said)


def test_a_pass_may_be_written_with_options_that_are_left_empty() -> None:
    assert parse_pipeline("passes: [{legalize: }]") == parse_pipeline("passes: [legalize]")


def test_an_unknown_pipeline_gets_its_near_name_and_all_others() -> None:
    with pytest.raises(ConfigError, match=r"^unknown pipeline 'int4-int9'; did you mean 'int4-int8'") as raised:
        load_pipeline("int4-int9")
    assert "a YAML file, or one of: " in str(raised.value.hint)


@pytest.mark.parametrize("name", ["", ".", "/dev/null", "a\0b", "x" * 5000])
def test_a_name_that_is_neither_packaged_nor_a_file_is_unknown(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^(unknown pipeline|pipeline '.' is a folder|pipeline .* cannot be read)"):
        load_pipeline(name)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml' cannot be read: .*No such file"):
        load_pipeline(tmp_path / "absent.yaml")


def test_a_mistake_in_a_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("name: p\npasses:\n  - calibrate: {scale: mse}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_pipeline(path)
    assert (
        raised.value.message
        == f"{path}:3: passes[0].calibrate.scale: unknown option; did you mean 'scales' or 'select'?"
    )
