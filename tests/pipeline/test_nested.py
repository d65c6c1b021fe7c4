"""Pipelines inside pipelines: spelled out, packaged, or in files beside the one that names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from passes.legalize import Legalize
from qcompiler.errors import ConfigError
from qcompiler.pipeline import Pipeline, load_pipeline, parse_pipeline, print_pipeline

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, text)`: a file in a folder of the test's own."""

    def to(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return to


def names(pipeline: Pipeline) -> list[str]:
    return [item.name for item in pipeline.flat()]


def refusal(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        load_pipeline(path)
    assert raised.value.hint
    return raised.value


def test_a_nested_pipeline_runs_in_its_place() -> None:
    text = "passes:\n- legalize\n- pipeline:\n    name: inner\n    passes: [insert-observers, calibrate]\n- lower\n"
    pipeline = parse_pipeline(text)
    assert names(pipeline) == ["legalize", "insert-observers", "calibrate", "lower"]
    assert isinstance(pipeline.passes[1], Pipeline)
    assert pipeline.passes[1].name == "inner"


def test_a_packaged_pipeline_nests_by_name() -> None:
    pipeline = parse_pipeline("passes:\n- pipeline: w8a8\n")
    assert pipeline.passes == (load_pipeline("w8a8"),)
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


def test_files_are_looked_for_beside_the_file_that_names_them(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("parts/first.yaml", "passes: [legalize]")
    write("parts/both.yaml", "passes: [{pipeline: first.yaml}, {pipeline: ../second.yml}]")
    write("second.yml", "passes: [lower]")
    whole = write("whole.yaml", "passes: [{pipeline: parts/both.yaml}]")
    assert names(load_pipeline(whole)) == ["legalize", "lower"]
    monkeypatch.chdir(whole.parent)
    assert names(load_pipeline("whole.yaml")) == ["legalize", "lower"]


def test_one_file_may_be_named_twice(write: Write) -> None:
    write("part.yaml", "passes: [legalize]")
    assert names(load_pipeline(write("a.yaml", "passes: [{pipeline: part.yaml}, {pipeline: part.yaml}]"))) == [
        "legalize",
        "legalize",
    ]


@pytest.mark.parametrize("spelled", ["a.yaml", "./a.yaml", "sub/../a.yaml", "link.yaml", "{absolute}"])
def test_a_file_that_contains_itself_is_refused_however_it_says_so(spelled: str, write: Write) -> None:
    path = write("a.yaml", "")
    (path.parent / "sub").mkdir()
    (path.parent / "link.yaml").symlink_to("a.yaml")
    path.write_text(f"passes: [{{pipeline: {spelled.format(absolute=path)}}}]", encoding="utf-8")
    message = refusal(path).message
    assert " contains itself: " in message
    assert message.count(" -> ") == 1


def test_files_that_contain_each_other_are_refused_with_the_way_round(write: Write) -> None:
    write("b.yaml", "passes: [{pipeline: c.yaml}]")
    write("c.yaml", "passes: [{pipeline: a.yaml}]")
    a = write("a.yaml", "passes: [{pipeline: b.yaml}]")
    b, c = a.with_name("b.yaml"), a.with_name("c.yaml")
    assert refusal(a).message == f"{a} contains itself: {a} -> {b} -> {c} -> {a}"


def test_pipelines_within_one_another_have_an_end(write: Write) -> None:
    deep = "[{pipeline: {passes: " * 40 + "[legalize]" + "}}]" * 40
    assert "more than 32 pipelines within one another" in refusal(write("deep.yaml", f"passes: {deep}")).message
    for n in range(40):
        write(f"n{n}.yaml", f"passes: [{{pipeline: n{n + 1}.yaml}}]")
    write("n40.yaml", "passes: [legalize]")
    assert (
        "more than 32 pipelines within one another" in refusal(write("n.yaml", "passes: [{pipeline: n0.yaml}]")).message
    )


def test_files_that_multiply_are_refused(write: Write) -> None:
    for n in range(9):
        write(f"n{n}.yaml", "passes:\n" + f"- pipeline: n{n + 1}.yaml\n" * 10)
    path = write("n9.yaml", "passes: [legalize]").with_name("n0.yaml")
    assert refusal(path).message == f"{path}: more than 100 pipelines are read for it"


def test_an_unknown_nested_pipeline_is_told_with_its_line(write: Write) -> None:
    path = write("a.yaml", "passes:\n- legalize\n- pipeline: int4-int9\n")
    wrong = refusal(path)
    assert wrong.message == (
        f"{path}:3: passes[1].pipeline: unknown pipeline 'int4-int9'; did you mean 'int4-int8' or 'int4-int8-rtn'?"
    )
    assert "a YAML file, or one of: " in str(wrong.hint)
    path = write("a.yaml", "passes:\n- pipeline: gone.yaml\n")
    assert refusal(path).message.startswith(f"{path}:2: passes[0].pipeline: pipeline 'gone.yaml' cannot be read: ")


def test_a_mistake_in_a_nested_file_names_that_file(write: Write) -> None:
    inner = write("inner.yaml", "name: i\npasses:\n- lgalize\n")
    outer = write("outer.yaml", "passes: [{pipeline: inner.yaml}]")
    assert refusal(outer).message.startswith(f"{inner}:3: passes[0]: unknown pass 'lgalize'; did you mean 'legalize'")


def test_a_mistake_in_a_nested_pipeline_is_told_with_the_whole_way() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_pipeline("passes:\n- pipeline:\n    passes:\n    - calibrate: {scale: mse}\n", where="my.yaml")
    assert raised.value.message.startswith("my.yaml:4: passes[0].pipeline.passes[0].calibrate.scale: unknown option")


@pytest.mark.parametrize("options", ["3", "[legalize]", "", "{name: p}"])
def test_what_is_no_pipeline_does_not_nest(options: str) -> None:
    with pytest.raises(ConfigError, match=r"^my.yaml:2: passes\[0\].pipeline: a pipeline is a mapping with"):
        parse_pipeline(f"passes:\n- pipeline: {options}\n", where="my.yaml")


def test_python_objects_nest_as_yaml_does() -> None:
    inner = Pipeline("inner", (Legalize(target="sglang"),))
    pipeline = load_pipeline([inner, Legalize()])
    assert names(pipeline) == ["legalize", "legalize"]
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


def test_a_python_pipeline_that_contains_itself_is_refused() -> None:
    items: list[Pipeline] = []
    endless = Pipeline("endless", items)  # type: ignore[arg-type]
    items.append(endless)
    with pytest.raises(ConfigError, match="pipeline endless: more than 32 pipelines within one another"):
        load_pipeline(endless)
