"""Checkpoints that are quantized already and do not say so in config.json, as other tools lay them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.checkpoints.memory import LoadedTensors
from qcompiler.checkpoints.names import NameMap
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.errors import CheckpointError
from tests.checkpoints.test_names import OnMeta, Tiny, rewrite

UP = "model.layers.0.mlp.up_proj"
FP8 = torch.float8_e4m3fn


def stored_as(dtype: torch.dtype, **beside: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
    """The weight in another dtype, and tensors beside it."""
    return lambda weight: {"weight": weight.to(dtype), **beside}


def blocks_of_bytes(weight: Tensor) -> dict[str, Tensor]:
    """bitsandbytes, 4 bits: two codes a byte, in one column."""
    codes = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {"weight": codes, "weight.absmax": torch.ones(4), "weight.quant_map": torch.ones(16)}


def packed_codes(weight: Tensor) -> dict[str, Tensor]:
    """GPTQ: there is no weight of the model's name."""
    return {"qweight": torch.zeros(4, 48, dtype=torch.int32), "scales": torch.ones(1, 48)}


LAYOUTS = {
    "fp8": (stored_as(FP8, weight_scale_inv=torch.ones(1, 1)), "weight"),
    "fp8 without scales": (stored_as(FP8), "weight"),
    "bitsandbytes int8": (stored_as(torch.int8, SCB=torch.ones(48)), "weight"),
    "bitsandbytes nf4": (blocks_of_bytes, "weight"),
    "gptq": (packed_codes, "qweight"),
    "codes in floats": (stored_as(torch.float32, weight_scale=torch.ones(1)), "weight_scale"),
    "ModelOpt": (stored_as(torch.float32, weight_scale_2=torch.ones(1)), "weight_scale_2"),
    "quanto": (lambda weight: {"weight._data": weight.to(FP8), "weight._scale": torch.ones(1)}, "weight._scale"),
}


@pytest.fixture
def saved(tmp_path: Path, tiny: Tiny) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def build(folder: Path, model: PreTrainedModel) -> NameMap:
    with CheckpointReader.open(folder) as reader:
        return NameMap.build(model, reader)


@pytest.mark.parametrize("base", [False, True], ids=["", "of the base model"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized_weights_are_refused_by_their_headers(layout: str, base: bool, saved: Path, on_meta: OnMeta) -> None:
    quantize, named = LAYOUTS[layout]

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors.pop(f"{UP}.weight")
        tensors |= {f"{UP}.{name}": value for name, value in quantize(weight).items()}
        return {key.removeprefix("model.") if base else key: value for key, value in tensors.items()}

    rewrite(saved, change)
    key = f"{UP.removeprefix('model.') if base else UP}.{named}"
    with pytest.raises(CheckpointError, match=rf"model.safetensors: '{key}' .*already quantized") as raised:
        build(saved, on_meta(saved))
    assert "dense" in str(raised.value.hint)


def test_quantized_experts_are_refused_though_the_model_merges_them(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta
) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    scale = "model.layers.0.block_sparse_moe.experts.1.w1.weight_scale"
    rewrite(tmp_path, lambda t: t | {scale: torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"'{scale}' .*already quantized"):
        build(tmp_path, on_meta(tmp_path))


def test_loaded_weights_in_fewer_bits_are_refused(saved: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    model = tiny("llama")
    up = model.get_submodule(UP)
    up.weight = torch.nn.Parameter(up.weight.detach().to(FP8))
    with pytest.raises(CheckpointError, match=rf"'{UP}.weight' is stored as float8_e4m3fn.*already quantized"):
        NameMap.of_loaded(on_meta(saved), LoadedTensors(model), None)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.extra.weight",
        "model.layers.0.mlp.scale",  # a scale of a module without weights of its own
        "model.norm.scale",  # of a norm
        f"{UP}.scaled_by",
        "model.layers.2.mlp.up_proj.weight_scale",  # of a layer that the model does not have
    ],
)
def test_other_keys_without_a_place_are_no_sign_of_it(key: str, saved: Path, on_meta: OnMeta) -> None:
    rewrite(saved, lambda t: t | {key: torch.ones(3)})
    assert build(saved, on_meta(saved)).unexpected == (key,)


def test_a_scale_that_the_model_computes_is_no_sign_of_it(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("gemma3_text").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t | {"model.embed_tokens.embed_scale": torch.ones(1)})
    assert build(tmp_path, on_meta(tmp_path)).unexpected == ("model.embed_tokens.embed_scale",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_floats_are_dense(dtype: torch.dtype, saved: Path, on_meta: OnMeta) -> None:
    rewrite(saved, lambda t: {key: value.to(dtype) for key, value in t.items()})
    assert build(saved, on_meta(saved)).unexpected == ()
