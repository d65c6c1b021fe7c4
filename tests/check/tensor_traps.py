"""Traps of tensors: missing, foreign, of other dtypes and shapes; of their values; and of experts."""

from __future__ import annotations

import torch

from qcompiler.formats.bits import unpack_words
from tests.check.checkpoints import DOWN, GATE, GATE_UP, LAYER, OUTPUT, QUERY, UP, Edited
from tests.check.number_traps import TRAPS
from tests.check.traps import EXPERTS, VLLM_LIKE, give_zero_points, make_dense, named, trap

__all__ = ["TRAPS"]  # all: these, those of `tests.check.number_traps`, and of `tests.check.traps`

# --- tensors --------------------------------------------------------------------------------------------------------


@trap("packed", "zero-point-unexpected", DOWN, ("vllm", "sglang"))
def zero_points_of_a_symmetric_layer(edited: Edited) -> None:
    give_zero_points(edited, DOWN)


@trap("packed", "zero-point-unexpected", DOWN)
def zero_points_that_mean_something_of_a_symmetric_layer(edited: Edited) -> None:
    give_zero_points(edited, DOWN)
    edited.change(f"{DOWN}.weight_zero_point", lambda words: words + 1)


@trap("channel", "zero-point-unexpected", DOWN, ("vllm", "sglang"))
def zero_points_of_words_that_no_format_packs(edited: Edited) -> None:
    zeros = torch.zeros_like(edited.tensors[f"{DOWN}.weight_scale"], dtype=torch.int32)
    edited.tensors[f"{DOWN}.weight_zero_point"] = zeros


@trap("mixed", "tensor-unexpected", DOWN)
def an_activation_zero_point_that_means_something_of_symmetric_activations(edited: Edited) -> None:
    edited.tensors[f"{DOWN}.input_zero_point"] = torch.tensor([3], dtype=torch.int8)


@trap("mixed", "tensor-unexpected", DOWN, ("vllm", "sglang"))
def an_activation_zero_point_of_zero_of_symmetric_activations(edited: Edited) -> None:
    edited.tensors[f"{DOWN}.input_zero_point"] = torch.tensor([0], dtype=torch.int8)


@trap("channel", "scale-one-dimensional", DOWN)
def channel_scales_of_one_dimension(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale.flatten())


@trap("packed", "tensor-missing", DOWN, ("transformers",))
def no_weight_shape(edited: Edited) -> None:
    del edited.tensors[f"{DOWN}.weight_shape"]


