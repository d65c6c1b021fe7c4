"""The page "Write a pass": its files install outside the repository, and its commands do what it says."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import passes
from qcompiler.demo import model_path
from tests.capture.models import captured
from tests.cli.command import finish, start

pytestmark = pytest.mark.xdist_group("writing-a-pass")  # one process installs the package and runs the commands

PAGE = (Path(passes.__file__).parent / "README.md").read_text(encoding="utf-8")
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"`([\w.]+\.(?:toml|py|yaml))`")


def blocks(language: str) -> list[str]:
    found = [text for kind, text in _FENCED.findall(PAGE) if kind == language]
    assert found, f"the page has no block in {language}"
    return found


def files() -> dict[str, str]:
    """The files of the page: each is named in the paragraph before its block."""
    found = {}
    for block in _FENCED.finditer(PAGE):
        paragraph = PAGE[: block.start()].rstrip().rpartition("\n\n")[2]
        names = _NAMED.findall(paragraph)
        if block[1] in ("toml", "python", "yaml"):
            assert len(names) == 1, f"this block needs one name: {paragraph!r}"
            found[names[0]] = block[2]
    return found


@dataclass(frozen=True, slots=True)
class Installed:
    """The page's package: its sources, and where pip put it."""

    sources: Path
    packages: Path


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("page")
    sources, packages = folder / "qcompiler-edges", folder / "packages"
    sources.mkdir()
    for name, text in files().items():
        (sources / name).write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    target = ["--disable-pip-version-check", "--target", str(packages), str(sources)]
    done = subprocess.run([*pip, *target], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Installed(sources, packages)


@pytest.fixture(scope="session")
def printed(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What the page's commands print, by subcommand, once the package is installed."""
    words = {"MODEL": model_path(), "OUT": tmp_path_factory.mktemp("out") / "OUT"}
    install, *commands = blocks("sh")[0].splitlines()
    assert install == f"pip install ./{installed.sources.name}"
    outputs = {}
    for line in commands:
        command, *args = line.split()
        assert command == "qcompiler"
        ran = finish(start(*(words.get(arg, arg) for arg in args), packages=installed.packages, cwd=installed.sources))
        assert ran.code == 0, ran.err
        outputs[args[0]] = ran.out
    return outputs


def test_the_passes_are_listed_with_their_options(printed: Mapping[str, str]) -> None:
    text = printed["passes"]
    assert (
        "\nkeep-edges  (annotated)\n  Give the quantized linears of the `first` and the `last` decoder layers" in text
    )
    assert "\n    first: int = 1\n    last: int = 1\n    scheme: Scheme = W8A16\n" in text
    assert "\nweight-peaks  (observed or calibrated)\n" in text
    assert "\nassign  (" in f"\n{text}"


def test_the_plan_gives_the_layers_at_both_ends_more_bits_and_says_why(printed: Mapping[str, str]) -> None:
    rows: list[dict[str, Any]] = json.loads(printed["plan"])["layers"]
    schemes = {layer: {row["scheme"] for row in rows if row["layer"] == layer} for layer in range(4)}
    assert schemes == {0: {"w:int8/g128"}, 1: {"w:int4/g128"}, 2: {"w:int4/g128"}, 3: {"w:int8/g128"}}
    assert {row["because"] for row in rows if row["layer"] == 3} == {"keep-edges: layer 3 of 4, over assign: rule 1"}
    assert {row["because"] for row in rows if row["layer"] == 2} == {"assign: rule 1"}
    (head,) = (row for row in rows if row["structure"] == "lm-head")
    assert head["scheme"] is None
    notes = [note["text"] for note in json.loads(printed["plan"])["notes"]]
    assert "keep-edges: 14 linears have w:int8/g128" in notes


def test_the_graph_is_printed_as_the_page_shows_it(printed: Mapping[str, str]) -> None:
    lines = printed["compile"].splitlines()
    assert "after keep-edges:" in lines
    for shown in blocks("text")[0].splitlines():
        assert shown in lines


def test_the_streaming_pass_reports_what_it_saw_in_the_sweep(printed: Mapping[str, str]) -> None:
    assert re.search(r"^note: weight-peaks: \S+_proj reaches \d+ times its root mean square$", printed["compile"], re.M)
    assert re.search(r"^time: .*keep-edges .*weight-peaks .*lower ", printed["compile"], re.M)


def test_the_pattern_finds_what_the_page_says(installed: Installed) -> None:
    products: Callable[..., list[str]] = runpy.run_path(str(installed.sources / "products.py"))["products"]
    assert products(captured("llama")) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert any(
        "walking back from" in why and "to product (aten.mul) stopped at" in why for why in products(captured("opt"))
    )
