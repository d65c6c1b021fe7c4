"""Every row of every target: one linear that it takes, and one that it refuses, with what the message must say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from qcompiler.emit.sites import Site
from qcompiler.scheme import QuantSpec, Scheme, Strategy, preset
from qcompiler.targets import Target, check, load_target, notes, target_names

NAME = "model.layers.3.mlp.down_proj"


def integer(bits: int, group: int | None = 128, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(type="int", bits=bits, group_size=group, symmetric=symmetric)  # type: ignore[call-arg]


def tensor(type_: str, *, dynamic: bool = False) -> QuantSpec:
    return QuantSpec(type=type_, bits=8, strategy=Strategy.TENSOR, dynamic=dynamic)  # type: ignore[arg-type]


def scheme(weights: QuantSpec, activations: QuantSpec | str | None = None) -> Scheme:
    if isinstance(activations, str):
        activations = preset(activations).input_activations
    return Scheme(weights=weights, input_activations=activations)


def fp8(**fields: Any) -> QuantSpec:
    return QuantSpec(type="float", bits=8, **fields)


@dataclass(frozen=True)
class Case:
    """`legal` must pass; `illegal` must break `rule` (the row itself unless said otherwise) and say `message`."""

    legal: Scheme
    illegal: Scheme
    message: str
    shape: dict[str, Any] = field(default_factory=dict)  # of the illegal site
    rule: str | None = None


W4, W8, W3 = preset("W4A16"), scheme(integer(8)), preset("W3A16")
W8_ASYM = scheme(integer(8, symmetric=False))
INT8_STATIC = scheme(integer(8, None), tensor("int"))
FP8_CHANNEL_STATIC = scheme(fp8(strategy=Strategy.CHANNEL), tensor("float"))
FP8_CHANNEL = scheme(fp8(strategy=Strategy.CHANNEL))
FP8_GROUP = fp8(group_size=128)
NVFP4_STATIC = scheme(preset("NVFP4").weights, preset("NVFP4A16").weights)
EXPERT = {"kind": "experts", "structure": "experts", "name": "model.layers.3.mlp.experts.0.down_proj"}
EXPERTS_TAKE = "for experts it takes"

GPU = {
    "wna16": Case(W4, scheme(integer(4, 48)), "groups of 48 (it takes 32, 64 or 128)", {"in_features": 480}),
    "wna16-asymmetric": Case(
        preset("W4A16_ASYM"), scheme(integer(4, 48, symmetric=False)), "groups of 48", {"in_features": 480}
    ),
    "wna16-triton": Case(scheme(integer(4, 256)), scheme(integer(4, 256)), "260 outputs", {"out_features": 260}),
    "wna16-int8-asymmetric": Case(W8, W8_ASYM, "need the Machete kernel of compute capability 9.0"),
    "wna16-odd-bits": Case(W4, W3, "only the optional Humming kernels take 2, 3, 5, 6 and 7 bits"),
    "wna8": Case(preset("W4A8"), scheme(integer(4, 48), "W4A8"), "groups of 48", {"in_features": 480}),
    "w4a8-fp8": Case(W4, preset("W4AFP8"), "compute capability 9.0 only"),
    "w8a8-int8": Case(preset("W8A8"), scheme(integer(8, None, symmetric=False), "W8A8"), "zero points (it takes symm"),
    "w8a8-int8-static": Case(
        INT8_STATIC, scheme(integer(8, None, symmetric=False), tensor("int")), "zero points (it takes symmetric ones)"
    ),
    "fp8-dynamic": Case(
        preset("FP8_DYNAMIC"), scheme(FP8_GROUP, "FP8_DYNAMIC"), "strategy group (it takes tensor or channel)"
    ),
    "fp8-static": Case(preset("FP8"), FP8_CHANNEL_STATIC, f"strategy channel ({EXPERTS_TAKE} tensor)", EXPERT),
    "fp8-block": Case(
        preset("FP8_BLOCK"),
        scheme(fp8(block_structure=(64, 64)), "FP8_BLOCK"),
        "blocks of 64x64 (it takes 128x128)",
    ),
    "fp8-weight-only": Case(FP8_CHANNEL, scheme(FP8_GROUP), "strategy group (it takes tensor, channel or block)"),
    "nvfp4": Case(preset("NVFP4"), NVFP4_STATIC, "dynamic: false (it takes local)"),
    "nvfp4a16": Case(
        preset("NVFP4A16"), scheme(preset("NVFP4").weights, "FP8_DYNAMIC"), "it takes no activation scheme"
    ),
    "mxfp4": Case(preset("MXFP4"), scheme(preset("MXFP4").weights, "MXFP8"), "activations: 8 bits (it takes 4)"),
    "mxfp4a16": Case(preset("MXFP4A16"), scheme(preset("MXFP4").weights, "FP8_DYNAMIC"), "no activation scheme"),
    "mxfp8": Case(
        preset("MXFP8"),
        preset("MXFP8"),
        "80 inputs do not divide into groups of 32",
        {"in_features": 80},
        "group-divides",
    ),
    "mxfp8a16": Case(preset("MXFP8A16"), scheme(preset("MXFP8").weights, "FP8_DYNAMIC"), "no activation scheme"),
}
SM90 = {
    "wna16-int8-asymmetric": Case(
        W8_ASYM, scheme(integer(8, None, symmetric=False)), "544 inputs are not a multiple of 64", {"in_features": 544}
    ),
    "w4a8-fp8": Case(preset("W4AFP8"), preset("W4AFP8"), "192 outputs", {"out_features": 192}),
}
SM100 = {
    "w8a8-int8": Case(preset("FP8_DYNAMIC"), preset("W8A8"), "Blackwell has no INT8 kernel"),
    "w8a8-int8-static": Case(preset("FP8"), INT8_STATIC, "Blackwell has no INT8 kernel"),
    "mxfp4a16": Case(preset("MXFP4"), preset("MXFP4A16"), "quantize the activations as well"),
    "mxfp8a16": Case(preset("MXFP8"), preset("MXFP8A16"), "quantize the activations as well"),
}
CPU = {
    "wna16": Case(preset("W4A16_ASYM"), W4, "72 outputs of model.layers.3.mlp.down_proj", {"out_features": 72}),
    "wna16-other-bits": Case(preset("W8A8"), W8, "the CPU kernel takes 4-bit weights only (uint8b128"),
    "wna8": Case(
        preset("W4A8"), scheme(integer(4, None), "W4A8"), "80 inputs are not a multiple of 32", {"in_features": 80}
    ),
    "w4a8-fp8": Case(W4, preset("W4AFP8"), "compute capability 9.0 only"),
    "w8a8-int8": GPU["w8a8-int8"],
    "w8a8-int8-static": GPU["w8a8-int8-static"],
    "fp8-dynamic": Case(preset("FP8_DYNAMIC"), scheme(FP8_GROUP, "FP8_DYNAMIC"), "strategy group (it takes channel)"),
    "fp8-per-tensor": Case(preset("FP8_DYNAMIC"), preset("FP8"), "per-tensor FP8 weights fail on a CPU"),
    "fp8-static": Case(preset("FP8_DYNAMIC"), FP8_CHANNEL_STATIC, "static FP8 activations fail on a CPU"),
    "fp8-block": Case(preset("FP8_DYNAMIC"), preset("FP8_BLOCK"), "block FP8 kernels need AMX"),
    "fp8-weight-only": Case(preset("FP8_DYNAMIC"), FP8_CHANNEL, "no weight-only FP8 kernel for CPUs"),
    "nvfp4": Case(W4, preset("NVFP4"), "no NVFP4 kernel for CPUs"),
    "nvfp4a16": Case(W4, preset("NVFP4A16"), "no NVFP4 kernel for CPUs"),
    "mx": Case(W4, preset("MXFP4"), "no MX kernel for CPUs"),
    "mxa16": Case(W4, preset("MXFP8A16"), "no MX kernel for CPUs"),
}
SGLANG = GPU | {
    "wna16": Case(W4, W4, "96 outputs", {"out_features": 96}),
    "wna16-asymmetric": Case(
        preset("W4A16_ASYM"), scheme(integer(4, 32, symmetric=False)), "not a multiple of 128", {"in_features": 96}
    ),
    "wna16-odd-bits": Case(W4, W3, "WNA16_SUPPORTED_BITS is 4 and 8"),
    "packed-integer-activations": Case(W4, preset("W4A8"), "no packed weights with integer activations"),
    "w4a8-fp8": Case(W4, preset("W4AFP8"), "packed weights with FP8 activations for experts only"),
    "fp8-weight-only": Case(FP8_CHANNEL, scheme(FP8_GROUP), "strategy group (it takes tensor or channel)"),
    "mx": Case(preset("NVFP4"), preset("MXFP4"), "FP4 in the NVFP4 layout only"),
    "mxa16": Case(preset("NVFP4A16"), preset("MXFP8A16"), "FP4 in the NVFP4 layout only"),
}
TRANSFORMERS = GPU | {
    "packed": Case(W3, scheme(integer(4, 96)), "512 inputs do not divide into groups of 96", rule="group-divides"),
    "packed-asymmetric": Case(
        preset("W4A16_ASYM"), preset("W4A16_ASYM"), "DecompressExperts drops zero points", EXPERT
    ),
    "packed-with-activations": Case(preset("W4AFP8"), preset("W4A8"), "DecompressExperts drops zero points", EXPERT),
    "packed-int8-fp8": Case(scheme(integer(8), "FP8"), scheme(integer(8), "FP8"), "drops activation scales", EXPERT),
    "int8": Case(preset("W8A8"), preset("W8A8"), "DecompressExperts reads weight_packed", EXPERT),
    "fp8": Case(preset("FP8_BLOCK"), preset("FP8_BLOCK"), f"strategy block ({EXPERTS_TAKE} tensor or channel)", EXPERT),
    "nvfp4": Case(preset("NVFP4"), preset("NVFP4"), "drops global scales", EXPERT),
    "nvfp4a16": Case(preset("NVFP4A16"), preset("NVFP4A16"), "drops global scales", EXPERT),
    "mx": Case(preset("MXFP8"), preset("MXFP8"), "multiplies by the raw exponents", EXPERT),
    "mxa16": Case(preset("MXFP4A16"), preset("MXFP4A16"), "multiplies by the raw exponents", EXPERT),
}
CASES = {
    "vllm-sm80": GPU,
    "vllm-sm89": GPU,
    "vllm-sm90": GPU | SM90,
    "vllm-sm100": GPU | SM100,
    "vllm-cpu": CPU,
    "sglang": SGLANG,
    "transformers": TRANSFORMERS,
}
EVERY_ROW = [(target, row) for target in target_names() for row in load_target(target).rows]


def site(scheme: Scheme, **shape: Any) -> Site:
    fields: dict[str, Any] = {"name": NAME, "out_features": 256, "in_features": 512} | shape
    return Site(**fields, scheme=scheme)


@pytest.mark.parametrize(("target", "row"), EVERY_ROW)
def test_each_row_takes_what_it_says(target: str, row: str) -> None:
    assert check(load_target(target), [site(CASES[target][row].legal)]) == []


@pytest.mark.parametrize(("target", "row"), EVERY_ROW)
def test_each_row_refuses_with_its_reason_and_a_mend(target: str, row: str) -> None:
    case = CASES[target][row]
    refused = site(case.illegal, **case.shape)
    violations = check(load_target(target), [refused])
    broken = next((v for v in violations if v.rule == (case.rule or row)), None)
    assert broken is not None, violations
    assert case.message in broken.message
    assert broken.site == refused.name
    assert broken.message.startswith(f"{refused.name} ({case.illegal.short}) on {load_target(target).runtime}")
    assert broken.mend


NOTED = {
    "vllm-sm80": {"wna8", "fp8-dynamic", "fp8-static", "fp8-block", "nvfp4", "mxfp4", "mxfp8"},
    "vllm-sm89": {"wna8", "nvfp4", "mxfp4", "mxfp8"},
    "vllm-sm90": {"wna8", "nvfp4", "mxfp4", "mxfp8"},
    "vllm-sm100": {"wna8"},
    "vllm-cpu": {"wna8"},
    "sglang": set(),
    "transformers": set(),
}
"""The rows whose kernels leave activations in 16 bits that the scheme rounds."""


@pytest.mark.parametrize(("target", "row"), EVERY_ROW)
def test_a_kernel_that_ignores_activations_is_told_where_it_loads(target: str, row: str) -> None:
    loaded = load_target(target)
    said = notes(loaded, [site(CASES[target][row].legal), site(preset("W4A16"), name="other")])
    if row in NOTED[target]:
        (note,) = said
        scheme = CASES[target][row].legal.short
        assert note.startswith(f"{target} does not round the activations of 1 linears as {scheme} says, {NAME} among")
        assert note.endswith(loaded.notes[row])
    else:
        assert said == []


def test_a_note_is_on_a_row_that_is_there_and_rounds_activations() -> None:
    for name in target_names():
        target = load_target(name)
        assert target.notes.keys() == NOTED[name]
        assert all(target.rows[row].activations is not None for row in target.notes)
    with pytest.raises(ValueError, match="notes on rows that are not there: fp9"):
        Target(name="t", runtime="r", hardware="h", loader="vllm", rows={}, notes={"fp9": "no"})


def test_targets_are_the_seven_documented_ones() -> None:
    assert target_names() == tuple(sorted(CASES))
