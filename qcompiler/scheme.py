"""Quantization schemes: what a tensor's numbers may be, in the vocabulary of compressed-tensors.

A `QuantSpec` describes one tensor (a weight, or an activation); a `Scheme` describes one linear layer. Both are
frozen and hashable: two layers have the same scheme exactly when their `Scheme`s are equal.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, PlainSerializer, ValidationError, model_validator

from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.options import Options


class Strategy(StrEnum):
    """Which elements share one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"  # one scale per output row
    GROUP = "group"  # `group_size` consecutive inputs of one row
    BLOCK = "block"  # a `block_structure` rectangle of the weight
    TOKEN = "token"  # activations: one scale per token
    TENSOR_GROUP = "tensor_group"  # NVFP4: FP8 scales per group under one FP32 global scale
    ATTN_HEAD = "attn_head"  # KV cache: one scale per head


class Format(StrEnum):
    """On-disk layouts of compressed-tensors (`format` in `quantization_config`)."""

    PACK_QUANTIZED = "pack-quantized"
    INT_QUANTIZED = "int-quantized"
    FLOAT_QUANTIZED = "float-quantized"
    NAIVE_QUANTIZED = "naive-quantized"
    NVFP4 = "nvfp4-pack-quantized"
    MXFP4 = "mxfp4-pack-quantized"
    MXFP8 = "mxfp8-quantized"
    MIXED_PRECISION = "mixed-precision"
    DENSE = "dense"


ScaleDtype = Literal["float8_e4m3fn", "uint8"]  # NVFP4's group scales; MX's power-of-two exponents


