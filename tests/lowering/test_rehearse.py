"""Rehearse: Transformers loads names and shapes without values, and what it misses is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from qcompiler.ir.graph import Graph
from qcompiler.lowering.rehearse import Rehearsal, rehearse
from qcompiler.source import ModelSource
from tests.passes.conftest import Saved, saved
from tests.passes.models import assign, block, rule, run

__all__ = ["saved"]


class Broken(LlamaForCausalLM):
    """A model that cannot be loaded at all."""

    def _initialize_missing_keys(self, is_quantized: bool) -> None:
        raise ValueError("out of order")


@pytest.fixture
def graph() -> Graph:
    return run(block(), assign(rule("W8A8", layers=0))).graph


def quantization(*targets: str, **said: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **said}
    group = {"targets": list(targets), "weights": weights, "format": "int-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def test_what_transformers_would_miss_is_found_and_nothing_is_said_aloud(
    graph: Graph, saved: Saved, capfd: pytest.CaptureFixture[str]
) -> None:
    """The graph quantizes the whole layer: a config that leaves half of it out leaves its scales without a place."""
    before = logging.get_verbosity()
    with ModelSource(saved(graph), graph.model.config, graph.model) as source:
        capfd.readouterr()
        assert rehearse(graph, source, quantization("Linear")) == Rehearsal()
        refused = rehearse(graph, source, quantization(r"re:.*self_attn\..*")).refused
    assert refused is not None
    assert "unexpected_keys: ['model.layers.0.mlp.down_proj.weight_scale'" in refused
    assert capfd.readouterr().err == ""
    assert logging.get_verbosity() == before


def test_a_model_that_does_not_pass_dense_says_nothing_of_schemes(graph: Graph, saved: Saved) -> None:
    with torch.device("meta"):
        broken = Broken(graph.model.config)
    with ModelSource(saved(graph), graph.model.config, broken) as source:
        assert rehearse(graph, source, quantization("Linear")) == Rehearsal(unknown="ValueError: out of order")


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_formats_that_become_bfloat16_are_refused_where_the_model_computes_in_another_dtype(
    scheme: str, saved: Saved
) -> None:
    """Transformers loads such a checkpoint, and then fails at its first linear: seen on models in float32."""
    graph = run(block(), assign(rule(scheme, layers=0))).graph
    with ModelSource(saved(graph), graph.model.config, graph.model) as source:
        computed = source.dtype
        refused = rehearse(graph, source, {}).refused
    assert computed is torch.float32
    assert refused is not None
    assert "computes in float32" in refused
    assert "use --dtype bfloat16" in refused
