"""Attention under the plain causal mask, without reading the mask: torch's kernels then leave out what it hides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompiler.ir.fx import Node, tensor_arg

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def mask_of(node: Node) -> Node | None:
    """The mask of an attention that `attend_causally` evaluates where it is causal: no dropout, and nothing else masks.

    None for any other node.
    """
    if node.target is not _ATTENTION or any(node.args[4:]) or any(isinstance(v, Node) for v in node.kwargs.values()):
        return None
    known = node.kwargs.keys() <= {"scale", "enable_gqa"}
    return tensor_arg(node, 3) if known else None


def is_causal(mask: Any) -> bool:
    """Whether a mask lets each token see itself and those before it, by its values: bool [..., S, S]."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.dim() < 2:
        return False
    rows, columns = mask.shape[-2:]
    if rows != columns:
        return False
    causal = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril()
    return torch.equal(mask, causal.expand_as(mask))


def attend_causally(node: Node, args: tuple[Any, ...]) -> Tensor:
    """Evaluate an attention whose mask is causal: on a CPU, to the bit what the mask gives."""
    query, key, value, mask = args[:4]
    if not query.shape[-2] == key.shape[-2] == mask.shape[-1]:  # a mask of one token is spread over all
        found: Tensor = _ATTENTION(*args, **node.kwargs)
    else:
        found = _ATTENTION(query, key, value, None, 0.0, True, **node.kwargs)
    return found
