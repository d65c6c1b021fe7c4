"""Captures that compilations of one process share: tracing a tiny model takes most of the time to compile it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from qcompiler.ir.graph import Graph

_KEPT = 40


def remembered(capture: Callable[..., Any]) -> Callable[..., Any]:
    """`capture`, which traces each model without weights once: what is equal in class, config and dtype is one model.

    It returns a graph, or a graph and notes on it. Each call gets ones of its own. What is refused is refused again,
    and remote code is run again.
    """
    known: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def call(model: PreTrainedModel, *, trust_remote_code: bool = False) -> Any:
        options = {"trust_remote_code": True} if trust_remote_code else {}
        if model.device.type != "meta" or options:
            return capture(model, **options)
        config = model.config
        said = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        key = (type(model), config._attn_implementation, model.dtype, str(said), tuple(model.state_dict()))
        if key not in known:
            known[key] = _copied(capture(model), model)
            if len(known) > _KEPT:
                known.popitem(last=False)
        known.move_to_end(key)
        return _copied(known[key], model)

    return call


def _copied(captured: Graph | Sequence[Any], model: PreTrainedModel) -> Any:
    """What can be edited alone, of an equal model."""
    if not isinstance(captured, Graph):
        graph, notes = captured
        return _copied(graph, model), list(notes)
    return replace(
        captured,
        fx=copy.deepcopy(captured.fx),
        model=model,
        constants={**captured.constants},
        buffers={**captured.buffers},
        like={**captured.like},
    )
