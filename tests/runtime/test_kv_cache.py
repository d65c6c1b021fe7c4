"""A quantized key/value cache: its scales on disk, and what Transformers and the compiled graph make of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import qcompiler
from qcompiler import CalibrationSpec, Result
from qcompiler.errors import LegalityError, QCompilerError
from qcompiler.ir.ops import fake_quantize_cache
from tests.compile.tiny import (
    ATTENTION,
    EVERYWHERE,
    INT8,
    MLP,
    pipeline,
    quantization,
    restamp,
    rule,
    save_tiny,
    stored,
    tiny_model,
    token_rows,
)

ROWS = token_rows(6)
SAMPLING = CalibrationSpec(sequence_length=32, shuffle=False)
STRATEGIES = ("tensor", "attn_head")


def compiled(
    source: Path, output: Path, *rules: Mapping[str, Any], strategy: str | None = "tensor", **observers: Any
) -> Result:
    cache = None if strategy is None else {"strategy": strategy}
    return qcompiler.compile(
        source,
        pipeline=pipeline(*rules, kv_cache=cache, observers=observers),
        output=output,
        calibration=ROWS,
        sampling=SAMPLING,
    )


def cached(folder: Path) -> dict[str, Tensor]:
    """[tokens, heads, head size] of all keys and values that enter the cache, by the name of their scale."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([row["input_ids"] for row in ROWS])
    cache = DynamicCache()  # without the config it drops nothing beyond a window
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
    return {
        f"model.layers.{index}.self_attn.{kind}_scale": states.transpose(1, 2).flatten(0, 1).float()
        for index, layer in enumerate(cache.layers)
        for kind, states in (("k", layer.keys), ("v", layer.values))
    }


