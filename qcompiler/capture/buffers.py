"""Values of the buffers that no checkpoint holds, such as rotary frequencies."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qcompiler.errors import CaptureError
from qcompiler.limits import check_bytes


def non_persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The non-persistent buffers of a model, by path, on the CPU.

    A model on the meta device has none to copy, so they are computed as `from_pretrained` computes them: by the
    model's own `_init_weights`, on a copy of each module that owns one. Raises `CaptureError` where that leaves a
    buffer unset (found by starting from two different fillings), `SizeError` where they would be too large.
    """
    check_bytes(f"what {type(model).__name__} has in no checkpoint", _unstored(model))
    found: dict[str, Tensor] = {}
    owner: PreTrainedModel = model
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owner = module
        names = sorted(module._non_persistent_buffers_set & {k for k, b in module._buffers.items() if b is not None})
        if not names:
            continue
        if all(getattr(module, name).device.type != "meta" for name in names):
            found |= {f"{path}.{name}": getattr(module, name).cpu() for name in names}
            continue
        first, second = (_initialized(owner, module, names, fill) for fill in (0, 1))
        for name in names:
            if not torch.equal(first[name], second[name]):
                raise CaptureError(
                    f"buffer {path}.{name} is in no checkpoint, and {type(owner).__name__}._init_weights does not set "
                    "it",
                    hint="pass the loaded model itself instead of its folder",
                )
        found |= {f"{path}.{name}": tensor for name, tensor in first.items()}
    return found


def _unstored(model: PreTrainedModel) -> Iterator[Tensor]:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                yield buffer


def _initialized(owner: PreTrainedModel, module: nn.Module, names: list[str], fill: int) -> dict[str, Tensor]:
    twin = copy.copy(module)
    twin._buffers = dict(module._buffers)
    twin.__dict__.pop("_is_hf_initialized", None)
    for name in names:
        meta = module._buffers[name]
        assert meta is not None
        twin._buffers[name] = torch.full(meta.shape, fill, dtype=meta.dtype)
    with torch.no_grad():
        owner._init_weights(twin)
    return {name: tensor for name in names if (tensor := twin._buffers[name]) is not None}
