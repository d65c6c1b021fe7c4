"""Recipes as people write them for llm-compressor, and what becomes of the linears of a Llama of one layer."""

from __future__ import annotations

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
BLOCK = (*ATTENTION, *MLP)

CORPUS: dict[str, str] = {
    "w4a16-gptq": """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      scheme: "W4A16"
      targets: ["Linear"]
      dampening_frac: 0.05
      block_size: 64
      sequential_targets: ["LlamaDecoderLayer"]
      offload_hessians: true
""",
    "w8a8-smoothquant-gptq": """
quant_stage:
    quant_modifiers:
        SmoothQuantModifier:
            smoothing_strength: 0.8
        GPTQModifier:
            ignore: ["lm_head"]
            config_groups:
                group_0:
                    weights:
                        num_bits: 8
                        type: "int"
                        symmetric: true
                        strategy: "channel"
                    input_activations:
                        num_bits: 8
                        type: "int"
                        symmetric: true
                        dynamic: true
                        strategy: "token"
                    targets: ["Linear"]
""",
    "awq-asym": """
quant_stage:
  quant_modifiers:
    AWQModifier:
      ignore: ["lm_head"]
      scheme: W4A16_ASYM
      targets: ["Linear"]
      duo_scaling: both
""",
    "awq-mappings": """
quant_stage:
  quant_modifiers:
    AWQModifier:
      mappings:
        - smooth_layer: re:.*input_layernorm
          balance_layers: ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]
        - smooth_layer: re:.*up_proj
          balance_layers: ["re:.*down_proj"]
    QuantizationModifier: {scheme: W4A16_ASYM, targets: [Linear], ignore: [lm_head]}
""",
    "smoothquant-mappings": """
quant_stage:
    quant_modifiers:
        SmoothQuantModifier:
            smoothing_strength: 0.9
            mappings:
                - [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]
                - [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"]
            ignore: ["re:.*post_attention_layernorm", "re:.*(gate|up)_proj"]
        GPTQModifier: {scheme: W8A8, targets: Linear, ignore: [lm_head]}
""",
    "awq-then-quantize": """
default_stage:
  default_modifiers:
    AWQModifier: {requires_calibration_data: true, duo_scaling: false, n_grid: 10}
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: W4A16
      bypass_divisibility_checks: false
      requires_calibration_data: false
""",
    "fp8-dynamic": """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      targets: Linear
      scheme: FP8_DYNAMIC
      ignore: [lm_head, "re:.*mlp.gate$", "re:.*embed_tokens"]
""",
    "fp8-static-kv-cache": """
quant_stage:
    quant_modifiers:
        QuantizationModifier:
            ignore: ["lm_head"]
            config_groups:
                group_0:
                    weights:
                        num_bits: 8
                        type: float
                        strategy: tensor
                        dynamic: false
                        symmetric: true
                    input_activations:
                        num_bits: 8
                        type: float
                        strategy: tensor
                        dynamic: false
                        symmetric: true
                    targets: ["Linear"]
            kv_cache_scheme:
                num_bits: 8
                type: float
                strategy: tensor
                dynamic: false
                symmetric: true
""",
    "nvfp4-config-groups": """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights:
            num_bits: 4
            type: float
            strategy: tensor_group
            group_size: 16
            observer: mse
          input_activations:
            num_bits: 4
            type: float
            strategy: tensor_group
            dynamic: local
            group_size: 16
            observer: static_minmax
""",
    "overlapping-groups": r"""
quant_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        mlp:
          targets: ['re:.*mlp\..*']
          weights: {num_bits: 4, type: int, strategy: group, group_size: 128, symmetric: false}
        down:
          targets: ['re:.*down_proj$']
          weights: {num_bits: 8, type: int, strategy: group, group_size: 128}
        rest:
          targets: [Linear]
          weights: {num_bits: 8, type: int, strategy: channel}
          input_activations: {num_bits: 8, type: int, strategy: token, dynamic: true}
""",
    "presets-by-target": r"""
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      scheme:
        FP8_DYNAMIC: ['re:.*self_attn\..*']
        W4A16: ['re:.*mlp\..*']
""",
    "two-modifiers": r"""
quant_stage:
  attention_modifiers:
    GPTQModifier: {scheme: W8A8, targets: ['re:.*self_attn\..*'], actorder: null}
  mlp_modifiers:
    GPTQModifier: {scheme: W4A16, targets: ['re:.*mlp\..*'], actorder: static}
""",
    "two-stages": """
first_stage:
  run_type: oneshot
  smoothing_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.6}
second_stage:
  quantization_modifiers:
    QuantizationModifier: {scheme: W8A8, ignore: [lm_head]}
""",
    "quantize-then-gptq": """
quant_stage:
  quant_modifiers:
    QuantizationModifier: {scheme: W4A16, ignore: [lm_head]}
    GPTQModifier: {block_size: 256}
""",
    "kv-cache-alone": """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false, observer: static_minmax}
""",
    "flat": "GPTQModifier: {scheme: W4A16, ignore: lm_head}",
    "list": "- SmoothQuantModifier: {smoothing_strength: 0.7}\n- GPTQModifier: {scheme: W8A8, ignore: [lm_head]}",
    "group-alone": "quant_modifiers:\n  QuantizationModifier: {scheme: FP8_BLOCK, ignore: [lm_head]}",
    "json": '{"quant_stage": {"quant_modifiers": {"QuantizationModifier": {"scheme": "MXFP4", "ignore": "lm_head"}}}}',
}

