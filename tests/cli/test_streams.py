"""Help, the version, and what goes to which stream: quiet when piped, a bar with the time left on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main

from qcompiler.cli import commands
from tests.cli.command import arguments, environment, finish, pipeline_file, start
from tests.cli.conftest import Run
from tests.pipeline.conftest import Install

COMMANDS = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version").out == f"qcompiler {version('qcompiler')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_once(command: str, run: Run) -> None:
    ran = run(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    shown = re.findall(r"^  (?:-\w, )?(--[a-z-]+)(?:, -\w)?(?: / (--[a-z-]+))?", ran.out, re.MULTILINE)
    listed = sorted(name for names in shown for name in names if name)
    options = [option for option in COMMANDS[command].params if option.opts[0].startswith("-")]
    long = [name for option in options for name in (*option.opts, *option.secondary_opts) if name.startswith("--")]
    assert listed == sorted([*long, "--help"])
    assert all(option.help for option in COMMANDS[command].params)


def test_help_of_the_whole_names_every_command(run: Run) -> None:
    ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    assert set(re.findall(r"^  ([a-z]+)  ", ran.out, re.MULTILINE)) == set(COMMANDS)


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert "Usage: qcompiler" in ran.out + ran.err


def test_help_imports_no_library_of_models() -> None:
    """It answers at once."""
    code = """
import sys
from qcompiler.cli.commands import app
try:
    app(["compile", "--help"])
except SystemExit:
    sys.exit(", ".join({"torch", "transformers", "datasets"} & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("passes")
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == commands.READER_GONE, "1 would say that a checkpoint has errors"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("words", [("check", "OUT"), ("inspect", "OUT", "--json"), ("--help",), ("passes",)])
def test_a_full_disk_under_standard_output_is_one_message_and_2(
    words: tuple[str, ...], encoding: str, compiled: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of JSON are larger than what is buffered, and the others smaller."""
    with open("/dev/full", "w", encoding=encoding) as full:
        monkeypatch.setattr(sys, "stdout", full)
        ran = run(*(str(compiled) if word == "OUT" else word for word in words))
    message = "error: standard output cannot be written: No space left on device\n  hint: "
    assert (ran.code, ran.err.startswith(message), len(ran.err.splitlines())) == (2, True, 2), ran


def test_standard_output_that_is_closed_is_refused_before_a_file_takes_its_place(
    compiled: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    ran = run("check", compiled)
    assert (ran.code, ran.err.split("\n  hint: ")[0]) == (2, "error: standard output is closed")


def test_what_was_refused_leaves_nothing_behind_for_the_end_of_the_process() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = start("passes", stdout=full)
        assert process.communicate()[1].count("\n") == 2
    assert process.returncode == 2, "120 is Python's where its last flush fails"


def test_standard_error_that_is_closed_leaves_the_report_as_it_is(
    compiled: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run("check", compiled)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("check", compiled) == report
    refused = run("check", compiled / "none")
    assert (refused.code, refused.out) == (2, ""), "and nothing of the error goes to standard output"
    mistaken = run("check", "--bogus")
    assert (mistaken.code, mistaken.out) == (2, ""), "nor of how a command is used"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_standard_output_has_no_character_for_is_escaped(
    encoding: str, model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "seen").open("w", encoding=encoding) as file:
        monkeypatch.setattr(sys, "stdout", file)
        ran = run("inspect", model, "--tree")
        assert (sys.stdout, file.errors) == (file, "strict"), "the caller has its own stream back"
    assert (ran.code, ran.err) == (0, "")
    shown = "\u2514\u2500 lm_head".encode(encoding, "backslashreplace")
    assert shown in (tmp_path / "seen").read_bytes()


def test_json_in_ascii_is_the_json_of_an_export(
    broken: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backslash that stands for a character that is missing would break it."""
    named = broken.rename(broken.with_name("m\u00f6del"))
    assert run("inspect", named, "--export", tmp_path / "graph.json").code == 0
    with (tmp_path / "seen").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert run("inspect", named, "--json").code == 0
    seen, exported = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("seen", "graph.json"))
    assert seen == exported
    assert "m\u00f6del" in str(seen)


SLOW = """
from dataclasses import dataclass
from time import sleep
from typing import ClassVar

from qcompiler import StreamingPass
from qcompiler.ir.graph import Stage
from qcompiler.pipeline import PartitionStep

@dataclass(frozen=True, kw_only=True)
class Linger(StreamingPass):
    name: ClassVar[str] = "linger"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED})
    seconds: float

    def begin(self, graph, context):
        return Step(self.seconds)

class Step(PartitionStep):
    def __init__(self, seconds):
        self.seconds = seconds

    def partition(self, work):
        sleep(self.seconds)
"""


def on_a_terminal(*args: object, packages: Path) -> str:
    """Everything that the command writes to a terminal of 100 columns."""
    mine, theirs = pty.openpty()
    env = {**environment(packages), "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(arguments(*args), env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(mine, 65536):
            seen += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(mine)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_a_terminal_shows_a_bar_with_the_partitions_done_and_the_time_left(
    model: Path, results: Path, tmp_path: Path, install: Install
) -> None:
    packages = install("slow", {"slow.py": SLOW}, passes={"linger": "slow:Linger"})
    file = pipeline_file(tmp_path, ("  - lower\n", "  - linger: {seconds: 1.2}\n  - lower\n"))
    seen = on_a_terminal("compile", model, "-p", file, "-o", results / "out", packages=packages)
    assert "capture" in seen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert re.search(r"\u2501+ [12]/3 0:00:0[1-9]", plain)
    report = plain.rpartition("test for transformers")[2]
    assert "\u2501" not in report, "the bar is gone when the report is printed"
    assert f"wrote {results / 'out'}" in report.replace("\r\n", "")


def test_errors_of_a_process_are_one_message_and_exit_code_2(model: Path, results: Path) -> None:
    ran = finish(start("compile", model, "-p", "w4a61", "-o", results / "out"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: unknown pipeline 'w4a61'; did you mean 'w4a16'")
    assert not os.listdir(results)
