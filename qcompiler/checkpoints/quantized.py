"""Checkpoints that are quantized already, though their config does not say so: told by file names and headers alone.

Codes that are read as weights compile without an error, and to garbage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qcompiler.checkpoints.conversions import Conversion
from qcompiler.checkpoints.reader import TensorSource
from qcompiler.errors import CheckpointError

DESCRIPTIONS = ("hf_quant_config.json", "quantization_config.json", "quant_config.json", "quantize_config.json")
"""How ModelOpt, AutoAWQ, AutoGPTQ and others describe a quantization outside of config.json."""

# The last part of a key beside quantized weights: compressed-tensors, ModelOpt, fine-grained FP8, bitsandbytes, GPTQ,
# AWQ, HQQ, quanto, torchao.
_BESIDE_CODES = re.compile(
    r"(.*_)?(scales?(_inv|_\d+)?|zero_points?|q?zeros?|SCB|absmax|qweight|qdata|packed|W_q|g_idx|codebooks?)"
)
_HINT = "give the dense model: the original, which was not quantized"


def refuse_described(folder: Path) -> None:
    """Raise `CheckpointError` for a folder with another tool's description of a quantization."""
    for name in DESCRIPTIONS:
        if (folder / name).exists():
            raise CheckpointError(f"{folder / name}: the checkpoint is already quantized", hint=_HINT)


def refuse_codes(model: PreTrainedModel, source: TensorSource, conversions: Iterable[Conversion]) -> None:
    """Raise `CheckpointError` where a floating-point parameter is read from integers, or from floats of 8 bits."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for conversion in conversions:
        parameter = parameters.get(conversion.name)
        if parameter is None or not parameter.is_floating_point():
            continue
        for meta in map(source.meta, conversion.sources):
            if not is_dense(meta.dtype):
                raise CheckpointError(
                    f"{meta.file}: {meta.key!r} is stored as {str(meta.dtype).removeprefix('torch.')}, and the model "
                    f"computes with {str(parameter.dtype).removeprefix('torch.')}: the checkpoint is already quantized",
                    hint=_HINT,
                )


def refuse_scales(
    model: PreTrainedModel, source: TensorSource, conversions: Iterable[Conversion], unexpected: Sequence[str]
) -> None:
    """Raise `CheckpointError` where an unexpected key is a scale, zero point or the like of one of the weights."""
    known = {name for name, _ in model.named_buffers()}  # what is computed now may have been stored once
    weights = set(_weights(model, source, conversions))
    for key in unexpected:
        owner, _, last = key.rpartition(".")
        if owner in weights and _BESIDE_CODES.fullmatch(last) and key not in known:
            raise CheckpointError(
                f"{source.meta(key).file}: {key!r} belongs to quantized weights: the checkpoint is already quantized",
                hint=_HINT,
            )


def is_dense(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are numbers by themselves: floats of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _weights(model: PreTrainedModel, source: TensorSource, conversions: Iterable[Conversion]) -> Iterator[str]:
    """Names of matrices, in the model (with and without its prefix) and on disk, and of the modules that hold them."""
    paths = [path for path, value in model.state_dict().items() if value.ndim > 1]
    bare = [path.removeprefix(f"{model.base_model_prefix}.") for path in paths]
    metas = (source.meta(key) for conversion in conversions for key in conversion.sources)
    for name in (*paths, *bare, *(meta.key for meta in metas if len(meta.shape) > 1)):
        yield name
        yield name.rpartition(".")[0]
