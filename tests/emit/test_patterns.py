"""Targets as patterns: order, and regular expressions that are broken or never finish."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.emit.compact import exact_expression
from qcompiler.emit.matchers import assignment
from qcompiler.emit.patterns import TargetList
from qcompiler.emit.sites import Site
from qcompiler.errors import ConfigError
from qcompiler.expressions import Pattern, PatternError, read_alike, refusals


def test_the_first_target_wins_whatever_its_kind() -> None:
    assert TargetList(["re:.*b", "a.b"]).first("a.b") == "re:.*b"
    assert TargetList(["a.b", "re:.*b"]).first("a.b") == "a.b"
    assert TargetList(["re:.*c", "a.b"]).first("a.b") == "a.b"
    assert TargetList(["re:.*c"]).first("a.b") is None


def test_containing_ignores_case_and_suffixes_end_at_a_dot() -> None:
    assert TargetList(["Linear"]).first_containing("RowParallelLINEAR") == "Linear"
    assert TargetList(["b.c"]).first_suffix("a.b.c") == "b.c"
    assert TargetList(["b.c"]).first_suffix("ab.c") is None


def test_expressions_match_at_the_start_as_re_match_does() -> None:
    assert not Pattern("re:up_proj").matches("mlp.up_proj")
    assert Pattern("re:mlp").matches("mlp.up_proj")


def test_an_invalid_expression_names_itself() -> None:
    with pytest.raises(ConfigError, match=r"target 're:\(' is not a regular expression") as error:
        TargetList(["re:("])
    assert "escape dots and brackets" in str(error.value.hint)


def test_an_expression_that_never_finishes_is_an_error_not_a_hang() -> None:
    endless = r"re:^(\w|\w\w)*\W$"
    name = "a" * 60
    config = {"config_groups": {"group_0": {"targets": [endless]}}}
    with pytest.raises(ConfigError) as error:
        assignment("transformers", config, [Site(name, 1, 1)], {})
    assert repr(endless) in error.value.message
    assert "backtracks exponentially" in error.value.message


@given(st.text(alphabet="ab.-_0[(*+", min_size=1, max_size=12), st.text(alphabet="ab.-_0[(*+", max_size=14))
def test_an_exact_expression_matches_its_name_alone(name: str, other: str) -> None:
    expression = exact_expression(name)
    assert Pattern(expression).matches(name)
    assert (re.match(expression[3:], other) is not None) == (other == name)


@pytest.mark.parametrize(
    ("target", "whose"),
    [
        ("re:.*(?i)PROJ$", "Python's re"),
        (r"re:\p{L}", "Python's re"),
        ("re:{e}", "vLLM"),
        ("re:.*[[:alpha:]]_proj", "vLLM"),
    ],
)
def test_an_expression_that_loaders_do_not_read_alike_is_refused(target: str, whose: str) -> None:
    assert not read_alike(target)
    with pytest.raises(PatternError, match=re.escape(whose)):
        Pattern(target)


def test_each_engine_reads_its_own_classes_and_braces() -> None:
    for target, name in (("re:[[:digit:]]$", "7"), ("re:(?:gatt){e<=1}$", "gate")):
        assert not refusals(target)
        assert Pattern(target, "regex").matches(name)
        assert not Pattern(target, "re").matches(name)
    assert Pattern("re:(?:gatt){e<=1}$", "re").matches("gatt{e<=1}")
    assert Pattern("re:[[:digit:]]$", "re").matches("g]")


@pytest.mark.filterwarnings("ignore:Possible")  # sets may be nested one day
@given(
    st.lists(
        st.sampled_from([*"a.-:[]{},()|^*e", "[:", ":]", "[[:", "alpha", "{e}", "{e<=1}", r"\N{DIGIT ONE}"]), max_size=7
    )
)
def test_re_is_read_as_python_reads_it(parts: list[str]) -> None:
    """Python's own `re`, which has no timeout, is the oracle."""
    text = "".join(parts)
    try:
        oracle = re.compile(text)
    except re.error:
        assert "re" in refusals(f"re:{text}")
        return
    pattern = Pattern(f"re:{text}", "re")
    for name in ("a", "e", "[:a", "a:]", "aa{e}", "a{e<=1}", "alpha", ":]", "ab.-"):
        assert pattern.matches(name) == (oracle.match(name) is not None)
