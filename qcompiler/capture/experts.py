"""Experts as one node: while capturing, a call of a block of experts is one opaque operation.

Transformers calls a block of experts as `experts(hidden_states, indices, weights)`, however it computes them then. For
the length of a capture such a call records a single operation that names the module; `raise_leaves` turns it back into
a call of that module, so what runs later is the module's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.capture.calls import intercepted
from qcompiler.capture.operators import define

EXPERTS_OP = "qcompiler.experts"


def _experts_fake(hidden_states: Tensor, indices: Tensor, weights: Tensor, path: str) -> Tensor:
    return torch.empty_like(hidden_states)


_experts = define("experts(Tensor hidden_states, Tensor indices, Tensor weights, str path) -> Tensor", _experts_fake)


@contextmanager
def experts_as_one_op(model: PreTrainedModel) -> Iterator[None]:
    """Within this context every call of a block of experts is traced as one `qcompiler::experts` node."""
    candidates = {
        module: partial(_call, path)
        for path, module in model.named_modules()
        if len(inspect.signature(type(module).forward).parameters) == 4  # self, hidden states, indices, weights
    }
    with intercepted(candidates):
        yield


def _call(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = tuple(inspect.signature(forward).bind(*args, **kwargs).arguments.values())
    return _experts(*given, path) if _is_routed(given) else forward(*args, **kwargs)


def _is_routed(given: tuple[Any, ...]) -> bool:
    """Whether these are states [..., hidden], and the indices and weights [tokens, k] of each token's experts."""
    if len(given) != 3 or not all(isinstance(argument, Tensor) for argument in given):
        return False
    states, indices, weights = given
    routing = indices.dim() == 2 and indices.shape == weights.shape and not indices.is_floating_point()
    return bool(routing and states.is_floating_point() and weights.is_floating_point())
