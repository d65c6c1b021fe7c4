"""Recipes as people write them for llm-compressor, and what becomes of the linears of a Llama of one layer."""

from __future__ import annotations

from pathlib import Path

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
BLOCK = (*ATTENTION, *MLP)

CORPUS: dict[str, str] = {
    file.stem: file.read_text(encoding="utf-8") for file in sorted((Path(__file__).parent / "corpus").glob("*.yaml"))
} | {
    "flat": "GPTQModifier: {scheme: W4A16, ignore: lm_head}",
    "list": "- SmoothQuantModifier: {smoothing_strength: 0.7}\n- GPTQModifier: {scheme: W8A8, ignore: [lm_head]}",
    "group-alone": "quant_modifiers:\n  QuantizationModifier: {scheme: FP8_BLOCK, ignore: [lm_head]}",
    "json": '{"quant_stage": {"quant_modifiers": {"QuantizationModifier": {"scheme": "MXFP4", "ignore": "lm_head"}}}}',
}
"""Recipes as they are written for llm-compressor, and shorter forms that it does not read."""

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
    "modifiers-that-overlap": dict.fromkeys(ATTENTION, f"{INT8} rtn") | dict.fromkeys(MLP, f"{INT4} gptq"),
    "two-stages": dict.fromkeys(BLOCK, f"{W8A8} rtn") | dict.fromkeys(BEHIND_NORMS, f"{W8A8} smoothquant"),
    "quantize-then-gptq": dict.fromkeys(BLOCK, f"{INT4} gptq"),
    "kv-cache-alone": {},
    "flat": dict.fromkeys(BLOCK, f"{INT4} gptq"),
    "list": dict.fromkeys(BLOCK, f"{W8A8} gptq") | dict.fromkeys(BEHIND_NORMS, f"{W8A8} smoothquant+gptq"),
    "group-alone": dict.fromkeys(BLOCK, "w:fp8/b128x128 a:fp8/g128/dynamic rtn"),
    "json": dict.fromkeys(BLOCK, "w:mxfp4 a:mxfp4 rtn"),
}
"""Scheme and algorithm of every linear that is quantized, by the end of its name."""
