"""How a norm takes a scale: found by running it, whatever its class and its parameters are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.func import functional_call

_TOKENS = 4
_TOLERANCE = 1e-4  # most norms compute in float32 whatever they are given


@dataclass(frozen=True, slots=True)
class Gain:
    """A parameter whose rows grow with a producer's channels: channel c is divided by s when `p[c] + offset` is.

    `offset` is 1 for the weight of a norm that multiplies with 1 + weight, else 0.
    """

    name: str
    offset: float = 0.0


def divided(parameter: Tensor, scale: Tensor, offset: float = 0.0) -> Tensor:
    """`(parameter + offset) / scale - offset`, rows [C, ...] by `scale` [C]; at least float32, not rounded back."""
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    return (wide + offset) / scale.to(wide).reshape(-1, *(1,) * (wide.dim() - 1)) - offset


def norm_gains(norm: nn.Module, path: str, channels: int) -> tuple[Gain, ...] | str:
    """The gains of a norm over `channels` features, named under `path`; or, in words, why it takes no scale.

    The norm (it may lie on the meta device) is run in float64 on the CPU with random parameters and inputs, before and
    after each parameter was divided, as it is or plus one. What divides the output is how this norm takes a scale.
    """
    names = [name for name, _ in norm.named_parameters()]
    if not names:
        return "it has no weight"
    if any(True for _ in norm.buffers()):
        return "it depends on a buffer"
    if any(tuple(p.shape) != (channels,) for p in norm.parameters()):
        return "its parameters are not one number per channel"
    generator = torch.Generator().manual_seed(0)
    *weights, scale = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5 for _ in (*names, ""))
    states = torch.randn(1, _TOKENS, channels, generator=generator, dtype=torch.float64)
    try:
        wanted = _run(norm, dict(zip(names, weights, strict=True)), states) / scale
    except Exception as error:  # a model's own code, which may need a device or a dtype that this is not
        return f"it cannot be run by itself on the CPU: {type(error).__name__}"
    for offsets in product((0.0, 1.0), repeat=len(names)):
        trial = {n: divided(w, scale, o) for n, w, o in zip(names, weights, offsets, strict=True)}
        if torch.allclose(_run(norm, trial, states), wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
            return tuple(Gain(f"{path}.{name}", offset) for name, offset in zip(names, offsets, strict=True))
    return "its output is not divided when its parameters are"


def _run(norm: nn.Module, weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = functional_call(norm, dict(weights), (states,))
    return result.double()
