"""Tiny random models of many families, and how Transformers itself loads and saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": _MOE,
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "deepseek_v3": _MLA,
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "granite": {},
    "granitemoe": {"num_local_experts": 3},
    "olmo2": {},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {},
    "smollm3": {},
    "cohere2": {"head_dim": 8},
    "glm4_moe": {**_MLA, "num_key_value_heads": 2},
    "hrm_text": {},
}
"""Families whose checkpoints differ in naming: plain, fused, tied, prefixed, with merged experts or chunked tensors."""


def _randomize(model: PreTrainedModel) -> None:
    """Give every parameter values of its own: zeros and ones would hide a swap."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn, where a test does not name its own."""
    name: str = request.param
    return name


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(family, dtype=..., **config)`: a random model with distinct values everywhere."""

    def make(family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
        config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **overrides})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _randomize(model)
        return model.eval()

    return make


@pytest.fixture
def loaded() -> Callable[[Path], tuple[PreTrainedModel, dict[str, Any]]]:
    """`loaded(folder)`: the model as `from_pretrained` loads it, and its loading info."""

    def load(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        return model, info

    return load


@pytest.fixture
def on_meta() -> Callable[[Path], PreTrainedModel]:
    """`on_meta(folder)`: the model that config.json describes, without memory, in the dtype of its checkpoint."""

    def build(folder: Path) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=config.dtype)

    return build
