"""What lies on disk for one quantized linear: names, dtypes and shapes, known before any weight is read.

The formats are compressed-tensors', as its compressors write and vLLM's schemes allocate them. Where they leave room:

- Integers with one scale per tensor or block under pack-quantized: the library packs zero points only for group and
  channel, and reads them as int8 in the scale's shape otherwise. vLLM has no such scheme.
- int-quantized: vLLM takes tensor and channel scales and symmetric weights only (W8A8Int8); the library also
  decompresses groups and int8 zero points in the scale's shape.
- naive-quantized: vLLM counts it among the formats with quantized activations and maps FP8 weights without an input
  scheme to W8A16Fp8 (tensor, channel, block); FP8 in groups other than MXFP8 has no scheme there.
- int-quantized, float-quantized and naive-quantized are one reader in the library, and one set of formats to vLLM: the
  dtype of the codes is that of the weights' type, whichever of the three is written.
- input_zero_point is int8 whatever the width of the activations: the library's zp_dtype, and vLLM's parameter.
"""

from __future__ import annotations

import torch

from qcompiler.errors import LegalityError
from qcompiler.formats.bits import packed_words
from qcompiler.numerics.tensor import scale_shape
from qcompiler.scheme import Format, QuantSpec, Scheme, Strategy
from qcompiler.tensors import Spec


def layout(
    scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, *, format: Format | None = None
) -> dict[str, Spec]:
    """Every tensor written for a weight [O, I] of a model in `dtype`, by its name under the module.

    format: another than the scheme's own, as other writers may have chosen. Raises `LegalityError` if the group size
    does not divide `in_features`.
    """
    spec, shape = scheme.weights, (out_features, in_features)
    scales = scale_shape(spec, *shape)
    tensors: dict[str, Spec] = {}
    format = format or scheme.format
    match format:
        case Format.PACK_QUANTIZED:
            words = packed_words(in_features, spec.bits)
            tensors["weight_packed"] = (torch.int32, (out_features, words))
            tensors["weight_shape"] = (torch.int64, (2,))
        case Format.NVFP4 | Format.MXFP4:
            tensors["weight_packed"] = (torch.uint8, (out_features, in_features // 2))
        case Format.MXFP8:
            tensors["weight"] = (torch.float8_e4m3fn, shape)
        case _:
            tensors["weight"] = (torch.int8 if spec.type == "int" else torch.float8_e4m3fn, shape)
    tensors["weight_scale"] = (_scale_dtype(spec, dtype), scales)
    if spec.is_nvfp4:
        tensors["weight_global_scale"] = (torch.float32, (1,))
    if packs_zero_point(scheme, format):
        tensors["weight_zero_point"] = (torch.int32, (packed_words(out_features, spec.bits), scales[1]))
    elif not spec.symmetric:
        tensors["weight_zero_point"] = (torch.int8, scales)
    return tensors | _input_layout(scheme.input_activations, dtype)


def cache_scale(part: str) -> str:
    """The name, under an attention module, of the scale of its keys or values: [1], or [heads, 1, 1]."""
    return f"{part[0]}_scale"


def packs_zero_point(scheme: Scheme, format: Format | None = None) -> bool:
    """Whether zero points are packed along O like the codes, not stored as int8."""
    spec = scheme.weights
    per_row = spec.strategy in (Strategy.GROUP, Strategy.CHANNEL)
    return (format or scheme.format) is Format.PACK_QUANTIZED and per_row and not spec.symmetric


def _scale_dtype(spec: QuantSpec, dtype: torch.dtype) -> torch.dtype:
    if spec.is_mx:
        return torch.uint8
    return torch.float8_e4m3fn if spec.is_nvfp4 else dtype


def _input_layout(spec: QuantSpec | None, dtype: torch.dtype) -> dict[str, Spec]:
    """Calibrated numbers of the activations; dynamic ones have none, but for NVFP4's global scale."""
    if spec is None or spec.dynamic is True:
        return {}
    if spec.is_nvfp4:
        if spec.dynamic is False:
            raise LegalityError(
                "NVFP4 activations with static group scales cannot be stored", hint='set dynamic: "local"'
            )
        return {"input_global_scale": (torch.float32, (1,))}
    tensors: dict[str, Spec] = {"input_scale": (dtype, (1,))}
    if not spec.symmetric:
        tensors["input_zero_point"] = (torch.int8, (1,))
    return tensors
