"""Names on disk against paths in the model: what comes renamed, merged or without a prefix goes as it came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match

import qcompiler
from qcompiler.errors import LegalityError, VerificationError
from tests.compile.tiny import (
    ATTENTION,
    EVERYWHERE,
    INT4,
    INT4_ASYM,
    INT8,
    MLP,
    compile_tiny,
    model_config,
    pipeline,
    quantization,
    rule,
    same,
    save_tiny,
    stored,
    tiny_model,
    weight_files,
)

INT4_CHANNEL = {"weights": {"type": "int", "bits": 4, "strategy": "channel"}}


def assert_dense_kept(source: Path, output: Path) -> set[str]:
    """Every tensor that is not quantized is the source's, under the source's name; the names of the others."""
    before, after = stored(source), stored(output)
    quantized = {key.rpartition(".")[0] for key in after if key.endswith(".weight_scale")}
    kept = {key for key in before if key.removesuffix(".weight") not in quantized}
    assert {k for k in after if k.rpartition(".")[0] not in quantized or k.endswith(".bias")} == kept
    for key in kept:
        assert same(before[key], after[key]), key
    return quantized


def test_experts_keep_the_names_of_the_original_format(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored(source)
    result = qcompiler.compile(source, pipeline=pipeline(rule(ATTENTION, "FP8_DYNAMIC")), output=tmp_path / "output")
    quantized = assert_dense_kept(source, result.output)
    assert quantized == {f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"}
    assert qcompiler.verify(result.output).difference == 0
    assert any("blocks of experts stay dense: 2" in note.text for note in result.report.notes)


def test_experts_that_came_merged_stay_merged(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "source", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored(tmp_path / "source")
    result = qcompiler.compile(
        tmp_path / "source", pipeline=pipeline(rule(ATTENTION, "FP8_DYNAMIC")), output=tmp_path / "output"
    )
    assert_dense_kept(tmp_path / "source", result.output)
    assert qcompiler.verify(result.output).difference == 0


def test_dense_experts_and_routers_are_ignored_under_either_name(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "mixtral")
    packed = pipeline(rule(ATTENTION, INT4_CHANNEL), target="vllm-sm90")
    result = qcompiler.compile(source, pipeline=packed, output=tmp_path / "output")
    assert_dense_kept(source, result.output)
    config = QuantizationConfig.model_validate(quantization(result.output))
    linear = torch.nn.Linear(1, 1, device="meta")
    for key in [key for key in stored(source) if "block_sparse_moe" in key]:
        on_disk = key.removesuffix(".weight")
        in_model = on_disk.replace("block_sparse_moe", "mlp")
        for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            in_model = in_model.replace(f".{old}", f".{new}")
        assert is_match(on_disk, linear, config.ignore)
        assert is_match(in_model, linear, config.ignore)
    # Loading dense experts beside packed linears is what Transformers cannot do, and that is said.
    assert any("Transformers cannot verify this checkpoint" in note.text for note in result.report.notes)
    with pytest.raises(VerificationError, match=r"\(Transformers cannot verify this checkpoint: .*\)") as caught:
        qcompiler.verify(result.output)
    assert caught.value.hint == "this was known when it was compiled: judge it in the runtime of vllm-sm90"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_checkpoint_without_the_prefix_of_the_base_model_goes_as_it_came(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "source")
    assert not any(key.startswith("model.") for key in stored(tmp_path / "source"))
    config = model_config(tmp_path / "source") | {"architectures": [type(model).__name__]}
    assert config["tie_word_embeddings"]
    result = qcompiler.compile(
        tmp_path / "source", pipeline=pipeline(rule(ATTENTION, "FP8_DYNAMIC")), output=tmp_path / "output"
    )
    assert qcompiler.verify(result.output).difference == 0
    before, after = stored(tmp_path / "source"), stored(result.output)
    bare = {key.removeprefix("model."): tensor for key, tensor in after.items()}
    assert len(bare) == len(after)
    for key, tensor in before.items():
        if f"{key}_scale" not in bare:
            assert same(bare[key], tensor), key


@pytest.mark.parametrize(("family", "biased"), [("qwen2", 6), ("opt", 12)])
def test_biases_stay_beside_the_codes(family: str, biased: int, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    result = qcompiler.compile(source, pipeline=pipeline(rule(EVERYWHERE, INT4_ASYM)), output=tmp_path / "output")
    quantized = assert_dense_kept(source, result.output)
    after = stored(result.output)
    assert sum(f"{name}.bias" in after for name in quantized) == biased
    for row in result.report.layers:
        if row.scheme is not None:
            assert row.bytes == sum(t.nbytes for key, t in after.items() if key.rpartition(".")[0] == row.path)
    assert qcompiler.verify(result.output).difference == 0


def test_a_sharded_source_gives_the_same_tensors(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    mixed = pipeline(rule(ATTENTION, INT4), rule(MLP, INT8))
    outputs = [
        qcompiler.compile(tmp_path / name, pipeline=mixed, output=tmp_path / f"{name}-output").output
        for name in ("one", "many")
    ]
    assert weight_files(outputs[0]) == weight_files(outputs[1])


# --- dtype ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_says_what_is_computed_and_written(dtype: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    result = compile_tiny(
        source, tmp_path / "output", pipeline(rule(ATTENTION, "FP8"), rule(MLP, INT4_ASYM)), dtype=dtype
    )
    wanted = getattr(torch, dtype)
    tensors = stored(result.output)
    floating = {k: t.dtype for k, t in tensors.items() if t.is_floating_point() and t.dtype is not torch.float8_e4m3fn}
    assert set(floating.values()) == {wanted}
    assert any(key.endswith("input_scale") for key in floating)
    assert model_config(result.output)["dtype"] == dtype
    assert sum(tensor.nbytes for tensor in tensors.values()) == result.plan.report.total_bytes
    embedding = "model.embed_tokens.weight"
    assert torch.equal(tensors[embedding], stored(source)[embedding].to(wanted))
    assert qcompiler.verify(result.output).difference == 0


def test_a_layer_whose_weight_is_cut_from_a_larger_one_has_no_name_and_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "hrm_text")
    with pytest.raises(LegalityError, match=r"q_proj has a scheme, but its codes have no name on disk"):
        qcompiler.plan(source, pipeline(rule(ATTENTION, INT4)))