@trap("packed", "weight-shape-wrong", DOWN, ("transformers",))
def a_wrong_weight_shape(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_shape", lambda shape: shape - 8)


@trap("odd-bits", "words-padded", DOWN)
def three_bits_that_do_not_straddle_words(edited: Edited) -> None:
    codes = unpack_words(edited.tensors[f"{DOWN}.weight_packed"], 3, 176).long() + 4
    lanes = torch.nn.functional.pad(codes, (0, -176 % 10)).unflatten(1, (-1, 10))
    edited.tensors[f"{DOWN}.weight_packed"] = (lanes << torch.arange(0, 30, 3)).sum(-1).to(torch.int32)


@trap("packed", "order-tensor", DOWN)
def an_order_of_activations(edited: Edited) -> None:
    edited.tensors[f"{DOWN}.weight_g_idx"] = torch.zeros(176, dtype=torch.int32)


@trap("packed", "tensor-missing", DOWN)
def a_missing_scale(edited: Edited) -> None:
    del edited.tensors[f"{DOWN}.weight_scale"]


@trap("packed", "tensor-missing", "model.norm.weight")
def a_missing_norm(edited: Edited) -> None:
    del edited.tensors["model.norm.weight"]


@trap("mixed", "tensor-missing", DOWN)
def a_missing_activation_scale(edited: Edited) -> None:
    del edited.tensors[f"{DOWN}.input_scale"]


@trap("packed", "tensor-unexpected", DOWN, ("vllm", "sglang"))
def an_activation_scale_of_a_weight_only_layer(edited: Edited) -> None:
    edited.tensors[f"{DOWN}.input_scale"] = torch.ones(1)


@trap("packed", "tensor-dtype", DOWN, ("transformers",))
def packed_words_of_64_bits(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_packed", lambda packed: packed.long())


@trap("channel", "tensor-dtype", DOWN)
def floats_that_the_config_calls_integers(edited: Edited) -> None:
    for part in ("weights", "input_activations"):
        edited.group()[part]["type"] = "int"


@trap("mixed", "tensor-dtype", DOWN)
def integers_that_the_config_calls_floats(edited: Edited) -> None:
    for part in ("weights", "input_activations"):
        edited.group("group_1")[part]["type"] = "float"


@trap("mixed", "tensor-dtype", DOWN, ("vllm", "sglang"))
def integer_weights_alone_that_the_config_calls_floats(edited: Edited) -> None:
    edited.group("group_1")["weights"]["type"] = "float"


@trap("nvfp4", "tensor-dtype", DOWN)
def wide_scales_beyond_the_range_of_their_dtype(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale.float() * 4)


@trap("packed", "tensor-dtype", OUTPUT)
def codes_without_scales(edited: Edited) -> None:
    edited.group()["targets"] = named("q", "k", "v", "gate", "up", "down")
    edited.quantization["ignore"].append(OUTPUT)
    for part in ("packed", "scale", "shape"):
        del edited.tensors[f"{OUTPUT}.weight_{part}"]
    edited.tensors[f"{OUTPUT}.weight"] = torch.zeros(64, 64, dtype=torch.int8)


@trap("nvfp4", "tensor-shape", DOWN, ("transformers",), also=("format-unread",))
def nvfp4_of_wide_groups_to_transformers(edited: Edited) -> None:
    edited.group()["weights"]["group_size"] = 32


@trap("channel", "tensor-shape", DOWN, ("vllm", "sglang"))
def channel_scales_of_one_per_tensor(edited: Edited) -> None:
    edited.group()["weights"]["strategy"] = "tensor"


@trap("packed", "tensor-shape", DOWN, ("vllm", "sglang"))
def channel_scales_of_groups(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale[:, :1])


@trap("channel", "tensor-shape", DOWN, ("vllm", "sglang"))
def one_scale_of_channels(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale[0])


@trap("packed", "tensor-shape", DOWN)
def a_cut_scale(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale[:, :-1])


@trap("packed", "tensor-shape", "model.norm.weight")
def a_cut_norm(edited: Edited) -> None:
    edited.change("model.norm.weight", lambda weight: weight[:-1])


@trap("packed", "tensor-shape", DOWN)
def a_transposed_scale(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale.T)


@trap("channel", "tensor-missing", DOWN)
def a_scale_by_another_name(edited: Edited) -> None:
    edited.tensors[f"{DOWN}.weight_scale_inv"] = edited.tensors.pop(f"{DOWN}.weight_scale")


@trap("packed", "tensor-shape", f"{DOWN}.bias")
def a_cut_bias_of_a_quantized_layer(edited: Edited) -> None:
    edited.config["mlp_bias"] = True
    for name, rows in ((GATE, 176), (UP, 176), (DOWN, 63)):
        edited.tensors[f"{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)


@trap("packed", "tensor-missing", f"{DOWN}.bias")
def no_biases_of_quantized_layers(edited: Edited) -> None:
    edited.config["mlp_bias"] = True


@trap("packed", "tensor-dtype", "model.norm.weight")
def a_norm_of_integers(edited: Edited) -> None:
    edited.change("model.norm.weight", lambda weight: weight.to(torch.int8))


@trap("packed", "layer-unknown", "model.layers.1.mlp.down_proj.weight")
def a_layer_too_many(edited: Edited) -> None:
    edited.tensors |= {
        key.replace("layers.0.", "layers.1."): value.clone()
        for key, value in edited.tensors.items()
        if key.startswith(LAYER)
    }


@trap("packed", "tensor-missing", "lm_head")
def no_head(edited: Edited) -> None:
    del edited.tensors["lm_head.weight"]


@trap("mixed", "group-disagrees", GATE)
def groups_of_each_others_layers(edited: Edited) -> None:
    first, second = edited.group("group_0"), edited.group("group_1")
    first["targets"], second["targets"] = second["targets"], first["targets"]


@trap("packed", "tensor-missing", DOWN)
def scales_without_codes(edited: Edited) -> None:
    edited.config["model_type"] = "unheard-of"  # sizes come from the tensors
    del edited.tensors[f"{DOWN}.weight_packed"], edited.tensors[f"{DOWN}.weight_shape"]


@trap("packed", "prefix-differs", loaders=("vllm", "sglang"))
def one_prefix_too_many(edited: Edited) -> None:
    edited.tensors = {f"model.{key}" if DOWN in key else key: value for key, value in edited.tensors.items()}


@trap("packed", "file-stray", loaders=("vllm", "sglang"))
def a_stray_file(edited: Edited) -> None:
    edited.files["adapter_model.safetensors"] = {"a.weight": torch.zeros(2)}


@trap("packed", "files-differ", loaders=("vllm", "sglang"))
def an_index_of_other_files(edited: Edited) -> None:
    edited.files["model-00001-of-00001.safetensors"] = edited.tensors
    edited.index = dict.fromkeys(edited.tensors, "model-00001-of-00001.safetensors")


# --- values ---------------------------------------------------------------------------------------------------------


@trap("packed", "scale-not-finite", DOWN)
def a_scale_that_is_nan(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale.index_fill_(0, torch.tensor([3]), torch.nan))


@trap("mxfp8", "scale-not-finite", QUERY)
def an_exponent_that_is_nan(edited: Edited) -> None:
    edited.change(f"{QUERY}.weight_scale", lambda scale: scale.index_fill_(0, torch.tensor([0]), 255))


@trap("nvfp4", "scale-negative", DOWN)
def negative_scales_of_nvfp4(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: (-scale.float()).to(scale.dtype))


@trap("nvfp4", "global-scale-zero", DOWN)
def a_global_scale_of_zero(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_global_scale", torch.zeros_like)


@trap("nvfp4", "global-scales-differ", GATE_UP, ("vllm", "sglang"))
def global_scales_that_differ_between_shards(edited: Edited) -> None:
    edited.change(f"{UP}.weight_global_scale", lambda scale: scale * 2)


@trap("mixed", "input-scales-differ", GATE_UP, ("vllm", "sglang"))
def input_scales_that_differ_between_shards(edited: Edited) -> None:
    edited.change(f"{UP}.input_scale", lambda scale: scale * 2)


@trap("channel", "scale-not-finite", f"{LAYER}.self_attn.v_scale")
def a_cache_scale_that_is_infinite(edited: Edited) -> None:
    edited.change(f"{LAYER}.self_attn.v_scale", lambda scale: scale * torch.inf)


@trap("packed", "zero-point-range", DOWN, also=("format-unread",))
def zero_points_beyond_four_bits(edited: Edited) -> None:
    """int-quantized 4-bit weights with unpacked zero points, as compressed-tensors reads them."""
    edited.group()["targets"] = named("q", "k", "v", "o", "gate", "up")
    second = edited.split(*named("down"), symmetric=False)
    second["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    second["format"] = "int-quantized"
    edited.quantization["format"] = "mixed-precision"
    codes = unpack_words(edited.tensors.pop(f"{DOWN}.weight_packed"), 4, 176)
    del edited.tensors[f"{DOWN}.weight_shape"]
    zeros = torch.full_like(edited.tensors[f"{DOWN}.weight_scale"], 9).to(torch.int8)
    edited.tensors |= {f"{DOWN}.weight": codes, f"{DOWN}.weight_zero_point": zeros}


# --- experts --------------------------------------------------------------------------------------------------------


@trap("mixture", "experts-differ", EXPERTS, (*VLLM_LIKE, "transformers"))
def projections_of_an_expert_that_differ(edited: Edited) -> None:
    edited.group()["targets"] = [*named("q", "k", "v", "o"), r"re:.*\.(w1|w3|gate_proj|up_proj)$"]
    edited.split(r"re:.*\.(w2|down_proj)$", symmetric=False)
    give_experts_zero_points(edited, "w2")


@trap("mixture", "unloadable", f"{EXPERTS}.0.w1", ("transformers",))
def experts_with_zero_points(edited: Edited) -> None:
    edited.group()["targets"] = named("q", "k", "v", "o")
    edited.split(r"re:.*\.experts\..*", symmetric=False)
    give_experts_zero_points(edited, "w1", "w2", "w3")


@trap("mixture", "experts-differ", EXPERTS, ("transformers",))
def experts_of_another_scheme_than_the_first_target_that_names_experts(edited: Edited) -> None:
    edited.group()["targets"] = [*named("q", "k", "v", "o"), "re:.*shared_experts.*"]
    edited.split(r"re:.*\.experts\..*", symmetric=False)
    give_experts_zero_points(edited, "w1", "w2", "w3")


def give_experts_zero_points(edited: Edited, *projections: str) -> None:
    for key in list(edited.tensors):
        name = key.removesuffix(".weight_packed")
        if name != key and name.endswith(projections):
            give_zero_points(edited, name)


@trap("mixture", "tensor-missing", f"{EXPERTS}.1.w2")
def an_expert_without_one_projection(edited: Edited) -> None:
    drop_expert(edited, "1.w2")


@trap("mixture", "tensor-missing", f"{EXPERTS}.1.w2")
def an_expert_without_scales(edited: Edited) -> None:
    del edited.tensors[f"{EXPERTS}.1.w2.weight_scale"]


@trap("mixture", "stored-dense", f"{EXPERTS}.1.w1")
def one_projection_that_is_dense(edited: Edited) -> None:
    make_dense(edited, f"{EXPERTS}.1.w1")
    edited.quantization["ignore"].append(f"{EXPERTS}.1.w1")


@trap("mixture", "layer-unknown", f"{EXPERTS}.9.w2.weight")
def more_experts_than_the_config_counts(edited: Edited) -> None:
    edited.tensors |= {
        key.replace("experts.1.", "experts.9."): value.clone()
        for key, value in edited.tensors.items()
        if "experts.1." in key
    }


@trap("mixture", "target-missing", EXPERTS, ("sglang", "sglang 0.5.10"))
def experts_by_names_that_sglang_does_not_ask_for(edited: Edited) -> None:
    edited.group()["targets"] = [*named("q", "k", "v", "o"), r"re:.*\.w[123]$"]


def drop_expert(edited: Edited, name: str) -> None:
    for part in ("packed", "scale", "shape"):
        del edited.tensors[f"{EXPERTS}.{name}.weight_{part}"]
