"""Twins of every causal-LM class, and of the configs of real checkpoints."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qcompiler.capture.twin import build_twin, shrink
from qcompiler.errors import CaptureError, ConfigError
from tests.capture.real_configs import REAL, real
from tests.zoo import FAMILIES, causal_lm_classes, default_config, left_out, tiny_config

LEFT_OUT = {model_type: left_out(model_type) for model_type, _ in causal_lm_classes()}
DECODERS = [model_type for model_type, reason in LEFT_OUT.items() if reason is None]


def logits(model: PreTrainedModel, *, tokens: int = 9) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1))
    out: torch.Tensor = model(ids, use_cache=False).logits
    return out


def check_runs(config: PreTrainedConfig) -> PreTrainedModel:
    """What must hold of every twin."""
    before = config.to_dict()
    small = shrink(config)
    assert config.to_dict() == before, "the real config was changed"
    assert shrink(small).to_dict() == small.to_dict(), "a twin's twin is another"
    small.validate()
    model = build_twin(config)
    assert type(model.config) is type(config)
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
    with torch.no_grad():
        out = logits(model)
    assert out.shape == (2, 9, small.vocab_size)
    assert out.isfinite().all()
    assert out.std() > 0.01
    return model


@pytest.mark.parametrize("model_type", DECODERS)
def test_twin_of_every_decoder_runs(model_type: str) -> None:
    check_runs(default_config(model_type))


@pytest.mark.parametrize("name", REAL)
def test_twin_of_a_real_checkpoint_runs(name: str) -> None:
    model = check_runs(real(name))
    assert model.config.num_hidden_layers == REAL[name][1]


# --- the same graph ---------------------------------------------------------------------------------------------------


def structure(model: torch.nn.Module, layers: int) -> dict[str, str]:
    """Module paths and kinds, and parameters, of all but the decoder layers after the first `layers`."""
    parts = {name: type(module).__name__ for name, module in model.named_modules()}
    parts |= {name: f"parameter of {parameter.dim()} dimensions" for name, parameter in model.named_parameters()}
    layer = re.compile(r"\.(\d+)(\.|$)")
    return {name: kind for name, kind in parts.items() if not (m := layer.search(name)) or int(m[1]) < layers}


def check_same_structure(config: PreTrainedConfig) -> None:
    twin = build_twin(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = twin.config.num_hidden_layers
    assert structure(twin, layers) == structure(model, layers)
    assert twin.config.tie_word_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize("model_type", FAMILIES)
def test_twin_has_the_modules_of_the_real_models_first_layers(model_type: str) -> None:
    check_same_structure(default_config(model_type))


@pytest.mark.parametrize("name", REAL)
def test_twin_has_the_modules_of_the_real_checkpoints_first_layers(name: str) -> None:
    check_same_structure(real(name))


@pytest.mark.parametrize("name", REAL)
def test_ratios_and_relations_survive(name: str) -> None:
    config, twin = real(name), shrink(real(name))

    def heads(c: PreTrainedConfig) -> tuple[int, int, int]:
        dim = getattr(c, "v_head_dim", None) or getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return c.num_attention_heads, c.num_key_value_heads, c.num_attention_heads * dim

    (count, kv, width), (tiny_count, tiny_kv, tiny_width) = heads(config), heads(twin)
    assert (tiny_count > tiny_kv) == (count > kv)
    assert tiny_count % tiny_kv == 0
    assert (config.hidden_size > width, config.hidden_size < width) == (
        twin.hidden_size > tiny_width,
        twin.hidden_size < tiny_width,
    )
    assert (twin.intermediate_size == twin.hidden_size) == (config.intermediate_size == config.hidden_size)


def test_deepseek_keeps_latent_attention_and_grouped_routing() -> None:
    twin = shrink(real("DeepSeek-V3"))
    assert twin.qk_head_dim == twin.qk_nope_head_dim + twin.qk_rope_head_dim
    assert 1 < twin.topk_group < twin.n_group
    assert twin.n_routed_experts % twin.n_group == 0
    assert twin.num_experts_per_tok < twin.topk_group * (twin.n_routed_experts // twin.n_group)
    assert twin.first_k_dense_replace == 3
    assert not hasattr(twin, "quantization_config")


def test_layer_lists_and_index_lists_are_cut_to_the_prefix() -> None:
    config = real("Llama-4-Scout")
    config.moe_layers = list(range(1, 48, 2))
    twin = shrink(config, layers=6)
    assert twin.num_hidden_layers == 6
    assert twin.layer_types == config.layer_types[:6]
    assert twin.no_rope_layers == config.no_rope_layers[:6]
    assert twin.moe_layers == [1, 3, 5]


@pytest.mark.parametrize(("layers", "shared"), [(None, 1), (2, 0), (25, 5)])
def test_layers_that_share_keys_and_values_stay_the_same_layers(layers: int | None, shared: int) -> None:
    config = default_config("gemma3n_text")  # 35 layers, the last 15 share
    assert shrink(config, layers=layers).num_kv_shared_layers == shared


def test_entries_that_single_layers_override_shrink_with_the_rest() -> None:
    twin = shrink(default_config("gemma4_text"))  # the sixth layer's heads are twice as wide
    assert [layer.head_dim for layer in twin.per_layer_config] == [16] * 5 + [32]
    assert shrink(twin, layers=2).per_layer_attributes == set()


def test_longrope_factors_follow_the_rotary_size() -> None:
    config = real("Phi-3-medium-128k")
    rope = shrink(config).rope_parameters
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == 8
    assert (rope["long_factor"][0], rope["long_factor"][-1]) == (1.0, 64.0)
    assert rope["original_max_position_embeddings"] == 4096


def test_rotary_sections_still_fill_the_rotary_size() -> None:
    config = default_config("cohere_compass_text")
    assert 2 * sum(config.rope_parameters["full_attention"]["mrope_section"]) == config.head_dim
    twin = shrink(config)
    assert twin.rope_parameters["full_attention"]["mrope_section"] == [3, 3, 2]
    assert twin.head_dim == 16


def test_chosen_implementations_stay_chosen() -> None:
    config = default_config("mixtral")
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    twin = build_twin(config).config
    assert (twin._attn_implementation, twin._experts_implementation) == ("eager", "batched_mm")


def test_special_tokens_stay_distinct_and_inside_the_vocabulary() -> None:
    twin = shrink(real("Llama-3.1-8B"))
    ids = [twin.bos_token_id, *twin.eos_token_id]
    assert len(set(ids)) == 4
    assert all(0 <= i < twin.vocab_size for i in ids)


# --- what a wrong graph would show ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_changes_the_logits(model_type: str) -> None:
    model = build_twin(tiny_config(model_type))
    out = logits(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), parameters, allow_unused=True)
    idle = {name for name, g in zip(names, gradients, strict=True) if g is None or g.abs().max() < 1e-6}
    if model_type == "opt":  # a constant added to all keys cancels in the softmax, unless they are rotated
        idle = {name for name in idle if not name.endswith("k_proj.bias")}
    assert not idle


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_vector_is_all_ones_or_all_zeros(model_type: str) -> None:
    for name, vector in build_twin(tiny_config(model_type)).named_parameters():
        assert vector.numel() == 1 or vector.std() > 0.01, name


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_the_routers_correction_changes_the_logits(model_type: str) -> None:
    model = build_twin(tiny_config(model_type))
    with torch.no_grad():
        before = logits(model)
        corrections = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for correction in corrections:
            correction.zero_()
        assert corrections
        assert not torch.allclose(before, logits(model))


@pytest.mark.parametrize(
    ("model_type", "entry"),
    [
        ("mistral", "sliding_window"),
        ("gemma2", "sliding_window"),
        ("gemma3_text", "sliding_window"),
        ("cohere2", "sliding_window"),
        ("gpt_oss", "sliding_window"),
        ("llama4_text", "attention_chunk_size"),
        ("llama4_text", "floor_scale"),
    ],
)
def test_a_short_sequence_crosses_the_window(model_type: str, entry: str) -> None:
    twin = build_twin(tiny_config(model_type))
    wide = shrink(twin.config)
    setattr(wide, entry, 4096)
    other = AutoModelForCausalLM.from_config(wide).eval()
    other.load_state_dict(twin.state_dict())
    with torch.no_grad():
        assert not torch.allclose(logits(twin), logits(other), atol=1e-4)


def test_seeds_decide_the_weights_and_leave_the_global_generator_alone() -> None:
    config = tiny_config("llama")
    state = torch.get_rng_state()
    one, same, other = (build_twin(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_twin_takes_the_dtype_and_evaluates() -> None:
    model = build_twin(tiny_config("gemma2"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


# --- what is refused, and what is left out ----------------------------------------------------------------------------


def test_all_families_are_in_the_zoo() -> None:
    assert set(FAMILIES) <= set(DECODERS)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bart", "encoder-decoder"),
        ("gemma3", "composite: text_config, vision_config"),
        ("musicgen", "composite: text_encoder, audio_encoder, decoder"),
        ("mamba", "no attention"),
        ("jamba", "recurrent"),
        ("qwen3_next", "recurrent"),
        ("minimax", "recurrent or convolutional layers: linear_attention"),
    ],
)
def test_left_out_classes_state_their_reason(model_type: str, reason: str) -> None:
    assert str(LEFT_OUT[model_type]).startswith(reason)


def test_composite_and_encoder_decoder_configs_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"it has text_config, vision_config[\s\S]*hint: take its decoder's"):
        shrink(CONFIG_MAPPING["gemma3"]())
    with pytest.raises(CaptureError, match="BartConfig is not the config of one decoder"):
        shrink(CONFIG_MAPPING["bart"]())


def test_layers_below_one_are_refused_and_above_the_depth_mean_all() -> None:
    config = tiny_config("llama")
    with pytest.raises(ConfigError, match="a twin of 0 layers"):
        shrink(config, layers=0)
    assert shrink(config, layers=1).num_hidden_layers == 1
    assert shrink(config, layers=99).num_hidden_layers == config.num_hidden_layers


def test_a_config_its_class_cannot_build_is_named() -> None:
    with pytest.raises(CaptureError, match=r"no tiny model of Dots1Config: TypeError[\s\S]*hint: load the weights"):
        build_twin(CONFIG_MAPPING["dots1"]())
