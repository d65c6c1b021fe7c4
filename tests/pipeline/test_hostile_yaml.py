"""Pipelines from people one need not trust: nothing is constructed, nothing explodes, nothing hangs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qcompiler.errors import ConfigError
from qcompiler.pipeline import load_pipeline, parse_pipeline
from qcompiler.pipeline.safe_yaml import load_yaml


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_pipeline(text, where="my.yaml")
    assert raised.value.hint
    return raised.value.message


def plain(text: str) -> Any:
    return load_yaml(f"v: {text}", where="my.yaml")[0]["v"]


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [{path}]",
        "!!python/object/new:pathlib.Path [{path}]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!!python/tuple [1]",
        "!mine 3",
        "!!set {{a}}",
        "!!binary aGk=",
        "!!timestamp 2001-01-01",
    ],
)
def test_no_object_is_constructed(value: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    message = refusal("name: p\npasses:\n- " + value.format(path=made))
    assert message.startswith("my.yaml:3: a value of type ")
    assert message.endswith(" has no place here")
    assert not made.exists()


def test_objects_are_refused_wherever_they_hide() -> None:
    for text in ("&a !!python/name:os.mkdir", "{!!python/name:os.mkdir x: 1}", "[[{a: !!python/name:os.mkdir }]]"):
        assert "my.yaml:1: " in refusal(f"passes: {text}")


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "more than 50000 values once aliases are written out" in refusal("\n".join(lines))


def test_merges_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    assert "more than 50000 values once aliases are written out" in refusal("\n".join(lines))


@pytest.mark.parametrize("text", ["passes: &a [*a]", "passes: &a [{legalize: *a}]", "&a {passes: *a}"])
def test_a_value_inside_itself_is_refused(text: str) -> None:
    assert "once aliases are written out" in refusal(text)


def test_an_alias_that_does_not_multiply_is_welcome() -> None:
    text = "passes:\n- assign: &a {on_indivisible: dense}\n- assign: {<<: *a, kv_cache: {}}\n- assign: *a\n"
    first, second, third = parse_pipeline(text).flat()
    assert first == third
    assert second != first
    assert "on_indivisible='dense'" in repr(second)


def test_what_is_wrong_beside_a_merge_is_told_of_its_own_line() -> None:
    text = "passes:\n- legalize: &a\n    target: vllm-sm80\n- legalize:\n    <<: *a\n    target: {}\n"
    assert refusal(text) == "my.yaml:6: passes[1].legalize.target: expected text"


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused(opening: str) -> None:
    message = refusal("passes: " * (opening != "- ") + opening * 20_000)
    assert "my.yaml" in message
    assert "nests too deeply" in message


def test_a_key_given_twice_is_refused() -> None:
    assert refusal("name: p\npasses: []\nname: q") == "my.yaml:3: key 'name' is given twice"
    twice = "passes:\n- assign:\n    ignore: [{name: a}]\n    ignore: [{name: b}]\n"
    assert refusal(twice) == "my.yaml:4: key 'ignore' is given twice"


@pytest.mark.parametrize("key", ["1", "true", "~", "1.5", "[a]", "{a: b}"])
def test_a_key_is_a_word(key: str) -> None:
    assert refusal(f"passes:\n- assign:\n    ? {key}\n    : x\n").startswith("my.yaml:3: a key is a word, not ")


@pytest.mark.parametrize(
    "text", ["2:10", "1:20:30", "no", "Yes", "on", "0x1f", "0o17", "1_000", "010", "2001-01-01", "="]
)
def test_text_that_older_yaml_read_as_something_else_is_text(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("-3", -3), ("+4", 4), ("1.5", 1.5), ("1e3", 1000.0), (".5", 0.5), ("true", True), ("null", None)],
)
def test_numbers_and_truth_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: *b",
        "a: b: c",
        "\tx: 1",
        "--- a\n--- b",
        "a: !!int x",
        "a: !!bool x",
        "a: !!float x",
        "a: {<<: 3}",
        "\0",
        "a: \x07",
        "%YAML 3.0\n--- a",
        '"\\ud800"',
        "\ud800: a",
        "@",
    ],
)
def test_what_is_not_yaml_is_said_so(text: str) -> None:
    assert refusal(text).startswith("my.yaml")


def test_a_huge_text_is_refused_before_it_is_parsed() -> None:
    assert refusal("#" * (1 << 19)) == "my.yaml is longer than 262144 characters: not a pipeline"


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"huge.yaml is larger than 1048576 bytes: not a pipeline"):
        load_pipeline(path)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: Müller\npasses: []\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml' cannot be read: 'utf-8' codec"):
        load_pipeline(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: p\r\npasses:\r\n- legalize\r\n")
    assert load_pipeline(path).name == "p"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_plain_file_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    else:
        path.symlink_to("/dev/zero")  # reading it would never end
    with pytest.raises(ConfigError, match=r"(unknown pipeline .*strange.yaml|strange.yaml. is a folder)"):
        load_pipeline(path)
