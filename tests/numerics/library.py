"""compressed-tensors as the oracle: our specs as its arguments."""

from __future__ import annotations

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from qcompiler.scheme import QuantSpec, Scheme


def library_args(spec: QuantSpec) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=spec.bits,
        type=spec.type,
        symmetric=spec.symmetric,
        strategy=str(spec.strategy),
        group_size=spec.group_size,
        block_structure=list(spec.block_structure) if spec.block_structure else None,
        dynamic=spec.dynamic,
        scale_dtype=getattr(torch, spec.scale_dtype) if spec.scale_dtype else None,
    )


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    inputs = scheme.input_activations
    return QuantizationScheme(
        targets=["Linear"],
        weights=library_args(scheme.weights),
        input_activations=library_args(inputs) if inputs else None,
    )


def library_decompress(tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    weight: Tensor = compressor.decompress(tensors, library_scheme(scheme))["weight"]
    return weight
