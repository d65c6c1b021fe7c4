"""Help, the version, and what goes to which stream: quiet when piped, a bar with the time left on a terminal."""

from __future__ import annotations

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
    assert "Traceback" not in process.stderr.read()
    assert process.wait() in (0, 1)


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
