"""The command run in this process, which spares each test the seconds that its imports take; and what it runs on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qcompiler
from qcompiler import cli
from tests.cli.command import Ran
from tests.compile.tiny import save_tiny
from tests.data.conftest import CHAT_TEMPLATE, save_tokenizer
from tests.pipeline.conftest import install

__all__ = ["install"]  # a fixture of the tests of pipelines, which these tests need too

Run = Callable[..., Ran]
"""`run("compile", model, ...)` runs the command with these arguments."""

Refuse = Callable[..., str]
"""`refuse("compile", model, ..., says=[...])` is the message; see the fixture."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process. What it does not catch itself reaches the test."""

    def call(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["qcompiler", *map(str, args)])
        capsys.readouterr()
        try:
            cli.main()
            code: object = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        assert isinstance(code, int), code
        return Ran(code, out, err)

    return call


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def refuse(run: Run, results: Path) -> Refuse:
    """Runs a command that must fail as bad input does, into `results / "out"` where it compiles.

    One message on standard error, which holds every part of `says` and tells the mend; nothing on standard output; exit
    code 2; nothing new in `results`. `usage`: the message is about the command line's own words.
    """

    def call(command: str, *args: object, says: list[str], usage: bool = False) -> str:
        given = [*args, "--output", results / "out"] if command == "compile" and "--output" not in args else args
        before = sorted(results.rglob("*"))
        ran = run(command, *given)
        assert ran.code == 2, ran
        assert ran.out == ""
        assert sorted(results.rglob("*")) == before
        assert ran.err.startswith("Usage: " if usage else "error: ")
        assert sum(line.lower().startswith("error: ") for line in ran.err.splitlines()) == 1
        assert usage or "\n  hint: " in ran.err
        assert [part for part in says if part not in ran.err] == [], ran.err
        return ran.err

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, with a token for each byte and a window of 128."""
    folder = save_tiny(tmp_path_factory.mktemp("model"), "llama", layers=1, max_position_embeddings=128)
    return save_tokenizer(folder, CHAT_TEMPLATE)


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of `model`, to be broken."""
    return shutil.copytree(model, tmp_path / "broken")


@pytest.fixture(scope="session")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, compiled."""
    return qcompiler.compile(model, pipeline="w8a8-rtn", output=tmp_path_factory.mktemp("outputs") / "compiled").output
