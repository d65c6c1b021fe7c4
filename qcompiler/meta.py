"""Models on the meta device: every module and shape, and no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qcompiler.errors import ModelConfigError, SizeError
from qcompiler.limits import modules_bounded


def build_on_meta(config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, in eval mode on the meta device.

    Raises `ModelConfigError` where Transformers does not build it, `SizeError` where it has too many modules.
    """
    try:
        with torch.device("meta"), modules_bounded(config.model_type):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except SizeError:
        raise
    except Exception as error:
        wrong = "the code that the model brings" if getattr(config, "auto_map", None) else "config.json"
        said = str(error).partition("\nException raised from")[0]  # no stack of C++ functions
        raise ModelConfigError(
            f"{config.model_type}: the model cannot be built from its config: {type(error).__name__}: {said}",
            hint=f"correct {wrong}: Transformers itself does not build it",
        ) from error
    _all_on_meta(model)
    model.eval()
    return model


def _all_on_meta(model: PreTrainedModel) -> None:
    """Move what a class insists on making elsewhere (`torch.FloatTensor(...)` knows no default device)."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                meta = nn.Parameter(parameter.to("meta"), requires_grad=False)
                module._parameters[name] = moved.setdefault(id(parameter), meta)
