"""The order of passes is checked before anything runs, and so is what is to be printed after them."""

from __future__ import annotations

import pytest

from qcompiler.errors import ConfigError
from qcompiler.pipeline import load_pipeline, parse_pipeline
from qcompiler.pipeline.manager import check_order, check_print_after
from qcompiler.pipeline.registry import packaged_pipelines
from tests.pipeline.conftest import Install

ANNOTATE = "assign or assign-targets"


def refusal(*passes: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        check_order(parse_pipeline(f"name: p\npasses: [{', '.join(passes)}]"))
    assert raised.value.hint
    return raised.value


@pytest.mark.parametrize("name", packaged_pipelines())
def test_packaged_pipelines_are_in_order(name: str) -> None:
    check_order(load_pipeline(name))


@pytest.mark.parametrize(
    ("passes", "said", "hint"),
    [
        (("legalize",), "pass legalize needs a graph that is annotated, and here it is captured", ANNOTATE),
        (("insert-observers",), "pass insert-observers needs a graph that is annotated, and here it", ANNOTATE),
        (
            ("assign", "calibrate"),
            "pass calibrate needs a graph that is observed or",
            "insert-observers",
        ),
        (("assign", "insert-observers", "lower"), "pass lower needs a graph that is calibrated, and", "calibrate"),
    ],
)
def test_a_pass_that_comes_too_early_is_told_what_leads_to_it(passes: tuple[str, ...], said: str, hint: str) -> None:
    wrong = refusal(*passes)
    assert wrong.message.startswith(f"pipeline p: {said}")
    assert wrong.hint == f"put {hint} before it"


def test_a_pass_that_comes_too_late_is_told_its_stage() -> None:
    wrong = refusal("assign", "insert-observers", "assign")
    assert wrong.message.endswith("pass assign needs a graph that is captured or annotated, and here it is observed")


def test_rules_may_be_assigned_in_several_passes() -> None:
    check_order(parse_pipeline("passes: [assign, legalize, assign, insert-observers]"))


def test_the_order_runs_through_nested_pipelines() -> None:
    check_order(parse_pipeline("passes: [{pipeline: {passes: [assign]}}, {pipeline: {passes: [legalize]}}]"))
    assert "pass legalize needs" in refusal("{pipeline: {passes: [legalize]}}", "assign").message


def test_a_broken_package_does_not_hide_what_is_wrong_with_the_order(install: Install) -> None:
    install("broken", {"broken.py": "import absent_module"}, passes={"broken": "broken:Broken"})
    assert refusal("legalize").hint == f"put {ANNOTATE} before it"


def test_printing_after_a_pass_that_does_not_run_is_refused() -> None:
    pipeline = load_pipeline("int4-int8")
    check_print_after(["assign", "lower"], pipeline)
    with pytest.raises(
        ConfigError, match="--print-after asign: pipeline int4-int8 has no such pass; did you mean 'ass"
    ):
        check_print_after(["assign", "asign"], pipeline)
