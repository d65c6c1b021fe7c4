"""Number formats: weights to codes and back, and the fake quantization of activations. Pure torch, on any device."""

from qcompiler.numerics.activations import fake_quantize
from qcompiler.numerics.quadratic import QuadraticForm, add_gram
from qcompiler.numerics.scales import nvfp4_global_scale, static_qparams
from qcompiler.numerics.tensor import QuantizedTensor, scale_shape
from qcompiler.numerics.weights import (
    ScaleSearch,
    WeightError,
    dequantize,
    difference,
    multiplied_out,
    quantize_weight,
    range_factors,
    weight_amax,
    weight_error,
)

__all__ = [
    "QuadraticForm",
    "QuantizedTensor",
    "ScaleSearch",
    "WeightError",
    "add_gram",
    "dequantize",
    "difference",
    "fake_quantize",
    "multiplied_out",
    "nvfp4_global_scale",
    "quantize_weight",
    "range_factors",
    "scale_shape",
    "static_qparams",
    "weight_amax",
    "weight_error",
]
