"""A tiny model read at several points, and compiled, and a browser: each once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qcompiler.inspection.checkpoint import read_checkpoint
from qcompiler.inspection.document import Document
from qcompiler.inspection.page import render_page
from qcompiler.inspection.read import read_plans
from qcompiler.pipeline import Pipeline, parse_pipeline
from tests.compile.tiny import compile_tiny, save_tiny
from tests.inspection.browser import Browser, Show

MIXED = {
    "name": "mixed",
    "passes": [
        {
            "assign": {
                "rules": [
                    {"select": {"structure": "mlp-output"}, "scheme": {"weights": {"bits": 8, "group_size": 16}}},
                    {
                        "select": {"structure": ["attention-input", "mlp-input"]},
                        "scheme": {"weights": {"bits": 4, "group_size": 16}},
                        "transform": "awq",
                    },
                    {
                        "select": {"structure": "mlp-output", "layers": -1},
                        "scheme": {"weights": {"bits": 4, "group_size": 16}},
                        "override": True,
                    },
                    {"select": {"name": "lm_head"}, "scheme": "W8A16", "optional": True},
                ],
                "ignore": [{"structure": "lm-head"}],
            }
        },
        {"legalize": {"target": "transformers"}},
        "insert-observers",
        "calibrate",
        "lower",
    ],
}
"""Rules that decide, lose, miss and hide; layers of which the last differs."""


@pytest.fixture(scope="session")
def mixed() -> Pipeline:
    return parse_pipeline(yaml.safe_dump(MIXED))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the weights of a tiny Llama of four layers."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama", layers=4))


@pytest.fixture(scope="session")
def points(model: str, mixed: Pipeline) -> dict[str, Document]:
    """The model at three points of the pipeline."""
    names = ("capture", "assign", "insert-observers")
    return dict(zip(names, read_plans(model, mixed, names), strict=True))


@pytest.fixture(scope="session")
def compiled(model: str, mixed: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model compiled."""
    output = tmp_path_factory.mktemp("compiled") / "out"
    compile_tiny(Path(model), output, mixed)
    return str(output)


@pytest.fixture(scope="session")
def stored(compiled: str) -> Document:
    return read_checkpoint(Path(compiled))


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def show(window: Browser, tmp_path: Path) -> Iterator[Show]:
    """Opens a document's page; afterwards, nothing may have gone wrong in it."""

    def opened(document: Document) -> Browser:
        file = tmp_path / "page.html"
        file.write_text(render_page(document), encoding="utf-8")
        window.open(file.as_uri())
        return window

    window.problems.clear()
    yield opened
    window.run("0")
    assert window.problems == []
