"""Prove that the keys and values found in a graph are what the model puts into its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from qcompiler.capture.compare import eager_twin, graph_values, some_tokens, tensors_of
from qcompiler.errors import LegalityError, in_brief
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.ir.observers import LEAVE_CACHE
from qcompiler.patterns.cache import Cached, cached_tensors

_NOISE = 0.05
"""What two runs of one model may differ by, in standard deviations: a cache changes masks, and those kernels."""


class _Recording(DynamicCache):  # type: ignore[misc]  # Transformers' class has no types
    """A cache that remembers what enters it: keys and values of every update, in order."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.entered: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.entered += (key_states.detach().clone(), value_states.detach().clone())
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values


def prove_cached(graph: Graph, *, trust_remote_code: bool = False) -> None:
    """Compare `cached_tensors` of a graph with what enters the cache of the eager model, as `compare_with_eager` does.

    What attention reads need not be what is cached: a cache may hold latents that are expanded after it, or less than
    attention reads. Raises `LegalityError` where they differ, and where the model does not run with a cache.
    """
    graph, model = eager_twin(graph, trust_remote_code=trust_remote_code)
    compare_cached(graph, model)


def compare_cached(graph: Graph, model: PreTrainedModel) -> None:
    """`prove_cached` for a graph and a model with weights that it is the graph of."""
    ids = some_tokens(model)
    try:
        cache = _Recording(model.config)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:  # a model's own code
        raise _unproved(model, f"does not run with one: {in_brief(error)}") from error
    found: dict[tuple[str, Node], Cached] = {}
    for cached in cached_tensors(graph):
        found.setdefault((cached.part, cached.node), cached)  # layers may share keys and values
    values = graph_values(graph, ids, tensors_of(graph, model), [node for _, node in found])
    if len(cache.entered) != len(found):
        raise _unproved(
            model,
            f"puts {len(cache.entered)} tensors into it where its attention reads {len(found)}, "
            f"as in {next(iter(found.values())).path}",
        )
    for cached, entered in zip(found.values(), cache.entered, strict=True):
        _compare(model, cached, values[cached.node], entered)


def _compare(model: PreTrainedModel, cached: Cached, read: Tensor, entered: Tensor) -> None:
    if read.shape != entered.shape:
        difference = f"{list(entered.shape)} enters it and {list(read.shape)} is read"
    else:
        apart = (read.float() - entered.float()).square().mean().sqrt()
        if apart <= _NOISE * entered.float().std():
            return
        difference = "other numbers of the same shape enter it"
    raise _unproved(model, f"caches something else than the {cached.part} of {cached.path}: {difference}")


def _unproved(model: PreTrainedModel, why: str) -> LegalityError:
    return LegalityError(f"the KV cache cannot be quantized: {type(model).__name__} {why}", hint=LEAVE_CACHE)
