"""The operations that passes insert into a graph, and what each one means.

They are plain functions: a `call_function` node whose target is one of them. `observe` computes as it stands; the
quantized operations read their numbers (codes, scales) from the layer that the node names, so a graph is evaluated by
`qcompiler.lowering.evaluate`, which looks them up. `OPS` is the whole vocabulary; the verifier refuses anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from torch import Tensor

from qcompiler.errors import VerificationError

_EVALUATE = "evaluate the graph with qcompiler.lowering.evaluate"


def observe(x: Tensor) -> Tensor:
    """Identity. While calibrating, the statistic of the node's `Observer` annotation takes in the tokens of `x`."""
    return x


def fake_quantize(x: Tensor, layer: str) -> Tensor:
    """Round `x` to the grid of `layer`'s input activations and back: same shape and dtype."""
    raise VerificationError(f"fake_quantize of {layer} needs its scales: {_EVALUATE}")


def quantized_linear(x: Tensor, layer: str) -> Tensor:
    """`x @ dequantize(codes of layer).T + bias`: [..., in_features] to [..., out_features], in the dtype of `x`."""
    raise VerificationError(f"quantized_linear {layer} needs its codes: {_EVALUATE}")


def fake_quantize_cache(x: Tensor, attention: str, part: str) -> Tensor:
    """Round keys or values (`part`) [B, H, S, D] to the grid of `attention`'s cache and back: same shape and dtype."""
    raise VerificationError(f"fake_quantize_cache of {attention} needs its scales: {_EVALUATE}")


OPS: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {fn.__name__: fn for fn in (observe, fake_quantize, fake_quantize_cache, quantized_linear)}
)
