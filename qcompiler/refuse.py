"""Which models are not compiled, and why: read off their config and their class, not off a list of names."""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from qcompiler.errors import CaptureError

_RECURRENT = re.compile(r"linear|mamba|recurrent|conv")


def refuse(config: Any) -> None:
    """Raise `CaptureError` for models that are no dense causal decoder with attention: what they are, and the mend."""
    name = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise CaptureError(f"{name}: this model is already quantized", hint="give the original, unquantized model")
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{name} is an encoder-decoder; only decoders are compiled", hint="choose a decoder-only model"
        )
    parts = [key for key, part in vars(config).items() if isinstance(part, PreTrainedConfig)]
    if parts and config.get_text_config() is not config:
        raise CaptureError(
            f"{name} is multimodal or composite ({', '.join(parts)}); only text decoders are compiled",
            hint="save its language model alone, as a causal language model, and compile that",
        )
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is None and not getattr(config, "auto_map", None):
        raise CaptureError(
            f"{name} has no causal language model in Transformers {transformers.__version__}",
            hint="choose a model that AutoModelForCausalLM loads",
        )
    count = getattr(config, "num_hidden_layers", None)
    if isinstance(count, int) and count < 1:
        raise CaptureError(f"{name} with {count} layers", hint="correct num_hidden_layers in config.json")
    layers = sorted(map(str, set(getattr(config, "layer_types", None) or ())))
    recurrent = [kind for kind in layers if _RECURRENT.search(kind)]
    if not recurrent and getattr(cls, "_is_stateful", False):
        # Of a class that can keep a state, a config may still ask for layers of attention alone.
        recurrent = [kind for kind in layers if not kind.endswith("attention")] or ([] if layers else ["all of them"])
    if recurrent:
        raise CaptureError(
            f"{name} has state-space, recurrent or convolutional layers ({', '.join(recurrent)}): not compiled",
            hint="choose a model whose layers are attention and MLP or experts",
        )


def refuse_built(model: PreTrainedModel) -> None:
    """Raise `CaptureError` for a model whose attention sees later tokens: an encoder under a language model's head."""
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise CaptureError(
            f"{type(model).__name__} attends to later tokens too, as an encoder does; only decoders are compiled",
            hint="if it was trained as a decoder, its config.json must say so: `is_decoder: true`",
        )
