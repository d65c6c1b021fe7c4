"""The traps of the format, each as an edit of a sound checkpoint, with what a check must say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qcompiler.formats.bits import unpack_words
from tests.check.checkpoints import DOWN, GATE, GATE_UP, KEY, LAYER, OUTPUT, QKV, QUERY, UP, VALUE, Edited

ALL = ("vllm", "transformers", "sglang")
VLLM_LIKE = ("vllm", "sglang", "sglang 0.5.10")
MODEL = "(model)"
EXPERTS = f"{LAYER}.block_sparse_moe.experts"


@dataclass(frozen=True)
class Trap:
    """An edit of the checkpoint `base`, and the code, layer and loaders of the error that must be found.

    also: codes of errors that follow from the same cause. Nothing else may be an error.
    """

    edit: Callable[[Edited], object]
    base: str
    code: str
    layer: str
    loaders: tuple[str, ...]
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.edit.__name__.replace("_", " ").strip()


TRAPS: list[Trap] = []


def trap(
    base: str, code: str, layer: str = MODEL, loaders: tuple[str, ...] = ALL, also: tuple[str, ...] = ()
) -> Callable[[Callable[[Edited], object]], Callable[[Edited], object]]:
    def add(edit: Callable[[Edited], object]) -> Callable[[Edited], object]:
        TRAPS.append(Trap(edit, base, code, layer, loaders, also))
        return edit

    return add


def named(*leaves: str) -> list[str]:
    """Expressions that take these leaves and no fused name."""
    return [rf"re:.*\.{leaf}_proj$" for leaf in leaves]


def give_zero_points(edited: Edited, name: str) -> None:
    """The zero points that mean what symmetric codes mean: the middle of their range."""
    rows, groups = edited.tensors[f"{name}.weight_scale"].shape
    edited.tensors[f"{name}.weight_zero_point"] = torch.full((rows * 4 // 32, groups), -0x77777778, dtype=torch.int32)


def make_dense(edited: Edited, name: str) -> None:
    """Store a packed layer dense."""
    rows, columns = edited.tensors.pop(f"{name}.weight_shape").tolist()
    del edited.tensors[f"{name}.weight_packed"], edited.tensors[f"{name}.weight_scale"]
    edited.tensors[f"{name}.weight"] = torch.zeros(rows, columns, dtype=torch.bfloat16)


# --- config: what takes what ----------------------------------------------------------------------------------------


@trap("packed", "model-invalid", MODEL, ("transformers",))
def a_config_that_no_model_is_built_from(edited: Edited) -> None:
    edited.config["vocab_size"] = -5


@trap("packed", "model-invalid", MODEL, ("transformers",))
def a_config_of_other_types(edited: Edited) -> None:
    edited.config["architectures"] = 5


@trap("packed", "fused-shards-differ", GATE_UP, VLLM_LIKE)
def gate_symmetric_and_up_asymmetric(edited: Edited) -> None:
    edited.group()["targets"] = named("q", "k", "v", "o", "gate", "down")
    edited.split(*named("up"), symmetric=False)
    give_zero_points(edited, UP)


@trap("packed", "fused-name-matched", GATE_UP, VLLM_LIKE)
def an_expression_takes_a_fused_name(edited: Edited) -> None:
    edited.group()["targets"] = [*named("q", "k", "v", "o", "down"), GATE, UP]
    edited.split("re:.*up_proj$", symmetric=False)


@trap("packed", "fused-name-matched", QKV, VLLM_LIKE)
def an_expression_for_one_shard_takes_its_fellows(edited: Edited) -> None:
    make_dense(edited, QUERY)
    make_dense(edited, KEY)
    edited.group()["targets"] = ["re:.*v_proj$", *named("o", "gate", "up", "down")]


@trap("packed", "targets-overlap", DOWN, ("vllm", "sglang", "sglang 0.5.10"))
def overlapping_targets_of_two_groups(edited: Edited) -> None:
    edited.group()["targets"] = [DOWN, *named("q", "k", "v", "o", "gate", "up")]
    second = edited.split("re:.*down_proj$", num_bits=8)
    edited.quantization["config_groups"] = {"group_1": second, "group_0": edited.group()}


@trap("packed", "not-compressed", loaders=("transformers",))
def no_quantization_status(edited: Edited) -> None:
    del edited.quantization["quantization_status"]


@trap("mixed", "group-format-missing", loaders=("vllm", "sglang"))
def mixed_precision_without_a_format_of_each_group(edited: Edited) -> None:
    del edited.group()["format"]


@trap("packed", "head-by-class", "lm_head", ("transformers",))
def linear_takes_the_head(edited: Edited) -> None:
    edited.group()["targets"] = ["Linear"]
    edited.quantization["ignore"] = []


@trap("packed", "class-before-shards", QUERY, ("sglang", "sglang 0.5.10"))
def a_class_beside_names(edited: Edited) -> None:
    edited.group()["targets"] = named("q", "k", "v", "o", "gate", "up")
    edited.split("Linear")
    for name in (QUERY, KEY, VALUE, OUTPUT, GATE, UP):
        give_zero_points(edited, name)
    edited.group()["weights"]["symmetric"] = False


@trap("packed", "target-missing", DOWN, ("sglang", "sglang 0.5.10"))
def a_dense_linear_that_no_ignore_names(edited: Edited) -> None:
    edited.group()["targets"] = named("q", "k", "v", "o", "gate", "up")
    make_dense(edited, DOWN)
    edited.quantization["ignore"] = ["lm_head"]


@trap("packed", "ignore-differs", DOWN, ("sglang 0.5.10",))
def a_parent_in_ignore(edited: Edited) -> None:
    edited.quantization["ignore"].append(f"{LAYER}.mlp")


@trap("packed", "ignore-differs", DOWN, ("sglang 0.5.10",))
def a_part_of_a_name_in_ignore(edited: Edited) -> None:
    edited.quantization["ignore"].append("mlp.down")


@trap("packed", "ignore-differs", OUTPUT, ("transformers",))
def a_class_in_ignore(edited: Edited) -> None:
    edited.quantization["ignore"] = ["lm_head", "Linear"]


@trap("packed", "shards-ignored", QKV, VLLM_LIKE, also=("stored-quantized",))
def ignore_covers_one_shard(edited: Edited) -> None:
    edited.quantization["ignore"].append(KEY)


@trap("packed", "stored-quantized", DOWN, also=("target-missing",))
def no_target_for_a_quantized_layer(edited: Edited) -> None:
    edited.group()["targets"] = named("q", "k", "v", "o", "gate", "up")


@trap("packed", "stored-dense", "lm_head")
def a_target_for_a_dense_layer(edited: Edited) -> None:
    edited.group()["targets"].append("lm_head")
    edited.quantization["ignore"] = []


# --- config: what it says of numbers --------------------------------------------------------------------------------


@trap("packed", "group-invalid", loaders=("transformers",))
def an_unknown_key_in_a_group(edited: Edited) -> None:
    edited.group()["comment"] = "four bits"


@trap("packed", "group-invalid")
def an_unknown_key_in_its_numbers(edited: Edited) -> None:
    edited.group()["weights"]["comment"] = "four bits"


@trap("mixed", "group-invalid")
def activations_per_token_that_are_static(edited: Edited) -> None:
    edited.group("group_1")["input_activations"] |= {"strategy": "token", "dynamic": "local"}


@trap("channel", "group-invalid", loaders=("vllm", "sglang"))
def a_preset_by_its_name(edited: Edited) -> None:
    edited.quantization["config_groups"] = {"FP8_DYNAMIC": edited.group()["targets"]}


@trap("packed", "target-invalid", also=("stored-quantized", "target-missing"))
def a_target_that_is_no_expression(edited: Edited) -> None:
    edited.group()["targets"] = [*named("q", "k", "v", "o", "gate", "up"), "re:*.down_proj"]


@trap("packed", "cache-invalid")
def an_integer_cache(edited: Edited) -> None:
    edited.quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}


@trap("channel", "cache-scale-missing", f"{LAYER}.self_attn.k_scale")
def a_cache_scale_that_is_missing(edited: Edited) -> None:
    del edited.tensors[f"{LAYER}.self_attn.k_scale"]


@trap("packed", "format-unread", loaders=("vllm",), also=("format-disagrees",))
def packed_weights_called_integers(edited: Edited) -> None:
    edited.quantization["format"] = edited.group()["format"] = "int-quantized"


@trap("channel", "format-unread", loaders=("vllm",), also=("format-disagrees",))
def floats_called_packed(edited: Edited) -> None:
    edited.quantization["format"] = edited.group()["format"] = "pack-quantized"


@trap("mixed", "format-disagrees", GATE, also=("format-unread",))
def eight_bits_called_packed(edited: Edited) -> None:
    edited.group("group_1")["format"] = "pack-quantized"


@trap("mxfp8", "scale-dtype-missing", loaders=("vllm", "transformers"), also=("tensor-dtype",))
def mx_without_the_dtype_of_its_scales(edited: Edited) -> None:
    del edited.group()["weights"]["scale_dtype"]


# --- tensors --------------------------------------------------------------------------------------------------------


@trap("packed", "zero-point-unexpected", DOWN, ("vllm", "sglang"))
def zero_points_of_a_symmetric_layer(edited: Edited) -> None:
    give_zero_points(edited, DOWN)


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


@trap("packed", "tensor-dtype", OUTPUT)
def codes_without_scales(edited: Edited) -> None:
    edited.group()["targets"] = named("q", "k", "v", "gate", "up", "down")
    edited.quantization["ignore"].append(OUTPUT)
    for part in ("packed", "scale", "shape"):
        del edited.tensors[f"{OUTPUT}.weight_{part}"]
    edited.tensors[f"{OUTPUT}.weight"] = torch.zeros(64, 64, dtype=torch.int8)


@trap("packed", "tensor-shape", DOWN)
def a_cut_scale(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", lambda scale: scale[:, :-1])


@trap("packed", "tensor-shape", "model.norm.weight")
def a_cut_norm(edited: Edited) -> None:
    edited.change("model.norm.weight", lambda weight: weight[:-1])


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
