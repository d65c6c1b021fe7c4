"""Tiny models that more than one test file captures."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from qcompiler.capture import capture_graph
from qcompiler.ir.graph import Graph
from qcompiler.meta import build_on_meta
from tests.zoo import tiny_config


def on_meta(model_type: str, *, layers: int | None = None, **said: Any) -> PreTrainedModel:
    config = tiny_config(model_type, layers=layers)
    for name, value in said.items():
        setattr(config, name, value)
    return build_on_meta(config, dtype=torch.float32)


@cache
def captured(model_type: str) -> Graph:
    """The graph of a tiny model; tests must not change it."""
    return capture_graph(on_meta(model_type))
