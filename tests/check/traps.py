"""The traps of the format, each as an edit of a sound checkpoint, with what a check must say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

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


@trap("packed", "config-place", loaders=("transformers",))
def a_config_in_the_place_of_old(edited: Edited) -> None:
    edited.config["compression_config"] = edited.config.pop("quantization_config")


@trap("packed", "method-unread")
def no_quant_method(edited: Edited) -> None:
    del edited.quantization["quant_method"]


@trap("packed", "method-unread", loaders=("transformers",))
def a_method_as_vllm_alone_reads_it(edited: Edited) -> None:
    edited.quantization["quant_method"] = "compressed_tensors"


@trap("packed", "groups-empty", loaders=("transformers",), also=("stored-quantized",))
def no_groups(edited: Edited) -> None:
    edited.quantization["config_groups"] = {}


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


@trap("packed", "group-format-missing", loaders=("vllm", "sglang"))
def no_format_at_all(edited: Edited) -> None:
    del edited.quantization["format"], edited.group()["format"]


@trap("packed", "head-by-class", "lm_head", VLLM_LIKE)
def a_quantized_head_that_only_a_class_takes(edited: Edited) -> None:
    edited.group()["targets"], edited.quantization["ignore"] = ["Linear"], []
    quantize_the_head(edited)


@trap("packed", "tied-quantized", "lm_head", ("transformers",))
def a_quantized_head_that_is_tied(edited: Edited) -> None:
    edited.group()["targets"].append("lm_head")
    edited.quantization["ignore"] = []
    quantize_the_head(edited)
    edited.config["tie_word_embeddings"] = True


def quantize_the_head(edited: Edited) -> None:
    del edited.tensors["lm_head.weight"]
    rows, columns = edited.config["vocab_size"], edited.config["hidden_size"]
    edited.tensors |= {
        "lm_head.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        "lm_head.weight_scale": torch.ones(rows, columns // 16, dtype=torch.bfloat16),
        "lm_head.weight_shape": torch.tensor([rows, columns]),
    }


@trap("packed", "stored-dense", "model.embed_tokens", ("transformers",))
def an_expression_takes_the_embedding(edited: Edited) -> None:
    edited.group()["targets"] = ["re:model.*"]


@trap("packed", "stored-dense", "model.embed_tokens", ("vllm", "transformers"))
def a_class_takes_the_embedding(edited: Edited) -> None:
    edited.group()["targets"].append("Embedding")


@trap("packed", "stored-quantized", "model.embed_tokens")
def a_quantized_embedding_that_no_target_takes(edited: Edited) -> None:
    quantize_the_embedding(edited)


@trap("packed", "unloadable", "model.embed_tokens", ("transformers",), also=("stored-quantized",))
def a_packed_embedding(edited: Edited) -> None:
    quantize_the_embedding(edited)
    edited.group()["targets"].append("Embedding")


@trap("channel", "stored-quantized", "model.embed_tokens", ("sglang",))
def an_embedding_that_is_not_packed(edited: Edited) -> None:
    edited.split("Embedding")["input_activations"] = None
    edited.groups["group_1"]["format"] = "float-quantized"
    edited.change("model.embed_tokens.weight", lambda weight: weight.to(torch.float8_e4m3fn))
    rows = edited.config["vocab_size"]
    edited.tensors["model.embed_tokens.weight_scale"] = torch.ones(rows, 1, dtype=torch.bfloat16)


def quantize_the_embedding(edited: Edited) -> None:
    rows, columns = edited.tensors.pop("model.embed_tokens.weight").shape
    edited.tensors |= {
        "model.embed_tokens.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        "model.embed_tokens.weight_scale": torch.ones(rows, columns // 16, dtype=torch.bfloat16),
        "model.embed_tokens.weight_shape": torch.tensor([rows, columns]),
    }


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


@trap("packed", "ignore-differs", GATE, VLLM_LIKE)
def a_fused_name_in_ignore(edited: Edited) -> None:
    edited.quantization["ignore"].append(GATE_UP)


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
