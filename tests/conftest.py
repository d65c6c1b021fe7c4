"""What every test shares: models that are captured once, one thread for torch, and golden text files."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qcompiler.capture import capture_and_prove, capture_graph
from tests.captures import remembered

GOLDEN = Path(__file__).parent / "golden"

Golden = Callable[[str, str], None]
"""`golden(name, text)` compares `text` with `tests/golden/<name>.txt`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what the tests got")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `pytest -n`, `--dist loadgroup` keeps the tests of one model in one process, where it is captured once."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            model = params.get("member", params.get("model_type"))
            if isinstance(model, str):
                item.add_marker(pytest.mark.xdist_group(model))


@pytest.fixture(autouse=True, scope="session")
def _quick() -> None:
    """Tensors this small are slower on several threads, and much slower beside other workers.

    Tracing makes many objects, and a session holds many: garbage is collected a tenth as often as otherwise.
    """
    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(7_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def _captured_once() -> Iterator[None]:
    """Most tests that compile do not ask whether a capture is right: tests/capture does, of every architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompiler.compiler.capture_and_prove", remembered(capture_and_prove))
        for module in ("lowering.evaluate", "check.linears"):
            patch.setattr(f"qcompiler.{module}.capture_graph", remembered(capture_graph))
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares text with a golden file, or rewrites the file under `--update-golden`."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"there is no golden file {path.name}: run pytest --update-golden, and read what it wrote"
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; --update-golden rewrites it"

    return compare
