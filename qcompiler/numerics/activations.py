"""Fake quantization of activations, in the order of operations and the dtypes of compressed-tensors.

Transformers runs the library's `forward_quantize`, so equal arithmetic here means equal logits there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import ConfigError, LegalityError
from qcompiler.numerics.elements import FP8, FP8_MAX, code_range, round_to_values
from qcompiler.numerics.scales import mx_exponent, scale_value
from qcompiler.scheme import QuantSpec, Strategy

_FP8_ZERO_SCALE = 0.125  # what the library puts for an NVFP4 group scale that rounds to zero
_CPU_ELEMENTS = 2**20  # as many as are worked on at once: their float32 copies stay in the cache
_DEVICE_ELEMENTS = 2**24  # launches cost more than memory traffic


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize `x` (any leading dimensions, features last); shape and dtype stay.

    Static specs take `scale` (and `zero_point` if asymmetric): [1], or [heads, 1, 1] for a KV cache
    [batch, heads, tokens, head size]. NVFP4 takes `global_scale` (float32 [1]). The rest is computed from `x`.

    A token is a row of the last dimension. The library agrees on [batch, tokens, features]; given [tokens, features]
    (experts of a mixture) it takes one scale for all tokens, which no runtime does.

    Raises `ConfigError` if what a static spec needs is missing, `LegalityError` if a group size does not divide.
    """
    if x.numel() == 0:
        return x
    if spec.is_nvfp4 and global_scale is None:
        raise ConfigError(f"{spec.short} activations need a global scale", hint="calibrate first")
    if spec.dynamic is False:
        if scale is None or (zero_point is None and not spec.symmetric):
            raise ConfigError(
                f"static {spec.short} activations need a scale and its zero point", hint="calibrate first"
            )
        # Loaders cast static scales to the dtype of the model.
        scale = scale.to(x.dtype)
    elif spec.strategy is Strategy.TENSOR:
        scale, zero_point = _dynamic_qparams(x, spec, global_scale)
    out = torch.empty_like(x)
    for tokens in _slices(x):
        part = _grouped(x[tokens], spec)
        # A token's scales, or its groups', are its own.
        own = (scale, zero_point) if scale is not None else _dynamic_qparams(part, spec, global_scale)
        out[tokens] = _on_grid(part, spec, *own, global_scale).reshape(x[tokens].shape)
    return out


def _slices(x: Tensor) -> Iterator[tuple[Any, ...]]:
    """What cuts `x` into a few tokens each: what is computed on the way to the result stays small, and in the cache."""
    if x.dim() < 2:
        yield (...,)
        return
    budget = _CPU_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS
    count = x.shape[-2]
    step = max(1, budget * count // x.numel())
    for start in range(0, count, step):
        yield (..., slice(start, start + step), slice(None))


def _on_grid(
    values: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None
) -> Tensor:
    """Quantize and dequantize by scales that broadcast against `values`, in their common dtype."""
    if global_scale is not None:
        scale = scale / global_scale
    scaled = values / scale
    if zero_point is not None:
        scaled += zero_point.to(values.dtype)
    low, high = code_range(spec)
    rounded = round_to_values(scaled.clamp_(low, high), spec)
    if zero_point is not None:
        rounded -= zero_point.to(scale.dtype)
    return rounded.mul_(scale)


def _grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` with its groups, if it has any, as the last dimension."""
    if spec.group_size is None:
        return x
    if x.shape[-1] % spec.group_size:
        raise LegalityError(f"{spec.short}: {x.shape[-1]} features are not divisible by group_size {spec.group_size}")
    return x.reshape(*x.shape[:-1], -1, spec.group_size)


def _dynamic_qparams(values: Tensor, spec: QuantSpec, global_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a runtime computes on the fly, in the dtype of the activations (NVFP4: float32, as its global scale is)."""
    if spec.strategy is Strategy.TENSOR:
        low, high = (t.reshape(1) for t in torch.aminmax(values))
    else:
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    code_low, code_high = code_range(spec)
    if not spec.symmetric:
        scale = _nonzero((high - low) / (code_high - code_low))
        return scale, (code_low - low / scale).clamp_(code_low, code_high).round_().to(torch.int8)
    amax = torch.maximum(-low, high)
    if spec.is_mx:
        exponent = mx_exponent(amax.to(torch.float32), spec.bits)
        return _nonzero(scale_value(exponent, spec).to(values.dtype), 1.0), None
    scale = amax / ((code_high - code_low) / 2)
    if global_scale is None:
        return _nonzero(scale), None
    return _nonzero((scale * global_scale).clamp_(max=FP8_MAX).to(FP8).to(torch.float32), _FP8_ZERO_SCALE), None


def _nonzero(scale: Tensor, substitute: float | None = None) -> Tensor:
    """`scale` with its zeros (groups of zeros) replaced, by the dtype's epsilon unless told otherwise."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps if substitute is None else substitute, scale)
