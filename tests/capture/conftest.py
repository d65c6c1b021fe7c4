"""The zoo, captured: each member once, for all tests that look at it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from qcompiler.capture import capture_graph
from qcompiler.capture.compare import compare_logits
from qcompiler.capture.twin import build_twin
from qcompiler.errors import CaptureError
from qcompiler.ir.graph import Graph
from qcompiler.meta import build_on_meta
from tests.zoo import causal_lm_classes, left_out, tiny_config

DECODERS = [model_type for model_type, _ in causal_lm_classes() if left_out(model_type) is None]


@dataclass(frozen=True, slots=True)
class Member:
    """A tiny model with weights, and its graph where it was captured and proved; else why it was not."""

    model_type: str
    twin: PreTrainedModel
    graph: Graph | None
    refused: str | None

    @property
    def captured(self) -> Graph:
        """The graph; skips the test where there is none, which `test_zoo` accounts for."""
        if self.graph is None:
            pytest.skip(f"refused: {self.refused}")
        return self.graph


def capture_member(model_type: str, *, dtype: torch.dtype = torch.float32) -> Member:
    """Capture a member on the meta device, and compare it with its twin."""
    twin = build_twin(tiny_config(model_type), dtype=dtype)
    try:
        graph = capture_graph(build_on_meta(twin.config, dtype=dtype))
        compare_logits(graph, twin)
    except CaptureError as error:
        return Member(model_type, twin, None, error.message)
    return Member(model_type, twin, graph, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `pytest -n`, `--dist loadgroup` keeps the tests of one member in one process, where it is captured once."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            if "member" in params:
                item.add_marker(pytest.mark.xdist_group(params["member"]))


@pytest.fixture(scope="session", params=DECODERS)
def member(request: pytest.FixtureRequest) -> Member:
    """Every decoder of the zoo in turn; pytest runs all tests of one before it goes to the next."""
    return capture_member(request.param)