BEHIND_NORMS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

INT4, INT8, W8A8 = "w:int4/g128", "w:int8/g128", "w:int8/channel a:int8/token"

BECOMES: dict[str, dict[str, str]] = {
    "w4a16-gptq": dict.fromkeys(BLOCK, f"{INT4} gptq"),
    "w8a8-smoothquant-gptq": dict.fromkeys(BLOCK, f"{W8A8} gptq")
    | dict.fromkeys(BEHIND_NORMS, f"{W8A8} smoothquant+gptq"),
    "awq-asym": dict.fromkeys(BLOCK, f"{INT4}/asym awq"),
    "awq-mappings": dict.fromkeys(BLOCK, f"{INT4}/asym rtn")
    | dict.fromkeys(("q_proj", "k_proj", "v_proj", "down_proj"), f"{INT4}/asym awq"),
    "smoothquant-mappings": dict.fromkeys(BLOCK, f"{W8A8} gptq")
    | dict.fromkeys(("q_proj", "k_proj", "v_proj"), f"{W8A8} smoothquant+gptq"),
    "awq-then-quantize": dict.fromkeys(BLOCK, f"{INT4} awq"),
    "fp8-dynamic": dict.fromkeys(BLOCK, "w:fp8/channel a:fp8/token rtn"),
    "fp8-static-kv-cache": dict.fromkeys(BLOCK, "w:fp8/tensor a:fp8/tensor rtn"),
    "nvfp4-config-groups": dict.fromkeys(BLOCK, "w:nvfp4 a:nvfp4 rtn"),
    "overlapping-groups": dict.fromkeys(ATTENTION, f"{W8A8} gptq") | dict.fromkeys(MLP, f"{INT4}/asym gptq"),
    "presets-by-target": dict.fromkeys(ATTENTION, "w:fp8/channel a:fp8/token rtn") | dict.fromkeys(MLP, f"{INT4} rtn"),
    "two-modifiers": dict.fromkeys(ATTENTION, f"{W8A8} gptq") | dict.fromkeys(MLP, f"{INT4} gptq"),
    "two-stages": dict.fromkeys(BLOCK, f"{W8A8} rtn") | dict.fromkeys(BEHIND_NORMS, f"{W8A8} smoothquant"),
    "quantize-then-gptq": dict.fromkeys(BLOCK, f"{INT4} gptq"),
    "kv-cache-alone": {},
    "flat": dict.fromkeys(BLOCK, f"{INT4} gptq"),
    "list": dict.fromkeys(BLOCK, f"{W8A8} gptq") | dict.fromkeys(BEHIND_NORMS, f"{W8A8} smoothquant+gptq"),
    "group-alone": dict.fromkeys(BLOCK, "w:fp8/b128x128 a:fp8/g128/dynamic rtn"),
    "json": dict.fromkeys(BLOCK, "w:mxfp4 a:mxfp4 rtn"),
}
"""Scheme and algorithm of every linear that is quantized, by the end of its name."""
