"""Pipelines made in Python are checked as YAML is: types, options, and that everything in them is a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from passes.assign import Assign, Rule
from passes.calibrate import Calibrate
from passes.insert_observers import InsertObservers
from passes.legalize import Legalize
from passes.lower import Lower
from qcompiler.errors import ConfigError
from qcompiler.ir.graph import Graph, Stage
from qcompiler.pipeline import Context, GraphPass, Pipeline, load_pipeline, parse_pipeline
from qcompiler.scheme import preset
from qcompiler.select import Select


def refusal(source: Any) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        load_pipeline(source)
    assert raised.value.hint
    return raised.value


def test_passes_in_python_are_the_pipeline_that_yaml_says() -> None:
    rule = Rule(select=Select(structure=("mlp-output",)), scheme=preset("W8A16"))  # type: ignore[arg-type]
    made = Pipeline("p", (Assign(rules=(rule,), ignore=(Select(name=("lm_head",)),)), Legalize(), Lower()))
    text = """
    name: p
    passes:
    - assign:
        rules: [{select: {structure: mlp-output}, scheme: W8A16}]
        ignore: [{name: lm_head}]
    - legalize
    - lower
    """
    assert load_pipeline(made) == parse_pipeline(text)


def test_options_may_be_the_plain_data_of_yaml() -> None:
    plain: Any = {"rules": [{"select": {"name": "*"}, "scheme": "w4a16"}], "ignore": [{"structure": "lm-head"}]}
    (assign,) = load_pipeline([Assign(**plain)]).flat()
    assert assign == Assign(
        rules=(Rule(select=Select(name=("*",)), scheme=preset("W4A16")),),
        ignore=(Select.model_validate({"structure": "lm-head"}),),
    )


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (Assign(on_indivisible="chanel"), "assign.on_indivisible: Input should be 'error', 'channel' or 'dense'"),  # type: ignore[arg-type]
        (Assign(rules=3), "assign.rules: expected a list"),  # type: ignore[arg-type]
        (
            Assign(rules=({"select": {"name": "*"}, "scheme": "W4"},)),
            "assign.rules[0].scheme: unknown scheme 'W4'; did",
        ),  # type: ignore[arg-type]
        (Calibrate(scales=None), "calibrate.scales: Input should be 'minmax', 'mse' or 'importance'"),  # type: ignore[arg-type]
        (InsertObservers(percentile=20), "insert-observers.percentile: Input should be greater than 50"),
    ],
)
def test_wrong_options_are_told_with_their_way(item: Any, said: str) -> None:
    message = refusal(Pipeline("outer", (Legalize(), Pipeline("inner", (item,))))).message
    assert message.startswith(f"pipeline inner: passes[0].{said}")


def test_a_class_where_a_pass_belongs_is_told_how_to_write_it() -> None:
    wrong = refusal([Assign(), Legalize])
    assert wrong.message.startswith("pipeline python: passes[1]: expected a pass or a Pipeline, not <class")
    assert wrong.hint == "write Legalize()"


@pytest.mark.parametrize("item", ["legalize", {"legalize": None}, None, 3])
def test_what_is_no_pass_is_refused(item: Any) -> None:
    assert refusal([item]).message == f"pipeline python: passes[0]: expected a pass or a Pipeline, not {item!r}"


@pytest.mark.parametrize("source", [None, 3, Assign(), {"passes": []}, Pipeline("p", None)])  # type: ignore[arg-type]
def test_what_is_no_pipeline_is_refused(source: Any) -> None:
    assert "expected a sequence of passes and pipelines, not " in refusal(source).message


def test_name_and_description_are_text() -> None:
    assert "its name and its description are text" in refusal(Pipeline(3, ())).message  # type: ignore[arg-type]
    assert "its name and its description are text" in refusal(Pipeline("p", (), None)).message  # type: ignore[arg-type]


def test_a_pass_of_ones_own_needs_no_entry_point() -> None:
    @dataclass(frozen=True)
    class Mine(GraphPass):
        name: ClassVar[str] = "mine"
        requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED})
        count: int = 1

        def run(self, graph: Graph, context: Context) -> None:
            raise NotImplementedError

    assert list(load_pipeline([Mine(count=2)]).flat()) == [Mine(count=2)]
    assert "passes[0].mine.count: Input should be a valid integer" in refusal([Mine(count="many")]).message  # type: ignore[arg-type]


def test_a_pass_of_ones_own_must_be_a_frozen_dataclass() -> None:
    class Mine(GraphPass):
        name: ClassVar[str] = "mine"
        requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED})

        def run(self, graph: Graph, context: Context) -> None:
            raise NotImplementedError

    assert refusal([Mine()]).message == "pipeline python: passes[0]: Mine is not a frozen dataclass"