def scales(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in stored(folder).items() if key.endswith((".k_scale", ".v_scale"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cache") / "source", "mistral")  # two heads of keys for four of queries


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scales_are_those_of_what_enters_the_cache(source: Path, tmp_path: Path, strategy: str) -> None:
    """Of the first layer: what comes before it is not quantized, so the dense model shows it."""
    result = compiled(source, tmp_path / "output", rule(MLP, INT8), strategy=strategy)
    found, dense = scales(result.output), cached(source)
    assert found.keys() == dense.keys()
    for name, scale in found.items():
        assert scale.dtype is torch.bfloat16
        assert scale.shape == ((1,) if strategy == "tensor" else (2, 1, 1))
        if ".layers.0." in name:
            amax = dense[name].abs().amax((0, 2) if strategy == "attn_head" else (0, 1, 2))
            assert torch.equal(scale.flatten(), (amax / 448).to(torch.bfloat16).flatten())


@pytest.mark.parametrize(("strategy", "kind"), [("tensor", "percentile"), ("attn_head", "mse")])
def test_a_clipped_cache_has_the_scales_of_its_statistic_and_transformers_rounds_to_them(
    source: Path, tmp_path: Path, strategy: str, kind: str
) -> None:
    result = compiled(source, tmp_path / "output", rule(MLP, INT8), strategy=strategy, kv_cache=kind, percentile=99.0)
    dense, per_head = cached(source), strategy == "attn_head"
    for name, scale in scales(result.output).items():
        if ".layers.0." not in name:
            continue  # what comes before it is quantized
        rows = dense[name].transpose(0, 1).flatten(1) if per_head else dense[name].reshape(1, -1)
        for row, found in zip(rows, scale.flatten(), strict=True):
            largest = float(row.abs().max())
            if kind == "percentile":
                expected = max(float(row.quantile(0.99)), -float(row.quantile(0.01)))
                assert 448 * float(found) == pytest.approx(expected, rel=0.02)
                assert 448 * float(found) < 0.95 * largest
            else:
                errors = {s: fp8_error(row, s) for s in (float(found), largest / 448, 0.9 * largest / 448)}
                assert min(errors.values()) >= 0.99 * errors[float(found)]
    assert qcompiler.verify(result.output).difference == 0


def fp8_error(x: Tensor, scale: float) -> float:
    """The squared error of E4M3 with this scale."""
    rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return float((rounded - x).square().sum())


@pytest.mark.parametrize(
    ("family", "strategy"), [("llama", "tensor"), ("gemma2", "attn_head"), ("qwen3", "tensor"), ("phi", "attn_head")]
)
def test_transformers_rounds_the_cache_as_the_compiled_graph_does(family: str, strategy: str, tmp_path: Path) -> None:
    result = compiled(save_tiny(tmp_path / "source", family), tmp_path / "output", rule(MLP, INT8), strategy=strategy)
    config = QuantizationConfig.model_validate(quantization(result.output))
    assert config.kv_cache_scheme is not None
    assert (config.kv_cache_scheme.num_bits, str(config.kv_cache_scheme.strategy)) == (8, strategy)
    assert not config.kv_cache_scheme.dynamic
    rounded = [node for node in result.graph.nodes if node.target is fake_quantize_cache]
    assert len(rounded) == len(scales(result.output)) == 4
    assert qcompiler.verify(result.output).difference == 0


def test_an_attention_that_is_written_out_rounds_its_cache_too(tmp_path: Path) -> None:
    """Its softmax runs over sinks as well, and its keys are repeated for groups of queries."""
    source = save_tiny(tmp_path / "source", "gpt_oss")
    result = compiled(source, tmp_path / "output", rule(ATTENTION, "FP8_DYNAMIC"), strategy="attn_head")
    found, dense = scales(result.output), cached(source)
    assert found.keys() == dense.keys()
    assert {tuple(scale.shape) for scale in found.values()} == {(2, 1, 1)}
    assert qcompiler.verify(result.output).difference == 0


def test_a_cache_that_transformers_does_not_round_is_refused(tmp_path: Path) -> None:
    """compressed-tensors finds caches by names of linears that Bloom does not have."""
    source = save_tiny(tmp_path / "source", "bloom")
    with pytest.raises(LegalityError, match=r"unexpected_keys: \['\S*h.0.self_attention.k_scale'") as error:
        compiled(source, tmp_path / "output", rule(MLP, INT8))
    assert "take out kv_cache (kv_cache_scheme in a recipe)" in str(error.value.hint)


def test_the_tolerance_of_a_rounded_cache_is_said(source: Path, tmp_path: Path) -> None:
    verified = qcompiler.verify(compiled(source, tmp_path / "output", rule(MLP, INT8)).output)
    assert verified.difference == 0
    assert verified.tolerance == torch.finfo(torch.bfloat16).eps
    assert "in which scales of the key/value cache are applied" in str(verified)


def test_layers_after_a_rounded_cache_are_measured_after_it(source: Path, tmp_path: Path) -> None:
    """The oracle is the compiled checkpoint: its second layer's cache, behind the first layer as it is served."""
    result = compiled(source, tmp_path / "output", rule({**MLP, "layers": 0}, INT8))
    served = cached(result.output)
    for kind in "kv":
        name = f"model.layers.1.self_attn.{kind}_scale"
        # What the client caches is rounded, but the largest magnitude is a code of its own.
        assert float(scales(result.output)[name]) == pytest.approx(float(served[name].abs().max()) / 448, rel=0.005)


def test_a_rounded_cache_changes_what_is_computed(source: Path, tmp_path: Path) -> None:
    ids = torch.tensor([row["input_ids"] for row in ROWS])
    outputs = [
        compiled(source, tmp_path / str(strategy), rule(MLP, INT8), strategy=strategy).output
        for strategy in (None, "tensor")
    ]
    with torch.inference_mode():
        plain, rounded = (
            AutoModelForCausalLM.from_pretrained(output).eval()(input_ids=ids, use_cache=False).logits.float()
            for output in outputs
        )
    assert 0.005 < float((plain - rounded).square().mean().sqrt() / plain.std()) < 0.2
    assert quantization(outputs[0])["kv_cache_scheme"] is None


def test_a_lost_scale_is_refused(source: Path, tmp_path: Path) -> None:
    result = compiled(source, tmp_path / "output", rule(MLP, INT8))
    (file,) = (f for f in result.output.glob("*.safetensors") if "model.layers.1.self_attn.v_scale" in load_file(f))
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QCompilerError, match=r"model.layers.1.self_attn.v_scale"):
        qcompiler.verify(restamp(result.output))


def test_a_cache_is_quantized_beside_static_attention(source: Path, tmp_path: Path) -> None:
    result = compiled(source, tmp_path / "output", rule(ATTENTION, "FP8"), rule(MLP, "NVFP4"), strategy="attn_head")
    tensors = stored(result.output)
    assert len(scales(result.output)) == 4
    assert sum(key.endswith("input_scale") for key in tensors) == 8
    assert sum(tensor.nbytes for tensor in tensors.values()) == result.plan.report.total_bytes
    assert qcompiler.verify(result.output).difference == 0


def test_a_checkpoint_without_a_prefix_keeps_to_its_names(tmp_path: Path) -> None:
    model = tiny_model("mistral", tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "source")
    result = compiled(tmp_path / "source", tmp_path / "output", rule(EVERYWHERE, INT8))
    prefixes = {key.partition("layers.")[0] for key in stored(result.output) if "layers." in key}
    assert len(prefixes) == 1
    assert qcompiler.verify(result.output).difference == 0
