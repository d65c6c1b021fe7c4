"""Sites of expert blocks: the projections that runtimes look for, found by their sizes."""

from __future__ import annotations

import pytest

from qcompiler.capture import capture_graph
from qcompiler.ir.annotations import LeafKind
from qcompiler.ir.graph import Graph
from qcompiler.lowering.sites import sites
from tests.capture.models import captured, on_meta


def first_expert(graph: Graph) -> dict[str, tuple[int, int, bool]]:
    """The projections of the first expert: out features, in features, and whether it fuses with another."""
    block = next(leaf.path for _, leaf in graph.leaves() if leaf.kind is LeafKind.EXPERTS)
    found = [site for site in sites(graph) if site.name.startswith(f"{block}.0.")]
    return {site.leaf: (site.out_features, site.in_features, site.fusion_group is not None) for site in found}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_merged_gate_and_up_is_two_projections_that_fuse(model_type: str) -> None:
    config = captured(model_type).model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    assert first_expert(captured(model_type)) == {
        "gate_proj": (inner, hidden, True),
        "up_proj": (inner, hidden, True),
        "down_proj": (hidden, inner, False),
    }


def test_what_is_merged_is_told_by_sizes_and_not_by_names() -> None:
    graph = capture_graph(on_meta("mixtral"))
    for _, leaf in graph.leaves():
        if leaf.kind is LeafKind.EXPERTS:
            block = graph.model.get_submodule(leaf.path)
            block.register_parameter("w13", block._parameters.pop("gate_up_proj"))
    assert first_expert(graph) == first_expert(captured("mixtral"))
