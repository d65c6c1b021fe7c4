"""Calibration data that cannot be used: one message, and no output."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompiler.demo import calibration_text
from tests.cli.command import write
from tests.cli.conftest import Refuse, Run

ROWS = '{"text": "the king said to his daughter"}\n' * 40
TWO_COLUMNS = '{"ask": "who art thou", "answer": "the king"}\n' * 40


@pytest.mark.parametrize(
    ("name", "text", "options", "says"),
    [
        ("empty.txt", "", [], ["empty.txt has no tokens", "how it was written"]),
        ("empty.jsonl", "", [], ["empty.jsonl is empty", "how the file was written"]),
        ("blank.jsonl", '{"text": ""}\n{"text": " "}\n', [], ["blank.jsonl has no tokens", "empty (2)"]),
        ("short.txt", "to be, or not", [], ["short.txt has", "fewer than one sequence of 128", "--sequence-length"]),
        ("rows.jsonl", ROWS, ["--text-column", "txet"], ["no column 'txet'; did you mean 'text'?", "columns: text"]),
        ("two.jsonl", TWO_COLUMNS, [], ["which column of", "--text-column", "columns: ask, answer"]),
        ("broken.jsonl", '{"text": "the king"}\n{broken', [], ["broken.jsonl cannot be read", "whole"]),
        ("data.xlsx", "?", [], ["data.xlsx is of no format that can be read", ".jsonl"]),
        ("rows.jsonl", ROWS, ["--split", "test"], ["without splits", "'test'", "leave split out"]),
        ("rows.jsonl", ROWS, ["--config-name", "en"], ["no configurations", "'en'", "leave it out"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-6:] else None,
)
def test_data_that_cannot_be_used_is_named(
    name: str, text: str, options: list[str], says: list[str], model: Path, tmp_path: Path, refuse: Refuse
) -> None:
    file = write(tmp_path / name, text)
    refuse("compile", model, "-p", "fp8", "--dataset", file, *options, says=[str(file), *says])


def test_data_that_is_not_there_is_named(model: Path, refuse: Refuse) -> None:
    refuse("compile", model, "-p", "fp8", "--dataset", "none.jsonl", says=["no file or folder 'none.jsonl'", "path"])


def test_a_device_or_a_pipe_is_not_said_to_be_missing(model: Path, refuse: Refuse) -> None:
    says = ["/dev/null is neither a file nor a folder", "into a file first"]
    refuse("compile", model, "-p", "fp8", "--dataset", "/dev/null", says=says)


def test_data_is_asked_for_where_activations_are_measured(model: Path, refuse: Refuse) -> None:
    refuse("compile", model, "-p", "fp8", says=["measures activations", "--dataset", "dynamic"])


@pytest.mark.parametrize(
    "option", ["--samples=3", "--sequence-length=64", "--no-shuffle", "--packing", "--no-packing", "--text-column=text"]
)
def test_options_of_data_need_data(option: str, model: Path, refuse: Refuse) -> None:
    says = [f"{option.partition('=')[0]}: it needs --dataset"]
    refuse("compile", model, "-p", "w8a8-rtn", option, says=says, usage=True)


@pytest.mark.parametrize("option", ["--samples=0", "--sequence-length=0", "--seed=-1", "--batch-tokens=many"])
def test_numbers_that_mean_nothing_are_refused(option: str, model: Path, refuse: Refuse) -> None:
    refuse("compile", model, "-p", "fp8", "--dataset=x", option, says=[option.partition("=")[0]], usage=True)


def test_what_became_of_the_data_is_said(model: Path, run: Run, results: Path) -> None:
    data = ["--dataset", calibration_text(), "--samples", "4"]
    ran = run("compile", model, "-p", "fp8", "-o", results / "out", *data)
    assert (ran.code, ran.err) == (0, "")
    assert "note: calibration: sequence length capped at the model's window: 128, not 2048" in ran.out
    assert "forward: collect" in ran.out


def test_data_that_nothing_needs_is_not_read_and_this_is_said(model: Path, run: Run, results: Path) -> None:
    ran = run("compile", model, "-p", "w8a8-rtn", "-o", results / "out", "--dataset", "none.jsonl")
    assert (ran.code, ran.err) == (0, "")
    assert "note: the calibration data was not needed: nothing in this pipeline measures activations" in ran.out
