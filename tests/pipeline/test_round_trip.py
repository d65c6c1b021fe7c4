"""What is printed is what is read: pipelines, and plain data as YAML."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.assign import Assign, Rule
from passes.insert_observers import InsertObservers
from qcompiler.pipeline import Pipeline, load_pipeline, parse_pipeline, print_pipeline
from qcompiler.pipeline.registry import packaged_pipelines
from qcompiler.pipeline.safe_yaml import dump_yaml, load_yaml
from qcompiler.scheme import PRESETS, KVCacheSpec, Scheme, preset
from qcompiler.select import Select
from tests.pipeline.strategies import PIPELINES, SCHEMES, TEXT


@settings(max_examples=150, deadline=None)
@given(PIPELINES)
def test_what_is_printed_parses_to_the_same_pipeline(pipeline: Pipeline) -> None:
    text = print_pipeline(pipeline)
    assert parse_pipeline(text) == pipeline
    assert print_pipeline(parse_pipeline(text)) == text


@settings(deadline=None)
@given(PIPELINES)
def test_python_objects_that_are_valid_load_unchanged(pipeline: Pipeline) -> None:
    assert load_pipeline(pipeline) == pipeline


@settings(deadline=None)
@given(SCHEMES)
def test_a_scheme_is_printed_as_a_preset_exactly_where_one_is_equal(scheme: Scheme) -> None:
    (written,) = rules(Assign(rules=(Rule(select=Select(name=("*",)), scheme=scheme),)))
    assert isinstance(written["scheme"], str) == (scheme in PRESETS.values())


def rules(assign: Assign) -> list[dict[str, Any]]:
    """The rules of an assign pass as they are written in YAML."""
    data = yaml.safe_load(print_pipeline(Pipeline("p", (assign,))))
    return list(data["passes"][0]["assign"]["rules"])


def test_printed_pipelines_read_as_people_write_them() -> None:
    text = """\
name: mixed
description: 'A colon: and a dash'
passes:
- assign:
    rules:
    - select:
        name: re:.*\\.v_proj$
        class: [Linear, Conv1D]
        layers: [0, '2:10', -1]
        structure: attention-input
        min_parameters: 1000
      scheme: W4A16_ASYM
    - select:
        layers: '1:'
      scheme:
        weights:
          type: int
          bits: 6
          group_size: 32
      optional: true
      override: true
    - select:
        name: 'no'
      scheme: null
    ignore:
    - structure: lm-head
    on_indivisible: channel
    kv_cache:
      strategy: tensor
- pipeline:
    name: inner
    passes:
    - legalize
- insert-observers:
    percentile: 99.5
"""
    pipeline = parse_pipeline(text)
    assert yaml.safe_load(print_pipeline(pipeline)) == yaml.safe_load(text)
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


def test_options_at_their_defaults_are_left_out() -> None:
    assert print_pipeline(Pipeline("p", (Assign(on_indivisible="error"), InsertObservers()))) == (
        "name: p\npasses:\n- assign\n- insert-observers\n"
    )


def test_an_option_whose_table_is_all_defaults_is_still_printed() -> None:
    pipeline = Pipeline("p", (Assign(kv_cache=KVCacheSpec()),))
    assert "kv_cache" in print_pipeline(pipeline)
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


@pytest.mark.parametrize("name", packaged_pipelines())
def test_packaged_pipelines_parse_print_and_parse_back(name: str) -> None:
    pipeline = load_pipeline(name)
    assert pipeline.name == name
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


def test_expected_pipelines_are_packaged() -> None:
    singles = {"w4a16", "w4a16-asym", "w8a16", "w8a8", "fp8", "fp8-dynamic", "fp8-block", "nvfp4", "nvfp4a16"}
    singles |= {"mxfp4", "mxfp4a16", "mxfp8"}
    assert singles | {"int4-int8", "nvfp4-fp8", "fp8-channel-tensor", "w8a8+w4a16"} <= set(packaged_pipelines())


@pytest.mark.parametrize("name", packaged_pipelines())
def test_packaged_pipelines_are_described_in_a_sentence(name: str) -> None:
    description = load_pipeline(name).description
    assert description.endswith(".")
    assert len(description.split()) >= 2


@pytest.mark.parametrize("name", [n for n in packaged_pipelines() if n.upper().replace("-", "_") in PRESETS])
def test_a_pipeline_named_after_a_preset_uses_it_alone(name: str) -> None:
    assigns = [item for item in load_pipeline(name).flat() if isinstance(item, Assign)]
    assert {rule.scheme for item in assigns for rule in item.rules} == {preset(name)}


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT)
_DATA = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(_DATA)
def test_plain_data_survives_and_other_readers_see_the_same(data: Any) -> None:
    text = dump_yaml(data)
    assert load_yaml(text, where="w")[0] == data
    assert yaml.safe_load(text) == data


@pytest.mark.parametrize(
    "word",
    [
        "2:10",
        "no",
        "on",
        "0x10",
        "1_000",
        "010",
        "2001-01-01",
        "1e5",
        "~",
        "null",
        "=",
        "<<",
        "",
        "1:20:30",
        "!",
        "&a",
        "*a",
        "- a",
        "a: b",
        "a #b",
        "%",
        "@",
        "\t",
        " a",
    ],
)
def test_text_that_looks_like_something_else_stays_text(word: str) -> None:
    assert load_yaml(dump_yaml([word]), where="w")[0] == [word]
    assert yaml.safe_load(dump_yaml([word])) == [word]
