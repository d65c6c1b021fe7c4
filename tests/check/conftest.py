"""Sound checkpoints, compiled once for all tests that break copies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from qcompiler.capture import capture_graph
from qcompiler.check import CheckReport, check_checkpoint, linears
from qcompiler.ir.graph import Graph
from tests.check.checkpoints import Edited
from tests.check.mixture import mixture
from tests.cli.conftest import model, refuse, results, run
from tests.compile.tiny import ATTENTION, EVERYWHERE, INT4, INT8_STATIC, MLP, compile_tiny, pipeline, rule, save_tiny

__all__ = ["model", "refuse", "results", "run"]  # fixtures

INT3 = {"weights": {"type": "int", "bits": 3, "group_size": 16}}
BLOCKS = {"weights": {"type": "float", "bits": 8, "block_structure": [16, 16]}}
FP8_CACHE = {"strategy": "tensor"}

PIPELINES = {
    "packed": pipeline(rule(EVERYWHERE, INT4)),
    "mixed": pipeline(rule(ATTENTION, INT4), rule(MLP, INT8_STATIC)),
    "channel": pipeline(rule(EVERYWHERE, "FP8_DYNAMIC"), kv_cache=FP8_CACHE),
    "nvfp4": pipeline(rule(EVERYWHERE, "NVFP4")),
    "mxfp8": pipeline(rule(ATTENTION, "MXFP8A16")),
    "odd-bits": pipeline(rule(EVERYWHERE, INT3)),
}


@pytest.fixture(autouse=True, scope="session")
def _captured_once() -> Iterator[None]:
    """Capture takes most of a check's time, and the model under most tests here is one of two."""
    graphs: dict[str, Graph] = {}

    def capture(model: PreTrainedModel) -> Graph:
        key = model.config.to_json_string()
        if key not in graphs:
            graphs[key] = capture_graph(model)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "capture_graph", capture)
        yield


Base = Callable[[str], Edited]
Check = Callable[[Edited], CheckReport]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """`base(name)` is a copy of a sound checkpoint of one layer, to be edited."""
    folder = tmp_path_factory.mktemp("check")
    source = save_tiny(folder / "source", "llama", layers=1)

    @cache
    def made(name: str) -> Edited:
        if name == "mixture":
            return mixture(folder / name)
        return Edited.read(compile_tiny(source, folder / name, PIPELINES[name], rows=2).output)

    return lambda name: made(name).copy()


@pytest.fixture
def checked(tmp_path: Path) -> Check:
    """Checks what was edited."""
    return lambda edited: check_checkpoint(edited.write(tmp_path / "checkpoint"))
