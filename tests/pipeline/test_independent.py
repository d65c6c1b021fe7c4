"""Independent runs: a calibrating pass becomes one for each algorithm that the rules name."""

from __future__ import annotations

from pathlib import Path

import pytest

from passes.calibrate import Calibrate
from qcompiler.errors import ConfigError
from qcompiler.pipeline import load_pipeline, parse_pipeline, print_pipeline
from qcompiler.pipeline.independent import independent_runs
from qcompiler.pipeline.manager import check_order, sweeps

RULES = """
  - assign:
      rules:
        - {select: {structure: mlp-output}, scheme: W8A8, transform: smoothquant, solver: gptq}
        - {select: {structure: mlp-input}, scheme: W4A16, solver: gptq}
        - {select: {structure: attention-output}, scheme: null, transform: awq}
        - {select: {structure: attention-input}, scheme: W4A16}
"""
AROUND = f"name: p\npasses:{RULES}  - legalize\n  - insert-observers\n%s  - lower\n"
DATA = "calibration: {dataset: a.txt, samples: 4}"


def algorithms(text: str) -> list[tuple[str, ...]]:
    return [item.algorithms for item in independent_runs(parse_pipeline(text)).flat() if isinstance(item, Calibrate)]


def test_each_algorithm_that_rules_name_has_a_run_in_their_order() -> None:
    """The last takes what is left; what stays dense needs none."""
    text = AROUND % f"  - calibrate: {{scales: mse, propagate: false, {DATA}}}\n"
    split = independent_runs(parse_pipeline(text))
    (before,) = (item for item in parse_pipeline(text).flat() if isinstance(item, Calibrate))
    runs = [item for item in split.flat() if isinstance(item, Calibrate)]
    assert [run.algorithms for run in runs] == [("smoothquant+gptq",), ("gptq",), ()]
    for run in runs:
        assert (run.scales, run.propagate, run.calibration) == ("mse", False, before.calibration)
    assert [[item.name for item in sweep] for sweep in sweeps(split)] == [["calibrate"]] * 2 + [["calibrate", "lower"]]
    check_order(split)
    assert parse_pipeline(print_pipeline(split)) == split


def test_a_run_that_has_algorithms_keeps_to_them() -> None:
    text = AROUND % "  - calibrate: {algorithms: [rtn]}\n  - calibrate: {algorithms: [gptq, smoothquant+gptq]}\n"
    assert algorithms(text) == [("rtn",), ("smoothquant+gptq",), ("gptq",)]


def test_nested_pipelines_are_split_where_they_stand() -> None:
    """By what any of them names."""
    text = f"""
name: p
passes:
  - pipeline:
      name: q
      passes:{RULES.replace(chr(10), chr(10) + "      ")}
  - legalize
  - insert-observers
  - pipeline: {{name: r, passes: [calibrate, lower]}}
"""
    split = independent_runs(parse_pipeline(text))
    inner = split.passes[-1]
    assert getattr(inner, "name", None) == "r"
    assert [item.name for item in getattr(inner, "passes", ())] == ["calibrate"] * 3 + ["lower"]
    assert algorithms(text) == [("smoothquant+gptq",), ("gptq",), ()]


def test_recipes_are_split() -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "corpus" / "modifiers-that-overlap.yaml"
    split = independent_runs(load_pipeline(recipe))
    assert [item.algorithms for item in split.flat() if isinstance(item, Calibrate)] == [("rtn",), ()]


def test_packaged_pipelines_of_two_algorithms_are_split() -> None:
    split = independent_runs(load_pipeline("gptq-w8a8+awq-w4a16"))
    assert [item.algorithms for item in split.flat() if isinstance(item, Calibrate)] == [("gptq",), ()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4-int8", "pipeline int4-int8 cannot be split into independent runs: its rules name one algorithm, gptq"),
        ("w4a16", "pipeline w4a16 cannot be split into independent runs: its rules name one algorithm, rtn"),
    ],
)
def test_one_algorithm_needs_no_splitting(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        independent_runs(load_pipeline(text))
    assert error.value.message == said
    assert error.value.hint == "leave --independent out (Python: independent=)"


def test_a_pipeline_that_assigns_nothing_names_no_algorithm() -> None:
    with pytest.raises(ConfigError, match="its rules name no algorithm"):
        independent_runs(parse_pipeline("name: p\npasses: [assign, calibrate]"))
