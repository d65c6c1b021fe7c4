"""Experts as one node: while capturing, a block of experts is one opaque operation.

Transformers dispatches expert blocks through its `ExpertsInterface`. For the length of a capture we register an
implementation that records a single operation naming the module; `raise_leaves` turns it back into a call of that
module, so what runs later is the module's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qcompiler.capture.operators import define

_NAME = "qcompiler_capture"
EXPERTS_OP = "qcompiler.experts"


def _experts_fake(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, path: str) -> Tensor:
    return torch.empty_like(hidden_states)


_experts = define(
    "experts(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, str path) -> Tensor", _experts_fake
)


@contextmanager
def experts_as_one_op(model: PreTrainedModel) -> Iterator[None]:
    """Within this context every dispatched expert block of `model` is traced as one `qcompiler::experts` node."""
    paths = {id(module): path for path, module in model.named_modules()}
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    before = {key: getattr(config, "_experts_implementation_internal", None) for key, config in configs.items()}

    def traced(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result: Tensor = _experts(hidden_states, top_k_index, top_k_weights, paths[id(self)])
        return result

    ALL_EXPERTS_FUNCTIONS[_NAME] = traced
    try:
        for config in configs.values():
            config._experts_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
        del ALL_EXPERTS_FUNCTIONS[_NAME]
