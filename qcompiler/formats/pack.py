"""Codes and scales to the tensors on disk, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.errors import CheckpointError, ConfigError
from qcompiler.formats.bits import pack_nibbles, pack_words, unpack_nibbles, unpack_words
from qcompiler.formats.layout import layout, packs_zero_point
from qcompiler.numerics.tensor import QuantizedTensor, scale_shape
from qcompiler.scheme import Format, Scheme
from qcompiler.tensors import Spec


@dataclass(frozen=True, slots=True)
class InputParams:
    """Calibrated numbers of a linear's input: `scale` and `zero_point` if static, `global_scale` for NVFP4."""

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def pack(
    quantized: QuantizedTensor,
    scheme: Scheme,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_global_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of `layout`, by name. Nothing is rounded: `unpack` gives back what went in.

    Raises `ConfigError` if the tensors are not those that the scheme asks for.
    """
    tensors = {"weight_scale": quantized.scale}
    match scheme.format:
        case Format.PACK_QUANTIZED:
            tensors["weight_packed"] = pack_words(quantized.codes, scheme.weights.bits)
            tensors["weight_shape"] = torch.tensor(quantized.shape)
        case Format.NVFP4 | Format.MXFP4:
            tensors["weight_packed"] = pack_nibbles(quantized.codes)
        case _:
            tensors["weight"] = quantized.codes
    if quantized.zero_point is not None:
        zero = quantized.zero_point
        if packs_zero_point(scheme):
            zero = pack_words(zero.T, scheme.weights.bits).T.contiguous()
        tensors["weight_zero_point"] = zero
    optional = {
        "weight_global_scale": quantized.global_scale,
        "input_scale": input_scale,
        "input_zero_point": input_zero_point,
        "input_global_scale": input_global_scale,
    }
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    expected = layout(scheme, *quantized.shape, quantized.scale.dtype if input_scale is None else input_scale.dtype)
    if wrong := _differences(tensors, expected):
        raise ConfigError(
            f"what was computed does not fit scheme {scheme.short}: {wrong}",
            hint="quantize the weight with the scheme's own spec, and calibrate what is static",
        )
    return {name: tensors[name] for name in expected}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[QuantizedTensor, InputParams]:
    """What `pack` was given, from the tensors of one module by their names under it.

    Raises `CheckpointError` if a tensor is missing, not the scheme's, or of a wrong dtype or shape.
    """
    spec = scheme.weights
    shape = _weight_shape(tensors, scheme)
    dtype = tensors["input_scale" if "input_scale" in tensors else "weight_scale"].dtype
    if wrong := _differences(tensors, layout(scheme, *shape, dtype)):
        raise CheckpointError(f"not a {scheme.format} weight of scheme {scheme.short}: {wrong}")
    match scheme.format:
        case Format.PACK_QUANTIZED:
            codes = unpack_words(tensors["weight_packed"], spec.bits, shape[1])
        case Format.NVFP4 | Format.MXFP4:
            codes = unpack_nibbles(tensors["weight_packed"])
        case _:
            codes = tensors["weight"]
    zero = tensors.get("weight_zero_point")
    if zero is not None and packs_zero_point(scheme):
        zero = unpack_words(zero.T, spec.bits, scale_shape(spec, *shape)[0]).T.contiguous()
    quantized = QuantizedTensor(spec, shape, codes, tensors["weight_scale"], zero, tensors.get("weight_global_scale"))
    names = ("input_scale", "input_zero_point", "input_global_scale")
    return quantized, InputParams(*(tensors.get(name) for name in names))


def _weight_shape(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    match scheme.format:
        case Format.PACK_QUANTIZED:
            key = "weight_shape"
        case Format.NVFP4 | Format.MXFP4:
            key = "weight_packed"
        case _:
            key = "weight"
    missing = {key, "weight_scale"} - set(tensors)
    if missing:
        raise CheckpointError(f"not a {scheme.format} weight: it has no {' and no '.join(sorted(missing))}")
    if key == "weight_shape":
        rows, columns = (int(size) for size in tensors[key])
        return rows, columns
    rows, columns = tensors[key].shape
    return rows, columns * 2 if key == "weight_packed" else columns


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Spec]) -> str:
    """What is missing, too much or of a wrong dtype or shape; empty if nothing is."""
    found: dict[str, Spec] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return "; ".join(
        f"{name} is {_describe(found.get(name))}, expected {_describe(expected.get(name))}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    )


def _describe(spec: Spec | None) -> str:
    return "absent" if spec is None else f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}"
