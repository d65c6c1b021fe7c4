"""Numbers that linears must share because a runtime fuses them or they read one tensor, as they lie on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompiler
from tests.compile.tiny import EVERYWHERE, SHORT, pipeline, rule, save_tiny, stored, token_rows

INT8_ASYMMETRIC_INPUTS = {
    "weights": {"type": "int", "bits": 8, "strategy": "channel"},
    "input_activations": {"type": "int", "bits": 8, "strategy": "tensor", "symmetric": False},
}

Compiled = Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]


@pytest.fixture
def compiled(tmp_path: Path) -> Compiled:
    """`compiled(family, scheme)`: the tensors of the dense checkpoint and those of the compiled one, which verifies."""

    def run(family: str, scheme: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        source = save_tiny(tmp_path / "source", family)
        result = qcompiler.compile(
            source,
            pipeline=pipeline(rule(EVERYWHERE, scheme)),  # type: ignore[arg-type]
            output=tmp_path / "output",
            calibration=token_rows(),
            sampling=SHORT,
        )
        assert qcompiler.verify(result.output).difference == 0
        return stored(source), stored(result.output)

    return run


def block(index: int, *names: str) -> list[str]:
    return [f"model.layers.{index}.{name}" for name in names]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def values(tensors: dict[str, Tensor], modules: list[str], name: str) -> list[float]:
    return [float(tensors[f"{module}.{name}"]) for module in modules]


@pytest.mark.parametrize("index", [0, 1])
def test_static_inputs_of_fused_linears_have_one_scale(compiled: Compiled, index: int) -> None:
    _, after = compiled("llama", "FP8")
    qkv = values(after, block(index, *QKV), "input_scale")
    gate_up = values(after, block(index, *GATE_UP), "input_scale")
    others = values(after, block(index, "self_attn.o_proj", "mlp.down_proj"), "input_scale")
    assert len(set(qkv)) == len(set(gate_up)) == 1
    assert len({qkv[0], gate_up[0], *others}) == 4
    assert all(after[f"{m}.input_scale"].shape == (1,) for m in block(index, *QKV))
    # Fused linears keep a weight scale each: runtimes requantize to the largest.
    assert len(set(values(after, block(index, *QKV), "weight_scale"))) == 3


def test_asymmetric_inputs_share_scale_and_zero_point(compiled: Compiled) -> None:
    _, after = compiled("llama", INT8_ASYMMETRIC_INPUTS)
    for group in (QKV, GATE_UP):
        modules = block(0, *group)
        assert len(set(values(after, modules, "input_scale"))) == 1
        assert len(set(values(after, modules, "input_zero_point"))) == 1
    assert after["model.layers.0.mlp.down_proj.input_zero_point"].dtype is torch.int8


def test_fused_nvfp4_linears_share_the_global_scale_of_the_largest(compiled: Compiled) -> None:
    before, after = compiled("llama", "NVFP4")

    def divisor(*modules: str) -> float:
        return 448 * 6 / max(float(before[f"{module}.weight"].abs().max()) for module in modules)

    for index in (0, 1):
        for group in (QKV, GATE_UP, ("self_attn.o_proj",), ("mlp.down_proj",)):
            modules = block(index, *group)
            assert values(after, modules, "weight_global_scale") == pytest.approx([divisor(*modules)] * len(modules))
            assert len(set(values(after, modules, "weight_global_scale"))) == 1
            assert len(set(values(after, modules, "input_global_scale"))) == 1
        separate = [divisor(module) for module in block(index, *QKV)]
        assert len(set(separate)) == 3
    assert after["model.layers.0.mlp.up_proj.weight_global_scale"].dtype is torch.float32


def test_parallel_blocks_share_inputs_without_sharing_weights(compiled: Compiled) -> None:
    """Phi's q, k, v and fc1 read one tensor; only q, k and v are fused."""
    _, after = compiled("phi", "NVFP4")
    qkv, fc1 = block(1, *QKV), block(1, "mlp.fc1")
    assert len(set(values(after, qkv + fc1, "input_global_scale"))) == 1
    assert len(set(values(after, qkv, "weight_global_scale"))) == 1
    assert values(after, fc1, "weight_global_scale") != values(after, qkv[:1], "weight_global_scale")
