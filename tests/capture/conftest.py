"""The zoo, captured: each member once, for all tests that look at it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from transformers import PreTrainedModel

from qcompiler.capture.compare import compare_logits
from qcompiler.capture.twin import build_twin
from qcompiler.errors import CaptureError
from qcompiler.ir.graph import Graph
from tests.capture.models import captured
from tests.zoo import VARIANTS, causal_lm_classes, left_out, tiny_config

DECODERS = [model_type for model_type, _ in causal_lm_classes() if left_out(model_type) is None]
MEMBERS = [*DECODERS, *VARIANTS]


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


def capture_member(model_type: str) -> Member:
    """Capture a member on the meta device, and compare it with its twin."""
    twin = build_twin(tiny_config(model_type))
    try:
        graph = captured(model_type)
        compare_logits(graph, twin)
    except CaptureError as error:
        return Member(model_type, twin, None, error.message)
    return Member(model_type, twin, graph, None)


@pytest.fixture(scope="session", params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    """Every decoder of the zoo and every variant in turn; pytest runs all tests of one before it goes to the next."""
    return capture_member(request.param)
