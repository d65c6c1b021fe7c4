"""Reading other people's `quantization_config`s: what is understood, what is refused, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest

from qcompiler.emit.schema import parse_quantization_config, quantization_args
from qcompiler.errors import ConfigError
from qcompiler.scheme import Format, QuantSpec, Strategy, preset

W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def config(weights: dict[str, Any] = W4, **group: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **group}},
        "ignore": ["lm_head"],
    }


def test_only_keys_that_matter_are_written() -> None:
    assert quantization_args(preset("W4A16").weights) == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "dynamic": False,
        "group_size": 128,
    }
    assert quantization_args(preset("MXFP8").weights)["scale_dtype"] == "torch.uint8"
    assert quantization_args(preset("FP8_BLOCK").weights)["block_structure"] == [128, 128]


def test_a_config_of_another_tool_is_understood() -> None:
    noisy = W4 | {"actorder": "static", "observer": "minmax", "observer_kwargs": {}, "dynamic": False, "zp_dtype": None}
    parsed = parse_quantization_config(
        config(noisy, input_activations=None, output_activations=None)
        | {
            "version": "0.9",
            "sparsity_config": {},
            "global_compression_ratio": 1.4,
            "quantization_status": "compressed",
        }
    )
    (group,) = parsed.groups
    assert (group.name, group.scheme, group.targets) == ("group_0", preset("W4A16"), ("Linear",))
    assert group.format is Format.PACK_QUANTIZED
    assert parsed.ignore == ("lm_head",)


def test_presets_by_name_expand() -> None:
    (group,) = parse_quantization_config({"config_groups": {"FP8_DYNAMIC": ["Linear"]}}).groups
    assert (group.scheme, group.targets) == (preset("FP8_DYNAMIC"), ("Linear",))


def test_scale_dtypes_that_older_writers_left_out_are_filled_in() -> None:
    nvfp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    mxfp4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    assert parse_quantization_config(config(nvfp4)).groups[0].scheme == preset("NVFP4A16")
    assert parse_quantization_config(config(mxfp4)).groups[0].scheme == preset("MXFP4A16")


def test_a_group_size_of_minus_one_means_per_channel() -> None:
    (group,) = parse_quantization_config(config(W4 | {"group_size": -1})).groups
    assert group.scheme.weights == QuantSpec(bits=4, strategy=Strategy.CHANNEL)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            config(W4 | {"num_bit": 4}),
            "config_groups.group_0.weights has the unknown key 'num_bit'; did you mean 'num_b",
        ),
        (config(traget=[]), "config_groups.group_0 has the unknown key 'traget'; did you mean 'targets'"),
        (config() | {"ignored": []}, "quantization_config has the unknown key 'ignored'; did you mean 'ignore'"),
        (config() | {"quant_method": "gptq"}, "quant_method 'gptq'"),
        (config(W4 | {"actorder": "group"}), "has actorder 'group'"),
        (config(W4 | {"num_bits": 9}), "config_groups.group_0.weights: integers have 2 to 8 bits, not 9"),
        (config(W4 | {"dynamic": True}), "config_groups.group_0: weights are static"),
        (config(output_activations={"num_bits": 8}), "quantizes output_activations"),
        (config(None), "config_groups.group_0 has no weights"),  # type: ignore[arg-type]
        (config(format="marlin-24"), "config_groups.group_0 has format 'marlin-24'"),
        (config() | {"sparsity_config": {"format": "dense"}}, "has a sparsity_config"),
        (
            config() | {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
            "kv_cache_scheme is int8",
        ),
        (config() | {"config_groups": {"group_0": "W4A16"}}, "config_groups.group_0 is 'W4A16', not a mapping"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_quantization_config(broken)
    assert message in error.value.message
