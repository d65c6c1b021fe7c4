"""How a quantized model computes, wherever its numbers come from: from what steps solved, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qcompiler.ir import ops
from qcompiler.numerics import fake_quantize
from qcompiler.runtime.evaluate import Handler, run_leaf
from qcompiler.scheme import QuantSpec


@dataclass(frozen=True, slots=True)
class Rounding:
    """What activations are rounded to: their spec, and those of its numbers that are measured beforehand.

    `scale` and `zero_point` are [1] or [heads, 1, 1], `global_scale` is float32 [1]; None where the spec has none.
    """

    spec: QuantSpec
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` on the grid; see `qcompiler.numerics.fake_quantize`."""
        return fake_quantize(x, self.spec, scale=self.scale, zero_point=self.zero_point, global_scale=self.global_scale)


@dataclass(frozen=True, slots=True)
class QuantizedOperations:
    """The quantized operations of `qcompiler.ir.ops` with their numbers at hand.

    `model` has the modules, on the meta device; `weights` are dequantized weights, and biases, by parameter path;
    `inputs` is what rounds the input of a layer, by module path; `caches` is what rounds keys or values, by path of the
    attention and part.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Rounding]
    caches: Mapping[tuple[str, str], Rounding]

    def fake_quantize(self, x: Tensor, layer: str) -> Tensor:
        return self.inputs[layer](x)

    def fake_quantize_cache(self, x: Tensor, attention: str, part: str) -> Tensor:
        return self.caches[attention, part](x)

    def quantized_linear(self, x: Tensor, layer: str) -> Tensor:
        output: Tensor = run_leaf(self.model, layer, (x,), self.weights)  # as its class computes: Falcon's rounds twice
        return output

    def handlers(self) -> dict[Any, Handler]:
        """What evaluates the nodes of a lowered graph."""
        return {
            ops.fake_quantize: lambda node, args: self.fake_quantize(*args),
            ops.fake_quantize_cache: lambda node, args: self.fake_quantize_cache(*args),
            ops.quantized_linear: lambda node, args: self.quantized_linear(*args),
        }
