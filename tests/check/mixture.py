"""A mixture of experts whose experts are quantized, as llm-compressor writes it: our compiler leaves experts dense."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from tests.check.checkpoints import Edited
from tests.compile.tiny import model_config, save_tiny, stored

_LINEAR = re.compile(r"(.*\.(?:[qkvo]_proj|experts\.\d+\.\w+))\.weight")
GROUP = 16


def mixture(folder: Path) -> Edited:
    """A tiny Mixtral of one layer: every linear in int4 groups, written by compressed-tensors' own compressor."""
    save_tiny(folder, "mixtral", layers=1)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP),
        format="pack-quantized",
    )
    tensors: dict[str, Tensor] = {}
    for key, weight in stored(folder).items():
        match = _LINEAR.fullmatch(key)
        tensors |= {key: weight} if match is None else compress(match[1], weight, scheme)
    routers = [key.removesuffix(".weight") for key in tensors if key.endswith("gate.weight")]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head", *routers],
    )
    return Edited({**model_config(folder), "quantization_config": config.model_dump(mode="json")}, tensors)


def compress(name: str, weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """A weight [O, I] in groups, by the library's compressor, under its names on disk."""
    assert scheme.weights is not None
    grouped = weight.unflatten(1, (-1, GROUP))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
    packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    return {f"{name}.{part}": tensor for part, tensor in packed.items() if part != "weight_zero_point"}