class QuantSpec(Options):
    """How one tensor is quantized.

    Omitted `strategy` is inferred: `group_size` means group, `block_structure` means block, dynamic integers or
    floats of an activation mean token, anything else channel. Raises `ConfigError` on a combination
    that means nothing.
    """

    type: Literal["int", "float"] = "int"
    bits: int
    symmetric: bool = True
    strategy: Strategy
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    scale_dtype: ScaleDtype | None = None

    @model_validator(mode="before")
    @classmethod
    def _infer(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        data.setdefault("bits", 8)
        if data.get("strategy") is None:
            if data.get("group_size") is not None:
                data["strategy"] = Strategy.GROUP
            elif data.get("block_structure") is not None:
                data["strategy"] = Strategy.BLOCK
            else:
                data["strategy"] = Strategy.TOKEN if data.get("dynamic") else Strategy.CHANNEL
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        grouped = self.strategy in (Strategy.GROUP, Strategy.TENSOR_GROUP)
        if self.type == "int" and not 2 <= self.bits <= 8:
            raise ValueError(f"integers have 2 to 8 bits, not {self.bits}")
        if self.type == "float" and self.bits not in (4, 8):
            raise ValueError(f"floats have 4 (E2M1) or 8 (E4M3) bits, not {self.bits}")
        if self.type == "float" and not self.symmetric:
            raise ValueError("float quantization is symmetric")
        if grouped != (self.group_size is not None) or (self.group_size is not None and self.group_size < 1):
            raise ValueError(
                f"strategy {self.strategy} and group_size {self.group_size}: group and tensor_group need a "
                "positive group_size, and nothing else takes one"
            )
        if (self.strategy is Strategy.BLOCK) != (self.block_structure is not None):
            raise ValueError("strategy block and block_structure [rows, columns] go together")
        if self.block_structure is not None and min(self.block_structure) < 1:
            raise ValueError(f"block_structure {list(self.block_structure)} must be positive")
        if self.strategy is Strategy.TOKEN and self.dynamic is not True:
            raise ValueError("strategy token is computed at run time: dynamic must be true")
        if (self.dynamic == "local") != (self.strategy is Strategy.TENSOR_GROUP and self.dynamic is not False):
            raise ValueError("dynamic 'local' belongs to strategy tensor_group, and only to it")
        if self.scale_dtype == "uint8" and not (
            self.type == "float" and self.strategy is Strategy.GROUP and self.group_size == 32
        ):
            raise ValueError("scale_dtype uint8 (MX) needs type float, strategy group and group_size 32")
        nvfp4 = self.strategy is Strategy.TENSOR_GROUP
        if nvfp4 != (self.scale_dtype == "float8_e4m3fn"):
            raise ValueError("strategy tensor_group (NVFP4) and scale_dtype float8_e4m3fn go together")
        if nvfp4 and (self.type, self.bits, self.group_size) != ("float", 4, 16):
            raise ValueError("strategy tensor_group is NVFP4: type float, bits 4, group_size 16")
        if self.type == "float" and self.bits == 4 and self.scale_dtype is None:
            raise ValueError("4-bit floats are NVFP4 (tensor_group, 16) or MXFP4 (group 32, scale_dtype uint8)")
        return self

    @property
    def is_nvfp4(self) -> bool:
        return self.strategy is Strategy.TENSOR_GROUP

    @property
    def is_mx(self) -> bool:
        return self.scale_dtype == "uint8"

    @property
    def short(self) -> str:
        """The compact form that printed graphs use, e.g. `int4/g128/asym` or `fp8/token`."""
        if self.is_nvfp4:
            name = "nvfp4"
        elif self.is_mx:
            name = f"mxfp{self.bits}"
        else:
            kind = "int" if self.type == "int" else "fp"
            match self.strategy:
                case Strategy.GROUP:
                    shape = f"g{self.group_size}"
                case Strategy.BLOCK:
                    assert self.block_structure is not None
                    shape = "b{}x{}".format(*self.block_structure)
                case _:
                    shape = str(self.strategy)
            name = f"{kind}{self.bits}/{shape}" + ("" if self.symmetric else "/asym")
        dynamic = self.dynamic is True and self.strategy is not Strategy.TOKEN
        return name + ("/dynamic" if dynamic and not self.is_mx else "")


class Scheme(Options):
    """What one linear layer becomes: its weight, and the activations that enter it (`None`: left as they are)."""

    weights: QuantSpec
    input_activations: QuantSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        w, a = self.weights, self.input_activations
        if w.dynamic is not False:
            raise ValueError("weights are static: dynamic must be false")
        if w.strategy in (Strategy.TOKEN, Strategy.ATTN_HEAD):
            raise ValueError(f"strategy {w.strategy} is for activations")
        if a is not None and a.strategy in (Strategy.CHANNEL, Strategy.BLOCK, Strategy.ATTN_HEAD):
            raise ValueError(f"strategy {a.strategy} is not one of input activations: token, tensor or group")
        if a is not None and a.strategy is Strategy.GROUP and a.dynamic is not True:
            raise ValueError("group-wise activation scales are computed at run time: dynamic must be true")
        if a is not None and not a.symmetric and a.strategy is Strategy.GROUP:
            raise ValueError("group-wise activations are symmetric")
        return self

    @property
    def format(self) -> Format:
        """The on-disk layout that loaders expect for this scheme."""
        w, a = self.weights, self.input_activations
        if w.is_nvfp4:
            return Format.NVFP4
        if w.is_mx:
            return Format.MXFP4 if w.bits == 4 else Format.MXFP8
        if w.type == "float":
            return Format.NAIVE_QUANTIZED if a is None else Format.FLOAT_QUANTIZED
        packed = a is None or w.bits < 8 or a.type == "float"
        return Format.PACK_QUANTIZED if packed else Format.INT_QUANTIZED

    def undivided(self, in_features: int) -> QuantSpec | None:
        """The spec whose groups do not divide so many inputs; None where all groups do."""
        for spec in (self.weights, self.input_activations):
            if spec is not None and spec.group_size is not None and in_features % spec.group_size:
                return spec
        return None

    @property
    def short(self) -> str:
        acts = f" a:{self.input_activations.short}" if self.input_activations else ""
        return f"w:{self.weights.short}{acts}"


def _int(bits: int, *, group_size: int | None = 128, symmetric: bool = True) -> QuantSpec:
    strategy = Strategy.CHANNEL if group_size is None else Strategy.GROUP
    return QuantSpec(type="int", bits=bits, group_size=group_size, strategy=strategy, symmetric=symmetric)


def _token(type_: Literal["int", "float"], bits: int) -> QuantSpec:
    return QuantSpec(type=type_, bits=bits, strategy=Strategy.TOKEN, dynamic=True)


def _fp8(strategy: Strategy) -> QuantSpec:
    block = (128, 128) if strategy is Strategy.BLOCK else None
    return QuantSpec(type="float", bits=8, strategy=strategy, block_structure=block)


def _nvfp4(dynamic: Literal[False, "local"] = False) -> QuantSpec:
    return QuantSpec(
        type="float",
        bits=4,
        strategy=Strategy.TENSOR_GROUP,
        group_size=16,
        dynamic=dynamic,
        scale_dtype="float8_e4m3fn",
    )


def _mx(bits: int, dynamic: bool = False) -> QuantSpec:
    return QuantSpec(
        type="float",
        bits=bits,
        strategy=Strategy.GROUP,
        group_size=32,
        dynamic=dynamic,
        scale_dtype="uint8",
    )


def _presets() -> dict[str, Scheme]:
    presets = {f"W{b}A16": Scheme(weights=_int(b)) for b in range(2, 9)}
    presets |= {f"W{b}A8": Scheme(weights=_int(b), input_activations=_token("int", 8)) for b in range(2, 8)}
    presets |= {f"W{b}A4": Scheme(weights=_int(b), input_activations=_token("int", 4)) for b in range(2, 5)}
    int8 = Scheme(weights=_int(8, group_size=None), input_activations=_token("int", 8))
    fp8_group = QuantSpec(type="float", bits=8, strategy=Strategy.GROUP, group_size=128, dynamic=True)
    fp8_static = QuantSpec(type="float", bits=8, strategy=Strategy.TENSOR)
    return presets | {
        "W4A16_ASYM": Scheme(weights=_int(4, symmetric=False)),
        "W8A8": int8,
        "INT8": int8,
        "W4AFP8": Scheme(weights=_int(4), input_activations=_token("float", 8)),
        "FP8": Scheme(weights=_fp8(Strategy.TENSOR), input_activations=fp8_static),
        "FP8_DYNAMIC": Scheme(weights=_fp8(Strategy.CHANNEL), input_activations=_token("float", 8)),
        "FP8_BLOCK": Scheme(weights=_fp8(Strategy.BLOCK), input_activations=fp8_group),
        "NVFP4": Scheme(weights=_nvfp4(), input_activations=_nvfp4("local")),
        "NVFP4A16": Scheme(weights=_nvfp4()),
        "MXFP4": Scheme(weights=_mx(4), input_activations=_mx(4, dynamic=True)),
        "MXFP4A16": Scheme(weights=_mx(4)),
        "MXFP8": Scheme(weights=_mx(8), input_activations=_mx(8, dynamic=True)),
        "MXFP8A16": Scheme(weights=_mx(8)),
    }


PRESETS: dict[str, Scheme] = _presets()
"""Preset names of compressed-tensors, expanded here so that a later library cannot change what they mean."""


def preset(name: str) -> Scheme:
    """The scheme behind a preset name (any case, `-` or `_`). Raises `ConfigError` with near names."""
    key = name.upper().replace("-", "_")
    if key not in PRESETS:
        raise ConfigError(
            f"unknown scheme {name!r}{did_you_mean(key, PRESETS)}",
            hint=f"presets: {', '.join(sorted(PRESETS))}; or spell out weights and input_activations",
        )
    return PRESETS[key]


def _preset_or_mapping(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return preset(value)
    except ConfigError as error:  # as a ValueError, pydantic adds where it was written
        raise ValueError(f"{error.message} ({error.hint})") from None


def plain_scheme(scheme: Scheme) -> str | dict[str, Any]:
    """A scheme as people write it: a preset's name where one is equal, else its specs without what is inferred."""
    name = next((name for name, known in PRESETS.items() if known == scheme), None)
    if name is not None:
        return name
    specs = {"weights": scheme.weights, "input_activations": scheme.input_activations}
    return {key: _plain_spec(spec) for key, spec in specs.items() if spec is not None}


def _plain_spec(spec: QuantSpec) -> dict[str, Any]:
    plain = {"type": spec.type} | spec.model_dump(mode="json", exclude_defaults=True)
    inferred = {key: value for key, value in plain.items() if key != "strategy"}
    try:
        return inferred if QuantSpec.model_validate(inferred) == spec else plain
    except ValidationError:  # the strategy that would be inferred does not go with the rest
        return plain


SchemeField = Annotated[Scheme, BeforeValidator(_preset_or_mapping), PlainSerializer(plain_scheme)]
"""A pydantic field that takes a preset's name or a spelled-out scheme, and prints as one."""


class KVCacheSpec(Options):
    """Quantization of the key/value cache: FP8 E4M3, one static scale per tensor or per head."""

    strategy: Literal["tensor", "attn_head"] = "tensor"

    @property
    def numbers(self) -> QuantSpec:
        """How keys and values are quantized."""
        strategy = Strategy.ATTN_HEAD if self.strategy == "attn_head" else Strategy.TENSOR
        return QuantSpec(type="float", bits=8, strategy=strategy)
