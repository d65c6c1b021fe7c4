"""Every causal-LM class of the installed Transformers, each with a config small enough to run.

A class that is not the decoder this project compiles is left out for a stated reason, which is read off its config.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qcompiler.capture.twin import shrink

# fmt: off
FAMILIES = (
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "mistral", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "llama4_text",
    "granite", "olmo2", "gpt2", "opt", "falcon", "smollm3", "cohere2",
)
# fmt: on
"""The model types that must work."""

# Default configs that Transformers itself cannot build or run: what the class needs said, as its checkpoints say it.
_UNSAID: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_theta": 10000.0, "mrope_section": [24, 20, 20]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    **{
        name: {
            "text_encoder": {"model_type": "t5"},
            "audio_encoder": {"model_type": "encodec"},
            "decoder": {"model_type": f"{name}_decoder"},
        }
        for name in ("musicgen", "musicgen_melody")
    },
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}

# Twins that need many layers to show every kind, cut to a few that still do.
_SHORT: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0],
        "intermediate_size": 16384,
    },
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-40b": (
        "falcon",
        {"new_decoder_architecture": True, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8},
    ),
    "falcon-11b": (
        "falcon",
        {
            "new_decoder_architecture": True,
            "hidden_size": 4096,
            "ffn_hidden_size": 16384,
            "num_attention_heads": 32,
            "num_kv_heads": 8,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon-rw-1b": (
        "falcon",
        {
            "alibi": True,
            "bias": True,
            "hidden_size": 2048,
            "multi_query": False,
            "num_attention_heads": 32,
            "parallel_attn": False,
        },
    ),
}
"""Checkpoints whose graph is another than that of their class's default config, and what their configs say."""

_RECURRENT_ENTRY = re.compile(r"\w*(mamba|ssm|conv|lru_width|state_size)\w*|linear_(num_\w+)?heads")
_RECURRENT_LAYER = re.compile(r"linear_attention|conv|mamba|recurrent")


def causal_lm_classes() -> list[tuple[str, str]]:
    """(model type, class name) of everything that `AutoModelForCausalLM` maps."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())


def left_out(model_type: str) -> str | None:
    """Why the class of `model_type` is not a causal text decoder with attention; `None` when it is one."""
    cls = CONFIG_MAPPING[model_type]
    parts = [name for name, part in cls.sub_configs.items() if _is_model(part)]
    if parts:
        return f"composite: {', '.join(parts)}"
    config = cls()
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        return "no attention: it has no attention heads"
    if mixers := [key for key in config.to_dict() if _RECURRENT_ENTRY.fullmatch(key)]:
        return f"recurrent or convolutional mixers: {', '.join(mixers)}"
    if mixers := sorted({t for t in getattr(config, "layer_types", None) or () if _RECURRENT_LAYER.search(t)}):
        return f"recurrent or convolutional layers: {', '.join(mixers)}"
    return None


def default_config(model_type: str, **said: Any) -> PreTrainedConfig:
    """The default config of `model_type`, of its real size, as a decoder. `said`: what it says differently."""
    said = {**_UNSAID.get(model_type, {}), **said}
    cls = CONFIG_MAPPING[model_type]
    if hasattr(cls, "is_decoder"):
        said["is_decoder"] = True  # encoders that can also decode are bidirectional by default
    if hasattr(cls, "causal"):
        said["causal"] = True
    return cls(**said)


def tiny_config(model_type: str, *, layers: int | None = None) -> PreTrainedConfig:
    """The default config of `model_type`, or the config of a variant, short and shrunk. `layers` as in `shrink`."""
    model_type, said = VARIANTS.get(model_type, (model_type, _SHORT.get(model_type, {})))
    return shrink(default_config(model_type, **said), layers=layers)


def _is_model(part: type[PreTrainedConfig]) -> bool:
    """Whether a config's part is a model of its own, and not a group of settings."""
    return part.__name__ == "AutoConfig" or hasattr(part, "num_hidden_layers")
