"""Traps of what the config says of numbers: of its groups, their formats, expressions, and the KV cache."""

from __future__ import annotations

import torch

from tests.check.checkpoints import DOWN, GATE, LAYER, Edited
from tests.check.traps import TRAPS, named, trap

__all__ = ["TRAPS"]  # these, and those of `tests.check.traps`


@trap("packed", "group-invalid", loaders=("transformers",))
def an_unknown_key_in_a_group(edited: Edited) -> None:
    edited.group()["comment"] = "four bits"


@trap("packed", "group-invalid")
def an_unknown_key_in_its_numbers(edited: Edited) -> None:
    edited.group()["weights"]["comment"] = "four bits"


@trap("packed", "group-invalid")
def weights_of_no_bits(edited: Edited) -> None:
    edited.group()["weights"]["num_bits"] = 0


@trap("mixed", "group-invalid")
def activations_per_token_that_are_static(edited: Edited) -> None:
    edited.group("group_1")["input_activations"] |= {"strategy": "token", "dynamic": "local"}


@trap("mixed", "group-invalid", also=("stored-quantized",))
def activations_without_weights(edited: Edited) -> None:
    edited.group("group_1")["weights"] = None


@trap("mixed", "stored-quantized", DOWN, also=("group-invalid",))
def a_group_of_nothing_that_takes_quantized_layers(edited: Edited) -> None:
    edited.group("group_1").update(weights=None, input_activations=None)


@trap("packed", "group-invalid", loaders=("vllm", "sglang"))
def a_group_of_nothing_that_takes_a_dense_layer(edited: Edited) -> None:
    edited.groups["group_1"] = {"targets": ["lm_head"], "weights": None}
    edited.quantization["ignore"] = []


@trap("channel", "format-unread")
def floats_of_four_bits_that_are_not_packed(edited: Edited) -> None:
    edited.group()["weights"]["num_bits"] = 4


@trap("nvfp4", "format-unread", loaders=("vllm", "sglang"), also=("tensor-shape",))
def nvfp4_of_wide_groups_to_vllm(edited: Edited) -> None:
    edited.group()["weights"]["group_size"] = 32


@trap("nvfp4", "tensor-unexpected", DOWN, ("transformers",), also=("format-unread",))
def nvfp4_without_its_global_scale(edited: Edited) -> None:
    edited.group()["weights"]["strategy"] = "group"


@trap("channel", "tensor-missing", DOWN, ("transformers",), also=("format-unread",))
def floats_that_the_config_calls_asymmetric(edited: Edited) -> None:
    edited.group()["weights"]["symmetric"] = False


@trap("packed", "tensor-shape", DOWN, ("transformers",), also=("format-unread",))
def codes_of_one_bit(edited: Edited) -> None:
    edited.group()["weights"]["num_bits"] = 1


@trap("channel", "group-invalid", loaders=("vllm", "sglang"))
def a_preset_by_its_name(edited: Edited) -> None:
    edited.quantization["config_groups"] = {"FP8_DYNAMIC": edited.group()["targets"]}


@trap("packed", "target-invalid", also=("stored-quantized", "target-missing"))
def a_target_that_is_no_expression(edited: Edited) -> None:
    edited.group()["targets"] = [*named("q", "k", "v", "o", "gate", "up"), "re:*.down_proj"]


@trap("packed", "target-invalid", loaders=("transformers", "sglang"))
def a_flag_where_only_vllm_takes_one(edited: Edited) -> None:
    edited.group()["targets"] = ["re:.*(?i)PROJ$"]


@trap("packed", "target-invalid", loaders=("vllm",))
def braces_that_only_vllm_takes_for_errors(edited: Edited) -> None:
    edited.group()["targets"].append("re:{e}")


@trap("packed", "loaders-disagree", DOWN, ("transformers",), also=("target-missing",))
def a_class_that_only_vllm_knows(edited: Edited) -> None:
    edited.group()["targets"] = ["re:.*[[:lower:]]_proj$"]


@trap("packed", "loaders-disagree", DOWN, ("vllm",))
def braces_that_vllm_takes_for_errors(edited: Edited) -> None:
    edited.quantization["ignore"].append("re:.*(?:dowm){e<=1}")


@trap("packed", "cache-invalid")
def an_integer_cache(edited: Edited) -> None:
    edited.quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}


@trap("channel", "cache-scale-missing", f"{LAYER}.self_attn.k_scale")
def a_cache_scale_that_is_missing(edited: Edited) -> None:
    del edited.tensors[f"{LAYER}.self_attn.k_scale"]


@trap("channel", "cache-scale-form", f"{LAYER}.self_attn.k_scale")
def a_cache_scale_of_another_shape(edited: Edited) -> None:
    edited.change(f"{LAYER}.self_attn.k_scale", lambda scale: scale.repeat(2))


@trap("channel", "cache-scale-form", f"{LAYER}.self_attn.k_scale", ("vllm", "sglang"))
def one_cache_scale_where_each_head_should_have_one(edited: Edited) -> None:
    edited.quantization["kv_cache_scheme"]["strategy"] = "attn_head"


@trap("channel", "cache-scale-form", f"{LAYER}.self_attn.v_scale")
def a_cache_scale_of_integers(edited: Edited) -> None:
    edited.change(f"{LAYER}.self_attn.v_scale", lambda scale: scale.to(torch.int8))


@trap("channel", "global-scale-zero", f"{LAYER}.self_attn.k_scale")
def a_cache_scale_of_zero(edited: Edited) -> None:
    edited.change(f"{LAYER}.self_attn.k_scale", torch.zeros_like)


@trap("packed", "format-unread", loaders=("vllm",), also=("format-disagrees",))
def packed_weights_called_integers(edited: Edited) -> None:
    edited.quantization["format"] = edited.group()["format"] = "int-quantized"


@trap("channel", "format-unread", loaders=("vllm",), also=("format-disagrees",))
def floats_called_packed(edited: Edited) -> None:
    edited.quantization["format"] = edited.group()["format"] = "pack-quantized"


@trap("mixed", "format-disagrees", GATE, also=("format-unread",))
def eight_bits_called_packed(edited: Edited) -> None:
    edited.group("group_1")["format"] = "pack-quantized"


@trap("packed", "format-disagrees", DOWN, ("vllm", "sglang"), also=("format-unread",))
def a_common_format_that_transformers_does_not_look_at(edited: Edited) -> None:
    edited.quantization["format"] = "int-quantized"
    del edited.group()["format"]


@trap("mixed", "format-disagrees", DOWN, ("transformers",))
def a_format_that_only_says_to_vllm_that_activations_are_quantized(edited: Edited) -> None:
    edited.group("group_1")["format"] = "nvfp4-pack-quantized"


@trap("mxfp8", "format-disagrees", loaders=("transformers",))
def mx_called_plain_floats(edited: Edited) -> None:
    edited.quantization["format"] = edited.group()["format"] = "float-quantized"


@trap("nvfp4", "format-disagrees", loaders=("transformers",))
def nvfp4_called_mxfp4(edited: Edited) -> None:
    edited.quantization["format"] = edited.group()["format"] = "mxfp4-pack-quantized"


@trap("mxfp8", "scale-dtype-missing", loaders=("vllm", "transformers"), also=("tensor-dtype",))
def mx_without_the_dtype_of_its_scales(edited: Edited) -> None:
    del edited.group()["weights"]["scale_dtype"]
